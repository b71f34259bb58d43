//! One leader at a time, with a number that makes the orders of former ones recognisable.
//!
//! The leader is whoever has the leader key, under a lease. The revision that created the key is the term's **epoch**: it
//! grows from term to term, over the whole cluster, and everything that a leader orders or writes carries it. What was
//! sent in an earlier term is refused by comparing numbers, or by the store through [`Term::fence`].

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use stoker_types::Epoch;
use tokio::{sync::watch, task::AbortHandle};

use crate::{
    ClusterStore, ClusterStoreExt as _, Compare, Deadline, Entry, Error, Event, Expect, HeldLease,
    LeaseSettings, Revision, Row, Table, TableSettings, Txn, Versioned, keys::LEADER, records::LeaderRecord,
    retry::Backoff,
};

/// Elections over one store.
#[derive(Debug, Clone)]
pub struct Election {
    store: Arc<dyn ClusterStore>,
    lease: LeaseSettings,
}

/// Who leads.
#[derive(Debug, Clone, PartialEq)]
pub struct Leader {
    /// The term.
    pub epoch: Epoch,
    /// Who it is.
    pub record: LeaderRecord,
}

/// Follows who leads.
#[derive(Debug, Clone)]
pub struct LeaderView(Table<LeaderRecord>);

/// Being the leader. Ends by [`Term::resign`], by dropping it, or when it is [lost](Term::lost).
#[derive(Debug)]
pub struct Term {
    epoch: Epoch,
    lease: HeldLease,
    deposed: watch::Receiver<bool>,
    watching: Watching,
}

/// The task that watches the leader key; ends with the term.
#[derive(Debug)]
struct Watching(AbortHandle);

/// What one try to become leader came to.
enum Try {
    Elected(Epoch),
    /// Somebody else leads, as of then.
    Taken(Revision),
    /// Again, after a pause.
    Again,
    /// With a new lease.
    LeaseGone,
}

// === impl Election ===

impl Election {
    /// Elections with leases as in `lease`, usually [`LeaseSettings::leader`].
    #[must_use]
    pub fn new(store: Arc<dyn ClusterStore>, lease: LeaseSettings) -> Self {
        Self { store, lease }
    }

    /// Waits until `me` leads, however long that takes. Cancel-safe: a candidacy that is dropped leaves no leader behind
    /// for longer than a lease.
    ///
    /// # Errors
    /// Only what trying again doesn't mend: [`Error::Refused`], [`Error::Full`] and the like.
    pub async fn campaign(&self, me: &LeaderRecord) -> Result<Term, Error> {
        let record = Versioned::new(me.clone());
        let value = record.encode().map_err(|error| Error::Invalid { reason: error.to_string() })?;
        let mut backoff = Backoff::background();
        loop {
            let lease = match HeldLease::grant(&self.store, &self.lease, self.call()).await {
                Ok(lease) => lease,
                Err(error) => {
                    self.or_fatal(error)?;
                    tokio::time::sleep(backoff.pause()).await;
                    continue;
                }
            };
            while lease.is_held() {
                match self.stand(&lease, &value).await? {
                    // Lost again before we knew: the keeper revokes it.
                    Try::Elected(_) if !lease.is_held() => break,
                    Try::Elected(epoch) => return Ok(self.term(epoch, lease)),
                    Try::Taken(now) => {
                        let vacant = tokio::select! {
                            vacant = self.vacant(now.next()) => vacant,
                            () = lease.lost() => break,
                        };
                        if vacant {
                            backoff.reset();
                        } else {
                            tokio::time::sleep(backoff.pause()).await;
                        }
                    }
                    Try::Again => tokio::time::sleep(backoff.pause()).await,
                    Try::LeaseGone => break,
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Follows who leads.
    ///
    /// # Errors
    /// As [`Table::open`].
    pub async fn observe(&self, deadline: Deadline) -> Result<LeaderView, Error> {
        let settings = TableSettings::default();
        Table::open(Arc::clone(&self.store), LEADER, settings, deadline).await.map(LeaderView)
    }

    /// One try. Whether a write whose answer was lost has happened is told by the lease on the key: it is ours alone.
    async fn stand(&self, lease: &HeldLease, value: &bytes::Bytes) -> Result<Try, Error> {
        let txn = Txn::new().expect(LEADER, Expect::Absent).put_leased(LEADER, value.clone(), lease.id());
        match self.store.commit(txn, self.call()).await {
            Ok(committed) => return Ok(Try::Elected(Epoch(committed.revision.0))),
            Err(Error::Conflict { .. } | Error::UnknownOutcome { .. }) => {}
            Err(Error::LeaseGone { .. }) => return Ok(Try::LeaseGone),
            Err(error) => {
                self.or_fatal(error)?;
                return Ok(Try::Again);
            }
        }
        match self.store.get_at(LEADER, self.call()).await {
            Ok((_, Some(Entry { lease: Some(holder), created, .. }))) if holder == lease.id() => {
                Ok(Try::Elected(Epoch(created.0)))
            }
            Ok((now, Some(_))) => Ok(Try::Taken(now)),
            Ok((_, None)) => Ok(Try::Again),
            Err(error) => {
                self.or_fatal(error)?;
                Ok(Try::Again)
            }
        }
    }

    /// Until nobody leads, or nobody knows: then false.
    async fn vacant(&self, from: Revision) -> bool {
        let Ok(mut changes) = self.store.watch(LEADER, from, self.call()).await else { return false };
        while let Some(Ok(changes)) = changes.next().await {
            if changes.events.iter().any(|event| matches!(event, Event::Delete { key } if **key == *LEADER)) {
                return true;
            }
        }
        false
    }

    fn term(&self, epoch: Epoch, lease: HeldLease) -> Term {
        let (deposed, deposed_receiver) = watch::channel(false);
        let store = Arc::clone(&self.store);
        let timeout = self.lease.ttl;
        let watching = tokio::spawn(async move {
            guard(&store, epoch, timeout).await;
            deposed.send_replace(true);
        });
        tracing::info!(%epoch, "leading");
        let watching = Watching(watching.abort_handle());
        Term { epoch, lease, deposed: deposed_receiver, watching }
    }

    fn call(&self) -> Deadline {
        Deadline::after(self.lease.ttl)
    }

    fn or_fatal(&self, error: Error) -> Result<(), Error> {
        match error {
            Error::Unavailable { .. } | Error::UnknownOutcome { .. } | Error::Compacted { .. } => {
                tracing::debug!(%error, lease = ?self.lease.ttl, "candidacy waits");
                Ok(())
            }
            error => Err(error),
        }
    }
}

/// Until the leader key isn't that of `epoch` any more. While the store is away nothing is known; the lease decides then.
async fn guard(store: &Arc<dyn ClusterStore>, epoch: Epoch, timeout: Duration) {
    let mut from = Revision(epoch.0).next();
    let mut backoff = Backoff::background();
    loop {
        if let Ok(mut changes) = store.watch(LEADER, from, Deadline::after(timeout)).await {
            while let Some(Ok(changes)) = changes.next().await {
                if changes.events.iter().any(|event| **event.key() == *LEADER) {
                    return;
                }
                from = changes.revision.next();
                backoff.reset();
            }
        }
        tokio::time::sleep(backoff.pause()).await;
        // Of the time that a watch may have missed, the key itself tells.
        match store.get_at(LEADER, Deadline::after(timeout)).await {
            Ok((now, Some(entry))) if entry.created.0 == epoch.0 => from = now.next(),
            Ok(_) => return,
            Err(error) => tracing::debug!(%error, "the leader key can't be read"),
        }
    }
}

// === impl Term ===

impl Term {
    /// Its number: higher than that of any term before.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether we lead, now. While this is true nobody else does, as far as clocks run alike.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.lease.is_held() && !*self.deposed.borrow()
    }

    /// Ends when we don't lead any more: before anybody else can. Cancel-safe.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        let (lease, mut deposed) = (self.lease.lost(), self.deposed.clone());
        async move {
            tokio::select! {
                () = lease => {}
                // A sender that is gone belongs to a term that is.
                _ = deposed.wait_for(|deposed| *deposed) => {}
            }
        }
    }

    /// A comparison that holds only in this term. Part of every transaction that a leader writes.
    #[must_use]
    pub fn fence(&self) -> Compare {
        Compare { key: LEADER.to_owned(), expect: Expect::Created(Revision(self.epoch.0)) }
    }

    /// Stops leading: the next one can begin when this returns.
    ///
    /// # Errors
    /// As [`ClusterStore::revoke`]; then the next one has to wait for the lease to end.
    pub async fn resign(self, deadline: Deadline) -> Result<(), Error> {
        let Self { epoch, lease, deposed: _, watching: _watching } = self;
        tracing::info!(%epoch, "resigning");
        lease.release(deadline).await
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl LeaderView ===

impl LeaderView {
    /// Who leads, as far as known.
    #[must_use]
    pub fn current(&self) -> Option<Leader> {
        self.0.get("").map(|row| leader(&row))
    }

    /// Waits for a leader of a term after `epoch`; `None` when the deadline passes first. Cancel-safe.
    pub async fn after(&self, epoch: Epoch, deadline: Deadline) -> Option<Leader> {
        let newer = |row: &Arc<Row<LeaderRecord>>| row.created.0 > epoch.0;
        let found = self.0.wait_for(deadline, |table| table.rows.get("").is_some_and(newer)).await?;
        found.rows.get("").map(|row| leader(row))
    }

    /// The table behind it: its only row has the empty id.
    #[must_use]
    pub const fn table(&self) -> &Table<LeaderRecord> {
        &self.0
    }
}

fn leader(row: &Row<LeaderRecord>) -> Leader {
    Leader { epoch: Epoch(row.created.0), record: row.record.record.clone() }
}
