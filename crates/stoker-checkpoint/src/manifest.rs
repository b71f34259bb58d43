//! `stoker.json`: one model in the models directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoker_types::{ChunkSum, DType, FileChange, RemoteObject};

use crate::ModelConfig;

mod file;

pub(crate) use file::sync_dir;
pub use file::{FILE_NAME, FileSummary, ManifestSummary, identity_of};

/// Version of the manifest's format that this build writes, and the newest that it reads.
pub const MANIFEST_VERSION: u32 = 1;

/// Bytes of the unit of checksums, reads and residency.
pub const CHUNK_BYTES: u64 = 16 << 20;

/// One model: where its bytes are and what they mean.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Where it came from.
    pub source: Source,
    /// What is known about its bytes before they are read.
    pub trust: Trust,
    /// Kind of weight file.
    pub format: Format,
    /// The model's configuration; `None` when it can't be computed (see `refusal`).
    pub config: Option<ModelConfig>,
    /// Why the engine can't run it, in words; `None` when it can.
    pub refusal: Option<String>,
    /// Weight files. [`Tensor::file`] indexes them.
    pub files: Vec<WeightFile>,
    /// Where tokenizer and chat template are.
    pub tokenizer: TokenizerFiles,
    /// The model's own defaults for generation.
    pub generation: GenerationDefaults,
    /// Its files were written for this manifest and come with it: their sums hold wherever the folder is copied to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<Packed>,
    /// Tensors in execution order: embedding, layers, norm, head. Last, so that a summary needs to read no further.
    pub tensors: Vec<Tensor>,
}

/// What `stoker pack` made of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Of what each tensor is a slice; `None`: every tensor is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<RankOf>,
}

/// One of the parts of a model that is split for tensor parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankOf {
    /// From 0.
    pub rank: u32,
    /// How many there are.
    pub world: u32,
}

/// Where a model came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// As a person would write it: `hf:owner/name`, `pypi:name==version`, a path.
    pub uri: String,
    /// Commit or version, where the source has one.
    pub revision: Option<String>,
}

/// What is known about the bytes before they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// A sum for every chunk is known: checked before use.
    Chunk,
    /// Of some files only a hash of the whole is known: checked before the first use, when chunk sums are recorded.
    File,
    /// A local import: sums are recorded at the first load.
    None,
}

/// Kind of weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Hugging Face safetensors, one file or sharded.
    Safetensors,
    /// GGUF version 2 or 3.
    Gguf,
}

/// What tells a replaced file from a corrupt one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Length, bytes.
    pub len: u64,
    /// Last modification, nanoseconds since the epoch.
    pub mtime_ns: i128,
    /// Inode number.
    pub inode: u64,
}

/// A weight file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightFile {
    /// Path: relative to the model's directory, or absolute for a file that is only referenced.
    pub path: PathBuf,
    /// Length, time and inode when it was indexed.
    pub identity: FileIdentity,
    /// SHA-256 of the whole file in lower-case hexadecimal, where known.
    pub sha256: Option<String>,
    /// Sums of its chunks of [`CHUNK_BYTES`] (the last may be shorter); empty when none is known yet, else one for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunk_sums: Vec<ChunkSum>,
    /// Where it came from, when it can be had again from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// Where a weight file is in a remote store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The object, in the version that was indexed.
    #[serde(flatten)]
    pub object: RemoteObject,
    /// Of the file at [`WeightFile::path`] only the header is there: weights are read from the object.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub header_only: bool,
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Token embedding, `[vocab, hidden]`.
    Embedding,
    /// Divisors of the rotary frequencies, `[head_dim / 2]`.
    RopeFreqs,
    /// A layer's tensor.
    Layer(u32, Part),
    /// Norm before the head, `[hidden]`.
    OutputNorm,
    /// Output head, `[vocab, hidden]`; absent when tied to the embedding.
    OutputHead,
}

/// A tensor's place in a layer, in execution order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Norm before attention, `[hidden]`.
    AttentionNorm,
    /// `[heads * head_dim, hidden]`.
    Query,
    /// `[heads * head_dim]`.
    QueryBias,
    /// `[kv_heads * head_dim, hidden]`.
    Key,
    /// `[kv_heads * head_dim]`.
    KeyBias,
    /// `[kv_heads * head_dim, hidden]`.
    Value,
    /// `[kv_heads * head_dim]`.
    ValueBias,
    /// `[hidden, heads * head_dim]`.
    AttentionOutput,
    /// `[hidden]`.
    AttentionOutputBias,
    /// Norm before the feed-forward layer, `[hidden]`.
    FeedForwardNorm,
    /// `[intermediate, hidden]`.
    Gate,
    /// `[intermediate]`.
    GateBias,
    /// `[intermediate, hidden]`.
    Up,
    /// `[intermediate]`.
    UpBias,
    /// `[hidden, intermediate]`.
    Down,
    /// `[hidden]`.
    DownBias,
}

/// A tensor: where its bytes are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// The file's own name for it.
    pub name: String,
    /// What it is for; `None`: the arithmetic doesn't use it.
    pub role: Option<Role>,
    /// Element type.
    pub dtype: DType,
    /// Row-major: the last dimension is contiguous. (GGUF files store the reverse.)
    pub shape: Vec<u64>,
    /// Index into [`Manifest::files`].
    pub file: u32,
    /// First byte, from the beginning of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Where a model's text side is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TokenizerFiles {
    /// In the metadata of weight file 0.
    Gguf,
    /// `tokenizer.json`, and where they exist `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja` (or `chat_template.json`) in this directory (relative to the model's, or absolute).
    HuggingFace {
        /// The directory.
        dir: PathBuf,
    },
    /// There is none: token ids only.
    None,
}

/// What `generation_config.json` (or the GGUF) says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationDefaults {
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Likeliest k.
    pub top_k: Option<u32>,
    /// Relative floor.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Every id that ends a turn.
    pub eos_ids: Vec<u32>,
    /// The id that begins a text.
    pub bos_id: Option<u32>,
}

// === impl FileIdentity ===

impl FileIdentity {
    /// What is not as it was, given what is there now; `None`: nothing. What says most comes first.
    #[must_use]
    pub fn change(&self, now: Option<&Self>) -> Option<FileChange> {
        match now {
            None => Some(FileChange::Gone),
            Some(now) if now.len != self.len => Some(FileChange::Length { was: self.len, is: now.len }),
            Some(now) if now.inode != self.inode => Some(FileChange::Replaced),
            Some(now) => (now.mtime_ns != self.mtime_ns).then_some(FileChange::Written),
        }
    }
}

// === impl Manifest ===

impl Manifest {
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

    /// The path of a weight file of a model whose directory is `dir`.
    ///
    /// # Panics
    /// When there is no such file.
    #[must_use]
    pub fn file_path(&self, dir: &Path, file: usize) -> PathBuf {
        dir.join(&self.files[file].path)
    }

    /// The tensor with a role.
    #[must_use]
    pub fn tensor(&self, role: Role) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.role == Some(role))
    }
}
