//! Real files: the tiny models of this repository, and the default model's GGUF.

use std::{fs, path::Path};

use stoker_checkpoint::{
    CheckpointError, Format, Manifest, ManifestSummary, Part, Role, RopeLayout, RopeScaling, TokenizerFiles,
    Trust, index,
};
use stoker_types::DType;

use crate::common::{data, smollm2, source};

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_folder_of_one_file() {
    let manifest = index(&data("tiny-llama"), source()).unwrap();
    assert_eq!(manifest.refusal, None);
    let config = manifest.config.as_ref().unwrap();
    assert_eq!((config.hidden_size, config.layers, config.heads, config.kv_heads), (64, 3, 4, 2));
    assert_eq!((config.head_dim, config.vocab_size, config.context_trained), (16, 259, 512));
    assert!(config.tied_embeddings);
    assert_eq!(config.rope.layout, RopeLayout::Halves);
    assert_eq!(manifest.format, Format::Safetensors);
    assert_eq!(manifest.trust, Trust::None);
    assert_eq!(manifest.generation.eos_ids, [2, 0], "the configured id, then the ends of turn by name");
    assert_eq!(manifest.generation.bos_id, Some(1));
    assert!(matches!(&manifest.tokenizer, TokenizerFiles::HuggingFace { dir } if dir.is_absolute()));
    assert_eq!(manifest.tensors.len(), 2 + 3 * 9);
    let roles: Vec<Role> = manifest.tensors.iter().map(|t| t.role.unwrap()).collect();
    assert!(roles.is_sorted(), "execution order");
    assert_eq!((roles[0], roles[1]), (Role::Embedding, Role::Layer(0, Part::AttentionNorm)));
    assert_eq!(manifest.tensor(Role::Layer(2, Part::Key)).unwrap().shape, [32, 64]);
}

#[test]
fn scaling_biases_window_and_shards() {
    let llama3 = index(&data("tiny-llama3"), source()).unwrap();
    let config = llama3.config.as_ref().unwrap();
    assert!(config.attention_bias && config.mlp_bias && !config.tied_embeddings);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 32,
    };
    assert_eq!(config.rope.scaling, Some(scaling));
    assert!(llama3.tensor(Role::Layer(1, Part::AttentionOutputBias)).is_some());
    assert!(llama3.tensor(Role::Layer(1, Part::DownBias)).is_some());

    let mistral = index(&data("tiny-mistral"), source()).unwrap();
    assert_eq!(mistral.config.unwrap().sliding_window, Some(8));

    let sharded = index(&data("tiny-llama-bf16-sharded"), source()).unwrap();
    assert_eq!(sharded.files.len(), 4);
    assert!(sharded.tensors.iter().all(|t| t.dtype == DType::BF16));
    assert!(sharded.tensors.iter().any(|t| t.file == 3));
    assert_eq!(sharded.refusal, None);
}

#[test]
fn a_manifest_survives_the_disk_and_a_move() {
    let dir = tempfile::tempdir().unwrap();
    let before = dir.path().join("before");
    fs::create_dir(&before).unwrap();
    copy(&data("tiny-llama-bf16-sharded"), &before);
    let mut manifest = index(&before, source()).unwrap();
    manifest.write(&before).unwrap();
    let after = dir.path().join("after");
    fs::rename(&before, &after).unwrap();

    let read = Manifest::read(&after).unwrap();
    assert_eq!(read.tensors, manifest.tensors);
    assert_eq!(read.tokenizer, TokenizerFiles::HuggingFace { dir: ".".into() });
    assert!(read.files.iter().all(|f| f.path.is_relative()));
    assert_eq!(read.changed_files(&after), []);
    let count = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(count(&after), count(&data("tiny-llama-bf16-sharded")) + 1, "nothing temporary is left");

    let summary = ManifestSummary::read(&after).unwrap();
    assert_eq!(summary.config, read.config);
    assert_eq!(summary.weight_bytes(), read.weight_bytes());
    assert_eq!(summary.pool_bytes(4096), read.pool_bytes(4096));
    assert_eq!(summary.files.len(), 4);

    // Sums, as a first load learns them.
    for (i, file) in read.files.iter().enumerate() {
        let bytes = fs::read(after.join(&file.path)).unwrap();
        manifest.record_sums(i, vec![stoker_checkpoint::ChunkSum::of(&bytes)]).unwrap();
        assert_eq!(manifest.trust == Trust::Chunk, i == 3);
    }
    let other = manifest.record_sums(0, vec![stoker_checkpoint::ChunkSum(1)]).unwrap_err();
    assert!(matches!(other, CheckpointError::BadManifest { .. }), "{other}");

    let shard = after.join("model-00002-of-00004.safetensors");
    fs::write(&shard, b"other").unwrap();
    assert!(matches!(&read.changed_files(&after)[..], [(path, _)] if *path == shard));
}

#[test]
fn the_default_model_in_place() {
    let Some(path) = smollm2() else { return };
    let manifest = index(&path, source()).unwrap();
    assert_eq!(manifest.refusal, None);
    let config = manifest.config.as_ref().unwrap();
    assert_eq!((config.hidden_size, config.layers, config.heads, config.kv_heads), (576, 30, 9, 3));
    assert_eq!((config.head_dim, config.vocab_size, config.context_trained), (64, 49152, 8192));
    assert_eq!((config.rope.theta, config.rope.layout), (100_000.0, RopeLayout::Interleaved));
    assert!(config.tied_embeddings);
    assert_eq!(manifest.generation.eos_ids, [2, 0]);
    assert_eq!(manifest.tokenizer, TokenizerFiles::Gguf);
    assert_eq!(manifest.tensors.len(), 272);
    let embedding = manifest.tensor(Role::Embedding).unwrap();
    assert_eq!(
        (embedding.dtype, &embedding.shape[..], embedding.offset),
        (DType::Q8_0, &[49152, 576][..], 1_785_664)
    );
    assert_eq!(manifest.tensor(Role::Layer(29, Part::Down)).unwrap().dtype, DType::Q4_1);
}
