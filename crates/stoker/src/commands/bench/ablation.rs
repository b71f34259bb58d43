//! `stoker bench ablation`: the loader's parts, switched on one after the other, on the same files and device. The steps are
//! those of the ServerlessLLM paper's own breakdown (Fu et al., OSDI 2024), with ours behind them.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use stoker_checkpoint::{Manifest, Source, index};
use stoker_device::{Cut, Device, DeviceError, HostBytes, Slab, Transfer};
use stoker_io::{ChunkPool, DirectIo, LocalFiles, Open, ReadMode, ReadOp, Reader, drop_page_cache};
use stoker_store::{CheckpointFiles, DeviceTarget, Keep, Layout, Priority, Store, StoreConfig};
use stoker_types::{ByteSize, BytesPerSec, ModelName, clock};
use tokio_util::sync::CancellationToken;

use super::{
    Spread, load,
    plot::{self, Bar},
    synth,
};
use crate::{cli::BenchAblationArgs, output::Output};

/// Bytes of a chunk.
const CHUNK: ByteSize = ByteSize::mib(16);

/// Bytes of the ring that a model passes through.
const RING: ByteSize = ByteSize::mib(256);

/// Device memory that copies go to, over and over; a tensor is smaller.
const SLAB: ByteSize = ByteSize::gib(2);

/// Copies that a thread doesn't wait for.
const FLYING: usize = 2;

/// What is switched on.
#[derive(Debug, Clone, Copy)]
struct Switches {
    /// Chunks of the files instead of one tensor after the other.
    bulk: bool,
    /// Past the page cache.
    direct: bool,
    threads: usize,
    pinned: bool,
    /// The next chunk is read while one is copied.
    pipeline: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    device: String,
    steps: Vec<Step>,
}

#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    load_ms: Spread,
    rate_bytes_per_s: f64,
    /// Against the step before.
    times_the_step_before: f64,
    reader: String,
}

/// Runs the bench.
pub(crate) async fn run(
    args: &BenchAblationArgs,
    synthetic_dir: &Path,
    output: Output,
) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let device = load::open_device(args.device)?.context("this bench needs a GPU, or --device sim")?;
    let made;
    let dir = match args.model.strip_prefix("synth:") {
        Some(name) => {
            made = synth::make(name, args.dir.as_deref().unwrap_or(synthetic_dir), args.keep_files)?;
            made.dir.clone()
        }
        None => std::path::absolute(&args.model)?,
    };
    let manifest = index(&dir, Source { uri: args.model.clone(), revision: None })?;
    let files = CheckpointFiles::from_manifest(ModelName::new("bench")?, &dir, &manifest)?;
    let threads = std::thread::available_parallelism().map_or(4, usize::from).saturating_sub(2).clamp(4, 16);
    let off = Switches { bulk: false, direct: false, threads: 1, pinned: false, pipeline: false };
    let bulk = Switches { bulk: true, ..off };
    let direct = Switches { direct: true, ..bulk };
    let many = Switches { threads, ..direct };
    let pinned = Switches { pinned: true, ..many };
    let pipeline = Switches { pipeline: true, ..pinned };
    let bench = Bench { manifest, files, device, warm: args.warm };
    let mut steps: Vec<Step> = Vec::new();
    for (name, switches) in [
        ("tensor by tensor, page cache, one thread", off),
        ("+ bulk: chunks of 16 MiB", bulk),
        ("+ direct I/O", direct),
        ("+ threads", many),
        ("+ pinned memory", pinned),
        ("+ pipeline", pipeline),
    ] {
        let plain = Plain::new(&bench, switches)?;
        let mut times = Vec::new();
        for _ in 0..args.runs {
            bench.cool()?;
            times.push(tokio::task::block_in_place(|| plain.load(&bench))?);
        }
        push(&mut steps, name, &times, bench.files.bytes(), plain.reader());
    }
    let (times, reader) = bench.by_the_store(args.runs, threads).await?;
    push(&mut steps, "the store: parts, io_uring, checksums", &times, bench.files.bytes(), reader);

    let report = Report {
        model: args.model.clone(),
        bytes: bench.files.bytes().0,
        device: bench.device.info().name.clone(),
        steps,
    };
    if let Some(path) = &args.plot {
        let bar = |step: &Step| Bar {
            label: step.name.to_owned(),
            rate: BytesPerSec(step.rate_bytes_per_s),
            spread: None,
            is_limit: false,
        };
        let title = format!("{} to {}, parts of the loader one after the other", report.model, report.device);
        plot::bars(path, &title, &report.steps.iter().map(bar).collect::<Vec<_>>())?;
    }
    output.show(&report, |r| {
        let mut text = format!("{} ({}) to {}", r.model, ByteSize(r.bytes), r.device);
        for step in &r.steps {
            let Step { name, rate_bytes_per_s, times_the_step_before, reader, .. } = step;
            let rate = BytesPerSec(*rate_bytes_per_s);
            text += &format!("\n{name:<42} {rate:>12}  x {times_the_step_before:.2}  ({reader})");
        }
        text
    })
}

fn push(steps: &mut Vec<Step>, name: &'static str, times: &[Duration], bytes: ByteSize, reader: String) {
    let load_ms = Spread::ms(times);
    let rate = BytesPerSec::of(bytes, Duration::from_secs_f64(load_ms.p50 / 1e3)).0;
    let before = steps.last().map_or(rate, |step| step.rate_bytes_per_s);
    let times_the_step_before = rate / before;
    steps.push(Step { name, load_ms, rate_bytes_per_s: rate, times_the_step_before, reader });
}

struct Bench {
    manifest: Manifest,
    files: CheckpointFiles,
    device: Arc<dyn Device>,
    warm: bool,
}

// === impl Bench ===

impl Bench {
    fn cool(&self) -> std::io::Result<()> {
        if self.warm {
            return Ok(());
        }
        self.files.files().iter().try_for_each(|file| drop_page_cache(&file.path))
    }

    /// As a server does it, in a store that was open before.
    async fn by_the_store(&self, runs: u32, threads: usize) -> anyhow::Result<(Vec<Duration>, String)> {
        let read_mode = if self.warm { ReadMode::Auto } else { ReadMode::Direct };
        let store = Store::open(StoreConfig { read_threads: threads, read_mode, ..StoreConfig::new(RING) })?;
        store.place_near([self.device.info().numa_node]);
        store.attach(&*self.device, ByteSize::ZERO);
        let layout = Arc::new(Layout::of_manifest(&self.manifest));
        let slab = self.device.allocate(layout.bytes(), layout.bytes())?;
        let (mut times, mut reader) = (Vec::new(), String::new());
        for run in 0..=runs {
            self.cool()?;
            let device = Arc::clone(&self.device);
            let target = DeviceTarget { device, slab: slab.clone(), layout: Arc::clone(&layout) };
            let ring_chunks = usize::try_from(RING.0 / CHUNK.0)?;
            let begun = clock::now();
            let delivering =
                store.deliver(&self.files, target, Keep::Nothing { ring_chunks }, Priority::Demand)?;
            let delivered = delivering.wait(&CancellationToken::new()).await?;
            // The first one makes and pins the ring.
            if run > 0 {
                times.push(begun.elapsed());
            }
            reader = delivered.load.readers.first().map(|choice| choice.kind.to_string()).unwrap_or_default();
        }
        Ok((times, reader))
    }
}

/// Loads by loops that know nothing of a store.
struct Plain {
    switches: Switches,
    readers: Vec<Arc<dyn Reader>>,
    pool: ChunkPool,
    slab: Slab,
    /// File, first byte and length of what is read at a time.
    units: Vec<(usize, u64, usize)>,
}

// === impl Plain ===

impl Plain {
    fn new(bench: &Bench, switches: Switches) -> anyhow::Result<Self> {
        let mode = if switches.direct { ReadMode::Direct } else { ReadMode::Buffered };
        let files = LocalFiles { direct: DirectIo::Pread, ..LocalFiles::default() };
        let readers = bench.files.files().iter().map(|file| files.open(&file.path, mode));
        let pool =
            ChunkPool::private(ByteSize(CHUNK.0 * (FLYING as u64 + 1) * switches.threads as u64), CHUNK)?;
        if switches.pinned
            && let Some(pinner) = bench.device.pinner()
        {
            pool.set_pinner(pinner);
            while pool.pin_free()? {}
        }
        let mut units = Vec::new();
        if switches.bulk {
            for (file, source) in bench.files.files().iter().enumerate() {
                for offset in (0..source.identity.len).step_by(usize::try_from(CHUNK.0)?) {
                    units.push((file, offset, usize::try_from((source.identity.len - offset).min(CHUNK.0))?));
                }
            }
        } else {
            for tensor in &bench.manifest.tensors {
                units.push((tensor.file as usize, tensor.offset, usize::try_from(tensor.len)?));
            }
        }
        let slab = bench.device.allocate(SLAB, SLAB)?;
        Ok(Self { switches, readers: readers.collect::<Result<_, _>>()?, pool, slab, units })
    }

    fn reader(&self) -> String {
        self.readers.first().map(|reader| reader.choice().kind.to_string()).unwrap_or_default()
    }

    fn load(&self, bench: &Bench) -> anyhow::Result<Duration> {
        let begun = clock::now();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.switches.threads).map(|_| scope.spawn(|| self.load_units(bench, &next))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().ok().context("a reading thread panicked")?)
        })?;
        Ok(begun.elapsed())
    }

    fn load_units(&self, bench: &Bench, next: &AtomicUsize) -> anyhow::Result<()> {
        let opened = bench.files.files().iter().map(|file| File::open(&file.path));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        let most = if self.switches.pipeline { FLYING } else { 0 };
        let (sender, ended) = mpsc::channel::<Result<(), DeviceError>>();
        let mut flying = 0;
        let slots = SLAB.0 / CHUNK.0;
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(file, offset, len)) = self.units.get(unit) else { break };
            let (from, to): (Box<dyn HostBytes>, u64) = if self.switches.bulk {
                let buf = self.pool.try_take().context("a slot was lost")?;
                let (read_sender, read) = mpsc::channel();
                let op = ReadOp { buf: buf.into(), offset, len, sum: false };
                // The receiver is below.
                self.readers[file].read(op, Box::new(move |done| drop(read_sender.send(done))));
                let done = read.recv()?;
                done.result?;
                let buf = done.buf.rejoin().context("a slot is in parts")?;
                (Box::new(buf.freeze(len)), unit as u64 % slots * CHUNK.0)
            } else {
                let mut bytes = vec![0; len];
                opened[file].read_exact_at(&mut bytes, offset)?;
                (Box::new(bytes), 0)
            };
            let sender = sender.clone();
            bench.device.copy(Transfer {
                from,
                to: self.slab.clone(),
                cuts: vec![Cut::range(0, len, to)],
                // The receiver waits for as many as fly.
                arrival: None,
                done: Box::new(move |result| drop(sender.send(result))),
            });
            flying += 1;
            while flying > most {
                ended.recv()??;
                flying -= 1;
            }
        }
        (0..flying).try_for_each(|_| Ok(ended.recv()??))
    }
}
