//! What goes into an engine and what each step brings: the same meaning as the messages between gateway and worker.

use std::time::Duration;

use stoker_types::{FinishReason, Sampling, TokenLogprob};

/// Bounds on an engine, given when a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most tokens of one sequence, prompt and generated together.
    pub context: u32,
    /// Most sequences computed at the same time; more wait.
    pub sequences_max: u32,
    /// Most bytes of KV cache.
    pub kv_bytes: u64,
    /// Most prompt tokens computed in one step: bounds how long a long prompt holds up the streams that are running.
    pub prefill_tokens_per_step: u32,
}

/// A sequence to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceRequest {
    /// Names the sequence until it ends; chosen by the caller.
    pub key: u64,
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// Ids generated before, when a sequence is resumed: penalties and randomness count them as generated, and the
    /// first new token has position `generated.len()`.
    pub generated: Vec<u32>,
    /// Most ids to have been generated at the end, those in `generated` included.
    pub tokens_max: u32,
    /// A generated id among these ends the sequence; it is sent as the last token.
    pub stop_ids: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// KV blocks are shared only among sequences with the same salt.
    pub cache_salt: Vec<u8>,
}

/// Why a sequence was not taken. Nothing of it is kept.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// No prompt.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error("prompt of {tokens} tokens does not fit into the context of {context} with a token to generate")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The context.
        context: u32,
    },
    /// An id that the model has no embedding for.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: u32,
    },
    /// A sampling parameter outside its range.
    #[error("{parameter} is {value}: {expected}")]
    Sampling {
        /// Its name.
        parameter: &'static str,
        /// What was given.
        value: f32,
        /// What it must be.
        expected: &'static str,
    },
    /// A running sequence has this key.
    #[error("sequence key {key} is in use")]
    DuplicateKey {
        /// The key.
        key: u64,
    },
    /// Even alone, the sequence at its full length needs more KV memory than there is.
    #[error("{tokens} tokens need {needed_bytes} bytes of KV cache, the instance has {kv_bytes}")]
    OutOfMemory {
        /// Prompt and `tokens_max` together, at most the context.
        tokens: u64,
        /// What they need.
        needed_bytes: u64,
        /// What there is.
        kv_bytes: u64,
    },
    /// As many sequences wait as may.
    #[error("{waiting} sequences are waiting, the most that may")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
}

/// What one step brought, in order of the fields. A sequence appears in exactly one of `ends` and `failures`, once,
/// and nowhere afterwards.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Sequences whose prompt has now been computed, before their first token.
    pub begun: Vec<Begun>,
    /// New tokens.
    pub tokens: Vec<NewToken>,
    /// Sequences that ended.
    pub ends: Vec<End>,
    /// Sequences that failed.
    pub failures: Vec<Failure>,
    /// Nothing can be computed any more in this process: the device is lost.
    pub broken: bool,
}

/// The prompt (and, for a resumed sequence, what was generated before) has been computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// Which sequence.
    pub key: u64,
    /// From submission until prefill began.
    pub waited: Duration,
    /// From there until the prompt was computed.
    pub prefill: Duration,
    /// Prompt tokens whose KV was there already.
    pub cached_tokens: u32,
}

/// One new token.
#[derive(Debug, Clone, PartialEq)]
pub struct NewToken {
    /// Which sequence.
    pub key: u64,
    /// Its place among the generated tokens, from 0, without a gap.
    pub position: u32,
    /// Its id.
    pub id: u32,
    /// Its natural-log probability under the model's own distribution, where asked for.
    pub logprob: Option<f32>,
    /// The likeliest alternatives in falling order, where asked for.
    pub top: Vec<TokenLogprob>,
}

/// A sequence is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Which sequence.
    pub key: u64,
    /// Why.
    pub finish: FinishReason,
}

/// A sequence failed through no fault of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which sequence.
    pub key: u64,
    /// What happened.
    pub message: String,
}

/// An engine's counters and gauges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences being computed.
    pub running: usize,
    /// Sequences waiting for a place or for KV memory.
    pub waiting: usize,
    /// Steps so far that computed something.
    pub steps: u64,
    /// Tokens generated so far.
    pub tokens: u64,
    /// Rows of prompts (and of recomputed sequences) computed so far.
    pub prefill_tokens: u64,
    /// Prompt tokens that needed no computing because their KV was there.
    pub cached_tokens: u64,
    /// Sequences that gave up their KV to an older one and were computed again.
    pub preemptions: u64,
    /// KV memory that running sequences hold, bytes.
    pub kv_bytes_used: u64,
    /// Device memory that the engine has now, beside the weights; 0 on the CPU.
    pub device_bytes: u64,
    /// KV memory that only the prefix cache holds: given up when a sequence needs it, bytes.
    pub kv_bytes_cached: u64,
    /// Most bytes of KV cache, whole blocks.
    pub kv_bytes_max: u64,
}

/// What a worker drives: [`Engine`](crate::Engine), or the bench's [`StandIn`](crate::StandIn). Synchronous, with one
/// owner; every call returns without waiting for anything but arithmetic.
pub trait StepEngine: Send {
    /// Takes a sequence. Its first output comes with a later [`step`](Self::step).
    ///
    /// # Errors
    /// [`SubmitError`]; the sequence was not taken.
    fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError>;

    /// Ends a sequence: the next step reports it as [`FinishReason::Cancelled`] and computes nothing for it. Does
    /// nothing when there is no such sequence.
    fn abort(&mut self, key: u64);

    /// Computes one batch. Brings nothing when there is nothing to do.
    fn step(&mut self) -> StepOutput;

    /// No sequence is running or waiting.
    fn is_idle(&self) -> bool;

    /// Counters and gauges.
    fn stats(&self) -> EngineStats;
}

// === impl StepOutput ===

impl StepOutput {
    /// Nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { begun, tokens, ends, failures, broken } = self;
        begun.is_empty() && tokens.is_empty() && ends.is_empty() && failures.is_empty() && !broken
    }
}
