//! What a node is told when it is opened.

use std::{ffi::OsString, io, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use stoker_checkpoint::{ChunkSum, Manifest};
use stoker_device::Device;
use stoker_types::{ByteSize, ModelName, StartFailure};

use crate::{Keeper, RuntimeDir, memory::MemoryConfig};

/// A node's settings.
pub struct NodeConfig {
    /// The node's directory.
    pub runtime: RuntimeDir,
    /// The worker processes that compute from the pool; none are started where there are [`Self::devices`].
    pub workers: WorkerConfig,
    /// The devices that models are served from, in the order of their [`stoker_types::DeviceId`]s; none: from the pool.
    pub devices: Vec<NodeDevice>,
    /// How its budgets follow what the machine has.
    pub memory: MemoryConfig,
    /// What keeps the store's memory when the process is killed, if anything is to. Ends with [`crate::Node::shutdown`].
    pub keeper: Option<Keeper>,
}

/// A device that models are served from.
#[derive(Debug)]
pub struct NodeDevice {
    /// What people call it: `cuda:0`.
    pub name: String,
    /// The device.
    pub device: Arc<dyn Device>,
    /// Most that instances may take of it; what the driver says is free, less max(512 MiB, 3 %), holds anyway.
    pub memory: Option<ByteSize>,
    /// What one instance takes of it beside weights and KV cache.
    pub work: ByteSize,
    /// Its worker processes.
    pub workers: WorkerConfig,
}

/// Worker processes.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Executable and arguments. Standard input is the control socket.
    pub command: Vec<OsString>,
    /// The whole environment of a worker: nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// Processes that are kept however few serve; at least one of them is ready for the next model.
    pub prewarmed: NonZeroU32,
    /// Most processes.
    pub workers_max: NonZeroU32,
    /// Threads that a worker computes with; 0: its choice.
    pub threads: u32,
    /// How it is noticed that one hangs.
    pub watchdog: Watchdog,
    /// How often in a row a worker may die before it was ready. After that, starts fail with its last words instead
    /// of trying for ever, and one new attempt is made at most every [`WorkerConfig::retry_after`].
    pub start_deaths_max: NonZeroU32,
    /// See [`WorkerConfig::start_deaths_max`].
    pub retry_after: Duration,
}

/// When a worker that doesn't move is killed. Counted in pings, so that a machine that slept doesn't look like a
/// worker that hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchdog {
    /// Time between two pings.
    pub ping_every: Duration,
    /// Unanswered pings after which it is killed; also how many intervals a process may take until it says hello.
    pub pings_unanswered_max: u32,
    /// Pings in a row that found sequences and no new step, after which it is killed; also how many intervals a load
    /// or unload may take in the worker.
    pub pings_without_step_max: u32,
    /// Intervals after which an idle worker that isn't needed any more is ended.
    pub idle_intervals_max: u32,
}

/// What the node knows models by.
pub trait Catalog: Send + Sync + 'static {
    /// A model's directory and manifest, of its files as they are now. May block for a file's read.
    ///
    /// # Errors
    /// [`StartFailure::UnknownModel`]; [`StartFailure::Changed`] when its files are not those that a request of now was
    /// made for (the next lookup finds the new ones); [`StartFailure::Read`].
    fn lookup(&self, model: &ModelName) -> Result<CatalogEntry, StartFailure>;

    /// A remote store has another version of the model's objects than the one that [`Catalog::lookup`] knows: the next
    /// lookup must find the new one.
    fn outdated(&self, model: &ModelName);

    /// A load computed the chunk sums of a model that had none: one list for each of its files. May block.
    fn learned(&self, model: &ModelName, sums: Vec<Vec<ChunkSum>>);
}

/// One model.
#[derive(Debug, Clone)]
pub struct CatalogEntry {
    /// Its directory: relative paths in the manifest begin here.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
}

/// Why a node can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The runtime directory can't be used.
    #[error("runtime directory {path}: {source}", path = path.display())]
    RuntimeDir {
        /// Which.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// Another node uses it.
    #[error("another stoker uses the runtime directory {path}; stop it or give this one its own", path = path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// A socket's path would be longer than the operating system allows.
    #[error("runtime directory {path} is too long for sockets: at most {max} bytes", path = path.display())]
    PathTooLong {
        /// Which.
        path: PathBuf,
        /// Longest that works, bytes.
        max: usize,
    },
    /// There is no command.
    #[error("the worker command is empty")]
    NoWorkerCommand,
    /// The pool can't be handed to workers.
    #[error("opening the pool for workers failed: {0}")]
    Pool(#[source] io::Error),
}

// === impl WorkerConfig, Watchdog ===

impl WorkerConfig {
    /// The defaults around a command.
    #[must_use]
    pub fn new(command: Vec<OsString>) -> Self {
        Self {
            command,
            env: Vec::new(),
            prewarmed: const { NonZeroU32::new(2).unwrap() },
            workers_max: const { NonZeroU32::new(32).unwrap() },
            threads: 0,
            watchdog: Watchdog::default(),
            start_deaths_max: const { NonZeroU32::new(5).unwrap() },
            retry_after: Duration::from_secs(10),
        }
    }
}

impl Default for Watchdog {
    fn default() -> Self {
        Self {
            ping_every: Duration::from_secs(1),
            pings_unanswered_max: 10,
            pings_without_step_max: 60,
            idle_intervals_max: 60,
        }
    }
}
