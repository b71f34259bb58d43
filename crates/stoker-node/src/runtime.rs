//! The directory of a node: its sockets, and the lock that keeps it to one node.

use std::{
    collections::BTreeSet,
    fs::{DirBuilder, File, Permissions, TryLockError},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use parking_lot::Mutex;
use stoker_types::WorkerId;

use crate::{
    NodeError,
    spawn::SocketFile,
    survivors::{Found, Left, Sockets},
};

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
    /// The highest number that a worker of an earlier node has.
    last_worker: u32,
    left: Mutex<Left>,
    _lock: File,
}

impl RuntimeDir {
    /// Makes the directory with mode 0700 if it isn't there, takes it for this process, connects to the workers that a node
    /// left there, and removes the sockets of those that are gone.
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
        let mut workers = BTreeSet::new();
        for entry in std::fs::read_dir(&sockets).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match (worker_of(&path), path.extension().and_then(|e| e.to_str())) {
                (Some(worker), Some("sock" | "next")) => drop(workers.insert(worker)),
                (None, Some("sock" | "next")) => std::fs::remove_file(&path).map_err(failed)?,
                _ => {}
            }
        }
        let last_worker = workers.last().map_or(0, |worker| worker.0);
        let find = |worker| {
            let files = Sockets::of(&sockets, worker);
            // Nobody listens: the worker is gone. Dropped, its files go.
            let control = UnixStream::connect(files.successor.path()).ok()?;
            Some(Found { worker, control, sockets: files })
        };
        let left = Left::found(workers.into_iter().filter_map(find).collect());
        Ok(Self { path: path.to_owned(), sockets, last_worker, left: Mutex::new(left), _lock: lock })
    }

    /// Hears what the workers serve that the node before left; who says nothing within `grace` is not taken over. Before
    /// the memory is asked for that it left ([`crate::Keeper::recover`]): who has not been met is in the way of that. On the
    /// runtime that the node will be opened on. Cancel-safe.
    pub async fn meet(&self, grace: Duration) {
        let found = self.left.lock().take_found();
        let met = Left::meet(found, grace).await;
        self.left.lock().workers.extend(met);
    }

    /// Where a keeper of this directory listens.
    #[must_use]
    pub fn keeper_socket(&self) -> PathBuf {
        self.path.join("keeper.sock")
    }

    /// What the node before left, as far as it is known.
    pub(crate) fn left(&self) -> &Mutex<Left> {
        &self.left
    }

    /// Where workers' sockets are.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.sockets.clone()
    }

    /// The highest number that a worker has had which may still be there.
    pub(crate) fn last_worker(&self) -> u32 {
        self.last_worker
    }
}

/// Whose socket it is.
fn worker_of(path: &Path) -> Option<WorkerId> {
    path.file_stem()?.to_str()?.strip_prefix('w')?.parse().ok().map(WorkerId)
}

// === impl Sockets ===

impl Sockets {
    /// A worker's sockets' files, which are there or will be.
    pub(crate) fn of(dir: &Path, worker: WorkerId) -> Self {
        let file = |what: &str| SocketFile::at(dir.join(format!("{worker}.{what}")));
        Self { streams: file("sock"), successor: file("next") }
    }
}
