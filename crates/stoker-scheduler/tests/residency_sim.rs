//! The residency policy in virtual time: random demand, random sizes, every promise checked after every step.

#![expect(clippy::unwrap_used, reason = "a simulation in a test stops at the first surprise")]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    time::Duration,
};

use proptest::prelude::*;
use stoker_scheduler::residency::{
    Action, Budgets, DemandView, InstanceState, InstanceView, ModelKey, Need, Place, Rules, StopReason, View,
    decide,
};
use stoker_types::{ByteSize, DeviceId, InstanceId, KeepAlive};

#[derive(Debug, Clone)]
struct Model {
    need: Need,
    load: Duration,
    keep_alive: KeepAlive,
    pinned: bool,
    priority: i32,
    instances_max: u32,
    sequences: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive { model: usize, service: Duration },
    Ready(u64),
    Done(u64),
    Stopped(u64),
    Wake,
}

struct Sim {
    places: Vec<Place>,
    rules: Rules,
    models: Vec<Model>,
    instances: BTreeMap<u64, InstanceView>,
    queues: Vec<VecDeque<(Duration, Duration)>>,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    now: Duration,
    numbers: u64,
    longest_wait: Duration,
    served: usize,
    evictions: usize,
    log: Vec<String>,
}

impl Sim {
    fn new(budgets: Budgets, models: Vec<Model>) -> Self {
        Self::on(vec![Place::Pool(budgets)], models)
    }

    fn on(places: Vec<Place>, models: Vec<Model>) -> Self {
        Self {
            places,
            rules: Rules::default(),
            queues: vec![VecDeque::new(); models.len()],
            models,
            instances: BTreeMap::new(),
            events: BinaryHeap::new(),
            now: Duration::ZERO,
            numbers: 0,
            longest_wait: Duration::ZERO,
            served: 0,
            evictions: 0,
            log: Vec::new(),
        }
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.numbers += 1;
        self.events.push(Reverse((time, self.numbers, event)));
    }

    fn run(&mut self) {
        let mut steps = 0;
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            steps += 1;
            assert!(steps < 200_000, "it goes on for ever");
            self.now = time;
            match event {
                Event::Arrive { model, service } => self.queues[model].push_back((self.now, service)),
                Event::Ready(id) => {
                    let instance = self.instances.get_mut(&id).unwrap();
                    assert_eq!(instance.state, InstanceState::Starting);
                    instance.state = InstanceState::Ready;
                    instance.ready_at = time;
                    instance.last_used = time;
                }
                Event::Done(id) => {
                    let instance = self.instances.get_mut(&id).unwrap();
                    assert!(
                        matches!(instance.state, InstanceState::Ready | InstanceState::Draining),
                        "it was busy"
                    );
                    instance.in_flight -= 1;
                    instance.last_used = time;
                }
                Event::Stopped(id) => {
                    let gone = self.instances.remove(&id).unwrap();
                    assert_eq!(gone.state, InstanceState::Stopping);
                }
                Event::Wake => {}
            }
            self.settle();
        }
    }

    fn seat_waiters(&mut self) {
        for (model, queue) in self.queues.iter_mut().enumerate() {
            while !queue.is_empty() {
                let key = ModelKey(u32::try_from(model).unwrap());
                let free = self
                    .instances
                    .values_mut()
                    .find(|i| i.model == key && i.state == InstanceState::Ready && i.in_flight < i.sequences);
                let Some(instance) = free else { break };
                let (since, service) = queue.pop_front().unwrap();
                instance.in_flight += 1;
                instance.last_used = self.now;
                instance.uses += 1.0;
                self.longest_wait = self.longest_wait.max(self.now - since);
                self.served += 1;
                self.numbers += 1;
                let done = Event::Done(instance.id.0);
                self.events.push(Reverse((self.now + service, self.numbers, done)));
            }
        }
    }

    fn settle(&mut self) {
        for round in 0.. {
            assert!(
                round < 8,
                "decisions undo each other: {:?}",
                &self.log[self.log.len().saturating_sub(20)..]
            );
            self.seat_waiters();
            let instances: Vec<InstanceView> = self.instances.values().copied().collect();
            let demands: Vec<DemandView> = self
                .queues
                .iter()
                .enumerate()
                .filter(|(_, queue)| !queue.is_empty())
                .map(|(model, queue)| DemandView {
                    model: ModelKey(u32::try_from(model).unwrap()),
                    waiting: u32::try_from(queue.len()).unwrap(),
                    oldest_since: queue[0].0,
                    priority: self.models[model].priority,
                    need: self.models[model].need,
                    there: None,
                    instances_max: self.models[model].instances_max,
                    evicts: true,
                })
                .collect();
            let view = View { places: &self.places, instances: &instances, demands: &demands };
            let decision = decide(&view, &self.rules, self.now);
            assert_eq!(decision, decide(&view, &self.rules, self.now), "the same question, another answer");
            for action in &decision.actions {
                self.log.push(format!("{:?} {action:?}", self.now));
                self.carry_out(*action);
            }
            self.check();
            if decision.actions.is_empty() {
                if let Some(wakeup) = decision.next_wakeup {
                    assert!(wakeup > self.now);
                    self.at(wakeup, Event::Wake);
                }
                return;
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Start { model, device } => {
                let spec = self.models[model.0 as usize].clone();
                self.numbers += 1;
                let id = self.numbers;
                let count = self.instances.values().filter(|i| i.model == model).count();
                assert!(count < spec.instances_max as usize, "more instances than allowed");
                self.instances.insert(
                    id,
                    InstanceView {
                        id: InstanceId(id),
                        model,
                        device,
                        state: InstanceState::Starting,
                        pool_bytes: spec.need.pool_bytes,
                        kv_bytes: spec.need.kv_bytes,
                        sequences: spec.sequences,
                        in_flight: 0,
                        last_used: self.now,
                        ready_at: self.now,
                        load_time: spec.load,
                        uses: 0.0,
                        keep_alive: spec.keep_alive,
                        pinned: spec.pinned,
                        priority: spec.priority,
                        settled_at: Duration::ZERO,
                        leaving: false,
                    },
                );
                self.at(self.now + spec.load, Event::Ready(id));
            }
            Action::Drain { instance, .. } => {
                let instance = self.instances.get_mut(&instance.0).unwrap();
                assert_eq!(instance.state, InstanceState::Ready);
                assert!(!instance.pinned, "a pinned instance was drained");
                instance.state = InstanceState::Draining;
            }
            Action::Undrain { instance } => {
                let instance = self.instances.get_mut(&instance.0).unwrap();
                assert_eq!(instance.state, InstanceState::Draining);
                instance.state = InstanceState::Ready;
            }
            Action::Stop { instance: id, reason } => {
                let instance = self.instances.get_mut(&id.0).unwrap();
                assert!(matches!(instance.state, InstanceState::Ready | InstanceState::Draining));
                assert_eq!(instance.in_flight, 0, "a busy instance was stopped");
                assert!(!instance.pinned, "a pinned instance was stopped");
                instance.state = InstanceState::Stopping;
                if let StopReason::Room { for_model } = reason {
                    self.evictions += 1;
                    let oldest = self.queues[for_model.0 as usize][0].0;
                    assert!(
                        self.rules.resident_until(instance) <= self.now
                            || self.now - oldest >= self.rules.wait_max,
                        "thrash: neither resident long enough nor waited for long enough"
                    );
                }
                self.at(self.now + Duration::from_millis(3), Event::Stopped(id.0));
            }
        }
    }

    fn check(&self) {
        for (at, place) in self.places.iter().enumerate() {
            let here = || self.instances.values().filter(|i| i.device.0 as usize == at);
            let weights: BTreeMap<ModelKey, ByteSize> = here().map(|i| (i.model, i.pool_bytes)).collect();
            let weights: ByteSize = weights.values().copied().sum();
            let kv: ByteSize = here().map(|i| i.kv_bytes).sum();
            let count = u32::try_from(here().count()).unwrap();
            match *place {
                Place::Pool(Budgets { dram, kv: budget, slots }) => {
                    assert!(weights <= dram, "DRAM overcommitted");
                    assert!(kv <= budget, "KV overcommitted");
                    assert!(count <= slots, "more instances than workers");
                }
                Place::Device { memory, work, slots } => {
                    let taken = weights + kv + ByteSize(work.bytes() * u64::from(count));
                    assert!(taken <= memory, "device {at} overcommitted");
                    assert!(count <= slots, "more instances than workers");
                }
            }
        }
        assert!(
            self.instances.values().all(|i| i.device < DeviceId(u32::try_from(self.places.len()).unwrap()))
        );
    }
}

fn model(pool: u64, load_ms: u64) -> Model {
    Model {
        need: Need { pool_bytes: ByteSize(pool), kv_bytes: ByteSize(1) },
        load: Duration::from_millis(load_ms),
        keep_alive: KeepAlive::Forever,
        pinned: false,
        priority: 0,
        instances_max: 1,
        sequences: 4,
    }
}

/// Two models that don't fit together, both always wanted: batches, a bounded wait, no thrash.
#[test]
fn two_models_that_do_not_fit_together_alternate_in_batches() {
    let budgets = Budgets { dram: ByteSize(10), kv: ByteSize(8), slots: 4 };
    let mut sim = Sim::new(budgets, vec![model(10, 500), model(10, 500)]);
    for tick in 0..6000u64 {
        let model = usize::try_from(tick % 2).unwrap();
        let service = Duration::from_millis(300);
        sim.at(Duration::from_millis(tick * 100), Event::Arrive { model, service });
    }
    sim.run();
    assert_eq!(sim.served, 6000);
    assert!(sim.longest_wait < Duration::from_secs(20), "somebody waited {:?}", sim.longest_wait);
    assert!((20..=80).contains(&sim.evictions), "{} changes in ten minutes", sim.evictions);
}

#[test]
fn a_low_priority_gets_its_turn_later_but_gets_it() {
    let budgets = Budgets { dram: ByteSize(10), kv: ByteSize(8), slots: 4 };
    let mut important = model(10, 500);
    important.priority = 2;
    let mut sim = Sim::new(budgets, vec![important, model(10, 500)]);
    for tick in 0..4000u64 {
        let service = Duration::from_millis(300);
        sim.at(Duration::from_millis(tick * 100), Event::Arrive { model: 0, service });
    }
    sim.at(Duration::from_secs(60), Event::Arrive { model: 1, service: Duration::from_millis(300) });
    sim.run();
    assert_eq!(sim.served, 4001);
    assert!(sim.longest_wait > Duration::from_secs(40), "{:?}", sim.longest_wait);
    assert!(sim.longest_wait < Duration::from_secs(50), "{:?}", sim.longest_wait);
}

prop_compose! {
    fn any_model()(
        pool in 1u64..=10, kv in 1u64..=6, load_ms in 1u64..3000, keep in 0u64..4, priority in -1i32..=1,
        instances_max in 1u32..=2, sequences in 1u32..=4,
    ) -> Model {
        let keep_alive = if keep == 3 { KeepAlive::Forever } else { KeepAlive::For(Duration::from_secs(keep * 7)) };
        Model {
            need: Need { pool_bytes: ByteSize(pool), kv_bytes: ByteSize(kv) },
            load: Duration::from_millis(load_ms),
            keep_alive, pinned: false, priority, instances_max, sequences,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_request_is_served_within_bounds(
        mut models in prop::collection::vec(any_model(), 2..7),
        pin_first in any::<bool>(),
        arrivals in prop::collection::vec((0usize..7, 0u64..120_000, 1u64..5000), 1..250),
        slots in 2u32..6, devices in prop::collection::vec(22u64..40, 0..4),
    ) {
        let count = models.len();
        if pin_first {
            // A pinned model beside which every other one fits.
            models[0].pinned = true;
            models[0].need = Need { pool_bytes: ByteSize(2), kv_bytes: ByteSize(2) };
            models[0].instances_max = 1;
        }
        let budgets = Budgets { dram: ByteSize(12), kv: ByteSize(8), slots };
        let device = |memory: &u64| Place::Device { memory: ByteSize(*memory), work: ByteSize(1), slots };
        let places: Vec<Place> =
            if devices.is_empty() { vec![Place::Pool(budgets)] } else { devices.iter().map(device).collect() };
        let run = |models: Vec<Model>| {
            let mut sim = Sim::on(places.clone(), models);
            for (model, at_ms, service_ms) in &arrivals {
                let service = Duration::from_millis(*service_ms);
                sim.at(Duration::from_millis(*at_ms), Event::Arrive { model: model % count, service });
            }
            sim.run();
            sim
        };
        let sim = run(models.clone());
        prop_assert_eq!(sim.served, arrivals.len());
        // Each request waits at most for everybody who came before it, one after another, each batch with its
        // drain, its load and the longest residency that it is owed, and for the points of priority.
        let longest = Duration::from_secs(15 + 30) + Duration::from_secs(5 + 3 + 6) * u32::try_from(arrivals.len()).unwrap();
        prop_assert!(sim.longest_wait < longest);
        // The meta test: the same history twice is the same, step by step.
        prop_assert_eq!(sim.log, run(models).log);
    }
}
