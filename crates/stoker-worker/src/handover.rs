//! What a worker is born with.
//!
//! The control socket is standard input; the pool and the stream socket come over it (see
//! [`stoker_proto::control`]). So no descriptor number has to be trusted, and nothing needs `unsafe`.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use stoker_proto::control::HANDOVER_BYTE;

/// What came over standard input.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) control: UnixStream,
    pub(crate) pool: OwnedFd,
    pub(crate) listener: UnixListener,
    /// Where the node connects that comes after this one.
    pub(crate) successor: UnixListener,
}

/// Why this process can't be a worker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandoverError {
    #[error("standard input is no socket of a node ({0}): `stoker worker` is started by a node, not by hand")]
    NoNode(#[source] io::Error),
    #[error("the node closed the connection before it said anything")]
    Closed,
    #[error("the node handed over {count} descriptors behind byte {byte:#04x}; is it another version?")]
    Unexpected { count: usize, byte: u8 },
}

/// Takes over what the node gives. Blocks until it does.
pub(crate) fn receive(control: impl AsFd) -> Result<Inherited, HandoverError> {
    let no_node = |e: io::Error| HandoverError::NoNode(e);
    let control = UnixStream::from(control.as_fd().try_clone_to_owned().map_err(no_node)?);
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut byte)];
        recvmsg(&control, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(|e| no_node(e.into()))?;
    if received.bytes == 0 {
        return Err(HandoverError::Closed);
    }
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let count = fds.len();
    match <[OwnedFd; 3]>::try_from(fds) {
        Ok([pool, listener, successor]) if byte[0] == HANDOVER_BYTE => {
            let (listener, successor) = (UnixListener::from(listener), UnixListener::from(successor));
            Ok(Inherited { control, pool, listener, successor })
        }
        _ => Err(HandoverError::Unexpected { count, byte: byte[0] }),
    }
}
