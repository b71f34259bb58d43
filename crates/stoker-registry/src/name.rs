//! Model names and the directories that they map to.

use stoker_types::ModelName;

/// Longest file name of the file systems that matter, bytes.
const FILE_NAME_MAX: usize = 255;

/// The directory of a model: what isn't a letter, a digit or one of `._-` is written `%XX`. Reversible; never hidden,
/// never `..`, because a model's name begins with a letter or digit. `None` when it would be longer than a file's name
/// may be.
pub(crate) fn directory(name: &ModelName) -> Option<String> {
    let mut out = String::new();
    for byte in name.as_str().bytes() {
        if byte.is_ascii_alphanumeric() || b"._-".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    (out.len() <= FILE_NAME_MAX).then_some(out)
}

/// The model of a directory; `None` for one that isn't a model's.
pub(crate) fn model(directory: &str) -> Option<ModelName> {
    let mut text = String::new();
    let mut rest = directory;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        let byte = u8::from_str_radix(rest.get(at + 1..at + 3)?, 16).ok()?;
        text.push(char::from(byte));
        rest = &rest[at + 3..];
    }
    text.push_str(rest);
    // Only the one way of writing a name counts.
    ModelName::new(&text).ok().filter(|name| self::directory(name).as_deref() == Some(directory))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_become_plain_directories() {
        let of = |name: &str| directory(&ModelName::new(name).unwrap());
        assert_eq!(of("smollm2:135m").as_deref(), Some("smollm2%3A135m"));
        assert_eq!(of("team/x@v3").as_deref(), Some("team%2Fx%40v3"));
        assert_eq!(of(&format!("a{}", ":".repeat(127))), None);
        for foreign in [".partial", "%2E%2E", "a%3a", "a%", "a%3", "lost+found", "%61"] {
            assert_eq!(model(foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn directories_read_back(name in "[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,20}(/[a-zA-Z0-9]{1,5})?") {
            let name = ModelName::new(&name).unwrap();
            prop_assert_eq!(model(&directory(&name).unwrap()), Some(name));
        }
    }
}
