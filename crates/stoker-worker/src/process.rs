//! The worker's main task: the conversation with the node, new connections, and the end.
//!
//! ```text
//! serving --Shutdown(grace)--> draining --no stream runs--> flushing --frames are written--> exit 0
//!  |   ^                        ^     |                         ^
//!  |   +--Resume--+             |     +--deadline: streams fail-+
//!  +--control closed--> alone --+ no node in time: without a deadline, as long as the engine moves
//! ```
//!
//! A node that comes connects to the successor's socket. Whoever connected last is the node: the directory's lock sees to it
//! that there is one. It hears [`Hello`] when everything that the one before ordered has come to an end.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use stoker_proto::{
    DescriptorReader, FrameReader, FrameWriter, PROTOCOL_VERSION,
    control::{
        FromWorker, Hello, Home, Landed, Load, LoadFailed, Rename, Renamed, ToWorker, Unload, UnloadRefused,
        Unloaded, Yielded, from_worker, to_worker,
    },
};
use tokio::{
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    connection,
    engine::{Command, Counters, Drained, UnloadOutcome},
    loader::{Landing, LoadError, LoadOrder},
};

/// Commands that may wait for the engine's thread; a gateway that sends more waits.
pub(crate) const COMMANDS_MAX: usize = 1024;

/// How long frames may take to be written when the worker ends, and how long the engine may take to let go of its
/// last step.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(5);

/// How long nobody is accepted after that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of a worker process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Most gateway connections at the same time; more are closed at once.
    pub connections_max: usize,
    /// Most bytes queued for a gateway that does not read; then its connection is closed.
    pub queue_bytes_max: usize,
    /// How long it serves on without a node. After that it takes no new stream and ends with the last one. Also how long the
    /// engine may take for a step then.
    pub orphan_grace: Duration,
}

/// What the worker is spoken to by.
pub(crate) struct Sockets {
    /// The node that started it.
    pub(crate) control: UnixStream,
    /// Gateways.
    pub(crate) listener: UnixListener,
    /// The node that comes next.
    pub(crate) successor: UnixListener,
}

/// What the worker is.
pub(crate) struct Said {
    /// What computes, in words.
    pub(crate) computes: String,
    /// Whether a model's weights have to be there before it is loaded.
    pub(crate) weights_first: bool,
}

/// Why the worker ended otherwise than told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("setting up failed: {0}")]
    Setup(#[from] io::Error),
    #[error("the engine's thread has stopped")]
    EngineGone,
    #[error("the engine did not come to the end of its step in {FLUSH_TIME_MAX:?}")]
    EngineStuck,
}

/// Serves until the node says shutdown, or there has been none for too long.
pub(crate) async fn serve(
    sockets: Sockets,
    pool: OwnedFd,
    said: Said,
    limits: WorkerLimits,
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
) -> Result<(), ServeError> {
    let Sockets { control, listener, successor } = sockets;
    // Whoever stops the server's processes may send this to all of them; when a worker ends is for its node to say.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let connections = TaskTracker::new();
    let mut connection_id = 0;
    let (replies, mut reply) = mpsc::channel(8);
    let mut node = Node::new(control, 0);
    let mut estate = Estate::new(said, pool, limits.orphan_grace, commands.clone(), replies)?;
    let mut end = End::default();
    loop {
        if !node.greeted && !node.gone && estate.under_way == 0 {
            node.greeted = true;
            node.say(from_worker::Kind::Hello(estate.hello(end.has_begun()))).await;
        }
        tokio::select! {
            message = node.next() => match message {
                Some(to_worker::Kind::Ping(ping)) => {
                    node.say(from_worker::Kind::Pong(counters.pong(ping.number))).await;
                }
                Some(to_worker::Kind::Home(Home { fleet })) => estate.fleet = fleet,
                Some(to_worker::Kind::Load(order)) => estate.load(order, &mut node),
                Some(to_worker::Kind::Landed(landed)) => estate.landed(landed, node.number),
                Some(to_worker::Kind::Unload(order)) => {
                    estate.ask(node.number, unload(order, commands.clone()));
                }
                Some(to_worker::Kind::Rename(order)) => {
                    estate.ask(node.number, rename(order, commands.clone()));
                }
                Some(to_worker::Kind::Yield(_)) => {
                    estate.yield_claim();
                    node.say(from_worker::Kind::Yielded(Yielded {})).await;
                }
                Some(to_worker::Kind::Resume(_)) => estate.resumed(node.descriptors()),
                Some(to_worker::Kind::Shutdown(order)) => {
                    tracing::info!(grace_ms = order.grace_ms, "shutting down");
                    end.begin(Duration::from_millis(order.grace_ms), &commands);
                }
                None => {
                    tracing::warn!(wait = ?limits.orphan_grace, "the node is gone; serving on until another one comes");
                    estate.orphaned(node.number);
                }
            },
            accepted = successor.accept() => match accepted {
                Ok((stream, _)) => {
                    estate.orphaned(node.number);
                    node = Node::new(stream, node.number + 1);
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a node failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(Answer { node: asked_by, outcome }) = reply.recv() => {
                if let Some(message) = estate.settle(outcome) && asked_by == node.number {
                    node.say(message).await;
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < limits.connections_max => {
                    connection_id += 1;
                    let id = connection_id;
                    let serving = connection::serve(id, stream, limits.queue_bytes_max, commands.clone());
                    connections.spawn(async move {
                        match serving.await {
                            Ok(()) => tracing::debug!(connection = id, "gateway disconnected"),
                            Err(error) => tracing::info!(connection = id, %error, "gateway connection ended"),
                        }
                    });
                }
                Ok(_) => tracing::warn!(connections_max = limits.connections_max, "too many gateway connections"),
                Err(error) => {
                    // Out of descriptors, most likely: give what is open time to close.
                    tracing::warn!(%error, "accepting a gateway failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = terminate.recv() => match estate.alone_until {
                None => tracing::info!("SIGTERM is left to the node"),
                // The machine is stopped, as it seems.
                Some(_) => end.begin(limits.orphan_grace, &commands),
            },
            _ = interrupt.recv() => tracing::info!("SIGINT is left to the node"),
            () = estate.too_long_alone(), if !end.has_begun() => {
                tracing::warn!("no node came; ending with the streams that run");
                end.begin_patiently(limits.orphan_grace, counters.steps(), &commands);
            }
            outcome = end.next() => match outcome {
                EndStep::Deadline => end.deadline_passed(counters.steps(), &commands),
                EndStep::Stuck => return Err(ServeError::EngineStuck),
                EndStep::EngineGone => return Err(ServeError::EngineGone),
                EndStep::Drained(drained) => {
                    let flushing = async {
                        for connection in &drained.connections {
                            connection.flushed().await;
                        }
                    };
                    if timeout(FLUSH_TIME_MAX, flushing).await.is_err() {
                        tracing::warn!("a gateway did not take its last frames");
                    }
                    return Ok(());
                }
            },
            () = commands.closed() => return Err(ServeError::EngineGone),
        }
    }
}

/// What is the worker's, whichever node it has.
struct Estate {
    said: Said,
    /// The pool's descriptor, the loader's own by another number: a claim on one is one on both.
    pool: OwnedFd,
    pool_identity: (u64, u64),
    /// The pool is without a claim of ours.
    yielded: bool,
    /// What the node calls the set that it belongs to.
    fleet: String,
    /// The model that it serves: its order, without the manifest.
    serving: Option<Load>,
    /// The model that was ordered last, if it isn't served yet.
    ordered: Option<Load>,
    /// Of the model that was ordered last.
    delivery: Option<Delivery>,
    /// Orders that have not come to their end.
    under_way: u32,
    grace: Duration,
    /// There is no node. At this moment it is enough.
    alone_until: Option<Instant>,
    commands: mpsc::Sender<Command>,
    replies: mpsc::Sender<Answer>,
}

/// What came of an order, and which node gave it.
struct Answer {
    node: u64,
    outcome: Outcome,
}

enum Outcome {
    /// This is to be said.
    Say(from_worker::Kind),
    /// The instance was there, or not.
    Renamed(Rename, bool),
    /// A model whose weights didn't arrive was being served, and is dropped.
    Dropped(u64),
    Nothing,
}

/// A model's way to the device.
struct Delivery {
    instance: u64,
    landing: watch::Sender<Landing>,
}

/// The control connection.
struct Node {
    /// Which of those that there were.
    number: u64,
    reader: FrameReader<DescriptorReader<OwnedReadHalf>>,
    writer: FrameWriter<OwnedWriteHalf>,
    greeted: bool,
    gone: bool,
}

/// The way to the process's end.
#[derive(Default)]
struct End {
    drained: Option<oneshot::Receiver<Drained>>,
    deadline: Option<Instant>,
    /// The deadline moves by so much as long as the engine does: its steps at the last look.
    patience: Option<(Duration, u64)>,
    finishing: bool,
}

enum EndStep {
    Deadline,
    Drained(Drained),
    Stuck,
    EngineGone,
}

// === impl Estate ===

impl Estate {
    fn new(
        said: Said,
        pool: OwnedFd,
        grace: Duration,
        commands: mpsc::Sender<Command>,
        replies: mpsc::Sender<Answer>,
    ) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&pool)?;
        Ok(Self {
            said,
            pool,
            pool_identity: (stat.st_dev, stat.st_ino),
            yielded: false,
            fleet: String::new(),
            serving: None,
            ordered: None,
            delivery: None,
            under_way: 0,
            grace,
            alone_until: None,
            commands,
            replies,
        })
    }

    fn hello(&self, ending: bool) -> Hello {
        let (pool_device, pool_inode) = self.pool_identity;
        Hello {
            protocol: PROTOCOL_VERSION,
            pid: std::process::id(),
            device: self.said.computes.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fleet: self.fleet.clone(),
            serving: self.serving.clone().map(Box::new),
            pool_device,
            pool_inode,
            ending,
        }
    }

    fn load(&mut self, order: Load, node: &mut Node) {
        self.ordered = Some(Load { manifest_json: bytes::Bytes::new(), ..order.clone() });
        let (order, delivery) = Delivery::of(order, node.descriptors());
        self.delivery = Some(delivery);
        self.ask(node.number, load(order, self.said.weights_first, self.commands.clone()));
    }

    fn landed(&mut self, landed: Landed, node: u64) {
        if self.delivery.as_ref().is_some_and(|delivery| delivery.landed(landed)) {
            self.ask(node, not_delivered(self.commands.clone()));
        }
    }

    /// The node is gone. What it was delivering will never be there.
    fn orphaned(&mut self, node: u64) {
        if self.delivery.as_ref().is_some_and(Delivery::abandoned) {
            self.ask(node, not_delivered(self.commands.clone()));
        }
        self.renew_claim();
        self.alone_until = Some(Instant::now() + self.grace);
    }

    fn resumed(&mut self, descriptors: &mut DescriptorReader<OwnedReadHalf>) {
        self.renew_claim();
        self.alone_until = None;
        match descriptors.take(1).and_then(|mut log| log.pop()) {
            Some(log) => {
                if let Err(error) = rustix::stdio::dup2_stderr(&log) {
                    tracing::warn!(%error, "the log goes nowhere");
                }
            }
            None => tracing::warn!("the node has no place for the log"),
        }
        tracing::info!("another node has taken this worker over");
    }

    fn yield_claim(&mut self) {
        self.yielded = true;
        if let Err(error) = stoker_io::yield_claim(&self.pool) {
            tracing::warn!(%error, "the pool's memory can't be let go of");
        }
    }

    fn renew_claim(&mut self) {
        if std::mem::take(&mut self.yielded)
            && let Err(error) = stoker_io::renew_claim(&self.pool)
        {
            // The next node hears of this worker by its socket all the same.
            tracing::warn!(%error, "the pool's memory can't be claimed again");
        }
    }

    /// Pending for ever while there is a node. Cancel-safe.
    async fn too_long_alone(&self) {
        match self.alone_until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    }

    /// Has the engine's answer to an order come back as an [`Answer`]. The node has a few orders under way at most, so no
    /// more than a few tasks.
    fn ask(&mut self, node: u64, order: impl Future<Output = Option<Outcome>> + Send + 'static) {
        self.under_way += 1;
        let replies = self.replies.clone();
        tokio::spawn(async move {
            let outcome = order.await.unwrap_or(Outcome::Nothing);
            // Without the main task the process is ending.
            let _ = replies.send(Answer { node, outcome }).await;
        });
    }

    /// Takes note of what came of an order. Returns what is to be said of it.
    fn settle(&mut self, outcome: Outcome) -> Option<from_worker::Kind> {
        self.under_way -= 1;
        let serves = |serving: &Option<Load>, instance: u64| {
            serving.as_ref().is_some_and(|serving| serving.instance == instance)
        };
        match outcome {
            Outcome::Say(kind) => {
                match &kind {
                    from_worker::Kind::Loaded(loaded) if serves(&self.ordered, loaded.instance) => {
                        self.serving = self.ordered.take();
                    }
                    from_worker::Kind::LoadFailed(failed) if serves(&self.ordered, failed.instance) => {
                        self.ordered = None;
                    }
                    from_worker::Kind::Unloaded(unloaded) if serves(&self.serving, unloaded.instance) => {
                        self.serving = None;
                    }
                    _ => {}
                }
                Some(kind)
            }
            Outcome::Renamed(Rename { from, to, generation }, there) => {
                if there && let Some(serving) = self.serving.as_mut().filter(|s| s.instance == from) {
                    (serving.instance, serving.generation) = (to, generation);
                }
                let instance = if there { to } else { from };
                Some(from_worker::Kind::Renamed(Renamed { instance, there }))
            }
            Outcome::Dropped(instance) => {
                if serves(&self.serving, instance) {
                    self.serving = None;
                }
                None
            }
            Outcome::Nothing => None,
        }
    }
}

// === impl Delivery ===

impl Delivery {
    /// Of a model that is ordered. `descriptors` takes those that came with the order.
    fn of(load: Load, descriptors: &mut DescriptorReader<OwnedReadHalf>) -> (LoadOrder, Self) {
        let begun = match &load.slab {
            Some(slab) => usize::try_from(slab.granules).ok().and_then(|count| descriptors.take(count)),
            None => Some(Vec::new()),
        };
        let landing = match (&load.slab, &begun) {
            (None, _) => Landing::Landed,
            (Some(_), Some(_)) => Landing::Coming,
            (Some(slab), None) => {
                Landing::Failed(format!("{} descriptors did not come with the order", slab.granules))
            }
        };
        let (sender, landing) = watch::channel(landing);
        let delivery = Self { instance: load.instance, landing: sender };
        (LoadOrder { load, granules: begun.unwrap_or_default(), landing }, delivery)
    }

    /// Whoever delivered is gone. True: before everything was there.
    fn abandoned(&self) -> bool {
        self.landing.send_if_modified(|landing| {
            let coming = *landing == Landing::Coming;
            if coming {
                *landing = Landing::Failed("the node is gone".into());
            }
            coming
        })
    }

    /// The node says how it ended. True: it failed.
    fn landed(&self, landed: Landed) -> bool {
        let Landed { instance, error } = landed;
        if instance != self.instance {
            // Of a model that has been let go of.
            return false;
        }
        let failed = error.is_some();
        self.landing.send_replace(error.map_or(Landing::Landed, Landing::Failed));
        failed
    }
}

// === impl Node ===

impl Node {
    fn new(control: UnixStream, number: u64) -> Self {
        let (read, write) = control.into_split();
        let reader = FrameReader::new(DescriptorReader::new(read));
        Self { number, reader, writer: FrameWriter::new(write), greeted: false, gone: false }
    }

    /// Descriptors that have come.
    fn descriptors(&mut self) -> &mut DescriptorReader<OwnedReadHalf> {
        self.reader.inner_mut()
    }

    /// The next message; `None`, once, when the node is gone. Pending for ever after that. Cancel-safe.
    async fn next(&mut self) -> Option<to_worker::Kind> {
        if self.gone {
            return std::future::pending().await;
        }
        loop {
            match self.reader.next::<ToWorker>().await {
                Ok(Some(ToWorker { kind: Some(kind) })) => return Some(kind),
                Ok(Some(ToWorker { kind: None })) => {
                    tracing::warn!("a newer node said what this worker doesn't know")
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "control connection failed");
                    break;
                }
            }
        }
        self.gone = true;
        None
    }

    async fn say(&mut self, kind: from_worker::Kind) {
        // A node that is gone is noticed by reading.
        if !self.gone
            && let Err(error) = self.writer.send(&FromWorker { kind: Some(kind) }).await
        {
            tracing::warn!(%error, "could not answer the node");
        }
    }
}

// === impl End ===

impl End {
    /// No new streams from here on; those that run may take `grace`. Said again, the earlier deadline holds.
    fn begin(&mut self, grace: Duration, commands: &mpsc::Sender<Command>) {
        let deadline = Instant::now() + grace;
        if !self.finishing {
            // One that moves is no deadline.
            let before = self.deadline.filter(|_| self.patience.is_none());
            self.deadline = Some(before.map_or(deadline, |d| d.min(deadline)));
            self.patience = None;
        }
        self.drain(commands);
    }

    /// As [`Self::begin`], for as long as the engine moves: a step may take `patience`.
    fn begin_patiently(&mut self, patience: Duration, steps: u64, commands: &mpsc::Sender<Command>) {
        self.patience = Some((patience, steps));
        self.deadline = Some(Instant::now() + patience);
        self.drain(commands);
    }

    fn has_begun(&self) -> bool {
        self.drained.is_some()
    }

    fn drain(&mut self, commands: &mpsc::Sender<Command>) {
        if self.drained.is_none() {
            let (reply, drained) = oneshot::channel();
            self.drained = Some(drained);
            send(Command::Drain { reply }, commands);
        }
    }

    /// The deadline has passed: it moves, or the streams' time is up.
    fn deadline_passed(&mut self, steps: u64, commands: &mpsc::Sender<Command>) {
        match self.patience {
            Some((patience, before)) if steps != before => {
                self.patience = Some((patience, steps));
                self.deadline = Some(Instant::now() + patience);
            }
            _ => self.finish(commands),
        }
    }

    fn finish(&mut self, commands: &mpsc::Sender<Command>) {
        tracing::warn!("ending the streams that still run");
        self.finishing = true;
        self.deadline = Some(Instant::now() + FLUSH_TIME_MAX);
        send(Command::Finish, commands);
    }

    /// What comes next on the way to the end. Pending for ever while the worker serves. Cancel-safe.
    async fn next(&mut self) -> EndStep {
        let (Some(drained), Some(deadline)) = (&mut self.drained, self.deadline) else {
            return std::future::pending().await;
        };
        tokio::select! {
            drained = drained => drained.map_or(EndStep::EngineGone, EndStep::Drained),
            () = sleep_until(deadline) => if self.finishing { EndStep::Stuck } else { EndStep::Deadline },
        }
    }
}

/// Sends a command without waiting here: the queue may be full, and pings are to be answered all the same. The node
/// has a few orders under way at most, so no more than a few tasks.
fn send(command: Command, commands: &mpsc::Sender<Command>) {
    let commands = commands.clone();
    tokio::spawn(async move {
        // An engine that has gone is noticed by the main task.
        let _ = commands.send(command).await;
    });
}

async fn load(mut order: LoadOrder, weights_first: bool, commands: mpsc::Sender<Command>) -> Option<Outcome> {
    let instance = order.load.instance;
    if weights_first {
        // Without the node the process is ending.
        order.landing.wait_for(|landing| *landing != Landing::Coming).await.ok()?;
    }
    let (reply, outcome) = oneshot::channel();
    commands.send(Command::Load { order: Box::new(order), reply }).await.ok()?;
    Some(Outcome::Say(match outcome.await.ok()? {
        Ok(loaded) => from_worker::Kind::Loaded(loaded),
        Err(error) => {
            let not_runnable = matches!(error, LoadError::NotRunnable(_));
            from_worker::Kind::LoadFailed(LoadFailed { instance, not_runnable, message: error.to_string() })
        }
    }))
}

async fn unload(order: Unload, commands: mpsc::Sender<Command>) -> Option<Outcome> {
    let Unload { instance, force } = order;
    let (reply, outcome) = oneshot::channel();
    commands.send(Command::Unload { instance, force, reply }).await.ok()?;
    Some(Outcome::Say(match outcome.await.ok()? {
        UnloadOutcome::Unloaded => from_worker::Kind::Unloaded(Unloaded { instance }),
        UnloadOutcome::Refused { sequences } => {
            from_worker::Kind::UnloadRefused(UnloadRefused { instance, sequences })
        }
    }))
}

async fn rename(order: Rename, commands: mpsc::Sender<Command>) -> Option<Outcome> {
    let (reply, there) = oneshot::channel();
    commands.send(Command::Rename { order, reply }).await.ok()?;
    Some(Outcome::Renamed(order, there.await.ok()?))
}

async fn not_delivered(commands: mpsc::Sender<Command>) -> Option<Outcome> {
    let (reply, dropped) = oneshot::channel();
    commands.send(Command::NotDelivered { reply }).await.ok()?;
    dropped.await.ok()?.map(Outcome::Dropped)
}
