//! CRC-64/NVME, the checksum of a chunk.

use crc_fast::{CrcAlgorithm, Digest};

/// Bytes summed at a time: a piece that was just written is still in the cache of the core that wrote it.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// A checksum in the making.
pub struct Summing(Digest);

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
    pub fn finish(self) -> u64 {
        self.0.finalize()
    }
}

impl Default for Summing {
    fn default() -> Self {
        Self::new()
    }
}

/// CRC-64/NVME of some bytes.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::crc64_nvme(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_algorithm() {
        // The catalogue of parametrised CRC algorithms, CRC-64/NVME: check value of "123456789".
        assert_eq!(checksum(b"123456789"), 0xae8b_1486_0a79_9888);
        let mut summing = Summing::new();
        summing.update(b"1234");
        summing.update(b"");
        summing.update(b"56789");
        assert_eq!(summing.finish(), checksum(b"123456789"));
    }
}
