//! The tiers below memory: this machine's disks, and remote stores.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoker_types::ByteSize;

use super::Environment;

/// Prefixes of the variables that say how stores are reached: those of the stores' own tools.
const STORE_PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

/// `[[ssd_dirs]]`: a directory on another disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SsdDirEntry {
    /// The directory.
    pub(crate) path: PathBuf,
    /// What copies may take there.
    #[serde(deserialize_with = "size")]
    pub(crate) budget: ByteSize,
}

/// `[remote]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RemoteTable {
    /// Most bytes a second.
    #[serde(deserialize_with = "super::file::size")]
    pub(crate) bandwidth: Option<ByteSize>,
    /// Most reads under way at a time.
    pub(crate) reads: Option<usize>,
}

fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
    super::file::size(deserializer)?.ok_or_else(|| serde::de::Error::custom("a size is missing"))
}

/// How stores are reached, by the names that their own tools have for it, in lower case. What the environment doesn't say
/// of S3 is looked for in the profile that it names, or the default one.
pub(crate) fn store_settings(environment: &Environment) -> Vec<(String, String)> {
    let mut settings: Vec<(String, String)> = environment
        .all()
        .filter(|(name, _)| STORE_PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let profile = environment.get("AWS_PROFILE").unwrap_or("default");
    let below_home = |name: &str| environment.get("HOME").map(|home| Path::new(home).join(".aws").join(name));
    let file = |variable: &str, name: &str| {
        environment.get(variable).map(PathBuf::from).or_else(|| below_home(name))
    };
    for (path, section) in [
        (file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), profile.to_owned()),
        // In this file the default profile alone goes without the word.
        (
            file("AWS_CONFIG_FILE", "config"),
            if profile == "default" { profile.to_owned() } else { format!("profile {profile}") },
        ),
    ] {
        let text = path.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        // Half a pair of keys from here would be worse than none.
        let has_keys = settings.iter().any(|(key, _)| key == "aws_access_key_id");
        for (key, value) in section_of(&text, &section) {
            let key = match key {
                "region" => "aws_region".to_owned(),
                "endpoint_url" => "aws_endpoint_url".to_owned(),
                key => key.to_owned(),
            };
            let known = settings.iter().any(|(k, _)| *k == key)
                || has_keys && (key.contains("key") || key.contains("token"));
            if key.starts_with("aws_") && !known {
                settings.push((key, value.to_owned()));
            }
        }
    }
    settings
}

/// Keys and values of a section of an INI file.
fn section_of<'a>(text: &'a str, section: &str) -> Vec<(&'a str, &'a str)> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = name.trim() == section;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            found.push((key.trim(), value.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_from_the_environment_then_from_the_profile() {
        let home = tempfile::tempdir().unwrap();
        let aws = home.path().join(".aws");
        std::fs::create_dir(&aws).unwrap();
        std::fs::write(
            aws.join("credentials"),
            "[default]\naws_access_key_id = d\naws_secret_access_key = e\n[other]\naws_access_key_id=o\n",
        )
        .unwrap();
        std::fs::write(aws.join("config"), "[profile other]\nregion = r2\n# x = y\n[default]\nregion=r1\n")
            .unwrap();
        let home = home.path().to_str().unwrap();
        let of = |pairs: &[(&str, &str)]| {
            let mut all = vec![("HOME", home), ("PATH", "/bin")];
            all.extend(pairs);
            let environment = Environment::from_pairs(&all);
            let mut settings = store_settings(&environment);
            settings.sort();
            settings.into_iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>()
        };
        assert_eq!(of(&[]), ["aws_access_key_id=d", "aws_region=r1", "aws_secret_access_key=e"]);
        assert_eq!(
            of(&[("AWS_PROFILE", "other")]),
            ["aws_access_key_id=o", "aws_profile=other", "aws_region=r2"]
        );
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("GOOGLE_BUCKET", "g")];
        assert_eq!(
            of(&keys),
            ["aws_access_key_id=a", "aws_region=r1", "aws_secret_access_key=b", "google_bucket=g"]
        );
    }
}
