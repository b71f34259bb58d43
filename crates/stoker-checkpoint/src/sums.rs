//! Checksums of chunks.

use stoker_types::{ChunkSum, Summing};

use crate::manifest::CHUNK_BYTES;

/// Computes the sums of a file's chunks from its bytes as they pass by, from the first on.
#[derive(Debug, Default)]
pub struct ChunkSums {
    done: Vec<ChunkSum>,
    summing: Summing,
    /// Bytes in `summing`.
    filled: u64,
}

impl ChunkSums {
    /// Takes the file's next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(CHUNK_BYTES - self.filled).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.summing.update(now);
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
        self.done.push(std::mem::take(&mut self.summing).finish());
        self.filled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_same_sums_as_chunks() {
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        let bytes: Vec<u8> = (0..chunk * 2 + 77).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
        let whole: Vec<ChunkSum> = bytes.chunks(chunk).map(ChunkSum::of).collect();
        for piece in [1 << 20, chunk - 1, chunk + 1, bytes.len()] {
            let mut sums = ChunkSums::default();
            bytes.chunks(piece).for_each(|b| sums.update(b));
            assert_eq!(sums.finish(), whole, "in pieces of {piece}");
        }
        assert_eq!(ChunkSums::default().finish(), []);
    }
}
