//! Q8_0: `f16 d; i8 qs[32]`, `d * q`. Stored signed; 128 is added here and taken off as the offset.

use super::{Block, Quant, Rows, Simd, Word};

pub(in crate::kernels) struct Q8_0;

impl Quant for Q8_0 {
    const BLOCK: usize = 32;
    const BYTES: usize = 34;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = Some(7);
    const MIN: bool = false;
    const MAX: u32 = 255;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        out.put_scale(0, rows.quad(at)[0].f16_low());
        for part in 0..2 {
            for (i, word) in rows.quad(at + 2 + 16 * part).into_iter().enumerate() {
                out.put_q(4 * part + i, word.xor(0x8080_8080));
            }
        }
    }
}
