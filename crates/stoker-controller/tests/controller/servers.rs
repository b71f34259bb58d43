//! Several servers: where models start, and what becomes of them when a server goes.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use stoker_controller::Event;
use stoker_types::{Refusal, StartFailure};
use tokio::{task::JoinSet, time::sleep};

use crate::common::{Rig, admit, model, name};

/// Where each model is, as people are told.
fn places(rig: &Rig) -> BTreeMap<String, String> {
    rig.handle.instances().into_iter().map(|i| (i.model.to_string(), i.device)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_model_starts_where_its_weights_are() {
    let rig = Rig::new(4000, vec![model("a", 2000), model("b", 2000)]);
    let (second, _) = rig.join("two", 4000);
    second.hold("b", 2000);
    // Known before it is asked for: the snapshot has to be there.
    rig.turn().await;
    rig.touch("b").await;
    rig.touch("a").await;
    assert_eq!(places(&rig)["b"], "two/cpu");
    let explained = rig.handle.explain(&name("b")).unwrap();
    let start = explained.decisions.iter().find(|record| record.event == Event::Start).unwrap();
    assert!(start.terms.starts_with("on two/cpu: "), "{}", start.terms);
}

#[tokio::test(start_paused = true)]
async fn a_free_server_comes_before_making_room() {
    let rig = Rig::new(10, vec![model("a", 10), model("b", 10), model("c", 10)]);
    let (second, _) = rig.join("two", 10);
    rig.touch("a").await;
    sleep(Duration::from_mins(1)).await;
    rig.touch("b").await;
    assert_eq!((rig.node.stops().len(), second.stops().len()), (0, 0), "there was room elsewhere");
    assert_eq!(rig.node.starts().len() + second.starts().len(), 2);
    // Now somebody has to go: the one that was idle for longer.
    sleep(Duration::from_mins(1)).await;
    rig.touch("b").await;
    rig.touch("c").await;
    let places = places(&rig);
    assert!(places.contains_key("b") && places.contains_key("c"), "{places:?}");
}

#[tokio::test(start_paused = true)]
async fn two_that_come_at_once_get_a_server_each() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10), model("b", 10)]));
    let (second, _) = rig.join("two", 10);
    let (a, b) = tokio::join!(rig.admit("a"), rig.admit("b"));
    drop((a.unwrap(), b.unwrap()));
    assert_eq!((rig.node.starts().len(), second.starts().len()), (1, 1));
    assert_eq!(rig.handle.status().slots, 8);
}

#[tokio::test(start_paused = true)]
async fn only_the_larger_server_will_do() {
    let rig = Rig::new(10, vec![model("a", 30)]);
    let refusal = rig.admit("a").await.err().unwrap();
    assert!(matches!(refusal, Refusal::TooLarge { .. }), "{refusal}");
    let (second, _) = rig.join("large", 40);
    rig.touch("a").await;
    assert_eq!(second.starts(), ["a"]);
    assert_eq!(rig.node.starts().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_one_server_cannot_start_another_does() {
    let rig = Rig::new(10, vec![model("a", 10)]);
    let (second, _) = rig.join("two", 10);
    rig.turn().await;
    rig.node.fail_next("a", StartFailure::Worker { model: name("a"), detail: "exit code 1".into() });
    rig.touch("a").await;
    assert_eq!((rig.node.starts().len(), second.starts().len()), (1, 1));
    assert_eq!(places(&rig)["a"], "two/cpu");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_takes_its_instances_and_nobody_waits_for_ever() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10)]));
    let held = rig.admit("a").await.unwrap();
    let (second, key) = rig.join("two", 10);
    rig.handle.leave(rig.first, "it was switched off");
    assert!(rig.states().is_empty());
    let again = rig.admit("a").await.unwrap();
    assert_eq!(second.starts(), ["a"]);
    assert_ne!(held.instance(), again.instance());
    let explained = rig.handle.explain(&name("a")).unwrap();
    let lost = explained.decisions.iter().find(|record| record.event == Event::Lost).unwrap();
    assert_eq!(lost.terms, "it was switched off");
    // A seat of an instance that is gone is given back like any other.
    drop(held);
    assert_eq!(rig.handle.status().in_flight, 1);
    drop(again);
    assert_eq!(rig.handle.status().in_flight, 0);

    // A start that is under way goes with its server, too, and who waits for it waits on.
    rig.handle.unload(&name("a"), false).await.unwrap();
    second.set_load("a", Duration::from_secs(30));
    let waiter = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { rig.admit("a").await.is_ok() }
    });
    sleep(Duration::from_secs(1)).await;
    rig.handle.leave(key, "so was this one");
    sleep(Duration::from_secs(1)).await;
    assert!(!waiter.is_finished(), "there is no server, but there may be one soon");
    let (third, _) = rig.join("three", 10);
    assert!(waiter.await.unwrap());
    assert_eq!(third.starts(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn without_any_server_it_is_said_so() {
    let rig = Rig::new(10, vec![model("a", 10)]);
    rig.handle.leave(rig.first, "gone");
    let refusal = rig.admit("a").await.err().unwrap();
    assert!(refusal.to_string().contains("no server has joined"), "{refusal}");
}

/// Servers come and go under load: every request gets a seat or a refusal, and no server is ever asked for more than it has.
#[tokio::test(start_paused = true)]
async fn servers_come_and_go_under_load() {
    let models = || (0..6).map(|n| model(&format!("m{n}"), 8 + n)).collect();
    let rig = Arc::new(Rig::new(20, models()));
    let mut clients = JoinSet::new();
    for client in 0..24u64 {
        let rig = Arc::clone(&rig);
        clients.spawn(async move {
            let mut answered = 0;
            for turn in 0..30u64 {
                let which = (client * 7 + turn * 5) % 6;
                let mut admit = admit(&format!("m{which}"));
                admit.wait_max = Duration::from_secs(100_000);
                match rig.admit_as(admit).await {
                    Ok(seat) => {
                        sleep(Duration::from_millis(50 + (client + turn) % 7 * 300)).await;
                        drop(seat);
                        answered += 1;
                    }
                    Err(refusal) => assert!(!refusal.to_string().is_empty()),
                }
            }
            answered
        });
    }
    for turn in 0..12u64 {
        let (_, key) = rig.join(&format!("s{turn}"), 10 + turn * 3);
        sleep(Duration::from_secs(3 + turn % 4)).await;
        if turn % 3 != 0 {
            rig.handle.leave(key, "it went");
        }
    }
    let answered: u32 = clients.join_all().await.into_iter().sum();
    assert!(answered > 24 * 25, "{answered} of 720");
    assert_eq!(rig.handle.status().in_flight, 0);
    assert_eq!(rig.handle.status().waiting, 0);
}
