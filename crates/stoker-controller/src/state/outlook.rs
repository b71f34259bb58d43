//! How long a request would have to wait, and why.

use std::time::Duration;

use stoker_scheduler::{
    estimate::{Ahead, Hop, LoadNeed, Seconds, StartEstimate},
    residency::{DemandView, InstanceState, ModelKey, Need, Place, Room, room},
};
use stoker_types::{ByteSize, DeviceId, Refusal, StartFailure, Tier};

use stoker_scheduler::sizing::Sizing;

use super::{State, queue::seats_in_words};

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
        let instances = self.instance_views();
        let Some(mut demand) = self.demand_as_if(key, now) else {
            return Ok(Outlook { eta: Duration::ZERO, at_least: Duration::ZERO, terms: String::new() });
        };
        demand.evicts = true;
        let from = room(&self.view(&instances, &[]), &demand, &self.config.rules, now);
        let (wait, wait_at_least) = match from {
            Room::Now => (Duration::ZERO, Duration::ZERO),
            Room::At(at) => (at.saturating_sub(now), at.saturating_sub(now)),
            Room::Busy(at) => (at.saturating_sub(now), Duration::ZERO),
            Room::Pinned => return Err(self.pinned_out(key).into()),
        };
        // Devices of one server are alike, as far as can be said before the decision.
        let device = self.there(key).unwrap_or_default();
        let estimate = self.estimate(key, device, prompt_tokens, wait, now);
        let at_least = self.estimate(key, device, prompt_tokens, wait_at_least, now).ready_at_least();
        let terms = match from {
            Room::Busy(_) => format!("{estimate}; room is held by {}", self.holders(now)),
            _ => estimate.to_string(),
        };
        Ok(Outlook { eta: estimate.ready(), at_least, terms })
    }

    /// How long a start ordered now would take.
    pub(crate) fn estimate(
        &self,
        key: ModelKey,
        device: DeviceId,
        prompt_tokens: u32,
        room: Duration,
        now: Duration,
    ) -> StartEstimate {
        let facts = &self.model(key).facts;
        let resident = self.residency.get(&facts.model).copied().unwrap_or_default();
        let on = self.devices.get(device.0 as usize);
        let there = on.is_some_and(|device| device.resident.contains(&facts.model));
        let missing = if there { ByteSize::ZERO } else { facts.weight_bytes.saturating_sub(resident) };
        let hop = match self.places[device.0 as usize] {
            Place::Pool(_) => Hop::Map,
            Place::Device { .. } => Hop::Copy {
                bytes: if there { ByteSize::ZERO } else { facts.weight_bytes },
                rate: on.and_then(|device| device.rate),
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
        self.estimator.start(&need, &self.ahead(now), room, now)
    }

    /// Loads that are under way.
    fn ahead(&self, now: Duration) -> Ahead {
        let mut ahead = Ahead::default();
        for instance in self.instances.values().filter(|i| i.state == InstanceState::Starting) {
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
    fn demand_as_if(&self, key: ModelKey, now: Duration) -> Option<DemandView> {
        let model = self.model(key);
        let sizing = model.sizing.as_ref().ok()?;
        Some(self.demand(key).unwrap_or(DemandView {
            model: key,
            waiting: 1,
            oldest_since: now,
            priority: model.facts.settings.priority,
            need: Need { pool_bytes: sizing.pool_bytes, kv_bytes: sizing.kv_bytes },
            there: self.there(key),
            instances_max: model.facts.settings.instances_max.max(1),
            evicts: true,
        }))
    }

    /// Pinned models leave too little room for this one.
    fn pinned_out(&self, key: ModelKey) -> StartFailure {
        let model = self.model(key);
        let mut pinned: Vec<_> = self.instances.values().filter(|i| self.model(i.model).pinned()).collect();
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
        let all: ByteSize = self.places.iter().map(memory).sum();
        let needed = model.sizing.as_ref().map_or(ByteSize::ZERO, whole);
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
    fn holders(&self, now: Duration) -> String {
        let mut words: Vec<String> = self
            .instances
            .values()
            .take(4)
            .map(|i| {
                let idle = now.saturating_sub(i.last_used);
                format!("`{}` ({})", self.model(i.model).facts.model, seats_in_words(i.in_flight, idle))
            })
            .collect();
        if self.instances.len() > words.len() {
            words.push(format!("{} more", self.instances.len() - words.len()));
        }
        words.join(", ")
    }
}
