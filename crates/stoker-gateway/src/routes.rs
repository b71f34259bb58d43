//! The paths and what they do.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Extension, Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::FutureExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::{Value, json};
use stoker_checkpoint::text::TextAssets;
use stoker_types::{ClientId, RequestId, clock};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    config::GatewayConfig,
    errors::{ApiError, ErrorCode, number},
    generation::{Delta, Engine, Generation},
    guard::{self, Ends},
    openai::{AnswerHead, EventWriter, WholeChoice, whole_answer},
    request::{Api, Effort, GenerateRequest, PromptIds, ValidGenerateRequest},
    seams::{ModelCard, Models, ServedModel, Status},
    stream::{EventStream, Starting, StreamSettings},
    telemetry::{Access, ms},
    text::TextCache,
    timeline::{QUEUED_MS, TIMELINE},
    trace::Traces,
};

/// Header of every response: the request's id, unguessable. Also the `id` of the answer and the first part of the
/// `id:` lines of a stream.
pub const REQUEST_ID: &str = "x-request-id";
/// Header of every generated answer: the seed in use. Sent again as `seed`, it gives the same answer again.
pub const SEED: &str = "x-stoker-seed";
/// Request header: how long the request may wait for its start, milliseconds. Lowers the server's limit only.
pub const DEADLINE_MS: &str = "x-stoker-deadline-ms";

/// A body of at most so many bytes has its prompt rendered and tokenised where it was received: that takes some tens
/// of microseconds, and a handover to another thread and back takes as long.
const QUICK_BODY_BYTES_MAX: usize = 4 << 10;

/// Unit of the budget for bodies.
const KIB: usize = 1 << 10;
/// A body that is too large is read on for so many times the limit, and so long, before its answer is sent.
const DISCARDED_LIMITS: usize = 4;
const DISCARDING: Duration = Duration::from_secs(5);

/// What all requests share.
pub(crate) struct Gateway {
    pub(crate) config: GatewayConfig,
    pub(crate) models: Arc<dyn Models>,
    pub(crate) status: Arc<dyn Status>,
    pub(crate) traces: Arc<dyn Traces>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) text: TextCache,
    /// KiB of bodies that may be received at the same time.
    pub(crate) bodies: Arc<Semaphore>,
    /// No new requests are taken.
    pub(crate) draining: CancellationToken,
    /// Running requests are ended.
    pub(crate) ending: CancellationToken,
}

type Shared = State<Arc<Gateway>>;

pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/metrics", get(metrics))
        .fallback(async |request: Request| ApiError::not_found(request.uri().path()))
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), guard_and_record));
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .merge(guarded)
        .with_state(gateway)
}

/// Around every request but the health checks, which name nothing and are asked by address: id, guard, panics, log.
async fn guard_and_record(
    State(gateway): Shared,
    Extension(ends): Extension<Ends>,
    mut request: Request,
    next: Next,
) -> Response {
    let route = match request.uri().path() {
        "/v1/chat/completions" => "chat",
        "/v1/completions" => "completions",
        "/metrics" => "metrics",
        path if path.starts_with("/v1/models") => "models",
        _ => "unknown",
    };
    let prefix = if route == "completions" { "cmpl" } else { "chatcmpl" };
    let id = format!("{prefix}-{:032x}", rand::random::<u128>());
    let access = Access::new(
        RequestId((&*id).into()),
        route,
        Instant::now(),
        Arc::clone(&gateway.traces),
        request.headers(),
    );
    let span = access.span();
    let mut response = match guard::identify(&gateway.config, request.headers(), ends) {
        Err(refused) => refused.into_response(),
        Ok(client) => {
            access.set_client(client.clone());
            request.extensions_mut().insert(client);
            request.extensions_mut().insert(access.clone());
            AssertUnwindSafe(next.run(request).instrument(span)).catch_unwind().await.unwrap_or_else(|_| {
                tracing::error!(request_id = %id, "a request's handler panicked");
                ApiError::internal("an internal error; the log has details").into_response()
            })
        }
    };
    let code = response.extensions().get::<ErrorCode>().map(|code| code.0);
    access.set_status(response.status().as_u16(), code);
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn chat(
    State(gateway): Shared,
    Extension(access): Extension<Access>,
    Extension(client): Extension<ClientId>,
    request: Request,
) -> Result<Response, ApiError> {
    Box::pin(generate(gateway, Api::Chat, access, client, request)).await
}

async fn completion(
    State(gateway): Shared,
    Extension(access): Extension<Access>,
    Extension(client): Extension<ClientId>,
    request: Request,
) -> Result<Response, ApiError> {
    Box::pin(generate(gateway, Api::Completion, access, client, request)).await
}

async fn generate(
    gateway: Arc<Gateway>,
    api: Api,
    access: Access,
    client: ClientId,
    request: Request,
) -> Result<Response, ApiError> {
    if gateway.draining.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    let (parts, body) = request.into_parts();
    let wait_max =
        deadline(&parts.headers)?.map_or(gateway.config.wait_max, |d| d.min(gateway.config.wait_max));
    let show_timeline = parts.headers.get(TIMELINE).is_some_and(|value| value != "0");
    let (parsed, effort) = {
        // The body is dropped before the request waits for anything else.
        let body = receive(&gateway, &parts.headers, body).await?;
        let effort = if body.len() <= QUICK_BODY_BYTES_MAX { Effort::Quick } else { Effort::Full };
        (GenerateRequest::parse(api, &body)?, effort)
    };
    let model = gateway.models.get(&parsed.model)?;
    access.set_model(&model.name, parsed.stream.is_some());
    if !gateway.text.is_open(&model) {
        // Reading a tokenizer takes as long as reading the weights of a small model: both at the same time.
        gateway.engine.placement.expect(&model.name);
    }
    let assets = gateway.text.get(&model).await?;
    let valid = prepare(&gateway, parsed, effort, &model, &assets).await?;
    let seed = valid.sampling.seed;
    let sequences = valid.sequences();
    let options = valid.stream;
    let engine = Arc::clone(&gateway.engine);
    let mut generation = Generation::new(engine, access.clone(), client, model, assets, valid, wait_max);
    let head = |generation: &Generation| AnswerOwner {
        api,
        id: generation.request.clone(),
        created: clock::wall().as_secs(),
        model: generation.model.name.to_string(),
    };
    let mut response = match options {
        None => {
            let head = head(&generation);
            tokio::select! {
                biased;
                answer = Box::pin(whole(&head, &mut generation)) => answer?,
                () = gateway.ending.cancelled() => return Err(ApiError::shutting_down()),
            }
        }
        Some(options) => {
            let head = head(&generation);
            let writer = EventWriter::new(head.borrow(), sequences, options.include_usage);
            let settings = StreamSettings {
                comment_every: gateway.config.comment_every,
                include_usage: options.include_usage,
                show_timeline,
                ending: gateway.ending.clone(),
            };
            streamed(&gateway, generation, writer, access, settings).await?
        }
    };
    response.headers_mut().insert(SEED, number(seed));
    Ok(response)
}

/// Turns a request into token ids: here when it is little work, else on a thread for blocking work.
async fn prepare(
    gateway: &Gateway,
    mut request: GenerateRequest,
    effort: Effort,
    model: &Arc<ServedModel>,
    assets: &Arc<TextAssets>,
) -> Result<ValidGenerateRequest, ApiError> {
    if effort == Effort::Quick
        && let Some(prompts) = PromptIds::of(&mut request, model, assets, Effort::Quick)?
    {
        return ValidGenerateRequest::new(request, prompts, model, assets);
    }
    let (model, assets) = (Arc::clone(model), Arc::clone(assets));
    let work = move || {
        let prompts = PromptIds::of(&mut request, &model, &assets, Effort::Full)?
            .ok_or_else(|| ApiError::internal("a prompt was not made with full effort"))?;
        ValidGenerateRequest::new(request, prompts, &model, &assets)
    };
    gateway.text.blocking(work).await.map_err(ApiError::internal)?
}

struct AnswerOwner {
    api: Api,
    id: RequestId,
    created: u64,
    model: String,
}

impl AnswerOwner {
    fn borrow(&self) -> AnswerHead<'_> {
        AnswerHead { api: self.api, id: &self.id, created: self.created, model: &self.model }
    }
}

/// Runs a generation to its end.
async fn whole(head: &AnswerOwner, generation: &mut Generation) -> Result<Response, ApiError> {
    let count = usize::from(generation.valid.sequences());
    let mut choices: Vec<WholeChoice> = (0..count).map(|_| WholeChoice::default()).collect();
    let mut delta = Some(generation.first().await?);
    while let Some(Delta { sequence, position: _, text, logprobs, finish }) = delta {
        let choice = &mut choices[usize::from(sequence)];
        choice.text.push_str(&text);
        choice.logprobs.extend(logprobs);
        choice.finish = finish.or(choice.finish);
        delta = generation.next().await?;
    }
    let body = whole_answer(head.borrow(), choices, generation.usage(), &generation.assets.tokenizer);
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(QUEUED_MS, number(ms(generation.timeline.queued)));
    if let Ok(timeline) = HeaderValue::from_str(&generation.timeline.json()) {
        headers.insert(TIMELINE, timeline);
    }
    Ok(response)
}

/// Begins a streamed answer: its head goes out with the first news, or after a while without any. Until then a
/// failure has a status of its own.
async fn streamed(
    gateway: &Gateway,
    mut generation: Generation,
    writer: EventWriter,
    access: Access,
    settings: StreamSettings,
) -> Result<Response, ApiError> {
    let head_due = access.received() + gateway.config.stream_head_after;
    let mut starting: Starting = Box::pin(async move {
        let first = generation.first().await;
        (generation, first)
    });
    let began = tokio::select! {
        biased;
        began = &mut starting => Some(began),
        () = tokio::time::sleep_until(head_due) => None,
        () = gateway.ending.cancelled() => return Err(ApiError::shutting_down()),
    };
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    let stream = match began {
        None => EventStream::starting(starting, writer, access, settings),
        Some((generation, first)) => {
            let first = first?;
            headers.insert(QUEUED_MS, number(ms(generation.timeline.queued)));
            EventStream::flowing(generation, first, writer, access, settings)
        }
    };
    *response.body_mut() = stream.into_body();
    Ok(response)
}

/// Receives a body within its limits of size and time and the budget for all bodies.
async fn receive(gateway: &Gateway, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let config = &gateway.config;
    let max = config.body_bytes_max;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let len = announced.unwrap_or(max);
    if len > max {
        discard(body, max).await;
        return Err(ApiError::body_too_large(max));
    }
    let receiving = async {
        let kib = u32::try_from(len.div_ceil(KIB)).unwrap_or(u32::MAX);
        let _budget = gateway.bodies.acquire_many(kib).await.map_err(|_| ApiError::shutting_down())?;
        match Limited::new(body, max).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(ApiError::body_too_large(max)),
            Err(error) => Err(ApiError::malformed(format!("the request body broke off: {error}"))),
        }
    };
    tokio::time::timeout(config.body_timeout, receiving)
        .await
        .unwrap_or_else(|_| Err(ApiError::body_too_slow(config.body_timeout)))
}

/// Takes in what a client sends beyond the limit, within reason: a connection that is closed under a client that still
/// sends takes the answer with it.
async fn discard(mut body: Body, max: usize) {
    let mut left = max.saturating_mul(DISCARDED_LIMITS);
    let discarding = async {
        while let Some(Ok(frame)) = body.frame().await {
            let len = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(len) else { return };
            left = rest;
        }
    };
    // Whoever sends for longer than this doesn't get the answer.
    let _ = tokio::time::timeout(DISCARDING, discarding).await;
}

fn deadline(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(DEADLINE_MS) else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|text| text.parse::<u64>().ok());
    let error =
        || ApiError::invalid(DEADLINE_MS, format!("`{DEADLINE_MS}` must be a number of milliseconds"));
    millis.map(Duration::from_millis).map(Some).ok_or_else(error)
}

async fn models(State(gateway): Shared) -> Response {
    let data: Vec<Value> = gateway.models.list().iter().map(card).collect();
    json_response(&json!({ "object": "list", "data": data }))
}

async fn model(State(gateway): Shared, Path(id): Path<String>) -> Result<Response, ApiError> {
    let cards = gateway.models.list();
    match cards.iter().find(|card| card.id.as_str() == id) {
        Some(found) => Ok(json_response(&card(found))),
        None => {
            // An alias, perhaps; else the error names what is near.
            let model = gateway.models.get(&id)?;
            let found = cards.iter().find(|card| card.id == model.name);
            found.map(|found| json_response(&card(found))).ok_or_else(|| ApiError::not_found(&id))
        }
    }
}

fn card(card: &ModelCard) -> Value {
    let ModelCard { id, created, owned_by, context, refusal } = card;
    json!({
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": owned_by,
        "context_length": context,
        "runnable": refusal.is_none(),
        "why_not": refusal,
    })
}

async fn metrics(State(gateway): Shared) -> Response {
    let text = gateway.status.metrics();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn ready(State(gateway): Shared) -> Response {
    if gateway.draining.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    match gateway.status.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")).into_response(),
    }
}

fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
