//! Loads, and the guards that keep what they brought.

use std::{sync::Arc, time::Duration};

use stoker_io::Chunk;
use stoker_types::{ByteSize, Tier, TierBytes, clock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    error::LoadError,
    files::CheckpointFiles,
    job::{Priority, Progress},
    report::LoadReport,
    shared::{Begun, Shared},
};

/// A model on its way into memory. Dropped, it no longer wants the model; when nobody does, the load is cancelled
/// within one chunk.
#[derive(Debug)]
pub struct Loading {
    hold: Hold,
    progress: watch::Receiver<Progress>,
    joined: bool,
}

/// How much of a model is ready, counted in execution order from its beginning.
#[derive(Debug, Clone)]
pub struct Watermark {
    progress: watch::Receiver<Progress>,
    total: ByteSize,
}

/// A model in memory, whole and checked. While a guard lives, no chunk of it is evicted; whoever maps the slots keeps
/// one until the mapping is gone.
#[derive(Debug)]
pub struct Resident {
    hold: Hold,
    files: Vec<FileSlots>,
    report: Arc<LoadReport>,
    joined: bool,
}

/// Where a file's chunks are: chunk `i` lies in the pool at `slots[i]` times the chunk size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSlots {
    /// Length of the file, bytes.
    pub len: u64,
    /// Slot of each chunk.
    pub slots: Vec<u32>,
}

/// One wish to have a model in memory.
struct Hold {
    shared: Arc<Shared>,
    files: CheckpointFiles,
}

// === impl Loading ===

impl Loading {
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        priority: Priority,
    ) -> Result<Self, LoadError> {
        let started = shared.now();
        let begun = shared.begin(files, priority)?;
        // From here on the hold must be given back, so it becomes a value at once.
        let hold = Hold { shared: Arc::clone(shared), files: files.clone() };
        let (progress, joined) = match begun {
            Begun::Loading { progress, joined } => (progress, joined),
            Begun::Resident => {
                let report = resident_report(files, shared.now().saturating_sub(started));
                let progress = Progress { ready: files.bytes().bytes(), end: Some(Ok(Arc::new(report))) };
                (watch::Sender::new(progress).subscribe(), false)
            }
        };
        Ok(Self { hold, progress, joined })
    }

    /// How far it is. Goes on after the guard is there, and keeps nothing in memory.
    #[must_use]
    pub fn watermark(&self) -> Watermark {
        Watermark { progress: self.progress.clone(), total: self.hold.files.bytes() }
    }

    /// Where the chunk at a place of the order lies in the pool, if it is there. It stays while this or what comes of it
    /// lives, or the load fails.
    #[must_use]
    pub fn slot(&self, position: usize) -> Option<u32> {
        let state = self.hold.shared.lock();
        state.cache.model(self.hold.files.key())?.chunk(position).map(Chunk::slot)
    }

    /// Has what the load has brought by now stay in memory, however it ends: chunks whose sums were known beforehand.
    pub(crate) fn keep(&self) {
        self.hold.shared.keep_brought(self.hold.files.key());
    }

    /// Waits until everything is there, or `cancel` is. Dropping the future cancels too.
    ///
    /// # Errors
    /// [`LoadError`]. Nothing that the load brought is left in memory then.
    pub async fn wait(mut self, cancel: &CancellationToken) -> Result<Resident, LoadError> {
        let end = tokio::select! {
            biased;
            end = ended(&mut self.progress) => end,
            () = cancel.cancelled() => Err(LoadError::Cancelled),
        };
        let report = end?;
        let Self { hold, joined, .. } = self;
        let files = hold.file_slots();
        Ok(Resident { hold, files, report, joined })
    }
}

async fn ended(progress: &mut watch::Receiver<Progress>) -> Result<Arc<LoadReport>, LoadError> {
    match progress.wait_for(|progress| progress.end.is_some()).await {
        Ok(progress) => progress.end.clone().unwrap_or(Err(LoadError::Closed)),
        Err(_) => Err(LoadError::Closed),
    }
}

// === impl Watermark ===

impl Watermark {
    /// Bytes ready.
    #[must_use]
    pub fn ready(&self) -> ByteSize {
        ByteSize(self.progress.borrow().ready)
    }

    /// Bytes that the model has.
    #[must_use]
    pub fn total(&self) -> ByteSize {
        self.total
    }

    /// Waits until `bytes` are ready. Cancel-safe.
    ///
    /// # Errors
    /// The load's, if it fails before.
    pub async fn wait_for(&mut self, bytes: ByteSize) -> Result<(), LoadError> {
        let reached = |progress: &Progress| progress.ready >= bytes.bytes() || progress.end.is_some();
        let progress = self.progress.wait_for(reached).await.map_err(|_| LoadError::Closed)?;
        match &progress.end {
            Some(Err(error)) => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

// === impl Resident ===

impl Resident {
    /// Holds a model that is in memory already, if it is there whole and lies exactly where somebody has it mapped.
    pub(crate) fn mapped(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        where_mapped: &[FileSlots],
    ) -> Option<Self> {
        {
            let mut state = shared.lock();
            let model = state.cache.model_mut(files.key()).filter(|model| model.is_complete())?;
            model.hold();
        }
        // Given back by its drop.
        let hold = Hold { shared: Arc::clone(shared), files: files.clone() };
        let is_where = hold.file_slots();
        let report = Arc::new(resident_report(files, Duration::ZERO));
        (is_where == where_mapped).then_some(Self { hold, files: is_where, report, joined: false })
    }

    /// Where the files are, in the order in which they were given.
    #[must_use]
    pub fn files(&self) -> &[FileSlots] {
        &self.files
    }

    /// What is resident.
    #[must_use]
    pub fn checkpoint(&self) -> &CheckpointFiles {
        &self.hold.files
    }

    /// What the load did.
    #[must_use]
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    /// Whether the load was under way already.
    #[must_use]
    pub fn joined(&self) -> bool {
        self.joined
    }
}

// === impl Hold ===

impl Hold {
    fn file_slots(&self) -> Vec<FileSlots> {
        let state = self.shared.lock();
        // Every chunk is there: the load has ended well, and the hold keeps them.
        let slots: Vec<u32> =
            state.cache.model(self.files.key()).map(|model| model.slots().collect()).unwrap_or_default();
        let by_file = self.files.by_file(0, slots);
        let lens = self.files.files().iter().map(|file| file.identity.len);
        lens.zip(by_file).map(|(len, slots)| FileSlots { len, slots }).collect()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.release(self.files.key());
        self.shared.wake.wake();
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("key", self.files.key()).finish_non_exhaustive()
    }
}

/// The report of a load that found everything in memory.
fn resident_report(files: &CheckpointFiles, total: Duration) -> LoadReport {
    LoadReport {
        bytes: tier_bytes(files.bytes().bytes(), 0, 0),
        total,
        ended: clock::wall(),
        open: Duration::ZERO,
        transfer: Duration::ZERO,
        read_thread_time: Duration::ZERO,
        verify_thread_time: Duration::ZERO,
        readers: Vec::new(),
        learned: None,
        reread: 0,
        evicted: 0,
    }
}

pub(crate) fn tier_bytes(resident: u64, ssd: u64, remote: u64) -> Vec<TierBytes> {
    [(Tier::Remote, remote), (Tier::Ssd, ssd), (Tier::Dram, resident)]
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(tier, bytes)| TierBytes { tier, bytes: ByteSize(bytes) })
        .collect()
}
