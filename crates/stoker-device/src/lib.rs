//! Device memory, and copies into it.
//!
//! - [`Device`]: a GPU ([`CudaDevice`]), or a stand-in in host memory ([`SimulatedDevice`]) with a bandwidth of its own.
//! - [`Slab`]: one range of device addresses. Its memory comes in granules, which other processes can map, and goes back in
//!   granules ([`SlabPart`]).
//! - [`Transfer`]: host bytes on their way into a slab. Copies are asynchronous; each ends with one call of its `done`.
//!
//! Nothing here links CUDA: the driver is opened at run time behind a probe ([`cuda_devices`]), so that a machine without
//! one gets a [`DeviceError`] and runs everything else.

mod cuda;
mod device;
mod error;
mod holders;
mod info;
mod queue;
mod simulated;
mod slab;

pub use cuda::{
    ComputeStream, CudaDevice, CudaOptions, DeviceBuffer, GrowingMemory, Kernel, KernelTime, Launch,
    PinnedBuffer, Program, cuda_devices, driver_version,
};
pub use device::{Cut, Device, Done, HostBytes, Transfer, Window};
pub use error::{CudaVersion, DeviceError};
pub use holders::memory_holders;
pub use info::{DeviceInfo, DeviceMemory, Link, PcieLink, Peer};
pub use simulated::{SimulatedDevice, SimulatedOptions, SimulatedWindow};
pub use slab::{Slab, SlabPart};
