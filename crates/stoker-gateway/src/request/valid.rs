//! A request that is right for its model: token ids, complete sampling parameters, lengths.

use std::sync::Arc;

use rand::RngExt;
use serde_json::Value;
use stoker_checkpoint::{
    chat_template::{ChatInput, ChatTemplate, TemplateError},
    stop::StopMatcher,
    text::{self, TextAssets},
};
use stoker_types::{KeepAlive, Sampling, clock};

use super::{Api, ChatPrompt, GenerateRequest, Prompt, StreamOptions, TokensMax};
use crate::{config::RENDERED_BYTES_MAX, errors::ApiError, seams::ServedModel, text::TextError};

/// Random seeds stay below 2^53: every JSON reader keeps such a number whole.
const SEED_MAX: u64 = 1 << 53;
/// Instructions of a chat template that a runtime thread may spend, below a millisecond. Two messages through a usual
/// template take some hundred.
const QUICK_FUEL: u64 = 10_000;

/// What is to be generated, in the model's terms.
#[derive(Debug, Clone)]
pub(crate) struct ValidGenerateRequest {
    pub(crate) api: Api,
    /// Each prompt's ids, none empty.
    pub(crate) prompts: Vec<Arc<[u32]>>,
    /// Choices for each prompt. Sequence `p * n + i` is choice `i` of prompt `p`.
    pub(crate) n: u32,
    pub(crate) stops: StopMatcher,
    /// Of the first sequence of each prompt; the seed of choice `i` is `i` more.
    pub(crate) sampling: Sampling,
    /// Every id that ends a turn.
    pub(crate) stop_ids: Arc<[u32]>,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) keep_alive: Option<KeepAlive>,
    tokens_max: Option<TokensMax>,
    prompt_param: &'static str,
}

/// How much work a prompt may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Little enough for a runtime thread: a handover to another thread costs more than a short prompt.
    Quick,
    /// As much as the limits allow, on a thread for blocking work.
    Full,
}

/// A request's prompts as token ids.
#[derive(Debug)]
pub(crate) struct PromptIds(Vec<Arc<[u32]>>);

// === impl PromptIds ===

impl PromptIds {
    /// Renders and tokenises the prompts of `request`. Takes time in proportion to them. `None`: more effort than
    /// [`Effort::Quick`] is needed, and the request is as it was.
    pub(crate) fn of(
        request: &mut GenerateRequest,
        model: &ServedModel,
        assets: &TextAssets,
        effort: Effort,
    ) -> Result<Option<Self>, ApiError> {
        let tokens_max = request.tokens_max;
        let ids = match &mut request.prompt {
            Prompt::Chat(chat) => match chat_ids(chat, model, assets, tokens_max, effort)? {
                Some(ids) => vec![ids.into()],
                None => return Ok(None),
            },
            Prompt::Texts(texts) => texts
                .iter()
                .map(|text| {
                    refuse_certainly_too_long(text, model, assets, tokens_max, "prompt")?;
                    encoded(assets.tokenizer.encode(text, true), "prompt").map(Into::into)
                })
                .collect::<Result<_, ApiError>>()?,
            Prompt::Ids(prompts) => std::mem::take(prompts).into_iter().map(Into::into).collect(),
        };
        Ok(Some(Self(ids)))
    }
}

// === impl ValidGenerateRequest ===

impl ValidGenerateRequest {
    /// Checks the request, whose prompts are `prompts`, against the model.
    pub(crate) fn new(
        request: GenerateRequest,
        PromptIds(prompts): PromptIds,
        model: &ServedModel,
        assets: &TextAssets,
    ) -> Result<Self, ApiError> {
        let GenerateRequest {
            api,
            model: _,
            prompt,
            n,
            tokens_max,
            stops,
            sampling,
            logit_bias,
            logprobs,
            stream,
            keep_alive,
        } = request;
        if let Some(id) = logit_bias.keys().find(|&&id| id >= model.vocab_size) {
            return Err(ApiError::invalid(
                "logit_bias",
                format!("token id {id} is not below the vocabulary's size {}", model.vocab_size),
            ));
        }
        let prompt_param = prompt.param();
        for ids in &prompts {
            if ids.is_empty() {
                return Err(ApiError::invalid(prompt_param, format!("`{prompt_param}` has no tokens")));
            }
            if let Some(id) = ids.iter().find(|&&id| id >= model.vocab_size) {
                return Err(ApiError::invalid(
                    prompt_param,
                    format!("token id {id} is not below the vocabulary's size {}", model.vocab_size),
                ));
            }
        }
        let seed = rand::rng().random_range(0..SEED_MAX);
        let mut sampling = sampling.complete(&model.defaults, seed);
        sampling.logit_bias = logit_bias;
        sampling.logprobs = logprobs;
        let mut stop_ids = assets.end_ids.clone();
        stop_ids.extend(&model.defaults.eos_ids);
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let valid = Self {
            api,
            prompts,
            n,
            stops: StopMatcher::new(&stops).map_err(|e| ApiError::invalid("stop", e.to_string()))?,
            sampling,
            stop_ids: stop_ids.into(),
            stream,
            keep_alive,
            tokens_max,
            prompt_param,
        };
        valid.answer_max(model.context, u32::MAX)?;
        Ok(valid)
    }

    /// How many sequences it is in all.
    pub(crate) fn sequences(&self) -> u16 {
        u16::try_from(self.prompts.len() * self.n as usize).unwrap_or(u16::MAX)
    }

    /// Tokens of all prompts.
    pub(crate) fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.prompts.iter().map(|p| p.len()).sum::<usize>()).unwrap_or(u32::MAX)
    }

    /// Most tokens of each prompt's answers in a context of `context` tokens. A request that names no bound gets the
    /// rest of the context, at most `unstreamed_max` when it doesn't stream.
    pub(crate) fn answer_max(&self, context: u32, unstreamed_max: u32) -> Result<Vec<u32>, ApiError> {
        let default_max = if self.stream.is_some() { u32::MAX } else { unstreamed_max };
        let one = |prompt: &Arc<[u32]>| {
            let rest = u32::try_from(prompt.len()).ok().and_then(|len| context.checked_sub(len)).unwrap_or(0);
            let exceeded = || {
                let tokens = self.tokens_max.map(|t| t.tokens);
                // The prompt is to blame if nothing fits behind it, else the bound.
                let param = self.tokens_max.filter(|_| rest > 0).map_or(self.prompt_param, |t| t.param);
                ApiError::context_exceeded(prompt.len(), tokens, context, param)
            };
            let wanted = self.tokens_max.map_or(rest.min(default_max), |t| t.tokens);
            if rest == 0 || wanted > rest { Err(exceeded()) } else { Ok(wanted) }
        };
        self.prompts.iter().map(one).collect()
    }
}

fn chat_ids(
    chat: &mut ChatPrompt,
    model: &ServedModel,
    assets: &TextAssets,
    tokens_max: Option<TokensMax>,
    effort: Effort,
) -> Result<Option<Vec<u32>>, ApiError> {
    let ChatPrompt { messages, add_generation_prompt, kwargs } = chat;
    let Some(template) = &assets.template else {
        let why = assets.template_problem.as_ref().map_or_else(
            || format!("`{}` has no chat template; use /v1/completions", model.name),
            |problem| format!("the chat template of `{}` can't be used: {problem}", model.name),
        );
        return Err(ApiError::invalid("messages", why));
    };
    fit_roles(messages, template)?;
    let rendered = template.render(&ChatInput {
        messages,
        add_generation_prompt: *add_generation_prompt,
        kwargs,
        special_tokens: assets.tokenizer.special_tokens(),
        now: clock::wall(),
        output_bytes_max: RENDERED_BYTES_MAX,
        fuel_max: (effort == Effort::Quick).then_some(QUICK_FUEL),
    });
    let rendered = match rendered {
        Err(TemplateError::BudgetExceeded { .. }) if effort == Effort::Quick => return Ok(None),
        Err(error) => {
            let param = match error {
                TemplateError::ReservedName { .. } => "chat_template_kwargs",
                _ => "messages",
            };
            return Err(TextError::Prompt { param, detail: error.to_string() }.into());
        }
        Ok(rendered) => rendered,
    };
    refuse_certainly_too_long(&rendered, model, assets, tokens_max, "messages")?;
    encoded(assets.tokenizer.encode_chat(&rendered), "messages").map(Some)
}

/// Templates ignore what they don't know, silently. What a message says must not get lost so: `developer` is the newer
/// name of `system`; tools need a template that has them.
fn fit_roles(messages: &mut [Value], template: &ChatTemplate) -> Result<(), ApiError> {
    for (at, message) in messages.iter_mut().enumerate() {
        if message["role"] == "developer" && !template.source().contains("developer") {
            message["role"] = "system".into();
        }
        let field = if message["role"] == "tool" {
            "role"
        } else if message.get("tool_calls").is_some() {
            "tool_calls"
        } else {
            continue;
        };
        if !template.source().contains("tool") {
            let place = format!("messages[{at}].{field}");
            return Err(ApiError::unsupported(
                &*place,
                format!("`{place}`: this model's chat template has no tools"),
            ));
        }
    }
    Ok(())
}

/// A text that can't fit, whatever its tokens, isn't tokenised.
fn refuse_certainly_too_long(
    text: &str,
    model: &ServedModel,
    assets: &TextAssets,
    tokens_max: Option<TokensMax>,
    param: &str,
) -> Result<(), ApiError> {
    let least = assets.tokenizer.tokens_min(text.len());
    if least > model.context as usize {
        return Err(ApiError::context_exceeded(least, tokens_max.map(|t| t.tokens), model.context, param));
    }
    Ok(())
}

fn encoded(ids: Result<Vec<u32>, text::TextError>, param: &'static str) -> Result<Vec<u32>, ApiError> {
    ids.map_err(|e| TextError::Prompt { param, detail: e.to_string() }.into())
}
