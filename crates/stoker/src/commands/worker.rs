//! `stoker worker`: the inference process.

use std::process::ExitCode;

use crate::cli::WorkerArgs;

/// Runs until the node says so or is gone.
pub(crate) fn run(args: &WorkerArgs) -> ExitCode {
    let standin = args.standin.then_some(stoker_worker::StandIn { step_time: std::time::Duration::ZERO });
    let WorkerArgs { threads, device, .. } = *args;
    stoker_worker::run(stoker_worker::WorkerArgs { threads, device, standin, ..Default::default() })
}
