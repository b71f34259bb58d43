//! Where a request's time went, as clients can ask for it.

use std::time::Duration;

use serde_json::{Map, Value, json};
use stoker_types::{Period, Phase, SeatInfo, Timeline, clock};

use crate::telemetry::ms;

/// Header of every answer that isn't streamed: phases and their times as compact JSON. As a request header of a streamed
/// request it asks for a comment line `: x-stoker-timeline {...}` before `[DONE]`.
pub const TIMELINE: &str = "x-stoker-timeline";
/// Header: milliseconds that the request waited for its seat. Absent on a stream whose head was sent before.
pub const QUEUED_MS: &str = "x-stoker-queued-ms";

/// The phases between a request's arrival and its first token.
#[derive(Debug, Clone, Default)]
pub(crate) struct RequestTimeline {
    /// Parsing, template, tokeniser.
    pub(crate) prepared: Duration,
    /// Waiting for a seat.
    pub(crate) queued: Duration,
    /// Whether that included a start of the model.
    pub(crate) cold: bool,
    /// The start's phases, then the request's own.
    pub(crate) phases: Timeline,
    /// From arrival to the first token.
    pub(crate) first_token: Option<Duration>,
}

/// What the engine says of a sequence before its first token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineBegun {
    /// For its turn.
    pub(crate) waited: Duration,
    /// In the prompt's forward pass.
    pub(crate) prefill: Duration,
    /// When it said so, which it does as soon as the pass is over: wall clock, since the Unix epoch.
    pub(crate) told_at: Duration,
}

// === impl RequestTimeline ===

impl RequestTimeline {
    /// A seat was granted.
    pub(crate) fn seated(&mut self, info: &SeatInfo) {
        self.queued += info.queued;
        self.cold |= info.cold_start.is_some();
        if let Some(start) = &info.cold_start {
            self.phases = start.clone();
        }
        if self.phases.actual(Phase::Queued).is_none() {
            self.phases.record(Phase::Queued, None, info.queued);
            self.phases.place(Phase::Queued, Period::until(clock::wall(), info.queued));
        }
    }

    /// The first token is there.
    pub(crate) fn first_token(
        &mut self,
        since_arrival: Duration,
        since_seat: Duration,
        begun: Option<EngineBegun>,
    ) {
        let now = clock::wall();
        let EngineBegun { waited, prefill, told_at } =
            begun.unwrap_or(EngineBegun { waited: Duration::ZERO, prefill: Duration::ZERO, told_at: now });
        self.phases.record(Phase::Prefill, None, prefill);
        self.phases.place(Phase::Prefill, Period::until(told_at, prefill));
        self.phases.record(Phase::FirstToken, None, since_seat.saturating_sub(waited + prefill));
        self.phases.place(Phase::FirstToken, Period { began: told_at, ended: now.max(told_at) });
        self.first_token = Some(since_arrival);
    }

    /// Compact JSON, ASCII.
    pub(crate) fn json(&self) -> String {
        let phases: Map<String, Value> = self
            .phases
            .phases
            .iter()
            .map(|p| {
                let mut value = json!({ "ms": ms(p.actual) });
                if let Some(predicted) = p.predicted {
                    value["predicted_ms"] = ms(predicted).into();
                }
                (p.phase.name().to_owned(), value)
            })
            .collect();
        let bytes: Map<String, Value> = self
            .phases
            .bytes
            .iter()
            .map(|b| {
                let tier = serde_json::to_value(b.tier).unwrap_or_default();
                (tier.as_str().unwrap_or_default().to_owned(), b.bytes.bytes().into())
            })
            .collect();
        json!({
            "cold": self.cold,
            "prepared_ms": ms(self.prepared),
            "queued_ms": ms(self.queued),
            "first_token_ms": self.first_token.map(ms),
            "phases": phases,
            "bytes": bytes,
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_is_a_header_value() {
        let mut timeline = RequestTimeline::default();
        timeline.phases.record(
            Phase::SsdRead,
            Some(Duration::from_millis(60)),
            Duration::from_micros(59_123),
        );
        timeline.first_token(Duration::from_millis(80), Duration::from_millis(10), None);
        let json = timeline.json();
        assert_eq!(
            json,
            r#"{"cold":false,"prepared_ms":0.0,"queued_ms":0.0,"first_token_ms":80.0,"phases":{"ssd_read":{"ms":59.123,"predicted_ms":60.0},"prefill":{"ms":0.0},"first_token":{"ms":10.0}},"bytes":{}}"#
        );
        assert!(axum::http::HeaderValue::from_str(&json).is_ok());
    }
}
