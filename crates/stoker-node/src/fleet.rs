//! The set of worker processes: started ahead, taken, returned, replaced.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stoker_proto::control::{Hello, Home};
use stoker_store::Store;
use stoker_types::{InstanceId, ModelName, NodeEvent, WorkerId};
use tokio::{
    sync::{Notify, broadcast},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    WorkerConfig, spawn,
    survivors::Survivor,
    worker::{self, Lodging, Order, WorkerHandle, WorkerTask},
};

/// First pause after a worker died at its start; doubles with each death in a row.
const BACKOFF: Duration = Duration::from_millis(50);

/// All workers of one of a node's devices. A cheap handle.
#[derive(Clone)]
pub(crate) struct Fleet {
    inner: Arc<Inner>,
}

struct Inner {
    device: String,
    /// What its workers say that they belong to.
    home: String,
    config: WorkerConfig,
    workshop: Workshop,
    events: broadcast::Sender<NodeEvent>,
    state: Mutex<State>,
    /// Something changed that a taker may wait for.
    changed: Notify,
    stopping: CancellationToken,
    /// One task for each worker.
    tasks: TaskTracker,
}

/// What all workers of a node are made with. A cheap handle.
#[derive(Clone)]
pub(crate) struct Workshop {
    /// Where their sockets are.
    pub(crate) sockets: PathBuf,
    /// Whose pool they map.
    pub(crate) store: Store,
    /// The number of the last one.
    pub(crate) last_worker: Arc<AtomicU32>,
}

#[derive(Default)]
struct State {
    workers: BTreeMap<WorkerId, Entry>,
    /// Starts that wait for a worker.
    waiting: usize,
    /// Deaths in a row before a hello, and the last one's words.
    start_deaths: u32,
    last_words: String,
    /// No new attempt before this.
    retry_at: Option<Instant>,
}

/// A worker as the fleet knows it.
struct Entry {
    /// `None` until its process runs.
    handle: Option<WorkerHandle>,
    phase: Phase,
}

/// What a worker is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Idle,
    /// Somebody holds its [`Lease`].
    Reserved,
    Loading(Option<(InstanceId, ModelName)>),
    Serving(Option<(InstanceId, ModelName)>),
    Unloading(Option<(InstanceId, ModelName)>),
    /// Told to end.
    Ending,
}

/// An idle worker, taken. Goes back on drop unless it was given a model.
pub(crate) struct Lease {
    handle: WorkerHandle,
    fleet: Fleet,
    used: bool,
}

/// Why no worker can be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoWorker {
    /// All that there may be are serving.
    #[error("all {workers} workers are serving, and that is the most that there may be")]
    AllServing { workers: usize },
    /// They die before they are ready.
    #[error("{deaths} workers in a row died before they were ready, the last one: {last_words}")]
    Dying { deaths: u32, last_words: String },
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopping,
}

/// A worker for a snapshot.
pub(crate) struct WorkerView {
    pub(crate) worker: WorkerId,
    pub(crate) pid: u32,
    pub(crate) device: String,
    pub(crate) phase: Phase,
}

// === impl Fleet ===

impl Fleet {
    /// A fleet without workers; see [`Self::adopt`] and [`Self::begin`]. `hardware`: what the device is, so that none is taken
    /// for another.
    pub(crate) fn new(
        device: String,
        hardware: &str,
        config: WorkerConfig,
        workshop: Workshop,
        events: broadcast::Sender<NodeEvent>,
    ) -> Self {
        let command: Vec<_> = config.command.iter().map(|part| part.to_string_lossy()).collect();
        let home = format!("{device} {hardware} {}", command.join(" "));
        Self {
            inner: Arc::new(Inner {
                device,
                home,
                config,
                workshop,
                events,
                state: Mutex::default(),
                changed: Notify::new(),
                stopping: CancellationToken::new(),
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Begins to start what is missing. Needs a runtime's context.
    pub(crate) fn begin(&self) {
        self.replenish();
    }

    /// Whether a worker that a node before this one started is as one that this one would start.
    pub(crate) fn is_home_of(&self, hello: &Hello) -> bool {
        hello.fleet == self.inner.home && hello.version == env!("CARGO_PKG_VERSION")
    }

    /// Goes on with such a worker, or ends it when its streams have (`ends`: how long they may take). Returns what gives it
    /// orders. Needs a runtime's context.
    ///
    /// # Errors
    /// The operating system's; the worker ends by itself then.
    pub(crate) fn adopt(
        &self,
        survivor: Survivor,
        lodging: Option<Lodging>,
        ends: Option<Duration>,
    ) -> io::Result<WorkerHandle> {
        let (worker, watchdog) = (survivor.worker, self.inner.config.watchdog);
        let state = lodging.map_or(worker::State::Idle, |lodging| worker::State::Serving { lodging });
        let process = spawn::resume(survivor)?;
        let mut task = WorkerTask::new(worker, process, state, watchdog, self.clone());
        if let Some(grace) = ends {
            task.dismiss(grace);
        }
        let (handle, phase) = (task.handle(), if ends.is_some() { Phase::Ending } else { task.phase() });
        let entry = Entry { handle: Some(handle.clone()), phase };
        self.inner.state.lock().workers.insert(worker, entry);
        self.inner.tasks.spawn(task.run());
        Ok(handle)
    }

    /// Takes an idle worker, waiting for one that is starting or unloading. Cancel-safe.
    pub(crate) async fn take(&self) -> Result<Lease, NoWorker> {
        let _waiting = Waiting::new(self);
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            // Registered before looking: a change between the two is not missed.
            changed.as_mut().enable();
            if self.inner.stopping.is_cancelled() {
                return Err(NoWorker::Stopping);
            }
            if let Some(handle) = self.try_take()? {
                self.replenish();
                return Ok(Lease { handle, fleet: self.clone(), used: false });
            }
            self.replenish();
            tokio::select! {
                () = changed => {}
                () = self.inner.stopping.cancelled() => {}
            }
        }
    }

    /// Waits until a worker is idle or serves. Cancel-safe.
    pub(crate) async fn ready(&self) -> Result<(), NoWorker> {
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.inner.state.lock();
                if state.workers.values().any(|e| !matches!(e.phase, Phase::Starting | Phase::Ending)) {
                    return Ok(());
                }
                if state.start_deaths >= self.inner.config.start_deaths_max.get() {
                    return Err(state.dying());
                }
            }
            tokio::select! {
                () = changed => {}
                () = self.inner.stopping.cancelled() => return Err(NoWorker::Stopping),
            }
        }
    }

    fn try_take(&self) -> Result<Option<WorkerHandle>, NoWorker> {
        let mut state = self.inner.state.lock();
        let idle = state.workers.values_mut().find(|e| e.phase == Phase::Idle);
        if let Some(Entry { handle: Some(handle), phase }) = idle {
            *phase = Phase::Reserved;
            return Ok(Some(handle.clone()));
        }
        if state.start_deaths >= self.inner.config.start_deaths_max.get()
            && state.retry_at.is_some_and(|at| Instant::now() < at)
            && !state.workers.values().any(|e| e.phase == Phase::Starting)
        {
            return Err(state.dying());
        }
        let workers = state.workers.len();
        if workers >= self.inner.config.workers_max.get() as usize
            && state.workers.values().all(|e| matches!(e.phase, Phase::Serving(_)))
        {
            return Err(NoWorker::AllServing { workers });
        }
        Ok(None)
    }

    /// Starts as many workers as are missing.
    fn replenish(&self) {
        if self.inner.stopping.is_cancelled() {
            return;
        }
        let Inner { config, state, .. } = &*self.inner;
        let mut state = state.lock();
        let now = Instant::now();
        let pause = match state.start_deaths {
            0 => Duration::ZERO,
            deaths if deaths < config.start_deaths_max.get() => BACKOFF * (1 << (deaths - 1).min(10)),
            // Given up, except that one is tried when somebody waits for it and it is time.
            _ if state.waiting > 0 && state.retry_at.is_none_or(|at| at <= now) => {
                state.retry_at = Some(now + config.retry_after);
                Duration::ZERO
            }
            _ => return,
        };
        let missing = if state.start_deaths > 0 {
            // One at a time until one lives.
            usize::from(!state.workers.values().any(|e| e.phase == Phase::Starting))
                .min(state.missing(config))
        } else {
            state.missing(config)
        };
        for _ in 0..missing {
            let last = self.inner.workshop.last_worker.fetch_add(1, Ordering::Relaxed);
            let worker = WorkerId(last + 1);
            state.workers.insert(worker, Entry { handle: None, phase: Phase::Starting });
            self.inner.tasks.spawn(self.clone().look_after(worker, pause));
        }
    }

    /// A worker's whole life.
    async fn look_after(self, worker: WorkerId, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.inner.stopping.cancelled() => return self.remove(worker, None),
        }
        let fleet = self.clone();
        // A fork may take longer than a runtime's thread should be held.
        let spawned = tokio::task::spawn_blocking(move || {
            let Inner { config, workshop, home, .. } = &*fleet.inner;
            // Each has a claim of its own to the pool, which it can let go of by itself.
            let pool = workshop.store.pool_fd()?;
            spawn::spawn(worker, config, &workshop.sockets, &pool, Home { fleet: home.clone() })
        });
        match spawned.await.unwrap_or_else(|error| Err(error.into())) {
            Ok(process) => {
                let watchdog = self.inner.config.watchdog;
                let task = WorkerTask::new(worker, process, worker::State::Starting, watchdog, self.clone());
                let handle = task.handle();
                if let Some(entry) = self.inner.state.lock().workers.get_mut(&worker) {
                    entry.handle = Some(handle.clone());
                }
                if self.inner.stopping.is_cancelled() {
                    handle.give(Order::Kill).await;
                }
                metrics::counter!("stoker_node_worker_starts_total").increment(1);
                task.run().await;
            }
            Err(error) => {
                let program = self.inner.config.command.first().cloned().unwrap_or_default();
                tracing::error!(%worker, ?program, %error, "could not start a worker");
                self.remove(worker, Some((false, format!("starting {} failed: {error}", program.display()))));
            }
        }
    }

    /// A worker's task says what it is doing.
    pub(crate) fn set_phase(&self, worker: WorkerId, phase: Phase) {
        {
            let mut state = self.inner.state.lock();
            if let Some(entry) = state.workers.get_mut(&worker) {
                let started = entry.phase == Phase::Starting;
                entry.phase = phase;
                if started {
                    state.start_deaths = 0;
                    state.retry_at = None;
                }
            }
        }
        self.inner.changed.notify_waiters();
        self.replenish();
    }

    /// A worker has ended; with whether it had been ready and its last words if nobody told it to.
    pub(crate) fn remove(&self, worker: WorkerId, death: Option<(bool, String)>) {
        {
            let mut state = self.inner.state.lock();
            state.workers.remove(&worker);
            if let Some((false, words)) = death {
                state.start_deaths = state.start_deaths.saturating_add(1);
                state.last_words = words;
                if state.start_deaths >= self.inner.config.start_deaths_max.get() {
                    state.retry_at = Some(Instant::now() + self.inner.config.retry_after);
                }
            }
        }
        self.inner.changed.notify_waiters();
        self.replenish();
    }

    /// Whether this idle worker is one too many. If so it counts as ending.
    pub(crate) fn dismiss_surplus(&self, worker: WorkerId) -> bool {
        let mut state = self.inner.state.lock();
        let surplus = state.ready() > state.wanted(&self.inner.config);
        let Some(entry) = state.workers.get_mut(&worker) else { return false };
        if surplus && entry.phase == Phase::Idle {
            entry.phase = Phase::Ending;
            return true;
        }
        false
    }

    pub(crate) fn tell(&self, event: NodeEvent) {
        // Without a listener nobody wants to know.
        let _ = self.inner.events.send(event);
    }

    pub(crate) fn view(&self) -> Vec<WorkerView> {
        let state = self.inner.state.lock();
        let view = |(worker, entry): (&WorkerId, &Entry)| WorkerView {
            worker: *worker,
            pid: entry.handle.as_ref().map_or(0, |h| h.pid),
            device: self.inner.device.clone(),
            phase: entry.phase.clone(),
        };
        state.workers.iter().map(view).collect()
    }

    /// Device memory that workers have for their models, as they last said.
    pub(crate) fn device_bytes(&self) -> u64 {
        let state = self.inner.state.lock();
        let handles = state.workers.values().filter_map(|entry| entry.handle.as_ref());
        handles.map(|handle| handle.device_bytes.load(Ordering::Relaxed)).sum()
    }

    /// Ends every worker: streams may take `grace`, and `kill_after` beyond it the process is killed. Returns when no
    /// process is left.
    pub(crate) async fn shutdown(&self, grace: Duration, kill_after: Duration) {
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        let order_all = async |order: fn(Duration) -> Order, grace| {
            let handles: Vec<WorkerHandle> =
                self.inner.state.lock().workers.values().filter_map(|e| e.handle.clone()).collect();
            for handle in handles {
                handle.give(order(grace)).await;
            }
        };
        order_all(|grace| Order::Shutdown { grace }, grace).await;
        if tokio::time::timeout(grace + kill_after, self.inner.tasks.wait()).await.is_err() {
            order_all(|_| Order::Kill, grace).await;
            self.inner.tasks.wait().await;
        }
    }
}

// === impl State ===

impl State {
    /// Workers without a model that are there or coming.
    fn ready(&self) -> usize {
        self.workers.values().filter(|e| matches!(e.phase, Phase::Starting | Phase::Idle)).count()
    }

    fn dying(&self) -> NoWorker {
        NoWorker::Dying { deaths: self.start_deaths, last_words: self.last_words.clone() }
    }

    /// How many of those there should be.
    fn wanted(&self, config: &WorkerConfig) -> usize {
        let busy = self.workers.len() - self.ready();
        (config.prewarmed.get() as usize).saturating_sub(busy).max(self.waiting).max(1)
    }

    fn missing(&self, config: &WorkerConfig) -> usize {
        let room = (config.workers_max.get() as usize).saturating_sub(self.workers.len());
        self.wanted(config).saturating_sub(self.ready()).min(room)
    }
}

// === impl Lease ===

impl Lease {
    pub(crate) fn handle(&self) -> &WorkerHandle {
        &self.handle
    }

    /// Gives the worker a model; from then on its own task knows what becomes of it. When the worker has died, the
    /// order is dropped. Cancel-safe.
    pub(crate) async fn load(mut self, order: Order) {
        if let Ok(place) = self.handle.orders.reserve().await {
            self.used = true;
            place.send(order);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.used {
            return;
        }
        {
            let mut state = self.fleet.inner.state.lock();
            // It may have died meanwhile.
            if let Some(entry) = state.workers.get_mut(&self.handle.worker)
                && entry.phase == Phase::Reserved
            {
                entry.phase = Phase::Idle;
            }
        }
        self.fleet.inner.changed.notify_waiters();
    }
}

/// Counts a start that waits for a worker.
struct Waiting<'f>(&'f Fleet);

impl<'f> Waiting<'f> {
    fn new(fleet: &'f Fleet) -> Self {
        fleet.inner.state.lock().waiting += 1;
        Self(fleet)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.inner.state.lock().waiting -= 1;
    }
}
