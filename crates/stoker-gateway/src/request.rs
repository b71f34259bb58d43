//! From a body of JSON to what is to be generated, in two steps: [`GenerateRequest`] is right in itself, and
//! [`ValidGenerateRequest`] is right for a model.

mod chat;
mod completion;
mod fields;
mod sampling;
mod valid;

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use stoker_types::KeepAlive;

pub(crate) use sampling::SamplingFields;
pub(crate) use valid::{Effort, PromptIds, ValidGenerateRequest};

use crate::errors::ApiError;

/// Which API the request came by, and so which shape its answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// A request whose fields have the right types, known names and allowed values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GenerateRequest {
    pub(crate) api: Api,
    pub(crate) model: String,
    pub(crate) prompt: Prompt,
    /// Choices for each prompt.
    pub(crate) n: u32,
    pub(crate) tokens_max: Option<TokensMax>,
    pub(crate) stops: Vec<String>,
    pub(crate) sampling: SamplingFields,
    pub(crate) logit_bias: BTreeMap<u32, f32>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) keep_alive: Option<KeepAlive>,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Chat(ChatPrompt),
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

/// Messages for the model's chat template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChatPrompt {
    /// As templates see them: `content` is a string.
    pub(crate) messages: Vec<Value>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) kwargs: Map<String, Value>,
}

/// A bound on the answer's length, and the field that set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokensMax {
    pub(crate) tokens: u32,
    pub(crate) param: &'static str,
}

/// How to stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
}

// === impl GenerateRequest ===

impl GenerateRequest {
    /// Reads a request's body.
    pub(crate) fn parse(api: Api, body: &[u8]) -> Result<Self, ApiError> {
        match api {
            Api::Chat => chat::parse(body),
            Api::Completion => completion::parse(body),
        }
    }
}

// === impl Prompt ===

impl Prompt {
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Chat(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::Ids(ids) => ids.len(),
        }
    }

    /// The field that it came by.
    pub(crate) fn param(&self) -> &'static str {
        match self {
            Self::Chat(_) => "messages",
            Self::Texts(_) | Self::Ids(_) => "prompt",
        }
    }
}
