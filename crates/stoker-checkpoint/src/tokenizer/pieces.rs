//! The bytes that each token stands for.

use std::collections::BTreeMap;

use serde_json::Value;

use super::VOCABULARY_MAX;
use crate::text::TextError;

/// Every token's bytes in one allocation, so that a token of a stream costs a lookup and a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where the token before ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    longest: usize,
    strips_leading_space: bool,
}

/// A token whose text is its content.
#[derive(Debug, Clone, Copy)]
pub(super) struct SelfToken<'a> {
    pub(super) content: &'a str,
    pub(super) special: bool,
}

/// How a vocabulary entry stands for bytes.
#[derive(Debug, Default)]
pub(super) struct Style {
    /// Each character stands for a byte (GPT-2's table).
    byte_level: bool,
    /// This character stands for a space (SentencePiece's U+2581).
    space: Option<char>,
    /// `<0x41>` stands for a byte.
    byte_fallback: bool,
    /// One space at the beginning of a text is an artefact.
    strips_leading_space: bool,
}

// === impl Pieces ===

impl Pieces {
    /// Of a vocabulary's names by id, and of the tokens that stand for themselves.
    pub(super) fn new<'n>(
        names: impl ExactSizeIterator<Item = &'n str>,
        added: &BTreeMap<u32, SelfToken<'_>>,
        style: &Style,
    ) -> Result<Self, TextError> {
        let last = added.last_key_value().map_or(0, |(id, _)| *id as usize + 1);
        let len = names.len().max(last);
        if len > VOCABULARY_MAX as usize {
            let problem = format!("absurd token id {}, at most {VOCABULARY_MAX} are possible", len - 1);
            return Err(TextError::bad_tokenizer(problem));
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(len),
            special: vec![false; len],
            longest: 0,
            strips_leading_space: style.strips_leading_space,
        };
        for (name, id) in names.chain(std::iter::repeat("")).take(len).zip(0_u32..) {
            let before = pieces.bytes.len();
            match added.get(&id) {
                Some(token) => {
                    pieces.special[id as usize] = token.special;
                    style.push_added(token.content, &mut pieces.bytes);
                }
                None => style.push(name, &mut pieces.bytes),
            }
            pieces.longest = pieces.longest.max(pieces.bytes.len() - before);
            let end = u32::try_from(pieces.bytes.len());
            pieces.ends.push(end.map_err(|_| TextError::bad_tokenizer("the vocabulary exceeds 4 GiB"))?);
        }
        Ok(pieces)
    }

    /// The bytes of a token; empty outside of the vocabulary.
    #[must_use]
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[begin as usize..end as usize]
    }

    /// Whether the token is a control token.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The highest id plus one.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.ends.len()).unwrap_or(u32::MAX)
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of the longest token.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Whether a text's first space is an artefact of the tokenizer (SentencePiece's dummy prefix).
    #[must_use]
    pub fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }
}

// === impl Style ===

impl Style {
    /// Each character stands for a byte.
    pub(super) fn byte_level() -> Self {
        Self { byte_level: true, ..Self::default() }
    }

    /// That of a decoder of `tokenizer.json`.
    pub(super) fn of(decoder: &Value) -> Result<Self, TextError> {
        if decoder.is_null() {
            return Err(TextError::UnsupportedDecoder { decoder: "none".to_owned() });
        }
        let mut style = Self::default();
        style.add(decoder)?;
        Ok(style)
    }

    /// Takes in one decoder of `tokenizer.json`.
    fn add(&mut self, decoder: &Value) -> Result<(), TextError> {
        let kind = decoder["type"].as_str().unwrap_or_default();
        let text = |key: &str| decoder[key].as_str().unwrap_or_default();
        let unsupported =
            || TextError::UnsupportedDecoder { decoder: decoder.to_string().chars().take(200).collect() };
        match kind {
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Sequence" => {
                for part in decoder["decoders"].as_array().ok_or_else(unsupported)? {
                    self.add(part)?;
                }
            }
            "Replace" => {
                let mut chars = decoder["pattern"]["String"].as_str().ok_or_else(unsupported)?.chars();
                match (chars.next(), chars.next(), text("content")) {
                    (Some(c), None, " ") => self.space = Some(c),
                    _ => return Err(unsupported()),
                }
            }
            "Strip" if text("content") == " " && decoder["start"] == 1 && decoder["stop"] == 0 => {
                self.strips_leading_space = true;
            }
            "Metaspace" => {
                self.space = text("replacement").chars().next();
                self.strips_leading_space = text("prepend_scheme") != "never";
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    /// A vocabulary entry's bytes.
    fn push(&self, name: &str, out: &mut Vec<u8>) {
        if self.byte_level {
            let begin = out.len();
            for c in name.chars() {
                match byte_of(c) {
                    Some(byte) => out.push(byte),
                    None => {
                        // As the library does: an entry that isn't written in the table's characters is plain text.
                        out.truncate(begin);
                        out.extend_from_slice(name.as_bytes());
                        return;
                    }
                }
            }
        } else if let Some(byte) = self.fallback_byte(name) {
            out.push(byte);
        } else {
            self.push_added(name, out);
        }
    }

    /// The bytes of a token that stands for itself.
    fn push_added(&self, name: &str, out: &mut Vec<u8>) {
        match self.space {
            Some(space) if name.contains(space) => {
                out.extend_from_slice(name.replace(space, " ").as_bytes());
            }
            _ => out.extend_from_slice(name.as_bytes()),
        }
    }

    fn fallback_byte(&self, name: &str) -> Option<u8> {
        let hex = name.strip_prefix("<0x")?.strip_suffix('>')?;
        (self.byte_fallback && hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
    }
}

/// GPT-2's table: the character that stands for a byte.
pub(super) fn char_of(byte: u8) -> char {
    match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte.into(),
        0..=0x20 => char::from_u32(256 + u32::from(byte)).unwrap_or_default(),
        0x7f..=0xa0 => char::from_u32(256 + 33 + u32::from(byte - 0x7f)).unwrap_or_default(),
        0xad => '\u{143}',
    }
}

/// GPT-2's table, backwards: printable Latin-1 characters are themselves, the other 68 bytes follow U+0100 in order.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    let offset = code.checked_sub(256);
    match (code, offset) {
        (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff, _) => u8::try_from(code).ok(),
        (_, Some(n @ 0..=32)) => u8::try_from(n).ok(),
        (_, Some(n @ 33..=66)) => u8::try_from(n - 33 + 0x7f).ok(),
        (_, Some(67)) => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_a_bijection() {
        let chars: Vec<char> =
            (0..0x200).filter_map(char::from_u32).filter(|&c| byte_of(c).is_some()).collect();
        assert_eq!(chars.len(), 256);
        let mut bytes: Vec<u8> = chars.iter().filter_map(|&c| byte_of(c)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert!((0..=255).all(|byte| byte_of(char_of(byte)) == Some(byte)));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('¡'), Some(0xa1));
    }
}
