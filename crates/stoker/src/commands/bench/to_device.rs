//! `stoker bench load` where there is a GPU: from memory or files to the device, beside the limits of the same run.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use stoker_checkpoint::Manifest;
use stoker_device::{Cut, Device, Slab, Transfer};
use stoker_io::{ChunkPool, Open, ReadOp, Reader, drop_page_cache};
use stoker_store::{CheckpointFiles, DeviceTarget, Keep, Layout, Priority, Store, StoreConfig};
use stoker_types::{ByteSize, BytesPerSec, ChunkSum, ModelName, Tier, clock};
use tokio_util::sync::CancellationToken;

use super::{Spread, load::cpu_time};
use crate::{cli::BenchTier, config::ReaderSetting, output::Output};

/// What to measure.
pub(crate) struct Options {
    pub(crate) tier: BenchTier,
    pub(crate) runs: u32,
    pub(crate) warm: bool,
    /// Bytes of the ring that the model passes through; `None`: it stays in memory.
    pub(crate) ring: Option<ByteSize>,
    pub(crate) threads: Option<usize>,
    pub(crate) reader: ReaderSetting,
    /// Compare what arrived with the files.
    pub(crate) verify: bool,
    /// Memory that other processes can map.
    pub(crate) shared: bool,
    /// Unit of reads and copies.
    pub(crate) chunk: ByteSize,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    tensors: usize,
    device: String,
    tier: BenchTier,
    reader: String,
    read_threads: usize,
    checksums: &'static str,
    /// Indexing the files and placing every tensor.
    plan_ms: f64,
    /// The first load of this process: nothing was pinned or touched before.
    first_ms: f64,
    first_rate_bytes_per_s: f64,
    load_ms: Spread,
    rate_bytes_per_s: f64,
    limit_bytes_per_s: f64,
    limit: &'static str,
    percent_of_limit: f64,
    limit_min_bytes_per_s: f64,
    limit_max_bytes_per_s: f64,
    /// Until the first chunk was on the device.
    first_chunk_ms: f64,
    cpu_seconds_per_gb: f64,
    /// This process at its largest, without the pool.
    host_beyond_pool_bytes: u64,
    /// Tensors whose bytes on the device were compared with the files'.
    verified_tensors: usize,
}

/// Runs the bench on a model that is indexed already, in `plan` time.
pub(crate) async fn run(
    name: &str,
    dir: &Path,
    manifest: &Manifest,
    plan: Duration,
    device: Arc<dyn Device>,
    options: &Options,
    output: Output,
) -> anyhow::Result<()> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    let chunk = options.chunk.0;
    ensure!(chunk > 0, "--chunk must be at least a page");
    let begun = clock::now();
    // The same files under two names: as on a server whose memory is full, each load from files evicts the one before and
    // takes its slots.
    let twin = |name| -> anyhow::Result<_> {
        Ok(CheckpointFiles::in_chunks(ModelName::new(name)?, dir, manifest, chunk)?)
    };
    let (files, other) = (twin("bench-a")?, twin("bench-b")?);
    let layout = Arc::new(Layout::of_manifest(manifest));
    let plan = plan + begun.elapsed();
    let bytes = files.bytes();
    let keep = match options.ring {
        Some(ring) => Keep::Nothing { ring_chunks: usize::try_from(ring.0.div_ceil(chunk))? },
        None => Keep::All,
    };
    let pool_bytes = options.ring.map_or(files.pool_bytes(), |ring| ByteSize(ring.0.next_multiple_of(chunk)));
    let cores = std::thread::available_parallelism().map_or(4, usize::from);
    // Measured: with a reader on every core, whoever queues copies and notices their ends waits for one, and 16 readers on
    // 16 cores are slower than 14.
    let read_threads = options.threads.unwrap_or(cores.saturating_sub(2).clamp(4, 16));
    let bench = Bench { files, layout, device, read_threads, options };

    let cold = || -> std::io::Result<()> {
        let files = bench.files.files();
        if options.warm { Ok(()) } else { files.iter().try_for_each(|file| drop_page_cache(&file.path)) }
    };
    cold()?;
    // As a program that begins by loading: the store is opened, memory made and pinned in this time.
    let begun = clock::now();
    let store = bench.open(pool_bytes)?;
    let (first, slab) = bench.deliver(&store, &bench.files, keep).await?;
    let first_time = begun.elapsed();
    // Before the comparisons and the limits' own buffers.
    let host_beyond_pool_bytes = peak_memory().saturating_sub(pool_bytes.0);
    let mut verified = if options.verify { bench.verify(&slab, manifest)? } else { 0 };
    drop(slab);

    let limits = Limits::new(&bench)?;
    let mut loads = Vec::new();
    let mut raw = Vec::new();
    let mut cpu = Duration::ZERO;
    let mut first_chunk = Vec::new();
    let mut reader = first.load.readers.first().map(ToString::to_string).unwrap_or_default();
    let mut held = first.resident;
    for run in 0..options.runs {
        if options.tier != BenchTier::Dram {
            drop(held.take());
        }
        let files = if options.tier != BenchTier::Dram && run % 2 == 0 { &other } else { &bench.files };
        // They take turns in coming first, for what a cache that nobody can drop may do.
        for measure_limit in [run % 2 == 0, run % 2 != 0] {
            if options.tier != BenchTier::Dram {
                cold()?;
            }
            if measure_limit {
                raw.push(limits.measure(&bench, options.tier)?);
                continue;
            }
            let (cpu_before, begun) = (cpu_time(), clock::now());
            let (delivered, slab) = bench.deliver(&store, files, keep).await?;
            loads.push(begun.elapsed());
            cpu += cpu_time().saturating_sub(cpu_before);
            first_chunk.push(delivered.first);
            let from_disk = delivered.load.bytes_from(Tier::Ssd);
            match options.tier {
                BenchTier::Dram => ensure!(from_disk == ByteSize::ZERO, "{from_disk} were not in memory"),
                BenchTier::Ssd => ensure!(from_disk == bytes, "only {from_disk} of {bytes} came from files"),
            }
            if let Some(choice) = delivered.load.readers.first() {
                reader = choice.to_string();
            }
            if options.verify && run + 1 == options.runs {
                verified = bench.verify(&slab, manifest)?;
            }
            held = delivered.resident;
        }
    }
    drop(held);

    let rate = |time: Duration| BytesPerSec::of(bytes, time).0;
    let (load_ms, raw_ms) = (Spread::ms(&loads), Spread::ms(&raw));
    let of_ms = |ms: f64| rate(Duration::from_secs_f64(ms / 1e3));
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let gigabytes = bytes.0 as f64 / 1e9 * f64::from(options.runs);
    let report = Report {
        model: name.to_owned(),
        bytes: bytes.0,
        tensors: manifest.tensors.len(),
        device: bench.device.info().name.clone(),
        tier: options.tier,
        reader,
        read_threads,
        checksums: "crc-64/nvme of every chunk read",
        plan_ms: plan.as_secs_f64() * 1e3,
        first_ms: first_time.as_secs_f64() * 1e3,
        first_rate_bytes_per_s: rate(first_time),
        load_ms,
        rate_bytes_per_s: of_ms(load_ms.p50),
        limit_bytes_per_s: of_ms(raw_ms.p50),
        limit: limits.words(options),
        percent_of_limit: 100.0 * raw_ms.p50 / load_ms.p50,
        limit_min_bytes_per_s: of_ms(raw_ms.max),
        limit_max_bytes_per_s: of_ms(raw_ms.min),
        first_chunk_ms: Spread::ms(&first_chunk).p50,
        cpu_seconds_per_gb: cpu.as_secs_f64() / gigabytes,
        host_beyond_pool_bytes,
        verified_tensors: verified,
    };
    output.show(&report, |r| {
        format!(
            "{} ({}, {} tensors, planned in {:.1} ms) to {}; {} threads, {}, {}\n\
             first load     {:.0} ms, {}; memory made and pinned in it\n\
             loads          {} median of {}; {} {} ({} to {}); {:.1} % of it; first chunk after {:.1} ms\n\
             CPU            {:.3} s per GB\n\
             host memory    {} beyond the pool\n\
             verified       {} tensors on the device",
            r.model,
            ByteSize(r.bytes),
            r.tensors,
            r.plan_ms,
            r.device,
            r.read_threads,
            r.reader,
            r.checksums,
            r.first_ms,
            BytesPerSec(r.first_rate_bytes_per_s),
            BytesPerSec(r.rate_bytes_per_s),
            options.runs,
            r.limit,
            BytesPerSec(r.limit_bytes_per_s),
            BytesPerSec(r.limit_min_bytes_per_s),
            BytesPerSec(r.limit_max_bytes_per_s),
            r.percent_of_limit,
            r.first_chunk_ms,
            r.cpu_seconds_per_gb,
            ByteSize(r.host_beyond_pool_bytes),
            r.verified_tensors,
        )
    })
}

struct Bench<'a> {
    files: CheckpointFiles,
    layout: Arc<Layout>,
    device: Arc<dyn Device>,
    read_threads: usize,
    options: &'a Options,
}

// === impl Bench ===

impl Bench<'_> {
    fn open(&self, pool: ByteSize) -> anyhow::Result<Store> {
        let read_threads = self.read_threads;
        let store = Store::open(StoreConfig {
            read_threads,
            shared: self.options.shared,
            chunk: self.options.chunk,
            read_mode: self.options.reader.mode(),
            opener: Arc::new(self.options.reader.files()),
            ..StoreConfig::new(pool)
        })?;
        store.attach(&*self.device, ByteSize::ZERO);
        Ok(store)
    }

    /// From the order to the last byte, device memory included.
    async fn deliver(
        &self,
        store: &Store,
        files: &CheckpointFiles,
        keep: Keep,
    ) -> anyhow::Result<(stoker_store::Delivered, Slab)> {
        let slab = self.device.allocate(self.layout.bytes(), self.layout.bytes())?;
        let target = DeviceTarget {
            device: Arc::clone(&self.device),
            slab: slab.clone(),
            layout: Arc::clone(&self.layout),
        };
        let delivering = store.deliver(files, target, keep, Priority::Demand)?;
        Ok((delivering.wait(&CancellationToken::new()).await?, slab))
    }

    /// Compares every tensor on the device with its file. Returns how many.
    fn verify(&self, slab: &Slab, manifest: &Manifest) -> anyhow::Result<usize> {
        use std::os::unix::fs::FileExt as _;

        let opened = self.files.files().iter().map(|file| std::fs::File::open(&file.path));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        for (tensor, to) in manifest.tensors.iter().zip(self.layout.tensors()) {
            let len = usize::try_from(tensor.len)?;
            let (mut device, mut file) = (vec![0; len], vec![0; len]);
            self.device.read(slab, *to, &mut device)?;
            opened[tensor.file as usize].read_exact_at(&mut file, tensor.offset)?;
            ensure!(
                ChunkSum::of(&device) == ChunkSum::of(&file),
                "{} is not what its file says",
                tensor.name
            );
        }
        Ok(manifest.tensors.len())
    }
}

/// What the same bytes take without a store: no order, no cache, no tensors.
struct Limits {
    pool: ChunkPool,
    slab: Slab,
}

// === impl Limits ===

impl Limits {
    fn new(bench: &Bench<'_>) -> anyhow::Result<Self> {
        // Three for each thread: one being read into, two being copied.
        let slots = bench.read_threads as u64 * 3;
        let make = if bench.options.shared { ChunkPool::new } else { ChunkPool::private };
        let pool = make(ByteSize(slots * bench.options.chunk.0), bench.options.chunk)?;
        if let Some(pinner) = bench.device.pinner() {
            pool.set_pinner(pinner);
        }
        while pool.pin_free()? {}
        Ok(Self { pool, slab: bench.device.allocate(bench.files.pool_bytes(), bench.files.pool_bytes())? })
    }

    fn words(&self, options: &Options) -> &'static str {
        match (options.tier, options.warm) {
            (BenchTier::Dram, _) => "limit of pinned copies",
            (BenchTier::Ssd, true) => "limit of page cache, checksums and copies together",
            (BenchTier::Ssd, false) => "limit of raw reads and copies together",
        }
    }

    fn measure(&self, bench: &Bench<'_>, tier: BenchTier) -> anyhow::Result<Duration> {
        let bytes = bench.files.bytes().0;
        let begun = clock::now();
        match tier {
            BenchTier::Dram => {
                // Pinned chunks, over and over, to where the files' chunks would go.
                let bufs: Vec<_> = std::iter::from_fn(|| self.pool.try_take()).collect();
                let chunks: Vec<_> =
                    bufs.into_iter().map(|buf| buf.freeze(self.pool.chunk_bytes())).collect();
                let (sender, done) = mpsc::channel();
                let mut to = 0;
                for chunk in chunks.iter().cycle() {
                    let len = usize::try_from((bytes - to).min(bench.options.chunk.0))?;
                    let sender = sender.clone();
                    bench.device.copy(Transfer {
                        from: Box::new(chunk.clone()),
                        to: self.slab.clone(),
                        cuts: vec![Cut::range(0, len, to)],
                        // The receiver waits until the last sender is gone.
                        done: Box::new(move |result| drop(sender.send(result))),
                    });
                    to += len as u64;
                    if to == bytes {
                        break;
                    }
                }
                drop(sender);
                done.into_iter().collect::<Result<(), _>>()?;
            }
            BenchTier::Ssd => self.read_and_copy(bench)?,
        }
        Ok(begun.elapsed())
    }

    fn read_and_copy(&self, bench: &Bench<'_>) -> anyhow::Result<()> {
        let (files, mode) = (bench.options.reader.files(), bench.options.reader.mode());
        let mut work: Vec<(Arc<dyn Reader>, u64, usize, u64)> = Vec::new();
        let mut to = 0;
        for file in bench.files.files() {
            let reader = files.open(&file.path, mode)?;
            let mut offset = 0;
            while offset < file.identity.len {
                let len = (file.identity.len - offset).min(bench.options.chunk.0);
                work.push((Arc::clone(&reader), offset, usize::try_from(len)?, to));
                (offset, to) = (offset + len, to + len);
            }
        }
        let next = AtomicU64::new(0);
        // Checksums are part of what there is to do when the bytes come from memory; a disk is slower than they are.
        let sum = bench.options.warm;
        let one = || -> anyhow::Result<()> {
            let (sender, ended) = mpsc::channel::<Result<(), stoker_device::DeviceError>>();
            let mut flying = 0;
            loop {
                let i = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
                let Some((reader, offset, len, to)) = work.get(i) else { break };
                // Two of a thread's three slots may be under way.
                while flying > 1 {
                    ended.recv()??;
                    flying -= 1;
                }
                let buf = self.pool.try_take().context("a slot was lost")?;
                let (read_sender, read) = mpsc::channel();
                let op = ReadOp { buf: buf.into(), offset: *offset, len: *len, sum };
                // The receiver is below.
                reader.read(op, Box::new(move |done| drop(read_sender.send(done))));
                let done = read.recv()?;
                done.result?;
                let buf = done.buf.rejoin().context("a slot is in parts")?;
                let sender = sender.clone();
                bench.device.copy(Transfer {
                    from: Box::new(buf.freeze(*len)),
                    to: self.slab.clone(),
                    cuts: vec![Cut::range(0, *len, *to)],
                    // The receiver waits for as many as fly.
                    done: Box::new(move |result| drop(sender.send(result))),
                });
                flying += 1;
            }
            (0..flying).try_for_each(|_| Ok(ended.recv()??))
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..bench.read_threads).map(|_| scope.spawn(one)).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().ok().context("a reading thread panicked")?)
        })
    }
}

/// The most memory that this process had, bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
