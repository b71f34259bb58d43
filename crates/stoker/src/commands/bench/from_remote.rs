//! `stoker bench load --tier remote`: a remote store to DRAM with checksums, with and without a copy on SSD as it passes,
//! in turns with what the store's own client reaches against the same server.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use stoker_checkpoint::{FileIdentity, Origin, Trust, manifest::CHUNK_BYTES};
use stoker_remote::{RawFetch, RemoteError, RemoteStores, is_remote};
use stoker_store::{
    CheckpointFiles, CopyEnd, FinishedCopy, Priority, Shelf, Shelved, SourceFile, SsdDisk, SsdTier, Store,
    StoreConfig,
};
use stoker_types::{ByteSize, BytesPerSec, ModelName, RemoteObject, Tier, clock};
use tokio_util::sync::CancellationToken;

use super::{
    Spread,
    load::cpu_time,
    plot::{self, Bar},
};
use crate::{cli::BenchLoadArgs, config::Config, library::Library, output::Output};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    bytes: u64,
    checksums: &'static str,
    reader: String,
    limit_concurrency: usize,
    limit_range_bytes: u64,
    remote_to_dram: Rates,
    remote_to_dram_and_ssd: Rates,
    /// From the order to the copy on SSD, whole, durable and landed.
    landed_ms: Spread,
}

#[derive(Debug, Serialize)]
struct Rates {
    load_ms: Spread,
    rate_bytes_per_s: f64,
    /// Of the fetches that took turns with the loads: their median, slowest and fastest.
    limit_bytes_per_s: f64,
    limit_min_bytes_per_s: f64,
    limit_max_bytes_per_s: f64,
    /// Median of each load's share of the fetch that followed it: what else the machine does meets both.
    percent_of_limit: f64,
    percent_of_limit_min: f64,
    percent_of_limit_max: f64,
    cpu_seconds_per_gb: f64,
}

/// For what the copy missed, to pass through.
const FILL_ROOM: ByteSize = ByteSize::mib(256);

/// Runs of one kind.
#[derive(Default)]
struct Runs {
    times: Vec<Duration>,
    limits: Vec<BytesPerSec>,
    cpu: Duration,
    landed: Vec<Duration>,
}

/// Copies land nowhere: their files go with their directory.
struct NoShelf;

impl Shelf for NoShelf {
    fn land(&self, _: FinishedCopy<'_>) -> io::Result<()> {
        Ok(())
    }

    fn shelved(&self, _: &Path) -> Vec<Shelved> {
        Vec::new()
    }

    fn remove(&self, _: &Path, _: &ModelName) -> io::Result<ByteSize> {
        Ok(ByteSize::ZERO)
    }
}

/// Runs the bench against the stores that the configuration knows.
pub(crate) async fn with(
    config: &Config,
    args: &BenchLoadArgs,
    dir: &Path,
    output: Output,
) -> anyhow::Result<ExitCode> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let library = Library::open(config)?;
    let named = ModelName::new(&args.model).ok();
    let source = named.and_then(|name| library.source(&name).map(ToString::to_string));
    Box::pin(run(args, dir, &library.access()?.stores, source, output)).await?;
    Ok(ExitCode::SUCCESS)
}

/// `source` is where the model of a name comes from.
async fn run(
    args: &BenchLoadArgs,
    dir: &Path,
    stores: &RemoteStores,
    source: Option<String>,
    output: Output,
) -> anyhow::Result<()> {
    let url = source.unwrap_or_else(|| args.model.clone());
    ensure!(
        is_remote(&url),
        "`{url}` is in no remote store: name an object, a prefix or a model, such as --model s3://bucket/prefix"
    );
    let objects = objects(stores, &url).await?;
    let files = describe(&objects)?;
    let bytes = files.bytes();
    let raw = RawFetch::fastest(stores, &objects).await?;

    let disk = args.dir.as_deref().unwrap_or(dir).join(format!("remote-{}", std::process::id()));
    let ssd = SsdDisk { dir: disk.clone(), budget: ByteSize(u64::MAX), reserve: ByteSize::ZERO };
    let made = Made(disk);
    let open = |ssd: Option<SsdTier>| {
        let remote: Arc<dyn stoker_io::OpenRemote> = Arc::new(stores.clone());
        Store::open(StoreConfig {
            shared: args.shared,
            remote: Some(remote),
            ssd,
            ..StoreConfig::new(files.pool_bytes() + FILL_ROOM)
        })
    };
    let mut runs = [Runs::default(), Runs::default()];
    let mut reader = String::new();
    for (kind, runs) in runs.iter_mut().enumerate() {
        let tier = if kind == 1 { Some(SsdTier::open(vec![ssd.clone()], Arc::new(NoShelf))?) } else { None };
        let store = open(tier)?;
        for round in 0..=args.runs {
            // What an earlier one left goes; its memory stays.
            drop(store.lend());
            let (cpu_before, begun) = (cpu_time(), clock::now());
            let held = store.load(&files, Priority::Demand, &CancellationToken::new()).await?;
            let took = begun.elapsed();
            let cpu = cpu_time().saturating_sub(cpu_before);
            ensure!(
                held.report().bytes_from(Tier::Remote) == bytes,
                "the load did not read everything from remote"
            );
            reader = held.report().readers.first().map(ToString::to_string).unwrap_or_default();
            if kind == 1 {
                landed(&store, &files).await?;
            }
            // The first finds no memory behind the pool yet.
            if round > 0 {
                runs.times.push(took);
                runs.cpu += cpu;
                runs.landed.push(begun.elapsed());
                runs.limits.push(raw.fetch(stores, &objects).await?);
            }
        }
    }
    drop(made);

    let [to_dram, to_dram_and_ssd] = [runs[0].rates(bytes), runs[1].rates(bytes)];
    let report = Report {
        model: url,
        bytes: bytes.bytes(),
        checksums: "crc-64/nvme",
        reader,
        limit_concurrency: raw.concurrency,
        limit_range_bytes: raw.range.bytes(),
        remote_to_dram: to_dram,
        remote_to_dram_and_ssd: to_dram_and_ssd,
        landed_ms: Spread::ms(&runs[1].landed),
    };
    if let Some(path) = &args.plot {
        let rows = [("", &report.remote_to_dram), (", copied to SSD", &report.remote_to_dram_and_ssd)];
        let bars: Vec<_> = rows.into_iter().flat_map(|(what, rates)| rates.bars(bytes, what)).collect();
        plot::bars(path, &format!("{} to DRAM", report.model), &bars)?;
    }
    output.show(&report, |r| {
        let line = |rates: &Rates| {
            format!(
                "{} median of {}; limit {} ({} to {}); {:.0} % of it ({:.0} to {:.0}); {:.2} s CPU per GB",
                BytesPerSec(rates.rate_bytes_per_s),
                args.runs,
                BytesPerSec(rates.limit_bytes_per_s),
                BytesPerSec(rates.limit_min_bytes_per_s),
                BytesPerSec(rates.limit_max_bytes_per_s),
                rates.percent_of_limit,
                rates.percent_of_limit_min,
                rates.percent_of_limit_max,
                rates.cpu_seconds_per_gb
            )
        };
        format!(
            "{}: {}, reader {}, checksums {}\n\
             limit                  the client alone, {} ranges of {} at a time, into memory, in turns with the loads\n\
             remote -> DRAM         {}\n\
             remote -> DRAM and SSD {}\n\
             copy on SSD            whole and durable after {:.0} ms median",
            r.model,
            ByteSize(r.bytes),
            r.reader,
            r.checksums,
            r.limit_concurrency,
            ByteSize(r.limit_range_bytes),
            line(&r.remote_to_dram),
            line(&r.remote_to_dram_and_ssd),
            r.landed_ms.p50,
        )
    })
}

// === impl Runs ===

impl Runs {
    fn rates(&self, bytes: ByteSize) -> Rates {
        let rate = |took: Duration| BytesPerSec::of(bytes, took).0;
        let load_ms = Spread::ms(&self.times);
        let limits = Spread::of(self.limits.iter().map(|limit| limit.0));
        let pairs = self.times.iter().zip(&self.limits);
        let shares = Spread::of(pairs.map(|(took, limit)| 100.0 * rate(*took) / limit.0));
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let gigabytes = bytes.bytes() as f64 / 1e9 * self.times.len() as f64;
        Rates {
            load_ms,
            rate_bytes_per_s: rate(Duration::from_secs_f64(load_ms.p50 / 1e3)),
            limit_bytes_per_s: limits.p50,
            limit_min_bytes_per_s: limits.min,
            limit_max_bytes_per_s: limits.max,
            percent_of_limit: shares.p50,
            percent_of_limit_min: shares.min,
            percent_of_limit_max: shares.max,
            cpu_seconds_per_gb: self.cpu.as_secs_f64() / gigabytes,
        }
    }
}

// === impl Rates ===

impl Rates {
    fn bars(&self, bytes: ByteSize, what: &str) -> [Bar; 2] {
        let rate = |ms: f64| BytesPerSec::of(bytes, Duration::from_secs_f64(ms / 1e3));
        let load = Bar {
            label: format!("load with checksums{what}"),
            rate: BytesPerSec(self.rate_bytes_per_s),
            spread: Some((rate(self.load_ms.max), rate(self.load_ms.min))),
            is_limit: false,
        };
        let limit = Bar {
            label: "the client alone, in turns with it".to_owned(),
            rate: BytesPerSec(self.limit_bytes_per_s),
            spread: Some((BytesPerSec(self.limit_min_bytes_per_s), BytesPerSec(self.limit_max_bytes_per_s))),
            is_limit: true,
        };
        [load, limit]
    }
}

/// A directory that goes with its value.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "the bench's copies stay");
        }
    }
}

/// Waits until the copy that the load wrote as it passed is whole.
async fn landed(store: &Store, files: &CheckpointFiles) -> anyhow::Result<()> {
    let copying = tokio::task::block_in_place(|| store.copy(files, Priority::Demand))?;
    let mut progress = copying.context("no room for the copy on SSD")?;
    let ended = progress.wait_for(|progress| progress.end.is_some()).await?;
    match &ended.end {
        Some(CopyEnd::Landed) => Ok(()),
        end => anyhow::bail!("the copy on SSD isn't whole: {end:?}"),
    }
}

/// The object at an address, or what is directly below it.
async fn objects(stores: &RemoteStores, url: &str) -> anyhow::Result<Vec<RemoteObject>> {
    match stores.head(url).await {
        Ok(object) if object.len > 0 => return Ok(vec![object]),
        Ok(_) | Err(RemoteError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let mut objects = stores.list(url).await?;
    objects.retain(|object| object.len > 0);
    ensure!(!objects.is_empty(), "nothing is directly below {url}");
    Ok(objects)
}

fn describe(objects: &[RemoteObject]) -> anyhow::Result<CheckpointFiles> {
    let file = |object: &RemoteObject| SourceFile {
        path: object.url.clone().into(),
        identity: FileIdentity { len: object.len, mtime_ns: 0, inode: 0 },
        chunk_sums: Vec::new(),
        sha256: None,
        origin: Some(Origin { object: object.clone(), header_only: true }),
    };
    let files = objects.iter().map(file).collect();
    Ok(CheckpointFiles::new(ModelName::new("bench")?, files, Trust::None, CHUNK_BYTES, [])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_load_is_compared_with_the_fetch_beside_it() {
        let bytes = ByteSize(1_000_000_000);
        // The machine was busy in the second round: load and fetch were slow alike.
        let runs = Runs {
            times: [1, 10, 1].map(Duration::from_secs).into(),
            limits: [1e9, 1e8, 2e9].map(BytesPerSec).into(),
            cpu: Duration::from_secs(6),
            landed: Vec::new(),
        };
        let rates = runs.rates(bytes);
        assert!((rates.percent_of_limit - 100.0).abs() < 1e-9, "{rates:?}");
        assert!((rates.percent_of_limit_min - 50.0).abs() < 1e-9, "{rates:?}");
        assert!((rates.cpu_seconds_per_gb - 2.0).abs() < 1e-9, "{rates:?}");
        let [load, limit] = rates.bars(bytes, "");
        assert!(!load.is_limit && limit.is_limit);
        assert!(load.rate.0 <= load.spread.unwrap().1.0 && load.rate.0 >= load.spread.unwrap().0.0);
    }
}
