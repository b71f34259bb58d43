//! Names that are known without a configuration.

use std::collections::BTreeMap;

use serde::Deserialize;
use stoker_types::ModelName;

use crate::source::{BadSource, SourceUri};

const BUILT_IN: &str = include_str!("aliases.toml");

/// A source and what must come from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinnedSource {
    /// Where from.
    pub uri: SourceUri,
    /// SHA-256 of the model file in lower-case hexadecimal; `None`: whatever the source says.
    pub sha256: Option<String>,
}

/// A table of aliases.
#[derive(Debug, Clone)]
pub struct Aliases(BTreeMap<ModelName, Vec<PinnedSource>>);

/// Why a table of aliases can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadAliases {
    /// It isn't such a table.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A source that can't be read.
    #[error("alias `{alias}`: {source}")]
    Source {
        /// Whose.
        alias: ModelName,
        /// Why.
        source: BadSource,
    },
    /// A hash that isn't one.
    #[error("alias `{alias}`: `{sha256}` is not a SHA-256 in lower-case hexadecimal")]
    Hash {
        /// Whose.
        alias: ModelName,
        /// The text.
        sha256: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    source: String,
    sha256: Option<String>,
}

// === impl Aliases ===

impl Aliases {
    /// Those that come with Stoker.
    ///
    /// # Panics
    /// Never: a test reads the same table.
    #[must_use]
    pub fn built_in() -> Self {
        match Self::parse(BUILT_IN) {
            Ok(aliases) => aliases,
            Err(error) => unreachable!("the table that was compiled in is wrong: {error}"),
        }
    }

    /// Reads a table like `aliases.toml`.
    ///
    /// # Errors
    /// [`BadAliases`].
    pub fn parse(text: &str) -> Result<Self, BadAliases> {
        let table: BTreeMap<ModelName, Vec<Line>> = toml::from_str(text)?;
        let mut aliases = BTreeMap::new();
        for (alias, lines) in table {
            let mut sources = Vec::new();
            for Line { source, sha256 } in lines {
                if let Some(sha256) = sha256.as_ref().filter(|text| !is_sha256(text)) {
                    return Err(BadAliases::Hash { alias, sha256: sha256.clone() });
                }
                match source.parse() {
                    Ok(uri) => sources.push(PinnedSource { uri, sha256 }),
                    Err(source) => return Err(BadAliases::Source { alias, source }),
                }
            }
            aliases.insert(alias, sources);
        }
        Ok(Self(aliases))
    }

    /// The sources of a name, in order.
    #[must_use]
    pub fn get(&self, name: &ModelName) -> Option<&[PinnedSource]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &ModelName> {
        self.0.keys()
    }
}

pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_is_right() {
        let aliases = Aliases::built_in();
        let sources = aliases.get(&ModelName::new("smollm2:135m").unwrap()).unwrap();
        assert!(matches!(sources[0].uri, SourceUri::Hub { .. }));
        assert!(matches!(sources[1].uri, SourceUri::Package { .. }));
        assert!(sources.iter().all(|s| s.sha256.is_some()));
        assert!(aliases.get(&ModelName::new("nobody").unwrap()).is_none());
    }

    #[test]
    fn wrong_tables_are_refused() {
        for text in [
            "a = 1",
            "[[a]]\nsource = \"hf:x\"",
            "[[a]]\nsource = \"hf:o/n\"\nsha256 = \"ABC\"",
            "[[a]]\nsource = \"hf:o/n\"\nmirror = \"x\"",
            "[[\"../a\"]]\nsource = \"hf:o/n\"",
        ] {
            assert!(Aliases::parse(text).is_err(), "{text}");
        }
    }
}
