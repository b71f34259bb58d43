//! Q5_0: `f16 d; u32 qh; u8 qs[16]`, `d * (q - 16)`; bit `i` of `qh` is the fifth bit of element `i`.

use super::{Block, Quant, Rows, Simd, Word, nibbles_and_fifth_bits};

pub(in crate::kernels) struct Q5_0;

impl Quant for Q5_0 {
    const BLOCK: usize = 32;
    const BYTES: usize = 22;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = Some(4);
    const MIN: bool = false;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        // `qh` starts in the middle of a word.
        let [first, second, ..] = rows.quad(at);
        out.put_scale(0, first.f16_low());
        nibbles_and_fifth_bits(rows.quad(at + 6), first.shr(16).or(second.shl(16)), out);
    }
}
