//! Q4_K: `f16 d; f16 dmin; u8 scales[12]; u8 qs[128]`, 8 groups of 32: `d * sc * q - dmin * m`. Each 32 bytes of
//! `qs` hold two groups: the low nibbles, then the high ones.

use super::{FLanes, Gather, Lanes, NIBBLES, Quant, Rows, scales_and_mins};

pub(in crate::kernels) struct Q4K;

impl Quant for Q4K {
    const BLOCK: usize = 256;
    const BYTES: usize = 144;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 15;

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
        for pair in 0..4 {
            for part in 0..2 {
                let words = rows.quad(at + 16 + 32 * pair + 16 * part);
                for (i, word) in words.into_iter().enumerate() {
                    q[16 * pair + 4 * part + i] = word.and(NIBBLES);
                    q[16 * pair + 8 + 4 * part + i] = word.shr(4).and(NIBBLES);
                }
            }
        }
    }
}
