//! `config.json` of transformers 4 and 5.
//!
//! Every key is either understood, known to leave the arithmetic alone, or refused by name: a key that nobody here has
//! heard of may change the answer.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Architecture, ModelConfig, Rope, RopeLayout, RopeScaling, Support};
use crate::{CheckpointError, error::shown, json};

/// Keys that don't change what a forward pass computes, whatever their value.
const HARMLESS: &[&str] = &[
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "max_window_layers",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Keys that are understood below.
const UNDERSTOOD: &[&str] = &[
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "pretraining_tp",
    "quantization_config",
    "rms_norm_eps",
    "rope_interleaved",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
];

/// Keys that are understood inside of `rope_scaling` and `rope_parameters`.
const UNDERSTOOD_ROPE: &[&str] = &[
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "type",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Llama,
    Mistral,
}

/// One JSON object, and what was found that can't be honoured.
struct Keys<'a> {
    path: &'a Path,
    /// "" or "rope_scaling.", for messages.
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

/// Reads the bytes of a `config.json`; `path` is for messages.
///
/// # Errors
/// When it is no JSON object, or a value is missing, of the wrong type or absurd. What is right but can't be computed
/// is [`Support::Refused`].
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Support, CheckpointError> {
    let map: Map<String, Value> = json::parse(path, bytes)?;
    let keys = Keys { path, prefix: "", map: &map };
    let mut refusals = Vec::new();

    let kind = match keys.str("model_type")? {
        Some("llama") => Kind::Llama,
        Some("mistral") => Kind::Mistral,
        Some(other) => {
            return Ok(Support::Refused(format!(
                "architecture `{}` is not supported; supported are llama and mistral",
                shown(other)
            )));
        }
        None => return Err(keys.bad("model_type", "is missing")),
    };
    keys.architectures(kind, &mut refusals)?;
    keys.unknown(&[UNDERSTOOD, HARMLESS], &mut refusals);
    keys.fixed(kind, &mut refusals)?;

    let heads = keys.need_u32("num_attention_heads")?;
    let hidden_size = keys.need_u32("hidden_size")?;
    let head_dim = match keys.u32("head_dim")? {
        Some(dims) => dims,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(keys.bad("num_attention_heads", "doesn't divide `hidden_size`")),
    };
    let kv_heads = match (map.contains_key("num_key_value_heads"), kind) {
        // Mistral's default, for a key that isn't there at all.
        (false, Kind::Mistral) => 8,
        _ => keys.u32("num_key_value_heads")?.unwrap_or(heads),
    };
    let context_trained = match keys.u32("max_position_embeddings")? {
        Some(n) => n,
        None if kind == Kind::Llama => 2048,
        None => 131_072,
    };
    let sliding_window = keys.window(kind, context_trained, &mut refusals)?;
    let (theta, scaling) = keys.rope(context_trained, &mut refusals)?;
    let config = ModelConfig {
        architecture: Architecture::Llama,
        hidden_size,
        intermediate_size: keys.need_u32("intermediate_size")?,
        layers: keys.need_u32("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        vocab_size: keys.need_u32("vocab_size")?,
        context_trained,
        norm_epsilon: keys.f32("rms_norm_eps")?.unwrap_or(1e-6),
        rope: Rope { theta, dims: head_dim, layout: RopeLayout::Halves, scaling },
        sliding_window,
        tied_embeddings: keys.bool("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: keys.bool("attention_bias")?.unwrap_or(false),
        mlp_bias: keys.bool("mlp_bias")?.unwrap_or(false),
    };
    if !refusals.is_empty() {
        return Ok(Support::Refused(refusals.join("; ")));
    }
    config.validate().map_err(|e| keys.bad(e.key, &e.problem))?;
    Ok(Support::Runs(config))
}

// === impl Keys ===

impl<'a> Keys<'a> {
    fn bad(&self, key: &str, problem: &str) -> CheckpointError {
        let key = format!("{}{}", self.prefix, shown(key));
        CheckpointError::BadValue { file: self.path.to_owned(), key, problem: problem.to_owned() }
    }

    /// The value, unless it is absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn str(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.bad(key, "must be a text"))).transpose()
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| self.bad(key, "must be true or false"))).transpose()
    }

    fn f64(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| self.bad(key, "must be a number"))).transpose()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the arithmetic is in f32; what overflows is refused later"
    )]
    fn f32(&self, key: &str) -> Result<Option<f32>, CheckpointError> {
        Ok(self.f64(key)?.map(|x| x as f32))
    }

    fn u32(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match (value.as_u64(), value.as_f64()) {
            (Some(n), _) => u32::try_from(n).ok(),
            // 8192.0 is written by some.
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "checked to be whole and in range"
            )]
            (None, Some(x)) if x.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&x) => Some(x as u32),
            _ => None,
        };
        match number {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(self.bad(key, "must be a positive whole number of 32 bits")),
        }
    }

    fn need_u32(&self, key: &str) -> Result<u32, CheckpointError> {
        self.u32(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    fn unknown(&self, lists: &[&[&str]], refusals: &mut Vec<String>) {
        for (key, value) in self.map {
            // What is null is off.
            if !value.is_null() && !lists.iter().any(|list| list.contains(&key.as_str())) {
                refusals.push(format!(
                    "`{}{}` is not known and may change the answer",
                    self.prefix,
                    shown(key)
                ));
            }
        }
    }

    fn architectures(&self, kind: Kind, refusals: &mut Vec<String>) -> Result<(), CheckpointError> {
        let Some(value) = self.get("architectures") else { return Ok(()) };
        let names = value.as_array().ok_or_else(|| self.bad("architectures", "must be an array of texts"))?;
        let wanted = match kind {
            Kind::Llama => "LlamaForCausalLM",
            Kind::Mistral => "MistralForCausalLM",
        };
        if let Some(other) = names.iter().find(|name| name.as_str() != Some(wanted)) {
            let other = shown(other.as_str().unwrap_or("?"));
            refusals.push(format!("`architectures` has `{other}`; only `{wanted}` is supported here"));
        }
        Ok(())
    }

    /// Keys of which one value is computed.
    fn fixed(&self, kind: Kind, refusals: &mut Vec<String>) -> Result<(), CheckpointError> {
        match self.str("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(other) => {
                refusals.push(format!("`hidden_act` is `{}`; only `silu` is supported", shown(other)));
            }
        }
        if let Some(quantization) = self.get("quantization_config") {
            let method =
                quantization.get("quant_method").and_then(Value::as_str).unwrap_or("no method named");
            refusals.push(format!(
                "`quantization_config` ({}) is not supported; quantised weights run from GGUF files",
                shown(method)
            ));
        }
        if let Some(n) = self.u32("pretraining_tp")?.filter(|n| *n > 1) {
            refusals.push(format!("`pretraining_tp` is {n}; only 1 is supported"));
        }
        if self.bool("rope_interleaved")? == Some(true) {
            refusals.push("`rope_interleaved` is true; only false is supported".to_owned());
        }
        if kind == Kind::Mistral {
            for key in ["attention_bias", "mlp_bias"] {
                if self.bool(key)? == Some(true) {
                    refusals.push(format!("`{key}` is true; a mistral model has no biases"));
                }
            }
        }
        self.full_rotary(refusals)
    }

    fn full_rotary(&self, refusals: &mut Vec<String>) -> Result<(), CheckpointError> {
        if let Some(x) = self.f64("partial_rotary_factor")?.filter(|x| *x != 1.0) {
            refusals.push(format!("`{}partial_rotary_factor` is {x}; only 1 is supported", self.prefix));
        }
        Ok(())
    }

    fn window(
        &self,
        kind: Kind,
        context: u32,
        refusals: &mut Vec<String>,
    ) -> Result<Option<u32>, CheckpointError> {
        let window = match kind {
            // Mistral's default, for a key that isn't there at all.
            Kind::Mistral if !self.map.contains_key("sliding_window") => Some(4096),
            _ => self.u32("sliding_window")?,
        };
        let window =
            window.filter(|_| !matches!(self.map.get("use_sliding_window"), Some(Value::Bool(false))));
        // A window that holds the whole context is none.
        let window = window.filter(|n| *n < context);
        if kind == Kind::Llama && window.is_some() {
            refusals.push("`sliding_window` is set, which a llama model doesn't have".to_owned());
        }
        if let Some(types) = self.get("layer_types") {
            let types =
                types.as_array().ok_or_else(|| self.bad("layer_types", "must be an array of texts"))?;
            let wanted = if window.is_some() { "sliding_attention" } else { "full_attention" };
            // Without a window below the context, sliding and full are the same.
            let same = |t: &Value| {
                t.as_str() == Some(wanted) || (window.is_none() && t.as_str() == Some("sliding_attention"))
            };
            if let Some(other) = types.iter().find(|t| !same(t)) {
                let other = shown(other.as_str().unwrap_or("?"));
                refusals.push(format!("`layer_types` has `{other}`; every layer must be `{wanted}`"));
            }
        }
        Ok(window)
    }

    /// Base and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).
    fn rope(
        &self,
        context: u32,
        refusals: &mut Vec<String>,
    ) -> Result<(f32, Option<RopeScaling>), CheckpointError> {
        let theta = self.f32("rope_theta")?;
        let (prefix, value) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters.", value),
            (None, Some(value)) => ("rope_scaling.", value),
            (None, None) => return Ok((theta.unwrap_or(10_000.0), None)),
        };
        let map =
            value.as_object().ok_or_else(|| self.bad(prefix.trim_end_matches('.'), "must be an object"))?;
        let keys = Keys { path: self.path, prefix, map };
        let theta = keys.f32("rope_theta")?.or(theta).unwrap_or(10_000.0);
        keys.unknown(&[UNDERSTOOD_ROPE], refusals);
        keys.full_rotary(refusals)?;
        let need = |key| keys.f32(key)?.ok_or_else(|| keys.bad(key, "is missing"));
        let kind = match keys.str("rope_type")? {
            Some(kind) => Some(kind),
            None => keys.str("type")?,
        };
        let scaling = match kind {
            None | Some("default") => None,
            Some("linear") => Some(RopeScaling::Linear { factor: need("factor")? }),
            Some("llama3") => Some(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: keys.u32("original_max_position_embeddings")?.unwrap_or(context),
            }),
            Some(other) => {
                refusals.push(format!(
                    "`{prefix}rope_type` is `{}`; supported are default, linear and llama3",
                    shown(other)
                ));
                None
            }
        };
        Ok((theta, scaling))
    }
}
