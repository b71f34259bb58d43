//! A slot in parts, each filled by itself.

#![expect(unsafe_code, reason = "hands out disjoint parts of one slot")]

use std::{
    fmt,
    ops::{Deref, DerefMut, Range},
    slice,
    sync::Arc,
};

use crate::ChunkBuf;

/// Some bytes of a slot, owned: nobody else reads or writes them. The slot comes back from the last of its parts
/// ([`ChunkPart::rejoin`]); when parts are dropped instead, it goes back to its pool with the last of them.
pub struct ChunkPart {
    slot: Arc<ChunkBuf>,
    range: Range<usize>,
}

// === impl ChunkBuf ===

impl ChunkBuf {
    /// Cuts a slot into parts of `part` bytes, as many as `len` bytes need, at least one. The last one has the rest of the
    /// slot.
    ///
    /// # Panics
    /// When `len` is more than a chunk, or `part` is 0.
    #[must_use]
    pub fn split(self, len: usize, part: usize) -> Vec<ChunkPart> {
        let all = <[u8]>::len(&self);
        assert!(len <= all, "a chunk holds {all} bytes, not {len}");
        let count = len.div_ceil(part).max(1);
        let slot = Arc::new(self);
        let end = |i: usize| if i + 1 == count { all } else { (i + 1) * part };
        (0..count).map(|i| ChunkPart { slot: Arc::clone(&slot), range: i * part..end(i) }).collect()
    }
}

// === impl ChunkPart ===

impl ChunkPart {
    /// Where in the slot it begins.
    #[must_use]
    pub fn start(&self) -> usize {
        self.range.start
    }

    /// Gives the part up. The whole slot comes back from whoever is the last to do so, as long as none was dropped.
    #[must_use]
    pub fn rejoin(self) -> Option<ChunkBuf> {
        Arc::into_inner(self.slot)
    }
}

impl From<ChunkBuf> for ChunkPart {
    /// All of a slot.
    fn from(buf: ChunkBuf) -> Self {
        let range = 0..<[u8]>::len(&buf);
        Self { slot: Arc::new(buf), range }
    }
}

impl Deref for ChunkPart {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `split` and `from` made the ranges of one slot disjoint and within it, and the slot is not used as a
        // whole while any of them is there (`rejoin` consumes the last). Its bytes are mapped and initialised for as
        // long as `slot` lives.
        unsafe { slice::from_raw_parts(self.slot.at(self.range.start), self.range.len()) }
    }
}

impl DerefMut for ChunkPart {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes it the only reference to this range.
        unsafe { slice::from_raw_parts_mut(self.slot.at(self.range.start), self.range.len()) }
    }
}

impl fmt::Debug for ChunkPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkPart").field("slot", &self.slot.slot()).field("range", &self.range).finish()
    }
}

#[cfg(test)]
mod tests {
    use stoker_types::ByteSize;

    use crate::ChunkPool;

    #[test]
    fn parts_are_disjoint_and_the_last_brings_the_slot_back() {
        let chunk = ByteSize::kib(64);
        let pool = ChunkPool::new(chunk, chunk).unwrap();
        let parts = pool.try_take().unwrap().split(50_000, 16 << 10);
        let ranges: Vec<_> = parts.iter().map(|part| (part.start(), part.len())).collect();
        // The last has the rest of the slot, for a read that ends beyond the file.
        assert_eq!(ranges, [(0, 16_384), (16_384, 16_384), (32_768, 16_384), (49_152, 16_384)]);
        let threads = parts.into_iter().zip(1_u8..).map(|(mut part, mark)| {
            std::thread::spawn(move || {
                part.fill(mark);
                part.rejoin()
            })
        });
        let whole: Vec<_> =
            threads.collect::<Vec<_>>().into_iter().filter_map(|t| t.join().unwrap()).collect();
        assert_eq!(whole.len(), 1);
        for (i, bytes) in whole[0].chunks(16 << 10).enumerate() {
            assert!(bytes.iter().all(|byte| usize::from(*byte) == i + 1));
        }
        drop(whole);

        let mut parts = pool.try_take().unwrap().split(1, 16 << 10);
        assert_eq!((parts.len(), parts[0].len()), (1, 64 << 10));
        drop(parts.pop());
        // One that is dropped takes nothing with it but the way back.
        let mut parts = pool.try_take().unwrap().split(40 << 10, 16 << 10);
        drop(parts.pop());
        assert!(pool.try_take().is_none());
        assert!(parts.pop().unwrap().rejoin().is_none());
        assert!(parts.pop().unwrap().rejoin().is_some(), "the last one that is given up");
        assert!(pool.try_take().is_some());
    }
}
