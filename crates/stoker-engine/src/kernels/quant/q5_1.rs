//! Q5_1: `f16 d; f16 m; u32 qh; u8 qs[16]`, `d * q + m`; bit `i` of `qh` is the fifth bit of element `i`.

use super::{Block, Quant, Rows, Simd, Word, nibbles_and_fifth_bits};

pub(in crate::kernels) struct Q5_1;

impl Quant for Q5_1 {
    const BLOCK: usize = 32;
    const BYTES: usize = 24;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        let [dm, high, ..] = rows.quad(at);
        out.put_scale(0, dm.f16_low());
        out.put_min(0, dm.f16_high());
        nibbles_and_fifth_bits(rows.quad(at + 8), high, out);
    }
}
