//! Reading the same place of sixteen weight rows into lanes: lane `i` is row `i`. With that, unpacking a quantised
//! type is the same bit operation on all lanes, and the result has the order that the dot products want: four
//! consecutive elements of a row in one 32-bit lane.

use super::simd::{LANES, Simd};

/// Sixteen rows of a weight, one behind the other, of which the same place is read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, S> {
    bytes: &'a [u8],
    row_bytes: usize,
    simd: S,
}

// === impl Rows ===

impl<'a, S: Simd> Rows<'a, S> {
    /// The first sixteen rows, of `row_bytes` each, of `bytes`.
    ///
    /// # Panics
    /// When there are fewer.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], row_bytes: usize, simd: S) -> Self {
        Self { bytes: &bytes[..LANES * row_bytes], row_bytes, simd }
    }

    /// The 16 bytes at `at`, as four words.
    ///
    /// # Panics
    /// When they lie outside of the row.
    #[inline(always)]
    pub(super) fn quad(&self, at: usize) -> [S::Word; 4] {
        assert!(at + 16 <= self.row_bytes, "read past the end of a row");
        // SAFETY: there are sixteen rows of `row_bytes` readable bytes (`new`), and `at` was checked above.
        unsafe { self.simd.quad(self.bytes.as_ptr().add(at), self.row_bytes) }
    }
}
