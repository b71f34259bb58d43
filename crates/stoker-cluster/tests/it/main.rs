//! The stores and what is built on them, against a real etcd and a real file.
//!
//! Needs `etcd` on the path (Debian: `etcd-server`); each test starts its own, on free ports, in a directory of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod conformance;
mod embedded;
mod etcd;
mod etcd_server;
mod recipes;
mod storms;

use std::{sync::Arc, time::Duration};

use stoker_cluster::{ClusterStore, Deadline, Embedded, EmbeddedSettings};

/// Long enough for anything that isn't broken, on a busy machine.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// An embedded store in a directory of its own.
fn embedded_store() -> (tempfile::TempDir, Embedded) {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(&dir.path().join("cluster.redb"), EmbeddedSettings::default()).unwrap();
    (dir, store)
}

/// Runs a test on an embedded store and on an etcd.
macro_rules! on_both_stores {
    ($($name:ident),* $(,)?) => {
        mod on_embedded {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let (_dir, store) = crate::embedded_store();
                super::$name(std::sync::Arc::new(store)).await;
            })*
        }
        mod on_etcd {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let cluster = crate::etcd_server::Cluster::start(1).await;
                super::$name(std::sync::Arc::new(cluster.store())).await;
            })*
        }
    };
}
use on_both_stores;

type Store = Arc<dyn ClusterStore>;
