//! Memory that a device reads by itself.

use std::fmt;

/// Tells a device's driver of host memory, so that copies from it need no help from a processor.
#[expect(unsafe_code, reason = "a driver keeps the addresses that it is told of")]
pub trait Pinner: Send + Sync {
    /// Pins whole pages. Memory that isn't there yet is made. Takes about 50 ms per GiB, several times as much for
    /// memory that was never used.
    ///
    /// # Safety
    /// The range is mapped, and stays so, with the same memory behind it, until it is unpinned.
    ///
    /// # Errors
    /// The driver's words; nothing is pinned then.
    unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<(), PinError>;

    /// Unpins a range that was pinned, as a whole.
    ///
    /// # Safety
    /// The range was pinned by this value and is still mapped; no copy from it is under way.
    ///
    /// # Errors
    /// The driver's words; the range counts as pinned then.
    unsafe fn unpin(&self, address: *mut u8, bytes: usize) -> Result<(), PinError>;
}

/// Why memory can't be pinned, or unpinned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PinError(pub String);

impl fmt::Debug for dyn Pinner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinner")
    }
}
