//! The inner loop with AVX-512 VNNI: four products and three additions for each of sixteen outputs in one instruction.

use std::arch::x86_64::{
    __m512i, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_ps, _mm512_load_si512,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_slli_epi32,
    _mm512_store_ps,
};

use super::{Dot, Input, Tile};
use crate::kernels::{
    quant::Quant,
    simd::{Avx512, FLanes},
};

impl Dot for Avx512 {
    #[inline(always)]
    fn dot<Q: Quant, const R: usize>(self, tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]) {
        // SAFETY: having `self` shows that the features are there.
        unsafe { dot::<Q, R>(tile, input, acc) }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot<Q: Quant, const R: usize>(tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]) {
    let columns = tile.columns::<Q>();
    let words_of_group = Q::GROUP / 4;
    // The slices that these come from have `columns` elements, or one for each group of them.
    let x: [*const i8; R] = std::array::from_fn(|r| input.q(r, columns).as_ptr());
    let x_scale: [*const f32; R] = std::array::from_fn(|r| input.scale(r, columns).as_ptr());
    let negative_sum: [*const i32; R] =
        std::array::from_fn(|r| input.negative_sum(r, columns, Q::GROUP).as_ptr());
    let scaled_sum: [*const f32; R] =
        std::array::from_fn(|r| input.scaled_sum(r, columns, Q::GROUP).as_ptr());
    // SAFETY: `FLanes` is 64 bytes at an alignment of 64.
    let mut sums = std::array::from_fn::<_, R, _>(|r| unsafe { _mm512_load_ps(acc[r].0.as_ptr()) });
    for group in 0..columns / Q::GROUP {
        // SAFETY: `group` is below the number of groups, so every place read is inside of the slices above and of
        // the tile, whose lengths `columns` has checked; words of `x` are read unaligned.
        unsafe {
            let mut isum: [__m512i; R] = [_mm512_setzero_si512(); R];
            if let Some(offset) = Q::OFFSET_LOG2 {
                for r in 0..R {
                    let negative = _mm512_set1_epi32(*negative_sum[r].add(group));
                    isum[r] = match offset {
                        2 => _mm512_slli_epi32::<2>(negative),
                        3 => _mm512_slli_epi32::<3>(negative),
                        4 => _mm512_slli_epi32::<4>(negative),
                        5 => _mm512_slli_epi32::<5>(negative),
                        _ => _mm512_slli_epi32::<7>(negative),
                    };
                }
            }
            let words = tile.q.as_ptr().add(group * words_of_group);
            for i in 0..words_of_group {
                let w = _mm512_load_si512(words.add(i).cast());
                for r in 0..R {
                    let four = x[r].add(group * Q::GROUP + 4 * i).cast::<i32>().read_unaligned();
                    isum[r] = _mm512_dpbusd_epi32(isum[r], w, _mm512_set1_epi32(four));
                }
            }
            let scale = _mm512_load_ps(tile.scale.as_ptr().add(group).cast());
            for r in 0..R {
                let factor = _mm512_mul_ps(scale, _mm512_set1_ps(*x_scale[r].add(group * Q::GROUP / 32)));
                sums[r] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(isum[r]), sums[r]);
            }
            if Q::MIN {
                let min = _mm512_load_ps(tile.min.as_ptr().add(group).cast());
                for r in 0..R {
                    sums[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(*scaled_sum[r].add(group)), sums[r]);
                }
            }
        }
    }
    for (acc, sum) in acc.iter_mut().zip(sums) {
        // SAFETY: as for the loads.
        unsafe { _mm512_store_ps(acc.0.as_mut_ptr(), sum) };
    }
}
