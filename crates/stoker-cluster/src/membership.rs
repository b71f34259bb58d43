//! Which nodes are there: each has a record under a lease of its own.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use stoker_types::NodeId;
use tokio::sync::{oneshot, watch};

use crate::{
    ClusterStore, ClusterStoreExt as _, Deadline, Error, Expect, HeldLease, LeaseSettings, RecordError,
    Revision, Row, Snapshot, Subscription, Table, TableSettings, Txn, Update, Versioned, Watch,
    keys::{self, NODES},
    records::NodeRecord,
    retry::Backoff,
    table::Change,
};

/// Low bits of an incarnation that are random; the others are a revision's.
const RANDOM_BITS: u32 = 20;

/// How long after a watch has failed a member looks at its record.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The nodes of a cluster.
#[derive(Debug, Clone)]
pub struct Membership {
    store: Arc<dyn ClusterStore>,
    lease: LeaseSettings,
}

/// Being a member: the record stays in the store, through outages too. Dropping it leaves.
#[derive(Debug)]
pub struct Member {
    record: watch::Sender<NodeRecord>,
    state: watch::Receiver<MemberState>,
    incarnation: u64,
    /// Ends the task when dropped; with a sender to answer when the record is gone.
    leave: Option<oneshot::Sender<Leave>>,
}

/// How a member is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberState {
    /// Not in the store at the moment; goes on trying.
    Joining,
    /// In the store, as written at this revision.
    Joined(Revision),
    /// Another process has joined under the same name, later than this one, which stays out.
    Displaced {
        /// The other's life.
        incarnation: u64,
    },
    /// The store doesn't let it in.
    Failed(Error),
}

/// Why a node couldn't join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] Error),
    /// The record can't be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Two processes use one name.
    #[error("another process joined as `{node}` meanwhile: give each node a name of its own")]
    Displaced {
        /// The name.
        node: NodeId,
    },
}

/// A change of membership.
#[derive(Debug, Clone, PartialEq)]
pub enum MembershipEvent {
    /// A node is there. One that restarts leaves and joins.
    Joined {
        /// Which.
        node: NodeId,
        /// Its record.
        row: Arc<Row<NodeRecord>>,
    },
    /// A node has left, or its lease has expired. That doesn't mean that it is dead.
    Left {
        /// Which.
        node: NodeId,
        /// Its last record.
        row: Arc<Row<NodeRecord>>,
    },
    /// A node has changed its record.
    Changed {
        /// Which.
        node: NodeId,
        /// Its record now.
        row: Arc<Row<NodeRecord>>,
    },
}

/// Changes of membership, beginning with a [`MembershipEvent::Joined`] for each node that is there already.
#[derive(Debug)]
pub struct MembershipEvents {
    subscription: Subscription<NodeRecord>,
    known: BTreeMap<Arc<str>, Arc<Row<NodeRecord>>>,
    ready: VecDeque<MembershipEvent>,
}

#[derive(Debug)]
struct Leave {
    deadline: Deadline,
    done: oneshot::Sender<Result<(), Error>>,
}

/// The task that keeps a member's record in the store.
struct Keeper {
    store: Arc<dyn ClusterStore>,
    lease: LeaseSettings,
    node: NodeId,
    key: String,
    incarnation: u64,
    record: watch::Receiver<NodeRecord>,
    state: watch::Sender<MemberState>,
}

/// Why keeping has ended.
enum End {
    Displaced(u64),
    Failed(Error),
}

// === impl Membership ===

impl Membership {
    /// Membership with leases as in `lease`, usually [`LeaseSettings::node`].
    #[must_use]
    pub fn new(store: Arc<dyn ClusterStore>, lease: LeaseSettings) -> Self {
        Self { store, lease }
    }

    /// Joins as `node`, in the place of an earlier process of that name. Returns when the record is in the store.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub async fn join(
        &self,
        node: &NodeId,
        record: NodeRecord,
        deadline: Deadline,
    ) -> Result<Member, JoinError> {
        let incarnation = self.incarnation(&keys::node(node), deadline).await?;
        let record = NodeRecord { incarnation, ..record };
        Versioned::new(record.clone()).encode()?;
        let (record, record_receiver) = watch::channel(record);
        let (state, mut state_receiver) = watch::channel(MemberState::Joining);
        let (leave, left) = oneshot::channel();
        let keeper = Keeper {
            store: Arc::clone(&self.store),
            lease: self.lease.clone(),
            node: node.clone(),
            key: keys::node(node),
            incarnation,
            record: record_receiver,
            state,
        };
        tokio::spawn(keeper.run(left));
        let settled = deadline.bound(state_receiver.wait_for(|state| *state != MemberState::Joining)).await;
        match settled.and_then(Result::ok).map(|state| state.clone()) {
            Some(MemberState::Failed(error)) => return Err(error.into()),
            Some(MemberState::Displaced { .. }) => return Err(JoinError::Displaced { node: node.clone() }),
            Some(MemberState::Joined(_)) => {}
            Some(MemberState::Joining) | None => {
                return Err(Error::unavailable("joining took longer than the deadline").into());
            }
        }
        Ok(Member { record, state: state_receiver, incarnation, leave: Some(leave) })
    }

    /// A number for this life of a node, higher than that of all earlier ones: the store's revision, which any earlier
    /// one's record has raised, and random bits against another that asks at the same moment.
    async fn incarnation(&self, key: &str, deadline: Deadline) -> Result<u64, Error> {
        let mut backoff = Backoff::background();
        loop {
            match self.store.list(key, 1, deadline).await {
                Ok(listing) => {
                    return Ok((listing.revision.0 << RANDOM_BITS) | rand::random_range(0..1 << RANDOM_BITS));
                }
                Err(error) if transient(&error) => {
                    deadline.bound(tokio::time::sleep(backoff.pause())).await.ok_or(error)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The nodes as a table.
    ///
    /// # Errors
    /// As [`Table::open`].
    pub async fn table(&self, deadline: Deadline) -> Result<Table<NodeRecord>, Error> {
        Table::open(Arc::clone(&self.store), NODES, TableSettings::default(), deadline).await
    }

    /// The nodes as events.
    ///
    /// # Errors
    /// As [`Table::open`].
    pub async fn watch(&self, deadline: Deadline) -> Result<MembershipEvents, Error> {
        Ok(MembershipEvents::of(&self.table(deadline).await?))
    }
}

// === impl Member ===

impl Member {
    /// How it is doing, now and on every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<MemberState> {
        self.state.clone()
    }

    /// Tells this life of the node from others.
    #[must_use]
    pub const fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Changes the record: written in the background, the latest one wins.
    pub fn update(&self, record: NodeRecord) {
        self.record.send_replace(NodeRecord { incarnation: self.incarnation, ..record });
    }

    /// Leaves: the record is gone when this returns.
    ///
    /// # Errors
    /// As [`ClusterStore::revoke`]; then the record goes with its lease.
    pub async fn leave(mut self, deadline: Deadline) -> Result<(), Error> {
        let (done, gone) = oneshot::channel();
        if let Some(leave) = self.leave.take() {
            // A task that is gone has no record.
            leave.send(Leave { deadline, done }).ok();
        }
        match deadline.bound(gone).await {
            Some(Ok(result)) => result,
            Some(Err(_)) => Ok(()),
            None => Err(Error::unknown("leaving took longer than the deadline")),
        }
    }
}

// === impl Keeper ===

impl Keeper {
    async fn run(mut self, mut leave: oneshot::Receiver<Leave>) {
        let mut held = None;
        let end = tokio::select! {
            end = self.keep(&mut held) => Some(end),
            left = &mut leave => {
                if let (Ok(Leave { deadline, done }), held) = (left, held.take()) {
                    let result = match held {
                        Some(lease) => HeldLease::release(lease, deadline).await,
                        None => Ok(()),
                    };
                    // Whoever asked may have given up.
                    done.send(result).ok();
                }
                None
            }
        };
        match end {
            Some(End::Displaced(incarnation)) => {
                tracing::error!(node = %self.node, incarnation, "another process has joined under this name");
                self.state.send_replace(MemberState::Displaced { incarnation });
            }
            Some(End::Failed(error)) => {
                tracing::error!(node = %self.node, %error, "no member any more");
                self.state.send_replace(MemberState::Failed(error));
            }
            None => {}
        }
    }

    /// Keeps the record in the store until that is over. `held` is the lease, so that it can be released from outside.
    async fn keep(&mut self, held: &mut Option<HeldLease>) -> End {
        let mut backoff = Backoff::background();
        loop {
            *held = None;
            let granted = HeldLease::grant(&self.store, &self.lease, self.call()).await;
            let went = match granted {
                Ok(lease) => {
                    let lease = held.insert(lease);
                    self.under(lease, &mut backoff).await
                }
                Err(error) => Err(error),
            };
            match went {
                Ok(Some(end)) => return end,
                Ok(None) => {}
                Err(error) if transient(&error) => {
                    tracing::debug!(node = %self.node, %error, "joining again")
                }
                Err(error) => return End::Failed(error),
            }
            self.state.send_replace(MemberState::Joining);
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Writes the record under `lease`, and again when it changes, until the lease is lost.
    async fn under(&mut self, lease: &HeldLease, backoff: &mut Backoff) -> Result<Option<End>, Error> {
        let lost = lease.lost();
        tokio::pin!(lost);
        loop {
            let (modified, now) = match self.write(lease).await {
                Ok(Ok(written)) => written,
                Ok(Err(end)) => return Ok(Some(end)),
                Err(Error::LeaseGone { .. }) => return Ok(None),
                Err(error) if transient(&error) || matches!(error, Error::Conflict { .. }) => {
                    if !lease.is_held() {
                        return Ok(None);
                    }
                    tokio::time::sleep(backoff.pause()).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            backoff.reset();
            self.state.send_replace(MemberState::Joined(modified));
            let watch = self.store.watch(&self.key, now.next(), self.call()).await;
            tokio::select! {
                () = &mut lost => return Ok(None),
                // The sender is the member itself: without it, this task is told to leave.
                changed = self.record.changed() => if changed.is_err() { std::future::pending().await },
                // Whatever it was, the next write looks.
                () = touched(watch, &self.key) => {}
            }
        }
    }

    /// Writes the record where it isn't as it should be. The revision of its last write, and the one that shows it.
    async fn write(&mut self, lease: &HeldLease) -> Result<Result<(Revision, Revision), End>, Error> {
        let record = self.record.borrow_and_update().clone();
        let encode = |record: &Versioned<NodeRecord>| {
            record.encode().map_err(|error| Error::Invalid { reason: error.to_string() })
        };
        let (now, current) = self.store.get_at(&self.key, self.call()).await?;
        let (expect, value) = match current {
            None => (Expect::Absent, encode(&Versioned::new(record))?),
            Some(entry) => {
                // What can't be read is nobody's whom we would have to respect.
                let there = Versioned::<NodeRecord>::decode(&entry.value).ok();
                let value = encode(&Versioned::new(record))?;
                match there.map(|there| there.record.incarnation) {
                    Some(incarnation) if incarnation > self.incarnation => {
                        return Ok(Err(End::Displaced(incarnation)));
                    }
                    Some(_) if entry.lease == Some(lease.id()) && entry.value == value => {
                        return Ok(Ok((entry.modified, now)));
                    }
                    _ => {}
                }
                (Expect::Modified(entry.modified), value)
            }
        };
        let txn = Txn::new().expect(&self.key, expect).put_leased(&self.key, value, lease.id());
        let written = self.store.commit(txn, self.call()).await?.revision;
        Ok(Ok((written, written)))
    }

    fn call(&self) -> Deadline {
        Deadline::after(self.lease.ttl)
    }
}

/// Until somebody has touched the key, or a moment after nobody knows any more whether.
async fn touched(watch: Result<Watch, Error>, key: &str) {
    if let Ok(mut watch) = watch {
        while let Some(Ok(changes)) = watch.next().await {
            if changes.events.iter().any(|event| **event.key() == *key) {
                return;
            }
        }
    }
    tokio::time::sleep(LOOK_AGAIN).await;
}

fn transient(error: &Error) -> bool {
    matches!(error, Error::Unavailable { .. } | Error::UnknownOutcome { .. })
}

// === impl MembershipEvents ===

impl MembershipEvents {
    /// The events of a table of nodes.
    #[must_use]
    pub fn of(table: &Table<NodeRecord>) -> Self {
        let subscription = table.subscribe();
        let snapshot = Arc::clone(&subscription.snapshot);
        let mut this = Self { subscription, known: BTreeMap::new(), ready: VecDeque::new() };
        this.catch_up(&snapshot);
        this
    }

    /// The next event. Cancel-safe.
    pub async fn next(&mut self) -> MembershipEvent {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            match self.subscription.next().await {
                Update::Delta(delta) => {
                    for change in &delta.changes {
                        match change {
                            Change::Put { id, row, .. } => self.put(id, row),
                            Change::Removed { id, .. } => self.removed(id),
                        }
                    }
                }
                Update::Behind(snapshot) => self.catch_up(&snapshot),
            }
        }
    }

    fn catch_up(&mut self, snapshot: &Snapshot<NodeRecord>) {
        let gone: Vec<_> = self.known.keys().filter(|id| !snapshot.rows.contains_key(*id)).cloned().collect();
        for id in gone {
            self.removed(&id);
        }
        for (id, row) in &snapshot.rows {
            if self.known.get(id) != Some(row) {
                self.put(id, row);
            }
        }
    }

    fn put(&mut self, id: &Arc<str>, row: &Arc<Row<NodeRecord>>) {
        let Some(node) = name(id) else { return };
        let event = match self.known.get(id) {
            Some(before) if before.record.incarnation == row.record.incarnation => {
                if before.record == row.record {
                    // Written again under another lease.
                    self.known.insert(Arc::clone(id), Arc::clone(row));
                    return;
                }
                MembershipEvent::Changed { node, row: Arc::clone(row) }
            }
            Some(_) => {
                self.removed(id);
                MembershipEvent::Joined { node, row: Arc::clone(row) }
            }
            None => MembershipEvent::Joined { node, row: Arc::clone(row) },
        };
        self.known.insert(Arc::clone(id), Arc::clone(row));
        self.ready.push_back(event);
    }

    fn removed(&mut self, id: &Arc<str>) {
        if let (Some(node), Some(row)) = (name(id), self.known.remove(id)) {
            self.ready.push_back(MembershipEvent::Left { node, row });
        }
    }
}

fn name(id: &str) -> Option<NodeId> {
    NodeId::new(id)
        .inspect_err(|error| tracing::warn!(%error, "a key among the nodes that is no node's"))
        .ok()
}
