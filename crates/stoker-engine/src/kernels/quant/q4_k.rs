//! Q4_K: `f16 d; f16 dmin; u8 scales[12]; u8 qs[128]`, 8 groups of 32: `d * sc * q - dmin * m`. Each 32 bytes of
//! `qs` hold two groups: the low nibbles, then the high ones.

use super::{Block, NIBBLES, Quant, Rows, Simd, Word, scales_and_mins};

pub(in crate::kernels) struct Q4K;

impl Quant for Q4K {
    const BLOCK: usize = 256;
    const BYTES: usize = 144;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 15;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        scales_and_mins(rows, at, out);
        for pair in 0..4 {
            for part in 0..2 {
                let words = rows.quad(at + 16 + 32 * pair + 16 * part);
                for (i, word) in words.into_iter().enumerate() {
                    out.put_q(16 * pair + 4 * part + i, word.and(NIBBLES));
                    out.put_q(16 * pair + 8 + 4 * part + i, word.shr(4).and(NIBBLES));
                }
            }
        }
    }
}
