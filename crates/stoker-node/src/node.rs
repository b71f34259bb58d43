//! The node: orders in, outcomes out.

use std::{
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use stoker_checkpoint::{Manifest, Trust};
use stoker_io::LentPool;
use stoker_proto::control::{FileSlots, Load};
use stoker_store::{
    CheckpointFiles, Delivered, Evicted, KeptModel, Layout, LoadError, LoadReport, Priority, Resident, Store,
    Watermark,
};
use stoker_types::{
    ByteSize, DeviceId, DeviceMemoryState, FileChange, Generation, InstanceId, ModelName, NodeEvent,
    NodeMemory, NodeSnapshot, Period, Phase, StartFailure, StartOrder, Started, StopFailure, StopMode, Tier,
    TierBytes, Timeline, WorkerState, WorkerStatus, clock,
};
use tokio::{
    sync::{broadcast, oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    Catalog, CatalogEntry, Keeper, NodeConfig, NodeDevice, NodeError, RuntimeDir, WorkerConfig,
    clients::{NotShared, Shared, SharedSlab},
    devices::{KEPT_FOR, Landing, LeftSlab, NotLent, Slabs, Wanted},
    fleet::{self, Fleet, Lease, NoWorker, WorkerView, Workshop},
    lodging::{Instance, Instances, LeftInstance, Tenancy},
    memory::{self, Memory, MemoryConfig, PressureTrigger},
    spawn,
    survivors::{Left, Serving, Survivor},
    worker::{Busy, LoadFailure, LoadTimes, Lodging, Order, Weights},
};

/// Events that a slow listener may be behind; it is told when it has missed some.
const EVENTS_MAX: usize = 256;

/// How long streams may go on of a worker of before this node's start that isn't gone on with.
const DRAIN_GRACE: Duration = Duration::from_mins(1);

/// What a worker may take beyond its streams' grace to end.
const KILL_AFTER: Duration = Duration::from_secs(7);

/// A server's agent. A cheap handle.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    catalog: Arc<dyn Catalog>,
    /// By [`DeviceId`]; one without devices.
    places: Vec<Place>,
    instances: Instances,
    memory: Memory,
    events: broadcast::Sender<NodeEvent>,
    /// Ends the task that tells of what changes in memory.
    _telling: DropGuard,
    /// Ends the watch for memory pressure.
    _watching: Option<DropGuard>,
    /// Keeps the memory when this process is killed.
    keeper: Option<Keeper>,
    /// Held for as long as the node lives: another one must not use the directory.
    _runtime: RuntimeDir,
}

/// Where instances compute.
struct Place {
    fleet: Fleet,
    /// Its device's memory; `None`: the pool is where the weights are.
    slabs: Option<Slabs>,
    threads: u32,
}

/// A model's weights for a new instance, and what else its worker has to know.
struct Brought {
    load: Load,
    granules: Vec<OwnedFd>,
    weights: Weights,
    origin: Origin,
}

/// Where an instance's weights are from.
enum Origin {
    /// Read into the pool, if they weren't there.
    Pool(LoadReport),
    /// Copied to a device, or there already.
    Device { landing: watch::Receiver<Landing>, joined: bool, weights: ByteSize },
}

/// A model of the catalog, ready to be started.
pub(crate) struct Prepared {
    pub(crate) files: CheckpointFiles,
    pub(crate) manifest: Arc<Manifest>,
    /// The manifest for the worker.
    manifest_json: Bytes,
    /// Its hash.
    pub(crate) index: Bytes,
}

// === impl Node ===

impl Node {
    /// Opens the node and begins to start its first workers. Needs a runtime's context.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn open(config: NodeConfig, store: Store, catalog: Arc<dyn Catalog>) -> Result<Self, NodeError> {
        let NodeConfig { runtime, workers, devices, memory, keeper } = config;
        let commands = devices.iter().map(|device| &device.workers).chain([&workers]);
        if commands.into_iter().any(|workers| workers.command.is_empty()) {
            return Err(NodeError::NoWorkerCommand);
        }
        let pool = pool_identity(&store).map_err(NodeError::Pool)?;
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let last_worker = Arc::new(AtomicU32::new(runtime.last_worker()));
        let workshop = Workshop { sockets: runtime.sockets(), store: store.clone(), last_worker };
        let fleet = |name: &str, hardware: &str, workers: WorkerConfig| {
            Fleet::new(name.to_owned(), hardware, workers, workshop.clone(), events.clone())
        };
        let Left { workers: survivors, slabs: mut left_slabs, .. } =
            std::mem::take(&mut *runtime.left().lock());
        let last_slab = left_slabs.iter().map(LeftSlab::number).max().unwrap_or(0);
        let last_slab = Arc::new(AtomicU64::new(last_slab));
        let places: Vec<Place> = if devices.is_empty() {
            let threads = workers.threads;
            vec![Place { fleet: fleet("cpu", "", workers), slabs: None, threads }]
        } else {
            let place = |NodeDevice { name, device, memory, work, workers }| {
                let threads = workers.threads;
                let fleet = fleet(&name, &device.info().uuid, workers);
                let (store, keeper, last_slab) = (store.clone(), keeper.clone(), Arc::clone(&last_slab));
                let slabs = Slabs::new(name, device, memory, work, store, fleet.clone(), keeper, last_slab);
                left_slabs = slabs.adopt(std::mem::take(&mut left_slabs));
                Place { fleet, slabs: Some(slabs), threads }
            };
            devices.into_iter().map(place).collect()
        };
        for (slab, keeper) in left_slabs.iter().zip(keeper.iter().cycle()) {
            // Of a device that isn't served from any more.
            keeper.forget_slab(slab.number());
        }
        let instances = Instances::default();
        for survivor in survivors {
            take_over(survivor, pool, &places, &instances);
        }
        places.iter().for_each(|place| place.fleet.begin());
        let telling = tell_changes(&store, events.clone());
        let MemoryConfig { kv, probe, pressure } = memory;
        let memory = Memory::new(kv, probe, store.clone(), instances.clone());
        let inner = Arc::new_cyclic(|inner: &Weak<Inner>| Inner {
            store,
            catalog,
            places,
            instances,
            memory,
            events,
            _telling: telling,
            _watching: pressure.and_then(|trigger| watch_pressure(trigger, inner.clone())),
            keeper,
            _runtime: runtime,
        });
        if !inner.instances.left(None).is_empty() {
            tokio::spawn(let_left_go(Arc::downgrade(&inner)));
        }
        Ok(Self { inner })
    }

    /// Starts an instance: its weights into the pool, a worker for it, the one mapped by the other.
    ///
    /// Cancel-safe: dropping the future leaves nothing of it (a read under way comes to its end in the background, and
    /// a worker that has the model already lets it go).
    ///
    /// # Errors
    /// [`StartFailure`]; nothing is left then.
    pub async fn start(&self, order: StartOrder) -> Result<Started, StartFailure> {
        let model = order.model.clone();
        let begun = tokio::time::Instant::now();
        if let Some(Instance { worker: Some(worker), .. }) = self.inner.instances.repeated(&order) {
            tracing::info!(%model, worker = %worker.worker, "an order of before this node's start; its instance is there");
            return Ok(Started {
                worker: worker.worker,
                socket: worker.socket,
                timeline: Timeline::default(),
            });
        }
        let in_memory = self.place(order.device).is_some_and(|place| place.slabs.is_none());
        let tenancy = self.inner.instances.begin(&order, in_memory)?;
        let cancel = tenancy.cancel.clone();
        // Whatever way this future ends before its end, the instance goes.
        let guard = cancel.clone().drop_guard();
        let outcome = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(StartFailure::Cancelled { model: model.clone() }),
            outcome = self.bring_up_or_make_room(order, tenancy) => outcome,
        };
        let label = if outcome.is_ok() { "ok" } else { "failed" };
        metrics::counter!("stoker_node_loads_total", "outcome" => label).increment(1);
        let started = outcome?;
        for phase in &started.timeline.phases {
            metrics::histogram!("stoker_node_load_seconds", "phase" => phase.phase.name())
                .record(phase.actual.as_secs_f64());
        }
        tracing::info!(%model, worker = %started.worker, took = ?begun.elapsed(), "instance started");
        guard.disarm();
        Ok(started)
    }

    /// As [`Self::bring_up`]. Instances that were left and that nobody has asked for give way.
    async fn bring_up_or_make_room(
        &self,
        order: StartOrder,
        tenancy: Arc<Tenancy>,
    ) -> Result<Started, StartFailure> {
        loop {
            match self.bring_up(order.clone(), Arc::clone(&tenancy)).await {
                Err(StartFailure::OutOfMemory { .. }) if self.reclaim(order.device).await => {}
                outcome => return outcome,
            }
        }
    }

    /// Has instances go that were left and that nobody has asked for, as long as all together take more than there may be.
    async fn fit_left(&self, memory: NodeMemory) {
        for instance in self.inner.instances.left(None) {
            let kv: ByteSize = self.inner.instances.kv_caches().into_iter().map(|(_, bytes)| bytes).sum();
            let mapped = self.inner.store.stats().mapped;
            if mapped <= memory.dram.effective && kv <= memory.kv.effective {
                return;
            }
            // One that is busy stays for now.
            let _ = self.stop(instance, StopMode::IfIdle).await;
        }
    }

    /// Lets go of an idle instance that was left on a device and that nobody has asked for. False: there is none.
    async fn reclaim(&self, device: DeviceId) -> bool {
        for instance in self.inner.instances.left(Some(device)) {
            if self.stop(instance, StopMode::IfIdle).await.is_ok() {
                tracing::info!(%instance, "an instance of before this node's start made room");
                return true;
            }
        }
        false
    }

    /// Goes on with an instance that was left and is as the order wants one: its worker, its streams, its KV cache.
    async fn claim(
        &self,
        order: &StartOrder,
        prepared: &Prepared,
        tenancy: &Arc<Tenancy>,
    ) -> Option<Started> {
        let (from, worker) = self.inner.instances.claim(order, &prepared.index)?;
        let (reply, renamed) = oneshot::channel();
        let (tenancy, generation) = (Arc::clone(tenancy), order.generation);
        worker.give(Order::Rename { from, tenancy, generation, reply }).await;
        // No answer: it has died, or is ending.
        renamed.await.ok()?;
        let tier = if self.place(order.device)?.slabs.is_some() { Tier::Device } else { Tier::Dram };
        let bytes = vec![TierBytes { tier, bytes: prepared.files.bytes() }];
        let timeline = Timeline { phases: Vec::new(), bytes };
        let started = Started { worker: worker.worker, socket: worker.socket.clone(), timeline };
        self.inner.instances.serving(order.instance, worker);
        tracing::info!(was = %from, instance = %order.instance, "went on with an instance of before this node's start");
        Some(started)
    }

    async fn bring_up(&self, order: StartOrder, tenancy: Arc<Tenancy>) -> Result<Started, StartFailure> {
        let (instance, model) = (order.instance, order.model.clone());
        let failed = |detail: &str| StartFailure::Worker { model: model.clone(), detail: detail.to_owned() };
        let place = self
            .place(order.device)
            .ok_or_else(|| failed(&format!("no device {} on this server", order.device)))?;
        let (prepared, room) = tokio::join!(self.prepare(&model), self.find_room(&model));
        let prepared = prepared?;
        if let Some(started) = self.claim(&order, &prepared, &tenancy).await {
            return Ok(started);
        }
        if place.slabs.is_none() {
            self.check_kv(&order, &room).await?;
        }
        let (lease, brought) =
            tokio::try_join!(self.take_worker(place, &order), self.bring(place, &order, prepared))?;
        let Brought { load, granules, weights, origin } = brought;

        let worker = lease.handle().clone();
        let lodging = Lodging { weights, tenancy };
        let (reply, times) = oneshot::channel();
        lease.load(Order::Load { load: Box::new(load), granules, lodging, reply }).await;
        let times = times.await.map_err(|_| failed("it died before it took the model"))?;
        let LoadTimes { map, init } = times.map_err(|failure| {
            // What the worker says of weights that didn't arrive, the delivery says better.
            origin.failure().unwrap_or_else(|| match failure {
                LoadFailure::NotRunnable(why) => StartFailure::NotRunnable { model: model.clone(), why },
                LoadFailure::Worker(detail) => StartFailure::Worker { model: model.clone(), detail },
            })
        })?;
        let socket = worker.socket.clone();
        let id = worker.worker;
        self.inner.instances.serving(instance, worker);
        Ok(Started { worker: id, socket, timeline: origin.timeline(map, init, clock::wall()) })
    }

    /// Whether the KV caches that are reserved, an order's included, fit into memory.
    async fn check_kv(&self, order: &StartOrder, room: &NodeMemory) -> Result<(), StartFailure> {
        let reserved: ByteSize = self.inner.instances.kv_caches().into_iter().map(|(_, bytes)| bytes).sum();
        if reserved <= room.kv.effective {
            return Ok(());
        }
        let free = (room.kv.effective + order.kv_bytes).saturating_sub(reserved);
        Err(self.out_of_memory(&order.model, order.kv_bytes, free, "for its KV cache".into()).await)
    }

    /// Brings a model's weights to where they are computed with: into the pool, or on their way to a device.
    async fn bring(
        &self,
        place: &Place,
        order: &StartOrder,
        prepared: Prepared,
    ) -> Result<Brought, StartFailure> {
        let StartOrder { instance, generation, model, device, context, sequences_max, kv_bytes } = order;
        let Prepared { files, manifest, manifest_json, index } = prepared;
        let mut load = Load {
            model: model.as_str().to_owned(),
            index: index.clone(),
            instance: instance.0,
            generation: generation.0,
            manifest_json,
            chunk_bytes: files.chunk_bytes(),
            context: *context,
            sequences_max: *sequences_max,
            kv_bytes: kv_bytes.bytes(),
            threads: place.threads,
            ..Load::default()
        };
        let Some(slabs) = &place.slabs else {
            let resident = self.bring_in(model, &files, Priority::Demand, drop).await?;
            load.files = file_slots(&resident);
            let origin = Origin::Pool(resident.report().clone());
            let weights = Weights::Pool { _resident: resident };
            return Ok(Brought { load, granules: Vec::new(), weights, origin });
        };
        let beside = self.inner.instances.beside_weights(*device, slabs.work());
        let wanted = Wanted { beside, kv: *kv_bytes, context: *context };
        let layout = Layout::of_manifest(&manifest);
        let bytes = layout.bytes();
        let then = self.tell_delivered(model);
        let lease = slabs.hold(&files, (layout, index), wanted, self.ours(), then).await?;
        let (slab, granules) = lease.export()?;
        load.slab = Some(slab);
        let origin = Origin::Device { landing: lease.landing.clone(), joined: lease.joined, weights: bytes };
        Ok(Brought { load, granules, weights: Weights::Device(lease), origin })
    }

    /// Stops an instance and returns its worker to the idle ones. The chunks stay as cache. Returns when nothing has
    /// them mapped any more. Dropping the future takes nothing back.
    ///
    /// # Errors
    /// [`StopFailure::Busy`] with [`StopMode::IfIdle`] when sequences are running (or it is starting: 0 sequences).
    pub async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<(), StopFailure> {
        let Some(entry) = self.inner.instances.get(instance) else {
            return Err(StopFailure::Unknown { instance });
        };
        match (mode, entry.worker) {
            (StopMode::IfIdle, None) => return Err(StopFailure::Busy { instance, sequences: 0 }),
            (StopMode::IfIdle, Some(worker)) => {
                let (reply, outcome) = oneshot::channel();
                worker.give(Order::Unload { instance, force: false, reply }).await;
                // No answer: the worker has died, and the instance with it.
                if let Ok(Err(Busy { sequences })) = outcome.await {
                    return Err(StopFailure::Busy { instance, sequences });
                }
            }
            (StopMode::Now, _) => entry.cancel.cancel(),
        }
        entry.gone.cancelled().await;
        Ok(())
    }

    /// Brings a model into memory without an instance. Cancel-safe.
    ///
    /// # Errors
    /// [`StartFailure`].
    pub async fn preload(&self, model: &ModelName) -> Result<(), StartFailure> {
        let (prepared, _) = tokio::join!(self.prepare(model), self.find_room(model));
        let Prepared { files, .. } = prepared?;
        self.bring_in(model, &files, Priority::Prefetch, drop).await?;
        Ok(())
    }

    /// Brings a model into memory for somebody else's process. `begun` gets to see how far that is. Cancel-safe.
    ///
    /// # Errors
    /// [`StartFailure`].
    pub(crate) async fn share(
        &self,
        model: &ModelName,
        begun: impl FnOnce(Watermark),
    ) -> Result<Shared, StartFailure> {
        // A program may know what to do with weights that the engine can't run.
        let prepared = self.on_catalog(model, Prepared::to_share);
        let (prepared, _) = tokio::join!(prepared, self.find_room(model));
        let Prepared { files, manifest_json, .. } = prepared?;
        let resident = self.bring_in(model, &files, Priority::Demand, begun).await?;
        Ok(Shared { manifest_json, chunk_bytes: self.inner.store.chunk_bytes(), resident })
    }

    /// A model on a device, for a program that maps it there.
    pub(crate) async fn share_on_device(
        &self,
        model: &ModelName,
        uuid: &str,
        may_write: bool,
    ) -> Result<SharedSlab, NotShared> {
        let prepared = self.on_catalog(model, Prepared::to_share).await.map_err(NotShared::Start)?;
        let Prepared { files, manifest, manifest_json, index } = prepared;
        let place = (0..).zip(&self.inner.places).find_map(|(id, place)| {
            let slabs = place.slabs.as_ref().filter(|slabs| slabs.is(uuid))?;
            Some((DeviceId(id), slabs))
        });
        let Some((device, slabs)) = place else {
            return Err(NotShared::Unsupported(format!("the node doesn't serve from the device {uuid}")));
        };
        self.find_room(model).await;
        let beside = self.inner.instances.beside_weights(device, slabs.work());
        let wanted = Wanted { beside, kv: ByteSize::ZERO, context: 0 };
        let then = self.tell_delivered(model);
        let layout = Layout::of_manifest(&manifest);
        let lent = slabs.lend(&files, (layout, index), wanted, self.ours(), then, may_write).await;
        let (loan, slab, granules) = lent.map_err(|error| match error {
            NotLent::Start(failure) => NotShared::Start(failure),
            NotLent::InUse => NotShared::Unsupported(format!(
                "others use the copy of {model} on this device, and the driver can't map it for a program without write access; \
                 load it without shared=True"
            )),
        })?;
        Ok(SharedSlab { manifest_json, slab, granules, loan })
    }

    /// What to do when a delivery to a device has ended.
    fn tell_delivered(
        &self,
        model: &ModelName,
    ) -> impl FnOnce(Result<&Delivered, &LoadError>) + Send + 'static {
        let (events, catalog, name) =
            (self.inner.events.clone(), Arc::clone(&self.inner.catalog), model.clone());
        move |ended: Result<&Delivered, &LoadError>| match ended {
            Ok(delivered) if delivered.resident.as_ref().is_some_and(Resident::joined) => {}
            Ok(delivered) => tell_loaded(&events, &catalog, &name, &delivered.load),
            Err(LoadError::ObjectChanged { .. }) => catalog.outdated(&name),
            Err(_) => {}
        }
    }

    /// A read-only descriptor of the pool for a program, which may outlive this process.
    pub(crate) fn lend_pool(&self) -> std::io::Result<LentPool> {
        self.inner.store.lend_pool()
    }

    /// Drops what of a model is in memory or on a device and not in use, and gives the memory back to the operating system.
    pub async fn evict(&self, model: &ModelName) -> Evicted {
        for slabs in self.slabs() {
            let (slabs, model) = (slabs.clone(), model.clone());
            // Giving a device's memory back waits for the device.
            let freed = tokio::task::spawn_blocking(move || slabs.evict(&model)).await.unwrap_or_default();
            if freed > ByteSize::ZERO {
                tracing::info!(%freed, "weights of no instance left a device");
            }
        }
        self.inner.store.evict(model).await
    }

    /// What the node says by itself, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.inner.events.subscribe()
    }

    /// Looks at the machine, makes the budgets follow, and returns the state then. While the machine has less than was
    /// configured, also seeks who has the rest. Cancel-safe.
    pub async fn look(&self) -> NodeSnapshot {
        let memory = self.inner.memory.reconcile().await;
        self.fit_left(memory).await;
        self.blame().await;
        for slabs in self.slabs() {
            slabs.look(self.ours()).await;
        }
        self.snapshot()
    }

    /// The state now, with the budgets as of the last look. Reads a file of `/proc` for each worker.
    #[must_use]
    pub fn snapshot(&self) -> NodeSnapshot {
        let stats = self.inner.store.stats();
        let workers: Vec<WorkerStatus> = self.workers().into_iter().map(status).collect();
        let devices: Vec<DeviceMemoryState> = self.slabs().map(Slabs::now).collect();
        let gauge = |tier: &'static str, bytes: ByteSize| {
            #[expect(clippy::cast_precision_loss, reason = "a metric")]
            metrics::gauge!("stoker_node_bytes", "tier" => tier).set(bytes.bytes() as f64);
        };
        gauge("dram", stats.used);
        gauge("dram_mapped", stats.mapped);
        gauge("worker_private", workers.iter().map(|w| w.private_bytes).sum());
        let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        metrics::gauge!("stoker_node_workers").set(count(workers.len()));
        metrics::gauge!("stoker_node_instances").set(count(self.inner.instances.len()));
        NodeSnapshot {
            memory: self.inner.memory.now(),
            dram_used: stats.used,
            dram_mapped: stats.mapped,
            residency: stats.residency.into_iter().map(|r| (r.model, r.prefix)).collect(),
            rates: stats.rates,
            devices,
            workers,
        }
    }

    /// Waits until a worker is ready for a model. Cancel-safe.
    ///
    /// # Errors
    /// In words, why none can be.
    pub async fn ready(&self) -> Result<(), String> {
        for place in &self.inner.places {
            place.fleet.ready().await.map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Ends everything: no start any more, running streams may take `grace`, then no process is left, the keeper included.
    pub async fn shutdown(&self, grace: Duration) {
        self.inner.instances.close();
        let mut ending = JoinSet::new();
        for place in &self.inner.places {
            let fleet = place.fleet.clone();
            ending.spawn(async move { fleet.shutdown(grace, KILL_AFTER).await });
        }
        ending.join_all().await;
        if let Some(keeper) = self.inner.keeper.clone()
            && let Err(error) = tokio::task::spawn_blocking(move || keeper.dismiss()).await
        {
            tracing::warn!(%error, "the keeper was not told");
        }
    }

    /// What a start needs of the catalog. On a thread that may block: a manifest may have to be read.
    async fn prepare(&self, model: &ModelName) -> Result<Prepared, StartFailure> {
        self.on_catalog(model, Prepared::new).await
    }

    async fn on_catalog(
        &self,
        model: &ModelName,
        prepare: fn(&dyn Catalog, &ModelName) -> Result<Prepared, StartFailure>,
    ) -> Result<Prepared, StartFailure> {
        let (catalog, name) = (Arc::clone(&self.inner.catalog), model.clone());
        let prepared = tokio::task::spawn_blocking(move || prepare(&*catalog, &name)).await;
        prepared.unwrap_or_else(|_| Err(StartFailure::Cancelled { model: model.clone() }))
    }

    /// Makes the budgets follow the machine before a model is brought in, whose own chunks should be the last to go.
    async fn find_room(&self, model: &ModelName) -> NodeMemory {
        self.inner.store.expect(model);
        self.inner.memory.reconcile().await
    }

    async fn blame(&self) {
        self.inner.memory.blame(self.ours()).await;
    }

    fn place(&self, device: DeviceId) -> Option<&Place> {
        self.inner.places.get(usize::try_from(device.0).ok()?)
    }

    fn slabs(&self) -> impl Iterator<Item = &Slabs> {
        self.inner.places.iter().filter_map(|place| place.slabs.as_ref())
    }

    fn workers(&self) -> Vec<WorkerView> {
        self.inner.places.iter().flat_map(|place| place.fleet.view()).collect()
    }

    /// The node's processes.
    fn ours(&self) -> Vec<u32> {
        self.workers().iter().map(|w| w.pid).chain([std::process::id()]).collect()
    }

    /// The failure of a start that found no room, with who has it.
    async fn out_of_memory(
        &self,
        model: &ModelName,
        needed: ByteSize,
        free: ByteSize,
        detail: String,
    ) -> StartFailure {
        self.blame().await;
        let detail = match self.inner.memory.now().shortage() {
            Some(shortage) => format!("{detail}; {shortage}"),
            None => detail,
        };
        StartFailure::OutOfMemory { model: model.clone(), needed, free, detail }
    }

    async fn take_worker(&self, place: &Place, order: &StartOrder) -> Result<Lease, StartFailure> {
        let model = &order.model;
        loop {
            match place.fleet.take().await {
                Ok(lease) => return Ok(lease),
                Err(NoWorker::AllServing { .. }) if self.reclaim(order.device).await => {}
                Err(NoWorker::Stopping) => return Err(StartFailure::Cancelled { model: model.clone() }),
                Err(other) => {
                    return Err(StartFailure::Worker { model: model.clone(), detail: other.to_string() });
                }
            }
        }
    }

    async fn bring_in(
        &self,
        model: &ModelName,
        files: &CheckpointFiles,
        priority: Priority,
        begun: impl FnOnce(Watermark),
    ) -> Result<Resident, StartFailure> {
        let loaded = match self.inner.store.begin(files, priority) {
            Ok(loading) => {
                begun(loading.watermark());
                // Cancelled by dropping this future.
                loading.wait(&CancellationToken::new()).await
            }
            Err(error) => Err(error),
        };
        let resident = match loaded {
            Ok(resident) => resident,
            Err(LoadError::OutOfBudget { needed, free, mapped, budget, .. }) => {
                let words = format!("for its weights; {mapped} of {budget} are in use");
                return Err(self.out_of_memory(model, needed, free, words).await);
            }
            Err(error) => {
                if matches!(error, LoadError::ObjectChanged { .. }) {
                    self.inner.catalog.outdated(model);
                }
                return Err(start_failure(model, error));
            }
        };
        if !resident.joined() {
            tell_loaded(&self.inner.events, &self.inner.catalog, model, resident.report());
        }
        Ok(resident)
    }
}

// === impl Prepared ===

impl Prepared {
    pub(crate) fn new(catalog: &dyn Catalog, model: &ModelName) -> Result<Self, StartFailure> {
        let not_runnable = |why| StartFailure::NotRunnable { model: model.clone(), why };
        let CatalogEntry { dir, manifest } = catalog.lookup(model)?;
        match (&manifest.refusal, &manifest.config) {
            (None, Some(_)) => {}
            (Some(why), _) => return Err(not_runnable(why.clone())),
            (None, None) => return Err(not_runnable("it has no configuration".into())),
        }
        Self::of_manifest(model, &dir, manifest)
    }

    /// As [`Self::new`], whether the engine can run it or not; with the files' absolute paths.
    fn to_share(catalog: &dyn Catalog, model: &ModelName) -> Result<Self, StartFailure> {
        let CatalogEntry { dir, manifest } = catalog.lookup(model)?;
        let mut absolute = Arc::unwrap_or_clone(manifest);
        absolute.files.iter_mut().for_each(|file| file.path = dir.join(&file.path));
        Self::of_manifest(model, &dir, Arc::new(absolute))
    }

    fn of_manifest(model: &ModelName, dir: &Path, manifest: Arc<Manifest>) -> Result<Self, StartFailure> {
        let not_runnable = |why| StartFailure::NotRunnable { model: model.clone(), why };
        let files = CheckpointFiles::from_manifest(model.clone(), dir, &manifest)
            .map_err(|e| not_runnable(e.to_string()))?;
        // Workers and clients get bytes that have been checked: the sums, most of a large manifest, are of no use to them.
        let mut manifest = Arc::unwrap_or_clone(manifest);
        manifest.files.iter_mut().for_each(|file| file.chunk_sums.clear());
        manifest.trust = Trust::None;
        let manifest_json: Bytes =
            serde_json::to_vec(&manifest).map_err(|e| not_runnable(e.to_string()))?.into();
        let index = Bytes::copy_from_slice(&Sha256::digest(&manifest_json));
        Ok(Self { files, manifest: Arc::new(manifest), manifest_json, index })
    }
}

// === impl Origin ===

impl Origin {
    /// Why the weights will never be there.
    fn failure(&self) -> Option<StartFailure> {
        match self {
            Self::Pool(_) => None,
            Self::Device { landing, .. } => landing.borrow().failure(),
        }
    }

    /// `ended`: when the worker had the model.
    fn timeline(&self, map: Duration, init: Duration, ended: Duration) -> Timeline {
        let mapped = |timeline: &mut Timeline| {
            timeline.record(Phase::DeviceCopy, None, map);
            timeline.place(Phase::DeviceCopy, Period::until(ended.saturating_sub(init), map));
        };
        let mut timeline = Timeline::default();
        match self {
            Self::Pool(report) => {
                timeline.bytes = report.bytes.clone();
                record_reads(&mut timeline, report);
                mapped(&mut timeline);
            }
            Self::Device { landing, joined: false, .. } => match &*landing.borrow() {
                Landing::Landed(arrival) => timeline = arrival.timeline(),
                // What they took is told when they are there.
                Landing::Coming | Landing::Failed(_) => mapped(&mut timeline),
            },
            Self::Device { joined: true, weights, .. } => {
                timeline.bytes = vec![TierBytes { tier: Tier::Device, bytes: *weights }];
                mapped(&mut timeline);
            }
        }
        timeline.record(Phase::Init, None, init);
        timeline.place(Phase::Init, Period::until(ended, init));
        timeline
    }
}

/// Goes on with a worker of a node before this one, if it is as one of this node would be and what it serves is what it
/// should be. Otherwise its streams may finish, and another takes its place.
fn take_over(survivor: Survivor, pool: (u64, u64), places: &[Place], instances: &Instances) {
    let (worker, pid) = (survivor.worker, survivor.hello.pid);
    let home = places.iter().position(|place| place.fleet.is_home_of(&survivor.hello));
    let (mut usable, at) = (home.is_some() && survivor.has_pool(pool), home.unwrap_or(0));
    usable &= !survivor.hello.ending;
    let Some(place) = places.get(at) else { return };
    let mut survivor = survivor;
    let lodging = survivor.serving.take().map(|Serving { model, load, kept }| {
        let lease = || place.slabs.as_ref()?.hold_left(load.slab.as_ref()?.number, &load.index);
        let weights = match (kept, lease()) {
            (Some(KeptModel::Resident(resident)), _) => Weights::Pool { _resident: resident },
            (_, Some(lease)) => Weights::Device(lease),
            (Some(KeptModel::Remains(chunks)), None) => Weights::Remains { _chunks: chunks },
            (None, None) => Weights::Remains { _chunks: Vec::new() },
        };
        usable &= !matches!(weights, Weights::Remains { .. });
        let left = LeftInstance {
            generation: Generation(load.generation),
            model,
            index: load.index,
            context: load.context,
            sequences_max: load.sequences_max,
        };
        let kv = (ByteSize(load.kv_bytes), place.slabs.is_none());
        let device = DeviceId(u32::try_from(at).unwrap_or(u32::MAX));
        let tenancy = instances.take_over(InstanceId(load.instance), device, kv, left, usable);
        Lodging { weights, tenancy }
    });
    let instance = lodging.as_ref().map(|lodging| lodging.tenancy.instance);
    let outcome = if usable { "adopted" } else { "drained" };
    metrics::counter!("stoker_node_workers_left_total", "outcome" => outcome).increment(1);
    match place.fleet.adopt(survivor, lodging, (!usable).then_some(DRAIN_GRACE)) {
        Ok(handle) => {
            tracing::info!(%worker, pid, ?instance, outcome, "a worker of before this node's start");
            if let Some(instance) = instance {
                instances.serving(instance, handle);
            }
        }
        Err(error) => {
            tracing::warn!(%worker, pid, %error, "a worker of before this node's start can't be taken over")
        }
    }
}

/// Which file the store's pool is; of one that isn't shared none that anybody else can have.
fn pool_identity(store: &Store) -> std::io::Result<(u64, u64)> {
    let Some(memory) = store.memory()? else { return Ok((u64::MAX, u64::MAX)) };
    let stat = rustix::fs::fstat(&memory.pool)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Has instances go that were left and that nobody asks for. Ends when there is none, or no node.
async fn let_left_go(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(KEPT_FOR).await;
        let Some(inner) = inner.upgrade() else { return };
        let node = Node { inner };
        for instance in node.inner.instances.left(None) {
            // One that is busy, and whose streams are an earlier node's, is looked at again.
            let _ = node.stop(instance, StopMode::IfIdle).await;
        }
        if node.inner.instances.left(None).is_empty() {
            return;
        }
    }
}

/// A model came from disk or from its source.
fn tell_loaded(
    events: &broadcast::Sender<NodeEvent>,
    catalog: &Arc<dyn Catalog>,
    model: &ModelName,
    report: &LoadReport,
) {
    for (tier, name) in [(Tier::Remote, "remote"), (Tier::Ssd, "ssd")] {
        let bytes = report.bytes_from(tier);
        if bytes == ByteSize::ZERO {
            continue;
        }
        // Without a listener nobody wants to know.
        let _ = events.send(NodeEvent::Measured { model: model.clone(), tier, bytes, time: report.total });
        metrics::counter!("stoker_node_bytes_read_total", "tier" => name).increment(bytes.bytes());
    }
    if let Some(sums) = report.learned.clone() {
        let (catalog, model) = (Arc::clone(catalog), model.clone());
        // Writes a file. Nobody waits for it: at worst the sums are learned again.
        drop(tokio::task::spawn_blocking(move || catalog.learned(&model, sums)));
    }
}

/// Has the cache give way under memory pressure until the guard is dropped.
fn watch_pressure(trigger: PressureTrigger, inner: Weak<Inner>) -> Option<DropGuard> {
    let watching = memory::watch(trigger, move || {
        let inner = inner.upgrade();
        async move {
            let Some(inner) = inner else { return false };
            if inner.memory.relieve().await {
                // Without a listener nobody wants to know.
                let _ = inner.events.send(NodeEvent::ResidencyChanged);
            }
            true
        }
    });
    watching.inspect_err(|error| tracing::warn!(%error, "memory pressure isn't watched")).ok()
}

/// Tells of changes of what is in memory until the guard is dropped. Changes that come together are told once.
fn tell_changes(store: &Store, events: broadcast::Sender<NodeEvent>) -> DropGuard {
    let mut changes = store.changes();
    let stop = CancellationToken::new();
    let stopped = stop.clone().cancelled_owned();
    tokio::spawn(async move {
        let told = async {
            while changes.changed().await.is_ok() {
                // Without a listener nobody wants to know.
                let _ = events.send(NodeEvent::ResidencyChanged);
            }
        };
        tokio::select! {
            () = told => {}
            () = stopped => {}
        }
    });
    stop.drop_guard()
}

fn file_slots(resident: &Resident) -> Vec<FileSlots> {
    resident.files().iter().map(|file| FileSlots { len: file.len, slots: file.slots.clone() }).collect()
}

pub(crate) fn record_reads(timeline: &mut Timeline, report: &LoadReport) {
    let read = |(tier, _): &(Tier, Phase)| report.bytes_from(*tier) > ByteSize::ZERO;
    let phases = [(Tier::Remote, Phase::RemoteRead), (Tier::Ssd, Phase::SsdRead)];
    for (_, phase) in phases.into_iter().filter(read) {
        timeline.record(phase, None, report.total);
        timeline.place(phase, Period::until(report.ended, report.total));
    }
    if phases.iter().any(read) {
        // On the reading threads, each chunk while others are read.
        timeline.record(Phase::Verify, None, report.verify_thread_time);
        timeline.place(Phase::Verify, Period::until(report.ended, report.transfer));
    }
}

pub(crate) fn start_failure(model: &ModelName, error: LoadError) -> StartFailure {
    let model = model.clone();
    let detail = error.to_string();
    match error {
        LoadError::Changed { path, was, is } => StartFailure::Changed {
            model,
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            // The same again by now: it was written to meanwhile.
            change: was.change(is.as_ref()).unwrap_or(FileChange::Written),
        },
        LoadError::ObjectChanged { url, .. } => StartFailure::Changed {
            model,
            file: url.rsplit('/').next().unwrap_or_default().to_owned(),
            change: FileChange::Object,
        },
        LoadError::Corrupt { .. } | LoadError::WrongHash { .. } => StartFailure::Corrupt { model, detail },
        LoadError::Cancelled | LoadError::Closed => StartFailure::Cancelled { model },
        _ => StartFailure::Read { model, detail },
    }
}

fn status(view: WorkerView) -> WorkerStatus {
    let WorkerView { worker, pid, device, phase } = view;
    let (state, instance) = match phase {
        fleet::Phase::Starting => (WorkerState::Starting, None),
        fleet::Phase::Idle | fleet::Phase::Reserved | fleet::Phase::Ending => (WorkerState::Idle, None),
        fleet::Phase::Loading(tenant) => (WorkerState::Loading, tenant),
        fleet::Phase::Serving(tenant) | fleet::Phase::Unloading(tenant) => (WorkerState::Serving, tenant),
    };
    let private_bytes = ByteSize(spawn::private_bytes(pid).unwrap_or(0));
    WorkerStatus { worker, pid, device, state, instance, private_bytes }
}
