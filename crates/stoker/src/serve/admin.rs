//! The admin API: HTTP on a Unix socket that only its owner may use.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use stoker_controller::{ControllerHandle, DecisionRecord, Explanation, InstanceStatus, UnloadError};
use stoker_node::Node;
use stoker_types::{
    ByteSize, BytesPerSec, DeviceMemoryState, MemoryBudget, ModelName, Refusal, StartFailure, TierRate,
    WorkerState,
};
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    library::Library,
    serve::traces::{ColdRequest, RequestTraces},
};

/// What the handlers work with.
#[derive(Clone)]
pub(crate) struct AdminState {
    pub(crate) controller: ControllerHandle,
    pub(crate) node: Node,
    pub(crate) library: Library,
    pub(crate) traces: Arc<RequestTraces>,
    pub(crate) wait_max: Duration,
}

/// The listener and its task.
pub(crate) struct AdminServer {
    socket: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

/// `GET /status`: what `stoker ps` shows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StatusReport {
    pub(crate) dram: Budget,
    pub(crate) kv: Budget,
    /// The devices that models are served from, if not from memory.
    pub(crate) devices: Vec<DeviceRow>,
    /// Why a budget is below what was configured, and who holds the memory.
    pub(crate) shortage: Option<String>,
    /// Requests that wait for a seat.
    pub(crate) waiting: usize,
    pub(crate) rates: Vec<TierRate>,
    pub(crate) instances: Vec<InstanceRow>,
    /// What is in DRAM without an instance too: bytes from the front of each model.
    pub(crate) cached: Vec<CachedRow>,
    /// Worker processes, whatever they do.
    pub(crate) workers: usize,
    /// Of these, those that are ready for a model.
    #[serde(default)]
    pub(crate) workers_idle: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Budget {
    pub(crate) used: ByteSize,
    /// What may be used now, of what was configured: less while the machine has less.
    pub(crate) budget: ByteSize,
    pub(crate) configured: ByteSize,
}

/// A device.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DeviceRow {
    pub(crate) device: String,
    /// Weights, KV caches and work memory of its instances.
    pub(crate) memory: Budget,
    pub(crate) total: ByteSize,
    pub(crate) free: ByteSize,
    /// Weights on it.
    pub(crate) weights: ByteSize,
    /// Of those, what no instance uses.
    pub(crate) cached: ByteSize,
    /// Models whose weights are on it.
    pub(crate) resident: Vec<ModelName>,
    /// Measured rate of copies to it.
    pub(crate) rate: Option<BytesPerSec>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InstanceRow {
    pub(crate) instance: String,
    pub(crate) model: ModelName,
    pub(crate) state: String,
    /// Where it is: `cpu`, `cuda:0`.
    pub(crate) device: String,
    pub(crate) pid: Option<u32>,
    pub(crate) context: u32,
    pub(crate) sequences: u32,
    pub(crate) in_flight: u32,
    pub(crate) pool_bytes: ByteSize,
    pub(crate) kv_bytes: ByteSize,
    pub(crate) pinned: bool,
    pub(crate) idle_ms: Option<u128>,
    pub(crate) expires_in_ms: Option<u128>,
    pub(crate) load_ms: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CachedRow {
    pub(crate) model: ModelName,
    pub(crate) bytes: ByteSize,
}

/// Body of the requests about one model.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelRequest {
    pub(crate) model: ModelName,
}

/// Body of `POST /unload`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadRequest {
    /// `None`: all.
    pub(crate) model: Option<ModelName>,
    #[serde(default)]
    pub(crate) force: bool,
    #[serde(default)]
    pub(crate) dram: bool,
}

/// Body of `POST /explain`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExplainRequest {
    /// A model, or a request's id; `None`: whatever was last.
    pub(crate) about: Option<String>,
}

/// What `stoker explain` shows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExplainReport {
    /// Asked about a model.
    pub(crate) model: Option<ModelExplanation>,
    /// Requests that waited for a start, the newest first.
    pub(crate) requests: Vec<ColdRequest>,
}

/// What the controller knows of a model.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ModelExplanation {
    pub(crate) model: ModelName,
    /// What an instance takes, or why it can't fit.
    pub(crate) sizing: String,
    /// How long a start would take, term by term.
    pub(crate) estimate: String,
    pub(crate) waiting: usize,
    pub(crate) failure: Option<String>,
    /// The oldest first.
    pub(crate) decisions: Vec<DecisionRow>,
}

/// One decision about a model, or what came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DecisionRow {
    pub(crate) age_s: f64,
    pub(crate) instance: String,
    pub(crate) event: String,
    pub(crate) terms: String,
}

/// Cold requests that are shown of one model, or of all.
const EXPLAINED_MAX: usize = 3;

/// What was unloaded.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Unloaded {
    pub(crate) instances: usize,
    pub(crate) freed: ByteSize,
}

/// It was done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) model: ModelName,
}

/// A failure, as an HTTP answer in the API's shape.
struct AdminError {
    status: StatusCode,
    message: String,
}

// === impl Budget ===

impl Budget {
    fn new(used: ByteSize, budget: MemoryBudget) -> Self {
        let MemoryBudget { configured, effective } = budget;
        Self { used, budget: effective, configured }
    }
}

// === impl AdminServer ===

impl AdminServer {
    /// Listens on `socket`, which is replaced if nobody listens on it any more.
    ///
    /// # Errors
    /// When another server listens there, or the operating system refuses.
    pub(crate) fn start(socket: &Path, state: AdminState) -> anyhow::Result<Self> {
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            anyhow::bail!("another stoker serves here already ({}); stop it first", socket.display());
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing the stale {}", socket.display()));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(socket).with_context(|| format!("admin socket {}", socket.display()))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let router = Router::new()
            .route("/status", get(status))
            .route("/explain", post(explain))
            .route("/pin", post(pin))
            .route("/unpin", post(unpin))
            .route("/preload", post(preload))
            .route("/unload", post(unload))
            .with_state(state);
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let task =
            tokio::spawn(async move { axum::serve(listener, router).with_graceful_shutdown(stopped).await });
        Ok(Self { socket: socket.into(), stop, task })
    }

    /// Finishes what is being answered and removes the socket.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        match self.task.await {
            Ok(Ok(())) => {}
            other => tracing::warn!(?other, "the admin API ended badly"),
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::warn!(%error, "the admin socket stays");
        }
    }
}

// === handlers ===

async fn status(State(state): State<AdminState>) -> Json<StatusReport> {
    let AdminState { controller, node, .. } = state;
    let snapshot = node.look().await;
    let overall = controller.status();
    let row = |i: InstanceStatus| InstanceRow {
        instance: i.instance.to_string(),
        model: i.model,
        state: i.state.to_owned(),
        device: i.device,
        pid: snapshot.workers.iter().find(|w| Some(w.worker) == i.worker).map(|w| w.pid),
        context: i.context,
        sequences: i.sequences,
        in_flight: i.in_flight,
        pool_bytes: i.pool_bytes,
        kv_bytes: i.kv_bytes,
        pinned: i.pinned,
        idle_ms: i.idle.map(|d| d.as_millis()),
        expires_in_ms: i.expires_in.map(|d| d.as_millis()),
        load_ms: i.load_time.as_secs_f64() * 1e3,
    };
    let device = |d: &DeviceMemoryState| DeviceRow {
        device: d.name.clone(),
        memory: Budget::new(
            overall.devices.iter().find(|used| used.name == d.name).map_or(ByteSize::ZERO, |used| used.used),
            d.budget,
        ),
        total: d.total,
        free: d.free,
        weights: d.weights,
        cached: d.cached,
        resident: d.resident.clone(),
        rate: d.rate,
    };
    let shortages = snapshot.devices.iter().filter_map(DeviceMemoryState::shortage);
    let shortages: Vec<String> = shortages.chain(snapshot.memory.shortage()).collect();
    let instances = controller.instances().into_iter().map(row).collect();
    Json(StatusReport {
        dram: Budget::new(snapshot.dram_used, snapshot.memory.dram),
        kv: Budget::new(overall.kv_used, snapshot.memory.kv),
        devices: snapshot.devices.iter().map(device).collect(),
        shortage: (!shortages.is_empty()).then(|| shortages.join("; ")),
        waiting: overall.waiting,
        rates: snapshot.rates,
        instances,
        cached: snapshot.residency.into_iter().map(|(model, bytes)| CachedRow { model, bytes }).collect(),
        workers: snapshot.workers.len(),
        workers_idle: snapshot.workers.iter().filter(|worker| worker.state == WorkerState::Idle).count(),
    })
}

async fn explain(
    State(state): State<AdminState>,
    Json(request): Json<ExplainRequest>,
) -> Result<Json<ExplainReport>, AdminError> {
    let last = |wanted: &dyn Fn(&ColdRequest) -> bool| {
        let mut requests = state.traces.recent(wanted);
        requests.truncate(EXPLAINED_MAX);
        requests
    };
    let Some(about) = request.about else {
        return Ok(Json(ExplainReport { model: None, requests: last(&|_| true) }));
    };
    let of_request = last(&|cold| cold.request == about);
    if !of_request.is_empty() {
        return Ok(Json(ExplainReport { model: None, requests: of_request }));
    }
    let not_found = || {
        let message = if about.starts_with("chatcmpl-") || about.starts_with("cmpl-") {
            format!("request {about} is not among the last that waited for a start")
        } else {
            state.library.not_found(&about)
        };
        AdminError { status: StatusCode::NOT_FOUND, message }
    };
    let name: ModelName = about.parse().map_err(|_| not_found())?;
    let Explanation { model, sizing, estimate, waiting, failure, decisions, at, .. } =
        state.controller.explain(&name).ok_or_else(not_found)?;
    let row = |d: DecisionRecord| DecisionRow {
        age_s: at.saturating_sub(d.at).as_secs_f64(),
        instance: d.instance.to_string(),
        event: d.event.name().to_owned(),
        terms: d.terms,
    };
    let requests = last(&|cold| cold.model == model);
    let decisions = decisions.into_iter().map(row).collect();
    let model = ModelExplanation { model, sizing, estimate, waiting, failure, decisions };
    Ok(Json(ExplainReport { model: Some(model), requests }))
}

async fn pin(
    State(state): State<AdminState>,
    Json(request): Json<ModelRequest>,
) -> Result<Json<Done>, AdminError> {
    known(&state, &request.model)?;
    state.controller.pin(&request.model)?;
    Ok(Json(Done { model: request.model }))
}

async fn unpin(
    State(state): State<AdminState>,
    Json(request): Json<ModelRequest>,
) -> Result<Json<Done>, AdminError> {
    known(&state, &request.model)?;
    state.controller.unpin(&request.model)?;
    Ok(Json(Done { model: request.model }))
}

async fn preload(
    State(state): State<AdminState>,
    Json(request): Json<ModelRequest>,
) -> Result<Json<Done>, AdminError> {
    known(&state, &request.model)?;
    state.controller.preload(&request.model, state.wait_max).await?;
    Ok(Json(Done { model: request.model }))
}

async fn unload(
    State(state): State<AdminState>,
    Json(request): Json<UnloadRequest>,
) -> Result<Json<Unloaded>, AdminError> {
    let UnloadRequest { model, force, dram } = request;
    let everything = model.is_none();
    let models = match &model {
        Some(model) => {
            known(&state, model)?;
            vec![model.clone()]
        }
        None => {
            let mut all: Vec<ModelName> = state.controller.instances().into_iter().map(|i| i.model).collect();
            all.sort();
            all.dedup();
            all
        }
    };
    let mut instances = 0;
    for model in &models {
        match state.controller.unload(model, force).await {
            Ok(stopped) => instances += stopped,
            // Asked for everything, or for the DRAM too: that there is no instance is no failure.
            Err(UnloadError::NotLoaded { .. }) if dram || everything => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut freed = ByteSize::ZERO;
    if dram {
        let cached = match model {
            Some(model) => vec![model],
            None => state.node.snapshot().residency.into_iter().map(|(model, _)| model).collect(),
        };
        for model in cached {
            freed += state.node.evict(&model).await.freed;
        }
    }
    Ok(Json(Unloaded { instances, freed }))
}

fn known(state: &AdminState, model: &ModelName) -> Result<(), AdminError> {
    if state.library.knows(model) { Ok(()) } else { Err(unknown(state, model)) }
}

fn unknown(state: &AdminState, model: &ModelName) -> AdminError {
    AdminError { status: StatusCode::NOT_FOUND, message: state.library.not_found(model.as_str()) }
}

// === impl AdminError ===

impl From<Refusal> for AdminError {
    fn from(refusal: Refusal) -> Self {
        let status = match &refusal {
            Refusal::NotInTime { .. } | Refusal::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            Refusal::TooLarge { .. } => StatusCode::INSUFFICIENT_STORAGE,
            Refusal::Start(StartFailure::Changed { .. }) => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::Start(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, message: refusal.to_string() }
    }
}

impl From<StartFailure> for AdminError {
    fn from(failure: StartFailure) -> Self {
        Refusal::from(failure).into()
    }
}

impl From<UnloadError> for AdminError {
    fn from(error: UnloadError) -> Self {
        let status = match error {
            UnloadError::NotLoaded { .. } => StatusCode::NOT_FOUND,
            UnloadError::Busy { .. } | UnloadError::Loading { .. } => StatusCode::CONFLICT,
        };
        Self { status, message: error.to_string() }
    }
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": { "message": self.message, "code": self.status.as_u16() } });
        (self.status, Json(body)).into_response()
    }
}
