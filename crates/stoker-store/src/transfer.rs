//! What the reading threads do: open, read, check, read again.

use std::{sync::Arc, time::Duration};

use stoker_checkpoint::ChunkSum;
use stoker_io::{ChunkBuf, Filled, PinError, ReadDone, ReadError, ReadMode, ReadOp, Reader, Task, Work};

use crate::{
    error::{LoadError, identity},
    files::{CheckpointFiles, SourceFile},
    hash,
    job::{Assignment, ChunkRead, JobId},
    shared::Shared,
};

/// Gives reading threads their work.
pub(crate) struct Puller(pub(crate) Arc<Shared>);

/// A read under way. Dropped without a result, it fails its job: nobody waits for ever.
struct Transfer {
    shared: Arc<Shared>,
    job: JobId,
    files: CheckpointFiles,
    position: usize,
    reader: Arc<dyn Reader>,
    expected: Option<ChunkSum>,
    /// Whether the read counts for the disk's rate.
    metered: bool,
    settled: bool,
}

/// A step on all files. Dropped before its end, it fails its job, as [`Transfer`] does.
struct Step<'a> {
    shared: &'a Shared,
    job: JobId,
    files: &'a CheckpointFiles,
    ended: bool,
}

// === impl Puller ===

impl Work for Puller {
    fn next(&self) -> Option<Task> {
        let shared = Arc::clone(&self.0);
        match shared.assign()? {
            Assignment::Open { job, files, mode } => Some(Box::new(move || {
                let step = Step::begin(&shared, job, &files);
                let opened = open(&shared, &files, mode);
                step.end();
                shared.opened(job, opened);
            })),
            Assignment::Read(read) => Some(Box::new(move || Transfer::start(shared, read))),
            Assignment::Check { job, files, readers, to_hash } => Some(Box::new(move || {
                let step = Step::begin(&shared, job, &files);
                let hashed =
                    to_hash.map_or(Ok(()), |chunks| hash::check(&files, chunks, || shared.goes_on(job)));
                // A file that was written to is not called wrong.
                let same =
                    files.files().iter().zip(&readers).try_for_each(|(file, reader)| same(file, &**reader));
                step.end();
                shared.finished(job, same.and(hashed));
            })),
        }
    }
}

// === impl Transfer ===

impl Transfer {
    fn start(shared: Arc<Shared>, read: ChunkRead) {
        let ChunkRead { job, files, position, reader, expected, buf } = read;
        // Before the read: pinning makes the memory that the read would.
        buf.populate(usize::try_from(files.chunk_len(files.order()[position])).unwrap_or(usize::MAX));
        if let Err(error) = buf.pin() {
            not_pinned(&error);
        }
        let metered = reader.choice().is_from_medium();
        if metered {
            shared.read_begins();
        }
        let transfer = Self {
            shared,
            job,
            files,
            position,
            reader: Arc::clone(&reader),
            expected,
            metered,
            settled: false,
        };
        let op = transfer.op(buf);
        reader.read(op, Box::new(move |done| transfer.first(done)));
    }

    /// The first read has ended.
    fn first(mut self, ReadDone { buf, result }: ReadDone) {
        let len = self.files.chunk_len(self.chunk());
        self.end_metering(if result.is_ok() { len } else { 0 });
        match result {
            Err(source) => self.failed(buf, source),
            Ok(filled) => match (self.expected, sum_of(&filled, &buf, len)) {
                (Some(expected), found) if expected != found => self.again(buf, expected, found),
                (_, found) => self.arrived(buf, found, &filled, false),
            },
        }
    }

    /// The sum was wrong: once more, from the medium.
    fn again(self, buf: ChunkBuf, expected: ChunkSum, found: ChunkSum) {
        let file = self.file().clone();
        let offset = self.files.offset(self.chunk());
        tracing::warn!(path = %file.path.display(), offset, %expected, %found, "a chunk's sum is wrong, reading again");
        // A file that was written to is not corrupt.
        if let Err(error) = same(&file, &*self.reader) {
            return self.fail(buf, error);
        }
        let reader = match self.shared.opener.open(&file.path, ReadMode::Uncached) {
            Ok(reader) => reader,
            Err(source) => {
                return self.fail(buf, LoadError::Open { path: file.path, source: Arc::new(source) });
            }
        };
        if let Err(error) = same(&file, &*reader) {
            return self.fail(buf, error);
        }
        let op = self.op(buf);
        reader.read(op, Box::new(move |done| self.second(done, expected, found)));
    }

    /// The second read has ended.
    fn second(self, ReadDone { buf, result }: ReadDone, expected: ChunkSum, found: ChunkSum) {
        let chunk = self.chunk();
        let filled = match result {
            Ok(filled) => filled,
            Err(source) => return self.failed(buf, source),
        };
        let path = self.file().path.clone();
        let offset = self.files.offset(chunk);
        let again = sum_of(&filled, &buf, self.files.chunk_len(chunk));
        if again == expected {
            tracing::error!(path = %path.display(), offset, wrong = %found, "right only when read again: suspect disk or memory");
            self.arrived(buf, again, &filled, true);
        } else {
            self.fail(buf, LoadError::Corrupt { path, chunk: chunk.index, offset, expected, found, again });
        }
    }

    fn arrived(mut self, buf: ChunkBuf, sum: ChunkSum, filled: &Filled, again: bool) {
        self.settled = true;
        let kind = self.reader.choice().kind;
        metrics::counter!("stoker_store_read_bytes_total", "tier" => "ssd", "reader" => kind.name())
            .increment(self.files.chunk_len(self.chunk()));
        if again {
            metrics::counter!("stoker_store_rereads_total").increment(1);
        }
        self.shared.arrived(self.job, self.position, buf, sum, filled, again);
    }

    fn failed(self, buf: ChunkBuf, source: ReadError) {
        // A file that ends early has most likely been replaced: then that is what to say.
        let error = match same(self.file(), &*self.reader) {
            Err(changed) => changed,
            Ok(()) => LoadError::Read {
                path: self.file().path.clone(),
                offset: self.files.offset(self.chunk()),
                source,
            },
        };
        self.fail(buf, error);
    }

    fn fail(mut self, buf: ChunkBuf, error: LoadError) {
        // First, so that whoever learns of the failure finds the slot free.
        drop(buf);
        self.settled = true;
        self.shared.fail(self.job, error);
    }

    fn op(&self, buf: ChunkBuf) -> ReadOp {
        let chunk = self.chunk();
        // A chunk's length is at most the pool's chunk size, which is a `usize`.
        let len = usize::try_from(self.files.chunk_len(chunk)).unwrap_or(buf.len());
        ReadOp { buf, offset: self.files.offset(chunk), len, sum: true }
    }

    fn end_metering(&mut self, bytes: u64) {
        if std::mem::take(&mut self.metered) {
            self.shared.read_ended(bytes);
        }
    }

    fn chunk(&self) -> crate::ChunkRef {
        self.files.order()[self.position]
    }

    fn file(&self) -> &SourceFile {
        self.files.file_of(self.chunk())
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.end_metering(0);
        if !self.settled {
            self.shared.fail(self.job, LoadError::Lost { path: self.file().path.clone() });
        }
    }
}

// === impl Step ===

impl<'a> Step<'a> {
    fn begin(shared: &'a Shared, job: JobId, files: &'a CheckpointFiles) -> Self {
        Self { shared, job, files, ended: false }
    }

    fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let path = self.files.files().first().map(|file| file.path.clone()).unwrap_or_default();
            self.shared.fail(self.job, LoadError::Lost { path });
        }
    }
}

/// Opens all files of a model, each known to be the one that was indexed.
fn open(shared: &Shared, files: &CheckpointFiles, mode: ReadMode) -> Result<Vec<Arc<dyn Reader>>, LoadError> {
    let open_one = |file: &SourceFile| {
        let reader = shared.opener.open(&file.path, mode).map_err(|source| {
            if source.kind() == std::io::ErrorKind::NotFound {
                LoadError::Changed { path: file.path.clone(), was: file.identity, is: None }
            } else {
                LoadError::Open { path: file.path.clone(), source: Arc::new(source) }
            }
        })?;
        same(file, &*reader)?;
        Ok(reader)
    };
    files.files().iter().map(open_one).collect()
}

/// Whether an open file is the one that was indexed.
fn same(file: &SourceFile, reader: &dyn Reader) -> Result<(), LoadError> {
    let stamp = reader
        .stamp()
        .map_err(|source| LoadError::Open { path: file.path.clone(), source: Arc::new(source) })?;
    let is = identity(stamp);
    if is == file.identity {
        Ok(())
    } else {
        Err(LoadError::Changed { path: file.path.clone(), was: file.identity, is: Some(is) })
    }
}

/// The sum of what was read, whether or not the reader computed it in passing.
fn sum_of(filled: &Filled, buf: &ChunkBuf, len: u64) -> ChunkSum {
    filled.sum.unwrap_or_else(|| ChunkSum::of(&buf[..usize::try_from(len).unwrap_or(buf.len())]))
}

/// A chunk that can't be pinned is copied more slowly, and rightly.
pub(crate) fn not_pinned(error: &PinError) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(%error, "memory can't be pinned: copies to devices will be several times slower");
    });
    metrics::counter!("stoker_store_unpinned_chunks_total").increment(1);
}

/// Time that a chunk takes from below at a rate; a guess before the first measurement, when all chunks cost the same.
pub(crate) fn reload_time(chunk_bytes: u64, rate: Option<stoker_types::BytesPerSec>) -> Duration {
    rate.map_or(Duration::from_millis(10), |rate| stoker_types::ByteSize(chunk_bytes).at(rate))
}
