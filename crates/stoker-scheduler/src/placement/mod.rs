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
use terms::{Load, Micros, duration, micros};
use victims::{Means, Search};

/// A model that somebody waits for, and that has no instance with a free seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Which.
    pub model: ModelKey,
    /// The prompt of the request that waits longest, in tokens.
    pub prompt_tokens: u32,
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

/// One decision.
struct Choice<'a> {
    cluster: &'a Cluster,
    judgement: &'a Judgement,
    model: &'a cluster::ModelState,
    prompt_tokens: u64,
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
        for at in 0..self.cluster.states.len() {
            let node = &self.cluster.states[at];
            if !node.open {
                continue;
            }
            self.effort.bounded += 1;
            let (least, roomy) = self.at_best(node);
            let Some((least, _)) = least else { continue };
            large_enough = true;
            let mut is_best_here = false;
            if let Some((cost, devices)) = roomy {
                self.offer_free(node, devices, cost);
                is_best_here = cost <= least;
            }
            if !is_best_here {
                waiting.push(Bounded { least, node: node.key, at });
            }
        }
        if !large_enough {
            return Err(NoPlan::TooLarge);
        }
        let limit = self.limit();
        waiting.retain(|bounded| {
            let may_win = bounded.least < limit;
            if !may_win {
                self.open = self.open.min(bounded.least);
            }
            may_win
        });
        waiting.sort_unstable();
        let mut search = Search::new(self.cluster, self.judgement, means, self.now);
        for bounded in waiting {
            if bounded.least >= self.limit() {
                self.open = self.open.min(bounded.least);
                break;
            }
            if self.effort.searched >= self.judgement.servers_max || search.is_spent() {
                self.open = self.open.min(bounded.least);
                self.effort.cut_short = true;
                break;
            }
            self.effort.searched += 1;
            self.search(&mut search, &self.cluster.states[bounded.at]);
        }
        self.finish(&search)
    }

    /// The server on which it would load the soonest, whoever is there, and the soonest plan without migration on it.
    fn nearest(mut self) -> Result<Plan, NoPlan> {
        let mut waiting: Vec<Bounded> = Vec::new();
        for (at, node) in self.cluster.states.iter().enumerate().filter(|(_, node)| node.open) {
            self.effort.bounded += 1;
            if let (Some((least, _)), _) = self.at_best(node) {
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
            if let (_, Some((cost, devices))) = self.at_best(node) {
                self.offer_free(node, devices, cost);
            }
            self.search(&mut search, node);
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
            self.effort.bounded += 1;
            let (least, roomy) = self.at_best(node);
            large_enough |= least.is_some();
            if let Some((cost, devices)) = roomy {
                self.offer_free(node, devices, cost);
            } else if least.is_some() {
                self.effort.searched += 1;
                self.search(&mut search, node);
            }
            if self.best.as_ref().is_some_and(|best| best.terms.wait.is_zero()) {
                break;
            }
            self.best = None;
        }
        if large_enough { self.finish(&search) } else { Err(NoPlan::TooLarge) }
    }

    /// The least cost on a server were all of it free, and on devices that are free now.
    #[expect(clippy::type_complexity, reason = "twice the same, side by side")]
    fn at_best(&self, node: &NodeState) -> (Option<(Micros, DeviceSet)>, Option<(Micros, DeviceSet)>) {
        let spec = &self.model.spec;
        let need = spec.device_bytes.bytes();
        let held = self.model.holders.get(&node.key).copied().unwrap_or_default();
        let now = micros(self.now);
        let count = spec.devices.max(1) as usize;
        let cost = |devices| Load::new(node, devices, spec, held, self.prompt_tokens, now).total(0);
        let best_of = |free_now: bool| {
            let fits = |at: &usize| {
                let device = &node.devices[*at];
                if free_now {
                    device.free >= need && device.slots > 0
                } else {
                    device.spec.memory.bytes() >= need && device.spec.slots > 0
                }
            };
            let there: Vec<usize> =
                held.devices.iter().map(|d| d.0 as usize).filter(|at| *at < node.devices.len()).collect();
            if there.len() == count && there.iter().all(fits) {
                return Some((cost(held.devices), held.devices));
            }
            // The devices whose links are through with it first; among equals, those that are left the least room.
            let mut order = [(0, 0, 0); DeviceSet::MAX];
            let mut len = 0;
            for at in (0..node.devices.len()).filter(fits) {
                let device = &node.devices[at];
                order[len] = (device.link.queue(now) + device.link.time(spec.share()), device.free, at);
                len += 1;
            }
            if len < count {
                return None;
            }
            let order = &mut order[..len];
            if count == 1 {
                order.select_nth_unstable(0);
            } else {
                order.sort_unstable();
            }
            let devices = order[..count].iter().map(|(_, _, at)| device_id(*at)).collect();
            Some((cost(devices), devices))
        };
        (best_of(false), best_of(true))
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
        let held = self.model.holders.get(&node.key).copied().unwrap_or_default();
        Load::new(node, devices, &self.model.spec, held, self.prompt_tokens, micros(self.now))
    }

    /// The best plan with victims on a server, if it beats the best so far.
    fn search(&mut self, search: &mut Search<'a>, node: &'a NodeState) {
        let spec = &self.model.spec;
        let mut sets: Vec<(Micros, DeviceSet)> = DeviceSet::all(node.devices.len(), spec.devices.max(1))
            .filter(|devices| {
                devices.iter().all(|d| {
                    let device = &node.devices[d.0 as usize];
                    device.spec.memory >= spec.device_bytes && device.spec.slots > 0
                })
            })
            .map(|devices| (self.load(node, devices).total(0), devices))
            .collect();
        sets.sort_unstable();
        for (least, devices) in sets {
            if least >= self.limit() {
                self.open = self.open.min(least);
                break;
            }
            let load = self.load(node, devices);
            let found = search.cover(node, devices, spec.device_bytes.bytes(), &load, self.limit());
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
