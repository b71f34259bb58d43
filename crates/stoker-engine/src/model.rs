//! The seam between the engine and a model family.

use crate::{EngineError, kv::BlockId, threads::Threads};

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

    /// Bytes of a KV block: keys and values of all layers.
    fn kv_block_bytes(&self) -> u64;

    /// Device memory that it has now, beside the weights; 0 on the CPU.
    fn device_bytes(&self) -> u64 {
        0
    }

    /// Takes addresses for `capacity` KV blocks, and no memory yet. What was there of KV is gone.
    ///
    /// # Errors
    /// [`EngineError::KvAddressSpace`]; the device's.
    fn open_kv(&mut self, capacity: usize) -> Result<(), EngineError>;

    /// Sees to it that the first `blocks` blocks have memory, of as many as were opened.
    ///
    /// # Errors
    /// The device's. What was there stays.
    fn grow_kv(&mut self, blocks: usize) -> Result<(), EngineError>;

    /// Threads of the host: a model on the CPU computes with them. Free for others between passes.
    fn threads(&self) -> &Threads;

    /// Computes a batch: writes keys and values of its rows into their blocks, and the wanted logits to where
    /// [`logits`](Self::logits) has them.
    ///
    /// # Errors
    /// The device's; nothing is known of the rows' KV then.
    ///
    /// # Panics
    /// When the batch breaks the rules of its types (a token outside the vocabulary, too few blocks).
    fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError>;

    /// The logits of the last pass that went well, `[logit_rows, vocab]`.
    fn logits(&self) -> &[f32];
}
