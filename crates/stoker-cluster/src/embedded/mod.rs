//! The store of one machine: one file, one process, as many handles as it likes.
//!
//! A task owns the file's writing side. Requests that come while a write is on its way to the disk wait and share the
//! next one: each its own transaction with its own revision, one sync for all. Reading needs no turn.

mod file;
mod leases;
mod log;
mod owner;

use std::{path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use parking_lot::RwLock;
use redb::Database;
use tokio::sync::{mpsc, oneshot};

pub use self::file::OpenError;
use self::{
    log::Log,
    owner::{Command, Owner, Request},
};
use crate::{
    Clock, ClusterStore, Committed, Deadline, Entry, Error, Lease, LeaseId, Listing, Revision, TokioClock,
    Txn, Watch, limits,
    store::{check_key, check_prefix, check_ttl},
};

/// Requests that may wait for the owner.
const QUEUE: usize = 1_024;

/// How an embedded store is kept.
#[derive(Debug, Clone)]
pub struct EmbeddedSettings {
    /// The clock of its leases.
    pub clock: Arc<dyn Clock>,
    /// Most changes that the history keeps for watches.
    pub history_events_max: usize,
    /// Most bytes of keys and values in it.
    pub history_bytes_max: usize,
}

/// A handle on an embedded store. The file is closed when the last one is dropped, or by [`Embedded::close`].
///
/// Durable: an answered write survives a crash of process or machine. Leases don't outlive the process: those who held
/// them were in it, so their keys are gone when the file is opened again. History doesn't either.
#[derive(Debug, Clone)]
pub struct Embedded {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Shared {
    /// Taken out when the store is closed.
    database: RwLock<Option<Arc<Database>>>,
    log: Arc<Log>,
}

impl Default for EmbeddedSettings {
    fn default() -> Self {
        Self { clock: Arc::new(TokioClock), history_events_max: 16_384, history_bytes_max: 16 * 1024 * 1024 }
    }
}

// === impl Embedded ===

impl Embedded {
    /// Opens the file at `path`, or makes it. Beside it lies `path.lock`. Blocks for some milliseconds, longer after a
    /// crash. To be called in a Tokio runtime.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, settings: EmbeddedSettings) -> Result<Self, OpenError> {
        let EmbeddedSettings { clock, history_events_max, history_bytes_max } = settings;
        let file = file::open(path)?;
        let log = Arc::new(Log::new(file.revision, history_events_max, history_bytes_max));
        let database = Arc::new(file.database);
        let (requests, receiver) = mpsc::channel(QUEUE);
        let owner = Owner::new(Arc::clone(&database), Arc::clone(&log), file.revision, file.lock, clock);
        tokio::spawn(owner::run(owner, receiver));
        Ok(Self { shared: Arc::new(Shared { database: RwLock::new(Some(database)), log }), requests })
    }

    /// Closes the file for all handles: what waits is finished first. Later calls find the store unavailable.
    pub async fn close(self) {
        let database = self.shared.database.write().take();
        // Whoever drops the last one writes to the disk.
        tokio::task::spawn_blocking(move || drop(database)).await.ok();
        let (answer, closed) = oneshot::channel();
        let request = Request {
            command: Command::Close { answer },
            deadline: Deadline::after(Duration::from_hours(24)),
        };
        if self.requests.send(request).await.is_ok() {
            // An owner that is gone already has closed it.
            closed.await.ok();
        }
    }

    /// Has the owner do something. `writes`: what is lost after it was sent may have happened.
    async fn ask<T>(
        &self,
        deadline: Deadline,
        writes: bool,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let request = Request { command: command(answer), deadline };
        match deadline.bound(self.requests.send(request)).await {
            Some(Ok(())) => {}
            Some(Err(_)) => return Err(Error::unavailable("the store is closed")),
            None => return Err(Error::unavailable(format!("{QUEUE} requests are waiting"))),
        }
        let lost = |reason: &str| if writes { Error::unknown(reason) } else { Error::unavailable(reason) };
        match deadline.bound(answered).await {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(lost("the store was closed meanwhile")),
            None => Err(lost("the disk took longer than the deadline")),
        }
    }

    /// Reads on a thread that may block.
    async fn read<T: Send + 'static>(
        &self,
        deadline: Deadline,
        read: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let database = self.shared.database.read().clone();
        let Some(database) = database else { return Err(Error::unavailable("the store is closed")) };
        read_blocking(deadline, move || read(&database)).await
    }
}

async fn read_blocking<T: Send + 'static>(
    deadline: Deadline,
    read: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match deadline.bound(tokio::task::spawn_blocking(read)).await {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(Error::Storage { reason: error.to_string() }),
        None => Err(Error::unavailable("the disk took longer than the deadline")),
    }
}

#[async_trait]
impl ClusterStore for Embedded {
    async fn get(&self, key: &str, deadline: Deadline) -> Result<Option<Entry>, Error> {
        check_key(key)?;
        let key = key.to_owned();
        self.read(deadline, move |database| file::get(database, &key)).await
    }

    async fn commit(&self, txn: Txn, deadline: Deadline) -> Result<Committed, Error> {
        txn.check()?;
        self.ask(deadline, true, |answer| Command::Commit { txn, answer }).await
    }

    async fn list(&self, prefix: &str, page_max: usize, deadline: Deadline) -> Result<Listing, Error> {
        check_prefix(prefix)?;
        let page_max = page_max.clamp(1, limits::PAGE_MAX);
        let (revision, table) = self.read(deadline, file::snapshot).await?;
        let pages = stream::try_unfold(
            (Arc::new(table), prefix.to_owned(), None::<Arc<str>>, false),
            move |(table, prefix, after, done)| async move {
                if done {
                    return Ok(None);
                }
                let (read, under, from) = (Arc::clone(&table), prefix.clone(), after.clone());
                let page =
                    read_blocking(deadline, move || file::page(&read, &under, from.as_deref(), page_max))
                        .await?;
                let Some(last) = page.last() else { return Ok(None) };
                let (last, done) = (Arc::clone(&last.key), page.len() < page_max);
                Ok(Some((page, (table, prefix, Some(last), done))))
            },
        );
        Ok(Listing { revision, pages: pages.boxed() })
    }

    async fn watch(&self, prefix: &str, from: Revision, _deadline: Deadline) -> Result<Watch, Error> {
        check_prefix(prefix)?;
        if self.shared.database.read().is_none() {
            return Err(Error::unavailable("the store is closed"));
        }
        self.shared.log.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration, deadline: Deadline) -> Result<Lease, Error> {
        check_ttl(ttl)?;
        self.ask(deadline, true, |answer| Command::Grant { ttl, answer }).await
    }

    async fn keep_alive(&self, lease: LeaseId, deadline: Deadline) -> Result<Duration, Error> {
        self.ask(deadline, false, |answer| Command::KeepAlive { lease, answer }).await
    }

    async fn revoke(&self, lease: LeaseId, deadline: Deadline) -> Result<(), Error> {
        self.ask(deadline, true, |answer| Command::Revoke { lease, answer }).await
    }

    async fn compact(&self, before: Revision, _deadline: Deadline) -> Result<(), Error> {
        self.shared.log.compact(before)
    }
}
