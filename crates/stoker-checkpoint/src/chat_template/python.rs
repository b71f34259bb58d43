//! Where Jinja in Python and minijinja print differently.

use std::time::Duration;

use minijinja::{
    Error, ErrorKind, Output, State, Value,
    value::{Kwargs, ValueKind},
};

use super::bounds;

/// How deep `tojson` goes.
const DEPTH_MAX: usize = 128;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Prints a value: `True`, `False` and `None` as Python has them.
pub(super) fn format(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// transformers' `tojson`: Python's `json.dumps` without the escapes for HTML that Jinja's own has.
pub(super) fn tojson(state: &State<'_, '_>, value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let separators: Option<(String, String)> = match kwargs.get::<Option<Value>>("separators")? {
        Some(value) if !value.is_none() => {
            let part = |i: usize| {
                value.get_item_by_index(i)?.as_str().map(str::to_owned).ok_or_else(|| {
                    Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts")
                })
            };
            Some((part(0)?, part(1)?))
        }
        _ => None,
    };
    kwargs.assert_all_used()?;
    let default = || (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    let (item_separator, key_separator) = separators.unwrap_or_else(default);
    let mut writer = JsonWriter {
        out: String::new(),
        indent: indent.map(|n| n.min(16)),
        ascii: ensure_ascii.unwrap_or(false),
        sort: sort_keys.unwrap_or(false),
        item_separator,
        key_separator,
        bytes_max: usize::try_from(bounds::left(state)).unwrap_or(usize::MAX),
    };
    let value = serde_json::to_value(&value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, "tojson: not representable").with_source(e))?;
    writer.value(&value, 0)?;
    Ok(writer.out)
}

struct JsonWriter {
    out: String,
    indent: Option<usize>,
    ascii: bool,
    sort: bool,
    item_separator: String,
    key_separator: String,
    bytes_max: usize,
}

// === impl JsonWriter ===

impl JsonWriter {
    fn value(&mut self, value: &serde_json::Value, depth: usize) -> Result<(), Error> {
        use serde_json::Value as Json;
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: nested too deeply"));
        }
        if self.out.len() > self.bytes_max {
            return Err(ErrorKind::OutOfFuel.into());
        }
        match value {
            Json::Null => self.out.push_str("null"),
            Json::Bool(b) => self.out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
                Some(x) => self.out.push_str(&float(x)),
                None => self.out.push_str(&n.to_string()),
            },
            Json::String(s) => self.string(s),
            Json::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Json::Array(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.value(item, depth + 1)?;
                }
                self.line(depth);
                self.out.push(']');
            }
            Json::Object(map) if map.is_empty() => self.out.push_str("{}"),
            Json::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.out.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.string(key);
                    self.out.push_str(&self.key_separator);
                    self.value(item, depth + 1)?;
                }
                self.line(depth);
                self.out.push('}');
            }
        }
        Ok(())
    }

    fn separate(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item_separator);
        }
        self.line(depth);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a float: the shortest digits that read back the same; an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let plain = format!("{x:?}");
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return if plain.contains('e') { format!("{x}") } else { plain };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Python's `datetime.strftime` in UTC, for the codes that templates use; others stay as they are.
pub(super) fn strftime(now: Duration, format: &str) -> String {
    let seconds = now.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day) = civil(days);
    // The first day of the epoch was a Thursday.
    let (month_name, weekday) = (pick(&MONTHS, month - 1), pick(&WEEKDAYS, days + 4));
    let hour_12 = (hour + 11) % 12 + 1;
    let day_of_year = days - days_before(year) + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let unpadded = code == Some('-');
        if unpadded {
            code = chars.next();
        }
        let two = |n: u64| if unpadded { n.to_string() } else { format!("{n:02}") };
        let text = match code {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two(hour_12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('j') => {
                if unpadded {
                    day_of_year.to_string()
                } else {
                    format!("{day_of_year:03}")
                }
            }
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

/// The name with a number, counted round and round.
fn pick<const N: usize>(names: &[&'static str; N], number: u64) -> &'static str {
    names[usize::try_from(number % N as u64).unwrap_or(0)]
}

/// Year, month and day of a day since 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to the first day of a year.
fn days_before(year: u64) -> u64 {
    let before = year - 1;
    (before * 365 + before / 4 - before / 100 + before / 400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01 Thu 001"),
            (951_782_400, "2000-02-29 Tue 060"),
            (1_735_603_200, "2024-12-31 Tue 366"),
            (4_102_444_799, "2099-12-31 Thu 365"),
        ] {
            assert_eq!(strftime(Duration::from_secs(seconds), "%Y-%m-%d %a %j"), expected);
        }
        assert_eq!(strftime(Duration::from_secs(46_800), "%-d %I%p %q %%"), "1 01PM %q %");
    }

    #[test]
    fn floats() {
        for (x, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-2.5e300, "-2.5e+300"),
            (0.0, "0.0"),
        ] {
            assert_eq!(float(x), expected);
        }
    }
}
