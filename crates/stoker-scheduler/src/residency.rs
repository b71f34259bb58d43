//! Which models are on the device: who starts, who makes room, and when to look again.
//!
//! [`decide`] is a pure function of a [`View`], the [`Rules`] and the time. It is asked again after every event that
//! changes the view, and at [`Decision::next_wakeup`]; nothing polls. Its promises, each a property test:
//!
//! - an instance is on one [`Place`] with all that it takes, and no place's budget is ever exceeded, whatever is starting or stopping counted in full;
//! - a busy, a loading and a pinned instance is never stopped;
//! - demands are taken in the order of their *turn*: the time since when the oldest waits, moved forward by the
//!   model's priority ([`Rules::priority_worth`] a point). So a higher priority goes first, and nobody starves;
//! - an idle instance makes room once it has been resident for [`Rules::residency_min`], or twice its load time; at
//!   once when somebody has waited [`Rules::wait_max`];
//! - a busy one is drained (admits nobody, cuts nothing) for a demand that has waited [`Rules::wait_max`] and whose
//!   turn comes before that of the instance's own waiters. Two models that don't fit together are so served in
//!   batches, with a bounded wait.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use stoker_types::{ByteSize, DeviceId, InstanceId, KeepAlive};

use crate::cover::{Candidate, Group, NODES_MAX, Space, cover};

/// A model, as a small number that the caller chooses. Dense numbers keep the policy free of string comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ModelKey(pub u32);

/// Where instances may be, and what there is to give away. A [`DeviceId`] is a position in the list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Weights lie in the pool, KV caches in the workers' memory.
    Pool(Budgets),
    /// A device: an instance's weights, KV cache and work memory are all taken of the same bytes.
    Device {
        /// Bytes of it.
        memory: ByteSize,
        /// What each instance takes beside weights and KV cache.
        work: ByteSize,
        /// Worker processes that may serve a model.
        slots: u32,
    },
}

/// What the pool has to give away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// Bytes of weights that may be mapped: whole chunks of the pool.
    pub dram: ByteSize,
    /// Bytes of KV cache.
    pub kv: ByteSize,
    /// Worker processes that may serve a model.
    pub slots: u32,
}

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstanceState {
    /// Ordered, not ready. Never stopped.
    Starting,
    /// Serving.
    Ready,
    /// Serving who has a seat, and nobody new.
    Draining,
    /// Told to stop; holds its memory until it has.
    Stopping,
}

/// One instance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InstanceView {
    /// Which.
    pub id: InstanceId,
    /// Of which model.
    pub model: ModelKey,
    /// Where it is.
    pub device: DeviceId,
    /// Its state.
    pub state: InstanceState,
    /// Weights that it maps; shared by all instances of a model on one place, and counted once there.
    pub pool_bytes: ByteSize,
    /// KV cache reserved for it.
    pub kv_bytes: ByteSize,
    /// Most sequences.
    pub sequences: u32,
    /// Sequences that hold a seat.
    pub in_flight: u32,
    /// When a seat was last taken or given back.
    pub last_used: Duration,
    /// When it became ready.
    pub ready_at: Duration,
    /// How long its start took.
    pub load_time: Duration,
    /// Uses of the model, decayed by [`Rules::use_half_life`], as of `last_used`.
    pub uses: f64,
    /// How long it stays when idle.
    pub keep_alive: KeepAlive,
    /// Never makes room, and doesn't leave by time.
    pub pinned: bool,
    /// Its model's priority.
    pub priority: i32,
    /// The worker said that it is busy although no seat is taken: not to be asked again before this.
    pub settled_at: Duration,
    /// The operator wants it gone: stops when idle, whoever waits.
    pub leaving: bool,
}

/// What one new instance of a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Weights: whole chunks of the pool, or a slab of a device.
    pub pool_bytes: ByteSize,
    /// KV cache.
    pub kv_bytes: ByteSize,
}

/// Requests for one model that have no seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DemandView {
    /// Of which model.
    pub model: ModelKey,
    /// Sequences that wait; at least 1.
    pub waiting: u32,
    /// Since when the oldest waits.
    pub oldest_since: Duration,
    /// The model's priority, -100 to 100.
    pub priority: i32,
    /// What an instance would take.
    pub need: Need,
    /// Where its weights are already, for nobody: the first choice.
    pub there: Option<DeviceId>,
    /// Most instances.
    pub instances_max: u32,
    /// May others make room for it? A preload at start takes free room only, after everybody else.
    pub evicts: bool,
}

/// All that a decision depends on, besides the rules and the time. What does not fit into an empty server must not
/// be in it: it would wait for ever.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Where instances may be.
    pub places: &'a [Place],
    /// Every instance that isn't gone.
    pub instances: &'a [InstanceView],
    /// Models with demand, in ascending order of `model`, each once.
    pub demands: &'a [DemandView],
}

/// The judgements of `docs/` on thrash and waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// An instance stays resident at least so long...
    pub residency_min: Duration,
    /// ...and at least so many times its load time...
    pub residency_loads: u32,
    /// ...unless another model's oldest waiter has waited so long.
    pub wait_max: Duration,
    /// A point of priority is worth so much waiting.
    pub priority_worth: Duration,
    /// After so long without use, a model's past uses count half.
    pub use_half_life: Duration,
}

/// Why an instance is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// It was idle for its keep-alive.
    KeepAlive,
    /// Another model needs the room.
    Room {
        /// Which.
        for_model: ModelKey,
    },
    /// The operator said so.
    Unload,
}

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start an instance; there is room for it now.
    Start {
        /// Of which model.
        model: ModelKey,
        /// Where.
        device: DeviceId,
    },
    /// Admit nobody new to it.
    Drain {
        /// Which.
        instance: InstanceId,
        /// For whom.
        for_model: ModelKey,
    },
    /// Nobody needs its room any more: admit again.
    Undrain {
        /// Which.
        instance: InstanceId,
    },
    /// Stop it; it is idle.
    Stop {
        /// Which.
        instance: InstanceId,
        /// Why.
        reason: StopReason,
    },
}

/// What to do now, and when to ask again if nothing happens before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// In an order that may be carried out one by one.
    pub actions: Vec<Action>,
    /// Always later than the time of the decision; `None`: not by time.
    pub next_wakeup: Option<Duration>,
}

/// How a start of one model would get its room, were it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// There is room, or idle instances give it at once.
    Now,
    /// Idle instances give it at this time.
    At(Duration),
    /// Somebody has to finish first; at this time at the latest, nobody new is admitted there.
    Busy(Duration),
    /// Pinned instances hold it.
    Pinned,
}

/// Demands that are tried in one decision although they found no room before: the first ones in order of turn. The
/// others wait for the next event.
const TRIED_MAX: u32 = 64;
/// A busy victim costs more than any number of idle ones.
const COST_BUSY: u64 = 1 << 42;
const COST_IDLE_MAX: u64 = 1 << 32;

/// A point in the order of turns: microseconds, earlier first. May be negative.
type Turn = i64;

struct Planner<'a> {
    view: &'a View<'a>,
    rules: &'a Rules,
    now: Duration,
    /// Of each place.
    free: Vec<Space>,
    /// Of instances that are on their way out, less what is promised; of each place.
    freeing: Vec<Space>,
    /// Models that have instances, and where, beside `groups`: looked up for every demand, so kept close together.
    models: Vec<(ModelKey, usize)>,
    groups: Vec<ModelGroup>,
    group_of: Vec<usize>,
    claimed: Vec<Option<ModelKey>>,
    /// Of each instance, computed once: it is asked for by every demand that is tried.
    costs: Vec<u64>,
    wakeup: Option<Duration>,
    /// Some demand found no room.
    blocked: bool,
    /// What the priorities of instances that may make room are worth.
    shifts: Vec<Turn>,
}

/// A model's instances on one place.
struct ModelGroup {
    instances: u32,
    /// Not stopping and not claimed.
    staying: u32,
    serving: bool,
    seats_coming: u32,
    dram: i64,
    own_turn: Option<Turn>,
}

/// A model's instances, wherever they are.
#[derive(Default)]
struct Together {
    instances: u32,
    serving: bool,
    seats_coming: u32,
}

enum Outcome {
    Start(DeviceId),
    /// Room is on its way.
    Promised,
    Blocked,
}

// === impl Place ===

impl Place {
    /// All that it has.
    fn space(&self) -> Space {
        match self {
            Self::Pool(Budgets { dram, kv, slots }) => {
                Space { dram: signed(*dram), kv: signed(*kv), slots: i64::from(*slots) }
            }
            Self::Device { memory, work: _, slots } => {
                Space { dram: signed(*memory), kv: 0, slots: i64::from(*slots) }
            }
        }
    }

    /// What an instance with this KV cache takes beside its weights.
    fn beside(&self, kv: ByteSize) -> Space {
        match self {
            Self::Pool(_) => Space { dram: 0, kv: signed(kv), slots: 1 },
            Self::Device { work, .. } => {
                Space { dram: signed(kv).saturating_add(signed(*work)), kv: 0, slots: 1 }
            }
        }
    }

    /// All that an instance takes.
    fn whole(&self, need: &Need) -> Space {
        self.beside(need.kv_bytes).plus(Space { dram: signed(need.pool_bytes), ..Space::default() })
    }
}

// === impl Rules ===

impl Default for Rules {
    fn default() -> Self {
        Self {
            residency_min: Duration::from_secs(2),
            residency_loads: 2,
            wait_max: Duration::from_secs(15),
            priority_worth: Duration::from_secs(15),
            use_half_life: Duration::from_mins(1),
        }
    }
}

impl Rules {
    /// When an instance may make room without force: after its minimum residency.
    #[must_use]
    pub fn resident_until(&self, instance: &InstanceView) -> Duration {
        let least = self.residency_min.max(instance.load_time.saturating_mul(self.residency_loads));
        instance.ready_at.saturating_add(least)
    }

    /// Uses of a model that were `uses` a time `ago`.
    #[must_use]
    pub fn decayed(&self, uses: f64, ago: Duration) -> f64 {
        uses * f64::exp2(-ago.as_secs_f64() / self.use_half_life.as_secs_f64().max(1e-3))
    }

    /// What it costs to let an idle instance go: its load time, weighted by how likely it is to be wanted soon
    /// (frequency and recency as one decayed count) and by priority. Grows with load time, uses and priority,
    /// shrinks as it idles. Bytes aren't in it: the victims' sizes count where they are chosen to cover a need.
    #[must_use]
    pub fn eviction_cost(&self, instance: &InstanceView, now: Duration) -> u64 {
        let wanted = 0.05 + self.decayed(instance.uses.max(0.0), now.saturating_sub(instance.last_used));
        let weight = f64::exp2(f64::from(instance.priority.clamp(-100, 100)) / 10.0);
        let cost = (instance.load_time.as_secs_f64() * 1e6 + 1e3) * wanted * weight;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let cost = cost.clamp(1.0, COST_IDLE_MAX as f64) as u64;
        cost
    }
}

/// What to do now.
#[must_use]
pub fn decide(view: &View<'_>, rules: &Rules, now: Duration) -> Decision {
    let mut planner = Planner::new(view, rules, now);
    let mut decision = Decision::default();
    let mut turns: BinaryHeap<Reverse<(bool, Turn, usize)>> =
        view.demands.iter().enumerate().map(|(at, d)| Reverse((!d.evicts, turn(d, rules), at))).collect();
    let mut tries_left = TRIED_MAX;
    let mut starts = Vec::new();
    while let Some(Reverse((_, _, at))) = turns.pop() {
        let demand = &view.demands[at];
        if !planner.wants_instance(demand) {
            continue;
        }
        match planner.place(demand, true) {
            Outcome::Start(device) => starts.push(Action::Start { model: demand.model, device }),
            Outcome::Promised => {}
            Outcome::Blocked => {
                planner.wake_for(demand);
                tries_left -= 1;
                if tries_left == 0 {
                    break;
                }
            }
        }
    }
    for Reverse((_, _, at)) in turns {
        planner.wake_for(&view.demands[at]);
    }
    planner.wake_for_residency();
    for (at, instance) in view.instances.iter().enumerate() {
        planner.settle(at, instance, &mut decision.actions);
    }
    decision.actions.extend(starts);
    decision.next_wakeup = planner.wakeup;
    decision
}

/// How a start for this demand would get its room if no other model had demand.
#[must_use]
pub fn room(view: &View<'_>, demand: &DemandView, rules: &Rules, now: Duration) -> Room {
    let alone = View { demands: std::slice::from_ref(demand), ..*view };
    let without_busy =
        |now| !matches!(Planner::new(&alone, rules, now).place(demand, false), Outcome::Blocked);
    if without_busy(now) {
        return Room::Now;
    }
    let idle = view.instances.iter().filter(|i| i.in_flight == 0 && evictable(i));
    let resident_until = idle.map(|i| rules.resident_until(i).max(i.settled_at)).max();
    if let Some(at) = resident_until.filter(|at| *at > now && without_busy(*at)) {
        return Room::At(at);
    }
    if holds_pinned(view, demand) {
        return Room::Pinned;
    }
    let shift = view.instances.iter().filter(|i| evictable(i)).map(|i| points(i.priority, rules)).min();
    let forced = turn_after(turn(demand, rules), rules.wait_max).saturating_add(shift.unwrap_or(0));
    Room::Busy(from_turn(forced).max(now))
}

/// Whether the instances that never make room leave too little of it: then waiting is in vain.
fn holds_pinned(view: &View<'_>, demand: &DemandView) -> bool {
    let mut left: Vec<Space> = view.places.iter().map(Place::space).collect();
    for instance in view.instances.iter().filter(|i| i.pinned && i.state != InstanceState::Stopping) {
        if instance.model != demand.model {
            let at = index(instance.device);
            let need = Need { pool_bytes: instance.pool_bytes, kv_bytes: instance.kv_bytes };
            left[at] = left[at].minus(view.places[at].whole(&need));
        }
    }
    !view.places.iter().zip(left).any(|(place, left)| left.covers(&place.whole(&demand.need)))
}

fn index(device: DeviceId) -> usize {
    device.0 as usize
}

fn device(place: usize) -> DeviceId {
    DeviceId(u32::try_from(place).unwrap_or(u32::MAX))
}

// === impl Planner ===

impl<'a> Planner<'a> {
    fn new(view: &'a View<'a>, rules: &'a Rules, now: Duration) -> Self {
        debug_assert!(
            view.demands.windows(2).all(|pair| pair[0].model < pair[1].model),
            "demands are in ascending order of model, each once"
        );
        let mut models: Vec<(ModelKey, usize)> = Vec::with_capacity(view.instances.len());
        let mut groups: Vec<ModelGroup> = Vec::with_capacity(view.instances.len());
        let mut group_of = Vec::with_capacity(view.instances.len());
        let mut shifts = Vec::new();
        let mut free: Vec<Space> = view.places.iter().map(Place::space).collect();
        let mut freeing = vec![Space::default(); free.len()];
        for instance in view.instances {
            let place = index(instance.device);
            let at = models.iter().position(|m| *m == (instance.model, place)).unwrap_or_else(|| {
                let own = view.demands.binary_search_by_key(&instance.model, |d| d.model);
                models.push((instance.model, place));
                groups.push(ModelGroup {
                    instances: 0,
                    staying: 0,
                    serving: false,
                    seats_coming: 0,
                    dram: 0,
                    own_turn: own.ok().map(|at| turn(&view.demands[at], rules)),
                });
                groups.len() - 1
            });
            group_of.push(at);
            let group = &mut groups[at];
            group.instances += 1;
            group.dram = group.dram.max(signed(instance.pool_bytes));
            let beside = view.places[place].beside(instance.kv_bytes);
            free[place] = free[place].minus(beside);
            match instance.state {
                InstanceState::Stopping => {
                    freeing[place] = freeing[place].plus(beside);
                    continue;
                }
                InstanceState::Starting => {
                    group.seats_coming = group.seats_coming.saturating_add(instance.sequences);
                }
                InstanceState::Ready if !instance.leaving => {
                    group.seats_coming = group
                        .seats_coming
                        .saturating_add(instance.sequences.saturating_sub(instance.in_flight));
                }
                InstanceState::Ready | InstanceState::Draining => {}
            }
            group.staying += 1;
            group.serving |= matches!(instance.state, InstanceState::Starting | InstanceState::Ready);
            if evictable(instance) {
                shifts.push(points(instance.priority, rules));
            }
        }
        shifts.sort_unstable();
        shifts.dedup();
        for (group, (_, place)) in groups.iter().zip(&models) {
            free[*place].dram = free[*place].dram.saturating_sub(group.dram);
            if group.staying == 0 {
                freeing[*place].dram = freeing[*place].dram.saturating_add(group.dram);
            }
        }
        Self {
            view,
            rules,
            now,
            free,
            freeing,
            models,
            groups,
            group_of,
            claimed: vec![None; view.instances.len()],
            costs: if view.demands.is_empty() {
                Vec::new()
            } else {
                view.instances.iter().map(|instance| rules.eviction_cost(instance, now)).collect()
            },
            wakeup: None,
            blocked: false,
            shifts,
        }
    }

    /// A model's instances on one place.
    fn group(&self, model: ModelKey, place: usize) -> Option<&ModelGroup> {
        self.models.iter().position(|m| *m == (model, place)).map(|at| &self.groups[at])
    }

    fn together(&self, model: ModelKey) -> Together {
        let mut all = Together::default();
        for (group, _) in self.groups.iter().zip(&self.models).filter(|(_, (of, _))| *of == model) {
            all.instances += group.instances;
            all.serving |= group.serving;
            all.seats_coming = all.seats_coming.saturating_add(group.seats_coming);
        }
        all
    }

    fn wants_instance(&self, demand: &DemandView) -> bool {
        let Together { instances, seats_coming, .. } = self.together(demand.model);
        instances < demand.instances_max && demand.waiting > seats_coming
    }

    /// What one more instance would take of a place; `None`: more than it has.
    fn need(&self, demand: &DemandView, place: usize) -> Option<Space> {
        let at = &self.view.places[place];
        let whole = at.whole(&demand.need);
        if !at.space().covers(&whole) {
            return None;
        }
        // Its weights are mapped already if another of its instances is here to stay.
        let mapped = self.group(demand.model, place).is_some_and(|g| g.staying > 0);
        Some(if mapped { at.beside(demand.need.kv_bytes) } else { whole })
    }

    /// Places that could hold one more instance, those first that are to be chosen first among equals: where its weights
    /// are, then where the most is free.
    fn choices(&self, demand: &DemandView) -> Vec<(usize, Space)> {
        let needs = (0..self.view.places.len()).filter_map(|at| Some((at, self.need(demand, at)?)));
        let mut choices: Vec<(usize, Space)> = needs.collect();
        choices.sort_by_key(|(at, _)| (demand.there != Some(device(*at)), Reverse(self.free[*at].dram), *at));
        choices
    }

    fn place(&mut self, demand: &DemandView, busy: bool) -> Outcome {
        let choices = self.choices(demand);
        if let Some((at, need)) = choices.iter().copied().find(|(at, need)| self.free[*at].covers(need)) {
            self.free[at] = self.free[at].minus(need);
            return Outcome::Start(device(at));
        }
        if !demand.evicts {
            return Outcome::Blocked;
        }
        let coming = |at: usize| self.free[at].plus(self.freeing[at]);
        if let Some((at, need)) = choices.iter().copied().find(|(at, need)| coming(*at).covers(need)) {
            self.promise(at, need);
            return Outcome::Promised;
        }
        let serving = self.together(demand.model).serving;
        let turn = turn(demand, self.rules);
        // Busy ones only for a model that nobody serves. The cheapest victims, wherever they are.
        let sets = choices.iter().filter_map(|&(at, need)| {
            let (cost, set) = self.victims(demand, turn, at, need.minus(coming(at)), busy && !serving)?;
            Some((cost, at, need, set))
        });
        if let Some((_, at, need, set)) = sets.min_by_key(|(cost, ..)| *cost) {
            self.claim(demand, at, set);
            self.promise(at, need);
            return Outcome::Promised;
        }
        if !serving
            && drain_turn(turn, demand.priority, self.rules) <= to_turn(self.now)
            && let Some((at, need)) = choices.first().copied()
        {
            // It has waited long enough: nobody behind it takes what it needs.
            self.promise(at, need);
        }
        Outcome::Blocked
    }

    /// Sets room aside: what is on its way first, so that what is free now can be used now.
    fn promise(&mut self, at: usize, need: Space) {
        let coming = self.freeing[at].shared(need);
        self.freeing[at] = self.freeing[at].minus(coming);
        self.free[at] = self.free[at].minus(self.free[at].shared(need.minus(coming)));
    }

    /// Who would have to make room on a place, and what that costs: idle ones alone if they suffice.
    fn victims(
        &self,
        demand: &DemandView,
        turn: Turn,
        place: usize,
        deficit: Space,
        busy: bool,
    ) -> Option<(u64, Vec<(usize, Candidate)>)> {
        let mut candidates = Vec::new();
        let mut members = Vec::new();
        for (at, instance) in self.view.instances.iter().enumerate() {
            if index(instance.device) == place
                && let Some(cost) = self.cost(at, instance, demand, turn)
                && (busy || cost < COST_BUSY)
            {
                let Space { dram, kv, .. } = self.view.places[place].beside(instance.kv_bytes);
                candidates.push(Candidate { cost, dram, kv, group: self.group_of[at] });
                members.push(at);
            }
        }
        if candidates.is_empty() {
            return None;
        }
        let groups: Vec<Group> =
            self.groups.iter().map(|g| Group { staying: g.staying, dram: g.dram }).collect();
        // A busy victim costs more than all idle ones together, so the cheapest set has no busy one without need.
        let set = cover(deficit, &candidates, &groups, NODES_MAX)?;
        let cost = set.iter().fold(0_u64, |sum, at| sum.saturating_add(candidates[*at].cost));
        Some((cost, set.into_iter().map(|at| (members[at], candidates[at])).collect()))
    }

    fn claim(&mut self, demand: &DemandView, place: usize, set: Vec<(usize, Candidate)>) {
        for (at, Candidate { dram, kv, group, .. }) in set {
            self.claimed[at] = Some(demand.model);
            let group = &mut self.groups[group];
            group.staying -= 1;
            let weights = if group.staying == 0 { group.dram } else { 0 };
            let freed = Space { dram: dram.saturating_add(weights), kv, slots: 1 };
            self.freeing[place] = self.freeing[place].plus(freed);
        }
    }

    /// What it costs that this instance makes room for the demand now; `None`: it need not.
    fn cost(&self, at: usize, instance: &InstanceView, demand: &DemandView, turn: Turn) -> Option<u64> {
        if !evictable(instance) || self.claimed[at].is_some() || instance.model == demand.model {
            return None;
        }
        let waited = to_turn(self.now) >= turn_after(to_turn(demand.oldest_since), self.rules.wait_max);
        let resident = self.rules.resident_until(instance) <= self.now;
        let own_turn = self.groups[self.group_of[at]].own_turn;
        let idle = instance.in_flight == 0 && instance.settled_at <= self.now;
        let cost = self.costs[at];
        if idle && own_turn.is_none() && (resident || waited) {
            return Some(cost);
        }
        let forced = drain_turn(turn, instance.priority, self.rules) <= to_turn(self.now);
        if !forced || !(resident || waited) || own_turn.is_some_and(|own| own <= turn) {
            return None;
        }
        let draining = instance.state == InstanceState::Draining;
        // Few streams to wait for; and who is draining goes on, unless another is idle.
        let streams = u64::from(instance.in_flight.min(1 << 8)) << 33;
        Some(COST_BUSY + if draining { 0 } else { COST_BUSY } + streams + cost)
    }

    /// When a demand that found no room may find some, if nothing else happens before.
    fn wake_for(&mut self, demand: &DemandView) {
        if !demand.evicts || !self.wants_instance(demand) {
            return;
        }
        let turn = turn(demand, self.rules);
        self.wake(turn_after(to_turn(demand.oldest_since), self.rules.wait_max));
        for shift in 0..self.shifts.len() {
            self.wake(turn_after(turn, self.rules.wait_max).saturating_add(self.shifts[shift]));
        }
        self.blocked = true;
    }

    /// When instances end their minimum residency, if that may help anybody.
    fn wake_for_residency(&mut self) {
        if self.blocked {
            for instance in self.view.instances.iter().filter(|i| evictable(i)) {
                let at = self.rules.resident_until(instance).max(instance.settled_at);
                wake(&mut self.wakeup, at, self.now);
            }
        }
    }

    fn wake(&mut self, at: Turn) {
        wake(&mut self.wakeup, from_turn(at), self.now);
    }

    /// What becomes of an instance after all demands had their turn.
    fn settle(&mut self, at: usize, instance: &InstanceView, actions: &mut Vec<Action>) {
        if !matches!(instance.state, InstanceState::Ready | InstanceState::Draining) {
            return;
        }
        let id = instance.id;
        let idle = instance.in_flight == 0;
        let settled = instance.settled_at <= self.now;
        if instance.leaving {
            if idle && settled {
                actions.push(Action::Stop { instance: id, reason: StopReason::Unload });
            } else if idle {
                wake(&mut self.wakeup, instance.settled_at, self.now);
            }
        } else if let Some(for_model) = self.claimed[at] {
            if idle && settled {
                actions.push(Action::Stop { instance: id, reason: StopReason::Room { for_model } });
            } else if instance.state == InstanceState::Ready {
                actions.push(Action::Drain { instance: id, for_model });
            }
            if idle && !settled {
                wake(&mut self.wakeup, instance.settled_at, self.now);
            }
        } else if instance.state == InstanceState::Draining {
            actions.push(Action::Undrain { instance: id });
        } else if idle
            && !instance.pinned
            && self.groups[self.group_of[at]].own_turn.is_none()
            && let KeepAlive::For(time) = instance.keep_alive
        {
            let until = instance.last_used.saturating_add(time).max(instance.settled_at);
            if until <= self.now {
                actions.push(Action::Stop { instance: id, reason: StopReason::KeepAlive });
            } else {
                wake(&mut self.wakeup, until, self.now);
            }
        }
    }
}

/// Whether it may ever make room as it is now.
const fn evictable(instance: &InstanceView) -> bool {
    matches!(instance.state, InstanceState::Ready | InstanceState::Draining)
        && !instance.pinned
        && !instance.leaving
}

fn wake(wakeup: &mut Option<Duration>, at: Duration, now: Duration) {
    if at > now {
        *wakeup = Some(wakeup.map_or(at, |other| other.min(at)));
    }
}

fn turn(demand: &DemandView, rules: &Rules) -> Turn {
    to_turn(demand.oldest_since).saturating_sub(points(demand.priority, rules))
}

/// When a demand with this turn may have an instance of a model of this priority drained.
fn drain_turn(turn: Turn, priority: i32, rules: &Rules) -> Turn {
    turn_after(turn, rules.wait_max).saturating_add(points(priority, rules))
}

fn turn_after(turn: Turn, time: Duration) -> Turn {
    turn.saturating_add(to_turn(time))
}

fn points(priority: i32, rules: &Rules) -> Turn {
    to_turn(rules.priority_worth).saturating_mul(i64::from(priority.clamp(-100, 100)))
}

fn to_turn(time: Duration) -> Turn {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// The first moment at which [`to_turn`] has reached `turn`.
fn from_turn(turn: Turn) -> Duration {
    Duration::from_micros(u64::try_from(turn).unwrap_or(0))
}

fn signed(bytes: ByteSize) -> i64 {
    i64::try_from(bytes.bytes()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn instance(id: u64, model: u32) -> InstanceView {
        InstanceView {
            id: InstanceId(id),
            model: ModelKey(model),
            device: DeviceId(0),
            state: InstanceState::Ready,
            pool_bytes: ByteSize(10),
            kv_bytes: ByteSize(1),
            sequences: 4,
            in_flight: 0,
            last_used: Duration::ZERO,
            ready_at: Duration::ZERO,
            load_time: at(0.1),
            uses: 1.0,
            keep_alive: KeepAlive::Forever,
            pinned: false,
            priority: 0,
            settled_at: Duration::ZERO,
            leaving: false,
        }
    }

    fn demand(model: u32, since: f64) -> DemandView {
        DemandView {
            model: ModelKey(model),
            waiting: 1,
            oldest_since: at(since),
            priority: 0,
            need: Need { pool_bytes: ByteSize(10), kv_bytes: ByteSize(1) },
            there: None,
            instances_max: 1,
            evicts: true,
        }
    }

    fn decided(dram: u64, instances: &[InstanceView], demands: &[DemandView], now: f64) -> Decision {
        let budgets = Budgets { dram: ByteSize(dram), kv: ByteSize(100), slots: 8 };
        decide(&View { places: &[Place::Pool(budgets)], instances, demands }, &Rules::default(), at(now))
    }

    fn stop_for(id: u64, model: u32) -> Action {
        Action::Stop { instance: InstanceId(id), reason: StopReason::Room { for_model: ModelKey(model) } }
    }

    #[test]
    fn starts_where_there_is_room_in_the_order_of_turns() {
        let mut urgent = demand(2, 9.0);
        urgent.priority = 1;
        let decision = decided(20, &[], &[demand(0, 1.0), demand(1, 0.5), urgent], 10.0);
        let start = |model| Action::Start { model: ModelKey(model), device: DeviceId(0) };
        assert_eq!(decision.actions, [start(2), start(1)]);
    }

    #[test]
    fn an_idle_instance_makes_room_after_its_minimum_residency() {
        let mut idle = instance(1, 0);
        idle.ready_at = at(10.0);
        let decision = decided(10, &[idle], &[demand(1, 10.0)], 11.0);
        assert_eq!(decision, Decision { actions: vec![], next_wakeup: Some(at(12.0)) });
        assert_eq!(decided(10, &[idle], &[demand(1, 10.0)], 12.0).actions, [stop_for(1, 1)]);
        idle.load_time = 4 * SECOND;
        assert_eq!(decided(10, &[idle], &[demand(1, 10.0)], 12.0).next_wakeup, Some(at(18.0)));
        assert_eq!(decided(10, &[idle], &[demand(1, -0.0)], 15.0).actions, [stop_for(1, 1)], "waited 15 s");
    }

    #[test]
    fn a_busy_one_is_drained_for_who_waited_long_and_never_stopped() {
        let mut busy = instance(1, 0);
        busy.in_flight = 1;
        let decision = decided(10, &[busy], &[demand(1, 10.0)], 24.0);
        assert_eq!(decision, Decision { actions: vec![], next_wakeup: Some(at(25.0)) });
        let drain = Action::Drain { instance: InstanceId(1), for_model: ModelKey(1) };
        assert_eq!(decided(10, &[busy], &[demand(1, 10.0)], 25.0).actions, [drain]);
        // Its own waiters came first: they are served before.
        assert_eq!(decided(10, &[busy], &[demand(0, 9.0), demand(1, 10.0)], 25.0).actions, []);
        assert_eq!(decided(10, &[busy], &[demand(0, 11.0), demand(1, 10.0)], 25.0).actions, [drain]);
        busy.state = InstanceState::Draining;
        assert_eq!(decided(10, &[busy], &[demand(1, 10.0)], 25.0).actions, [], "goes on draining");
        let undrain = Action::Undrain { instance: InstanceId(1) };
        assert_eq!(decided(10, &[busy], &[], 25.0).actions, [undrain], "who wanted it has gone");
        busy.in_flight = 0;
        assert_eq!(decided(10, &[busy], &[demand(1, 10.0)], 25.0).actions, [stop_for(1, 1)]);
    }

    #[test]
    fn priority_shifts_when_a_busy_one_is_drained() {
        let mut busy = instance(1, 0);
        (busy.in_flight, busy.priority) = (1, 1);
        assert_eq!(decided(10, &[busy], &[demand(1, 10.0)], 26.0).next_wakeup, Some(at(40.0)));
        assert!(!decided(10, &[busy], &[demand(1, 10.0)], 40.0).actions.is_empty());
        busy.priority = -1;
        assert!(!decided(10, &[busy], &[demand(1, 10.0)], 10.0).actions.is_empty());
    }

    #[test]
    fn pinned_and_loading_ones_stay() {
        let mut pinned = instance(1, 0);
        (pinned.pinned, pinned.keep_alive) = (true, KeepAlive::For(Duration::ZERO));
        let mut loading = instance(2, 2);
        loading.state = InstanceState::Starting;
        let decision = decided(20, &[pinned, loading], &[demand(1, 0.0)], 100.0);
        assert_eq!(decision, Decision::default());
    }

    #[test]
    fn the_cheapest_that_suffices_goes() {
        let mut instances = [instance(1, 0), instance(2, 1), instance(3, 2)];
        instances[0].load_time = 5 * SECOND;
        instances[1].uses = 3.0;
        assert_eq!(decided(30, &instances, &[demand(9, 50.0)], 50.0).actions, [stop_for(3, 9)]);
        instances[2].pool_bytes = ByteSize(5);
        assert_eq!(decided(25, &instances, &[demand(9, 50.0)], 50.0).actions, [stop_for(2, 9)]);
    }

    #[test]
    fn keep_alive_ends_by_time() {
        let mut idle = instance(1, 0);
        (idle.keep_alive, idle.last_used) = (KeepAlive::For(10 * SECOND), at(5.0));
        assert_eq!(decided(10, &[idle], &[], 14.0).next_wakeup, Some(at(15.0)));
        let stop = Action::Stop { instance: InstanceId(1), reason: StopReason::KeepAlive };
        assert_eq!(decided(10, &[idle], &[], 15.0), Decision { actions: vec![stop], next_wakeup: None });
        idle.in_flight = 1;
        assert_eq!(decided(10, &[idle], &[], 15.0), Decision::default());
    }

    #[test]
    fn a_preload_takes_free_room_only() {
        let mut preload = demand(1, 0.0);
        preload.evicts = false;
        assert_eq!(decided(10, &[instance(1, 0)], &[preload], 100.0), Decision::default());
        assert_eq!(decided(20, &[instance(1, 0)], &[preload], 100.0).actions.len(), 1);
        let decision = decided(10, &[], &[preload, demand(2, 90.0)], 100.0);
        assert_eq!(
            decision.actions,
            [Action::Start { model: ModelKey(2), device: DeviceId(0) }],
            "after everybody else"
        );
    }

    #[test]
    fn what_an_overdue_demand_needs_is_not_given_to_a_smaller_one() {
        let mut loading = instance(1, 0);
        loading.state = InstanceState::Starting;
        let mut large = demand(1, 0.0);
        large.need.pool_bytes = ByteSize(20);
        let small = demand(2, 9.0);
        assert_eq!(
            decided(20, &[loading], &[large, small], 10.0).actions.len(),
            1,
            "not overdue: {small:?} fits"
        );
        assert_eq!(decided(20, &[loading], &[large, small], 15.0).actions, []);
    }

    #[test]
    fn a_second_instance_shares_the_weights_and_drains_nobody() {
        let mut full = instance(1, 0);
        full.in_flight = 4;
        let mut more = demand(0, 0.0);
        more.instances_max = 2;
        assert_eq!(
            decided(10, &[full], &[more], 1.0).actions,
            [Action::Start { model: ModelKey(0), device: DeviceId(0) }]
        );
        let mut other = instance(2, 1);
        (other.in_flight, other.kv_bytes) = (1, ByteSize(99));
        assert_eq!(decided(20, &[full, other], &[more], 100.0).actions, []);
        full.in_flight = 3;
        assert_eq!(decided(10, &[full], &[more], 1.0).actions, [], "there is a seat");
    }

    #[test]
    fn where_room_would_come_from() {
        let budgets = Budgets { dram: ByteSize(10), kv: ByteSize(100), slots: 8 };
        let room = |instance: InstanceView, now| {
            room(
                &View { places: &[Place::Pool(budgets)], instances: &[instance], demands: &[] },
                &demand(1, 1.0),
                &Rules::default(),
                now,
            )
        };
        let mut it = instance(1, 0);
        assert_eq!(room(it, at(3.0)), Room::Now);
        it.ready_at = at(2.0);
        assert_eq!(room(it, at(3.0)), Room::At(at(4.0)));
        it.in_flight = 1;
        assert_eq!(room(it, at(3.0)), Room::Busy(at(16.0)));
        it.pinned = true;
        assert_eq!(room(it, at(3.0)), Room::Pinned);
    }

    const GPU: Place = Place::Device { memory: ByteSize(20), work: ByteSize(2), slots: 8 };

    fn on(id: u64, model: u32, device: u32) -> InstanceView {
        InstanceView { device: DeviceId(device), ..instance(id, model) }
    }

    fn on_devices(
        places: &[Place],
        instances: &[InstanceView],
        demands: &[DemandView],
        now: f64,
    ) -> Vec<Action> {
        decide(&View { places, instances, demands }, &Rules::default(), at(now)).actions
    }

    fn start_on(model: u32, device: u32) -> Action {
        Action::Start { model: ModelKey(model), device: DeviceId(device) }
    }

    #[test]
    fn weights_caches_and_work_are_taken_of_one_devices_memory() {
        // Ten, one and two of twenty.
        assert_eq!(on_devices(&[GPU], &[], &[demand(0, 0.0), demand(1, 0.0)], 1.0), [start_on(0, 0)]);
        let mut small = demand(1, 0.0);
        small.need = Need { pool_bytes: ByteSize(4), kv_bytes: ByteSize(1) };
        assert_eq!(on_devices(&[GPU], &[on(1, 0, 0)], &[small], 1.0), [start_on(1, 0)], "exactly");
        small.need.kv_bytes = ByteSize(2);
        assert_eq!(on_devices(&[GPU], &[on(1, 0, 0)], &[small], 1.0), []);
        // A second instance shares the weights: three more.
        let mut more = demand(0, 0.0);
        (more.instances_max, more.waiting) = (2, 9);
        assert_eq!(on_devices(&[GPU], &[on(1, 0, 0)], &[more], 1.0), [start_on(0, 0)]);
        assert_eq!(on_devices(&[GPU], &[on(1, 0, 0)], &[demand(1, 0.0)], 50.0), [stop_for(1, 1)]);
    }

    #[test]
    fn a_model_goes_where_its_weights_are_else_where_the_most_is_free() {
        let mut it = demand(5, 0.0);
        it.need.pool_bytes = ByteSize(3);
        let places = [GPU; 3];
        assert_eq!(on_devices(&places, &[on(1, 0, 0), on(2, 1, 1)], &[it], 1.0), [start_on(5, 2)]);
        it.there = Some(DeviceId(1));
        assert_eq!(on_devices(&places, &[on(1, 0, 0), on(2, 1, 1)], &[it], 1.0), [start_on(5, 1)]);
        it.need.pool_bytes = ByteSize(9);
        assert_eq!(
            on_devices(&places, &[on(1, 0, 0), on(2, 1, 1)], &[it], 1.0),
            [start_on(5, 2)],
            "no room there"
        );
        // Only the larger one can hold it at all.
        let large = Place::Device { memory: ByteSize(40), work: ByteSize(2), slots: 8 };
        it.need.pool_bytes = ByteSize(30);
        assert_eq!(on_devices(&[GPU, large], &[], &[it], 1.0), [start_on(5, 1)]);
    }

    #[test]
    fn the_cheapest_victims_of_any_device_go() {
        let mut instances = [on(1, 0, 0), on(2, 1, 1), on(3, 2, 2)];
        instances[0].load_time = 5 * SECOND;
        instances[2].uses = 9.0;
        assert_eq!(on_devices(&[GPU; 3], &instances, &[demand(9, 50.0)], 50.0), [stop_for(2, 9)]);
        // Two that wait don't take the same room.
        assert_eq!(on_devices(&[GPU; 3], &instances, &[demand(8, 49.0), demand(9, 50.0)], 50.0).len(), 2);
        let all: Vec<_> = instances.iter().map(|i| InstanceView { pinned: true, ..*i }).collect();
        let view = View { places: &[GPU; 3], instances: &all, demands: &[] };
        assert_eq!(room(&view, &demand(9, 50.0), &Rules::default(), at(50.0)), Room::Pinned);
        let view = View { instances: &all[..2], ..view };
        assert_eq!(room(&view, &demand(9, 50.0), &Rules::default(), at(50.0)), Room::Now);
    }

    #[test]
    fn eviction_cost_is_monotone() {
        let rules = Rules::default();
        let base = instance(1, 0);
        let cost = |i: InstanceView, now| rules.eviction_cost(&i, at(now));
        assert!(cost(InstanceView { load_time: SECOND, ..base }, 9.0) > cost(base, 9.0));
        assert!(cost(InstanceView { uses: 2.0, ..base }, 9.0) > cost(base, 9.0));
        assert!(cost(InstanceView { priority: 5, ..base }, 9.0) > cost(base, 9.0));
        assert!(cost(base, 90.0) < cost(base, 9.0));
    }
}
