//! Objects of remote stores.

use serde::{Deserialize, Serialize};

/// One version of an object in a remote store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteObject {
    /// Its address: `s3://bucket/key`, `gs://`, `az://`, `http(s)://` or `file://`. Without credentials.
    pub url: String,
    /// Its length, bytes.
    pub len: u64,
    /// The store's name for this version of it, as the store writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// When it was last written, milliseconds since the Unix epoch: tells versions apart where a store has no ETags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_ms: Option<i64>,
}
