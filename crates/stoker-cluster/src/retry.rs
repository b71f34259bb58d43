//! How long to wait before trying again.

use std::time::Duration;

/// Pauses that double up to a bound, each shortened by a random part so that many don't come at once.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Self {
        Self { next: first, first, max }
    }

    /// For what a role does in the background: 20 ms to 1 s.
    pub(crate) const fn background() -> Self {
        Self::new(Duration::from_millis(20), Duration::from_secs(1))
    }

    /// The next pause: between half and all of the current step.
    pub(crate) fn pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.max);
        step.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Whether nothing has failed since it last worked.
    pub(crate) fn is_first(&self) -> bool {
        self.next == self.first
    }

    /// After something worked.
    pub(crate) const fn reset(&mut self) {
        self.next = self.first;
    }
}
