//! Connections to workers, one for each socket.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use stoker_types::SeatInfo;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Backend, Outlet, Running, SequenceOrder, StreamFailure, connection::Connection};

/// The backend over workers' Unix sockets. Dropping it closes all connections.
///
/// A worker that hangs keeps its connection: telling a long prefill from a hang is the node's matter, whose pings see
/// the engine's step count; it kills the worker, and the connection's end fails the streams.
#[derive(Debug)]
pub struct WorkerPool {
    slots: Mutex<HashMap<PathBuf, Arc<Slot>>>,
    closing: CancellationToken,
    _close_on_drop: DropGuard,
}

/// At most one connection attempt to a socket at a time; others wait for it.
type Slot = tokio::sync::Mutex<Option<Arc<Connection>>>;

// === impl WorkerPool ===

impl WorkerPool {
    /// Without connections yet.
    #[must_use]
    pub fn new() -> Self {
        let closing = CancellationToken::new();
        Self { slots: Mutex::default(), closing: closing.clone(), _close_on_drop: closing.drop_guard() }
    }

    async fn connection(&self, socket: &PathBuf) -> Result<Arc<Connection>, StreamFailure> {
        let slot = {
            let mut slots = self.slots.lock();
            if !slots.contains_key(socket) {
                // Sockets of workers that are gone don't pile up.
                slots.retain(|_, slot| {
                    slot.try_lock().map_or(true, |c| c.as_ref().is_some_and(|c| !c.is_closed()))
                });
            }
            Arc::clone(slots.entry(socket.clone()).or_default())
        };
        let mut connection = slot.lock().await;
        if let Some(open) = connection.as_ref().filter(|c| !c.is_closed()) {
            return Ok(Arc::clone(open));
        }
        let opened = Connection::open(socket, self.closing.child_token()).await?;
        *connection = Some(Arc::clone(&opened));
        Ok(opened)
    }
}

impl Default for WorkerPool {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Backend for WorkerPool {
    async fn start(
        &self,
        seat: &SeatInfo,
        order: SequenceOrder,
        outlet: Outlet,
    ) -> Result<Running, StreamFailure> {
        let connection = self.connection(&seat.socket).await?;
        Ok(Running::new(connection.start(seat.generation.0, order, outlet)?))
    }
}
