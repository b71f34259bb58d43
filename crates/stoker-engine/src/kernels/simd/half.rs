//! f16 to f32 without instructions for it.

/// An f16's bits as f32, exact for every value: shift into place, then scale by 2^112 (which normalises subnormals).
#[inline(always)]
pub(super) fn f16_to_f32(bits: u32) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    // Infinity and NaN keep their exponent.
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | ((bits & 0x8000) << 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let got = f16_to_f32(u32::from(bits));
            assert!(got.is_nan() && expected.is_nan() || got.to_bits() == expected.to_bits(), "{bits:#x}");
        }
    }
}
