//! A program and a node: the program maps a model's chunks out of the node's pool instead of reading files itself.
//!
//! The connection is the node's Unix socket for clients. The node first sends one byte, [`HANDOVER_BYTE`], with one file
//! descriptor behind it (`SCM_RIGHTS`): the chunk pool, opened for reading. Then the client says [`Hold`]; the node answers
//! with any number of [`Progress`], and one [`Held`] or [`Refused`]. The chunks stay where they are until the connection
//! is closed, by either side's end too.

#![expect(missing_docs, reason = "the derives generate undocumented helpers; fields are documented here")]

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use prost::{Message, Oneof};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub use crate::control::{DeviceSlab, FileSlots};

/// The node's first byte, which carries the descriptor.
pub const HANDOVER_BYTE: u8 = b'C';

/// Keep this model in memory for me.
#[derive(Clone, PartialEq, Message)]
pub struct Hold {
    /// [`crate::PROTOCOL_VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// By its name on the node.
    #[prost(string, tag = "2")]
    pub model: String,
    /// Its copy on the device with this UUID; empty: in memory.
    #[prost(string, tag = "3")]
    pub device: String,
    /// The program can't map a device's memory without write access.
    #[prost(bool, tag = "4")]
    pub may_write: bool,
}

/// From the node.
#[derive(Clone, PartialEq, Message)]
pub struct ToClient {
    #[prost(oneof = "to_client::Kind", tags = "1, 2, 3")]
    pub kind: Option<to_client::Kind>,
}

/// Kinds of [`ToClient`].
pub mod to_client {
    use super::{Held, Oneof, Progress, Refused};

    /// One of.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        #[prost(message, tag = "1")]
        Progress(Progress),
        #[prost(message, tag = "2")]
        Held(Held),
        #[prost(message, tag = "3")]
        Refused(Refused),
    }
}

/// How far the load is.
#[derive(Clone, PartialEq, Message)]
pub struct Progress {
    /// Bytes in memory, in execution order.
    #[prost(uint64, tag = "1")]
    pub ready: u64,
    /// Bytes in all.
    #[prost(uint64, tag = "2")]
    pub total: u64,
}

/// It is in memory, whole and checked, and stays.
#[derive(Clone, PartialEq, Message)]
pub struct Held {
    /// The manifest, as `stoker.json` has it, with absolute paths.
    #[prost(bytes = "bytes", tag = "1")]
    pub manifest_json: bytes::Bytes,
    /// Bytes of a pool chunk.
    #[prost(uint64, tag = "2")]
    pub chunk_bytes: u64,
    /// The weight files in the manifest's order.
    #[prost(message, repeated, tag = "3")]
    pub files: Vec<FileSlots>,
    /// Its copy on a device, instead of the files. The memory's descriptors come with the frame.
    #[prost(message, optional, tag = "4")]
    pub slab: Option<DeviceSlab>,
}

/// It can't be had.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// What kind of failure it is: one of [`Refusal`].
    #[prost(enumeration = "Refusal", tag = "1")]
    pub reason: i32,
    /// In words.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Kinds of failures that a client can do something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Refusal {
    /// Anything else.
    Other = 0,
    /// There is no such model.
    UnknownModel = 1,
    /// There is no room for it now.
    OutOfMemory = 2,
    /// Its files are not what they should be.
    Corrupt = 3,
    /// Its files were replaced while they were asked for: ask again.
    Changed = 4,
    /// The node can't share it like this.
    Unsupported = 5,
}

/// Sends the pool's descriptor.
///
/// # Errors
/// The operating system's.
pub fn send_pool(client: impl AsFd, pool: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [pool];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no space for one descriptor"));
    }
    sendmsg(client, &[IoSlice::new(&[HANDOVER_BYTE])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives the pool's descriptor. Blocks until the node has sent it.
///
/// # Errors
/// The operating system's; `InvalidData` when whoever listens is no node.
pub fn receive_pool(node: impl AsFd) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut byte)];
        recvmsg(&node, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    match (fds.pop(), received.bytes) {
        (_, 0) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the node closed the connection: it serves its own user only, and a bounded number of programs",
        )),
        (Some(pool), 1) if byte[0] == HANDOVER_BYTE && fds.is_empty() => Ok(pool),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "whoever listens there is no node of this version",
        )),
    }
}
