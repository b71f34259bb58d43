//! The handle that everybody holds, and how a request gets its seat.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use stoker_scheduler::{placement::NodeKey, residency::ModelKey};
use stoker_types::{Admit, InstanceId, ModelName, Refusal, SeatInfo, StartFailure};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    owner::Roster,
    seams::{Facts, NodeApi},
    state::{Grant, Reply, State},
    telemetry,
};

/// Longest wait that is kept as a time: a year, so that "for ever" can be added to now.
const WAIT_MAX: Duration = Duration::from_hours(365 * 24);

/// A way to the controller. Cheap to clone.
#[derive(Clone)]
pub struct ControllerHandle {
    pub(crate) shared: Arc<Shared>,
}

/// The right to run a request's sequences on an instance, until the permit is dropped.
#[derive(Debug)]
pub struct Seat {
    /// Where.
    pub info: SeatInfo,
    /// Dropping it gives the seat back.
    pub permit: Permit,
}

/// Gives its seat back when it is dropped: at once, without blocking, wherever it is dropped, also after the
/// controller has ended.
pub struct Permit {
    shared: Arc<Shared>,
    instance: InstanceId,
    sequences: u32,
    taken_at: Duration,
}

pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    /// Wakes the owner.
    pub(crate) notify: Notify,
    pub(crate) facts: Arc<dyn Facts>,
    /// The way to each server.
    pub(crate) nodes: Mutex<BTreeMap<NodeKey, Arc<dyn NodeApi>>>,
    /// To the owner: a server joined or left.
    pub(crate) roster: mpsc::UnboundedSender<Roster>,
    /// Ends the owner.
    pub(crate) closed: CancellationToken,
    epoch: Instant,
}

/// A request in a queue. Dropping it leaves the queue; a seat that was granted in the meantime is given back.
struct Waiting<'a> {
    shared: &'a Arc<Shared>,
    model: ModelKey,
    id: u64,
    reply: oneshot::Receiver<Reply>,
    ended: bool,
}

/// Whether the machine had too little memory, which may have changed since.
pub(crate) fn is_shortage(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Start(StartFailure::OutOfMemory { .. }))
}

// === impl ControllerHandle ===

impl ControllerHandle {
    /// Waits for a seat, at most `admit.wait_max`. First come, first served among the requests for a model; among
    /// models by priority and age. A request for more sequences than an instance runs at once gets a whole instance.
    ///
    /// Cancel-safe: dropping the future leaves the queue, and gives back a seat that was just granted.
    ///
    /// # Errors
    /// [`Refusal`]: the queue is full, the wait would be or was too long, the model can't be started, or the server
    /// is shutting down.
    pub async fn admit(&self, admit: Admit) -> Result<Seat, Refusal> {
        let result = self.admitted(&admit).await;
        if let Err(refusal) = &result {
            telemetry::refused(refusal);
        }
        result
    }

    async fn admitted(&self, admit: &Admit) -> Result<Seat, Refusal> {
        let now = self.shared.now();
        if let Some(grant) = self.shared.state.lock().seat_now(admit, now) {
            return Ok(self.seat(grant));
        }
        // Outside the lock: it is somebody else's code.
        let facts = self.shared.facts.facts(&admit.model);
        let deadline = Instant::now() + admit.wait_max.min(WAIT_MAX);
        let mut entered = self.shared.state.lock().enter(admit, facts.clone(), now);
        if entered.as_ref().err().is_some_and(is_shortage) {
            // By what was known of the machine; it may have more by now, and the node says who has it.
            self.shared.look().await;
            entered = self.shared.state.lock().enter(admit, facts, now);
        }
        let place = match entered {
            Ok(Ok(grant)) => return Ok(self.seat(grant)),
            Ok(Err(place)) => place,
            Err(refusal) => {
                if matches!(refusal, Refusal::NotInTime { .. }) {
                    // The start goes ahead, for when the client comes back.
                    self.shared.notify.notify_one();
                }
                return Err(refusal);
            }
        };
        let mut waiting = Waiting {
            shared: &self.shared,
            model: place.model,
            id: place.id,
            reply: place.reply,
            ended: false,
        };
        self.shared.notify.notify_one();
        let reply = match timeout_at(deadline, &mut waiting.reply).await {
            Ok(Ok(reply)) => {
                waiting.ended = true;
                reply
            }
            Ok(Err(_)) => Err(Refusal::ShuttingDown),
            Err(_) => waiting.out_of_time(admit),
        };
        reply.map(|grant| self.seat(grant))
    }

    /// A prompt of `tokens` passed through a model in `time`: makes estimates better.
    pub fn observe_prefill(&self, model: &ModelName, tokens: u32, time: Duration) {
        let now = self.shared.now();
        let mut state = self.shared.state.lock();
        if let Some(key) = state.key(model) {
            let bytes = state.model(key).facts.weight_bytes;
            let on = |id: &InstanceId| state.instances.get(id).map(|i| i.server);
            // Who computed it isn't said; where the model is on several servers, they count as alike.
            let servers: BTreeSet<NodeKey> = state.model(key).instances.iter().filter_map(on).collect();
            for server in servers {
                if let Some(server) = state.servers.get_mut(&server) {
                    server.estimator.observe_prefill(model, bytes, tokens, time, now);
                }
            }
        }
    }

    /// Refuses new requests and those that wait, then waits until the seats that are taken are given back, at most
    /// `grace`; ends the owner. Instances are left to the node. Returns the sequences that are still running.
    pub async fn shutdown(&self, grace: Duration) -> u32 {
        let mut changed = {
            let mut state = self.shared.state.lock();
            state.shut_down();
            state.changed.subscribe()
        };
        let deadline = Instant::now() + grace.min(WAIT_MAX);
        let left = loop {
            let left = self.shared.state.lock().seats_taken;
            if left == 0 || timeout_at(deadline, changed.changed()).await.is_err() {
                break left;
            }
        };
        self.shared.closed.cancel();
        left
    }

    fn seat(&self, grant: Grant) -> Seat {
        let permit = Permit {
            shared: Arc::clone(&self.shared),
            instance: grant.info.instance,
            sequences: grant.sequences,
            taken_at: grant.at,
        };
        Seat { info: grant.info, permit }
    }
}

impl fmt::Debug for ControllerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ControllerHandle")
    }
}

// === impl Shared ===

impl Shared {
    pub(crate) fn new(state: State, facts: Arc<dyn Facts>, roster: mpsc::UnboundedSender<Roster>) -> Self {
        Self {
            state: Mutex::new(state),
            notify: Notify::new(),
            facts,
            nodes: Mutex::default(),
            roster,
            closed: CancellationToken::new(),
            epoch: Instant::now(),
        }
    }

    /// Asks every node what it has now.
    pub(crate) async fn look(&self) {
        let nodes = self.nodes.lock().clone();
        let asked = nodes.into_iter().map(|(key, node)| async move { (key, node.snapshot().await) });
        let snapshots = futures::future::join_all(asked).await;
        let now = self.now();
        let mut state = self.state.lock();
        for (key, snapshot) in snapshots {
            state.observe(key, &snapshot, now);
        }
        drop(state);
        self.notify.notify_one();
    }

    /// Since the controller began.
    pub(crate) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub(crate) fn instant(&self, at: Duration) -> Instant {
        self.epoch + at.min(WAIT_MAX)
    }
}

// === impl Permit ===

impl Drop for Permit {
    fn drop(&mut self) {
        let now = self.shared.now();
        let look = self.shared.state.lock().release(self.instance, self.sequences, self.taken_at, now);
        if look {
            self.shared.notify.notify_one();
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("instance", &self.instance)
            .field("sequences", &self.sequences)
            .finish()
    }
}

// === impl Waiting ===

impl Waiting<'_> {
    /// The deadline has passed. A reply that was given at the same moment counts.
    fn out_of_time(&mut self, admit: &Admit) -> Reply {
        let now = self.shared.now();
        let mut state = self.shared.state.lock();
        self.ended = true;
        if state.leave(self.model, self.id) {
            let refusal = state.too_late(self.model, admit, now);
            drop(state);
            self.shared.notify.notify_one();
            return Err(refusal);
        }
        self.reply.try_recv().unwrap_or(Err(Refusal::ShuttingDown))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let now = self.shared.now();
        {
            let mut state = self.shared.state.lock();
            if !state.leave(self.model, self.id)
                && let Ok(Ok(grant)) = self.reply.try_recv()
            {
                state.release(grant.info.instance, grant.sequences, grant.at, now);
            }
        }
        self.shared.notify.notify_one();
    }
}
