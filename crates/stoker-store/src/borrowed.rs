//! Memory of a store that was taken over which programs of the one before have still mapped.
//!
//! The kernel knows what they have ([`stoker_io::ChunkPool::lent`]), and asking it is all that can be done: nothing tells of the end of
//! a mapping in a process that is a stranger. A thread asks until nobody is left. A model of which a program has chunks is
//! held meanwhile, as it was for that program before; slots that are no model's now are kept out of use.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    ops::Range,
    sync::{Arc, Weak, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use stoker_io::{Chunk, Record};

use crate::{files::ModelKey, shared::Shared};

/// How often the kernel is asked: how long memory may stay held for nobody.
const ASKED_EVERY: Duration = Duration::from_millis(100);

/// What programs of the store before have, before it is known whose it is now.
pub(crate) struct Borrowed {
    chunks: Vec<Chunk>,
    orphans: Vec<Chunk>,
}

/// What is kept for them.
struct Kept {
    models: HashMap<ModelKey, BTreeSet<u32>>,
    /// Memory that is no model's.
    slots: BTreeMap<u32, Chunk>,
}

/// The thread that asks. Dropped, it ends.
pub(crate) struct Watch {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

// === impl Borrowed ===

impl Borrowed {
    pub(crate) fn new(lent: &[Range<u32>], chunks: &[(Chunk, Record)], orphans: Vec<Chunk>) -> Self {
        let slots: BTreeSet<u32> = lent.iter().cloned().flatten().collect();
        let chunks = chunks.iter().map(|(chunk, _)| chunk).filter(|chunk| slots.contains(&chunk.slot()));
        let orphans = orphans.into_iter().filter(|orphan| slots.contains(&orphan.slot()));
        Self { chunks: chunks.cloned().collect(), orphans: orphans.collect() }
    }

    /// Holds it all, and watches until it is free. Before anybody else uses the store.
    pub(crate) fn keep(self, shared: &Arc<Shared>) -> io::Result<Option<Watch>> {
        let Self { chunks, orphans } = self;
        if chunks.is_empty() && orphans.is_empty() {
            return Ok(None);
        }
        let mut kept = Kept { models: HashMap::new(), slots: BTreeMap::new() };
        kept.slots.extend(orphans.into_iter().map(|chunk| (chunk.slot(), chunk)));
        {
            let state = &mut *shared.lock();
            for chunk in chunks {
                match state.cache.whose(chunk.slot()) {
                    Some(key) => drop(kept.models.entry(key).or_default().insert(chunk.slot())),
                    None => drop(kept.slots.insert(chunk.slot(), chunk)),
                }
            }
            for key in kept.models.keys() {
                if let Some(model) = state.cache.model_mut(key) {
                    model.hold();
                }
            }
            state.cache.set_aside(kept.slots.len());
        }
        let (stop, stopped) = mpsc::channel();
        let shared = Arc::downgrade(shared);
        let thread = std::thread::Builder::new()
            .name("stoker-lent".into())
            .spawn(move || watch(&shared, kept, &stopped))?;
        Ok(Some(Watch { stop: Some(stop), thread: Some(thread) }))
    }
}

fn watch(shared: &Weak<Shared>, mut kept: Kept, stopped: &mpsc::Receiver<()>) {
    while !(kept.models.is_empty() && kept.slots.is_empty()) {
        // Its other end says nothing but that it is gone.
        if stopped.recv_timeout(ASKED_EVERY) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
        let Some(shared) = shared.upgrade() else { return };
        match shared.pool.lent() {
            Ok(lent) => kept.let_go(&shared, &lent.into_iter().flatten().collect()),
            // Nothing is let go of that somebody may have.
            Err(error) => tracing::warn!(%error, "what programs have mapped isn't known"),
        }
    }
    tracing::info!("no program has memory of the node before any more");
}

// === impl Kept ===

impl Kept {
    /// Lets go of what isn't lent any more.
    fn let_go(&mut self, shared: &Shared, lent: &BTreeSet<u32>) {
        let free: Vec<_> = self.models.extract_if(|_, slots| slots.is_disjoint(lent)).collect();
        for (key, _) in free {
            shared.release(&key);
            shared.wake.wake();
        }
        let free: Vec<_> = self.slots.extract_if(.., |slot, _| !lent.contains(slot)).collect();
        let count = free.len();
        drop(free);
        if count > 0 {
            shared.give_back(count);
        }
    }
}

// === impl Watch ===

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}
