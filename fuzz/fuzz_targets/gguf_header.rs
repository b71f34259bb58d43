//! Any bytes as a GGUF file, and what passes as a configuration.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stoker_checkpoint::{
    config::{self, Support},
    gguf::Header,
};

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("x");
    let file_len = bytes.len() as u64 + (1 << 20);
    let Ok(header) = Header::read(path, bytes, file_len) else { return };
    for tensor in &header.tensors {
        assert!(tensor.offset >= header.data_offset && tensor.offset + tensor.len <= file_len);
    }
    for value in header.metadata.values() {
        if let Some(texts) = value.as_strings() {
            assert_eq!(texts.iter().count(), texts.len());
        }
    }
    if let Ok(Support::Runs(config)) = config::gguf::read(path, &header) {
        assert!(config.validate().is_ok() && config.kv_bytes_per_token() > 0);
    }
});
