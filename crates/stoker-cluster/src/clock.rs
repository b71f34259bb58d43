//! Time as the store's users count it: deadlines of calls, and the clock that leases run by.

use std::{fmt, future::Future, time::Duration};

use futures::future::BoxFuture;
use tokio::{sync::watch, time::Instant};

/// When a call gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

/// A monotonic clock that leases are counted by. Injected, so that tests can turn it.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Now.
    fn now(&self) -> Instant;

    /// Ends when [`Clock::now`] has reached `until`. Cancel-safe.
    fn sleep_until(&self, until: Instant) -> BoxFuture<'static, ()>;
}

/// The runtime's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokioClock;

/// A clock that stands still until it is turned. For tests: what a lease does when time passes, without waiting.
#[derive(Debug)]
pub struct ManualClock {
    base: Instant,
    passed: watch::Sender<Duration>,
}

// === impl Deadline ===

impl Deadline {
    /// So long from now.
    #[must_use]
    pub fn after(wait: Duration) -> Self {
        Self::at(Instant::now() + wait)
    }

    /// At an instant of the runtime's clock.
    #[must_use]
    pub const fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// The instant.
    #[must_use]
    pub const fn instant(self) -> Instant {
        self.0
    }

    /// What is left; zero when it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The earlier of this one and `wait` from now.
    #[must_use]
    pub fn or_after(self, wait: Duration) -> Self {
        self.min(Self::after(wait))
    }

    /// Runs `future` until the deadline; `None` when that came first.
    pub async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout_at(self.0, future).await.ok()
    }
}

// === impl TokioClock ===

impl Clock for TokioClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep_until(&self, until: Instant) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep_until(until))
    }
}

// === impl ManualClock ===

impl ManualClock {
    /// A clock that says now, until it is turned.
    #[must_use]
    pub fn new() -> Self {
        Self { base: Instant::now(), passed: watch::channel(Duration::ZERO).0 }
    }

    /// Turns it forward.
    pub fn advance(&self, by: Duration) {
        self.passed.send_modify(|passed| *passed += by);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.base + *self.passed.borrow()
    }

    fn sleep_until(&self, until: Instant) -> BoxFuture<'static, ()> {
        let mut passed = self.passed.subscribe();
        let base = self.base;
        Box::pin(async move {
            // A clock that is gone is never turned again.
            if passed.wait_for(|passed| base + *passed >= until).await.is_err() {
                std::future::pending().await
            }
        })
    }
}
