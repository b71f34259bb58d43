//! The Hugging Face hub: which files of a repository make a model, and where they are.

use std::path::Path;

use reqwest::Url;
use serde::Deserialize;

use crate::{
    download::{Job, download},
    error::{SourceError, Stop},
    http::{Get, Remote, shown},
    pull::{Arrived, Fetched, PullProgress},
};

/// Files that belong to a safetensors model, apart from its weights.
const COMPANIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
struct Repository {
    /// The commit.
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
}

/// Fetches a model from the hub into `stage`, each file in one stream.
pub(crate) async fn fetch(
    remote: &Remote,
    repository: &str,
    revision: Option<&str>,
    file: Option<&str>,
    sha256: Option<&str>,
    stage: &Path,
    progress: &dyn PullProgress,
) -> Result<Fetched, Stop> {
    let Listed { commit, files } = objects(remote, repository, revision, file).await?;
    let mut arrived = Vec::new();
    for HubFile { name, url, len, sha256: listed } in &files {
        let expected = if files.len() == 1 { sha256.or(listed.as_deref()) } else { listed.as_deref() };
        let mut get = Get::new(url.clone());
        get.with_token = true;
        let part = stage.join(format!("{name}.part"));
        let job =
            Job { get, span: None, part, label: name, sha256: expected, checked_later: false, total: *len };
        let finished = download(remote, &job, progress).await?;
        arrived.push(Arrived { name: name.clone(), finished });
    }
    Ok(Fetched { files: arrived, revision: Some(commit) })
}

/// The files of a model, where they are.
pub(crate) struct Listed {
    pub(crate) commit: String,
    pub(crate) files: Vec<HubFile>,
}

/// A file at a commit.
pub(crate) struct HubFile {
    /// In the model's directory.
    pub(crate) name: String,
    pub(crate) url: Url,
    /// Bytes and hash, where the hub says them.
    pub(crate) len: Option<u64>,
    pub(crate) sha256: Option<String>,
}

/// Where a model's files are, without fetching any.
pub(crate) async fn objects(
    remote: &Remote,
    repository: &str,
    revision: Option<&str>,
    file: Option<&str>,
) -> Result<Listed, SourceError> {
    let base = remote.hub()?;
    let pinned = revision.filter(|r| r.len() == 40 && r.bytes().all(|b| b.is_ascii_hexdigit()));
    // One file at a known commit needs no question; everything else is pinned to a commit first.
    let (commit, siblings) = match (pinned, file) {
        (Some(commit), Some(file)) if parts_of(file).is_none() => {
            (commit.to_owned(), vec![Sibling { rfilename: file.to_owned(), size: None, lfs: None }])
        }
        _ => {
            let listing = list(remote, &base, repository, revision.unwrap_or("main")).await?;
            let siblings = choose(repository, &listing.siblings, file)?;
            (listing.sha, siblings)
        }
    };
    let file = |Sibling { rfilename, size, lfs }| {
        let url = join(&base, &format!("{repository}/resolve/{commit}/{rfilename}"))?;
        Ok(HubFile { name: local_name(&rfilename)?, url, len: size, sha256: lfs.and_then(|lfs| lfs.sha256) })
    };
    let files = siblings.into_iter().map(file).collect::<Result<_, SourceError>>()?;
    Ok(Listed { commit, files })
}

async fn list(
    remote: &Remote,
    base: &Url,
    repository: &str,
    revision: &str,
) -> Result<Repository, SourceError> {
    let url = join(base, &format!("api/models/{repository}/revision/{revision}?blobs=true"))?;
    let mut get = Get::new(url);
    get.with_token = true;
    let (body, _) = remote.text(&get).await?;
    let listing: Repository = serde_json::from_slice(&body)
        .map_err(|e| SourceError::Malformed { what: shown(&get.url), problem: e.to_string() })?;
    let hex = listing.sha.len() == 40 && listing.sha.bytes().all(|b| b.is_ascii_hexdigit());
    if !hex {
        let problem = "names no commit".to_owned();
        return Err(SourceError::Malformed { what: shown(&get.url), problem });
    }
    Ok(listing)
}

fn join(base: &Url, path: &str) -> Result<Url, SourceError> {
    base.join(path).map_err(|e| SourceError::Malformed { what: shown(base), problem: e.to_string() })
}

/// A file's name in the model's directory: its last segment, if that is a plain one.
pub(crate) fn local_name(remote: &str) -> Result<String, SourceError> {
    let name = remote.rsplit('/').next().unwrap_or_default();
    let plain = !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && !name.contains(['\\', '\0'])
        && name != stoker_checkpoint::manifest::FILE_NAME;
    if plain {
        return Ok(name.to_owned());
    }
    Err(SourceError::NoFile {
        problem: format!("the file name {:?} can't be used", name.chars().take(80).collect::<String>()),
    })
}

/// Which files of a repository are wanted. Weights in other formats (`.bin`, `.pt`, ...) never are: they can run code.
fn choose(repository: &str, siblings: &[Sibling], file: Option<&str>) -> Result<Vec<Sibling>, SourceError> {
    let find = |name: &str| siblings.iter().find(|s| s.rfilename == name).cloned();
    let no_file = |problem: String| SourceError::NoFile { problem };
    let all = |names: Vec<String>| {
        let missing = |name: &String| no_file(format!("{repository} has no file {name}"));
        names.iter().map(|name| find(name).ok_or_else(|| missing(name))).collect::<Result<Vec<_>, _>>()
    };
    if let Some(file) = file {
        if !file.ends_with(".gguf") {
            return Err(no_file(
                "only a GGUF file can be pulled alone; name the repository for safetensors".to_owned(),
            ));
        }
        return all(parts_of(file).unwrap_or_else(|| vec![file.to_owned()]));
    }
    let root = |extension: &'static str| {
        siblings.iter().filter(move |s| s.rfilename.ends_with(extension) && !s.rfilename.contains('/'))
    };
    let mut weights: Vec<Sibling> = if let Some(single) = find("model.safetensors") {
        vec![single]
    } else if let Some(index) = find("model.safetensors.index.json") {
        let shards = root(".safetensors").filter(|s| s.rfilename.starts_with("model-"));
        shards.cloned().chain([index]).collect()
    } else {
        root(".safetensors").cloned().collect()
    };
    if !weights.is_empty() {
        weights.splice(0..0, COMPANIONS.iter().filter_map(|name| find(name)));
        return Ok(weights);
    }
    let ggufs: Vec<&Sibling> = siblings.iter().filter(|s| s.rfilename.ends_with(".gguf")).collect();
    let firsts = ggufs.iter().filter(|s| split(&s.rfilename).is_none_or(|(_, part, _)| part == 1));
    match &firsts.collect::<Vec<_>>()[..] {
        [] => Err(no_file(format!("{repository} has neither safetensors nor GGUF files"))),
        [one] => all(parts_of(&one.rfilename).unwrap_or_else(|| vec![one.rfilename.clone()])),
        several => {
            let names: Vec<&str> = several.iter().take(20).map(|s| s.rfilename.as_str()).collect();
            let problem = format!(
                "{repository} has several GGUF files; name one, as hf:{repository}/{}: {}",
                names[0],
                names.join(", ")
            );
            Err(no_file(problem))
        }
    }
}

/// Stem, number and count of a part of a split GGUF file: `x-00001-of-00003.gguf`.
fn split(name: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok())?;
    Some((stem, number(part)?, number(count)?)).filter(|(_, part, count)| (1..=*count).contains(part))
}

/// All parts of a split GGUF file; `None` when it isn't split.
pub(crate) fn parts_of(name: &str) -> Option<Vec<String>> {
    let (stem, _, count) = split(name)?;
    (count <= 4096).then(|| (1..=count).map(|part| format!("{stem}-{part:05}-of-{count:05}.gguf")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], file: Option<&str>) -> Result<Vec<String>, String> {
        let siblings: Vec<Sibling> =
            names.iter().map(|n| Sibling { rfilename: (*n).to_owned(), size: None, lfs: None }).collect();
        let files = choose("o/n", &siblings, file).map_err(|e| e.to_string())?;
        Ok(files.into_iter().map(|s| s.rfilename).collect())
    }

    #[test]
    fn safetensors_come_with_what_belongs_to_them() {
        let names = [
            "README.md",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "onnx/model.onnx",
        ];
        assert_eq!(chosen(&names, None).unwrap(), ["config.json", "tokenizer.json", "model.safetensors"]);
        let names = [
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        assert_eq!(
            chosen(&names, None).unwrap(),
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json"
            ]
        );
    }

    #[test]
    fn gguf_files_are_named_unless_there_is_one() {
        assert_eq!(chosen(&["a.gguf", "README.md"], None).unwrap(), ["a.gguf"]);
        let split = ["x/a-00001-of-00002.gguf", "x/a-00002-of-00002.gguf"];
        assert_eq!(chosen(&split, None).unwrap(), split);
        assert_eq!(chosen(&split, Some(split[0])).unwrap(), split);
        assert!(chosen(&["a.gguf", "b.gguf"], None).unwrap_err().contains("hf:o/n/a.gguf: a.gguf, b.gguf"));
        assert!(chosen(&["a.gguf"], Some("b.gguf")).unwrap_err().contains("no file b.gguf"));
        assert!(chosen(&["pytorch_model.bin"], None).is_err());
        assert!(chosen(&["pytorch_model.bin"], Some("pytorch_model.bin")).is_err());
    }

    #[test]
    fn file_names_stay_in_the_models_directory() {
        assert_eq!(local_name("sub/a.gguf").unwrap(), "a.gguf");
        for bad in ["", "a/", "..", ".hidden", "a\\b", "stoker.json"] {
            assert!(local_name(bad).is_err(), "{bad}");
        }
    }
}
