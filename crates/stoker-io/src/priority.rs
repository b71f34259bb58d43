//! Waiting for a descriptor's priority data (`POLLPRI`): how the kernel tells of memory pressure.

#![expect(unsafe_code, reason = "registers a descriptor with the runtime")]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// A descriptor whose priority readiness is waited for.
#[derive(Debug)]
pub struct PriorityFd {
    fd: AsyncFd<OwnedFd>,
}

// === impl PriorityFd ===

impl PriorityFd {
    /// Registers a descriptor with the runtime.
    ///
    /// # Errors
    /// The operating system's: a file that can't be waited for.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is open, and names the same description until it is dropped, which `AsyncFd` does after
        // it has taken it out of the runtime again.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }?;
        Ok(Self { fd })
    }

    /// Waits for the next event. False when there will be none any more. Cancel-safe.
    ///
    /// # Errors
    /// The runtime is going away.
    pub async fn event(&self) -> io::Result<bool> {
        let mut ready = self.fd.ready(Interest::PRIORITY).await?;
        // Closed, or its subject is gone: that stays, so nobody should come back for it.
        let is_event = ready.ready().is_priority();
        ready.clear_ready();
        Ok(is_event)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use rustix::net::SendFlags;
    use tokio::time::timeout;

    use super::*;

    fn pair() -> (TcpStream, PriorityFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let receiver = listener.accept().unwrap().0;
        receiver.set_nonblocking(true).unwrap();
        (sender, PriorityFd::new(receiver.into()).unwrap())
    }

    #[tokio::test]
    async fn urgent_data_is_an_event_and_other_data_is_none() {
        let (mut sender, fd) = pair();
        sender.write_all(b"data").unwrap();
        assert!(timeout(Duration::from_millis(50), fd.event()).await.is_err(), "plain data is no event");
        for _ in 0..3 {
            rustix::net::send(&sender, b"!", SendFlags::OOB).unwrap();
            assert!(timeout(Duration::from_secs(20), fd.event()).await.expect("no event").unwrap());
        }
    }

    #[tokio::test]
    async fn an_end_is_no_event() {
        let (sender, fd) = pair();
        drop(sender);
        rustix::net::shutdown(fd.fd.get_ref(), rustix::net::Shutdown::Both).unwrap();
        assert!(!timeout(Duration::from_secs(20), fd.event()).await.expect("no end").unwrap());
    }
}
