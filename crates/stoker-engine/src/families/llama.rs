//! Llama 1, 2, 3, Mistral, SmolLM 1 and 2: RMS norm, rotary embedding, grouped-query attention, gated feed-forward.

use std::sync::Arc;

use stoker_checkpoint::{ModelConfig, Part, Role, RopeLayout};

use super::{rope, tensors::Tensors};
use crate::{
    Batch, EngineError, Model,
    kernels::{
        Activations, AttentionRow, AttentionShape, RopeAngles, Scratch, add, attention, embed, linear,
        rms_norm, rope as rotate, silu_mul,
    },
    kv::BLOCK_TOKENS,
    storage::{KvLayer, KvShape, KvStorage},
    threads::Threads,
    weight::Weight,
};

/// A model of the family.
struct Llama {
    embedding: Weight,
    layers: Vec<Layer>,
    output_norm: Vec<f32>,
    /// `None`: the embedding.
    head: Option<Weight>,
    hidden: usize,
    intermediate: usize,
    vocab_size: u32,
    norm_epsilon: f32,
    attention: AttentionShape,
    inverse_frequencies: Vec<f32>,
    rope_layout: RopeLayout,
    threads: Arc<Threads>,
    kv: KvStorage,
    /// Of the last pass.
    logits: Vec<f32>,
    buffers: Buffers,
}

/// A projection and its bias.
struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

struct Layer {
    attention_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    feed_forward_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Activations of a pass, `[rows, ...]`; kept so that a step allocates nothing once it has met its largest batch.
#[derive(Default)]
struct Buffers {
    /// The residual stream.
    x: Vec<f32>,
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    /// What a block adds to the residual stream.
    delta: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gated: Vec<f32>,
    positions: Vec<u32>,
    angles: RopeAngles,
    scratch: Scratch,
}

/// Builds a model of this family.
pub(super) fn load(
    config: &ModelConfig,
    tensors: &Tensors<'_>,
    threads: Arc<Threads>,
) -> Result<Box<dyn Model>, EngineError> {
    check(config)?;
    let hidden = config.hidden_size as usize;
    let intermediate = config.intermediate_size as usize;
    let vocab = config.vocab_size as usize;
    let (heads, kv_heads) = (config.heads as usize, config.kv_heads as usize);
    let head_dim = config.head_dim as usize;
    let (query, kv) = (heads * head_dim, kv_heads * head_dim);

    let layer = |layer: u32| -> Result<Layer, EngineError> {
        let role = |part| Role::Layer(layer, part);
        let linear = |part, bias, biased, rows, cols| -> Result<Linear, EngineError> {
            Ok(Linear {
                weight: tensors.matrix(role(part), rows, cols)?,
                bias: tensors.vector_if(biased, role(bias), rows)?,
            })
        };
        let (biased, mlp_biased) = (config.attention_bias, config.mlp_bias);
        // Llama's attention bias includes the output projection, other models' of the family doesn't.
        let output_biased = biased && tensors.has(role(Part::AttentionOutputBias));
        Ok(Layer {
            attention_norm: tensors.vector(role(Part::AttentionNorm), hidden)?,
            query: linear(Part::Query, Part::QueryBias, biased, query, hidden)?,
            key: linear(Part::Key, Part::KeyBias, biased, kv, hidden)?,
            value: linear(Part::Value, Part::ValueBias, biased, kv, hidden)?,
            output: linear(Part::AttentionOutput, Part::AttentionOutputBias, output_biased, hidden, query)?,
            feed_forward_norm: tensors.vector(role(Part::FeedForwardNorm), hidden)?,
            gate: linear(Part::Gate, Part::GateBias, mlp_biased, intermediate, hidden)?,
            up: linear(Part::Up, Part::UpBias, mlp_biased, intermediate, hidden)?,
            down: linear(Part::Down, Part::DownBias, mlp_biased, hidden, intermediate)?,
        })
    };
    let factors =
        tensors.vector_if(tensors.has(Role::RopeFreqs), Role::RopeFreqs, config.rope.dims as usize / 2)?;
    let head =
        if config.tied_embeddings { None } else { Some(tensors.matrix(Role::OutputHead, vocab, hidden)?) };
    #[expect(clippy::cast_precision_loss, reason = "head dimensions are small")]
    let scale = 1.0 / (head_dim as f32).sqrt();
    Ok(Box::new(Llama {
        embedding: tensors.matrix(Role::Embedding, vocab, hidden)?,
        layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
        output_norm: tensors.vector(Role::OutputNorm, hidden)?,
        head,
        hidden,
        intermediate,
        vocab_size: config.vocab_size,
        norm_epsilon: config.norm_epsilon,
        attention: AttentionShape {
            heads,
            kv_heads,
            head_dim,
            block_size: BLOCK_TOKENS,
            window: config.sliding_window.map(|window| window as usize),
            scale,
        },
        inverse_frequencies: rope::frequencies(&config.rope, factors.as_deref())?,
        rope_layout: config.rope.layout,
        threads,
        kv: KvStorage::new(KvShape { layers: config.layers as usize, kv_heads, head_dim }, 0)?,
        logits: Vec::new(),
        buffers: Buffers::default(),
    }))
}

/// What the kernels take for granted.
pub(crate) fn check(config: &ModelConfig) -> Result<(), EngineError> {
    /// Query heads that share a key and value head, at most: a fixed array in the attention kernel.
    const GROUP_MAX: u32 = 64;
    let ModelConfig {
        architecture: _,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        context_trained: _,
        norm_epsilon,
        rope,
        sliding_window,
        tied_embeddings: _,
        attention_bias: _,
        mlp_bias: _,
    } = config;
    let mut what = None;
    for (name, value) in [
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("layers", layers),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("head_dim", head_dim),
        ("vocab_size", vocab_size),
        ("sliding_window", &sliding_window.unwrap_or(1)),
    ] {
        if *value == 0 {
            what = Some(format!("{name} is 0"));
        }
    }
    if what.is_none() {
        if !heads.is_multiple_of(*kv_heads) || heads / kv_heads > GROUP_MAX {
            what = Some(format!("{heads} query heads over {kv_heads} key and value heads"));
        } else if heads.checked_mul(*head_dim).is_none() {
            what = Some(format!("{heads} heads of {head_dim} dimensions"));
        } else if rope.dims > *head_dim {
            what = Some(format!("{} rotary dimensions in a head of {head_dim}", rope.dims));
        } else if !(norm_epsilon.is_finite() && *norm_epsilon >= 0.0) {
            what = Some(format!("norm_epsilon is {norm_epsilon}"));
        }
    }
    what.map_or(Ok(()), |what| Err(EngineError::Config { what }))
}

/// The first `rows * width` elements of a buffer that grows when it must.
fn part(buffer: &mut Vec<f32>, rows: usize, width: usize) -> &mut [f32] {
    let len = rows * width;
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Moves the chosen rows of `x` to its beginning.
fn compact(x: &mut [f32], width: usize, chosen: &[usize]) {
    for (to, from) in chosen.iter().enumerate() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
}

/// Writes rows of keys or values into their places, `[blocks, BLOCK_TOKENS, width]`.
fn store(cache: &mut [f32], rows: &[f32], width: usize, places: &[AttentionRow<'_>]) {
    for (row, place) in rows.chunks_exact(width).zip(places) {
        let block = place.blocks[place.position / BLOCK_TOKENS] as usize;
        let at = (block * BLOCK_TOKENS + place.position % BLOCK_TOKENS) * width;
        cache[at..at + width].copy_from_slice(row);
    }
}

// === impl Linear ===

impl Linear {
    fn apply(&self, threads: &Threads, x: &mut Activations<'_>, out: &mut [f32]) {
        linear(threads, &self.weight, self.bias.as_deref(), x, out);
    }
}

// === impl Llama ===

impl Model for Llama {
    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    fn kv_block_bytes(&self) -> u64 {
        self.kv.shape().block_bytes()
    }

    fn open_kv(&mut self, capacity: usize) -> Result<(), EngineError> {
        self.kv = KvStorage::new(self.kv.shape(), capacity)?;
        Ok(())
    }

    fn grow_kv(&mut self, blocks: usize) -> Result<(), EngineError> {
        self.kv.ensure(blocks);
        Ok(())
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError> {
        let Self { threads, hidden, attention: shape, norm_epsilon, kv, logits, .. } = self;
        let (hidden, epsilon) = (*hidden, *norm_epsilon);
        let query_width = shape.heads * shape.head_dim;
        let kv_width = shape.kv_heads * shape.head_dim;
        let Buffers {
            x,
            normed,
            query,
            key,
            value,
            attended,
            delta,
            gate,
            up,
            gated,
            positions,
            angles,
            scratch,
        } = &mut self.buffers;

        let mut rows = batch.tokens.len();
        let mut places: Vec<AttentionRow<'_>> = batch
            .spans
            .iter()
            .flat_map(|span| {
                (span.start..span.start + span.rows)
                    .map(|position| AttentionRow { blocks: span.blocks, position })
            })
            .collect();
        assert_eq!(places.len(), rows, "spans cover the batch's rows");
        let set_angles = |angles: &mut RopeAngles, positions: &mut Vec<u32>, places: &[AttentionRow<'_>]| {
            positions.clear();
            positions.extend(places.iter().map(|place| u32::try_from(place.position).unwrap_or(u32::MAX)));
            angles.set(&self.inverse_frequencies, positions);
        };
        set_angles(angles, positions, &places);
        embed(&self.embedding, batch.tokens, part(x, rows, hidden));

        for (index, layer) in self.layers.iter().enumerate() {
            let KvLayer { keys, values } = kv.layer_mut(index);
            rms_norm(
                threads,
                part(x, rows, hidden),
                &layer.attention_norm,
                epsilon,
                part(normed, rows, hidden),
            );
            let mut input = Activations::new(&normed[..rows * hidden], rows, hidden, scratch);
            let key = part(key, rows, kv_width);
            layer.key.apply(threads, &mut input, key);
            let value = part(value, rows, kv_width);
            layer.value.apply(threads, &mut input, value);
            rotate(threads, key, shape.kv_heads, shape.head_dim, self.rope_layout, angles);
            store(keys, key, kv_width, &places);
            store(values, value, kv_width, &places);

            // After the last layer's keys and values, only the rows whose logits are wanted matter.
            let last = index + 1 == self.layers.len();
            if last && batch.logit_rows.len() < rows {
                rows = batch.logit_rows.len();
                if rows == 0 {
                    break;
                }
                compact(x, hidden, batch.logit_rows);
                compact(normed, hidden, batch.logit_rows);
                places = batch.logit_rows.iter().map(|row| places[*row]).collect();
                set_angles(angles, positions, &places);
                input = Activations::new(&normed[..rows * hidden], rows, hidden, scratch);
            }

            let query = part(query, rows, query_width);
            layer.query.apply(threads, &mut input, query);
            rotate(threads, query, shape.heads, shape.head_dim, self.rope_layout, angles);
            let attended = part(attended, rows, query_width);
            attention(threads, shape, query, &places, keys, values, attended);
            let mut input = Activations::new(attended, rows, query_width, scratch);
            let delta = part(delta, rows, hidden);
            layer.output.apply(threads, &mut input, delta);
            add(threads, part(x, rows, hidden), delta);

            rms_norm(
                threads,
                &x[..rows * hidden],
                &layer.feed_forward_norm,
                epsilon,
                part(normed, rows, hidden),
            );
            let mut input = Activations::new(&normed[..rows * hidden], rows, hidden, scratch);
            let gate = part(gate, rows, self.intermediate);
            layer.gate.apply(threads, &mut input, gate);
            let up = part(up, rows, self.intermediate);
            layer.up.apply(threads, &mut input, up);
            let gated = part(gated, rows, self.intermediate);
            silu_mul(threads, gate, up, gated);
            let mut input = Activations::new(gated, rows, self.intermediate, scratch);
            layer.down.apply(threads, &mut input, delta);
            add(threads, part(x, rows, hidden), delta);
        }

        logits.clear();
        if rows == 0 {
            return Ok(());
        }
        rms_norm(threads, &x[..rows * hidden], &self.output_norm, epsilon, part(normed, rows, hidden));
        let mut input = Activations::new(&normed[..rows * hidden], rows, hidden, scratch);
        logits.resize(rows * self.vocab_size as usize, 0.0);
        linear(threads, self.head.as_ref().unwrap_or(&self.embedding), None, &mut input, logits);
        Ok(())
    }
}
