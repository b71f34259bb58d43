//! `stoker bench cold`: from a request for a model that is in memory to its first token on a GPU, beside the copy of its
//! weights alone, and what follows: decode alone and in batches. The engine runs in this process.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use stoker_checkpoint::{Manifest, Source, index};
use stoker_device::{CudaDevice, CudaOptions, Device};
use stoker_engine::{
    Engine, EngineLimits, SequenceRequest, StepEngine, Threads,
    gpu::{Arrivals, DeviceWeights, Gate, Gpu, PREFILL_TOKENS_PER_STEP, load_model},
};
use stoker_store::{CheckpointFiles, DeviceTarget, Keep, Layout, Priority, Store, StoreConfig};
use stoker_types::{ByteSize, BytesPerSec, ModelName, Sampling, clock};
use tokio_util::sync::CancellationToken;

use super::{Spread, synth};
use crate::{
    cli::BenchColdArgs,
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    device: String,
    links: u32,
    /// Opening the device and loading every kernel, before any model is there.
    ready_ms: f64,
    /// Device memory that it takes without a model.
    ready_bytes: u64,
    /// The copy alone: device memory made, and every byte in it.
    copy_ms: Spread,
    copy_rate_bytes_per_s: f64,
    prompts: Vec<Prompt>,
    batches: Vec<Batch>,
    /// With `--profile`: what kernels take, of a prompt and of a token.
    profiles: Vec<Profile>,
}

#[derive(Debug, Serialize)]
struct Profile {
    what: String,
    /// Of all of it, kernels one after the other.
    total_ms: f64,
    kernels: Vec<KernelCost>,
}

#[derive(Debug, Serialize)]
struct KernelCost {
    kernel: String,
    launches: u32,
    us_each: f64,
    ms: f64,
}

#[derive(Debug, Serialize)]
struct Prompt {
    tokens: u32,
    /// The first token of a model whose weights arrive while it computes.
    cold_ms: Spread,
    /// Of one that begins when all of them are there.
    cold_after_load_ms: Spread,
    /// Of one whose weights are there.
    warm_ms: Spread,
    /// What the cold one takes beyond the copy.
    beyond_copy_ms: f64,
}

#[derive(Debug, Serialize)]
struct Batch {
    sequences: u32,
    prompt: u32,
    new: u32,
    /// Between a sequence's tokens.
    token_ms: Spread,
    tokens_per_s: f64,
}

/// Runs the bench. `parent`: where synthetic models are made.
pub(crate) async fn run(args: &BenchColdArgs, parent: &Path, output: Output) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let (_made, dir) = match args.model.strip_prefix("synth:") {
        Some(name) => {
            let made = synth::make(name, parent, args.keep_files)?;
            let dir = made.dir.clone();
            (Some(made), dir)
        }
        None => (None, std::path::absolute(PathBuf::from(&args.model))?),
    };
    let source = Source { uri: args.model.clone(), revision: None };
    let manifest = index(&dir, source)?;
    if let Some(why) = &manifest.refusal {
        bail!("{} can't run: {why}", args.model);
    }
    let base = if dir.is_dir() { dir.as_path() } else { dir.parent().unwrap_or(Path::new(".")) };
    let files = CheckpointFiles::from_manifest(ModelName::new("bench-cold")?, base, &manifest)?;

    let begun = clock::now();
    let helpers = (args.device + 1..args.device + args.links).collect();
    let device = Arc::new(CudaDevice::open(args.device, &CudaOptions { helpers, ..CudaOptions::default() })?);
    let before = device.memory()?;
    let gpu = Gpu::open(Arc::clone(&device))?;
    let ready = begun.elapsed();
    let after = device.memory()?;
    let context = manifest.config.as_ref().map_or(4096, |config| config.context_trained);
    let bench = Bench {
        layout: Arc::new(Layout::of_manifest(&manifest).announcing(&files)),
        store: open(&files, &device)?,
        threads: Arc::new(Threads::new(std::thread::available_parallelism()?.get().clamp(1, 8))?),
        limits: EngineLimits {
            context,
            sequences_max: args.batch.iter().copied().max().unwrap_or(1).max(1),
            kv_bytes: args.kv.0,
            prefill_tokens_per_step: PREFILL_TOKENS_PER_STEP,
        },
        manifest,
        files,
        device,
        gpu,
    };
    // Into memory, and pinned; the first copy of a process is slower.
    bench.copy().await?;
    let mut copies = Vec::new();
    for _ in 0..args.runs {
        copies.push(bench.copy().await?);
    }
    let copy_ms = Spread::ms(&copies);

    let mut prompts = Vec::new();
    for &tokens in &args.prompt {
        let (mut cold, mut after_load, mut warm) = (Vec::new(), Vec::new(), Vec::new());
        // The first in each length meets what no later one does (memory for activations): it counts as any other, last in
        // the 99th percentile.
        for run in 0..args.runs {
            let times = bench.cold(tokens, true).await?;
            cold.push(times.cold);
            warm.push(times.warm);
            if run < args.runs.min(3) {
                after_load.push(bench.cold(tokens, false).await?.cold);
            }
        }
        let cold_ms = Spread::ms(&cold);
        prompts.push(Prompt {
            tokens,
            cold_ms,
            cold_after_load_ms: Spread::ms(&after_load),
            warm_ms: Spread::ms(&warm),
            beyond_copy_ms: cold_ms.p50 - copy_ms.p50,
        });
    }
    let mut batches = Vec::new();
    if !args.batch.is_empty() {
        let mut engine = bench.warm_engine().await?;
        for &sequences in &args.batch {
            batches.push(batch(&mut engine, sequences, args.batch_prompt, args.batch_new)?);
        }
    }
    let mut profiles = Vec::new();
    if args.profile {
        let mut engine = bench.warm_engine().await?;
        for &tokens in &args.prompt {
            first_token(&mut engine, tokens, 1)?;
            profiles
                .push(bench.profile(format!("prompt of {tokens}"), || first_token(&mut engine, tokens, 2))?);
        }
        for &sequences in &args.batch {
            for key in 0..u64::from(sequences) {
                engine.submit(request(5000 + key, args.batch_prompt, args.batch_new))?;
            }
            let mut begun = 0;
            while begun < sequences {
                begun += u32::try_from(engine.step().begun.len())?;
            }
            engine.step();
            profiles.push(bench.profile(format!("a token of {sequences}"), || {
                engine.step();
                Ok(())
            })?);
            while !engine.is_idle() {
                engine.step();
            }
        }
    }
    let bytes = bench.files.bytes();
    let report = Report {
        model: args.model.clone(),
        bytes: bytes.0,
        device: bench.device.info().name.clone(),
        links: args.links,
        ready_ms: ready.as_secs_f64() * 1e3,
        ready_bytes: before.free.0.saturating_sub(after.free.0),
        copy_ms,
        copy_rate_bytes_per_s: BytesPerSec::of(bytes, Duration::from_secs_f64(copy_ms.p50 / 1e3)).0,
        prompts,
        batches,
        profiles,
    };
    output.show(&report, |r| {
        let ms = |spread: &Spread| format!("{:.1} ({:.1})", spread.p50, spread.p99);
        let mut prompts = Table::new(["PROMPT", "COLD", "BEYOND THE COPY", "COLD, AFTER THE COPY", "WARM"]);
        for p in &r.prompts {
            prompts.row([
                p.tokens.to_string(),
                ms(&p.cold_ms),
                format!("{:.1}", p.beyond_copy_ms),
                ms(&p.cold_after_load_ms),
                ms(&p.warm_ms),
            ]);
        }
        let mut batches = Table::new(["SEQUENCES", "PROMPT", "NEW", "MS PER TOKEN", "TOKENS/S"]);
        for b in &r.batches {
            batches.row([
                b.sequences.to_string(),
                b.prompt.to_string(),
                b.new.to_string(),
                ms(&b.token_ms),
                format!("{:.0}", b.tokens_per_s),
            ]);
        }
        let mut profiles = String::new();
        for p in &r.profiles {
            let mut table = Table::new(["KERNEL", "LAUNCHES", "US EACH", "MS"]);
            for k in &p.kernels {
                let (each, ms) = (format!("{:.1}", k.us_each), format!("{:.2}", k.ms));
                table.row([k.kernel.clone(), k.launches.to_string(), each, ms]);
            }
            profiles += &format!("{}: {:.2} ms\n{}\n", p.what, p.total_ms, table.render());
        }
        format!(
            "{} ({}) on {}, {} links; ready in {:.0} ms, {}\n\
             copy alone     {} ms, {}\n\
             first token, ms: median (99th percentile)\n{}\n{}\n{profiles}",
            r.model,
            ByteSize(r.bytes),
            r.device,
            r.links,
            r.ready_ms,
            ByteSize(r.ready_bytes),
            ms(&r.copy_ms),
            BytesPerSec(r.copy_rate_bytes_per_s),
            prompts.render(),
            batches.render(),
        )
    })
}

struct Bench {
    manifest: Manifest,
    files: CheckpointFiles,
    layout: Arc<Layout>,
    store: Store,
    device: Arc<CudaDevice>,
    gpu: Arc<Gpu>,
    threads: Arc<Threads>,
    limits: EngineLimits,
}

/// First tokens of one instance.
struct Times {
    cold: Duration,
    warm: Duration,
}

fn open(files: &CheckpointFiles, device: &Arc<CudaDevice>) -> anyhow::Result<Store> {
    let cores = std::thread::available_parallelism().map_or(4, usize::from);
    let read_threads = cores.saturating_sub(2).clamp(4, 16);
    let store = Store::open(StoreConfig { read_threads, ..StoreConfig::new(files.pool_bytes()) })?;
    store.place_near([device.info().numa_node]);
    store.attach(&**device, ByteSize::ZERO);
    Ok(store)
}

// === impl Bench ===

impl Bench {
    /// Device memory for the model, nothing of which is there.
    fn target(&self) -> anyhow::Result<(DeviceTarget, Gate)> {
        let layout = &self.layout;
        let slab = self.device.allocate(layout.bytes(), layout.bytes())?;
        let at = layout.arrivals().context("the layout has words for arrivals")?;
        let words = self.files.chunks();
        let gate = Gate::new(&slab, Arrivals { at, words, chunk_bytes: self.files.chunk_bytes() });
        gate.close(&self.gpu)?;
        let device = Arc::clone(&self.device) as Arc<dyn Device>;
        Ok((DeviceTarget { device, slab, layout: Arc::clone(layout) }, gate))
    }

    async fn copy(&self) -> anyhow::Result<Duration> {
        let begun = clock::now();
        let (target, _gate) = self.target()?;
        let delivering = self.store.deliver(&self.files, target, Keep::All, Priority::Demand)?;
        delivering.wait(&CancellationToken::new()).await?;
        Ok(begun.elapsed())
    }

    fn engine(&self, target: &DeviceTarget, gate: Option<Gate>) -> anyhow::Result<Engine> {
        let tensors = self.layout.tensors().to_vec();
        let weights = DeviceWeights { slab: target.slab.clone(), tensors, gate };
        let threads = Arc::clone(&self.threads);
        let model = load_model(&self.gpu, &self.manifest, weights, threads, &self.limits)?;
        Ok(Engine::new(model, self.limits)?)
    }

    /// A new instance's first token, and the first token of a second request to it.
    async fn cold(&self, prompt: u32, while_loading: bool) -> anyhow::Result<Times> {
        let cancel = CancellationToken::new();
        let begun = clock::now();
        let (target, gate) = self.target()?;
        let delivering = self.store.deliver(&self.files, target.clone(), Keep::All, Priority::Demand)?;
        let (mut engine, delivering) = if while_loading {
            (self.engine(&target, Some(gate))?, Some(delivering))
        } else {
            delivering.wait(&cancel).await?;
            (self.engine(&target, None)?, None)
        };
        // The device waits for weights, and this thread for the device.
        tokio::task::block_in_place(|| first_token(&mut engine, prompt, 0))?;
        let cold = begun.elapsed();
        if let Some(delivering) = delivering {
            delivering.wait(&cancel).await?;
        }
        let begun = clock::now();
        tokio::task::block_in_place(|| first_token(&mut engine, prompt, 1))?;
        Ok(Times { cold, warm: begun.elapsed() })
    }

    fn profile(&self, what: String, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Profile> {
        self.gpu.stream().begin_profile()?;
        work()?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let kernels = self.gpu.stream().end_profile()?.into_iter().map(|kernel| KernelCost {
            kernel: kernel.kernel.to_string(),
            launches: kernel.launches,
            us_each: ms(kernel.time) * 1e3 / f64::from(kernel.launches),
            ms: ms(kernel.time),
        });
        let kernels: Vec<KernelCost> = kernels.collect();
        Ok(Profile { what, total_ms: kernels.iter().map(|kernel| kernel.ms).sum(), kernels })
    }

    async fn warm_engine(&self) -> anyhow::Result<Engine> {
        let (target, _gate) = self.target()?;
        let delivering = self.store.deliver(&self.files, target.clone(), Keep::All, Priority::Demand)?;
        delivering.wait(&CancellationToken::new()).await?;
        self.engine(&target, None)
    }
}

fn request(key: u64, prompt: u32, tokens: u32) -> SequenceRequest {
    SequenceRequest {
        key,
        // A fixed walk over the vocabulary, another for each key.
        prompt: (0..prompt)
            .map(|i| 100 + (u32::try_from(key % 997).unwrap_or(0) + i * 7919) % 30_000)
            .collect(),
        generated: Vec::new(),
        tokens_max: tokens,
        stop_ids: Vec::new(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        cache_salt: key.to_le_bytes().into(),
    }
}

fn first_token(engine: &mut Engine, prompt: u32, key: u64) -> anyhow::Result<()> {
    engine.submit(request(key, prompt, 1))?;
    while !engine.is_idle() {
        if let Some(failure) = engine.step().failures.first() {
            bail!("the engine failed: {failure:?}");
        }
    }
    Ok(())
}

/// Sequences that decode together, once all their prompts are computed.
fn batch(engine: &mut Engine, sequences: u32, prompt: u32, new: u32) -> anyhow::Result<Batch> {
    for key in 0..u64::from(sequences) {
        engine.submit(request(1000 + key, prompt, new))?;
    }
    let (mut begun, mut steps, mut tokens) = (0, Vec::new(), 0_u64);
    let mut last = clock::now();
    while !engine.is_idle() {
        let step = engine.step();
        if let Some(failure) = step.failures.first() {
            bail!("the engine failed: {failure:?}");
        }
        let now = clock::now();
        // Steps in which all decode and none computes its prompt any more.
        if begun == sequences && step.begun.is_empty() && step.tokens.len() == sequences as usize {
            steps.push(now.saturating_duration_since(last));
            tokens += step.tokens.len() as u64;
        }
        begun += u32::try_from(step.begun.len())?;
        last = now;
    }
    ensure!(
        !steps.is_empty(),
        "--batch-new is too small: sequences ended before the last prompt was computed"
    );
    let time: Duration = steps.iter().sum();
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let tokens_per_s = tokens as f64 / time.as_secs_f64();
    Ok(Batch { sequences, prompt, new, token_ms: Spread::ms(&steps), tokens_per_s })
}
