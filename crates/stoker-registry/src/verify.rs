//! Reading every byte of a model and comparing it with what is known.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use stoker_checkpoint::{ChunkSum, manifest::CHUNK_BYTES};
use stoker_types::{FileChange, ModelName, hex};

use crate::{Entry, Registry, error::RegistryError, lock::ModelLock, registry::index_anew};

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// Each weight file.
    pub files: Vec<FileReport>,
}

/// What a check found in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes that were read.
    pub bytes: u64,
    /// How it compares.
    pub outcome: FileOutcome,
}

/// How a file compares with what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileOutcome {
    /// Every chunk has its sum.
    Sound,
    /// No sums were known: now they are, and every load checks them.
    Recorded,
    /// It changed on disk since it was added (length, time or inode): indexed anew, with its sums.
    Changed,
    /// Chunks are not what they were.
    Corrupt(Vec<BadChunk>),
    /// No sums are known, and the hash of the whole file is another.
    WrongHash {
        /// The SHA-256 that it should have, lower-case hexadecimal.
        expected: String,
        /// The SHA-256 that it has.
        found: String,
    },
}

/// A chunk that is not what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadChunk {
    /// Its number, from 0.
    pub chunk: u64,
    /// Its first byte in the file.
    pub offset: u64,
    /// The sum that it should have.
    pub expected: ChunkSum,
    /// The sum that it has.
    pub found: ChunkSum,
    /// The sum when it was read once more. Another one again: suspect disk or memory, not the file.
    pub found_again: ChunkSum,
}

/// Is told how far a check is: file, bytes read, bytes in all.
pub trait VerifyProgress {
    /// More was read.
    fn read(&mut self, file: &Path, done: u64, total: u64);
}

impl<F: FnMut(&Path, u64, u64)> VerifyProgress for F {
    fn read(&mut self, file: &Path, done: u64, total: u64) {
        self(file, done, total);
    }
}

// === impl Registry ===

impl Registry {
    /// Reads all weight files of a model and compares every chunk with its sum. Where no sums are known, records them.
    /// Blocking: takes as long as reading the files.
    ///
    /// # Errors
    /// When there is no such model, or a file can't be read. Corruption is no error here: see
    /// [`FileOutcome::Corrupt`].
    pub fn verify(
        &self,
        name: &ModelName,
        progress: &mut dyn VerifyProgress,
    ) -> Result<VerifyReport, RegistryError> {
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        let mut entry = self.get(name)?;
        let changed = entry.manifest.changed_files(&entry.dir);
        if !changed.is_empty() {
            entry = index_anew(&entry)?;
        }
        let mut files = Vec::new();
        for index in 0..entry.manifest.files.len() {
            let report = self.verify_file(&mut entry, index, &changed, progress)?;
            files.push(report);
        }
        if files.iter().any(|f| matches!(f.outcome, FileOutcome::Recorded | FileOutcome::Changed)) {
            entry.manifest.write(&entry.dir).map_err(RegistryError::checkpoint)?;
        }
        Ok(VerifyReport { files })
    }

    fn verify_file(
        &self,
        entry: &mut Entry,
        index: usize,
        changed: &[(PathBuf, FileChange)],
        progress: &mut dyn VerifyProgress,
    ) -> Result<FileReport, RegistryError> {
        let path = entry.manifest.file_path(&entry.dir, index);
        let known = entry.manifest.files[index].clone();
        let error = || RegistryError::io(&path);
        let file = File::open(&path).map_err(error())?;
        let total = known.identity.len;
        let mut buffer = vec![0; usize::try_from(CHUNK_BYTES.min(total)).unwrap_or(usize::MAX)];
        let (mut sums, mut bad) = (Vec::new(), Vec::new());
        // Sums say more, where they are known.
        let expected_hash = known.sha256.filter(|_| known.chunk_sums.is_empty());
        let mut hash = Sha256::new();
        for chunk in 0..total.div_ceil(CHUNK_BYTES) {
            let offset = chunk * CHUNK_BYTES;
            let len = usize::try_from(CHUNK_BYTES.min(total - offset)).unwrap_or(usize::MAX);
            let bytes = &mut buffer[..len];
            file.read_exact_at(bytes, offset).map_err(error())?;
            if expected_hash.is_some() {
                hash.update(&*bytes);
            }
            let found = ChunkSum::of(bytes);
            let expected = usize::try_from(chunk).ok().and_then(|chunk| known.chunk_sums.get(chunk)).copied();
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                file.read_exact_at(bytes, offset).map_err(error())?;
                bad.push(BadChunk { chunk, offset, expected, found, found_again: ChunkSum::of(bytes) });
            }
            sums.push(found);
            progress.read(&path, offset + len as u64, total);
        }
        let wrong = expected_hash
            .map(|expected| (hex(&hash.finalize()), expected))
            .filter(|(found, expected)| found != expected);
        let outcome = if !bad.is_empty() {
            FileOutcome::Corrupt(bad)
        } else if let Some((found, expected)) = wrong {
            FileOutcome::WrongHash { expected, found }
        } else if known.chunk_sums.is_empty() && total > 0 {
            entry.manifest.record_sums(index, sums)?;
            if changed.iter().any(|(changed, _)| *changed == path) {
                FileOutcome::Changed
            } else {
                FileOutcome::Recorded
            }
        } else {
            FileOutcome::Sound
        };
        Ok(FileReport { path, bytes: total, outcome })
    }
}

impl VerifyReport {
    /// Whether no file is corrupt.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        !self
            .files
            .iter()
            .any(|file| matches!(file.outcome, FileOutcome::Corrupt(_) | FileOutcome::WrongHash { .. }))
    }
}
