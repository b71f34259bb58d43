//! `stoker bench overhead`: what everything but the engine costs. A real server in a process of its own, real sockets,
//! real workers, whose engine makes every token at once; requests arrive in an open loop (arrivals don't wait for
//! answers) at a share of the rate at which the server saturates.

use std::{net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

use super::Spread;
use crate::{cli::BenchOverheadArgs, config::Config, output::Output};

/// Clients that ask without pause while saturation is looked for.
const CLOSED_LOOP_CLIENTS: usize = 16;
/// How long that takes.
const SATURATION: Duration = Duration::from_secs(3);
/// How a stream ends.
const END: &[u8] = b"data: [DONE]\n\n";
/// Requests that may be under way before the open loop counts as overrun.
const IN_FLIGHT_MAX: usize = 2048;

#[derive(Debug, Serialize)]
struct Report {
    tokens_per_request: u32,
    saturation_requests_per_s: f64,
    load: f64,
    requests_per_s: f64,
    requests: usize,
    first_token_ms: Spread,
    request_ms: Spread,
    server_cpu_us_per_token: f64,
    worker_cpu_us_per_token: f64,
}

/// A server in a process of its own, killed when dropped.
struct Served {
    child: Child,
    address: SocketAddr,
}

/// Connections that are not in use.
#[derive(Clone)]
struct Connections {
    address: SocketAddr,
    idle: Arc<Mutex<Vec<SendRequest<Full<Bytes>>>>>,
    body: Bytes,
}

/// One request's times.
#[derive(Debug, Clone, Copy)]
struct Sample {
    first_token: Duration,
    total: Duration,
}

/// Runs the bench with the default model's tokenizer and template.
pub(crate) async fn run(config: &Config, args: &BenchOverheadArgs, output: Output) -> anyhow::Result<()> {
    ensure!(args.load > 0.0 && args.load <= 1.0, "--load is a share of saturation, above 0 and at most 1");
    ensure!(args.tokens > 0 && args.seconds > 0, "--tokens and --seconds must be at least 1");
    let server = Served::start(config).await?;
    let body = json!({
        "model": args.model.as_str(),
        "messages": [{ "role": "user", "content": "How much does everything else cost?" }],
        "max_tokens": args.tokens,
        "temperature": 0,
        "stream": true,
    });
    let measured = measure(&server, args, body).await;
    server.stop().await?;
    let report = measured?;
    output.show(&report, |r| {
        format!(
            "saturation   {:.0} requests/s of {} tokens\n\
             first token  {:.2} ms median, {:.2} ms at the 99th percentile, at {:.0} % of that\n\
             whole        {:.2} ms median, {:.2} ms at the 99th percentile\n\
             CPU          {:.1} us per token in the server, {:.1} us in the worker's protocol",
            r.saturation_requests_per_s,
            r.tokens_per_request,
            r.first_token_ms.p50,
            r.first_token_ms.p99,
            r.load * 100.0,
            r.request_ms.p50,
            r.request_ms.p99,
            r.server_cpu_us_per_token,
            r.worker_cpu_us_per_token,
        )
    })
}

async fn measure(
    server: &Served,
    args: &BenchOverheadArgs,
    body: serde_json::Value,
) -> anyhow::Result<Report> {
    let connections = Connections {
        address: server.address,
        idle: Arc::default(),
        body: serde_json::to_vec(&body)?.into(),
    };
    // The first one starts the model.
    connections.request(Instant::now()).await?;

    let saturation = saturate(&connections).await?;
    let rate = saturation * args.load;
    let before = server.cpu()?;
    let samples = open_loop(&connections, rate, Duration::from_secs(args.seconds)).await?;
    let after = server.cpu()?;

    #[expect(clippy::cast_precision_loss, reason = "a count of requests")]
    let tokens = samples.len() as f64 * f64::from(args.tokens);
    let per_token =
        |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() * 1e6 / tokens;
    let times = |of: fn(&Sample) -> Duration| Spread::ms(&samples.iter().map(of).collect::<Vec<_>>());
    Ok(Report {
        tokens_per_request: args.tokens,
        saturation_requests_per_s: saturation,
        load: args.load,
        requests_per_s: rate,
        requests: samples.len(),
        first_token_ms: times(|s| s.first_token),
        request_ms: times(|s| s.total),
        server_cpu_us_per_token: per_token(before.0, after.0),
        worker_cpu_us_per_token: per_token(before.1, after.1),
    })
}

/// Requests a second when a fixed number of clients asks without pause.
async fn saturate(connections: &Connections) -> anyhow::Result<f64> {
    let end = Instant::now() + SATURATION;
    let mut clients = JoinSet::new();
    for _ in 0..CLOSED_LOOP_CLIENTS {
        let connections = connections.clone();
        clients.spawn(async move {
            let mut count = 0_u32;
            while Instant::now() < end {
                connections.request(Instant::now()).await?;
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let mut total = 0;
    while let Some(count) = clients.join_next().await {
        total += count??;
    }
    Ok(f64::from(total) / SATURATION.as_secs_f64())
}

/// Requests at `rate` a second with exponential gaps, whatever becomes of them; latency counts from the planned moment.
async fn open_loop(connections: &Connections, rate: f64, time: Duration) -> anyhow::Result<Vec<Sample>> {
    let mut random = 0x5eed_u64;
    let mut gap = move || {
        // SplitMix64 (Steele, Lea, Flood 2014), then the inverse of the exponential distribution.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let uniform = ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - uniform).ln() / rate)
    };
    // A thread of its own keeps the time: the runtime's timers are a millisecond coarse.
    let (arrivals, mut arrived) = mpsc::channel(IN_FLIGHT_MAX);
    let clock = std::thread::spawn(move || {
        let begun = Instant::now();
        let mut at = begun + gap();
        while at < begun + time {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if arrivals.try_send(at).is_err() {
                return false;
            }
            at += gap();
        }
        true
    });
    let mut requests = JoinSet::new();
    let mut samples = Vec::new();
    while let Some(planned) = arrived.recv().await {
        let connections = connections.clone();
        requests.spawn(async move { connections.request(planned).await });
        while let Some(done) = requests.try_join_next() {
            samples.push(done??);
        }
        ensure!(requests.len() < IN_FLIGHT_MAX, "the server does not keep up at {rate:.0} requests/s");
    }
    while let Some(done) = requests.join_next().await {
        samples.push(done??);
    }
    ensure!(matches!(clock.join(), Ok(true)), "the client does not keep up at {rate:.0} requests/s");
    ensure!(!samples.is_empty(), "no request was made: --seconds is too short for this rate");
    Ok(samples)
}

// === impl Connections ===

impl Connections {
    async fn request(&self, planned: Instant) -> anyhow::Result<Sample> {
        let idle = self.idle.lock().pop();
        let mut sender = match idle {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect().await?,
        };
        sender.ready().await?;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/chat/completions")
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(self.body.clone()))?;
        let mut response = sender.send_request(request).await?;
        if !response.status().is_success() {
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            bail!("the server answered {status}: {}", String::from_utf8_lossy(&body));
        }
        let mut first_token = None;
        let mut tail = Vec::new();
        while let Some(frame) = response.body_mut().frame().await {
            if let Ok(data) = frame?.into_data() {
                // The first event carries the role; a token's event carries content.
                let is_token = || data.windows(11).any(|w| w == b"\"content\":\"");
                if first_token.is_none() && is_token() {
                    first_token = Some(planned.elapsed());
                }
                // The end may come in pieces.
                tail.extend_from_slice(&data);
                tail.drain(..tail.len().saturating_sub(END.len()));
            }
        }
        ensure!(tail == END, "a stream did not end with [DONE]");
        let total = planned.elapsed();
        self.idle.lock().push(sender);
        Ok(Sample { first_token: first_token.context("a stream had no token")?, total })
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
        });
        Ok(sender)
    }
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
        let mut child = command.spawn().context("starting the server")?;
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

    /// CPU time of the server and of its workers.
    fn cpu(&self) -> anyhow::Result<(Duration, Duration)> {
        let server = self.child.id().context("the server has ended")?;
        let mut workers = Duration::ZERO;
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            if let Some((parent, time)) = process(pid).filter(|(parent, _)| *parent == server) {
                debug_assert_eq!(parent, server);
                workers += time;
            }
        }
        let own = process(server).context("the server has ended")?.1;
        Ok((own, workers))
    }
}

/// Parent and CPU time of a process.
fn process(pid: u32) -> Option<(u32, Duration)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    super::load::parse_stat(&stat)
}
