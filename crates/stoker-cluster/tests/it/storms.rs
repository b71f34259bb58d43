//! What is built on the stores while these misbehave: late calls, lost answers, writes that happen after nobody expects
//! them any more, leases that end early, watches that are overtaken by compaction.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use stoker_cluster::{
    Change, ClusterStore, ClusterStoreExt as _, Deadline, Election, Error, Expect, Faults, Faulty,
    JoinTokenError, JoinTokens, LeaseSettings, MemberState, Membership, Snapshot, Table, TableSettings, Term,
    Txn, Update, Versioned, keys,
    records::{InstanceRecord, LeaderRecord, NodeRecord},
};
use stoker_types::{ByteSize, DeviceId, Epoch, Generation, InstanceId, ModelName, NodeId};

use crate::{Store, on_both_stores, soon};

on_both_stores!(elections, elections_with_honest_leases, memberships, tables, join_tokens);

const SEEDS: [u64; 2] = [11, 12];

fn stormy(store: &Store, faults: Faults) -> (Arc<Faulty<dyn ClusterStore>>, Store) {
    let faulty = Arc::new(Faulty::new(Arc::clone(store), faults));
    (Arc::clone(&faulty), faulty)
}

/// Leaders write the log of terms, each write fenced; some are slow to notice that they lost.
async fn lead(store: Store, name: String, terms: usize, current: Option<Arc<Mutex<Vec<Arc<Term>>>>>) {
    let election = Election::new(Arc::clone(&store), LeaseSettings::leader());
    let me = LeaderRecord { controller: name.clone(), address: name.clone() };
    for _ in 0..terms {
        let term = Arc::new(election.campaign(&me).await.unwrap());
        if let Some(current) = &current {
            let mut terms = current.lock();
            if term.is_current() {
                // The leases keep their word: nobody else relies on one at the same time.
                for other in terms.iter() {
                    assert!(
                        !other.is_current() || !term.is_current(),
                        "{} and {}",
                        other.epoch(),
                        term.epoch()
                    );
                }
            }
            terms.retain(|term| term.is_current());
            terms.push(Arc::clone(&term));
        }
        for i in 0..8 {
            let value = Bytes::from(format!("{} {name} {i}", term.epoch().0));
            let key = format!("/log/{:020}/{i}", term.epoch().0);
            // It goes on when it has lost: the fence is what protects.
            let txn = Txn::new().compare(term.fence()).put("/owner", value.clone()).put(&key, value);
            match store.commit(txn, Deadline::after(Duration::from_secs(2))).await {
                Ok(_) | Err(Error::Unavailable { .. } | Error::UnknownOutcome { .. }) => {}
                Err(Error::Conflict { key, .. }) => {
                    assert_eq!(key, keys::LEADER);
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        if let Some(current) = &current {
            current.lock().retain(|other| other.epoch() != term.epoch());
        }
        if let Some(term) = Arc::into_inner(term) {
            // Whatever comes of it: the lease ends.
            term.resign(Deadline::after(Duration::from_secs(2))).await.ok();
        }
    }
}

/// Every write of an owner is of the term that led when it happened: epochs in the log of writes never fall.
async fn elections(store: Store) {
    let (mut unavailable, mut lost, mut late) = (0, 0, 0);
    for seed in SEEDS {
        let (switch, bad) = stormy(&store, Faults::stormy(seed));
        let from = store.put("/owner", Bytes::from_static(b"0"), soon()).await.unwrap();
        let mut writes = store.watch("/owner", from.next(), soon()).await.unwrap();
        let leaders = (0..4).map(|i| tokio::spawn(lead(Arc::clone(&bad), format!("c{i}"), 4, None)));
        for leader in futures::future::join_all(leaders).await {
            leader.unwrap();
        }
        switch.set_active(false);
        // Afterwards there can be a leader as ever, above all the others.
        let election = Election::new(Arc::clone(&store), LeaseSettings::leader());
        let me = LeaderRecord { controller: "last".to_owned(), address: String::new() };
        let term = soon().bound(election.campaign(&me)).await.expect("nobody can lead").unwrap();
        let end = Bytes::from(format!("{} last", term.epoch().0));
        store.commit(Txn::new().compare(term.fence()).put("/owner", end.clone()), soon()).await.unwrap();
        let (mut highest, mut seen) = (0, 0);
        'log: loop {
            let changes =
                soon().bound(futures::StreamExt::next(&mut writes)).await.unwrap().unwrap().unwrap();
            for event in changes.events {
                let stoker_cluster::Event::Put(entry) = event else { panic!("{event:?}") };
                let text = std::str::from_utf8(&entry.value).unwrap();
                let epoch: u64 = text.split(' ').next().unwrap().parse().unwrap();
                assert!(epoch >= highest, "{epoch} after {highest}");
                highest = epoch;
                seen += 1;
                if entry.value == end {
                    break 'log;
                }
            }
        }
        assert!(seen > 16, "{seen} writes");
        let counts = switch.counts();
        unavailable += counts.unavailable;
        lost += counts.answer_lost;
        late += counts.late;
        term.resign(soon()).await.unwrap();
    }
    assert!(unavailable > 0 && lost > 0 && late > 0, "{unavailable} {lost} {late}");
}

/// Where the store doesn't end leases before their time, no two rely on leading at the same time.
async fn elections_with_honest_leases(store: Store) {
    let faults = Faults { lease_expired: 0.0, ..Faults::stormy(21) };
    let (switch, bad) = stormy(&store, faults);
    let terms = Arc::new(Mutex::new(Vec::new()));
    let leaders =
        (0..4).map(|i| tokio::spawn(lead(Arc::clone(&bad), format!("c{i}"), 4, Some(Arc::clone(&terms)))));
    for leader in futures::future::join_all(leaders).await {
        leader.unwrap();
    }
    assert!(switch.counts().unavailable > 0);
}

fn node(address: &str) -> NodeRecord {
    NodeRecord {
        address: address.to_owned(),
        software: String::new(),
        incarnation: 0,
        devices: Vec::new(),
        dram: ByteSize(0),
        ssd: ByteSize(0),
    }
}

/// Nodes come, change and go; when the weather is fine again, those that are left are there as they last said.
async fn memberships(store: Store) {
    for seed in SEEDS {
        let (switch, bad) = stormy(&store, Faults::stormy(seed));
        // Renewed often, so that many renewals fail.
        let lease = LeaseSettings { renew: Duration::from_millis(100), ..LeaseSettings::node() };
        let membership = Membership::new(Arc::clone(&bad), lease);
        let table = membership.table(soon()).await.unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut members = BTreeMap::new();
        for i in 0..6 {
            let name = NodeId::new(&format!("n{i}")).unwrap();
            members.insert(i, (name.clone(), membership.join(&name, node("0"), soon()).await.unwrap()));
        }
        // Until each kind of fault that matters here has come, and some time more.
        let weathered =
            |counts: stoker_cluster::FaultCounts| counts.lease_expired > 0 && counts.answer_lost > 0;
        let mut step = 0;
        while step < 60 || !weathered(switch.counts()) {
            assert!(step < 5_000, "{:?}", switch.counts());
            step += 1;
            let i = rng.random_range(0..6);
            match (rng.random_range(0..6), members.get(&i)) {
                (0, Some(_)) => drop(members.remove(&i)),
                // A second life of one that is there displaces it.
                (1, there) => {
                    let name = NodeId::new(&format!("n{i}")).unwrap();
                    let displaced = there.map(|(_, member)| member.state());
                    let member = membership.join(&name, node(&step.to_string()), soon()).await.unwrap();
                    if let Some(mut state) = displaced {
                        let over = |state: &MemberState| matches!(state, MemberState::Displaced { .. });
                        soon().bound(state.wait_for(over)).await.expect("not displaced").unwrap();
                    }
                    members.insert(i, (name, member));
                }
                (_, Some((_, member))) => member.update(node(&step.to_string())),
                (_, None) => {}
            }
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..50))).await;
        }
        for (_, member) in members.values() {
            member.update(node("last"));
        }
        switch.set_active(false);
        let expected: BTreeMap<String, u64> =
            members.values().map(|(name, member)| (name.to_string(), member.incarnation())).collect();
        let as_expected = |rows: &Snapshot<NodeRecord>| {
            let there: BTreeMap<_, _> =
                rows.rows.iter().map(|(id, row)| (id.to_string(), row.record.incarnation)).collect();
            there == expected && rows.rows.values().all(|row| row.record.address == "last")
        };
        let settled = table.wait_for(soon(), as_expected).await;
        assert!(settled.is_some(), "{expected:?} wanted, {:?}", table.snapshot().rows);
        for (_, (_, member)) in members {
            member.leave(soon()).await.unwrap();
        }
        assert!(store.list_all(keys::NODES, 10, soon()).await.unwrap().1.is_empty());
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

/// A table that is overtaken by compaction again and again ends up as the store is, and its changes add up to it.
async fn tables(store: Store) {
    for seed in SEEDS {
        let faults = Faults { compacted: 0.1, ..Faults::stormy(seed) };
        let (switch, bad) = stormy(&store, faults);
        let table: Table<InstanceRecord> =
            Table::open(bad, keys::INSTANCES, TableSettings::default(), soon()).await.unwrap();
        let mut subscription = table.subscribe();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut written = 0;
        // Until every fault has come: how often the watch is asked is a matter of time.
        let settled = loop {
            let mut last = None;
            for _ in 0..50 {
                written += 1;
                let key = keys::instance(InstanceId(rng.random_range(0..20)));
                if rng.random_bool(0.7) {
                    let value = Versioned::new(instance(written)).encode().unwrap();
                    last = Some(store.put(&key, value, soon()).await.unwrap());
                } else {
                    store.delete(&key, soon()).await.unwrap();
                }
            }
            // For good: what was before can't be had by anybody.
            store.compact(last.unwrap(), soon()).await.unwrap();
            let end = keys::instance(InstanceId(99));
            let end =
                store.put(&end, Versioned::new(instance(seed)).encode().unwrap(), soon()).await.unwrap();
            let settled =
                table.wait_for(soon(), |table| table.revision >= end).await.expect("the table lags");
            if written >= 300 && settled.resyncs > 0 && switch.counts().compacted > 0 {
                break settled;
            }
            assert!(written < 30_000, "a fault never came");
        };
        let (_, entries) = store.list_all(keys::INSTANCES, 100, soon()).await.unwrap();
        let listed: BTreeMap<_, _> = entries
            .iter()
            .map(|e| (e.key.strip_prefix(keys::INSTANCES).unwrap().to_owned(), (e.created, e.modified)))
            .collect();
        let shown = |rows: &BTreeMap<Arc<str>, Arc<stoker_cluster::Row<InstanceRecord>>>| -> BTreeMap<_, _> {
            rows.iter().map(|(id, row)| (id.to_string(), (row.created, row.modified))).collect()
        };
        assert_eq!(shown(&settled.rows), listed);

        let mut rows = subscription.snapshot.rows.clone();
        let mut generation = subscription.snapshot.generation;
        while generation < settled.generation {
            match subscription.next().await {
                Update::Delta(delta) => {
                    assert_eq!(delta.generation, generation + 1);
                    generation = delta.generation;
                    for change in &delta.changes {
                        match change {
                            Change::Put { id, row, before } => {
                                assert_eq!(rows.insert(Arc::clone(id), Arc::clone(row)), *before);
                            }
                            Change::Removed { id, before } => {
                                assert_eq!(rows.remove(id).as_ref(), Some(before))
                            }
                        }
                    }
                }
                Update::Behind(snapshot) => {
                    rows.clone_from(&snapshot.rows);
                    generation = snapshot.generation;
                }
            }
        }
        assert_eq!(shown(&rows), listed);
        for entry in entries {
            store.delete(&entry.key, soon()).await.unwrap();
        }
    }
}

/// Whatever is lost, a single-use token lets in at most one, and that one knows.
async fn join_tokens(store: Store) {
    let (switch, bad) = stormy(&store, Faults { answer_lost: 0.2, late: 0.1, ..Faults::stormy(31) });
    let tokens = JoinTokens::new(bad);
    let weathered = |counts: stoker_cluster::FaultCounts| counts.late > 0 && counts.answer_lost > 0;
    let mut round = 0;
    while round < 10 || !weathered(switch.counts()) {
        assert!(round < 1_000, "{:?}", switch.counts());
        round += 1;
        let token = tokens.create(None, true, Duration::ZERO, soon()).await.unwrap();
        let attempts = (0..4).map(|i| {
            let (tokens, token) = (tokens.clone(), token.clone());
            tokio::spawn(async move {
                let node = NodeId::new(&format!("n{i}")).unwrap();
                tokens.redeem(&token, &node, Duration::ZERO, soon()).await.map(|()| node)
            })
        });
        let results: Vec<_> =
            futures::future::join_all(attempts).await.into_iter().map(Result::unwrap).collect();
        let winners: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
        assert_eq!(winners.len(), 1, "round {round}: {results:?}");
        for result in &results {
            if let Err(error) = result {
                assert_eq!(*error, JoinTokenError::Used { node: winners[0].clone() });
            }
        }
        let entry = store.get(&keys::join_token(&token), soon()).await.unwrap().unwrap();
        // A late write of another doesn't undo it.
        let swap =
            store.compare_and_swap(&entry.key, Expect::Modified(entry.modified), entry.value.clone(), soon());
        swap.await.unwrap();
    }
}
