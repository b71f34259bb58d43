//! Who makes room on one set of devices, and by which means: branch and bound.
//!
//! Victims are decided one by one, those first that free the most for the least; for each, its means from the cheapest on,
//! and last that it stays. A partial plan is given up when what it costs already, with the least that the missing bytes
//! can cost, is no less than the best plan found. Destinations are shared by a plan's victims: what one takes the others
//! don't get, and loads of one plan to one server wait for each other.

use std::time::Duration;

use ahash::AHashMap;
use stoker_types::{DeviceId, InstanceId};

use super::{
    Judgement, NodeKey, Victim, VictimMeans,
    cluster::{Activity, Cluster, DeviceSet, DeviceState, InstanceSpec, ModelState, NodeState, Residency},
    device_id,
    terms::{Load, Micros, NEVER, duration, micros, resume, transfer},
};
use crate::residency::ModelKey;

/// Instances of a device that a quick bound takes into account: of more of them it knows nothing.
const LOOKED_AT_MAX: usize = 32;

/// By which means instances may make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a set of means")]
pub(super) struct Means {
    pub(super) drop: bool,
    pub(super) finish: bool,
    pub(super) relocate: bool,
    pub(super) preempt: bool,
}

/// Searches of one decision: they share their budget, and what they find out about destinations.
pub(super) struct Search<'a> {
    cluster: &'a Cluster,
    judgement: &'a Judgement,
    means: Means,
    now: Duration,
    destinations: AHashMap<ModelKey, Vec<Destination>>,
    visited: u32,
    /// The least lower bound of what was given up for want of budget.
    open: Micros,
    cut: bool,
}

/// A plan for one set of devices.
pub(super) struct Cover {
    pub(super) cost: Micros,
    pub(super) penalty: Micros,
    pub(super) wait: Micros,
    pub(super) victims: Vec<Victim>,
}

/// Room for an instance of some model, without anybody making room.
#[derive(Debug, Clone, Copy)]
struct Destination {
    node: NodeKey,
    at: usize,
    devices: DeviceSet,
    /// Until the model is ready there, with the loads that are ordered already.
    ready: Micros,
    /// Its copy alone.
    alone: Micros,
}

/// An instance that could make room.
struct Candidate {
    id: InstanceId,
    bytes: i64,
    /// Bits of the positions, in the set, of the devices that it is on.
    on: u16,
    options: Vec<Choice>,
    /// The least penalty of any option.
    least: Micros,
}

/// One of its means.
#[derive(Debug, Clone, Copy)]
struct Choice {
    time: Micros,
    penalty: Micros,
    to: Option<Move>,
    means: VictimMeans,
}

#[derive(Debug, Clone, Copy)]
struct Move {
    destination: Destination,
    bytes: u64,
}

/// What is missing of each device of the set; what isn't missing is zero or negative.
#[derive(Debug, Clone, Copy)]
struct Missing {
    bytes: [i64; DeviceSet::MAX],
    slots: [i32; DeviceSet::MAX],
}

/// The descent through one set's candidates.
struct Descent<'a, 'b> {
    search: &'b mut Search<'a>,
    load: &'b Load,
    candidates: Vec<Candidate>,
    /// What `candidates[i..]` free together.
    rest: Vec<Missing>,
    width: usize,
    /// The device of the set by which the candidates are in order.
    main: usize,
    chosen: Vec<(usize, Choice)>,
    limit: Micros,
    best: Option<Cover>,
}

// === impl Means ===

impl Means {
    pub(super) const DROPPING: Self = Self { drop: true, finish: false, relocate: false, preempt: false };
    pub(super) const STAYING: Self = Self { finish: true, ..Self::DROPPING };
    pub(super) const ALL: Self = Self { relocate: true, ..Self::STAYING };
    pub(super) const PREEMPTING: Self = Self { preempt: true, ..Self::STAYING };

    /// Without taking anything elsewhere.
    pub(super) const fn in_place(self) -> Self {
        Self { relocate: false, ..self }
    }
}

// === impl Search ===

impl<'a> Search<'a> {
    pub(super) fn new(cluster: &'a Cluster, judgement: &'a Judgement, means: Means, now: Duration) -> Self {
        Self {
            cluster,
            judgement,
            means,
            now,
            destinations: AHashMap::new(),
            visited: 0,
            open: Micros::MAX,
            cut: false,
        }
    }

    /// From now on, streams may be taken elsewhere.
    pub(super) const fn relocate(&mut self) {
        self.means.relocate = true;
    }

    /// What any plan costs that takes streams elsewhere, beyond the load.
    pub(super) fn relocation_at_least(&self) -> Micros {
        micros(self.judgement.migration_cost).saturating_add(micros(self.judgement.cut))
    }

    pub(super) const fn visited(&self) -> u32 {
        self.visited
    }

    pub(super) const fn open(&self) -> Micros {
        self.open
    }

    pub(super) const fn was_cut(&self) -> bool {
        self.cut
    }

    pub(super) const fn is_spent(&self) -> bool {
        self.visited >= self.judgement.nodes_max
    }

    /// The cheapest plan that makes `need` bytes and a slot free on every one of `devices`, if it costs less than `limit`.
    pub(super) fn cover(
        &mut self,
        node: &'a NodeState,
        devices: DeviceSet,
        need: u64,
        load: &Load,
        limit: Micros,
    ) -> Option<Cover> {
        let mut missing = Missing::NONE;
        let mut width = 0;
        for device in devices.iter() {
            let state = &node.devices[device.0 as usize];
            missing.bytes[width] = signed(need) - signed(state.free);
            missing.slots[width] = i32::from(state.slots == 0);
            width += 1;
        }
        let mut candidates = self.candidates(node, devices, load, limit);
        let main = (0..width).max_by_key(|at| missing.bytes[*at]).unwrap_or(0);
        // Those that cost the least for each byte of the device that misses the most.
        let efficiency = |candidate: &Candidate| {
            let freed = if candidate.on & (1 << main) == 0 { 0 } else { candidate.bytes };
            per_byte(candidate.least, freed)
        };
        candidates.sort_by(|a, b| efficiency(a).total_cmp(&efficiency(b)).then(a.id.cmp(&b.id)));
        let mut rest = vec![Missing::NONE; candidates.len() + 1];
        for at in (0..candidates.len()).rev() {
            rest[at] = rest[at + 1];
            candidates[at].free(&mut rest[at], 1);
        }
        let mut descent = Descent {
            search: self,
            load,
            candidates,
            rest,
            width,
            main,
            chosen: Vec::new(),
            limit,
            best: None,
        };
        descent.descend(0, &missing, 0, 0);
        descent.best
    }

    /// What plans cost others at least that make `need` bytes and a slot free on a device, whatever else they do: as if parts of
    /// instances could go. [`NEVER`] when all that may go is not enough.
    pub(super) fn penalty_at_least(&self, device: &DeviceState, need: u64) -> Micros {
        let missing = need.saturating_sub(device.free);
        if missing == 0 && device.slots > 0 {
            return 0;
        }
        let mut may_go = [(0.0, 0, 0); LOOKED_AT_MAX];
        let mut count = 0;
        let mut enough: u64 = 0;
        for (_, place) in &device.instances {
            let spec = self.cluster.spec(*place);
            let Some(least) = self.least_penalty(spec) else { continue };
            let bytes = spec.device_bytes.bytes();
            enough = enough.saturating_add(bytes);
            if count < LOOKED_AT_MAX {
                may_go[count] = (per_byte(least, signed(bytes)), least, bytes);
                count += 1;
            } else {
                return 0;
            }
        }
        if count == 0 || enough < missing {
            return NEVER;
        }
        let may_go = &mut may_go[..count];
        if missing == 0 {
            return may_go.iter().map(|(_, least, _)| *least).min().unwrap_or(0);
        }
        may_go.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let mut left = missing;
        let mut penalty: Micros = 0;
        for (rate, least, bytes) in may_go {
            if *bytes >= left {
                return penalty.saturating_add(transfer(left, *rate).saturating_sub(1));
            }
            left -= *bytes;
            penalty = penalty.saturating_add(*least);
        }
        NEVER
    }

    /// What the cheapest means of an instance costs at least; `None` when it has none.
    fn least_penalty(&self, spec: &InstanceSpec) -> Option<Micros> {
        if spec.pinned {
            return None;
        }
        let regret = || spec.regret(&self.judgement.rules, self.now);
        match spec.activity {
            Activity::Starting | Activity::Leaving => None,
            Activity::Idle => self.means.drop.then(regret),
            Activity::Busy { sequences, ends, .. } => {
                let disturbed = micros(self.judgement.cut).saturating_mul(u64::from(sequences.max(1)));
                let finish = (self.means.finish && ends.is_some()).then(regret);
                let preempt = self.means.preempt.then_some(disturbed);
                let relocate = (self.means.relocate && spec.movable)
                    .then(|| micros(self.judgement.migration_cost).saturating_add(disturbed));
                finish.into_iter().chain(preempt).chain(relocate).min()
            }
        }
    }

    /// Who could make room on these devices, and by which means that could still cost less than `limit`.
    fn candidates(
        &mut self,
        node: &'a NodeState,
        devices: DeviceSet,
        load: &Load,
        limit: Micros,
    ) -> Vec<Candidate> {
        let mut instances: Vec<(InstanceId, u32)> =
            devices.iter().flat_map(|d| node.devices[d.0 as usize].instances.iter().copied()).collect();
        if devices.len() > 1 {
            instances.sort_unstable();
            instances.dedup();
        }
        let mut candidates = Vec::with_capacity(instances.len());
        for (id, place) in instances {
            let spec = self.cluster.spec(place);
            if spec.pinned {
                continue;
            }
            let options = self.options(spec, node, devices, load, limit);
            let Some(least) = options.iter().map(|option| option.penalty).min() else { continue };
            let on = devices.iter().zip(0..).filter(|(d, _)| spec.devices.contains(*d));
            candidates.push(Candidate {
                id,
                bytes: signed(spec.device_bytes.bytes()),
                on: on.fold(0, |bits, (_, at)| bits | (1 << at)),
                options,
                least,
            });
        }
        let most = self.judgement.victims_max;
        if candidates.len() > most {
            candidates.sort_unstable_by_key(|c| (c.options[0].time, c.least, c.id));
            candidates.truncate(most);
            self.cut = true;
            // What they could have done is not known.
            self.open = self.open.min(load.total(0));
        }
        candidates
    }

    /// The means of one instance, the soonest first, without those that others are better than in every respect.
    fn options(
        &mut self,
        spec: &InstanceSpec,
        node: &'a NodeState,
        devices: DeviceSet,
        load: &Load,
        limit: Micros,
    ) -> Vec<Choice> {
        let now = self.now;
        let settled = micros(spec.resident_until.saturating_sub(now));
        let useful = |time: Micros, penalty: Micros| load.total(time).saturating_add(penalty) < limit;
        let mut options = Vec::new();
        let mut plain = |time: Micros, penalty, means| {
            let time = time.max(settled);
            if useful(time, penalty) {
                options.push(Choice { time, penalty, to: None, means });
            }
        };
        let regret = || spec.regret(&self.judgement.rules, now);
        let (sequences, tokens) = match spec.activity {
            Activity::Starting | Activity::Leaving => return options,
            Activity::Idle => {
                if self.means.drop {
                    plain(0, regret(), VictimMeans::Drop);
                }
                return options;
            }
            Activity::Busy { sequences, tokens, ends } => {
                if let (true, Some(ends)) = (self.means.finish, ends) {
                    plain(micros(ends.saturating_sub(now)), regret(), VictimMeans::Finish);
                }
                (u64::from(sequences.max(1)), tokens)
            }
        };
        let pause = micros(self.judgement.cut);
        let disturbed = pause.saturating_mul(sequences);
        if self.means.preempt {
            plain(0, disturbed, VictimMeans::Preempt);
        }
        if self.means.relocate && spec.movable {
            let cost = micros(self.judgement.migration_cost).saturating_add(disturbed);
            if useful(settled.max(pause), cost) {
                self.moves(spec, node, devices, tokens, cost, settled, limit, &mut options);
                options.retain(|option| useful(option.time, option.penalty));
            }
        }
        options.sort_by_key(|option| (option.time, option.penalty));
        // What is neither sooner nor cheaper than a means that is always to be had.
        let staying: Option<Choice> = options.iter().copied().find(|option| option.to.is_none());
        if let Some(staying) = staying {
            options.retain(|option| {
                option.to.is_none() || option.time < staying.time || option.penalty < staying.penalty
            });
        }
        options
    }

    /// Taking its streams elsewhere.
    #[expect(clippy::too_many_arguments, reason = "one call")]
    fn moves(
        &mut self,
        spec: &InstanceSpec,
        node: &NodeState,
        devices: DeviceSet,
        tokens: u64,
        cost: Micros,
        settled: Micros,
        limit: Micros,
        options: &mut Vec<Choice>,
    ) {
        let Some(model) = self.cluster.models.get(&spec.model) else { return };
        if !self.destinations.contains_key(&spec.model) {
            if self.destinations.len() >= self.judgement.moved_models_max as usize {
                self.cut = true;
                // Nothing is known of where it could go, so it might cost no more than the migration itself.
                self.open = self.open.min(cost);
                return;
            }
            // What is ready later than this is of no use to any plan that is still looked for.
            let useful = limit.saturating_sub(self.relocation_at_least());
            let found = destinations(self.cluster, model, self.judgement.destinations_max, useful, self.now);
            self.destinations.insert(spec.model, found);
        }
        let elsewhere = |d: &&Destination| d.node != node.key || d.devices.shared(devices).is_empty();
        let most = self.judgement.destinations_max;
        for destination in self.destinations[&spec.model].iter().filter(elsewhere).take(most) {
            let resumed = resume(&self.cluster.states[destination.at], &model.spec, tokens);
            let time = destination.ready + resumed + micros(self.judgement.cut);
            options.push(Choice {
                time: time.max(settled),
                penalty: cost.saturating_add(resumed),
                to: Some(Move { destination: *destination, bytes: model.spec.device_bytes.bytes() }),
                means: VictimMeans::Move {
                    node: destination.node,
                    devices: destination.devices,
                    load: duration(destination.ready),
                    resume: duration(resumed),
                },
            });
        }
    }
}

/// Where a model could be ready before `limit` without anybody making room, the soonest first: more of them than are used for
/// one victim, because the devices that are being cleared are none.
fn destinations(
    cluster: &Cluster,
    model: &ModelState,
    most: usize,
    limit: Micros,
    now: Duration,
) -> Vec<Destination> {
    let spec = &model.spec;
    let need = spec.device_bytes.bytes();
    let at_now = micros(now);
    let count = spec.devices.max(1) as usize;
    let mut found: Vec<Destination> = Vec::new();
    let mut visit = |at: usize, held| {
        let node = &cluster.states[at];
        let roomy: DeviceSet = (0..node.devices.len())
            .filter(|device| node.devices[*device].free >= need && node.devices[*device].slots > 0)
            .map(device_id)
            .collect();
        if !node.open || (roomy.len() as usize) < count {
            return;
        }
        let mut offer = |devices: DeviceSet| {
            let load = Load::new(node, devices, spec, held, 0, at_now);
            let ready = load.ready();
            if ready < limit {
                found.push(Destination { node: node.key, at, devices, ready, alone: load.alone() });
            }
        };
        if count == 1 {
            roomy.iter().map(DeviceSet::one).for_each(offer);
        } else {
            let mut order: Vec<DeviceId> = roomy.iter().collect();
            order.sort_by_key(|d| node.devices[d.0 as usize].link.queue(at_now));
            offer(order.into_iter().take(count).collect());
        }
    };
    for (at, held) in &model.holders {
        visit(*at, *held);
    }
    if cluster.fetched_at_least(spec.weight_bytes.bytes()) < limit {
        let mut holders = model.holders.iter().map(|(at, _)| *at).peekable();
        for at in 0..cluster.states.len() {
            if holders.next_if_eq(&at).is_none() {
                visit(at, Residency::default());
            }
        }
    }
    let kept = most.saturating_add(DeviceSet::MAX);
    if found.len() > kept {
        found.select_nth_unstable_by_key(kept, |d| (d.ready, d.node, d.devices));
        found.truncate(kept);
    }
    found.sort_unstable_by_key(|d| (d.ready, d.node, d.devices));
    found
}

// === impl Missing ===

impl Missing {
    const NONE: Self = Self { bytes: [0; DeviceSet::MAX], slots: [0; DeviceSet::MAX] };

    fn is_covered(&self, width: usize) -> bool {
        self.bytes[..width].iter().all(|bytes| *bytes <= 0)
            && self.slots[..width].iter().all(|slots| *slots <= 0)
    }

    fn is_covered_by(&self, freed: &Self, width: usize) -> bool {
        (0..width).all(|at| self.bytes[at] <= freed.bytes[at] && self.slots[at] <= freed.slots[at])
    }
}

// === impl Candidate ===

impl Candidate {
    /// Adds what it frees, `sign` times.
    fn free(&self, to: &mut Missing, sign: i64) {
        let mut bits = self.on;
        while bits != 0 {
            let at = bits.trailing_zeros() as usize;
            to.bytes[at] = to.bytes[at].saturating_add(sign * self.bytes);
            to.slots[at] += if sign > 0 { 1 } else { -1 };
            bits &= bits - 1;
        }
    }
}

// === impl Descent ===

impl Descent<'_, '_> {
    fn descend(&mut self, at: usize, missing: &Missing, wait: Micros, penalty: Micros) {
        let cost = self.load.total(wait).saturating_add(penalty);
        if cost >= self.limit {
            return;
        }
        if missing.is_covered(self.width) {
            self.limit = cost;
            self.best = Some(self.plan(cost, wait, penalty));
            return;
        }
        if !missing.is_covered_by(&self.rest[at], self.width) {
            return;
        }
        let candidate = &self.candidates[at];
        let bytes = missing.bytes[self.main].max(0);
        let freed = if candidate.on & (1 << self.main) == 0 { 0 } else { candidate.bytes };
        let at_least = cost.saturating_add(cheapest(bytes, candidate.least, freed));
        if at_least >= self.limit {
            return;
        }
        if self.search.is_spent() {
            self.search.cut = true;
            self.search.open = self.search.open.min(at_least);
            return;
        }
        self.search.visited += 1;
        for option in 0..self.candidates[at].options.len() {
            let choice = self.candidates[at].options[option];
            if !self.is_possible(&choice) {
                continue;
            }
            let mut left = *missing;
            self.candidates[at].free(&mut left, -1);
            self.chosen.push((at, choice));
            let wait = self.wait(wait);
            self.descend(at + 1, &left, wait, penalty.saturating_add(choice.penalty));
            self.chosen.pop();
        }
        self.descend(at + 1, missing, wait, penalty);
    }

    /// Whether a destination has room for one more, beside what the plan has there already.
    fn is_possible(&self, choice: &Choice) -> bool {
        let Some(to) = choice.to else { return true };
        let node = &self.search.cluster.states[to.destination.at];
        to.destination.devices.iter().all(|device| {
            let state = &node.devices[device.0 as usize];
            let there = self.moved().filter(|m| {
                m.destination.node == to.destination.node && m.destination.devices.contains(device)
            });
            let (bytes, count) = there.fold((0, 0), |(bytes, count), m| (bytes + m.bytes, count + 1));
            state.free.saturating_sub(bytes) >= to.bytes && state.slots > count
        })
    }

    fn moved(&self) -> impl Iterator<Item = &Move> {
        self.chosen.iter().filter_map(|(_, choice)| choice.to.as_ref())
    }

    /// When the last of the chosen is gone, of whom all but the last were gone after `before`.
    fn wait(&self, before: Micros) -> Micros {
        let Some((_, last)) = self.chosen.last() else { return before };
        let Some(to) = &last.to else { return before.max(last.time) };
        // Loads to one server share its ways: each of them waits for all.
        let node = to.destination.node;
        let here = || self.moved().filter(move |m| m.destination.node == node);
        let all: Micros = here().map(|m| m.destination.alone).fold(0, Micros::saturating_add);
        let of_node = self.chosen.iter().filter_map(|(_, choice)| {
            let to = choice.to.as_ref().filter(|to| to.destination.node == node)?;
            Some(choice.time.saturating_add(all - to.destination.alone))
        });
        of_node.max().unwrap_or(0).max(before).min(NEVER)
    }

    fn plan(&self, cost: Micros, wait: Micros, penalty: Micros) -> Cover {
        let mut victims: Vec<Victim> = self
            .chosen
            .iter()
            .map(|(at, choice)| Victim {
                instance: self.candidates[*at].id,
                means: choice.means,
                free_in: duration(choice.time),
            })
            .collect();
        victims.sort_unstable_by_key(|victim| victim.instance);
        Cover { cost, penalty, wait, victims }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// What a byte costs; what frees nothing comes last.
#[expect(clippy::cast_precision_loss, reason = "an order, and a bound that is rounded down")]
fn per_byte(penalty: Micros, freed: i64) -> f64 {
    if freed <= 0 { f64::INFINITY } else { penalty as f64 / freed as f64 }
}

/// The least that `bytes` can cost when none of those that are left is cheaper than `penalty` for `freed` of them.
fn cheapest(bytes: i64, penalty: Micros, freed: i64) -> Micros {
    if bytes <= 0 || freed <= 0 {
        // Nothing is missing of the main device, or nobody who is left frees anything of it.
        return 0;
    }
    transfer(u64::try_from(bytes).unwrap_or(0), per_byte(penalty, freed)).saturating_sub(2)
}
