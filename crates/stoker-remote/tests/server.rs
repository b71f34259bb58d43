//! Readers against a server that misbehaves in every way that real ones do.

#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, Response, StatusCode, header},
    routing::get,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use parking_lot::Mutex;
use stoker_io::{ChunkPool, OpenRemote as _, ReadDone, ReadError, ReadOp};
use stoker_remote::{Patience, RemoteError, RemoteOptions, RemoteStores};
use stoker_types::{ByteSize, BytesPerSec, ChunkSum, RemoteObject};

const LEN: usize = 1 << 20;

/// What the next requests get instead of an answer.
#[derive(Clone, Copy, Debug)]
enum Misdeed {
    Status(u16),
    Throttle {
        seconds: u64,
    },
    /// So many bytes, then the connection breaks.
    Break(usize),
    /// A byte now and then.
    Loris,
    /// The whole instead of a part.
    Whole,
}

struct Server {
    url: String,
    state: Arc<Mutex<Content>>,
    _runtime: tokio::runtime::Runtime,
}

struct Content {
    bytes: Bytes,
    etag: String,
    misdeeds: Vec<Misdeed>,
    requests: usize,
}

// === impl Server ===

impl Server {
    fn start() -> Self {
        let bytes: Vec<u8> = (0..1_u32 << 17)
            .flat_map(|i| u64::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        let content =
            Content { bytes: bytes.into(), etag: "\"one\"".into(), misdeeds: Vec::new(), requests: 0 };
        let state = Arc::new(Mutex::new(content));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/dir/m.bin", listener.local_addr().unwrap());
        let router = Router::new().route("/dir/m.bin", get(answer)).with_state(Arc::clone(&state));
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { url, state, _runtime: runtime }
    }

    fn misbehave(&self, misdeeds: &[Misdeed]) {
        let mut state = self.state.lock();
        state.misdeeds = misdeeds.to_vec();
        state.requests = 0;
    }

    fn object(&self) -> RemoteObject {
        let etag = Some(self.state.lock().etag.clone());
        RemoteObject { url: self.url.clone(), len: LEN as u64, etag, modified_ms: None }
    }

    fn requests(&self) -> usize {
        self.state.lock().requests
    }
}

async fn answer(State(state): State<Arc<Mutex<Content>>>, headers: HeaderMap) -> Response<Body> {
    let (bytes, etag, misdeed) = {
        let mut state = state.lock();
        state.requests += 1;
        let misdeed = if state.misdeeds.is_empty() { None } else { Some(state.misdeeds.remove(0)) };
        (state.bytes.clone(), state.etag.clone(), misdeed)
    };
    let plain = |status: u16| Response::builder().status(status);
    match misdeed {
        Some(Misdeed::Status(status)) => {
            return plain(status).body(Body::from("<Message>no luck</Message>")).unwrap();
        }
        Some(Misdeed::Throttle { seconds }) => {
            return plain(503).header(header::RETRY_AFTER, seconds).body(Body::empty()).unwrap();
        }
        Some(Misdeed::Whole) => {
            return plain(200).header(header::ETAG, etag).body(Body::from(bytes)).unwrap();
        }
        _ => {}
    }
    if headers.get(header::IF_MATCH).is_some_and(|wanted| *wanted != etag) {
        return plain(412).body(Body::empty()).unwrap();
    }
    let builder = plain(206).header(header::ETAG, etag);
    let range = headers.get(header::RANGE).and_then(|r| r.to_str().unwrap().strip_prefix("bytes="));
    let Some((begin, end)) = range.and_then(|range| range.split_once('-')) else {
        let whole = builder.status(StatusCode::OK).header(header::CONTENT_LENGTH, bytes.len());
        return whole.body(Body::from(bytes)).unwrap();
    };
    let (begin, end): (usize, usize) = (begin.parse().unwrap(), end.parse().unwrap());
    let part = bytes.slice(begin..=end);
    let builder = builder.header(header::CONTENT_RANGE, format!("bytes {begin}-{end}/{}", bytes.len()));
    let builder = builder.header(header::CONTENT_LENGTH, part.len());
    let body = match misdeed {
        Some(Misdeed::Break(at)) => {
            let begun = part.slice(..at.min(part.len()));
            // Apart, so that the first half is sent before the connection goes.
            let parts = stream::once(async move { Ok(begun) }).chain(stream::once(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
            }));
            Body::from_stream(parts)
        }
        Some(Misdeed::Loris) => Body::from_stream(stream::unfold(0, move |at| {
            let byte = part.slice(at..=at);
            async move {
                tokio::time::sleep(Duration::from_millis(40)).await;
                Some((Ok::<_, std::io::Error>(byte), at + 1))
            }
        })),
        _ => Body::from(part),
    };
    builder.body(body).unwrap()
}

/// Quick to lose patience.
fn hasty() -> RemoteOptions {
    let patience = Patience {
        tries: 3,
        total: Duration::from_secs(10),
        backoff: Duration::from_millis(5),
        idle: Duration::from_millis(800),
        progress_bytes: 1024,
        ..Patience::default()
    };
    RemoteOptions { patience, ..RemoteOptions::default() }
}

fn read(
    stores: &RemoteStores,
    object: &RemoteObject,
    offset: u64,
    len: usize,
) -> Result<(Vec<u8>, ChunkSum), ReadError> {
    let chunk = ByteSize(LEN as u64);
    let pool = ChunkPool::new(chunk, chunk).unwrap();
    let reader = stores.open(object).unwrap();
    let (sender, ended) = mpsc::channel();
    let op = ReadOp { buf: pool.try_take().unwrap().into(), offset, len, sum: true };
    reader.read(op, Box::new(move |done: ReadDone| sender.send(done).unwrap()));
    let ReadDone { buf, result } =
        ended.recv_timeout(Duration::from_secs(60)).expect("a read came to no end");
    let filled = result?;
    Ok((buf[..len].to_vec(), filled.sum.unwrap()))
}

fn check(server: &Server, stores: &RemoteStores, offset: usize, len: usize) {
    let (bytes, sum) = read(stores, &server.object(), offset as u64, len).unwrap();
    let wanted = server.state.lock().bytes.slice(offset..offset + len);
    assert!(bytes == wanted, "other bytes");
    assert_eq!(sum, ChunkSum::of(&wanted));
}

#[test]
fn ranges_arrive_with_their_sums() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    for (offset, len) in [(0, LEN), (0, 1), (LEN - 1, 1), (12_345, 100_001)] {
        check(&server, &stores, offset, len);
    }
}

#[test]
fn what_breaks_off_is_gone_on_with() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    for misdeeds in [
        &[Misdeed::Status(500), Misdeed::Status(503)][..],
        &[Misdeed::Status(429)],
        &[Misdeed::Break(300_000), Misdeed::Break(0), Misdeed::Break(200_000), Misdeed::Status(500)],
        &[Misdeed::Loris],
    ] {
        server.misbehave(misdeeds);
        check(&server, &stores, 7, LEN - 7);
        assert_eq!(server.requests(), misdeeds.len() + 1, "{misdeeds:?}");
    }
}

#[test]
fn a_server_that_wants_a_rest_gets_it() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    server.misbehave(&[Misdeed::Throttle { seconds: 1 }]);
    let begun = stoker_types::clock::now();
    check(&server, &stores, 0, 1000);
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn patience_has_an_end() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    for misdeed in
        [Misdeed::Status(500), Misdeed::Loris, Misdeed::Break(10), Misdeed::Throttle { seconds: 3600 }]
    {
        server.misbehave(&[misdeed; 9]);
        let error = read(&stores, &server.object(), 0, LEN).unwrap_err();
        assert!(matches!(&error, ReadError::Remote { .. }), "{misdeed:?}: {error}");
        assert!(error.to_string().contains("given up after"), "{error}");
        assert!(server.requests() <= 3, "{misdeed:?}: {} requests", server.requests());
    }
}

#[test]
fn what_no_patience_helps_against_is_said_at_once() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    server.misbehave(&[Misdeed::Status(403)]);
    let error = read(&stores, &server.object(), 0, LEN).unwrap_err();
    assert!(matches!(&error, ReadError::Refused { detail, .. } if detail.contains("no luck")), "{error}");
    server.misbehave(&[Misdeed::Whole]);
    let error = read(&stores, &server.object(), 0, 1000).unwrap_err();
    assert!(matches!(&error, ReadError::Remote { .. }), "{error}");
    assert_eq!(server.requests(), 1);
    let gone = RemoteObject { url: server.url.replace("m.bin", "x.bin"), ..server.object() };
    assert!(matches!(read(&stores, &gone, 0, 1), Err(ReadError::Changed { .. })));
}

#[test]
fn another_version_is_never_mixed_in() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    let was = server.object();
    server.state.lock().etag = "\"two\"".into();
    let error = read(&stores, &was, 0, LEN).unwrap_err();
    assert!(matches!(&error, ReadError::Changed { .. }), "{error}");
    // By the rules of If-Match a weak ETag matches nothing; it is compared all the same.
    server.state.lock().etag = "W/\"two\"".into();
    check(&server, &stores, 0, LEN);
    let was = server.object();
    server.state.lock().etag = "W/\"three\"".into();
    assert!(matches!(read(&stores, &was, 0, LEN), Err(ReadError::Changed { .. })));
    let longer = RemoteObject { len: LEN as u64 + 1, ..server.object() };
    assert!(matches!(read(&stores, &longer, 0, 10), Err(ReadError::Changed { .. })));
}

#[test]
fn the_cap_holds() {
    let server = Server::start();
    let stores = RemoteStores::new(RemoteOptions { bandwidth: Some(BytesPerSec(2e6)), ..hasty() }).unwrap();
    let begun = stoker_types::clock::now();
    check(&server, &stores, 0, LEN);
    assert!(begun.elapsed() >= Duration::from_millis(400), "1 MiB at 2 MB/s took {:?}", begun.elapsed());
}

#[test]
fn small_objects_come_whole_or_not_at_all() {
    let server = Server::start();
    let stores = RemoteStores::new(hasty()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let small = |url: &str, max| runtime.block_on(stores.small(url, ByteSize(max)));
    let (object, bytes) = small(&server.url, LEN as u64).unwrap().unwrap();
    assert_eq!((object.etag, object.len, bytes.len()), (server.object().etag, LEN as u64, LEN));
    assert!(matches!(small(&server.url, 9), Err(RemoteError::TooLarge { .. })));
    assert!(small(&server.url.replace("m.bin", "x"), 9).unwrap().is_none());
}
