//! Memory pressure, told by the kernel: a trigger on a pressure file (PSI) that becomes ready when tasks have stalled
//! for want of memory. Nothing polls.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};
use stoker_io::PriorityFd;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::SystemMemory;

/// Some task stalled for 15 % of a second; or of two, which is what the kernel allows those without privileges.
const TRIGGERS: [&str; 2] = ["some 150000 1000000", "some 300000 2000000"];

/// The whole machine's.
const SYSTEM: &str = "/proc/pressure/memory";

/// A descriptor that becomes ready (`POLLPRI`) under memory pressure, at most once in each of its windows.
#[derive(Debug)]
pub struct PressureTrigger {
    fd: OwnedFd,
}

/// Why nothing tells of memory pressure.
#[derive(Debug, thiserror::Error)]
#[error("{path} takes no trigger: {source}", path = path.display())]
pub struct PressureError {
    /// The pressure file.
    pub path: PathBuf,
    /// The operating system's words: no such file where the kernel has no PSI.
    pub source: io::Error,
}

// === impl PressureTrigger ===

impl PressureTrigger {
    /// A trigger for the control group that limits this process, else for the machine.
    ///
    /// # Errors
    /// [`PressureError`] where it isn't permitted, or the kernel has none.
    pub fn open() -> Result<Self, PressureError> {
        let group = SystemMemory::default().limited_group().map(|dir| dir.join("memory.pressure"));
        let of_group = group.as_deref().and_then(|path| Self::on(path).ok());
        of_group.map_or_else(|| Self::on(Path::new(SYSTEM)), Ok)
    }

    /// A trigger on one pressure file.
    ///
    /// # Errors
    /// [`PressureError`].
    pub fn on(path: &Path) -> Result<Self, PressureError> {
        let mut refused = io::Error::from(io::ErrorKind::Unsupported);
        for trigger in TRIGGERS {
            // One trigger for each descriptor; it goes when that is closed.
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let set = rustix::fs::open(path, flags, Mode::empty()).and_then(|fd| {
                rustix::io::write(&fd, format!("{trigger}\0").as_bytes())?;
                Ok(fd)
            });
            match set {
                Ok(fd) => return Ok(Self { fd }),
                Err(errno) => refused = errno.into(),
            }
        }
        Err(PressureError { path: path.to_owned(), source: refused })
    }
}

impl From<OwnedFd> for PressureTrigger {
    /// Any descriptor that becomes ready with priority data.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

/// Calls `relieve` whenever the trigger fires, one call at a time, until it returns false or the guard is dropped.
pub(crate) fn watch<F: Future<Output = bool> + Send>(
    trigger: PressureTrigger,
    mut relieve: impl FnMut() -> F + Send + 'static,
) -> io::Result<DropGuard> {
    let fd = PriorityFd::new(trigger.fd)?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        let watching = async {
            // An error or an end: the runtime or the control group is going away.
            while fd.event().await.unwrap_or(false) && relieve().await {}
        };
        tokio::select! {
            () = watching => tracing::debug!("no more news of memory pressure"),
            () = stopped.cancelled() => {}
        }
    });
    Ok(stop.drop_guard())
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use rustix::net::SendFlags;
    use tokio::{sync::mpsc, time::timeout};

    use super::*;

    /// Urgent data makes a socket ready as pressure makes a pressure file ready.
    fn fake() -> (TcpStream, PressureTrigger) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let theirs = listener.accept().unwrap().0;
        theirs.set_nonblocking(true).unwrap();
        (ours, OwnedFd::from(theirs).into())
    }

    #[tokio::test]
    async fn each_event_is_answered_once() {
        let (kernel, trigger) = fake();
        let (told, mut calls) = mpsc::unbounded_channel();
        let guard = watch(trigger, move || {
            let told = told.clone();
            async move { told.send(()).is_ok() }
        })
        .unwrap();
        for _ in 0..3 {
            rustix::net::send(&kernel, b"!", SendFlags::OOB).unwrap();
            timeout(Duration::from_secs(20), calls.recv()).await.expect("nobody was told").unwrap();
        }
        assert!(calls.try_recv().is_err());
        drop(guard);
        assert!(timeout(Duration::from_secs(20), calls.recv()).await.expect("the watch goes on").is_none());
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pressure");
        let error = PressureTrigger::on(&path).unwrap_err();
        assert!(error.to_string().contains("pressure takes no trigger"), "{error}");
    }
}
