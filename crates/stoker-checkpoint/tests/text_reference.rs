//! The text side against transformers' answers.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what these functions unwrap and print is a test's"
)]

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use stoker_checkpoint::{
    chat_template::{ChatInput, ChatTemplate},
    detokenize::Detokenizer,
    gguf,
    text::TextError,
    tokenizer::{self, Tokenizer},
};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(name)
}

/// The GGUF file that the references were made with, which `STOKER_TEST_GGUF` names (`scripts/test` downloads it).
/// `None` only where skipping was asked for.
fn smollm2() -> Option<gguf::Header> {
    if let Some(path) = std::env::var_os("STOKER_TEST_GGUF") {
        return Some(gguf::Header::open(path.as_ref()).unwrap());
    }
    assert!(
        std::env::var_os("STOKER_TEST_ALLOW_SKIP").is_some(),
        "STOKER_TEST_GGUF must name SmolLM2-135M-Instruct.Q4_1.gguf; STOKER_TEST_ALLOW_SKIP=1 goes on without"
    );
    println!("skipped: STOKER_TEST_GGUF is not set");
    None
}

fn tiny() -> Tokenizer {
    let dir = data("tiny-llama");
    let config: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(dir.join("tokenizer_config.json")).unwrap()).unwrap();
    Tokenizer::from_json(&std::fs::read(dir.join("tokenizer.json")).unwrap(), &config, &Map::new()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
    let mut out = String::new();
    for &id in ids {
        detokenizer.push(id, &mut out);
    }
    detokenizer.finish(&mut out);
    out
}

fn render(source: &str, tokenizer: &Tokenizer, question: &str) -> String {
    let template = ChatTemplate::new(source).unwrap();
    let input = ChatInput {
        messages: &[json!({"role": "user", "content": question})],
        add_generation_prompt: true,
        kwargs: &Map::new(),
        special_tokens: tokenizer.special_tokens(),
        now: Duration::ZERO,
        output_bytes_max: 1 << 20,
        fuel_max: None,
    };
    template.render(&input).unwrap()
}

#[test]
fn smollm2_prompts_and_answers_equal_the_reference() {
    let Some(header) = smollm2() else { return };
    let from_gguf = tokenizer::from_gguf(&header).unwrap();
    let template = header.str("tokenizer.chat_template").unwrap();
    let config = from_gguf.to_tokenizer_config(Some(template), 8192);
    let json = from_gguf.to_tokenizer_json().unwrap();
    let exported = Tokenizer::from_json(json.as_bytes(), config.as_object().unwrap(), &Map::new()).unwrap();
    let reference: Value =
        serde_json::from_slice(&std::fs::read(data("smollm2_reference_greedy.json")).unwrap()).unwrap();
    let cases = reference["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 64);
    for tokenizer in [from_gguf, exported] {
        assert_eq!(tokenizer.vocab_size(), 49_152);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
        for case in cases {
            let rendered = render(template, &tokenizer, case["question"].as_str().unwrap());
            assert_eq!(tokenizer.encode_chat(&rendered).unwrap(), ids(&case["prompt_ids"]), "{case}");
            let output = ids(&case["output_ids"]);
            let text = case["output_text"].as_str().unwrap();
            assert_eq!(tokenizer.decode(&output, true), text);
            assert_eq!(stream(&tokenizer, &output, true), text);
        }
    }
}

#[test]
fn long_and_monotonous_texts_are_tokenised_whole() {
    let Some(header) = smollm2() else { return };
    let tokenizer = tokenizer::from_gguf(&header).unwrap();
    for unit in [" ", "a", "\n", "7", "word ", "é😀 "] {
        let text = unit.repeat((1 << 19) / unit.len());
        let ids = tokenizer.encode(&text, false).unwrap();
        assert!(ids.len() >= tokenizer.tokens_min(text.len()), "{unit:?}");
        assert!(tokenizer.decode(&ids, false) == text, "{unit:?}");
    }
}

/// A `tokenizer.json` changed by `change`, read by us and by the library.
fn both(json: &str, change: impl FnOnce(&mut Value)) -> (Tokenizer, tokenizers::Tokenizer) {
    let mut json: Value = serde_json::from_str(json).unwrap();
    change(&mut json);
    let json = json.to_string();
    let ours = Tokenizer::from_json(json.as_bytes(), &Map::new(), &Map::new()).unwrap();
    assert!(format!("{ours:?}").contains("byte-level"), "{ours:?}");
    (ours, tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap())
}

/// Byte-level tokenizers of every kind that is done without the library.
fn byte_level_kinds(json: &str) -> Vec<(Tokenizer, tokenizers::Tokenizer)> {
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    vec![
        both(json, |_| {}),
        both(json, |json| json["pre_tokenizer"] = byte_level(true)),
        both(json, |json| {
            // Whole words of the vocabulary, other than those that merging makes.
            json["model"]["ignore_merges"] = true.into();
            json["pre_tokenizer"] =
                json!({"type": "Sequence", "pretokenizers": [split(LLAMA3), byte_level(false)]});
        }),
        both(json, |json| {
            json["normalizer"] = json!({"type": "NFC"});
            let steps = [split(r"[\p{P}\$\+<=>\^~\|]+"), split(r"\p{N}+"), byte_level(true)];
            json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
            let added = json["added_tokens"].as_array_mut().unwrap();
            for (content, normalized) in [("<a>", true), ("<a><b>", true), ("b>", false), ("é", false)] {
                added.push(json!({
                    "id": 1 << 20, "content": content, "normalized": normalized, "special": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }));
            }
            let digits = json!({"type": "Digits", "individual_digits": true});
            json["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap().insert(0, digits);
        }),
    ]
}

fn same_ids((ours, library): &(Tokenizer, tokenizers::Tokenizer), text: &str) {
    let expected = library.encode_fast(text, false).unwrap();
    assert_eq!(ours.encode(text, false).unwrap(), expected.get_ids(), "{text:?} {ours:?}");
}

#[test]
fn smollm2_ids_equal_the_librarys() {
    let Some(header) = smollm2() else { return };
    let json = tokenizer::from_gguf(&header).unwrap().to_tokenizer_json().unwrap();
    let kinds = byte_level_kinds(&json);
    let source = include_str!("text_reference.rs");
    let long_word = "incomprehensibilities".repeat(40);
    for kind in &kinds {
        for text in
            [source, &*long_word, "", " ", "naïve café 😀 漢字 e\u{301}", "<|im_start|>user\nhi<|im_end|>"]
        {
            same_ids(kind, text);
        }
    }
}

#[test]
fn text_survives_ids_and_back() {
    let tokenizer = tiny();
    for text in
        ["", "Hello, world!", "  two  spaces\n\n", "naïve café 😀 漢字", "<|im_start|>user\nhi<|im_end|>"]
    {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
        assert_eq!(stream(&tokenizer, &ids, false), text);
    }
    assert_eq!(tokenizer.decode(&tokenizer.encode("<|im_start|>user", false).unwrap(), true), "user");
}

#[test]
fn ids_outside_of_the_vocabulary_give_nothing() {
    let tokenizer = tiny();
    assert_eq!(tokenizer.decode(&[u32::MAX, tokenizer.vocab_size()], false), "");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
}

proptest! {
    #[test]
    fn byte_level_ids_equal_the_librarys(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "a", "b", "e", "the", " the", "ing", "hello", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "7", "2024",
                "é", "e\u{301}", "漢字", "😀", "\u{a0}", ".", "...", "<", "<a>", "<b>", "<|im_start|>", "<|im_end|>", "|>",
                "\0", "_", "ſ", "½", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            ]),
            0..24,
        ),
    ) {
        static KINDS: std::sync::OnceLock<Vec<(Tokenizer, tokenizers::Tokenizer)>> = std::sync::OnceLock::new();
        let kinds = KINDS.get_or_init(|| {
            byte_level_kinds(&std::fs::read_to_string(data("tiny-llama/tokenizer.json")).unwrap())
        });
        for kind in kinds {
            same_ids(kind, &parts.concat());
        }
    }

    #[test]
    fn a_stream_of_any_ids_equals_decoding_them_at_once(
        ids in prop::collection::vec(0_u32..600, 0..60), skip in any::<bool>(),
    ) {
        let tokenizer = tiny();
        prop_assert_eq!(stream(&tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
    }
}

// === SentencePiece vocabularies in GGUF metadata ===

fn header(entries: Vec<(&str, gguf::Value)>) -> gguf::Header {
    let metadata: BTreeMap<_, _> = entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    gguf::Header { version: 3, metadata, tensors: vec![], alignment: 32, data_offset: 0 }
}

fn strings(texts: &[String]) -> gguf::Value {
    gguf::Value::Array(gguf::Array::String(texts.iter().map(String::as_str).collect()))
}

/// `<unk> <s> </s>`, the 256 bytes, then pieces with falling scores.
fn sentence_piece(extra: &[(&'static str, gguf::Value)]) -> gguf::Header {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut kinds = vec![2, 3, 3];
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    kinds.extend([6; 256]);
    let pieces = ["▁t", "he", "▁the", "in", "▁in", "▁", "t", "h", "e", "i", "n", "a"];
    tokens.extend(pieces.map(String::from));
    kinds.extend([1; 12]);
    let scores = (0..tokens.len()).map(|i| if i < 259 { 0.0 } else { -((i - 259) as f32) }).collect();
    let mut entries = vec![
        ("tokenizer.ggml.model", gguf::Value::String("llama".into())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.token_type", gguf::Value::Array(gguf::Array::I32(kinds))),
        ("tokenizer.ggml.scores", gguf::Value::Array(gguf::Array::F32(scores))),
    ];
    entries.extend(extra.iter().cloned());
    header(entries)
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = tokenizer::from_gguf(&sentence_piece(&[])).unwrap();
    let names = |ids: &[u32]| ids.iter().map(|&id| tokenizer.token_bytes(id).to_vec()).collect::<Vec<_>>();
    let ids = tokenizer.encode("the in", true).unwrap();
    assert_eq!(names(&ids), [&b"<s>"[..], b" the", b" in"]);
    assert_eq!(tokenizer.decode(&ids, true), "the in");
    let ids = tokenizer.encode("é the", false).unwrap();
    assert_eq!(names(&ids), [&b" "[..], b"\xc3", b"\xa9", b" the"]);
    assert_eq!(tokenizer.decode(&ids, true), "é the");
    assert_eq!(stream(&tokenizer, &ids, true), "é the");
}

#[test]
fn a_completion_keeps_the_space_that_an_answer_drops() {
    let tokenizer = tokenizer::from_gguf(&sentence_piece(&[])).unwrap();
    let id = tokenizer.token_id("▁the").unwrap();
    let (mut answer, mut completion) = (String::new(), String::new());
    Detokenizer::new(&tokenizer, true).push(id, &mut answer);
    Detokenizer::continuing(&tokenizer, true).push(id, &mut completion);
    assert_eq!((answer.as_str(), completion.as_str()), ("the", " the"));
}

#[test]
fn the_beginning_of_text_token_is_there_exactly_once() {
    let tokenizer = tokenizer::from_gguf(&sentence_piece(&[])).unwrap();
    for text in ["the", "<s>the"] {
        for ids in [tokenizer.encode(text, true).unwrap(), tokenizer.encode_chat(text).unwrap()] {
            assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1, "{text}");
            assert_eq!(ids[0], 1);
        }
    }
    let never = sentence_piece(&[("tokenizer.ggml.add_bos_token", gguf::Value::Bool(false))]);
    assert!(!tokenizer::from_gguf(&never).unwrap().encode("the", true).unwrap().contains(&1));
    let both = sentence_piece(&[("tokenizer.ggml.add_eos_token", gguf::Value::Bool(true))]);
    let both = tokenizer::from_gguf(&both).unwrap();
    assert_eq!(both.encode("the", true).unwrap().last(), Some(&2));
    assert_ne!(both.encode_chat("the").unwrap().last(), Some(&2));
}

#[test]
fn exports_read_back_the_same() {
    let tokenizer = tokenizer::from_gguf(&sentence_piece(&[])).unwrap();
    let json = tokenizer.to_tokenizer_json().unwrap();
    let config = tokenizer.to_tokenizer_config(None, 512);
    let back = Tokenizer::from_json(json.as_bytes(), config.as_object().unwrap(), &Map::new()).unwrap();
    assert_eq!(back.pieces(), tokenizer.pieces());
    for text in ["the in the", "é", "<s>a</s>"] {
        assert_eq!(back.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    }
}

#[test]
fn what_is_wrong_with_metadata_is_named() {
    let text = |s: &str| gguf::Value::String(s.into());
    let tokens = |texts: &[&str]| strings(&texts.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
    let error = |entries| tokenizer::from_gguf(&header(entries)).unwrap_err();
    assert!(matches!(error(vec![]), TextError::BadMetadata { key: "tokenizer.ggml.model", .. }));
    let model = |kind: &str| ("tokenizer.ggml.model", text(kind));
    assert!(matches!(
        error(vec![model("gpt2")]),
        TextError::BadMetadata { key: "tokenizer.ggml.tokens", .. }
    ));
    let vocabulary = || ("tokenizer.ggml.tokens", tokens(&["a", "b", "ab"]));
    assert!(matches!(error(vec![model("rwkv"), vocabulary()]), TextError::UnsupportedModel { .. }));
    let unknown = error(vec![model("gpt2"), vocabulary(), ("tokenizer.ggml.pre", text("new"))]);
    assert!(matches!(&unknown, TextError::UnknownPreTokenizer { pre } if pre == "new"), "{unknown}");
    let twice = error(vec![model("gpt2"), ("tokenizer.ggml.tokens", tokens(&["a", "b", "a"]))]);
    assert!(matches!(twice, TextError::DuplicateToken { first: 0, second: 2, .. }));
    let merges = |line: &str| ("tokenizer.ggml.merges", tokens(&[line]));
    let bad = error(vec![model("gpt2"), vocabulary(), merges("ab")]);
    assert!(matches!(bad, TextError::BadMetadata { key: "tokenizer.ggml.merges", .. }));
    assert!(matches!(
        error(vec![model("gpt2"), vocabulary(), merges("a c")]),
        TextError::BadTokenizer { .. }
    ));
    let kinds = ("tokenizer.ggml.token_type", gguf::Value::Array(gguf::Array::I32(vec![1])));
    let bad = error(vec![model("gpt2"), vocabulary(), merges("a b"), kinds]);
    assert!(matches!(bad, TextError::BadMetadata { key: "tokenizer.ggml.token_type", .. }));
    assert!(matches!(
        error(vec![model("llama"), vocabulary()]),
        TextError::BadMetadata { key: "tokenizer.ggml.scores", .. }
    ));
}

#[test]
fn every_known_pre_tokenizer_builds() {
    for &pre in tokenizer::PRE_TOKENIZERS {
        let header = header(vec![
            ("tokenizer.ggml.model", gguf::Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", gguf::Value::String(pre.into())),
            ("tokenizer.ggml.tokens", strings(&["a", "b", "ab"].map(String::from))),
            ("tokenizer.ggml.merges", strings(&["a b".to_owned()])),
        ]);
        let tokenizer = tokenizer::from_gguf(&header).unwrap_or_else(|e| panic!("{pre}: {e}"));
        assert_eq!(tokenizer.encode("abab", false).unwrap(), [2, 2], "{pre}");
    }
}
