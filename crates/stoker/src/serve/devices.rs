//! The devices that a server serves from.

use std::{ffi::OsString, num::NonZeroU32, sync::Arc};

use anyhow::Context as _;
use stoker_device::{
    CudaDevice, CudaOptions, Device, DeviceError, DeviceInfo, Link, SimulatedDevice, SimulatedOptions,
    cuda_devices,
};
use stoker_node::{NodeDevice, WorkerConfig};
use stoker_store::Store;
use stoker_types::ByteSize;

use crate::config::{Config, DeviceSpec, Devices, Origin};

/// What an instance takes of a GPU beside weights and KV cache: activations and the libraries' workspaces.
const WORK_CUDA: ByteSize = ByteSize::mib(256);

/// Memory that is pinned for GPUs before the first load, at most a tenth of what weights may take.
const PINNED_AHEAD: ByteSize = ByteSize::gib(1);

/// Opens the configured devices; none: models are served from memory. Blocks: a GPU's context takes 0.2 to 0.4 s.
///
/// # Errors
/// What of the configured isn't there, with what is.
pub(super) fn open(config: &Config, workers: &WorkerConfig) -> anyhow::Result<Vec<NodeDevice>> {
    let specs = match &config.devices.value {
        Devices::Cpu => return Ok(Vec::new()),
        Devices::These(specs) => specs.clone(),
        Devices::Auto => match cuda_devices() {
            Ok(infos) => infos.iter().map(|info| DeviceSpec::Cuda(info.ordinal)).collect(),
            Err(error @ (DeviceError::NoDriver { .. } | DeviceError::NoGpu)) => {
                tracing::debug!(%error, "no GPU: models are served from memory");
                return Ok(Vec::new());
            }
            Err(error) => {
                tracing::warn!(%error, "the GPUs here can't be used: models are served from memory");
                return Ok(Vec::new());
            }
        },
    };
    let infos = gpus(config, &specs)?;
    let opened = specs.iter().zip(0..).map(|(spec, at)| {
        let (device, name, work) = open_one(*spec, at, &specs, &infos).with_context(|| spec.to_string())?;
        Ok(NodeDevice {
            workers: workers_of(workers, *spec, config),
            name,
            device,
            memory: config.gpu_memory.value,
            work,
        })
    });
    opened.collect()
}

/// Has memory pinned for the devices' copies. What is pinned for one GPU is pinned for all.
pub(super) fn attach(store: &Store, devices: &[NodeDevice], dram: ByteSize) {
    store.place_near(devices.iter().map(|device| device.device.info().numa_node));
    if let Some(first) = devices.iter().find(|device| device.device.pinner().is_some()) {
        store.attach(&*first.device, PINNED_AHEAD.min(ByteSize(dram.bytes() / 10)));
    }
}

/// The GPUs of this machine, if the configuration names some. Fails unless it has all of them.
fn gpus(config: &Config, specs: &[DeviceSpec]) -> anyhow::Result<Vec<DeviceInfo>> {
    let wanted = specs.iter().filter_map(|spec| match spec {
        DeviceSpec::Cuda(ordinal) => Some(*ordinal),
        DeviceSpec::Simulated { .. } => None,
    });
    let Some(highest) = wanted.max() else { return Ok(Vec::new()) };
    let said = match &config.devices.origin {
        Origin::Default => "devices = \"auto\"".to_owned(),
        origin => format!("`devices = \"{}\"` ({origin})", config.devices.value),
    };
    let infos =
        cuda_devices().with_context(|| format!("{said} names GPUs; `devices = \"cpu\"` serves without"))?;
    let count = infos.len();
    anyhow::ensure!(
        (highest as usize) < count,
        "{said} names cuda:{highest}, but this process sees {count} GPU(s), cuda:0 to cuda:{}: take it off the list, or see \
         `stoker devices` and CUDA_VISIBLE_DEVICES",
        count.saturating_sub(1),
    );
    Ok(infos)
}

fn open_one(
    spec: DeviceSpec,
    at: u32,
    specs: &[DeviceSpec],
    infos: &[DeviceInfo],
) -> anyhow::Result<(Arc<dyn Device>, String, ByteSize)> {
    match spec {
        DeviceSpec::Cuda(ordinal) => {
            // Other GPUs of this server, idle as a rule, lend their links.
            let linked = |peer: &&stoker_device::Peer| {
                peer.link == Link::NvLink && specs.contains(&DeviceSpec::Cuda(peer.ordinal))
            };
            let info = infos.iter().find(|info| info.ordinal == ordinal);
            let peers = info.map(|info| &info.peers[..]).unwrap_or_default();
            let helpers = peers.iter().filter(linked).map(|peer| peer.ordinal).collect();
            let device = CudaDevice::open(ordinal, &CudaOptions { helpers, ..CudaOptions::default() })?;
            Ok((Arc::new(device), format!("cuda:{ordinal}"), WORK_CUDA))
        }
        DeviceSpec::Simulated { memory, rate } => {
            let options =
                SimulatedOptions { ordinal: at, memory, rate, real_time: rate.is_some(), exportable: true };
            Ok((Arc::new(SimulatedDevice::new(&options)?), format!("simulated:{at}"), ByteSize::ZERO))
        }
    }
}

/// A device's workers: each is told which on its command line.
fn workers_of(workers: &WorkerConfig, spec: DeviceSpec, config: &Config) -> WorkerConfig {
    let device = match spec {
        DeviceSpec::Cuda(ordinal) => stoker_worker::WorkerDevice::Cuda(ordinal),
        DeviceSpec::Simulated { .. } => stoker_worker::WorkerDevice::Simulated,
    };
    let mut command = workers.command.clone();
    command.extend([OsString::from("--device"), device.to_string().into()]);
    let prewarmed = NonZeroU32::new(config.workers_per_gpu.value).unwrap_or(NonZeroU32::MIN);
    WorkerConfig { command, prewarmed, ..workers.clone() }
}
