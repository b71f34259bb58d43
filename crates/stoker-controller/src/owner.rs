//! The one task that decides and gives orders.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use stoker_scheduler::placement::NodeKey;
use stoker_types::{
    InstanceId, NodeEvent, NodeSnapshot, StartFailure, Started, StopFailure, WorkerId, WorkerStatus, clock,
};
use tokio::{
    sync::mpsc,
    task::{Id, JoinError, JoinHandle, JoinSet},
    time::sleep_until,
};
use tokio_stream::{
    StreamExt as _, StreamMap,
    wrappers::{BroadcastStream, errors::BroadcastStreamRecvError},
};

use crate::{
    admit::{ControllerHandle, Shared},
    config::{Config, ServerConfig},
    seams::{Facts, NodeApi},
    state::{Order, State, Wanted},
    telemetry,
};

/// A server that has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerKey(pub(crate) NodeKey);

/// Begins: brings the preloaded models to devices, as far as there is room, then serves. Servers join with
/// [`ControllerHandle::join`]. The task ends with [`ControllerHandle::shutdown`].
///
/// # Panics
/// Outside a tokio runtime.
pub fn spawn(config: Config, facts: Arc<dyn Facts>) -> (ControllerHandle, JoinHandle<()>) {
    telemetry::describe();
    let mut state = State::new(config);
    for model in facts.preloaded() {
        let Some(facts) = facts.facts(&model) else { continue };
        let key = state.know(facts);
        state.model_mut(key).wanted = Some(Wanted { since: Duration::ZERO, until: None, evicts: false });
        state.mark(key);
    }
    let (roster, changes) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared::new(state, facts, roster));
    let owner = Owner {
        shared: Arc::clone(&shared),
        roster: changes,
        nodes: BTreeMap::new(),
        events: StreamMap::new(),
        operations: JoinSet::new(),
        instances: HashMap::new(),
    };
    (ControllerHandle { shared }, tokio::spawn(owner.run()))
}

/// A change of who is there. There are as many as joins and leaves.
pub(crate) enum Roster {
    Joined(NodeKey, Arc<dyn NodeApi>),
    Left(NodeKey),
}

struct Owner {
    shared: Arc<Shared>,
    roster: mpsc::UnboundedReceiver<Roster>,
    nodes: BTreeMap<NodeKey, Watched>,
    events: StreamMap<NodeKey, BroadcastStream<NodeEvent>>,
    operations: JoinSet<Done>,
    /// Of which instance of which server a running start or stop is; `None`: a server's snapshot.
    instances: HashMap<Id, (NodeKey, Option<(InstanceId, bool)>)>,
}

/// A node, and whether it has to be asked how it is.
struct Watched {
    node: Arc<dyn NodeApi>,
    snapshot: Snapshot,
    /// The next snapshot also says which workers are alive: events were missed.
    reconcile: bool,
}

/// Idle -> Due when something changed; Due -> Running at once; Running -> Due when something changed meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Snapshot {
    Idle,
    Due,
    Running { again: bool },
}

enum Done {
    Started {
        server: NodeKey,
        instance: InstanceId,
        ordered_at: Duration,
        result: Result<Started, StartFailure>,
        /// Of the node that found no room: it has less than was known when the start was decided.
        snapshot: Option<NodeSnapshot>,
    },
    Stopped {
        server: NodeKey,
        instance: InstanceId,
        result: Result<(), StopFailure>,
    },
    Snapshot {
        server: NodeKey,
        snapshot: NodeSnapshot,
        should_live: Vec<InstanceId>,
    },
}

// === impl ControllerHandle ===

impl ControllerHandle {
    /// A server that may have instances from now on.
    #[must_use = "a server leaves by its key"]
    pub fn join(&self, config: ServerConfig, node: Arc<dyn NodeApi>) -> ServerKey {
        let now = self.shared.now();
        let key = self.shared.state.lock().join(config, now);
        self.shared.nodes.lock().insert(key, Arc::clone(&node));
        // The owner is gone after a shutdown only: then nothing is to be watched.
        let _ = self.shared.roster.send(Roster::Joined(key, node));
        ServerKey(key)
    }

    /// A server is gone, with everything on it. `reason`: in words, for whoever asks what became of its instances.
    pub fn leave(&self, server: ServerKey, reason: &str) {
        let now = self.shared.now();
        self.shared.nodes.lock().remove(&server.0);
        self.shared.state.lock().part(server.0, reason, now);
        let _ = self.shared.roster.send(Roster::Left(server.0));
        self.shared.notify.notify_one();
    }
}

// === impl Owner ===

impl Owner {
    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        loop {
            let wakeup = self.decide().map(|at| shared.instant(at));
            self.refresh();
            // Each branch's future is cancel-safe: what is not ready now is asked again in the next turn.
            tokio::select! {
                biased;
                () = shared.closed.cancelled() => break,
                Some(done) = self.operations.join_next_with_id() => self.done(done),
                Some(change) = self.roster.recv() => self.change(change),
                Some((server, event)) = self.events.next(), if !self.events.is_empty() => match event {
                    Ok(event) => self.event(server, event),
                    Err(BroadcastStreamRecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "fell behind the node's events; asking which workers are alive");
                        if let Some(watched) = self.nodes.get_mut(&server) {
                            watched.reconcile = true;
                            watched.due();
                        }
                    }
                },
                () = shared.notify.notified() => {}
                () = sleep_until(wakeup.unwrap_or_else(tokio::time::Instant::now)), if wakeup.is_some() => {}
            }
        }
        // The nodes end what is under way.
        self.operations.detach_all();
    }

    fn change(&mut self, change: Roster) {
        match change {
            Roster::Joined(key, node) => {
                self.events.insert(key, BroadcastStream::new(node.events()));
                self.nodes.insert(key, Watched { node, snapshot: Snapshot::Due, reconcile: false });
            }
            Roster::Left(key) => {
                self.events.remove(&key);
                self.nodes.remove(&key);
            }
        }
    }

    /// Decides and sends the orders out; returns when to look again.
    fn decide(&mut self) -> Option<Duration> {
        let began = clock::now();
        let now = self.shared.now();
        let (orders, wakeup) = {
            let mut state = self.shared.state.lock();
            state.decide(now);
            (state.take_orders(), state.wakeup)
        };
        telemetry::decided(began.elapsed());
        for order in orders {
            self.order(order);
        }
        wakeup
    }

    fn order(&mut self, order: Order) {
        let shared = Arc::clone(&self.shared);
        let (Order::Start(server, _) | Order::Stop(server, ..)) = &order;
        let server = *server;
        let Some(node) = shared.nodes.lock().get(&server).cloned() else {
            // It left in between, and its instances with it.
            return;
        };
        match order {
            Order::Start(_, order) => {
                let instance = order.instance;
                let task = self.operations.spawn(async move {
                    let ordered_at = shared.now();
                    let result = node.start(order).await;
                    let snapshot = match &result {
                        Err(StartFailure::OutOfMemory { .. }) => Some(node.snapshot().await),
                        _ => None,
                    };
                    Done::Started { server, instance, ordered_at, result, snapshot }
                });
                self.instances.insert(task.id(), (server, Some((instance, true))));
            }
            Order::Stop(_, instance, mode) => {
                let task = self.operations.spawn(async move {
                    let result = node.stop(instance, mode).await;
                    Done::Stopped { server, instance, result }
                });
                self.instances.insert(task.id(), (server, Some((instance, false))));
            }
        }
    }

    fn due(&mut self, server: NodeKey) {
        self.nodes.get_mut(&server).into_iter().for_each(Watched::due);
    }

    /// Asks for the snapshots that are due and not on their way.
    fn refresh(&mut self) {
        for (server, watched) in &mut self.nodes {
            if watched.snapshot != Snapshot::Due {
                continue;
            }
            let server = *server;
            watched.snapshot = Snapshot::Running { again: false };
            let should_live = if std::mem::take(&mut watched.reconcile) {
                self.shared.state.lock().serving(server)
            } else {
                Vec::new()
            };
            let node = Arc::clone(&watched.node);
            let task = self.operations.spawn(async move {
                let snapshot = node.snapshot().await;
                Done::Snapshot { server, snapshot, should_live }
            });
            self.instances.insert(task.id(), (server, None));
        }
    }

    fn done(&mut self, done: Result<(Id, Done), JoinError>) {
        let now = self.shared.now();
        let (id, done) = match done {
            Ok((id, done)) => (id, done),
            Err(error) => return self.panicked(&error, now),
        };
        self.instances.remove(&id);
        match done {
            Done::Started { server, instance, ordered_at, result, snapshot } => {
                let mut state = self.shared.state.lock();
                if let Some(snapshot) = snapshot {
                    state.observe(server, &snapshot, now);
                }
                state.started(instance, result, ordered_at, now);
                drop(state);
                self.due(server);
            }
            Done::Stopped { server, instance, result } => {
                self.shared.state.lock().stopped(instance, &result, now);
                self.due(server);
            }
            Done::Snapshot { server, snapshot, should_live } => {
                let Some(watched) = self.nodes.get_mut(&server) else { return };
                let again = watched.snapshot == Snapshot::Running { again: true } || watched.reconcile;
                watched.snapshot = if again { Snapshot::Due } else { Snapshot::Idle };
                let mut state = self.shared.state.lock();
                state.observe(server, &snapshot, now);
                for instance in should_live {
                    let has_worker =
                        |w: &WorkerStatus| w.instance.as_ref().is_some_and(|(id, _)| *id == instance);
                    if !snapshot.workers.iter().any(has_worker) {
                        state.lost(server, WorkerId::default(), Some(instance), "it has no worker", now);
                    }
                }
            }
        }
    }

    /// The node's code panicked under an order. Its instance must not stay in between for ever.
    fn panicked(&mut self, error: &JoinError, now: Duration) {
        tracing::error!(%error, "the node failed in an order");
        let Some((server, order)) = self.instances.remove(&error.id()) else { return };
        let Some((instance, start)) = order else {
            if let Some(watched) = self.nodes.get_mut(&server) {
                watched.snapshot = Snapshot::Idle;
            }
            return;
        };
        let mut state = self.shared.state.lock();
        if start {
            let Some(model) = state.instances.get(&instance).map(|i| i.model) else { return };
            let model = state.model(model).facts.model.clone();
            let failure = StartFailure::Worker { model, detail: format!("the node failed: {error}") };
            state.started(instance, Err(failure), now, now);
        } else {
            state.stopped(instance, &Err(StopFailure::Unknown { instance }), now);
        }
    }

    fn event(&mut self, server: NodeKey, event: NodeEvent) {
        let now = self.shared.now();
        match event {
            NodeEvent::WorkerLost { worker, instance, reason, last_lines } => {
                let reason = match last_lines.last() {
                    Some(line) => format!("{reason}: {line}"),
                    None => reason,
                };
                self.shared.state.lock().lost(server, worker, instance, &reason, now);
                self.due(server);
            }
            NodeEvent::InstanceLanded { instance, took, timeline } => {
                self.shared.state.lock().landed(instance, took, timeline, now);
                self.due(server);
            }
            NodeEvent::InstanceLost { instance, failure } => {
                self.shared.state.lock().undelivered(instance, failure, now);
                self.due(server);
            }
            NodeEvent::ResidencyChanged => self.due(server),
            NodeEvent::Measured { model, tier, bytes, time } => {
                let mut state = self.shared.state.lock();
                // A start reports its own load: counted once.
                let is_here = |id: &InstanceId| state.instances.get(id).is_some_and(|i| i.server == server);
                let starts =
                    state.key(&model).is_some_and(|key| state.model(key).instances.iter().any(is_here));
                if !starts && let Some(server) = state.servers.get_mut(&server) {
                    server.estimator.observe_copy(tier, &model, bytes, time, now);
                }
            }
        }
    }
}

// === impl Watched ===

impl Watched {
    fn due(&mut self) {
        self.snapshot = match self.snapshot {
            Snapshot::Idle | Snapshot::Due => Snapshot::Due,
            Snapshot::Running { .. } => Snapshot::Running { again: true },
        };
    }
}
