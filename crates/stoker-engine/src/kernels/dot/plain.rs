//! The inner loop in plain Rust: any machine, and the words that the other versions are checked against.

use super::{Input, Tile};
use crate::kernels::{
    quant::Quant,
    simd::{FLanes, Float, LANES, Plain, Simd},
};

#[inline(always)]
pub(super) fn dot<Q: Quant, const R: usize>(tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]) {
    let columns = tile.columns::<Q>();
    for (r, acc) in acc.iter_mut().enumerate() {
        let x = input.q(r, columns);
        let x_scale = input.scale(r, columns);
        let negative_sum = input.negative_sum(r, columns, Q::GROUP);
        let scaled_sum = input.scaled_sum(r, columns, Q::GROUP);
        for group in 0..columns / Q::GROUP {
            let mut sum = [0i32; LANES];
            if let Some(offset) = Q::OFFSET_LOG2 {
                sum = [negative_sum[group] << offset; LANES];
            }
            let words = &tile.q[group * Q::GROUP / 4..][..Q::GROUP / 4];
            for (word, x) in words.iter().zip(x[group * Q::GROUP..].as_chunks::<4>().0) {
                let x = x.map(i32::from);
                for (sum, w) in sum.iter_mut().zip(&word.0) {
                    let byte = |shift: u32| ((w >> shift) & 0xff) as i32;
                    *sum += byte(0) * x[0] + byte(8) * x[1] + byte(16) * x[2] + byte(24) * x[3];
                }
            }
            let factor = tile.scale[group].times(Plain.splat(x_scale[group * Q::GROUP / 32]));
            *acc = acc.fma(factor, FLanes(sum.map(|s| s as f32)));
            if Q::MIN {
                *acc = acc.fma(tile.min[group], Plain.splat(scaled_sum[group]));
            }
        }
    }
}
