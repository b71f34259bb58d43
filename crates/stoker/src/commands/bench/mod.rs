//! `stoker bench`: what things cost, beside their limit, in one run. Every subcommand prints one JSON object with
//! `--json`; rates are `rate_bytes_per_s`, `limit_bytes_per_s`, `percent_of_limit`, times `*_ms` or `*_us` with `p50`
//! and `p99`.

pub(crate) mod ablation;
pub(crate) mod cold;
pub(crate) mod engine;
pub(crate) mod from_remote;
pub(crate) mod load;
pub(crate) mod overhead;
mod plot;
pub(crate) mod restart;
pub(crate) mod schedule;
mod synth;
mod to_device;

use std::time::Duration;

use serde::Serialize;

/// A distribution's figures, in the unit of the field that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "an index into a list of measurements"
            )]
            let index = (share * (sorted.len().saturating_sub(1)) as f64).round() as usize;
            sorted.get(index).copied().unwrap_or(f64::NAN)
        };
        Self { p50: at(0.5), p99: at(0.99), min: at(0.0), max: at(1.0) }
    }

    pub(crate) fn ms(times: &[Duration]) -> Self {
        Self::of(times.iter().map(|t| t.as_secs_f64() * 1e3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let spread = Spread::of((1..=101).rev().map(f64::from));
        assert_eq!(spread, Spread { p50: 51.0, p99: 100.0, min: 1.0, max: 101.0 });
        assert_eq!(Spread::of([2.0]).p99, 2.0);
    }
}
