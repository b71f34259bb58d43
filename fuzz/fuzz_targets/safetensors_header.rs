//! Any bytes as a safetensors file. The data may be longer than what the fuzzer wrote: headers are what is tested.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use stoker_checkpoint::safetensors::Header;

fuzz_target!(|bytes: &[u8]| {
    for file_len in [bytes.len() as u64, 1 << 20] {
        let Ok(header) = Header::read(Path::new("x"), bytes, file_len) else { continue };
        let mut end = header.data_offset;
        for tensor in &header.tensors {
            assert_eq!(tensor.offset, end, "tensors fill the file");
            end += tensor.len;
        }
        assert_eq!(end, file_len);
    }
});
