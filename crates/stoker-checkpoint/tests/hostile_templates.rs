//! Templates that try to take all memory, or the stack. One test, in a process of its own, because it measures the
//! process.

#![expect(clippy::unwrap_used, reason = "what these functions unwrap is a test's")]

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, json};
use stoker_checkpoint::chat_template::{ChatInput, ChatTemplate, TemplateError};

/// The budget of a small request pays for 16 MiB; a text may be there twice while it is copied, and six times as long
/// with its escapes.
const PEAK_MAX: u64 = 100 << 20;
/// As a server's threads have it.
const STACK_BYTES: usize = 2 << 20;

/// A text that doubles.
fn doubling(start: &str, step: &str) -> String {
    format!(
        "{{% set ns = namespace(x={start}) %}}{{% for _ in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    )
}

fn hostile() -> Vec<String> {
    let texts = [
        "ns.x ~ ns.x",
        "ns.x + ns.x",
        "ns.x * 2",
        "[ns.x, ns.x] | join",
        "ns.x.join([ns.x, ns.x])",
        "ns.x.replace('a', 'aa')",
        "ns.x.replace('a', ns.x)",
        "ns.x.replace('', ns.x)",
        "ns.x | replace('a', ns.x)",
        "'%s%s' | format(ns.x, ns.x)",
        "'{}{}'.format(ns.x, ns.x)",
        "ns.x | indent(1000000, true)",
        "(ns.x ~ '\\n') | indent(1000)",
        "ns.x | list | join(ns.x)",
        "[ns.x, ns.x] | tojson",
        "[ns.x, ns.x] | string",
        "(ns.x ~ ns.x).upper()",
        "(ns.x ~ ns.x) | upper",
        "(ns.x ~ ns.x) | urlencode",
        "ns.x.split('a') | join('aa')",
        "(ns.x ~ ns.x).splitlines() | string",
    ];
    let mut all: Vec<String> = texts.iter().map(|step| doubling("'aaaaaaaa'", step)).collect();
    // Containers that share what they hold; then whatever makes a text of one.
    let containers = [
        "[ns.x, ns.x]",
        "(ns.x, ns.x)",
        "{'a': ns.x, 'b': ns.x}",
        "dict(a=ns.x, b=ns.x)",
        "[ns.x] + [ns.x]",
        "ns.x + ns.x",
        "[ns.x] * 2",
        "ns.x * 2",
        "[[ns.x], [ns.x]] | list",
        "ns.x | zip(ns.x) | list",
        "[ns.x, ns.x] | batch(1) | list",
        "[[ns.x, ns.x]] | map('list') | list",
        "(ns.x | chain(ns.x)) | list",
    ];
    let uses = [
        "{{ ns.x }}",
        "{{ ns.x ~ '' }}",
        "{{ ns.x in 'abc' }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | tojson(indent=16) }}",
        "{{ ns.x | string | length }}",
        "{{ ns.x | join }}",
        "{{ ''.join(ns.x) }}",
        "{{ '{}'.format(ns.x) }}",
        "{{ ns.x == ns.x + [] }}",
        "{{ raise_exception(ns.x) }}",
        "{{ {ns.x: 1} }}",
        "{% set text %}{{ ns.x }}{% endset %}",
        "{{ ns.x | sort }}",
        "{{ ns.x | pprint }}",
    ];
    for container in containers {
        for used in uses {
            all.push(doubling("['aaaaaaaa']", container) + used);
        }
    }
    let others = [
        // Long by a number.
        "{{ 'a' * 1000000000000 }}",
        "{{ ([0] * 1000000000000) ~ '' }}",
        "{{ ([0] * 1000000000000) | list }}",
        "{{ '{:>1000000000}'.format('') }}",
        "{{ '{:>{}}'.format('', 1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' | format(1000000000, 1) }}",
        "{{ 1.5 | round(1000000000) }}",
        "{{ (range(100000) | list | tojson(indent=100000)) * 100 }}",
        "{{ strftime_now('%A%B%F' * 3000000) }}",
        "{% set x = 'a' * 4000000 %}{{ x.replace('a', x) }}",
        "{% set x = range(99999) | list %}{{ ('a' * 100000).join(x) }}",
        "{% set x = 'a,' * 2000000 %}{{ x.split(',') | length }}{{ x.split(',') | length }}{{ x.split(',') | length }}",
        // Recursion.
        "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('aaaa') }}",
        "{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m(1) }}",
        "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}",
        "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
        // What holds itself, and what is too deep to be dropped.
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = dict(a=ns) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = namespace(y=ns) %}{{ ns }}",
        "{% set ns = namespace(x=[]) %}{% for a in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for a in range(50000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for a in range(50000) %}{% set ns.x = ns.x | batch(1) | list %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for a in range(50000) %}{% set ns.x = {'a': ns.x}.items() %}{% endfor %}",
    ];
    all.extend(others.map(str::to_owned));
    // Straight on, without a loop.
    for step in ["[x, x]", "x ~ x", "x + x", "[x] | batch(1) | list", "{'a': x}.items() | list"] {
        let steps = format!("{{% set x = {step} %}}").repeat(20_000);
        all.push(format!("{{% set x = 'aaaaaaaa' %}}{steps}{{{{ x }}}}"));
    }
    all
}

fn render(source: &str) -> Result<String, TemplateError> {
    let template = ChatTemplate::new(source)?;
    template.render(&ChatInput {
        messages: &[json!({"role": "user", "content": "hi"})],
        add_generation_prompt: true,
        kwargs: &Map::new(),
        special_tokens: &BTreeMap::new(),
        now: Duration::from_secs(1_732_200_000),
        output_bytes_max: 1 << 20,
        fuel_max: None,
    })
}

/// A figure of this process, bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn hostile_templates_fail_within_bounds() {
    for source in hostile() {
        let shown: String = source.chars().take(200).collect();
        // The peak counts from here.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmHWM:");
        let copy = source.clone();
        let rendering =
            std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || render(&copy)).unwrap();
        let outcome = rendering.join().unwrap();
        let grown = status("VmHWM:").saturating_sub(before);
        assert!(grown < PEAK_MAX, "{} MiB: {shown}", grown >> 20);
        match outcome {
            Err(
                TemplateError::BudgetExceeded { .. }
                | TemplateError::OutputTooLong { .. }
                | TemplateError::TemplateFailed { .. }
                | TemplateError::Invalid { .. },
            ) => {}
            // What looks hostile and isn't: the engine gave the same list back.
            Ok(text) => assert!(text.len() < 1 << 16, "{} bytes: {shown}", text.len()),
            Err(other) => panic!("{other}: {shown}"),
        }
    }
}

#[test]
fn what_real_templates_do_is_not_refused() {
    for (source, expected) in [
        (
            "{% set ns = namespace(l=[]) %}{% for i in range(500) %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l | length }}",
            "500",
        ),
        (
            "{% set all = [{'role': 'system', 'content': 'x'}] + messages %}{{ all | map(attribute='role') | join(',') }}",
            "system,user",
        ),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        (
            "{% macro m(x, ns) %}{% set ns.n = ns.n + x %}{% endmacro %}{% set ns = namespace(n=1) %}{{ m(2, ns=ns) }}{{ ns.n }}",
            "3",
        ),
        (
            "{{ '{} of {:>4}'.format(1, 20) }}|{{ '%03d' | format(7) }}|{{ 'a-b'.replace('-', '--') }}",
            "1 of   20|007|a--b",
        ),
        ("{% set x %}a{% endset %}{{ (x ~ 'b') * 2 }}{{ [x, x] }}{{ (x, 1) }}", "abab['a', 'a']('a', 1)"),
        ("{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is sequence else a }}{% endfor %}", "123"),
        (
            "{{ 'yes' if 1 < 2 < 3 and 'user' in ['user', 'x'] else 'no' }}{% if x is defined %}{% else %}-{% endif %}",
            "yes-",
        ),
    ] {
        assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
    }
}
