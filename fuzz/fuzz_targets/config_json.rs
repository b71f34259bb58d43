//! Any bytes as a `config.json`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stoker_checkpoint::config::{Support, hf};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Support::Runs(config)) = hf::parse(Path::new("x"), bytes) {
        assert!(config.validate().is_ok() && config.kv_bytes_per_token() > 0);
    }
});
