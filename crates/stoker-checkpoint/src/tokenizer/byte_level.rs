//! Byte-level BPE, what nearly all models have: a text is cut at the added tokens, then by patterns, and the bytes of
//! each piece are merged pair by pair, the earliest merge of the list first.
//!
//! The tokenizers library does the same with offsets into every stage of the text for each token, which nobody here
//! asks for and which take five sixths of its time. It stays the reference: tests hold the ids of both together.

use std::{borrow::Cow, cmp::Reverse, collections::BinaryHeap, collections::HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::{Value, json};

use super::{
    definition::{AddedToken, Definition, byte_level_json},
    names::Names,
    pieces::char_of,
    split::Splitter,
};
use crate::{error::shown, text::TextError};

/// Pieces of at most so many bytes are merged by looking at all their pairs each time; longer ones with a queue.
const SHORT: usize = 64;

/// The encoder.
#[derive(Debug)]
pub(super) struct ByteLevel {
    names: Names,
    /// Both parts of a pair, to the merge's place in the list and the id that it makes.
    merges: HashMap<(u32, u32), Merge, ahash::RandomState>,
    /// The id of each byte; a byte without one is left out of the text.
    bytes: Box<[Option<u32>; 256]>,
    ignore_merges: bool,
    compose: bool,
    splitters: Vec<Splitter>,
    /// Tokens that are found in the text as it comes, and those that are found in the normalised text.
    raw: Option<Added>,
    normalized: Option<Added>,
    definition: Parts,
}

/// What is kept for writing it down again.
#[derive(Debug)]
struct Parts {
    patterns: Vec<String>,
    added: Vec<AddedToken>,
    post_processor: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    rank: u32,
    id: u32,
}

/// Tokens that are found in a text as a whole, the longest of those that begin first.
#[derive(Debug)]
struct Added {
    matcher: AhoCorasick,
    ids: Vec<u32>,
}

/// Room for the work on one piece, used again for the next.
#[derive(Debug, Default)]
struct Scratch {
    symbols: Vec<u32>,
    merges: Vec<Option<Merge>>,
    name: String,
}

// === impl ByteLevel ===

impl ByteLevel {
    pub(super) fn new(definition: Definition<'_>) -> Result<Self, TextError> {
        let Definition { names, merges: pairs, ignore_merges, compose, patterns, added, post_processor } =
            definition;
        let mut merges = HashMap::with_capacity_and_hasher(pairs.len(), ahash::RandomState::new());
        let mut joined = String::new();
        for ((left, right), rank) in pairs.iter().zip(0..) {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let id = |name: &str| {
                let absent = || {
                    format!("the merge `{} {}` needs a token that is not there", shown(left), shown(right))
                };
                names.id(name).ok_or_else(|| TextError::bad_tokenizer(absent()))
            };
            merges.insert((id(left)?, id(right)?), Merge { rank, id: id(&joined)? });
        }
        let mut bytes = Box::new([None; 256]);
        for (byte, id) in (0..=u8::MAX).zip(bytes.iter_mut()) {
            *id = names.id(char_of(byte).encode_utf8(&mut [0; 4]));
        }
        let splitters: Option<Vec<Splitter>> = patterns.iter().map(|p| Splitter::of_pattern(p)).collect();
        let splitters = splitters
            .ok_or_else(|| TextError::bad_tokenizer("a pattern of its pre-tokenizer is not valid"))?;
        Ok(Self {
            names,
            merges,
            bytes,
            ignore_merges,
            compose,
            splitters,
            raw: Added::new(added.iter().filter(|t| !t.normalized))?,
            normalized: Added::new(added.iter().filter(|t| t.normalized))?,
            definition: Parts { patterns, added, post_processor },
        })
    }

    pub(super) fn names(&self) -> &Names {
        &self.names
    }

    pub(super) fn added(&self) -> &[AddedToken] {
        &self.definition.added
    }

    /// The id of a token by its name.
    pub(super) fn id(&self, name: &str) -> Option<u32> {
        let added = self.definition.added.iter().rfind(|token| token.content == name);
        added.map(|token| token.id).or_else(|| self.names.id(name))
    }

    /// Appends a text's ids.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut scratch = Scratch::default();
        cut(self.raw.as_ref(), text, &mut |part| match part {
            Ok(id) => ids.push(id),
            Err(text) => {
                let text = self.composed(text);
                cut(self.normalized.as_ref(), &text, &mut |part| match part {
                    Ok(id) => ids.push(id),
                    Err(text) => self.split(&self.splitters, text, &mut scratch, ids),
                });
            }
        });
    }

    fn composed<'t>(&self, text: &'t str) -> Cow<'t, str> {
        if !self.compose || text.is_ascii() {
            return Cow::Borrowed(text);
        }
        // The tables of the library, whatever newer versions of Unicode compose.
        use unicode_normalization_alignments::UnicodeNormalization as _;
        Cow::Owned(text.nfc().map(|(c, _)| c).collect())
    }

    /// Each pattern cuts the pieces of the one before.
    fn split(&self, splitters: &[Splitter], text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        match splitters.split_first() {
            None => self.merge(text, scratch, ids),
            Some((first, rest)) => first.split(text, |piece| self.split(rest, piece, scratch, ids)),
        }
    }

    /// Appends a piece's ids.
    fn merge(&self, piece: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if self.ignore_merges {
            scratch.name.clear();
            scratch.name.extend(piece.bytes().map(char_of));
            if let Some(id) = self.names.id(&scratch.name) {
                return ids.push(id);
            }
        }
        scratch.symbols.clear();
        scratch.symbols.extend(piece.bytes().filter_map(|byte| self.bytes[usize::from(byte)]));
        if scratch.symbols.len() <= SHORT {
            self.merge_short(scratch);
            ids.extend_from_slice(&scratch.symbols);
        } else {
            self.merge_long(&scratch.symbols, ids);
        }
    }

    fn pair(&self, left: u32, right: u32) -> Option<Merge> {
        self.merges.get(&(left, right)).copied()
    }

    fn merge_short(&self, Scratch { symbols, merges, .. }: &mut Scratch) {
        merges.clear();
        merges.extend(symbols.windows(2).map(|pair| self.pair(pair[0], pair[1])));
        loop {
            // The first of those with the lowest rank.
            let best =
                merges.iter().enumerate().filter_map(|(at, merge)| Some((merge.as_ref()?.rank, at))).min();
            let Some((_, at)) = best else { return };
            let Some(merge) = merges.remove(at) else { return };
            symbols[at] = merge.id;
            symbols.remove(at + 1);
            if at > 0 {
                merges[at - 1] = self.pair(symbols[at - 1], symbols[at]);
            }
            if let Some(after) = symbols.get(at + 1) {
                merges[at] = self.pair(symbols[at], *after);
            }
        }
    }

    /// The same in time of n log n: neighbours are linked, and pairs wait in a queue; one whose parts have been merged
    /// otherwise in the meantime is passed over.
    fn merge_long(&self, symbols: &[u32], ids: &mut Vec<u32>) {
        const NONE: usize = usize::MAX;
        let mut symbols = symbols.to_vec();
        let mut before: Vec<usize> = (0..symbols.len()).map(|at| at.wrapping_sub(1)).collect();
        let mut after: Vec<usize> = (1..=symbols.len()).collect();
        if let Some(last) = after.last_mut() {
            *last = NONE;
        }
        let mut alive = vec![true; symbols.len()];
        let mut queue = BinaryHeap::new();
        let entry = |at: usize, left: u32, right: u32| {
            self.pair(left, right).map(|merge| Reverse((merge.rank, at, merge.id, left, right)))
        };
        queue.extend(symbols.windows(2).enumerate().filter_map(|(at, pair)| entry(at, pair[0], pair[1])));
        while let Some(Reverse((_, at, id, left, right))) = queue.pop() {
            let next = after[at];
            if !alive[at] || next == NONE || symbols[at] != left || symbols[next] != right {
                continue;
            }
            symbols[at] = id;
            alive[next] = false;
            after[at] = after[next];
            if after[at] != NONE {
                before[after[at]] = at;
                queue.extend(entry(at, id, symbols[after[at]]));
            }
            if before[at] != NONE {
                queue.extend(entry(before[at], symbols[before[at]], id));
            }
        }
        ids.extend(symbols.into_iter().zip(alive).filter(|(_, alive)| *alive).map(|(symbol, _)| symbol));
    }

    /// An equal `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        let vocabulary: serde_json::Map<String, Value> = self
            .names
            .iter()
            .zip(0_u32..)
            .filter(|(name, _)| !name.is_empty())
            .map(|(n, id)| (n.into(), id.into()))
            .collect();
        let mut merges: Vec<_> = self.merges.iter().collect();
        merges.sort_unstable_by_key(|(_, merge)| merge.rank);
        let name = |id: u32| self.names.name(id);
        let merges: Vec<Value> =
            merges.into_iter().map(|(&(left, right), _)| json!([name(left), name(right)])).collect();
        let split = |pattern: &String| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Value> = self.definition.patterns.iter().map(split).collect();
        steps.push(byte_level_json(false));
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.definition.added.iter().map(AddedToken::to_json).collect::<Vec<_>>(),
            "normalizer": if self.compose { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": self.definition.post_processor,
            "decoder": byte_level_json(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.ignore_merges,
                "vocab": vocabulary,
                "merges": merges,
            },
        })
    }
}

// === impl Added ===

impl Added {
    fn new<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> Result<Option<Self>, TextError> {
        let (contents, ids): (Vec<&str>, Vec<u32>) = tokens.map(|t| (&*t.content, t.id)).unzip();
        if ids.is_empty() {
            return Ok(None);
        }
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(contents)
            .map_err(TextError::bad_tokenizer)?;
        Ok(Some(Self { matcher, ids }))
    }
}

/// Calls `part` with the added tokens in a text and with what is between them, in order.
fn cut<'t>(added: Option<&Added>, text: &'t str, part: &mut impl FnMut(Result<u32, &'t str>)) {
    let mut at = 0;
    if let Some(added) = added {
        for found in added.matcher.find_iter(text) {
            if at < found.start() {
                part(Err(&text[at..found.start()]));
            }
            part(Ok(added.ids[found.pattern().as_usize()]));
            at = found.end();
        }
    }
    if at < text.len() {
        part(Err(&text[at..]));
    }
}
