//! The kernels' two promises: the right numbers, and the same bits whatever is computed beside them.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use proptest::prelude::*;
use stoker_checkpoint::dequant::dequantize;
use stoker_engine::{
    Isa, Threads, Weight, WeightBytes,
    kernels::{
        Activations, AttentionRow, AttentionShape, RopeAngles, Scratch, attention, embed, linear, rms_norm,
        rope, silu_mul,
    },
};
use stoker_types::DType;

const TYPES: [DType; 13] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
];

/// A small deterministic generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Where a block has its f16 scales.
fn scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[],
    }
}

/// A weight of random bits with scales in a range that models have, at an odd address.
fn weight(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Weight {
    let len = usize::try_from(dtype.bytes_of((rows * cols) as u64).unwrap()).unwrap();
    let mut bytes = vec![0u8; len + 1];
    match dtype {
        DType::F32 => {
            bytes[1..].as_chunks_mut::<4>().0.iter_mut().for_each(|b| *b = random.float().to_le_bytes())
        }
        DType::F16 => {
            let half = |v: f32| half::f16::from_f32(v).to_le_bytes();
            bytes[1..].as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = half(random.float()));
        }
        DType::BF16 => {
            let half = |v: f32| half::bf16::from_f32(v).to_le_bytes();
            bytes[1..].as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = half(random.float()));
        }
        _ => {
            bytes.iter_mut().for_each(|b| *b = (random.next() >> 56) as u8);
            for block in bytes[1..].chunks_exact_mut(usize::try_from(dtype.block_bytes()).unwrap()) {
                for at in scales(dtype) {
                    let scale = half::f16::from_f32(random.float() * 0.01);
                    block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
    Weight::new(dtype, rows, cols, WeightBytes::new(Arc::new(bytes), 1, len).unwrap()).unwrap()
}

fn product(threads: &Threads, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let m = x.len() / weight.cols();
    let mut out = vec![f32::NAN; m * weight.rows()];
    let mut scratch = Scratch::default();
    linear(threads, weight, None, &mut Activations::new(x, m, weight.cols(), &mut scratch), &mut out);
    out
}

fn dequantized(weight: &Weight) -> Vec<f32> {
    let mut out = vec![0.0; weight.rows() * weight.cols()];
    dequantize(weight.dtype(), weight.bytes(), &mut out).unwrap();
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn columns(dtype: DType, choice: usize) -> usize {
    match dtype.block_elements() {
        1 => 1 + choice % 200,
        block => usize::try_from(block).unwrap() * (1 + choice % if block == 32 { 37 } else { 5 }),
    }
}

#[test]
fn embedding_is_the_reference_bit_for_bit() {
    let mut random = Random(1);
    for dtype in TYPES {
        let weight = weight(dtype, 37, columns(dtype, 1), &mut random);
        let all = dequantized(&weight);
        let ids = [0, 36, 5, 5, 17].repeat(5);
        let mut out = vec![0.0; ids.len() * weight.cols()];
        embed(&weight, &ids, &mut out);
        for (id, out) in ids.iter().zip(out.chunks_exact(weight.cols())) {
            let expected = &all[*id as usize * weight.cols()..][..weight.cols()];
            assert_eq!(bits(out), bits(expected), "{dtype} row {id}");
        }
        assert_eq!(bits(&weight.to_f32()), bits(&all), "{dtype}");
    }
}

/// The activations as the quantised kernels see them.
fn rounded(x: &[f32]) -> Vec<f64> {
    let block = |x: &[f32]| {
        let d = x.iter().fold(0.0_f32, |a, v| a.max(v.abs())) / 127.0;
        x.iter().map(|v| f64::from(d) * f64::from((v / d).round_ties_even())).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

#[test]
fn products_are_close_to_f64() {
    let mut random = Random(2);
    let threads = Threads::new(2).unwrap();
    for dtype in TYPES {
        let cols = if dtype.block_elements() == 1 { 777 } else { 1024 };
        let weight = weight(dtype, 53, cols, &mut random);
        let all = dequantized(&weight);
        let x = random.floats(3 * cols);
        let exact: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let seen = if dtype.block_elements() == 1 { exact.clone() } else { rounded(&x) };
        let out = product(&threads, &weight, &x);
        let (mut error, mut from_exact, mut size) = (0.0_f64, 0.0_f64, 0.0_f64);
        for (row, out) in out.chunks_exact(53).enumerate() {
            for (output, got) in out.iter().enumerate() {
                let w = &all[output * cols..][..cols];
                let dot = |x: &[f64]| -> f64 {
                    w.iter().zip(&x[row * cols..]).map(|(w, x)| f64::from(*w) * x).sum()
                };
                error += (f64::from(*got) - dot(&seen)).powi(2);
                from_exact += (f64::from(*got) - dot(&exact)).powi(2);
                size += dot(&exact).powi(2);
            }
        }
        let (error, from_exact) = ((error / size).sqrt(), (from_exact / size).sqrt());
        // Rounding of f32 sums, and (now and then) a tie of the quantisation that division decides otherwise.
        assert!(error < 2e-4, "{dtype}: {error:e} from the product of what was quantised");
        assert!(from_exact < 0.01, "{dtype}: {from_exact:e} from the exact product");
    }
}

#[test]
fn bias_is_added() {
    let mut random = Random(3);
    let threads = Threads::new(1).unwrap();
    let weight = weight(DType::Q4_1, 19, 64, &mut random);
    let (x, bias) = (random.floats(2 * 64), random.floats(19));
    let mut out = vec![0.0; 2 * 19];
    let mut scratch = Scratch::default();
    let mut activations = Activations::new(&x, 2, 64, &mut scratch);
    linear(&threads, &weight, Some(&bias), &mut activations, &mut out);
    let plain = product(&threads, &weight, &x);
    for (i, (with, without)) in out.iter().zip(plain).enumerate() {
        assert_eq!(*with, without + bias[i % 19]);
    }
}

#[test]
fn what_is_not_a_number_stays_visible() {
    let mut random = Random(4);
    let threads = Threads::new(1).unwrap();
    for dtype in TYPES {
        let weight = weight(dtype, 3, columns(dtype, 63), &mut random);
        let mut x = random.floats(2 * weight.cols());
        x[1] = f32::NAN;
        let out = product(&threads, &weight, &x);
        assert!(out[..3].iter().all(|v| v.is_nan()), "{dtype}");
        assert!(out[3..].iter().all(|v| v.is_finite()), "{dtype}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    /// One row, many rows, any rows, any threads, any instruction set: the same bits.
    #[test]
    fn linear_is_row_invariant(
        kind in 0..TYPES.len(),
        rows in 1_usize..70,
        choice in any::<usize>(),
        m in prop_oneof![2_usize..40, 2_usize..513],
        count in 1_usize..4,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let dtype = TYPES[kind];
        let weight = weight(dtype, rows, columns(dtype, choice % 1000), &mut random);
        let cols = weight.cols();
        let mut x = random.floats(m * cols);
        // Rows of very different sizes, as real activations have.
        for row in x.chunks_exact_mut(cols) {
            let size = 2.0_f32.powi((random.next() % 24) as i32 - 12);
            row.iter_mut().for_each(|v| *v *= size);
        }
        let plain = Threads::with_isa(1, Isa::available()[0]).unwrap();
        let expected = bits(&product(&plain, &weight, &x[..2 * cols]));
        for isa in Isa::available() {
            let threads = Threads::with_isa(count, isa).unwrap();
            let all = bits(&product(&threads, &weight, &x));
            prop_assert_eq!(&all[..2 * rows], &expected[..], "{} {}", dtype, isa.name());
            let subset: Vec<usize> = (0..m).filter(|_| random.next().is_multiple_of(5)).chain([m - 1]).collect();
            let picked: Vec<f32> = subset.iter().flat_map(|r| x[r * cols..][..cols].to_vec()).collect();
            let picked = bits(&product(&threads, &weight, &picked));
            for (row, picked) in subset.iter().zip(picked.chunks_exact(rows)) {
                prop_assert_eq!(picked, &all[row * rows..][..rows], "{} {} row {}", dtype, isa.name(), row);
                let alone = bits(&product(&threads, &weight, &x[row * cols..][..cols]));
                prop_assert_eq!(&alone[..], picked, "{} {} row {} alone", dtype, isa.name(), row);
            }
        }
    }

    /// The element-wise kernels too.
    #[test]
    fn the_small_kernels_are_row_invariant(
        m in 1_usize..60,
        heads in 1_usize..5,
        pairs in 1_usize..40,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let width = heads * 2 * pairs;
        let (x, y, weight) = (random.floats(m * width), random.floats(m * width), random.floats(width));
        let frequencies = random.floats(pairs);
        let positions: Vec<u32> = (0..m).map(|_| (random.next() % 5000) as u32).collect();
        let mut expected: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let threads = Threads::with_isa(2, isa).unwrap();
            let run = |rows: std::ops::Range<usize>| {
                let (x, y) = (&x[rows.start * width..rows.end * width], &y[rows.start * width..rows.end * width]);
                let mut normed = vec![0.0; x.len()];
                rms_norm(&threads, x, &weight, 1e-5, &mut normed);
                let mut gated = vec![0.0; x.len()];
                silu_mul(&threads, x, y, &mut gated);
                let mut turned = x.to_vec();
                let mut angles = RopeAngles::default();
                angles.set(&frequencies, &positions[rows]);
                rope(&threads, &mut turned, heads, 2 * pairs, stoker_checkpoint::config::RopeLayout::Halves, &angles);
                rope(&threads, &mut turned, heads, 2 * pairs, stoker_checkpoint::config::RopeLayout::Interleaved, &angles);
                bits(&[normed, gated, turned].into_iter().flat_map(|v| v[..width].to_vec()).collect::<Vec<_>>())
            };
            let whole = run(0..m);
            prop_assert_eq!(&run(0..1), &whole);
            prop_assert_eq!(expected.get_or_insert_with(|| whole.clone()), &whole);
        }
    }
}

/// A sequence's keys and values in blocks of a random order.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    blocks: Vec<u32>,
}

/// The keys and values of `tokens` positions, in a cache of blocks chosen by `order`.
fn cache(shape: &AttentionShape, tokens: usize, seed: u64, order: u64) -> Cache {
    let count = tokens.div_ceil(shape.block_size);
    let mut blocks: Vec<u32> = (0..u32::try_from(count).unwrap() + 3).collect();
    let mut random = Random(order);
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, usize::try_from(random.next() % (i as u64 + 1)).unwrap());
    }
    let size = shape.kv_heads * shape.head_dim;
    // What was never written is NaN: reading it would show.
    let mut cache = Cache {
        keys: vec![f32::NAN; blocks.len() * shape.block_size * size],
        values: vec![f32::NAN; blocks.len() * shape.block_size * size],
        blocks,
    };
    let mut random = Random(seed);
    for position in 0..tokens {
        let slot = cache.blocks[position / shape.block_size] as usize * shape.block_size
            + position % shape.block_size;
        cache.keys[slot * size..][..size].copy_from_slice(&random.floats(size));
        cache.values[slot * size..][..size].copy_from_slice(&random.floats(size));
    }
    cache
}

fn attend(
    threads: &Threads,
    shape: &AttentionShape,
    cache: &Cache,
    q: &[f32],
    positions: &[usize],
) -> Vec<f32> {
    let rows: Vec<AttentionRow<'_>> =
        positions.iter().map(|p| AttentionRow { blocks: &cache.blocks, position: *p }).collect();
    let mut out = vec![f32::NAN; q.len()];
    attention(threads, shape, q, &rows, &cache.keys, &cache.values, &mut out);
    out
}

#[test]
fn attention_is_close_to_f64() {
    let threads = Threads::new(2).unwrap();
    for (window, head_dim) in [(None, 64), (Some(9), 64), (None, 80), (Some(1), 24)] {
        let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim, block_size: 16, window, scale: 1.7 };
        let cache = cache(&shape, 100, 7, 8);
        let positions = [0, 1, 15, 16, 17, 50, 99];
        let width = 6 * head_dim;
        let q = Random(9).floats(positions.len() * width);
        let out = attend(&threads, &shape, &cache, &q, &positions);
        for (row, position) in positions.into_iter().enumerate() {
            for head in 0..6 {
                let q = &q[row * width + head * head_dim..][..head_dim];
                let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
                let at = |p: usize| ((cache.blocks[p / 16] as usize * 16 + p % 16) * 2 + head / 3) * head_dim;
                let score = |p: usize| -> f64 {
                    let key = &cache.keys[at(p)..];
                    1.7 * q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
                };
                let weights: Vec<f64> = (first..=position).map(|p| score(p).exp()).collect();
                let total: f64 = weights.iter().sum();
                for dim in 0..head_dim {
                    let expected: f64 = weights
                        .iter()
                        .zip(first..)
                        .map(|(w, p)| w / total * f64::from(cache.values[at(p) + dim]))
                        .sum();
                    let got = f64::from(out[row * width + head * head_dim + dim]);
                    assert!(
                        (got - expected).abs() < 2e-6,
                        "position {position} head {head}: {got} {expected}"
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// However the rows are grouped, wherever the blocks lie: the same bits.
    #[test]
    fn attention_is_row_invariant(
        tokens in 1_usize..200,
        kv_heads in 1_usize..4,
        group in 1_usize..5,
        head_dim in prop_oneof![Just(64_usize), Just(80), Just(128), 1_usize..70],
        block_size in prop_oneof![Just(16_usize), 1_usize..40],
        window in prop_oneof![Just(None), (1_usize..150).prop_map(Some)],
        cut in any::<usize>(),
        seed in any::<u64>(),
    ) {
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim, block_size, window, scale: 0.3 };
        let width = shape.heads * head_dim;
        let q = Random(seed).floats(tokens * width);
        let positions: Vec<usize> = (0..tokens).collect();
        let mut expected: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            for count in [1, 3] {
                let threads = Threads::with_isa(count, isa).unwrap();
                let here = cache(&shape, tokens, seed ^ 1, 1);
                let whole = bits(&attend(&threads, &shape, &here, &q, &positions));
                prop_assert_eq!(expected.get_or_insert_with(|| whole.clone()), &whole, "{}", isa.name());
                let elsewhere = cache(&shape, tokens, seed ^ 1, 2);
                let cut = cut % tokens;
                let mut parts = attend(&threads, &shape, &elsewhere, &q[..cut * width], &positions[..cut]);
                parts.extend(attend(&threads, &shape, &elsewhere, &q[cut * width..], &positions[cut..]));
                prop_assert_eq!(&bits(&parts), &whole, "{} cut at {}", isa.name(), cut);
                let last = attend(&threads, &shape, &elsewhere, &q[(tokens - 1) * width..], &positions[tokens - 1..]);
                prop_assert_eq!(&bits(&last)[..], &whole[(tokens - 1) * width..], "{} alone", isa.name());
            }
        }
    }
}
