//! A node's store over what the node before left in memory.

use stoker_io::PoolMemory;
use stoker_store::{Adoption, CheckpointFiles, OpenError, Store, StoreConfig};

use crate::{Catalog, CatalogEntry, Keeper, RuntimeDir, devices::LeftSlab};

/// Opens a node's store: over the memory that the node before left ([`Keeper::recover`]), as far as it can be used, else over
/// new memory. Either way the keeper keeps it from then on. What workers have mapped that are to be taken over
/// ([`RuntimeDir::meet`]) stays where it is. Also finds out which weights on devices can be taken over. Blocks for as long as
/// checking what was left takes.
///
/// # Errors
/// [`OpenError`], when there is no new memory either.
pub fn open_store(
    config: StoreConfig,
    left: Option<PoolMemory>,
    keeper: &Keeper,
    runtime: &RuntimeDir,
    catalog: &dyn Catalog,
) -> Result<Store, OpenError> {
    runtime.left().lock().slabs = LeftSlab::all(keeper, catalog);
    let adopted = left.and_then(|memory| adopt(config.clone(), memory, runtime, catalog));
    let store = match adopted {
        Some(store) => store,
        None => Store::open(config)?,
    };
    match store.memory() {
        Ok(Some(memory)) => keeper.keep(memory),
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "what is in memory would be lost with this process"),
    }
    Ok(store)
}

fn adopt(
    config: StoreConfig,
    memory: PoolMemory,
    runtime: &RuntimeDir,
    catalog: &dyn Catalog,
) -> Option<Store> {
    let mut left = runtime.left().lock();
    let identity = rustix::fs::fstat(&memory.pool).map(|stat| (stat.st_dev, stat.st_ino)).ok()?;
    let mapped = left.mapped(identity);
    let known = |model: &_| {
        let CatalogEntry { dir, manifest } = catalog.lookup(model).ok()?;
        CheckpointFiles::from_manifest(Clone::clone(model), &dir, &manifest).ok()
    };
    match Store::adopt(config, memory, known, &mapped) {
        Ok((store, adoption, kept)) => {
            left.keep(identity, kept);
            let Adoption {
                models, bytes, unknown, changed, wrong, damaged, evicted, lent, total, check, ..
            } = adoption;
            tracing::info!(
                models, %bytes, unknown, changed, wrong, damaged, evicted, lent, ?total, ?check,
                "took over what the node before had in memory"
            );
            Some(store)
        }
        Err(error) => {
            tracing::warn!(%error, "what the node before had in memory can't be used; it is read anew");
            None
        }
    }
}
