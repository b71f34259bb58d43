//! Reading the same place of sixteen weight rows into lanes: lane `i` is row `i`. With that, unpacking a quantised
//! type is the same bit operation on all lanes, and the result has the order that the dot products want: four
//! consecutive elements of a row in one 32-bit lane.

use std::marker::PhantomData;

use super::simd::{LANES, Simd};

/// Sixteen rows of a weight of which the same place is read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, S> {
    start: [*const u8; LANES],
    row_bytes: usize,
    simd: S,
    bytes: PhantomData<&'a [u8]>,
}

// === impl Rows ===

impl<'a, S: Simd> Rows<'a, S> {
    /// Rows `numbers` of the matrix `bytes` with rows of `row_bytes`.
    ///
    /// # Panics
    /// When a row lies outside of the matrix.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], row_bytes: usize, numbers: [usize; LANES], simd: S) -> Self {
        let start = numbers.map(|row| bytes[row * row_bytes..][..row_bytes].as_ptr());
        Self { start, row_bytes, simd, bytes: PhantomData }
    }

    /// The 16 bytes at `at`, as four words.
    ///
    /// # Panics
    /// When they lie outside of the row.
    #[inline(always)]
    pub(super) fn quad(&self, at: usize) -> [S::Word; 4] {
        assert!(at + 16 <= self.row_bytes, "read past the end of a row");
        let mut rows = self.start;
        for row in &mut rows {
            *row = row.wrapping_add(at);
        }
        // SAFETY: `start` are rows of `row_bytes` readable bytes (checked in `new`), and `at` was checked above.
        unsafe { self.simd.quad(&rows) }
    }
}
