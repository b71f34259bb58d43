//! A machine that has less memory than was configured, and more again.

use std::{sync::Arc, time::Duration};

use crate::common::{Rig, admit, model, name};
use stoker_types::{ByteSize, NodeEvent, Refusal, StartFailure, StopMode};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);

fn shortage(outcome: Result<crate::common::Used, Refusal>) -> (ByteSize, ByteSize, String) {
    match outcome.err().expect("there is no room") {
        Refusal::Start(StartFailure::OutOfMemory { needed, free, detail, .. }) => (needed, free, detail),
        other => panic!("{other}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_finds_less_room_than_was_known_has_idle_ones_make_some() {
    let rig = Rig::new(20, vec![model("a", 10), model("b", 10)]);
    rig.touch("a").await;
    sleep(5 * SECOND).await;
    rig.node.leave(10);
    let began = Instant::now();
    rig.touch("b").await;
    assert_eq!(rig.node.starts(), ["a", "b", "b"], "refused, and planned anew");
    assert_eq!(rig.node.stops(), [("a".to_owned(), StopMode::IfIdle)]);
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    let budget = rig.handle.status().dram_budget;
    assert_eq!((budget.configured, budget.effective), (ByteSize::mib(20), ByteSize::mib(10)));
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_any_more_is_refused_with_who_has_the_memory_until_there_is_more() {
    let rig = Rig::new(20, vec![model("a", 20)]);
    rig.node.leave(10);
    rig.node.say(NodeEvent::ResidencyChanged);
    rig.turn().await;
    for _ in 0..2 {
        let (needed, free, detail) = shortage(rig.admit("a").await);
        assert_eq!((needed, free), (ByteSize::mib(20), ByteSize::mib(10)));
        assert!(detail.contains("9.0 GiB held by pid 4312 python (not Stoker)"), "{detail}");
        let Err(refusal) = rig.handle.preload(&name("a"), SECOND).await else { panic!() };
        assert!(matches!(refusal, Refusal::Start(StartFailure::OutOfMemory { .. })), "{refusal}");
    }
    assert_eq!(rig.node.starts(), [""; 0]);
    // Nobody tells the controller; it looks before it refuses.
    rig.node.leave(20);
    rig.touch("a").await;
    assert_eq!(rig.node.starts(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_start_does_not_outlast_the_shortage() {
    let rig = Rig::new(20, vec![model("a", 20)]);
    rig.node.leave(10);
    shortage(rig.admit("a").await);
    assert_eq!(rig.node.starts(), ["a"], "the node was the first to know");
    rig.node.leave(20);
    rig.touch("a").await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_what_does_not_fit_any_more_is_told_at_once() {
    let rig = Arc::new(Rig::new(20, vec![model("a", 10), model("b", 20)]));
    let held = rig.admit("a").await.unwrap();
    let waiting = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { shortage(rig.admit("b").await) }
    });
    let preload = tokio::spawn({
        let handle = rig.handle.clone();
        async move { handle.preload(&name("b"), 60 * SECOND).await }
    });
    rig.turn().await;
    assert_eq!(rig.handle.status().waiting, 1);
    rig.node.leave(10);
    rig.node.say(NodeEvent::ResidencyChanged);
    let (needed, ..) = timeout(SECOND, waiting).await.expect("it waits for ever").unwrap();
    assert_eq!(needed, ByteSize::mib(20));
    let refusal = timeout(SECOND, preload).await.expect("it waits for ever").unwrap().unwrap_err();
    assert!(matches!(refusal, Refusal::Start(StartFailure::OutOfMemory { .. })), "{refusal}");
    // Nobody who is served is cut.
    assert_eq!((rig.node.live(), rig.node.stops().len()), (1, 0));
    drop(held);
    rig.touch("a").await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_finds_a_seat_asks_nobody() {
    let rig = Rig::new(20, vec![model("a", 10)]);
    let held = rig.admit("a").await.unwrap();
    sleep(SECOND).await;
    let looks = rig.node.looks();
    for _ in 0..3 {
        drop(rig.handle.admit(admit("a")).await.unwrap());
    }
    assert_eq!(rig.node.looks(), looks);
    drop(held);
}
