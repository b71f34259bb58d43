//! What only the embedded store does.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use stoker_cluster::{
    ClusterStore as _, ClusterStoreExt as _, Embedded, EmbeddedSettings, Error, Event, ManualClock,
    OpenError, Revision, Txn,
};

use crate::soon;

fn open(path: &Path) -> Embedded {
    Embedded::open(path, EmbeddedSettings::default()).unwrap()
}

#[tokio::test]
async fn what_was_written_is_there_again_and_leases_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let store = open(&path);
    let first = store.put("a", Bytes::from_static(b"1"), soon()).await.unwrap();
    let lease = store.grant(Duration::from_secs(600), soon()).await.unwrap().id;
    let txn = Txn::new().put_leased("leased", Bytes::from_static(b"2"), lease);
    let second = store.commit(txn, soon()).await.unwrap().revision;
    store.close().await;

    let store = open(&path);
    let (revision, entries) = store.list_all("", 10, soon()).await.unwrap();
    // The lease's key went, at a revision of its own.
    assert_eq!(revision, second.next());
    assert_eq!(entries.len(), 1);
    assert_eq!((&*entries[0].key, entries[0].modified), ("a", first));
    assert_eq!(store.keep_alive(lease, soon()).await, Err(Error::LeaseGone { lease }));
    // History is not kept: whoever watched lists again.
    assert!(matches!(store.watch("", second, soon()).await, Err(Error::Compacted { .. })));
    assert_eq!(store.put("b", Bytes::new(), soon()).await.unwrap(), revision.next());
    // Opening it without leased keys changes nothing.
    store.close().await;
    let store = open(&path);
    assert_eq!(store.list_all("", 10, soon()).await.unwrap().0, revision.next());
}

#[tokio::test]
async fn a_second_opener_learns_who_has_it() {
    let (dir, store) = crate::embedded_store();
    let path = dir.path().join("cluster.redb");
    let error = Embedded::open(&path, EmbeddedSettings::default()).unwrap_err();
    let OpenError::Held { holder, .. } = &error else { panic!("{error}") };
    assert!(holder.contains(&format!("pid {}", std::process::id())), "{holder}");
    // Another handle is a clone.
    let other = store.clone();
    store.put("a", Bytes::new(), soon()).await.unwrap();
    assert!(other.get("a", soon()).await.unwrap().is_some());
    store.close().await;
    let closed = Error::Unavailable { reason: "the store is closed".to_owned() };
    assert_eq!(other.get("a", soon()).await, Err(closed.clone()));
    assert_eq!(other.put("a", Bytes::new(), soon()).await, Err(closed));
    assert!(open(&path).get("a", soon()).await.unwrap().is_some());
}

#[tokio::test]
async fn files_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let store = open(&path);
    for i in 0..50 {
        store.put(&format!("k{i}"), Bytes::from(vec![1; 1_000]), soon()).await.unwrap();
    }
    store.close().await;
    let whole = std::fs::read(&path).unwrap();
    let mut magic = whole.clone();
    magic[..4].fill(0);
    for (what, bytes) in [
        ("text", b"not a database, and longer than a header of one would have to be".to_vec()),
        ("no magic number", magic),
        ("the beginning", whole[..100].to_vec()),
    ] {
        std::fs::write(&path, bytes).unwrap();
        match Embedded::open(&path, EmbeddedSettings::default()) {
            Err(OpenError::Damaged { .. } | OpenError::Io { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }
    let nowhere = Embedded::open(&dir.path().join("none/c.redb"), EmbeddedSettings::default());
    assert!(matches!(nowhere, Err(OpenError::Io { .. })));
}

/// Bytes that have changed on the disk: an error, or all that was written but the very last, never something else.
#[tokio::test]
async fn damage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let store = open(&path);
    for i in 0..200 {
        store.put(&format!("k{i}"), Bytes::from(vec![b'x'; 100]), soon()).await.unwrap();
    }
    store.close().await;
    let whole = std::fs::read(&path).unwrap();
    let used: Vec<usize> = (0..whole.len()).filter(|i| whole[*i] != 0).collect();
    let mut rng = StdRng::seed_from_u64(3);
    let mut refused = 0;
    for _ in 0..150 {
        let mut damaged = whole.clone();
        for _ in 0..rng.random_range(1..20) {
            damaged[used[rng.random_range(0..used.len())]] ^= 1 << rng.random_range(0..8);
        }
        std::fs::write(&path, &damaged).unwrap();
        match Embedded::open(&path, EmbeddedSettings::default()) {
            Ok(store) => {
                let (_, entries) = store.list_all("", 10_000, soon()).await.unwrap();
                assert!((198..=200).contains(&entries.len()), "{} of 200", entries.len());
                for entry in entries {
                    let i: u64 = entry.key.strip_prefix('k').unwrap().parse().unwrap();
                    assert_eq!((entry.modified, &*entry.value), (Revision(i + 2), &[b'x'; 100][..]));
                }
                store.put("new", Bytes::new(), soon()).await.unwrap();
                store.close().await;
            }
            Err(OpenError::Damaged { .. } | OpenError::Io { .. } | OpenError::Newer { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0);
}

#[tokio::test]
async fn leases_run_by_the_given_clock() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new());
    let settings =
        EmbeddedSettings { clock: Arc::<ManualClock>::clone(&clock), ..EmbeddedSettings::default() };
    let store = Embedded::open(&dir.path().join("c.redb"), settings).unwrap();
    let lease = store.grant(Duration::from_secs(3_600), soon()).await.unwrap();
    let longer = store.grant(Duration::from_secs(7_200), soon()).await.unwrap();
    let txn = Txn::new().put_leased("a", Bytes::new(), lease.id).put_leased("b", Bytes::new(), longer.id);
    let put = store.commit(txn, soon()).await.unwrap().revision;
    let mut watch = store.watch("", put.next(), soon()).await.unwrap();

    clock.advance(Duration::from_secs(3_599));
    assert_eq!(store.keep_alive(lease.id, soon()).await, Ok(lease.ttl));
    clock.advance(Duration::from_secs(3_599));
    assert_eq!(store.keep_alive(lease.id, soon()).await, Ok(lease.ttl));
    clock.advance(Duration::from_secs(3_600));
    // Both are over now: each at a revision of its own, in the order in which they ended.
    for (key, revision) in [("b", put.next()), ("a", put.next().next())] {
        let changes = soon().bound(watch.next()).await.unwrap().unwrap().unwrap();
        assert_eq!((changes.events, changes.revision), (vec![Event::Delete { key: key.into() }], revision));
    }
    assert_eq!(store.keep_alive(lease.id, soon()).await, Err(Error::LeaseGone { lease: lease.id }));
}

#[tokio::test]
async fn history_is_bounded_and_slow_watches_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let settings = EmbeddedSettings { history_events_max: 10, ..EmbeddedSettings::default() };
    let store = Embedded::open(&dir.path().join("c.redb"), settings).unwrap();
    let first = store.put("a", Bytes::new(), soon()).await.unwrap();
    let mut slow = store.watch("", first, soon()).await.unwrap();
    let mut last = first;
    for _ in 0..30 {
        last = store.put("a", Bytes::new(), soon()).await.unwrap();
    }
    let error = slow.next().await.unwrap().unwrap_err();
    assert_eq!(error, Error::Compacted { wanted: first, oldest: Revision(last.0 - 9) });
    assert!(slow.next().await.is_none());
    let mut quick = store.watch("", Revision(last.0 - 9), soon()).await.unwrap();
    for revision in last.0 - 9..=last.0 {
        assert_eq!(quick.next().await.unwrap().unwrap().revision, Revision(revision));
    }
}

/// `kill -9` in the middle of writing: everything that was answered is there, and nothing by halves.
#[tokio::test]
async fn what_was_answered_survives_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let mut answered = 0_u64;
    for round in 0..4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "embedded::writes_until_killed", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(child.stdin.take().unwrap(), "{}", path.display()).unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let numbers = lines.by_ref().filter_map(|line| line.strip_prefix("answered ")?.parse::<u64>().ok());
        answered = numbers.take(20 + round * 7).last().expect("the child wrote nothing").max(answered);
        child.kill().unwrap();
        // What was on its way counts as well.
        answered = lines.filter_map(|l| l.strip_prefix("answered ")?.parse().ok()).max().unwrap_or(answered);
        child.wait().unwrap();

        let store = open(&path);
        let left = store.get("left", soon()).await.unwrap().unwrap();
        let right = store.get("right", soon()).await.unwrap().unwrap();
        assert_eq!((&left.value, left.modified), (&right.value, right.modified));
        let n: u64 = std::str::from_utf8(&left.value).unwrap().parse().unwrap();
        assert!(n >= answered, "{n} on disk, {answered} answered");
        answered = n;
        store.close().await;
    }
}

/// The other side of [`what_was_answered_survives_a_crash`]: it is given a path and ends by being killed.
#[tokio::test]
#[ignore = "run by what_was_answered_survives_a_crash"]
async fn writes_until_killed() {
    let mut path = String::new();
    std::io::stdin().read_line(&mut path).unwrap();
    let store = open(Path::new(path.trim()));
    let mut n: u64 = match store.get("left", soon()).await.unwrap() {
        Some(entry) => std::str::from_utf8(&entry.value).unwrap().parse().unwrap(),
        None => 0,
    };
    loop {
        n += 1;
        let value = Bytes::from(n.to_string());
        store.commit(Txn::new().put("left", value.clone()).put("right", value), soon()).await.unwrap();
        println!("answered {n}");
    }
}
