//! Orders to a server's agent (the node), and what comes of them.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, BytesPerSec, DeviceId, DeviceMemoryState, Generation, InstanceId, ModelName, NodeMemory, Tier,
    Timeline, WorkerId,
};

/// Start one instance of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartOrder {
    /// The new instance's id, chosen by who gives the order.
    pub instance: InstanceId,
    /// Larger than that of any earlier order to this node; a node refuses a generation that it has passed.
    pub generation: Generation,
    /// What to start.
    pub model: ModelName,
    /// Where.
    pub device: DeviceId,
    /// Context in tokens for one sequence.
    pub context: u32,
    /// Most sequences at the same time.
    pub sequences_max: u32,
    /// Most bytes of KV cache.
    pub kv_bytes: ByteSize,
}

/// An instance that is ready.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// The worker that serves it.
    pub worker: WorkerId,
    /// The worker's Unix socket: streams go there, past the node.
    pub socket: PathBuf,
    /// Where the time went, node side.
    pub timeline: Timeline,
}

/// What of a file is not as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileChange {
    /// There is none any more.
    Gone,
    /// Its length, bytes.
    Length {
        /// When it was indexed.
        was: u64,
        /// Now.
        is: u64,
    },
    /// Its inode: another file of the same length is in its place.
    Replaced,
    /// Its modification time: it was written to.
    Written,
    /// The object that it is in a remote store: there is another version.
    Object,
}

/// Why an instance could not be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum StartFailure {
    /// The node does not know the model.
    #[error("no model `{model}` on this server")]
    UnknownModel {
        /// What was asked for.
        model: ModelName,
    },
    /// It is known and can't be computed.
    #[error("model `{model}` can't run: {why}")]
    NotRunnable {
        /// What was asked for.
        model: ModelName,
        /// The refusal's words.
        why: String,
    },
    /// There is no room, and nothing may make room.
    #[error("model `{model}` needs {needed}, free {free}: {detail}")]
    OutOfMemory {
        /// What was asked for.
        model: ModelName,
        /// What it takes.
        needed: ByteSize,
        /// What is free.
        free: ByteSize,
        /// Who holds the rest, and what would make it fit.
        detail: String,
    },
    /// A checksum does not match: file, chunk and sums are in `detail`.
    #[error("checkpoint of `{model}` is corrupt: {detail}")]
    Corrupt {
        /// What was asked for.
        model: ModelName,
        /// File, chunk, offset, both sums.
        detail: String,
    },
    /// A weight file is not the one that was indexed. It has been indexed anew, or will be by the next start; whoever
    /// waited asked in the old model's tokens.
    #[error(
        "`{file}` of model `{model}` changed since it was added: {change}; it is indexed anew, ask again"
    )]
    Changed {
        /// What was asked for.
        model: ModelName,
        /// The file's name, without its directory.
        file: String,
        /// What is not as it was.
        change: FileChange,
    },
    /// Reading it failed.
    #[error("reading `{model}` failed: {detail}")]
    Read {
        /// What was asked for.
        model: ModelName,
        /// File, offset and the operating system's words.
        detail: String,
    },
    /// The worker could not take it, or died.
    #[error("the worker for `{model}` failed: {detail}")]
    Worker {
        /// What was asked for.
        model: ModelName,
        /// Signal or exit code, and its last lines.
        detail: String,
    },
    /// Somebody who wanted it no longer does, or the node is stopping.
    #[error("starting `{model}` was cancelled")]
    Cancelled {
        /// What was asked for.
        model: ModelName,
    },
    /// The order is older than one that the node has obeyed.
    #[error("order {given} is older than {seen}")]
    StaleOrder {
        /// The order's generation.
        given: Generation,
        /// The newest that the node has seen.
        seen: Generation,
    },
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("it is gone"),
            Self::Length { was, is } => write!(f, "{is} bytes, were {was}"),
            Self::Replaced => f.write_str("another file is in its place"),
            Self::Written => f.write_str("it was written to"),
            Self::Object => f.write_str("its remote store has another version"),
        }
    }
}

impl StartFailure {
    /// Whether the same order, given anew, may succeed without anybody mending anything. Not so [`Self::Changed`]: the
    /// new model is not the one that was asked.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Worker { .. } | Self::Cancelled { .. } | Self::Read { .. })
    }
}

/// How to stop an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopMode {
    /// Only when no sequence is running; the worker itself decides, so no race can cut a stream.
    IfIdle,
    /// At once, ending its streams with an error.
    Now,
}

/// Why an instance was not stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum StopFailure {
    /// It has sequences running.
    #[error("instance {instance} is busy with {sequences} sequences")]
    Busy {
        /// Which.
        instance: InstanceId,
        /// How many.
        sequences: u32,
    },
    /// There is no such instance; so it is stopped.
    #[error("no instance {instance}")]
    Unknown {
        /// Which.
        instance: InstanceId,
    },
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Its process is starting.
    Starting,
    /// Prewarmed, without a model.
    Idle,
    /// Taking a model.
    Loading,
    /// Serving a model.
    Serving,
}

/// One worker, as the node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Which.
    pub worker: WorkerId,
    /// Its process id.
    pub pid: u32,
    /// Where it computes: `cpu`, `cuda:0`.
    pub device: String,
    /// What it is doing.
    pub state: WorkerState,
    /// The instance that it serves or is loading.
    pub instance: Option<(InstanceId, ModelName)>,
    /// Resident memory that is its own, not shared with the pool.
    pub private_bytes: ByteSize,
}

/// A tier's measured rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TierRate {
    /// Bytes from this tier.
    pub tier: Tier,
    /// Moving average over real loads; `None` before the first.
    pub rate: Option<BytesPerSec>,
}

/// A node's state at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeSnapshot {
    /// Its budgets, as of its last look at the machine.
    pub memory: NodeMemory,
    /// Bytes of chunks in it.
    pub dram_used: ByteSize,
    /// Bytes of those that instances have mapped (not evictable).
    pub dram_mapped: ByteSize,
    /// What of each model is in DRAM: bytes from the front, in execution order.
    pub residency: Vec<(ModelName, ByteSize)>,
    /// Measured rates.
    pub rates: Vec<TierRate>,
    /// Its devices, in order; none where workers compute from its memory.
    pub devices: Vec<DeviceMemoryState>,
    /// Its workers.
    pub workers: Vec<WorkerStatus>,
}

/// What a node says by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeEvent {
    /// A worker process ended without being told to. Its instance and its streams are gone; its chunks are free.
    WorkerLost {
        /// Which.
        worker: WorkerId,
        /// What it served.
        instance: Option<InstanceId>,
        /// Signal or exit code.
        reason: String,
        /// The last lines that it printed.
        last_lines: Vec<String>,
    },
    /// A model that was being served while its weights were on their way to a device is there whole.
    InstanceLanded {
        /// Which.
        instance: InstanceId,
        /// From the order to the last byte.
        took: Duration,
        /// Where that time went.
        timeline: Timeline,
    },
    /// A model that was being served didn't arrive on its device whole: its instance and its streams are gone.
    InstanceLost {
        /// Which.
        instance: InstanceId,
        /// Why.
        failure: StartFailure,
    },
    /// What is in DRAM or on a device has changed, or what may be; [`NodeSnapshot`] says how.
    ResidencyChanged,
    /// A load finished and the tier's rate was measured.
    Measured {
        /// Which model.
        model: ModelName,
        /// Where they came from.
        tier: Tier,
        /// Bytes from there.
        bytes: ByteSize,
        /// How long.
        time: Duration,
    },
}
