//! Attention over a paged KV cache.
//!
//! The arithmetic of one head of one row, whatever else is computed beside it and however the prompt was cut:
//! scores are sums over sixteen strided lanes as in [`super::float`]; the largest is taken off; the sum of the
//! exponentials has sixteen lanes, number `p % 16` for absolute position `p`, each in order of position, and the usual
//! reduction tree; the output adds `weight * value` with fused steps in order of position, and is divided by the sum
//! at the end.

use std::cell::RefCell;

use super::{
    isa::versions,
    math::exp,
    share::Shared,
    simd::{Float, LANES, Plain, Simd},
};
use crate::threads::Threads;

/// Vectors of a value that are in registers at a time.
const WIDE: usize = 4;

/// Query heads whose values are added up together.
const HEADS: usize = 4;

/// Shapes of one layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// A row attends to itself and the `window - 1` positions before it; `None`: to all.
    pub window: Option<usize>,
    /// What scores are multiplied by; usually `head_dim^-0.5`.
    pub scale: f32,
}

/// One row's place in its sequence.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRow<'a> {
    /// The sequence's KV blocks: position `p` is in block `blocks[p / block_size]`.
    pub blocks: &'a [u32],
    /// The row's absolute position; it attends to `0..=position` (within the window). Those keys and values must be
    /// in the cache, its own too.
    pub position: usize,
}

/// Causal attention of `rows`.
///
/// `q` and `out` are `[rows, heads, head_dim]`; `keys` and `values` `[blocks, block_size, kv_heads, head_dim]`. Rows may
/// belong to different sequences; neighbours of one sequence are fastest side by side.
///
/// # Panics
/// When the shapes don't fit together or a position lies outside of the blocks.
pub fn attention(
    threads: &Threads,
    shape: &AttentionShape,
    q: &[f32],
    rows: &[AttentionRow<'_>],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    let width = shape.heads * shape.head_dim;
    assert!(
        shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
        "kv heads don't divide the heads"
    );
    assert!(
        q.len() == rows.len() * width && out.len() == q.len(),
        "queries or output aren't [rows, heads, head_dim]"
    );
    assert_eq!(keys.len(), values.len(), "keys and values differ in length");
    let cache = Cache { shape, keys, values };
    let out = Shared::new(out);
    threads.parallel(rows.len() * shape.kv_heads, 1, |items, _| {
        SCRATCH.with_borrow_mut(|scratch| {
            for item in items {
                let (row, kv_head) = (item / shape.kv_heads, item % shape.kv_heads);
                let group = shape.heads / shape.kv_heads * shape.head_dim;
                let at = row * width + kv_head * group;
                // SAFETY: `parallel` gives every row and kv head to one call, and the parts are theirs.
                let out = unsafe { out.part(at, group) };
                head(threads.isa(), &cache, rows[row], kv_head, &q[at..at + group], scratch, out);
            }
        });
    });
}

thread_local! {
    static SCRATCH: RefCell<AttentionScratch> = RefCell::default();
}

/// One thread's buffers for one row and kv head.
#[derive(Default)]
struct AttentionScratch {
    /// `[query heads of the kv head, positions]`: scores, then weights.
    weights: Vec<f32>,
    /// Where each position's key and value begin in the cache.
    places: Vec<usize>,
}

struct Cache<'a> {
    shape: &'a AttentionShape,
    keys: &'a [f32],
    values: &'a [f32],
}

impl Cache<'_> {
    /// Sets `places` for the positions from `first` to the row's own.
    #[inline(always)]
    fn places(&self, row: AttentionRow<'_>, first: usize, kv_head: usize, places: &mut Vec<usize>) {
        let AttentionShape { kv_heads, head_dim, block_size, .. } = *self.shape;
        places.clear();
        let mut position = first;
        while position <= row.position {
            let block = row.blocks[position / block_size] as usize;
            let slot = position % block_size;
            let count = (block_size - slot).min(row.position + 1 - position);
            let start = ((block * block_size + slot) * kv_heads + kv_head) * head_dim;
            places.extend((0..count).map(|i| start + i * kv_heads * head_dim));
            position += count;
        }
    }
}

versions! {
    fn head(
        cache: &Cache<'_>,
        row: AttentionRow<'_>,
        kv_head: usize,
        q: &[f32],
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) = head_body;
}

/// All query heads of one kv head of one row.
#[inline(always)]
fn head_body<S: Simd>(
    simd: S,
    cache: &Cache<'_>,
    row: AttentionRow<'_>,
    kv_head: usize,
    q: &[f32],
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let AttentionShape { head_dim, window, scale, .. } = *cache.shape;
    let first = window.map_or(0, |window| (row.position + 1).saturating_sub(window.max(1)));
    let count = row.position + 1 - first;
    let AttentionScratch { weights, places } = scratch;
    cache.places(row, first, kv_head, places);
    if weights.len() < q.len() / head_dim * count {
        weights.resize(q.len() / head_dim * count, 0.0);
    }
    // Sixteen positions at a time: their sums are reduced together.
    for (chunk, places) in places.chunks(LANES).enumerate() {
        let mut keys: [&[f32]; LANES] = [&[]; LANES];
        for (key, at) in keys.iter_mut().zip(places) {
            *key = &cache.keys[*at..][..head_dim];
        }
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let mut acc = [simd.splat(0.0); LANES];
            for (acc, key) in acc.iter_mut().zip(&keys[..places.len()]) {
                *acc = products(simd, q, key);
            }
            let out = &mut weights[head * count + chunk * LANES..][..places.len()];
            for (out, score) in out.iter_mut().zip(S::Float::sums(acc)) {
                *out = score * scale;
            }
        }
    }
    // Several heads at a time: each value is loaded once for them.
    for (weights, out) in weights.chunks_mut(HEADS * count).zip(out.chunks_mut(HEADS * head_dim)) {
        let mut sums = [0.0; HEADS];
        for (weights, sum) in weights.chunks_exact_mut(count).zip(&mut sums[..out.len() / head_dim]) {
            *sum = softmax(weights, first);
        }
        for dim in (0..head_dim).step_by(LANES * WIDE) {
            let part = Values { places, weights, sums, dim, head_dim };
            match out.len() / head_dim {
                1 => values::<S, 1>(simd, cache, part, out),
                2 => values::<S, 2>(simd, cache, part, out),
                3 => values::<S, 3>(simd, cache, part, out),
                _ => values::<S, HEADS>(simd, cache, part, out),
            }
        }
    }
}

/// Sixteen strided sums of the products of two vectors.
#[inline(always)]
fn products<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> S::Float {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut acc = simd.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        acc = acc.fma(simd.load(a), simd.load(b));
    }
    if !a_rest.is_empty() {
        acc = acc.fma(simd.load_some(a_rest), simd.load_some(b_rest));
    }
    acc
}

/// What the weighted values of some heads and dimensions are made from.
#[derive(Clone, Copy)]
struct Values<'a> {
    places: &'a [usize],
    /// `[heads, positions]`.
    weights: &'a [f32],
    sums: [f32; HEADS],
    dim: usize,
    head_dim: usize,
}

/// The weighted values of `H` heads, [`WIDE`] vectors of dimensions from `dim`, divided by the sums.
#[inline(always)]
fn values<S: Simd, const H: usize>(simd: S, cache: &Cache<'_>, part: Values<'_>, out: &mut [f32]) {
    let Values { places, weights, sums, dim, head_dim } = part;
    let dims = (head_dim - dim).min(LANES * WIDE);
    let mut acc = [[simd.splat(0.0); WIDE]; H];
    let mut heads: [&[f32]; H] = [&[]; H];
    for (head, weights) in heads.iter_mut().zip(weights.chunks_exact(places.len())) {
        *head = weights;
    }
    if dims == LANES * WIDE {
        for (i, at) in places.iter().enumerate() {
            let (value, _) = cache.values[at + dim..][..LANES * WIDE].as_chunks::<LANES>();
            for h in 0..H {
                let weight = simd.splat(heads[h][i]);
                for j in 0..WIDE {
                    acc[h][j] = acc[h][j].fma(weight, simd.load(&value[j]));
                }
            }
        }
    } else {
        for (i, at) in places.iter().enumerate() {
            let value = &cache.values[at + dim..][..dims];
            for h in 0..H {
                let weight = simd.splat(heads[h][i]);
                for (acc, value) in acc[h].iter_mut().zip(value.chunks(LANES)) {
                    *acc = acc.fma(weight, simd.load_some(value));
                }
            }
        }
    }
    for h in 0..H {
        let sum = simd.splat(sums[h]);
        for (acc, out) in acc[h].into_iter().zip(out[h * head_dim + dim..][..dims].chunks_mut(LANES)) {
            let mut lanes = [0.0; LANES];
            acc.over(sum).store(&mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

/// Replaces scores by `e^(score - largest)` and returns their sum. `first` is the absolute position of the first.
#[inline(always)]
fn softmax(scores: &mut [f32], first: usize) -> f32 {
    // The largest of some floats is the same in any order.
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = scores.as_chunks::<LANES>();
    for scores in whole {
        for i in 0..LANES {
            largest[i] = if scores[i] > largest[i] { scores[i] } else { largest[i] };
        }
    }
    let largest = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let mut sums = [0.0; LANES];
    let (head, body) = scores.split_at(scores.len().min((LANES - first % LANES) % LANES));
    for (i, weight) in head.iter().enumerate() {
        sums[first % LANES + i] += weight;
    }
    for weights in body.chunks(LANES) {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum += weight;
        }
    }
    Plain.load(&sums).sum()
}
