//! The HTTP client behind every store.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use object_store::{
    ClientOptions,
    client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService},
};
use parking_lot::Mutex;
use reqwest::{
    Client, StatusCode,
    header::{AUTHORIZATION, HeaderValue, RETRY_AFTER},
    redirect::Policy,
};

/// Hosts that hand out credentials inside of clouds.
const METADATA_HOSTS: [&str; 4] =
    ["169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata"];

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
    /// Host and value of `Authorization`.
    bearer: Option<Arc<(String, HeaderValue)>>,
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

// === impl Connector ===

impl Connector {
    pub(crate) fn new(client: Client, bearer: Option<(String, HeaderValue)>) -> Self {
        Self { inner: HttpClient::new(client), bearer: bearer.map(Arc::new) }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let noted = request.extensions().get::<Noted>().cloned();
        let host = request.uri().host().unwrap_or_default().to_owned();
        if let Some((of, value)) = self.bearer.as_deref()
            && *of == host
        {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let response = self.inner.execute(request).await.map_err(|error| {
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
