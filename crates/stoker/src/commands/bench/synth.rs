//! Checkpoints with the shapes of known models and random weights: the same bytes to load, without the hub.

use std::{
    fmt::Write as _,
    fs,
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use stoker_types::ByteSize;

/// Configurations and tensor shapes, computed from the models' published dimensions.
const SHAPES: &str = include_str!("../../../data/model_shapes.json");

/// Longest weight file, as the hub's tools split them, bytes.
const SHARD_BYTES: u64 = 10_000_000_000;

/// Bytes of an element: fp16.
const ELEMENT: u64 = 2;

#[derive(Debug, Deserialize)]
struct Shapes {
    config: Map<String, Value>,
    tensor_groups: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Group {
    shape: Vec<u64>,
    count: u32,
}

#[derive(Debug)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
    bytes: u64,
}

/// A folder that is removed with this value.
#[derive(Debug)]
pub(crate) struct SyntheticModel {
    pub(crate) dir: PathBuf,
    keep: bool,
}

/// Whether `name` is a model whose shapes are known.
pub(crate) fn is_known(name: &str) -> bool {
    shapes().is_ok_and(|shapes| shapes.contains_key(name))
}

/// Makes the model `name` in a folder of `parent`, or takes the one that an earlier call with `keep` left there.
///
/// # Errors
/// A name that isn't known, with those that are; a full disk.
pub(crate) fn make(name: &str, parent: &Path, keep: bool) -> anyhow::Result<SyntheticModel> {
    let mut all = shapes()?;
    let Some(found) = all.shift_remove(name) else {
        let known: Vec<_> = all.keys().map(String::as_str).collect();
        return Err(anyhow!(
            "no shapes of `{name}` are known: one of {}, or a size such as 1GiB",
            known.join(", ")
        ));
    };
    make_from(&Shapes::deserialize(found)?, name, parent, keep)
}

fn make_from(shapes: &Shapes, name: &str, parent: &Path, keep: bool) -> anyhow::Result<SyntheticModel> {
    let tensors = tensors(shapes)?;
    let dir = parent.join(format!("synth-{name}"));
    let made = SyntheticModel { dir, keep };
    if made.is_there(&tensors) {
        return Ok(made);
    }
    fs::create_dir_all(&made.dir).with_context(|| format!("making {}", made.dir.display()))?;
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    made.write(&tensors, &shapes.config).with_context(|| {
        format!("writing {} of random weights to {}", ByteSize(bytes), made.dir.display())
    })?;
    Ok(made)
}

/// Makes a model of at most `size`, or takes the one that is there: LLaMA-2-7B with as many layers as that has room for,
/// at least one.
///
/// # Errors
/// A full disk.
pub(crate) fn make_of_size(
    name: &str,
    size: ByteSize,
    parent: &Path,
    keep: bool,
) -> anyhow::Result<SyntheticModel> {
    let (shapes, layers) = shapes_of_size(size)?;
    make_from(&shapes, &format!("{name}-{layers}"), parent, keep)
}

/// Shapes, and the number of layers.
fn shapes_of_size(size: ByteSize) -> anyhow::Result<(Shapes, u64)> {
    let mut shapes = Shapes::deserialize(shapes()?.shift_remove("llama-2-7b").context("no shapes")?)?;
    let all = tensors(&shapes)?;
    let (layers, rest): (Vec<_>, Vec<_>) = all.iter().partition(|tensor| tensor.name.contains(".layers."));
    let bytes = |tensors: &[&Tensor]| tensors.iter().map(|tensor| tensor.bytes).sum::<u64>();
    let count = shapes.config["num_hidden_layers"].as_u64().unwrap_or(1).max(1);
    let fit = (size.bytes().saturating_sub(bytes(&rest)) / (bytes(&layers) / count)).max(1);
    for (name, group) in &mut shapes.tensor_groups {
        if name.contains("{i}") {
            group["count"] = fit.into();
        }
    }
    shapes.config["num_hidden_layers"] = fit.into();
    Ok((shapes, fit))
}

fn shapes() -> serde_json::Result<serde_json::Map<String, Value>> {
    serde_json::from_str(SHAPES)
}

/// In the order in which the hub's files have them: by name, so that layer 10 comes before layer 2.
fn tensors(shapes: &Shapes) -> anyhow::Result<Vec<Tensor>> {
    let mut tensors = Vec::new();
    for (name, group) in &shapes.tensor_groups {
        let Group { shape, count } = Group::deserialize(group)?;
        let bytes = shape.iter().product::<u64>() * ELEMENT;
        if name.contains("{i}") {
            tensors.extend((0..count).map(|i| Tensor {
                name: name.replace("{i}", &i.to_string()),
                shape: shape.clone(),
                bytes,
            }));
        } else {
            tensors.push(Tensor { name: name.clone(), shape, bytes });
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

// === impl SyntheticModel ===

impl SyntheticModel {
    fn is_there(&self, tensors: &[Tensor]) -> bool {
        let files = shards(tensors);
        files.iter().enumerate().all(|(i, shard)| {
            let length =
                header(shard).len() as u64 + 8 + shard.iter().map(|tensor| tensor.bytes).sum::<u64>();
            fs::metadata(self.file(i, files.len())).is_ok_and(|meta| meta.len() == length)
        })
    }

    fn file(&self, i: usize, of: usize) -> PathBuf {
        self.dir.join(format!("model-{:05}-of-{of:05}.safetensors", i + 1))
    }

    fn write(&self, tensors: &[Tensor], config: &Map<String, Value>) -> anyhow::Result<()> {
        let shards = shards(tensors);
        let mut map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let path = self.file(i, shards.len());
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(name.clone()))));
            let header = header(shard);
            let mut file = BufWriter::with_capacity(4 << 20, fs::File::create(&path)?);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            let mut noise = Noise::new(i as u64);
            for tensor in *shard {
                noise.write(&mut file, tensor.bytes)?;
            }
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        }
        let total: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        fs::write(self.dir.join("model.safetensors.index.json"), serde_json::to_vec(&index)?)?;
        let mut config = config.clone();
        config.insert("dtype".into(), "float16".into());
        Ok(fs::write(self.dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?)
    }
}

impl Drop for SyntheticModel {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.dir.display(), %error, "the synthetic model stays");
        }
    }
}

fn shards(tensors: &[Tensor]) -> Vec<&[Tensor]> {
    let mut shards = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if bytes + tensor.bytes > SHARD_BYTES && i > begin {
            shards.push(&tensors[begin..i]);
            (begin, bytes) = (i, 0);
        }
        bytes += tensor.bytes;
    }
    shards.push(&tensors[begin..]);
    shards
}

/// A shard's header: JSON, padded with spaces to a multiple of 8 as the format's own writer does.
fn header(shard: &[Tensor]) -> String {
    let mut header = String::from("{");
    let mut at = 0;
    for (i, Tensor { name, shape, bytes }) in shard.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        // Names are letters, digits, dots and underscores.
        let _ = write!(
            header,
            r#"{comma}"{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{at},{}]}}"#,
            at + bytes
        );
        at += bytes;
    }
    header.push('}');
    let padded = header.len().next_multiple_of(8);
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    header
}

/// Random fp16 numbers of the size of weights: no two blocks alike, none a NaN, hard to compress.
struct Noise {
    state: u64,
    block: Vec<u8>,
}

// === impl Noise ===

impl Noise {
    fn new(seed: u64) -> Self {
        Self { state: (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15), block: vec![0; 1 << 20] }
    }

    fn write(&mut self, to: &mut impl io::Write, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            for word in self.block.chunks_exact_mut(8) {
                // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
                self.state ^= self.state >> 12;
                self.state ^= self.state << 25;
                self.state ^= self.state >> 27;
                // Four numbers with an exponent between 2^-14 and 2^-7.
                let random = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) & 0x9fff_9fff_9fff_9fff;
                word.copy_from_slice(&random.to_le_bytes());
            }
            let part = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.block.len());
            to.write_all(&self.block[..part])?;
            bytes -= part as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use stoker_checkpoint::{Source, index};

    use super::*;

    #[test]
    fn shapes_add_up_to_the_published_sizes() {
        for (name, bytes) in [
            ("llama-2-7b", 13_476_831_232_u64),
            ("opt-125m", 250_478_592),
            ("falcon-7b", 13_843_441_408),
            ("llama-2-70b-lora-r32", 828_375_040),
        ] {
            let shapes = Shapes::deserialize(&shapes().unwrap()[name]).unwrap();
            assert_eq!(tensors(&shapes).unwrap().iter().map(|t| t.bytes).sum::<u64>(), bytes, "{name}");
        }
    }

    #[test]
    fn a_size_has_room_for_so_many_layers() {
        let of = |size| {
            let (shapes, layers) = shapes_of_size(size).unwrap();
            assert_eq!(shapes.config["num_hidden_layers"], layers);
            (layers, tensors(&shapes).unwrap().iter().map(|t| t.bytes).sum::<u64>())
        };
        assert_eq!(of(ByteSize(13_476_831_232)), (32, 13_476_831_232));
        let (layers, bytes) = of(ByteSize::gib(4));
        assert!(
            layers == 9 && bytes < ByteSize::gib(4).bytes() && bytes > ByteSize::gib(3).bytes(),
            "{bytes}"
        );
        assert_eq!(of(ByteSize::mib(1)).0, 1, "at least one");
    }

    #[test]
    fn a_made_model_is_indexed_and_goes_with_its_value() {
        let parent = tempfile::tempdir().unwrap();
        let made = make("opt-125m", parent.path(), false).unwrap();
        let manifest = index(&made.dir, Source { uri: "synth".into(), revision: None }).unwrap();
        assert_eq!(manifest.tensors.iter().map(|t| t.len).sum::<u64>(), 250_478_592);
        let dir = made.dir.clone();
        drop(made);
        assert!(!dir.exists());
        assert!(make("gpt-5", parent.path(), false).unwrap_err().to_string().contains("llama-2-7b"));
        assert!(is_known("opt-66b") && !is_known("1GiB"));
    }
}
