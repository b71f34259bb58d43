//! A node that starts nothing, takes virtual time, and checks every order.
//!
//! What it finds wrong it writes down, and the rig's drop fails the test. An assertion wouldn't do: orders run in
//! tasks whose panics the controller survives, as it should.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use stoker_controller::{
    Budgets, Config, ControllerHandle, Facts, NodeApi, Seat, ServerConfig, ServerKey, spawn,
};
use stoker_types::{
    Admit, ByteSize, ClientId, InstanceId, KeepAlive, MemoryHolder, ModelFacts, ModelName, ModelSettings,
    NodeEvent, NodeMemory, NodeSnapshot, Phase, Refusal, RequestId, StartFailure, StartOrder, Started,
    StopFailure, StopMode, Tier, TierBytes, Timeline, WorkerId, WorkerState, WorkerStatus,
};
use tokio::{sync::broadcast, time::sleep};

pub(crate) struct FakeNode {
    pub(crate) budgets: Budgets,
    inner: Mutex<Inner>,
    events: broadcast::Sender<NodeEvent>,
    facts: Arc<FakeFacts>,
    /// Of every node: seats name their instance only.
    in_use: Arc<Mutex<BTreeMap<InstanceId, u32>>>,
}

#[derive(Default)]
struct Inner {
    live: BTreeMap<InstanceId, StartOrder>,
    ready: BTreeMap<InstanceId, WorkerId>,
    residency: Vec<(ModelName, ByteSize)>,
    load: BTreeMap<ModelName, Duration>,
    failures: BTreeMap<ModelName, VecDeque<StartFailure>>,
    busy_answers: u32,
    memory: Option<NodeMemory>,
    looks: u32,
    violations: Vec<String>,
    starts: Vec<ModelName>,
    stops: Vec<(ModelName, StopMode)>,
}

#[derive(Default)]
pub(crate) struct FakeFacts {
    models: Mutex<BTreeMap<ModelName, ModelFacts>>,
}

/// A controller over a fake node.
pub(crate) struct Rig {
    pub(crate) node: Arc<FakeNode>,
    pub(crate) first: ServerKey,
    /// Servers that joined later.
    others: Mutex<Vec<Arc<FakeNode>>>,
    pub(crate) facts: Arc<FakeFacts>,
    pub(crate) handle: ControllerHandle,
    owner: tokio::task::JoinHandle<()>,
}

pub(crate) fn name(text: &str) -> ModelName {
    ModelName::new(text).unwrap()
}

pub(crate) fn model(text: &str, pool: u64) -> ModelFacts {
    ModelFacts {
        model: name(text),
        settings: ModelSettings { concurrency: 4, ..ModelSettings::default() },
        weight_bytes: ByteSize::mib(pool),
        pool_bytes: ByteSize::mib(pool),
        device_bytes: ByteSize::mib(pool),
        kv_bytes_per_token: ByteSize::kib(1),
        context_trained: 1024,
        weights_on: stoker_types::Tier::Ssd,
    }
}

pub(crate) fn admit(model: &str) -> Admit {
    Admit {
        model: name(model),
        request: RequestId("r".into()),
        client: ClientId("c".into()),
        sequences: 1,
        prompt_tokens: 10,
        wait_max: Duration::from_secs(120),
        keep_alive: None,
    }
}

// === impl Rig ===

impl Rig {
    /// `dram` MiB of weights, 8 MiB of KV cache (four instances of 2 x 1,024 tokens), four workers.
    pub(crate) fn new(dram: u64, models: Vec<ModelFacts>) -> Self {
        Self::with(dram, models, |_, _| {})
    }

    pub(crate) fn with(
        dram: u64,
        models: Vec<ModelFacts>,
        change: impl FnOnce(&mut Config, &mut ServerConfig),
    ) -> Self {
        let budgets = Budgets { dram: ByteSize::mib(dram), kv: ByteSize::mib(8), slots: 4 };
        let mut config = Config::default();
        let mut server = ServerConfig { name: String::new(), budgets, devices: Vec::new() };
        change(&mut config, &mut server);
        let facts = Arc::new(FakeFacts::default());
        for model in models {
            facts.models.lock().insert(model.model.clone(), model);
        }
        let node = FakeNode::new(server.budgets, &facts, Arc::default());
        let (handle, owner) = spawn(config, Arc::clone(&facts) as Arc<dyn Facts>);
        let first = handle.join(server, Arc::clone(&node) as Arc<dyn NodeApi>);
        Self { node, first, others: Mutex::default(), facts, handle, owner }
    }

    /// One more server.
    pub(crate) fn join(&self, name: &str, dram: u64) -> (Arc<FakeNode>, ServerKey) {
        let budgets = Budgets { dram: ByteSize::mib(dram), ..self.node.budgets };
        let node = FakeNode::new(budgets, &self.facts, Arc::clone(&self.node.in_use));
        let server = ServerConfig { name: name.to_owned(), budgets, devices: Vec::new() };
        let key = self.handle.join(server, Arc::clone(&node) as Arc<dyn NodeApi>);
        self.others.lock().push(Arc::clone(&node));
        (node, key)
    }

    pub(crate) async fn admit(&self, model: &str) -> Result<Used, Refusal> {
        self.admit_as(admit(model)).await
    }

    pub(crate) async fn admit_as(&self, admit: Admit) -> Result<Used, Refusal> {
        let seat = self.handle.admit(admit).await?;
        Ok(Used::new(Arc::clone(&self.node), seat))
    }

    /// Takes a seat and gives it back at once.
    pub(crate) async fn touch(&self, model: &str) {
        drop(self.admit(model).await.unwrap());
    }

    pub(crate) fn states(&self) -> Vec<(String, &'static str)> {
        self.handle.instances().into_iter().map(|i| (i.model.to_string(), i.state)).collect()
    }

    /// Lets everything that is ready to run, run.
    pub(crate) async fn turn(&self) {
        sleep(Duration::from_micros(1)).await;
    }
}

/// A seat in use: the fake node knows of it, and complains when its instance is stopped.
pub(crate) struct Used {
    node: Arc<FakeNode>,
    pub(crate) seat: Option<Seat>,
}

impl Used {
    fn new(node: Arc<FakeNode>, seat: Seat) -> Self {
        *node.in_use.lock().entry(seat.info.instance).or_default() += 1;
        Self { node, seat: Some(seat) }
    }

    pub(crate) fn instance(&self) -> InstanceId {
        self.seat.as_ref().unwrap().info.instance
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let id = self.instance();
        *self.node.in_use.lock().get_mut(&id).unwrap() -= 1;
        drop(self.seat.take());
    }
}

// === impl FakeNode ===

impl FakeNode {
    fn new(
        budgets: Budgets,
        facts: &Arc<FakeFacts>,
        in_use: Arc<Mutex<BTreeMap<InstanceId, u32>>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            budgets,
            inner: Mutex::default(),
            events: broadcast::Sender::new(64),
            facts: Arc::clone(facts),
            in_use,
        })
    }

    /// So much of a model is in its DRAM, MiB.
    pub(crate) fn hold(&self, model: &str, dram: u64) {
        self.inner.lock().residency.push((name(model), ByteSize::mib(dram)));
        self.say(NodeEvent::ResidencyChanged);
    }

    pub(crate) fn set_load(&self, model: &str, time: Duration) {
        self.inner.lock().load.insert(name(model), time);
    }

    pub(crate) fn fail_next(&self, model: &str, failure: StartFailure) {
        self.inner.lock().failures.entry(name(model)).or_default().push_back(failure);
    }

    pub(crate) fn answer_busy(&self, times: u32) {
        self.inner.lock().busy_answers = times;
    }

    /// The machine has so much for weights from now on, MiB.
    pub(crate) fn leave(&self, dram: u64) {
        let (dram, whole) = (ByteSize::mib(dram), self.budgets);
        let mut memory = NodeMemory::whole(whole.dram, whole.kv);
        if dram < whole.dram {
            memory.dram.effective = dram;
            memory.holder = Some(MemoryHolder { pid: 4312, name: "python".into(), bytes: ByteSize::gib(9) });
        }
        self.inner.lock().memory = Some(memory);
    }

    /// How often it was asked for its state.
    pub(crate) fn looks(&self) -> u32 {
        self.inner.lock().looks
    }

    pub(crate) fn starts(&self) -> Vec<String> {
        self.inner.lock().starts.iter().map(ToString::to_string).collect()
    }

    pub(crate) fn stops(&self) -> Vec<(String, StopMode)> {
        self.inner.lock().stops.iter().map(|(model, mode)| (model.to_string(), *mode)).collect()
    }

    pub(crate) fn live(&self) -> usize {
        self.inner.lock().live.len()
    }

    pub(crate) fn ready(&self) -> Vec<InstanceId> {
        self.inner.lock().ready.keys().copied().collect()
    }

    /// Kills an instance's worker. False when it isn't ready.
    pub(crate) fn kill(&self, instance: InstanceId, tell: bool) -> bool {
        let worker = {
            let mut inner = self.inner.lock();
            inner.live.remove(&instance);
            inner.ready.remove(&instance)
        };
        let Some(worker) = worker else { return false };
        if tell {
            let _ = self.events.send(NodeEvent::WorkerLost {
                worker,
                instance: Some(instance),
                reason: "signal 9".into(),
                last_lines: vec!["so long".into()],
            });
        }
        true
    }

    pub(crate) fn say(&self, event: NodeEvent) {
        let _ = self.events.send(event);
    }

    /// As the real node: it looks at its machine before it starts anything.
    fn no_room(&self, inner: &Inner, order: &StartOrder) -> Option<StartFailure> {
        let memory = inner.memory.as_ref()?;
        let mut models: Vec<&ModelName> = inner.live.values().map(|order| &order.model).collect();
        models.sort();
        models.dedup();
        let others = models.into_iter().filter(|model| **model != order.model);
        let held: ByteSize = others.map(|model| self.facts.facts(model).unwrap().pool_bytes).sum();
        let needed = self.facts.facts(&order.model).unwrap().pool_bytes;
        (held + needed > memory.dram.effective).then(|| StartFailure::OutOfMemory {
            model: order.model.clone(),
            needed,
            free: memory.dram.effective.saturating_sub(held),
            detail: memory.shortage().unwrap_or_default(),
        })
    }

    fn check_budgets(&self, inner: &mut Inner) {
        let mut weights: BTreeMap<&ModelName, ByteSize> = BTreeMap::new();
        for order in inner.live.values() {
            weights.insert(&order.model, self.facts.facts(&order.model).unwrap().pool_bytes);
        }
        let dram: ByteSize = weights.into_values().sum();
        let kv: ByteSize = inner.live.values().map(|order| order.kv_bytes).sum();
        let workers = inner.live.len();
        let Budgets { dram: dram_max, kv: kv_max, slots } = self.budgets;
        if dram > dram_max || kv > kv_max || workers > slots as usize {
            inner.violations.push(format!("overcommitted: DRAM {dram}, KV {kv}, {workers} workers"));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let mut violations = std::mem::take(&mut self.node.inner.lock().violations);
            for node in &*self.others.lock() {
                violations.append(&mut node.inner.lock().violations);
            }
            let count = violations.len();
            assert_eq!(count, 0, "{:?} and so on", &violations[..count.min(3)]);
            let ended = self.owner.is_finished() && !self.handle.status().shutting_down;
            assert!(!ended, "the owner has ended before its time");
        }
    }
}

#[async_trait]
impl NodeApi for FakeNode {
    async fn start(&self, order: StartOrder) -> Result<Started, StartFailure> {
        let (load, failure) = {
            let mut inner = self.inner.lock();
            inner.starts.push(order.model.clone());
            if let Some(failure) = self.no_room(&inner, &order) {
                return Err(failure);
            }
            inner.live.insert(order.instance, order.clone());
            self.check_budgets(&mut inner);
            let load = inner.load.get(&order.model).copied().unwrap_or(Duration::from_millis(100));
            (load, inner.failures.get_mut(&order.model).and_then(VecDeque::pop_front))
        };
        sleep(load).await;
        let mut inner = self.inner.lock();
        if let Some(failure) = failure {
            inner.live.remove(&order.instance);
            return Err(failure);
        }
        if !inner.live.contains_key(&order.instance) {
            // Killed at the very moment at which it was reported as ready.
            return Ok(Started {
                worker: WorkerId(0),
                socket: "/w/dead".into(),
                timeline: Timeline::default(),
            });
        }
        let worker = WorkerId(u32::try_from(order.instance.0).unwrap());
        inner.ready.insert(order.instance, worker);
        let mut timeline = Timeline::default();
        timeline.record(Phase::SsdRead, None, load);
        timeline
            .bytes
            .push(TierBytes { tier: Tier::Ssd, bytes: self.facts.facts(&order.model).unwrap().weight_bytes });
        Ok(Started { worker, socket: format!("/w/{}", worker.0).into(), timeline })
    }

    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<(), StopFailure> {
        sleep(Duration::from_millis(2)).await;
        let mut inner = self.inner.lock();
        if !inner.ready.contains_key(&instance) {
            if inner.live.contains_key(&instance) {
                inner.violations.push(format!("{instance} was told to stop while it was loading"));
            }
            return Err(StopFailure::Unknown { instance });
        }
        if mode == StopMode::IfIdle {
            let used = self.in_use.lock().get(&instance).copied().unwrap_or(0);
            if used > 0 {
                inner.violations.push(format!("{instance} was told to stop with {used} seats in use"));
            }
            if inner.busy_answers > 0 {
                inner.busy_answers -= 1;
                return Err(StopFailure::Busy { instance, sequences: 1 });
            }
        }
        inner.ready.remove(&instance);
        let order = inner.live.remove(&instance).unwrap();
        inner.stops.push((order.model, mode));
        Ok(())
    }

    async fn snapshot(&self) -> NodeSnapshot {
        let mut inner = self.inner.lock();
        inner.looks += 1;
        NodeSnapshot {
            memory: inner
                .memory
                .clone()
                .unwrap_or_else(|| NodeMemory::whole(self.budgets.dram, self.budgets.kv)),
            dram_used: ByteSize::ZERO,
            dram_mapped: ByteSize::ZERO,
            residency: inner.residency.clone(),
            rates: Vec::new(),
            devices: Vec::new(),
            workers: inner
                .ready
                .iter()
                .map(|(instance, worker)| WorkerStatus {
                    worker: *worker,
                    pid: 1,
                    device: "cpu".into(),
                    state: WorkerState::Serving,
                    instance: Some((*instance, inner.live[instance].model.clone())),
                    private_bytes: ByteSize::ZERO,
                })
                .collect(),
        }
    }

    fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.events.subscribe()
    }
}

// === impl FakeFacts ===

impl FakeFacts {
    pub(crate) fn change(&self, model: &str, change: impl FnOnce(&mut ModelFacts)) {
        change(self.models.lock().get_mut(&name(model)).unwrap());
    }
}

impl Facts for FakeFacts {
    fn facts(&self, model: &ModelName) -> Option<ModelFacts> {
        self.models.lock().get(model).cloned()
    }

    fn preloaded(&self) -> Vec<ModelName> {
        self.models.lock().values().filter(|m| m.settings.preload).map(|m| m.model.clone()).collect()
    }
}

pub(crate) fn keep(seconds: u64) -> KeepAlive {
    KeepAlive::For(Duration::from_secs(seconds))
}
