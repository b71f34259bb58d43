//! A node that serves from devices: simulated ones, whose workers are this executable, with the engine for processors.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use rustix::process::Signal;
use stoker_checkpoint::{Source, Tensor};
use stoker_device::{Device, DeviceError, SimulatedDevice, SimulatedOptions};
use stoker_node::{CatalogEntry, ClientSocket, MemoryConfig, NodeDevice, WorkerConfig};
use stoker_proto::{
    DescriptorReader, FrameReader, FrameWriter, PROTOCOL_VERSION,
    share::{self, ToClient, to_client},
    stream::{FailureCode, Finish},
};
use stoker_types::{
    ByteSize, BytesPerSec, DType, DeviceId, InstanceId, NodeEvent, Phase, StartFailure, StopFailure,
    StopMode, Tier, TierBytes, WorkerState,
};
use stoker_worker::{StandIn, WorkerArgs, WorkerDevice};
use tokio::{net::UnixStream, time::timeout};

use crate::support::{
    Bed, Models,
    client::{Client, PATIENCE},
    idle, name, noise_model, one_worker, signal, worker_lost, workers,
};

const PAGE: u64 = 2 << 20;

// === what the child processes run ===

fn worker(device: WorkerDevice, standin: Option<StandIn>) -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).log_internal_errors(false).init();
    stoker_worker::run(WorkerArgs { threads: 1, device, standin, ..WorkerArgs::default() })
}

#[test]
#[ignore = "a worker's process, with a real engine"]
fn real_worker() -> ExitCode {
    worker(WorkerDevice::Simulated, None)
}

#[test]
#[ignore = "a worker's process: a step takes 10 ms"]
fn slow_worker() -> ExitCode {
    worker(WorkerDevice::Simulated, Some(StandIn { step_time: Duration::from_millis(10) }))
}

#[test]
#[ignore = "a worker's process, for a GPU"]
fn cuda_worker() -> ExitCode {
    worker(WorkerDevice::Cuda(0), None)
}

/// A worker that takes a model before its weights are there, as one of a GPU does: it says what it is told.
#[tokio::test]
#[ignore = "a worker's process"]
async fn eager_worker() {
    use std::{io::Read, os::fd::AsFd};
    use stoker_proto::{
        FrameReader, FrameWriter, PROTOCOL_VERSION,
        control::{FromWorker, Hello, Loaded, Pong, ToWorker, Unloaded, from_worker, to_worker},
    };
    let mut control =
        std::os::unix::net::UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    control.read_exact(&mut [0]).unwrap();
    control.set_nonblocking(true).unwrap();
    let (read, write) = tokio::net::UnixStream::from_std(control).unwrap().into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let (protocol, pid, device) = (PROTOCOL_VERSION, std::process::id(), "eager".into());
    let hello = Hello { protocol, pid, device, ..Hello::default() };
    let mut say = Some(from_worker::Kind::Hello(hello));
    loop {
        if let Some(kind) = say.take() {
            writer.send(&FromWorker { kind: Some(kind) }).await.unwrap();
        }
        let Ok(Some(ToWorker { kind: Some(kind) })) = reader.next().await else { return };
        say = match kind {
            to_worker::Kind::Load(load) => {
                let loaded = Loaded { instance: load.instance, device_bytes: PAGE, ..Loaded::default() };
                Some(from_worker::Kind::Loaded(loaded))
            }
            to_worker::Kind::Landed(landed) => {
                eprintln!("LANDED {} {:?}", landed.instance, landed.error);
                None
            }
            to_worker::Kind::Unload(unload) => {
                Some(from_worker::Kind::Unloaded(Unloaded { instance: unload.instance }))
            }
            to_worker::Kind::Ping(ping) => Some(from_worker::Kind::Pong(Pong {
                number: ping.number,
                device_bytes: PAGE,
                ..Pong::default()
            })),
            to_worker::Kind::Home(_) => None,
            // It outlives no node.
            to_worker::Kind::Shutdown(_)
            | to_worker::Kind::Yield(_)
            | to_worker::Kind::Resume(_)
            | to_worker::Kind::Rename(_) => return,
        };
    }
}

// === tests ===

struct Sim {
    bed: Bed,
    devices: Vec<Arc<SimulatedDevice>>,
}

fn device(ordinal: u32, memory: ByteSize, rate: Option<BytesPerSec>) -> Arc<SimulatedDevice> {
    let options = SimulatedOptions { ordinal, memory, rate, real_time: false, exportable: true };
    Arc::new(SimulatedDevice::new(&options).unwrap())
}

fn node_device(device: &Arc<SimulatedDevice>, workers: WorkerConfig) -> NodeDevice {
    let ordinal = device.info().ordinal;
    let device: Arc<dyn Device> = Arc::clone(device) as Arc<dyn Device>;
    NodeDevice { name: format!("simulated:{ordinal}"), device, memory: None, work: ByteSize::ZERO, workers }
}

/// The tiny models that the repository has.
fn tiny_models() -> Models {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let model = |kind: &str| {
        let source = Source { uri: kind.into(), revision: None };
        let manifest = stoker_checkpoint::index(&data.join(kind), source).unwrap();
        (name(kind), CatalogEntry { dir: data.join(kind), manifest: Arc::new(manifest) })
    };
    Models(KINDS.map(model).into())
}

const KINDS: [&str; 4] = ["tiny-llama", "tiny-llama-bf16-sharded", "tiny-llama3", "tiny-mistral"];

impl Sim {
    fn over(devices: Vec<Arc<SimulatedDevice>>, workers: WorkerConfig, models: Models) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::in_dir(devices, workers, models, dir)
    }

    fn in_dir(
        devices: Vec<Arc<SimulatedDevice>>,
        workers: WorkerConfig,
        models: Models,
        dir: tempfile::TempDir,
    ) -> Self {
        let nodes = devices.iter().map(|device| node_device(device, workers.clone())).collect();
        let memory = MemoryConfig::new(ByteSize::ZERO);
        let bed = Bed::on_devices(workers, nodes, dir, models, ByteSize::mib(64), memory);
        Self { bed, devices }
    }

    /// One device of 16 MiB (of which a quarter is others'), and models of 3 MB of noise.
    fn noise(workers: WorkerConfig, rate: Option<BytesPerSec>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = |model: &str| {
            let mut manifest = noise_model(dir.path(), model, NOISE);
            let tensor = |at: u64| Tensor {
                name: format!("noise.{at}"),
                role: None,
                dtype: DType::U8,
                shape: vec![NOISE / 3],
                file: 0,
                offset: at * (NOISE / 3),
                len: NOISE / 3,
            };
            manifest.tensors = (0..3).map(tensor).collect();
            (name(model), CatalogEntry { dir: dir.path().to_owned(), manifest: Arc::new(manifest) })
        };
        let models = Models(HashMap::from(["a", "b", "c", "d"].map(model)));
        Self::in_dir(vec![device(0, ByteSize::mib(16), rate)], workers, models, dir)
    }

    fn used(&self, device: usize) -> ByteSize {
        self.devices[device].memory().unwrap().slabs
    }

    async fn start(&self, model: &str) -> Result<stoker_types::Started, StartFailure> {
        self.bed.node.start(self.order(model)).await
    }

    fn order(&self, model: &str) -> stoker_types::StartOrder {
        let mut order = self.bed.order(model);
        (order.context, order.kv_bytes) = (64, ByteSize(PAGE / 2));
        order
    }

    /// All of the device's memory is back.
    async fn emptied(&self) {
        let empty = async {
            while self.devices.iter().any(|device| device.memory().unwrap().slabs > ByteSize::ZERO) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, empty).await.expect("device memory came back");
    }
}

/// Bytes of a noise model; each of its tensors is a third.
const NOISE: u64 = 3 * 1_000_003;

async fn check_reference(kind: &str, client: &mut Client, generation: u64) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let reference: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data.join(kind).join("reference.json")).unwrap()).unwrap();
    let ids = |value: &serde_json::Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
    let cases = reference["cases"].as_array().unwrap();
    let fitting = cases.iter().filter(|c| ids(&c["prompt_ids"]).len() + ids(&c["greedy_ids"]).len() <= 64);
    let mut compared = 0;
    for (stream, case) in (0..).zip(fitting) {
        let (prompt, greedy) = (ids(&case["prompt_ids"]), ids(&case["greedy_ids"]));
        client.generate(stream, generation, &prompt, u32::try_from(greedy.len()).unwrap()).await;
        assert_eq!(client.collect(1).await[&stream].ids, greedy, "{kind}");
        compared += 1;
    }
    assert!(compared > 0);
}

#[tokio::test]
async fn a_model_on_a_device_answers_as_its_reference() {
    let sim = Sim::over(
        vec![device(0, ByteSize::mib(64), None)],
        one_worker("devices::real_worker"),
        tiny_models(),
    );
    for kind in KINDS.iter().chain(&KINDS) {
        let order = sim.order(kind);
        let started = sim.bed.node.start(order.clone()).await.unwrap();
        assert!(started.timeline.actual(Phase::DeviceCopy).is_some());
        let snapshot = sim.bed.node.look().await;
        assert_eq!(snapshot.devices[0].resident, [name(kind)]);
        assert_eq!((snapshot.devices[0].weights, snapshot.dram_mapped), (sim.used(0), ByteSize::ZERO));
        assert_eq!(snapshot.workers[0].device, "simulated:0");
        let mut client = Client::connect(&started.socket).await;
        check_reference(kind, &mut client, order.generation.0).await;
        sim.bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
        assert_eq!(sim.used(0), ByteSize::ZERO, "the model has left the device");
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", sim.bed.pid(started.worker))).unwrap();
        assert!(!maps.contains("stoker-device"), "nothing of it stays mapped");
    }
    assert!(sim.bed.node.snapshot().dram_used > ByteSize::ZERO, "it stays in memory as cache");
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn another_worker_takes_over_what_a_killed_one_had_on_the_device() {
    let rate = Some(BytesPerSec(1e9));
    let sim =
        Sim::over(vec![device(0, ByteSize::mib(64), rate)], workers("devices::real_worker"), tiny_models());
    sim.bed.until("two workers are ready", |s| idle(s) == 2).await;
    let mut events = sim.bed.node.events();
    let started = sim.start("tiny-llama3").await.unwrap();
    assert!(started.timeline.bytes.iter().all(|b| b.tier != Tier::Device));
    let (copied, used) = (sim.devices[0].modelled(), sim.used(0));
    assert!(copied > Duration::ZERO);

    signal(sim.bed.pid(started.worker), Signal::KILL);
    worker_lost(&mut events).await;
    let order = sim.order("tiny-llama3");
    let again = sim.bed.node.start(order.clone()).await.unwrap();
    assert_ne!(again.worker, started.worker);
    assert_eq!(sim.devices[0].modelled(), copied, "not a byte was copied");
    assert_eq!((sim.used(0), again.timeline.actual(Phase::SsdRead)), (used, None));
    assert!(
        matches!(&again.timeline.bytes[..], [TierBytes { tier: Tier::Device, .. }]),
        "{:?}",
        again.timeline
    );
    let mut client = Client::connect(&again.socket).await;
    check_reference("tiny-llama3", &mut client, order.generation.0).await;

    // Let go of in order, it goes; so does one that was there for nobody.
    sim.bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
    assert_eq!(sim.used(0), ByteSize::ZERO);
    let started = sim.start("tiny-llama3").await.unwrap();
    signal(sim.bed.pid(started.worker), Signal::KILL);
    worker_lost(&mut events).await;
    let state = &sim.bed.node.look().await.devices[0];
    assert_eq!((state.cached, state.weights), (used, used));
    sim.bed.node.evict(&name("tiny-llama3")).await;
    assert_eq!(sim.used(0), ByteSize::ZERO);
    sim.bed.node.shutdown(Duration::ZERO).await;
}

/// A program's connection, and the descriptors of the copy that it was given; or why it wasn't.
async fn program(
    socket: &Path,
    model: &str,
    may_write: bool,
) -> Result<(UnixStream, Vec<OwnedFd>), share::Refused> {
    let path = socket.to_owned();
    let connecting = tokio::task::spawn_blocking(move || {
        let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        share::receive_pool(&stream).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    });
    let mut stream = UnixStream::from_std(connecting.await.unwrap()).unwrap();
    let (read, write) = stream.split();
    let hold = share::Hold {
        protocol: PROTOCOL_VERSION,
        model: model.to_owned(),
        device: "SIM-0".to_owned(),
        may_write,
    };
    FrameWriter::new(write).send(&hold).await.unwrap();
    let mut reader = FrameReader::new(DescriptorReader::new(read));
    let message: ToClient = timeout(PATIENCE, reader.next()).await.unwrap().unwrap().unwrap();
    match message.kind.unwrap() {
        to_client::Kind::Held(held) => {
            let granules = usize::try_from(held.slab.unwrap().granules).unwrap();
            let granules = reader.inner_mut().take(granules).unwrap();
            Ok((stream, granules))
        }
        to_client::Kind::Refused(refused) => Err(refused),
        to_client::Kind::Progress(progress) => panic!("{progress:?}"),
    }
}

/// As an operation in place would.
fn write_to(granule: &OwnedFd) {
    let path = format!("/proc/self/fd/{}", granule.as_raw_fd());
    let file = std::fs::File::options().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 64], 4096).unwrap();
}

#[tokio::test]
async fn what_a_program_does_to_a_copy_changes_nothing_that_others_compute() {
    const MODEL: &str = "tiny-llama";
    let rate = Some(BytesPerSec(1e9));
    let sim = Sim::over(
        vec![device(0, ByteSize::mib(64), rate)],
        one_worker("devices::real_worker"),
        tiny_models(),
    );
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("clients.sock");
    let clients = ClientSocket::listen(&socket, sim.bed.node.clone()).unwrap();
    let copied = || sim.devices[0].modelled();
    let compute = async || {
        let order = sim.order(MODEL);
        let started = sim.bed.node.start(order.clone()).await.unwrap();
        let mut client = Client::connect(&started.socket).await;
        check_reference(MODEL, &mut client, order.generation.0).await;
        order
    };
    let stop = async |order: stoker_types::StartOrder| {
        sim.bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
    };
    let let_go = async || {
        sim.bed.until("the program's hold is gone", |s| s.devices[0].cached > ByteSize::ZERO).await;
    };

    // One that reads: it and an instance have one copy.
    let reader = program(&socket, MODEL, false).await.unwrap();
    let (once, slab) = (copied(), sim.used(0));
    let order = compute().await;
    assert_eq!((copied(), sim.used(0)), (once, slab));
    let refused = program(&socket, MODEL, true).await.unwrap_err();
    assert_eq!(refused.reason(), share::Refusal::Unsupported, "{refused:?}");
    stop(order).await;
    sim.bed.node.evict(&name(MODEL)).await;
    assert_eq!(sim.used(0), slab, "a program has it");
    drop(reader);
    let_go().await;
    stop(compute().await).await;
    assert_eq!(
        (copied(), sim.used(0)),
        (once, ByteSize::ZERO),
        "it was as before, and is gone with its instance"
    );

    // One that may write: what is computed meanwhile is computed from another copy.
    let writer = program(&socket, MODEL, true).await.unwrap();
    write_to(&writer.1[0]);
    let order = compute().await;
    assert_eq!((copied(), sim.used(0)), (3 * once, slab + slab));
    drop(writer);
    while sim.used(0) > slab {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    stop(order).await;

    // One that has written, however it did that.
    let (stream, granules) = program(&socket, MODEL, false).await.unwrap();
    write_to(&granules[0]);
    drop((stream, granules));
    let_go().await;
    let before = copied();
    stop(compute().await).await;
    assert_eq!(copied(), before + once, "loaded anew");
    sim.emptied().await;
    clients.stop().await;
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn instances_of_a_model_share_its_weights_and_devices_dont() {
    let two = vec![device(0, ByteSize::mib(64), None), device(1, ByteSize::mib(64), None)];
    let sim = Sim::over(two, workers("devices::real_worker"), tiny_models());
    let mut on = Vec::new();
    for device in [0, 0, 1] {
        let mut order = sim.order("tiny-llama");
        order.device = DeviceId(device);
        let started = sim.bed.node.start(order.clone()).await.unwrap();
        let mut client = Client::connect(&started.socket).await;
        check_reference("tiny-llama", &mut client, order.generation.0).await;
        on.push(order.instance);
    }
    assert_eq!((sim.used(0), sim.used(1)), (ByteSize(PAGE), ByteSize(PAGE)));
    sim.bed.node.stop(on[0], StopMode::IfIdle).await.unwrap();
    assert_eq!(sim.used(0), ByteSize(PAGE), "the other has it");
    sim.bed.node.stop(on[1], StopMode::IfIdle).await.unwrap();
    assert_eq!((sim.used(0), sim.used(1)), (ByteSize::ZERO, ByteSize(PAGE)));
    let mut order = sim.order("tiny-llama");
    order.device = DeviceId(2);
    let failure = sim.bed.node.start(order).await.unwrap_err();
    assert!(failure.to_string().contains("no device d2 on this server"), "{failure}");
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_delivery_that_fails_leaves_nothing_and_the_next_one_works() {
    let sim = Sim::noise(one_worker("devices::slow_worker"), None);
    let fault = DeviceError::Simulated { device: 0, what: "lost a copy" };
    sim.devices[0].fail_after(ByteSize(NOISE / 2), fault);
    let failure = sim.start("a").await.unwrap_err();
    assert!(failure.to_string().contains("lost a copy"), "{failure}");
    assert!(failure.is_transient(), "{failure:?}");
    sim.emptied().await;
    sim.bed.until("its worker is ready again", |s| idle(s) == 1).await;

    // A file that isn't what it was.
    let path = sim.bed.dir.path().join("b");
    std::fs::write(&path, vec![7; usize::try_from(NOISE - 1).unwrap()]).unwrap();
    let failure = sim.start("b").await.unwrap_err();
    assert!(matches!(failure, StartFailure::Changed { .. }), "{failure}");
    sim.emptied().await;

    let order = sim.order("a");
    let started = sim.bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1, 2, 40], 3).await;
    assert_eq!(client.collect(1).await[&1].ends, [Finish::Length]);
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_device_that_is_gone_fails_its_starts_and_no_other_devices() {
    let two = vec![device(0, ByteSize::mib(64), None), device(1, ByteSize::mib(64), None)];
    let sim = Sim::over(two, workers("devices::real_worker"), tiny_models());
    sim.devices[0].fail_after(
        ByteSize(1000),
        DeviceError::Lost {
            device: 0,
            call: "copy",
            name: "CUDA_ERROR_DEVICE_UNAVAILABLE".into(),
            words: "fell off the bus".into(),
        },
    );
    for _ in 0..2 {
        let failure = sim.start("tiny-llama").await.unwrap_err();
        assert!(failure.to_string().contains("device 0 is lost"), "{failure}");
        sim.emptied().await;
    }
    let mut order = sim.order("tiny-llama");
    order.device = DeviceId(1);
    let started = sim.bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    check_reference("tiny-llama", &mut client, order.generation.0).await;
    sim.bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
    sim.emptied().await;
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_start_that_is_given_up_gives_the_devices_memory_back() {
    let sim =
        Sim::over(vec![device(0, ByteSize::mib(64), None)], workers("devices::real_worker"), tiny_models());
    sim.devices[0].pause_after(ByteSize::ZERO);
    sim.bed.until("two workers are ready", |s| idle(s) == 2).await;
    let (first, second) = (sim.order("tiny-llama"), sim.order("tiny-llama"));
    let starting = tokio::spawn({
        let (node, order) = (sim.bed.node.clone(), first.clone());
        async move { node.start(order).await }
    });
    let joining = tokio::spawn({
        let (node, order) = (sim.bed.node.clone(), second.clone());
        async move { node.start(order).await }
    });
    let loading = |s: &stoker_types::NodeSnapshot| {
        s.workers.iter().filter(|w| w.state == WorkerState::Loading).count() == 2
    };
    sim.bed.until("both wait for the one delivery", loading).await;
    assert_eq!(sim.used(0), ByteSize(PAGE));
    let stopping = tokio::spawn({
        let node = sim.bed.node.clone();
        async move { node.stop(first.instance, StopMode::Now).await }
    });
    joining.abort();
    // Copies that the device has come to their end before anybody else gets the memory.
    tokio::task::yield_now().await;
    assert_eq!(sim.used(0), ByteSize(PAGE));
    sim.devices[0].resume();
    stopping.await.unwrap().unwrap();
    let failure = starting.await.unwrap().unwrap_err();
    assert!(matches!(failure, StartFailure::Cancelled { .. }), "{failure}");
    sim.emptied().await;
    sim.bed.until("all workers are ready again", |s| idle(s) == s.workers.len()).await;
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn room_on_a_device_is_found_or_the_error_says_who_has_it() {
    // Twelve MiB for instances; each takes four of weights and one of KV cache.
    let sim = Sim::noise(workers("devices::slow_worker"), None);
    let mut events = sim.bed.node.events();
    let a = sim.order("a");
    sim.bed.node.start(a.clone()).await.unwrap();
    let b = sim.start("b").await.unwrap();
    let failure = sim.start("c").await.unwrap_err();
    let StartFailure::OutOfMemory { needed, free, detail, .. } = &failure else { panic!("{failure}") };
    assert_eq!((*needed, *free), (ByteSize::mib(5), ByteSize::mib(2)), "{detail}");
    assert!(detail.contains("weights 4.0 MiB + KV 1.0 MiB for a context of 64"), "{detail}");

    // What a dead worker left goes first.
    signal(sim.bed.pid(b.worker), Signal::KILL);
    worker_lost(&mut events).await;
    assert_eq!(sim.used(0), ByteSize::mib(8));
    let c = sim.order("c");
    sim.bed.node.start(c.clone()).await.unwrap();
    let state = sim.bed.node.look().await.devices[0].clone();
    assert_eq!(state.resident, [name("a"), name("c")]);
    assert_eq!((state.cached, state.budget.effective), (ByteSize::ZERO, ByteSize::mib(12)));

    // Another program takes memory.
    sim.bed.node.stop(c.instance, StopMode::IfIdle).await.unwrap();
    sim.devices[0].hold_elsewhere(ByteSize::mib(6));
    let failure = sim.start("c").await.unwrap_err();
    let StartFailure::OutOfMemory { needed, free, detail, .. } = &failure else { panic!("{failure}") };
    assert_eq!((*needed, *free), (ByteSize::mib(5), ByteSize::mib(1)), "{detail}");
    assert!(detail.contains("instances may take 6.0 MiB (12.0 MiB configured)"), "{detail}");
    sim.devices[0].hold_elsewhere(ByteSize::ZERO);
    sim.start("c").await.unwrap();
    sim.bed.node.shutdown(Duration::ZERO).await;
    assert_eq!(sim.used(0), ByteSize::ZERO, "nothing is left on it");
}

#[tokio::test]
async fn a_worker_may_serve_before_the_weights_are_there() {
    let sim = Sim::noise(one_worker("devices::eager_worker"), None);
    let mut events = sim.bed.node.events();
    sim.devices[0].pause_after(ByteSize::ZERO);
    let first = sim.order("a");
    let started = sim.bed.node.start(first.clone()).await.unwrap();
    let state = sim.bed.node.look().await.devices[0].clone();
    assert_eq!((state.resident.len(), state.weights), (0, ByteSize::mib(4)), "on their way");
    // What the worker has taken of the device counts as room for instances.
    assert_eq!(state.budget.effective, ByteSize::mib(12));
    sim.devices[0].resume();
    let landed = instance_event(&mut events).await;
    let NodeEvent::InstanceLanded { instance, timeline, .. } = landed else { panic!("{landed:?}") };
    assert_eq!(instance, first.instance);
    assert!(timeline.actual(Phase::DeviceCopy).is_some() && timeline.actual(Phase::SsdRead).is_some());
    assert_eq!(sim.bed.node.snapshot().devices[0].resident, [name("a")]);
    sim.bed.node.stop(first.instance, StopMode::Now).await.unwrap();

    // They don't arrive: whoever is served is told, and everything goes.
    sim.devices[0].pause_after(ByteSize::ZERO);
    let second = sim.order("b");
    let again = sim.bed.node.start(second.clone()).await.unwrap();
    assert_eq!(again.worker, started.worker);
    sim.devices[0].fail_after(ByteSize::ZERO, DeviceError::Simulated { device: 0, what: "lost a copy" });
    sim.devices[0].resume();
    let lost = instance_event(&mut events).await;
    let NodeEvent::InstanceLost { instance, failure } = lost else { panic!("{lost:?}") };
    assert_eq!(instance, second.instance);
    assert!(failure.to_string().contains("lost a copy"), "{failure}");
    sim.emptied().await;
    sim.bed.until("its worker is ready again", |s| idle(s) == 1).await;
    assert_eq!(
        sim.bed.node.stop(second.instance, StopMode::Now).await,
        Err(StopFailure::Unknown { instance: second.instance })
    );
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn what_is_on_its_way_for_nobody_arrives_for_the_next_or_gives_way() {
    let sim = Sim::noise(workers("devices::slow_worker"), None);
    sim.bed.until("two workers are ready", |s| idle(s) == 2).await;
    sim.start("a").await.unwrap();
    let loading = |s: &stoker_types::NodeSnapshot| s.workers.iter().any(|w| w.state == WorkerState::Loading);
    let killed_while_loading = async || {
        sim.devices[0].pause_after(ByteSize::ZERO);
        let (node, order) = (sim.bed.node.clone(), sim.order("b"));
        let starting = tokio::spawn(async move { node.start(order).await });
        let snapshot = sim.bed.until("b is loading", loading).await;
        let worker = snapshot.workers.iter().find(|w| w.state == WorkerState::Loading).unwrap();
        signal(worker.pid, Signal::KILL);
        let failure = starting.await.unwrap().unwrap_err();
        assert!(matches!(failure, StartFailure::Worker { .. }), "{failure}");
        assert_eq!(sim.bed.node.snapshot().devices[0].cached, ByteSize::mib(4), "the delivery goes on");
    };
    killed_while_loading().await;
    let (node, order) = (sim.bed.node.clone(), sim.order("b"));
    let joining = tokio::spawn(async move { node.start(order).await });
    sim.bed.until("another worker waits for it", loading).await;
    sim.devices[0].resume();
    let joined = joining.await.unwrap().unwrap();
    assert_eq!(joined.timeline.actual(Phase::SsdRead), None, "{joined:?}");
    let b = sim.bed.node.snapshot().workers.into_iter().find(|w| w.worker == joined.worker).unwrap();
    sim.bed.node.stop(b.instance.unwrap().0, StopMode::Now).await.unwrap();

    killed_while_loading().await;
    let (node, order) = (sim.bed.node.clone(), sim.order("c"));
    let starting = tokio::spawn(async move { node.start(order).await });
    let given_way = |s: &stoker_types::NodeSnapshot| s.devices[0].cached == ByteSize::ZERO;
    sim.bed.until("b makes room", given_way).await;
    // Nobody has its memory before the copies into it have ended.
    assert!(!starting.is_finished());
    sim.devices[0].resume();
    starting.await.unwrap().unwrap();
    assert_eq!(sim.bed.node.snapshot().devices[0].resident, [name("a"), name("c")]);
    sim.bed.node.shutdown(Duration::ZERO).await;
}

/// The next that is said of an instance.
async fn instance_event(events: &mut tokio::sync::broadcast::Receiver<NodeEvent>) -> NodeEvent {
    loop {
        let event = timeout(PATIENCE, events.recv()).await.expect("nothing was said").unwrap();
        if matches!(event, NodeEvent::InstanceLanded { .. } | NodeEvent::InstanceLost { .. }) {
            return event;
        }
    }
}

#[tokio::test]
async fn a_gpu_that_is_not_there_is_said_not_to_be() {
    if stoker_device::cuda_devices().is_ok() {
        return;
    }
    let sim = Sim::noise(one_worker("devices::cuda_worker"), None);
    let failure = sim.start("a").await.unwrap_err();
    assert!(matches!(failure, StartFailure::Worker { .. }), "{failure}");
    assert!(failure.to_string().contains("install the NVIDIA driver"), "{failure}");
    sim.emptied().await;
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn random_orders_deaths_and_faults_leak_nothing() {
    use rand::{RngExt, SeedableRng};
    let sim = Sim::noise(
        WorkerConfig { workers_max: NonZeroU32::new(5).unwrap(), ..workers("devices::slow_worker") },
        None,
    );
    let mut rng = rand::rngs::StdRng::seed_from_u64(11);
    let mut running: Vec<InstanceId> = Vec::new();
    for _ in 0..150 {
        match rng.random_range(0..10) {
            0..5 => {
                let order = sim.order(["a", "b", "c", "d"][rng.random_range(0..4)]);
                if rng.random_bool(0.1) {
                    let fault = DeviceError::Simulated { device: 0, what: "lost a copy" };
                    sim.devices[0].fail_after(ByteSize(rng.random_range(0..NOISE)), fault);
                }
                let patience = if rng.random_bool(0.3) {
                    Duration::from_micros(rng.random_range(0..8000))
                } else {
                    PATIENCE
                };
                match timeout(patience, sim.bed.node.start(order.clone())).await {
                    Ok(Ok(_)) => running.push(order.instance),
                    Err(_)
                    | Ok(Err(
                        StartFailure::OutOfMemory { .. }
                        | StartFailure::Worker { .. }
                        | StartFailure::Read { .. },
                    )) => {}
                    Ok(Err(other)) => panic!("{other}"),
                }
            }
            5..8 if !running.is_empty() => {
                let instance = running.swap_remove(rng.random_range(0..running.len()));
                let mode = if rng.random_bool(0.5) { StopMode::Now } else { StopMode::IfIdle };
                let _ = sim.bed.node.stop(instance, mode).await;
            }
            8 => {
                let workers = sim.bed.node.snapshot().workers;
                let any = rng.random_range(0..workers.len().max(1));
                if let Some(worker) = workers.get(any).filter(|w| w.pid > 0) {
                    let pid = rustix::process::Pid::from_raw(i32::try_from(worker.pid).unwrap()).unwrap();
                    // It may have gone by itself.
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            _ => drop(sim.bed.node.evict(&name(["a", "b", "c", "d"][rng.random_range(0..4)])).await),
        }
        assert!(sim.used(0) <= ByteSize::mib(12), "never more than its budget");
    }
    for instance in running {
        let _ = sim.bed.node.stop(instance, StopMode::Now).await;
    }
    for model in ["a", "b", "c", "d"] {
        sim.bed.node.evict(&name(model)).await;
    }
    sim.emptied().await;
    sim.bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn streams_of_a_killed_worker_end_and_others_go_on() {
    let sim = Sim::noise(workers("devices::slow_worker"), None);
    let (a, b) = (sim.order("a"), sim.order("b"));
    let on_a = sim.bed.node.start(a.clone()).await.unwrap();
    let on_b = sim.bed.node.start(b.clone()).await.unwrap();
    let (mut of_a, mut of_b) = (Client::connect(&on_a.socket).await, Client::connect(&on_b.socket).await);
    of_a.generate(1, a.generation.0, &[1], 10_000).await;
    of_b.generate(1, b.generation.0, &[1], 20).await;
    assert!(of_a.next().await);
    signal(sim.bed.pid(on_a.worker), Signal::KILL);
    while of_a.next().await {}
    assert_eq!(of_b.collect(1).await[&1].ends, [Finish::Length]);
    // By force, with a typed failure.
    of_b.generate(2, b.generation.0, &[1], 10_000).await;
    while !of_b.outcomes.contains_key(&2) {
        assert!(of_b.next().await);
    }
    sim.bed.node.stop(b.instance, StopMode::Now).await.unwrap();
    assert_eq!(of_b.collect(1).await[&2].failure(), FailureCode::Unloaded);
    sim.bed.node.shutdown(Duration::ZERO).await;
}
