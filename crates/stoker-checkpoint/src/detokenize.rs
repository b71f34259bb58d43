//! Token ids to text, one by one.

use std::sync::Arc;

use crate::tokenizer::{Pieces, Tokenizer};

/// U+FFFD in UTF-8, for bytes that are none.
const REPLACEMENT: &str = "\u{fffd}";

/// Turns a stream of ids into a stream of text. A character whose bytes are spread over tokens is held back until it
/// is whole. All outputs joined equal [`Tokenizer::decode`] of all ids.
///
/// A token costs a lookup and a copy, whatever came before it.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Drop the next byte if it is a space.
    strip_space: bool,
    decoder: Utf8Decoder,
}

/// Bytes to text, in whatever pieces they come; the same text as `String::from_utf8_lossy` of all of them.
#[derive(Debug, Clone, Default)]
struct Utf8Decoder {
    /// The beginning of a character whose end hasn't come yet.
    pending: [u8; 4],
    pending_len: usize,
}

// === impl Detokenizer ===

impl Detokenizer {
    /// For a text that begins here: an answer in a chat.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let pieces = Arc::clone(tokenizer.pieces());
        let strip_space = pieces.strips_leading_space();
        Self { pieces, skip_special, strip_space, decoder: Utf8Decoder::default() }
    }

    /// For a text that goes on from another: a completion. Its leading space is part of it.
    #[must_use]
    pub fn continuing(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { strip_space: false, ..Self::new(tokenizer, skip_special) }
    }

    /// Appends to `out` the text that the token completes.
    pub fn push(&mut self, id: u32, out: &mut String) {
        if self.skip_special && self.pieces.is_special(id) {
            return;
        }
        let mut bytes = self.pieces.bytes(id);
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.decoder.push(bytes, out);
    }

    /// Appends what is still held back: U+FFFD for a character that never became whole.
    pub fn finish(&mut self, out: &mut String) {
        self.decoder.finish(out);
    }
}

// === impl Utf8Decoder ===

impl Utf8Decoder {
    fn push(&mut self, mut bytes: &[u8], out: &mut String) {
        while self.pending_len > 0 {
            let Some((&first, rest)) = bytes.split_first() else { return };
            self.pending[self.pending_len] = first;
            match std::str::from_utf8(&self.pending[..=self.pending_len]) {
                Ok(text) => {
                    out.push_str(text);
                    self.pending_len = 0;
                    bytes = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.pending_len += 1;
                    bytes = rest;
                }
                // The new byte can't go on with what is pending: it begins something of its own.
                Err(_) => {
                    out.push_str(REPLACEMENT);
                    self.pending_len = 0;
                }
            }
        }
        loop {
            let error = match std::str::from_utf8(bytes) {
                Ok(text) => return out.push_str(text),
                Err(error) => error,
            };
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            out.push_str(std::str::from_utf8(valid).unwrap_or_default());
            match error.error_len() {
                Some(len) => {
                    out.push_str(REPLACEMENT);
                    bytes = &rest[len..];
                }
                None => {
                    self.pending[..rest.len()].copy_from_slice(rest);
                    self.pending_len = rest.len();
                    return;
                }
            }
        }
    }

    fn finish(&mut self, out: &mut String) {
        if self.pending_len > 0 {
            out.push_str(REPLACEMENT);
            self.pending_len = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that meet every way in which UTF-8 can break.
    fn awkward() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop::sample::select(vec![
            b'a', 0x80, 0xbf, 0xc2, 0xc0, 0xe0, 0xa0, 0xe2, 0x82, 0xac, 0xed, 0x9f, 0xf0, 0x90, 0x9f, 0xf4,
            0x8f, 0xff,
        ]);
        prop::collection::vec(byte, 0..40)
    }

    proptest! {
        #[test]
        fn pieces_give_the_same_text_as_the_whole(bytes in awkward(), cuts in prop::collection::vec(0_usize..40, 0..10)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut decoder = Utf8Decoder::default();
            let mut out = String::new();
            for pair in cuts.windows(2) {
                decoder.push(&bytes[pair[0]..pair[1]], &mut out);
            }
            decoder.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
