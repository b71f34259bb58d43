//! A file server that can be told to misbehave, and small models.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod archive;

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use sha2::{Digest, Sha256};
use stoker_registry::{PullEvent, Remote, RemoteConfig};
use stoker_types::ModelName;
use tokio::sync::Mutex;

/// How a request is answered, instead of rightly.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Rightly after all.
    None,
    /// Send this many bytes of the body, then break the connection.
    CutAfter(usize),
    /// Answer with a status.
    Status(u16),
    /// Send the headers and then nothing.
    Hang,
    /// From now on the file is another one.
    Replace(Vec<u8>),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Served {
    pub(crate) body: Vec<u8>,
    pub(crate) content_type: Option<&'static str>,
    /// Whether ranges are answered.
    pub(crate) ranges: bool,
    pub(crate) etag: bool,
    pub(crate) redirect: Option<String>,
}

#[derive(Default)]
pub(crate) struct Files {
    pub(crate) files: HashMap<String, Served>,
    pub(crate) faults: VecDeque<Fault>,
    /// Path and `Range` of every request.
    pub(crate) log: Vec<(String, Option<String>)>,
    pub(crate) tokens: Vec<(String, Option<String>)>,
}

#[derive(Clone, Default)]
pub(crate) struct Server {
    pub(crate) files: Arc<Mutex<Files>>,
    pub(crate) base: String,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { files: Arc::default(), base };
        let router = Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        server
    }

    pub(crate) async fn put(&self, path: &str, body: impl Into<Vec<u8>>) {
        let served = Served { body: body.into(), ranges: true, etag: true, ..Served::default() };
        self.serve(path, served).await;
    }

    pub(crate) async fn serve(&self, path: &str, served: Served) {
        self.files.lock().await.files.insert(path.to_owned(), served);
    }

    pub(crate) async fn fault(&self, faults: impl IntoIterator<Item = Fault>) {
        self.files.lock().await.faults.extend(faults);
    }

    /// `Range` of every request for a path.
    pub(crate) async fn ranges(&self, path: &str) -> Vec<Option<String>> {
        self.files.lock().await.log.iter().filter(|(p, _)| p == path).map(|(_, r)| r.clone()).collect()
    }

    pub(crate) fn remote(&self) -> Remote {
        Remote::new(self.config()).unwrap()
    }

    pub(crate) fn config(&self) -> RemoteConfig {
        RemoteConfig {
            hub_endpoint: Some(self.base.clone()),
            package_index: Some(format!("{}/simple", self.base)),
            connect_timeout: Duration::from_secs(3),
            idle_timeout: Duration::from_millis(300),
            backoff: Duration::from_millis(1),
            ..RemoteConfig::default()
        }
    }
}

async fn answer(State(server): State<Server>, request: Request) -> Response {
    let mut files = server.files.lock().await;
    let path = request.uri().path().to_owned();
    let headers: HeaderMap = request.headers().clone();
    let text = |name: header::HeaderName| headers.get(name).map(|v| v.to_str().unwrap().to_owned());
    files.log.push((path.clone(), text(header::RANGE)));
    files.tokens.push((path.clone(), text(header::AUTHORIZATION)));
    let respond = |status: u16| Response::builder().status(status);
    let fault = files.faults.pop_front();
    match &fault {
        Some(Fault::Status(status)) => return respond(*status).body(Body::empty()).unwrap(),
        Some(Fault::Replace(body)) => files.files.get_mut(&path).unwrap().body.clone_from(body),
        _ => {}
    }
    let Some(served) = files.files.get(&path).cloned() else {
        return respond(404).body(Body::empty()).unwrap();
    };
    if let Some(to) = served.redirect {
        return respond(302).header(header::LOCATION, to).body(Body::empty()).unwrap();
    }
    let etag = format!("\"{}\"", &sha256(&served.body)[..16]);
    let wanted = text(header::RANGE).filter(|_| served.ranges).and_then(|range| {
        let (begin, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        let fresh = text(header::IF_RANGE).is_none_or(|e| served.etag && e == etag);
        fresh.then(|| (begin.parse::<usize>().unwrap(), end.parse::<usize>().ok()))
    });
    let len = served.body.len();
    let (mut response, body) = match wanted {
        Some((begin, _)) if begin >= len => return respond(416).body(Body::empty()).unwrap(),
        Some((begin, end)) => {
            let end = end.map_or(len, |end| (end + 1).min(len));
            let range = format!("bytes {begin}-{}/{len}", end - 1);
            let status = StatusCode::PARTIAL_CONTENT.as_u16();
            (respond(status).header(header::CONTENT_RANGE, range), served.body[begin..end].to_vec())
        }
        None => (respond(200), served.body.clone()),
    };
    if served.etag {
        response = response.header(header::ETAG, etag);
    }
    if let Some(kind) = served.content_type {
        response = response.header(header::CONTENT_TYPE, kind);
    }
    response = response.header(header::CONTENT_LENGTH, body.len());
    let body = match fault {
        Some(Fault::CutAfter(n)) => Body::from_stream(Sent::then(body, n, false)),
        Some(Fault::Hang) => Body::from_stream(Sent::then(body, 0, true)),
        _ => Body::from(body),
    };
    response.body(body).unwrap()
}

/// The beginning of a body, and then an error or silence.
struct Sent {
    bytes: Option<Bytes>,
    silent: bool,
}

impl Sent {
    fn then(body: Vec<u8>, n: usize, silent: bool) -> Self {
        let n = n.min(body.len());
        Self { bytes: Some(Bytes::from(body).slice(..n)).filter(|b| !b.is_empty()), silent }
    }
}

impl futures::Stream for Sent {
    type Item = Result<Bytes, std::io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.bytes.take() {
            Some(bytes) => {
                // The error comes in the next turn, so that the bytes are on their way before it.
                context.waker().wake_by_ref();
                Poll::Ready(Some(Ok(bytes)))
            }
            None if self.silent => Poll::Pending,
            None => Poll::Ready(Some(Err(std::io::Error::other("cut")))),
        }
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A GGUF file that is indexed, though no engine can run it: one tensor of `floats` numbers.
pub(crate) fn gguf(floats: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    };
    out.extend(b"GGUF");
    out.extend(3_u32.to_le_bytes());
    out.extend(1_u64.to_le_bytes());
    out.extend(1_u64.to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    text(&mut out, "of-a-test");
    text(&mut out, "tensor");
    out.extend(1_u32.to_le_bytes());
    out.extend(u64::from(floats).to_le_bytes());
    out.extend(0_u32.to_le_bytes());
    out.extend(0_u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32), 0);
    // Values that differ everywhere, so that a misplaced byte is seen, and don't compress away.
    out.extend((0..floats).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()));
    out
}

pub(crate) fn name(text: &str) -> ModelName {
    ModelName::new(text).unwrap()
}

/// Ignores progress.
pub(crate) fn quiet(_: PullEvent<'_>) {}

/// Every file below a directory.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}
