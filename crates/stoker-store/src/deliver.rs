//! A model's way to a device: chunks are copied as they become ready, in execution order.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stoker_device::{Cut, Device, HostBytes, Slab, Transfer};
use stoker_io::Chunk;
use stoker_types::ByteSize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    error::LoadError,
    files::{CheckpointFiles, ChunkRef},
    job::Priority,
    layout::Layout,
    load::{Loading, Resident, Watermark},
    report::LoadReport,
    shared::Shared,
    stream::{ChunkStream, StreamOptions},
};

/// Copies that are queued on a device at most. More than its links have under way, so that they never run dry.
const QUEUED: usize = 64;

/// Chunks of the ring of a model for which there is no room in memory: 256 MiB. Measured: no larger one is faster, and a
/// smaller one is sooner made, pinned and back in the processor's cache.
const RING_CHUNKS: usize = 16;

/// Where on which device a model goes.
#[derive(Debug, Clone)]
pub struct DeviceTarget {
    /// The device.
    pub device: Arc<dyn Device>,
    /// Memory on it, at least as long as the layout. It is written to until the load has ended, however it ends; a granule is
    /// held until everything has arrived that lies in it.
    pub slab: Slab,
    /// Where tensors lie in it.
    pub layout: Arc<Layout>,
}

/// What stays in memory of a model that goes to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All of it, as far as there is room for all of it; otherwise it passes through a ring.
    All,
    /// Nothing: it passes through a ring of so many chunks. What is in memory already stays.
    Nothing {
        /// Chunks of the ring at most.
        ring_chunks: usize,
    },
}

/// A model on its way to a device. Dropped, the load is cancelled: copies that the device has are still made, so the slab's
/// memory is written to until [`DeviceTarget::slab`]'s last handle is gone.
#[derive(Debug)]
pub struct Delivering {
    task: JoinHandle<Result<Delivered, LoadError>>,
    arrived: watch::Receiver<u64>,
    total: ByteSize,
    cancel: CancellationToken,
    _on_drop: DropGuard,
}

/// A model on a device: whole, and checked on its way.
#[derive(Debug)]
pub struct Delivered {
    /// What bringing it to memory did.
    pub load: LoadReport,
    /// Bytes copied to the device.
    pub copied: ByteSize,
    /// From the order to the last byte on the device.
    pub total: Duration,
    /// From the order to the first chunk on the device.
    pub first: Duration,
    /// Its chunks in memory, if they stay: held until this is dropped.
    pub resident: Option<Resident>,
}

/// Chunks in execution order, each as soon as it and all before it are ready.
enum Source {
    Memory { loading: Loading, watermark: Watermark, next: usize, ready: u64 },
    Ring(Box<ChunkStream>),
}

/// Copies that the device has.
struct Flights {
    places: Arc<Semaphore>,
    ended: mpsc::UnboundedReceiver<Ended>,
    sender: mpsc::UnboundedSender<Ended>,
    arrivals: Arrivals,
    queued: usize,
    settled: usize,
}

/// A chunk that devices have.
struct Landing {
    at: ChunkRef,
    position: usize,
    bytes: u64,
    /// Copies of it that have not ended.
    left: AtomicUsize,
    _place: OwnedSemaphorePermit,
}

/// The end of a copy.
struct Ended {
    chunk: Arc<Landing>,
    /// Whether it was the chunk's last one.
    last: bool,
    result: Result<(), stoker_device::DeviceError>,
}

/// A chunk's bytes for several devices.
#[derive(Clone)]
struct SharedBytes(Arc<dyn HostBytes>);

/// How far the model has arrived, without a gap.
struct Arrivals {
    /// Chunks from the beginning.
    prefix: usize,
    /// Chunks beyond that, with their bytes.
    beyond: BTreeSet<(usize, u64)>,
    bytes: u64,
    first: Option<Duration>,
    lane: Lane,
}

/// One of the ways by which a model arrives, each with its own progress. What all have reached is published.
struct Lane {
    index: usize,
    published: Arc<Published>,
}

struct Published {
    reached: Mutex<Vec<u64>>,
    arrived: watch::Sender<u64>,
}

// === impl Delivering ===

impl Delivering {
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        targets: Vec<DeviceTarget>,
        keep: Keep,
        priority: Priority,
    ) -> Result<Self, LoadError> {
        assert!(!targets.is_empty(), "a delivery goes to at least one device");
        for target in &targets {
            let (needed, slab) = (target.layout.bytes(), target.slab.bytes());
            if needed > slab {
                return Err(LoadError::SlabTooSmall { needed, slab });
            }
        }
        let cancel = CancellationToken::new();
        let started = shared.now();
        let first = Source::begin(shared, files, keep, priority)?;
        let ways: Vec<_> = match first {
            // What is in memory goes to each device at that one's speed; all join one load.
            Source::Memory { .. } => {
                let others = targets.len().saturating_sub(1);
                let others = (0..others).map(|_| Source::begin(shared, files, keep, priority));
                let sources = std::iter::once(Ok(first)).chain(others).collect::<Result<Vec<_>, _>>()?;
                sources.into_iter().zip(targets.into_iter().map(|target| vec![target])).collect()
            }
            // What passes once goes to all as it does.
            Source::Ring(_) => vec![(first, targets)],
        };
        let (arrived, watched) = watch::channel(0);
        let published = Published { reached: Mutex::new(vec![0; ways.len()]), arrived };
        let published = Arc::new(published);
        let mut runs = JoinSet::new();
        for (index, (source, targets)) in ways.into_iter().enumerate() {
            let targets = targets.into_iter().map(|target| Destination::new(files, target));
            let targets = targets.collect::<Result<_, _>>()?;
            let (shared, files, cancel) = (Arc::clone(shared), files.clone(), cancel.clone());
            let delivery = Delivery { shared, files, targets, cancel, started };
            runs.spawn(delivery.run(source, Lane { index, published: Arc::clone(&published) }));
        }
        let task = tokio::spawn(join(runs, cancel.clone()));
        let _on_drop = cancel.clone().drop_guard();
        Ok(Self { task, arrived: watched, total: files.bytes(), cancel, _on_drop })
    }

    /// Bytes of the files that have arrived, from the beginning without a gap in execution order. Ends when the load does.
    #[must_use]
    pub fn arrived(&self) -> watch::Receiver<u64> {
        self.arrived.clone()
    }

    /// Bytes of the files.
    #[must_use]
    pub fn total(&self) -> ByteSize {
        self.total
    }

    /// Waits for the end, or for `cancel`. Either way no copy is under way any more afterwards.
    ///
    /// # Errors
    /// [`LoadError`]; what is in the slab means nothing then.
    pub async fn wait(mut self, cancel: &CancellationToken) -> Result<Delivered, LoadError> {
        tokio::select! {
            biased;
            ended = &mut self.task => return flatten(ended),
            () = cancel.cancelled() => {}
        }
        self.cancel.cancel();
        flatten((&mut self.task).await)
    }
}

fn flatten(
    ended: Result<Result<Delivered, LoadError>, tokio::task::JoinError>,
) -> Result<Delivered, LoadError> {
    // A runtime that shuts down takes its tasks with it.
    ended.unwrap_or(Err(LoadError::Closed))
}

/// Waits for all ways by which a model arrives. The first that fails ends the others.
async fn join(
    mut runs: JoinSet<Result<Delivered, LoadError>>,
    cancel: CancellationToken,
) -> Result<Delivered, LoadError> {
    let mut all: Result<Option<Delivered>, LoadError> = Ok(None);
    while let Some(run) = runs.join_next().await {
        let run = flatten(run).inspect_err(|_| cancel.cancel());
        all = match (all, run) {
            (Ok(None), Ok(one)) => Ok(Some(one)),
            (Ok(Some(all)), Ok(one)) => Ok(Some(all.and(one))),
            // What comes after the first error is that the others were cancelled.
            (Err(first), _) | (Ok(_), Err(first)) => Err(first),
        };
    }
    all?.ok_or(LoadError::Closed)
}

// === impl Delivered ===

impl Delivered {
    /// Two parts of one delivery.
    fn and(self, other: Self) -> Self {
        Self {
            copied: self.copied + other.copied,
            total: self.total.max(other.total),
            first: self.first.min(other.first),
            ..self
        }
    }
}

struct Delivery {
    shared: Arc<Shared>,
    files: CheckpointFiles,
    targets: Vec<Destination>,
    cancel: CancellationToken,
    started: Duration,
}

/// What a device still gets.
struct Destination {
    device: Arc<dyn Device>,
    layout: Arc<Layout>,
    /// By place in the order: what of each chunk goes where, and the memory for it. Taken by the chunk's copy.
    chunks: Vec<Option<(Vec<Cut>, Slab)>>,
}

// === impl Destination ===

impl Destination {
    /// Lets go of the slab but for what each chunk goes to: so it goes with what has arrived.
    fn new(files: &CheckpointFiles, target: DeviceTarget) -> Result<Self, LoadError> {
        let DeviceTarget { device, slab, layout } = target;
        let part = |at: &ChunkRef| {
            let cuts = layout.cuts(files, *at);
            if cuts.is_empty() {
                return Ok(None);
            }
            let words = layout.arrival(files, *at).map(|word| (word, 4));
            let slab = slab.only(cuts.iter().map(|cut| (cut.to, cut.bytes())).chain(words))?;
            Ok(Some((cuts, slab)))
        };
        let chunks = files.order().iter().map(part).collect::<Result<_, _>>();
        let failed = |source| LoadError::Device { model: files.key().name.clone(), source };
        Ok(Self { chunks: chunks.map_err(failed)?, device, layout })
    }
}

// === impl Delivery ===

impl Delivery {
    async fn run(mut self, mut source: Source, lane: Lane) -> Result<Delivered, LoadError> {
        let mut flights = Flights::new(lane);
        let passed = self.pass(&mut source, &mut flights).await;
        // However it went: the slab is nobody else's while the device still writes to it.
        let settled = flights.settle(&self).await;
        if let Err(error) = passed.and(settled) {
            if matches!(error, LoadError::Device { .. }) {
                source.keep();
            }
            return Err(error);
        }
        if self.cancel.is_cancelled() {
            // Everything was queued by then, and has arrived; nobody wants it.
            return Err(LoadError::Cancelled);
        }
        let total = self.elapsed();
        let first = flights.arrivals.first.unwrap_or(total);
        let (load, resident) = source.finish(&self.cancel).await?;
        let model = &self.files.key().name;
        for target in &self.targets {
            let (device, copied) = (target.device.info().ordinal, target.layout.bytes());
            tracing::info!(%model, device, %copied, time = ?total, "on the device");
            self.shared.copies_measured(device);
            metrics::counter!("stoker_store_device_bytes_total", "device" => device.to_string())
                .increment(copied.bytes());
        }
        let copied = ByteSize(self.targets.iter().map(|target| target.layout.bytes().bytes()).sum());
        Ok(Delivered { load, copied, total, first, resident })
    }

    /// Queues every chunk.
    async fn pass(&mut self, source: &mut Source, flights: &mut Flights) -> Result<(), LoadError> {
        for position in 0.. {
            let next = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(LoadError::Cancelled),
                next = source.next(&self.shared, &self.files) => next?,
            };
            let Some((at, bytes)) = next else { break };
            let place = flights.place(self).await?;
            flights.queue(self, position, at, bytes, place);
        }
        Ok(())
    }

    fn elapsed(&self) -> Duration {
        self.shared.now().saturating_sub(self.started)
    }
}

// === impl Source ===

impl Source {
    fn begin(
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
        keep: Keep,
        priority: Priority,
    ) -> Result<Self, LoadError> {
        let ring_chunks = match keep {
            Keep::Nothing { ring_chunks } => ring_chunks,
            Keep::All => match Loading::begin(shared, files, priority) {
                Ok(loading) => {
                    let watermark = loading.watermark();
                    return Ok(Self::Memory { loading, watermark, next: 0, ready: 0 });
                }
                Err(LoadError::OutOfBudget { .. }) => RING_CHUNKS,
                Err(error) => return Err(error),
            },
        };
        let options = StreamOptions { ring_chunks, priority, ..StreamOptions::default() };
        Ok(Self::Ring(Box::new(ChunkStream::begin(shared, files, options)?)))
    }

    async fn next(
        &mut self,
        shared: &Arc<Shared>,
        files: &CheckpointFiles,
    ) -> Result<Option<(ChunkRef, Box<dyn HostBytes>)>, LoadError> {
        match self {
            Self::Ring(stream) => {
                let Some(chunk) = stream.next().await? else { return Ok(None) };
                Ok(Some((chunk.at(), Box::new(chunk))))
            }
            Self::Memory { watermark, next, ready, .. } => {
                let Some(&at) = files.order().get(*next) else { return Ok(None) };
                let needed = *ready + files.chunk_len(at);
                watermark.wait_for(ByteSize(needed)).await?;
                // The loading holds the model, so what is ready stays.
                let chunk =
                    shared.lock().cache.model(files.key()).and_then(|model| model.chunk(*next).cloned());
                let chunk = pinned(chunk.ok_or(LoadError::Closed)?).await;
                (*next, *ready) = (*next + 1, needed);
                Ok(Some((at, Box::new(chunk))))
            }
        }
    }

    /// What is in memory by now is none the worse for a device that failed: the next attempt, or another device, has it.
    fn keep(&self) {
        if let Self::Memory { loading, .. } = self {
            loading.keep();
        }
    }

    /// Everything has been passed on.
    async fn finish(self, cancel: &CancellationToken) -> Result<(LoadReport, Option<Resident>), LoadError> {
        match self {
            Self::Memory { loading, .. } => {
                let resident = loading.wait(cancel).await?;
                Ok((resident.report().clone(), Some(resident)))
            }
            Self::Ring(stream) => {
                let report = stream.report().ok_or(LoadError::Closed)?.clone();
                Ok((report, None))
            }
        }
    }
}

/// A chunk that was in memory before there was a device, or before it was worth pinning.
async fn pinned(chunk: Chunk) -> Chunk {
    if chunk.is_pinned() {
        return chunk;
    }
    let same = chunk.clone();
    // About a millisecond.
    match tokio::task::spawn_blocking(move || chunk.pin()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => crate::transfer::not_pinned(&error),
        Err(error) => tracing::warn!(%error, "pinning was cut short"),
    }
    same
}

// === impl Flights ===

impl Flights {
    fn new(lane: Lane) -> Self {
        let (sender, ended) = mpsc::unbounded_channel();
        let arrivals = Arrivals { prefix: 0, beyond: BTreeSet::new(), bytes: 0, first: None, lane };
        Self { places: Arc::new(Semaphore::new(QUEUED)), ended, sender, arrivals, queued: 0, settled: 0 }
    }

    /// A place for one more copy; takes note of what has ended meanwhile.
    async fn place(&mut self, delivery: &Delivery) -> Result<OwnedSemaphorePermit, LoadError> {
        loop {
            while let Ok(ended) = self.ended.try_recv() {
                self.note(delivery, ended)?;
            }
            if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
                return Ok(place);
            }
            let ended = tokio::select! {
                biased;
                () = delivery.cancel.cancelled() => return Err(LoadError::Cancelled),
                ended = self.ended.recv() => ended,
            };
            // This value has a sender.
            self.note(delivery, ended.ok_or(LoadError::Closed)?)?;
        }
    }

    /// Has every device copy what it gets of a chunk.
    fn queue(
        &mut self,
        delivery: &mut Delivery,
        position: usize,
        at: ChunkRef,
        from: Box<dyn HostBytes>,
        place: OwnedSemaphorePermit,
    ) {
        let bytes = delivery.files.chunk_len(at);
        let take =
            |(index, target): (usize, &mut Destination)| Some((index, target.chunks[position].take()?));
        let mut copies: Vec<_> = delivery.targets.iter_mut().enumerate().filter_map(take).collect();
        let left = AtomicUsize::new(copies.len());
        let chunk = Arc::new(Landing { at, position, bytes, left, _place: place });
        let Some((target, to)) = copies.pop() else {
            drop(from);
            self.queued += 1;
            // This value has the receiver.
            let _ = self.sender.send(Ended { chunk, last: true, result: Ok(()) });
            return;
        };
        if copies.is_empty() {
            return self.copy(delivery, target, to, from, chunk);
        }
        let from = SharedBytes(Arc::from(from));
        copies.push((target, to));
        for (target, to) in copies {
            self.copy(delivery, target, to, Box::new(from.clone()), Arc::clone(&chunk));
        }
    }

    fn copy(
        &mut self,
        delivery: &Delivery,
        target: usize,
        (cuts, to): (Vec<Cut>, Slab),
        from: Box<dyn HostBytes>,
        chunk: Arc<Landing>,
    ) {
        self.queued += 1;
        let target = &delivery.targets[target];
        let sender = self.sender.clone();
        let copied: u64 = cuts.iter().map(Cut::bytes).sum();
        let arrival = target.layout.arrival(&delivery.files, chunk.at);
        let (shared, device) = (Arc::clone(&delivery.shared), target.device.info().ordinal);
        shared.copy_begins(device);
        let done = Box::new(move |result: Result<_, _>| {
            shared.copy_ended(device, if result.is_ok() { copied } else { 0 });
            let last = chunk.left.fetch_sub(1, Ordering::AcqRel) == 1;
            // Nobody waits for it when the runtime is going down.
            let _ = sender.send(Ended { chunk, last, result });
        });
        target.device.copy(Transfer { from, to, cuts, arrival, done });
    }

    fn note(&mut self, delivery: &Delivery, ended: Ended) -> Result<(), LoadError> {
        self.settled += 1;
        match ended.result {
            Ok(()) if ended.last => self.arrivals.note(ended.chunk.position, ended.chunk.bytes, delivery),
            Ok(()) => {}
            Err(source) => {
                return Err(LoadError::Device { model: delivery.files.key().name.clone(), source });
            }
        }
        Ok(())
    }

    /// Waits until the device has nothing any more; the first error counts.
    async fn settle(&mut self, delivery: &Delivery) -> Result<(), LoadError> {
        let mut result = Ok(());
        while self.settled < self.queued {
            let Some(ended) = self.ended.recv().await else { return Err(LoadError::Closed) };
            result = result.and(self.note(delivery, ended));
        }
        result
    }
}

// === impl Arrivals ===

impl Arrivals {
    fn note(&mut self, position: usize, bytes: u64, delivery: &Delivery) {
        self.first.get_or_insert_with(|| delivery.elapsed());
        self.beyond.insert((position, bytes));
        let before = self.prefix;
        while let Some((position, bytes)) = self.beyond.first().copied()
            && position == self.prefix
        {
            self.beyond.pop_first();
            self.prefix += 1;
            self.bytes += bytes;
        }
        if self.prefix > before {
            self.lane.reached(self.bytes);
        }
    }
}

// === impl Lane ===

impl Lane {
    fn reached(&self, bytes: u64) {
        let mut reached = self.published.reached.lock();
        reached[self.index] = bytes;
        let all = reached.iter().copied().min().unwrap_or(0);
        self.published.arrived.send_if_modified(|arrived| std::mem::replace(arrived, all) < all);
    }
}

// === impl SharedBytes ===

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, path::Path};

    use stoker_checkpoint::{Trust, identity_of};
    use stoker_device::{DeviceError, SimulatedDevice, SimulatedOptions};
    use stoker_types::{BytesPerSec, ChunkSum, ModelName};

    use super::*;
    use crate::{FileRange, SourceFile, Store, StoreConfig};

    const CHUNK: u64 = 64 << 10;

    /// Two files with tensors at crooked offsets, wanted in another order than they lie in.
    struct Model {
        files: CheckpointFiles,
        layout: Arc<Layout>,
        ranges: Vec<FileRange>,
        bytes: Vec<Vec<u8>>,
    }

    fn model(dir: &Path, name: &str, chunks: u64) -> Model {
        let bytes: Vec<Vec<u8>> = (0..2_u64)
            .map(|file| {
                let byte = |i: u64| (i + file).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[5];
                (0..chunks * CHUNK / 2 + 4242 * file).map(byte).collect()
            })
            .collect();
        let files = bytes.iter().enumerate().map(|(i, bytes)| {
            let path = dir.join(format!("{name}-{i}"));
            std::fs::File::create_new(&path).unwrap().write_all(bytes).unwrap();
            SourceFile {
                identity: identity_of(&path).unwrap(),
                path,
                chunk_sums: Vec::new(),
                sha256: None,
                origin: None,
            }
        });
        let files: Vec<_> = files.collect();
        let mut ranges = Vec::new();
        for (file, content) in (0_u32..).zip(&bytes) {
            let mut offset = 8;
            for len in [100_000, 512, 777, 30_000].into_iter().cycle() {
                if offset + len > content.len() as u64 {
                    break;
                }
                ranges.push(FileRange { file, offset, len });
                offset += len;
            }
        }
        ranges.reverse();
        let first =
            ranges.iter().map(|r| ChunkRef { file: r.file, index: u32::try_from(r.offset / CHUNK).unwrap() });
        let name = ModelName::new(name).unwrap();
        let files = CheckpointFiles::new(name, files, Trust::None, CHUNK, first.collect::<Vec<_>>()).unwrap();
        Model { files, layout: Arc::new(Layout::new(ranges.iter().copied())), ranges, bytes }
    }

    fn store(chunks: u64) -> Store {
        let budget = ByteSize(chunks * CHUNK);
        Store::open(StoreConfig { chunk: ByteSize(CHUNK), ..StoreConfig::new(budget) }).unwrap()
    }

    fn device(options: SimulatedOptions) -> Arc<SimulatedDevice> {
        Arc::new(SimulatedDevice::new(&options).unwrap())
    }

    fn target(device: &Arc<SimulatedDevice>, model: &Model) -> DeviceTarget {
        let slab = device.allocate(model.layout.bytes(), ByteSize::mib(2)).unwrap();
        DeviceTarget { device: device.clone(), slab, layout: Arc::clone(&model.layout) }
    }

    fn assert_arrived(model: &Model, target: &DeviceTarget) {
        for (range, to) in model.ranges.iter().zip(model.layout.tensors()) {
            let mut got = vec![0; usize::try_from(range.len).unwrap()];
            target.device.read(&target.slab, *to, &mut got).unwrap();
            let from = usize::try_from(range.offset).unwrap();
            assert!(got == model.bytes[range.file as usize][from..from + got.len()], "{range:?}");
        }
    }

    #[tokio::test]
    async fn tensors_arrive_from_disk_then_from_memory_then_through_a_ring() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 40);
        let store = store(60);
        let device = device(SimulatedOptions { rate: Some(BytesPerSec(1e9)), ..SimulatedOptions::default() });
        let cancel = CancellationToken::new();
        for (keep, from_disk, stays) in [
            (Keep::All, true, true),
            (Keep::All, false, true),
            (Keep::Nothing { ring_chunks: 3 }, false, false),
        ] {
            let target = target(&device, &model);
            let delivering = store.deliver(&model.files, target.clone(), keep, Priority::Demand).unwrap();
            let arrived = delivering.arrived();
            let delivered = delivering.wait(&cancel).await.unwrap();
            assert_arrived(&model, &target);
            assert_eq!(*arrived.borrow(), model.files.bytes().bytes());
            assert_eq!(
                delivered.load.bytes_from(stoker_types::Tier::Ssd) > ByteSize::ZERO,
                from_disk,
                "{keep:?}"
            );
            assert_eq!(delivered.resident.is_some(), stays);
            assert!(delivered.first <= delivered.total);
        }
        let layout = model.layout.bytes().bytes();
        assert!(device.modelled() >= Duration::from_nanos(3 * layout * 9 / 10), "a byte takes a nanosecond");
        assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO);
        assert!(store.device_rate(0).is_none_or(|rate| rate.0 > 0.0));
    }

    #[tokio::test]
    async fn each_device_gets_its_slices_and_every_byte_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 40);
        // Tensors over the first file's bytes, in rows of which each rank gets a part, and one that all get whole.
        let tensor = |offset, shape: [u64; 2]| stoker_checkpoint::Tensor {
            name: format!("t{offset}"),
            role: None,
            dtype: stoker_types::DType::U8,
            len: shape[0] * shape[1],
            shape: shape.into(),
            file: 0,
            offset,
        };
        let tensors = [tensor(8, [300, 999]), tensor(300_000, [9, 50_000]), tensor(800_001, [1, 333])];
        const WORLD: u32 = 3;
        for (chunks, keep) in [(60, Keep::All), (6, Keep::All), (60, Keep::Nothing { ring_chunks: 2 })] {
            let store = store(chunks);
            let devices: Vec<_> = (0..WORLD).map(|_| device(SimulatedOptions::default())).collect();
            let ranks: Vec<Vec<_>> = (0..WORLD)
                .map(|rank| {
                    let shard = crate::Shard::new(rank, WORLD).unwrap();
                    let columns = shard.of(&tensors[0], 1).unwrap();
                    let rows = shard.of(&tensors[1], 0).unwrap();
                    vec![columns, rows, crate::TensorPart::whole(&tensors[2])]
                })
                .collect();
            let targets: Vec<_> = devices
                .iter()
                .zip(&ranks)
                .map(|(device, parts)| {
                    let layout = Arc::new(Layout::of_parts(parts));
                    let slab = device.allocate(layout.bytes(), ByteSize::mib(2)).unwrap();
                    DeviceTarget { device: device.clone() as Arc<dyn Device>, slab, layout }
                })
                .collect();
            let delivering =
                store.deliver_to_all(&model.files, targets.clone(), keep, Priority::Demand).unwrap();
            let arrived = delivering.arrived();
            let delivered = delivering.wait(&CancellationToken::new()).await.unwrap();
            assert_eq!(delivered.load.bytes_from(stoker_types::Tier::Ssd), model.files.bytes(), "read once");
            assert_eq!(*arrived.borrow(), model.files.bytes().bytes());
            for (target, parts) in targets.iter().zip(&ranks) {
                for (part, to) in parts.iter().zip(target.layout.tensors()) {
                    let mut got = vec![0; usize::try_from(part.bytes()).unwrap()];
                    target.device.read(&target.slab, *to, &mut got).unwrap();
                    let runs = part.runs().flat_map(|(at, len)| {
                        let at = usize::try_from(at).unwrap();
                        &model.bytes[0][at..at + usize::try_from(len).unwrap()]
                    });
                    assert!(got.iter().eq(runs), "{part:?}");
                }
            }
            assert_eq!(delivered.copied, ByteSize(targets.iter().map(|t| t.layout.bytes().bytes()).sum()));
        }
    }

    #[tokio::test]
    async fn a_word_for_each_chunk_says_that_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 20);
        for keep in [Keep::All, Keep::Nothing { ring_chunks: 3 }] {
            let (store, device) = (store(60), device(SimulatedOptions::default()));
            let layout = Layout::clone(&model.layout).announcing(&model.files);
            let words = layout.arrivals().unwrap();
            assert_eq!(layout.bytes(), ByteSize(words + 4 * model.files.chunks()));
            let slab = device.allocate(layout.bytes(), ByteSize::mib(2)).unwrap();
            let target = DeviceTarget { device: device.clone(), slab, layout: Arc::new(layout) };
            let wanted = |at: ChunkRef| !target.layout.cuts(&model.files, at).is_empty();
            let there = || -> Vec<bool> {
                let mut bytes = vec![0; usize::try_from(4 * model.files.chunks()).unwrap()];
                device.read(&target.slab, words, &mut bytes).unwrap();
                bytes.chunks_exact(4).map(|word| word == 1_u32.to_ne_bytes()).collect()
            };
            assert!(there().iter().all(|there| !there));
            let delivering = store.deliver(&model.files, target.clone(), keep, Priority::Demand).unwrap();
            delivering.wait(&CancellationToken::new()).await.unwrap();
            let there = there();
            let chunks = model.files.order();
            assert!(chunks.iter().any(|at| wanted(*at)));
            for at in chunks {
                assert_eq!(there[usize::try_from(model.files.number(*at)).unwrap()], wanted(*at), "{at:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_byte_that_is_wrong_on_the_device_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 20);
        let store = store(30);
        let device = device(SimulatedOptions::default());
        let target = target(&device, &model);
        let none = store.check(&model.files, &target).await.unwrap_err();
        assert!(matches!(none, LoadError::NoSums { .. }), "{none}");
        let delivering = store.deliver(&model.files, target.clone(), Keep::All, Priority::Demand).unwrap();
        let delivered = delivering.wait(&CancellationToken::new()).await.unwrap();
        let checked = store.check(&model.files, &target).await.unwrap();
        assert_eq!(checked.bytes + checked.read, model.files.bytes());
        assert!(checked.bytes >= ByteSize(model.ranges.iter().map(|range| range.len).sum()));

        // The last byte of the tensor in the middle, which lies in a known chunk.
        let wrong = model.ranges.len() / 2;
        let (range, to) = (model.ranges[wrong], model.layout.tensors()[wrong] + model.ranges[wrong].len - 1);
        let was = model.bytes[range.file as usize][usize::try_from(range.offset + range.len - 1).unwrap()];
        let (sender, done) = std::sync::mpsc::channel();
        device.copy(Transfer {
            from: Box::new(vec![was ^ 4]),
            to: target.slab.clone(),
            cuts: vec![Cut::range(0, 1, to)],
            arrival: None,
            done: Box::new(move |result| sender.send(result).unwrap()),
        });
        done.recv().unwrap().unwrap();
        let error = store.check(&model.files, &target).await.unwrap_err();
        let LoadError::CorruptOnDevice { path, chunk, .. } = &error else { panic!("{error}") };
        assert_eq!(path, &model.files.files()[range.file as usize].path);
        assert_eq!(u64::from(*chunk), (range.offset + range.len - 1) / CHUNK);
        drop(delivered);

        let tensor = stoker_checkpoint::Tensor {
            name: "t".into(),
            role: None,
            dtype: stoker_types::DType::U8,
            shape: vec![10, 10],
            len: 100,
            file: 0,
            offset: 0,
        };
        let part = crate::Shard::new(0, 2).unwrap().of(&tensor, 1).unwrap();
        let sliced = DeviceTarget { layout: Arc::new(Layout::of_parts([&part])), ..target };
        let error = store.check(&model.files, &sliced).await.unwrap_err();
        assert!(matches!(error, LoadError::Sliced { .. }), "{error}");
    }

    #[tokio::test]
    async fn one_device_that_fails_ends_the_delivery_to_all() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 40);
        for keep in [Keep::All, Keep::Nothing { ring_chunks: 4 }] {
            let store = store(60);
            let devices = [device(SimulatedOptions::default()), device(SimulatedOptions::default())];
            let targets = devices.iter().map(|device| target(device, &model)).collect();
            let fault = DeviceError::Simulated { device: 0, what: "bus error" };
            devices[1].fail_after(ByteSize(500_000), fault.clone());
            let delivering = store.deliver_to_all(&model.files, targets, keep, Priority::Demand).unwrap();
            let error = delivering.wait(&CancellationToken::new()).await.unwrap_err();
            assert!(matches!(&error, LoadError::Device { source, .. } if *source == fault), "{error}");
            for device in devices {
                assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO, "no copy holds a slab any more");
            }
        }
    }

    #[tokio::test]
    async fn a_model_larger_than_memory_passes_through() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 50);
        let store = store(4);
        let device = device(SimulatedOptions::default());
        let target = target(&device, &model);
        let delivering = store.deliver(&model.files, target.clone(), Keep::All, Priority::Demand).unwrap();
        let delivered = delivering.wait(&CancellationToken::new()).await.unwrap();
        assert_arrived(&model, &target);
        assert!(delivered.resident.is_none());
        assert_eq!(store.stats().used, ByteSize::ZERO);
    }

    #[tokio::test]
    async fn a_failing_device_fails_the_load_and_frees_everything() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 40);
        for keep in [Keep::All, Keep::Nothing { ring_chunks: 4 }] {
            let store = store(60);
            let device = device(SimulatedOptions::default());
            let target = target(&device, &model);
            let fault = DeviceError::Simulated { device: 0, what: "bus error" };
            device.fail_after(ByteSize(500_000), fault.clone());
            let delivering = store.deliver(&model.files, target, keep, Priority::Demand).unwrap();
            let error = delivering.wait(&CancellationToken::new()).await.unwrap_err();
            assert!(matches!(&error, LoadError::Device { source, .. } if *source == fault), "{error}");
            assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO, "the slab is free");
            // The device serves the next load.
            let target = super::tests::target(&device, &model);
            let again = store.deliver(&model.files, target.clone(), keep, Priority::Demand).unwrap();
            again.wait(&CancellationToken::new()).await.unwrap();
            assert_arrived(&model, &target);
        }
    }

    /// The same model, with its sums.
    fn known(model: &Model) -> Model {
        let files = model.files.files().iter().zip(&model.bytes).map(|(file, bytes)| SourceFile {
            chunk_sums: bytes.chunks(usize::try_from(CHUNK).unwrap()).map(ChunkSum::of).collect(),
            ..file.clone()
        });
        let (name, order) = (model.files.key().name.clone(), model.files.order().to_vec());
        let files = CheckpointFiles::new(name, files.collect(), Trust::Chunk, CHUNK, order).unwrap();
        Model {
            files,
            layout: model.layout.clone(),
            ranges: model.ranges.clone(),
            bytes: model.bytes.clone(),
        }
    }

    #[tokio::test]
    async fn what_was_in_memory_when_a_device_failed_stays_for_the_next_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let model = known(&model(dir.path(), "m", 40));
        let cancel = CancellationToken::new();
        let total = model.files.bytes();
        let lost = DeviceError::Lost {
            device: 0,
            call: "copy",
            name: "CUDA_ERROR_DEVICE_UNAVAILABLE".into(),
            words: "fell off the bus".into(),
        };
        for (fault, again_on_it) in
            [(DeviceError::Simulated { device: 0, what: "bus error" }, true), (lost, false)]
        {
            // While it is being read: what had come by then is not read again.
            let store = store(60);
            let failing = device(SimulatedOptions::default());
            failing.fail_after(ByteSize(500_000), fault.clone());
            let aim = target(&failing, &model);
            let delivering = store.deliver(&model.files, aim, Keep::All, Priority::Demand).unwrap();
            let error = delivering.wait(&cancel).await.unwrap_err();
            assert!(matches!(&error, LoadError::Device { source, .. } if *source == fault), "{error}");
            let stats = store.stats();
            let kept = stats.residency[0].resident;
            assert!(kept > ByteSize::ZERO, "at least what was copied to the device");
            assert_eq!((stats.mapped, stats.loading), (ByteSize::ZERO, 0), "nobody holds it");
            assert_eq!(failing.memory().unwrap().slabs, ByteSize::ZERO);

            let other = device(SimulatedOptions::default());
            let next = if again_on_it { &failing } else { &other };
            let aim = target(next, &model);
            let delivering = store.deliver(&model.files, aim.clone(), Keep::All, Priority::Demand).unwrap();
            let delivered = delivering.wait(&cancel).await.unwrap();
            assert_arrived(&model, &aim);
            let read = delivered.load.bytes_from(stoker_types::Tier::Ssd);
            assert_eq!(read.bytes() + kept.bytes(), total.bytes(), "only what was missing");
            drop((aim, delivered));

            // When all of it is there: none of it goes.
            next.fail_after(ByteSize(500_000), fault.clone());
            let aim = target(next, &model);
            let delivering = store.deliver(&model.files, aim, Keep::All, Priority::Demand).unwrap();
            assert!(matches!(delivering.wait(&cancel).await, Err(LoadError::Device { .. })));
            assert_eq!(store.stats().residency[0].resident, total);
            assert_eq!(store.drop_all().await.held, ByteSize::ZERO);
            assert_eq!(store.stats().used, ByteSize::ZERO, "every chunk is accounted for");
        }
    }

    #[tokio::test]
    async fn cancelled_in_the_middle_nothing_is_written_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 60);
        let store = store(80);
        let slow = SimulatedOptions {
            rate: Some(BytesPerSec(50e6)),
            real_time: true,
            ..SimulatedOptions::default()
        };
        let device = device(slow);
        let target = target(&device, &model);
        let delivering = store.deliver(&model.files, target.clone(), Keep::All, Priority::Demand).unwrap();
        let mut arrived = delivering.arrived();
        arrived.wait_for(|bytes| *bytes > 0).await.unwrap();
        let cancel = CancellationToken::new();
        cancel.cancel();
        let error = delivering.wait(&cancel).await.unwrap_err();
        assert!(matches!(error, LoadError::Cancelled), "{error}");
        let busy = device.modelled();
        drop(target);
        assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO, "no copy holds it any more");
        assert_eq!(device.modelled(), busy);
    }

    #[tokio::test]
    async fn memory_whose_tensors_are_gone_goes_while_others_are_on_their_way() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 64);
        let chunks = model.files.order().len() as u64;
        for keep in [Keep::All, Keep::Nothing { ring_chunks: 4 }] {
            let store = store(80);
            let device = device(SimulatedOptions::default());
            let granule = ByteSize(4 * CHUNK);
            let slab = device.allocate(model.layout.bytes(), granule).unwrap();
            let whole = device.memory().unwrap().slabs;
            let parts = model
                .ranges
                .iter()
                .zip(model.layout.tensors())
                .map(|(range, at)| slab.part(*at, range.len).unwrap());
            let mut parts: Vec<_> = parts.collect();
            // A quarter of it stays away.
            let most = ByteSize(chunks * CHUNK / 4 * 3);
            device.pause_after(most);
            let target = DeviceTarget { device: device.clone(), slab, layout: Arc::clone(&model.layout) };
            let delivering = store.deliver(&model.files, target, keep, Priority::Demand).unwrap();
            let mut arrived = delivering.arrived();
            arrived.wait_for(|arrived| *arrived >= chunks * CHUNK / 2).await.unwrap();
            assert_eq!(device.memory().unwrap().slabs, whole, "tensors keep it");
            parts.clear();
            let left = device.memory().unwrap().slabs;
            assert!(left < whole && left >= ByteSize(chunks * CHUNK / 4), "{left} of {whole}");
            assert!(left <= ByteSize(chunks * CHUNK / 2 + 4 * granule.bytes()), "{left} of {whole}");
            device.resume();
            delivering.wait(&CancellationToken::new()).await.unwrap();
            assert_eq!(device.memory().unwrap().slabs, ByteSize::ZERO);
        }
    }

    #[tokio::test]
    async fn a_slab_that_is_too_small_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(dir.path(), "m", 4);
        let device = device(SimulatedOptions::default());
        let slab = device.allocate(ByteSize(4096), ByteSize::ZERO).unwrap();
        let target = DeviceTarget { device, slab, layout: Arc::clone(&model.layout) };
        let error = store(8).deliver(&model.files, target, Keep::All, Priority::Demand).unwrap_err();
        assert!(matches!(error, LoadError::SlabTooSmall { .. }), "{error}");
    }
}
