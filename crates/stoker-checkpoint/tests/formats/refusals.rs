//! What would change the answer is refused by name; what wouldn't is not.

use std::{fs, path::Path};

use serde_json::{Value, json};
use stoker_checkpoint::{
    CheckpointError, ModelConfig, RopeScaling,
    config::{Support, gguf as gguf_config, hf},
    gguf, index,
};

use crate::common::{Gguf, Meta, source};

/// As transformers 4 writes it.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 500_000.0, "rope_scaling": null, "vocab_size": 100, "torch_dtype": "bfloat16",
        "use_cache": true, "pretraining_tp": 1, "tie_word_embeddings": false, "transformers_version": "4.44.0",
    })
}

fn parse(config: &Value) -> Result<Support, CheckpointError> {
    hf::parse(Path::new("config.json"), config.to_string().as_bytes())
}

fn with(changes: Value) -> Value {
    let mut config = llama();
    let Value::Object(changes) = changes else { unreachable!() };
    for (key, value) in changes {
        config[key] = value;
    }
    config
}

fn runs(changes: Value) -> ModelConfig {
    match parse(&with(changes.clone())).unwrap() {
        Support::Runs(config) => config,
        Support::Refused(why) => panic!("{changes} is refused: {why}"),
    }
}

fn refused(changes: Value) -> String {
    match parse(&with(changes.clone())).unwrap() {
        Support::Refused(why) => why,
        Support::Runs(_) => panic!("{changes} is not refused"),
    }
}

#[test]
fn transformers_4_and_5_mean_the_same() {
    let four = runs(json!({}));
    assert_eq!((four.kv_heads, four.head_dim, four.rope.theta), (4, 16, 500_000.0));
    let five = json!({ "rope_theta": null, "torch_dtype": null, "dtype": "bfloat16",
        "rope_parameters": { "rope_theta": 500_000.0, "rope_type": "default" } });
    assert_eq!(runs(five), four);

    let scaled = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 512,
    };
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512 });
    assert_eq!(runs(json!({ "rope_scaling": llama3.clone() })).rope.scaling, Some(scaled));
    let mut five = llama3;
    five["rope_theta"] = json!(500_000.0);
    let five = runs(json!({ "rope_parameters": five, "rope_theta": null }));
    assert_eq!((five.rope.scaling, five.rope.theta), (Some(scaled), 500_000.0));
    let linear = runs(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }));
    assert_eq!(linear.rope.scaling, Some(RopeScaling::Linear { factor: 2.0 }));
}

#[test]
fn windows() {
    let mistral = |changes: Value| {
        let mut config = with(changes);
        config["model_type"] = json!("mistral");
        config["architectures"] = json!(["MistralForCausalLM"]);
        config["max_position_embeddings"] = json!(32768);
        config["num_key_value_heads"] = json!(2);
        config.as_object_mut().unwrap().remove("tie_word_embeddings");
        match parse(&config).unwrap() {
            Support::Runs(config) => config.sliding_window,
            Support::Refused(why) => panic!("{why}"),
        }
    };
    assert_eq!(mistral(json!({ "sliding_window": 1024 })), Some(1024));
    assert_eq!(mistral(json!({ "sliding_window": null })), None);
    assert_eq!(mistral(json!({})), Some(4096), "the class's default");
    assert_eq!(mistral(json!({ "sliding_window": 1024, "use_sliding_window": false })), None);
    assert_eq!(mistral(json!({ "sliding_window": 32768 })), None, "holds the whole context");
    assert_eq!(runs(json!({ "sliding_window": 4096 })).sliding_window, None);
    assert!(refused(json!({ "sliding_window": 128 })).contains("sliding_window"));
}

#[test]
fn harmless() {
    for changes in [
        json!({ "attention_dropout": 0.1 }),
        json!({ "_name_or_path": "x", "pad_token_id": 3, "unsloth_version": "2025.1" }),
        json!({ "attn_logit_softcapping": null, "some_new_thing": null }),
        json!({ "is_llama_config": true, "rope_interleaved": false }),
        json!({ "layer_types": ["full_attention", "full_attention", "full_attention"] }),
        json!({ "head_dim": 32, "num_key_value_heads": 2, "vocab_size": 100.0 }),
        json!({ "partial_rotary_factor": 1.0, "hidden_act": "swish" }),
    ] {
        runs(changes);
    }
}

#[test]
fn refused_by_name() {
    for (changes, names) in [
        (json!({ "model_type": "qwen2" }), "qwen2"),
        (json!({ "architectures": ["LlamaForSequenceClassification"] }), "LlamaForSequenceClassification"),
        (json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }), "gptq"),
        (json!({ "hidden_act": "gelu" }), "gelu"),
        (json!({ "pretraining_tp": 2 }), "pretraining_tp"),
        (json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
        (json!({ "a_new_key": false }), "a_new_key"),
        (json!({ "auto_map": { "AutoModel": "x.Y" } }), "auto_map"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }), "yarn"),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), "dynamic"),
        (json!({ "rope_parameters": { "rope_type": "longrope", "long_factor": [1.0] } }), "longrope"),
        (json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "mscale": 1.0 } }), "mscale"),
        (
            json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.5 } }),
            "partial_rotary_factor",
        ),
        (json!({ "rope_interleaved": true }), "rope_interleaved"),
        (json!({ "layer_types": ["linear_attention"] }), "linear_attention"),
        (
            json!({ "model_type": "mistral", "architectures": null, "num_key_value_heads": 4, "attention_bias": true }),
            "attention_bias",
        ),
    ] {
        let why = refused(changes);
        assert!(why.contains(names), "`{why}` doesn't name `{names}`");
    }
    let several = refused(json!({ "hidden_act": "gelu", "pretraining_tp": 2 }));
    assert!(several.contains("gelu") && several.contains("pretraining_tp"), "all are named: {several}");
}

#[test]
fn nonsense_is_an_error() {
    for (changes, key) in [
        (json!({ "hidden_size": null }), "hidden_size"),
        (json!({ "hidden_size": -64 }), "hidden_size"),
        (json!({ "hidden_size": "64" }), "hidden_size"),
        (json!({ "hidden_size": 64.5 }), "hidden_size"),
        (json!({ "num_attention_heads": 5 }), "num_attention_heads"),
        (json!({ "num_key_value_heads": 3 }), "kv_heads"),
        (json!({ "num_hidden_layers": 1_000_000 }), "layers"),
        (json!({ "head_dim": 15 }), "rope.dims"),
        (json!({ "rms_norm_eps": 0.0 }), "norm_epsilon"),
        (json!({ "rope_theta": 1e300 }), "rope.theta"),
        (json!({ "rope_scaling": { "type": "linear" } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": 5 }), "rope_scaling"),
        (json!({ "tie_word_embeddings": "yes" }), "tie_word_embeddings"),
        (json!({ "model_type": null }), "model_type"),
    ] {
        match parse(&with(changes.clone())) {
            Err(CheckpointError::BadValue { key: found, .. }) => assert_eq!(found, key, "{changes}"),
            other => panic!("{changes}: {other:?}"),
        }
    }
    assert!(matches!(hf::parse(Path::new("c"), b"[]"), Err(CheckpointError::Json { .. })));
}

fn gguf_support(file: &Gguf) -> Support {
    let bytes = file.bytes();
    let header = gguf::Header::read(Path::new("m.gguf"), &bytes[..], bytes.len() as u64).unwrap();
    gguf_config::read(Path::new("m.gguf"), &header).unwrap()
}

#[test]
fn gguf_metadata() {
    let Support::Runs(config) = gguf_support(&Gguf::tiny()) else { panic!() };
    assert_eq!((config.head_dim, config.kv_heads, config.rope.theta), (4, 1, 10_000.0));
    assert!(config.tied_embeddings);
    let linear = Gguf::tiny()
        .with("llama.rope.scaling.type", Meta::Text("linear"))
        .with("llama.rope.scaling.factor", Meta::F32(4.0));
    let Support::Runs(config) = gguf_support(&linear) else { panic!() };
    assert_eq!(config.rope.scaling, Some(RopeScaling::Linear { factor: 4.0 }));
    for (key, value, names) in [
        ("general.architecture", Meta::Text("gemma3"), "gemma3"),
        ("general.type", Meta::Text("adapter"), "adapter"),
        ("llama.expert_count", Meta::U32(8), "llama.expert_count"),
        ("llama.rope.scaling.type", Meta::Text("yarn"), "yarn"),
        ("llama.rope.dimension_count", Meta::U32(2), "llama.rope.dimension_count"),
        ("llama.attention.value_length", Meta::U32(8), "value_length"),
        ("llama.attention.clamp_kqv", Meta::F32(1.0), "clamp_kqv"),
    ] {
        match gguf_support(&Gguf::tiny().with(key, value)) {
            Support::Refused(why) => assert!(why.contains(names), "{why}"),
            Support::Runs(_) => panic!("{key} is not refused"),
        }
    }
    assert!(matches!(gguf_support(&Gguf::tiny().with("llama.expert_count", Meta::U32(0))), Support::Runs(_)));
}

#[test]
fn tensor_types_that_cannot_run_are_listed_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (name, kind, bytes_per_element, says) in [
        ("blk.0.attn_q.weight", 28, 8, "`blk.0.attn_q.weight` is of type F64"),
        ("blk.0.attn_norm.weight", 28, 8, "F64"),
        ("blk.0.ffn_up.weight", 24, 1, "I8"),
    ] {
        let file = Gguf::tiny().change(|f| {
            let tensor = f.tensor(name);
            tensor.kind = kind;
            tensor.data = vec![0; tensor.data.len() / 4 * bytes_per_element];
        });
        fs::write(&path, file.bytes()).unwrap();
        let manifest = index(&path, source()).unwrap();
        let why = manifest.refusal.unwrap();
        assert!(why.contains(says), "{why}");
        assert_eq!((manifest.config, manifest.tensors.len()), (None, 11));
    }
}

#[test]
fn generation_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, value: Value| fs::write(dir.path().join(name), value.to_string()).unwrap();
    let from = crate::common::data("tiny-llama");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    put(
        "generation_config.json",
        json!({ "eos_token_id": [7, 2, 100_000, -1], "temperature": 0.6, "top_p": 7.0, "top_k": 40 }),
    );
    put(
        "tokenizer.json",
        json!({ "added_tokens": [{ "id": 9, "content": "<|eot_id|>" }, { "id": 8, "content": "<|x|>" }] }),
    );
    let generation = index(dir.path(), source()).unwrap().generation;
    assert_eq!(generation.eos_ids, [7, 2, 9]);
    assert_eq!((generation.temperature, generation.top_p, generation.top_k), (Some(0.6), None, Some(40)));
    assert_eq!(generation.bos_id, Some(1), "from config.json");
}
