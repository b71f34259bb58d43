//! The memory of the KV cache.

use crate::{EngineError, kv::BLOCK_TOKENS};

/// What a model's KV looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers with attention.
    pub layers: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

/// Keys and values of one layer: `[blocks, BLOCK_TOKENS, kv_heads, head_dim]` each.
#[derive(Debug, Default)]
pub struct KvLayer {
    /// Keys, rotated.
    pub keys: Vec<f32>,
    /// Values.
    pub values: Vec<f32>,
}

/// Keys and values of all layers. Address space is taken for all blocks at once, memory as blocks are first used; it is
/// given back when the storage is dropped.
#[derive(Debug)]
pub struct KvStorage {
    shape: KvShape,
    layers: Vec<KvLayer>,
    capacity: usize,
    /// Blocks that have memory.
    ready: usize,
}

// === impl KvShape ===

impl KvShape {
    /// Elements of the keys, or the values, of one token in one layer.
    #[must_use]
    pub const fn row(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of a block: keys and values of all layers, in f32.
    #[must_use]
    pub const fn block_bytes(&self) -> u64 {
        2 * 4 * (self.layers * BLOCK_TOKENS * self.row()) as u64
    }
}

// === impl KvStorage ===

impl KvStorage {
    /// Storage for `capacity` blocks. No memory yet.
    ///
    /// # Errors
    /// [`EngineError::KvAddressSpace`].
    pub fn new(shape: KvShape, capacity: usize) -> Result<Self, EngineError> {
        let bytes = shape.block_bytes().saturating_mul(capacity as u64);
        let failed = || EngineError::KvAddressSpace { bytes };
        let elements = capacity.checked_mul(BLOCK_TOKENS * shape.row()).ok_or_else(failed)?;
        let mut layers = Vec::with_capacity(shape.layers);
        for _ in 0..shape.layers {
            let mut layer = KvLayer::default();
            // Reserved exactly, so that growing never moves or copies; untouched pages take no memory.
            layer.keys.try_reserve_exact(elements).map_err(|_| failed())?;
            layer.values.try_reserve_exact(elements).map_err(|_| failed())?;
            layers.push(layer);
        }
        Ok(Self { shape, layers, capacity, ready: 0 })
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Sees to it that the first `blocks` blocks have memory.
    ///
    /// # Panics
    /// When that is above the capacity.
    pub fn ensure(&mut self, blocks: usize) {
        assert!(blocks <= self.capacity, "{blocks} blocks in a storage of {}", self.capacity);
        if blocks <= self.ready {
            return;
        }
        // Some ahead, so that not every block is a round over all layers.
        self.ready = (blocks + blocks / 8 + 1).min(self.capacity);
        let elements = self.ready * BLOCK_TOKENS * self.shape.row();
        for layer in &mut self.layers {
            layer.keys.resize(elements, 0.0);
            layer.values.resize(elements, 0.0);
        }
    }

    /// A layer's keys and values.
    ///
    /// # Panics
    /// When there is no such layer.
    #[must_use]
    pub fn layer(&self, layer: usize) -> &KvLayer {
        &self.layers[layer]
    }

    /// A layer's keys and values, to write.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> &mut KvLayer {
        &mut self.layers[layer]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 3, head_dim: 4 };

    #[test]
    fn memory_grows_in_place_up_to_the_capacity() {
        let mut storage = KvStorage::new(SHAPE, 10).unwrap();
        assert!(storage.layer(0).keys.is_empty());
        let reserved = storage.layer(1).values.as_ptr();
        storage.ensure(1);
        storage.layer_mut(1).values[5] = 7.0;
        storage.ensure(10);
        let block = BLOCK_TOKENS * SHAPE.row();
        assert_eq!(storage.layer(1).values.len(), 10 * block);
        assert_eq!(storage.layer(1).values.as_ptr(), reserved);
        assert_eq!(storage.layer(1).values[5], 7.0);
        assert_eq!(SHAPE.block_bytes(), 2 * 2 * 4 * block as u64);
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        let huge = KvStorage::new(SHAPE, usize::MAX / 1024).unwrap_err();
        assert!(matches!(huge, EngineError::KvAddressSpace { .. }));
        assert!(!huge.not_runnable());
    }
}
