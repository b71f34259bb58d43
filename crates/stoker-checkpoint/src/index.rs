//! From a path to a manifest: headers only, nothing rewritten.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    CheckpointError, Format, GenerationDefaults, Manifest, ModelConfig, Source, Tensor, TokenizerFiles,
    Trust, WeightFile,
    config::{self, Support},
    error::shown,
    gguf, json,
    manifest::{FILE_NAME, MANIFEST_VERSION, identity_of},
    names, safetensors,
};

mod generation;

/// More parts than this are absurd.
const PARTS_MAX: u32 = 4096;

/// Indexes the model at `path`: a GGUF file (any part of a split one), a safetensors file with its `config.json` beside
/// it, or a folder with either. Of a folder that `stoker pack` made, its own manifest is taken, sums and all. Paths in the
/// manifest are absolute; [`Manifest::write`] makes those inside of its directory relative.
///
/// A model that the engine can't compute is indexed all the same, with [`Manifest::refusal`].
///
/// # Errors
/// When there is no model, a file can't be read, or what the files say is malformed or contradicts itself.
pub fn index(path: &Path, source: Source) -> Result<Manifest, CheckpointError> {
    let path = std::path::absolute(path).map_err(CheckpointError::io(path))?;
    let metadata = fs::metadata(&path).map_err(CheckpointError::io(&path))?;
    let is = |extension: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension));
    if metadata.is_dir() {
        match packed(&path)? {
            Some(manifest) => Ok(Manifest { source, ..manifest }),
            None => index_folder(&path, source),
        }
    } else if is("gguf") {
        index_gguf(&path, source)
    } else if is("safetensors") {
        index_safetensors(&path, &Weights::Single(path.clone()), source)
    } else {
        Err(no_model(&path, "neither a folder nor a file that ends in .gguf or .safetensors"))
    }
}

/// A folder's safetensors files.
enum Weights {
    Single(PathBuf),
    /// The index.
    Sharded(PathBuf),
}

fn no_model(path: &Path, problem: &str) -> CheckpointError {
    CheckpointError::NotAModel { path: path.to_owned(), problem: problem.to_owned() }
}

/// The manifest of a folder that was packed. Its files may have been copied since: what they hold is known by their sums,
/// so that only their lengths have to be what they were.
fn packed(dir: &Path) -> Result<Option<Manifest>, CheckpointError> {
    let path = dir.join(FILE_NAME);
    if !path.is_file() {
        return Ok(None);
    }
    let mut manifest = Manifest::read(dir)?;
    if manifest.packed.is_none() {
        return Ok(None);
    }
    let bad = |problem: String| CheckpointError::BadManifest { file: path.clone(), problem };
    for file in &mut manifest.files {
        let name = shown(&file.path.to_string_lossy());
        if file.path.is_absolute() {
            return Err(bad(format!("`{name}` is not in the packed folder")));
        }
        file.path = dir.join(&file.path);
        let (was, now) = (file.identity.len, identity_of(&file.path)?);
        if now.len != was {
            let is = now.len;
            return Err(bad(format!(
                "`{name}` has {is} bytes, and had {was} when it was packed; pack it again"
            )));
        }
        file.identity = now;
    }
    if let TokenizerFiles::HuggingFace { dir: tokenizer } = &mut manifest.tokenizer {
        if tokenizer.is_absolute() {
            return Err(bad("the tokenizer is not in the packed folder".to_owned()));
        }
        *tokenizer = std::path::absolute(dir.join(&*tokenizer)).map_err(CheckpointError::io(dir))?;
    }
    Ok(Some(manifest))
}

/// As transformers looks: one file before an index; then whatever single file there is.
fn index_folder(dir: &Path, source: Source) -> Result<Manifest, CheckpointError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return index_safetensors(dir, &Weights::Single(single), source);
    }
    let sharded = dir.join("model.safetensors.index.json");
    if sharded.is_file() {
        return index_safetensors(dir, &Weights::Sharded(sharded), source);
    }
    let mut safetensors = Vec::new();
    let mut ggufs = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::io(dir))? {
        let path = entry.map_err(CheckpointError::io(dir))?.path();
        match path.extension().and_then(OsStr::to_str) {
            Some("safetensors") => safetensors.push(path),
            Some("gguf") => ggufs.push(path),
            _ => {}
        }
    }
    // Of a split file the first part speaks for all.
    ggufs.retain(|path| split_name(path).is_none_or(|split| split.part == 1));
    match (&mut safetensors[..], &ggufs[..]) {
        ([file], []) => index_safetensors(dir, &Weights::Single(std::mem::take(file)), source),
        ([], [file]) => index_gguf(file, source),
        ([], []) => Err(no_model(dir, "no *.safetensors and no *.gguf file")),
        _ => Err(no_model(dir, "several weight files and no index; name the file")),
    }
}

// === safetensors ===

fn index_safetensors(path: &Path, weights: &Weights, source: Source) -> Result<Manifest, CheckpointError> {
    let (Weights::Single(file) | Weights::Sharded(file)) = weights;
    let dir = file.parent().unwrap_or(Path::new("."));
    let config_path = dir.join("config.json");
    let config_bytes = json::read_if_there(&config_path, json::CONFIG_BYTES_MAX)?
        .ok_or_else(|| no_model(path, "there is no config.json beside the weights"))?;
    let support = config::hf::parse(&config_path, &config_bytes)?;

    let mut files = Vec::new();
    let mut tensors = Vec::new();
    match weights {
        Weights::Single(file) => {
            let header = safetensors::Header::open(file)?;
            add_file(&mut files, &mut tensors, file, header.tensors)?;
        }
        Weights::Sharded(index_path) => {
            let index = safetensors::ShardIndex::open(index_path)?;
            if index.shards.is_empty() {
                return Err(no_model(index_path, "the index names no tensor"));
            }
            for (shard, names) in index.shards {
                let file = dir.join(&shard);
                if !file.is_file() {
                    let shard = shown(&shard);
                    return Err(CheckpointError::MissingShard { file: index_path.clone(), shard });
                }
                let header = safetensors::Header::open(&file)?;
                let there: HashSet<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
                if let Some(name) = names.iter().find(|name| !there.contains(name.as_str())) {
                    let (tensor, shard) = (shown(name), shown(&shard));
                    return Err(CheckpointError::ShardDisagrees { file: index_path.clone(), tensor, shard });
                }
                add_file(&mut files, &mut tensors, &file, header.tensors)?;
            }
        }
    }
    let generation = generation::hugging_face(dir, &config_path, &config_bytes, &support)?;
    let tokenizer = if dir.join("tokenizer.json").is_file() {
        TokenizerFiles::HuggingFace { dir: dir.to_owned() }
    } else {
        TokenizerFiles::None
    };
    finish(path, Format::Safetensors, source, support, Indexed { files, tensors, tokenizer, generation })
}

// === GGUF ===

/// What the name of a part of a split file says: `NAME-00002-of-00005.gguf`.
struct Split<'a> {
    stem: &'a str,
    part: u32,
    parts: u32,
}

fn split_name(path: &Path) -> Option<Split<'_>> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, parts) = name.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok()).flatten();
    Some(Split { stem, part: number(part)?, parts: number(parts)? })
}

fn index_gguf(path: &Path, source: Source) -> Result<Manifest, CheckpointError> {
    let parts = parts_of(path)?;
    let first = &parts[0];
    let mut header = gguf::Header::open(first)?;
    let count = header.get("split.count").map_or(Some(1), gguf::Value::as_u64);
    if count != Some(parts.len() as u64) && !(count == Some(0) && parts.len() == 1) {
        let problem = format!("doesn't agree with the file's name, by which there are {}", parts.len());
        let key = "split.count".to_owned();
        return Err(CheckpointError::BadValue { file: first.clone(), key, problem });
    }
    let mut files = Vec::new();
    let mut tensors = Vec::new();
    add_file(&mut files, &mut tensors, first, header.tensors.clone())?;
    for part in &parts[1..] {
        let more = gguf::Header::open(part)?.tensors;
        add_file(&mut files, &mut tensors, part, more.clone())?;
        // The configuration depends on which tensors there are, wherever they are.
        header.tensors.extend(more);
    }
    let support = config::gguf::read(first, &header)?;
    let tokenizer = match header.get("tokenizer.ggml.model") {
        Some(_) => TokenizerFiles::Gguf,
        None => TokenizerFiles::None,
    };
    let generation = generation::gguf(&header);
    finish(first, Format::Gguf, source, support, Indexed { files, tensors, tokenizer, generation })
}

/// The parts of a split file in order, or the one file.
fn parts_of(path: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let Some(split) = split_name(path) else { return Ok(vec![path.to_owned()]) };
    if split.parts > PARTS_MAX || split.part == 0 || split.part > split.parts {
        return Ok(vec![path.to_owned()]);
    }
    let mut parts = Vec::new();
    for part in 1..=split.parts {
        let name = format!("{}-{part:05}-of-{:05}.gguf", split.stem, split.parts);
        let file = path.with_file_name(&name);
        if !file.is_file() {
            return Err(CheckpointError::MissingShard { file: path.to_owned(), shard: shown(&name) });
        }
        parts.push(file);
    }
    Ok(parts)
}

// === both ===

struct Indexed {
    files: Vec<WeightFile>,
    tensors: Vec<Tensor>,
    tokenizer: TokenizerFiles,
    generation: GenerationDefaults,
}

fn add_file(
    files: &mut Vec<WeightFile>,
    tensors: &mut Vec<Tensor>,
    path: &Path,
    found: Vec<gguf::TensorInfo>,
) -> Result<(), CheckpointError> {
    let too_many = |count| CheckpointError::CountTooLarge {
        file: path.to_owned(),
        what: "files",
        offset: 0,
        count,
        max: u32::MAX.into(),
    };
    let file = u32::try_from(files.len()).map_err(|_| too_many(files.len() as u64))?;
    files.push(WeightFile {
        path: path.to_owned(),
        identity: identity_of(path)?,
        sha256: hash_in_name(path),
        chunk_sums: Vec::new(),
        origin: None,
    });
    tensors.extend(found.into_iter().map(|t| Tensor {
        name: t.name,
        role: None,
        dtype: t.dtype,
        shape: t.shape,
        file,
        offset: t.offset,
        len: t.len,
    }));
    Ok(())
}

/// The SHA-256 that names a file in the stores of others: the Hugging Face cache has links to `blobs/HASH`, Ollama
/// `blobs/sha256-HASH`.
fn hash_in_name(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    let name = path.file_name()?.to_str()?;
    let hash = name.strip_prefix("sha256-").unwrap_or(name);
    let is_hash = hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (is_hash && path.parent()?.file_name()? == "blobs").then(|| hash.to_owned())
}

fn finish(
    model: &Path,
    format: Format,
    source: Source,
    support: Support,
    indexed: Indexed,
) -> Result<Manifest, CheckpointError> {
    let Indexed { files, mut tensors, tokenizer, generation } = indexed;
    let path_of = |t: &Tensor| files[t.file as usize].path.clone();
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some(twice) = tensors.iter().find(|t| !names.insert(t.name.as_str())) {
        return Err(CheckpointError::DuplicateTensor { file: path_of(twice), tensor: shown(&twice.name) });
    }
    drop(names);
    let (config, refusal): (Option<ModelConfig>, _) = match support {
        Support::Refused(why) => (None, Some(why)),
        Support::Runs(config) => match names::assign(format, &config, &mut tensors, path_of, model)? {
            Some(why) => (None, Some(why)),
            None => (Some(config), None),
        },
    };
    let hashed = !files.is_empty() && files.iter().all(|file| file.sha256.is_some());
    let trust = if hashed { Trust::File } else { Trust::None };
    Ok(Manifest {
        version: MANIFEST_VERSION,
        source,
        trust,
        format,
        config,
        refusal,
        files,
        tokenizer,
        generation,
        packed: None,
        tensors,
    })
}
