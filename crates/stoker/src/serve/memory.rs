//! The store of a server, over memory that outlives the process.

use std::{ffi::OsString, sync::Arc, time::Duration};

use anyhow::Context as _;
use stoker_io::{OpenRemote, PoolMemory};
use stoker_node::{Keeper, KeeperConfig, RuntimeDir, open_store};
use stoker_store::{SsdTier, Store, StoreConfig};
use stoker_types::ByteSize;

use crate::{config::Config, library::Library};

/// What workers of a killed server may take to say what they serve. One that has been told to let go of a model, or to take one,
/// says so after the step that it computes.
const WORKERS_MET: Duration = Duration::from_secs(5);

/// What those get to end by themselves that were not met.
const WORKERS_END: Duration = Duration::from_secs(2);

/// The tiers below the disk's files.
pub(super) struct Below {
    /// `None`: no network is to be used.
    pub(super) remote: Option<Arc<dyn OpenRemote>>,
    pub(super) ssd: SsdTier,
}

/// A store, and who keeps its memory.
pub(super) struct Opened {
    pub(super) runtime: RuntimeDir,
    pub(super) store: Store,
    pub(super) keeper: Option<Keeper>,
    /// Memory for weights.
    pub(super) dram: ByteSize,
    /// Memory for KV caches.
    pub(super) kv: ByteSize,
}

/// Opens the store, over what a server that was killed left in memory, if `kept`. `workers` is the command that starts
/// one. Without a keeper, everything works, and nothing outlives the process.
pub(super) async fn open(
    config: &Config,
    runtime: RuntimeDir,
    workers: &[OsString],
    library: &Library,
    below: Below,
    kept: bool,
) -> anyhow::Result<Opened> {
    let executable = std::env::current_exe().context("finding the keeper's executable")?;
    let keeper = KeeperConfig {
        socket: runtime.keeper_socket(),
        command: vec![executable.into_os_string(), "keeper".into(), "--inherited".into()],
        workers: workers.to_vec(),
    };
    // Before anything is asked for that they may have mapped.
    runtime.meet(WORKERS_MET).await;
    let (config, library) = (config.clone(), library.clone());
    // Sums of all that is in memory may have to be computed.
    let opening = tokio::task::spawn_blocking(move || {
        let (keeper, left) = if kept { recover(keeper, &runtime) } else { (None, None) };
        // What is left is this server's to use: it counts as available.
        let budgets = config.budgets(left.as_ref().and_then(|memory| memory.resident().ok()));
        let store_config = StoreConfig {
            read_mode: config.reader.value.mode(),
            opener: Arc::new(config.reader.value.files()),
            remote: below.remote,
            ssd: Some(below.ssd),
            ..StoreConfig::new(budgets.dram)
        };
        let store = match &keeper {
            Some(keeper) => open_store(store_config, left, keeper, &runtime, &library),
            None => Store::open(store_config),
        };
        let store = store.context("opening the memory pool")?;
        Ok(Opened { runtime, store, keeper, dram: budgets.dram, kv: budgets.kv })
    });
    opening.await.context("opening the memory pool was cut short")?
}

fn recover(config: KeeperConfig, runtime: &RuntimeDir) -> (Option<Keeper>, Option<PoolMemory>) {
    let keeper = match Keeper::open(config) {
        Ok(keeper) => keeper,
        Err(error) => {
            tracing::warn!(%error, "no keeper: what is in memory will not outlive this process");
            return (None, None);
        }
    };
    let left = keeper.recover(runtime, WORKERS_END).unwrap_or_else(|error| {
        tracing::warn!(%error, "what the server before had in memory can't be had; it is read anew");
        None
    });
    (Some(keeper), left)
}
