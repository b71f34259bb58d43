//! Requests in, seats out and back.

use std::time::Duration;

use stoker_scheduler::{
    Robust,
    estimate::Seconds,
    residency::{InstanceState, ModelKey},
};
use stoker_types::{Admit, InstanceId, KeepAlive, ModelFacts, Phase, Refusal, SeatInfo, StartFailure};
use tokio::sync::oneshot;

use super::{Grant, Model, State, Waiter, Wanted, period};
use crate::telemetry;

/// What a waiting request is told, once.
pub(crate) type Reply = Result<Grant, Refusal>;

/// A place in a queue.
pub(crate) struct Place {
    pub(crate) model: ModelKey,
    pub(crate) id: u64,
    pub(crate) reply: oneshot::Receiver<Reply>,
}

/// Longest `Retry-After` for a full queue.
const RETRY_MAX: Duration = Duration::from_mins(1);

impl State {
    /// A seat that is free now and that nobody waits for. The way of a request to a model that is ready.
    pub(crate) fn seat_now(&mut self, admit: &Admit, now: Duration) -> Option<Grant> {
        let key = self.key(&admit.model)?;
        if self.shutting_down || !self.model(key).queue.is_empty() {
            return None;
        }
        let instance = self.free_seat(key, admit.sequences)?;
        Some(self.grant(instance, key, admit.sequences, admit.keep_alive, None, admit.prompt_tokens, now))
    }

    /// A seat, or a place in the queue.
    pub(crate) fn enter(
        &mut self,
        admit: &Admit,
        facts: Option<ModelFacts>,
        now: Duration,
    ) -> Result<Result<Grant, Place>, Refusal> {
        if self.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        let Some(facts) = facts else {
            return Err(StartFailure::UnknownModel { model: admit.model.clone() }.into());
        };
        let key = self.know(facts);
        if let Some(grant) = self.seat_now(admit, now) {
            return Ok(Ok(grant));
        }
        self.map_model(key, now);
        self.check_startable(key, now)?;
        self.check_bounds(key, admit, now)?;
        self.check_in_time(key, admit, now)?;
        let (reply, receiver) = oneshot::channel();
        let id = self.waiter_next;
        self.waiter_next += 1;
        let model = self.model_mut(key);
        let sequences = admit.sequences.max(1);
        model.waiting_sequences = model.waiting_sequences.saturating_add(sequences);
        model.queue.push_back(Waiter {
            id,
            client: admit.client.clone(),
            sequences,
            prompt_tokens: admit.prompt_tokens,
            keep_alive: admit.keep_alive,
            since: now,
            reply,
        });
        self.waiting += 1;
        *self.waiting_by_client.entry(admit.client.clone()).or_default() += 1;
        telemetry::waiting(self.waiting);
        self.mark(key);
        Ok(Err(Place { model: key, id, reply: receiver }))
    }

    /// Takes a request out of its queue; false when it is no longer there, because it has its reply.
    pub(crate) fn leave(&mut self, key: ModelKey, id: u64) -> bool {
        let queue = &mut self.model_mut(key).queue;
        let Ok(at) = queue.binary_search_by_key(&id, |waiter| waiter.id) else { return false };
        if let Some(waiter) = queue.remove(at) {
            self.left(key, &waiter);
        }
        self.mark(key);
        true
    }

    /// Gives a seat back. True when the owner should look.
    pub(crate) fn release(
        &mut self,
        id: InstanceId,
        sequences: u32,
        taken_at: Duration,
        now: Duration,
    ) -> bool {
        // The seats of an instance that is gone went with it.
        let Some(instance) = self.instances.get_mut(&id) else { return false };
        assert!(instance.in_flight >= sequences, "a seat was given back twice");
        instance.in_flight -= sequences;
        instance.last_used = now;
        let key = instance.model;
        let draining = instance.state == InstanceState::Draining || instance.leaving;
        self.seats_taken -= sequences;
        self.map_instance(id, now);
        let took = now.saturating_sub(taken_at).as_secs_f64();
        let model = self.model_mut(key);
        match &mut model.service {
            Some(service) => service.observe(took, now),
            None => model.service = Robust::first(took, now),
        }
        self.serve(key, now);
        if self.shutting_down && self.seats_taken == 0 {
            self.changed.send_replace(());
        }
        let expires = match self.model(key).keep_alive() {
            KeepAlive::For(time) => now.checked_add(time),
            KeepAlive::Forever => None,
        };
        let sooner = expires.is_some_and(|at| self.wakeup.is_none_or(|wakeup| at < wakeup));
        draining || sooner || !self.active.is_empty()
    }

    /// Seats who waits, in order, as long as there are seats.
    pub(crate) fn serve(&mut self, key: ModelKey, now: Duration) {
        while let Some(first) = self.model(key).queue.front() {
            let Some(instance) = self.free_seat(key, first.sequences) else { break };
            let Some(waiter) = self.model_mut(key).queue.pop_front() else { break };
            self.left(key, &waiter);
            let grant = self.grant(
                instance,
                key,
                waiter.sequences,
                waiter.keep_alive,
                Some(waiter.since),
                waiter.prompt_tokens,
                now,
            );
            if let Err(Ok(grant)) = waiter.reply.send(Ok(grant)) {
                // A waiter leaves its queue before it drops its receiver, so this is a runtime that is being torn
                // down.
                self.release(instance, grant.sequences, now, now);
            }
        }
        self.mark(key);
    }

    /// Refuses everybody who waits for a model.
    pub(crate) fn refuse_all(&mut self, key: ModelKey, refusal: &Refusal) {
        while let Some(waiter) = self.model_mut(key).queue.pop_front() {
            self.left(key, &waiter);
            // Who doesn't listen any more needs no answer.
            let _ = waiter.reply.send(Err(refusal.clone()));
        }
        self.model_mut(key).wanted = None;
        self.mark(key);
    }

    fn left(&mut self, key: ModelKey, waiter: &Waiter) {
        let model = self.model_mut(key);
        model.waiting_sequences = model.waiting_sequences.saturating_sub(waiter.sequences);
        self.waiting -= 1;
        if let Some(count) = self.waiting_by_client.get_mut(&waiter.client) {
            *count -= 1;
            if *count == 0 {
                self.waiting_by_client.remove(&waiter.client);
            }
        }
        telemetry::waiting(self.waiting);
    }

    /// The ready instance with the fewest seats taken that has so many free.
    fn free_seat(&self, key: ModelKey, sequences: u32) -> Option<InstanceId> {
        self.model(key)
            .instances
            .iter()
            .filter_map(|id| self.instances.get(id).map(|instance| (id, instance)))
            .filter(|(_, instance)| {
                let seats = instance.sizing.sequences;
                instance.state == InstanceState::Ready
                    && !instance.leaving
                    && seats - instance.in_flight >= sequences.clamp(1, seats)
            })
            .min_by_key(|(id, instance)| (instance.in_flight, **id))
            .map(|(id, _)| *id)
    }

    #[expect(clippy::too_many_arguments, reason = "one call for who waited, one for who did not")]
    fn grant(
        &mut self,
        id: InstanceId,
        key: ModelKey,
        sequences: u32,
        keep_alive: Option<KeepAlive>,
        waited_since: Option<Duration>,
        prompt_tokens: u32,
        now: Duration,
    ) -> Grant {
        let rules = self.config.rules;
        let model = &mut self.models[key.0 as usize];
        model.uses = rules.decayed(model.uses, now.saturating_sub(model.used_at)) + 1.0;
        model.used_at = now;
        if keep_alive.is_some() {
            model.keep_alive = keep_alive;
        }
        let instance = self.instances.get_mut(&id).expect("chosen among the instances under the same lock");
        // `n` may exceed what an instance decodes at once: it then gets the instance for itself.
        let sequences = sequences.clamp(1, instance.sizing.sequences);
        instance.in_flight += sequences;
        assert!(instance.in_flight <= instance.sizing.sequences, "more seats than sequences");
        instance.last_used = now;
        self.seats_taken += sequences;
        // A request that was announced has caused the start too, though it did not wait for all of it.
        let caused_since = model.announced.take().or(waited_since);
        let cold_start = caused_since.filter(|since| *since < instance.ready_at).map(|since| {
            let mut timeline = instance.timeline.clone();
            let before = instance.decided_at.saturating_sub(since);
            let after = waited_since.map_or(Duration::ZERO, |w| now.saturating_sub(instance.ready_at.max(w)));
            timeline.record(Phase::Queued, Some(instance.estimate.room), before + after);
            let waited = if before > Duration::ZERO {
                period(since, instance.decided_at, now)
            } else {
                period(now.saturating_sub(after), now, now)
            };
            timeline.place(Phase::Queued, waited);
            let facts = &model.facts;
            let prefill = self.servers.get(&instance.server).map_or(Duration::ZERO, |server| {
                server.estimator.prefill(&facts.model, facts.weight_bytes, prompt_tokens)
            });
            timeline.record(Phase::Prefill, Some(prefill), Duration::ZERO);
            timeline
        });
        let queued = waited_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        telemetry::waited(queued);
        let instance = &self.instances[&id];
        let info = SeatInfo {
            instance: id,
            generation: instance.generation,
            socket: instance.socket.clone(),
            context: instance.sizing.context,
            cold_start,
            queued,
        };
        self.map_instance(id, now);
        Grant { info, sequences, at: now }
    }

    /// Refuses what can't be started at all, or failed to just now.
    fn check_startable(&self, key: ModelKey, now: Duration) -> Result<(), Refusal> {
        if let Some(refusal) = self.too_large(key) {
            return Err(refusal);
        }
        let model = self.model(key);
        match &model.failed {
            Some(failed) if failed.until > now && model.instances.is_empty() => {
                Err(failed.failure.clone().into())
            }
            _ => Ok(()),
        }
    }

    fn check_bounds(&self, key: ModelKey, admit: &Admit, now: Duration) -> Result<(), Refusal> {
        let limits = self.config.queue;
        let model = self.model(key);
        let of_client = self.waiting_by_client.get(&admit.client).copied().unwrap_or(0);
        let (waiting, scope) = if model.queue.len() >= limits.per_model_max {
            (model.queue.len(), "for this model")
        } else if self.waiting >= limits.total_max {
            (self.waiting, "in all")
        } else if of_client >= limits.per_client_max() {
            (of_client, "from this client")
        } else {
            return Ok(());
        };
        let oldest = match scope {
            "for this model" => model.oldest_since(),
            "in all" => self.models.iter().filter_map(Model::oldest_since).min(),
            _ => self
                .models
                .iter()
                .filter_map(|m| m.queue.iter().find(|w| w.client == admit.client).map(|w| w.since))
                .min(),
        };
        Err(Refusal::QueueFull {
            waiting,
            scope: scope.into(),
            oldest: oldest.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
            retry_after: self.wait_expected(key, now).clamp(Duration::from_secs(1), RETRY_MAX),
        })
    }

    /// Refuses a request whose deadline no start can meet. The start goes ahead, so that who comes back after the
    /// time that the refusal names finds the model ready.
    fn check_in_time(&mut self, key: ModelKey, admit: &Admit, now: Duration) -> Result<(), Refusal> {
        let outlook = self.outlook(key, admit.prompt_tokens, now)?;
        if outlook.at_least <= admit.wait_max {
            return Ok(());
        }
        let model = self.model_mut(key);
        if model.wanted.is_none() && model.keep_alive() != KeepAlive::For(Duration::ZERO) {
            let until = now.saturating_add(outlook.eta.min(RETRY_MAX));
            model.wanted = Some(Wanted { since: now, until: Some(until), evicts: true });
        }
        self.mark(key);
        Err(Refusal::NotInTime { wait_max: admit.wait_max, terms: outlook.terms, eta: outlook.eta })
    }

    /// What a request is told whose time is over.
    pub(crate) fn too_late(&self, key: ModelKey, admit: &Admit, now: Duration) -> Refusal {
        let (terms, eta) = match self.outlook(key, admit.prompt_tokens, now) {
            Ok(outlook) => (outlook.terms, outlook.eta),
            Err(refusal) => return refusal,
        };
        let waiting = self.model(key).queue.len();
        let terms = if waiting > 0 { format!("{terms}; {waiting} more wait for this model") } else { terms };
        let eta = eta.max(self.wait_expected(key, now)).max(Duration::from_millis(100));
        Refusal::NotInTime { wait_max: admit.wait_max, terms, eta }
    }

    /// How long who joins the queue now would wait, going by how long seats were taken so far.
    fn wait_expected(&self, key: ModelKey, now: Duration) -> Duration {
        let model = self.model(key);
        let start = self.outlook(key, 0, now).map_or(Duration::ZERO, |outlook| outlook.eta);
        let seats = self.sizing(&model.facts).map_or(1, |sizing| sizing.sequences.max(1));
        let service = model.service.map_or(0.0, |service| service.value());
        let turns = f64::from(model.waiting_sequences) / f64::from(seats);
        start.saturating_add(Duration::try_from_secs_f64(service * turns).unwrap_or(RETRY_MAX))
    }
}

/// "3 requests", for terms.
pub(super) fn seats_in_words(in_flight: u32, last_used: Duration) -> String {
    if in_flight == 0 { format!("idle for {}", Seconds(last_used)) } else { format!("{in_flight} running") }
}
