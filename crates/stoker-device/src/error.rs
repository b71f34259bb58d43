//! What can go wrong with a device.

use std::fmt;

use stoker_types::ByteSize;

/// Why something on a device failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// There is no driver.
    #[error("no CUDA driver here ({why}): install the NVIDIA driver, or go on without a GPU")]
    NoDriver {
        /// The loader's words.
        why: String,
    },
    /// The driver is older than what Stoker calls.
    #[error("the CUDA driver is too old: it supports CUDA {found}, needed is {needed} or newer")]
    DriverTooOld {
        /// What the driver supports.
        found: CudaVersion,
        /// The oldest that will do.
        needed: CudaVersion,
    },
    /// The driver has no such function, whatever version it claims.
    #[error("the CUDA driver lacks `{symbol}`: install one that supports CUDA {needed} or newer")]
    MissingSymbol {
        /// The function.
        symbol: &'static str,
        /// The oldest driver that will do.
        needed: CudaVersion,
    },
    /// The driver sees no GPU.
    #[error(
        "the CUDA driver sees no GPU: is CUDA_VISIBLE_DEVICES empty, or the GPU not passed to this container?"
    )]
    NoGpu,
    /// There is no GPU of that number.
    #[error("no device {asked}: there are {count}")]
    NoSuchDevice {
        /// The number asked for.
        asked: u32,
        /// How many there are.
        count: u32,
    },
    /// There isn't enough memory.
    #[error("device {device} needs {needed}, free are {free} of {total}")]
    OutOfMemory {
        /// Which device.
        device: u32,
        /// Bytes asked for.
        needed: ByteSize,
        /// Bytes free, as the driver counts.
        free: ByteSize,
        /// Bytes that it has.
        total: ByteSize,
    },
    /// A range that isn't within its slab or its host buffer.
    #[error("bytes {at}..{end} are not within the {what} of {len} bytes")]
    OutOfRange {
        /// "slab" or "host buffer".
        what: &'static str,
        /// First byte.
        at: u64,
        /// Byte after the last.
        end: u64,
        /// Length of what they should be in.
        len: u64,
    },
    /// A slab of another device.
    #[error("the slab is on device {is}, not on device {wanted}")]
    WrongDevice {
        /// Where it is.
        is: u32,
        /// Where it should be.
        wanted: u32,
    },
    /// This kind of device can't.
    #[error("device {device} can't {what}")]
    Unsupported {
        /// Which device.
        device: u32,
        /// What was asked for.
        what: &'static str,
    },
    /// The device is gone, or in a state that only a new process gets it out of.
    #[error("device {device} is lost: {call} said {name} ({words}); this process can't use it any more")]
    Lost {
        /// Which device.
        device: u32,
        /// The call that said so.
        call: &'static str,
        /// The driver's name for the error.
        name: String,
        /// Its words.
        words: String,
    },
    /// Any other error of the driver.
    #[error("{call} failed: {name} ({words})")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's name for the error.
        name: String,
        /// Its words.
        words: String,
    },
    /// The operating system's error.
    #[error("{call} failed: {words}")]
    Os {
        /// The call.
        call: &'static str,
        /// Its words.
        words: String,
    },
    /// The device was closed before the copy was made.
    #[error("the device was closed before the copy was made")]
    Closed,
    /// A fault that a test asked for.
    #[error("device {device}: {what} (a simulated fault)")]
    Simulated {
        /// Which device.
        device: u32,
        /// What went wrong.
        what: &'static str,
    },
}

/// A version of CUDA: 13.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// 13
    pub major: u32,
    /// 0
    pub minor: u32,
}

// === impl CudaVersion ===

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
