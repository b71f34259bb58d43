//! The files that a model is read from, chunk by chunk; no byte is handed out that was not checked.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use stoker_checkpoint::{ChunkSum, Manifest, manifest::CHUNK_BYTES};
use stoker_types::hex;

use super::PackError;

/// Chunks in memory. Files are mostly in execution order already, or in the order of names: layer 1, 10, 11, 2; a chunk at the
/// border of two layers is wanted twice, with others in between.
const KEPT: usize = 8;

pub(super) struct Sources {
    files: Vec<Source>,
    /// The most recently used last.
    kept: VecDeque<Chunk>,
}

struct Source {
    path: PathBuf,
    file: File,
    len: u64,
    /// What each chunk's sum has to be: known beforehand, or as it was when it was first read.
    sums: Vec<Option<ChunkSum>>,
}

struct Chunk {
    file: u32,
    index: u64,
    bytes: Vec<u8>,
}

// === impl Sources ===

impl Sources {
    /// Opens the files of a manifest. Files of which only a hash is known are read and checked now.
    pub(super) fn open(dir: &Path, manifest: &Manifest) -> Result<Self, PackError> {
        let mut files = Vec::with_capacity(manifest.files.len());
        for (index, known) in manifest.files.iter().enumerate() {
            let path = manifest.file_path(dir, index);
            let file = File::open(&path).map_err(PackError::io(&path))?;
            let len = known.identity.len;
            let chunks = usize::try_from(len.div_ceil(CHUNK_BYTES)).unwrap_or(usize::MAX);
            let sums = (0..chunks).map(|chunk| known.chunk_sums.get(chunk).copied()).collect();
            let mut source = Source { path, file, len, sums };
            if let Some(expected) = known.sha256.as_ref().filter(|_| known.chunk_sums.is_empty()) {
                source.check_hash(expected)?;
            }
            files.push(source);
        }
        Ok(Self { files, kept: VecDeque::new() })
    }

    /// A chunk's bytes.
    pub(super) fn chunk(&mut self, file: u32, index: u64) -> Result<&[u8], PackError> {
        let found = self.kept.iter().position(|chunk| (chunk.file, chunk.index) == (file, index));
        let chunk = match found.and_then(|at| self.kept.remove(at)) {
            Some(chunk) => chunk,
            None => {
                let oldest = if self.kept.len() < KEPT { None } else { self.kept.pop_front() };
                let mut bytes = oldest.map(|chunk| chunk.bytes).unwrap_or_default();
                self.files[file as usize].read(index, &mut bytes)?;
                Chunk { file, index, bytes }
            }
        };
        self.kept.push_back(chunk);
        Ok(self.kept.back().map_or(&[], |chunk| &chunk.bytes))
    }
}

// === impl Source ===

impl Source {
    /// Reads a chunk and checks it.
    fn read(&mut self, index: u64, bytes: &mut Vec<u8>) -> Result<(), PackError> {
        let found = self.fill(index, bytes)?;
        let Some(sum) = usize::try_from(index).ok().and_then(|index| self.sums.get_mut(index)) else {
            return Ok(());
        };
        let expected = *sum.get_or_insert(found);
        if found == expected {
            return Ok(());
        }
        let again = self.fill(index, bytes)?;
        if again == expected {
            tracing::warn!(path = %self.path.display(), chunk = index, "read differently twice: suspect disk or memory");
            return Ok(());
        }
        let offset = index * CHUNK_BYTES;
        Err(PackError::Corrupt { path: self.path.clone(), chunk: index, offset, expected, found, again })
    }

    fn fill(&self, index: u64, bytes: &mut Vec<u8>) -> Result<ChunkSum, PackError> {
        let offset = index * CHUNK_BYTES;
        let len = CHUNK_BYTES.min(self.len.saturating_sub(offset));
        bytes.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        self.file.read_exact_at(bytes, offset).map_err(PackError::io(&self.path))?;
        Ok(ChunkSum::of(bytes))
    }

    /// Reads everything; from here on each chunk is known by its sum.
    fn check_hash(&mut self, expected: &str) -> Result<(), PackError> {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for index in 0..self.sums.len() {
            let sum = self.fill(index as u64, &mut bytes)?;
            hash.update(&bytes);
            self.sums[index] = Some(sum);
        }
        let found = hex(&hash.finalize());
        if found == expected {
            return Ok(());
        }
        Err(PackError::WrongHash { path: self.path.clone(), expected: expected.to_owned(), found })
    }
}
