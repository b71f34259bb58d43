//! What the gateway adds to an engine that costs nothing: latency of a first token, latency and CPU time of each
//! further one, socket writes included.
//!
//! `cargo run --release -p stoker-gateway --example gateway_overhead [STREAMS] [STEP_MS]`
//!
//! The gateway runs in a process of its own, whose CPU time is read from `/proc`; this process is the client and the
//! worker stand-in, so that a token's way is measured on one clock. Prints one JSON object.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement is run by hand")]

#[path = "../tests/common/text.rs"]
mod text;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::json;
use stoker_checkpoint::GenerationDefaults;
use stoker_gateway::{
    GatewayConfig, GatewayDeps, ModelCard, ModelLookupError, Models, NoTraces, Placement, Seat, ServedModel,
    Shutdown, Status, WorkerPool, serve,
};
use stoker_proto::{
    FrameReader, FrameWriter,
    stream::{Begun, End, Finish, FromWorker, ToWorker, Token, to_worker},
};
use stoker_types::{Admit, Generation, InstanceId, ModelName, Refusal, SeatInfo, clock};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UnixListener},
};

const TOKENS: u32 = 500;
const FIRST_TOKENS: usize = 2000;

struct Fixed(PathBuf, Arc<ServedModel>);

#[async_trait]
impl Placement for Fixed {
    async fn admit(&self, _: Admit) -> Result<Seat, Refusal> {
        let info = SeatInfo {
            instance: InstanceId(1),
            generation: Generation(1),
            socket: self.0.clone(),
            context: self.1.context,
            cold_start: None,
            queued: Duration::ZERO,
        };
        Ok(Seat { info, permit: Box::new(()) })
    }
}

impl Models for Fixed {
    fn list(&self) -> Vec<ModelCard> {
        Vec::new()
    }

    fn get(&self, _: &str) -> Result<Arc<ServedModel>, ModelLookupError> {
        Ok(Arc::clone(&self.1))
    }
}

impl Status for Fixed {
    fn metrics(&self) -> String {
        String::new()
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let first = args.next();
    if first.as_deref() == Some("gateway") {
        return gateway(args.next().unwrap().into()).await;
    }
    let streams: usize = first.map_or(16, |s| s.parse().unwrap());
    let step = Duration::from_millis(args.next().map_or(5, |s| s.parse().unwrap()));
    measure(streams, step).await;
}

async fn gateway(socket: PathBuf) {
    let model = ServedModel {
        name: ModelName::new("tiny").unwrap(),
        created: 0,
        context: 1 << 20,
        vocab_size: 258,
        defaults: GenerationDefaults::default(),
        text: Arc::new(|| Ok(text::text_assets())),
    };
    let fixed = Arc::new(Fixed(socket, Arc::new(model)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let deps = GatewayDeps {
        placement: fixed.clone(),
        models: fixed.clone(),
        backend: Arc::new(WorkerPool::new()),
        status: fixed,
        traces: Arc::new(NoTraces),
    };
    serve(listener, GatewayConfig::default(), deps, Shutdown::default()).await.unwrap();
}

async fn measure(streams: usize, step: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("worker.sock");
    let sent = Arc::new(Mutex::new(Vec::new()));
    worker(&socket, step, sent.clone());
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["gateway".as_ref(), socket.as_os_str()])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    let mut address = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).await.unwrap();
    let address = address.trim().to_owned();

    // One token each, one after the other: what a request costs in all, client and stand-in included.
    let mut first = Vec::new();
    let mut connection = Client::connect(&address).await;
    for at in 0..FIRST_TOKENS + 200 {
        let begun = clock::now();
        connection.ask(1).await;
        connection.first_token().await;
        if at >= 200 {
            first.push(begun.elapsed());
        }
        connection.rest().await;
    }
    let request_cpu = cpu(pid);
    for _ in 0..500 {
        connection.ask(1).await;
        connection.rest().await;
    }
    let request_cpu = (cpu(pid) - request_cpu) / 500;

    // Many streams, one frame of the worker for all of them at each step.
    sent.lock().clear();
    let before = cpu(pid);
    let clients = (0..streams).map(|_| {
        let address = address.clone();
        async move {
            let mut client = Client::connect(&address).await;
            client.ask(TOKENS).await;
            client.token_times().await
        }
    });
    let received = futures::future::join_all(clients).await;
    let tokens: usize = received.iter().map(Vec::len).sum();
    let used = (cpu(pid) - before).saturating_sub(request_cpu * u32::try_from(streams).unwrap());
    let sent = sent.lock().clone();
    let mut latency: Vec<Duration> = received
        .iter()
        .flat_map(|times| {
            times.iter().filter_map(|at| {
                // Streams start at different steps; the step that carried a token is the last one before it came.
                let step = sent.partition_point(|s| s <= at).checked_sub(1)?;
                Some(*at - sent[step])
            })
        })
        .collect();
    let us = |d: Duration| (d.as_nanos() as f64 / 100.0).round() / 10.0;
    let quantiles = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        json!({ "p50": us(times[times.len() / 2]), "p99": us(times[times.len() * 99 / 100]) })
    };
    println!(
        "{}",
        json!({
            "streams": streams,
            "step_ms": step.as_millis(),
            "tokens": tokens,
            "first_token_us": quantiles(&mut first),
            "token_us": quantiles(&mut latency),
            "cpu_per_request_us": us(request_cpu),
            "cpu_per_token_us": us(used / u32::try_from(tokens).unwrap()),
        })
    );
}

/// A worker that has every token ready at each step; the first at once.
fn worker(socket: &Path, step: Duration, sent: Arc<Mutex<Vec<clock::Instant>>>) {
    struct Stream {
        id: u64,
        position: u32,
        tokens_max: u32,
    }
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let sent = sent.clone();
            tokio::spawn(async move {
                let (read, write) = socket.into_split();
                let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
                let mut streams: Vec<Stream> = Vec::new();
                let mut steps = tokio::time::interval(step);
                loop {
                    let mut frame = FromWorker::default();
                    tokio::select! {
                        order = reader.next::<ToWorker>() => match order.unwrap() {
                            None => return,
                            Some(ToWorker { kind: Some(to_worker::Kind::Generate(order)) }) => {
                                let stream = order.stream;
                                frame.begun.push(Begun { stream, ..Begun::default() });
                                frame.tokens.push(Token { stream, id: b'a'.into(), ..Token::default() });
                                if order.tokens_max == 1 {
                                    frame.ends.push(End { stream, finish: Finish::Length as i32 });
                                } else {
                                    streams.push(Stream { id: stream, position: 1, tokens_max: order.tokens_max });
                                }
                            }
                            Some(_) => continue,
                        },
                        _ = steps.tick(), if !streams.is_empty() => {
                            for s in &mut streams {
                                frame.tokens.push(Token {
                                    stream: s.id,
                                    position: s.position,
                                    id: b'a'.into(),
                                    ..Token::default()
                                });
                                s.position += 1;
                                if s.position == s.tokens_max {
                                    frame.ends.push(End { stream: s.id, finish: Finish::Length as i32 });
                                }
                            }
                            streams.retain(|s| s.position < s.tokens_max);
                            sent.lock().push(clock::now());
                        }
                    }
                    writer.send(&frame).await.unwrap();
                }
            });
        }
    });
}

struct Client {
    socket: BufReader<TcpStream>,
    line: Vec<u8>,
}

impl Client {
    async fn connect(address: &str) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket: BufReader::new(socket), line: Vec::new() }
    }

    async fn ask(&mut self, tokens: u32) {
        let body = json!({
            "model": "tiny", "stream": true, "max_tokens": tokens,
            "messages": [{ "role": "user", "content": "What is the capital of France, and since when?" }],
        })
        .to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.socket.write_all((head + &body).as_bytes()).await.unwrap();
    }

    /// Reads a line; whether it has a token.
    async fn line(&mut self) -> bool {
        self.line.clear();
        assert!(
            self.socket.read_until(b'\n', &mut self.line).await.unwrap() > 0,
            "the gateway closed the connection"
        );
        contains(&self.line, b"\"content\":\"a")
    }

    async fn first_token(&mut self) {
        while !self.line().await {}
    }

    async fn rest(&mut self) {
        while !self.line.starts_with(b"data: [DONE]") {
            self.line().await;
        }
        // Blank line, end of the chunk, last chunk.
        let mut end = Vec::new();
        while !end.ends_with(b"0\r\n\r\n") {
            end.push(self.socket.read_u8().await.unwrap());
        }
        self.line.clear();
    }

    /// When each token after the first came.
    async fn token_times(&mut self) -> Vec<clock::Instant> {
        let mut times = Vec::new();
        self.first_token().await;
        while !self.line.starts_with(b"data: [DONE]") {
            if self.line().await {
                times.push(clock::now());
            }
        }
        times
    }
}

fn contains(line: &[u8], needle: &[u8]) -> bool {
    line.windows(needle.len()).any(|window| window == needle)
}

/// CPU time of a process: nanoseconds on a core, of all its threads.
fn cpu(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}
