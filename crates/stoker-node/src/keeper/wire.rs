//! Packets between node and keeper.
//!
//! A request is an operation's byte and a name; an answer is an outcome's byte and what was asked for.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
};

use super::KeeperError;

/// Of this protocol.
pub(super) const VERSION: u8 = 1;

/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Longest packet, bytes.
pub(super) const PACKET_BYTES_MAX: usize = 256;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 8;

/// What is asked of a keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Says its version and process id.
    Hello = 1,
    /// Keeps the descriptor under the name, instead of what it had there.
    Put = 2,
    /// Gives a copy of what is kept under the name.
    Get = 3,
    /// Closes what is kept under the name.
    Remove = 4,
    /// Ends.
    Exit = 5,
    /// Says the first name in order behind the given one, which may be empty.
    Next = 6,
}

/// Why a keeper does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing is kept under the name.
    #[error("nothing is kept under this name")]
    Unknown = 1,
    /// It keeps as many descriptors as it may.
    #[error("it keeps as many descriptors as it may")]
    Full = 2,
    /// The name is empty, too long, or not text of one line.
    #[error("not a name: one line of 1 to {NAME_BYTES_MAX} bytes")]
    Name = 3,
    /// There is not exactly one descriptor where there should be, or one where there should be none.
    #[error("the request came with the wrong number of descriptors")]
    Descriptors = 4,
    /// It doesn't know the operation.
    #[error("it does not understand the request")]
    Request = 5,
}

/// A keeper's socket, which listens.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A packet that was received.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// Neither bytes nor descriptors were cut off.
    pub(super) whole: bool,
}

// === impl Operation, Refusal ===

impl Operation {
    pub(super) fn of(byte: u8) -> Option<Self> {
        [Self::Hello, Self::Put, Self::Get, Self::Remove, Self::Exit, Self::Next]
            .into_iter()
            .find(|operation| *operation as u8 == byte)
    }
}

impl Refusal {
    pub(super) fn of(byte: u8) -> Self {
        [Self::Unknown, Self::Full, Self::Name, Self::Descriptors]
            .into_iter()
            .find(|refusal| *refusal as u8 == byte)
            .unwrap_or(Self::Request)
    }
}

// === impl Listener ===

impl Listener {
    /// Listens at `path`, where a keeper that is gone may have left its socket.
    ///
    /// # Errors
    /// [`KeeperError::Taken`] when a keeper listens there; `Socket`.
    pub fn bind(path: &Path) -> Result<Self, KeeperError> {
        let failed = |source: io::Error| KeeperError::Socket { path: path.to_owned(), source };
        match connect(path) {
            Ok(_) => return Err(KeeperError::Taken { path: path.to_owned() }),
            // Nobody listens.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let bound = || -> io::Result<OwnedFd> {
            let socket = socket()?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            // Before it listens: nobody could connect yet.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        Ok(Self(bound().map_err(failed)?))
    }

    /// One that was inherited.
    ///
    /// # Errors
    /// When it is no socket that listens.
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        if rustix::net::sockopt::socket_acceptconn(&fd)? {
            Ok(Self(fd))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket that listens"))
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.0
    }
}

/// Connects to whoever listens at `path`.
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn socket() -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?)
}

/// The other end's user.
pub(super) fn peer_uid(socket: impl AsFd) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw())
}

/// Sends a packet: a first byte, what follows it, and perhaps a descriptor.
pub(super) fn send(
    socket: impl AsFd,
    first: u8,
    rest: &[u8],
    fd: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() {
        assert!(
            ancillary.push(SendAncillaryMessage::ScmRights(&fds)),
            "the space is made for one descriptor"
        );
    }
    let parts = [IoSlice::new(std::slice::from_ref(&first)), IoSlice::new(rest)];
    rustix::io::retry_on_intr(|| sendmsg(&socket, &parts, &mut ancillary, flags | SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives a packet; `None` when the other end is gone.
pub(super) fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; PACKET_BYTES_MAX];
    // For one more than is ever right: the kernel closes what doesn't fit.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        recvmsg(&socket, &mut parts, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    let whole = !received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Some(Packet { bytes, fds, whole }))
}
