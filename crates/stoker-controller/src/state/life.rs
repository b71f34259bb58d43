//! Decisions, and what became of instances.

use std::{path::PathBuf, time::Duration};

use stoker_scheduler::{
    estimate::Seconds,
    placement::NodeKey,
    residency::{Action, DemandView, InstanceState, ModelKey, Place, StopReason, View, decide},
};
use stoker_types::{
    DeviceId, InstanceId, Phase, Refusal, StartFailure, StartOrder, Started, StopFailure, StopMode, Tier,
    Timeline, WorkerId,
};

use super::{FIRST, Failed, Instance, Order, State, period, reason_in_words, server::sooner};
use crate::{report::Event, telemetry};

/// Decisions in a row before others get a turn: undraining seats waiters, which changes the demand.
const ROUNDS_MAX: usize = 4;

impl State {
    /// Decides until there is nothing to do, and leaves the orders to be taken.
    pub(crate) fn decide(&mut self, now: Duration) {
        self.forget_wanted(now);
        self.assign(now);
        self.wakeup = None;
        for server in self.servers.keys().copied().collect::<Vec<_>>() {
            let wakeup = self.decide_on(server, now);
            self.wakeup = sooner(self.wakeup, wakeup);
        }
        let wanted_until = self.active.iter().filter_map(|key| self.model(*key).wanted?.until).min();
        self.wakeup = sooner(self.wakeup, wanted_until);
    }

    /// What happens on one server. Returns when to look at it again.
    pub(super) fn decide_on(&mut self, server: NodeKey, now: Duration) -> Option<Duration> {
        let mut wakeup = None;
        for _ in 0..ROUNDS_MAX {
            let instances = self.instance_views(server);
            let demands: Vec<DemandView> = if self.shutting_down {
                Vec::new()
            } else {
                let assigned = self.server(server).into_iter().flat_map(|s| &s.assigned);
                assigned.filter_map(|key| self.demand(*key, server)).collect()
            };
            let places = self.server(server).map_or(&[][..], |s| &s.places);
            let view = View { places, instances: &instances, demands: &demands };
            let decision = decide(&view, &self.config.rules, now);
            wakeup = decision.next_wakeup;
            for action in &decision.actions {
                self.carry_out(server, *action, now);
            }
            if decision.actions.is_empty() {
                break;
            }
        }
        wakeup
    }

    fn forget_wanted(&mut self, now: Duration) {
        let over: Vec<ModelKey> = self
            .active
            .iter()
            .copied()
            .filter(|key| self.model(*key).wanted.and_then(|w| w.until).is_some_and(|until| until <= now))
            .collect();
        for key in over {
            self.model_mut(key).wanted = None;
            self.mark(key);
        }
    }

    fn carry_out(&mut self, server: NodeKey, action: Action, now: Duration) {
        match action {
            Action::Start { model, device } => self.start(model, server, device, now),
            Action::Drain { instance, for_model } => {
                let terms = format!("`{}` has waited long enough", self.model(for_model).facts.model);
                self.set_state(instance, InstanceState::Draining, Event::Drain, terms, now);
            }
            Action::Undrain { instance } => {
                let key = self.instances[&instance].model;
                let terms = "nobody needs its room any more".into();
                self.set_state(instance, InstanceState::Ready, Event::Undrain, terms, now);
                self.serve(key, now);
            }
            Action::Stop { instance, reason } => self.stop(instance, reason, StopMode::IfIdle, now),
        }
    }

    fn set_state(
        &mut self,
        id: InstanceId,
        state: InstanceState,
        event: Event,
        terms: String,
        now: Duration,
    ) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        instance.state = state;
        let key = instance.model;
        self.map_instance(id, now);
        self.record(id, key, event, terms, now);
    }

    fn start(&mut self, key: ModelKey, on: NodeKey, device: DeviceId, now: Duration) {
        let Ok(sizing) = self.sizing_on(key, on) else { return };
        let prompt_tokens = self.model(key).queue.front().map_or(0, |waiter| waiter.prompt_tokens);
        let estimate = self.estimate(key, on, device, prompt_tokens, Duration::ZERO, now);
        let Some(server) = self.servers.get_mut(&on) else { return };
        let id = InstanceId(self.instance_next);
        self.instance_next += 1;
        let generation = server.next_generation();
        let terms = if server.has_devices() || !server.name.is_empty() {
            format!("on {}: {estimate}", server.device_name(device))
        } else {
            estimate.to_string()
        };
        self.record(id, key, Event::Start, terms, now);
        let order = StartOrder {
            instance: id,
            generation,
            model: self.model(key).facts.model.clone(),
            device,
            context: sizing.context,
            sequences_max: sizing.sequences,
            kv_bytes: sizing.kv_bytes,
        };
        self.orders.push(Order::Start(on, order));
        self.model_mut(key).instances.push(id);
        self.instances.insert(
            id,
            Instance {
                model: key,
                server: on,
                device,
                state: InstanceState::Starting,
                sizing,
                generation,
                socket: PathBuf::new(),
                worker: None,
                in_flight: 0,
                last_used: now,
                decided_at: now,
                ready_at: now,
                load_time: estimate.load(),
                settled_at: Duration::ZERO,
                leaving: false,
                lost: None,
                estimate,
                timeline: Timeline::default(),
            },
        );
        self.map_instance(id, now);
        self.changed();
    }

    /// Tells an instance to stop. By policy (`IfIdle`) only one that nobody uses; `Now` is the operator's.
    pub(crate) fn stop(&mut self, id: InstanceId, reason: StopReason, mode: StopMode, now: Duration) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        assert!(
            matches!(instance.state, InstanceState::Ready | InstanceState::Draining),
            "an instance that is loading or stopping is not told to stop"
        );
        assert!(mode == StopMode::Now || instance.in_flight == 0, "a busy instance is never evicted");
        instance.state = InstanceState::Stopping;
        let (key, server) = (instance.model, instance.server);
        self.map_instance(id, now);
        self.orders.push(Order::Stop(server, id, mode));
        telemetry::stopped(reason);
        self.record(id, key, Event::Stop, reason_in_words(reason, &self.models), now);
        self.changed();
    }

    /// A start has ended. `ordered_at` is when the order left for the node.
    pub(crate) fn started(
        &mut self,
        id: InstanceId,
        result: Result<Started, StartFailure>,
        ordered_at: Duration,
        now: Duration,
    ) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let key = instance.model;
        let lost = instance.lost.take();
        let started = match (result, lost) {
            (Ok(started), None) => started,
            (Ok(_), Some(detail)) => {
                let model = self.model(key).facts.model.clone();
                return self.start_failed(id, StartFailure::Worker { model, detail }, now);
            }
            (Err(failure), _) => return self.start_failed(id, failure, now),
        };
        let (server, device) = (instance.server, instance.device);
        instance.state = InstanceState::Ready;
        instance.socket = started.socket;
        instance.worker = Some(started.worker);
        instance.ready_at = now;
        instance.last_used = now;
        instance.load_time = now.saturating_sub(ordered_at);
        let mut timeline = started.timeline;
        for phase in &mut timeline.phases {
            phase.predicted = phase.predicted.or_else(|| instance.estimate.phase(phase.phase));
        }
        timeline.record(Phase::Scheduled, None, ordered_at.saturating_sub(instance.decided_at));
        timeline.place(Phase::Scheduled, period(instance.decided_at, ordered_at, now));
        instance.timeline = timeline.clone();
        let (took, predicted) = (instance.load_time, instance.estimate.load());
        telemetry::started(took, predicted);
        let place = self.server(server).and_then(|s| s.places.get(device.0 as usize));
        let mapped = matches!(place, Some(Place::Pool(_)));
        self.learn(key, server, &timeline, mapped, now);
        self.map_instance(id, now);
        let model = self.model_mut(key);
        model.retried = false;
        model.failed = None;
        model.avoid = None;
        model.wanted = None;
        let terms = format!("ready in {}, {} were expected", Seconds(took), Seconds(predicted));
        self.record(id, key, Event::Ready, terms, now);
        self.serve(key, now);
        self.changed();
    }

    /// `mapped`: weights were mapped where they are. How fast they are copied, the store measures.
    fn learn(&mut self, key: ModelKey, server: NodeKey, timeline: &Timeline, mapped: bool, now: Duration) {
        let facts = &self.models[key.0 as usize].facts;
        let (name, weight_bytes) = (facts.model.clone(), facts.weight_bytes);
        let Some(server) = self.servers.get_mut(&server) else { return };
        for (tier, phase) in
            [(Tier::Remote, Phase::RemoteRead), (Tier::Ssd, Phase::SsdRead), (Tier::Dram, Phase::DeviceCopy)]
        {
            if tier == Tier::Dram && !mapped {
                continue;
            }
            let Some(time) = timeline.actual(phase) else { continue };
            let bytes = match tier {
                // All of the weights are mapped, wherever they came from.
                Tier::Dram => weight_bytes,
                _ => timeline.bytes.iter().filter(|b| b.tier == tier).map(|b| b.bytes).sum(),
            };
            server.estimator.observe_copy(tier, &name, bytes, time, now);
        }
        if let Some(time) = timeline.actual(Phase::Init) {
            server.estimator.observe_init(&name, time, now);
        }
    }

    fn start_failed(&mut self, id: InstanceId, failure: StartFailure, now: Duration) {
        telemetry::start_failed(&failure);
        let server = self.instances.get(&id).map_or(FIRST, |instance| instance.server);
        let Some(key) = self.remove(id) else { return };
        self.record(id, key, Event::Failed, failure.to_string(), now);
        tracing::warn!(model = %self.model(key).facts.model, instance = %id, %failure, "a start failed");
        let stale = if let StartFailure::StaleOrder { seen, .. } = failure {
            self.servers.get_mut(&server).into_iter().for_each(|server| server.has_seen(seen));
            // Nor is the next instance's number one that the node knows from before.
            self.instance_next = self.instance_next.max(seen.0.saturating_add(1));
            true
        } else {
            false
        };
        // Decided with more memory than there is. What is known of it by now may have others make room.
        let planned_anew =
            matches!(failure, StartFailure::OutOfMemory { .. }) && self.sizing_on(key, server).is_ok();
        // Another server may do what this one couldn't.
        self.unassign(key);
        self.model_mut(key).avoid = Some(server);
        let model = self.model_mut(key);
        if (failure.is_transient() || stale || planned_anew) && !model.retried {
            // Who waits goes on waiting: the next decision starts it once more.
            model.retried = true;
            return;
        }
        model.retried = false;
        self.back_off(key, failure, now);
    }

    /// A model can't be started: who waits for it is told so, and who comes soon.
    fn back_off(&mut self, key: ModelKey, failure: StartFailure, now: Duration) {
        let (backoff_min, backoff_max) = (self.config.backoff_min, self.config.backoff_max);
        let model = self.model_mut(key);
        // A changed file is nothing to back off from: the next start finds the new one.
        if !matches!(failure, StartFailure::Changed { .. }) {
            let count = model.failed.as_ref().map_or(0, |failed| failed.count).saturating_add(1);
            let backoff = backoff_min.saturating_mul(1 << (count - 1).min(16)).min(backoff_max);
            model.failed = Some(Failed { failure: failure.clone(), at: now, until: now + backoff, count });
        }
        // Another instance of the model may still serve who waits.
        if model.instances.is_empty() {
            self.refuse_all(key, &Refusal::Start(failure));
        }
        self.changed();
    }

    /// A stop has ended.
    pub(crate) fn stopped(&mut self, id: InstanceId, result: &Result<(), StopFailure>, now: Duration) {
        let busy_retry = self.config.busy_retry;
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let key = instance.model;
        match result {
            Ok(()) | Err(StopFailure::Unknown { .. }) => {
                self.remove(id);
                self.record(id, key, Event::Gone, String::new(), now);
            }
            Err(StopFailure::Busy { sequences, .. }) => {
                instance.state = InstanceState::Ready;
                instance.settled_at = now + busy_retry;
                self.map_instance(id, now);
                let terms = format!("{sequences} sequences are still running");
                self.record(id, key, Event::Busy, terms, now);
                self.serve(key, now);
            }
        }
        self.changed();
    }

    /// A worker died.
    pub(crate) fn lost(
        &mut self,
        server: NodeKey,
        worker: WorkerId,
        instance: Option<InstanceId>,
        reason: &str,
        now: Duration,
    ) {
        let is_it = |i: &Instance| i.server == server && i.worker == Some(worker);
        let by_worker = || self.instances.iter().find(|(_, i)| is_it(i)).map(|(id, _)| *id);
        let Some(id) = instance.or_else(by_worker) else { return };
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if instance.state == InstanceState::Starting {
            // The start itself will say so; unless it had been reported as ready already.
            instance.lost = Some(reason.to_owned());
            return;
        }
        telemetry::lost();
        let seats = instance.in_flight;
        if let Some(key) = self.remove(id) {
            let terms = format!("{reason}; {seats} sequences went with it");
            tracing::warn!(model = %self.model(key).facts.model, instance = %id, %worker, terms, "a worker died");
            self.record(id, key, Event::Lost, terms, now);
        }
        self.changed();
    }

    /// An instance that was served already has its weights whole.
    pub(crate) fn landed(&mut self, id: InstanceId, took: Duration, timeline: Timeline, now: Duration) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        // What its start took was less than what it costs to have it again.
        instance.load_time = instance.load_time.max(took);
        instance.timeline.replace(timeline.clone());
        let (key, server) = (instance.model, instance.server);
        self.learn(key, server, &timeline, false, now);
        self.record(id, key, Event::Landed, format!("its weights are there after {}", Seconds(took)), now);
    }

    /// An instance that was served already didn't get its weights whole.
    pub(crate) fn undelivered(&mut self, id: InstanceId, failure: StartFailure, now: Duration) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if instance.state == InstanceState::Starting {
            // The start was reported as ready before; that report is on its way.
            instance.lost = Some(failure.to_string());
            return;
        }
        telemetry::lost();
        if let Some(key) = self.remove(id) {
            tracing::warn!(model = %self.model(key).facts.model, instance = %id, %failure, "a model didn't arrive whole");
            self.record(id, key, Event::Lost, failure.to_string(), now);
            self.back_off(key, failure, now);
        }
    }

    /// Instances of a server that should have a worker.
    pub(crate) fn serving(&self, server: NodeKey) -> Vec<InstanceId> {
        let serving = |i: &Instance| {
            i.server == server && matches!(i.state, InstanceState::Ready | InstanceState::Draining)
        };
        self.instances.iter().filter(|(_, i)| serving(i)).map(|(id, _)| *id).collect()
    }

    pub(super) fn remove(&mut self, id: InstanceId) -> Option<ModelKey> {
        let instance = self.instances.remove(&id)?;
        self.unmap_instance(id);
        self.model_mut(instance.model).instances.retain(|other| *other != id);
        // Its seats are void; the permits find no instance when they are dropped.
        self.seats_taken -= instance.in_flight;
        Some(instance.model)
    }

    fn changed(&self) {
        telemetry::instances(self.instances.len());
        self.changed.send_replace(());
    }
}
