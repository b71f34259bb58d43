//! The fields that both APIs share.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use stoker_checkpoint::GenerationDefaults;
use stoker_types::{KeepAlive, Sampling};

use super::{
    StreamOptions, TokensMax,
    fields::{Fields, Kind, array, float, kind, string},
};
use crate::{
    config::{CHOICES_MAX, LOGIT_BIAS_MAX, STOP_BYTES_MAX, STOPS_BYTES_MAX, STOPS_MAX},
    errors::ApiError,
};

/// Fields that say something about the request and nothing about the answer.
pub(super) const HARMLESS: &[&str] = &[
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "request_id",
];

/// Sampling parameters as the client gave them; the model's defaults fill the gaps.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct SamplingFields {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) seed: Option<u64>,
}

/// What both APIs have besides sampling.
pub(super) struct CommonFields {
    pub(super) model: String,
    pub(super) n: u32,
    pub(super) tokens_max: Option<TokensMax>,
    pub(super) stops: Vec<String>,
    pub(super) sampling: SamplingFields,
    pub(super) logit_bias: BTreeMap<u32, f32>,
    pub(super) stream: Option<StreamOptions>,
    pub(super) keep_alive: Option<KeepAlive>,
}

// === impl SamplingFields ===

impl SamplingFields {
    fn take(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let top_p = fields.float("top_p", 0.0..=1.0)?;
        if top_p == Some(0.0) {
            return Err(ApiError::invalid(
                "top_p",
                "`top_p` must be above 0; for greedy decoding set `temperature` to 0",
            ));
        }
        let repetition_penalty = fields.float("repetition_penalty", 0.0..=10.0)?;
        if repetition_penalty == Some(0.0) {
            return Err(ApiError::invalid(
                "repetition_penalty",
                "`repetition_penalty` must be above 0; 1 is off",
            ));
        }
        // -1 is off in the APIs that know top_k.
        let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
        Ok(Self {
            temperature: fields.float("temperature", 0.0..=2.0)?,
            top_p,
            top_k: top_k.map(|k| u32::try_from(k).unwrap_or(0)),
            min_p: fields.float("min_p", 0.0..=1.0)?,
            repetition_penalty,
            frequency_penalty: fields.float("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            presence_penalty: fields.float("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            seed: seed(fields)?,
        })
    }

    /// With the model's own defaults, else temperature 1 and no filter. A model's absurd default is brought into range.
    pub(crate) fn complete(&self, defaults: &GenerationDefaults, seed: u64) -> Sampling {
        let in_range = |value: Option<f32>, min: f32, max: f32| {
            value.filter(|v| v.is_finite()).map(|v| v.clamp(min, max))
        };
        Sampling {
            temperature: self.temperature.or(in_range(defaults.temperature, 0.0, 2.0)).unwrap_or(1.0),
            top_p: self.top_p.or(in_range(defaults.top_p, f32::MIN_POSITIVE, 1.0)).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: self.min_p.or(in_range(defaults.min_p, 0.0, 1.0)).unwrap_or(0.0),
            repetition_penalty: self
                .repetition_penalty
                .or(in_range(defaults.repetition_penalty, 0.01, 10.0))
                .unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: BTreeMap::new(),
            seed: self.seed.unwrap_or(seed),
            logprobs: None,
        }
    }
}

// === impl CommonFields ===

impl CommonFields {
    /// Takes them; `tokens_max` are the names of the bound on the answer, best first.
    pub(super) fn take(fields: &mut Fields<'_>, tokens_max: &[&'static str]) -> Result<Self, ApiError> {
        let Some(model) = fields.string("model")? else {
            return Err(ApiError::invalid("model", "`model` is missing"));
        };
        let n = fields.integer("n", 1..=i64::from(CHOICES_MAX))?.unwrap_or(1);
        fields.only("store", |raw| raw.get() == "false", "nothing that clients send is stored")?;
        fields.only("ignore_eos", |raw| raw.get() == "false", "")?;
        fields.only("min_tokens", |raw| raw.get() == "0", "")?;
        Ok(Self {
            model,
            n: u32::try_from(n).unwrap_or(1),
            tokens_max: take_tokens_max(fields, tokens_max)?,
            stops: stops(fields)?,
            sampling: SamplingFields::take(fields)?,
            logit_bias: logit_bias(fields)?,
            stream: stream(fields)?,
            keep_alive: keep_alive(fields)?,
        })
    }
}

fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Seed {
        Unsigned(u64),
        Signed(i64),
    }
    let seed = fields.typed::<Seed>("seed", "a whole number of at most 64 bits")?;
    Ok(seed.map(|seed| match seed {
        Seed::Unsigned(n) => n,
        Seed::Signed(n) => n.cast_unsigned(),
    }))
}

fn take_tokens_max(fields: &mut Fields<'_>, names: &[&'static str]) -> Result<Option<TokensMax>, ApiError> {
    let mut found: Option<TokensMax> = None;
    for param in names {
        let Some(tokens) = fields.integer(param, 1..=i64::from(u32::MAX))? else { continue };
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        match found {
            None => found = Some(TokensMax { tokens, param }),
            Some(first) if first.tokens == tokens => {}
            Some(first) => {
                return Err(ApiError::invalid(
                    *param,
                    format!(
                        "`{param}` {tokens} and `{}` {} contradict each other",
                        first.param, first.tokens
                    ),
                ));
            }
        }
    }
    Ok(found)
}

fn stops(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let Some(raw) = fields.take("stop") else { return Ok(Vec::new()) };
    let stops = match kind(raw) {
        Kind::String => vec![string(raw, "stop")?],
        _ => array(raw, "stop", STOPS_MAX, "a string or an array of strings")?,
    };
    for stop in &stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            return Err(ApiError::invalid(
                "stop",
                format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes"),
            ));
        }
    }
    let sum: usize = stops.iter().map(String::len).sum();
    if sum > STOPS_BYTES_MAX {
        return Err(ApiError::invalid(
            "stop",
            format!("the stop strings have {sum} bytes together, at most {STOPS_BYTES_MAX} are possible"),
        ));
    }
    Ok(stops)
}

fn logit_bias(fields: &mut Fields<'_>) -> Result<BTreeMap<u32, f32>, ApiError> {
    let what = "an object of token ids and numbers";
    let Some(entries) = fields.typed::<BTreeMap<String, &RawValue>>("logit_bias", what)? else {
        return Ok(BTreeMap::new());
    };
    if entries.len() > LOGIT_BIAS_MAX {
        return Err(ApiError::invalid(
            "logit_bias",
            format!("`logit_bias` has more than {LOGIT_BIAS_MAX} entries"),
        ));
    }
    let mut bias = BTreeMap::new();
    for (id, raw) in entries {
        let id: u32 = id
            .parse()
            .map_err(|_| ApiError::invalid("logit_bias", "a key of `logit_bias` is not a token id"))?;
        bias.insert(id, float(raw, "logit_bias", -100.0..=100.0)?);
    }
    Ok(bias)
}

fn stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let mut options = StreamOptions::default();
    if let Some(raw) = fields.take("stream_options") {
        if !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "`stream_options` is allowed only with `stream`: true",
            ));
        }
        let mut given = Fields::of_value(raw, "stream_options")?;
        options.include_usage = given.bool("include_usage")?.unwrap_or(false);
        given.only("continuous_usage_stats", |raw| raw.get() == "false", "")?;
        given.finish(&["include_obfuscation"])?;
    }
    Ok(stream.then_some(options))
}

fn keep_alive(fields: &mut Fields<'_>) -> Result<Option<KeepAlive>, ApiError> {
    fields.typed("keep_alive", "a duration such as \"10m\", a number of seconds, 0 or -1")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stop_strings_are_bounded_together() {
        let take = |given: serde_json::Value| {
            let body = json!({ "stop": given }).to_string();
            let mut fields = Fields::of_body(body.as_bytes()).map_err(|e| e.message)?;
            stops(&mut fields).map(|stops| stops.len()).map_err(|e| e.message)
        };
        assert_eq!(take(json!(vec!["a".repeat(1024); 4])), Ok(4));
        let words = take(json!(vec!["a".repeat(1000); 5])).unwrap_err();
        assert_eq!(words, "the stop strings have 5000 bytes together, at most 4096 are possible");
    }
}
