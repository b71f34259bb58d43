//! How fast the kernels are on this machine: `cargo run --release -p stoker-engine --example kernels [THREADS]`.
//!
//! Prints the memory bandwidth, the cost of a fork and join, for each weight type products per second and weight bytes
//! per second, and all matrices of a SmolLM2-135M one after the other (what decode and prefill can reach).
#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::{sync::Arc, time::Duration};

use stoker_checkpoint::dequant::COMPUTABLE;
use stoker_engine::{
    Isa, Threads, Weight, WeightBytes,
    kernels::{Activations, AttentionRow, AttentionShape, Scratch, attention, linear},
    physical_cores,
};
use stoker_types::{DType, clock};

fn main() {
    let argument = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let count = argument.unwrap_or_else(physical_cores);
    // The plain version is a fallback; its figures are of interest only where there is nothing else.
    let fallback = usize::from(Isa::available().len() > 1);
    for isa in Isa::available().into_iter().skip(fallback).rev() {
        let Ok(threads) = Threads::with_isa(count, isa) else {
            println!("can't start {count} threads");
            return;
        };
        println!("\n== {} threads, {}", threads.count(), isa.name());
        println!("memory, read: {:.1} GB/s", bandwidth(&threads));
        println!("fork and join: {:.2} us", fork_join(&threads));
        types(&threads);
        smollm2(&threads);
        attention_rates(&threads);
    }
}

/// The shortest of some runs, for at least a tenth of a second.
fn best(mut run: impl FnMut()) -> Duration {
    run();
    let begin = clock::now();
    let mut best = Duration::MAX;
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < Duration::from_millis(150) {
        let start = clock::now();
        run();
        best = best.min(start.elapsed());
        runs += 1;
    }
    best
}

fn bandwidth(threads: &Threads) -> f64 {
    let data = vec![1u64; 256 << 17];
    let time = best(|| {
        threads.parallel(256, 4, |range, _| {
            let sum = data[range.start << 17..range.end << 17].iter().fold(0u64, |a, v| a.wrapping_add(*v));
            std::hint::black_box(sum);
        });
    });
    (data.len() * 8) as f64 / time.as_secs_f64() / 1e9
}

fn fork_join(threads: &Threads) -> f64 {
    let time = best(|| {
        for _ in 0..100 {
            threads.parallel(64, 1, |range, _| {
                std::hint::black_box(range);
            });
        }
    });
    time.as_secs_f64() * 1e6 / 100.0
}

/// A weight of zeros but for its first scale: the kernels' time doesn't depend on the values.
fn weight(dtype: DType, rows: usize, cols: usize) -> Weight {
    let len = dtype.bytes_of((rows * cols) as u64).and_then(|n| usize::try_from(n).ok()).unwrap_or_default();
    let bytes: Vec<u8> = vec![0x11; len];
    WeightBytes::new(Arc::new(bytes), 0, len)
        .and_then(|bytes| Weight::new(dtype, rows, cols, bytes))
        .expect("shapes of this table are whole blocks")
}

fn types(threads: &Threads) {
    let (rows, cols) = (4096, 2048);
    let mut scratch = Scratch::default();
    println!("{:6} {:>30} {:>30} {:>30}", "type", "m = 1", "m = 8", "m = 128");
    for &dtype in COMPUTABLE {
        let weight = weight(dtype, rows, cols);
        let mut line = format!("{:6}", dtype.name());
        for m in [1, 8, 128] {
            let x: Vec<f32> = (0..m * cols).map(|i| (i % 17) as f32 - 8.0).collect();
            let mut out = vec![0.0; m * rows];
            let time = best(|| {
                linear(threads, &weight, None, &mut Activations::new(&x, m, cols, &mut scratch), &mut out);
            });
            let flops = 2.0 * (m * rows * cols) as f64 / time.as_secs_f64() / 1e9;
            let bytes = weight.bytes().len() as f64 / time.as_secs_f64() / 1e9;
            line += &format!("   {flops:9.1} GFLOP/s {bytes:6.1} GB/s");
        }
        println!("{line}");
    }
}

/// All matrices of the 135M model, each at its own place in memory.
fn smollm2(threads: &Threads) {
    for dtype in [DType::Q4_1, DType::Q4_0, DType::Q8_0, DType::F16] {
        let layers: Vec<[Weight; 7]> = (0..30)
            .map(|_| {
                [
                    weight(dtype, 576, 576),
                    weight(dtype, 192, 576),
                    weight(dtype, 192, 576),
                    weight(dtype, 576, 576),
                    weight(dtype, 1536, 576),
                    weight(dtype, 1536, 576),
                    weight(dtype, 576, 1536),
                ]
            })
            .collect();
        let head = weight(if dtype == DType::F16 { DType::F16 } else { DType::Q8_0 }, 49152, 576);
        let mut scratch = Scratch::default();
        for m in [1, 128] {
            let x: Vec<f32> = (0..m * 1536).map(|i| (i % 17) as f32 - 8.0).collect();
            let mut out = vec![0.0; m * 1536];
            let mut logits = vec![0.0; 49152];
            let time = best(|| {
                for [q, k, v, o, gate, up, down] in &layers {
                    for group in [&[q, k, v][..], &[o], &[gate, up], &[down]] {
                        let cols = group[0].cols();
                        let mut x = Activations::new(&x[..m * cols], m, cols, &mut scratch);
                        for weight in group {
                            linear(threads, weight, None, &mut x, &mut out[..m * weight.rows()]);
                        }
                    }
                }
                linear(
                    threads,
                    &head,
                    None,
                    &mut Activations::new(&x[..576], 1, 576, &mut scratch),
                    &mut logits,
                );
            });
            println!(
                "SmolLM2-135M's matrices, {dtype}, m = {m}: {:.2} ms, {:.0} tokens/s",
                time.as_secs_f64() * 1e3,
                m as f64 / time.as_secs_f64()
            );
        }
    }
}

/// 30 layers of attention of the 135M model.
fn attention_rates(threads: &Threads) {
    let shape =
        AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, block_size: 16, window: None, scale: 0.125 };
    for (context, m) in [(128_u32, 1_u32), (128, 128), (2048, 1), (2048, 256)] {
        let blocks: Vec<u32> = (0..context / 16).collect();
        let (context, m) = (context as usize, m as usize);
        let cache = vec![0.01; context * 3 * 64];
        let rows: Vec<AttentionRow<'_>> =
            (context - m..context).map(|position| AttentionRow { blocks: &blocks, position }).collect();
        let q = vec![0.01; m * 576];
        let mut out = vec![0.0; m * 576];
        let time = best(|| {
            for _ in 0..30 {
                attention(threads, &shape, &q, &rows, &cache, &cache, &mut out);
            }
        });
        println!("attention x 30, context {context}, m = {m}: {:.2} ms", time.as_secs_f64() * 1e3);
    }
}
