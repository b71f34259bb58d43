//! A process that somebody else has started: waiting for its end, and ending it.

#![expect(unsafe_code, reason = "registers a descriptor with the runtime")]

use std::{io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::{Interest, unix::AsyncFd};

/// A process that isn't this one's child. It stays this very one when its number is another's.
#[derive(Debug)]
pub struct ForeignProcess {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

// === impl ForeignProcess ===

impl ForeignProcess {
    /// Opens the process that has this number now.
    ///
    /// # Errors
    /// The operating system's: there is none.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O.
    pub fn open(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
        // SAFETY: an `OwnedFd` is open, and names the same description until it is dropped, which `AsyncFd` does after
        // it has taken it out of the runtime again.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self { pid, pidfd })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended. Cancel-safe.
    ///
    /// # Errors
    /// The runtime is going away.
    pub async fn ended(&self) -> io::Result<()> {
        // It stays readable.
        self.pidfd.readable().await.map(|mut ready| ready.retain_ready())
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// The operating system's: it has ended, or belongs to somebody else.
    pub fn kill(&self) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL)?)
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_process_is_waited_for_and_ended() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = ForeignProcess::open(child.id()).unwrap();
        assert_eq!(process.pid(), child.id());
        assert!(timeout(Duration::from_millis(50), process.ended()).await.is_err(), "it runs");
        process.kill().unwrap();
        timeout(Duration::from_secs(20), process.ended()).await.expect("it ended").unwrap();
        process.ended().await.unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(process.kill().is_err());
        assert!(ForeignProcess::open(u32::MAX).is_err());
    }
}
