//! Models for the engine's tests.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use stoker_checkpoint::{
    Manifest, ModelConfig, Part, Role, Source,
    dequant::{COMPUTABLE, dequantize},
    index,
};
use stoker_engine::{
    Batch, Engine, EngineLimits, Model, Places, Region, SequenceRequest, Span, StepEngine, Threads,
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

/// A folder of the repository's test data, which `STOKER_TEST_DATA` names on a machine without the repository.
pub(crate) fn data(name: &str) -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    std::env::var_os("STOKER_TEST_DATA").map_or_else(here, PathBuf::from).join(name)
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

    /// A model of random numbers whose matrices are of every type that the engine computes with, in turns from
    /// `COMPUTABLE[first]` on: each type appears, and which matrix has it depends on `first`. Wide enough for the types
    /// with blocks of 256.
    pub(crate) fn of_every_type(first: usize) -> Self {
        let mut manifest = Self::read(&data("tiny-llama3")).manifest;
        let config = manifest.config.as_mut().unwrap();
        (config.hidden_size, config.intermediate_size, config.head_dim) = (256, 512, 64);
        let mut random = Random(first as u64);
        let mut file = Vec::new();
        let mut types = COMPUTABLE.iter().cycle().skip(first);
        for tensor in &mut manifest.tensors {
            tensor.shape = shape(config, tensor.role.unwrap());
            tensor.dtype = if tensor.shape.len() == 2 { *types.next().unwrap() } else { DType::F32 };
            (tensor.file, tensor.offset) = (0, file.len() as u64);
            tensor.len = tensor.dtype.bytes_of(tensor.shape.iter().product()).unwrap();
            random.numbers(tensor.dtype, usize::try_from(tensor.len).unwrap(), &mut file);
        }
        let matrices = manifest.tensors.iter().filter(|tensor| tensor.shape.len() == 2);
        assert!(COMPUTABLE.iter().all(|dtype| matrices.clone().any(|tensor| tensor.dtype == *dtype)));
        manifest.files.truncate(1);
        Self { manifest, regions: vec![Arc::new(file)] }
    }

    /// As [`of_every_type`](Self::of_every_type), with all matrices of one type.
    pub(crate) fn of_type(dtype: DType) -> Self {
        let first = COMPUTABLE.iter().position(|other| *other == dtype).unwrap();
        let Self { mut manifest, .. } = Self::of_every_type(first);
        let mut random = Random(first as u64);
        let mut file = Vec::new();
        for tensor in &mut manifest.tensors {
            if tensor.shape.len() == 2 {
                tensor.dtype = dtype;
            }
            tensor.offset = file.len() as u64;
            tensor.len = tensor.dtype.bytes_of(tensor.shape.iter().product()).unwrap();
            random.numbers(tensor.dtype, usize::try_from(tensor.len).unwrap(), &mut file);
        }
        manifest.files[0].identity.len = file.len() as u64;
        Self { manifest, regions: vec![Arc::new(file)] }
    }

    /// The same numbers, 32 bits wide.
    pub(crate) fn dequantised(&self) -> Self {
        let mut manifest = self.manifest.clone();
        let mut file = Vec::new();
        for tensor in &mut manifest.tensors {
            let from = usize::try_from(tensor.offset).unwrap();
            let bytes = &self.regions[tensor.file as usize].bytes()[from..];
            let mut numbers = vec![0.0; usize::try_from(tensor.shape.iter().product::<u64>()).unwrap()];
            let len = usize::try_from(tensor.len).unwrap();
            dequantize(tensor.dtype, &bytes[..len], &mut numbers).unwrap();
            (tensor.dtype, tensor.file, tensor.offset) = (DType::F32, 0, file.len() as u64);
            file.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            tensor.len = file.len() as u64 - tensor.offset;
        }
        manifest.files.truncate(1);
        manifest.files[0].identity.len = file.len() as u64;
        Self { manifest, regions: vec![Arc::new(file)] }
    }

    pub(crate) fn model(&self, threads: usize) -> Box<dyn Model> {
        let threads = Arc::new(Threads::new(threads).unwrap());
        load_model(&self.manifest, Places::Files(&self.regions), threads, &LIMITS)
            .expect("the model can be computed")
    }

    pub(crate) fn engine(&self, limits: EngineLimits) -> Engine {
        Engine::new(self.model(2), limits).unwrap()
    }

    pub(crate) fn block_bytes(&self) -> u64 {
        BLOCK_TOKENS as u64 * self.manifest.config.as_ref().unwrap().kv_bytes_per_token()
    }
}

/// A tensor's shape, as [`Role`] and [`Part`] document it.
fn shape(config: &ModelConfig, role: Role) -> Vec<u64> {
    let ModelConfig { hidden_size, intermediate_size, heads, kv_heads, head_dim, vocab_size, .. } = *config;
    let dims = match role {
        Role::Embedding | Role::OutputHead => vec![vocab_size, hidden_size],
        Role::OutputNorm => vec![hidden_size],
        Role::RopeFreqs => vec![head_dim / 2],
        Role::Layer(_, part) => match part {
            Part::AttentionNorm | Part::FeedForwardNorm | Part::AttentionOutputBias | Part::DownBias => {
                vec![hidden_size]
            }
            Part::Query => vec![heads * head_dim, hidden_size],
            Part::QueryBias => vec![heads * head_dim],
            Part::Key | Part::Value => vec![kv_heads * head_dim, hidden_size],
            Part::KeyBias | Part::ValueBias => vec![kv_heads * head_dim],
            Part::AttentionOutput => vec![hidden_size, heads * head_dim],
            Part::Gate | Part::Up => vec![intermediate_size, hidden_size],
            Part::GateBias | Part::UpBias => vec![intermediate_size],
            Part::Down => vec![hidden_size, intermediate_size],
        },
    };
    dims.into_iter().map(u64::from).collect()
}

/// Where a block has its f16 scales.
fn scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        other => panic!("{other} has no scales"),
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

    /// Uniform in -1..1.
    #[expect(clippy::cast_precision_loss, reason = "fewer bits than an f32 has")]
    fn float(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }

    /// Appends `bytes` bytes of a type: numbers of a size that models have; of quantised types any bits with such scales.
    fn numbers(&mut self, dtype: DType, bytes: usize, out: &mut Vec<u8>) {
        let end = out.len() + bytes;
        let half = |v: f32| half::f16::from_f32(v).to_le_bytes();
        while out.len() < end {
            match dtype {
                DType::F32 => out.extend((self.float() * 0.2).to_le_bytes()),
                DType::F16 => out.extend(half(self.float() * 0.2)),
                DType::BF16 => out.extend(half::bf16::from_f32(self.float() * 0.2).to_le_bytes()),
                _ => {
                    let block = out.len();
                    let len = usize::try_from(dtype.block_bytes()).unwrap();
                    out.extend((0..len).map(|_| u8::try_from(self.below(256)).unwrap()));
                    // Elements of K types are scaled twice.
                    let largest = match dtype {
                        DType::Q4_K | DType::Q5_K => 0.0005,
                        DType::Q6_K => 0.0002,
                        _ => 0.005,
                    };
                    for at in scales(dtype) {
                        let scale = half(self.float() * largest);
                        out[block + at..block + at + 2].copy_from_slice(&scale);
                    }
                }
            }
        }
    }

    pub(crate) fn ids(&mut self, length: usize, vocab_size: usize) -> Vec<u32> {
        (0..length).map(|_| u32::try_from(self.below(vocab_size)).unwrap()).collect()
    }
}

/// Logits of the rows `from ..` of one sequence, computed in one pass.
pub(crate) fn logits_from(model: &mut dyn Model, tokens: &[u32], from: usize) -> Vec<Vec<f32>> {
    logits_in_chunks(model, tokens, from, usize::MAX)
}

/// As [`logits_from`], in passes of at most `rows`.
pub(crate) fn logits_in_chunks(
    model: &mut dyn Model,
    tokens: &[u32],
    from: usize,
    rows: usize,
) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..u32::try_from(tokens.len().div_ceil(BLOCK_TOKENS)).unwrap()).collect();
    model.open_kv(blocks.len()).unwrap();
    model.grow_kv(blocks.len()).unwrap();
    let (mut all, mut start) = (Vec::new(), 0);
    for tokens in tokens.chunks(rows) {
        let spans = [Span { rows: tokens.len(), start, blocks: &blocks }];
        let logit_rows: Vec<usize> = (from.saturating_sub(start)..tokens.len()).collect();
        model.forward(&Batch { tokens, spans: &spans, logit_rows: &logit_rows }).unwrap();
        all.extend(model.logits().chunks_exact(model.vocab_size() as usize).map(<[f32]>::to_vec));
        start += tokens.len();
    }
    all
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
