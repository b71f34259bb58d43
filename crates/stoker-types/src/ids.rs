//! Names and numbers that identify things.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// The name a model is asked for by, such as `smollm2:135m` or `team/summariser@v3`.
///
/// At most 128 bytes of ASCII letters, digits and `._:/@-`, beginning with a letter or digit, without an empty,
/// `.` or `..` segment between slashes. A name is never used as a path: see `stoker_registry` for the directory
/// that a name maps to.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(Arc<str>);

/// Why a string is no [`ModelName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` is not a model name: use at most 128 letters, digits and `._:/@-`, beginning with a letter or digit"
)]
pub struct InvalidName {
    /// What was given, cut to 160 bytes and with control characters escaped.
    pub name: String,
}

/// A server of a cluster, such as `gpu-17`: its host name, or whatever it was given.
///
/// At most 63 bytes of ASCII letters, digits and `._-`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(Arc<str>);

/// Why a string is no [`NodeId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` is not a node's name: use at most 63 letters, digits and `._-`, beginning with a letter or digit"
)]
pub struct InvalidNodeId {
    /// What was given, cut to 160 bytes and with control characters escaped.
    pub name: String,
}

/// Who asks, for limits and fairness: an API key's name, or the peer's address where there are no keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClientId(pub Arc<str>);

/// A request, unguessable, as in the response's `id` and in the `id:` lines of its event stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub Arc<str>);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// One copy of a model on one server, from its start order until it is gone. Never reused.
    InstanceId(u64), "i"
);
number!(
    /// Distinguishes successive uses of one thing (a worker serving one model after another), so that a message
    /// that arrives late is recognised. Grows.
    Generation(u64), "g"
);
number!(
    /// A leader's term: the store's revision at which it began. Grows; what an earlier term ordered is refused.
    Epoch(u64), "e"
);
number!(
    /// A worker process of one node. Never reused within the node's life.
    WorkerId(u32), "w"
);
number!(
    /// Where instances of a server compute: the position in its list of devices. A server without devices computes from
    /// its memory, which is number 0.
    DeviceId(u32), "d"
);

// === impl ModelName ===

impl ModelName {
    /// Longest name, in bytes.
    pub const LEN_MAX: usize = 128;

    /// Checks and wraps a name.
    ///
    /// # Errors
    /// [`InvalidName`] when it breaks the rules in the type's documentation.
    pub fn new(name: &str) -> Result<Self, InvalidName> {
        let ok = !name.is_empty()
            && name.len() <= Self::LEN_MAX
            && name.as_bytes()[0].is_ascii_alphanumeric()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/@-".contains(&b))
            && name.split('/').all(|s| !matches!(s, "" | "." | ".."));
        if ok { Ok(Self(name.into())) } else { Err(InvalidName { name: shown(name) }) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for ModelName {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        Self::new(s)
    }
}

impl TryFrom<String> for ModelName {
    type Error = InvalidName;
    fn try_from(s: String) -> Result<Self, InvalidName> {
        Self::new(&s)
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> Self {
        name.0.to_string()
    }
}

/// What was given, safe to show: at most 160 bytes, control characters escaped.
fn shown(name: &str) -> String {
    let mut shown: String = name.chars().take(40).flat_map(char::escape_default).collect();
    shown.truncate(160);
    shown
}

// === impl NodeId ===

impl NodeId {
    /// Longest name, in bytes.
    pub const LEN_MAX: usize = 63;

    /// Checks and wraps a name.
    ///
    /// # Errors
    /// [`InvalidNodeId`] when it breaks the rules in the type's documentation.
    pub fn new(name: &str) -> Result<Self, InvalidNodeId> {
        let ok = name.len() <= Self::LEN_MAX
            && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if ok { Ok(Self(name.into())) } else { Err(InvalidNodeId { name: shown(name) }) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for NodeId {
    type Error = InvalidNodeId;
    fn try_from(s: String) -> Result<Self, InvalidNodeId> {
        Self::new(&s)
    }
}

impl From<NodeId> for String {
    fn from(node: NodeId) -> Self {
        node.0.to_string()
    }
}

// === impl ClientId, RequestId ===

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_accepted() {
        for name in ["smollm2:135m", "a", "Team/Model-1.5@v3", "x_y", &"a".repeat(128)] {
            assert_eq!(ModelName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_are_refused() {
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            ".hidden",
            "a b",
            "a\0b",
            "modèle",
            &"a".repeat(129),
        ] {
            assert!(ModelName::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn names_of_nodes() {
        for name in ["gpu-17", "10.0.0.3", "a", &"a".repeat(63)] {
            assert_eq!(NodeId::new(name).unwrap().as_str(), name);
        }
        for name in ["", "-a", "a/b", "a b", "é", &"a".repeat(64)] {
            assert!(NodeId::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_refused_name_is_shown_without_control_characters() {
        let error = ModelName::new("a\u{1b}[31m\n").unwrap_err();
        assert!(!error.to_string().contains(['\u{1b}', '\n']));
    }
}
