//! Chat templates: messages to the text that the model was trained on.
//!
//! Templates are Jinja as transformers runs it (`trim_blocks`, `lstrip_blocks`, Python's methods, `raise_exception`,
//! `strftime_now`, its `tojson`). They come with the model and are untrusted: a render has a budget that instructions
//! and data are paid from, so that its time and its memory have a bound in proportion to the request, and a bound on
//! its output. Rendering is synchronous and may take its whole budget, some tens of milliseconds.

mod bounds;
mod program;
mod python;

use std::{collections::BTreeMap, time::Duration};

use minijinja::{
    Environment, Error, ErrorKind, State, UndefinedBehavior, context, syntax::SyntaxConfig, value::Serde,
};
use serde_json::{Map, Value};

use self::program::Program;
use crate::error::shown;

/// The budget of a render: so much (16 MiB of data, or as many instructions as take 10 ms), ...
const FUEL_BASE: u64 = 1 << 18;
/// ...for each message so much (the longest templates known take some hundred instructions), ...
const FUEL_PER_MESSAGE: u64 = 512;
/// ...and one for so many bytes of the request: a template may copy each byte thirty times.
const BYTES_OF_INPUT_PER_FUEL: u64 = 2;
/// The longest template that is compiled, bytes. Real ones have at most some 30 KiB.
const SOURCE_BYTES_MAX: usize = 1 << 20;

/// Why a template can't be used, or doesn't like the messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// It isn't valid Jinja, or uses what isn't implemented.
    #[error("the model's chat template can't be compiled: {message}")]
    Invalid {
        /// What is wrong and where.
        message: String,
    },
    /// None of several named templates is the default one.
    #[error("the model has several chat templates ({}) and none is named `default`", names.join(", "))]
    NoDefault {
        /// Their names.
        names: Vec<String>,
    },
    /// The template refused the messages (`raise_exception`), or couldn't handle them.
    #[error("the model's chat template failed: {message}")]
    TemplateFailed {
        /// The template's own words where it has any.
        message: String,
    },
    /// Too many instructions, or too much data.
    #[error(
        "the model's chat template took more than {fuel} instructions, or data for as many (64 bytes each)"
    )]
    BudgetExceeded {
        /// How many were allowed.
        fuel: u64,
    },
    /// Too much text.
    #[error("the model's chat template wrote more than {bytes_max} bytes")]
    OutputTooLong {
        /// How much was allowed.
        bytes_max: usize,
    },
    /// `chat_template_kwargs` would replace what the request says elsewhere.
    #[error("`chat_template_kwargs` can't set `{name}`")]
    ReservedName {
        /// Which.
        name: String,
    },
}

/// What a template is rendered with.
#[derive(Debug, Clone)]
pub struct ChatInput<'a> {
    /// The request's messages, as in the API.
    pub messages: &'a [Value],
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// More variables (`chat_template_kwargs`).
    pub kwargs: &'a Map<String, Value>,
    /// `bos_token`, `eos_token`, ...: [`Tokenizer::special_tokens`](crate::tokenizer::Tokenizer::special_tokens).
    pub special_tokens: &'a BTreeMap<String, String>,
    /// The time for `strftime_now`, since the Unix epoch; printed as UTC.
    pub now: Duration,
    /// The longest text that may come out, bytes.
    pub output_bytes_max: usize,
    /// Fewer instructions than the budget that a render has otherwise.
    pub fuel_max: Option<u64>,
}

/// A compiled chat template. Immutable, shared between threads.
pub struct ChatTemplate {
    environment: Environment<'static>,
    program: Program,
    source: String,
}

// === impl ChatTemplate ===

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`].
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            let message =
                format!("absurd length: {} bytes, at most {SOURCE_BYTES_MAX} are read", source.len());
            return Err(TemplateError::Invalid { message });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let invalid = |error: &Error| TemplateError::Invalid { message: describe(error) };
        let syntax = syntax.map_err(|e| invalid(&e))?;
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(python::format);
        environment.set_unknown_method_callback(bounds::method);
        // Errors would quote the conversation.
        environment.set_debug(false);
        // It writes everything that there is.
        environment.remove_global("debug");
        program::add_checks(&mut environment);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, Raised(message.clone()).to_string())
                .with_source(Raised(message)))
        });
        let program = Program::compile(without_generation_tags(source), syntax).map_err(|e| invalid(&e))?;
        Ok(Self { environment, program, source: source.to_owned() })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`TemplateError`]: every variant but `Invalid` and `NoDefault`.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TemplateError> {
        let mut variables = BTreeMap::new();
        for (name, text) in input.special_tokens {
            variables.insert(name.as_str(), minijinja::Value::from(text.as_str()));
        }
        // transformers passes these two always.
        variables.insert("tools", minijinja::Value::from(()));
        variables.insert("documents", minijinja::Value::from(()));
        for (name, value) in input.kwargs {
            if matches!(
                name.as_str(),
                "messages" | "add_generation_prompt" | "strftime_now" | "raise_exception"
            ) {
                return Err(TemplateError::ReservedName { name: name.clone() });
            }
            variables.insert(name, minijinja::Value::from(Serde(value)));
        }
        let now = input.now;
        let strftime = minijinja::Value::from_function(move |state: &State<'_, '_>, format: String| {
            // No code stands for more than nine characters, and each has two.
            bounds::afford(state, format.len().saturating_mul(5))?;
            Ok::<_, Error>(python::strftime(now, &format))
        });
        variables.insert("strftime_now", strftime);
        let variables = context! {
            messages => minijinja::Value::from(Serde(input.messages)),
            add_generation_prompt => input.add_generation_prompt,
            ..minijinja::Value::from_pairs(variables)
        };
        let fuel = input.fuel_max.map_or_else(|| input.fuel(), |max| max.min(input.fuel()));
        // Shares everything with the original but the budget.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let text = self.program.run(&environment, variables).map_err(|e| failure(&e, fuel))?;
        if text.len() > input.output_bytes_max {
            return Err(TemplateError::OutputTooLong { bytes_max: input.output_bytes_max });
        }
        Ok(text)
    }

    /// The template as it is in the model's files.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

// === impl ChatInput ===

impl ChatInput<'_> {
    /// The budget of a render of this.
    fn fuel(&self) -> u64 {
        let kwargs = self.kwargs.values().map(bytes_of).sum::<u64>();
        let bytes = self.messages.iter().map(bytes_of).sum::<u64>() + kwargs;
        FUEL_BASE + FUEL_PER_MESSAGE * self.messages.len() as u64 + bytes / BYTES_OF_INPUT_PER_FUEL
    }
}

/// About how long a value is as JSON.
fn bytes_of(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(bytes_of).sum::<u64>() + 8,
        Value::Object(map) => {
            map.iter().map(|(key, item)| key.len() as u64 + bytes_of(item)).sum::<u64>() + 8
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

/// The source in a `chat_template` value: a text, or the default one of a list of `{name, template}`.
///
/// # Errors
/// [`TemplateError::NoDefault`], or [`TemplateError::Invalid`] for any other kind of value.
pub fn select(value: &Value) -> Result<&str, TemplateError> {
    let invalid = || TemplateError::Invalid {
        message: "`chat_template` must be a text or a list of objects with `name` and `template`".to_owned(),
    };
    let list = match value {
        Value::String(text) => return Ok(text),
        Value::Array(list) => list,
        _ => return Err(invalid()),
    };
    let pair = |entry: &'_ Value| {
        Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str().is_some()))
    };
    let names: Option<Vec<_>> = list.iter().map(pair).collect();
    let names = names.filter(|names| names.iter().all(|(_, is_text)| *is_text)).ok_or_else(invalid)?;
    let index = names.iter().position(|(name, _)| name == "default").or((names.len() == 1).then_some(0));
    let Some(index) = index else {
        return Err(TemplateError::NoDefault { names: names.iter().map(|(name, _)| shown(name)).collect() });
    };
    list[index]["template"].as_str().ok_or_else(invalid)
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, with which transformers marks the assistant's text for
/// training, by blocks that do nothing, so that white space is controlled as before.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|end| end + 2) else { break };
        let (tag, after) = tag.split_at(end);
        let inside = tag[2..tag.len() - 2].trim_matches(['-', '+']);
        match inside.trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => {
                // Only the opening is passed over: the `%}` found may stand in a text inside of the tag.
                out.push_str("{%");
                rest = &rest[at + 2..];
                continue;
            }
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn failure(error: &Error, fuel: u64) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::BudgetExceeded { fuel };
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TemplateError::TemplateFailed { message: shown(message) };
        }
        source = cause.source();
    }
    TemplateError::TemplateFailed { message: describe(error) }
}

fn describe(error: &Error) -> String {
    shown(&error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render_with(source: &str, messages: Value, kwargs: Value) -> Result<String, TemplateError> {
        let special = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new(source)?.render(&ChatInput {
            messages: messages.as_array().unwrap(),
            add_generation_prompt: true,
            kwargs: kwargs.as_object().unwrap(),
            special_tokens: &special,
            now: Duration::from_secs(1_732_200_000),
            output_bytes_max: 1 << 16,
            fuel_max: None,
        })
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        render_with(source, json!([{"role": "user", "content": "hi"}]), json!({}))
    }

    #[test]
    fn templates_as_python_would_render_them() {
        for (source, expected) in [
            ("{{ bos_token }}{{ messages[0]['role'] }}", "<s>user"),
            ("{% if tools is not none %}x{% endif %}{{ tools }}", "None"),
            ("{{ true }} {{ none }} {{ 1.0 }} {{ undefined_thing }}|", "True None 1.0 |"),
            ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
            ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
            ("{{ ' a '.strip() }}{{ 'x-y'.split('-')[-1] }}{{ 'abc'.startswith('ab') }}", "ayTrue"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "hi"}"#),
            (
                "{{ {'a': [1, 2.5, 1e20, true, none, '<é\\n>']} | tojson }}",
                "{\"a\": [1, 2.5, 1e+20, true, null, \"<é\\n>\"]}",
            ),
            (
                "{{ {'a': [], 'b': {'c': 1}} | tojson(indent=2) }}",
                "{\n  \"a\": [],\n  \"b\": {\n    \"c\": 1\n  }\n}",
            ),
            ("{{ strftime_now('%d %b %Y, %A %H:%M') }}", "21 Nov 2024, Thursday 14:40"),
            ("a {%- generation -%} b {% endgeneration %}\nc", "ab c"),
            ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('y') }}", "[y]"),
            ("{{ messages[1:] | length }}{{ messages is iterable }}", "0True"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn a_template_may_refuse_the_messages_in_its_own_words() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error, TemplateError::TemplateFailed { message: "roles must alternate".to_owned() });
    }

    #[test]
    fn what_goes_wrong_is_typed() {
        let error = |source: &str| render(source).unwrap_err();
        assert!(matches!(error("{% if %}"), TemplateError::Invalid { .. }));
        assert!(matches!(error("{{ undefined_thing.x }}"), TemplateError::TemplateFailed { .. }));
        let forever = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(matches!(error(forever), TemplateError::BudgetExceeded { fuel } if fuel > FUEL_BASE));
        let long = "{% for a in range(9999) %}aaaaaaaaaaaaaaaa{% endfor %}";
        assert_eq!(error(long), TemplateError::OutputTooLong { bytes_max: 1 << 16 });
        let reserved = render_with("", json!([]), json!({"messages": 1})).unwrap_err();
        assert_eq!(reserved, TemplateError::ReservedName { name: "messages".to_owned() });
    }

    #[test]
    fn more_variables_reach_the_template() {
        let out =
            render_with("{{ thinking }}{{ tools }}", json!([]), json!({"thinking": false, "tools": "t"}));
        assert_eq!(out.as_deref(), Ok("Falset"));
    }

    #[test]
    fn the_default_of_several_templates_is_chosen() {
        let list = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(select(&list), Ok("d"));
        assert_eq!(select(&json!([{"name": "x", "template": "only"}])), Ok("only"));
        let none = json!([{"name": "a", "template": ""}, {"name": "b", "template": ""}]);
        assert_eq!(
            select(&none),
            Err(TemplateError::NoDefault { names: vec!["a".to_owned(), "b".to_owned()] })
        );
        assert!(matches!(select(&json!(7)), Err(TemplateError::Invalid { .. })));
    }
}
