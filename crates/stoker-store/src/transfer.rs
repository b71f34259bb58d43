//! What the reading threads do: open, read, check, read again.

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use stoker_checkpoint::ChunkSum;
use stoker_io::{
    ChunkBuf, ChunkPart, Filled, PinError, ReadDone, ReadError, ReadMode, ReadOp, Reader, Task, Work,
};
use stoker_types::Tier;

use crate::{
    error::{LoadError, identity, unreadable},
    files::{CheckpointFiles, SourceFile},
    hash,
    job::{Assignment, ChunkRead, JobId},
    shared::Shared,
    source::{FileSource, PartSource, Ticket},
    ssd::{SsdCopy, host_of},
};

/// Gives reading threads their work.
pub(crate) struct Puller(pub(crate) Arc<Shared>);

/// A chunk that is being read, by as many threads as it has parts and as have time.
pub(crate) struct ChunkTransfer {
    job: JobId,
    files: CheckpointFiles,
    position: usize,
    tier: Tier,
    reader: Arc<dyn Reader>,
    /// The tier below: what is wrong or can't be read above is read from there.
    below: Option<Arc<dyn Reader>>,
    /// The copy on SSD that it goes to as it passes.
    copy: Option<Arc<SsdCopy>>,
    /// Whether it is to stay in memory.
    stays: bool,
    expected: Option<ChunkSum>,
    parts: Mutex<PartsRead>,
}

/// What the parts of a chunk have come to.
struct PartsRead {
    sums: Vec<ChunkSum>,
    read_time: Duration,
    sum_time: Duration,
    /// A part could not be read.
    failed: bool,
    ticket: Option<Ticket>,
}

/// What reading a whole chunk took and found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkFilled {
    pub(crate) sum: ChunkSum,
    /// Where it came from.
    pub(crate) tier: Tier,
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
            Assignment::Open { job, files, mode, counts } => Some(Box::new(move || {
                let step = Step::begin(&shared, job, &files);
                if let (Some(ssd), true, true) = (&shared.ssd, counts, files.object().is_some()) {
                    ssd.used(&files.key().name);
                }
                let opened = open(&shared, &files, mode);
                step.end();
                shared.opened(job, opened);
            })),
            Assignment::Read(read) => Some(Box::new(move || begin(shared, read))),
            Assignment::Part(part) => Some(Box::new(move || part.read(shared))),
            Assignment::Check { job, files, sources, to_hash } => Some(Box::new(move || {
                let step = Step::begin(&shared, job, &files);
                let hashed =
                    to_hash.map_or(Ok(()), |chunks| hash::check(&files, chunks, || shared.goes_on(job)));
                // A file that was written to is not called wrong.
                let same = files.files().iter().zip(&sources).try_for_each(|(file, source)| {
                    // Reads of objects are pinned to their version, each of them.
                    source.local.as_ref().map_or(Ok(()), |reader| same(file, &**reader))
                });
                step.end();
                shared.finished(job, same.and(hashed));
            })),
        }
    }
}

// === impl PartRead ===

/// Prepares a chunk's slot, offers its parts but the first to the other threads, and reads that.
fn begin(shared: Arc<Shared>, read: ChunkRead) {
    let ChunkRead { job, files, position, tier, reader, below, ticket, copy, stays, expected, buf } = read;
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
        failed: false,
        ticket,
    };
    let parts_read = Mutex::new(read);
    let chunk =
        ChunkTransfer { job, files, position, tier, reader, below, copy, stays, expected, parts: parts_read };
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
            shared.read_begins(chunk.tier, chunk.host());
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
            Err(source) if self.chunk.below.is_none() => return self.failed(buf, source),
            Err(source) => {
                let path = self.chunk.shown();
                tracing::warn!(path = %path.display(), %source, "a read failed; the tier below has the chunk too");
                self.chunk.parts.lock().failed = true;
                return self.part_is_in(buf);
            }
        };
        let sum = sum_of(&filled, &buf, len);
        {
            let mut parts = self.chunk.parts.lock();
            parts.sums[index] = sum;
            parts.read_time += filled.read_time;
            parts.sum_time += filled.sum_time;
        }
        self.part_is_in(buf);
    }

    fn part_is_in(mut self, buf: ChunkPart) {
        match buf.rejoin() {
            // Others are at their parts, or one of them has failed.
            None => self.settled = true,
            Some(whole) => self.whole(whole),
        }
    }

    /// All parts have been read.
    fn whole(self, buf: ChunkBuf) {
        if self.chunk.parts.lock().failed {
            return self.refetch(buf);
        }
        let filled = self.chunk.filled();
        let found = filled.sum;
        match self.chunk.expected {
            Some(expected) if expected != found && self.chunk.below.is_some() => {
                let path = self.chunk.shown();
                let offset = self.chunk.offset();
                tracing::warn!(path = %path.display(), offset, %expected, %found, "a chunk's sum is wrong on SSD; it is fetched again");
                self.refetch(buf);
            }
            Some(expected) if expected != found => self.again(buf, expected, found),
            _ => self.arrived(buf, &filled, false),
        }
    }

    /// What SSD has is of no use: the chunk is read from the tier below.
    fn refetch(self, buf: ChunkBuf) {
        let Some(reader) = self.chunk.below.clone() else { return };
        metrics::counter!("stoker_store_refetches_total").increment(1);
        match &self.chunk.copy {
            Some(copy) => copy.forget(self.chunk.at()),
            None => self.shared.tee.damaged(&self.chunk.files.key().name),
        }
        let (offset, len) = (self.chunk.offset(), self.chunk.len());
        let op = ReadOp { buf: buf.into(), offset, len, sum: true };
        reader.read(op, Box::new(move |done| self.refetched(done)));
    }

    fn refetched(self, ReadDone { buf, result }: ReadDone) {
        let filled = match result {
            Ok(filled) => filled,
            Err(source) => {
                let error = unreadable(self.chunk.remote(), self.chunk.offset(), source);
                return self.fail(buf, error);
            }
        };
        let sum = sum_of(&filled, &buf, self.chunk.len());
        if let Some(expected) = self.chunk.expected.filter(|expected| *expected != sum) {
            let (path, chunk, offset) = (self.chunk.remote(), self.chunk.at().index, self.chunk.offset());
            let found = self.chunk.filled().sum;
            return self.fail(buf, LoadError::Corrupt { path, chunk, offset, expected, found, again: sum });
        }
        let Filled { read_time, sum_time, .. } = filled;
        let read = ChunkFilled { sum, tier: Tier::Remote, read_time, sum_time };
        // Dropped without it, the flight fails its job.
        if let Some(buf) = buf.rejoin() {
            self.arrived(buf, &read, true);
        }
    }

    /// The sum was wrong: once more, from the medium.
    fn again(self, buf: ChunkBuf, expected: ChunkSum, found: ChunkSum) {
        let file = self.chunk.file().clone();
        let offset = self.chunk.offset();
        let shown = self.chunk.shown();
        tracing::warn!(path = %shown.display(), offset, %expected, %found, "a chunk's sum is wrong, reading again");
        if self.chunk.tier == Tier::Remote {
            let reader = Arc::clone(&self.chunk.reader);
            let op = ReadOp { buf: buf.into(), offset, len: self.chunk.len(), sum: true };
            return reader.read(op, Box::new(move |done| self.second(done, expected, found)));
        }
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
        let path = self.chunk.shown();
        let offset = self.chunk.offset();
        let again = sum_of(&filled, &buf, self.chunk.len());
        if again != expected {
            let chunk = self.chunk.at().index;
            return self.fail(buf, LoadError::Corrupt { path, chunk, offset, expected, found, again });
        }
        tracing::error!(path = %path.display(), offset, wrong = %found, "right only when read again: suspect disk or memory");
        let Filled { read_time, sum_time, .. } = filled;
        let read = ChunkFilled { sum: again, tier: self.chunk.tier, read_time, sum_time };
        // Dropped without it, the flight fails its job.
        if let Some(buf) = buf.rejoin() {
            self.arrived(buf, &read, true);
        }
    }

    fn arrived(mut self, buf: ChunkBuf, read: &ChunkFilled, again: bool) {
        self.settled = true;
        let (tier, reader) = match read.tier {
            Tier::Remote => ("remote", "remote"),
            _ => ("ssd", self.chunk.reader.choice().kind.name()),
        };
        metrics::counter!("stoker_store_read_bytes_total", "tier" => tier, "reader" => reader)
            .increment(self.chunk.len() as u64);
        if again {
            metrics::counter!("stoker_store_rereads_total").increment(1);
        }
        let chunk = buf.freeze(self.chunk.len());
        if let Some(copy) = self.chunk.copy.as_ref().filter(|_| read.tier == Tier::Remote) {
            self.shared.tee.pass(copy, self.chunk.at(), read.sum, &chunk, self.chunk.stays);
        }
        // Before whoever is woken looks for it.
        drop(self.chunk.parts.lock().ticket.take());
        self.shared.arrived(self.chunk.job, self.chunk.position, chunk, read, again);
    }

    fn failed(self, buf: ChunkPart, source: ReadError) {
        let file = self.chunk.file();
        if self.chunk.tier == Tier::Remote || file.origin.as_ref().is_some_and(|origin| origin.header_only) {
            let error = unreadable(self.chunk.shown(), self.chunk.offset(), source);
            return self.fail(buf, error);
        }
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
        drop(self.chunk.parts.lock().ticket.take());
        self.settled = true;
        self.shared.fail(self.chunk.job, error);
    }

    fn end_metering(&mut self, bytes: u64) {
        if std::mem::take(&mut self.metered) {
            self.shared.read_ended(self.chunk.tier, self.chunk.host(), bytes);
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

    /// Where it is read from, for people.
    fn shown(&self) -> PathBuf {
        match (self.tier, &self.copy) {
            (Tier::Remote, _) => self.remote(),
            (_, Some(copy)) => copy.part(self.at().file as usize).to_owned(),
            _ => self.file().path.clone(),
        }
    }

    /// Where the tier below has it, for people.
    fn remote(&self) -> PathBuf {
        let file = self.file();
        file.origin.as_ref().map_or_else(|| file.path.clone(), |origin| origin.object.url.clone().into())
    }

    /// The host that it is read from, if that is a remote store's.
    fn host(&self) -> Option<&str> {
        let origin = self.file().origin.as_ref().filter(|_| self.tier == Tier::Remote)?;
        Some(host_of(&origin.object.url))
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
            tier: self.tier,
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

/// What a model's chunks can be read from.
pub(crate) struct Opened {
    /// By file.
    pub(crate) sources: Vec<FileSource>,
    /// The copy on SSD that is to become whole.
    pub(crate) copy: Option<Arc<SsdCopy>>,
}

/// Opens all files of a model, each known to be the one that was indexed.
fn open(shared: &Shared, files: &CheckpointFiles, mode: ReadMode) -> Result<Opened, LoadError> {
    let copy = shared.ssd.as_ref().and_then(|ssd| ssd.copy(files));
    let sources = files.files().iter().enumerate().map(|(index, file)| {
        let remote = match (&file.origin, &shared.remote) {
            (Some(origin), Some(remote)) => {
                let opened = remote.open(&origin.object);
                Some(opened.map_err(|e| unreadable(origin.object.url.clone().into(), 0, e))?)
            }
            _ => None,
        };
        if let Some(origin) = file.origin.as_ref().filter(|origin| origin.header_only) {
            let part = copy.as_ref().and_then(|copy| {
                let reader = shared.opener.open(copy.part(index), mode).ok()?;
                Some(PartSource { copy: Arc::clone(copy), reader })
            });
            if remote.is_none() && copy.as_ref().is_none_or(|copy| !copy.missing().is_empty()) {
                return Err(LoadError::NoRemote { url: origin.object.url.clone() });
            }
            return Ok(FileSource { local: None, copy: part, remote });
        }
        match (open_local(shared, file, mode), remote) {
            (Ok(local), remote) => Ok(FileSource { local: Some(local), copy: None, remote }),
            (Err(error), Some(remote)) => {
                tracing::warn!(path = %file.path.display(), %error, "read from where it came from instead");
                Ok(FileSource { local: None, copy: None, remote: Some(remote) })
            }
            (Err(error), None) => Err(error),
        }
    });
    Ok(Opened { sources: sources.collect::<Result<_, _>>()?, copy })
}

fn open_local(shared: &Shared, file: &SourceFile, mode: ReadMode) -> Result<Arc<dyn Reader>, LoadError> {
    let reader = shared.opener.open(&file.path, mode).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            LoadError::Changed { path: file.path.clone(), was: file.identity, is: None }
        } else {
            LoadError::Open { path: file.path.clone(), source: Arc::new(source) }
        }
    })?;
    same(file, &*reader)?;
    Ok(reader)
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
