//! Models that are only remote: their headers and small files are here, their weights are not.
//!
//! A record is a directory like a model's, with the small files whole and, for each weight file, a file of its length of
//! which only the header is written; everything else in it is a hole. The manifest says so
//! ([`stoker_checkpoint::Origin::header_only`]), and records live in a registry of their own, where nobody takes them for
//! models.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use stoker_checkpoint::{
    CheckpointError, ChunkSum, Manifest, Origin, Source, Trust, gguf, identity_of, manifest::FILE_NAME,
    safetensors::ShardIndex,
};
use stoker_remote::{RemoteError, RemoteStores};
use stoker_types::{ByteSize, ModelName, RemoteObject};

use crate::{
    Registry,
    alias::PinnedSource,
    download::blocking,
    error::{RegistryError, SourceError, Stop},
    http::Remote,
    hub::{self, HubFile},
    lock::ModelLock,
    pull::remove_dir,
    registry::{CACHE_FILE, Entry, WRITTEN_FILE},
    source::SourceUri,
};

/// Files that belong to a model, apart from its weights.
const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The longest of them: tokenizers of a quarter of a million tokens take 35 MB.
const COMPANION_MAX: ByteSize = ByteSize::mib(128);

/// Beside a copy's parts: where the model is put together.
const LANDING_DIR: &str = "landing";

/// A model has no more files.
const FILES_MAX: usize = 4096;

/// What is fetched of a weight file at first: most headers end before.
const HEAD_BYTES: u64 = 1 << 20;

/// A model's objects, before anything of them was read.
struct Objects {
    revision: Option<String>,
    /// Weight files.
    weights: Vec<Weights>,
    /// The rest, whole.
    companions: Vec<(String, Vec<u8>)>,
}

struct Weights {
    name: String,
    object: RemoteObject,
    sha256: Option<String>,
}

// === impl Registry ===

impl Registry {
    /// Indexes a model where it is: fetches its small files and the headers of its weight files, nothing else. A record
    /// that is there is replaced. Of a source with one weight file, its hash may be known beforehand. Cancel-safe.
    ///
    /// # Errors
    /// [`RegistryError::Remote`]: the source doesn't give the model; what the operating system refuses.
    pub async fn record(
        &self,
        name: &ModelName,
        source: &PinnedSource,
        stores: &RemoteStores,
        remote: &Remote,
    ) -> Result<Entry, RegistryError> {
        let _lock = ModelLock::wait(self.lock_path(name)?, || {}).await?;
        let failed = |error: Stop| match error {
            Stop::Here(error) => error,
            Stop::Source(error) => RegistryError::Remote {
                name: name.clone(),
                source_uri: source.uri.to_string(),
                error: Box::new(error),
            },
        };
        if remote.config().offline {
            return Err(failed(SourceError::Offline.into()));
        }
        let stage = self.staging(name)?;
        let (origins, written, revision) =
            stage_record(&stage, source, stores, remote).await.map_err(failed)?;
        let source = Source { uri: source.uri.to_string(), revision };
        let (registry, name) = (self.clone(), name.clone());
        let landed = {
            let stage = stage.clone();
            blocking(&stage.clone(), move || registry.land_record(&name, &stage, source, &origins, &written))
                .await
        };
        landed.inspect_err(|_| {
            // What can't be indexed is of no use for the next try.
            let _ = fs::remove_dir_all(&stage);
        })
    }

    fn land_record(
        &self,
        name: &ModelName,
        stage: &Path,
        source: Source,
        origins: &[Weights],
        written: &[String],
    ) -> Result<Entry, RegistryError> {
        let gguf = origins.iter().map(|of| stage.join(&of.name)).find(|path| is_gguf(path));
        let mut manifest = stoker_checkpoint::index(gguf.as_deref().unwrap_or(stage), source)?;
        for file in &mut manifest.files {
            let of = origins.iter().find(|of| file.path.file_name().is_some_and(|n| n == of.name.as_str()));
            let Some(Weights { object, sha256, .. }) = of else { continue };
            file.origin = Some(Origin { object: object.clone(), header_only: true });
            file.sha256.clone_from(sha256);
        }
        manifest.trust =
            if manifest.files.iter().all(|file| file.sha256.is_some()) { Trust::File } else { Trust::None };
        let list = stage.join(WRITTEN_FILE);
        fs::write(&list, written.join("\n") + "\n").map_err(RegistryError::io(&list))?;
        manifest.write(stage).map_err(RegistryError::checkpoint)?;
        let target = self.model_dir(name)?;
        remove_dir(&target)?;
        fs::rename(stage, &target).map_err(RegistryError::io(&target))?;
        let manifest = Manifest::read(&target)?;
        Ok(Entry { name: name.clone(), dir: target, manifest })
    }

    /// Makes a model of a copy whose bytes are all there: `parts` are its weight files, in the order of `record`, on this
    /// registry's file system. They are moved. Blocking. `cache`: it may be evicted again.
    ///
    /// # Errors
    /// [`RegistryError::AlreadyExists`]; what the operating system refuses.
    pub fn land_copy(
        &self,
        record: &Entry,
        parts: &[PathBuf],
        sums: &[Vec<ChunkSum>],
        cache: bool,
    ) -> Result<Entry, RegistryError> {
        let name = &record.name;
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        let target = self.model_dir(name)?;
        if target.join(FILE_NAME).exists() {
            let source_uri = record.manifest.source.uri.clone();
            return Err(RegistryError::AlreadyExists { name: name.clone(), source_uri });
        }
        // Beside the parts, so that a crash leaves nothing that isn't found again with them.
        let Some(stage) = parts.first().and_then(|part| Some(part.parent()?.join(LANDING_DIR))) else {
            return Err(self.not_found(name));
        };
        remove_dir(&stage)?;
        fs::create_dir_all(&stage).map_err(RegistryError::io(&stage))?;
        let mut manifest = record.manifest.clone();
        let mut written = Vec::new();
        for (index, (file, part)) in manifest.files.iter_mut().zip(parts).enumerate() {
            let file_name = file.path.file_name().unwrap_or_default().to_owned();
            let path = stage.join(&file_name);
            fs::rename(part, &path).map_err(RegistryError::io(&path))?;
            file.identity = identity_of(&path)?;
            file.chunk_sums = sums.get(index).cloned().unwrap_or_default();
            if let Some(origin) = &mut file.origin {
                origin.header_only = false;
            }
            file.path = path;
            written.push(file_name.to_string_lossy().into_owned());
        }
        manifest.trust = Trust::Chunk;
        if let stoker_checkpoint::TokenizerFiles::HuggingFace { dir } = &mut manifest.tokenizer {
            dir.clone_from(&stage);
        }
        let companions = fs::read_to_string(record.dir.join(WRITTEN_FILE)).unwrap_or_default();
        for companion in companions.lines().map(str::to_owned) {
            if written.contains(&companion) {
                continue;
            }
            let to = stage.join(&companion);
            fs::copy(record.dir.join(&companion), &to).map_err(RegistryError::io(&to))?;
            File::open(&to).and_then(|file| file.sync_all()).map_err(RegistryError::io(&to))?;
            written.push(companion);
        }
        if cache {
            let marker = stage.join(CACHE_FILE);
            fs::write(&marker, "").map_err(RegistryError::io(&marker))?;
            written.push(CACHE_FILE.to_owned());
        }
        let list = stage.join(WRITTEN_FILE);
        fs::write(&list, written.join("\n") + "\n").map_err(RegistryError::io(&list))?;
        manifest.write(&stage).map_err(RegistryError::checkpoint)?;
        fs::rename(&stage, &target).map_err(RegistryError::io(&target))?;
        File::open(self.dir()).and_then(|dir| dir.sync_all()).map_err(RegistryError::io(self.dir()))?;
        let manifest = Manifest::read(&target)?;
        Ok(Entry { name: name.clone(), dir: target, manifest })
    }

    /// Has a model that landed as a cached copy stay: it is not evicted any more.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn keep(&self, name: &ModelName) -> Result<(), RegistryError> {
        let marker = self.model_dir(name)?.join(CACHE_FILE);
        match fs::remove_file(&marker) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RegistryError::io(&marker)(e)),
            _ => Ok(()),
        }
    }
}

/// Fetches what a record consists of into a directory of its own: its weight files, every file's name, and the revision.
async fn stage_record(
    stage: &Path,
    source: &PinnedSource,
    stores: &RemoteStores,
    remote: &Remote,
) -> Result<(Vec<Weights>, Vec<String>, Option<String>), Stop> {
    let Objects { revision, mut weights, companions } = find(&source.uri, stores, remote).await?;
    if let (Some(pinned), [only]) = (&source.sha256, &mut weights[..]) {
        only.sha256 = Some(pinned.clone());
    }
    remove_dir(stage)?;
    fs::create_dir_all(stage).map_err(RegistryError::io(stage))?;
    let mut written = Vec::new();
    for Weights { name, object, sha256 } in &weights {
        if sha256.is_none() && object.etag.is_none() && object.modified_ms.is_none() {
            return Err(SourceError::from(RemoteError::NoVersion { url: object.url.clone() }).into());
        }
        let path = stage.join(name);
        let head = header(&path, object, stores).await?;
        stub(&path, &head, object.len).map_err(RegistryError::io(&path))?;
        written.push(name.clone());
    }
    for (name, bytes) in companions {
        let path = stage.join(&name);
        fs::write(&path, bytes).map_err(RegistryError::io(&path))?;
        written.push(name);
    }
    Ok((weights, written, revision))
}

/// A file of `len` bytes with nothing but its head.
fn stub(path: &Path, head: &[u8], len: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(head)?;
    file.set_len(len)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// The beginning of a weight file, up to its tensors at least.
async fn header(path: &Path, object: &RemoteObject, stores: &RemoteStores) -> Result<Vec<u8>, Stop> {
    let mut head = fetch_head(stores, object, HEAD_BYTES).await?;
    if !is_gguf(path) {
        let Some(len) = head.first_chunk::<8>().map(|len| u64::from_le_bytes(*len)) else {
            return Ok(head);
        };
        // How long a header may be is for the format's reader to say, which then reads it once more.
        let needed = len.saturating_add(8);
        if needed > head.len() as u64 && needed <= gguf::HEADER_BYTES_MAX {
            head = fetch_head(stores, object, needed).await?;
        }
        return Ok(head);
    }
    loop {
        let read = gguf::Header::read(path, &head[..], object.len);
        let short =
            matches!(read, Err(CheckpointError::Truncated { .. })) && (head.len() as u64) < object.len;
        if !short || head.len() as u64 >= gguf::HEADER_BYTES_MAX {
            // Another error is said when the stub is indexed.
            return Ok(head);
        }
        let more = (head.len() as u64 * 4).min(gguf::HEADER_BYTES_MAX);
        head = fetch_head(stores, object, more).await?;
    }
}

async fn fetch_head(stores: &RemoteStores, object: &RemoteObject, bytes: u64) -> Result<Vec<u8>, Stop> {
    if object.len == 0 {
        return Ok(Vec::new());
    }
    Ok(stores.range(object, 0..bytes.min(object.len)).await.map_err(SourceError::from)?)
}

/// What a source has.
async fn find(source: &SourceUri, stores: &RemoteStores, remote: &Remote) -> Result<Objects, Stop> {
    match source {
        SourceUri::Hub { repository, revision, file } => {
            let listed = hub::objects(remote, repository, revision.as_deref(), file.as_deref()).await?;
            let mut objects =
                Objects { revision: Some(listed.commit), weights: Vec::new(), companions: Vec::new() };
            for HubFile { name, url, len, sha256 } in listed.files {
                let url = url.as_str();
                if COMPANIONS.contains(&name.as_str()) || name.ends_with(".index.json") {
                    let small = stores.small(url, COMPANION_MAX).await.map_err(SourceError::from)?;
                    objects.companions.extend(small.map(|(_, bytes)| (name, bytes)));
                    continue;
                }
                let object = stores.head(url).await.map_err(SourceError::from)?;
                if let Some(len) = len.filter(|len| *len != object.len) {
                    let problem = format!("has {} bytes instead of {len}", object.len);
                    return Err(SourceError::Malformed { what: object.url, problem }.into());
                }
                objects.weights.push(Weights { name, object, sha256 });
            }
            Ok(objects)
        }
        SourceUri::Url(url) | SourceUri::Object(url) => find_objects(url, stores).await,
        SourceUri::Package { .. } | SourceUri::Local(_) => {
            let problem = "it can only be pulled as a whole".to_owned();
            Err(SourceError::NoFile { problem }.into())
        }
    }
}

/// A weight file, or what is below a prefix.
async fn find_objects(url: &str, stores: &RemoteStores) -> Result<Objects, Stop> {
    let whole = |object: RemoteObject, name: &str| Weights { name: name.to_owned(), object, sha256: None };
    let (base, name) = url.trim_end_matches('/').rsplit_once('/').unwrap_or((url, ""));
    if is_gguf(Path::new(name)) {
        let mut weights = Vec::new();
        for part in hub::parts_of(name).unwrap_or_else(|| vec![name.to_owned()]) {
            let object = stores.head(&format!("{base}/{part}")).await.map_err(SourceError::from)?;
            weights.push(whole(object, &part));
        }
        return Ok(Objects { revision: None, weights, companions: Vec::new() });
    }
    let base = url.trim_end_matches('/');
    let at = |name: &str| format!("{base}/{name}");
    let listed = if RemoteStores::can_list(base) {
        Some(stores.list(&format!("{base}/")).await.map_err(SourceError::from)?)
    } else {
        None
    };
    let known = |name: &str| {
        let url = at(name);
        listed.as_ref().map(|objects| objects.iter().find(|object| object.url == url).cloned())
    };
    let mut objects = Objects { revision: None, weights: Vec::new(), companions: Vec::new() };
    let index_name = "model.safetensors.index.json";
    for name in COMPANIONS.iter().copied().chain([index_name]) {
        // What a listing doesn't have need not be asked for.
        if known(name).is_some_and(|object| object.is_none()) {
            continue;
        }
        let small = stores.small(&at(name), COMPANION_MAX).await.map_err(SourceError::from)?;
        objects.companions.extend(small.map(|(_, bytes)| (name.to_owned(), bytes)));
    }
    let names: Vec<String> =
        if let Some((_, index)) = objects.companions.iter().find(|(n, _)| n == index_name) {
            let index = ShardIndex::parse(Path::new(index_name), index).map_err(SourceError::from)?;
            index.shards.into_keys().collect()
        } else if let Some(listed) = &listed {
            choose(base, listed)?
        } else {
            vec!["model.safetensors".to_owned()]
        };
    if names.len() > FILES_MAX {
        let problem = format!("{base}: {} weight files", names.len());
        return Err(SourceError::NoFile { problem }.into());
    }
    for name in names {
        hub::local_name(&name)?;
        let object = match known(&name).flatten() {
            Some(object) => object,
            None => stores.head(&at(&name)).await.map_err(SourceError::from)?,
        };
        objects.weights.push(whole(object, &name));
    }
    Ok(objects)
}

/// The weight files among what is below a prefix, when no index names them.
fn choose(base: &str, listed: &[RemoteObject]) -> Result<Vec<String>, SourceError> {
    let names = || listed.iter().filter_map(|object| object.url.rsplit('/').next());
    let of =
        |extension: &'static str| names().filter(move |name| name.ends_with(extension)).map(str::to_owned);
    let mut safetensors: Vec<String> = of(".safetensors").collect();
    let ggufs: Vec<String> = of(".gguf").collect();
    if safetensors.iter().any(|name| name == "model.safetensors") {
        safetensors.retain(|name| name == "model.safetensors");
    }
    match (&safetensors[..], &ggufs[..]) {
        ([_], []) => Ok(safetensors),
        ([], [_]) => Ok(ggufs),
        ([], [first, ..]) if hub::parts_of(first).is_some_and(|parts| parts.len() == ggufs.len()) => {
            Ok(ggufs)
        }
        ([], []) => Err(SourceError::NoFile {
            problem: format!("{base}: no *.safetensors and no *.gguf object directly below it"),
        }),
        _ => Err(SourceError::NoFile {
            problem: format!("{base}: several weight files and no index; name the file"),
        }),
    }
}

impl From<RemoteError> for SourceError {
    fn from(error: RemoteError) -> Self {
        Self::Remote(Box::new(error))
    }
}
