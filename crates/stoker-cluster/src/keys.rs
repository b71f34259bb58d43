//! Where everything is. See `docs/cluster-state.md`.

use sha2::{Digest as _, Sha256};
use stoker_types::{InstanceId, ModelName, NodeId, hex};

/// What all keys begin with. The number is that of this layout.
pub const ROOT: &str = "/stoker/v1/";
/// Who leads: [`crate::records::LeaderRecord`], under the leader's lease.
pub const LEADER: &str = "/stoker/v1/leader";
/// Nodes that are there: [`crate::records::NodeRecord`], each under its lease.
pub const NODES: &str = "/stoker/v1/nodes/";
/// What is to be served: [`crate::records::ModelRecord`].
pub const MODELS: &str = "/stoker/v1/models/";
/// Who owns which instance: [`crate::records::InstanceRecord`].
pub const INSTANCES: &str = "/stoker/v1/instances/";
/// Migrations that have begun: [`crate::records::MigrationRecord`].
pub const MIGRATIONS: &str = "/stoker/v1/migrations/";
/// API keys by the hash of their secret: [`crate::records::ApiKeyRecord`].
pub const KEYS: &str = "/stoker/v1/keys/";
/// Join tokens by their hash: [`crate::records::JoinTokenRecord`].
pub const JOIN_TOKENS: &str = "/stoker/v1/join-tokens/";

/// A node's record.
#[must_use]
pub fn node(node: &NodeId) -> String {
    format!("{NODES}{node}")
}

/// A model's record.
#[must_use]
pub fn model(model: &ModelName) -> String {
    format!("{MODELS}{model}")
}

/// An instance's record.
#[must_use]
pub fn instance(instance: InstanceId) -> String {
    format!("{INSTANCES}{}", instance.0)
}

/// A migration's record, by the instance that it brings about.
#[must_use]
pub fn migration(destination: InstanceId) -> String {
    format!("{MIGRATIONS}{}", destination.0)
}

/// The record of an API key. The key itself isn't stored: whoever reads the store can't use it.
#[must_use]
pub fn api_key(secret: &str) -> String {
    format!("{KEYS}{}", hash(secret))
}

/// The record of a join token, likewise.
#[must_use]
pub fn join_token(token: &str) -> String {
    format!("{JOIN_TOKENS}{}", hash(token))
}

/// SHA-256 in hexadecimal. Secrets of ours have 256 random bits, which need no salt.
fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes()))
}
