//! Memory that processes share, and files that fill it: everything of I/O that needs `unsafe`.
//!
//! - [`ChunkPool`]: one memfd cut into slots; a slot is owned ([`ChunkBuf`]) or frozen and shared ([`Chunk`]).
//! - [`Record`]: what a slot holds, written down beside the pool, so that a process that takes both over
//!   ([`ChunkPool::adopt`]) after the last one was killed knows what is there.
//! - [`Pinner`]: tells a device's driver of a slot's memory, so that the device reads it by itself.
//! - [`Placement`]: which of a machine's NUMA nodes a pool's memory comes from.
//! - [`MappedFile`]: a worker's view of a file that lies in the pool, contiguous and read-only.
//! - [`OwnFile`]: the same, writable: what is written is the process's own.
//! - [`Reader`]: fills chunk buffers from one open file. [`LocalFiles`] opens local files and chooses direct or buffered
//!   reads for each; [`FaultyFiles`] adds faults for tests.
//! - [`ReadThreads`]: the threads that read.
//! - [`ForeignProcess`]: waits for the end of a process that another one started.
//! - [`PriorityFd`]: waits for a descriptor's priority data.
//! - [`Allocator`], [`trim_heap`]: the heap, and what was freed of it back to the operating system.
//! - [`raw_limit`]: how fast a file can be read at all, for comparison.

mod faulty;
mod foreign;
mod heap;
mod ledger;
mod local;
mod locks;
mod map;
mod measure;
mod numa;
mod own;
mod page_cache;
mod part;
mod pin;
mod pool;
mod priority;
mod reader;
mod ring;
mod threads;

pub use faulty::{Fault, FaultKind, FaultyFiles, FaultyReader, Gate};
pub use foreign::ForeignProcess;
pub use heap::{Allocator, trim_heap};
pub use ledger::{LedgerError, Record};
pub use local::{DirectIo, LocalFiles};
pub use map::{MapError, MappedFile, MappedLocal};
pub use measure::{RawOptions, RawRead, drop_page_cache, raw_limit};
pub use numa::{Placement, numa_nodes};
pub use own::OwnFile;
pub use part::ChunkPart;
pub use pin::{PinError, Pinner};
pub use pool::{
    AdoptedPool, Chunk, ChunkBuf, ChunkPool, LentPool, PoolError, PoolMemory, PoolUsage, renew_claim,
    yield_claim,
};
pub use priority::PriorityFd;
pub use reader::{
    Choice, Completion, FileStamp, Filled, Open, OpenRemote, ReadDone, ReadError, ReadMode, ReadOp, Reader,
    ReaderKind, Reason,
};
pub use threads::{ReadThreads, Task, Wake, Work};
