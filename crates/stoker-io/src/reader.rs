//! What reads: one open file, filling chunk buffers.

use std::{fmt, io, path::Path, sync::Arc, time::Duration};

use stoker_types::{ChunkSum, RemoteObject};

use crate::ChunkPart;

/// Reads one open file (or object) into chunk buffers. The buffer moves into the read and comes back with the result.
///
/// Contract: `done` is called exactly once, on any thread, whatever happens. A reader that blocks (pread) reads on
/// the calling thread and calls `done` there; one that doesn't (`io_uring`, an object store) returns at once and calls
/// it later. The whole of `op.len` is filled, or the read fails: short reads are the reader's business.
pub trait Reader: Send + Sync {
    /// How it reads, and why so.
    fn choice(&self) -> &Choice;

    /// The open file as it is now.
    ///
    /// # Errors
    /// The operating system's.
    fn stamp(&self) -> io::Result<FileStamp>;

    /// Into parts of how many bytes a longer read is better cut, so that several threads share it; `None`: it isn't. A
    /// multiple of 4096.
    fn part_bytes(&self) -> Option<usize> {
        None
    }

    /// Fills the buffer's first `op.len` bytes from `op.offset` on, checksums them if asked to, and hands everything
    /// to `done`.
    fn read(&self, op: ReadOp, done: Completion);
}

/// Opens files for reading. A seam for other sources, and for faults in tests.
pub trait Open: Send + Sync {
    /// Opens a file.
    ///
    /// # Errors
    /// The operating system's, such as "not found".
    fn open(&self, path: &Path, mode: ReadMode) -> io::Result<Arc<dyn Reader>>;
}

/// Opens objects of remote stores.
pub trait OpenRemote: Send + Sync {
    /// Opens one version of an object. Nothing is asked of the store before the first read.
    ///
    /// # Errors
    /// [`ReadError::Remote`]: the address can't be used.
    fn open(&self, object: &RemoteObject) -> Result<Arc<dyn Reader>, ReadError>;

    /// Reads that may be under way at a time: more gain nothing.
    fn reads_max(&self) -> usize;
}

/// What is called when a read has ended.
pub type Completion = Box<dyn FnOnce(ReadDone) + Send>;

/// A read to be done.
#[derive(Debug)]
pub struct ReadOp {
    /// Where the bytes go, from its beginning.
    pub buf: ChunkPart,
    /// Where they come from in the file; a multiple of 4096 reads fastest.
    pub offset: u64,
    /// How many; at most the buffer's length.
    pub len: usize,
    /// Whether to compute their checksum in passing.
    pub sum: bool,
}

/// A read that has ended.
#[derive(Debug)]
pub struct ReadDone {
    /// The buffer. After an error its contents mean nothing.
    pub buf: ChunkPart,
    /// What came of it.
    pub result: Result<Filled, ReadError>,
}

/// What a successful read took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Of the bytes, if asked for.
    pub sum: Option<ChunkSum>,
    /// Time in reading calls.
    pub read_time: Duration,
    /// Time in the checksum.
    pub sum_time: Duration,
}

/// Why a read failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file ended before the read did.
    #[error("the file ends at byte {at}")]
    Truncated {
        /// Its end.
        at: u64,
    },
    /// The operating system's error.
    #[error("at byte {at}: {source}")]
    Io {
        /// Where in the file.
        at: u64,
        /// Its words.
        source: Arc<io::Error>,
    },
    /// The object is not the version that was asked for.
    #[error("{url} has changed since it was indexed: {detail}")]
    Changed {
        /// Its address.
        url: String,
        /// What is not as it was.
        detail: String,
    },
    /// The remote store refuses access.
    #[error("{detail}")]
    Refused {
        /// The object's address.
        url: String,
        /// Why, and what to do about it.
        detail: String,
    },
    /// The remote store didn't give the bytes, however often it was asked.
    #[error("at byte {at}: {detail}")]
    Remote {
        /// Where in the object.
        at: u64,
        /// What was tried, and what happened last.
        detail: String,
    },
}

/// How to read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadMode {
    /// Direct where the file system can and the page cache doesn't already hold most of the file.
    #[default]
    Auto,
    /// Direct where the file system can.
    Direct,
    /// Through the page cache.
    Buffered,
    /// From the medium: what the page cache holds of the file is dropped first, then as `Direct`.
    Uncached,
}

/// A way of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReaderKind {
    /// `O_DIRECT`: past the page cache.
    Direct,
    /// `O_DIRECT` through `io_uring`.
    IoUring,
    /// Through the page cache.
    Buffered,
    /// Ranges of an object of a remote store.
    Remote,
}

/// Why a file is read the way it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// A direct read was tried and worked.
    Probed {
        /// Alignment of file offsets and lengths, bytes.
        align: u32,
        /// Why not through `io_uring`, if that was tried.
        no_ring: Option<String>,
    },
    /// The page cache holds this much of it.
    PageCache {
        /// Of the file's bytes, 0 to 100.
        percent: u8,
    },
    /// The file lives in memory.
    MemoryFileSystem,
    /// A direct read can't be done; why.
    NoDirect(String),
    /// Somebody asked for it.
    Asked,
    /// There is no copy on this machine. What kind of store has it.
    NotHere(&'static str),
}

/// How a file is read, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// How.
    pub kind: ReaderKind,
    /// Why.
    pub reason: Reason,
}

/// What tells one version of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    /// Length, bytes.
    pub len: u64,
    /// Last modification, nanoseconds since the epoch.
    pub mtime_ns: i128,
    /// Inode number.
    pub inode: u64,
}

// === impl Choice ===

impl Choice {
    /// Whether the bytes come from the storage medium rather than from memory, so that the time they take says
    /// something about the medium.
    #[must_use]
    pub fn is_from_medium(&self) -> bool {
        !matches!(self.reason, Reason::PageCache { .. } | Reason::MemoryFileSystem)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.reason)
    }
}

impl ReaderKind {
    /// Its name in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::IoUring => "io_uring",
            Self::Buffered => "buffered",
            Self::Remote => "remote",
        }
    }
}

impl fmt::Display for ReaderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probed { align, no_ring: None } => write!(f, "a direct read works, aligned to {align}"),
            Self::Probed { align, no_ring: Some(why) } => {
                write!(f, "a direct read works, aligned to {align}; no io_uring: {why}")
            }
            Self::PageCache { percent } => write!(f, "the page cache holds {percent} % of it"),
            Self::MemoryFileSystem => f.write_str("the file system is in memory"),
            Self::NoDirect(why) => write!(f, "no direct reads: {why}"),
            Self::Asked => f.write_str("asked for"),
            Self::NotHere(store) => write!(f, "only {store} has it"),
        }
    }
}
