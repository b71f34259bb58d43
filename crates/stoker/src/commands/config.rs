//! `stoker config check`.

use serde::Serialize;

use crate::{
    config::{Config, Setting},
    output::{Output, Table},
};

#[derive(Debug, Serialize)]
struct Report {
    file: Option<std::path::PathBuf>,
    settings: Vec<Row>,
    models: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Row {
    key: &'static str,
    value: String,
    origin: String,
}

/// Prints each setting with its value and origin. That the configuration could be read is the check.
pub(crate) fn check(config: &Config, output: Output) -> anyhow::Result<()> {
    fn row<T>(key: &'static str, setting: &Setting<T>, show: impl Fn(&T) -> String) -> Row {
        Row { key, value: show(&setting.value), origin: setting.origin.to_string() }
    }
    let names = |keys: &Vec<crate::config::ApiKey>| {
        let names: Vec<&str> = keys.iter().map(|k| k.name.as_str()).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    };
    let settings = vec![
        row("listen", &config.listen, ToString::to_string),
        row("models_dir", &config.models, |p| p.display().to_string()),
        row("api_keys", &config.api_keys, names),
        row("hosts", &config.hosts, |h| h.join(", ")),
        row("insecure", &config.insecure, ToString::to_string),
        row("offline", &config.offline, ToString::to_string),
        row("reader", &config.reader, |reader| reader.name().to_owned()),
        row("dram", &config.dram, ToString::to_string),
        row("kv", &config.kv, ToString::to_string),
        row("ssd", &config.ssd, |ssd| {
            ssd.map_or("80 % of the disk, 10 % and 20 GiB stay free".to_owned(), |ssd| ssd.to_string())
        }),
        row("devices", &config.devices, ToString::to_string),
        row("gpu_memory", &config.gpu_memory, |gpu| {
            gpu.map_or("what is free, less 512 MiB or 3 %".to_owned(), |gpu| gpu.to_string())
        }),
        row("workers_per_gpu", &config.workers_per_gpu, ToString::to_string),
        row("threads", &config.threads, ToString::to_string),
        row("workers", &config.workers, ToString::to_string),
        row("keep_alive", &config.keep_alive, ToString::to_string),
        row("queue.per_model_max", &config.queue, |q| q.per_model_max.to_string()),
        row("queue.total_max", &config.queue, |q| q.total_max.to_string()),
        row("wait_s", &config.wait_s, ToString::to_string),
        row("other_model_wait_s", &config.other_model_wait_s, ToString::to_string),
        row("shutdown_grace_s", &config.shutdown_grace_s, ToString::to_string),
    ];
    let report = Report {
        file: config.file.clone(),
        settings,
        models: config.entries.keys().map(ToString::to_string).collect(),
    };
    output.show(&report, |report| {
        let mut table = Table::new(["KEY", "VALUE", "FROM"]);
        for Row { key, value, origin } in &report.settings {
            table.row([(*key).to_owned(), value.clone(), origin.clone()]);
        }
        let file = report.file.as_ref().map_or("no file".to_owned(), |p| p.display().to_string());
        format!("{file}; {} models named\n\n{}", report.models.len(), table.render())
    })
}
