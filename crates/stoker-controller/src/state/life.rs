//! Decisions, and what became of instances.

use std::{path::PathBuf, time::Duration};

use stoker_scheduler::{
    estimate::Seconds,
    residency::{Action, DemandView, InstanceState, ModelKey, Place, StopReason, decide},
};
use stoker_types::{
    DeviceId, Generation, InstanceId, Phase, Refusal, StartFailure, StartOrder, Started, StopFailure,
    StopMode, Tier, Timeline, WorkerId,
};

use super::{Failed, Instance, Order, State, period, reason_in_words};
use crate::{report::Event, telemetry};

/// Decisions in a row before others get a turn: undraining seats waiters, which changes the demand.
const ROUNDS_MAX: usize = 4;

impl State {
    /// Decides until there is nothing to do, and leaves the orders to be taken.
    pub(crate) fn decide(&mut self, now: Duration) {
        self.forget_wanted(now);
        for _ in 0..ROUNDS_MAX {
            let instances = self.instance_views();
            let demands: Vec<DemandView> = if self.shutting_down {
                Vec::new()
            } else {
                self.active.iter().filter_map(|key| self.demand(*key)).collect()
            };
            let decision = decide(&self.view(&instances, &demands), &self.config.rules, now);
            self.wakeup = decision.next_wakeup;
            for action in &decision.actions {
                self.carry_out(*action, now);
            }
            if decision.actions.is_empty() {
                break;
            }
        }
        let wanted_until = self.active.iter().filter_map(|key| self.model(*key).wanted?.until).min();
        self.wakeup = [self.wakeup, wanted_until].into_iter().flatten().min();
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

    fn carry_out(&mut self, action: Action, now: Duration) {
        match action {
            Action::Start { model, device } => self.start(model, device, now),
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
        self.record(id, key, event, terms, now);
    }

    fn start(&mut self, key: ModelKey, device: DeviceId, now: Duration) {
        let Ok(sizing) = self.model(key).sizing.clone() else { return };
        let id = InstanceId(self.instance_next);
        self.instance_next += 1;
        let generation = Generation(self.generation_next);
        self.generation_next += 1;
        let prompt_tokens = self.model(key).queue.front().map_or(0, |waiter| waiter.prompt_tokens);
        let estimate = self.estimate(key, device, prompt_tokens, Duration::ZERO, now);
        let terms = match self.config.devices.is_empty() {
            true => estimate.to_string(),
            false => format!("on {}: {estimate}", self.device_name(device)),
        };
        self.record(id, key, Event::Start, terms, now);
        self.orders.push(Order::Start(StartOrder {
            instance: id,
            generation,
            model: self.model(key).facts.model.clone(),
            device,
            context: sizing.context,
            sequences_max: sizing.sequences,
            kv_bytes: sizing.kv_bytes,
        }));
        self.model_mut(key).instances.push(id);
        self.instances.insert(
            id,
            Instance {
                model: key,
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
        let key = instance.model;
        self.orders.push(Order::Stop(id, mode));
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
        let device = instance.device;
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
        let mapped = matches!(self.places[device.0 as usize], Place::Pool(_));
        self.learn(key, &timeline, mapped, now);
        let model = self.model_mut(key);
        model.retried = false;
        model.failed = None;
        model.wanted = None;
        let terms = format!("ready in {}, {} were expected", Seconds(took), Seconds(predicted));
        self.record(id, key, Event::Ready, terms, now);
        self.serve(key, now);
        self.changed();
    }

    /// `mapped`: weights were mapped where they are. How fast they are copied, the store measures.
    fn learn(&mut self, key: ModelKey, timeline: &Timeline, mapped: bool, now: Duration) {
        let name = self.models[key.0 as usize].facts.model.clone();
        for (tier, phase) in
            [(Tier::Remote, Phase::RemoteRead), (Tier::Ssd, Phase::SsdRead), (Tier::Dram, Phase::DeviceCopy)]
        {
            if tier == Tier::Dram && !mapped {
                continue;
            }
            let Some(time) = timeline.actual(phase) else { continue };
            let bytes = match tier {
                // All of the weights are mapped, wherever they came from.
                Tier::Dram => self.models[key.0 as usize].facts.weight_bytes,
                _ => timeline.bytes.iter().filter(|b| b.tier == tier).map(|b| b.bytes).sum(),
            };
            self.estimator.observe_copy(tier, &name, bytes, time, now);
        }
        if let Some(time) = timeline.actual(Phase::Init) {
            self.estimator.observe_init(&name, time, now);
        }
    }

    fn start_failed(&mut self, id: InstanceId, failure: StartFailure, now: Duration) {
        telemetry::start_failed(&failure);
        let Some(key) = self.remove(id) else { return };
        self.record(id, key, Event::Failed, failure.to_string(), now);
        tracing::warn!(model = %self.model(key).facts.model, instance = %id, %failure, "a start failed");
        let stale = if let StartFailure::StaleOrder { seen, .. } = failure {
            self.generation_next = self.generation_next.max(seen.0.saturating_add(1));
            true
        } else {
            false
        };
        // Decided with more memory than there is. What is known of it by now may have others make room.
        let planned_anew =
            matches!(failure, StartFailure::OutOfMemory { .. }) && self.model(key).sizing.is_ok();
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
        worker: WorkerId,
        instance: Option<InstanceId>,
        reason: &str,
        now: Duration,
    ) {
        let by_worker = || self.instances.iter().find(|(_, i)| i.worker == Some(worker)).map(|(id, _)| *id);
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
        let key = instance.model;
        self.learn(key, &timeline, false, now);
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

    /// Instances that should have a worker.
    pub(crate) fn serving(&self) -> Vec<InstanceId> {
        let serving = |i: &Instance| matches!(i.state, InstanceState::Ready | InstanceState::Draining);
        self.instances.iter().filter(|(_, i)| serving(i)).map(|(id, _)| *id).collect()
    }

    fn remove(&mut self, id: InstanceId) -> Option<ModelKey> {
        let instance = self.instances.remove(&id)?;
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
