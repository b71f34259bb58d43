//! Where the time of a start went.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// A step between a request and its first token, in order. Steps may overlap: their sum can exceed the total.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for a decision: behind other requests, or for room.
    Queued,
    /// The decision itself, and the order's way to the node.
    Scheduled,
    /// Bytes from a remote source.
    RemoteRead,
    /// Bytes from SSD to DRAM.
    SsdRead,
    /// Checking checksums (on the reading threads, under the read).
    Verify,
    /// DRAM to device; on the CPU, mapping the pool's chunks.
    DeviceCopy,
    /// The worker building its view of the model.
    Init,
    /// The prompt's forward pass.
    Prefill,
    /// From the last of the above to the first token leaving the gateway.
    FirstToken,
}

/// One phase of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// What the scheduler expected, where it did.
    pub predicted: Option<Duration>,
    /// What it took.
    pub actual: Duration,
    /// When it was, where that is known. Its length may differ from `actual`: checks run on several threads, and a wait
    /// may have come in two parts, of which this is the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period: Option<Period>,
}

/// When something was: wall-clock times since the Unix epoch, to be compared across processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Period {
    /// Its beginning.
    pub began: Duration,
    /// Its end, no earlier.
    pub ended: Duration,
}

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// A remote source.
    Remote,
    /// A local disk.
    Ssd,
    /// The pool of chunks in memory.
    Dram,
    /// A device's own memory.
    Device,
}

/// Bytes that one start took from a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierBytes {
    /// The tier they came from.
    pub tier: Tier,
    /// How many.
    pub bytes: ByteSize,
}

/// The phases of one start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// In [`Phase`] order; a phase that did not occur is absent.
    pub phases: Vec<PhaseTime>,
    /// Bytes by the tier that they came from.
    pub bytes: Vec<TierBytes>,
}

// === impl Period, Timeline, Tier, Phase ===

impl Period {
    /// What ended at `ended` and took `time`.
    #[must_use]
    pub const fn until(ended: Duration, time: Duration) -> Self {
        Self { began: ended.saturating_sub(time), ended }
    }

    /// How long it was.
    #[must_use]
    pub const fn length(&self) -> Duration {
        self.ended.saturating_sub(self.began)
    }
}

impl Timeline {
    /// Adds a phase, keeping the order; a phase that is there already is added to.
    pub fn record(&mut self, phase: Phase, predicted: Option<Duration>, actual: Duration) {
        match self.phases.binary_search_by_key(&phase, |p| p.phase) {
            Ok(at) => self.phases[at].actual += actual,
            Err(at) => self.phases.insert(at, PhaseTime { phase, predicted, actual, period: None }),
        }
    }

    /// Takes over what another timeline of the same start has, instead of what there is of the same phases.
    pub fn replace(&mut self, with: Self) {
        let Self { phases, bytes } = with;
        for phase in phases {
            match self.phases.binary_search_by_key(&phase.phase, |p| p.phase) {
                Ok(at) => self.phases[at] = PhaseTime { predicted: self.phases[at].predicted, ..phase },
                Err(at) => self.phases.insert(at, phase),
            }
        }
        self.bytes = bytes;
    }

    /// Says when a phase was that has been recorded.
    pub fn place(&mut self, phase: Phase, period: Period) {
        if let Ok(at) = self.phases.binary_search_by_key(&phase, |p| p.phase) {
            self.phases[at].period = Some(period);
        }
    }

    /// What a phase took, if it occurred.
    #[must_use]
    pub fn actual(&self, phase: Phase) -> Option<Duration> {
        self.phases.iter().find(|p| p.phase == phase).map(|p| p.actual)
    }
}

impl Tier {
    /// The tier's name in metrics and traces.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Remote => "remote",
            Self::Ssd => "ssd",
            Self::Dram => "dram",
            Self::Device => "device",
        }
    }
}

impl Phase {
    /// The phase's name in headers, metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Scheduled => "scheduled",
            Self::RemoteRead => "remote_read",
            Self::SsdRead => "ssd_read",
            Self::Verify => "verify",
            Self::DeviceCopy => "device_copy",
            Self::Init => "init",
            Self::Prefill => "prefill",
            Self::FirstToken => "first_token",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_stay_in_order_and_add_up() {
        let mut timeline = Timeline::default();
        timeline.record(Phase::Prefill, None, Duration::from_millis(5));
        timeline.record(Phase::Queued, None, Duration::from_millis(1));
        timeline.record(Phase::Prefill, None, Duration::from_millis(2));
        assert_eq!(
            timeline.phases.iter().map(|p| p.phase).collect::<Vec<_>>(),
            [Phase::Queued, Phase::Prefill]
        );
        assert_eq!(timeline.actual(Phase::Prefill), Some(Duration::from_millis(7)));
        let period = Period::until(Duration::from_secs(100), Duration::from_millis(7));
        timeline.place(Phase::Prefill, period);
        timeline.place(Phase::Init, period);
        assert_eq!(timeline.phases[1].period, Some(period));
        assert_eq!((timeline.phases.len(), period.length()), (2, Duration::from_millis(7)));
        let mut late =
            Timeline { bytes: vec![TierBytes { tier: Tier::Ssd, bytes: ByteSize(3) }], phases: vec![] };
        late.record(Phase::SsdRead, None, Duration::from_millis(9));
        late.record(Phase::Prefill, None, Duration::from_millis(8));
        timeline.phases[1].predicted = Some(Duration::from_millis(6));
        timeline.replace(late.clone());
        let all: Vec<_> = timeline.phases.iter().map(|p| (p.phase, p.actual.as_millis())).collect();
        assert_eq!(all, [(Phase::Queued, 1), (Phase::SsdRead, 9), (Phase::Prefill, 8)]);
        assert_eq!(
            (timeline.phases[2].predicted, timeline.bytes),
            (Some(Duration::from_millis(6)), late.bytes)
        );
    }
}
