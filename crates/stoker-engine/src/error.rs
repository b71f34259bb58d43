//! Why a model can't be taken.

use stoker_checkpoint::{Architecture, Role};
use stoker_device::DeviceError;
use stoker_types::DType;

use crate::weight::WeightError;

/// Why a model can't be loaded, or an engine made around it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The manifest says so.
    #[error("not runnable: {reason}")]
    Refused {
        /// The manifest's reason.
        reason: String,
    },
    /// No family computes this architecture.
    #[error("no model family computes the architecture {architecture:?}")]
    Architecture {
        /// Which.
        architecture: Architecture,
    },
    /// A value in the configuration that the arithmetic can't use.
    #[error("configuration: {what}")]
    Config {
        /// Which, and why.
        what: String,
    },
    /// A tensor that the family needs isn't in the checkpoint.
    #[error("the checkpoint has no tensor for {role:?}")]
    MissingTensor {
        /// What it would be for.
        role: Role,
    },
    /// A tensor of another shape than the configuration says.
    #[error("tensor `{tensor}` ({dtype}) has shape {found:?}, the configuration needs {expected:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// Its element type.
        dtype: DType,
        /// What it should be.
        expected: Vec<u64>,
        /// What it is.
        found: Vec<u64>,
    },
    /// A tensor that can't be used as a weight.
    #[error("tensor `{tensor}` {shape:?}: {source}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Why.
        source: WeightError,
    },
    /// A tensor in a file that was not given.
    #[error("tensor `{tensor}` is in weight file {file}, but there are {regions} regions")]
    MissingRegion {
        /// Its name.
        tensor: String,
        /// Its file's place in the manifest.
        file: u32,
        /// How many regions there are.
        regions: usize,
    },
    /// A tensor whose place was not given.
    #[error("where tensor `{tensor}` is was not said: there are {offsets} offsets")]
    MissingOffset {
        /// Its name.
        tensor: String,
        /// How many offsets there are.
        offsets: usize,
    },
    /// A limit of zero.
    #[error("the limit {limit} must be at least 1")]
    Limits {
        /// Which.
        limit: &'static str,
    },
    /// Not even one block fits.
    #[error("a KV cache of {kv_bytes} bytes holds no block of {block_bytes}")]
    KvTooSmall {
        /// What was granted.
        kv_bytes: u64,
        /// What a block takes.
        block_bytes: u64,
    },
    /// The operating system doesn't give the address space for the KV cache.
    #[error("no address space for a KV cache of {bytes} bytes")]
    KvAddressSpace {
        /// How many.
        bytes: u64,
    },
    /// What a GPU can't compute of what a CPU can.
    #[error("no GPU kernel for {what}: run it on the CPU (`devices = \"cpu\"`), or convert it")]
    NoGpuKernel {
        /// What.
        what: String,
    },
    /// The chip is older than every machine code that Stoker carries.
    #[error("{name} is of compute capability {major}.{minor}; Stoker's kernels need 8.0 or newer")]
    ChipTooOld {
        /// The device.
        name: String,
        /// Its compute capability.
        major: u32,
        /// As above.
        minor: u32,
    },
    /// The copy of the weights failed while the model was waiting for them.
    #[error("the model's weights did not arrive: its load failed")]
    WeightsLost,
    /// The device's.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

// === impl EngineError ===

impl EngineError {
    /// Whether it is the model that can't be computed: another worker, or the same one later, can't either.
    #[must_use]
    pub fn not_runnable(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::Architecture { .. }
            | Self::Config { .. }
            | Self::MissingTensor { .. }
            | Self::Shape { .. }
            | Self::Tensor { .. }
            | Self::NoGpuKernel { .. } => true,
            Self::MissingRegion { .. }
            | Self::MissingOffset { .. }
            | Self::Limits { .. }
            | Self::KvTooSmall { .. }
            | Self::KvAddressSpace { .. }
            | Self::ChipTooOld { .. }
            | Self::WeightsLost
            | Self::Device(_) => false,
        }
    }

    /// Whether nothing can be computed any more in this process.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Device(DeviceError::Lost { .. }))
    }
}
