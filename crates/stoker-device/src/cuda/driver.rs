//! The driver: found, probed, and its errors turned into ours.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{ffi::CStr, sync::OnceLock};

use cudarc::driver::sys::{self, CUresult};

use crate::error::{CudaVersion, DeviceError};

/// The oldest driver that has everything that is called.
const NEEDED: CudaVersion = CudaVersion { major: 12, minor: 0 };

/// Names under which the loader knows the driver.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Every function that this crate calls. cudarc looks a function up when it is first called, and panics when there is
/// none: so each is looked up before.
const SYMBOLS: [&str; 56] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetPCIBusId",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemGetInfo_v2",
    "cuMemGetAllocationGranularity",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuFuncSetAttribute",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuStreamBatchMemOp_v2",
    "cuStreamWriteValue32_v2",
    "cuStreamSynchronize",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
];

/// What profiling calls besides.
const PROFILING: (&str, CudaVersion) = ("cuEventElapsedTime_v2", CudaVersion { major: 12, minor: 8 });

/// The version that the driver supports.
///
/// # Errors
/// [`DeviceError::NoDriver`], [`DeviceError::DriverTooOld`], [`DeviceError::MissingSymbol`], [`DeviceError::NoGpu`].
pub fn driver_version() -> Result<CudaVersion, DeviceError> {
    static VERSION: OnceLock<Result<CudaVersion, DeviceError>> = OnceLock::new();
    VERSION.get_or_init(probe).clone()
}

/// Whether kernels can be timed.
pub(crate) fn can_profile() -> Result<(), DeviceError> {
    let (symbol, needed) = PROFILING;
    look_up(&open()?, symbol, needed)
}

fn open() -> Result<libloading::Library, DeviceError> {
    // SAFETY: loading a library runs its initialisers; the driver's are made for that.
    let opened = LIBRARIES.map(|name| unsafe { libloading::Library::new(name) });
    let [first, second] = opened;
    first.or_else(|error| second.map_err(|_| error)).map_err(|error| DeviceError::NoDriver {
        // The loader's words, without the names of its functions.
        why: std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string),
    })
}

fn look_up(
    library: &libloading::Library,
    symbol: &'static str,
    needed: CudaVersion,
) -> Result<(), DeviceError> {
    // SAFETY: the symbol is looked up, not called.
    let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol) };
    found.map(|_| ()).map_err(|_| DeviceError::MissingSymbol { symbol, needed })
}

fn probe() -> Result<CudaVersion, DeviceError> {
    let library = open()?;
    for symbol in SYMBOLS {
        look_up(&library, symbol, NEEDED)?;
    }
    // The driver stays loaded: unloading it under its own threads ends badly.
    std::mem::forget(library);
    let mut version = 0;
    // SAFETY: the function was found above; it writes one integer, and needs no initialisation.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let version = u32::try_from(version).unwrap_or(0);
    let found = CudaVersion { major: version / 1000, minor: version % 1000 / 10 };
    if found < NEEDED {
        return Err(DeviceError::DriverTooOld { found, needed: NEEDED });
    }
    // SAFETY: the function was found above.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => Err(DeviceError::NoGpu),
        result => check("cuInit", result).map(|()| found),
    }
}

/// A call's result as ours.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), DeviceError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, words) = words(result);
    Err(DeviceError::Driver { call, name, words })
}

/// Whether nothing will work on the device any more in this process.
pub(crate) fn is_fatal(result: CUresult) -> bool {
    matches!(
        result,
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// The driver's name for an error, and what it says about it.
pub(crate) fn words(result: CUresult) -> (String, String) {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the functions were found by `probe`, before anything could fail; they write one pointer to a string
        // that lives as long as the driver.
        unsafe {
            (get(result, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null())
                .then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", result as u32));
    (name, text(sys::cuGetErrorString).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_answers_with_a_version_or_a_typed_error() {
        match driver_version() {
            Ok(version) => assert!(version >= NEEDED),
            Err(
                DeviceError::NoDriver { .. }
                | DeviceError::DriverTooOld { .. }
                | DeviceError::MissingSymbol { .. }
                | DeviceError::NoGpu,
            ) => {}
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn every_function_that_is_called_is_probed() {
        let sources = [
            include_str!("compute.rs"),
            include_str!("context.rs"),
            include_str!("device.rs"),
            include_str!("driver.rs"),
            include_str!("link.rs"),
            include_str!("memory.rs"),
            include_str!("sums.rs"),
            include_str!("topology.rs"),
        ];
        for source in sources {
            for call in source.split("sys::cu").skip(1) {
                let name: String = call.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let name = format!("cu{name}");
                let probed = SYMBOLS.contains(&name.as_str()) || name == PROFILING.0;
                assert!(name == "cu" || probed, "{name} is not probed");
            }
        }
    }
}
