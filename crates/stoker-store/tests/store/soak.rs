//! Thousands of random operations, against a plain model of the cache, and again many at a time.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use crate::common::{CHUNK, Fixture, Model, Random};
use stoker_checkpoint::Trust;
use stoker_io::{Fault, FaultKind};
use stoker_store::{LoadError, Priority, Resident, StreamOptions};
use stoker_types::ByteSize;
use tokio_util::sync::CancellationToken;

const BUDGET: usize = 14;

fn models(fixture: &Fixture, random: &mut Random) -> Vec<Model> {
    let lens = [1, 100, CHUNK, 2 * CHUNK - 1, 3 * CHUNK + 4097, 5 * CHUNK, 7 * CHUNK + 1, 9 * CHUNK];
    (0..8)
        .map(|i| {
            let second = random.below(2 * CHUNK);
            let trust = if i % 2 == 0 { Trust::Chunk } else { Trust::None };
            fixture.model(&format!("model{i}"), &[lens[i], second], trust)
        })
        .collect()
}

fn slots(model: &Model) -> usize {
    model.files.order().len()
}

fn random_fault(random: &mut Random, models: &[Model]) -> Fault {
    let model = random.below(models.len());
    let at = random.next() % models[model].content[0].len() as u64;
    // Wrong bytes go unseen where nothing is known of the right ones, so only models with sums get them.
    let kind = match random.below(if model.is_multiple_of(2) { 4 } else { 2 }) {
        0 => FaultKind::Error(io::ErrorKind::Other),
        1 => FaultKind::Truncate,
        _ => FaultKind::Corrupt { bits: 1 << random.below(8) },
    };
    let times = u32::try_from(random.below(4)).unwrap() + 1;
    Fault { path: format!("model{model}-0"), bytes: at..at + 1, times, kind }
}

/// One thing at a time: what succeeds, what is held and how much is in use is known exactly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_operations_against_a_plain_model() {
    let fixture = Fixture::new(BUDGET as u64);
    let mut random = Random(7);
    let models = models(&fixture, &mut random);
    let mut guards: Vec<(usize, Resident)> = Vec::new();
    let mut pinned = HashSet::new();
    let mut budget = BUDGET;
    let mut outcomes: HashMap<&str, usize> = HashMap::new();

    for step in 0..2000 {
        let i = random.below(models.len());
        let model = &models[i];
        let name = &model.files.key().name;
        match random.below(20) {
            0..7 => {
                // What the cache must say, from what is held, pinned and allowed.
                let held: HashSet<_> = guards.iter().map(|(i, _)| *i).collect();
                let in_memory = |j: usize| {
                    let all = fixture.store.stats().residency;
                    let found = all.into_iter().find(|r| r.model == models[j].files.key().name);
                    found.map_or(0, |r| usize::try_from(r.slots.bytes() / CHUNK as u64).unwrap())
                };
                let others: usize =
                    held.iter().filter(|j| **j != i).map(|j| slots(&models[*j])).sum::<usize>()
                        + pinned
                            .iter()
                            .filter(|j| **j != i && !held.contains(*j))
                            .map(|j| in_memory(*j))
                            .sum::<usize>();
                let complete =
                    fixture.store.stats().residency.iter().any(|r| r.model == *name && r.resident == r.total);
                let fits = others + slots(model) <= budget;
                match fixture.load(model).await {
                    Ok(resident) => {
                        assert!(complete || fits, "step {step}: loaded without room");
                        fixture.check(model, &resident);
                        guards.push((i, resident));
                        *outcomes.entry("loaded").or_default() += 1;
                    }
                    Err(error) => {
                        assert!(!complete, "step {step}: {error}, though it was in memory");
                        assert_eq!(
                            matches!(error, LoadError::OutOfBudget { .. }),
                            !fits,
                            "step {step}: {error}"
                        );
                        *outcomes.entry(error.name()).or_default() += 1;
                    }
                }
            }
            7..13 if !guards.is_empty() => {
                let (i, guard) = guards.swap_remove(random.below(guards.len()));
                fixture.check(&models[i], &guard);
            }
            13 => {
                let held = guards.iter().any(|(j, _)| *j == i);
                let evicted = fixture.store.evict(name).await;
                assert_eq!(evicted.held == ByteSize::ZERO, !held, "step {step}");
            }
            14 => {
                if pinned.insert(i) {
                    fixture.store.pin(name);
                } else {
                    pinned.remove(&i);
                    fixture.store.unpin(name);
                }
            }
            15 | 16 => {
                fixture.faults.add(random_fault(&mut random, &models));
                // What is in memory isn't read, so that the faults would bite nobody.
                fixture.store.drop_all().await;
            }
            17 => fixture.faults.clear(),
            18 => {
                budget = 8 + random.below(BUDGET - 7);
                fixture.store.set_budget(ByteSize((budget * CHUNK) as u64)).await;
            }
            _ => match fixture.store.begin(&model.files, Priority::Prefetch) {
                // Given up at a random moment of its life.
                Ok(loading) => {
                    let mut watermark = loading.watermark();
                    let upto = random.next() % (watermark.total().bytes() + 1);
                    let _ = watermark.wait_for(ByteSize(upto)).await;
                    drop(loading);
                }
                Err(error) => assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}"),
            },
        }
        let stats = fixture.store.stats();
        let held: HashSet<_> = guards.iter().map(|(i, _)| *i).collect();
        for i in &held {
            let found = stats.residency.iter().find(|r| r.model == models[*i].files.key().name).unwrap();
            assert_eq!(found.resident, found.total, "step {step}: a held model lost chunks");
            assert_eq!(found.holds, guards.iter().filter(|(j, _)| j == i).count(), "step {step}");
        }
        let taken: u64 = stats.residency.iter().map(|r| r.slots.bytes()).sum();
        assert!(
            stats.used.bytes() - taken <= 3 * CHUNK as u64,
            "step {step}: at most cancelled reads on their way back"
        );
        let held_slots: usize = held.iter().map(|i| slots(&models[*i])).sum();
        assert!(stats.mapped.bytes() >= (held_slots * CHUNK) as u64);
        assert!(stats.used <= ByteSize((BUDGET * CHUNK) as u64));
        assert_eq!(stats.loading, 0, "step {step}");
    }
    for (i, guard) in &guards {
        fixture.check(&models[*i], guard);
    }
    // Every path has been taken.
    for outcome in ["loaded", "out_of_budget", "read", "corrupt"] {
        assert!(outcomes.get(outcome).is_some_and(|count| *count >= 3), "{outcome}: {outcomes:?}");
    }
    drop(guards);
    finish(fixture).await;
}

/// Many at a time: contents stay right, nothing hangs, nothing leaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_operations_at_once() {
    let fixture = Arc::new(Fixture::new(BUDGET as u64));
    let models = Arc::new(models(&fixture, &mut Random(11)));
    let tasks: Vec<_> = (0..5)
        .map(|seed| {
            let (fixture, models) = (Arc::clone(&fixture), Arc::clone(&models));
            tokio::spawn(async move {
                let mut random = Random(seed);
                for _ in 0..200 {
                    one_of_many(&fixture, &models, &mut random).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    finish(Arc::into_inner(fixture).unwrap()).await;
}

async fn one_of_many(fixture: &Fixture, models: &[Model], random: &mut Random) {
    let model = &models[random.below(models.len())];
    let name = &model.files.key().name;
    match random.below(16) {
        0..6 => match fixture.load(model).await {
            Ok(resident) => {
                for _ in 0..random.below(20) {
                    tokio::task::yield_now().await;
                }
                fixture.check(model, &resident);
            }
            Err(error) => assert!(
                matches!(
                    error,
                    LoadError::OutOfBudget { .. } | LoadError::Read { .. } | LoadError::Corrupt { .. }
                ),
                "{error}"
            ),
        },
        6..9 => {
            let cancel = CancellationToken::new();
            let Ok(loading) = fixture.store.begin(&model.files, Priority::Prefetch) else { return };
            let turns = random.below(50);
            let canceller = cancel.clone();
            let cancelling = tokio::spawn(async move {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
                canceller.cancel();
            });
            if let Ok(resident) = loading.wait(&cancel).await {
                fixture.check(model, &resident);
            }
            cancelling.await.unwrap();
        }
        9 | 10 => {
            let options = StreamOptions {
                ring_chunks: 1 + random.below(4),
                fresh: random.below(2) == 0,
                ..Default::default()
            };
            let Ok(mut stream) = fixture.store.stream(&model.files, options) else { return };
            let last = random.below(2 * slots(model));
            let mut seen = 0;
            while let Ok(Some(chunk)) = stream.next().await {
                let at = chunk.at();
                let content = model.content[at.file as usize].chunks(CHUNK).nth(at.index as usize).unwrap();
                assert!(*chunk == *content);
                seen += 1;
                if seen > last {
                    return;
                }
            }
        }
        11 => drop(fixture.store.evict(name).await),
        12 => {
            fixture.store.pin(name);
            tokio::task::yield_now().await;
            fixture.store.unpin(name);
        }
        13 => fixture.faults.add(random_fault(random, models)),
        14 => fixture.faults.clear(),
        _ => {
            let budget = 8 + random.below(BUDGET - 7);
            fixture.store.set_budget(ByteSize((budget * CHUNK) as u64)).await;
        }
    }
}

/// Nothing is left, and everything still works.
async fn finish(fixture: Fixture) {
    fixture.faults.clear();
    fixture.store.set_budget(ByteSize((BUDGET * CHUNK) as u64)).await;
    let all = fixture.model("all", &[BUDGET * CHUNK], Trust::Chunk);
    for i in 0..8 {
        fixture.store.unpin(&stoker_types::ModelName::new(&format!("model{i}")).unwrap());
    }
    // A model that needs every slot: were one leaked, it would not fit, or never come.
    let resident = fixture.load(&all).await.unwrap();
    fixture.check(&all, &resident);
    drop(resident);
    fixture.store.drop_all().await;
    let stats = fixture.store.stats();
    assert_eq!((stats.used, stats.mapped, stats.loading), (ByteSize::ZERO, ByteSize::ZERO, 0));
    assert!(stats.residency.is_empty());
}
