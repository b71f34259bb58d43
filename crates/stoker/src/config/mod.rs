//! Configuration: one TOML file, `STOKER_*` variables and flags on top of it, defaults below.
//!
//! Every setting is one [`Setting`]: a value and where it came from, so that `stoker config check` and error messages
//! can say both. An unknown key or variable is an error that names the nearest valid one.

mod devices;
mod dirs;
mod file;
mod memory;
mod reader;
mod tiers;

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use serde::Serialize;
use stoker_types::{ByteSize, KeepAlive, ModelName, ModelSettings, QueueLimits};

pub(crate) use devices::{DeviceSpec, Devices};
pub(crate) use dirs::Dirs;
pub(crate) use file::{ConfigFile, ModelEntry};
pub(crate) use reader::ReaderSetting;
use tiers::store_settings;
pub(crate) use tiers::{RemoteTable, SsdDirEntry};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Origin {
    /// Nobody said anything.
    Default,
    /// The configuration file.
    File,
    /// A variable of the environment.
    Environment(&'static str),
    /// A flag.
    Flag,
}

/// A value and where it came from.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Setting<T> {
    /// The value in force.
    pub(crate) value: T,
    /// Its origin.
    pub(crate) origin: Origin,
}

/// Variables that Stoker reads. Another `STOKER_*` variable is an error.
pub(crate) const VARIABLES: &[&str] = &[
    "STOKER_CONFIG",
    "STOKER_MODELS",
    "STOKER_LISTEN",
    "STOKER_API_KEY",
    "STOKER_LOG",
    "STOKER_OFFLINE",
    "STOKER_DRAM",
    "STOKER_KV",
    "STOKER_DEVICES",
    "STOKER_GPU_MEMORY",
    "STOKER_SSD",
    "STOKER_RUNTIME_DIR",
];

/// Prefix of variables that only the test suite reads; ignored here.
const TEST_PREFIX: &str = "STOKER_TEST_";

/// What the environment says: read once, at start, by the binary alone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment(BTreeMap<String, String>);

/// Flags that override settings, as the command line gave them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    pub(crate) config: Option<PathBuf>,
    pub(crate) models: Option<PathBuf>,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) api_key: Option<String>,
    pub(crate) dram: Option<ByteSize>,
    pub(crate) kv: Option<ByteSize>,
    pub(crate) threads: Option<u32>,
    pub(crate) workers: Option<u32>,
    pub(crate) devices: Option<Devices>,
    pub(crate) gpu_memory: Option<ByteSize>,
    pub(crate) workers_per_gpu: Option<u32>,
    pub(crate) offline: bool,
    pub(crate) insecure: bool,
}

/// A server's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryBudgets {
    /// For weights.
    pub(crate) dram: ByteSize,
    /// For KV caches.
    pub(crate) kv: ByteSize,
}

/// Everything that a command may need to know, settled.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// The file that was read, if there was one.
    pub(crate) file: Option<PathBuf>,
    pub(crate) dirs: Dirs,
    pub(crate) models: Setting<PathBuf>,
    pub(crate) listen: Setting<SocketAddr>,
    pub(crate) api_keys: Setting<Vec<ApiKey>>,
    pub(crate) hosts: Setting<Vec<String>>,
    pub(crate) insecure: Setting<bool>,
    pub(crate) offline: Setting<bool>,
    /// Budget of the DRAM tier (weights).
    pub(crate) dram: Setting<ByteSize>,
    /// Budget of KV caches, all instances together.
    pub(crate) kv: Setting<ByteSize>,
    /// Threads of one worker.
    pub(crate) threads: Setting<u32>,
    /// Most worker processes.
    pub(crate) workers: Setting<u32>,
    /// What models are served from.
    pub(crate) devices: Setting<Devices>,
    /// Most that instances may take of each device; `None`: what the driver says is free, less max(512 MiB, 3 %).
    pub(crate) gpu_memory: Setting<Option<ByteSize>>,
    /// Worker processes that are kept for each device.
    pub(crate) workers_per_gpu: Setting<u32>,
    /// How weight files are read.
    pub(crate) reader: Setting<ReaderSetting>,
    pub(crate) keep_alive: Setting<KeepAlive>,
    pub(crate) queue: Setting<QueueLimits>,
    pub(crate) wait_s: Setting<u64>,
    pub(crate) other_model_wait_s: Setting<u64>,
    pub(crate) shutdown_grace_s: Setting<u64>,
    /// Models that the file names.
    pub(crate) entries: BTreeMap<ModelName, ModelEntry>,
    /// What copies of remote models may take where models are kept; `None`: 80 % of the disk, as long as a tenth of it and
    /// 20 GiB stay free.
    pub(crate) ssd: Setting<Option<ByteSize>>,
    pub(crate) ssd_dirs: Vec<SsdDirEntry>,
    pub(crate) remote_limits: RemoteTable,
    pub(crate) remote: RemoteEnvironment,
    pub(crate) telemetry: TelemetryEnvironment,
}

/// Whoever holds the key may use the API.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ApiKey {
    /// Shown in logs and limits.
    pub(crate) name: String,
    /// The key itself; never printed.
    #[serde(skip)]
    pub(crate) secret: String,
}

/// What the environment says about remote sources.
#[derive(Debug, Clone, Default)]
pub(crate) struct RemoteEnvironment {
    pub(crate) hf_endpoint: Option<String>,
    pub(crate) hf_token: Option<String>,
    pub(crate) python_index: Option<String>,
    /// How stores are reached, see [`store_settings`].
    pub(crate) stores: Vec<(String, String)>,
}

/// What the environment says about OpenTelemetry. What isn't here the library reads itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TelemetryEnvironment {
    /// There is a collector, and it is wanted.
    pub(crate) traces: bool,
    /// The service's name, unless the environment has one.
    pub(crate) service: Option<&'static str>,
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("configuration file {path}: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}:{line}:{column}: {message}")]
    Invalid { path: PathBuf, line: usize, column: usize, message: String },
    #[error("unknown variable {name}{}", did_you_mean(.nearest.as_deref()))]
    UnknownVariable { name: String, nearest: Option<String> },
    #[error("{name} = `{value}`: {message}")]
    BadVariable { name: &'static str, value: String, message: String },
    #[error(
        "{listen} is reachable from other machines and no API key is set: set one with `api_keys` in the configuration or \
         STOKER_API_KEY, or say `--insecure`"
    )]
    OpenWithoutKey { listen: SocketAddr },
    #[error("cannot find a home directory: set HOME, or STOKER_MODELS and XDG_STATE_HOME")]
    NoHome,
    #[error("runtime directory {path}: {message}")]
    RuntimeDir { path: PathBuf, message: String },
}

fn did_you_mean(name: Option<&str>) -> String {
    name.map(|n| format!("; did you mean {n}?")).unwrap_or_default()
}

/// The nearest of `names`, if one is near enough to be a slip.
pub(crate) fn nearest_of<'a>(given: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names
        .into_iter()
        .map(|n| (strsim::damerau_levenshtein(given, n), n))
        .filter(|(d, n)| *d <= 1 + n.len() / 3)
        .min()
        .map(|(_, n)| n)
}

// === impl Environment ===

impl Environment {
    /// The process's environment.
    pub(crate) fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// A variable that is set and not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Every variable.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .filter(|(_, value)| !value.is_empty())
    }

    /// An environment of these variables.
    #[cfg(test)]
    pub(crate) fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    fn parsed<T: FromStr<Err: fmt::Display>>(&self, name: &'static str) -> Result<Option<T>, ConfigError> {
        self.get(name)
            .map(|value| {
                value.parse().map_err(|e: T::Err| ConfigError::BadVariable {
                    name,
                    value: value.into(),
                    message: e.to_string(),
                })
            })
            .transpose()
    }

    fn check_names(&self) -> Result<(), ConfigError> {
        for name in self.0.keys().filter(|n| n.starts_with("STOKER_") && !n.starts_with(TEST_PREFIX)) {
            if !VARIABLES.contains(&name.as_str()) {
                let nearest = nearest_of(name, VARIABLES.iter().copied()).map(Into::into);
                return Err(ConfigError::UnknownVariable { name: name.clone(), nearest });
            }
        }
        Ok(())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Self(pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect())
    }
}

// === impl TelemetryEnvironment ===

impl TelemetryEnvironment {
    fn of(environment: &Environment) -> Self {
        let is = |name, value: &str| environment.get(name).is_some_and(|v| v.eq_ignore_ascii_case(value));
        let endpoint = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]
            .into_iter()
            .any(|name| environment.get(name).is_some());
        let off = is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none");
        let named = environment.get("OTEL_SERVICE_NAME").is_some()
            || environment.get("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|list| list.contains("service.name="));
        Self { traces: endpoint && !off, service: (!named).then_some("stoker") }
    }
}

// === impl Setting ===

impl<T> Setting<T> {
    /// The first of flag, environment, file that is there; else the default.
    fn settle(
        flag: Option<T>,
        environment: Option<(&'static str, T)>,
        file: Option<T>,
        default: impl FnOnce() -> T,
    ) -> Self {
        if let Some(value) = flag {
            Self { value, origin: Origin::Flag }
        } else if let Some((name, value)) = environment {
            Self { value, origin: Origin::Environment(name) }
        } else if let Some(value) = file {
            Self { value, origin: Origin::File }
        } else {
            Self { value: default(), origin: Origin::Default }
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.pad("default"),
            Self::File => f.pad("file"),
            Self::Environment(name) => f.pad(name),
            Self::Flag => f.pad("flag"),
        }
    }
}

// === impl ApiKey ===

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).finish_non_exhaustive()
    }
}

// === impl Config ===

impl Config {
    /// Settles every setting.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that is wrong, with the key's or variable's name and the nearest valid one.
    pub(crate) fn load(flags: Overrides, environment: &Environment) -> Result<Self, ConfigError> {
        environment.check_names()?;
        let dirs = Dirs::find(environment)?;
        let named = flags.config.or_else(|| environment.get("STOKER_CONFIG").map(PathBuf::from));
        let (path, optional) = match named {
            Some(path) => (path, false),
            None => (dirs.config.join("stoker.toml"), true),
        };
        let (file, file_path) = match std::fs::read_to_string(&path) {
            Ok(text) => (ConfigFile::parse(&text, &path)?, Some(path)),
            Err(e) if optional && e.kind() == std::io::ErrorKind::NotFound => (ConfigFile::default(), None),
            Err(source) => return Err(ConfigError::Unreadable { path, source }),
        };

        let ConfigFile {
            listen,
            models_dir,
            api_keys,
            hosts,
            dram,
            kv,
            ssd,
            ssd_dirs,
            remote,
            threads,
            workers,
            devices,
            gpu_memory,
            workers_per_gpu,
            reader,
            keep_alive,
            queue,
            wait_s,
            other_model_wait_s,
            shutdown_grace_s,
            offline,
            insecure,
            mut models,
        } = file;
        let memory = memory::Available::read();

        let keep_alive = Setting::settle(None, None, keep_alive, KeepAlive::default);
        for entry in models.values_mut() {
            entry.keep_alive.get_or_insert(keep_alive.value);
        }
        let config = Self {
            file: file_path,
            models: Setting::settle(
                flags.models,
                environment.get("STOKER_MODELS").map(PathBuf::from).map(|v| ("STOKER_MODELS", v)),
                models_dir,
                || dirs.data.join("models"),
            ),
            dirs,
            listen: Setting::settle(
                flags.listen,
                environment.parsed("STOKER_LISTEN")?.map(|v| ("STOKER_LISTEN", v)),
                listen,
                || SocketAddr::from(([127, 0, 0, 1], 7433)),
            ),
            api_keys: Setting::settle(
                flags.api_key.map(|secret| vec![ApiKey { name: "flag".into(), secret }]),
                environment.get("STOKER_API_KEY").map(|secret| {
                    ("STOKER_API_KEY", vec![ApiKey { name: "environment".into(), secret: secret.into() }])
                }),
                api_keys.map(|keys| {
                    keys.into_iter().map(|(name, secret)| ApiKey { name, secret }).collect::<Vec<_>>()
                }),
                Vec::new,
            ),
            hosts: Setting::settle(None, None, hosts, Vec::new),
            insecure: Setting::settle(flags.insecure.then_some(true), None, insecure, || false),
            offline: Setting::settle(
                flags.offline.then_some(true),
                ["STOKER_OFFLINE", "HF_HUB_OFFLINE"].into_iter().find_map(|name| {
                    environment.get(name).map(|v| (name, !matches!(v, "0" | "false" | "no")))
                }),
                offline,
                || false,
            ),
            dram: Setting::settle(
                flags.dram,
                environment.parsed("STOKER_DRAM")?.map(|v| ("STOKER_DRAM", v)),
                dram,
                || memory.dram_default(),
            ),
            kv: Setting::settle(
                flags.kv,
                environment.parsed("STOKER_KV")?.map(|v| ("STOKER_KV", v)),
                kv,
                || memory.kv_default(),
            ),
            threads: Setting::settle(flags.threads, None, threads, || {
                u32::try_from(stoker_engine::physical_cores()).unwrap_or(u32::MAX)
            }),
            workers: Setting::settle(flags.workers, None, workers, || 16),
            devices: Setting::settle(
                flags.devices,
                environment.parsed("STOKER_DEVICES")?.map(|v| ("STOKER_DEVICES", v)),
                devices,
                || Devices::Auto,
            ),
            gpu_memory: Setting::settle(
                flags.gpu_memory.map(Some),
                environment.parsed("STOKER_GPU_MEMORY")?.map(|v| ("STOKER_GPU_MEMORY", Some(v))),
                gpu_memory.map(Some),
                || None,
            ),
            workers_per_gpu: Setting::settle(flags.workers_per_gpu, None, workers_per_gpu, || 2),
            reader: Setting::settle(None, None, reader, ReaderSetting::default),
            keep_alive,
            queue: Setting::settle(None, None, queue, QueueLimits::default),
            wait_s: Setting::settle(None, None, wait_s, || 120),
            other_model_wait_s: Setting::settle(None, None, other_model_wait_s, || 15),
            shutdown_grace_s: Setting::settle(None, None, shutdown_grace_s, || 30),
            ssd: Setting::settle(
                None,
                environment.parsed("STOKER_SSD")?.map(|v| ("STOKER_SSD", Some(v))),
                ssd.map(Some),
                || None,
            ),
            ssd_dirs,
            remote_limits: remote,
            entries: models,
            remote: RemoteEnvironment {
                hf_endpoint: environment.get("HF_ENDPOINT").map(Into::into),
                hf_token: environment.get("HF_TOKEN").map(Into::into),
                python_index: environment.get("PIP_INDEX_URL").map(Into::into),
                stores: store_settings(environment),
            },
            telemetry: TelemetryEnvironment::of(environment),
        };
        Ok(config)
    }

    /// What a server gets that finds `left` in memory from one before it, which had its defaults when all of that was
    /// available.
    pub(crate) fn budgets(&self, left: Option<ByteSize>) -> MemoryBudgets {
        let Some(left) = left else { return MemoryBudgets { dram: self.dram.value, kv: self.kv.value } };
        let available = memory::Available::read().plus(left);
        let settled = |setting: &Setting<ByteSize>, default| match setting.origin {
            Origin::Default => default,
            _ => setting.value,
        };
        MemoryBudgets {
            dram: settled(&self.dram, available.dram_default()),
            kv: settled(&self.kv, available.kv_default()),
        }
    }

    /// Whether serving with this configuration is safe.
    ///
    /// # Errors
    /// [`ConfigError::OpenWithoutKey`].
    pub(crate) fn check_exposure(&self) -> Result<(), ConfigError> {
        let open = !self.listen.value.ip().is_loopback();
        if open && self.api_keys.value.is_empty() && !self.insecure.value {
            return Err(ConfigError::OpenWithoutKey { listen: self.listen.value });
        }
        Ok(())
    }

    /// Settings of a model: its entry's, else the server's defaults.
    pub(crate) fn settings_of(&self, model: &ModelName) -> ModelSettings {
        let defaults = ModelSettings { keep_alive: self.keep_alive.value, ..ModelSettings::default() };
        let Some(entry) = self.entries.get(model) else { return defaults };
        ModelSettings {
            keep_alive: entry.keep_alive.unwrap_or(defaults.keep_alive),
            pin: entry.pin.unwrap_or(defaults.pin),
            preload: entry.preload.unwrap_or(defaults.preload),
            instances_max: entry.max_instances.unwrap_or(defaults.instances_max),
            concurrency: entry.concurrency.unwrap_or(defaults.concurrency),
            context: entry.context.or(defaults.context),
            priority: entry.priority.unwrap_or(defaults.priority),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(extra: &[(&str, &str)]) -> Environment {
        let mut map: BTreeMap<String, String> =
            [("HOME", "/home/someone"), ("XDG_RUNTIME_DIR", "/run/user/1")]
                .map(|(k, v)| (k.into(), v.into()))
                .into();
        map.extend(extra.iter().map(|(k, v)| ((*k).into(), (*v).into())));
        Environment(map)
    }

    fn written(text: &str) -> (tempfile::TempDir, Overrides) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stoker.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Overrides { config: Some(path), ..Overrides::default() })
    }

    #[test]
    fn flag_over_environment_over_file_over_default() {
        let (_dir, flags) = written("listen = \"127.0.0.1:1\"\ndram = \"1GiB\"\nkeep_alive = \"5m\"\n");
        let environment = environment(&[("STOKER_LISTEN", "127.0.0.1:2"), ("STOKER_DRAM", "2GiB")]);
        let flags = Overrides { dram: Some(ByteSize::gib(3)), ..flags };
        let config = Config::load(flags, &environment).unwrap();
        assert_eq!((config.dram.value, config.dram.origin), (ByteSize::gib(3), Origin::Flag));
        assert_eq!(config.listen.value.port(), 2);
        assert_eq!(config.listen.origin, Origin::Environment("STOKER_LISTEN"));
        assert_eq!(config.keep_alive.origin, Origin::File);
        assert_eq!(config.queue.origin, Origin::Default);
        assert_eq!(config.models.value, PathBuf::from("/home/someone/.local/share/stoker/models"));
    }

    #[test]
    fn what_a_killed_server_left_counts_for_the_defaults() {
        let flags = Overrides { dram: Some(ByteSize::gib(3)), ..Overrides::default() };
        let config = Config::load(flags, &environment(&[])).unwrap();
        let before = config.budgets(None);
        assert_eq!(before, MemoryBudgets { dram: ByteSize::gib(3), kv: config.kv.value });
        let after = config.budgets(Some(ByteSize::gib(1000)));
        assert_eq!(after.dram, ByteSize::gib(3), "as it was given");
        assert!(after.kv >= ByteSize::gib(150), "{}", after.kv);
    }

    #[test]
    fn traces_are_exported_where_there_is_a_collector() {
        let of = |extra: &[(&str, &str)]| {
            Config::load(Overrides::default(), &environment(extra)).unwrap().telemetry
        };
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
        assert_eq!(of(&[]), TelemetryEnvironment { traces: false, service: Some("stoker") });
        assert_eq!(of(&[endpoint]), TelemetryEnvironment { traces: true, service: Some("stoker") });
        assert!(of(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/v1/traces")]).traces);
        assert!(!of(&[endpoint, ("OTEL_SDK_DISABLED", "True")]).traces);
        assert!(!of(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]).traces);
        assert_eq!(of(&[endpoint, ("OTEL_SERVICE_NAME", "box")]).service, None);
        assert_eq!(of(&[endpoint, ("OTEL_RESOURCE_ATTRIBUTES", "a=b,service.name=box")]).service, None);
    }

    #[test]
    fn an_unknown_variable_names_the_nearest() {
        let error = Config::load(Overrides::default(), &environment(&[("STOKER_LISTN", "x")])).unwrap_err();
        assert_eq!(error.to_string(), "unknown variable STOKER_LISTN; did you mean STOKER_LISTEN?");
    }

    #[test]
    fn devices_come_from_flag_environment_and_file() {
        let (_dir, flags) = written("devices = [\"cuda:0\", \"cuda:1\"]\ngpu_memory = \"24GiB\"\n");
        let config = Config::load(flags.clone(), &environment(&[])).unwrap();
        assert_eq!(config.devices.value, "cuda:0,cuda:1".parse().unwrap());
        assert_eq!(config.gpu_memory.value, Some(ByteSize::gib(24)));
        let config = Config::load(flags.clone(), &environment(&[("STOKER_DEVICES", "cpu")])).unwrap();
        assert_eq!(config.devices.value, Devices::Cpu);
        let flags = Overrides { devices: Some("cuda:3".parse().unwrap()), ..flags };
        let config = Config::load(flags, &environment(&[("STOKER_DEVICES", "cpu")])).unwrap();
        assert_eq!(
            (config.devices.value.to_string().as_str(), config.devices.origin),
            ("cuda:3", Origin::Flag)
        );
        let (_dir, flags) = written("devices = \"gpu\"\n");
        let error = Config::load(flags, &environment(&[])).unwrap_err();
        assert!(error.to_string().contains("`gpu` is no device: write `auto`, `cpu`"), "{error}");
        let config = Config::load(Overrides::default(), &environment(&[])).unwrap();
        assert_eq!((config.devices.value, config.gpu_memory.value), (Devices::Auto, None));
    }

    #[test]
    fn a_bad_variable_says_what_it_should_be() {
        let error = Config::load(Overrides::default(), &environment(&[("STOKER_DRAM", "much")])).unwrap_err();
        assert!(error.to_string().starts_with("STOKER_DRAM = `much`: `much` is not a size"), "{error}");
    }

    #[test]
    fn beyond_loopback_needs_a_key() {
        let open = |extra: &[(&str, &str)], flags| {
            Config::load(flags, &environment(extra)).unwrap().check_exposure()
        };
        let listen = ("STOKER_LISTEN", "0.0.0.0:7433");
        assert!(matches!(open(&[listen], Overrides::default()), Err(ConfigError::OpenWithoutKey { .. })));
        assert!(open(&[listen, ("STOKER_API_KEY", "k")], Overrides::default()).is_ok());
        assert!(open(&[listen], Overrides { insecure: true, ..Overrides::default() }).is_ok());
        assert!(open(&[("STOKER_LISTEN", "[::1]:7433")], Overrides::default()).is_ok());
    }

    #[test]
    fn a_models_settings_fall_back_to_the_servers() {
        let (_dir, flags) =
            written("keep_alive = \"1m\"\n[models.a]\npath = \"/m\"\npin = true\nconcurrency = 2\n");
        let config = Config::load(flags, &environment(&[])).unwrap();
        let a = config.settings_of(&"a".parse().unwrap());
        assert!(a.pin && a.concurrency == 2);
        assert_eq!(a.keep_alive, "1m".parse().unwrap());
        let other = config.settings_of(&"b".parse().unwrap());
        assert_eq!((other.pin, other.keep_alive), (false, "1m".parse().unwrap()));
    }
}
