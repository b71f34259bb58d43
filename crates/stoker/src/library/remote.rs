//! Models that are named by where they come from, and their copies on this machine's disks.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use stoker_checkpoint::ManifestSummary;
use stoker_registry::{
    Listed, PinnedSource, Registry, RegistryError, Remote, RemoteConfig, Removed, SourceUri, Written,
};
use stoker_remote::{BearerToken, RemoteOptions, RemoteStores};
use stoker_store::{CheckpointFiles, FinishedCopy, Leftover, Shelf, Shelved, SsdDisk, SsdTier};
use stoker_types::{ByteSize, BytesPerSec, ModelName, ModelSettings};

use super::{Home, Known, Library, summary};
use crate::config::Config;

/// Below the models directory: headers and small files of models that are only remote. Hidden, so no model's directory.
const REMOTE_DIR: &str = ".remote";

/// Pause before a model that couldn't be indexed is tried again; doubled each time.
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(120);

/// What always stays free of a disk whose budget nobody set: a tenth of it, and this.
const RESERVE: ByteSize = ByteSize::gib(20);

/// The models that are named by where they come from.
pub(super) struct Records {
    registry: Registry,
    sources: BTreeMap<ModelName, SourceUri>,
    /// Their stores have other versions than those that were indexed.
    outdated: Mutex<BTreeSet<ModelName>>,
    options: RemoteOptions,
    hub: RemoteConfig,
    access: OnceLock<Access>,
}

/// The way to them.
#[derive(Clone)]
pub(crate) struct Access {
    pub(crate) stores: RemoteStores,
    pub(crate) hub: Remote,
}

// === impl Records ===

impl Records {
    /// # Errors
    /// When the directory can't be used.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let registry = Registry::open(config.models.value.join(REMOTE_DIR))?;
        let loadable = |source: &String| source.parse().ok().filter(SourceUri::is_loadable);
        let sources = config.entries.iter();
        let sources = sources
            .filter_map(|(name, entry)| Some((name.clone(), entry.source.as_ref().and_then(loadable)?)));
        let hub = RemoteConfig {
            hub_endpoint: config.remote.hf_endpoint.clone(),
            hub_token: config.remote.hf_token.clone(),
            package_index: config.remote.python_index.clone(),
            offline: config.offline.value,
            ..RemoteConfig::default()
        };
        let defaults = RemoteOptions::default();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let bandwidth = config.remote_limits.bandwidth.map(|bytes| BytesPerSec(bytes.bytes() as f64));
        let options = RemoteOptions {
            settings: config.remote.stores.clone(),
            bandwidth,
            reads_max: config.remote_limits.reads.unwrap_or(defaults.reads_max),
            ..defaults
        };
        let sources = sources.collect();
        Ok(Self { registry, sources, outdated: Mutex::default(), options, hub, access: OnceLock::new() })
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// A model that the configuration names by a source that it can be loaded from.
    pub(super) fn known(&self, name: &ModelName, settings: ModelSettings) -> Option<Known> {
        let source = self.sources.get(name)?;
        let indexed =
            self.registry.get(name).ok().filter(|entry| entry.manifest.source.uri == source.to_string());
        let indexed = indexed.filter(|entry| entry.manifest.changed_files(&entry.dir).is_empty());
        let Some(entry) = indexed else {
            let why = format!("its index is not here yet: it is fetched from {source} when a server starts");
            return Some(Known::new(name.clone(), "".into(), Home::Remote, settings, Err(why)));
        };
        let what = ManifestSummary::read(&entry.dir).map_err(|e| e.to_string());
        Some(Known::new(name.clone(), entry.dir, Home::Remote, settings, what))
    }

    pub(super) fn outdated(&self, model: &ModelName) {
        self.outdated.lock().insert(model.clone());
    }

    /// Whether a model has to be indexed anew, which whoever asks now does.
    pub(super) fn take_outdated(&self, model: &ModelName) -> bool {
        self.outdated.lock().remove(model)
    }
}

// === impl Library ===

impl Library {
    /// The way to remote stores. Starts its threads when first asked for.
    ///
    /// # Errors
    /// When TLS or threads can't be set up.
    pub(crate) fn access(&self) -> anyhow::Result<Access> {
        let records = &self.inner.remote;
        if let Some(access) = records.access.get() {
            return Ok(access.clone());
        }
        let hub = Remote::new(records.hub.clone())?;
        let bearer = match records.hub.hub_token.clone() {
            Some(token) => Some(BearerToken { endpoint: hub.hub()?, token }),
            None => None,
        };
        let stores = RemoteStores::new(RemoteOptions { bearer, ..records.options.clone() })?;
        let access = Access { stores, hub };
        Ok(records.access.get_or_init(|| access).clone())
    }

    /// Whether the network may be used.
    pub(crate) fn is_online(&self) -> bool {
        !self.inner.remote.hub.offline
    }

    /// Where a model comes from, if it can be loaded from there.
    pub(crate) fn source(&self, name: &ModelName) -> Option<&SourceUri> {
        self.inner.remote.sources.get(name)
    }

    /// The disks that copies go to.
    pub(crate) fn disks(&self, config: &Config) -> Vec<SsdDisk> {
        let first = self.models_dir().dir().to_owned();
        let first = match config.ssd.value {
            Some(budget) => SsdDisk { dir: first, budget, reserve: ByteSize::ZERO },
            None => {
                let total = rustix::fs::statvfs(&first).map_or(0, |s| s.f_blocks.saturating_mul(s.f_frsize));
                let reserve = ByteSize(RESERVE.bytes().max(total / 10));
                SsdDisk { dir: first, budget: ByteSize(total / 5 * 4), reserve }
            }
        };
        let others = self.inner.disks.iter().skip(1).zip(&config.ssd_dirs);
        let others = others.map(|(registry, entry)| SsdDisk {
            dir: registry.dir().to_owned(),
            budget: entry.budget,
            reserve: ByteSize::ZERO,
        });
        std::iter::once(first).chain(others).collect()
    }

    /// The SSD tier on them.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn ssd_tier(&self, config: &Config) -> anyhow::Result<SsdTier> {
        self.tier_on(self.disks(config))
    }

    /// The SSD tier for what somebody asked for by name: nothing of the disk stays free for others, and the models directory
    /// holds whatever it is told to, as the budget is for copies that come by themselves.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn ssd_tier_for_pull(&self, config: &Config) -> anyhow::Result<SsdTier> {
        let disks = self.disks(config).into_iter().enumerate().map(|(index, disk)| SsdDisk {
            reserve: ByteSize::ZERO,
            budget: if index == 0 { ByteSize(u64::MAX) } else { disk.budget },
            ..disk
        });
        self.tier_on(disks.collect())
    }

    fn tier_on(&self, disks: Vec<SsdDisk>) -> anyhow::Result<SsdTier> {
        let tier = SsdTier::open(disks, Arc::new(self.clone())).context("opening the SSD tier")?;
        let pinned =
            self.all().into_iter().filter(|known| known.settings.pin).map(|known| known.name.clone());
        tier.set_pinned(pinned.collect());
        Ok(tier)
    }

    /// Indexes a remote model where it is, anew if it was before.
    ///
    /// # Errors
    /// When its source can't be reached or has no model.
    pub(crate) async fn index_remote(&self, name: &ModelName) -> anyhow::Result<()> {
        let source =
            self.source(name).with_context(|| format!("`{name}` has no source to be loaded from"))?;
        let source = PinnedSource { uri: source.clone(), sha256: None };
        let access = self.access()?;
        Ok(self.index_from(name, &source, &access).await?)
    }

    /// Indexes a model at a source.
    pub(super) async fn index_from(
        &self,
        name: &ModelName,
        source: &PinnedSource,
        access: &Access,
    ) -> Result<(), RegistryError> {
        let entry = self.inner.remote.registry.record(name, source, &access.stores, &access.hub).await?;
        let settings = self.known(name).map(|known| known.settings.clone()).unwrap_or_default();
        let what = ManifestSummary::read(&entry.dir).map_err(|e| e.to_string());
        let known = Known::new(name.clone(), entry.dir, Home::Remote, settings, what);
        self.inner.models.write().insert(name.clone(), Arc::new(known));
        Ok(())
    }

    /// Remote models that aren't indexed yet.
    fn unindexed(&self) -> Vec<ModelName> {
        let all = self.all().into_iter();
        all.filter(|known| known.home == Home::Remote && known.dir.as_os_str().is_empty())
            .map(|known| known.name.clone())
            .collect()
    }

    /// Indexes every remote model that isn't yet, again and again until all are; returns after `patience` at the latest,
    /// and goes on in the background.
    pub(crate) async fn index_all(&self, patience: Duration) {
        let missing = self.unindexed();
        if missing.is_empty() || !self.is_online() {
            return;
        }
        let mut tasks = tokio::task::JoinSet::new();
        for name in missing {
            let library = self.clone();
            tasks.spawn(async move {
                let mut pause = RETRY;
                while let Err(error) = library.index_remote(&name).await {
                    tracing::warn!(model = %name, "{error:#}; trying again in {} s", pause.as_secs());
                    library.not_indexed(&name, &error);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            });
        }
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, all).await.is_err() {
            tasks.detach_all();
        }
    }

    fn not_indexed(&self, name: &ModelName, error: &anyhow::Error) {
        let Some(known) = self.known(name) else { return };
        let anew = Known::new(
            name.clone(),
            "".into(),
            Home::Remote,
            known.settings.clone(),
            Err(format!("{error:#}")),
        );
        self.inner.models.write().insert(name.clone(), Arc::new(anew));
    }

    /// Removes a pulled model, or a copy of a remote one, from whatever disk it is on, and what is known of it.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; what the operating system refuses.
    pub(crate) fn remove(&self, name: &ModelName) -> Result<Removed, RegistryError> {
        let mut removed: Option<Removed> = None;
        for disk in self.inner.disks.iter().chain([&self.inner.remote.registry]) {
            match disk.remove(name) {
                Ok(more) => match &mut removed {
                    Some(removed) => {
                        removed.freed += more.freed;
                        removed.kept.extend(more.kept);
                    }
                    None => removed = Some(more),
                },
                Err(RegistryError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        removed.map_or_else(|| self.models_dir().remove(name), Ok)
    }

    /// Whether part of a copy is of a model as it is now, or of one that isn't indexed yet.
    pub(crate) fn wants(&self, left: &Leftover) -> bool {
        let Some(known) = left.model.as_ref().and_then(|model| self.known(model)) else { return false };
        if known.home != Home::Remote {
            return false;
        }
        let Ok(entry) = self.inner.remote.registry.get(&known.name) else { return true };
        let files = CheckpointFiles::from_manifest(entry.name, &entry.dir, &entry.manifest);
        files.is_ok_and(|files| SsdTier::key_of(&files) == left.key)
    }

    fn disk_at(&self, dir: &Path) -> Option<(usize, &Registry)> {
        self.inner.disks.iter().enumerate().find(|(_, registry)| registry.dir() == dir)
    }
}

impl Shelf for Library {
    fn land(&self, copy: FinishedCopy<'_>) -> io::Result<()> {
        let FinishedCopy { model, disk, files, sums, of } = copy;
        let (index, registry) = self.disk_at(disk).ok_or(io::ErrorKind::NotFound)?;
        let record = self.inner.remote.registry.get(model).map_err(io::Error::other)?;
        let same =
            record.manifest.files.len() == of.files().len()
                && record.manifest.files.iter().zip(of.files()).all(|(a, b)| {
                    a.origin.as_ref().map(|o| &o.object) == b.origin.as_ref().map(|o| &o.object)
                });
        if !same {
            return Err(io::Error::other("it was indexed anew meanwhile"));
        }
        let entry = registry.land_copy(&record, &files, &sums, true).map_err(io::Error::other)?;
        let what = ManifestSummary::read(&entry.dir).map_err(|e| e.to_string());
        let before = self.known(model);
        let settings = before.as_ref().map(|known| known.settings.clone()).unwrap_or_default();
        let known = Known::new(model.clone(), entry.dir, Home::Pulled, settings, what).on(index);
        // The same model: whoever asks now is answered by the same tokenizer.
        *known.served.write() = before.and_then(|known| known.served.read().clone());
        self.inner.models.write().insert(model.clone(), Arc::new(known));
        Ok(())
    }

    fn shelved(&self, disk: &Path) -> Vec<Shelved> {
        let Some((_, registry)) = self.disk_at(disk) else { return Vec::new() };
        let listings = registry.list().inspect_err(|error| tracing::warn!(%error, "a disk can't be listed"));
        let shelved = |listing: stoker_registry::Listing| {
            let written = registry.is_written(&listing.name)?;
            let Listed::Known(summary) = listing.what else { return None };
            let origin = summary.files.first().and_then(|file| file.origin.as_ref());
            Some(Shelved {
                bytes: ByteSize(summary.weight_bytes()),
                kept: written == Written::Kept,
                host: origin
                    .map(|origin| stoker_store::host_of(&origin.object.url).to_owned())
                    .unwrap_or_default(),
                model: listing.name,
            })
        };
        listings.unwrap_or_default().into_iter().filter_map(shelved).collect()
    }

    fn remove(&self, disk: &Path, model: &ModelName) -> io::Result<ByteSize> {
        let (index, registry) = self.disk_at(disk).ok_or(io::ErrorKind::NotFound)?;
        let removed = registry.remove(model).map_err(io::Error::other)?;
        let before = self.known(model).filter(|known| known.home == Home::Pulled && known.disk == index);
        let Some(before) = before else { return Ok(removed.freed) };
        // It is remote again.
        let record = self.inner.remote.registry.get(model).ok();
        let mut models = self.inner.models.write();
        match record {
            Some(record) => {
                let what = summary(Listed::Known(Box::new(
                    ManifestSummary::read(&record.dir).map_err(io::Error::other)?,
                )));
                let known =
                    Known::new(model.clone(), record.dir, Home::Remote, before.settings.clone(), what);
                *known.served.write() = before.served.read().clone();
                models.insert(model.clone(), Arc::new(known));
            }
            None => {
                models.remove(model);
            }
        }
        Ok(removed.freed)
    }
}
