//! How long a start takes: queue, the slowest tier, init, prefill; fitted by every start that was measured.
//!
//! `start = room + queue + max over tiers (bytes / rate) + init + prefill`, after section 6.1 of the ServerlessLLM
//! paper (`q + n/b`). Tiers overlap, so the slowest counts.

use std::{collections::BTreeMap, fmt, time::Duration};

use stoker_types::{ByteSize, BytesPerSec, ModelName, Phase, Tier};

use crate::ewma::Robust;

/// What is assumed before anything was measured. Optimistic on purpose: refusals on assumptions alone should be
/// those that no machine could serve in time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Priors {
    /// From a remote source.
    pub remote: BytesPerSec,
    /// From SSD.
    pub ssd: BytesPerSec,
    /// Mapping chunks that are in memory.
    pub dram: BytesPerSec,
    /// DRAM to a device.
    pub link: BytesPerSec,
    /// The worker building its view of a model.
    pub init: Duration,
    /// Forward pass of one prompt token over one byte of weights, in picoseconds.
    pub prefill_ps: f64,
}

/// How weights get from DRAM to where they are computed with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Hop {
    /// They are mapped where they are. How fast that is, the model's own starts have shown.
    Map,
    /// They are copied to a device.
    Copy {
        /// Those that aren't there yet.
        bytes: ByteSize,
        /// The measured rate of the device's link.
        rate: Option<BytesPerSec>,
    },
}

/// What one start has to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadNeed<'a> {
    /// Which model.
    pub model: &'a ModelName,
    /// All of its weights.
    pub weight_bytes: ByteSize,
    /// Those that come from a remote source.
    pub remote_bytes: ByteSize,
    /// Those that come from SSD.
    pub ssd_bytes: ByteSize,
    /// The last hop.
    pub hop: Hop,
    /// Prompt of the request that waits, in tokens; 0 when nobody does.
    pub prompt_tokens: u32,
}

/// Loads that were ordered before and use the same links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ahead {
    /// How many.
    pub loads: u32,
    /// Bytes that they still have to read from SSD.
    pub ssd_bytes: ByteSize,
}

/// What a term rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// Nothing was measured yet.
    Prior,
    /// Measured within [`Estimator::FRESH`].
    Fresh,
    /// Measured, but longer ago.
    Stale,
}

/// Bytes that cross a tier.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CopyTerm {
    /// The tier they come from; [`Tier::Device`]: from DRAM over the device's link.
    pub tier: Tier,
    /// How many.
    pub bytes: ByteSize,
    /// How fast.
    pub rate: BytesPerSec,
    /// So how long.
    pub time: Duration,
    /// Where the rate is from.
    pub basis: Basis,
}

/// An estimate, term by term. Prints as "SSD 98 MB at 1.6 GB/s + 2 ahead = 0.1 s".
#[derive(Debug, Clone, PartialEq)]
pub struct StartEstimate {
    /// Until there is room.
    pub room: Duration,
    /// Behind loads ahead on the same links.
    pub queue: Duration,
    /// Loads ahead.
    pub ahead: u32,
    /// Every tier that bytes cross.
    pub copies: Vec<CopyTerm>,
    /// The worker's view of the model.
    pub init: Duration,
    /// The prompt's forward pass.
    pub prefill: Duration,
    /// No start is faster than this, as far as is known: terms that rest on old measurements are replaced by the
    /// assumption where that is faster. Without it, one slow hour could have every request refused, and nothing
    /// would ever be measured again.
    ready_at_least: Duration,
}

/// Start parameters of this server, learnt online. Pure: times are arguments, as durations since any fixed moment.
#[derive(Debug, Clone)]
pub struct Estimator {
    priors: Priors,
    remote: Option<Robust>,
    ssd: Option<Robust>,
    /// Of all models together, for those that were never started.
    shared: ModelRates,
    models: BTreeMap<ModelName, ModelRates>,
}

#[derive(Debug, Clone, Copy, Default)]
struct ModelRates {
    /// Bytes a second.
    dram: Option<Robust>,
    /// Seconds.
    init: Option<Robust>,
    /// Seconds per token and byte of weights.
    prefill: Option<Robust>,
}

// === impl Priors ===

impl Default for Priors {
    fn default() -> Self {
        Self {
            remote: BytesPerSec(1.0e9),
            ssd: BytesPerSec(3.0e9),
            dram: BytesPerSec(1.0e12),
            link: BytesPerSec(50.0e9),
            init: Duration::from_millis(5),
            prefill_ps: 10.0,
        }
    }
}

// === impl Estimator ===

impl Estimator {
    /// How long a measurement counts as today's.
    pub const FRESH: Duration = Duration::from_mins(1);
    /// Models remembered one by one; the others share an average.
    pub const MODELS_MAX: usize = 16_384;

    /// Nothing measured yet.
    #[must_use]
    pub const fn new(priors: Priors) -> Self {
        Self {
            priors,
            remote: None,
            ssd: None,
            shared: ModelRates { dram: None, init: None, prefill: None },
            models: BTreeMap::new(),
        }
    }

    /// `bytes` of `model` came from `tier` in `time`.
    pub fn observe_copy(
        &mut self,
        tier: Tier,
        model: &ModelName,
        bytes: ByteSize,
        time: Duration,
        now: Duration,
    ) {
        let rate = BytesPerSec::of(bytes, time).0;
        match tier {
            Tier::Remote => Robust::observe_into(&mut self.remote, rate, now),
            Tier::Ssd => Robust::observe_into(&mut self.ssd, rate, now),
            Tier::Dram | Tier::Device => self.observe(model, rate, now, |rates| &mut rates.dram),
        }
    }

    /// A worker built its view of `model` in `time`.
    pub fn observe_init(&mut self, model: &ModelName, time: Duration, now: Duration) {
        self.observe(model, time.as_secs_f64(), now, |rates| &mut rates.init);
    }

    /// A prompt of `tokens` passed through `model` in `time`.
    pub fn observe_prefill(
        &mut self,
        model: &ModelName,
        weight_bytes: ByteSize,
        tokens: u32,
        time: Duration,
        now: Duration,
    ) {
        let passes = f64::from(tokens) * to_f64(weight_bytes.bytes());
        if passes > 0.0 {
            self.observe(model, time.as_secs_f64() / passes, now, |rates| &mut rates.prefill);
        }
    }

    /// The measured rate from a remote source, if there is one.
    #[must_use]
    pub fn remote_rate(&self) -> Option<BytesPerSec> {
        self.remote.map(|robust| BytesPerSec(robust.value()))
    }

    /// The measured rate from SSD, if there is one.
    #[must_use]
    pub fn ssd_rate(&self) -> Option<BytesPerSec> {
        self.ssd.map(|robust| BytesPerSec(robust.value()))
    }

    /// How long a start takes. `room` is how long the memory for it is still taken.
    #[must_use]
    pub fn start(&self, need: &LoadNeed<'_>, ahead: &Ahead, room: Duration, now: Duration) -> StartEstimate {
        let own = self.models.get(need.model).copied().unwrap_or_default();
        let last = match need.hop {
            Hop::Map => (Tier::Dram, need.weight_bytes, own.dram.or(self.shared.dram), self.priors.dram.0),
            // The store measures it as it copies.
            Hop::Copy { bytes, rate } => {
                (Tier::Device, bytes, rate.and_then(|rate| Robust::first(rate.0, now)), self.priors.link.0)
            }
        };
        let rates = [
            (Tier::Remote, need.remote_bytes, self.remote, self.priors.remote.0),
            (Tier::Ssd, need.ssd_bytes, self.ssd, self.priors.ssd.0),
            last,
        ];
        let mut copies = Vec::with_capacity(rates.len());
        let mut copy_at_least = Duration::ZERO;
        let mut queue = Duration::ZERO;
        let mut queue_at_least = Duration::ZERO;
        for (tier, bytes, measured, prior) in rates {
            let (rate, basis) = known(measured, prior, now);
            let fast = BytesPerSec(if basis == Basis::Stale { rate.max(prior) } else { rate });
            let rate = BytesPerSec(rate);
            if tier == Tier::Ssd && ahead.ssd_bytes > ByteSize::ZERO {
                queue = ahead.ssd_bytes.at(rate);
                queue_at_least = ahead.ssd_bytes.at(fast);
            }
            if bytes > ByteSize::ZERO {
                copies.push(CopyTerm { tier, bytes, rate, time: bytes.at(rate), basis });
                copy_at_least = copy_at_least.max(bytes.at(fast));
            }
        }
        let init_prior = self.priors.init.as_secs_f64();
        let (init, basis) = known(own.init.or(self.shared.init), init_prior, now);
        let init_at_least = if basis == Basis::Stale { init.min(init_prior) } else { init };
        StartEstimate {
            room,
            // Loads that only map have nothing to queue for.
            queue: if need.ssd_bytes > ByteSize::ZERO { queue } else { Duration::ZERO },
            ahead: if need.ssd_bytes > ByteSize::ZERO { ahead.loads } else { 0 },
            copies,
            init: seconds(init),
            prefill: self.prefill(need.model, need.weight_bytes, need.prompt_tokens),
            ready_at_least: room
                .saturating_add(if need.ssd_bytes > ByteSize::ZERO { queue_at_least } else { Duration::ZERO })
                .saturating_add(copy_at_least)
                .saturating_add(seconds(init_at_least)),
        }
    }

    /// How long the forward pass of a prompt of `tokens` takes.
    #[must_use]
    pub fn prefill(&self, model: &ModelName, weight_bytes: ByteSize, tokens: u32) -> Duration {
        let own = self.models.get(model).and_then(|rates| rates.prefill);
        let measured = own.or(self.shared.prefill).map(|robust| robust.value());
        let per_pass = measured.unwrap_or(self.priors.prefill_ps * 1e-12);
        seconds(per_pass * f64::from(tokens) * to_f64(weight_bytes.bytes()))
    }

    fn observe(
        &mut self,
        model: &ModelName,
        value: f64,
        now: Duration,
        field: impl Fn(&mut ModelRates) -> &mut Option<Robust>,
    ) {
        Robust::observe_into(field(&mut self.shared), value, now);
        if let Some(rates) = self.models.get_mut(model) {
            Robust::observe_into(field(rates), value, now);
        } else if self.models.len() < Self::MODELS_MAX {
            let rates = self.models.entry(model.clone()).or_default();
            Robust::observe_into(field(rates), value, now);
        }
    }
}

fn known(measured: Option<Robust>, prior: f64, now: Duration) -> (f64, Basis) {
    match measured {
        None => (prior, Basis::Prior),
        Some(robust) if now.saturating_sub(robust.measured_at()) <= Estimator::FRESH => {
            (robust.value(), Basis::Fresh)
        }
        Some(robust) => (robust.value(), Basis::Stale),
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
const fn to_f64(value: u64) -> f64 {
    value as f64
}

// === impl StartEstimate ===

impl StartEstimate {
    /// The slowest tier, which decides how long the copy takes; `None` when nothing has to be copied.
    #[must_use]
    pub fn slowest(&self) -> Option<&CopyTerm> {
        self.copies.iter().max_by_key(|term| term.time)
    }

    /// From the order until the instance is ready: without waiting for room and without the prompt.
    #[must_use]
    pub fn load(&self) -> Duration {
        let copy = self.slowest().map_or(Duration::ZERO, |term| term.time);
        self.queue.saturating_add(copy).saturating_add(self.init)
    }

    /// From now until the instance is ready.
    #[must_use]
    pub fn ready(&self) -> Duration {
        self.room.saturating_add(self.load())
    }

    /// From now until the first token.
    #[must_use]
    pub fn first_token(&self) -> Duration {
        self.ready().saturating_add(self.prefill)
    }

    /// No start is ready before this, as far as is known: what refusals compare with a deadline.
    #[must_use]
    pub const fn ready_at_least(&self) -> Duration {
        self.ready_at_least
    }

    /// What is expected of one phase, where this estimate has a term for it.
    #[must_use]
    pub fn phase(&self, phase: Phase) -> Option<Duration> {
        let copy = |tier| self.copies.iter().find(|term| term.tier == tier).map(|term| term.time);
        match phase {
            Phase::Queued => Some(self.room),
            Phase::RemoteRead => copy(Tier::Remote),
            Phase::SsdRead => copy(Tier::Ssd).map(|time| time.saturating_add(self.queue)),
            Phase::DeviceCopy => copy(Tier::Dram).or_else(|| copy(Tier::Device)),
            Phase::Init => Some(self.init),
            Phase::Prefill => Some(self.prefill),
            Phase::Scheduled | Phase::Verify | Phase::FirstToken => None,
        }
    }
}

impl fmt::Display for StartEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.room > Duration::ZERO {
            write!(f, "room in {} + ", Seconds(self.room))?;
        }
        match self.slowest() {
            Some(CopyTerm { tier: Tier::Dram, bytes, .. }) => {
                write!(f, "{} in DRAM", Decimal(bytes.bytes()))?;
            }
            Some(term) => {
                let tier = match term.tier {
                    Tier::Remote => "remote",
                    Tier::Device => "to the device",
                    Tier::Ssd | Tier::Dram => "SSD",
                };
                let rate = term.rate.0.clamp(0.0, 1e18);
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped above")]
                let rate = Decimal(rate as u64);
                write!(f, "{tier} {} at {rate}/s", Decimal(term.bytes.bytes()))?;
                if term.basis == Basis::Prior {
                    f.write_str(" (assumed)")?;
                }
            }
            None => f.write_str("nothing to copy")?,
        }
        if self.ahead > 0 {
            write!(f, " + {} ahead", self.ahead)?;
        }
        if self.init >= Duration::from_millis(50) {
            write!(f, " + init {}", Seconds(self.init))?;
        }
        write!(f, " = {}", Seconds(self.ready()))
    }
}

/// Decimal units, as rates have them: "98 MB", "4.1 GB".
struct Decimal(u64);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = to_f64(self.0);
        match self.0 {
            0..1_000_000 => write!(f, "{:.0} kB", value / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.0} MB", value / 1e6),
            _ => write!(f, "{:.1} GB", value / 1e9),
        }
    }
}

/// A time for people: "14 s", "0.1 s", "2 ms".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0.as_secs_f64();
        if value >= 9.95 {
            write!(f, "{value:.0} s")
        } else if value >= 0.05 {
            write!(f, "{value:.1} s")
        } else {
            write!(f, "{:.0} ms", value * 1e3)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> ModelName {
        ModelName::new("m").unwrap()
    }

    fn need(model: &ModelName, ssd_bytes: u64) -> LoadNeed<'_> {
        LoadNeed {
            model,
            weight_bytes: ByteSize(98_000_000),
            remote_bytes: ByteSize::ZERO,
            ssd_bytes: ByteSize(ssd_bytes),
            hop: Hop::Map,
            prompt_tokens: 10,
        }
    }

    #[test]
    fn the_terms_read_as_words() {
        let model = name();
        let mut estimator = Estimator::new(Priors::default());
        estimator.observe_copy(
            Tier::Ssd,
            &model,
            ByteSize(1_600_000_000),
            Duration::from_secs(1),
            Duration::ZERO,
        );
        let ahead = Ahead { loads: 2, ssd_bytes: ByteSize(80_000_000) };
        let estimate = estimator.start(&need(&model, 98_000_000), &ahead, Duration::ZERO, Duration::ZERO);
        assert_eq!(estimate.to_string(), "SSD 98 MB at 1.6 GB/s + 2 ahead = 0.1 s");
        let estimate = estimator.start(&need(&model, 0), &ahead, Duration::from_secs(2), Duration::ZERO);
        assert_eq!(estimate.to_string(), "room in 2.0 s + 98 MB in DRAM = 2.0 s");
        let fresh = Estimator::new(Priors::default()).start(
            &need(&model, 98_000_000),
            &Ahead::default(),
            Duration::ZERO,
            Duration::ZERO,
        );
        assert_eq!(fresh.to_string(), "SSD 98 MB at 3.0 GB/s (assumed) = 38 ms");
    }

    #[test]
    fn a_device_is_reached_over_its_link() {
        let model = name();
        let estimator = Estimator::new(Priors::default());
        let start = |ssd_bytes, bytes, rate: Option<f64>| {
            let hop = Hop::Copy { bytes: ByteSize(bytes), rate: rate.map(BytesPerSec) };
            let need = LoadNeed { hop, ..need(&model, ssd_bytes) };
            estimator.start(&need, &Ahead::default(), Duration::ZERO, Duration::ZERO)
        };
        let copy = start(0, 14_000_000_000, Some(55e9));
        assert_eq!(copy.to_string(), "to the device 14.0 GB at 55.0 GB/s = 0.3 s");
        assert_eq!(copy.phase(Phase::DeviceCopy), copy.slowest().map(|term| term.time));
        let assumed = start(0, 14_000_000_000, None);
        assert_eq!(assumed.to_string(), "to the device 14.0 GB at 50.0 GB/s (assumed) = 0.3 s");
        // The slower of two hops that overlap; and nothing when they are there.
        assert_eq!(start(98_000_000, 98_000_000, Some(55e9)).slowest().unwrap().tier, Tier::Ssd);
        assert_eq!(start(0, 0, Some(55e9)).to_string(), "nothing to copy = 5 ms");
    }

    #[test]
    fn measurements_replace_assumptions_and_old_slow_ones_refuse_nobody() {
        let model = name();
        let mut estimator = Estimator::new(Priors::default());
        let hour = Duration::from_hours(1);
        estimator.observe_copy(
            Tier::Ssd,
            &model,
            ByteSize(98_000_000),
            Duration::from_secs(98),
            Duration::ZERO,
        );
        let at = |now| {
            estimator
                .start(&need(&model, 98_000_000), &Ahead::default(), Duration::ZERO, now)
                .ready_at_least()
        };
        assert!(at(Duration::ZERO) > Duration::from_secs(90));
        assert!(at(hour) < Duration::from_secs(1), "an hour-old measurement is no ground for a refusal");
        let now = estimator.start(&need(&model, 98_000_000), &Ahead::default(), Duration::ZERO, hour);
        assert!(now.ready() > Duration::from_secs(90), "but it is still the best guess");
    }

    #[test]
    fn a_model_that_was_never_started_is_like_the_others() {
        let (known, unknown) = (name(), ModelName::new("other").unwrap());
        let mut estimator = Estimator::new(Priors::default());
        estimator.observe_init(&known, Duration::from_millis(80), Duration::ZERO);
        estimator.observe_prefill(&known, ByteSize(98_000_000), 100, Duration::from_secs(1), Duration::ZERO);
        let estimate = estimator.start(&need(&unknown, 0), &Ahead::default(), Duration::ZERO, Duration::ZERO);
        assert!((estimate.init.as_secs_f64() - 0.08).abs() < 1e-6);
        assert!((estimate.prefill.as_secs_f64() - 0.1).abs() < 1e-6);
    }

    proptest! {
        /// More bytes, more loads ahead, less room or a slower disk never make a start faster; and the bound that
        /// refusals use is never above the estimate.
        #[test]
        fn estimates_are_monotone(
            ssd in 0u64..1 << 40, more in 0u64..1 << 40, ahead in 0u64..1 << 40, room_ms in 0u64..100_000,
            rate in 1u64..1 << 36, age_s in 0u64..1000,
        ) {
            let model = name();
            let now = Duration::from_secs(age_s);
            let mut estimator = Estimator::new(Priors::default());
            estimator.observe_copy(Tier::Ssd, &model, ByteSize(rate), Duration::from_secs(1), Duration::ZERO);
            let room = Duration::from_millis(room_ms);
            let ahead = Ahead { loads: 1, ssd_bytes: ByteSize(ahead) };
            let base = estimator.start(&need(&model, ssd), &ahead, room, now);
            prop_assert!(base.ready_at_least() <= base.ready());
            prop_assert!(base.ready() <= base.first_token());
            let larger = estimator.start(&need(&model, ssd + more), &ahead, room, now);
            prop_assert!(larger.ready() >= base.ready());
            let further = Ahead { loads: 2, ssd_bytes: ahead.ssd_bytes + ByteSize(more) };
            prop_assert!(estimator.start(&need(&model, ssd), &further, room, now).ready() >= base.ready());
            let alone = estimator.start(&need(&model, ssd), &Ahead::default(), Duration::ZERO, now);
            prop_assert!(alone.ready() <= base.ready());
        }
    }
}
