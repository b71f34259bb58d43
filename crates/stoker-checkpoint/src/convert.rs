//! From a GGUF file to a Hugging Face folder: weights dequantised into one safetensors file, the permutation of query
//! and key rows undone, configuration and tokenizer as transformers reads them.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use serde_json::{Map, Value, json};
use stoker_types::DType;

use crate::{
    CheckpointError, Format, Manifest, ModelConfig, Part, Role, RopeScaling, Source, Tensor, TokenizerFiles,
    dequant::{DequantError, dequantize},
    gguf,
    index::index,
    manifest::sync_dir,
    names,
    text::TextError,
    tokenizer,
};

/// Elements dequantised at a time, unless a row has more.
const BATCH_ELEMENTS: usize = 1 << 18;

/// The element type of the new weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Half precision.
    #[default]
    F16,
    /// The upper half of single precision.
    BF16,
    /// Single precision: exactly what the quantised weights mean.
    F32,
}

/// Why a model can't be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The GGUF file is malformed, or a file can't be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer can't be converted.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A tensor can't be dequantised.
    #[error("tensor `{tensor}`: {source}")]
    Dequant {
        /// Which tensor.
        tensor: String,
        /// Why not.
        source: DequantError,
    },
    /// There is something where the result should be.
    #[error("{} exists already", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// The model isn't one that can be computed, so that the result's meaning is unknown.
    #[error("{}: {why}", path.display())]
    Refused {
        /// The model.
        path: PathBuf,
        /// The refusal.
        why: String,
    },
    /// A weight is too large for the precision.
    #[error("tensor `{tensor}` has the weight {value}, which F16 can't hold; convert to BF16 or F32")]
    Overflow {
        /// Which tensor.
        tensor: String,
        /// The weight.
        value: f32,
    },
}

/// How far a conversion is, in bytes of the new weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Written.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// A directory that is removed unless it is kept.
struct Scratch {
    path: PathBuf,
    kept: bool,
}

/// A tensor to be written.
struct Planned<'a> {
    tensor: &'a Tensor,
    role: Role,
    name: String,
    len: u64,
}

/// Converts the GGUF file at `model` (any part of a split one) into the new folder `out`, which appears whole or not at
/// all. Needs memory for one batch of rows, whatever the model's size.
///
/// # Errors
/// [`ConvertError`]; nothing is left behind.
pub fn convert(
    model: &Path,
    out: &Path,
    precision: Precision,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ConvertError> {
    let manifest = index(model, Source { uri: model.display().to_string(), revision: None })?;
    let config = match (&manifest.config, &manifest.refusal) {
        (Some(config), None) => config,
        (_, why) => {
            let why = why.clone().unwrap_or_default();
            return Err(ConvertError::Refused { path: model.to_owned(), why });
        }
    };
    if manifest.format != Format::Gguf {
        return Err(ConvertError::Refused { path: model.to_owned(), why: "not a GGUF file".to_owned() });
    }
    if out.exists() {
        return Err(ConvertError::Exists { path: out.to_owned() });
    }
    let header = gguf::Header::open(&manifest.files[0].path)?;

    let mut scratch = Scratch::create(out)?;
    let dir = scratch.path.clone();
    write_json(&dir.join("config.json"), &config_json(model, &manifest, config, precision)?)?;
    write_json(&dir.join("generation_config.json"), &generation_json(&manifest))?;
    if manifest.tokenizer == TokenizerFiles::Gguf {
        let tokenizer = tokenizer::from_gguf(&header)?;
        write_file(&dir.join("tokenizer.json"), tokenizer.to_tokenizer_json()?.as_bytes())?;
        let template = header.str("tokenizer.chat_template");
        let settings = tokenizer.to_tokenizer_config(template, config.context_trained);
        write_json(&dir.join("tokenizer_config.json"), &settings)?;
    }
    write_weights(&dir.join("model.safetensors"), &manifest, config, precision, progress)?;
    sync_dir(&dir)?;
    fs::rename(&dir, out).map_err(CheckpointError::io(out))?;
    scratch.kept = true;
    Ok(sync_dir(&parent(out))?)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

// === impl Scratch ===

impl Scratch {
    /// Beside `out`, so that a rename can land it.
    fn create(out: &Path) -> Result<Self, CheckpointError> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let path = parent(out).join(format!(".{name}.{}.tmp", std::process::id()));
        fs::create_dir(&path).map_err(CheckpointError::io(&path))?;
        Ok(Self { path, kept: false })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished conversion could not be removed");
        }
    }
}

// === small files ===

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(CheckpointError::io(path))
}

fn write_json(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn config_json(
    model: &Path,
    manifest: &Manifest,
    config: &ModelConfig,
    precision: Precision,
) -> Result<Value, ConvertError> {
    // Only mistral has a window, only llama has biases.
    let (kind, class) = match config.sliding_window {
        Some(_) => ("mistral", "MistralForCausalLM"),
        None => ("llama", "LlamaForCausalLM"),
    };
    let refused = |why: &str| ConvertError::Refused { path: model.to_owned(), why: why.to_owned() };
    let biased = config.attention_bias || config.mlp_bias;
    if biased && config.sliding_window.is_some() {
        return Err(refused("no model of transformers has both a sliding window and biases"));
    }
    if config.attention_bias && manifest.tensor(Role::Layer(0, Part::AttentionOutputBias)).is_none() {
        return Err(refused("a llama of transformers with attention biases has one on its output too"));
    }
    let mut json = json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_trained,
        "rms_norm_eps": shortest(config.norm_epsilon),
        "rope_theta": shortest(config.rope.theta),
        "rope_scaling": rope_scaling(model, manifest, config)?,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": precision.torch_name(),
        "use_cache": true,
    });
    if let Some(window) = config.sliding_window {
        json["sliding_window"] = window.into();
    } else {
        json["attention_bias"] = config.attention_bias.into();
        json["mlp_bias"] = config.mlp_bias.into();
    }
    if let Some(bos) = manifest.generation.bos_id {
        json["bos_token_id"] = bos.into();
    }
    if let Some(eos) = eos_json(manifest) {
        json["eos_token_id"] = eos;
    }
    Ok(json)
}

/// The number that a person would have written: 1e-5, not the f32's 9.999999747378752e-6.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn rope_scaling(model: &Path, manifest: &Manifest, config: &ModelConfig) -> Result<Value, ConvertError> {
    if let Some(tensor) = manifest.tensor(Role::RopeFreqs) {
        if config.rope.scaling.is_some() {
            let why = "rope_freqs.weight and a scaling factor at once can't be converted".to_owned();
            return Err(ConvertError::Refused { path: model.to_owned(), why });
        }
        let factors = read_all(manifest, tensor)?;
        return llama3_of(&factors, config).ok_or_else(|| ConvertError::Refused {
            path: model.to_owned(),
            why: "rope_freqs.weight are not the factors of a llama3 scaling; no other can be converted"
                .to_owned(),
        });
    }
    Ok(match config.rope.scaling {
        None => Value::Null,
        Some(RopeScaling::Linear { factor }) => json!({ "rope_type": "linear", "factor": shortest(factor) }),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
            llama3_json(factor, low_freq_factor, high_freq_factor, original_context)
        }
    })
}

fn llama3_json(factor: f32, low: f32, high: f32, original: u32) -> Value {
    json!({
        "rope_type": "llama3",
        "factor": shortest(factor),
        "low_freq_factor": shortest(low),
        "high_freq_factor": shortest(high),
        "original_max_position_embeddings": original,
    })
}

/// Finds the llama3 scaling that gives these divisors of the frequencies: GGUF keeps the result, not the parameters.
fn llama3_of(factors: &[f32], config: &ModelConfig) -> Option<Value> {
    if factors.iter().all(|f| *f == 1.0) {
        return Some(Value::Null);
    }
    let (low, high) = (1.0, 4.0);
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let fits = |original: u32| {
        let expected = llama3_factors(config, factor.into(), low, high, original.into());
        factors
            .iter()
            .zip(expected)
            .all(|(found, expected)| (f64::from(*found) / expected - 1.0).abs() < 1e-4)
    };
    let original = (5..=20).map(|shift| 1 << shift).find(|original| fits(*original))?;
    Some(llama3_json(factor, 1.0, 4.0, original))
}

/// Divisors of the frequencies, as transformers' `_compute_llama3_parameters` has them.
fn llama3_factors(
    config: &ModelConfig,
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
) -> impl Iterator<Item = f64> {
    let (theta, dims) = (f64::from(config.rope.theta), config.rope.dims);
    (0..dims / 2).map(move |i| {
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * f64::from(i) / f64::from(dims));
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    })
}

fn eos_json(manifest: &Manifest) -> Option<Value> {
    match &manifest.generation.eos_ids[..] {
        [] => None,
        [one] => Some((*one).into()),
        several => Some(several.into()),
    }
}

fn generation_json(manifest: &Manifest) -> Value {
    let defaults = &manifest.generation;
    let mut json = Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            json.insert(key.to_owned(), value);
        }
    };
    put("bos_token_id", defaults.bos_id.map(Value::from));
    put("eos_token_id", eos_json(manifest));
    put("temperature", defaults.temperature.map(shortest));
    put("top_p", defaults.top_p.map(shortest));
    put("top_k", defaults.top_k.map(Value::from));
    put("min_p", defaults.min_p.map(shortest));
    put("repetition_penalty", defaults.repetition_penalty.map(shortest));
    // transformers refuses to save sampling parameters without it.
    let samples = [defaults.temperature, defaults.top_p, defaults.min_p].iter().any(Option::is_some);
    put("do_sample", samples.then_some(Value::Bool(true)));
    Value::Object(json)
}

// === weights ===

impl Precision {
    /// The type of the tensors.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }

    const fn torch_name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
        }
    }

    /// Appends values, rounded to nearest.
    fn encode(self, values: &[f32], tensor: &str, out: &mut Vec<u8>) -> Result<(), ConvertError> {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::BF16 => out.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
            Self::F16 => {
                for value in values {
                    let half = f16::from_f32(*value);
                    if half.is_infinite() && value.is_finite() {
                        return Err(ConvertError::Overflow { tensor: tensor.to_owned(), value: *value });
                    }
                    out.extend_from_slice(&half.to_le_bytes());
                }
            }
        }
        Ok(())
    }
}

fn read_all(manifest: &Manifest, tensor: &Tensor) -> Result<Vec<f32>, ConvertError> {
    let path = &manifest.files[tensor.file as usize].path;
    let elements: u64 = tensor.shape.iter().product();
    let mut bytes = vec![0; size(tensor.len)];
    let mut values = vec![0.0; size(elements)];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, tensor.offset))
        .map_err(CheckpointError::io(path))?;
    dequantize(tensor.dtype, &bytes, &mut values)
        .map_err(|source| ConvertError::Dequant { tensor: tensor.name.clone(), source })?;
    Ok(values)
}

/// A size in memory. Where `usize` has 32 bits, the allocation of what doesn't fit fails.
fn size(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn write_weights(
    path: &Path,
    manifest: &Manifest,
    config: &ModelConfig,
    precision: Precision,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ConvertError> {
    let plan: Vec<Planned<'_>> = manifest
        .tensors
        .iter()
        .filter_map(|tensor| Some((tensor, tensor.role?)))
        // Its meaning went into the configuration.
        .filter(|(_, role)| *role != Role::RopeFreqs)
        .map(|(tensor, role)| Planned {
            tensor,
            role,
            name: names::name_of(Format::Safetensors, role),
            len: tensor.shape.iter().product::<u64>() * precision.dtype().block_bytes(),
        })
        .collect();
    let total = plan.iter().map(|p| p.len).sum();
    let sources = manifest
        .files
        .iter()
        .map(|f| File::open(&f.path).map_err(CheckpointError::io(&f.path)))
        .collect::<Result<Vec<_>, _>>()?;

    let mut out =
        BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(CheckpointError::io(path))?);
    out.write_all(&header(&plan, precision)).map_err(CheckpointError::io(path))?;
    let mut done = 0;
    for planned in &plan {
        let source = &sources[planned.tensor.file as usize];
        let source_path = &manifest.files[planned.tensor.file as usize].path;
        let mut batches = Batches::new(planned, config);
        let mut encoded = Vec::new();
        while let Some(values) = batches.next(source, source_path)? {
            encoded.clear();
            precision.encode(values, &planned.name, &mut encoded)?;
            out.write_all(&encoded).map_err(CheckpointError::io(path))?;
            done += encoded.len() as u64;
            progress(Progress { done, total });
        }
    }
    let file = out.into_inner().map_err(|e| CheckpointError::io(path)(e.into_error()))?;
    Ok(file.sync_all().map_err(CheckpointError::io(path))?)
}

/// Length and JSON; padded so that the data is aligned to 8 bytes.
fn header(plan: &[Planned<'_>], precision: Precision) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut begin = 0;
    for planned in plan {
        let end = begin + planned.len;
        let entry = json!({
            "dtype": precision.dtype().name(),
            "shape": planned.tensor.shape,
            "data_offsets": [begin, end],
        });
        entries.insert(planned.name.clone(), entry);
        begin = end;
    }
    let mut text = Value::Object(entries).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// A tensor's values in the order of the new file, some rows at a time.
struct Batches<'a> {
    tensor: &'a Tensor,
    /// Rows left, from `row` on.
    row: u64,
    rows: u64,
    row_elements: usize,
    row_bytes: usize,
    rows_per_batch: u64,
    /// Rows of a head are interleaved, and go back to halves. A batch is then one head.
    interleaved: bool,
    bytes: Vec<u8>,
    values: Vec<f32>,
    ordered: Vec<f32>,
}

impl<'a> Batches<'a> {
    fn new(planned: &Planned<'a>, config: &ModelConfig) -> Self {
        let tensor = planned.tensor;
        let interleaved =
            matches!(planned.role, Role::Layer(_, Part::Query | Part::QueryBias | Part::Key | Part::KeyBias));
        // A bias is a column: one element a row.
        let (rows, row_elements) = match tensor.shape[..] {
            [rows, elements] => (rows, elements),
            [rows] => (rows, 1),
            _ => (1, tensor.shape.iter().product()),
        };
        let row_bytes = size(tensor.len.checked_div(rows).unwrap_or(0));
        let row_elements = size(row_elements);
        let rows_per_batch = if interleaved {
            config.head_dim.into()
        } else {
            (BATCH_ELEMENTS / row_elements.max(1)).max(1) as u64
        };
        let (bytes, values, ordered) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            tensor,
            row: 0,
            rows,
            row_elements,
            row_bytes,
            rows_per_batch,
            interleaved,
            bytes,
            values,
            ordered,
        }
    }

    fn next(&mut self, file: &File, path: &Path) -> Result<Option<&[f32]>, ConvertError> {
        let rows = size(self.rows_per_batch.min(self.rows - self.row));
        if rows == 0 {
            return Ok(None);
        }
        self.bytes.resize(rows * self.row_bytes, 0);
        self.values.resize(rows * self.row_elements, 0.0);
        let offset = self.tensor.offset + self.row * self.row_bytes as u64;
        file.read_exact_at(&mut self.bytes, offset).map_err(CheckpointError::io(path))?;
        dequantize(self.tensor.dtype, &self.bytes, &mut self.values)
            .map_err(|source| ConvertError::Dequant { tensor: self.tensor.name.clone(), source })?;
        self.row += rows as u64;
        if !self.interleaved {
            return Ok(Some(&self.values));
        }
        self.ordered.clear();
        for row in 0..rows {
            // Row i of the first half was put at 2i, row i of the second at 2i + 1.
            let from = (2 * (row % (rows / 2)) + row / (rows / 2)) * self.row_elements;
            self.ordered.extend_from_slice(&self.values[from..from + self.row_elements]);
        }
        Ok(Some(&self.ordered))
    }
}
