//! What can go wrong with remote stores, and what to do about it.

use std::time::Duration;

use object_store::client::{HttpError, HttpErrorKind};
use stoker_io::ReadError;
use stoker_types::ByteSize;

use crate::client::{Answered, BadRedirect, NoCredentials, last_cause};

/// Longest part of a server's answer that is shown.
const WORDS_MAX: usize = 200;

/// Why a remote store didn't give what was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The address can't be used.
    #[error("`{url}` can't be used: {problem}")]
    BadAddress {
        /// The address, without credentials.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is nothing.
    #[error("{url}: not found")]
    NotFound {
        /// The address.
        url: String,
    },
    /// There is another version of the object.
    #[error("{url} has changed since it was indexed: {detail}")]
    Changed {
        /// The address.
        url: String,
        /// What is not as it was.
        detail: String,
    },
    /// There are no credentials, or the store refuses them.
    #[error("{url}: access refused ({detail}); {}", advice(url))]
    Refused {
        /// The address.
        url: String,
        /// The store's words.
        detail: String,
    },
    /// The store didn't answer well in as many tries as there were.
    #[error("{url}: given up after {tries} tries in {} s: {last}", elapsed.as_secs())]
    Unavailable {
        /// The address.
        url: String,
        /// Requests made.
        tries: u32,
        /// Since the first of them.
        elapsed: Duration,
        /// What happened last.
        last: String,
    },
    /// The answer is longer than what is read into memory.
    #[error("{url} has {len}, more than the {max} that such a file may have")]
    TooLarge {
        /// The address.
        url: String,
        /// How much there is.
        len: ByteSize,
        /// How much may be.
        max: ByteSize,
    },
    /// There are no parts to be had: only all of it in one answer.
    #[error(
        "{url}: the server gives files only as a whole, and a model is read in parts; `stoker pull` takes it whole"
    )]
    NoRanges {
        /// The address.
        url: String,
    },
    /// Parts of one version can't be told from parts of another.
    #[error(
        "{url}: the server names neither an ETag nor a time of the last change, so that parts of different versions could \
         be mixed; `stoker pull` takes it whole"
    )]
    NoVersion {
        /// The address.
        url: String,
    },
    /// The store answers in a way that can't be worked with.
    #[error("{url}: {detail}")]
    Unusable {
        /// The address.
        url: String,
        /// Why.
        detail: String,
    },
    /// The program is ending.
    #[error("{url}: the read was cut short because the program is ending")]
    Closed {
        /// The address.
        url: String,
    },
}

/// What came of one request.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// No other request would do better.
    Final(RemoteError),
    /// Another may.
    Transient {
        /// What happened.
        why: String,
        /// Not before so long, by the server's word.
        after: Option<Duration>,
        /// The server asks for fewer requests.
        throttled: bool,
    },
    /// No connection. Another try may get one.
    Unreachable {
        /// Why.
        why: String,
    },
}

// === impl RemoteError ===

impl RemoteError {
    /// Whether the object can only be fetched as a whole, in one answer.
    #[must_use]
    pub const fn is_whole_only(&self) -> bool {
        matches!(self, Self::NoRanges { .. } | Self::NoVersion { .. })
    }

    /// As a reader's error; `at` is where in the object it read.
    pub(crate) fn into_read(self, at: u64) -> ReadError {
        let detail = self.to_string();
        match self {
            Self::Changed { url, detail } => ReadError::Changed { url, detail },
            Self::NotFound { url } => ReadError::Changed { url, detail: "it is gone".into() },
            Self::Refused { url, .. } => ReadError::Refused { url, detail },
            _ => ReadError::Remote { at, detail },
        }
    }
}

fn advice(url: &str) -> &'static str {
    match url.split_once("://").map(|(scheme, _)| scheme) {
        Some("s3" | "s3a") => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and check that they may read it; for a \
             public bucket set AWS_SKIP_SIGNATURE=true"
        }
        Some("gs") => "set GOOGLE_APPLICATION_CREDENTIALS, and check that the account may read it",
        Some("az" | "azure" | "adl" | "abfs" | "abfss") => {
            "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, and check that they may read it"
        }
        Some("file") => "check the file's permissions",
        _ => "check who may read it; for a gated model of the hub accept its terms and set HF_TOKEN",
    }
}

// === impl Trouble ===

impl Trouble {
    /// Sorts a store's error; `answered` is what is known of the answer.
    pub(crate) fn of(url: &str, error: &object_store::Error, answered: Answered) -> Self {
        use object_store::Error;

        let url = || url.to_owned();
        if find::<NoCredentials>(error).is_some() {
            return Self::Final(RemoteError::Refused { url: url(), detail: last_cause(error) });
        }
        if find::<BadRedirect>(error).is_some() {
            return Self::Final(RemoteError::Unusable { url: url(), detail: last_cause(error) });
        }
        if find::<reqwest::Error>(error).is_some_and(reqwest::Error::is_connect) {
            return Self::Unreachable { why: last_cause(error) };
        }
        match error {
            Error::NotFound { .. } => Self::Final(RemoteError::NotFound { url: url() }),
            Error::Precondition { .. } => {
                Self::Final(RemoteError::Changed { url: url(), detail: "its ETag is another".into() })
            }
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                Self::Final(RemoteError::Refused { url: url(), detail: words(error) })
            }
            Error::Generic { .. } => Self::of_generic(url(), error, answered),
            Error::NotSupported { .. } => Self::Final(RemoteError::NoRanges { url: url() }),
            _ => Self::Final(RemoteError::Unusable { url: url(), detail: last_cause(error) }),
        }
    }

    fn of_generic(url: String, error: &object_store::Error, answered: Answered) -> Self {
        let Answered { status, retry_after } = answered;
        let transient = |throttled| Self::Transient { why: words(error), after: retry_after, throttled };
        let unusable = |detail| Self::Final(RemoteError::Unusable { url: url.clone(), detail });
        if find::<HttpError>(error).is_some_and(|http| http.kind() == HttpErrorKind::Decode) {
            return unusable(last_cause(error));
        }
        match status.map(|status| status.as_u16()).or_else(|| status_in(error)) {
            Some(401 | 403) => Self::Final(RemoteError::Refused { url, detail: words(error) }),
            // Beyond the end of an object that was longer when it was indexed.
            Some(416) => Self::Final(RemoteError::Changed { url, detail: "it is shorter".into() }),
            Some(429 | 503) => transient(true),
            // The whole object instead of a range of it.
            Some(200) if find::<HttpError>(error).is_none() => Self::Final(RemoteError::NoRanges { url }),
            Some(300..=407 | 409..=499) => unusable(words(error)),
            // No answer, a broken one, or 408 and 5xx.
            _ => transient(false),
        }
    }
}

/// The status that an error speaks of: listings come without anything else.
fn status_in(error: &object_store::Error) -> Option<u16> {
    let text = last_cause(error);
    text.split_once("status code: ")?.1.get(..3)?.parse().ok()
}

/// The first cause of a type.
fn find<'a, E: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// What a server answered: the beginning of its words, of S3's XML the message.
fn words(error: &object_store::Error) -> String {
    let text = last_cause(error);
    let message =
        text.split_once("<Message>").map(|(_, rest)| rest.split("</Message>").next().unwrap_or(rest));
    let text = message.unwrap_or(&text);
    text.chars().filter(|c| !c.is_control()).take(WORDS_MAX).collect()
}
