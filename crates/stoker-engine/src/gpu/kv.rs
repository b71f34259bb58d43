//! The memory of the KV cache on a device.

use stoker_device::{CudaDevice, GrowingMemory};
use stoker_types::ByteSize;

use crate::{EngineError, kv::BLOCK_TOKENS, storage::KvShape};

/// Memory comes in pieces of about this many bytes.
const GRANULE: ByteSize = ByteSize::mib(64);

/// Keys and values of all layers, `[blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim]`. Addresses are taken for all blocks
/// at once, memory as blocks are first used; it goes back when this is dropped.
pub(super) struct GpuKv {
    shape: KvShape,
    element: u64,
    memory: Option<GrowingMemory>,
}

// === impl GpuKv ===

impl GpuKv {
    /// None yet. `element`: bytes of one.
    pub(super) fn new(shape: KvShape, element: u64) -> Self {
        Self { shape, element, memory: None }
    }

    pub(super) fn block_bytes(&self) -> u64 {
        2 * self.part() * self.shape.layers as u64
    }

    /// Addresses for `capacity` blocks, and memory for about the first `ahead` bytes of them.
    pub(super) fn open(
        &mut self,
        device: &CudaDevice,
        capacity: usize,
        ahead: u64,
    ) -> Result<(), EngineError> {
        self.memory = None;
        let bytes = self.block_bytes().saturating_mul(capacity as u64);
        let mut memory = GrowingMemory::new(device, ByteSize(bytes), GRANULE)?;
        memory.grow(ByteSize(ahead.min(bytes)))?;
        self.memory = Some(memory);
        Ok(())
    }

    pub(super) fn grow(&mut self, blocks: usize) -> Result<(), EngineError> {
        let bytes = ByteSize(self.block_bytes().saturating_mul(blocks as u64));
        match &mut self.memory {
            Some(memory) if memory.bytes() < bytes => Ok(memory.grow(bytes)?),
            Some(_) => Ok(()),
            None => Err(EngineError::KvAddressSpace { bytes: bytes.bytes() }),
        }
    }

    /// Bytes that have memory.
    pub(super) fn bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.bytes().bytes())
    }

    /// The address of the first block.
    pub(super) fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, GrowingMemory::address)
    }

    /// Within a block, the first byte of a layer's keys and of its values.
    pub(super) fn layer(&self, layer: usize) -> (u64, u64) {
        let keys = 2 * self.part() * layer as u64;
        (keys, keys + self.part())
    }

    /// Bytes of a block's keys, or values, in one layer.
    fn part(&self) -> u64 {
        (self.shape.row() * BLOCK_TOKENS) as u64 * self.element
    }
}
