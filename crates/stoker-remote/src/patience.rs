//! How long a store that doesn't answer well is asked again.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{RemoteError, Trouble};

/// Bounds on what a read waits for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Requests in a row that bring less than [`Patience::progress_bytes`] before a read is given up.
    pub tries: u32,
    /// Time from the first failure without progress before a read is given up.
    pub total: Duration,
    /// Pause before the second try, doubled for each further one, with jitter; a server that asks for a longer one gets
    /// it.
    pub backoff: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// Time in which an answer must begin, and in which [`Patience::progress_bytes`] of it must arrive.
    pub idle: Duration,
    /// See [`Patience::idle`]: a server that sends a byte now and then counts as silent.
    pub progress_bytes: u64,
}

/// What is left of a read's patience.
#[derive(Debug)]
pub(crate) struct Left {
    patience: Patience,
    failures: u32,
    requests: u32,
    since: Option<Instant>,
    /// Bytes that had arrived at the last failure.
    at: u64,
}

// === impl Patience ===

impl Default for Patience {
    fn default() -> Self {
        Self {
            tries: 5,
            total: Duration::from_secs(60),
            backoff: Duration::from_millis(200),
            backoff_max: Duration::from_secs(10),
            idle: Duration::from_secs(10),
            progress_bytes: 64 << 10,
        }
    }
}

impl Patience {
    pub(crate) fn begin(self) -> Left {
        Left { patience: self, failures: 0, requests: 0, since: None, at: 0 }
    }
}

// === impl Left ===

impl Left {
    /// A request failed when so many bytes had arrived. The pause before the next, or the end.
    ///
    /// # Errors
    /// [`RemoteError`]: patience is at an end, or no other request would do better.
    pub(crate) fn after(
        &mut self,
        url: &str,
        trouble: Trouble,
        arrived: u64,
    ) -> Result<Duration, RemoteError> {
        let (why, after) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Transient { why, after, .. } => (why, after),
            Trouble::Unreachable { why } => (why, None),
        };
        let Patience { tries, total, backoff, backoff_max, progress_bytes, .. } = self.patience;
        let now = Instant::now();
        self.requests += 1;
        if arrived >= self.at.saturating_add(progress_bytes) {
            (self.failures, self.since) = (0, None);
            self.at = arrived;
        }
        let since = *self.since.get_or_insert(now);
        self.failures += 1;
        let doubled = backoff.saturating_mul(1 << (self.failures - 1).min(16)).min(backoff_max);
        let pause = doubled.mul_f64(rand::random_range(0.5..1.0)).max(after.unwrap_or_default());
        let elapsed = now - since;
        if self.failures >= tries || elapsed + pause > total {
            return Err(RemoteError::Unavailable {
                url: url.to_owned(),
                tries: self.requests,
                elapsed,
                last: why,
            });
        }
        tracing::debug!(url, failures = self.failures, ?pause, why, "asking the store again");
        Ok(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transient(after: Option<Duration>) -> Trouble {
        Trouble::Transient { why: "reset".into(), after, throttled: false }
    }

    #[tokio::test(start_paused = true)]
    async fn tries_in_a_row_are_bounded_and_progress_starts_anew() {
        let patience = Patience { tries: 3, ..Patience::default() };
        let mut left = patience.begin();
        assert!(left.after("u", transient(None), 0).is_ok());
        assert!(left.after("u", transient(None), 0).is_ok());
        assert!(left.after("u", transient(None), 1 << 20).is_ok(), "it moved");
        assert!(left.after("u", transient(None), (1 << 20) + 5).is_ok());
        let end = left.after("u", transient(None), (1 << 20) + 9).unwrap_err();
        assert!(matches!(end, RemoteError::Unavailable { tries: 5, .. }), "{end}");
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_bounded_too_and_a_server_may_ask_for_more_of_it() {
        let mut left = Patience::default().begin();
        let pause = left.after("u", transient(Some(Duration::from_secs(7))), 0).unwrap();
        assert!(pause >= Duration::from_secs(7));
        assert!(left.after("u", transient(Some(Duration::from_secs(61))), 0).is_err(), "beyond the budget");
    }
}
