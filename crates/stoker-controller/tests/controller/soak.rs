//! Ten thousand requests in virtual time, with everything going wrong at random. The fake node checks budgets and
//! busy instances at every order.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{Rig, admit, keep, model, name};
use stoker_types::{ClientId, KeepAlive, NodeEvent, Refusal, StartFailure};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

/// Splitmix64: the same seed, the same history.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

const MODELS: u64 = 8;

#[derive(Clone, Copy, PartialEq)]
enum Machine {
    Steady,
    /// Others take its memory and give it back.
    Unsteady,
}

/// One request every `gap_max / 2` on average.
async fn soak(
    seed: u64,
    requests: u64,
    gap_max: Duration,
    machine: Machine,
) -> BTreeMap<&'static str, usize> {
    let mut random = Random(seed);
    let gap_us = u64::try_from(gap_max.as_micros()).unwrap();
    let models = (0..MODELS)
        .map(|m| {
            let mut model = model(&format!("m{m}"), 3 + m % 4 * 2);
            model.settings.instances_max = 1 + u32::from(m % 3 == 0);
            model.settings.priority = i32::from(m == 1);
            model.settings.keep_alive = if m == 2 { KeepAlive::Forever } else { keep(m * 3) };
            model
        })
        .collect();
    let rig = Arc::new(Rig::new(16, models));
    for m in 0..MODELS {
        rig.node.set_load(&format!("m{m}"), Duration::from_millis(20 + m * 200));
    }
    let ended = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for number in 0..requests {
        sleep(Duration::from_micros(random.below(gap_us))).await;
        let model = format!("m{}", random.below(MODELS));
        match random.below(200) {
            0 => {
                let ready = rig.node.ready();
                if !ready.is_empty() {
                    let at = random.below(ready.len() as u64);
                    rig.node.kill(ready[usize::try_from(at).unwrap()], true);
                }
            }
            1 => rig
                .node
                .fail_next(&model, StartFailure::Worker { model: name(&model), detail: "at random".into() }),
            2 => rig
                .node
                .fail_next(&model, StartFailure::Corrupt { model: name(&model), detail: "at random".into() }),
            3 => rig.node.answer_busy(2),
            4 => {
                let _ = rig.handle.unload(&name(&model), false).await;
            }
            5 => rig.handle.pin(&name("m0")).unwrap(),
            6 => rig.handle.unpin(&name("m0")).unwrap(),
            // The machine has less or more, and mostly nobody says so.
            7 if machine == Machine::Unsteady => rig.node.leave(4 + random.below(13)),
            8 => rig.node.say(NodeEvent::ResidencyChanged),
            _ => {}
        }
        let mut admit = admit(&model);
        admit.client = ClientId(format!("c{}", random.below(5)).into());
        admit.sequences = u32::try_from(1 + random.below(5)).unwrap();
        admit.wait_max = Duration::from_millis(100 + random.below(60_000));
        let hold = Duration::from_micros(random.below(1_500_000));
        let gives_up = (random.below(10) == 0).then(|| Duration::from_micros(random.below(3_000_000)));
        let (rig, ended) = (Arc::clone(&rig), Arc::clone(&ended));
        clients.spawn(async move {
            let served = async {
                let used = rig.admit_as(admit).await?;
                sleep(hold).await;
                drop(used);
                Ok(())
            };
            let outcome = match timeout(gives_up.unwrap_or(Duration::MAX), served).await {
                Ok(Ok(())) => "served",
                Err(_) => "gave up",
                Ok(Err(Refusal::QueueFull { .. })) => "queue full",
                Ok(Err(Refusal::NotInTime { .. })) => "not in time",
                Ok(Err(Refusal::Start(StartFailure::OutOfMemory { .. }))) => "no room",
                Ok(Err(Refusal::Start(_))) => "start failed",
                Ok(Err(refusal)) => panic!("request {number}: {refusal}"),
            };
            ended.fetch_add(1, Ordering::Relaxed);
            outcome
        });
    }
    let mut outcomes: BTreeMap<&'static str, usize> = BTreeMap::new();
    for outcome in clients.join_all().await {
        *outcomes.entry(outcome).or_default() += 1;
    }
    assert_eq!(ended.load(Ordering::Relaxed), usize::try_from(requests).unwrap(), "every request ends once");
    rig.handle.unpin(&name("m0")).unwrap();
    rig.node.leave(16);
    sleep(Duration::from_secs(120)).await;
    let status = rig.handle.status();
    assert_eq!((status.in_flight, status.waiting), (0, 0));
    let left: Vec<String> = rig.handle.instances().into_iter().map(|i| i.model.to_string()).collect();
    assert!(left.iter().all(|model| model == "m2"), "only who stays for ever stays: {left:?}");
    assert_eq!(rig.node.live(), left.len(), "controller and node agree");
    outcomes.insert("starts", rig.node.starts().len());
    outcomes
}

/// Twice the sequences that there are seats for: queues fill and deadlines pass, but nothing breaks.
#[tokio::test(start_paused = true)]
async fn overloaded_every_request_ends_once_and_nothing_is_overcommitted() {
    let outcomes = soak(1, 10_000, Duration::from_millis(200), Machine::Steady).await;
    println!("{outcomes:?}");
    for outcome in ["served", "gave up", "not in time", "start failed"] {
        assert!(outcomes.get(outcome).is_some_and(|n| *n > 100), "hardly met `{outcome}`: {outcomes:?}");
    }
}

/// Half of the sequences that there are seats for, eight models in memory for two or three.
#[tokio::test(start_paused = true)]
async fn with_enough_seats_most_are_served() {
    let outcomes = soak(2, 10_000, Duration::from_millis(800), Machine::Steady).await;
    println!("{outcomes:?}");
    assert!(outcomes["served"] > 7000, "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn whatever_others_take_of_the_memory_every_request_ends_once() {
    let outcomes = soak(3, 10_000, Duration::from_millis(800), Machine::Unsteady).await;
    println!("{outcomes:?}");
    assert!(outcomes["served"] > 4000 && outcomes["no room"] > 500, "{outcomes:?}");
}

/// The meta test: one seed, one history.
#[tokio::test(start_paused = true)]
async fn a_seed_repeats_itself() {
    let gap = Duration::from_millis(200);
    let history = || soak(7, 500, gap, Machine::Unsteady);
    assert_eq!(history().await, history().await);
}
