//! A cap on the bytes a second of all reads together.

use std::time::Duration;

use parking_lot::Mutex;
use stoker_types::{ByteSize, BytesPerSec};
use tokio::time::Instant;

/// What may be taken at once after a pause: enough that the cap doesn't wait for every packet.
const BURST: Duration = Duration::from_millis(50);

/// Lets bytes pass at a rate. The network's own flow control does the rest: who isn't read from stops sending.
#[derive(Debug)]
pub(crate) struct Bandwidth {
    rate: BytesPerSec,
    /// When what has passed so far is paid for.
    paid: Mutex<Instant>,
}

// === impl Bandwidth ===

impl Bandwidth {
    pub(crate) fn new(rate: BytesPerSec) -> Self {
        Self { rate, paid: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may have passed. Cancel-safe; what was cancelled has passed.
    pub(crate) async fn pass(&self, bytes: usize) {
        let until = {
            let mut paid = self.paid.lock();
            let begin = (*paid).max(Instant::now().checked_sub(BURST).unwrap_or_else(Instant::now));
            *paid = begin + ByteSize(bytes as u64).at(self.rate).min(Duration::from_secs(3600));
            *paid
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_holds_over_time_and_over_pauses() {
        let cap = Bandwidth::new(BytesPerSec(1e6));
        let begun = Instant::now();
        for _ in 0..100 {
            cap.pass(100_000).await;
        }
        let took = begun.elapsed();
        assert!((9.9..10.1).contains(&took.as_secs_f64()), "10 MB at 1 MB/s took {took:?}");
        tokio::time::sleep(Duration::from_secs(100)).await;
        let begun = Instant::now();
        cap.pass(10_000_000).await;
        assert!(begun.elapsed() > Duration::from_secs(9), "a pause doesn't save up");
    }
}
