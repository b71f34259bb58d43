//! `stoker keeper`: the process that holds what is in memory when the server is killed.

use std::{os::fd::AsFd as _, process::ExitCode, time::Duration};

use anyhow::Context as _;
use stoker_node::keeper::{Limits, Listener, serve};

use crate::{
    cli::KeeperArgs,
    config::{Dirs, Environment},
};

/// Keeps until nobody needs it. No runtime, no log, no thread: whoever wants to know anything asks the server.
pub(crate) fn run(args: &KeeperArgs, environment: &Environment) -> anyhow::Result<ExitCode> {
    // Out of the server's process group and session: what ends those doesn't end this. Refused to a group's leader, as
    // which a shell or a service manager starts it: then it is apart already.
    let _ = rustix::process::setsid();
    let listener = if args.inherited {
        let input = std::io::stdin().as_fd().try_clone_to_owned().context("taking the socket over")?;
        Listener::inherited(input).context("standard input is for the server to give")?
    } else {
        let dirs = Dirs::find(environment)?;
        dirs.prepare_runtime()?;
        Listener::bind(&dirs.keeper_socket())?
    };
    let limits = Limits { patience: Duration::from_secs(args.patience_s), ..Limits::default() };
    serve(&listener, limits).context("the keeper's socket")?;
    Ok(ExitCode::SUCCESS)
}
