//! All that the controller knows, under one lock that is never held across an await. Times are durations since the
//! controller began.
//!
//! - [`queue`]: requests in, seats out and back.
//! - [`life`]: decisions, and what became of instances.
//! - [`outlook`]: how long a request would have to wait.

mod life;
mod outlook;
mod queue;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    path::PathBuf,
    time::Duration,
};

use stoker_scheduler::{
    Robust,
    estimate::{Estimator, StartEstimate},
    residency::{Budgets, DemandView, InstanceState, InstanceView, ModelKey, Need, Place, StopReason, View},
    sizing::{Sizing, TooLarge, size},
};
use stoker_types::{
    ByteSize, ClientId, DeviceId, DeviceMemoryState, Generation, InstanceId, KeepAlive, MemoryBudget,
    ModelFacts, ModelName, NodeMemory, NodeSnapshot, Period, Refusal, SeatInfo, StartFailure, StartOrder,
    StopMode, Timeline, WorkerId, clock,
};
use tokio::sync::{oneshot, watch};

use crate::{
    config::Config,
    report::{DecisionRecord, DeviceUse, Event, InstanceStatus, Status},
};

pub(crate) use queue::Reply;

/// The state. See the module's documentation.
pub(crate) struct State {
    pub(crate) config: Config,
    pub(crate) estimator: Estimator,
    /// Models that were ever asked for; a [`ModelKey`] is a position here. Bounded by the models that there are.
    pub(crate) models: Vec<Model>,
    keys: HashMap<ModelName, ModelKey>,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    /// Models with demand.
    active: BTreeSet<ModelKey>,
    waiting: usize,
    waiting_by_client: HashMap<ClientId, usize>,
    pub(crate) seats_taken: u32,
    /// The node's memory, as of the last snapshot.
    memory: NodeMemory,
    /// Its devices, as of the last snapshot that had as many as were configured.
    devices: Vec<DeviceMemoryState>,
    /// Where instances may be, with what is in force now.
    pub(crate) places: Vec<Place>,
    /// Bytes of each model that are in DRAM, as of the last snapshot.
    residency: HashMap<ModelName, ByteSize>,
    /// When the owner will look again by itself.
    pub(crate) wakeup: Option<Duration>,
    pub(crate) shutting_down: bool,
    records: VecDeque<DecisionRecord>,
    orders: Vec<Order>,
    instance_next: u64,
    generation_next: u64,
    waiter_next: u64,
    /// Something changed that admin calls wait for.
    pub(crate) changed: watch::Sender<()>,
}

/// One model.
pub(crate) struct Model {
    pub(crate) facts: ModelFacts,
    pub(crate) sizing: Result<Sizing, TooLarge>,
    queue: VecDeque<Waiter>,
    waiting_sequences: u32,
    pub(crate) instances: Vec<InstanceId>,
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
    Start(StartOrder),
    Stop(InstanceId, StopMode),
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
        let places = match &config.devices[..] {
            [] => vec![Place::Pool(config.budgets)],
            devices => devices
                .iter()
                .map(|d| Place::Device { memory: d.memory, work: d.work, slots: d.slots })
                .collect(),
        };
        Self {
            estimator: Estimator::new(config.priors),
            memory: NodeMemory::whole(config.budgets.dram, config.budgets.kv),
            records: VecDeque::with_capacity(config.records_max),
            config,
            devices: Vec::new(),
            places,
            models: Vec::new(),
            keys: HashMap::new(),
            instances: BTreeMap::new(),
            active: BTreeSet::new(),
            waiting: 0,
            waiting_by_client: HashMap::new(),
            seats_taken: 0,
            residency: HashMap::new(),
            wakeup: None,
            shutting_down: false,
            orders: Vec::new(),
            instance_next: 1,
            generation_next: 1,
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
        let sizing = size(&facts, &self.places, &self.config.sizing);
        if let Some(key) = self.key(&facts.model) {
            let model = self.model_mut(key);
            model.facts = facts;
            model.sizing = sizing;
            return key;
        }
        let key = ModelKey(u32::try_from(self.models.len()).unwrap_or(u32::MAX));
        self.keys.insert(facts.model.clone(), key);
        self.models.push(Model {
            facts,
            sizing,
            queue: VecDeque::new(),
            waiting_sequences: 0,
            instances: Vec::new(),
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

    /// Takes over what the node says of its memory. Whoever waits for a model that no longer fits is told so.
    pub(crate) fn observe(&mut self, snapshot: &NodeSnapshot) {
        self.residency = snapshot.residency.iter().cloned().collect();
        self.memory = snapshot.memory.clone();
        if snapshot.devices.len() == self.config.devices.len() {
            self.devices.clone_from(&snapshot.devices);
        }
        let after = self.places_with(|budget| budget.effective);
        let before = std::mem::replace(&mut self.places, after);
        if self.places == before {
            return;
        }
        let has_grown = before.iter().zip(&self.places).any(|(before, after)| has_grown(before, after));
        let rules = self.config.sizing;
        for model in &mut self.models {
            model.sizing = size(&model.facts, &self.places, &rules);
            // What had no room then may have some now.
            if has_grown
                && model
                    .failed
                    .as_ref()
                    .is_some_and(|f| matches!(f.failure, StartFailure::OutOfMemory { .. }))
            {
                model.failed = None;
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

    /// Where instances may be, with the configured budgets or those in force.
    fn places_with(&self, of: fn(&MemoryBudget) -> ByteSize) -> Vec<Place> {
        let place = |(place, at): (&Place, usize)| match *place {
            Place::Pool(Budgets { slots, .. }) => {
                let NodeMemory { dram, kv, .. } = &self.memory;
                Place::Pool(Budgets { dram: of(dram), kv: of(kv), slots })
            }
            Place::Device { memory, work, slots } => {
                let memory = self.devices.get(at).map_or(memory, |device| of(&device.budget));
                Place::Device { memory, work, slots }
            }
        };
        self.places.iter().zip(0..).map(place).collect()
    }

    /// What a device is called.
    fn device_name(&self, device: DeviceId) -> String {
        let configured = self.config.devices.get(device.0 as usize);
        configured.map_or_else(|| "cpu".to_owned(), |device| device.name.clone())
    }

    /// Where a model's weights are, for nobody.
    fn there(&self, key: ModelKey) -> Option<DeviceId> {
        let model = self.model(key);
        let used = |device| model.instances.iter().any(|id| self.instances[id].device == device);
        let here = |device: &DeviceMemoryState| device.resident.contains(&model.facts.model);
        (0..)
            .map(DeviceId)
            .zip(&self.devices)
            .find(|(id, device)| here(device) && !used(*id))
            .map(|(id, _)| id)
    }

    /// Why no instance of a model fits: it is larger than what was configured, or than what the machine has now.
    pub(crate) fn too_large(&self, key: ModelKey) -> Option<Refusal> {
        let model = self.model(key);
        let error = model.sizing.as_ref().err()?;
        Some(self.too_large_for(&model.facts, error.clone()))
    }

    pub(crate) fn too_large_for(&self, facts: &ModelFacts, error: TooLarge) -> Refusal {
        let TooLarge { needed, budget, detail } = error;
        let model = facts.model.clone();
        let configured = self.places_with(|budget| budget.configured);
        let shortage = match &self.devices[..] {
            [] => self.memory.shortage(),
            devices => {
                let each: Vec<String> = devices.iter().filter_map(DeviceMemoryState::shortage).collect();
                (!each.is_empty()).then(|| format!("{detail}; {}", each.join("; ")))
            }
        };
        match shortage {
            Some(shortage) if size(facts, &configured, &self.config.sizing).is_ok() => {
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

    fn instance_views(&self) -> Vec<InstanceView> {
        self.instances.iter().map(|(id, instance)| self.instance_view(*id, instance)).collect()
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

    /// The demand of a model; `None` when it has none or can't be satisfied here.
    fn demand(&self, key: ModelKey) -> Option<DemandView> {
        let model = self.model(key);
        let sizing = model.sizing.as_ref().ok()?;
        let (waiting, oldest_since, evicts) = match (model.queue.front(), model.wanted) {
            (Some(first), _) => (model.waiting_sequences, first.since, true),
            (None, Some(wanted)) => (1, wanted.since, wanted.evicts),
            (None, None) => return None,
        };
        Some(DemandView {
            model: key,
            waiting,
            oldest_since,
            priority: model.facts.settings.priority,
            need: Need { pool_bytes: sizing.pool_bytes, kv_bytes: sizing.kv_bytes },
            there: self.there(key),
            instances_max: model.facts.settings.instances_max.max(1),
            evicts,
        })
    }

    fn view<'a>(&'a self, instances: &'a [InstanceView], demands: &'a [DemandView]) -> View<'a> {
        View { places: &self.places, instances, demands }
    }

    pub(crate) fn status(&self) -> Status {
        let pooled = |i: &&Instance| matches!(self.places[i.device.0 as usize], Place::Pool(_));
        let in_pool = || self.instances.values().filter(pooled);
        Status {
            waiting: self.waiting,
            in_flight: self.seats_taken,
            dram_used: weights_of(in_pool()),
            dram_budget: self.memory.dram,
            kv_used: in_pool().map(|i| i.sizing.kv_bytes).sum(),
            kv_budget: self.memory.kv,
            devices: (0..).map(DeviceId).zip(&self.devices).map(|(id, d)| self.device_use(id, d)).collect(),
            instances: u32::try_from(self.instances.len()).unwrap_or(u32::MAX),
            slots: self.places.iter().map(slots).sum(),
            shutting_down: self.shutting_down,
        }
    }

    fn device_use(&self, id: DeviceId, device: &DeviceMemoryState) -> DeviceUse {
        let here = || self.instances.values().filter(|i| i.device == id);
        let beside: ByteSize = here().map(|i| i.sizing.kv_bytes + i.sizing.work_bytes).sum();
        DeviceUse {
            name: device.name.clone(),
            used: weights_of(here()) + beside,
            budget: device.budget,
            free: device.free,
            instances: u32::try_from(here().count()).unwrap_or(u32::MAX),
        }
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
            device: self.device_name(instance.device),
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

/// Weights of instances on one place: those of a model are there once.
fn weights_of<'a>(instances: impl Iterator<Item = &'a Instance>) -> ByteSize {
    let by_model: BTreeMap<ModelKey, ByteSize> =
        instances.map(|instance| (instance.model, instance.sizing.pool_bytes)).collect();
    by_model.into_values().sum()
}

fn has_grown(before: &Place, after: &Place) -> bool {
    match (before, after) {
        (Place::Pool(before), Place::Pool(after)) => after.dram > before.dram || after.kv > before.kv,
        (Place::Device { memory: before, .. }, Place::Device { memory: after, .. }) => after > before,
        (Place::Pool(_), Place::Device { .. }) | (Place::Device { .. }, Place::Pool(_)) => true,
    }
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
