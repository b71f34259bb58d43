//! The one task that decides and gives orders.

use std::{collections::HashMap, sync::Arc, time::Duration};

use stoker_types::{InstanceId, NodeEvent, NodeSnapshot, StartFailure, Started, StopFailure, clock};
use tokio::{
    sync::broadcast::error::RecvError,
    task::{Id, JoinError, JoinHandle, JoinSet},
    time::sleep_until,
};

use crate::{
    admit::{ControllerHandle, Shared},
    config::Config,
    seams::{Facts, NodeApi},
    state::{Order, State, Wanted},
    telemetry,
};

/// Begins: brings the preloaded models to the device, as far as there is room, then serves. The task ends with
/// [`ControllerHandle::shutdown`].
///
/// # Panics
/// Outside a tokio runtime.
pub fn spawn(
    config: Config,
    node: Arc<dyn NodeApi>,
    facts: Arc<dyn Facts>,
) -> (ControllerHandle, JoinHandle<()>) {
    telemetry::describe();
    let mut state = State::new(config);
    for model in facts.preloaded() {
        let Some(facts) = facts.facts(&model) else { continue };
        let key = state.know(facts);
        if let Err(error) = &state.model(key).sizing {
            tracing::warn!(%model, %error, "can't be preloaded");
            continue;
        }
        state.model_mut(key).wanted = Some(Wanted { since: Duration::ZERO, until: None, evicts: false });
        state.mark(key);
    }
    let shared = Arc::new(Shared::new(state, facts, Arc::clone(&node)));
    let owner = Owner {
        shared: Arc::clone(&shared),
        node,
        operations: JoinSet::new(),
        instances: HashMap::new(),
        snapshot: Snapshot::Due,
        reconcile: false,
    };
    (ControllerHandle { shared }, tokio::spawn(owner.run()))
}

struct Owner {
    shared: Arc<Shared>,
    node: Arc<dyn NodeApi>,
    operations: JoinSet<Done>,
    /// Of which instance a running start or stop is.
    instances: HashMap<Id, (InstanceId, bool)>,
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
        instance: InstanceId,
        ordered_at: Duration,
        result: Result<Started, StartFailure>,
        /// Of the node that found no room: it has less than was known when the start was decided.
        snapshot: Option<NodeSnapshot>,
    },
    Stopped {
        instance: InstanceId,
        result: Result<(), StopFailure>,
    },
    Snapshot {
        snapshot: NodeSnapshot,
        should_live: Vec<InstanceId>,
    },
}

// === impl Owner ===

impl Owner {
    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut events = self.node.events();
        let mut events_open = true;
        loop {
            let wakeup = self.decide().map(|at| shared.instant(at));
            self.refresh();
            // Each branch's future is cancel-safe: what is not ready now is asked again in the next turn.
            tokio::select! {
                biased;
                () = shared.closed.cancelled() => break,
                Some(done) = self.operations.join_next_with_id() => self.done(done),
                event = events.recv(), if events_open => match event {
                    Ok(event) => self.event(event),
                    Err(RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "fell behind the node's events; asking which workers are alive");
                        self.reconcile = true;
                        self.due();
                    }
                    Err(RecvError::Closed) => events_open = false,
                },
                () = shared.notify.notified() => {}
                () = sleep_until(wakeup.unwrap_or_else(tokio::time::Instant::now)), if wakeup.is_some() => {}
            }
        }
        // The node ends what is under way.
        self.operations.detach_all();
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
        let node = Arc::clone(&self.node);
        let shared = Arc::clone(&self.shared);
        match order {
            Order::Start(order) => {
                let instance = order.instance;
                let task = self.operations.spawn(async move {
                    let ordered_at = shared.now();
                    let result = node.start(order).await;
                    let snapshot = match &result {
                        Err(StartFailure::OutOfMemory { .. }) => Some(node.snapshot().await),
                        _ => None,
                    };
                    Done::Started { instance, ordered_at, result, snapshot }
                });
                self.instances.insert(task.id(), (instance, true));
            }
            Order::Stop(instance, mode) => {
                let task = self.operations.spawn(async move {
                    let result = node.stop(instance, mode).await;
                    Done::Stopped { instance, result }
                });
                self.instances.insert(task.id(), (instance, false));
            }
        }
    }

    fn due(&mut self) {
        self.snapshot = match self.snapshot {
            Snapshot::Idle | Snapshot::Due => Snapshot::Due,
            Snapshot::Running { .. } => Snapshot::Running { again: true },
        };
    }

    /// Asks for a snapshot if one is due and none is on its way.
    fn refresh(&mut self) {
        if self.snapshot != Snapshot::Due {
            return;
        }
        self.snapshot = Snapshot::Running { again: false };
        let should_live =
            if std::mem::take(&mut self.reconcile) { self.shared.state.lock().serving() } else { Vec::new() };
        let node = Arc::clone(&self.node);
        self.operations.spawn(async move {
            let snapshot = node.snapshot().await;
            Done::Snapshot { snapshot, should_live }
        });
    }

    fn done(&mut self, done: Result<(Id, Done), JoinError>) {
        let now = self.shared.now();
        let (id, done) = match done {
            Ok((id, done)) => (id, done),
            Err(error) => return self.panicked(&error, now),
        };
        self.instances.remove(&id);
        match done {
            Done::Started { instance, ordered_at, result, snapshot } => {
                let mut state = self.shared.state.lock();
                if let Some(snapshot) = snapshot {
                    state.observe(&snapshot);
                }
                state.started(instance, result, ordered_at, now);
                drop(state);
                self.due();
            }
            Done::Stopped { instance, result } => {
                self.shared.state.lock().stopped(instance, &result, now);
                self.due();
            }
            Done::Snapshot { snapshot, should_live } => {
                let mut state = self.shared.state.lock();
                state.observe(&snapshot);
                for instance in should_live {
                    let worker = snapshot
                        .workers
                        .iter()
                        .find(|w| w.instance.as_ref().is_some_and(|(id, _)| *id == instance));
                    if worker.is_none() {
                        state.lost(
                            stoker_types::WorkerId::default(),
                            Some(instance),
                            "it has no worker",
                            now,
                        );
                    }
                }
                drop(state);
                let again = self.snapshot == Snapshot::Running { again: true } || self.reconcile;
                self.snapshot = if again { Snapshot::Due } else { Snapshot::Idle };
            }
        }
    }

    /// The node's code panicked under an order. Its instance must not stay in between for ever.
    fn panicked(&mut self, error: &JoinError, now: Duration) {
        tracing::error!(%error, "the node failed in an order");
        let Some((instance, start)) = self.instances.remove(&error.id()) else {
            // A snapshot.
            self.snapshot = Snapshot::Idle;
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

    fn event(&mut self, event: NodeEvent) {
        let now = self.shared.now();
        match event {
            NodeEvent::WorkerLost { worker, instance, reason, last_lines } => {
                let reason = match last_lines.last() {
                    Some(line) => format!("{reason}: {line}"),
                    None => reason,
                };
                self.shared.state.lock().lost(worker, instance, &reason, now);
                self.due();
            }
            NodeEvent::InstanceLanded { instance, took, timeline } => {
                self.shared.state.lock().landed(instance, took, timeline, now);
                self.due();
            }
            NodeEvent::InstanceLost { instance, failure } => {
                self.shared.state.lock().undelivered(instance, failure, now);
                self.due();
            }
            NodeEvent::ResidencyChanged => self.due(),
            NodeEvent::Measured { model, tier, bytes, time } => {
                let mut state = self.shared.state.lock();
                // A start reports its own load: counted once.
                let starts = state.key(&model).is_some_and(|key| !state.model(key).instances.is_empty());
                if !starts {
                    state.estimator.observe_copy(tier, &model, bytes, time, now);
                }
            }
        }
    }
}
