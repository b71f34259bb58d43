//! What the reading threads do: open, read, check, read again.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use stoker_checkpoint::ChunkSum;
use stoker_io::{
    ChunkBuf, ChunkPart, Filled, PinError, ReadDone, ReadError, ReadMode, ReadOp, Reader, Task, Work,
};

use crate::{
    error::{LoadError, identity},
    files::{CheckpointFiles, SourceFile},
    hash,
    job::{Assignment, ChunkRead, JobId},
    shared::Shared,
};

/// Gives reading threads their work.
pub(crate) struct Puller(pub(crate) Arc<Shared>);

/// A chunk that is being read, by as many threads as it has parts and as have time.
pub(crate) struct ChunkTransfer {
    job: JobId,
    files: CheckpointFiles,
    position: usize,
    reader: Arc<dyn Reader>,
    expected: Option<ChunkSum>,
    parts: Mutex<PartsRead>,
}

/// What the parts of a chunk have come to.
struct PartsRead {
    sums: Vec<ChunkSum>,
    read_time: Duration,
    sum_time: Duration,
}

/// What reading a whole chunk took and found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkFilled {
    pub(crate) sum: ChunkSum,
    pub(crate) read_time: Duration,
    pub(crate) sum_time: Duration,
}

/// A part of a chunk, to be read. Dropped before that, it takes nothing with it but its bytes.
pub(crate) struct PartRead {
    chunk: Arc<ChunkTransfer>,
    index: usize,
    part: ChunkPart,
}

/// A read under way. Dropped without a result, it fails its job: nobody waits for ever.
struct Flight {
    shared: Arc<Shared>,
    chunk: Arc<ChunkTransfer>,
    /// Whether the read counts for the disk's rate.
    metered: bool,
    settled: bool,
}

/// A step on all files. Dropped before its end, it fails its job, as [`Flight`] does.
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
            Assignment::Read(read) => Some(Box::new(move || begin(shared, read))),
            Assignment::Part(part) => Some(Box::new(move || part.read(shared))),
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

// === impl PartRead ===

/// Prepares a chunk's slot, offers its parts but the first to the other threads, and reads that.
fn begin(shared: Arc<Shared>, read: ChunkRead) {
    let ChunkRead { job, files, position, reader, expected, buf } = read;
    let len = usize::try_from(files.chunk_len(files.order()[position])).unwrap_or(buf.len());
    // Before the read: pinning makes the memory that the read would.
    buf.populate(len);
    if let Err(error) = buf.pin() {
        not_pinned(&error);
    }
    let parts = buf.split(len, reader.part_bytes().unwrap_or(len).max(1));
    let read = PartsRead {
        sums: vec![ChunkSum::of(&[]); parts.len()],
        read_time: Duration::ZERO,
        sum_time: Duration::ZERO,
    };
    let chunk = ChunkTransfer { job, files, position, reader, expected, parts: Mutex::new(read) };
    let chunk = Arc::new(chunk);
    let mut parts = parts.into_iter().enumerate().map(|(index, part)| PartRead {
        chunk: Arc::clone(&chunk),
        index,
        part,
    });
    let first = parts.next();
    shared.offer(job, parts.collect());
    if let Some(first) = first {
        first.read(shared);
    }
}

impl PartRead {
    fn read(self, shared: Arc<Shared>) {
        let Self { chunk, index, part } = self;
        let metered = chunk.reader.choice().is_from_medium();
        if metered {
            shared.read_begins();
        }
        let begin = part.start();
        let len = chunk.len().min(begin + part.len()).saturating_sub(begin);
        let op = ReadOp { offset: chunk.offset() + begin as u64, len, sum: true, buf: part };
        let reader = Arc::clone(&chunk.reader);
        let flight = Flight { shared, chunk, metered, settled: false };
        reader.read(op, Box::new(move |done| flight.part_ended(done, index, len)));
    }
}

// === impl Flight ===

impl Flight {
    /// The first read of a part has ended.
    fn part_ended(mut self, ReadDone { buf, result }: ReadDone, index: usize, len: usize) {
        self.end_metering(if result.is_ok() { len as u64 } else { 0 });
        let filled = match result {
            Ok(filled) => filled,
            Err(source) => return self.failed(buf, source),
        };
        let sum = sum_of(&filled, &buf, len);
        {
            let mut parts = self.chunk.parts.lock();
            parts.sums[index] = sum;
            parts.read_time += filled.read_time;
            parts.sum_time += filled.sum_time;
        }
        match buf.rejoin() {
            // Others are at their parts, or one of them has failed.
            None => self.settled = true,
            Some(whole) => self.whole(whole),
        }
    }

    /// All parts have been read.
    fn whole(self, buf: ChunkBuf) {
        let filled = self.chunk.filled();
        let found = filled.sum;
        match self.chunk.expected {
            Some(expected) if expected != found => self.again(buf, expected, found),
            _ => self.arrived(buf, &filled, false),
        }
    }

    /// The sum was wrong: once more, from the medium.
    fn again(self, buf: ChunkBuf, expected: ChunkSum, found: ChunkSum) {
        let file = self.chunk.file().clone();
        let offset = self.chunk.offset();
        tracing::warn!(path = %file.path.display(), offset, %expected, %found, "a chunk's sum is wrong, reading again");
        // A file that was written to is not corrupt.
        if let Err(error) = same(&file, &*self.chunk.reader) {
            return self.fail(buf.into(), error);
        }
        let reader = match self.shared.opener.open(&file.path, ReadMode::Uncached) {
            Ok(reader) => reader,
            Err(source) => {
                let error = LoadError::Open { path: file.path, source: Arc::new(source) };
                return self.fail(buf.into(), error);
            }
        };
        if let Err(error) = same(&file, &*reader) {
            return self.fail(buf.into(), error);
        }
        let op = ReadOp { buf: buf.into(), offset, len: self.chunk.len(), sum: true };
        reader.read(op, Box::new(move |done| self.second(done, expected, found)));
    }

    /// The second read has ended.
    fn second(self, ReadDone { buf, result }: ReadDone, expected: ChunkSum, found: ChunkSum) {
        let filled = match result {
            Ok(filled) => filled,
            Err(source) => return self.failed(buf, source),
        };
        let path = self.chunk.file().path.clone();
        let offset = self.chunk.offset();
        let again = sum_of(&filled, &buf, self.chunk.len());
        if again != expected {
            let chunk = self.chunk.at().index;
            return self.fail(buf, LoadError::Corrupt { path, chunk, offset, expected, found, again });
        }
        tracing::error!(path = %path.display(), offset, wrong = %found, "right only when read again: suspect disk or memory");
        let read = ChunkFilled { sum: again, read_time: filled.read_time, sum_time: filled.sum_time };
        // Dropped without it, the flight fails its job.
        if let Some(buf) = buf.rejoin() {
            self.arrived(buf, &read, true);
        }
    }

    fn arrived(mut self, buf: ChunkBuf, read: &ChunkFilled, again: bool) {
        self.settled = true;
        let kind = self.chunk.reader.choice().kind;
        metrics::counter!("stoker_store_read_bytes_total", "tier" => "ssd", "reader" => kind.name())
            .increment(self.chunk.len() as u64);
        if again {
            metrics::counter!("stoker_store_rereads_total").increment(1);
        }
        self.shared.arrived(self.chunk.job, self.chunk.position, buf, read, again);
    }

    fn failed(self, buf: ChunkPart, source: ReadError) {
        let file = self.chunk.file();
        // A file that ends early has most likely been replaced: then that is what to say.
        let error = match same(file, &*self.chunk.reader) {
            Err(changed) => changed,
            Ok(()) => LoadError::Read { path: file.path.clone(), offset: self.chunk.offset(), source },
        };
        self.fail(buf, error);
    }

    fn fail(mut self, buf: ChunkPart, error: LoadError) {
        // First, so that whoever learns of the failure finds the slot free, unless others still read into it.
        drop(buf);
        self.settled = true;
        self.shared.fail(self.chunk.job, error);
    }

    fn end_metering(&mut self, bytes: u64) {
        if std::mem::take(&mut self.metered) {
            self.shared.read_ended(bytes);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.end_metering(0);
        if !self.settled {
            self.shared.fail(self.chunk.job, LoadError::Lost { path: self.chunk.file().path.clone() });
        }
    }
}

// === impl ChunkTransfer ===

impl ChunkTransfer {
    fn at(&self) -> crate::ChunkRef {
        self.files.order()[self.position]
    }

    fn file(&self) -> &SourceFile {
        self.files.file_of(self.at())
    }

    /// First byte in the file.
    fn offset(&self) -> u64 {
        self.files.offset(self.at())
    }

    /// Bytes of the chunk: at most a slot's.
    fn len(&self) -> usize {
        usize::try_from(self.files.chunk_len(self.at())).unwrap_or(usize::MAX)
    }

    /// What all parts together have come to.
    fn filled(&self) -> ChunkFilled {
        let parts = self.parts.lock();
        let part = self.reader.part_bytes().unwrap_or(usize::MAX).max(1);
        let sums = parts.sums.iter().enumerate().map(|(i, sum)| {
            let begin = i.saturating_mul(part);
            (*sum, self.len().saturating_sub(begin).min(part))
        });
        let sum = sums.reduce(|(sum, len), (next, more)| (sum.then(next, more as u64), len + more));
        ChunkFilled {
            sum: sum.map_or(ChunkSum::of(&[]), |(sum, _)| sum),
            read_time: parts.read_time,
            sum_time: parts.sum_time,
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
fn sum_of(filled: &Filled, bytes: &[u8], len: usize) -> ChunkSum {
    filled.sum.unwrap_or_else(|| ChunkSum::of(&bytes[..len]))
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
