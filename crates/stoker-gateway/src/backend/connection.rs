//! One connection to a worker, shared by all streams between this gateway and it.

use std::{collections::HashMap, convert::Infallible, io, path::Path, sync::Arc, time::Duration};

use bytes::{Buf as _, BytesMut};
use parking_lot::Mutex;
use stoker_proto::{
    FrameReader, encode_frame,
    stream::{Abort, FailureCode, Finish, FromWorker, Generate, ToWorker, Token, to_worker},
};
use stoker_types::TokenLogprob;
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

use super::{Outlet, SequenceOrder, StreamEvent, StreamFailure, TokenLogprobs};

/// Bytes of orders that may wait for a worker that doesn't read.
const OUTBOX_BYTES_MAX: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A live connection. One task reads; whoever has an order writes it himself, and what the socket doesn't take at once
/// goes to a second task. The tasks end when either fails or `closing` is cancelled.
#[derive(Debug)]
pub(super) struct Connection {
    streams: Mutex<Streams>,
    outbox: Mutex<Outbox>,
    outbox_filled: Notify,
    closing: CancellationToken,
}

/// Orders that the socket hasn't taken.
#[derive(Debug)]
struct Outbox {
    /// `None` once the connection is closed.
    socket: Option<Arc<OwnedWriteHalf>>,
    bytes: BytesMut,
    /// The writing task has bytes that come before these.
    busy: bool,
}

#[derive(Debug)]
struct Streams {
    next: u64,
    /// `None` once the connection is closed.
    open: Option<HashMap<u64, Outlet>>,
}

/// Aborts its stream when dropped, unless the stream has ended.
pub(super) struct StreamGuard {
    connection: Arc<Connection>,
    stream: u64,
}

// === impl Connection ===

impl Connection {
    /// Connects to the worker that listens at `path`. `closing` closes the connection.
    pub(super) async fn open(path: &Path, closing: CancellationToken) -> Result<Arc<Self>, StreamFailure> {
        let gone = |detail: String| StreamFailure::WorkerGone { detail };
        let socket = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
            .await
            .map_err(|_| gone(format!("no connection after {} s", CONNECT_TIMEOUT.as_secs())))?
            .map_err(|error| gone(format!("connecting failed: {error}")))?;
        let (read, write) = socket.into_split();
        let write = Arc::new(write);
        let connection = Arc::new(Self {
            streams: Mutex::new(Streams { next: 1, open: Some(HashMap::new()) }),
            outbox: Mutex::new(Outbox {
                socket: Some(Arc::clone(&write)),
                bytes: BytesMut::new(),
                busy: false,
            }),
            outbox_filled: Notify::new(),
            closing,
        });
        tokio::spawn(Arc::clone(&connection).read(read));
        tokio::spawn(Arc::clone(&connection).write(write));
        Ok(connection)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.streams.lock().open.is_none()
    }

    /// Starts a stream.
    pub(super) fn start(
        self: &Arc<Self>,
        generation: u64,
        order: SequenceOrder,
        outlet: Outlet,
    ) -> Result<StreamGuard, StreamFailure> {
        let SequenceOrder { request, prompt, tokens_max, stop_ids, sampling, cache_salt } = order;
        let stream = {
            let mut streams = self.streams.lock();
            let stream = streams.next;
            let Some(open) = &mut streams.open else {
                return Err(StreamFailure::WorkerGone { detail: "its connection closed".into() });
            };
            open.insert(stream, outlet);
            streams.next += 1;
            stream
        };
        // From here on the guard takes the stream out again.
        let guard = StreamGuard { connection: Arc::clone(self), stream };
        self.send(to_worker::Kind::Generate(Generate {
            stream,
            generation,
            request,
            prompt: prompt.to_vec(),
            generated: Vec::new(),
            tokens_max,
            stop_ids: stop_ids.to_vec(),
            sampling: Some((&sampling).into()),
            cache_salt,
        }))?;
        Ok(guard)
    }

    fn send(&self, kind: to_worker::Kind) -> Result<(), StreamFailure> {
        let mut outbox = self.outbox.lock();
        let Outbox { socket, bytes, busy } = &mut *outbox;
        let Some(socket) = socket else {
            return Err(StreamFailure::WorkerGone { detail: "its connection closed".into() });
        };
        if bytes.len() > OUTBOX_BYTES_MAX {
            return Err(StreamFailure::WorkerGone { detail: "it reads none of its orders".into() });
        }
        encode_frame(&ToWorker { kind: Some(kind) }, bytes)
            .map_err(|error| StreamFailure::Protocol { detail: error.to_string() })?;
        if *busy {
            // The task looks again when it has written what it has.
            return Ok(());
        }
        // Mostly the socket has room, and a handover to the task would take longer than the write.
        if let Ok(written) = socket.try_write(bytes) {
            bytes.advance(written);
        }
        if !bytes.is_empty() {
            // An error too is the task's to find.
            *busy = true;
            drop(outbox);
            self.outbox_filled.notify_one();
        }
        Ok(())
    }

    async fn write(self: Arc<Self>, socket: Arc<OwnedWriteHalf>) {
        let mut batch = BytesMut::new();
        let writing = async {
            loop {
                self.outbox_filled.notified().await;
                while self.next_batch(&mut batch) {
                    while !batch.is_empty() {
                        socket.writable().await?;
                        match socket.try_write(&batch) {
                            Ok(written) => batch.advance(written),
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
        };
        let written: io::Result<Infallible> = tokio::select! {
            written = writing => written,
            () = self.closing.cancelled() => Err(io::Error::other("the connection was closed")),
        };
        let Err(error) = written;
        tracing::debug!(%error, "writing to a worker ended");
        self.closing.cancel();
        // The worker sees the end when the last holder of the socket is gone.
        self.outbox.lock().socket = None;
    }

    /// Takes what waits to be written, in exchange for `batch`, which is empty. Whether there was anything; if not,
    /// the next order is written by whoever has it.
    fn next_batch(&self, batch: &mut BytesMut) -> bool {
        let mut outbox = self.outbox.lock();
        std::mem::swap(&mut outbox.bytes, batch);
        outbox.busy = !batch.is_empty();
        outbox.busy
    }

    async fn read(self: Arc<Self>, socket: OwnedReadHalf) {
        let mut frames = FrameReader::new(socket);
        let reading = async {
            loop {
                match frames.next::<FromWorker>().await {
                    Ok(Some(frame)) => self.deliver(frame),
                    Ok(None) => return "its connection closed".to_owned(),
                    Err(error) => return error.to_string(),
                }
            }
        };
        let detail = tokio::select! {
            detail = reading => detail,
            () = self.closing.cancelled() => "its connection was closed".to_owned(),
        };
        self.closing.cancel();
        let orphans = self.streams.lock().open.take().unwrap_or_default();
        if !orphans.is_empty() {
            tracing::warn!(streams = orphans.len(), detail, "a worker's connection closed under its streams");
        }
        for outlet in orphans.into_values() {
            let failure = StreamFailure::WorkerGone { detail: detail.clone() };
            // A failure always fits.
            let _ = outlet.inbox.push(outlet.sequence, StreamEvent::Failed(failure));
        }
    }

    /// Gives a step's news to the streams. Permits of streams that ended are dropped outside the lock.
    fn deliver(&self, frame: FromWorker) {
        let mut ended = Vec::new();
        let mut overrun = Vec::new();
        {
            let mut streams = self.streams.lock();
            let Some(open) = &mut streams.open else { return };
            for begun in frame.begun {
                if let Some(outlet) = open.get(&begun.stream) {
                    let event = StreamEvent::Begun {
                        waited: Duration::from_micros(begun.waited_us),
                        prefill: Duration::from_micros(begun.prefill_us),
                        cached_tokens: begun.cached_tokens,
                    };
                    let _ = outlet.inbox.push(outlet.sequence, event);
                }
            }
            for token in frame.tokens {
                let stream = token.stream;
                // None: the stream was aborted while the token was on its way.
                let Some(outlet) = open.get(&stream) else { continue };
                if outlet.inbox.push(outlet.sequence, token_event(token)).is_err() {
                    ended.extend(open.remove(&stream));
                    overrun.push(stream);
                }
            }
            for end in frame.ends {
                let event = match Finish::try_from(end.finish) {
                    Ok(finish) => StreamEvent::End(finish.into()),
                    Err(_) => StreamEvent::Failed(StreamFailure::Protocol {
                        detail: format!("finish {} is unknown", end.finish),
                    }),
                };
                if let Some(outlet) = open.remove(&end.stream) {
                    let _ = outlet.inbox.push(outlet.sequence, event);
                    ended.push(outlet);
                }
            }
            for failure in frame.failures {
                if let Some(outlet) = open.remove(&failure.stream) {
                    let event = StreamEvent::Failed(stream_failure(failure.code, failure.message));
                    let _ = outlet.inbox.push(outlet.sequence, event);
                    ended.push(outlet);
                }
            }
        }
        for stream in overrun {
            self.abort(stream);
        }
    }

    fn abort(&self, stream: u64) {
        // A full outbox means a worker that hangs; the node's pings end it, and all its streams with it.
        let _ = self.send(to_worker::Kind::Abort(Abort { stream }));
    }
}

// === impl StreamGuard ===

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let outlet = self.connection.streams.lock().open.as_mut().and_then(|open| open.remove(&self.stream));
        if outlet.is_some() {
            self.connection.abort(self.stream);
        }
    }
}

fn token_event(token: Token) -> StreamEvent {
    let Token { stream: _, position, id, logprob, top } = token;
    let logprobs = logprob.map(|chosen| {
        let top = top.iter().map(|t| TokenLogprob { token: t.id, logprob: t.logprob }).collect();
        Box::new(TokenLogprobs { chosen, top })
    });
    StreamEvent::Token { position, id, logprobs }
}

fn stream_failure(code: i32, detail: String) -> StreamFailure {
    match FailureCode::try_from(code) {
        Ok(FailureCode::WrongGeneration) => StreamFailure::WrongGeneration,
        Ok(FailureCode::OutOfMemory) => StreamFailure::OutOfMemory { detail },
        Ok(FailureCode::Unloaded) => StreamFailure::Unloaded { detail },
        Ok(FailureCode::Internal | FailureCode::Invalid) | Err(_) => StreamFailure::Engine { detail },
    }
}
