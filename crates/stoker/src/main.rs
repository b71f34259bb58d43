//! The `stoker` binary: commands, configuration, and the wiring of the roles.

mod cli;
mod client;
mod config;
mod output;

use clap::Parser as _;

fn main() {
    let cli = cli::Cli::parse();
    let environment = config::Environment::of_process();
    let _ = config::Config::load(cli.overrides(), &environment);
}
