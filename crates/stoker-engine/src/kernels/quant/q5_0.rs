//! Q5_0: `f16 d; u32 qh; u8 qs[16]`, `d * (q - 16)`; bit `i` of `qh` is the fifth bit of element `i`.

use super::{FLanes, Gather, Lanes, Quant, Rows, fifth_bits, nibbles};

pub(in crate::kernels) struct Q5_0;

impl Quant for Q5_0 {
    const BLOCK: usize = 32;
    const BYTES: usize = 22;
    const GROUP: usize = 32;
    const OFFSET_LOG2: Option<u32> = Some(4);
    const MIN: bool = false;
    const MAX: u32 = 31;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        _min: &mut [FLanes],
    ) {
        scale[0] = rows.half(at).f16_low();
        let high = rows.word(at + 2);
        nibbles(rows.quad(at + 6), q);
        for i in 0..8 {
            q[i] = q[i].or(fifth_bits(high, i));
        }
    }
}
