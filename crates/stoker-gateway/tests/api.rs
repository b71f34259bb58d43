//! The API end to end: real HTTP, the real worker protocol over a real socket, a scripted worker.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{sync::Arc, time::Duration};

use common::{Answer, CONTEXT, END_OF_TURN, Fixture, Grant, Step, answer, chat};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use serde_json::{Value, json};
use stoker_gateway::{ApiKey, GatewayConfig};
use stoker_proto::stream::{FailureCode, Finish, Generate};
use stoker_types::{ByteSize, ModelName, Phase, Refusal, StartFailure, clock};
use tokio::sync::Notify;

fn stop() -> Vec<Step> {
    vec![Step::Token(END_OF_TURN), Step::End(Finish::Stop)]
}

fn says(text: &'static str) -> impl Fn(&Generate) -> Vec<Step> + Send + Sync {
    move |_| [vec![Step::Text(text)], stop()].concat()
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[tokio::test]
async fn a_chat_is_answered() {
    let f = Fixture::new(says("hello")).await;
    let answer =
        f.ask("/v1/chat/completions", chat(json!({ "seed": 7, "max_tokens": 20, "keep_alive": "5m" }))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "team/tiny");
    assert_eq!(
        body["choices"][0]["message"],
        json!({ "role": "assistant", "content": "hello", "refusal": null })
    );
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["completion_tokens"], 6);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    assert_eq!(answer.header("x-stoker-seed"), "7");
    assert_eq!(answer.header("x-request-id"), body["id"]);
    let timeline: Value = serde_json::from_str(answer.header("x-stoker-timeline")).unwrap();
    assert_eq!(timeline["phases"]["prefill"]["ms"], 0.7);
    assert!(!answer.header("x-stoker-queued-ms").is_empty());

    let order = f.worker.orders.lock()[0].clone();
    let prompt = [vec![256], ids("user\nhi"), vec![257], ids("\n"), vec![256], ids("assistant\n")].concat();
    assert_eq!(order.prompt, prompt);
    assert_eq!(order.tokens_max, 20);
    assert_eq!(order.stop_ids, [END_OF_TURN]);
    let sampling = order.sampling.unwrap();
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.seed),
        (0.25, 1.0, 7),
        "the model's own default"
    );
    assert!(f.placement.admits.lock()[0].keep_alive.is_some());
    f.placement.all_returned().await;
}

#[tokio::test]
async fn max_tokens_absent_is_the_rest_of_the_context() {
    let f = Fixture::new(|_| vec![Step::Fill, Step::End(Finish::Length)]).await;
    let answer = f.ask("/v1/completions", json!({ "model": "team/tiny", "prompt": "abc" })).await;
    assert_eq!(f.worker.orders.lock()[0].tokens_max, CONTEXT - 3);
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "length");
    // An instance may have less than the model.
    f.placement.context.store(64, std::sync::atomic::Ordering::SeqCst);
    f.ask("/v1/completions", json!({ "model": "team/tiny", "prompt": "abc" })).await;
    assert_eq!(f.worker.orders.lock()[1].tokens_max, 61);
    let refused =
        f.ask("/v1/completions", json!({ "model": "team/tiny", "prompt": "abc", "max_tokens": 100 })).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["message"], "prompt 3 + max_tokens 100 > context 64");
    f.placement.all_returned().await;
}

#[tokio::test]
async fn every_kind_of_prompt_is_taken() {
    let f = Fixture::new(|order| [vec![Step::Token(order.prompt[0])], stop()].concat()).await;
    for (prompt, texts) in [
        (json!("abc"), vec!["a"]),
        (json!(["abc", "xyz"]), vec!["a", "x"]),
        (json!([98, 99]), vec!["b"]),
        (json!([[98], [99, 100]]), vec!["b", "c"]),
    ] {
        let answer = f.ask("/v1/completions", json!({ "model": "team/tiny", "prompt": prompt })).await;
        let body = answer.json();
        let got: Vec<&str> =
            body["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(got, texts, "{}", answer.body);
    }
}

#[tokio::test]
async fn a_stream_is_byte_exact() {
    let f = Fixture::new(says("h\"i")).await;
    let request = chat(json!({ "stream": true, "stream_options": { "include_usage": true }, "seed": 1 }));
    let answer = f.ask("/v1/chat/completions", request).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let id = answer.header("x-request-id");
    let created = answer.events()[0]["created"].as_u64().unwrap();
    let event = |position: u32, choices: &str, usage: &str| {
        format!(
            "id: {id}:{position}\ndata: {{\"id\":\"{id}\",\"object\":\"chat.completion.chunk\",\"created\":{created},\
             \"model\":\"team/tiny\",\"choices\":[{choices}],\"usage\":{usage}}}\n\n"
        )
    };
    let choice = |delta: &str, finish: &str| {
        format!(r#"{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}"#)
    };
    let expected = [
        event(0, &choice(r#"{"role":"assistant","content":""}"#, "null"), "null"),
        event(1, &choice(r#"{"content":"h"}"#, "null"), "null"),
        event(2, &choice(r#"{"content":"\""}"#, "null"), "null"),
        event(3, &choice(r#"{"content":"i"}"#, "null"), "null"),
        event(4, &choice("{}", "\"stop\""), "null"),
        event(
            4,
            "",
            r#"{"prompt_tokens":21,"completion_tokens":4,"total_tokens":25,"prompt_tokens_details":{"cached_tokens":2}}"#,
        ),
        "data: [DONE]\n\n".into(),
    ]
    .concat();
    assert_eq!(answer.body, expected);
}

#[tokio::test]
async fn a_streamed_completion_has_its_own_shape() {
    let f = Fixture::new(says("ok")).await;
    let request = json!({ "model": "team/tiny", "prompt": "abc", "stream": true, "max_tokens": 9 });
    let request =
        f.post("/v1/completions").header("x-stoker-timeline", "1").body(Full::from(request.to_string()));
    let answer = answer(f.send(request.unwrap()).await.unwrap()).await;
    let events = answer.events();
    assert_eq!(events[0]["object"], "text_completion");
    assert_eq!(answer.streamed_text(0), "ok");
    assert_eq!(answer.finish(0).as_deref(), Some("stop"));
    assert!(events.iter().all(|e| e.get("usage").is_none()));
    let lines: Vec<&str> = answer.body.lines().collect();
    let [.., timeline, "data: [DONE]", ""] = lines[..] else { panic!("{}", answer.body) };
    let timeline: Value =
        serde_json::from_str(timeline.strip_prefix(": x-stoker-timeline ").unwrap()).unwrap();
    assert_eq!(timeline["cold"], false);
}

#[tokio::test]
async fn a_request_ends_as_a_trace_without_a_word_of_it() {
    let mut f = Fixture::new(says("secret-answer")).await;
    f.placement.script.lock().push_back(Grant::After(Duration::from_millis(30)));
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request =
        json!({ "model": "team/tiny", "prompt": "secret-prompt", "stream": true, "max_tokens": 30 });
    let request =
        f.post("/v1/completions").header("traceparent", parent).body(Full::from(request.to_string()));
    let before = clock::wall();
    let answer = answer(f.send(request.unwrap()).await.unwrap()).await;
    assert_eq!(answer.streamed_text(0), "secret-answer");
    let trace = tokio::time::timeout(Duration::from_secs(20), f.traces.recv()).await.unwrap().unwrap();
    assert!(!format!("{trace:?}").contains("secret"), "{trace:?}");
    assert_eq!(answer.header("x-request-id"), &*trace.request.0);
    assert_eq!((trace.route, trace.model.as_str(), trace.stream), ("completions", "team/tiny", true));
    assert_eq!((trace.status, trace.outcome, trace.cold), (200, "ok", false));
    assert_eq!((trace.prompt_tokens, trace.output_tokens), (13, 14));
    assert_eq!(trace.parent.as_ref().unwrap().traceparent, parent);
    // One after the other, within the request.
    let of = |phase| trace.phases.iter().find(|p| p.phase == phase).unwrap().period.unwrap();
    let (prepare, decode) = (trace.prepare.unwrap(), trace.decode.unwrap());
    let (queued, prefill) = (of(Phase::Queued), of(Phase::Prefill));
    assert_eq!((queued.length(), prefill.length()), (Duration::from_millis(30), Duration::from_micros(700)));
    assert!(before <= trace.period.began && trace.period.ended <= clock::wall());
    assert!(trace.period.began <= prepare.began && prepare.ended <= of(Phase::FirstToken).began);
    assert!(prefill.ended <= of(Phase::FirstToken).ended);
    let slack = Duration::from_millis(1);
    assert!(queued.ended <= decode.began + slack && decode.ended <= trace.period.ended + slack, "{trace:?}");

    // A refusal too; what names no model isn't worth one.
    f.get("/v1/models").await;
    f.placement.script.lock().push_back(Grant::Refuse(Refusal::ShuttingDown));
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({}))).await.status, 503);
    let trace = tokio::time::timeout(Duration::from_secs(20), f.traces.recv()).await.unwrap().unwrap();
    assert_eq!((trace.status, trace.outcome, trace.first_token), (503, "shutting_down", None));
    assert_eq!(trace.parent, None);
}

#[tokio::test]
async fn characters_across_tokens_are_whole() {
    let f = Fixture::new(says("né 🦀!")).await;
    let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": true }))).await;
    assert_eq!(answer.streamed_text(0), "né 🦀!");
    let pieces: Vec<String> = answer
        .events()
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(pieces, ["", "n", "é", " ", "🦀", "!"]);
    // A character that never becomes whole is said to be none.
    let f = Fixture::new(|_| vec![Step::Token(0xf0), Step::Token(0x9f), Step::End(Finish::Length)]).await;
    let answer = f.ask("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "\u{fffd}");
}

#[tokio::test]
async fn stop_strings_end_each_choice_by_itself() {
    // Choice 0 stops within a token sequence, choice 1 never does.
    let f = Fixture::new(|order| {
        if order.sampling.as_ref().unwrap().seed == 10 {
            vec![Step::Text("one STxx STOP two"), Step::Gate(Arc::new(Notify::new()))]
        } else {
            [vec![Step::Text("three ST")], stop()].concat()
        }
    })
    .await;
    for stream in [true, false] {
        let request = chat(json!({ "n": 2, "stop": ["STOP", "never"], "seed": 10, "stream": stream }));
        let answer = f.ask("/v1/chat/completions", request).await;
        let (texts, finishes) = if stream {
            ([answer.streamed_text(0), answer.streamed_text(1)], [answer.finish(0), answer.finish(1)])
        } else {
            let body = answer.json();
            let text = |i: usize| body["choices"][i]["message"]["content"].as_str().unwrap().to_owned();
            let finish = |i: usize| body["choices"][i]["finish_reason"].as_str().map(str::to_owned);
            ([text(0), text(1)], [finish(0), finish(1)])
        };
        assert_eq!(texts, ["one STxx ", "three ST"]);
        assert_eq!(finishes, [Some("stop".into()), Some("stop".into())]);
        f.worker.aborted.notified().await;
        f.placement.all_returned().await;
    }
    let seeds: Vec<u64> = f.worker.orders.lock().iter().map(|o| o.sampling.as_ref().unwrap().seed).collect();
    assert_eq!(seeds, [10, 11, 10, 11]);
    assert_eq!(f.placement.admits.lock()[0].sequences, 2);
}

#[tokio::test]
async fn log_probabilities_have_both_shapes() {
    let f = Fixture::new(|_| {
        let top = vec![(104, -0.5), (0xc3, f32::NEG_INFINITY)];
        [
            vec![
                Step::Logprob(104, -0.5, top.clone()),
                Step::Logprob(0xc3, -1.0, top),
                Step::Logprob(0xa9, -2.0, vec![]),
            ],
            stop(),
        ]
        .concat()
    })
    .await;
    let answer = f.ask("/v1/chat/completions", chat(json!({ "logprobs": true, "top_logprobs": 2 }))).await;
    let body = answer.json();
    let content = &body["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 3);
    assert_eq!(content[0]["token"], "h");
    assert_eq!(content[0]["top_logprobs"][0], json!({ "token": "h", "logprob": -0.5, "bytes": [104] }));
    assert_eq!(content[1]["bytes"], json!([0xc3]));
    assert_eq!(content[1]["top_logprobs"][1]["logprob"], -9999.0);
    assert_eq!(f.worker.orders.lock()[0].sampling.as_ref().unwrap().logprobs, Some(2));

    for stream in [false, true] {
        let request = json!({ "model": "team/tiny", "prompt": "a", "logprobs": 2, "stream": stream });
        let answer = f.ask("/v1/completions", request).await;
        let logprobs: Vec<Value> = if stream {
            let events = answer.events();
            events.iter().map(|e| e["choices"][0]["logprobs"].clone()).filter(|l| !l.is_null()).collect()
        } else {
            vec![answer.json()["choices"][0]["logprobs"].clone()]
        };
        let all = |key: &str| -> Vec<Value> {
            logprobs.iter().flat_map(|l| l[key].as_array().unwrap().clone()).collect()
        };
        assert_eq!(all("tokens"), ["h", "bytes:\\xc3", "bytes:\\xa9"]);
        assert_eq!(all("token_logprobs"), [-0.5, -1.0, -2.0]);
        assert_eq!(all("text_offset"), [0, 1, 2]);
        assert_eq!(all("top_logprobs")[0], json!({ "h": -0.5, "bytes:\\xc3": -9999.0 }));
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let f = Fixture::new(says("never")).await;
    let long = "x".repeat(600);
    let chats = [
        (json!({ "model": null }), "model"),
        (json!({ "model": 5 }), "model"),
        (json!({ "messages": null }), "messages"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": "hi" }), "messages"),
        (json!({ "messages": ["hi"] }), "messages[0]"),
        (json!({ "messages": [{ "content": "hi" }] }), "messages[0].role"),
        (json!({ "messages": [{ "role": "king", "content": "hi" }] }), "messages[0].role"),
        (json!({ "messages": [{ "role": "user" }] }), "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": 5 }] }), "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": "a", "mood": "b" }] }), "messages[0].mood"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "data:" } }] }] }),
            "messages[0].content[0].type",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "input_audio" }] }] }),
            "messages[0].content[0].type",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text" }] }] }),
            "messages[0].content[0].text",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "tool", "content": "b", "tool_call_id": "c" }] }),
            "messages[1].role",
        ),
        (
            json!({ "messages": [{ "role": "assistant", "content": null, "tool_calls": [{ "id": "c" }] }] }),
            "messages[0].tool_calls",
        ),
        (json!({ "messages": [{ "role": "user", "content": "refuse" }] }), "messages"),
        (json!({ "messages": [{ "role": "user", "content": long }] }), "messages"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "max_tokens": 1.5 }), "max_tokens"),
        (json!({ "max_tokens": 512 }), "max_tokens"),
        (json!({ "max_completion_tokens": 512 }), "max_completion_tokens"),
        (json!({ "max_completion_tokens": 5, "max_tokens": 6 }), "max_tokens"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 17 }), "n"),
        (json!({ "temperature": 2.1 }), "temperature"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "top_p": 0 }), "top_p"),
        (json!({ "top_p": 1.01 }), "top_p"),
        (json!({ "top_k": -2 }), "top_k"),
        (json!({ "min_p": -0.1 }), "min_p"),
        (json!({ "repetition_penalty": 0 }), "repetition_penalty"),
        (json!({ "frequency_penalty": 3 }), "frequency_penalty"),
        (json!({ "presence_penalty": -3 }), "presence_penalty"),
        (json!({ "logit_bias": { "5": 101 } }), "logit_bias"),
        (json!({ "logit_bias": { "five": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "258": 1 } }), "logit_bias"),
        (json!({ "seed": 0.5 }), "seed"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "stop": vec!["a"; 17] }), "stop"),
        (json!({ "stop": 5 }), "stop"),
        (json!({ "stop": "a".repeat(1025) }), "stop"),
        (json!({ "stop": vec!["a".repeat(1000); 5] }), "stop"),
        (json!({ "stream": "yes" }), "stream"),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
        (json!({ "stream": true, "stream_options": { "fast": true } }), "stream_options.fast"),
        (json!({ "logprobs": 5 }), "logprobs"),
        (json!({ "top_logprobs": 5 }), "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "tools": [{ "type": "function" }] }), "tools"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "functions": [{ "name": "f" }] }), "functions"),
        (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        (json!({ "modalities": ["text", "audio"] }), "modalities"),
        (json!({ "audio": { "voice": "x" } }), "audio"),
        (json!({ "prediction": { "type": "content" } }), "prediction"),
        (json!({ "reasoning_effort": "high" }), "reasoning_effort"),
        (json!({ "store": true }), "store"),
        (json!({ "continue_final_message": true }), "continue_final_message"),
        (json!({ "chat_template_kwargs": [] }), "chat_template_kwargs"),
        (json!({ "chat_template_kwargs": { "messages": [] } }), "chat_template_kwargs"),
        (json!({ "keep_alive": "soon" }), "keep_alive"),
        (json!({ "guided_json": {} }), "guided_json"),
        (json!({ "tempurature": 1 }), "tempurature"),
    ];
    for (more, param) in chats {
        let answer = f.ask("/v1/chat/completions", chat(more.clone())).await;
        assert_refused(&answer, param, &more);
    }
    let completions = [
        (json!({}), "prompt"),
        (json!({ "prompt": [] }), "prompt"),
        (json!({ "prompt": "" }), "prompt"),
        (json!({ "prompt": 5 }), "prompt"),
        (json!({ "prompt": [258] }), "prompt"),
        (json!({ "prompt": [-1] }), "prompt"),
        (json!({ "prompt": [[]] }), "prompt"),
        (json!({ "prompt": ["a", 5] }), "prompt"),
        (json!({ "prompt": vec!["a"; 65] }), "prompt"),
        (json!({ "prompt": vec!["a"; 5], "n": 16 }), "prompt"),
        (json!({ "prompt": "a", "echo": true }), "echo"),
        (json!({ "prompt": "a", "best_of": 2 }), "best_of"),
        (json!({ "prompt": "a", "suffix": "b" }), "suffix"),
        (json!({ "prompt": "a", "logprobs": true }), "logprobs"),
        (json!({ "prompt": "a", "logprobs": 21 }), "logprobs"),
        (json!({ "prompt": "a", "messages": [] }), "messages"),
    ];
    for (more, param) in completions {
        let mut body = json!({ "model": "team/tiny" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = f.ask("/v1/completions", body).await;
        assert_refused(&answer, param, &more);
    }
    assert!(f.worker.orders.lock().is_empty());
    assert!(f.placement.admits.lock().is_empty(), "nothing invalid is admitted");
}

fn assert_refused(answer: &Answer, param: &str, what: &Value) {
    assert_eq!(answer.status, 400, "{what}: {}", answer.body);
    let error = &answer.json()["error"];
    assert_eq!(error["param"], param, "{what}: {}", answer.body);
    assert_eq!(error["type"], "invalid_request_error");
    assert!(!error["message"].as_str().unwrap().is_empty() && error["code"].is_string());
}

#[tokio::test]
async fn a_body_that_is_no_object_is_refused() {
    let f = Fixture::new(says("never")).await;
    let nested = format!("{{\"a\":{}", "[".repeat(100_000));
    let many = format!("{{{}\"b\":1}}", (0..300).map(|i| format!("\"a{i}\":1,")).collect::<String>());
    let twice = r#"{"model":"team/tiny","model":"team/tiny"}"#;
    for body in ["", "[]", "{", "nonsense", "\u{0}", twice, &nested, &many] {
        let request = f.post("/v1/chat/completions").body(Full::from(body.to_owned())).unwrap();
        let answer = answer(f.send(request).await.unwrap()).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
    }
    let request = f.post("/v1/chat/completions").body(Full::from(&b"{\"model\":\"\xff\"}"[..])).unwrap();
    assert_eq!(f.send(request).await.unwrap().status(), 400);
    let request = f.post("/v1/chat/completions").body(Full::from(vec![b' '; (16 << 20) + 1])).unwrap();
    assert_eq!(f.send(request).await.unwrap().status(), 413);
    let request = f.post("/v1/chat/completions").header("x-stoker-deadline-ms", "soon");
    let request = request.body(Full::from(chat(json!({})).to_string())).unwrap();
    assert_eq!(f.send(request).await.unwrap().status(), 400);
}

#[tokio::test]
async fn what_only_annotates_is_ignored() {
    let f = Fixture::new(says("ok")).await;
    let request = chat(json!({
        "user": "u", "metadata": { "a": "b" }, "store": false, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "p", "parallel_tool_calls": true, "tools": [], "tool_choice": "none", "functions": [],
        "response_format": { "type": "text" }, "modalities": ["text"], "audio": null, "prediction": null,
        "guided_json": null, "stop": [], "logit_bias": {}, "stream": true,
        "stream_options": { "include_obfuscation": false }, "chat_template_kwargs": { "enable_thinking": false },
        "messages": [
            { "role": "developer", "content": "be brief" },
            { "role": "user", "name": "ann", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": "c", "refusal": null },
            { "role": "user", "content": "d" },
        ],
    }));
    let answer = f.ask("/v1/chat/completions", request).await;
    assert_eq!(answer.streamed_text(0), "ok", "{}", answer.body);
    let prompt = &f.worker.orders.lock()[0].prompt;
    let text: String = prompt.iter().filter_map(|&id| u8::try_from(id).ok().map(char::from)).collect();
    assert_eq!(text, "system\nbe brief\nuser\na\nb\nassistant\nc\nuser\nd\nassistant\n");
}

#[tokio::test]
async fn refusals_have_their_status() {
    let f = Fixture::new(says("never")).await;
    let model = || ModelName::new("team/tiny").unwrap();
    let refusals = [
        (
            Refusal::QueueFull {
                waiting: 128,
                scope: "for this model".into(),
                oldest: Duration::from_secs(9),
                retry_after: Duration::from_secs(3),
            },
            429,
            "queue_full",
        ),
        (
            Refusal::NotInTime {
                wait_max: Duration::from_secs(1),
                terms: "SSD 4.1 GB at 1.6 GB/s".into(),
                eta: Duration::from_secs(14),
            },
            503,
            "not_in_time",
        ),
        (
            Refusal::TooLarge {
                model: model(),
                needed: ByteSize::gib(9),
                budget: ByteSize::gib(1),
                detail: "no".into(),
            },
            507,
            "model_too_large",
        ),
        (
            Refusal::Start(StartFailure::Corrupt { model: model(), detail: "chunk 3".into() }),
            500,
            "checkpoint_corrupt",
        ),
        (Refusal::ShuttingDown, 503, "shutting_down"),
    ];
    for stream in [false, true] {
        for (refusal, status, code) in refusals.clone() {
            f.placement.script.lock().push_back(Grant::Refuse(refusal));
            let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": stream }))).await;
            assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (status, Some(code)));
            assert_eq!(!answer.header("retry-after").is_empty(), [429, 503].contains(&status));
        }
    }
    let answer = f.ask("/v1/chat/completions", chat(json!({ "model": "team/tinny" }))).await;
    assert_eq!(answer.status, 404);
    assert_eq!(
        answer.json()["error"]["message"],
        "the model `team/tinny` does not exist; nearest: `team/tiny`"
    );
    let answer = f.ask("/v1/chat/completions", chat(json!({ "model": "odd" }))).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (400, Some("model_not_runnable")));
}

#[tokio::test]
async fn models_are_listed_and_shown() {
    let f = Fixture::new(says("never")).await;
    let list = f.get("/v1/models").await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(list["data"][0]["runnable"], false);
    let model = f.get("/v1/models/team/tiny").await;
    assert_eq!((model.status, model.json()["id"].as_str()), (200, Some("team/tiny")));
    assert_eq!(f.get("/v1/models/team%2Ftiny").await.status, 200);
    assert_eq!(f.get("/v1/models/nothing").await.status, 404);
    assert_eq!(f.get("/v1/nothing").await.status, 404);
    assert_eq!(f.get("/v1/chat/completions").await.status, 405);
    assert_eq!(f.get("/metrics").await.body, "stoker_up 1\n");
    assert_eq!(f.get("/healthz").await.status, 200);
    assert_eq!(f.get("/readyz").await.body, "ready\n");
    let foreign = Request::get("/v1/models").header("host", "evil.example").body(Full::default()).unwrap();
    assert_eq!(f.send(foreign).await.unwrap().status(), 403);
}

#[tokio::test]
async fn keys_are_asked_for() {
    let config = GatewayConfig { keys: vec![ApiKey::from_plain("ann", "k")], ..GatewayConfig::default() };
    let mut f = Fixture::with(config, says("ok")).await;
    assert_eq!(f.get("/v1/models").await.status, 401);
    assert_eq!(f.get("/metrics").await.status, 401);
    assert_eq!(f.get("/healthz").await.status, 200);
    f.key = Some("wrong".into());
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({}))).await.status, 401);
    f.key = Some("k".into());
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({}))).await.status, 200);
    assert_eq!(&*f.placement.admits.lock()[0].client.0, "ann");
    assert_eq!(&f.worker.orders.lock()[0].cache_salt[..], b"ann");
}

#[tokio::test]
async fn an_instance_that_has_gone_is_replaced() {
    let f = Fixture::new(|order| match order.generation {
        1 => [vec![Step::Text("ok")], stop()].concat(),
        2 => vec![Step::Fail(FailureCode::WrongGeneration, "")],
        3 => vec![Step::Die],
        4 => vec![Step::Fail(FailureCode::OutOfMemory, "no blocks")],
        _ => vec![Step::Fail(FailureCode::Unloaded, "by force")],
    })
    .await;
    let plan =
        |grants: &[u64]| f.placement.script.lock().extend(grants.iter().map(|g| Grant::Generation(*g)));
    for (grants, status) in [
        (&[2, 2, 2, 1][..], 200),
        (&[2, 2, 2, 2], 503),
        (&[3, 1], 200),
        (&[3, 3], 502),
        (&[5, 1], 200),
        (&[4], 507),
    ] {
        for stream in [false, true] {
            plan(grants);
            let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": stream }))).await;
            assert_eq!(answer.status, status, "{grants:?} {}", answer.body);
            f.placement.all_returned().await;
        }
    }
    // A worker that isn't there at all.
    f.placement.script.lock().push_back(Grant::Socket(f.dir.path().join("nobody.sock")));
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({}))).await.status, 200);
}

#[tokio::test]
async fn a_worker_that_dies_fails_its_streams_loudly() {
    let f = Fixture::new(|_| vec![Step::Text("one "), Step::Die]).await;
    let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": true }))).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["code"], "worker_gone", "{}", answer.body);
    assert_eq!(error["request_id"], answer.header("x-request-id"));
    assert!(!answer.body.contains("[DONE]"));
    assert!("one ".starts_with(&answer.streamed_text(0)));
    f.placement.all_returned().await;
    assert_eq!(f.placement.admits.lock().len(), 1, "what has been streamed isn't started again");
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_caught() {
    let f = Fixture::new(|_| vec![Step::Text("ab"), Step::End(Finish::Cancelled)]).await;
    let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": true }))).await;
    assert_eq!(answer.events().last().unwrap()["error"]["code"], "instance_gone");
}

#[tokio::test]
async fn a_client_that_hangs_up_aborts_its_sequences() {
    let gate = Arc::new(Notify::new());
    let script_gate = gate.clone();
    let f =
        Fixture::new(move |_| vec![Step::Text("one"), Step::Gate(script_gate.clone()), Step::Text("two")])
            .await;
    // In the middle of a stream.
    let request = chat(json!({ "stream": true, "n": 2 }));
    let request = f.post("/v1/chat/completions").body(Full::from(request.to_string())).unwrap();
    let mut response = f.send(request).await.unwrap();
    response.body_mut().frame().await.unwrap().unwrap();
    drop(response);
    f.placement.all_returned().await;
    while f.worker.aborts.lock().len() < 2 {
        f.worker.aborted.notified().await;
    }
    // While it waits for an answer in one piece.
    let request = f.post("/v1/chat/completions").body(Full::from(chat(json!({})).to_string())).unwrap();
    let orders = f.worker.orders.clone();
    tokio::select! {
        _ = f.send(request) => panic!("there is no answer"),
        () = async { while orders.lock().len() < 3 { tokio::task::yield_now().await } } => {}
    }
    while f.worker.aborts.lock().len() < 3 {
        f.worker.aborted.notified().await;
    }
    f.placement.all_returned().await;
}

#[tokio::test]
async fn a_slow_reader_is_cut_off_and_delays_nobody() {
    let config = GatewayConfig { stream_tokens_max: 100, ..GatewayConfig::default() };
    let f = Fixture::with(config, |order| {
        // The socket's buffers take a lot before anybody has to wait.
        let text = if order.prompt[0] == 97 { vec![Step::Fill; 200] } else { vec![Step::Text("quick")] };
        [text, stop()].concat()
    })
    .await;
    let request = json!({ "model": "team/tiny", "prompt": "a", "stream": true });
    let request = f.post("/v1/completions").body(Full::from(request.to_string())).unwrap();
    let slow = f.send(request).await.unwrap();
    f.worker.aborted.notified().await;
    f.placement.all_returned().await;
    let quick = f.ask("/v1/completions", json!({ "model": "team/tiny", "prompt": "b" })).await;
    assert_eq!(quick.json()["choices"][0]["text"], "quick");
    let slow = answer(slow).await;
    assert_eq!(slow.events().last().unwrap()["error"]["code"], "slow_reader");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_waits_gets_its_head_and_comments() {
    let f = Fixture::new(says("ok")).await;
    f.placement.script.lock().push_back(Grant::After(Duration::from_secs(27)));
    let begun = tokio::time::Instant::now();
    let request =
        f.post("/v1/chat/completions").body(Full::from(chat(json!({ "stream": true })).to_string()));
    let response = f.send(request.unwrap()).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 5);
    assert_eq!(response.status(), 200);
    let answer = answer(response).await;
    assert_eq!(begun.elapsed().as_secs(), 27);
    assert!(answer.body.starts_with(": queued\n: queued\n: queued\nid: "), "{}", answer.body);
    assert_eq!(answer.streamed_text(0), "ok");

    // A refusal before is a status, after an event.
    let refusal = Refusal::ShuttingDown;
    f.placement.script.lock().push_back(Grant::Refuse(refusal));
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({ "stream": true }))).await.status, 503);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_fails_after_its_head_says_so() {
    let f = Fixture::new(|_| {
        vec![Step::Pause(Duration::from_secs(12)), Step::Fail(FailureCode::OutOfMemory, "none")]
    })
    .await;
    let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": true }))).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.starts_with(": queued\nid: "), "{}", answer.body);
    assert_eq!(answer.events()[0]["error"]["code"], "out_of_memory");
    assert_eq!(answer.events().len(), 1);
}

#[tokio::test]
async fn the_deadline_is_passed_on() {
    let f = Fixture::new(says("ok")).await;
    for (given, most) in [("5000", 5), ("999999999", 120)] {
        let request = f.post("/v1/chat/completions").header("x-stoker-deadline-ms", given);
        let request = request.body(Full::from(chat(json!({})).to_string())).unwrap();
        assert_eq!(f.send(request).await.unwrap().status(), 200);
        let wait_max = f.placement.admits.lock().last().unwrap().wait_max;
        assert!(
            wait_max <= Duration::from_secs(most) && wait_max > Duration::from_secs(most - 3),
            "{wait_max:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn running_streams_finish_when_the_server_stops() {
    let f = Fixture::new(|_| {
        [vec![Step::Text("a"), Step::Pause(Duration::from_secs(20)), Step::Text("b")], stop()].concat()
    })
    .await;
    let request =
        f.post("/v1/chat/completions").body(Full::from(chat(json!({ "stream": true })).to_string()));
    let response = f.send(request.unwrap()).await.unwrap();
    f.shutdown.drain.cancel();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let refused = f.ask("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (503, Some("shutting_down")));
    assert_eq!(f.get("/readyz").await.status, 503);
    assert_eq!(answer(response).await.streamed_text(0), "ab");
    f.server.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_past_the_grace_end_with_an_error() {
    for now in [false, true] {
        let f = Fixture::new(|_| vec![Step::Text("a"), Step::Pause(Duration::from_secs(3600))]).await;
        let request =
            f.post("/v1/chat/completions").body(Full::from(chat(json!({ "stream": true })).to_string()));
        let response = f.send(request.unwrap()).await.unwrap();
        let begun = tokio::time::Instant::now();
        f.shutdown.drain.cancel();
        if now {
            f.shutdown.now.cancel();
        }
        let answer = answer(response).await;
        assert_eq!(answer.events().last().unwrap()["error"]["code"], "shutting_down");
        assert_eq!(begun.elapsed().as_secs(), if now { 0 } else { 30 });
        f.server.await.unwrap().unwrap();
        f.placement.all_returned().await;
    }
}

#[tokio::test]
async fn a_panic_is_an_error() {
    let f = Fixture::new(says("ok")).await;
    f.placement.script.lock().extend([Grant::Panic, Grant::Panic]);
    for stream in [false, true] {
        let answer = f.ask("/v1/chat/completions", chat(json!({ "stream": stream }))).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (500, Some("internal_error")));
    }
    assert_eq!(f.ask("/v1/chat/completions", chat(json!({}))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_share_one_connection() {
    let f = Fixture::new(|order| {
        let first = order.prompt[0];
        let mut steps = vec![Step::Token(first); 50];
        steps.extend(stop());
        steps
    })
    .await;
    let asks = (0..64_u32).map(|i| {
        let request = json!({ "model": "team/tiny", "prompt": [i + 33], "stream": i % 2 == 0, "n": 2 });
        let f = &f;
        async move {
            let answer = f.ask("/v1/completions", request).await;
            let expected = char::from_u32(i + 33).unwrap().to_string().repeat(50);
            if i % 2 == 0 {
                assert_eq!((answer.streamed_text(0), answer.streamed_text(1)), (expected.clone(), expected));
            } else {
                let body = answer.json();
                assert_eq!(body["choices"][0]["text"], *expected);
                assert_eq!(body["choices"][1]["text"], *expected);
            }
        }
    });
    futures::future::join_all(asks).await;
    assert_eq!(f.worker.connections.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert_eq!(f.models.opened.load(std::sync::atomic::Ordering::SeqCst), 1, "text is opened once");
    assert!(f.worker.aborts.lock().is_empty());
    f.placement.all_returned().await;
}
