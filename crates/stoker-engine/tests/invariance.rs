//! Row invariance, bit for bit: what a sequence brings doesn't depend on batch, chunks, threads, instruction set, prefix
//! cache, preemption or resuming.
#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::sync::Arc;

use stoker_engine::{
    Batch, EngineLimits, Isa, Model, Places, SequenceRequest, Span, StepEngine, Threads, kv::BLOCK_TOKENS,
    load_model,
};
use stoker_types::{DType, Sampling};
use support::{Checkpoint, LIMITS, Random, Tokens, data, greedy, logits_in_chunks, run};

const VOCAB: usize = 259;

/// Every type that the engine computes with, and every variant of the family.
fn checkpoints() -> Vec<(&'static str, Checkpoint)> {
    let read = |name: &str| Checkpoint::read(&data(name));
    vec![
        ("f32, tied", read("tiny-llama")),
        ("f32, biases", read("tiny-llama3")),
        ("f32, window", read("tiny-mistral")),
        ("bf16", read("tiny-llama-bf16-sharded")),
        ("Q8_0", read("tiny-llama3").quantised(DType::Q8_0)),
        ("Q4_1, window", read("tiny-mistral").quantised(DType::Q4_1)),
        ("every type", Checkpoint::of_every_type(0)),
        ("every type, elsewhere", Checkpoint::of_every_type(7)),
    ]
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// A sequence in the schedule of [`check_logits`].
struct Running<'a> {
    tokens: &'a [u32],
    computed: usize,
    blocks: Vec<u32>,
}

/// Computes the sequences in batches, with blocks in random places, and compares each row's logits. `rows_next` says how
/// many rows of each sequence come next, given how many each has left: none leaves it out, one decodes, more prefill.
fn check_logits(
    model: &mut dyn Model,
    texts: &[Vec<u32>],
    expected: &[Vec<Vec<u32>>],
    random: &mut Random,
    mut rows_next: impl FnMut(&mut Random, &[usize]) -> Vec<usize>,
) {
    let blocks_each = 1 + texts.iter().map(Vec::len).max().unwrap() / BLOCK_TOKENS;
    let mut free: Vec<u32> = (0..u32::try_from(texts.len() * blocks_each).unwrap()).collect();
    for at in (1..free.len()).rev() {
        free.swap(at, random.below(at + 1));
    }
    model.open_kv(free.len()).unwrap();
    model.grow_kv(free.len()).unwrap();
    let mut running: Vec<Running<'_>> = texts
        .iter()
        .map(|tokens| Running { tokens, computed: 0, blocks: free.split_off(free.len() - blocks_each) })
        .collect();
    while running.iter().any(|s| s.computed < s.tokens.len()) {
        let left: Vec<usize> = running.iter().map(|s| s.tokens.len() - s.computed).collect();
        let rows = rows_next(random, &left);
        let mut tokens = Vec::new();
        let mut spans = Vec::new();
        let mut places = Vec::new();
        for (sequence, (s, &rows)) in
            running.iter().zip(&rows).enumerate().filter(|(_, (_, rows))| **rows > 0)
        {
            tokens.extend_from_slice(&s.tokens[s.computed..s.computed + rows]);
            spans.push(Span { rows, start: s.computed, blocks: &s.blocks });
            places.extend((s.computed..s.computed + rows).map(|position| (sequence, position)));
        }
        if tokens.is_empty() {
            continue;
        }
        let logit_rows: Vec<usize> = (0..tokens.len()).filter(|_| random.below(3) > 0).collect();
        let batch = Batch { tokens: &tokens, spans: &spans, logit_rows: &logit_rows };
        model.forward(&batch).unwrap();
        let logits = model.logits();
        assert_eq!(logits.len(), logit_rows.len() * VOCAB);
        for (row, logits) in logit_rows.iter().zip(logits.chunks_exact(VOCAB)) {
            let (sequence, position) = places[*row];
            assert!(
                bits(logits) == expected[sequence][position],
                "position {position} of sequence {sequence} in a batch of {}",
                tokens.len()
            );
        }
        for (s, rows) in running.iter_mut().zip(rows) {
            s.computed += rows;
        }
    }
}

/// The bits of every row's logits, each sequence computed on its own in batches of at most `rows`.
fn logits_alone(model: &mut dyn Model, texts: &[Vec<u32>], rows: usize) -> Vec<Vec<Vec<u32>>> {
    let alone = |text: &Vec<u32>| {
        let all = logits_in_chunks(model, text, 0, rows);
        assert!(all.iter().flatten().all(|logit| logit.is_finite()), "nothing to compare");
        assert!(all.iter().all(|row| row.iter().any(|logit| *logit != row[0])), "nothing to compare");
        all.iter().map(|row| bits(row)).collect()
    };
    texts.iter().map(alone).collect()
}

#[test]
fn one_row_at_a_time_or_512_at_once() {
    // Around the sizes where kernels change their way, and the largest.
    const ROWS: [usize; 17] = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 255, 256, 512];
    for first in [0, 7] {
        let checkpoint = Checkpoint::of_every_type(first);
        let mut random = Random(7);
        let texts: Vec<Vec<u32>> = [256, 200, 56].iter().map(|n| random.ids(*n, VOCAB)).collect();
        let mut model = checkpoint.model(2);
        let expected = logits_alone(&mut *model, &texts, 1);
        for rows in ROWS {
            eprintln!("{first}, batches of {rows}");
            // An equal share for each sequence, the rest for the first that has some.
            check_logits(&mut *model, &texts, &expected, &mut random, |_, left| {
                let mut next: Vec<usize> = left.iter().map(|left| (rows / 3).min(*left)).collect();
                for (i, left) in left.iter().enumerate() {
                    let free = rows - next.iter().sum::<usize>();
                    next[i] += free.min(left - next[i]);
                }
                next
            });
        }
    }
}

#[test]
fn logits_do_not_depend_on_batch_chunks_threads_or_instructions() {
    for (name, checkpoint) in checkpoints() {
        let mut random = Random(11);
        let texts: Vec<Vec<u32>> = [190, 75, 33, 32, 7].iter().map(|n| random.ids(*n, VOCAB)).collect();
        let expected = logits_alone(&mut *checkpoint.model(1), &texts, usize::MAX);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let threads = Arc::new(Threads::with_isa(threads, isa).unwrap());
                let regions = Places::Files(&checkpoint.regions);
                let mut model = load_model(&checkpoint.manifest, regions, threads, &LIMITS).unwrap();
                for seed in 0..2 {
                    eprintln!("{name}, {}, seed {seed}", isa.name());
                    check_logits(&mut *model, &texts, &expected, &mut Random(seed), |random, left| {
                        let any = |left: &usize| [0, 1, 1, random.below(90)][random.below(4)].min(*left);
                        left.iter().map(any).collect()
                    });
                }
            }
        }
    }
}

fn sampled(key: u64, prompt: Vec<u32>, tokens_max: u32) -> SequenceRequest {
    SequenceRequest {
        sampling: Sampling {
            temperature: 0.9,
            top_p: 0.95,
            frequency_penalty: 0.2,
            repetition_penalty: 1.1,
            seed: key * 77,
            logprobs: Some(0),
            ..Sampling::default()
        },
        ..greedy(key, prompt, tokens_max)
    }
}

fn alone(checkpoint: &Checkpoint, request: &SequenceRequest) -> Tokens {
    let mut engine = checkpoint.engine(LIMITS);
    engine.submit(SequenceRequest { key: 0, ..request.clone() }).unwrap();
    run(&mut engine, 1).remove(0)
}

#[test]
fn what_an_engine_brings_does_not_depend_on_its_company() {
    for (name, checkpoint) in checkpoints() {
        let mut random = Random(5);
        let common = random.ids(100, VOCAB);
        let requests: Vec<SequenceRequest> = (0..9)
            .map(|key| {
                // Some share a beginning, so that blocks are shared.
                let own = 1 + random.below(60);
                let beginning = if key % 2 == 0 { random.below(100) } else { 0 };
                let prompt = [&common[..beginning], &random.ids(own, VOCAB)].concat();
                let tokens_max = u32::try_from(5 + random.below(70)).unwrap();
                if key % 3 == 0 { greedy(key, prompt, tokens_max) } else { sampled(key, prompt, tokens_max) }
            })
            .collect();
        let expected: Vec<Tokens> = requests.iter().map(|request| alone(&checkpoint, request)).collect();
        for (blocks, prefill_tokens_per_step) in [(1000, 64), (1000, 7), (12, 50), (9, 200)] {
            let kv_bytes = blocks * checkpoint.block_bytes();
            let limits = EngineLimits { kv_bytes, prefill_tokens_per_step, ..LIMITS };
            let mut engine = checkpoint.engine(limits);
            for request in &requests {
                engine.submit(request.clone()).unwrap();
            }
            assert_eq!(run(&mut engine, requests.len()), expected, "{name}, {blocks} blocks");
            // Again, with what the first round left in the cache.
            let cached = engine.stats().cached_tokens;
            for request in &requests {
                engine.submit(request.clone()).unwrap();
            }
            assert_eq!(run(&mut engine, requests.len()), expected, "{name}, {blocks} blocks, again");
            if blocks == 1000 {
                assert!(engine.stats().cached_tokens > cached, "{:?}", engine.stats());
            }
        }
    }
}

#[test]
fn a_preempted_sequence_brings_what_it_would_have() {
    for (name, checkpoint) in checkpoints() {
        let mut random = Random(3);
        let requests: Vec<SequenceRequest> = [20, 45, 31, 26, 50]
            .iter()
            .zip(0..)
            .map(|(n, key)| sampled(key, random.ids(*n, VOCAB), 150))
            .collect();
        let expected: Vec<Tokens> = requests.iter().map(|request| alone(&checkpoint, request)).collect();
        // Each grows to six or seven blocks.
        let mut engine =
            checkpoint.engine(EngineLimits { kv_bytes: 12 * checkpoint.block_bytes(), ..LIMITS });
        for request in &requests {
            engine.submit(request.clone()).unwrap();
        }
        assert_eq!(run(&mut engine, requests.len()), expected, "{name}");
        assert!(engine.stats().preemptions > 0, "{name}: {:?}", engine.stats());
    }
}

#[test]
fn a_sequence_resumes_from_every_position() {
    for (name, checkpoint) in checkpoints() {
        let mut random = Random(9);
        let request = sampled(0, random.ids(45, VOCAB), 40);
        let full = alone(&checkpoint, &request);
        let ids: Vec<u32> = full.iter().map(|(id, _)| *id).collect();
        let mut engine = checkpoint.engine(LIMITS);
        for from in 0..ids.len() {
            let resumed = SequenceRequest { generated: ids[..from].to_vec(), ..request.clone() };
            // In a fresh engine, and in one whose cache knows the beginning.
            assert_eq!(alone(&checkpoint, &resumed), full[from..], "{name}, from {from}");
            engine.submit(resumed).unwrap();
            assert_eq!(run(&mut engine, 1)[0], full[from..], "{name}, from {from}, cached");
        }
    }
}
