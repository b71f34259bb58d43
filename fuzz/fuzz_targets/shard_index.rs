//! Any bytes as a `model.safetensors.index.json`.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use stoker_checkpoint::safetensors::ShardIndex;

fuzz_target!(|bytes: &[u8]| {
    let Ok(index) = ShardIndex::parse(Path::new("x"), bytes) else { return };
    for shard in index.shards.keys() {
        let mut parts = Path::new(shard).components();
        assert!(matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)), "{shard:?}");
    }
});
