//! A node that is killed, and the one that comes after it: streams, weights and workers go on.
//!
//! The nodes that are killed are processes of their own; they are this executable. The last one is in this process.

use std::{
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::Signal;
use stoker_checkpoint::{Tensor, manifest::CHUNK_BYTES};
use stoker_device::{Device, SimulatedDevice, SimulatedOptions};
use stoker_node::{
    CatalogEntry, Keeper, KeeperConfig, MemoryConfig, Node, NodeConfig, NodeDevice, RuntimeDir, WorkerConfig,
    keeper::{Limits, Listener},
    open_store,
};
use stoker_proto::stream::{FailureCode, Finish};
use stoker_store::{Store, StoreConfig};
use stoker_types::{
    ByteSize, BytesPerSec, DType, DeviceId, Generation, InstanceId, StartFailure, StartOrder, Started,
    StopFailure, StopMode, Tier, WorkerState, WorkerStatus,
};
use stoker_worker::{StandIn, WorkerArgs, WorkerDevice, WorkerLimits};
use tokio::{io::AsyncBufReadExt as _, time::timeout};

use crate::support::{
    Models,
    client::{Client, PATIENCE},
    is_running, name, noise_model, signal, worker_command, workers,
};

/// What a model has of the pool.
const MODEL: ByteSize = ByteSize(2 * CHUNK_BYTES);

/// What the device has for a model.
const SLAB: ByteSize = ByteSize::mib(32);

// === what the child processes run ===

fn worker(device: WorkerDevice, orphan_grace: Duration) -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).log_internal_errors(false).init();
    let standin = Some(StandIn { step_time: Duration::from_millis(10) });
    let limits = WorkerLimits { orphan_grace, ..WorkerLimits::default() };
    stoker_worker::run(WorkerArgs { threads: 1, device, standin, limits })
}

#[test]
#[ignore = "a worker's process: a step takes 10 ms"]
fn cpu_worker() -> ExitCode {
    worker(WorkerDevice::Cpu, Duration::from_secs(60))
}

#[test]
#[ignore = "a worker's process: a step takes 10 ms"]
fn sim_worker() -> ExitCode {
    worker(WorkerDevice::Simulated, Duration::from_secs(60))
}

#[test]
#[ignore = "a worker's process: does not wait long for a node"]
fn impatient_worker() -> ExitCode {
    worker(WorkerDevice::Cpu, Duration::from_millis(300))
}

#[test]
#[ignore = "a keeper's process"]
fn keeper() {
    use std::os::fd::AsFd as _;
    let listener = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    stoker_node::keeper::serve(&Listener::inherited(listener).unwrap(), Limits::default()).unwrap();
}

#[tokio::test]
#[ignore = "a node's process"]
async fn cpu_node() {
    obey(Kind::Cpu).await;
}

#[tokio::test]
#[ignore = "a node's process"]
async fn impatient_node() {
    obey(Kind::Impatient).await;
}

#[tokio::test]
#[ignore = "a node's process"]
async fn sim_node() {
    obey(Kind::Simulated).await;
}

#[tokio::test]
#[ignore = "a node's process, whose device copies only so much"]
async fn stuck_node() {
    obey(Kind::Stuck).await;
}

/// Opens a node in the directory that the first line names; each line behind that names a model to be started.
async fn obey(kind: Kind) {
    let mut lines = tokio::io::BufReader::new(tokio::io::stdin()).lines();
    let dir = PathBuf::from(lines.next_line().await.unwrap().unwrap());
    let home = Home::open(&dir, kind).await;
    say(&format!("OPEN {}", home.keeper.pid().unwrap()));
    let mut number = 0;
    while let Some(model) = lines.next_line().await.unwrap() {
        if model == "?" {
            let pids = home.node.snapshot().workers.iter().map(|w| w.pid.to_string()).collect::<Vec<_>>();
            say(&format!("WORKERS {}", pids.join(" ")));
            continue;
        }
        number += 1;
        let (node, order) = (home.node.clone(), order(&model, number));
        // One may take for ever.
        tokio::spawn(async move {
            let started = node.start(order).await.unwrap();
            let pid = node.snapshot().workers.iter().find(|w| w.worker == started.worker).unwrap().pid;
            say(&format!("STARTED {pid} {}", started.socket.display()));
        });
    }
    // Killed, it says nothing to its workers; nor does it when this test goes wrong.
    std::process::abort();
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

// === the bed ===

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Cpu,
    Impatient,
    Simulated,
    /// A simulated device that stops copying in the middle.
    Stuck,
}

/// A node in this process, over what is left in a directory.
struct Home {
    node: Node,
    store: Store,
    keeper: Keeper,
    device: Option<Arc<SimulatedDevice>>,
}

/// A node that is a process of its own.
struct Doomed {
    child: Child,
    orders: ChildStdin,
    said: BufReader<ChildStdout>,
    /// Its keeper.
    keeper: u32,
}

fn order(model: &str, number: u64) -> StartOrder {
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

/// The models `a` and `b`, of two chunks each. Their files are made once.
fn models(dir: &Path) -> Models {
    let model = |model: &str| {
        let mut manifest = noise_model(dir, model, 2 * CHUNK_BYTES - 1024);
        let len = CHUNK_BYTES - 512;
        let tensor = |at: u64| Tensor {
            name: format!("noise.{at}"),
            role: None,
            dtype: DType::U8,
            shape: vec![len],
            file: 0,
            offset: at * len,
            len,
        };
        manifest.tensors = (0..2).map(tensor).collect();
        (name(model), CatalogEntry { dir: dir.to_owned(), manifest: Arc::new(manifest) })
    };
    Models(["a", "b"].map(model).into())
}

impl Home {
    async fn open(dir: &Path, kind: Kind) -> Self {
        let runtime = RuntimeDir::claim(&dir.join("run")).unwrap();
        runtime.meet(Duration::from_secs(1)).await;
        let worker = worker_command(match kind {
            Kind::Cpu => "survival::cpu_worker",
            Kind::Impatient => "survival::impatient_worker",
            Kind::Simulated | Kind::Stuck => "survival::sim_worker",
        });
        let keeper = KeeperConfig {
            socket: runtime.keeper_socket(),
            command: worker_command("survival::keeper"),
            workers: worker.clone(),
        };
        let models = models(dir);
        let opening = tokio::task::spawn_blocking(move || {
            let keeper = Keeper::open(keeper).unwrap();
            let left = keeper.recover(&runtime, Duration::from_millis(500)).unwrap();
            let config = StoreConfig::new(ByteSize(6 * CHUNK_BYTES));
            let store = open_store(config, left, &keeper, &runtime, &models).unwrap();
            (runtime, keeper, store, models)
        });
        let (runtime, keeper, store, models) = opening.await.unwrap();
        let workers = WorkerConfig { command: worker, ..workers("") };
        let device = matches!(kind, Kind::Simulated | Kind::Stuck).then(|| {
            let rate = Some(BytesPerSec(1e9));
            let memory = ByteSize::mib(160);
            let options = SimulatedOptions { ordinal: 0, memory, rate, real_time: false, exportable: true };
            Arc::new(SimulatedDevice::new(&options).unwrap())
        });
        if let (Some(device), Kind::Stuck) = (&device, kind) {
            device.pause_after(ByteSize(CHUNK_BYTES));
        }
        let devices = device.iter().map(|device| NodeDevice {
            name: "simulated:0".into(),
            device: Arc::clone(device) as Arc<dyn Device>,
            memory: None,
            work: ByteSize::ZERO,
            workers: workers.clone(),
        });
        let memory = MemoryConfig::new(ByteSize::gib(1));
        let config =
            NodeConfig { runtime, devices: devices.collect(), workers, memory, keeper: Some(keeper.clone()) };
        let node = Node::open(config, store.clone(), Arc::new(models)).unwrap();
        Self { node, store, keeper, device }
    }

    fn used(&self) -> ByteSize {
        self.device.as_ref().unwrap().memory().unwrap().slabs
    }

    /// Time for which the device's link was busy.
    fn copied(&self) -> Duration {
        self.device.as_ref().unwrap().modelled()
    }

    fn worker(&self, pid: u32) -> WorkerStatus {
        let workers = self.node.snapshot().workers;
        workers.iter().find(|w| w.pid == pid).unwrap_or_else(|| panic!("{pid} in {workers:#?}")).clone()
    }

    fn pid(&self, started: &Started) -> u32 {
        self.node.snapshot().workers.iter().find(|w| w.worker == started.worker).unwrap().pid
    }

    /// Stops in order; then no process of it is left.
    async fn end(self) {
        let pids: Vec<u32> = self.node.snapshot().workers.iter().map(|w| w.pid).collect();
        let keeper = self.keeper.pid().unwrap();
        self.node.shutdown(Duration::ZERO).await;
        assert!(pids.iter().all(|pid| !is_running(*pid)));
        gone(keeper).await;
    }
}

impl Doomed {
    fn open(dir: &Path, mode: &str) -> Self {
        let mut command = worker_command(mode);
        let exe = command.remove(0);
        let mut child = std::process::Command::new(exe)
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (orders, said) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut node = Self { child, orders, said, keeper: 0 };
        writeln!(node.orders, "{}", dir.display()).unwrap();
        node.keeper = node.hear("OPEN ").parse().unwrap();
        node
    }

    fn order(&mut self, model: &str) {
        writeln!(self.orders, "{model}").unwrap();
    }

    /// The process and the socket of the worker that has a model now.
    fn start(&mut self, model: &str) -> (u32, PathBuf) {
        self.order(model);
        let said = self.hear("STARTED ");
        let (pid, socket) = said.split_once(' ').unwrap();
        (pid.parse().unwrap(), socket.into())
    }

    fn workers(&mut self) -> Vec<u32> {
        self.order("?");
        self.hear("WORKERS").split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    fn hear(&mut self, what: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended before it said {what}");
            // The harness says something of its own on the first line.
            if let Some((_, rest)) = line.split_once(what) {
                return rest.trim_end().to_owned();
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

async fn gone(pid: u32) {
    let gone = async {
        while is_running(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("it lives for ever");
}

/// Reads until a stream has so many more tokens.
async fn more(client: &mut Client, stream: u64, tokens: usize) {
    let has = |client: &Client| client.outcomes.get(&stream).map_or(0, |outcome| outcome.ids.len());
    let wanted = has(client) + tokens;
    while has(client) < wanted {
        assert!(client.next().await, "the stream breaks off");
    }
}

/// What the stand-in says: it counts.
fn counted(from: u32, tokens: u32) -> Vec<u32> {
    (from..from + tokens).collect()
}

// === tests ===

#[tokio::test]
async fn streams_go_on_without_a_node_and_the_next_one_has_its_workers() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::cpu_node");
    let (pid, socket) = node.start("a");
    let mut client = Client::connect(&socket).await;
    client.generate(1, 1, &[40], 400).await;
    more(&mut client, 1, 3).await;
    node.kill();
    more(&mut client, 1, 5).await;
    // New ones, too, and new gateways.
    let mut other = Client::connect(&socket).await;
    other.generate(1, 1, &[7], 20).await;
    assert_eq!(other.collect(1).await[&1].ids, counted(7, 20));

    // A node that adopts it, does nothing, and is killed.
    Doomed::open(dir.path(), "survival::cpu_node").kill();
    more(&mut client, 1, 5).await;

    let home = Home::open(dir.path(), Kind::Cpu).await;
    let worker = home.worker(pid);
    assert_eq!((worker.state, worker.instance), (WorkerState::Serving, Some((InstanceId(1), name("a")))));
    let snapshot = home.node.snapshot();
    assert_eq!((snapshot.dram_used, snapshot.dram_mapped), (MODEL, MODEL));
    // Its order, said again.
    let again = home.node.start(order("a", 1)).await.unwrap();
    assert_eq!((home.pid(&again), &again.socket), (pid, &socket));
    assert_eq!(
        home.node.stop(InstanceId(1), StopMode::IfIdle).await,
        Err(StopFailure::Busy { instance: InstanceId(1), sequences: 1 })
    );
    assert_eq!(client.collect(1).await[&1].ids, counted(40, 400), "not a token is missing");
    assert_eq!(client.outcomes[&1].ends, [Finish::Length]);
    assert_eq!(home.store.stats().bytes_read, ByteSize::ZERO);

    // The accounts are as if it had been started here.
    home.node.stop(InstanceId(1), StopMode::IfIdle).await.unwrap();
    let snapshot = home.node.snapshot();
    assert_eq!((snapshot.dram_used, snapshot.dram_mapped), (MODEL, ByteSize::ZERO));
    assert_eq!(home.worker(pid).state, WorkerState::Idle);
    assert_eq!(
        home.node.start(order("a", 1)).await,
        Err(StartFailure::StaleOrder { given: Generation(1), seen: Generation(1) })
    );
    home.end().await;
}

#[tokio::test]
async fn an_order_of_the_next_node_goes_on_with_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::cpu_node");
    let (pid, socket) = node.start("b");
    let mut client = Client::connect(&socket).await;
    client.generate(1, 1, &[40], 200).await;
    more(&mut client, 1, 3).await;
    node.kill();

    let home = Home::open(dir.path(), Kind::Cpu).await;
    let started = home.node.start(order("b", 2)).await.unwrap();
    assert_eq!((home.pid(&started), &started.socket), (pid, &socket));
    assert!(started.timeline.bytes.iter().all(|bytes| bytes.tier == Tier::Dram));
    assert_eq!(home.worker(pid).instance, Some((InstanceId(2), name("b"))));
    assert_eq!(
        home.node.stop(InstanceId(1), StopMode::Now).await,
        Err(StopFailure::Unknown { instance: InstanceId(1) })
    );
    let mut other = Client::connect(&socket).await;
    other.generate(1, 1, &[7], 20).await;
    assert_eq!(other.collect(1).await[&1].failure(), FailureCode::WrongGeneration);
    other.generate(2, 2, &[7], 20).await;
    assert_eq!(other.collect(1).await[&2].ids, counted(7, 20));
    assert_eq!(client.collect(1).await[&1].ids, counted(40, 200), "begun under the old number");
    assert_eq!(home.store.stats().bytes_read, ByteSize::ZERO);

    // Another size than what is there: its worker gives way, and the weights stay.
    let mut larger = order("b", 3);
    larger.context = 8192;
    let second = home.node.start(larger).await.unwrap();
    assert_ne!(home.pid(&second), pid);
    assert_eq!(home.store.stats().bytes_read, ByteSize::ZERO);
    assert_eq!(home.node.snapshot().dram_mapped, MODEL, "once for both");
    for instance in [2, 3] {
        home.node.stop(InstanceId(instance), StopMode::IfIdle).await.unwrap();
    }
    assert_eq!(home.node.snapshot().dram_mapped, ByteSize::ZERO);
    home.end().await;
}

#[tokio::test]
async fn what_is_on_a_device_stays_there_and_is_known_to_the_next_node() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::sim_node");
    let (pid, socket) = node.start("a");
    let (dead, _) = node.start("b");
    let mut client = Client::connect(&socket).await;
    client.generate(1, 1, &[40], 300).await;
    more(&mut client, 1, 3).await;
    let keeper = node.keeper;
    // Asynchronous to the start: nobody waits for it.
    until(|| device_files(keeper) == 2).await;
    node.kill();
    signal(dead, Signal::KILL);
    more(&mut client, 1, 3).await;

    let home = Home::open(dir.path(), Kind::Simulated).await;
    assert_eq!(home.keeper.pid(), Some(keeper));
    let device = home.node.look().await.devices[0].clone();
    assert_eq!(device.resident, [name("a"), name("b")]);
    assert_eq!((device.weights, device.cached, home.used()), (SLAB + SLAB, SLAB, SLAB + SLAB), "{device:?}");
    assert_eq!(device.free, ByteSize::mib(160).saturating_sub(SLAB + SLAB));
    assert_eq!(home.worker(pid).instance, Some((InstanceId(1), name("a"))));

    for (model, number) in [("a", 11), ("b", 12)] {
        let started = home.node.start(order(model, number)).await.unwrap();
        assert_eq!(home.pid(&started) == pid, model == "a", "{model}");
        assert!(started.timeline.bytes.iter().all(|b| b.tier == Tier::Device), "{:?}", started.timeline);
        let mut other = Client::connect(&started.socket).await;
        other.generate(1, number, &[7], 5).await;
        assert_eq!(other.collect(1).await[&1].ids, counted(7, 5));
    }
    assert_eq!((home.copied(), home.store.stats().bytes_read), (Duration::ZERO, ByteSize::ZERO));
    assert_eq!(client.collect(1).await[&1].ids, counted(40, 300));

    // Let go of in order, they go; from the keeper, too.
    for instance in [11, 12] {
        home.node.stop(InstanceId(instance), StopMode::IfIdle).await.unwrap();
    }
    assert_eq!(home.used(), ByteSize::ZERO);
    until(|| device_files(keeper) == 0).await;
    home.end().await;
}

#[tokio::test]
async fn instances_that_nobody_asks_for_give_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::sim_node");
    let (idle, _) = node.start("a");
    let (busy, socket) = node.start("b");
    let keeper = node.keeper;
    until(|| device_files(keeper) == 2).await;
    let mut client = Client::connect(&socket).await;
    client.generate(1, 2, &[40], 100_000).await;
    more(&mut client, 1, 3).await;
    node.kill();

    let home = Home::open(dir.path(), Kind::Simulated).await;
    home.device.as_ref().unwrap().hold_elsewhere(ByteSize::mib(30));
    // No third fits beside the two; one more of the same does, when nobody asks for the idle one.
    let mut large = order("b", 21);
    large.kv_bytes = ByteSize::mib(20);
    let started = home.node.start(large).await.unwrap();
    assert!(home.pid(&started) != busy);
    assert_eq!(home.worker(busy).instance, Some((InstanceId(2), name("b"))), "its stream goes on");
    more(&mut client, 1, 3).await;
    let is_there =
        home.node.snapshot().workers.iter().any(|w| w.instance == Some((InstanceId(1), name("a"))));
    assert!(!is_there && is_running(idle), "it made room");
    assert_eq!(home.used(), SLAB);
    home.end().await;
}

#[tokio::test]
async fn a_load_that_loses_its_node_leaves_a_worker_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::stuck_node");
    node.order("a");
    let keeper = node.keeper;
    // A worker has the slab's descriptors: it waits for the weights.
    let worker = loop {
        match node.workers().into_iter().find(|pid| device_files(*pid) > 0) {
            Some(pid) => break pid,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    node.kill();

    let home = Home::open(dir.path(), Kind::Simulated).await;
    assert_eq!(home.worker(worker).state, WorkerState::Idle, "nothing of it is left");
    assert_eq!((home.used(), device_files(keeper), device_files(worker)), (ByteSize::ZERO, 0, 0));
    let started = home.node.start(order("a", 5)).await.unwrap();
    assert!(home.copied() > Duration::ZERO, "from its beginning");
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, 5, &[7], 5).await;
    assert_eq!(client.collect(1).await[&1].ids, counted(7, 5));
    home.end().await;
}

#[tokio::test]
async fn a_model_that_is_another_by_now_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::cpu_node");
    let (pid, socket) = node.start("a");
    let mut client = Client::connect(&socket).await;
    client.generate(1, 1, &[40], 300).await;
    more(&mut client, 1, 3).await;
    node.kill();
    let file = OpenOptions::new().write(true).open(dir.path().join("a")).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    file.set_modified(before + Duration::from_secs(1)).unwrap();

    let home = Home::open(dir.path(), Kind::Cpu).await;
    let started = home.node.start(order("a", 2)).await.unwrap();
    assert_ne!(home.pid(&started), pid);
    assert_eq!(
        home.store.stats().bytes_read,
        ByteSize(2 * CHUNK_BYTES - 1024),
        "read anew, to another place"
    );
    client.generate(2, 1, &[40], 5).await;
    let outcomes = client.collect(2).await;
    assert_eq!(outcomes[&2].failure(), FailureCode::Unloaded, "no new stream");
    assert_eq!(outcomes[&1].ids, counted(40, 300), "the one that ran was let finish");
    gone(pid).await;
    home.end().await;
}

#[tokio::test]
async fn a_worker_that_hangs_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::cpu_node");
    let (hangs, _) = node.start("a");
    let (works, _) = node.start("b");
    node.kill();
    // After that: the kernel hangs up on stopped processes whose parent dies.
    signal(hangs, Signal::STOP);
    let home = Home::open(dir.path(), Kind::Cpu).await;
    gone(hangs).await;
    assert_eq!(home.worker(works).instance, Some((InstanceId(2), name("b"))));
    let started = home.node.start(order("a", 3)).await.unwrap();
    assert_ne!(home.pid(&started), hangs);
    assert_eq!(home.store.stats().bytes_read, ByteSize::ZERO);
    home.end().await;
}

#[tokio::test]
async fn workers_wait_for_a_node_only_so_long_and_then_let_their_streams_finish() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Doomed::open(dir.path(), "survival::impatient_node");
    let (pid, socket) = node.start("a");
    let (idle, _) = node.start("b");
    let mut client = Client::connect(&socket).await;
    client.generate(1, 1, &[1], 150).await;
    more(&mut client, 1, 3).await;
    node.kill();
    gone(idle).await;
    client.generate(2, 1, &[1], 5).await;
    let outcomes = client.collect(2).await;
    assert_eq!(outcomes[&1].ids, counted(1, 150), "the stream goes on to its end");
    assert_eq!(outcomes[&2].failure(), FailureCode::Unloaded);
    gone(pid).await;
    let home = Home::open(dir.path(), Kind::Cpu).await;
    assert!(home.node.snapshot().workers.iter().all(|worker| worker.instance.is_none()));
    home.end().await;
}

/// Waits for what happens in another process.
async fn until(is: impl Fn() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("in vain");
}

/// Files of simulated devices' memory that a process has open or mapped.
fn device_files(pid: u32) -> usize {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let open = open.filter(|link| link.to_string_lossy().contains("stoker-device")).count();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    open + maps.lines().filter(|line| line.contains("stoker-device")).count()
}
