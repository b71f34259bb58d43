//! The quantised weight types, one per file: how sixteen rows of one block become numbers that are the same for all
//! types, see [`Quant`]. Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.

mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

pub(super) use self::{
    q2_k::Q2K, q3_k::Q3K, q4_0::Q4_0, q4_1::Q4_1, q4_k::Q4K, q5_0::Q5_0, q5_1::Q5_1, q5_k::Q5K, q6_k::Q6K,
    q8_0::Q8_0,
};
use super::{
    gather::Rows,
    simd::{FLanes, Float, Lanes, Simd, Word},
};

/// A quantised type. An element is `scale * (q - OFFSET) + min`, with an unsigned `q`, and `scale` and `min` of
/// its group.
pub(super) trait Quant {
    /// Elements of a block.
    const BLOCK: usize;
    /// Bytes of a block; at least 16.
    const BYTES: usize;
    /// Elements that share a scale: 16 or 32.
    const GROUP: usize;
    /// Base-2 logarithm of what is taken off every `q`; `None`: nothing.
    const OFFSET_LOG2: Option<u32>;
    /// Whether there is a `min`.
    const MIN: bool;
    /// The largest `q`.
    const MAX: u32;

    /// Unpacks the block at byte `at` of sixteen rows.
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>);
}

/// One block of sixteen rows, unpacked. Lane = row.
pub(super) struct Block<'a> {
    /// `[BLOCK / 4]`: four consecutive elements in a lane, the first in the lowest byte.
    pub(super) q: &'a mut [Lanes],
    /// `[BLOCK / GROUP]`.
    pub(super) scale: &'a mut [FLanes],
    /// As `scale`; not written without [`Quant::MIN`].
    pub(super) min: &'a mut [FLanes],
}

impl Block<'_> {
    #[inline(always)]
    fn put_q(&mut self, i: usize, word: impl Word) {
        word.store(&mut self.q[i]);
    }

    #[inline(always)]
    fn put_scale(&mut self, group: usize, scale: impl Float) {
        scale.store(&mut self.scale[group].0);
    }

    #[inline(always)]
    fn put_min(&mut self, group: usize, min: impl Float) {
        min.store(&mut self.min[group].0);
    }
}

/// The low nibble of every byte.
const NIBBLES: u32 = 0x0f0f_0f0f;

/// The 32 nibbles of 16 bytes: all low ones, then all high ones.
#[inline(always)]
fn nibbles<W: Word>(packed: [W; 4], out: &mut Block<'_>) {
    for (i, word) in packed.into_iter().enumerate() {
        out.put_q(i, word.and(NIBBLES));
        out.put_q(i + 4, word.shr(4).and(NIBBLES));
    }
}

/// As [`nibbles`]; bit `i` of `high` is the fifth bit of element `i`.
#[inline(always)]
fn nibbles_and_fifth_bits<W: Word>(packed: [W; 4], high: W, out: &mut Block<'_>) {
    let (mut low, mut upper) = (high, high.shr(16));
    for (i, word) in packed.into_iter().enumerate() {
        out.put_q(i, word.and(NIBBLES).or(spread(low)));
        out.put_q(i + 4, word.shr(4).and(NIBBLES).or(spread(upper)));
        low = low.shr(4);
        upper = upper.shr(4);
    }
}

/// Each of the four lowest bits into bit 4 of its own byte: copies, each one further to the right, and of each byte the
/// lowest bit.
#[inline(always)]
fn spread<W: Word>(bits: W) -> W {
    let four = bits.and(0xf);
    let two = four.or(four.shl(14));
    two.or(two.shl(7)).and(0x0101_0101).shl(4)
}

/// The first 16 bytes of Q4_K and Q5_K: `d`, `dmin`, and eight 6-bit scales and mins in 12 bytes.
#[inline(always)]
fn scales_and_mins<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
    let [dm, a, b, c] = rows.quad(at);
    let (d, negative_min) = (dm.f16_low(), dm.f16_high().negative());
    let scales = [a.and(0x3f3f_3f3f), c.and(NIBBLES).or(a.shr(2).and(0x3030_3030))];
    let mins = [b.and(0x3f3f_3f3f), c.shr(4).and(NIBBLES).or(b.shr(2).and(0x3030_3030))];
    for (i, (scales, mins)) in scales.into_iter().zip(mins).enumerate() {
        for byte in 0..4 {
            out.put_scale(4 * i + byte as usize, d.times(scales.byte(byte).to_float()));
            out.put_min(4 * i + byte as usize, negative_min.times(mins.byte(byte).to_float()));
        }
    }
}
