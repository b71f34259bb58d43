//! AVX2, FMA and F16C: two registers.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehl_ps,
    _mm_packus_epi32, _mm_shuffle_ps, _mm256_add_ps, _mm256_and_si256, _mm256_castps256_ps128,
    _mm256_castsi128_si256, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_div_ps, _mm256_extractf128_ps, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_inserti128_si256, _mm256_loadu_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_permute2f128_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_shuffle_ps, _mm256_slli_epi32,
    _mm256_sllv_epi32, _mm256_srav_epi32, _mm256_srlv_epi32, _mm256_store_si256, _mm256_storeu_ps,
    _mm256_sub_epi32, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32,
    _mm256_unpacklo_epi64, _mm256_xor_ps, _mm256_xor_si256,
};

use super::{Float, LANES, Lanes, Simd, Word};
use crate::kernels::isa::{Isa, Kind};

/// The permission to use AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx2(());

/// Sixteen words; a value exists only where [`Avx2`] does.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Word256(__m256i, __m256i);

/// Sixteen floats; as above.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Float256(__m256, __m256);

impl Avx2 {
    /// `None` unless `isa` is that one.
    pub(in crate::kernels) fn of(isa: Isa) -> Option<Self> {
        (isa.kind() == Kind::Avx2).then_some(Self(()))
    }
}

impl Simd for Avx2 {
    type Word = Word256;
    type Float = Float256;

    #[inline(always)]
    unsafe fn quad(self, first: *const u8, stride: usize) -> [Word256; 4] {
        // SAFETY: `self` shows that the features are there; the caller says that 16 bytes are readable at each
        // address, and the loads need no alignment.
        unsafe {
            // As the AVX-512 version, for eight rows at a time.
            macro_rules! eight {
                ($first:literal) => {{
                    macro_rules! load {
                        ($i:literal) => {
                            _mm256_inserti128_si256::<1>(
                                _mm256_castsi128_si256(_mm_loadu_si128(
                                    first.add(($first + $i) * stride).cast(),
                                )),
                                _mm_loadu_si128(first.add(($first + $i + 4) * stride).cast()),
                            )
                        };
                    }
                    let (a, b, c, d) = (load!(0), load!(1), load!(2), load!(3));
                    let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                    let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
                    [
                        _mm256_unpacklo_epi64(ab_low, cd_low),
                        _mm256_unpackhi_epi64(ab_low, cd_low),
                        _mm256_unpacklo_epi64(ab_high, cd_high),
                        _mm256_unpackhi_epi64(ab_high, cd_high),
                    ]
                }};
            }
            let (low, high) = (eight!(0), eight!(8));
            [
                Word256(low[0], high[0]),
                Word256(low[1], high[1]),
                Word256(low[2], high[2]),
                Word256(low[3], high[3]),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8]) {
        super::prefetch(bytes);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Float256 {
        // SAFETY: `self` shows that the features are there.
        let value = unsafe { _mm256_set1_ps(value) };
        Float256(value, value)
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Float256 {
        // SAFETY: as above; 64 bytes, no alignment needed.
        unsafe { Float256(_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> Float256 {
        let at = bytes.as_ptr().cast::<f32>();
        // SAFETY: as above; 64 bytes, no alignment needed.
        unsafe { Float256(_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> Float256 {
        let at = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: as above; 32 bytes, no alignment needed.
        unsafe { Float256(_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))) }
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 32]) -> Float256 {
        let at = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: as above; 32 bytes, no alignment needed.
        unsafe {
            let (low, high) = (
                _mm256_cvtepu16_epi32(_mm_loadu_si128(at)),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1))),
            );
            Float256(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
}

/// Wraps intrinsics that take and give registers: the same for both halves.
macro_rules! both {
    ($type:ident: $call:ident($($value:expr),*), $with:expr) => {
        // SAFETY: a value of this type exists only where the features do.
        unsafe {
            let with = $with;
            $type($call($($value.0,)* with), $call($($value.1,)* with))
        }
    };
    ($type:ident: $call:ident($($value:expr),*)) => {
        // SAFETY: as above.
        unsafe { $type($call($($value.0),*), $call($($value.1),*)) }
    };
}

impl Word for Word256 {
    type Float = Float256;

    #[inline(always)]
    fn and(self, mask: u32) -> Self {
        both!(Self: _mm256_and_si256(self), _mm256_set1_epi32(mask.cast_signed()))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        both!(Self: _mm256_or_si256(self, other))
    }

    #[inline(always)]
    fn xor(self, mask: u32) -> Self {
        both!(Self: _mm256_xor_si256(self), _mm256_set1_epi32(mask.cast_signed()))
    }

    #[inline(always)]
    fn shr(self, bits: u32) -> Self {
        both!(Self: _mm256_srlv_epi32(self), _mm256_set1_epi32(bits.cast_signed()))
    }

    #[inline(always)]
    fn shl(self, bits: u32) -> Self {
        both!(Self: _mm256_sllv_epi32(self), _mm256_set1_epi32(bits.cast_signed()))
    }

    #[inline(always)]
    fn shr_signed(self, bits: u32) -> Self {
        both!(Self: _mm256_srav_epi32(self), _mm256_set1_epi32(bits.cast_signed()))
    }

    #[inline(always)]
    fn minus(self, value: u32) -> Self {
        both!(Self: _mm256_sub_epi32(self), _mm256_set1_epi32(value.cast_signed()))
    }

    #[inline(always)]
    fn to_float(self) -> Float256 {
        both!(Float256: _mm256_cvtepi32_ps(self))
    }

    #[inline(always)]
    fn f16_low(self) -> Float256 {
        let low = self.and(0xffff);
        // SAFETY: as in `both`. Words below 2^16 are packed as they are.
        unsafe {
            let pack = |half: __m256i| {
                let packed =
                    _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
                _mm256_cvtph_ps(packed)
            };
            Float256(pack(low.0), pack(low.1))
        }
    }

    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        let out = (&raw mut *out).cast::<__m256i>();
        // SAFETY: as in `both`; `Lanes` is 64 bytes at an alignment of 64.
        unsafe {
            _mm256_store_si256(out, self.0);
            _mm256_store_si256(out.add(1), self.1);
        }
    }
}

impl Float for Float256 {
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        both!(Self: _mm256_mul_ps(self, other))
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        both!(Self: _mm256_div_ps(self, other))
    }

    #[inline(always)]
    fn negative(self) -> Self {
        both!(Self: _mm256_xor_ps(self), _mm256_set1_ps(-0.0))
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        both!(Self: _mm256_fmadd_ps(a, b, self))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in `both`.
        unsafe {
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        let at = out.as_mut_ptr();
        // SAFETY: as in `both`; 64 bytes, no alignment needed.
        unsafe {
            _mm256_storeu_ps(at, self.0);
            _mm256_storeu_ps(at.add(8), self.1);
        }
    }

    #[inline(always)]
    fn sums(all: [Self; LANES]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // As the AVX-512 version, for eight sums at a time.
        // SAFETY: as in `both`.
        unsafe {
            macro_rules! step {
                ($shuffle:ident, $low:literal, $high:literal, $a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    _mm256_add_ps($shuffle::<$low>(a, b), $shuffle::<$high>(a, b))
                }};
            }
            macro_rules! halves {
                ($i:expr) => {
                    _mm256_add_ps(all[$i].0, all[$i].1)
                };
            }
            macro_rules! two {
                ($j:expr) => {
                    step!(_mm256_permute2f128_ps, 0x20, 0x31, halves!($j), halves!($j + 4))
                };
            }
            for first in [0, 8] {
                let low = step!(_mm256_shuffle_ps, 0x44, 0xee, two!(first), two!(first + 1));
                let high = step!(_mm256_shuffle_ps, 0x44, 0xee, two!(first + 2), two!(first + 3));
                _mm256_storeu_ps(
                    out.as_mut_ptr().add(first),
                    step!(_mm256_shuffle_ps, 0x88, 0xdd, low, high),
                );
            }
        }
        out
    }
}
