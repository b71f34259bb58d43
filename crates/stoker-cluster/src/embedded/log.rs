//! What has changed lately: the bounded history that watches read from.

use std::{collections::VecDeque, sync::Arc};

use futures::{StreamExt as _, stream};
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::{Changes, Entry, Error, Event, Revision, Watch};

/// Most revisions that one look at the history hands to a watch.
const TAKE_MAX: usize = 256;

/// The newest changes, at most so many and so many bytes. A watch is a place in it: a slow one costs nothing and is
/// told when its place is gone.
#[derive(Debug)]
pub(super) struct Log {
    inner: RwLock<Inner>,
    /// The newest revision in it.
    newest: watch::Sender<Revision>,
    events_max: usize,
    bytes_max: usize,
}

#[derive(Debug)]
struct Inner {
    /// By revision; of neighbouring revisions.
    revisions: VecDeque<Arc<Changes>>,
    events: usize,
    bytes: usize,
    /// The oldest revision that a watch can begin with.
    oldest: Revision,
}

struct Cursor {
    log: Arc<Log>,
    newest: watch::Receiver<Revision>,
    prefix: String,
    next: Revision,
    ready: VecDeque<Changes>,
    ended: bool,
}

// === impl Log ===

impl Log {
    /// Empty, of a store at `newest`.
    pub(super) fn new(newest: Revision, events_max: usize, bytes_max: usize) -> Self {
        let inner = Inner { revisions: VecDeque::new(), events: 0, bytes: 0, oldest: newest.next() };
        Self { inner: RwLock::new(inner), newest: watch::channel(newest).0, events_max, bytes_max }
    }

    /// Adds what was committed, and wakes the watches.
    pub(super) fn append(&self, committed: Vec<Changes>) {
        let Some(newest) = committed.last().map(|changes| changes.revision) else { return };
        let mut inner = self.inner.write();
        for changes in committed {
            inner.events += changes.events.len();
            inner.bytes += bytes(&changes);
            inner.revisions.push_back(Arc::new(changes));
        }
        while inner.events > self.events_max || inner.bytes > self.bytes_max {
            inner.forget_first();
        }
        drop(inner);
        self.newest.send_replace(newest);
    }

    /// Forgets what is before `before`.
    pub(super) fn compact(&self, before: Revision) -> Result<(), Error> {
        let newest = *self.newest.borrow();
        if before > newest {
            return Err(Error::Invalid { reason: format!("compaction at {before}, the newest is {newest}") });
        }
        let mut inner = self.inner.write();
        while inner.revisions.front().is_some_and(|first| first.revision < before) {
            inner.forget_first();
        }
        Ok(())
    }

    /// The changes under `prefix` from `from` on, for ever. It ends when the store is closed.
    pub(super) fn watch(self: &Arc<Self>, prefix: &str, from: Revision) -> Result<Watch, Error> {
        let oldest = self.inner.read().oldest;
        if from < oldest {
            return Err(Error::Compacted { wanted: from, oldest });
        }
        let cursor = Cursor {
            log: Arc::clone(self),
            newest: self.newest.subscribe(),
            prefix: prefix.to_owned(),
            next: from,
            ready: VecDeque::new(),
            ended: false,
        };
        Ok(stream::unfold(cursor, |mut cursor| async move { Some((cursor.step().await?, cursor)) }).boxed())
    }
}

impl Inner {
    fn forget_first(&mut self) {
        if let Some(first) = self.revisions.pop_front() {
            self.events -= first.events.len();
            self.bytes -= bytes(&first);
            self.oldest = first.revision.next();
        }
    }
}

// === impl Cursor ===

impl Cursor {
    async fn step(&mut self) -> Option<Result<Changes, Error>> {
        loop {
            if let Some(changes) = self.ready.pop_front() {
                return Some(Ok(changes));
            }
            if self.ended {
                return None;
            }
            let newest = *self.newest.borrow_and_update();
            if newest >= self.next {
                if let Err(error) = self.take() {
                    self.ended = true;
                    return Some(Err(error));
                }
            } else if self.newest.changed().await.is_err() {
                self.ended = true;
                return Some(Err(Error::unavailable("the store is closed")));
            }
        }
    }

    /// Moves on over the next revisions, and keeps what of them is under the prefix.
    fn take(&mut self) -> Result<(), Error> {
        let inner = self.log.inner.read();
        if self.next < inner.oldest {
            return Err(Error::Compacted { wanted: self.next, oldest: inner.oldest });
        }
        let skip = usize::try_from(self.next.0 - inner.oldest.0).unwrap_or(usize::MAX);
        for changes in inner.revisions.iter().skip(skip).take(TAKE_MAX) {
            let events: Vec<Event> = changes
                .events
                .iter()
                .filter(|event| event.key().starts_with(&self.prefix))
                .cloned()
                .collect();
            if !events.is_empty() {
                self.ready.push_back(Changes { revision: changes.revision, events });
            }
            self.next = changes.revision.next();
        }
        Ok(())
    }
}

fn bytes(changes: &Changes) -> usize {
    let of_event = |event: &Event| match event {
        Event::Put(Entry { key, value, .. }) => key.len() + value.len(),
        Event::Delete { key } => key.len(),
    };
    size_of::<Changes>() + changes.events.iter().map(|e| size_of::<Event>() + of_event(e)).sum::<usize>()
}
