//! What every kind of device does.

use std::{fmt, os::fd::OwnedFd, sync::Arc};

use stoker_io::Pinner;
use stoker_types::{ByteSize, ChunkSum};

use crate::{
    error::DeviceError,
    info::{DeviceInfo, DeviceMemory},
    slab::Slab,
};

/// A device with memory of its own. Its functions may be called from any thread.
pub trait Device: fmt::Debug + Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Its memory now.
    ///
    /// # Errors
    /// The driver's.
    fn memory(&self) -> Result<DeviceMemory, DeviceError>;

    /// A new slab of at least `bytes`, made of granules of about `granule` (at least one; rounded up to what the device
    /// allocates at once). Its contents are undefined.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with what is free; the driver's.
    fn allocate(&self, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError>;

    /// Memory that a process which is gone exported ([`Slab::export`]), as a slab of this one: `bytes` in granules of
    /// `granule`, as its slab said. What is in it stays; nothing more is written to it.
    ///
    /// # Errors
    /// [`DeviceError::Os`] when the descriptors are no such memory; [`DeviceError::OutOfMemory`] when the device doesn't have
    /// so much; the driver's.
    fn adopt(&self, granules: Vec<OwnedFd>, bytes: ByteSize, granule: ByteSize) -> Result<Slab, DeviceError>;

    /// Queues a copy and returns at once. Copies may end in another order than they were queued in. How many are under
    /// way is for the caller to bound: each holds its host bytes.
    fn copy(&self, transfer: Transfer);

    /// Reads a slab's bytes from `at` on into host memory. Waits.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::WrongDevice`]; the driver's.
    fn read(&self, slab: &Slab, at: u64, into: &mut [u8]) -> Result<(), DeviceError>;

    /// Sets `len` bytes of a slab from `at` on to zero. Waits.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::WrongDevice`]; the driver's.
    fn clear(&self, slab: &Slab, at: u64, len: u64) -> Result<(), DeviceError>;

    /// The sums of ranges of a slab, `(first byte, bytes)`, computed on the device. Waits. Nothing may write to them meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::WrongDevice`]; the driver's.
    fn sums(&self, slab: &Slab, ranges: &[(u64, u64)]) -> Result<Vec<ChunkSum>, DeviceError>;

    /// Whether memory of another process can be mapped so that nothing here can write to it.
    ///
    /// # Errors
    /// The driver's.
    fn maps_read_only(&self) -> Result<bool, DeviceError>;

    /// Maps memory that another process exported ([`Slab::export`]), `bytes` in granules of `granule`; without write access
    /// where the device can do that ([`Self::maps_read_only`]).
    ///
    /// # Errors
    /// The driver's; [`DeviceError::Os`] when the descriptors are no such memory.
    fn window(&self, granules: &[OwnedFd], bytes: ByteSize, granule: ByteSize)
    -> Result<Window, DeviceError>;

    /// What pins host memory for this device's copies; `None` when that means nothing to it.
    fn pinner(&self) -> Option<Arc<dyn Pinner>>;
}

/// Memory of another process's slab, mapped here. It stays as long as the value lives, whatever becomes of that process.
pub struct Window {
    address: u64,
    bytes: u64,
    read_only: bool,
    _memory: Box<dyn Send + Sync>,
}

/// Host bytes that a device reads while it holds them. The same bytes are returned for as long as the value lives.
pub trait HostBytes: AsRef<[u8]> + Send + Sync {}

impl<T: AsRef<[u8]> + Send + Sync + ?Sized> HostBytes for T {}

/// Called once, on a thread of the device, when a copy has ended or failed. It must be quick.
pub type Done = Box<dyn FnOnce(Result<(), DeviceError>) + Send>;

/// A copy to be made: parts of one host buffer into one slab.
pub struct Transfer {
    /// The host's bytes. Held until the copy has ended. Fast only when they are pinned.
    pub from: Box<dyn HostBytes>,
    /// Where they go.
    pub to: Slab,
    /// Which of them go where, at least one.
    pub cuts: Vec<Cut>,
    /// Where in the slab, at a multiple of 4, a word of 32 bits becomes 1 when all bytes are there: what is queued on the
    /// device can wait for it ([`crate::ComputeStream::wait_for_words`]).
    pub arrival: Option<u64>,
    /// What to call in the end.
    pub done: Done,
}

/// One range of a copy, or several rows of the same length that lie at regular distances in the host's buffer and side by
/// side in the slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// First byte in the host's buffer.
    pub from: usize,
    /// Bytes of a row.
    pub len: usize,
    /// First byte in the slab.
    pub to: u64,
    /// How many rows.
    pub rows: usize,
    /// Bytes from the beginning of one row to that of the next in the host's buffer, at least `len`; means nothing when
    /// there is one row.
    pub pitch: usize,
}

// === impl Window ===

impl Window {
    pub(crate) fn new(
        address: u64,
        bytes: ByteSize,
        read_only: bool,
        memory: impl Send + Sync + 'static,
    ) -> Self {
        Self { address, bytes: bytes.bytes(), read_only, _memory: Box::new(memory) }
    }

    /// The device's address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        ByteSize(self.bytes)
    }

    /// Whether a write to it fails.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, bytes, read_only, _memory: _ } = self;
        f.debug_struct("Window")
            .field("address", address)
            .field("bytes", bytes)
            .field("read_only", read_only)
            .finish_non_exhaustive()
    }
}

// === impl Cut ===

impl Cut {
    /// One range.
    #[must_use]
    pub const fn range(from: usize, len: usize, to: u64) -> Self {
        Self { from, len, to, rows: 1, pitch: len }
    }

    /// Bytes that it copies.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        (self.len as u64).saturating_mul(self.rows as u64)
    }

    /// Its rows one by one: first byte in the host's buffer and in the slab.
    pub(crate) fn each_row(&self) -> impl Iterator<Item = (usize, u64)> {
        let Self { from, len, to, pitch, .. } = *self;
        (0..self.rows).map(move |row| (from + row * pitch, to + (row * len) as u64))
    }

    /// Bytes of the host's buffer from its first to its last, what lies between rows included.
    pub(crate) const fn host_len(&self) -> u64 {
        let before_last = (self.pitch as u64).saturating_mul((self.rows as u64).saturating_sub(1));
        before_last.saturating_add(self.len as u64)
    }
}

// === impl Transfer ===

impl Transfer {
    /// Bytes that it copies.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.cuts.iter().map(Cut::bytes).sum()
    }

    /// Whether every range is within its buffer and its slab, and the slab on device `ordinal`.
    pub(crate) fn check(&self, ordinal: u32) -> Result<(), DeviceError> {
        self.to.check_device(ordinal)?;
        let host = (*self.from).as_ref().len() as u64;
        for cut in &self.cuts {
            let from = cut.from as u64;
            let end = from.saturating_add(cut.host_len());
            if end > host {
                return Err(DeviceError::OutOfRange { what: "host buffer", at: from, end, len: host });
            }
            if cut.rows > 1 && cut.pitch < cut.len {
                let (end, len) = (cut.len as u64, cut.pitch as u64);
                return Err(DeviceError::OutOfRange { what: "row", at: 0, end, len });
            }
            self.to.check_range(cut.to, cut.bytes())?;
        }
        if let Some(word) = self.arrival {
            self.to.check_range(word, 4)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer").field("to", &self.to).field("cuts", &self.cuts).finish_non_exhaustive()
    }
}
