//! The limits of the same run: what the same bytes take without a store, with no order, no cache and no tensors.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::Context as _;
use stoker_device::{Cut, Slab, Transfer};
use stoker_io::{ChunkPool, Open, Placement, ReadOp, Reader, numa_nodes};
use stoker_types::{ByteSize, clock};

use super::{Bench, Options, Place};
use crate::cli::BenchTier;

/// Memory on each device that copies go to.
const SLAB: ByteSize = ByteSize::gib(1);

/// Bytes that a thread reads at a time.
const READ: ByteSize = ByteSize::mib(4);

/// Pinned memory and device memory, made before anything is measured.
pub(super) struct Limits {
    pool: ChunkPool,
    /// Of each device.
    slabs: Vec<Slab>,
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(bench: &Bench<'_>) -> anyhow::Result<Self> {
        let chunk = Self::chunk(bench);
        // Three for each thread: one being read into, two being copied.
        let slots = bench.read_threads as u64 * 3;
        let make = if bench.options.shared { ChunkPool::new } else { ChunkPool::private };
        let pool = make(ByteSize(slots * chunk.0), chunk)?;
        let near = Placement::near(bench.places.iter().map(|p| p.device.info().numa_node), &numa_nodes());
        if let Err(error) = pool.place(&near) {
            tracing::debug!(%error, "the memory of the limit comes from any node");
        }
        if let Some(pinner) = bench.places[0].device.pinner() {
            pool.set_pinner(pinner);
        }
        while pool.pin_free()? {}
        // Beside a model that fills the device.
        let bytes = bench.files.pool_bytes().min(SLAB);
        let slab = |place: &Place| place.device.allocate(bytes, bytes);
        Ok(Self { pool, slabs: bench.places.iter().map(slab).collect::<Result<_, _>>()? })
    }

    /// Unit of reads and copies: that of the loads from memory; for files the fastest that was measured.
    fn chunk(bench: &Bench<'_>) -> ByteSize {
        if bench.options.tier == BenchTier::Dram {
            bench.options.chunk
        } else {
            bench.options.chunk.min(READ)
        }
    }

    /// Where copy `i` goes, of at most a chunk: to the devices in turn, over and over through their slabs.
    fn to(&self, i: u64, chunk: u64) -> (usize, u64) {
        let devices = self.slabs.len() as u64;
        let places = (self.slabs[0].bytes().0 / chunk).max(1);
        // Less than the number of devices, which is a `usize`.
        #[expect(clippy::cast_possible_truncation, reason = "see above")]
        let device = (i % devices) as usize;
        (device, i / devices % places * chunk)
    }

    pub(super) fn words(&self, options: &Options) -> &'static str {
        match (options.tier, options.warm) {
            (BenchTier::Dram, _) => "limit of pinned copies",
            (BenchTier::Ssd, true) => "limit of page cache, checksums and copies together",
            (BenchTier::Ssd, false) => "limit of raw reads and copies together",
        }
    }

    pub(super) fn measure(&self, bench: &Bench<'_>, tier: BenchTier) -> anyhow::Result<Duration> {
        let bytes: u64 = bench.places.iter().map(|place| place.layout.bytes().0).sum();
        let chunk = Self::chunk(bench).0;
        let begun = clock::now();
        match tier {
            BenchTier::Dram => {
                // Pinned chunks, over and over, to where the files' chunks would go.
                let bufs: Vec<_> = std::iter::from_fn(|| self.pool.try_take()).collect();
                let chunks: Vec<_> =
                    bufs.into_iter().map(|buf| buf.freeze(self.pool.chunk_bytes())).collect();
                let (sender, done) = mpsc::channel();
                let mut left = bytes;
                for (host, i) in chunks.iter().cycle().zip(0..) {
                    let len = left.min(chunk);
                    let (device, to) = self.to(i, chunk);
                    let sender = sender.clone();
                    bench.places[device].device.copy(Transfer {
                        from: Box::new(host.clone()),
                        to: self.slabs[device].clone(),
                        cuts: vec![Cut::range(0, usize::try_from(len)?, to)],
                        // The receiver waits until the last sender is gone.
                        arrival: None,
                        done: Box::new(move |result| drop(sender.send(result))),
                    });
                    left -= len;
                    if left == 0 {
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
        let chunk = Self::chunk(bench).0;
        let mut work: Vec<(Arc<dyn Reader>, u64, usize)> = Vec::new();
        for file in bench.files.files() {
            let reader = files.open(&file.path, mode)?;
            let mut offset = 0;
            while offset < file.identity.len {
                let len = (file.identity.len - offset).min(chunk);
                work.push((Arc::clone(&reader), offset, usize::try_from(len)?));
                offset += len;
            }
        }
        let next = AtomicU64::new(0);
        // Checksums are part of what there is to do when the bytes come from memory; a disk is slower than they are.
        let sum = bench.options.warm;
        let one = || -> anyhow::Result<()> {
            let (sender, ended) = mpsc::channel::<Result<(), stoker_device::DeviceError>>();
            let mut flying = 0;
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some((reader, offset, len)) = work.get(usize::try_from(i)?) else { break };
                let (device, to) = self.to(i, chunk);
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
                bench.places[device].device.copy(Transfer {
                    from: Box::new(buf.freeze(*len)),
                    to: self.slabs[device].clone(),
                    cuts: vec![Cut::range(0, *len, to)],
                    // The receiver waits for as many as fly.
                    arrival: None,
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
