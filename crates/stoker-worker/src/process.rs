//! The worker's main task: the conversation with the node, new connections, and the end.
//!
//! ```text
//! serving --Shutdown(grace)--> draining --no stream runs--> flushing --frames are written--> exit 0
//!    |                          ^     |                         ^
//!    +--control closed----------+     +--deadline: streams fail-+
//!      (grace = orphan_grace)
//! ```

use std::{io, sync::Arc, time::Duration};

use stoker_proto::{
    DescriptorReader, FrameReader, FrameWriter, PROTOCOL_VERSION,
    control::{
        FromWorker, Hello, Landed, Load, LoadFailed, ToWorker, Unload, UnloadRefused, Unloaded, from_worker,
        to_worker,
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

/// Bounds of a worker process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Most gateway connections at the same time; more are closed at once.
    pub connections_max: usize,
    /// Most bytes queued for a gateway that does not read; then its connection is closed.
    pub queue_bytes_max: usize,
    /// How long streams may go on when the node is gone.
    pub orphan_grace: Duration,
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

/// Serves until the node says shutdown or is gone.
pub(crate) async fn serve(
    control: UnixStream,
    listener: UnixListener,
    said: Said,
    limits: WorkerLimits,
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
) -> Result<(), ServeError> {
    let (read, write) = control.into_split();
    // Whoever stops the server's processes may send this to all of them; when a worker ends is for its node to say.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let reader = FrameReader::new(DescriptorReader::new(read));
    let mut node = Node { reader, writer: FrameWriter::new(write), gone: false };
    let Said { computes, weights_first } = said;
    let hello = Hello { protocol: PROTOCOL_VERSION, pid: std::process::id(), device: computes };
    node.say(from_worker::Kind::Hello(hello)).await;

    let connections = TaskTracker::new();
    let mut connection_id = 0;
    let (replies, mut reply) = mpsc::channel(8);
    let mut end = End::default();
    // Of the model that was ordered last.
    let mut delivery: Option<Delivery> = None;
    loop {
        tokio::select! {
            message = node.next() => match message {
                Some(to_worker::Kind::Ping(ping)) => {
                    node.say(from_worker::Kind::Pong(counters.pong(ping.number))).await;
                }
                Some(to_worker::Kind::Load(order)) => {
                    let (order, ordered) = Delivery::of(order, node.descriptors());
                    delivery = Some(ordered);
                    ask(load(order, weights_first, commands.clone()), &replies);
                }
                Some(to_worker::Kind::Landed(landed)) => {
                    if delivery.as_ref().is_some_and(|delivery| delivery.landed(landed)) {
                        send(Command::NotDelivered, &commands);
                    }
                }
                Some(to_worker::Kind::Unload(order)) => ask(unload(order, commands.clone()), &replies),
                Some(to_worker::Kind::Shutdown(order)) => {
                    tracing::info!(grace_ms = order.grace_ms, "shutting down");
                    end.begin(Duration::from_millis(order.grace_ms), &commands);
                }
                None => {
                    if delivery.as_ref().is_some_and(Delivery::abandoned) {
                        send(Command::NotDelivered, &commands);
                    }
                    tracing::warn!(grace = ?limits.orphan_grace, "the node is gone; running streams may finish");
                    end.begin(limits.orphan_grace, &commands);
                }
            },
            Some(message) = reply.recv() => node.say(message).await,
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
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = terminate.recv() => tracing::info!("SIGTERM is left to the node"),
            _ = interrupt.recv() => tracing::info!("SIGINT is left to the node"),
            outcome = end.next() => match outcome {
                EndStep::Deadline => end.finish(&commands),
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

/// A model's way to the device.
struct Delivery {
    instance: u64,
    landing: watch::Sender<Landing>,
}

/// The control connection.
struct Node {
    reader: FrameReader<DescriptorReader<OwnedReadHalf>>,
    writer: FrameWriter<OwnedWriteHalf>,
    gone: bool,
}

/// The way to the process's end.
#[derive(Default)]
struct End {
    drained: Option<oneshot::Receiver<Drained>>,
    deadline: Option<Instant>,
    finishing: bool,
}

enum EndStep {
    Deadline,
    Drained(Drained),
    Stuck,
    EngineGone,
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
            self.deadline = Some(self.deadline.map_or(deadline, |d| d.min(deadline)));
        }
        if self.drained.is_none() {
            let (reply, drained) = oneshot::channel();
            self.drained = Some(drained);
            send(Command::Drain { reply }, commands);
        }
    }

    /// The streams' time is up.
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

/// Has the engine's answer to an order sent to the node when it comes.
fn ask(
    order: impl Future<Output = Option<from_worker::Kind>> + Send + 'static,
    replies: &mpsc::Sender<from_worker::Kind>,
) {
    let replies = replies.clone();
    tokio::spawn(async move {
        if let Some(reply) = order.await {
            // Without the main task the process is ending.
            let _ = replies.send(reply).await;
        }
    });
}

async fn load(
    mut order: LoadOrder,
    weights_first: bool,
    commands: mpsc::Sender<Command>,
) -> Option<from_worker::Kind> {
    let instance = order.load.instance;
    if weights_first {
        // Without the node the process is ending.
        order.landing.wait_for(|landing| *landing != Landing::Coming).await.ok()?;
    }
    let (reply, outcome) = oneshot::channel();
    commands.send(Command::Load { order: Box::new(order), reply }).await.ok()?;
    Some(match outcome.await.ok()? {
        Ok(loaded) => from_worker::Kind::Loaded(loaded),
        Err(error) => {
            let not_runnable = matches!(error, LoadError::NotRunnable(_));
            from_worker::Kind::LoadFailed(LoadFailed { instance, not_runnable, message: error.to_string() })
        }
    })
}

async fn unload(order: Unload, commands: mpsc::Sender<Command>) -> Option<from_worker::Kind> {
    let Unload { instance, force } = order;
    let (reply, outcome) = oneshot::channel();
    commands.send(Command::Unload { instance, force, reply }).await.ok()?;
    Some(match outcome.await.ok()? {
        UnloadOutcome::Unloaded => from_worker::Kind::Unloaded(Unloaded { instance }),
        UnloadOutcome::Refused { sequences } => {
            from_worker::Kind::UnloadRefused(UnloadRefused { instance, sequences })
        }
    })
}
