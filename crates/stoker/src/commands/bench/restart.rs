//! `stoker bench restart`: a real server fills its memory from files, is killed with SIGKILL, and is started again. How
//! long until everything is in memory again, and what was read from disk for it.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use stoker_checkpoint::manifest::CHUNK_BYTES;
use stoker_types::{ByteSize, ModelName, clock};

use super::{Spread, synth};
use crate::{
    cli::BenchRestartArgs,
    client::{AdminClient, ApiClient},
    output::Output,
    serve::admin::{Done, ModelRequest, StatusReport},
};

/// Largest of the models that fill the memory.
const MODEL_BYTES_MAX: ByteSize = ByteSize::gib(8);

/// The server's budget above what the models' bytes need: each of their files ends in a chunk that is not full.
const CHUNKS_MORE: u64 = 8;

#[derive(Debug, Serialize)]
struct Report {
    models: usize,
    bytes: u64,
    /// From the server's start to the last model that it read from disk.
    first_load_ms: f64,
    /// From the start of the server behind a killed one until its API listens.
    listening_ms: Spread,
    /// Until a worker has every model, one after another.
    served_ms: Spread,
    /// Of each restart, as the API listens.
    resident_bytes: Vec<u64>,
    /// Of each restart, after every model was served.
    read_from_disk_bytes: Vec<u64>,
}

/// A server in a directory of its own. Killed on drop.
struct Server<'a> {
    child: Child,
    api: ApiClient,
    admin: AdminClient,
    models: &'a [ModelName],
}

/// Runs the bench, with its files in `parent`.
pub(crate) async fn run(args: &BenchRestartArgs, parent: &Path, output: Output) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let parent = args.dir.as_deref().unwrap_or(parent);
    std::fs::create_dir_all(parent)?;
    let count = args.size.bytes().div_ceil(MODEL_BYTES_MAX.bytes()).max(1);
    let each = ByteSize(args.size.bytes() / count);
    output.line(&format!("{count} models of {each} in {}", parent.display()));
    let made = (0..count)
        .map(|i| synth::make_of_size(&format!("restart-{i}"), each, parent, args.keep_files))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let names = (0..count).map(|i| ModelName::new(&format!("m{i}"))).collect::<Result<Vec<_>, _>>()?;

    // Short: sockets are in it.
    let home = std::env::temp_dir().join(format!("stoker-bench-{}", std::process::id()));
    std::fs::create_dir(&home)?;
    let outcome = measure(args, &made, &names, &home).await;
    if let Err(error) = std::fs::remove_dir_all(&home) {
        tracing::warn!(path = %home.display(), %error, "the bench's directory stays");
    }
    output.show(&outcome?, Report::text)
}

async fn measure(
    args: &BenchRestartArgs,
    made: &[synth::SyntheticModel],
    names: &[ModelName],
    home: &Path,
) -> anyhow::Result<Report> {
    let mut config = String::new();
    for (name, made) in names.iter().zip(made) {
        let path = std::path::absolute(&made.dir)?;
        writeln!(config, "[models.{name}]\npath = {:?}\ncontext = 128\nconcurrency = 1", path.display())?;
    }
    std::fs::write(home.join("stoker.toml"), config)?;
    let dram = ByteSize(args.size.bytes() + (CHUNKS_MORE * made.len() as u64) * CHUNK_BYTES);

    let began = clock::now();
    let mut server = Server::start(home, dram, names)?;
    server.serve_all().await?;
    let first_load_ms = began.elapsed().as_secs_f64() * 1e3;
    let bytes = server.resident().await?;

    let (mut listening, mut served, mut resident_bytes, mut read) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs {
        server.kill()?;
        let began = clock::now();
        server = Server::start(home, dram, names)?;
        listening.push(began.elapsed());
        resident_bytes.push(server.resident().await?);
        server.serve_all().await?;
        served.push(began.elapsed());
        read.push(server.metric("stoker_store_read_bytes_total").await?);
    }
    server.stop()?;
    Ok(Report {
        models: made.len(),
        bytes,
        first_load_ms,
        listening_ms: Spread::ms(&listening),
        served_ms: Spread::ms(&served),
        resident_bytes,
        read_from_disk_bytes: read,
    })
}

// === impl Server ===

impl<'a> Server<'a> {
    /// Starts one and returns when its API listens.
    fn start(home: &Path, dram: ByteSize, models: &'a [ModelName]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--listen", "127.0.0.1:0", "--kv", "1GiB", "--offline", "--log", "warn"])
            .args(["--dram", &dram.bytes().to_string()])
            // One serves each model; they cost nothing, so that what is measured is the memory.
            .args(["--standin", "--workers", &models.len().to_string()])
            .env_clear()
            .env("HOME", home)
            .env("STOKER_RUNTIME_DIR", home)
            .env("STOKER_CONFIG", home.join("stoker.toml"))
            .env("STOKER_MODELS", home.join("models"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a server")?;
        let stdout = child.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address: Option<SocketAddr> =
            line.split_once("http://").and_then(|(_, rest)| rest.split_once('/')?.0.parse().ok());
        let Some(address) = address else {
            let _ = child.kill();
            let status = child.wait()?;
            anyhow::bail!("the server did not start: {status}; it said `{}`", line.trim());
        };
        let (api, admin) = (ApiClient::new(address, None), AdminClient::new(home.join("admin.sock")));
        Ok(Self { child, api, admin, models })
    }

    /// Has a worker for every model, one after another.
    async fn serve_all(&self) -> anyhow::Result<()> {
        for model in self.models {
            let _: Done = self.admin.post("/preload", &ModelRequest { model: model.clone() }).await?;
        }
        Ok(())
    }

    async fn resident(&self) -> anyhow::Result<u64> {
        let status: StatusReport = self.admin.get("/status").await?;
        Ok(status.cached.iter().map(|row| row.bytes.bytes()).sum())
    }

    /// The sum of a counter's samples.
    async fn metric(&self, name: &str) -> anyhow::Result<u64> {
        let text = self.api.text("/metrics").await?;
        let samples = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        Ok(samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum())
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// In order, so that nothing stays behind.
    fn stop(&mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the server stopped with {status}");
        Ok(())
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // Already waited for as a rule.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Report ===

impl Report {
    fn text(&self) -> String {
        let Self {
            models,
            bytes,
            first_load_ms,
            listening_ms,
            served_ms,
            resident_bytes,
            read_from_disk_bytes,
        } = self;
        let of = |all: &[u64]| {
            let (min, max) = (all.iter().min().copied().unwrap_or(0), all.iter().max().copied().unwrap_or(0));
            if min == max {
                ByteSize(min).to_string()
            } else {
                format!("{} to {}", ByteSize(min), ByteSize(max))
            }
        };
        format!(
            "{} in {models} models; first load from disk {:.2} s\n\
             killed and started again, {} times:\n\
             \x20 API listens after     {:.0} ms (worst {:.0})\n\
             \x20 resident then         {}\n\
             \x20 every model served    {:.0} ms (worst {:.0})\n\
             \x20 read from disk        {}\n",
            ByteSize(*bytes),
            first_load_ms / 1e3,
            resident_bytes.len(),
            listening_ms.p50,
            listening_ms.max,
            of(resident_bytes),
            served_ms.p50,
            served_ms.max,
            of(read_from_disk_bytes),
        )
    }
}
