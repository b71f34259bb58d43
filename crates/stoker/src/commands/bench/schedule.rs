//! `stoker bench schedule`: placement decisions on the in-memory state of a whole cluster, which the policy code of the
//! controller makes. The cluster is drawn by a seed, filled by Zipf's law, and kept at 90 % of what fits.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;
use stoker_scheduler::{
    placement::{
        Activity, Cluster, Demand, DeviceSet, DeviceSpec, Draw, InstanceSpec, Judgement, ModelSpec, NodeKey,
        NodeRates, NodeSpec, Plan, Policy, Residency, VictimMeans, place,
    },
    residency::ModelKey,
};
use stoker_types::{ByteSize, BytesPerSec, InstanceId, clock};

use super::Spread;
use crate::{
    cli::BenchScheduleArgs,
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct Report {
    nodes: u32,
    gpus: u32,
    models: u32,
    instances: usize,
    /// Of the devices' memory, before the first decision.
    fill: f64,
    decisions: u32,
    seed: u64,
    /// From the demand to the applied plan.
    decision_us: Spread,
    without_victims_us: Option<Spread>,
    with_victims_us: Option<Spread>,
    decisions_per_s: f64,
    share_with_victims: f64,
    share_with_migration: f64,
    share_cut_short: f64,
    share_refused: f64,
    /// Of the plans that were cut short: how much sooner a better one could be, at most.
    gap_ms: Option<Spread>,
    start_ms: Spread,
    /// Memory of this process, the cluster and all else.
    resident_bytes: ByteSize,
}

/// Models, when nothing is said of them.
const MODELS: u32 = 10_000;
/// Popularity falls with rank to this power.
const ZIPF: f64 = 1.1;
/// Models in a row that no server had room for: the cluster is full.
const FILL_TRIES: u32 = 50;
/// Of the decisions.
const WITH_VICTIMS: f64 = 0.3;
/// Demands that are drawn at most for one decision.
const DRAWS_MAX: u32 = 64;
const DEVICES: u32 = 8;
const DRAM: u64 = 1 << 40;
const SSD: u64 = 8_000_000_000_000;

/// Weights, KV cache and work memory of an instance, devices, and how common the size is.
const SIZES: [(u64, u64, u32, u32); 4] = [
    (13_476_839_424, 4 << 30, 1, 55),
    (26_031_728_640, 6 << 30, 1, 25),
    (59_945_213_952, 8 << 30, 1, 15),
    (137_953_296_384, 8 << 30, 2, 5),
];

struct World {
    cluster: Cluster,
    random: StdRng,
    specs: Vec<ModelSpec>,
    /// Sums of the models' popularities, for drawing.
    popularity: Vec<f64>,
    /// Instances that may go or change, in no order.
    alive: Vec<InstanceId>,
    next: u64,
    now: Duration,
    used: u64,
    /// What was used when no more fitted.
    full: u64,
    capacity: u64,
}

// === impl World ===

impl World {
    fn new(args: &BenchScheduleArgs, models: u32) -> anyhow::Result<Self> {
        let mut random = StdRng::seed_from_u64(args.seed);
        let mut cluster = Cluster::default();
        let memory = ByteSize::gib(76);
        let device = DeviceSpec { memory, slots: 8, link: BytesPerSec(52e9) };
        for node in 0..args.nodes {
            let spec = NodeSpec {
                devices: vec![device; DEVICES as usize],
                rates: NodeRates {
                    remote: BytesPerSec(random.random_range(1.0e9..1.4e9)),
                    ssd: BytesPerSec(random.random_range(6.0e9..14.0e9)),
                },
                slowness: 1.0,
            };
            cluster.add_node(NodeKey(node), &spec)?;
        }
        let mut specs = Vec::new();
        let mut popularity = Vec::new();
        let mut sum = 0.0;
        for model in 0..models {
            let mut drawn = random.random_range(0..100);
            let (weights, beside, devices, _) = *SIZES
                .iter()
                .find(|(.., share)| {
                    let is_it = drawn < *share;
                    drawn = drawn.saturating_sub(*share);
                    is_it
                })
                .unwrap_or(&SIZES[0]);
            #[expect(clippy::cast_precision_loss, reason = "a compute time")]
            let per_token = Duration::from_secs_f64(weights as f64 / 13.5e9 * 75e-6);
            let spec = ModelSpec {
                weight_bytes: ByteSize(weights),
                devices,
                device_bytes: ByteSize(weights / u64::from(devices) + beside),
                init: Duration::from_millis(5),
                last_layer: Duration::from_millis(2),
                per_token,
                resume_fixed: Duration::from_millis(15),
                overlaps: true,
            };
            cluster.set_model(ModelKey(model), spec);
            specs.push(spec);
            sum += 1.0 / f64::from(model + 1).powf(ZIPF);
            popularity.push(sum);
        }
        let capacity = memory.bytes() * u64::from(DEVICES) * u64::from(args.nodes);
        let mut world = Self {
            cluster,
            random,
            specs,
            popularity,
            alive: Vec::new(),
            next: 0,
            now: Duration::from_hours(1),
            used: 0,
            full: 0,
            capacity,
        };
        world.lay_out(args.nodes)?;
        world.fill()?;
        Ok(world)
    }

    /// Copies round robin over the servers' SSDs until four fifths are full, and in each one's DRAM its most popular models.
    fn lay_out(&mut self, nodes: u32) -> anyhow::Result<()> {
        let total: u64 = self.specs.iter().map(|spec| spec.weight_bytes.bytes()).sum();
        let copies = (SSD / 5 * 4 * u64::from(nodes) / total.max(1)).clamp(1, u64::from(nodes));
        let mut dram = vec![DRAM; nodes as usize];
        let mut node = 0;
        for (model, spec) in (0..).zip(self.specs.clone()) {
            let bytes = spec.weight_bytes;
            for _ in 0..copies {
                let left = &mut dram[node as usize];
                let in_dram = bytes.bytes().min(*left);
                *left -= in_dram;
                let residency = Residency { dram: ByteSize(in_dram), ssd: bytes, devices: DeviceSet::EMPTY };
                self.cluster.set_residency(NodeKey(node), ModelKey(model), residency)?;
                node = (node + 1) % nodes;
            }
        }
        Ok(())
    }

    fn drawn_model(&mut self) -> ModelKey {
        let sum = self.popularity.last().copied().unwrap_or(0.0);
        let drawn = self.random.random_range(0.0..sum);
        let rank = self.popularity.partition_point(|upto| *upto < drawn);
        ModelKey(u32::try_from(rank).unwrap_or(0))
    }

    /// Starts models until no more fit, then ends idle ones until nine tenths of that are left.
    fn fill(&mut self) -> anyhow::Result<()> {
        let judgement = Judgement { migrate: false, ..Judgement::default() };
        let mut in_vain = 0;
        while in_vain < FILL_TRIES {
            let demand = Demand { model: self.drawn_model(), prompt_tokens: 0, avoid: None };
            let draw = Policy::Random(Draw(self.random.random()));
            match place(&self.cluster, &demand, draw, &judgement, self.now) {
                Ok(plan) if plan.victims.is_empty() => {
                    in_vain = 0;
                    self.start(demand.model, plan.node, plan.devices)?;
                    let last = self.alive.len() - 1;
                    self.become_ready(last)?;
                }
                _ => in_vain += 1,
            }
        }
        self.full = self.used;
        while self.is_too_full() {
            self.go_on()?;
        }
        Ok(())
    }

    fn is_too_full(&self) -> bool {
        self.used > self.full / 10 * 9
    }

    #[expect(clippy::cast_precision_loss, reason = "a share")]
    fn share_used(&self) -> f64 {
        self.used as f64 / self.capacity as f64
    }

    fn start(&mut self, model: ModelKey, node: NodeKey, devices: DeviceSet) -> anyhow::Result<()> {
        self.next += 1;
        let id = InstanceId(self.next);
        let device_bytes = self.specs[model.0 as usize].device_bytes;
        let spec = InstanceSpec {
            model,
            node,
            devices,
            device_bytes,
            activity: Activity::Starting,
            resident_until: self.now,
            load_time: Duration::from_secs(2),
            uses: 1.0,
            used_at: self.now,
            pinned: false,
            movable: true,
            priority: 0,
        };
        self.cluster.add_instance(id, spec)?;
        self.used += device_bytes.bytes() * u64::from(devices.len());
        self.alive.push(id);
        Ok(())
    }

    fn end(&mut self, id: InstanceId) -> anyhow::Result<()> {
        let spec = self.cluster.remove_instance(id)?;
        self.used -= spec.device_bytes.bytes() * u64::from(spec.devices.len());
        Ok(())
    }

    /// Half of them are idle, the others have streams whose end is known for half of them.
    fn become_ready(&mut self, at: usize) -> anyhow::Result<()> {
        let now = self.now;
        let (busy, known, sequences, tokens, left, idle) = (
            self.random.random_bool(0.5),
            self.random.random_bool(0.5),
            self.random.random_range(1..8),
            self.random.random_range(200..4000),
            self.random.random_range(1..60_000),
            self.random.random_range(0..600_000),
        );
        self.cluster.update_instance(self.alive[at], |spec| {
            spec.activity = if busy {
                let ends = known.then(|| now + Duration::from_millis(left));
                Activity::Busy { sequences, tokens: tokens * u64::from(sequences), ends }
            } else {
                Activity::Idle
            };
            spec.used_at = if busy { now } else { now.saturating_sub(Duration::from_millis(idle)) };
        })?;
        Ok(())
    }

    /// A demand by Zipf's law, drawn again until it needs victims or doesn't, as it should.
    fn demand(&mut self, judgement: &Judgement) -> Demand {
        let needs_victims = self.random.random_bool(WITH_VICTIMS);
        let mut demand = Demand { model: ModelKey(0), prompt_tokens: 0, avoid: None };
        for _ in 0..DRAWS_MAX {
            demand = Demand {
                model: self.drawn_model(),
                prompt_tokens: self.random.random_range(16..1024),
                avoid: None,
            };
            let plan = place(&self.cluster, &demand, Policy::StartupTime, judgement, self.now);
            if plan.is_ok_and(|plan| plan.victims.is_empty() != needs_victims) {
                break;
            }
        }
        demand
    }

    /// Does to the cluster what the plan says, as if everything that it waits for happened at once.
    fn apply(&mut self, demand: &Demand, plan: &Plan) -> anyhow::Result<()> {
        for victim in &plan.victims {
            if let VictimMeans::Move { node, devices, .. } = victim.means
                && let Some(spec) = self.cluster.instance(victim.instance).copied()
            {
                self.start(spec.model, node, devices)?;
            }
            self.end(victim.instance)?;
        }
        self.start(demand.model, plan.node, plan.devices)?;
        let until = self.now + plan.terms.queue + plan.terms.copy;
        self.cluster.set_queues(plan.node, Duration::ZERO, until, [])?;
        Ok(())
    }

    /// What happens between decisions: the last starts are ready, some streams begin and end, and who has been idle goes
    /// until a tenth of what fits is free.
    fn go_on(&mut self) -> anyhow::Result<()> {
        self.now += Duration::from_millis(1);
        let gone = |id: &InstanceId, cluster: &Cluster| cluster.instance(*id).is_none();
        // Victims, wherever they are in the list.
        let first_new = self.alive.len().saturating_sub(16);
        for at in first_new..self.alive.len() {
            let is_new =
                self.cluster.instance(self.alive[at]).is_some_and(|i| i.activity == Activity::Starting);
            if is_new {
                self.become_ready(at)?;
            }
        }
        let mut tries = 0;
        while tries < 4 || (self.is_too_full() && tries < 10_000) {
            tries += 1;
            let at = self.random.random_range(0..self.alive.len());
            let id = self.alive[at];
            if gone(&id, &self.cluster) {
                self.alive.swap_remove(at);
                continue;
            }
            let is_idle = self.cluster.instance(id).is_some_and(|i| i.activity == Activity::Idle);
            if is_idle && self.is_too_full() {
                self.end(id)?;
                self.alive.swap_remove(at);
            } else {
                self.become_ready(at)?;
            }
        }
        Ok(())
    }
}

fn measure(args: &BenchScheduleArgs, models: u32) -> anyhow::Result<Report> {
    let mut world = World::new(args, models)?;
    let judgement = Judgement { migrate: !args.no_migration, ..Judgement::default() };
    let (instances, fill) = (world.alive.len(), world.share_used());
    let mut times = Vec::new();
    let mut by_victims: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    let mut gaps = Vec::new();
    let mut starts = Vec::new();
    let (mut with_migration, mut refused) = (0_u32, 0_u32);
    for _ in 0..args.decisions {
        let demand = world.demand(&judgement);
        let begun = clock::now();
        let decided = place(&world.cluster, &demand, Policy::StartupTime, &judgement, world.now);
        if let Ok(plan) = &decided {
            world.apply(&demand, plan)?;
        }
        let took = begun.elapsed().as_secs_f64() * 1e6;
        times.push(took);
        match decided {
            Ok(plan) => {
                by_victims[usize::from(!plan.victims.is_empty())].push(took);
                let is_move =
                    |v: &stoker_scheduler::placement::Victim| matches!(v.means, VictimMeans::Move { .. });
                with_migration += u32::from(plan.victims.iter().any(is_move));
                if plan.effort.cut_short {
                    gaps.push(plan.gap().as_secs_f64() * 1e3);
                }
                starts.push(plan.terms.total.as_secs_f64() * 1e3);
            }
            Err(_) => refused += 1,
        }
        world.go_on()?;
    }
    let spread = |values: &[f64]| (!values.is_empty()).then(|| Spread::of(values.iter().copied()));
    let all = f64::from(args.decisions.max(1));
    #[expect(clippy::cast_precision_loss, reason = "a count of decisions")]
    let share = |count: usize| count as f64 / all;
    Ok(Report {
        nodes: args.nodes,
        gpus: args.nodes * DEVICES,
        models,
        instances,
        fill,
        decisions: args.decisions,
        seed: args.seed,
        decisions_per_s: 1e6 * all / times.iter().sum::<f64>(),
        decision_us: Spread::of(times),
        without_victims_us: spread(&by_victims[0]),
        with_victims_us: spread(&by_victims[1]),
        share_with_victims: share(by_victims[1].len()),
        share_with_migration: f64::from(with_migration) / all,
        share_cut_short: share(gaps.len()),
        share_refused: f64::from(refused) / all,
        gap_ms: spread(&gaps),
        start_ms: Spread::of(starts),
        resident_bytes: resident()?,
    })
}

/// Memory of this process that is in use, as the kernel counts it.
fn resident() -> anyhow::Result<ByteSize> {
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix("kB")).context("no VmRSS in /proc/self/status")?;
    Ok(ByteSize::kib(kib.trim().parse()?))
}

/// Runs the bench. `models`: what the command line says of `--models`, which everywhere else is a directory.
pub(crate) fn run(
    args: &BenchScheduleArgs,
    models: Option<&std::path::Path>,
    output: Output,
) -> anyhow::Result<()> {
    let models = match models {
        None => MODELS,
        Some(count) => {
            let wrong = || format!("`--models {}` is not a number of models", count.display());
            count.to_str().and_then(|count| count.parse().ok()).with_context(wrong)?
        }
    };
    ensure!(args.nodes > 0 && models > 0 && args.decisions > 0, "there must be nodes, models and decisions");
    let report = measure(args, models)?;
    output.show(&report, |report| {
        let mut table = Table::new(["DECISIONS", "SHARE", "MEDIAN", "P99", "LONGEST"]);
        let us = |us: f64| format!("{us:.1} us");
        let mut row = |what: &str, share: f64, spread: Option<Spread>| {
            if let Some(s) = spread {
                table.row([what.into(), format!("{:.0} %", share * 100.0), us(s.p50), us(s.p99), us(s.max)]);
            }
        };
        row("all", 1.0, Some(report.decision_us));
        row("without victims", 1.0 - report.share_with_victims, report.without_victims_us);
        row("with victims", report.share_with_victims, report.with_victims_us);
        let gap = report.gap_ms.map_or_else(
            || "all proved the best".to_owned(),
            |gap| {
                format!(
                    "{:.1} % not proved the best: by at most {:.0} ms (median), {:.0} ms (p99)",
                    report.share_cut_short * 100.0,
                    gap.p50,
                    gap.p99
                )
            },
        );
        format!(
            "{} nodes, {} GPUs ({:.0} % of their memory in use), {} models, {} instances, seed {}\n{}\
             {:.0} decisions/s; {:.1} % take streams elsewhere; {gap}; memory {}",
            report.nodes,
            report.gpus,
            report.fill * 100.0,
            report.models,
            report.instances,
            report.seed,
            table.render(),
            report.decisions_per_s,
            report.share_with_migration * 100.0,
            report.resident_bytes,
        )
    })
}
