//! JSON files of bounded size.

use std::{fs::File, io::Read, path::Path};

use serde::Deserialize;

use crate::CheckpointError;

/// Files of settings beyond this are absurd.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// Reads a whole file of at most `max` bytes.
pub(crate) fn read(path: &Path, max: u64) -> Result<Vec<u8>, CheckpointError> {
    let file = File::open(path).map_err(CheckpointError::io(path))?;
    let len = file.metadata().map_err(CheckpointError::io(path))?.len();
    let too_large = |len| CheckpointError::HeaderTooLarge { file: path.to_owned(), len, max };
    if len > max {
        return Err(too_large(len));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(len).map_err(|_| too_large(len))?);
    // Some files (pipes, /proc) have more to give than their length.
    let read = file.take(max + 1).read_to_end(&mut bytes).map_err(CheckpointError::io(path))? as u64;
    if read > max { Err(too_large(read)) } else { Ok(bytes) }
}

/// [`read`], or `None` when there is no such file.
pub(crate) fn read_if_there(path: &Path, max: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    match read(path, max) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses JSON; `path` is for messages.
pub(crate) fn parse<'a, T: Deserialize<'a>>(path: &Path, bytes: &'a [u8]) -> Result<T, CheckpointError> {
    serde_json::from_slice(bytes).map_err(|source| CheckpointError::Json { file: path.to_owned(), source })
}
