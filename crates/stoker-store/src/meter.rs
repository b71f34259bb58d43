//! The measured rate of the tier below memory.

use std::time::Duration;

use stoker_scheduler::Robust;
use stoker_types::{ByteSize, BytesPerSec};

/// A sample of less says more about opening and seeking than about the rate.
const SAMPLE_BYTES_MIN: u64 = 4 << 20;

/// Measures bytes a second over the time in which at least one read is under way, so that neither idle time nor loads
/// that share the tier spoil the figure. Times are measured from any fixed moment.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    reads: u32,
    busy_since: Duration,
    busy: Duration,
    bytes: u64,
    rate: Option<Robust>,
}

// === impl Meter ===

impl Meter {
    /// A read begins.
    pub(crate) fn begin(&mut self, now: Duration) {
        if self.reads == 0 {
            self.busy_since = now;
        }
        self.reads += 1;
    }

    /// A read has ended, with so many bytes (none if it failed).
    pub(crate) fn end(&mut self, now: Duration, bytes: u64) {
        self.bytes += bytes;
        self.reads = self.reads.saturating_sub(1);
        if self.reads == 0 {
            self.busy += now.saturating_sub(self.busy_since);
        }
    }

    /// Takes what was measured since the last time into the average.
    pub(crate) fn sample(&mut self, now: Duration) {
        if self.bytes < SAMPLE_BYTES_MIN {
            return;
        }
        if self.reads > 0 {
            self.busy += now.saturating_sub(self.busy_since);
            self.busy_since = now;
        }
        let sample = BytesPerSec::of(ByteSize(self.bytes), self.busy).0;
        match &mut self.rate {
            Some(rate) => rate.observe(sample, now),
            None => self.rate = Robust::first(sample, now),
        }
        (self.bytes, self.busy) = (0, Duration::ZERO);
    }

    /// The average; `None` before the first sample.
    pub(crate) fn rate(&self) -> Option<BytesPerSec> {
        self.rate.as_ref().map(|rate| BytesPerSec(rate.value()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_reads_and_pauses_do_not_count_twice() {
        let s = Duration::from_secs;
        let mut meter = Meter::default();
        meter.begin(s(10));
        meter.begin(s(10));
        meter.end(s(11), 100 << 20);
        meter.end(s(12), 100 << 20);
        meter.sample(s(20));
        let rate = meter.rate().unwrap().0;
        assert!((rate - f64::from(100 << 20)).abs() < 1.0, "{rate}");
        meter.begin(s(30));
        meter.end(s(31), 1);
        meter.sample(s(31));
        assert!((meter.rate().unwrap().0 - rate).abs() < 1.0, "too little to say anything");
    }
}
