//! From a load order to an engine.

use std::time::Duration;

use stoker_engine::StepEngine;
use stoker_proto::control::Load;

/// A model that was taken.
pub(crate) struct LoadedModel {
    /// Its engine. Dropping it drops every mapping and all private memory.
    pub(crate) engine: Box<dyn StepEngine>,
    /// Mapping the pool's chunks.
    pub(crate) map: Duration,
    /// Building the model's view over them.
    pub(crate) init: Duration,
}

/// Why a model was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LoadError {
    /// It can't be computed by this build at all.
    #[error("{0}")]
    NotRunnable(String),
    /// It could not be taken this time.
    #[error("{0}")]
    Failed(String),
}

/// Makes engines of load orders: the seam behind which tests put something faulty.
pub(crate) trait Loader: Send {
    /// Maps the order's chunks and builds the engine.
    ///
    /// # Errors
    /// [`LoadError`]; nothing stays mapped.
    fn load(&mut self, order: &Load) -> Result<LoadedModel, LoadError>;
}
