//! Manifests on disk: read, checked, written atomically.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor},
};
use stoker_types::FileChange;

use super::{
    CHUNK_BYTES, ChunkSum, FileIdentity, Format, MANIFEST_VERSION, Manifest, Origin, Source, TokenizerFiles,
    Trust,
};
use crate::{CheckpointError, ModelConfig, error::shown, gguf, json, names};

/// A manifest's file name.
pub const FILE_NAME: &str = "stoker.json";

/// Manifests beyond this are absurd: a hundred thousand tensors take 20 MB.
const BYTES_MAX: u64 = 256 << 20;

/// What a list of models needs to know of one: everything but tensors and checksums.
#[derive(Debug, Clone, PartialEq)]
pub struct ManifestSummary {
    /// Where it came from.
    pub source: Source,
    /// What is known about its bytes before they are read.
    pub trust: Trust,
    /// Kind of weight file.
    pub format: Format,
    /// Its configuration; `None` when it can't be computed.
    pub config: Option<ModelConfig>,
    /// Why the engine can't run it; `None` when it can.
    pub refusal: Option<String>,
    /// Weight files.
    pub files: Vec<FileSummary>,
}

/// A weight file, without its sums.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct FileSummary {
    /// Path: relative to the model's directory, or absolute.
    pub path: PathBuf,
    /// Length, time and inode when it was indexed.
    pub identity: FileIdentity,
    /// Where it came from, when it can be had again from there.
    #[serde(default)]
    pub origin: Option<Origin>,
}

/// Length, modification time and inode of a file, symbolic links followed.
///
/// # Errors
/// When the operating system refuses.
pub fn identity_of(path: &Path) -> Result<FileIdentity, CheckpointError> {
    let metadata = fs::metadata(path).map_err(CheckpointError::io(path))?;
    Ok(FileIdentity {
        len: metadata.len(),
        mtime_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        inode: metadata.ino(),
    })
}

// === impl Manifest ===

impl Manifest {
    /// Reads and checks the manifest in a model's directory.
    ///
    /// # Errors
    /// When it can't be read, is of another version, or contradicts itself. Whether the weight files are still the same
    /// is not looked at: that is [`Manifest::changed_files`].
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(FILE_NAME);
        Self::parse(&path, &json::read(&path, BYTES_MAX)?)
    }

    /// Reads and checks a manifest from its bytes; `path` is for messages.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        // The version first: another version's fields may be others.
        let Version { version } = json::parse(path, bytes)?;
        check_version(path, version)?;
        let manifest: Self = json::parse(path, bytes)?;
        manifest.validate(path)?;
        Ok(manifest)
    }

    /// Writes the manifest into a model's directory, atomically and durably: a reader, or a machine that comes back from
    /// a power cut, sees the old or the new one whole. Paths inside of `dir` become relative to it, so that the directory
    /// can be moved.
    ///
    /// # Errors
    /// When the operating system refuses (the disk is full, the directory can't be written); nothing is left behind.
    pub fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let mut portable = self.clone();
        for file in &mut portable.files {
            file.path = relative_to(dir, &file.path);
        }
        if let TokenizerFiles::HuggingFace { dir: tokenizer } = &mut portable.tokenizer {
            *tokenizer = relative_to(dir, tokenizer);
        }
        let path = dir.join(FILE_NAME);
        let mut bytes = serde_json::to_vec(&portable)
            .map_err(|source| CheckpointError::Json { file: path.clone(), source })?;
        bytes.push(b'\n');
        write_atomically(&path, &bytes)
    }

    /// The weight files that are not those that were indexed, and how they differ.
    #[must_use]
    pub fn changed_files(&self, dir: &Path) -> Vec<(PathBuf, FileChange)> {
        let mut changed = Vec::new();
        for file in &self.files {
            let path = dir.join(&file.path);
            if let Some(change) = file.identity.change(identity_of(&path).ok().as_ref()) {
                changed.push((path, change));
            }
        }
        changed
    }

    /// Records the sums of a weight file's chunks, learned while it was read. When every file has its sums, the trust
    /// level becomes [`Trust::Chunk`].
    ///
    /// # Errors
    /// When there is no such file, the number of sums is not that of its chunks, or sums are there already and differ.
    pub fn record_sums(&mut self, file: usize, sums: Vec<ChunkSum>) -> Result<(), CheckpointError> {
        let Some(known) = self.files.get_mut(file) else {
            let problem = format!("there is no weight file {file}");
            return Err(CheckpointError::BadManifest { file: PathBuf::from(FILE_NAME), problem });
        };
        let bad = |problem| CheckpointError::BadManifest { file: known.path.clone(), problem };
        let chunks = known.identity.len.div_ceil(CHUNK_BYTES);
        if sums.len() as u64 != chunks {
            return Err(bad(format!("{} sums for {chunks} chunks", sums.len())));
        }
        if !known.chunk_sums.is_empty() {
            let Some(chunk) = known.chunk_sums.iter().zip(&sums).position(|(a, b)| a != b) else {
                return Ok(());
            };
            let (was, is) = (known.chunk_sums[chunk], sums[chunk]);
            return Err(bad(format!("chunk {chunk}: the sum was {was} and now is {is}")));
        }
        known.chunk_sums = sums;
        if self.files.iter().all(|f| !f.chunk_sums.is_empty() || f.identity.len == 0) {
            self.trust = Trust::Chunk;
        }
        Ok(())
    }

    /// Checks everything that other code relies on.
    fn validate(&self, path: &Path) -> Result<(), CheckpointError> {
        let bad = |problem: String| CheckpointError::BadManifest { file: path.to_owned(), problem };
        for file in &self.files {
            let shown_path = shown(&file.path.to_string_lossy());
            if !stays_inside(&file.path) {
                return Err(bad(format!("path `{shown_path}` leads out of the model's directory")));
            }
            let chunks = file.identity.len.div_ceil(CHUNK_BYTES);
            let sums = file.chunk_sums.len() as u64;
            if sums != chunks && (sums != 0 || self.trust == Trust::Chunk) {
                return Err(bad(format!("`{shown_path}` has {sums} sums for {chunks} chunks")));
            }
            let hex =
                |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            if self.trust == Trust::File && sums == 0 && chunks > 0 && file.sha256.is_none() {
                return Err(bad(format!(
                    "`{shown_path}` has neither a hash nor sums, in spite of the trust level"
                )));
            }
            if file.sha256.as_deref().is_some_and(|text| !hex(text)) {
                return Err(bad(format!("the sha256 of `{shown_path}` is not 64 hexadecimal digits")));
            }
        }
        if let TokenizerFiles::HuggingFace { dir } = &self.tokenizer
            && !stays_inside(dir)
        {
            return Err(bad("the tokenizer's path leads out of the model's directory".to_owned()));
        }
        for tensor in &self.tensors {
            let name = shown(&tensor.name);
            let Some(file) = self.files.get(tensor.file as usize) else {
                return Err(bad(format!("tensor `{name}` is in file {}, which isn't there", tensor.file)));
            };
            if gguf::bytes_of(tensor.dtype, &tensor.shape) != Some(tensor.len) {
                return Err(bad(format!("the length of tensor `{name}` doesn't follow from its shape")));
            }
            if tensor.offset.checked_add(tensor.len).is_none_or(|end| end > file.identity.len) {
                return Err(bad(format!("tensor `{name}` ends beyond its file")));
            }
        }
        match (&self.config, &self.refusal) {
            (Some(config), None) => {
                config.validate().map_err(|e| bad(e.to_string()))?;
                let file_of = |_: &_| path.to_owned();
                names::check(self.format, config, &self.tensors, file_of, path)
            }
            (None, Some(_)) => Ok(()),
            _ => Err(bad("a model has either a configuration or a reason why it can't run".to_owned())),
        }
    }
}

fn check_version(path: &Path, found: u32) -> Result<(), CheckpointError> {
    if found == MANIFEST_VERSION {
        return Ok(());
    }
    Err(CheckpointError::UnsupportedVersion {
        file: path.to_owned(),
        what: "manifest",
        found,
        supported: "1",
    })
}

/// Whether a path is absolute (a file that is only referenced) or stays below the directory that it is joined to.
fn stays_inside(path: &Path) -> bool {
    path.is_absolute() || path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
}

fn relative_to(dir: &Path, path: &Path) -> PathBuf {
    let inside = std::path::absolute(dir).ok().and_then(|dir| Some(path.strip_prefix(dir).ok()?.to_owned()));
    match inside {
        Some(empty) if empty.as_os_str().is_empty() => PathBuf::from("."),
        Some(inside) => inside,
        None => path.to_owned(),
    }
}

/// Writes a file through a temporary one in the same directory.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{unique}.tmp", std::process::id()));
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if result.is_err() {
        // Best effort: the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    result.map_err(CheckpointError::io(path))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Makes a rename in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(CheckpointError::io(dir))
}

// === impl ManifestSummary ===

/// Most manifests' summaries end before this.
const HEAD_BYTES: usize = 8 << 10;

impl ManifestSummary {
    /// Reads the summary of the manifest in a model's directory: one small read, however many tensors there are.
    ///
    /// # Errors
    /// When it can't be read, is of another version, or its configuration is out of range. Tensors are not checked.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(FILE_NAME);
        let file = File::open(&path).map_err(CheckpointError::io(&path))?;
        let mut head = Vec::with_capacity(HEAD_BYTES);
        file.take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(CheckpointError::io(&path))?;
        match Self::parse(&path, &head) {
            // The head is cut off: perhaps before the summary's end.
            Err(CheckpointError::Json { source, .. }) if source.is_eof() && head.len() == HEAD_BYTES => {
                Self::parse(&path, &json::read(&path, BYTES_MAX)?)
            }
            result => result,
        }
    }

    /// Reads a summary from the bytes of a manifest, which may be cut off after the summary; `path` is for messages.
    ///
    /// # Errors
    /// As [`ManifestSummary::read`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let mut parts = Parts::default();
        let result = SummarySeed(&mut parts).deserialize(&mut serde_json::Deserializer::from_slice(bytes));
        if let Some(version) = parts.version {
            check_version(path, version)?;
        }
        // The tensors are left unread, which the parser calls an error; it doesn't matter once everything is there.
        let Some(summary) = parts.complete() else {
            let source = result
                .err()
                .unwrap_or_else(|| serde::de::Error::custom("not a manifest: fields are missing"));
            return Err(CheckpointError::Json { file: path.to_owned(), source });
        };
        if let Some(config) = &summary.config {
            config.validate().map_err(|e| CheckpointError::BadManifest {
                file: path.to_owned(),
                problem: e.to_string(),
            })?;
        }
        Ok(summary)
    }

    /// Bytes of all weight files.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, f| sum.saturating_add(f.identity.len))
    }

    /// Bytes that its chunks take in a pool of chunks of `chunk_bytes`.
    #[must_use]
    pub fn pool_bytes(&self, chunk_bytes: u64) -> u64 {
        let rounded = |len: u64| len.div_ceil(chunk_bytes).saturating_mul(chunk_bytes);
        self.files.iter().fold(0, |sum, f| sum.saturating_add(rounded(f.identity.len)))
    }
}

/// A summary's fields, as far as they were met.
#[derive(Default)]
struct Parts {
    version: Option<u32>,
    source: Option<Source>,
    trust: Option<Trust>,
    format: Option<Format>,
    config: Option<Option<ModelConfig>>,
    refusal: Option<Option<String>>,
    files: Option<Vec<FileSummary>>,
}

struct SummarySeed<'a>(&'a mut Parts);

impl Parts {
    fn is_complete(&self) -> bool {
        self.version.is_some()
            && self.source.is_some()
            && self.trust.is_some()
            && self.format.is_some()
            && self.config.is_some()
            && self.refusal.is_some()
            && self.files.is_some()
    }

    fn complete(self) -> Option<ManifestSummary> {
        self.version?;
        Some(ManifestSummary {
            source: self.source?,
            trust: self.trust?,
            format: self.format?,
            config: self.config?,
            refusal: self.refusal?,
            files: self.files?,
        })
    }
}

impl<'de> DeserializeSeed<'de> for SummarySeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for SummarySeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let parts = self.0;
        while !parts.is_complete() {
            let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? else {
                // What is absent is null.
                parts.config.get_or_insert(None);
                parts.refusal.get_or_insert(None);
                break;
            };
            match &*key {
                "version" => parts.version = Some(map.next_value()?),
                "source" => parts.source = Some(map.next_value()?),
                "trust" => parts.trust = Some(map.next_value()?),
                "format" => parts.format = Some(map.next_value()?),
                "config" => parts.config = Some(map.next_value()?),
                "refusal" => parts.refusal = Some(map.next_value()?),
                "files" => parts.files = Some(map.next_value()?),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}
