//! Sixteen lanes, a 64-byte register's worth: plain arrays that the compiler turns into whatever registers the
//! function's instruction set has.

/// Sixteen 32-bit words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [u32; 16]);

/// Sixteen floats.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C, align(64))]
pub(super) struct FLanes(pub(super) [f32; 16]);

/// Lanes of everything.
pub(super) const LANES: usize = 16;

impl Lanes {
    pub(super) const ZERO: Self = Self([0; 16]);

    #[inline(always)]
    pub(super) fn map(self, f: impl Fn(u32) -> u32) -> Self {
        let mut out = [0; 16];
        for i in 0..16 {
            out[i] = f(self.0[i]);
        }
        Self(out)
    }

    #[inline(always)]
    pub(super) fn with(self, other: Self, f: impl Fn(u32, u32) -> u32) -> Self {
        let mut out = [0; 16];
        for i in 0..16 {
            out[i] = f(self.0[i], other.0[i]);
        }
        Self(out)
    }

    #[inline(always)]
    pub(super) fn and(self, mask: u32) -> Self {
        self.map(|v| v & mask)
    }

    #[inline(always)]
    pub(super) fn or(self, other: Self) -> Self {
        self.with(other, |a, b| a | b)
    }

    #[inline(always)]
    pub(super) fn shr(self, bits: usize) -> Self {
        self.map(|v| v >> bits)
    }

    #[inline(always)]
    pub(super) fn shl(self, bits: usize) -> Self {
        self.map(|v| v << bits)
    }

    /// The byte at bit `shift` of each lane as a float.
    #[inline(always)]
    pub(super) fn byte_f32(self, shift: usize) -> FLanes {
        self.f32_of(|v| ((v >> shift) & 0xff) as i32)
    }

    /// The signed byte at bit `shift` of each lane as a float.
    #[inline(always)]
    pub(super) fn signed_byte_f32(self, shift: usize) -> FLanes {
        self.f32_of(|v| ((v << (24 - shift)) as i32) >> 24)
    }

    #[inline(always)]
    pub(super) fn f32_of(self, f: impl Fn(u32) -> i32) -> FLanes {
        let mut out = [0.0; 16];
        for i in 0..16 {
            // At most 24 bits: exact.
            out[i] = f(self.0[i]) as f32;
        }
        FLanes(out)
    }

    /// The f16 in the low half of each lane as a float.
    #[inline(always)]
    pub(super) fn f16_low(self) -> FLanes {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f16_to_f32(self.0[i] & 0xffff);
        }
        FLanes(out)
    }

    /// The f16 in the high half of each lane as a float.
    #[inline(always)]
    pub(super) fn f16_high(self) -> FLanes {
        self.shr(16).f16_low()
    }
}

impl FLanes {
    pub(super) const ZERO: Self = Self([0.0; 16]);

    #[inline(always)]
    pub(super) fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f(self.0[i]);
        }
        Self(out)
    }

    #[inline(always)]
    pub(super) fn with(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f(self.0[i], other.0[i]);
        }
        Self(out)
    }

    #[inline(always)]
    pub(super) fn mul(self, other: Self) -> Self {
        self.with(other, |a, b| a * b)
    }

    #[inline(always)]
    pub(super) fn neg(self) -> Self {
        self.map(|v| -v)
    }

    #[inline(always)]
    pub(super) fn scaled(self, factor: f32) -> Self {
        self.map(|v| v * factor)
    }

    /// `self + a * b`, rounded once.
    #[inline(always)]
    pub(super) fn fma(self, a: Self, b: Self) -> Self {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = a.0[i].mul_add(b.0[i], self.0[i]);
        }
        Self(out)
    }

    /// The first 16 values, zeros where there are fewer.
    #[inline(always)]
    pub(super) fn load(values: &[f32]) -> Self {
        if let Some(all) = values.first_chunk::<16>() {
            return Self(*all);
        }
        let mut out = [0.0; 16];
        for (o, v) in out.iter_mut().zip(values) {
            *o = *v;
        }
        Self(out)
    }

    /// The sum of all lanes: the one reduction tree of the crate, halves first.
    #[inline(always)]
    pub(super) fn sum(self) -> f32 {
        let v = self.0;
        let mut a = [0.0; 8];
        for i in 0..8 {
            a[i] = v[i] + v[i + 8];
        }
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }
}

/// An f16's bits as f32, exact for every value: shift into place, then scale by 2^112 (which normalises subnormals).
#[inline(always)]
pub(super) fn f16_to_f32(bits: u32) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    // Infinity and NaN keep their exponent.
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | ((bits & 0x8000) << 16))
}

/// A bf16's bits as f32.
#[inline(always)]
pub(super) fn bf16_to_f32(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let got = f16_to_f32(u32::from(bits));
            assert!(
                got == expected && got.is_sign_negative() == expected.is_sign_negative()
                    || got.is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn bytes_of_lanes() {
        let lanes = Lanes([0x80ff_7f01; 16]);
        assert_eq!(lanes.byte_f32(24).0[3], 128.0);
        assert_eq!(lanes.signed_byte_f32(24).0[3], -128.0);
        assert_eq!(lanes.signed_byte_f32(16).0[3], -1.0);
        assert_eq!(lanes.signed_byte_f32(8).0[3], 127.0);
        assert_eq!(lanes.signed_byte_f32(0).0[3], 1.0);
    }
}
