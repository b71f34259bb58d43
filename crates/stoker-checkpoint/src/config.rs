//! A model's architecture, normalised: the same values whether they came from a `config.json` of transformers 4 or 5
//! or from GGUF metadata.

use serde::{Deserialize, Serialize};

pub mod gguf;
pub mod hf;

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

/// What a checkpoint's settings come to.
#[derive(Debug, Clone, PartialEq)]
pub enum Support {
    /// The engine computes it.
    Runs(ModelConfig),
    /// The engine would compute something else. The text names each setting that it can't honour, and what it can.
    Refused(String),
}

/// A value outside of what any model has, or that contradicts another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct InvalidConfig {
    /// Which field of [`ModelConfig`].
    pub key: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

// === impl ModelConfig ===

impl ModelConfig {
    /// Checks what arithmetic on the values relies on: none is zero, products of any of them fit into 64 bits, heads
    /// divide evenly, numbers are finite.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let bad = |key, problem: String| Err(InvalidConfig { key, problem });
        for (key, value, max) in [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("layers", self.layers, 1 << 12),
            ("heads", self.heads, 1 << 14),
            ("kv_heads", self.kv_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("context_trained", self.context_trained, 1 << 30),
            ("sliding_window", self.sliding_window.unwrap_or(1), u32::MAX),
        ] {
            if value == 0 || value > max {
                return bad(key, format!("is {value}; it must be 1 to {max}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return bad("kv_heads", format!("({}) doesn't divide the heads ({})", self.kv_heads, self.heads));
        }
        if !self.head_dim.is_multiple_of(2) || self.rope.dims != self.head_dim {
            let problem =
                format!("is {}; it must be the head's dimensions ({}), even", self.rope.dims, self.head_dim);
            return bad("rope.dims", problem);
        }
        let mut positive = vec![("norm_epsilon", self.norm_epsilon), ("rope.theta", self.rope.theta)];
        match self.rope.scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => positive.push(("rope.scaling.factor", factor)),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
                positive.push(("rope.scaling.factor", factor));
                positive.push(("rope.scaling.low_freq_factor", low_freq_factor));
                // Their difference is divided by.
                positive.push((
                    "rope.scaling.high_freq_factor - low_freq_factor",
                    high_freq_factor - low_freq_factor,
                ));
                if original_context == 0 {
                    return bad("rope.scaling.original_context", "is 0".to_owned());
                }
            }
        }
        match positive.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            Some((key, value)) => bad(key, format!("is {value}; it must be positive and finite")),
            None => Ok(()),
        }
    }

    /// Bytes of KV cache of one token: keys and values of every layer, in f32 (the CPU engine's KV type).
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> u64 {
        2 * 4 * u64::from(self.layers) * u64::from(self.kv_heads) * u64::from(self.head_dim)
    }
}
