//! Device memory behind addresses of our choosing, shareable with other processes.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    collections::BTreeSet,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType, CUmemGenericAllocationHandle,
    CUmemLocation, CUmemLocationType, CUresult,
};

use super::context::Context;
use crate::{error::DeviceError, slab::Granules};

const HANDLE_TYPE: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// A range of addresses with memory behind it, in granules.
pub(crate) struct Mapping {
    addresses: Arc<Addresses>,
    granule: u64,
    /// Those that are mapped, in order; or some of them ([`Mapping::only`]).
    granules: Granules<Granule>,
}

/// Who may do what with memory.
#[derive(Clone, Copy)]
pub(crate) enum Access<'a> {
    /// This device may read it.
    Read,
    /// This device and its peers may read and write it.
    Write(&'a [Arc<Context>]),
}

/// A reserved range of addresses.
struct Addresses {
    context: Arc<Context>,
    first: CUdeviceptr,
    bytes: u64,
}

/// Memory behind a part of the range: given back with the last handle.
pub(crate) struct Granule {
    addresses: Arc<Addresses>,
    at: CUdeviceptr,
    bytes: u64,
    handle: CUmemGenericAllocationHandle,
    /// As what it came from another process: the driver exports nothing that it imported.
    came_as: Option<OwnedFd>,
}

// === impl Mapping ===

impl Mapping {
    /// New memory: `bytes` rounded up to what the device allocates at once. `peers` may read and write it, too.
    pub(crate) fn create(
        context: &Arc<Context>,
        bytes: u64,
        granule: u64,
        peers: &[Arc<Context>],
    ) -> Result<Self, DeviceError> {
        let prop = properties(context);
        let step = granularity(context, &prop)?;
        let bytes = round_up(context, bytes.max(1), step)?;
        let granule = round_up(context, granule.clamp(1, bytes), step)?;
        let mut mapping = Self::reserve(context, bytes, granule)?;
        while mapping.mapped() < bytes {
            let len = granule.min(bytes - mapping.mapped());
            let Some(handle) = create(context, len, &prop)? else {
                // What there is of it goes back first, so that it counts as free.
                drop(mapping);
                return Err(context.out_of_memory(bytes));
            };
            mapping.map(handle, len, None)?;
        }
        mapping.allow(0, Access::Write(peers))?;
        Ok(mapping)
    }

    /// Addresses for `capacity` bytes, rounded up; memory comes with [`Self::grow`].
    pub(crate) fn grows(context: &Arc<Context>, capacity: u64, granule: u64) -> Result<Self, DeviceError> {
        let prop = properties(context);
        let step = granularity(context, &prop)?;
        let capacity = round_up(context, capacity.max(1), step)?;
        let granule = round_up(context, granule.clamp(1, capacity), step)?;
        Self::reserve(context, capacity, granule)
    }

    /// Sees to it that the first `bytes` have memory. What was there stays, whatever happens.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), DeviceError> {
        let context = Arc::clone(&self.addresses.context);
        let capacity = self.addresses.bytes;
        if bytes > capacity {
            return Err(DeviceError::OutOfRange { what: "range", at: 0, end: bytes, len: capacity });
        }
        let prop = properties(&context);
        while self.mapped() < bytes {
            let before = self.mapped();
            context.bind()?;
            let len = self.granule.min(capacity - before);
            let handle =
                create(&context, len, &prop)?.ok_or_else(|| context.out_of_memory(bytes - before))?;
            self.map(handle, len, None)?;
            self.allow(before, Access::Write(&[]))?;
        }
        Ok(())
    }

    /// Memory that another process exported: the same granules, in the same order.
    pub(crate) fn import(
        context: &Arc<Context>,
        granules: &[OwnedFd],
        bytes: u64,
        granule: u64,
        access: Access<'_>,
    ) -> Result<Self, DeviceError> {
        let prop = properties(context);
        let step = granularity(context, &prop)?;
        let wrong = || DeviceError::Os {
            call: "importing device memory",
            words: format!("{} descriptors can't be {bytes} bytes in granules of {granule}", granules.len()),
        };
        let whole = bytes > 0 && granule > 0 && bytes.is_multiple_of(step) && granule.is_multiple_of(step);
        if !whole || bytes.div_ceil(granule) != granules.len() as u64 {
            return Err(wrong());
        }
        let mut mapping = Self::reserve(context, bytes, granule)?;
        for fd in granules {
            let again = fd.try_clone().map_err(|error| DeviceError::Os {
                call: "keeping a descriptor of device memory",
                words: error.to_string(),
            })?;
            let len = granule.min(bytes - mapping.mapped());
            let mut handle = 0;
            // The driver takes the descriptor's number in a pointer's clothes, and doesn't keep it.
            let number = std::ptr::without_provenance_mut(usize::try_from(fd.as_raw_fd()).unwrap_or(0));
            // SAFETY: the context is current; the descriptor is open; one handle is written.
            let imported =
                unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, number, HANDLE_TYPE) };
            context.check("cuMemImportFromShareableHandle", imported)?;
            mapping.map(handle, len, Some(again))?;
        }
        mapping.allow(0, access)?;
        Ok(mapping)
    }

    /// Whether the driver maps a device's memory without write access: it is asked with a granule of its smallest size.
    pub(crate) fn can_be_read_only(context: &Arc<Context>) -> Result<bool, DeviceError> {
        let prop = properties(context);
        let step = granularity(context, &prop)?;
        let mut mapping = Self::reserve(context, step, step)?;
        let handle = create(context, step, &prop)?.ok_or_else(|| context.out_of_memory(step))?;
        mapping.map(handle, step, None)?;
        match mapping.allow(0, Access::Read) {
            Ok(()) => Ok(true),
            Err(lost @ DeviceError::Lost { .. }) => Err(lost),
            Err(refused) => {
                tracing::debug!(%refused, "device memory can't be mapped without write access");
                Ok(false)
            }
        }
    }

    pub(crate) fn address(&self) -> CUdeviceptr {
        self.addresses.first
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.addresses.bytes
    }

    pub(crate) fn granule(&self) -> u64 {
        self.granule
    }

    /// The granules, in order: all are whole but the last.
    pub(crate) fn granules(&self) -> &Granules<Granule> {
        &self.granules
    }

    /// A descriptor for each granule.
    pub(crate) fn export(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        let context = &self.addresses.context;
        context.bind()?;
        let export_one = |granule: &Granule| {
            if let Some(came_as) = &granule.came_as {
                return came_as.try_clone().map_err(|error| DeviceError::Os {
                    call: "exporting device memory",
                    words: error.to_string(),
                });
            }
            let handle = granule.handle;
            let mut fd: RawFd = -1;
            // SAFETY: the handle lives; the driver writes one descriptor, which is the caller's from then on.
            let exported =
                unsafe { sys::cuMemExportToShareableHandle((&raw mut fd).cast(), handle, HANDLE_TYPE, 0) };
            context.check("cuMemExportToShareableHandle", exported)?;
            // SAFETY: as above.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        self.granules.iter().map(export_one).collect()
    }

    /// The same, keeping only the granules with these numbers. It is not to grow.
    pub(crate) fn only(&self, numbers: &BTreeSet<usize>) -> Self {
        let Self { addresses, granule, granules } = self;
        Self { addresses: Arc::clone(addresses), granule: *granule, granules: granules.only(numbers) }
    }

    fn reserve(context: &Arc<Context>, bytes: u64, granule: u64) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut first = 0;
        // SAFETY: the context is current; one address is written.
        let reserved = unsafe { sys::cuMemAddressReserve(&raw mut first, to_usize(bytes), 0, 0, 0) };
        context.check("cuMemAddressReserve", reserved)?;
        let addresses = Arc::new(Addresses { context: Arc::clone(context), first, bytes });
        Ok(Self { addresses, granule, granules: Granules::all([]) })
    }

    /// Puts the next granule in its place. It is this value's to release from here on, whatever happens.
    fn map(
        &mut self,
        handle: CUmemGenericAllocationHandle,
        bytes: u64,
        came_as: Option<OwnedFd>,
    ) -> Result<(), DeviceError> {
        let context = &self.addresses.context;
        let at = self.addresses.first + self.mapped();
        // SAFETY: the range is reserved and nothing is mapped there; the handle is new.
        let mapped = unsafe { sys::cuMemMap(at, to_usize(bytes), 0, handle, 0) };
        if let Err(error) = context.check("cuMemMap", mapped) {
            release(context, handle);
            return Err(error);
        }
        context.slabs.fetch_add(bytes, Ordering::Relaxed);
        self.granules.push(Granule { addresses: Arc::clone(&self.addresses), at, bytes, handle, came_as });
        Ok(())
    }

    /// Gives access to what is mapped from byte `from` on.
    fn allow(&self, from: u64, access: Access<'_>) -> Result<(), DeviceError> {
        let Addresses { context, first, .. } = &*self.addresses;
        let (at, bytes) = (first + from, self.mapped() - from);
        let (flags, peers) = match access {
            Access::Read => (CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ, &[][..]),
            Access::Write(peers) => (CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE, peers),
        };
        let allow = |context: &Arc<Context>| CUmemAccessDesc { location: location(context), flags };
        let who: Vec<_> = std::iter::once(context).chain(peers).map(allow).collect();
        // SAFETY: the range is mapped; the list is as long as it says.
        let allowed = unsafe { sys::cuMemSetAccess(at, to_usize(bytes), who.as_ptr(), who.len()) };
        context.check("cuMemSetAccess", allowed)
    }

    /// Bytes that have memory.
    pub(crate) fn mapped(&self) -> u64 {
        // Every granule but the last is a whole one.
        (self.granules.len() as u64 * self.granule).min(self.addresses.bytes)
    }
}

// === impl Granule ===

impl Drop for Granule {
    fn drop(&mut self) {
        let context = &self.addresses.context;
        let given_back = context.bind().and_then(|()| {
            // Whoever had the address may have queued work that still uses the memory. (Our own copies hold the granule.)
            // SAFETY: the context is current.
            context.check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })?;
            // SAFETY: mapped by `Mapping::map` as this very range; nothing on the device uses it any more.
            let unmapped = unsafe { sys::cuMemUnmap(self.at, to_usize(self.bytes)) };
            context.check("cuMemUnmap", unmapped)
        });
        if let Err(error) = given_back {
            // The driver gives a lost device's memory back when the process ends.
            tracing::error!(device = context.ordinal, %error, "device memory was not given back");
            return;
        }
        release(context, self.handle);
        context.slabs.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Gives back a handle to memory that is mapped nowhere in this process.
fn release(context: &Context, handle: CUmemGenericAllocationHandle) {
    // SAFETY: the handle is the caller's, who uses it no more.
    if let Err(error) = context.check("cuMemRelease", unsafe { sys::cuMemRelease(handle) }) {
        tracing::error!(device = context.ordinal, %error, "device memory was not given back");
    }
}

// === impl Addresses ===

impl Drop for Addresses {
    fn drop(&mut self) {
        let freed = self.context.bind().and_then(|()| {
            // SAFETY: reserved by `Mapping::reserve`. What is mapped there holds this value.
            let freed = unsafe { sys::cuMemAddressFree(self.first, to_usize(self.bytes)) };
            self.context.check("cuMemAddressFree", freed)
        });
        if let Err(error) = freed {
            tracing::error!(device = self.context.ordinal, %error, "device addresses were not given back");
        }
    }
}

/// New memory, mapped nowhere yet; `None` when there isn't enough.
fn create(
    context: &Context,
    bytes: u64,
    prop: &CUmemAllocationProp,
) -> Result<Option<CUmemGenericAllocationHandle>, DeviceError> {
    let mut handle = 0;
    // SAFETY: the caller has made the context current; one handle is written.
    let made = unsafe { sys::cuMemCreate(&raw mut handle, to_usize(bytes), prop, 0) };
    if made == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        return Ok(None);
    }
    context.check("cuMemCreate", made).map(|()| Some(handle))
}

fn location(context: &Context) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.device }
}

fn properties(context: &Context) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: HANDLE_TYPE,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn granularity(context: &Context, prop: &CUmemAllocationProp) -> Result<u64, DeviceError> {
    context.bind()?;
    let mut step = 0;
    let which = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the context is current; one integer is written.
    let got = unsafe { sys::cuMemGetAllocationGranularity(&raw mut step, prop, which) };
    context.check("cuMemGetAllocationGranularity", got)?;
    Ok(step.max(1) as u64)
}

fn round_up(context: &Context, bytes: u64, step: u64) -> Result<u64, DeviceError> {
    bytes
        .checked_next_multiple_of(step)
        .filter(|bytes| usize::try_from(*bytes).is_ok())
        .ok_or_else(|| context.out_of_memory(bytes))
}

/// Checked by `round_up` for every length that comes here.
fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
