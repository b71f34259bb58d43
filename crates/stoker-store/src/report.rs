//! What is said of a load, and of the store.

use std::time::Duration;

use stoker_checkpoint::ChunkSum;
use stoker_io::Choice;
use stoker_types::{ByteSize, BytesPerSec, ModelName, Tier, TierBytes, TierRate};

/// What a load did. Those who joined it get the same report.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadReport {
    /// Bytes by the tier that they came from: those that were in memory already count for [`Tier::Dram`].
    pub bytes: Vec<TierBytes>,
    /// From the order to the last verified byte.
    pub total: Duration,
    /// When that was: wall-clock time since the Unix epoch.
    pub ended: Duration,
    /// Until the files were open and known to be those that were indexed.
    pub open: Duration,
    /// From then to the last verified byte: reading and checking, which overlap.
    pub transfer: Duration,
    /// Time of all reading threads in reads. They overlap, so this may exceed `transfer`.
    pub read_thread_time: Duration,
    /// Time of all reading threads in checksums.
    pub verify_thread_time: Duration,
    /// How each file was read; empty when nothing had to be.
    pub readers: Vec<Choice>,
    /// Sums of every file's chunks, where none were known before and all have been computed now. Whoever keeps the
    /// manifest may record them.
    pub learned: Option<Vec<Vec<ChunkSum>>>,
    /// Chunks that were right only when read again.
    pub reread: u32,
    /// Chunks evicted to make room.
    pub evicted: u32,
}

/// Why chunks left memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EvictReason {
    /// Another model needed the room.
    Room,
    /// The budget was lowered.
    Budget,
    /// The machine is short of memory.
    Pressure,
    /// Somebody asked for it.
    Asked,
    /// The files were replaced.
    Replaced,
    /// Their load failed or was cancelled.
    Failed,
}

/// Chunks evicted so far, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Evictions {
    /// Another model needed the room.
    pub room: u64,
    /// The budget was lowered.
    pub budget: u64,
    /// The machine is short of memory.
    pub pressure: u64,
    /// Somebody asked for it.
    pub asked: u64,
    /// The files were replaced.
    pub replaced: u64,
    /// Their load failed or was cancelled.
    pub failed: u64,
}

/// What of a model is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residency {
    /// The model.
    pub model: ModelName,
    /// Bytes from its beginning, in execution order.
    pub prefix: ByteSize,
    /// Bytes in all.
    pub resident: ByteSize,
    /// Bytes that it has.
    pub total: ByteSize,
    /// Bytes of the slots that it takes: whole chunks.
    pub slots: ByteSize,
    /// Guards and loads that hold it: not evictable while there are any.
    pub holds: usize,
    /// Not evictable to make room.
    pub pinned: bool,
    /// Being loaded.
    pub loading: bool,
}

/// The store's state at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreStats {
    /// Bytes that may be in use.
    pub budget: ByteSize,
    /// Bytes of slots in use.
    pub used: ByteSize,
    /// Bytes of those that are mapped, being loaded, streamed or pinned: not evictable.
    pub mapped: ByteSize,
    /// Models of which something is in memory, or which are being loaded or held.
    pub residency: Vec<Residency>,
    /// Measured rates.
    pub rates: Vec<TierRate>,
    /// Chunks evicted so far.
    pub evictions: Evictions,
    /// Loads under way, streams included.
    pub loading: usize,
    /// Bytes read so far, from whatever tier is below memory.
    pub bytes_read: ByteSize,
}

// === impl LoadReport ===

impl LoadReport {
    /// Bytes that came from one tier.
    #[must_use]
    pub fn bytes_from(&self, tier: Tier) -> ByteSize {
        self.bytes.iter().filter(|b| b.tier == tier).map(|b| b.bytes).sum()
    }

    /// Bytes a second from the disk, over the whole load.
    #[must_use]
    pub fn rate(&self) -> BytesPerSec {
        BytesPerSec::of(self.bytes_from(Tier::Ssd), self.total)
    }
}

// === impl Evictions ===

impl Evictions {
    pub(crate) fn count(&mut self, reason: EvictReason, chunks: u64) {
        let counter = match reason {
            EvictReason::Room => &mut self.room,
            EvictReason::Budget => &mut self.budget,
            EvictReason::Pressure => &mut self.pressure,
            EvictReason::Asked => &mut self.asked,
            EvictReason::Replaced => &mut self.replaced,
            EvictReason::Failed => &mut self.failed,
        };
        *counter += chunks;
    }
}

impl EvictReason {
    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Budget => "budget",
            Self::Pressure => "pressure",
            Self::Asked => "asked",
            Self::Replaced => "replaced",
            Self::Failed => "failed",
        }
    }
}
