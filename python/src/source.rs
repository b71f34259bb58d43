//! From paths to files and tensors: headers only.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use stoker_checkpoint::{
    CheckpointError, FileIdentity, Manifest, Source, Trust, identity_of, manifest, safetensors,
};
use stoker_store::{CheckpointFiles, FileRange, Shard, SliceError, SourceFile, TensorPart};
use stoker_types::{DType, ModelName};

use crate::error::Error;

/// Names of pickled files' kinds.
const PICKLES: [&str; 6] = ["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

/// Files with weights, and the tensors in them that are wanted.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) files: Vec<SourceFile>,
    /// In the order in which their bytes are wanted.
    pub(crate) tensors: Vec<Tensor>,
}

/// A tensor of a file.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Of what is wanted of it.
    pub(crate) shape: Vec<u64>,
    /// All of it, in its file.
    pub(crate) range: FileRange,
    /// What is wanted of it; `None`: all.
    pub(crate) part: Option<TensorPart>,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// What is at these paths, together: files, folders, or folders that Stoker has indexed.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, Error> {
        let mut all = Self { files: Vec::new(), tensors: Vec::new() };
        for path in paths {
            let path = std::path::absolute(path).map_err(|e| read_error(path, &e))?;
            let metadata = std::fs::metadata(&path).map_err(|e| read_error(&path, &e))?;
            if metadata.is_dir() { all.add_folder(&path)? } else { all.add_file(&path)? }
        }
        let mut names = HashSet::with_capacity(all.tensors.len());
        if let Some(twice) = all.tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
            return Err(CheckpointError::DuplicateTensor {
                file: all.files[twice.range.file as usize].path.clone(),
                tensor: twice.name.clone(),
            }
            .into());
        }
        Ok(all)
    }

    /// One device's part of a model that is split over several. What its configuration says decides how tensors are cut.
    pub(crate) fn open_shard(
        paths: &[PathBuf],
        names: Option<&[String]>,
        (rank, world): (u32, u32),
    ) -> Result<Self, Error> {
        let [path] = paths else {
            let words = "shard= needs a model's folder, whose configuration says how it is split";
            return Err(Error::NotSupported(words.to_owned()));
        };
        let manifest = match Manifest::read(path) {
            Ok(manifest) if manifest.changed_files(path).is_empty() => manifest,
            _ => stoker_checkpoint::index(path, Source { uri: path.display().to_string(), revision: None })?,
        };
        Self::of_shard(path, manifest, names, (rank, world))
    }

    /// As [`Self::open_shard`], of a manifest.
    pub(crate) fn of_shard(
        dir: &Path,
        mut manifest: Manifest,
        names: Option<&[String]>,
        (rank, world): (u32, u32),
    ) -> Result<Self, Error> {
        if let Some(names) = names {
            let mut all = Self::of_manifest(dir, &manifest);
            all.keep(names)?;
            let kept: HashSet<&str> = all.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
            manifest.tensors.retain(|tensor| kept.contains(tensor.name.as_str()));
        }
        let cannot = |error: SliceError| Error::NotSupported(error.to_string());
        let shard = Shard::new(rank, world).map_err(cannot)?;
        let parts = shard.of_manifest(&manifest).map_err(cannot)?;
        let mut all = Self::of_manifest(dir, &manifest);
        for (tensor, part) in all.tensors.iter_mut().zip(parts) {
            tensor.shape.clone_from(&part.shape);
            tensor.part = Some(part);
        }
        Ok(all)
    }

    /// Of a manifest, whose files lie in or are named from `dir`.
    pub(crate) fn of_manifest(dir: &Path, manifest: &Manifest) -> Self {
        let mut all = Self { files: Vec::new(), tensors: Vec::new() };
        all.add_manifest(dir, manifest);
        all
    }

    /// Leaves only these tensors.
    pub(crate) fn keep(&mut self, names: &[String]) -> Result<(), Error> {
        let wanted: HashSet<&str> = names.iter().map(String::as_str).collect();
        let there: HashSet<&str> = self.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let missing: Vec<&str> = wanted.difference(&there).copied().collect();
        if let Some(first) = missing.iter().min() {
            let more = match missing.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let message = format!("no tensor `{first}`{more} among the {} that are there", there.len());
            return Err(Error::not_found(message));
        }
        self.tensors.retain(|tensor| wanted.contains(tensor.name.as_str()));
        Ok(())
    }

    /// The chunks that its tensors lie in.
    pub(crate) fn chunks(&self, name: ModelName, chunk_bytes: u64) -> Result<CheckpointFiles, Error> {
        let mut files = self.files.clone();
        if chunk_bytes != manifest::CHUNK_BYTES {
            files.iter_mut().for_each(|file| file.chunk_sums.clear());
        }
        let whole = CheckpointFiles::new(name, files, Trust::None, chunk_bytes, [])?;
        Ok(whole.part(self.tensors.iter().map(Tensor::touched)))
    }

    fn add_folder(&mut self, dir: &Path) -> Result<(), Error> {
        if dir.join(manifest::FILE_NAME).is_file() {
            let manifest = Manifest::read(dir)?;
            // What was replaced since is read as it is now.
            if manifest.changed_files(dir).is_empty() {
                self.add_manifest(dir, &manifest);
                return Ok(());
            }
        }
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return self.add_safetensors(&single, None);
        }
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            return self.add_sharded(dir, &index);
        }
        let entries = std::fs::read_dir(dir).map_err(|e| read_error(dir, &e))?;
        let mut files = Vec::new();
        for entry in entries {
            files.push(entry.map_err(|e| read_error(dir, &e))?.path());
        }
        files.sort();
        let of = |kind: &[&str]| -> Vec<PathBuf> {
            let is = |path: &&PathBuf| extension(path).is_some_and(|e| kind.contains(&e.as_str()));
            files.iter().filter(is).cloned().collect()
        };
        let (safetensors, ggufs, pickles) = (of(&["safetensors"]), of(&["gguf"]), of(&PICKLES));
        match (&safetensors[..], &ggufs[..], &pickles[..]) {
            ([], [], []) => {
                let message = format!("{}: no *.safetensors and no *.gguf file", dir.display());
                Err(Error::NotFound { message, file: Some(dir.into()) })
            }
            ([], [], [pickle, ..]) => Err(Error::Pickle { file: pickle.clone() }),
            ([], [..], _) => self.add_indexed(dir),
            (files, ..) => files.iter().try_for_each(|file| self.add_safetensors(file, None)),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), Error> {
        match extension(path).as_deref() {
            Some("safetensors") => return self.add_safetensors(path, None),
            Some("gguf") => return self.add_indexed(path),
            Some("json") if path.to_string_lossy().ends_with(".safetensors.index.json") => {
                return self.add_sharded(path.parent().unwrap_or(Path::new(".")), path);
            }
            _ => {}
        }
        // The content decides: a name says little, and a pickle is refused under any.
        let mut magic = Vec::new();
        let opened = File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic));
        opened.map_err(|e| read_error(path, &e))?;
        let pickled = matches!(&magic[..], [b'P', b'K', 3, 4] | [0x80, 2..=5, ..]);
        match &magic[..] {
            b"GGUF" => self.add_indexed(path),
            _ if pickled || extension(path).is_some_and(|e| PICKLES.contains(&e.as_str())) => {
                Err(Error::Pickle { file: path.to_owned() })
            }
            // Named by its hash, as the Hugging Face cache does.
            _ => self.add_safetensors(path, None),
        }
    }

    /// One file; of `only` these names, if they are given.
    fn add_safetensors(&mut self, path: &Path, only: Option<&[String]>) -> Result<(), Error> {
        let header = safetensors::Header::open(path)?;
        let file = self.push(path.to_owned(), identity_of(path)?);
        if let Some(only) = only {
            let there: HashSet<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
            if let Some(missing) = only.iter().find(|name| !there.contains(name.as_str())) {
                let (file, tensor) = (path.to_owned(), missing.clone());
                return Err(CheckpointError::MissingTensor { file, tensor }.into());
            }
        }
        self.tensors.extend(header.tensors.into_iter().map(|t| Tensor {
            name: t.name,
            dtype: t.dtype,
            shape: t.shape,
            range: FileRange { file, offset: t.offset, len: t.len },
            part: None,
        }));
        Ok(())
    }

    fn add_sharded(&mut self, dir: &Path, index: &Path) -> Result<(), Error> {
        for (shard, names) in safetensors::ShardIndex::open(index)?.shards {
            let path = dir.join(&shard);
            if !path.is_file() {
                return Err(CheckpointError::MissingShard { file: index.to_owned(), shard }.into());
            }
            self.add_safetensors(&path, Some(&names))?;
        }
        Ok(())
    }

    /// A GGUF file with its parts.
    fn add_indexed(&mut self, path: &Path) -> Result<(), Error> {
        let source = Source { uri: path.display().to_string(), revision: None };
        let manifest = stoker_checkpoint::index(path, source)?;
        self.add_manifest(Path::new("/"), &manifest);
        Ok(())
    }

    fn add_manifest(&mut self, dir: &Path, manifest: &Manifest) {
        let first = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        for file in &manifest.files {
            self.push(dir.join(&file.path), file.identity);
            if let Some(last) = self.files.last_mut() {
                last.chunk_sums.clone_from(&file.chunk_sums);
            }
        }
        self.tensors.extend(manifest.tensors.iter().map(|t| Tensor {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            range: FileRange { file: first + t.file, offset: t.offset, len: t.len },
            part: None,
        }));
    }

    /// A file of which no sum is known.
    fn push(&mut self, path: PathBuf, identity: FileIdentity) -> u32 {
        self.files.push(SourceFile { path, identity, chunk_sums: Vec::new(), sha256: None, origin: None });
        u32::try_from(self.files.len() - 1).unwrap_or(u32::MAX)
    }
}

// === impl Tensor ===

impl Tensor {
    /// Bytes of the file from the first to the last that is wanted.
    fn touched(&self) -> FileRange {
        let Some(part) = &self.part else { return self.range };
        let mut runs = part.runs();
        let first = runs.next();
        let last = runs.last().or(first);
        match (first, last) {
            (Some((begin, _)), Some((end, len))) => {
                FileRange { offset: begin, len: end + len - begin, ..self.range }
            }
            _ => FileRange { len: 0, ..self.range },
        }
    }

    /// Bytes that are wanted.
    pub(crate) fn bytes(&self) -> u64 {
        self.part.as_ref().map_or(self.range.len, TensorPart::bytes)
    }

    /// What is wanted, for a layout.
    pub(crate) fn wanted(&self) -> TensorPart {
        let FileRange { file, offset, len } = self.range;
        let whole = || {
            let (name, dtype, shape) = (self.name.clone(), self.dtype, self.shape.clone());
            TensorPart::whole(&stoker_checkpoint::Tensor {
                name,
                role: None,
                dtype,
                shape,
                file,
                offset,
                len,
            })
        };
        self.part.clone().unwrap_or_else(whole)
    }
}

/// When each tensor is there: bytes of the order's chunks up to the last that it lies in.
pub(crate) fn thresholds(files: &CheckpointFiles, tensors: &[Tensor]) -> Vec<u64> {
    let mut reached = 0;
    let mut at = HashMap::with_capacity(files.order().len());
    for chunk in files.order() {
        let begin = u64::from(chunk.index) * files.chunk_bytes();
        let len = files.files()[chunk.file as usize].identity.len - begin;
        reached += len.min(files.chunk_bytes());
        at.insert((chunk.file, u64::from(chunk.index)), reached);
    }
    let threshold = |tensor: &Tensor| {
        let FileRange { file, offset, len } = tensor.touched();
        let chunks = offset / files.chunk_bytes()..(offset + len).div_ceil(files.chunk_bytes());
        let chunks = if len == 0 { 0..0 } else { chunks };
        chunks.filter_map(|index| at.get(&(file, index))).copied().max().unwrap_or(0)
    };
    tensors.iter().map(threshold).collect()
}

fn extension(path: &Path) -> Option<String> {
    path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase)
}

fn read_error(path: &Path, error: &std::io::Error) -> Error {
    let (message, file) = (format!("{}: {error}", path.display()), Some(path.to_owned()));
    match error.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound { message, file },
        _ => Error::Read { message, file },
    }
}
