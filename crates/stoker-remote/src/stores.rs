//! The way to remote stores.

use std::{collections::HashMap, fmt, future::Future, ops::Range, sync::Arc, time::Duration};

use futures::TryStreamExt;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    http::HttpBuilder,
    local::LocalFileSystem,
    path::Path,
};
use parking_lot::Mutex;
use reqwest::{header::HeaderValue, redirect::Policy};
use stoker_io::{OpenRemote, ReadError, Reader};
use stoker_types::{ByteSize, BytesPerSec, RemoteObject};
use tokio::{
    runtime::{Handle, Runtime},
    time::Instant,
};
use url::Url;

use crate::{
    client::{Answered, Bearer, Connector, Noted, TlsError, http_client},
    error::{RemoteError, Trouble},
    limit::Bandwidth,
    patience::Patience,
    reader::{RemoteReader, fill},
};

/// Objects below a prefix beyond which a listing is given up: no model has so many files.
const LISTED_MAX: usize = 10_000;

/// How remote stores are reached. The binary fills it in from flags, file and environment.
#[derive(Clone)]
pub struct RemoteOptions {
    /// Credentials and settings, by the names that the stores' own tools have for them in the environment, in lower case:
    /// `aws_access_key_id`, `google_application_credentials`, `azure_storage_account_name`. Others are ignored.
    pub settings: Vec<(String, String)>,
    /// A token for one origin of plain HTTP.
    pub bearer: Option<BearerToken>,
    /// Cap on the bytes a second of all reads together.
    pub bandwidth: Option<BytesPerSec>,
    /// Reads under way at a time.
    pub reads_max: usize,
    /// A store that doesn't accept a connection in this time isn't there.
    pub connect_timeout: Duration,
    /// How long a store that doesn't answer well is asked again.
    pub patience: Patience,
    /// Threads that move bytes.
    pub threads: usize,
}

/// Sent to one origin (scheme, host and port) alone; see [`crate::token_may_follow`] for redirects from there.
#[derive(Clone)]
pub struct BearerToken {
    /// An address of that origin.
    pub endpoint: Url,
    /// The token.
    pub token: String,
}

/// The way to remote stores. A cheap handle; when the last one and the last reader are dropped, reads under way end.
#[derive(Clone)]
pub struct RemoteStores {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) patience: Patience,
    pub(crate) bandwidth: Option<Bandwidth>,
    settings: Vec<(String, String)>,
    reads_max: usize,
    connector: Connector,
    /// By scheme and host (or bucket).
    stores: Mutex<HashMap<String, Arc<Host>>>,
    handle: Handle,
    /// Only taken by the drop.
    runtime: Option<Runtime>,
}

/// A store of one host or bucket.
pub(crate) struct Host {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) kind: &'static str,
    /// The store asked to be left alone until then.
    quiet_until: Mutex<Option<Instant>>,
}

/// Where an object is.
#[derive(Clone)]
pub(crate) struct Located {
    pub(crate) host: Arc<Host>,
    pub(crate) path: Path,
    /// Without credentials.
    pub(crate) url: String,
}

/// Whether a text is the address of an object or prefix of a remote store.
#[must_use]
pub fn is_remote(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| kind(scheme).is_some())
}

/// An address that can be shown: user, password and query (which signs some addresses) are left out.
#[must_use]
pub fn without_credentials(url: &str) -> String {
    let Ok(mut url) = Url::parse(url) else { return "an address that can't be read".to_owned() };
    // `abfs://container@account/` has its container there. Neither fails for an address with a host.
    if url.scheme().starts_with("http") {
        let _ = url.set_username("");
    }
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// What a scheme's stores are called.
fn kind(scheme: &str) -> Option<&'static str> {
    Some(match scheme {
        "s3" | "s3a" => "S3",
        "gs" => "Google Cloud Storage",
        "az" | "azure" | "adl" | "abfs" | "abfss" => "Azure",
        "http" | "https" => "an HTTP server",
        "file" => "a file store",
        _ => return None,
    })
}

// === impl RemoteOptions ===

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            settings: Vec::new(),
            bearer: None,
            bandwidth: None,
            reads_max: 16,
            connect_timeout: Duration::from_secs(3),
            patience: Patience::default(),
            threads: 2,
        }
    }
}

impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.settings.iter().map(|(name, _)| name).collect();
        f.debug_struct("RemoteOptions")
            .field("settings", &names)
            .field("bandwidth", &self.bandwidth)
            .field("reads_max", &self.reads_max)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

// === impl RemoteStores ===

impl RemoteStores {
    /// Prepares client and threads. Touches no network.
    ///
    /// # Errors
    /// [`TlsError`], also when there are no threads.
    pub fn new(options: RemoteOptions) -> Result<Self, TlsError> {
        let RemoteOptions { settings, bearer, bandwidth, reads_max, connect_timeout, patience, threads } =
            options;
        let client = http_client(connect_timeout, Policy::none())?;
        let bearer = bearer.and_then(|BearerToken { endpoint, token }| {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
            value.set_sensitive(true);
            Some(Bearer { origin: endpoint.origin(), value })
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads.max(1))
            .thread_name("stoker-remote")
            .enable_all()
            .build()
            .map_err(|e| TlsError::threads(&e))?;
        let handle = runtime.handle().clone();
        Ok(Self {
            inner: Arc::new(Inner {
                patience,
                bandwidth: bandwidth.map(Bandwidth::new),
                settings,
                reads_max: reads_max.max(1),
                connector: Connector::new(client, bearer),
                stores: Mutex::default(),
                handle,
                runtime: Some(runtime),
            }),
        })
    }

    /// What is at an address now. A host that can't be reached is given up at once. Cancel-safe.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn head(&self, url: &str) -> Result<RemoteObject, RemoteError> {
        let at = self.inner.locate(url)?;
        self.run(at, async |at: Located| {
            let (asked, status) = describe(&at, GetOptions { head: true, ..GetOptions::default() }).await;
            // Many a server of files knows no HEAD, gives no length with it, or redirects to an address that is signed for
            // reading alone.
            let refused = matches!(&asked, Err(Trouble::Final(_))) && status.is_some_and(|s| s != 404);
            if !refused || Self::can_list(&at.url) {
                return asked;
            }
            let first = GetRange::Bounded(0..1);
            describe(&at, GetOptions { range: Some(first), ..GetOptions::default() }).await.0
        })
        .await
    }

    /// Bytes of one version of an object. Cancel-safe.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn range(&self, object: &RemoteObject, range: Range<u64>) -> Result<Vec<u8>, RemoteError> {
        let at = self.inner.locate(&object.url)?;
        let (inner, object) = (Arc::clone(&self.inner), object.clone());
        let url = at.url.clone();
        let read = self.inner.handle.spawn(async move {
            let mut bytes = Vec::new();
            fill(&inner, &at, &object, range, &mut |part: &[u8]| bytes.extend_from_slice(part)).await?;
            Ok(bytes)
        });
        read.await.unwrap_or(Err(RemoteError::Closed { url }))
    }

    /// A whole small object; `None` when there is none. Cancel-safe.
    ///
    /// # Errors
    /// [`RemoteError`]; `TooLarge` beyond `max`.
    pub async fn small(
        &self,
        url: &str,
        max: ByteSize,
    ) -> Result<Option<(RemoteObject, Vec<u8>)>, RemoteError> {
        let object = match self.head(url).await {
            Ok(object) => object,
            Err(RemoteError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        if object.len > max.bytes() {
            return Err(RemoteError::TooLarge { url: object.url, len: ByteSize(object.len), max });
        }
        let bytes = if object.len == 0 { Vec::new() } else { self.range(&object, 0..object.len).await? };
        Ok(Some((object, bytes)))
    }

    /// Whether the store of an address can say what is below a prefix. Plain HTTP can't.
    #[must_use]
    pub fn can_list(url: &str) -> bool {
        !url.starts_with("http://") && !url.starts_with("https://")
    }

    /// The objects directly below a prefix. Cancel-safe.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<RemoteObject>, RemoteError> {
        let at = self.inner.locate(prefix)?;
        self.run(at, async |at: Located| {
            let base = at.url.trim_end_matches('/');
            // Not only what is directly below: a flat listing comes in pages, and can be given up.
            let mut listing = at.host.store.list(Some(&at.path));
            let mut objects = Vec::new();
            let mut seen = 0_usize;
            while let Some(meta) =
                listing.try_next().await.map_err(|e| Trouble::of(&at.url, &e, Answered::default()))?
            {
                seen += 1;
                if seen > LISTED_MAX {
                    let detail =
                        format!("more than {LISTED_MAX} objects are below it: name the model's folder");
                    let url = at.url.clone();
                    return Err(Trouble::Final(RemoteError::Unusable { url, detail }));
                }
                let mut below = meta.location.prefix_match(&at.path).into_iter().flatten();
                if let (Some(name), None) = (below.next(), below.next()) {
                    let object = object_of(format!("{base}/{}", name.as_ref()), &meta);
                    objects.push(RemoteObject { etag: object.etag.map(entity_tag), ..object });
                }
            }
            Ok(objects)
        })
        .await
    }

    pub(crate) fn locate(&self, url: &str) -> Result<Located, RemoteError> {
        self.inner.locate(url)
    }

    /// Does something on this value's own runtime.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.inner.handle.spawn(future)
    }

    /// Does something on this value's own runtime, again and again within its patience. A host that can't be reached has
    /// none: whoever asks may know another.
    async fn run<T, F>(
        &self,
        at: Located,
        action: impl Fn(Located) -> F + Send + 'static,
    ) -> Result<T, RemoteError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Trouble>> + Send,
    {
        let inner = Arc::clone(&self.inner);
        let url = at.url.clone();
        let task = self.inner.handle.spawn(async move {
            let (mut left, begun) = (inner.patience.begin(), Instant::now());
            loop {
                let trouble = match tokio::time::timeout(inner.patience.idle, action(at.clone())).await {
                    Ok(Ok(value)) => return Ok(value),
                    Ok(Err(Trouble::Unreachable { why: last })) => {
                        let elapsed = begun.elapsed();
                        return Err(RemoteError::Unavailable { url: at.url, tries: 1, elapsed, last });
                    }
                    Ok(Err(trouble)) => trouble,
                    Err(_) => Trouble::silent(inner.patience.idle),
                };
                tokio::time::sleep(left.after(&at.url, trouble, 0)?).await;
            }
        });
        task.await.unwrap_or(Err(RemoteError::Closed { url }))
    }
}

impl OpenRemote for RemoteStores {
    fn open(&self, object: &RemoteObject) -> Result<Arc<dyn Reader>, ReadError> {
        let at = self.inner.locate(&object.url).map_err(|e| e.into_read(0))?;
        Ok(Arc::new(RemoteReader::new(Arc::clone(&self.inner), at, object.clone())))
    }

    fn reads_max(&self) -> usize {
        self.inner.reads_max
    }
}

impl fmt::Debug for RemoteStores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteStores").finish_non_exhaustive()
    }
}

/// What a request says of an object, and the status of the answer.
async fn describe(at: &Located, mut options: GetOptions) -> (Result<RemoteObject, Trouble>, Option<u16>) {
    let noted = Noted::default();
    options.extensions.insert(noted.clone());
    let answer = at.host.store.get_opts(&at.path, options).await;
    let object = match answer {
        Ok(answer) => Ok(object_of(at.url.clone(), &answer.meta)),
        Err(error) => Err(Trouble::of(&at.url, &error, noted.answered())),
    };
    (object, noted.answered().status.map(|status| status.as_u16()))
}

fn object_of(url: String, meta: &ObjectMeta) -> RemoteObject {
    RemoteObject {
        url,
        len: meta.size,
        etag: meta.e_tag.clone(),
        // Stores that don't say answer with the epoch.
        modified_ms: Some(meta.last_modified.timestamp_millis()).filter(|ms| *ms > 0),
    }
}

/// An ETag as answers have it, in quotation marks. Azure's listings leave them out.
pub(crate) fn entity_tag(tag: String) -> String {
    if tag.starts_with('"') || tag.starts_with("W/") { tag } else { format!("\"{tag}\"") }
}

// === impl Inner ===

impl Inner {
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    fn locate(&self, address: &str) -> Result<Located, RemoteError> {
        let bad = |problem: String| RemoteError::BadAddress { url: without_credentials(address), problem };
        let url = Url::parse(address).map_err(|e| bad(e.to_string()))?;
        let Some(kind) = kind(url.scheme()) else {
            return Err(bad("s3://, gs://, az://, https://, http:// and file:// are known".into()));
        };
        if url.query().is_some() || url.password().is_some() {
            return Err(bad("credentials belong into the environment, not into an address".into()));
        }
        if url.scheme() != "file" && !url.has_host() {
            return Err(bad("a host or bucket is missing".into()));
        }
        let path = if kind == "Azure" || url.scheme() == "file" || kind != "S3" {
            Path::from_url_path(url.path())
        } else {
            // Keys of S3 are taken as they are written.
            Path::parse(url.path())
        }
        .map_err(|e| bad(e.to_string()))?;
        let key = url[..url::Position::BeforePath].to_owned();
        let shown = without_credentials(address);
        if let Some(host) = self.stores.lock().get(&key) {
            return Ok(Located { host: Arc::clone(host), path, url: shown });
        }
        let store = self.build(&url, kind).map_err(|e| bad(crate::client::last_cause(&e)))?;
        let host = Arc::new(Host { store, kind, quiet_until: Mutex::default() });
        let host = Arc::clone(self.stores.lock().entry(key).or_insert(host));
        Ok(Located { host, path, url: shown })
    }

    fn build(&self, url: &Url, kind: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
        // Requests are repeated by whoever knows how many bytes have arrived.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let client = ClientOptions::new().with_allow_http(true);
        let of = |prefix: &'static str| self.settings.iter().filter(move |(key, _)| key.starts_with(prefix));
        let connector = self.connector.clone();
        Ok(match kind {
            "S3" => {
                let mut builder = AmazonS3Builder::new().with_client_options(client);
                for (key, value) in of("aws_") {
                    if let Ok(key) = key.parse::<AmazonS3ConfigKey>() {
                        builder = builder.with_config(key, value);
                    }
                }
                let bucket = url.host_str().unwrap_or_default();
                let builder =
                    builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
                Arc::new(builder.build()?)
            }
            "Google Cloud Storage" => {
                let mut builder = GoogleCloudStorageBuilder::new().with_client_options(client);
                for (key, value) in of("google_") {
                    if let Ok(key) = key.parse::<GoogleConfigKey>() {
                        builder = builder.with_config(key, value);
                    }
                }
                let bucket = url.host_str().unwrap_or_default();
                let builder =
                    builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
                Arc::new(builder.build()?)
            }
            "Azure" => {
                let mut builder = MicrosoftAzureBuilder::new().with_client_options(client);
                for (key, value) in of("azure_") {
                    if let Ok(key) = key.parse::<AzureConfigKey>() {
                        builder = builder.with_config(key, value);
                    }
                }
                let builder = builder.with_url(url.as_str()).with_retry(retry).with_http_connector(connector);
                Arc::new(builder.build()?)
            }
            "a file store" => Arc::new(LocalFileSystem::new()),
            _ => {
                let origin = &url[..url::Position::BeforePath];
                let builder = HttpBuilder::new().with_url(origin).with_client_options(client);
                Arc::new(builder.with_retry(retry).with_http_connector(connector).build()?)
            }
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not waited for: the drop may run on that very runtime.
            runtime.shutdown_background();
        }
    }
}

// === impl Host ===

impl Host {
    /// Waits while the store wants to be left alone.
    pub(crate) async fn quiet(&self) {
        let until = *self.quiet_until.lock();
        if let Some(until) = until.filter(|until| *until > Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// The store asked for fewer requests: all wait.
    pub(crate) fn throttled(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut quiet = self.quiet_until.lock();
        *quiet = Some(quiet.map_or(until, |quiet| quiet.max(until)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_is_the_same_with_and_without_its_quotation_marks() {
        for (tag, quoted) in [("0x8D", "\"0x8D\""), ("\"a\"", "\"a\""), ("W/\"a\"", "W/\"a\"")] {
            assert_eq!(entity_tag(tag.to_owned()), quoted);
        }
    }

    #[test]
    fn addresses() {
        let stores = RemoteStores::new(RemoteOptions::default()).unwrap();
        for text in ["s3://bucket/a/b.gguf", "gs://b/x", "https://example.org/a%20b/x.gguf", "file:///tmp/x"]
        {
            assert!(is_remote(text));
            assert!(stores.inner.locate(text).is_ok() || text.starts_with("gs"), "{text}");
        }
        for text in ["ftp://x/y", "s3:///x", "https://u:p@example.org/x", "https://example.org/x?sig=1", "/x"]
        {
            assert!(stores.inner.locate(text).is_err(), "{text}");
        }
        assert!(!is_remote("hf:owner/name") && !is_remote("/a/b"));
        assert_eq!(without_credentials("https://u:p@example.org/x?sig=1"), "https://example.org/x");
    }
}
