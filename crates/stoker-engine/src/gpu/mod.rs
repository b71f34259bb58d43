//! Inference on a GPU, with kernels of our own that ship as machine code: see `kernels/common.cuh` for what they guarantee.
//!
//! A [`Gpu`] is opened before any model is there: its context, kernels and streams cost the first request nothing.
//! [`load_model`] builds a model over weights in device memory that somebody else owns and may still be copying: what is
//! queued waits on the device, layer by layer, for the words that the copies write ([`Arrivals`]).

mod kernels;
mod kv;
mod llama;
mod pass;
mod weights;

use std::sync::Arc;

use parking_lot::Mutex;
use stoker_checkpoint::{Architecture, Manifest};
use stoker_device::{ComputeStream, CudaDevice, Device, DeviceBuffer, DeviceError, PinnedBuffer};

pub use weights::{Arrivals, DeviceWeights, Gate};

use crate::{EngineError, EngineLimits, Model, threads::Threads};
use kernels::Kernels;

/// The oldest chip that there is machine code for.
const COMPUTE_MIN: (u32, u32) = (8, 0);

/// Prompt tokens of one step: a prompt that fits is computed in one pass while its model's weights are still arriving.
pub const PREFILL_TOKENS_PER_STEP: u32 = 2048;

/// A GPU that is ready to compute.
pub struct Gpu {
    device: Arc<CudaDevice>,
    stream: ComputeStream,
    /// For what must not wait for the other one.
    aside: ComputeStream,
    kernels: Kernels,
    workspace: Mutex<Workspace>,
}

/// Memory for activations, kept from model to model.
#[derive(Default)]
struct Workspace {
    device: Option<DeviceBuffer>,
    upload: Option<PinnedBuffer>,
}

/// Builds a model over weights in device memory.
///
/// # Errors
/// [`EngineError`]; [`EngineError::not_runnable`] tells whether another attempt could succeed.
pub fn load_model(
    gpu: &Arc<Gpu>,
    manifest: &Manifest,
    weights: DeviceWeights,
    threads: Arc<Threads>,
    limits: &EngineLimits,
) -> Result<Box<dyn Model>, EngineError> {
    let config = crate::families::config_of(manifest, limits)?;
    let tensors = weights::GpuTensors::new(manifest, weights)?;
    match config.architecture {
        Architecture::Llama => llama::load(Arc::clone(gpu), config, tensors, threads, limits),
        #[allow(unreachable_patterns, reason = "families that the CPU alone computes, once there are any")]
        architecture => Err(EngineError::NoGpuKernel { what: format!("the architecture {architecture:?}") }),
    }
}

// === impl Gpu ===

impl Gpu {
    /// Makes a device ready: loads every kernel.
    ///
    /// # Errors
    /// [`EngineError::ChipTooOld`], [`EngineError::Device`].
    pub fn open(device: Arc<CudaDevice>) -> Result<Arc<Self>, EngineError> {
        let info = device.info();
        if info.compute < COMPUTE_MIN {
            let (major, minor) = info.compute;
            return Err(EngineError::ChipTooOld { name: info.name.clone(), major, minor });
        }
        let kernels = Kernels::load(&device)?;
        let (stream, aside) = (ComputeStream::new(&device)?, ComputeStream::new(&device)?);
        let (counters, count) = kernels.counters();
        pass::fill(&aside, counters, count as u64, 0)?;
        aside.wait()?;
        Ok(Arc::new(Self { device, stream, aside, kernels, workspace: Mutex::default() }))
    }

    /// What runs on it, to be profiled.
    #[must_use]
    pub fn stream(&self) -> &ComputeStream {
        &self.stream
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}

// === impl Workspace ===

impl Workspace {
    /// Device memory of at least `bytes`. What was in it is gone when it has to grow; nothing may be under way in it.
    fn device(&mut self, device: &CudaDevice, bytes: u64) -> Result<u64, DeviceError> {
        if self.device.as_ref().is_none_or(|buffer| buffer.bytes().bytes() < bytes) {
            // The old one goes back first.
            self.device = None;
            self.device = Some(DeviceBuffer::new(device, bytes)?);
        }
        Ok(self.device.as_ref().map_or(0, DeviceBuffer::address))
    }
}

/// A pinned buffer of at least `bytes`.
fn pinned<'a>(
    buffer: &'a mut Option<PinnedBuffer>,
    device: &CudaDevice,
    bytes: usize,
) -> Result<&'a mut PinnedBuffer, DeviceError> {
    if buffer.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
        *buffer = None;
        return Ok(buffer.insert(PinnedBuffer::new(device, bytes.next_power_of_two())?));
    }
    // `insert` above is the only way to be without one.
    buffer.as_mut().ok_or(DeviceError::Closed)
}
