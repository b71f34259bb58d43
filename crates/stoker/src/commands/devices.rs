//! `stoker devices`.

use serde::Serialize;
use stoker_device::{DeviceInfo, Link, cuda_devices, driver_version};

use crate::output::{Output, Table};

#[derive(Debug, Serialize)]
struct Report {
    /// The CUDA version that the driver supports.
    driver: Option<String>,
    /// Why there is no device.
    none: Option<String>,
    devices: Vec<DeviceInfo>,
}

/// Prints the GPUs that a server here would use, or why there is none. Makes no context on them.
pub(crate) fn run(output: Output) -> anyhow::Result<()> {
    let report = match driver_version().and_then(|version| Ok((version, cuda_devices()?))) {
        Ok((version, devices)) => Report { driver: Some(version.to_string()), none: None, devices },
        Err(error) => Report { driver: None, none: Some(error.to_string()), devices: Vec::new() },
    };
    output.show(&report, |report| {
        if let Some(why) = &report.none {
            return why.clone();
        }
        let mut table = Table::new([
            "GPU",
            "NAME",
            "MEMORY",
            "COMPUTE",
            "BUS",
            "NUMA",
            "LINK TO HOST",
            "LINKED TO",
            "UUID",
        ]);
        for device in &report.devices {
            let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
            let linked: Vec<_> = device
                .peers
                .iter()
                .filter_map(|peer| match peer.link {
                    Link::NvLink => Some(format!("{} (NVLink)", peer.ordinal)),
                    Link::Pcie => Some(format!("{} (PCIe)", peer.ordinal)),
                    _ => None,
                })
                .collect();
            table.row([
                device.ordinal.to_string(),
                device.name.clone(),
                device.memory.to_string(),
                format!("{}.{}", device.compute.0, device.compute.1),
                or_unknown(device.pci.clone()),
                // The kernel says none where there is but one.
                device.numa_node.map_or_else(|| "-".into(), |node| node.to_string()),
                or_unknown(device.pcie.map(|link| format!("PCIe {} x{}", link.generation, link.width))),
                if linked.is_empty() { "none".into() } else { linked.join(", ") },
                device.uuid.clone(),
            ]);
        }
        format!("driver for CUDA {}\n\n{}", report.driver.as_deref().unwrap_or_default(), table.render())
    })
}
