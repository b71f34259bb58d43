//! What every store has to do. The same for all of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use stoker_cluster::{
    Changes, ClusterStoreExt as _, Deadline, Entry, Error, Event, Expect, LeaseId, Revision, Txn, Watch,
    limits,
};

use crate::{Store, on_both_stores, soon};

on_both_stores!(
    puts_gets_and_deletes,
    compares_and_swaps,
    commits_all_or_nothing,
    counts_every_increment,
    lists_in_pages_of_one_moment,
    watches_without_loss_or_repetition,
    a_watch_of_the_future_waits,
    forgets_history_and_says_so,
    leases_end_and_take_their_keys_along,
    a_key_has_one_lease,
    a_revoked_lease_is_gone,
    refuses_what_is_too_large,
    ends_by_the_deadline,
    behaves_like_a_map,
);

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// The next changes that are any.
async fn next(watch: &mut Watch) -> Changes {
    loop {
        let changes =
            soon().bound(watch.next()).await.expect("no changes").expect("the watch ended").unwrap();
        if !changes.events.is_empty() {
            return changes;
        }
    }
}

async fn error(watch: &mut Watch) -> Error {
    loop {
        if let Err(error) = soon().bound(watch.next()).await.expect("no error").expect("the watch ended") {
            return error;
        }
    }
}

fn keys(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| &*entry.key).collect()
}

async fn puts_gets_and_deletes(store: Store) {
    assert_eq!(store.get("a", soon()).await.unwrap(), None);
    let first = store.put("a", text("1"), soon()).await.unwrap();
    let expected = Entry { key: "a".into(), value: text("1"), created: first, modified: first, lease: None };
    assert_eq!(store.get("a", soon()).await.unwrap(), Some(expected));
    let second = store.put("a", text("2"), soon()).await.unwrap();
    assert_eq!(second, first.next());
    let entry = store.get("a", soon()).await.unwrap().unwrap();
    assert_eq!((entry.created, entry.modified, entry.value), (first, second, text("2")));

    assert!(!store.delete("b", soon()).await.unwrap());
    assert!(store.delete("a", soon()).await.unwrap());
    assert_eq!(store.get("a", soon()).await.unwrap(), None);
    // Deleting nothing made no revision; a key that comes back is a new one.
    let third = store.put("a", Bytes::new(), soon()).await.unwrap();
    assert_eq!(third, second.next().next());
    let entry = store.get("a", soon()).await.unwrap().unwrap();
    assert_eq!((entry.created, entry.value), (third, Bytes::new()));

    let odd = Bytes::from((0..=255).collect::<Vec<u8>>());
    store.put("ключ/ä %", odd.clone(), soon()).await.unwrap();
    assert_eq!(store.get("ключ/ä %", soon()).await.unwrap().unwrap().value, odd);
}

async fn compares_and_swaps(store: Store) {
    let first = store.compare_and_swap("a", Expect::Absent, text("1"), soon()).await.unwrap();
    let second = store.compare_and_swap("a", Expect::Modified(first), text("2"), soon()).await.unwrap();
    let third = store.compare_and_swap("a", Expect::Created(first), text("3"), soon()).await.unwrap();
    for (expected, found) in [
        (Expect::Absent, Some((first, third))),
        (Expect::Modified(second), Some((first, third))),
        (Expect::Created(third), Some((first, third))),
    ] {
        let key = "a".to_owned();
        let result = store.compare_and_swap("a", expected, text("no"), soon()).await;
        assert_eq!(result, Err(Error::Conflict { key, expected, found }));
    }
    let (key, expected) = ("none".to_owned(), Expect::Modified(third));
    let result = store.compare_and_swap("none", expected, text("no"), soon()).await;
    assert_eq!(result, Err(Error::Conflict { key, expected, found: None }));
    assert_eq!(store.get("a", soon()).await.unwrap().unwrap().value, text("3"));
}

async fn commits_all_or_nothing(store: Store) {
    let at = store.commit(Txn::new().put("a", text("1")).put("b", text("1")), soon()).await.unwrap().revision;
    let txn = Txn::new()
        .expect("a", Expect::Modified(at))
        .expect("b", Expect::Absent)
        .put("a", text("2"))
        .delete("b");
    let conflict = store.commit(txn, soon()).await.unwrap_err();
    assert!(matches!(conflict, Error::Conflict { key, .. } if key == "b"));
    assert_eq!(store.list_all("", 10, soon()).await.unwrap().0, at);

    let txn =
        Txn::new().expect("a", Expect::Modified(at)).put("a", text("2")).delete("b").put("c", text("1"));
    let committed = store.commit(txn, soon()).await.unwrap();
    assert_eq!((committed.revision, committed.deleted), (at.next(), 1));
    let (revision, entries) = store.list_all("", 10, soon()).await.unwrap();
    assert_eq!((revision, keys(&entries)), (at.next(), vec!["a", "c"]));
    assert!(entries.iter().all(|entry| entry.modified == at.next()));
}

async fn counts_every_increment(store: Store) {
    store.put("n", text("0"), soon()).await.unwrap();
    let one = |store: Store| async move {
        for _ in 0..10 {
            loop {
                let entry = store.get("n", soon()).await.unwrap().unwrap();
                let n: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                let value = text(&(n + 1).to_string());
                match store.compare_and_swap("n", Expect::Modified(entry.modified), value, soon()).await {
                    Ok(_) => break,
                    Err(Error::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    for task in futures::future::join_all((0..8).map(|_| tokio::spawn(one(Arc::clone(&store))))).await {
        task.unwrap();
    }
    assert_eq!(store.get("n", soon()).await.unwrap().unwrap().value, text("80"));
}

async fn lists_in_pages_of_one_moment(store: Store) {
    for chunk in (0..57).collect::<Vec<_>>().chunks(50) {
        let txn = chunk.iter().fold(Txn::new(), |txn, i| txn.put(&format!("p/{i:02}"), text("x")));
        store.commit(txn, soon()).await.unwrap();
    }
    for beside in ["p", "p0", "o/1", "q"] {
        store.put(beside, text("beside"), soon()).await.unwrap();
    }
    let mut listing = store.list("p/", 10, soon()).await.unwrap();
    let mut pages = vec![listing.pages.next().await.unwrap().unwrap()];
    // What happens now isn't seen.
    let later =
        store.commit(Txn::new().put("p/55", text("late")).put("p/99", text("late")).delete("p/56"), soon());
    let later = later.await.unwrap().revision;
    while let Some(page) = listing.pages.next().await {
        pages.push(page.unwrap());
    }
    assert!(pages.iter().all(|page| (1..=10).contains(&page.len())));
    let all = pages.concat();
    assert_eq!(keys(&all), (0..57).map(|i| format!("p/{i:02}")).collect::<Vec<_>>());
    assert!(all.iter().all(|entry| entry.value == text("x")));
    assert!(listing.revision < later);
    assert_eq!(store.list_all("p/", 100, soon()).await.unwrap().1.len(), 57);
    assert_eq!(store.list_all("", 100, soon()).await.unwrap().1.len(), 61);
    assert!(store.list_all("none/", 100, soon()).await.unwrap().1.is_empty());
    assert!(matches!(store.list_all("p/", 20, soon()).await, Err(Error::TooLarge { .. })));
}

async fn watches_without_loss_or_repetition(store: Store) {
    let first = store.put("w/a", text("1"), soon()).await.unwrap();
    let mut early = store.watch("w/", first, soon()).await.unwrap();
    let second = store.commit(Txn::new().put("w/b", text("2")).put("other", text("x")).delete("w/a"), soon());
    let second = second.await.unwrap().revision;
    store.put("wx", text("beside"), soon()).await.unwrap();
    let third = store.put("w/b", text("3"), soon()).await.unwrap();

    let changes = next(&mut early).await;
    assert_eq!((changes.revision, changes.events.len()), (first, 1));
    let changes = next(&mut early).await;
    assert_eq!(changes.revision, second);
    let put = Entry { key: "w/b".into(), value: text("2"), created: second, modified: second, lease: None };
    let mut events = changes.events;
    events.sort_by_key(|event| event.key().to_string());
    assert_eq!(events, [Event::Delete { key: "w/a".into() }, Event::Put(put)]);
    assert_eq!(next(&mut early).await.revision, third);

    // From the middle, and many at the same time with a writer.
    let mut watches = Vec::new();
    for _ in 0..4 {
        watches.push(store.watch("w/", third, soon()).await.unwrap());
    }
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for i in 0..100 {
                store.put("w/c", text(&i.to_string()), soon()).await.unwrap();
            }
        }
    });
    for watch in &mut watches {
        assert_eq!(next(watch).await.revision, third);
        for i in 0..100_u64 {
            let changes = next(watch).await;
            assert_eq!(changes.revision, Revision(third.0 + 1 + i));
            assert!(
                matches!(&changes.events[..], [Event::Put(entry)] if entry.value == text(&i.to_string()))
            );
        }
    }
    writer.await.unwrap();
}

async fn a_watch_of_the_future_waits(store: Store) {
    let now = store.put("a", text("1"), soon()).await.unwrap();
    let mut watch = store.watch("a", Revision(now.0 + 3), soon()).await.unwrap();
    for i in 0..4 {
        store.put("a", text(&i.to_string()), soon()).await.unwrap();
    }
    assert_eq!(next(&mut watch).await.revision, Revision(now.0 + 3));
}

async fn forgets_history_and_says_so(store: Store) {
    let mut revisions = Vec::new();
    for i in 0..10 {
        revisions.push(store.put(&format!("c/{}", i % 3), text(&i.to_string()), soon()).await.unwrap());
    }
    store.compact(revisions[5], soon()).await.unwrap();
    store.compact(revisions[5], soon()).await.unwrap();
    store.compact(revisions[2], soon()).await.unwrap();
    let future = store.compact(Revision(revisions[9].0 + 100), soon()).await;
    assert!(matches!(future, Err(Error::Invalid { .. })), "{future:?}");

    let compacted = match store.watch("c/", revisions[2], soon()).await {
        Ok(mut watch) => error(&mut watch).await,
        Err(error) => error,
    };
    assert_eq!(compacted, Error::Compacted { wanted: revisions[2], oldest: revisions[5] });
    // What it says is the oldest can be had, and what is stored is all there.
    let mut watch = store.watch("c/", revisions[5], soon()).await.unwrap();
    for revision in &revisions[5..] {
        assert_eq!(next(&mut watch).await.revision, *revision);
    }
    let (revision, entries) = store.list_all("c/", 10, soon()).await.unwrap();
    assert_eq!((revision, entries.len()), (revisions[9], 3));
}

async fn leases_end_and_take_their_keys_along(store: Store) {
    let lease = store.grant(Duration::from_secs(2), soon()).await.unwrap();
    assert!(lease.ttl >= Duration::from_secs(2));
    let txn = Txn::new().put_leased("l/a", text("1"), lease.id).put_leased("l/b", text("2"), lease.id);
    let put = store.commit(txn.put("l/c", text("stays")), soon()).await.unwrap().revision;
    let entry = store.get("l/a", soon()).await.unwrap().unwrap();
    assert_eq!(entry.lease, Some(lease.id));
    let mut watch = store.watch("l/", put.next(), soon()).await.unwrap();

    // Kept alive for longer than it would have lived.
    let kept = tokio::time::Instant::now();
    while kept.elapsed() < lease.ttl * 2 {
        assert_eq!(store.keep_alive(lease.id, soon()).await.unwrap(), lease.ttl);
        tokio::time::sleep(lease.ttl / 8).await;
    }
    assert!(store.get("l/a", soon()).await.unwrap().is_some());

    let mut gone = Vec::new();
    while gone.len() < 2 {
        gone.extend(next(&mut watch).await.events);
    }
    gone.sort_by_key(|event| event.key().to_string());
    assert_eq!(gone, [Event::Delete { key: "l/a".into() }, Event::Delete { key: "l/b".into() }]);
    assert_eq!(keys(&store.list_all("l/", 10, soon()).await.unwrap().1), ["l/c"]);
    let gone = Error::LeaseGone { lease: lease.id };
    assert_eq!(store.keep_alive(lease.id, soon()).await, Err(gone.clone()));
    assert_eq!(store.commit(Txn::new().put_leased("l/a", text("1"), lease.id), soon()).await, Err(gone));
}

async fn a_key_has_one_lease(store: Store) {
    let (one, two) = (
        store.grant(Duration::from_secs(60), soon()).await.unwrap().id,
        store.grant(Duration::from_secs(60), soon()).await.unwrap().id,
    );
    let put = |key: &'static str, lease| Txn::new().put_leased(key, text("x"), lease);
    store.commit(put("moves", one), soon()).await.unwrap();
    store.commit(put("moves", two), soon()).await.unwrap();
    store.commit(put("freed", one), soon()).await.unwrap();
    store.put("freed", text("y"), soon()).await.unwrap();
    store.commit(put("deleted", one), soon()).await.unwrap();
    store.delete("deleted", soon()).await.unwrap();
    store.put("deleted", text("again"), soon()).await.unwrap();
    store.commit(put("goes", one), soon()).await.unwrap();
    store.revoke(one, soon()).await.unwrap();
    let (_, entries) = store.list_all("", 10, soon()).await.unwrap();
    assert_eq!(keys(&entries), ["deleted", "freed", "moves"]);
    assert_eq!(store.get("moves", soon()).await.unwrap().unwrap().lease, Some(two));
    assert_eq!(store.get("freed", soon()).await.unwrap().unwrap().lease, None);
    store.revoke(two, soon()).await.unwrap();
    assert_eq!(store.get("moves", soon()).await.unwrap(), None);
}

async fn a_revoked_lease_is_gone(store: Store) {
    let lease = store.grant(Duration::from_secs(60), soon()).await.unwrap().id;
    let put = store.commit(Txn::new().put_leased("a", text("1"), lease), soon()).await.unwrap().revision;
    let mut watch = store.watch("a", put.next(), soon()).await.unwrap();
    store.revoke(lease, soon()).await.unwrap();
    store.revoke(lease, soon()).await.unwrap();
    assert_eq!(next(&mut watch).await.events, [Event::Delete { key: "a".into() }]);
    assert_eq!(store.keep_alive(lease, soon()).await, Err(Error::LeaseGone { lease }));
    let unknown = LeaseId(12345);
    assert_eq!(store.keep_alive(unknown, soon()).await, Err(Error::LeaseGone { lease: unknown }));
    assert!(matches!(store.grant(Duration::ZERO, soon()).await, Err(Error::Invalid { .. })));
}

async fn refuses_what_is_too_large(store: Store) {
    let long = "k".repeat(limits::KEY_LEN_MAX);
    store.put(&long, text("x"), soon()).await.unwrap();
    assert!(matches!(store.put(&format!("{long}k"), text("x"), soon()).await, Err(Error::TooLarge { .. })));
    let large = Bytes::from(vec![7; limits::VALUE_LEN_MAX]);
    store.put("large", large.clone(), soon()).await.unwrap();
    assert_eq!(store.get("large", soon()).await.unwrap().unwrap().value, large);
    let larger = Bytes::from(vec![7; limits::VALUE_LEN_MAX + 1]);
    assert!(matches!(store.put("larger", larger, soon()).await, Err(Error::TooLarge { .. })));

    let many = |count: usize| (0..count).fold(Txn::new(), |txn, i| txn.put(&format!("m/{i}"), text("x")));
    store.commit(many(limits::TXN_OPS_MAX), soon()).await.unwrap();
    assert!(matches!(store.commit(many(limits::TXN_OPS_MAX + 1), soon()).await, Err(Error::TooLarge { .. })));
    let heavy = (0..5).fold(Txn::new(), |txn, i| txn.put(&format!("h/{i}"), large.clone()));
    assert!(matches!(store.commit(heavy, soon()).await, Err(Error::TooLarge { .. })));
    // Many large values are listed all the same.
    for i in 0..80 {
        store.put(&format!("big/{i}"), large.clone(), soon()).await.unwrap();
    }
    assert_eq!(store.list_all("big/", 100, soon()).await.unwrap().1.len(), 80);

    for txn in [
        Txn::new(),
        Txn::new().put("a", text("1")).delete("a"),
        Txn::new().delete(""),
        Txn::new().delete("a\0"),
    ] {
        let result = store.commit(txn, soon()).await;
        assert!(matches!(result, Err(Error::Invalid { .. })), "{result:?}");
    }
}

async fn ends_by_the_deadline(store: Store) {
    let past = Deadline::at(tokio::time::Instant::now());
    let began = tokio::time::Instant::now();
    let write = store.put("a", text("1"), past).await;
    assert!(matches!(write, Err(Error::Unavailable { .. } | Error::UnknownOutcome { .. })), "{write:?}");
    let read = store.get("a", past).await;
    // A store may have the answer at hand.
    assert!(matches!(read, Err(Error::Unavailable { .. }) | Ok(_)), "{read:?}");
    assert!(matches!(store.keep_alive(LeaseId(1), past).await, Err(Error::Unavailable { .. })));
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// Random transactions against a map; then the watch from the beginning has to lead to the same.
async fn behaves_like_a_map(store: Store) {
    let mut rng = StdRng::seed_from_u64(5);
    let mut model = BTreeMap::<String, (Bytes, Revision, Revision)>::new();
    let mut revision = store.put("start", text(""), soon()).await.unwrap();
    let mut watch = store.watch("m/", revision, soon()).await.unwrap();
    for i in 0..400_u32 {
        let mut after = model.clone();
        let mut txn = Txn::new();
        let mut holds = true;
        let mut changed = false;
        let next = revision.next();
        for _ in 0..rng.random_range(0..3) {
            let key = format!("m/{}", rng.random_range(0..12));
            let found = model.get(&key).map(|(_, created, modified)| (*created, *modified));
            let expect = match (rng.random_range(0..4), found) {
                (0, Some((created, _))) => Expect::Created(created),
                (1 | 2, Some((_, modified))) => Expect::Modified(modified),
                (3, _) => Expect::Modified(Revision(rng.random_range(1..next.0))),
                _ => Expect::Absent,
            };
            holds &= match expect {
                Expect::Absent => found.is_none(),
                Expect::Created(at) => found.is_some_and(|(created, _)| created == at),
                Expect::Modified(at) => found.is_some_and(|(_, modified)| modified == at),
            };
            txn = txn.expect(&key, expect);
        }
        let keys = rand::seq::index::sample(&mut rng, 12, 3);
        for key in keys.iter().take(rng.random_range(1..=3)).map(|i| format!("m/{i}")) {
            if rng.random_bool(0.6) {
                let value = text(&i.to_string());
                txn = txn.put(&key, value.clone());
                let created = after.get(&key).map_or(next, |(_, created, _)| *created);
                after.insert(key, (value, created, next));
                changed = true;
            } else {
                txn = txn.delete(&key);
                changed |= after.remove(&key).is_some();
            }
        }
        match store.commit(txn, soon()).await {
            Ok(committed) => {
                assert!(holds, "step {i}");
                model = after;
                if changed {
                    revision = next;
                }
                assert_eq!(committed.revision, revision, "step {i}");
            }
            Err(Error::Conflict { .. }) => assert!(!holds, "step {i}"),
            Err(error) => panic!("step {i}: {error}"),
        }
    }
    let listed = |entries: Vec<Entry>| -> BTreeMap<_, _> {
        entries.into_iter().map(|e| (e.key.to_string(), (e.value, e.created, e.modified))).collect()
    };
    let (at, entries) = store.list_all("m/", 100, soon()).await.unwrap();
    assert_eq!((at, listed(entries)), (revision, model.clone()));

    let mut replayed = BTreeMap::new();
    let mut last = Revision(0);
    while last < revision {
        let changes = next(&mut watch).await;
        assert!(changes.revision > last);
        last = changes.revision;
        for event in changes.events {
            match event {
                Event::Put(entry) => {
                    replayed.insert(entry.key.to_string(), (entry.value, entry.created, entry.modified));
                }
                Event::Delete { key } => assert!(replayed.remove(&*key).is_some()),
            }
        }
    }
    assert_eq!(replayed, model);
}
