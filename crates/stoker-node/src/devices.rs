//! Models in a device's memory.
//!
//! The memory is the node's: a model's slab stays when the worker that computed with it dies, and the next worker maps it
//! without a byte being copied. A model is on its way to the device, on it, or not: [`Landing`]. Its slab goes with the
//! last instance that was let go of in order; after a worker's death it stays as cache until its room is needed, or for
//! [`KEPT_FOR`].
//!
//! What is there whole is with the keeper, too, with a record of what it is: the node that comes after a killed one takes it
//! over as it is. What was on its way then is nobody's: its worker has dropped the model, and nothing of it was handed over.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use stoker_device::{Device, DeviceError, Slab, memory_holders};
use stoker_proto::{DESCRIPTORS_MAX, control::DeviceSlab};
use stoker_store::{
    CheckpointFiles, Delivered, DeviceTarget, Keep, Layout, LoadError, LoadReport, ModelKey, Priority, Store,
};
use stoker_types::{
    ByteSize, ChunkSum, DeviceMemoryState, MemoryBudget, MemoryHolder, ModelName, Period, Phase,
    StartFailure, Timeline, clock,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    Catalog, Keeper,
    fleet::Fleet,
    keeper::{KeptSlab, SlabFiles},
    node::Prepared,
};

/// How long weights stay on a device after the worker that computed with them has died, if nobody needs their room.
pub(crate) const KEPT_FOR: Duration = Duration::from_mins(10);

/// Least bytes of a granule: few descriptors, and none of them small.
const GRANULE_MIN: u64 = 1 << 30;

/// Bytes of a slab for each sum.
const SUMMED: u64 = 16 << 20;

/// Longest record of a slab that is read, bytes.
const RECORD_BYTES_MAX: usize = 4096;

/// What is left to others: 512 MiB or 3 % of a device, whichever is more; a quarter of a small one.
const RESERVE_MIN: ByteSize = ByteSize::mib(512);

/// A device's memory and the models in it. A cheap handle.
#[derive(Clone)]
pub(crate) struct Slabs {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    device: Arc<dyn Device>,
    /// Most that instances may take, if somebody said so.
    cap: Option<ByteSize>,
    /// What an instance takes beside weights and KV cache.
    work: ByteSize,
    store: Store,
    fleet: Fleet,
    keeper: Option<Keeper>,
    /// The last number that a slab of this node or an earlier one has.
    last: Arc<AtomicU64>,
    state: Mutex<State>,
    /// One at a time looks for room and takes it.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    models: HashMap<ModelKey, Held>,
    /// As of the last look.
    budget: MemoryBudget,
    total: ByteSize,
    free: ByteSize,
    holders: Vec<MemoryHolder>,
}

/// A model that is on the device or on its way.
struct Held {
    /// Distinguishes it from every other one, of nodes before and behind this one, too.
    number: u64,
    /// A hash of its manifest.
    index: Bytes,
    /// With the keeper. Before the slab: what the keeper has is not free.
    kept: Option<KeptSlab>,
    slab: Slab,
    layout: Arc<Layout>,
    gate: u64,
    landing: watch::Receiver<Landing>,
    /// Ends the delivery.
    cancel: CancellationToken,
    tenants: u32,
    /// Since when it has been there for nobody.
    cached: Option<Instant>,
    /// Programs have it, or have had it since it was checked.
    lent: Option<Lent>,
}

/// What is known of a copy that programs have, or have had.
#[derive(Clone)]
struct Lent {
    /// Of each [`SUMMED`] bytes of the slab, before the first of them got it.
    sums: Arc<[ChunkSum]>,
    /// Programs that can't write to it.
    readers: u32,
    /// Programs that can.
    writers: u32,
}

/// A program's hold on a model's slab. Dropped, the slab stays as cache, and is checked before anybody computes from it.
pub(crate) struct Loan {
    /// `None` once it is dropped.
    lease: Option<Lease>,
    may_write: bool,
    /// Counts as taken, also when another slab has taken this one's place.
    _slab: Slab,
}

/// Why a program can't have a copy.
#[derive(Debug)]
pub(crate) enum NotLent {
    /// It can't be brought there.
    Start(StartFailure),
    /// The program could write to what others compute from.
    InUse,
}

/// How far a model's way to the device is.
#[derive(Debug, Clone)]
pub(crate) enum Landing {
    /// On its way.
    Coming,
    /// There, and checked.
    Landed(Arc<Arrival>),
    /// It will not be there.
    Failed(StartFailure),
}

/// What a delivery did.
#[derive(Debug, Default)]
pub(crate) struct Arrival {
    pub(crate) load: LoadReport,
    /// From the order to the last byte.
    pub(crate) took: Duration,
    /// When that was: wall-clock time since the Unix epoch.
    pub(crate) ended: Duration,
}

/// What a slab holds, for the node that comes next.
#[derive(Debug, Serialize, Deserialize)]
struct SlabRecord {
    /// Of this layout.
    version: u32,
    /// The device's identity.
    device: String,
    bytes: u64,
    granule: u64,
    gate: u64,
    model: ModelName,
    /// A hash of the manifest by which it was laid out.
    index: Vec<u8>,
}

/// Weights on a device that the node before left, and that are what the catalog says.
#[derive(Debug)]
pub(crate) struct LeftSlab {
    number: u64,
    record: SlabRecord,
    key: ModelKey,
    layout: Layout,
    granules: Vec<OwnedFd>,
}

/// An instance's hold on a model's slab. Dropped, the slab goes with the last one; see [`Lease::keep`].
pub(crate) struct Lease {
    slabs: Slabs,
    key: ModelKey,
    number: u64,
    kept: bool,
    /// The model was there or on its way already.
    pub(crate) joined: bool,
    pub(crate) landing: watch::Receiver<Landing>,
}

/// What one more instance takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// KV cache and work memory of all instances of the device, the new one's included.
    pub(crate) beside: ByteSize,
    /// KV cache of the new one.
    pub(crate) kv: ByteSize,
    /// Its context, tokens.
    pub(crate) context: u32,
}

/// A look at the device.
struct Reading {
    effective: ByteSize,
    /// In slabs.
    weights: ByteSize,
    free: ByteSize,
}

/// Bytes of a device's memory that a model takes at most, of so many tensors in files of `weights` bytes.
#[must_use]
pub fn device_bytes_at_most(weights: ByteSize, tensors: u64) -> ByteSize {
    Layout::at_most(weights, tensors)
}

// === impl LeftSlab ===

impl LeftSlab {
    /// What the keeper has of a node before this one. What can't be used goes. Blocks.
    pub(crate) fn all(keeper: &Keeper, catalog: &dyn Catalog) -> Vec<Self> {
        let left = keeper.left_slabs().unwrap_or_else(|error| {
            tracing::warn!(%error, "weights that the node before left on devices can't be had");
            BTreeMap::new()
        });
        let use_one = |(number, files)| match Self::of(number, files, catalog) {
            Ok(slab) => Some(slab),
            Err(why) => {
                tracing::info!(number, why, "weights that the node before left on a device are of no use");
                keeper.forget_slab(number);
                None
            }
        };
        left.into_iter().filter_map(use_one).collect()
    }

    fn of(number: u64, files: SlabFiles, catalog: &dyn Catalog) -> Result<Self, String> {
        let SlabFiles { record, granules } = files;
        let mut bytes = vec![0; RECORD_BYTES_MAX];
        let len = rustix::io::pread(&record, &mut bytes, 0).map_err(|error| error.to_string())?;
        let record: SlabRecord =
            serde_json::from_slice(&bytes[..len]).map_err(|error| format!("its record: {error}"))?;
        if record.version != SlabRecord::VERSION {
            return Err(format!("its record is of version {}", record.version));
        }
        let prepared = Prepared::new(catalog, &record.model).map_err(|error| error.to_string())?;
        let layout = Layout::of_manifest(&prepared.manifest).announcing(&prepared.files);
        let fits =
            (layout.arrivals().unwrap_or(0), prepared.index.as_ref()) == (record.gate, &record.index[..]);
        if !fits || layout.bytes() > ByteSize(record.bytes) {
            return Err(format!("{} is not what it was", record.model));
        }
        Ok(Self { number, key: prepared.files.key().clone(), record, layout, granules })
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

// === impl SlabRecord ===

impl SlabRecord {
    const VERSION: u32 = 1;

    fn write(&self) -> io::Result<OwnedFd> {
        let text = serde_json::to_vec(self)?;
        let file = rustix::fs::memfd_create("stoker-slab", MemfdFlags::CLOEXEC)?;
        let written = rustix::io::pwrite(&file, &text, 0)?;
        if written == text.len() && written <= RECORD_BYTES_MAX {
            Ok(file)
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }
}

// === impl Slabs ===

impl Slabs {
    #[expect(clippy::too_many_arguments, reason = "one call, in which each has its name")]
    pub(crate) fn new(
        name: String,
        device: Arc<dyn Device>,
        cap: Option<ByteSize>,
        work: ByteSize,
        store: Store,
        fleet: Fleet,
        keeper: Option<Keeper>,
        last: Arc<AtomicU64>,
    ) -> Self {
        let total = device.info().memory;
        let configured = configured(total, cap);
        let state = State { budget: MemoryBudget::whole(configured), total, free: total, ..State::default() };
        let (state, turn) = (Mutex::new(state), tokio::sync::Mutex::default());
        Self { inner: Arc::new(Inner { name, device, cap, work, store, fleet, keeper, last, state, turn }) }
    }

    /// Takes over what a node before this one left on this device; gives back what is on others.
    pub(crate) fn adopt(&self, left: Vec<LeftSlab>) -> Vec<LeftSlab> {
        let Inner { name, device, keeper, .. } = &*self.inner;
        let info = device.info();
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|slab| slab.record.device == info.uuid);
        for LeftSlab { number, record, key, layout, granules } in here {
            let kept = keeper.as_ref().map(|keeper| keeper.keeps(number));
            let SlabRecord { bytes, granule, gate, index, .. } = record;
            let slab = match device.adopt(granules, ByteSize(bytes), ByteSize(granule)) {
                Ok(slab) => slab,
                Err(error) => {
                    // Its memory goes with what the keeper has.
                    tracing::warn!(device = name, model = %key.name, %error, "weights on a device can't be taken over");
                    continue;
                }
            };
            tracing::info!(device = name, model = %key.name, bytes = %slab.bytes(), "took weights over");
            let (landed, landing) = watch::channel(Landing::Landed(Arc::default()));
            drop(landed);
            let held = Held {
                number,
                index: index.into(),
                kept,
                slab,
                layout: Arc::new(layout),
                gate,
                landing,
                cancel: CancellationToken::new(),
                tenants: 0,
                cached: None,
                lent: None,
            };
            let mut state = self.inner.state.lock();
            state.models.insert(key.clone(), held);
            drop(state);
            // As if somebody had just let go of it.
            if let Some(lease) = self.join(&key) {
                lease.keep();
            }
        }
        elsewhere
    }

    /// Holds a slab that was taken over, for an instance that computes with it.
    pub(crate) fn hold_left(&self, number: u64, index: &[u8]) -> Option<Lease> {
        let key = {
            let state = self.inner.state.lock();
            let is_it = |held: &Held| held.number == number && held.index == index;
            state.models.iter().find(|(_, held)| is_it(held))?.0.clone()
        };
        self.join(&key)
    }

    /// What an instance takes beside weights and KV cache.
    pub(crate) fn work(&self) -> ByteSize {
        self.inner.work
    }

    /// Holds a model on the device: the one that is there or on its way, or a new delivery, which has begun when this
    /// returns. `then` gets to see how a new one ended. Cancel-safe.
    ///
    /// # Errors
    /// [`StartFailure::OutOfMemory`] with who has the rest; `Worker` when the device itself fails.
    pub(crate) async fn hold(
        &self,
        files: &CheckpointFiles,
        (layout, index): (Layout, Bytes),
        wanted: Wanted,
        ours: Vec<u32>,
        then: impl FnOnce(Result<&Delivered, &LoadError>) + Send + 'static,
    ) -> Result<Lease, StartFailure> {
        let model = &files.key().name;
        let _turn = self.inner.turn.lock().await;
        let layout = layout.announcing(files);
        let (gate, bytes) = (layout.arrivals().unwrap_or(0), layout.slab_bytes());
        let words = layout.bytes().saturating_sub(ByteSize(gate)).bytes();
        let there = self.join_checked(files.key()).await;
        let needed = if there.is_some() { ByteSize::ZERO } else { bytes };
        let room = self.make_room(model, needed, bytes, wanted, ours).await;
        match (there, room) {
            (Some(lease), Ok(())) => return Ok(lease),
            (Some(lease), Err(failure)) => {
                // They were there before, for nobody or for others.
                lease.keep();
                return Err(failure);
            }
            (None, room) => room?,
        }
        let slab = {
            let device = Arc::clone(&self.inner.device);
            let granule = ByteSize(bytes.bytes().div_ceil(DESCRIPTORS_MAX as u64).max(GRANULE_MIN));
            let allocate = move || {
                let slab = device.allocate(bytes, granule)?;
                // Nothing has arrived.
                device.clear(&slab, gate, words)?;
                Ok(slab)
            };
            let allocated = tokio::task::spawn_blocking(allocate).await;
            match allocated {
                Ok(Ok(slab)) => slab,
                Ok(Err(error)) => return Err(self.failed(model, &error)),
                Err(_) => return Err(StartFailure::Cancelled { model: model.clone() }),
            }
        };
        self.deliver(files, slab, (Arc::new(layout), index), gate, then)
    }

    /// Whether it is this device.
    pub(crate) fn is(&self, uuid: &str) -> bool {
        self.inner.device.info().uuid == uuid
    }

    /// As [`Self::hold`], for a program that maps the copy beside the node. Waits until it is there.
    ///
    /// # Errors
    /// [`NotLent`].
    pub(crate) async fn lend(
        &self,
        files: &CheckpointFiles,
        laid_out: (Layout, Bytes),
        wanted: Wanted,
        ours: Vec<u32>,
        then: impl FnOnce(Result<&Delivered, &LoadError>) + Send + 'static,
        may_write: bool,
    ) -> Result<(Loan, DeviceSlab, Vec<OwnedFd>), NotLent> {
        let cancelled = || NotLent::Start(StartFailure::Cancelled { model: files.key().name.clone() });
        let lease = self.hold(files, laid_out, wanted, ours, then).await.map_err(NotLent::Start)?;
        let mut landing = lease.landing.clone();
        let landed =
            landing.wait_for(|landing| !landing.is_coming()).await.map_err(|_| cancelled())?.failure();
        if let Some(failure) = landed {
            return Err(NotLent::Start(failure));
        }
        let slab = lease.find(|held| held.slab.clone()).ok_or_else(cancelled)?;
        // One at a time, and no start meanwhile.
        let _turn = self.inner.turn.lock().await;
        let sums = match lease.find(|held| held.lent.clone()).ok_or_else(cancelled)? {
            Some(lent) => lent.sums,
            None => {
                let sums = self.sums(slab.clone()).await;
                sums.map_err(|error| NotLent::Start(self.failed(&files.key().name, &error)))?
            }
        };
        let mut withdrawn = None;
        let counted = lease.find(|held| {
            // This one is a tenant, too.
            if may_write && held.tenants > 1 {
                return false;
            }
            if may_write {
                // A node that comes later could not tell whether the program has.
                withdrawn = held.kept.take();
            }
            let lent = held.lent.get_or_insert(Lent { sums, readers: 0, writers: 0 });
            let count = if may_write { &mut lent.writers } else { &mut lent.readers };
            *count += 1;
            true
        });
        drop(withdrawn);
        if !counted.ok_or_else(cancelled)? {
            lease.keep();
            return Err(NotLent::InUse);
        }
        let exported = lease.export();
        let loan = Loan { lease: Some(lease), may_write, _slab: slab };
        let (slab, granules) = exported.map_err(NotLent::Start)?;
        Ok((loan, slab, granules))
    }

    /// As [`Self::join`]. A copy that programs have had is only joined when it is what it was before; one that a program may
    /// write to at this moment stays that program's.
    async fn join_checked(&self, key: &ModelKey) -> Option<Lease> {
        let lease = self.join(key)?;
        let found = lease.find(|held| Some((held.lent.clone()?, held.slab.clone())));
        let Some((Lent { sums, writers, .. }, slab)) = found.flatten() else { return Some(lease) };
        if writers == 0 {
            match self.sums(slab).await {
                Ok(now) if now == sums => {
                    lease.find(|held| held.lent.take_if(|lent| lent.readers + lent.writers == 0));
                    return Some(lease);
                }
                Ok(_) => {
                    let (model, device) = (&key.name, &self.inner.name);
                    tracing::error!(%model, device, "a copy that programs had is not what it was; it is loaded anew");
                }
                Err(error) => {
                    tracing::warn!(%error, "a copy that programs had can't be checked; it is loaded anew")
                }
            }
        }
        drop(self.forget(key, lease.number));
        None
    }

    async fn sums(&self, slab: Slab) -> Result<Arc<[ChunkSum]>, DeviceError> {
        let device = Arc::clone(&self.inner.device);
        let sums = move || {
            let bytes = slab.bytes().bytes();
            let begins = (0..bytes.div_ceil(SUMMED)).map(|i| i * SUMMED);
            let ranges: Vec<_> = begins.map(|at| (at, SUMMED.min(bytes - at))).collect();
            device.sums(&slab, &ranges).map(Into::into)
        };
        tokio::task::spawn_blocking(sums).await.unwrap_or(Err(DeviceError::Closed))
    }

    /// Takes note of what there is, and of who has the rest when it is less than it should be.
    pub(crate) async fn look(&self, ours: Vec<u32>) {
        if let Err(error) = self.read(Some(ours)).await {
            tracing::warn!(device = self.inner.name, %error, "the device's memory can't be read; its budget stays");
        }
    }

    /// The state, as of the last look.
    pub(crate) fn now(&self) -> DeviceMemoryState {
        let Inner { name, device, work, store, .. } = &*self.inner;
        let state = self.inner.state.lock();
        let State { models, budget, total, free, holders, .. } = &*state;
        let whole = models.iter().filter(|(_, held)| matches!(&*held.landing.borrow(), Landing::Landed(_)));
        let mut resident: Vec<ModelName> = whole.map(|(key, _)| key.name.clone()).collect();
        resident.sort();
        let idle = models.values().filter(|held| held.tenants == 0);
        let now = DeviceMemoryState {
            name: name.clone(),
            budget: *budget,
            work: *work,
            total: *total,
            free: *free,
            weights: models.values().map(|held| held.slab.bytes()).sum(),
            cached: idle.map(|held| held.slab.bytes()).sum(),
            resident,
            rate: store.device_rate(device.info().ordinal),
            holders: holders.clone(),
        };
        drop(state);
        publish(&now);
        now
    }

    /// Drops what of a model is on the device for nobody. Returns how much that was.
    pub(crate) fn evict(&self, model: &ModelName) -> ByteSize {
        let gone: Vec<Held> = {
            let mut state = self.inner.state.lock();
            state
                .models
                .extract_if(|key, held| key.name == *model && held.tenants == 0)
                .map(|(_, h)| h)
                .collect()
        };
        gone.iter().map(|held| held.slab.bytes()).sum()
    }

    /// The model that is there or on its way, if there is one.
    fn join(&self, key: &ModelKey) -> Option<Lease> {
        let mut state = self.inner.state.lock();
        // One that has been given up comes to an end, and another takes its place.
        let held = state.models.get_mut(key).filter(|held| !held.cancel.is_cancelled())?;
        held.tenants += 1;
        held.cached = None;
        let (number, landing) = (held.number, held.landing.clone());
        Some(Lease { slabs: self.clone(), key: key.clone(), number, kept: false, joined: true, landing })
    }

    /// Has cached weights go until there is room for `needed` bytes of weights (`bytes`, if they aren't there yet) and
    /// what instances take beside.
    async fn make_room(
        &self,
        model: &ModelName,
        needed: ByteSize,
        bytes: ByteSize,
        wanted: Wanted,
        ours: Vec<u32>,
    ) -> Result<(), StartFailure> {
        loop {
            let reading = self.read(None).await.map_err(|error| self.failed(model, &error))?;
            let Reading { effective, weights, free } = reading;
            let taken = weights + wanted.beside;
            if taken + needed <= effective {
                return Ok(());
            }
            if let Some(cached) = self.take_oldest_cached() {
                let mut landing = cached.landing.clone();
                // Giving memory back waits for the device.
                let dropped = tokio::task::spawn_blocking(move || drop(cached)).await;
                dropped.map_err(|_| StartFailure::Cancelled { model: model.clone() })?;
                // One that was still on its way is written to until its copies have ended. Its sender sends before it goes.
                let _ = landing.wait_for(|landing| !landing.is_coming()).await;
                continue;
            }
            self.look(ours).await;
            let work = self.inner.work;
            let Wanted { kv, context, beside: _ } = wanted;
            let own = needed + kv + work;
            let had = effective.saturating_sub(taken.saturating_sub(kv + work));
            let name = &self.inner.name;
            let mut detail = format!(
                "on {name}: weights {bytes} + KV {kv} for a context of {context} + work {work}; {free} are free, {weights} \
                 hold weights of other models"
            );
            if let Some(shortage) = self.now().shortage() {
                detail = format!("{detail}; {shortage}");
            }
            return Err(StartFailure::OutOfMemory { model: model.clone(), needed: own, free: had, detail });
        }
    }

    fn take_oldest_cached(&self) -> Option<Held> {
        let mut state = self.inner.state.lock();
        let cached = state.models.iter().filter_map(|(key, held)| Some((held.cached?, key)));
        let oldest = cached.min_by_key(|(since, _)| *since)?.1.clone();
        state.models.remove(&oldest)
    }

    /// Begins to bring a model into a slab.
    fn deliver(
        &self,
        files: &CheckpointFiles,
        slab: Slab,
        (layout, index): (Arc<Layout>, Bytes),
        gate: u64,
        then: impl FnOnce(Result<&Delivered, &LoadError>) + Send + 'static,
    ) -> Result<Lease, StartFailure> {
        let (key, device) = (files.key().clone(), Arc::clone(&self.inner.device));
        let target = DeviceTarget { device, slab: slab.clone(), layout: Arc::clone(&layout) };
        let delivering = self
            .inner
            .store
            .deliver(files, target, Keep::All, Priority::Demand)
            .map_err(|error| crate::node::start_failure(&key.name, error))?;
        let (sender, landing) = watch::channel(Landing::Coming);
        let cancel = CancellationToken::new();
        let number = {
            let number = self.inner.last.fetch_add(1, Ordering::Relaxed) + 1;
            let held = Held {
                number,
                index,
                kept: None,
                slab,
                layout,
                gate,
                landing: landing.clone(),
                cancel: cancel.clone(),
                tenants: 1,
                cached: None,
                lent: None,
            };
            // One of the same key that has been given up goes, not under the lock: the keeper is told.
            let replaced = self.inner.state.lock().models.insert(key.clone(), held);
            drop(replaced);
            number
        };
        let (slabs, model) = (self.clone(), key.clone());
        tokio::spawn(async move {
            let delivered = delivering.wait(&cancel).await;
            then(delivered.as_ref());
            let landing = match delivered {
                Ok(delivered) => {
                    let Delivered { load, copied, total, first: _, resident: _ } = delivered;
                    let device = slabs.inner.name.clone();
                    metrics::counter!("stoker_node_device_copied_bytes_total", "device" => device)
                        .increment(copied.bytes());
                    Landing::Landed(Arc::new(Arrival { load, took: total, ended: clock::wall() }))
                }
                Err(error) => {
                    // Whoever comes next tries anew.
                    slabs.forget(&model, number);
                    Landing::Failed(crate::node::start_failure(&model.name, error))
                }
            };
            let landed = matches!(landing, Landing::Landed(_));
            sender.send_replace(landing);
            // Nobody waits for this.
            if landed {
                drop(tokio::task::spawn_blocking(move || slabs.keep(&model, number)));
            }
        });
        Ok(Lease { slabs: self.clone(), key, number, kept: false, joined: false, landing })
    }

    /// Has the keeper keep what is there whole. Blocks.
    fn keep(&self, key: &ModelKey, number: u64) {
        let Inner { name, device, keeper, state, .. } = &*self.inner;
        let Some(keeper) = keeper else { return };
        let (slab, record) = {
            let state = state.lock();
            let Some(held) = state.models.get(key).filter(|held| held.number == number) else { return };
            let record = SlabRecord {
                version: SlabRecord::VERSION,
                device: device.info().uuid.clone(),
                bytes: held.slab.bytes().bytes(),
                granule: held.slab.granule().bytes(),
                gate: held.gate,
                model: key.name.clone(),
                index: held.index.to_vec(),
            };
            (held.slab.clone(), record)
        };
        let exported = slab.export().map_err(|error| error.to_string());
        let files = exported.and_then(|granules| {
            let record = record.write().map_err(|error| error.to_string())?;
            Ok(SlabFiles { record, granules })
        });
        drop(slab);
        let kept = match files {
            Ok(files) => keeper.keep_slab(number, files),
            Err(error) => {
                tracing::warn!(device = name, model = %key.name, error, "weights would be lost with this process");
                return;
            }
        };
        let mut state = state.lock();
        // Meanwhile it may have gone: then so does what the keeper has, outside the lock.
        let mut kept = Some(kept);
        // Nor is it kept if a program may have written to it since.
        let is_it = |held: &&mut Held| held.number == number && held.lent.is_none();
        if let Some(held) = state.models.get_mut(key).filter(is_it) {
            held.kept = kept.take();
        }
        drop(state);
    }

    /// Takes a model off the list. Its slab goes with whoever still has it.
    fn forget(&self, key: &ModelKey, number: u64) -> Option<Held> {
        let mut state = self.inner.state.lock();
        if state.models.get(key).is_some_and(|held| held.number == number) {
            return state.models.remove(key);
        }
        None
    }

    /// Looks at the device; with the node's processes, also for others, if they leave less than there could be.
    async fn read(&self, ours: Option<Vec<u32>>) -> Result<Reading, DeviceError> {
        let inner = Arc::clone(&self.inner);
        let read = move || {
            let memory = inner.device.memory()?;
            let configured = configured(memory.total, inner.cap);
            let by_workers = ByteSize(inner.fleet.device_bytes());
            let room = (memory.free + memory.slabs + by_workers).saturating_sub(reserve(memory.total));
            let budget = MemoryBudget { configured, effective: configured.min(room) };
            let holders = match ours {
                Some(ours) if budget.is_short() => others(memory_holders(inner.device.info()), &ours),
                _ => Vec::new(),
            };
            let mut state = inner.state.lock();
            (state.budget, state.total, state.free) = (budget, memory.total, memory.free);
            state.holders = holders;
            Ok(Reading { effective: budget.effective, weights: memory.slabs, free: memory.free })
        };
        tokio::task::spawn_blocking(read).await.unwrap_or(Err(DeviceError::Closed))
    }

    fn failed(&self, model: &ModelName, error: &DeviceError) -> StartFailure {
        let model = model.clone();
        match error {
            DeviceError::OutOfMemory { needed, free, .. } => {
                let (needed, free) = (*needed, *free);
                StartFailure::OutOfMemory { model, needed, free, detail: error.to_string() }
            }
            error => StartFailure::Worker { model, detail: format!("{}: {error}", self.inner.name) },
        }
    }
}

/// What is left to others.
fn reserve(total: ByteSize) -> ByteSize {
    RESERVE_MIN.max(ByteSize(total.bytes() / 100 * 3)).min(ByteSize(total.bytes() / 4))
}

/// Most that instances may ever take.
fn configured(total: ByteSize, cap: Option<ByteSize>) -> ByteSize {
    let all = total.saturating_sub(reserve(total));
    cap.map_or(all, |cap| cap.min(all))
}

fn others(holders: Vec<MemoryHolder>, ours: &[u32]) -> Vec<MemoryHolder> {
    holders.into_iter().filter(|holder| !ours.contains(&holder.pid)).collect()
}

fn publish(now: &DeviceMemoryState) {
    let DeviceMemoryState { name, budget, free, weights, cached, .. } = now;
    let kinds = [
        ("budget_configured", budget.configured),
        ("budget_effective", budget.effective),
        ("free", *free),
        ("weights", *weights),
        ("cached", *cached),
    ];
    for (kind, bytes) in kinds {
        #[expect(clippy::cast_precision_loss, reason = "a metric")]
        metrics::gauge!("stoker_node_device_bytes", "device" => name.clone(), "kind" => kind)
            .set(bytes.bytes() as f64);
    }
}

// === impl Held ===

impl Drop for Held {
    fn drop(&mut self) {
        // Whatever is still on its way is for nobody.
        self.cancel.cancel();
    }
}

// === impl Loan ===

impl Drop for Loan {
    fn drop(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        lease.find(|held| {
            if let Some(lent) = &mut held.lent {
                let count = if self.may_write { &mut lent.writers } else { &mut lent.readers };
                *count = count.saturating_sub(1);
            }
        });
        lease.keep();
    }
}

// === impl Lease ===

impl Lease {
    /// Looks at what it holds; `None` when that isn't on the list any more.
    fn find<T>(&self, look: impl FnOnce(&mut Held) -> T) -> Option<T> {
        let mut state = self.slabs.inner.state.lock();
        state.models.get_mut(&self.key).filter(|held| held.number == self.number).map(look)
    }

    /// What a worker has to know to map it, and the descriptors.
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn export(&self) -> Result<(DeviceSlab, Vec<OwnedFd>), StartFailure> {
        let model = || self.key.name.clone();
        let (slab, layout, gate, number) = {
            let state = self.slabs.inner.state.lock();
            let held = state.models.get(&self.key).filter(|held| held.number == self.number);
            match held {
                Some(held) => (held.slab.clone(), Arc::clone(&held.layout), held.gate, held.number),
                // Its delivery has failed already.
                None => {
                    return Err(match &*self.landing.borrow() {
                        Landing::Failed(failure) => failure.clone(),
                        Landing::Coming | Landing::Landed(_) => StartFailure::Cancelled { model: model() },
                    });
                }
            }
        };
        let granules = slab.export().map_err(|error| self.slabs.failed(&model(), &error))?;
        let order = DeviceSlab {
            bytes: slab.bytes().bytes(),
            granule: slab.granule().bytes(),
            granules: u32::try_from(granules.len()).unwrap_or(u32::MAX),
            tensors: layout.tensors().to_vec(),
            gate,
            number,
        };
        Ok((order, granules))
    }

    /// The instance's worker died: the weights stay for the next one.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }

    /// Nobody waits for this instance any more: the delivery ends if nobody else does.
    pub(crate) fn give_up(&self) {
        let state = self.slabs.inner.state.lock();
        if let Some(held) = state.models.get(&self.key)
            && (held.number, held.tenants) == (self.number, 1)
        {
            held.cancel.cancel();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.slabs.inner.state.lock();
        let Some(held) = state.models.get_mut(&self.key).filter(|held| held.number == self.number) else {
            return;
        };
        held.tenants -= 1;
        if held.tenants > 0 {
            return;
        }
        if !self.kept {
            let gone = state.models.remove(&self.key);
            drop(state);
            drop(gone);
            return;
        }
        let since = Instant::now();
        held.cached = Some(since);
        drop(state);
        // Without a runtime the node is ending, and its slabs with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (slabs, key, number) = (Arc::downgrade(&self.slabs.inner), self.key.clone(), self.number);
            runtime.spawn(async move {
                tokio::time::sleep(KEPT_FOR).await;
                let Some(inner) = slabs.upgrade() else { return };
                let mut state = inner.state.lock();
                let expired =
                    state.models.get(&key).is_some_and(|h| h.number == number && h.cached == Some(since));
                let gone = if expired { state.models.remove(&key) } else { None };
                drop(state);
                drop(gone);
            });
        }
    }
}

// === impl Arrival ===

impl Arrival {
    /// Where its time went.
    pub(crate) fn timeline(&self) -> Timeline {
        let mut timeline = Timeline { phases: Vec::new(), bytes: self.load.bytes.clone() };
        crate::node::record_reads(&mut timeline, &self.load);
        timeline.record(Phase::DeviceCopy, None, self.took);
        timeline.place(Phase::DeviceCopy, Period::until(self.ended, self.took));
        timeline
    }
}

// === impl Landing ===

impl Landing {
    pub(crate) fn is_coming(&self) -> bool {
        matches!(self, Self::Coming)
    }

    /// Why it will never be there.
    pub(crate) fn failure(&self) -> Option<StartFailure> {
        match self {
            Self::Failed(failure) => Some(failure.clone()),
            Self::Coming | Self::Landed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_left_their_part() {
        assert_eq!(reserve(ByteSize::gib(80)), ByteSize(ByteSize::gib(80).bytes() / 100 * 3));
        assert_eq!(reserve(ByteSize::gib(8)), ByteSize::mib(512));
        assert_eq!(reserve(ByteSize::mib(64)), ByteSize::mib(16));
        assert_eq!(configured(ByteSize::gib(8), None), ByteSize::gib(8).saturating_sub(ByteSize::mib(512)));
        assert_eq!(configured(ByteSize::gib(8), Some(ByteSize::gib(4))), ByteSize::gib(4));
        assert_eq!(configured(ByteSize::mib(64), Some(ByteSize::gib(4))), ByteSize::mib(48));
    }

    #[test]
    fn a_holder_of_our_own_is_nobody_else() {
        let holder = |pid| MemoryHolder { pid, name: String::new(), bytes: ByteSize(1) };
        assert_eq!(others(vec![holder(1), holder(2), holder(3)], &[2, 9]), [holder(1), holder(3)]);
    }
}
