//! Why a load failed.

use std::{path::PathBuf, sync::Arc};

use stoker_checkpoint::{ChunkSum, FileIdentity};
use stoker_device::DeviceError;
use stoker_io::{FileStamp, PoolError, ReadError};
use stoker_types::{ByteSize, ModelName};

/// Why a store can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// There are no reading threads.
    #[error("starting reading threads failed: {0}")]
    Threads(std::io::Error),
}

/// Why a load failed. Everything that it brought is gone from memory (after [`LoadError::Device`], chunks whose sums were known
/// stay as cache); slots of its reads that are still under way follow, each within one chunk's time.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// What is in use leaves too little room.
    #[error(
        "`{model}` needs {needed} of memory for weights; {free} of {budget} can be had, {mapped} are in use"
    )]
    OutOfBudget {
        /// What was to be loaded.
        model: ModelName,
        /// What it takes.
        needed: ByteSize,
        /// What is free or may be evicted.
        free: ByteSize,
        /// What is mapped, being loaded, streamed or pinned.
        mapped: ByteSize,
        /// All there is.
        budget: ByteSize,
    },
    /// A chunk was read twice, and its sum was wrong both times.
    #[error(
        "{path}: chunk {chunk} at byte {offset} has the sum {found}, not {expected}; read again past the page cache: {again}{}",
        if found == again { ", the file is corrupt" } else { ", read differently twice: suspect disk or memory" }
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Index of the chunk.
        chunk: u32,
        /// Its first byte in the file.
        offset: u64,
        /// The sum that it should have.
        expected: ChunkSum,
        /// The sum that it had at first.
        found: ChunkSum,
        /// The sum that it had when read again. The same: the file is wrong; another: the disk or the memory is.
        again: ChunkSum,
    },
    /// What is on a device is not what was sent there.
    #[error(
        "GPU {device} has chunk {chunk} of {path} (at byte {offset}) with the sum {found}, not {expected}: suspect its memory or the link"
    )]
    CorruptOnDevice {
        /// The file.
        path: PathBuf,
        /// Index of the chunk.
        chunk: u32,
        /// Its first byte in the file.
        offset: u64,
        /// The device's number.
        device: u32,
        /// The sum that it should have.
        expected: ChunkSum,
        /// The sum of what the device has.
        found: ChunkSum,
    },
    /// Nothing is known that a device's memory could be compared with.
    #[error("no checksums of {path} are known yet: load it to memory once, or run `stoker verify`")]
    NoSums {
        /// The file.
        path: PathBuf,
    },
    /// A device has slices of tensors only, whose sums are nobody's.
    #[error("`{model}` is split over devices by columns: a slice's checksum can't be told from the chunks'")]
    Sliced {
        /// The model.
        model: ModelName,
    },
    /// A file is not what its source says. Only known once all of it has been read.
    #[error("{path}: the file has the SHA-256 {found}, its source says {expected}: fetch it again")]
    WrongHash {
        /// The file.
        path: PathBuf,
        /// The hash that it should have, lower-case hexadecimal.
        expected: String,
        /// The hash that it has.
        found: String,
    },
    /// A file that should pass through memory has nothing but a hash of the whole, which says nothing before its end.
    #[error(
        "{path}: only a hash of the whole file is known, and it has to pass through piece by piece; run `stoker verify` once"
    )]
    OnlyHash {
        /// The file.
        path: PathBuf,
    },
    /// The file is no longer the one that was indexed.
    #[error("{path} has changed since it was indexed: {}", change(was, is.as_ref()))]
    Changed {
        /// The file.
        path: PathBuf,
        /// What was indexed.
        was: FileIdentity,
        /// What is there; `None`: nothing.
        is: Option<FileIdentity>,
    },
    /// The remote store has another version of the object than the one that was indexed.
    #[error("{url} has changed since it was indexed: {detail}")]
    ObjectChanged {
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
    /// The file is only in a remote store, and this store reaches none.
    #[error(
        "{url} is not on this machine, and remote stores are not to be used; `stoker pull` the model while they are"
    )]
    NoRemote {
        /// Its address.
        url: String,
    },
    /// Reading failed.
    #[error("reading {path} (chunk at byte {offset}) failed: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// First byte of the read.
        offset: u64,
        /// The operating system's words.
        source: ReadError,
    },
    /// Opening a file failed.
    #[error("opening {path} failed: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        source: Arc<std::io::Error>,
    },
    /// The files were described for another chunk size than the store's.
    #[error("files described in chunks of {given}, the store's are of {store}")]
    ChunkSize {
        /// The files'.
        given: ByteSize,
        /// The store's.
        store: ByteSize,
    },
    /// The device failed, or its driver refused.
    #[error("loading `{model}` to a device failed: {source}")]
    Device {
        /// What was being loaded.
        model: ModelName,
        /// The device's words.
        source: DeviceError,
    },
    /// The memory set aside on the device is shorter than the model.
    #[error("{needed} don't fit into {slab} of device memory")]
    SlabTooSmall {
        /// What the layout takes.
        needed: ByteSize,
        /// What there is.
        slab: ByteSize,
    },
    /// Nobody wants it any more.
    #[error("the load was cancelled")]
    Cancelled,
    /// A read came to no end: a fault in the program.
    #[error("a read of {path} was lost")]
    Lost {
        /// The file.
        path: PathBuf,
    },
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

/// When to try a failed load again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// At once, if it is still wanted.
    Now,
    /// After a while: the cause may pass.
    Later,
    /// When something that is in use has been let go.
    WhenRoom,
    /// After the model has been indexed anew.
    AfterIndexing,
    /// After the files have been fetched again.
    AfterFetching,
    /// Not.
    Never,
}

// === impl LoadError ===

impl LoadError {
    /// When trying again makes sense.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::OutOfBudget { .. } => Retry::WhenRoom,
            Self::Corrupt { .. } | Self::WrongHash { .. } => Retry::AfterFetching,
            Self::Changed { .. } | Self::ObjectChanged { .. } => Retry::AfterIndexing,
            Self::Read { .. } | Self::Open { .. } | Self::Lost { .. } | Self::Refused { .. } => Retry::Later,
            Self::Device { source: DeviceError::OutOfMemory { .. }, .. } => Retry::WhenRoom,
            Self::Device { source: DeviceError::Lost { .. }, .. } => Retry::Never,
            Self::Device { .. } | Self::CorruptOnDevice { .. } => Retry::Later,
            Self::Cancelled => Retry::Now,
            Self::OnlyHash { .. }
            | Self::NoSums { .. }
            | Self::Sliced { .. }
            | Self::ChunkSize { .. }
            | Self::SlabTooSmall { .. }
            | Self::NoRemote { .. }
            | Self::Closed => Retry::Never,
        }
    }

    /// A short name for metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::OutOfBudget { .. } => "out_of_budget",
            Self::Corrupt { .. } => "corrupt",
            Self::CorruptOnDevice { .. } => "corrupt_on_device",
            Self::NoSums { .. } => "no_sums",
            Self::Sliced { .. } => "sliced",
            Self::WrongHash { .. } => "wrong_hash",
            Self::OnlyHash { .. } => "only_hash",
            Self::Changed { .. } => "changed",
            Self::ObjectChanged { .. } => "object_changed",
            Self::Refused { .. } => "refused",
            Self::NoRemote { .. } => "no_remote",
            Self::Read { .. } => "read",
            Self::Open { .. } => "open",
            Self::ChunkSize { .. } => "chunk_size",
            Self::Device { .. } => "device",
            Self::SlabTooSmall { .. } => "slab_too_small",
            Self::Cancelled => "cancelled",
            Self::Lost { .. } => "lost",
            Self::Closed => "closed",
        }
    }
}

/// Why a file can't be read, by what its reader says. `shown` is where it was read from.
pub(crate) fn unreadable(shown: PathBuf, offset: u64, source: ReadError) -> LoadError {
    match source {
        ReadError::Changed { url, detail } => LoadError::ObjectChanged { url, detail },
        ReadError::Refused { url, detail } => LoadError::Refused { url, detail },
        source => LoadError::Read { path: shown, offset, source },
    }
}

/// The manifest's form of what the disk says of a file.
pub(crate) fn identity(stamp: FileStamp) -> FileIdentity {
    FileIdentity { len: stamp.len, mtime_ns: stamp.mtime_ns, inode: stamp.inode }
}

fn change(was: &FileIdentity, is: Option<&FileIdentity>) -> String {
    was.change(is).as_ref().map_or_else(String::new, ToString::to_string)
}
