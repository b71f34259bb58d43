//! A finished request as a tree of spans, for whoever collects them. Never a word of a prompt or an answer.

use std::time::Duration;

use axum::http::HeaderMap;
use stoker_types::{ModelName, Period, PhaseTime, RequestId, TierBytes};

use crate::timeline::RequestTimeline;

/// Longest `traceparent` or `tracestate` that is taken over, bytes: what the recommendation says must be passed on.
const HEADER_MAX: usize = 512;

/// Collects finished requests.
pub trait Traces: Send + Sync + 'static {
    /// Whether such a request is wanted; if not, nothing is gathered for it.
    fn wants(&self, cold: bool) -> bool;

    /// A request has ended. Called where the request ran: must return at once.
    fn ended(&self, trace: RequestTrace);
}

/// Wants no request.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTraces;

/// A request that has ended.
#[derive(Debug, Clone)]
pub struct RequestTrace {
    /// Its id.
    pub request: RequestId,
    /// Which part of the API.
    pub route: &'static str,
    /// Which model.
    pub model: ModelName,
    /// The answer was streamed.
    pub stream: bool,
    /// HTTP status; 499: the client left.
    pub status: u16,
    /// `ok`, or the error's code.
    pub outcome: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Generated tokens.
    pub output_tokens: u32,
    /// It waited for a start of the model.
    pub cold: bool,
    /// From its arrival to its end.
    pub period: Period,
    /// From its arrival to its first token.
    pub first_token: Option<Duration>,
    /// Parsing, template, tokeniser.
    pub prepare: Option<Period>,
    /// The start's phases and its own, in order. What it waited for may have begun before it came.
    pub phases: Vec<PhaseTime>,
    /// From its first token to its last.
    pub decode: Option<Period>,
    /// Where the start's bytes came from.
    pub bytes: Vec<TierBytes>,
    /// The span that it is part of, as the client sent it.
    pub parent: Option<ParentSpan>,
}

/// W3C trace context, not yet looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentSpan {
    /// The `traceparent` header.
    pub traceparent: String,
    /// The `tracestate` header.
    pub tracestate: Option<String>,
}

impl Traces for NoTraces {
    fn wants(&self, _: bool) -> bool {
        false
    }

    fn ended(&self, _: RequestTrace) {}
}

// === impl RequestTrace ===

impl RequestTrace {
    /// Takes over what a request's timeline says.
    pub(crate) fn with(mut self, timeline: RequestTimeline) -> Self {
        let RequestTimeline { prepared, queued: _, cold, phases, first_token } = timeline;
        let began = self.period.began;
        self.prepare = Some(Period { began, ended: began + prepared });
        self.cold = cold;
        self.phases = phases.phases;
        self.bytes = phases.bytes;
        self.first_token = first_token;
        self
    }
}

// === impl ParentSpan ===

impl ParentSpan {
    /// What the client says of its span, if it says anything.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| {
            let value = headers.get(name)?.to_str().ok()?;
            (value.len() <= HEADER_MAX).then(|| value.to_owned())
        };
        Some(Self { traceparent: text("traceparent")?, tracestate: text("tracestate") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_headers_are_bounded() {
        let of = |pairs: &[(&'static str, String)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().unwrap());
            }
            ParentSpan::of(&headers)
        };
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned();
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("traceparent", "x".repeat(513))]), None);
        let found =
            of(&[("traceparent", parent.clone()), ("tracestate", "y".repeat(513))]).expect("it is there");
        assert_eq!(found, ParentSpan { traceparent: parent, tracestate: None });
    }
}
