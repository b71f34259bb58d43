//! AVX-512: one register.

use std::arch::x86_64::{
    __m512, __m512i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_loadu_si256, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps512_ps256, _mm512_castsi128_si512, _mm512_castsi512_ps,
    _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_div_ps,
    _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_inserti32x4, _mm512_loadu_ps, _mm512_mul_ps,
    _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
    _mm512_slli_epi32, _mm512_sllv_epi32, _mm512_srav_epi32, _mm512_srlv_epi32, _mm512_store_si512,
    _mm512_storeu_ps, _mm512_sub_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64, _mm512_xor_ps, _mm512_xor_si512,
};

use super::{Float, LANES, Lanes, Simd, Word};
use crate::kernels::isa::{Isa, Kind};

/// The permission to use AVX-512 (F, BW, DQ, VL, VNNI), AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx512(());

/// Sixteen words; a value exists only where [`Avx512`] does.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Word512(__m512i);

/// Sixteen floats; as above.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Float512(__m512);

impl Avx512 {
    /// `None` unless `isa` is that one.
    pub(in crate::kernels) fn of(isa: Isa) -> Option<Self> {
        (isa.kind() == Kind::Avx512).then_some(Self(()))
    }
}

impl Simd for Avx512 {
    type Word = Word512;
    type Float = Float512;

    #[inline(always)]
    unsafe fn quad(self, first: *const u8, stride: usize) -> [Word512; 4] {
        // SAFETY: `self` shows that the features are there; the caller says that 16 bytes are readable at each
        // address, and the loads need no alignment.
        unsafe {
            // Register `i` holds rows i, i + 4, i + 8 and i + 12, so that a 4 x 4 transposition within each 128-bit
            // part leaves all sixteen rows in order.
            macro_rules! load {
                ($i:literal) => {{
                    let v = _mm512_castsi128_si512(_mm_loadu_si128(first.add($i * stride).cast()));
                    let v = _mm512_inserti32x4::<1>(v, _mm_loadu_si128(first.add(($i + 4) * stride).cast()));
                    let v = _mm512_inserti32x4::<2>(v, _mm_loadu_si128(first.add(($i + 8) * stride).cast()));
                    _mm512_inserti32x4::<3>(v, _mm_loadu_si128(first.add(($i + 12) * stride).cast()))
                }};
            }
            let (a, b, c, d) = (load!(0), load!(1), load!(2), load!(3));
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                Word512(_mm512_unpacklo_epi64(ab_low, cd_low)),
                Word512(_mm512_unpackhi_epi64(ab_low, cd_low)),
                Word512(_mm512_unpacklo_epi64(ab_high, cd_high)),
                Word512(_mm512_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8]) {
        super::prefetch(bytes);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Float512 {
        // SAFETY: `self` shows that the features are there.
        Float512(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Float512 {
        // SAFETY: as above; 64 bytes, no alignment needed.
        Float512(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> Float512 {
        // SAFETY: as above; 64 bytes, no alignment needed.
        Float512(unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> Float512 {
        // SAFETY: as above; 32 bytes, no alignment needed.
        Float512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) })
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 32]) -> Float512 {
        // SAFETY: as above; 32 bytes, no alignment needed.
        Float512(unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        })
    }
}

/// Wraps intrinsics that take and give registers.
macro_rules! wrap {
    ($type:ident: $($call:expr),*) => {
        // SAFETY: a value of this type exists only where the features do.
        $type(unsafe { $($call),* })
    };
}

impl Word for Word512 {
    type Float = Float512;

    #[inline(always)]
    fn and(self, mask: u32) -> Self {
        wrap!(Self: _mm512_and_si512(self.0, _mm512_set1_epi32(mask.cast_signed())))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        wrap!(Self: _mm512_or_si512(self.0, other.0))
    }

    #[inline(always)]
    fn xor(self, mask: u32) -> Self {
        wrap!(Self: _mm512_xor_si512(self.0, _mm512_set1_epi32(mask.cast_signed())))
    }

    #[inline(always)]
    fn shr(self, bits: u32) -> Self {
        wrap!(Self: _mm512_srlv_epi32(self.0, _mm512_set1_epi32(bits.cast_signed())))
    }

    #[inline(always)]
    fn shl(self, bits: u32) -> Self {
        wrap!(Self: _mm512_sllv_epi32(self.0, _mm512_set1_epi32(bits.cast_signed())))
    }

    #[inline(always)]
    fn shr_signed(self, bits: u32) -> Self {
        wrap!(Self: _mm512_srav_epi32(self.0, _mm512_set1_epi32(bits.cast_signed())))
    }

    #[inline(always)]
    fn minus(self, value: u32) -> Self {
        wrap!(Self: _mm512_sub_epi32(self.0, _mm512_set1_epi32(value.cast_signed())))
    }

    #[inline(always)]
    fn to_float(self) -> Float512 {
        wrap!(Float512: _mm512_cvtepi32_ps(self.0))
    }

    #[inline(always)]
    fn f16_low(self) -> Float512 {
        wrap!(Float512: _mm512_cvtph_ps(_mm512_cvtepi32_epi16(self.0)))
    }

    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        // SAFETY: as in `wrap`; `Lanes` is 64 bytes at an alignment of 64.
        unsafe { _mm512_store_si512((&raw mut *out).cast(), self.0) };
    }
}

impl Float for Float512 {
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        wrap!(Self: _mm512_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        wrap!(Self: _mm512_div_ps(self.0, other.0))
    }

    #[inline(always)]
    fn negative(self) -> Self {
        wrap!(Self: _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)))
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        wrap!(Self: _mm512_fmadd_ps(a.0, b.0, self.0))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in `wrap`.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        // SAFETY: as in `wrap`; 64 bytes, no alignment needed.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) };
    }

    #[inline(always)]
    fn sums(all: [Self; LANES]) -> [f32; LANES] {
        // Two vectors' halves are added in one step, then four's quarters, and so on; the vectors are paired so
        // that the sums come out in order.
        // SAFETY: as in `wrap`.
        unsafe {
            macro_rules! step {
                ($shuffle:ident, $low:literal, $high:literal, $a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    _mm512_add_ps($shuffle::<$low>(a, b), $shuffle::<$high>(a, b))
                }};
            }
            macro_rules! four {
                ($j:literal) => {
                    step!(
                        _mm512_shuffle_f32x4,
                        0x88,
                        0xdd,
                        step!(_mm512_shuffle_f32x4, 0x44, 0xee, all[$j].0, all[$j + 4].0),
                        step!(_mm512_shuffle_f32x4, 0x44, 0xee, all[$j + 8].0, all[$j + 12].0)
                    )
                };
            }
            let low = step!(_mm512_shuffle_ps, 0x44, 0xee, four!(0), four!(1));
            let high = step!(_mm512_shuffle_ps, 0x44, 0xee, four!(2), four!(3));
            let mut out = [0.0; LANES];
            _mm512_storeu_ps(out.as_mut_ptr(), step!(_mm512_shuffle_ps, 0x88, 0xdd, low, high));
            out
        }
    }
}
