//! What the controller says of itself.

use std::time::Duration;

use serde::Serialize;
use stoker_types::{ByteSize, InstanceId, KeepAlive, MemoryBudget, ModelName, Timeline, WorkerId};

/// One instance, for `ps`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InstanceStatus {
    /// Which.
    pub instance: InstanceId,
    /// Of which model.
    pub model: ModelName,
    /// `starting`, `ready`, `draining` or `stopping`.
    pub state: &'static str,
    /// Its worker, once it is ready.
    pub worker: Option<WorkerId>,
    /// Context of one sequence, in tokens.
    pub context: u32,
    /// Most sequences.
    pub sequences: u32,
    /// Sequences that hold a seat.
    pub in_flight: u32,
    /// Where it is: `cpu`, `cuda:0`.
    pub device: String,
    /// Weights that it maps: chunks of the pool, or device memory.
    pub pool_bytes: ByteSize,
    /// KV cache reserved for it.
    pub kv_bytes: ByteSize,
    /// Work memory reserved for it on its device.
    pub work_bytes: ByteSize,
    /// Never makes room.
    pub pinned: bool,
    /// How long it stays when idle.
    pub keep_alive: KeepAlive,
    /// How long it has been idle; `None` when it is busy or not ready.
    pub idle: Option<Duration>,
    /// When it leaves by time if nobody uses it; `None`: not by time.
    pub expires_in: Option<Duration>,
    /// How long its start took; while it starts, how long it has taken so far.
    pub load_time: Duration,
    /// Where the start's time went, predicted and actual.
    pub timeline: Timeline,
}

/// All in all.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Requests that wait for a seat.
    pub waiting: usize,
    /// Sequences that hold a seat.
    pub in_flight: u32,
    /// Weights' chunks that instances map.
    pub dram_used: ByteSize,
    /// And may map.
    pub dram_budget: MemoryBudget,
    /// KV cache reserved.
    pub kv_used: ByteSize,
    /// And reservable.
    pub kv_budget: MemoryBudget,
    /// The server's devices; none where instances are in its memory.
    pub devices: Vec<DeviceUse>,
    /// Instances, whatever their state.
    pub instances: u32,
    /// Most instances.
    pub slots: u32,
    /// No new requests are admitted.
    pub shutting_down: bool,
}

/// What instances take of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceUse {
    /// Its name.
    pub name: String,
    /// Weights, KV caches and work memory of its instances.
    pub used: ByteSize,
    /// And what they may take.
    pub budget: MemoryBudget,
    /// What the driver says is free.
    pub free: ByteSize,
    /// Instances on it, whatever their state.
    pub instances: u32,
}

/// What happened to an instance, or was decided about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Its start was ordered.
    Start,
    /// It became ready.
    Ready,
    /// Its weights are on its device, after it became ready.
    Landed,
    /// Its start failed.
    Failed,
    /// It admits nobody new.
    Drain,
    /// It admits again.
    Undrain,
    /// It was told to stop.
    Stop,
    /// It is gone.
    Gone,
    /// Its worker said that it is busy, so it stays.
    Busy,
    /// Its worker died.
    Lost,
}

/// One decision, or what came of it, with its terms.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecisionRecord {
    /// Since the controller began.
    pub at: Duration,
    /// About which instance.
    pub instance: InstanceId,
    /// Of which model.
    pub model: ModelName,
    /// What.
    pub event: Event,
    /// Why, or how it went.
    pub terms: String,
}

impl Event {
    /// Its name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Ready => "ready",
            Self::Landed => "landed",
            Self::Failed => "failed",
            Self::Drain => "drain",
            Self::Undrain => "undrain",
            Self::Stop => "stop",
            Self::Gone => "gone",
            Self::Busy => "busy",
            Self::Lost => "lost",
        }
    }
}

/// What the controller knows of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// When it was asked: since the controller began.
    pub at: Duration,
    /// Which.
    pub model: ModelName,
    /// Its instances.
    pub instances: Vec<InstanceStatus>,
    /// Requests that wait for it.
    pub waiting: usize,
    /// How long the oldest has waited.
    pub oldest: Option<Duration>,
    /// What an instance takes, or why it can't fit: in words.
    pub sizing: String,
    /// How long a start would take, term by term; while one is under way, what it was expected to take.
    pub estimate: String,
    /// The sum of its terms: until it is ready.
    pub eta: Duration,
    /// The last failed start, while it still counts.
    pub failure: Option<String>,
    /// What was decided about it, oldest first.
    pub decisions: Vec<DecisionRecord>,
}
