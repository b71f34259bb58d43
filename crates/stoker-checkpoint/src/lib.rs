//! Checkpoints: what a model's files say, without rewriting them.
//!
//! Bytes in, types out. Headers of safetensors and GGUF files become one [`Manifest`]: configuration, tensor index in
//! execution order, tokenizer and chat template, trust level. Everything in a checkpoint is untrusted.

pub mod config;
pub mod dequant;
mod error;
pub mod gguf;
pub mod manifest;

pub use config::{Architecture, ModelConfig, Rope, RopeLayout, RopeScaling};
pub use error::CheckpointError;
pub use manifest::{
    ChunkSum, FileIdentity, Format, GenerationDefaults, Manifest, Part, Role, Source, Tensor, TokenizerFiles,
    Trust, WeightFile,
};
