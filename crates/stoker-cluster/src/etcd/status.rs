//! What etcd's errors mean for whoever called.

use std::error::Error as StdError;

use tonic::{Code, Status};

use crate::{Error, Expect, LeaseId, Revision, limits};

/// What to make of an error.
#[derive(Debug)]
pub(super) enum Meaning {
    /// It would be the same anywhere.
    Final(Error),
    /// The login has to be done again; nothing happened.
    StaleToken,
    /// Nothing happened; another member may do better.
    NotDone,
    /// Something may have happened.
    Unknown,
}

/// Classifies an error by code and text. The texts are etcd's (`rpctypes/error.go`, unchanged from 3.4 to 3.6).
pub(super) fn meaning(status: &Status) -> Meaning {
    let text = status.message();
    let refused = || Meaning::Final(Error::Refused { reason: text.to_owned() });
    match status.code() {
        Code::Unauthenticated => Meaning::StaleToken,
        Code::PermissionDenied => refused(),
        Code::InvalidArgument if text.contains("revision of auth store is old") => Meaning::StaleToken,
        Code::InvalidArgument if text.contains("user name is empty") => Meaning::StaleToken,
        Code::InvalidArgument if text.contains("authentication failed") => refused(),
        Code::InvalidArgument if text.contains("too large") || text.contains("too many operations") => {
            let what = format!("the request ({text})");
            Meaning::Final(Error::TooLarge { what, size: None, limit: limits::TXN_BYTES_MAX })
        }
        // The message was longer than we take; the caller asks for less.
        Code::OutOfRange if text.contains("message length") => {
            let what = "the answer".to_owned();
            Meaning::Final(Error::TooLarge { what, size: None, limit: super::MESSAGE_MAX })
        }
        Code::OutOfRange if text.contains("compacted") => {
            Meaning::Final(Error::Compacted { wanted: Revision(0), oldest: Revision(0) })
        }
        Code::NotFound if text.contains("lease not found") => {
            Meaning::Final(Error::LeaseGone { lease: LeaseId(0) })
        }
        Code::FailedPrecondition if text.contains("lease already exists") => {
            let (key, expected) = (text.to_owned(), Expect::Absent);
            Meaning::Final(Error::Conflict { key, expected, found: None })
        }
        Code::ResourceExhausted if text.contains("database space exceeded") => {
            Meaning::Final(Error::Full { reason: text.to_owned() })
        }
        Code::ResourceExhausted if text.contains("too many requests") => Meaning::NotDone,
        Code::Unavailable if text == "etcdserver: no leader" => Meaning::NotDone,
        Code::Unimplemented => Meaning::Final(Error::Protocol { reason: format!("unimplemented: {text}") }),
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::NotFound
        | Code::FailedPrecondition
        | Code::AlreadyExists => Meaning::Final(Error::Invalid { reason: text.to_owned() }),
        _ => match tls_refusal(status) {
            Some(reason) => Meaning::Final(Error::Refused { reason }),
            None if never_sent(status) => Meaning::NotDone,
            None => Meaning::Unknown,
        },
    }
}

/// The error with its causes.
pub(super) fn text(error: &(dyn StdError + 'static)) -> String {
    let mut text = match error.downcast_ref::<Status>() {
        Some(status) if !status.message().is_empty() => status.message().to_owned(),
        Some(status) => status.code().to_string(),
        None => error.to_string(),
    };
    for cause in causes(error).skip(1) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// What the TLS handshake failed by, when no other try would go better. Read from the text: on the way through HTTP/2 the
/// error itself is lost. Our certificate's refusal comes as the server's alert, only after our side has finished.
pub(super) fn tls_refusal(error: &(dyn StdError + 'static)) -> Option<String> {
    causes(error).map(ToString::to_string).find(|text| {
        let alert = ["Certificate", "UnknownCA", "AccessDenied"].iter().any(|alert| text.contains(alert));
        text.contains("invalid peer certificate") || (text.contains("received fatal alert") && alert)
    })
}

/// Whether there was never a connection to send it over.
fn never_sent(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| cause.is::<tonic::ConnectError>())
}

fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source()).take(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_etcd() {
        let kind = |code, text: &str| match meaning(&Status::new(code, text)) {
            Meaning::Final(error) => {
                format!("{error:?}").split([' ', '{']).next().unwrap_or_default().to_owned()
            }
            other => format!("{other:?}"),
        };
        for (code, text, expected) in [
            (Code::Unauthenticated, "etcdserver: invalid auth token", "StaleToken"),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", "StaleToken"),
            (Code::InvalidArgument, "etcdserver: user name is empty", "StaleToken"),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                "Refused",
            ),
            (Code::PermissionDenied, "etcdserver: permission denied", "Refused"),
            (Code::InvalidArgument, "etcdserver: request is too large", "TooLarge"),
            (Code::InvalidArgument, "etcdserver: too many operations in txn request", "TooLarge"),
            (Code::InvalidArgument, "etcdserver: duplicate key given in txn request", "Invalid"),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", "Compacted"),
            (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision", "Invalid"),
            (Code::NotFound, "etcdserver: requested lease not found", "LeaseGone"),
            (Code::FailedPrecondition, "etcdserver: lease already exists", "Conflict"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", "Full"),
            (Code::ResourceExhausted, "etcdserver: too many requests", "NotDone"),
            (Code::Unavailable, "etcdserver: no leader", "NotDone"),
            (Code::Unavailable, "etcdserver: leader changed", "Unknown"),
            (Code::Unavailable, "etcdserver: request timed out", "Unknown"),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
                "Unknown",
            ),
            (Code::Unknown, "h2 protocol error", "Unknown"),
            (Code::Cancelled, "Timeout expired", "Unknown"),
            (Code::DeadlineExceeded, "context deadline exceeded", "Unknown"),
            (Code::Unimplemented, "", "Protocol"),
            (Code::Unavailable, "received fatal alert: BadCertificate", "Refused"),
            (Code::Unavailable, "invalid peer certificate: UnknownIssuer", "Refused"),
            (Code::Unavailable, "received fatal alert: InternalError", "Unknown"),
        ] {
            assert_eq!(kind(code, text), expected, "{code:?} {text}");
        }
    }
}
