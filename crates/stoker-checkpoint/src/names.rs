//! What a tensor's name means, and which tensors a configuration demands.

use std::collections::HashMap;

use stoker_types::DType;

use crate::{
    CheckpointError, Format, ModelConfig, Part, Role, Tensor,
    dequant::{COMPUTABLE, supported},
    error::shown,
};

/// What a name means.
enum Meaning {
    /// The arithmetic uses it.
    Role(Role),
    /// Computed anew by everybody, or a copy of another.
    Ignored,
    /// Not of this family: the model computes something else.
    Unknown,
}

const HF_PARTS: &[(&str, Part)] = &[
    ("input_layernorm.weight", Part::AttentionNorm),
    ("self_attn.q_proj.weight", Part::Query),
    ("self_attn.q_proj.bias", Part::QueryBias),
    ("self_attn.k_proj.weight", Part::Key),
    ("self_attn.k_proj.bias", Part::KeyBias),
    ("self_attn.v_proj.weight", Part::Value),
    ("self_attn.v_proj.bias", Part::ValueBias),
    ("self_attn.o_proj.weight", Part::AttentionOutput),
    ("self_attn.o_proj.bias", Part::AttentionOutputBias),
    ("post_attention_layernorm.weight", Part::FeedForwardNorm),
    ("mlp.gate_proj.weight", Part::Gate),
    ("mlp.gate_proj.bias", Part::GateBias),
    ("mlp.up_proj.weight", Part::Up),
    ("mlp.up_proj.bias", Part::UpBias),
    ("mlp.down_proj.weight", Part::Down),
    ("mlp.down_proj.bias", Part::DownBias),
];

const GGUF_PARTS: &[(&str, Part)] = &[
    ("attn_norm.weight", Part::AttentionNorm),
    ("attn_q.weight", Part::Query),
    ("attn_q.bias", Part::QueryBias),
    ("attn_k.weight", Part::Key),
    ("attn_k.bias", Part::KeyBias),
    ("attn_v.weight", Part::Value),
    ("attn_v.bias", Part::ValueBias),
    ("attn_output.weight", Part::AttentionOutput),
    ("attn_output.bias", Part::AttentionOutputBias),
    ("ffn_norm.weight", Part::FeedForwardNorm),
    ("ffn_gate.weight", Part::Gate),
    ("ffn_gate.bias", Part::GateBias),
    ("ffn_up.weight", Part::Up),
    ("ffn_up.bias", Part::UpBias),
    ("ffn_down.weight", Part::Down),
    ("ffn_down.bias", Part::DownBias),
];

fn meaning(format: Format, name: &str, config: &ModelConfig) -> Meaning {
    let (global, prefix, parts) = match format {
        Format::Safetensors => (
            match name {
                "model.embed_tokens.weight" => Some(Role::Embedding),
                "model.norm.weight" => Some(Role::OutputNorm),
                // Files of tied models hold a copy at times; transformers ignores it too.
                "lm_head.weight" if config.tied_embeddings => return Meaning::Ignored,
                "lm_head.weight" => Some(Role::OutputHead),
                _ => None,
            },
            "model.layers.",
            HF_PARTS,
        ),
        Format::Gguf => (
            match name {
                "token_embd.weight" => Some(Role::Embedding),
                "rope_freqs.weight" => Some(Role::RopeFreqs),
                "output_norm.weight" => Some(Role::OutputNorm),
                "output.weight" => Some(Role::OutputHead),
                _ => None,
            },
            "blk.",
            GGUF_PARTS,
        ),
    };
    if let Some(role) = global {
        return Meaning::Role(role);
    }
    let Some((layer, rest)) = name.strip_prefix(prefix).and_then(|n| n.split_once('.')) else {
        return Meaning::Unknown;
    };
    // One spelling for each number: `01` is no layer, so that no two names mean the same role.
    let number = layer.parse::<u32>().ok().filter(|n| *n < config.layers && n.to_string() == layer);
    match (number, parts.iter().find(|(text, _)| *text == rest)) {
        (Some(number), Some((_, part))) => Meaning::Role(Role::Layer(number, *part)),
        // Buffers of old files, computed anew from the base.
        (Some(_), None) if matches!(rest, "self_attn.rotary_emb.inv_freq" | "attn_rot_embd") => {
            Meaning::Ignored
        }
        _ => Meaning::Unknown,
    }
}

/// A role's name in a format.
pub(crate) fn name_of(format: Format, role: Role) -> String {
    let (global, layer, parts) = match format {
        Format::Safetensors => (
            ["model.embed_tokens.weight", "rope_freqs.weight", "model.norm.weight", "lm_head.weight"],
            "model.layers",
            HF_PARTS,
        ),
        Format::Gguf => (
            ["token_embd.weight", "rope_freqs.weight", "output_norm.weight", "output.weight"],
            "blk",
            GGUF_PARTS,
        ),
    };
    match role {
        Role::Embedding => global[0].to_owned(),
        Role::RopeFreqs => global[1].to_owned(),
        Role::OutputNorm => global[2].to_owned(),
        Role::OutputHead => global[3].to_owned(),
        Role::Layer(number, part) => {
            let name = parts.iter().find(|(_, p)| *p == part).map_or("?", |(text, _)| text);
            format!("{layer}.{number}.{name}")
        }
    }
}

/// The shape that a role has under a configuration, row-major.
pub(crate) fn shape_of(role: Role, config: &ModelConfig) -> Vec<u64> {
    let [hidden, intermediate, vocab] =
        [config.hidden_size, config.intermediate_size, config.vocab_size].map(u64::from);
    let head_dim = u64::from(config.head_dim);
    let query = u64::from(config.heads) * head_dim;
    let key = u64::from(config.kv_heads) * head_dim;
    match role {
        Role::Embedding | Role::OutputHead => vec![vocab, hidden],
        Role::RopeFreqs => vec![head_dim / 2],
        Role::OutputNorm => vec![hidden],
        Role::Layer(_, part) => match part {
            Part::AttentionNorm | Part::FeedForwardNorm | Part::AttentionOutputBias | Part::DownBias => {
                vec![hidden]
            }
            Part::Query => vec![query, hidden],
            Part::QueryBias => vec![query],
            Part::Key | Part::Value => vec![key, hidden],
            Part::KeyBias | Part::ValueBias => vec![key],
            Part::AttentionOutput => vec![hidden, query],
            Part::Gate | Part::Up => vec![intermediate, hidden],
            Part::GateBias | Part::UpBias => vec![intermediate],
            Part::Down => vec![hidden, intermediate],
        },
    }
}

/// Every role that a configuration demands, in execution order.
pub(crate) fn demanded(format: Format, config: &ModelConfig) -> impl Iterator<Item = Role> {
    const WEIGHTS: &[Part] = &[
        Part::AttentionNorm,
        Part::Query,
        Part::Key,
        Part::Value,
        Part::AttentionOutput,
        Part::FeedForwardNorm,
        Part::Gate,
        Part::Up,
        Part::Down,
    ];
    let mut parts = WEIGHTS.to_vec();
    if config.attention_bias {
        parts.extend([Part::QueryBias, Part::KeyBias, Part::ValueBias]);
        // GGUF files of other origins have biases on the inputs alone.
        if format == Format::Safetensors {
            parts.push(Part::AttentionOutputBias);
        }
    }
    if config.mlp_bias {
        parts.extend([Part::GateBias, Part::UpBias, Part::DownBias]);
    }
    parts.sort_unstable();
    let layers =
        (0..config.layers).flat_map(move |n| parts.clone().into_iter().map(move |p| Role::Layer(n, p)));
    let head = (!config.tied_embeddings).then_some(Role::OutputHead);
    std::iter::once(Role::Embedding).chain(layers).chain([Role::OutputNorm]).chain(head)
}

/// Gives each tensor its role and puts them into execution order. `Some` text: the tensors are not what the family
/// computes with, and why.
///
/// # Errors
/// When a tensor is missing or has another shape than the configuration demands.
pub(crate) fn assign(
    format: Format,
    config: &ModelConfig,
    tensors: &mut [Tensor],
    file_of: impl Fn(&Tensor) -> std::path::PathBuf,
    model: &std::path::Path,
) -> Result<Option<String>, CheckpointError> {
    let mut refusals = Vec::new();
    for tensor in &mut *tensors {
        tensor.role = match meaning(format, &tensor.name, config) {
            Meaning::Role(role) => Some(role),
            Meaning::Ignored => None,
            Meaning::Unknown => {
                refusals.push(format!("tensor `{}` has no place in the llama family", shown(&tensor.name)));
                None
            }
        };
        if let Some(role) = tensor.role {
            refusals.extend(type_refusal(tensor, role));
        }
    }
    tensors.sort_by(|a, b| {
        let key = |t: &Tensor| (t.role.is_none(), t.role, t.file, t.offset);
        key(a).cmp(&key(b))
    });
    if let Some(first) = refusals.first() {
        return Ok(Some(match refusals.len() {
            1 => first.clone(),
            more => format!("{first} (and {} more of this kind)", more - 1),
        }));
    }
    check(format, config, tensors, file_of, model)?;
    Ok(None)
}

/// Why the engine can't compute with a tensor's type, if it can't.
fn type_refusal(tensor: &Tensor, role: Role) -> Option<String> {
    let matrix = shape_is_matrix(role);
    let plain = matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16);
    let (name, dtype) = (shown(&tensor.name), tensor.dtype);
    if !COMPUTABLE.contains(&dtype) {
        Some(format!("tensor `{name}` is of type {dtype}; supported are {}", supported()))
    } else if !matrix && !plain {
        Some(format!("tensor `{name}` is of type {dtype}; norms and biases must be F32, F16 or BF16"))
    } else {
        None
    }
}

fn shape_is_matrix(role: Role) -> bool {
    match role {
        Role::Embedding | Role::OutputHead => true,
        Role::RopeFreqs | Role::OutputNorm => false,
        Role::Layer(_, part) => matches!(
            part,
            Part::Query
                | Part::Key
                | Part::Value
                | Part::AttentionOutput
                | Part::Gate
                | Part::Up
                | Part::Down
        ),
    }
}

/// Checks that tensors with roles are complete and of the right shape.
pub(crate) fn check(
    format: Format,
    config: &ModelConfig,
    tensors: &[Tensor],
    file_of: impl Fn(&Tensor) -> std::path::PathBuf,
    model: &std::path::Path,
) -> Result<(), CheckpointError> {
    let mut by_role = HashMap::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(role) = tensor.role else { continue };
        if by_role.insert(role, tensor).is_some() {
            return Err(CheckpointError::DuplicateTensor {
                file: file_of(tensor),
                tensor: shown(&tensor.name),
            });
        }
        let expected = shape_of(role, config);
        if tensor.shape != expected {
            return Err(CheckpointError::WrongShape {
                file: file_of(tensor),
                tensor: shown(&tensor.name),
                expected,
                found: tensor.shape.clone(),
            });
        }
    }
    match demanded(format, config).find(|role| !by_role.contains_key(role)) {
        Some(role) => {
            Err(CheckpointError::MissingTensor { file: model.to_owned(), tensor: name_of(format, role) })
        }
        None => Ok(()),
    }
}
