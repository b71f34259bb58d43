//! A file's bytes as one contiguous read-only range of memory: from the pool's slots, or from a plain file.

#![expect(unsafe_code, reason = "maps memory")]

use std::{
    ffi::c_void,
    fmt,
    fs::File,
    io,
    ops::Deref,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    ptr::NonNull,
    slice,
};

use rustix::{
    fs::SealFlags,
    mm::{Advice, MapFlags, ProtFlags},
};

/// Huge pages need the same alignment in memory and in the pool's file, bytes.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why a file can't be mapped from the pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The chunk size can't be mapped.
    #[error("a chunk of {chunk_bytes} bytes is no positive multiple of the page size {page}")]
    ChunkSize {
        /// What was given.
        chunk_bytes: u64,
        /// The machine's page size.
        page: u64,
    },
    /// The number of slots doesn't fit the length.
    #[error("a file of {len} bytes has {expected} chunks, but {given} slots were given")]
    SlotCount {
        /// Length of the file.
        len: u64,
        /// Chunks that it has.
        expected: u64,
        /// Slots that were given.
        given: usize,
    },
    /// A slot lies outside the pool.
    #[error("slot {slot} lies outside a pool of {pool_bytes} bytes")]
    SlotRange {
        /// The slot.
        slot: u32,
        /// The pool's length.
        pool_bytes: u64,
    },
    /// The descriptor is no sealed memfd: its pages could vanish while they are mapped.
    #[error("the pool's descriptor is not sealed against shrinking")]
    NotSealed,
    /// The operating system refused.
    #[error("{step} failed: {source}")]
    Os {
        /// What was tried.
        step: &'static str,
        /// Its words.
        source: io::Error,
    },
}

/// One weight file, mapped from the pool's slots in order: contiguous, read-only, no byte copied.
///
/// The bytes are right for as long as the pool's owner keeps the chunks for this process, which it does from the
/// order to load until it has been told that the mapping is gone. If it broke that promise, the bytes would change;
/// they could not vanish (the pool is sealed).
pub struct MappedFile {
    range: Range,
    len: usize,
    runs: usize,
}

/// A plain file, mapped read-only and private. For files that nobody changes: a file cut short while it is mapped
/// ends the process with SIGBUS.
#[derive(Debug)]
pub struct MappedLocal {
    range: Option<Range>,
    len: usize,
}

/// A range of address space that is unmapped on drop.
pub(crate) struct Range {
    pub(crate) base: NonNull<c_void>,
    len: usize,
}

// SAFETY: plain memory that belongs to the value. It is only read, except by the pool, each of whose slots has one owner
// at a time (`ChunkBuf`).
unsafe impl Send for Range {}
// SAFETY: as above.
unsafe impl Sync for Range {}

// === impl MappedFile ===

impl MappedFile {
    /// Maps a file of `len` bytes whose chunk `i` lies in the pool at `slots[i] * chunk_bytes`. Neighbouring slots
    /// become one mapping. Takes microseconds; pages are faulted in as they are touched (see [`Self::populate`]).
    ///
    /// # Errors
    /// [`MapError`]. Nothing stays mapped then.
    pub fn map(pool: impl AsFd, len: u64, chunk_bytes: u64, slots: &[u32]) -> Result<Self, MapError> {
        check_chunk_bytes(chunk_bytes)?;
        let expected = len.div_ceil(chunk_bytes);
        if expected != slots.len() as u64 {
            return Err(MapError::SlotCount { len, expected, given: slots.len() });
        }
        let fd = pool.as_fd();
        check_pool(fd, chunk_bytes, slots)?;
        let os = |step| move |errno: rustix::io::Errno| MapError::Os { step, source: errno.into() };
        // The slots are within the pool, but one slot may be named many times: the sum needs its own check.
        let whole = expected.checked_mul(chunk_bytes).and_then(|b| usize::try_from(b).ok());
        let (Some(whole), Ok(len)) = (whole, usize::try_from(len)) else {
            return Err(MapError::Os { step: "reserve", source: io::ErrorKind::OutOfMemory.into() });
        };
        let range = Range::reserve(whole).map_err(os("reserve"))?;
        #[expect(clippy::cast_possible_truncation, reason = "smaller than `whole`, which fits")]
        let chunk = chunk_bytes as usize;
        let mut runs = 0;
        let mut first = 0;
        while first < slots.len() {
            let run =
                slots[first..].iter().zip(slots[first]..).take_while(|(slot, next)| *slot == next).count();
            // SAFETY: the target lies within the range reserved above, which nobody else knows of yet; it replaces
            // only that reservation. The file can't shrink, so its pages stay.
            unsafe {
                rustix::mm::mmap(
                    range.base.as_ptr().byte_add(first * chunk),
                    run * chunk,
                    ProtFlags::READ,
                    MapFlags::SHARED | MapFlags::FIXED,
                    fd,
                    u64::from(slots[first]) * chunk_bytes,
                )
            }
            .map_err(os("mmap"))?;
            first += run;
            runs += 1;
        }
        // Where the pool's pages are huge, map them as such; elsewhere refused, which costs only speed.
        range.advise(Advice::LinuxHugepage);
        Ok(Self { range, len, runs })
    }

    /// Length of the file, bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the file has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many mappings it took: 1 when all slots are neighbours.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Enters every page into the page table now, instead of at first touch. Blocks: with pages of 4 KiB, measured at
    /// 7 ms of processor time for each 100 MB (9 ms at first touch, spread over the work). So it is worth it only on a
    /// thread that has nothing else to do. Does nothing on a kernel that can't (before 5.14).
    pub fn populate(&self) {
        self.range.advise(Advice::LinuxPopulateRead);
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the whole range is mapped readable while `self` lives, `len` is at most its length, and the pool's
        // owner doesn't write to slots that it has told others of (see the type's documentation).
        unsafe { slice::from_raw_parts(self.range.base.as_ptr().cast::<u8>(), self.len) }
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedFile").field("len", &self.len).field("runs", &self.runs).finish_non_exhaustive()
    }
}

/// Whether chunks of this size can be mapped.
pub(crate) fn check_chunk_bytes(chunk_bytes: u64) -> Result<(), MapError> {
    let page = rustix::param::page_size() as u64;
    if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(page) {
        return Err(MapError::ChunkSize { chunk_bytes, page });
    }
    Ok(())
}

/// Whether it is a pool whose pages stay, and the slots are within it.
pub(crate) fn check_pool(fd: BorrowedFd<'_>, chunk_bytes: u64, slots: &[u32]) -> Result<(), MapError> {
    let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    if !sealed {
        return Err(MapError::NotSealed);
    }
    let stat = rustix::fs::fstat(fd).map_err(|errno| MapError::Os { step: "fstat", source: errno.into() })?;
    let pool_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    for &slot in slots {
        let end = (u64::from(slot) + 1).checked_mul(chunk_bytes);
        if end.is_none_or(|end| end > pool_bytes) {
            return Err(MapError::SlotRange { slot, pool_bytes });
        }
    }
    Ok(())
}

// === impl MappedLocal ===

impl MappedLocal {
    /// Maps a whole file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        if len == 0 {
            return Ok(Self { range: None, len });
        }
        // SAFETY: a new mapping at an address that the kernel chooses; no existing memory is touched.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, &file, 0)
        }?;
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { range: Some(Range { base, len }), len })
    }
}

impl Deref for MappedLocal {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.range {
            // SAFETY: the range is mapped readable for `len` bytes while `self` lives; that nobody changes the file
            // is the caller's part (see the type's documentation).
            Some(range) => unsafe { slice::from_raw_parts(range.base.as_ptr().cast::<u8>(), self.len) },
            None => &[],
        }
    }
}

// === impl Range ===

impl Range {
    /// Address space for `len` bytes, aligned for huge pages, without access.
    pub(crate) fn reserve(len: usize) -> Result<Self, rustix::io::Errno> {
        let padded = len.max(1).checked_add(HUGE_PAGE_BYTES).ok_or(rustix::io::Errno::NOMEM)?;
        // SAFETY: a new mapping at an address that the kernel chooses; no existing memory is touched.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                padded,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let skip = base.align_offset(HUGE_PAGE_BYTES);
        // What is before and behind the aligned part stays reserved until the drop: it costs no memory. `whole` keeps
        // its bounds.
        let whole = Self { base: NonNull::new(base).ok_or(rustix::io::Errno::NOMEM)?, len: padded };
        // SAFETY: `skip < HUGE_PAGE_BYTES`, so `skip..skip + len` lies within the mapping.
        let aligned = unsafe { whole.base.byte_add(skip) };
        whole.trim(aligned, len.max(1).next_multiple_of(rustix::param::page_size()))
    }

    /// Unmaps what lies outside `len` bytes from `base`.
    fn trim(self, base: NonNull<c_void>, len: usize) -> Result<Self, rustix::io::Errno> {
        let before = base.as_ptr().addr() - self.base.as_ptr().addr();
        let after = self.len - before - len;
        let outer = std::mem::ManuallyDrop::new(self);
        let kept = Self { base, len };
        // SAFETY: both ranges are parts of the reservation, outside of `kept`, and nobody has a pointer to them.
        unsafe {
            if before > 0 {
                rustix::mm::munmap(outer.base.as_ptr(), before)?;
            }
            if after > 0 {
                rustix::mm::munmap(base.as_ptr().byte_add(len), after)?;
            }
        }
        Ok(kept)
    }

    /// Advises on `len` bytes from `at` on, which the caller has the right to forget.
    pub(crate) fn advise_part(&self, at: usize, len: usize, advice: Advice) {
        assert!(at <= self.len && len <= self.len - at, "a part of the range");
        // SAFETY: the part lies within the range (above), which belongs to `self`; whether contents may change is the
        // caller's to know.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().byte_add(at), len, advice) };
    }

    pub(crate) fn advise(&self, advice: Advice) {
        // SAFETY: the range belongs to `self`; the advices used here change no contents.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr(), self.len, advice) };
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor and belongs to `self`; slices of it borrow from its owner.
        // The only error is a range that isn't mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len) };
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Range").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use stoker_types::ByteSize;

    use super::*;
    use crate::ChunkPool;

    const CHUNK: u64 = 64 << 10;

    #[test]
    fn slots_in_any_order_are_one_range() {
        let pool = ChunkPool::new(ByteSize(8 * CHUNK), ByteSize(CHUNK)).unwrap();
        let mut bufs: Vec<_> = std::iter::from_fn(|| pool.try_take()).collect();
        for buf in &mut bufs {
            let value = u8::try_from(buf.slot()).unwrap() + 1;
            buf.fill(value);
        }
        let fd = pool.read_only_fd().unwrap();
        for (slots, runs) in [
            (vec![0, 1, 2, 3], 1),
            (vec![3, 2, 1, 0], 4),
            (vec![4, 5, 1, 2, 3, 7], 3),
            (vec![6], 1),
            (vec![], 0),
        ] {
            let len = (slots.len() as u64 * CHUNK).saturating_sub(100);
            let map = MappedFile::map(&fd, len, CHUNK, &slots).unwrap();
            map.populate();
            assert_eq!((map.len() as u64, map.runs()), (len, runs));
            for (i, byte) in map.iter().enumerate() {
                let slot = slots[i / usize::try_from(CHUNK).unwrap()];
                assert_eq!(u32::from(*byte), slot + 1);
            }
        }
    }

    #[test]
    fn a_mapping_outlives_the_pool_and_the_descriptor() {
        let pool = ChunkPool::new(ByteSize(CHUNK), ByteSize(CHUNK)).unwrap();
        let mut buf = pool.try_take().unwrap();
        buf.fill(9);
        let map = MappedFile::map(pool.read_only_fd().unwrap(), CHUNK, CHUNK, &[0]).unwrap();
        drop((buf, pool));
        assert!(map.iter().all(|b| *b == 9));
    }

    #[test]
    fn what_a_peer_says_is_checked() {
        let pool = ChunkPool::new(ByteSize(2 * CHUNK), ByteSize(CHUNK)).unwrap();
        let fd = pool.read_only_fd().unwrap();
        let map = |len, chunk, slots: &[u32]| MappedFile::map(&fd, len, chunk, slots).unwrap_err();
        assert!(matches!(map(CHUNK, CHUNK, &[2]), MapError::SlotRange { slot: 2, .. }));
        assert!(matches!(map(CHUNK, CHUNK, &[u32::MAX]), MapError::SlotRange { .. }));
        assert!(matches!(map(CHUNK + 1, CHUNK, &[0]), MapError::SlotCount { expected: 2, given: 1, .. }));
        assert!(matches!(map(u64::MAX, CHUNK, &[0]), MapError::SlotCount { .. }));
        assert!(matches!(map(1, 100, &[0]), MapError::ChunkSize { .. }));
        assert!(matches!(map(1, 0, &[0]), MapError::ChunkSize { .. }));
        assert!(matches!(map(1, u64::MAX - 4095, &[0]), MapError::SlotRange { .. }));
        let plain = tempfile::tempfile().unwrap();
        assert!(matches!(MappedFile::map(&plain, 0, CHUNK, &[]), Err(MapError::NotSealed)));
    }

    #[test]
    fn a_local_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(MappedLocal::open(file.path()).unwrap().is_empty());
        file.write_all(b"weights").unwrap();
        assert_eq!(&*MappedLocal::open(file.path()).unwrap(), b"weights");
        assert!(MappedLocal::open(Path::new("/nonexistent")).is_err());
    }
}
