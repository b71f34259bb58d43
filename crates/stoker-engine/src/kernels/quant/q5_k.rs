//! Q5_K: `f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]`: as Q4_K, with bit `g` of `qh[i]` the fifth bit of
//! element `i` of group `g`.

use super::{FLanes, Gather, Lanes, NIBBLES, Quant, Rows, scales_and_mins};

pub(in crate::kernels) struct Q5K;

impl Quant for Q5K {
    const BLOCK: usize = 256;
    const BYTES: usize = 176;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        min: &mut [FLanes],
    ) {
        let dm = rows.word(at);
        let (d, negative_min) = (dm.f16_low(), dm.f16_high().neg());
        let (scales, mins) = scales_and_mins(rows, at + 4);
        for group in 0..8 {
            let shift = 8 * (group % 4);
            scale[group] = d.mul(scales[group / 4].byte_f32(shift));
            min[group] = negative_min.mul(mins[group / 4].byte_f32(shift));
        }
        for part in 0..2 {
            let high = rows.quad(at + 16 + 16 * part);
            for pair in 0..4 {
                let words = rows.quad(at + 48 + 32 * pair + 16 * part);
                for (i, word) in words.into_iter().enumerate() {
                    let fifth = |group: usize| high[i].shr(group).and(0x0101_0101).shl(4);
                    q[16 * pair + 4 * part + i] = word.and(NIBBLES).or(fifth(2 * pair));
                    q[16 * pair + 8 + 4 * part + i] = word.shr(4).and(NIBBLES).or(fifth(2 * pair + 1));
                }
            }
        }
    }
}
