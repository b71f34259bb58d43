//! Q2_K: `u8 scales[16]; u8 qs[64]; f16 d; f16 dmin`, 16 groups of 16: `d * (sc & 15) * q - dmin * (sc >> 4)`. Each
//! half of a block (128 elements) has 32 bytes; quarter `c` of it is at bits `2 c`.

use super::{Block, Float, NIBBLES, Quant, Rows, Simd, Word};

pub(in crate::kernels) struct Q2K;

impl Quant for Q2K {
    const BLOCK: usize = 256;
    const BYTES: usize = 84;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 3;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        let [.., dm] = rows.quad(at + 68);
        let (d, negative_min) = (dm.f16_low(), dm.f16_high().negative());
        for (i, packed) in rows.quad(at).into_iter().enumerate() {
            let (scales, mins) = (packed.and(NIBBLES), packed.shr(4).and(NIBBLES));
            for byte in 0..4 {
                out.put_scale(4 * i + byte as usize, d.times(scales.byte(byte).to_float()));
                out.put_min(4 * i + byte as usize, negative_min.times(mins.byte(byte).to_float()));
            }
        }
        for half in 0..2 {
            for part in 0..2 {
                for (i, word) in rows.quad(at + 16 + 32 * half + 16 * part).into_iter().enumerate() {
                    let k = 32 * half + 4 * part + i;
                    out.put_q(k, word.and(0x0303_0303));
                    out.put_q(k + 8, word.shr(2).and(0x0303_0303));
                    out.put_q(k + 16, word.shr(4).and(0x0303_0303));
                    out.put_q(k + 24, word.shr(6).and(0x0303_0303));
                }
            }
        }
    }
}
