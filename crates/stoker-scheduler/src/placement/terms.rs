//! What a start on one server takes, term by term.

use std::time::Duration;

use super::cluster::{Cluster, DeviceSet, Link, ModelSpec, NodeState, Residency};

/// Times inside a decision. Integers: their order is total, and a sum doesn't depend on the order of its terms.
pub(super) type Micros = u64;

/// Longer than anything that is worth waiting for; sums of a few stay below overflow.
pub(super) const NEVER: Micros = 1 << 60;

/// A start, from the decision to the first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Terms {
    /// Until its memory is free.
    pub wait: Duration,
    /// Behind loads that were ordered before, on the way that takes the longest.
    pub queue: Duration,
    /// Bytes crossing that way.
    pub copy: Duration,
    /// The worker's work for a new model.
    pub init: Duration,
    /// The prompt.
    pub prefill: Duration,
    /// Until the first token. Not the sum: ways overlap with each other, and prefill with the copy where the model can.
    pub total: Duration,
}

/// The ways to one set of devices, before anything is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// From a remote store, from SSD, to the devices.
    ways: [Way; 3],
    init: Micros,
    last_layer: Micros,
    prefill: Micros,
    overlaps: bool,
}

/// A way that bytes cross, or several at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Way {
    /// The longest copy alone.
    time: Micros,
    /// When the last is through, behind whoever is ahead.
    through: Micros,
}

/// Bytes of a model that cross each of a server's ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Crossing {
    pub(super) remote: u64,
    pub(super) ssd: u64,
}

pub(super) fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_micros()).unwrap_or(NEVER).min(NEVER)
}

pub(super) const fn duration(time: Micros) -> Duration {
    Duration::from_micros(time)
}

/// `amount` times `per_unit`, rounded up.
pub(super) fn transfer(amount: u64, per_unit: f64) -> Micros {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let time = (amount as f64 * per_unit).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "clamped; not a number is never"
    )]
    let time = if time < NEVER as f64 { time.max(0.0) as Micros } else { NEVER };
    time
}

// === impl Crossing ===

impl Crossing {
    pub(super) fn of(spec: &ModelSpec, held: Residency) -> Self {
        let all = spec.weight_bytes.bytes();
        let dram = held.dram.bytes().min(all);
        let below = held.ssd.bytes().min(all).max(dram);
        Self { remote: all - below, ssd: below - dram }
    }
}

// === impl Way ===

impl Way {
    fn add(&mut self, link: &Link, bytes: u64, now: Micros) {
        if bytes > 0 {
            let time = link.time(bytes);
            self.time = self.time.max(time);
            self.through = self.through.max(link.queue(now) + time);
        }
    }

    /// When all bytes are across that don't begin before `wait`.
    fn copied(&self, wait: Micros) -> Micros {
        (wait + self.time).max(self.through)
    }
}

// === impl Load ===

impl Load {
    /// A load of `spec` to `devices` of `node`, which has `held` of it.
    pub(super) fn new(
        node: &NodeState,
        devices: DeviceSet,
        spec: &ModelSpec,
        held: Residency,
        prompt_tokens: u64,
        now: Micros,
    ) -> Self {
        let mut ways = [Way::default(); 3];
        if held.devices != devices || devices.is_empty() {
            let crossing = Crossing::of(spec, held);
            ways[0].add(&node.remote, crossing.remote, now);
            ways[1].add(&node.ssd, crossing.ssd, now);
            for device in devices.iter() {
                ways[2].add(&node.devices[device.0 as usize].link, spec.share(), now);
            }
        }
        Self {
            ways,
            init: micros(spec.init),
            last_layer: transfer(micros(spec.last_layer), node.slowness),
            prefill: prefill(node, spec, prompt_tokens),
            overlaps: spec.overlaps,
        }
    }

    /// How long its bytes take when nobody is ahead: what another load on the same server waits for behind it.
    pub(super) fn alone(&self) -> Micros {
        self.ways.iter().map(|way| way.time).max().unwrap_or(0)
    }

    /// Until the first token, when the memory is free after `wait`. Grows with `wait`.
    pub(super) fn total(&self, wait: Micros) -> Micros {
        let copied = self.copied(wait);
        let computed = if self.overlaps {
            (copied + self.last_layer).max(wait + self.prefill)
        } else {
            copied + self.prefill.max(self.last_layer)
        };
        (computed + self.init).min(NEVER)
    }

    /// Until it is ready to take over: what a migration's destination needs.
    pub(super) fn ready(&self) -> Micros {
        (self.copied(0) + self.init).min(NEVER)
    }

    fn copied(&self, wait: Micros) -> Micros {
        self.ways.iter().map(|way| way.copied(wait)).max().unwrap_or(wait)
    }

    pub(super) fn terms(&self, wait: Micros) -> Terms {
        let slowest = self.ways.iter().copied().max_by_key(|way| way.copied(wait)).unwrap_or_default();
        Terms {
            wait: duration(wait),
            queue: duration(slowest.copied(wait) - wait - slowest.time),
            copy: duration(slowest.time),
            init: duration(self.init),
            prefill: duration(self.prefill),
            total: duration(self.total(wait)),
        }
    }
}

/// Computing so many tokens of a prompt on one of a server's devices.
pub(super) fn prefill(node: &NodeState, spec: &ModelSpec, tokens: u64) -> Micros {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let per_token = spec.per_token.as_nanos() as f64 / 1e3 * node.slowness;
    transfer(tokens, per_token)
}

/// Until a destination that is ready has taken `tokens` over: `a (t_in + t_out) + b`.
pub(super) fn resume(node: &NodeState, spec: &ModelSpec, tokens: u64) -> Micros {
    prefill(node, spec, tokens) + micros(spec.resume_fixed)
}

impl Cluster {
    /// How long a start on these devices would take if their memory were free: what `explain` shows of servers that were
    /// not chosen. `None` for what isn't known.
    #[must_use]
    pub fn terms(
        &self,
        node: super::NodeKey,
        devices: DeviceSet,
        model: crate::residency::ModelKey,
        prompt_tokens: u32,
        now: Duration,
    ) -> Option<Terms> {
        let state = self.node(node)?;
        let spec = &self.models.get(&model)?.spec;
        let known = devices.iter().all(|device| (device.0 as usize) < state.devices.len());
        known.then(|| {
            let held = self.residency(node, model);
            Load::new(state, devices, spec, held, u64::from(prompt_tokens), micros(now)).terms(0)
        })
    }
}
