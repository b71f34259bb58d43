//! Plain Rust: any machine, and the words that the other sets are checked against.

use super::{FLanes, Float, LANES, Lanes, Simd, Word, half::f16_to_f32};

/// No special instructions.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Plain;

impl Simd for Plain {
    type Word = Lanes;
    type Float = FLanes;

    #[inline(always)]
    unsafe fn quad(self, first: *const u8, stride: usize) -> [Lanes; 4] {
        let mut out = [Lanes::ZERO; 4];
        for lane in 0..LANES {
            // SAFETY: the caller says that 16 bytes are readable; no alignment is needed.
            let row = unsafe { first.add(lane * stride).cast::<[[u8; 4]; 4]>().read_unaligned() };
            for (word, out) in row.into_iter().zip(&mut out) {
                out.0[lane] = u32::from_le_bytes(word);
            }
        }
        out
    }

    #[inline(always)]
    fn splat(self, value: f32) -> FLanes {
        FLanes([value; LANES])
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> FLanes {
        FLanes(*values)
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> FLanes {
        let mut out = FLanes::ZERO;
        for (out, bytes) in out.0.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
        out
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> FLanes {
        let mut out = FLanes::ZERO;
        for (out, bytes) in out.0.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *out = f16_to_f32(u32::from(u16::from_le_bytes(*bytes)));
        }
        out
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 32]) -> FLanes {
        let mut out = FLanes::ZERO;
        for (out, bytes) in out.0.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
        out
    }
}

impl Word for Lanes {
    type Float = FLanes;

    #[inline(always)]
    fn and(self, mask: u32) -> Self {
        Self(self.0.map(|v| v & mask))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] |= other.0[i];
        }
        out
    }

    #[inline(always)]
    fn xor(self, mask: u32) -> Self {
        Self(self.0.map(|v| v ^ mask))
    }

    #[inline(always)]
    fn shr(self, bits: u32) -> Self {
        Self(self.0.map(|v| v >> bits))
    }

    #[inline(always)]
    fn shl(self, bits: u32) -> Self {
        Self(self.0.map(|v| v << bits))
    }

    #[inline(always)]
    fn shr_signed(self, bits: u32) -> Self {
        Self(self.0.map(|v| (v.cast_signed() >> bits).cast_unsigned()))
    }

    #[inline(always)]
    fn minus(self, value: u32) -> Self {
        Self(self.0.map(|v| v.wrapping_sub(value)))
    }

    #[inline(always)]
    fn to_float(self) -> FLanes {
        FLanes(self.0.map(|v| v.cast_signed() as f32))
    }

    #[inline(always)]
    fn f16_low(self) -> FLanes {
        FLanes(self.0.map(|v| f16_to_f32(v & 0xffff)))
    }

    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        *out = self;
    }
}

impl Float for FLanes {
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] *= other.0[i];
        }
        out
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] /= other.0[i];
        }
        out
    }

    #[inline(always)]
    fn negative(self) -> Self {
        Self(self.0.map(|v| -v))
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] = a.0[i].mul_add(b.0[i], self.0[i]);
        }
        out
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let v = self.0;
        let mut a = [0.0; 8];
        for i in 0..8 {
            a[i] = v[i] + v[i + 8];
        }
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        *out = self.0;
    }
}
