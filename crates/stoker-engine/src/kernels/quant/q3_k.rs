//! Q3_K: `u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d`, 16 groups of 16: `d * (sc - 32) * (q - 4)`. Low bits as in Q2_K;
//! the third bit of quarter `c` of half `h` is bit `4 h + c` of `hmask`.

use super::{Block, Float, NIBBLES, Quant, Rows, Simd, Word};

pub(in crate::kernels) struct Q3K;

impl Quant for Q3K {
    const BLOCK: usize = 256;
    const BYTES: usize = 110;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = Some(2);
    const MIN: bool = false;
    const MAX: u32 = 7;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        let [.., last] = rows.quad(at + 94);
        let d = last.f16_high();
        // Sixteen 6-bit scales: nibbles of the first 8 bytes, upper pairs from the last 4.
        let [_, a, b, c] = rows.quad(at + 92);
        let scales = [
            a.and(NIBBLES).or(c.and(0x0303_0303).shl(4)),
            b.and(NIBBLES).or(c.and(0x0c0c_0c0c).shl(2)),
            a.shr(4).and(NIBBLES).or(c.and(0x3030_3030)),
            b.shr(4).and(NIBBLES).or(c.shr(2).and(0x3030_3030)),
        ];
        for (i, scales) in scales.into_iter().enumerate() {
            for byte in 0..4 {
                out.put_scale(4 * i + byte as usize, d.times(scales.byte(byte).minus(32).to_float()));
            }
        }
        for part in 0..2 {
            let mut third = rows.quad(at + 16 * part);
            for half in 0..2 {
                for (i, word) in rows.quad(at + 32 + 32 * half + 16 * part).into_iter().enumerate() {
                    let k = 32 * half + 4 * part + i;
                    let high = third[i];
                    out.put_q(k, word.and(0x0303_0303).or(high.and(0x0101_0101).shl(2)));
                    out.put_q(k + 8, word.shr(2).and(0x0303_0303).or(high.and(0x0202_0202).shl(1)));
                    out.put_q(k + 16, word.shr(4).and(0x0303_0303).or(high.and(0x0404_0404)));
                    out.put_q(k + 24, word.shr(6).and(0x0303_0303).or(high.shr(1).and(0x0404_0404)));
                    third[i] = high.shr(4);
                }
            }
        }
    }
}
