//! What devices there are, and what they are connected to.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    ffi::{CStr, c_char},
    path::Path,
    sync::OnceLock,
};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute};
use nvml_wrapper::Nvml;
use stoker_types::ByteSize;

use super::{
    context::{device, device_count},
    driver::check,
};
use crate::{
    error::DeviceError,
    info::{DeviceInfo, Link, PcieLink, Peer},
};

/// All GPUs that this process sees. Makes no context.
///
/// # Errors
/// [`DeviceError::NoDriver`], [`DeviceError::DriverTooOld`], [`DeviceError::MissingSymbol`], [`DeviceError::NoGpu`].
pub fn cuda_devices() -> Result<Vec<DeviceInfo>, DeviceError> {
    (0..device_count()?).map(describe).collect()
}

pub(crate) fn describe(ordinal: u32) -> Result<DeviceInfo, DeviceError> {
    let raw = device(ordinal)?;
    let mut bytes = 0;
    // SAFETY: the device is the driver's; one integer is written.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, raw) })?;
    let pci = text("cuDeviceGetPCIBusId", |text, len| {
        // SAFETY: at most `len` bytes are written.
        unsafe { sys::cuDeviceGetPCIBusId(text, len, raw) }
    })
    .ok()
    .map(|pci| pci.to_lowercase());
    let major = attribute(raw, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(raw, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(DeviceInfo {
        ordinal,
        name: text("cuDeviceGetName", |text, len| {
            // SAFETY: at most `len` bytes are written.
            unsafe { sys::cuDeviceGetName(text, len, raw) }
        })?,
        uuid: uuid(raw)?,
        compute: (major, minor),
        memory: ByteSize(bytes as u64),
        numa_node: pci.as_deref().and_then(numa_node),
        pcie: pci.as_deref().and_then(pcie),
        peers: peers(ordinal, raw, pci.as_deref())?,
        pci,
    })
}

fn text(
    call: &'static str,
    get: impl FnOnce(*mut c_char, i32) -> sys::CUresult,
) -> Result<String, DeviceError> {
    let mut text = [0_u8; 256];
    // One byte less than there are, so that there is always an end.
    check(call, get(text.as_mut_ptr().cast(), 255))?;
    Ok(CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned())
}

fn uuid(device: CUdevice) -> Result<String, DeviceError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the device is the driver's; 16 bytes are written.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    let hex: String = uuid.bytes.iter().map(|byte| format!("{:02x}", byte.cast_unsigned())).collect();
    let (a, b, c, d, e) = (&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    Ok(format!("GPU-{a}-{b}-{c}-{d}-{e}"))
}

fn attribute(device: CUdevice, which: CUdevice_attribute) -> Result<u32, DeviceError> {
    let mut value = 0;
    // SAFETY: the device is the driver's; one integer is written.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn peers(ordinal: u32, own: CUdevice, pci: Option<&str>) -> Result<Vec<Peer>, DeviceError> {
    let linked = pci.is_some_and(has_nvlink);
    (0..device_count()?)
        .filter(|other| *other != ordinal)
        .map(|other| {
            let (mut to, mut from) = (0, 0);
            let peer = device(other)?;
            // SAFETY: both devices are the driver's; one integer is written by each call.
            check("cuDeviceCanAccessPeer", unsafe { sys::cuDeviceCanAccessPeer(&raw mut to, own, peer) })?;
            // SAFETY: as above.
            check("cuDeviceCanAccessPeer", unsafe { sys::cuDeviceCanAccessPeer(&raw mut from, peer, own) })?;
            let link = match to != 0 && from != 0 {
                true if linked => Link::NvLink,
                true => Link::Pcie,
                false => Link::None,
            };
            Ok(Peer { ordinal: other, link })
        })
        .collect()
}

/// The NUMA node of a device on the bus, if the machine has several.
fn numa_node(pci: &str) -> Option<u32> {
    let path = Path::new("/sys/bus/pci/devices").join(pci).join("numa_node");
    // "-1" where there is only one.
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The management library, if there is one.
fn nvml() -> Option<&'static Nvml> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    NVML.get_or_init(|| {
        Nvml::init().inspect_err(|error| tracing::debug!(%error, "no NVML: links of GPUs are not known")).ok()
    })
    .as_ref()
}

fn pcie(pci: &str) -> Option<PcieLink> {
    let device = nvml()?.device_by_pci_bus_id(pci).ok()?;
    Some(PcieLink { generation: device.max_pcie_link_gen().ok()?, width: device.max_pcie_link_width().ok()? })
}

fn has_nvlink(pci: &str) -> bool {
    // No GPU has had more.
    const LINKS: u32 = 18;
    nvml().and_then(|nvml| nvml.device_by_pci_bus_id(pci).ok()).is_some_and(|device| {
        (0..LINKS).any(|link| device.link_wrapper_for(link).is_active().unwrap_or(false))
    })
}
