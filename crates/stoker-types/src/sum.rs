//! The checksum of a chunk of a weight file, and how hashes are written.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use crc_fast::{CrcAlgorithm, Digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
}
