//! Checksums of chunks.

use crc_fast::{CrcAlgorithm, Digest};

use crate::{ChunkSum, manifest::CHUNK_BYTES};

/// The sum of one chunk: CRC-64/NVME, which the processor's carry-less multiplication computes at memory speed.
#[must_use]
pub fn chunk_sum(bytes: &[u8]) -> ChunkSum {
    ChunkSum(crc_fast::crc64_nvme(bytes))
}

/// Computes the sums of a file's chunks from its bytes as they pass by.
pub struct ChunkSums {
    done: Vec<ChunkSum>,
    digest: Digest,
    /// Bytes in `digest`.
    filled: u64,
}

impl ChunkSums {
    /// For the first byte of a file.
    #[must_use]
    pub fn new() -> Self {
        Self { done: Vec::new(), digest: Digest::new(CrcAlgorithm::Crc64Nvme), filled: 0 }
    }

    /// Takes the file's next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(CHUNK_BYTES - self.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.digest.update(now);
            self.filled += now.len() as u64;
            if self.filled == CHUNK_BYTES {
                self.finish_chunk();
            }
            bytes = later;
        }
    }

    /// The sums; the last chunk may be shorter.
    #[must_use]
    pub fn finish(mut self) -> Vec<ChunkSum> {
        if self.filled > 0 {
            self.finish_chunk();
        }
        self.done
    }

    fn finish_chunk(&mut self) {
        let digest = std::mem::replace(&mut self.digest, Digest::new(CrcAlgorithm::Crc64Nvme));
        self.done.push(ChunkSum(digest.finalize()));
        self.filled = 0;
    }
}

impl Default for ChunkSums {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_crc64_nvme() {
        // The check value of the catalogue of parametrised CRC algorithms.
        assert_eq!(chunk_sum(b"123456789"), ChunkSum(0xae8b_1486_0a79_9888));
    }

    #[test]
    fn pieces_make_the_same_sums_as_chunks() {
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        let bytes: Vec<u8> = (0..chunk * 2 + 77).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        let whole: Vec<ChunkSum> = bytes.chunks(chunk).map(chunk_sum).collect();
        for piece in [1 << 20, chunk - 1, chunk + 1, bytes.len()] {
            let mut sums = ChunkSums::new();
            bytes.chunks(piece).for_each(|b| sums.update(b));
            assert_eq!(sums.finish(), whole, "in pieces of {piece}");
        }
        assert_eq!(ChunkSums::new().finish(), []);
    }
}
