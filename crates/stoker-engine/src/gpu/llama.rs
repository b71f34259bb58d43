//! Llama 1, 2, 3, Mistral, SmolLM on a GPU: as `families/llama.rs` on the CPU.

#![expect(unsafe_code, reason = "kernels are launched with addresses")]

use std::{ops::Range, sync::Arc};

use stoker_checkpoint::{ModelConfig, Part, Role, RopeLayout};
use stoker_device::{DeviceBuffer, DeviceError, PinnedBuffer};
use stoker_types::DType;

use super::{
    Gpu,
    kernels::{Angles, Attention, Linear, Mode, Queue, Rope, Type},
    kv::GpuKv,
    pass::{Pass, PassShape, Uploaded},
    pinned,
    weights::{Gate, GpuTensors, Weight},
};
use crate::{Batch, EngineError, EngineLimits, Model, families, storage::KvShape, threads::Threads};

/// Device memory for partial results of attention at most, bytes.
const PARTIALS_BYTES: u64 = 32 << 20;

/// A model's weights in proportion to the KV that has memory before the first request: a few sequences', for a hundredth of
/// the time that the weights take to arrive.
const KV_AHEAD: u64 = 16;

/// Sequences whose logits have room on the host from the beginning on.
const LOGITS_AHEAD: u64 = 8;

struct GpuLlama {
    gpu: Arc<Gpu>,
    kind: Type,
    embedding: Weight,
    layers: Vec<Layer>,
    output_norm: Weight,
    head: Linear,
    hidden: u32,
    intermediate: u32,
    vocab_size: u32,
    norm_epsilon: f32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    rope_dims: u32,
    rope_layout: RopeLayout,
    rope_divisors: Option<Weight>,
    threads: Arc<Threads>,
    kv: GpuKv,
    /// Bytes of KV that have memory from the beginning on.
    kv_ahead: u64,
    small: Small,
    pass: Pass,
    /// Of the last pass, and how many numbers.
    logits: Option<PinnedBuffer>,
    logits_len: usize,
    arriving: Option<Arriving>,
    /// Behind everything that reads it.
    _slab: stoker_device::Slab,
}

struct Layer {
    attention_norm: Weight,
    /// Query, key, value.
    input: [Linear; 3],
    output: Linear,
    feed_forward_norm: Weight,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What the model itself keeps on the device.
struct Small {
    memory: DeviceBuffer,
    /// Within it: places for partial results, and how many are left of each to arrive.
    partials: u64,
    arrived: u64,
    places: u32,
    partial_rows: u32,
}

/// Weights that may not be there yet.
struct Arriving {
    gate: Gate,
    /// Address of the words.
    words: u64,
    /// Of each stage (the embedding, each layer, the head), the chunks that it needs and no stage before it does.
    stages: Vec<Vec<u64>>,
    /// Stages that some pass has waited for.
    passed: usize,
}

/// Activations of a pass: addresses.
#[derive(Clone, Copy)]
struct Activations {
    /// Of the upload.
    words: u64,
    /// Pairs of f32 `[rows, rotary dimensions / 2]`.
    angles: u64,
    /// f32 `[rows, hidden]`.
    x: u64,
    /// `[rows, hidden]`.
    normed: u64,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`.
    qkv: u64,
    /// `[rows, heads * head_dim]`.
    attended: u64,
    /// `[rows, intermediate]`.
    gated: u64,
    /// Likewise.
    beside: [u64; 2],
    /// f32 `[logit rows, vocab]`.
    logits: u64,
}

/// Builds a model of this family.
pub(super) fn load(
    gpu: Arc<Gpu>,
    config: &ModelConfig,
    tensors: GpuTensors<'_>,
    threads: Arc<Threads>,
    limits: &EngineLimits,
) -> Result<Box<dyn Model>, EngineError> {
    families::llama::check(config)?;
    let kind = kind_of(&tensors)?;
    let &ModelConfig {
        hidden_size: hidden,
        intermediate_size: intermediate,
        vocab_size,
        heads,
        kv_heads,
        head_dim,
        ..
    } = config;
    if !gpu.kernels.has_attention(kind, head_dim) {
        return Err(EngineError::NoGpuKernel { what: format!("heads of {head_dim} dimensions") });
    }
    let layer = |layer: u32| -> Result<Layer, EngineError> {
        let role = |part| Role::Layer(layer, part);
        let linear = |part, bias, biased, rows, cols| -> Result<Linear, EngineError> {
            Ok(Linear {
                weight: tensors.matrix(role(part), rows, cols)?,
                bias: tensors.vector_if(biased, role(bias), rows)?,
            })
        };
        let (biased, mlp_biased) = (config.attention_bias, config.mlp_bias);
        let output_biased = biased && tensors.has(role(Part::AttentionOutputBias));
        let (query, kv) = (heads * head_dim, kv_heads * head_dim);
        Ok(Layer {
            attention_norm: tensors.vector(role(Part::AttentionNorm), hidden)?,
            input: [
                linear(Part::Query, Part::QueryBias, biased, query, hidden)?,
                linear(Part::Key, Part::KeyBias, biased, kv, hidden)?,
                linear(Part::Value, Part::ValueBias, biased, kv, hidden)?,
            ],
            output: linear(Part::AttentionOutput, Part::AttentionOutputBias, output_biased, hidden, query)?,
            feed_forward_norm: tensors.vector(role(Part::FeedForwardNorm), hidden)?,
            gate: linear(Part::Gate, Part::GateBias, mlp_biased, intermediate, hidden)?,
            up: linear(Part::Up, Part::UpBias, mlp_biased, intermediate, hidden)?,
            down: linear(Part::Down, Part::DownBias, mlp_biased, hidden, intermediate)?,
        })
    };
    let embedding = tensors.matrix(Role::Embedding, vocab_size, hidden)?;
    let head = if config.tied_embeddings {
        embedding.clone()
    } else {
        tensors.matrix(Role::OutputHead, vocab_size, hidden)?
    };
    let layers: Vec<Layer> = (0..config.layers).map(layer).collect::<Result<_, _>>()?;
    let output_norm = tensors.vector(Role::OutputNorm, hidden)?;
    let rope_divisors =
        tensors.vector_if(tensors.has(Role::RopeFreqs), Role::RopeFreqs, config.rope.dims / 2)?;
    if rope_divisors.as_ref().is_some_and(|divisors| divisors.format as u32 != 0) {
        return Err(EngineError::NoGpuKernel { what: "rope frequencies of fewer than 32 bits".to_owned() });
    }
    let frequencies = families::rope::frequencies(&config.rope, None)?;
    let small = Small::new(&gpu, &frequencies, heads / kv_heads, kv_heads, head_dim)?;
    let shape =
        KvShape { layers: config.layers as usize, kv_heads: kv_heads as usize, head_dim: head_dim as usize };
    let arriving = tensors.gate.clone().map(|gate| {
        let mut stages = vec![vec![&embedding]];
        stages[0].extend(&rope_divisors);
        stages.extend(layers.iter().map(Layer::weights));
        stages.push(vec![&output_norm, &head]);
        let ranges = stages.iter().map(|weights| weights.iter().map(|weight| weight.chunks.clone()));
        let words = tensors.slab.address() + gate.arrivals().at;
        Arriving { gate, words, stages: first_needed(ranges), passed: 0 }
    });
    let mut model = GpuLlama {
        kind,
        embedding,
        layers,
        output_norm,
        head: Linear { weight: head, bias: None },
        hidden,
        intermediate,
        vocab_size,
        norm_epsilon: config.norm_epsilon,
        heads,
        kv_heads,
        head_dim,
        window: config.sliding_window.unwrap_or(0),
        rope_dims: config.rope.dims,
        rope_layout: config.rope.layout,
        rope_divisors,
        threads,
        kv: GpuKv::new(shape, kind.bytes()),
        kv_ahead: tensors.slab.bytes().bytes() / KV_AHEAD,
        small,
        pass: Pass::default(),
        logits: None,
        logits_len: 0,
        arriving,
        _slab: tensors.slab,
        gpu,
    };
    model.reserve(limits)?;
    Ok(Box::new(model))
}

/// What activations are, by what the matrices are.
fn kind_of(tensors: &GpuTensors<'_>) -> Result<Type, EngineError> {
    match (tensors.matrices(DType::F32), tensors.matrices(DType::BF16)) {
        ((true, false), _) => Ok(Type::Single),
        (_, (true, false)) => Ok(Type::BF16),
        (_, (true, true)) => {
            let what = "matrices of which some are bf16 and some are not".to_owned();
            Err(EngineError::NoGpuKernel { what })
        }
        _ => Ok(Type::F16),
    }
}

/// Of each stage, the chunks that no stage before it needs.
fn first_needed(stages: impl Iterator<Item = impl Iterator<Item = Range<u64>>>) -> Vec<Vec<u64>> {
    let mut seen = std::collections::HashSet::new();
    stages.map(|ranges| ranges.flatten().filter(|chunk| seen.insert(*chunk)).collect()).collect()
}

// === impl Layer ===

impl Layer {
    fn weights(&self) -> Vec<&Weight> {
        let Self { attention_norm, input: [query, key, value], output, feed_forward_norm, gate, up, down } =
            self;
        let linears = [query, key, value, output, gate, up, down];
        let biases = linears.iter().filter_map(|linear| linear.bias.as_ref());
        [attention_norm, feed_forward_norm]
            .into_iter()
            .chain(linears.iter().map(|linear| &linear.weight))
            .chain(biases)
            .collect()
    }
}

// === impl Small ===

impl Small {
    fn new(
        gpu: &Gpu,
        frequencies: &[f32],
        group: u32,
        kv_heads: u32,
        head_dim: u32,
    ) -> Result<Self, EngineError> {
        let partial_rows = group.min(super::kernels::ATTENTION_ROWS);
        let place = u64::from(kv_heads) * u64::from(partial_rows) * u64::from(head_dim + 2) * 4;
        let places = u32::try_from(PARTIALS_BYTES / place).unwrap_or(u32::MAX);
        let counters = u64::from(places) * u64::from(kv_heads);
        let table = (frequencies.len() as u64 * 4).next_multiple_of(256);
        let partials = (table + counters * 4).next_multiple_of(256);
        let memory = DeviceBuffer::new(&gpu.device, partials + u64::from(places) * place)?;
        let mut upload = None;
        let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
        let pinned = pinned(&mut upload, &gpu.device, bytes.len())?;
        pinned[..bytes.len()].copy_from_slice(&bytes);
        gpu.aside.bind()?;
        // SAFETY: the buffer has room for both, and the stream is waited for before anything else happens.
        let queued = unsafe {
            gpu.aside.upload(pinned, bytes.len(), memory.address()).and_then(|()| {
                let counters = usize::try_from(counters).unwrap_or(0);
                gpu.aside.fill_words(memory.address() + table, 0, counters)
            })
        };
        gpu.aside.wait()?;
        queued?;
        Ok(Self {
            arrived: memory.address() + table,
            partials: memory.address() + partials,
            memory,
            places,
            partial_rows,
        })
    }

    fn frequencies(&self) -> u64 {
        self.memory.address()
    }
}

// === impl GpuLlama ===

impl GpuLlama {
    fn qkv_width(&self) -> u32 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Lays out what a pass needs.
    fn activations(&self, base: u64, words: usize, rows: u64, logit_rows: u64) -> (Activations, u64) {
        let mut end = base;
        let mut part = |bytes: u64| {
            let at = end;
            end = (at + bytes).next_multiple_of(256);
            at
        };
        let element = self.kind.bytes();
        let width = |n: u32| rows * u64::from(n) * element;
        let separate = self.layers.iter().any(|l| l.gate.weight.format != l.up.weight.format);
        let activations = Activations {
            words: part(words as u64 * 4),
            angles: part(rows * u64::from(self.rope_dims) * 4),
            x: part(rows * u64::from(self.hidden) * 4),
            normed: part(width(self.hidden)),
            qkv: part(width(self.qkv_width())),
            attended: part(width(self.heads * self.head_dim)),
            gated: part(width(self.intermediate)),
            beside: [(); 2].map(|()| part(if separate { width(self.intermediate) } else { 0 })),
            logits: part(logit_rows * u64::from(self.vocab_size) * 4),
        };
        (activations, end - base)
    }

    /// Makes room for the largest pass, so that no request waits for it or finds none.
    fn reserve(&mut self, limits: &EngineLimits) -> Result<(), EngineError> {
        let sequences = u64::from(limits.sequences_max);
        let rows = u64::from(limits.prefill_tokens_per_step) + sequences;
        // Words of a row: what `Pass` describes of it, and its share of tables and work.
        let words = to_usize(rows * 16 + sequences * u64::from(limits.context) / 16);
        let (_, bytes) = self.activations(0, words, rows, sequences);
        let mut workspace = self.gpu.workspace.lock();
        workspace.device(&self.gpu.device, bytes)?;
        pinned(&mut workspace.upload, &self.gpu.device, words * 4)?;
        let logits = to_usize(sequences.min(LOGITS_AHEAD) * u64::from(self.vocab_size) * 4);
        pinned(&mut self.logits, &self.gpu.device, logits)?;
        Ok(())
    }

    /// Queues that what follows waits for the weights of a stage.
    fn wait_for_stage(&self, stage: usize) -> Result<(), DeviceError> {
        let Some(Arriving { words, stages, passed, .. }) = &self.arriving else { return Ok(()) };
        if stage < *passed {
            return Ok(());
        }
        let words: Vec<u64> = stages[stage].iter().map(|chunk| words + chunk * 4).collect();
        // SAFETY: the words are in the slab, which this holds; every pass waits for the stream before it returns.
        unsafe { self.gpu.stream.wait_for_words(&words) }
    }

    /// Queues a pass. Returns how many stages it passes.
    ///
    /// # Safety
    /// The activations are device memory for so many rows; the stream is waited for before any of it is used otherwise.
    unsafe fn queue(
        &self,
        batch: &Batch<'_>,
        at: &Activations,
        uploaded: &Uploaded,
    ) -> Result<usize, DeviceError> {
        let queue = Queue { stream: &self.gpu.stream, kernels: &self.gpu.kernels, kind: self.kind };
        let tokens = u32::try_from(batch.tokens.len()).unwrap_or(u32::MAX);
        let epsilon = self.norm_epsilon;
        let stride = self.qkv_width();
        let rope = Rope {
            qkv: at.qkv,
            angles: at.angles,
            places: uploaded.places,
            blocks: self.kv.address(),
            block_bytes: self.kv.block_bytes(),
            keys: 0,
            values: 0,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dims: self.rope_dims,
            stride,
            interleaved: u32::from(self.rope_layout == RopeLayout::Interleaved),
        };
        let angles = Angles {
            positions: uploaded.positions,
            frequencies: self.small.frequencies(),
            divisors: self.rope_divisors.as_ref().map_or(0, |divisors| divisors.address),
            angles: at.angles,
            pairs: self.rope_dims / 2,
        };
        #[expect(clippy::cast_precision_loss, reason = "head dimensions are small")]
        let scale = std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt();
        let attention = Attention {
            query: at.qkv,
            out: at.attended,
            work: 0,
            tables: uploaded.tables,
            blocks: self.kv.address(),
            block_bytes: self.kv.block_bytes(),
            keys: 0,
            values: 0,
            partials: self.small.partials,
            arrived: self.small.arrived,
            group: self.heads / self.kv_heads,
            kv_heads: self.kv_heads,
            query_stride: stride,
            window: self.window,
            head_dim: self.head_dim,
            partial_rows: self.small.partial_rows,
            scale,
        };
        // SAFETY: addresses and shapes belong together: the weights' were checked when the model was loaded, the
        // activations' are the caller's promise, blocks are the engine's, who sees to it that they have memory.
        unsafe {
            self.wait_for_stage(0)?;
            queue.embed(&self.embedding, uploaded.tokens, tokens, at.x)?;
            queue.angles(tokens, &angles)?;
            for (index, layer) in self.layers.iter().enumerate() {
                self.wait_for_stage(1 + index)?;
                let (keys, values) = self.kv.layer(index);
                queue.norm(at.x, None, tokens, &layer.attention_norm, epsilon, at.normed)?;
                let [query, key, value] = &layer.input;
                queue.products(&[query, key, value], at.normed, at.qkv, tokens, Mode::Store)?;
                queue.rope(tokens, &Rope { keys, values, ..rope })?;
                for ((work, works), many) in [(uploaded.few, false), (uploaded.many, true)] {
                    if works > 0 {
                        queue.attention(&Attention { keys, values, work, ..attention }, works, many)?;
                    }
                }
                queue.products(&[&layer.output], at.attended, at.x, tokens, Mode::Add)?;
                queue.norm(at.x, None, tokens, &layer.feed_forward_norm, epsilon, at.normed)?;
                queue.gated(&layer.gate, &layer.up, at.normed, at.gated, at.beside, tokens)?;
                queue.products(&[&layer.down], at.gated, at.x, tokens, Mode::Add)?;
            }
            let logit_rows = u32::try_from(batch.logit_rows.len()).unwrap_or(u32::MAX);
            if logit_rows == 0 {
                return Ok(1 + self.layers.len());
            }
            self.wait_for_stage(1 + self.layers.len())?;
            queue.norm(at.x, Some(uploaded.logit_rows), logit_rows, &self.output_norm, epsilon, at.normed)?;
            queue.products(&[&self.head], at.normed, at.logits, logit_rows, Mode::Float)?;
            Ok(2 + self.layers.len())
        }
    }
}

impl Model for GpuLlama {
    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    fn kv_block_bytes(&self) -> u64 {
        self.kv.block_bytes()
    }

    fn device_bytes(&self) -> u64 {
        self.kv.bytes() + self.small.memory.bytes().bytes()
    }

    fn open_kv(&mut self, capacity: usize) -> Result<(), EngineError> {
        self.kv.open(&self.gpu.device, capacity, self.kv_ahead)
    }

    fn grow_kv(&mut self, blocks: usize) -> Result<(), EngineError> {
        self.kv.grow(blocks)
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    fn logits(&self) -> &[f32] {
        self.logits.as_ref().map_or(&[], |logits| logits.floats(self.logits_len))
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError> {
        let (rows, logit_rows) = (batch.tokens.len(), batch.logit_rows.len());
        self.logits_len = 0;
        if rows == 0 {
            return Ok(());
        }
        assert!(batch.tokens.iter().all(|token| *token < self.vocab_size), "tokens are of the vocabulary");
        let gpu = Arc::clone(&self.gpu);
        let mut workspace = gpu.workspace.lock();
        let shape = PassShape {
            group: self.heads / self.kv_heads,
            kv_heads: self.kv_heads,
            places: if self.kind == Type::Single { 0 } else { self.small.places },
        };
        let mut pass = std::mem::take(&mut self.pass);
        pass.describe(batch, shape);
        let words = pass.words().len();
        let layout = |base| self.activations(base, words, rows as u64, logit_rows as u64);
        let base = workspace.device(&gpu.device, layout(0).1)?;
        let (at, _) = layout(base);
        let upload = pinned(&mut workspace.upload, &gpu.device, words * 4)?;
        for (bytes, word) in upload.chunks_exact_mut(4).zip(pass.words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let bytes = logit_rows * self.vocab_size as usize * 4;
        // Before anything is queued: the driver gives and takes memory when the device is idle, and a pass that waits for
        // its weights keeps it busy until somebody gets through to the driver with them.
        pinned(&mut self.logits, &gpu.device, bytes)?;

        gpu.stream.bind()?;
        // SAFETY: the workspace has room for all of it and is locked until the stream has been waited for.
        let queued = unsafe {
            gpu.stream
                .upload(upload, words * 4, at.words)
                .and_then(|()| self.queue(batch, &at, &pass.at(at.words)))
        };
        self.pass = pass;
        let queued = queued.and_then(|passed| {
            if let Some(logits) = self.logits.as_mut().filter(|_| bytes > 0) {
                // SAFETY: as above.
                unsafe { gpu.stream.download(at.logits, logits, bytes)? };
            }
            Ok(passed)
        });
        // However it went: nothing is under way afterwards.
        gpu.stream.wait()?;
        let passed = queued?;
        if let Some(arriving) = &mut self.arriving {
            arriving.gate.check()?;
            arriving.passed = arriving.passed.max(passed);
            if arriving.passed == arriving.stages.len() {
                self.arriving = None;
            }
        }
        self.logits_len = logit_rows * self.vocab_size as usize;
        Ok(())
    }
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_waited_for_by_the_first_stage_that_needs_it() {
        let stages: [&[Range<u64>]; 4] = [&[0..2, 1..2], &[1..4, 3..5], &[], &[9..10, 0..1]];
        let needed = first_needed(stages.into_iter().map(|ranges| ranges.iter().cloned()));
        assert_eq!(needed, [vec![0, 1], vec![2, 3, 4], vec![], vec![9]]);
    }
}
