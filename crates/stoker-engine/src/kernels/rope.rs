//! Rotary position embedding.

use stoker_checkpoint::config::{Rope, RopeLayout, RopeScaling};

use super::{isa::versions, share::Shared};
use crate::threads::Threads;

/// Sines and cosines of some rows' positions, computed once a step and used by every layer.
#[derive(Debug, Clone, Default)]
pub struct RopeAngles {
    /// `[rows, pairs]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

/// The angle that each pair of dimensions turns per position, `[dims / 2]`: `theta^(-2i/dims)`, scaled as `rope` says;
/// `factors` (a GGUF's `rope_freqs.weight`) divide them.
///
/// # Panics
/// When there are `factors` but not one for each pair.
#[must_use]
pub fn inverse_frequencies(rope: &Rope, factors: Option<&[f32]>) -> Vec<f32> {
    let pairs = rope.dims as usize / 2;
    if let Some(factors) = factors {
        assert_eq!(factors.len(), pairs, "rope factors don't match the rotated dimensions");
    }
    (0..pairs)
        .map(|i| {
            let exponent = (2 * i) as f32 / rope.dims as f32;
            let plain = 1.0 / rope.theta.powf(exponent);
            let divided = factors.map_or(plain, |factors| plain / factors[i]);
            rope.scaling.map_or(divided, |scaling| scaled(divided, scaling))
        })
        .collect()
}

fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let original = original_context as f32;
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

// === impl RopeAngles ===

impl RopeAngles {
    /// Sets the rows' absolute positions.
    pub fn set(&mut self, inverse_frequencies: &[f32], positions: &[u32]) {
        self.pairs = inverse_frequencies.len();
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for frequency in inverse_frequencies {
                // The product in f32 as the reference implementation has it; the functions in f64.
                let angle = f64::from(*position as f32 * frequency);
                self.cos.push(to_f32(angle.cos()));
                self.sin.push(to_f32(angle.sin()));
            }
        }
    }

    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let at = row * self.pairs;
        (&self.cos[at..][..self.pairs], &self.sin[at..][..self.pairs])
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
fn to_f32(v: f64) -> f32 {
    v as f32
}

/// Turns the first `2 * pairs` dimensions of every head of `x`, `[rows, heads, head_dim]`, in place.
///
/// # Panics
/// When `angles` has fewer rows than `x`, more pairs than fit in a head, or `x` isn't whole rows.
pub fn rope(
    threads: &Threads,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    layout: RopeLayout,
    angles: &RopeAngles,
) {
    let width = heads * head_dim;
    assert!(width > 0 && x.len().is_multiple_of(width), "rows aren't {width} wide");
    assert!(2 * angles.pairs <= head_dim, "{} pairs in a head of {head_dim}", angles.pairs);
    let rows = x.len() / width;
    let x = Shared::new(x);
    threads.parallel(rows, 16, |range, _| {
        for row in range {
            // SAFETY: `parallel` gives every row to one call.
            let x = unsafe { x.part(row * width, width) };
            let (cos, sin) = angles.row(row);
            match layout {
                RopeLayout::Halves => halves(threads.isa(), x, head_dim, cos, sin),
                RopeLayout::Interleaved => interleaved(threads.isa(), x, head_dim, cos, sin),
            }
        }
    });
}

versions! { fn halves(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) = halves_body; }
versions! { fn interleaved(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) = interleaved_body; }

#[inline(always)]
fn halves_body<S>(_simd: S, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[inline(always)]
fn interleaved_body<S>(_simd: S, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(head_dim) {
        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            let [a, b] = *pair;
            *pair = [a * cos - b * sin, b * cos + a * sin];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(dims: u32, scaling: Option<RopeScaling>) -> Rope {
        Rope { theta: 10_000.0, dims, layout: RopeLayout::Halves, scaling }
    }

    #[test]
    fn both_layouts_turn_the_same_pairs() {
        let threads = Threads::new(1).unwrap();
        let mut angles = RopeAngles::default();
        angles.set(&inverse_frequencies(&plain(4, None), None), &[3, 7]);
        // Heads of 6 of which 4 dimensions turn: pairs (0, 2) and (1, 3), or (0, 1) and (2, 3).
        let mut a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].repeat(2);
        rope(&threads, &mut a, 1, 6, RopeLayout::Halves, &angles);
        let mut b = [1.0, 3.0, 2.0, 4.0, 5.0, 6.0].repeat(2);
        rope(&threads, &mut b, 1, 6, RopeLayout::Interleaved, &angles);
        for row in 0..2 {
            let (a, b) = (&a[6 * row..], &b[6 * row..]);
            assert_eq!([a[0], a[1], a[2], a[3], a[4], a[5]], [b[0], b[2], b[1], b[3], 5.0, 6.0]);
        }
        let (sin, cos) = 3.0_f32.sin_cos();
        assert!((a[0] - (cos - 3.0 * sin)).abs() < 1e-6 && (a[2] - (3.0 * cos + sin)).abs() < 1e-6);
    }

    #[test]
    fn scalings() {
        let base = inverse_frequencies(&plain(8, None), None);
        assert_eq!(base[0], 1.0);
        assert!((base[2] - 0.01).abs() < 1e-8);
        let linear = inverse_frequencies(&plain(8, Some(RopeScaling::Linear { factor: 4.0 })), None);
        assert_eq!(linear[1], base[1] / 4.0);
        let divided = inverse_frequencies(&plain(8, None), Some(&[1.0, 2.0, 4.0, 8.0]));
        assert_eq!(divided[3], base[3] / 8.0);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let rope = Rope { theta: 500_000.0, dims: 128, layout: RopeLayout::Halves, scaling: Some(llama3) };
        let (scaled, base) =
            (inverse_frequencies(&rope, None), inverse_frequencies(&Rope { scaling: None, ..rope }, None));
        assert_eq!(scaled[0], base[0]);
        assert_eq!(scaled[63], base[63] / 8.0);
        assert!(scaled.iter().zip(&base).any(|(s, b)| *s < *b && *s > b / 8.0));
    }
}
