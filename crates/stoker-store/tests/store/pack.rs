//! Packed models: every tensor is what it was, wherever it lies; nothing is left of what fails.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use stoker_checkpoint::{
    Manifest, Part, RankOf, Role, Source, Tensor, TokenizerFiles, Trust,
    gguf::Value,
    index,
    manifest::CHUNK_BYTES,
    pack::{Container, FILE_ALIGN, NewFile, NewTensor, TENSOR_ALIGN},
};
use stoker_store::{
    CheckpointFiles, LoadError, Priority, SliceError, Store, StoreConfig,
    pack::{PackError, PackProgress, PackReport, pack},
};
use stoker_types::{ByteSize, DType, ModelName};
use tokio_util::sync::CancellationToken;

/// A tensor of a model that is made for a test.
#[derive(Debug, Clone)]
struct Made {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
}

/// The dimensions of a llama.
#[derive(Debug, Clone, Copy)]
struct Llama {
    hidden: u64,
    intermediate: u64,
    vocab: u64,
    heads: u64,
    kv_heads: u64,
}

fn source() -> Source {
    Source { uri: "test".into(), revision: None }
}

fn len_of(dtype: DType, shape: &[u64]) -> u64 {
    dtype.bytes_of(shape.iter().product()).unwrap()
}

/// Bytes that tell every tensor and every place in it from others.
fn content(name: &str, len: u64) -> Vec<u8> {
    let mut state = name
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap() + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(len).unwrap());
    bytes
}

/// Writes a weight file of these tensors.
fn write(path: &Path, container: Container<'_>, tensors: &[Made]) {
    let new: Vec<NewTensor<'_>> = tensors
        .iter()
        .map(|t| NewTensor { name: &t.name, dtype: t.dtype, shape: &t.shape, len: len_of(t.dtype, &t.shape) })
        .collect();
    let file = NewFile::lay_out(path, container, &new).unwrap();
    let out = fs::File::create_new(path).unwrap();
    out.set_len(file.len).unwrap();
    out.write_all_at(&file.header, 0).unwrap();
    for (tensor, offset) in new.iter().zip(&file.offsets) {
        out.write_all_at(&content(tensor.name, tensor.len), *offset).unwrap();
    }
}

/// A safetensors folder: tensors as they come, in so many shards.
fn folder(dir: &Path, config: &str, tensors: &[Made], shards: usize) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("config.json"), config).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if shards == 1 {
        return write(&dir.join("model.safetensors"), Container::Safetensors(&metadata), tensors);
    }
    let mut map = Vec::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let some: Vec<Made> = tensors.iter().skip(shard).step_by(shards).cloned().collect();
        map.extend(some.iter().map(|t| format!("{:?}:{name:?}", t.name)));
        write(&dir.join(&name), Container::Safetensors(&metadata), &some);
    }
    let text = format!("{{\"weight_map\":{{{}}}}}", map.join(","));
    fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

impl Llama {
    fn config(self) -> String {
        let Self { hidden, intermediate, vocab, heads, kv_heads } = self;
        let head_dim = hidden / heads;
        format!(
            r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu","hidden_size":{hidden},
            "intermediate_size":{intermediate},"num_hidden_layers":2,"num_attention_heads":{heads},
            "num_key_value_heads":{kv_heads},"head_dim":{head_dim},"vocab_size":{vocab},"max_position_embeddings":64,
            "rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":false}}"#
        )
    }

    fn tensors(self, gguf: bool) -> Vec<(String, Vec<u64>)> {
        let Self { hidden, intermediate, vocab, heads, kv_heads } = self;
        let key = hidden / heads * kv_heads;
        let names: [&str; 12] = if gguf {
            [
                "token_embd",
                "output_norm",
                "output",
                "attn_norm",
                "attn_q",
                "attn_k",
                "attn_v",
                "attn_output",
                "ffn_norm",
                "ffn_gate",
                "ffn_up",
                "ffn_down",
            ]
        } else {
            [
                "model.embed_tokens",
                "model.norm",
                "lm_head",
                "input_layernorm",
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "post_attention_layernorm",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ]
        };
        let shapes: [Vec<u64>; 12] = [
            vec![vocab, hidden],
            vec![hidden],
            vec![vocab, hidden],
            vec![hidden],
            vec![hidden, hidden],
            vec![key, hidden],
            vec![key, hidden],
            vec![hidden, hidden],
            vec![hidden],
            vec![intermediate, hidden],
            vec![intermediate, hidden],
            vec![hidden, intermediate],
        ];
        let mut all = Vec::new();
        let layer = if gguf { "blk" } else { "model.layers" };
        for (i, (name, shape)) in names.into_iter().zip(shapes).enumerate() {
            if i < 3 {
                all.push((format!("{name}.weight"), shape));
            } else {
                all.extend((0..2).map(|n| (format!("{layer}.{n}.{name}.weight"), shape.clone())));
            }
        }
        all
    }
}

fn packed(from: &Path, to: &Path, world: Option<u32>) -> Result<PackReport, PackError> {
    let manifest = index(from, source()).unwrap();
    let mut last = PackProgress { done: 0, total: 0 };
    let report = pack(from, &manifest, to, world, &mut |progress| {
        assert!(progress.done > last.done && progress.done <= progress.total, "{progress:?} after {last:?}");
        last = progress;
    })?;
    assert_eq!(last.done, last.total);
    Ok(report)
}

fn read(manifest: &Manifest, tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(tensor.len).unwrap()];
    let path = &manifest.files[tensor.file as usize].path;
    fs::File::open(path).unwrap().read_exact_at(&mut bytes, tensor.offset).unwrap();
    bytes
}

/// What of a matrix rank `rank` of `world` gets, counted row by row.
fn slice(bytes: &[u8], role: Role, shape: &[u64], rank: u64, world: u64) -> Vec<u8> {
    let whole = matches!(role, Role::RopeFreqs | Role::OutputNorm)
        || matches!(role, Role::Layer(_, Part::AttentionNorm | Part::FeedForwardNorm));
    if whole {
        return bytes.to_vec();
    }
    let rows = usize::try_from(shape[0]).unwrap();
    let (rank, world) = (usize::try_from(rank).unwrap(), usize::try_from(world).unwrap());
    let row = bytes.len() / rows;
    let by_columns = matches!(role, Role::Layer(_, Part::AttentionOutput | Part::Down));
    let mut out = Vec::new();
    for i in 0..rows {
        let line = &bytes[i * row..(i + 1) * row];
        if by_columns {
            out.extend_from_slice(&line[rank * row / world..(rank + 1) * row / world]);
        } else if i * world / rows == rank {
            out.extend_from_slice(line);
        }
    }
    out
}

/// A packed folder's manifest, after its form was looked at: by its own manifest and, unless it is a rank's, by its headers.
fn form(dir: &Path, rank: Option<RankOf>) -> Manifest {
    let manifest = index(dir, source()).unwrap();
    assert_eq!((manifest.trust, manifest.packed.unwrap().rank), (Trust::Chunk, rank));
    assert_eq!(manifest.files.len(), 1);
    assert!(manifest.weight_bytes().is_multiple_of(FILE_ALIGN));
    let offsets: Vec<u64> = manifest.tensors.iter().map(|tensor| tensor.offset).collect();
    assert!(offsets.is_sorted(), "in the order in which they are computed with");
    assert!(offsets.iter().all(|offset| offset.is_multiple_of(TENSOR_ALIGN)));
    if let TokenizerFiles::HuggingFace { dir: tokenizer } = &manifest.tokenizer {
        assert_eq!(fs::canonicalize(tokenizer).unwrap(), fs::canonicalize(dir).unwrap());
    }
    if rank.is_none() {
        let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() != "stoker.json" {
                fs::copy(&path, elsewhere.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        let by_headers = index(elsewhere.path(), source()).unwrap();
        assert_eq!(by_headers.tensors, manifest.tensors, "others see what the manifest says");
        assert_eq!(
            (by_headers.config, by_headers.generation),
            (manifest.config.clone(), manifest.generation.clone())
        );
    }
    manifest
}

/// Loads it as any model, with its sums.
fn load(dir: &Path) -> Result<(), LoadError> {
    let manifest = index(dir, source()).unwrap();
    let files = CheckpointFiles::from_manifest(ModelName::new("packed").unwrap(), dir, &manifest).unwrap();
    let store = Store::open(StoreConfig { read_threads: 1, ..StoreConfig::new(ByteSize::mib(64)) }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(store.load(&files, Priority::Demand, &CancellationToken::new())).map(drop)
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into()).collect();
    names.sort();
    names
}

/// Packs the model at `from`, whole and for so many ranks, and compares every byte.
fn check(from: &Path, dir: &Path, world: u32) {
    let original = index(from, source()).unwrap();
    let report = packed(from, &dir.join("whole"), None).unwrap();
    assert_eq!(report.files.len(), 1);
    assert_eq!((report.tensors, report.trust), (original.tensors.len(), original.trust));
    let whole = form(&dir.join("whole"), None);
    assert_eq!(report.bytes.0, whole.weight_bytes());
    assert_eq!(whole.config, original.config);
    for (was, is) in original.tensors.iter().zip(&whole.tensors) {
        assert_eq!((&was.name, was.role, was.dtype, &was.shape), (&is.name, is.role, is.dtype, &is.shape));
        assert!(read(&original, was) == read(&whole, is), "{}", was.name);
    }
    load(&dir.join("whole")).unwrap();

    let report = packed(from, &dir.join("split"), Some(world)).unwrap();
    assert_eq!(report.files.len(), world as usize);
    for (rank, file) in (0..world).zip(&report.files) {
        let at = dir.join("split").join(format!("rank-{rank}-of-{world}"));
        assert_eq!(file.parent(), Some(&*at));
        let part = form(&at, Some(RankOf { rank, world }));
        assert!(
            part.config.is_none()
                && part.refusal.as_ref().unwrap().contains(&format!("rank {rank} of {world}"))
        );
        for (was, is) in original.tensors.iter().zip(&part.tensors) {
            let expected =
                slice(&read(&original, was), was.role.unwrap(), &was.shape, rank.into(), world.into());
            assert_eq!((&was.name, len_of(is.dtype, &is.shape)), (&is.name, expected.len() as u64));
            assert!(expected == read(&part, is), "{} of rank {rank}", was.name);
        }
        load(&at).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_tensor_of_a_llama_is_what_it_was(
        (world, heads, head_dim) in (1..4_u32, 1..3_u64, 1..9_u64),
        (intermediate, vocab) in (1..20_u64, 1..20_u64),
        types in proptest::collection::vec(prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]), 21),
        shuffled in Just((0..21_usize).collect::<Vec<_>>()).prop_shuffle(),
        shards in 1..4_usize,
    ) {
        let w = u64::from(world);
        let heads = heads * w;
        let llama = Llama {
            hidden: heads * head_dim * 2,
            intermediate: intermediate * w,
            vocab: vocab * w,
            heads,
            kv_heads: w,
        };
        let tensors = llama.tensors(false);
        prop_assert_eq!(tensors.len(), types.len());
        let made: Vec<Made> = shuffled
            .iter()
            .map(|i| Made { name: tensors[*i].0.clone(), dtype: types[*i], shape: tensors[*i].1.clone() })
            .collect();
        let dir = scratch();
        folder(&dir.path().join("original"), &llama.config(), &made, shards);
        check(&dir.path().join("original"), dir.path(), world);
    }

    #[test]
    fn tensors_of_any_type_and_shape_are_what_they_were(
        tensors in proptest::collection::btree_map(
            "[a-z_.]{1,12}",
            (
                prop::sample::select(DType::ALL.iter().copied().filter(|t| t.safetensors().is_some()).collect::<Vec<_>>()),
                proptest::collection::vec(0..7_u64, 0..4),
            ),
            1..20,
        ).prop_map(|tensors| tensors.into_iter().map(|(name, (dtype, mut shape))| {
            match shape.last_mut() {
                Some(last) => *last *= dtype.block_elements(),
                None => shape.push(dtype.block_elements()),
            }
            Made { name, dtype, shape }
        }).collect::<Vec<_>>()).prop_shuffle(),
        shards in 1..4_usize,
    ) {
        let dir = scratch();
        let from = dir.path().join("original");
        folder(&from, r#"{"model_type":"mystery","architectures":["Mystery"]}"#, &tensors, shards.min(tensors.len()));
        let report = packed(&from, &dir.path().join("packed"), None).unwrap();
        prop_assert!(!report.in_execution_order);
        let (original, packed) = (index(&from, source()).unwrap(), form(&dir.path().join("packed"), None));
        for (was, is) in original.tensors.iter().zip(&packed.tensors) {
            prop_assert_eq!((&was.name, was.dtype, &was.shape), (&is.name, is.dtype, &is.shape));
            prop_assert!(read(&original, was) == read(&packed, is));
        }
        load(&dir.path().join("packed")).unwrap();
    }
}

fn gguf(path: &Path, llama: Llama, dtype: impl Fn(&str, &[u64]) -> DType) {
    let Llama { hidden, intermediate, vocab, heads, kv_heads } = llama;
    let number = |n: u64| Value::U32(u32::try_from(n).unwrap());
    let metadata = BTreeMap::from(
        [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", Value::U32(2)),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", number(hidden)),
            ("llama.feed_forward_length", number(intermediate)),
            ("llama.attention.head_count", number(heads)),
            ("llama.attention.head_count_kv", number(kv_heads)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.vocab_size", number(vocab)),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    // Not in execution order: the head and the norm lie before the layers.
    let made: Vec<Made> = llama
        .tensors(true)
        .into_iter()
        .map(|(name, shape)| Made { dtype: dtype(&name, &shape), name, shape })
        .collect();
    write(path, Container::Gguf(&metadata), &made);
}

#[test]
fn quantised_tensors_of_a_gguf_file_are_what_they_were() {
    let dir = scratch();
    let path = dir.path().join("original.gguf");
    let llama = Llama { hidden: 256, intermediate: 512, vocab: 10, heads: 4, kv_heads: 2 };
    let dtype = |name: &str, shape: &[u64]| match shape {
        [_] => DType::F32,
        _ if name.contains("ffn_down") => DType::Q4_K,
        _ if name.contains("output") => DType::Q8_0,
        _ => DType::Q6_K,
    };
    gguf(&path, llama, dtype);
    check(&path, dir.path(), 2);

    // One block of 256 elements in a row can't be shared.
    let other = dir.path().join("other.gguf");
    gguf(&other, llama, |_, shape| if shape.len() == 1 { DType::F32 } else { DType::Q4_K });
    let before = names(dir.path());
    let error = packed(&other, &dir.path().join("other"), Some(2)).unwrap_err();
    assert!(matches!(error, PackError::Slice(SliceError::Uneven { .. })), "{error}");
    assert_eq!(names(dir.path()), before);
}

#[test]
fn tensors_longer_than_a_chunk_are_what_they_were() {
    let dir = scratch();
    let llama = Llama { hidden: 768, intermediate: 3 * 4096, vocab: 30, heads: 12, kv_heads: 6 };
    let made: Vec<Made> = llama
        .tensors(false)
        .into_iter()
        .map(|(name, shape)| Made { name, dtype: DType::BF16, shape })
        .collect();
    assert!(made.iter().any(|t| len_of(t.dtype, &t.shape) > CHUNK_BYTES));
    folder(&dir.path().join("original"), &llama.config(), &made, 2);
    let original = index(&dir.path().join("original"), source()).unwrap();
    for world in [1, 3] {
        packed(&dir.path().join("original"), &dir.path().join(format!("{world}")), Some(world)).unwrap();
        for rank in 0..world {
            let part = form(
                &dir.path().join(format!("{world}/rank-{rank}-of-{world}")),
                Some(RankOf { rank, world }),
            );
            for (was, is) in original.tensors.iter().zip(&part.tensors) {
                let expected =
                    slice(&read(&original, was), was.role.unwrap(), &was.shape, rank.into(), world.into());
                assert!(expected == read(&part, is), "{} of rank {rank} of {world}", was.name);
            }
        }
    }
}

/// A small llama in a folder.
fn small(dir: &Path) -> PathBuf {
    let llama = Llama { hidden: 64, intermediate: 96, vocab: 30, heads: 4, kv_heads: 2 };
    let made: Vec<Made> = llama
        .tensors(false)
        .into_iter()
        .map(|(name, shape)| Made { name, dtype: DType::F32, shape })
        .collect();
    let from = dir.join("original");
    folder(&from, &llama.config(), &made, 1);
    from
}

#[test]
fn what_is_wrong_in_the_input_is_found_and_nothing_is_left() {
    let dir = scratch();
    let from = small(dir.path());
    let path = from.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let mut manifest = index(&from, source()).unwrap();
    let before = names(dir.path());
    let attempt =
        |manifest: &Manifest| pack(&from, manifest, &dir.path().join("out"), None, &mut |_| {}).unwrap_err();

    manifest.files[0].sha256 = Some("0".repeat(64));
    assert!(matches!(attempt(&manifest), PackError::WrongHash { .. }));
    manifest.files[0].sha256 = None;
    manifest.record_sums(0, vec![stoker_checkpoint::ChunkSum(1)]).unwrap();
    let error = attempt(&manifest);
    assert!(matches!(error, PackError::Corrupt { chunk: 0, offset: 0, .. }), "{error}");
    assert!(error.to_string().contains("the file is corrupt"), "{error}");

    fs::write(&path, &good[..good.len() - 1]).unwrap();
    assert!(matches!(attempt(&manifest), PackError::Changed { .. }));
    assert_eq!(names(dir.path()), before);
    assert!(matches!(
        pack(&from, &manifest, &from, None, &mut |_| {}).unwrap_err(),
        PackError::Changed { .. } | PackError::Exists { .. }
    ));
}

#[test]
fn nothing_is_replaced_and_a_file_that_changes_meanwhile_is_noticed() {
    let dir = scratch();
    let from = small(dir.path());
    let manifest = index(&from, source()).unwrap();
    let out = dir.path().join("out");
    fs::write(&out, b"somebody's").unwrap();
    let error = pack(&from, &manifest, &out, None, &mut |_| {}).unwrap_err();
    assert!(matches!(&error, PackError::Exists { path } if *path == out), "{error}");
    assert_eq!(fs::read(&out).unwrap(), b"somebody's");
    fs::remove_file(&out).unwrap();

    let before = names(dir.path());
    let path = from.join("model.safetensors");
    let error = pack(&from, &manifest, &out, None, &mut |_| {
        fs::File::options().append(true).open(&path).unwrap().set_len(10).unwrap();
    })
    .unwrap_err();
    assert!(matches!(error, PackError::Changed { .. }), "{error}");
    assert_eq!(names(dir.path()), before);
}

#[test]
fn a_full_disk_is_said_before_anything_is_read() {
    // Far more than any disk has, all of it holes.
    let dir = scratch();
    let from = dir.path().join("original");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("config.json"), r#"{"model_type":"mystery","architectures":["Mystery"]}"#).unwrap();
    let (path, none) = (from.join("model.safetensors"), BTreeMap::new());
    let len = 12 << 40;
    let huge = NewTensor { name: "huge", dtype: DType::U8, shape: &[len], len };
    let file = NewFile::lay_out(&path, Container::Safetensors(&none), &[huge]).unwrap();
    let out = fs::File::create_new(&path).unwrap();
    out.set_len(file.len).unwrap();
    out.write_all_at(&file.header, 0).unwrap();

    let before = names(dir.path());
    let manifest = index(&from, source()).unwrap();
    let error =
        pack(&from, &manifest, &dir.path().join("out"), None, &mut |_| unreachable!("nothing is read"))
            .unwrap_err();
    assert!(
        matches!(error, PackError::DiskFull { needed, free, .. } if needed.0 == file.len && free < needed),
        "{error}"
    );
    assert_eq!(names(dir.path()), before);
}

#[test]
fn a_packed_folder_may_be_copied_and_is_still_known_by_its_sums() {
    let dir = scratch();
    let from = small(dir.path());
    packed(&from, &dir.path().join("packed"), None).unwrap();
    let copy = dir.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for name in names(&dir.path().join("packed")) {
        fs::copy(dir.path().join("packed").join(&name), copy.join(&name)).unwrap();
    }
    form(&copy, None);
    load(&copy).unwrap();

    let file = fs::File::options().read(true).write(true).open(copy.join("model.safetensors")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 9000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 9000).unwrap();
    let error = load(&copy).unwrap_err();
    assert!(matches!(error, LoadError::Corrupt { .. }), "{error}");
    let len = file.metadata().unwrap().len();
    file.set_len(4096).unwrap();
    let error = index(&copy, source()).unwrap_err();
    assert!(error.to_string().contains("pack it again"), "{error}");
    file.set_len(len).unwrap();

    // A folder of somebody else's names nothing outside of it.
    let text = fs::read_to_string(copy.join("stoker.json")).unwrap();
    for (inside, outside) in
        [("\"model.safetensors\"", "\"/etc/passwd\""), ("\"dir\":\".\"", "\"dir\":\"/etc\"")]
    {
        assert!(text.contains(inside), "{text}");
        fs::write(copy.join("stoker.json"), text.replace(inside, outside)).unwrap();
        let error = index(&copy, source()).unwrap_err();
        assert!(error.to_string().contains("not in the packed folder"), "{error}");
    }

    // What is packed once more is the same.
    packed(&dir.path().join("packed"), &dir.path().join("again"), None).unwrap();
    let bytes = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    assert!(bytes("packed") == bytes("again"));
}
