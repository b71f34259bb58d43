//! How long a request would have to wait, and why.

use std::time::Duration;

use stoker_scheduler::{
    estimate::{Ahead, Hop, LoadNeed, Seconds, StartEstimate},
    placement::NodeKey,
    residency::{DemandView, InstanceState, ModelKey, Need, Place, Room, View, room},
};
use stoker_types::{ByteSize, DeviceId, Refusal, StartFailure, Tier};

use stoker_scheduler::sizing::Sizing;

use super::{Instance, State, queue::seats_in_words};

/// What lies ahead of a request.
pub(crate) struct Outlook {
    /// Best guess until a seat could be had.
    pub(crate) eta: Duration,
    /// No less than this, as far as is known.
    pub(crate) at_least: Duration,
    /// The terms.
    pub(crate) terms: String,
}

impl State {
    /// What lies ahead of a request for this model that finds no free seat.
    pub(crate) fn outlook(
        &self,
        key: ModelKey,
        prompt_tokens: u32,
        now: Duration,
    ) -> Result<Outlook, Refusal> {
        let model = self.model(key);
        let own = || model.instances.iter().filter_map(|id| self.instances.get(id));
        if let Some(ready) = own().find(|i| i.state == InstanceState::Ready) {
            return Ok(Outlook {
                eta: Duration::ZERO,
                at_least: Duration::ZERO,
                terms: format!("all {} seats of its instance are taken", ready.sizing.sequences),
            });
        }
        if let Some(starting) = own().find(|i| i.state == InstanceState::Starting) {
            let since = now.saturating_sub(starting.decided_at);
            return Ok(Outlook {
                eta: starting.estimate.load().saturating_sub(since),
                at_least: starting.estimate.ready_at_least().saturating_sub(since),
                terms: format!("{}, of which {} have passed", starting.estimate, Seconds(since)),
            });
        }
        let server = self.likely(key, now);
        let instances = self.instance_views(server);
        let Some(mut demand) = self.demand_as_if(key, server, now) else {
            return Ok(Outlook { eta: Duration::ZERO, at_least: Duration::ZERO, terms: String::new() });
        };
        demand.evicts = true;
        let places = self.server(server).map_or(&[][..], |s| &s.places);
        let view = View { places, instances: &instances, demands: &[] };
        let from = room(&view, &demand, &self.config.rules, now);
        let (wait, wait_at_least) = match from {
            Room::Now => (Duration::ZERO, Duration::ZERO),
            Room::At(at) => (at.saturating_sub(now), at.saturating_sub(now)),
            Room::Busy(at) => (at.saturating_sub(now), Duration::ZERO),
            Room::Pinned => return Err(self.pinned_out(key, server).into()),
        };
        // Devices of one server are alike, as far as can be said before the decision.
        let device = self.there(key, server).unwrap_or_default();
        let estimate = self.estimate(key, server, device, prompt_tokens, wait, now);
        let at_least = self.estimate(key, server, device, prompt_tokens, wait_at_least, now).ready_at_least();
        let terms = match from {
            Room::Busy(_) => format!("{estimate}; room is held by {}", self.holders(server, now)),
            _ => estimate.to_string(),
        };
        Ok(Outlook { eta: estimate.ready(), at_least, terms })
    }

    /// How long a start ordered now would take.
    pub(crate) fn estimate(
        &self,
        key: ModelKey,
        on: NodeKey,
        device: DeviceId,
        prompt_tokens: u32,
        room: Duration,
        now: Duration,
    ) -> StartEstimate {
        let facts = &self.model(key).facts;
        let server = &self.servers[&on];
        let resident = server.residency.get(&facts.model).copied().unwrap_or_default();
        let on_device = server.devices.get(device.0 as usize);
        let there = on_device.is_some_and(|device| device.resident.contains(&facts.model));
        let missing = if there { ByteSize::ZERO } else { facts.weight_bytes.saturating_sub(resident) };
        let hop = match server.places[device.0 as usize] {
            Place::Pool(_) => Hop::Map,
            Place::Device { .. } => Hop::Copy {
                bytes: if there { ByteSize::ZERO } else { facts.weight_bytes },
                rate: on_device.and_then(|device| device.rate),
            },
        };
        let (remote_bytes, ssd_bytes) = match facts.weights_on {
            Tier::Remote => (missing, ByteSize::ZERO),
            _ => (ByteSize::ZERO, missing),
        };
        let need = LoadNeed {
            model: &facts.model,
            weight_bytes: facts.weight_bytes,
            remote_bytes,
            ssd_bytes,
            hop,
            prompt_tokens,
        };
        server.estimator.start(&need, &self.ahead(on, now), room, now)
    }

    /// Loads that are under way on a server.
    fn ahead(&self, server: NodeKey, now: Duration) -> Ahead {
        let mut ahead = Ahead::default();
        let is_ahead = |i: &&Instance| i.server == server && i.state == InstanceState::Starting;
        for instance in self.instances.values().filter(is_ahead) {
            let Some(ssd) = instance.estimate.copies.iter().find(|term| term.tier == Tier::Ssd) else {
                continue;
            };
            let since = now.saturating_sub(instance.decided_at).saturating_sub(instance.estimate.queue);
            let left = 1.0 - since.as_secs_f64() / ssd.time.as_secs_f64().max(1e-6);
            if left > 0.0 {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss,
                    reason = "a share of a number of bytes"
                )]
                let bytes = (ssd.bytes.bytes() as f64 * left) as u64;
                ahead.loads += 1;
                ahead.ssd_bytes += ByteSize(bytes);
            }
        }
        ahead
    }

    /// The model's demand, or the one that it would have with a request more.
    fn demand_as_if(&self, key: ModelKey, server: NodeKey, now: Duration) -> Option<DemandView> {
        let model = self.model(key);
        let sizing = self.sizing_on(key, server).ok()?;
        Some(self.demand(key, server).unwrap_or(DemandView {
            model: key,
            waiting: 1,
            oldest_since: now,
            priority: model.facts.settings.priority,
            need: Need { pool_bytes: sizing.pool_bytes, kv_bytes: sizing.kv_bytes },
            there: self.there(key, server),
            instances_max: model.facts.settings.instances_max.max(1),
            evicts: true,
        }))
    }

    /// Pinned models leave too little room for this one.
    fn pinned_out(&self, key: ModelKey, server: NodeKey) -> StartFailure {
        let model = self.model(key);
        let here = self.instances.values().filter(|i| i.server == server);
        let mut pinned: Vec<_> = here.filter(|i| self.model(i.model).pinned()).collect();
        pinned.sort_by_key(|i| i.model);
        pinned.dedup_by_key(|i| i.model);
        let whole = |s: &Sizing| s.pool_bytes + s.kv_bytes + s.work_bytes;
        let held: ByteSize = pinned.iter().map(|i| whole(&i.sizing)).sum();
        let names: Vec<String> =
            pinned.iter().map(|i| format!("`{}`", self.model(i.model).facts.model)).collect();
        let memory = |place: &Place| match place {
            Place::Pool(budgets) => budgets.dram + budgets.kv,
            Place::Device { memory, .. } => *memory,
        };
        let places = self.server(server).map_or(&[][..], |s| &s.places);
        let all: ByteSize = places.iter().map(memory).sum();
        let needed = self.sizing_on(key, server).as_ref().map_or(ByteSize::ZERO, whole);
        StartFailure::OutOfMemory {
            model: model.facts.model.clone(),
            needed,
            free: all.saturating_sub(held),
            detail: format!(
                "pinned models hold the rest: {}; unpin one, or give Stoker more memory or workers",
                names.join(", ")
            ),
        }
    }

    /// Who holds the room, for people. At most four of them.
    fn holders(&self, server: NodeKey, now: Duration) -> String {
        let here = || self.instances.values().filter(|i| i.server == server);
        let mut words: Vec<String> = here()
            .take(4)
            .map(|i| {
                let idle = now.saturating_sub(i.last_used);
                format!("`{}` ({})", self.model(i.model).facts.model, seats_in_words(i.in_flight, idle))
            })
            .collect();
        if here().count() > words.len() {
            words.push(format!("{} more", here().count() - words.len()));
        }
        words.join(", ")
    }
}
