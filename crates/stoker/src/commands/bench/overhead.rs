//! `stoker bench overhead`: what everything but the engine costs. A real server in a process of its own, real sockets,
//! real workers, whose engine makes every token at once; requests arrive in an open loop (arrivals don't wait for
//! answers) at a share of the rate at which the server saturates.
//!
//! Client and server share the machine, so a part of what is measured is the client's own and the kernel's: the same
//! client measures, at the same rate, an HTTP server that does nothing ([`floor`]).

mod client;
pub(crate) mod floor;

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    time::Instant,
};

use self::client::{Connections, Sample, Samples};
use super::Spread;
use crate::{cli::BenchOverheadArgs, config::Config, output::Output};

/// Clients that ask without pause while saturation is looked for.
const CLOSED_LOOP_CLIENTS: usize = 16;
/// How long that takes.
const SATURATION: Duration = Duration::from_secs(3);
/// Requests before anything is measured: connections, caches and the worker's pages are there then.
const WARM_UP: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize)]
struct Report {
    tokens_per_request: u32,
    saturation_requests_per_s: f64,
    load: f64,
    requests_per_s: f64,
    requests: usize,
    /// Answered with a 429, because something else held the machine up for too long.
    refused: usize,
    first_token_ms: Spread,
    request_ms: Spread,
    /// The same client, rate and answer, from a server that does nothing.
    floor_ms: Spread,
    server_cpu_us_per_request: f64,
    worker_cpu_us_per_request: f64,
    client_cpu_us_per_request: f64,
    floor_cpu_us_per_request: f64,
    server_cpu_us_per_token: f64,
    worker_cpu_us_per_token: f64,
}

/// A process that serves, killed when dropped.
struct Served {
    child: Child,
    address: SocketAddr,
}

/// CPU time used so far.
#[derive(Debug, Clone, Copy)]
struct Cpu {
    server: Duration,
    workers: Duration,
    client: Duration,
}

/// Runs the bench with the default model's tokenizer and template.
pub(crate) async fn run(config: &Config, args: &BenchOverheadArgs, output: Output) -> anyhow::Result<()> {
    ensure!(args.load > 0.0 && args.load <= 1.0, "--load is a share of saturation, above 0 and at most 1");
    ensure!(args.tokens > 0 && args.seconds > 0, "--tokens and --seconds must be at least 1");
    let server = Served::start(config).await?;
    let measured = measure(&server, args).await;
    server.stop().await?;
    let report = measured?;
    output.show(&report, |r| {
        format!(
            "saturation   {:.0} requests/s of {} tokens\n\
             first token  {:.2} ms median, {:.2} ms at the 99th percentile, at {:.0} % of that\n\
             whole        {:.2} ms median, {:.2} ms at the 99th percentile\n\
             floor        {:.2} ms median, {:.2} ms at the 99th percentile: a server that does nothing\n\
             CPU          {:.1} us per token in the server, {:.1} us in the worker's protocol\n\
             \x20            per request: {:.0} us server, {:.0} us worker, {:.0} us client, {:.0} us floor server",
            r.saturation_requests_per_s,
            r.tokens_per_request,
            r.first_token_ms.p50,
            r.first_token_ms.p99,
            r.load * 100.0,
            r.request_ms.p50,
            r.request_ms.p99,
            r.floor_ms.p50,
            r.floor_ms.p99,
            r.server_cpu_us_per_token,
            r.worker_cpu_us_per_token,
            r.server_cpu_us_per_request,
            r.worker_cpu_us_per_request,
            r.client_cpu_us_per_request,
            r.floor_cpu_us_per_request,
        ) + &match r.refused {
            0 => String::new(),
            refused => format!("\nrefused      {refused} requests: the machine was held up, measure again"),
        }
    })
}

async fn measure(server: &Served, args: &BenchOverheadArgs) -> anyhow::Result<Report> {
    let body = json!({
        "model": args.model.as_str(),
        "messages": [{ "role": "user", "content": "How much does everything else cost?" }],
        "max_tokens": args.tokens,
        "temperature": 0,
        "stream": true,
    });
    let time = Duration::from_secs(args.seconds);
    let connections = Connections::new(server.address, &body);
    // The first one starts the model.
    connections.request(Instant::now()).await?;
    connections.saturate(CLOSED_LOOP_CLIENTS, WARM_UP).await?;
    let saturation = connections.saturate(CLOSED_LOOP_CLIENTS, SATURATION).await?;
    let rate = saturation * args.load;
    let before = server.cpu()?;
    let samples = connections.open_loop(rate, time).await?;
    let used = server.cpu()?.since(before);

    let floor = Served::floor(&connections.body().await?).await?;
    let bare = Connections::new(floor.address, &body);
    bare.saturate(CLOSED_LOOP_CLIENTS, WARM_UP).await?;
    let before = floor.cpu()?;
    let floor_samples = bare.open_loop(rate, time).await?;
    let floor_used = floor.cpu()?.since(before);

    let count = |samples: &Samples| u32::try_from(samples.served.len()).map(f64::from);
    let (requests, floor_requests) = (count(&samples)?, count(&floor_samples)?);
    let us = |time: Duration, count: f64| time.as_secs_f64() * 1e6 / count;
    let times = |samples: &Samples, of: fn(&Sample) -> Duration| {
        Spread::ms(&samples.served.iter().map(of).collect::<Vec<_>>())
    };
    let tokens = requests * f64::from(args.tokens);
    Ok(Report {
        tokens_per_request: args.tokens,
        saturation_requests_per_s: saturation,
        load: args.load,
        requests_per_s: rate,
        requests: samples.served.len(),
        refused: samples.refused,
        first_token_ms: times(&samples, |s| s.first_token),
        request_ms: times(&samples, |s| s.total),
        floor_ms: times(&floor_samples, |s| s.first_token),
        server_cpu_us_per_request: us(used.server, requests),
        worker_cpu_us_per_request: us(used.workers, requests),
        client_cpu_us_per_request: us(used.client, requests),
        floor_cpu_us_per_request: us(floor_used.server, floor_requests),
        server_cpu_us_per_token: us(used.server, tokens),
        worker_cpu_us_per_token: us(used.workers, tokens),
    })
}

// === impl Served ===

impl Served {
    async fn start(config: &Config) -> anyhow::Result<Self> {
        let runtime = config.dirs.runtime.join("bench");
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["serve", "--standin", "--listen", "127.0.0.1:0", "--models"])
            .arg(&config.models.value)
            // A server of the user's may run in the usual place.
            .env("STOKER_RUNTIME_DIR", runtime)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // The access log is written as always, and goes nowhere.
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if let Some(file) = &config.file {
            command.arg("--config").arg(file);
        }
        let child = command.spawn().context("starting the server")?;
        Self::listening(child).await
    }

    /// A server that answers every request with `body`, and does nothing else.
    async fn floor(body: &[u8]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "floor"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting the server that does nothing")?;
        let mut stdin = child.stdin.take().context("the server that does nothing has no input")?;
        stdin.write_all(body).await?;
        drop(stdin);
        Self::listening(child).await
    }

    /// Waits until the process says where it listens.
    async fn listening(mut child: Child) -> anyhow::Result<Self> {
        let stdout = child.stdout.take().context("the server has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.next_line().await?.context("the server ended at start; its log says why")?;
        let address = line
            .split_once("http://")
            .and_then(|(_, rest)| rest.split_once('/'))
            .and_then(|(address, _)| address.parse().ok())
            .with_context(|| format!("the server said `{line}` and not where it listens"))?;
        Ok(Self { child, address })
    }

    /// Stops it in order, so that nothing of it is left when the next one starts.
    async fn stop(mut self) -> anyhow::Result<()> {
        let pid =
            self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let status = self.child.wait().await?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }

    /// CPU time of the server, of its workers, and of this process.
    fn cpu(&self) -> anyhow::Result<Cpu> {
        let server = self.child.id().context("the server has ended")?;
        let mut workers = Duration::ZERO;
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            if let Some((parent, time)) = process(pid).filter(|(parent, _)| *parent == server) {
                debug_assert_eq!(parent, server);
                workers += time;
            }
        }
        let time = |pid| process(pid).map(|(_, time)| time).context("the server has ended");
        Ok(Cpu { server: time(server)?, workers, client: time(std::process::id())? })
    }
}

// === impl Cpu ===

impl Cpu {
    fn since(self, before: Self) -> Self {
        Self {
            server: self.server.saturating_sub(before.server),
            workers: self.workers.saturating_sub(before.workers),
            client: self.client.saturating_sub(before.client),
        }
    }
}

/// Parent and CPU time of a process.
fn process(pid: u32) -> Option<(u32, Duration)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    super::load::parse_stat(&stat)
}
