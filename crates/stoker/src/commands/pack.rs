//! `stoker pack`: a model written anew as it is loaded.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use stoker_checkpoint::{Source, Trust, index};
use stoker_store::{
    Layout, Shard,
    pack::{PackReport, pack},
};
use stoker_types::{ByteSize, BytesPerSec, clock};

use super::models;
use crate::{cli::PackArgs, config::Config, output::Output};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    output: PathBuf,
    files: Vec<PathBuf>,
    bytes: u64,
    tensors: usize,
    /// Whether tensors lie in the order in which they are computed with; else in that of the files that were read.
    in_execution_order: bool,
    /// What was known of the bytes that were read; every chunk of the packed files has its sum.
    input_trust: Trust,
    /// Copies that bring the model to a device, before and now: bytes side by side are one.
    pieces_before: usize,
    pieces: usize,
    seconds: f64,
}

/// Packs.
pub(crate) fn run(config: &Config, args: &PackArgs, output: Output) -> anyhow::Result<()> {
    let path = Path::new(&args.model);
    let (dir, manifest) = if path.exists() {
        let source = Source { uri: args.model.clone(), revision: None };
        (std::path::absolute(path)?, Arc::new(index(path, source)?))
    } else {
        models::find(config, &args.model)?
    };
    let target = args.output.clone().unwrap_or_else(|| default_output(&args.model));
    let bar = output.bytes_bar(manifest.weight_bytes(), args.model.clone());
    let begun = clock::now();
    let packed = tokio::task::block_in_place(|| {
        pack(&dir, &manifest, &target, args.shards, &mut |progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        })
    });
    bar.finish_and_clear();
    let PackReport { files, bytes, tensors, in_execution_order, trust } = packed?;
    let took = begun.elapsed();
    let mut pieces_before = 0;
    for rank in 0..args.shards.unwrap_or(1) {
        pieces_before += Layout::of_shard(&manifest, Shard::new(rank, args.shards.unwrap_or(1))?)?.pieces();
    }
    let mut pieces = 0;
    for file in &files {
        let folder = file.parent().unwrap_or(&target);
        let source = Source { uri: args.model.clone(), revision: None };
        pieces += Layout::of_manifest(&index(folder, source)?).pieces();
    }
    let report = Report {
        model: args.model.clone(),
        output: target,
        files,
        bytes: bytes.0,
        tensors,
        in_execution_order,
        input_trust: trust,
        pieces_before,
        pieces,
        seconds: took.as_secs_f64(),
    };
    output.show(&report, |r| {
        let order = if r.in_execution_order {
            "in execution order"
        } else {
            "in the files' order (family not known)"
        };
        let files: String = r.files.iter().map(|file| format!("\n  {}", file.display())).collect();
        format!(
            "{}: {} tensors {order}, {} in {:.1} s ({}); {} pieces on a device, {} before{files}",
            r.output.display(),
            r.tensors,
            ByteSize(r.bytes),
            r.seconds,
            BytesPerSec::of(ByteSize(r.bytes), took),
            r.pieces,
            r.pieces_before,
        )
    })
}

/// In the working directory, after the model's name or its file's.
fn default_output(model: &str) -> PathBuf {
    let name = Path::new(model).file_name().map_or_else(|| model.into(), |name| name.to_string_lossy());
    let name = name.strip_suffix(".gguf").or_else(|| name.strip_suffix(".safetensors")).unwrap_or(&name);
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' };
    PathBuf::from(format!("{}-packed", name.chars().map(plain).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_after_what_is_packed() {
        assert_eq!(default_output("smollm2:135m"), Path::new("smollm2-135m-packed"));
        assert_eq!(default_output("/models/a.b-Q4.gguf"), Path::new("a.b-Q4-packed"));
        assert_eq!(default_output("folder/"), Path::new("folder-packed"));
    }
}
