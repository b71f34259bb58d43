//! The HTTP client behind every store: redirects that keep a token where it belongs, and remembers where they led.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use object_store::{
    ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService},
};
use parking_lot::Mutex;
use reqwest::{
    Client, Method, StatusCode,
    header::{AUTHORIZATION, HeaderValue, LOCATION, RETRY_AFTER},
    redirect::Policy,
};
use tokio::time::Instant;
use url::{Origin, Url};

/// Hosts that hand out credentials inside of clouds.
const METADATA_HOSTS: [&str; 4] =
    ["169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata"];

/// Redirects that are followed: a hub's address leads to its storage.
const REDIRECTS_MAX: usize = 10;

/// How long it is remembered where an address led: a thousand ranges of a file don't ask its hub a thousand times. What
/// storage signs holds longer as a rule; when it doesn't, the hub is asked again.
const LED_FOR: Duration = Duration::from_mins(5);

/// Addresses remembered: more than a model has files.
const LED_MAX: usize = 4096;

/// TLS can't be set up.
#[derive(Debug, thiserror::Error)]
#[error("setting up {what} failed: {detail}")]
pub struct TlsError {
    what: &'static str,
    detail: String,
}

/// No credentials were given, and the cloud's own service that hands them out isn't there.
#[derive(Debug, thiserror::Error)]
#[error("no credentials: none were given, and {host} hands out none ({detail})")]
pub(crate) struct NoCredentials {
    host: String,
    detail: String,
}

/// A redirect that isn't followed.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub(crate) struct BadRedirect {
    problem: String,
}

/// What an answer said, for whoever only gets an error of it. Travels with a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Noted(Arc<Mutex<Answered>>);

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Answered {
    pub(crate) status: Option<StatusCode>,
    /// How long the server asked to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

/// Makes clients of the same settings, one for all stores.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    inner: HttpClient,
    bearer: Option<Arc<Bearer>>,
    led: Arc<Mutex<Led>>,
}

/// What is sent to one origin alone.
#[derive(Debug)]
pub(crate) struct Bearer {
    pub(crate) origin: Origin,
    /// Value of `Authorization`.
    pub(crate) value: HeaderValue,
}

/// Where addresses led, and until when that is believed.
#[derive(Debug, Default)]
struct Led(HashMap<Url, (Url, Instant)>);

/// Whether a token that was sent to one address may be sent to where that one redirects: the same origin, or the same path
/// of a protected one, as a hub's short name redirects to its full one. A hub's storage gets none.
#[must_use]
pub fn token_may_follow(from: &Url, to: &Url) -> bool {
    let same_page = to.scheme() == "https" && to.path() == from.path() && to.query() == from.query();
    to.origin() == from.origin() || same_page
}

/// Where an answer redirects to by its `Location`; `None`: to nowhere, or from a protected connection to an open one.
#[must_use]
pub fn redirect_target(from: &Url, location: &HeaderValue) -> Option<Url> {
    let to = from.join(location.to_str().ok()?).ok()?;
    (to.scheme() == "https" || (to.scheme() == "http" && from.scheme() == "http")).then_some(to)
}

/// An HTTP client: TLS by rustls with the system's certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured),
/// proxies from the environment.
///
/// # Errors
/// [`TlsError`].
pub fn http_client(connect_timeout: Duration, redirects: Policy) -> Result<Client, TlsError> {
    let failed = |what| move |detail: String| TlsError { what, detail };
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::debug!(%error, "a certificate store can't be read");
    }
    roots.add_parsable_certificates(native.certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| failed("TLS")(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("stoker/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(connect_timeout)
        .redirect(redirects)
        .build()
        .map_err(|e| failed("the HTTP client")(e.to_string()))
}

// === impl TlsError ===

impl TlsError {
    pub(crate) fn threads(error: &std::io::Error) -> Self {
        Self { what: "threads for remote stores", detail: error.to_string() }
    }
}

// === impl Noted ===

impl Noted {
    pub(crate) fn answered(&self) -> Answered {
        *self.0.lock()
    }
}

// === impl Led ===

impl Led {
    fn by(&self, url: &Url) -> Option<Url> {
        let (to, until) = self.0.get(url)?;
        (*until > Instant::now()).then(|| to.clone())
    }

    fn remember(&mut self, from: Url, to: Url) {
        let now = Instant::now();
        if self.0.len() >= LED_MAX {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() < LED_MAX {
            self.0.insert(from, (to, now + LED_FOR));
        }
    }
}

// === impl Connector ===

impl Connector {
    /// `client` must not follow redirects.
    pub(crate) fn new(client: Client, bearer: Option<Bearer>) -> Self {
        Self { inner: HttpClient::new(client), bearer: bearer.map(Arc::new), led: Arc::default() }
    }

    /// Sends a request, and follows where it is redirected.
    async fn follow(&self, mut request: HttpRequest, asked: &Url) -> Result<HttpResponse, HttpError> {
        let reads = request.method() == Method::GET || request.method() == Method::HEAD;
        let led = self.led.lock().by(asked).filter(|_| reads);
        if let Some(to) = led {
            let response = self.inner.execute(unsigned(&request, asked, &to)?).await?;
            let status = response.status();
            let is_answer = status.is_success()
                || status.is_server_error()
                || matches!(status, StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE);
            if is_answer || status == StatusCode::TOO_MANY_REQUESTS {
                return Ok(response);
            }
            // What was signed for a time may have run out.
            self.led.lock().0.remove(asked);
        }
        if let Some(bearer) = self.bearer.as_deref().filter(|bearer| bearer.origin == asked.origin()) {
            request.headers_mut().insert(AUTHORIZATION, bearer.value.clone());
        }
        let mut response = self.inner.execute(request.clone()).await?;
        let (mut at, mut with_token) = (asked.clone(), true);
        for _ in 0..REDIRECTS_MAX {
            let location = response.headers().get(LOCATION).filter(|_| response.status().is_redirection());
            let Some(location) = location.filter(|_| reads) else {
                if at != *asked && response.status().is_success() {
                    self.led.lock().remember(asked.clone(), at);
                }
                return Ok(response);
            };
            let to = redirect_target(&at, location)
                .ok_or_else(|| bad(asked, "a redirect to nowhere, or to an open connection"))?;
            with_token = with_token && token_may_follow(&at, &to);
            let mut next = unsigned(&request, asked, &to)?;
            if let Some(token) = request.headers().get(AUTHORIZATION).filter(|_| with_token) {
                next.headers_mut().insert(AUTHORIZATION, token.clone());
            }
            response = self.inner.execute(next).await?;
            at = to;
        }
        Err(bad(asked, "it is redirected again and again"))
    }
}

/// A request as it may be sent to another address.
fn unsigned(request: &HttpRequest, asked: &Url, to: &Url) -> Result<HttpRequest, HttpError> {
    let mut next = request.clone();
    next.headers_mut().remove(AUTHORIZATION);
    *next.uri_mut() = to.as_str().parse().map_err(|_| bad(asked, "a redirect to nowhere"))?;
    Ok(next)
}

fn bad(url: &Url, problem: &str) -> HttpError {
    let problem = format!("{problem} ({})", crate::without_credentials(url.as_str()));
    HttpError::new(HttpErrorKind::Unknown, BadRedirect { problem })
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let noted = request.extensions().get::<Noted>().cloned();
        let url = Url::parse(&request.uri().to_string())
            .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let response = self.follow(request, &url).await.map_err(|error| {
            if METADATA_HOSTS.contains(&host.as_str()) {
                let detail = last_cause(&error);
                HttpError::new(HttpErrorKind::Unknown, NoCredentials { host, detail })
            } else {
                error
            }
        })?;
        if let Some(Noted(answered)) = noted {
            // Seconds; the other form, a date, is written by nobody that matters here.
            let seconds = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
            let retry_after = seconds.map(Duration::from_secs);
            *answered.lock() = Answered { status: Some(response.status()), retry_after };
        }
        Ok(response)
    }
}

/// The innermost cause says most ("connection refused").
pub(crate) fn last_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_tokens_and_redirects_may_go() {
        let url = |text: &str| Url::parse(text).unwrap();
        for (from, to, may) in [
            ("https://a.org/o/n", "https://a.org/x", true),
            ("https://a.org/o/n", "https://long-a.org/o/n", true),
            ("https://a.org/o/n", "https://cdn.org/blob?sig=1", false),
            ("https://a.org/o/n", "https://a.org:444/x", false),
            ("https://a.org/o/n", "http://a.org/o/n", false),
            ("http://a.org/o/n", "http://b.org/o/n", false),
            ("http://a.org/o/n", "http://a.org:81/o/n", false),
        ] {
            assert_eq!(token_may_follow(&url(from), &url(to)), may, "{from} {to}");
        }
        let target = |from: &str, to: &'static str| {
            redirect_target(&url(from), &HeaderValue::from_static(to)).map(String::from)
        };
        assert_eq!(target("https://a.org/o/n", "/x").as_deref(), Some("https://a.org/x"));
        assert_eq!(target("https://a.org/o/n", "http://a.org/x"), None, "never to an open connection");
        assert_eq!(target("http://a.org/o/n", "file:///etc/passwd"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn where_an_address_led_is_forgotten_and_bounded() {
        let url = |i: usize| Url::parse(&format!("http://a.org/{i}")).unwrap();
        let mut led = Led::default();
        for i in 0..LED_MAX + 10 {
            led.remember(url(i), url(0));
        }
        assert_eq!(led.0.len(), LED_MAX);
        assert_eq!(led.by(&url(1)), Some(url(0)));
        tokio::time::advance(LED_FOR + Duration::from_secs(1)).await;
        assert_eq!(led.by(&url(1)), None);
        led.remember(url(LED_MAX + 5), url(0));
        assert_eq!(led.0.len(), 1);
    }
}
