//! The engine's logits beside those of transformers, on tiny random models of every variant of the family.
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use serde_json::Value;
use stoker_engine::StepEngine;
use support::{Checkpoint, LIMITS, data, greedy, logits_from, run};

/// Largest difference to transformers' fp32 logits.
const TOLERANCE: f64 = 1e-4;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn check(name: &str) {
    let dir = data(name);
    let reference: Value =
        serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::read(&dir);
    let mut model = checkpoint.model(2);
    let mut compared = 0;
    let cases = reference["cases"].as_array().unwrap();
    let mut engine = checkpoint.engine(LIMITS);
    for (key, case) in (0..).zip(cases) {
        let prompt = ids(&case["prompt_ids"]);
        let logits = logits_from(&mut *model, &prompt, 0);
        for (position, expected) in case["logits"].as_object().unwrap() {
            let ours = &logits[position.parse::<usize>().unwrap()];
            let expected = expected.as_array().unwrap();
            assert_eq!(ours.len(), expected.len());
            for (ours, expected) in ours.iter().zip(expected) {
                let difference = (f64::from(*ours) - expected.as_f64().unwrap()).abs();
                assert!(
                    difference <= TOLERANCE,
                    "{name}, prompt of {}, position {position}: {ours}, not {expected}",
                    prompt.len()
                );
                compared += 1;
            }
        }
        let greedy_ids = ids(&case["greedy_ids"]);
        let request = greedy(key, prompt, u32::try_from(greedy_ids.len()).unwrap());
        engine.submit(request).unwrap();
    }
    assert!(compared > 1000, "{compared} logits were compared");
    for (brought, case) in run(&mut engine, cases.len()).iter().zip(cases) {
        let brought: Vec<u32> = brought.iter().map(|(id, _)| *id).collect();
        assert_eq!(brought, ids(&case["greedy_ids"]), "{name}");
    }
}

#[test]
fn llama_with_tied_embeddings() {
    check("tiny-llama");
}

#[test]
fn llama3_rope_scaling_and_biases() {
    check("tiny-llama3");
}

#[test]
fn mistral_sliding_window() {
    check("tiny-mistral");
}

#[test]
fn bf16_in_shards_with_linear_rope_scaling() {
    check("tiny-llama-bf16-sharded");
}
