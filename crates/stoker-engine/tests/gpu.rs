//! The engine on a real GPU: `cargo test -p stoker-engine --test gpu -- --ignored`, or `scripts/gpu/engine`.
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use serde_json::Value;
use stoker_checkpoint::dequant::COMPUTABLE;
use stoker_device::{CudaDevice, CudaOptions, Cut, Device, Slab, Transfer};
use stoker_engine::{
    Batch, Engine, EngineError, EngineLimits, Model, Span, StepEngine, Threads,
    gpu::{Arrivals, DeviceWeights, Gate, Gpu, load_model},
};
use stoker_types::{ByteSize, DType};
use support::{Checkpoint, LIMITS, Random, Tokens, data, greedy, logits_from, logits_in_chunks, run};

/// One for all tests: a process has one context.
static GPU: LazyLock<Arc<Gpu>> = LazyLock::new(|| {
    let device = CudaDevice::open(0, &CudaOptions::default()).expect("there is a GPU");
    Gpu::open(Arc::new(device)).expect("its kernels load")
});

/// Bytes of a chunk, as far as arrivals go.
const CHUNK: u64 = 16 << 10;

/// A checkpoint's place on the device.
struct Placed {
    slab: Slab,
    tensors: Vec<u64>,
    words: u64,
    chunks: u64,
}

impl Placed {
    fn new(checkpoint: &Checkpoint) -> Self {
        let mut end = 0_u64;
        let tensors = checkpoint.manifest.tensors.iter().map(|tensor| {
            let at = end.next_multiple_of(256);
            end = at + tensor.len;
            at
        });
        let tensors = tensors.collect();
        let words = end.next_multiple_of(256);
        let chunks = checkpoint.manifest.files.iter().map(|file| file.identity.len.div_ceil(CHUNK)).sum();
        let slab = GPU.device().allocate(ByteSize(words + 4 * chunks), ByteSize::mib(2)).unwrap();
        let placed = Self { slab, tensors, words, chunks };
        placed.write(words, &vec![0; usize::try_from(4 * chunks).unwrap()]);
        placed
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let (sender, done) = std::sync::mpsc::channel();
        GPU.device().copy(Transfer {
            from: Box::new(bytes.to_vec()),
            to: self.slab.clone(),
            cuts: vec![Cut::range(0, bytes.len(), at)],
            arrival: None,
            done: Box::new(move |result| sender.send(result).unwrap()),
        });
        done.recv().unwrap().unwrap();
    }

    fn fill(&self, checkpoint: &Checkpoint) {
        for (tensor, at) in checkpoint.manifest.tensors.iter().zip(&self.tensors) {
            let from = usize::try_from(tensor.offset).unwrap();
            let len = usize::try_from(tensor.len).unwrap();
            self.write(*at, &checkpoint.regions[tensor.file as usize].bytes()[from..from + len]);
        }
    }

    fn gate(&self) -> Gate {
        Gate::new(&self.slab, Arrivals { at: self.words, words: self.chunks, chunk_bytes: CHUNK })
    }

    fn weights(&self, gate: Option<Gate>) -> DeviceWeights {
        DeviceWeights { slab: self.slab.clone(), tensors: self.tensors.clone(), gate }
    }
}

fn model_of(checkpoint: &Checkpoint) -> Box<dyn Model> {
    let placed = Placed::new(checkpoint);
    placed.fill(checkpoint);
    let threads = Arc::new(Threads::new(2).unwrap());
    load_model(&GPU, &checkpoint.manifest, placed.weights(None), threads, &LIMITS).unwrap()
}

/// The error of all logits together, in proportion to what they should be.
fn relative_error(ours: &[Vec<f32>], wanted: &[Vec<f32>]) -> f64 {
    assert_eq!(ours.len(), wanted.len());
    let pairs = || ours.iter().flatten().zip(wanted.iter().flatten());
    let size: f64 = pairs().map(|(_, wanted)| f64::from(*wanted).powi(2)).sum();
    assert!(size > 0.0 && ours.iter().flatten().all(|logit| logit.is_finite()));
    let error: f64 = pairs().map(|(ours, wanted)| f64::from(ours - wanted).powi(2)).sum();
    (error / size).sqrt()
}

/// `same_ids`: whether greedy ids have to be the same.
fn check_reference(name: &str, tolerance: f64, same_ids: bool) {
    let dir = data(name);
    let reference: Value =
        serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::read(&dir);
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
    };
    let mut model = model_of(&checkpoint);
    let mut engine = Engine::new(model_of(&checkpoint), LIMITS).unwrap();
    let cases = reference["cases"].as_array().unwrap();
    let (mut all, mut wanted) = (Vec::new(), Vec::new());
    for (key, case) in (0..).zip(cases) {
        let prompt = ids(&case["prompt_ids"]);
        let logits = logits_from(&mut *model, &prompt, 0);
        for (position, expected) in case["logits"].as_object().unwrap() {
            all.push(logits[position.parse::<usize>().unwrap()].clone());
            #[expect(clippy::cast_possible_truncation, reason = "they were written as such")]
            wanted.push(expected.as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as f32).collect());
        }
        let tokens_max = u32::try_from(ids(&case["greedy_ids"]).len()).unwrap();
        engine.submit(greedy(key, prompt, tokens_max)).unwrap();
    }
    let error = relative_error(&all, &wanted);
    assert!(error <= tolerance, "{name}: {error}");
    if same_ids {
        for (brought, case) in run(&mut engine, cases.len()).iter().zip(cases) {
            let brought: Vec<u32> = brought.iter().map(|(id, _)| *id).collect();
            assert_eq!(brought, ids(&case["greedy_ids"]), "{name}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn logits_and_greedy_ids_are_those_of_transformers() {
    check_reference("tiny-llama", 1e-5, true);
    check_reference("tiny-llama3", 1e-5, true);
    check_reference("tiny-mistral", 1e-5, true);
    // Every activation is rounded to 8 bits; transformers in bf16 is 2.7e-2 away from itself in fp32 here.
    check_reference("tiny-llama-bf16-sharded", 2e-2, false);
}

#[test]
#[ignore = "needs a GPU"]
fn every_format_computes_what_its_numbers_say() {
    let mut random = Random(3);
    let text = random.ids(150, 256);
    for dtype in COMPUTABLE {
        let checkpoint = Checkpoint::of_type(*dtype);
        let wanted = logits_from(&mut *checkpoint.dequantised().model(2), &text, 0);
        let mut model = model_of(&checkpoint);
        // Few rows and many go through different kernels, which bring the same bits.
        let ours = logits_from(&mut *model, &text, 0);
        let error = relative_error(&ours, &wanted);
        let tolerance = match dtype {
            DType::F32 => 1e-5,
            DType::BF16 => 1e-2,
            _ => 2e-3,
        };
        assert!(error < tolerance, "{dtype}: {error}");
        for rows in [1, 7, 30, 100] {
            let chunked = logits_in_chunks(&mut *model, &text, 0, rows);
            let bits =
                |rows: &[Vec<f32>]| -> Vec<u32> { rows.iter().flatten().map(|f| f.to_bits()).collect() };
            assert!(bits(&chunked) == bits(&ours), "{dtype}, {rows} rows at a time");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_sequence_is_the_same_alone_and_among_others() {
    let checkpoint = Checkpoint::of_type(DType::F16);
    let mut random = Random(5);
    let prompts: Vec<Vec<u32>> =
        [3, 40, 130, 33, 64, 1, 90, 17].iter().map(|length| random.ids(*length, 256)).collect();
    let tokens_max = 40;
    let limits = |sequences_max, prefill_tokens_per_step| EngineLimits {
        sequences_max,
        prefill_tokens_per_step,
        ..LIMITS
    };
    let all = |limits: EngineLimits| -> Vec<Tokens> {
        let mut engine = Engine::new(model_of(&checkpoint), limits).unwrap();
        for (key, prompt) in (0..).zip(&prompts) {
            engine.submit(greedy(key, prompt.clone(), tokens_max)).unwrap();
        }
        run(&mut engine, prompts.len())
    };
    let alone = all(limits(1, 512));
    assert!(alone.iter().all(|tokens| tokens.len() == tokens_max as usize));
    assert_eq!(all(limits(8, 512)), alone);
    assert_eq!(all(limits(5, 13)), alone);
}

#[test]
#[ignore = "needs a GPU"]
fn layers_wait_for_their_weights_on_the_device() {
    let checkpoint = Checkpoint::of_type(DType::F16);
    let text = Random(6).ids(50, 256);
    let wanted = logits_from(&mut *model_of(&checkpoint), &text, 0);
    let placed = Placed::new(&checkpoint);
    let threads = Arc::new(Threads::new(1).unwrap());
    let weights = placed.weights(Some(placed.gate()));
    let mut model = load_model(&GPU, &checkpoint.manifest, weights, threads, &LIMITS).unwrap();
    let (sender, result) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn({
        let text = text.clone();
        move || {
            sender.send(logits_from(&mut *model, &text, 0)).unwrap();
            // Everything is there now: nothing waits.
            sender.send(logits_from(&mut *model, &text, 0)).unwrap();
        }
    });
    // Nothing has arrived, so nothing can come of it: this waits for its whole time, or fails.
    assert!(result.recv_timeout(Duration::from_millis(300)).is_err(), "it computed with nothing");
    placed.fill(&checkpoint);
    for chunk in 0..placed.chunks {
        placed.write(placed.words + 4 * chunk, &1_u32.to_le_bytes());
    }
    assert_eq!(result.recv().unwrap(), wanted);
    assert_eq!(result.recv().unwrap(), wanted);
    waiting.join().unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn what_waits_for_weights_that_never_come_ends() {
    let checkpoint = Checkpoint::of_type(DType::F16);
    let placed = Placed::new(&checkpoint);
    let gate = placed.gate();
    let weights = placed.weights(Some(gate.clone()));
    let threads = Arc::new(Threads::new(1).unwrap());
    let mut model = load_model(&GPU, &checkpoint.manifest, weights, threads, &LIMITS).unwrap();
    model.open_kv(4).unwrap();
    model.grow_kv(4).unwrap();
    let (sender, result) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        let spans = [Span { rows: 3, start: 0, blocks: &[2] }];
        let batch = Batch { tokens: &[1, 2, 3], spans: &spans, logit_rows: &[2] };
        sender.send(model.forward(&batch)).unwrap();
        sender.send(model.forward(&batch)).unwrap();
    });
    assert!(result.recv_timeout(Duration::from_millis(100)).is_err(), "it computed with nothing");
    gate.fail(&GPU).unwrap();
    for _ in 0..2 {
        let error = result.recv().unwrap().unwrap_err();
        assert!(matches!(error, EngineError::WeightsLost), "{error}");
    }
    waiting.join().unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn device_memory_comes_back() {
    let checkpoint = Checkpoint::of_type(DType::F16);
    let text = Random(7).ids(70, 256);
    let once = || logits_from(&mut *model_of(&checkpoint), &text, 0);
    let (first, before) = (once(), GPU.device().memory().unwrap().free);
    for _ in 0..100 {
        assert_eq!(once(), first);
    }
    assert_eq!(GPU.device().memory().unwrap().free, before);
}
