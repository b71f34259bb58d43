//! One log line and a few metrics for each request. Never a word of a prompt or an answer.

use std::{sync::Arc, time::Duration};

use axum::http::HeaderMap;
use parking_lot::Mutex;
use stoker_types::{ClientId, ModelName, Period, PhaseTime, RequestId, clock};
use tokio::time::Instant;
use tracing::{Span, field};

use crate::{
    timeline::RequestTimeline,
    trace::{ParentSpan, RequestTrace, Traces},
};

/// What is known of a request; logged when the last copy is dropped, so after the response's last byte was given to
/// the connection, or when the client has gone away.
#[derive(Clone)]
pub(crate) struct Access(Arc<Mutex<Record>>);

struct Record {
    request: RequestId,
    route: &'static str,
    received: Instant,
    client: Option<ClientId>,
    model: Option<ModelName>,
    stream: bool,
    status: Option<u16>,
    code: Option<&'static str>,
    prompt_tokens: u32,
    output_tokens: u32,
    sequences: u32,
    queued: Option<Duration>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    finished: bool,
    timeline: Option<RequestTimeline>,
    parent: Option<ParentSpan>,
    span: Span,
    traces: Arc<dyn Traces>,
}

/// Tells the metrics recorder what the gateway's metrics mean.
pub(crate) fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_gauge!("stoker_gateway_connections", "Open client connections");
    describe_gauge!("stoker_gateway_requests_in_flight", "Requests whose response has not ended");
    describe_counter!(
        "stoker_gateway_requests_total",
        "Requests by route, status (499: the client left) and outcome"
    );
    describe_counter!("stoker_gateway_seat_retries_total", "Seats that were gone before their request began");
    describe_counter!("stoker_gateway_prompt_tokens_total", "Tokens of prompts");
    describe_counter!("stoker_gateway_output_tokens_total", "Generated tokens");
    describe_histogram!("stoker_gateway_queue_seconds", Unit::Seconds, "Wait for a seat");
    describe_histogram!("stoker_gateway_ttft_seconds", Unit::Seconds, "From arrival to the first token");
    describe_histogram!(
        "stoker_gateway_tpot_seconds",
        Unit::Seconds,
        "Between tokens of a sequence, mean of a request"
    );
}

// === impl Access ===

impl Access {
    pub(crate) fn new(
        request: RequestId,
        route: &'static str,
        received: Instant,
        traces: Arc<dyn Traces>,
        headers: &HeaderMap,
    ) -> Self {
        let span = tracing::debug_span!(
            "request",
            request_id = %request,
            route,
            model = field::Empty,
            prompt_tokens = field::Empty
        );
        let parent = traces.wants(false).then(|| ParentSpan::of(headers)).flatten();
        metrics::gauge!("stoker_gateway_requests_in_flight").increment(1);
        Self(Arc::new(Mutex::new(Record {
            request,
            route,
            received,
            client: None,
            model: None,
            stream: false,
            status: None,
            code: None,
            prompt_tokens: 0,
            output_tokens: 0,
            sequences: 0,
            queued: None,
            first_token: None,
            last_token: None,
            finished: false,
            timeline: None,
            parent,
            span,
            traces,
        })))
    }

    pub(crate) fn request(&self) -> RequestId {
        self.0.lock().request.clone()
    }

    /// The request's span, for what is logged on its way.
    pub(crate) fn span(&self) -> Span {
        self.0.lock().span.clone()
    }

    pub(crate) fn received(&self) -> Instant {
        self.0.lock().received
    }

    pub(crate) fn set_client(&self, client: ClientId) {
        self.0.lock().client = Some(client);
    }

    pub(crate) fn set_model(&self, model: &ModelName, stream: bool) {
        let mut record = self.0.lock();
        record.span.record("model", model.as_str());
        record.model = Some(model.clone());
        record.stream = stream;
    }

    /// The response's head. It is the whole story unless a stream follows.
    pub(crate) fn set_status(&self, status: u16, code: Option<&'static str>) {
        let mut record = self.0.lock();
        record.status = Some(status);
        record.code = code;
        record.finished |= !(record.stream && status == 200);
    }

    pub(crate) fn set_queued(&self, queued: Duration) {
        self.0.lock().queued = Some(queued);
    }

    pub(crate) fn set_tokens(&self, prompt: u32, output: u32, first: Option<Instant>, last: Option<Instant>) {
        let mut record = self.0.lock();
        record.span.record("prompt_tokens", prompt);
        record.prompt_tokens = prompt;
        record.output_tokens = output;
        record.first_token = first;
        record.last_token = last;
    }

    pub(crate) fn set_timeline(&self, timeline: RequestTimeline) {
        self.0.lock().timeline = Some(timeline);
    }

    pub(crate) fn set_sequences(&self, sequences: u32) {
        self.0.lock().sequences = sequences;
    }

    /// A stream's end, as its client saw it.
    pub(crate) fn set_finished(&self, code: Option<&'static str>) {
        let mut record = self.0.lock();
        record.finished = true;
        record.code = code.or(record.code);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        metrics::gauge!("stoker_gateway_requests_in_flight").decrement(1);
        // 499: the client was gone before the end, nginx's number for it.
        let status = if self.finished { self.status.unwrap_or(499) } else { 499 };
        let outcome = match (self.finished, self.code) {
            (false, _) => "client_gone",
            (true, Some(code)) => code,
            (true, None) => "ok",
        };
        let ttft = self.first_token.map(|at| at - self.received);
        let total = self.received.elapsed();
        let model = self.model.as_ref().map_or("", |m| m.as_str());
        metrics::counter!(
            "stoker_gateway_requests_total",
            "route" => self.route, "status" => status.to_string(), "outcome" => outcome
        )
        .increment(1);
        if let Some(name) = &self.model {
            let name = || name.to_string();
            metrics::counter!("stoker_gateway_prompt_tokens_total", "model" => name())
                .increment(self.prompt_tokens.into());
            metrics::counter!("stoker_gateway_output_tokens_total", "model" => name())
                .increment(self.output_tokens.into());
            if let Some(queued) = self.queued {
                metrics::histogram!("stoker_gateway_queue_seconds", "model" => name()).record(queued);
            }
            if let Some(ttft) = ttft {
                metrics::histogram!("stoker_gateway_ttft_seconds", "model" => name()).record(ttft);
            }
            // The time between two tokens of a sequence, on average; sequences of one request run side by side.
            let steps = self.output_tokens.saturating_sub(self.sequences);
            if let (Some(first), Some(last)) = (self.first_token, self.last_token)
                && steps > 0
            {
                let tpot = (last - first) * self.sequences / steps;
                metrics::histogram!("stoker_gateway_tpot_seconds", "model" => name()).record(tpot);
            }
        }
        tracing::info!(
            target: "stoker::access",
            request_id = %self.request,
            route = self.route,
            client = self.client.as_ref().map(tracing::field::display),
            model,
            stream = self.stream,
            status,
            outcome,
            prompt_tokens = self.prompt_tokens,
            output_tokens = self.output_tokens,
            queued_ms = self.queued.map(ms),
            ttft_ms = ttft.map(ms),
            total_ms = ms(total),
        );
        self.trace(status, outcome, total);
    }
}

impl Record {
    /// The request as spans: in the log, and for who collects them.
    fn trace(&mut self, status: u16, outcome: &'static str, total: Duration) {
        let timeline = self.timeline.take();
        if let Some(timeline) = &timeline {
            let _entered = self.span.enter();
            for PhaseTime { phase, predicted, actual, .. } in &timeline.phases.phases {
                tracing::debug!(
                    target: "stoker::phase",
                    phase = phase.name(),
                    ms = ms(*actual),
                    predicted_ms = predicted.map(ms)
                );
            }
        }
        // Only requests that came as far as a model are of interest there.
        let Some(model) = self.model.take() else { return };
        if !self.traces.wants(timeline.as_ref().is_some_and(|timeline| timeline.cold)) {
            return;
        }
        let period = Period::until(clock::wall(), total);
        let at = |instant: Instant| period.began + (instant - self.received);
        let trace = RequestTrace {
            request: self.request.clone(),
            route: self.route,
            model,
            stream: self.stream,
            status,
            outcome,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            cold: false,
            period,
            first_token: None,
            prepare: None,
            phases: Vec::new(),
            decode: self
                .first_token
                .zip(self.last_token)
                .map(|(first, last)| Period { began: at(first), ended: at(last) }),
            bytes: Vec::new(),
            parent: self.parent.take(),
        };
        self.traces.ended(match timeline {
            Some(timeline) => trace.with(timeline),
            None => trace,
        });
    }
}

/// Milliseconds, to the microsecond.
pub(crate) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
