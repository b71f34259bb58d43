//! The measured rates of the tiers below memory.

use std::{collections::HashMap, time::Duration};

use stoker_scheduler::{Robust, eviction::TierRates};
use stoker_types::{ByteSize, BytesPerSec, Tier};

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

/// The meters of all tiers below memory.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    ssd: Meter,
    /// All hosts together.
    remote: Meter,
    /// One for each host that was read from: as many as models name.
    hosts: HashMap<String, Meter>,
}

// === impl Meters ===

impl Meters {
    /// A read begins; from remote, `host` says from where.
    pub(crate) fn begin(&mut self, tier: Tier, host: Option<&str>, now: Duration) {
        self.of(tier).begin(now);
        if let Some(host) = host {
            self.hosts.entry(host.to_owned()).or_default().begin(now);
        }
    }

    /// A read has ended, with so many bytes (none if it failed).
    pub(crate) fn end(&mut self, tier: Tier, host: Option<&str>, now: Duration, bytes: u64) {
        self.of(tier).end(now, bytes);
        if let Some(meter) = host.and_then(|host| self.hosts.get_mut(host)) {
            meter.end(now, bytes);
        }
    }

    /// Takes what was measured since the last time into the averages.
    pub(crate) fn sample(&mut self, now: Duration) {
        self.ssd.sample(now);
        self.remote.sample(now);
        self.hosts.values_mut().for_each(|meter| meter.sample(now));
    }

    /// The average of a tier.
    pub(crate) fn rate(&self, tier: Tier) -> Option<BytesPerSec> {
        if tier == Tier::Remote { self.remote.rate() } else { self.ssd.rate() }
    }

    /// The average of a host.
    pub(crate) fn host(&self, host: &str) -> Option<BytesPerSec> {
        self.hosts.get(host)?.rate()
    }

    /// What a model's chunks cost to bring back, by the host that they come from. A host that hasn't been measured counts
    /// as all together.
    pub(crate) fn rates(&self, host: Option<&str>) -> TierRates {
        let remote = host.and_then(|host| self.host(host)).or_else(|| self.remote.rate());
        TierRates { ssd: self.ssd.rate(), remote }
    }

    fn of(&mut self, tier: Tier) -> &mut Meter {
        if tier == Tier::Remote { &mut self.remote } else { &mut self.ssd }
    }
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
    fn each_host_has_its_own_rate() {
        let s = Duration::from_secs;
        let mut meters = Meters::default();
        for (host, seconds) in [("s3://near", 1), ("s3://far", 10)] {
            meters.begin(Tier::Remote, Some(host), s(0));
            meters.end(Tier::Remote, Some(host), s(seconds), 100 << 20);
            meters.sample(s(seconds));
        }
        let rate = |host| meters.rates(Some(host)).remote.unwrap().0;
        assert!((rate("s3://near") - f64::from(100 << 20)).abs() < 1.0);
        assert!((rate("s3://far") - f64::from(10 << 20)).abs() < 1.0);
        assert_eq!(meters.rates(Some("s3://new")).remote, meters.rate(Tier::Remote));
        assert_eq!(meters.rates(None).ssd, None);
    }

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
