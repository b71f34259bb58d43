//! The ledger of a pool: of each slot, which bytes it holds. It lies in memory of its own that outlives the process, as
//! the pool's does, so that whoever takes the pool over knows what is in it.
//!
//! A process may be killed between any two instructions, so each record is either whole or none:
//! - it is written only over an empty one, state word last (release), behind everything that it vouches for;
//! - it is emptied before the first byte of its slot changes ([`crate::ChunkBuf`]'s drop: before anybody can take the slot);
//! - a checksum over record and slot number catches what was damaged by somebody else.
//!
//! One process at a time writes. Every word is an atomic, so that even one that doesn't keep to this breaks no rule of
//! the language.

#![expect(unsafe_code, reason = "words of a shared mapping")]

use std::{
    io,
    os::fd::OwnedFd,
    slice,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use rustix::{
    fs::SealFlags,
    mm::{MapFlags, ProtFlags},
};
use stoker_types::{ChunkSum, ModelName};

use crate::map::Range;

/// Bytes before the first record.
const HEADER_BYTES: usize = 4096;

/// Words of a record: 256 bytes.
const WORDS: usize = 32;

/// "stkrldg" and the version of this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"stkrldg\x01");

/// The state of a record that counts. Any other value but zero is damage.
const WRITTEN: u64 = 0x7772_6974_7465_6e21;

// Words of the header.
const H_MAGIC: usize = 0;
const H_CHUNK_BYTES: usize = 1;
const H_POOL_DEVICE: usize = 2;
const H_POOL_INODE: usize = 3;

// Words of a record.
const STATE: usize = 0;
const CHECK: usize = 1;
const CHUNK: usize = 2;
const LEN: usize = 3;
const SUM: usize = 4;
const VERSION: usize = 5;
const NAME_LEN: usize = 9;
const NAME: usize = 10;
const NAME_WORDS: usize = ModelName::LEN_MAX / 8;

const _: () = assert!(NAME + NAME_WORDS <= WORDS);

/// What a slot holds: one chunk of one version of one file, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// For which model.
    pub model: ModelName,
    /// Which file in which version, as its owner names it: a hash.
    pub version: [u8; 32],
    /// Index of the chunk in the file.
    pub chunk: u32,
    /// Bytes of it, from the slot's beginning.
    pub len: usize,
    /// Their sum.
    pub sum: ChunkSum,
}

/// What is written of a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing: whatever lies in the slot means nothing.
    Empty,
    /// A record.
    Written(Record),
    /// Something that this module has not written.
    Damaged,
}

/// Why a ledger doesn't belong to a pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// It is no ledger, or one of another version of Stoker.
    #[error("no ledger of this version")]
    Unknown,
    /// It is the ledger of another pool.
    #[error("the ledger belongs to another pool")]
    Foreign,
    /// The chunks have another size.
    #[error("the chunks have {found} bytes, not {wanted}")]
    ChunkBytes {
        /// In the ledger.
        found: u64,
        /// Asked for.
        wanted: u64,
    },
    /// Its descriptor is no memfd that can't shrink: its pages could vanish while they are mapped.
    #[error("the memory is not sealed against shrinking")]
    NotSealed,
    /// The operating system refused.
    #[error("{0}")]
    Os(#[from] io::Error),
}

/// A ledger, mapped for writing.
pub(crate) struct Ledger {
    fd: OwnedFd,
    range: Range,
    slots: u32,
}

// === impl Ledger ===

impl Ledger {
    /// A new one for a pool.
    pub(crate) fn new(pool: &OwnedFd, slots: u32, chunk_bytes: usize) -> io::Result<Self> {
        let fd = crate::pool::sealed_memfd("stoker-ledger", bytes_for(slots))?;
        let ledger = Self::map(fd, slots)?;
        let stat = rustix::fs::fstat(pool)?;
        for (word, value) in
            [(H_CHUNK_BYTES, chunk_bytes as u64), (H_POOL_DEVICE, stat.st_dev), (H_POOL_INODE, stat.st_ino)]
        {
            ledger.header()[word].store(value, Ordering::Relaxed);
        }
        ledger.header()[H_MAGIC].store(MAGIC, Ordering::Release);
        Ok(ledger)
    }

    /// Takes one over, with room for at least so many slots.
    pub(crate) fn adopt(
        fd: OwnedFd,
        pool: &OwnedFd,
        slots: u32,
        chunk_bytes: usize,
    ) -> Result<Self, LedgerError> {
        let sealed = rustix::fs::fcntl_get_seals(&fd).map_err(io::Error::from)?;
        if !sealed.contains(SealFlags::SHRINK) {
            return Err(LedgerError::NotSealed);
        }
        let found = u64::try_from(rustix::fs::fstat(&fd).map_err(io::Error::from)?.st_size).unwrap_or(0);
        if found < HEADER_BYTES as u64 {
            return Err(LedgerError::Unknown);
        }
        let wanted = bytes_for(slots);
        if found < wanted as u64 {
            // Grows with zeros: empty records.
            rustix::fs::ftruncate(&fd, wanted as u64).map_err(io::Error::from)?;
        }
        let ledger = Self::map(fd, slots)?;
        let word = |word: usize| ledger.header()[word].load(Ordering::Acquire);
        if word(H_MAGIC) != MAGIC {
            return Err(LedgerError::Unknown);
        }
        let stat = rustix::fs::fstat(pool).map_err(io::Error::from)?;
        if (word(H_POOL_DEVICE), word(H_POOL_INODE)) != (stat.st_dev, stat.st_ino) {
            return Err(LedgerError::Foreign);
        }
        let (found, wanted) = (word(H_CHUNK_BYTES), chunk_bytes as u64);
        if found != wanted {
            return Err(LedgerError::ChunkBytes { found, wanted });
        }
        Ok(ledger)
    }

    fn map(fd: OwnedFd, slots: u32) -> io::Result<Self> {
        let len = bytes_for(slots);
        let range = Range::reserve(len)?;
        // SAFETY: replaces the reservation just made, of this length, which nobody else knows of yet. The file is at
        // least as long and can't shrink.
        unsafe {
            rustix::mm::mmap(
                range.base.as_ptr(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                &fd,
                0,
            )
        }?;
        Ok(Self { fd, range, slots })
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Writes what a slot holds. The bytes must be there, and must not change before [`Self::clear`].
    pub(crate) fn write(&self, slot: u32, record: &Record) {
        self.clear(slot);
        let words = words_of(record);
        let at = self.record(slot);
        for (to, word) in at[CHUNK..].iter().zip(&words[CHUNK..]) {
            to.store(*word, Ordering::Relaxed);
        }
        at[CHECK].store(check_of(slot, &words).0, Ordering::Relaxed);
        // Behind the record's words, and behind the slot's bytes, which whoever calls this has seen.
        at[STATE].store(WRITTEN, Ordering::Release);
    }

    /// What a slot holds means nothing from here on.
    pub(crate) fn clear(&self, slot: u32) {
        let state = &self.record(slot)[STATE];
        if state.load(Ordering::Relaxed) != 0 {
            state.store(0, Ordering::Relaxed);
        }
        // Before whatever is written to the slot or to the record next, by whoever then has the slot.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn read(&self, slot: u32) -> Entry {
        let at = self.record(slot);
        match at[STATE].load(Ordering::Acquire) {
            0 => return Entry::Empty,
            WRITTEN => {}
            _ => return Entry::Damaged,
        }
        let words: [u64; WORDS] = std::array::from_fn(|word| at[word].load(Ordering::Relaxed));
        if check_of(slot, &words).0 != words[CHECK] {
            return Entry::Damaged;
        }
        record_of(&words).map_or(Entry::Damaged, Entry::Written)
    }

    fn header(&self) -> &[AtomicU64] {
        &self.words()[..HEADER_BYTES / 8]
    }

    fn record(&self, slot: u32) -> &[AtomicU64; WORDS] {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let begin = HEADER_BYTES / 8 + slot as usize * WORDS;
        self.words()[begin..].first_chunk().expect("the ledger has a record for each slot")
    }

    fn words(&self) -> &[AtomicU64] {
        let base = self.range.base.cast::<AtomicU64>().as_ptr();
        // SAFETY: the mapping is as long as `bytes_for(slots)` says and lives as long as `self`; it is aligned to a page;
        // every bit pattern is an `AtomicU64`; and it is only ever accessed as such.
        unsafe { slice::from_raw_parts(base, bytes_for(self.slots) / 8) }
    }
}

fn bytes_for(slots: u32) -> usize {
    HEADER_BYTES + slots as usize * WORDS * 8
}

fn words_of(record: &Record) -> [u64; WORDS] {
    let Record { model, version, chunk, len, sum } = record;
    let mut words = [0; WORDS];
    words[STATE] = WRITTEN;
    words[CHUNK] = u64::from(*chunk);
    words[LEN] = *len as u64;
    words[SUM] = sum.0;
    let (parts, _) = version.as_chunks();
    for (word, part) in words[VERSION..].iter_mut().zip(parts) {
        *word = u64::from_le_bytes(*part);
    }
    let name = model.as_str().as_bytes();
    words[NAME_LEN] = name.len() as u64;
    for (word, part) in words[NAME..].iter_mut().zip(name.chunks(8)) {
        let mut padded = [0; 8];
        padded[..part.len()].copy_from_slice(part);
        *word = u64::from_le_bytes(padded);
    }
    words
}

fn record_of(words: &[u64; WORDS]) -> Option<Record> {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let name = bytes(&words[NAME..NAME + NAME_WORDS]);
    let name = name.get(..usize::try_from(words[NAME_LEN]).ok()?)?;
    Some(Record {
        model: ModelName::new(std::str::from_utf8(name).ok()?).ok()?,
        version: bytes(&words[VERSION..NAME_LEN]).try_into().ok()?,
        chunk: u32::try_from(words[CHUNK]).ok()?,
        len: usize::try_from(words[LEN]).ok()?,
        sum: ChunkSum(words[SUM]),
    })
}

/// Of a record's words and its place.
fn check_of(slot: u32, words: &[u64; WORDS]) -> ChunkSum {
    let mut bytes = [0; (WORDS - CHUNK + 1) * 8];
    for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip([u64::from(slot)].iter().chain(&words[CHUNK..]))
    {
        *to = word.to_le_bytes();
    }
    ChunkSum::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: u32 = 4;

    fn record(chunk: u32) -> Record {
        Record {
            model: "owner/model:1b".parse().unwrap(),
            version: std::array::from_fn(|i| u8::try_from(i).unwrap() ^ 0x5a),
            chunk,
            len: 16 << 20,
            sum: ChunkSum(0x0123_4567_89ab_cdef ^ u64::from(chunk)),
        }
    }

    fn pool() -> OwnedFd {
        crate::pool::sealed_memfd("test-pool", 4096).unwrap()
    }

    #[test]
    fn records_come_back_after_adoption_and_only_whole() {
        let pool = pool();
        let ledger = Ledger::new(&pool, SLOTS, 4096).unwrap();
        assert!((0..SLOTS).all(|slot| ledger.read(slot) == Entry::Empty));
        ledger.write(1, &record(7));
        let longest = Record { model: "n".repeat(ModelName::LEN_MAX).parse().unwrap(), ..record(8) };
        ledger.write(3, &longest);
        let fd = ledger.fd().try_clone().unwrap();
        drop(ledger);
        // With more slots than before.
        let ledger = Ledger::adopt(fd, &pool, SLOTS + 1000, 4096).unwrap();
        assert_eq!(ledger.read(1), Entry::Written(record(7)));
        assert_eq!(ledger.read(3), Entry::Written(longest));
        assert_eq!(ledger.read(SLOTS + 999), Entry::Empty);
        ledger.write(1, &record(9));
        assert_eq!(ledger.read(1), Entry::Written(record(9)));
        ledger.clear(1);
        assert_eq!(ledger.read(1), Entry::Empty);
    }

    /// As if the process had been killed behind each of the stores of a write, and as if any one bit had flipped.
    #[test]
    fn no_state_between_two_stores_is_taken_for_a_record() {
        let ledger = Ledger::new(&pool(), SLOTS, 4096).unwrap();
        for before in [None, Some(record(1))] {
            let words = words_of(&record(2));
            for stores in 0..=WORDS {
                if let Some(before) = &before {
                    ledger.write(0, before);
                }
                ledger.clear(0);
                let order = (CHUNK..WORDS).chain([CHECK, STATE]);
                for word in order.take(stores) {
                    let value = if word == CHECK { check_of(0, &words).0 } else { words[word] };
                    ledger.record(0)[word].store(value, Ordering::Relaxed);
                }
                let is = ledger.read(0);
                let whole = stores == WORDS;
                assert_eq!(is, if whole { Entry::Written(record(2)) } else { Entry::Empty }, "{stores}");
            }
        }
        for bit in 0..WORDS * 64 {
            ledger.write(0, &record(2));
            ledger.record(0)[bit / 64].fetch_xor(1 << (bit % 64), Ordering::Relaxed);
            assert_eq!(ledger.read(0), Entry::Damaged, "bit {bit}");
        }
        // A record that was copied to another slot.
        ledger.write(0, &record(2));
        for word in 0..WORDS {
            let value = ledger.record(0)[word].load(Ordering::Relaxed);
            ledger.record(1)[word].store(value, Ordering::Relaxed);
        }
        assert_eq!(ledger.read(1), Entry::Damaged);
    }

    #[test]
    fn what_is_no_ledger_of_this_pool() {
        let pool_of_it = pool();
        let ledger = Ledger::new(&pool_of_it, SLOTS, 4096).unwrap();
        let again = |pool: &OwnedFd, chunk| {
            Ledger::adopt(ledger.fd().try_clone().unwrap(), pool, SLOTS, chunk).map(|_| ())
        };
        assert!(again(&pool_of_it, 4096).is_ok());
        assert!(matches!(again(&pool(), 4096), Err(LedgerError::Foreign)));
        assert!(matches!(
            again(&pool_of_it, 8192),
            Err(LedgerError::ChunkBytes { found: 4096, wanted: 8192 })
        ));
        ledger.header()[H_MAGIC].store(0, Ordering::Relaxed);
        assert!(matches!(again(&pool_of_it, 4096), Err(LedgerError::Unknown)));
        let other = |bytes| crate::pool::sealed_memfd("test", bytes).unwrap();
        assert!(matches!(Ledger::adopt(other(10), &pool_of_it, SLOTS, 4096), Err(LedgerError::Unknown)));
        assert!(matches!(Ledger::adopt(other(1 << 20), &pool_of_it, SLOTS, 4096), Err(LedgerError::Unknown)));
        let unsealed: OwnedFd = tempfile::tempfile().unwrap().into();
        assert!(Ledger::adopt(unsealed, &pool_of_it, SLOTS, 4096).is_err());
    }
}
