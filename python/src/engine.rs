//! What all loads of a process share: the runtime, the devices, the ring.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::process::{Pid, getpid};
use stoker_device::{CudaDevice, CudaOptions, Device, SimulatedDevice, SimulatedOptions};
use stoker_store::{Store, StoreConfig};
use stoker_types::{ByteSize, BytesPerSec};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::{dlpack::DeviceKind, error::Error, node::Opener, settings};

/// The process's engine. Locked only by threads that hold the interpreter's lock and don't release it meanwhile: so nobody
/// holds it while the process forks.
static ENGINE: Mutex<Option<Arc<Engine>>> = Mutex::new(None);

/// The process that has opened a GPU: its children can't.
static GPU_OPENED_BY: AtomicU32 = AtomicU32::new(0);

/// Where a load ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Host,
    Cuda(u32),
    /// Host memory that stands for a device's: for tests of everything that isn't the driver. Its link takes as long as one
    /// of so many MB/s, if that is given.
    Simulated(u32, Option<u32>),
}

pub(crate) struct Engine {
    process: Pid,
    runtime: Runtime,
    devices: Mutex<HashMap<Place, Arc<Target>>>,
}

/// A device, and the ring that bytes go through to it.
pub(crate) struct Target {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) kind: DeviceKind,
    pub(crate) opener: Arc<Opener>,
    /// Held by the load that is under way: one has the whole link, and the ring.
    pub(crate) store: tokio::sync::Mutex<Store>,
}

// === impl Place ===

impl Place {
    /// `cpu`, `cuda`, `cuda:1`; `simulated:1`, `simulated:1:50`.
    pub(crate) fn parse(name: &str) -> Result<Self, Error> {
        let (kind, which) = name.split_once(':').unwrap_or((name, "0"));
        let (ordinal, rate) = match which.split_once(':') {
            Some((ordinal, rate)) => (ordinal, rate.parse().map(Some)),
            None => (which, Ok(None)),
        };
        match (kind, ordinal.parse(), rate) {
            ("cpu", Ok(0), Ok(None)) => Ok(Self::Host),
            ("cuda", Ok(ordinal), Ok(None)) => Ok(Self::Cuda(ordinal)),
            ("simulated", Ok(ordinal), Ok(rate)) => Ok(Self::Simulated(ordinal, rate)),
            _ => Err(Error::NotSupported(format!(
                "no device `{name}`: it must be \"cpu\" or \"cuda:N\"; give the tensors to other devices from there"
            ))),
        }
    }
}

// === impl Engine ===

impl Engine {
    /// The process's own; a new one in a forked child. Called with the interpreter's lock held.
    pub(crate) fn get() -> Result<Arc<Self>, Error> {
        let mut engine = ENGINE.lock();
        if let Some(engine) = engine.as_ref().filter(|engine| engine.is_here()) {
            return Ok(Arc::clone(engine));
        }
        let runtime = Builder::new_multi_thread()
            .worker_threads(settings::RUNTIME_THREADS)
            .thread_name("stoker")
            .enable_all()
            .build()
            .map_err(|error| Error::Internal(format!("starting threads failed: {error}")))?;
        let new = Arc::new(Self { process: getpid(), runtime, devices: Mutex::default() });
        // A parent's has no threads here: nothing of it can end in order.
        std::mem::forget(engine.replace(Arc::clone(&new)));
        Ok(new)
    }

    /// Whether this is the process that made it.
    pub(crate) fn is_here(&self) -> bool {
        self.process == getpid()
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Opens a device if it isn't. Blocks, for as long as making a context takes.
    pub(crate) fn target(&self, place: Place) -> Result<Option<Arc<Target>>, Error> {
        if place == Place::Host {
            return Ok(None);
        }
        let mut devices = self.devices.lock();
        if let Some(target) = devices.get(&place) {
            return Ok(Some(Arc::clone(target)));
        }
        let (device, kind): (Arc<dyn Device>, _) = match place {
            Place::Cuda(ordinal) => {
                let here = getpid().as_raw_nonzero().get().cast_unsigned();
                let opened = GPU_OPENED_BY.load(Ordering::Relaxed);
                if opened != 0 && opened != here {
                    return Err(Error::Forked(
                        "this process was forked from one that uses a GPU, which CUDA doesn't allow: start it with \
                         multiprocessing.get_context(\"spawn\")"
                            .to_owned(),
                    ));
                }
                GPU_OPENED_BY.store(here, Ordering::Relaxed);
                (Arc::new(CudaDevice::open(ordinal, &CudaOptions::default())?), DeviceKind::Cuda)
            }
            Place::Simulated(ordinal, rate) => {
                let (real_time, rate) = (rate.is_some(), rate.map(|mb| BytesPerSec(f64::from(mb) * 1e6)));
                let options = SimulatedOptions {
                    ordinal,
                    rate,
                    real_time,
                    exportable: false,
                    ..SimulatedOptions::default()
                };
                (Arc::new(SimulatedDevice::new(&options)?), DeviceKind::Cpu)
            }
            Place::Host => return Ok(None),
        };
        let opener = Arc::new(Opener::default());
        let config = StoreConfig {
            opener: opener.clone(),
            shared: false,
            read_threads: settings::read_threads(),
            ..StoreConfig::new(settings::RING)
        };
        let store = Store::open(config)?;
        store.place_near([device.info().numa_node]);
        store.attach(&*device, ByteSize::ZERO);
        let target = Arc::new(Target { device, kind, opener, store: tokio::sync::Mutex::new(store) });
        devices.insert(place, Arc::clone(&target));
        Ok(Some(target))
    }

    /// Gives the ring and the devices back, as far as no load uses them.
    pub(crate) fn close_devices(&self) {
        let idle = std::mem::take(&mut *self.devices.lock());
        drop(idle);
    }

    /// Memory of a device: total, free, in tensors of this package.
    pub(crate) fn memory(&self, place: Place) -> Result<Option<stoker_device::DeviceMemory>, Error> {
        let Some(target) = self.target(place)? else { return Ok(None) };
        Ok(Some(target.device.memory()?))
    }
}
