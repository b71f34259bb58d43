//! Local files: direct and buffered positioned reads, and the choice between them.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::fs::{Advice, AtFlags, Mode, OFlags, StatxFlags};
use stoker_types::{Summing, clock};

use crate::{
    page_cache,
    reader::{
        Choice, Completion, FileStamp, Filled, Open, ReadDone, ReadError, ReadMode, ReadOp, Reader,
        ReaderKind, Reason,
    },
    ring::{self, BlockRead},
};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of the kernel's `magic.h`.
const MEMORY_FILE_SYSTEMS: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// From this part of the file in the page cache on, a buffered read is taken to be faster, percent.
const PAGE_CACHE_PERCENT: u8 = 60;

/// Bytes summed at a time: a piece that was just written is still in the cache of the core that wrote it.
const PIECE_BYTES: usize = 256 << 10;

/// Requests into which a ring's read is cut: while the first ones' sums are computed, the others are on their way.
const RING_BLOCKS: usize = 4;

/// Opens local files.
#[derive(Debug, Clone, Copy)]
pub struct LocalFiles {
    /// Bytes of one direct read call, and of the parts into which longer direct reads are best cut. Rounded to whole pages.
    pub block_bytes: usize,
    /// Bytes of the parts into which longer reads through the page cache are best cut. Rounded to whole pages.
    pub buffered_part_bytes: usize,
    /// How direct reads are made.
    pub direct: DirectIo,
}

/// How direct reads are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectIo {
    /// Through `io_uring` where that can be had.
    #[default]
    Auto,
    /// One call after the other, as with [`Self::Auto`] where `io_uring` can't be had.
    Pread,
}

/// A local file.
struct LocalFile {
    /// Through the page cache.
    buffered: File,
    /// Past it.
    direct: Option<Direct>,
    block_bytes: usize,
    part_bytes: usize,
    choice: Choice,
}

struct Direct {
    file: File,
    /// Offsets, lengths and addresses must be multiples of it.
    align: usize,
    ring: bool,
}

// === impl LocalFiles ===

impl Default for LocalFiles {
    fn default() -> Self {
        // Measured: on a virtual disk of 1-1.6 GB/s, 1, 4 and 16 MiB on four threads are the same within the noise.
        // 4 MiB keeps many requests in flight, and the checksum of one block runs under the other threads' reads.
        //
        // From memory, what is read and not yet copied on should stay in the processor's cache: sixteen threads at 1 MiB
        // each have one chunk of 16 MiB in hand.
        Self { block_bytes: 4 << 20, buffered_part_bytes: 1 << 20, direct: DirectIo::Auto }
    }
}

impl Open for LocalFiles {
    fn open(&self, path: &Path, mode: ReadMode) -> io::Result<Arc<dyn Reader>> {
        Ok(Arc::new(LocalFile::open(path, mode, *self)?))
    }
}

// === impl LocalFile ===

impl LocalFile {
    fn open(path: &Path, mode: ReadMode, options: LocalFiles) -> io::Result<Self> {
        // NONBLOCK: opening a FIFO in a model's place must not hang; it means nothing for a regular file.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let buffered = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let meta = buffered.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let page = rustix::param::page_size();
        let whole_pages = |bytes: usize| bytes.max(page).next_multiple_of(page);
        let block_bytes = whole_pages(options.block_bytes);
        if mode == ReadMode::Uncached {
            page_cache::drop_file(&buffered)?;
        }
        let (direct, choice) = choose(&buffered, meta.len(), mode, options.direct);
        if direct.is_none() {
            // Beyond the kernel's default read-ahead: these files are read from end to end.
            let _ = rustix::fs::fadvise(&buffered, 0, None, Advice::Sequential);
        }
        tracing::debug!(path = %path.display(), %choice, "file opened");
        let part_bytes =
            if direct.is_some() { block_bytes } else { whole_pages(options.buffered_part_bytes) };
        Ok(Self { buffered, direct, block_bytes, part_bytes, choice })
    }

    fn fill(&self, op: &mut ReadOp) -> Result<Filled, ReadError> {
        match &self.direct {
            Some(direct) if direct.takes(op) => direct.fill(op, self.block_bytes),
            _ => self.fill_by_calls(op),
        }
    }

    fn fill_by_calls(&self, op: &mut ReadOp) -> Result<Filled, ReadError> {
        let mut sums = op.sum.then(Summing::new);
        let (mut read_time, mut sum_time) = (Duration::ZERO, Duration::ZERO);
        let mut filled = 0;
        while filled < op.len {
            let started = clock::now();
            let got = match &self.direct {
                Some(direct) => direct.read_some(self, &mut op.buf, filled, op.offset, op.len),
                None => {
                    let end = op.len.min(filled + PIECE_BYTES);
                    read_retrying(&self.buffered, &mut op.buf[filled..end], op.offset + filled as u64)
                }
            };
            let read = clock::now();
            read_time += read - started;
            let at = op.offset + filled as u64;
            let got = match got {
                Ok(0) => return Err(ReadError::Truncated { at }),
                // A direct read of the tail may bring more than was asked for, if the file grew.
                Ok(got) => got.min(op.len - filled),
                Err(source) => return Err(ReadError::Io { at, source: Arc::new(source) }),
            };
            if let Some(sums) = &mut sums {
                for piece in op.buf[filled..filled + got].chunks(PIECE_BYTES) {
                    sums.update(piece);
                }
                sum_time += read.elapsed();
            }
            filled += got;
        }
        Ok(Filled { sum: sums.map(Summing::finish), read_time, sum_time })
    }
}

impl Direct {
    /// Has reads go through `io_uring` from now on, if one of this file does.
    ///
    /// # Errors
    /// Why not, in words.
    fn try_ring(&mut self) -> Result<(), String> {
        if let Some(why) = ring::refusal() {
            return Err(why.to_owned());
        }
        let read = BlockRead { file: self.file.as_fd(), offset: 0, block: self.align, align: self.align };
        self.probe(|page| read.fill(page, |_| {}).map_err(|(_, error)| error))
            .map_err(|error| error.to_string())?;
        self.ring = true;
        Ok(())
    }

    /// Tries to read the file's first bytes into memory that suits it.
    fn probe(&self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<()> {
        let page = rustix::param::page_size();
        let length = self.align.max(page);
        // Any two pages contain an aligned one.
        let mut space = vec![0_u8; length + page];
        let skip = space.as_ptr().align_offset(page);
        read(&mut space[skip..skip + length]).map(|_| ())
    }

    /// Whether a read goes through a ring, as a whole.
    fn takes(&self, op: &ReadOp) -> bool {
        self.ring
            && op.offset.is_multiple_of(self.align as u64)
            && op.buf.as_ptr().addr().is_multiple_of(self.align)
            && op.len.next_multiple_of(self.align) <= op.buf.len()
    }

    /// Reads through the thread's ring. The sums of what is there are computed while the rest is on its way.
    fn fill(&self, op: &mut ReadOp, block_bytes: usize) -> Result<Filled, ReadError> {
        let begun = clock::now();
        let mut sums = op.sum.then(Summing::new);
        let mut sum_time = Duration::ZERO;
        let block = (block_bytes / RING_BLOCKS).next_multiple_of(self.align).max(self.align);
        let read = BlockRead { file: self.file.as_fd(), offset: op.offset, block, align: self.align };
        // The tail is asked for as a whole number of blocks; the kernel stops at the end of the file.
        let rounded = op.len.next_multiple_of(self.align);
        let (len, mut left) = (op.len, op.len);
        let got = read.fill(&mut op.buf[..rounded], |bytes| {
            // A tail may bring more than was asked for, if the file grew.
            let bytes = &bytes[..bytes.len().min(left)];
            left -= bytes.len();
            let Some(sums) = &mut sums else { return };
            let read = clock::now();
            bytes.chunks(PIECE_BYTES).for_each(|piece| sums.update(piece));
            sum_time += read.elapsed();
        });
        match got {
            Err((at, source)) => Err(ReadError::Io { at: op.offset + at as u64, source: Arc::new(source) }),
            Ok(got) if got < len => Err(ReadError::Truncated { at: op.offset + got as u64 }),
            Ok(_) => Ok(Filled {
                sum: sums.map(Summing::finish),
                read_time: begun.elapsed().saturating_sub(sum_time),
                sum_time,
            }),
        }
    }

    /// Reads the next block; what is not aligned goes through the page cache.
    fn read_some(
        &self,
        file: &LocalFile,
        buf: &mut [u8],
        filled: usize,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        let at = offset + filled as u64;
        let wanted = (len - filled).min(file.block_bytes);
        // The tail is asked for as a whole number of blocks; the kernel stops at the end of the file.
        let rounded = wanted.next_multiple_of(self.align);
        let aligned = at.is_multiple_of(self.align as u64) && filled.is_multiple_of(self.align);
        if aligned && filled + rounded <= buf.len() {
            read_retrying(&self.file, &mut buf[filled..filled + rounded], at)
        } else {
            read_retrying(&file.buffered, &mut buf[filled..filled + wanted], at)
        }
    }
}

impl Reader for LocalFile {
    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn stamp(&self) -> io::Result<FileStamp> {
        let meta = self.buffered.metadata()?;
        Ok(FileStamp {
            len: meta.len(),
            mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
            inode: meta.ino(),
        })
    }

    fn part_bytes(&self) -> Option<usize> {
        Some(self.part_bytes)
    }

    fn read(&self, mut op: ReadOp, done: Completion) {
        assert!(op.len <= op.buf.len(), "a read of {} bytes into a buffer of {}", op.len, op.buf.len());
        let result = self.fill(&mut op);
        done(ReadDone { buf: op.buf, result });
    }
}

/// Direct or buffered, and why.
fn choose(file: &File, len: u64, mode: ReadMode, io: DirectIo) -> (Option<Direct>, Choice) {
    let buffered = |reason| (None, Choice { kind: ReaderKind::Buffered, reason });
    if mode == ReadMode::Buffered {
        return buffered(Reason::Asked);
    }
    if let Ok(fs) = rustix::fs::fstatfs(file)
        && u32::try_from(fs.f_type).is_ok_and(|magic| MEMORY_FILE_SYSTEMS.contains(&magic))
    {
        return buffered(Reason::MemoryFileSystem);
    }
    if mode == ReadMode::Auto
        && let Some(percent) = page_cache::percent_cached(file, len)
        && percent >= PAGE_CACHE_PERCENT
    {
        return buffered(Reason::PageCache { percent });
    }
    match open_direct(file) {
        Ok(mut direct) => {
            let align = u32::try_from(direct.align).unwrap_or(u32::MAX);
            let refused = match io {
                DirectIo::Pread => None,
                DirectIo::Auto => direct.try_ring().err(),
            };
            let kind = if direct.ring { ReaderKind::IoUring } else { ReaderKind::Direct };
            (Some(direct), Choice { kind, reason: Reason::Probed { align, no_ring: refused } })
        }
        Err(error) => buffered(Reason::NoDirect(error.to_string())),
    }
}

/// The same file, opened past the page cache, if a read of it works.
fn open_direct(file: &File) -> io::Result<Direct> {
    let page = rustix::param::page_size();
    // Through the descriptor, not the path: the path may name another file by now.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
    let direct = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    // Linux 6.1 says what it wants; before, a page satisfies every file system that is known to have direct reads.
    let mut align = page;
    if let Ok(stat) = rustix::fs::statx(direct.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN)
    {
        if stat.stx_dio_offset_align == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the file system says so"));
        }
        if stat.stx_dio_mem_align as usize > page {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it wants more than a page of alignment"));
        }
        align = stat.stx_dio_offset_align.max(stat.stx_dio_mem_align) as usize;
    }
    let direct = Direct { file: direct, align, ring: false };
    // Declared or not: only a read that worked counts.
    direct.probe(|page| read_retrying(&direct.file, page, 0))?;
    Ok(direct)
}

fn read_retrying(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buf, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
