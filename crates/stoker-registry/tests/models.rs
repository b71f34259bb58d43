//! The models directory without a network.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; the helpers are no test functions")]

mod common;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use common::{gguf, name};
use sha2::{Digest, Sha256};
use stoker_checkpoint::{Trust, manifest::CHUNK_BYTES};
use stoker_registry::{FileOutcome, Listed, Registry, RegistryError};
use stoker_types::hex;

struct Place {
    dir: tempfile::TempDir,
    registry: Registry,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(dir.path().join("models")).unwrap();
    Place { dir, registry }
}

impl Place {
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn verify(&self, model: &str) -> Vec<FileOutcome> {
        let report = self.registry.verify(&name(model), &mut |_: &Path, _, _| {}).unwrap();
        report.files.into_iter().map(|f| f.outcome).collect()
    }
}

#[test]
fn a_reference_copies_nothing_and_deletes_nothing() {
    let place = place();
    let path = place.file("m.gguf", &gguf(1000));
    let entry = place.registry.add_reference(&name("team/m:1"), &path).unwrap();
    assert_eq!(entry.manifest.files[0].path, path);
    assert_eq!(entry.manifest.trust, Trust::None);
    assert_eq!(place.registry.get(&name("team/m:1")).unwrap(), entry);
    assert!(matches!(
        place.registry.add_reference(&name("team/m:1"), &path),
        Err(RegistryError::AlreadyExists { .. })
    ));
    let removed = place.registry.remove(&name("team/m:1")).unwrap();
    assert_eq!(removed.kept, std::slice::from_ref(&path));
    assert!(path.exists());
    assert_eq!(place.registry.list().unwrap(), []);
}

#[test]
fn a_foreign_file_in_a_models_directory_is_kept() {
    let place = place();
    let path = place.file("m.gguf", &gguf(10));
    let entry = place.registry.add_reference(&name("m"), &path).unwrap();
    fs::write(entry.dir.join("notes.txt"), "mine").unwrap();
    let removed = place.registry.remove(&name("m")).unwrap();
    assert_eq!(removed.kept, [path, entry.dir.join("notes.txt")]);
    assert_eq!(place.registry.list().unwrap(), []);
    place.registry.add_reference(&name("m"), &removed.kept[0]).unwrap();
}

#[test]
fn one_bad_model_hides_no_other() {
    let place = place();
    let path = place.file("m.gguf", &gguf(10));
    for model in ["a", "b", "c"] {
        place.registry.add_reference(&name(model), &path).unwrap();
    }
    fs::write(place.registry.dir().join("b/stoker.json"), "{ not json").unwrap();
    fs::create_dir(place.registry.dir().join("lost+found")).unwrap();
    let list = place.registry.list().unwrap();
    let states: Vec<_> = list.iter().map(|l| (l.name.as_str(), matches!(l.what, Listed::Known(_)))).collect();
    assert_eq!(states, [("a", true), ("b", false), ("c", true)]);
    assert!(matches!(place.registry.get(&name("b")), Err(RegistryError::Broken { .. })));
    place.registry.remove(&name("b")).unwrap();
    assert_eq!(place.registry.list().unwrap().len(), 2);
}

#[test]
fn a_name_that_is_not_there_gets_the_nearest() {
    let place = place();
    let path = place.file("m.gguf", &gguf(10));
    place.registry.add_reference(&name("llama3:8b"), &path).unwrap();
    let error = place.registry.get(&name("lama3:8b")).unwrap_err();
    assert_eq!(error.to_string(), "there is no model `lama3:8b`; did you mean `llama3:8b`?");
    assert!(matches!(place.registry.remove(&name("nothing")), Err(RegistryError::NotFound { .. })));
}

#[test]
fn verify_records_then_finds_a_flipped_byte_and_names_it() {
    let place = place();
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    let mut bytes = gguf(u32::try_from(chunk / 4 * 2).unwrap());
    let path = place.file("m.gguf", &bytes);
    place.registry.add_reference(&name("m"), &path).unwrap();
    assert_eq!(place.verify("m"), [FileOutcome::Recorded]);
    assert_eq!(place.registry.get(&name("m")).unwrap().manifest.trust, Trust::Chunk);
    assert_eq!(place.verify("m"), [FileOutcome::Sound]);

    // The byte changes and the file's times don't: as on a failing disk.
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    bytes[chunk + 5] ^= 1;
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[chunk + 5..chunk + 6], CHUNK_BYTES + 5).unwrap();
    file.set_modified(times).unwrap();
    let outcome = place.verify("m");
    let [FileOutcome::Corrupt(bad)] = &outcome[..] else { panic!("{outcome:?}") };
    assert_eq!((bad.len(), bad[0].chunk, bad[0].offset), (1, 1, CHUNK_BYTES));
    assert_ne!(bad[0].expected, bad[0].found);
    assert_eq!(bad[0].found, bad[0].found_again);
}

#[test]
fn a_replaced_file_is_indexed_anew_not_called_corrupt() {
    let place = place();
    let path = place.file("m.gguf", &gguf(1000));
    place.registry.add_reference(&name("m"), &path).unwrap();
    place.verify("m");
    let new = place.file("new.gguf", &gguf(2000));
    fs::rename(new, &path).unwrap();
    assert_eq!(place.verify("m"), [FileOutcome::Changed]);
    assert_eq!(place.verify("m"), [FileOutcome::Sound]);
    assert_eq!(place.registry.reindex_changed(&name("m")).unwrap(), None);
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"").unwrap();
}

#[test]
fn a_file_named_by_its_hash_is_checked_against_it() {
    let place = place();
    fs::create_dir(place.dir.path().join("blobs")).unwrap();
    let bytes = gguf(1000);
    let hash = hex(&Sha256::digest(&bytes));
    // As the Hugging Face cache and Ollama have it; and a name that only looks like it.
    let links = [hash.clone(), format!("sha256-{hash}"), hash[1..].to_owned()].map(|blob| {
        let link = place.dir.path().join(format!("{blob}.gguf"));
        std::os::unix::fs::symlink(place.file(&format!("blobs/{blob}"), &bytes), &link).unwrap();
        link
    });
    for (link, (trust, sha256)) in
        links.iter().zip([(Trust::File, Some(&hash)), (Trust::File, Some(&hash)), (Trust::None, None)])
    {
        let entry = place.registry.add_reference(&name("m"), link).unwrap();
        assert_eq!((entry.manifest.trust, entry.manifest.files[0].sha256.as_ref()), (trust, sha256));
        assert_eq!(place.verify("m"), [FileOutcome::Recorded]);
        assert_eq!(place.registry.get(&name("m")).unwrap().manifest.trust, Trust::Chunk);
        place.registry.remove(&name("m")).unwrap();
    }

    let other = gguf(1001);
    fs::write(&links[0], &other).unwrap();
    place.registry.add_reference(&name("m"), &links[0]).unwrap();
    let wrong = FileOutcome::WrongHash { expected: hash, found: hex(&Sha256::digest(&other)) };
    assert_eq!(place.verify("m"), [wrong]);
    assert_eq!(place.registry.get(&name("m")).unwrap().manifest.trust, Trust::File, "nothing is recorded");
    let mut manifest = place.registry.get(&name("m")).unwrap().manifest;
    manifest.files[0].sha256 = None;
    let dir = place.dir.path().join("models/m");
    manifest.write(&dir).unwrap();
    assert!(
        matches!(place.registry.get(&name("m")), Err(RegistryError::Broken { .. })),
        "a level without a hash"
    );
}

#[test]
fn sums_are_recorded_once() {
    let place = place();
    let path = place.file("m.gguf", &gguf(1000));
    place.registry.add_reference(&name("m"), &path).unwrap();
    let sum = stoker_checkpoint::ChunkSum::of(&fs::read(&path).unwrap());
    let entry = place.registry.record_sums(&name("m"), 0, vec![sum]).unwrap();
    assert_eq!(entry.manifest.trust, Trust::Chunk);
    place.registry.record_sums(&name("m"), 0, vec![sum]).unwrap();
    let other = stoker_checkpoint::ChunkSum(sum.0 ^ 1);
    assert!(place.registry.record_sums(&name("m"), 0, vec![other]).is_err());
    assert!(place.registry.record_sums(&name("m"), 1, vec![sum]).is_err());
}
