//! HTTP to a running server: its admin socket and its API. Two short-lived connections a command; no pool.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite};

/// A server's admin socket.
#[derive(Debug, Clone)]
pub(crate) struct AdminClient {
    socket: PathBuf,
}

/// A server's OpenAI API.
#[derive(Debug, Clone)]
pub(crate) struct ApiClient {
    /// `host:port`.
    address: String,
    key: Option<String>,
}

/// The events of a `text/event-stream` body, as they arrive.
pub(crate) struct Events {
    body: Incoming,
    buffer: BytesMut,
}

/// One event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A `data:` line's payload.
    Data(Bytes),
    /// A comment line's text.
    Comment(String),
}

/// There is no server at the admin socket.
#[derive(Debug, thiserror::Error)]
#[error("no server is running here ({socket}: {source}); start one with `stoker serve`")]
pub(crate) struct NoServer {
    socket: PathBuf,
    source: std::io::Error,
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the response's body, or when it is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection ended");
        }
    });
    Ok(sender.send_request(request).await?)
}

/// The response's JSON, or its error's message.
async fn decode<T: DeserializeOwned>(response: Response<Incoming>) -> anyhow::Result<T> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("{}", error_message(status, &body));
    }
    serde_json::from_slice(&body).context("the server's answer is not what was expected")
}

/// The message of an OpenAI-shaped error body.
fn error_message(status: StatusCode, body: &[u8]) -> String {
    let message = serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|v| v.pointer("/error/message").and_then(|m| m.as_str()).map(str::to_owned));
    message.unwrap_or_else(|| format!("the server answered {status}"))
}

// === impl AdminClient ===

impl AdminClient {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// # Errors
    /// [`NoServer`] when nobody listens; else the server's words.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// # Errors
    /// As for [`get`](Self::get).
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.request(Method::POST, path, serde_json::to_vec(body)?.into()).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<T> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .map_err(|source| NoServer { socket: self.socket.clone(), source })?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        decode(exchange(stream, request).await?).await
    }
}

// === impl ApiClient ===

impl ApiClient {
    pub(crate) fn new(address: std::net::SocketAddr, key: Option<String>) -> Self {
        Self { address: address.to_string(), key }
    }

    /// A page that is text.
    ///
    /// # Errors
    /// The server's words when it refuses.
    pub(crate) async fn text(&self, path: &str) -> anyhow::Result<String> {
        let stream = tokio::net::TcpStream::connect(&self.address)
            .await
            .with_context(|| format!("no server answers at {}", self.address))?;
        let request = Request::get(path).header(header::HOST, &self.address).body(Full::new(Bytes::new()))?;
        let response = exchange(stream, request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!("{}", error_message(status, &body));
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Posts a request whose answer is an event stream; gives the response's headers too.
    ///
    /// # Errors
    /// The server's words when it refuses.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> anyhow::Result<(header::HeaderMap, Events)> {
        let stream = tokio::net::TcpStream::connect(&self.address)
            .await
            .with_context(|| format!("no server answers at {}", self.address))?;
        stream.set_nodelay(true)?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(header::CONTENT_TYPE, "application/json")
            .header("x-stoker-timeline", "1");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let response = exchange(stream, request.body(Full::new(serde_json::to_vec(body)?.into()))?).await?;
        if !response.status().is_success() {
            let status = response.status();
            bail!("{}", error_message(status, &response.into_body().collect().await?.to_bytes()));
        }
        let (parts, body) = response.into_parts();
        Ok((parts.headers, Events { body, buffer: BytesMut::new() }))
    }
}

// === impl Events ===

impl Events {
    /// The next event; `None` at the end of the body.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(end + 1).freeze();
                if let Some(event) = parse_line(&line.slice(..end)) {
                    return Ok(Some(event));
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

fn parse_line(line: &Bytes) -> Option<Event> {
    let line = line.strip_suffix(b"\r").map_or_else(|| line.clone(), |l| line.slice_ref(l));
    if let Some(data) = line.strip_prefix(b"data:") {
        Some(Event::Data(line.slice_ref(data.strip_prefix(b" ").unwrap_or(data))))
    } else {
        line.strip_prefix(b":").map(|c| Event::Comment(String::from_utf8_lossy(c).trim().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_lines() {
        let parse = |s: &'static str| parse_line(&Bytes::from_static(s.as_bytes()));
        assert_eq!(parse("data: {\"a\":1}\r"), Some(Event::Data(Bytes::from_static(b"{\"a\":1}"))));
        assert_eq!(parse("data:x"), Some(Event::Data(Bytes::from_static(b"x"))));
        assert_eq!(parse(": waiting"), Some(Event::Comment("waiting".into())));
        assert_eq!(parse("id: r:1"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn an_errors_message_is_shown() {
        let body = br#"{"error":{"message":"no model `x`","type":"invalid_request_error"}}"#;
        assert_eq!(error_message(StatusCode::NOT_FOUND, body), "no model `x`");
        assert_eq!(error_message(StatusCode::BAD_GATEWAY, b"<html>"), "the server answered 502 Bad Gateway");
    }
}
