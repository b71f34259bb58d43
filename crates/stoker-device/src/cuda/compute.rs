//! Computing on a GPU: machine code, memory of its own, and what is queued on a stream.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    ffi::{CString, c_void},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cudarc::driver::sys::{
    self, CUdeviceptr, CUfunction, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUresult, CUstreamBatchMemOpParams,
    CUstreamBatchMemOpType,
};
use parking_lot::Mutex;
use stoker_types::ByteSize;

use super::{
    context::{Context, Event, Stream},
    device::CudaDevice,
    driver::can_profile,
    memory::Mapping,
};
use crate::error::DeviceError;

/// Words that one call waits for at most; the driver's limit.
const WORDS_MAX: usize = 256;

/// Bytes of shared memory that a kernel has without asking.
const SHARED_DEFAULT: u32 = 48 << 10;

/// Machine code on a device.
pub struct Program {
    context: Arc<Context>,
    module: CUmodule,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

/// A function of a program. A cheap handle.
#[derive(Clone)]
pub struct Kernel {
    program: Arc<Program>,
    function: CUfunction,
    name: Arc<str>,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// What is queued for a device, in order.
pub struct ComputeStream {
    stream: Stream,
    done: Event,
    /// Kernels may begin before their predecessor has ended (and wait for it themselves): compute capability 9.0 on.
    early: bool,
    /// What was queued last is a kernel.
    after_kernel: AtomicBool,
    /// Kernels since profiling began, each between two events.
    profile: Mutex<Option<Vec<Timed>>>,
}

struct Timed {
    kernel: Arc<str>,
    begin: Event,
    end: Event,
}

/// What the launches of one kernel took together.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// Its name.
    pub kernel: Arc<str>,
    /// How often it was launched.
    pub launches: u32,
    /// How long all of them took.
    pub time: Duration,
}

/// Device memory of this process alone.
pub struct DeviceBuffer {
    context: Arc<Context>,
    address: CUdeviceptr,
    bytes: u64,
}

/// Host memory that the device reads and writes at full speed.
pub struct PinnedBuffer {
    context: Arc<Context>,
    first: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is plain memory.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

/// A range of device addresses whose memory comes as it is needed.
pub struct GrowingMemory {
    mapping: Mapping,
}

// === impl Program ===

impl Program {
    /// Loads an image, which the driver knows the kind of: a fat binary, machine code, or PTX with a zero byte at its end.
    ///
    /// # Errors
    /// The driver's; `CUDA_ERROR_NO_BINARY_FOR_GPU` when there is nothing for this chip in it.
    pub fn load(device: &CudaDevice, image: &'static [u8]) -> Result<Arc<Self>, DeviceError> {
        let context = Arc::clone(device.context());
        context.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a context is current; the image is one of Stoker's own, whose length is in its header.
        let loaded = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        context.check("cuModuleLoadData", loaded)?;
        Ok(Arc::new(Self { context, module }))
    }

    /// One of its functions, which will use at most `shared` bytes of dynamic shared memory. It is on the device afterwards.
    ///
    /// # Errors
    /// The driver's: there is no such function, or the chip has less shared memory.
    ///
    /// # Panics
    /// When there is a zero byte in the name.
    pub fn kernel(self: &Arc<Self>, name: &str, shared: u32) -> Result<Kernel, DeviceError> {
        self.context.bind()?;
        let terminated = CString::new(name).expect("names of functions have no zero byte");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module lives; the name ends with a zero byte.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, terminated.as_ptr()) };
        self.context.check("cuModuleGetFunction", found)?;
        if shared > SHARED_DEFAULT {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).unwrap_or(i32::MAX);
            // SAFETY: the function was found.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, bytes) };
            self.context.check("cuFuncSetAttribute", set)?;
        }
        Ok(Kernel { program: Arc::clone(self), function, name: name.into() })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by `load`. Streams that run its kernels are waited for by whoever queued them; an error here
            // would be an earlier one.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernel").field(&self.name).finish()
    }
}

// === impl ComputeStream ===

impl ComputeStream {
    /// A stream that waits for no other.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        let context = device.context();
        Ok(Self {
            stream: Stream::new(context)?,
            done: Event::new(context)?,
            early: crate::Device::info(device).compute >= (9, 0),
            after_kernel: AtomicBool::new(false),
            profile: Mutex::default(),
        })
    }

    /// Makes the device's context the calling thread's: once on every thread that queues.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), DeviceError> {
        self.stream.context.bind()
    }

    /// Queues a kernel that takes one structure by value.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `parameters` is what the kernel takes, bit for bit. The addresses in it are device memory that lives until the stream
    /// has been waited for, and that nobody else writes to, or reads what this writes to, meanwhile. A kernel that is
    /// launched behind another one waits for it (`griddepcontrol.wait`) before it touches what that one touches.
    pub unsafe fn launch<P>(
        &self,
        kernel: &Kernel,
        launch: Launch,
        parameters: &P,
    ) -> Result<(), DeviceError> {
        let mut profile = self.profile.lock();
        let begin = profile.as_ref().map(|_| self.timestamp()).transpose()?;
        let Launch { grid, threads, shared } = launch;
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let after_kernel = self.after_kernel.swap(true, Ordering::Relaxed);
        let config = CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.stream.raw,
            attrs: &raw mut early,
            numAttrs: u32::from(self.early && after_kernel && begin.is_none()),
        };
        let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the caller's promise; the parameters are copied before the call returns.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        kernel.program.context.check("cuLaunchKernelEx", launched)?;
        if let (Some(profile), Some(begin)) = (profile.as_mut(), begin) {
            profile.push(Timed { kernel: Arc::clone(&kernel.name), begin, end: self.timestamp()? });
        }
        Ok(())
    }

    fn timestamp(&self) -> Result<Event, DeviceError> {
        let event = Event::with_time(&self.stream.context)?;
        event.record(&self.stream)?;
        Ok(event)
    }

    /// From now on the time of each kernel is taken, which keeps kernels from beginning early.
    ///
    /// # Errors
    /// [`DeviceError::MissingSymbol`] with a driver that is too old for it.
    pub fn begin_profile(&self) -> Result<(), DeviceError> {
        can_profile()?;
        *self.profile.lock() = Some(Vec::new());
        Ok(())
    }

    /// What kernels took since [`begin_profile`](Self::begin_profile), the longest first. Waits for the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn end_profile(&self) -> Result<Vec<KernelTime>, DeviceError> {
        let launches = self.profile.lock().take().unwrap_or_default();
        self.wait()?;
        let mut times: Vec<KernelTime> = Vec::new();
        for Timed { kernel, begin, end } in launches {
            let time = end.since(&begin)?;
            match times.iter_mut().find(|other| other.kernel == kernel) {
                Some(other) => (other.launches, other.time) = (other.launches + 1, other.time + time),
                None => times.push(KernelTime { kernel, launches: 1, time }),
            }
        }
        times.sort_by_key(|kernel| std::cmp::Reverse(kernel.time));
        Ok(times)
    }

    /// Queues a copy of the first `bytes` of a buffer to the device.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The target is device memory of that length; both live, and the buffer isn't written to, until the stream has been
    /// waited for.
    ///
    /// # Panics
    /// When the buffer is shorter.
    pub unsafe fn upload(&self, from: &PinnedBuffer, bytes: usize, to: u64) -> Result<(), DeviceError> {
        assert!(bytes <= from.len(), "{bytes} of a buffer of {}", from.len());
        self.after_kernel.store(false, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        let queued = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.first.as_ptr().cast::<c_void>(), bytes, self.stream.raw)
        };
        self.stream.context.check("cuMemcpyHtoDAsync", queued)
    }

    /// Queues a copy from the device into the first `bytes` of a buffer.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`upload`](Self::upload); nobody reads the buffer before the stream has been waited for.
    ///
    /// # Panics
    /// When the buffer is shorter.
    pub unsafe fn download(&self, from: u64, to: &mut PinnedBuffer, bytes: usize) -> Result<(), DeviceError> {
        assert!(bytes <= to.len(), "{bytes} into a buffer of {}", to.len());
        self.after_kernel.store(false, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        let queued = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.first.as_ptr().cast::<c_void>(), from, bytes, self.stream.raw)
        };
        self.stream.context.check("cuMemcpyDtoHAsync", queued)
    }

    /// What is queued from now on waits until the 32-bit words at these addresses are 1 or more. The device waits, no thread.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// They are device memory that lives until the stream has been waited for, at multiples of 4.
    pub unsafe fn wait_for_words(&self, words: &[u64]) -> Result<(), DeviceError> {
        for words in words.chunks(WORDS_MAX) {
            self.after_kernel.store(false, Ordering::Relaxed);
            let mut operations: Vec<CUstreamBatchMemOpParams> = words
                .iter()
                .map(|&address| {
                    let mut operation = CUstreamBatchMemOpParams { pad: [0; 6] };
                    operation.waitValue = sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st {
                        operation: CUstreamBatchMemOpType::CU_STREAM_MEM_OP_WAIT_VALUE_32,
                        address,
                        __bindgen_anon_1:
                            sys::CUstreamBatchMemOpParams_union_CUstreamMemOpWaitValueParams_st__bindgen_ty_1 {
                                value: 1,
                            },
                        flags: sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32,
                        alias: 0,
                    };
                    operation
                })
                .collect();
            let count = u32::try_from(operations.len()).unwrap_or(u32::MAX);
            // SAFETY: the caller's promise; the operations are read before the call returns.
            let queued =
                unsafe { sys::cuStreamBatchMemOp_v2(self.stream.raw, count, operations.as_mut_ptr(), 0) };
            self.stream.context.check("cuStreamBatchMemOp", queued)?;
        }
        Ok(())
    }

    /// Queues that `words` 32-bit words from `address` on become `value`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// They are device memory that lives until the stream has been waited for, at a multiple of 4.
    pub unsafe fn fill_words(&self, address: u64, value: u32, words: usize) -> Result<(), DeviceError> {
        self.after_kernel.store(false, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        let queued = unsafe { sys::cuMemsetD32Async(address, value, words, self.stream.raw) };
        self.stream.context.check("cuMemsetD32Async", queued)
    }

    /// Waits until everything that was queued is done.
    ///
    /// # Errors
    /// The driver's; [`DeviceError::Lost`] when a kernel faulted.
    pub fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives.
        let waited = unsafe { sys::cuStreamSynchronize(self.stream.raw) };
        self.stream.context.check("cuStreamSynchronize", waited)
    }

    /// As [`wait`](Self::wait), without keeping a core busy: some ten microseconds later.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_asleep(&self) -> Result<(), DeviceError> {
        self.done.record(&self.stream)?;
        self.done.synchronize()
    }
}

impl fmt::Debug for ComputeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ComputeStream").field("early", &self.early).finish_non_exhaustive()
    }
}

// === impl DeviceBuffer ===

impl DeviceBuffer {
    /// Memory of at least one byte; its contents are undefined.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; the driver's.
    pub fn new(device: &CudaDevice, bytes: u64) -> Result<Self, DeviceError> {
        let context = Arc::clone(device.context());
        context.bind()?;
        let mut address = 0;
        let wanted = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: a context is current; one address is written.
        let made = unsafe { sys::cuMemAlloc_v2(&raw mut address, wanted) };
        if made == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(context.out_of_memory(bytes));
        }
        context.check("cuMemAlloc", made)?;
        Ok(Self { context, address, bytes })
    }

    /// The address of its first byte, a multiple of 256.
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

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let freed = self.context.bind().and_then(|()| {
            // SAFETY: allocated by `new`. The call waits for the device.
            self.context.check("cuMemFree", unsafe { sys::cuMemFree_v2(self.address) })
        });
        if let Err(error) = freed {
            tracing::error!(device = self.context.ordinal, %error, "device memory was not given back");
        }
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

// === impl PinnedBuffer ===

impl PinnedBuffer {
    /// Zeros.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &CudaDevice, bytes: usize) -> Result<Self, DeviceError> {
        let context = Arc::clone(device.context());
        context.bind()?;
        let mut first = std::ptr::null_mut();
        let wanted = bytes.max(1);
        // SAFETY: a context is current; one pointer is written.
        let made = unsafe { sys::cuMemHostAlloc(&raw mut first, wanted, 0) };
        context.check("cuMemHostAlloc", made)?;
        let first = NonNull::new(first.cast::<u8>())
            .ok_or(DeviceError::Os { call: "cuMemHostAlloc", words: "no address".to_owned() })?;
        // SAFETY: that many bytes were allocated.
        unsafe { first.as_ptr().write_bytes(0, wanted) };
        Ok(Self { context, first, bytes })
    }
}

impl PinnedBuffer {
    /// Its first `count` words as numbers of 32 bits.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn floats(&self, count: usize) -> &[f32] {
        assert!(count <= self.bytes / 4, "{count} numbers in {} bytes", self.bytes);
        // SAFETY: allocated and written by `new`, aligned to a page; any bits are a number.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr().cast::<f32>(), count) }
    }
}

impl Deref for PinnedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated and written by `new`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.bytes) }
    }
}

impl DerefMut for PinnedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by `new`. An error here would be an earlier one.
            let _ = unsafe { sys::cuMemFreeHost(self.first.as_ptr().cast()) };
        }
    }
}

// === impl GrowingMemory ===

impl GrowingMemory {
    /// Takes addresses for `capacity` bytes, and no memory. Granules are of about `granule` bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &CudaDevice, capacity: ByteSize, granule: ByteSize) -> Result<Self, DeviceError> {
        let mapping = Mapping::grows(device.context(), capacity.bytes(), granule.bytes())?;
        Ok(Self { mapping })
    }

    /// The address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// Bytes that have memory.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        ByteSize(self.mapping.mapped())
    }

    /// Sees to it that the first `bytes` have memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::OutOfRange`]; the driver's. What was there stays.
    pub fn grow(&mut self, bytes: ByteSize) -> Result<(), DeviceError> {
        self.mapping.grow(bytes.bytes())
    }
}

impl fmt::Debug for GrowingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrowingMemory").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}
