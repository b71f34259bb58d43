//! A weight file in the making: written from the first byte to the last, its chunks summed on the way.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use stoker_checkpoint::{ChunkSum, sums::ChunkSums};
use stoker_types::ByteSize;

use super::PackError;

/// Bytes that are summed and written at once.
const BUFFER_BYTES: usize = 1 << 20;

pub(super) struct Output {
    path: PathBuf,
    file: File,
    sums: ChunkSums,
    /// What comes next, not yet summed nor written.
    buffer: Vec<u8>,
    /// Bytes so far, those in the buffer too.
    len: u64,
    /// Bytes in the end.
    total: u64,
}

// === impl Output ===

impl Output {
    /// A new file that begins with `header`. Its `total` bytes are asked for at once, so that a full disk is noticed before
    /// anything is read.
    pub(super) fn create(path: PathBuf, header: &[u8], total: u64) -> Result<Self, PackError> {
        let file = File::create_new(&path).map_err(PackError::io(&path))?;
        match fallocate(&file, FallocateFlags::empty(), 0, total) {
            // Where it isn't known, writing tells.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(refused(&path, total, error.into())),
        }
        let buffer = Vec::with_capacity(BUFFER_BYTES);
        let mut output = Self { path, file, sums: ChunkSums::default(), buffer, len: 0, total };
        output.write(header)?;
        Ok(output)
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), PackError> {
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            // Whatever fills the buffer needn't pass through it.
            if self.buffer.is_empty() && bytes.len() >= BUFFER_BYTES {
                return self.put(bytes);
            }
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes zeros up to byte `offset`.
    pub(super) fn fill_to(&mut self, offset: u64) -> Result<(), PackError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.len < offset {
            let len = usize::try_from(offset - self.len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write(&ZEROS[..len])?;
        }
        Ok(())
    }

    /// Makes the file durable; its chunks' sums.
    pub(super) fn finish(mut self, len: u64) -> Result<Vec<ChunkSum>, PackError> {
        self.fill_to(len)?;
        self.flush()?;
        self.file.sync_all().map_err(|error| refused(&self.path, self.total, error))?;
        Ok(self.sums.finish())
    }

    fn flush(&mut self) -> Result<(), PackError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.put(&buffer);
        buffer.clear();
        self.buffer = buffer;
        result
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.sums.update(bytes);
        self.file.write_all(bytes).map_err(|error| refused(&self.path, self.total, error))
    }
}

/// Why `needed` bytes could not be written to `path`.
pub(super) fn refused(path: &Path, needed: u64, source: io::Error) -> PackError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            let dir = path.parent().unwrap_or(path);
            let free = statvfs(dir).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
            PackError::DiskFull { path: path.to_owned(), needed: ByteSize(needed), free: ByteSize(free) }
        }
        _ => PackError::Io { path: path.to_owned(), source },
    }
}
