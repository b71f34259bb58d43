//! Tokenizers that several models share: one copy for all that are defined by the same bytes.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::Tokenizer;
use crate::{
    gguf::{Array, Header, Value},
    text::TextError,
};

/// Tokenizers kept although no model uses them: models that take turns mostly have few tokenizers between them.
const IDLE_MAX: usize = 4;

/// What defines a tokenizer, as its SHA-256: a model must not be able to foist its tokenizer on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenizerKey([u8; 32]);

/// The tokenizers in use, and a few that were used last. Shared between threads.
#[derive(Debug, Default)]
pub struct Tokenizers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<TokenizerKey, Arc<Slot>>,
    /// The most recently used last.
    recent: VecDeque<Arc<Tokenizer>>,
}

/// Locked while it is being built, so that whoever wants the same one waits for it.
type Slot = Mutex<Weak<Tokenizer>>;

// === impl TokenizerKey ===

impl TokenizerKey {
    /// Of a tokenizer defined by these files' bytes, in this order; `None` for one that isn't there.
    #[must_use]
    pub fn of_files<'a>(files: impl IntoIterator<Item = Option<&'a [u8]>>) -> Self {
        let mut hash = Sha256::new_with_prefix(b"files");
        for bytes in files {
            // The length says where each ends; no file has all ones.
            hash.update(bytes.map_or(u64::MAX, |b| b.len() as u64).to_le_bytes());
            hash.update(bytes.unwrap_or_default());
        }
        Self(hash.finalize().into())
    }

    /// Of the tokenizer in a GGUF file's metadata.
    #[must_use]
    pub fn of_gguf(header: &Header) -> Self {
        let mut hash = Sha256::new_with_prefix(b"gguf");
        for (key, value) in header.metadata.range("tokenizer.".to_owned()..) {
            // Its texts only, and none that changes without the tokenizer.
            if !key.starts_with("tokenizer.") {
                break;
            }
            if key.starts_with("tokenizer.chat_template") {
                continue;
            }
            hash.update((key.len() as u64).to_le_bytes());
            hash.update(key);
            update(&mut hash, value);
        }
        Self(hash.finalize().into())
    }
}

/// Adds a value with its type and length, so that different values never give the same bytes.
fn update(hash: &mut Sha256, value: &Value) {
    let mut numbers = |kind: u8, bytes: Vec<u8>| {
        hash.update([kind]);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    macro_rules! bytes {
        ($values:expr) => {
            $values.iter().flat_map(|v| v.to_le_bytes()).collect()
        };
    }
    match value {
        Value::U8(v) => numbers(0, v.to_le_bytes().into()),
        Value::I8(v) => numbers(1, v.to_le_bytes().into()),
        Value::U16(v) => numbers(2, v.to_le_bytes().into()),
        Value::I16(v) => numbers(3, v.to_le_bytes().into()),
        Value::U32(v) => numbers(4, v.to_le_bytes().into()),
        Value::I32(v) => numbers(5, v.to_le_bytes().into()),
        Value::F32(v) => numbers(6, v.to_le_bytes().into()),
        Value::Bool(v) => numbers(7, vec![u8::from(*v)]),
        Value::String(v) => numbers(8, v.as_bytes().into()),
        Value::U64(v) => numbers(9, v.to_le_bytes().into()),
        Value::I64(v) => numbers(10, v.to_le_bytes().into()),
        Value::F64(v) => numbers(11, v.to_le_bytes().into()),
        Value::Array(array) => match array {
            Array::U8(v) => numbers(16, bytes!(v)),
            Array::I8(v) => numbers(17, bytes!(v)),
            Array::U16(v) => numbers(18, bytes!(v)),
            Array::I16(v) => numbers(19, bytes!(v)),
            Array::U32(v) => numbers(20, bytes!(v)),
            Array::I32(v) => numbers(21, bytes!(v)),
            Array::F32(v) => numbers(22, bytes!(v)),
            Array::Bool(v) => numbers(23, v.iter().map(|v| u8::from(*v)).collect()),
            Array::U64(v) => numbers(24, bytes!(v)),
            Array::I64(v) => numbers(25, bytes!(v)),
            Array::F64(v) => numbers(26, bytes!(v)),
            Array::String(v) => {
                numbers(27, v.iter().flat_map(|text| (text.len() as u64).to_le_bytes()).collect());
                hash.update(v.joined());
            }
        },
    }
}

// === impl Tokenizers ===

impl Tokenizers {
    /// The tokenizer with this key: the one that there is, or what `build` makes. Of several threads that want the
    /// same one, one builds it; others wait. A failure is the caller's alone.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn get(
        &self,
        key: TokenizerKey,
        build: impl FnOnce() -> Result<Tokenizer, TextError>,
    ) -> Result<Arc<Tokenizer>, TextError> {
        let slot = {
            let mut state = self.state.lock();
            // Those that nobody has any more don't pile up; nor are there more than there are models.
            state.slots.retain(|_, slot| {
                Arc::strong_count(slot) > 1 || slot.try_lock().is_none_or(|t| t.strong_count() > 0)
            });
            Arc::clone(state.slots.entry(key).or_default())
        };
        let mut shared = slot.lock();
        let tokenizer = match shared.upgrade() {
            Some(tokenizer) => tokenizer,
            None => {
                let built = Arc::new(build()?);
                *shared = Arc::downgrade(&built);
                built
            }
        };
        drop(shared);
        // What falls out is dropped outside of the lock.
        let _oldest = self.state.lock().used(&tokenizer);
        Ok(tokenizer)
    }
}

// === impl State ===

impl State {
    /// Notes a use; returns the tokenizer that isn't kept any longer.
    fn used(&mut self, tokenizer: &Arc<Tokenizer>) -> Option<Arc<Tokenizer>> {
        self.recent.retain(|other| !Arc::ptr_eq(other, tokenizer));
        self.recent.push_back(Arc::clone(tokenizer));
        if self.recent.len() > IDLE_MAX { self.recent.pop_front() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::gguf::Strings;

    fn key(n: u8) -> TokenizerKey {
        TokenizerKey::of_files([Some(&[n][..]), None])
    }

    fn tokenizer() -> Result<Tokenizer, TextError> {
        let json = include_bytes!("../../../../tests/data/tiny-llama/tokenizer.json");
        Tokenizer::from_json(json, &serde_json::Map::new(), &serde_json::Map::new())
    }

    #[test]
    fn equal_definitions_share_one_that_is_dropped_with_its_last_user() {
        let shared = Tokenizers::default();
        let first = shared.get(key(0), tokenizer).unwrap();
        let again = shared.get(key(0), || panic!("there is one already")).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        let weak = Arc::downgrade(&first);
        drop((first, again));
        // Idle, it is kept until so many others have been used.
        for n in 1..=u8::try_from(IDLE_MAX).unwrap() {
            assert!(weak.upgrade().is_some(), "{n}");
            shared.get(key(n), tokenizer).unwrap();
        }
        assert!(weak.upgrade().is_none());
        shared.get(key(9), tokenizer).unwrap();
        assert!(shared.state.lock().slots.len() <= IDLE_MAX + 2);
        assert!(!Arc::ptr_eq(
            &shared.get(key(0), tokenizer).unwrap(),
            &shared.get(key(9), tokenizer).unwrap()
        ));
    }

    #[test]
    fn a_failure_is_not_kept() {
        let shared = Tokenizers::default();
        assert!(shared.get(key(0), || Err(TextError::NoTokenizer)).is_err());
        assert!(shared.get(key(0), tokenizer).is_ok());
    }

    #[test]
    fn one_thread_builds_and_the_others_wait() {
        let (shared, built) = (Tokenizers::default(), Mutex::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let build = || {
                        *built.lock() += 1;
                        tokenizer()
                    };
                    shared.get(key(0), build).unwrap();
                });
            }
        });
        assert_eq!(*built.lock(), 1);
    }

    #[test]
    fn a_key_is_of_the_tokenizer_and_all_of_it() {
        let header = |metadata: &[(&str, Value)]| Header {
            version: 3,
            metadata: metadata.iter().cloned().map(|(k, v)| (k.to_owned(), v)).collect::<BTreeMap<_, _>>(),
            tensors: Vec::new(),
            alignment: 32,
            data_offset: 0,
        };
        let strings =
            |texts: &[&str]| Value::Array(Array::String(texts.iter().copied().collect::<Strings>()));
        let base = ("tokenizer.ggml.tokens", strings(&["ab", "c"]));
        let other = ("general.name", Value::String("x".to_owned()));
        let template = ("tokenizer.chat_template", Value::String("x".to_owned()));
        let same = TokenizerKey::of_gguf(&header(std::slice::from_ref(&base)));
        assert_eq!(TokenizerKey::of_gguf(&header(&[base.clone(), other, template])), same);
        for different in [
            header(&[("tokenizer.ggml.tokens", strings(&["a", "bc"]))]),
            header(&[("tokenizer.ggml.merges", strings(&["ab", "c"]))]),
            header(&[base.clone(), ("tokenizer.ggml.bos_token_id", Value::U32(1))]),
            header(&[base, ("tokenizer.ggml.bos_token_id", Value::I32(1))]),
        ] {
            assert_ne!(TokenizerKey::of_gguf(&different), same);
        }
        assert_ne!(
            TokenizerKey::of_files([Some(&b"a"[..]), Some(b"b")]),
            TokenizerKey::of_files([Some(&b"ab"[..])])
        );
    }
}
