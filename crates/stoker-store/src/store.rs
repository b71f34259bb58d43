//! The store's handle.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use stoker_checkpoint::manifest::CHUNK_BYTES;
use stoker_device::Device;
use stoker_io::{
    ChunkPool, LentPool, LocalFiles, Open, OpenRemote, Placement, PoolMemory, ReadMode, ReadThreads, Work,
    numa_nodes,
};
use stoker_types::{ByteSize, BytesPerSec, ModelName, TierRate, clock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    borrowed::{Borrowed, Watch},
    check::Checked,
    deliver::{Delivering, DeviceTarget, Keep},
    error::{LoadError, OpenError},
    files::CheckpointFiles,
    job::Priority,
    load::{Loading, Resident},
    report::{EvictReason, StoreStats},
    shared::{Shared, Tiers},
    ssd::{CopyProgress, SsdTier, Tee, TeeThread, Wanted},
    stream::{ChunkStream, LentSlots, StreamOptions},
    transfer::Puller,
};

/// Time since any fixed moment.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What a store is made with.
#[derive(Clone)]
pub struct StoreConfig {
    /// Bytes of address space for chunks: the budget never exceeds it.
    pub capacity: ByteSize,
    /// Bytes that may be in use, at first.
    pub budget: ByteSize,
    /// Whether other processes map the memory ([`Store::pool_fd`]); if not, it gets huge pages on more machines.
    pub shared: bool,
    /// Bytes of a chunk: [`CHUNK_BYTES`], other values for tests.
    pub chunk: ByteSize,
    /// Threads that read and check.
    pub read_threads: usize,
    /// How files are read, unless a stream says otherwise.
    pub read_mode: ReadMode,
    /// What opens files.
    pub opener: Arc<dyn Open>,
    /// What says how long ago something was used, and how long it took: the machine's monotonic clock.
    pub clock: Clock,
    /// What opens objects of remote stores; without it, what is only remote can't be loaded.
    pub remote: Option<Arc<dyn OpenRemote>>,
    /// Where copies of remote models are kept; without it, they are fetched again for each load.
    pub ssd: Option<SsdTier>,
}

/// The checkpoint store of one server: disk and memory tiers. A cheap handle; when the last one is dropped, loads end
/// with [`LoadError::Closed`] and the reading threads end, which that drop waits for: at most a chunk's time. Guards keep
/// their chunks beyond that.
///
/// Its functions don't wait for the disk unless they are async.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    _owner: Arc<Owner>,
    /// Of what programs of the store before have mapped.
    _lent: Option<Arc<Watch>>,
}

struct Owner {
    shared: Arc<Shared>,
    threads: Option<ReadThreads>,
    tee: Option<TeeThread>,
}

/// What an eviction that was asked for did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes of chunks that went.
    pub freed: ByteSize,
    /// Bytes of chunks that stayed because somebody holds them.
    pub held: ByteSize,
}

// === impl StoreConfig ===

impl StoreConfig {
    /// A store of `budget` bytes with the defaults.
    #[must_use]
    pub fn new(budget: ByteSize) -> Self {
        let origin = clock::now();
        Self {
            capacity: budget,
            budget,
            shared: true,
            chunk: ByteSize(CHUNK_BYTES),
            // Measured: one thread reaches a virtual disk's limit without checksums; with them eight lose nothing of it,
            // and four a twentieth. From memory a thread reads 4 GB/s.
            read_threads: 8,
            read_mode: ReadMode::Auto,
            opener: Arc::new(LocalFiles::default()),
            clock: Arc::new(move || origin.elapsed()),
            remote: None,
            ssd: None,
        }
    }
}

// === impl Store ===

impl Store {
    /// Opens a store: makes the pool and starts the reading threads.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(config: StoreConfig) -> Result<Self, OpenError> {
        let make = if config.shared { ChunkPool::new } else { ChunkPool::private };
        let pool = make(config.capacity.max(config.budget), config.chunk)?;
        pool.set_budget(config.budget);
        Self::over(config, pool)
    }

    /// A store over a pool, whose budget is as it is.
    pub(crate) fn over(config: StoreConfig, pool: ChunkPool) -> Result<Self, OpenError> {
        let StoreConfig {
            capacity: _,
            budget: _,
            shared: _,
            chunk: _,
            read_threads,
            read_mode,
            opener,
            clock,
            remote,
            ssd,
        } = config;
        let (tee, start_tee) = Tee::new();
        let tiers = Tiers { opener, remote, ssd: ssd.clone() };
        let shared = Arc::new(Shared::new(pool, tiers, read_mode, clock, tee));
        let tee = ssd.map(|ssd| start_tee(ssd, Arc::downgrade(&shared))).transpose();
        let tee = tee.map_err(OpenError::Threads)?;
        let work: Arc<dyn Work> = Arc::new(Puller(Arc::clone(&shared)));
        let threads =
            ReadThreads::start(read_threads, &work, shared.wake.clone()).map_err(OpenError::Threads)?;
        let owner = Arc::new(Owner { shared: Arc::clone(&shared), threads: Some(threads), tee });
        Ok(Self { shared, _owner: owner, _lent: None })
    }

    /// Begins to load a model, or joins the load that is under way. See [`Loading::wait`].
    ///
    /// # Errors
    /// [`LoadError::OutOfBudget`], at once, when what others hold leaves too little room; `ChunkSize`; `Closed`.
    pub fn begin(&self, files: &CheckpointFiles, priority: Priority) -> Result<Loading, LoadError> {
        Loading::begin(&self.shared, files, priority)
    }

    /// Makes a model resident: every chunk in memory and checked. Loads of one model at the same time are one load.
    /// Cancelled by `cancel` or by dropping the future; the load itself goes on while others want it.
    ///
    /// # Errors
    /// [`LoadError`]; nothing that the load brought is left in memory then.
    pub async fn load(
        &self,
        files: &CheckpointFiles,
        priority: Priority,
        cancel: &CancellationToken,
    ) -> Result<Resident, LoadError> {
        self.begin(files, priority)?.wait(cancel).await
    }

    /// Passes every chunk of a model through a bounded ring, keeping none.
    ///
    /// # Errors
    /// [`LoadError::OutOfBudget`] when there isn't room for one chunk; `ChunkSize`; `Closed`.
    pub fn stream(&self, files: &CheckpointFiles, options: StreamOptions) -> Result<ChunkStream, LoadError> {
        ChunkStream::begin(&self.shared, files, options)
    }

    /// Begins to copy a model that is only remote to SSD, or joins the copy that is under way; watch how far it is. `None`:
    /// there is no SSD tier, no room, or another process does it. Blocks for opening files.
    ///
    /// # Errors
    /// [`LoadError::ChunkSize`].
    pub fn copy(
        &self,
        files: &CheckpointFiles,
        priority: Priority,
    ) -> Result<Option<watch::Receiver<CopyProgress>>, LoadError> {
        self.shared.check_chunks(files)?;
        let Some(copy) = self.shared.ssd.as_ref().and_then(|ssd| ssd.copy(files)) else { return Ok(None) };
        let progress = copy.progress();
        self.shared.tee.complete(Wanted { copy, priority });
        Ok(Some(progress))
    }

    /// Begins to bring a model to a device: chunks are copied as they become ready. Must be called on a runtime.
    ///
    /// # Errors
    /// [`LoadError::SlabTooSmall`]; [`LoadError::OutOfBudget`] when there isn't room for one chunk; `ChunkSize`;
    /// `Closed`.
    pub fn deliver(
        &self,
        files: &CheckpointFiles,
        target: DeviceTarget,
        keep: Keep,
        priority: Priority,
    ) -> Result<Delivering, LoadError> {
        self.deliver_to_all(files, vec![target], keep, priority)
    }

    /// As [`Self::deliver`], to several devices: every byte is read once, and each device gets what its layout has of it
    /// ([`crate::Layout::of_shard`]), over its own link.
    ///
    /// # Errors
    /// As [`Self::deliver`].
    ///
    /// # Panics
    /// When there is no target.
    pub fn deliver_to_all(
        &self,
        files: &CheckpointFiles,
        targets: Vec<DeviceTarget>,
        keep: Keep,
        priority: Priority,
    ) -> Result<Delivering, LoadError> {
        Delivering::begin(&self.shared, files, targets, keep, priority)
    }

    /// Checks what a delivery brought to a device once more, end to end: the device computes the sums of what it has, which
    /// are compared with the chunks'. Nothing of it passes through memory again but what the layout leaves out.
    ///
    /// # Errors
    /// [`LoadError::CorruptOnDevice`]; [`LoadError::NoSums`]; [`LoadError::Sliced`]; `Device`; `Open` and `Read`.
    pub async fn check(&self, files: &CheckpointFiles, target: &DeviceTarget) -> Result<Checked, LoadError> {
        let (shared, files, target) = (Arc::clone(&self.shared), files.clone(), target.clone());
        let check = move || crate::check::check(&shared, &files, &target);
        tokio::task::spawn_blocking(check).await.unwrap_or(Err(LoadError::Closed))
    }

    /// Has memory come from the NUMA nodes of the devices that it feeds (`None`: a device doesn't say), as far as the machine has
    /// several and lets us. What is in memory already stays where it is. Before [`Self::attach`].
    pub fn place_near(&self, devices: impl IntoIterator<Item = Option<u32>>) {
        let placement = Placement::near(devices, &numa_nodes());
        if placement == Placement::Anywhere {
            return;
        }
        match self.shared.pool.place(&placement) {
            Ok(()) => tracing::info!(%placement, "memory for weights comes from the devices' NUMA nodes"),
            Err(error) => {
                tracing::info!(%placement, %error, "memory for weights can't be placed near the devices: it comes from any node");
            }
        }
    }

    /// Has memory pinned for a device from now on: what is read into, and what is copied from. `ahead` bytes of free
    /// memory are pinned in the background at once, so that the first loads don't wait for it.
    pub fn attach(&self, device: &dyn Device, ahead: ByteSize) {
        let Some(pinner) = device.pinner() else { return };
        self.shared.pool.set_pinner(pinner);
        let pool = self.shared.pool.clone();
        let chunks = ahead.bytes() / self.chunk_bytes();
        let pin = move || {
            for _ in 0..chunks {
                match pool.pin_free() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => return crate::transfer::not_pinned(&error),
                }
            }
            tracing::debug!(pinned = %pool.pinned(), "memory pinned ahead");
        };
        if let Err(error) = std::thread::Builder::new().name("stoker-pin".into()).spawn(pin) {
            tracing::warn!(%error, "no thread to pin memory ahead: the first loads will do it");
        }
    }

    /// The measured rate of copies to a device, by its number: bytes over time in which copies were under way.
    #[must_use]
    pub fn device_rate(&self, device: u32) -> Option<BytesPerSec> {
        self.shared.device_rate(device)
    }

    /// Pins a model: what is in memory of it, now or later, is not evicted to make room (except for a load that was
    /// accepted before the pin, if there is no other way).
    pub fn pin(&self, model: &ModelName) {
        let state = &mut *self.shared.lock();
        state.cache.pin(model, state.jobs.last());
    }

    /// Takes a pin away.
    pub fn unpin(&self, model: &ModelName) {
        self.shared.lock().cache.unpin(model);
        self.shared.wake.wake();
    }

    /// Evicts what is in memory of a model, pinned or not, apart from what is held, and gives all free memory back to
    /// the operating system.
    pub async fn evict(&self, model: &ModelName) -> Evicted {
        let model = model.clone();
        self.evict_where(move |name| *name == model).await
    }

    /// Evicts everything that isn't held, and gives all free memory back to the operating system.
    pub async fn drop_all(&self) -> Evicted {
        self.evict_where(|_| true).await
    }

    /// As [`Self::evict`], and forgets what was learned about the model: it is gone for good.
    pub async fn forget(&self, model: &ModelName) -> Evicted {
        let evicted = self.evict(model).await;
        self.shared.lock().cache.forget(model);
        evicted
    }

    /// Lends every slot that isn't held or promised to a load, with the memory behind it; cached chunks go. For
    /// measurements that mean something only in the memory that loads fill.
    #[must_use]
    pub fn lend(&self) -> LentSlots {
        LentSlots::take(&self.shared)
    }

    /// Sets the budget, at most the capacity. Evicts what exceeds it, fails loads that no longer fit, and gives free
    /// memory back. What is held stays; the excess goes as it is let go.
    pub async fn set_budget(&self, budget: ByteSize) {
        self.shared.set_budget(budget);
        self.release_memory().await;
    }

    /// Evicts chunks that nobody holds, those that are worth least first, up to `at_most` bytes of them, and gives all
    /// free memory back to the operating system. For when the machine is short of memory. Returns how much was evicted.
    pub async fn shed(&self, at_most: ByteSize) -> ByteSize {
        let chunks = usize::try_from(at_most.bytes() / self.chunk_bytes()).unwrap_or(usize::MAX);
        let evicted = self.shared.bytes_of(self.shared.shed(chunks));
        self.release_memory().await;
        evicted
    }

    /// The model is about to be loaded: what is in memory of it counts as just used, so that it goes last.
    pub fn expect(&self, model: &ModelName) {
        let now = self.shared.now();
        self.shared.lock().cache.touch(model, now);
    }

    /// Memory that the pool takes now, as the operating system counts it: chunks, and free slots that were not given
    /// back.
    ///
    /// # Errors
    /// The operating system's.
    pub fn resident(&self) -> io::Result<ByteSize> {
        self.shared.pool.resident()
    }

    /// The memory itself, which stays for as long as a handle of it does: for a store that is opened for one load, whose
    /// chunks outlive it.
    #[must_use]
    pub fn pool(&self) -> ChunkPool {
        self.shared.pool.clone()
    }

    /// A read-only descriptor of the pool, for a worker.
    ///
    /// # Errors
    /// The operating system's.
    pub fn pool_fd(&self) -> io::Result<OwnedFd> {
        self.shared.pool.read_only_fd()
    }

    /// The descriptors of the pool and its ledger, for somebody who keeps them for the next store ([`Self::adopt`]); `None`
    /// for a pool that is not shared.
    ///
    /// # Errors
    /// The operating system's.
    pub fn memory(&self) -> io::Result<Option<PoolMemory>> {
        self.shared.pool.memory()
    }

    /// A descriptor of the pool for a program that may outlive this process, with the slots that it has: a store that takes
    /// the memory over leaves those as they are.
    ///
    /// # Errors
    /// The operating system's.
    pub fn lend_pool(&self) -> io::Result<LentPool> {
        self.shared.pool.lend()
    }

    /// Keeps what programs of the store before have mapped. Once, before the store is used.
    pub(crate) fn keep_lent(&mut self, lent: Borrowed) -> Result<(), OpenError> {
        self._lent = lent.keep(&self.shared).map_err(OpenError::Threads)?.map(Arc::new);
        Ok(())
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.shared.pool.chunk_bytes() as u64
    }

    /// Its state now.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.shared.stats()
    }

    /// Measured rates: bytes from the medium over time in which reads were under way.
    #[must_use]
    pub fn rates(&self) -> Vec<TierRate> {
        self.shared.rates()
    }

    /// Changes whenever what is in memory does.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    async fn evict_where(&self, which: impl Fn(&ModelName) -> bool) -> Evicted {
        let evicted = {
            let state = &mut *self.shared.lock();
            let (freed, held) = state.cache.evict(which, EvictReason::Asked);
            self.shared.changed(state);
            Evicted { freed: self.shared.bytes_of(freed), held: self.shared.bytes_of(held) }
        };
        self.release_memory().await;
        evicted
    }

    async fn release_memory(&self) {
        self.shared.wake.wake();
        let pool = self.shared.pool.clone();
        // Punching holes takes about a millisecond a chunk.
        match tokio::task::spawn_blocking(move || pool.release_free()).await {
            Ok(Ok(released)) => tracing::debug!(%released, "memory given back"),
            Ok(Err(error)) => tracing::warn!(%error, "free chunks could not be given back to the system"),
            Err(error) => tracing::warn!(%error, "giving memory back was cut short"),
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("pool", &self.shared.pool).finish_non_exhaustive()
    }
}

// === impl Owner ===

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
        drop(self.tee.take());
        drop(self.threads.take());
    }
}
