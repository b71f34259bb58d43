//! What a device is, and what it is connected to.

use serde::Serialize;
use stoker_types::ByteSize;

/// A device, as it was when the process first looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// Its number in this process, after `CUDA_VISIBLE_DEVICES`.
    pub ordinal: u32,
    /// Its name: "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Its identity, the same in every process: "GPU-xxxxxxxx-...".
    pub uuid: String,
    /// Compute capability: (9, 0).
    pub compute: (u32, u32),
    /// Bytes of memory that it has.
    pub memory: ByteSize,
    /// Where it is on the bus: "0000:1b:00.0".
    pub pci: Option<String>,
    /// The NUMA node that its bus belongs to.
    pub numa_node: Option<u32>,
    /// Its link to the host. Unknown without the management library.
    pub pcie: Option<PcieLink>,
    /// The other devices of this process.
    pub peers: Vec<Peer>,
}

/// A PCI Express link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PcieLink {
    /// Generation that both ends can do: 5.
    pub generation: u32,
    /// Lanes: 16.
    pub width: u32,
}

/// Another device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Its number.
    pub ordinal: u32,
    /// How it is reached.
    pub link: Link,
}

/// How one device reaches another's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Link {
    /// Over `NVLink`.
    NvLink,
    /// Directly over PCI Express.
    Pcie,
    /// Only through host memory.
    None,
}

/// A device's memory now, as the driver counts it: other processes included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// All of it.
    pub total: ByteSize,
    /// Free.
    pub free: ByteSize,
    /// In slabs that this process made through this device.
    pub slabs: ByteSize,
}
