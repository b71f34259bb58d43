//! The limit that loads are compared with: how fast a file can be read without doing anything with it.

use std::{
    collections::VecDeque,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stoker_types::{ByteSize, BytesPerSec, clock};

use crate::{Choice, ChunkBuf, DirectIo, LocalFiles, Open, ReadDone, ReadMode, ReadOp, Reader, page_cache};

/// Of a file, when settings are compared: long enough for a steady state, short enough to do it often.
const SAMPLE: ByteSize = ByteSize::mib(256);

/// Reads of the sample with each setting. The best counts: noise only slows.
const SAMPLES: usize = 3;

/// A raw read of a file.
#[derive(Debug, Clone)]
pub struct RawRead {
    /// Bytes read.
    pub bytes: ByteSize,
    /// From opening the file to its last byte.
    pub time: Duration,
    /// How it was read.
    pub choice: Choice,
}

/// What to read with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawOptions {
    /// Threads.
    pub threads: usize,
    /// Bytes of one read call.
    pub block_bytes: usize,
}

// === impl RawRead ===

impl RawRead {
    /// Bytes a second.
    #[must_use]
    pub fn rate(&self) -> BytesPerSec {
        BytesPerSec::of(self.bytes, self.time)
    }
}

// === impl RawOptions ===

impl RawOptions {
    /// From one request at a time to a deep queue of large ones.
    pub const CANDIDATES: [Self; 6] = [
        Self::new(1, 16 << 20),
        Self::new(2, 4 << 20),
        Self::new(4, 1 << 20),
        Self::new(4, 4 << 20),
        Self::new(8, 4 << 20),
        Self::new(4, 16 << 20),
    ];

    const fn new(threads: usize, block_bytes: usize) -> Self {
        Self { threads, block_bytes }
    }

    /// The fastest of [`Self::CANDIDATES`] for a file, by reading its beginning a few times with each, in turns.
    /// Blocks, a few seconds on a disk of 2 GB/s.
    ///
    /// # Errors
    /// As [`raw_limit`].
    pub fn fastest(path: &Path, slots: &mut Vec<ChunkBuf>) -> io::Result<Self> {
        let mut best = [Duration::MAX; Self::CANDIDATES.len()];
        for _ in 0..SAMPLES {
            for (options, best) in Self::CANDIDATES.into_iter().zip(&mut best) {
                *best = read_first(path, SAMPLE, slots, options)?.time.min(*best);
            }
        }
        let fastest = Self::CANDIDATES.into_iter().zip(best).min_by_key(|(_, time)| *time);
        Ok(fastest.map_or(Self::CANDIDATES[0], |(options, _)| options))
    }
}

/// Reads a whole file past the page cache into `slots` of one pool, without checksums, and forgets it. Slots are used in
/// turn, again when there are more chunks than slots. Blocks.
///
/// The same slots as the loads', or the comparison means nothing: how fast a disk fills memory depends on how that lies
/// (see [`ChunkBuf::populate`]).
///
/// # Errors
/// The operating system's; `OutOfMemory` without a slot. After an error, slots may be missing: they went back to their
/// pool.
pub fn raw_limit(path: &Path, slots: &mut Vec<ChunkBuf>, options: RawOptions) -> io::Result<RawRead> {
    read_first(path, ByteSize(u64::MAX), slots, options)
}

/// Drops what the page cache holds of a file, so that the next load comes from the medium.
///
/// # Errors
/// The operating system's.
pub fn drop_page_cache(path: &Path) -> io::Result<()> {
    page_cache::drop_file(&std::fs::File::open(path)?)
}

/// Reads a file's first bytes, at most `most`.
fn read_first(
    path: &Path,
    most: ByteSize,
    slots: &mut Vec<ChunkBuf>,
    options: RawOptions,
) -> io::Result<RawRead> {
    let chunk = slots.first().ok_or(io::ErrorKind::OutOfMemory)?.len();
    let started = clock::now();
    let (block_bytes, direct) = (options.block_bytes, DirectIo::Pread);
    let files = LocalFiles { block_bytes, direct, ..LocalFiles::default() };
    let reader = files.open(path, ReadMode::Direct)?;
    let len = reader.stamp()?.len.min(most.bytes());
    let next = AtomicU64::new(0);
    let threads = options.threads.clamp(1, slots.len());
    let free = Mutex::new(VecDeque::from(std::mem::take(slots)));
    let read = std::thread::scope(|scope| {
        let handles: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| read_chunks(&reader, len, chunk, &next, &free))).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| Err(io::Error::other("a reading thread panicked")))
        })
    });
    let time = started.elapsed();
    slots.extend(free.into_inner());
    read?;
    Ok(RawRead { bytes: ByteSize(len), time, choice: reader.choice().clone() })
}

fn read_chunks(
    reader: &Arc<dyn Reader>,
    len: u64,
    chunk: usize,
    next: &AtomicU64,
    free: &Mutex<VecDeque<ChunkBuf>>,
) -> io::Result<()> {
    let done: Arc<Mutex<Option<ReadDone>>> = Arc::default();
    loop {
        let offset = next.fetch_add(1, Ordering::Relaxed) * chunk as u64;
        if offset >= len {
            return Ok(());
        }
        let buf = free.lock().pop_front().ok_or(io::ErrorKind::OutOfMemory)?;
        let wanted = usize::try_from(len - offset).map_or(chunk, |left| left.min(chunk));
        buf.populate(wanted);
        let slot = Arc::clone(&done);
        let op = ReadOp { buf: buf.into(), offset, len: wanted, sum: false };
        reader.read(op, Box::new(move |read| *slot.lock() = Some(read)));
        let read =
            done.lock().take().ok_or_else(|| io::Error::other("a local read ended without a result"))?;
        free.lock().extend(read.buf.rejoin());
        read.result.map_err(io::Error::other)?;
    }
}
