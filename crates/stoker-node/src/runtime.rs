//! The directory of a node: its sockets, and the lock that keeps it to one node.

use std::{
    fs::{DirBuilder, File, Permissions, TryLockError},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::NodeError;

/// Longest path of a Unix socket, bytes (`sun_path`, with its end).
const SOCKET_PATH_MAX: usize = 107;

/// Longest name of a socket below the runtime directory.
const SOCKET_NAME: &str = "/workers/w4294967295.sock";

/// A directory that belongs to this process for as long as the value lives. When the process is killed, the kernel gives
/// it free after all of the process's threads have ended: nobody writes to its memory any more.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    sockets: PathBuf,
    _lock: File,
}

impl RuntimeDir {
    /// Makes the directory with mode 0700 if it isn't there, takes it for this process, and removes the workers' sockets of
    /// a node that is gone.
    ///
    /// # Errors
    /// [`NodeError::InUse`] when another node has it; `RuntimeDir`; `PathTooLong`.
    pub fn claim(path: &Path) -> Result<Self, NodeError> {
        let failed = |source| NodeError::RuntimeDir { path: path.to_owned(), source };
        let max = SOCKET_PATH_MAX - SOCKET_NAME.len();
        if path.as_os_str().len() > max {
            return Err(NodeError::PathTooLong { path: path.to_owned(), max });
        }
        let sockets = path.join("workers");
        DirBuilder::new().recursive(true).mode(0o700).create(&sockets).map_err(failed)?;
        // It may have been there, made by somebody more generous.
        std::fs::set_permissions(&sockets, Permissions::from_mode(0o700)).map_err(failed)?;
        let lock = File::create(path.join("node.lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(NodeError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        for entry in std::fs::read_dir(&sockets).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|e| e == "sock") {
                std::fs::remove_file(&path).map_err(failed)?;
            }
        }
        Ok(Self { path: path.to_owned(), sockets, _lock: lock })
    }

    /// Where a keeper of this directory listens.
    #[must_use]
    pub fn keeper_socket(&self) -> PathBuf {
        self.path.join("keeper.sock")
    }

    /// Where workers' sockets are.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.sockets.clone()
    }
}
