//! What tensors lie in, and when it goes.

use std::{
    any::Any,
    mem::ManuallyDrop,
    os::fd::AsFd,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use stoker_device::SlabPart;
use stoker_io::{Chunk, ChunkPool, MapError, OwnFile};

use crate::{dlpack::DeviceKind, node::Copy};

/// How often this process has been forked.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// A tensor's memory. It goes with the last handle; in a forked child, with the process: there it is the parent's to give
/// back.
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) device: DeviceKind,
    pub(crate) ordinal: i32,
    /// A write to it fails.
    pub(crate) read_only: bool,
    process: rustix::process::Pid,
    keep: ManuallyDrop<Box<dyn Any + Send + Sync>>,
}

/// A weight file in host memory, of which chunks go one by one.
pub(crate) struct HostFile {
    file: Mutex<OwnFile>,
    address: u64,
    /// Whose slots the chunks are, if they are this process's.
    pool: Option<ChunkPool>,
    /// [`FORKS`] when it was made. A child shares the pool's pages, so none is given back after a fork.
    forks: u64,
    /// Chunks that a child may still read.
    kept: Mutex<Vec<Chunk>>,
    /// What keeps somebody else's slots as they are.
    _hold: Option<Arc<dyn Any + Send + Sync>>,
}

/// A chunk of it: its memory goes with the last handle.
struct HostChunk {
    file: Arc<HostFile>,
    index: u32,
    /// Set when it is there: its slot, if that is this process's.
    placed: OnceLock<Option<Chunk>>,
}

/// A weight file as its chunks arrive.
pub(crate) struct Arriving {
    file: Arc<HostFile>,
    chunks: Vec<Weak<HostChunk>>,
}

// === impl Memory ===

impl Memory {
    /// A part of a device's memory; `kind` is what consumers take its addresses for.
    pub(crate) fn on_device(part: SlabPart, kind: DeviceKind) -> Self {
        let ordinal = match kind {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => i32::try_from(part.device()).unwrap_or(0),
        };
        Self::new(part.address(), kind, ordinal, Box::new(part))
    }

    fn new(address: u64, device: DeviceKind, ordinal: i32, keep: Box<dyn Any + Send + Sync>) -> Self {
        let process = rustix::process::getpid();
        Self { address, device, ordinal, read_only: false, process, keep: ManuallyDrop::new(keep) }
    }

    fn with(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// A part of a node's copy on a device.
    pub(crate) fn of_copy(copy: &Arc<Copy>, at: u64, device: u32, kind: DeviceKind) -> Self {
        let ordinal = match kind {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => i32::try_from(device).unwrap_or(0),
        };
        let read_only = copy.window.is_read_only();
        let new = Self::new(copy.window.address() + at, kind, ordinal, Box::new(Arc::clone(copy)));
        new.with(read_only)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.process == rustix::process::getpid() {
            let keep = std::mem::replace(&mut *self.keep, Box::new(()));
            drop(keep);
        }
    }
}

/// This process is about to be forked.
pub(crate) fn before_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

// === impl Arriving ===

impl Arriving {
    /// Addresses for a file, without memory yet. Each of `tensors` (first byte, length) is returned as a part that keeps what
    /// it lies in; what no part lies in goes at once.
    pub(crate) fn new(
        len: u64,
        chunk_bytes: u64,
        pool: Option<ChunkPool>,
        hold: Option<Arc<dyn Any + Send + Sync>>,
        tensors: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(Self, Vec<HostPart>), MapError> {
        let own = OwnFile::reserve(len, chunk_bytes)?;
        let file = Arc::new(HostFile {
            address: own.address(),
            file: Mutex::new(own),
            pool,
            forks: FORKS.load(Ordering::Relaxed),
            kept: Mutex::default(),
            _hold: hold,
        });
        // `reserve` has bounded their number.
        let count = u32::try_from(len.div_ceil(chunk_bytes)).unwrap_or(0);
        let new = |index| Arc::new(HostChunk { file: Arc::clone(&file), index, placed: OnceLock::new() });
        let chunks: Vec<Arc<HostChunk>> = (0..count).map(new).collect();
        let index = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(chunks.len());
        let parts = tensors.into_iter().map(|(at, len)| {
            let touched = if len == 0 {
                0..0
            } else {
                index(at / chunk_bytes)..index((at + len).div_ceil(chunk_bytes))
            };
            HostPart { file: Arc::clone(&file), at, len, _chunks: chunks[touched].into() }
        });
        let parts = parts.collect();
        let chunks = chunks.iter().map(Arc::downgrade).collect();
        Ok((Self { file, chunks }, parts))
    }

    /// A chunk of somebody else's pool is there, who keeps it.
    pub(crate) fn place(&self, fd: impl AsFd, index: u32, slot: u32) -> Result<(), MapError> {
        self.file.file.lock().place(fd, index, slot)?;
        if let Some(placed) = self.chunks.get(index as usize).and_then(Weak::upgrade) {
            // Placed once, so set once.
            let _ = placed.placed.set(None);
        }
        Ok(())
    }

    /// A chunk of this process's pool is there. Its memory goes with the last part that lies in it, at once if there is none.
    pub(crate) fn place_own(&self, fd: impl AsFd, index: u32, chunk: Chunk) -> Result<(), MapError> {
        let Some(placed) = self.chunks.get(index as usize).and_then(Weak::upgrade) else {
            self.file.release(chunk);
            return Ok(());
        };
        self.file.file.lock().place(fd, index, chunk.slot())?;
        // Placed once, so set once.
        let _ = placed.placed.set(Some(chunk));
        Ok(())
    }
}

// === impl HostFile ===

impl HostFile {
    fn release(&self, chunk: Chunk) {
        let Some(pool) = &self.pool else { return };
        if self.forks != FORKS.load(Ordering::Relaxed) {
            self.kept.lock().push(chunk);
            return;
        }
        let slot = chunk.slot();
        drop(chunk);
        // What the system doesn't take back now goes with the file.
        let _ = pool.release(slot);
    }
}

impl Drop for HostChunk {
    fn drop(&mut self) {
        if let Some(placed) = self.placed.take() {
            self.file.file.lock().forget(self.index);
            if let Some(chunk) = placed {
                self.file.release(chunk);
            }
        }
    }
}

/// A tensor's place in a file.
#[derive(Clone)]
pub(crate) struct HostPart {
    file: Arc<HostFile>,
    at: u64,
    len: u64,
    _chunks: Arc<[Arc<HostChunk>]>,
}

// === impl HostPart ===

impl HostPart {
    /// Its memory, once all of it has arrived: in place, or copied to an address that suits elements of `align` bytes.
    pub(crate) fn memory(&self, align: u64) -> Memory {
        let address = self.file.address + self.at;
        if address.is_multiple_of(align) || self.len == 0 {
            return Memory::new(address, DeviceKind::Cpu, 0, Box::new(self.clone()));
        }
        let mut copy = vec![0_u64; usize::try_from(self.len.div_ceil(8)).unwrap_or(0)];
        if let Some(bytes) = self.file.file.lock().bytes(self.at, self.len) {
            for (word, bytes) in copy.iter_mut().zip(bytes.chunks(8)) {
                let mut padded = [0; 8];
                padded[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_ne_bytes(padded);
            }
        }
        let address = copy.as_mut_ptr().expose_provenance() as u64;
        Memory::new(address, DeviceKind::Cpu, 0, Box::new(copy))
    }
}
