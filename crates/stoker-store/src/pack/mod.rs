//! A model written anew as it is loaded: tensors in execution order, each at a multiple of
//! [`TENSOR_ALIGN`](stoker_checkpoint::pack::TENSOR_ALIGN), in one file of whole disk blocks, with the sum of every chunk.
//!
//! What is read is checked first: against the sums that are known, else against the hash of the whole file, else (nothing is known)
//! against itself, should a chunk be read twice. A packed folder appears whole or not at all, by one rename after everything
//! in it is durable; what a killed process leaves is removed by the next one that packs there.
//!
//! Split over several ranks, each rank has a folder with its slices of all tensors, contiguous; everything is read once.

mod output;
mod scratch;
mod sources;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use stoker_checkpoint::{
    CheckpointError, ChunkSum, Format, Manifest, Packed, RankOf, Tensor, TokenizerFiles, Trust, WeightFile,
    gguf, identity_of,
    manifest::CHUNK_BYTES,
    pack::{Container, NewFile, NewTensor},
    safetensors,
};
use stoker_types::{ByteSize, FileChange};

use self::{output::Output, scratch::Scratch, sources::Sources};
use crate::slice::{Shard, SliceError, TensorPart};

/// Small files beside the weights that others need of a safetensors folder.
const COMPANIONS: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// A model has no more ranks.
const WORLD_MAX: u32 = 1024;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackReport {
    /// Weight files: one, or one for each rank.
    pub files: Vec<PathBuf>,
    /// Bytes of all of them.
    pub bytes: ByteSize,
    /// Tensors of the model.
    pub tensors: usize,
    /// Whether they are in the order in which they are computed with: `false` for a family that isn't known, whose files' order
    /// was kept.
    pub in_execution_order: bool,
    /// What was known of the bytes that were read.
    pub trust: Trust,
}

/// How far it is, in bytes that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress {
    /// Read and written.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// Why a model can't be packed. Nothing is left behind, and what was there before is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// A header can't be read, or what is to be written is no model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model can't be split like that.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// More ranks than anybody has.
    #[error("{world} ranks: at most {WORLD_MAX} are possible")]
    TooManyRanks {
        /// Asked for.
        world: u32,
    },
    /// There is something where the result should be.
    #[error("{} exists already: name another folder, or remove it first", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// Another process is packing into the same folder.
    #[error("another process is packing to {}", path.display())]
    Busy {
        /// Where.
        path: PathBuf,
    },
    /// The weights are not on this machine.
    #[error("{}: its weights are still at {url}; `stoker pull` it first", path.display())]
    Remote {
        /// What is here of it.
        path: PathBuf,
        /// Where they are.
        url: String,
    },
    /// A file was replaced or written to since it was indexed.
    #[error("{}: {change} since it was indexed; try again", path.display())]
    Changed {
        /// Which file.
        path: PathBuf,
        /// How.
        change: FileChange,
    },
    /// Bytes are not what they were.
    #[error(
        "{}: chunk {chunk} at byte {offset} has the sum {found}, not {expected}; read again: {again}{}",
        path.display(),
        if found == again { ", the file is corrupt" } else { ", read differently twice: suspect disk or memory" }
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Which chunk, from 0.
        chunk: u64,
        /// Its first byte in the file.
        offset: u64,
        /// The sum that it should have.
        expected: ChunkSum,
        /// The sum that it had at first.
        found: ChunkSum,
        /// The sum that it had when read again.
        again: ChunkSum,
    },
    /// A whole file is not what it should be.
    #[error("{}: its SHA-256 is {found}, not {expected}: fetch it again", path.display())]
    WrongHash {
        /// Which file.
        path: PathBuf,
        /// Lower-case hexadecimal.
        expected: String,
        /// Lower-case hexadecimal.
        found: String,
    },
    /// The disk is full, or a quota is reached.
    #[error("{}: {needed} are needed and {free} are free: name a folder on another disk with --output", path.display())]
    DiskFull {
        /// What was to be written.
        path: PathBuf,
        /// Its length.
        needed: ByteSize,
        /// What was free then.
        free: ByteSize,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// One folder in the making.
struct Folder {
    dir: PathBuf,
    rank: Option<RankOf>,
    /// Of each tensor, in the manifest's order.
    parts: Vec<TensorPart>,
    new: NewFile,
}

/// Writes the model of a manifest, whose files lie in or are named from `dir`, into the new folder `output`. With `world`, into
/// `output/rank-R-of-N` for each of so many ranks. Blocking: takes as long as reading and writing it. Needs memory for a few chunks.
///
/// # Errors
/// [`PackError`]; nothing is left behind.
pub fn pack(
    dir: &Path,
    manifest: &Manifest,
    output: &Path,
    world: Option<u32>,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<PackReport, PackError> {
    check_input(dir, manifest)?;
    let output = std::path::absolute(output).map_err(PackError::io(output))?;
    let scratch = Scratch::create(&output)?;
    let folders = plan(dir, manifest, scratch.path(), world)?;

    let total = manifest.tensors.iter().map(|tensor| tensor.len).sum();
    let name = weights_name(manifest.format);
    let mut outputs = Vec::with_capacity(folders.len());
    for folder in &folders {
        if folder.rank.is_some() {
            fs::create_dir(&folder.dir).map_err(PackError::io(&folder.dir))?;
        }
        outputs.push(Output::create(folder.dir.join(name), &folder.new.header, folder.new.len)?);
    }
    let mut sources = Sources::open(dir, manifest)?;
    let mut done = 0;
    for (index, tensor) in manifest.tensors.iter().enumerate() {
        for (output, folder) in outputs.iter_mut().zip(&folders) {
            output.fill_to(folder.new.offsets[index])?;
        }
        copy(tensor, index, &mut sources, &folders, &mut outputs, &mut |bytes| {
            done += bytes;
            progress(PackProgress { done, total });
        })?;
    }
    let mut report = PackReport {
        files: Vec::new(),
        bytes: ByteSize::ZERO,
        tensors: manifest.tensors.len(),
        in_execution_order: manifest.tensors.iter().any(|tensor| tensor.role.is_some()),
        trust: manifest.trust,
    };
    for (out, folder) in outputs.into_iter().zip(&folders) {
        let sums = out.finish(folder.new.len)?;
        let written = packed_manifest(manifest, folder, dir, sums)?;
        written.write(&folder.dir)?;
        sync(&folder.dir)?;
        report.bytes.0 += folder.new.len;
        let inside = folder.dir.strip_prefix(scratch.path()).unwrap_or(Path::new(""));
        report.files.push(output.join(inside).join(name));
    }
    check_unchanged(dir, manifest)?;
    scratch.land()?;
    Ok(report)
}

const fn weights_name(format: Format) -> &'static str {
    match format {
        Format::Safetensors => "model.safetensors",
        Format::Gguf => "model.gguf",
    }
}

fn check_input(dir: &Path, manifest: &Manifest) -> Result<(), PackError> {
    for (index, file) in manifest.files.iter().enumerate() {
        if let Some(origin) = file.origin.as_ref().filter(|origin| origin.header_only) {
            let path = manifest.file_path(dir, index);
            return Err(PackError::Remote { path, url: origin.object.url.clone() });
        }
    }
    check_unchanged(dir, manifest)
}

fn check_unchanged(dir: &Path, manifest: &Manifest) -> Result<(), PackError> {
    match manifest.changed_files(dir).into_iter().next() {
        Some((path, change)) => Err(PackError::Changed { path, change }),
        None => Ok(()),
    }
}

/// What goes where.
fn plan(dir: &Path, manifest: &Manifest, at: &Path, world: Option<u32>) -> Result<Vec<Folder>, PackError> {
    let folder =
        |dir: PathBuf, rank, parts: Vec<TensorPart>, container: Container<'_>| -> Result<Folder, PackError> {
            let tensors: Vec<NewTensor<'_>> = manifest
                .tensors
                .iter()
                .zip(&parts)
                .map(|(tensor, part)| NewTensor {
                    name: &tensor.name,
                    dtype: tensor.dtype,
                    shape: &part.shape,
                    len: part.bytes(),
                })
                .collect();
            let new = NewFile::lay_out(&dir.join(weights_name(manifest.format)), container, &tensors)?;
            Ok(Folder { dir, rank, parts, new })
        };
    let (mut texts, mut values) = (BTreeMap::new(), BTreeMap::new());
    let container = match manifest.format {
        Format::Safetensors => {
            for index in 0..manifest.files.len() {
                let header = safetensors::Header::open(&manifest.file_path(dir, index))?;
                // The same in all of them, mostly.
                texts.extend(header.metadata);
            }
            Container::Safetensors(&texts)
        }
        Format::Gguf => {
            if !manifest.files.is_empty() {
                values = gguf::Header::open(&manifest.file_path(dir, 0))?.metadata;
            }
            Container::Gguf(&values)
        }
    };
    let Some(world) = world else {
        let whole = manifest.tensors.iter().map(TensorPart::whole).collect();
        return Ok(vec![folder(at.to_owned(), None, whole, container)?]);
    };
    if world > WORLD_MAX {
        return Err(PackError::TooManyRanks { world });
    }
    // No ranks at all are an error, too.
    (0..world.max(1))
        .map(|rank| {
            let parts = Shard::new(rank, world)?.of_manifest(manifest)?;
            let dir = at.join(format!("rank-{rank}-of-{world}"));
            folder(dir, Some(RankOf { rank, world }), parts, container)
        })
        .collect()
}

/// Passes a tensor on, window by window of its file, to everybody who gets some of it. Every window's rows are in the order in which
/// they come to lie.
fn copy(
    tensor: &Tensor,
    index: usize,
    sources: &mut Sources,
    folders: &[Folder],
    outputs: &mut [Output],
    done: &mut dyn FnMut(u64),
) -> Result<(), PackError> {
    let end = tensor.offset + tensor.len;
    let mut at = tensor.offset;
    while at < end {
        let chunk = at / CHUNK_BYTES;
        let begin = chunk * CHUNK_BYTES;
        let until = end.min(begin + CHUNK_BYTES);
        let bytes = sources.chunk(tensor.file, chunk)?;
        let range = |from: u64, len: u64| -> &[u8] {
            let from = usize::try_from(from - begin).unwrap_or(usize::MAX);
            &bytes[from..from + usize::try_from(len).unwrap_or(usize::MAX)]
        };
        for (folder, output) in folders.iter().zip(&mut *outputs) {
            let rows = &folder.parts[index].rows;
            for (from, len, _, count) in rows.within(at, until) {
                for row in 0..count {
                    output.write(range(from + row * rows.pitch, len))?;
                }
            }
        }
        done(until - at);
        at = until;
    }
    Ok(())
}

/// The manifest of a folder; copies the small files that it needs.
fn packed_manifest(
    manifest: &Manifest,
    folder: &Folder,
    dir: &Path,
    sums: Vec<ChunkSum>,
) -> Result<Manifest, PackError> {
    let mut tokenizer = manifest.tokenizer.clone();
    if manifest.format == Format::Safetensors {
        // Where the configuration was found, and where the tokenizer was, if that is elsewhere.
        let mut from = Vec::new();
        if !manifest.files.is_empty() {
            from.extend(manifest.file_path(dir, 0).parent().map(Path::to_owned));
        }
        if let TokenizerFiles::HuggingFace { dir: found } = &mut tokenizer {
            from.insert(0, dir.join(&*found));
            found.clone_from(&folder.dir);
        }
        copy_companions(&from, &folder.dir)?;
    }
    let path = folder.dir.join(weights_name(manifest.format));
    let identity = identity_of(&path)?;
    let placed = |((tensor, part), offset): ((&Tensor, &TensorPart), &u64)| Tensor {
        file: 0,
        shape: part.shape.clone(),
        offset: *offset,
        len: part.bytes(),
        ..tensor.clone()
    };
    let tensors = manifest.tensors.iter().zip(&folder.parts).zip(&folder.new.offsets).map(placed).collect();
    let (config, refusal) = match folder.rank {
        None => (manifest.config.clone(), manifest.refusal.clone()),
        Some(RankOf { rank, world }) => (
            None,
            Some(format!(
                "it is rank {rank} of {world} of a model that is split; it can be loaded by tensor, not served"
            )),
        ),
    };
    Ok(Manifest {
        trust: Trust::Chunk,
        config,
        refusal,
        files: vec![WeightFile { path, identity, sha256: None, chunk_sums: sums, origin: None }],
        tokenizer,
        packed: Some(Packed { rank: folder.rank }),
        tensors,
        ..manifest.clone()
    })
}

fn copy_companions(from: &[PathBuf], to: &Path) -> Result<(), PackError> {
    for name in COMPANIONS {
        let Some(there) = from.iter().map(|dir| dir.join(name)).find(|path| path.is_file()) else { continue };
        let path = to.join(name);
        let copied = fs::copy(&there, &path).and_then(|_| fs::File::open(&path)?.sync_all());
        copied.map_err(|error| output::refused(&path, fs::metadata(&there).map_or(0, |m| m.len()), error))?;
    }
    Ok(())
}

/// Makes what was created and renamed in a directory durable.
fn sync(dir: &Path) -> Result<(), PackError> {
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(PackError::io(dir))
}

// === impl PackError ===

impl PackError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
