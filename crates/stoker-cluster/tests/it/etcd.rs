//! What only etcd does: members that die, certificates, logins.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use stoker_cluster::{
    ClusterStore, ClusterStoreExt as _, Deadline, Election, Error, Event, Expect, HeldLease, LeaseSettings,
    Retry, Revision, Term, Txn, Watch,
    etcd::{
        Etcd, EtcdLogin, EtcdTls,
        api::{
            AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest,
            AuthUserGrantRoleRequest, Permission, auth_client::AuthClient, permission,
        },
    },
    records::LeaderRecord,
};

use crate::{
    etcd_server::{Certificates, Cluster},
    soon,
};

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// Adds one to a counter so often, each exactly once whatever happens: an answer that was lost is looked for.
async fn count(store: Etcd, name: &'static str, times: u32) {
    let end = Deadline::after(Duration::from_secs(120));
    for i in 1..=times {
        let key = format!("count/{name}");
        let mine = format!("{i}");
        loop {
            assert!(!end.passed(), "{key} at {i} after two minutes");
            let short = Deadline::after(Duration::from_secs(3));
            let entry = match store.get(&key, short).await {
                Ok(entry) => entry,
                Err(Error::Unavailable { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            // The lost answer was to this write.
            if entry.as_ref().is_some_and(|entry| entry.value == mine) {
                break;
            }
            let expect = entry.map_or(Expect::Absent, |entry| Expect::Modified(entry.modified));
            match store.compare_and_swap(&key, expect, text(&mine), short).await {
                Ok(_) => break,
                Err(error @ Error::Conflict { .. }) => assert_eq!(error.retry(), Retry::No),
                Err(error) => assert_ne!(error.retry(), Retry::No, "{error}"),
            }
        }
    }
}

/// Reads a watch until each key has its last value: every value of each key has to come once, in order.
async fn every_count(mut watch: Watch, names: &[&str], times: u32) {
    let mut seen = std::collections::BTreeMap::<String, u32>::new();
    let mut last = Revision(0);
    while seen.len() < names.len() || seen.values().any(|n| *n < times) {
        let changes = Deadline::after(Duration::from_secs(120)).bound(watch.next()).await;
        let changes = changes.expect("the watch is silent").expect("the watch ended").unwrap();
        if changes.events.is_empty() {
            continue;
        }
        assert!(changes.revision > last, "{last} and then {}", changes.revision);
        last = changes.revision;
        for event in changes.events {
            let Event::Put(entry) = event else { panic!("{event:?}") };
            let n: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
            let before = seen.insert(entry.key.to_string(), n).unwrap_or(0);
            assert_eq!(n, before + 1, "{}", entry.key);
        }
    }
}

/// The leader is killed with `-9`, twice, under writers, watches and leases.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_dies() {
    let mut cluster = Cluster::start(3).await;
    let store = cluster.store();
    let watches: Vec<_> = futures::future::join_all((0..3).map(|_| async {
        // Each over a connection of its own, to whichever member.
        cluster.store().watch("count/", Revision(1), soon()).await.unwrap()
    }))
    .await;
    let leased: Arc<dyn ClusterStore> = Arc::new(cluster.store());
    let lease =
        HeldLease::grant(&leased, &LeaseSettings::new(Duration::from_secs(10)), soon()).await.unwrap();
    leased.commit(Txn::new().put_leased("leased", text("x"), lease.id()), soon()).await.unwrap();

    let names = ["a", "b", "c"];
    let mut tasks: Vec<_> =
        names.iter().map(|name| tokio::spawn(count(cluster.store(), name, 150))).collect();
    tasks.extend(
        watches.into_iter().map(|watch| tokio::spawn(async move { every_count(watch, &names, 150).await })),
    );
    for after in [20, 70] {
        // In the middle of it, by count and not by time.
        while store
            .get("count/a", soon())
            .await
            .unwrap()
            .is_none_or(|entry| std::str::from_utf8(&entry.value).unwrap().parse::<u32>().unwrap() < after)
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let leader = cluster.leader().await;
        cluster.kill(leader);
        cluster.start_again().await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(lease.is_held());
    assert_eq!(store.get("leased", soon()).await.unwrap().unwrap().lease, Some(lease.id()));
    lease.release(soon()).await.unwrap();
    assert_eq!(store.get("leased", soon()).await.unwrap(), None);
}

/// A member that is connected and says nothing: calls and watches move to another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_freezes() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let victim = (0..3).find(|i| *i != leader).unwrap();
    let mut settings = cluster.settings();
    // It starts at a random one: let it be the victim, and know the others.
    settings.endpoints = vec![cluster.endpoints()[victim].clone()];
    let only = Etcd::new(settings.clone()).unwrap();
    settings.endpoints = vec![cluster.endpoints()[victim].clone(), cluster.endpoints()[leader].clone()];
    let stores: Vec<_> = (0..6).map(|_| Etcd::new(settings.clone()).unwrap()).collect();
    let first = only.put("a", text("1"), soon()).await.unwrap();
    let mut watches = Vec::new();
    for store in &stores {
        assert!(store.get("a", soon()).await.unwrap().is_some());
        watches.push(store.watch("a", first.next(), soon()).await.unwrap());
    }

    cluster.freeze(victim, true).await;
    // With nobody else to ask, it is unavailable, by the deadline.
    let deadline = Deadline::after(Duration::from_secs(3));
    assert!(matches!(only.get("a", deadline).await, Err(Error::Unavailable { .. })));
    let unknown = only.put("a", text("no"), Deadline::after(Duration::from_secs(1))).await;
    assert!(matches!(unknown, Err(Error::Unavailable { .. } | Error::UnknownOutcome { .. })), "{unknown:?}");
    for store in &stores {
        assert!(store.get("a", soon()).await.unwrap().is_some());
    }
    let second = stores[0].put("a", text("2"), soon()).await.unwrap();
    for watch in &mut watches {
        let changes = soon().bound(watch.next()).await.unwrap().unwrap().unwrap();
        assert_eq!((changes.revision, changes.events.len()), (second, 1));
    }
    cluster.freeze(victim, false).await;
    assert!(only.get("a", soon()).await.unwrap().is_some());
}

/// A watch whose member freezes while nothing else is asked: only HTTP/2's pings can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_notice_a_dead_peer() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let victim = (0..3).find(|i| *i != leader).unwrap();
    let mut settings = cluster.settings();
    settings.endpoints = vec![cluster.endpoints()[victim].clone(), cluster.endpoints()[leader].clone()];
    let writer = Etcd::new(EtcdOnly::of(&cluster, leader)).unwrap();
    let first = writer.put("a", text("1"), soon()).await.unwrap();
    // Some begin at the victim.
    let mut watches = Vec::new();
    for _ in 0..6 {
        let store = Etcd::new(settings.clone()).unwrap();
        watches.push(store.watch("a", first.next(), soon()).await.unwrap());
    }
    cluster.freeze(victim, true).await;
    let second = writer.put("a", text("2"), soon()).await.unwrap();
    for watch in &mut watches {
        let changes = soon().bound(watch.next()).await.expect("not noticed").unwrap().unwrap();
        assert_eq!((changes.revision, changes.events.len()), (second, 1));
    }
    cluster.freeze(victim, false).await;
}

struct EtcdOnly;

impl EtcdOnly {
    /// Settings with one member.
    fn of(cluster: &Cluster, member: usize) -> stoker_cluster::etcd::EtcdSettings {
        let mut settings = cluster.settings();
        settings.endpoints = vec![cluster.endpoints()[member].clone()];
        settings
    }
}

/// All members die: calls say so in time, and everything goes on when they are back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_dies_and_comes_back() {
    let mut cluster = Cluster::start(1).await;
    let store = cluster.store();
    let first = store.put("a", text("1"), soon()).await.unwrap();
    let mut watch = store.watch("a", first, soon()).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, first);
    cluster.kill_all();
    let began = tokio::time::Instant::now();
    let deadline = Deadline::after(Duration::from_secs(1));
    assert!(matches!(store.get("a", deadline).await, Err(Error::Unavailable { .. })));
    let write = store.put("a", text("no"), Deadline::after(Duration::from_secs(1))).await;
    // Never sent: nothing was written.
    assert!(matches!(write, Err(Error::Unavailable { .. })), "{write:?}");
    let lease = stoker_cluster::LeaseId(5);
    let alive = store.keep_alive(lease, Deadline::after(Duration::from_secs(1))).await;
    assert!(matches!(alive, Err(Error::Unavailable { .. })), "{alive:?}");
    assert!(began.elapsed() < Duration::from_secs(10));

    cluster.start_again().await;
    let second = store.put("a", text("2"), soon()).await.unwrap();
    let changes = soon().bound(watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(changes.revision, second);
    assert_eq!(store.keep_alive(lease, soon()).await, Err(Error::LeaseGone { lease }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_checked_both_ways() {
    let certificates = Certificates::make();
    let cluster = Cluster::start_with(1, Some(certificates.clone())).await;
    let store = cluster.store();
    let first = store.put("a", text("1"), soon()).await.unwrap();
    let mut watch = store.watch("a", first, soon()).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, first);

    let with = |tls: EtcdTls| {
        let mut settings = cluster.settings();
        settings.tls = Some(tls);
        Etcd::new(settings).unwrap()
    };
    let nobody = with(EtcdTls { identity: None, ..certificates.client_tls() });
    let stranger = Certificates::make();
    let stranger = with(EtcdTls { ca: Some(certificates.ca.into_bytes()), ..stranger.client_tls() });
    let distrust = with(Certificates::make().client_tls());
    for (who, store) in
        [("no certificate", nobody), ("a stranger's", stranger), ("another authority", distrust)]
    {
        let result = store.get("a", Deadline::after(Duration::from_secs(5))).await;
        assert!(matches!(result, Err(Error::Refused { .. })), "{who}: {result:?}");
    }

    let mut plain = cluster.settings();
    plain.tls = None;
    assert!(matches!(Etcd::new(plain), Err(Error::Invalid { .. })));
    let mut garbage = cluster.settings();
    garbage.tls = Some(EtcdTls { ca: Some(b"no certificate".to_vec()), identity: None, domain: None });
    let garbage = Etcd::new(garbage).map(|store| async move { store.get("a", soon()).await });
    match garbage {
        Err(error) => assert!(matches!(error, Error::Invalid { .. }), "{error}"),
        Ok(get) => assert!(get.await.is_err()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_are_checked_and_renewed() {
    let mut cluster = Cluster::start(1).await;
    let open = cluster.store();
    let login = |user: &str, password: &str| {
        let mut settings = cluster.settings();
        settings.login = Some(EtcdLogin { user: user.to_owned(), password: password.to_owned() });
        Etcd::new(settings).unwrap()
    };
    // Before authentication is on, a login changes nothing.
    let stoker = login("stoker", "secret");
    let first = stoker.put("/stoker/a", text("1"), soon()).await.unwrap();

    let mut auth = AuthClient::new(cluster.channel(0).await.unwrap());
    for (name, password) in [("root", "r00t"), ("stoker", "secret")] {
        let user = AuthUserAddRequest { name: name.to_owned(), password: password.to_owned() };
        auth.user_add(user).await.unwrap();
        auth.role_add(AuthRoleAddRequest { name: name.to_owned() }).await.unwrap();
        let grant = AuthUserGrantRoleRequest { user: name.to_owned(), role: name.to_owned() };
        auth.user_grant_role(grant).await.unwrap();
    }
    let permission = Permission {
        perm_type: permission::Type::Readwrite.into(),
        key: text("/stoker/"),
        range_end: text("/stoker0"),
    };
    let grant = AuthRoleGrantPermissionRequest { name: "stoker".to_owned(), perm: Some(permission) };
    auth.role_grant_permission(grant).await.unwrap();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();

    // The handle that was there before logs in by itself now.
    let second = stoker.put("/stoker/a", text("2"), soon()).await.unwrap();
    let mut watch = stoker.watch("/stoker/", first, soon()).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, first);
    assert_eq!(watch.next().await.unwrap().unwrap().revision, second);
    let lease = stoker.grant(Duration::from_secs(60), soon()).await.unwrap().id;
    stoker.keep_alive(lease, soon()).await.unwrap();
    for (what, result) in [
        ("another's key", stoker.get("/other", soon()).await.err()),
        ("no login", open.get("/stoker/a", soon()).await.err()),
        ("a wrong password", login("stoker", "wrong").get("/stoker/a", soon()).await.err()),
        ("nobody", login("nobody", "secret").get("/stoker/a", soon()).await.err()),
        ("another's watch", stoker.watch("/other", first, soon()).await.err()),
        ("a watch without login", open.watch("/stoker/", first, soon()).await.err()),
        ("another's write", stoker.put("/other", text("x"), soon()).await.err()),
    ] {
        assert!(matches!(result, Some(Error::Refused { .. })), "{what}: {result:?}");
    }

    // A member that starts again has forgotten its tokens: a new login, unnoticed, for calls, watch and leases.
    cluster.kill(0);
    cluster.start_again().await;
    let third = stoker.put("/stoker/a", text("3"), soon()).await.unwrap();
    let changes = soon().bound(watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((changes.revision, changes.events.len()), (third, 1));
    stoker.keep_alive(lease, soon()).await.unwrap();
}

/// A leader of ours goes on through a change of etcd's leader, or ends before the next one begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn elections_outlive_a_leader_of_etcd() {
    let mut cluster = Cluster::start(3).await;
    let candidates: Vec<_> = (0..2)
        .map(|_| Election::new(Arc::new(cluster.store()), LeaseSettings::new(Duration::from_secs(5))))
        .collect();
    let me = |name: &str| LeaderRecord { controller: name.to_owned(), address: String::new() };
    let first = candidates[0].campaign(&me("first")).await.unwrap();
    let second = tokio::spawn({
        let (election, me) = (candidates[1].clone(), me("second"));
        async move { election.campaign(&me).await.unwrap() }
    });
    let leader = cluster.leader().await;
    cluster.kill(leader);
    // Two of three are enough for a write under the fence, by whoever leads then.
    let store = cluster.store();
    let write =
        |term: &Term| Txn::new().compare(term.fence()).put("a", Bytes::from(term.epoch().0.to_string()));
    let fenced = settle(&store, write(&first)).await;
    if first.is_current() {
        fenced.unwrap();
        assert!(!second.is_finished());
        first.resign(soon()).await.unwrap();
    }
    let second = soon().bound(second).await.expect("nobody leads").unwrap();
    assert!(second.is_current());
    let view = candidates[0].observe(soon()).await.unwrap();
    assert_eq!(view.current().unwrap().epoch, second.epoch());
    cluster.start_again().await;
    settle(&store, write(&second)).await.unwrap();
}

/// Commits what does no harm twice, until somebody says what became of it.
async fn settle(store: &Etcd, txn: Txn) -> Result<(), Error> {
    let end = soon();
    loop {
        match store.commit(txn.clone(), soon()).await {
            Ok(_) => return Ok(()),
            Err(error) if error.retry() == Retry::No || end.passed() => return Err(error),
            Err(_) => {}
        }
    }
}

/// A listing that takes longer than history is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_is_overtaken_by_compaction() {
    let cluster = Cluster::start(1).await;
    let store = cluster.store();
    for i in 0..10 {
        store.put(&format!("p/{i}"), text("x"), soon()).await.unwrap();
    }
    let mut listing = store.list("p/", 4, soon()).await.unwrap();
    assert_eq!(listing.pages.next().await.unwrap().unwrap().len(), 4);
    let last = store.put("p/9", text("y"), soon()).await.unwrap();
    store.compact(last, soon()).await.unwrap();
    let error = listing.pages.next().await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Compacted { wanted, .. } if wanted == listing.revision), "{error}");
    assert!(listing.pages.next().await.is_none());
}

/// Two clusters in one etcd see nothing of each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_are_apart() {
    let cluster = Cluster::start(1).await;
    let within = |namespace: &str| {
        let mut settings = cluster.settings();
        settings.namespace = namespace.to_owned();
        Etcd::new(settings).unwrap()
    };
    let (one, two, all) = (within("/one"), within("/two"), within(""));
    let mut watch = one.watch("/stoker/", Revision(1), soon()).await.unwrap();
    two.put("/stoker/a", text("2"), soon()).await.unwrap();
    let mine = one.put("/stoker/a", text("1"), soon()).await.unwrap();
    assert_eq!(one.get("/stoker/a", soon()).await.unwrap().unwrap().value, text("1"));
    let changes = watch.next().await.unwrap().unwrap();
    assert_eq!((changes.revision, &**changes.events[0].key()), (mine, "/stoker/a"));
    let (_, entries) = all.list_all("", 10, soon()).await.unwrap();
    assert_eq!(entries.iter().map(|e| &*e.key).collect::<Vec<_>>(), ["/one/stoker/a", "/two/stoker/a"]);
    assert!(cluster.path().exists());
}

#[tokio::test]
async fn settings_that_cannot_work() {
    for endpoints in
        [vec![], vec!["nonsense".to_owned()], vec!["https://a:1".to_owned()], vec!["ftp://a:1".to_owned()]]
    {
        let settings = stoker_cluster::etcd::EtcdSettings::new(endpoints.clone());
        assert!(matches!(Etcd::new(settings), Err(Error::Invalid { .. })), "{endpoints:?}");
    }
}
