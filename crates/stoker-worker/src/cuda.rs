//! Models on a GPU.

use std::{io, os::fd::OwnedFd, sync::Arc};

use stoker_checkpoint::Manifest;
use stoker_device::{CudaDevice, CudaOptions};
use stoker_engine::{
    Engine, EngineLimits, StepEngine, Threads,
    gpu::{self, Arrivals, DeviceWeights, Gate, Gpu},
};
use stoker_proto::control::DeviceSlab;
use stoker_types::ByteSize;
use tokio::sync::watch;

use crate::loader::{Landing, LoadError};

/// A model on a GPU, to be computed.
pub(crate) struct CudaOrder {
    /// Configuration and tensors.
    pub(crate) manifest: Manifest,
    /// The slab's length and granule, each tensor's place in it, and where the gate is.
    pub(crate) slab: DeviceSlab,
    /// The slab's memory.
    pub(crate) granules: Vec<OwnedFd>,
    /// Bytes of a chunk of a file, which the gate has a word for each.
    pub(crate) chunk_bytes: u64,
    /// Context, sequences, KV cache.
    pub(crate) limits: EngineLimits,
    /// Whether the weights are there.
    pub(crate) landing: watch::Receiver<Landing>,
}

/// Makes a GPU ready, before any model is there: context, kernels, streams.
///
/// # Errors
/// What the GPU or its driver lacks, in words.
pub(crate) fn open(ordinal: u32) -> Result<Arc<Gpu>, Box<dyn std::error::Error>> {
    // The node copies; this process does not.
    let options = CudaOptions { streams: 1, depth: 1, ..CudaOptions::default() };
    Ok(Gpu::open(Arc::new(CudaDevice::open(ordinal, &options)?))?)
}

/// The engine of a model on a GPU. Returned before the weights are there: its kernels wait for them.
///
/// # Errors
/// [`LoadError`]; nothing stays mapped.
pub(crate) fn engine(
    gpu: &Arc<Gpu>,
    threads: Arc<Threads>,
    order: CudaOrder,
) -> Result<Box<dyn StepEngine>, LoadError> {
    let CudaOrder { manifest, slab, granules, chunk_bytes, limits, landing } = order;
    let failed = |what: &str, error: &dyn std::fmt::Display| LoadError::Failed(format!("{what}: {error}"));
    let DeviceSlab { bytes, granule, granules: _, tensors, gate: at, number: _ } = slab;
    let slab = gpu
        .device()
        .import(&granules, ByteSize(bytes), ByteSize(granule))
        .map_err(|error| failed("mapping the device's memory failed", &error))?;
    if chunk_bytes == 0 {
        return Err(LoadError::Failed("the load order says that chunks have no bytes".to_owned()));
    }
    let coming = *landing.borrow() == Landing::Coming;
    let words = manifest.files.iter().map(|file| file.identity.len.div_ceil(chunk_bytes)).sum();
    let gate = coming.then(|| Gate::new(&slab, Arrivals { at, words, chunk_bytes }));
    if let Some(gate) = &gate {
        watch_landing(gate.clone(), Arc::clone(gpu), landing)
            .map_err(|error| failed("starting a thread failed", &error))?;
    }
    let weights = DeviceWeights { slab, tensors, gate };
    let model = gpu::load_model(gpu, &manifest, weights, threads, &limits)?;
    Ok(Box::new(Engine::new(model, limits)?))
}

/// Lets kernels go that wait for weights which will never come: their delivery failed, or whoever copied them is gone. The
/// engine's thread can't: it waits for the kernels.
fn watch_landing(gate: Gate, gpu: Arc<Gpu>, mut landing: watch::Receiver<Landing>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let watch = move || {
        let ended = runtime.block_on(landing.wait_for(|landing| *landing != Landing::Coming));
        let landed = ended.is_ok_and(|landing| *landing == Landing::Landed);
        if !landed && let Err(error) = gate.fail(&gpu) {
            // The device is in a state that only a new process gets it out of, and the engine may wait for ever.
            panic!("what waits for weights can't be let go: {error}");
        }
    };
    std::thread::Builder::new().name("landing".into()).spawn(watch)?;
    Ok(())
}
