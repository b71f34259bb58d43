//! Text to token ids and back, from `tokenizer.json` or from GGUF metadata.
//!
//! Ids are those that transformers gives, with two stated differences: the text's own beginning-of-text token is
//! never doubled, and decoding never "cleans up" spaces (transformers' `clean_up_tokenization_spaces` rewrites ` .` to
//! `.`, which a stream can't do and which changes what the model said).
//!
//! Special tokens that stand in the text are recognised, whoever wrote them, as transformers does: a rendered chat
//! template depends on it. Whoever must keep a user from writing control tokens has to do so before rendering.

mod byte_level;
mod definition;
mod from_gguf;
mod names;
mod pieces;
mod shared;
mod split;

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

pub use from_gguf::{PRE_TOKENIZERS, from_gguf};
pub use pieces::Pieces;
pub use shared::{TokenizerKey, Tokenizers};

use self::{
    byte_level::ByteLevel,
    definition::{Around, Definition},
    pieces::{SelfToken, Style},
};
use crate::{error::shown, text::TextError};

/// No vocabulary has so many tokens (the largest have 262,144).
pub const VOCABULARY_MAX: u32 = 1 << 22;

/// The named special tokens of transformers that templates and configurations use.
const SPECIAL_NAMES: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model's tokenizer. Immutable, shared between threads; all calls are synchronous and take time in proportion to
/// the text (about 1 s for 4 MiB), so that async callers use a blocking thread for long texts.
pub struct Tokenizer {
    encoder: Encoder,
    pieces: Arc<Pieces>,
    /// Texts of the named special tokens (`bos_token`, ...).
    special: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Ids put before and after a text by `add_special`.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

/// Who turns text into ids.
enum Encoder {
    ByteLevel(Box<ByteLevel>),
    /// For every other kind.
    Library(Box<tokenizers::Tokenizer>),
}

// === impl Tokenizer ===

impl Tokenizer {
    /// From the text of `tokenizer.json`, and the objects of `tokenizer_config.json` and `special_tokens_map.json`
    /// (empty where there is none).
    ///
    /// # Errors
    /// When the file isn't a tokenizer, or one whose decoder isn't implemented.
    pub fn from_json(
        json: &[u8],
        config: &Map<String, Value>,
        special_map: &Map<String, Value>,
    ) -> Result<Self, TextError> {
        let mut special = BTreeMap::new();
        for &name in SPECIAL_NAMES {
            let text = |map: &Map<String, Value>| match map.get(name)? {
                Value::String(text) => Some(text.clone()),
                Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
                _ => None,
            };
            if let Some(text) = text(config).or_else(|| text(special_map)) {
                special.insert(name.to_owned(), text);
            }
        }
        let configured = configured_tokens(config)?;
        let add = AddSpecial::from_config(config);
        if let Some(mut definition) = Definition::of_json(json)
            && add_to_definition(&mut definition, &configured)?.is_some()
        {
            return Self::byte_level(definition, special, add);
        }
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(TextError::bad_tokenizer)?;
        add_to_library(&mut inner, configured)?;
        Self::of_library(inner, special, add)
    }

    fn byte_level(
        definition: Definition<'_>,
        special: BTreeMap<String, String>,
        add: AddSpecial,
    ) -> Result<Self, TextError> {
        let around = definition
            .around()
            .ok_or_else(|| TextError::bad_tokenizer("its post-processor does more than to add tokens"))?;
        let encoder = ByteLevel::new(definition)?;
        let added = encoder.added().iter();
        let added = added.map(|t| (t.id, SelfToken { content: &t.content, special: t.special })).collect();
        let pieces = Pieces::new(encoder.names().iter(), &added, &Style::byte_level())?;
        Ok(Self::new(Encoder::ByteLevel(encoder.into()), pieces, special, add, around))
    }

    fn of_library(
        mut inner: tokenizers::Tokenizer,
        special: BTreeMap<String, String>,
        add: AddSpecial,
    ) -> Result<Self, TextError> {
        // A file may carry the settings of its training: a prompt is never cut or padded silently.
        inner.with_truncation(None).map_err(TextError::bad_tokenizer)?;
        inner.with_padding(None);
        let pieces = pieces_of_library(&inner)?;
        let around = post_processor_ids(&inner)?;
        Ok(Self::new(Encoder::Library(inner.into()), pieces, special, add, around))
    }

    fn new(
        encoder: Encoder,
        pieces: Pieces,
        special: BTreeMap<String, String>,
        add: AddSpecial,
        (mut prefix, mut suffix): Around,
    ) -> Self {
        let id = |name: &str| special.get(name).and_then(|text| encoder.id(text));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        if let Some(add_bos) = add.bos {
            prefix = bos.filter(|_| add_bos).into_iter().collect();
        }
        if let Some(add_eos) = add.eos {
            suffix = eos.filter(|_| add_eos).into_iter().collect();
        }
        Self { encoder, pieces: Arc::new(pieces), special, bos, eos, prefix, suffix }
    }

    /// The ids of a text. `add_special` puts what the model expects around a text (usually only the beginning-of-text
    /// token), unless the text brings it along.
    ///
    /// # Errors
    /// [`TextError::Encode`] when the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encoder.encode(text)?;
        if add_special {
            if !ids.starts_with(&self.prefix) {
                ids.splice(0..0, self.prefix.iter().copied());
            }
            ids.extend_from_slice(&self.suffix);
        }
        Ok(ids)
    }

    /// The ids of a rendered chat template: the beginning-of-text token exactly once if the model wants it, whether or
    /// not the template wrote it; nothing at the end.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode(rendered, true)?;
        ids.truncate(ids.len() - self.suffix.len());
        Ok(ids)
    }

    /// The text of ids, decoded at once: what [`Detokenizer`](crate::detokenize::Detokenizer) gives piece by piece.
    /// Bytes that are no UTF-8 become U+FFFD; ids outside of the vocabulary give nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.pieces.is_special(id)) {
                bytes.extend_from_slice(self.pieces.bytes(id));
            }
        }
        let bytes = if self.pieces.strips_leading_space() {
            bytes.strip_prefix(b" ").unwrap_or(&bytes)
        } else {
            &bytes
        };
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// The bytes of every token.
    #[must_use]
    pub fn pieces(&self) -> &Arc<Pieces> {
        &self.pieces
    }

    /// The bytes that a token stands for; for a special token those of its name. Empty outside of the vocabulary.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// The highest id plus one. The model's embedding may have more rows.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.pieces.len()
    }

    /// The id of a token by its name in the vocabulary.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.encoder.id(name)
    }

    /// Whether the token is a control token, which is no part of the text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// The beginning-of-text token.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Names (`bos_token`, `eos_token`, ...) and texts of the special tokens, as chat templates see them.
    #[must_use]
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The fewest tokens that a text of `len` bytes can have: a text that is certainly too long needn't be tokenised.
    /// Holds for tokenizers whose normalisation doesn't shorten text, as those of GGUF files and of the Llama family.
    #[must_use]
    pub fn tokens_min(&self, len: usize) -> usize {
        len.div_ceil(self.pieces.longest().max(1))
    }

    /// The text of an equal `tokenizer.json`.
    ///
    /// # Errors
    /// When the library can't write it.
    pub fn to_tokenizer_json(&self) -> Result<String, TextError> {
        match &self.encoder {
            Encoder::ByteLevel(encoder) => {
                serde_json::to_string_pretty(&encoder.to_json()).map_err(TextError::bad_tokenizer)
            }
            Encoder::Library(inner) => inner.to_string(true).map_err(TextError::bad_tokenizer),
        }
    }

    /// A `tokenizer_config.json` that makes transformers give the same ids together with
    /// [`Tokenizer::to_tokenizer_json`].
    #[must_use]
    pub fn to_tokenizer_config(&self, chat_template: Option<&str>, context: u32) -> Value {
        let mut config = Map::new();
        config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
        config.insert("model_max_length".to_owned(), json!(context));
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        for (name, text) in &self.special {
            config.insert(name.clone(), json!(text));
        }
        if let Some(template) = chat_template {
            config.insert("chat_template".to_owned(), json!(template));
        }
        Value::Object(config)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.encoder {
            Encoder::ByteLevel(_) => "byte-level",
            Encoder::Library(_) => "library",
        };
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("encoder", &kind)
            .finish_non_exhaustive()
    }
}

// === impl Encoder ===

impl Encoder {
    fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        match self {
            Self::ByteLevel(encoder) => {
                // Most tokens have three bytes or more.
                let mut ids = Vec::with_capacity(text.len() / 3 + 4);
                encoder.encode(text, &mut ids);
                Ok(ids)
            }
            Self::Library(inner) => {
                let problem = |e: tokenizers::Error| TextError::Encode { problem: shown(&e.to_string()) };
                Ok(inner.encode_fast(text, false).map_err(problem)?.get_ids().to_vec())
            }
        }
    }

    fn id(&self, name: &str) -> Option<u32> {
        match self {
            Self::ByteLevel(encoder) => encoder.id(name),
            Self::Library(inner) => inner.token_to_id(name),
        }
    }
}

/// What overrules the file's post-processor.
#[derive(Debug, Clone, Copy, Default)]
struct AddSpecial {
    bos: Option<bool>,
    eos: Option<bool>,
}

impl AddSpecial {
    /// The Llama classes of transformers rebuild the post-processor from `add_bos_token` (true if absent) and
    /// `add_eos_token`; the other fast tokenizers take it from `tokenizer.json`.
    fn from_config(config: &Map<String, Value>) -> Self {
        let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        if !matches!(
            class.trim_end_matches("Fast"),
            "LlamaTokenizer" | "CodeLlamaTokenizer" | "GemmaTokenizer"
        ) {
            return Self::default();
        }
        let flag = |key: &str, default| config.get(key).and_then(Value::as_bool).unwrap_or(default);
        Self { bos: Some(flag("add_bos_token", true)), eos: Some(flag("add_eos_token", false)) }
    }
}

/// What the post-processor puts before and after a text.
fn post_processor_ids(inner: &tokenizers::Tokenizer) -> Result<Around, TextError> {
    if inner.get_post_processor().is_none() {
        return Ok((Vec::new(), Vec::new()));
    }
    let encode = |add| inner.encode_fast("a", add).map_err(TextError::bad_tokenizer);
    let (plain, full) = (encode(false)?, encode(true)?);
    let (plain, full) = (plain.get_ids(), full.get_ids());
    if plain.is_empty() {
        return Ok((full.to_vec(), Vec::new()));
    }
    let at = full.windows(plain.len()).position(|window| window == plain).ok_or_else(|| {
        TextError::bad_tokenizer("the post-processor changes the text's own tokens, which is not supported")
    })?;
    Ok((full[..at].to_vec(), full[at + plain.len()..].to_vec()))
}

/// The bytes of the library's tokens.
fn pieces_of_library(inner: &tokenizers::Tokenizer) -> Result<Pieces, TextError> {
    let decoder = inner.get_decoder().map(serde_json::to_value).transpose();
    let style = Style::of(&decoder.map_err(TextError::bad_tokenizer)?.unwrap_or_default())?;
    let vocabulary = inner.get_vocab(true);
    let last = vocabulary.values().copied().max();
    if let Some(last) = last.filter(|last| *last >= VOCABULARY_MAX) {
        let problem = format!("absurd token id {last}, at most {VOCABULARY_MAX} are possible");
        return Err(TextError::bad_tokenizer(problem));
    }
    let mut names = vec![""; last.map_or(0, |last| last as usize + 1)];
    for (name, &id) in &vocabulary {
        names[id as usize] = name;
    }
    let added = inner.get_added_tokens_decoder();
    let added = added.iter().map(|(id, t)| (*id, SelfToken { content: &t.content, special: t.special }));
    Pieces::new(names.into_iter(), &added.collect(), &style)
}

/// The tokens that `tokenizer_config.json` lists, by id.
fn configured_tokens(config: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>, TextError> {
    let Some(Value::Object(listed)) = config.get("added_tokens_decoder") else {
        return Ok(BTreeMap::new());
    };
    let one = |(id, token): (&String, &Value)| {
        let bad =
            || TextError::bad_tokenizer(format!("added_tokens_decoder has a bad entry `{}`", shown(id)));
        let number: u32 = id.parse().map_err(|_| bad())?;
        let text = token.get("content").and_then(Value::as_str).ok_or_else(bad)?;
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken::from(text, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        Ok((number, token))
    };
    listed.iter().map(one).collect()
}

/// Adds the tokens that only `tokenizer_config.json` knows, as transformers does. `None`: the library must.
fn add_to_definition(
    definition: &mut Definition<'_>,
    configured: &BTreeMap<u32, AddedToken>,
) -> Result<Option<()>, TextError> {
    let known =
        |id: u32, t: &AddedToken| definition.added.iter().any(|a| a.id == id && a.content == t.content);
    let missing: Vec<_> = configured.iter().filter(|(id, token)| !known(**id, token)).collect();
    for (&id, token) in missing {
        if token.single_word || token.lstrip || token.rstrip {
            return Ok(None);
        }
        if definition.add(token.content.clone(), token.special, token.normalized).is_none() {
            return Ok(None);
        }
        if !definition.added.iter().any(|a| a.id == id && a.content == token.content) {
            return Err(contradiction(&token.content, id));
        }
    }
    Ok(Some(()))
}

fn add_to_library(
    inner: &mut tokenizers::Tokenizer,
    configured: BTreeMap<u32, AddedToken>,
) -> Result<(), TextError> {
    let known = inner.get_added_tokens_decoder();
    for (id, token) in configured {
        if known.get(&id).is_some_and(|t| t.content == token.content) {
            continue;
        }
        let text = token.content.clone();
        inner.add_tokens([token]).map_err(TextError::bad_tokenizer)?;
        if inner.token_to_id(&text) != Some(id) {
            return Err(contradiction(&text, id));
        }
    }
    Ok(())
}

fn contradiction(text: &str, id: u32) -> TextError {
    let text = shown(text);
    TextError::bad_tokenizer(format!(
        "tokenizer_config.json gives `{text}` the id {id}, tokenizer.json does not"
    ))
}
