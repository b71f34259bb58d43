//! A range of device addresses.

use std::{collections::BTreeSet, fmt, os::fd::OwnedFd, sync::Arc};

use stoker_types::ByteSize;

use crate::{cuda::Mapping, error::DeviceError, simulated::HostMemory};

/// A range of device memory. A cheap handle: the memory goes with the last one, copies under way included. Of a handle to
/// some granules only ([`Slab::only`]), those.
#[derive(Clone)]
pub struct Slab {
    inner: Arc<Inner>,
}

/// A part of a slab, such as a tensor: keeps the granules that it lies in, and no other. A cheap handle.
#[derive(Clone)]
pub struct SlabPart {
    device: u32,
    address: u64,
    bytes: u64,
    _granules: Arc<[Arc<dyn Send + Sync>]>,
}

struct Inner {
    device: u32,
    bytes: u64,
    memory: Memory,
}

/// What is behind the addresses.
pub(crate) enum Memory {
    Cuda(Mapping),
    Host(HostMemory),
}

/// Granules of a slab, each with its number: all of them, or some.
pub(crate) struct Granules<T> {
    held: Vec<(usize, Arc<T>)>,
}

// === impl Granules ===

impl<T> Granules<T> {
    /// All of them, in order.
    pub(crate) fn all(granules: impl IntoIterator<Item = T>) -> Self {
        Self { held: granules.into_iter().map(Arc::new).enumerate().collect() }
    }

    /// One more behind those that are there, which are all before it.
    pub(crate) fn push(&mut self, granule: T) {
        self.held.push((self.held.len(), Arc::new(granule)));
    }

    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.held.iter().map(|(_, granule)| &**granule)
    }

    /// Those with these numbers; `None` when one of them isn't held.
    fn of(&self, numbers: std::ops::Range<usize>) -> Option<&[(usize, Arc<T>)]> {
        let first = self.held.partition_point(|(number, _)| *number < numbers.start);
        let found = self.held.get(first..first + numbers.len())?;
        // Ascending and distinct, so the ends say it all.
        let whole = match found {
            [] => true,
            [(only, _)] => *only == numbers.start,
            [(first, _), .., (last, _)] => (*first, *last) == (numbers.start, numbers.end - 1),
        };
        whole.then_some(found)
    }

    /// Those with these numbers, as far as they are held.
    pub(crate) fn only(&self, numbers: &BTreeSet<usize>) -> Self {
        let kept = self.held.iter().filter(|(number, _)| numbers.contains(number));
        Self { held: kept.cloned().collect() }
    }
}

impl<T: Send + Sync + 'static> Granules<T> {
    fn erased(&self, numbers: std::ops::Range<usize>) -> Option<Arc<[Arc<dyn Send + Sync>]>> {
        let erase = |(_, granule): &(usize, Arc<T>)| Arc::clone(granule) as Arc<dyn Send + Sync>;
        Some(self.of(numbers)?.iter().map(erase).collect())
    }
}

// === impl Slab ===

impl Slab {
    pub(crate) fn new(device: u32, bytes: u64, memory: Memory) -> Self {
        Self { inner: Arc::new(Inner { device, bytes, memory }) }
    }

    /// The device that it is on.
    #[must_use]
    pub fn device(&self) -> u32 {
        self.inner.device
    }

    /// How long it is: what was asked for, rounded up.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        ByteSize(self.inner.bytes)
    }

    /// The device's address of its first byte, valid in this process for as long as a handle lives. Whoever uses it keeps
    /// away from ranges that a copy under way writes to.
    #[must_use]
    pub fn address(&self) -> u64 {
        match &self.inner.memory {
            Memory::Cuda(mapping) => mapping.address(),
            Memory::Host(memory) => memory.address(),
        }
    }

    /// Bytes of a granule; the last may be shorter.
    #[must_use]
    pub fn granule(&self) -> ByteSize {
        match &self.inner.memory {
            Memory::Cuda(mapping) => ByteSize(mapping.granule()),
            Memory::Host(memory) => ByteSize(memory.granule()),
        }
    }

    /// `len` bytes from `at` on. When the last handle of the slab is gone, memory goes back granule by granule, each with
    /// the last part that lies in it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn part(&self, at: u64, len: u64) -> Result<SlabPart, DeviceError> {
        let touched = self.touched(at, len);
        let granules = match &self.inner.memory {
            Memory::Cuda(mapping) => mapping.granules().erased(touched),
            Memory::Host(memory) => memory.granules().erased(touched),
        };
        let granules =
            granules.filter(|_| self.is_within(at, len)).ok_or_else(|| self.out_of_range(at, len))?;
        Ok(SlabPart {
            device: self.inner.device,
            address: self.address() + at,
            bytes: len,
            _granules: granules,
        })
    }

    /// The same slab, of which this handle keeps only the granules in which these ranges (first byte, bytes) lie. Copies can
    /// go to those, whatever becomes of the others.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`].
    pub fn only(&self, ranges: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, DeviceError> {
        let mut numbers = BTreeSet::new();
        for (at, len) in ranges {
            self.check_range(at, len)?;
            numbers.extend(self.touched(at, len));
        }
        let memory = match &self.inner.memory {
            Memory::Cuda(mapping) => Memory::Cuda(mapping.only(&numbers)),
            Memory::Host(memory) => Memory::Host(memory.only(&numbers)),
        };
        Ok(Self::new(self.inner.device, self.inner.bytes, memory))
    }

    /// A descriptor for each granule, in order. Whoever has them can map the memory in another process
    /// ([`crate::CudaDevice::import`], [`crate::SimulatedWindow::import`]), and keeps it alive.
    ///
    /// # Errors
    /// The driver's or the operating system's; [`DeviceError::OutOfRange`] when this handle hasn't all of it.
    pub fn export(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        self.check_range(0, self.inner.bytes)?;
        match &self.inner.memory {
            Memory::Cuda(mapping) => mapping.export(),
            Memory::Host(memory) => memory.export(self.inner.device),
        }
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    pub(crate) fn check_device(&self, wanted: u32) -> Result<(), DeviceError> {
        let is = self.inner.device;
        if is == wanted { Ok(()) } else { Err(DeviceError::WrongDevice { is, wanted }) }
    }

    pub(crate) fn check_range(&self, at: u64, len: u64) -> Result<(), DeviceError> {
        let touched = self.touched(at, len);
        let held = match &self.inner.memory {
            Memory::Cuda(mapping) => mapping.granules().of(touched).is_some(),
            Memory::Host(memory) => memory.granules().of(touched).is_some(),
        };
        if held && self.is_within(at, len) { Ok(()) } else { Err(self.out_of_range(at, len)) }
    }

    fn is_within(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.inner.bytes)
    }

    /// Numbers of the granules that a range lies in.
    fn touched(&self, at: u64, len: u64) -> std::ops::Range<usize> {
        let granule = self.granule().bytes();
        let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let end = at.saturating_add(len).div_ceil(granule);
        if len == 0 { 0..0 } else { number(at / granule)..number(end) }
    }

    fn out_of_range(&self, at: u64, len: u64) -> DeviceError {
        let end = at.saturating_add(len);
        let what = if end > self.inner.bytes { "slab" } else { "what is kept of a slab" };
        DeviceError::OutOfRange { what, at, end, len: self.inner.bytes }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab")
            .field("device", &self.inner.device)
            .field("bytes", &self.inner.bytes)
            .finish_non_exhaustive()
    }
}

// === impl SlabPart ===

impl SlabPart {
    /// The device that it is on.
    #[must_use]
    pub fn device(&self) -> u32 {
        self.device
    }

    /// The device's address of its first byte, valid in this process for as long as a handle lives. See [`Slab::address`].
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        ByteSize(self.bytes)
    }
}

impl fmt::Debug for SlabPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabPart")
            .field("device", &self.device)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
