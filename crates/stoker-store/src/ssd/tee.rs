//! The thread that writes copies: chunks of loads as they pass, and afterwards what was missed.

use std::{
    io,
    path::Path,
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use stoker_checkpoint::ChunkSum;
use stoker_io::Chunk;
use stoker_types::{ModelName, hex};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{CopyEnd, GiveUp, SsdCopy, SsdTier};
use crate::{
    error::LoadError,
    files::ChunkRef,
    job::Priority,
    shared::Shared,
    stream::{ChunkStream, StreamedChunk},
};

/// Chunks that wait to be written. What finds no place is fetched again afterwards: a slow disk delays no load.
const QUEUED: usize = 8;

/// Chunks after which what was written is made durable: what a crash costs.
const SAVED_EVERY: usize = 8;

/// Chunks on their way from remote while a copy is completed: few beside what somebody waits for, many when somebody waits
/// for the copy.
const FILL_RING: usize = 4;
const FILL_RING_DEMAND: usize = 16;

/// When to look again whether there is memory to complete copies through.
const STARVED: Duration = Duration::from_secs(2);

/// Bytes hashed at a time.
const HASHED: usize = 4 << 20;

/// The way to the thread.
#[derive(Clone)]
pub(crate) struct Tee {
    sender: mpsc::Sender<Passing>,
    orders: Arc<Orders>,
}

/// What the thread is to do besides. Bounded by the copies and models that there are.
#[derive(Default)]
struct Orders {
    lists: Mutex<Lists>,
    more: Notify,
}

#[derive(Default)]
struct Lists {
    complete: Vec<Wanted>,
    give_up: Vec<(Arc<SsdCopy>, GiveUp)>,
    damaged: Vec<ModelName>,
}

/// A copy that should become whole.
pub(crate) struct Wanted {
    pub(crate) copy: Arc<SsdCopy>,
    pub(crate) priority: Priority,
}

/// A chunk that passes by.
struct Passing {
    copy: Arc<SsdCopy>,
    at: ChunkRef,
    sum: ChunkSum,
    bytes: Bytes,
}

enum Bytes {
    /// It stays in memory anyway.
    Shared(Chunk),
    /// Its slot is wanted back.
    Copied(Vec<u8>),
}

/// The thread. Dropped, it makes durable what was written, and ends.
pub(crate) struct TeeThread {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

struct Writer {
    tier: SsdTier,
    shared: Weak<Shared>,
    receiver: mpsc::Receiver<Passing>,
    orders: Arc<Orders>,
    /// The copy that is being completed, from memory and from remote.
    filling: Option<(Wanted, ChunkStream)>,
    /// There was no memory to complete copies through.
    starved: bool,
    /// Written to, and not yet saved.
    touched: Vec<Arc<SsdCopy>>,
}

// === impl Tee ===

impl Tee {
    /// The way to a thread that is started later.
    pub(crate) fn new() -> (Self, impl FnOnce(SsdTier, Weak<Shared>) -> io::Result<TeeThread>) {
        let (sender, receiver) = mpsc::channel(QUEUED);
        let orders: Arc<Orders> = Arc::default();
        let tee = Self { sender, orders: Arc::clone(&orders) };
        (tee, move |tier, shared| {
            let stop = CancellationToken::new();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
            let stopped = stop.clone();
            let writer =
                Writer { tier, shared, receiver, orders, filling: None, starved: false, touched: Vec::new() };
            let run = move || runtime.block_on(writer.run(stopped));
            let thread = std::thread::Builder::new().name("stoker-tee".into()).spawn(run)?;
            Ok(TeeThread { stop, thread: Some(thread) })
        })
    }

    /// A chunk passes by. Never waits: one that finds no place is counted, and fetched again later.
    pub(crate) fn pass(&self, copy: &Arc<SsdCopy>, at: ChunkRef, sum: ChunkSum, chunk: &Chunk, stays: bool) {
        let Ok(place) = self.sender.try_reserve() else {
            metrics::counter!("stoker_store_tee_dropped_total").increment(1);
            return;
        };
        let bytes = if stays { Bytes::Shared(chunk.clone()) } else { Bytes::Copied(chunk.to_vec()) };
        place.send(Passing { copy: Arc::clone(copy), at, sum, bytes });
    }

    /// A copy should become whole.
    pub(crate) fn complete(&self, wanted: Wanted) {
        {
            let list = &mut self.orders.lists.lock().complete;
            match list.iter_mut().find(|w| w.copy.key == wanted.copy.key) {
                Some(known) => known.priority = known.priority.max(wanted.priority),
                None => list.push(wanted),
            }
        }
        self.orders.more.notify_one();
    }

    /// A copy is of no more use.
    pub(crate) fn give_up(&self, copy: &Arc<SsdCopy>, why: GiveUp) {
        self.orders.lists.lock().give_up.push((Arc::clone(copy), why));
        self.orders.more.notify_one();
    }

    /// A landed copy turned out to be wrong.
    pub(crate) fn damaged(&self, model: &ModelName) {
        {
            let damaged = &mut self.orders.lists.lock().damaged;
            if !damaged.contains(model) {
                damaged.push(model.clone());
            }
        }
        self.orders.more.notify_one();
    }
}

// === impl TeeThread ===

impl Drop for TeeThread {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // Its panics are its own; copies are found again by the next process.
            let _ = thread.join();
        }
    }
}

// === impl Writer ===

impl Writer {
    async fn run(mut self, stop: CancellationToken) {
        let orders = Arc::clone(&self.orders);
        loop {
            self.clear_up();
            if self.receiver.is_empty() || self.touched.iter().any(|copy| copy.unsaved() >= SAVED_EVERY) {
                self.save();
            }
            if !self.starved {
                self.begin_filling();
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                passing = self.receiver.recv() => match passing {
                    Some(Passing { copy, at, sum, bytes }) => self.write(&copy, at, sum, bytes.as_ref()),
                    None => break,
                },
                filled = next_filled(&mut self.filling) => self.filled(filled),
                () = orders.more.notified() => {}
                () = tokio::time::sleep(STARVED), if self.starved => self.starved = false,
            }
        }
        // What has passed is here: it need not be fetched again.
        while let Ok(Passing { copy, at, sum, bytes }) = self.receiver.try_recv() {
            self.write(&copy, at, sum, bytes.as_ref());
        }
        self.save();
    }

    fn clear_up(&mut self) {
        let (give_up, damaged) = {
            let lists = &mut *self.orders.lists.lock();
            (std::mem::take(&mut lists.give_up), std::mem::take(&mut lists.damaged))
        };
        for (copy, why) in give_up {
            if self.filling.as_ref().is_some_and(|(wanted, _)| Arc::ptr_eq(&wanted.copy, &copy)) {
                self.filling = None;
            }
            self.tier.end(&copy, CopyEnd::GivenUp(why));
        }
        for model in damaged {
            self.tier.damaged(&model);
        }
    }

    fn write(&mut self, copy: &Arc<SsdCopy>, at: ChunkRef, sum: ChunkSum, bytes: &[u8]) {
        if copy.ended() || copy.sum(at).is_some() {
            return;
        }
        match copy.write(at, sum, bytes) {
            Ok(()) => {
                metrics::counter!("stoker_store_tee_bytes_total").increment(bytes.len() as u64);
                if !self.touched.iter().any(|touched| Arc::ptr_eq(touched, copy)) {
                    self.touched.push(Arc::clone(copy));
                }
            }
            Err(error) => self.failed(copy, (&error).into()),
        }
    }

    /// Makes what was written durable; a copy that is whole then lands.
    fn save(&mut self) {
        for copy in std::mem::take(&mut self.touched) {
            if copy.ended() {
                continue;
            }
            if let Err(error) = copy.save() {
                self.failed(&copy, (&error).into());
            } else if let Some(sums) = copy.whole() {
                self.land(&copy, sums);
            }
        }
    }

    /// The disk is full or broken, or what arrived is wrong: that costs the copy, and nothing else.
    fn failed(&mut self, copy: &Arc<SsdCopy>, why: GiveUp) {
        metrics::counter!("stoker_store_tee_failed_total").increment(1);
        let model = &copy.files.key().name;
        tracing::warn!(%model, %why, "the copy on SSD is given up; the model stays remote");
        self.tier.end(copy, CopyEnd::GivenUp(why));
        if self.filling.as_ref().is_some_and(|(wanted, _)| Arc::ptr_eq(&wanted.copy, copy)) {
            self.filling = None;
        }
    }

    fn land(&mut self, copy: &Arc<SsdCopy>, sums: Vec<Vec<ChunkSum>>) {
        if self.filling.as_ref().is_some_and(|(wanted, _)| Arc::ptr_eq(&wanted.copy, copy)) {
            self.filling = None;
        }
        let model = &copy.files.key().name;
        let landed =
            check_hashes(copy).and_then(|()| self.tier.land(copy, sums).map_err(|error| (&error).into()));
        match landed {
            Ok(()) => {
                tracing::info!(%model, bytes = %copy.files.bytes(), "a copy is on SSD");
                metrics::counter!("stoker_store_copies_landed_total").increment(1);
                copy.discard();
                self.tier.end(copy, CopyEnd::Landed);
            }
            Err(why) => self.failed(copy, why),
        }
    }

    /// Takes up the next copy that should become whole: the most urgent first.
    fn begin_filling(&mut self) {
        let waiting = self.orders.lists.lock().complete.iter().map(|wanted| wanted.priority).max();
        let busy = self.filling.as_ref().map(|(wanted, _)| wanted.priority);
        if waiting.is_none() || busy >= waiting {
            return;
        }
        if let Some((wanted, _)) = self.filling.take() {
            self.orders.lists.lock().complete.push(wanted);
        }
        let next = {
            let list = &mut self.orders.lists.lock().complete;
            let most = (0..list.len()).max_by_key(|i| list[*i].priority);
            most.map(|i| list.swap_remove(i))
        };
        let Some(wanted) = next.filter(|wanted| !wanted.copy.ended()) else { return };
        let Some(shared) = self.shared.upgrade() else { return };
        // Everything that was written counts from here on.
        if let Err(error) = wanted.copy.save() {
            return self.failed(&wanted.copy, (&error).into());
        }
        let missing = wanted.copy.missing();
        if missing.is_empty() {
            if let Some(sums) = wanted.copy.whole() {
                self.land(&wanted.copy, sums);
            }
            return;
        }
        let ring = if wanted.priority == Priority::Demand { FILL_RING_DEMAND } else { FILL_RING };
        match ChunkStream::begin_some(&shared, &wanted.copy.files, wanted.priority, ring, missing) {
            Ok(stream) => self.filling = Some((wanted, stream)),
            // Memory is full of what is in use: later, then.
            Err(LoadError::OutOfBudget { .. }) => {
                self.orders.lists.lock().complete.push(wanted);
                self.starved = true;
            }
            Err(error) => self.interrupted(&wanted.copy, &error),
        }
    }

    fn filled(&mut self, filled: Result<Option<StreamedChunk>, LoadError>) {
        let Some((wanted, _)) = &self.filling else { return };
        let copy = Arc::clone(&wanted.copy);
        match filled {
            Ok(Some(chunk)) => self.write(&copy, chunk.at(), chunk.sum(), &chunk),
            // Whole by now, or whatever was lost meanwhile is wanted again.
            Ok(None) => {
                let Some((wanted, _)) = self.filling.take() else { return };
                self.save();
                if !wanted.copy.ended() {
                    self.orders.lists.lock().complete.push(wanted);
                }
            }
            Err(error) => {
                self.filling = None;
                self.save();
                self.interrupted(&copy, &error);
            }
        }
    }

    fn interrupted(&mut self, copy: &Arc<SsdCopy>, error: &LoadError) {
        let model = &copy.files.key().name;
        tracing::warn!(%model, %error, "the copy on SSD isn't completed");
        let end = GiveUp::of(error).map_or_else(|| CopyEnd::Interrupted(error.to_string()), CopyEnd::GivenUp);
        self.tier.end(copy, end);
    }
}

/// The next chunk of the copy that is being completed; waits for ever when none is.
async fn next_filled(
    filling: &mut Option<(Wanted, ChunkStream)>,
) -> Result<Option<StreamedChunk>, LoadError> {
    match filling {
        Some((_, stream)) => stream.next().await,
        None => std::future::pending().await,
    }
}

/// Of files of which only a hash of the whole is known: whether it is right.
fn check_hashes(copy: &SsdCopy) -> Result<(), GiveUp> {
    for (index, file) in copy.files.files().iter().enumerate() {
        let Some(expected) = file.sha256.as_deref().filter(|_| file.chunk_sums.is_empty()) else { continue };
        let found = hash_of(copy.part(index)).map_err(|error| GiveUp::from(&error))?;
        if found != expected {
            let name = file.origin.as_ref().map(|origin| origin.object.url.clone());
            let name = name.unwrap_or_else(|| file.path.display().to_string());
            return Err(GiveUp::WrongHash { file: name, expected: expected.to_owned(), found });
        }
    }
    Ok(())
}

fn hash_of(path: &Path) -> io::Result<String> {
    use std::io::Read as _;

    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; HASHED];
    let mut hash = Sha256::new();
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Shared(chunk) => chunk,
            Self::Copied(bytes) => bytes,
        }
    }
}
