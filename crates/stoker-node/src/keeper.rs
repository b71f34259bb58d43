//! The keeper: a small process that holds file descriptors for a node, so that memory outlives it.
//!
//! It has no logic: descriptors come and go by name. When a node is killed, its pool and the ledger of what is in it are
//! still there, and so are weights on devices; the next node of the same directory takes them back. When none comes in time, or a node says that it
//! stops for good, the keeper ends, and the memory with it.
//!
//! One request is one packet of a `SOCK_SEQPACKET` Unix socket, with at most one descriptor beside it; so is the answer.
//! The socket is for its owner alone (0600, in a directory of 0700), and both ends check the other's user.

mod client;
mod holders;
mod server;
mod wire;

use std::{io, path::PathBuf, time::Duration};

pub use client::{Keeper, KeeperConfig};
pub(crate) use client::{KeptSlab, SlabFiles};
pub use server::{Limits, serve};
pub use wire::{Listener, NAME_BYTES_MAX, Refusal};

/// What the pool's memory is kept under.
const POOL: &str = "pool";

/// What the pool's ledger is kept under.
const LEDGER: &str = "ledger";

/// What begins the names of weights on devices: behind it comes a number, and behind that [`RECORD`] or the number of a
/// granule.
const SLAB: &str = "slab/";

/// See [`SLAB`].
const RECORD: &str = "record";

/// How long a keeper may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Why a keeper can't be used, or can't keep something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// The socket can't be made or reached.
    #[error("keeper socket {path}: {source}", path = path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// Another keeper listens there.
    #[error("another keeper listens at {path}", path = path.display())]
    Taken {
        /// Where.
        path: PathBuf,
    },
    /// Its process can't be started.
    #[error("starting {program} as keeper failed: {source}")]
    Start {
        /// What was to be run.
        program: String,
        /// The operating system's words.
        source: io::Error,
    },
    /// Whoever listens there belongs to somebody else.
    #[error("the keeper belongs to user {theirs}, not to {ours}")]
    Peer {
        /// Whose it is.
        theirs: u32,
        /// Whose it should be.
        ours: u32,
    },
    /// It is gone, or doesn't answer.
    #[error("the keeper is gone: {0}")]
    Gone(#[source] io::Error),
    /// It was started by another version.
    #[error("the keeper speaks version {theirs}, this node {ours}")]
    Version {
        /// What it speaks.
        theirs: u8,
        /// What is spoken here.
        ours: u8,
    },
    /// It won't.
    #[error("the keeper refused: {0}")]
    Refused(#[from] Refusal),
}
