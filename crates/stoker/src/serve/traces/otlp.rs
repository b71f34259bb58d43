//! Traces to an OpenTelemetry collector: OTLP, protobuf over HTTP. Endpoint, headers, time limits, sampling, batches and
//! resource attributes follow the standard `OTEL_*` variables, which the library reads.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{Span as _, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};
use stoker_gateway::{ParentSpan, RequestTrace};
use stoker_types::{Period, PhaseTime};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Requests that may wait to become spans.
const QUEUE_MAX: usize = 1024;

/// What one export may take, and what the last one at a shutdown may.
const EXPORT_MAX: Duration = Duration::from_secs(10);
const LAST_EXPORT_MAX: Duration = Duration::from_secs(3);

/// Makes spans of finished requests, on a task of its own, and sends them in batches, from a thread of its own.
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Sends on the runtime, for a thread that isn't one of its own.
#[derive(Debug)]
struct OnRuntime {
    client: reqwest::Client,
    runtime: Handle,
}

/// The headers of a request as the propagator reads them.
struct Carrier<'a>(&'a ParentSpan);

pub(super) fn count_dropped() {
    metrics::counter!("stoker_traces_dropped_total").increment(1);
}

// === impl Exporter ===

impl Exporter {
    /// Begins to export what is sent to the returned queue.
    ///
    /// # Errors
    /// When the collector's address makes no sense.
    pub(crate) fn start(service: Option<&str>) -> anyhow::Result<(mpsc::Sender<RequestTrace>, Self)> {
        let client = stoker_registry::http_client(EXPORT_MAX)?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_http_client(OnRuntime { client, runtime: Handle::current() })
            .build()
            .context("exporting traces (OTEL_EXPORTER_OTLP_ENDPOINT)")?;
        let mut resource =
            Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if let Some(service) = service {
            resource = resource.with_service_name(service.to_owned());
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        let (sender, mut queue) = mpsc::channel(QUEUE_MAX);
        let stop = CancellationToken::new();
        let (tracer, stopped) = (provider.tracer("stoker"), stop.clone());
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    // What is there at the end still goes.
                    biased;
                    trace = queue.recv() => match trace {
                        Some(trace) => emit(&tracer, &trace),
                        None => return,
                    },
                    () = stopped.cancelled() => return,
                }
            }
        });
        Ok((sender, Self { provider, stop, task }))
    }

    /// Sends what is left, for a bounded time. No request runs any more.
    pub(crate) async fn stop(self) {
        let Self { provider, stop, task } = self;
        stop.cancel();
        if let Err(error) = task.await {
            tracing::warn!(%error, "the export of traces ended badly");
        }
        // Waits for its thread, whose requests this runtime sends.
        let last = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_EXPORT_MAX));
        match last.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last traces were not exported"),
            Err(error) => tracing::warn!(%error, "the last traces were not exported"),
        }
    }
}

/// A request as a span with its steps as children. Times are those at which things happened.
fn emit(tracer: &SdkTracer, trace: &RequestTrace) {
    let parent = trace.parent.as_ref().map_or_else(Context::new, |parent| {
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Carrier(parent))
    });
    let mut attributes = vec![
        KeyValue::new("stoker.request.id", trace.request.to_string()),
        KeyValue::new("stoker.outcome", trace.outcome),
        KeyValue::new("stoker.cold", trace.cold),
        KeyValue::new("stoker.stream", trace.stream),
        KeyValue::new("gen_ai.operation.name", trace.route),
        KeyValue::new("gen_ai.request.model", trace.model.to_string()),
        KeyValue::new("gen_ai.usage.input_tokens", i64::from(trace.prompt_tokens)),
        KeyValue::new("gen_ai.usage.output_tokens", i64::from(trace.output_tokens)),
        KeyValue::new("http.response.status_code", i64::from(trace.status)),
    ];
    if let Some(time) = trace.first_token {
        attributes.push(KeyValue::new("stoker.first_token_ms", ms(time)));
    }
    for tier in &trace.bytes {
        let bytes = i64::try_from(tier.bytes.bytes()).unwrap_or(i64::MAX);
        attributes.push(KeyValue::new(format!("stoker.bytes.{}", tier.tier.name()), bytes));
    }
    let mut request = tracer
        .span_builder("request")
        .with_kind(SpanKind::Server)
        .with_start_time(at(trace.period.began))
        .with_attributes(attributes)
        .start_with_context(tracer, &parent);
    if trace.status >= 500 || (trace.status == 200 && trace.outcome != "ok") {
        request.set_status(Status::error(trace.outcome));
    }
    let within = parent.with_remote_span_context(request.span_context().clone());
    let step = |name: &'static str, period: Period, attributes: Vec<KeyValue>| {
        tracer
            .span_builder(name)
            .with_start_time(at(period.began))
            .with_attributes(attributes)
            .start_with_context(tracer, &within)
            .end_with_timestamp(at(period.ended));
    };
    if let Some(period) = trace.prepare {
        step("prepare", period, Vec::new());
    }
    for PhaseTime { phase, predicted, actual, period } in &trace.phases {
        let Some(period) = *period else { continue };
        let mut attributes = vec![KeyValue::new("stoker.actual_ms", ms(*actual))];
        attributes.extend(predicted.map(|time| KeyValue::new("stoker.predicted_ms", ms(time))));
        step(phase.name(), period, attributes);
    }
    if let Some(period) = trace.decode {
        step("decode", period, Vec::new());
    }
    request.end_with_timestamp(at(trace.period.ended));
}

fn at(since_epoch: Duration) -> SystemTime {
    UNIX_EPOCH + since_epoch
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

// === impl OnRuntime, Carrier ===

#[async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        // The timer too belongs to the runtime.
        let sent = self
            .runtime
            .spawn(async move { tokio::time::timeout(EXPORT_MAX, client.send_bytes(request)).await });
        sent.await??
    }
}

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(&self.0.traceparent),
            "tracestate" => self.0.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}
