//! Objects of remote stores: S3 and what speaks its protocol, Google Cloud Storage, Azure, plain HTTP, and `file://` for
//! tests.
//!
//! - [`RemoteStores`]: the way to all of them. Opens readers ([`stoker_io::OpenRemote`]), lists, fetches small objects.
//! - Every read is pinned to one version of its object: another one is [`RemoteError::Changed`], never a mixture.
//! - A read is one ranged request, begun again where it broke off, within a budget ([`Patience`]).
//! - Everything runs on a runtime of its own, so that transfers take no time from whoever answers requests.

mod client;
mod error;
mod limit;
mod measure;
mod patience;
mod reader;
mod stores;

pub use client::{TlsError, http_client, redirect_target, token_may_follow};
pub use error::RemoteError;
pub use measure::RawFetch;
pub use patience::Patience;
pub use stores::{BearerToken, RemoteOptions, RemoteStores, is_remote, without_credentials};
