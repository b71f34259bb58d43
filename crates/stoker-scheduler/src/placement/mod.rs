//! Where a model starts soonest: the server, its devices, and who makes room by which means.
//!
//! [`place`] is a pure function of a [`Cluster`], a [`Demand`], a [`Policy`], the [`Judgement`] and the time. The
//! estimate of a start on devices `d` of server `s`, after section 6 of the ServerlessLLM paper, with the destination's
//! own load and the overlap of prefill and copy:
//!
//! ```text
//! start(s, d) = max( copied + last_layer, wait + prefill ) + init          where the model overlaps the two
//! copied      = max over ways w that bytes cross ( max(wait, queue_w) + bytes_w / rate_w )
//! wait        = 0 where there is room, else the least over plans of
//!               max over victims v ( dropped: 0 | finished: its end | moved: start'(d_v) + resume(d_v) + cut )
//! ```
//!
//! What is minimised is `start + penalties`: what a plan costs others, in the same unit. `docs/scheduling.md` has the
//! algorithm, its complexity, and what it doesn't do.
//!
//! Its promises, each a property test: no device's memory and slots are ever promised twice; the result equals that of
//! trying everything, as long as the budgets of [`Judgement`] aren't used up, and is never better than
//! [`Plan::bound`]; a faster way never makes a server less attractive; the same arguments give the same plan.

mod cluster;
#[cfg(test)]
mod exhaustive;
mod policy;
mod terms;
mod victims;

use std::time::Duration;

use stoker_types::InstanceId;

pub use cluster::{
    Activity, Cluster, DeltaError, DeviceSet, DeviceSpec, InstanceSpec, ModelSpec, NodeKey, NodeRates,
    NodeSpec, Residency,
};
pub use policy::{Draw, Policy};
pub use terms::Terms;

use crate::residency::{ModelKey, Rules};
use cluster::NodeState;
use terms::{Load, Micros, NEVER, duration, micros};
use victims::{Means, Search};

/// A model that somebody waits for, and that has no instance with a free seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Which.
    pub model: ModelKey,
    /// The prompt of the request that waits longest, in tokens.
    pub prompt_tokens: u32,
    /// A server to leave out: its last start failed there.
    pub avoid: Option<NodeKey>,
}

/// Where a model starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// On which server.
    pub node: NodeKey,
    /// On which of its devices.
    pub devices: DeviceSet,
    /// How long it takes.
    pub terms: Terms,
    /// Who makes room for it, in ascending order of instances.
    pub victims: Vec<Victim>,
    /// What this costs others.
    pub penalty: Duration,
    /// No plan costs less than this, start and penalty together; equal to this plan's cost where it is known to be the best.
    pub bound: Duration,
    /// How much work it was.
    pub effort: Effort,
}

/// An instance that makes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Which.
    pub instance: InstanceId,
    /// By which means.
    pub means: VictimMeans,
    /// When its memory is free, from now.
    pub free_in: Duration,
}

/// How an instance makes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VictimMeans {
    /// It is idle: its memory is freed.
    Drop,
    /// It admits nobody new, and goes when its streams have ended.
    Finish,
    /// Its streams are taken elsewhere: the model is loaded there, their caches are computed, then they switch.
    Move {
        /// To which server.
        node: NodeKey,
        /// To which of its devices.
        devices: DeviceSet,
        /// Until the model is ready there.
        load: Duration,
        /// From there until the streams switch.
        resume: Duration,
    },
    /// Its streams are broken off, and begin anew when there is room for them.
    Preempt,
}

/// How much work a decision was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effort {
    /// Servers whose lower bound was computed.
    pub bounded: u32,
    /// Servers on which a search for victims was made.
    pub searched: u32,
    /// Partial plans that were looked at.
    pub nodes: u32,
    /// Some budget of [`Judgement`] was used up: the plan may not be the best.
    pub cut_short: bool,
}

/// Why there is no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlan {
    /// The model isn't known to the cluster.
    #[error("the model is not known: add it first")]
    UnknownModel,
    /// No server could take it, were it empty.
    #[error("no server has devices with enough memory for it, even empty: add one, or lower its context")]
    TooLarge,
    /// No server can make enough room for it in any time that is known.
    #[error("no server can make room for it yet: what holds it is starting, pinned, or has no known end")]
    NoRoom,
}

/// The scheduler's judgements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judgement {
    /// How much uses count after a while.
    pub rules: Rules,
    /// Streams may be taken elsewhere.
    pub migrate: bool,
    /// A migration must start the model so much sooner than doing without: it costs other things than time. So nothing
    /// goes back and forth for little.
    pub migration_cost: Duration,
    /// The pause of a stream when it switches. What a plan costs others has it for each stream.
    pub cut: Duration,
    /// A plan that is better by no more than this isn't looked for.
    pub tolerance: Duration,
    /// Most servers on which victims are searched in one decision.
    pub servers_max: u32,
    /// Most partial plans of one decision.
    pub nodes_max: u32,
    /// Most victims that are considered on one set of devices, those that make room soonest.
    pub victims_max: usize,
    /// Most destinations that are considered for a victim, the soonest.
    pub destinations_max: usize,
    /// Most models whose destinations are looked for in one decision.
    pub moved_models_max: u32,
}

// === impl Judgement ===

impl Default for Judgement {
    fn default() -> Self {
        Self {
            rules: Rules::default(),
            migrate: true,
            migration_cost: Duration::from_millis(50),
            cut: Duration::from_millis(50),
            tolerance: Duration::from_millis(2),
            servers_max: 32,
            nodes_max: 8192,
            victims_max: 64,
            destinations_max: 8,
            moved_models_max: 16,
        }
    }
}

// === impl Plan ===

impl Plan {
    /// What was minimised.
    #[must_use]
    pub fn cost(&self) -> Duration {
        self.terms.total + self.penalty
    }

    /// How much better a plan may be that wasn't found.
    #[must_use]
    pub fn gap(&self) -> Duration {
        self.cost().saturating_sub(self.bound)
    }

    /// Whether it can be carried out at once.
    #[must_use]
    pub fn is_immediate(&self) -> bool {
        self.terms.wait.is_zero()
    }
}

/// Where the model that is demanded starts, by a policy.
///
/// # Errors
/// [`NoPlan`].
pub fn place(
    cluster: &Cluster,
    demand: &Demand,
    policy: Policy,
    judgement: &Judgement,
    now: Duration,
) -> Result<Plan, NoPlan> {
    let choice = Choice::new(cluster, demand, judgement, now)?;
    match policy {
        Policy::StartupTime => choice.soonest(if judgement.migrate { Means::ALL } else { Means::STAYING }),
        Policy::Shepherd => choice.soonest(Means::PREEMPTING),
        Policy::Locality => choice.nearest(),
        Policy::Random(draw) => choice.ordered(policy::shuffled(cluster, draw)),
        Policy::RoundRobin { after } => choice.ordered(policy::in_turn(cluster, after)),
        Policy::LeastLoaded => choice.ordered(policy::by_load(cluster)),
    }
}

/// Servers whose victims are looked at before any is searched: the first ones by what they could do without.
const SHARPENED_MAX: usize = 256;

/// One decision.
struct Choice<'a> {
    cluster: &'a Cluster,
    judgement: &'a Judgement,
    model: &'a cluster::ModelState,
    prompt_tokens: u64,
    avoid: Option<NodeKey>,
    now: Duration,
    best: Option<Found>,
    /// The least lower bound of what wasn't looked at.
    open: Micros,
    effort: Effort,
}

/// A plan, in the units of the search.
#[derive(Debug, Clone)]
struct Found {
    cost: Micros,
    penalty: Micros,
    node: NodeKey,
    devices: DeviceSet,
    terms: Terms,
    victims: Vec<Victim>,
}

/// What a server could do at best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Bounded {
    least: Micros,
    node: NodeKey,
    at: usize,
}

/// The least cost of a server's best devices.
struct AtBest {
    /// Were all of it free.
    empty: Option<(Micros, DeviceSet)>,
    /// As it is.
    free: Option<(Micros, DeviceSet)>,
}

/// The `count` least of some devices.
struct Nearest {
    count: usize,
    /// Ascending; `len` of them.
    least: [(Micros, u64, usize); DeviceSet::MAX],
    len: usize,
    all: DeviceSet,
}

// === impl Nearest ===

impl Nearest {
    const fn new(count: usize) -> Self {
        Self { count, least: [(0, 0, 0); DeviceSet::MAX], len: 0, all: DeviceSet::EMPTY }
    }

    fn add(&mut self, device: (Micros, u64, usize)) {
        self.all = self.all.with(device_id(device.2));
        let kept = self.count.min(DeviceSet::MAX);
        let mut at = self.len;
        while at > 0 && device < self.least[at - 1] {
            if at < kept {
                self.least[at] = self.least[at - 1];
            }
            at -= 1;
        }
        if at < kept {
            self.least[at] = device;
            self.len = (self.len + 1).min(kept);
        }
    }

    fn has_all(&self, devices: DeviceSet) -> bool {
        self.all.shared(devices) == devices
    }

    fn set(&self) -> Option<DeviceSet> {
        (self.len == self.count)
            .then(|| self.least[..self.len].iter().map(|(_, _, at)| device_id(*at)).collect())
    }
}

// === impl Choice ===

impl<'a> Choice<'a> {
    fn new(
        cluster: &'a Cluster,
        demand: &Demand,
        judgement: &'a Judgement,
        now: Duration,
    ) -> Result<Self, NoPlan> {
        let model = cluster.models.get(&demand.model).ok_or(NoPlan::UnknownModel)?;
        Ok(Self {
            cluster,
            judgement,
            model,
            prompt_tokens: u64::from(demand.prompt_tokens),
            avoid: demand.avoid,
            now,
            best: None,
            open: Micros::MAX,
            effort: Effort::default(),
        })
    }

    /// The plan with the least cost over all servers. Servers are searched in the order of what they could do at best, until
    /// none that is left could win.
    fn soonest(mut self, means: Means) -> Result<Plan, NoPlan> {
        let mut waiting = Vec::new();
        let mut large_enough = false;
        for (at, held) in &self.model.holders {
            large_enough |= self.bound(*at, *held, &mut waiting);
        }
        // Who holds nothing of it has to fetch all of it: is anybody of them worth a look?
        let fetched = self.fetched_at_least();
        if self.best.is_none() || fetched < self.limit() {
            let mut holders = self.model.holders.iter().map(|(at, _)| *at).peekable();
            for at in 0..self.cluster.states.len() {
                if holders.next_if_eq(&at).is_none() {
                    large_enough |= self.bound(at, Residency::default(), &mut waiting);
                }
            }
        } else {
            self.open = fetched;
        }
        if !large_enough {
            return Err(NoPlan::TooLarge);
        }
        let limit = self.limit();
        waiting.retain(|bounded: &Bounded| {
            let may_win = bounded.least < limit;
            if !may_win {
                self.open = self.open.min(bounded.least);
            }
            may_win
        });
        waiting.sort_unstable();
        let mut search = Search::new(self.cluster, self.judgement, means.in_place(), self.now);
        let sharpened = self.sharpened(&search, &waiting, 0);
        self.search_all(&mut search, &sharpened, 0);
        if means.relocate {
            // Plans that take streams elsewhere cost at least what that costs: few of them are left to look at.
            search.relocate();
            let more = search.relocation_at_least();
            let sharpened = self.sharpened(&search, &waiting, more);
            self.search_all(&mut search, &sharpened, more);
        }
        self.finish(&search)
    }

    /// Enters what a server could do at best, and offers what it can do now. False when it is too small.
    fn bound(&mut self, at: usize, held: Residency, waiting: &mut Vec<Bounded>) -> bool {
        let node = &self.cluster.states[at];
        if !node.open || self.avoid == Some(node.key) {
            return false;
        }
        self.effort.bounded += 1;
        let best = self.at_best(node, held);
        let Some((least, _)) = best.empty else { return false };
        if let Some((cost, devices)) = best.free {
            self.offer_free(node, devices, cost);
            if cost <= least {
                return true;
            }
        }
        waiting.push(Bounded { least, node: node.key, at });
        true
    }

    /// The servers in the order of what they could do at best with what their victims cost, the first of them at least.
    fn sharpened(&self, search: &Search<'_>, waiting: &[Bounded], more: Micros) -> Vec<Bounded> {
        let spec = &self.model.spec;
        let count = spec.devices.max(1) as usize;
        let mut sharpened = waiting.to_vec();
        for (at, bounded) in sharpened.iter_mut().enumerate() {
            if at >= SHARPENED_MAX {
                bounded.least = bounded.least.saturating_add(more);
                continue;
            }
            let devices = &self.cluster.states[bounded.at].devices;
            let mut penalties = [NEVER; DeviceSet::MAX];
            for (penalty, device) in penalties.iter_mut().zip(devices) {
                if device.spec.memory >= spec.device_bytes && device.spec.slots > 0 {
                    *penalty = search.penalty_at_least(device, spec.device_bytes.bytes());
                }
            }
            // A set of so many devices has one that costs no less than this.
            let (_, least, _) = penalties.select_nth_unstable(count - 1);
            bounded.least = bounded.least.saturating_add((*least).max(more));
        }
        sharpened.sort_unstable();
        sharpened
    }

    /// The least cost on any server that holds nothing of the model.
    fn fetched_at_least(&self) -> Micros {
        let spec = &self.model.spec;
        self.cluster.fetched_at_least(spec.weight_bytes.bytes()) + micros(spec.init)
    }

    /// Searches servers in order, as long as one of them, at `more` than its least cost, could win.
    fn search_all(&mut self, search: &mut Search<'a>, waiting: &[Bounded], more: Micros) {
        for bounded in waiting {
            let least = bounded.least;
            if least >= self.limit() {
                self.open = self.open.min(least);
                return;
            }
            if self.effort.searched >= self.judgement.servers_max || search.is_spent() {
                self.open = self.open.min(bounded.least);
                self.effort.cut_short = true;
                return;
            }
            self.effort.searched += 1;
            self.search(search, &self.cluster.states[bounded.at], more);
        }
    }

    /// The server on which it would load the soonest, whoever is there, and the soonest plan without migration on it.
    fn nearest(mut self) -> Result<Plan, NoPlan> {
        let mut waiting: Vec<Bounded> = Vec::new();
        let is_open = |(_, node): &(usize, &NodeState)| node.open && self.avoid != Some(node.key);
        for (at, node) in self.cluster.states.iter().enumerate().filter(is_open) {
            self.effort.bounded += 1;
            if let Some((least, _)) = self.at_best(node, self.model.held(at)).empty {
                waiting.push(Bounded { least, node: node.key, at });
            }
        }
        if waiting.is_empty() {
            return Err(NoPlan::TooLarge);
        }
        waiting.sort_unstable();
        let mut search = Search::new(self.cluster, self.judgement, Means::STAYING, self.now);
        for bounded in waiting {
            self.effort.searched += 1;
            let node = &self.cluster.states[bounded.at];
            if let Some((cost, devices)) = self.at_best(node, self.model.held(bounded.at)).free {
                self.offer_free(node, devices, cost);
            }
            self.search(&mut search, node, 0);
            if self.best.is_some() {
                break;
            }
        }
        self.finish(&search)
    }

    /// The first server, in this order, that can take it at once, if only by dropping what is idle.
    fn ordered(mut self, order: Vec<usize>) -> Result<Plan, NoPlan> {
        let mut search = Search::new(self.cluster, self.judgement, Means::DROPPING, self.now);
        let mut large_enough = false;
        for at in order {
            let node = &self.cluster.states[at];
            if self.avoid == Some(node.key) {
                continue;
            }
            self.effort.bounded += 1;
            let best = self.at_best(node, self.model.held(at));
            large_enough |= best.empty.is_some();
            if let Some((cost, devices)) = best.free {
                self.offer_free(node, devices, cost);
            } else if best.empty.is_some() {
                self.effort.searched += 1;
                self.search(&mut search, node, 0);
            }
            if self.best.as_ref().is_some_and(|best| best.terms.wait.is_zero()) {
                break;
            }
            self.best = None;
        }
        if large_enough { self.finish(&search) } else { Err(NoPlan::TooLarge) }
    }

    /// The least cost on a server were all of it free, and on devices that are free now.
    fn at_best(&self, node: &NodeState, held: Residency) -> AtBest {
        let spec = &self.model.spec;
        let need = spec.device_bytes.bytes();
        let now = micros(self.now);
        let count = spec.devices.max(1) as usize;
        let (mut empty, mut free) = (Nearest::new(count), Nearest::new(count));
        let share = spec.share();
        for (at, device) in node.devices.iter().enumerate() {
            if device.spec.memory.bytes() < need || device.spec.slots == 0 {
                continue;
            }
            // The devices whose links are through with it first; among equals, those that are left the least room.
            let order = (device.link.queue(now) + device.link.time(share), device.free, at);
            empty.add(order);
            if device.free >= need && device.slots > 0 {
                free.add(order);
            }
        }
        let cost = |devices| Load::new(node, devices, spec, held, self.prompt_tokens, now).total(0);
        let there = held.devices.len() as usize == count;
        let of = |nearest: &Nearest| {
            let devices =
                if there && nearest.has_all(held.devices) { held.devices } else { nearest.set()? };
            Some((cost(devices), devices))
        };
        let free = of(&free);
        // The same devices, most of the time.
        let empty = match (&free, empty.set()) {
            (Some((cost, devices)), Some(best)) if !there && best == *devices => Some((*cost, best)),
            _ => of(&empty),
        };
        AtBest { empty, free }
    }

    /// What another plan has to cost less than.
    fn limit(&self) -> Micros {
        self.best
            .as_ref()
            .map_or(Micros::MAX, |best| best.cost.saturating_sub(micros(self.judgement.tolerance)))
    }

    fn offer_free(&mut self, node: &NodeState, devices: DeviceSet, cost: Micros) {
        let is_better = |best: &Found| {
            (cost, false, node.key, devices) < (best.cost, !best.victims.is_empty(), best.node, best.devices)
        };
        if self.best.as_ref().is_none_or(is_better) {
            let terms = self.load(node, devices).terms(0);
            self.best = Some(Found { cost, penalty: 0, node: node.key, devices, terms, victims: Vec::new() });
        }
    }

    fn load(&self, node: &NodeState, devices: DeviceSet) -> Load {
        let held = self.cluster.nodes.get(&node.key).map(|at| self.model.held(*at)).unwrap_or_default();
        Load::new(node, devices, &self.model.spec, held, self.prompt_tokens, micros(self.now))
    }

    /// The best plan with victims on a server, if it beats the best so far. Every plan costs at least `more` than its load.
    fn search(&mut self, search: &mut Search<'a>, node: &'a NodeState, more: Micros) {
        let spec = &self.model.spec;
        let need = spec.device_bytes.bytes();
        let mut penalties = [NEVER; DeviceSet::MAX];
        for (penalty, device) in penalties.iter_mut().zip(&node.devices) {
            if device.spec.memory.bytes() >= need && device.spec.slots > 0 {
                *penalty = search.penalty_at_least(device, need);
            }
        }
        let mut sets: Vec<(Micros, DeviceSet, Load)> = Vec::new();
        for devices in DeviceSet::all(node.devices.len(), spec.devices.max(1)) {
            let penalty = devices.iter().map(|d| penalties[d.0 as usize]).max().unwrap_or(0);
            if penalty < NEVER {
                let load = self.load(node, devices);
                sets.push((load.total(0).saturating_add(penalty.max(more)), devices, load));
            }
        }
        sets.sort_unstable_by_key(|(least, devices, _)| (*least, *devices));
        for (least, devices, load) in sets {
            if least >= self.limit() {
                self.open = self.open.min(least);
                break;
            }
            let found = search.cover(node, devices, need, &load, self.limit());
            if let Some(found) = found {
                self.best = Some(Found {
                    cost: found.cost,
                    penalty: found.penalty,
                    node: node.key,
                    devices,
                    terms: load.terms(found.wait),
                    victims: found.victims,
                });
            }
        }
    }

    fn finish(self, search: &Search<'_>) -> Result<Plan, NoPlan> {
        let best = self.best.ok_or(NoPlan::NoRoom)?;
        let open = self.open.min(search.open()).min(best.cost);
        let effort = Effort {
            nodes: search.visited(),
            cut_short: self.effort.cut_short || search.was_cut(),
            ..self.effort
        };
        Ok(Plan {
            node: best.node,
            devices: best.devices,
            terms: best.terms,
            victims: best.victims,
            penalty: duration(best.penalty),
            bound: duration(open),
            effort,
        })
    }
}

fn device_id(at: usize) -> stoker_types::DeviceId {
    stoker_types::DeviceId(u32::try_from(at).unwrap_or(u32::MAX))
}
