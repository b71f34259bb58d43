//! One worker process and the task that owns it.
//!
//! ```text
//! starting --Hello--> idle --Load--> loading --Loaded--> serving --Unload--> unloading --Unloaded--> idle
//!                                       |                   ^                    |
//!                                       +--LoadFailed-> idle +---UnloadRefused----+
//! ```
//!
//! Whatever the state, the process may die: then the task gives back what the instance held, says why, and ends. What
//! an instance holds (its chunks in the pool) is dropped only after the worker has said `Unloaded` or has been waited
//! for: nobody reuses memory that a process has mapped.
//!
//! A worker that a node before this one started begins as idle or serving (`survivors`). What it serves is an instance that
//! nobody here has ordered, until an order for its model makes it another one (`Rename`).
//!
//! A model on a device is given before its weights are there. What becomes of the delivery is passed on to the worker
//! (`Landed`); when it fails, the instance goes, whatever state it is in.

use std::{
    fmt,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use stoker_io::Chunk;
use stoker_proto::{
    FrameError, FrameReader, FrameWriter, PROTOCOL_VERSION,
    control::{
        self, FromWorker, Hello, Landed, Load, Ping, Pong, Rename, Renamed, ToWorker, Unload, from_worker,
        to_worker,
    },
    send_with_descriptors,
};
use stoker_store::Resident;
use stoker_types::{Generation, InstanceId, ModelName, NodeEvent, WorkerId};
use tokio::{
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot, watch,
    },
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    Watchdog,
    devices::{Landing, Lease},
    fleet::{Fleet, Phase},
    lodging::Tenancy,
    spawn::{self, Body, Process},
    survivors::Sockets,
};

/// Orders that may wait for a worker's task, and frames that may wait for a worker.
const QUEUE_MAX: usize = 32;

/// How long a process may take from closing its control connection to its end, and its last lines to be read.
const END_TIME_MAX: Duration = Duration::from_secs(2);

/// Gives orders to a worker. A cheap handle.
#[derive(Clone)]
pub(crate) struct WorkerHandle {
    pub(crate) worker: WorkerId,
    pub(crate) pid: u32,
    pub(crate) socket: PathBuf,
    pub(crate) orders: mpsc::Sender<Order>,
    /// Device memory that it has for its model, as it last said.
    pub(crate) device_bytes: Arc<AtomicU64>,
}

/// What a worker's task is asked to do.
pub(crate) enum Order {
    /// Take a model. The worker must be idle: whoever gives the order has reserved it.
    Load {
        load: Box<Load>,
        /// The granules of its slab, for a model on a device.
        granules: Vec<OwnedFd>,
        lodging: Lodging,
        reply: oneshot::Sender<Result<LoadTimes, LoadFailure>>,
    },
    /// Let the instance go.
    Unload { instance: InstanceId, force: bool, reply: oneshot::Sender<Result<(), Busy>> },
    /// An instance that a node before this one started is another one from here on.
    Rename { from: InstanceId, tenancy: Arc<Tenancy>, generation: Generation, reply: oneshot::Sender<()> },
    /// End the process, streams first.
    Shutdown { grace: Duration },
    /// End the process.
    Kill,
}

/// What an instance holds while a worker has it mapped. Dropped in this order.
pub(crate) struct Lodging {
    pub(crate) weights: Weights,
    pub(crate) tenancy: Arc<Tenancy>,
}

/// An instance's weights.
pub(crate) enum Weights {
    /// In the pool, where this keeps them.
    Pool { _resident: Resident },
    /// On a device.
    Device(Lease),
    /// Of a worker that another node started and that is to end: what it has mapped of the pool must not change.
    Remains { _chunks: Vec<Chunk> },
}

/// What a load took in the worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadTimes {
    pub(crate) map: Duration,
    pub(crate) init: Duration,
}

/// Why a load failed.
#[derive(Debug)]
pub(crate) enum LoadFailure {
    /// The model can't be computed.
    NotRunnable(String),
    /// The worker could not take it, or died.
    Worker(String),
}

/// Sequences are running.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Busy {
    pub(crate) sequences: u32,
}

/// The task's own side.
pub(crate) struct WorkerTask {
    worker: WorkerId,
    fleet: Fleet,
    watchdog: Watchdog,
    body: Body,
    process: Ends,
    reader: FrameReader<OwnedReadHalf>,
    /// To the task that writes: a worker that doesn't read must not hold up this one.
    frames: mpsc::Sender<Frame>,
    orders: mpsc::Receiver<Order>,
    handle: WorkerHandle,
    state: State,
    /// Of the model that it has, while that is on its way to a device.
    landing: Option<watch::Receiver<Landing>>,
    /// The instance that the one which it serves becomes.
    renaming: Option<(Arc<Tenancy>, oneshot::Sender<()>)>,
    pulse: Pulse,
    /// Why it is being killed by us.
    killed: Option<String>,
    /// It was told to end.
    dismissed: bool,
}

/// Something to say to the worker, with descriptors.
struct Frame {
    kind: to_worker::Kind,
    descriptors: Vec<OwnedFd>,
}

/// Parts of the process that only matter at its end.
struct Ends {
    lines: spawn::LastLines,
    forwarding: tokio::task::JoinHandle<()>,
    _sockets: Sockets,
}

pub(crate) enum State {
    Starting,
    Idle,
    Loading {
        lodging: Lodging,
        reply: oneshot::Sender<Result<LoadTimes, LoadFailure>>,
        /// Nobody waits for it any more.
        given_up: bool,
    },
    Serving {
        lodging: Lodging,
    },
    Unloading {
        lodging: Lodging,
        replies: Vec<oneshot::Sender<Result<(), Busy>>>,
        force: bool,
    },
}

/// What the pings have shown.
#[derive(Debug, Default)]
struct Pulse {
    number: u64,
    unanswered: u32,
    steps: u64,
    /// Pongs in a row with sequences and the same step count.
    without_step: u32,
    /// Intervals in the present state.
    intervals: u32,
}

// === impl WorkerHandle ===

impl WorkerHandle {
    /// Gives an order. When the worker's task has ended the order is dropped, and with it its reply.
    pub(crate) async fn give(&self, order: Order) {
        let _ = self.orders.send(order).await;
    }
}

impl fmt::Debug for WorkerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerHandle")
            .field("worker", &self.worker)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

// === impl WorkerTask ===

impl WorkerTask {
    pub(crate) fn new(
        worker: WorkerId,
        process: Process,
        state: State,
        watchdog: Watchdog,
        fleet: Fleet,
    ) -> Self {
        let Process { body, reader, writer, sockets, lines, forwarding, first } = process;
        let (frames, to_write) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(write_frames(worker, writer, to_write));
        let (sender, orders) = mpsc::channel(QUEUE_MAX);
        let handle = WorkerHandle {
            worker,
            pid: body.pid(),
            socket: sockets.streams.path().to_owned(),
            orders: sender,
            device_bytes: Arc::default(),
        };
        let mut task = Self {
            worker,
            fleet,
            watchdog,
            body,
            process: Ends { lines, forwarding, _sockets: sockets },
            reader,
            frames,
            orders,
            handle,
            state,
            landing: None,
            renaming: None,
            pulse: Pulse::default(),
            killed: None,
            dismissed: false,
        };
        let (kind, descriptors) = first;
        task.say_with(kind, descriptors);
        task
    }

    /// What it does now.
    pub(crate) fn phase(&self) -> Phase {
        self.state.phase()
    }

    pub(crate) fn handle(&self) -> WorkerHandle {
        self.handle.clone()
    }

    /// Looks after the process until it has ended.
    pub(crate) async fn run(mut self) {
        let mut ticks = interval(self.watchdog.ping_every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut connected = true;
        let status = loop {
            let cancel = self.state.cancel();
            let landing = self.landing.clone();
            tokio::select! {
                status = self.body.wait() => break status,
                message = self.reader.next::<FromWorker>(), if connected => match message {
                    Ok(Some(FromWorker { kind: Some(kind) })) => self.heard(kind),
                    Ok(Some(FromWorker { kind: None })) => {}
                    // It ends, or has ended; how, its exit status says.
                    Ok(None) | Err(FrameError::Io(_) | FrameError::Truncated { .. }) => {
                        connected = false;
                        self.pulse.intervals = 0;
                    }
                    Err(error @ (FrameError::TooLong { .. } | FrameError::Decode(_))) => {
                        connected = false;
                        self.kill(format!("said what this node does not understand: {error}"));
                    }
                },
                Some(order) = self.orders.recv() => self.obey(order),
                () = cancel, if self.renaming.is_none() => self.cancelled(),
                landing = ended(landing) => self.landed(&landing),
                _ = ticks.tick() => self.tick(connected),
            }
        };
        let reason = self.killed.take().unwrap_or(status);
        // Its pipe is at its end now, unless it gave it to somebody.
        let _ = timeout(END_TIME_MAX, &mut self.process.forwarding).await;
        self.process.forwarding.abort();
        self.ended(reason);
    }

    fn heard(&mut self, kind: from_worker::Kind) {
        match kind {
            from_worker::Kind::Hello(Hello { protocol, device, .. }) => {
                if protocol != PROTOCOL_VERSION {
                    self.kill(format!(
                        "speaks version {protocol} of the protocol, this node {PROTOCOL_VERSION}"
                    ));
                } else if matches!(self.state, State::Starting) {
                    tracing::debug!(worker = %self.worker, device, "worker is ready");
                    self.change(State::Idle);
                }
            }
            from_worker::Kind::Pong(pong) => self.pulse(pong),
            from_worker::Kind::Renamed(renamed) => self.renamed(renamed),
            // Said to the node that took it over, before this task began.
            from_worker::Kind::Yielded(_) => {}
            from_worker::Kind::Loaded(loaded) => match std::mem::replace(&mut self.state, State::Idle) {
                State::Loading { lodging, reply, given_up: _ } if lodging.is(loaded.instance) => {
                    self.handle.device_bytes.store(loaded.device_bytes, Ordering::Relaxed);
                    if let Some(failure) = lodging.weights.failure() {
                        // It has been told, and has dropped the model or will.
                        self.change(State::Serving { lodging });
                        self.unload(true, None);
                        let _ = reply.send(Err(LoadFailure::Worker(failure.to_string())));
                        return;
                    }
                    self.change(State::Serving { lodging });
                    let times = LoadTimes {
                        map: Duration::from_micros(loaded.map_us),
                        init: Duration::from_micros(loaded.init_us),
                    };
                    // Nobody waits any more: whoever gave up has cancelled the instance, too.
                    let _ = reply.send(Ok(times));
                }
                other => self.unexpected(other, "Loaded"),
            },
            from_worker::Kind::LoadFailed(failed) => match std::mem::replace(&mut self.state, State::Idle) {
                State::Loading { lodging, reply, given_up: _ } if lodging.is(failed.instance) => {
                    self.let_go(lodging);
                    let failure = if failed.not_runnable {
                        LoadFailure::NotRunnable(failed.message)
                    } else {
                        LoadFailure::Worker(failed.message)
                    };
                    let _ = reply.send(Err(failure));
                }
                other => self.unexpected(other, "LoadFailed"),
            },
            from_worker::Kind::Unloaded(unloaded) => match std::mem::replace(&mut self.state, State::Idle) {
                State::Unloading { lodging, replies, force: _ } if lodging.is(unloaded.instance) => {
                    self.let_go(lodging);
                    for reply in replies {
                        let _ = reply.send(Ok(()));
                    }
                }
                other => self.unexpected(other, "Unloaded"),
            },
            from_worker::Kind::UnloadRefused(refused) => {
                match std::mem::replace(&mut self.state, State::Idle) {
                    // A refusal of the order before, when another came by force behind it.
                    State::Unloading { lodging, replies, force: true } => {
                        self.state = State::Unloading { lodging, replies, force: true };
                    }
                    State::Unloading { lodging, replies, force: false } if lodging.is(refused.instance) => {
                        self.change(State::Serving { lodging });
                        for reply in replies {
                            let _ = reply.send(Err(Busy { sequences: refused.sequences }));
                        }
                    }
                    other => self.unexpected(other, "UnloadRefused"),
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Load { load, granules, lodging, reply } => {
                if matches!(self.state, State::Idle) && !self.dismissed {
                    self.landing = lodging.weights.landing();
                    self.change(State::Loading { lodging, reply, given_up: false });
                    self.say_with(to_worker::Kind::Load(*load), granules);
                } else {
                    let _ = reply.send(Err(LoadFailure::Worker("it was not idle".into())));
                }
            }
            Order::Unload { instance, force, reply } => {
                if self.state.instance().is_some_and(|(i, _)| i == instance) {
                    self.unload(force, Some(reply));
                } else {
                    let _ = reply.send(Ok(()));
                }
            }
            Order::Rename { from, tenancy, generation, reply } => {
                let serves = matches!(&self.state, State::Serving { lodging } if lodging.is(from.0));
                // Without an answer whoever asks knows that it has gone.
                if serves && self.renaming.is_none() && !self.dismissed {
                    let (from, to) = (from.0, tenancy.instance.0);
                    self.renaming = Some((tenancy, reply));
                    self.say(to_worker::Kind::Rename(Rename { from, to, generation: generation.0 }));
                }
            }
            Order::Shutdown { grace } => self.dismiss(grace),
            // Only said when the node stops: nobody has lost anything then.
            Order::Kill => {
                self.dismissed = true;
                self.kill("ended by this node".into());
            }
        }
    }

    fn renamed(&mut self, renamed: Renamed) {
        let Some((tenancy, reply)) = self.renaming.take() else { return };
        let State::Serving { lodging } = &mut self.state else { return };
        if renamed.there && tenancy.instance.0 == renamed.instance {
            lodging.tenancy = tenancy;
            // Nobody waits any more: whoever gave up has cancelled the instance, too.
            let _ = reply.send(());
            self.fleet.set_phase(self.worker, self.state.phase());
        } else {
            self.kill("does not know the instance that it said it serves".into());
        }
    }

    /// The instance is to go, whoever is there.
    fn cancelled(&mut self) {
        match &mut self.state {
            // It comes to its end as the delivery does, or the worker's own work, which takes milliseconds.
            State::Loading { lodging, given_up, .. } => {
                *given_up = true;
                lodging.weights.give_up();
            }
            _ => self.unload(true, None),
        }
    }

    /// The delivery of the worker's model has ended.
    fn landed(&mut self, landing: &Landing) {
        self.landing = None;
        let Some((instance, model)) = self.state.instance() else { return };
        let (failure, model) = (landing.failure(), model.clone());
        let error = failure.as_ref().map(ToString::to_string);
        self.say(to_worker::Kind::Landed(Landed { instance: instance.0, error }));
        self.pulse.intervals = 0;
        self.pulse.without_step = 0;
        // One that is loading answers by itself.
        if !matches!(self.state, State::Serving { .. }) {
            return;
        }
        if let Some(failure) = failure {
            tracing::error!(worker = %self.worker, %instance, %model, %failure, "a model that is served didn't arrive");
            self.unload(true, None);
            self.fleet.tell(NodeEvent::InstanceLost { instance, failure });
        } else if let Landing::Landed(arrival) = landing {
            let (took, timeline) = (arrival.took, arrival.timeline());
            self.fleet.tell(NodeEvent::InstanceLanded { instance, took, timeline });
        }
    }

    /// The worker has nothing of it mapped any more.
    fn let_go(&mut self, lodging: Lodging) {
        self.landing = None;
        self.handle.device_bytes.store(0, Ordering::Relaxed);
        match lodging.weights {
            Weights::Pool { .. } | Weights::Remains { .. } => drop(lodging),
            // Nobody has asked for it yet since the node began: who does, finds the weights.
            Weights::Device(_) if lodging.tenancy.is_left() => lodging.died(false),
            // Giving a device's memory back waits for the device. The instance is gone when that is done.
            Weights::Device(_) => drop(tokio::task::spawn_blocking(move || drop(lodging))),
        }
        self.change(State::Idle);
    }

    fn unload(&mut self, force: bool, reply: Option<oneshot::Sender<Result<(), Busy>>>) {
        match std::mem::replace(&mut self.state, State::Idle) {
            // Not before it is known by which number.
            State::Serving { lodging } if self.renaming.is_some() => {
                self.state = State::Serving { lodging };
                if let Some(reply) = reply {
                    let _ = reply.send(Err(Busy { sequences: 0 }));
                }
            }
            State::Serving { lodging } => {
                let instance = lodging.tenancy.instance.0;
                self.change(State::Unloading { lodging, replies: reply.into_iter().collect(), force });
                self.say(to_worker::Kind::Unload(Unload { instance, force }));
            }
            State::Unloading { lodging, mut replies, force: forced } => {
                replies.extend(reply);
                if force && !forced {
                    let instance = lodging.tenancy.instance.0;
                    self.say(to_worker::Kind::Unload(Unload { instance, force }));
                }
                self.state = State::Unloading { lodging, replies, force: force || forced };
            }
            other @ (State::Starting | State::Idle | State::Loading { .. }) => {
                // A start in progress is cancelled by its instance's token.
                self.state = other;
                if let Some(reply) = reply {
                    let _ = reply.send(Err(Busy { sequences: 0 }));
                }
            }
        }
    }

    fn tick(&mut self, connected: bool) {
        let Watchdog { ping_every: _, pings_unanswered_max, pings_without_step_max, idle_intervals_max } =
            self.watchdog;
        let Pulse { unanswered, without_step, intervals, .. } = self.pulse;
        self.pulse.intervals = intervals.saturating_add(1);
        if !connected {
            // The connection closes as the process ends.
            if intervals >= 2 {
                self.kill("closed its control connection and went on".into());
            }
        } else if unanswered >= pings_unanswered_max {
            self.kill(format!("hung: {unanswered} pings without an answer"));
        } else if without_step >= pings_without_step_max && self.landing.is_none() {
            self.kill(format!("hung: sequences are running and {without_step} pings found no new step"));
        } else {
            match self.state {
                State::Starting if intervals >= pings_unanswered_max => {
                    self.kill("hung: it did not say hello".into());
                    return;
                }
                // Weights on their way come to an end by themselves.
                State::Loading { .. } | State::Unloading { .. }
                    if intervals >= pings_without_step_max && self.landing.is_none() =>
                {
                    self.kill(format!("hung: no end of a load or unload after {intervals} intervals"));
                    return;
                }
                State::Idle if intervals >= idle_intervals_max && self.fleet.dismiss_surplus(self.worker) => {
                    self.dismiss(Duration::ZERO);
                    return;
                }
                State::Starting => return,
                State::Idle | State::Loading { .. } | State::Serving { .. } | State::Unloading { .. } => {}
            }
            self.pulse.number += 1;
            self.pulse.unanswered += 1;
            self.say(to_worker::Kind::Ping(Ping { number: self.pulse.number }));
        }
    }

    fn pulse(&mut self, pong: Pong) {
        let Pong { number, sequences, steps, device_bytes, .. } = pong;
        if self.state.instance().is_some() {
            self.handle.device_bytes.store(device_bytes, Ordering::Relaxed);
        }
        if number == self.pulse.number {
            self.pulse.unanswered = 0;
        }
        let moves = sequences == 0 || steps != self.pulse.steps;
        self.pulse.without_step = if moves { 0 } else { self.pulse.without_step + 1 };
        self.pulse.steps = steps;
    }

    pub(crate) fn dismiss(&mut self, grace: Duration) {
        self.dismissed = true;
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.say(to_worker::Kind::Shutdown(control::Shutdown { grace_ms }));
    }

    fn say(&mut self, kind: to_worker::Kind) {
        self.say_with(kind, Vec::new());
    }

    fn say_with(&mut self, kind: to_worker::Kind, descriptors: Vec<OwnedFd>) {
        match self.frames.try_send(Frame { kind, descriptors }) {
            // Closed: the process is ending, which is noticed by waiting for it.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => self.kill("hung: it does not read its orders".into()),
        }
    }

    fn kill(&mut self, reason: String) {
        if self.killed.is_none() {
            if self.dismissed {
                tracing::debug!(worker = %self.worker, reason, "killing a worker");
            } else {
                tracing::warn!(worker = %self.worker, reason, "killing a worker");
            }
            self.killed = Some(reason);
            self.body.kill();
        }
    }

    fn unexpected(&mut self, state: State, what: &str) {
        self.state = state;
        self.kill(format!("said {what} out of turn"));
    }

    fn change(&mut self, state: State) {
        self.pulse.intervals = 0;
        self.state = state;
        self.fleet.set_phase(self.worker, self.state.phase());
    }

    /// The process is no more.
    fn ended(self, reason: String) {
        let Self { worker, fleet, process, state, dismissed, .. } = self;
        let last_lines = process.lines.get();
        let instance = state.instance().map(|(instance, _)| instance);
        let ready = !matches!(state, State::Starting);
        let words = last_lines.last().map_or_else(String::new, |line| format!("; its last line: {line}"));
        match state {
            State::Starting | State::Idle => {}
            State::Serving { lodging } => lodging.died(dismissed),
            State::Loading { lodging, reply, given_up } => {
                lodging.died(dismissed || given_up);
                let _ = reply.send(Err(LoadFailure::Worker(format!("{worker} ended: {reason}{words}"))));
            }
            State::Unloading { lodging, replies, .. } => {
                drop(lodging);
                for reply in replies {
                    let _ = reply.send(Ok(()));
                }
            }
        }
        drop(process);
        if dismissed {
            tracing::debug!(%worker, reason, "worker has ended");
            fleet.remove(worker, None);
        } else {
            tracing::error!(%worker, ?instance, reason, "worker lost");
            metrics::counter!("stoker_node_workers_lost_total").increment(1);
            fleet.remove(worker, Some((ready, format!("{reason}{words}"))));
            fleet.tell(NodeEvent::WorkerLost { worker, instance, reason, last_lines });
        }
    }
}

/// The end of a delivery; pending for ever where there is none.
async fn ended(landing: Option<watch::Receiver<Landing>>) -> Landing {
    let Some(mut landing) = landing else { return std::future::pending().await };
    let end = landing.wait_for(|landing| !landing.is_coming()).await.map(|landing| landing.clone());
    match end {
        Ok(landing) => landing,
        // Its task went with the runtime, and so does this one.
        Err(_) => std::future::pending().await,
    }
}

async fn write_frames(worker: WorkerId, write: OwnedWriteHalf, mut frames: mpsc::Receiver<Frame>) {
    let mut writer = FrameWriter::new(write);
    while let Some(Frame { kind, descriptors }) = frames.recv().await {
        let message = ToWorker { kind: Some(kind) };
        let said = if descriptors.is_empty() {
            writer.send(&message).await
        } else {
            send_with_descriptors(writer.inner().as_ref(), &message, &descriptors).await
        };
        if let Err(error) = said {
            // The worker's end is noticed by its task.
            tracing::debug!(%worker, %error, "could not tell the worker");
            return;
        }
    }
}

// === impl State ===

impl State {
    fn instance(&self) -> Option<(InstanceId, &ModelName)> {
        match self {
            Self::Starting | Self::Idle => None,
            Self::Loading { lodging, .. } | Self::Serving { lodging } | Self::Unloading { lodging, .. } => {
                Some((lodging.tenancy.instance, &lodging.tenancy.model))
            }
        }
    }

    fn phase(&self) -> Phase {
        let tenant = || self.instance().map(|(instance, model)| (instance, model.clone()));
        match self {
            Self::Starting => Phase::Starting,
            Self::Idle => Phase::Idle,
            Self::Loading { .. } => Phase::Loading(tenant()),
            Self::Serving { .. } => Phase::Serving(tenant()),
            Self::Unloading { .. } => Phase::Unloading(tenant()),
        }
    }

    /// Resolves when the instance that is being served is to go; pending for ever in other states.
    fn cancel(&self) -> impl Future<Output = ()> + use<> {
        let token = match self {
            Self::Serving { lodging }
            | Self::Unloading { lodging, force: false, .. }
            | Self::Loading { lodging, given_up: false, .. } => Some(lodging.tenancy.cancel.clone()),
            _ => None,
        };
        async move {
            match token {
                Some(token) => token.cancelled().await,
                None => std::future::pending().await,
            }
        }
    }
}

// === impl Lodging ===

impl Lodging {
    fn is(&self, instance: u64) -> bool {
        self.tenancy.instance.0 == instance
    }

    /// Its worker is no more: told to end, or not.
    fn died(self, told: bool) {
        let Self { weights, tenancy } = self;
        match weights {
            Weights::Device(lease) if !told => lease.keep(),
            weights => drop(weights),
        }
        drop(tenancy);
    }
}

// === impl Weights ===

impl Weights {
    /// How far they are, if they are on their way to a device.
    fn landing(&self) -> Option<watch::Receiver<Landing>> {
        match self {
            Self::Pool { .. } | Self::Remains { .. } => None,
            Self::Device(lease) => Some(lease.landing.clone()),
        }
    }

    /// Why they will never be there.
    fn failure(&self) -> Option<stoker_types::StartFailure> {
        self.landing().and_then(|landing| landing.borrow().failure())
    }

    fn give_up(&self) {
        if let Self::Device(lease) = self {
            lease.give_up();
        }
    }
}
