//! Files that are on their way: written, hashed and summed as the bytes arrive, and found again after a crash.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stoker_checkpoint::{ChunkSum, sums::ChunkSums};
use stoker_types::{ByteSize, hex};

use crate::error::RegistryError;

/// A file of which the first `len` bytes are there.
pub(crate) struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    sums: Sums,
    origin: Origin,
}

/// What a part is a part of. Kept beside it, so that a later process knows whether it may go on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The address, without credentials and query.
    pub(crate) url: String,
    /// First byte of what is fetched, from the beginning of what is there.
    pub(crate) begin: u64,
    /// The server's name for this version of the content.
    pub(crate) etag: Option<String>,
    /// Bytes in all.
    pub(crate) total: Option<u64>,
}

/// A whole file.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    pub(crate) path: PathBuf,
    /// Lower-case hexadecimal.
    pub(crate) sha256: String,
    pub(crate) chunk_sums: Vec<ChunkSum>,
}

/// Everything that is computed over a file's bytes in passing.
#[derive(Default)]
pub(crate) struct Sums {
    sha256: Sha256,
    chunks: ChunkSums,
}

// === impl Part ===

impl Part {
    /// Opens the part at `path` to go on with, or begins it when there is none, or one of something else. Blocking: what
    /// is there is read for its sums.
    pub(crate) fn open(path: &Path, url: &str, begin: u64) -> Result<Self, RegistryError> {
        let error = || RegistryError::io(path);
        let stored: Option<Origin> =
            fs::read(origin_path(path)).ok().and_then(|b| serde_json::from_slice(&b).ok());
        let fits = stored.filter(|o| o.url == url && o.begin == begin);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(error())?;
        let origin =
            fits.clone().unwrap_or_else(|| Origin { url: url.to_owned(), begin, ..Origin::default() });
        let mut part = Self { path: path.to_owned(), file, len: 0, sums: Sums::default(), origin };
        if fits.is_some() {
            let mut buffer = vec![0; 1 << 20];
            loop {
                match part.file.read(&mut buffer).map_err(error())? {
                    0 => break,
                    n => {
                        part.sums.update(&buffer[..n]);
                        part.len += n as u64;
                    }
                }
            }
        } else {
            part.restart()?;
        }
        Ok(part)
    }

    /// Throws away what is there.
    pub(crate) fn restart(&mut self) -> Result<(), RegistryError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(RegistryError::io(&self.path))?;
        self.len = 0;
        self.sums = Sums::default();
        self.set_origin(None, None)
    }

    /// Remembers which version of the content this is.
    pub(crate) fn set_origin(
        &mut self,
        etag: Option<String>,
        total: Option<u64>,
    ) -> Result<(), RegistryError> {
        let origin = Origin { etag, total, ..self.origin.clone() };
        if origin == self.origin && self.len > 0 {
            return Ok(());
        }
        self.origin = origin;
        let path = origin_path(&self.path);
        let bytes = serde_json::to_vec(&self.origin).map_err(|e| RegistryError::io(&path)(e.into()))?;
        fs::write(&path, bytes).map_err(RegistryError::io(&path))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), RegistryError> {
        let needed = self.origin.total.unwrap_or(0).saturating_sub(self.len);
        self.file.write_all(bytes).map_err(RegistryError::io_needing(&self.path, needed))?;
        self.sums.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// How much is there.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Makes the file durable.
    pub(crate) fn finish(self) -> Result<Finished, RegistryError> {
        self.file.sync_all().map_err(RegistryError::io_needing(&self.path, 0))?;
        Ok(self.sums.finish(self.path))
    }
}

// === impl Sums ===

impl Sums {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.chunks.update(bytes);
    }

    pub(crate) fn finish(self, path: PathBuf) -> Finished {
        let digest = self.sha256.finalize();
        let sha256 = hex(&digest);
        Finished { path, sha256, chunk_sums: self.chunks.finish() }
    }
}

impl Finished {
    /// Deletes the file and what is known of it.
    pub(crate) fn discard(&self) {
        // Best effort: what stays is never taken for whole.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(origin_path(&self.path));
    }
}

/// Where a part's [`Origin`] is kept.
pub(crate) fn origin_path(part: &Path) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(".origin");
    name.into()
}

/// Bytes that the file system of `path` has left for this user.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Errs when less than `needed` bytes are free where `path` is.
pub(crate) fn check_room(path: &Path, needed: u64) -> Result<(), RegistryError> {
    let free = free_bytes(path).map_err(RegistryError::io(path))?;
    if free < needed {
        return Err(RegistryError::DiskFull {
            path: path.to_owned(),
            needed: ByteSize(needed),
            free: ByteSize(free),
        });
    }
    Ok(())
}
