//! Which chunk of the memory tier goes first.
//!
//! Chunks are all of one size, so what counts is what it would cost to have a chunk gone: how likely it is to be
//! wanted soon, times how long it takes to bring back, weighted by where it lies in its model. Likelihood is a count
//! of uses that halves with time, which ages frequency as GDSF's clock does (Cherkasova 1998) without being tied to
//! the rate of evictions.

use std::time::Duration;

use stoker_types::{ByteSize, BytesPerSec, Tier};

/// Idle time in which past use comes to count half.
pub const HALF_LIFE: Duration = Duration::from_mins(10);

/// How much more a model's first chunk is worth than its last. While weights load in execution order, the head of a
/// model hides the loading of the rest: a model whose head is there starts computing at once. Not larger, for as long
/// as weights only count when they are there whole, chunks that are wanted more often bring more.
pub const HEAD_BONUS: f64 = 0.5;

/// How much something has been used of late.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Heat {
    uses: f64,
    at: Duration,
}

/// Measured rates of what is below memory, for one model: its disk's, and its remote store's. `None`: not measured yet.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TierRates {
    /// Reads from SSD.
    pub ssd: Option<BytesPerSec>,
    /// Reads from its remote store.
    pub remote: Option<BytesPerSec>,
}

/// What is known of a chunk that could go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkFacts {
    /// Recent use of its model, from [`Heat::at`].
    pub heat: f64,
    /// Time to bring it back, from the tier below it at that tier's measured rate.
    pub reload: Duration,
    /// Its place in its model, in execution order.
    pub position: u32,
    /// Chunks of the model.
    pub of: u32,
}

// === impl Heat ===

impl Heat {
    /// So many recent uses, as of `at`.
    #[must_use]
    pub const fn of(uses: f64, at: Duration) -> Self {
        Self { uses, at }
    }

    /// Counts a use at `now`. Times are measured from any fixed moment.
    pub fn touch(&mut self, now: Duration) {
        self.uses = self.at(now) + 1.0;
        self.at = now;
    }

    /// Uses up to `now`, each halved for every [`HALF_LIFE`] since.
    #[must_use]
    pub fn at(&self, now: Duration) -> f64 {
        let idle = now.saturating_sub(self.at);
        self.uses * (-idle.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }
}

// === impl TierRates ===

impl TierRates {
    /// Time to bring so many bytes back from a tier at its measured rate. One that hasn't been measured counts as the
    /// slowest that has: nothing says that it is slower or faster. Before any measurement all cost the same.
    #[must_use]
    pub fn reload(&self, from: Tier, bytes: ByteSize) -> Duration {
        let measured = match from {
            Tier::Remote => self.remote,
            _ => self.ssd,
        };
        let slowest = || [self.ssd, self.remote].into_iter().flatten().min_by(|a, b| a.0.total_cmp(&b.0));
        measured.or_else(slowest).map_or(Duration::from_secs(1), |rate| bytes.at(rate))
    }
}

// === impl ChunkFacts ===

impl ChunkFacts {
    /// What keeping the chunk is worth, in expected seconds of loading saved: the chunk with the lowest goes first.
    /// Finite and not negative for any facts whose heat is. Falls with the position, all else equal, so a model goes
    /// from its end.
    #[must_use]
    pub fn keep_score(&self) -> f64 {
        let place = f64::from(self.position.min(self.of)) / f64::from(self.of.max(1));
        // A day is longer than any reload, and keeps an unmeasured tier's `Duration::MAX` comparable.
        let reload = self.reload.as_secs_f64().clamp(1e-6, 86_400.0);
        self.heat * reload * (1.0 + HEAD_BONUS * (1.0 - place))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn facts(heat: f64, position: u32) -> ChunkFacts {
        ChunkFacts { heat, reload: Duration::from_millis(10), position, of: 10 }
    }

    #[test]
    fn heat_halves_and_adds_up() {
        let mut heat = Heat::default();
        assert!(heat.at(HALF_LIFE) == 0.0);
        heat.touch(Duration::from_secs(5));
        assert!((heat.at(Duration::from_secs(5)) - 1.0).abs() < 1e-9);
        assert!((heat.at(Duration::from_secs(5) + HALF_LIFE) - 0.5).abs() < 1e-9);
        heat.touch(Duration::from_secs(5) + HALF_LIFE);
        assert!((heat.at(Duration::from_secs(5) + HALF_LIFE) - 1.5).abs() < 1e-9);
        assert!(heat.at(Duration::ZERO) <= 1.5, "a clock that goes back does no harm");
    }

    #[test]
    fn tails_before_heads_and_cold_before_warm() {
        assert!(facts(1.0, 9).keep_score() < facts(1.0, 0).keep_score());
        assert!(
            facts(0.1, 0).keep_score() < facts(1.0, 9).keep_score(),
            "much colder: even its head goes first"
        );
        assert!(
            facts(1.0, 9).keep_score() < facts(0.9, 0).keep_score(),
            "a little colder: its head stays longer"
        );
    }

    #[test]
    fn what_costs_more_to_bring_back_stays() {
        let slow = ChunkFacts { reload: Duration::from_secs(1), ..facts(1.0, 5) };
        assert!(facts(1.0, 5).keep_score() < slow.keep_score());
    }

    const CHUNK: ByteSize = ByteSize::mib(16);

    fn rates(ssd: Option<f64>, remote: Option<f64>) -> TierRates {
        TierRates { ssd: ssd.map(BytesPerSec), remote: remote.map(BytesPerSec) }
    }

    fn from(tier: Tier, heat: f64, rates: TierRates) -> f64 {
        ChunkFacts { reload: rates.reload(tier, CHUNK), ..facts(heat, 5) }.keep_score()
    }

    #[test]
    fn what_is_only_remote_is_as_much_dearer_as_its_store_is_slower() {
        let slow = rates(Some(2e9), Some(1e8));
        assert!(from(Tier::Ssd, 1.0, slow) < from(Tier::Remote, 1.0, slow));
        // Twenty times slower: kept until it is twenty times colder.
        assert!(from(Tier::Ssd, 1.0, slow) < from(Tier::Remote, 0.06, slow));
        assert!(from(Tier::Remote, 0.04, slow) < from(Tier::Ssd, 1.0, slow));
        // A store that is faster than the disk is the cheaper one: the rates decide, not the tier's name.
        let fast = rates(Some(1e9), Some(4e9));
        assert!(from(Tier::Remote, 1.0, fast) < from(Tier::Ssd, 1.0, fast));
    }

    #[test]
    fn what_was_not_measured_is_not_made_up() {
        for rates in [rates(None, None), rates(Some(1e9), None), rates(None, Some(1e9))] {
            let (ssd, remote) = (rates.reload(Tier::Ssd, CHUNK), rates.reload(Tier::Remote, CHUNK));
            assert_eq!(ssd, remote, "{rates:?}");
        }
    }

    proptest! {
        #[test]
        fn a_slower_store_never_makes_a_chunk_cheaper(ssd in 1e3_f64..1e12, remote in 1e3_f64..1e12, slower in 1.0_f64..1e3) {
            let (now, then) = (rates(Some(ssd), Some(remote)), rates(Some(ssd), Some(remote / slower)));
            prop_assert!(from(Tier::Remote, 1.0, now) <= from(Tier::Remote, 1.0, then));
            prop_assert!(from(Tier::Ssd, 1.0, now) == from(Tier::Ssd, 1.0, then));
        }

        #[test]
        fn a_model_goes_from_its_end(heat in 0.001_f64..1e6, ms in 0_u64..1_000_000, of in 1_u32..10_000, at in 0.0_f64..1.0) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a count")]
            let position = (f64::from(of - 1) * at) as u32;
            let chunk = |position| ChunkFacts { heat, reload: Duration::from_millis(ms), position, of };
            prop_assert!(chunk(position).keep_score().is_finite());
            prop_assert!(chunk(position + 1).keep_score() < chunk(position).keep_score());
        }

        #[test]
        fn any_facts_have_a_score(heat in 0.0_f64..1e12, position: u32, of: u32) {
            let score = ChunkFacts { heat, reload: Duration::MAX, position, of }.keep_score();
            prop_assert!(score.is_finite() && score >= 0.0);
        }
    }
}
