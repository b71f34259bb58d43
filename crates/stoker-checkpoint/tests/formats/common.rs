//! Files made by hand, right and wrong, and where the real ones are.

use std::path::{Path, PathBuf};

use stoker_checkpoint::Source;

pub(crate) fn source() -> Source {
    Source { uri: "test".to_owned(), revision: None }
}

pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(name)
}

/// The default model's GGUF: `STOKER_TEST_GGUF` names it (`scripts/test` downloads it).
pub(crate) fn smollm2() -> Option<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "tests are told where fixtures are by the script that fetched them"
    )]
    let var = |name| std::env::var(name).ok();
    let path = var("STOKER_TEST_GGUF").map(PathBuf::from);
    if path.is_none() {
        assert!(
            var("STOKER_TEST_ALLOW_SKIP").is_some(),
            "STOKER_TEST_GGUF must name SmolLM2-135M-Instruct.Q4_1.gguf; STOKER_TEST_ALLOW_SKIP=1 goes on without"
        );
        println!("skipped: STOKER_TEST_GGUF is not set");
    }
    path
}

/// A metadata value to be written.
#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    /// A type number and bytes, for what is wrong.
    Raw(u32, Vec<u8>),
}

/// A tensor to be written.
#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub name: String,
    /// In the file's order: the contiguous dimension first.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Instead of the right one.
    pub offset: Option<u64>,
}

/// A GGUF file in the making. The fields can be made wrong.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub meta: Vec<(Vec<u8>, Meta)>,
    pub tensors: Vec<GgufTensor>,
    pub tensor_count: Option<u64>,
    pub meta_count: Option<u64>,
    pub alignment: u64,
}

impl Gguf {
    pub(crate) fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            meta: Vec::new(),
            tensors: Vec::new(),
            tensor_count: None,
            meta_count: None,
            alignment: 32,
        }
    }

    /// A complete llama of one layer, all zeros, in f32.
    pub(crate) fn tiny() -> Self {
        let mut file = Self::new()
            .with("general.architecture", Meta::Text("llama"))
            .with("llama.block_count", Meta::U32(1))
            .with("llama.context_length", Meta::U32(64))
            .with("llama.embedding_length", Meta::U32(8))
            .with("llama.feed_forward_length", Meta::U32(16))
            .with("llama.attention.head_count", Meta::U32(2))
            .with("llama.attention.head_count_kv", Meta::U32(1))
            .with("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5))
            .with("llama.vocab_size", Meta::U32(10));
        for (name, dims) in [
            ("token_embd.weight", vec![8, 10]),
            ("output_norm.weight", vec![8]),
            ("blk.0.attn_norm.weight", vec![8]),
            ("blk.0.attn_q.weight", vec![8, 8]),
            ("blk.0.attn_k.weight", vec![8, 4]),
            ("blk.0.attn_v.weight", vec![8, 4]),
            ("blk.0.attn_output.weight", vec![8, 8]),
            ("blk.0.ffn_norm.weight", vec![8]),
            ("blk.0.ffn_gate.weight", vec![8, 16]),
            ("blk.0.ffn_up.weight", vec![8, 16]),
            ("blk.0.ffn_down.weight", vec![16, 8]),
        ] {
            let elements: u64 = dims.iter().product();
            let data = vec![0; usize::try_from(elements * 4).unwrap()];
            file.tensors.push(GgufTensor { name: name.to_owned(), dims, kind: 0, data, offset: None });
        }
        file
    }

    /// Sets a value, instead of an older one.
    pub(crate) fn with(mut self, key: &str, value: Meta) -> Self {
        self.meta.retain(|(k, _)| k != key.as_bytes());
        self.meta.push((key.as_bytes().to_vec(), value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.meta.retain(|(k, _)| k != key.as_bytes());
        self
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub(crate) fn change(mut self, f: impl FnOnce(&mut Self)) -> Self {
        f(&mut self);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.meta_count.unwrap_or(self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            text(&mut out, tensor.name.as_bytes());
            out.extend(u32::try_from(tensor.dims.len()).unwrap().to_le_bytes());
            tensor.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            pad(&mut data, self.alignment);
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        pad(&mut out, self.alignment);
        out.extend(data);
        out
    }
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let number = |out: &mut Vec<u8>, n: u32| out.extend(n.to_le_bytes());
        match self {
            Self::U32(n) => {
                number(out, 4);
                number(out, *n);
            }
            Self::F32(x) => {
                number(out, 6);
                out.extend(x.to_le_bytes());
            }
            Self::Text(t) => {
                number(out, 8);
                text(out, t.as_bytes());
            }
            Self::Texts(texts) => {
                number(out, 9);
                number(out, 8);
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|t| text(out, t.as_bytes()));
            }
            Self::I32s(numbers) => {
                number(out, 9);
                number(out, 5);
                out.extend((numbers.len() as u64).to_le_bytes());
                numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Self::Raw(kind, bytes) => {
                number(out, *kind);
                out.extend(bytes);
            }
        }
    }
}

fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn pad(out: &mut Vec<u8>, alignment: u64) {
    while !(out.len() as u64).is_multiple_of(alignment) {
        out.push(0);
    }
}

/// A safetensors file of a header and so many bytes of data.
pub(crate) fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}
