//! A GPU.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{fmt, os::fd::OwnedFd, sync::Arc};

use cudarc::driver::sys;
use parking_lot::Mutex;
use stoker_io::{PinError, Pinner};
use stoker_types::{ByteSize, ChunkSum};

use super::{
    context::{Context, Event, Stream},
    link::{Link, Way},
    memory::{Access, Mapping},
    sums::Sums,
    topology,
};
use crate::{
    device::{Device, Transfer, Window},
    error::DeviceError,
    info::{self, DeviceInfo, DeviceMemory},
    queue::Queue,
    slab::{Memory, Slab},
};

/// How a GPU is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaOptions {
    /// Streams on the device's own link. Two keep it busy; more gain nothing.
    pub streams: usize,
    /// Other devices of the host that lend their links: bytes go over theirs to them, and on over `NVLink`. Each gives
    /// `slots` times `slot` bytes of memory for it.
    pub helpers: Vec<u32>,
    /// Longest copy that a helper takes, bytes.
    pub slot: ByteSize,
    /// Copies that a helper has room for at a time.
    pub slots: u32,
    /// Copies that each link has under way at most: enough to keep it busy while one that has ended is noticed.
    pub depth: usize,
}

/// A GPU of this process.
pub struct CudaDevice {
    info: DeviceInfo,
    context: Arc<Context>,
    queue: Arc<Queue>,
    helpers: Vec<Arc<Context>>,
    pinner: Arc<CudaPinner>,
    links: Vec<Link>,
    /// Made when it is first needed.
    sums: Mutex<Option<Arc<Sums>>>,
}

struct CudaPinner {
    context: Arc<Context>,
}

// === impl CudaOptions ===

impl Default for CudaOptions {
    fn default() -> Self {
        Self { streams: 2, helpers: Vec::new(), slot: ByteSize::mib(16), slots: 2, depth: 6 }
    }
}

// === impl CudaDevice ===

impl CudaDevice {
    /// Opens a device: makes its context (0.2 to 0.4 s in a new process) and starts its links.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::Unsupported`] when a helper can't reach the device's memory.
    pub fn open(ordinal: u32, options: &CudaOptions) -> Result<Self, DeviceError> {
        let info = topology::describe(ordinal)?;
        let context = Context::open(ordinal)?;
        let queue = Arc::new(Queue::default());
        let mut device = Self {
            info,
            pinner: Arc::new(CudaPinner { context: Arc::clone(&context) }),
            context,
            queue,
            helpers: Vec::new(),
            links: Vec::new(),
            sums: Mutex::default(),
        };
        let own = Way::direct(&device.context, options.streams)?;
        device.start(&format!("stoker-gpu{ordinal}"), Arc::clone(&device.context), own, options.depth)?;
        for &helper in &options.helpers {
            let reaches = |peer: &info::Peer| peer.ordinal == helper && peer.link != info::Link::None;
            if !device.info.peers.iter().any(reaches) {
                let what = "be reached from a device that was to lend its link";
                return Err(DeviceError::Unsupported { device: ordinal, what });
            }
            let context = Context::open(helper)?;
            let way = Way::helper(&context, options.slot, options.slots)?;
            device.helpers.push(Arc::clone(&context));
            device.start(&format!("stoker-gpu{ordinal}-by{helper}"), context, way, options.depth)?;
        }
        Ok(device)
    }

    /// Maps memory that another process exported ([`Slab::export`]).
    ///
    /// # Errors
    /// The driver's; [`DeviceError::Os`] when the descriptors are not `bytes` in granules of `granule`.
    pub fn import(
        &self,
        granules: &[OwnedFd],
        bytes: ByteSize,
        granule: ByteSize,
    ) -> Result<Slab, DeviceError> {
        let mapping = Mapping::import(
            &self.context,
            granules,
            bytes.bytes(),
            granule.bytes(),
            Access::Write(&self.helpers),
        )?;
        Ok(self.slab(mapping))
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn start(
        &mut self,
        name: &str,
        context: Arc<Context>,
        way: Way,
        depth: usize,
    ) -> Result<(), DeviceError> {
        self.links.push(Link::start(name, &context, way, depth, Arc::clone(&self.queue))?);
        Ok(())
    }

    fn slab(&self, mapping: Mapping) -> Slab {
        Slab::new(self.context.ordinal, mapping.bytes(), Memory::Cuda(mapping))
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let (free, total) = self.context.memory()?;
        Ok(DeviceMemory { total, free, slabs: self.context.in_slabs() })
    }

    fn allocate(&self, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError> {
        Ok(self.slab(Mapping::create(&self.context, bytes.bytes(), granule.bytes(), &self.helpers)?))
    }

    fn adopt(&self, granules: Vec<OwnedFd>, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError> {
        self.import(&granules, bytes, granule)
    }

    fn copy(&self, transfer: Transfer) {
        match transfer.check(self.context.ordinal) {
            Ok(()) => self.queue.push(transfer),
            Err(error) => (transfer.done)(Err(error)),
        }
    }

    fn read(&self, slab: &Slab, at: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        slab.check_device(self.context.ordinal)?;
        slab.check_range(at, into.len() as u64)?;
        self.context.bind()?;
        // SAFETY: the range was checked, the slab lives, and the call waits for the copy.
        let read = unsafe { sys::cuMemcpyDtoH_v2(into.as_mut_ptr().cast(), slab.address() + at, into.len()) };
        self.context.check("cuMemcpyDtoH", read)
    }

    fn clear(&self, slab: &Slab, at: u64, len: u64) -> Result<(), DeviceError> {
        slab.check_device(self.context.ordinal)?;
        slab.check_range(at, len)?;
        self.context.bind()?;
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let stream = Stream::new(&self.context)?;
        // SAFETY: the range was checked, and the slab lives until the stream has been waited for.
        let cleared = unsafe { sys::cuMemsetD8Async(slab.address() + at, 0, bytes, stream.raw) };
        self.context.check("cuMemsetD8Async", cleared)?;
        let done = Event::new(&self.context)?;
        done.record(&stream)?;
        done.synchronize()
    }

    fn sums(&self, slab: &Slab, ranges: &[(u64, u64)]) -> Result<Vec<ChunkSum>, DeviceError> {
        slab.check_device(self.context.ordinal)?;
        let sums = {
            let mut sums = self.sums.lock();
            match &*sums {
                Some(sums) => Arc::clone(sums),
                None => Arc::clone(sums.insert(Arc::new(Sums::new(&self.context)?))),
            }
        };
        let address = |&(at, len): &(u64, u64)| {
            slab.check_range(at, len)?;
            Ok((slab.address() + at, len))
        };
        sums.of(&ranges.iter().map(address).collect::<Result<Vec<_>, DeviceError>>()?)
    }

    fn maps_read_only(&self) -> Result<bool, DeviceError> {
        Mapping::can_be_read_only(&self.context)
    }

    fn window(
        &self,
        granules: &[OwnedFd],
        bytes: ByteSize,
        granule: ByteSize,
    ) -> Result<Window, DeviceError> {
        let read_only = self.maps_read_only()?;
        let access = if read_only { Access::Read } else { Access::Write(&[]) };
        let mapping = Mapping::import(&self.context, granules, bytes.bytes(), granule.bytes(), access)?;
        Ok(Window::new(mapping.address(), bytes, read_only, mapping))
    }

    fn pinner(&self) -> Option<Arc<dyn Pinner>> {
        Some(self.pinner.clone())
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.queue.close(&DeviceError::Closed);
        // Each waits for what is under way.
        self.links.clear();
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("info", &self.info).finish_non_exhaustive()
    }
}

// === impl CudaPinner ===

impl Pinner for CudaPinner {
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<(), PinError> {
        self.context.bind().map_err(pin_error)?;
        // SAFETY: the caller's promise. Portable: every device of the process reads it.
        let registered =
            unsafe { sys::cuMemHostRegister_v2(address.cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        self.context.check("cuMemHostRegister", registered).map_err(pin_error)
    }

    unsafe fn unpin(&self, address: *mut u8, _bytes: usize) -> Result<(), PinError> {
        self.context.bind().map_err(pin_error)?;
        // SAFETY: the caller's promise.
        let unregistered = unsafe { sys::cuMemHostUnregister(address.cast()) };
        self.context.check("cuMemHostUnregister", unregistered).map_err(pin_error)
    }
}

fn pin_error(error: DeviceError) -> PinError {
    PinError(error.to_string())
}
