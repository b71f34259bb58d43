//! `stoker pull`, `ls`, `show`, `rm`, `verify`, `convert`: models on disk. None of them needs a running server.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use parking_lot::Mutex;
use serde::Serialize;
use stoker_checkpoint::{Manifest, Trust, convert::Precision};
use stoker_registry::{Aliases, FileOutcome, PullEvent, SourceUri};
use stoker_types::{ByteSize, ModelName};

use crate::{
    cli::{ConvertArgs, PullArgs},
    config::Config,
    library::{Home, Known, Library, pull::Pulled},
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct List {
    models: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: ModelName,
    home: Home,
    architecture: Option<String>,
    bytes: Option<u64>,
    context: Option<u32>,
    trust: Option<Trust>,
    source: Option<String>,
    /// Why it can't run; `null` when it can.
    refusal: Option<String>,
}

#[derive(Debug, Serialize)]
struct Shown {
    name: ModelName,
    home: Home,
    dir: PathBuf,
    refusal: Option<String>,
    tensors: usize,
    #[serde(flatten)]
    manifest: Manifest,
}

#[derive(Debug, Serialize)]
struct PullReport {
    model: ModelName,
    source: String,
    bytes: u64,
    was_here: bool,
    refusal: Option<String>,
}

#[derive(Debug, Serialize)]
struct RemoveReport {
    model: ModelName,
    freed: ByteSize,
    kept: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct VerifyResult {
    model: ModelName,
    ok: bool,
    files: Vec<VerifiedFile>,
}

#[derive(Debug, Serialize)]
struct VerifiedFile {
    path: PathBuf,
    bytes: u64,
    outcome: &'static str,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ConvertReport {
    folder: PathBuf,
    bytes: u64,
}

/// A bar that follows whatever file is being fetched.
struct PullBar {
    output: Output,
    current: Mutex<Option<(String, ProgressBar)>>,
}

/// `stoker ls`.
pub(crate) fn ls(config: &Config, output: Output) -> anyhow::Result<()> {
    let library = Library::open(config)?;
    let list = List { models: library.all().iter().map(|known| row(known)).collect() };
    output.show(&list, |list| {
        if list.models.is_empty() {
            return "no models yet: `stoker pull smollm2:135m`, or name your files in stoker.toml".into();
        }
        let mut table = Table::new(["NAME", "ARCHITECTURE", "SIZE", "CONTEXT", "TRUST", "STATE"]);
        for m in &list.models {
            table.row([
                m.name.to_string(),
                m.architecture.clone().unwrap_or_else(|| "-".into()),
                m.bytes.map_or_else(|| "-".into(), |b| ByteSize(b).to_string()),
                m.context.map_or_else(|| "-".into(), |c| c.to_string()),
                m.trust.map_or("-", trust_name).into(),
                m.refusal.as_ref().map_or_else(|| "runnable".into(), |why| format!("not runnable: {why}")),
            ]);
        }
        table.render()
    })
}

fn row(known: &Known) -> Row {
    let summary = known.what.as_ref().ok();
    let config = summary.and_then(|s| s.config.as_ref());
    Row {
        name: known.name.clone(),
        home: known.home,
        architecture: config.map(|c| format!("{:?}", c.architecture).to_lowercase()),
        bytes: summary.map(stoker_checkpoint::ManifestSummary::weight_bytes),
        context: config.map(|c| c.context_trained),
        trust: summary.map(|s| s.trust),
        source: summary.map(|s| s.source.uri.clone()),
        refusal: known.refusal(),
    }
}

const fn trust_name(trust: Trust) -> &'static str {
    match trust {
        Trust::Chunk => "chunk",
        Trust::File => "file",
        Trust::None => "none",
    }
}

/// `stoker show`.
pub(crate) fn show(config: &Config, name: &ModelName, output: Output) -> anyhow::Result<()> {
    let library = Library::open(config)?;
    let known = library.known(name).with_context(|| library.not_found(name.as_str()))?;
    let manifest = Manifest::clone(&*library.manifest(&known)?);
    let shown = Shown {
        name: known.name.clone(),
        home: known.home,
        dir: known.dir.clone(),
        refusal: known.refusal(),
        tensors: manifest.tensors.len(),
        manifest: Manifest { tensors: Vec::new(), ..manifest },
    };
    output.show(&shown, |s| {
        let mut text = format!("{}  ({})\n", s.name, s.manifest.source.uri);
        match &s.refusal {
            Some(why) => text.push_str(&format!("not runnable: {why}\n")),
            None => text.push_str("runnable\n"),
        }
        if let Some(c) = &s.manifest.config {
            text.push_str(&format!(
                "architecture  {:?}, {} layers, hidden {}, {} heads of {} ({} for keys and values), vocabulary {}\n\
                 context       {} tokens; KV cache {} per token\n",
                c.architecture,
                c.layers,
                c.hidden_size,
                c.heads,
                c.head_dim,
                c.kv_heads,
                c.vocab_size,
                c.context_trained,
                ByteSize(c.kv_bytes_per_token()),
            ));
        }
        text.push_str(&format!("tensors       {}\ntrust         {}\n", s.tensors, trust_name(s.manifest.trust)));
        for (index, file) in s.manifest.files.iter().enumerate() {
            let path = s.manifest.file_path(&s.dir, index);
            let sums = if file.chunk_sums.is_empty() { "no checksums yet" } else { "checksums known" };
            text.push_str(&format!("file          {}, {}, {sums}\n", path.display(), ByteSize(file.identity.len)));
        }
        text
    })
}

/// `stoker rm`.
pub(crate) fn rm(config: &Config, name: &ModelName, output: Output) -> anyhow::Result<()> {
    let library = Library::open(config)?;
    let home = library.known(name).map(|k| k.home);
    if home == Some(Home::Named) {
        bail!(
            "`{name}` is named in the configuration and not pulled: remove its entry there; its files stay"
        );
    }
    let removed = library.remove(name)?;
    let report = RemoveReport { model: name.clone(), freed: removed.freed, kept: removed.kept };
    output.show(&report, |r| {
        let kept: String = r.kept.iter().map(|p| format!("\nkept {}", p.display())).collect();
        format!("{} removed, {} freed{kept}", r.model, r.freed)
    })
}

/// Directory and manifest of a model, for the benches.
pub(crate) fn find(config: &Config, name: &str) -> anyhow::Result<(PathBuf, Arc<Manifest>)> {
    let library = Library::open(config)?;
    let known = ModelName::new(name).ok().and_then(|n| library.known(&n));
    let known = known.with_context(|| library.not_found(name))?;
    Ok((known.dir.clone(), library.manifest(&known)?))
}

/// `stoker pull`.
pub(crate) async fn pull(config: &Config, args: PullArgs, output: Output) -> anyhow::Result<()> {
    let named = config.entries.get(&args.model).and_then(|e| e.source.clone());
    let report = fetch(config, &args.model, args.source.or(named), output).await?;
    output.show(&report, |r| {
        let what = if r.was_here { "is here already" } else { "pulled" };
        let runnable = r.refusal.as_ref().map(|why| format!("\nnot runnable: {why}")).unwrap_or_default();
        format!("{} {what}: {} from {}{runnable}", r.model, ByteSize(r.bytes), r.source)
    })
}

/// Pulls a model unless it is here or named.
pub(crate) async fn ensure_pulled(config: &Config, name: &ModelName, output: Output) -> anyhow::Result<()> {
    let library = Library::open(config)?;
    match library.known(name).map(|k| k.refusal()) {
        Some(None) => Ok(()),
        Some(Some(why)) if config.entries.get(name).is_none_or(|e| e.source.is_none()) => {
            bail!("`{name}` can't run: {why}")
        }
        _ => {
            let source = config.entries.get(name).and_then(|e| e.source.clone());
            fetch(config, name, source, output).await.map(drop)
        }
    }
}

async fn fetch(
    config: &Config,
    name: &ModelName,
    source: Option<String>,
    output: Output,
) -> anyhow::Result<PullReport> {
    let source: Option<SourceUri> = match source {
        // An alias may stand where a source may.
        Some(text) => match ModelName::new(&text).ok().filter(|n| Aliases::built_in().get(n).is_some()) {
            Some(_) => bail!("`{text}` is an alias: `stoker pull {text}` pulls it under that name"),
            None => Some(text.parse()?),
        },
        None => None,
    };
    let library = Library::open(config)?;
    let bar = PullBar { output, current: Mutex::default() };
    let pulled = library.pull(config, name, source.as_ref(), &|event: PullEvent<'_>| bar.event(&event)).await;
    bar.finish();
    let Pulled { known, was_here } = pulled?;
    let summary = known.what.as_ref().map_err(|why| anyhow::anyhow!("{why}"))?;
    Ok(PullReport {
        model: name.clone(),
        source: summary.source.uri.clone(),
        bytes: summary.weight_bytes(),
        was_here,
        refusal: known.refusal(),
    })
}

/// `stoker verify`. The exit code says whether everything is as it should be.
pub(crate) async fn verify(config: &Config, name: &ModelName, output: Output) -> anyhow::Result<ExitCode> {
    let library = Library::open(config)?;
    let known = library.known(name).with_context(|| library.not_found(name.as_str()))?;
    if let Err(why) = &known.what {
        bail!("{why}");
    }
    let registry = library.registry(&known).clone();
    let (model, bar) = (name.clone(), output.bytes_bar(0, name.to_string()));
    let report = tokio::task::spawn_blocking(move || {
        let report = registry.verify(&model, &mut |_: &Path, done: u64, total: u64| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        report
    })
    .await??;
    let files = report.files.iter().map(verified).collect();
    let result = VerifyResult { model: name.clone(), ok: report.is_sound(), files };
    output.show(&result, |r| {
        let line = |f: &VerifiedFile| {
            let problems: String = f.problems.iter().map(|p| format!("\n  {p}")).collect();
            format!("{}  {}  {}{problems}\n", f.outcome, ByteSize(f.bytes), f.path.display())
        };
        r.files.iter().map(line).collect()
    })?;
    Ok(if result.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verified(file: &stoker_registry::FileReport) -> VerifiedFile {
    let (outcome, problems) = match &file.outcome {
        FileOutcome::Sound => ("sound", Vec::new()),
        FileOutcome::Recorded => ("recorded: no checksums were known, now they are", Vec::new()),
        FileOutcome::Changed => ("changed on disk since it was added; indexed anew", Vec::new()),
        FileOutcome::WrongHash { expected, found } => {
            ("corrupt", vec![format!("SHA-256 {expected} expected, {found} found: fetch it again")])
        }
        FileOutcome::Corrupt(chunks) => {
            let problem = |c: &stoker_registry::BadChunk| {
                let again = if c.found_again == c.found {
                    "the same when read again".to_owned()
                } else {
                    format!("{} when read again: suspect disk or memory", c.found_again)
                };
                format!(
                    "chunk {} at offset {}: checksum {} expected, {} found, {again}",
                    c.chunk, c.offset, c.expected, c.found
                )
            };
            ("corrupt", chunks.iter().map(problem).collect())
        }
    };
    VerifiedFile { path: file.path.clone(), bytes: file.bytes, outcome, problems }
}

/// `stoker convert`.
pub(crate) fn convert(config: &Config, args: &ConvertArgs, output: Output) -> anyhow::Result<()> {
    let given = Path::new(&args.from);
    let from = if given.exists() {
        given.to_owned()
    } else {
        let (dir, manifest) = find(config, &args.from)?;
        manifest.file_path(&dir, 0)
    };
    let precision = match args.dtype.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::BF16,
        _ => Precision::F16,
    };
    let bar = output.bytes_bar(0, args.from.clone());
    let mut bytes = 0;
    let outcome = tokio::task::block_in_place(|| {
        stoker_checkpoint::convert::convert(&from, &args.to, precision, &mut |progress| {
            bytes = progress.total;
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        })
    });
    bar.finish_and_clear();
    outcome?;
    let report = ConvertReport { folder: args.to.clone(), bytes };
    output.show(&report, |r| format!("{} made, {} of weights", r.folder.display(), ByteSize(r.bytes)))
}

// === impl PullBar ===

impl PullBar {
    fn event(&self, event: &PullEvent<'_>) {
        let mut current = self.current.lock();
        match event {
            PullEvent::Trying { source } => self.output.note(&format!("trying {source}")),
            PullEvent::Failed { source, error } => self.output.note(&format!("{source}: {error}")),
            PullEvent::Waiting => self.output.note("another process pulls this model; waiting for it"),
            PullEvent::Bytes { file, done, total } => {
                if current.as_ref().is_none_or(|(name, _)| name != file) {
                    if let Some((_, bar)) = current.take() {
                        bar.finish();
                    }
                    *current = Some((
                        (*file).to_owned(),
                        self.output.bytes_bar(total.unwrap_or(0), (*file).to_owned()),
                    ));
                }
                if let Some((_, bar)) = &*current {
                    bar.set_position(*done);
                }
            }
            PullEvent::Unpacking { file } => self.output.note(&format!("unpacking {file}")),
            _ => {}
        }
    }

    fn finish(&self) {
        if let Some((_, bar)) = self.current.lock().take() {
            bar.finish_and_clear();
        }
    }
}
