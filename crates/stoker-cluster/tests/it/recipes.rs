//! Election, membership, tables and join tokens, on both stores.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use stoker_cluster::{
    Change, Clock as _, ClusterStore, ClusterStoreExt as _, Election, Error, Expect, Faults, Faulty,
    HeldLease, JoinError, JoinTokenError, JoinTokens, LeaseSettings, ManualClock, MemberState, Membership,
    MembershipEvent, RecordError, Table, TableSettings, TableState, Txn, Update, Version, Versioned, keys,
    records::{InstanceRecord, LeaderRecord, NodeRecord},
};
use stoker_types::{ByteSize, DeviceId, Epoch, Generation, InstanceId, ModelName, NodeId};

use crate::{Store, on_both_stores, soon};

on_both_stores!(
    one_leads_and_the_next_has_a_higher_epoch,
    a_leader_without_a_store_stops_before_the_next_begins,
    a_leader_that_was_deposed_knows,
    a_candidacy_that_is_dropped_elects_nobody,
    waiting_needs_no_history_and_few_calls,
    a_lease_is_released_when_dropped,
    nodes_join_change_and_leave,
    a_node_that_restarts_takes_its_place,
    a_member_comes_back_after_an_outage,
    a_table_follows,
    a_table_says_when_it_does_not_follow,
    a_slow_subscriber_gets_the_whole_table,
    tokens_are_used_once,
);

fn controller(name: &str) -> LeaderRecord {
    LeaderRecord { controller: name.to_owned(), address: format!("{name}:7436") }
}

fn node_record(address: &str) -> NodeRecord {
    NodeRecord {
        address: address.to_owned(),
        software: "0.1.0".to_owned(),
        incarnation: 0,
        devices: Vec::new(),
        dram: ByteSize(1 << 30),
        ssd: ByteSize(1 << 40),
    }
}

fn instance(epoch: u64) -> InstanceRecord {
    InstanceRecord {
        node: NodeId::new("n").unwrap(),
        device: DeviceId(0),
        model: ModelName::new("m").unwrap(),
        generation: Generation(1),
        epoch: Epoch(epoch),
    }
}

/// The store, and a switch that takes it away from whoever has the first.
fn with_switch(store: &Store) -> (Arc<Faulty<dyn ClusterStore>>, Store) {
    let faults = Faults {
        seed: 1,
        delay_max: Duration::ZERO,
        unavailable: 1.0,
        answer_lost: 0.0,
        late: 0.0,
        lease_expired: 0.0,
        compacted: 1.0,
    };
    let faulty = Faulty::new(Arc::clone(store), faults);
    faulty.set_active(false);
    (Arc::new(faulty.clone()), Arc::new(faulty))
}

async fn one_leads_and_the_next_has_a_higher_epoch(store: Store) {
    let election = Election::new(Arc::clone(&store), LeaseSettings::leader());
    let view = election.observe(soon()).await.unwrap();
    assert_eq!(view.current(), None);
    let first = election.campaign(&controller("a")).await.unwrap();
    assert!(first.is_current());
    let seen = view.after(Epoch(0), soon()).await.unwrap();
    assert_eq!((seen.epoch, seen.record), (first.epoch(), controller("a")));

    let next = tokio::spawn({
        let election = election.clone();
        async move { election.campaign(&controller("b")).await.unwrap() }
    });
    // Longer than the lease: it is renewed, and nobody else comes in.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(first.is_current() && !next.is_finished());
    let write = |term: &stoker_cluster::Term| {
        Txn::new().compare(term.fence()).put("written", Bytes::from(term.epoch().0.to_string()))
    };
    store.commit(write(&first), soon()).await.unwrap();
    let late = write(&first);
    let lost = first.lost();
    let epoch = first.epoch();
    first.resign(soon()).await.unwrap();
    soon().bound(lost).await.unwrap();
    let second = soon().bound(next).await.unwrap().unwrap();
    assert!(second.epoch() > epoch && second.is_current());
    // What the first one still had on its way is refused.
    assert!(
        matches!(store.commit(late, soon()).await, Err(Error::Conflict { key, .. }) if key == keys::LEADER)
    );
    store.commit(write(&second), soon()).await.unwrap();
    let seen = view.after(epoch, soon()).await.unwrap();
    assert_eq!((seen.epoch, seen.record), (second.epoch(), controller("b")));
}

async fn a_leader_without_a_store_stops_before_the_next_begins(store: Store) {
    let (switch, cut_off) = with_switch(&store);
    let settings = LeaseSettings::leader();
    let term = Election::new(cut_off, settings.clone()).campaign(&controller("a")).await.unwrap();
    let began = tokio::time::Instant::now();
    switch.set_active(true);
    let lost = tokio::spawn({
        let lost = term.lost();
        async move {
            lost.await;
            tokio::time::Instant::now()
        }
    });
    let (other, me) = (Election::new(store, settings.clone()), controller("b"));
    let next = soon().bound(other.campaign(&me)).await.unwrap().unwrap();
    let elected = tokio::time::Instant::now();
    assert!(!term.is_current() && next.is_current());
    assert!(next.epoch() > term.epoch());
    let lost = lost.await.unwrap();
    assert!(lost < elected);
    assert!(lost <= began + settings.ttl, "{:?}", lost - began);
    // It comes back: that makes it no leader.
    switch.set_active(false);
    assert!(!term.is_current());
    drop(term);
    assert!(next.is_current());
}

async fn a_leader_that_was_deposed_knows(store: Store) {
    let election = Election::new(Arc::clone(&store), LeaseSettings::new(Duration::from_secs(60)));
    let term = election.campaign(&controller("a")).await.unwrap();
    // An operator removes it.
    store.delete(keys::LEADER, soon()).await.unwrap();
    soon().bound(term.lost()).await.unwrap();
    assert!(!term.is_current());
    let next = soon().bound(election.campaign(&controller("b"))).await.unwrap().unwrap();
    assert!(next.epoch() > term.epoch());
    // Dropping the old term takes nothing from the new one.
    drop(term);
    soon().bound(election.observe(soon())).await.unwrap().unwrap().after(Epoch(0), soon()).await.unwrap();
    assert!(next.is_current());
}

async fn a_candidacy_that_is_dropped_elects_nobody(store: Store) {
    let election = Election::new(Arc::clone(&store), LeaseSettings::leader());
    let term = election.campaign(&controller("a")).await.unwrap();
    let waiting = tokio::time::timeout(Duration::from_millis(500), election.campaign(&controller("b"))).await;
    assert!(waiting.is_err());
    term.resign(soon()).await.unwrap();
    // Nobody holds it, and nobody who has given up gets it.
    let third = soon().bound(election.campaign(&controller("c"))).await.unwrap().unwrap();
    let view = election.observe(soon()).await.unwrap();
    assert_eq!(view.current().unwrap().record, controller("c"));
    drop(third);
    // A dropped term is over for everybody.
    soon().bound(election.campaign(&controller("d"))).await.unwrap().unwrap();
}

/// A leader and a node whose keys are older than the history: who waits for a change asks once, not over and over.
async fn waiting_needs_no_history_and_few_calls(store: Store) {
    let (switch, counted) = with_switch(&store);
    let election = Election::new(Arc::clone(&counted), LeaseSettings::new(Duration::from_secs(60)));
    let term = election.campaign(&controller("a")).await.unwrap();
    let membership = Membership::new(Arc::clone(&counted), LeaseSettings::new(Duration::from_secs(60)));
    let node = NodeId::new("n").unwrap();
    let member = membership.join(&node, node_record("n:1"), soon()).await.unwrap();
    let mut last = store.put("x", Bytes::new(), soon()).await.unwrap();
    for _ in 0..10 {
        last = store.put("x", Bytes::new(), soon()).await.unwrap();
    }
    store.compact(last, soon()).await.unwrap();
    // Its watch begins anew.
    member.update(node_record("n:2"));
    member.update(node_record("n:1"));
    let next = tokio::spawn({
        let election = election.clone();
        async move { election.campaign(&controller("b")).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let calls = switch.counts().calls;
    assert!(calls < 60, "{calls} calls");
    assert!(term.is_current() && !next.is_finished());
    term.resign(soon()).await.unwrap();
    soon().bound(next).await.unwrap().unwrap();
}

async fn a_lease_is_released_when_dropped(store: Store) {
    let settings = LeaseSettings::new(Duration::from_secs(600));
    let lease = HeldLease::grant(&store, &settings, soon()).await.unwrap();
    let txn = Txn::new().put_leased("a", Bytes::new(), lease.id());
    let put = store.commit(txn, soon()).await.unwrap().revision;
    let mut watch = store.watch("a", put.next(), soon()).await.unwrap();
    drop(lease);
    let changes = soon().bound(futures::StreamExt::next(&mut watch)).await.unwrap().unwrap().unwrap();
    assert_eq!(changes.revision, put.next());
    assert_eq!(store.get("a", soon()).await.unwrap(), None);
}

/// The holder's own clock decides, whatever the store thinks and however late its tasks are.
#[tokio::test]
async fn a_lease_ends_by_the_holders_clock() {
    let (_dir, store) = crate::embedded_store();
    let store: Store = Arc::new(store);
    let clock = Arc::new(ManualClock::new());
    let settings = LeaseSettings {
        clock: Arc::<ManualClock>::clone(&clock),
        margin: Duration::from_secs(100),
        renew: Duration::from_secs(200),
        ..LeaseSettings::new(Duration::from_secs(1_000))
    };
    let lease = HeldLease::grant(&store, &settings, soon()).await.unwrap();
    let lost = lease.lost();
    clock.advance(Duration::from_millis(899_999));
    assert!(lease.is_held());
    clock.advance(Duration::from_millis(1));
    // At once: no task had a chance to run.
    assert!(!lease.is_held());
    soon().bound(lost).await.unwrap();
    // The store would have let it live on; it is revoked instead.
    let gone = Error::LeaseGone { lease: lease.id() };
    while store.keep_alive(lease.id(), soon()).await != Err(gone.clone()) {
        tokio::task::yield_now().await;
    }
    // Renewals push the end out.
    let lease = HeldLease::grant(&store, &settings, soon()).await.unwrap();
    for _ in 0..10 {
        let (renewed, before) = (lease.lost(), clock.now());
        clock.advance(Duration::from_secs(200));
        // Until the renewal at this time has come through: from then on it lasts 900 s more.
        let until = before + Duration::from_secs(200 + 900);
        while lease.until().is_none_or(|end| end < until) {
            tokio::task::yield_now().await;
        }
        drop(renewed);
        assert!(lease.is_held());
    }
}

async fn nodes_join_change_and_leave(store: Store) {
    let membership = Membership::new(Arc::clone(&store), LeaseSettings::node());
    let (one, two) = (NodeId::new("one").unwrap(), NodeId::new("two").unwrap());
    let first = membership.join(&one, node_record("one:1"), soon()).await.unwrap();
    let mut events = membership.watch(soon()).await.unwrap();
    let MembershipEvent::Joined { node, row } = soon().bound(events.next()).await.unwrap() else { panic!() };
    assert_eq!((&node, row.record.incarnation), (&one, first.incarnation()));
    assert_eq!(row.record.address, "one:1");
    let second = membership.join(&two, node_record("two:1"), soon()).await.unwrap();
    let joined = soon().bound(events.next()).await.unwrap();
    assert!(matches!(joined, MembershipEvent::Joined { node, .. } if node == two));

    first.update(node_record("one:2"));
    let MembershipEvent::Changed { node, row } = soon().bound(events.next()).await.unwrap() else { panic!() };
    assert_eq!((node, row.record.address.as_str()), (one.clone(), "one:2"));
    assert_eq!(row.record.incarnation, first.incarnation());
    first.leave(soon()).await.unwrap();
    let left = soon().bound(events.next()).await.unwrap();
    assert!(matches!(left, MembershipEvent::Left { node, .. } if node == one));
    assert_eq!(store.list_all(keys::NODES, 10, soon()).await.unwrap().1.len(), 1);
    drop(second);
    let left = soon().bound(events.next()).await.unwrap();
    assert!(matches!(left, MembershipEvent::Left { node, .. } if node == two));
}

async fn a_node_that_restarts_takes_its_place(store: Store) {
    let membership = Membership::new(Arc::clone(&store), LeaseSettings::node());
    let node = NodeId::new("n").unwrap();
    let old = membership.join(&node, node_record("old:1"), soon()).await.unwrap();
    let mut events = membership.watch(soon()).await.unwrap();
    soon().bound(events.next()).await.unwrap();
    // Its former process may still be there.
    let new = membership.join(&node, node_record("new:1"), soon()).await.unwrap();
    let left = soon().bound(events.next()).await.unwrap();
    assert!(matches!(&left, MembershipEvent::Left { row, .. } if row.record.address == "old:1"), "{left:?}");
    let joined = soon().bound(events.next()).await.unwrap();
    assert!(
        matches!(&joined, MembershipEvent::Joined { row, .. } if row.record.address == "new:1"),
        "{joined:?}"
    );
    let mut state = old.state();
    let displaced = MemberState::Displaced { incarnation: new.incarnation() };
    soon().bound(state.wait_for(|state| *state == displaced)).await.unwrap().unwrap();
    // What the old one does now doesn't touch the new one.
    old.update(node_record("old:2"));
    old.leave(soon()).await.unwrap();
    let key = keys::node(&node);
    let there = store.get(&key, soon()).await.unwrap().unwrap();
    assert_eq!(Versioned::<NodeRecord>::decode(&there.value).unwrap().record.address, "new:1");
    assert!(matches!(*new.state().borrow(), MemberState::Joined(_)));
}

async fn a_member_comes_back_after_an_outage(store: Store) {
    let (switch, flaky) = with_switch(&store);
    let node = NodeId::new("n").unwrap();
    let member =
        Membership::new(flaky, LeaseSettings::node()).join(&node, node_record("n:1"), soon()).await.unwrap();
    let mut events = Membership::new(Arc::clone(&store), LeaseSettings::node()).watch(soon()).await.unwrap();
    soon().bound(events.next()).await.unwrap();
    switch.set_active(true);
    let left = soon().bound(events.next()).await.unwrap();
    assert!(matches!(left, MembershipEvent::Left { .. }), "{left:?}");
    let mut state = member.state();
    soon().bound(state.wait_for(|state| *state == MemberState::Joining)).await.unwrap().unwrap();
    member.update(node_record("n:2"));
    switch.set_active(false);
    let joined = soon().bound(events.next()).await.unwrap();
    let MembershipEvent::Joined { row, .. } = joined else { panic!("{joined:?}") };
    assert_eq!((row.record.address.as_str(), row.record.incarnation), ("n:2", member.incarnation()));

    let refused = Membership::new(store, LeaseSettings::node());
    switch.set_active(true);
    let short = stoker_cluster::Deadline::after(Duration::from_millis(300));
    let never =
        Membership::new(switch.clone(), LeaseSettings::node()).join(&node, node_record("n:3"), short).await;
    assert!(matches!(never, Err(JoinError::Store(Error::Unavailable { .. }))), "{never:?}");
    drop(refused);
}

async fn a_table_follows(store: Store) {
    let write = |id: u64, epoch: u64| {
        let (store, key) = (Arc::clone(&store), keys::instance(InstanceId(id)));
        let value = Versioned::new(instance(epoch)).encode().unwrap();
        async move { store.put(&key, value, soon()).await.unwrap() }
    };
    write(1, 1).await;
    let bad = keys::instance(InstanceId(9));
    store.put(&bad, Bytes::from_static(b"{\"version\":\"7.0\"}"), soon()).await.unwrap();
    let table: Table<InstanceRecord> =
        Table::open(Arc::clone(&store), keys::INSTANCES, TableSettings::default(), soon()).await.unwrap();
    let before = table.snapshot();
    assert_eq!(before.rows.keys().map(|id| &**id).collect::<Vec<_>>(), ["1"]);
    // One that can't be read hides nothing.
    let major = RecordError::Major { kind: "instance", found: Version::new(7, 0), known: Version::new(1, 0) };
    assert_eq!(before.bad["9"].error, major);

    let mut subscription = table.subscribe();
    let second = write(2, 2).await;
    let Update::Delta(delta) = soon().bound(subscription.next()).await.unwrap() else { panic!() };
    let [Change::Put { id, row, before: None }] = &delta.changes[..] else { panic!("{delta:?}") };
    assert_eq!((&**id, row.record.epoch, row.modified, delta.revision), ("2", Epoch(2), second, second));
    assert!(delta.generation > before.generation);
    let third = write(1, 3).await;
    let Update::Delta(delta) = soon().bound(subscription.next()).await.unwrap() else { panic!() };
    let [Change::Put { before: Some(was), .. }] = &delta.changes[..] else { panic!("{delta:?}") };
    assert_eq!(was.record.epoch, Epoch(1));
    store.put(&bad, Versioned::new(instance(4)).encode().unwrap(), soon()).await.unwrap();
    store.delete(&keys::instance(InstanceId(2)), soon()).await.unwrap();
    let after = table.wait_for(soon(), |table| table.rows.contains_key("9") && !table.rows.contains_key("2"));
    let after = after.await.unwrap();
    assert!(after.bad.is_empty() && after.generation > delta.generation);
    assert_eq!(table.get("1").unwrap().modified, third);
    // Whoever holds a snapshot keeps it as it was.
    assert_eq!(before.rows.len(), 1);
    assert_eq!(*table.state().borrow(), TableState::Following);
    // What a row says is what a compare-and-swap takes.
    let value = Versioned::new(instance(5)).encode().unwrap();
    let key = keys::instance(InstanceId(1));
    store.compare_and_swap(&key, Expect::Modified(third), value, soon()).await.unwrap();
    let five = table.wait_for(soon(), |t| t.rows["1"].record.epoch == Epoch(5)).await.unwrap();
    assert_eq!(five.resyncs, 0);
}

async fn a_table_says_when_it_does_not_follow(store: Store) {
    let (switch, flaky) = with_switch(&store);
    let first = Versioned::new(instance(1)).encode().unwrap();
    store.put(&keys::instance(InstanceId(1)), first, soon()).await.unwrap();
    switch.set_active(true);
    let short = stoker_cluster::Deadline::after(Duration::from_millis(200));
    let settings = TableSettings::default();
    let never = Table::<InstanceRecord>::open(Arc::clone(&flaky), keys::INSTANCES, settings, short).await;
    assert!(matches!(never, Err(Error::Unavailable { .. })), "{never:?}");
    switch.set_active(false);
    let opened = Table::<InstanceRecord>::open(Arc::clone(&flaky), keys::INSTANCES, settings, soon()).await;
    let table = opened.unwrap();
    // A watch that can't begin, or is overtaken and can't be read anew.
    switch.set_active(true);
    let second = Versioned::new(instance(2)).encode().unwrap();
    store.put(&keys::instance(InstanceId(1)), second, soon()).await.unwrap();
    let mut state = table.state();
    let failing = |state: &TableState| matches!(state, TableState::Failing(Error::Unavailable { .. }));
    soon().bound(state.wait_for(failing)).await.expect("it doesn't say so").unwrap();
    // It answers with what it has.
    assert_eq!(table.get("1").unwrap().record.epoch, Epoch(1));
    switch.set_active(false);
    table.wait_for(soon(), |table| table.rows["1"].record.epoch == Epoch(2)).await.unwrap();
    soon().bound(state.wait_for(|state| *state == TableState::Following)).await.unwrap().unwrap();
}

async fn a_slow_subscriber_gets_the_whole_table(store: Store) {
    let settings = TableSettings { backlog: 4, ..TableSettings::default() };
    let table: Table<InstanceRecord> =
        Table::open(Arc::clone(&store), keys::INSTANCES, settings, soon()).await.unwrap();
    let mut slow = table.subscribe();
    for id in 0..40 {
        let value = Versioned::new(instance(id)).encode().unwrap();
        store.put(&keys::instance(InstanceId(id)), value, soon()).await.unwrap();
    }
    table.wait_for(soon(), |table| table.rows.len() == 40).await.unwrap();
    let Update::Behind(snapshot) = slow.next().await else { panic!("not behind") };
    assert_eq!(snapshot.rows.len(), 40);
    // What the snapshot has shown doesn't come again.
    store.delete(&keys::instance(InstanceId(7)), soon()).await.unwrap();
    let Update::Delta(delta) = soon().bound(slow.next()).await.unwrap() else { panic!("behind again") };
    assert_eq!(delta.generation, snapshot.generation + 1);
    assert!(matches!(&delta.changes[..], [Change::Removed { id, .. }] if &**id == "7"));
    let settings = TableSettings { rows_max: 10, ..settings };
    let small = Table::<InstanceRecord>::open(store, keys::INSTANCES, settings, soon()).await;
    assert!(matches!(small, Err(Error::TooLarge { .. })));
}

async fn tokens_are_used_once(store: Store) {
    let tokens = JoinTokens::new(Arc::clone(&store));
    let (one, two) = (NodeId::new("one").unwrap(), NodeId::new("two").unwrap());
    let at = Duration::from_secs;
    let single = tokens.create(None, true, at(0), soon()).await.unwrap();
    // Only its hash is in the store.
    let (_, entries) = store.list_all("", 10, soon()).await.unwrap();
    assert!(
        entries.iter().all(
            |e| !e.key.contains(&single) && !e.value.windows(20).any(|w| w == &single.as_bytes()[20..40])
        )
    );
    tokens.redeem(&single, &one, at(1), soon()).await.unwrap();
    for node in [&one, &two] {
        let again = tokens.redeem(&single, node, at(1), soon()).await;
        assert_eq!(again, Err(JoinTokenError::Used { node: one.clone() }));
    }
    assert_eq!(tokens.redeem("stoker-join-00", &one, at(1), soon()).await, Err(JoinTokenError::Unknown));

    let expiring = tokens.create(Some(at(100)), false, at(0), soon()).await.unwrap();
    for node in [&one, &two] {
        tokens.redeem(&expiring, node, at(99), soon()).await.unwrap();
    }
    assert_eq!(tokens.redeem(&expiring, &one, at(100), soon()).await, Err(JoinTokenError::Expired));
    let removed = tokens.create(None, false, at(0), soon()).await.unwrap();
    assert!(tokens.remove(&removed, soon()).await.unwrap());
    assert_eq!(tokens.redeem(&removed, &one, at(1), soon()).await, Err(JoinTokenError::Unknown));

    // Of many at the same time, one.
    let contested = tokens.create(Some(at(100)), true, at(0), soon()).await.unwrap();
    let attempts = (0..8).map(|i| {
        let (tokens, contested) = (tokens.clone(), contested.clone());
        tokio::spawn(async move {
            let node = NodeId::new(&format!("n{i}")).unwrap();
            tokens.redeem(&contested, &node, at(1), soon()).await
        })
    });
    let results = futures::future::join_all(attempts).await;
    let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert_eq!(good.len(), 1);
    assert!(bad.iter().all(|bad| matches!(bad, Err(JoinTokenError::Used { .. }))), "{bad:?}");

    assert_eq!(tokens.prune(at(1_000), at(100), soon()).await, Ok(2));
    assert_eq!(tokens.prune(at(10), at(100), soon()).await, Ok(1));
    assert!(store.list_all(keys::JOIN_TOKENS, 10, soon()).await.unwrap().1.is_empty());
}
