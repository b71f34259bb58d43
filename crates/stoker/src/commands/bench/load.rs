//! `stoker bench load`: SSD to DRAM with checksums, beside raw O_DIRECT reads of the same file into the same memory,
//! interleaved; and DRAM to worker.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use stoker_checkpoint::{Manifest, Source, Trust, identity_of, index, manifest::CHUNK_BYTES};
use stoker_device::{CudaDevice, CudaOptions, Device, Link, SimulatedDevice, SimulatedOptions, cuda_devices};
use stoker_io::{MappedFile, RawOptions, ReadMode, drop_page_cache, raw_limit};
use stoker_store::{CheckpointFiles, Priority, Resident, SourceFile, Store, StoreConfig};
use stoker_types::{ByteSize, BytesPerSec, ModelName, Tier, clock};
use tokio_util::sync::CancellationToken;

use super::{
    Spread,
    plot::{self, Bar},
    synth, to_device,
};
use crate::{
    cli::{BenchDevice, BenchFrom, BenchLoadArgs, BenchTier},
    config::ReaderSetting,
    output::Output,
};

/// Mappings timed; each one maps everything and unmaps it.
const MAPPINGS: u32 = 20;

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    checksums: &'static str,
    reader: String,
    ssd_to_dram: Rates,
    dram_to_worker_ms: Spread,
    cpu_seconds_per_gb: f64,
}

#[derive(Debug, Serialize)]
struct Rates {
    load_ms: Spread,
    rate_bytes_per_s: f64,
    limit_bytes_per_s: f64,
    percent_of_limit: f64,
    /// The raw reads' slowest and fastest: a load as fast as the disk has its median between them.
    limit_min_bytes_per_s: f64,
    limit_max_bytes_per_s: f64,
    within_spread_of_limit: bool,
    /// What the raw reads were the fastest with.
    limit_threads: usize,
    limit_block_bytes: usize,
}

/// A file that is removed when the bench is over.
struct Synthetic(PathBuf);

impl Drop for Synthetic {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the synthetic file stays");
        }
    }
}

/// Runs the bench. `named` finds a model by name.
pub(crate) async fn run(
    args: &BenchLoadArgs,
    synthetic_dir: &Path,
    named: impl FnOnce(&str) -> anyhow::Result<(PathBuf, Arc<Manifest>)>,
    output: Output,
) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let devices = open_devices(args.device, args.split, args.links)?;
    if !devices.is_empty() {
        return on_devices(args, synthetic_dir, named, devices, output).await;
    }
    let made_model;
    let mut args = args.clone();
    if let Some(name) = args.model.strip_prefix("synth:")
        && synth::is_known(name)
    {
        made_model = synth::make(name, args.dir.as_deref().unwrap_or(synthetic_dir), args.keep_files)?;
        args.model = made_model.dir.display().to_string();
    }
    let args = &args;
    let (_made, files) = files(args, synthetic_dir, named)?;
    let bytes = files.bytes();
    let defaults = StoreConfig::new(files.pool_bytes());
    let read_threads = args.read_threads.unwrap_or(defaults.read_threads);
    // From the medium, unless the page cache may help or something is asked for.
    let read_mode = match (args.reader, args.warm) {
        (ReaderSetting::Auto, false) => ReadMode::Direct,
        (reader, _) => reader.mode(),
    };
    let store = Store::open(StoreConfig {
        read_mode,
        read_threads,
        opener: Arc::new(args.reader.files()),
        ..defaults
    })?;
    let cold = || -> std::io::Result<()> {
        if args.warm { Ok(()) } else { files.files().iter().try_for_each(|f| drop_page_cache(&f.path)) }
    };
    let load = async || -> anyhow::Result<(Duration, Duration, Resident)> {
        // What an earlier one left goes; its memory stays.
        drop(store.lend());
        cold()?;
        let cpu_before = cpu_time();
        let begun = clock::now();
        let held = store.load(&files, Priority::Demand, &CancellationToken::new()).await?;
        let took = begun.elapsed();
        let cpu = cpu_time().saturating_sub(cpu_before);
        ensure!(held.report().bytes_from(Tier::Ssd) == bytes, "the load did not read everything from SSD");
        Ok((took, cpu, held))
    };
    // The first load doesn't count: it finds no memory behind the pool yet.
    drop(load().await?);
    let raw_options = {
        let largest = files.files().iter().max_by_key(|f| f.identity.len).context("it has no files")?;
        let mut lent = store.lend();
        cold()?;
        tokio::task::block_in_place(|| RawOptions::fastest(&largest.path, &mut lent.slots))?
    };
    // Into the slots that the loads fill: how fast a disk fills memory depends on the memory.
    let raw_read = || -> anyhow::Result<Duration> {
        let mut lent = store.lend();
        cold()?;
        let mut time = Duration::ZERO;
        for file in files.files() {
            time += tokio::task::block_in_place(|| raw_limit(&file.path, &mut lent.slots, raw_options))?.time;
        }
        Ok(time)
    };

    let mut raw: Vec<Duration> = Vec::new();
    let mut loads: Vec<Duration> = Vec::new();
    let mut cpu = Duration::ZERO;
    for round in 0..args.runs {
        // Whoever reads second may find more in caches that nobody here can drop: they take turns.
        if round % 2 == 0 {
            raw.push(raw_read()?);
        }
        let (took, load_cpu, held) = load().await?;
        loads.push(took);
        cpu += load_cpu;
        drop(held);
        if round % 2 == 1 {
            raw.push(raw_read()?);
        }
    }
    let (.., resident) = load().await?;
    let reader = resident.report().readers.first().map(ToString::to_string).unwrap_or_default();
    let fd = store.pool_fd()?;
    let mut mappings = Vec::new();
    for _ in 0..MAPPINGS {
        let begun = clock::now();
        let maps = resident
            .files()
            .iter()
            .map(|f| MappedFile::map(&fd, f.len, CHUNK_BYTES, &f.slots))
            .collect::<Result<Vec<_>, _>>()?;
        mappings.push(begun.elapsed());
        drop(maps);
    }

    let rate = |time: f64| BytesPerSec::of(bytes, Duration::from_secs_f64(time / 1e3)).0;
    let (load_ms, raw_ms) = (Spread::ms(&loads), Spread::ms(&raw));
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let gigabytes = bytes.0 as f64 / 1e9 * f64::from(args.runs);
    let report = Report {
        model: args.model.clone(),
        bytes: bytes.0,
        checksums: "crc-64/nvme",
        reader,
        ssd_to_dram: Rates {
            load_ms,
            rate_bytes_per_s: rate(load_ms.p50),
            limit_bytes_per_s: rate(raw_ms.p50),
            percent_of_limit: 100.0 * raw_ms.p50 / load_ms.p50,
            limit_min_bytes_per_s: rate(raw_ms.max),
            limit_max_bytes_per_s: rate(raw_ms.min),
            within_spread_of_limit: (raw_ms.min..=raw_ms.max).contains(&load_ms.p50)
                || load_ms.p50 < raw_ms.min,
            limit_threads: raw_options.threads,
            limit_block_bytes: raw_options.block_bytes,
        },
        dram_to_worker_ms: Spread::ms(&mappings),
        cpu_seconds_per_gb: cpu.as_secs_f64() / gigabytes,
    };
    if let Some(path) = &args.plot {
        let s = &report.ssd_to_dram;
        let spread = |rates: &Spread| {
            let rate = |ms: f64| BytesPerSec::of(bytes, Duration::from_secs_f64(ms / 1e3));
            Some((rate(rates.max), rate(rates.min)))
        };
        let bars = [
            Bar {
                label: format!(
                    "load with checksums ({})",
                    report.reader.split(':').next().unwrap_or_default()
                ),
                rate: BytesPerSec(s.rate_bytes_per_s),
                spread: spread(&s.load_ms),
                is_limit: false,
            },
            Bar {
                label: "raw direct reads".to_owned(),
                rate: BytesPerSec(s.limit_bytes_per_s),
                spread: Some((BytesPerSec(s.limit_min_bytes_per_s), BytesPerSec(s.limit_max_bytes_per_s))),
                is_limit: true,
            },
        ];
        plot::bars(path, &format!("{} from SSD to DRAM", report.model), &bars)?;
    }
    output.show(&report, |r| {
        let s = &r.ssd_to_dram;
        format!(
            "{}: {}, reader {}, checksums {}\n\
             SSD -> DRAM     {} median of {}; raw limit {} ({} to {}, {} threads, blocks of {}); {:.0} % of it{}\n\
             DRAM -> worker  {:.2} ms median, {:.2} ms at the 99th percentile\n\
             CPU             {:.2} s per GB",
            r.model,
            ByteSize(r.bytes),
            r.reader,
            r.checksums,
            BytesPerSec(s.rate_bytes_per_s),
            args.runs,
            BytesPerSec(s.limit_bytes_per_s),
            BytesPerSec(s.limit_min_bytes_per_s),
            BytesPerSec(s.limit_max_bytes_per_s),
            s.limit_threads,
            ByteSize(s.limit_block_bytes as u64),
            s.percent_of_limit,
            if s.within_spread_of_limit { "" } else { ", below its spread" },
            r.dram_to_worker_ms.p50,
            r.dram_to_worker_ms.p99,
            r.cpu_seconds_per_gb,
        )
    })
}

/// One device; `None` where there is no GPU, or as asked for.
pub(super) fn open_device(which: BenchDevice) -> anyhow::Result<Option<Arc<dyn Device>>> {
    Ok(open_devices(which, 1, 1)?.pop())
}

/// Where loads end; none: in memory, as asked for or because there is no GPU.
fn open_devices(which: BenchDevice, split: u32, links: u32) -> anyhow::Result<Vec<Arc<dyn Device>>> {
    ensure!(split > 0, "--split must be at least 1");
    let first = match which {
        BenchDevice::None => return Ok(Vec::new()),
        BenchDevice::Simulated => {
            let simulated = |ordinal| -> anyhow::Result<Arc<dyn Device>> {
                let memory = ByteSize::gib(1024);
                let options = SimulatedOptions { memory, ordinal, ..SimulatedOptions::default() };
                Ok(Arc::new(SimulatedDevice::new(&options)?))
            };
            return (0..split).map(simulated).collect();
        }
        BenchDevice::Gpu(ordinal) => ordinal,
    };
    let infos = match cuda_devices() {
        Ok(infos) => infos,
        Err(error) => {
            tracing::info!(%error, "no GPU: the load ends in memory");
            return Ok(Vec::new());
        }
    };
    let count = infos.len();
    let open = |ordinal: u32| -> anyhow::Result<Arc<dyn Device>> {
        let info =
            infos.get(ordinal as usize).with_context(|| format!("no GPU {ordinal}: there are {count}"))?;
        let linked = info.peers.iter().filter(|peer| peer.link == Link::NvLink).map(|peer| peer.ordinal);
        let wanted = links.saturating_sub(1) as usize;
        let helpers: Vec<u32> = linked.take(wanted).collect();
        ensure!(helpers.len() == wanted, "GPU {ordinal} has NVLink to {} other GPUs only", helpers.len());
        Ok(Arc::new(CudaDevice::open(ordinal, &CudaOptions { helpers, ..CudaOptions::default() })?))
    };
    (first..first.saturating_add(split)).map(open).collect()
}

async fn on_devices(
    args: &BenchLoadArgs,
    synthetic_dir: &Path,
    named: impl FnOnce(&str) -> anyhow::Result<(PathBuf, Arc<Manifest>)>,
    devices: Vec<Arc<dyn Device>>,
    output: Output,
) -> anyhow::Result<()> {
    let options = to_device::Options {
        tier: if args.tier == BenchFrom::Dram { BenchTier::Dram } else { BenchTier::Ssd },
        runs: args.runs,
        warm: args.warm,
        ring: args.ring,
        threads: args.read_threads,
        reader: args.reader,
        part: args.part,
        verify: args.verify,
        shared: args.shared,
        chunk: args.chunk,
        split_by: args.split_by,
        plot: args.plot.clone(),
    };
    let source = || Source { uri: args.model.clone(), revision: None };
    let _made;
    let path = Path::new(&args.model);
    let begun = clock::now();
    let (dir, manifest, plan) = match args.model.strip_prefix("synth:") {
        Some(name) => {
            let made = synth::make(name, args.dir.as_deref().unwrap_or(synthetic_dir), args.keep_files)?;
            let begun = clock::now();
            let manifest = Arc::new(index(&made.dir, source())?);
            let dir = made.dir.clone();
            _made = made;
            (dir, manifest, begun.elapsed())
        }
        None if path.exists() => (path.to_owned(), Arc::new(index(path, source())?), begun.elapsed()),
        None => {
            let (dir, manifest) = named(&args.model)?;
            (dir, manifest, begun.elapsed())
        }
    };
    to_device::run(&args.model, &dir, &manifest, plan, devices, &options, output).await
}

/// The files to load.
fn files(
    args: &BenchLoadArgs,
    synthetic_dir: &Path,
    named: impl FnOnce(&str) -> anyhow::Result<(PathBuf, Arc<Manifest>)>,
) -> anyhow::Result<(Option<Synthetic>, CheckpointFiles)> {
    let name = ModelName::new("bench")?;
    let plain = |path: &Path| -> anyhow::Result<CheckpointFiles> {
        let identity = identity_of(path)?;
        let file =
            SourceFile { path: path.into(), identity, chunk_sums: Vec::new(), sha256: None, origin: None };
        Ok(CheckpointFiles::new(name.clone(), vec![file], Trust::None, CHUNK_BYTES, [])?)
    };
    if let Some(size) = args.model.strip_prefix("synth:") {
        let size: ByteSize = size.parse()?;
        let dir = args.dir.as_deref().unwrap_or(synthetic_dir);
        std::fs::create_dir_all(dir)?;
        let path = dir.join(format!("bench-{}.bin", std::process::id()));
        let made = Synthetic(path);
        fill(&made.0, size).with_context(|| format!("making {}", made.0.display()))?;
        let files = plain(&made.0)?;
        return Ok((Some(made), files));
    }
    let path = Path::new(&args.model);
    if path.is_file() {
        return Ok((None, plain(&std::path::absolute(path)?)?));
    }
    let (dir, manifest) = if path.is_dir() {
        (path.to_owned(), Arc::new(index(path, Source { uri: args.model.clone(), revision: None })?))
    } else {
        named(&args.model)?
    };
    Ok((None, CheckpointFiles::from_manifest(name, &dir, &manifest)?))
}

/// Writes `size` bytes that no disk compresses, and waits until they are on it.
fn fill(path: &Path, size: ByteSize) -> std::io::Result<()> {
    let mut file = std::fs::File::create_new(path)?;
    let mut block = vec![0_u8; 1 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut left = size.0;
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        let part = usize::try_from(left.min(block.len() as u64)).unwrap_or(block.len());
        file.write_all(&block[..part])?;
        left -= part as u64;
    }
    file.sync_all()
}

/// User and system time of this process so far.
pub(crate) fn cpu_time() -> Duration {
    std::fs::read_to_string("/proc/self/stat")
        .ok()
        .and_then(|s| parse_stat(&s))
        .map(|(_, time)| time)
        .unwrap_or_default()
}

/// Parent and CPU time from proc(5)'s `stat`: fields 4, 14 and 15. The second field is in parentheses and may contain
/// anything.
pub(crate) fn parse_stat(stat: &str) -> Option<(u32, Duration)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let milliseconds = ticks * 1000 / rustix::param::clock_ticks_per_second().max(1);
    Some((fields.get(1)?.parse().ok()?, Duration::from_millis(milliseconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_past_any_name() {
        let stat = "12 (a) b (c) S 7 1 1 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 100";
        assert_eq!(parse_stat(stat), Some((7, Duration::from_secs(2))));
        assert!(parse_stat("nonsense").is_none());
    }
}
