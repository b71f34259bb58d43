//! One load: a task that brings bytes to where they are wanted, and tells how far it is.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use stoker_device::{Slab, SlabPart};
use stoker_store::{
    ChunkRef, DeviceTarget, FileRange, Keep, Layout, Priority, Store, StoreConfig, StreamOptions,
};
use stoker_types::{ByteSize, ModelName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    element::Element,
    engine::{Engine, Place, Target},
    error::Error,
    memory::{Arriving, HostPart, Memory},
    node, settings,
    source::{Checkpoint, Tensor, thresholds},
};

/// What is wanted.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) from: From,
    pub(crate) place: Place,
    /// Only these tensors.
    pub(crate) names: Option<Vec<String>>,
    /// Only this rank's part of as many: rank, and how many there are.
    pub(crate) shard: Option<(u32, u32)>,
}

/// Where the bytes are.
#[derive(Debug)]
pub(crate) enum From {
    Files(Vec<PathBuf>),
    /// A model of a running node, by its socket.
    Node {
        socket: PathBuf,
        model: String,
        /// Its copy on the device itself, not one of it. (In host memory it is shared in any case.)
        shared: bool,
    },
}

/// How far a load is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Bytes that have arrived, in the order in which they are wanted.
    pub(crate) arrived: u64,
    /// Bytes in all; 0 until it is known.
    pub(crate) total: u64,
    /// The load has ended.
    pub(crate) end: Option<Result<(), Error>>,
}

/// What the task and its owner share.
pub(crate) struct Shared {
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) cancel: CancellationToken,
    /// There as soon as the files are known.
    tensors: Mutex<Option<Tensors>>,
}

/// The tensors of a load, each until it is taken.
struct Tensors {
    all: Vec<Tensor>,
    /// Of each, how many bytes must have arrived.
    thresholds: Vec<u64>,
    parts: Parts,
}

enum Parts {
    Device { parts: Vec<Option<SlabPart>>, kind: crate::dlpack::DeviceKind },
    Host(Vec<Option<HostPart>>),
    Copy { copy: Arc<node::Copy>, parts: Vec<Option<u64>>, device: u32, kind: crate::dlpack::DeviceKind },
}

/// A tensor that is there.
pub(crate) struct Ready {
    pub(crate) name: String,
    pub(crate) shape: Vec<i64>,
    pub(crate) element: Element,
    pub(crate) memory: Arc<Memory>,
}

// === impl Shared ===

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            progress: watch::Sender::new(Progress::default()),
            cancel: CancellationToken::new(),
            tensors: Mutex::new(None),
        }
    }

    /// Does what is ordered, and says how it ended.
    pub(crate) async fn run(self: Arc<Self>, engine: Arc<Engine>, order: Order) {
        let result = match self.load(&engine, order).await {
            Ok(()) if self.cancel.is_cancelled() => Err(Error::Cancelled),
            result => result,
        };
        if result.is_err() {
            // What was not taken goes at once.
            self.tensors.lock().take();
        }
        self.progress.send_modify(|progress| progress.end = Some(result));
    }

    /// How many tensors there are, once that is known.
    pub(crate) fn count(&self) -> Option<usize> {
        self.tensors.lock().as_ref().map(|tensors| tensors.all.len())
    }

    /// The tensors that have arrived by now and were not taken before, in the order in which they arrived.
    pub(crate) fn take(&self, arrived: u64) -> Vec<Ready> {
        let mut tensors = self.tensors.lock();
        let Some(tensors) = tensors.as_mut() else { return Vec::new() };
        let mut order: Vec<usize> =
            (0..tensors.all.len()).filter(|i| tensors.thresholds[*i] <= arrived).collect();
        order.sort_by_key(|i| tensors.thresholds[*i]);
        order.into_iter().filter_map(|i| tensors.take(i)).collect()
    }

    fn arrived(&self, bytes: u64) {
        self.progress.send_modify(|progress| progress.arrived = bytes);
    }

    async fn load(&self, engine: &Arc<Engine>, order: Order) -> Result<(), Error> {
        let Order { from, place, names, shard } = order;
        let opening = Arc::clone(engine);
        let (mut checkpoint, hold) = match from {
            _ if shard.is_some() && place == Place::Host => {
                let words =
                    "shard= is for devices; in host memory, load the names that you need and take views";
                return Err(Error::NotSupported(words.to_owned()));
            }
            From::Files(paths) if let Some(shard) = shard => {
                let names = names.clone();
                (blocking(move || Checkpoint::open_shard(&paths, names.as_deref(), shard)).await?, None)
            }
            From::Files(paths) => (blocking(move || Checkpoint::open(&paths)).await?, None),
            From::Node { socket, model, shared: true } if place != Place::Host => {
                if shard.is_some() {
                    let words =
                        "shared=True shares a node's copy of the whole model: there is no shard= of it";
                    return Err(Error::NotSupported(words.to_owned()));
                }
                return self.node_copy(engine, place, &socket, &model, names.as_deref()).await;
            }
            From::Node { socket, model, shared: _ } => {
                let report = |arrived, total| {
                    self.progress
                        .send_modify(|progress| (progress.arrived, progress.total) = (arrived, total));
                };
                let (manifest, hold) = node::hold(&socket, &model, &self.cancel, report).await?;
                let root = Path::new("/");
                let checkpoint = match shard {
                    Some(shard) => Checkpoint::of_shard(root, manifest, names.as_deref(), shard)?,
                    None => Checkpoint::of_manifest(root, &manifest),
                };
                (checkpoint, Some(hold))
            }
        };
        if let Some(names) = &names {
            checkpoint.keep(names)?;
        }
        let target = blocking(move || opening.target(place)).await?;
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match (hold, target) {
            (None, Some(target)) => self.to_device(&checkpoint, &target).await,
            (None, None) => self.to_host(checkpoint).await,
            (Some(hold), Some(target)) => self.node_to_device(checkpoint, &hold, &target).await,
            (Some(hold), None) => self.node_to_host(&checkpoint, hold),
        }
    }

    // --- from files ---

    async fn to_device(&self, checkpoint: &Checkpoint, target: &Arc<Target>) -> Result<(), Error> {
        // The store's own chunks, whose sums may be known.
        let store = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(Error::Cancelled),
            store = target.store.lock() => store,
        };
        let files = checkpoint.chunks(model_name()?, store.chunk_bytes())?;
        let (slab, layout) = self.allocate(checkpoint, target, |tensors| thresholds(&files, tensors)).await?;
        self.progress.send_modify(|progress| progress.total = files.bytes().bytes());
        let to = DeviceTarget { device: Arc::clone(&target.device), slab, layout };
        let ring_chunks = usize::try_from(settings::RING.bytes() / store.chunk_bytes()).unwrap_or(1).max(1);
        let delivering = store.deliver(&files, to, Keep::Nothing { ring_chunks }, Priority::Demand)?;
        let mut watched = delivering.arrived();
        let telling = async {
            loop {
                self.arrived(*watched.borrow_and_update());
                if watched.changed().await.is_err() {
                    // It ends with the load, whose end the other branch waits for.
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            biased;
            ended = delivering.wait(&self.cancel) => ended?,
            () = telling => return Err(Error::Cancelled),
        };
        self.arrived(files.bytes().bytes());
        Ok(())
    }

    /// Memory on the device, and in it a place for each tensor.
    async fn allocate(
        &self,
        checkpoint: &Checkpoint,
        target: &Arc<Target>,
        thresholds: impl FnOnce(&[Tensor]) -> Vec<u64>,
    ) -> Result<(Slab, Arc<Layout>), Error> {
        let wanted: Vec<_> = checkpoint.tensors.iter().map(Tensor::wanted).collect();
        let layout = Arc::new(Layout::of_parts(&wanted));
        let (device, bytes) = (Arc::clone(&target.device), layout.bytes());
        let slab = blocking(move || Ok(device.allocate(bytes, settings::GRANULE)?)).await?;
        let part = |(tensor, at): (&Tensor, &u64)| Ok(Some(slab.part(*at, tensor.bytes())?));
        let parts =
            checkpoint.tensors.iter().zip(layout.tensors()).map(part).collect::<Result<_, Error>>()?;
        *self.tensors.lock() = Some(Tensors {
            all: checkpoint.tensors.clone(),
            thresholds: thresholds(&checkpoint.tensors),
            parts: Parts::Device { parts, kind: target.kind },
        });
        Ok((slab, layout))
    }

    async fn to_host(&self, checkpoint: Checkpoint) -> Result<(), Error> {
        let chunk_bytes = stoker_checkpoint::manifest::CHUNK_BYTES;
        let files = checkpoint.chunks(model_name()?, chunk_bytes)?;
        let needed = files.pool_bytes().max(ByteSize(chunk_bytes));
        let config = StoreConfig { read_threads: settings::read_threads(), ..StoreConfig::new(needed) };
        let store = blocking(move || Ok(Store::open(config)?)).await?;
        let pool = store.pool();
        let fd =
            store.pool_fd().map_err(|error| Error::Internal(format!("opening the pool failed: {error}")))?;
        let arriving = self.reserve(
            &checkpoint,
            checkpoint.files.iter().map(|file| file.identity.len),
            chunk_bytes,
            |len, tensors| Arriving::new(len, chunk_bytes, Some(pool.clone()), None, tensors),
            |tensors| thresholds(&files, tensors),
        )?;
        self.progress.send_modify(|progress| progress.total = files.bytes().bytes());
        let options = StreamOptions { ring_chunks: settings::host_ring_chunks(), ..StreamOptions::default() };
        let mut stream = store.stream(&files, options)?;
        let mut ready = 0;
        loop {
            let next = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(Error::Cancelled),
                next = stream.next() => next?,
            };
            let Some(chunk) = next else { break };
            let (ChunkRef { file, index }, len) = (chunk.at(), chunk.len() as u64);
            // The pool has room for all of them.
            arriving[file as usize].place_own(&fd, index, chunk.keep())?;
            ready += len;
            self.arrived(ready);
        }
        // The store ends its threads; the memory stays with the tensors.
        blocking(move || {
            drop((stream, store));
            Ok(())
        })
        .await
    }

    /// Addresses for every file, and in them a place for each tensor.
    fn reserve(
        &self,
        checkpoint: &Checkpoint,
        lens: impl Iterator<Item = u64>,
        chunk_bytes: u64,
        new: impl Fn(u64, Vec<(u64, u64)>) -> Result<(Arriving, Vec<HostPart>), stoker_io::MapError>,
        thresholds: impl FnOnce(&[Tensor]) -> Vec<u64>,
    ) -> Result<Vec<Arriving>, Error> {
        debug_assert!(chunk_bytes > 0);
        let mut parts: Vec<Option<HostPart>> = checkpoint.tensors.iter().map(|_| None).collect();
        let mut files = Vec::new();
        for (file, len) in (0_u32..).zip(lens) {
            let of_file: Vec<usize> =
                (0..parts.len()).filter(|i| checkpoint.tensors[*i].range.file == file).collect();
            let ranges = of_file.iter().map(|i| checkpoint.tensors[*i].range);
            let (arriving, made) =
                new(len, ranges.map(|FileRange { offset, len, .. }| (offset, len)).collect())?;
            for (i, part) in of_file.into_iter().zip(made) {
                parts[i] = Some(part);
            }
            files.push(arriving);
        }
        *self.tensors.lock() = Some(Tensors {
            all: checkpoint.tensors.clone(),
            thresholds: thresholds(&checkpoint.tensors),
            parts: Parts::Host(parts),
        });
        Ok(files)
    }

    // --- from a node ---

    /// Its memory is ours to read for as long as a tensor lives.
    fn node_to_host(&self, checkpoint: &Checkpoint, hold: Arc<node::Hold>) -> Result<(), Error> {
        let arriving = self.reserve(
            checkpoint,
            hold.files.iter().map(|file| file.len),
            hold.chunk_bytes,
            |len, tensors| Arriving::new(len, hold.chunk_bytes, None, Some(hold.clone()), tensors),
            |tensors| vec![0; tensors.len()],
        )?;
        for (file, arriving) in hold.files.iter().zip(&arriving) {
            for (index, slot) in (0_u32..).zip(&file.slots) {
                arriving.place(&hold.pool, index, *slot)?;
            }
        }
        hold.check()
    }

    /// The node's copy on the device, as it is.
    async fn node_copy(
        &self,
        engine: &Arc<Engine>,
        place: Place,
        socket: &Path,
        model: &str,
        names: Option<&[String]>,
    ) -> Result<(), Error> {
        let opening = Arc::clone(engine);
        let target = blocking(move || opening.target(place)).await?;
        let Some(target) = target else { return Err(Error::Internal("no device".to_owned())) };
        let (manifest, copy) = node::copy(socket, model, &target.device, &self.cancel).await?;
        let mut checkpoint = Checkpoint::of_manifest(Path::new("/"), &manifest);
        let places: HashMap<String, u64> =
            checkpoint.tensors.iter().map(|tensor| tensor.name.clone()).zip(copy.tensors.clone()).collect();
        if let Some(names) = names {
            checkpoint.keep(names)?;
        }
        let parts = checkpoint.tensors.iter().map(|tensor| places.get(&tensor.name).copied()).collect();
        let bytes = checkpoint.tensors.iter().map(Tensor::bytes).sum();
        let (copy, device, kind) = (Arc::new(copy), target.device.info().ordinal, target.kind);
        *self.tensors.lock() = Some(Tensors {
            thresholds: vec![0; checkpoint.tensors.len()],
            all: checkpoint.tensors,
            parts: Parts::Copy { copy, parts, device, kind },
        });
        self.progress.send_modify(|progress| (progress.arrived, progress.total) = (bytes, bytes));
        Ok(())
    }

    /// Through the ring, as files go.
    async fn node_to_device(
        &self,
        mut checkpoint: Checkpoint,
        hold: &Arc<node::Hold>,
        target: &Arc<Target>,
    ) -> Result<(), Error> {
        let lent = target.opener.lend(hold)?;
        checkpoint.files = lent.source_files();
        // How far the node was is said by now.
        self.progress.send_modify(|progress| (progress.arrived, progress.total) = (0, 0));
        self.to_device(&checkpoint, target).await?;
        hold.check()
    }
}

// === impl Tensors ===

impl Tensors {
    fn take(&mut self, i: usize) -> Option<Ready> {
        let tensor = &self.all[i];
        let (element, shape) = Element::of(tensor.dtype, &tensor.shape);
        let memory = match &mut self.parts {
            Parts::Device { parts, kind } => Memory::on_device(parts[i].take()?, *kind),
            Parts::Copy { copy, parts, device, kind } => {
                Memory::of_copy(copy, parts[i].take()?, *device, *kind)
            }
            Parts::Host(parts) => parts[i].take()?.memory(element.bytes().min(8)),
        };
        Some(Ready { name: tensor.name.clone(), shape, element, memory: Arc::new(memory) })
    }
}

/// Loads of this package share nothing by name.
fn model_name() -> Result<ModelName, Error> {
    ModelName::new("python").map_err(|error| Error::Internal(error.to_string()))
}

/// Runs what may wait for a disk or a driver. A load that is cancelled waits for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a step of the load was lost: {error}"))),
    }
}
