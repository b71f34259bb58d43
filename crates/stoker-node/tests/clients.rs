//! Programs that map models out of a node's pool.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, net::UnixStream as Blocking},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use stoker_checkpoint::{ChunkSum, Manifest, Source};
use stoker_io::{Fault, FaultKind, FaultyFiles, Gate, LocalFiles, MappedFile};
use stoker_node::{
    Catalog, CatalogEntry, ClientSocket, MemoryConfig, Node, NodeConfig, RuntimeDir, WorkerConfig,
};
use stoker_proto::{
    FrameReader, FrameWriter, PROTOCOL_VERSION,
    share::{self, Held, Hold, Refusal, ToClient, to_client},
};
use stoker_store::{Store, StoreConfig};
use stoker_types::{ByteSize, ModelName, StartFailure};
use tokio::{net::UnixStream, time::timeout};

const PATIENCE: Duration = Duration::from_secs(60);

/// One model, `tiny`.
struct One(Arc<Manifest>);

impl Catalog for One {
    fn lookup(&self, model: &ModelName) -> Result<CatalogEntry, StartFailure> {
        if model.as_str() == "tiny" {
            Ok(CatalogEntry { dir: "/".into(), manifest: Arc::clone(&self.0) })
        } else {
            Err(StartFailure::UnknownModel { model: model.clone() })
        }
    }

    fn outdated(&self, _: &ModelName) {}

    fn learned(&self, _: &ModelName, _: Vec<Vec<ChunkSum>>) {}
}

struct Bed {
    store: Store,
    files: FaultyFiles<LocalFiles>,
    weights: PathBuf,
    socket: PathBuf,
    clients: ClientSocket,
    _node: Node,
    _dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny-llama");
        let manifest =
            stoker_checkpoint::index(&model, Source { uri: "test".into(), revision: None }).unwrap();
        let weights = manifest.files[0].path.clone();
        let files = FaultyFiles::new(LocalFiles::default());
        let opener = Arc::new(files.clone());
        let store = Store::open(StoreConfig { opener, ..StoreConfig::new(ByteSize::mib(64)) }).unwrap();
        let config = NodeConfig {
            devices: vec![],
            runtime: RuntimeDir::claim(&dir.path().join("run")).unwrap(),
            // Nobody is served here. It ends with its standard input, which the node has.
            workers: WorkerConfig::new(vec!["cat".into()]),
            memory: MemoryConfig::new(ByteSize::mib(64)),
            keeper: None,
        };
        let node = Node::open(config, store.clone(), Arc::new(One(Arc::new(manifest)))).unwrap();
        let socket = dir.path().join("clients.sock");
        let clients = ClientSocket::listen(&socket, node.clone()).unwrap();
        Self { store, files, weights, socket, clients, _node: node, _dir: dir }
    }

    /// What holds the model: programs and their loads.
    fn holds(&self) -> usize {
        self.store.stats().residency.iter().map(|residency| residency.holds).sum()
    }

    /// What it waits for happens in another task, when the connection's end has been noticed.
    async fn until_let_go(&self) {
        let mut changes = self.store.changes();
        let waiting = async {
            while self.holds() > 0 {
                changes.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, waiting).await.expect("the hold was not let go");
    }

    async fn stop(self) {
        self.clients.stop().await;
    }
}

/// A program's connection, with the pool.
async fn connect(socket: &Path) -> (UnixStream, OwnedFd) {
    let path = socket.to_owned();
    let connecting = tokio::task::spawn_blocking(move || {
        let stream = Blocking::connect(path).unwrap();
        let pool = share::receive_pool(&stream).unwrap();
        stream.set_nonblocking(true).unwrap();
        (stream, pool)
    });
    let (stream, pool) = timeout(PATIENCE, connecting).await.unwrap().unwrap();
    (UnixStream::from_std(stream).unwrap(), pool)
}

async fn ask(stream: &mut UnixStream, model: &str, protocol: u32) {
    FrameWriter::new(stream)
        .send(&Hold { protocol, model: model.to_owned(), ..Hold::default() })
        .await
        .unwrap();
}

/// The answer, after whatever is said of progress.
async fn answer(stream: &mut UnixStream) -> to_client::Kind {
    let mut reader = FrameReader::new(stream);
    loop {
        let message: ToClient = timeout(PATIENCE, reader.next()).await.unwrap().unwrap().unwrap();
        match message.kind.unwrap() {
            to_client::Kind::Progress(_) => {}
            kind => return kind,
        }
    }
}

#[tokio::test]
async fn a_program_maps_a_model_and_holds_it_while_it_is_connected() {
    let bed = Bed::new();
    let mode = std::fs::metadata(&bed.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (mut first, pool) = connect(&bed.socket).await;
    ask(&mut first, "tiny", PROTOCOL_VERSION).await;
    let to_client::Kind::Held(held) = answer(&mut first).await else { panic!("refused") };
    let Held { manifest_json, chunk_bytes, files, slab: _ } = held;
    let manifest = Manifest::parse(Path::new("manifest"), &manifest_json).unwrap();
    assert_eq!(manifest.files[0].path, bed.weights);
    let map = MappedFile::map(&pool, files[0].len, chunk_bytes, &files[0].slots).unwrap();
    assert!(*map == std::fs::read(&bed.weights).unwrap()[..]);
    // Nobody can write to it through that descriptor.
    assert!(rustix::io::pwrite(&pool, &[1], 0).is_err());

    // A second one shares the same chunks.
    let (mut second, _) = connect(&bed.socket).await;
    ask(&mut second, "tiny", PROTOCOL_VERSION).await;
    let to_client::Kind::Held(again) = answer(&mut second).await else { panic!("refused") };
    assert_eq!((again.files, bed.holds()), (files, 2));

    let tiny = ModelName::new("tiny").unwrap();
    assert_eq!(bed.store.evict(&tiny).await.freed, ByteSize::ZERO, "held");
    drop((first, second));
    bed.until_let_go().await;
    assert_eq!(bed.store.evict(&tiny).await.freed, ByteSize(chunk_bytes));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_dies_while_it_waits_leaves_nothing() {
    let bed = Bed::new();
    let gate = Gate::default();
    let kind = FaultKind::Wait(gate.clone());
    bed.files.add(Fault { path: "model.safetensors".into(), bytes: 0..1, times: 1, kind });
    let (mut stream, _pool) = connect(&bed.socket).await;
    ask(&mut stream, "tiny", PROTOCOL_VERSION).await;
    let waiting = gate.clone();
    tokio::task::spawn_blocking(move || waiting.wait_for_arrivals(1)).await.unwrap();
    assert_eq!(bed.holds(), 1);
    // As the kernel does for a process that is killed.
    drop(stream);
    bed.until_let_go().await;
    gate.open();
    // The node serves the next one.
    let (mut stream, _pool) = connect(&bed.socket).await;
    ask(&mut stream, "tiny", PROTOCOL_VERSION).await;
    assert!(matches!(answer(&mut stream).await, to_client::Kind::Held(_)));
    drop(stream);
    bed.until_let_go().await;
    // The first load's read may still be on its way into its slot.
    let freed = async {
        while bed.store.stats().used > ByteSize::ZERO {
            bed.store.drop_all().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, freed).await.unwrap();
    bed.stop().await;
}

#[tokio::test]
async fn refusals_say_what_can_be_done() {
    let bed = Bed::new();
    for (model, protocol, reason, words) in [
        ("huge", PROTOCOL_VERSION, Refusal::UnknownModel, "huge"),
        ("no/such\u{0}name", PROTOCOL_VERSION, Refusal::UnknownModel, "name"),
        ("tiny", PROTOCOL_VERSION + 1, Refusal::Other, "version"),
    ] {
        let (mut stream, _) = connect(&bed.socket).await;
        ask(&mut stream, model, protocol).await;
        let to_client::Kind::Refused(refused) = answer(&mut stream).await else { panic!("held") };
        assert_eq!(refused.reason(), reason);
        assert!(refused.message.contains(words), "{}", refused.message);
    }
    assert_eq!(bed.holds(), 0);
    bed.stop().await;
}

#[tokio::test]
async fn the_nodes_end_is_the_connections_end() {
    let bed = Bed::new();
    let (mut stream, _pool) = connect(&bed.socket).await;
    ask(&mut stream, "tiny", PROTOCOL_VERSION).await;
    assert!(matches!(answer(&mut stream).await, to_client::Kind::Held(_)));
    let (store, socket) = (bed.store.clone(), bed.socket.clone());
    bed.stop().await;
    let mut reader = FrameReader::new(&mut stream);
    let ended = timeout(PATIENCE, reader.next::<ToClient>()).await.unwrap();
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
    assert_eq!(store.stats().residency.iter().map(|r| r.holds).sum::<usize>(), 0);
    assert!(!socket.exists());
}
