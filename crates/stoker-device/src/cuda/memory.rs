//! Device memory behind addresses of our choosing, shareable with other processes.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType, CUmemGenericAllocationHandle,
    CUmemLocation, CUmemLocationType, CUresult,
};

use super::context::Context;
use crate::error::DeviceError;

const HANDLE_TYPE: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// A range of addresses with memory behind it, in granules.
pub(crate) struct Mapping {
    context: Arc<Context>,
    address: CUdeviceptr,
    bytes: u64,
    granule: u64,
    /// One for each granule that is mapped, in order.
    handles: Vec<CUmemGenericAllocationHandle>,
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
            let mut handle = 0;
            // SAFETY: the context is current; one handle is written.
            let made = unsafe { sys::cuMemCreate(&raw mut handle, to_usize(len), &raw const prop, 0) };
            if made == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                // What there is of it goes back first, so that it counts as free.
                drop(mapping);
                return Err(context.out_of_memory(bytes));
            }
            context.check("cuMemCreate", made)?;
            mapping.map(handle, len)?;
        }
        mapping.allow(peers)?;
        Ok(mapping)
    }

    /// Memory that another process exported: the same granules, in the same order.
    pub(crate) fn import(
        context: &Arc<Context>,
        granules: &[OwnedFd],
        bytes: u64,
        granule: u64,
        peers: &[Arc<Context>],
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
            let len = granule.min(bytes - mapping.mapped());
            let mut handle = 0;
            // The driver takes the descriptor's number in a pointer's clothes, and doesn't keep it.
            let number = std::ptr::without_provenance_mut(usize::try_from(fd.as_raw_fd()).unwrap_or(0));
            // SAFETY: the context is current; the descriptor is open; one handle is written.
            let imported =
                unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, number, HANDLE_TYPE) };
            context.check("cuMemImportFromShareableHandle", imported)?;
            mapping.map(handle, len)?;
        }
        mapping.allow(peers)?;
        Ok(mapping)
    }

    pub(crate) fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn granule(&self) -> u64 {
        self.granule
    }

    /// A descriptor for each granule.
    pub(crate) fn export(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        self.context.bind()?;
        let export_one = |handle: &CUmemGenericAllocationHandle| {
            let mut fd: RawFd = -1;
            // SAFETY: the handle lives; the driver writes one descriptor, which is the caller's from then on.
            let exported =
                unsafe { sys::cuMemExportToShareableHandle((&raw mut fd).cast(), *handle, HANDLE_TYPE, 0) };
            self.context.check("cuMemExportToShareableHandle", exported)?;
            // SAFETY: as above.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        self.handles.iter().map(export_one).collect()
    }

    fn reserve(context: &Arc<Context>, bytes: u64, granule: u64) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut address = 0;
        // SAFETY: the context is current; one address is written.
        let reserved = unsafe { sys::cuMemAddressReserve(&raw mut address, to_usize(bytes), 0, 0, 0) };
        context.check("cuMemAddressReserve", reserved)?;
        Ok(Self { context: Arc::clone(context), address, bytes, granule, handles: Vec::new() })
    }

    /// Puts the next granule in its place. It is this value's to release from here on, whatever happens.
    fn map(&mut self, handle: CUmemGenericAllocationHandle, len: u64) -> Result<(), DeviceError> {
        let at = self.address + self.mapped();
        // SAFETY: the range is reserved and nothing is mapped there; the handle is new.
        let mapped = unsafe { sys::cuMemMap(at, to_usize(len), 0, handle, 0) };
        if let Err(error) = self.context.check("cuMemMap", mapped) {
            self.release(handle);
            return Err(error);
        }
        self.handles.push(handle);
        self.context.slabs.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn allow(&self, peers: &[Arc<Context>]) -> Result<(), DeviceError> {
        let allow = |context: &Arc<Context>| CUmemAccessDesc {
            location: location(context),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let who: Vec<_> = std::iter::once(&self.context).chain(peers).map(allow).collect();
        // SAFETY: the whole range is mapped; the list is as long as it says.
        let allowed =
            unsafe { sys::cuMemSetAccess(self.address, to_usize(self.bytes), who.as_ptr(), who.len()) };
        self.context.check("cuMemSetAccess", allowed)
    }

    fn mapped(&self) -> u64 {
        // Every granule but the last is a whole one.
        (self.handles.len() as u64 * self.granule).min(self.bytes)
    }

    fn release(&self, handle: CUmemGenericAllocationHandle) {
        // SAFETY: the handle is this value's.
        if let Err(error) = self.context.check("cuMemRelease", unsafe { sys::cuMemRelease(handle) }) {
            tracing::error!(device = self.context.ordinal, %error, "device memory was not given back");
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bound = self.context.bind();
        let mapped = self.mapped();
        if let Err(error) = bound {
            // The driver gives a lost device's memory back when the process ends.
            tracing::error!(device = self.context.ordinal, %error, "device memory was not given back");
            return;
        }
        if mapped > 0 {
            // SAFETY: mapped by this value; copies into it hold it, so none is under way.
            let unmapped = unsafe { sys::cuMemUnmap(self.address, to_usize(mapped)) };
            if let Err(error) = self.context.check("cuMemUnmap", unmapped) {
                tracing::error!(device = self.context.ordinal, %error, "device memory was not given back");
                return;
            }
        }
        for handle in std::mem::take(&mut self.handles) {
            self.release(handle);
        }
        self.context.slabs.fetch_sub(mapped, Ordering::Relaxed);
        // SAFETY: reserved by this value, and nothing is mapped there any more.
        let freed = unsafe { sys::cuMemAddressFree(self.address, to_usize(self.bytes)) };
        if let Err(error) = self.context.check("cuMemAddressFree", freed) {
            tracing::error!(device = self.context.ordinal, %error, "device addresses were not given back");
        }
    }
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
