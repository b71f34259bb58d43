//! One gateway's connection: streams come in through a task, what a step brought goes out from the engine's thread.
//!
//! The engine's thread writes to the socket itself as long as the socket takes it, so a token waits for no other
//! thread. What the socket does not take is queued up to a bound and written by the connection's task. A gateway that
//! lets the queue overflow loses its connection, and nobody else notices.

use std::{io, sync::Arc};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use stoker_proto::{
    FrameError, FrameReader, encode_frame,
    stream::{FromWorker, ToWorker, to_worker},
};
use stoker_types::clock;
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, mpsc},
};

use crate::engine::Command;

/// Number of a connection within the worker's life.
pub(crate) type ConnectionId = u64;

/// The sending side of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    socket: OwnedWriteHalf,
    queue_bytes_max: usize,
    queue: Mutex<Queue>,
    /// The queue is not empty, or the connection has been closed.
    wake: Notify,
    /// The queue has become empty, or the connection has been closed.
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: BytesMut,
    closed: bool,
}

/// Why a connection ended on our side.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// What was queued for the gateway passed the bound, or the gateway broke a rule.
    #[error("closed by the worker")]
    Closed,
    /// Reading failed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Writing failed.
    #[error("writing failed: {0}")]
    Io(#[from] io::Error),
    /// The worker ends.
    #[error("the engine has stopped")]
    EngineGone,
}

/// Serves a connection until either side closes it. Its streams are aborted then.
pub(crate) async fn serve(
    id: ConnectionId,
    stream: UnixStream,
    queue_bytes_max: usize,
    commands: mpsc::Sender<Command>,
) -> Result<(), ConnectionError> {
    let (read, write) = stream.into_split();
    let connection = Arc::new(Connection {
        id,
        socket: write,
        queue_bytes_max,
        queue: Mutex::default(),
        wake: Notify::new(),
        emptied: Notify::new(),
    });
    let ended = tokio::select! {
        read = read_all(read, &connection, &commands) => read,
        written = connection.write_queued() => written,
    };
    connection.close();
    // Nothing is lost if the engine has gone: its streams went with it.
    let _ = commands.send(Command::Closed { connection: id }).await;
    ended
}

async fn read_all(
    read: OwnedReadHalf,
    connection: &Arc<Connection>,
    commands: &mpsc::Sender<Command>,
) -> Result<(), ConnectionError> {
    let mut reader = FrameReader::new(read);
    while let Some(message) = reader.next::<ToWorker>().await? {
        let command = match message.kind {
            Some(to_worker::Kind::Generate(message)) => Command::Generate {
                connection: Arc::clone(connection),
                message: Box::new(message),
                arrived: clock::now(),
            },
            Some(to_worker::Kind::Abort(abort)) => {
                Command::Abort { connection: connection.id, stream: abort.stream }
            }
            // A kind of message from a newer gateway: protobuf's rule is to pass over what isn't known.
            None => continue,
        };
        commands.send(command).await.map_err(|_| ConnectionError::EngineGone)?;
    }
    Ok(())
}

// === impl Connection ===

impl Connection {
    /// Sends a frame, now if the socket takes it, else when it does. `false`: the connection is closed (the frame did
    /// not fit into the bound, or it was closed before) and its streams are to be aborted. Never blocks.
    pub(crate) fn send(&self, frame: &FromWorker) -> bool {
        let mut queue = self.queue.lock();
        if queue.closed {
            return false;
        }
        let was_empty = queue.bytes.is_empty();
        if encode_frame(frame, &mut queue.bytes).is_err()
            || (was_empty && self.write_now(&mut queue).is_err())
        {
            queue.close();
        } else if queue.bytes.len() > self.queue_bytes_max {
            tracing::warn!(
                connection = self.id,
                queued_bytes = queue.bytes.len(),
                "gateway does not read its streams; closing its connection"
            );
            queue.close();
        }
        if was_empty && !queue.bytes.is_empty() || queue.closed {
            self.wake.notify_one();
        }
        !queue.closed
    }

    /// Whether nothing more can be sent.
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    /// Ends the connection; its task notices.
    pub(crate) fn close(&self) {
        self.queue.lock().close();
        self.wake.notify_one();
        self.emptied.notify_waiters();
    }

    /// Waits until everything that was sent has been handed to the socket, or the connection is closed. Cancel-safe.
    pub(crate) async fn flushed(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.queue.lock().bytes.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Writes until the queue is empty or the socket is full.
    fn write_now(&self, queue: &mut Queue) -> io::Result<()> {
        while !queue.bytes.is_empty() {
            match self.socket.try_write(&queue.bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => queue.bytes.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes what [`send`](Self::send) had to queue, for as long as the connection lives.
    async fn write_queued(&self) -> Result<(), ConnectionError> {
        loop {
            self.wake.notified().await;
            loop {
                {
                    let mut queue = self.queue.lock();
                    if queue.closed {
                        return Err(ConnectionError::Closed);
                    }
                    self.write_now(&mut queue)?;
                    if queue.bytes.is_empty() {
                        self.emptied.notify_waiters();
                        break;
                    }
                }
                self.socket.writable().await?;
            }
        }
    }
}

// === impl Queue ===

impl Queue {
    fn close(&mut self) {
        self.closed = true;
        self.bytes = BytesMut::new();
    }
}
