//! A model's text side as one value: tokenizer, chat template, the ids that end a turn.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value};

use crate::{
    CheckpointError, Manifest, TokenizerFiles,
    chat_template::{self, ChatTemplate, TemplateError},
    error::shown,
    gguf,
    tokenizer::{self, Tokenizer, TokenizerKey, Tokenizers},
};

/// The largest `tokenizer.json` that is read: Gemma's, the largest known, has 33 MiB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// The largest of the other files that is read.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// Texts of control tokens that end a turn, whatever the model's metadata lists. Only a token that the model itself
/// declares to be special counts.
const END_OF_TURN: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "</s>",
];

/// Why a model has no usable text side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The GGUF header can't be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// Which file.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A file larger than any real one of its kind.
    #[error("{}: absurd size: {len} bytes, at most {max} are read", file.display())]
    TooLarge {
        /// Which file.
        file: PathBuf,
        /// Its length, bytes.
        len: u64,
        /// The limit, bytes.
        max: u64,
    },
    /// A JSON file that isn't one.
    #[error("{}: {source}", file.display())]
    Json {
        /// Which file.
        file: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The tokenizer's definition contradicts itself.
    #[error("tokenizer: {problem}")]
    BadTokenizer {
        /// The contradiction.
        problem: String,
    },
    /// GGUF metadata that is missing or of the wrong type.
    #[error("GGUF metadata `{key}` {problem}")]
    BadMetadata {
        /// Which key.
        key: &'static str,
        /// "is missing", "must be ...".
        problem: String,
    },
    /// `tokenizer.ggml.pre` names a way of splitting text that isn't known; a guess would give wrong ids silently.
    #[error(
        "unknown pre-tokenizer `{pre}` (GGUF `tokenizer.ggml.pre`); known are {}", tokenizer::PRE_TOKENIZERS.join(", ")
    )]
    UnknownPreTokenizer {
        /// The name.
        pre: String,
    },
    /// A kind of tokenizer that isn't implemented.
    #[error(
        "the tokenizer kind `{kind}` is not supported; `gpt2` (byte-level BPE) and `llama` (BPE with scores) are"
    )]
    UnsupportedModel {
        /// GGUF's name of it.
        kind: String,
    },
    /// Ids can't be turned back into text faithfully.
    #[error("the tokenizer's decoder `{decoder}` is not supported")]
    UnsupportedDecoder {
        /// Its type.
        decoder: String,
    },
    /// One text, two ids.
    #[error("token `{token}` is in the vocabulary twice, as {first} and {second}")]
    DuplicateToken {
        /// The text.
        token: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// The model has no tokenizer: token ids only.
    #[error("the model has no tokenizer: only token ids can be sent to it")]
    NoTokenizer,
    /// The tokenizer failed on a text.
    #[error("the text can't be tokenised: {problem}")]
    Encode {
        /// What the library said.
        problem: String,
    },
}

/// What the gateway needs to speak text with a model.
#[derive(Debug, Clone)]
pub struct TextAssets {
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text; `None` when the model has no template, or an unusable one.
    pub template: Option<Arc<ChatTemplate>>,
    /// Why the template that the model has can't be used.
    pub template_problem: Option<TemplateError>,
    /// Every id that ends a turn, ascending: the manifest's, the tokenizer's `eos`, and special tokens that are known
    /// to end turns.
    pub end_ids: Vec<u32>,
}

// === impl TextAssets ===

impl TextAssets {
    /// Reads the text side of the model whose directory is `dir`; its tokenizer is the one that another model of
    /// `tokenizers` has, if they are defined by the same bytes. Blocking: tens to hundreds of milliseconds.
    ///
    /// An unusable chat template is no error: completions still work. [`TextAssets::template_problem`] says why.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`] for a model without one; else what is wrong with the files.
    pub fn open(dir: &Path, manifest: &Manifest, tokenizers: &Tokenizers) -> Result<Self, TextError> {
        let (tokenizer, source, extra) = match &manifest.tokenizer {
            TokenizerFiles::None => return Err(TextError::NoTokenizer),
            TokenizerFiles::Gguf => {
                let file = manifest.files.first().ok_or(TextError::NoTokenizer)?;
                let header = gguf::Header::open(&dir.join(&file.path))?;
                let key = TokenizerKey::of_gguf(&header);
                let tokenizer = tokenizers.get(key, || tokenizer::from_gguf(&header))?;
                let source = header.str("tokenizer.chat_template").map(str::to_owned);
                let extra = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
                (tokenizer, Ok(source), extra.iter().filter_map(|key| header.u32(key)).collect())
            }
            TokenizerFiles::HuggingFace { dir: files } => {
                let files = HuggingFaceFiles::read(&dir.join(files))?;
                let source = files.template_source();
                (tokenizers.get(files.tokenizer_key(), || files.tokenizer())?, source, Vec::new())
            }
        };
        let compiled = source.and_then(|source| source.map(|s| ChatTemplate::new(&s)).transpose());
        let (template, template_problem) = match compiled {
            Ok(template) => (template.map(Arc::new), None),
            Err(problem) => (None, Some(problem)),
        };
        let mut end_ids = manifest.generation.eos_ids.clone();
        end_ids.extend(extra);
        end_ids.extend(tokenizer.eos_id());
        let special = |text: &&str| tokenizer.token_id(text).filter(|&id| tokenizer.is_special(id));
        end_ids.extend(END_OF_TURN.iter().filter_map(special));
        end_ids.sort_unstable();
        end_ids.dedup();
        Ok(Self { tokenizer, template, template_problem, end_ids })
    }
}

/// The text files of a Hugging Face folder.
struct HuggingFaceFiles {
    tokenizer_json: Vec<u8>,
    config: Map<String, Value>,
    special_tokens: Map<String, Value>,
    /// `chat_template.jinja`.
    template_text: Option<String>,
    /// `chat_template.json`.
    template_json: Option<Map<String, Value>>,
}

// === impl HuggingFaceFiles ===

impl HuggingFaceFiles {
    fn read(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let tokenizer_json = read_bounded(&path, TOKENIZER_BYTES_MAX)?.ok_or_else(|| TextError::Io {
            file: path,
            source: io::Error::new(io::ErrorKind::NotFound, "there is no tokenizer.json here"),
        })?;
        let template_path = dir.join("chat_template.jinja");
        let template_text = read_bounded(&template_path, CONFIG_BYTES_MAX)?
            .map(|bytes| {
                String::from_utf8(bytes).map_err(|e| TextError::Io {
                    file: template_path,
                    source: io::Error::new(io::ErrorKind::InvalidData, e.utf8_error()),
                })
            })
            .transpose()?;
        Ok(Self {
            tokenizer_json,
            config: read_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default(),
            special_tokens: read_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default(),
            template_text,
            template_json: read_object(&dir.join("chat_template.json"))?,
        })
    }

    /// Of what [`HuggingFaceFiles::tokenizer`] looks at.
    fn tokenizer_key(&self) -> TokenizerKey {
        let mut config = self.config.clone();
        config.remove("chat_template");
        let text = |map| Value::Object(map).to_string();
        let (config, special) = (text(config), text(self.special_tokens.clone()));
        let files = [&*self.tokenizer_json, config.as_bytes(), special.as_bytes()];
        TokenizerKey::of_files(files.map(Some))
    }

    fn tokenizer(&self) -> Result<Tokenizer, TextError> {
        Tokenizer::from_json(&self.tokenizer_json, &self.config, &self.special_tokens)
    }

    /// The template's source, in the order in which transformers looks.
    fn template_source(&self) -> Result<Option<String>, TemplateError> {
        if let Some(text) = &self.template_text {
            return Ok(Some(text.clone()));
        }
        let value = self.template_json.as_ref().and_then(|object| object.get("chat_template"));
        match value.or_else(|| self.config.get("chat_template")) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => chat_template::select(value).map(|source| Some(source.to_owned())),
        }
    }
}

/// Reads a file of at most `max` bytes; `None` when it isn't there.
fn read_bounded(path: &Path, max: u64) -> Result<Option<Vec<u8>>, TextError> {
    let error = |source| TextError::Io { file: path.to_owned(), source };
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(error)?,
    };
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > max {
        let len = std::fs::metadata(path).map_err(error)?.len();
        return Err(TextError::TooLarge { file: path.to_owned(), len, max });
    }
    Ok(Some(bytes))
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, TextError> {
    let Some(bytes) = read_bounded(path, CONFIG_BYTES_MAX)? else { return Ok(None) };
    let json = |source| TextError::Json { file: path.to_owned(), source };
    serde_json::from_slice(&bytes).map(Some).map_err(json)
}

impl TextError {
    /// The tokenizers library's errors are text; bounded, because they may quote the file.
    pub(crate) fn bad_tokenizer(error: impl std::fmt::Display) -> Self {
        Self::BadTokenizer { problem: shown(&error.to_string()) }
    }
}
