//! A fixed number of threads that take their work where it is kept.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::JoinHandle,
};

use parking_lot::{Condvar, Mutex};

/// Where reading threads get their work. They pull it: nothing queues up that would have to be taken back when it is
/// cancelled or when something more urgent comes.
pub trait Work: Send + Sync + 'static {
    /// The most urgent piece of work now; `None` when there is none until [`Wake::wake`] is called again.
    fn next(&self) -> Option<Task>;
}

/// A piece of work, such as reading a chunk and checking it.
pub type Task = Box<dyn FnOnce() + Send>;

/// A fixed number of threads. Dropped, they finish what they are at and end; the drop waits for that.
#[derive(Debug)]
pub struct ReadThreads {
    wake: Wake,
    threads: Vec<JoinHandle<()>>,
}

/// Tells threads that there may be work.
#[derive(Debug, Clone, Default)]
pub struct Wake {
    state: Arc<(Mutex<WakeState>, Condvar)>,
}

#[derive(Debug, Default)]
struct WakeState {
    /// Grows with each call, so that one between asking for work and going to sleep isn't missed.
    calls: u64,
    stopping: bool,
}

// === impl ReadThreads ===

impl ReadThreads {
    /// Starts `count` threads (at least one).
    ///
    /// # Errors
    /// The operating system's; those already started have ended then.
    pub fn start(count: usize, work: &Arc<dyn Work>, wake: Wake) -> io::Result<Self> {
        let mut started = Self { wake, threads: Vec::new() };
        for i in 0..count.max(1) {
            let (work, wake) = (Arc::clone(work), started.wake.clone());
            let thread = std::thread::Builder::new()
                .name(format!("stoker-read-{i}"))
                .spawn(move || run(&*work, &wake))?;
            started.threads.push(thread);
        }
        Ok(started)
    }
}

impl Drop for ReadThreads {
    fn drop(&mut self) {
        {
            let (state, changed) = &*self.wake.state;
            state.lock().stopping = true;
            changed.notify_all();
        }
        let current = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != current) {
            // A thread's panics are caught and reported where they happen.
            let _ = thread.join();
        }
    }
}

fn run(work: &dyn Work, wake: &Wake) {
    let (state, changed) = &*wake.state;
    let mut seen = state.lock().calls;
    loop {
        while let Some(task) = work.next() {
            // Whoever waits for the task learns of the panic by what the task dropped; the thread must stay.
            if catch_unwind(AssertUnwindSafe(task)).is_err() {
                tracing::error!("a reading task panicked");
            }
            if state.lock().stopping {
                return;
            }
        }
        let mut state = state.lock();
        while state.calls == seen && !state.stopping {
            changed.wait(&mut state);
        }
        if state.stopping {
            return;
        }
        seen = state.calls;
    }
}

// === impl Wake ===

impl Wake {
    /// There may be work.
    pub fn wake(&self) {
        let (state, changed) = &*self.state;
        state.lock().calls += 1;
        changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Queue(Mutex<Vec<Task>>);

    impl Work for Queue {
        fn next(&self) -> Option<Task> {
            self.0.lock().pop()
        }
    }

    #[test]
    fn every_task_runs_and_a_panic_costs_no_thread() {
        let queue = Arc::new(Queue(Mutex::default()));
        let wake = Wake::default();
        let work: Arc<dyn Work> = queue.clone();
        let threads = ReadThreads::start(2, &work, wake.clone()).unwrap();
        let (sender, done) = mpsc::channel();
        for round in 0..50 {
            for i in 0..4 {
                let sender = sender.clone();
                queue.0.lock().push(Box::new(move || {
                    sender.send((round, i)).unwrap();
                    assert!(i != 3, "on purpose");
                }));
                wake.wake();
            }
            for _ in 0..4 {
                done.recv().unwrap();
            }
        }
        drop(threads);
        assert_eq!(Arc::strong_count(&queue), 2, "the threads are gone");
    }
}
