//! Taking over the memory of a store whose process was killed.
//!
//! The pool's ledger says which chunk of which file's version lies in each slot. A chunk is adopted when its model is
//! still known, its file is still that version, and its bytes have the sum that was written down: all are checked, on
//! several threads, before the store is handed out. So what holds for every chunk in memory holds for these too (it
//! entered the cache after its sum was found right), whatever the killed process did in its last moments.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use stoker_checkpoint::{ChunkSum, identity_of};
use stoker_io::{AdoptedPool, Chunk, ChunkPool, PoolMemory, Record};
use stoker_types::{ByteSize, ModelName, clock};

use crate::{
    borrowed::Borrowed,
    cache::Cache,
    error::OpenError,
    files::{CheckpointFiles, ChunkRef, SourceFile},
    load::{FileSlots, Resident},
    store::{Store, StoreConfig},
};

/// Most threads that check at the same time: a few reach the memory's limit.
const THREADS_MAX: usize = 16;

/// What became of the chunks of a store that was taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Adoption {
    /// Models of which something is in memory.
    pub models: usize,
    /// Bytes of chunks in memory.
    pub bytes: ByteSize,
    /// Chunks in memory.
    pub chunks: usize,
    /// Chunks of models that aren't known any more.
    pub unknown: usize,
    /// Chunks of files that are gone, were replaced, or of which too little is known.
    pub changed: usize,
    /// Chunks whose bytes didn't have their sum.
    pub wrong: usize,
    /// Records that can't be.
    pub damaged: usize,
    /// Chunks that the budget has no room for.
    pub evicted: usize,
    /// Slots that programs of the store before have still mapped: they stay as they are for as long.
    pub lent: usize,
    /// Time in all.
    pub total: Duration,
    /// Of it, for the sums.
    pub check: Duration,
}

/// A model that a process has mapped which outlived the store before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedModel {
    /// Which.
    pub model: ModelName,
    /// Where its files lie in the pool, in the order of its manifest.
    pub files: Vec<FileSlots>,
}

/// What keeps the memory of a [`MappedModel`] as it is, for as long as this lives.
#[derive(Debug)]
pub enum KeptModel {
    /// All of it is in memory, is what it should be, and lies where it is mapped.
    Resident(Resident),
    /// It isn't: the file is another, a sum is wrong, or nobody knows the model. Nobody is to compute with it, and nobody
    /// else gets its slots.
    Remains(Vec<Chunk>),
}

/// A chunk whose place in a model is known.
struct Candidate {
    model: usize,
    position: usize,
    chunk: Chunk,
    sum: ChunkSum,
}

impl Store {
    /// As [`Self::open`], with memory that another store left ([`Self::memory`]), whose process has ended, as have its
    /// workers, but those that have exactly `mapped`: what keeps that is returned in the same order. What programs have mapped
    /// to whom it was lent ([`Self::lend`]) is neither evicted nor written to until they have
    /// let go. `known` says what a model's files are now. Blocks for as long as the sums of all that
    /// is in memory take: with several cores about 20 ms for each GiB.
    ///
    /// # Errors
    /// [`OpenError`]. The memory is lost then: open a new store.
    pub fn adopt(
        config: StoreConfig,
        memory: PoolMemory,
        known: impl Fn(&ModelName) -> Option<CheckpointFiles>,
        mapped: &[MappedModel],
    ) -> Result<(Self, Adoption, Vec<KeptModel>), OpenError> {
        let begun = clock::now();
        let slots = mapped.iter().flat_map(|model| &model.files).flat_map(|file| &file.slots).copied();
        let slots: BTreeSet<u32> = slots.collect();
        let AdoptedPool { pool, chunks, damaged, lent, orphans } =
            ChunkPool::adopt(memory, config.capacity.max(config.budget), config.chunk, &slots)?;
        let lent_slots = lent.iter().map(ExactSizeIterator::len).sum();
        let mut adoption = Adoption { damaged, lent: lent_slots, ..Adoption::default() };
        // From here on: whatever becomes of a chunk below, its slot stays what it is while somebody has it mapped.
        let named = chunks.iter().map(|(chunk, _)| chunk);
        let in_mappings = named.chain(&orphans).filter(|chunk| slots.contains(&chunk.slot()));
        let in_mappings: HashMap<u32, Chunk> =
            in_mappings.map(|chunk| (chunk.slot(), chunk.clone())).collect();
        let lent = Borrowed::new(&lent, &chunks, orphans);
        let (models, candidates) = identify(chunks, pool.chunk_bytes() as u64, known, &mut adoption);

        let checking = clock::now();
        let (right, wrong) = check(candidates);
        adoption.check = checking.elapsed();
        adoption.wrong = wrong;

        let budget = config.budget;
        let mut store = Self::over(config, pool)?;
        {
            let state = &mut *store.shared().lock();
            adoption.changed += place(&mut state.cache, &models, right);
        }
        // Before anything is evicted.
        store.keep_lent(lent)?;
        let shared = Arc::clone(store.shared());
        let kept = mapped.iter().map(|model| {
            let files = models.iter().find(|files| files.key().name == model.model);
            match files.and_then(|files| Resident::mapped(&shared, files, &model.files)) {
                Some(resident) => KeptModel::Resident(resident),
                None => {
                    let slots = model.files.iter().flat_map(|file| &file.slots);
                    KeptModel::Remains(slots.filter_map(|slot| in_mappings.get(slot).cloned()).collect())
                }
            }
        });
        let kept: Vec<KeptModel> = kept.collect();
        drop(in_mappings);
        adoption.evicted = shared.set_budget(budget);
        let residency = shared.stats().residency;
        adoption.models = residency.len();
        adoption.bytes = residency.iter().map(|model| model.resident).sum();
        let slots: ByteSize = residency.iter().map(|model| model.slots).sum();
        adoption.chunks = usize::try_from(slots.bytes() / store.chunk_bytes()).unwrap_or(usize::MAX);
        // What was not adopted gave its slots back, and their memory is more than the budget allows for.
        if let Err(error) = shared.pool.release_free() {
            tracing::warn!(%error, "free chunks could not be given back to the system");
        }
        adoption.total = begun.elapsed();
        metrics::counter!("stoker_store_adopted_bytes_total").increment(adoption.bytes.bytes());
        Ok((store, adoption, kept))
    }
}

/// A version of a file, as the ledger names it: a hash of where it is, what it is, and how it is cut.
pub(crate) fn version_of(file: &SourceFile, chunk_bytes: u64) -> [u8; 32] {
    use std::os::unix::ffi::OsStrExt;
    let mut hash = Sha256::new();
    // Numbers of fixed length first, so that no two descriptions are the same bytes.
    hash.update(chunk_bytes.to_le_bytes());
    hash.update(file.identity.len.to_le_bytes());
    hash.update(file.identity.mtime_ns.to_le_bytes());
    hash.update(file.identity.inode.to_le_bytes());
    hash.update(file.path.as_os_str().as_bytes());
    hash.finalize().into()
}

/// Finds each chunk's place. What has none is dropped.
fn identify(
    chunks: Vec<(Chunk, Record)>,
    chunk_bytes: u64,
    known: impl Fn(&ModelName) -> Option<CheckpointFiles>,
    adoption: &mut Adoption,
) -> (Vec<CheckpointFiles>, Vec<Candidate>) {
    let mut by_model: BTreeMap<ModelName, Vec<(Chunk, Record)>> = BTreeMap::new();
    for (chunk, record) in chunks {
        by_model.entry(record.model.clone()).or_default().push((chunk, record));
    }
    let (mut models, mut candidates) = (Vec::new(), Vec::new());
    for (name, chunks) in by_model {
        let Some(files) = known(&name).filter(|files| files.chunk_bytes() == chunk_bytes) else {
            adoption.unknown += chunks.len();
            continue;
        };
        // By version: those that are on disk as they were indexed.
        let current: HashMap<[u8; 32], u32> = (0..)
            .zip(files.files())
            .filter(|(_, file)| identity_of(&file.path).is_ok_and(|is| is == file.identity))
            .map(|(index, file)| (version_of(file, chunk_bytes), index))
            .collect();
        let mut places: HashMap<ChunkRef, usize> =
            files.order().iter().enumerate().map(|(position, chunk)| (*chunk, position)).collect();
        let mut found = Vec::with_capacity(chunks.len());
        for (chunk, record) in chunks {
            let Record { version, chunk: index, len, sum, .. } = record;
            let at = current.get(&version).map(|file| ChunkRef { file: *file, index });
            // Removed: of two copies one is enough.
            let place = at.and_then(|at| Some((at, places.remove(&at)?)));
            match place {
                Some((at, position))
                    if files.chunk_len(at) == len as u64
                        && files.sum(at).is_none_or(|given| given == sum) =>
                {
                    found.push(Candidate { model: models.len(), position, chunk, sum });
                }
                _ => adoption.changed += 1,
            }
        }
        // Of which only a hash of the whole is known must be whole: what is missing could not be checked by itself.
        if files.to_hash().next().is_some() && found.len() < files.order().len() {
            adoption.changed += found.len();
            continue;
        }
        candidates.append(&mut found);
        models.push(files);
    }
    (models, candidates)
}

/// Those whose bytes have their sums, and how many haven't.
fn check(candidates: Vec<Candidate>) -> (Vec<Candidate>, usize) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let work = || {
        while let Some(candidate) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = ChunkSum::of(&candidate.chunk);
            if found != candidate.sum {
                wrong.lock().push((candidate.chunk.slot(), candidate.sum, found));
            }
        }
    };
    std::thread::scope(|scope| {
        // This thread checks too, so that it is done even where no other can be started.
        for _ in 1..threads {
            if let Err(error) =
                std::thread::Builder::new().name("stoker-adopt".into()).spawn_scoped(scope, work)
            {
                tracing::debug!(%error, "one thread fewer to check memory");
            }
        }
        work();
    });
    let wrong: BTreeMap<u32, _> =
        wrong.into_inner().into_iter().map(|(slot, was, is)| (slot, (was, is))).collect();
    for (slot, (expected, found)) in &wrong {
        tracing::error!(slot, %expected, %found, "a chunk in kept memory is wrong and was dropped: suspect memory, or the process that was killed");
    }
    let right = candidates.into_iter().filter(|c| !wrong.contains_key(&c.chunk.slot())).collect();
    (right, wrong.len())
}

/// Puts chunks into an empty cache. Returns how many it has no use for.
fn place(cache: &mut Cache, models: &[CheckpointFiles], right: Vec<Candidate>) -> usize {
    let mut of_model = vec![0; models.len()];
    right.iter().for_each(|candidate| of_model[candidate.model] += 1);
    let mut unused = 0;
    for Candidate { model, position, chunk, sum } in right {
        let files = &models[model];
        // As above: one that turned out to be wrong takes the others with it.
        if files.to_hash().next().is_some() && of_model[model] < files.order().len() {
            unused += 1;
            continue;
        }
        let entry = cache.enter(files);
        // Nothing is recorded before its model is vouched for.
        entry.vouch();
        entry.place(position, chunk, sum);
    }
    unused
}
