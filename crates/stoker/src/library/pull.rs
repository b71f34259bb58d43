//! Pulling: the copy on disk that a cold start makes as it passes, waited for and kept.

use std::sync::Arc;

use anyhow::Context as _;
use stoker_checkpoint::ManifestSummary;
use stoker_registry::{
    Attempt, Entry, PinnedSource, PullEvent, PullProgress, RegistryError, SourceError, SourceUri,
};
use stoker_store::{CheckpointFiles, CopyEnd, GiveUp, Priority, Store, StoreConfig};
use stoker_types::{ByteSize, ModelName};

use super::{Home, Known, Library, remote::Access};
use crate::config::Config;

/// Memory that a pull passes through.
const RING: ByteSize = ByteSize::mib(256);

/// How often a model is begun anew that is replaced at its source while it is pulled.
const VERSIONS_MAX: u32 = 3;

/// What a pull came to.
pub(crate) struct Pulled {
    pub(crate) known: Arc<Known>,
    /// It was here before, or another process brought it meanwhile.
    pub(crate) was_here: bool,
}

/// Why a source didn't give a model.
enum Failed {
    /// Another source may.
    Source(SourceError),
    /// This machine is at fault.
    Here(anyhow::Error),
}

// === impl Library ===

impl Library {
    /// Brings a model to this machine's disks to stay: from `source`, or from where the alias `name` says, in order. Weights
    /// are read in parts from one version, several at a time, and what has arrived stays for the next call; a server that
    /// can't give parts sends each file in one stream. Two pulls of one model become one.
    ///
    /// # Errors
    /// [`RegistryError::NoSource`] with everything that was tried; what this machine's disk or network refuses.
    pub(crate) async fn pull(
        &self,
        config: &Config,
        name: &ModelName,
        source: Option<&SourceUri>,
        progress: &dyn PullProgress,
    ) -> anyhow::Result<Pulled> {
        let _lock = self.models_dir().lock_pull(name, progress).await?;
        let here = self.on_disk(name)?;
        let sources = match (self.models_dir().sources(name, source), &here) {
            // What was pulled under a name of its own needs no source.
            (Err(RegistryError::UnknownAlias { .. }), Some((_, entry))) => {
                vec![PinnedSource { uri: entry.manifest.source.uri.parse()?, sha256: None }]
            }
            (sources, _) => sources?,
        };
        if let Some((disk, entry)) = here {
            let source_uri = entry.manifest.source.uri.clone();
            if !sources.iter().any(|source| source.uri.to_string() == source_uri) {
                return Err(RegistryError::AlreadyExists { name: name.clone(), source_uri }.into());
            }
            return self.keep(disk, entry, true);
        }
        let access = self.access()?;
        let mut attempts = Vec::new();
        for pinned in &sources {
            let source = pinned.uri.to_string();
            progress.event(PullEvent::Trying { source: &source });
            match self.pull_one(config, name, pinned, &access, progress).await {
                Ok(()) => {
                    let (disk, entry) = self.on_disk(name)?.context("the model is gone")?;
                    return self.keep(disk, entry, false);
                }
                Err(Failed::Here(error)) => return Err(error),
                Err(Failed::Source(error)) => {
                    progress.event(PullEvent::Failed { source: &source, error: &error });
                    attempts.push(Attempt { source, error });
                }
            }
        }
        Err(RegistryError::NoSource { name: name.clone(), attempts }.into())
    }

    /// A model as it is on disk now, whoever brought it, and the disk.
    fn on_disk(&self, name: &ModelName) -> Result<Option<(usize, Entry)>, RegistryError> {
        for (disk, registry) in self.inner.disks.iter().enumerate() {
            match registry.get(name) {
                Ok(entry) => return Ok(Some((disk, entry))),
                Err(RegistryError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Has a model on disk stay, if it is only a copy yet.
    fn keep(&self, disk: usize, entry: Entry, was_here: bool) -> anyhow::Result<Pulled> {
        let Entry { name, dir, .. } = entry;
        self.inner.disks[disk].keep(&name)?;
        let what = ManifestSummary::read(&dir).map_err(|e| e.to_string());
        let settings = self.known(&name).map(|known| known.settings.clone()).unwrap_or_default();
        let known = Arc::new(Known::new(name.clone(), dir, Home::Pulled, settings, what).on(disk));
        self.inner.models.write().insert(name, Arc::clone(&known));
        Ok(Pulled { known, was_here })
    }

    async fn pull_one(
        &self,
        config: &Config,
        name: &ModelName,
        source: &PinnedSource,
        access: &Access,
        progress: &dyn PullProgress,
    ) -> Result<(), Failed> {
        if source.uri.is_loadable() {
            match self.copy_from(config, name, source, access, progress).await {
                Err(Failed::Source(SourceError::Remote(error))) if error.is_whole_only() => {
                    tracing::info!(model = %name, %error, "fetched in one stream");
                }
                done => return done,
            }
        }
        let sources = std::slice::from_ref(source);
        match self.models_dir().pull_from(name, sources, &access.hub, progress).await {
            Ok(_) => Ok(()),
            Err(RegistryError::NoSource { attempts, .. }) => {
                let error = attempts.into_iter().next().map(|attempt| attempt.error);
                Err(error.map_or_else(|| Failed::Here(anyhow::anyhow!("nothing was tried")), Failed::Source))
            }
            Err(error) => Err(Failed::Here(error.into())),
        }
    }

    /// Indexes a model at a source, then copies it as a cold start's copy is.
    async fn copy_from(
        &self,
        config: &Config,
        name: &ModelName,
        source: &PinnedSource,
        access: &Access,
        progress: &dyn PullProgress,
    ) -> Result<(), Failed> {
        let mut versions = 0;
        loop {
            self.index_from(name, source, access).await?;
            match self.copy_indexed(config, name, access, progress).await? {
                CopyEnd::Landed => return Ok(()),
                // Replaced at its source meanwhile: the new version, then.
                CopyEnd::GivenUp(GiveUp::Changed { detail }) => {
                    versions += 1;
                    if versions == VERSIONS_MAX {
                        let why = format!("{detail}; begun anew {VERSIONS_MAX} times");
                        return Err(SourceError::NotCopied { why, resumes: false }.into());
                    }
                    tracing::info!(model = %name, detail, "begun anew");
                }
                CopyEnd::GivenUp(GiveUp::WrongHash { file, expected, found }) => {
                    return Err(SourceError::WrongHash { file, expected, found }.into());
                }
                CopyEnd::GivenUp(why) => return Err(Failed::Here(why.into())),
                CopyEnd::Interrupted(why) => {
                    return Err(SourceError::NotCopied { why, resumes: true }.into());
                }
            }
        }
    }

    async fn copy_indexed(
        &self,
        config: &Config,
        name: &ModelName,
        access: &Access,
        progress: &dyn PullProgress,
    ) -> anyhow::Result<CopyEnd> {
        let known = self.known(name).context("the model's index is gone")?;
        let manifest = self.manifest(&known)?;
        let files = CheckpointFiles::from_manifest(name.clone(), &known.dir, &manifest)?;
        let store = Store::open(StoreConfig {
            shared: false,
            remote: Some(Arc::new(access.stores.clone())),
            ssd: Some(self.ssd_tier_for_pull(config)?),
            ..StoreConfig::new(RING)
        })?;
        let copying = tokio::task::block_in_place(|| store.copy(&files, Priority::Demand))?;
        let mut copying = copying.with_context(|| {
            let bytes = files.bytes();
            format!("no room for {bytes} on disk, or another process copies it; see `stoker cache ls`")
        })?;
        loop {
            let (done, total, end) = {
                let copy = copying.borrow_and_update();
                (copy.present.bytes(), copy.total.bytes(), copy.end.clone())
            };
            progress.event(PullEvent::Bytes { file: name.as_str(), done, total: Some(total) });
            match end {
                Some(end) => return Ok(end),
                None => copying.changed().await.context("the copy came to no end")?,
            }
        }
    }
}

// === impl Failed ===

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self::Here(error)
    }
}

impl From<RegistryError> for Failed {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Remote { error, .. } => Self::Source(*error),
            RegistryError::Checkpoint(error) => Self::Source(SourceError::NotAModel(error)),
            error => Self::Here(error.into()),
        }
    }
}
