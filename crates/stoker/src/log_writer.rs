//! A server's log lines, written by a thread of their own: whoever reads the log slowly, or not at all, delays no
//! request.

use std::{
    io::{self, Write},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that may wait to be written; what doesn't fit is dropped and counted.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// The thread gathers lines for so long before it writes them: at thousands of lines a second, one wake-up and one
/// write carry many.
const GATHER: Duration = Duration::from_millis(5);

/// Where the lines go.
#[derive(Debug, Clone)]
pub(crate) struct LogWriter(Arc<Shared>);

/// Dropping it writes what waits and ends the thread.
#[derive(Debug)]
pub(crate) struct LogThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Lines that found no room since the last write.
    dropped: u64,
    /// The thread sleeps until it is notified.
    asleep: bool,
    ending: bool,
}

/// Starts the thread, which writes to `out`.
///
/// # Errors
/// When no thread can be started.
pub(crate) fn start(out: impl Write + Send + 'static) -> io::Result<(LogWriter, LogThread)> {
    let shared = Arc::new(Shared::default());
    let owned = Arc::clone(&shared);
    let thread = std::thread::Builder::new().name("log".into()).spawn(move || owned.write_all(out))?;
    Ok((LogWriter(Arc::clone(&shared)), LogThread { shared, thread: Some(thread) }))
}

// === impl LogWriter ===

impl Write for &LogWriter {
    /// Takes one line. Never blocks on what it is written to, never fails.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.waiting.lock();
        if waiting.lines.len() + line.len() > WAITING_BYTES_MAX {
            waiting.dropped += 1;
        } else {
            waiting.lines.extend_from_slice(line);
        }
        if std::mem::take(&mut waiting.asleep) {
            self.0.changed.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

// === impl Shared ===

impl Shared {
    fn write_all(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        loop {
            let (dropped, ending) = {
                let mut waiting = self.waiting.lock();
                while waiting.lines.is_empty() && waiting.dropped == 0 && !waiting.ending {
                    waiting.asleep = true;
                    self.changed.wait(&mut waiting);
                }
                if !waiting.ending {
                    // Only the end is notified of now.
                    self.changed.wait_for(&mut waiting, GATHER);
                }
                std::mem::swap(&mut waiting.lines, &mut batch);
                (std::mem::take(&mut waiting.dropped), waiting.ending)
            };
            if dropped > 0 {
                metrics::counter!("stoker_log_lines_dropped_total").increment(dropped);
                let words = format!("{dropped} log lines were dropped: the log is read too slowly\n");
                batch.extend_from_slice(words.as_bytes());
            }
            // A log that can't be written must not end the server.
            let _ = out.write_all(&batch).and_then(|()| out.flush());
            batch.clear();
            if ending {
                return;
            }
        }
    }
}

// === impl LogThread ===

impl Drop for LogThread {
    fn drop(&mut self) {
        self.shared.waiting.lock().ending = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; nothing else can be done about it here.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Hands on what is written, once it is allowed to.
    struct Gated {
        gate: mpsc::Receiver<()>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.gate.recv();
            self.written.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_come_in_order_and_what_has_no_room_is_counted() {
        let (open, gate) = mpsc::channel();
        let (written, read) = mpsc::channel();
        let (writer, thread) = start(Gated { gate, written }).unwrap();
        let line = |n: usize| format!("{n:0>1023}\n");
        (&writer).write_all(b"first\n").unwrap();
        open.send(()).unwrap();
        assert_eq!(read.recv().unwrap(), b"first\n");
        // While a reader takes nothing, no writer waits: 4 MiB stay, the rest is counted.
        let count = 3 * WAITING_BYTES_MAX / 1024;
        for n in 0..count {
            (&writer).write_all(line(n).as_bytes()).unwrap();
        }
        drop(open);
        drop(thread);
        let text: Vec<u8> = read.try_iter().flatten().collect();
        let text = String::from_utf8(text).unwrap();
        let (kept, notes): (Vec<&str>, Vec<&str>) = text.lines().partition(|l| l.len() == 1023);
        assert!(kept.len() >= WAITING_BYTES_MAX / 1024 && kept.len() < count, "{}", kept.len());
        let numbers: Vec<usize> = kept.iter().map(|l| l.parse().unwrap()).collect();
        assert!(numbers.is_sorted());
        let dropped: usize =
            notes.iter().map(|n| n.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(kept.len() + dropped, count);
    }
}
