//! The inner loop with AVX2: eight outputs in a register, products in pairs of 16 bits.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_cvtepi32_ps,
    _mm256_fmadd_ps, _mm256_load_ps, _mm256_load_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_store_ps, _mm256_xor_si256,
};

use super::{Dot, Input, Tile};
use crate::kernels::{
    quant::Quant,
    simd::{Avx2, FLanes},
};

impl Dot for Avx2 {
    #[inline(always)]
    fn dot<Q: Quant, const R: usize>(self, tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes; R]) {
        let mut r = 0;
        // Two rows at a time: what sixteen registers hold.
        while r + 2 <= R {
            // SAFETY: having `self` shows that the features are there.
            unsafe { dot::<Q, 2>(tile, input.below(r), &mut acc[r..]) };
            r += 2;
        }
        if r < R {
            // SAFETY: as above.
            unsafe { dot::<Q, 1>(tile, input.below(r), &mut acc[r..]) };
        }
    }
}

/// `acc` has at least `R` elements.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<Q: Quant, const R: usize>(tile: Tile<'_>, input: Input<'_>, acc: &mut [FLanes]) {
    let columns = tile.columns::<Q>();
    let words_of_group = Q::GROUP / 4;
    // How many products of pairs can be added in 16 bits: each is at most 2 * 127 * MAX.
    let headroom = (32767 / (254 * Q::MAX as usize)).clamp(1, words_of_group);
    // Eight bits of q don't fit at all; such a type is computed signed, from the magnitude.
    let signed = Q::MAX > 127;
    let x: [*const i8; R] = std::array::from_fn(|r| input.q(r, columns).as_ptr());
    let x_scale: [*const f32; R] = std::array::from_fn(|r| input.scale(r, columns).as_ptr());
    let negative_sum: [*const i32; R] =
        std::array::from_fn(|r| input.negative_sum(r, columns, Q::GROUP).as_ptr());
    let scaled_sum: [*const f32; R] =
        std::array::from_fn(|r| input.scaled_sum(r, columns, Q::GROUP).as_ptr());
    let ones = _mm256_set1_epi16(1);
    let top_bits = _mm256_set1_epi8(-128);
    assert!(acc.len() >= R, "too few accumulators");
    let mut sums: [[__m256; 2]; R] = std::array::from_fn(|r| {
        let lanes = acc[r].0.as_ptr();
        // SAFETY: `FLanes` is 64 bytes at an alignment of 64.
        unsafe { [_mm256_load_ps(lanes), _mm256_load_ps(lanes.add(8))] }
    });
    for group in 0..columns / Q::GROUP {
        // SAFETY: `group` is below the number of groups, so every place read is inside of the slices above and of
        // the tile, whose lengths `columns` has checked; words of `x` are read unaligned.
        unsafe {
            let mut isum: [[__m256i; 2]; R] = [[_mm256_setzero_si256(); 2]; R];
            if let (Some(offset), false) = (Q::OFFSET_LOG2, signed) {
                for r in 0..R {
                    isum[r] = [_mm256_set1_epi32(*negative_sum[r].add(group) << offset); 2];
                }
            }
            let words = tile.q.as_ptr().add(group * words_of_group).cast::<__m256i>();
            for start in (0..words_of_group).step_by(headroom) {
                let mut pairs: [[__m256i; 2]; R] = [[_mm256_setzero_si256(); 2]; R];
                for i in start..start + headroom {
                    let w = [_mm256_load_si256(words.add(2 * i)), _mm256_load_si256(words.add(2 * i + 1))];
                    for r in 0..R {
                        let four = x[r].add(group * Q::GROUP + 4 * i).cast::<i32>().read_unaligned();
                        let four = _mm256_set1_epi32(four);
                        for (half, w) in w.into_iter().enumerate() {
                            let products = if signed {
                                let w = _mm256_xor_si256(w, top_bits);
                                _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w))
                            } else {
                                _mm256_maddubs_epi16(w, four)
                            };
                            pairs[r][half] = _mm256_add_epi16(pairs[r][half], products);
                        }
                    }
                }
                for r in 0..R {
                    for half in 0..2 {
                        let four = _mm256_madd_epi16(pairs[r][half], ones);
                        isum[r][half] = _mm256_add_epi32(isum[r][half], four);
                    }
                }
            }
            for half in 0..2 {
                let scale = _mm256_load_ps(tile.scale.as_ptr().add(group).cast::<f32>().add(8 * half));
                for r in 0..R {
                    let factor = _mm256_mul_ps(scale, _mm256_set1_ps(*x_scale[r].add(group * Q::GROUP / 32)));
                    sums[r][half] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(isum[r][half]), sums[r][half]);
                    if Q::MIN {
                        let min = _mm256_load_ps(tile.min.as_ptr().add(group).cast::<f32>().add(8 * half));
                        let sum = _mm256_set1_ps(*scaled_sum[r].add(group));
                        sums[r][half] = _mm256_fmadd_ps(min, sum, sums[r][half]);
                    }
                }
            }
        }
    }
    for (acc, sum) in acc.iter_mut().zip(sums) {
        let lanes = acc.0.as_mut_ptr();
        // SAFETY: as for the loads.
        unsafe {
            _mm256_store_ps(lanes, sum[0]);
            _mm256_store_ps(lanes.add(8), sum[1]);
        }
    }
}
