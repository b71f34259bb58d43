//! The models directory.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use stoker_checkpoint::{ChunkSum, Manifest, ManifestSummary, Source, manifest::FILE_NAME};
use stoker_types::{ByteSize, ModelName};

use crate::{
    error::{RegistryError, nearest},
    lock::ModelLock,
    name,
    pull::remove_dir,
};

/// Everything that is under way.
const PARTIAL: &str = ".partial";
/// In a model's directory: the files that Stoker wrote there besides the manifest, one name a line.
pub(crate) const WRITTEN_FILE: &str = ".stoker-files";

/// In a model's directory: it is a copy of what is elsewhere, and may go when room is needed.
pub(crate) const CACHE_FILE: &str = ".stoker-cache";

/// A models directory. A cheap handle; every call reads what is on disk, so that several processes agree.
#[derive(Debug, Clone)]
pub struct Registry {
    dir: PathBuf,
}

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: ModelName,
    /// Its directory, to which the manifest's paths are relative.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Listing {
    /// The model's name.
    pub name: ModelName,
    /// Its directory.
    pub dir: PathBuf,
    /// What is there.
    pub what: Listed,
}

/// What a model's directory holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Listed {
    /// A model; perhaps one that can't run: see [`ManifestSummary::refusal`].
    Known(Box<ManifestSummary>),
    /// Something that can't be read.
    Broken {
        /// Why.
        why: String,
    },
}

/// Files that Stoker wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Somebody asked for them.
    Kept,
    /// A copy that may go when room is needed.
    Cache,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Bytes of the files that were deleted.
    pub freed: ByteSize,
    /// Weight files that are only referenced, and files in the model's directory that Stoker didn't write: still there.
    pub kept: Vec<PathBuf>,
}

// === impl Registry ===

impl Registry {
    /// The models directory `dir`, which is made if it isn't there.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, RegistryError> {
        let dir = dir.into();
        let dir = std::path::absolute(&dir).map_err(RegistryError::io(&dir))?;
        fs::create_dir_all(&dir).map_err(RegistryError::io(&dir))?;
        Ok(Self { dir })
    }

    /// The directory itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All models, by name. Reads a summary of each: about 30 us a model. A model that can't be read is in the list and
    /// hides no other.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn list(&self) -> Result<Vec<Listing>, RegistryError> {
        let mut list = Vec::new();
        for (name, dir) in self.directories()? {
            let what = match ManifestSummary::read(&dir) {
                Ok(summary) => Listed::Known(Box::new(summary)),
                Err(error) => Listed::Broken { why: error.to_string() },
            };
            list.push(Listing { name, dir, what });
        }
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// One model.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] with the nearest names; [`RegistryError::Broken`].
    pub fn get(&self, name: &ModelName) -> Result<Entry, RegistryError> {
        let Ok(dir) = self.model_dir(name) else { return Err(self.not_found(name)) };
        if !dir.join(FILE_NAME).exists() {
            return Err(self.not_found(name));
        }
        match Manifest::read(&dir) {
            Ok(manifest) => Ok(Entry { name: name.clone(), dir, manifest }),
            Err(error) => Err(RegistryError::Broken { name: name.clone(), why: error.to_string() }),
        }
    }

    /// Registers a GGUF file or a safetensors folder where it is: headers are read, nothing is copied or changed.
    ///
    /// # Errors
    /// [`RegistryError::AlreadyExists`]; [`RegistryError::Checkpoint`] when the files are no model. One that the engine
    /// can't run is registered all the same: its manifest says why.
    pub fn add_reference(&self, name: &ModelName, path: &Path) -> Result<Entry, RegistryError> {
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        match self.get(name) {
            Ok(entry) => {
                let source_uri = entry.manifest.source.uri;
                Err(RegistryError::AlreadyExists { name: name.clone(), source_uri })
            }
            Err(RegistryError::NotFound { .. }) => self.reference(name, path),
            Err(error) => Err(error),
        }
    }

    /// As [`Registry::add_reference`], for a caller that holds the lock and knows that the name is free.
    pub(crate) fn reference(&self, name: &ModelName, path: &Path) -> Result<Entry, RegistryError> {
        let path = std::path::absolute(path).map_err(RegistryError::io(path))?;
        let source = Source { uri: path.display().to_string(), revision: None };
        let manifest = stoker_checkpoint::index(&path, source)?;
        let dir = self.model_dir(name)?;
        fs::create_dir_all(&dir).map_err(RegistryError::io(&dir))?;
        if let Err(error) = manifest.write(&dir) {
            // Only if nothing is in it.
            let _ = fs::remove_dir(&dir);
            return Err(RegistryError::checkpoint(error));
        }
        Ok(Entry { name: name.clone(), dir, manifest })
    }

    /// Removes a model: its manifest, and the files that Stoker wrote. A file that is only referenced, or that somebody
    /// else put into the model's directory, is never deleted. What arrived of an unfinished pull goes too.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the operating system refuses.
    pub fn remove(&self, name: &ModelName) -> Result<Removed, RegistryError> {
        let Ok(dir) = self.model_dir(name) else { return Err(self.not_found(name)) };
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        let staging = self.staging(name)?;
        let had_partial = staging.exists();
        remove_dir(&staging)?;
        let manifest_path = dir.join(FILE_NAME);
        if !manifest_path.exists() {
            return if had_partial {
                Ok(Removed { freed: ByteSize(0), kept: Vec::new() })
            } else {
                Err(self.not_found(name))
            };
        }
        let mut kept: Vec<PathBuf> = match Manifest::read(&dir) {
            Ok(manifest) => {
                manifest.files.into_iter().map(|f| f.path).filter(|path| path.is_absolute()).collect()
            }
            Err(_) => Vec::new(),
        };
        let written = fs::read_to_string(dir.join(WRITTEN_FILE)).unwrap_or_default();
        let mut freed = 0;
        // The manifest first: from here on it is no model, whatever happens.
        for file in [FILE_NAME].into_iter().chain(written.lines()).chain([WRITTEN_FILE]) {
            if !matches!(Path::new(file).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
                continue;
            }
            let path = dir.join(file);
            let len = fs::symlink_metadata(&path).map_or(0, |m| m.len());
            match fs::remove_file(&path) {
                Ok(()) => freed += len,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(RegistryError::io(&path)(e)),
            }
        }
        match fs::remove_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                for entry in fs::read_dir(&dir).map_err(RegistryError::io(&dir))? {
                    kept.push(entry.map_err(RegistryError::io(&dir))?.path());
                }
            }
            result => result.map_err(RegistryError::io(&dir))?,
        }
        Ok(Removed { freed: ByteSize(freed), kept })
    }

    /// Records the sums of a weight file's chunks, learned while it was loaded.
    ///
    /// # Errors
    /// When there is no such model or file, or other sums are known already.
    pub fn record_sums(
        &self,
        name: &ModelName,
        file: usize,
        sums: Vec<ChunkSum>,
    ) -> Result<Entry, RegistryError> {
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        let mut entry = self.get(name)?;
        entry.manifest.record_sums(file, sums)?;
        entry.manifest.write(&entry.dir).map_err(RegistryError::checkpoint)?;
        Ok(entry)
    }

    /// Indexes a model anew whose files were replaced since it was added. `None`: nothing was.
    ///
    /// # Errors
    /// When there is no such model, or the files are none any more.
    pub fn reindex_changed(&self, name: &ModelName) -> Result<Option<Entry>, RegistryError> {
        let _lock = ModelLock::blocking(&self.lock_path(name)?)?;
        let entry = self.get(name)?;
        if entry.manifest.changed_files(&entry.dir).is_empty() {
            return Ok(None);
        }
        index_anew(&entry).map(Some)
    }

    /// Whether Stoker wrote a model's files here, and whether it may remove them for room.
    #[must_use]
    pub fn is_written(&self, name: &ModelName) -> Option<Written> {
        let dir = self.model_dir(name).ok()?;
        dir.join(WRITTEN_FILE)
            .exists()
            .then(|| if dir.join(CACHE_FILE).exists() { Written::Cache } else { Written::Kept })
    }

    /// The directory of a model.
    pub(crate) fn model_dir(&self, name: &ModelName) -> Result<PathBuf, RegistryError> {
        match name::directory(name) {
            Some(directory) => Ok(self.dir.join(directory)),
            None => Err(RegistryError::NameTooLong { name: name.clone() }),
        }
    }

    /// Where what is under way for a model is kept.
    pub(crate) fn staging(&self, name: &ModelName) -> Result<PathBuf, RegistryError> {
        let dir = self.model_dir(name)?;
        Ok(self.dir.join(PARTIAL).join(dir.file_name().unwrap_or_default()))
    }

    pub(crate) fn lock_path(&self, name: &ModelName) -> Result<PathBuf, RegistryError> {
        // Names of models and of locks don't meet: `%` in a directory's name is always followed by two digits.
        let mut path = self.staging(name)?.into_os_string();
        path.push("%lock");
        Ok(path.into())
    }

    /// Apart from the lock of what is in the model's directory, which whoever pulls takes and gives back meanwhile.
    pub(crate) fn pull_lock_path(&self, name: &ModelName) -> Result<PathBuf, RegistryError> {
        let mut path = self.staging(name)?.into_os_string();
        path.push("%pull");
        Ok(path.into())
    }

    pub(crate) fn not_found(&self, name: &ModelName) -> RegistryError {
        let known: Vec<ModelName> =
            self.directories().unwrap_or_default().into_iter().map(|(name, _)| name).collect();
        RegistryError::NotFound { name: name.clone(), nearest: nearest(name, known.iter()) }
    }

    /// The directories that are models'.
    fn directories(&self) -> Result<Vec<(ModelName, PathBuf)>, RegistryError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(RegistryError::io(&self.dir))? {
            let entry = entry.map_err(RegistryError::io(&self.dir))?;
            let Some(name) = entry.file_name().to_str().and_then(name::model) else { continue };
            let path = entry.path();
            // A directory without a manifest holds what somebody else put there.
            if path.join(FILE_NAME).exists() {
                found.push((name, path));
            }
        }
        Ok(found)
    }
}

/// Indexes the files of a model as they are now and writes the new manifest.
pub(crate) fn index_anew(entry: &Entry) -> Result<Entry, RegistryError> {
    let old = &entry.manifest;
    let first = old.files.first().map(|file| entry.dir.join(&file.path));
    let path = match (old.format, first) {
        // With its own manifest, which knows its sums.
        (_, Some(file)) if old.packed.is_some() => file.parent().map_or(entry.dir.clone(), Path::to_owned),
        (stoker_checkpoint::Format::Gguf, Some(file)) => file,
        (_, Some(file)) if old.files.len() == 1 => file,
        (_, Some(file)) => file.parent().map_or(entry.dir.clone(), Path::to_owned),
        (_, None) => entry.dir.clone(),
    };
    let manifest = stoker_checkpoint::index(&path, old.source.clone())?;
    manifest.write(&entry.dir).map_err(RegistryError::checkpoint)?;
    let manifest = Manifest::read(&entry.dir)?;
    Ok(Entry { name: entry.name.clone(), dir: entry.dir.clone(), manifest })
}
