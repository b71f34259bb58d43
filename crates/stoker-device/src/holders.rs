//! Who has a GPU's memory, as far as the management library tells.

use std::sync::OnceLock;

use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory, error::NvmlError};
use stoker_types::{ByteSize, MemoryHolder};

use crate::info::DeviceInfo;

/// The processes that have memory of a GPU, the largest first; none when the management library isn't there or doesn't see
/// them, as in many containers.
#[must_use]
pub fn memory_holders(device: &DeviceInfo) -> Vec<MemoryHolder> {
    let Some(pci) = &device.pci else { return Vec::new() };
    // Opening the library takes longer than everything else here.
    static NVML: OnceLock<Result<Nvml, NvmlError>> = OnceLock::new();
    let Ok(nvml) = NVML.get_or_init(Nvml::init) else { return Vec::new() };
    let processes = nvml
        .device_by_pci_bus_id(pci.as_str())
        .and_then(|device| device.running_compute_processes())
        .inspect_err(|error| tracing::debug!(%error, "who has the GPU's memory isn't known"))
        .unwrap_or_default();
    let holder = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| {
        let UsedGpuMemory::Used(bytes) = process.used_gpu_memory else { return None };
        let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        Some(MemoryHolder { pid: process.pid, name: name.trim().to_owned(), bytes: ByteSize(bytes) })
    };
    let mut holders: Vec<_> = processes.into_iter().filter_map(holder).collect();
    holders.sort_by_key(|holder| std::cmp::Reverse(holder.bytes));
    holders
}
