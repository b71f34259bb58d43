//! The pool: one range of memory, cut into slots of one chunk each.
//!
//! A shared pool is a sparse memfd, mapped read-write once, in the process that fills it. Other processes get a read-only
//! descriptor and map the slots that they are told of ([`crate::MappedFile`]): those that end with the owner one of
//! [`ChunkPool::read_only_fd`], others one of [`ChunkPool::lend`]. Who has its memory's descriptors ([`ChunkPool::memory`]) can
//! take it over with what is in it ([`ChunkPool::adopt`]). A private one
//! is anonymous memory, which gets huge pages on most machines where a memfd doesn't: it is made, pinned and copied through
//! faster.

#![expect(unsafe_code, reason = "hands out disjoint parts of one shared mapping")]

use std::{
    collections::BTreeSet,
    fmt, io,
    ops::{Deref, DerefMut, Range},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    slice,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::{
    fs::{FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags, SealFlags},
    mm::{Advice, MapFlags, ProtFlags},
};
use stoker_types::ByteSize;

use crate::{
    ledger::{Entry, Ledger, LedgerError, Record},
    locks,
    map::{self, HUGE_PAGE_BYTES},
    numa::Placement,
    pin::{PinError, Pinner},
};

/// `MADV_COLLAPSE`, Linux 6.1.
const MADV_COLLAPSE: libc::c_int = 25;

/// Why a pool can't be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The chunk size can't be mapped.
    #[error("a chunk of {chunk} is no positive multiple of the page size {page}")]
    ChunkSize {
        /// What was asked for.
        chunk: ByteSize,
        /// The machine's page size.
        page: ByteSize,
    },
    /// Not even one chunk fits, or more than 2^32 do.
    #[error("a pool of {capacity} has no usable number of chunks of {chunk}")]
    Capacity {
        /// What was asked for.
        capacity: ByteSize,
        /// Bytes of a chunk.
        chunk: ByteSize,
    },
    /// What was to be taken over is no pool, or not one with chunks of this size.
    #[error("the pool can't be taken over: {0}")]
    Ledger(#[from] LedgerError),
    /// Somebody still has the memory that was to be taken over, or may map it.
    #[error("the pool can't be taken over: another process may have it mapped")]
    InUse,
    /// The operating system refused.
    #[error("{step} for a chunk pool of {capacity} failed: {source}")]
    Os {
        /// What was tried.
        step: &'static str,
        /// Size of the pool.
        capacity: ByteSize,
        /// Its words.
        source: io::Error,
    },
}

/// How many slots there are, and what they are doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUsage {
    /// Slots that may be in use.
    pub budget: u32,
    /// Slots in use. More than `budget` only for as long as a lowered budget waits for slots to come back.
    pub in_use: u32,
    /// Free slots that still hold memory, for reuse without page faults.
    pub warm: u32,
    /// All slots, in use or not.
    pub capacity: u32,
}

/// A pool of chunk buffers in memory that other processes can map. A cheap handle.
#[derive(Clone)]
pub struct ChunkPool {
    inner: Arc<Inner>,
}

/// A shared pool's memory and its ledger, by descriptors: all that it takes to take it over. For writing.
#[derive(Debug)]
pub struct PoolMemory {
    /// The slots.
    pub pool: OwnedFd,
    /// What is in them.
    pub ledger: OwnedFd,
}

/// A pool that was taken over.
#[derive(Debug)]
pub struct AdoptedPool {
    /// All of it may be in use.
    pub pool: ChunkPool,
    /// The chunks that the ledger names, as it names them. Those that are dropped become free slots.
    pub chunks: Vec<(Chunk, Record)>,
    /// Slots of which the ledger said what can't be.
    pub damaged: usize,
    /// Slots that somebody has still mapped ([`ChunkPool::lend`]), by runs: those of `chunks`, and `orphans`.
    pub lent: Vec<Range<u32>>,
    /// Slots that somebody has still mapped, and of which the ledger says nothing: no byte of theirs means anything here.
    pub orphans: Vec<Chunk>,
}

/// A descriptor of the pool's memory for a program that may outlive the pool's owner, and the slots that it may map. For as
/// long as it, a copy of it in any process, or a mapping made with it is there, whoever takes the pool over leaves those
/// slots as they are.
#[derive(Debug)]
pub struct LentPool {
    fd: OwnedFd,
    chunk_bytes: u64,
}

/// A slot of the pool, owned: nobody else reads or writes it. Its bytes are what the last owner left. Dropping it
/// gives the slot back.
pub struct ChunkBuf {
    pool: Arc<Inner>,
    slot: u32,
}

/// The first `len` bytes of a slot, read-only and shared. The last clone gives the slot back.
#[derive(Clone)]
pub struct Chunk {
    buf: Arc<ChunkBuf>,
    len: usize,
}

struct Inner {
    /// The memory's descriptor, if it is shared.
    fd: Option<OwnedFd>,
    /// What is in the slots of a shared pool.
    ledger: Option<Ledger>,
    /// The slots, mapped for writing.
    range: map::Range,
    chunk_bytes: usize,
    capacity: u32,
    slots: Mutex<Slots>,
    pinner: OnceLock<Arc<dyn Pinner>>,
    /// Of each slot, whether it is pinned. Locked while it is being pinned or unpinned.
    pinned: Box<[Mutex<bool>]>,
    /// Of each slot, how many huge pages it has had put behind it, or has tried to, since it last had no memory.
    huge: Box<[AtomicUsize]>,
}

/// A pool's size, known to be usable.
#[derive(Clone, Copy)]
struct Size {
    slots: u32,
    chunk_bytes: usize,
    /// Of all slots, bytes.
    len: usize,
}

/// Slots of a pool that was taken over which are in use.
#[derive(Default)]
struct Sorted {
    named: Vec<(u32, Record)>,
    /// Lent, and not named.
    orphans: Vec<u32>,
    /// How many records can't be.
    damaged: usize,
}

struct Slots {
    budget: u32,
    in_use: u32,
    /// Free, with memory behind them. Ordered, so that neighbours go out together and map as one range.
    warm: BTreeSet<u32>,
    /// Free, without memory.
    cold: BTreeSet<u32>,
}

// === impl ChunkPool ===

impl ChunkPool {
    /// A shared pool with room for `capacity` bytes (rounded down to whole chunks), all of which may be in use. It takes
    /// address space, and memory only as slots are first written.
    ///
    /// # Errors
    /// [`PoolError`]; `Os` when the machine has no memfd or no address space for it.
    pub fn new(capacity: ByteSize, chunk: ByteSize) -> Result<Self, PoolError> {
        Self::make(capacity, chunk, true)
    }

    /// As [`Self::new`], for this process alone.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn private(capacity: ByteSize, chunk: ByteSize) -> Result<Self, PoolError> {
        Self::make(capacity, chunk, false)
    }

    /// Takes a shared pool over, after its owner has ended, and everybody with one of its [`Self::read_only_fd`] has, too
    /// ([`PoolMemory::is_in_use`]), or has given up its claim and said which slots it has: `mapped`. It has room for `capacity`, or
    /// for what it had room for. Memory of slots that the ledger doesn't name goes back to the operating system first: a
    /// read that the old owner had under way ends in pages that are nobody's. Slots that are lent or mapped stay as they are, in
    /// use.
    ///
    /// The chunks' bytes are not checked.
    ///
    /// # Errors
    /// [`PoolError`]; `InUse` when somebody has it still. Nothing has been changed then.
    pub fn adopt(
        memory: PoolMemory,
        capacity: ByteSize,
        chunk: ByteSize,
        mapped: &BTreeSet<u32>,
    ) -> Result<AdoptedPool, PoolError> {
        let PoolMemory { pool: fd, ledger } = memory;
        let os = |step| move |source: io::Error| PoolError::Os { step, capacity, source };
        let sealed = rustix::fs::fcntl_get_seals(&fd).map_err(|e| os("fcntl")(e.into()))?;
        if !sealed.contains(SealFlags::SHRINK) {
            return Err(LedgerError::NotSealed.into());
        }
        let had = rustix::fs::fstat(&fd).map_err(|e| os("fstat")(e.into()))?.st_size;
        let had = u64::try_from(had).unwrap_or(0);
        let size = Size::of(ByteSize(capacity.bytes().max(had)), chunk)?;
        // Before anything is changed: whether it is free, and whether the two belong together.
        if in_use(&fd).map_err(os("flock"))? {
            return Err(PoolError::InUse);
        }
        let ledger = Ledger::adopt(ledger, &fd, size.slots, size.chunk_bytes)?;
        if had < size.len as u64 {
            rustix::fs::ftruncate(&fd, size.len as u64).map_err(|e| os("ftruncate")(e.into()))?;
        }
        let pool = Self::over(Some(fd), Some(ledger), size).map_err(os("mmap"))?;
        let lent = pool.lent().map_err(os("fcntl"))?;
        let Sorted { named, orphans, damaged } =
            pool.inner.sort_slots(&lent, mapped).map_err(os("fallocate"))?;
        let buf = |slot| ChunkBuf { pool: Arc::clone(&pool.inner), slot };
        let chunk =
            |(slot, record): (u32, Record)| (Chunk { len: record.len, buf: Arc::new(buf(slot)) }, record);
        let chunks = named.into_iter().map(chunk).collect();
        let orphans = orphans.into_iter().map(|slot| buf(slot).freeze(0)).collect();
        Ok(AdoptedPool { chunks, damaged, lent, orphans, pool })
    }

    fn make(capacity: ByteSize, chunk: ByteSize, shared: bool) -> Result<Self, PoolError> {
        let size = Size::of(capacity, chunk)?;
        let os = |step| move |source: io::Error| PoolError::Os { step, capacity, source };
        let fd = shared.then(|| sealed_memfd("stoker-pool", size.len)).transpose();
        let fd = fd.map_err(os("memfd_create"))?;
        let ledger = fd.as_ref().map(|fd| Ledger::new(fd, size.slots, size.chunk_bytes)).transpose();
        let ledger = ledger.map_err(os("memfd_create of the ledger"))?;
        Self::over(fd, ledger, size).map_err(os("mmap"))
    }

    fn over(fd: Option<OwnedFd>, ledger: Option<Ledger>, size: Size) -> io::Result<Self> {
        let Size { slots, chunk_bytes, len } = size;
        let range = map(fd.as_ref(), len)?;
        let slots_state =
            Slots { budget: slots, in_use: 0, warm: BTreeSet::new(), cold: (0..slots).collect() };
        Ok(Self {
            inner: Arc::new(Inner {
                fd,
                ledger,
                range,
                chunk_bytes,
                capacity: slots,
                slots: Mutex::new(slots_state),
                pinner: OnceLock::new(),
                pinned: (0..slots).map(|_| Mutex::new(false)).collect(),
                huge: (0..slots).map(|_| AtomicUsize::new(0)).collect(),
            }),
        })
    }

    /// The memory's descriptors, for somebody who keeps them; `None` for a private pool.
    ///
    /// # Errors
    /// The operating system's, such as no free descriptor.
    pub fn memory(&self) -> io::Result<Option<PoolMemory>> {
        let (Some(pool), Some(ledger)) = (&self.inner.fd, &self.inner.ledger) else { return Ok(None) };
        Ok(Some(PoolMemory { pool: pool.try_clone()?, ledger: ledger.fd().try_clone()? }))
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.inner.chunk_bytes
    }

    /// A slot, warm if there is one; `None` when the budget is used up.
    #[must_use]
    pub fn try_take(&self) -> Option<ChunkBuf> {
        let mut slots = self.inner.slots.lock();
        if slots.in_use >= slots.budget {
            return None;
        }
        let slot = slots.warm.pop_first().or_else(|| slots.cold.pop_first())?;
        slots.in_use += 1;
        Some(ChunkBuf { pool: Arc::clone(&self.inner), slot })
    }

    /// Sets how many bytes may be in use (rounded down to whole chunks, at most the capacity). Slots that are in use
    /// stay so; none is handed out until enough have come back.
    pub fn set_budget(&self, budget: ByteSize) {
        let chunks = budget.bytes() / self.inner.chunk_bytes as u64;
        self.inner.slots.lock().budget = u32::try_from(chunks).unwrap_or(u32::MAX).min(self.inner.capacity);
    }

    /// Gives the memory of free slots back to the operating system. Returns how much. Blocks, about a millisecond a
    /// chunk.
    ///
    /// # Errors
    /// The operating system's; slots that it did not take back stay warm.
    pub fn release_free(&self) -> io::Result<ByteSize> {
        let mut released = 0;
        loop {
            // One at a time, so that a load never waits for the whole pool; the slot is nobody's meanwhile.
            let Some(slot) = self.inner.slots.lock().warm.pop_last() else { return Ok(ByteSize(released)) };
            let punched = self.inner.punch(slot);
            let mut slots = self.inner.slots.lock();
            if let Err(error) = punched {
                slots.warm.insert(slot);
                return Err(error);
            }
            slots.cold.insert(slot);
            released += self.inner.chunk_bytes as u64;
        }
    }

    /// As [`Self::release_free`], of one slot. One that is in use, or has no memory, stays as it is.
    ///
    /// # Errors
    /// The operating system's; the slot stays warm.
    pub fn release(&self, slot: u32) -> io::Result<()> {
        // The slot is nobody's meanwhile.
        if !self.inner.slots.lock().warm.remove(&slot) {
            return Ok(());
        }
        let punched = self.inner.punch(slot);
        let mut slots = self.inner.slots.lock();
        if punched.is_ok() {
            slots.cold.insert(slot)
        } else {
            slots.warm.insert(slot)
        };
        punched
    }

    /// Has the memory that slots get from now on come from these NUMA nodes, as long as they have any.
    ///
    /// # Errors
    /// The operating system's. The pool is as good as before, its memory perhaps farther from its devices.
    pub fn place(&self, placement: &Placement) -> io::Result<()> {
        let inner = &*self.inner;
        // SAFETY: so many slots are mapped from the range's beginning on, until `inner` is dropped.
        unsafe { placement.apply(inner.range.base.cast().as_ptr(), inner.capacity, inner.chunk_bytes) }
    }

    /// Has slots pinned for a device from now on: those that are asked to be ([`ChunkBuf::pin`]). A pool has one
    /// pinner; later ones are ignored.
    pub fn set_pinner(&self, pinner: Arc<dyn Pinner>) {
        // Ignored: see above.
        let _ = self.inner.pinner.set(pinner);
    }

    /// Pins one free slot that isn't, so that whoever takes it next needn't. `false` when there is none, the budget is used
    /// up, or there is no pinner. Blocks, about a millisecond.
    ///
    /// # Errors
    /// The driver's words.
    pub fn pin_free(&self) -> Result<bool, PinError> {
        if self.inner.pinner.get().is_none() {
            return Ok(false);
        }
        let buf = {
            let mut slots = self.inner.slots.lock();
            let unpinned = |slot: &&u32| !*self.inner.pinned[**slot as usize].lock();
            let Some(&slot) = slots.warm.iter().chain(&slots.cold).find(unpinned) else { return Ok(false) };
            if slots.in_use >= slots.budget {
                return Ok(false);
            }
            slots.warm.remove(&slot);
            slots.cold.remove(&slot);
            slots.in_use += 1;
            // Its drop makes the slot warm, which it is.
            ChunkBuf { pool: Arc::clone(&self.inner), slot }
        };
        buf.populate(self.chunk_bytes());
        buf.pin()?;
        Ok(true)
    }

    /// Bytes of slots that are pinned.
    #[must_use]
    pub fn pinned(&self) -> ByteSize {
        let pinned = self.inner.pinned.iter().filter(|pinned| *pinned.lock()).count();
        ByteSize(pinned as u64 * self.inner.chunk_bytes as u64)
    }

    /// Numbers of slots.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        let slots = self.inner.slots.lock();
        PoolUsage {
            budget: slots.budget,
            in_use: slots.in_use,
            warm: u32::try_from(slots.warm.len()).unwrap_or(u32::MAX),
            capacity: self.inner.capacity,
        }
    }

    /// A new read-only descriptor of the pool's memory, for a process that maps chunks and ends with this one. Closed on exec. As long as it, a copy
    /// of it in any process, or a mapping made with it is there, nobody can take the pool over.
    ///
    /// # Errors
    /// `Unsupported` for a private pool; the operating system's, such as no free descriptor or no `/proc`.
    pub fn read_only_fd(&self) -> io::Result<OwnedFd> {
        let handed_out = self.open_read_only()?;
        // It belongs to what was opened, not to a process: the kernel drops it with the last copy and the last mapping,
        // whatever becomes of those who have them. See `in_use`.
        rustix::fs::flock(&handed_out, FlockOperation::NonBlockingLockShared)?;
        Ok(handed_out)
    }

    /// A new read-only descriptor of the pool's memory for a program that may outlive this process. Closed on exec. It
    /// hinders nobody to take the pool over; see [`LentPool::hold`].
    ///
    /// # Errors
    /// As [`Self::read_only_fd`].
    pub fn lend(&self) -> io::Result<LentPool> {
        Ok(LentPool { fd: self.open_read_only()?, chunk_bytes: self.inner.chunk_bytes as u64 })
    }

    /// Slots that somebody may have mapped to whom they were lent, by this pool's owner or one before, by runs in order. The
    /// kernel's word: it forgets a program's slots with its last mapping, whatever becomes of it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn lent(&self) -> io::Result<Vec<Range<u32>>> {
        let Some(fd) = &self.inner.fd else { return Ok(Vec::new()) };
        let chunk = self.inner.chunk_bytes as u64;
        let slot = |byte: u64| u32::try_from(byte / chunk).unwrap_or(u32::MAX).min(self.inner.capacity);
        let mut runs = Vec::new();
        locks::each(fd, u64::from(self.inner.capacity) * chunk, |bytes| {
            runs.push(slot(bytes.start)..slot(bytes.end.saturating_add(chunk - 1)));
        })?;
        runs.sort_unstable_by_key(|run: &Range<u32>| run.start);
        Ok(runs)
    }

    fn open_read_only(&self) -> io::Result<OwnedFd> {
        let Some(fd) = &self.inner.fd else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the pool is private to this process"));
        };
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Memory that the pool takes now: of a shared pool as the operating system counts it, of a private one the slots
    /// that have been written to.
    ///
    /// # Errors
    /// The operating system's.
    pub fn resident(&self) -> io::Result<ByteSize> {
        let Some(fd) = &self.inner.fd else {
            let slots = self.inner.slots.lock();
            let chunks = u64::from(slots.in_use) + slots.warm.len() as u64;
            return Ok(ByteSize(chunks * self.inner.chunk_bytes as u64));
        };
        resident(fd)
    }
}

fn resident(pool: &OwnedFd) -> io::Result<ByteSize> {
    let blocks = rustix::fs::fstat(pool)?.st_blocks;
    Ok(ByteSize(u64::try_from(blocks).unwrap_or(0) * 512))
}

/// Gives up the claim that a descriptor of a pool ([`ChunkPool::read_only_fd`]) is to its memory. What was mapped with it stays
/// mapped: whoever calls this sees to it that the next owner knows of that in another way.
///
/// # Errors
/// The operating system's.
pub fn yield_claim(pool: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::flock(pool, FlockOperation::Unlock)?)
}

/// Takes back what [`yield_claim`] gave up.
///
/// # Errors
/// The operating system's; `WouldBlock` while somebody is finding out who has the memory.
pub fn renew_claim(pool: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::flock(pool, FlockOperation::NonBlockingLockShared)?)
}

/// Whether somebody has one of the descriptors that the memory's owner handed out, or a mapping made with one.
fn in_use(pool: &OwnedFd) -> io::Result<bool> {
    match rustix::fs::flock(pool, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(rustix::fs::flock(pool, FlockOperation::Unlock).map(|()| false)?),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

// === impl LentPool ===

impl LentPool {
    /// For the program. What it maps with it is up to it: it is told of slots only after they were held.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// From here on the program may have these slots mapped. For good: only its end, or that of its last mapping, says that
    /// it hasn't.
    ///
    /// # Errors
    /// The operating system's.
    pub fn hold(&self, slots: impl IntoIterator<Item = u32>) -> io::Result<()> {
        let slots: BTreeSet<u32> = slots.into_iter().collect();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for slot in slots {
            let at = u64::from(slot) * self.chunk_bytes;
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += self.chunk_bytes,
                _ => runs.push(at..at + self.chunk_bytes),
            }
        }
        runs.into_iter().try_for_each(|run| locks::share(&self.fd, run))
    }
}

// === impl PoolMemory ===

impl PoolMemory {
    /// Whether somebody may have chunks mapped ([`ChunkPool::read_only_fd`]). The owner itself doesn't count.
    ///
    /// # Errors
    /// The operating system's.
    pub fn is_in_use(&self) -> io::Result<bool> {
        in_use(&self.pool)
    }

    /// Memory that the pool takes now, as the operating system counts it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn resident(&self) -> io::Result<ByteSize> {
        resident(&self.pool)
    }
}

impl Size {
    fn of(capacity: ByteSize, chunk: ByteSize) -> Result<Self, PoolError> {
        let page = ByteSize(rustix::param::page_size() as u64);
        if chunk == ByteSize::ZERO || !chunk.bytes().is_multiple_of(page.bytes()) {
            return Err(PoolError::ChunkSize { chunk, page });
        }
        let no_room = PoolError::Capacity { capacity, chunk };
        let Ok(slots) = u32::try_from(capacity.bytes() / chunk.bytes()) else { return Err(no_room) };
        let Ok(chunk_bytes) = usize::try_from(chunk.bytes()) else { return Err(no_room) };
        let Some(len) = (slots as usize).checked_mul(chunk_bytes).filter(|len| *len > 0) else {
            return Err(no_room);
        };
        Ok(Self { slots, chunk_bytes, len })
    }
}

/// A memfd that can be written to, and made longer, by whoever has this descriptor, and never becomes shorter.
pub(crate) fn sealed_memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 don't know the flag.
    let fd = rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create(name, flags))?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    // A reader's mapping must never lose its pages under it (SIGBUS): the file can't shrink any more. Not sealed against
    // writing: whoever takes it over after this process maps it for that.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::SEAL)?;
    // Nobody who is handed the read-only descriptor can open the same memory for writing by accident.
    rustix::fs::fchmod(&fd, Mode::RUSR)?;
    Ok(fd)
}

/// Maps `len` bytes of a file, or of new memory, for writing.
fn map(fd: Option<&OwnedFd>, len: usize) -> io::Result<map::Range> {
    let range = map::Range::reserve(len)?;
    let (at, rw) = (range.base.as_ptr(), ProtFlags::READ | ProtFlags::WRITE);
    let flags = MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: replaces the reservation just made, of this length, which nobody else knows of yet.
    unsafe {
        match fd {
            Some(fd) => rustix::mm::mmap(at, len, rw, flags | MapFlags::SHARED, fd, 0),
            None => rustix::mm::mmap_anonymous(at, len, rw, flags | MapFlags::PRIVATE),
        }
    }?;
    // Refused where there are no huge pages of this kind by themselves; see `ChunkBuf::populate`.
    range.advise(Advice::LinuxHugepage);
    Ok(range)
}

impl fmt::Debug for ChunkPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkPool")
            .field("chunk_bytes", &self.inner.chunk_bytes)
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    /// Sorts the slots of a pool that was taken over: those that the ledger names or that are lent or mapped are in use; the
    /// others are free, and their memory goes back.
    fn sort_slots(&self, lent: &[Range<u32>], mapped: &BTreeSet<u32>) -> io::Result<Sorted> {
        let mut sorted = Sorted::default();
        let (Some(fd), Some(ledger)) = (&self.fd, &self.ledger) else { return Ok(sorted) };
        let mut free = 0..0;
        let chunk = self.chunk_bytes as u64;
        let give_back = |free: &Range<u32>| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (from, count) = (u64::from(free.start), u64::from(free.end - free.start));
            if count == 0 { Ok(()) } else { rustix::fs::fallocate(fd, flags, from * chunk, count * chunk) }
        };
        for slot in 0..self.capacity {
            match ledger.read(slot) {
                Entry::Written(record) if record.len <= self.chunk_bytes => {
                    give_back(&free)?;
                    free = slot + 1..slot + 1;
                    sorted.named.push((slot, record));
                    continue;
                }
                Entry::Empty => {}
                Entry::Written(_) | Entry::Damaged => sorted.damaged += 1,
            }
            ledger.clear(slot);
            if mapped.contains(&slot) || lent.iter().any(|run| run.contains(&slot)) {
                give_back(&free)?;
                free = slot + 1..slot + 1;
                sorted.orphans.push(slot);
            } else {
                free.end = slot + 1;
            }
        }
        give_back(&free)?;
        let mut slots = self.slots.lock();
        for slot in sorted.named.iter().map(|(slot, _)| slot).chain(&sorted.orphans) {
            slots.cold.remove(slot);
            slots.in_use += 1;
        }
        Ok(sorted)
    }

    /// Pins a slot that is in use, if it isn't and there is a pinner.
    fn pin(&self, slot: u32) -> Result<(), PinError> {
        let Some(pinner) = self.pinner.get() else { return Ok(()) };
        let mut pinned = self.pinned[slot as usize].lock();
        if !*pinned {
            // SAFETY: the slot is mapped until `self` is dropped, which unpins it, and its memory is not given back
            // before `punch` has unpinned it.
            unsafe { pinner.pin(self.slot_ptr(slot), self.chunk_bytes) }?;
            *pinned = true;
        }
        Ok(())
    }

    /// Unpins a slot that nobody uses.
    fn unpin(&self, slot: u32) -> Result<(), PinError> {
        let Some(pinner) = self.pinner.get() else { return Ok(()) };
        let mut pinned = self.pinned[slot as usize].lock();
        if *pinned {
            // SAFETY: pinned by `pin`, still mapped; whoever copies from a slot holds it, and nobody does.
            unsafe { pinner.unpin(self.slot_ptr(slot), self.chunk_bytes) }?;
            *pinned = false;
        }
        Ok(())
    }

    fn punch(&self, slot: u32) -> io::Result<()> {
        // Pinned pages outlive the hole: the device would go on reading them while the pool has others.
        self.unpin(slot).map_err(io::Error::other)?;
        self.huge[slot as usize].store(0, Ordering::Relaxed);
        let Some(fd) = &self.fd else {
            // SAFETY: the slot is mapped and nobody's; its bytes become zeros, as those of a new slot are.
            let forgotten = unsafe {
                rustix::mm::madvise(self.slot_ptr(slot).cast(), self.chunk_bytes, Advice::LinuxDontNeed)
            };
            return Ok(forgotten?);
        };
        Ok(rustix::fs::fallocate(
            fd,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            u64::from(slot) * self.chunk_bytes as u64,
            self.chunk_bytes as u64,
        )?)
    }

    fn slot_ptr(&self, slot: u32) -> *mut u8 {
        // SAFETY: `slot < capacity` for every slot that the pool hands out, and the mapping is
        // `capacity * chunk_bytes` long.
        unsafe { self.range.base.cast::<u8>().as_ptr().add(slot as usize * self.chunk_bytes) }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for slot in 0..self.capacity {
            if let Err(error) = self.unpin(slot) {
                tracing::warn!(slot, %error, "a chunk stays pinned until the process ends");
            }
        }
    }
}

// === impl ChunkBuf ===

impl ChunkBuf {
    /// Where in the pool it lies: at `slot * chunk_bytes`.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Has it pinned, if the pool has a pinner ([`ChunkPool::set_pinner`]) and it isn't yet. It stays so until its memory
    /// goes back to the operating system.
    ///
    /// # Errors
    /// The driver's words.
    pub fn pin(&self) -> Result<(), PinError> {
        self.pool.pin(self.slot)
    }

    /// Puts huge pages behind the first `len` bytes (whole huge pages only), once, if the machine can find any, whatever
    /// its policy for shared memory is. Changes no byte. Before pinning: what is pinned stays as it is. It costs nothing
    /// but speed to leave this out, or when it fails: the first write brings small pages then.
    ///
    /// Measured for 16 MiB: 1 ms, against 10 ms of page faults. Above all, a disk fills huge pages at its own speed,
    /// while small ones that lie scattered in physical memory take a descriptor each: on a virtual disk 2.5 GB/s
    /// against 1.0.
    pub fn populate(&self, len: usize) {
        // Anonymous memory has them by itself, as far as the machine allows any.
        if self.pool.fd.is_none() || !self.pool.chunk_bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return;
        }
        let pages = len.min(self.pool.chunk_bytes) / HUGE_PAGE_BYTES;
        // The slot's owner is the only one who looks: nothing to be ordered.
        let done = self.pool.huge[self.slot as usize].fetch_max(pages, Ordering::Relaxed);
        if done >= pages {
            return;
        }
        let range = &self[done * HUGE_PAGE_BYTES..pages * HUGE_PAGE_BYTES];
        // Only what has a page table can be collapsed: one small page of each.
        for page in range.chunks_exact(HUGE_PAGE_BYTES) {
            std::hint::black_box(page[0]);
        }
        // SAFETY: the range lies within the slot, which `self` owns; the call changes no contents.
        let failed =
            unsafe { libc::madvise(range.as_ptr().cast_mut().cast(), range.len(), MADV_COLLAPSE) } != 0;
        if failed {
            let error = io::Error::last_os_error();
            tracing::debug!(slot = self.slot, %error, "no huge pages for a chunk");
        }
    }

    /// Its byte at `offset`. Who reads or writes there is for the caller to settle.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.pool.chunk_bytes, "a chunk holds {} bytes", self.pool.chunk_bytes);
        self.pool.slot_ptr(self.slot).wrapping_add(offset)
    }

    /// Makes its first `len` bytes a read-only chunk that can be shared.
    ///
    /// # Panics
    /// When `len` is more than a chunk.
    #[must_use]
    pub fn freeze(self, len: usize) -> Chunk {
        assert!(len <= self.pool.chunk_bytes, "a chunk holds {} bytes, not {len}", self.pool.chunk_bytes);
        Chunk { buf: Arc::new(self), len }
    }
}

impl Deref for ChunkBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot lies within the mapping (see `slot_ptr`), memfd pages are always initialised, and `self`
        // is the slot's only owner: the pool gives it to nobody else until `self` is dropped.
        unsafe { slice::from_raw_parts(self.pool.slot_ptr(self.slot), self.pool.chunk_bytes) }
    }
}

impl DerefMut for ChunkBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes it the only reference. Other processes map a slot only between
        // being told of it and giving it back, and while they do its owner here is a frozen `Chunk`.
        unsafe { slice::from_raw_parts_mut(self.pool.slot_ptr(self.slot), self.pool.chunk_bytes) }
    }
}

impl Drop for ChunkBuf {
    fn drop(&mut self) {
        // Before anybody can take the slot and write to it.
        if let Some(ledger) = &self.pool.ledger {
            ledger.clear(self.slot);
        }
        let mut slots = self.pool.slots.lock();
        slots.in_use -= 1;
        slots.warm.insert(self.slot);
    }
}

impl fmt::Debug for ChunkBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkBuf").field("slot", &self.slot).finish_non_exhaustive()
    }
}

// === impl Chunk ===

impl Chunk {
    /// Where in the pool it lies: at `slot * chunk_bytes`.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.buf.slot
    }

    /// Whether a device reads it by itself; true where nothing pins.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.buf.pool.pinner.get().is_none() || *self.buf.pool.pinned[self.buf.slot as usize].lock()
    }

    /// As [`ChunkBuf::pin`].
    ///
    /// # Errors
    /// The driver's words.
    pub fn pin(&self) -> Result<(), PinError> {
        self.buf.pin()
    }

    /// Writes down what it holds, for whoever takes a shared pool over. Its bytes are known to be right. Stands until the
    /// last clone is dropped.
    ///
    /// # Panics
    /// When the record is of another length.
    pub fn record(&self, record: &Record) {
        assert_eq!(record.len, self.len, "a record of another chunk");
        if let Some(ledger) = &self.buf.pool.ledger {
            ledger.write(self.buf.slot, record);
        }
    }

    /// Whether somebody else holds it too.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.buf) > 1
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("slot", &self.buf.slot).field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: ByteSize = ByteSize::kib(64);

    fn pool(chunks: u64) -> ChunkPool {
        ChunkPool::new(ByteSize(chunks * CHUNK.bytes()), CHUNK).unwrap()
    }

    #[test]
    fn slots_are_disjoint_and_come_back() {
        let pool = pool(4);
        let mut bufs: Vec<_> = std::iter::from_fn(|| pool.try_take()).collect();
        assert_eq!(bufs.len(), 4);
        for (i, buf) in bufs.iter_mut().enumerate() {
            buf.fill(u8::try_from(i).unwrap() + 1);
        }
        for (i, buf) in bufs.iter().enumerate() {
            assert!(buf.iter().all(|b| usize::from(*b) == i + 1));
        }
        assert!(pool.try_take().is_none());
        let chunk = bufs.pop().unwrap().freeze(100);
        let clone = chunk.clone();
        assert!(chunk.is_shared());
        assert_eq!(clone.len(), 100);
        drop(chunk);
        assert!(pool.try_take().is_none(), "a clone keeps the slot");
        drop(clone);
        drop(bufs);
        assert_eq!(pool.usage(), PoolUsage { budget: 4, in_use: 0, warm: 4, capacity: 4 });
    }

    #[test]
    fn free_memory_goes_back_to_the_system() {
        let pool = pool(4);
        assert_eq!(pool.resident().unwrap(), ByteSize::ZERO);
        let mut kept = pool.try_take().unwrap();
        kept.fill(7);
        let mut other = pool.try_take().unwrap();
        other.fill(8);
        assert!(pool.resident().unwrap().bytes() >= 2 * CHUNK.bytes());
        drop(other);
        assert_eq!(pool.release_free().unwrap(), CHUNK);
        assert!(kept.iter().all(|b| *b == 7));
        drop(kept);
        pool.release_free().unwrap();
        assert_eq!(pool.resident().unwrap(), ByteSize::ZERO);
        assert_eq!(pool.usage().warm, 0);
        assert!(pool.try_take().unwrap().iter().all(|b| *b == 0), "a punched slot is zero");
    }

    #[test]
    fn a_private_pool_does_the_same_and_has_no_descriptor() {
        let pool = ChunkPool::private(ByteSize(4 * CHUNK.bytes()), CHUNK).unwrap();
        let mut kept = pool.try_take().unwrap();
        kept.fill(7);
        let mut other = pool.try_take().unwrap();
        other.fill(8);
        drop(other);
        assert_eq!(pool.resident().unwrap().bytes(), 2 * CHUNK.bytes());
        assert_eq!(pool.release_free().unwrap(), CHUNK);
        assert!(kept.iter().all(|b| *b == 7));
        drop(kept);
        pool.release_free().unwrap();
        assert!(pool.try_take().unwrap().iter().all(|b| *b == 0), "forgotten memory is zero");
        assert_eq!(pool.read_only_fd().unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn populating_changes_no_byte_and_takes_whole_huge_pages_only() {
        let chunk = ByteSize(2 * HUGE_PAGE_BYTES as u64);
        let pool = ChunkPool::new(ByteSize(2 * chunk.bytes()), chunk).unwrap();
        let huge = |buf: &ChunkBuf| buf.pool.huge[buf.slot as usize].load(Ordering::Relaxed);
        let mut buf = pool.try_take().unwrap();
        buf.populate(HUGE_PAGE_BYTES - 1);
        assert_eq!(pool.resident().unwrap(), ByteSize::ZERO, "a small file takes small pages");
        buf.populate(HUGE_PAGE_BYTES + 1);
        let resident = pool.resident().unwrap().bytes();
        assert!(resident > 0 && resident <= HUGE_PAGE_BYTES as u64, "{resident}");
        assert!(buf.iter().all(|b| *b == 0));
        buf.fill(7);
        buf.populate(usize::MAX);
        assert!(buf.iter().all(|b| *b == 7), "small pages keep their bytes");
        assert_eq!(huge(&buf), 2);
        let other = pool.try_take().unwrap();
        other.populate(usize::MAX);
        assert!(other.iter().all(|b| *b == 0));
        assert!(buf.iter().all(|b| *b == 7));
        drop(buf);
        pool.release_free().unwrap();
        assert_eq!(huge(&pool.try_take().unwrap()), 0, "a punched slot has none");
    }

    #[test]
    fn a_lowered_budget_waits_for_slots() {
        let pool = pool(4);
        let a = pool.try_take().unwrap();
        let b = pool.try_take().unwrap();
        pool.set_budget(CHUNK);
        assert!(pool.try_take().is_none());
        drop(a);
        assert!(pool.try_take().is_none());
        drop(b);
        let _c = pool.try_take().unwrap();
        assert!(pool.try_take().is_none());
        pool.set_budget(ByteSize::gib(1));
        assert_eq!(pool.usage().budget, 4, "never above the capacity");
    }

    #[test]
    fn the_given_descriptor_cannot_write() {
        let pool = pool(1);
        let fd = pool.read_only_fd().unwrap();
        assert!(rustix::io::pwrite(&fd, b"x", 0).is_err());
        // SAFETY: a new mapping that is never used.
        let writable = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        };
        assert!(writable.is_err());
        assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "sealed");
        let writable = pool.inner.fd.as_ref().unwrap();
        assert!(rustix::fs::ftruncate(writable, 0).is_err(), "sealed");
    }

    fn record(chunk: u32, len: usize) -> Record {
        let sum = stoker_types::ChunkSum(u64::from(chunk));
        Record { model: "m".parse().unwrap(), version: [7; 32], chunk, len, sum }
    }

    #[test]
    fn who_takes_a_pool_over_finds_what_was_recorded_and_nothing_else() {
        let before = pool(6);
        let len = |i: u8| 1000 + usize::from(i);
        let filled = |i: u8| {
            let mut buf = before.try_take().unwrap();
            buf.fill(i);
            buf.freeze(len(i))
        };
        let chunks: Vec<_> = (0..5).map(filled).collect();
        for (i, chunk) in (0_u8..).zip(&chunks) {
            // Chunk 3 was being read when its owner was killed.
            if i != 3 {
                chunk.record(&record(u32::from(i), len(i)));
            }
        }
        // Chunk 1 was evicted.
        let mut chunks: Vec<_> = chunks.into_iter().map(Some).collect();
        chunks[1] = None;
        let memory = || before.memory().unwrap().unwrap();

        // As after a kill: the old handles are not dropped.
        let larger = ByteSize(9 * CHUNK.bytes());
        let AdoptedPool { pool: after, chunks: found, damaged, .. } =
            ChunkPool::adopt(memory(), larger, CHUNK, &BTreeSet::new()).unwrap();
        let names: Vec<_> = found.iter().map(|(chunk, record)| (chunk.slot(), record.chunk)).collect();
        assert_eq!((names, damaged), (vec![(0, 0), (2, 2), (4, 4)], 0));
        for (chunk, record) in &found {
            let i = u8::try_from(record.chunk).unwrap();
            assert_eq!((chunk.len(), &**chunk), (len(i), &vec![i; len(i)][..]));
        }
        assert_eq!(after.usage(), PoolUsage { budget: 9, in_use: 3, warm: 0, capacity: 9 });
        assert_eq!(after.resident().unwrap().bytes(), 3 * CHUNK.bytes(), "the rest went back");
        let taken: Vec<_> = std::iter::from_fn(|| after.try_take()).collect();
        assert!(taken.iter().all(|buf| buf.iter().all(|b| *b == 0)));
        assert_eq!(taken.len(), 6);

        // What is dropped is not there for the next one; with less room, nothing else is lost.
        drop(found.into_iter().nth(1));
        drop(taken);
        let AdoptedPool { pool: third, chunks: found, .. } =
            ChunkPool::adopt(memory(), CHUNK, CHUNK, &BTreeSet::new()).unwrap();
        assert!(found.is_empty(), "all were dropped");
        assert_eq!(third.usage().capacity, 9);
    }

    #[test]
    fn what_somebody_has_mapped_stays_as_it_is() {
        let before = pool(4);
        let taken: Vec<_> = std::iter::from_fn(|| before.try_take()).collect();
        let filled = |(i, mut buf): (u8, ChunkBuf)| {
            buf.fill(i);
            buf.freeze(10)
        };
        let chunks: Vec<_> = (1..).zip(taken).map(filled).collect();
        chunks[1].record(&record(1, 10));
        let mapped = before.read_only_fd().unwrap();
        let memory = || before.memory().unwrap().unwrap();
        let slots = BTreeSet::from([1, 2, 77]);
        let adopt = || ChunkPool::adopt(memory(), CHUNK, CHUNK, &slots);
        assert!(matches!(adopt(), Err(PoolError::InUse)), "who has it has not given up the claim");
        yield_claim(&mapped).unwrap();
        let AdoptedPool { pool: after, chunks: found, orphans: kept, .. } = adopt().unwrap();
        assert_eq!(found.iter().map(|(chunk, _)| chunk.slot()).collect::<Vec<_>>(), [1]);
        assert_eq!(kept.iter().map(Chunk::slot).collect::<Vec<_>>(), [2]);
        let mut byte = [0];
        rustix::io::pread(&mapped, &mut byte, 2 * CHUNK.bytes()).unwrap();
        assert_eq!(byte, [3], "no record, and its bytes are there");
        rustix::io::pread(&mapped, &mut byte, 3 * CHUNK.bytes()).unwrap();
        assert_eq!(byte, [0], "nobody's");
        assert_eq!(after.usage().in_use, 2);
        renew_claim(&mapped).unwrap();
        assert!(matches!(adopt(), Err(PoolError::InUse)));
        drop((mapped, kept));
        assert_eq!(after.usage().in_use, 1);
    }

    #[test]
    fn a_damaged_record_costs_its_chunk_only() {
        let before = pool(3);
        let taken: Vec<_> = std::iter::from_fn(|| before.try_take()).collect();
        let chunks: Vec<_> = taken.into_iter().map(|buf| buf.freeze(10)).collect();
        chunks.iter().for_each(|chunk| chunk.record(&record(chunk.slot(), 10)));
        let memory = before.memory().unwrap().unwrap();
        // The second record's length.
        rustix::io::pwrite(&memory.ledger, &99_u64.to_le_bytes(), 4096 + 256 + 3 * 8).unwrap();
        let adopted = ChunkPool::adopt(memory, CHUNK, CHUNK, &BTreeSet::new()).unwrap();
        let slots: Vec<_> = adopted.chunks.iter().map(|(chunk, _)| chunk.slot()).collect();
        assert_eq!((slots, adopted.damaged), (vec![0, 2], 1));
    }

    #[test]
    fn whoever_has_it_mapped_keeps_it() {
        let before = pool(2);
        let memory = || before.memory().unwrap().unwrap();
        let adopt = || ChunkPool::adopt(memory(), CHUNK, CHUNK, &BTreeSet::new()).map(|_| ());
        let slot = before.try_take().unwrap().slot();
        assert!(!memory().is_in_use().unwrap());
        let fd = before.read_only_fd().unwrap();
        let copy = fd.try_clone().unwrap();
        let other = before.read_only_fd().unwrap();
        let mapped = crate::MappedFile::map(&fd, 10, CHUNK.bytes(), &[slot]).unwrap();
        // One after another, until nobody is left.
        let holders: [Box<dyn std::any::Any>; 4] =
            [Box::new(fd), Box::new(copy), Box::new(other), Box::new(mapped)];
        for holder in holders {
            assert!(memory().is_in_use().unwrap());
            assert!(matches!(adopt(), Err(PoolError::InUse)));
            drop(holder);
        }
        assert!(!memory().is_in_use().unwrap());
        assert!(adopt().is_ok());
        assert!(before.read_only_fd().is_ok(), "who takes it over hands it out again");
    }

    #[test]
    fn what_is_lent_stays_as_it_is_until_its_last_mapping_is_gone() {
        let before = pool(8);
        let bufs: Vec<_> = std::iter::from_fn(|| before.try_take()).collect();
        let chunks: Vec<_> = bufs
            .into_iter()
            .map(|mut buf| {
                let value = u8::try_from(buf.slot()).unwrap() + 1;
                buf.fill(value);
                buf.freeze(10)
            })
            .collect();
        // The ledger names all but the last two.
        chunks[..6].iter().for_each(|chunk| chunk.record(&record(chunk.slot(), 10)));
        assert!(before.lent().unwrap().is_empty());
        let lent = before.lend().unwrap();
        assert!(before.lent().unwrap().is_empty(), "nothing is held yet");
        lent.hold([7, 2, 1]).unwrap();
        let other = before.lend().unwrap();
        other.hold([2, 4]).unwrap();
        let map =
            |lent: &LentPool, slot| crate::MappedFile::map(lent.fd(), 10, CHUNK.bytes(), &[slot]).unwrap();
        let (one, two) = (map(&lent, 7), map(&other, 4));
        drop((lent, other));

        // As after a kill: the old handles are not dropped.
        let memory = before.memory().unwrap().unwrap();
        assert!(!memory.is_in_use().unwrap(), "no hindrance");
        let AdoptedPool { pool: after, chunks: found, lent, orphans, damaged } =
            ChunkPool::adopt(memory, CHUNK, CHUNK, &BTreeSet::new()).unwrap();
        let lent: BTreeSet<u32> = lent.into_iter().flatten().collect();
        assert_eq!((lent, damaged), (BTreeSet::from([1, 2, 4, 7]), 0));
        assert_eq!(orphans.iter().map(Chunk::slot).collect::<Vec<_>>(), [7]);
        assert_eq!(found.len(), 6);
        assert_eq!(after.usage(), PoolUsage { budget: 8, in_use: 7, warm: 0, capacity: 8 });
        // Everything else is used anew.
        let kept: Vec<_> = found.into_iter().filter(|(chunk, _)| [1, 2, 4].contains(&chunk.slot())).collect();
        let mut anew: Vec<_> = std::iter::from_fn(|| after.try_take()).collect();
        anew.iter_mut().for_each(|buf| buf.fill(99));
        assert_eq!(anew.len(), 4);
        assert_eq!((&one[..], &two[..]), (&[8; 10][..], &[5; 10][..]));
        drop(two);
        let lent = |pool: &ChunkPool| pool.lent().unwrap().into_iter().flatten().collect::<BTreeSet<u32>>();
        assert_eq!(lent(&after), BTreeSet::from([1, 2, 7]));
        drop(one);
        assert!(lent(&after).is_empty());
        drop((kept, orphans, anew));
        assert_eq!(after.usage().in_use, 0);
    }

    #[test]
    fn what_can_not_be_taken_over() {
        let before = pool(2);
        let memory = || before.memory().unwrap().unwrap();
        let adopt = |memory, chunk| ChunkPool::adopt(memory, CHUNK, chunk, &BTreeSet::new()).map(|_| ());
        let other = ByteSize(2 * CHUNK.bytes());
        assert!(matches!(adopt(memory(), other), Err(PoolError::Ledger(LedgerError::ChunkBytes { .. }))));
        let mixed = PoolMemory { pool: pool(2).memory().unwrap().unwrap().pool, ..memory() };
        assert!(matches!(adopt(mixed, CHUNK), Err(PoolError::Ledger(LedgerError::Foreign))));
        let file = PoolMemory { pool: tempfile::tempfile().unwrap().into(), ..memory() };
        assert!(adopt(file, CHUNK).is_err());
        assert!(ChunkPool::private(CHUNK, CHUNK).unwrap().memory().unwrap().is_none());
    }

    /// Remembers what is pinned.
    #[derive(Default)]
    struct PinLedger {
        pinned: Mutex<BTreeSet<usize>>,
        refuse: std::sync::atomic::AtomicBool,
    }

    impl Pinner for PinLedger {
        unsafe fn pin(&self, address: *mut u8, bytes: usize) -> Result<(), PinError> {
            assert_eq!(bytes as u64, CHUNK.bytes());
            if self.refuse.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(PinError("refused".into()));
            }
            assert!(self.pinned.lock().insert(address as usize), "pinned twice");
            Ok(())
        }

        unsafe fn unpin(&self, address: *mut u8, _bytes: usize) -> Result<(), PinError> {
            assert!(self.pinned.lock().remove(&(address as usize)), "unpinned without being pinned");
            Ok(())
        }
    }

    #[test]
    fn slots_are_pinned_once_and_unpinned_before_their_memory_goes() {
        let ledger = Arc::new(PinLedger::default());
        let pool = pool(4);
        let early = pool.try_take().unwrap();
        early.pin().unwrap();
        assert_eq!(pool.pin_free(), Ok(false));
        assert_eq!(pool.pinned(), ByteSize::ZERO, "no pinner, nothing to do");
        pool.set_pinner(ledger.clone());
        early.pin().unwrap();
        early.pin().unwrap();
        let other = pool.try_take().unwrap();
        let chunk = other.freeze(10);
        chunk.pin().unwrap();
        assert_eq!(ledger.pinned.lock().len(), 2);
        drop(chunk);
        assert_eq!(pool.pinned().bytes(), 2 * CHUNK.bytes(), "a free slot with memory stays pinned");
        pool.release_free().unwrap();
        assert_eq!(ledger.pinned.lock().len(), 1);
        ledger.refuse.store(true, std::sync::atomic::Ordering::Relaxed);
        let third = pool.try_take().unwrap();
        assert_eq!(third.pin(), Err(PinError("refused".into())));
        assert_eq!(pool.pinned(), CHUNK);
        drop((early, third, pool));
        assert!(ledger.pinned.lock().is_empty());
    }

    #[test]
    fn free_slots_are_pinned_ahead_within_the_budget() {
        let pool = pool(4);
        let ledger = Arc::new(PinLedger::default());
        pool.set_pinner(ledger.clone());
        pool.set_budget(ByteSize(3 * CHUNK.bytes()));
        let taken = pool.try_take().unwrap();
        let ahead = std::iter::from_fn(|| pool.pin_free().unwrap().then_some(())).take(10).count();
        assert_eq!((ahead, pool.usage().in_use), (3, 1), "one slot is taken, and memory of three is free");
        assert!(pool.try_take().unwrap().pin().is_ok());
        assert_eq!(ledger.pinned.lock().len(), 3);
        drop(taken);
    }

    #[test]
    fn sizes_that_make_no_pool() {
        assert!(matches!(ChunkPool::new(CHUNK, ByteSize(100)), Err(PoolError::ChunkSize { .. })));
        assert!(matches!(ChunkPool::new(CHUNK, ByteSize::ZERO), Err(PoolError::ChunkSize { .. })));
        assert!(matches!(ChunkPool::new(ByteSize(1), CHUNK), Err(PoolError::Capacity { .. })));
        assert!(matches!(ChunkPool::new(ByteSize(u64::MAX), CHUNK), Err(PoolError::Capacity { .. })));
    }
}
