//! Bounds on what waits.

use serde::{Deserialize, Serialize};

/// How many requests may wait for a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLimits {
    /// Waiting requests of one model.
    pub per_model_max: usize,
    /// Waiting requests in all.
    pub total_max: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { per_model_max: 128, total_max: 1024 }
    }
}

impl QueueLimits {
    /// Waiting requests of one client: half of what may wait for a model, so that one client can't fill it.
    #[must_use]
    pub const fn per_client_max(&self) -> usize {
        let half = self.per_model_max / 2;
        if half == 0 { 1 } else { half }
    }
}
