//! Q4_1: `f16 d; f16 m; u8 qs[16]`, `d * q + m`.

use super::{Block, Quant, Rows, Simd, Word, nibbles};

pub(in crate::kernels) struct Q4_1;

impl Quant for Q4_1 {
    const BLOCK: usize = 32;
    const BYTES: usize = 20;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 15;

    #[inline(always)]
    fn unpack<S: Simd>(rows: &Rows<'_, S>, at: usize, out: &mut Block<'_>) {
        let [dm, ..] = rows.quad(at);
        out.put_scale(0, dm.f16_low());
        out.put_min(0, dm.f16_high());
        nibbles(rows.quad(at + 4), out);
    }
}
