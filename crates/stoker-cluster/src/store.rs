//! The trait that every store implements, and the plain data of its calls.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};

use crate::{Deadline, Error};

/// What a store takes at most. The same for every store, so that what works on one machine works in a cluster.
pub mod limits {
    /// Longest key, in bytes.
    pub const KEY_LEN_MAX: usize = 512;
    /// Largest value, in bytes. Records are a few hundred.
    pub const VALUE_LEN_MAX: usize = 256 * 1024;
    /// Most comparisons, and most writes, of one transaction: etcd's default.
    pub const TXN_OPS_MAX: usize = 128;
    /// Most bytes of keys and values in one transaction: below etcd's 1.5 MiB for a request.
    pub const TXN_BYTES_MAX: usize = 1024 * 1024;
    /// Most entries of one page of a listing.
    pub const PAGE_MAX: usize = 1_000;
    /// Shortest and longest time of a lease, in milliseconds.
    pub const LEASE_MS: std::ops::RangeInclusive<u64> = 1..=30 * 24 * 3_600_000;
}

/// A moment in the store's history: grows by one with each transaction that changed something, over the whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

/// Names a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A lease as granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long it lives without being kept alive. A store may give more than was asked for (etcd: whole seconds, at
    /// least two).
    pub ttl: Duration,
}

/// A key, its value, and when it got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Arc<str>,
    /// The value.
    pub value: Bytes,
    /// The revision at which the key came to be (since it was last absent).
    pub created: Revision,
    /// The revision of its last write.
    pub modified: Revision,
    /// The lease that it goes with.
    pub lease: Option<LeaseId>,
}

/// What a comparison demands of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// There is no such key.
    Absent,
    /// Nobody has written it since this revision, which did.
    Modified(Revision),
    /// It has been there without a gap since this revision, which created it. Fences a leader's writes.
    Created(Revision),
}

/// One comparison of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// What it has to be.
    pub expect: Expect,
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key. A key belongs to the lease of its last write, or to none.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Bytes,
        /// The lease that it goes with.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing happens when there is none.
    Delete {
        /// The key.
        key: String,
    },
}

/// Comparisons and writes: when all comparisons hold, all writes happen at one revision; else none does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// All have to hold.
    pub compares: Vec<Compare>,
    /// Each key at most once.
    pub writes: Vec<Write>,
}

/// A transaction that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// The revision of its writes; the store's current one when it changed nothing.
    pub revision: Revision,
    /// How many keys it removed.
    pub deleted: usize,
}

/// One key's change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Written.
    Put(Entry),
    /// Removed, or gone with its lease.
    Delete {
        /// The key.
        key: Arc<str>,
    },
}

/// Everything that one revision changed under the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The revision. A watch can go on from the next.
    pub revision: Revision,
    /// Its changes; empty: nothing changed here up to this revision.
    pub events: Vec<Event>,
}

/// A watch: each revision's changes once, in order, without a gap. Goes on by itself after a disconnection. Ends after
/// an error, of which [`Error::Compacted`] is the one to expect. Cancel-safe.
pub type Watch = BoxStream<'static, Result<Changes, Error>>;

/// The entries of one page, in the order of their keys.
pub type Page = Vec<Entry>;

/// Everything under a prefix at one revision, page by page.
pub struct Listing {
    /// The revision that it shows. Watch from the next.
    pub revision: Revision,
    /// The pages. Ends after an error; [`Error::Compacted`] when the listing took too long.
    pub pages: BoxStream<'static, Result<Page, Error>>,
}

/// A small transactional store that the whole cluster shares.
///
/// Every call ends by its deadline. No call retries a write whose outcome it doesn't know: it says
/// [`Error::UnknownOutcome`]. Calls are cancel-safe in that nothing leaks; whether a cancelled write happened is unknown.
#[async_trait]
pub trait ClusterStore: fmt::Debug + Send + Sync + 'static {
    /// The key's entry, as of some moment between call and answer.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Refused`].
    async fn get(&self, key: &str, deadline: Deadline) -> Result<Option<Entry>, Error>;

    /// Compares and writes, as one.
    ///
    /// # Errors
    /// [`Error::Conflict`] when a comparison didn't hold; [`Error::LeaseGone`] for a put under a lease that has ended;
    /// [`Error::UnknownOutcome`] when the answer was lost; the rest as their documentation says.
    async fn commit(&self, txn: Txn, deadline: Deadline) -> Result<Committed, Error>;

    /// Everything under `prefix` at one revision, in pages of at most `page_max` entries. The deadline is for all pages.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Refused`].
    async fn list(&self, prefix: &str, page_max: usize, deadline: Deadline) -> Result<Listing, Error>;

    /// Every change under `prefix` from revision `from` on. The deadline is for beginning; the watch itself has none.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Refused`]. [`Error::Compacted`] comes from here or as the stream's first item.
    async fn watch(&self, prefix: &str, from: Revision, deadline: Deadline) -> Result<Watch, Error>;

    /// A new lease of at least `ttl`.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::UnknownOutcome`]: a lease may exist that nobody knows, it ends by itself.
    async fn grant(&self, ttl: Duration, deadline: Deadline) -> Result<Lease, Error>;

    /// Makes a lease live its whole time again, counted from some moment between call and answer. Says how long.
    ///
    /// # Errors
    /// [`Error::LeaseGone`]; [`Error::Unavailable`] (it can be repeated).
    async fn keep_alive(&self, lease: LeaseId, deadline: Deadline) -> Result<Duration, Error>;

    /// Ends a lease and removes its keys. One that has ended already is fine, so it can be repeated.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::UnknownOutcome`].
    async fn revoke(&self, lease: LeaseId, deadline: Deadline) -> Result<(), Error>;

    /// Forgets the history before `before`. What is stored stays. Forgetting what is forgotten is fine.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a revision that is yet to come; [`Error::Unavailable`].
    async fn compact(&self, before: Revision, deadline: Deadline) -> Result<(), Error>;
}

/// Shorter ways to say common things.
#[async_trait]
pub trait ClusterStoreExt: ClusterStore {
    /// Writes a key, whatever it was.
    ///
    /// # Errors
    /// As [`ClusterStore::commit`].
    async fn put(&self, key: &str, value: Bytes, deadline: Deadline) -> Result<Revision, Error> {
        Ok(self.commit(Txn::new().put(key, value), deadline).await?.revision)
    }

    /// Writes a key if it is what was expected.
    ///
    /// # Errors
    /// As [`ClusterStore::commit`].
    async fn compare_and_swap(
        &self,
        key: &str,
        expect: Expect,
        value: Bytes,
        deadline: Deadline,
    ) -> Result<Revision, Error> {
        Ok(self.commit(Txn::new().expect(key, expect).put(key, value), deadline).await?.revision)
    }

    /// Removes a key, whatever it was. Says whether there was one.
    ///
    /// # Errors
    /// As [`ClusterStore::commit`].
    async fn delete(&self, key: &str, deadline: Deadline) -> Result<bool, Error> {
        Ok(self.commit(Txn::new().delete(key), deadline).await?.deleted > 0)
    }

    /// A key's entry and the revision that shows it, from the next of which a watch of the key goes on.
    ///
    /// # Errors
    /// As [`ClusterStore::list`].
    async fn get_at(&self, key: &str, deadline: Deadline) -> Result<(Revision, Option<Entry>), Error> {
        // Of all keys that begin with it, the key itself is the first.
        let mut listing = self.list(key, 1, deadline).await?;
        let first = listing.pages.next().await.transpose()?.and_then(|page| page.into_iter().next());
        Ok((listing.revision, first.filter(|entry| *entry.key == *key)))
    }

    /// Everything under a prefix, and the revision that shows it.
    ///
    /// # Errors
    /// As [`ClusterStore::list`]; [`Error::TooLarge`] when there are more than `max` entries.
    async fn list_all(
        &self,
        prefix: &str,
        max: usize,
        deadline: Deadline,
    ) -> Result<(Revision, Page), Error> {
        let mut listing = self.list(prefix, limits::PAGE_MAX, deadline).await?;
        let mut all = Page::new();
        while let Some(page) = listing.pages.next().await {
            all.extend(page?);
            if all.len() > max {
                return Err(Error::TooLarge {
                    what: format!("`{prefix}`"),
                    size: Some(all.len()),
                    limit: max,
                });
            }
        }
        Ok((listing.revision, all))
    }
}

impl<S: ClusterStore + ?Sized> ClusterStoreExt for S {}

// === impl Revision, LeaseId, Expect ===

impl Revision {
    /// The one after it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {}", self.0)
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease {:016x}", self.0)
    }
}

impl LeaseId {
    /// One that nobody else has: positive in 63 bits, as etcd wants them.
    pub(crate) fn random() -> Self {
        Self(rand::random_range(1..=i64::MAX.unsigned_abs()))
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Modified(revision) => write!(f, "last modified at {revision}"),
            Self::Created(revision) => write!(f, "created at {revision}"),
        }
    }
}

impl Expect {
    /// Whether a key with these revisions (created, modified) is as expected.
    pub(crate) fn holds(self, found: Option<(Revision, Revision)>) -> bool {
        match (self, found) {
            (Self::Absent, None) => true,
            (Self::Created(wanted), Some((created, _))) => wanted == created,
            (Self::Modified(wanted), Some((_, modified))) => wanted == modified,
            (Self::Absent, Some(_)) | (Self::Created(_) | Self::Modified(_), None) => false,
        }
    }
}

// === impl Txn ===

impl Txn {
    /// Compares nothing, writes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more comparison.
    #[must_use]
    pub fn expect(mut self, key: &str, expect: Expect) -> Self {
        self.compares.push(Compare { key: key.to_owned(), expect });
        self
    }

    /// With one more comparison, such as a leader's fence.
    #[must_use]
    pub fn compare(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// With one more put.
    #[must_use]
    pub fn put(mut self, key: &str, value: Bytes) -> Self {
        self.writes.push(Write::Put { key: key.to_owned(), value, lease: None });
        self
    }

    /// With one more put, under a lease.
    #[must_use]
    pub fn put_leased(mut self, key: &str, value: Bytes, lease: LeaseId) -> Self {
        self.writes.push(Write::Put { key: key.to_owned(), value, lease: Some(lease) });
        self
    }

    /// With one more delete.
    #[must_use]
    pub fn delete(mut self, key: &str) -> Self {
        self.writes.push(Write::Delete { key: key.to_owned() });
        self
    }

    /// Whether every store would take it.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let ops = self.compares.len().max(self.writes.len());
        too_large("the transaction", ops, limits::TXN_OPS_MAX)?;
        if self.writes.is_empty() {
            return Err(Error::Invalid { reason: "a transaction without writes".to_owned() });
        }
        let mut bytes = 0;
        let mut written = std::collections::BTreeSet::new();
        for compare in &self.compares {
            check_key(&compare.key)?;
            bytes += compare.key.len();
        }
        for write in &self.writes {
            check_key(write.key())?;
            bytes += write.key().len();
            if let Write::Put { key, value, .. } = write {
                too_large(&format!("the value of `{key}`"), value.len(), limits::VALUE_LEN_MAX)?;
                bytes += value.len();
            }
            if !written.insert(write.key()) {
                return Err(Error::Invalid {
                    reason: format!("`{}` written twice in one transaction", write.key()),
                });
            }
        }
        too_large("the transaction", bytes, limits::TXN_BYTES_MAX)
    }
}

impl Write {
    /// The key that it is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

// === impl Event, Listing ===

impl Event {
    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &Arc<str> {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }
}

impl fmt::Debug for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listing").field("revision", &self.revision).finish_non_exhaustive()
    }
}

fn too_large(what: &str, size: usize, limit: usize) -> Result<(), Error> {
    if size > limit {
        Err(Error::TooLarge { what: what.to_owned(), size: Some(size), limit })
    } else {
        Ok(())
    }
}

/// Whether every store takes such a key.
pub(crate) fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() || key.chars().any(char::is_control) {
        return Err(Error::Invalid { reason: format!("{key:?} as a key") });
    }
    too_large("the key", key.len(), limits::KEY_LEN_MAX)
}

/// Whether every store takes such a prefix. The empty one is everything.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    if prefix.is_empty() { Ok(()) } else { check_key(prefix) }
}

/// The time of a lease, if every store takes it.
pub(crate) fn check_ttl(ttl: Duration) -> Result<(), Error> {
    let ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    if limits::LEASE_MS.contains(&ms) {
        Ok(())
    } else {
        Err(Error::Invalid { reason: format!("a lease of {ttl:?}; between 1 ms and 30 days") })
    }
}
