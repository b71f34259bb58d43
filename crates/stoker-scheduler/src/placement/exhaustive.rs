//! The promises of [`super::place`], held against trying everything.

use std::time::Duration;

use proptest::prelude::*;
use stoker_types::{ByteSize, BytesPerSec, DeviceId, InstanceId};

use super::*;

const GB: u64 = 1_000_000_000;
const NOW: Duration = Duration::from_secs(1000);

/// Everything that a case is made of, in plain numbers.
#[derive(Debug, Clone)]
struct Case {
    nodes: Vec<NodeSpec>,
    models: Vec<ModelSpec>,
    residency: Vec<(usize, usize, u64, u64, bool)>,
    instances: Vec<InstanceSpec>,
    queues: Vec<(u64, u64, u64)>,
    demand: Demand,
}

fn node() -> impl Strategy<Value = NodeSpec> {
    let device = (20u64..60, 1u32..4, 10u32..60).prop_map(|(memory, slots, link)| DeviceSpec {
        memory: ByteSize(memory * GB),
        slots,
        link: BytesPerSec(f64::from(link) * 1e9),
    });
    (prop::collection::vec(device, 1..3), 1u32..20, 1u32..120, 5u32..30).prop_map(
        |(devices, ssd, remote, slowness)| NodeSpec {
            devices,
            rates: NodeRates {
                ssd: BytesPerSec(f64::from(ssd) * 1e9),
                remote: BytesPerSec(f64::from(remote) * 1e8),
            },
            slowness: f64::from(slowness) / 10.0,
        },
    )
}

fn model(devices: u32) -> impl Strategy<Value = ModelSpec> {
    (4u64..25, 0u64..6, 0u64..50, 0u64..30, 1u64..900, 0u64..40, any::<bool>()).prop_map(
        move |(weights, kv, init, last, token_us, fixed, overlaps)| ModelSpec {
            weight_bytes: ByteSize(weights * GB * u64::from(devices)),
            devices,
            device_bytes: ByteSize((weights + kv) * GB),
            init: Duration::from_millis(init),
            last_layer: Duration::from_millis(last),
            per_token: Duration::from_micros(token_us),
            resume_fixed: Duration::from_millis(fixed),
            overlaps,
        },
    )
}

fn activity() -> impl Strategy<Value = Activity> {
    prop_oneof![
        4 => Just(Activity::Idle),
        6 => (1u32..5, 1u64..4000, prop::option::of(0u64..40_000)).prop_map(|(sequences, tokens, ends)| {
            Activity::Busy { sequences, tokens, ends: ends.map(|ms| NOW + Duration::from_millis(ms)) }
        }),
        1 => Just(Activity::Starting),
        1 => Just(Activity::Leaving),
    ]
}

prop_compose! {
    /// Up to `nodes` servers, with up to `per_node` instances on each.
    fn case(nodes: usize, per_node: usize, split: bool)(
        nodes in prop::collection::vec(node(), 1..=nodes),
        models in prop::collection::vec(model(1), 4..=4),
        wide in model(2),
    )(
        instances in prop::collection::vec(
            (0..nodes.len(), 0usize..2, 0usize..4, activity(), 0u64..3000, 1u64..30_000, 0u32..30, any::<[bool; 3]>()),
            0..=per_node * nodes.len(),
        ),
        residency in prop::collection::vec((0..nodes.len(), 0usize..5, 0u64..101, 0u64..101, any::<bool>()), 0..12),
        queues in prop::collection::vec((0u64..3000, 0u64..3000, 0u64..800), nodes.len()),
        wanted in if split { Just(4usize).boxed() } else { (0usize..4).boxed() },
        prompt_tokens in 0u32..2000,
        nodes in Just(nodes), models in Just(models), wide in Just(wide),
    ) -> Case {
        let mut models = models;
        models.push(wide);
        let instances = instances
            .into_iter()
            .map(|(node, device, model, activity, settled, load, uses, [pinned, other, movable])| {
                let device = device.min(nodes[node].devices.len() - 1);
                InstanceSpec {
                    model: ModelKey(u32::try_from(model).unwrap()),
                    node: NodeKey(u32::try_from(node).unwrap()),
                    devices: DeviceSet::one(device_id(device)),
                    device_bytes: models[model].device_bytes,
                    activity,
                    resident_until: NOW + Duration::from_millis(settled) - Duration::from_millis(1500),
                    load_time: Duration::from_millis(load),
                    uses: f64::from(uses) / 10.0,
                    used_at: NOW - Duration::from_secs(u64::from(uses) * 7),
                    pinned: pinned && other,
                    movable: movable || other,
                    priority: 0,
                }
            })
            .collect();
        let demand = Demand { model: ModelKey(u32::try_from(wanted).unwrap()), prompt_tokens, avoid: None };
        Case { nodes, models, residency, instances, queues, demand }
    }
}

prop_compose! {
    /// Five servers of one device each, full of up to `per_node` small instances, most of them busy with streams that can be
    /// taken elsewhere; what is demanded takes the room of several.
    fn crowded(per_node: usize)(
        base in case(5, 0, false),
        nodes in prop::collection::vec(node(), 5),
        models in prop::collection::vec(model(1), 4),
        instances in prop::collection::vec(
            (0usize..5, 1usize..4, 1u64..4000, prop::option::weighted(0.3, 0u64..60_000), 0u32..5, 0u32..20),
            per_node * 5,
        ),
        queues in prop::collection::vec((0u64..3000, 0u64..3000, 0u64..800), 5),
        free in prop::collection::vec(0u64..9, 5),
        held in prop::collection::vec((0usize..5, 0usize..4, 0u64..101, 100u64..101), 15),
    ) -> Case {
        let mut models = models;
        for (at, spec) in models.iter_mut().enumerate() {
            let weights = if at == 0 { 14 } else { 3 + at as u64 };
            spec.weight_bytes = ByteSize(weights * GB);
            spec.device_bytes = ByteSize((weights + 1) * GB);
        }
        models.push(base.models[4]);
        let mut count = [0; 5];
        let mut used = [0; 5];
        let mut kept = Vec::new();
        for (node, model, tokens, ends, sequences, uses) in instances {
            if count[node] == per_node {
                continue;
            }
            count[node] += 1;
            used[node] += models[model].device_bytes.bytes();
            let ends = ends.map(|ms| NOW + Duration::from_millis(ms));
            kept.push(InstanceSpec {
                model: ModelKey(u32::try_from(model).unwrap()),
                node: key(node),
                devices: DeviceSet::one(DeviceId(0)),
                device_bytes: models[model].device_bytes,
                activity: if sequences == 0 {
                    Activity::Idle
                } else {
                    Activity::Busy { sequences, tokens, ends }
                },
                resident_until: NOW,
                load_time: Duration::from_secs(2),
                uses: f64::from(uses) / 10.0,
                used_at: NOW - Duration::from_secs(5),
                pinned: false,
                movable: true,
                priority: 0,
            });
        }
        let nodes = nodes.into_iter().enumerate().map(|(at, mut spec)| {
            spec.devices.truncate(1);
            let memory = (used[at] + free[at] * GB).max(16 * GB);
            spec.devices[0] = DeviceSpec { memory: ByteSize(memory), slots: 8, ..spec.devices[0] };
            spec
        });
        Case {
            nodes: nodes.collect(),
            models,
            residency: held.into_iter().map(|(node, model, dram, ssd)| (node, model, dram, ssd, false)).collect(),
            instances: kept,
            queues,
            demand: Demand { model: ModelKey(0), ..base.demand },
        }
    }
}

fn key(at: usize) -> NodeKey {
    NodeKey(u32::try_from(at).unwrap())
}

impl Case {
    /// The cluster; servers are added in this order. Instances without room are left out.
    fn cluster(&self, order: &[usize]) -> Cluster {
        let mut cluster = Cluster::default();
        for at in order {
            cluster.add_node(key(*at), &self.nodes[*at]).unwrap();
        }
        for (at, spec) in self.models.iter().enumerate() {
            cluster.set_model(ModelKey(u32::try_from(at).unwrap()), *spec);
        }
        for (node, model, dram, ssd, device) in &self.residency {
            let all = self.models[*model].weight_bytes.bytes();
            let wide = self.models[*model].devices as usize;
            let devices = if *device && self.nodes[*node].devices.len() >= wide {
                (0..wide).map(device_id).collect()
            } else {
                DeviceSet::EMPTY
            };
            let residency =
                Residency { dram: ByteSize(all / 100 * dram), ssd: ByteSize(all / 100 * ssd), devices };
            cluster.set_residency(key(*node), ModelKey(u32::try_from(*model).unwrap()), residency).unwrap();
        }
        for (id, spec) in (1..).map(InstanceId).zip(&self.instances) {
            match cluster.add_instance(id, *spec) {
                Ok(()) | Err(DeltaError::Overcommitted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        for (at, (remote, ssd, link)) in self.queues.iter().enumerate() {
            let until = |ms: &u64| NOW + Duration::from_millis(*ms);
            let links = (0..self.nodes[at].devices.len()).map(|d| until(link) * u32::from(d == 0));
            cluster.set_queues(key(at), until(remote), until(ssd), links).unwrap();
        }
        cluster
    }

    fn whole(&self) -> Cluster {
        self.cluster(&(0..self.nodes.len()).collect::<Vec<_>>())
    }
}

/// Without limits: what is found is the best.
fn exact() -> Judgement {
    Judgement {
        tolerance: Duration::ZERO,
        servers_max: u32::MAX,
        nodes_max: u32::MAX,
        victims_max: usize::MAX,
        destinations_max: 64,
        moved_models_max: u32::MAX,
        ..Judgement::default()
    }
}

/// Seconds until the first token, written down once more, from the formulas.
fn start(
    cluster: &Cluster,
    node: NodeKey,
    devices: DeviceSet,
    demand: &Demand,
    wait: f64,
) -> (f64, f64, f64) {
    let spec = cluster.models[&demand.model].spec;
    let state = cluster.node(node).unwrap();
    let held = cluster.residency(node, demand.model);
    let all = spec.weight_bytes.bytes() as f64;
    let dram = (held.dram.bytes() as f64).min(all);
    let ssd = (held.ssd.bytes() as f64).min(all).max(dram);
    let queue = |until: u64| (until as f64 / 1e6 - NOW.as_secs_f64()).max(0.0);
    let mut copied = wait;
    let mut alone: f64 = 0.0;
    if held.devices != devices {
        let mut way = |bytes: f64, per_byte: f64, until: u64| {
            if bytes > 0.0 {
                copied = copied.max(wait.max(queue(until)) + bytes * per_byte);
                alone = alone.max(bytes * per_byte);
            }
        };
        way(all - ssd, state.remote.time(GB) as f64 / 1e6 / GB as f64, state.remote.busy_until);
        way(ssd - dram, state.ssd.time(GB) as f64 / 1e6 / GB as f64, state.ssd.busy_until);
        for device in devices.iter() {
            let device = &state.devices[device.0 as usize];
            way(all / f64::from(spec.devices), 1.0 / device.spec.link.0, device.link.busy_until);
        }
    }
    let prefill = spec.per_token.as_secs_f64() * state.slowness * f64::from(demand.prompt_tokens);
    let last = spec.last_layer.as_secs_f64() * state.slowness;
    let init = spec.init.as_secs_f64();
    let total =
        if spec.overlaps { (copied + last).max(wait + prefill) } else { copied + prefill.max(last) } + init;
    (total, copied + init, alone)
}

/// What one instance may do, as the definition has it: when it is gone, what that costs others, where its streams go.
#[derive(Clone, Copy)]
struct Means {
    time: f64,
    penalty: f64,
    to: Option<(NodeKey, DeviceId, f64)>,
}

/// Bytes and slots that are free, by server (in the order of keys, which are dense here) and device.
type Free = Vec<Vec<(i64, i64)>>;

/// The least cost in seconds over all servers, sets of devices, victims, means and destinations.
fn least_cost(cluster: &Cluster, demand: &Demand, judgement: &Judgement) -> Option<f64> {
    let spec = cluster.models[&demand.model].spec;
    let room = |device: &super::cluster::DeviceState| (device.free.cast_signed(), i64::from(device.slots));
    let free: Free =
        cluster.nodes().map(|node| cluster.node(node).unwrap().devices.iter().map(room).collect()).collect();
    let mut best: Option<f64> = None;
    for node in cluster.nodes() {
        let state = cluster.node(node).unwrap();
        for devices in DeviceSet::all(state.devices.len(), spec.devices) {
            let mut on: Vec<InstanceId> = devices
                .iter()
                .flat_map(|d| state.devices[d.0 as usize].instances.clone())
                .map(|(id, _)| id)
                .collect();
            on.sort_unstable();
            on.dedup();
            let means: Vec<Vec<Means>> = on
                .iter()
                .map(|id| all_means(cluster, node, devices, *cluster.instance(*id).unwrap(), judgement))
                .collect();
            let mut chosen = Vec::new();
            every(cluster, node, devices, demand, &free, &on, &means, &mut chosen, &mut best);
        }
    }
    best
}

fn all_means(
    cluster: &Cluster,
    node: NodeKey,
    devices: DeviceSet,
    spec: InstanceSpec,
    judgement: &Judgement,
) -> Vec<Means> {
    let mut means = Vec::new();
    if spec.pinned {
        return means;
    }
    let settled = spec.resident_until.saturating_sub(NOW).as_secs_f64();
    let decayed = judgement.rules.decayed(spec.uses, NOW.saturating_sub(spec.used_at));
    let regret = spec.load_time.as_secs_f64() * (0.05 + decayed).min(1.0);
    match spec.activity {
        Activity::Idle => means.push(Means { time: settled, penalty: regret, to: None }),
        Activity::Busy { sequences, tokens, ends } => {
            if let Some(ends) = ends {
                let time = ends.saturating_sub(NOW).as_secs_f64().max(settled);
                means.push(Means { time, penalty: regret, to: None });
            }
            if !spec.movable {
                return means;
            }
            let cut = judgement.cut.as_secs_f64();
            let model = cluster.models[&spec.model].spec;
            for other in cluster.nodes() {
                let state = cluster.node(other).unwrap();
                let resume = model.per_token.as_secs_f64() * state.slowness * tokens as f64
                    + model.resume_fixed.as_secs_f64();
                let penalty = judgement.migration_cost.as_secs_f64() + cut * f64::from(sequences) + resume;
                for device in (0..state.devices.len()).map(device_id) {
                    if other == node && devices.contains(device) {
                        continue;
                    }
                    let demand = Demand { model: spec.model, prompt_tokens: 0, avoid: None };
                    let (_, ready, alone) = start(cluster, other, DeviceSet::one(device), &demand, 0.0);
                    let time = (ready + resume + cut).max(settled);
                    means.push(Means { time, penalty, to: Some((other, device, alone)) });
                }
            }
        }
        Activity::Starting | Activity::Leaving => {}
    }
    means
}

#[expect(clippy::too_many_arguments, reason = "a recursion over everything")]
fn every(
    cluster: &Cluster,
    node: NodeKey,
    devices: DeviceSet,
    demand: &Demand,
    free: &Free,
    on: &[InstanceId],
    means: &[Vec<Means>],
    chosen: &mut Vec<Option<Means>>,
    best: &mut Option<f64>,
) {
    if chosen.len() < on.len() {
        chosen.push(None);
        every(cluster, node, devices, demand, free, on, means, chosen, best);
        chosen.pop();
        for choice in &means[chosen.len()] {
            chosen.push(Some(*choice));
            every(cluster, node, devices, demand, free, on, means, chosen, best);
            chosen.pop();
        }
        return;
    }
    // Is there room for everybody?
    let mut free = free.clone();
    let spec = cluster.models[&demand.model].spec;
    let take = |free: &mut Free, (node, device): (NodeKey, DeviceId), bytes: u64, slots| {
        let entry: &mut (i64, i64) = &mut free[node.0 as usize][device.0 as usize];
        entry.0 -= bytes.cast_signed() * slots;
        entry.1 -= slots;
    };
    for (id, choice) in on.iter().zip(chosen.iter()) {
        let victim = *cluster.instance(*id).unwrap();
        if let Some(choice) = choice {
            for device in victim.devices.iter() {
                take(&mut free, (node, device), victim.device_bytes.bytes(), -1);
            }
            if let Some((other, device, _)) = choice.to {
                let bytes = cluster.models[&victim.model].spec.device_bytes.bytes();
                take(&mut free, (other, device), bytes, 1);
            }
        }
    }
    for device in devices.iter() {
        take(&mut free, (node, device), spec.device_bytes.bytes(), 1);
    }
    if free.iter().flatten().any(|(bytes, slots)| *bytes < 0 || *slots < 0) {
        return;
    }
    let taken: Vec<Means> = chosen.iter().flatten().copied().collect();
    let mut wait: f64 = 0.0;
    for (at, choice) in taken.iter().enumerate() {
        let others = taken.iter().enumerate().filter(|(other, _)| *other != at);
        let ahead: f64 = choice.to.map_or(0.0, |(to, _, _)| {
            others
                .filter_map(|(_, o)| o.to)
                .filter(|(other, _, _)| *other == to)
                .map(|(_, _, alone)| alone)
                .sum()
        });
        wait = wait.max(choice.time + ahead);
    }
    let penalty: f64 = taken.iter().map(|choice| choice.penalty).sum();
    let cost = start(cluster, node, devices, demand, wait).0 + penalty;
    if best.is_none_or(|best| cost < best) {
        *best = Some(cost);
    }
}

/// Carries a plan out, moves first, and fails when anything has no room.
fn carry_out(mut cluster: Cluster, demand: &Demand, plan: &Plan) -> Cluster {
    let mut next = 10_000;
    let mut incoming = Vec::new();
    for victim in &plan.victims {
        let spec = *cluster.instance(victim.instance).expect("a victim is an instance");
        assert!(!spec.pinned && !matches!(spec.activity, Activity::Starting | Activity::Leaving), "{spec:?}");
        if let VictimMeans::Move { node, devices, .. } = victim.means {
            next += 1;
            let device_bytes = cluster.models[&spec.model].spec.device_bytes;
            incoming.push((InstanceId(next), InstanceSpec { node, devices, device_bytes, ..spec }));
        }
    }
    // Destinations are loaded while their sources still run.
    for (id, spec) in incoming {
        cluster.add_instance(id, spec).expect("a destination has room");
    }
    for victim in &plan.victims {
        cluster.remove_instance(victim.instance).unwrap();
    }
    let spec = InstanceSpec {
        model: demand.model,
        node: plan.node,
        devices: plan.devices,
        device_bytes: cluster.models[&demand.model].spec.device_bytes,
        activity: Activity::Starting,
        resident_until: NOW,
        load_time: Duration::ZERO,
        uses: 0.0,
        used_at: NOW,
        pinned: false,
        movable: false,
        priority: 0,
    };
    cluster.add_instance(InstanceId(1_000_000), spec).expect("there is room for what was planned");
    cluster
}

fn policies() -> [Policy; 6] {
    [
        Policy::StartupTime,
        Policy::Shepherd,
        Policy::Locality,
        Policy::Random(Draw(7)),
        Policy::RoundRobin { after: Some(NodeKey(1)) },
        Policy::LeastLoaded,
    ]
}

/// The plan that is found, after it was held against every plan there is.
fn same_as_everything(case: &Case) -> Result<Option<Plan>, TestCaseError> {
    let cluster = case.whole();
    let found = place(&cluster, &case.demand, Policy::StartupTime, &exact(), NOW);
    let least = least_cost(&cluster, &case.demand, &exact());
    match (found, least) {
        (Ok(plan), Some(least)) => {
            let cost = plan.cost().as_secs_f64();
            prop_assert!((cost - least).abs() < 1e-4, "{cost} against {least}: {plan:?}");
            prop_assert_eq!(plan.gap(), Duration::ZERO);
            prop_assert!(!plan.effort.cut_short);
            Ok(Some(plan))
        }
        (Err(_), None) => Ok(None),
        (found, least) => Err(TestCaseError::fail(format!("{found:?} against {least:?}"))),
    }
}

proptest! {
    // Six victims, as many destinations as there are elsewhere.
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn as_good_in_a_larger_crowd(case in crowded(6)) {
        same_as_everything(&case)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// The plan costs what the best of all plans costs.
    #[test]
    fn as_good_as_trying_everything(case in case(5, 2, false)) {
        same_as_everything(&case)?;
    }

    /// Models over two devices, on which instances are that lie on one of them.
    #[test]
    fn as_good_for_split_models(case in case(3, 3, true)) {
        same_as_everything(&case)?;
    }

    /// Up to four victims on each of five servers, which have up to four destinations each.
    #[test]
    fn as_good_in_a_crowd(case in crowded(4)) {
        if let Some(plan) = same_as_everything(&case)? {
            carry_out(case.whole(), &case.demand, &plan);
        }
    }

    /// With next to no budget the plan may be worse than the best, but never by more than it says.
    #[test]
    fn the_gap_is_honest(case in prop_oneof![case(4, 2, false), crowded(3)], servers_max in 0u32..3, nodes_max in 0u32..6, victims_max in 1usize..3) {
        let cluster = case.whole();
        let least = least_cost(&cluster, &case.demand, &exact());
        let judgement = Judgement { servers_max, nodes_max, victims_max, moved_models_max: servers_max, ..exact() };
        if let Ok(plan) = place(&cluster, &case.demand, Policy::StartupTime, &judgement, NOW) {
            let least = least.expect("the search knows no more than there is");
            prop_assert!(plan.bound.as_secs_f64() <= least + 1e-4, "{:?} is no bound of {least}", plan.bound);
            prop_assert!(plan.cost().as_secs_f64() >= least - 1e-4);
        }
    }

    /// Every policy's plans can be carried out, also for models split over two devices.
    #[test]
    fn nothing_is_promised_twice(case in case(4, 3, true), one in any::<bool>()) {
        let cluster = case.whole();
        let demand = if one { Demand { model: ModelKey(0), ..case.demand } } else { case.demand };
        for policy in policies() {
            if let Ok(plan) = place(&cluster, &demand, policy, &Judgement::default(), NOW) {
                carry_out(cluster.clone(), &demand, &plan);
                prop_assert_eq!(plan.devices.len(), cluster.models[&demand.model].spec.devices);
            }
        }
    }

    /// A faster way on any server never makes the best start later.
    #[test]
    fn a_faster_way_never_hurts(case in case(4, 2, false), at in 0usize..4, factor in 2u32..10) {
        let cluster = case.whole();
        let mut faster = case.clone();
        let at = at % faster.nodes.len();
        let spec = &mut faster.nodes[at];
        for rate in [&mut spec.rates.remote, &mut spec.rates.ssd] {
            rate.0 *= f64::from(factor);
        }
        for device in &mut spec.devices {
            device.link.0 *= f64::from(factor);
        }
        let before = place(&cluster, &case.demand, Policy::StartupTime, &exact(), NOW);
        let after = place(&faster.whole(), &case.demand, Policy::StartupTime, &exact(), NOW);
        if let Ok(before) = before {
            prop_assert!(after.unwrap().cost() <= before.cost() + Duration::from_micros(10));
        }
    }

    /// The same cluster gives the same plan, however it came about.
    #[test]
    fn deterministic(case in case(5, 2, false)) {
        let forward: Vec<usize> = (0..case.nodes.len()).collect();
        let backward: Vec<usize> = forward.iter().rev().copied().collect();
        let (one, other) = (case.cluster(&forward), case.cluster(&backward));
        for policy in policies() {
            let one = place(&one, &case.demand, policy, &Judgement::default(), NOW);
            let other = place(&other, &case.demand, policy, &Judgement::default(), NOW);
            match (one, other) {
                (Ok(one), Ok(other)) => {
                    prop_assert_eq!((one.node, one.devices, &one.victims), (other.node, other.devices, &other.victims));
                }
                (one, other) => prop_assert_eq!(one, other),
            }
        }
    }

    /// Adding and removing leaves nothing behind; refused deltas change nothing.
    #[test]
    fn accounts_balance(case in case(4, 3, false)) {
        let mut cluster = case.whole();
        let ids: Vec<InstanceId> = cluster.instances().map(|(id, _)| id).collect();
        for id in ids {
            let spec = *cluster.instance(id).unwrap();
            prop_assert_eq!(cluster.add_instance(id, spec), Err(DeltaError::Twice(id)));
            cluster.remove_instance(id).unwrap();
            prop_assert_eq!(cluster.remove_instance(id), Err(DeltaError::NoInstance(id)));
        }
        for (at, spec) in case.nodes.iter().enumerate() {
            for (d, device) in spec.devices.iter().enumerate() {
                prop_assert_eq!(cluster.free(key(at), device_id(d)), Some((device.memory, device.slots)));
            }
        }
    }
}
