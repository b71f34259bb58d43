//! NVIDIA GPUs, through the driver's own interface, opened at run time.

mod compute;
mod context;
mod device;
mod driver;
mod link;
mod memory;
mod sums;
mod topology;

pub use compute::{
    ComputeStream, DeviceBuffer, GrowingMemory, Kernel, KernelTime, Launch, PinnedBuffer, Program,
};
pub use device::{CudaDevice, CudaOptions};
pub use topology::cuda_devices;

pub use driver::driver_version;
pub(crate) use memory::Mapping;
