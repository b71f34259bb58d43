//! The limit that loads are compared with: how fast a file can be read without doing anything with it.

use std::{
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

use crate::{Choice, ChunkPool, LocalFiles, Open, ReadMode, ReadOp, Reader, page_cache};

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
#[derive(Debug, Clone, Copy)]
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

/// Reads a whole file past the page cache into slots of `pool`, without checksums, and forgets it. Every chunk has
/// its own slot for as long as the pool has any, then slots are used again. Blocks.
///
/// # Errors
/// The operating system's; `OutOfMemory` when the pool has not one free slot for each thread.
pub fn raw_limit(path: &Path, pool: &ChunkPool, options: RawOptions) -> io::Result<RawRead> {
    let started = clock::now();
    let reader = LocalFiles { block_bytes: options.block_bytes }.open(path, ReadMode::Direct)?;
    let len = reader.stamp()?.len;
    let next = AtomicU64::new(0);
    let kept = Mutex::new(Vec::new());
    let threads = options.threads.max(1);
    std::thread::scope(|scope| {
        let handles: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| read_chunks(&reader, len, pool, &next, &kept))).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| Err(io::Error::other("a reading thread panicked")))
        })
    })?;
    Ok(RawRead { bytes: ByteSize(len), time: started.elapsed(), choice: reader.choice().clone() })
}

/// Drops what the page cache holds of a file, so that the next load comes from the medium.
///
/// # Errors
/// The operating system's.
pub fn drop_page_cache(path: &Path) -> io::Result<()> {
    page_cache::drop_file(&std::fs::File::open(path)?)
}

fn read_chunks(
    reader: &Arc<dyn Reader>,
    len: u64,
    pool: &ChunkPool,
    next: &AtomicU64,
    kept: &Mutex<Vec<crate::ChunkBuf>>,
) -> io::Result<()> {
    let chunk = pool.chunk_bytes() as u64;
    let done: Arc<Mutex<Option<crate::ReadDone>>> = Arc::default();
    loop {
        let offset = next.fetch_add(1, Ordering::Relaxed) * chunk;
        if offset >= len {
            return Ok(());
        }
        let buf = pool.try_take().or_else(|| kept.lock().pop()).ok_or(io::ErrorKind::OutOfMemory)?;
        let wanted = usize::try_from((len - offset).min(chunk)).unwrap_or(pool.chunk_bytes());
        let slot = Arc::clone(&done);
        let op = ReadOp { buf, offset, len: wanted, sum: false };
        reader.read(op, Box::new(move |read| *slot.lock() = Some(read)));
        let read =
            done.lock().take().ok_or_else(|| io::Error::other("a local read ended without a result"))?;
        read.result.map_err(io::Error::other)?;
        kept.lock().push(read.buf);
    }
}
