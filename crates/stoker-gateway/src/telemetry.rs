//! One log line and a few metrics for each request. Never a word of a prompt or an answer.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use stoker_types::{ClientId, ModelName, RequestId};
use tokio::time::Instant;

/// What is known of a request; logged when the last copy is dropped, so after the response's last byte was given to
/// the connection, or when the client has gone away.
#[derive(Debug, Clone)]
pub(crate) struct Access(Arc<Mutex<Record>>);

#[derive(Debug)]
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
    pub(crate) fn new(request: RequestId, route: &'static str, received: Instant) -> Self {
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
        })))
    }

    pub(crate) fn request(&self) -> RequestId {
        self.0.lock().request.clone()
    }

    pub(crate) fn received(&self) -> Instant {
        self.0.lock().received
    }

    pub(crate) fn set_client(&self, client: ClientId) {
        self.0.lock().client = Some(client);
    }

    pub(crate) fn set_model(&self, model: &ModelName, stream: bool) {
        let mut record = self.0.lock();
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
        record.prompt_tokens = prompt;
        record.output_tokens = output;
        record.first_token = first;
        record.last_token = last;
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
    }
}

/// Milliseconds, to the microsecond.
pub(crate) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
