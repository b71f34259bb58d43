//! A typed copy of everything under a prefix that follows the store.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures::StreamExt as _;
use parking_lot::RwLock;
use tokio::{
    sync::{broadcast, watch},
    task::AbortHandle,
};

use crate::{
    Changes, ClusterStore, ClusterStoreExt as _, Deadline, Entry, Error, Event, LeaseId, Record, RecordError,
    Revision, Versioned, retry::Backoff,
};

/// How a table is kept.
#[derive(Debug, Clone, Copy)]
pub struct TableSettings {
    /// Most rows; more is [`Error::TooLarge`].
    pub rows_max: usize,
    /// Most changes that a subscriber may be behind before it gets the whole table instead.
    pub backlog: usize,
    /// How long one call to the store may take.
    pub call_timeout: Duration,
}

/// A copy of the records under a prefix. Answers from memory, also while the store is away; clones share the copy.
pub struct Table<T> {
    shared: Arc<Shared<T>>,
    /// Ends the task with the last clone.
    _task: Arc<AbortOnDrop>,
}

/// One record and when it got there.
#[derive(Debug, Clone, PartialEq)]
pub struct Row<T> {
    /// The record.
    pub record: Versioned<T>,
    /// The revision at which the key came to be.
    pub created: Revision,
    /// The revision of its last write: what a compare-and-swap expects.
    pub modified: Revision,
    /// The lease that it goes with.
    pub lease: Option<LeaseId>,
}

/// The whole table at one moment. A key's id is what follows the prefix.
#[derive(Debug, Clone)]
pub struct Snapshot<T> {
    /// Grows with every change; never falls.
    pub generation: u64,
    /// The store's revision that it shows, or a later one that changed nothing here.
    pub revision: Revision,
    /// The records.
    pub rows: BTreeMap<Arc<str>, Arc<Row<T>>>,
    /// Keys whose value is no such record. They hide none of the others.
    pub bad: BTreeMap<Arc<str>, Bad>,
    /// How often it had to be read anew because the history was gone.
    pub resyncs: u64,
}

/// A value that can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// Why.
    pub error: RecordError,
    /// The revision that wrote it.
    pub modified: Revision,
}

/// One row's change.
#[derive(Debug, Clone, PartialEq)]
pub enum Change<T> {
    /// New or changed.
    Put {
        /// The key after the prefix.
        id: Arc<str>,
        /// The row as it is now.
        row: Arc<Row<T>>,
        /// As it was.
        before: Option<Arc<Row<T>>>,
    },
    /// Gone, or not readable any more.
    Removed {
        /// The key after the prefix.
        id: Arc<str>,
        /// As it was.
        before: Arc<Row<T>>,
    },
}

/// What changed from one generation to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta<T> {
    /// The generation that it leads to.
    pub generation: u64,
    /// The revision that it leads to.
    pub revision: Revision,
    /// At least one.
    pub changes: Vec<Change<T>>,
}

/// What a subscriber gets.
#[derive(Debug, Clone)]
pub enum Update<T> {
    /// The next generation.
    Delta(Arc<Delta<T>>),
    /// The subscriber was too slow: the table as it is now.
    Behind(Arc<Snapshot<T>>),
}

/// A snapshot and every change after it.
pub struct Subscription<T> {
    /// The table when the subscription began.
    pub snapshot: Arc<Snapshot<T>>,
    shared: Arc<Shared<T>>,
    deltas: broadcast::Receiver<Arc<Delta<T>>>,
    generation: u64,
    _task: Arc<AbortOnDrop>,
}

/// Whether the copy follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableState {
    /// As far as known.
    Following,
    /// Not at the moment; it goes on trying. What it has is as old as the last change.
    Failing(Error),
}

struct Shared<T> {
    current: RwLock<Arc<Snapshot<T>>>,
    deltas: broadcast::Sender<Arc<Delta<T>>>,
    generation: watch::Sender<u64>,
    state: watch::Sender<TableState>,
}

struct AbortOnDrop(AbortHandle);

struct Follower<T> {
    store: Arc<dyn ClusterStore>,
    prefix: String,
    settings: TableSettings,
    shared: Arc<Shared<T>>,
}

impl Default for TableSettings {
    fn default() -> Self {
        Self { rows_max: 100_000, backlog: 1_024, call_timeout: Duration::from_secs(5) }
    }
}

// === impl Table ===

impl<T: Record> Table<T> {
    /// Reads everything under `prefix`, then follows it.
    ///
    /// # Errors
    /// As [`ClusterStore::list`], of the first reading. Later trouble is in [`Table::state`].
    pub async fn open(
        store: Arc<dyn ClusterStore>,
        prefix: &str,
        settings: TableSettings,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let empty = Snapshot {
            generation: 0,
            revision: Revision(0),
            rows: BTreeMap::new(),
            bad: BTreeMap::new(),
            resyncs: 0,
        };
        let shared = Arc::new(Shared {
            current: RwLock::new(Arc::new(empty)),
            deltas: broadcast::channel(settings.backlog).0,
            generation: watch::channel(0).0,
            state: watch::channel(TableState::Following).0,
        });
        let follower = Follower { store, prefix: prefix.to_owned(), settings, shared: Arc::clone(&shared) };
        let mut backoff = Backoff::background();
        loop {
            match follower.read(deadline).await {
                Ok(()) => break,
                Err(error @ (Error::Unavailable { .. } | Error::Compacted { .. })) => {
                    if deadline.bound(tokio::time::sleep(backoff.pause())).await.is_none() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let task = tokio::spawn(follower.follow());
        Ok(Self { shared, _task: Arc::new(AbortOnDrop(task.abort_handle())) })
    }

    /// The table now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot<T>> {
        self.shared.current.read().clone()
    }

    /// One row now.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Arc<Row<T>>> {
        self.shared.current.read().rows.get(id).cloned()
    }

    /// The table now, and everything that changes from here on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription<T> {
        // Nothing is applied while the lock is held, so nothing is missed and nothing comes twice.
        let current = self.shared.current.read();
        let deltas = self.shared.deltas.subscribe();
        Subscription {
            snapshot: Arc::clone(&current),
            shared: Arc::clone(&self.shared),
            deltas,
            generation: current.generation,
            _task: Arc::clone(&self._task),
        }
    }

    /// Whether it follows, now and on every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<TableState> {
        self.shared.state.subscribe()
    }

    /// Waits until the table is as wanted; `None` when the deadline passes first. Cancel-safe.
    pub async fn wait_for(
        &self,
        deadline: Deadline,
        wanted: impl Fn(&Snapshot<T>) -> bool,
    ) -> Option<Arc<Snapshot<T>>> {
        let mut generation = self.shared.generation.subscribe();
        deadline
            .bound(async {
                loop {
                    generation.mark_unchanged();
                    let snapshot = self.snapshot();
                    if wanted(&snapshot) {
                        return Some(snapshot);
                    }
                    generation.changed().await.ok()?;
                }
            })
            .await?
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), _task: Arc::clone(&self._task) }
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("generation", &self.shared.current.read().generation)
            .finish_non_exhaustive()
    }
}

// === impl Subscription ===

impl<T: Record> Subscription<T> {
    /// The next change. Cancel-safe.
    pub async fn next(&mut self) -> Update<T> {
        match self.deltas.recv().await {
            Ok(delta) => {
                self.generation = delta.generation;
                Update::Delta(delta)
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {
                // From the end on: the snapshot has the rest. Nothing is sent while the lock is held.
                let current = self.shared.current.read();
                self.deltas = self.deltas.resubscribe();
                self.generation = current.generation;
                Update::Behind(Arc::clone(&current))
            }
            // The sender is in `shared`, which we hold.
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

impl<T> fmt::Debug for Subscription<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl Follower ===

impl<T: Record> Follower<T> {
    async fn follow(self) {
        let mut backoff = Backoff::background();
        loop {
            let error = self.watch(&mut backoff).await;
            if let Error::Compacted { .. } = error {
                tracing::debug!(prefix = self.prefix, "reading the table anew: the history is gone");
            } else {
                tracing::debug!(prefix = self.prefix, %error, "the table doesn't follow");
                self.shared.state.send_replace(TableState::Failing(error.clone()));
            }
            // A watch that failed otherwise than by compaction can go on where it was, if the store is the same one.
            let anew = !matches!(error, Error::Unavailable { .. });
            loop {
                tokio::time::sleep(backoff.pause()).await;
                if !anew {
                    break;
                }
                match self.read(Deadline::after(self.settings.call_timeout)).await {
                    Ok(()) => break,
                    Err(error) => drop(self.shared.state.send_replace(TableState::Failing(error))),
                }
            }
        }
    }

    /// Follows from the current revision until something goes wrong.
    async fn watch(&self, backoff: &mut Backoff) -> Error {
        let from = self.shared.current.read().revision.next();
        let deadline = Deadline::after(self.settings.call_timeout);
        let mut watch = match self.store.watch(&self.prefix, from, deadline).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        self.shared.state.send_if_modified(|state| {
            let failing = *state != TableState::Following;
            *state = TableState::Following;
            failing
        });
        while let Some(changes) = watch.next().await {
            match changes {
                Ok(changes) => self.apply(changes, 0),
                Err(error) => return error,
            }
            let rows = self.shared.current.read().rows.len();
            if rows > self.settings.rows_max {
                let what = format!("the table `{}`", self.prefix);
                return Error::TooLarge { what, size: Some(rows), limit: self.settings.rows_max };
            }
            backoff.reset();
        }
        Error::unavailable("the watch ended")
    }

    /// Reads everything, and applies what is different.
    async fn read(&self, deadline: Deadline) -> Result<(), Error> {
        let (revision, entries) = self.store.list_all(&self.prefix, self.settings.rows_max, deadline).await?;
        let current = Arc::clone(&self.shared.current.read());
        let listed: BTreeMap<&str, &Entry> =
            entries.iter().filter_map(|entry| Some((self.id(&entry.key)?, entry))).collect();
        let known = current.rows.keys().chain(current.bad.keys());
        let mut events: Vec<Event> = known
            .filter(|id| !listed.contains_key(&***id))
            .map(|id| Event::Delete { key: [self.prefix.as_str(), id].concat().into() })
            .collect();
        let same = |id: &str, entry: &Entry| {
            current.rows.get(id).is_some_and(|row| row.modified == entry.modified)
                || current.bad.get(id).is_some_and(|bad| bad.modified == entry.modified)
        };
        events.extend(
            listed.iter().filter(|(id, e)| !same(id, e)).map(|(_, entry)| Event::Put((*entry).clone())),
        );
        // The first reading isn't one anew: there is no revision before it.
        let anew = u64::from(current.revision != Revision(0));
        drop(current);
        self.apply(Changes { revision, events }, anew);
        Ok(())
    }

    fn id<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.prefix)
    }

    fn apply(&self, changes: Changes, resyncs: u64) {
        let Changes { revision, events } = changes;
        let mut current = self.shared.current.write();
        // Copied only while somebody holds a snapshot.
        let table = Arc::make_mut(&mut current);
        let mut applied = Vec::new();
        let mut touched = false;
        for event in events {
            let Some(id) = self.id(event.key()).map(Arc::<str>::from) else { continue };
            touched = true;
            match event {
                Event::Put(entry) => match Versioned::decode(&entry.value) {
                    Ok(record) => {
                        let Entry { created, modified, lease, .. } = entry;
                        let row = Arc::new(Row { record, created, modified, lease });
                        table.bad.remove(&id);
                        let before = table.rows.insert(Arc::clone(&id), Arc::clone(&row));
                        applied.push(Change::Put { id, row, before });
                    }
                    Err(error) => {
                        tracing::warn!(key = &*entry.key, %error, "a record that can't be read");
                        let before = table.rows.remove(&id);
                        table.bad.insert(Arc::clone(&id), Bad { error, modified: entry.modified });
                        applied.extend(before.map(|before| Change::Removed { id, before }));
                    }
                },
                Event::Delete { .. } => {
                    table.bad.remove(&id);
                    let before = table.rows.remove(&id);
                    applied.extend(before.map(|before| Change::Removed { id, before }));
                }
            }
        }
        table.revision = table.revision.max(revision);
        table.resyncs += resyncs;
        if !touched {
            return;
        }
        table.generation += 1;
        let generation = table.generation;
        if !applied.is_empty() {
            // Without subscribers there is nobody to tell.
            self.shared.deltas.send(Arc::new(Delta { generation, revision, changes: applied })).ok();
        }
        drop(current);
        self.shared.generation.send_replace(generation);
    }
}
