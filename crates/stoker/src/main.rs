//! The `stoker` binary: commands, configuration, and the wiring of the roles.

mod cli;
mod client;
mod commands;
mod config;
mod library;
mod log_writer;
mod output;
mod serve;

use std::process::ExitCode;

use clap::Parser as _;

use crate::{
    cli::{BenchCommand, Cli, Command, ConfigCommand},
    client::AdminClient,
    config::{Config, Environment},
    log_writer::LogThread,
    output::Output,
    serve::Variant,
};

/// A request is some hundred small allocations, which take a fifth of its CPU time with glibc's allocator and a
/// tenth of that with this one.
#[global_allocator]
static ALLOCATOR: stoker_io::Allocator = stoker_io::Allocator;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let environment = Environment::of_process();
    if let Command::Keeper(args) = &cli.command {
        return ended(commands::keeper::run(args, &environment));
    }
    let _log = init_logging(&cli, &environment);
    if let Command::Worker(args) = &cli.command {
        return commands::worker::run(args);
    }
    ended(run(cli, &environment))
}

fn ended(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    match outcome {
        Ok(code) => code,
        Err(error) => {
            // One line: what happened, and the causes behind it.
            tracing::debug!(?error, "failed");
            eprint_error(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last words of a command")]
fn eprint_error(error: &anyhow::Error) {
    eprintln!("stoker: {error:#}");
}

fn run(cli: Cli, environment: &Environment) -> anyhow::Result<ExitCode> {
    let config = Config::load(cli.overrides(), environment)?;
    let output = Output { json: cli.common.json };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let Command::Bench(BenchCommand::Schedule(args)) = &cli.command {
        commands::bench::schedule::run(args, cli.common.models.as_deref(), output)?;
        return Ok(ExitCode::SUCCESS);
    }
    runtime.block_on(execute(cli.command, config, output))
}

async fn execute(command: Command, config: Config, output: Output) -> anyhow::Result<ExitCode> {
    use commands::{chat, demo, explain, memory, models};

    let admin = AdminClient::new(config.dirs.admin_socket());
    match command {
        Command::Demo(args) => Box::pin(demo::run(&config, args, output)).await?,
        Command::Serve(args) => {
            Box::pin(commands::serve::run(&config, Variant { standin: args.standin, kept: true }, output))
                .await?;
        }
        Command::Run(args) => Box::pin(chat::run(&config, args, output)).await?,
        Command::Pull(args) => Box::pin(models::pull(&config, args, output)).await?,
        Command::Ls => models::ls(&config, output)?,
        Command::Ps => memory::ps(&admin, output).await?,
        Command::Explain(args) => explain::run(&admin, args.about, output).await?,
        Command::Show(args) => models::show(&config, &args.model, output)?,
        Command::Rm(args) => models::rm(&config, &args.model, output)?,
        Command::Pin(args) => memory::tell(&admin, "pin", "stays in memory", args.model, output).await?,
        Command::Unpin(args) => memory::tell(&admin, "unpin", "may make room", args.model, output).await?,
        Command::Preload(args) => memory::tell(&admin, "preload", "is ready", args.model, output).await?,
        Command::Unload(args) => memory::unload(&admin, args, output).await?,
        Command::Verify(args) => return models::verify(&config, &args.model, output).await,
        Command::Cache(command) => return commands::cache::run(&config, command, output).await,
        Command::Convert(args) => models::convert(&config, &args, output)?,
        Command::Pack(args) => commands::pack::run(&config, &args, output)?,
        Command::Config(ConfigCommand::Check) => commands::config::check(&config, output)?,
        Command::Devices => commands::devices::run(output)?,
        Command::Bench(BenchCommand::Load(args)) => {
            let dir = config.dirs.data.join("bench");
            if args.tier == cli::BenchFrom::Remote {
                return commands::bench::from_remote::with(&config, &args, &dir, output).await;
            }
            Box::pin(commands::bench::load::run(&args, &dir, |name| models::find(&config, name), output))
                .await?;
        }
        Command::Bench(BenchCommand::Ablation(args)) => {
            let dir = config.dirs.data.join("bench");
            Box::pin(commands::bench::ablation::run(&args, &dir, output)).await?;
        }
        Command::Bench(BenchCommand::Overhead(args)) => {
            Box::pin(commands::bench::overhead::run(&config, &args, output)).await?;
        }
        Command::Bench(BenchCommand::Restart(args)) => {
            let dir = config.dirs.data.join("bench");
            Box::pin(commands::bench::restart::run(&args, &dir, output)).await?;
        }
        Command::Bench(BenchCommand::Floor) => commands::bench::overhead::floor::run(output).await?,
        Command::Bench(BenchCommand::Engine(args)) => {
            let find = |name: &str| models::find(&config, name);
            tokio::task::block_in_place(|| commands::bench::engine::run(&args, find, output))?;
        }
        Command::Bench(BenchCommand::Cold(args)) => {
            let dir = config.dirs.data.join("bench");
            Box::pin(commands::bench::cold::run(&args, &dir, output)).await?;
        }
        Command::Bench(BenchCommand::Schedule(_)) => {
            anyhow::bail!("this needs nothing of what is configured")
        }
        Command::Worker(_) | Command::Keeper(_) => anyhow::bail!("this needs a process of its own"),
    }
    Ok(ExitCode::SUCCESS)
}

fn init_logging(cli: &Cli, environment: &Environment) -> Option<LogThread> {
    use tracing_subscriber::{EnvFilter, fmt, fmt::writer::BoxMakeWriter};

    let quiet = match cli.command {
        Command::Serve(_) | Command::Worker(_) => "info",
        _ => "warn",
    };
    let filter = cli.common.log.as_deref().or_else(|| environment.get("STOKER_LOG")).unwrap_or(quiet);
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new(quiet));
    let mut thread = None;
    let writer = if matches!(cli.command, Command::Serve(_))
        && let Ok((writer, started)) = log_writer::start(std::io::stderr())
    {
        thread = Some(started);
        BoxMakeWriter::new(writer)
    } else {
        BoxMakeWriter::new(std::io::stderr)
    };
    // A worker whose server is gone has nobody to read its log: a line that can't be written must not end it.
    let builder = fmt().with_env_filter(filter).with_writer(writer).log_internal_errors(false);
    if matches!(cli.command, Command::Worker(_)) {
        // The server's line around it has the time.
        builder.without_time().with_ansi(false).init();
    } else if cli.common.log_json {
        builder.json().flatten_event(true).init();
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    thread
}
