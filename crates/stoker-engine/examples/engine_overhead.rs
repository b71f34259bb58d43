//! What an engine's step costs outside of the model's forward pass.
//!
//!     cargo run --release -p stoker-engine --example engine_overhead -- MODEL [THREADS]
#![expect(clippy::print_stdout, reason = "a measuring program")]

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use stoker_checkpoint::{Source, index};
use stoker_engine::{
    Batch, Engine, EngineError, EngineLimits, Model, Places, Region, SequenceRequest, StepEngine, Threads,
    load_model, physical_cores,
};
use stoker_types::{Sampling, clock};

/// A model that adds up the time of its passes.
struct Timed {
    model: Box<dyn Model>,
    forward_ns: Arc<AtomicU64>,
}

impl Model for Timed {
    fn vocab_size(&self) -> u32 {
        self.model.vocab_size()
    }

    fn kv_block_bytes(&self) -> u64 {
        self.model.kv_block_bytes()
    }

    fn open_kv(&mut self, capacity: usize) -> Result<(), EngineError> {
        self.model.open_kv(capacity)
    }

    fn grow_kv(&mut self, blocks: usize) -> Result<(), EngineError> {
        self.model.grow_kv(blocks)
    }

    fn threads(&self) -> &Threads {
        self.model.threads()
    }

    fn logits(&self) -> &[f32] {
        self.model.logits()
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError> {
        let start = clock::now();
        let computed = self.model.forward(batch);
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.forward_ns.fetch_add(ns, Ordering::Relaxed);
        computed
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: overhead MODEL [THREADS]")?);
    let threads = arguments.next().map_or(Ok(physical_cores()), |n| n.parse())?;
    let manifest = index(&path, Source { uri: path.display().to_string(), revision: None })?;
    let mut regions: Vec<Arc<dyn Region>> = Vec::new();
    for file in 0..manifest.files.len() {
        regions.push(Arc::new(std::fs::read(manifest.file_path(&path, file))?));
    }
    let limits =
        EngineLimits { context: 2048, sequences_max: 8, kv_bytes: 1 << 30, prefill_tokens_per_step: 256 };
    let forward_ns = Arc::new(AtomicU64::new(0));
    let sampled = Sampling { temperature: 0.8, top_p: 0.95, logprobs: Some(5), ..Sampling::default() };
    for (what, sequences, prompt, tokens, sampling) in [
        ("prefill of 512", 1, 512, 1, Sampling { temperature: 0.0, ..Sampling::default() }),
        ("decode of 1, greedy", 1, 16, 64, Sampling { temperature: 0.0, ..Sampling::default() }),
        ("decode of 1, sampled, logprobs", 1, 16, 64, sampled.clone()),
        ("decode of 8, greedy", 8, 16, 64, Sampling { temperature: 0.0, ..Sampling::default() }),
        ("decode of 8, sampled, logprobs", 8, 16, 64, sampled),
    ] {
        let threads = Arc::new(Threads::new(threads)?);
        let start = clock::now();
        let model = load_model(&manifest, Places::Files(&regions), threads, &limits)?;
        let load = start.elapsed();
        let mut engine = Engine::new(Box::new(Timed { model, forward_ns: Arc::clone(&forward_ns) }), limits)?;
        for key in 0..sequences {
            engine.submit(SequenceRequest {
                key,
                prompt: (0..prompt).map(|i| 300 + i + 7 * u32::try_from(key).unwrap_or(0)).collect(),
                generated: Vec::new(),
                tokens_max: tokens,
                stop_ids: Vec::new(),
                sampling: sampling.clone(),
                cache_salt: Vec::new(),
            })?;
        }
        forward_ns.store(0, Ordering::Relaxed);
        let start = clock::now();
        while !engine.is_idle() {
            engine.step();
        }
        let total = start.elapsed();
        let forward = Duration::from_nanos(forward_ns.load(Ordering::Relaxed));
        let outside = total.saturating_sub(forward);
        println!(
            "{what}: load {load:.1?}, {total:.1?} in {} steps, outside of the model {outside:.1?} = {:.2} %",
            engine.stats().steps,
            100.0 * outside.as_secs_f64() / total.as_secs_f64()
        );
    }
    Ok(())
}
