//! Weights in f32, f16 and bf16.
//!
//! The arithmetic, for any number of rows: sixteen sums, number `l` over the columns `k` with `k % 16 == l`, in order,
//! each step one fused multiply-add of the f32 values; then the reduction tree of
//! [`FLanes::sum`]. A row that ends inside of sixteen columns goes on with zeros.

use stoker_types::DType;

use super::{
    activations::Activations,
    isa::versions,
    lanes::{FLanes, LANES, bf16_to_f32, f16_to_f32},
    share::Shared,
};
use crate::{threads::Threads, weight::Weight};

/// Activation rows and weight rows of a register tile.
const TILE: usize = 4;

/// Outputs of one claim.
const GRAIN: usize = 4 * TILE;

/// An element type of plain floats.
trait Float {
    const BYTES: usize;
    /// The f32 of the element at the start of `bytes`.
    fn get(bytes: &[u8]) -> f32;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn get(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn get(bytes: &[u8]) -> f32 {
        f16_to_f32(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn get(bytes: &[u8]) -> f32 {
        bf16_to_f32(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }
}

/// As [`super::linear`], without bias.
pub(super) fn linear(threads: &Threads, weight: &Weight, x: &Activations<'_>, out: &mut [f32]) {
    let (m, rows) = (x.rows(), weight.rows());
    let product = Product {
        weight: weight.bytes(),
        row_bytes: weight.row_bytes(),
        rows,
        cols: weight.cols(),
        m,
        x: x.plain(),
        out: Shared::new(out),
    };
    let grain = (rows / (threads.count() * 8)).clamp(GRAIN, 1024).next_multiple_of(TILE);
    threads.parallel(rows, grain, |range, _| {
        let part = Part { product: &product, first: range.start, end: range.end };
        match weight.dtype() {
            DType::F32 => rows_f32(threads.isa(), &part),
            DType::F16 => rows_f16(threads.isa(), &part),
            _ => rows_bf16(threads.isa(), &part),
        }
    });
}

/// At most a few rows, as f32.
pub(super) fn rows_to_f32(weight: &Weight, rows: &[usize], out: &mut [f32]) {
    let size = weight.row_bytes() / weight.cols();
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(weight.cols())) {
        let bytes = &weight.bytes()[row * weight.row_bytes()..][..weight.row_bytes()];
        for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(size)) {
            *out = match weight.dtype() {
                DType::F32 => F32::get(bytes),
                DType::F16 => F16::get(bytes),
                _ => Bf16::get(bytes),
            };
        }
    }
}

/// What the threads share of one product.
struct Product<'a> {
    weight: &'a [u8],
    row_bytes: usize,
    rows: usize,
    cols: usize,
    m: usize,
    x: &'a [f32],
    out: Shared<'a, f32>,
}

/// Some outputs of all rows.
struct Part<'a> {
    product: &'a Product<'a>,
    first: usize,
    end: usize,
}

versions! { fn rows_f32(part: &Part<'_>) = part_body::<F32>; }
versions! { fn rows_f16(part: &Part<'_>) = part_body::<F16>; }
versions! { fn rows_bf16(part: &Part<'_>) = part_body::<Bf16>; }

#[inline(always)]
fn part_body<F: Float>(part: &Part<'_>) {
    let Product { weight, row_bytes, cols, m, x, .. } = *part.product;
    let weight_row = |row: usize| &weight[row * row_bytes..][..row_bytes];
    let x_row = |row: usize| &x[row * cols..][..cols];
    let mut first = part.first;
    while first < part.end {
        // A short last tile repeats its last row and throws the results away.
        let w: [&[u8]; TILE] = std::array::from_fn(|i| weight_row((first + i).min(part.end - 1)));
        let outputs = TILE.min(part.end - first);
        let mut row = 0;
        while row < m {
            if m - row >= TILE {
                let x: [&[f32]; TILE] = std::array::from_fn(|i| x_row(row + i));
                store(part.product, first, outputs, row, &dots::<F, TILE>(&w, &x, cols));
                row += TILE;
            } else {
                store(part.product, first, outputs, row, &dots::<F, 1>(&w, &[x_row(row)], cols));
                row += 1;
            }
        }
        first += TILE;
    }
}

#[inline(always)]
fn store<const R: usize>(
    product: &Product<'_>,
    first: usize,
    outputs: usize,
    row: usize,
    sums: &[[f32; TILE]; R],
) {
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: outputs `first..first + outputs` of every row belong to this call's part alone.
        let out = unsafe { product.out.part((row + r) * product.rows + first, outputs) };
        out.copy_from_slice(&sums[..outputs]);
    }
}

/// `R` activation rows times [`TILE`] weight rows.
#[inline(always)]
fn dots<F: Float, const R: usize>(w: &[&[u8]; TILE], x: &[&[f32]; R], cols: usize) -> [[f32; TILE]; R] {
    let mut acc = [[FLanes::ZERO; TILE]; R];
    let whole = cols - cols % LANES;
    for col in (0..whole).step_by(LANES) {
        let x: [FLanes; R] = std::array::from_fn(|r| FLanes::load(&x[r][col..col + LANES]));
        for (i, w) in w.iter().enumerate() {
            let w = lanes::<F>(&w[col * F::BYTES..(col + LANES) * F::BYTES]);
            for r in 0..R {
                acc[r][i] = acc[r][i].fma(x[r], w);
            }
        }
    }
    if whole < cols {
        for (i, w) in w.iter().enumerate() {
            let mut last = FLanes::ZERO;
            for (last, bytes) in last.0.iter_mut().zip(w[whole * F::BYTES..].chunks_exact(F::BYTES)) {
                *last = F::get(bytes);
            }
            for r in 0..R {
                acc[r][i] = acc[r][i].fma(FLanes::load(&x[r][whole..]), last);
            }
        }
    }
    let mut out = [[0.0; TILE]; R];
    for r in 0..R {
        for i in 0..TILE {
            out[r][i] = acc[r][i].sum();
        }
    }
    out
}

#[inline(always)]
fn lanes<F: Float>(bytes: &[u8]) -> FLanes {
    let mut out = FLanes::ZERO;
    for i in 0..LANES {
        out.0[i] = F::get(&bytes[i * F::BYTES..(i + 1) * F::BYTES]);
    }
    out
}
