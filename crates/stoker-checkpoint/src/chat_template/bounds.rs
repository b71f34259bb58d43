//! How large a template's values may become.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{ObjectRepr, ValueKind},
};

/// Bytes that one unit of fuel pays for (minijinja's `Environment::set_fuel`).
pub(super) const BYTES_PER_FUEL: u64 = 64;
/// A value in a container, and its separators when it is written.
const SLOT_BYTES: u64 = 32;
/// Values that one unit of fuel pays for being counted.
const COUNTED_PER_FUEL: u64 = 8;
/// Deepest nesting: JSON in a request may have 128.
const DEPTH_MAX: usize = 160;

/// Counts what a value is when it is written out.
struct Count {
    bytes: u64,
    bytes_max: u64,
    values: u64,
}

/// Gives back `value` when the budget could pay for writing it out, and it isn't nested too deeply.
pub(super) fn value(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if value.as_object().is_some() {
        let mut count = Count { bytes: 0, bytes_max: left(state), values: 0 };
        let counted = count.object(&value, DEPTH_MAX);
        state.consume_fuel(count.values / COUNTED_PER_FUEL)?;
        counted.or_else(|problem| problem.into_error(state))?;
    }
    Ok(value)
}

/// The same for a value that is put into a namespace, which can't be a namespace: it might hold itself.
pub(super) fn stored_value(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if is_namespace(&value) {
        return nested_namespace();
    }
    self::value(state, value)
}

/// Refuses a text of `bytes` that is about to be made, when the budget can't pay for it.
pub(super) fn afford(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    if bytes as u64 > left(state) { exhaust(state) } else { Ok(()) }
}

/// Bytes that the rest of the budget pays for.
pub(super) fn left(state: &State<'_, '_>) -> u64 {
    state.fuel_levels().map_or(0, |(_, left)| left.saturating_mul(BYTES_PER_FUEL))
}

/// Python's methods, each asked beforehand how much its result can be.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        afford(state, result_bytes_max(text, name, args))?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The most bytes that a text's method can give.
fn result_bytes_max(text: &str, name: &str, args: &[Value]) -> usize {
    let arg = |at: usize| args.get(at).and_then(Value::as_str).unwrap_or_default();
    let items = |count: usize| count.saturating_mul(64).saturating_add(text.len());
    match name {
        "replace" => {
            let grows = arg(1).len().saturating_sub(arg(0).len());
            let most = if arg(0).is_empty() { text.len() + 1 } else { text.len() / arg(0).len() };
            let bytes = |matches: usize| text.len().saturating_add(matches.saturating_mul(grows));
            // Most texts are far below the limit whatever they hold.
            if bytes(most) < 1 << 16 { bytes(most) } else { bytes(text.matches(arg(0)).count()) }
        }
        // The separator between all of them, and each of them at the worst way of writing it.
        "join" => args.first().map_or(0, |list| {
            let separators = list.len().unwrap_or(0).saturating_mul(text.len());
            separators.saturating_add(written_bytes_max(list))
        }),
        "format" => {
            // A field is at most as wide as a number in the format or among the arguments.
            let digits = text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
            let width = digits.map(|run| run.parse().unwrap_or(usize::MAX)).max().unwrap_or(0);
            let given = args.iter().filter_map(Value::as_usize).max().unwrap_or(0);
            let written = args.iter().map(written_bytes_max).fold(0, usize::saturating_add);
            let field = width.max(given).saturating_add(written);
            text.matches('{').count().saturating_mul(field).saturating_add(text.len())
        }
        "split" if !arg(0).is_empty() => items(text.matches(arg(0)).count() + 1),
        "split" | "splitlines" => items(text.split_whitespace().count().max(text.lines().count()) + 1),
        // A letter of another case has three times the bytes at most.
        _ => text.len().saturating_mul(3),
    }
}

/// A bound on a value that has been checked, as text: a character may become six in an escape.
fn written_bytes_max(value: &Value) -> usize {
    let mut count = Count { bytes: 0, bytes_max: u64::MAX, values: 0 };
    if count.value(value, DEPTH_MAX).is_err() {
        return usize::MAX;
    }
    usize::try_from(count.bytes).unwrap_or(usize::MAX).saturating_mul(6)
}

fn exhaust<T>(state: &State<'_, '_>) -> Result<T, Error> {
    state.consume_fuel(state.fuel_levels().map_or(0, |(_, left)| left).saturating_add(1))?;
    Err(ErrorKind::OutOfFuel.into())
}

fn nested_namespace<T>() -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "a namespace can't be put into another value"))
}

fn is_namespace(value: &Value) -> bool {
    // The type is the engine's own.
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Why a value is refused.
enum Problem {
    TooLarge,
    TooDeep,
    Namespace,
}

// === impl Problem ===

impl Problem {
    fn into_error(self, state: &State<'_, '_>) -> Result<(), Error> {
        match self {
            Self::TooLarge => exhaust(state),
            Self::TooDeep => Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("values are nested deeper than {DEPTH_MAX}"),
            )),
            Self::Namespace => nested_namespace(),
        }
    }
}

// === impl Count ===

impl Count {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Problem> {
        self.add(1, SLOT_BYTES + value.as_str().map_or(0, |text| text.len() as u64))?;
        if is_namespace(value) {
            return Err(Problem::Namespace);
        }
        self.object(value, depth)
    }

    /// What is in it, if it is a container whose items are there already.
    fn object(&mut self, value: &Value, depth: usize) -> Result<(), Problem> {
        let Some(object) = value.as_object() else { return Ok(()) };
        // Without a length it is read as it is made, once, and never written out.
        let Some(len) = object.enumerator_len() else { return Ok(()) };
        if matches!(object.repr(), ObjectRepr::Plain) || len == 0 {
            return Ok(());
        }
        let depth = depth.checked_sub(1).ok_or(Problem::TooDeep)?;
        self.room(SLOT_BYTES.saturating_mul(len as u64))?;
        if value.kind() == ValueKind::Map {
            for (key, item) in object.try_iter_pairs().into_iter().flatten() {
                self.value(&key, depth)?;
                self.value(&item, depth)?;
            }
        } else {
            for item in object.try_iter().into_iter().flatten() {
                self.value(&item, depth)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, values: u64, bytes: u64) -> Result<(), Problem> {
        self.room(bytes)?;
        self.bytes += bytes;
        self.values += values;
        Ok(())
    }

    fn room(&self, bytes: u64) -> Result<(), Problem> {
        if self.bytes.saturating_add(bytes) > self.bytes_max { Err(Problem::TooLarge) } else { Ok(()) }
    }
}
