//! How the next token is chosen, and how a generation ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Sampling parameters of one sequence. A token is a pure function of (logits, these, `seed`, position).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it. 0 to 2.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens whose probability reaches this. 0 < p <= 1; 1 is off.
    pub top_p: f32,
    /// Only the k likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Only tokens at least this probable relative to the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logit of a token that has occurred; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for every time that it was generated; -2 to 2.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a token that was generated; -2 to 2.
    pub presence_penalty: f32,
    /// Added to logits before anything else, by token id.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Seed of the counter-based randomness. Always set: the gateway draws one where the client gave none.
    pub seed: u64,
    /// Return the log probability of each token and of this many alternatives; `None` is off.
    pub logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// A token and its natural-log probability under the model's distribution (temperature 1, before any filter).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token's id.
    pub token: u32,
    /// Its natural-log probability.
    pub logprob: f32,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-turn id or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// The client went away or asked for it.
    Cancelled,
}
