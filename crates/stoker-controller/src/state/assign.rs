//! On which server a model starts. With one server there is nothing to choose; with more, `stoker_scheduler::placement`
//! chooses, and each server's own policy then makes the room.

use std::time::Duration;

use stoker_scheduler::{
    placement::{
        Activity, Demand, DeviceSet, DeviceSpec, InstanceSpec, Judgement, ModelSpec, NodeKey, NodeRates,
        NodeSpec, Plan, Policy, Residency, place,
    },
    residency::{Budgets, InstanceState, ModelKey, Place},
};
use stoker_types::{DeviceId, InstanceId, Tier};

use super::{FIRST, Instance, Server, State};
use crate::{config::ServerConfig, report::Event};

/// Waiting models in one decision for which another server is sought.
const SOUGHT_MAX: usize = 16;

impl State {
    /// A server that may have instances from now on.
    pub(crate) fn join(&mut self, config: ServerConfig, now: Duration) -> NodeKey {
        let key = NodeKey(self.server_next);
        self.server_next += 1;
        let server = Server::new(config, &self.config);
        self.servers.insert(key, server);
        for model in self.active.iter().filter(|model| self.model(**model).wanted.is_some()) {
            if let Some(refusal) = self.too_large(*model) {
                tracing::warn!(model = %self.model(*model).facts.model, %refusal, "can't be brought to this server");
            }
        }
        if self.servers.len() == 2 {
            for key in self.servers.keys().copied().collect::<Vec<_>>() {
                self.map_server(key, now);
            }
            for id in self.instances.keys().copied().collect::<Vec<_>>() {
                self.map_instance(id, now);
            }
        } else {
            self.map_server(key, now);
        }
        key
    }

    /// A server is gone, and with it its instances. Who waits for one of them waits for a start elsewhere.
    pub(crate) fn part(&mut self, key: NodeKey, reason: &str, now: Duration) {
        let Some(server) = self.servers.remove(&key) else { return };
        self.map.remove_node(key);
        for model in server.assigned {
            self.model_mut(model).server = None;
        }
        let here = self.instances.iter().filter(|(_, instance)| instance.server == key);
        for id in here.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(model) = self.remove(id) {
                self.record(id, model, Event::Lost, reason.to_owned(), now);
            }
        }
        self.changed.send_replace(());
    }

    /// Chooses servers for the models that wait for a start, and lets each server begin what it can at once.
    pub(super) fn assign(&mut self, now: Duration) {
        let mut waiting: Vec<(Duration, ModelKey)> = Vec::new();
        for key in self.active.iter().copied().collect::<Vec<_>>() {
            if self.shutting_down || !self.wants_start(key) {
                self.unassign(key);
            } else {
                let model = self.model(key);
                let since = model.oldest_since().or(model.wanted.map(|w| w.since)).unwrap_or(now);
                waiting.push((since, key));
            }
        }
        if self.servers.len() < 2 {
            let only = self.servers.keys().next().copied();
            for (_, key) in waiting {
                self.assign_to(key, only);
            }
            return;
        }
        waiting.sort_unstable();
        for (_, key) in waiting.into_iter().take(SOUGHT_MAX) {
            let found = self.soonest(key, now);
            let server = match (self.model(key).server, found) {
                // What waits there already goes elsewhere only if it starts there at once.
                (Some(server), Some(plan)) if !plan.is_immediate() => Some(server),
                (Some(server), None) => Some(server),
                (_, Some(plan)) => Some(plan.node),
                (None, None) => self.least_wanted(key),
            };
            self.assign_to(key, server);
            if let Some(server) = server {
                // So that the next model sees what this one takes.
                self.decide_on(server, now);
            }
        }
    }

    /// Whether instances that there are, or are coming, don't do for a model's demand.
    fn wants_start(&self, key: ModelKey) -> bool {
        self.servers.keys().any(|server| self.demand(key, *server).is_some())
    }

    fn assign_to(&mut self, key: ModelKey, server: Option<NodeKey>) {
        let before = std::mem::replace(&mut self.model_mut(key).server, server);
        if before == server {
            return;
        }
        if let Some(before) = before.and_then(|before| self.servers.get_mut(&before)) {
            before.assigned.remove(&key);
        }
        if let Some(server) = server.and_then(|server| self.servers.get_mut(&server)) {
            server.assigned.insert(key);
        }
    }

    pub(super) fn unassign(&mut self, key: ModelKey) {
        self.assign_to(key, None);
    }

    /// Where a start would be sought now: of what a request is told that asks.
    pub(super) fn likely(&self, key: ModelKey, now: Duration) -> NodeKey {
        let first = || self.servers.keys().next().copied().unwrap_or(FIRST);
        if self.servers.len() < 2 {
            return first();
        }
        let assigned = self.model(key).server;
        assigned
            .or_else(|| self.planned(key, now).map(|plan| plan.node))
            .or_else(|| self.least_wanted(key))
            .unwrap_or_else(first)
    }

    /// The server on which a model starts soonest.
    fn soonest(&mut self, key: ModelKey, now: Duration) -> Option<Plan> {
        self.map_model(key, now);
        self.planned(key, now)
    }

    fn planned(&self, key: ModelKey, now: Duration) -> Option<Plan> {
        let prompt_tokens = self.model(key).queue.front().map_or(0, |waiter| waiter.prompt_tokens);
        // Streams are not taken elsewhere yet.
        let judgement = Judgement { rules: self.config.rules, migrate: false, ..Judgement::default() };
        let avoid = self.model(key).avoid;
        let at = |avoid| {
            place(
                &self.map,
                &Demand { model: key, prompt_tokens, avoid },
                Policy::StartupTime,
                &judgement,
                now,
            )
        };
        // Better there once more than nowhere.
        at(avoid)
            .or_else(|why| if avoid.is_some() { at(None) } else { Err(why) })
            .inspect_err(|why| tracing::debug!(model = %self.model(key).facts.model, %why, "no server"))
            .ok()
    }

    /// Of the servers that are large enough, the one for which the fewest models wait.
    fn least_wanted(&self, key: ModelKey) -> Option<NodeKey> {
        let fits = |server: &NodeKey| self.sizing_on(key, *server).is_ok();
        let open = self.servers.iter().filter(|(_, server)| server.open).map(|(key, _)| *key);
        let avoided = self.model(key).avoid;
        open.filter(fits)
            .min_by_key(|server| (avoided == Some(*server), self.servers[server].assigned.len(), *server))
    }

    // What follows keeps the policy's map of the cluster. With one server there is none.

    fn model_spec(&self, key: ModelKey, now: Duration) -> ModelSpec {
        let facts = &self.model(key).facts;
        let device_bytes = self
            .sizing(facts)
            .map_or(facts.device_bytes, |sizing| sizing.pool_bytes + sizing.kv_bytes + sizing.work_bytes);
        let (server, first) = match self.servers.iter().next() {
            Some((key, server)) => (*key, Some(server)),
            None => (FIRST, None),
        };
        let estimate = first.map(|_| self.estimate(key, server, DeviceId::default(), 1, Duration::ZERO, now));
        ModelSpec {
            weight_bytes: facts.weight_bytes,
            devices: 1,
            device_bytes,
            init: estimate.as_ref().map_or(Duration::ZERO, |estimate| estimate.init),
            last_layer: Duration::ZERO,
            per_token: estimate.as_ref().map_or(Duration::ZERO, |estimate| estimate.prefill),
            resume_fixed: Duration::ZERO,
            overlaps: first.is_some_and(Server::has_devices),
        }
    }

    /// Enters a model into the map, with what each server has of it; or what it takes by now.
    pub(super) fn map_model(&mut self, key: ModelKey, now: Duration) {
        if self.servers.len() < 2 {
            return;
        }
        let is_new = !self.map.knows(key);
        self.map.set_model(key, self.model_spec(key, now));
        if !is_new {
            return;
        }
        for server in self.servers.keys().copied().collect::<Vec<_>>() {
            self.map_residency(server, key);
        }
    }

    fn map_residency(&mut self, server: NodeKey, key: ModelKey) {
        let facts = &self.model(key).facts;
        let on = &self.servers[&server];
        let dram = on.residency.get(&facts.model).copied().unwrap_or_default();
        let ssd = if facts.weights_on == Tier::Remote { dram } else { facts.weight_bytes };
        let devices = self.there(key, server).map_or(DeviceSet::EMPTY, DeviceSet::one);
        let residency = Residency { dram, ssd, devices };
        if let Err(error) = self.map.set_residency(server, key, residency) {
            tracing::error!(%error, "the map of the cluster is not what it should be");
        }
    }

    /// Enters a server into the map, or what changed of it.
    pub(super) fn map_server(&mut self, key: NodeKey, now: Duration) {
        if self.servers.len() < 2 {
            return;
        }
        let Some(server) = self.servers.get(&key) else { return };
        let rates = NodeRates {
            remote: server.estimator.remote_rate().unwrap_or(self.config.priors.remote),
            ssd: server.estimator.ssd_rate().unwrap_or(self.config.priors.ssd),
        };
        let devices: Vec<DeviceSpec> =
            server.places.iter().enumerate().map(|(at, place)| self.device_spec(server, at, place)).collect();
        let entered = if self.map.nodes().any(|known| known == key) {
            let open = server.open;
            let mut numbered = (0..).map(DeviceId).zip(devices);
            numbered
                .try_for_each(|(id, spec)| self.map.set_device(key, id, spec))
                .and_then(|()| self.map.set_rates(key, rates))
                .and_then(|()| self.map.set_open(key, open))
        } else {
            self.map.add_node(key, &NodeSpec { devices, rates, slowness: 1.0 })
        };
        if let Err(error) = entered {
            tracing::error!(%error, "the map of the cluster is not what it should be");
            return;
        }
        for at in 0..self.models.len() {
            let model = ModelKey(u32::try_from(at).unwrap_or(u32::MAX));
            if !self.map.knows(model) {
                self.map.set_model(model, self.model_spec(model, now));
            }
            self.map_residency(key, model);
        }
    }

    fn device_spec(&self, server: &Server, at: usize, place: &Place) -> DeviceSpec {
        match *place {
            // Weights are used where they are: there is no link to cross.
            Place::Pool(Budgets { dram, kv, slots }) => {
                DeviceSpec { memory: dram + kv, slots, link: self.config.priors.dram }
            }
            Place::Device { memory, slots, .. } => DeviceSpec {
                memory,
                slots,
                link: server
                    .devices
                    .get(at)
                    .and_then(|device| device.rate)
                    .unwrap_or(self.config.priors.link),
            },
        }
    }

    /// Enters an instance into the map, or what changed of it.
    pub(super) fn map_instance(&mut self, id: InstanceId, now: Duration) {
        if self.servers.len() < 2 {
            return;
        }
        let Some(instance) = self.instances.get(&id) else { return };
        let spec = self.instance_spec(id, instance, now);
        let entered = if self.map.instance(id).is_some() {
            self.map.update_instance(id, |entered| *entered = spec)
        } else {
            self.map.add_instance(id, spec)
        };
        if let Err(error) = entered {
            // Two instances of a model share their weights in a pool, which the map counts twice.
            tracing::debug!(%error, "an instance is not in the map of the cluster");
        }
    }

    fn instance_spec(&self, id: InstanceId, instance: &Instance, now: Duration) -> InstanceSpec {
        let model = self.model(instance.model);
        let sizing = &instance.sizing;
        let view = self.instance_view(id, instance);
        let activity = match instance.state {
            InstanceState::Starting => Activity::Starting,
            InstanceState::Stopping => Activity::Leaving,
            InstanceState::Ready | InstanceState::Draining if instance.in_flight == 0 => Activity::Idle,
            InstanceState::Ready | InstanceState::Draining => Activity::Busy {
                sequences: instance.in_flight,
                tokens: 0,
                ends: model.service.as_ref().and_then(|service| {
                    let left = Duration::try_from_secs_f64(service.value()).ok()?;
                    Some(instance.last_used.saturating_add(left).max(now))
                }),
            },
        };
        InstanceSpec {
            model: instance.model,
            node: instance.server,
            devices: DeviceSet::one(instance.device),
            device_bytes: sizing.pool_bytes + sizing.kv_bytes + sizing.work_bytes,
            activity,
            resident_until: self.config.rules.resident_until(&view).max(instance.settled_at),
            load_time: instance.load_time,
            uses: view.uses,
            used_at: instance.last_used,
            pinned: model.pinned(),
            movable: false,
            priority: model.facts.settings.priority,
        }
    }

    pub(super) fn unmap_instance(&mut self, id: InstanceId) {
        if self.map.instance(id).is_some()
            && let Err(error) = self.map.remove_instance(id)
        {
            tracing::error!(%error, "the map of the cluster is not what it should be");
        }
    }
}
