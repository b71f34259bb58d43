//! The models directory: what is known, aliases, pulling from the hub or a package, removal.
//!
//! A model is a directory `models_dir/<escaped name>/` with a `stoker.json` and, if it was pulled, its files. A model
//! that is only referenced has a `stoker.json` with absolute paths and nothing else. Everything under way is in
//! `models_dir/.partial/` and becomes a model by one rename.
//!
//! A model that is only remote is a record ([`Registry::record`]): headers and small files, in a registry of its own.

mod alias;
mod download;
mod error;
mod http;
mod hub;
mod lock;
mod name;
mod package;
mod pull;
mod record;
mod registry;
mod source;
mod stage;
mod verify;
mod zip;

pub use alias::{Aliases, BadAliases, PinnedSource};
pub use error::{Attempt, RegistryError, SourceError};
pub use http::{Remote, RemoteConfig, http_client};
pub use pull::{PullEvent, PullLock, PullProgress, Pulled};
pub use registry::{Entry, Listed, Listing, Registry, Removed, Written};
pub use source::{BadSource, SourceUri};
pub use verify::{BadChunk, FileOutcome, FileReport, VerifyProgress, VerifyReport};
