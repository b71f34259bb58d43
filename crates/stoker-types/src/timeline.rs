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
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// What the scheduler expected, where it did.
    pub predicted: Option<Duration>,
    /// What it took.
    pub actual: Duration,
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
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// In [`Phase`] order; a phase that did not occur is absent.
    pub phases: Vec<PhaseTime>,
    /// Bytes by the tier that they came from.
    pub bytes: Vec<TierBytes>,
}

impl Timeline {
    /// Adds a phase, keeping the order; a phase that is there already is added to.
    pub fn record(&mut self, phase: Phase, predicted: Option<Duration>, actual: Duration) {
        match self.phases.binary_search_by_key(&phase, |p| p.phase) {
            Ok(at) => self.phases[at].actual += actual,
            Err(at) => self.phases.insert(at, PhaseTime { phase, predicted, actual }),
        }
    }

    /// What a phase took, if it occurred.
    #[must_use]
    pub fn actual(&self, phase: Phase) -> Option<Duration> {
        self.phases.iter().find(|p| p.phase == phase).map(|p| p.actual)
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
    }
}
