//! The controller's settings.

use std::time::Duration;

use stoker_scheduler::{
    estimate::Priors,
    residency::{Budgets, Rules},
    sizing::SizingRules,
};
use stoker_types::{ByteSize, QueueLimits};

/// Everything that may be set.
#[derive(Debug, Clone)]
pub struct Config {
    /// Judgements about thrash and waiting.
    pub rules: Rules,
    /// Judgements about KV cache.
    pub sizing: SizingRules,
    /// Bounds on what waits.
    pub queue: QueueLimits,
    /// What is assumed before anything was measured.
    pub priors: Priors,
    /// After a failed start, its model's requests are refused with the same failure for so long...
    pub backoff_min: Duration,
    /// ...twice as long after each further failure, up to this.
    pub backoff_max: Duration,
    /// After a worker said that it is busy although no seat is taken, it is asked again after this.
    pub busy_retry: Duration,
    /// Decisions remembered for `explain`.
    pub records_max: usize,
}

/// A server, as it joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// What people call it; empty when there is only one.
    pub name: String,
    /// Memory and workers of a server without devices. Both memory budgets follow what its snapshots say.
    pub budgets: Budgets,
    /// Its devices, in order; where there are any, its instances are there and nowhere else. Their memory follows what its
    /// snapshots say.
    pub devices: Vec<DeviceConfig>,
}

/// A device that instances may be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// What people call it: `cuda:0`.
    pub name: String,
    /// Most that instances may take of it.
    pub memory: ByteSize,
    /// What each takes beside weights and KV cache.
    pub work: ByteSize,
    /// Workers that may serve a model.
    pub slots: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rules: Rules::default(),
            sizing: SizingRules::default(),
            queue: QueueLimits::default(),
            priors: Priors::default(),
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(30),
            busy_retry: Duration::from_millis(100),
            records_max: 256,
        }
    }
}
