//! A device's primary context, events and streams.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUevent, CUresult, CUstream};
use stoker_types::ByteSize;

use super::driver::{check, driver_version, is_fatal, words};
use crate::error::DeviceError;

/// A device's primary context, which this process shares with whatever else in it uses CUDA.
pub(crate) struct Context {
    pub(crate) ordinal: u32,
    pub(crate) device: CUdevice,
    raw: CUcontext,
    /// Bytes in slabs.
    pub(crate) slabs: AtomicU64,
}

// SAFETY: the driver's functions may be called from any thread; a context is made current on the thread that calls.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A stream of a context.
pub(crate) struct Stream {
    pub(crate) context: Arc<Context>,
    pub(crate) raw: CUstream,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// An event of a context, which a thread can wait for without spinning.
pub(crate) struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

// === impl Context ===

impl Context {
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Self>, DeviceError> {
        let device = device(ordinal)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `device` comes from the driver; one pointer is written.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        Ok(Arc::new(Self { ordinal, device, raw, slabs: AtomicU64::new(0) }))
    }

    /// Makes it the calling thread's.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained for as long as `self` lives.
        self.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// A call's result, which may say that the device is lost.
    pub(crate) fn check(&self, call: &'static str, result: CUresult) -> Result<(), DeviceError> {
        if is_fatal(result) {
            let (name, words) = words(result);
            return Err(DeviceError::Lost { device: self.ordinal, call, name, words });
        }
        check(call, result)
    }

    /// Bytes free and in all, as the driver counts.
    pub(crate) fn memory(&self) -> Result<(ByteSize, ByteSize), DeviceError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is current; two integers are written.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((ByteSize(free as u64), ByteSize(total as u64)))
    }

    pub(crate) fn out_of_memory(&self, needed: u64) -> DeviceError {
        match self.memory() {
            Err(error) => error,
            Ok((free, total)) => {
                DeviceError::OutOfMemory { device: self.ordinal, needed: ByteSize(needed), free, total }
            }
        }
    }

    pub(crate) fn in_slabs(&self) -> ByteSize {
        ByteSize(self.slabs.load(Ordering::Relaxed))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, by `open`. What lives in the context holds an `Arc` of it.
        let released = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        if let Err(error) = check("cuDevicePrimaryCtxRelease", released) {
            tracing::warn!(device = self.ordinal, %error, "a context was not given back");
        }
    }
}

/// A device's handle.
pub(crate) fn device(ordinal: u32) -> Result<CUdevice, DeviceError> {
    let count = device_count()?;
    let asked = ordinal;
    let Some(number) = i32::try_from(ordinal).ok().filter(|_| ordinal < count) else {
        return Err(DeviceError::NoSuchDevice { asked, count });
    };
    let mut device = 0;
    // SAFETY: the driver is initialised; one integer is written.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, number) })?;
    Ok(device)
}

/// How many devices the driver sees.
pub(crate) fn device_count() -> Result<u32, DeviceError> {
    driver_version()?;
    let mut count = 0;
    // SAFETY: the driver is initialised; one integer is written.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

// === impl Stream ===

impl Stream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // It waits for no other stream of the process.
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; one pointer is written.
        let made = unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, 0) };
        context.check("cuStreamCreateWithPriority", made)?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// What is queued from now on waits for what the event recorded.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: both live; the event was recorded before, or counts as done.
        self.context.check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody any more; what is queued still runs. An error here would be an
        // earlier one, which was reported.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

// === impl Event ===

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::with_flags(
            context,
            sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
                | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32,
        )
    }

    /// One that knows when it happened.
    pub(crate) fn with_time(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::with_flags(context, sys::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn with_flags(context: &Arc<Context>, flags: u32) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; one pointer is written.
        context.check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Stands for everything queued on the stream so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both live, in the same context.
        self.context.check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    /// The time since an earlier one; both were made with [`with_time`](Self::with_time), and have happened.
    pub(crate) fn since(&self, earlier: &Self) -> Result<Duration, DeviceError> {
        let mut milliseconds = 0.0_f32;
        // SAFETY: both live; one number is written.
        let got = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.raw, self.raw) };
        self.context.check("cuEventElapsedTime", got)?;
        Ok(Duration::from_secs_f32((milliseconds / 1e3).max(0.0)))
    }

    /// Waits until what it stands for is done.
    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: it lives.
        self.context.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used by nobody any more. An error here would be an earlier one, which was reported.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}
