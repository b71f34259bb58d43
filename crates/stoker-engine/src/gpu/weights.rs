//! Weights in device memory.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use stoker_checkpoint::{Manifest, Role, Tensor};
use stoker_device::Slab;
use stoker_types::DType;

use super::Gpu;
use crate::{EngineError, weight::WeightError};

/// A model's tensors in a slab.
#[derive(Debug)]
pub struct DeviceWeights {
    /// The memory. Held for as long as the model lives.
    pub slab: Slab,
    /// First byte of each tensor, in the manifest's order: a multiple of 256.
    pub tensors: Vec<u64>,
    /// How to wait for what is still being copied; `None`: everything is there.
    pub gate: Option<Gate>,
}

/// Words of 32 bits in the slab, one for each chunk of the weight files, one file after the other: 0, and 1 once what the slab
/// gets of that chunk is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrivals {
    /// First byte of the words in the slab, a multiple of 4.
    pub at: u64,
    /// How many words.
    pub words: u64,
    /// Bytes of a chunk of a file.
    pub chunk_bytes: u64,
}

/// What a model's kernels wait at for its weights, on the device. A cheap handle: whoever has one can let them go when the
/// weights will never come.
#[derive(Debug, Clone)]
pub struct Gate {
    inner: Arc<GateInner>,
}

#[derive(Debug)]
struct GateInner {
    slab: Slab,
    arrivals: Arrivals,
    failed: AtomicBool,
}

/// A format that there are kernels for, numbered as in `kernels/common.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[expect(non_camel_case_types, reason = "the formats' own names")]
pub(super) enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// A matrix `[rows, cols]`, or a vector of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Weight {
    pub(super) address: u64,
    pub(super) format: Format,
    pub(super) rows: u32,
    pub(super) cols: u32,
    /// Chunks that it lies in.
    pub(super) chunks: Range<u64>,
}

/// A checkpoint's tensors by role.
pub(super) struct GpuTensors<'a> {
    by_role: HashMap<Role, (&'a Tensor, u64)>,
    /// Number of each file's first chunk.
    first_chunk: Vec<u64>,
    pub(super) slab: Slab,
    pub(super) gate: Option<Gate>,
}

// === impl Gate ===

impl Gate {
    /// A gate whose words are in `slab`.
    #[must_use]
    pub fn new(slab: &Slab, arrivals: Arrivals) -> Self {
        let failed = AtomicBool::new(false);
        Self { inner: Arc::new(GateInner { slab: slab.clone(), arrivals, failed }) }
    }

    /// Where its words are.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        self.inner.arrivals
    }

    /// Nothing has arrived: before the first copy, by whoever has the memory.
    ///
    /// # Errors
    /// The device's.
    pub fn close(&self, gpu: &Gpu) -> Result<(), EngineError> {
        self.set(gpu, 0)
    }

    /// The weights won't come: what waits for them goes on, and what it computed is not used. Safe from any thread.
    ///
    /// # Errors
    /// The device's; what waits may wait for ever then, and the process has to end.
    pub fn fail(&self, gpu: &Gpu) -> Result<(), EngineError> {
        self.inner.failed.store(true, Ordering::Release);
        self.set(gpu, 1)
    }

    fn set(&self, gpu: &Gpu, value: u32) -> Result<(), EngineError> {
        let GateInner { slab, arrivals, .. } = &*self.inner;
        gpu.aside.bind()?;
        super::pass::fill(&gpu.aside, slab.address() + arrivals.at, arrivals.words, value)?;
        Ok(gpu.aside.wait()?)
    }

    /// Whether what has been computed is to be used.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        if self.inner.failed.load(Ordering::Acquire) { Err(EngineError::WeightsLost) } else { Ok(()) }
    }
}

// === impl Format ===

impl Format {
    pub(super) const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    fn of(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::Q4_0 => Self::Q4_0,
            DType::Q4_1 => Self::Q4_1,
            DType::Q5_0 => Self::Q5_0,
            DType::Q5_1 => Self::Q5_1,
            DType::Q8_0 => Self::Q8_0,
            DType::Q2_K => Self::Q2_K,
            DType::Q3_K => Self::Q3_K,
            DType::Q4_K => Self::Q4_K,
            DType::Q5_K => Self::Q5_K,
            DType::Q6_K => Self::Q6_K,
            _ => return None,
        })
    }

    /// Its name in the names of kernels.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2_K => "q2_k",
            Self::Q3_K => "q3_k",
            Self::Q4_K => "q4_k",
            Self::Q5_K => "q5_k",
            Self::Q6_K => "q6_k",
        }
    }
}

// === impl GpuTensors ===

impl<'a> GpuTensors<'a> {
    pub(super) fn new(manifest: &'a Manifest, weights: DeviceWeights) -> Result<Self, EngineError> {
        let DeviceWeights { slab, tensors, gate } = weights;
        if tensors.len() != manifest.tensors.len() {
            let what =
                format!("{} tensors, and {} addresses for them", manifest.tensors.len(), tensors.len());
            return Err(EngineError::Config { what });
        }
        let mut first_chunk = Vec::with_capacity(manifest.files.len());
        let mut chunks = 0;
        for file in &manifest.files {
            first_chunk.push(chunks);
            let chunk_bytes = gate.as_ref().map_or(u64::MAX, |gate| gate.arrivals().chunk_bytes.max(1));
            chunks += file.identity.len.div_ceil(chunk_bytes);
        }
        let room = slab.bytes().bytes();
        if let Some(Arrivals { at, words, .. }) = gate.as_ref().map(Gate::arrivals)
            && (at.saturating_add(words.saturating_mul(4)) > room || !at.is_multiple_of(4) || words != chunks)
        {
            let what = format!("{words} words at {at} of a slab of {room} bytes, for {chunks} chunks");
            return Err(EngineError::Config { what });
        }
        let mut by_role = HashMap::new();
        for (tensor, &at) in manifest.tensors.iter().zip(&tensors) {
            if at.saturating_add(tensor.len) > room {
                let (offset, len) = (to_usize(at), to_usize(tensor.len));
                let source = WeightError::OutOfRegion { offset, len, region: to_usize(room) };
                return Err(EngineError::Tensor {
                    tensor: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    source,
                });
            }
            if let Some(role) = tensor.role {
                by_role.insert(role, (tensor, at));
            }
        }
        Ok(Self { by_role, first_chunk, slab, gate })
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.by_role.contains_key(&role)
    }

    /// Whether any matrix is of this type, and whether any is of another.
    pub(super) fn matrices(&self, dtype: DType) -> (bool, bool) {
        let mut matrices = self.by_role.values().filter(|(tensor, _)| tensor.shape.len() == 2);
        let some = matrices.clone().any(|(tensor, _)| tensor.dtype == dtype);
        (some, matrices.any(|(tensor, _)| tensor.dtype != dtype))
    }

    /// A matrix.
    pub(super) fn matrix(&self, role: Role, rows: u32, cols: u32) -> Result<Weight, EngineError> {
        self.weight(role, &[rows.into(), cols.into()])
    }

    /// A vector of one of the plain types.
    pub(super) fn vector(&self, role: Role, len: u32) -> Result<Weight, EngineError> {
        let weight = self.weight(role, &[len.into()])?;
        if matches!(weight.format, Format::F32 | Format::F16 | Format::BF16) {
            return Ok(weight);
        }
        Err(EngineError::NoGpuKernel { what: format!("{role:?} as {}", weight.format.name()) })
    }

    /// As [`vector`](Self::vector), where the configuration says whether there is one.
    pub(super) fn vector_if(&self, there: bool, role: Role, len: u32) -> Result<Option<Weight>, EngineError> {
        match (there, self.has(role)) {
            (true, _) => self.vector(role, len).map(Some),
            (false, false) => Ok(None),
            (false, true) => Err(EngineError::Config {
                what: format!("it says that there is no {role:?}, but the checkpoint has one"),
            }),
        }
    }

    fn weight(&self, role: Role, shape: &[u64]) -> Result<Weight, EngineError> {
        let &(tensor, at) = self.by_role.get(&role).ok_or(EngineError::MissingTensor { role })?;
        if tensor.shape != shape {
            return Err(EngineError::Shape {
                tensor: tensor.name.clone(),
                dtype: tensor.dtype,
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        let wrong =
            |source| EngineError::Tensor { tensor: tensor.name.clone(), shape: tensor.shape.clone(), source };
        let dtype = tensor.dtype;
        let format = Format::of(dtype).ok_or_else(|| wrong(WeightError::UnsupportedType { dtype }))?;
        let (rows, cols) = match *shape {
            [len] => (1, len),
            [rows, cols] => (rows, cols),
            _ => unreachable!("families ask for vectors and matrices"),
        };
        let partial = || {
            wrong(WeightError::PartialBlock { dtype, cols: to_usize(cols), block: dtype.block_elements() })
        };
        let row = dtype.bytes_of(cols).ok_or_else(partial)?;
        if row.checked_mul(rows) != Some(tensor.len) {
            let expected = row.checked_mul(rows).map(to_usize);
            let (rows, cols, found) = (to_usize(rows), to_usize(cols), to_usize(tensor.len));
            return Err(wrong(WeightError::WrongLength { dtype, rows, cols, expected, found }));
        }
        // Eight columns are one load.
        if rows > 1 && !cols.is_multiple_of(8) {
            return Err(EngineError::NoGpuKernel {
                what: format!("`{}` with {cols} columns, which is no multiple of 8", tensor.name),
            });
        }
        let chunks = match self.gate.as_ref().map(Gate::arrivals) {
            None => 0..0,
            Some(Arrivals { chunk_bytes, .. }) => {
                let first = self.first_chunk.get(tensor.file as usize).copied().unwrap_or(0);
                let end = tensor.offset + tensor.len;
                first + tensor.offset / chunk_bytes..first + end.div_ceil(chunk_bytes)
            }
        };
        let fits = |n: u64| u32::try_from(n).map_err(|_| partial());
        let (rows, cols) = (fits(rows)?, fits(cols)?);
        Ok(Weight { address: self.slab.address() + at, format, rows, cols, chunks })
    }
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
