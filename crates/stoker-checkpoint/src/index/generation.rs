//! A model's own defaults for generation, and every id that ends a turn.

use std::path::Path;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{CheckpointError, GenerationDefaults, config::Support, gguf, json};

/// Tokens that end a turn under whatever name, as llama.cpp collects them: a model's own settings often name only one
/// of several.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_sentence|>",
    "<|end▁of▁sentence|>",
    "<end_of_utterance>",
];

/// A tokenizer beyond this is absurd.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// One id or several; negative ones mean none.
struct Ids(Vec<u32>);

#[derive(Deserialize, Default)]
struct Settings {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    eos_token_id: Option<Ids>,
    bos_token_id: Option<Ids>,
}

/// The part of a `tokenizer.json` that is looked at.
#[derive(Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// From a GGUF's metadata.
pub(super) fn gguf(header: &gguf::Header) -> GenerationDefaults {
    let f32 = |key: &str| header.get(key).and_then(gguf::Value::as_f32);
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        ids.extend(header.u32(&format!("tokenizer.ggml.{key}_token_id")));
    }
    let tokens = header.get("tokenizer.ggml.tokens").and_then(gguf::Value::as_strings);
    for (id, token) in (0u32..).zip(tokens.into_iter().flat_map(gguf::Strings::iter)) {
        if END_OF_TURN.contains(&token) {
            ids.push(id);
        }
    }
    let vocabulary = tokens.map_or(u32::MAX, |t| u32::try_from(t.len()).unwrap_or(u32::MAX));
    checked(GenerationDefaults {
        temperature: f32("general.sampling.temp"),
        top_p: f32("general.sampling.top_p"),
        top_k: header.u32("general.sampling.top_k"),
        min_p: f32("general.sampling.min_p"),
        repetition_penalty: f32("general.sampling.penalty_repeat"),
        eos_ids: unique(ids, vocabulary),
        bos_id: header.u32("tokenizer.ggml.bos_token_id").filter(|id| *id < vocabulary),
    })
}

/// From `generation_config.json`, `config.json` and `tokenizer.json`.
pub(super) fn hugging_face(
    dir: &Path,
    config_path: &Path,
    config: &[u8],
    support: &Support,
) -> Result<GenerationDefaults, CheckpointError> {
    let generation_path = dir.join("generation_config.json");
    let own: Settings = match json::read_if_there(&generation_path, json::CONFIG_BYTES_MAX)? {
        Some(bytes) => json::parse(&generation_path, &bytes)?,
        None => Settings::default(),
    };
    // Only the ids: sampling parameters in config.json are leftovers of old versions.
    let config: Value = json::parse(config_path, config)?;
    let from_config = |key: &str| {
        let value = config.get(key).cloned().unwrap_or_default();
        Option::<Ids>::deserialize(value)
            .map_err(|source| CheckpointError::Json { file: config_path.to_owned(), source })
    };
    let mut ids = own.eos_token_id.map_or_else(Vec::new, |ids| ids.0);
    ids.extend(from_config("eos_token_id")?.into_iter().flat_map(|ids| ids.0));
    let tokenizer_path = dir.join("tokenizer.json");
    if let Some(bytes) = json::read_if_there(&tokenizer_path, TOKENIZER_BYTES_MAX)? {
        let tokens: AddedTokens = json::parse(&tokenizer_path, &bytes)?;
        let ends = tokens.added_tokens.into_iter().filter(|t| END_OF_TURN.contains(&t.content.as_str()));
        ids.extend(ends.map(|t| t.id));
    }
    let vocabulary = match support {
        Support::Runs(config) => config.vocab_size,
        Support::Refused(_) => u32::MAX,
    };
    let bos = own.bos_token_id.map_or_else(|| from_config("bos_token_id"), |ids| Ok(Some(ids)))?;
    Ok(checked(GenerationDefaults {
        temperature: own.temperature,
        top_p: own.top_p,
        top_k: own.top_k.and_then(|k| u32::try_from(k).ok()),
        min_p: own.min_p,
        repetition_penalty: own.repetition_penalty,
        eos_ids: unique(ids, vocabulary),
        bos_id: bos.and_then(|ids| ids.0.first().copied()).filter(|id| *id < vocabulary),
    }))
}

/// Without doubles and ids that the model doesn't have, in order of appearance.
fn unique(ids: Vec<u32>, vocabulary: u32) -> Vec<u32> {
    let mut unique = Vec::new();
    for id in ids {
        if id < vocabulary && !unique.contains(&id) {
            unique.push(id);
        }
    }
    unique
}

/// Defaults are a courtesy: one that no request could ask for is dropped, and said so.
fn checked(mut defaults: GenerationDefaults) -> GenerationDefaults {
    drop_unless(&mut defaults.temperature, "temperature", |x| x.is_finite() && x >= 0.0);
    drop_unless(&mut defaults.top_p, "top_p", |x| x > 0.0 && x <= 1.0);
    drop_unless(&mut defaults.min_p, "min_p", |x| (0.0..=1.0).contains(&x));
    drop_unless(&mut defaults.repetition_penalty, "repetition_penalty", |x| x.is_finite() && x > 0.0);
    defaults
}

fn drop_unless(value: &mut Option<f32>, name: &'static str, valid: impl Fn(f32) -> bool) {
    if let Some(bad) = value.take_if(|x| !valid(*x)) {
        tracing::warn!(field = name, value = bad, "a default for generation is out of range and ignored");
    }
}

impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            One(i64),
            Several(Vec<i64>),
        }
        let ids = match Either::deserialize(deserializer)? {
            Either::One(id) => vec![id],
            Either::Several(ids) => ids,
        };
        Ok(Self(ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()))
    }
}
