//! Loads and streams under way: which chunk is to be read next.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use stoker_checkpoint::ChunkSum;
use stoker_io::{Chunk, ChunkBuf, ChunkPool, ReadMode, Reader};
use stoker_types::Tier;
use tokio::sync::watch;

use crate::{
    cache::{Cache, WayBack},
    error::LoadError,
    files::CheckpointFiles,
    report::LoadReport,
    source::{FileSource, Ticket},
    ssd::SsdCopy,
    transfer::{ChunkFilled, PartRead},
};

/// A load or stream. Never reused, so what comes late for one that is gone is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct JobId(u64);

/// Which of several loads gets the disk. Equals take turns, chunk by chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Nobody waits for it yet.
    Prefetch,
    /// Somebody waits.
    #[default]
    Demand,
}

/// How far a job is. Watched by those who wait for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Bytes ready from the beginning, without a gap, in execution order.
    pub(crate) ready: u64,
    /// How it ended.
    pub(crate) end: Option<Result<Arc<LoadReport>, LoadError>>,
}

/// A load or stream.
pub(crate) struct Job {
    pub(crate) files: CheckpointFiles,
    pub(crate) priority: Priority,
    /// Turn in which it was last served.
    served: u64,
    stage: Stage,
    mode: ReadMode,
    sources: Vec<FileSource>,
    /// The copy on SSD that it has written as its chunks pass, or completes.
    pub(crate) copy: Option<Arc<SsdCopy>>,
    /// Places of the chunks yet to be read.
    pending: VecDeque<usize>,
    /// Parts yet to be read of chunks that are being read.
    parts: VecDeque<PartRead>,
    in_flight: usize,
    pub(crate) target: Target,
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) tally: Tally,
}

/// Where a job's chunks go.
pub(crate) enum Target {
    /// To stay in memory.
    Cache {
        /// Places of the chunks that this job brought: they go when it fails.
        brought: Vec<usize>,
        /// Chunks from the beginning without a gap.
        prefix: usize,
    },
    /// Through a bounded ring, in order.
    Ring(Ring),
}

/// A stream's chunks between disk and consumer.
pub(crate) struct Ring {
    /// Most chunks in reads, ready and with the consumer.
    pub(crate) window: usize,
    /// As many are.
    pub(crate) used: usize,
    /// Read, not yet taken.
    pub(crate) ready: BTreeMap<usize, (Chunk, ChunkSum)>,
    /// Whether chunks that are in memory are read nevertheless.
    pub(crate) fresh: bool,
    /// Whether it only completes a copy: what passes is for that alone, and checked by whoever writes it.
    pub(crate) fills: bool,
}

/// What a job has done so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) started: Duration,
    pub(crate) opened: Duration,
    pub(crate) bytes_ssd: u64,
    pub(crate) bytes_remote: u64,
    pub(crate) bytes_resident: u64,
    pub(crate) read_time: Duration,
    pub(crate) sum_time: Duration,
    pub(crate) reread: u32,
    pub(crate) evicted: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Files are to be opened.
    Open,
    /// A thread is opening them.
    Opening,
    /// Chunks are to be read.
    Transfer,
    /// All are; whether the files are still the same is to be checked.
    Check,
    /// A thread is checking.
    Checking,
}

/// All jobs.
#[derive(Default)]
pub(crate) struct Jobs {
    jobs: BTreeMap<JobId, Job>,
    last: u64,
    turn: u64,
    /// Reads from remote under way. Such a read holds no thread, so this is what bounds them.
    pub(crate) remote: RemoteReads,
}

/// Reads from remote: how many are under way, and how many may be.
#[derive(Default)]
pub(crate) struct RemoteReads {
    out: Arc<AtomicUsize>,
    pub(crate) most: usize,
}

/// What a reading thread is to do.
pub(crate) enum Assignment {
    /// Open the files and compare their identities.
    Open {
        job: JobId,
        files: CheckpointFiles,
        mode: ReadMode,
        /// Whether somebody uses the model: what only completes a copy is no use of it.
        counts: bool,
    },
    /// Read a chunk and check it, with the help of whoever has time.
    Read(ChunkRead),
    /// Help with a chunk.
    Part(PartRead),
    /// Compare the files' identities once more, and before that the hashes of those that have nothing else.
    Check {
        job: JobId,
        files: CheckpointFiles,
        sources: Vec<FileSource>,
        to_hash: Option<Vec<Option<Chunk>>>,
    },
}

/// A chunk to be read.
pub(crate) struct ChunkRead {
    pub(crate) job: JobId,
    pub(crate) files: CheckpointFiles,
    /// Place in the order.
    pub(crate) position: usize,
    /// Where `reader` reads.
    pub(crate) tier: Tier,
    pub(crate) reader: Arc<dyn Reader>,
    /// The tier below.
    pub(crate) below: Option<Arc<dyn Reader>>,
    pub(crate) ticket: Option<Ticket>,
    /// The copy on SSD that the chunk goes to as it passes.
    pub(crate) copy: Option<Arc<SsdCopy>>,
    /// Whether it is to stay in memory.
    pub(crate) stays: bool,
    pub(crate) expected: Option<ChunkSum>,
    pub(crate) buf: ChunkBuf,
}

// === impl Ring ===

impl Ring {
    /// A ring of at most so many chunks.
    pub(crate) fn of(window: usize) -> Self {
        Self { window, used: 0, ready: BTreeMap::new(), fresh: false, fills: false }
    }
}

// === impl Jobs ===

impl Jobs {
    /// A new job, to be opened.
    pub(crate) fn add(
        &mut self,
        files: CheckpointFiles,
        priority: Priority,
        mode: ReadMode,
        pending: impl IntoIterator<Item = usize>,
        target: Target,
        started: Duration,
    ) -> (JobId, &mut Job) {
        self.last += 1;
        let job = Job {
            files,
            priority,
            served: self.turn,
            stage: Stage::Open,
            mode,
            sources: Vec::new(),
            copy: None,
            pending: pending.into_iter().collect(),
            parts: VecDeque::new(),
            in_flight: 0,
            target,
            progress: watch::Sender::new(Progress::default()),
            tally: Tally { started, ..Tally::default() },
        };
        let id = JobId(self.last);
        (id, self.jobs.entry(id).or_insert(job))
    }

    pub(crate) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.jobs.get_mut(&id)
    }

    pub(crate) fn remove(&mut self, id: JobId) -> Option<Job> {
        self.jobs.remove(&id)
    }

    /// The job accepted last.
    pub(crate) fn last(&self) -> JobId {
        JobId(self.last)
    }

    pub(crate) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Ids, those that should go first when some must: the least urgent, the youngest.
    pub(crate) fn expendable_first(&self) -> Vec<JobId> {
        let mut ids: Vec<_> =
            self.jobs.iter().map(|(id, job)| (job.priority, std::cmp::Reverse(*id))).collect();
        ids.sort();
        ids.into_iter().map(|(_, id)| id.0).collect()
    }

    /// The most urgent work that can be done now.
    pub(crate) fn assign(
        &mut self,
        cache: &mut Cache,
        pool: &ChunkPool,
        now: Duration,
        back: WayBack<'_>,
    ) -> Option<Assignment> {
        let mut turns: Vec<_> =
            self.jobs.iter().map(|(id, job)| (std::cmp::Reverse(job.priority), job.served, *id)).collect();
        turns.sort_unstable();
        for (_, _, id) in turns {
            let job = self.jobs.get_mut(&id)?;
            let Some(assignment) = job.assign(id, cache, pool, &self.remote, now, back) else { continue };
            self.turn += 1;
            job.served = self.turn;
            return Some(assignment);
        }
        None
    }
}

// === impl Job ===

impl Job {
    fn assign(
        &mut self,
        id: JobId,
        cache: &mut Cache,
        pool: &ChunkPool,
        remote: &RemoteReads,
        now: Duration,
        back: WayBack<'_>,
    ) -> Option<Assignment> {
        match self.stage {
            // Open -> Opening: one thread opens all files.
            Stage::Open => {
                self.stage = Stage::Opening;
                let counts = !matches!(&self.target, Target::Ring(ring) if ring.fills);
                Some(Assignment::Open { job: id, files: self.files.clone(), mode: self.mode, counts })
            }
            // Check -> Checking: one thread checks all files.
            Stage::Check => {
                self.stage = Stage::Checking;
                // A stream is not begun before its files are vouched for.
                let fills = matches!(&self.target, Target::Ring(ring) if ring.fills);
                let unvouched = cache.model(self.files.key()).filter(|model| !fills && !model.is_vouched());
                Some(Assignment::Check {
                    job: id,
                    files: self.files.clone(),
                    sources: self.sources.clone(),
                    to_hash: unvouched.map(|model| model.chunks()),
                })
            }
            Stage::Transfer => {
                if let Some(part) = self.parts.pop_front() {
                    return Some(Assignment::Part(part));
                }
                self.pass_on_resident(cache);
                self.settle();
                if self.stage == Stage::Check {
                    return self.assign(id, cache, pool, remote, now, back);
                }
                self.next_read(id, cache, pool, remote, now, back).map(Assignment::Read)
            }
            Stage::Opening | Stage::Checking => None,
        }
    }

    fn next_read(
        &mut self,
        id: JobId,
        cache: &mut Cache,
        pool: &ChunkPool,
        remote: &RemoteReads,
        now: Duration,
        back: WayBack<'_>,
    ) -> Option<ChunkRead> {
        let position = *self.pending.front()?;
        if let Target::Ring(ring) = &self.target
            && ring.used >= ring.window
        {
            return None;
        }
        let chunk = self.files.order()[position];
        let source = &self.sources[chunk.file as usize];
        let (tier, reader) = source.fastest(chunk)?;
        let ticket = match tier {
            Tier::Remote => Some(Ticket::take(&remote.out, remote.most)?),
            _ => None,
        };
        let (buf, evicted) = cache.take_slot(pool, id, now, back)?;
        // Of a chunk that is read from a copy, its journal knows the sum.
        let journal =
            source.copy.as_ref().filter(|_| tier == Tier::Ssd).and_then(|part| part.copy.sum(chunk));
        let known = cache.model(self.files.key()).map_or(self.files.sum(chunk), |model| model.sum(position));
        let (reader, below) = (Arc::clone(reader), source.below(tier).cloned());
        self.pending.pop_front();
        self.in_flight += 1;
        self.tally.evicted += evicted;
        if let Target::Ring(ring) = &mut self.target {
            ring.used += 1;
        }
        let (stays, fills) = match &self.target {
            Target::Cache { .. } => (true, false),
            Target::Ring(ring) => (false, ring.fills),
        };
        Some(ChunkRead {
            job: id,
            files: self.files.clone(),
            position,
            tier,
            reader,
            below,
            ticket,
            // What completes a copy gets there by itself.
            copy: self.copy.clone().filter(|_| !fills),
            stays,
            expected: known.or(journal),
            buf,
        })
    }

    /// A stream's next chunks that are in memory already need no read.
    fn pass_on_resident(&mut self, cache: &Cache) {
        let Target::Ring(ring) = &mut self.target else { return };
        if ring.fresh {
            return;
        }
        let Some(model) = cache.model(self.files.key()) else { return };
        while let Some(&position) = self.pending.front()
            && ring.used < ring.window
            && let (Some(chunk), Some(sum)) = (model.chunk(position), model.sum(position))
        {
            self.pending.pop_front();
            ring.used += 1;
            ring.ready.insert(position, (chunk.clone(), sum));
            let len = self.files.chunk_len(self.files.order()[position]);
            self.tally.bytes_resident += len;
            self.progress.send_modify(|progress| progress.ready += len);
        }
    }

    /// Opening -> Transfer.
    pub(crate) fn opened(&mut self, sources: Vec<FileSource>, copy: Option<Arc<SsdCopy>>, now: Duration) {
        self.sources = sources;
        self.copy = copy;
        self.tally.opened = now;
        self.stage = Stage::Transfer;
    }

    /// Parts of a chunk that any thread may read. Those of a job that ends before are dropped.
    pub(crate) fn offer(&mut self, parts: impl IntoIterator<Item = PartRead>) {
        self.parts.extend(parts);
    }

    /// A chunk has been read and is right.
    pub(crate) fn arrived(&mut self, cache: &mut Cache, position: usize, chunk: Chunk, read: &ChunkFilled) {
        let &ChunkFilled { sum, tier, read_time, sum_time } = read;
        let len = self.files.chunk_len(self.files.order()[position]);
        self.in_flight -= 1;
        match tier {
            Tier::Remote => self.tally.bytes_remote += len,
            _ => self.tally.bytes_ssd += len,
        }
        self.tally.read_time += read_time;
        self.tally.sum_time += sum_time;
        match &mut self.target {
            Target::Cache { brought, prefix } => {
                // The entry stays for as long as the load holds it.
                if let Some(model) = cache.model_mut(self.files.key()) {
                    model.insert(position, chunk, sum);
                    brought.push(position);
                    let reached = model.prefix_from(*prefix);
                    let order = &self.files.order()[*prefix..reached];
                    let ready: u64 = order.iter().map(|chunk| self.files.chunk_len(*chunk)).sum();
                    *prefix = reached;
                    if ready > 0 {
                        self.progress.send_modify(|progress| progress.ready += ready);
                    }
                }
            }
            Target::Ring(ring) => {
                if let Some(model) = cache.model_mut(self.files.key()) {
                    model.learn(position, sum);
                }
                ring.ready.insert(position, (chunk, sum));
                self.progress.send_modify(|progress| progress.ready += len);
            }
        }
        self.settle();
    }

    /// Transfer -> Check, once nothing is left to be read, and a stream's consumer has taken everything.
    fn settle(&mut self) {
        let taken = match &self.target {
            Target::Cache { .. } => true,
            Target::Ring(ring) => ring.ready.is_empty(),
        };
        if self.stage == Stage::Transfer && self.pending.is_empty() && self.in_flight == 0 && taken {
            self.stage = Stage::Check;
        }
    }

    /// What it did.
    pub(crate) fn report(&self, cache: &Cache, now: Duration) -> LoadReport {
        let model = cache.model(self.files.key());
        let unknown_before =
            self.files.files().iter().any(|file| file.chunk_sums.is_empty() && file.identity.len > 0);
        let unknown_before = unknown_before && self.files.is_whole();
        let learned = model.filter(|_| unknown_before).and_then(|model| model.all_sums());
        let Tally {
            started,
            opened,
            bytes_ssd,
            bytes_remote,
            bytes_resident,
            read_time,
            sum_time,
            reread,
            evicted,
        } = self.tally;
        LoadReport {
            bytes: crate::load::tier_bytes(bytes_resident, bytes_ssd, bytes_remote),
            total: now.saturating_sub(started),
            ended: stoker_types::clock::wall(),
            open: opened.saturating_sub(started),
            transfer: now.saturating_sub(opened),
            read_thread_time: read_time,
            verify_thread_time: sum_time,
            readers: self.sources.iter().filter_map(FileSource::choice).cloned().collect(),
            learned: learned.map(|sums| self.files.by_file(ChunkSum(0), sums)),
            reread,
            evicted,
        }
    }
}
