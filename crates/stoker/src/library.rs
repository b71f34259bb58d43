//! What models there are: those that were pulled, and those that the configuration names.
//!
//! Named models are indexed into a registry of their own beside the pulled ones, so that they are gone when the
//! configuration doesn't name them any more. Opening a library reads summaries only; a model's manifest is read when
//! the model is first used.
//!
//! A model that is named by where it comes from is indexed there ([`remote`]), and is the same model when a copy of it
//! lands on a disk of this machine. Pulling one is asking for that copy ([`pull`]).

pub(crate) mod pull;
mod remote;

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use parking_lot::{Mutex, RwLock};
use stoker_checkpoint::{
    ChunkSum, FileIdentity, Manifest, ManifestSummary, identity_of,
    manifest::{CHUNK_BYTES, FILE_NAME},
    text::TextAssets,
    tokenizer::Tokenizers,
};
use stoker_controller::Facts;
use stoker_gateway::{ModelCard, ModelLookupError, Models, ServedModel};
use stoker_node::{Catalog, CatalogEntry};
use stoker_registry::{Listed, Registry};
use stoker_types::{ByteSize, FileChange, ModelFacts, ModelName, ModelSettings, StartFailure, Tier};

use crate::config::{Config, ModelEntry, nearest_of};

/// Below the models directory: indexes of the models that the configuration names. Hidden, so no model's directory.
const NAMED_DIR: &str = ".named";

/// Manifests kept in memory: an index of a large model takes a few hundred kilobytes.
const MANIFESTS_MAX: usize = 64;

/// Names proposed for one that isn't known.
const NEAREST_MAX: usize = 3;

/// The models. A cheap handle.
#[derive(Clone)]
pub(crate) struct Library {
    inner: Arc<Inner>,
}

struct Inner {
    /// Pulled models and copies of remote ones: the models directory, then those on other disks.
    disks: Vec<Registry>,
    named: Registry,
    remote: remote::Records,
    models: RwLock<BTreeMap<ModelName, Arc<Known>>>,
    /// The most recently used last.
    manifests: Mutex<VecDeque<Cached>>,
    tokenizers: Arc<Tokenizers>,
}

/// A manifest in memory, good for as long as its file is the one that was read: `stoker verify` and `stoker pull` in
/// other processes write it too.
struct Cached {
    model: ModelName,
    file: FileIdentity,
    manifest: Arc<Manifest>,
}

/// A model's manifest, as its files are now.
struct Current {
    manifest: Arc<Manifest>,
    /// What made it be indexed anew just now.
    changed: Option<(PathBuf, FileChange)>,
}

/// Who brought a model here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Home {
    /// `stoker pull`.
    Pulled,
    /// `path` of `[models.NAME]` in the configuration.
    Named,
    /// Nobody yet: its weights are where `source` of `[models.NAME]` says.
    Remote,
}

/// One model.
pub(crate) struct Known {
    pub(crate) name: ModelName,
    pub(crate) dir: PathBuf,
    pub(crate) home: Home,
    /// The disk that it is on, when it was pulled: 0 is the models directory.
    pub(crate) disk: usize,
    pub(crate) settings: ModelSettings,
    /// Its summary, or why there is none.
    pub(crate) what: Result<ManifestSummary, String>,
    /// When it was indexed, seconds since the epoch.
    pub(crate) created: u64,
    served: RwLock<Option<Arc<ServedModel>>>,
}

// === impl Library ===

impl Library {
    /// Everything that is pulled or named. Indexes named models that are new or were replaced; one that can't be indexed
    /// is listed with the reason.
    ///
    /// # Errors
    /// When the models directory can't be used.
    pub(crate) fn open(config: &Config) -> anyhow::Result<Self> {
        let mut disks = vec![Registry::open(&config.models.value)?];
        for disk in &config.ssd_dirs {
            disks.push(Registry::open(&disk.path)?);
        }
        let named = Registry::open(config.models.value.join(NAMED_DIR))?;
        let remote = remote::Records::open(config)?;
        let mut models: BTreeMap<ModelName, Arc<Known>> = BTreeMap::new();
        for (disk, registry) in disks.iter().enumerate() {
            for listing in registry.list()? {
                let settings = config.settings_of(&listing.name);
                let what = summary(listing.what);
                let known = Known::new(listing.name.clone(), listing.dir, Home::Pulled, settings, what);
                models.entry(listing.name).or_insert_with(|| Arc::new(known.on(disk)));
            }
        }
        let mut indexed: BTreeMap<ModelName, stoker_registry::Listing> =
            named.list()?.into_iter().map(|l| (l.name.clone(), l)).collect();
        for (name, entry) in &config.entries {
            let settings = config.settings_of(name);
            let known = match &entry.path {
                Some(path) => {
                    let current = indexed.remove(name).filter(|l| is_current(l, path));
                    let (dir, what) = match current {
                        Some(listing) => (listing.dir, summary(listing.what)),
                        None => index_named(&named, name, path),
                    };
                    Known::new(name.clone(), dir, Home::Named, settings, what)
                }
                None if models.contains_key(name) => continue,
                None => match remote.known(name, settings.clone()) {
                    Some(known) => known,
                    None => {
                        let what = Err(not_pulled(name, entry));
                        Known::new(name.clone(), PathBuf::new(), Home::Named, settings, what)
                    }
                },
            };
            models.insert(name.clone(), Arc::new(known));
        }
        for stale in indexed.into_keys() {
            if let Err(error) = named.remove(&stale) {
                tracing::warn!(model = %stale, %error, "the index of a model that isn't named any more stays");
            }
        }
        let models = RwLock::new(models);
        Ok(Self {
            inner: Arc::new(Inner {
                disks,
                named,
                remote,
                models,
                manifests: Mutex::default(),
                tokenizers: Arc::default(),
            }),
        })
    }

    /// All models, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Known>> {
        self.inner.models.read().values().cloned().collect()
    }

    pub(crate) fn known(&self, name: &ModelName) -> Option<Arc<Known>> {
        self.inner.models.read().get(name).cloned()
    }

    pub(crate) fn knows(&self, name: &ModelName) -> bool {
        self.inner.models.read().contains_key(name)
    }

    /// The registry that a model is in.
    pub(crate) fn registry(&self, known: &Known) -> &Registry {
        match known.home {
            Home::Pulled => &self.inner.disks[known.disk],
            Home::Named => &self.inner.named,
            Home::Remote => self.inner.remote.registry(),
        }
    }

    /// The models directory.
    pub(crate) fn models_dir(&self) -> &Registry {
        &self.inner.disks[0]
    }

    /// What to say about a name that isn't known.
    pub(crate) fn not_found(&self, name: &str) -> String {
        ModelLookupError::Unknown { name: name.into(), nearest: self.nearest(name) }.to_string()
    }

    fn nearest(&self, name: &str) -> Vec<String> {
        let models = self.inner.models.read();
        let mut names: Vec<&str> = models.keys().map(ModelName::as_str).collect();
        let mut nearest = Vec::new();
        while let Some(found) =
            nearest_of(name, names.iter().copied()).filter(|_| nearest.len() < NEAREST_MAX)
        {
            nearest.push(found.to_owned());
            names.retain(|n| *n != found);
        }
        nearest
    }

    /// A model's manifest, as its files are now: one that was replaced since is indexed anew.
    ///
    /// # Errors
    /// When it isn't known or can't be read.
    pub(crate) fn manifest(&self, known: &Known) -> anyhow::Result<Arc<Manifest>> {
        Ok(self.current(known)?.manifest)
    }

    fn current(&self, known: &Known) -> anyhow::Result<Current> {
        if let Err(why) = &known.what {
            anyhow::bail!("{why}");
        }
        let file = identity_of(&known.dir.join(FILE_NAME))?;
        let mut manifests = self.inner.manifests.lock();
        let cached = manifests.iter().position(|c| c.model == known.name).and_then(|at| manifests.remove(at));
        let good = |c: &Cached| c.file == file && c.manifest.changed_files(&known.dir).is_empty();
        let mut changed = None;
        let manifest = match cached.filter(good) {
            Some(cached) => cached.manifest,
            None => {
                let manifest = Manifest::read(&known.dir)?;
                changed = manifest.changed_files(&known.dir).into_iter().next();
                if let Some((path, change)) = &changed {
                    tracing::info!(model = %known.name, path = %path.display(), %change, "changed on disk since it was added; indexing anew");
                    anyhow::ensure!(
                        known.home != Home::Remote,
                        "{}: it is Stoker's own, and somebody wrote to it",
                        path.display()
                    );
                    let entry = self.registry(known).reindex_changed(&known.name)?;
                    self.refresh(known);
                    Arc::new(entry.map_or(manifest, |e| e.manifest))
                } else {
                    Arc::new(manifest)
                }
            }
        };
        manifests.push_back(Cached { model: known.name.clone(), file, manifest: Arc::clone(&manifest) });
        if manifests.len() > MANIFESTS_MAX {
            manifests.pop_front();
        }
        Ok(Current { manifest, changed })
    }

    /// Reads a model's summary again.
    fn refresh(&self, known: &Known) {
        let what = ManifestSummary::read(&known.dir).map_err(|e| e.to_string());
        let settings = known.settings.clone();
        let anew =
            Known::new(known.name.clone(), known.dir.clone(), known.home, settings, what).on(known.disk);
        self.inner.models.write().insert(known.name.clone(), Arc::new(anew));
    }

    fn served(&self, known: &Arc<Known>) -> anyhow::Result<Arc<ServedModel>> {
        if let Some(served) = &*known.served.read() {
            return Ok(Arc::clone(served));
        }
        let manifest = self.manifest(known)?;
        let config = manifest.config.as_ref().context("it has no configuration")?;
        let trained = config.context_trained;
        let (dir, text_of) = (known.dir.clone(), Arc::clone(&manifest));
        let tokenizers = Arc::clone(&self.inner.tokenizers);
        let served = Arc::new(ServedModel {
            name: known.name.clone(),
            created: known.created,
            context: known.settings.context.map_or(trained, |c| c.min(trained)),
            vocab_size: config.vocab_size,
            defaults: manifest.generation.clone(),
            text: Arc::new(move || TextAssets::open(&dir, &text_of, &tokenizers).map_err(|e| e.to_string())),
        });
        Ok(Arc::clone(known.served.write().get_or_insert(served)))
    }
}

fn summary(what: Listed) -> Result<ManifestSummary, String> {
    match what {
        Listed::Known(summary) => Ok(*summary),
        Listed::Broken { why } => Err(why),
    }
}

/// Whether an index is of the file that the configuration names, as it is now.
fn is_current(listing: &stoker_registry::Listing, path: &Path) -> bool {
    let Listed::Known(summary) = &listing.what else { return false };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    summary.source.uri == absolute.display().to_string()
        && summary
            .files
            .iter()
            .all(|f| identity_of(&listing.dir.join(&f.path)).is_ok_and(|now| now == f.identity))
}

fn index_named(
    named: &Registry,
    name: &ModelName,
    path: &Path,
) -> (PathBuf, Result<ManifestSummary, String>) {
    use stoker_registry::RegistryError;

    match named.remove(name) {
        Ok(_) | Err(RegistryError::NotFound { .. }) => {}
        Err(error) => return (PathBuf::new(), Err(error.to_string())),
    }
    match named.add_reference(name, path) {
        Ok(entry) => {
            let what = ManifestSummary::read(&entry.dir).map_err(|e| e.to_string());
            (entry.dir, what)
        }
        Err(error) => (PathBuf::new(), Err(error.to_string())),
    }
}

fn not_pulled(name: &ModelName, entry: &ModelEntry) -> String {
    match &entry.source {
        Some(_) => format!("not here yet: run `stoker pull {name}`"),
        None => "the configuration gives it neither `path` nor `source`, and it was not pulled".into(),
    }
}

// === impl Known ===

impl Known {
    fn new(
        name: ModelName,
        dir: PathBuf,
        home: Home,
        settings: ModelSettings,
        what: Result<ManifestSummary, String>,
    ) -> Self {
        let indexed = std::fs::metadata(dir.join(FILE_NAME)).and_then(|m| m.modified()).ok();
        let created = indexed
            .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_secs());
        Self { name, dir, home, disk: 0, settings, what, created, served: RwLock::default() }
    }

    fn on(self, disk: usize) -> Self {
        Self { disk, ..self }
    }

    /// Why it can't be served; `None` when it can.
    pub(crate) fn refusal(&self) -> Option<String> {
        match &self.what {
            Err(why) => Some(why.clone()),
            Ok(summary) => match (&summary.refusal, &summary.config) {
                (Some(why), _) => Some(why.clone()),
                (None, None) => Some("it has no configuration".into()),
                (None, Some(_)) => None,
            },
        }
    }

    /// The name of its first weight file.
    fn weight_file(&self) -> Option<String> {
        let file = self.what.as_ref().ok()?.files.first()?;
        Some(file.path.file_name()?.to_string_lossy().into_owned())
    }

    fn facts(&self) -> Option<ModelFacts> {
        let summary = self.what.as_ref().ok().filter(|s| s.refusal.is_none())?;
        let config = summary.config.as_ref()?;
        Some(ModelFacts {
            model: self.name.clone(),
            settings: self.settings.clone(),
            weight_bytes: ByteSize(summary.weight_bytes()),
            pool_bytes: ByteSize(summary.pool_bytes(CHUNK_BYTES)),
            device_bytes: device_bytes(summary.weight_bytes(), config.layers),
            kv_bytes_per_token: ByteSize(config.kv_bytes_per_token()),
            context_trained: config.context_trained,
            weights_on: if self.home == Home::Remote { Tier::Remote } else { Tier::Ssd },
        })
    }
}

/// Bytes of device memory that weights take at most. A layer has a dozen tensors or so.
fn device_bytes(weight_bytes: u64, layers: u32) -> ByteSize {
    let tensors = 16 * (u64::from(layers) + 4);
    stoker_node::device_bytes_at_most(ByteSize(weight_bytes), tensors)
}

// === impl the roles' traits ===

impl Facts for Library {
    fn facts(&self, model: &ModelName) -> Option<ModelFacts> {
        self.known(model)?.facts()
    }

    fn preloaded(&self) -> Vec<ModelName> {
        let mut wanted: Vec<Arc<Known>> =
            self.all().into_iter().filter(|k| k.settings.preload && k.refusal().is_none()).collect();
        wanted.sort_by_key(|k| std::cmp::Reverse(k.settings.priority));
        wanted.iter().map(|k| k.name.clone()).collect()
    }
}

impl Models for Library {
    fn list(&self) -> Vec<ModelCard> {
        let card = |known: Arc<Known>| ModelCard {
            id: known.name.clone(),
            created: known.created,
            owned_by: match known.home {
                Home::Pulled | Home::Remote => {
                    known.what.as_ref().map_or_else(|_| "unknown".into(), |s| s.source.uri.clone())
                }
                // A path of this machine is nobody's business who only talks to the API.
                Home::Named => "local".into(),
            },
            context: known
                .facts()
                .map(|f| f.settings.context.unwrap_or(f.context_trained).min(f.context_trained)),
            refusal: known.refusal(),
        };
        self.all().into_iter().map(card).collect()
    }

    fn get(&self, name: &str) -> Result<Arc<ServedModel>, ModelLookupError> {
        let known = ModelName::new(name).ok().and_then(|name| self.known(&name));
        let Some(known) = known else {
            return Err(ModelLookupError::Unknown { name: name.into(), nearest: self.nearest(name) });
        };
        let refused = |why| ModelLookupError::NotRunnable { name: known.name.clone(), why };
        if let Some(why) = known.refusal() {
            return Err(refused(why));
        }
        self.served(&known).map_err(|e| refused(format!("{e:#}")))
    }
}

impl Catalog for Library {
    fn lookup(&self, model: &ModelName) -> Result<CatalogEntry, StartFailure> {
        let model = model.clone();
        let Some(known) = self.known(&model) else { return Err(StartFailure::UnknownModel { model }) };
        if self.inner.remote.take_outdated(&model) {
            let read = |error: anyhow::Error| StartFailure::Read {
                model: model.clone(),
                detail: format!("{error:#}"),
            };
            // On a thread that may block, as `Catalog` says.
            let indexed = tokio::runtime::Handle::current().block_on(self.index_remote(&model));
            indexed.inspect_err(|_| self.inner.remote.outdated(&model)).map_err(read)?;
            if known.served.read().is_some() {
                let file = known.weight_file().unwrap_or_default();
                return Err(StartFailure::Changed { model, file, change: FileChange::Object });
            }
            return self.lookup(&model);
        }
        match self.current(&known) {
            // Requests that wait were made with the old files' tokenizer.
            Ok(Current { changed: Some((path, change)), .. }) if known.served.read().is_some() => {
                let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Err(StartFailure::Changed { model, file, change })
            }
            Ok(Current { manifest, .. }) => Ok(CatalogEntry { dir: known.dir.clone(), manifest }),
            Err(error) => Err(StartFailure::Read { model, detail: format!("{error:#}") }),
        }
    }

    fn outdated(&self, model: &ModelName) {
        self.inner.remote.outdated(model);
    }

    fn learned(&self, model: &ModelName, sums: Vec<Vec<ChunkSum>>) {
        let Some(known) = self.known(model) else { return };
        let registry = self.registry(&known);
        for (file, sums) in sums.into_iter().enumerate() {
            if let Err(error) = registry.record_sums(model, file, sums) {
                tracing::warn!(%model, %error, "the checksums that were learned are not recorded");
                return;
            }
        }
    }
}
