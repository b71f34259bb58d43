//! A store that misbehaves on purpose, by a seed.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{ClusterStore, Committed, Deadline, Entry, Error, Lease, LeaseId, Listing, Revision, Txn, Watch};

/// How often what goes wrong: probabilities from 0 to 1, of each call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    /// Decides everything, with the order of the calls.
    pub seed: u64,
    /// Each call is late by up to so much.
    pub delay_max: Duration,
    /// The store can't be reached; nothing happens.
    pub unavailable: f64,
    /// A write happens, and its answer is lost.
    pub answer_lost: f64,
    /// The answer is lost, and the write happens only then, up to ten times `delay_max` later.
    pub late: f64,
    /// Keeping a lease alive finds that it has expired.
    pub lease_expired: f64,
    /// Compaction overtakes a watch; of each of its items.
    pub compacted: f64,
}

/// How many faults there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultCounts {
    /// Calls, faulty or not.
    pub calls: u64,
    /// Calls that didn't reach the store.
    pub unavailable: u64,
    /// Answers to writes that were lost.
    pub answer_lost: u64,
    /// Writes that happened after their answer was lost.
    pub late: u64,
    /// Leases that expired.
    pub lease_expired: u64,
    /// Watches that were overtaken.
    pub compacted: u64,
}

/// `S` with [`Faults`]. Clones share them.
pub struct Faulty<S: ?Sized> {
    shared: Arc<Shared>,
    inner: Arc<S>,
}

struct Shared {
    faults: Faults,
    rng: Mutex<StdRng>,
    active: AtomicBool,
    calls: AtomicU64,
    unavailable: AtomicU64,
    answer_lost: AtomicU64,
    late: AtomicU64,
    lease_expired: AtomicU64,
    compacted: AtomicU64,
}

// === impl Faults ===

impl Faults {
    /// Everything at once, often: a fifth of the writes go wrong in some way.
    #[must_use]
    pub fn stormy(seed: u64) -> Self {
        Self {
            seed,
            delay_max: Duration::from_millis(20),
            unavailable: 0.08,
            answer_lost: 0.08,
            late: 0.06,
            lease_expired: 0.05,
            compacted: 0.05,
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Whether a fault of this probability happens now; counted.
    fn happens(&self, probability: f64, count: &AtomicU64) -> bool {
        let happens =
            self.active.load(Ordering::Relaxed) && self.rng.lock().random_bool(probability.clamp(0.0, 1.0));
        count.fetch_add(u64::from(happens), Ordering::Relaxed);
        happens
    }

    fn delay(&self, times: f64) -> Duration {
        if self.active.load(Ordering::Relaxed) {
            self.faults.delay_max.mul_f64(times * self.rng.lock().random_range(0.0..=1.0))
        } else {
            Duration::ZERO
        }
    }
}

// === impl Faulty ===

impl<S: ClusterStore + ?Sized> Faulty<S> {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: Arc<S>, faults: Faults) -> Self {
        let shared = Shared {
            faults,
            rng: Mutex::new(StdRng::seed_from_u64(faults.seed)),
            active: AtomicBool::new(true),
            calls: AtomicU64::new(0),
            unavailable: AtomicU64::new(0),
            answer_lost: AtomicU64::new(0),
            late: AtomicU64::new(0),
            lease_expired: AtomicU64::new(0),
            compacted: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared), inner }
    }

    /// Switches all faults off, or on again.
    pub fn set_active(&self, active: bool) {
        self.shared.active.store(active, Ordering::Relaxed);
    }

    /// What went wrong so far.
    #[must_use]
    pub fn counts(&self) -> FaultCounts {
        let Shared { calls, unavailable, answer_lost, late, lease_expired, compacted, .. } = &*self.shared;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        FaultCounts {
            calls: count(calls),
            unavailable: count(unavailable),
            answer_lost: count(answer_lost),
            late: count(late),
            lease_expired: count(lease_expired),
            compacted: count(compacted),
        }
    }

    async fn reach(&self, deadline: Deadline) -> Result<(), Error> {
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        let delay = self.shared.delay(1.0);
        if deadline.bound(tokio::time::sleep(delay)).await.is_none() {
            return Err(Error::unavailable("fault: late beyond the deadline"));
        }
        if self.shared.happens(self.shared.faults.unavailable, &self.shared.unavailable) {
            return Err(Error::unavailable("fault: unavailable"));
        }
        Ok(())
    }

    /// What the caller gets of a write's answer.
    fn answer<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if result.is_ok() && self.shared.happens(self.shared.faults.answer_lost, &self.shared.answer_lost) {
            return Err(Error::unknown("fault: the answer was lost"));
        }
        result
    }
}

impl<S: ?Sized> Clone for Faulty<S> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), inner: Arc::clone(&self.inner) }
    }
}

impl<S: ?Sized> fmt::Debug for Faulty<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("faults", &self.shared.faults).finish_non_exhaustive()
    }
}

#[async_trait]
impl<S: ClusterStore + ?Sized> ClusterStore for Faulty<S> {
    async fn get(&self, key: &str, deadline: Deadline) -> Result<Option<Entry>, Error> {
        self.reach(deadline).await?;
        self.inner.get(key, deadline).await
    }

    async fn commit(&self, txn: Txn, deadline: Deadline) -> Result<Committed, Error> {
        self.reach(deadline).await?;
        if self.shared.happens(self.shared.faults.late, &self.shared.late) {
            let (inner, wait) = (Arc::clone(&self.inner), self.shared.delay(10.0));
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                // Nobody is told.
                inner.commit(txn, Deadline::after(Duration::from_secs(5))).await.ok();
            });
            return Err(Error::unknown("fault: the write is late"));
        }
        let result = self.inner.commit(txn, deadline).await;
        self.answer(result)
    }

    async fn list(&self, prefix: &str, page_max: usize, deadline: Deadline) -> Result<Listing, Error> {
        self.reach(deadline).await?;
        let Listing { revision, pages } = self.inner.list(prefix, page_max, deadline).await?;
        let this = self.shared.clone();
        let pages = pages.map(move |page| {
            if this.happens(this.faults.unavailable, &this.unavailable) {
                return Err(Error::unavailable("fault: unavailable in the middle of a listing"));
            }
            page
        });
        Ok(Listing { revision, pages: ending(pages.boxed()) })
    }

    async fn watch(&self, prefix: &str, from: Revision, deadline: Deadline) -> Result<Watch, Error> {
        self.reach(deadline).await?;
        let watch = self.inner.watch(prefix, from, deadline).await?;
        let this = self.shared.clone();
        let watch = watch.then(move |item| {
            let this = Arc::clone(&this);
            async move {
                tokio::time::sleep(this.delay(1.0)).await;
                let changes = item?;
                if this.happens(this.faults.compacted, &this.compacted) {
                    let oldest = changes.revision.next();
                    return Err(Error::Compacted { wanted: changes.revision, oldest });
                }
                Ok(changes)
            }
        });
        Ok(ending(watch.boxed()))
    }

    async fn grant(&self, ttl: Duration, deadline: Deadline) -> Result<Lease, Error> {
        self.reach(deadline).await?;
        let result = self.inner.grant(ttl, deadline).await;
        self.answer(result)
    }

    async fn keep_alive(&self, lease: LeaseId, deadline: Deadline) -> Result<Duration, Error> {
        self.reach(deadline).await?;
        if self.shared.happens(self.shared.faults.lease_expired, &self.shared.lease_expired) {
            self.inner.revoke(lease, deadline).await?;
            return Err(Error::LeaseGone { lease });
        }
        self.inner.keep_alive(lease, deadline).await
    }

    async fn revoke(&self, lease: LeaseId, deadline: Deadline) -> Result<(), Error> {
        self.reach(deadline).await?;
        let result = self.inner.revoke(lease, deadline).await;
        self.answer(result)
    }

    async fn compact(&self, before: Revision, deadline: Deadline) -> Result<(), Error> {
        self.reach(deadline).await?;
        self.inner.compact(before, deadline).await
    }
}

/// The stream, ending after its first error.
fn ending<T: Send + 'static>(
    stream: stream::BoxStream<'static, Result<T, Error>>,
) -> stream::BoxStream<'static, Result<T, Error>> {
    let go_on = |ended: &mut bool, item: Result<T, Error>| {
        let over = std::mem::replace(ended, item.is_err());
        futures::future::ready((!over).then_some(item))
    };
    stream.scan(false, go_on).boxed()
}
