//! What loads are made with, in one place.

use std::time::Duration;

use stoker_types::ByteSize;

/// Host memory that bytes pass through on their way to a device: pinned once, shared by all loads of the process.
/// Measured: enough for full speed, and small enough to be made and pinned within the first load.
pub(crate) const RING: ByteSize = ByteSize::mib(256);

/// Device memory goes back in pieces of this size, each with the last tensor that lies in it.
pub(crate) const GRANULE: ByteSize = ByteSize::mib(64);

/// How often a waiting thread asks Python whether a signal (Ctrl-C) has come.
pub(crate) const SIGNALS_EVERY: Duration = Duration::from_millis(20);

/// Threads of the runtime. They queue copies and notice their ends; reading has its own.
pub(crate) const RUNTIME_THREADS: usize = 2;

/// How long a node may take to greet a program.
pub(crate) const NODE_ANSWERS: Duration = Duration::from_secs(10);

/// Threads that read and check. Measured: with a reader on every core, whoever queues copies waits for one; 16 readers on 16
/// cores are slower than 14.
pub(crate) fn read_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(4, usize::from);
    cores.saturating_sub(2).clamp(4, 16)
}

/// Chunks on their way to host memory at a time.
pub(crate) fn host_ring_chunks() -> usize {
    read_threads() + 2
}
