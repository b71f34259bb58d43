//! The kernels: their machine code, what they take, and how they are launched.

#![expect(unsafe_code, reason = "a kernel is launched with addresses")]

use std::collections::HashMap;

use stoker_device::{ComputeStream, CudaDevice, DeviceBuffer, DeviceError, Kernel, Launch, Program};

use super::weights::{Format, Weight};
use crate::kv::BLOCK_TOKENS;

/// Made by `kernels/compile`.
const IMAGE: &[u8] = include_bytes!("kernels/stoker.fatbin");

/// What `kernels/compile` makes of the sources.
#[cfg(test)]
mod sources {
    use sha2::{Digest, Sha256};

    #[test]
    fn the_machine_code_is_of_these_sources() {
        let mut sum = Sha256::new();
        for source in [
            include_str!("kernels/attention.cuh"),
            include_str!("kernels/common.cuh"),
            include_str!("kernels/elementwise.cuh"),
            include_str!("kernels/formats.cuh"),
            include_str!("kernels/matmul.cuh"),
            include_str!("kernels/single.cuh"),
            include_str!("kernels/stoker.cu"),
        ] {
            sum.update(source);
        }
        let sum: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let compiled = include_str!("kernels/stoker.sum").trim();
        assert_eq!(sum, compiled, "run kernels/compile: the sources have changed since");
    }
}

/// Threads of the kernels between matrix products, and of the products.
const THREADS: u32 = 256;

/// Dimensions of a head that attention is compiled for.
const HEAD_DIMS: [u32; 6] = [16, 32, 64, 80, 96, 128];

/// Dimensions of a head in 32 bits at most.
const HEAD_DIM_MAX_SINGLE: u32 = 256;

/// Tokens of a split, as in `kernels/common.cuh`.
pub(super) const SPLIT: u32 = 128;

/// Rows of a warp's share of attention.
pub(super) const ATTENTION_ROWS: u32 = 16;

/// Rows of a block's.
pub(super) const ATTENTION_ROWS_MANY: u32 = 64;

/// A tile of a product: features, tokens, and bytes of shared memory; as in `kernels/matmul.cuh`.
const TILE_ROWS: u32 = 128;
const TILE_TOKENS: u32 = 64;
const TILE_SHARED: u32 = 4 * (TILE_ROWS + TILE_TOKENS) * 128;

/// Parts of a dot product that are added in order, as in `kernels/common.cuh`.
const SEGMENTS: u32 = 8;

/// With at most this many tiles, a product is divided among more blocks than tiles: fewer would leave the chip idle.
const DIVIDED_TILES_MAX: u32 = 128;

/// Device memory for what the blocks of a divided product tell each other: their sums, then counters.
const PARTIALS_BYTES: u64 = (DIVIDED_TILES_MAX * SEGMENTS * TILE_ROWS * TILE_TOKENS * 4) as u64;

/// Heads that a block rotates, as in `kernels/elementwise.cuh`.
const ROPE_HEADS: u32 = 8;

/// What activations are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Type {
    F16,
    BF16,
    /// 32 bits, for models whose weights are: exact rather than fast.
    Single,
}

/// Every kernel.
pub(super) struct Kernels {
    products: HashMap<Format, Products>,
    single: Single,
    types: HashMap<Type, Between>,
    angles: Kernel,
    partials: DeviceBuffer,
}

/// Products with weights of one format.
struct Products {
    few8: [Kernel; 2],
    few32: [Kernel; 2],
    many: [Kernel; 2],
    divided: [Kernel; 2],
    embed: Kernel,
}

struct Single {
    product: [Kernel; 2],
    attention: Kernel,
    embed: Kernel,
}

/// What activations of one type go through between products.
struct Between {
    norm: Kernel,
    rope: Kernel,
    silu: Kernel,
    /// By dimensions of a head: of a warp, of four.
    attention: HashMap<u32, [Kernel; 2]>,
}

/// What a product's output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Mode {
    /// Activations.
    Store,
    /// The residual stream, added to.
    Add,
    /// Numbers of 32 bits.
    Float,
}

/// `Matmul` of `kernels/matmul.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Matmul {
    weight: [u64; 3],
    bias: [u64; 3],
    end: [u32; 3],
    bias_format: u32,
    x: u64,
    out: u64,
    partials: u64,
    arrived: u64,
    tokens: u32,
    k: u32,
    stride: u32,
    mode: u32,
}

/// `Embed` of `kernels/elementwise.cuh`.
#[repr(C)]
struct Embed {
    weights: u64,
    tokens: u64,
    x: u64,
    k: u32,
}

/// `Norm` of `kernels/elementwise.cuh`.
#[repr(C)]
struct Norm {
    x: u64,
    rows: u64,
    weight: u64,
    out: u64,
    k: u32,
    weight_format: u32,
    epsilon: f32,
}

/// `Angles` of `kernels/elementwise.cuh`.
#[repr(C)]
pub(super) struct Angles {
    pub(super) positions: u64,
    pub(super) frequencies: u64,
    pub(super) divisors: u64,
    pub(super) angles: u64,
    pub(super) pairs: u32,
}

/// `Rope` of `kernels/elementwise.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Rope {
    pub(super) qkv: u64,
    pub(super) angles: u64,
    pub(super) places: u64,
    pub(super) blocks: u64,
    pub(super) block_bytes: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) dims: u32,
    pub(super) stride: u32,
    pub(super) interleaved: u32,
}

/// `Silu` of `kernels/elementwise.cuh`.
#[repr(C)]
struct Silu {
    gate: u64,
    up: u64,
    out: u64,
    k: u32,
}

/// `Work` of `kernels/attention.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Work {
    pub(super) first_row: u32,
    pub(super) rows: u32,
    pub(super) span_token: u32,
    pub(super) position: u32,
    pub(super) table: u32,
    pub(super) split: u32,
    pub(super) splits: u32,
    pub(super) partial: u32,
}

/// `Attention` of `kernels/attention.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Attention {
    pub(super) query: u64,
    pub(super) out: u64,
    pub(super) work: u64,
    pub(super) tables: u64,
    pub(super) blocks: u64,
    pub(super) block_bytes: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) partials: u64,
    pub(super) arrived: u64,
    pub(super) group: u32,
    pub(super) kv_heads: u32,
    pub(super) query_stride: u32,
    pub(super) window: u32,
    pub(super) head_dim: u32,
    pub(super) partial_rows: u32,
    pub(super) scale: f32,
}

/// A matrix and its bias.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub(super) weight: Weight,
    pub(super) bias: Option<Weight>,
}

// === impl Type ===

impl Type {
    /// Bytes of an element.
    pub(super) const fn bytes(self) -> u64 {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::Single => 4,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Single => "single",
        }
    }
}

// === impl Kernels ===

impl Kernels {
    pub(super) fn load(device: &CudaDevice) -> Result<Self, DeviceError> {
        let program = Program::load(device, IMAGE)?;
        let both = |kind: &str, name: &str, shared| -> Result<[Kernel; 2], DeviceError> {
            Ok([
                program.kernel(&format!("{kind}_{name}"), shared)?,
                program.kernel(&format!("{kind}_pair_{name}"), shared)?,
            ])
        };
        let mut products = HashMap::new();
        for format in Format::ALL {
            let name = format.name();
            let of_format = Products {
                few8: both("few8", name, 0)?,
                few32: both("few32", name, 0)?,
                many: both("many", name, TILE_SHARED)?,
                divided: both("divided", name, TILE_SHARED)?,
                embed: program.kernel(&format!("embed_{name}"), 0)?,
            };
            products.insert(format, of_format);
        }
        let between = |kind: Type| -> Result<Between, DeviceError> {
            let name = kind.name();
            let kernel = |what: &str| program.kernel(&format!("{what}_{name}"), 0);
            let mut attention = HashMap::new();
            if kind != Type::Single {
                for dims in HEAD_DIMS {
                    let of = |warps: u32| {
                        program
                            .kernel(&format!("attention{warps}_{name}_{dims}"), attention_shared(dims, warps))
                    };
                    attention.insert(dims, [of(1)?, of(4)?]);
                }
            }
            Ok(Between { norm: kernel("norm")?, rope: kernel("rope")?, silu: kernel("silu")?, attention })
        };
        let single = Single {
            product: both("matmul", "single", 0)?,
            attention: program.kernel("attention_single", 0)?,
            embed: program.kernel("embed_single", 0)?,
        };
        let types = [Type::F16, Type::BF16, Type::Single];
        let types =
            types.into_iter().map(|kind| Ok((kind, between(kind)?))).collect::<Result<_, DeviceError>>()?;
        let partials = DeviceBuffer::new(device, PARTIALS_BYTES + u64::from(DIVIDED_TILES_MAX) * 4)?;
        Ok(Self { products, single, types, angles: program.kernel("angles_table", 0)?, partials })
    }

    /// Address and number of the words that have to be zero before the first product.
    pub(super) fn counters(&self) -> (u64, usize) {
        (self.partials.address() + PARTIALS_BYTES, DIVIDED_TILES_MAX as usize)
    }

    /// Whether there is attention over heads of that many dimensions.
    pub(super) fn has_attention(&self, kind: Type, head_dim: u32) -> bool {
        match kind {
            Type::Single => head_dim <= HEAD_DIM_MAX_SINGLE,
            Type::F16 | Type::BF16 => self.types[&kind].attention.contains_key(&head_dim),
        }
    }
}

/// Stages of a block's keys and values: a warp alone has four.
const fn attention_shared(head_dim: u32, warps: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
    const TOKENS: u32 = BLOCK_TOKENS as u32;
    let stages = if warps == 1 { 4 } else { 2 };
    stages * 2 * TOKENS * head_dim * 2
}

/// What computes: kernels of one type of activations, on a stream. Every function queues and returns.
///
/// # Safety
/// As for [`ComputeStream::launch`]: addresses are device memory of the shapes that are said, which lives until the stream has
/// been waited for.
#[derive(Clone, Copy)]
pub(super) struct Queue<'a> {
    pub(super) stream: &'a ComputeStream,
    pub(super) kernels: &'a Kernels,
    pub(super) kind: Type,
}

// === impl Queue ===

impl Queue<'_> {
    fn between(&self) -> &Between {
        &self.kernels.types[&self.kind]
    }

    fn launch<P>(&self, kernel: &Kernel, grid: (u32, u32), parameters: &P) -> Result<(), DeviceError> {
        let launch = Launch { grid: (grid.0, grid.1, 1), threads: THREADS, shared: 0 };
        // SAFETY: the promise of whoever made the queue; the parameters are the kernel's structure.
        unsafe { self.stream.launch(kernel, launch, parameters) }
    }

    /// Rows of the embedding: `x`: f32 `[tokens, cols]`.
    pub(super) unsafe fn embed(
        &self,
        weight: &Weight,
        ids: u64,
        tokens: u32,
        x: u64,
    ) -> Result<(), DeviceError> {
        let kernel = match self.kind {
            Type::Single => &self.kernels.single.embed,
            Type::F16 | Type::BF16 => &self.kernels.products[&weight.format].embed,
        };
        let embed = Embed { weights: weight.address, tokens: ids, x, k: weight.cols };
        self.launch(kernel, (tokens, 1), &embed)
    }

    /// Norms of `count` rows of `x`, f32 `[_, cols]`: all, or those whose numbers are at `rows`.
    pub(super) unsafe fn norm(
        &self,
        x: u64,
        rows: Option<u64>,
        count: u32,
        weight: &Weight,
        epsilon: f32,
        out: u64,
    ) -> Result<(), DeviceError> {
        let norm = Norm {
            x,
            rows: rows.unwrap_or(0),
            weight: weight.address,
            out,
            k: weight.cols,
            weight_format: weight.format as u32,
            epsilon,
        };
        self.launch(&self.between().norm, (count, 1), &norm)
    }

    /// What all layers rotate by: pairs of f32 `[tokens, pairs]`.
    pub(super) unsafe fn angles(&self, tokens: u32, angles: &Angles) -> Result<(), DeviceError> {
        self.launch(&self.kernels.angles, (tokens, 1), angles)
    }

    pub(super) unsafe fn rope(&self, tokens: u32, rope: &Rope) -> Result<(), DeviceError> {
        let heads = rope.heads + 2 * rope.kv_heads;
        self.launch(&self.between().rope, (tokens, heads.div_ceil(ROPE_HEADS)), rope)
    }

    /// The products of one input with matrices that lie one below the other in the output, `[tokens, all their rows]`.
    pub(super) unsafe fn products(
        &self,
        matrices: &[&Linear],
        x: u64,
        out: u64,
        tokens: u32,
        mode: Mode,
    ) -> Result<(), DeviceError> {
        let stride: u32 = matrices.iter().map(|linear| linear.weight.rows).sum();
        let element = if mode == Mode::Store { self.kind.bytes() } else { 4 };
        let (mut rest, mut before) = (matrices, 0_u64);
        while let [first, ..] = rest {
            // As many as are alike, at most three, are one launch.
            let alike = |other: &&&Linear| {
                let format = |linear: &Linear| linear.bias.as_ref().map(|bias| bias.format);
                other.weight.format == first.weight.format
                    && (format(other) == format(first) || format(other).is_none() || format(first).is_none())
            };
            let (now, later) = rest.split_at(rest.iter().take_while(alike).count().min(3));
            let mut parameters = Matmul {
                weight: [0; 3],
                bias: [0; 3],
                end: [0; 3],
                bias_format: 0,
                x,
                out: out + before * element,
                partials: self.kernels.partials.address(),
                arrived: self.kernels.counters().0,
                tokens,
                k: first.weight.cols,
                stride,
                mode: mode as u32,
            };
            let mut features = 0;
            for i in 0..3 {
                if let Some(linear) = now.get(i) {
                    parameters.weight[i] = linear.weight.address;
                    features += linear.weight.rows;
                    if let Some(bias) = &linear.bias {
                        (parameters.bias[i], parameters.bias_format) = (bias.address, bias.format as u32);
                    }
                }
                parameters.end[i] = features;
            }
            self.matmul(first.weight.format, false, features, &parameters)?;
            before += u64::from(features);
            rest = later;
        }
        Ok(())
    }

    /// `silu(gate x) * (up x)`. `beside`: room for two outputs more, where the matrices differ in format.
    pub(super) unsafe fn gated(
        &self,
        gate: &Linear,
        up: &Linear,
        x: u64,
        out: u64,
        beside: [u64; 2],
        tokens: u32,
    ) -> Result<(), DeviceError> {
        let features = gate.weight.rows;
        let formats = |linear: &Linear| (linear.weight.format, linear.bias.as_ref().map(|bias| bias.format));
        if formats(gate) != formats(up) {
            for (linear, out) in [gate, up].into_iter().zip(beside) {
                // SAFETY: as here.
                unsafe { self.products(&[linear], x, out, tokens, Mode::Store)? };
            }
            let silu = Silu { gate: beside[0], up: beside[1], out, k: features };
            return self.launch(&self.between().silu, (tokens, 1), &silu);
        }
        let bias = |linear: &Linear| linear.bias.as_ref().map_or(0, |bias| bias.address);
        let parameters = Matmul {
            weight: [gate.weight.address, up.weight.address, 0],
            bias: [bias(gate), bias(up), 0],
            end: [features; 3],
            bias_format: gate.bias.as_ref().map_or(0, |bias| bias.format as u32),
            x,
            out,
            partials: self.kernels.partials.address(),
            arrived: self.kernels.counters().0,
            tokens,
            k: gate.weight.cols,
            stride: features,
            mode: Mode::Store as u32,
        };
        self.matmul(gate.weight.format, true, features, &parameters)
    }

    /// Any of the kernels would bring the same bits; which is the fastest depends on how many tokens there are.
    fn matmul(
        &self,
        format: Format,
        pair: bool,
        features: u32,
        parameters: &Matmul,
    ) -> Result<(), DeviceError> {
        let (tokens, which) = (parameters.tokens, usize::from(pair));
        if self.kind == Type::Single {
            let grid = (features.div_ceil(8), tokens.div_ceil(8));
            return self.launch(&self.kernels.single.product[which], grid, parameters);
        }
        let products = &self.kernels.products[&format];
        let rows = if pair { features * 2 } else { features };
        let tiles = (rows.div_ceil(TILE_ROWS), tokens.div_ceil(TILE_TOKENS));
        let (kernel, grid, shared) = match tokens {
            0..=8 => (&products.few8, (rows.div_ceil(if pair { 32 } else { 16 }), 1, 1), 0),
            9..=32 => (&products.few32, (rows.div_ceil(32), 1, 1), 0),
            _ if tiles.0 * tiles.1 <= DIVIDED_TILES_MAX => {
                (&products.divided, (tiles.0, tiles.1, SEGMENTS), TILE_SHARED)
            }
            _ => (&products.many, (tiles.0, tiles.1, 1), TILE_SHARED),
        };
        let launch = Launch { grid, threads: THREADS, shared };
        // SAFETY: as in `launch`.
        unsafe { self.stream.launch(&kernel[which], launch, parameters) }
    }

    /// `works` at most [`ATTENTION_ROWS`] long each, or [`ATTENTION_ROWS_MANY`].
    pub(super) unsafe fn attention(
        &self,
        parameters: &Attention,
        works: u32,
        many: bool,
    ) -> Result<(), DeviceError> {
        let grid = (works, parameters.kv_heads, 1);
        if self.kind == Type::Single {
            let launch = Launch { grid, threads: 128, shared: 0 };
            // SAFETY: the caller's promise.
            return unsafe { self.stream.launch(&self.kernels.single.attention, launch, parameters) };
        }
        let kernel = &self.between().attention[&parameters.head_dim][usize::from(many)];
        let launch = Launch {
            grid,
            threads: if many { 128 } else { 32 },
            shared: attention_shared(parameters.head_dim, if many { 4 } else { 1 }),
        };
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch(kernel, launch, parameters) }
    }
}
