//! Conversion gives back what the GGUF was made of.

use std::{fs, path::Path};

use sha2::{Digest, Sha256};
use stoker_checkpoint::{
    CheckpointError, Part, Role, RopeLayout,
    convert::{ConvertError, Precision, convert},
    index,
    safetensors::Header,
};

use crate::common::{Gguf, GgufTensor, Meta, data, smollm2, source};

/// tiny-llama as a GGUF in f32: what llama.cpp's converter does to it.
fn tiny_gguf() -> Gguf {
    let manifest = index(&data("tiny-llama"), source()).unwrap();
    let config = manifest.config.as_ref().unwrap();
    let bytes = fs::read(&manifest.files[0].path).unwrap();
    let mut file = Gguf::new()
        .with("general.architecture", Meta::Text("llama"))
        .with("llama.block_count", Meta::U32(config.layers))
        .with("llama.context_length", Meta::U32(config.context_trained))
        .with("llama.embedding_length", Meta::U32(config.hidden_size))
        .with("llama.feed_forward_length", Meta::U32(config.intermediate_size))
        .with("llama.attention.head_count", Meta::U32(config.heads))
        .with("llama.attention.head_count_kv", Meta::U32(config.kv_heads))
        .with("llama.attention.layer_norm_rms_epsilon", Meta::F32(config.norm_epsilon))
        .with("llama.vocab_size", Meta::U32(config.vocab_size));
    for tensor in &manifest.tensors {
        let range =
            usize::try_from(tensor.offset).unwrap()..usize::try_from(tensor.offset + tensor.len).unwrap();
        let mut data = bytes[range].to_vec();
        if let Some(Role::Layer(_, Part::Query | Part::Key)) = tensor.role {
            // reshape(heads, 2, dims / 2, columns).swapaxes(1, 2)
            let (dims, row) = (config.head_dim as usize, 4 * config.hidden_size as usize);
            let rows: Vec<&[u8]> = data.chunks(row).collect();
            let mut permuted = Vec::new();
            for head in rows.chunks(dims) {
                for i in 0..dims / 2 {
                    permuted.extend_from_slice(head[i]);
                    permuted.extend_from_slice(head[dims / 2 + i]);
                }
            }
            data = permuted;
        }
        let name = match tensor.role.unwrap() {
            Role::Embedding => "token_embd.weight".to_owned(),
            Role::OutputNorm => "output_norm.weight".to_owned(),
            Role::Layer(layer, part) => {
                let part = match part {
                    Part::AttentionNorm => "attn_norm",
                    Part::Query => "attn_q",
                    Part::Key => "attn_k",
                    Part::Value => "attn_v",
                    Part::AttentionOutput => "attn_output",
                    Part::FeedForwardNorm => "ffn_norm",
                    Part::Gate => "ffn_gate",
                    Part::Up => "ffn_up",
                    Part::Down => "ffn_down",
                    other => panic!("{other:?}"),
                };
                format!("blk.{layer}.{part}.weight")
            }
            other => panic!("{other:?}"),
        };
        let dims = tensor.shape.iter().rev().copied().collect();
        file.tensors.push(GgufTensor { name, dims, kind: 0, data, offset: None });
    }
    file
}

/// Names and bytes of a folder's tensors, by name.
fn tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let range = |t: &stoker_checkpoint::gguf::TensorInfo| {
        usize::try_from(t.offset).unwrap()..usize::try_from(t.offset + t.len).unwrap()
    };
    let header = Header::open(&path).unwrap();
    let mut tensors: Vec<_> =
        header.tensors.iter().map(|t| (t.name.clone(), bytes[range(t)].to_vec())).collect();
    tensors.sort();
    tensors
}

#[test]
fn gives_back_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    fs::write(&gguf, tiny_gguf().bytes()).unwrap();
    let mut last = None;
    convert(&gguf, &out, Precision::F32, &mut |p| last = Some(p)).unwrap();
    assert!(tensors(&out) == tensors(&data("tiny-llama")), "every byte");
    assert!(last.is_some_and(|p| p.done == p.total && p.total > 500_000));

    let before = index(&data("tiny-llama"), source()).unwrap().config.unwrap();
    let after = index(&out, source()).unwrap();
    assert_eq!(after.refusal, None);
    assert_eq!(after.config, Some(before));
    assert_eq!(after.config.unwrap().rope.layout, RopeLayout::Halves);
    let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(
        (names(dir.path()), names(&out)),
        (2, 3),
        "no tokenizer in this file; nothing temporary is left"
    );

    let error = convert(&gguf, &out, Precision::F16, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ConvertError::Exists { .. }), "{error}");
}

#[test]
fn llama3_factors_become_their_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    // By transformers' `_compute_llama3_parameters`: 16 dimensions, theta 1e4, factor 8, low 1, high 4, original 256.
    let factors: [f32; 8] = [1.0, 1.0, 1.0, 4.781_834, 8.0, 8.0, 8.0, 8.0];
    let with = |factors: &[f32]| {
        let data = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor =
            GgufTensor { name: "rope_freqs.weight".into(), dims: vec![8], kind: 0, data, offset: None };
        tiny_gguf().change(|f| f.tensors.push(tensor)).bytes()
    };
    fs::write(&gguf, with(&factors)).unwrap();
    convert(&gguf, &out, Precision::BF16, &mut |_| {}).unwrap();
    let scaling = index(&out, source()).unwrap().config.unwrap().rope.scaling;
    let text = format!("{scaling:?}");
    assert!(text.contains("factor: 8.0") && text.contains("original_context: 256"), "{text}");

    fs::write(&gguf, with(&[1.0, 3.0, 1.0, 2.0, 5.0, 1.0, 1.0, 1.0])).unwrap();
    let error = convert(&gguf, &dir.path().join("other"), Precision::BF16, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ConvertError::Refused { .. }), "{error}");
}

#[test]
fn failures_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    let run = |file: Gguf, precision| {
        fs::write(&gguf, file.bytes()).unwrap();
        let error = convert(&gguf, &out, precision, &mut |_| {}).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "after {error}");
        error
    };
    let huge = tiny_gguf()
        .change(|f| f.tensor("blk.1.ffn_up.weight").data[..4].copy_from_slice(&1e6f32.to_le_bytes()));
    let error = run(huge, Precision::F16);
    assert!(matches!(&error, ConvertError::Overflow { value, .. } if *value == 1e6), "{error}");
    let error = run(tiny_gguf().with("llama.expert_count", Meta::U32(4)), Precision::F16);
    assert!(matches!(&error, ConvertError::Refused { why, .. } if why.contains("expert_count")), "{error}");
    let error = run(Gguf::new(), Precision::F16);
    assert!(matches!(error, ConvertError::Checkpoint(CheckpointError::BadValue { .. })), "{error}");
}

#[test]
fn the_default_model_equals_numpy() {
    let Some(path) = smollm2() else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    convert(&path, &out, Precision::F16, &mut |_| {}).unwrap();
    let mut digest = Sha256::new();
    tensors(&out).iter().for_each(|(_, bytes)| digest.update(bytes));
    let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
    // scripts/fixtures/convert_digest.py
    assert_eq!(hex, "a92bb17d6edbf6e44444dcedd89a6790d329e7c7e64ef33139af4d0b3e8450cc");
    let manifest = index(&out, source()).unwrap();
    assert_eq!(manifest.refusal, None);
    assert_eq!(manifest.generation.eos_ids, [2, 0]);
    assert!(out.join("tokenizer.json").is_file() && out.join("tokenizer_config.json").is_file());
}
