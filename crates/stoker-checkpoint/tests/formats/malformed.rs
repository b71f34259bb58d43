//! Every way in which a checkpoint can be wrong is its own error, and none is a panic.

use std::{fs, path::Path};

use proptest::prelude::*;
use stoker_checkpoint::{
    CheckpointError as E, Manifest, ManifestSummary, config, gguf, index,
    safetensors::{self, ShardIndex},
};

use crate::common::{Gguf, GgufTensor, Meta, data, safetensors, source};

fn read_gguf(bytes: &[u8]) -> Result<gguf::Header, E> {
    gguf::Header::read(Path::new("m.gguf"), bytes, bytes.len() as u64)
}

fn read_safetensors(bytes: &[u8]) -> Result<safetensors::Header, E> {
    safetensors::Header::read(Path::new("m.safetensors"), bytes, bytes.len() as u64)
}

/// Fails unless the result is an error of the pattern, whose message names the file and the text.
macro_rules! errs {
    ($($case:expr => $pattern:pat, $says:expr;)*) => {$(
        match $case {
            Ok(_) => panic!("{} passed", stringify!($case)),
            Err(error) => {
                let text = error.to_string();
                assert!(matches!(error, $pattern), "{}: {error:?}", stringify!($case));
                assert!(text.contains($says), "`{text}` doesn't say `{}`", $says);
            }
        }
    )*};
}

#[test]
fn gguf_headers() {
    let file = Gguf::tiny;
    assert!(read_gguf(&file().bytes()).is_ok());
    assert!(read_gguf(&file().change(|f| f.version = 2).bytes()).is_ok());
    let aligned = file().with("general.alignment", Meta::U32(64)).change(|f| f.alignment = 64).bytes();
    assert!(read_gguf(&aligned).is_ok());

    let changed = |f: fn(&mut Gguf)| read_gguf(&file().change(f).bytes());
    let with = |value: Meta| read_gguf(&file().with("k", value).bytes());
    let huge = || 1_u64.wrapping_shl(60).to_le_bytes().to_vec();
    errs! {
        read_gguf(b"") => E::Truncated { what: "magic", offset: 0, .. }, "m.gguf";
        read_gguf(b"GGUF\x03\0\0\0\x01") => E::Truncated { offset: 8, needed: 8, available: 1, .. }, "offset 8";
        changed(|f| f.magic = *b"GGML") => E::BadMagic { found: [b'G', b'G', b'M', b'L'], .. }, "not a GGUF";
        changed(|f| f.version = 3 << 24) => E::BigEndian { .. }, "big-endian";
        changed(|f| f.version = 1) => E::UnsupportedVersion { found: 1, .. }, "version 1";
        changed(|f| f.version = 4) => E::UnsupportedVersion { found: 4, .. }, "2 and 3";
        changed(|f| f.version = 0) => E::UnsupportedVersion { found: 0, .. }, "version 0";
        changed(|f| f.tensor_count = Some(1 << 40)) => E::CountTooLarge { what: "tensors", .. }, "absurd";
        changed(|f| f.meta_count = Some(u64::MAX)) => E::CountTooLarge { offset: 16, .. }, "offset 16";
        changed(|f| f.meta_count = Some(8)) => E::Truncated { .. } | E::UnknownValueType { .. } | E::CountTooLarge { .. } | E::TooManyDimensions { .. } | E::UnknownTensorType { .. }, "m.gguf";
        changed(|f| f.meta[0].0 = b"\xff\xfe".to_vec()) => E::BadUtf8 { what: "metadata key", .. }, "UTF-8";
        changed(|f| f.meta.push(f.meta[1].clone())) => E::DuplicateKey { .. }, "llama.block_count";
        changed(|f| f.tensors.push(f.tensors[0].clone())) => E::DuplicateTensor { .. }, "token_embd.weight";
        with(Meta::Raw(13, vec![])) => E::UnknownValueType { number: 13, .. }, "`k`";
        with(Meta::Raw(9, 9_u32.to_le_bytes().to_vec())) => E::UnknownValueType { number: 9, .. }, "`k`";
        with(Meta::Raw(7, vec![2])) => E::BadValue { .. }, "boolean";
        with(Meta::Raw(8, huge())) => E::Truncated { what: "metadata value", .. }, "m.gguf";
        with(Meta::Raw(9, [4_u32.to_le_bytes().to_vec(), huge()].concat())) => E::CountTooLarge { .. }, "array elements";
        with(Meta::Raw(9, [8_u32.to_le_bytes().to_vec(), huge()].concat())) => E::CountTooLarge { .. }, "array elements";
        with(Meta::Raw(8, [1_u64.to_le_bytes().to_vec(), vec![0xff]].concat())) => E::BadUtf8 { .. }, "metadata value";
        read_gguf(&file().with("general.alignment", Meta::U32(33)).bytes()) => E::BadAlignment { alignment: 33, .. }, "33";
        read_gguf(&file().with("general.alignment", Meta::U32(0)).bytes()) => E::BadAlignment { .. }, "0";
        read_gguf(&file().with("general.alignment", Meta::U32(1 << 30)).bytes()) => E::BadAlignment { .. }, "power of two";
        read_gguf(&file().with("general.alignment", Meta::Text("x")).bytes()) => E::BadValue { .. }, "general.alignment";
        changed(|f| f.tensors[0].dims = vec![1; 5]) => E::TooManyDimensions { dims: 5, max: 4, .. }, "token_embd";
        changed(|f| f.tensors[0].dims = vec![1 << 40; 3]) => E::BadShape { .. }, "token_embd";
        changed(|f| f.tensors[0].kind = 2) => E::BadShape { .. }, "Q4_0";
        changed(|f| f.tensors[0].kind = 4) => E::UnknownTensorType { .. }, "ggml type 4";
        changed(|f| f.tensors[0].dims[1] = 1 << 40) => E::OutOfRange { .. }, "token_embd";
        changed(|f| f.tensors[1].offset = Some(7)) => E::Misaligned { offset: 7, alignment: 32, .. }, "output_norm";
        changed(|f| f.tensors[1].offset = Some(u64::MAX - 31)) => E::OutOfRange { .. }, "output_norm";
        changed(|f| f.tensors[1].offset = Some(0)) => E::Overlap { .. }, "token_embd";
        changed(|f| { f.tensors[0].dims = vec![8, 2]; }) => E::Gap { .. }, "output_norm";
    }
    let mut cut = file().bytes();
    cut.truncate(cut.len() - 1);
    errs! { read_gguf(&cut) => E::OutOfRange { .. }, "blk.0.ffn_down.weight"; }
    // Shorter than its length claims: the reader ends early.
    let bytes = file().bytes();
    errs! {
        gguf::Header::read(Path::new("m.gguf"), &bytes[..100], bytes.len() as u64) => E::Truncated { .. }, "m.gguf";
        gguf::Header::open(Path::new("/nowhere/m.gguf")) => E::Io { .. }, "/nowhere/m.gguf";
    }
}

#[test]
fn gguf_values() {
    let file = Gguf::tiny()
        .with("texts", Meta::Texts(vec!["a".into(), String::new(), "çé".into()]))
        .with("numbers", Meta::I32s(vec![-1, 5]))
        .with("wide", Meta::Raw(10, 7_u64.to_le_bytes().to_vec()))
        .with("negative", Meta::Raw(11, (-7_i64).to_le_bytes().to_vec()));
    let header = read_gguf(&file.bytes()).unwrap();
    let texts = header.get("texts").unwrap().as_strings().unwrap();
    assert_eq!(texts.iter().collect::<Vec<_>>(), ["a", "", "çé"]);
    assert_eq!((texts.len(), texts.get(2), texts.get(3)), (3, Some("çé"), None));
    assert_eq!(header.get("numbers").unwrap().as_i32s().unwrap()[..], [-1, 5]);
    assert_eq!((header.u32("wide"), header.u32("negative"), header.u32("absent")), (Some(7), None, None));
    assert_eq!(header.str("general.architecture"), Some("llama"));
    let embedding = &header.tensors[0];
    assert_eq!((&embedding.shape[..], embedding.offset), (&[10, 8][..], header.data_offset));
}

#[test]
fn safetensors_headers() {
    let tensor =
        |begin: u64, end: u64| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{begin},{end}]}}"#);
    let one = |entry: &str, data| read_safetensors(&safetensors(&format!(r#"{{"a":{entry}}}"#), data));
    let two = |a: &str, b: &str| read_safetensors(&safetensors(&format!(r#"{{"a":{a},"b":{b}}}"#), 16));
    let header = two(&tensor(8, 16), &tensor(0, 8)).unwrap();
    assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert!(read_safetensors(&safetensors(r#"{"__metadata__":{"format":"pt"}}   "#, 0)).is_ok());

    let mut long = safetensors("{}", 0);
    long[..8].copy_from_slice(&200_000_000_u64.to_le_bytes());
    let mut beyond = safetensors("{}", 0);
    beyond[..8].copy_from_slice(&1000_u64.to_le_bytes());
    let text = |bytes: &[u8]| read_safetensors(&[&(bytes.len() as u64).to_le_bytes()[..], bytes].concat());
    errs! {
        read_safetensors(b"1234") => E::Truncated { needed: 8, available: 4, .. }, "m.safetensors";
        read_safetensors(&long) => E::HeaderTooLarge { len: 200_000_000, .. }, "absurd";
        read_safetensors(&beyond) => E::Truncated { what: "header", offset: 8, needed: 1000, available: 2, .. }, "offset 8";
        text(b"{\"\xff\":1}") => E::BadUtf8 { offset: 10, .. }, "UTF-8";
        text(b"[]") => E::Json { .. }, "m.safetensors";
        text(b"{} x") => E::Json { .. }, "trailing";
        one("{}", 0) => E::Json { .. }, "dtype";
        one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}"#, 8) => E::Json { .. }, "m.safetensors";
        one(r#"{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}"#, 8) => E::Json { .. }, "duplicate";
        read_safetensors(&safetensors(r#"{"__metadata__":{"k":"a","k":"b"}}"#, 0)) => E::DuplicateKey { .. }, "`k`";
        read_safetensors(&safetensors(&format!(r#"{{"a":{t},"a":{t}}}"#, t = tensor(0, 8)), 8)) => E::DuplicateTensor { .. }, "`a`";
        one(r#"{"dtype":"F31","shape":[2],"data_offsets":[0,8]}"#, 8) => E::UnknownTensorType { .. }, "F31";
        one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#, 4) => E::TooManyDimensions { dims: 9, .. }, "`a`";
        one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#, 8) => E::BadShape { .. }, "`a`";
        one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, 1) => E::BadShape { .. }, "F4";
        one(&tensor(8, 0), 8) => E::EndsBeforeBegin { begin: 8, end: 0, .. }, "`a`";
        one(&tensor(0, 8), 7) => E::OutOfRange { len: 8, .. }, "`a`";
        one(&tensor(u64::MAX - 7, u64::MAX), 8) => E::OutOfRange { .. }, "`a`";
        one(&tensor(0, 12), 12) => E::LengthMismatch { expected: 8, found: 12, .. }, "`a`";
        two(&tensor(0, 8), &tensor(4, 12)) => E::Overlap { .. }, "`a` and `b`";
        two(&tensor(0, 8), &tensor(0, 8)) => E::Overlap { .. }, "`b`";
        one(&tensor(8, 16), 16) => E::Gap { len: 8, .. }, "`a`";
        one(&tensor(0, 8), 9) => E::Gap { len: 1, .. }, "end of the file";
    }
}

#[test]
fn shard_indexes() {
    let parse =
        |map: &str| ShardIndex::parse(Path::new("i.json"), format!(r#"{{"weight_map":{map}}}"#).as_bytes());
    let good = parse(r#"{"a":"1.safetensors","b":"2.safetensors","c":"1.safetensors"}"#).unwrap();
    assert_eq!(good.shards["1.safetensors"], ["a", "c"]);
    for outside in ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\\\b", "c:x", "nul\\u0000"] {
        let result = parse(&format!(r#"{{"a":"{outside}"}}"#));
        assert!(matches!(result, Err(E::ShardOutside { .. })), "{outside}: {result:?}");
    }
    errs! {
        parse(r#"{"a":"1","a":"2"}"#) => E::DuplicateTensor { .. }, "`a`";
        parse(r#"{"a":1}"#) => E::Json { .. }, "i.json";
        parse("[]") => E::Json { .. }, "i.json";
    }
}

#[test]
fn folders() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let run = || index(dir, source());
    let put = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    errs! {
        index(&dir.join("absent"), source()) => E::Io { .. }, "absent";
        run() => E::NotAModel { .. }, "no *.safetensors";
    }
    put("notes.txt", b"");
    errs! { index(&dir.join("notes.txt"), source()) => E::NotAModel { .. }, "notes.txt"; }

    put("a.safetensors", &safetensors("{}", 0));
    errs! { run() => E::NotAModel { .. }, "config.json"; }
    put("b.gguf", &Gguf::tiny().bytes());
    errs! { run() => E::NotAModel { .. }, "several weight files"; }
    fs::remove_file(dir.join("a.safetensors")).unwrap();
    assert_eq!(run().unwrap().refusal, None);

    // What the configuration demands, and the files don't have.
    let gguf = |f: fn(&mut Gguf)| {
        put("b.gguf", &Gguf::tiny().change(f).bytes());
        run()
    };
    errs! {
        gguf(|f| { f.tensors.pop(); }) => E::MissingTensor { .. }, "blk.0.ffn_down.weight";
        gguf(|f| { f.tensor("blk.0.attn_k.weight").dims = vec![4, 8]; }) => E::WrongShape { .. }, "[4, 8]";
        gguf(|f| { *f = f.clone().without("llama.block_count"); }) => E::BadValue { .. }, "llama.block_count";
        gguf(|f| { *f = f.clone().with("split.count", Meta::U32(2)); }) => E::BadValue { .. }, "split.count";
    }
    fs::remove_file(dir.join("b.gguf")).unwrap();

    // Shards.
    for entry in fs::read_dir(data("tiny-llama-bf16-sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    assert!(run().is_ok());
    let index_name = "model.safetensors.index.json";
    let right = fs::read_to_string(dir.join(index_name)).unwrap();
    put(index_name, right.replace("model-00004", "model-00003").as_bytes());
    errs! { run() => E::ShardDisagrees { .. }, "model-00003"; }
    put(index_name, right.replace("00004-of", "00009-of").as_bytes());
    errs! { run() => E::MissingShard { .. }, "model-00009"; }
    put(index_name, br#"{"weight_map":{}}"#);
    errs! { run() => E::NotAModel { .. }, "names no tensor"; }
    put(index_name, right.as_bytes());
    fs::copy(dir.join("model-00001-of-00004.safetensors"), dir.join("model-00002-of-00004.safetensors"))
        .unwrap();
    errs! { run() => E::ShardDisagrees { .. }, "model-00002"; }
}

#[test]
fn split_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let name = |part: u32| dir.path().join(format!("tiny-{part:05}-of-00002.gguf"));
    let split = |part: u16| {
        Gguf::tiny()
            .with("split.no", Meta::Raw(2, part.to_le_bytes().to_vec()))
            .with("split.count", Meta::Raw(2, 2_u16.to_le_bytes().to_vec()))
    };
    let first = split(0).change(|f| f.tensors.truncate(4));
    let second = split(1).change(|f| {
        f.meta.retain(|(key, _)| key.starts_with(b"split"));
        f.tensors.drain(..4);
    });
    fs::write(name(1), first.bytes()).unwrap();
    errs! { index(&name(1), source()) => E::MissingShard { .. }, "tiny-00002-of-00002.gguf"; }
    fs::write(name(2), second.bytes()).unwrap();
    let whole = index(&name(1), source()).unwrap();
    assert_eq!((whole.files.len(), whole.tensors.len()), (2, 11));
    assert_eq!(index(&name(2), source()).unwrap(), whole, "whichever part is named");
    assert_eq!(index(dir.path(), source()).unwrap(), whole);
    fs::write(name(2), first.bytes()).unwrap();
    errs! { index(&name(1), source()) => E::DuplicateTensor { .. }, "token_embd.weight"; }
}

#[test]
fn manifests() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, Gguf::tiny().bytes()).unwrap();
    let good = index(&file, source()).unwrap();
    let check = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        manifest.write(dir.path()).unwrap();
        Manifest::read(dir.path())
    };
    assert!(check(&|_| {}).is_ok());
    errs! {
        check(&|m| m.version = 2) => E::UnsupportedVersion { found: 2, .. }, "stoker.json";
        check(&|m| m.tensors[3].file = 1) => E::BadManifest { .. }, "file 1";
        check(&|m| m.tensors[3].offset = u64::MAX) => E::BadManifest { .. }, "beyond";
        check(&|m| m.tensors[3].len += 1) => E::BadManifest { .. }, "shape";
        check(&|m| m.files[0].path = "../m.gguf".into()) => E::BadManifest { .. }, "leads out";
        check(&|m| m.files[0].chunk_sums = vec![stoker_checkpoint::ChunkSum(1); 2]) => E::BadManifest { .. }, "2 sums for 1 chunks";
        check(&|m| m.trust = stoker_checkpoint::Trust::Chunk) => E::BadManifest { .. }, "0 sums for 1 chunks";
        check(&|m| m.files[0].sha256 = Some("abc".into())) => E::BadManifest { .. }, "sha256";
        check(&|m| m.config.as_mut().unwrap().kv_heads = 0) => E::BadManifest { .. }, "kv_heads";
        check(&|m| m.config = None) => E::BadManifest { .. }, "either";
        check(&|m| { m.tensors.pop(); }) => E::MissingTensor { .. }, "output_norm.weight";
        check(&|m| m.tensors[1].role = m.tensors[0].role) => E::DuplicateTensor { .. } | E::WrongShape { .. }, "blk.0.attn_norm";
    }
    errs! {
        ManifestSummary::parse(Path::new("stoker.json"), b"{}") => E::Json { .. }, "stoker.json";
        ManifestSummary::parse(Path::new("stoker.json"), br#"{"version":7}"#) => E::UnsupportedVersion { .. }, "7";
        Manifest::read(&dir.path().join("absent")) => E::Io { .. }, "absent";
        // Nobody can write here: a file is in the directory's place.
        good.write(&file) => E::Io { .. }, "m.gguf";
    }
}

#[test]
fn a_long_summary_is_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, Gguf::tiny().bytes()).unwrap();
    let mut manifest = index(&file, source()).unwrap();
    manifest.source.uri = "x".repeat(20_000);
    manifest.write(dir.path()).unwrap();
    assert_eq!(ManifestSummary::read(dir.path()).unwrap().source, manifest.source);
}

/// A right file with some bytes changed, cut or put in: more often nearly right than random bytes are.
fn mutated(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..6);
    edits.prop_map(move |edits| {
        let mut bytes = bytes.clone();
        for (at, value, kind) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match kind {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, value),
                2 => drop(bytes.remove(at)),
                _ => bytes[at] = value,
            }
        }
        bytes
    })
}

fn header_of(name: &str) -> Vec<u8> {
    let mut bytes = fs::read(data(name).join("model.safetensors")).unwrap();
    bytes.truncate(8 + usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
    bytes
}

proptest! {
    #[test]
    fn mutated_gguf_never_panics(bytes in mutated(Gguf::tiny().bytes())) {
        if let Ok(header) = read_gguf(&bytes) {
            for tensor in &header.tensors {
                prop_assert!(tensor.offset + tensor.len <= bytes.len() as u64);
            }
            let _ = config::gguf::read(Path::new("m.gguf"), &header);
        }
    }

    #[test]
    fn mutated_safetensors_never_panic(bytes in mutated(header_of("tiny-llama"))) {
        let _ = safetensors::Header::read(Path::new("m"), &bytes[..], 587_184);
    }

    #[test]
    fn mutated_configs_never_panic(bytes in mutated(fs::read(data("tiny-llama3").join("config.json")).unwrap())) {
        if let Ok(config::Support::Runs(config)) = config::hf::parse(Path::new("config.json"), &bytes) {
            prop_assert!(config.validate().is_ok());
            prop_assert!(config.kv_bytes_per_token() > 0);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let path = Path::new("x");
        let _ = read_gguf(&bytes);
        let _ = read_safetensors(&bytes);
        let _ = config::hf::parse(path, &bytes);
        let _ = ShardIndex::parse(path, &bytes);
        let _ = Manifest::parse(path, &bytes);
        let _ = ManifestSummary::parse(path, &bytes);
    }
}

#[test]
fn an_unused_tensor_type_is_no_error_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let extra = GgufTensor { name: "extra".into(), dims: vec![4], kind: 26, data: vec![0; 16], offset: None };
    fs::write(&file, Gguf::tiny().change(|f| f.tensors.push(extra)).bytes()).unwrap();
    let manifest = index(&file, source()).unwrap();
    assert!(manifest.refusal.unwrap().contains("`extra` has no place"));
    assert_eq!(manifest.config, None);
    assert_eq!(manifest.tensors.len(), 12);
}
