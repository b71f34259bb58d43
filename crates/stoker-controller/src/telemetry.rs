//! The controller's metrics.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use stoker_scheduler::residency::StopReason;
use stoker_types::{Refusal, StartFailure};

const STARTS: &str = "stoker_controller_starts_total";
const STOPS: &str = "stoker_controller_stops_total";
const LOST: &str = "stoker_controller_instances_lost_total";
const DECISION: &str = "stoker_controller_decision_seconds";
const WAITING: &str = "stoker_controller_queue_waiting";
const WAIT: &str = "stoker_controller_queue_wait_seconds";
const REFUSALS: &str = "stoker_controller_refusals_total";
const PREDICTION: &str = "stoker_controller_start_prediction_error_seconds";
const START: &str = "stoker_controller_start_seconds";
const INSTANCES: &str = "stoker_controller_instances";

pub(crate) fn describe() {
    describe_counter!(STARTS, "Starts that ended, by result");
    describe_counter!(STOPS, "Instances told to stop, by reason");
    describe_counter!(LOST, "Instances whose worker died");
    describe_histogram!(DECISION, metrics::Unit::Seconds, "Time of one residency decision");
    describe_gauge!(WAITING, "Requests that wait for a seat");
    describe_histogram!(WAIT, metrics::Unit::Seconds, "How long requests waited for their seat");
    describe_counter!(REFUSALS, "Requests that got no seat, by kind");
    describe_histogram!(PREDICTION, metrics::Unit::Seconds, "Difference of a start's time and its estimate");
    describe_histogram!(START, metrics::Unit::Seconds, "Time from a start's order until it was ready");
    describe_gauge!(INSTANCES, "Instances that hold memory");
}

pub(crate) fn started(took: Duration, predicted: Duration) {
    counter!(STARTS, "result" => "ok").increment(1);
    histogram!(START).record(took);
    histogram!(PREDICTION).record(took.abs_diff(predicted));
}

pub(crate) fn start_failed(failure: &StartFailure) {
    let result = match failure {
        StartFailure::UnknownModel { .. } => "unknown_model",
        StartFailure::NotRunnable { .. } => "not_runnable",
        StartFailure::OutOfMemory { .. } => "out_of_memory",
        StartFailure::Corrupt { .. } => "corrupt",
        StartFailure::Changed { .. } => "changed",
        StartFailure::Read { .. } => "read",
        StartFailure::Worker { .. } => "worker",
        StartFailure::Cancelled { .. } => "cancelled",
        StartFailure::StaleOrder { .. } => "stale_order",
    };
    counter!(STARTS, "result" => result).increment(1);
}

pub(crate) fn stopped(reason: StopReason) {
    let reason = match reason {
        StopReason::KeepAlive => "keep_alive",
        StopReason::Room { .. } => "room",
        StopReason::Unload => "unload",
    };
    counter!(STOPS, "reason" => reason).increment(1);
}

pub(crate) fn lost() {
    counter!(LOST).increment(1);
}

pub(crate) fn decided(took: Duration) {
    histogram!(DECISION).record(took);
}

pub(crate) fn waiting(count: usize) {
    gauge!(WAITING).set(u32::try_from(count).unwrap_or(u32::MAX));
}

pub(crate) fn instances(count: usize) {
    gauge!(INSTANCES).set(u32::try_from(count).unwrap_or(u32::MAX));
}

pub(crate) fn waited(time: Duration) {
    histogram!(WAIT).record(time);
}

pub(crate) fn refused(refusal: &Refusal) {
    let kind = match refusal {
        Refusal::QueueFull { .. } => "queue_full",
        Refusal::NotInTime { .. } => "not_in_time",
        Refusal::Start(_) => "start",
        Refusal::TooLarge { .. } => "too_large",
        Refusal::ShuttingDown => "shutting_down",
    };
    counter!(REFUSALS, "kind" => kind).increment(1);
}
