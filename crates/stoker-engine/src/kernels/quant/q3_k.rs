//! Q3_K: `u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d`, 16 groups of 16: `d * (sc - 32) * (q - 4)`. Low bits as in Q2_K;
//! the third bit of quarter `c` of half `h` is bit `4 h + c` of `hmask`.

use super::{FLanes, Gather, Lanes, NIBBLES, Quant, Rows};

pub(in crate::kernels) struct Q3K;

impl Quant for Q3K {
    const BLOCK: usize = 256;
    const BYTES: usize = 110;
    const GROUP: usize = 16;
    const OFFSET_LOG2: Option<u32> = Some(2);
    const MIN: bool = false;
    const MAX: u32 = 7;

    #[inline(always)]
    fn unpack<G: Gather>(
        rows: &Rows<'_, G>,
        at: usize,
        q: &mut [Lanes],
        scale: &mut [FLanes],
        _min: &mut [FLanes],
    ) {
        let d = rows.half(at + 108).f16_low();
        let [a, b, c] = [rows.word(at + 96), rows.word(at + 100), rows.word(at + 104)];
        // Sixteen 6-bit scales: nibbles of the first 8 bytes, upper pairs from the last 4.
        let upper = |shift: usize| c.shr(shift).and(0x0303_0303).shl(4);
        let scales = [
            a.and(NIBBLES).or(upper(0)),
            b.and(NIBBLES).or(upper(2)),
            a.shr(4).and(NIBBLES).or(upper(4)),
            b.shr(4).and(NIBBLES).or(upper(6)),
        ];
        for (group, scale) in scale.iter_mut().enumerate() {
            let shift = 8 * (group % 4);
            *scale = d.mul(scales[group / 4].f32_of(|v| ((v >> shift) & 0xff) as i32 - 32));
        }
        for part in 0..2 {
            let third = rows.quad(at + 16 * part);
            for half in 0..2 {
                let words = rows.quad(at + 32 + 32 * half + 16 * part);
                for quarter in 0..4 {
                    for i in 0..4 {
                        let low = words[i].shr(2 * quarter).and(0x0303_0303);
                        let high = third[i].shr(4 * half + quarter).and(0x0101_0101).shl(2);
                        q[32 * half + 8 * quarter + 4 * part + i] = low.or(high);
                    }
                }
            }
        }
    }
}
