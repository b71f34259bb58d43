//! One process at a time changes a model.

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::error::RegistryError;

/// How often a waiting pull looks whether the other is done.
const RETRY: Duration = Duration::from_millis(100);

/// Held while a model is changed. The operating system releases it when the process dies.
#[derive(Debug)]
pub(crate) struct ModelLock {
    _file: File,
}

// === impl ModelLock ===

impl ModelLock {
    /// Waits for the lock, however long another pull takes; `waiting` is called once if it has to. Cancel-safe.
    pub(crate) async fn wait(path: PathBuf, waiting: impl FnOnce()) -> Result<Self, RegistryError> {
        let file = open(&path)?;
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(RegistryError::io(&path)(e)),
            }
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Waits for the lock on this thread.
    pub(crate) fn blocking(path: &Path) -> Result<Self, RegistryError> {
        let file = open(path)?;
        file.lock().map_err(RegistryError::io(path))?;
        Ok(Self { _file: file })
    }
}

fn open(path: &Path) -> Result<File, RegistryError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(RegistryError::io(dir))?;
    OpenOptions::new().create(true).write(true).truncate(false).open(path).map_err(RegistryError::io(path))
}
