//! Faults on purpose, for tests of what is built on readers.

use std::{io, ops::Range, path::Path, sync::Arc};

use parking_lot::{Condvar, Mutex};

use stoker_types::ChunkSum;

use crate::reader::{Choice, Completion, FileStamp, Open, ReadDone, ReadError, ReadMode, ReadOp, Reader};

/// A fault: what happens to reads that touch some bytes of a file.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which files: the path ends with this.
    pub path: String,
    /// Which bytes. A read that touches any of them is hit.
    pub bytes: Range<u64>,
    /// How many reads are hit before the fault is gone.
    pub times: u32,
    /// What happens to them.
    pub kind: FaultKind,
}

/// What a fault does.
#[derive(Debug, Clone)]
pub enum FaultKind {
    /// The read fails at the fault's first byte.
    Error(io::ErrorKind),
    /// The file seems to end at the fault's first byte.
    Truncate,
    /// The fault's first byte comes back with these bits flipped.
    Corrupt {
        /// Bits to flip.
        bits: u8,
    },
    /// The read waits until the gate is opened, and is then done.
    Wait(Gate),
}

/// Holds back whoever comes to it until it is opened.
#[derive(Debug, Clone, Default)]
pub struct Gate {
    state: Arc<(Mutex<GateState>, Condvar)>,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    arrived: usize,
}

/// An [`Open`] whose readers have faults.
#[derive(Clone)]
pub struct FaultyFiles<O> {
    inner: O,
    faults: Arc<Mutex<Vec<Fault>>>,
}

/// A [`Reader`] with faults.
pub struct FaultyReader {
    inner: Arc<dyn Reader>,
    path: String,
    faults: Arc<Mutex<Vec<Fault>>>,
}

// === impl FaultyFiles ===

impl<O: Open> FaultyFiles<O> {
    /// Without faults as yet.
    pub fn new(inner: O) -> Self {
        Self { inner, faults: Arc::default() }
    }

    /// Adds a fault, also for files that are open already.
    pub fn add(&self, fault: Fault) {
        self.faults.lock().push(fault);
    }

    /// Takes every fault away. Readers that wait at a gate go on waiting.
    pub fn clear(&self) {
        self.faults.lock().clear();
    }
}

impl<O: Open> Open for FaultyFiles<O> {
    fn open(&self, path: &Path, mode: ReadMode) -> io::Result<Arc<dyn Reader>> {
        Ok(Arc::new(FaultyReader {
            inner: self.inner.open(path, mode)?,
            path: path.to_string_lossy().into_owned(),
            faults: Arc::clone(&self.faults),
        }))
    }
}

// === impl FaultyReader ===

impl FaultyReader {
    /// The faults that hit a read, each counted.
    fn hits(&self, op: &ReadOp) -> Vec<Fault> {
        let read = op.offset..op.offset + op.len as u64;
        let mut hits = Vec::new();
        self.faults.lock().retain_mut(|fault| {
            let touches = fault.bytes.start < read.end && read.start < fault.bytes.end;
            if touches && self.path.ends_with(&fault.path) {
                hits.push(fault.clone());
                fault.times = fault.times.saturating_sub(1);
            }
            fault.times > 0
        });
        hits
    }
}

impl Reader for FaultyReader {
    fn choice(&self) -> &Choice {
        self.inner.choice()
    }

    fn stamp(&self) -> io::Result<FileStamp> {
        self.inner.stamp()
    }

    fn part_bytes(&self) -> Option<usize> {
        self.inner.part_bytes()
    }

    fn read(&self, op: ReadOp, done: Completion) {
        let mut flips = Vec::new();
        let (offset, len) = (op.offset, op.len as u64);
        for Fault { bytes, kind, .. } in self.hits(&op) {
            let at = bytes.start.max(offset);
            let failed = match kind {
                FaultKind::Wait(gate) => {
                    gate.pass();
                    continue;
                }
                FaultKind::Corrupt { bits } => {
                    flips.push((at - offset, bits));
                    continue;
                }
                FaultKind::Error(kind) => ReadError::Io { at, source: Arc::new(kind.into()) },
                FaultKind::Truncate => ReadError::Truncated { at },
            };
            done(ReadDone { buf: op.buf, result: Err(failed) });
            return;
        }
        if flips.is_empty() {
            return self.inner.read(op, done);
        }
        self.inner.read(
            op,
            Box::new(move |mut read| {
                for (at, bits) in flips {
                    if let Ok(at) = usize::try_from(at) {
                        read.buf[at] ^= bits;
                    }
                }
                if let (Ok(filled), Ok(len)) = (&mut read.result, usize::try_from(len)) {
                    // The medium lied, so the sum must be that of the lie.
                    filled.sum = filled.sum.map(|_| ChunkSum::of(&read.buf[..len]));
                }
                done(read);
            }),
        );
    }
}

// === impl Gate ===

impl Gate {
    /// Lets everybody through, now and later.
    pub fn open(&self) {
        let (state, changed) = &*self.state;
        state.lock().open = true;
        changed.notify_all();
    }

    /// Blocks until `count` reads have come to the gate.
    pub fn wait_for_arrivals(&self, count: usize) {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        while state.arrived < count {
            changed.wait(&mut state);
        }
    }

    /// Waits until the gate is open.
    pub fn pass(&self) {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        state.arrived += 1;
        changed.notify_all();
        while !state.open {
            changed.wait(&mut state);
        }
    }
}
