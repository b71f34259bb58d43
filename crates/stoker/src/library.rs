//! What models there are: those that were pulled, and those that the configuration names.
//!
//! Named models are indexed into a registry of their own beside the pulled ones, so that they are gone when the
//! configuration doesn't name them any more. Opening a library reads summaries only; a model's manifest is read when
//! the model is first used.

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
use stoker_types::{ByteSize, FileChange, ModelFacts, ModelName, ModelSettings, StartFailure};

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
    pulled: Registry,
    named: Registry,
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
    /// `[models.NAME]` in the configuration.
    Named,
}

/// One model.
pub(crate) struct Known {
    pub(crate) name: ModelName,
    pub(crate) dir: PathBuf,
    pub(crate) home: Home,
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
        let pulled = Registry::open(&config.models.value)?;
        let named = Registry::open(config.models.value.join(NAMED_DIR))?;
        let mut models = BTreeMap::new();
        for listing in pulled.list()? {
            let known = Known::new(
                listing.name.clone(),
                listing.dir,
                Home::Pulled,
                config.settings_of(&listing.name),
                summary(listing.what),
            );
            models.insert(listing.name, Arc::new(known));
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
                None => {
                    let what = Err(not_pulled(name, entry));
                    Known::new(name.clone(), PathBuf::new(), Home::Named, settings, what)
                }
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
                pulled,
                named,
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
    pub(crate) fn registry(&self, home: Home) -> &Registry {
        match home {
            Home::Pulled => &self.inner.pulled,
            Home::Named => &self.inner.named,
        }
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
                    let entry = self.registry(known.home).reindex_changed(&known.name)?;
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
        let anew = Known::new(known.name.clone(), known.dir.clone(), known.home, settings, what);
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
        Self { name, dir, home, settings, what, created, served: RwLock::default() }
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

    fn facts(&self) -> Option<ModelFacts> {
        let summary = self.what.as_ref().ok().filter(|s| s.refusal.is_none())?;
        let config = summary.config.as_ref()?;
        Some(ModelFacts {
            model: self.name.clone(),
            settings: self.settings.clone(),
            weight_bytes: ByteSize(summary.weight_bytes()),
            pool_bytes: ByteSize(summary.pool_bytes(CHUNK_BYTES)),
            kv_bytes_per_token: ByteSize(config.kv_bytes_per_token()),
            context_trained: config.context_trained,
        })
    }
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
                Home::Pulled => {
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

    fn learned(&self, model: &ModelName, sums: Vec<Vec<ChunkSum>>) {
        let Some(known) = self.known(model) else { return };
        let registry = self.registry(known.home);
        for (file, sums) in sums.into_iter().enumerate() {
            if let Err(error) = registry.record_sums(model, file, sums) {
                tracing::warn!(%model, %error, "the checksums that were learned are not recorded");
                return;
            }
        }
    }
}
