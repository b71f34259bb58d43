//! The seam between the engine and a model family.

use crate::{
    kv::BlockId,
    storage::{KvShape, KvStorage},
    threads::Threads,
};

/// Rows to compute in one forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The token of each row, `[rows]`.
    pub tokens: &'a [u32],
    /// Whose rows they are, in order; together all rows.
    pub spans: &'a [Span<'a>],
    /// Rows whose logits are wanted, in rising order.
    pub logit_rows: &'a [usize],
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// How many.
    pub rows: usize,
    /// Position of the first in its sequence: so many tokens before it have their KV in the blocks already.
    pub start: usize,
    /// The sequence's blocks, in order, with room for `start + rows` tokens.
    pub blocks: &'a [BlockId],
}

/// A loaded model. A row's result depends on its token, its position and its sequence's KV alone, to the bit.
pub trait Model: Send {
    /// Rows of the embedding, and logits of a row.
    fn vocab_size(&self) -> u32;

    /// What its KV looks like.
    fn kv_shape(&self) -> KvShape;

    /// The threads that it computes with; free for others between passes.
    fn threads(&self) -> &Threads;

    /// Computes a batch: writes keys and values of its rows into their blocks and the wanted logits, `[logit_rows,
    /// vocab]`, into `logits`, whose content is replaced.
    ///
    /// # Panics
    /// When the batch breaks the rules of its types (a token outside the vocabulary, too few blocks).
    fn forward(&mut self, batch: &Batch<'_>, kv: &mut KvStorage, logits: &mut Vec<f32>);
}
