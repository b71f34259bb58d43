//! What the gateway is told by its operator, and the limits on what clients may send.

use std::{sync::Arc, time::Duration};

use sha2::{Digest, Sha256};

/// Most messages in a chat request.
pub const MESSAGES_MAX: usize = 4096;
/// Most choices for a prompt (`n`).
pub const CHOICES_MAX: u32 = 16;
/// Most sequences of one request: prompts times `n`.
pub const SEQUENCES_MAX: u32 = 64;
/// Most stop strings.
pub const STOPS_MAX: usize = 16;
/// Longest stop string, bytes.
pub const STOP_BYTES_MAX: usize = 1024;
/// Bytes of all stop strings together. Every byte of an answer is compared with each of them, and each sequence of a
/// request has a table of their length.
pub const STOPS_BYTES_MAX: usize = 4096;
/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most alternatives with a token's log probability.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Longest text that a chat template may make of a request, bytes.
pub const RENDERED_BYTES_MAX: usize = 32 << 20;
/// Most fields in a JSON object of a request.
pub const FIELDS_MAX: usize = 256;

/// Settings of a gateway. [`Default`] is what a user can live with on one machine.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Who may use the API. Empty: everybody who reaches the listener, which then must be a loopback address (the
    /// binary's rule) and answers only to the `Host` and `Origin` names of this machine.
    pub keys: Vec<ApiKey>,
    /// Further names that a `Host` or `Origin` header may have when there are no keys.
    pub allowed_hosts: Vec<String>,
    /// Most client connections; more wait in the listener's backlog.
    pub connections_max: usize,
    /// Largest request body, bytes.
    pub body_bytes_max: usize,
    /// Bytes of all request bodies that are being received at the same time.
    pub bodies_bytes_max: usize,
    /// A request's head must be there after so long; an idle connection is closed after it too.
    pub head_timeout: Duration,
    /// A request's body must be there after so long.
    pub body_timeout: Duration,
    /// A client that takes no byte for so long is disconnected.
    pub write_timeout: Duration,
    /// Longest wait for a seat; a request's `x-stoker-deadline-ms` lowers it.
    pub wait_max: Duration,
    /// A streamed request that still waits gets its response head after so long...
    pub stream_head_after: Duration,
    /// ...and a comment line whenever nothing was sent for so long.
    pub comment_every: Duration,
    /// How long running requests may go on after the first shutdown signal.
    pub grace: Duration,
    /// Most models whose tokenizer and template are kept in memory.
    pub text_assets_max: usize,
    /// Most threads that render and tokenise prompts at the same time.
    pub text_threads_max: usize,
    /// Most generated tokens of one sequence that wait for a slow client before the sequence is aborted.
    pub stream_tokens_max: usize,
    /// `max_tokens` of a request that has none and does not stream.
    pub unstreamed_tokens_max: u32,
}

/// A key, known by its hash alone.
#[derive(Clone)]
pub struct ApiKey {
    /// Whom it stands for, in limits and logs.
    pub name: Arc<str>,
    sha256: [u8; 32],
}

// === impl GatewayConfig ===

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            allowed_hosts: Vec::new(),
            connections_max: 4096,
            body_bytes_max: 16 << 20,
            bodies_bytes_max: 256 << 20,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_mins(1),
            write_timeout: Duration::from_mins(1),
            wait_max: Duration::from_mins(2),
            stream_head_after: Duration::from_secs(5),
            comment_every: Duration::from_secs(10),
            grace: Duration::from_secs(30),
            text_assets_max: 32,
            text_threads_max: std::thread::available_parallelism().map_or(2, usize::from),
            stream_tokens_max: 4096,
            unstreamed_tokens_max: 8192,
        }
    }
}

// === impl ApiKey ===

impl ApiKey {
    /// A key given in plain text, which is forgotten at once.
    #[must_use]
    pub fn from_plain(name: &str, key: &str) -> Self {
        Self { name: name.into(), sha256: Sha256::digest(key.as_bytes()).into() }
    }

    /// A key given as its SHA-256.
    #[must_use]
    pub fn from_sha256(name: &str, sha256: [u8; 32]) -> Self {
        Self { name: name.into(), sha256 }
    }

    /// Whose key `given` is. Every key is compared whole, so the time tells nothing about any.
    #[must_use]
    pub fn find<'a>(keys: &'a [Self], given: &str) -> Option<&'a Self> {
        let digest: [u8; 32] = Sha256::digest(given.as_bytes()).into();
        let mut found = None;
        for key in keys {
            let difference = key.sha256.iter().zip(&digest).fold(0, |sum, (a, b)| sum | (a ^ b));
            if std::hint::black_box(difference) == 0 {
                found = Some(key);
            }
        }
        found
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_their_text_and_not_shown() {
        let keys = [ApiKey::from_plain("ann", "secret-a"), ApiKey::from_plain("bob", "secret-b")];
        assert_eq!(&*ApiKey::find(&keys, "secret-b").unwrap().name, "bob");
        assert!(ApiKey::find(&keys, "secret-").is_none());
        assert!(ApiKey::find(&keys, "").is_none());
        assert!(!format!("{keys:?}").contains("secret"));
        let digest = keys[0].sha256;
        assert!(ApiKey::find(&[ApiKey::from_sha256("hash", digest)], "secret-a").is_some());
    }
}
