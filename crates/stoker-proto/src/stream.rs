//! Gateway and worker: token ids in, token ids out. The worker knows no text.
//!
//! The gateway numbers its streams on each connection. A stream ends with exactly one [`End`] or [`Failure`]; after
//! that the worker sends nothing for it. A closed connection aborts its streams.

#![expect(missing_docs, reason = "the derives generate undocumented helpers; fields are documented here")]

use prost::{Message, Oneof};
use stoker_types as types;

/// From a gateway.
#[derive(Clone, PartialEq, Message)]
pub struct ToWorker {
    #[prost(oneof = "to_worker::Kind", tags = "1, 2")]
    pub kind: Option<to_worker::Kind>,
}

/// Kinds of [`ToWorker`].
pub mod to_worker {
    use super::{Abort, Generate, Oneof};

    /// One of.
    #[derive(Clone, PartialEq, Oneof)]
    #[expect(clippy::large_enum_variant, reason = "most messages are the large one")]
    pub enum Kind {
        #[prost(message, tag = "1")]
        Generate(Generate),
        #[prost(message, tag = "2")]
        Abort(Abort),
    }
}

/// Continue this sequence.
#[derive(Clone, PartialEq, Message)]
pub struct Generate {
    /// Number of the stream, new on this connection.
    #[prost(uint64, tag = "1")]
    pub stream: u64,
    /// The instance's generation; another is refused with [`FailureCode::WrongGeneration`].
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// For logs and traces.
    #[prost(string, tag = "3")]
    pub request: String,
    /// Prompt token ids, at least one.
    #[prost(uint32, repeated, tag = "4")]
    pub prompt: Vec<u32>,
    /// Ids generated before, when a stream is resumed: penalties and randomness count them as generated, and the first
    /// new token has position `generated.len()`.
    #[prost(uint32, repeated, tag = "5")]
    pub generated: Vec<u32>,
    /// Most ids to have been generated at the end, those in `generated` included.
    #[prost(uint32, tag = "6")]
    pub tokens_max: u32,
    /// A generated id among these ends the sequence; it is sent as the last token.
    #[prost(uint32, repeated, tag = "7")]
    pub stop_ids: Vec<u32>,
    #[prost(message, optional, tag = "8")]
    pub sampling: Option<Sampling>,
    /// KV blocks are shared only among requests with the same salt.
    #[prost(bytes = "bytes", tag = "9")]
    pub cache_salt: bytes::Bytes,
}

/// `stoker_types::Sampling` on the wire.
#[derive(Clone, PartialEq, Message)]
pub struct Sampling {
    #[prost(float, tag = "1")]
    pub temperature: f32,
    #[prost(float, tag = "2")]
    pub top_p: f32,
    #[prost(uint32, tag = "3")]
    pub top_k: u32,
    #[prost(float, tag = "4")]
    pub min_p: f32,
    #[prost(float, tag = "5")]
    pub repetition_penalty: f32,
    #[prost(float, tag = "6")]
    pub frequency_penalty: f32,
    #[prost(float, tag = "7")]
    pub presence_penalty: f32,
    #[prost(btree_map = "uint32, float", tag = "8")]
    pub logit_bias: std::collections::BTreeMap<u32, f32>,
    #[prost(uint64, tag = "9")]
    pub seed: u64,
    #[prost(uint32, optional, tag = "10")]
    pub logprobs: Option<u32>,
}

/// Stop this stream at the next step. Answered by [`End`] with [`Finish::Cancelled`], unless the stream had ended.
#[derive(Clone, PartialEq, Message)]
pub struct Abort {
    #[prost(uint64, tag = "1")]
    pub stream: u64,
}

/// From a worker: everything that one step brought for this connection's streams, in order of the lists.
#[derive(Clone, PartialEq, Message)]
pub struct FromWorker {
    #[prost(message, repeated, tag = "1")]
    pub begun: Vec<Begun>,
    #[prost(message, repeated, tag = "2")]
    pub tokens: Vec<Token>,
    #[prost(message, repeated, tag = "3")]
    pub ends: Vec<End>,
    #[prost(message, repeated, tag = "4")]
    pub failures: Vec<Failure>,
}

/// The prompt has been computed.
#[derive(Clone, PartialEq, Message)]
pub struct Begun {
    #[prost(uint64, tag = "1")]
    pub stream: u64,
    /// From arrival at the worker until prefill began, microseconds.
    #[prost(uint64, tag = "2")]
    pub waited_us: u64,
    /// From there until the prompt was computed, microseconds.
    #[prost(uint64, tag = "3")]
    pub prefill_us: u64,
    /// Prompt tokens whose KV was there already.
    #[prost(uint32, tag = "4")]
    pub cached_tokens: u32,
}

/// One new token.
#[derive(Clone, PartialEq, Message)]
pub struct Token {
    #[prost(uint64, tag = "1")]
    pub stream: u64,
    /// Its place among the generated tokens, from 0. Without a gap.
    #[prost(uint32, tag = "2")]
    pub position: u32,
    #[prost(uint32, tag = "3")]
    pub id: u32,
    /// Its natural-log probability, where asked for.
    #[prost(float, optional, tag = "4")]
    pub logprob: Option<f32>,
    /// The likeliest alternatives in falling order, where asked for.
    #[prost(message, repeated, tag = "5")]
    pub top: Vec<TopToken>,
}

/// An alternative.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct TopToken {
    #[prost(uint32, tag = "1")]
    pub id: u32,
    #[prost(float, tag = "2")]
    pub logprob: f32,
}

/// The stream is over.
#[derive(Clone, PartialEq, Message)]
pub struct End {
    #[prost(uint64, tag = "1")]
    pub stream: u64,
    #[prost(enumeration = "Finish", tag = "2")]
    pub finish: i32,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Finish {
    /// One of `stop_ids`.
    Stop = 0,
    /// `tokens_max`, or the context is full.
    Length = 1,
    /// Aborted.
    Cancelled = 2,
}

/// The stream failed.
#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    #[prost(uint64, tag = "1")]
    pub stream: u64,
    #[prost(enumeration = "FailureCode", tag = "2")]
    pub code: i32,
    #[prost(string, tag = "3")]
    pub message: String,
}

/// What a gateway can do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FailureCode {
    /// A bug or a fault in the engine.
    Internal = 0,
    /// The worker serves another generation or nothing: ask for a new seat. Nothing was generated.
    WrongGeneration = 1,
    /// No KV memory for even this sequence alone. Nothing was generated.
    OutOfMemory = 2,
    /// The request breaks the protocol's rules (empty prompt, id out of the vocabulary, longer than the context).
    Invalid = 3,
    /// The model was taken away by force, or the worker is shutting down.
    Unloaded = 4,
}

// === conversions ===

impl From<&types::Sampling> for Sampling {
    fn from(s: &types::Sampling) -> Self {
        let types::Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
            logprobs,
        } = s.clone();
        Self {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
            logprobs,
        }
    }
}

impl From<Sampling> for types::Sampling {
    fn from(s: Sampling) -> Self {
        let Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
            logprobs,
        } = s;
        Self {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            logit_bias,
            seed,
            logprobs,
        }
    }
}

impl From<Finish> for types::FinishReason {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Stop => Self::Stop,
            Finish::Length => Self::Length,
            Finish::Cancelled => Self::Cancelled,
        }
    }
}
