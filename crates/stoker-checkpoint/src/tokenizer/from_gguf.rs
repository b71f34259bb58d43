//! The tokenizer in a GGUF file's metadata.
//!
//! Two kinds: `gpt2`, byte-level BPE with merges, where `tokenizer.ggml.pre` names how text is split beforehand; and
//! `llama`, SentencePiece BPE with a score for each piece and single bytes for what has none.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};
use tokenizers::{AddedToken, models::bpe::BPE};

use super::{AddSpecial, Tokenizer, VOCABULARY_MAX};
use crate::{error::shown, gguf::Header, text::TextError};

/// Every known value of `tokenizer.ggml.pre`.
pub const PRE_TOKENIZERS: &[&str] = &[
    "default",
    "gpt-2",
    "mpt",
    "olmo",
    "phi-2",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "pixtral",
    "dbrx",
    "smaug-bpe",
    "qwen2",
    "deepseek-r1-qwen",
    "megrez",
    "stablelm2",
    "tekken",
];

/// Longer pieces have no real model; the table of merges takes time in the square of a piece's length.
const PIECE_BYTES_MAX: usize = 1024;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a value of `tokenizer.ggml.pre` means. Each pattern splits what those before it left, matches and rests alike.
struct Pre {
    patterns: &'static [&'static str],
    /// A piece that is in the vocabulary as a whole isn't merged from parts.
    ignore_merges: bool,
    /// Compose characters first.
    nfc: bool,
    /// Whether a text begins with the beginning-of-text token, unless the metadata says otherwise.
    add_bos: bool,
}

/// What the metadata calls a token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary as the metadata has it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
}

/// Builds the tokenizer that a GGUF file's metadata describes.
///
/// # Errors
/// [`TextError::UnknownPreTokenizer`] and [`TextError::UnsupportedModel`] for what isn't implemented; else what is
/// missing or contradictory.
pub fn from_gguf(header: &Header) -> Result<Tokenizer, TextError> {
    let kind = required_str(header, "tokenizer.ggml.model")?;
    let vocabulary = Vocabulary::read(header)?;
    let (mut inner, add_bos) = match kind {
        "gpt2" => byte_level(header, &vocabulary)?,
        "llama" => sentence_piece(header, &vocabulary)?,
        _ => return Err(TextError::UnsupportedModel { kind: shown(kind) }),
    };
    let added = vocabulary.tokens.iter().zip(&vocabulary.kinds).filter_map(|(&token, kind)| match kind {
        Kind::Control | Kind::Unknown => Some(AddedToken::from(token, true).normalized(false)),
        Kind::UserDefined => Some(AddedToken::from(token, false).normalized(false)),
        Kind::Normal | Kind::Unused | Kind::Byte => None,
    });
    inner.add_tokens(added).map_err(TextError::bad_tokenizer)?;

    let mut special = BTreeMap::new();
    let default = |id| (kind == "llama").then_some(id);
    for (name, key, default) in [
        ("bos_token", "tokenizer.ggml.bos_token_id", default(1)),
        ("eos_token", "tokenizer.ggml.eos_token_id", default(2)),
        ("unk_token", "tokenizer.ggml.unknown_token_id", default(0)),
        ("pad_token", "tokenizer.ggml.padding_token_id", None),
    ] {
        // An id outside of the vocabulary means that there is none: llama.cpp reads it so, and files with -1 exist.
        let token = header.u32(key).or(default).and_then(|id| vocabulary.tokens.get(id as usize));
        if let Some(token) = token {
            special.insert(name.to_owned(), (*token).to_owned());
        }
    }
    let flag = |key: &str| header.get(key).and_then(crate::gguf::Value::as_bool);
    let add_bos = flag("tokenizer.ggml.add_bos_token").unwrap_or(add_bos);
    let add_eos = flag("tokenizer.ggml.add_eos_token").unwrap_or(false);
    let around = |name: &str, wanted: bool| {
        let token = special.get(name).filter(|_| wanted)?;
        Some((token.as_str(), *vocabulary.ids.get(token.as_str())?))
    };
    let around = (around("bos_token", add_bos), around("eos_token", add_eos));
    if around != (None, None) {
        inner.with_post_processor(Some(wrap::<tokenizers::PostProcessorWrapper>(template(
            around.0, around.1,
        ))?));
    }
    Tokenizer::new(inner, special, AddSpecial::default())
}

/// `gpt2`: byte-level BPE.
fn byte_level(
    header: &Header,
    vocabulary: &Vocabulary<'_>,
) -> Result<(tokenizers::Tokenizer, bool), TextError> {
    let name = header.str("tokenizer.ggml.pre").unwrap_or("default");
    let pre = Pre::named(name).ok_or_else(|| TextError::UnknownPreTokenizer { pre: shown(name) })?;
    let merges = merges(header)?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.map(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(TextError::bad_tokenizer)?;
    let mut inner = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        let nfc = wrap::<tokenizers::NormalizerWrapper>(json!({"type": "NFC"}))?;
        inner.with_normalizer(Some(nfc)).map_err(TextError::bad_tokenizer)?;
    }
    inner.with_pre_tokenizer(Some(wrap::<tokenizers::PreTokenizerWrapper>(pre.json())?));
    inner.with_decoder(Some(wrap::<tokenizers::DecoderWrapper>(byte_level_json(true))?));
    Ok((inner, pre.add_bos))
}

/// `llama`: SentencePiece BPE. The piece with the highest score is merged first; ranks of merges say the same.
fn sentence_piece(
    header: &Header,
    vocabulary: &Vocabulary<'_>,
) -> Result<(tokenizers::Tokenizer, bool), TextError> {
    let merges = match merges(header)? {
        Some(merges) => merges,
        None => vocabulary.merges_by_score(header)?,
    };
    let unknown = header.u32("tokenizer.ggml.unknown_token_id").unwrap_or(0);
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary.map(), merges)
        .fuse_unk(true)
        .byte_fallback(vocabulary.kinds.contains(&Kind::Byte));
    if let Some(unknown) = vocabulary.tokens.get(unknown as usize) {
        builder = builder.unk_token((*unknown).to_owned());
    }
    let mut inner = tokenizers::Tokenizer::new(builder.build().map_err(TextError::bad_tokenizer)?);
    let prefix =
        header.get("tokenizer.ggml.add_space_prefix").and_then(crate::gguf::Value::as_bool).unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    let normalizer = wrap::<tokenizers::NormalizerWrapper>(normalizer)?;
    inner.with_normalizer(Some(normalizer)).map_err(TextError::bad_tokenizer)?;
    inner.with_decoder(Some(wrap::<tokenizers::DecoderWrapper>(decoder)?));
    Ok((inner, true))
}

/// The merges in the metadata, first to last; `None` when there are none.
fn merges(header: &Header) -> Result<Option<Vec<(String, String)>>, TextError> {
    const KEY: &str = "tokenizer.ggml.merges";
    let Some(value) = header.get(KEY) else { return Ok(None) };
    let bad = |problem: String| TextError::BadMetadata { key: KEY, problem };
    let lines = value.as_strings().ok_or_else(|| bad("must be an array of texts".to_owned()))?;
    let pair = |line: &str| {
        // The left part is never empty, and may itself begin with a space.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let at = first + line[first..].find(' ')?;
        Some((line[..at].to_owned(), line[at + 1..].to_owned()))
    };
    let merges = lines.iter().map(|line| {
        pair(line).ok_or_else(|| bad(format!("has an entry that is no pair: `{}`", shown(line))))
    });
    merges.collect::<Result<Vec<_>, _>>().map(|merges| Some(merges).filter(|m| !m.is_empty()))
}

/// A part of a tokenizer from its description in `tokenizer.json`.
fn wrap<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, TextError> {
    serde_json::from_value(value).map_err(TextError::bad_tokenizer)
}

fn byte_level_json(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// A post-processor that puts tokens before and after a text.
fn template(before: Option<(&str, u32)>, after: Option<(&str, u32)>) -> Value {
    let special = |(token, _): (&str, u32)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let one = |sequence: &str| {
        let text = json!({"Sequence": {"id": sequence, "type_id": 0}});
        before.map(special).into_iter().chain([text]).chain(after.map(special)).collect::<Vec<_>>()
    };
    let tokens: serde_json::Map<_, _> = [before, after]
        .into_iter()
        .flatten()
        .map(|(token, id)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    let pair = [one("A"), one("B")].concat();
    json!({"type": "TemplateProcessing", "single": one("A"), "pair": pair, "special_tokens": tokens})
}

fn missing(key: &'static str) -> TextError {
    TextError::BadMetadata { key, problem: "is missing".to_owned() }
}

fn required_str<'a>(header: &'a Header, key: &'static str) -> Result<&'a str, TextError> {
    let value = header.get(key).ok_or_else(|| missing(key))?;
    value.as_str().ok_or_else(|| TextError::BadMetadata { key, problem: "must be a text".to_owned() })
}

// === impl Pre ===

impl Pre {
    fn named(name: &str) -> Option<Self> {
        let plain = Self { patterns: &[GPT2], ignore_merges: false, nfc: false, add_bos: false };
        Some(match name {
            "default" => {
                Self { patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..plain }
            }
            "gpt-2" | "mpt" | "olmo" | "phi-2" => plain,
            "smollm" | "starcoder" | "refact" | "command-r" => Self { patterns: &[r"\p{N}", GPT2], ..plain },
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                Self { patterns: &[LLAMA3], ignore_merges: true, add_bos: true, ..plain }
            }
            "dbrx" | "smaug-bpe" => Self { patterns: &[LLAMA3], ..plain },
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self { patterns: &[QWEN2], nfc: true, ..plain },
            "stablelm2" => Self { patterns: &[QWEN2], ..plain },
            "tekken" => Self { patterns: &[TEKKEN], ignore_merges: true, add_bos: true, ..plain },
            _ => return None,
        })
    }

    /// As in `tokenizer.json`.
    fn json(&self) -> Value {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Value> = self.patterns.iter().map(split).collect();
        steps.push(byte_level_json(false));
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

// === impl Vocabulary ===

impl<'a> Vocabulary<'a> {
    fn read(header: &'a Header) -> Result<Self, TextError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const KINDS: &str = "tokenizer.ggml.token_type";
        let bad = |key, problem: String| TextError::BadMetadata { key, problem };
        let value = header.get(TOKENS).ok_or_else(|| missing(TOKENS))?;
        let tokens = value.as_strings().ok_or_else(|| bad(TOKENS, "must be an array of texts".to_owned()))?;
        let len = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        if !(1..=VOCABULARY_MAX).contains(&len) {
            return Err(bad(TOKENS, format!("must have 1 to {VOCABULARY_MAX} entries, has {len}")));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(first) = ids.insert(token, id) {
                return Err(TextError::DuplicateToken { token: shown(token), first, second: id });
            }
        }
        let kinds = match header.get(KINDS) {
            None => vec![Kind::Normal; tokens.len()],
            Some(value) => {
                let kinds = value.as_i32s().filter(|kinds| kinds.len() == tokens.len()).ok_or_else(|| {
                    bad(KINDS, format!("must be an array of {len} whole numbers, one for each token"))
                })?;
                kinds.iter().map(|&kind| Kind::from_number(kind)).collect()
            }
        };
        Ok(Self { tokens: tokens.iter().collect(), kinds, ids })
    }

    fn map(&self) -> HashMap<String, u32, ahash::RandomState> {
        self.ids.iter().map(|(&token, &id)| (token.to_owned(), id)).collect()
    }

    /// The merges that give each piece's score the meaning that SentencePiece gives it: of all neighbours that form a
    /// piece, those of the highest score first. As transformers' conversion does.
    fn merges_by_score(&self, header: &Header) -> Result<Vec<(String, String)>, TextError> {
        const KEY: &str = "tokenizer.ggml.scores";
        let bad = |problem: String| TextError::BadMetadata { key: KEY, problem };
        let scores = header.get(KEY).ok_or_else(|| missing(KEY))?.as_f32s();
        let scores = scores.filter(|s| s.len() == self.tokens.len() && !s.iter().any(|x| x.is_nan()));
        let len = self.tokens.len();
        let scores =
            scores.ok_or_else(|| bad(format!("must be an array of {len} numbers, one for each token")))?;
        let mut merges = Vec::new();
        for ((&token, &kind), (&score, id)) in
            self.tokens.iter().zip(&self.kinds).zip(scores.iter().zip(0_u32..))
        {
            if kind != Kind::Normal {
                continue;
            }
            if token.len() > PIECE_BYTES_MAX {
                let problem = format!(
                    "belong to an absurd piece of {} bytes, at most {PIECE_BYTES_MAX} are possible",
                    token.len()
                );
                return Err(bad(problem));
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&l), Some(&r)) = (self.ids.get(left), self.ids.get(right)) {
                    merges.push((score, id, l, r));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        let text = |id: u32| self.tokens[id as usize].to_owned();
        Ok(merges.into_iter().map(|(_, _, left, right)| (text(left), text(right))).collect())
    }
}

impl Kind {
    fn from_number(number: i32) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}
