//! Copies that wait for a link.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

use crate::{device::Transfer, error::DeviceError};

/// Copies in the order in which they came; several links may take from it. Bounded by whoever queues.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Transfer>,
    /// Why nothing is taken any more.
    closed: Option<DeviceError>,
}

// === impl Queue ===

impl Queue {
    /// Queues a copy; after [`Self::close`] it fails at once.
    pub(crate) fn push(&self, transfer: Transfer) {
        let refused = {
            let mut state = self.state.lock();
            match &state.closed {
                None => {
                    state.waiting.push_back(transfer);
                    None
                }
                Some(error) => Some((transfer, error.clone())),
            }
        };
        match refused {
            // All: those that sleep may have different limits.
            None => {
                self.changed.notify_all();
            }
            Some((transfer, error)) => (transfer.done)(Err(error)),
        }
    }

    /// The next copy of at most `limit` bytes; waits for one. `None` once the queue is closed.
    pub(crate) fn pop(&self, limit: u64) -> Option<Transfer> {
        let mut state = self.state.lock();
        loop {
            if let Some(at) = state.waiting.iter().position(|transfer| transfer.bytes() <= limit) {
                return state.waiting.remove(at);
            }
            if state.closed.is_some() {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Fails what waits, and what comes later. The first reason stays.
    pub(crate) fn close(&self, why: &DeviceError) {
        let waiting = {
            let mut state = self.state.lock();
            state.closed.get_or_insert_with(|| why.clone());
            std::mem::take(&mut state.waiting)
        };
        self.changed.notify_all();
        for transfer in waiting {
            (transfer.done)(Err(why.clone()));
        }
    }
}
