//! What defines a byte-level tokenizer, from whichever file: the parts of `tokenizer.json` that change ids.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, json};

use super::{
    VOCABULARY_MAX,
    names::Names,
    split::{GPT2, Splitter},
};

/// A byte-level tokenizer.
#[derive(Debug)]
pub(super) struct Definition<'a> {
    pub(super) names: Names,
    /// Pairs of names, the first merged first.
    pub(super) merges: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    /// A piece that is in the vocabulary as a whole isn't merged from parts.
    pub(super) ignore_merges: bool,
    /// Characters are composed first (NFC).
    pub(super) compose: bool,
    /// Each cuts the pieces of the one before, matches and what is between them alike.
    pub(super) patterns: Vec<String>,
    pub(super) added: Vec<AddedToken>,
    /// As in `tokenizer.json`, or null.
    pub(super) post_processor: Value,
}

/// A token that is found in the text as a whole, before anything else is done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    pub(super) special: bool,
    /// It is found in the normalised text.
    pub(super) normalized: bool,
}

/// What a post-processor puts around a text: ids before it and after it.
pub(super) type Around = (Vec<u32>, Vec<u32>);

/// `tokenizer.json`, as far as it is understood here.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedTokenOfFile>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct AddedTokenOfFile {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(borrow)]
    vocab: Entries<'a>,
    #[serde(borrow)]
    merges: Vec<Pair<'a>>,
}

/// An object of names and ids.
struct Entries<'a>(Vec<(Cow<'a, str>, u32)>);

/// `"a b"` or `["a", "b"]`.
struct Pair<'a>(Cow<'a, str>, Cow<'a, str>);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

// === impl Definition ===

impl<'a> Definition<'a> {
    /// Reads a `tokenizer.json`. `None` when it is of another kind, or has something that isn't done here: the library
    /// then is asked, and says what is wrong where something is.
    pub(super) fn of_json(json: &'a [u8]) -> Option<Self> {
        let file: File<'a> = serde_json::from_slice(json).ok()?;
        let File { added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model } = file;
        let Model {
            kind,
            dropout,
            unk_token,
            continuing_subword_prefix,
            end_of_word_suffix,
            byte_fallback,
            ignore_merges,
            vocab: Entries(mut vocab),
            merges,
        } = model;
        let is_empty = |text: Option<String>| text.is_none_or(|text| text.is_empty());
        let plain = kind.as_deref() == Some("BPE")
            && dropout.is_none_or(|dropout| dropout == 0.0)
            && unk_token.is_none()
            && is_empty(continuing_subword_prefix)
            && is_empty(end_of_word_suffix)
            && !byte_fallback
            && decoder["type"] == "ByteLevel";
        if !plain {
            return None;
        }
        vocab.sort_unstable_by_key(|(_, id)| *id);
        let mut names = Names::with_capacity(vocab.len(), vocab.iter().map(|(name, _)| name.len()).sum());
        for (name, id) in vocab {
            if id > VOCABULARY_MAX || id < names.len() {
                return None;
            }
            while names.len() < id {
                names.skip();
            }
            names.push(&name).ok()?;
        }
        let mut definition = Self {
            names,
            merges: merges.into_iter().map(|Pair(left, right)| (left, right)).collect(),
            ignore_merges,
            compose: composes(&normalizer)?,
            patterns: patterns(&pre_tokenizer)?,
            added: Vec::new(),
            post_processor,
        };
        for token in added_tokens {
            let AddedTokenOfFile { content, single_word, lstrip, rstrip, normalized, special } = token;
            if single_word || lstrip || rstrip {
                return None;
            }
            definition.add(content, special, normalized)?;
        }
        // What comes later is asked now, so that a file is either done here or not.
        definition.around()?;
        Some(definition)
    }

    /// Adds a token: with its id in the vocabulary, else with the next one. `None` when it can't be done here.
    pub(super) fn add(&mut self, content: String, special: bool, normalized: bool) -> Option<()> {
        if content.is_empty() {
            return Some(());
        }
        if normalized && self.compose && !content.is_ascii() {
            return None;
        }
        let same = self.added.iter().position(|token| token.content == content);
        let id = match same {
            Some(at) => self.added[at].id,
            None => self.names.id(&content).unwrap_or_else(|| {
                let highest = self.added.iter().map(|token| token.id + 1).max().unwrap_or(0);
                highest.max(self.names.count())
            }),
        };
        let token = AddedToken { id, content, special, normalized };
        match same {
            Some(at) => self.added[at] = token,
            None => self.added.push(token),
        }
        Some(())
    }

    /// What its post-processor puts around a text. `None` when that does something else.
    pub(super) fn around(&self) -> Option<Around> {
        around(&self.post_processor)
    }
}

// === impl AddedToken ===

impl AddedToken {
    /// As in `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        let Self { id, content, special, normalized } = self;
        json!({
            "id": id,
            "content": content,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": normalized,
            "special": special,
        })
    }
}

/// A `ByteLevel` part of `tokenizer.json`.
pub(super) fn byte_level_json(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// Whether a normaliser is NFC, or nothing. `None`: something else.
fn composes(normalizer: &Value) -> Option<bool> {
    match normalizer["type"].as_str() {
        None if normalizer.is_null() => Some(false),
        Some("NFC") => Some(true),
        Some("Sequence") => {
            let parts = normalizer["normalizers"].as_array()?;
            parts.iter().try_fold(false, |any, part| Some(any | composes(part)?))
        }
        _ => None,
    }
}

/// The patterns of a pre-tokenizer whose last step is `ByteLevel`. `None`: it has something else.
fn patterns(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let alone = std::slice::from_ref(pre_tokenizer);
    let steps = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.as_slice(),
        _ => alone,
    };
    let (last, steps) = steps.split_last()?;
    let mut patterns = Vec::new();
    for step in steps {
        let pattern = match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                step["pattern"]["Regex"].as_str()?
            }
            "Digits" if step["individual_digits"] == true => r"\p{N}",
            _ => return None,
        };
        Splitter::of_pattern(pattern)?;
        patterns.push(pattern.to_owned());
    }
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    // True where it is absent, as in the library.
    if last["use_regex"].as_bool().unwrap_or(true) {
        patterns.push(GPT2.to_owned());
    }
    Some(patterns)
}

/// What a post-processor puts around a text. `None`: it does something else.
fn around(post_processor: &Value) -> Option<Around> {
    match post_processor["type"].as_str() {
        None if post_processor.is_null() => Some(Around::default()),
        Some("ByteLevel") => Some(Around::default()),
        Some("Sequence") => {
            let parts = post_processor["processors"].as_array()?;
            parts.iter().try_fold(Around::default(), |(mut before, mut after), part| {
                let (first, last) = around(part)?;
                before.splice(0..0, first);
                after.extend(last);
                Some((before, after))
            })
        }
        Some("TemplateProcessing") => {
            let (mut before, mut after, mut text_seen) = (Vec::new(), Vec::new(), false);
            for part in post_processor["single"].as_array()? {
                if part.get("Sequence").is_some() {
                    if std::mem::replace(&mut text_seen, true) {
                        return None;
                    }
                    continue;
                }
                let name = part["SpecialToken"]["id"].as_str()?;
                let ids = post_processor["special_tokens"][name]["ids"].as_array()?;
                let ids: Option<Vec<u32>> = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect();
                if text_seen { &mut after } else { &mut before }.extend(ids?);
            }
            text_seen.then_some((before, after))
        }
        _ => None,
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for EntriesVisitor<'a> {
            type Value = Entries<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of names and ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some((Text(name), id)) = map.next_entry::<Text<'de>, u32>()? {
                    entries.push((name, id));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Pair<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairVisitor<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for PairVisitor<'a> {
            type Value = Pair<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of names")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, line: &'de str) -> Result<Self::Value, E> {
                let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
                let (left, right) = pair.ok_or_else(|| E::custom("a merge is no pair"))?;
                Ok(Pair(left.into(), right.into()))
            }

            fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Self::Value, E> {
                let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
                let (left, right) = pair.ok_or_else(|| E::custom("a merge is no pair"))?;
                Ok(Pair(left.to_owned().into(), right.to_owned().into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut part = || {
                    let part = seq.next_element::<Text<'de>>()?;
                    part.map(|Text(text)| text).ok_or_else(|| serde::de::Error::custom("a merge is no pair"))
                };
                Ok(Pair(part()?, part()?))
            }
        }

        deserializer.deserialize_any(PairVisitor(PhantomData))
    }
}
