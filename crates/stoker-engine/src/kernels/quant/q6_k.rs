//! Q6_K: `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`, 16 groups of 16: `d * sc * (q - 32)`. Each half of a block (128
//! elements) has 64 bytes of low nibbles and 32 bytes of upper bit pairs.

use super::{FLanes, Gather, Lanes, NIBBLES, Quant, Rows};

pub(in crate::kernels) struct Q6K;

impl Quant for Q6K {
    const BLOCK: usize = 256;
    const BYTES: usize = 210;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = Some(5);
    const MIN: bool = false;
    const MAX: u32 = 63;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        _min: &mut [FLanes],
    ) {
        let d = rows.half(at + 208).f16_low();
        let scales = rows.quad(at + 192);
        for (group, scale) in scale.iter_mut().enumerate() {
            *scale = d.mul(scales[group / 4].signed_byte_f32(8 * (group % 4)));
        }
        for half in 0..2 {
            for part in 0..2 {
                let high = rows.quad(at + 128 + 32 * half + 16 * part);
                for column in 0..2 {
                    let low = rows.quad(at + 64 * half + 32 * column + 16 * part);
                    for i in 0..4 {
                        // Quarter `c` of the half: bits `2 c` of `qh`; the last two quarters are the high nibbles.
                        let upper = |c: usize| high[i].shr(2 * c).and(0x0303_0303).shl(4);
                        let k = 32 * half + 8 * column + 4 * part + i;
                        q[k] = low[i].and(NIBBLES).or(upper(column));
                        q[k + 16] = low[i].shr(4).and(NIBBLES).or(upper(column + 2));
                    }
                }
            }
        }
    }
}
