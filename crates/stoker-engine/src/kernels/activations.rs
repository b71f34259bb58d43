//! Activations as the linear kernels want them: f32 as they are, and quantised for quantised weights.
//!
//! One rule for every quantised weight type: 32 elements share a scale `d = max |x| / 127`, `q = round(x / d)`
//! (to even). A row's bytes depend on that row alone.

use super::{isa::versions, share::Shared};
use crate::threads::Threads;

/// Elements that share an activation scale.
pub(super) const X_BLOCK: usize = 32;

/// Below this a block counts as zeros: the reciprocal of its scale would overflow.
const SMALLEST: f32 = 1e-35;

/// Buffers that the kernels reuse from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    q: Vec<i8>,
    scale: Vec<f32>,
    /// `-sum(q)` of each 16 and each 32 elements.
    negative_sum_16: Vec<i32>,
    negative_sum_32: Vec<i32>,
    /// `d * sum(q)` of the same.
    scaled_sum_16: Vec<f32>,
    scaled_sum_32: Vec<f32>,
}

/// Rows of activations, quantised when the first quantised weight asks for it and then kept: use one value for all
/// weights with the same input (q, k and v; gate and up).
pub struct Activations<'a> {
    x: &'a [f32],
    rows: usize,
    cols: usize,
    quantised: bool,
    scratch: &'a mut Scratch,
}

/// Quantised rows.
#[derive(Clone, Copy)]
pub(super) struct Quantised<'a> {
    /// `[rows, cols]`.
    pub(super) q: &'a [i8],
    /// `[rows, cols / 32]`.
    pub(super) scale: &'a [f32],
    /// `[rows, cols / 16]` and `[rows, cols / 32]`.
    pub(super) negative_sum: [&'a [i32]; 2],
    /// As `negative_sum`.
    pub(super) scaled_sum: [&'a [f32]; 2],
    pub(super) cols: usize,
}

// === impl Activations ===

impl<'a> Activations<'a> {
    /// Activations `x`, `[rows, cols]`.
    ///
    /// # Panics
    /// When `x` has another length.
    pub fn new(x: &'a [f32], rows: usize, cols: usize, scratch: &'a mut Scratch) -> Self {
        assert_eq!(x.len(), rows * cols, "activations aren't [{rows}, {cols}]");
        Self { x, rows, cols, quantised: false, scratch }
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// As given.
    pub(super) fn plain(&self) -> &'a [f32] {
        self.x
    }

    /// Quantised; `cols` must be whole blocks.
    pub(super) fn quantised(&mut self, threads: &Threads) -> Quantised<'_> {
        assert!(self.cols.is_multiple_of(X_BLOCK), "{} columns aren't whole blocks of {X_BLOCK}", self.cols);
        let (rows, cols) = (self.rows, self.cols);
        let scratch = &mut *self.scratch;
        let n = rows * cols;
        if !self.quantised {
            grow(&mut scratch.q, n);
            grow(&mut scratch.scale, n / 32);
            grow(&mut scratch.negative_sum_16, n / 16);
            grow(&mut scratch.negative_sum_32, n / 32);
            grow(&mut scratch.scaled_sum_16, n / 16);
            grow(&mut scratch.scaled_sum_32, n / 32);
            let q = Shared::new(&mut scratch.q);
            let scale = Shared::new(&mut scratch.scale);
            let negative_16 = Shared::new(&mut scratch.negative_sum_16);
            let negative_32 = Shared::new(&mut scratch.negative_sum_32);
            let scaled_16 = Shared::new(&mut scratch.scaled_sum_16);
            let scaled_32 = Shared::new(&mut scratch.scaled_sum_32);
            let x = self.x;
            threads.parallel(rows, 16, |range, _| {
                let (at, len) = (range.start * cols, range.len() * cols);
                // SAFETY: `parallel` gives every row to one call, and the parts are those rows'.
                let parts = unsafe {
                    Parts {
                        q: q.part(at, len),
                        scale: scale.part(at / 32, len / 32),
                        negative_16: negative_16.part(at / 16, len / 16),
                        negative_32: negative_32.part(at / 32, len / 32),
                        scaled_16: scaled_16.part(at / 16, len / 16),
                        scaled_32: scaled_32.part(at / 32, len / 32),
                    }
                };
                quantise(threads.isa(), &x[at..at + len], parts);
            });
            self.quantised = true;
        }
        Quantised {
            q: &scratch.q[..n],
            scale: &scratch.scale[..n / 32],
            negative_sum: [&scratch.negative_sum_16[..n / 16], &scratch.negative_sum_32[..n / 32]],
            scaled_sum: [&scratch.scaled_sum_16[..n / 16], &scratch.scaled_sum_32[..n / 32]],
            cols,
        }
    }
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

struct Parts<'a> {
    q: &'a mut [i8],
    scale: &'a mut [f32],
    negative_16: &'a mut [i32],
    negative_32: &'a mut [i32],
    scaled_16: &'a mut [f32],
    scaled_32: &'a mut [f32],
}

versions! {
    fn quantise(x: &[f32], out: Parts<'_>) = quantise_body;
}

#[inline(always)]
fn quantise_body<S>(_simd: S, x: &[f32], out: Parts<'_>) {
    let (blocks, _) = x.as_chunks::<X_BLOCK>();
    let (q_blocks, _) = out.q.as_chunks_mut::<X_BLOCK>();
    for (i, (x, q)) in blocks.iter().zip(q_blocks).enumerate() {
        let d = quantise_block(x, q);
        let halves = q.as_chunks::<16>().0;
        let sums = [sum_16(&halves[0]), sum_16(&halves[1])];
        out.scale[i] = d;
        for (half, sum) in sums.into_iter().enumerate() {
            out.negative_16[2 * i + half] = -sum;
            out.scaled_16[2 * i + half] = d * sum as f32;
        }
        let sum = sums[0] + sums[1];
        out.negative_32[i] = -sum;
        out.scaled_32[i] = d * sum as f32;
    }
}

#[inline(always)]
fn sum_16(q: &[i8; 16]) -> i32 {
    q.iter().map(|q| i32::from(*q)).sum()
}

#[inline(always)]
fn quantise_block(x: &[f32; X_BLOCK], q: &mut [i8; X_BLOCK]) -> f32 {
    // 1.5 * 2^23: adding it leaves the integer, rounded to even, in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // The magnitude as an integer orders like the float, with NaN above infinity above all numbers.
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(largest);
    if largest < SMALLEST {
        *q = [0; X_BLOCK];
        return 0.0;
    }
    let inverse = 127.0 / largest;
    for (q, x) in q.iter_mut().zip(x) {
        let bits = (x * inverse + ROUND).to_bits();
        // In range unless `x` holds an infinity or NaN, and then the scale makes every result one as well.
        #[expect(clippy::cast_possible_truncation, reason = "the wanted bits are the lowest eight")]
        let low = bits as i8;
        *q = low;
    }
    largest / 127.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_and_scale() {
        let mut x = [0.0; 32];
        x[0] = -12.7;
        x[1] = 0.05;
        x[2] = 0.15001;
        x[3] = 12.7;
        let mut q = [0; 32];
        let d = quantise_block(&x, &mut q);
        assert!((d - 0.1).abs() < 1e-7);
        assert_eq!(q[..5], [-127, 0, 2, 127, 0]);
    }

    #[test]
    fn extremes() {
        let mut q = [1; 32];
        assert_eq!(quantise_block(&[0.0; 32], &mut q), 0.0);
        assert_eq!(q, [0; 32]);
        assert_eq!(quantise_block(&[1e-38; 32], &mut q), 0.0);
        assert!(quantise_block(&[f32::NAN; 32], &mut q).is_nan());
        assert!(quantise_block(&[f32::INFINITY; 32], &mut q).is_infinite());
        assert!(quantise_block(&[f32::MAX; 32], &mut q).is_finite());
        assert_eq!(q, [127; 32]);
    }
}
