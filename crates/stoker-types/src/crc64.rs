//! Arithmetic of CRC-64/NVME: polynomials over two elements, modulo the CRC's polynomial. Coefficients are reflected, as the
//! sums' are: that of x^0 is the highest bit.

/// The CRC's polynomial, without its x^64.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^(2^n): for as many bits as a number of bits can have.
const POWERS: [u64; 67] = {
    // x^1.
    let mut powers = [1 << 62; 67];
    let mut n = 1;
    while n < powers.len() {
        powers[n] = multiply(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
};

/// The product of two polynomials.
#[must_use]
pub const fn multiply(a: u64, mut b: u64) -> u64 {
    let (mut product, mut coefficient) = (0, 1 << 63);
    while coefficient != 0 {
        if a & coefficient != 0 {
            product ^= b;
        }
        coefficient >>= 1;
        // b times x.
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    product
}

/// x^exponent.
#[must_use]
pub const fn power(exponent: u64) -> u64 {
    times_power(1 << 63, exponent, 0)
}

/// `value` times x^(exponent * 2^shift).
pub(crate) const fn times_power(mut value: u64, mut exponent: u64, shift: usize) -> u64 {
    let mut bit = shift;
    while exponent != 0 {
        if exponent & 1 == 1 {
            value = multiply(POWERS[bit], value);
        }
        exponent >>= 1;
        bit += 1;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChunkSum;

    #[test]
    fn powers_and_remainders() {
        assert_eq!(power(0), 1 << 63);
        assert_eq!(power(63), 1);
        assert_eq!(power(64), POLYNOMIAL);
        assert_eq!(multiply(power(1000), power(234)), power(1234));
        // Eight bytes times x^64, by hand: the little-endian word is the polynomial.
        let bytes = *b"12345678";
        let remainder = multiply(u64::from_le_bytes(bytes), power(64));
        assert_eq!(ChunkSum::of_remainder(remainder, 8), ChunkSum::of(&bytes));
        assert_eq!(ChunkSum::of_remainder(0, 0), ChunkSum::of(b""));
    }
}
