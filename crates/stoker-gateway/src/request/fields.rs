//! A JSON object whose fields are taken out one by one; what is left over in the end is refused by name.
//!
//! Values stay raw text until a field wants them, so that memory is in proportion to the body.

use std::{borrow::Cow, fmt, marker::PhantomData, ops::RangeInclusive};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{config::FIELDS_MAX, errors::ApiError};

/// The object and its place in the body.
pub(super) struct Fields<'a> {
    entries: Vec<(Cow<'a, str>, &'a RawValue)>,
    /// `messages[3].`, or nothing at the top.
    prefix: String,
}

/// What kind of JSON value a field has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    String,
    Array,
    Object,
    Other,
}

// === impl Fields ===

impl<'a> Fields<'a> {
    /// The body itself.
    pub(super) fn of_body(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body)
            .map_err(|e| ApiError::malformed(format!("the body is not UTF-8 at byte {}", e.valid_up_to())))?;
        let Entries(entries) = serde_json::from_str(text)
            .map_err(|e| ApiError::malformed(format!("the body is not a JSON object as expected: {e}")))?;
        Self { entries, prefix: String::new() }.without_nulls()
    }

    /// An object within the body, at `place`.
    pub(super) fn of_value(raw: &'a RawValue, place: &str) -> Result<Self, ApiError> {
        if kind(raw) != Kind::Object {
            return Err(ApiError::invalid(place, format!("`{place}` must be an object")));
        }
        let Entries(entries) = serde_json::from_str(raw.get())
            .map_err(|e| ApiError::invalid(place, format!("`{place}` is not an object as expected: {e}")))?;
        Self { entries, prefix: format!("{place}.") }.without_nulls()
    }

    /// A null means the same as no field.
    fn without_nulls(mut self) -> Result<Self, ApiError> {
        for (at, (name, _)) in self.entries.iter().enumerate() {
            if self.entries[..at].iter().any(|(other, _)| other == name) {
                let name = self.place(name);
                return Err(ApiError::invalid(&*name, format!("`{name}` is there twice")));
            }
        }
        self.entries.retain(|(_, raw)| raw.get() != "null");
        Ok(self)
    }

    /// A field's full name.
    pub(super) fn place(&self, name: &str) -> String {
        let shown: String = name.chars().take(64).flat_map(char::escape_default).collect();
        format!("{}{shown}", self.prefix)
    }

    pub(super) fn take(&mut self, name: &str) -> Option<&'a RawValue> {
        let at = self.entries.iter().position(|(n, _)| n == name)?;
        Some(self.entries.swap_remove(at).1)
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.take(name).map(|raw| string(raw, &self.place(name))).transpose()
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false")
    }

    /// A number within `range`.
    pub(super) fn float(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        float(raw, &self.place(name), range).map(Some)
    }

    /// A whole number within `range`.
    pub(super) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let what = format!("a whole number from {} to {}", range.start(), range.end());
        let place = self.place(name);
        match self.typed::<i64>(name, &what)? {
            Some(n) if !range.contains(&n) => {
                Err(ApiError::invalid(&*place, format!("`{place}` must be {what}, not {n}")))
            }
            n => Ok(n),
        }
    }

    pub(super) fn typed<T: Deserialize<'a>>(
        &mut self,
        name: &str,
        what: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        let place = self.place(name);
        let error = |_| ApiError::invalid(&*place, format!("`{place}` must be {what}"));
        serde_json::from_str(raw.get()).map(Some).map_err(error)
    }

    /// A field that is accepted only when it asks for nothing.
    pub(super) fn only(
        &mut self,
        name: &str,
        nothing: impl FnOnce(&RawValue) -> bool,
        hint: &str,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(raw) if !nothing(raw) => {
                let place = self.place(name);
                Err(ApiError::unsupported(
                    &*place,
                    format!("`{place}` is not supported{}{hint}", if hint.is_empty() { "" } else { ": " }),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Ends the reading: what is left must be in `harmless`, which don't change the answer.
    pub(super) fn finish(self, harmless: &[&str]) -> Result<(), ApiError> {
        match self.entries.iter().find(|(name, _)| !harmless.contains(&&**name)) {
            Some((name, _)) => Err(ApiError::unknown_field(self.place(name))),
            None => Ok(()),
        }
    }
}

pub(super) fn kind(raw: &RawValue) -> Kind {
    match raw.get().as_bytes().first() {
        Some(b'"') => Kind::String,
        Some(b'[') => Kind::Array,
        Some(b'{') => Kind::Object,
        _ => Kind::Other,
    }
}

pub(super) fn string(raw: &RawValue, place: &str) -> Result<String, ApiError> {
    serde_json::from_str(raw.get())
        .map_err(|_| ApiError::invalid(place, format!("`{place}` must be a string")))
}

pub(super) fn float(raw: &RawValue, place: &str, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
    let what = format!("a number from {} to {}", range.start(), range.end());
    let value: f32 = serde_json::from_str(raw.get())
        .map_err(|_| ApiError::invalid(place, format!("`{place}` must be {what}")))?;
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(ApiError::invalid(place, format!("`{place}` must be {what}, not {value}")))
    }
}

/// An array's elements, at most `max`.
pub(super) fn array<'a, T: Deserialize<'a>>(
    raw: &'a RawValue,
    place: &str,
    max: usize,
    what: &str,
) -> Result<Vec<T>, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    let elements = deserializer.deserialize_seq(Bounded(max, PhantomData));
    let error = |e: serde_json::Error| {
        let message = if e.to_string().starts_with(TOO_MANY) {
            format!("`{place}` has more than {max} elements")
        } else {
            format!("`{place}` must be {what}")
        };
        ApiError::invalid(place, message)
    };
    elements.map_err(error)
}

/// An object's entries as they stand in the text.
pub(super) struct Entries<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

const TOO_MANY: &str = "too many elements";

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                #[derive(Deserialize)]
                struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

                let mut entries = Vec::new();
                while let Some((Name(name), raw)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    if entries.len() == FIELDS_MAX {
                        return Err(A::Error::custom(format_args!("more than {FIELDS_MAX} fields")));
                    }
                    entries.push((name, raw));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct Bounded<T>(usize, PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            if elements.len() == self.0 {
                return Err(A::Error::custom(TOO_MANY));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}
