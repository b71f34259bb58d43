//! A template's instructions, with checks put between them.
//!
//! minijinja charges a budget ("fuel") for every instruction and for the data that operators and filters make, and
//! refuses a text before it is made if the rest of the budget can't pay for it. What it doesn't see is structure that
//! is shared: `[x, x]` forty times over costs next to nothing and prints as a terabyte, a namespace that holds itself
//! prints for ever, and a list nested a hundred thousand deep overflows the stack when it is dropped. So every
//! instruction that makes a container, or stores one in a namespace, is followed (preceded) by a call of
//! [`bounds::value`], which refuses what is too large when written out, or too deep. Then
//! everything that later writes, compares or drops such a value is bounded too.

use std::{collections::BTreeMap, sync::Arc};

use minijinja::{
    AutoEscape, Environment, Error, Value,
    machinery::{CompiledTemplate, Instruction, Instructions, TemplateConfig, eval, make_string_output},
    syntax::SyntaxConfig,
};
use self_cell::self_cell;

use super::bounds;

/// Names of the checks. No template can name them.
const CHECK: &str = "bounds: value";
const CHECK_STORED: &str = "bounds: stored value";

/// Filters whose results are texts, numbers, or values that there were before. All others may make containers.
const PLAIN_FILTERS: &[&str] = &[
    "abs",
    "attr",
    "bool",
    "capitalize",
    "count",
    "d",
    "default",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "indent",
    "int",
    "join",
    "last",
    "length",
    "lower",
    "max",
    "min",
    "pprint",
    "replace",
    "round",
    "safe",
    "string",
    "title",
    "tojson",
    "trim",
    "upper",
    "urlencode",
];

/// Methods of which the same is true.
const PLAIN_METHODS: &[&str] = &[
    "capitalize",
    "count",
    "endswith",
    "find",
    "format",
    "get",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "replace",
    "rfind",
    "rstrip",
    "startswith",
    "strip",
    "title",
    "upper",
];

self_cell! {
    /// A compiled template beside the source that it borrows from.
    pub(super) struct Program {
        owner: String,
        #[covariant]
        dependent: Checked,
    }
}

/// A compiled template with its checks.
pub(super) struct Checked<'a> {
    instructions: Instructions<'a>,
    blocks: BTreeMap<&'a str, Instructions<'a>>,
}

// === impl Program ===

impl Program {
    pub(super) fn compile(source: String, syntax: SyntaxConfig) -> Result<Self, Error> {
        Self::try_new(source, |source| {
            let config =
                TemplateConfig { syntax_config: syntax, default_auto_escape: Arc::new(|_| AutoEscape::None) };
            let compiled = CompiledTemplate::new("chat_template", source, &config)?;
            let blocks = compiled.blocks.iter().map(|(name, block)| (*name, checked(block)));
            Ok(Checked { instructions: checked(&compiled.instructions), blocks: blocks.collect() })
        })
    }

    /// Runs it in an environment that has had [`add_checks`].
    pub(super) fn run(&self, environment: &Environment<'_>, variables: Value) -> Result<String, Error> {
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        let Checked { instructions, blocks } = self.borrow_dependent();
        eval(environment, instructions, variables, blocks, &mut out, AutoEscape::None)?;
        drop(out);
        Ok(text)
    }
}

/// Gives an environment the functions that programs call.
pub(super) fn add_checks(environment: &mut Environment<'_>) {
    environment.add_function(CHECK, bounds::value);
    environment.add_function(CHECK_STORED, bounds::stored_value);
}

/// The same instructions, with checks where containers are made and stored.
fn checked<'a>(of: &Instructions<'a>) -> Instructions<'a> {
    let all = || (0..).map_while(|at| of.get(at).map(|instruction| (at, instruction)));
    // Where each instruction goes, its checks included: a jump to it must not pass over a check before it.
    let mut places = Vec::new();
    let mut place = 0;
    for (_, instruction) in all() {
        places.push(place);
        place += checks_before(instruction).len() + 1 + checks_after(instruction).len();
    }
    places.push(place);
    let moved = |target: u32| {
        // Targets outside are the engine's own marks and stay what they are.
        places.get(target as usize).map_or(target, |place| u32::try_from(*place).unwrap_or(u32::MAX))
    };
    let mut out = Instructions::new(of.name(), of.source());
    for (at, instruction) in all() {
        let relocated = match instruction.clone() {
            Instruction::Iterate(target) => Instruction::Iterate(moved(target)),
            Instruction::Jump(target) => Instruction::Jump(moved(target)),
            Instruction::JumpIfFalse(target) => Instruction::JumpIfFalse(moved(target)),
            Instruction::JumpIfFalseOrPop(target) => Instruction::JumpIfFalseOrPop(moved(target)),
            Instruction::JumpIfTrueOrPop(target) => Instruction::JumpIfTrueOrPop(moved(target)),
            Instruction::BuildMacro(name, target, flags) => {
                Instruction::BuildMacro(name, moved(target), flags)
            }
            other => other,
        };
        let before = checks_before(instruction).iter().cloned();
        let after = checks_after(instruction).iter().cloned();
        for instruction in before.chain([relocated]).chain(after) {
            match (of.get_span(at), of.get_line(at).and_then(|line| u16::try_from(line).ok())) {
                (Some(span), _) => out.add_with_span(instruction, span),
                (None, Some(line)) => out.add_with_line(instruction, line),
                (None, None) => out.add(instruction),
            };
        }
    }
    out
}

/// The value to be stored is below the namespace on the stack.
const STORED: &[Instruction<'static>] =
    &[Instruction::Swap, Instruction::CallFunction(CHECK_STORED, Some(1)), Instruction::Swap];
const MADE: &[Instruction<'static>] = &[Instruction::CallFunction(CHECK, Some(1))];

fn checks_before(instruction: &Instruction<'_>) -> &'static [Instruction<'static>] {
    match instruction {
        Instruction::SetAttr(_) => STORED,
        _ => &[],
    }
}

fn checks_after(instruction: &Instruction<'_>) -> &'static [Instruction<'static>] {
    let makes_a_container = match instruction {
        Instruction::BuildMap(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::Add
        | Instruction::Mul => true,
        Instruction::ApplyFilter(name, ..) => !PLAIN_FILTERS.contains(name),
        Instruction::CallMethod(name, _) => !PLAIN_METHODS.contains(name),
        // Macros give texts; all other functions are ours, or give numbers.
        Instruction::CallFunction("dict" | "namespace", _) | Instruction::CallObject(_) => true,
        // Keyword arguments become a macro's variables, or go into `dict` and `namespace`.
        Instruction::BuildKwargs(_)
        | Instruction::MergeKwargs(_)
        | Instruction::CallFunction(..)
        // What these give is a part of what there was, a text, a number, or a truth.
        | Instruction::Lookup(_)
        | Instruction::GetAttr(_)
        | Instruction::GetItem
        | Instruction::Slice
        | Instruction::LoadConst(_)
        | Instruction::UnpackList(_)
        | Instruction::UnpackLists(_)
        | Instruction::Sub
        | Instruction::Div
        | Instruction::IntDiv
        | Instruction::Rem
        | Instruction::Pow
        | Instruction::Neg
        | Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::Not
        | Instruction::StringConcat
        | Instruction::In
        | Instruction::CompareAndPreserve(_)
        | Instruction::PerformTest(..)
        | Instruction::EndCapture
        | Instruction::DupTop
        | Instruction::Swap
        | Instruction::IsUndefined
        | Instruction::GetClosure
        // These give nothing.
        | Instruction::EmitRaw(_)
        | Instruction::StoreLocal(_)
        | Instruction::SetAttr(_)
        | Instruction::Emit
        | Instruction::PushLoop(_)
        | Instruction::PushWith
        | Instruction::Iterate(_)
        | Instruction::PushDidNotIterate
        | Instruction::PopFrame
        | Instruction::PopLoopFrame
        | Instruction::Jump(_)
        | Instruction::JumpIfFalse(_)
        | Instruction::JumpIfFalseOrPop(_)
        | Instruction::JumpIfTrueOrPop(_)
        | Instruction::PushAutoEscape
        | Instruction::PopAutoEscape
        | Instruction::BeginCapture(_)
        | Instruction::DiscardTop
        | Instruction::FastSuper
        | Instruction::FastRecurse
        | Instruction::CallBlock(_)
        | Instruction::LoadBlocks
        | Instruction::Include(_)
        | Instruction::ExportLocals
        | Instruction::BuildMacro(..)
        | Instruction::Return
        | Instruction::Enclose(_) => false,
    };
    if makes_a_container { MADE } else { &[] }
}
