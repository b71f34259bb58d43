//! `/v1/chat/completions`.

use serde_json::{Map, Value, value::RawValue};

use super::{
    Api, ChatPrompt, GenerateRequest, Prompt,
    fields::{Fields, Kind, array, kind, string},
    sampling::{CommonFields, HARMLESS},
};
use crate::{
    config::{MESSAGES_MAX, TOP_LOGPROBS_MAX},
    errors::ApiError,
};

/// Most parts of a message's content.
const PARTS_MAX: usize = 4096;
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

pub(super) fn parse(body: &[u8]) -> Result<GenerateRequest, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let common = CommonFields::take(&mut fields, &["max_completion_tokens", "max_tokens"])?;
    let logprobs = logprobs(&mut fields)?;
    let prompt = prompt(&mut fields)?;
    refuse_what_changes_the_answer(&mut fields)?;
    fields.finish(HARMLESS)?;
    let CommonFields { model, n, tokens_max, stops, sampling, logit_bias, stream, keep_alive } = common;
    Ok(GenerateRequest {
        api: Api::Chat,
        model,
        prompt: Prompt::Chat(prompt),
        n,
        tokens_max,
        stops,
        sampling,
        logit_bias,
        logprobs,
        stream,
        keep_alive,
    })
}

fn refuse_what_changes_the_answer(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    let is_empty_array = |raw: &RawValue| kind(raw) == Kind::Array && raw.get()[1..].trim_start() == "]";
    let is_no_choice = |raw: &RawValue| matches!(raw.get(), r#""none""# | r#""auto""#);
    fields.only("tools", is_empty_array, "the native engine has no tool calls yet")?;
    fields.only("tool_choice", is_no_choice, "the native engine has no tool calls yet")?;
    fields.only("functions", is_empty_array, "the native engine has no function calls")?;
    fields.only("function_call", is_no_choice, "the native engine has no function calls")?;
    let is_text = |raw: &RawValue| {
        serde_json::from_str::<Value>(raw.get()).is_ok_and(|v| v == serde_json::json!({ "type": "text" }))
    };
    fields.only("response_format", is_text, "only {\"type\": \"text\"} is")?;
    let is_only_text = |raw: &RawValue| {
        serde_json::from_str::<Value>(raw.get()).is_ok_and(|v| v == serde_json::json!(["text"]))
    };
    fields.only("modalities", is_only_text, "only [\"text\"] is")?;
    for name in ["audio", "prediction", "web_search_options", "reasoning_effort", "verbosity", "documents"] {
        fields.only(name, |_| false, "")?;
    }
    fields.only("continue_final_message", |raw| raw.get() == "false", "")?;
    fields.only("echo", |raw| raw.get() == "false", "")
}

fn logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=i64::from(TOP_LOGPROBS_MAX))?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::invalid(
            "top_logprobs",
            "`top_logprobs` is allowed only with `logprobs`: true",
        ));
    }
    Ok(wanted.then(|| top.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)))
}

fn prompt(fields: &mut Fields<'_>) -> Result<ChatPrompt, ApiError> {
    let Some(raw) = fields.take("messages") else {
        return Err(ApiError::invalid("messages", "`messages` is missing"));
    };
    let raws: Vec<&RawValue> = array(raw, "messages", MESSAGES_MAX, "an array of messages")?;
    if raws.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    let messages = raws
        .into_iter()
        .enumerate()
        .map(|(at, raw)| message(raw, &format!("messages[{at}]")))
        .collect::<Result<_, _>>()?;
    Ok(ChatPrompt {
        messages,
        add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
        kwargs: fields.typed::<Map<String, Value>>("chat_template_kwargs", "an object")?.unwrap_or_default(),
    })
}

/// A message as templates see it.
fn message(raw: &RawValue, place: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of_value(raw, place)?;
    let role_place = fields.place("role");
    let role = fields
        .string("role")?
        .ok_or_else(|| ApiError::invalid(&*role_place, format!("`{role_place}` is missing")))?;
    if !ROLES.contains(&&*role) {
        return Err(ApiError::invalid(
            &*role_place,
            format!("`{role_place}` must be one of {}", ROLES.join(", ")),
        ));
    }
    let mut message = Map::new();
    message.insert("role".into(), role.clone().into());
    let content_place = fields.place("content");
    let content = fields.take("content").map(|raw| content(raw, &content_place)).transpose()?;
    let tool_calls: Option<Vec<Value>> = if role == "assistant" {
        fields.typed("tool_calls", "an array of tool calls")?.filter(|calls: &Vec<Value>| !calls.is_empty())
    } else {
        None
    };
    if content.is_none() && tool_calls.is_none() {
        return Err(ApiError::invalid(&*content_place, format!("`{content_place}` is missing")));
    }
    message.insert("content".into(), content.map_or(Value::Null, Value::String));
    if let Some(calls) = tool_calls {
        message.insert("tool_calls".into(), calls.into());
    }
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(value) = fields.string(name)? {
            message.insert(name.into(), value.into());
        }
    }
    for name in ["audio", "function_call", "refusal"] {
        fields.only(name, |_| false, "")?;
    }
    fields.finish(&["annotations"])?;
    Ok(Value::Object(message))
}

/// A string, or text parts, which are joined by line ends as other servers do for templates that want a string.
fn content(raw: &RawValue, place: &str) -> Result<String, ApiError> {
    let what = "a string or an array of text parts";
    match kind(raw) {
        Kind::String => return string(raw, place),
        Kind::Array => {}
        _ => return Err(ApiError::invalid(place, format!("`{place}` must be {what}"))),
    }
    let parts: Vec<&RawValue> = array(raw, place, PARTS_MAX, what)?;
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of_value(part, &format!("{place}[{at}]"))?;
        let kind = part.string("type")?.unwrap_or_default();
        if kind != "text" {
            let place = part.place("type");
            let shown: String = kind.chars().take(40).flat_map(char::escape_default).collect();
            return Err(ApiError::unsupported(
                &*place,
                format!("`{place}` is `{shown}`: the native engine takes text only"),
            ));
        }
        let text_place = part.place("text");
        let text = part.string("text")?;
        texts
            .push(text.ok_or_else(|| ApiError::invalid(&*text_place, format!("`{text_place}` is missing")))?);
        part.finish(&["cache_control", "annotations"])?;
    }
    Ok(texts.join("\n"))
}
