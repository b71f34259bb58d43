//! All that the controller knows, under one lock that is never held across an await. Times are durations since the
//! controller began.
//!
//! - [`server`]: what is known of each server.
//! - [`assign`]: on which of them a model starts.
//! - [`queue`]: requests in, seats out and back.
//! - [`life`]: decisions, and what became of instances.
//! - [`outlook`]: how long a request would have to wait.

mod assign;
mod life;
mod outlook;
mod queue;
mod server;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    path::PathBuf,
    time::Duration,
};

use stoker_scheduler::{
    Robust,
    estimate::StartEstimate,
    placement::{Cluster, NodeKey},
    residency::{Budgets, DemandView, InstanceState, InstanceView, ModelKey, Need, Place, StopReason},
    sizing::{Sizing, TooLarge, size},
};
use stoker_types::{
    ByteSize, ClientId, DeviceId, DeviceMemoryState, Generation, InstanceId, KeepAlive, MemoryBudget,
    ModelFacts, ModelName, NodeSnapshot, Period, Refusal, SeatInfo, StartFailure, StartOrder, StopMode,
    Timeline, WorkerId, clock,
};
use tokio::sync::{oneshot, watch};

use crate::{
    config::Config,
    report::{DecisionRecord, DeviceUse, Event, InstanceStatus, Status},
};

pub(crate) use queue::Reply;
pub(crate) use server::{FIRST, Server};

/// The state. See the module's documentation.
pub(crate) struct State {
    pub(crate) config: Config,
    pub(crate) servers: BTreeMap<NodeKey, Server>,
    server_next: u32,
    /// The same for the policy that chooses among servers; empty while there is only one.
    map: Cluster,
    /// Models that were ever asked for; a [`ModelKey`] is a position here. Bounded by the models that there are.
    pub(crate) models: Vec<Model>,
    keys: HashMap<ModelName, ModelKey>,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    /// Models with demand.
    active: BTreeSet<ModelKey>,
    waiting: usize,
    waiting_by_client: HashMap<ClientId, usize>,
    pub(crate) seats_taken: u32,
    /// When the owner will look again by itself.
    pub(crate) wakeup: Option<Duration>,
    pub(crate) shutting_down: bool,
    records: VecDeque<DecisionRecord>,
    orders: Vec<Order>,
    instance_next: u64,
    waiter_next: u64,
    /// Something changed that admin calls wait for.
    pub(crate) changed: watch::Sender<()>,
}

/// One model.
pub(crate) struct Model {
    pub(crate) facts: ModelFacts,
    queue: VecDeque<Waiter>,
    waiting_sequences: u32,
    pub(crate) instances: Vec<InstanceId>,
    /// Where its next start is to be.
    server: Option<NodeKey>,
    /// Where its last start failed.
    avoid: Option<NodeKey>,
    /// Uses, decayed, as of `used_at`.
    uses: f64,
    used_at: Duration,
    /// Set by a request.
    keep_alive: Option<KeepAlive>,
    /// Set by the operator.
    pub(crate) pin: Option<bool>,
    pub(crate) wanted: Option<Wanted>,
    /// Since when a request is expected, until the next seat is taken.
    pub(crate) announced: Option<Duration>,
    /// The current demand's start failed once already, in a way that may pass.
    retried: bool,
    pub(crate) failed: Option<Failed>,
    /// Seconds for which a seat is taken.
    service: Option<Robust>,
}

/// A request in its model's queue.
struct Waiter {
    id: u64,
    client: ClientId,
    sequences: u32,
    prompt_tokens: u32,
    keep_alive: Option<KeepAlive>,
    since: Duration,
    reply: oneshot::Sender<Reply>,
}

/// Somebody who isn't in the queue wants an instance: a preload, or a request that was refused because the start
/// takes too long for it, and will come back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) since: Duration,
    pub(crate) until: Option<Duration>,
    pub(crate) evicts: bool,
}

/// The last start failed.
pub(crate) struct Failed {
    pub(crate) failure: StartFailure,
    pub(crate) at: Duration,
    until: Duration,
    count: u32,
}

/// One instance.
pub(crate) struct Instance {
    pub(crate) model: ModelKey,
    pub(crate) server: NodeKey,
    pub(crate) device: DeviceId,
    pub(crate) state: InstanceState,
    pub(crate) sizing: Sizing,
    generation: Generation,
    socket: PathBuf,
    worker: Option<WorkerId>,
    pub(crate) in_flight: u32,
    last_used: Duration,
    decided_at: Duration,
    ready_at: Duration,
    load_time: Duration,
    settled_at: Duration,
    pub(crate) leaving: bool,
    /// Its worker died before its start was reported.
    lost: Option<String>,
    estimate: StartEstimate,
    timeline: Timeline,
}

/// Something for the owner to carry out.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    Start(NodeKey, StartOrder),
    Stop(NodeKey, InstanceId, StopMode),
}

/// A seat that was taken.
pub(crate) struct Grant {
    pub(crate) info: SeatInfo,
    pub(crate) sequences: u32,
    pub(crate) at: Duration,
}

// === impl State ===

impl State {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            servers: BTreeMap::new(),
            server_next: 0,
            map: Cluster::default(),
            records: VecDeque::with_capacity(config.records_max),
            config,
            models: Vec::new(),
            keys: HashMap::new(),
            instances: BTreeMap::new(),
            active: BTreeSet::new(),
            waiting: 0,
            waiting_by_client: HashMap::new(),
            seats_taken: 0,
            wakeup: None,
            shutting_down: false,
            orders: Vec::new(),
            instance_next: 1,
            waiter_next: 0,
            changed: watch::Sender::new(()),
        }
    }

    pub(crate) fn key(&self, model: &ModelName) -> Option<ModelKey> {
        self.keys.get(model).copied()
    }

    pub(crate) fn model(&self, key: ModelKey) -> &Model {
        &self.models[key.0 as usize]
    }

    pub(crate) fn model_mut(&mut self, key: ModelKey) -> &mut Model {
        &mut self.models[key.0 as usize]
    }

    /// Enters a model, or renews what is known of it.
    pub(crate) fn know(&mut self, facts: ModelFacts) -> ModelKey {
        if let Some(key) = self.key(&facts.model) {
            self.model_mut(key).facts = facts;
            return key;
        }
        let key = ModelKey(u32::try_from(self.models.len()).unwrap_or(u32::MAX));
        self.keys.insert(facts.model.clone(), key);
        self.models.push(Model {
            facts,
            queue: VecDeque::new(),
            waiting_sequences: 0,
            instances: Vec::new(),
            server: None,
            avoid: None,
            uses: 0.0,
            used_at: Duration::ZERO,
            keep_alive: None,
            pin: None,
            wanted: None,
            announced: None,
            retried: false,
            failed: None,
            service: None,
        });
        key
    }

    pub(crate) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// A server, if it is still here.
    pub(crate) fn server(&self, key: NodeKey) -> Option<&Server> {
        self.servers.get(&key)
    }

    /// Takes over what a node says of its memory. Whoever waits for a model that no longer fits is told so.
    pub(crate) fn observe(&mut self, key: NodeKey, snapshot: &NodeSnapshot, now: Duration) {
        let Some(server) = self.servers.get_mut(&key) else { return };
        let changed = server.observe(snapshot);
        self.map_server(key, now);
        let Some(has_grown) = changed else { return };
        if has_grown {
            // What had no room then may have some now.
            for model in &mut self.models {
                if model
                    .failed
                    .as_ref()
                    .is_some_and(|f| matches!(f.failure, StartFailure::OutOfMemory { .. }))
                {
                    model.failed = None;
                }
            }
        }
        let waited_for = |key: &ModelKey| self.model(*key).instances.is_empty();
        let active: Vec<ModelKey> = self.active.iter().copied().filter(waited_for).collect();
        for key in active {
            if let Some(refusal) = self.too_large(key) {
                self.refuse_all(key, &refusal);
            }
        }
        self.changed.send_replace(());
    }

    /// What an instance of a model gets on a server.
    pub(crate) fn sizing_on(&self, key: ModelKey, server: NodeKey) -> Result<Sizing, TooLarge> {
        let places = self.server(server).map_or(&[][..], |server| &server.places);
        size(&self.model(key).facts, places, &self.config.sizing)
    }

    /// What it gets on the first server that it fits, or why it doesn't fit the one with the most room.
    pub(crate) fn sizing(&self, facts: &ModelFacts) -> Result<Sizing, (NodeKey, TooLarge)> {
        let mut most: Option<(NodeKey, TooLarge)> = None;
        for (key, server) in &self.servers {
            match size(facts, &server.places, &self.config.sizing) {
                Ok(sizing) => return Ok(sizing),
                Err(error) if most.as_ref().is_none_or(|(_, m)| m.budget < error.budget) => {
                    most = Some((*key, error));
                }
                Err(_) => {}
            }
        }
        let nowhere = || {
            let detail = "no server has joined yet".to_owned();
            (FIRST, TooLarge { needed: facts.weight_bytes, budget: ByteSize::ZERO, detail })
        };
        Err(most.unwrap_or_else(nowhere))
    }

    /// Where a model's weights are on a server's devices, for nobody.
    fn there(&self, key: ModelKey, server: NodeKey) -> Option<DeviceId> {
        let model = self.model(key);
        let here = |id: &InstanceId| self.instances.get(id).filter(|i| i.server == server);
        let used = |device| model.instances.iter().filter_map(here).any(|i| i.device == device);
        self.server(server)?.there(&model.facts.model, used)
    }

    /// Why no instance of a model fits: it is larger than what was configured, or than what the machine has now.
    pub(crate) fn too_large(&self, key: ModelKey) -> Option<Refusal> {
        let facts = &self.model(key).facts;
        let (server, error) = self.sizing(facts).err()?;
        Some(self.too_large_for(facts, server, error))
    }

    pub(crate) fn too_large_for(&self, facts: &ModelFacts, server: NodeKey, error: TooLarge) -> Refusal {
        let TooLarge { needed, budget, detail } = error;
        let model = facts.model.clone();
        let configured = self.server(server).map(|s| s.places_with(|budget| budget.configured));
        let fits = configured.is_some_and(|places| size(facts, &places, &self.config.sizing).is_ok());
        match self.server(server).and_then(|s| s.shortage(&detail)) {
            Some(shortage) if fits => {
                StartFailure::OutOfMemory { model, needed, free: budget, detail: shortage }.into()
            }
            _ => Refusal::TooLarge { model, needed, budget, detail },
        }
    }

    pub(crate) fn record(
        &mut self,
        instance: InstanceId,
        model: ModelKey,
        event: Event,
        terms: String,
        at: Duration,
    ) {
        let model = self.model(model).facts.model.clone();
        tracing::debug!(%model, %instance, ?event, terms, "decided");
        if self.config.records_max == 0 {
            return;
        }
        if self.records.len() >= self.config.records_max {
            self.records.pop_front();
        }
        self.records.push_back(DecisionRecord { at, instance, model, event, terms });
    }

    pub(crate) fn records_of(&self, model: &ModelName) -> Vec<DecisionRecord> {
        self.records.iter().filter(|r| r.model == *model).cloned().collect()
    }

    /// Marks a model as having demand or not.
    pub(crate) fn mark(&mut self, key: ModelKey) {
        let model = self.model(key);
        if model.queue.is_empty() && model.wanted.is_none() {
            self.active.remove(&key);
        } else {
            self.active.insert(key);
        }
    }

    fn instance_views(&self, server: NodeKey) -> Vec<InstanceView> {
        let here = self.instances.iter().filter(|(_, instance)| instance.server == server);
        here.map(|(id, instance)| self.instance_view(*id, instance)).collect()
    }

    fn instance_view(&self, id: InstanceId, instance: &Instance) -> InstanceView {
        let model = self.model(instance.model);
        InstanceView {
            id,
            model: instance.model,
            device: instance.device,
            state: instance.state,
            pool_bytes: instance.sizing.pool_bytes,
            kv_bytes: instance.sizing.kv_bytes,
            sequences: instance.sizing.sequences,
            in_flight: instance.in_flight,
            last_used: instance.last_used,
            ready_at: instance.ready_at,
            load_time: instance.load_time,
            uses: self.config.rules.decayed(model.uses, instance.last_used.saturating_sub(model.used_at)),
            keep_alive: model.keep_alive(),
            pinned: model.pinned(),
            priority: model.facts.settings.priority,
            settled_at: instance.settled_at,
            leaving: instance.leaving,
        }
    }

    /// The demand of a model for an instance on a server, less what instances elsewhere will take of it; `None` when it has
    /// none or can't be satisfied there.
    fn demand(&self, key: ModelKey, server: NodeKey) -> Option<DemandView> {
        let model = self.model(key);
        let (waiting, oldest_since, evicts) = match (model.queue.front(), model.wanted) {
            (Some(first), _) => (model.waiting_sequences, first.since, true),
            (None, Some(wanted)) => (1, wanted.since, wanted.evicts),
            (None, None) => return None,
        };
        let sizing = self.sizing_on(key, server).ok()?;
        let elsewhere =
            || model.instances.iter().filter_map(|id| self.instances.get(id)).filter(|i| i.server != server);
        let coming = elsewhere().filter(|i| i.state == InstanceState::Starting);
        let waiting = waiting.saturating_sub(coming.map(|i| i.sizing.sequences).sum());
        let others = u32::try_from(elsewhere().count()).unwrap_or(u32::MAX);
        let instances_max = model.facts.settings.instances_max.max(1).saturating_sub(others);
        (waiting > 0 && instances_max > 0).then(|| DemandView {
            model: key,
            waiting,
            oldest_since,
            priority: model.facts.settings.priority,
            need: Need { pool_bytes: sizing.pool_bytes, kv_bytes: sizing.kv_bytes },
            there: self.there(key, server),
            instances_max,
            evicts,
        })
    }

    pub(crate) fn status(&self) -> Status {
        let pooled = |i: &&Instance| {
            let place = self.server(i.server).and_then(|s| s.places.get(i.device.0 as usize));
            matches!(place, Some(Place::Pool(_)))
        };
        let in_pool = || self.instances.values().filter(pooled);
        let servers = || self.servers.values();
        Status {
            waiting: self.waiting,
            in_flight: self.seats_taken,
            dram_used: weights_of(in_pool()),
            dram_budget: sum(servers().map(|s| s.memory.dram)),
            kv_used: in_pool().map(|i| i.sizing.kv_bytes).sum(),
            kv_budget: sum(servers().map(|s| s.memory.kv)),
            devices: self.servers.iter().flat_map(|(key, server)| self.device_uses(*key, server)).collect(),
            instances: u32::try_from(self.instances.len()).unwrap_or(u32::MAX),
            slots: servers().flat_map(|s| &s.places).map(slots).sum(),
            shutting_down: self.shutting_down,
        }
    }

    fn device_uses(&self, key: NodeKey, server: &Server) -> Vec<DeviceUse> {
        let devices = (0..).map(DeviceId).zip(&server.devices);
        let used = |(id, device): (DeviceId, &DeviceMemoryState)| {
            let here = || self.instances.values().filter(|i| i.server == key && i.device == id);
            let beside: ByteSize = here().map(|i| i.sizing.kv_bytes + i.sizing.work_bytes).sum();
            DeviceUse {
                name: server.device_name(id),
                used: weights_of(here()) + beside,
                budget: device.budget,
                free: device.free,
                instances: u32::try_from(here().count()).unwrap_or(u32::MAX),
            }
        };
        devices.map(used).collect()
    }

    pub(crate) fn instance_status(
        &self,
        id: InstanceId,
        instance: &Instance,
        now: Duration,
    ) -> InstanceStatus {
        let model = self.model(instance.model);
        let (keep_alive, pinned) = (model.keep_alive(), model.pinned());
        let ready = matches!(instance.state, InstanceState::Ready | InstanceState::Draining);
        let idle = (ready && instance.in_flight == 0).then(|| now.saturating_sub(instance.last_used));
        let expires_in = match keep_alive {
            KeepAlive::For(time) if !pinned => idle.map(|idle| time.saturating_sub(idle)),
            KeepAlive::For(_) | KeepAlive::Forever => None,
        };
        InstanceStatus {
            instance: id,
            model: model.facts.model.clone(),
            state: match instance.state {
                InstanceState::Starting => "starting",
                InstanceState::Ready => "ready",
                InstanceState::Draining => "draining",
                InstanceState::Stopping => "stopping",
            },
            worker: instance.worker,
            context: instance.sizing.context,
            sequences: instance.sizing.sequences,
            in_flight: instance.in_flight,
            device: self.server(instance.server).map_or_else(String::new, |s| s.device_name(instance.device)),
            pool_bytes: instance.sizing.pool_bytes,
            kv_bytes: instance.sizing.kv_bytes,
            work_bytes: instance.sizing.work_bytes,
            pinned,
            keep_alive,
            idle,
            expires_in,
            load_time: match instance.state {
                InstanceState::Starting => now.saturating_sub(instance.decided_at),
                _ => instance.load_time,
            },
            timeline: instance.timeline.clone(),
        }
    }
}

// === impl Model ===

impl Model {
    pub(crate) fn keep_alive(&self) -> KeepAlive {
        self.keep_alive.unwrap_or(self.facts.settings.keep_alive)
    }

    pub(crate) fn pinned(&self) -> bool {
        self.pin.unwrap_or(self.facts.settings.pin)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn oldest_since(&self) -> Option<Duration> {
        self.queue.front().map(|waiter| waiter.since)
    }
}

/// What lasted from `began` to `ended`, both since the controller began, by the wall clock.
fn period(began: Duration, ended: Duration, now: Duration) -> Period {
    let ended_at = clock::wall().saturating_sub(now.saturating_sub(ended));
    Period::until(ended_at, ended.saturating_sub(began))
}

/// Weights of instances: those of a model are on one place once.
fn weights_of<'a>(instances: impl Iterator<Item = &'a Instance>) -> ByteSize {
    let by_place: BTreeMap<(NodeKey, DeviceId, ModelKey), ByteSize> =
        instances.map(|i| ((i.server, i.device, i.model), i.sizing.pool_bytes)).collect();
    by_place.into_values().sum()
}

fn sum(budgets: impl Iterator<Item = MemoryBudget>) -> MemoryBudget {
    budgets.fold(MemoryBudget::default(), |sum, budget| MemoryBudget {
        configured: sum.configured + budget.configured,
        effective: sum.effective + budget.effective,
    })
}

fn slots(place: &Place) -> u32 {
    match place {
        Place::Pool(Budgets { slots, .. }) | Place::Device { slots, .. } => *slots,
    }
}

/// Why an instance stops, in words.
fn reason_in_words(reason: StopReason, models: &[Model]) -> String {
    match reason {
        StopReason::KeepAlive => "idle for its keep_alive".into(),
        StopReason::Room { for_model } => {
            format!("room for `{}`", models[for_model.0 as usize].facts.model)
        }
        StopReason::Unload => "unloaded by the operator".into(),
    }
}
