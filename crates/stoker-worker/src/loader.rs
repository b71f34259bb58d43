//! From a load order to an engine.

use std::{os::fd::OwnedFd, time::Duration};

use stoker_engine::StepEngine;
use stoker_proto::control::Load;
use tokio::sync::watch;

/// What the node wants to be served.
pub(crate) struct LoadOrder {
    /// Its words.
    pub(crate) load: Load,
    /// The granules of its slab, for a model on a device.
    pub(crate) granules: Vec<OwnedFd>,
    /// Whether its weights are there. Those in the pool always are.
    pub(crate) landing: watch::Receiver<Landing>,
}

/// How far the delivery of a model to a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Landing {
    /// On its way.
    Coming,
    /// Everything is there and was checked.
    Landed,
    /// Not there, and never will be.
    Failed(String),
}

/// A model that was taken.
pub(crate) struct LoadedModel {
    /// Its engine. Dropping it drops every mapping and all private memory.
    pub(crate) engine: Box<dyn StepEngine>,
    /// Mapping its memory.
    pub(crate) map: Duration,
    /// Building the model's view over it.
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
    /// Its weights didn't arrive.
    #[error("its weights did not arrive on the device: {0}")]
    NotDelivered(String),
}

/// Makes engines of load orders: the seam behind which tests put something faulty.
pub(crate) trait Loader: Send {
    /// Maps the order's memory and builds the engine.
    ///
    /// # Errors
    /// [`LoadError`]; nothing stays mapped.
    fn load(&mut self, order: LoadOrder) -> Result<LoadedModel, LoadError>;
}

// === impl Landing ===

impl Landing {
    /// # Errors
    /// [`LoadError::NotDelivered`] when the weights will never be there.
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        match self {
            Self::Coming | Self::Landed => Ok(()),
            Self::Failed(why) => Err(LoadError::NotDelivered(why.clone())),
        }
    }
}
