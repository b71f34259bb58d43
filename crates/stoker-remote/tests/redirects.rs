//! A hub that redirects to its storage: where the token goes, who is asked how often, what happens when a signed address
//! runs out.

#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Method, Response, StatusCode, header},
};
use parking_lot::Mutex;
use stoker_remote::{BearerToken, RemoteError, RemoteOptions, RemoteStores};
use stoker_types::ByteSize;

const BYTES: &[u8] = b"the bytes of a file, in storage";

/// Hub and storage: two servers of the same code.
struct Host {
    base: String,
    state: Arc<Mutex<Site>>,
}

#[derive(Default)]
struct Site {
    /// Where everything but `/blob` is redirected.
    redirect: Option<String>,
    /// The signature that `/blob` wants.
    signature: String,
    refuses_head: bool,
    gives_no_ranges: bool,
    /// Method, path and `Authorization` of every request.
    log: Vec<(Method, String, Option<String>)>,
}

impl Host {
    async fn start(site: Site) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(site));
        let router = Router::new().fallback(answer).with_state(Arc::clone(&state));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { base, state }
    }

    fn asked(&self) -> usize {
        self.state.lock().log.len()
    }

    fn tokens(&self) -> Vec<Option<String>> {
        self.state.lock().log.iter().map(|(.., token)| token.clone()).collect()
    }
}

async fn answer(State(state): State<Arc<Mutex<Site>>>, request: Request) -> Response<Body> {
    let mut site = state.lock();
    let text = |name: header::HeaderName| request.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
    let path = request.uri().path().to_owned();
    site.log.push((request.method().clone(), path.clone(), text(header::AUTHORIZATION)));
    let plain = |status: StatusCode| Response::builder().status(status);
    if let Some(to) = site.redirect.clone().filter(|_| path != "/blob") {
        return plain(StatusCode::FOUND).header(header::LOCATION, to).body(Body::empty()).unwrap();
    }
    let signed = request.uri().query().unwrap_or_default() == site.signature;
    if !signed || (site.refuses_head && request.method() == Method::HEAD) {
        return plain(StatusCode::FORBIDDEN).body(Body::empty()).unwrap();
    }
    let range = text(header::RANGE).filter(|_| !site.gives_no_ranges);
    let Some(range) = range else {
        let whole = plain(StatusCode::OK).header(header::ETAG, "\"one\"");
        return whole.header(header::CONTENT_LENGTH, BYTES.len()).body(Body::from(BYTES)).unwrap();
    };
    let (begin, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (begin, end): (usize, usize) = (begin.parse().unwrap(), end.parse().unwrap());
    plain(StatusCode::PARTIAL_CONTENT)
        .header(header::ETAG, "\"one\"")
        .header(header::CONTENT_RANGE, format!("bytes {begin}-{end}/{}", BYTES.len()))
        .body(Body::from(&BYTES[begin..=end]))
        .unwrap()
}

/// A hub, its storage, and the way to them with the hub's token.
async fn hub(storage: Site) -> (Host, Host, RemoteStores) {
    let storage = Host::start(Site { signature: "sig=1".into(), ..storage }).await;
    let hub = Host::start(Site::default()).await;
    hub.state.lock().redirect = Some(format!("{}/blob?sig=1", storage.base));
    let bearer = BearerToken { endpoint: hub.base.parse().unwrap(), token: "secret".into() };
    let stores =
        RemoteStores::new(RemoteOptions { bearer: Some(bearer), ..RemoteOptions::default() }).unwrap();
    (hub, storage, stores)
}

#[tokio::test]
async fn the_token_goes_to_the_hub_alone_and_the_hub_is_asked_once() {
    let (hub, storage, stores) = hub(Site::default()).await;
    let object = stores.head(&format!("{}/o/n/m.gguf", hub.base)).await.unwrap();
    assert_eq!((object.len, object.etag.as_deref()), (BYTES.len() as u64, Some("\"one\"")));
    for (at, wanted) in (0..10).zip(BYTES.windows(5)) {
        assert_eq!(stores.range(&object, at..at + 5).await.unwrap(), wanted);
    }
    assert_eq!(hub.tokens(), [Some("Bearer secret".to_owned())], "where it leads is remembered");
    assert_eq!(storage.tokens(), vec![None; 11]);
}

#[tokio::test]
async fn another_port_of_the_hubs_host_is_another_server() {
    let other = Host::start(Site::default()).await;
    let (.., stores) = hub(Site::default()).await;
    stores.head(&format!("{}/blob", other.base)).await.unwrap();
    assert_eq!(other.tokens(), [None]);
}

#[tokio::test]
async fn a_signed_address_that_ran_out_is_asked_for_again() {
    let (hub, storage, stores) = hub(Site::default()).await;
    let object = stores.head(&format!("{}/o/n/m.gguf", hub.base)).await.unwrap();
    storage.state.lock().signature = "sig=2".into();
    hub.state.lock().redirect = Some(format!("{}/blob?sig=2", storage.base));
    assert_eq!(stores.range(&object, 0..5).await.unwrap(), BYTES[..5]);
    assert_eq!(stores.range(&object, 5..9).await.unwrap(), BYTES[5..9]);
    assert_eq!(hub.asked(), 2);
    assert_eq!(hub.tokens()[1].as_deref(), Some("Bearer secret"));
}

#[tokio::test]
async fn storage_that_is_signed_for_reading_alone_is_read_from() {
    let (hub, _storage, stores) = hub(Site { refuses_head: true, ..Site::default() }).await;
    let (object, bytes) =
        stores.small(&format!("{}/o/n/config.json", hub.base), ByteSize(99)).await.unwrap().unwrap();
    assert_eq!((object.len, &bytes[..]), (BYTES.len() as u64, BYTES));
}

#[tokio::test]
async fn a_server_without_ranges_is_told_from_one_that_fails() {
    let (hub, _storage, stores) = hub(Site { gives_no_ranges: true, ..Site::default() }).await;
    let object = stores.head(&format!("{}/o/n/m.gguf", hub.base)).await.unwrap();
    let error = stores.range(&object, 0..5).await.unwrap_err();
    assert!(matches!(&error, RemoteError::NoRanges { .. }) && error.is_whole_only(), "{error}");
}

#[tokio::test]
async fn redirects_in_a_circle_or_to_nowhere_come_to_an_end() {
    let site = Host::start(Site::default()).await;
    let stores = RemoteStores::new(RemoteOptions::default()).unwrap();
    for (to, part) in
        [(format!("{}/again", site.base), "again and again"), ("file:///etc/x".into(), "nowhere")]
    {
        site.state.lock().redirect = Some(to);
        let error = stores.head(&format!("{}/m.gguf", site.base)).await.unwrap_err();
        assert!(matches!(&error, RemoteError::Unusable { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_host_that_is_not_there_costs_one_try() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let stores = RemoteStores::new(RemoteOptions::default()).unwrap();
    let error = stores.head(&format!("http://{closed}/m.gguf")).await.unwrap_err();
    assert!(matches!(&error, RemoteError::Unavailable { tries: 1, .. }), "{error}");
}
