//! Sixteen unpacked weight rows times some activation rows: the inner loop of everything quantised.
//!
//! The arithmetic, the same in every version and for any number of rows, per output and group of 16 or 32 elements,
//! in order:
//!
//! ```text
//! isum = sum((q_w - OFFSET) * q_x)              exact, 32-bit integers
//! acc  = fma(scale_w * scale_x, isum, acc)      the product rounded to f32, then one fused step
//! acc  = fma(min_w, scaled_sum_x, acc)          types with a minimum only
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use super::{
    activations::Quantised,
    quant::Quant,
    simd::{FLanes, Lanes, Plain, Simd},
};

/// Sixteen weight rows, some columns, unpacked.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[columns / 4]`: lane = row, byte = column.
    pub(super) q: &'a [Lanes],
    /// `[columns / GROUP]`.
    pub(super) scale: &'a [FLanes],
    /// As `scale`; unused by types without a minimum.
    pub(super) min: &'a [FLanes],
}

/// The tile's columns of some activation rows.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    x: Quantised<'a>,
    row: usize,
    col: usize,
}

/// An instruction set's version of the inner loop.
pub(super) trait Dot: Simd {
    /// `acc[r]` goes on with the tile's columns of activation row `r`; lane = weight row.
    fn dot<Q: Quant, const R: usize>(self, tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]);
}

impl Dot for Plain {
    #[inline(always)]
    fn dot<Q: Quant, const R: usize>(self, tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]) {
        plain::dot::<Q, R>(tile, input, acc);
    }
}

// === impl Input ===

impl<'a> Input<'a> {
    /// Columns from `col` (a multiple of 32) of rows from `row`.
    pub(super) fn new(x: Quantised<'a>, row: usize, col: usize) -> Self {
        debug_assert!(col.is_multiple_of(32), "a chunk starts inside of a block");
        Self { x, row, col }
    }

    /// The same from `rows` rows further down.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn below(self, rows: usize) -> Self {
        Self { row: self.row + rows, ..self }
    }

    /// `columns` quantised elements of row `r`.
    #[inline(always)]
    fn q(&self, r: usize, columns: usize) -> &'a [i8] {
        &self.x.q[(self.row + r) * self.x.cols + self.col..][..columns]
    }

    /// Their scales, one for 32 elements.
    #[inline(always)]
    fn scale(&self, r: usize, columns: usize) -> &'a [f32] {
        &self.x.scale[((self.row + r) * self.x.cols + self.col) / 32..][..columns.div_ceil(32)]
    }

    /// Their negative sums, one for `group` elements.
    #[inline(always)]
    fn negative_sum(&self, r: usize, columns: usize, group: usize) -> &'a [i32] {
        let sums = self.x.negative_sum[usize::from(group == 32)];
        &sums[((self.row + r) * self.x.cols + self.col) / group..][..columns / group]
    }

    /// Their scaled sums, one for `group` elements.
    #[inline(always)]
    fn scaled_sum(&self, r: usize, columns: usize, group: usize) -> &'a [f32] {
        let sums = self.x.scaled_sum[usize::from(group == 32)];
        &sums[((self.row + r) * self.x.cols + self.col) / group..][..columns / group]
    }
}

// === impl Tile ===

impl Tile<'_> {
    /// Columns, after checking that the parts belong together.
    #[inline(always)]
    fn columns<Q: Quant>(&self) -> usize {
        let columns = 4 * self.q.len();
        assert_eq!(self.scale.len() * Q::GROUP, columns, "a tile whose parts don't belong together");
        assert!(!Q::MIN || self.min.len() * Q::GROUP == columns, "a tile whose parts don't belong together");
        columns
    }
}
