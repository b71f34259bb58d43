//! A file's bytes from the pool's slots as memory of the process's own: contiguous, writable, and nobody else's.

#![expect(unsafe_code, reason = "maps memory")]

use std::{fmt, io, os::fd::AsFd, slice};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::map::{MapError, Range, check_chunk_bytes, check_pool};

/// A file beyond this is absurd: its chunks take a flag each.
const CHUNKS_MAX: u64 = 1 << 24;

/// One weight file, mapped from the pool's slots chunk by chunk, copy-on-write: whoever writes to a page gets one of its
/// own, and the pool's stays as it is. Chunks that were not placed can't be accessed.
///
/// As with [`crate::MappedFile`], the bytes are right for as long as the pool's owner keeps the chunks.
pub struct OwnFile {
    range: Range,
    len: u64,
    chunk_bytes: usize,
    placed: Box<[bool]>,
}

// === impl OwnFile ===

impl OwnFile {
    /// Addresses for a file of `len` bytes in chunks of `chunk_bytes`.
    ///
    /// # Errors
    /// [`MapError::ChunkSize`]; `Os` when there are no addresses left.
    pub fn reserve(len: u64, chunk_bytes: u64) -> Result<Self, MapError> {
        check_chunk_bytes(chunk_bytes)?;
        let no_room = || MapError::Os { step: "reserve", source: io::ErrorKind::OutOfMemory.into() };
        let whole = len.checked_next_multiple_of(chunk_bytes).and_then(|bytes| usize::try_from(bytes).ok());
        let chunks = Some(len.div_ceil(chunk_bytes)).filter(|chunks| *chunks <= CHUNKS_MAX);
        let (Some(whole), Some(chunks)) = (whole, chunks) else { return Err(no_room()) };
        let range =
            Range::reserve(whole).map_err(|errno| MapError::Os { step: "reserve", source: errno.into() })?;
        Ok(Self {
            range,
            len,
            chunk_bytes: usize::try_from(chunk_bytes).map_err(|_| no_room())?,
            placed: (0..chunks).map(|_| false).collect(),
        })
    }

    /// Maps chunk `index`, which lies in the pool at `slot`. Each chunk once, so that no byte changes under whoever has its
    /// address.
    ///
    /// # Errors
    /// [`MapError`]; `SlotCount` when there is no such chunk, or it was placed before. Nothing changes then.
    pub fn place(&mut self, pool: impl AsFd, index: u32, slot: u32) -> Result<(), MapError> {
        let fd = pool.as_fd();
        let (chunk, expected) = (self.chunk_bytes, self.placed.len() as u64);
        check_pool(fd, chunk as u64, &[slot])?;
        let index = index as usize;
        let Some(placed) = self.placed.get_mut(index).filter(|placed| !**placed) else {
            return Err(MapError::SlotCount { len: self.len, expected, given: index.saturating_add(1) });
        };
        // SAFETY: the target lies within the reserved range (`index` is below the number of chunks), which is this value's
        // alone, and replaces nothing but the reservation. The file can't shrink, so its pages stay.
        unsafe {
            rustix::mm::mmap(
                self.range.base.as_ptr().byte_add(index * chunk),
                chunk,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                fd,
                u64::from(slot) * chunk as u64,
            )
        }
        .map_err(|errno| MapError::Os { step: "mmap", source: errno.into() })?;
        *placed = true;
        Ok(())
    }

    /// Address of the file's first byte, valid while the value lives.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.base.as_ptr().expose_provenance() as u64
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes as u64
    }

    /// `len` bytes from `at` on; `None` when a byte of them isn't in a chunk that was placed.
    #[must_use]
    pub fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let end = at.checked_add(len).filter(|end| *end <= self.len)?;
        let (at, end) = (usize::try_from(at).ok()?, usize::try_from(end).ok()?);
        if at == end {
            return Some(&[]);
        }
        let chunks = &self.placed[at / self.chunk_bytes..end.div_ceil(self.chunk_bytes)];
        if !chunks.iter().all(|placed| *placed) {
            return None;
        }
        // SAFETY: the range lies within the mapping, all of it was mapped readable, and nobody writes to it while it is
        // borrowed: that is asked of whoever uses the address.
        Some(unsafe { slice::from_raw_parts(self.range.base.as_ptr().cast::<u8>().add(at), end - at) })
    }

    /// Gives back the pages of its own that chunk `index` has got by being written to. Its bytes are the pool's again: only
    /// for a chunk that nobody uses any more.
    pub fn forget(&self, index: u32) {
        let index = index as usize;
        if self.placed.get(index) == Some(&true) {
            self.range.advise_part(index * self.chunk_bytes, self.chunk_bytes, Advice::LinuxDontNeed);
        }
    }
}

impl fmt::Debug for OwnFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnFile").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use stoker_types::ByteSize;

    use super::*;
    use crate::ChunkPool;

    const CHUNK: u64 = 64 << 10;

    fn pool(slots: u64) -> (ChunkPool, Vec<crate::ChunkBuf>) {
        let pool = ChunkPool::new(ByteSize(slots * CHUNK), ByteSize(CHUNK)).unwrap();
        let mut bufs: Vec<_> = std::iter::from_fn(|| pool.try_take()).collect();
        for buf in &mut bufs {
            let value = u8::try_from(buf.slot()).unwrap() + 1;
            buf.fill(value);
        }
        (pool, bufs)
    }

    /// As whoever has the address does.
    fn write(file: &OwnFile, at: u64, value: u8) {
        let at = std::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(file.address() + at).unwrap());
        // SAFETY: within a chunk that was placed, and nobody reads meanwhile.
        unsafe { at.write(value) }
    }

    #[test]
    fn what_is_written_stays_private() {
        let (pool, bufs) = pool(4);
        let fd = pool.read_only_fd().unwrap();
        let mut file = OwnFile::reserve(3 * CHUNK - 5, CHUNK).unwrap();
        file.place(&fd, 0, 3).unwrap();
        file.place(&fd, 2, 1).unwrap();
        assert!(file.bytes(0, CHUNK).unwrap().iter().all(|byte| *byte == 4));
        assert!(file.bytes(2 * CHUNK, CHUNK - 5).unwrap().iter().all(|byte| *byte == 2));
        write(&file, 10, 99);
        assert_eq!(file.bytes(9, 3).unwrap(), [4, 99, 4]);
        assert!(bufs[3].iter().all(|byte| *byte == 4), "the pool's own is as it was");
        file.forget(0);
        assert_eq!(file.bytes(9, 3).unwrap(), [4, 4, 4]);
    }

    #[test]
    fn what_was_not_placed_has_no_bytes() {
        let (pool, _bufs) = pool(2);
        let fd = pool.read_only_fd().unwrap();
        let mut file = OwnFile::reserve(2 * CHUNK, CHUNK).unwrap();
        file.place(&fd, 1, 0).unwrap();
        assert!(file.bytes(CHUNK - 1, 2).is_none() && file.bytes(0, 1).is_none());
        assert!(file.bytes(2 * CHUNK, 1).is_none() && file.bytes(u64::MAX, 2).is_none());
        assert_eq!(file.bytes(0, 0).unwrap(), [0_u8; 0]);
        file.forget(0);
        file.forget(7);
        assert!(matches!(file.place(&fd, 1, 1), Err(MapError::SlotCount { .. })), "once");
        assert!(matches!(file.place(&fd, 2, 1), Err(MapError::SlotCount { .. })));
        assert!(matches!(file.place(&fd, 0, 2), Err(MapError::SlotRange { slot: 2, .. })));
        assert!(matches!(OwnFile::reserve(1, 100), Err(MapError::ChunkSize { .. })));
        assert!(matches!(OwnFile::reserve(u64::MAX, CHUNK), Err(MapError::Os { .. })));
        assert!(matches!(OwnFile::reserve(1 << 50, 4096), Err(MapError::Os { .. })));
    }
}
