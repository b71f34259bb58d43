//! `/v1/completions`.

use super::{
    Api, GenerateRequest, Prompt,
    fields::{Fields, Kind, array, kind, string},
    sampling::{CommonFields, HARMLESS},
};
use crate::{
    config::{SEQUENCES_MAX, TOP_LOGPROBS_MAX},
    errors::ApiError,
};

/// Most ids of one prompt: above every context, below what a body can hold.
const PROMPT_IDS_MAX: usize = 8 << 20;

pub(super) fn parse(body: &[u8]) -> Result<GenerateRequest, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let common = CommonFields::take(&mut fields, &["max_tokens", "max_completion_tokens"])?;
    let logprobs = fields.integer("logprobs", 0..=i64::from(TOP_LOGPROBS_MAX))?;
    let prompt = prompt(&mut fields)?;
    let sequences = prompt.count() as u64 * u64::from(common.n);
    if sequences > u64::from(SEQUENCES_MAX) {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "{} prompts x n {} = {sequences} sequences, at most {SEQUENCES_MAX}",
                prompt.count(),
                common.n
            ),
        ));
    }
    fields.only("echo", |raw| raw.get() == "false", "")?;
    fields.only("suffix", |raw| raw.get() == r#""""#, "no model here fills in the middle")?;
    let n = common.n.to_string();
    fields.only("best_of", |raw| raw.get() == n, "only a value equal to `n` is")?;
    fields.finish(HARMLESS)?;
    let CommonFields { model, n, tokens_max, stops, sampling, logit_bias, stream, keep_alive } = common;
    Ok(GenerateRequest {
        api: Api::Completion,
        model,
        prompt,
        n,
        tokens_max,
        stops,
        sampling,
        logit_bias,
        logprobs: logprobs.and_then(|n| u32::try_from(n).ok()),
        stream,
        keep_alive,
    })
}

/// A string, an array of strings, an array of ids, or an array of arrays of ids.
fn prompt(fields: &mut Fields<'_>) -> Result<Prompt, ApiError> {
    const WHAT: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let Some(raw) = fields.take("prompt") else {
        return Err(ApiError::invalid("prompt", "`prompt` is missing"));
    };
    if kind(raw) == Kind::String {
        return Ok(Prompt::Texts(vec![string(raw, "prompt")?]));
    }
    if kind(raw) != Kind::Array {
        return Err(ApiError::invalid("prompt", format!("`prompt` must be {WHAT}")));
    }
    let max = SEQUENCES_MAX as usize;
    let prompt = match raw.get()[1..].trim_start().as_bytes().first() {
        Some(b'"') => Prompt::Texts(array(raw, "prompt", max, WHAT)?),
        Some(b'[') => {
            let prompts: Vec<Vec<u32>> = array(raw, "prompt", max, WHAT)?;
            Prompt::Ids(prompts)
        }
        Some(b']') => return Err(ApiError::invalid("prompt", "`prompt` is empty")),
        _ => Prompt::Ids(vec![array(raw, "prompt", PROMPT_IDS_MAX, WHAT)?]),
    };
    if let Prompt::Ids(prompts) = &prompt
        && prompts.iter().any(Vec::is_empty)
    {
        return Err(ApiError::invalid("prompt", "a prompt of token ids is empty"));
    }
    Ok(prompt)
}
