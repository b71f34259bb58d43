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
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Cache<'a> {
    shape: &'a AttentionShape,
    keys: &'a [f32],
    values: &'a [f32],
}

impl Cache<'_> {
    #[inline(always)]
    fn at(&self, row: AttentionRow<'_>, position: usize, kv_head: usize) -> usize {
        let AttentionShape { kv_heads, head_dim, block_size, .. } = *self.shape;
        let block = row.blocks[position / block_size] as usize;
        ((block * block_size + position % block_size) * kv_heads + kv_head) * head_dim
    }
}

versions! {
    fn head(
        cache: &Cache<'_>,
        row: AttentionRow<'_>,
        kv_head: usize,
        q: &[f32],
        scratch: &mut Vec<f32>,
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
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    let AttentionShape { head_dim, window, scale, .. } = *cache.shape;
    let first = window.map_or(0, |window| (row.position + 1).saturating_sub(window.max(1)));
    let count = row.position + 1 - first;
    let heads = q.len() / head_dim;
    scratch.clear();
    scratch.resize(heads * count, 0.0);
    // Sixteen positions at a time: their sums are reduced together.
    for start in (0..count).step_by(LANES) {
        let positions = LANES.min(count - start);
        let mut keys: [&[f32]; LANES] = [&[]; LANES];
        for (i, key) in keys[..positions].iter_mut().enumerate() {
            *key = &cache.keys[cache.at(row, first + start + i, kv_head)..][..head_dim];
        }
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let mut acc = [simd.splat(0.0); LANES];
            if positions == LANES {
                for dim in (0..head_dim).step_by(LANES) {
                    let q = simd.load_some(&q[dim..]);
                    for i in 0..LANES {
                        acc[i] = acc[i].fma(q, simd.load_some(&keys[i][dim..]));
                    }
                }
            } else {
                for (acc, key) in acc.iter_mut().zip(&keys[..positions]) {
                    for dim in (0..head_dim).step_by(LANES) {
                        *acc = acc.fma(simd.load_some(&q[dim..]), simd.load_some(&key[dim..]));
                    }
                }
            }
            let scores = S::Float::sums(acc);
            for (out, score) in scratch[head * count + start..][..positions].iter_mut().zip(scores) {
                *out = score * scale;
            }
        }
    }
    for (weights, out) in scratch.chunks_exact_mut(count).zip(out.chunks_exact_mut(head_dim)) {
        let sum = softmax(weights, first);
        for dim in (0..head_dim).step_by(LANES * WIDE) {
            values(simd, cache, row, kv_head, first, weights, sum, dim, out);
        }
    }
}

/// The weighted values of some dimensions, from `dim`, divided by `sum`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a loop of `head_body`, split off for its registers")]
fn values<S: Simd>(
    simd: S,
    cache: &Cache<'_>,
    row: AttentionRow<'_>,
    kv_head: usize,
    first: usize,
    weights: &[f32],
    sum: f32,
    dim: usize,
    out: &mut [f32],
) {
    let out = &mut out[dim..];
    let mut acc = [simd.splat(0.0); WIDE];
    for (i, weight) in weights.iter().enumerate() {
        let at = cache.at(row, first + i, kv_head) + dim;
        let value = &cache.values[at..][..out.len()];
        let weight = simd.splat(*weight);
        if let Some(value) = value.first_chunk::<{ LANES * WIDE }>() {
            for (acc, value) in acc.iter_mut().zip(value.as_chunks::<LANES>().0) {
                *acc = acc.fma(weight, simd.load(value));
            }
        } else {
            for (acc, value) in acc.iter_mut().zip(value.chunks(LANES)) {
                *acc = acc.fma(weight, simd.load_some(value));
            }
        }
    }
    for (acc, out) in acc.into_iter().zip(out.chunks_mut(LANES)) {
        let mut lanes = [0.0; LANES];
        acc.over(simd.splat(sum)).store(&mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
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
