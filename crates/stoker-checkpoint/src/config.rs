//! A model's architecture, normalised: the same values whether they came from a `config.json` of transformers 4 or 5
//! or from GGUF metadata.

use serde::{Deserialize, Serialize};

/// A family of models that the engine computes with one forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 1, 2, 3, Mistral, SmolLM 1 and 2.
    Llama,
}

/// How rotary embedding pairs up a head's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Dimension `i` with `i + d/2` (Hugging Face files).
    Halves,
    /// Dimension `2i` with `2i + 1` (q and k rows of Llama GGUF files are permuted for this).
    Interleaved,
}

/// A change of the rotary frequencies for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum RopeScaling {
    /// Positions are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, smooth in between.
    Llama3 {
        /// The divisor.
        factor: f32,
        /// Below this many rotations over the original context: divided.
        low_freq_factor: f32,
        /// Above this many: left alone.
        high_freq_factor: f32,
        /// The context that the frequencies were made for, tokens.
        original_context: u32,
    },
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Dimensions of a head that are rotated.
    pub dims: u32,
    /// Which dimensions form a pair.
    pub layout: RopeLayout,
    /// Scaling, if any. A GGUF's `rope_freqs.weight` (role [`RopeFreqs`](crate::Role::RopeFreqs)) divides the
    /// frequencies instead.
    pub scaling: Option<RopeScaling>,
}

/// Everything that the arithmetic depends on, apart from the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: u32,
    /// Decoder layers.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Dimensions of a head.
    pub head_dim: u32,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Context that the model was trained for, tokens.
    pub context_trained: u32,
    /// Epsilon of the RMS norms.
    pub norm_epsilon: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// A token attends to itself and the `n - 1` tokens before it (Mistral); `None`: to all.
    pub sliding_window: Option<u32>,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Query, key, value (and, for Llama, output) projections have biases.
    pub attention_bias: bool,
    /// Feed-forward projections have biases.
    pub mlp_bias: bool,
}

impl ModelConfig {
    /// Bytes of KV cache of one token: keys and values of every layer, in f32 (the CPU engine's KV type).
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> u64 {
        2 * 4 * u64::from(self.layers) * u64::from(self.kv_heads) * u64::from(self.head_dim)
    }
}
