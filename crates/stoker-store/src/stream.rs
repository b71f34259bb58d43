//! A model's chunks one after another through a few slots: for what is larger than memory, and for checking.

use std::{fmt, ops::Deref, sync::Arc};

use stoker_checkpoint::ChunkSum;
use stoker_io::{Chunk, ChunkBuf};
use tokio::sync::watch;

use crate::{
    error::LoadError,
    files::{CheckpointFiles, ChunkRef},
    job::{JobId, Priority, Progress, Target},
    report::LoadReport,
    shared::Shared,
};

/// How to stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// Most chunks between disk and consumer, those that the consumer holds included. Fewer if there is less room, at
    /// least one. Four keep the disk busy while the consumer works.
    pub ring_chunks: usize,
    /// Against other loads.
    pub priority: Priority,
    /// Reads everything from the medium, also what is in memory or in the page cache: to check it.
    pub fresh: bool,
}

/// A stream of chunks. Dropped, it ends within one chunk.
pub struct ChunkStream {
    job: JobId,
    files: CheckpointFiles,
    /// Places of its chunks; `None`: all.
    places: Option<Vec<usize>>,
    next: usize,
    progress: watch::Receiver<Progress>,
    shared: Arc<Shared>,
    ring_chunks: usize,
    /// Given up at the end; chunks that the consumer still has keep it.
    lease: Option<Arc<Lease>>,
    report: Option<Arc<LoadReport>>,
}

/// A checked chunk. Dropped, its slot serves the stream's next chunk.
#[derive(Debug)]
pub struct StreamedChunk {
    // Dropped before the seat: whoever is woken by that finds the slot free.
    chunk: Chunk,
    at: ChunkRef,
    sum: ChunkSum,
    _seat: Seat,
}

/// Slots that somebody else uses for a while; see [`crate::Store::lend`].
pub struct LentSlots {
    /// The slots. Those taken out and dropped serve the store again when this is dropped.
    // Dropped before the lease: whoever is woken by that finds the slots free.
    pub slots: Vec<ChunkBuf>,
    _lease: Lease,
}

/// A place in the ring.
struct Seat {
    job: JobId,
    lease: Arc<Lease>,
}

/// The slots set aside for a stream, for as long as it or one of its chunks lives; or lent.
struct Lease {
    shared: Arc<Shared>,
    slots: usize,
}

// === impl StreamOptions ===

impl Default for StreamOptions {
    fn default() -> Self {
        Self { ring_chunks: 8, priority: Priority::Demand, fresh: false }
    }
}

// === impl ChunkStream ===

impl ChunkStream {
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        options: StreamOptions,
    ) -> Result<Self, LoadError> {
        let StreamOptions { ring_chunks, priority, fresh } = options;
        let (job, slots, progress) = shared.begin_stream(files, priority, ring_chunks, fresh)?;
        let lease = Some(Arc::new(Lease { shared: Arc::clone(shared), slots }));
        let (shared, files) = (Arc::clone(shared), files.clone());
        Ok(Self {
            job,
            files,
            places: None,
            next: 0,
            progress,
            shared,
            ring_chunks: slots,
            lease,
            report: None,
        })
    }

    /// The chunks at some places, in order, to complete a copy with: from memory or from below, whatever is known of them.
    pub(crate) fn begin_some(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        priority: Priority,
        ring_chunks: usize,
        places: Vec<usize>,
    ) -> Result<Self, LoadError> {
        let (job, slots, progress) = shared.begin_fill(files, priority, ring_chunks, &places)?;
        let lease = Some(Arc::new(Lease { shared: Arc::clone(shared), slots }));
        let (shared, files, places) = (Arc::clone(shared), files.clone(), Some(places));
        Ok(Self { job, files, places, next: 0, progress, shared, ring_chunks: slots, lease, report: None })
    }

    /// The next chunk in execution order; `None` after the last. Waits for a place in the ring: who holds as many
    /// chunks as it has must drop one first. Cancel-safe.
    ///
    /// # Errors
    /// [`LoadError`]; the stream has ended then.
    pub async fn next(&mut self) -> Result<Option<StreamedChunk>, LoadError> {
        loop {
            // Before looking, so that what comes in between isn't missed.
            let end = self.progress.borrow_and_update().end.clone();
            if let Some(chunk) = self.take() {
                return Ok(Some(chunk));
            }
            match end {
                Some(end) => {
                    self.lease = None;
                    self.report = Some(end?);
                    return Ok(None);
                }
                None => self.progress.changed().await.map_err(|_| LoadError::Closed)?,
            }
        }
    }

    /// What the stream did, once it has ended well.
    #[must_use]
    pub fn report(&self) -> Option<&LoadReport> {
        self.report.as_deref()
    }

    /// Chunks that the ring has.
    #[must_use]
    pub fn ring_chunks(&self) -> usize {
        self.ring_chunks
    }

    fn take(&mut self) -> Option<StreamedChunk> {
        let lease = Arc::clone(self.lease.as_ref()?);
        let place = match &self.places {
            Some(places) => *places.get(self.next)?,
            None => self.next,
        };
        let (chunk, sum) = {
            let mut state = self.shared.lock();
            let Target::Ring(ring) = &mut state.jobs.get_mut(self.job)?.target else { return None };
            ring.ready.remove(&place)?
        };
        let at = self.files.order()[place];
        self.next += 1;
        if self.next == self.places.as_ref().map_or(self.files.order().len(), Vec::len) {
            // It was the last: what is left is to check that the files are still the same.
            self.shared.wake.wake();
        }
        Some(StreamedChunk { chunk, at, sum, _seat: Seat { job: self.job, lease } })
    }
}

impl Drop for ChunkStream {
    fn drop(&mut self) {
        self.shared.fail(self.job, LoadError::Cancelled);
    }
}

impl fmt::Debug for ChunkStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkStream")
            .field("files", &self.files)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

// === impl StreamedChunk ===

impl StreamedChunk {
    /// Which chunk of which file.
    #[must_use]
    pub fn at(&self) -> ChunkRef {
        self.at
    }

    /// Its sum: known before and found right, or learned now.
    #[must_use]
    pub fn sum(&self) -> ChunkSum {
        self.sum
    }

    /// Where in the pool it lies.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.chunk.slot()
    }

    /// The chunk by itself, to be kept for longer than the stream. Its place in the ring goes to another one, for which the
    /// pool must have room beside.
    #[must_use]
    pub fn keep(self) -> Chunk {
        self.chunk
    }
}

impl Deref for StreamedChunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.chunk
    }
}

impl AsRef<[u8]> for StreamedChunk {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

// === impl LentSlots ===

impl LentSlots {
    pub(crate) fn take(shared: &Arc<Shared>) -> Self {
        let slots = shared.lend();
        let lease = Lease { shared: Arc::clone(shared), slots: slots.len() };
        Self { slots, _lease: lease }
    }
}

impl fmt::Debug for LentSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LentSlots").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

// === impl Seat, Lease ===

impl Drop for Seat {
    fn drop(&mut self) {
        {
            let mut state = self.lease.shared.lock();
            if let Some(job) = state.jobs.get_mut(self.job)
                && let Target::Ring(ring) = &mut job.target
            {
                ring.used -= 1;
            }
        }
        self.lease.shared.wake.wake();
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shared.give_back(self.slots);
    }
}
