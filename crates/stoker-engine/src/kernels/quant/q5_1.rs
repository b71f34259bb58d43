//! Q5_1: `f16 d; f16 m; u32 qh; u8 qs[16]`, `d * q + m`; bit `i` of `qh` is the fifth bit of element `i`.

use super::{FLanes, Gather, Lanes, Quant, Rows, fifth_bits, nibbles};

pub(in crate::kernels) struct Q5_1;

impl Quant for Q5_1 {
    const BLOCK: usize = 32;
    const BYTES: usize = 24;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = None;
    const MIN: bool = true;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        min: &mut [FLanes],
    ) {
        let dm = rows.word(at);
        scale[0] = dm.f16_low();
        min[0] = dm.f16_high();
        let high = rows.word(at + 4);
        nibbles(rows.quad(at + 8), q);
        for i in 0..8 {
            q[i] = q[i].or(fifth_bits(high, i));
        }
    }
}
