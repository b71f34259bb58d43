//! Reading the same place of sixteen weight rows into lanes: lane `i` is row `i`. With that, unpacking a quantised
//! type is the same bit operation on all lanes, and the result has the order that the dot products want: four
//! consecutive elements of a row in one 32-bit lane.

use std::marker::PhantomData;

use super::lanes::{LANES, Lanes};

/// How four 32-bit words at sixteen addresses become lanes. A value is the permission to use its instructions.
pub(super) trait Gather: Copy {
    /// `out[w].0[row]` is the word `w` at `rows[row]`.
    ///
    /// # Safety
    /// 16 bytes must be readable at each address.
    unsafe fn quad(self, rows: &[*const u8; LANES]) -> [Lanes; 4];
}

/// Sixteen rows of a weight of which the same place is read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, G> {
    start: [*const u8; LANES],
    row_bytes: usize,
    gather: G,
    bytes: PhantomData<&'a [u8]>,
}

/// Gather without special instructions.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Gather for Plain {
    #[inline(always)]
    unsafe fn quad(self, rows: &[*const u8; LANES]) -> [Lanes; 4] {
        let mut out = [Lanes::ZERO; 4];
        for (lane, row) in rows.iter().enumerate() {
            for (word, out) in out.iter_mut().enumerate() {
                // SAFETY: the caller says that 16 bytes are readable; no alignment is needed.
                out.0[lane] = u32::from_le(unsafe { row.cast::<u32>().add(word).read_unaligned() });
            }
        }
        out
    }
}

// === impl Rows ===

impl<'a, G: Gather> Rows<'a, G> {
    /// Rows `numbers` of the matrix `bytes` with rows of `row_bytes`.
    ///
    /// # Panics
    /// When a row lies outside of the matrix.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], row_bytes: usize, numbers: [usize; LANES], gather: G) -> Self {
        let start = numbers.map(|row| bytes[row * row_bytes..][..row_bytes].as_ptr());
        Self { start, row_bytes, gather, bytes: PhantomData }
    }

    /// The 16 bytes at `at`, as four words.
    ///
    /// # Panics
    /// When they lie outside of the row.
    #[inline(always)]
    pub(super) fn quad(&self, at: usize) -> [Lanes; 4] {
        assert!(at + 16 <= self.row_bytes, "read past the end of a row");
        let mut rows = self.start;
        for row in &mut rows {
            *row = row.wrapping_add(at);
        }
        // SAFETY: `start` are rows of `row_bytes` readable bytes (checked in `new`), and `at` was checked above.
        unsafe { self.gather.quad(&rows) }
    }

    /// The 4 bytes at `at`.
    ///
    /// # Panics
    /// When they lie outside of the row.
    #[inline(always)]
    pub(super) fn word(&self, at: usize) -> Lanes {
        assert!(at + 4 <= self.row_bytes, "read past the end of a row");
        let mut out = Lanes::ZERO;
        for (out, row) in out.0.iter_mut().zip(&self.start) {
            // SAFETY: as in `quad`; no alignment is needed.
            *out = u32::from_le(unsafe { row.add(at).cast::<u32>().read_unaligned() });
        }
        out
    }

    /// The 2 bytes at `at`.
    ///
    /// # Panics
    /// When they lie outside of the row.
    #[inline(always)]
    pub(super) fn half(&self, at: usize) -> Lanes {
        assert!(at + 2 <= self.row_bytes, "read past the end of a row");
        let mut out = Lanes::ZERO;
        for (out, row) in out.0.iter_mut().zip(&self.start) {
            // SAFETY: as in `quad`; no alignment is needed.
            *out = u32::from(u16::from_le(unsafe { row.add(at).cast::<u16>().read_unaligned() }));
        }
        out
    }
}
