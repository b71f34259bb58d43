//! Q6_K: `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`, 16 groups of 16: `d * sc * (q - 32)`. Each half of a block (128
//! elements) has 64 bytes of low nibbles and 32 bytes of upper bit pairs.

use super::{Block, Float, NIBBLES, Quant, Rows, Simd, Word};

pub(in crate::kernels) struct Q6K;

impl Quant for Q6K {
    const BLOCK: usize = 256;
    const BYTES: usize = 210;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = Some(5);
    const MIN: bool = false;
    const MAX: u32 = 63;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        let [.., last] = rows.quad(at + 194);
        let d = last.f16_high();
        for (i, scales) in rows.quad(at + 192).into_iter().enumerate() {
            for byte in 0..4 {
                out.put_scale(4 * i + byte as usize, d.times(scales.signed_byte(byte).to_float()));
            }
        }
        for half in 0..2 {
            for part in 0..2 {
                let high = rows.quad(at + 128 + 32 * half + 16 * part);
                let first = rows.quad(at + 64 * half + 16 * part);
                let second = rows.quad(at + 64 * half + 32 + 16 * part);
                for i in 0..4 {
                    // Quarter `c` of the half has its upper bits at `2 c` of `qh`; the last two are the high nibbles.
                    let k = 32 * half + 4 * part + i;
                    out.put_q(k, first[i].and(NIBBLES).or(high[i].and(0x0303_0303).shl(4)));
                    out.put_q(k + 8, second[i].and(NIBBLES).or(high[i].and(0x0c0c_0c0c).shl(2)));
                    out.put_q(k + 16, first[i].shr(4).and(NIBBLES).or(high[i].and(0x3030_3030)));
                    out.put_q(k + 24, second[i].shr(4).and(NIBBLES).or(high[i].shr(2).and(0x3030_3030)));
                }
            }
        }
    }
}
