//! What can go wrong with a call to the store, by what the caller can do about it.

use crate::{Expect, LeaseId, Revision};

/// Why a call to the store failed. Each says what to do; [`Error::retry`] says it to programs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The store couldn't be reached, or didn't answer by the deadline. Nothing was written.
    #[error("cluster store unavailable: {reason}; nothing was written, try again")]
    Unavailable {
        /// What was tried.
        reason: String,
    },
    /// A write was sent and its answer didn't come: it may have happened, may happen in a moment, or never.
    #[error("the answer to a write was lost: {reason}; read what it was to change before writing again")]
    UnknownOutcome {
        /// How it was lost.
        reason: String,
    },
    /// A comparison didn't hold. Nothing was written.
    #[error("`{key}` is not as expected ({expected}; found {}); read it again and decide anew", found_text(.found))]
    Conflict {
        /// The first key that differs.
        key: String,
        /// What it was expected to be.
        expected: Expect,
        /// Its revisions (created, modified); `None`: there is no such key.
        found: Option<(Revision, Revision)>,
    },
    /// The history that was asked for is not kept any more.
    #[error(
        "{wanted} is forgotten, the oldest kept is {oldest}; list again and watch from the list's revision"
    )]
    Compacted {
        /// The revision that was asked for.
        wanted: Revision,
        /// The oldest that can be watched from.
        oldest: Revision,
    },
    /// The lease has expired or was revoked, and its keys are gone.
    #[error("{lease} has expired or was revoked, its keys are gone; get a new lease and write them again")]
    LeaseGone {
        /// The lease.
        lease: LeaseId,
    },
    /// The store doesn't accept who we say we are, or doesn't let us do this.
    #[error(
        "the cluster store refused the credentials: {reason}; check user, password, certificate and role"
    )]
    Refused {
        /// What it said.
        reason: String,
    },
    /// Something is larger than the store takes.
    #[error("{what} is too large ({}at most {limit}); store a reference instead of the thing itself", size_text(.size))]
    TooLarge {
        /// What is too large.
        what: String,
        /// How large it is, as far as known: bytes, operations of a transaction, entries of a listing.
        size: Option<usize>,
        /// The limit, in the same unit.
        limit: usize,
    },
    /// A request that no store would take: a bug of the caller.
    #[error("invalid request to the cluster store: {reason}; this is a bug of whoever asked")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The store takes no more writes until an operator makes room.
    #[error(
        "the cluster store is full: {reason}; compact and defragment it or raise its quota, then disarm its alarm"
    )]
    Full {
        /// What it said.
        reason: String,
    },
    /// The other side answered what no etcd answers.
    #[error(
        "the cluster store answered nonsense: {reason}; check that the address is an etcd of version 3.4 or later"
    )]
    Protocol {
        /// What was wrong with it.
        reason: String,
    },
    /// The embedded store's file failed. It takes no more requests until it is opened again.
    #[error("the cluster store's file failed: {reason}; check the disk, then restart")]
    Storage {
        /// The file and its error.
        reason: String,
    },
}

/// What a failed call allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same call again, after a pause.
    Safe,
    /// Not before reading what the call may have done.
    AfterRead,
    /// The same call would fail the same way.
    No,
}

impl Error {
    /// What may be done after it.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unavailable { .. } => Retry::Safe,
            Self::UnknownOutcome { .. } => Retry::AfterRead,
            Self::Conflict { .. }
            | Self::Compacted { .. }
            | Self::LeaseGone { .. }
            | Self::Refused { .. }
            | Self::TooLarge { .. }
            | Self::Invalid { .. }
            | Self::Full { .. }
            | Self::Protocol { .. }
            | Self::Storage { .. } => Retry::No,
        }
    }

    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into() }
    }

    pub(crate) fn unknown(reason: impl Into<String>) -> Self {
        Self::UnknownOutcome { reason: reason.into() }
    }
}

fn size_text(size: &Option<usize>) -> String {
    size.map_or_else(String::new, |size| format!("{size}, "))
}

fn found_text(found: &Option<(Revision, Revision)>) -> String {
    match found {
        Some((created, modified)) => format!("created at {created}, modified at {modified}"),
        None => "no such key".to_owned(),
    }
}
