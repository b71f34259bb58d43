//! A text side without files, for tests and the overhead example.

use std::sync::Arc;

use serde_json::{Value, json};
use stoker_checkpoint::{chat_template::ChatTemplate, text::TextAssets, tokenizer::Tokenizer};

/// Byte-level: the id of a byte is its value.
pub(crate) fn text_assets() -> TextAssets {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut extra = 256;
    let vocabulary: serde_json::Map<String, Value> = (0..256)
        .map(|byte: u32| {
            let code = if printable(byte) {
                byte
            } else {
                extra += 1;
                extra - 1
            };
            (char::from_u32(code).unwrap().to_string(), byte.into())
        })
        .collect();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<|im_start|>"), special(257, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocabulary, "merges": [] },
    });
    let none = serde_json::Map::new();
    let tokenizer = Tokenizer::from_json(tokenizer.to_string().as_bytes(), &none, &none).unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if messages[0].content == 'refuse' %}{{ raise_exception('the template says no') }}{% endif %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    TextAssets {
        tokenizer: Arc::new(tokenizer),
        template: Some(Arc::new(ChatTemplate::new(template).unwrap())),
        template_problem: None,
        end_ids: vec![257],
    }
}
