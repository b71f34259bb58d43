//! Q4_0: `f16 d; u8 qs[16]`, `d * (q - 8)`.

use super::{Block, Quant, Rows, Simd, Word, nibbles};

pub(in crate::kernels) struct Q4_0;

impl Quant for Q4_0 {
    const BLOCK: usize = 32;
    const BYTES: usize = 18;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = Some(3);
    const MIN: bool = false;
    const MAX: u32 = 15;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        out.put_scale(0, rows.quad(at)[0].f16_low());
        nibbles(rows.quad(at + 2), out);
    }
}
