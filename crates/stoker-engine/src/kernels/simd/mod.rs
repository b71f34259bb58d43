//! Sixteen lanes with the instructions of one set: what the kernels are written in.
//!
//! A kernel is a generic function over [`Simd`], compiled once for each set by `versions!`. The operations are the
//! same IEEE operations in each, so the bits are too. A value of a [`Simd`] type, and of its vectors, exists only
//! where the instructions do (an [`Isa`](super::Isa) of that kind was detected): that is what makes the methods safe.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod half;
mod plain;

pub(super) use self::plain::Plain;
#[cfg(target_arch = "x86_64")]
pub(super) use self::{avx2::Avx2, avx512::Avx512};

/// Lanes of everything.
pub(super) const LANES: usize = 16;

/// Sixteen 32-bit words in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [u32; LANES]);

/// Sixteen floats in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(super) struct FLanes(pub(super) [f32; LANES]);

/// Brings bytes to the second-level cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    for line in bytes.chunks(64) {
        // SAFETY: a hint for an address inside of a slice; every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// An instruction set.
pub(super) trait Simd: Copy {
    /// Sixteen 32-bit words.
    type Word: Word<Float = Self::Float>;
    /// Sixteen floats.
    type Float: Float;

    /// `out[w]` has in lane `row` the word `w` at `first + row * stride`.
    ///
    /// # Safety
    /// 16 bytes must be readable at each of the sixteen addresses.
    unsafe fn quad(self, first: *const u8, stride: usize) -> [Self::Word; 4];

    /// Says that these bytes will be read soon.
    #[inline(always)]
    fn prefetch(self, _bytes: &[u8]) {}

    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::Float;

    /// From memory.
    fn load(self, values: &[f32; LANES]) -> Self::Float;

    /// From little-endian f32.
    fn load_f32(self, bytes: &[u8; 64]) -> Self::Float;

    /// From little-endian f16.
    fn load_f16(self, bytes: &[u8; 32]) -> Self::Float;

    /// From little-endian bf16.
    fn load_bf16(self, bytes: &[u8; 32]) -> Self::Float;

    /// The first sixteen values, zeros where there are fewer.
    #[inline(always)]
    fn load_some(self, values: &[f32]) -> Self::Float {
        match values.first_chunk() {
            Some(all) => self.load(all),
            None => {
                let mut padded = [0.0; LANES];
                padded[..values.len()].copy_from_slice(values);
                self.load(&padded)
            }
        }
    }
}

/// Sixteen 32-bit words.
pub(super) trait Word: Copy {
    /// Sixteen floats of the same set.
    type Float: Float;

    /// `self & mask`.
    fn and(self, mask: u32) -> Self;
    /// `self | other`.
    fn or(self, other: Self) -> Self;
    /// `self ^ mask`.
    fn xor(self, mask: u32) -> Self;
    /// `self >> bits`, zeros coming in.
    fn shr(self, bits: u32) -> Self;
    /// `self << bits`.
    fn shl(self, bits: u32) -> Self;
    /// `self >> bits`, the sign coming in.
    fn shr_signed(self, bits: u32) -> Self;
    /// `self - value`.
    fn minus(self, value: u32) -> Self;
    /// Each lane, as a signed integer, as a float.
    fn to_float(self) -> Self::Float;
    /// The f16 in the low half of each lane.
    fn f16_low(self) -> Self::Float;
    /// To memory.
    fn store(self, out: &mut Lanes);

    /// The f16 in the high half of each lane.
    #[inline(always)]
    fn f16_high(self) -> Self::Float {
        self.shr(16).f16_low()
    }

    /// Byte `number` of each lane.
    #[inline(always)]
    fn byte(self, number: u32) -> Self {
        self.shr(8 * number).and(0xff)
    }

    /// Byte `number` of each lane, signed.
    #[inline(always)]
    fn signed_byte(self, number: u32) -> Self {
        self.shl(24 - 8 * number).shr_signed(24)
    }
}

/// Sixteen floats.
pub(super) trait Float: Copy {
    /// `self * other`.
    fn times(self, other: Self) -> Self;
    /// `self / other`.
    fn over(self, other: Self) -> Self;
    /// `-self`.
    fn negative(self) -> Self;
    /// `self + a * b`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    /// The sum of all lanes: the one reduction tree of the crate, halves first.
    fn sum(self) -> f32;
    /// To memory.
    fn store(self, out: &mut [f32; LANES]);

    /// The sums of sixteen vectors, each by the tree of [`sum`](Self::sum).
    #[inline(always)]
    fn sums(all: [Self; LANES]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = all[i].sum();
        }
        out
    }
}

impl Lanes {
    pub(super) const ZERO: Self = Self([0; LANES]);
}

impl FLanes {
    pub(super) const ZERO: Self = Self([0.0; LANES]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::versions;

    versions! { fn probe(out: &mut Vec<u32>) = probe_body; }

    #[inline(always)]
    fn probe_body<S: Simd>(simd: S, out: &mut Vec<u32>) {
        let mut bytes = [[0u8; 16]; LANES];
        for (byte, value) in bytes.as_flattened_mut().iter_mut().zip((0..251).cycle().step_by(37)) {
            *byte = value;
        }
        // SAFETY: sixteen rows of 16 bytes.
        let quad = unsafe { simd.quad(bytes.as_ptr().cast(), 16) };
        for word in quad {
            let words = [
                word,
                word.and(0x0f0f_0f0f),
                word.or(quad[0].shl(3)),
                word.xor(0x8080_8080),
                word.shr(5),
                word.shr_signed(9),
                word.minus(77),
                word.byte(2),
                word.signed_byte(1),
                word.signed_byte(3),
            ];
            for word in words {
                let mut lanes = Lanes::ZERO;
                word.store(&mut lanes);
                out.extend(lanes.0);
            }
            let (a, b) =
                (word.signed_byte(0).to_float(), word.signed_byte(2).to_float().times(simd.splat(0.1)));
            let finite = word.and(0x3bff_3bff);
            let some = simd.load_some(&[0.1, 0.7, 0.3]);
            let all = [a, b, a.over(b.fma(simd.splat(77.7), b)), a.fma(b, b), b.negative(), some];
            let halves = [finite.f16_low(), finite.f16_high()];
            for float in all.into_iter().chain(halves) {
                let mut lanes = [0.0; LANES];
                float.store(&mut lanes);
                out.extend(lanes.map(f32::to_bits));
                out.push(float.sum().to_bits());
            }
            out.extend(
                S::Float::sums(std::array::from_fn(|i| b.times(simd.splat(i as f32 + 0.3))))
                    .map(f32::to_bits),
            );
        }
        let mut bytes = [0; 64];
        for (i, bytes) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *bytes = (i as f32 * 0.37 - 2.0).to_le_bytes();
        }
        let (halves, _) = bytes.as_chunks::<32>();
        let mut finite = halves[0];
        finite.iter_mut().for_each(|b| *b &= 0x3b);
        for float in [simd.load_f32(&bytes), simd.load_bf16(&halves[0]), simd.load_f16(&finite)] {
            out.push(float.sum().to_bits());
        }
    }

    #[test]
    fn every_set_has_the_same_bits() {
        let mut expected: Option<Vec<u32>> = None;
        for isa in crate::kernels::Isa::available() {
            let mut out = Vec::new();
            probe(isa, &mut out);
            assert_eq!(expected.get_or_insert_with(|| out.clone()), &out, "{}", isa.name());
        }
    }
}
