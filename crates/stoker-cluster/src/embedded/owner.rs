//! The writing side: takes what waits, does all of it in one write to the disk, then answers.

use std::{fs::File, sync::Arc, time::Duration};

use redb::{Database, ReadableTable as _, Table};
use tokio::sync::{mpsc, oneshot};

use super::{
    file::{self, KV, META, REVISION},
    leases::Leases,
    log::Log,
};
use crate::{Changes, Clock, Committed, Deadline, Entry, Error, Event, Lease, LeaseId, Revision, Txn, Write};

/// Most requests that share one write to the disk.
const BATCH_MAX: usize = 256;

type Answer<T> = oneshot::Sender<Result<T, Error>>;
/// Tells whoever asked: what was worked out, or the error that the whole batch met.
type Reply = Box<dyn FnOnce(Option<&Error>) + Send>;
type Kv<'a> = Table<'a, &'static str, &'static [u8]>;

#[derive(Debug)]
pub(super) enum Command {
    Commit { txn: Txn, answer: Answer<Committed> },
    Grant { ttl: Duration, answer: Answer<Lease> },
    KeepAlive { lease: LeaseId, answer: Answer<Duration> },
    Revoke { lease: LeaseId, answer: Answer<()> },
    Close { answer: oneshot::Sender<()> },
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) deadline: Deadline,
}

/// What the owning task has. It moves to a blocking thread for each batch and back.
#[derive(Debug)]
pub(super) struct Owner {
    database: Arc<Database>,
    log: Arc<Log>,
    revision: Revision,
    leases: Leases,
    clock: Arc<dyn Clock>,
    /// The error after which nothing more is written.
    broken: Option<Error>,
    /// Held until the file is closed.
    lock: File,
}

/// What a batch has come to so far.
#[derive(Default)]
struct Batch {
    changes: Vec<Changes>,
    replies: Vec<Reply>,
}

/// Serves requests and expires leases until every handle is gone, or one closes the store.
pub(super) async fn run(mut owner: Owner, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::new();
    loop {
        let expiry = owner.leases.next_expiry().filter(|_| owner.broken.is_none());
        let expiry = async {
            match expiry {
                Some(at) => owner.clock.sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            count = requests.recv_many(&mut waiting, BATCH_MAX) => if count == 0 { return },
            () = expiry => {}
        }
        let mut batch = std::mem::take(&mut waiting);
        let close = batch.iter().position(|request| matches!(request.command, Command::Close { .. }));
        let close = close.and_then(|at| batch.drain(at..).next());
        let worked = tokio::task::spawn_blocking(move || {
            owner.work(batch);
            owner
        });
        owner = match worked.await {
            Ok(owner) => owner,
            // Whoever waits learns that the answer is lost, whoever comes later that the store is closed.
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(%error, "the cluster store's file is damaged");
                }
                return;
            }
        };
        if let Some(Request { command: Command::Close { answer }, .. }) = close {
            requests.close();
            tokio::task::spawn_blocking(move || drop(owner)).await.ok();
            // Nobody waiting for the end is fine.
            answer.send(()).ok();
            return;
        }
    }
}

impl Owner {
    pub(super) fn new(
        database: Arc<Database>,
        log: Arc<Log>,
        revision: Revision,
        lock: File,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { database, log, revision, leases: Leases::default(), clock, broken: None, lock }
    }

    /// Does a batch and answers it.
    fn work(&mut self, requests: Vec<Request>) {
        let mut batch = Batch::default();
        if self.broken.is_none() {
            if let Err(error) = self.write(requests, &mut batch) {
                tracing::error!(%error, lock = ?self.lock, "the cluster store's file failed");
                self.broken = Some(error);
            }
        } else {
            batch.replies = requests.into_iter().map(|request| refuse(request.command)).collect();
        }
        if self.broken.is_none() {
            self.log.append(std::mem::take(&mut batch.changes));
        }
        for reply in batch.replies {
            reply(self.broken.as_ref());
        }
    }

    fn write(&mut self, requests: Vec<Request>, batch: &mut Batch) -> Result<(), Error> {
        let now = self.clock.now();
        let expired = self.leases.expired(now);
        let writes =
            |request: &Request| matches!(request.command, Command::Commit { .. } | Command::Revoke { .. });
        if expired.is_empty() && !requests.iter().any(writes) {
            requests.into_iter().try_for_each(|request| self.request(request, None, batch))?;
            return Ok(());
        }
        let mut requests = requests.into_iter();
        // Whoever is left when the disk fails is told so.
        let result = self.write_in(&mut requests, expired, batch);
        batch.replies.extend(requests.map(|request| refuse(request.command)));
        result
    }

    fn write_in(
        &mut self,
        requests: &mut impl Iterator<Item = Request>,
        expired: Vec<LeaseId>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let txn = self.database.begin_write().map_err(|error| file::failed(error.into()))?;
        let before = self.revision;
        {
            let mut kv = txn.open_table(KV).map_err(|error| file::failed(error.into()))?;
            for lease in expired {
                self.end_lease(lease, &mut kv, batch)?;
            }
            for request in requests {
                self.request(request, Some(&mut kv), batch)?;
            }
        }
        if self.revision == before {
            return txn.abort().map_err(|error| file::failed(error.into()));
        }
        {
            let mut meta = txn.open_table(META).map_err(|error| file::failed(error.into()))?;
            meta.insert(REVISION, self.revision.0).map_err(|error| file::failed(error.into()))?;
        }
        txn.commit().map_err(|error| file::failed(error.into()))
    }

    fn request(&mut self, request: Request, kv: Option<&mut Kv<'_>>, batch: &mut Batch) -> Result<(), Error> {
        let Request { command, deadline } = request;
        let late = deadline.passed().then(|| Error::unavailable("the deadline passed before its turn came"));
        let now = self.clock.now();
        match (command, kv) {
            (Command::Commit { txn, answer }, Some(kv)) => {
                let result = match late {
                    Some(late) => Err(late),
                    None => self.commit(&txn, kv, batch)?,
                };
                batch.replies.push(reply(answer, result));
            }
            (Command::Revoke { lease, answer }, Some(kv)) => {
                let result = match late {
                    Some(late) => Err(late),
                    None => Ok(self.end_lease(lease, kv, batch)?),
                };
                batch.replies.push(reply(answer, result));
            }
            (Command::Grant { ttl, answer }, _) => {
                let result = late.map_or_else(|| Ok(self.leases.grant(ttl, now)), Err);
                batch.replies.push(reply(answer, result));
            }
            (Command::KeepAlive { lease, answer }, _) => {
                let result = late.map_or_else(|| self.leases.keep_alive(lease, now), Err);
                batch.replies.push(reply(answer, result));
            }
            (command @ (Command::Commit { .. } | Command::Revoke { .. } | Command::Close { .. }), _) => {
                unreachable!("{command:?} without a table or after the end")
            }
        }
        Ok(())
    }

    /// The outer error is the file's, the inner one the request's own.
    fn commit(
        &mut self,
        txn: &Txn,
        kv: &mut Kv<'_>,
        batch: &mut Batch,
    ) -> Result<Result<Committed, Error>, Error> {
        let Txn { compares, writes } = txn;
        for compare in compares {
            let found = read(kv, &compare.key)?.map(|entry| (entry.created, entry.modified));
            if !compare.expect.holds(found) {
                let (key, expected) = (compare.key.clone(), compare.expect);
                return Ok(Err(Error::Conflict { key, expected, found }));
            }
        }
        for write in writes {
            if let Write::Put { lease: Some(lease), .. } = write
                && !self.leases.contains(*lease)
            {
                return Ok(Err(Error::LeaseGone { lease: *lease }));
            }
        }
        let next = self.revision.next();
        let mut events = Vec::new();
        let mut deleted = 0;
        for write in writes {
            let before = read(kv, write.key())?;
            let lease_before = before.as_ref().and_then(|entry| entry.lease);
            match write {
                Write::Put { key, value, lease } => {
                    let created = before.map_or(next, |entry| entry.created);
                    let key: Arc<str> = key.as_str().into();
                    let entry = Entry {
                        key: Arc::clone(&key),
                        value: value.clone(),
                        created,
                        modified: next,
                        lease: *lease,
                    };
                    kv.insert(&*key, file::encode(&entry).as_slice())
                        .map_err(|error| file::failed(error.into()))?;
                    self.leases.attach(&key, lease_before, *lease);
                    events.push(Event::Put(entry));
                }
                Write::Delete { key } => {
                    if let Some(event) = file::remove(kv, key)? {
                        self.leases.attach(event.key(), lease_before, None);
                        events.push(event);
                        deleted += 1;
                    }
                }
            }
        }
        self.note(events, batch);
        Ok(Ok(Committed { revision: self.revision, deleted }))
    }

    fn end_lease(&mut self, lease: LeaseId, kv: &mut Kv<'_>, batch: &mut Batch) -> Result<(), Error> {
        let mut events = Vec::new();
        for key in self.leases.end(lease) {
            events.extend(file::remove(kv, &key)?);
        }
        self.note(events, batch);
        Ok(())
    }

    /// One revision more, if something changed.
    fn note(&mut self, events: Vec<Event>, batch: &mut Batch) {
        if !events.is_empty() {
            self.revision = self.revision.next();
            batch.changes.push(Changes { revision: self.revision, events });
        }
    }
}

fn read(kv: &Kv<'_>, key: &str) -> Result<Option<Entry>, Error> {
    let value = kv.get(key).map_err(|error| file::failed(error.into()))?;
    value.map(|value| file::decode(key, value.value())).transpose()
}

/// Answers with the result, unless the batch failed: then a write that would have happened has an unknown outcome.
fn reply<T: Send + 'static>(answer: Answer<T>, result: Result<T, Error>) -> Reply {
    Box::new(move |failed| {
        let result = match (result, failed) {
            (Ok(_), Some(error)) => Err(Error::unknown(error.to_string())),
            (result, _) => result,
        };
        // Whoever asked may have given up.
        answer.send(result).ok();
    })
}

/// Answers with the error that broke the store.
fn refuse(command: Command) -> Reply {
    fn with<T: Send + 'static>(answer: Answer<T>) -> Reply {
        Box::new(move |failed| {
            let error = failed.cloned().unwrap_or_else(|| Error::unavailable("the store is closed"));
            answer.send(Err(error)).ok();
        })
    }
    match command {
        Command::Commit { answer, .. } => with(answer),
        Command::Grant { answer, .. } => with(answer),
        Command::KeepAlive { answer, .. } => with(answer),
        Command::Revoke { answer, .. } => with(answer),
        Command::Close { answer } => Box::new(move |_| {
            answer.send(()).ok();
        }),
    }
}
