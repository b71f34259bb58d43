//! Records as they lie in the store: JSON with a version, read by older and newer Stokers alike.

use std::{collections::BTreeMap, fmt, ops::Deref, str::FromStr};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// The field that carries the version.
const VERSION: &str = "version";

/// Major and minor version of a kind of record, written `1.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Another one can't be read.
    pub major: u32,
    /// A higher one has fields that older readers don't know, and may do without.
    pub minor: u32,
}

/// A kind of record. Its JSON is an object without a field named `version`.
pub trait Record:
    Serialize + DeserializeOwned + Clone + PartialEq + fmt::Debug + Send + Sync + 'static
{
    /// What it is called in messages.
    const KIND: &'static str;
    /// What this Stoker writes.
    const VERSION: Version;
}

/// A record with its version and with what a newer Stoker put in it, which is written back as it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Versioned<T> {
    /// The version that it was read with, at least the one that this Stoker writes.
    pub version: Version,
    /// The record. Change it and encode it again.
    pub record: T,
    unknown: BTreeMap<String, Unknown>,
}

/// Fields that this Stoker doesn't know.
#[derive(Debug, Clone, PartialEq)]
enum Unknown {
    /// The whole field.
    Field(Value),
    /// Some inside of an object that it knows.
    Inside(BTreeMap<String, Unknown>),
}

/// Why bytes are no record of a kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is not JSON, or a field is missing or wrong.
    #[error("not a {kind} record: {reason}; remove the key, or write it again with this Stoker")]
    Malformed {
        /// The kind.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// It is of another major version.
    #[error("a {kind} record of version {found}, this Stoker knows {known}: run the same Stoker everywhere")]
    Major {
        /// The kind.
        kind: &'static str,
        /// The record's version.
        found: Version,
        /// Ours.
        known: Version,
    },
}

// === impl Version ===

impl Version {
    /// `major.minor`.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once('.').ok_or(())?;
        Ok(Self::new(major.parse().map_err(drop)?, minor.parse().map_err(drop)?))
    }
}

// === impl Versioned ===

impl<T: Record> Versioned<T> {
    /// A new record, in this Stoker's version.
    #[must_use]
    pub fn new(record: T) -> Self {
        Self { version: T::VERSION, record, unknown: BTreeMap::new() }
    }

    /// Reads one.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let malformed = |reason: String| RecordError::Malformed { kind: T::KIND, reason };
        let mut fields: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        let version = match fields.remove(VERSION) {
            Some(Value::String(text)) => text.parse::<Version>().ok(),
            _ => None,
        };
        let version = version.ok_or_else(|| malformed("no `version` such as \"1.0\"".to_owned()))?;
        if version.major != T::VERSION.major {
            return Err(RecordError::Major { kind: T::KIND, found: version, known: T::VERSION });
        }
        let record: T = serde_json::from_value(Value::Object(fields.clone()))
            .map_err(|error| malformed(error.to_string()))?;
        let known = object(&record).map_err(malformed)?;
        let unknown = unknown_in(&fields, &known);
        Ok(Self { version: version.max(T::VERSION), record, unknown })
    }

    /// Its bytes.
    ///
    /// # Errors
    /// [`RecordError::Malformed`] for a record that JSON can't say, such as a number that is not finite.
    pub fn encode(&self) -> Result<Bytes, RecordError> {
        let malformed = |reason: String| RecordError::Malformed { kind: T::KIND, reason };
        let mut fields = object(&self.record).map_err(malformed)?;
        restore(&mut fields, &self.unknown);
        let mut whole = Map::new();
        whole.insert(VERSION.to_owned(), Value::String(self.version.to_string()));
        whole.extend(fields);
        serde_json::to_vec(&whole).map(Bytes::from).map_err(|error| malformed(error.to_string()))
    }

    /// The same, with another record.
    #[must_use]
    pub fn with(&self, record: T) -> Self {
        Self { version: self.version, record, unknown: self.unknown.clone() }
    }
}

impl<T> Deref for Versioned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.record
    }
}

fn object<T: Serialize>(record: &T) -> Result<Map<String, Value>, String> {
    match serde_json::to_value(record).map_err(|error| error.to_string())? {
        Value::Object(fields) => Ok(fields),
        _ => Err("it is not an object".to_owned()),
    }
}

/// What is in `read` but not in what we make of it.
fn unknown_in(read: &Map<String, Value>, known: &Map<String, Value>) -> BTreeMap<String, Unknown> {
    let unknown = |(name, value): (&String, &Value)| {
        let unknown = match (value, known.get(name)) {
            (_, None) => Unknown::Field(value.clone()),
            (Value::Object(read), Some(Value::Object(known))) => {
                let inside = unknown_in(read, known);
                if inside.is_empty() {
                    return None;
                }
                Unknown::Inside(inside)
            }
            _ => return None,
        };
        Some((name.clone(), unknown))
    };
    read.iter().filter_map(unknown).collect()
}

/// Puts it back, where the object that it was in is still there.
fn restore(fields: &mut Map<String, Value>, unknown: &BTreeMap<String, Unknown>) {
    for (name, unknown) in unknown {
        match (unknown, fields.get_mut(name)) {
            (Unknown::Field(value), None) => drop(fields.insert(name.clone(), value.clone())),
            (Unknown::Inside(inside), Some(Value::Object(fields))) => restore(fields, inside),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Inner {
        depth: u32,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Probe {
        name: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inner: Option<Inner>,
    }

    impl Record for Probe {
        const KIND: &'static str = "probe";
        const VERSION: Version = Version::new(1, 2);
    }

    fn decode(value: &Value) -> Result<Versioned<Probe>, RecordError> {
        Versioned::decode(value.to_string().as_bytes())
    }

    fn written(record: &Versioned<Probe>) -> Value {
        serde_json::from_slice(&record.encode().unwrap()).unwrap()
    }

    #[test]
    fn what_a_newer_minor_added_is_written_back() {
        let newer = json!({"version": "1.7", "name": "a", "colour": "red",
            "inner": {"depth": 3, "width": 4}});
        let mut read = decode(&newer).unwrap();
        assert_eq!(written(&read), newer);
        read.record.name = "b".to_owned();
        read.record.inner = Some(Inner { depth: 5 });
        let expected = json!({"version": "1.7", "name": "b", "colour": "red",
            "inner": {"depth": 5, "width": 4}});
        assert_eq!(written(&read), expected);
        // What is taken away takes with it what was inside.
        read.record.inner = None;
        assert_eq!(written(&read), json!({"version": "1.7", "name": "b", "colour": "red"}));
    }

    #[test]
    fn an_older_minor_is_written_as_ours() {
        let read = decode(&json!({"version": "1.0", "name": "a"})).unwrap();
        assert_eq!(written(&read), json!({"version": "1.2", "name": "a"}));
    }

    #[test]
    fn what_is_no_record() {
        let major = decode(&json!({"version": "2.0", "name": 1})).unwrap_err();
        assert_eq!(
            major,
            RecordError::Major { kind: "probe", found: Version::new(2, 0), known: Version::new(1, 2) }
        );
        for value in
            [json!([]), json!({"name": "a"}), json!({"version": 1, "name": "a"}), json!({"version": "1.0"})]
        {
            assert!(matches!(decode(&value), Err(RecordError::Malformed { .. })), "{value}");
        }
        assert!(matches!(Versioned::<Probe>::decode(b"\xff"), Err(RecordError::Malformed { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Versioned::<Probe>::decode(&bytes);
        }

        #[test]
        fn records_come_back(name in ".*", depth in proptest::option::of(any::<u32>())) {
            let record = Versioned::new(Probe { name, inner: depth.map(|depth| Inner { depth }) });
            prop_assert_eq!(Versioned::decode(&record.encode().unwrap()).unwrap(), record);
        }
    }
}
