//! `stoker serve`: every role in one process, wired.

mod adapters;
pub(crate) mod admin;
mod devices;
mod memory;
pub(crate) mod traces;

use std::{net::SocketAddr, num::NonZeroU32, sync::Arc, time::Duration};

use anyhow::Context as _;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use stoker_controller::{Budgets, ControllerHandle, DeviceConfig, ServerConfig};
use stoker_gateway::{GatewayConfig, GatewayDeps, Shutdown, WorkerPool};
use stoker_node::{ClientSocket, MemoryConfig, Node, NodeConfig, PressureTrigger, RuntimeDir, WorkerConfig};
use stoker_types::{ByteSize, DeviceMemoryState};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};

use crate::{config::Config, library::Library};

/// How often old samples of histograms are folded, so that their memory stays bounded.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How long a start waits for the index of models that are only remote; the rest comes later.
const INDEX_WAIT: Duration = Duration::from_secs(3);

/// What workers without streams get to end by themselves.
const WORKERS_END: Duration = Duration::from_secs(1);

/// A server that runs in this process.
pub(crate) struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
    controller: ControllerHandle,
    node: Node,
    /// For weights.
    dram: ByteSize,
    /// For KV caches.
    kv: ByteSize,
    /// Devices that models are served from, and what they may take of each.
    devices: Vec<DeviceConfig>,
    grace: Duration,
    gateway: JoinHandle<std::io::Result<()>>,
    admin: admin::AdminServer,
    clients: ClientSocket,
    exporter: Option<traces::Exporter>,
}

/// What may be changed about a server for measuring it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Variant {
    /// Workers with an engine that costs nothing.
    pub(crate) standin: bool,
    /// What is in memory outlives the process.
    pub(crate) kept: bool,
}

impl Server {
    /// Starts every role and returns when the API listens.
    ///
    /// # Errors
    /// What stands in the way, with what would mend it.
    pub(crate) async fn start(config: &Config, variant: Variant) -> anyhow::Result<Self> {
        config.check_exposure()?;
        config.dirs.prepare_runtime()?;
        let metrics = metrics_recorder()?;
        let library = Library::open(config)?;

        // The address first: a port that is taken is the commonest mistake, and everything else takes longer.
        let listener =
            TcpListener::bind(config.listen.value).await.with_context(|| taken(config.listen.value))?;
        let address = listener.local_addr()?;

        let runtime = RuntimeDir::claim(&config.dirs.runtime)?;
        let ssd = library.ssd_tier(config)?;
        let remote: Option<Arc<dyn stoker_io::OpenRemote>> =
            if library.is_online() { Some(Arc::new(library.access()?.stores)) } else { None };
        library.index_all(INDEX_WAIT).await;
        {
            // What an earlier server left half-done is gone on with, or of no more use.
            let (ssd, library) = (ssd.clone(), library.clone());
            drop(tokio::task::spawn_blocking(move || ssd.collect(None, |left| library.wants(left))));
        }
        let executable = std::env::current_exe().context("finding the worker's executable")?;
        let mut command = vec![executable.into_os_string(), "worker".into()];
        command.extend(["--threads".into(), config.threads.value.to_string().into()]);
        if variant.standin {
            command.push("--standin".into());
        }
        let memory::Opened { runtime, store, keeper, dram, kv } =
            memory::open(config, runtime, &command, &library, memory::Below { remote, ssd }, variant.kept)
                .await?;
        let slots = NonZeroU32::new(config.workers.value).unwrap_or(NonZeroU32::MIN);
        let workers = WorkerConfig {
            threads: config.threads.value,
            // One more than may serve, so that the next model finds a warm one.
            workers_max: slots.saturating_add(1),
            env: worker_environment(),
            ..WorkerConfig::new(command)
        };
        let pressure = PressureTrigger::open()
            .inspect_err(
                |error| tracing::debug!(%error, "memory pressure isn't watched; starts look at the machine"),
            )
            .ok();
        let devices = {
            let (config, workers) = (config.clone(), workers.clone());
            tokio::task::spawn_blocking(move || devices::open(&config, &workers)).await??
        };
        devices::attach(&store, &devices, dram);
        // What is on devices is accounted there.
        let kv = if devices.is_empty() { kv } else { ByteSize::ZERO };
        let memory = MemoryConfig { pressure, ..MemoryConfig::new(kv) };
        let node_config = NodeConfig { runtime, workers, devices, memory, keeper };
        let node = Node::open(node_config, store, Arc::new(library.clone()))?;
        let device = |state: &DeviceMemoryState| DeviceConfig {
            name: state.name.clone(),
            memory: state.budget.effective,
            work: state.work,
            slots: slots.get(),
        };
        let devices: Vec<DeviceConfig> = node.look().await.devices.iter().map(device).collect();

        let (export, exporter) = if config.telemetry.traces {
            let (export, exporter) = traces::Exporter::start(config.telemetry.service)?;
            (Some(export), Some(exporter))
        } else {
            (None, None)
        };
        let traces = Arc::new(traces::RequestTraces::new(export));

        let budgets = Budgets { dram, kv, slots: slots.get() };
        let mut controller_config =
            stoker_controller::Config { queue: config.queue.value, ..stoker_controller::Config::default() };
        controller_config.rules.wait_max = Duration::from_secs(config.other_model_wait_s.value);
        let node_api = Arc::new(adapters::NodeOfThisProcess(node.clone()));
        let (controller, _owner) = stoker_controller::spawn(controller_config, Arc::new(library.clone()));
        let server = ServerConfig { name: String::new(), budgets, devices: devices.clone() };
        let _this_one = controller.join(server, node_api);

        let admin = admin::AdminServer::start(
            &config.dirs.admin_socket(),
            admin::AdminState {
                controller: controller.clone(),
                node: node.clone(),
                library: library.clone(),
                traces: Arc::clone(&traces),
                wait_max: Duration::from_secs(config.wait_s.value),
            },
        )?;
        let clients_socket = config.dirs.clients_socket();
        let clients = ClientSocket::listen(&clients_socket, node.clone())
            .with_context(|| format!("clients' socket {}", clients_socket.display()))?;
        let grace = Duration::from_secs(config.shutdown_grace_s.value);
        let keys = &config.api_keys.value;
        let gateway_config = GatewayConfig {
            keys: keys.iter().map(|k| stoker_gateway::ApiKey::from_plain(&k.name, &k.secret)).collect(),
            allowed_hosts: config.hosts.value.clone(),
            wait_max: Duration::from_secs(config.wait_s.value),
            grace,
            ..GatewayConfig::default()
        };
        let status = adapters::ProcessStatus::watch(metrics, node.clone());
        let deps = GatewayDeps {
            placement: Arc::new(adapters::LocalPlacement(controller.clone())),
            models: Arc::new(library),
            backend: Arc::new(WorkerPool::default()),
            status: Arc::new(status),
            traces,
        };
        let shutdown = Shutdown::default();
        let gateway = tokio::spawn(stoker_gateway::serve(listener, gateway_config, deps, shutdown.clone()));
        tracing::info!(
            %address,
            %dram,
            %kv,
            devices = devices.iter().map(|d| format!("{} ({})", d.name, d.memory)).collect::<Vec<_>>().join(", "),
            admin = %config.dirs.admin_socket().display(),
            "listening"
        );
        Ok(Self {
            address,
            shutdown,
            controller,
            node,
            dram,
            kv,
            devices,
            grace,
            gateway,
            admin,
            clients,
            exporter,
        })
    }

    /// Where the API listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What models may take, in words.
    pub(crate) fn budgets(&self) -> String {
        let Self { dram, kv, devices, .. } = self;
        if devices.is_empty() {
            return format!("DRAM {dram}, KV {kv}");
        }
        let each: Vec<String> = devices.iter().map(|d| format!("{} {}", d.name, d.memory)).collect();
        format!("{}, DRAM {dram}", each.join(", "))
    }

    /// Waits until a worker can take a model.
    ///
    /// # Errors
    /// In words, why none can.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.node.ready().await.map_err(anyhow::Error::msg)
    }

    /// Serves until SIGTERM or SIGINT: the first lets running streams finish, the second ends them.
    ///
    /// # Errors
    /// When the listener failed.
    pub(crate) async fn until_signalled(self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!(grace = ?self.grace, "stopping; running streams may finish, a second signal ends them");
        let now = self.shutdown.now.clone();
        let second = tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            now.cancel();
        });
        let outcome = self.stop().await;
        second.abort();
        outcome
    }

    /// Stops in order: no new requests, running ones end, then the workers, and nothing is left behind.
    ///
    /// # Errors
    /// When the listener failed.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        let Self { shutdown, controller, node, grace, gateway, admin, clients, exporter, .. } = self;
        shutdown.drain.cancel();
        let draining = async {
            tokio::select! {
                left = controller.shutdown(grace) => left,
                () = shutdown.now.cancelled() => 0,
            }
        };
        let (served, left) = tokio::join!(gateway, draining);
        if left > 0 {
            tracing::warn!(
                sequences = left,
                "the grace period is over; their streams were ended with an error"
            );
        }
        admin.stop().await;
        clients.stop().await;
        // What could finish has finished: workers have no stream that anybody reads.
        node.shutdown(WORKERS_END).await;
        if let Some(exporter) = exporter {
            exporter.stop().await;
        }
        Ok(served.context("the gateway panicked")??)
    }
}

/// Who has the port, if the operating system tells.
fn taken(address: SocketAddr) -> String {
    let holder = listener_of(address.port()).map(|who| format!("; {who} has it")).unwrap_or_default();
    format!("cannot listen on {address}{holder}; choose another with --listen")
}

/// Name and process id of whoever listens on a TCP port of this machine.
fn listener_of(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| {
        let text = std::fs::read_to_string(table).ok()?;
        text.lines().skip(1).find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // proc(5): local address in hexadecimal, state (0A: listening), inode in the tenth field.
            let (_, hex_port) = fields.get(1)?.rsplit_once(':')?;
            let listening = fields.get(3) == Some(&"0A") && u16::from_str_radix(hex_port, 16) == Ok(port);
            listening.then(|| fields.get(9).map(|i| format!("socket:[{i}]")))?
        })
    })?;
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let fds = std::fs::read_dir(process.path().join("fd")).ok()?;
        let holds = fds
            .flatten()
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link.as_os_str() == inode.as_str()));
        let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        holds.then(|| format!("process {pid} ({})", name.trim()))
    })
}

/// What a worker's environment has: its log filter. Nothing else of ours concerns it.
fn worker_environment() -> Vec<(std::ffi::OsString, std::ffi::OsString)> {
    let environment = crate::config::Environment::of_process();
    environment.get("STOKER_LOG").map(|filter| ("STOKER_LOG".into(), filter.into())).into_iter().collect()
}

/// The process's metrics recorder; one for all servers of a process.
fn metrics_recorder() -> anyhow::Result<PrometheusHandle> {
    static RECORDER: std::sync::OnceLock<PrometheusHandle> = std::sync::OnceLock::new();
    if let Some(handle) = RECORDER.get() {
        return Ok(handle.clone());
    }
    let handle = PrometheusBuilder::new().install_recorder().context("installing the metrics recorder")?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(METRICS_UPKEEP);
        loop {
            ticks.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(RECORDER.get_or_init(|| handle).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_its_holder() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let words = taken(listener.local_addr().unwrap());
        assert!(words.contains(&format!("process {}", std::process::id())), "{words}");
    }
}
