//! Answers in OpenAI's shapes.

use bytes::{BufMut, BytesMut};
use serde_json::{Map, Value, json};
use stoker_checkpoint::tokenizer::Tokenizer;
use stoker_types::{FinishReason, RequestId};

use crate::{
    backend::TokenLogprobs,
    generation::{Delta, Usage},
    request::Api,
};

/// Writes the events of a stream. Everything but the text of a token is prepared once.
///
/// An event is `id: <request>:<position>` and `data: {...}`. With several sequences the positions of all are listed,
/// separated by commas: the answer up to an event is what these many tokens of each sequence say.
#[derive(Debug)]
pub(crate) struct EventWriter {
    api: Api,
    id_line: String,
    /// `\ndata: {"id":...,"choices":[{"index":`
    head: String,
    /// `}]}\n\n`, with `"usage":null` where usage is to follow.
    tail: &'static str,
    positions: Vec<u32>,
    text_offsets: Vec<usize>,
    buffer: BytesMut,
}

/// The parts of a finished choice of an answer that isn't streamed.
#[derive(Debug, Default)]
pub(crate) struct WholeChoice {
    pub(crate) text: String,
    pub(crate) logprobs: Vec<(u32, TokenLogprobs)>,
    pub(crate) finish: Option<FinishReason>,
}

/// What all objects of an answer say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerHead<'a> {
    pub(crate) api: Api,
    pub(crate) id: &'a RequestId,
    /// Seconds since the epoch.
    pub(crate) created: u64,
    pub(crate) model: &'a str,
}

// === impl EventWriter ===

impl EventWriter {
    pub(crate) fn new(head: AnswerHead<'_>, sequences: u16, include_usage: bool) -> Self {
        let object = match head.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion => "text_completion",
        };
        let (id, model) = (json!(head.id.0), json!(head.model));
        Self {
            api: head.api,
            id_line: format!("id: {}:", head.id),
            head: format!(
                r#"data: {{"id":{id},"object":"{object}","created":{},"model":{model},"choices":["#,
                head.created
            ),
            tail: if include_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" },
            positions: vec![0; usize::from(sequences)],
            text_offsets: vec![0; usize::from(sequences)],
            buffer: BytesMut::with_capacity(4096),
        }
    }

    /// What has been written since the last call.
    pub(crate) fn take(&mut self) -> bytes::Bytes {
        let bytes = self.buffer.split().freeze();
        // Reclaims the block once the connection has sent what is in it.
        self.buffer.reserve(1024);
        bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// The first event of each sequence of a chat: who speaks.
    pub(crate) fn begin(&mut self) {
        if self.api == Api::Chat {
            for sequence in 0..self.positions.len() {
                self.open(sequence);
                self.buffer.put_slice(
                    br#","delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
                );
                self.buffer.put_slice(self.tail.as_bytes());
            }
        }
    }

    /// A piece of a sequence, and its end.
    pub(crate) fn delta(&mut self, delta: &Delta, tokenizer: &Tokenizer) {
        let sequence = usize::from(delta.sequence);
        self.positions[sequence] = delta.position;
        if !delta.text.is_empty() || !delta.logprobs.is_empty() {
            self.open(sequence);
            self.buffer.put_slice(match self.api {
                Api::Chat => br#","delta":{"content":"#,
                Api::Completion => br#","text":"#,
            });
            self.json(&delta.text);
            self.buffer.put_slice(match self.api {
                Api::Chat => br#"},"logprobs":"#,
                Api::Completion => br#","logprobs":"#,
            });
            if delta.logprobs.is_empty() {
                self.buffer.put_slice(b"null");
            } else {
                let value = match self.api {
                    Api::Chat => chat_logprobs(&delta.logprobs, tokenizer),
                    Api::Completion => {
                        completion_logprobs(&delta.logprobs, tokenizer, &mut self.text_offsets[sequence])
                    }
                };
                self.json(&value);
            }
            self.buffer.put_slice(br#","finish_reason":null}"#);
            self.buffer.put_slice(self.tail.as_bytes());
        }
        if let Some(finish) = delta.finish {
            self.open(sequence);
            self.buffer.put_slice(match self.api {
                Api::Chat => br#","delta":{},"logprobs":null,"finish_reason":""#,
                Api::Completion => br#","text":"","logprobs":null,"finish_reason":""#,
            });
            self.buffer.put_slice(finish_name(finish).as_bytes());
            self.buffer.put_slice(b"\"}");
            self.buffer.put_slice(self.tail.as_bytes());
        }
    }

    /// The event without choices that carries the usage.
    pub(crate) fn usage(&mut self, usage: Usage) {
        self.id();
        self.buffer.put_slice(self.head.as_bytes());
        self.buffer.put_slice(b"],\"usage\":");
        self.json(&usage_json(usage));
        self.buffer.put_slice(b"}\n\n");
    }

    /// A comment. One line end only: official clients take a blank line after a comment for an event.
    pub(crate) fn comment(&mut self, text: &str) {
        self.buffer.put_slice(b": ");
        self.buffer.put_slice(text.as_bytes());
        self.buffer.put_slice(b"\n");
    }

    /// The event that ends a stream badly. `body` is the JSON of an error.
    pub(crate) fn error(&mut self, body: &str) {
        self.id();
        self.buffer.put_slice(b"data: ");
        self.buffer.put_slice(body.as_bytes());
        self.buffer.put_slice(b"\n\n");
    }

    /// The end.
    pub(crate) fn done(&mut self) {
        self.buffer.put_slice(b"data: [DONE]\n\n");
    }

    fn id(&mut self) {
        self.buffer.put_slice(self.id_line.as_bytes());
        for (at, position) in self.positions.iter().enumerate() {
            if at > 0 {
                self.buffer.put_u8(b',');
            }
            put_decimal(&mut self.buffer, *position);
        }
        self.buffer.put_u8(b'\n');
    }

    /// Up to the choice's index.
    fn open(&mut self, sequence: usize) {
        self.id();
        self.buffer.put_slice(self.head.as_bytes());
        self.buffer.put_slice(br#"{"index":"#);
        put_decimal(&mut self.buffer, u32::try_from(sequence).unwrap_or(u32::MAX));
    }

    fn json<T: serde::Serialize + ?Sized>(&mut self, value: &T) {
        // Writing strings and trees to memory can't fail.
        let _ = serde_json::to_writer((&mut self.buffer).writer(), value);
    }
}

/// The body of an answer that isn't streamed.
pub(crate) fn whole_answer(
    head: AnswerHead<'_>,
    choices: Vec<WholeChoice>,
    usage: Usage,
    tokenizer: &Tokenizer,
) -> String {
    let choices: Vec<Value> = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| {
            let finish = choice.finish.map(finish_name);
            match head.api {
                Api::Chat => {
                    let logprobs = (!choice.logprobs.is_empty()).then(|| chat_logprobs(&choice.logprobs, tokenizer));
                    json!({
                        "index": index,
                        "message": { "role": "assistant", "content": choice.text, "refusal": null },
                        "logprobs": logprobs,
                        "finish_reason": finish,
                    })
                }
                Api::Completion => {
                    let logprobs = (!choice.logprobs.is_empty())
                        .then(|| completion_logprobs(&choice.logprobs, tokenizer, &mut 0));
                    json!({ "index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": finish })
                }
            }
        })
        .collect();
    let object = match head.api {
        Api::Chat => "chat.completion",
        Api::Completion => "text_completion",
    };
    json!({
        "id": head.id.0,
        "object": object,
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage_json(usage),
    })
    .to_string()
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.output_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

fn finish_name(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

/// The newer shape: tokens as text and as bytes.
fn chat_logprobs(tokens: &[(u32, TokenLogprobs)], tokenizer: &Tokenizer) -> Value {
    let entry = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": finite(logprob), "bytes": bytes })
    };
    let content: Vec<Value> = tokens
        .iter()
        .map(|(id, logprobs)| {
            let mut value = entry(*id, logprobs.chosen);
            value["top_logprobs"] = logprobs.top.iter().map(|t| entry(t.token, t.logprob)).collect();
            value
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

/// The older shape: parallel arrays. `offset` counts the characters before.
fn completion_logprobs(tokens: &[(u32, TokenLogprobs)], tokenizer: &Tokenizer, offset: &mut usize) -> Value {
    // A token that is a part of a character has no text of its own: its bytes, as in the original API.
    let name = |id: u32| match std::str::from_utf8(tokenizer.token_bytes(id)) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = tokenizer.token_bytes(id).iter().map(|b| format!("\\x{b:02x}")).collect();
            format!("bytes:{hex}")
        }
    };
    let mut names = Vec::with_capacity(tokens.len());
    let mut values = Vec::with_capacity(tokens.len());
    let mut tops = Vec::with_capacity(tokens.len());
    let mut offsets = Vec::with_capacity(tokens.len());
    for (id, logprobs) in tokens {
        names.push(name(*id));
        values.push(finite(logprobs.chosen));
        let top: Map<String, Value> =
            logprobs.top.iter().map(|t| (name(t.token), finite(t.logprob).into())).collect();
        tops.push(top);
        offsets.push(*offset);
        // Each character is counted with the token that begins it.
        *offset += tokenizer.token_bytes(*id).iter().filter(|b| (**b & 0xc0) != 0x80).count();
    }
    json!({ "tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets })
}

/// JSON has no infinities; this is what other servers say for "never".
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

fn put_decimal(buffer: &mut BytesMut, mut n: u32) {
    let mut digits = [0_u8; 10];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(n % 10).unwrap_or(0);
        n /= 10;
        if n == 0 {
            break;
        }
    }
    buffer.put_slice(&digits[at..]);
}
