//! Q2_K: `u8 scales[16]; u8 qs[64]; f16 d; f16 dmin`, 16 groups of 16: `d * (sc & 15) * q - dmin * (sc >> 4)`. Each
//! half of a block (128 elements) has 32 bytes; quarter `c` of it is at bits `2 c`.

use super::{FLanes, Gather, Lanes, NIBBLES, Quant, Rows};

pub(in crate::kernels) struct Q2K;

impl Quant for Q2K {
    const BLOCK: usize = 256;
    const BYTES: usize = 84;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 3;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        min: &mut [FLanes],
    ) {
        let dm = rows.word(at + 80);
        let (d, negative_min) = (dm.f16_low(), dm.f16_high().neg());
        let packed = rows.quad(at);
        for group in 0..16 {
            let shift = 8 * (group % 4);
            scale[group] = d.mul(packed[group / 4].and(NIBBLES).byte_f32(shift));
            min[group] = negative_min.mul(packed[group / 4].shr(4).and(NIBBLES).byte_f32(shift));
        }
        for half in 0..2 {
            for part in 0..2 {
                let words = rows.quad(at + 16 + 32 * half + 16 * part);
                for quarter in 0..4 {
                    for (i, word) in words.into_iter().enumerate() {
                        q[32 * half + 8 * quarter + 4 * part + i] = word.shr(2 * quarter).and(0x0303_0303);
                    }
                }
            }
        }
    }
}
