//! `stoker demo`: the whole way once, from nothing to an answer.

use serde::Serialize;
use serde_json::json;
use stoker_types::clock;

use super::{
    chat::{self, Answer},
    models,
};
use crate::{
    cli::DemoArgs,
    client::ApiClient,
    config::Config,
    output::{Output, ms},
    serve::{Server, Variant},
};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    pull_ms: f64,
    serve_ms: f64,
    cold: Answer,
    warm: Answer,
}

/// Pulls, serves, asks cold, asks warm.
pub(crate) async fn run(config: &Config, args: DemoArgs, output: Output) -> anyhow::Result<()> {
    let began = clock::now();
    models::ensure_pulled(config, &args.model, output).await?;
    let pull = began.elapsed();

    let began = clock::now();
    let mut config = config.clone();
    if !args.keep && config.listen.origin == crate::config::Origin::Default {
        // Nobody needs to know the port, and the usual one may be taken.
        config.listen.value.set_port(0);
    }
    let server = Server::start(&config, Variant::default()).await?;
    server.ready().await?;
    let serve = began.elapsed();
    output.line(&format!(
        "{} is served at http://{}/v1 after {}; nothing of it is in memory\n",
        args.model,
        server.address(),
        ms(serve)
    ));

    let key = config.api_keys.value.first().map(|k| k.secret.clone());
    let api = ApiClient::new(server.address(), key);
    let question = json!({
        "model": args.model.as_str(),
        "messages": [{ "role": "user", "content": args.question }],
        "temperature": 0,
        "max_tokens": 64,
    });
    let asked = async {
        output.line(&format!("> {}", args.question));
        let cold = chat::ask(&api, question.clone(), output).await?;
        output.line("\n");
        if let Some(phases) = &cold.timeline {
            output.line(&chat::render(phases));
        }
        output.line("Once more, warm:\n");
        output.line(&format!("> {}", args.question));
        let warm = chat::ask(&api, question, output).await?;
        output.line("\n");
        anyhow::Ok((cold, warm))
    }
    .await;
    let (cold, warm) = match asked {
        Ok(answers) => answers,
        Err(error) => {
            server.stop().await?;
            return Err(error);
        }
    };
    let report = Report {
        model: args.model.to_string(),
        pull_ms: pull.as_secs_f64() * 1e3,
        serve_ms: serve.as_secs_f64() * 1e3,
        cold,
        warm,
    };
    output.show(&report, |r| {
        format!(
            "time to first token: {:.0} ms cold, {:.0} ms warm",
            r.cold.first_token_ms, r.warm.first_token_ms
        )
    })?;
    if args.keep {
        output.line(&format!("\nthe server stays: http://{}/v1, Ctrl-C stops it", server.address()));
        return server.until_signalled().await;
    }
    server.stop().await
}
