//! A real server's traces, as a real collector gets them: OTLP over HTTP, decoded here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use parking_lot::Mutex;
use prost::Message as _;
use serde_json::{Value as Json, json};

/// Longer than anything here takes on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A collector that keeps what it gets.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(Bytes, HeaderMap)>>>);

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        let collector = Self::default();
        let take = async |State(collector): State<Self>, headers: HeaderMap, body: Bytes| {
            collector.0.lock().push((body, headers));
        };
        let router = Router::new().route("/v1/traces", post(take)).with_state(collector.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (collector, address)
    }

    /// Every span, with its resource's `service.name`.
    fn spans(&self) -> Vec<(String, Span)> {
        let mut spans = Vec::new();
        for (body, _) in &*self.0.lock() {
            let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
            for resource in request.resource_spans {
                let service = text(&resource.resource.unwrap().attributes, "service.name");
                for scope in resource.scope_spans {
                    spans.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
                }
            }
        }
        spans
    }
}

/// A `stoker serve` with one tiny model, killed when it is dropped.
struct Server {
    process: Child,
    address: String,
    http: reqwest::Client,
    _home: tempfile::TempDir,
}

impl Server {
    fn start(environment: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny-llama");
        let config = home.path().join("stoker.toml");
        std::fs::write(&config, format!("[models.tiny]\npath = \"{}\"\n", model.display())).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_stoker"))
            .args(["serve", "--listen", "127.0.0.1:0", "--dram", "256MiB", "--kv", "64MiB"])
            .env_clear()
            .env("HOME", home.path())
            .env("XDG_RUNTIME_DIR", home.path())
            .env("STOKER_CONFIG", &config)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let line = BufReader::new(process.stdout.take().unwrap()).lines().next().unwrap().unwrap();
        let address = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
        let http = stoker_registry::http_client(PATIENCE).unwrap();
        Self { process, address, http, _home: home }
    }

    /// Asks, and returns the response's timeline.
    async fn ask(&self, prompt: &str, headers: &[(&str, &str)]) -> Json {
        let body = json!({ "model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0 });
        let mut request = self.http.post(format!("{}/completions", self.address)).body(body.to_string());
        request = request.header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = tokio::time::timeout(PATIENCE, request.send()).await.unwrap().unwrap();
        assert_eq!(response.status(), 200);
        let timeline = response.headers()["x-stoker-timeline"].to_str().unwrap().to_owned();
        serde_json::from_str(&timeline).unwrap()
    }

    /// An orderly stop. Returns how long it took.
    async fn stop(mut self) -> Duration {
        let began = tokio::time::Instant::now();
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let stopping = async {
            loop {
                if let Some(status) = self.process.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, stopping).await.expect("it does not stop").success());
        began.elapsed()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing to kill after an orderly stop.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    attributes.iter().find(|kv| kv.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text.clone(),
        other => panic!("{key} is {other:?}"),
    }
}

fn number(attributes: &[KeyValue], key: &str) -> f64 {
    match value(attributes, key) {
        Some(Value::IntValue(n)) => f64::from(i32::try_from(*n).unwrap()),
        Some(Value::DoubleValue(n)) => *n,
        other => panic!("{key} is {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of a few seconds")]
fn length_ms(span: &Span) -> f64 {
    (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e6
}

#[tokio::test]
async fn a_cold_request_is_a_tree_of_spans_with_true_times() {
    let (collector, address) = Collector::start().await;
    let endpoint = format!("http://{address}");
    let server = Server::start(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_SERVICE_NAME", "box-7"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=somebody"),
    ]);
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let parent = format!("00-{trace}-{span}-01");
    let cold = server.ask("secret prompt", &[("traceparent", &parent)]).await;
    let warm = server.ask("secret prompt", &[]).await;
    // The caller doesn't record its trace, so we don't either.
    let unsampled = format!("00-{}-{span}-00", "a".repeat(32));
    server.ask("secret prompt", &[("traceparent", &unsampled)]).await;
    server.stop().await;

    assert!(cold["cold"] == true && warm["cold"] == false, "{cold} {warm}");
    for (body, headers) in &*collector.0.lock() {
        assert_eq!(
            (&headers["content-type"], &headers["x-tenant"]),
            (&"application/x-protobuf".parse().unwrap(), &"somebody".parse().unwrap())
        );
        assert!(!body.windows(6).any(|window| window == b"secret"), "a prompt leaves the machine");
    }
    let spans = collector.spans();
    assert!(spans.iter().all(|(service, _)| service == "box-7"));
    let roots: Vec<&Span> =
        spans.iter().map(|(_, span)| span).filter(|span| span.name == "request").collect();
    assert_eq!(roots.len(), 2, "{roots:?}");
    let children = |root: &Span| -> BTreeMap<String, Span> {
        let of = |span: &&Span| span.parent_span_id == root.span_id && span.trace_id == root.trace_id;
        spans.iter().map(|(_, s)| s).filter(of).map(|s| (s.name.clone(), s.clone())).collect()
    };

    let root = roots.iter().find(|root| hex(&root.trace_id) == trace).expect("the caller's trace goes on");
    assert_eq!((hex(&root.parent_span_id).as_str(), root.kind()), (span, SpanKind::Server));
    assert_eq!(text(&root.attributes, "gen_ai.request.model"), "tiny");
    assert_eq!(text(&root.attributes, "stoker.outcome"), "ok");
    assert_eq!(value(&root.attributes, "stoker.cold"), Some(&Value::BoolValue(true)));
    assert!(number(&root.attributes, "gen_ai.usage.input_tokens") >= 1.0);
    assert_eq!(number(&root.attributes, "gen_ai.usage.output_tokens"), 4.0);
    assert!(number(&root.attributes, "stoker.bytes.ssd") > 0.0);
    assert!(number(&root.attributes, "stoker.first_token_ms") <= length_ms(root));

    let steps = children(root);
    let names: Vec<&str> = steps.keys().map(String::as_str).collect();
    let expected = [
        "decode",
        "device_copy",
        "first_token",
        "init",
        "prefill",
        "prepare",
        "queued",
        "scheduled",
        "ssd_read",
        "verify",
    ];
    assert_eq!(names, expected);
    for (name, step) in &steps {
        assert!(step.start_time_unix_nano <= step.end_time_unix_nano, "{name}");
        // Whole microseconds may be lost on the way from one clock to the other.
        let slack = 2_000_000;
        assert!(
            step.start_time_unix_nano + slack >= root.start_time_unix_nano,
            "{name} began before its request"
        );
        assert!(step.end_time_unix_nano <= root.end_time_unix_nano + slack, "{name} outlasted its request");
        // The same numbers as in the answer's header.
        if let Some(told) = cold["phases"].get(name) {
            let actual = number(&step.attributes, "stoker.actual_ms");
            assert!((actual - told["ms"].as_f64().unwrap()).abs() < 0.001, "{name}: {actual} and {told}");
        }
    }
    for name in ["ssd_read", "device_copy", "init", "prefill", "scheduled"] {
        let (length, actual) = (length_ms(&steps[name]), number(&steps[name].attributes, "stoker.actual_ms"));
        assert!((length - actual).abs() < 0.01, "{name} lasted {length} ms, not {actual}");
    }
    // Decided, read, mapped, built, computed: each after the one before.
    let order = ["scheduled", "ssd_read", "device_copy", "init", "prefill", "decode"];
    for pair in order.windows(2) {
        let (first, second) = (&steps[pair[0]], &steps[pair[1]]);
        assert!(first.start_time_unix_nano <= second.start_time_unix_nano, "{} before {}", pair[0], pair[1]);
    }
    assert!(steps["ssd_read"].end_time_unix_nano <= steps["init"].end_time_unix_nano);

    let root = roots.iter().find(|root| hex(&root.trace_id) != trace).unwrap();
    assert!(root.parent_span_id.is_empty());
    let steps = children(root);
    let names: Vec<&str> = steps.keys().map(String::as_str).collect();
    assert_eq!(names, ["decode", "first_token", "prefill", "prepare", "queued"]);
}

#[tokio::test]
async fn a_collector_that_never_answers_costs_no_request_and_no_long_stop() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&held);
    tokio::spawn(async move {
        while let Ok((socket, _)) = silent.accept().await {
            keep.lock().push(socket);
        }
    });
    let server =
        Server::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "50")]);
    for _ in 0..20 {
        server.ask("x", &[]).await;
    }
    let took = server.stop().await;
    assert!(!held.lock().is_empty(), "it was asked");
    assert!(took < Duration::from_secs(20), "the stop took {took:?}");
}

#[tokio::test]
async fn disabled_is_disabled() {
    let (collector, address) = Collector::start().await;
    let endpoint = format!("http://{address}");
    let server = Server::start(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint), ("OTEL_SDK_DISABLED", "true")]);
    server.ask("x", &[]).await;
    server.stop().await;
    assert!(collector.0.lock().is_empty());
}
