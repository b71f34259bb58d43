//! Indexing models where they are: what is fetched, what is pinned, what can't be read in parts.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; the helpers are no test functions")]

mod common;

use std::fs;

use common::{Served, Server, files_below, gguf, name, sha256};
use stoker_checkpoint::Trust;
use stoker_registry::{Entry, PinnedSource, Registry, RegistryError, SourceError};
use stoker_remote::{RemoteOptions, RemoteStores};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Bed {
    registry: Registry,
    server: Server,
    stores: RemoteStores,
    _dir: tempfile::TempDir,
}

impl Bed {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().join("records")).unwrap();
        let stores = RemoteStores::new(RemoteOptions::default()).unwrap();
        Self { registry, server: Server::start().await, stores, _dir: dir }
    }

    async fn record(&self, uri: &str, sha256: Option<String>) -> Result<Entry, RegistryError> {
        let source = PinnedSource { uri: uri.parse().unwrap(), sha256 };
        self.registry.record(&name("m"), &source, &self.stores, &self.server.remote()).await
    }

    /// Lists one file, with a length and a hash.
    async fn list(&self, len: usize, hash: &str) {
        let siblings = [serde_json::json!({"rfilename": "m.gguf", "size": len, "lfs": {"sha256": hash}})];
        let listing = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        self.server.put("/api/models/o/n/revision/main", listing).await;
    }
}

fn why(error: RegistryError) -> SourceError {
    match error {
        RegistryError::Remote { error, .. } => *error,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_header_comes_and_the_version_is_pinned() {
    let bed = Bed::new().await;
    let file = gguf(5_000_000);
    let path = format!("/o/n/resolve/{COMMIT}/m.gguf");
    bed.server.put(&path, file.clone()).await;
    bed.list(file.len(), &sha256(&file)).await;
    let entry = bed.record("hf:o/n", None).await.unwrap();
    let recorded = &entry.manifest.files[0];
    assert_eq!(entry.manifest.trust, Trust::File);
    assert_eq!(recorded.sha256.as_deref(), Some(&*sha256(&file)));
    let origin = recorded.origin.as_ref().unwrap();
    assert!(origin.header_only && origin.object.len == file.len() as u64);
    assert_eq!(origin.object.etag, Some(format!("\"{}\"", &sha256(&file)[..16])));
    let ranges = bed.server.ranges(&path).await;
    assert_eq!(ranges, [None, Some("bytes=0-1048575".to_owned())], "HEAD, and the beginning");

    // A file at a commit is not looked up; its hash is the alias'.
    let listed = bed.server.ranges("/api/models/o/n/revision/main").await.len();
    let entry = bed.record(&format!("hf:o/n@{COMMIT}/m.gguf"), Some("0".repeat(64))).await.unwrap();
    assert_eq!(entry.manifest.files[0].sha256, Some("0".repeat(64)));
    assert_eq!(bed.server.ranges("/api/models/o/n/revision/main").await.len(), listed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_only_be_had_whole_is_told_from_what_is_wrong() {
    let bed = Bed::new().await;
    let file = gguf(1_000_000);
    let url = format!("{}/m.gguf", bed.server.base);
    let served = |ranges, etag| Served { body: file.clone(), ranges, etag, ..Served::default() };

    bed.server.serve("/m.gguf", served(false, true)).await;
    let SourceError::Remote(error) = why(bed.record(&url, None).await.unwrap_err()) else { panic!() };
    assert!(error.is_whole_only(), "{error}");

    // Without a version, parts are joined only if the whole can be checked afterwards.
    bed.server.serve("/m.gguf", served(true, false)).await;
    let SourceError::Remote(error) = why(bed.record(&url, None).await.unwrap_err()) else { panic!() };
    assert!(error.is_whole_only(), "{error}");
    bed.record(&url, Some(sha256(&file))).await.unwrap();

    let path = format!("/o/n/resolve/{COMMIT}/m.gguf");
    bed.server.serve(&path, served(true, true)).await;
    bed.list(file.len() + 1, &sha256(&file)).await;
    let error = why(bed.record("hf:o/n", None).await.unwrap_err());
    assert!(matches!(&error, SourceError::Malformed { .. }), "{error}");

    bed.server.serve("/m.gguf", Served { body: b"<html>".to_vec(), ..served(true, true) }).await;
    let error = bed.record(&url, None).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Checkpoint(_)), "{error}");
    let left = files_below(&bed.registry.dir().join(".partial"));
    assert!(left.iter().all(|path| fs::metadata(path).unwrap().len() == 0), "{left:?}");
}
