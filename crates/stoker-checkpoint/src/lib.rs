//! Checkpoints: what a model's files say, without rewriting them.
//!
//! Bytes in, types out. Headers of safetensors and GGUF files become one [`Manifest`]: configuration, tensor index in
//! execution order, tokenizer and chat template, trust level. Everything in a checkpoint is untrusted.

pub mod chat_template;
pub mod config;
pub mod convert;
pub mod dequant;
pub mod detokenize;
mod error;
pub mod gguf;
mod index;
mod json;
pub mod manifest;
mod names;
pub mod pack;
pub mod safetensors;
pub mod stop;
pub mod sums;
pub mod text;
pub mod tokenizer;

pub use config::{Architecture, ModelConfig, Rope, RopeLayout, RopeScaling};
pub use error::CheckpointError;
pub use index::index;
pub use manifest::{
    FileIdentity, Format, GenerationDefaults, Manifest, ManifestSummary, Origin, Packed, Part, RankOf, Role,
    Source, Tensor, TokenizerFiles, Trust, WeightFile, identity_of,
};
/// The type of [`WeightFile::chunk_sums`].
pub use stoker_types::ChunkSum;
