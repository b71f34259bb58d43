//! Models from the pool.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use stoker_checkpoint::Manifest;
use stoker_engine::{
    Engine, EngineError, EngineLimits, EngineStats, Region, SequenceRequest, StepEngine, StepOutput,
    SubmitError, Threads, load_model, physical_cores,
};
use stoker_io::MappedFile;
use stoker_proto::control::{FileSlots, Load};
use stoker_types::clock;

use crate::{
    StandIn,
    loader::{LoadError, LoadedModel, Loader},
};

/// Prompt tokens computed in one step. A step is what a running stream waits for when somebody else's prompt comes in,
/// and the time after which an abort is obeyed.
const PREFILL_TOKENS_PER_STEP: u32 = 512;

/// Maps a model's chunks from the pool and computes with them in place.
pub(crate) struct PoolLoader {
    pool: OwnedFd,
    /// Started ahead, like everything that needs no model.
    threads: Arc<Threads>,
    standin: Option<StandIn>,
}

/// A file in the pool, as the engine sees it.
struct PoolRegion(MappedFile);

/// A stand-in whose steps take time, and that keeps a model's mappings as an engine would.
struct Paced {
    inner: stoker_engine::StandIn,
    step_time: Duration,
    _regions: Vec<Arc<dyn Region>>,
}

// === impl PoolLoader ===

impl PoolLoader {
    /// A loader that computes with `threads` threads, or one for each core when that is 0.
    pub(crate) fn new(pool: OwnedFd, threads: u32, standin: Option<StandIn>) -> io::Result<Self> {
        let threads = if standin.is_some() { 1 } else { count(threads).unwrap_or_else(physical_cores) };
        Ok(Self { pool, threads: Arc::new(Threads::new(threads)?), standin })
    }

    /// What computes.
    pub(crate) fn device(&self) -> String {
        match self.standin {
            Some(_) => "stand-in".into(),
            None => format!("cpu {:?}, {} threads", self.threads.isa(), self.threads.count()),
        }
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
}

/// A number of threads, where one is named.
fn count(threads: u32) -> Option<usize> {
    usize::try_from(threads).ok().filter(|n| *n > 0)
}

impl Loader for PoolLoader {
    fn load(&mut self, order: &Load) -> Result<LoadedModel, LoadError> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| LoadError::Failed(format!("{what}: {error}"));
        let begun = clock::now();
        let mut regions: Vec<Arc<dyn Region>> = Vec::with_capacity(order.files.len());
        for FileSlots { len, slots } in &order.files {
            let file = MappedFile::map(&self.pool, *len, order.chunk_bytes, slots)
                .map_err(|e| failed("mapping the weights failed", &e))?;
            regions.push(Arc::new(PoolRegion(file)));
        }
        let map = begun.elapsed();

        let begun = clock::now();
        let manifest: Manifest = serde_json::from_slice(&order.manifest_json)
            .map_err(|e| failed("the load order's manifest does not parse", &e))?;
        let limits = EngineLimits {
            context: order.context,
            sequences_max: order.sequences_max,
            kv_bytes: order.kv_bytes,
            prefill_tokens_per_step: PREFILL_TOKENS_PER_STEP,
        };
        let engine: Box<dyn StepEngine> = match self.standin {
            Some(StandIn { step_time }) => {
                let vocab_size = manifest.config.as_ref().map_or(1 << 15, |c| c.vocab_size);
                let inner = stoker_engine::StandIn::new(limits, vocab_size);
                Box::new(Paced { inner, step_time, _regions: regions })
            }
            None => {
                let threads =
                    self.threads(order.threads).map_err(|e| failed("starting threads failed", &e))?;
                let engine = load_model(&manifest, &regions, threads, &limits)
                    .and_then(|model| Engine::new(model, limits))
                    .map_err(LoadError::from)?;
                Box::new(engine)
            }
        };
        Ok(LoadedModel { engine, map, init: begun.elapsed() })
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

// === impl PoolRegion ===

impl Region for PoolRegion {
    fn bytes(&self) -> &[u8] {
        &self.0
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
