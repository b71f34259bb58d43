//! The compute pool: a fork and a join in a few microseconds, and no CPU burnt between them for long.
//!
//! Work is claimed in chunks from a counter, so a thread that the operating system has set aside (several workers
//! share the cores) delays only the chunk that it holds. A thread that wakes too late for a job doesn't enter it, and
//! the caller doesn't wait for it.
#![expect(unsafe_code, reason = "a job borrows from its caller's stack; the join upholds the lifetime")]

use std::{
    any::Any,
    cell::UnsafeCell,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, Thread},
};

use parking_lot::Mutex;

use crate::kernels::Isa;

/// Rounds of the pause instruction before a thread without work sleeps: some tens of microseconds, longer than the
/// gap between two kernels of a layer, shorter than anybody would notice on a shared core.
const SPINS: u32 = 1500;

/// The job is open for threads to enter.
const OPEN: u64 = 1 << 31;
/// Threads inside the job.
const ACTIVE: u64 = OPEN - 1;
/// One job further.
const EPOCH: u64 = 1 << 32;

/// A pool of compute threads, the caller's included.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs. Who finds it taken computes alone.
    turn: Mutex<()>,
    isa: Isa,
}

struct Shared {
    /// Epoch, [`OPEN`], [`ACTIVE`].
    state: AtomicU64,
    /// First item that nobody has claimed.
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleeping: Vec<AtomicBool>,
    stop: AtomicBool,
}

/// What to run, its lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(Range<usize>, usize) + Sync),
    items: usize,
    grain: usize,
    caller: *const Thread,
}

// SAFETY: `job` is written only by the holder of `turn` while the state is closed and no thread is inside, and read
// only by threads that entered while it was open; entering and leaving are acquire-release operations on `state`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointers in `job` point to values that are `Sync`.
unsafe impl Send for Shared {}

// === impl Threads ===

impl Threads {
    /// A pool of `threads` threads (at least 1; the caller of [`parallel`](Self::parallel) is one of them).
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Self::with_isa(threads, Isa::best())
    }

    /// As [`new`](Self::new), with the kernels of a given instruction set. The bits don't depend on it; tests show it.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn with_isa(threads: usize, isa: Isa) -> std::io::Result<Self> {
        let others = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleeping: (0..others).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(others), turn: Mutex::new(()), isa };
        for index in 0..others {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("compute-{}", index + 1))
                .spawn(move || shared.work(index))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// How many threads compute, the caller included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `run(range, thread)` for ranges of at most `grain` items that together are `0..items`, each once, on
    /// any of the pool's threads (`thread < count`), and returns when all are done. A call while another job runs
    /// (from inside of one, too) computes everything on the calling thread, as thread 0.
    ///
    /// # Panics
    /// With the panic of `run`, after all threads have left it.
    pub fn parallel(&self, items: usize, grain: usize, run: impl Fn(Range<usize>, usize) + Sync) {
        let grain = grain.max(1);
        if self.workers.is_empty() || items <= grain {
            if items > 0 {
                run(0..items, 0);
            }
            return;
        }
        let Some(_turn) = self.turn.try_lock() else {
            run(0..items, 0);
            return;
        };
        self.fork_join(items, grain, &run);
    }

    fn fork_join<'a>(&self, items: usize, grain: usize, run: &'a (dyn Fn(Range<usize>, usize) + Sync + 'a)) {
        let shared = &*self.shared;
        let caller = std::thread::current();
        // SAFETY: only the lifetime changes. `Join` (dropped before this function returns or unwinds) closes the
        // job and waits until no thread is inside, so `run` outlives every use.
        let run: *const (dyn Fn(Range<usize>, usize) + Sync) = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(Range<usize>, usize) + Sync + 'a),
                *const (dyn Fn(Range<usize>, usize) + Sync + 'static),
            >(run)
        };
        let job = Job { run, items, grain, caller: &raw const caller };
        // SAFETY: this thread holds `turn`, and the last job's `Join` left the state closed with nobody inside.
        unsafe { *shared.job.get() = Some(job) };
        // A worker's panic is left over when the caller's own was the one that got out.
        shared.panic.lock().take();
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) / EPOCH).wrapping_add(1);
        shared.state.store(epoch.wrapping_mul(EPOCH) | OPEN, Ordering::SeqCst);
        for (sleeping, worker) in shared.sleeping.iter().zip(&self.workers) {
            if sleeping.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        {
            let _join = Join { shared };
            // SAFETY: this frame owns the closure.
            unsafe { shared.claim(job, 0) };
        }
        let panic = shared.panic.lock().take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its jobs' panics, so it can't have ended in one.
            let _ended = worker.join();
        }
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads")
            .field("count", &self.count())
            .field("isa", &self.isa)
            .finish_non_exhaustive()
    }
}

/// Closes the job and waits for the threads inside.
struct Join<'a> {
    shared: &'a Shared,
}

impl Drop for Join<'_> {
    fn drop(&mut self) {
        let state = &self.shared.state;
        let mut now = state.fetch_and(!OPEN, Ordering::SeqCst) & !OPEN;
        let mut spins = 0;
        while now & ACTIVE != 0 {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::park();
            }
            now = state.load(Ordering::SeqCst);
        }
    }
}

// === impl Shared ===

impl Shared {
    fn work(&self, index: usize) {
        let mut done = 0;
        loop {
            let Some(epoch) = self.enter(index, done) else { return };
            done = epoch;
            // SAFETY: this thread is inside the job, so the caller hasn't returned and nobody writes `job`.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                // SAFETY: as above, the closure is alive while this thread is inside.
                let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { self.claim(job, index + 1) }));
                if let Err(panic) = outcome {
                    self.panic.lock().get_or_insert(panic);
                }
                // SAFETY: as above. Cloned (a counter goes up) because the caller may return once we have left.
                let caller = unsafe { (*job.caller).clone() };
                let before = self.state.fetch_sub(1, Ordering::SeqCst);
                if before & OPEN == 0 && before & ACTIVE == 1 {
                    caller.unpark();
                }
            }
        }
    }

    /// Waits for a job after `done` and enters it; `None` when the pool ends.
    fn enter(&self, index: usize, done: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            let now = self.state.load(Ordering::SeqCst);
            if now & OPEN != 0 && now / EPOCH != done {
                if self.state.compare_exchange(now, now + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    return Some(now / EPOCH);
                }
                continue;
            }
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            self.sleeping[index].store(true, Ordering::SeqCst);
            // A job opened, or the end called, before the flag was seen: look once more, then sleep. A permit left by
            // an earlier unpark only costs another round.
            let now = self.state.load(Ordering::SeqCst);
            let idle = now & OPEN == 0 || now / EPOCH == done;
            if idle && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.sleeping[index].store(false, Ordering::SeqCst);
            spins = 0;
        }
    }

    /// Runs chunks until none is left.
    ///
    /// # Safety
    /// `job.run` must be alive for the length of the call.
    unsafe fn claim(&self, job: Job, thread: usize) {
        // SAFETY: the caller says so.
        let run = unsafe { &*job.run };
        loop {
            let start = self.next.fetch_add(job.grain, Ordering::Relaxed);
            if start >= job.items {
                return;
            }
            run(start..job.items.min(start + job.grain), thread);
        }
    }
}

/// The number of physical cores that this process may use: its CPU affinity, hyper-threads of a core counted once,
/// no more than a CPU quota allows. At least 1.
#[must_use]
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(allowed) = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")) else {
        return logical;
    };
    let mut cores: Vec<String> = cpu_list(allowed.trim())
        .map(|cpu| {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
        })
        .collect();
    cores.sort_unstable();
    cores.dedup();
    cores.len().clamp(1, logical.max(1))
}

/// The CPUs of a list such as `0-3,8`; at most 4,096 of them.
fn cpu_list(list: &str) -> impl Iterator<Item = usize> + '_ {
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
        })
        .flatten()
        .take(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once() {
        for count in [1, 2, 3, 5] {
            let threads = Threads::new(count).unwrap();
            for items in [0, 1, 2, 7, 1000] {
                for grain in [1, 3, 5000] {
                    let hits: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    threads.parallel(items, grain, |range, thread| {
                        assert!(thread < count);
                        for i in range {
                            hits[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn many_jobs_with_pauses_between() {
        let threads = Threads::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            threads.parallel(16, 1, |range, _| {
                sum.fetch_add(range.len(), Ordering::Relaxed);
            });
            if round % 100 == 0 {
                // Long enough for the workers to go to sleep, so that waking is covered as well.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        assert_eq!(sum.into_inner(), 2000 * 16);
    }

    #[test]
    fn a_job_inside_a_job_runs_alone() {
        let threads = Threads::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        threads.parallel(4, 1, |_, _| {
            threads.parallel(10, 1, |range, _| {
                sum.fetch_add(range.len(), Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 40);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let threads = Threads::new(3).unwrap();
        for item in [0, 50, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                threads.parallel(100, 1, |range, _| assert!(!range.contains(&item), "on purpose"));
            }));
            assert!(outcome.is_err());
        }
        let sum = AtomicUsize::new(0);
        threads.parallel(100, 1, |range, _| {
            sum.fetch_add(range.len(), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 100);
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-2,8,10-11").collect::<Vec<_>>(), [0, 1, 2, 8, 10, 11]);
        assert_eq!(cpu_list("nonsense").count(), 0);
        assert!(physical_cores() >= 1);
    }
}
