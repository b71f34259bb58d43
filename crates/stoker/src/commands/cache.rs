//! `stoker cache ls`, `gc`, `verify`: copies of remote models on this machine's disks. None of them needs a running server.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;
use stoker_registry::FileOutcome;
use stoker_store::Leftover;
use stoker_types::{ByteSize, ModelName};

use crate::{
    cli::{CacheCommand, CacheGcArgs},
    config::Config,
    library::Library,
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct Listing {
    disks: Vec<Disk>,
}

#[derive(Debug, Serialize)]
struct Disk {
    dir: PathBuf,
    budget_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    models: Vec<Model>,
    copies: Vec<Copy>,
}

#[derive(Debug, Serialize)]
struct Model {
    name: ModelName,
    bytes: u64,
    /// Whether it may go when room is needed.
    evictable: bool,
    /// Where it would come from again.
    from: Option<String>,
}

/// A copy that isn't whole.
#[derive(Debug, Serialize)]
struct Copy {
    model: Option<ModelName>,
    present_bytes: u64,
    total_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Collected {
    freed_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Verified {
    ok: bool,
    models: Vec<VerifiedModel>,
}

#[derive(Debug, Serialize)]
struct VerifiedModel {
    name: ModelName,
    bytes: u64,
    outcome: &'static str,
}

/// Runs a subcommand.
pub(crate) async fn run(config: &Config, command: CacheCommand, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        CacheCommand::Ls => tokio::task::block_in_place(|| ls(config, output)),
        CacheCommand::Gc(args) => tokio::task::block_in_place(|| gc(config, &args, output)),
        CacheCommand::Verify => verify(config, output).await,
    }
}

fn ls(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let library = Library::open(config)?;
    let disks = library.ssd_tier(config)?.look().into_iter().map(|state| {
        let models: Vec<Model> = state
            .models
            .into_iter()
            .map(|shelved| Model {
                name: shelved.model,
                bytes: shelved.bytes.bytes(),
                evictable: !shelved.kept,
                from: Some(shelved.host).filter(|host| !host.is_empty()),
            })
            .collect();
        let copies: Vec<Copy> = state
            .copies
            .into_iter()
            .map(|left| Copy {
                model: left.model,
                present_bytes: left.present.bytes(),
                total_bytes: left.total.bytes(),
            })
            .collect();
        let whole: u64 = models.iter().map(|model| model.bytes).sum();
        Disk {
            dir: state.disk.dir,
            budget_bytes: state.disk.budget.bytes(),
            used_bytes: whole + copies.iter().map(|copy| copy.present_bytes).sum::<u64>(),
            free_bytes: state.free.bytes(),
            models,
            copies,
        }
    });
    output
        .show(&Listing { disks: disks.collect() }, |listing| listing.disks.iter().map(disk_text).collect())?;
    Ok(ExitCode::SUCCESS)
}

fn disk_text(disk: &Disk) -> String {
    let mut text = format!(
        "{}: {} of {} used, {} free on the disk\n",
        disk.dir.display(),
        ByteSize(disk.used_bytes),
        ByteSize(disk.budget_bytes),
        ByteSize(disk.free_bytes),
    );
    if disk.models.is_empty() && disk.copies.is_empty() {
        return text;
    }
    let mut table = Table::new(["MODEL", "SIZE", "STATE", "FROM"]);
    for model in &disk.models {
        table.row([
            model.name.to_string(),
            ByteSize(model.bytes).to_string(),
            if model.evictable { "may go when room is needed" } else { "stays" }.to_owned(),
            model.from.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    for copy in &disk.copies {
        table.row([
            copy.model.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string),
            ByteSize(copy.total_bytes).to_string(),
            format!("{} are there", ByteSize(copy.present_bytes)),
            "-".to_owned(),
        ]);
    }
    text.push_str(&table.render());
    text.push('\n');
    text
}

fn gc(config: &Config, args: &CacheGcArgs, output: Output) -> anyhow::Result<ExitCode> {
    let library = Library::open(config)?;
    let tier = library.ssd_tier(config)?;
    let freed = tier.collect(args.to, |left: &Leftover| !args.partial && library.wants(left));
    output
        .show(&Collected { freed_bytes: freed.bytes() }, |c| format!("{} freed", ByteSize(c.freed_bytes)))?;
    Ok(ExitCode::SUCCESS)
}

/// Checks every copy; one that is wrong and may go is removed, so that the next load fetches it again.
async fn verify(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let library = Library::open(config)?;
    let tier = library.ssd_tier(config)?;
    let bar = output.bytes_bar(0, "cache".to_owned());
    let result = tokio::task::spawn_blocking(move || {
        let mut models = Vec::new();
        for shelved in tier.look().into_iter().flat_map(|state| state.models) {
            // Gone meanwhile.
            let Some(known) = library.known(&shelved.model) else { continue };
            let report =
                library.registry(&known).verify(&shelved.model, &mut |_: &Path, done: u64, total: u64| {
                    bar.set_length(total);
                    bar.set_position(done);
                })?;
            let bad = |outcome: &FileOutcome| {
                matches!(
                    outcome,
                    FileOutcome::Corrupt(_) | FileOutcome::WrongHash { .. } | FileOutcome::Changed
                )
            };
            let outcome = if !report.files.iter().any(|file| bad(&file.outcome)) {
                "sound"
            } else if shelved.kept {
                "corrupt: pull it again"
            } else {
                tier.damaged(&shelved.model);
                "corrupt: removed, the next load fetches it again"
            };
            models.push(VerifiedModel { name: shelved.model, bytes: shelved.bytes.bytes(), outcome });
        }
        bar.finish_and_clear();
        anyhow::Ok(Verified { ok: models.iter().all(|model| model.outcome == "sound"), models })
    })
    .await??;
    output.show(&result, |result| {
        let line = |m: &VerifiedModel| format!("{}  {}  {}\n", m.name, ByteSize(m.bytes), m.outcome);
        if result.models.is_empty() {
            "no copies\n".to_owned()
        } else {
            result.models.iter().map(line).collect()
        }
    })?;
    Ok(if result.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
