//! A range of device addresses.

use std::{fmt, os::fd::OwnedFd, sync::Arc};

use stoker_types::ByteSize;

use crate::{cuda::Mapping, error::DeviceError, simulated::HostMemory};

/// A range of device memory. A cheap handle: the memory goes with the last one, copies under way included.
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
        self.check_range(at, len)?;
        let granule = self.granule().bytes();
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let touched = if len == 0 { 0..0 } else { index(at / granule)..index((at + len).div_ceil(granule)) };
        fn erased<T: Send + Sync + 'static>(granules: &[Arc<T>]) -> Arc<[Arc<dyn Send + Sync>]> {
            granules.iter().map(|granule| Arc::clone(granule) as Arc<dyn Send + Sync>).collect()
        }
        let granules = match &self.inner.memory {
            Memory::Cuda(mapping) => erased(&mapping.granules()[touched]),
            Memory::Host(memory) => erased(&memory.granules()[touched]),
        };
        Ok(SlabPart {
            device: self.inner.device,
            address: self.address() + at,
            bytes: len,
            _granules: granules,
        })
    }

    /// A descriptor for each granule, in order. Whoever has them can map the memory in another process
    /// ([`crate::CudaDevice::import`], [`crate::SimulatedWindow::import`]), and keeps it alive.
    ///
    /// # Errors
    /// The driver's or the operating system's.
    pub fn export(&self) -> Result<Vec<OwnedFd>, DeviceError> {
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
        let end = at.saturating_add(len);
        if end <= self.inner.bytes {
            Ok(())
        } else {
            Err(DeviceError::OutOfRange { what: "slab", at, end, len: self.inner.bytes })
        }
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
