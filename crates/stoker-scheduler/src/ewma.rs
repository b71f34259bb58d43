//! A moving average of a positive quantity that one odd measurement can't spoil.

use std::time::Duration;

/// Exponentially weighted mean and spread of the logarithm of a positive quantity.
///
/// A measurement further from the mean than three spreads counts as three spreads: one slow load (a disk that
/// another program used) moves the mean little. The spread itself grows with every such measurement, so a lasting
/// change is followed after a handful of them. In logarithms because rates and times err by factors: twice as fast
/// and twice as slow are equally far off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Robust {
    mean_ln: f64,
    spread_ln: f64,
    samples: u32,
    measured_at: Duration,
}

// === impl Robust ===

impl Robust {
    /// Weight of the newest measurement once there are several; earlier ones weigh `1/n`.
    const GAIN_MIN: f64 = 0.2;
    /// Spread assumed after one measurement, and the least that clipping uses: about 10 %.
    const SPREAD_MIN: f64 = 0.1;
    const SPREAD_FIRST: f64 = 0.3;
    const CLIP_SPREADS: f64 = 3.0;

    /// Begins with one measurement; `None` when it is not positive and finite.
    #[must_use]
    pub fn first(value: f64, at: Duration) -> Option<Self> {
        (value.is_finite() && value > 0.0).then(|| Self {
            mean_ln: value.ln(),
            spread_ln: Self::SPREAD_FIRST,
            samples: 1,
            measured_at: at,
        })
    }

    /// Takes a measurement in. One that is not positive and finite is no measurement and is ignored.
    pub fn observe(&mut self, value: f64, at: Duration) {
        if !(value.is_finite() && value > 0.0) {
            return;
        }
        self.samples = self.samples.saturating_add(1);
        self.measured_at = self.measured_at.max(at);
        let gain = (1.0 / f64::from(self.samples)).max(Self::GAIN_MIN);
        let off = value.ln() - self.mean_ln;
        let limit = Self::CLIP_SPREADS * self.spread_ln.max(Self::SPREAD_MIN);
        self.mean_ln += gain * off.clamp(-limit, limit);
        self.spread_ln += gain * (off.abs().min(2.0 * limit) - self.spread_ln);
    }

    /// The average.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.mean_ln.exp()
    }

    /// When the newest measurement was taken in.
    #[must_use]
    pub const fn measured_at(&self) -> Duration {
        self.measured_at
    }

    /// Takes a measurement into an average that may not have begun.
    pub(crate) fn observe_into(slot: &mut Option<Self>, value: f64, at: Duration) {
        match slot {
            Some(robust) => robust.observe(value, at),
            None => *slot = Self::first(value, at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::ZERO;

    fn after(values: &[f64]) -> f64 {
        let mut robust = Robust::first(values[0], AT).unwrap();
        for value in &values[1..] {
            robust.observe(*value, AT);
        }
        robust.value()
    }

    #[test]
    fn one_outlier_moves_little_and_a_lasting_change_is_followed() {
        let steady = [1.0e9; 20];
        assert!((after(&steady) / 1.0e9 - 1.0).abs() < 1e-9);
        let mut outlier = steady.to_vec();
        outlier.push(1.0e7);
        let moved = after(&outlier) / 1.0e9;
        assert!(moved > 0.9, "one load a hundred times slower moved the mean to {moved}");
        let mut change = steady.to_vec();
        change.extend([1.0e8; 25]);
        let moved = after(&change) / 1.0e8;
        assert!((0.9..1.2).contains(&moved), "after 25 slow loads the mean is {moved} of the new rate");
    }

    #[test]
    fn what_is_no_measurement_is_ignored() {
        for odd in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Robust::first(odd, AT).is_none());
            assert!((after(&[5.0, odd]) - 5.0).abs() < 1e-9);
        }
    }
}
