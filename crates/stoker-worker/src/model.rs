//! Models from the pool or from a device's memory.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use stoker_checkpoint::Manifest;
use stoker_device::SimulatedWindow;
use stoker_engine::{
    Engine, EngineError, EngineLimits, EngineStats, Places, Region, SequenceRequest, StepEngine, StepOutput,
    SubmitError, Threads, gpu::Gpu, load_model, physical_cores,
};
use stoker_io::MappedFile;
use stoker_proto::control::{DeviceSlab, FileSlots, Load};
use stoker_types::{ByteSize, clock};

use crate::{
    StandIn, WorkerDevice,
    cuda::{self, CudaOrder},
    loader::{LoadError, LoadOrder, LoadedModel, Loader},
};

/// Prompt tokens computed in one step. A step is what a running stream waits for when somebody else's prompt comes in,
/// and the time after which an abort is obeyed.
const PREFILL_TOKENS_PER_STEP: u32 = 512;

/// Threads that choose tokens while a GPU computes, at most.
const SAMPLERS: usize = 8;

/// Maps a model's memory and computes with it in place.
pub(crate) struct ModelLoader {
    pool: OwnedFd,
    device: WorkerDevice,
    /// Started ahead, like everything that needs no model.
    threads: Arc<Threads>,
    /// Ready ahead, likewise.
    gpu: Option<Arc<Gpu>>,
    standin: Option<StandIn>,
}

/// Where a model's tensors are in this process.
enum Mapped {
    /// Each file by itself.
    Files(Vec<Arc<dyn Region>>),
    /// All in one.
    Slab { region: Arc<dyn Region>, offsets: Vec<u64> },
}

/// A file in the pool, as the engine sees it.
struct PoolRegion(MappedFile);

/// A simulated device's memory, as the engine sees it.
struct WindowRegion(SimulatedWindow);

/// A stand-in whose steps take time, and that keeps a model's mappings as an engine would.
struct Paced {
    inner: stoker_engine::StandIn,
    step_time: Duration,
    _weights: Mapped,
}

// === impl ModelLoader ===

impl ModelLoader {
    /// A loader that computes with `threads` threads, or one for each core when that is 0.
    pub(crate) fn new(
        pool: OwnedFd,
        device: WorkerDevice,
        threads: u32,
        standin: Option<StandIn>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let ordered = count(threads);
        let threads = match (standin, device) {
            (Some(_), _) => 1,
            // They choose tokens.
            (None, WorkerDevice::Cuda(_)) => ordered.unwrap_or_else(|| physical_cores().min(SAMPLERS)),
            (None, WorkerDevice::Cpu | WorkerDevice::Simulated) => ordered.unwrap_or_else(physical_cores),
        };
        let gpu = match (standin, device) {
            (None, WorkerDevice::Cuda(ordinal)) => Some(cuda::open(ordinal)?),
            _ => None,
        };
        Ok(Self { pool, device, threads: Arc::new(Threads::new(threads)?), gpu, standin })
    }

    /// What computes.
    pub(crate) fn describe(&self) -> String {
        match (self.standin, self.device) {
            (Some(_), _) => "stand-in".into(),
            (None, WorkerDevice::Cuda(_)) => self.device.to_string(),
            (None, WorkerDevice::Cpu | WorkerDevice::Simulated) => {
                format!("{} {:?}, {} threads", self.device, self.threads.isa(), self.threads.count())
            }
        }
    }

    /// Whether the weights have to be there before a model is loaded. A GPU's work waits for them by itself.
    pub(crate) fn wants_weights_first(&self) -> bool {
        !matches!(self.device, WorkerDevice::Cuda(_))
    }

    /// The threads that an order wants; 0 wants those that are there.
    fn threads(&mut self, ordered: u32) -> io::Result<Arc<Threads>> {
        if let Some(threads) = count(ordered)
            && threads != self.threads.count()
        {
            self.threads = Arc::new(Threads::new(threads)?);
        }
        Ok(Arc::clone(&self.threads))
    }

    fn map(&self, load: &Load, granules: &[OwnedFd]) -> Result<Mapped, LoadError> {
        match (&load.slab, self.device) {
            (None, WorkerDevice::Cpu) => {
                let map_one = |FileSlots { len, slots }: &FileSlots| {
                    let file = MappedFile::map(&self.pool, *len, load.chunk_bytes, slots)
                        .map_err(|e| failed("mapping the weights failed", &e))?;
                    Ok(Arc::new(PoolRegion(file)) as Arc<dyn Region>)
                };
                Ok(Mapped::Files(load.files.iter().map(map_one).collect::<Result<_, LoadError>>()?))
            }
            (Some(slab), WorkerDevice::Simulated) => {
                let DeviceSlab { bytes, granule, tensors, .. } = slab;
                let window = SimulatedWindow::import(granules, ByteSize(*bytes), ByteSize(*granule))
                    .map_err(|e| failed("mapping the device's memory failed", &e))?;
                Ok(Mapped::Slab { region: Arc::new(WindowRegion(window)), offsets: tensors.clone() })
            }
            (slab, device) => {
                let ordered = if slab.is_some() { "on a device" } else { "in the pool" };
                Err(LoadError::Failed(format!("a worker of {device} was given a model {ordered}")))
            }
        }
    }

    fn on_gpu(
        &self,
        gpu: &Arc<Gpu>,
        order: LoadOrder,
        manifest: Manifest,
        limits: EngineLimits,
    ) -> Result<Box<dyn StepEngine>, LoadError> {
        let LoadOrder { load, granules, landing } = order;
        let Some(slab) = load.slab else {
            let device = self.device;
            return Err(LoadError::Failed(format!("a worker of {device} was given a model in the pool")));
        };
        let chunk_bytes = load.chunk_bytes;
        let limits =
            EngineLimits { prefill_tokens_per_step: stoker_engine::gpu::PREFILL_TOKENS_PER_STEP, ..limits };
        let order = CudaOrder { manifest, slab, granules, chunk_bytes, limits, landing };
        cuda::engine(gpu, Arc::clone(&self.threads), order)
    }
}

/// A number of threads, where one is named.
fn count(threads: u32) -> Option<usize> {
    usize::try_from(threads).ok().filter(|n| *n > 0)
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> LoadError {
    LoadError::Failed(format!("{what}: {error}"))
}

impl Loader for ModelLoader {
    fn load(&mut self, order: LoadOrder) -> Result<LoadedModel, LoadError> {
        let manifest: Manifest = serde_json::from_slice(&order.load.manifest_json)
            .map_err(|e| failed("the load order's manifest does not parse", &e))?;
        let limits = EngineLimits {
            context: order.load.context,
            sequences_max: order.load.sequences_max,
            kv_bytes: order.load.kv_bytes,
            prefill_tokens_per_step: PREFILL_TOKENS_PER_STEP,
        };
        let begun = clock::now();
        if let Some(gpu) = &self.gpu {
            let engine = self.on_gpu(gpu, order, manifest, limits)?;
            return Ok(LoadedModel { engine, map: Duration::ZERO, init: begun.elapsed() });
        }
        let weights = self.map(&order.load, &order.granules)?;
        let map = begun.elapsed();

        let begun = clock::now();
        let engine: Box<dyn StepEngine> = match self.standin {
            Some(StandIn { step_time }) => {
                let vocab_size = manifest.config.as_ref().map_or(1 << 15, |c| c.vocab_size);
                let inner = stoker_engine::StandIn::new(limits, vocab_size);
                Box::new(Paced { inner, step_time, _weights: weights })
            }
            None => {
                let threads =
                    self.threads(order.load.threads).map_err(|e| failed("starting threads failed", &e))?;
                let engine = load_model(&manifest, weights.places(), threads, &limits)
                    .and_then(|model| Engine::new(model, limits))
                    .map_err(LoadError::from)?;
                Box::new(engine)
            }
        };
        Ok(LoadedModel { engine, map, init: begun.elapsed() })
    }
}

// === impl Mapped ===

impl Mapped {
    fn places(&self) -> Places<'_> {
        match self {
            Self::Files(regions) => Places::Files(regions),
            Self::Slab { region, offsets } => Places::Slab { region, offsets },
        }
    }
}

// === impl LoadError ===

impl From<EngineError> for LoadError {
    fn from(error: EngineError) -> Self {
        if error.not_runnable() {
            Self::NotRunnable(error.to_string())
        } else {
            Self::Failed(error.to_string())
        }
    }
}

// === impl PoolRegion, WindowRegion ===

impl Region for PoolRegion {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Region for WindowRegion {
    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }
}

// === impl Paced ===

impl StepEngine for Paced {
    fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError> {
        self.inner.submit(request)
    }

    fn abort(&mut self, key: u64) {
        self.inner.abort(key);
    }

    fn step(&mut self) -> StepOutput {
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time);
        }
        self.inner.step()
    }

    fn is_idle(&self) -> bool {
        self.inner.is_idle()
    }

    fn stats(&self) -> EngineStats {
        self.inner.stats()
    }
}
