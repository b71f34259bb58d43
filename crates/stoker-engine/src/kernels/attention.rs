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
    lanes::{FLanes, LANES},
    math::exp,
    share::Shared,
};
use crate::threads::Threads;

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
fn head_body(
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
    for position in first..=row.position {
        let key = &cache.keys[cache.at(row, position, kv_head)..][..head_dim];
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            scratch[head * count + position - first] = dot(q, key) * scale;
        }
    }
    let mut sums = [0.0; 64];
    assert!(heads <= sums.len(), "more than {} heads on one kv head", sums.len());
    for (weights, sum) in scratch.chunks_exact_mut(count).zip(&mut sums) {
        *sum = softmax(weights, first);
    }
    out.fill(0.0);
    for position in first..=row.position {
        let value = &cache.values[cache.at(row, position, kv_head)..][..head_dim];
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let weight = scratch[head * count + position - first];
            for (out, value) in out.iter_mut().zip(value) {
                *out = weight.mul_add(*value, *out);
            }
        }
    }
    for (out, sum) in out.chunks_exact_mut(head_dim).zip(sums) {
        for out in out {
            *out /= sum;
        }
    }
}

/// Replaces scores by `e^(score - largest)` and returns their sum. `first` is the absolute position of the first.
#[inline(always)]
fn softmax(scores: &mut [f32], first: usize) -> f32 {
    let mut largest = f32::NEG_INFINITY;
    for score in scores.iter() {
        largest = largest.max(*score);
    }
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let mut sums = FLanes::ZERO;
    for (i, weight) in scores.iter().enumerate() {
        sums.0[(first + i) % LANES] += weight;
    }
    sums.sum()
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = FLanes::ZERO;
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        acc = acc.fma(FLanes::load(a), FLanes::load(b));
    }
    acc.sum()
}
