//! A request's way to an instance: asking for a seat, getting one, being refused.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, ClientId, Generation, InstanceId, KeepAlive, ModelName, RequestId, StartFailure, Timeline,
};

/// A request for a seat: the right to run one sequence (or `sequences` of them) on an instance of a model.
#[derive(Debug, Clone)]
pub struct Admit {
    /// Of which model.
    pub model: ModelName,
    /// For which request.
    pub request: RequestId,
    /// Who asks.
    pub client: ClientId,
    /// How many sequences (`n`).
    pub sequences: u32,
    /// Prompt length in tokens.
    pub prompt_tokens: u32,
    /// How long the request may wait for its seat.
    pub wait_max: Duration,
    /// Overrides the model's keep-alive from this request on.
    pub keep_alive: Option<KeepAlive>,
}

/// Where a seat is. Held together with a permit whose drop gives the seat back.
#[derive(Debug, Clone, PartialEq)]
pub struct SeatInfo {
    /// Which instance.
    pub instance: InstanceId,
    /// The instance's generation; the worker refuses streams for another.
    pub generation: Generation,
    /// The worker's socket.
    pub socket: PathBuf,
    /// Context of the instance, in tokens.
    pub context: u32,
    /// The start that this request waited for; `None` when the instance was there already.
    pub cold_start: Option<Timeline>,
    /// How long the request waited for the seat.
    pub queued: Duration,
}

/// Why there is no seat.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// Too many wait already (HTTP 429).
    #[error("{waiting} requests are waiting ({scope}); the oldest has waited {oldest:.1?}")]
    QueueFull {
        /// How many wait.
        waiting: usize,
        /// Which bound was met: "for this model", "in all", "from this client".
        scope: String,
        /// Age of the oldest.
        oldest: Duration,
        /// When it may be worth trying again.
        retry_after: Duration,
    },
    /// The estimate says that it can't be ready in time, or the wait was in vain (HTTP 503).
    #[error("not ready within {wait_max:.1?}: {terms}")]
    NotInTime {
        /// What was granted.
        wait_max: Duration,
        /// The estimate's terms: "SSD 4.1 GB at 1.6 GB/s + 2 ahead = 14 s".
        terms: String,
        /// The estimate: when it will be ready.
        eta: Duration,
    },
    /// The model can't be started (HTTP 500 or 507, by the failure).
    #[error(transparent)]
    Start(#[from] StartFailure),
    /// It would not fit even into empty memory (HTTP 507).
    #[error("`{model}` needs {needed}, the budget is {budget}: {detail}")]
    TooLarge {
        /// Which.
        model: ModelName,
        /// Weights, KV and work together.
        needed: ByteSize,
        /// All there is.
        budget: ByteSize,
        /// The terms, and what would make it fit.
        detail: String,
    },
    /// The server is stopping (HTTP 503).
    #[error("the server is shutting down")]
    ShuttingDown,
}
