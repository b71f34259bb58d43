//! The SSD tier: copies of remote models on this machine's disks, within a budget.
//!
//! A copy grows in a directory of its own below `.copies/` of a disk ([`SsdCopy`]), from the chunks of loads as they pass
//! (the tee), and lands as an ordinary model once it is whole and checked. Landed copies that nobody asked to keep make
//! room for others, those worth least first; what they cost to bring back is known from measured rates.

mod copy;
mod journal;
mod tee;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use stoker_checkpoint::ChunkSum;
use stoker_scheduler::eviction::{ChunkFacts, Heat, TierRates};
use stoker_types::{ByteSize, BytesPerSec, ModelName, Tier, clock};

use copy::About;
pub(crate) use copy::SsdCopy;
pub use copy::{CopyEnd, CopyProgress, GiveUp};
pub(crate) use tee::{Tee, TeeThread, Wanted};

use crate::files::CheckpointFiles;

/// Below a disk's directory: everything that isn't a model yet.
const COPIES: &str = ".copies";

/// In there: what is remembered of how often models were used.
const USES: &str = "uses.json";

/// Bytes of a chunk, as far as comparing what chunks are worth goes.
const WEIGHED_BYTES: ByteSize = ByteSize::mib(16);

/// A directory with a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SsdDisk {
    /// The directory. Models that landed are below it.
    pub dir: PathBuf,
    /// Bytes that Stoker's own files may take there.
    pub budget: ByteSize,
    /// Bytes that stay free, whatever the budget.
    pub reserve: ByteSize,
}

/// A model on a disk that Stoker wrote there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shelved {
    /// The model.
    pub model: ModelName,
    /// Bytes of its files.
    pub bytes: ByteSize,
    /// Somebody asked for it to stay, or it can't be fetched again: never evicted.
    pub kept: bool,
    /// The host that it would come from again.
    pub host: String,
}

/// A copy whose bytes are all there, and right.
#[derive(Debug)]
pub struct FinishedCopy<'a> {
    /// The model.
    pub model: &'a ModelName,
    /// The disk's directory.
    pub disk: &'a Path,
    /// The files, in the model's order, under temporary names and in a directory that goes with them.
    pub files: Vec<PathBuf>,
    /// Sums of each file's chunks.
    pub sums: Vec<Vec<ChunkSum>>,
    /// What was copied.
    pub of: &'a CheckpointFiles,
}

/// The models on disks: what lands, what is there, what goes. Whoever owns the models' directories implements it.
pub trait Shelf: Send + Sync {
    /// Makes a finished copy a model, in one step: whoever looks sees all of it or nothing. May block.
    ///
    /// # Errors
    /// The operating system's, or why it is no model any more.
    fn land(&self, copy: FinishedCopy<'_>) -> io::Result<()>;

    /// The models on a disk that Stoker wrote there. May block.
    fn shelved(&self, disk: &Path) -> Vec<Shelved>;

    /// Removes a model's files that Stoker wrote. May block. Returns how many bytes that freed.
    ///
    /// # Errors
    /// The operating system's.
    fn remove(&self, disk: &Path, model: &ModelName) -> io::Result<ByteSize>;
}

/// Part of a copy on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Of which model; `None` when that can't be told.
    pub model: Option<ModelName>,
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes that are there and durable.
    pub present: ByteSize,
    /// Bytes that there would be.
    pub total: ByteSize,
    /// Hash of what it is a copy of.
    pub key: u64,
}

/// A disk as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    /// Its directory and budget.
    pub disk: SsdDisk,
    /// Models on it that Stoker wrote.
    pub models: Vec<Shelved>,
    /// Copies that aren't whole.
    pub copies: Vec<Leftover>,
    /// Bytes that the file system has left.
    pub free: ByteSize,
}

/// The SSD tier. A cheap handle.
#[derive(Clone)]
pub struct SsdTier {
    inner: Arc<Inner>,
}

struct Inner {
    disks: Vec<SsdDisk>,
    shelf: Arc<dyn Shelf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    copies: HashMap<u64, Arc<SsdCopy>>,
    heat: HashMap<ModelName, Heat>,
    pinned: Vec<ModelName>,
    /// By host.
    rates: HashMap<String, BytesPerSec>,
    /// Models that landed (true) or went (false) since the tier was opened.
    landed: HashMap<ModelName, bool>,
}

/// Why there is no room for a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NoRoom {
    /// It is larger than any disk's budget.
    TooLarge,
    /// What is there has to stay.
    Kept,
}

// === impl SsdTier ===

impl SsdTier {
    /// The tier on some disks. Their directories are made if they aren't there.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(disks: Vec<SsdDisk>, shelf: Arc<dyn Shelf>) -> io::Result<Self> {
        let mut heat = HashMap::new();
        for disk in &disks {
            fs::create_dir_all(disk.dir.join(COPIES))?;
            let uses = fs::read(disk.dir.join(COPIES).join(USES)).unwrap_or_default();
            let uses: HashMap<ModelName, (f64, u64)> = serde_json::from_slice(&uses).unwrap_or_default();
            heat.extend(
                uses.into_iter().map(|(model, (uses, at))| (model, Heat::of(uses, Duration::from_secs(at)))),
            );
        }
        let state = State { heat, ..State::default() };
        Ok(Self { inner: Arc::new(Inner { disks, shelf, state: Mutex::new(state) }) })
    }

    /// Models that are never evicted, as the configuration has them.
    pub fn set_pinned(&self, models: Vec<ModelName>) {
        self.inner.state.lock().pinned = models;
    }

    /// What tells the copy of one version of a model from others; [`Leftover::key`].
    #[must_use]
    pub fn key_of(files: &CheckpointFiles) -> u64 {
        key_of(files)
    }

    /// Counts a use of a model, also for after a restart. Blocks for a small write.
    pub fn used(&self, model: &ModelName) {
        let now = clock::wall();
        let uses = {
            let state = &mut *self.inner.state.lock();
            state.heat.entry(model.clone()).or_default().touch(now);
            // What nobody used for a day tells nothing any more.
            state.heat.retain(|_, heat| heat.at(now) > 1e-40);
            state.heat.iter().map(|(model, heat)| (model.clone(), (heat.at(now), now.as_secs()))).collect()
        };
        let uses: HashMap<ModelName, (f64, u64)> = uses;
        let Some(disk) = self.inner.disks.first() else { return };
        let path = disk.dir.join(COPIES).join(USES);
        let next = path.with_extension("tmp");
        let written =
            serde_json::to_vec(&uses).map_err(io::Error::other).and_then(|bytes| fs::write(&next, bytes));
        if let Err(error) = written.and_then(|()| fs::rename(&next, &path)) {
            tracing::debug!(%error, "what was used is forgotten with this process");
        }
    }

    /// What a host's store gives, for weighing what is worth keeping.
    pub(crate) fn measured(&self, host: &str, rate: BytesPerSec) {
        self.inner.state.lock().rates.insert(host.to_owned(), rate);
    }

    /// The disks as they are. Blocks.
    #[must_use]
    pub fn look(&self) -> Vec<DiskState> {
        let state = |disk: &SsdDisk| DiskState {
            disk: disk.clone(),
            models: self.inner.shelf.shelved(&disk.dir),
            copies: leftovers(&disk.dir),
            free: free(&disk.dir),
        };
        self.inner.disks.iter().map(state).collect()
    }

    /// Removes parts of copies that nobody will go on with: those that `wanted` doesn't know, and that no process writes.
    /// Then evicts until every disk is within its budget, or within `at_most`, if that is less. Blocks. Returns the bytes
    /// freed.
    pub fn collect(&self, at_most: Option<ByteSize>, wanted: impl Fn(&Leftover) -> bool) -> ByteSize {
        let mut freed = ByteSize::ZERO;
        for disk in &self.inner.disks {
            freed += leftovers(&disk.dir).iter().filter(|copy| !wanted(copy)).map(Leftover::remove).sum();
            let budget = at_most.map_or(disk.budget, |most| most.min(disk.budget));
            while self.taken(disk, None) > budget {
                let Some(bytes) = self.evict_one(disk, None) else { break };
                freed += bytes;
            }
        }
        freed
    }

    /// The copy of a model that is under way, or a new one, if there is room or room can be made. Blocks.
    pub(crate) fn copy(&self, files: &CheckpointFiles) -> Option<Arc<SsdCopy>> {
        let remote = |file: &crate::SourceFile| file.origin.as_ref().is_some_and(|origin| origin.header_only);
        if files.files().is_empty() || !files.files().iter().all(remote) {
            return None;
        }
        let key = key_of(files);
        if let Some(copy) = self.inner.state.lock().copies.get(&key).filter(|copy| !copy.ended()) {
            return Some(Arc::clone(copy));
        }
        let model = &files.key().name;
        for disk in &self.inner.disks {
            // Nobody goes on with the copy of a version that is gone.
            let stale = |copy: &&Leftover| copy.model.as_ref() == Some(model) && copy.key != key;
            let _: ByteSize = leftovers(&disk.dir).iter().filter(stale).map(Leftover::remove).sum();
        }
        let (index, dir) = match self.place(files, key) {
            Ok(place) => place,
            Err(reason) => {
                let reason = match reason {
                    NoRoom::TooLarge => "too_large",
                    NoRoom::Kept => "no_room",
                };
                metrics::counter!("stoker_store_tee_skipped_total", "reason" => reason).increment(1);
                tracing::info!(%model, bytes = %files.bytes(), reason, "no copy on SSD");
                return None;
            }
        };
        match SsdCopy::open(files, key, index, dir) {
            Ok(Some(copy)) => {
                let state = &mut *self.inner.state.lock();
                let entry = state.copies.entry(key).or_insert_with(|| Arc::clone(&copy));
                if entry.ended() {
                    *entry = copy;
                }
                Some(Arc::clone(entry))
            }
            Ok(None) => {
                tracing::info!(%model, "another process copies it to SSD");
                None
            }
            Err(error) => {
                metrics::counter!("stoker_store_tee_skipped_total", "reason" => "io").increment(1);
                tracing::warn!(%model, %error, "no copy on SSD");
                None
            }
        }
    }

    /// Ends a copy.
    pub(crate) fn end(&self, copy: &Arc<SsdCopy>, end: CopyEnd) {
        if matches!(end, CopyEnd::GivenUp(_)) {
            copy.discard();
        }
        self.inner.state.lock().copies.remove(&copy.key);
        copy.end(end);
    }

    /// A copy is whole: it becomes a model. Blocks.
    pub(crate) fn land(&self, copy: &SsdCopy, sums: Vec<Vec<ChunkSum>>) -> io::Result<()> {
        let finished = FinishedCopy {
            model: &copy.files.key().name,
            disk: &self.inner.disks[copy.disk].dir,
            files: (0..copy.files.files().len()).map(|file| copy.part(file).to_owned()).collect(),
            sums,
            of: &copy.files,
        };
        copy.strike_out()?;
        self.inner.shelf.land(finished)?;
        self.inner.state.lock().landed.insert(copy.files.key().name.clone(), true);
        Ok(())
    }

    /// Whether a model is whole on a disk, as far as that has changed since the tier was opened.
    pub(crate) fn has(&self, model: &ModelName) -> Option<bool> {
        self.inner.state.lock().landed.get(model).copied()
    }

    /// Has a model go from a disk. Blocks.
    fn remove(&self, disk: &SsdDisk, model: &ModelName) -> io::Result<ByteSize> {
        let freed = self.inner.shelf.remove(&disk.dir, model)?;
        self.inner.state.lock().landed.insert(model.clone(), false);
        Ok(freed)
    }

    /// A landed copy turned out to be damaged: it goes, unless somebody asked for it to stay. Blocks.
    pub fn damaged(&self, model: &ModelName) {
        for disk in &self.inner.disks {
            let here = self.inner.shelf.shelved(&disk.dir).into_iter().any(|s| s.model == *model && !s.kept);
            if here {
                match self.remove(disk, model) {
                    Ok(_) => {
                        tracing::warn!(%model, "a damaged copy is removed from SSD; the next load brings another")
                    }
                    Err(error) => tracing::warn!(%model, %error, "a damaged copy stays on SSD"),
                }
            }
        }
    }

    /// Where a copy is or goes.
    fn place(&self, files: &CheckpointFiles, key: u64) -> Result<(usize, PathBuf), NoRoom> {
        let name = format!("{key:016x}");
        let needed = files.bytes();
        let dir = |disk: &SsdDisk| disk.dir.join(COPIES).join(&name);
        if let Some(index) = self.inner.disks.iter().position(|disk| dir(disk).is_dir()) {
            return Ok((index, dir(&self.inner.disks[index])));
        }
        let mut by_room: Vec<_> = self.inner.disks.iter().enumerate().collect();
        by_room.sort_by_cached_key(|(_, disk)| std::cmp::Reverse(self.room(disk)));
        let mut reason = NoRoom::TooLarge;
        for (index, disk) in by_room {
            if needed > disk.budget {
                continue;
            }
            reason = NoRoom::Kept;
            if self.make_room(disk, needed, &files.key().name) {
                return Ok((index, dir(disk)));
            }
        }
        Err(reason)
    }

    /// Evicts until so many bytes fit, if that many can go.
    fn make_room(&self, disk: &SsdDisk, needed: ByteSize, but: &ModelName) -> bool {
        let evictable: ByteSize = self.evictable(disk, Some(but)).iter().map(|shelved| shelved.bytes).sum();
        if self.room(disk) + evictable < needed {
            return false;
        }
        while self.room(disk) < needed {
            if self.evict_one(disk, Some(but)).is_none() {
                return false;
            }
        }
        true
    }

    /// Bytes that may still be written.
    fn room(&self, disk: &SsdDisk) -> ByteSize {
        // What copies under way will still take is promised.
        let promised: ByteSize =
            leftovers(&disk.dir).iter().map(|copy| copy.total.saturating_sub(copy.present)).sum();
        let budget = disk.budget.saturating_sub(self.taken(disk, None));
        budget.min(free(&disk.dir).saturating_sub(disk.reserve).saturating_sub(promised))
    }

    /// Bytes of Stoker's own files, those included that copies under way will take.
    fn taken(&self, disk: &SsdDisk, but: Option<&ModelName>) -> ByteSize {
        let shelved = self.inner.shelf.shelved(&disk.dir);
        let models: ByteSize =
            shelved.iter().filter(|shelved| Some(&shelved.model) != but).map(|shelved| shelved.bytes).sum();
        models + leftovers(&disk.dir).iter().map(|copy| copy.total).sum()
    }

    fn evictable(&self, disk: &SsdDisk, but: Option<&ModelName>) -> Vec<Shelved> {
        let pinned = self.inner.state.lock().pinned.clone();
        let mut shelved = self.inner.shelf.shelved(&disk.dir);
        shelved.retain(|s| !s.kept && !pinned.contains(&s.model) && Some(&s.model) != but);
        shelved
    }

    /// Evicts the model that is worth least: how likely it is to be wanted times what it costs to fetch again, for each
    /// chunk. Returns how many bytes that freed.
    fn evict_one(&self, disk: &SsdDisk, but: Option<&ModelName>) -> Option<ByteSize> {
        let now = clock::wall();
        let candidates = self.evictable(disk, but);
        let worth = {
            let state = self.inner.state.lock();
            move |shelved: &Shelved| {
                let heat = state.heat.get(&shelved.model).map_or(0.0, |heat| heat.at(now));
                let slowest = || state.rates.values().copied().min_by(|a, b| a.0.total_cmp(&b.0));
                let remote = state.rates.get(&shelved.host).copied().or_else(slowest);
                let reload = TierRates { ssd: None, remote }.reload(Tier::Remote, WEIGHED_BYTES);
                ChunkFacts { heat, reload, position: 0, of: 1 }.keep_score()
            }
        };
        // Of those that nobody has used, the largest.
        let worst = candidates
            .iter()
            .map(|shelved| (worth(shelved), std::cmp::Reverse(shelved.bytes), shelved))
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
            .map(|(.., shelved)| shelved.model.clone());
        drop(worth);
        let model = worst?;
        match self.remove(disk, &model) {
            Ok(freed) => {
                metrics::counter!("stoker_store_ssd_evictions_total").increment(1);
                tracing::info!(%model, %freed, "evicted from SSD");
                Some(freed)
            }
            Err(error) => {
                tracing::warn!(%model, %error, "it can't be evicted from SSD");
                None
            }
        }
    }
}

// === impl Leftover ===

impl Leftover {
    /// Removes it, unless a process writes it. Returns the bytes freed.
    fn remove(&self) -> ByteSize {
        let busy = fs::File::open(self.dir.join("journal")).is_ok_and(|file| file.try_lock().is_err());
        if busy {
            return ByteSize::ZERO;
        }
        match fs::remove_dir_all(&self.dir) {
            Ok(()) => {
                tracing::info!(dir = %self.dir.display(), present = %self.present, "an abandoned copy is removed");
                self.present
            }
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), %error, "an abandoned copy stays");
                ByteSize::ZERO
            }
        }
    }
}

impl std::fmt::Debug for SsdTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SsdTier").field("disks", &self.inner.disks).finish_non_exhaustive()
    }
}

/// The host or bucket of an address.
#[must_use]
pub fn host_of(url: &str) -> &str {
    let from = url.find("://").map_or(0, |at| at + 3);
    let to = url[from..].find('/').map_or(url.len(), |at| from + at);
    &url[..to]
}

/// What a copy is of, over restarts: the model's name, and every version of every object.
fn key_of(files: &CheckpointFiles) -> u64 {
    let objects: Vec<_> = files.files().iter().map(|file| file.origin.as_ref().map(|o| &o.object)).collect();
    let text = serde_json::to_vec(&(&files.key().name, files.chunk_bytes(), objects)).unwrap_or_default();
    ChunkSum::of(&text).0
}

fn leftovers(disk: &Path) -> Vec<Leftover> {
    let Ok(entries) = fs::read_dir(disk.join(COPIES)) else { return Vec::new() };
    let dirs = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    dirs.filter_map(|dir| {
        let key = u64::from_str_radix(dir.file_name()?.to_str()?, 16).ok()?;
        let about = About::read(&dir);
        Some(Leftover {
            present: about.as_ref().map_or(ByteSize::ZERO, |about| about.present(&dir)),
            total: about.as_ref().map_or(ByteSize::ZERO, About::total),
            model: about.map(|about| about.model),
            dir,
            key,
        })
    })
    .collect()
}

fn free(dir: &Path) -> ByteSize {
    rustix::fs::statvfs(dir)
        .map_or(ByteSize::ZERO, |stat| ByteSize(stat.f_bavail.saturating_mul(stat.f_frsize)))
}
