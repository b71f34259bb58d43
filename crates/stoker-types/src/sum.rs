//! The checksum of a chunk of a weight file, and how hashes are written.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use crc_fast::{CrcAlgorithm, Digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::crc64;

/// CRC-64/NVME of some bytes: the processor's carry-less multiplication computes it at memory speed. In JSON 16
/// hexadecimal digits: an integer of 64 bits does not survive every JSON reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkSum(pub u64);

/// A sum in the making.
pub struct Summing(Digest);

/// Bytes as lower-case hexadecimal, as hashes are written.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

// === impl ChunkSum ===

impl ChunkSum {
    /// The sum of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc_fast::crc64_nvme(bytes))
    }

    /// The sum of `len` bytes which, as a polynomial times x^64, leave `remainder` when divided by the CRC's.
    #[must_use]
    pub const fn of_remainder(remainder: u64, len: u64) -> Self {
        // The sum begins with all bits set, which the bytes move up, and ends inverted.
        Self(crc64::times_power(u64::MAX, len, 3) ^ remainder ^ u64::MAX)
    }

    /// The sum of these bytes and, behind them, `len` bytes whose sum is `next`. A tenth of a microsecond for each bit that
    /// is set in `len`.
    ///
    /// Bytes that come behind multiply what was before by x^8 each, modulo the CRC's polynomial; the powers of x whose
    /// exponents are powers of two are known (Mark Adler's method in zlib). The library's function squares a matrix of
    /// 64 x 64 bits instead, which takes a quarter of a millisecond.
    #[must_use]
    pub const fn then(self, next: Self, len: u64) -> Self {
        let sum = crc64::times_power(self.0, len, 3);
        Self(sum ^ next.0)
    }
}

impl fmt::Display for ChunkSum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for ChunkSum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChunkSum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Self).map_err(serde::de::Error::custom)
    }
}

// === impl Summing ===

impl Summing {
    /// The sum of no bytes.
    #[must_use]
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum.
    #[must_use]
    pub fn finish(self) -> ChunkSum {
        ChunkSum(self.0.finalize())
    }
}

impl Default for Summing {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Summing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Summing").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_algorithm() {
        // The catalogue of parametrised CRC algorithms, CRC-64/NVME: check value of "123456789".
        assert_eq!(ChunkSum::of(b"123456789"), ChunkSum(0xae8b_1486_0a79_9888));
        let mut summing = Summing::new();
        summing.update(b"1234");
        summing.update(b"");
        summing.update(b"56789");
        assert_eq!(summing.finish(), ChunkSum::of(b"123456789"));
        assert_eq!(Summing::new().finish(), ChunkSum::of(b""));
    }

    #[test]
    fn sums_of_parts_make_the_sum_of_the_whole() {
        let bytes: Vec<u8> = (0..70_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let whole = ChunkSum::of(&bytes);
        for at in [0, 1, 7, 4096, 35_000, 69_999, 70_000] {
            let (a, b) = bytes.split_at(at);
            let (first, second, len) = (ChunkSum::of(a), ChunkSum::of(b), b.len() as u64);
            assert_eq!(first.then(second, len), whole, "cut at {at}");
            // The library's, for lengths beyond any file's too.
            for len in [len, 1 << 24, u64::MAX >> 3] {
                let library = crc_fast::checksum_combine(CrcAlgorithm::Crc64Nvme, first.0, second.0, len);
                assert_eq!(first.then(second, len).0, library, "{len} bytes");
            }
        }
        let parts = bytes
            .chunks(999)
            .fold(ChunkSum::of(b""), |sum, part| sum.then(ChunkSum::of(part), part.len() as u64));
        assert_eq!(parts, whole);
    }
}
