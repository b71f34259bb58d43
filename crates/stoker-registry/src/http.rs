//! HTTP as downloads need it: timeouts that follow the state of the transfer, redirects that keep a token where it
//! belongs, and errors that say whether trying again makes sense.

use std::{sync::Arc, time::Duration};

use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, IF_RANGE, LOCATION, RANGE, RETRY_AFTER},
    redirect::Policy,
};

use stoker_remote::{redirect_target, token_may_follow};

use crate::{error::SourceError, source::without_credentials};

const REDIRECTS_MAX: usize = 10;
/// A server that asks for more patience than this is treated as down.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// The largest answer that is read into memory: a large repository's list of files has 2 MiB.
const BODY_BYTES_MAX: usize = 64 << 20;

/// How remote sources are reached. The binary fills it in from flags and environment.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// Address of the model hub (`HF_ENDPOINT`); `None`: the public one.
    pub hub_endpoint: Option<String>,
    /// Access token of the hub (`HF_TOKEN`). Sent to the hub alone.
    pub hub_token: Option<String>,
    /// Address of the package index, as pip has it (`PIP_INDEX_URL`); `None`: the public one.
    pub package_index: Option<String>,
    /// Touch no network.
    pub offline: bool,
    /// A source that doesn't accept a connection in this time is given up.
    pub connect_timeout: Duration,
    /// A connection that carries nothing for this long is broken off.
    pub idle_timeout: Duration,
    /// Tries without progress before a transfer is given up.
    pub tries: u32,
    /// Pause before the second try; doubled for each further one, with jitter.
    pub backoff: Duration,
}

/// The way to remote sources. A cheap handle.
#[derive(Debug, Clone)]
pub struct Remote {
    client: Client,
    config: Arc<RemoteConfig>,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Get {
    pub(crate) url: Url,
    /// Send the hub's token.
    pub(crate) with_token: bool,
    pub(crate) accept: Option<&'static str>,
    /// Value of `Range`.
    pub(crate) range: Option<String>,
    /// Value of `If-Range`.
    pub(crate) if_range: Option<String>,
}

/// Why there is no answer to work with.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// No connection.
    Unreachable(String),
    /// Silence.
    Idle,
    /// Worth another try.
    Transient { after: Option<Duration>, error: SourceError },
    /// Not worth another try.
    Final(SourceError),
}

// === impl RemoteConfig ===

impl Default for RemoteConfig {
    fn default() -> Self {
        Self {
            hub_endpoint: None,
            hub_token: None,
            package_index: None,
            offline: false,
            connect_timeout: Duration::from_secs(3),
            idle_timeout: Duration::from_secs(30),
            tries: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

/// An HTTP client as [`stoker_remote::http_client`] makes it, without redirects.
///
/// # Errors
/// [`SourceError::Malformed`] when the TLS library can't be set up.
pub fn http_client(connect_timeout: Duration) -> Result<Client, SourceError> {
    stoker_remote::http_client(connect_timeout, Policy::none())
        .map_err(|e| SourceError::Malformed { what: "HTTP".to_owned(), problem: e.to_string() })
}

// === impl Remote ===

impl Remote {
    /// Prepares the client, as [`http_client`] does.
    ///
    /// # Errors
    /// [`SourceError::Malformed`] when the TLS library can't be set up.
    pub fn new(config: RemoteConfig) -> Result<Self, SourceError> {
        let client = http_client(config.connect_timeout)?;
        Ok(Self { client, config: Arc::new(config) })
    }

    pub(crate) fn config(&self) -> &RemoteConfig {
        &self.config
    }

    /// The hub's address.
    ///
    /// # Errors
    /// [`SourceError::Malformed`]: the configured one is none.
    pub fn hub(&self) -> Result<Url, SourceError> {
        base(self.config.hub_endpoint.as_deref(), "hf", "co", "")
    }

    /// The package index' address.
    pub(crate) fn packages(&self) -> Result<Url, SourceError> {
        base(self.config.package_index.as_deref(), "pypi", "org", "simple/")
    }

    /// Sends a request, following redirects: one try. Answers 200, 206 and 416 are for the caller. Cancel-safe.
    pub(crate) async fn get(&self, request: &Get) -> Result<Response, Trouble> {
        let mut url = request.url.clone();
        let mut with_token = request.with_token;
        for _ in 0..=REDIRECTS_MAX {
            let response = self.send(request, url.clone(), with_token).await?;
            if !response.status().is_redirection() {
                return check(response);
            }
            let location = response.headers().get(LOCATION);
            let Some(next) = location.and_then(|location| redirect_target(&url, location)) else {
                let problem = "a redirect to nowhere".to_owned();
                return Err(Trouble::Final(SourceError::Malformed { what: shown(&url), problem }));
            };
            with_token &= token_may_follow(&url, &next);
            url = next;
        }
        let problem = format!("more than {REDIRECTS_MAX} redirects");
        Err(Trouble::Final(SourceError::Malformed { what: shown(&request.url), problem }))
    }

    async fn send(&self, request: &Get, url: Url, with_token: bool) -> Result<Response, Trouble> {
        let address = shown(&url);
        let mut builder = self.client.request(Method::GET, url);
        if let Some(token) = self.config.hub_token.as_ref().filter(|_| with_token) {
            builder = builder.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let headers = [
            (ACCEPT, request.accept.map(str::to_owned)),
            (RANGE, request.range.clone()),
            (IF_RANGE, request.if_range.clone()),
        ];
        for (name, value) in headers {
            if let Some(value) = value {
                builder = builder.header(name, value);
            }
        }
        match tokio::time::timeout(self.config.idle_timeout, builder.send()).await {
            Err(_) => Err(Trouble::Idle),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) if e.is_connect() => Err(Trouble::Unreachable(causes(&e))),
            Ok(Err(e)) if e.is_builder() => {
                Err(Trouble::Final(SourceError::Malformed { what: address, problem: causes(&e) }))
            }
            Ok(Err(e)) => {
                let error = SourceError::Unreachable { host: address, why: causes(&e) };
                Err(Trouble::Transient { after: None, error })
            }
        }
    }

    /// The body of a small answer, with retries. Returns the address that it came from too. Cancel-safe.
    pub(crate) async fn text(&self, request: &Get) -> Result<(Vec<u8>, Answer), SourceError> {
        let mut attempt = 0;
        loop {
            let trouble = match self.get(request).await {
                Ok(response) => match self.body(response, &request.url).await {
                    Ok(found) => return Ok(found),
                    Err(trouble) => trouble,
                },
                Err(trouble) => trouble,
            };
            attempt += 1;
            self.pause(attempt, trouble, &request.url, attempt > 1).await?;
        }
    }

    /// The body of an answer to a request for a few bytes, with retries; `None`, without reading it, when the server
    /// ignores ranges. Cancel-safe.
    pub(crate) async fn partial(&self, request: &Get) -> Result<Option<(Vec<u8>, Answer)>, SourceError> {
        let mut attempt = 0;
        loop {
            let trouble = match self.get(request).await {
                Ok(response) if response.status() != StatusCode::PARTIAL_CONTENT => return Ok(None),
                Ok(response) => match self.body(response, &request.url).await {
                    Ok(found) => return Ok(Some(found)),
                    Err(trouble) => trouble,
                },
                Err(trouble) => trouble,
            };
            attempt += 1;
            self.pause(attempt, trouble, &request.url, attempt > 1).await?;
        }
    }

    async fn body(&self, mut response: Response, url: &Url) -> Result<(Vec<u8>, Answer), Trouble> {
        let kind = Answer {
            url: response.url().clone(),
            content_type: header(&response, "content-type").unwrap_or_default(),
            total: content_range(&response).and_then(|range| range.total),
            etag: strong_etag(&response),
        };
        let mut body = Vec::new();
        while let Some(bytes) = self.next(&mut response).await? {
            if body.len() + bytes.len() > BODY_BYTES_MAX {
                let problem = format!("an answer of more than {BODY_BYTES_MAX} bytes");
                return Err(Trouble::Final(SourceError::Malformed { what: shown(url), problem }));
            }
            body.extend_from_slice(&bytes);
        }
        Ok((body, kind))
    }

    /// The next bytes of a body; `None` at its end. Cancel-safe.
    pub(crate) async fn next(&self, response: &mut Response) -> Result<Option<bytes::Bytes>, Trouble> {
        match tokio::time::timeout(self.config.idle_timeout, response.chunk()).await {
            Err(_) => Err(Trouble::Idle),
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(e)) => {
                let why = causes(&e);
                let error = SourceError::Unreachable { host: host(response.url()), why };
                Err(Trouble::Transient { after: None, error })
            }
        }
    }

    /// Waits before the next try, or gives up. `failures` in a row so far; a host that was never `reached` is given up
    /// at once: waiting for it is the next source's time.
    pub(crate) async fn pause(
        &self,
        failures: u32,
        trouble: Trouble,
        url: &Url,
        reached: bool,
    ) -> Result<(), SourceError> {
        let (after, error) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Unreachable(why) => {
                let error = SourceError::Unreachable { host: host(url), why };
                if !reached {
                    return Err(error);
                }
                (None, error)
            }
            Trouble::Idle => {
                let error = SourceError::TooSlow { host: host(url), idle: self.config.idle_timeout };
                if !reached {
                    return Err(error);
                }
                (None, error)
            }
            Trouble::Transient { after, error } => (after, error),
        };
        if failures >= self.config.tries || after.is_some_and(|after| after > RETRY_AFTER_MAX) {
            return Err(error);
        }
        let doubled = self.config.backoff.saturating_mul(1 << (failures - 1).min(6));
        let jittered = doubled.mul_f64(rand::random_range(0.5..1.0));
        tracing::debug!(host = host(url), failures, %error, "trying again");
        tokio::time::sleep(after.map_or(jittered, |after| after.max(jittered))).await;
        Ok(())
    }
}

/// What is left of an answer when its body was read.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The last address, redirects followed.
    pub(crate) url: Url,
    pub(crate) content_type: String,
    /// Length of the whole, from `Content-Range`.
    pub(crate) total: Option<u64>,
    pub(crate) etag: Option<String>,
}

/// A `Content-Range` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    pub(crate) begin: u64,
    pub(crate) total: Option<u64>,
}

// === impl Get ===

impl Get {
    pub(crate) fn new(url: Url) -> Self {
        Self { url, with_token: false, accept: None, range: None, if_range: None }
    }
}

fn base(configured: Option<&str>, name: &str, domain: &str, path: &str) -> Result<Url, SourceError> {
    // The public registries are found under the name that their scheme has in a source.
    let mut text = configured.map_or_else(|| format!("https://{name}.{domain}/{path}"), str::to_owned);
    if !text.ends_with('/') {
        text.push('/');
    }
    let malformed = |problem: String| SourceError::Malformed { what: without_credentials(&text), problem };
    let url = Url::parse(&text).map_err(|e| malformed(e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(malformed("must be an http or https address".to_owned()));
    }
    Ok(url)
}

fn check(response: Response) -> Result<Response, Trouble> {
    let status = response.status();
    let url = shown(response.url());
    match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
        StatusCode::NOT_FOUND | StatusCode::GONE => Err(Trouble::Final(SourceError::NotFound { url })),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Trouble::Final(SourceError::Refused { url })),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(transient(&response, url)),
        status if status.is_server_error() => Err(transient(&response, url)),
        status => Err(Trouble::Final(SourceError::Status { url, status: status.as_u16() })),
    }
}

fn transient(response: &Response, url: String) -> Trouble {
    let status = response.status();
    let after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    Trouble::Transient { after, error: SourceError::Status { url, status: status.as_u16() } }
}

pub(crate) fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// The answer's ETag, if it vouches for equal bytes.
pub(crate) fn strong_etag(response: &Response) -> Option<String> {
    header(response, "etag").filter(|etag| etag.starts_with('"') && etag.len() <= 512)
}

pub(crate) fn content_range(response: &Response) -> Option<ContentRange> {
    let text = header(response, "content-range")?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (begin, _) = range.split_once('-')?;
    Some(ContentRange { begin: begin.parse().ok()?, total: total.parse().ok() })
}

pub(crate) fn host(url: &Url) -> String {
    url.host_str().map_or_else(
        || "the server".to_owned(),
        |host| match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        },
    )
}

pub(crate) fn shown(url: &Url) -> String {
    without_credentials(url.as_str())
}

/// The last cause says most ("connection refused"); reqwest's own text only repeats the address.
fn causes(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let text = if last.source().is_none() && std::error::Error::source(error).is_none() {
        // Without its address, which may be secret.
        "the request failed".to_owned()
    } else {
        last.to_string()
    };
    text.chars().take(300).collect()
}
