//! The store's file: who has it open, what its tables are, and how an entry lies in it.

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use redb::{Database, ReadableDatabase as _, ReadableTable, ReadableTableMetadata as _, TableDefinition};
use rustix::fs::{FlockOperation, flock};

use crate::{Entry, Error, Event, LeaseId, Page, Revision};

pub(super) const KV: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("kv");
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
pub(super) const REVISION: &str = "revision";
const FORMAT: &str = "format";
const FORMAT_KNOWN: u64 = 1;
/// Bytes before an entry's value: created, modified, lease (0: none), little-endian.
const HEADER_LEN: usize = 24;
/// Redb's own page cache, in bytes. The store is a few megabytes.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

/// Why a store's file couldn't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody has it open.
    #[error("`{path}` is held by {holder}: one process may have it open; stop that one, or share its handle")]
    Held {
        /// The file.
        path: PathBuf,
        /// Process id and name, as far as known.
        holder: String,
    },
    /// It can't be read or written.
    #[error("can't open `{path}`: {source}; check that the directory exists and belongs to this user")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is no store's file, or was damaged.
    #[error(
        "`{path}` is damaged or no cluster state: {reason}; move it away, nodes write again what they own"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// It was written by a newer Stoker.
    #[error(
        "`{path}` has format {found}, this Stoker knows {FORMAT_KNOWN}: use the newer Stoker that wrote it"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
}

/// An open file, and the lock that says whose it is.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) database: Database,
    pub(super) lock: File,
    pub(super) revision: Revision,
}

/// Opens or makes the file at `path`. Keys of leases are removed: whoever held one was in the process that had the file
/// before.
pub(super) fn open(path: &Path) -> Result<OpenFile, OpenError> {
    let lock = lock(path)?;
    let damaged = |reason: String| OpenError::Damaged { path: path.to_owned(), reason };
    let io = |error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => {
            OpenError::Held { path: path.to_owned(), holder: "a listing that has not ended".to_owned() }
        }
        redb::DatabaseError::Storage(redb::StorageError::Io(source)) => {
            OpenError::Io { path: path.to_owned(), source }
        }
        error => damaged(error.to_string()),
    };
    // Redb asserts what it has no checksum to hold against.
    let opened = std::panic::catch_unwind(|| {
        let mut database = redb::Builder::new().set_cache_size(CACHE_BYTES).create(path)?;
        // Every page against its checksum: the file is small, and reading doesn't look.
        if !database.check_integrity()? {
            tracing::warn!(path = %path.display(), "the cluster store's file was damaged; back to what was whole");
        }
        let revision = prepare(&database);
        Ok((database, revision))
    });
    let opened = opened.map_err(|_| damaged("its pages contradict each other".to_owned()))?;
    let (database, revision) = opened.map_err(io)?;
    match revision.map_err(|error| damaged(error.to_string()))? {
        Ok(revision) => Ok(OpenFile { database, lock, revision }),
        Err(found) => Err(OpenError::Newer { path: path.to_owned(), found }),
    }
}

/// Makes the tables, checks the format, and removes what leases of a former process left. The inner error is a format
/// that isn't known.
fn prepare(database: &Database) -> Result<Result<Revision, u64>, redb::Error> {
    let txn = database.begin_write()?;
    let revision = {
        let mut meta = txn.open_table(META)?;
        let mut kv = txn.open_table(KV)?;
        let format = meta.get(FORMAT)?.map(|value| value.value());
        match format {
            Some(FORMAT_KNOWN) => {}
            None if kv.is_empty()? => drop(meta.insert(FORMAT, FORMAT_KNOWN)?),
            other => return Ok(Err(other.unwrap_or_default())),
        }
        let revision = meta.get(REVISION)?.map_or(1, |value| value.value());
        let before = kv.len()?;
        kv.retain(|_, value| lease_of(value).is_none())?;
        let revision = if kv.len()? < before { revision + 1 } else { revision };
        meta.insert(REVISION, revision)?;
        Revision(revision)
    };
    txn.commit()?;
    Ok(Ok(revision))
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(lock_path).map_err(io)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(OpenError::Held { path: path.to_owned(), holder: holder(&mut file) });
        }
        Err(error) => return Err(io(error.into())),
    }
    // The lock is what counts; its text is for people.
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io)?;
    Ok(file)
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let pid = file.take(32).read_to_string(&mut text).ok().and_then(|_| text.trim().parse::<u32>().ok());
    let Some(pid) = pid else { return "another process".to_owned() };
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("pid {pid} ({})", name.trim()),
        Err(_) => format!("pid {pid}"),
    }
}

// === entries ===

/// An entry's bytes in the table.
pub(super) fn encode(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + entry.value.len());
    bytes.extend_from_slice(&entry.created.0.to_le_bytes());
    bytes.extend_from_slice(&entry.modified.0.to_le_bytes());
    bytes.extend_from_slice(&entry.lease.map_or(0, |lease| lease.0).to_le_bytes());
    bytes.extend_from_slice(&entry.value);
    bytes
}

/// An entry from the table.
pub(super) fn decode(key: &str, bytes: &[u8]) -> Result<Entry, Error> {
    let Some((header, value)) = bytes.split_at_checked(HEADER_LEN) else {
        return Err(Error::Storage {
            reason: format!("`{key}` has {} bytes, too few for an entry", bytes.len()),
        });
    };
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    Ok(Entry {
        key: key.into(),
        value: Bytes::copy_from_slice(value),
        created: Revision(number(0)),
        modified: Revision(number(8)),
        lease: lease_of(bytes),
    })
}

fn lease_of(bytes: &[u8]) -> Option<LeaseId> {
    let lease = bytes.get(16..24)?.try_into().map(u64::from_le_bytes).ok()?;
    (lease != 0).then_some(LeaseId(lease))
}

/// One key, now.
pub(super) fn get(database: &Database, key: &str) -> Result<Option<Entry>, Error> {
    let read = || -> Result<_, redb::Error> { Ok(database.begin_read()?.open_table(KV)?) };
    // The table keeps the transaction alive; what `get` returns doesn't.
    let table = read().map_err(failed)?;
    let value = table.get(key).map_err(|error| failed(error.into()))?;
    value.map(|value| decode(key, value.value())).transpose()
}

/// The table as of now, and the revision that it shows.
pub(super) fn snapshot(
    database: &Database,
) -> Result<(Revision, redb::ReadOnlyTable<&'static str, &'static [u8]>), Error> {
    let read = || -> Result<_, redb::Error> {
        let txn = database.begin_read()?;
        let meta = txn.open_table(META)?;
        let revision = meta.get(REVISION)?.map_or(0, |value| value.value());
        Ok((Revision(revision), txn.open_table(KV)?))
    };
    read().map_err(failed)
}

/// At most `max` entries under `prefix`, after the key `after`.
pub(super) fn page(
    table: &redb::ReadOnlyTable<&'static str, &'static [u8]>,
    prefix: &str,
    after: Option<&str>,
    max: usize,
) -> Result<Page, Error> {
    use std::ops::Bound;
    let start = after.map_or(Bound::Included(prefix), Bound::Excluded);
    let range = table.range::<&str>((start, Bound::Unbounded)).map_err(|error| failed(error.into()))?;
    let mut page = Page::new();
    for item in range.take(max) {
        let (key, value) = item.map_err(|error| failed(error.into()))?;
        if !key.value().starts_with(prefix) {
            break;
        }
        page.push(decode(key.value(), value.value())?);
    }
    Ok(page)
}

pub(super) fn failed(error: redb::Error) -> Error {
    Error::Storage { reason: error.to_string() }
}

/// Removes a key; the event, when there was one.
pub(super) fn remove(
    kv: &mut redb::Table<'_, &'static str, &'static [u8]>,
    key: &str,
) -> Result<Option<Event>, Error> {
    let removed = kv.remove(key).map_err(|error| failed(error.into()))?.is_some();
    Ok(removed.then(|| Event::Delete { key: Arc::from(key) }))
}
