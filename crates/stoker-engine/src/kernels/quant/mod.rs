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
    gather::{Gather, Rows},
    lanes::{FLanes, Lanes},
};

/// A quantised type. An element is `scale * (q - OFFSET) + min`, with an unsigned `q`, and `scale` and `min` of
/// its group.
pub(super) trait Quant {
    /// Elements of a block.
    const BLOCK: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Elements that share a scale: 16 or 32.
    const GROUP: usize;
    /// Base-2 logarithm of what is taken off every `q`; `None`: nothing.
    const OFFSET_LOG2: Option<u32>;
    /// Whether there is a `min`.
    const MIN: bool;
    /// The largest `q`.
    const MAX: u32;

    /// Unpacks the block at byte `at` of sixteen rows. `q`: `[BLOCK / 4]`, four consecutive elements of a row in a
    /// lane, the first in the lowest byte; `scale`, `min`: `[BLOCK / GROUP]`. `min` isn't written without [`MIN`](Self::MIN).
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        min: &mut [FLanes],
    );
}

/// The low nibble of every byte.
const NIBBLES: u32 = 0x0f0f_0f0f;

/// The 32 nibbles of 16 bytes: all low ones, then all high ones.
#[inline(always)]
fn nibbles(packed: [Lanes; 4], q: &mut [Lanes]) {
    for (i, word) in packed.into_iter().enumerate() {
        q[i] = word.and(NIBBLES);
        q[i + 4] = word.shr(4).and(NIBBLES);
    }
}

/// Bits `4 i..4 i + 4` of each lane, each into bit 4 of its own byte: the fifth bits of Q5_0 and Q5_1.
#[inline(always)]
fn fifth_bits(bits: Lanes, i: usize) -> Lanes {
    bits.map(|v| {
        let four = (v >> (4 * i)) & 0xf;
        // A copy in each byte, each one bit further to the right: the wanted bit is the byte's lowest.
        let spread = four | (four << 7) | (four << 14) | (four << 21);
        (spread & 0x0101_0101) << 4
    })
}

/// The eight 6-bit scales and eight 6-bit mins of Q4_K and Q5_K, packed in 12 bytes: two lanes of four bytes each.
#[inline(always)]
fn scales_and_mins<G: Gather>(rows: &Rows<'_, G>, at: usize) -> ([Lanes; 2], [Lanes; 2]) {
    let [a, b, c] = [rows.word(at), rows.word(at + 4), rows.word(at + 8)];
    let scales = [a.and(0x3f3f_3f3f), c.and(NIBBLES).or(a.shr(2).and(0x3030_3030))];
    let mins = [b.and(0x3f3f_3f3f), c.shr(4).and(NIBBLES).or(b.shr(2).and(0x3030_3030))];
    (scales, mins)
}
