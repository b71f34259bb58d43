//! Models for the engine's tests.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use stoker_checkpoint::{Manifest, Source, index};
use stoker_engine::{
    Batch, Engine, EngineLimits, KvStorage, Model, Region, SequenceRequest, Span, StepEngine, Threads,
    kv::BLOCK_TOKENS, load_model,
};
use stoker_types::{DType, Sampling};

/// A checkpoint with its weight files in memory.
pub(crate) struct Checkpoint {
    pub(crate) manifest: Manifest,
    pub(crate) regions: Vec<Arc<dyn Region>>,
}

/// What a sequence brought: ids, and the bits of their log probabilities.
pub(crate) type Tokens = Vec<(u32, u32)>;

/// A small generator, so that a failure repeats.
pub(crate) struct Random(pub(crate) u64);

/// A folder of the repository's test data.
pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(name)
}

pub(crate) const LIMITS: EngineLimits =
    EngineLimits { context: 256, sequences_max: 8, kv_bytes: 64 << 20, prefill_tokens_per_step: 64 };

// === impl Checkpoint ===

impl Checkpoint {
    pub(crate) fn read(path: &Path) -> Self {
        let source = Source { uri: path.display().to_string(), revision: None };
        let manifest = index(path, source).expect("the checkpoint can be indexed");
        let regions = (0..manifest.files.len())
            .map(|file| {
                let path = manifest.file_path(path, file);
                let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                Arc::new(bytes) as Arc<dyn Region>
            })
            .collect();
        Self { manifest, regions }
    }

    /// The same model with its matrices in another type.
    pub(crate) fn quantised(mut self, dtype: DType) -> Self {
        let mut file = Vec::new();
        for tensor in &mut self.manifest.tensors {
            let bytes = self.regions[tensor.file as usize].bytes();
            let from = usize::try_from(tensor.offset).unwrap();
            let bytes = &bytes[from..from + usize::try_from(tensor.len).unwrap()];
            (tensor.file, tensor.offset) = (0, file.len() as u64);
            if tensor.shape.len() == 2 {
                assert_eq!(tensor.dtype, DType::F32);
                let values: Vec<f32> =
                    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                values.as_chunks::<32>().0.iter().for_each(|block| quantise(dtype, block, &mut file));
                tensor.dtype = dtype;
            } else {
                file.extend_from_slice(bytes);
            }
            tensor.len = file.len() as u64 - tensor.offset;
        }
        self.manifest.files.truncate(1);
        self.regions = vec![Arc::new(file)];
        self
    }

    pub(crate) fn model(&self, threads: usize) -> Box<dyn Model> {
        let threads = Arc::new(Threads::new(threads).unwrap());
        load_model(&self.manifest, &self.regions, threads, &LIMITS).expect("the model can be computed")
    }

    pub(crate) fn engine(&self, limits: EngineLimits) -> Engine {
        Engine::new(self.model(2), limits).unwrap()
    }

    pub(crate) fn block_bytes(&self) -> u64 {
        BLOCK_TOKENS as u64 * self.manifest.config.as_ref().unwrap().kv_bytes_per_token()
    }
}

/// Blocks of Q4_1 and Q8_0, as ggml makes them.
#[expect(clippy::cast_possible_truncation, reason = "rounded and in range")]
fn quantise(dtype: DType, values: &[f32; 32], out: &mut Vec<u8>) {
    let half = |v: f32| half::f16::from_f32(v).to_le_bytes();
    let largest = values.iter().copied().fold(f32::MIN, f32::max);
    let smallest = values.iter().copied().fold(f32::MAX, f32::min);
    match dtype {
        DType::Q8_0 => {
            let d = largest.max(-smallest) / 127.0;
            out.extend(half(d));
            out.extend(values.iter().map(|v| (v / d).round() as i8 as u8));
        }
        DType::Q4_1 => {
            let d = (largest - smallest) / 15.0;
            out.extend(half(d));
            out.extend(half(smallest));
            let q = |v: f32| ((v - smallest) / d).round().clamp(0.0, 15.0) as u8;
            out.extend((0..16).map(|i| q(values[i]) | q(values[i + 16]) << 4));
        }
        other => panic!("no quantiser for {other} here"),
    }
}

// === impl Random ===

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    pub(crate) fn ids(&mut self, length: usize, vocab_size: usize) -> Vec<u32> {
        (0..length).map(|_| u32::try_from(self.below(vocab_size)).unwrap()).collect()
    }
}

/// Logits of the rows `from ..` of one sequence, computed in one pass.
pub(crate) fn logits_from(model: &mut dyn Model, tokens: &[u32], from: usize) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..u32::try_from(tokens.len().div_ceil(BLOCK_TOKENS)).unwrap()).collect();
    let mut kv = KvStorage::new(model.kv_shape(), blocks.len()).unwrap();
    kv.ensure(blocks.len());
    let spans = [Span { rows: tokens.len(), start: 0, blocks: &blocks }];
    let logit_rows: Vec<usize> = (from..tokens.len()).collect();
    let mut logits = Vec::new();
    model.forward(&Batch { tokens, spans: &spans, logit_rows: &logit_rows }, &mut kv, &mut logits);
    logits.chunks_exact(model.vocab_size() as usize).map(<[f32]>::to_vec).collect()
}

pub(crate) fn greedy(key: u64, prompt: Vec<u32>, tokens_max: u32) -> SequenceRequest {
    SequenceRequest {
        key,
        prompt,
        generated: Vec::new(),
        tokens_max,
        stop_ids: Vec::new(),
        sampling: Sampling { temperature: 0.0, logprobs: Some(0), ..Sampling::default() },
        cache_salt: Vec::new(),
    }
}

/// Runs an engine until it is idle and returns what each of the keys `0..n` brought.
pub(crate) fn run(engine: &mut Engine, n: usize) -> Vec<Tokens> {
    let mut tokens = vec![Tokens::new(); n];
    while !engine.is_idle() {
        let output = engine.step();
        assert!(output.failures.is_empty(), "{:?}", output.failures);
        for token in output.tokens {
            let bits = token.logprob.map_or(0, f32::to_bits);
            tokens[usize::try_from(token.key).unwrap()].push((token.id, bits));
        }
    }
    tokens
}
