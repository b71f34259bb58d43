//! The floor of the bench: an HTTP server without any work in it, which gives every request the same bytes.

use std::{convert::Infallible, io::Read as _};

use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    Request, Response, body::Frame, body::Incoming, header, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::output::Output;

/// Serves until it is killed. The answer's body is read from the standard input, to its end.
pub(crate) async fn run(output: Output) -> anyhow::Result<()> {
    let mut answer = Vec::new();
    std::io::stdin().lock().read_to_end(&mut answer)?;
    let answer = Bytes::from(answer);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    output.line(&format!("listening on http://{}/", listener.local_addr()?));
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let answer = answer.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let answer = answer.clone();
            async move {
                request.into_body().collect().await?;
                // A stream of unknown length, as the real answers are: one chunk.
                let frames = futures::stream::iter([Ok::<_, Infallible>(Frame::data(answer))]);
                let mut response = Response::new(StreamBody::new(frames));
                let kind = header::HeaderValue::from_static("text/event-stream");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                Ok::<_, hyper::Error>(response)
            }
        });
        tokio::spawn(async move {
            if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}
