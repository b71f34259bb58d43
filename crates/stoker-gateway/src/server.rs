//! The listener, its connections, and how they end.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{
    backend::Backend,
    config::GatewayConfig,
    generation::Engine,
    guard::Ends,
    routes::{self, Gateway},
    seams::{Models, Placement, Status},
    telemetry,
    text::TextCache,
    trace::Traces,
};

/// Headers of a request, and bytes of its head.
const HEADERS_MAX: usize = 100;
const HEAD_BYTES_MAX: usize = 64 << 10;
/// After the running streams were told to end: how long their last events may take to be sent. Also how long a
/// connection that comes during the shutdown has for its request.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Pause after `accept` failed for want of file descriptors or memory, which only time mends.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the binary plugs in.
#[derive(Clone)]
pub struct GatewayDeps {
    /// Grants seats.
    pub placement: Arc<dyn Placement>,
    /// Knows the models.
    pub models: Arc<dyn Models>,
    /// Runs sequences: [`WorkerPool`](crate::WorkerPool).
    pub backend: Arc<dyn Backend>,
    /// Metrics and readiness.
    pub status: Arc<dyn Status>,
    /// Collects finished requests: [`NoTraces`](crate::NoTraces) if nobody wants them.
    pub traces: Arc<dyn Traces>,
}

/// How the server is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// First signal: new requests get a 503, running ones finish within the grace period, the rest end with an error.
    pub drain: CancellationToken,
    /// Second signal: running requests end with an error at once.
    pub now: CancellationToken,
}

/// Serves the API on `listener` until `shutdown` says so and what runs has ended. Not cancel-safe: a dropped call cuts
/// all connections.
///
/// # Errors
/// When the listener's address can't be read. A failed `accept` is logged and tried again.
pub async fn serve(
    listener: TcpListener,
    config: GatewayConfig,
    deps: GatewayDeps,
    shutdown: Shutdown,
) -> io::Result<()> {
    let local = listener.local_addr()?;
    telemetry::describe_metrics();
    let GatewayDeps { placement, models, backend, status, traces } = deps;
    let ending = CancellationToken::new();
    let gateway = Arc::new(Gateway {
        engine: Arc::new(Engine {
            placement,
            backend,
            stream_tokens_max: config.stream_tokens_max,
            unstreamed_tokens_max: config.unstreamed_tokens_max,
            isolate_clients: !config.keys.is_empty(),
        }),
        models,
        status,
        traces,
        text: TextCache::new(config.text_assets_max, config.text_threads_max),
        bodies: Arc::new(Semaphore::new(
            config.bodies_bytes_max.max(config.body_bytes_max).div_ceil(1 << 10),
        )),
        draining: shutdown.drain.clone(),
        ending: ending.clone(),
        config,
    });
    let router = routes::router(Arc::clone(&gateway));
    let slots = Arc::new(Semaphore::new(gateway.config.connections_max));
    let mut connections = JoinSet::new();
    tracing::info!(address = %local, "the API is served");

    let grace = gateway.config.grace;
    let deadline = async {
        shutdown.drain.cancelled().await;
        tracing::info!(grace_s = grace.as_secs(), "no new requests are taken");
        tokio::select! {
            () = tokio::time::sleep(grace) => {}
            () = shutdown.now.cancelled() => {}
        }
    };
    let mut deadline = std::pin::pin!(deadline);
    loop {
        tokio::select! {
            biased;
            () = &mut deadline => break,
            () = shutdown.now.cancelled() => break,
            // While it drains, the server goes on answering, with a 503, as long as something runs.
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            () = shutdown.drain.cancelled(), if connections.is_empty() => return Ok(()),
            accepted = accept(&listener, &slots) => {
                let Some((socket, ends, slot)) = accepted else { continue };
                let connection = serve_connection(socket, ends, router.clone(), Arc::clone(&gateway));
                connections.spawn(async move {
                    let _slot = slot;
                    connection.await;
                });
            }
        }
    }
    shutdown.drain.cancel();
    ending.cancel();
    let last_words = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut at the end of the shutdown");
    }
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> Option<(TcpStream, Ends, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((socket, peer)) => {
            // A token is a small write that must not wait for the acknowledgement of the one before.
            let local = socket.set_nodelay(true).and_then(|()| socket.local_addr()).ok()?;
            Some((socket, Ends { peer, local }, slot))
        }
        Err(error) => {
            tracing::warn!(%error, "accepting a connection failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn serve_connection(socket: TcpStream, ends: Ends, router: Router, gateway: Arc<Gateway>) {
    metrics::gauge!("stoker_gateway_connections").increment(1);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ends);
        let answer = router.clone().oneshot(request.map(Body::new));
        async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
    });
    let io = TokioIo::new(StallGuard::new(socket, gateway.config.write_timeout));
    // One that comes while the server drains gets its 503, soon, and no second request.
    let draining = gateway.draining.is_cancelled();
    let head_timeout = if draining { LAST_WORDS } else { gateway.config.head_timeout };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .keep_alive(!draining)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = gateway.draining.cancelled(), if !draining => {
            // Idle connections close now, the others after their answer.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = %ends.peer, %error, "a client's connection ended early");
    }
    metrics::gauge!("stoker_gateway_connections").decrement(1);
}

/// A socket whose peer must take something within a time, once something waits to be sent.
struct StallGuard {
    socket: TcpStream,
    timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

// === impl StallGuard ===

impl StallGuard {
    fn new(socket: TcpStream, timeout: Duration) -> Self {
        Self { socket, timeout, stalled: None }
    }

    fn guard<T>(&mut self, cx: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.stalled = None;
            return progress;
        }
        let due = Instant::now() + self.timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.socket).poll_write(cx, bytes);
        self.guard(cx, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.socket).poll_write_vectored(cx, slices);
        self.guard(cx, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.socket).poll_flush(cx);
        self.guard(cx, progress)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
