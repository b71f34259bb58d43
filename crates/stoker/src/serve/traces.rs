//! Finished requests: the last cold ones are kept for `stoker explain`, all of them go to an OpenTelemetry collector if
//! there is one.

mod otlp;

use std::{collections::VecDeque, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use stoker_gateway::{RequestTrace, Traces};
use stoker_types::{ModelName, Phase, PhaseTime, TierBytes};
use tokio::sync::mpsc;

pub(crate) use otlp::Exporter;

/// Cold requests that are remembered.
const RECENT_MAX: usize = 64;

/// Collects finished requests.
pub(crate) struct RequestTraces {
    recent: Mutex<VecDeque<ColdRequest>>,
    /// To the exporter. When it is behind, traces are dropped and counted.
    export: Option<mpsc::Sender<RequestTrace>>,
}

/// A request that waited for its model's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ColdRequest {
    pub(crate) request: String,
    pub(crate) model: ModelName,
    /// When it arrived: seconds since the Unix epoch.
    pub(crate) arrived_s: f64,
    /// HTTP status.
    pub(crate) status: u16,
    pub(crate) outcome: String,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) total_ms: f64,
    pub(crate) phases: Vec<ColdPhase>,
    pub(crate) bytes: Vec<TierBytes>,
}

/// One phase of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ColdPhase {
    pub(crate) phase: Phase,
    pub(crate) ms: f64,
    pub(crate) predicted_ms: Option<f64>,
    /// Since the request arrived; before, when another request had caused the start.
    pub(crate) began_ms: Option<f64>,
}

// === impl RequestTraces ===

impl RequestTraces {
    pub(crate) fn new(export: Option<mpsc::Sender<RequestTrace>>) -> Self {
        Self { recent: Mutex::default(), export }
    }

    /// The last cold requests for which `wanted` is true, the newest first.
    pub(crate) fn recent(&self, wanted: impl Fn(&ColdRequest) -> bool) -> Vec<ColdRequest> {
        self.recent.lock().iter().rev().filter(|request| wanted(request)).cloned().collect()
    }
}

impl Traces for RequestTraces {
    fn wants(&self, cold: bool) -> bool {
        cold || self.export.is_some()
    }

    fn ended(&self, trace: RequestTrace) {
        if trace.cold {
            let cold = ColdRequest::of(&trace);
            let mut recent = self.recent.lock();
            if recent.len() == RECENT_MAX {
                recent.pop_front();
            }
            recent.push_back(cold);
        }
        if let Some(export) = &self.export
            && export.try_send(trace).is_err()
        {
            otlp::count_dropped();
        }
    }
}

// === impl ColdRequest ===

impl ColdRequest {
    fn of(trace: &RequestTrace) -> Self {
        let arrived = trace.period.began;
        let phase = |time: &PhaseTime| ColdPhase {
            phase: time.phase,
            ms: ms(time.actual),
            predicted_ms: time.predicted.map(ms),
            began_ms: time.period.map(|period| ms(period.began) - ms(arrived)),
        };
        Self {
            request: trace.request.to_string(),
            model: trace.model.clone(),
            arrived_s: arrived.as_secs_f64(),
            status: trace.status,
            outcome: trace.outcome.to_owned(),
            prompt_tokens: trace.prompt_tokens,
            output_tokens: trace.output_tokens,
            first_token_ms: trace.first_token.map(ms),
            total_ms: ms(trace.period.length()),
            phases: trace.phases.iter().map(phase).collect(),
            bytes: trace.bytes.clone(),
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use stoker_types::{Period, RequestId};

    use super::*;

    fn trace(number: usize, cold: bool) -> RequestTrace {
        let second = Duration::from_secs(1);
        RequestTrace {
            request: RequestId(format!("r{number}").into()),
            route: "chat",
            model: "m".parse().unwrap(),
            stream: false,
            status: 200,
            outcome: "ok",
            prompt_tokens: 3,
            output_tokens: 4,
            cold,
            period: Period { began: 100 * second, ended: 103 * second },
            first_token: Some(2 * second),
            prepare: None,
            phases: vec![PhaseTime {
                phase: Phase::SsdRead,
                predicted: None,
                actual: second,
                period: Some(Period { began: 99 * second, ended: 100 * second }),
            }],
            decode: None,
            bytes: Vec::new(),
            parent: None,
        }
    }

    #[test]
    fn the_last_cold_ones_are_kept_and_warm_ones_not_even_wanted() {
        let traces = RequestTraces::new(None);
        assert!(traces.wants(true) && !traces.wants(false));
        for number in 0..100 {
            traces.ended(trace(number, true));
        }
        let recent = traces.recent(|_| true);
        assert_eq!((recent.len(), recent[0].request.as_str()), (RECENT_MAX, "r99"));
        assert_eq!(traces.recent(|cold| cold.request == "r36").len(), 1);
        assert_eq!(traces.recent(|cold| cold.request == "r35").len(), 0);
        let phase = &recent[0].phases[0];
        assert_eq!((phase.ms, phase.began_ms), (1000.0, Some(-1000.0)), "it began for somebody else");
    }

    #[test]
    fn an_exporter_that_is_behind_blocks_nobody() {
        let (export, mut queue) = mpsc::channel(2);
        let traces = RequestTraces::new(Some(export));
        assert!(traces.wants(false));
        for number in 0..5 {
            traces.ended(trace(number, false));
        }
        assert_eq!(queue.try_recv().unwrap().request.to_string(), "r0");
        assert_eq!(queue.try_recv().unwrap().request.to_string(), "r1");
        assert!(queue.try_recv().is_err());
        assert!(traces.recent(|_| true).is_empty());
    }
}
