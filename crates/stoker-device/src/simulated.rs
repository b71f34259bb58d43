//! A device in host memory, with a link of a given speed: for machines without a GPU, for tests, and for faults.
//!
//! Its granules are files in memory, so that other processes map them as they would a GPU's ([`SimulatedWindow`]).

#![expect(unsafe_code, reason = "memory that is written behind a shared handle, as a device's is")]

use std::{
    collections::BTreeSet,
    fmt,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};
use stoker_io::Pinner;
use stoker_types::{ByteSize, BytesPerSec, ChunkSum};

use crate::{
    device::{Device, Transfer, Window},
    error::DeviceError,
    info::{DeviceInfo, DeviceMemory},
    queue::Queue,
    slab::{Granules, Memory, Slab},
};

/// What a simulated device is like.
#[derive(Debug, Clone, PartialEq)]
pub struct SimulatedOptions {
    /// Its number.
    pub ordinal: u32,
    /// Bytes that it has.
    pub memory: ByteSize,
    /// Speed of its link; `None`: as fast as memory is copied.
    pub rate: Option<BytesPerSec>,
    /// Whether a copy takes the time that the link would ([`Self::rate`]), or only counts it
    /// ([`SimulatedDevice::modelled`]).
    pub real_time: bool,
    /// Whether other processes can map its memory. If not, what a child of this process writes to it is the child's alone.
    pub exportable: bool,
}

/// A device in host memory. One copy at a time, in the order in which they were queued.
pub struct SimulatedDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
    link: Option<JoinHandle<()>>,
}

struct Shared {
    ordinal: u32,
    memory: ByteSize,
    rate: Option<BytesPerSec>,
    real_time: bool,
    exportable: bool,
    queue: Queue,
    used: Arc<AtomicU64>,
    /// Bytes that others hold.
    others: AtomicU64,
    /// Nanoseconds for which the link was busy, as modelled.
    busy_ns: AtomicU64,
    /// Bytes that may still be copied before copies wait; `None`: they don't.
    paused: Mutex<Option<u64>>,
    resumed: Condvar,
    /// Bytes that may still be copied before the next fault.
    fault: Mutex<Option<(u64, DeviceError)>>,
}

/// A simulated device's memory in another process, which was given its descriptors ([`Slab::export`]): readable, in one
/// piece. What it reads means something once the copies into it have ended; who gave the descriptors says when.
pub struct SimulatedWindow {
    space: HostSpace,
}

/// Files in memory, which take room only as they are written.
pub(crate) struct HostMemory {
    exportable: bool,
    /// Mapped for writing, too: made by this process.
    writable: bool,
    space: Arc<HostSpace>,
    granule: u64,
    granules: Granules<HostGranule>,
}

/// Addresses.
struct HostSpace {
    base: NonNull<u8>,
    len: usize,
    /// Held by whoever reads or writes through the device.
    access: Mutex<()>,
}

/// A part of it: given back with the last handle.
pub(crate) struct HostGranule {
    space: Arc<HostSpace>,
    at: usize,
    len: usize,
    /// The memory.
    file: OwnedFd,
    used: Arc<AtomicU64>,
}

// SAFETY: the memory belongs to this value, and every access of this crate goes through `write` and `read`, which hold
// `access`. Whoever uses the address by itself promises to keep readers and writers apart (`Slab::address`).
unsafe impl Send for HostSpace {}
// SAFETY: as above.
unsafe impl Sync for HostSpace {}

// === impl SimulatedOptions ===

impl Default for SimulatedOptions {
    fn default() -> Self {
        Self { ordinal: 0, memory: ByteSize::gib(16), rate: None, real_time: false, exportable: true }
    }
}

// === impl SimulatedDevice ===

impl SimulatedDevice {
    /// Makes a device.
    ///
    /// # Errors
    /// [`DeviceError::Os`] when no thread can be started.
    pub fn new(options: &SimulatedOptions) -> Result<Self, DeviceError> {
        let &SimulatedOptions { ordinal, memory, rate, real_time, exportable } = options;
        let info = DeviceInfo {
            ordinal,
            name: "simulated".to_owned(),
            uuid: format!("SIM-{ordinal}"),
            compute: (0, 0),
            memory,
            pci: None,
            numa_node: None,
            pcie: None,
            peers: Vec::new(),
        };
        let shared = Arc::new(Shared {
            ordinal,
            memory,
            rate,
            real_time,
            exportable,
            queue: Queue::default(),
            used: Arc::default(),
            others: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            paused: Mutex::default(),
            resumed: Condvar::new(),
            fault: Mutex::default(),
        });
        let link = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("stoker-sim-{ordinal}"))
                .spawn(move || shared.run())
                .map_err(|error| DeviceError::Os { call: "starting a thread", words: error.to_string() })?
        };
        Ok(Self { info, shared, link: Some(link) })
    }

    /// Time for which the link was busy, as modelled.
    #[must_use]
    pub fn modelled(&self) -> Duration {
        Duration::from_nanos(self.shared.busy_ns.load(Ordering::Relaxed))
    }

    /// Has other processes hold so many bytes of it from now on, as they may of a GPU's.
    pub fn hold_elsewhere(&self, bytes: ByteSize) {
        self.shared.others.store(bytes.bytes(), Ordering::Relaxed);
    }

    /// After `bytes` more, copies wait until [`Self::resume`].
    pub fn pause_after(&self, bytes: ByteSize) {
        *self.shared.paused.lock() = Some(bytes.bytes());
    }

    /// Copies wait no longer.
    pub fn resume(&self) {
        *self.shared.paused.lock() = None;
        self.shared.resumed.notify_all();
    }

    /// After `bytes` more, one copy fails with `error`. [`DeviceError::Lost`] fails all that follow, too.
    pub fn fail_after(&self, bytes: ByteSize, error: DeviceError) {
        *self.shared.fault.lock() = Some((bytes.bytes(), error));
    }
}

impl Device for SimulatedDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let slabs = ByteSize(self.shared.used.load(Ordering::Relaxed));
        let others = ByteSize(self.shared.others.load(Ordering::Relaxed));
        let total = self.shared.memory;
        Ok(DeviceMemory { total, free: total.saturating_sub(slabs).saturating_sub(others), slabs })
    }

    fn allocate(&self, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError> {
        let page = rustix::param::page_size() as u64;
        let len = bytes.bytes().max(1).next_multiple_of(page);
        let granule = granule.bytes().clamp(1, len).next_multiple_of(page);
        let (total, ordinal) = (self.shared.memory, self.shared.ordinal);
        let ours = total.saturating_sub(ByteSize(self.shared.others.load(Ordering::Relaxed)));
        let taken = self.shared.used.try_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(len).filter(|used| *used <= ours.bytes())
        });
        if let Err(used) = taken {
            let free = ours.saturating_sub(ByteSize(used));
            return Err(DeviceError::OutOfMemory { device: ordinal, needed: ByteSize(len), free, total });
        }
        let memory =
            HostMemory::new(len, granule, self.shared.exportable, &self.shared.used).inspect_err(|_| {
                self.shared.used.fetch_sub(len, Ordering::Relaxed);
            })?;
        Ok(Slab::new(ordinal, len, Memory::Host(memory)))
    }

    fn adopt(&self, granules: Vec<OwnedFd>, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError> {
        let memory = HostMemory::adopt(granules, bytes, granule, &self.shared.used)?;
        // It is taken, whatever this device has been said to have.
        self.shared.used.fetch_add(bytes.bytes(), Ordering::Relaxed);
        Ok(Slab::new(self.shared.ordinal, bytes.bytes(), Memory::Host(memory)))
    }

    fn copy(&self, transfer: Transfer) {
        match transfer.check(self.shared.ordinal) {
            Ok(()) => self.shared.queue.push(transfer),
            Err(error) => (transfer.done)(Err(error)),
        }
    }

    fn read(&self, slab: &Slab, at: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        slab.check_device(self.shared.ordinal)?;
        slab.check_range(at, into.len() as u64)?;
        let Memory::Host(memory) = slab.memory() else {
            return Err(DeviceError::WrongDevice { is: slab.device(), wanted: self.shared.ordinal });
        };
        memory.read(at, into);
        Ok(())
    }

    fn clear(&self, slab: &Slab, at: u64, len: u64) -> Result<(), DeviceError> {
        slab.check_device(self.shared.ordinal)?;
        slab.check_range(at, len)?;
        let Memory::Host(memory) = slab.memory() else {
            return Err(DeviceError::WrongDevice { is: slab.device(), wanted: self.shared.ordinal });
        };
        memory.check_writable(self.shared.ordinal)?;
        memory.write(at, &vec![0; usize::try_from(len).unwrap_or(usize::MAX)]);
        Ok(())
    }

    fn sums(&self, slab: &Slab, ranges: &[(u64, u64)]) -> Result<Vec<ChunkSum>, DeviceError> {
        let sum = |&(at, len): &(u64, u64)| {
            // Before anything is allocated for it.
            slab.check_range(at, len)?;
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
            self.read(slab, at, &mut bytes)?;
            Ok(ChunkSum::of(&bytes))
        };
        ranges.iter().map(sum).collect()
    }

    fn maps_read_only(&self) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn window(
        &self,
        granules: &[OwnedFd],
        bytes: ByteSize,
        granule: ByteSize,
    ) -> Result<Window, DeviceError> {
        let window = SimulatedWindow::import(granules, bytes, granule)?;
        let address = window.space.base.as_ptr().expose_provenance() as u64;
        Ok(Window::new(address, bytes, true, window))
    }

    fn pinner(&self) -> Option<Arc<dyn Pinner>> {
        None
    }
}

impl Drop for SimulatedDevice {
    fn drop(&mut self) {
        self.shared.queue.close(&DeviceError::Closed);
        self.resume();
        if let Some(link) = self.link.take()
            && link.thread().id() != std::thread::current().id()
        {
            // A panic in a `done` was reported where it happened.
            let _ = link.join();
        }
    }
}

impl fmt::Debug for SimulatedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedDevice").field("info", &self.info).finish_non_exhaustive()
    }
}

// === impl Shared ===

impl Shared {
    fn run(&self) {
        while let Some(transfer) = self.queue.pop(u64::MAX) {
            let result = self.make(&transfer);
            if let Err(lost @ DeviceError::Lost { .. }) = &result {
                self.queue.close(lost);
            }
            let Transfer { from, to, done, .. } = transfer;
            drop((from, to));
            done(result);
        }
    }

    fn make(&self, transfer: &Transfer) -> Result<(), DeviceError> {
        self.wait_until_resumed(transfer.bytes());
        self.meet_fault(transfer.bytes())?;
        let Memory::Host(memory) = transfer.to.memory() else {
            return Err(DeviceError::WrongDevice { is: transfer.to.device(), wanted: self.ordinal });
        };
        memory.check_writable(self.ordinal)?;
        let host = (*transfer.from).as_ref();
        for cut in &transfer.cuts {
            for (from, to) in cut.each_row() {
                memory.write(to, &host[from..from + cut.len]);
            }
        }
        if let Some(rate) = self.rate {
            let takes = ByteSize(transfer.bytes()).at(rate);
            let ns = u64::try_from(takes.as_nanos()).unwrap_or(u64::MAX);
            self.busy_ns.fetch_add(ns, Ordering::Relaxed);
            if self.real_time {
                // The model itself: nothing waits for something else to happen.
                std::thread::sleep(takes);
            }
        }
        if let Some(word) = transfer.arrival {
            memory.write(word, &1_u32.to_ne_bytes());
        }
        Ok(())
    }

    fn wait_until_resumed(&self, bytes: u64) {
        let mut paused = self.paused.lock();
        self.resumed.wait_while(&mut paused, |paused| paused.is_some_and(|left| left < bytes));
        if let Some(left) = &mut *paused {
            *left -= bytes;
        }
    }

    fn meet_fault(&self, bytes: u64) -> Result<(), DeviceError> {
        let mut fault = self.fault.lock();
        let Some((left, error)) = fault.as_mut() else { return Ok(()) };
        if let Some(rest) = left.checked_sub(bytes) {
            *left = rest;
            return Ok(());
        }
        let error = error.clone();
        *fault = None;
        Err(error)
    }
}

// === impl SimulatedWindow ===

impl SimulatedWindow {
    /// Maps memory that another process exported, `bytes` in granules of `granule`.
    ///
    /// # Errors
    /// [`DeviceError::Os`] when the descriptors are no such memory; the operating system's.
    pub fn import(granules: &[OwnedFd], bytes: ByteSize, granule: ByteSize) -> Result<Self, DeviceError> {
        let wrong = |why: &str| DeviceError::Os {
            call: "importing a simulated device's memory",
            words: format!("{} descriptors for {bytes} in granules of {granule}: {why}", granules.len()),
        };
        let page = rustix::param::page_size() as u64;
        let whole = granule.bytes() > 0 && granule.bytes().is_multiple_of(page);
        if !whole || bytes.bytes() == 0 || bytes.bytes().div_ceil(granule.bytes()) != granules.len() as u64 {
            return Err(wrong("they don't add up"));
        }
        let (Ok(len), Ok(step)) = (usize::try_from(bytes.bytes()), usize::try_from(granule.bytes())) else {
            return Err(wrong("more than there are addresses"));
        };
        let space = HostSpace::reserve(len)?;
        for (file, at) in granules.iter().zip((0..len).step_by(step)) {
            let part = step.min(len - at);
            // Pages beyond a file's end, or of one that shrinks, would end the process when they are read.
            let sealed =
                rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
            let is = rustix::fs::fstat(file).map_err(os("fstat"))?.st_size;
            if !sealed || u64::try_from(is).unwrap_or(0) < part as u64 {
                return Err(wrong("one is no granule of a simulated device"));
            }
            space.map(at, part, file, ProtFlags::READ, MapFlags::SHARED)?;
        }
        Ok(Self { space })
    }
}

impl AsRef<[u8]> for SimulatedWindow {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the whole range is mapped readable while `self` lives, its files can't shrink, and their owner doesn't
        // write to them any more once it has said that the copies have ended (see the type).
        unsafe { std::slice::from_raw_parts(self.space.base.as_ptr(), self.space.len) }
    }
}

impl fmt::Debug for SimulatedWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedWindow").field("len", &self.space.len).finish_non_exhaustive()
    }
}

// === impl HostMemory ===

impl HostMemory {
    fn new(bytes: u64, granule: u64, exportable: bool, used: &Arc<AtomicU64>) -> Result<Self, DeviceError> {
        let len = usize::try_from(bytes)
            .map_err(|error| DeviceError::Os { call: "mmap", words: error.to_string() })?;
        let step = usize::try_from(granule).unwrap_or(len);
        let space = Arc::new(HostSpace::reserve(len)?);
        let parts = (0..len).step_by(step).map(|at| (at, step.min(len - at)));
        let files = parts.map(|(at, len)| Ok((at, len, space.add(at, len, exportable)?)));
        let files = files.collect::<Result<Vec<_>, DeviceError>>()?;
        // From here on nothing fails: what a granule gives back when it goes was counted as used by the caller.
        let granules = files.into_iter().map(|(at, len, file)| {
            let (space, used) = (Arc::clone(&space), Arc::clone(used));
            HostGranule { space, at, len, file, used }
        });
        Ok(Self { granule, granules: Granules::all(granules), exportable, writable: true, space })
    }

    /// The same, keeping only the granules with these numbers.
    pub(crate) fn only(&self, numbers: &BTreeSet<usize>) -> Self {
        let Self { exportable, writable, space, granule, granules } = self;
        let (exportable, writable, granule, space) = (*exportable, *writable, *granule, Arc::clone(space));
        Self { exportable, writable, space, granule, granules: granules.only(numbers) }
    }

    /// What another process exported, for reading. Its bytes are for the caller to count as used.
    fn adopt(
        granules: Vec<OwnedFd>,
        bytes: ByteSize,
        granule: ByteSize,
        used: &Arc<AtomicU64>,
    ) -> Result<Self, DeviceError> {
        let SimulatedWindow { space } = SimulatedWindow::import(&granules, bytes, granule)?;
        let len = space.len;
        let space = Arc::new(space);
        let step = usize::try_from(granule.bytes()).unwrap_or(len);
        let granules = granules.into_iter().zip((0..len).step_by(step)).map(|(file, at)| {
            let (space, used) = (Arc::clone(&space), Arc::clone(used));
            HostGranule { space, at, len: step.min(len - at), file, used }
        });
        let granules = Granules::all(granules);
        Ok(Self { granule: granule.bytes(), granules, exportable: true, writable: false, space })
    }

    fn check_writable(&self, device: u32) -> Result<(), DeviceError> {
        if self.writable {
            return Ok(());
        }
        Err(DeviceError::Unsupported { device, what: "write to memory that another process made" })
    }

    /// A descriptor for each granule, for reading.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] when it isn't to leave the process.
    pub(crate) fn export(&self, device: u32) -> Result<Vec<OwnedFd>, DeviceError> {
        if !self.exportable {
            return Err(DeviceError::Unsupported {
                device,
                what: "export memory that is its process's alone",
            });
        }
        let export_one = |granule: &HostGranule| {
            let path = format!("/proc/self/fd/{}", granule.file.as_raw_fd());
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(os("open"))
        };
        self.granules.iter().map(export_one).collect()
    }

    pub(crate) fn address(&self) -> u64 {
        self.space.base.as_ptr() as u64
    }

    pub(crate) fn granule(&self) -> u64 {
        self.granule
    }

    pub(crate) fn granules(&self) -> &Granules<HostGranule> {
        &self.granules
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let HostSpace { base, len, access } = &*self.space;
        let _access = access.lock();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        assert!(at <= *len && bytes.len() <= len - at, "checked when the copy was queued");
        // SAFETY: the range lies within the mapping (above), which isn't the source's: `Slab::address` asks who uses it
        // to keep away from a copy's range.
        unsafe { base.as_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        let HostSpace { base, len, access } = &*self.space;
        let _access = access.lock();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        assert!(at <= *len && into.len() <= len - at, "checked by the caller");
        // SAFETY: as in `write`; mapped pages are always initialised.
        unsafe { into.as_mut_ptr().copy_from_nonoverlapping(base.as_ptr().add(at), into.len()) }
    }
}

// === impl HostSpace, HostGranule ===

impl HostSpace {
    /// Addresses without memory.
    fn reserve(len: usize) -> Result<Self, DeviceError> {
        // SAFETY: a new private mapping at an address that the kernel chooses.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(os("mmap"))?;
        let base = NonNull::new(base.cast())
            .ok_or_else(|| DeviceError::Os { call: "mmap", words: "mapped at address zero".to_owned() })?;
        Ok(Self { base, len, access: Mutex::new(()) })
    }

    /// New memory behind a part of the addresses.
    fn add(&self, at: usize, len: usize, exportable: bool) -> Result<OwnedFd, DeviceError> {
        let file = rustix::fs::memfd_create("stoker-device", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(os("memfd_create"))?;
        rustix::fs::ftruncate(&file, len as u64).map_err(os("ftruncate"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(os("fcntl"))?;
        let kind = if exportable { MapFlags::SHARED } else { MapFlags::PRIVATE };
        self.map(at, len, &file, ProtFlags::READ | ProtFlags::WRITE, kind)?;
        Ok(file)
    }

    fn map(
        &self,
        at: usize,
        len: usize,
        file: &OwnedFd,
        access: ProtFlags,
        kind: MapFlags,
    ) -> Result<(), DeviceError> {
        assert!(at <= self.len && len <= self.len - at, "a granule lies within its slab");
        // SAFETY: replaces a part of the reservation (above) that nobody uses yet.
        let mapped = unsafe {
            let at = self.base.as_ptr().add(at).cast();
            rustix::mm::mmap(at, len, access, kind | MapFlags::FIXED | MapFlags::NORESERVE, file, 0)
        };
        mapped.map(|_| ()).map_err(os("mmap"))
    }
}

impl Drop for HostGranule {
    fn drop(&mut self) {
        // SAFETY: the range lies within the reservation, which the granule holds, and nobody uses it any more. The file's
        // memory goes with its last mapping, another process's included.
        let forgotten = unsafe {
            rustix::mm::mmap_anonymous(
                self.space.base.as_ptr().add(self.at).cast(),
                self.len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        if let Err(error) = forgotten {
            tracing::error!(%error, "simulated device memory was not given back");
        }
        self.used.fetch_sub(self.len as u64, Ordering::Relaxed);
    }
}

impl Drop for HostSpace {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `reserve` with this length. The only error is a range that isn't mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn os(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> DeviceError {
    move |errno| DeviceError::Os { call, words: errno.to_string() }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::device::Cut;

    fn device(options: &SimulatedOptions) -> SimulatedDevice {
        SimulatedDevice::new(options).unwrap()
    }

    fn copy(device: &SimulatedDevice, bytes: Vec<u8>, to: &Slab, cuts: Vec<Cut>) -> Result<(), DeviceError> {
        let (sender, done) = mpsc::channel();
        let done_sender = Box::new(move |result| sender.send(result).unwrap());
        device.copy(Transfer {
            from: Box::new(bytes),
            to: to.clone(),
            cuts,
            arrival: None,
            done: done_sender,
        });
        done.recv().unwrap()
    }

    #[test]
    fn cuts_arrive_where_they_should() {
        let device = device(&SimulatedOptions::default());
        let slab = device.allocate(ByteSize(10_000), ByteSize::ZERO).unwrap();
        let cuts = vec![Cut::range(2, 3, 9_000), Cut::range(0, 2, 7)];
        copy(&device, vec![1, 2, 3, 4, 5], &slab, cuts).unwrap();
        let mut got = [9; 4];
        device.read(&slab, 8_999, &mut got).unwrap();
        assert_eq!(got, [0, 3, 4, 5]);
        device.read(&slab, 6, &mut got).unwrap();
        assert_eq!(got, [0, 1, 2, 0]);
    }

    #[test]
    fn ranges_outside_are_refused() {
        let device = device(&SimulatedOptions::default());
        let slab = device.allocate(ByteSize(4096), ByteSize::ZERO).unwrap();
        let host = copy(&device, vec![0; 8], &slab, vec![Cut::range(4, 5, 0)]);
        assert_eq!(host, Err(DeviceError::OutOfRange { what: "host buffer", at: 4, end: 9, len: 8 }));
        let beyond = copy(&device, vec![0; 8], &slab, vec![Cut::range(0, 8, 4089)]);
        assert_eq!(beyond, Err(DeviceError::OutOfRange { what: "slab", at: 4089, end: 4097, len: 4096 }));
        let far = copy(&device, vec![0; 8], &slab, vec![Cut::range(0, 8, u64::MAX)]);
        assert!(matches!(far, Err(DeviceError::OutOfRange { what: "slab", .. })), "{far:?}");
        let other = device_of(1);
        assert_eq!(
            copy(&other, vec![0; 8], &slab, vec![Cut::range(0, 8, 0)]),
            Err(DeviceError::WrongDevice { is: 0, wanted: 1 })
        );
    }

    fn device_of(ordinal: u32) -> SimulatedDevice {
        device(&SimulatedOptions { ordinal, ..SimulatedOptions::default() })
    }

    #[test]
    fn memory_of_one_process_is_not_exported() {
        let device = device(&SimulatedOptions { exportable: false, ..SimulatedOptions::default() });
        let slab = device.allocate(ByteSize::mib(1), ByteSize::ZERO).unwrap();
        copy(&device, vec![7; 4], &slab, vec![Cut::range(0, 4, 100)]).unwrap();
        let mut read = [0; 4];
        device.read(&slab, 100, &mut read).unwrap();
        assert_eq!(read, [7; 4]);
        assert!(matches!(slab.export(), Err(DeviceError::Unsupported { device: 0, .. })));
    }

    #[test]
    fn memory_is_counted_and_comes_back() {
        let device = device(&SimulatedOptions { memory: ByteSize::mib(2), ..SimulatedOptions::default() });
        let slab = device.allocate(ByteSize::mib(1), ByteSize::ZERO).unwrap();
        let again = slab.clone();
        assert_eq!(
            device.allocate(ByteSize::mib(2), ByteSize::ZERO).unwrap_err(),
            DeviceError::OutOfMemory {
                device: 0,
                needed: ByteSize::mib(2),
                free: ByteSize::mib(1),
                total: ByteSize::mib(2)
            }
        );
        drop(slab);
        assert_eq!(device.memory().unwrap().free, ByteSize::mib(1), "a handle is left");
        drop(again);
        assert_eq!(device.memory().unwrap().free, ByteSize::mib(2));
        device.allocate(ByteSize::mib(2), ByteSize::ZERO).unwrap();
    }

    #[test]
    fn memory_comes_back_granule_by_granule() {
        let page = rustix::param::page_size() as u64;
        let device = device(&SimulatedOptions { memory: ByteSize(16 * page), ..SimulatedOptions::default() });
        let slab = device.allocate(ByteSize(8 * page), ByteSize(2 * page)).unwrap();
        assert_eq!(slab.granule(), ByteSize(2 * page));
        let used = || device.memory().unwrap().slabs.bytes() / page;
        let first = slab.part(0, 100).unwrap();
        let tied = first.clone();
        let across = slab.part(2 * page - 1, 2).unwrap();
        let none = slab.part(5 * page, 0).unwrap();
        let beyond = slab.part(8 * page - 1, 2).unwrap_err();
        assert!(matches!(beyond, DeviceError::OutOfRange { what: "slab", .. }), "{beyond}");
        copy(&device, vec![7; 100], &slab, vec![Cut::range(0, 100, 0)]).unwrap();
        assert_eq!((used(), across.address()), (8, slab.address() + 2 * page - 1));
        drop(slab);
        assert_eq!(used(), 4, "what no part lies in is gone");
        drop(across);
        assert_eq!(used(), 2, "its first granule is another's, too");
        drop(first);
        assert_eq!(used(), 2, "tied");
        drop(tied);
        assert_eq!(used(), 0);
        drop(none);
        device.allocate(ByteSize(16 * page), ByteSize::ZERO).unwrap();
    }

    #[test]
    fn a_handle_to_some_granules_keeps_those() {
        let page = rustix::param::page_size() as u64;
        let device = device(&SimulatedOptions { memory: ByteSize(16 * page), ..SimulatedOptions::default() });
        let slab = device.allocate(ByteSize(8 * page), ByteSize(2 * page)).unwrap();
        let used = || device.memory().unwrap().slabs.bytes() / page;
        let ends = slab.only([(0, 1), (7 * page, 100), (page, 0)]).unwrap();
        let beyond = slab.only([(8 * page, 1)]).unwrap_err();
        assert!(matches!(beyond, DeviceError::OutOfRange { what: "slab", .. }), "{beyond}");
        assert_eq!((ends.address(), ends.bytes()), (slab.address(), slab.bytes()));
        drop(slab);
        assert_eq!(used(), 4);
        copy(&device, vec![7; 200], &ends, vec![Cut::range(0, 100, 7 * page), Cut::range(0, 100, 0)])
            .unwrap();
        for at in [2 * page, 6 * page - 1] {
            let gone = copy(&device, vec![7; 2], &ends, vec![Cut::range(0, 2, at)]).unwrap_err();
            assert!(matches!(gone, DeviceError::OutOfRange { what: "what is kept of a slab", .. }), "{gone}");
            assert!(ends.part(at, 2).is_err());
        }
        assert!(copy(&device, vec![7; 16], &ends, vec![Cut::range(0, 8 * 2, 2 * page - 8)]).is_err());
        assert!(ends.export().is_err(), "not all of it");
        let first = ends.part(page, page).unwrap();
        drop(ends);
        assert_eq!(used(), 2);
        drop(first);
        assert_eq!(used(), 0);
    }

    #[test]
    fn exported_memory_is_seen_elsewhere_and_outlives_its_slab() {
        let page = rustix::param::page_size() as u64;
        let device = device(&SimulatedOptions::default());
        let (bytes, granule) = (ByteSize(5 * page), ByteSize(2 * page));
        let slab = device.allocate(bytes, granule).unwrap();
        let granules = slab.export().unwrap();
        assert_eq!(granules.len(), 3);
        let window = SimulatedWindow::import(&granules, bytes, granule).unwrap();
        let across = vec![Cut::range(0, 4, 2 * page - 2), Cut::range(4, 1, 5 * page - 1)];
        copy(&device, vec![1, 2, 3, 4, 5], &slab, across).unwrap();
        let at = usize::try_from(2 * page - 2).unwrap();
        assert_eq!((&window.as_ref()[at..at + 4], window.as_ref().last()), (&[1, 2, 3, 4][..], Some(&5)));
        drop(slab);
        assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO);
        assert_eq!(&window.as_ref()[at..at + 4], [1, 2, 3, 4], "whoever maps it has it");
        // SAFETY of the type rests on these.
        for (granules, bytes, granule) in [
            (&granules[..2], bytes, granule),
            (&granules[..], ByteSize(7 * page), granule),
            (&granules[..], bytes, ByteSize(2 * page + 1)),
            (&granules[..], ByteSize(6 * page), granule),
            (&granules[..0], ByteSize::ZERO, granule),
        ] {
            assert!(SimulatedWindow::import(granules, bytes, granule).is_err(), "{bytes} in {granule}");
        }
        let file = OwnedFd::from(tempfile());
        assert!(SimulatedWindow::import(&[file], ByteSize(page), ByteSize(page)).is_err(), "not sealed");
        let writable = rustix::fs::fcntl_getfl(&granules[0]).unwrap().contains(OFlags::RDWR);
        assert!(!writable, "for reading only");
    }

    #[test]
    fn memory_of_a_process_that_is_gone_is_taken_over() {
        let page = rustix::param::page_size() as u64;
        let options = SimulatedOptions { memory: ByteSize(8 * page), ..SimulatedOptions::default() };
        let before = device(&options);
        let (bytes, granule) = (ByteSize(5 * page), ByteSize(2 * page));
        let slab = before.allocate(bytes, granule).unwrap();
        copy(&before, vec![7; 9], &slab, vec![Cut::range(0, 9, 2 * page - 4)]).unwrap();
        let granules = slab.export().unwrap();
        drop((slab, before));

        let after = device(&options);
        assert!(
            after
                .adopt(granules[..2].iter().map(|fd| fd.try_clone().unwrap()).collect(), bytes, granule)
                .is_err()
        );
        assert_eq!(after.memory().unwrap().slabs, ByteSize::ZERO);
        let slab = after.adopt(granules, bytes, granule).unwrap();
        assert_eq!((slab.bytes(), slab.granule(), slab.device()), (bytes, granule, 0));
        let mut read = [0; 9];
        after.read(&slab, 2 * page - 4, &mut read).unwrap();
        assert_eq!(read, [7; 9]);
        let memory = after.memory().unwrap();
        assert_eq!((memory.slabs, memory.free), (bytes, ByteSize(3 * page)));
        assert!(after.allocate(ByteSize(4 * page), granule).is_err(), "it is not free");
        // It is for reading, and can be handed on.
        assert!(matches!(after.clear(&slab, 0, 4), Err(DeviceError::Unsupported { .. })));
        let refused = copy(&after, vec![1], &slab, vec![Cut::range(0, 1, 0)]);
        assert!(matches!(refused, Err(DeviceError::Unsupported { .. })));
        let again = slab.export().unwrap();
        drop(slab);
        assert_eq!(after.memory().unwrap().slabs, ByteSize::ZERO);
        assert_eq!(SimulatedWindow::import(&again, bytes, granule).unwrap().as_ref()[0], 0);
    }

    fn tempfile() -> std::fs::File {
        let file = rustix::fs::memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 20).unwrap();
        file.into()
    }

    #[test]
    fn what_others_hold_is_not_free() {
        let device = device(&SimulatedOptions { memory: ByteSize::mib(4), ..SimulatedOptions::default() });
        device.hold_elsewhere(ByteSize::mib(3));
        assert_eq!(device.memory().unwrap().free, ByteSize::mib(1));
        let error = device.allocate(ByteSize::mib(2), ByteSize::ZERO).unwrap_err();
        assert!(
            matches!(error, DeviceError::OutOfMemory { free, .. } if free == ByteSize::mib(1)),
            "{error}"
        );
        device.hold_elsewhere(ByteSize::ZERO);
        device.allocate(ByteSize::mib(4), ByteSize::ZERO).unwrap();
    }

    #[test]
    fn the_link_takes_its_time_on_paper() {
        let rate = Some(BytesPerSec(1e9));
        let device = device(&SimulatedOptions { rate, ..SimulatedOptions::default() });
        let slab = device.allocate(ByteSize(1_000_000), ByteSize::ZERO).unwrap();
        copy(&device, vec![1; 1_000_000], &slab, vec![Cut::range(0, 1_000_000, 0)]).unwrap();
        assert_eq!(device.modelled(), Duration::from_millis(1));
    }

    #[test]
    fn a_lost_device_fails_everything_after() {
        let device = device(&SimulatedOptions::default());
        let slab = device.allocate(ByteSize(4096), ByteSize::ZERO).unwrap();
        let whole = || vec![Cut::range(0, 100, 0)];
        let lost = DeviceError::Lost {
            device: 0,
            call: "copy",
            name: "CUDA_ERROR_ECC_UNCORRECTABLE".into(),
            words: "on purpose".into(),
        };
        device.fail_after(ByteSize(150), lost.clone());
        assert_eq!(copy(&device, vec![0; 100], &slab, whole()), Ok(()));
        assert_eq!(copy(&device, vec![0; 100], &slab, whole()), Err(lost.clone()));
        assert_eq!(copy(&device, vec![0; 100], &slab, whole()), Err(lost));
    }

    #[test]
    fn closing_ends_every_copy_once() {
        let device = device(&SimulatedOptions {
            rate: Some(BytesPerSec(1e6)),
            real_time: true,
            ..SimulatedOptions::default()
        });
        let slab = device.allocate(ByteSize(4096), ByteSize::ZERO).unwrap();
        let (sender, done) = mpsc::channel();
        for _ in 0..50 {
            let sender = sender.clone();
            device.copy(Transfer {
                from: Box::new(vec![0; 4096]),
                to: slab.clone(),
                cuts: vec![Cut::range(0, 4096, 0)],
                arrival: None,
                done: Box::new(move |result| sender.send(result).unwrap()),
            });
        }
        drop(sender);
        drop(device);
        let ended: Vec<_> = done.into_iter().collect();
        assert_eq!(ended.len(), 50);
        assert!(ended.contains(&Err(DeviceError::Closed)));
    }
}
