//! `stoker run`, and the asking that `stoker demo` shares with it.

use std::{
    io::{BufRead as _, IsTerminal as _},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stoker_types::clock;

use crate::{
    cli::RunArgs,
    client::{AdminClient, ApiClient, Event},
    config::Config,
    output::{Output, Table, ms},
    serve::{Server, Variant},
};

/// An answer and where its time went.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) finish_reason: Option<String>,
    pub(crate) first_token_ms: f64,
    pub(crate) total_ms: f64,
    pub(crate) tokens: u32,
    /// As the server measured them.
    pub(crate) timeline: Option<Phases>,
}

/// The server's `x-stoker-timeline`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Phases {
    /// The model was not on the device when the request came.
    #[serde(default)]
    pub(crate) cold: bool,
    /// Parsing, reading the tokenizer if it wasn't there, chat template, tokenising. Overlaps the start.
    #[serde(default)]
    pub(crate) prepared_ms: f64,
    /// By name, in the order in which they begin.
    pub(crate) phases: serde_json::Map<String, Value>,
}

/// Asks `body`'s question, printing the answer as it comes.
pub(crate) async fn ask(api: &ApiClient, mut body: Value, output: Output) -> anyhow::Result<Answer> {
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let begun = clock::now();
    let (_, mut events) = api.stream("/v1/chat/completions", &body).await?;
    let mut answer = Answer::default();
    while let Some(event) = events.next().await? {
        match event {
            Event::Data(data) if &*data == b"[DONE]" => {
                answer.total_ms = begun.elapsed().as_secs_f64() * 1e3;
                return Ok(answer);
            }
            Event::Data(data) => {
                let chunk: Value = serde_json::from_slice(&data).context("an event is no JSON")?;
                if let Some(error) = chunk.get("error") {
                    bail!("{}", error["message"].as_str().unwrap_or("the stream failed"));
                }
                if let Some(text) = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str)
                    && !text.is_empty()
                {
                    if answer.text.is_empty() {
                        answer.first_token_ms = begun.elapsed().as_secs_f64() * 1e3;
                    }
                    output.stream(text);
                    answer.text.push_str(text);
                }
                if let Some(reason) = chunk.pointer("/choices/0/finish_reason").and_then(Value::as_str) {
                    answer.finish_reason = Some(reason.to_owned());
                }
                if let Some(tokens) = chunk.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
                    answer.tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
                }
            }
            Event::Comment(comment) => {
                if let Some(json) = comment.strip_prefix(stoker_gateway::TIMELINE) {
                    let json = json.trim_start_matches([':', ' ']);
                    answer.timeline =
                        Some(serde_json::from_str(json).context("the timeline is not as expected")?);
                } else {
                    tracing::info!("{comment}");
                }
            }
        }
    }
    bail!("the stream ended without [DONE]")
}

/// The phases as a table.
pub(crate) fn render(phases: &Phases) -> String {
    let mut table = Table::new(["PHASE", "ACTUAL", "PREDICTED"]);
    table.row([
        "tokenise".into(),
        ms(Duration::from_secs_f64(phases.prepared_ms.max(0.0) / 1e3)),
        String::new(),
    ]);
    for (phase, time) in &phases.phases {
        let show = |key: &str| {
            time.get(key)
                .and_then(Value::as_f64)
                .map(|t| ms(Duration::from_secs_f64(t.max(0.0) / 1e3)))
                .unwrap_or_default()
        };
        table.row([phase.replace('_', " "), show("ms"), show("predicted_ms")]);
    }
    table.render()
}

/// `stoker run`.
pub(crate) async fn run(config: &Config, args: RunArgs, output: Output) -> anyhow::Result<()> {
    let key = config.api_keys.value.first().map(|k| k.secret.clone());
    let admin = AdminClient::new(config.dirs.admin_socket());
    // A server that runs already has the memory; one of our own would have to share it.
    let running = admin.get::<Value>("/status").await.is_ok();
    let own = if running {
        None
    } else {
        let mut config = config.clone();
        config.listen.value.set_port(0);
        Some(Server::start(&config, Variant::default()).await?)
    };
    let address = own.as_ref().map_or(config.listen.value, Server::address);
    let outcome = converse(&ApiClient::new(address, key), &args, output).await;
    if let Some(server) = own {
        server.stop().await?;
    }
    outcome
}

async fn converse(api: &ApiClient, args: &RunArgs, output: Output) -> anyhow::Result<()> {
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(args.system.as_ref().map(|s| json!({ "role": "system", "content": s })));
    let body = |messages: &[Value]| {
        let mut body = json!({ "model": args.model.as_str(), "messages": messages });
        let optional = [
            ("temperature", args.temperature.map(|t| json!(t))),
            ("seed", args.seed.map(|s| json!(s))),
            ("max_tokens", args.max_tokens.map(|m| json!(m))),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                body[name] = value;
            }
        }
        body
    };
    let say = |answer: &Answer| -> anyhow::Result<()> {
        output.line("");
        if args.timeline
            && let Some(phases) = &answer.timeline
        {
            output.line(&format!("\n{}", render(phases)));
        }
        if output.json { output.show(answer, |_| String::new()) } else { Ok(()) }
    };
    if let Some(prompt) = &args.prompt {
        messages.push(json!({ "role": "user", "content": prompt }));
        return say(&ask(api, body(&messages), output).await?);
    }
    let terminal = std::io::stdin().is_terminal();
    loop {
        if terminal {
            output.stream("> ");
        }
        let line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map(|read| (read > 0).then_some(line))
        })
        .await??;
        let Some(line) = line else { return Ok(()) };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        messages.push(json!({ "role": "user", "content": line }));
        tokio::select! {
            answer = ask(api, body(&messages), output) => {
                let answer = answer?;
                say(&answer)?;
                messages.push(json!({ "role": "assistant", "content": answer.text }));
            }
            // Stops the answer, not the program; the server notices that nobody listens.
            _ = tokio::signal::ctrl_c() => {
                output.line("\n(stopped)");
                messages.pop();
            }
        }
    }
}
