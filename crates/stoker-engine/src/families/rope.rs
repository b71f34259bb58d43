//! Rotary frequencies of a configuration, checked.

use stoker_checkpoint::{Rope, RopeScaling};

use crate::{EngineError, kernels::inverse_frequencies};

/// Angle per position of each pair of dimensions, `[dims / 2]`, radians; `divisors` is a GGUF's `rope_freqs` tensor.
pub(crate) fn frequencies(rope: &Rope, divisors: Option<&[f32]>) -> Result<Vec<f32>, EngineError> {
    let config = |what: String| Err(EngineError::Config { what });
    if rope.dims == 0 || !rope.dims.is_multiple_of(2) {
        return config(format!("rotary dimensions come in pairs, not {}", rope.dims));
    }
    let positive = |value: f32| value.is_finite() && value > 0.0;
    if !positive(rope.theta) {
        return config(format!("rope theta is {}", rope.theta));
    }
    let right = match rope.scaling {
        None => true,
        Some(RopeScaling::Linear { factor }) => positive(factor),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
            positive(factor)
                && positive(low_freq_factor)
                && high_freq_factor > low_freq_factor
                && original_context > 0
        }
    };
    if !right {
        return config(format!("rope scaling {:?}", rope.scaling));
    }
    if let Some(divisor) = divisors.into_iter().flatten().find(|divisor| !positive(**divisor)) {
        return config(format!("a rope frequency is divided by {divisor}"));
    }
    Ok(inverse_frequencies(rope, divisors))
}

#[cfg(test)]
mod tests {
    use stoker_checkpoint::RopeLayout;

    use super::*;

    fn rope(scaling: Option<RopeScaling>) -> Rope {
        Rope { theta: 10_000.0, dims: 8, layout: RopeLayout::Halves, scaling }
    }

    #[test]
    fn llama3_leaves_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 128,
        };
        let scaled = frequencies(&rope(Some(scaling)), None).unwrap();
        // 128 * 0.1 / 2 pi = 2.037 turns: a smooth of 0.3457.
        let expected = [1.0, 0.6543 * 0.1 / 8.0 + 0.3457 * 0.1, 0.01 / 8.0, 0.001 / 8.0];
        for (found, expected) in scaled.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-3, "{scaled:?}");
        }
    }

    #[test]
    fn what_can_not_be_computed_is_refused() {
        let wrong = [
            Rope { dims: 7, ..rope(None) },
            Rope { dims: 0, ..rope(None) },
            Rope { theta: f32::NAN, ..rope(None) },
            rope(Some(RopeScaling::Linear { factor: 0.0 })),
            rope(Some(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 4.0,
                high_freq_factor: 4.0,
                original_context: 128,
            })),
        ];
        for rope in wrong {
            assert!(matches!(frequencies(&rope, None), Err(EngineError::Config { .. })), "{rope:?}");
        }
        assert!(frequencies(&rope(None), Some(&[1.0, 0.0, 1.0, 1.0])).is_err());
        assert!(frequencies(&rope(None), Some(&[1.0, 2.0, 1.0, 1.0])).is_ok());
    }
}
