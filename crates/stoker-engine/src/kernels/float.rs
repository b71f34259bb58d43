//! Weights in f32, f16 and bf16.
//!
//! The arithmetic, for any number of rows: sixteen sums, number `l` over the columns `k` with `k % 16 == l`, in order,
//! each step one fused multiply-add of the f32 values; then the reduction tree of
//! [`Float::sum`]. A row that ends inside of sixteen columns goes on with zeros.

use stoker_types::DType;

use super::{
    activations::Activations,
    isa::versions,
    share::Shared,
    simd::{Float, LANES, Plain, Simd},
};
use crate::{threads::Threads, weight::Weight};

/// Activation rows and weight rows of a register tile.
const TILE: usize = 4;

/// Outputs of one claim.
const GRAIN: usize = 4 * TILE;

/// An element type of plain floats.
trait Element {
    const BYTES: usize;
    /// Sixteen elements, `16 * BYTES` bytes.
    fn lanes<S: Simd>(simd: S, bytes: &[u8]) -> S::Float;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, bytes: &[u8]) -> S::Float {
        simd.load_f32(bytes.first_chunk().expect("sixteen elements"))
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, bytes: &[u8]) -> S::Float {
        simd.load_f16(bytes.first_chunk().expect("sixteen elements"))
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, bytes: &[u8]) -> S::Float {
        simd.load_bf16(bytes.first_chunk().expect("sixteen elements"))
    }
}

/// As [`super::linear()`], without bias.
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

/// Some rows, as f32.
pub(super) fn rows_to_f32(weight: &Weight, rows: &[usize], out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(weight.cols())) {
        let bytes = &weight.bytes()[row * weight.row_bytes()..][..weight.row_bytes()];
        match weight.dtype() {
            DType::F32 => to_f32::<F32>(bytes, out),
            DType::F16 => to_f32::<F16>(bytes, out),
            _ => to_f32::<Bf16>(bytes, out),
        }
    }
}

fn to_f32<E: Element>(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.chunks(LANES * E::BYTES).zip(out.chunks_mut(LANES)) {
        let mut lanes = [0.0; LANES];
        some::<E, _>(Plain, bytes).store(&mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

/// At most sixteen elements, zeros where there are fewer.
#[inline(always)]
fn some<E: Element, S: Simd>(simd: S, bytes: &[u8]) -> S::Float {
    let mut padded = [0; 64];
    padded[..bytes.len()].copy_from_slice(bytes);
    E::lanes(simd, &padded)
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

versions! { fn rows_f32(part: &Part<'_>) = part_body::<F32, _>; }
versions! { fn rows_f16(part: &Part<'_>) = part_body::<F16, _>; }
versions! { fn rows_bf16(part: &Part<'_>) = part_body::<Bf16, _>; }

#[inline(always)]
fn part_body<E: Element, S: Simd>(simd: S, part: &Part<'_>) {
    let Product { weight, row_bytes, cols, m, x, .. } = *part.product;
    let weight_row = |row: usize| &weight[row * row_bytes..][..row_bytes];
    let x_row = |row: usize| &x[row * cols..][..cols];
    for first in (part.first..part.end).step_by(TILE) {
        // A short last tile repeats its last row and throws the results away.
        let w: [&[u8]; TILE] = std::array::from_fn(|i| weight_row((first + i).min(part.end - 1)));
        let outputs = TILE.min(part.end - first);
        let mut row = 0;
        while row + TILE <= m {
            let x: [&[f32]; TILE] = std::array::from_fn(|i| x_row(row + i));
            let acc = dots::<E, S, TILE>(simd, &w, &x, cols);
            let sums = S::Float::sums(std::array::from_fn(|i| acc[i / TILE][i % TILE]));
            for (r, sums) in sums.as_chunks::<TILE>().0.iter().enumerate() {
                store(part.product, first, outputs, row + r, sums);
            }
            row += TILE;
        }
        while row < m {
            let [acc] = dots::<E, S, 1>(simd, &w, &[x_row(row)], cols);
            store(part.product, first, outputs, row, &acc.map(Float::sum));
            row += 1;
        }
    }
}

#[inline(always)]
fn store(product: &Product<'_>, first: usize, outputs: usize, row: usize, sums: &[f32; TILE]) {
    // SAFETY: outputs `first..first + outputs` of every row belong to this call's part alone.
    let out = unsafe { product.out.part(row * product.rows + first, outputs) };
    out.copy_from_slice(&sums[..outputs]);
}

/// `R` activation rows times [`TILE`] weight rows, before the last reduction.
#[inline(always)]
fn dots<E: Element, S: Simd, const R: usize>(
    simd: S,
    w: &[&[u8]; TILE],
    x: &[&[f32]; R],
    cols: usize,
) -> [[S::Float; TILE]; R] {
    let mut acc = [[simd.splat(0.0); TILE]; R];
    let whole = cols - cols % LANES;
    for col in (0..whole).step_by(LANES) {
        let mut lanes = [simd.splat(0.0); TILE];
        for i in 0..TILE {
            lanes[i] = E::lanes(simd, &w[i][col * E::BYTES..(col + LANES) * E::BYTES]);
        }
        for r in 0..R {
            let x = simd.load_some(&x[r][col..col + LANES]);
            for i in 0..TILE {
                acc[r][i] = acc[r][i].fma(x, lanes[i]);
            }
        }
    }
    if whole < cols {
        for i in 0..TILE {
            let lanes = some::<E, S>(simd, &w[i][whole * E::BYTES..]);
            for r in 0..R {
                acc[r][i] = acc[r][i].fma(simd.load_some(&x[r][whole..]), lanes);
            }
        }
    }
    acc
}
