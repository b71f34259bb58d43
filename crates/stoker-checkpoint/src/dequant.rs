//! Every weight type that the engine can compute with, as f32: the plain reference. The engine's kernels are tested
//! against it, conversion uses it.
//!
//! Block layouts and the order of the operations: `ggml-common.h` and `ggml-quants.c` of ggml, whose results these are
//! bit for bit.

use half::{bf16, f16};
use stoker_types::DType;

/// Why bytes can't be dequantised.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DequantError {
    /// There is no arithmetic for this type.
    #[error("tensor type {0} can't be computed with; supported are {list}", list = supported())]
    Type(DType),
    /// The output doesn't have one element for each that the bytes hold.
    #[error("{bytes} bytes of {dtype} are not {elements} elements")]
    Length {
        /// The type.
        dtype: DType,
        /// Bytes given.
        bytes: usize,
        /// Elements asked for.
        elements: usize,
    },
}

/// The types that the engine computes with.
pub const COMPUTABLE: &[DType] = &[
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
];

/// The names of [`COMPUTABLE`], for messages.
pub(crate) fn supported() -> String {
    COMPUTABLE.iter().map(|t| t.name()).collect::<Vec<_>>().join(" ")
}

/// Turns `bytes` of `dtype` into `out`, element by element in the stored order. `bytes` needs no alignment.
///
/// # Errors
/// [`DequantError::Type`] for a type outside of [`COMPUTABLE`], [`DequantError::Length`] when `out` isn't as long as
/// the bytes have elements. `out` is then untouched.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantError> {
    if !COMPUTABLE.contains(&dtype) {
        return Err(DequantError::Type(dtype));
    }
    if dtype.bytes_of(out.len() as u64) != Some(bytes.len() as u64) {
        return Err(DequantError::Length { dtype, bytes: bytes.len(), elements: out.len() });
    }
    match dtype {
        DType::F32 => blocks(bytes, out, |b: &[u8; 4], y: &mut [f32; 1]| y[0] = f32::from_le_bytes(*b)),
        DType::F16 => {
            blocks(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = f16::from_le_bytes(*b).to_f32())
        }
        DType::BF16 => {
            blocks(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*b).to_f32())
        }
        DType::Q4_0 => blocks(bytes, out, q4_0),
        DType::Q4_1 => blocks(bytes, out, q4_1),
        DType::Q5_0 => blocks(bytes, out, q5_0),
        DType::Q5_1 => blocks(bytes, out, q5_1),
        DType::Q8_0 => blocks(bytes, out, q8_0),
        DType::Q2_K => blocks(bytes, out, q2_k),
        DType::Q3_K => blocks(bytes, out, q3_k),
        DType::Q4_K => blocks(bytes, out, q4_k),
        DType::Q5_K => blocks(bytes, out, q5_k),
        DType::Q6_K => blocks(bytes, out, q6_k),
        other => return Err(DequantError::Type(other)),
    }
    Ok(())
}

/// Calls `f` for each block of `B` bytes with its `N` elements.
fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    f: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let ((bytes, []), (out, [])) = (bytes.as_chunks(), out.as_chunks_mut()) else {
        unreachable!("the lengths were checked against the type's block")
    };
    for (b, y) in bytes.iter().zip(out) {
        f(b, y);
    }
}

/// The half-precision number at byte `at`.
fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn bits_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The fifth bits of elements `j` and `j + 16`, in place.
fn fifth_bits(high: u32, j: usize) -> (u8, u8) {
    let bit = |at: usize| u8::from((high >> at) & 1 == 1) << 4;
    (bit(j), bit(j + 16))
}

fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for (j, q) in b[2..].iter().enumerate() {
        y[j] = f32::from((q & 15).cast_signed() - 8) * d;
        y[j + 16] = f32::from((q >> 4).cast_signed() - 8) * d;
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (j, q) in b[4..].iter().enumerate() {
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half_at(b, 0), bits_at(b, 2));
    for (j, q) in b[6..].iter().enumerate() {
        let (h0, h1) = fifth_bits(high, j);
        y[j] = f32::from(((q & 15) | h0).cast_signed() - 16) * d;
        y[j + 16] = f32::from(((q >> 4) | h1).cast_signed() - 16) * d;
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half_at(b, 0), half_at(b, 2), bits_at(b, 4));
    for (j, q) in b[8..].iter().enumerate() {
        let (h0, h1) = fifth_bits(high, j);
        y[j] = f32::from((q & 15) | h0) * d + m;
        y[j + 16] = f32::from((q >> 4) | h1) * d + m;
    }
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q.cast_signed()) * d;
    }
}

/// 16 groups of 16 elements, each with a 4-bit scale and a 4-bit minimum; 2 bits an element.
fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    for (group, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let min = dmin * f32::from(scales[group] >> 4);
        // Each 32 bytes of `qs` hold 8 groups: two of each bit pair.
        let (half, pair, side) = (group / 8, group % 8 / 2, group % 2);
        for (l, y) in y.iter_mut().enumerate() {
            let q = (qs[half * 32 + side * 16 + l] >> (2 * pair)) & 3;
            *y = scale * f32::from(q) - min;
        }
    }
}

/// 16 groups of 16 elements, each with a signed 6-bit scale; 3 bits an element, the third in a mask.
fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let (mask, qs, packed) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (group, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Low four bits: bytes 0-7, both nibbles. High two bits: bytes 8-11, by quarters.
        let low = (packed[group % 8] >> (4 * (group / 8))) & 15;
        let high = (packed[8 + group % 4] >> (2 * (group / 4))) & 3;
        let scale = d * f32::from((low | (high << 4)).cast_signed() - 32);
        let (half, pair, side) = (group / 8, group % 8 / 2, group % 2);
        for (l, y) in y.iter_mut().enumerate() {
            let at = side * 16 + l;
            let q = ((qs[half * 32 + at] >> (2 * pair)) & 3).cast_signed();
            let absent = (mask[at] >> (half * 4 + pair)) & 1 == 0;
            *y = scale * f32::from(if absent { q - 4 } else { q });
        }
    }
}

/// The 6-bit scale and minimum of group `j` of 8, packed into 12 bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (scale_high, min_high) = (packed[j - 4] >> 6, packed[j] >> 6);
        ((packed[j + 4] & 15) | (scale_high << 4), (packed[j + 4] >> 4) | (min_high << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// 8 groups of 32 elements, each with a 6-bit scale and minimum; 4 bits an element.
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (packed, qs) = (&b[4..16], &b[16..]);
    for (group, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, group);
        let (scale, min) = (d * scale, dmin * min);
        // Two groups share 32 bytes: low nibbles, then high.
        for (l, y) in y.iter_mut().enumerate() {
            let q = (qs[group / 2 * 32 + l] >> (4 * (group % 2))) & 15;
            *y = scale * f32::from(q) - min;
        }
    }
}

/// As `q4_k`, with a fifth bit.
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (packed, high, qs) = (&b[4..16], &b[16..48], &b[48..]);
    for (group, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, group);
        let (scale, min) = (d * scale, dmin * min);
        for (l, y) in y.iter_mut().enumerate() {
            let low = (qs[group / 2 * 32 + l] >> (4 * (group % 2))) & 15;
            let fifth = (high[l] >> group) & 1;
            *y = scale * f32::from(low | (fifth << 4)) - min;
        }
    }
}

/// 16 groups of 16 elements, each with a signed 8-bit scale; 6 bits an element.
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (group, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        // Each half has 128 elements: quarters of 32 that share `high` by bit pairs, and `low` two and two by nibbles.
        let (half, quarter, side) = (group / 8, group % 8 / 2, group % 2);
        for (l, y) in y.iter_mut().enumerate() {
            let at = side * 16 + l;
            let four = (low[half * 64 + (quarter % 2) * 32 + at] >> (4 * (quarter / 2))) & 15;
            let two = (high[half * 32 + at] >> (2 * quarter)) & 3;
            *y = scale * f32::from((four | (two << 4)).cast_signed() - 32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random blocks and what the `gguf` package of PyPI makes of them (`scripts/fixtures/dequant.py`).
    macro_rules! vectors {
        ($($dtype:ident),*) => {
            &[$((
                DType::$dtype,
                include_bytes!(concat!("../tests/fixtures/dequant/", stringify!($dtype), ".blocks")) as &[u8],
                include_bytes!(concat!("../tests/fixtures/dequant/", stringify!($dtype), ".f32")) as &[u8],
            )),*]
        };
    }

    const VECTORS: &[(DType, &[u8], &[u8])] =
        vectors!(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K);

    #[test]
    fn equals_the_reference_bit_for_bit() {
        assert_eq!(VECTORS.iter().map(|v| v.0).collect::<Vec<_>>(), COMPUTABLE);
        for (dtype, blocks, expected) in VECTORS {
            let expected: Vec<u32> = expected.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            let mut out = vec![f32::NAN; expected.len()];
            dequantize(*dtype, blocks, &mut out).unwrap();
            for (i, (found, expected)) in out.iter().zip(&expected).enumerate() {
                let both = (*found, f32::from_bits(*expected));
                // Zeros may differ in sign: 0 * d of a negative d.
                assert!(found.to_bits() == *expected || both == (0.0, 0.0), "{dtype} element {i}: {both:?}");
            }
        }
    }

    #[test]
    fn refuses() {
        let mut out = [0.0; 32];
        assert_eq!(dequantize(DType::IQ4_NL, &[0; 18], &mut out), Err(DequantError::Type(DType::IQ4_NL)));
        for (bytes, elements) in [(17, 32), (18, 31), (36, 32), (0, 32), (18, 0)] {
            let bytes = vec![0; bytes];
            let mut out = vec![1.0; elements];
            let error = dequantize(DType::Q4_0, &bytes, &mut out).unwrap_err();
            assert_eq!(error, DequantError::Length { dtype: DType::Q4_0, bytes: bytes.len(), elements });
            assert!(out.iter().all(|y| *y == 1.0));
        }
    }
}
