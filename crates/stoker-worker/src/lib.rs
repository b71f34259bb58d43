//! The inference worker process: the protocol around `stoker-engine`.
//!
//! A worker is started by a node before it is needed, takes one model at a time, and serves its streams to gateways
//! over its own socket. See [`stoker_proto::control`] and [`stoker_proto::stream`] for what is said.
//!
//! Two threads: the main one runs every connection, the engine's owns the model and all sequences. The node's pings
//! are answered by the main one, so they say that the process lives; the step count in the answer says whether the
//! engine does. A node that is killed takes no worker with it: the next one finds it at a socket of its own.
//!
//! A panic anywhere ends the process with [`EXIT_PANIC`] after it was logged: the node sees that at once,
//! which it would not see of a thread that is missing.

mod connection;
mod cuda;
mod engine;
mod handover;
mod loader;
mod model;
mod process;

use std::{backtrace::Backtrace, fmt, panic, process::ExitCode, str::FromStr, sync::Arc, time::Duration};

use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

pub use process::WorkerLimits;

use engine::{Counters, EngineThread};
use model::ModelLoader;

/// Exit code after a panic, in the engine or elsewhere.
pub const EXIT_PANIC: u8 = 70;

/// Exit code when the worker could not be set up or had to give up.
pub const EXIT_FAILED: u8 = 71;

/// What a worker process is told on its command line. Everything else comes from its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerArgs {
    /// Threads that a model computes with when the load order doesn't say; 0: as many as there are cores.
    pub threads: u32,
    /// What it computes with.
    pub device: WorkerDevice,
    /// Instead of a model, an engine that costs nothing: for measuring everything else.
    pub standin: Option<StandIn>,
    /// Bounds.
    pub limits: WorkerLimits,
}

/// What a worker computes with: for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkerDevice {
    /// The processor, over weights in the node's pool. Written `cpu`.
    #[default]
    Cpu,
    /// The processor, over weights in a simulated device's memory. Written `simulated`.
    Simulated,
    /// A GPU, by its number in this process. Written `cuda:0`.
    Cuda(u32),
}

/// Why a string is no [`WorkerDevice`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no device of a worker: write `cpu`, `simulated` or `cuda:0`")]
pub struct ParseWorkerDeviceError {
    /// What was given.
    pub text: String,
}

/// An engine that costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandIn {
    /// How long each of its steps takes.
    pub step_time: Duration,
}

/// Runs a worker: standard input is the control socket. Returns when the node says so or is gone and the streams have
/// ended. Ends the process on a panic in any thread.
///
/// The caller has set up logging to standard error, in a way that takes no offence when that fails
/// (`log_internal_errors(false)` of `tracing-subscriber`): when the node dies, nobody reads it any more, and the streams
/// go on.
#[must_use]
pub fn run(args: WorkerArgs) -> ExitCode {
    exit_on_panic();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &*error, "the worker gives up");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn serve(args: WorkerArgs) -> Result<(), Box<dyn std::error::Error>> {
    let WorkerArgs { threads, device, standin, limits } = args;
    let inherited = handover::receive(std::io::stdin())?;
    inherited.control.set_nonblocking(true)?;
    inherited.listener.set_nonblocking(true)?;
    inherited.successor.set_nonblocking(true)?;
    // Whoever connects learns from the kernel who listens: this process from here on, not the one that made the socket.
    rustix::net::listen(&inherited.successor, 4)?;
    let pool = inherited.pool.try_clone()?;

    let (commands, receiver) = mpsc::channel(process::COMMANDS_MAX);
    let counters = Arc::<Counters>::default();
    let loader = ModelLoader::new(inherited.pool, device, threads, standin)?;
    let hello = process::Said { computes: loader.describe(), weights_first: loader.wants_weights_first() };
    let engine = EngineThread::new(receiver, Box::new(loader), Arc::clone(&counters));
    // Not joined: a step that does not end must not keep the process from ending.
    std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;

    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let control = UnixStream::from_std(inherited.control)?;
        let listener = UnixListener::from_std(inherited.listener)?;
        let successor = UnixListener::from_std(inherited.successor)?;
        let sockets = process::Sockets { control, listener, successor };
        process::serve(sockets, pool, hello, limits, commands, counters).await?;
        Ok(())
    })
}

fn exit_on_panic() {
    panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("?");
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = info.payload_as_str().unwrap_or("?");
        tracing::error!(thread, "{}", Backtrace::force_capture());
        // Last: it is what the node quotes.
        tracing::error!(thread, "panicked at {location}: {message}");
        #[expect(
            clippy::exit,
            reason = "no stack may be unwound past here: a half-dead worker would hang its streams"
        )]
        std::process::exit(EXIT_PANIC.into());
    }));
}

// === impl WorkerDevice ===

impl FromStr for WorkerDevice {
    type Err = ParseWorkerDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseWorkerDeviceError> {
        let wrong = || ParseWorkerDeviceError { text: text.chars().take(64).collect() };
        match text {
            "cpu" => Ok(Self::Cpu),
            "simulated" => Ok(Self::Simulated),
            _ => {
                let ordinal = text.strip_prefix("cuda:").ok_or_else(wrong)?;
                ordinal.parse().map(Self::Cuda).map_err(|_| wrong())
            }
        }
    }
}

impl fmt::Display for WorkerDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Simulated => f.write_str("simulated"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

// === impl WorkerLimits ===

impl Default for WorkerLimits {
    fn default() -> Self {
        Self { connections_max: 64, queue_bytes_max: 8 << 20, orphan_grace: Duration::from_secs(60) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_as_they_print() {
        for device in [WorkerDevice::Cpu, WorkerDevice::Simulated, WorkerDevice::Cuda(3)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(text.parse::<WorkerDevice>().is_err(), "{text}");
        }
    }
}
