//! What the binary plugs in: where models are served, which there are, what the server says of itself.

use std::{any::Any, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use stoker_checkpoint::GenerationDefaults;
use stoker_types::{Admit, ModelName, Refusal, SeatInfo};

use crate::text::TextSource;

/// Grants seats on instances, starting instances where there are none.
#[async_trait]
pub trait Placement: Send + Sync + 'static {
    /// Waits for a seat, at most `admit.wait_max`. Cancel-safe: dropping the future gives up the place in the queue.
    async fn admit(&self, admit: Admit) -> Result<Seat, Refusal>;

    /// A request for this model is being prepared and will ask for a seat shortly: a start may begin. Returns at once.
    fn expect(&self, _model: &ModelName) {}

    /// `tokens` of a prompt were computed in `time`: makes estimates better. Returns at once.
    fn observe_prefill(&self, _model: &ModelName, _tokens: u32, _time: Duration) {}
}

/// The right to run a request's sequences on an instance, until `permit` is dropped.
pub struct Seat {
    /// Where.
    pub info: SeatInfo,
    /// Dropping it gives the seat back.
    pub permit: Box<dyn Any + Send>,
}

/// A seat's permit, shared by the request's sequences: the seat is given back when the last of them has ended in the
/// engine, however slowly the client reads.
#[derive(Clone)]
pub struct SeatHold {
    _permit: Arc<Mutex<Box<dyn Any + Send>>>,
}

/// The models that may be asked for.
pub trait Models: Send + Sync + 'static {
    /// All of them, loaded or not, by name.
    fn list(&self) -> Vec<ModelCard>;

    /// One of them. Called for every request, on the runtime's threads: it must not read files. The same `Arc` is
    /// returned until the model changes; a new one makes the gateway read tokenizer and template again.
    ///
    /// # Errors
    /// [`ModelLookupError`].
    fn get(&self, name: &str) -> Result<Arc<ServedModel>, ModelLookupError>;
}

/// A model in `/v1/models`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCard {
    /// Its name.
    pub id: ModelName,
    /// When it was added, seconds since the epoch.
    pub created: u64,
    /// Where it came from.
    pub owned_by: String,
    /// Context in tokens.
    pub context: Option<u32>,
    /// Why it can't run; `None` when it can.
    pub refusal: Option<String>,
}

/// A model that can run, as far as the gateway needs to know it.
pub struct ServedModel {
    /// Its name.
    pub name: ModelName,
    /// When it was added, seconds since the epoch.
    pub created: u64,
    /// Most tokens of prompt and answer together: what it was trained for, or less by its settings. An instance may
    /// have less; the seat says.
    pub context: u32,
    /// Rows of its embedding: token ids are below it.
    pub vocab_size: u32,
    /// Its own defaults for generation.
    pub defaults: GenerationDefaults,
    /// Opens its tokenizer and chat template.
    pub text: Arc<dyn TextSource>,
}

/// Why there is no such model to serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelLookupError {
    /// No model has this name.
    #[error("the model `{name}` does not exist{}", nearest_in_words(nearest))]
    Unknown {
        /// What was asked for.
        name: String,
        /// Names like it, best first.
        nearest: Vec<String>,
    },
    /// It is known, and the engine can't run it.
    #[error("the model `{name}` can't run: {why}")]
    NotRunnable {
        /// What was asked for.
        name: ModelName,
        /// The refusal's words.
        why: String,
    },
}

/// What the server says of itself, from outside the gateway.
pub trait Status: Send + Sync + 'static {
    /// The text of `/metrics`, in Prometheus' format.
    fn metrics(&self) -> String;

    /// Whether requests can be served now.
    ///
    /// # Errors
    /// What is missing, in words.
    fn ready(&self) -> Result<(), String>;
}

// === impl SeatHold ===

impl SeatHold {
    /// Shares a seat's permit.
    #[must_use]
    pub fn new(permit: Box<dyn Any + Send>) -> Self {
        Self { _permit: Arc::new(Mutex::new(permit)) }
    }
}

impl std::fmt::Debug for SeatHold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SeatHold")
    }
}

fn nearest_in_words(nearest: &[String]) -> String {
    if nearest.is_empty() {
        "; GET /v1/models lists those that do".into()
    } else {
        let names: Vec<String> = nearest.iter().map(|n| format!("`{n}`")).collect();
        format!("; nearest: {}", names.join(", "))
    }
}
