//! A gateway with a scripted worker behind a real Unix socket, a scripted placement, and a small HTTP client.

mod text;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use stoker_checkpoint::GenerationDefaults;
use stoker_gateway::{
    GatewayConfig, GatewayDeps, ModelCard, ModelLookupError, Models, Placement, RequestTrace, Seat,
    ServedModel, Shutdown, Status, Traces, WorkerPool, serve,
};
use stoker_proto::{
    FrameReader, FrameWriter,
    stream::{
        Begun, End, Failure, FailureCode, Finish, FromWorker, Generate, ToWorker, Token, TopToken, to_worker,
    },
};
use stoker_types::{Admit, Generation, InstanceId, ModelName, Refusal, SeatInfo};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::{Notify, mpsc},
    task::JoinHandle,
};

/// Id of the token that ends a turn. The ids below are bytes.
pub(crate) const END_OF_TURN: u32 = 257;
pub(crate) const CONTEXT: u32 = 512;

/// What the worker does with a sequence, step by step.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Each byte is a token.
    Text(&'static str),
    Token(u32),
    /// With log probabilities.
    Logprob(u32, f32, Vec<(u32, f32)>),
    /// As many tokens `x` as asked for.
    Fill,
    End(Finish),
    Fail(FailureCode, &'static str),
    /// The worker's process dies.
    Die,
    /// Until the test says so.
    Gate(Arc<Notify>),
    Pause(Duration),
}

type Script = dyn Fn(&Generate) -> Vec<Step> + Send + Sync;

pub(crate) struct FakeWorker {
    pub socket: PathBuf,
    pub orders: Arc<Mutex<Vec<Generate>>>,
    pub aborts: Arc<Mutex<Vec<u64>>>,
    pub aborted: Arc<Notify>,
    pub connections: Arc<AtomicUsize>,
}

impl FakeWorker {
    pub(crate) fn start(socket: PathBuf, script: Arc<Script>) -> Self {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let worker = Self {
            socket,
            orders: Arc::default(),
            aborts: Arc::default(),
            aborted: Arc::default(),
            connections: Arc::default(),
        };
        let (orders, aborts, aborted) =
            (worker.orders.clone(), worker.aborts.clone(), worker.aborted.clone());
        let connections = worker.connections.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (script, orders) = (script.clone(), orders.clone());
                let (aborts, aborted) = (aborts.clone(), aborted.clone());
                tokio::spawn(async move {
                    let (read, write) = socket.into_split();
                    let (frames, mut outgoing) = mpsc::channel::<Option<FromWorker>>(1024);
                    let writing = tokio::spawn(async move {
                        let mut writer = FrameWriter::new(write);
                        while let Some(Some(frame)) = outgoing.recv().await {
                            if writer.send(&frame).await.is_err() {
                                return;
                            }
                        }
                    });
                    let mut reader = FrameReader::new(read);
                    let mut running: HashMap<u64, JoinHandle<()>> = HashMap::new();
                    let reading = async {
                        while let Ok(Some(ToWorker { kind: Some(kind) })) = reader.next::<ToWorker>().await {
                            match kind {
                                to_worker::Kind::Generate(order) => {
                                    orders.lock().push(order.clone());
                                    let steps = script(&order);
                                    let task = tokio::spawn(play(order.clone(), steps, frames.clone()));
                                    running.insert(order.stream, task);
                                }
                                to_worker::Kind::Abort(abort) => {
                                    aborts.lock().push(abort.stream);
                                    aborted.notify_one();
                                    if let Some(task) = running.remove(&abort.stream) {
                                        task.abort();
                                    }
                                    let ends =
                                        vec![End { stream: abort.stream, finish: Finish::Cancelled as i32 }];
                                    let frame = FromWorker { ends, ..FromWorker::default() };
                                    let _ = frames.send(Some(frame)).await;
                                }
                            }
                        }
                    };
                    tokio::select! {
                        () = reading => {}
                        _ = writing => {}
                    }
                    for task in running.into_values() {
                        task.abort();
                    }
                });
            }
        });
        worker
    }
}

async fn play(order: Generate, steps: Vec<Step>, frames: mpsc::Sender<Option<FromWorker>>) {
    let stream = order.stream;
    let send = async |frame: FromWorker| {
        let _ = frames.send(Some(frame)).await;
    };
    if !matches!(steps.first(), Some(Step::Fail(..) | Step::Die)) {
        let begun = vec![Begun { stream, waited_us: 5, prefill_us: 700, cached_tokens: 2 }];
        send(FromWorker { begun, ..FromWorker::default() }).await;
    }
    let mut position = 0;
    let mut token = |id: u32| {
        position += 1;
        Token { stream, position: position - 1, id, logprob: None, top: Vec::new() }
    };
    for step in steps {
        match step {
            Step::Text(text) => {
                for byte in text.bytes() {
                    send(FromWorker { tokens: vec![token(byte.into())], ..FromWorker::default() }).await;
                }
            }
            Step::Token(id) => send(FromWorker { tokens: vec![token(id)], ..FromWorker::default() }).await,
            Step::Logprob(id, logprob, top) => {
                let top = top.into_iter().map(|(id, logprob)| TopToken { id, logprob }).collect();
                let tokens = vec![Token { logprob: Some(logprob), top, ..token(id) }];
                send(FromWorker { tokens, ..FromWorker::default() }).await;
            }
            Step::Fill => {
                for _ in 0..order.tokens_max {
                    send(FromWorker { tokens: vec![token(b'x'.into())], ..FromWorker::default() }).await;
                }
            }
            Step::End(finish) => {
                let ends = vec![End { stream, finish: finish as i32 }];
                send(FromWorker { ends, ..FromWorker::default() }).await;
            }
            Step::Fail(code, message) => {
                let failures = vec![Failure { stream, code: code as i32, message: message.into() }];
                send(FromWorker { failures, ..FromWorker::default() }).await;
            }
            Step::Die => {
                let _ = frames.send(None).await;
            }
            Step::Gate(gate) => gate.notified().await,
            Step::Pause(time) => tokio::time::sleep(time).await,
        }
    }
}

/// What the placement does with the next request for a seat. Afterwards: grants.
#[derive(Debug, Clone)]
pub(crate) enum Grant {
    Refuse(Refusal),
    After(Duration),
    /// On a worker with this generation.
    Generation(u64),
    Socket(PathBuf),
    Panic,
}

pub(crate) struct FakePlacement {
    pub socket: PathBuf,
    pub script: Mutex<VecDeque<Grant>>,
    pub admits: Mutex<Vec<Admit>>,
    pub seats: Arc<AtomicUsize>,
    pub returned: Arc<Notify>,
    pub context: AtomicUsize,
}

struct Permit(Arc<AtomicUsize>, Arc<Notify>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
        self.1.notify_one();
    }
}

#[async_trait]
impl Placement for FakePlacement {
    async fn admit(&self, admit: Admit) -> Result<Seat, Refusal> {
        self.admits.lock().push(admit);
        let next = self.script.lock().pop_front();
        let mut info = SeatInfo {
            instance: InstanceId(1),
            generation: Generation(1),
            socket: self.socket.clone(),
            context: u32::try_from(self.context.load(Ordering::SeqCst)).unwrap(),
            cold_start: None,
            queued: Duration::ZERO,
        };
        match next {
            None => {}
            Some(Grant::Refuse(refusal)) => return Err(refusal),
            Some(Grant::After(time)) => {
                tokio::time::sleep(time).await;
                info.queued = time;
            }
            Some(Grant::Generation(generation)) => info.generation = Generation(generation),
            Some(Grant::Socket(socket)) => info.socket = socket,
            Some(Grant::Panic) => panic!("a bug in the placement, as the test wants it"),
        }
        self.seats.fetch_add(1, Ordering::SeqCst);
        Ok(Seat { info, permit: Box::new(Permit(self.seats.clone(), self.returned.clone())) })
    }
}

impl FakePlacement {
    /// Waits until no seat is taken.
    pub(crate) async fn all_returned(&self) {
        while self.seats.load(Ordering::SeqCst) > 0 {
            self.returned.notified().await;
        }
    }
}

pub(crate) struct FakeModels {
    model: Arc<ServedModel>,
    pub opened: Arc<AtomicUsize>,
}

impl FakeModels {
    pub(crate) fn new() -> Self {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = opened.clone();
        let model = Arc::new(ServedModel {
            name: ModelName::new("team/tiny").unwrap(),
            created: 1_700_000_000,
            context: CONTEXT,
            vocab_size: 258,
            defaults: GenerationDefaults { temperature: Some(0.25), ..GenerationDefaults::default() },
            text: Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
                Ok(text::text_assets())
            }),
        });
        Self { model, opened }
    }
}

impl Models for FakeModels {
    fn list(&self) -> Vec<ModelCard> {
        let card = |id: &str, refusal: Option<&str>| ModelCard {
            id: ModelName::new(id).unwrap(),
            created: 1_700_000_000,
            owned_by: "test".into(),
            context: Some(CONTEXT),
            refusal: refusal.map(str::to_owned),
        };
        vec![card("odd", Some("unknown architecture `odd`")), card("team/tiny", None)]
    }

    fn get(&self, name: &str) -> Result<Arc<ServedModel>, ModelLookupError> {
        match name {
            "team/tiny" => Ok(self.model.clone()),
            "odd" => Err(ModelLookupError::NotRunnable {
                name: ModelName::new("odd").unwrap(),
                why: "unknown architecture `odd`".into(),
            }),
            _ => Err(ModelLookupError::Unknown { name: name.into(), nearest: vec!["team/tiny".into()] }),
        }
    }
}

struct FakeStatus;

impl Status for FakeStatus {
    fn metrics(&self) -> String {
        "stoker_up 1\n".into()
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Wants every request.
struct Collected(mpsc::UnboundedSender<RequestTrace>);

impl Traces for Collected {
    fn wants(&self, _: bool) -> bool {
        true
    }

    fn ended(&self, trace: RequestTrace) {
        // A test that is over reads no more.
        let _ = self.0.send(trace);
    }
}

pub(crate) struct Fixture {
    /// Of requests that have ended.
    pub traces: mpsc::UnboundedReceiver<RequestTrace>,
    pub address: SocketAddr,
    pub worker: FakeWorker,
    pub placement: Arc<FakePlacement>,
    pub models: Arc<FakeModels>,
    pub shutdown: Shutdown,
    pub server: JoinHandle<std::io::Result<()>>,
    pub dir: tempfile::TempDir,
    pub key: Option<String>,
}

pub(crate) struct Answer {
    pub status: u16,
    pub headers: hyper::HeaderMap,
    pub body: String,
}

impl Fixture {
    pub(crate) async fn new(script: impl Fn(&Generate) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::with(GatewayConfig::default(), script).await
    }

    pub(crate) async fn with(
        config: GatewayConfig,
        script: impl Fn(&Generate) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let worker = FakeWorker::start(dir.path().join("w.sock"), Arc::new(script));
        let placement = Arc::new(FakePlacement {
            socket: worker.socket.clone(),
            script: Mutex::default(),
            admits: Mutex::default(),
            seats: Arc::default(),
            returned: Arc::default(),
            context: AtomicUsize::new(CONTEXT as usize),
        });
        let models = Arc::new(FakeModels::new());
        let (collected, traces) = mpsc::unbounded_channel();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::default();
        let deps = GatewayDeps {
            placement: placement.clone(),
            models: models.clone(),
            backend: Arc::new(WorkerPool::new()),
            status: Arc::new(FakeStatus),
            traces: Arc::new(Collected(collected)),
        };
        let server = tokio::spawn(serve(listener, config, deps, shutdown.clone()));
        Self { traces, address, worker, placement, models, shutdown, server, dir, key: None }
    }

    /// Sends a request; the response's body is still to come.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        let socket = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        tokio::spawn(connection);
        sender.send_request(request).await
    }

    pub(crate) fn post(&self, path: &str) -> hyper::http::request::Builder {
        let builder =
            Request::post(path).header("host", "localhost").header("content-type", "application/json");
        match &self.key {
            Some(key) => builder.header("authorization", format!("Bearer {key}")),
            None => builder,
        }
    }

    pub(crate) async fn ask(&self, path: &str, body: Value) -> Answer {
        let request = self.post(path).body(Full::from(body.to_string())).unwrap();
        answer(self.send(request).await.unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        let request = Request::get(path).header("host", "localhost").body(Full::default()).unwrap();
        answer(self.send(request).await.unwrap()).await
    }
}

pub(crate) async fn answer(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// The JSON of a stream's events, `[DONE]` left out.
    pub(crate) fn events(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The text of a choice, put together from a stream's events.
    pub(crate) fn streamed_text(&self, index: u64) -> String {
        let events = self.events();
        let choices = events.iter().flat_map(|e| e["choices"].as_array().into_iter().flatten());
        choices
            .filter(|c| c["index"] == index)
            .filter_map(|c| c["delta"]["content"].as_str().or_else(|| c["text"].as_str()))
            .collect()
    }

    pub(crate) fn finish(&self, index: u64) -> Option<String> {
        let events = self.events();
        let choices = events.iter().flat_map(|e| e["choices"].as_array().into_iter().flatten());
        choices.filter(|c| c["index"] == index).find_map(|c| c["finish_reason"].as_str().map(str::to_owned))
    }
}

pub(crate) fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "team/tiny", "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}
