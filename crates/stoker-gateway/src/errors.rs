//! Every failure that a client can see, and the one place where failures become HTTP.
//!
//! The body is OpenAI's: `{"error":{"message","type","param","code"}}`. A refusal that may pass carries `Retry-After`
//! (whole seconds, at most 60: official clients ignore more) and the true estimate in `x-stoker-eta-ms`; one that
//! will not pass by itself carries `x-should-retry: false`, which official clients obey.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use serde_json::json;
use stoker_types::{Refusal, StartFailure};

use crate::{backend::StreamFailure, seams::ModelLookupError, text::TextError};

/// Header: milliseconds until it may be worth trying again, as estimated.
pub const ETA_MS: &str = "x-stoker-eta-ms";

const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// After files changed: the next request finds the new ones, so the least that the header can say.
const CHANGED_RETRY_AFTER: Duration = Duration::from_secs(1);

/// An error on its way to the client.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status, when the response has not begun.
    pub status: StatusCode,
    /// What happened, with the numbers, and the next step.
    pub message: String,
    /// The field of the request that is to blame.
    pub param: Option<String>,
    /// For programs.
    pub code: &'static str,
    /// When it may be worth trying again.
    pub retry_after: Option<Duration>,
    /// Trying again without changing anything is of no use, although the status says "server".
    pub permanent: bool,
}

// === impl ApiError ===

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after: None, permanent: false }
    }

    /// A field has a wrong type or value.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.param = Some(param.into());
        error
    }

    /// A field that would change the answer and isn't implemented.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(param, message);
        error.code = "unsupported_parameter";
        error
    }

    /// A field that nobody knows.
    pub(crate) fn unknown_field(param: impl Into<String>) -> Self {
        let param = param.into();
        let mut error = Self::invalid(
            &*param,
            format!("unknown field `{param}`: it might change the answer, so it isn't ignored"),
        );
        error.code = "unknown_parameter";
        error
    }

    /// The request as a whole is malformed.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// Prompt and answer don't fit the context.
    pub(crate) fn context_exceeded(
        prompt: usize,
        tokens_max: Option<u32>,
        context: u32,
        param: &str,
    ) -> Self {
        let context_text = thousands(context.into());
        let message = match tokens_max {
            Some(tokens_max) => format!(
                "prompt {} + max_tokens {} > context {context_text}",
                thousands(prompt as u64),
                thousands(tokens_max.into())
            ),
            None => format!(
                "prompt {} leaves no room for an answer in the context of {context_text}",
                thousands(prompt as u64)
            ),
        };
        let mut error = Self::invalid(param, message);
        error.code = "context_length_exceeded";
        error
    }

    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub(crate) fn foreign(what: &str, value: &str) -> Self {
        let shown: String = value.chars().take(80).flat_map(char::escape_default).collect();
        Self::new(
            StatusCode::FORBIDDEN,
            "foreign_host",
            format!(
                "`{what}: {shown}` is not a name of this server; without API keys only loopback names and the \
                 configured `allowed_hosts` are answered"
            ),
        )
    }

    pub(crate) fn not_found(path: &str) -> Self {
        let shown: String = path.chars().take(80).flat_map(char::escape_default).collect();
        Self::new(StatusCode::NOT_FOUND, "unknown_path", format!("there is nothing at `{shown}`"))
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path takes another method")
    }

    pub(crate) fn body_too_large(max: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the request body is larger than {} MiB", max >> 20),
        )
    }

    pub(crate) fn body_too_slow(timeout: Duration) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_too_slow",
            format!("the request body was not there after {} s", timeout.as_secs()),
        )
    }

    pub(crate) fn shutting_down() -> Self {
        let mut error =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down");
        error.retry_after = Some(Duration::from_secs(5));
        error
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The JSON body; `request` is added to a stream's last event, whose headers are long gone.
    pub(crate) fn body(&self, request: Option<&str>) -> String {
        let mut error = json!({
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        });
        if let Some(request) = request {
            error["request_id"] = request.into();
        }
        json!({ "error": error }).to_string()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body(None)));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(eta) = self.retry_after {
            let seconds = eta.min(RETRY_AFTER_MAX).as_millis().div_ceil(1000).max(1);
            headers.insert(header::RETRY_AFTER, number(seconds));
            headers.insert(ETA_MS, number(eta.as_millis()));
        }
        if self.permanent {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // What a client sees of it is in the log too, without what the client sent.
        response.extensions_mut().insert(ErrorCode(self.code));
        response
    }
}

/// The code of an error response, for the access log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

// === failures to HTTP ===

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::QueueFull { retry_after, .. } => {
                let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message);
                error.retry_after = Some(retry_after);
                error
            }
            Refusal::NotInTime { eta, .. } => {
                let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_in_time", message);
                error.retry_after = Some(eta);
                error
            }
            Refusal::TooLarge { .. } => {
                let mut error = Self::new(StatusCode::INSUFFICIENT_STORAGE, "model_too_large", message);
                error.permanent = true;
                error
            }
            Refusal::ShuttingDown => Self::shutting_down(),
            Refusal::Start(failure) => failure.into(),
        }
    }
}

impl From<StartFailure> for ApiError {
    fn from(failure: StartFailure) -> Self {
        let (status, code) = match &failure {
            StartFailure::UnknownModel { .. } => (StatusCode::NOT_FOUND, "model_not_found"),
            StartFailure::NotRunnable { .. } => (StatusCode::BAD_REQUEST, "model_not_runnable"),
            StartFailure::OutOfMemory { .. } => (StatusCode::INSUFFICIENT_STORAGE, "out_of_memory"),
            StartFailure::Corrupt { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "checkpoint_corrupt"),
            StartFailure::Changed { .. } => (StatusCode::SERVICE_UNAVAILABLE, "model_changed"),
            StartFailure::Read { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "read_failed"),
            StartFailure::Worker { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "worker_failed"),
            StartFailure::Cancelled { .. } => (StatusCode::SERVICE_UNAVAILABLE, "start_cancelled"),
            StartFailure::StaleOrder { .. } => (StatusCode::SERVICE_UNAVAILABLE, "stale_order"),
        };
        let mut error = Self::new(status, code, failure.to_string());
        if matches!(failure, StartFailure::UnknownModel { .. } | StartFailure::NotRunnable { .. }) {
            error.param = Some("model".into());
        }
        error.permanent = matches!(failure, StartFailure::Corrupt { .. });
        if matches!(failure, StartFailure::Changed { .. }) {
            error.retry_after = Some(CHANGED_RETRY_AFTER);
        }
        error
    }
}

impl From<ModelLookupError> for ApiError {
    fn from(failure: ModelLookupError) -> Self {
        let (status, code) = match failure {
            ModelLookupError::Unknown { .. } => (StatusCode::NOT_FOUND, "model_not_found"),
            ModelLookupError::NotRunnable { .. } => (StatusCode::BAD_REQUEST, "model_not_runnable"),
        };
        let mut error = Self::new(status, code, failure.to_string());
        error.param = Some("model".into());
        error
    }
}

impl From<StreamFailure> for ApiError {
    fn from(failure: StreamFailure) -> Self {
        let message = failure.to_string();
        let (status, code) = match &failure {
            StreamFailure::WorkerGone { .. } => (StatusCode::BAD_GATEWAY, "worker_gone"),
            StreamFailure::WrongGeneration | StreamFailure::Unloaded { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "instance_gone")
            }
            StreamFailure::OutOfMemory { .. } => (StatusCode::INSUFFICIENT_STORAGE, "out_of_memory"),
            StreamFailure::SlowReader { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "slow_reader"),
            StreamFailure::Engine { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "engine_failed"),
            StreamFailure::Protocol { .. } => (StatusCode::BAD_GATEWAY, "worker_protocol"),
        };
        Self::new(status, code, message)
    }
}

impl From<TextError> for ApiError {
    fn from(failure: TextError) -> Self {
        let message = failure.to_string();
        match failure {
            TextError::Open { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "tokenizer_failed", message)
            }
            TextError::Prompt { param, .. } => Self::invalid(param, message),
        }
    }
}

/// A header value from a number.
pub(crate) fn number(n: impl std::fmt::Display) -> HeaderValue {
    HeaderValue::from_str(&n.to_string()).unwrap_or(HeaderValue::from_static("0"))
}

/// `9132` as `9,132`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use stoker_types::{ByteSize, FileChange, Generation, ModelName};

    use super::*;

    fn status_and_retry(refusal: Refusal) -> (u16, Option<String>, Option<String>) {
        let response = ApiError::from(refusal).into_response();
        let header =
            |name| response.headers().get(name).map(|v: &HeaderValue| v.to_str().unwrap().to_owned());
        (response.status().as_u16(), header("retry-after"), header(ETA_MS))
    }

    #[test]
    fn refusals_become_http() {
        let model = || ModelName::new("m").unwrap();
        let start = |failure: StartFailure| Refusal::Start(failure);
        let table: Vec<(Refusal, u16, Option<&str>, Option<&str>)> = vec![
            (
                Refusal::QueueFull {
                    waiting: 128,
                    scope: "for this model".into(),
                    oldest: Duration::from_secs(3),
                    retry_after: Duration::from_millis(1500),
                },
                429,
                Some("2"),
                Some("1500"),
            ),
            (
                Refusal::NotInTime {
                    wait_max: Duration::from_secs(10),
                    terms: "SSD".into(),
                    eta: Duration::from_secs(90),
                },
                503,
                Some("60"),
                Some("90000"),
            ),
            (
                Refusal::TooLarge {
                    model: model(),
                    needed: ByteSize::gib(9),
                    budget: ByteSize::gib(3),
                    detail: String::new(),
                },
                507,
                None,
                None,
            ),
            (Refusal::ShuttingDown, 503, Some("5"), Some("5000")),
            (start(StartFailure::UnknownModel { model: model() }), 404, None, None),
            (start(StartFailure::NotRunnable { model: model(), why: "x".into() }), 400, None, None),
            (
                start(StartFailure::OutOfMemory {
                    model: model(),
                    needed: ByteSize(2),
                    free: ByteSize(1),
                    detail: String::new(),
                }),
                507,
                None,
                None,
            ),
            (start(StartFailure::Corrupt { model: model(), detail: "chunk 3".into() }), 500, None, None),
            (
                start(StartFailure::Changed {
                    model: model(),
                    file: "m.gguf".into(),
                    change: FileChange::Length { was: 1, is: 2 },
                }),
                503,
                Some("1"),
                Some("1000"),
            ),
            (start(StartFailure::Read { model: model(), detail: "eio".into() }), 500, None, None),
            (start(StartFailure::Worker { model: model(), detail: "signal 9".into() }), 500, None, None),
            (start(StartFailure::Cancelled { model: model() }), 503, None, None),
            (start(StartFailure::StaleOrder { given: Generation(1), seen: Generation(2) }), 503, None, None),
        ];
        for (refusal, status, retry_after, eta) in table {
            let name = format!("{refusal:?}");
            let (s, r, e) = status_and_retry(refusal);
            assert_eq!((s, r.as_deref(), e.as_deref()), (status, retry_after, eta), "{name}");
        }
    }

    #[test]
    fn an_error_is_openai_shaped() {
        let error = ApiError::context_exceeded(9132, Some(512), 8192, "messages");
        assert_eq!(
            error.body(None),
            r#"{"error":{"message":"prompt 9,132 + max_tokens 512 > context 8,192","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#
        );
        assert!(ApiError::internal("x").body(Some("r1")).ends_with(r#""request_id":"r1"}}"#));
    }
}
