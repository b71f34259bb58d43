//! `stoker explain`: where the time of cold starts went, and what a start would take now.

use std::{fmt::Write as _, time::Duration};

use stoker_types::clock;

use crate::{
    client::AdminClient,
    output::{Output, Table, ms},
    serve::{
        admin::{ExplainReport, ExplainRequest, ModelExplanation},
        traces::{ColdPhase, ColdRequest},
    },
};

/// Decisions about a model that are shown, the last ones.
const DECISIONS_SHOWN: usize = 12;

/// `stoker explain [MODEL|REQUEST]`.
pub(crate) async fn run(admin: &AdminClient, about: Option<String>, output: Output) -> anyhow::Result<()> {
    let report: ExplainReport = admin.post("/explain", &ExplainRequest { about }).await?;
    let now_s = clock::wall().as_secs_f64();
    output.show(&report, |report| {
        let mut parts: Vec<String> = report.model.iter().map(model).collect();
        parts.extend(report.requests.iter().map(|request| cold(request, now_s)));
        if report.requests.is_empty() {
            parts.push("no request has waited for a start yet\n".into());
        }
        parts.join("\n")
    })
}

fn model(explanation: &ModelExplanation) -> String {
    let ModelExplanation { model, sizing, estimate, waiting, failure, decisions } = explanation;
    let mut text = format!("{model}: {sizing}\na start now: {estimate}\n");
    // A `String` takes everything.
    if *waiting > 0 {
        let _ = writeln!(text, "{waiting} requests wait for it");
    }
    if let Some(failure) = failure {
        let _ = writeln!(text, "the last start failed: {failure}");
    }
    if !decisions.is_empty() {
        let mut table = Table::new(["AGE", "INSTANCE", "EVENT", "WHY"]);
        for d in &decisions[decisions.len().saturating_sub(DECISIONS_SHOWN)..] {
            let age = format!("{:.1} s", d.age_s);
            table.row([age, d.instance.clone(), d.event.clone(), d.terms.clone()]);
        }
        let _ = write!(text, "\n{}", table.render());
    }
    text
}

fn cold(request: &ColdRequest, now_s: f64) -> String {
    let ColdRequest { request: id, model, arrived_s, status, outcome, prompt_tokens, output_tokens, .. } =
        request;
    let milliseconds = |value: f64| ms(Duration::from_secs_f64(value.max(0.0) / 1e3));
    let first =
        request.first_token_ms.map_or_else(String::new, |t| format!("first token {}, ", milliseconds(t)));
    let mut text = format!(
        "{id}  {model}  {:.0} s ago: {status} {outcome}, {prompt_tokens} + {output_tokens} tokens, {first}total {}\n\n",
        (now_s - arrived_s).max(0.0),
        milliseconds(request.total_ms),
    );
    let mut table = Table::new(["PHASE", "BEGAN", "ACTUAL", "PREDICTED"]);
    for ColdPhase { phase, ms: actual, predicted_ms, began_ms } in &request.phases {
        table.row([
            phase.name().replace('_', " "),
            began_ms.map_or_else(String::new, |at| format!("{at:+.2} ms")),
            milliseconds(*actual),
            predicted_ms.map_or_else(String::new, milliseconds),
        ]);
    }
    text.push_str(&table.render());
    let bytes: Vec<String> =
        request.bytes.iter().map(|tier| format!("{} from {}", tier.bytes, tier.tier.name())).collect();
    if !bytes.is_empty() {
        let _ = writeln!(text, "{}", bytes.join(", "));
    }
    text
}
