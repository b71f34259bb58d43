//! `stoker bench engine`: prefill and decode rates, without the server around the engine.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use serde::Serialize;
use stoker_checkpoint::{Manifest, Source, index};
use stoker_engine::{
    Engine, EngineLimits, Places, Region, SequenceRequest, StepEngine, Threads, load_model, physical_cores,
};
use stoker_io::MappedLocal;
use stoker_types::{Sampling, clock};

use super::Spread;
use crate::{
    cli::BenchEngineArgs,
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct Report {
    engine: &'static str,
    model: String,
    threads: usize,
    instruction_set: String,
    load_ms: f64,
    prefill: Vec<Prefill>,
    decode: Decode,
}

#[derive(Debug, Serialize)]
struct Prefill {
    tokens: u32,
    ms: Spread,
    tokens_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Decode {
    tokens: u32,
    tokens_per_s: f64,
    token_ms: Spread,
}

struct MappedRegion(MappedLocal);

impl Region for MappedRegion {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Runs the bench on the weight files of `manifest`, whose directory is `dir`.
pub(crate) fn run(
    args: &BenchEngineArgs,
    named: impl FnOnce(&str) -> anyhow::Result<(PathBuf, Arc<Manifest>)>,
    output: Output,
) -> anyhow::Result<()> {
    let path = Path::new(&args.model);
    let (dir, manifest) = if path.exists() {
        let source = Source { uri: path.display().to_string(), revision: None };
        let base = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        (std::path::absolute(base)?, Arc::new(index(&std::path::absolute(path)?, source)?))
    } else {
        named(&args.model)?
    };
    if let Some(why) = &manifest.refusal {
        bail!("{} can't run: {why}", args.model);
    }
    let threads = args.threads.map_or_else(physical_cores, |n| n as usize);
    let pool = Arc::new(Threads::new(threads)?);
    let longest = args.prompt.iter().copied().max().unwrap_or(1).max(8) + args.decode + 1;

    let begun = clock::now();
    let regions = (0..manifest.files.len())
        .map(|file| {
            let path = manifest.file_path(&dir, file);
            let mapped = MappedLocal::open(&path).with_context(|| path.display().to_string())?;
            Ok(Arc::new(MappedRegion(mapped)) as Arc<dyn Region>)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let limits =
        EngineLimits { context: longest, sequences_max: 1, kv_bytes: 2 << 30, prefill_tokens_per_step: 512 };
    let engine = || -> anyhow::Result<Engine> {
        Ok(Engine::new(load_model(&manifest, Places::Files(&regions), Arc::clone(&pool), &limits)?, limits)?)
    };
    let mut warm = engine()?;
    let load_ms = begun.elapsed().as_secs_f64() * 1e3;
    // Touches every page once, so that no figure below contains a page fault of the first use.
    generate(&mut warm, 8, 2, 0)?;

    let mut prefill = Vec::new();
    for tokens in &args.prompt {
        let mut times = Vec::new();
        for run in 0..args.runs {
            times.push(generate(&mut engine()?, *tokens, 1, u64::from(run))?[0]);
        }
        let ms = Spread::ms(&times);
        prefill.push(Prefill { tokens: *tokens, ms, tokens_per_s: f64::from(*tokens) / ms.p50 * 1e3 });
    }
    let mut steps = Vec::new();
    for run in 0..args.runs {
        steps.extend(generate(&mut engine()?, 4, args.decode + 1, u64::from(run))?.split_off(1));
    }
    let token_ms = Spread::ms(&steps);
    let report = Report {
        engine: "stoker",
        model: args.model.clone(),
        threads,
        instruction_set: format!("{:?}", pool.isa()),
        load_ms,
        prefill,
        decode: Decode { tokens: args.decode, tokens_per_s: 1e3 / token_ms.p50, token_ms },
    };
    output.show(&report, |report| {
        let mut table = Table::new(["", "TOKENS", "MEDIAN", "P99", "TOKENS/S"]);
        let ms = |ms: f64| format!("{ms:.1} ms");
        for p in &report.prefill {
            table.row([
                "prefill".into(),
                p.tokens.to_string(),
                ms(p.ms.p50),
                ms(p.ms.p99),
                format!("{:.0}", p.tokens_per_s),
            ]);
        }
        let d = &report.decode;
        table.row([
            "decode".into(),
            d.tokens.to_string(),
            ms(d.token_ms.p50),
            ms(d.token_ms.p99),
            format!("{:.1}", d.tokens_per_s),
        ]);
        format!(
            "{}, {} threads, {}\n{}",
            report.model,
            report.threads,
            report.instruction_set,
            table.render()
        )
    })
}

/// The time of each token: the first one's contains the prefill.
fn generate(
    engine: &mut Engine,
    prompt: u32,
    tokens: u32,
    key: u64,
) -> anyhow::Result<Vec<std::time::Duration>> {
    engine.submit(SequenceRequest {
        key,
        // The same ids as bench/peers/llama_cpp.mjs: a fixed walk over the vocabulary.
        prompt: (0..prompt).map(|i| 100 + (i * 7919) % 40_000).collect(),
        generated: Vec::new(),
        tokens_max: tokens,
        stop_ids: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        // Another salt for every run: nothing comes from the prefix cache.
        cache_salt: key.to_le_bytes().into(),
    })?;
    let mut times = Vec::new();
    let mut begun = clock::now();
    loop {
        let step = engine.step();
        if let Some(failure) = step.failures.first() {
            bail!("the engine failed: {failure:?}");
        }
        for _ in &step.tokens {
            times.push(begun.elapsed());
            begun = clock::now();
        }
        if !step.ends.is_empty() {
            return Ok(times);
        }
    }
}
