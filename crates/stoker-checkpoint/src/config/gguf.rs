//! The configuration in a GGUF file's metadata.
//!
//! Keys: `docs/gguf.md` of ggml. As for `config.json`, a key of the architecture that isn't known is refused by name.

use std::path::Path;

use super::{Architecture, ModelConfig, Rope, RopeLayout, RopeScaling, Support};
use crate::{
    CheckpointError,
    error::shown,
    gguf::{Header, Value},
};

/// Keys below `llama.` that are understood.
const UNDERSTOOD: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

struct Keys<'a> {
    path: &'a Path,
    header: &'a Header,
}

/// Reads a header's metadata; `path` is for messages.
///
/// # Errors
/// When a value is missing, of the wrong type or absurd. What is right but can't be computed is [`Support::Refused`].
pub fn read(path: &Path, header: &Header) -> Result<Support, CheckpointError> {
    let keys = Keys { path, header };
    match header.str("general.architecture") {
        Some("llama") => {}
        Some(other) => {
            return Ok(Support::Refused(format!(
                "architecture `{}` is not supported; supported is llama",
                shown(other)
            )));
        }
        None => return Err(keys.bad("general.architecture", "is missing or no text")),
    }
    let mut refusals = keys.refusals()?;

    let heads = keys.need_u32("llama.attention.head_count")?;
    let hidden_size = keys.need_u32("llama.embedding_length")?;
    let head_dim = match keys.u32("llama.attention.key_length")? {
        Some(dims) => dims,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(keys.bad("llama.attention.head_count", "doesn't divide `llama.embedding_length`")),
    };
    if let Some(other) = keys.u32("llama.attention.value_length")?.filter(|n| *n != head_dim) {
        refusals.push(format!(
            "`llama.attention.value_length` is {other}; only that of the keys ({head_dim}) is supported"
        ));
    }
    if let Some(other) = keys.u32("llama.rope.dimension_count")?.filter(|n| *n != head_dim) {
        refusals.push(format!(
            "`llama.rope.dimension_count` is {other}; only the whole head ({head_dim}) is supported"
        ));
    }
    let context_trained = keys.need_u32("llama.context_length")?;
    let scaling = keys.scaling(&mut refusals)?;
    let config = ModelConfig {
        architecture: Architecture::Llama,
        hidden_size,
        intermediate_size: keys.need_u32("llama.feed_forward_length")?,
        layers: keys.need_u32("llama.block_count")?,
        heads,
        kv_heads: keys.u32("llama.attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab_size: keys.vocab_size()?,
        context_trained,
        norm_epsilon: keys
            .f32("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.bad("llama.attention.layer_norm_rms_epsilon", "is missing"))?,
        rope: Rope {
            theta: keys.f32("llama.rope.freq_base")?.unwrap_or(10_000.0),
            dims: head_dim,
            layout: RopeLayout::Interleaved,
            scaling,
        },
        sliding_window: keys.u32("llama.attention.sliding_window")?.filter(|n| *n < context_trained),
        tied_embeddings: !keys.has_tensor("output.weight"),
        attention_bias: keys.has_tensor("blk.0.attn_q.bias"),
        mlp_bias: keys.has_tensor("blk.0.ffn_gate.bias"),
    };
    if !refusals.is_empty() {
        return Ok(Support::Refused(refusals.join("; ")));
    }
    config.validate().map_err(|e| keys.bad(e.key, &e.problem))?;
    Ok(Support::Runs(config))
}

// === impl Keys ===

impl Keys<'_> {
    fn bad(&self, key: &str, problem: &str) -> CheckpointError {
        let problem = problem.to_owned();
        CheckpointError::BadValue { file: self.path.to_owned(), key: key.to_owned(), problem }
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.header.tensors.iter().any(|t| t.name == name)
    }

    fn u32(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(0) => Err(self.bad(key, "is 0")),
            Some(n) => Ok(Some(n)),
            None => Err(self.bad(key, "must be one whole number of 32 bits")),
        }
    }

    fn need_u32(&self, key: &str) -> Result<u32, CheckpointError> {
        self.u32(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    fn f32(&self, key: &str) -> Result<Option<f32>, CheckpointError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        value.as_f32().map(Some).ok_or_else(|| self.bad(key, "must be a number with a fraction"))
    }

    /// Rows of the embedding: as many as the vocabulary has entries, where there is one.
    fn vocab_size(&self) -> Result<u32, CheckpointError> {
        let tokens = self.header.get("tokenizer.ggml.tokens").and_then(Value::as_strings);
        match tokens.map(|t| u32::try_from(t.len())) {
            Some(Ok(n)) if n > 0 => Ok(n),
            _ => self.need_u32("llama.vocab_size"),
        }
    }

    fn refusals(&self) -> Result<Vec<String>, CheckpointError> {
        let mut refusals = Vec::new();
        if let Some(other) = self.header.str("general.type").filter(|kind| *kind != "model") {
            refusals.push(format!("`general.type` is `{}`; only `model` can run by itself", shown(other)));
        }
        for key in self.header.metadata.keys() {
            if key.strip_prefix("llama.").is_some_and(|rest| !UNDERSTOOD.contains(&rest)) {
                refusals.push(format!("`{}` is not known and may change the answer", shown(key)));
            }
        }
        for key in ["llama.expert_count", "llama.expert_used_count"] {
            match self
                .header
                .get(key)
                .map(|v| v.as_u64().ok_or_else(|| self.bad(key, "must be a whole number")))
            {
                None | Some(Ok(0)) => {}
                Some(Ok(n)) => {
                    refusals.push(format!("`{key}` is {n}: mixtures of experts are not supported"))
                }
                Some(Err(error)) => return Err(error),
            }
        }
        Ok(refusals)
    }

    fn scaling(&self, refusals: &mut Vec<String>) -> Result<Option<RopeScaling>, CheckpointError> {
        let key = "llama.rope.scaling.type";
        let kind = match self.header.get(key) {
            None => None,
            Some(value) => Some(value.as_str().ok_or_else(|| self.bad(key, "must be a text"))?),
        };
        match kind {
            Some("none") => Ok(None),
            // A factor without a type is linear, as in files older than the type.
            None | Some("linear") => {
                let factor = match self.f32("llama.rope.scaling.factor")? {
                    Some(factor) => Some(factor),
                    None => self.f32("llama.rope.scale_linear")?,
                };
                Ok(factor.filter(|f| *f != 1.0 && *f != 0.0).map(|factor| RopeScaling::Linear { factor }))
            }
            Some(other) => {
                refusals.push(format!("`{key}` is `{}`; supported are none and linear", shown(other)));
                Ok(None)
            }
        }
    }
}
