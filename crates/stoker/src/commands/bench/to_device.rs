//! `stoker bench load` where there is a GPU: from memory or files to the device, beside the limits of the same run.

mod limits;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::ensure;
use serde::Serialize;
use stoker_checkpoint::{Manifest, Tensor};
use stoker_device::{Device, Slab};
use stoker_io::{LocalFiles, drop_page_cache};
use stoker_store::{
    CheckpointFiles, DeviceTarget, Keep, Layout, LoadError, Priority, Shard, Store, StoreConfig, TensorPart,
};
use stoker_types::{ByteSize, BytesPerSec, ChunkSum, ModelName, Summing, Tier, clock};
use tokio_util::sync::CancellationToken;

use self::limits::Limits;
use super::{
    Spread,
    load::cpu_time,
    plot::{self, Bar},
};
use crate::{
    cli::{BenchTier, SplitBy},
    config::ReaderSetting,
    output::Output,
};

/// What to measure.
pub(crate) struct Options {
    pub(crate) tier: BenchTier,
    pub(crate) runs: u32,
    pub(crate) warm: bool,
    /// Bytes of the ring that the model passes through; `None`: it stays in memory.
    pub(crate) ring: Option<ByteSize>,
    pub(crate) threads: Option<usize>,
    pub(crate) reader: ReaderSetting,
    /// Bytes that a thread reads at a time from the page cache.
    pub(crate) part: ByteSize,
    /// Compare what arrived with the files.
    pub(crate) verify: bool,
    /// Memory that other processes can map.
    pub(crate) shared: bool,
    /// Unit of residency and copies.
    pub(crate) chunk: ByteSize,
    /// How tensors are cut when there are several devices.
    pub(crate) split_by: SplitBy,
    /// Where to draw the rates.
    pub(crate) plot: Option<PathBuf>,
}

/// A device and what it gets.
struct Place {
    device: Arc<dyn Device>,
    /// Of each tensor, in the manifest's order.
    parts: Vec<TensorPart>,
    layout: Arc<Layout>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    tensors: usize,
    device: String,
    devices: usize,
    /// Bytes that all devices got together: more than the model's when some tensors go to each.
    device_bytes: u64,
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
    /// The end-to-end check by sums that the device computes, if it was asked for and the model isn't split.
    device_check_ms: Option<f64>,
}

/// Runs the bench on a model that is indexed already, in `plan` time.
pub(crate) async fn run(
    name: &str,
    dir: &Path,
    manifest: &Manifest,
    plan: Duration,
    devices: Vec<Arc<dyn Device>>,
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
    let world = u32::try_from(devices.len())?;
    let place = |(device, rank): (Arc<dyn Device>, u32)| -> anyhow::Result<Place> {
        let parts = options.split_by.parts(manifest, Shard::new(rank, world)?)?;
        Ok(Place { device, layout: Arc::new(Layout::of_parts(&parts)), parts })
    };
    let places = devices.into_iter().zip(0..).map(place).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!places.is_empty(), "no device to load to");
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
    let bench = Bench { files, places, read_threads, options };

    let cold = || -> std::io::Result<()> {
        let files = bench.files.files();
        if options.warm { Ok(()) } else { files.iter().try_for_each(|file| drop_page_cache(&file.path)) }
    };
    cold()?;
    // As a program that begins by loading: the store is opened, memory made and pinned in this time.
    let begun = clock::now();
    let store = bench.open(pool_bytes)?;
    let (first, slabs) = bench.deliver(&store, &bench.files, keep).await?;
    let first_time = begun.elapsed();
    // Before the comparisons and the limits' own buffers.
    let host_beyond_pool_bytes = peak_memory().saturating_sub(pool_bytes.0);
    let mut verified = if options.verify { bench.verify(&slabs, manifest)? } else { 0 };
    drop(slabs);

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
            let (delivered, slabs) = bench.deliver(&store, files, keep).await?;
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
                verified = bench.verify(&slabs, manifest)?;
            }
            held = delivered.resident;
        }
    }
    drop(held);
    let device_check = match (&bench.places[..], options.verify) {
        ([place], true) => bench.check(&store, place, keep).await?.map(|time| time.as_secs_f64() * 1e3),
        _ => None,
    };

    let rate = |time: Duration| BytesPerSec::of(bytes, time).0;
    let (load_ms, raw_ms) = (Spread::ms(&loads), Spread::ms(&raw));
    let of_ms = |ms: f64| rate(Duration::from_secs_f64(ms / 1e3));
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let gigabytes = bytes.0 as f64 / 1e9 * f64::from(options.runs);
    let report = Report {
        model: name.to_owned(),
        bytes: bytes.0,
        tensors: manifest.tensors.len(),
        device: bench.places[0].device.info().name.clone(),
        devices: bench.places.len(),
        device_bytes: bench.places.iter().map(|place| place.layout.bytes().0).sum(),
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
        device_check_ms: device_check,
    };
    if let Some(path) = &options.plot {
        let bar = |label: &str, rate: f64, spread: Option<(f64, f64)>| Bar {
            label: label.to_owned(),
            rate: BytesPerSec(rate),
            spread: spread.map(|(slowest, fastest)| (BytesPerSec(slowest), BytesPerSec(fastest))),
            is_limit: label == report.limit,
        };
        let loads = (of_ms(load_ms.max), of_ms(load_ms.min));
        let raw = (report.limit_min_bytes_per_s, report.limit_max_bytes_per_s);
        let bars = [
            bar("first load of the process", report.first_rate_bytes_per_s, None),
            bar("loads", report.rate_bytes_per_s, Some(loads)),
            bar(report.limit, report.limit_bytes_per_s, Some(raw)),
        ];
        plot::bars(path, &format!("{} to {} x {}", report.model, report.devices, report.device), &bars)?;
    }
    output.show(&report, |r| {
        format!(
            "{} ({}, {} tensors, planned in {:.1} ms) to {}{}; {} threads, {}, {}\n\
             first load     {:.0} ms, {}; memory made and pinned in it\n\
             loads          {} median of {}; {} {} ({} to {}); {:.1} % of it; first chunk after {:.1} ms\n\
             CPU            {:.3} s per GB\n\
             host memory    {} beyond the pool\n\
             verified       {} tensors on the device{}",
            r.model,
            ByteSize(r.bytes),
            r.tensors,
            r.plan_ms,
            if r.devices > 1 { format!("{} x ", r.devices) } else { String::new() },
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
            r.device_check_ms
                .map_or_else(String::new, |ms| format!("; its own checksums of all chunks: {ms:.0} ms")),
        )
    })
}

impl Options {
    /// What opens files.
    fn files(&self) -> anyhow::Result<LocalFiles> {
        let buffered_part_bytes = usize::try_from(self.part.0)?;
        Ok(LocalFiles { buffered_part_bytes, ..self.reader.files() })
    }
}

struct Bench<'a> {
    files: CheckpointFiles,
    places: Vec<Place>,
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
            opener: Arc::new(self.options.files()?),
            ..StoreConfig::new(pool)
        })?;
        store.place_near(self.places.iter().map(|place| place.device.info().numa_node));
        // One is enough: what it pins is pinned for all of this process.
        store.attach(&*self.places[0].device, ByteSize::ZERO);
        Ok(store)
    }

    /// From the order to the last byte, device memory included.
    async fn deliver(
        &self,
        store: &Store,
        files: &CheckpointFiles,
        keep: Keep,
    ) -> anyhow::Result<(stoker_store::Delivered, Vec<Slab>)> {
        let slab = |place: &Place| place.device.allocate(place.layout.bytes(), place.layout.bytes());
        let slabs = self.places.iter().map(slab).collect::<Result<Vec<_>, _>>()?;
        let target = |(place, slab): (&Place, &Slab)| DeviceTarget {
            device: Arc::clone(&place.device),
            slab: slab.clone(),
            layout: Arc::clone(&place.layout),
        };
        let targets = self.places.iter().zip(&slabs).map(target).collect();
        let delivering = store.deliver_to_all(files, targets, keep, Priority::Demand)?;
        Ok((delivering.wait(&CancellationToken::new()).await?, slabs))
    }

    /// Loads once more and has the device compute the sums of what it has. Returns the time of the latter; `None` when
    /// there is nothing to compare with: what passes through a ring without sums leaves none behind.
    async fn check(&self, store: &Store, place: &Place, keep: Keep) -> anyhow::Result<Option<Duration>> {
        let device = Arc::clone(&place.device);
        let slab = device.allocate(place.layout.bytes(), place.layout.bytes())?;
        let target = DeviceTarget { device, slab, layout: Arc::clone(&place.layout) };
        let delivering = store.deliver(&self.files, target.clone(), keep, Priority::Demand)?;
        let _delivered = delivering.wait(&CancellationToken::new()).await?;
        // The first check also makes the kernel ready.
        match store.check(&self.files, &target).await {
            Err(LoadError::NoSums { .. }) => Ok(None),
            first => {
                first?;
                Ok(Some(store.check(&self.files, &target).await?.time))
            }
        }
    }

    /// Compares every tensor on the devices with its file. Returns how many.
    fn verify(&self, slabs: &[Slab], manifest: &Manifest) -> anyhow::Result<usize> {
        use std::os::unix::fs::FileExt as _;

        let opened = self.files.files().iter().map(|file| std::fs::File::open(&file.path));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        for (place, slab) in self.places.iter().zip(slabs) {
            let parts = place.parts.iter().zip(place.layout.tensors());
            for (tensor, (part, to)) in manifest.tensors.iter().zip(parts) {
                let mut device = vec![0; usize::try_from(part.bytes())?];
                place.device.read(slab, *to, &mut device)?;
                let (mut whole, mut file) = (vec![0; usize::try_from(tensor.len)?], Summing::new());
                opened[tensor.file as usize].read_exact_at(&mut whole, tensor.offset)?;
                for (at, len) in part.runs() {
                    let at = usize::try_from(at - tensor.offset)?;
                    file.update(&whole[at..at + usize::try_from(len)?]);
                }
                ensure!(ChunkSum::of(&device) == file.finish(), "{} is not what its file says", tensor.name);
            }
        }
        Ok(manifest.tensors.len() * self.places.len())
    }
}

// === impl SplitBy ===

impl SplitBy {
    fn parts(self, manifest: &Manifest, shard: Shard) -> anyhow::Result<Vec<TensorPart>> {
        let along = |dim: fn(usize) -> usize| {
            let part = |tensor: &Tensor| {
                let dims = tensor.shape.len();
                // One-dimensional tensors, and those that can't be shared evenly, go to each.
                let cut = (dims > 1).then(|| shard.of(tensor, dim(dims)).ok()).flatten();
                cut.unwrap_or_else(|| TensorPart::whole(tensor))
            };
            manifest.tensors.iter().map(part).collect()
        };
        Ok(match self {
            Self::Roles => shard.of_manifest(manifest)?,
            Self::Rows => along(|_| 0),
            Self::Columns => along(|dims| dims - 1),
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
