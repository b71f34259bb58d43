//! Q5_K: `f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]`: as Q4_K, with bit `g` of `qh[i]` the fifth bit of
//! element `i` of group `g`.

use super::{Block, NIBBLES, Quant, Rows, Simd, Word, scales_and_mins};

pub(in crate::kernels) struct Q5K;

impl Quant for Q5K {
    const BLOCK: usize = 256;
    const BYTES: usize = 176;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        scales_and_mins(rows, at, out);
        for part in 0..2 {
            let mut high = rows.quad(at + 16 + 16 * part);
            for pair in 0..4 {
                let words = rows.quad(at + 48 + 32 * pair + 16 * part);
                for i in 0..4 {
                    let (first, second) = (high[i].and(0x0101_0101).shl(4), high[i].and(0x0202_0202).shl(3));
                    out.put_q(16 * pair + 4 * part + i, words[i].and(NIBBLES).or(first));
                    out.put_q(16 * pair + 8 + 4 * part + i, words[i].shr(4).and(NIBBLES).or(second));
                    high[i] = high[i].shr(2);
                }
            }
        }
    }
}
