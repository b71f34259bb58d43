//! The seam between HTTP and the engine: start a sequence, read its events, drop it to abort it.

mod connection;
mod inbox;
mod pool;

use std::{any::Any, sync::Arc, time::Duration};

use async_trait::async_trait;
use stoker_types::{FinishReason, SeatInfo, TokenLogprob};

pub use inbox::{Inbox, Overrun};
pub use pool::WorkerPool;

use crate::seams::SeatHold;

/// Runs sequences on the instance that a seat names.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Starts a sequence. Its events arrive in `outlet`; exactly one of them is terminal ([`StreamEvent::End`] or
    /// [`StreamEvent::Failed`]). Not cancel-safe in the sense that a cancelled call may or may not have started the
    /// sequence, which then ends by itself; nothing leaks.
    async fn start(
        &self,
        seat: &SeatInfo,
        order: SequenceOrder,
        outlet: Outlet,
    ) -> Result<Running, StreamFailure>;
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct SequenceOrder {
    /// For the worker's logs and traces.
    pub request: String,
    /// Prompt token ids.
    pub prompt: Arc<[u32]>,
    /// Most ids to generate.
    pub tokens_max: u32,
    /// Ids that end the sequence.
    pub stop_ids: Arc<[u32]>,
    /// How to choose ids.
    pub sampling: stoker_types::Sampling,
    /// KV blocks are shared only among requests with the same salt.
    pub cache_salt: bytes::Bytes,
}

/// Where a sequence's events go: one inbox for a request, its sequences told apart by number.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// The request's inbox.
    pub inbox: Arc<Inbox>,
    /// Number of the sequence within the request.
    pub sequence: u16,
    /// Keeps the seat until the sequence has ended.
    pub seat: SeatHold,
}

/// A running sequence. Dropping it aborts the sequence, if it still runs.
pub struct Running {
    _guard: Box<dyn Any + Send>,
}

/// Something happened to a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    /// Its prompt has been computed.
    Begun {
        /// From arrival at the worker until prefill began.
        waited: Duration,
        /// From there until the prompt was computed.
        prefill: Duration,
        /// Prompt tokens whose KV was there already.
        cached_tokens: u32,
    },
    /// A new token.
    Token {
        /// Its place among the generated tokens.
        position: u32,
        /// Its id.
        id: u32,
        /// Its log probability and the alternatives', where asked for.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// It ended well.
    End(FinishReason),
    /// It ended badly.
    Failed(StreamFailure),
}

/// Log probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen, natural.
    pub chosen: f32,
    /// The likeliest tokens, in falling order.
    pub top: Vec<TokenLogprob>,
}

/// Why a sequence ended badly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamFailure {
    /// The worker's connection closed: it died or was killed.
    #[error("the worker serving this model is gone: {detail}")]
    WorkerGone {
        /// What was seen of it.
        detail: String,
    },
    /// The worker serves something else by now; nothing was generated.
    #[error("the instance made room for another model before it took this request")]
    WrongGeneration,
    /// The instance was taken away by force.
    #[error("the instance was stopped: {detail}")]
    Unloaded {
        /// The worker's words.
        detail: String,
    },
    /// No KV memory for this sequence.
    #[error("not enough KV cache memory for this request: {detail}")]
    OutOfMemory {
        /// The worker's words.
        detail: String,
    },
    /// The client read more slowly than its bound allows.
    #[error("the client let more than {tokens_max} tokens wait, so its stream was ended")]
    SlowReader {
        /// The bound.
        tokens_max: usize,
    },
    /// A bug or fault in the engine, or an order that it rejects.
    #[error("the engine failed: {detail}")]
    Engine {
        /// The worker's words.
        detail: String,
    },
    /// The worker said something that the protocol doesn't allow.
    #[error("the worker broke the protocol: {detail}")]
    Protocol {
        /// What.
        detail: String,
    },
}

// === impl Running ===

impl Running {
    /// A sequence that `guard`'s drop aborts.
    #[must_use]
    pub fn new(guard: impl Any + Send) -> Self {
        Self { _guard: Box::new(guard) }
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Running")
    }
}

// === impl StreamFailure ===

impl StreamFailure {
    /// Whether the same request may succeed on another seat, as long as the client has seen nothing of it.
    #[must_use]
    pub const fn another_seat_may_do(&self) -> bool {
        matches!(self, Self::WorkerGone { .. } | Self::WrongGeneration | Self::Unloaded { .. })
    }
}
