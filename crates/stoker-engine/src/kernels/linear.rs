//! `y = x W^T + b` for every weight type: the one place that chooses the kernel.

use std::cell::RefCell;

use stoker_types::DType;

use super::{
    activations::{Activations, Quantised},
    dot::{Dot, Input, Tile},
    float,
    gather::Rows,
    isa::versions,
    quant::{Block, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Quant},
    share::Shared,
    simd::{FLanes, LANES, Lanes, Plain, Simd},
};
use crate::{threads::Threads, weight::Weight};

/// Activation rows that go through a tile together.
const ROWS: usize = 8;

/// Columns unpacked at a time when that is for few rows: 8 KiB of quants, so that they are still in the first-level
/// cache when they are used. A multiple of every block.
const CHUNK: usize = 512;

/// `out = x W^T + bias`.
///
/// `x` is `[m, weight.cols()]`, `out` `[m, weight.rows()]`, `bias` `[weight.rows()]`. An output element depends on its
/// row of `x` and its row of the weight alone, bit for bit.
///
/// # Panics
/// When the shapes don't fit together.
pub fn linear(
    threads: &Threads,
    weight: &Weight,
    bias: Option<&[f32]>,
    x: &mut Activations<'_>,
    out: &mut [f32],
) {
    assert_eq!(x.cols(), weight.cols(), "activations of {} columns, weight of {}", x.cols(), weight.cols());
    assert_eq!(out.len(), x.rows() * weight.rows(), "output isn't [{}, {}]", x.rows(), weight.rows());
    if out.is_empty() {
        return;
    }
    match weight.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => float::linear(threads, weight, x, out),
        DType::Q4_0 => quantised::<Q4_0>(threads, weight, x, out),
        DType::Q4_1 => quantised::<Q4_1>(threads, weight, x, out),
        DType::Q5_0 => quantised::<Q5_0>(threads, weight, x, out),
        DType::Q5_1 => quantised::<Q5_1>(threads, weight, x, out),
        DType::Q8_0 => quantised::<Q8_0>(threads, weight, x, out),
        DType::Q2_K => quantised::<Q2K>(threads, weight, x, out),
        DType::Q3_K => quantised::<Q3K>(threads, weight, x, out),
        DType::Q4_K => quantised::<Q4K>(threads, weight, x, out),
        DType::Q5_K => quantised::<Q5K>(threads, weight, x, out),
        DType::Q6_K => quantised::<Q6K>(threads, weight, x, out),
        other => unreachable!("a weight of type {other} can't be made"),
    }
    if let Some(bias) = bias {
        assert_eq!(bias.len(), weight.rows(), "bias of {} for {} outputs", bias.len(), weight.rows());
        for row in out.chunks_exact_mut(weight.rows()) {
            for (out, bias) in row.iter_mut().zip(bias) {
                *out += *bias;
            }
        }
    }
}

/// Copies rows of `weight` to `out` as f32, `[rows.len(), weight.cols()]`.
///
/// # Panics
/// When a row number or `out`'s length is out of range.
pub(crate) fn dequantize_rows(weight: &Weight, rows: &[usize], out: &mut [f32]) {
    let cols = weight.cols();
    assert_eq!(out.len(), rows.len() * cols, "output isn't [{}, {cols}]", rows.len());
    for (rows, out) in rows.chunks(LANES).zip(out.chunks_mut(LANES * cols)) {
        match weight.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => float::rows_to_f32(weight, rows, out),
            DType::Q4_0 => unpack_to_f32::<Q4_0>(weight, rows, out),
            DType::Q4_1 => unpack_to_f32::<Q4_1>(weight, rows, out),
            DType::Q5_0 => unpack_to_f32::<Q5_0>(weight, rows, out),
            DType::Q5_1 => unpack_to_f32::<Q5_1>(weight, rows, out),
            DType::Q8_0 => unpack_to_f32::<Q8_0>(weight, rows, out),
            DType::Q2_K => unpack_to_f32::<Q2K>(weight, rows, out),
            DType::Q3_K => unpack_to_f32::<Q3K>(weight, rows, out),
            DType::Q4_K => unpack_to_f32::<Q4K>(weight, rows, out),
            DType::Q5_K => unpack_to_f32::<Q5K>(weight, rows, out),
            DType::Q6_K => unpack_to_f32::<Q6K>(weight, rows, out),
            other => unreachable!("a weight of type {other} can't be made"),
        }
    }
}

/// One thread's unpacked tile.
#[derive(Default)]
struct Unpacked {
    q: Vec<Lanes>,
    scale: Vec<FLanes>,
    min: Vec<FLanes>,
}

thread_local! {
    static UNPACKED: RefCell<Unpacked> = RefCell::default();
}

/// What the threads share of one product.
struct Product<'a> {
    weight: &'a [u8],
    row_bytes: usize,
    rows: usize,
    cols: usize,
    m: usize,
    x: Quantised<'a>,
    out: Shared<'a, f32>,
}

fn quantised<Q: Quant>(threads: &Threads, weight: &Weight, x: &mut Activations<'_>, out: &mut [f32]) {
    let m = x.rows();
    let product = Product {
        weight: weight.bytes(),
        row_bytes: weight.row_bytes(),
        rows: weight.rows(),
        cols: weight.cols(),
        m,
        x: x.quantised(threads),
        out: Shared::new(out),
    };
    let tiles = weight.rows().div_ceil(LANES);
    // Small enough that a thread which comes late still finds work, large enough that claiming costs nothing.
    let grain = (tiles / (threads.count() * 8)).clamp(1, 64);
    threads.parallel(tiles, grain, |tiles, _| {
        UNPACKED.with_borrow_mut(|unpacked| {
            for tile in tiles {
                one_tile::<Q>(threads.isa(), &product, tile, unpacked);
            }
        });
    });
}

versions! {
    fn one_tile<Q: Quant>(product: &Product<'_>, tile: usize, unpacked: &mut Unpacked) = one_tile_body::<Q, _>;
}

/// Sixteen outputs of all rows.
#[inline(always)]
fn one_tile_body<Q: Quant, D: Dot>(version: D, product: &Product<'_>, tile: usize, unpacked: &mut Unpacked) {
    let first = tile * LANES;
    let mut padded = Vec::new();
    let weight = if first + LANES <= product.rows {
        &product.weight[first * product.row_bytes..]
    } else {
        // The last tile has fewer rows; what is computed from the padding is thrown away.
        padded.extend_from_slice(&product.weight[first * product.row_bytes..]);
        padded.resize(LANES * product.row_bytes, 0);
        &padded[..]
    };
    let rows = Rows::new(weight, product.row_bytes, version);
    // For few rows in chunks of columns, the sums carried from chunk to chunk; for many all columns at once.
    let chunk = if product.m <= ROWS { CHUNK } else { product.cols };
    let mut acc = [FLanes::ZERO; ROWS];
    for col in (0..product.cols).step_by(chunk) {
        let columns = chunk.min(product.cols - col);
        // Sixteen short rows side by side are no stream that the hardware follows: ask for the next tile's share.
        let share = LANES * product.row_bytes * columns / product.cols;
        let ahead = (first + LANES) * product.row_bytes + LANES * product.row_bytes * col / product.cols;
        if let Some(ahead) = product.weight.get(ahead..) {
            version.prefetch(&ahead[..share.min(ahead.len())]);
        }
        let tile = unpack::<Q, D>(&rows, col, columns, unpacked);
        for row in (0..product.m).step_by(ROWS) {
            let count = ROWS.min(product.m - row);
            let input = Input::new(product.x, row, col);
            if product.m > ROWS {
                acc = [FLanes::ZERO; ROWS];
            }
            dot_rows::<Q, D>(version, tile, input, &mut acc, count);
            if col + columns == product.cols {
                store(product, first, row, &acc[..count]);
            }
        }
    }
}

#[inline(always)]
fn dot_rows<Q: Quant, D: Dot>(
    version: D,
    tile: Tile<'_>,
    input: Input<'_>,
    acc: &mut [FLanes; ROWS],
    count: usize,
) {
    macro_rules! rows {
        ($($n:literal)*) => {
            match count {
                $($n => if let Some(acc) = acc.first_chunk_mut::<$n>() { version.dot::<Q, $n>(tile, input, acc) },)*
                _ => version.dot::<Q, ROWS>(tile, input, acc),
            }
        };
    }
    rows!(1 2 3 4 5 6 7);
}

#[inline(always)]
fn unpack<'u, Q: Quant, S: Simd>(
    rows: &Rows<'_, S>,
    col: usize,
    columns: usize,
    unpacked: &'u mut Unpacked,
) -> Tile<'u> {
    let (words, groups) = (columns / 4, columns / Q::GROUP);
    if unpacked.q.len() < words {
        unpacked.q.resize(words, Lanes::ZERO);
    }
    if unpacked.scale.len() < groups {
        unpacked.scale.resize(groups, FLanes::ZERO);
        unpacked.min.resize(groups, FLanes::ZERO);
    }
    let q = unpacked.q[..words].chunks_exact_mut(Q::BLOCK / 4);
    let scale = unpacked.scale[..groups].chunks_exact_mut(Q::BLOCK / Q::GROUP);
    let min = unpacked.min[..groups].chunks_exact_mut(Q::BLOCK / Q::GROUP);
    for (block, ((q, scale), min)) in q.zip(scale).zip(min).enumerate() {
        Q::unpack(rows, (col / Q::BLOCK + block) * Q::BYTES, &mut Block { q, scale, min });
    }
    Tile { q: &unpacked.q[..words], scale: &unpacked.scale[..groups], min: &unpacked.min[..groups] }
}

#[inline(always)]
fn store(product: &Product<'_>, first: usize, row: usize, acc: &[FLanes]) {
    let count = LANES.min(product.rows - first);
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: outputs `first..first + count` of every row are this tile's, and a tile is computed once.
        let out = unsafe { product.out.part((row + r) * product.rows + first, count) };
        out.copy_from_slice(&acc.0[..count]);
    }
}

/// At most sixteen rows, as f32. The elements are few: no special instructions.
fn unpack_to_f32<Q: Quant>(weight: &Weight, rows: &[usize], out: &mut [f32]) {
    let cols = weight.cols();
    let row_bytes = weight.row_bytes();
    let mut packed = Vec::with_capacity(LANES * row_bytes);
    for row in rows {
        packed.extend_from_slice(&weight.bytes()[row * row_bytes..][..row_bytes]);
    }
    packed.resize(LANES * row_bytes, 0);
    let source = Rows::new(&packed, row_bytes, Plain);
    UNPACKED.with_borrow_mut(|unpacked| {
        let tile = unpack::<Q, Plain>(&source, 0, cols, unpacked);
        let offset = Q::OFFSET_LOG2.map_or(0, |log2| 1i32 << log2);
        for (lane, out) in out.chunks_exact_mut(cols).enumerate() {
            for (col, out) in out.iter_mut().enumerate() {
                let q = (tile.q[col / 4].0[lane] >> (8 * (col % 4))) & 0xff;
                let value = (q as i32 - offset) as f32 * tile.scale[col / Q::GROUP].0[lane];
                *out = if Q::MIN { value + tile.min[col / Q::GROUP].0[lane] } else { value };
            }
        }
    });
}
