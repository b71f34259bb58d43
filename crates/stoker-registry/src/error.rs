//! What can go wrong with models, and what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use stoker_checkpoint::CheckpointError;
use stoker_types::{ByteSize, ModelName};

/// Why something can't be done with the models directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// There is no such model.
    #[error("there is no model `{name}`{}", did_you_mean(nearest))]
    NotFound {
        /// What was asked for.
        name: ModelName,
        /// The nearest names that exist, nearest first.
        nearest: Vec<ModelName>,
    },
    /// No source was given, and the name is no alias.
    #[error(
        "`{name}` is no known alias{}; name a source: `stoker pull {name} --source hf:owner/name`",
        did_you_mean(nearest)
    )]
    UnknownAlias {
        /// What was asked for.
        name: ModelName,
        /// The nearest aliases, nearest first.
        nearest: Vec<ModelName>,
    },
    /// The model's directory is there, and can't be used.
    #[error("model `{name}` is broken: {why}; `stoker rm {name}` removes it")]
    Broken {
        /// Which model.
        name: ModelName,
        /// Why.
        why: String,
    },
    /// The name is taken by something else.
    #[error(
        "there is a model `{name}` already, from {source_uri}; `stoker rm {name}` first, or choose another name"
    )]
    AlreadyExists {
        /// Which model.
        name: ModelName,
        /// Where that one came from.
        source_uri: String,
    },
    /// The name can't be a directory.
    #[error("`{name}` has too many of `:`, `/` and `@` for a directory's name")]
    NameTooLong {
        /// Which name.
        name: ModelName,
    },
    /// No source gave the model. One message with everything that was tried.
    #[error(
        "can't get `{name}`:{}\n\
             If you have the files, no network is needed: put a GGUF file or a safetensors folder anywhere and name it \
             in stoker.toml (`[models.\"{name}\"]`, `path = \"...\"`), or run `stoker pull {name} --source /path/to/it`.",
        list(attempts)
    )]
    NoSource {
        /// Which model.
        name: ModelName,
        /// What was tried, in order.
        attempts: Vec<Attempt>,
    },
    /// A remote source doesn't give the model's index.
    #[error("`{name}` can't be had from {source_uri}: {error}")]
    Remote {
        /// Which model.
        name: ModelName,
        /// Where it should come from.
        source_uri: String,
        /// Why it doesn't.
        error: Box<SourceError>,
    },
    /// The disk is full. What was under way is removed.
    #[error("{}: the disk is full: {} more needed, {} free", path.display(), needed, free)]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// How much more is needed, as far as known.
        needed: ByteSize,
        /// How much is free.
        free: ByteSize,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A model's files can't be read as a model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// A source that was tried.
#[derive(Debug)]
pub struct Attempt {
    /// As a person writes it.
    pub source: String,
    /// Why it didn't give the model.
    pub error: SourceError,
}

/// Why a source didn't give the model. Another may.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// `--offline`, `STOKER_OFFLINE` or `HF_HUB_OFFLINE`.
    #[error("offline: not tried")]
    Offline,
    /// No connection.
    #[error("{host} can't be reached: {why}")]
    Unreachable {
        /// Which host.
        host: String,
        /// Why.
        why: String,
    },
    /// The server is there and silent.
    #[error("{host} sent nothing for {} s", idle.as_secs_f32())]
    TooSlow {
        /// Which host.
        host: String,
        /// How long was waited.
        idle: Duration,
    },
    /// The connection broke again and again.
    #[error("{host}: broken off {tries} times, last at {done} of {total}: {why}")]
    BrokenOff {
        /// Which host.
        host: String,
        /// How often in a row.
        tries: u32,
        /// How much had arrived.
        done: ByteSize,
        /// How much there is.
        total: ByteSize,
        /// What happened last.
        why: String,
    },
    /// Not there.
    #[error("not found ({url})")]
    NotFound {
        /// Which address.
        url: String,
    },
    /// There, but not for everybody.
    #[error("access refused ({url}): the model may be gated; accept its terms on its page and set HF_TOKEN")]
    Refused {
        /// Which address.
        url: String,
    },
    /// Another answer than the file.
    #[error("{url} answered {status}")]
    Status {
        /// Which address.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// Other bytes than expected. They are deleted.
    #[error("{file}: wrong content: SHA-256 should be {expected}, is {found}")]
    WrongHash {
        /// Which file.
        file: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The server contradicts itself or a format.
    #[error("{what}: {problem}")]
    Malformed {
        /// Whose answer, or which file.
        what: String,
        /// The contradiction.
        problem: String,
    },
    /// The source has no file that can be used, or several.
    #[error("{problem}")]
    NoFile {
        /// What is there.
        problem: String,
    },
    /// A remote store.
    #[error(transparent)]
    Remote(Box<stoker_remote::RemoteError>),
    /// The copy didn't become whole.
    #[error("{why}{}", if *resumes { "\n  what has arrived is kept: the same command goes on from there" } else { "" })]
    NotCopied {
        /// Why.
        why: String,
        /// Whether what has arrived is of use for the next try.
        resumes: bool,
    },
    /// The files arrived and are no model.
    #[error(transparent)]
    NotAModel(#[from] CheckpointError),
}

/// Why a pull from one source ended.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Another source may do.
    Source(SourceError),
    /// This machine is at fault: no other source will help.
    Here(RegistryError),
}

impl From<SourceError> for Stop {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<RegistryError> for Stop {
    fn from(error: RegistryError) -> Self {
        Self::Here(error)
    }
}

impl RegistryError {
    /// For `map_err` on I/O. Says how full the disk is when that is the trouble; `needed` is how much was still to come.
    pub(crate) fn io_needing(path: &Path, needed: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            if matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            ) {
                let free = crate::stage::free_bytes(path).unwrap_or(0);
                return Self::DiskFull {
                    path: path.to_owned(),
                    needed: ByteSize(needed),
                    free: ByteSize(free),
                };
            }
            Self::Io { path: path.to_owned(), source }
        }
    }

    /// For `map_err` on I/O.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        Self::io_needing(path, 0)
    }

    /// A manifest that can't be written because the disk is full says so.
    pub(crate) fn checkpoint(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Io { file, source } => Self::io(&file)(source),
            error => Self::Checkpoint(error),
        }
    }
}

fn did_you_mean(nearest: &[ModelName]) -> String {
    if nearest.is_empty() {
        return String::new();
    }
    let names: Vec<String> = nearest.iter().map(|name| format!("`{name}`")).collect();
    format!("; did you mean {}?", names.join(", "))
}

fn list(attempts: &[Attempt]) -> String {
    attempts.iter().map(|a| format!("\n  {}: {}", a.source, a.error)).collect()
}

/// The at most three names that are nearest to a mistyped one.
pub(crate) fn nearest<'a>(name: &ModelName, known: impl Iterator<Item = &'a ModelName>) -> Vec<ModelName> {
    let wanted = name.as_str().to_ascii_lowercase();
    let mut near: Vec<(usize, &ModelName)> = known
        .map(|known| {
            let text = known.as_str().to_ascii_lowercase();
            let distance = strsim::damerau_levenshtein(&wanted, &text);
            // A part of a name is as near as a slip of a key.
            let part = wanted.len() >= 3 && (text.contains(&wanted) || wanted.contains(&text));
            (if part { distance.min(1) } else { distance }, known)
        })
        .filter(|(distance, _)| *distance <= (wanted.len() / 3).max(1))
        .collect();
    near.sort();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered() {
        let known: Vec<ModelName> = ["smollm2:135m", "smollm2:360m", "llama3:8b", "x"]
            .iter()
            .map(|n| ModelName::new(n).unwrap())
            .collect();
        let near = |name: &str| nearest(&ModelName::new(name).unwrap(), known.iter());
        assert_eq!(near("smolm2:135m")[0].as_str(), "smollm2:135m");
        assert_eq!(near("llama3").len(), 1);
        assert!(near("completely-different").is_empty());
    }

    #[test]
    fn one_message_says_what_was_tried_and_what_to_do() {
        let error = RegistryError::NoSource {
            name: ModelName::new("m").unwrap(),
            attempts: vec![
                Attempt { source: "hf:a/b".into(), error: SourceError::Offline },
                Attempt { source: "pypi:c==1#d".into(), error: SourceError::NotFound { url: "u".into() } },
            ],
        };
        let text = error.to_string();
        for part in ["hf:a/b: offline", "pypi:c==1#d: not found (u)", "stoker pull m --source /path/to/it"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
