//! The tokenizer in a GGUF file's metadata.
//!
//! Two kinds: `gpt2`, byte-level BPE with merges, where `tokenizer.ggml.pre` names how text is split beforehand; and
//! `llama`, SentencePiece BPE with a score for each piece and single bytes for what has none.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};
use tokenizers::{AddedToken, models::bpe::BPE};

use super::{
    AddSpecial, Tokenizer, VOCABULARY_MAX,
    definition::Definition,
    names::{Names, Taken},
    split::{GPT2, LLAMA3, QWEN2},
};
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
    ids: Names,
}

/// Builds the tokenizer that a GGUF file's metadata describes.
///
/// # Errors
/// [`TextError::UnknownPreTokenizer`] and [`TextError::UnsupportedModel`] for what isn't implemented; else what is
/// missing or contradictory.
pub fn from_gguf(header: &Header) -> Result<Tokenizer, TextError> {
    let kind = required_str(header, "tokenizer.ggml.model")?;
    let vocabulary = Vocabulary::read(header)?;
    match kind {
        "gpt2" => byte_level(header, vocabulary),
        "llama" => sentence_piece(header, &vocabulary),
        _ => Err(TextError::UnsupportedModel { kind: shown(kind) }),
    }
}

/// `gpt2`: byte-level BPE.
fn byte_level(header: &Header, vocabulary: Vocabulary<'_>) -> Result<Tokenizer, TextError> {
    let name = header.str("tokenizer.ggml.pre").unwrap_or("default");
    let pre = Pre::named(name).ok_or_else(|| TextError::UnknownPreTokenizer { pre: shown(name) })?;
    let merges = merges(header)?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
    let special = vocabulary.special(header, [None; 4]);
    let post_processor = vocabulary.post_processor(header, &special, pre.add_bos);
    let Vocabulary { tokens, kinds, ids } = vocabulary;
    let mut definition = Definition {
        names: ids,
        merges: merges.into_iter().map(|(left, right)| (left.into(), right.into())).collect(),
        ignore_merges: pre.ignore_merges,
        compose: pre.nfc,
        patterns: pre.patterns.iter().map(|&pattern| pattern.to_owned()).collect(),
        added: Vec::new(),
        post_processor,
    };
    for (token, special) in added(&tokens, &kinds) {
        definition
            .add(token.to_owned(), special, false)
            .ok_or_else(|| TextError::bad_tokenizer("an added token can't be found in normalised text"))?;
    }
    Tokenizer::byte_level(definition, special, AddSpecial::default())
}

/// The tokens that are found in the text as a whole, and whether they are special.
fn added<'a>(tokens: &[&'a str], kinds: &[Kind]) -> impl Iterator<Item = (&'a str, bool)> {
    tokens.iter().zip(kinds).filter_map(|(&token, kind)| match kind {
        Kind::Control | Kind::Unknown => Some((token, true)),
        Kind::UserDefined => Some((token, false)),
        Kind::Normal | Kind::Unused | Kind::Byte => None,
    })
}

/// `llama`: SentencePiece BPE. The piece with the highest score is merged first; ranks of merges say the same.
fn sentence_piece(header: &Header, vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, TextError> {
    let merges = match merges(header)? {
        Some(merges) => merges.into_iter().map(|(left, right)| (left.to_owned(), right.to_owned())).collect(),
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
    let added = added(&vocabulary.tokens, &vocabulary.kinds);
    let added = added.map(|(token, special)| AddedToken::from(token, special).normalized(false));
    inner.add_tokens(added).map_err(TextError::bad_tokenizer)?;
    let special = vocabulary.special(header, [Some(1), Some(2), Some(0), None]);
    let post_processor = vocabulary.post_processor(header, &special, true);
    if !post_processor.is_null() {
        inner.with_post_processor(Some(wrap::<tokenizers::PostProcessorWrapper>(post_processor)?));
    }
    Tokenizer::of_library(inner, special, AddSpecial::default())
}

/// The merges in the metadata, first to last; `None` when there are none.
fn merges(header: &Header) -> Result<Option<Vec<(&str, &str)>>, TextError> {
    const KEY: &str = "tokenizer.ggml.merges";
    let Some(value) = header.get(KEY) else { return Ok(None) };
    let bad = |problem: String| TextError::BadMetadata { key: KEY, problem };
    let lines = value.as_strings().ok_or_else(|| bad("must be an array of texts".to_owned()))?;
    let pair = |line: &'_ str| {
        // The left part is never empty, and may itself begin with a space.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let at = first + line[first..].find(' ')?;
        Some((at, at + 1))
    };
    let merges = lines.iter().map(|line| {
        let (end, begin) =
            pair(line).ok_or_else(|| bad(format!("has an entry that is no pair: `{}`", shown(line))))?;
        Ok((&line[..end], &line[begin..]))
    });
    merges.collect::<Result<Vec<_>, _>>().map(|merges| Some(merges).filter(|m| !m.is_empty()))
}

/// A part of a tokenizer from its description in `tokenizer.json`.
fn wrap<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, TextError> {
    serde_json::from_value(value).map_err(TextError::bad_tokenizer)
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
        let mut ids = Names::with_capacity(tokens.len(), tokens.iter().map(str::len).sum());
        for (token, second) in tokens.iter().zip(0..) {
            ids.push(token).map_err(|Taken(first)| TextError::DuplicateToken {
                token: shown(token),
                first,
                second,
            })?;
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
        self.tokens.iter().zip(0..).map(|(&token, id)| (token.to_owned(), id)).collect()
    }

    /// Texts of the named special tokens; `defaults` are the ids of those that the metadata doesn't name.
    fn special(&self, header: &Header, defaults: [Option<u32>; 4]) -> BTreeMap<String, String> {
        let keys = [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        ];
        let token = |((name, key), default): ((&str, &str), Option<u32>)| {
            // An id outside of the vocabulary means that there is none: llama.cpp reads it so, and files with -1 exist.
            let token = header.u32(key).or(default).and_then(|id| self.tokens.get(id as usize))?;
            Some((name.to_owned(), (*token).to_owned()))
        };
        keys.into_iter().zip(defaults).filter_map(token).collect()
    }

    /// The post-processor that puts the beginning and the end of a text around it, as the metadata says; null if none.
    fn post_processor(&self, header: &Header, special: &BTreeMap<String, String>, add_bos: bool) -> Value {
        let flag = |key: &str| header.get(key).and_then(crate::gguf::Value::as_bool);
        let around = |name: &str, wanted: bool| {
            let token = special.get(name).filter(|_| wanted)?;
            Some((token.as_str(), self.ids.id(token)?))
        };
        let before = around("bos_token", flag("tokenizer.ggml.add_bos_token").unwrap_or(add_bos));
        let after = around("eos_token", flag("tokenizer.ggml.add_eos_token").unwrap_or(false));
        if (before, after) == (None, None) { Value::Null } else { template(before, after) }
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
                if let (Some(l), Some(r)) = (self.ids.id(left), self.ids.id(right)) {
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
