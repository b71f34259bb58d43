//! Any bytes as a `stoker.json`; the summary agrees with the whole.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stoker_checkpoint::{Manifest, ManifestSummary};

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("x");
    let summary = ManifestSummary::parse(path, bytes);
    let Ok(manifest) = Manifest::parse(path, bytes) else { return };
    let summary = summary.expect("a good manifest has a summary");
    assert_eq!(summary.config, manifest.config);
    assert_eq!(
        summary.weight_bytes(),
        manifest.files.iter().fold(0, |n: u64, f| n.saturating_add(f.identity.len))
    );
    for tensor in &manifest.tensors {
        let file = &manifest.files[tensor.file as usize];
        assert!(tensor.offset + tensor.len <= file.identity.len);
    }
});
