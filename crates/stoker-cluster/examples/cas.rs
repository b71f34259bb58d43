//! How many durable compare-and-swaps a second a store does, and how long one takes.
//!
//! ```text
//! cargo run -p stoker-cluster --example cas -- embedded PATH [SECONDS]
//! cargo run -p stoker-cluster --example cas -- etcd http://127.0.0.1:2379[,...] [SECONDS]
//! ```
//!
//! With 1, 8 and 64 writers at the same time, each on a key of its own with a value of 200 bytes, as records have.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use stoker_cluster::{
    ClusterStore, ClusterStoreExt as _, Deadline, Embedded, EmbeddedSettings, Expect,
    etcd::{Etcd, EtcdSettings},
};
use tokio::time::Instant;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "its output is what it is for")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kind), Some(place)) = (arguments.next(), arguments.next()) else {
        bail!("usage: cas embedded PATH [SECONDS] | cas etcd ENDPOINT,... [SECONDS]");
    };
    let seconds: u64 = arguments.next().map_or(Ok(5), |text| text.parse()).context("SECONDS")?;
    let store: Arc<dyn ClusterStore> = match kind.as_str() {
        "embedded" => Arc::new(Embedded::open(Path::new(&place), EmbeddedSettings::default())?),
        "etcd" => Arc::new(Etcd::new(EtcdSettings::new(place.split(',').map(str::to_owned).collect()))?),
        other => bail!("`{other}`: embedded or etcd"),
    };
    println!("{kind}: compare-and-swaps of 200 bytes, {seconds} s each");
    println!("{:>8} {:>10} {:>10} {:>10} {:>10}", "writers", "per s", "p50 ms", "p99 ms", "max ms");
    for writers in [1, 8, 64] {
        let until = Instant::now() + Duration::from_secs(seconds);
        let began = Instant::now();
        let tasks = (0..writers).map(|i| tokio::spawn(write(Arc::clone(&store), i, until)));
        let mut times = Vec::new();
        for task in futures::future::join_all(tasks).await {
            times.extend(task??);
        }
        let took = began.elapsed().as_secs_f64();
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
        let per_second = f64::from(u32::try_from(times.len())?) / took;
        println!("{writers:>8} {per_second:>10.0} {:>10.2} {:>10.2} {:>10.2}", at(50), at(99), at(100));
    }
    Ok(())
}

/// Swaps one key again and again; how long each took.
async fn write(store: Arc<dyn ClusterStore>, writer: usize, until: Instant) -> anyhow::Result<Vec<Duration>> {
    let key = format!("/bench/{writer}");
    let value = Bytes::from(vec![b'x'; 200]);
    let mut revision = store.put(&key, value.clone(), deadline()).await?;
    let mut times = Vec::new();
    while Instant::now() < until {
        let began = Instant::now();
        revision =
            store.compare_and_swap(&key, Expect::Modified(revision), value.clone(), deadline()).await?;
        times.push(began.elapsed());
    }
    Ok(times)
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}
