//! A node over temporary directories, with models of random bytes.

pub(crate) mod client;

use std::{
    collections::HashMap,
    ffi::OsString,
    num::NonZeroU32,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use stoker_checkpoint::{
    Architecture, ChunkSum, Format, GenerationDefaults, Manifest, ModelConfig, Rope, RopeLayout, Source,
    TokenizerFiles, Trust, WeightFile, manifest::CHUNK_BYTES,
};
use stoker_node::{
    Catalog, CatalogEntry, MemoryConfig, Node, NodeConfig, NodeDevice, RuntimeDir, Watchdog, WorkerConfig,
};
use stoker_store::{Store, StoreConfig};
use stoker_types::{
    ByteSize, DeviceId, Generation, InstanceId, ModelName, NodeEvent, NodeSnapshot, StartFailure, StartOrder,
    WorkerId, WorkerState,
};
use tokio::{sync::broadcast, time::timeout};

use client::PATIENCE;

/// A node and what it stands on. The directory goes last.
pub(crate) struct Bed {
    pub(crate) node: Node,
    pub(crate) store: Store,
    pub(crate) dir: tempfile::TempDir,
    generation: AtomicU64,
}

/// Models by name.
pub(crate) struct Models(pub(crate) HashMap<ModelName, CatalogEntry>);

impl Catalog for Models {
    fn lookup(&self, model: &ModelName) -> Result<CatalogEntry, StartFailure> {
        self.0.get(model).cloned().ok_or_else(|| StartFailure::UnknownModel { model: model.clone() })
    }

    fn outdated(&self, _: &ModelName) {}

    fn learned(&self, _: &ModelName, _: Vec<Vec<ChunkSum>>) {}
}

pub(crate) fn name(model: &str) -> ModelName {
    ModelName::new(model).unwrap()
}

/// A worker: this test executable, told to run the ignored test `mode`.
pub(crate) fn worker_command(mode: &str) -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    [exe.as_os_str(), mode.as_ref(), "--exact".as_ref(), "--ignored".as_ref(), "--nocapture".as_ref()]
        .map(OsString::from)
        .into()
}

/// Quick enough for tests, and for a machine with other things to do.
pub(crate) fn watchdog() -> Watchdog {
    Watchdog {
        ping_every: Duration::from_millis(100),
        pings_unanswered_max: 300,
        pings_without_step_max: 300,
        idle_intervals_max: 600,
    }
}

pub(crate) fn workers(mode: &str) -> WorkerConfig {
    WorkerConfig { watchdog: watchdog(), threads: 1, ..WorkerConfig::new(worker_command(mode)) }
}

pub(crate) fn one_worker(mode: &str) -> WorkerConfig {
    WorkerConfig { prewarmed: NonZeroU32::MIN, workers_max: NonZeroU32::MIN, ..workers(mode) }
}

/// A manifest of one file whose bytes mean nothing.
pub(crate) fn noise_model(dir: &std::path::Path, file: &str, len: u64) -> Manifest {
    use std::os::unix::fs::MetadataExt;
    let path = dir.join(file);
    let pattern: Vec<u8> = file.bytes().cycle().zip(0..=255).map(|(a, b)| a ^ b).collect();
    let bytes = pattern.repeat(usize::try_from(len.div_ceil(256)).unwrap());
    // It stays the same file for a node that comes later.
    if !path.exists() {
        std::fs::write(&path, &bytes[..usize::try_from(len).unwrap()]).unwrap();
    }
    let meta = std::fs::metadata(&path).unwrap();
    Manifest {
        version: 1,
        source: Source { uri: "test".into(), revision: None },
        trust: Trust::None,
        format: Format::Gguf,
        config: Some(ModelConfig {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 128,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab_size: 1000,
            context_trained: 1 << 20,
            norm_epsilon: 1e-5,
            rope: Rope { theta: 1e4, dims: 16, layout: RopeLayout::Halves, scaling: None },
            sliding_window: None,
            tied_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
        }),
        refusal: None,
        files: vec![WeightFile {
            path,
            identity: stoker_checkpoint::FileIdentity {
                len,
                mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
                inode: meta.ino(),
            },
            sha256: None,
            origin: None,
            chunk_sums: vec![],
        }],
        tensors: vec![],
        tokenizer: TokenizerFiles::None,
        generation: GenerationDefaults::default(),
        packed: None,
    }
}

impl Bed {
    /// A node with the models `a`, `b`, `c` of one, two and three chunks, and room for four chunks.
    pub(crate) fn new(workers: WorkerConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::in_dir(workers, dir)
    }

    pub(crate) fn in_dir(workers: WorkerConfig, dir: tempfile::TempDir) -> Self {
        Self::on_machine(workers, dir, MemoryConfig::new(ByteSize::gib(1)))
    }

    pub(crate) fn on_machine(workers: WorkerConfig, dir: tempfile::TempDir, memory: MemoryConfig) -> Self {
        let mut models = HashMap::new();
        for (model, chunks) in [("a", 1), ("b", 2), ("c", 3)] {
            let manifest = noise_model(dir.path(), model, chunks * CHUNK_BYTES - 1000);
            let entry = CatalogEntry { dir: dir.path().to_owned(), manifest: Arc::new(manifest) };
            models.insert(name(model), entry);
        }
        Self::with_memory(workers, dir, Models(models), ByteSize(4 * CHUNK_BYTES), memory)
    }

    pub(crate) fn with_models(
        workers: WorkerConfig,
        dir: tempfile::TempDir,
        models: Models,
        budget: ByteSize,
    ) -> Self {
        Self::with_memory(workers, dir, models, budget, MemoryConfig::new(ByteSize::gib(1)))
    }

    pub(crate) fn with_memory(
        workers: WorkerConfig,
        dir: tempfile::TempDir,
        models: Models,
        budget: ByteSize,
        memory: MemoryConfig,
    ) -> Self {
        Self::on_devices(workers, vec![], dir, models, budget, memory)
    }

    pub(crate) fn on_devices(
        workers: WorkerConfig,
        devices: Vec<NodeDevice>,
        dir: tempfile::TempDir,
        models: Models,
        budget: ByteSize,
        memory: MemoryConfig,
    ) -> Self {
        let store = Store::open(StoreConfig::new(budget)).unwrap();
        let config = NodeConfig {
            runtime: RuntimeDir::claim(&dir.path().join("run")).unwrap(),
            workers,
            devices,
            memory,
            keeper: None,
        };
        let node = Node::open(config, store.clone(), Arc::new(models)).unwrap();
        Self { node, store, dir, generation: AtomicU64::new(0) }
    }

    /// The next order for a model. Instance and generation have the same number.
    pub(crate) fn order(&self, model: &str) -> StartOrder {
        let number = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        StartOrder {
            instance: InstanceId(number),
            generation: Generation(number),
            model: name(model),
            device: DeviceId(0),
            context: 4096,
            sequences_max: 8,
            kv_bytes: ByteSize::mib(8),
        }
    }

    /// Waits until a snapshot is as it should be. What it waits for happens in another process, so there is nothing to
    /// be told by.
    pub(crate) async fn until(&self, what: &str, is: impl Fn(&NodeSnapshot) -> bool) -> NodeSnapshot {
        let waiting = async {
            loop {
                let snapshot = self.node.snapshot();
                if is(&snapshot) {
                    return snapshot;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        match timeout(PATIENCE, waiting).await {
            Ok(snapshot) => snapshot,
            Err(_) => panic!("in vain: {what}; {:#?}", self.node.snapshot()),
        }
    }

    pub(crate) fn pid(&self, worker: WorkerId) -> u32 {
        self.node.snapshot().workers.iter().find(|w| w.worker == worker).unwrap().pid
    }

    pub(crate) fn socket_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path().join("run/workers")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

pub(crate) fn idle(snapshot: &NodeSnapshot) -> usize {
    snapshot.workers.iter().filter(|w| w.state == WorkerState::Idle).count()
}

/// Sends a signal; one that stops has stopped the process when this returns.
pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(raw, signal).unwrap();
    while signal == rustix::process::Signal::STOP && state(pid) != Some('T') {
        assert!(is_running(pid), "it ended instead");
        std::thread::yield_now();
    }
}

/// The process's state as proc(5) says it: `T` for one that is stopped, `Z` for a zombie.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Whether a process runs; a zombie doesn't.
pub(crate) fn is_running(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The next loss of a worker.
pub(crate) async fn worker_lost(events: &mut broadcast::Receiver<NodeEvent>) -> NodeEvent {
    loop {
        let event = timeout(PATIENCE, events.recv()).await.expect("no worker was lost").unwrap();
        if matches!(event, NodeEvent::WorkerLost { .. }) {
            return event;
        }
    }
}
