//! A lease that keeps itself alive, and whose holder knows in time when it can't rely on it any more.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use crate::{Clock, ClusterStore, Deadline, Error, LeaseId, TokioClock, retry::Backoff};

/// How long a lease lives, and how it is kept.
#[derive(Debug, Clone)]
pub struct LeaseSettings {
    /// How long it lives without being renewed. A store may make it longer.
    pub ttl: Duration,
    /// How often it is renewed.
    pub renew: Duration,
    /// How long before its end the holder stops relying on it: more than clocks differ over one `ttl`, and than it takes
    /// to stop.
    pub margin: Duration,
    /// The holder's clock.
    pub clock: Arc<dyn Clock>,
}

/// A lease, renewed in the background. Dropping it revokes it, if the store can be reached.
///
/// The holder counts from before each renewal was sent, the store from when it got it: the holder's end is always first.
#[derive(Debug)]
pub struct HeldLease {
    id: LeaseId,
    /// Until when it is ours by our own clock; `None`: it is gone.
    until: watch::Receiver<Option<Instant>>,
    clock: Arc<dyn Clock>,
    /// Ends the task when dropped; with a sender to answer when it has revoked the lease.
    stop: Option<oneshot::Sender<Release>>,
}

/// How a lease is let go.
#[derive(Debug)]
struct Release {
    deadline: Deadline,
    done: oneshot::Sender<Result<(), Error>>,
}

struct Keeper {
    store: Arc<dyn ClusterStore>,
    settings: LeaseSettings,
    id: LeaseId,
    /// Before it was asked for.
    granted: Instant,
    until: watch::Sender<Option<Instant>>,
}

// === impl LeaseSettings ===

impl LeaseSettings {
    /// A lease of `ttl`, renewed four times in it, with a quarter as margin, by the runtime's clock.
    #[must_use]
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, renew: ttl / 4, margin: ttl / 4, clock: Arc::new(TokioClock) }
    }

    /// A leader's: 2 s, the least that etcd grants.
    #[must_use]
    pub fn leader() -> Self {
        Self::new(Duration::from_secs(2))
    }

    /// A node's: 3 s, renewed each second.
    #[must_use]
    pub fn node() -> Self {
        Self { renew: Duration::from_secs(1), ..Self::new(Duration::from_secs(3)) }
    }

    /// How long the holder may rely on a renewal.
    fn usable(&self, ttl: Duration) -> Duration {
        ttl.saturating_sub(self.margin)
    }
}

// === impl HeldLease ===

impl HeldLease {
    /// Gets a lease and begins to keep it.
    ///
    /// # Errors
    /// As [`ClusterStore::grant`].
    pub async fn grant(
        store: &Arc<dyn ClusterStore>,
        settings: &LeaseSettings,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let clock = Arc::clone(&settings.clock);
        let sent = clock.now();
        let lease = store.grant(settings.ttl, deadline).await?;
        let (until, until_receiver) = watch::channel(Some(sent + settings.usable(lease.ttl)));
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper {
            store: Arc::clone(store),
            settings: settings.clone(),
            id: lease.id,
            granted: sent,
            until,
        };
        tokio::spawn(keeper.run(stopped));
        Ok(Self { id: lease.id, until: until_receiver, clock, stop: Some(stop) })
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> LeaseId {
        self.id
    }

    /// Whether it can be relied on, now. Right however late its background task is.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.until.borrow().is_some_and(|until| self.clock.now() < until)
    }

    /// Until when it can be relied on, by the holder's clock, if it isn't renewed; `None` when it is lost.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        *self.until.borrow()
    }

    /// Ends when it can't be relied on any more. Cancel-safe.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        let (mut until, clock) = (self.until.clone(), Arc::clone(&self.clock));
        async move {
            loop {
                let end = *until.borrow_and_update();
                let Some(end) = end.filter(|end| clock.now() < *end) else { return };
                tokio::select! {
                    () = clock.sleep_until(end) => {}
                    changed = until.changed() => if changed.is_err() { return },
                }
            }
        }
    }

    /// Revokes it: its keys are gone when this returns.
    ///
    /// # Errors
    /// As [`ClusterStore::revoke`]; then it ends by itself.
    pub async fn release(mut self, deadline: Deadline) -> Result<(), Error> {
        let (done, released) = oneshot::channel();
        if let Some(stop) = self.stop.take() {
            // A task that is gone lost the lease.
            stop.send(Release { deadline, done }).ok();
        }
        match deadline.bound(released).await {
            Some(Ok(result)) => result,
            Some(Err(_)) => Ok(()),
            None => Err(Error::unknown("revoking a lease took longer than the deadline")),
        }
    }
}

// === impl Keeper ===

impl Keeper {
    async fn run(self, mut stopped: oneshot::Receiver<Release>) {
        let release = tokio::select! {
            () = self.keep() => None,
            release = &mut stopped => Some(release),
        };
        // Whatever the reason: it isn't relied on from here on, and its keys should go.
        self.until.send_replace(None);
        let (deadline, done) = match release {
            Some(Ok(Release { deadline, done })) => (deadline, Some(done)),
            Some(Err(_)) | None => (Deadline::after(self.settings.ttl), None),
        };
        let mut backoff = Backoff::background();
        let result = loop {
            let result = self.store.revoke(self.id, deadline).await;
            // To revoke twice is fine, whatever the first try came to.
            let again = matches!(result, Err(Error::Unavailable { .. } | Error::UnknownOutcome { .. }));
            if !again || deadline.bound(tokio::time::sleep(backoff.pause())).await.is_none() {
                break result;
            }
        };
        if let Some(done) = done {
            // Whoever asked may have given up.
            done.send(result).ok();
        }
    }

    /// Until it is lost.
    async fn keep(&self) {
        let clock = &self.settings.clock;
        let mut backoff = Backoff::new(Duration::from_millis(20), self.settings.renew);
        let mut next = self.granted + self.settings.renew;
        loop {
            clock.sleep_until(next).await;
            let sent = clock.now();
            let Some(end) = (*self.until.borrow()).filter(|end| sent < *end) else { return };
            next = match self.store.keep_alive(self.id, Deadline::after(end - sent)).await {
                Ok(ttl) => {
                    self.until.send_replace(Some(sent + self.settings.usable(ttl)));
                    backoff.reset();
                    sent + self.settings.renew
                }
                Err(Error::LeaseGone { .. }) => return,
                Err(error) => {
                    tracing::debug!(lease = %self.id, %error, "a lease wasn't renewed");
                    clock.now() + backoff.pause()
                }
            };
        }
    }
}
