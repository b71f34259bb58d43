//! The engine for GPUs: where it plugs in.

use std::{os::fd::OwnedFd, sync::Arc};

use stoker_checkpoint::Manifest;
use stoker_engine::{EngineLimits, StepEngine};
use stoker_proto::control::DeviceSlab;
use tokio::sync::watch;

use crate::loader::{Landing, LoadError};

/// A model on a GPU, to be computed.
pub(crate) struct CudaOrder {
    /// The GPU's number in this process.
    pub(crate) ordinal: u32,
    /// Configuration and tensors.
    pub(crate) manifest: Arc<Manifest>,
    /// The slab's length and granule, each tensor's place in it, and where the gate is.
    pub(crate) slab: DeviceSlab,
    /// The slab's memory.
    pub(crate) granules: Vec<OwnedFd>,
    /// Context, sequences, KV cache.
    pub(crate) limits: EngineLimits,
    /// Whether the weights are there. When they never will be, the worker drops the engine between two steps; a step that
    /// waits for them has to end by itself.
    pub(crate) landing: watch::Receiver<Landing>,
}

/// The engine of a model on a GPU. It may be returned before the weights are there, if its work waits for them.
///
/// # Errors
/// [`LoadError::NotRunnable`]: this build computes on the CPU only.
pub(crate) fn cuda_engine(order: CudaOrder) -> Result<Box<dyn StepEngine>, LoadError> {
    let CudaOrder { ordinal, manifest, slab, granules, limits, landing } = order;
    Err(LoadError::NotRunnable(format!(
        "{} tensors in {} granules of cuda:{ordinal} (gate at {}, {} bytes of KV cache, weights {:?}): this build has no \
         engine for GPUs; say `devices = \"cpu\"`",
        manifest.tensors.len(),
        granules.len(),
        slab.gate,
        limits.kv_bytes,
        *landing.borrow(),
    )))
}
