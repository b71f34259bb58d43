//! Norm, gate, sum and embedding: what happens to each row by itself.

use super::{
    isa::versions,
    linear::dequantize_rows,
    math::exp,
    share::Shared,
    simd::{Float, LANES, Simd},
};
use crate::{threads::Threads, weight::Weight};

/// Elements that are worth a claim of their own.
const GRAIN_ELEMENTS: usize = 16 * 1024;

/// Rows of `weight` for `ids`, as f32: `out` is `[ids.len(), weight.cols()]`.
///
/// # Panics
/// When an id isn't a row of the weight or `out` has another shape.
pub fn embed(weight: &Weight, ids: &[u32], out: &mut [f32]) {
    let rows: Vec<usize> = ids.iter().map(|id| *id as usize).collect();
    dequantize_rows(weight, &rows, out);
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`, per row of `weight.len()` elements.
///
/// # Panics
/// When the shapes don't fit together.
pub fn rms_norm(threads: &Threads, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "norm of {} elements to {}", x.len(), out.len());
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "rows aren't {} wide", weight.len());
    let width = weight.len();
    by_rows(threads, width, out, |row, out| {
        norm(threads.isa(), &x[row * width..][..out.len()], weight, epsilon, out)
    });
}

/// `out = silu(gate) * up`, element by element; `silu(v) = v / (1 + e^-v)`.
///
/// # Panics
/// When the lengths differ.
pub fn silu_mul(threads: &Threads, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "gate, up and output differ in length");
    by_rows(threads, LANES, out, |row, out| {
        let at = row * LANES;
        silu(threads.isa(), &gate[at..][..out.len()], &up[at..][..out.len()], out);
    });
}

/// `x += y`.
///
/// # Panics
/// When the lengths differ.
pub fn add(threads: &Threads, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "sum of {} and {} elements", x.len(), y.len());
    by_rows(threads, LANES, x, |row, x| sum(threads.isa(), &y[row * LANES..][..x.len()], x));
}

/// Calls `run(first row, rows)` for parts of `out` made of whole rows (the last one may be short).
fn by_rows(threads: &Threads, width: usize, out: &mut [f32], run: impl Fn(usize, &mut [f32]) + Sync) {
    let len = out.len();
    let out = Shared::new(out);
    threads.parallel(len.div_ceil(width), GRAIN_ELEMENTS.div_ceil(width), |rows, _| {
        let (start, end) = (rows.start * width, len.min(rows.end * width));
        // SAFETY: `parallel` gives every row to one call.
        run(rows.start, unsafe { out.part(start, end - start) });
    });
}

versions! { fn norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = norm_body; }
versions! { fn silu(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_body; }
versions! { fn sum(y: &[f32], x: &mut [f32]) = sum_body; }

#[inline(always)]
fn norm_body<S: Simd>(simd: S, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let (whole, rest) = x.as_chunks::<LANES>();
        let mut squares = simd.splat(0.0);
        for x in whole {
            let x = simd.load(x);
            squares = squares.fma(x, x);
        }
        if !rest.is_empty() {
            let x = simd.load_some(rest);
            squares = squares.fma(x, x);
        }
        // Exact for every width below 2^24.
        let mean = squares.sum() / weight.len() as f32;
        let factor = 1.0 / (mean + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

#[inline(always)]
fn silu_body<S>(_simd: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

#[inline(always)]
fn sum_body<S>(_simd: S, y: &[f32], x: &mut [f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
