//! Weights in place: a type, a shape and bytes that belong to somebody else.

use std::sync::Arc;

use stoker_types::DType;

use crate::kernels;

/// Memory that holds weights and stays valid and unchanged for as long as the value lives: a worker's mapped pool
/// file, or a plain vector in tests.
pub trait Region: Send + Sync {
    /// The whole region. The same bytes at every call.
    fn bytes(&self) -> &[u8];
}

/// A part of a [`Region`], which it keeps alive. No alignment is needed.
#[derive(Clone)]
pub struct WeightBytes {
    region: Arc<dyn Region>,
    offset: usize,
    len: usize,
}

/// A matrix `[rows, cols]`, row-major, in the type that the checkpoint has it in.
///
/// Used as `y = x W^T`: `cols` inputs, `rows` outputs. A vector (norm, bias) has one row.
#[derive(Debug, Clone)]
pub struct Weight {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: WeightBytes,
}

/// Why bytes can't be used as a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    /// No kernel for this element type.
    #[error(
        "tensor type {dtype} has no kernel (supported: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K)"
    )]
    UnsupportedType {
        /// The type found.
        dtype: DType,
    },
    /// A row isn't a whole number of the type's blocks.
    #[error("rows of {cols} elements aren't whole blocks of {dtype} ({block} elements)")]
    PartialBlock {
        /// The type.
        dtype: DType,
        /// Elements of a row.
        cols: usize,
        /// Elements of a block.
        block: u64,
    },
    /// The byte length isn't what type and shape say.
    #[error("{dtype} [{rows}, {cols}] needs {expected:?} bytes, found {found}")]
    WrongLength {
        /// The type.
        dtype: DType,
        /// Rows.
        rows: usize,
        /// Elements of a row.
        cols: usize,
        /// What it should be; `None` when it overflows.
        expected: Option<usize>,
        /// What it is.
        found: usize,
    },
    /// The bytes lie outside of the region.
    #[error("{len} bytes at offset {offset} lie outside of a region of {region} bytes")]
    OutOfRegion {
        /// Where they start.
        offset: usize,
        /// How many.
        len: usize,
        /// The region's length.
        region: usize,
    },
    /// A matrix without rows or columns.
    #[error("empty weight [{rows}, {cols}]")]
    Empty {
        /// Rows.
        rows: usize,
        /// Elements of a row.
        cols: usize,
    },
}

// === impl Region ===

impl Region for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// === impl WeightBytes ===

impl WeightBytes {
    /// The `len` bytes at `offset` of `region`.
    ///
    /// # Errors
    /// [`WeightError::OutOfRegion`].
    pub fn new(region: Arc<dyn Region>, offset: usize, len: usize) -> Result<Self, WeightError> {
        let total = region.bytes().len();
        match offset.checked_add(len) {
            Some(end) if end <= total => Ok(Self { region, offset, len }),
            _ => Err(WeightError::OutOfRegion { offset, len, region: total }),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn get(&self) -> &[u8] {
        &self.region.bytes()[self.offset..][..self.len]
    }
}

impl std::fmt::Debug for WeightBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightBytes")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

// === impl Weight ===

impl Weight {
    /// Whether there are kernels for this type.
    #[must_use]
    pub fn supports(dtype: DType) -> bool {
        stoker_checkpoint::dequant::COMPUTABLE.contains(&dtype)
    }

    /// A weight over `bytes`.
    ///
    /// # Errors
    /// An unsupported type, an empty shape, or a length that doesn't follow from type and shape.
    pub fn new(dtype: DType, rows: usize, cols: usize, bytes: WeightBytes) -> Result<Self, WeightError> {
        if !Self::supports(dtype) {
            return Err(WeightError::UnsupportedType { dtype });
        }
        if rows == 0 || cols == 0 {
            return Err(WeightError::Empty { rows, cols });
        }
        let row_bytes = dtype.bytes_of(cols as u64).ok_or(WeightError::PartialBlock {
            dtype,
            cols,
            block: dtype.block_elements(),
        })?;
        let expected = usize::try_from(row_bytes).ok().and_then(|b| b.checked_mul(rows));
        if expected != Some(bytes.len) {
            return Err(WeightError::WrongLength { dtype, rows, cols, expected, found: bytes.len });
        }
        Ok(Self { dtype, rows, cols, bytes })
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes, row after row.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get()
    }

    /// Bytes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.bytes.len / self.rows
    }

    /// All elements as f32, row after row: for norms and biases, which are small and used every step.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
            kernels::dequantize_rows(self, &[row], out);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> WeightBytes {
        WeightBytes::new(Arc::new(vec![0u8; len]), 0, len).unwrap()
    }

    #[test]
    fn shape_and_type_are_checked() {
        assert!(Weight::new(DType::Q4_1, 3, 64, bytes(120)).is_ok());
        let wrong = Weight::new(DType::Q4_1, 3, 64, bytes(121)).unwrap_err();
        assert!(matches!(wrong, WeightError::WrongLength { expected: Some(120), found: 121, .. }));
        let partial = Weight::new(DType::Q4_K, 1, 128, bytes(72)).unwrap_err();
        assert!(matches!(partial, WeightError::PartialBlock { block: 256, .. }));
        let kind = Weight::new(DType::IQ4_XS, 1, 256, bytes(136)).unwrap_err();
        assert_eq!(kind, WeightError::UnsupportedType { dtype: DType::IQ4_XS });
        let empty = Weight::new(DType::F32, 0, 4, bytes(0)).unwrap_err();
        assert_eq!(empty, WeightError::Empty { rows: 0, cols: 4 });
        let huge = Weight::new(DType::F32, usize::MAX, 2, bytes(8)).unwrap_err();
        assert!(matches!(huge, WeightError::WrongLength { expected: None, .. }));
    }

    #[test]
    fn the_region_is_checked() {
        let region: Arc<dyn Region> = Arc::new(vec![0u8; 10]);
        assert!(WeightBytes::new(Arc::clone(&region), 4, 6).is_ok());
        for (offset, len) in [(4, 7), (11, 0), (usize::MAX, 2)] {
            let error = WeightBytes::new(Arc::clone(&region), offset, len).unwrap_err();
            assert_eq!(error, WeightError::OutOfRegion { offset, len, region: 10 });
        }
    }
}
