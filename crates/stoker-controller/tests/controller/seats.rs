//! Seats, queues, starts, stops: one behaviour each.

use std::{sync::Arc, time::Duration};

use crate::common::{Rig, admit, keep, model, name};
use stoker_controller::{DeviceConfig, Event, UnloadError};
use stoker_types::{
    ByteSize, ClientId, FileChange, Generation, KeepAlive, NodeEvent, Phase, Refusal, StartFailure, StopMode,
    Timeline, WorkerId,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

const SECOND: Duration = Duration::from_secs(1);

fn worker_failure(of: &str) -> StartFailure {
    StartFailure::Worker { model: name(of), detail: "signal 11".into() }
}

#[tokio::test(start_paused = true)]
async fn a_hundred_first_requests_cause_one_start() {
    let rig = Arc::new(Rig::new(64, vec![model("a", 10)]));
    let mut clients = JoinSet::new();
    for client in 0..100 {
        let rig = Arc::clone(&rig);
        clients.spawn(async move {
            let mut admit = admit("a");
            admit.client = ClientId(format!("c{}", client % 4).into());
            let used = rig.admit_as(admit).await.unwrap();
            sleep(Duration::from_millis(10)).await;
            let info = &used.seat.as_ref().unwrap().info;
            (info.instance, info.cold_start.is_some(), info.queued)
        });
    }
    let mut seats = clients.join_all().await;
    assert_eq!(rig.node.starts(), ["a"]);
    assert!(seats.iter().all(|(instance, cold, _)| *instance == seats[0].0 && *cold));
    seats.sort_by_key(|(_, _, queued)| *queued);
    assert_eq!(seats[0].2, Duration::from_millis(100));
    assert_eq!(seats[99].2, Duration::from_millis(100 + 240), "four at a time, 10 ms each");
    assert_eq!((rig.handle.status().in_flight, rig.handle.status().waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn first_come_first_served_and_nobody_overtakes() {
    let mut one = model("a", 10);
    one.settings.concurrency = 1;
    let rig = Arc::new(Rig::new(64, vec![one]));
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut clients = JoinSet::new();
    for client in 0..10 {
        let (rig, order) = (Arc::clone(&rig), Arc::clone(&order));
        clients.spawn(async move {
            sleep(Duration::from_millis(client)).await;
            let _used = rig.admit("a").await.unwrap();
            order.lock().push(client);
            sleep(SECOND).await;
        });
    }
    clients.join_all().await;
    assert_eq!(*order.lock(), (0..10).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn a_warm_request_waits_for_nothing_and_has_no_cold_start() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    let cold = rig.admit("a").await.unwrap();
    let timeline = cold.seat.as_ref().unwrap().info.cold_start.clone().unwrap();
    let phases: Vec<Phase> = timeline.phases.iter().map(|p| p.phase).collect();
    assert_eq!(phases, [Phase::Queued, Phase::Scheduled, Phase::SsdRead, Phase::Prefill]);
    assert!(timeline.phases[2].predicted.is_some());
    let before = Instant::now();
    let warm = rig.admit("a").await.unwrap();
    let info = &warm.seat.as_ref().unwrap().info;
    assert_eq!(
        (before.elapsed(), info.cold_start.is_none(), info.queued),
        (Duration::ZERO, true, Duration::ZERO)
    );
    assert_eq!(info.context, 1024);
}

#[tokio::test(start_paused = true)]
async fn an_announced_request_begins_its_start_and_is_told_of_it() {
    let rig = Rig::new(100, vec![model("a", 10)]);
    rig.node.set_load("a", Duration::from_millis(50));
    rig.handle.expect(&name("a"));
    // Its preparation takes longer than the start.
    tokio::time::sleep(Duration::from_millis(80)).await;
    let first = rig.admit("a").await.unwrap();
    assert!(first.seat.as_ref().unwrap().info.cold_start.is_some(), "the start was this request's");
    assert_eq!(first.seat.as_ref().unwrap().info.queued, Duration::ZERO);
    let second = rig.admit("a").await.unwrap();
    assert!(second.seat.as_ref().unwrap().info.cold_start.is_none());
    assert_eq!(rig.node.starts(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn an_idle_model_makes_room_after_its_minimum_residency() {
    let rig = Rig::new(10, vec![model("a", 10), model("b", 10)]);
    rig.touch("a").await;
    let before = Instant::now();
    rig.touch("b").await;
    assert_eq!(rig.node.stops(), [("a".to_owned(), StopMode::IfIdle)]);
    let waited = before.elapsed();
    assert!((2 * SECOND..Duration::from_millis(2200)).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_busy_model_is_drained_for_a_long_waiter_and_never_cut() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10), model("b", 10)]));
    let long = rig.admit("a").await.unwrap();
    let waiter = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { rig.touch("b").await }
    });
    sleep(14 * SECOND).await;
    rig.touch("a").await;
    sleep(2 * SECOND).await;
    assert_eq!(rig.states(), [("a".to_owned(), "draining")]);
    // It admits nobody new, and its stream runs on.
    let refused = timeout(SECOND, rig.admit("a")).await;
    assert!(refused.is_err());
    assert!(!waiter.is_finished());
    drop(long);
    waiter.await.unwrap();
    assert_eq!(rig.states(), [("b".to_owned(), "ready")]);
    let events: Vec<Event> =
        rig.handle.explain(&name("a")).unwrap().decisions.iter().map(|d| d.event).collect();
    assert_eq!(events, [Event::Start, Event::Ready, Event::Drain, Event::Stop, Event::Gone]);
}

#[tokio::test(start_paused = true)]
async fn a_drained_model_goes_on_when_the_waiter_leaves() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10), model("b", 10)]));
    let _long = rig.admit("a").await.unwrap();
    let waiter = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { rig.touch("b").await }
    });
    sleep(16 * SECOND).await;
    assert_eq!(rig.states(), [("a".to_owned(), "draining")]);
    waiter.abort();
    rig.touch("a").await;
    assert_eq!(rig.states(), [("a".to_owned(), "ready")]);
}

#[tokio::test(start_paused = true)]
async fn two_models_that_do_not_fit_together_alternate_in_batches() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10), model("b", 10)]));
    let mut clients = JoinSet::new();
    for client in 0..8 {
        let rig = Arc::clone(&rig);
        clients.spawn(async move {
            let mut longest = Duration::ZERO;
            for _ in 0..100 {
                let before = Instant::now();
                let used = rig.admit(if client % 2 == 0 { "a" } else { "b" }).await.unwrap();
                longest = longest.max(before.elapsed());
                sleep(Duration::from_millis(700)).await;
                drop(used);
            }
            longest
        });
    }
    let longest = clients.join_all().await.into_iter().max().unwrap();
    assert!(longest < 20 * SECOND, "somebody waited {longest:?}");
    let starts = rig.node.starts().len();
    assert!((6..30).contains(&starts), "{starts} starts for 140 s of demand on both");
}

#[tokio::test(start_paused = true)]
async fn keep_alive_ends_by_time_and_requests_may_override_it() {
    let mut short = model("a", 10);
    short.settings.keep_alive = keep(10);
    let rig = Rig::new(64, vec![short, model("b", 10)]);
    rig.touch("a").await;
    sleep(9 * SECOND).await;
    rig.touch("a").await;
    sleep(9 * SECOND).await;
    assert_eq!(rig.states(), [("a".to_owned(), "ready")]);
    sleep(2 * SECOND).await;
    assert_eq!(rig.states(), []);
    let mut at_once = admit("b");
    at_once.keep_alive = Some(keep(0));
    let used = rig.admit_as(at_once).await.unwrap();
    sleep(3600 * SECOND).await;
    assert_eq!(rig.states(), [("b".to_owned(), "ready")], "busy");
    drop(used);
    sleep(Duration::from_millis(5)).await;
    assert_eq!(rig.states(), []);
    let mut for_ever = admit("b");
    for_ever.keep_alive = Some(KeepAlive::Forever);
    drop(rig.admit_as(for_ever).await.unwrap());
    sleep(3600 * SECOND).await;
    assert_eq!(rig.states(), [("b".to_owned(), "ready")]);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_cannot_be_met_is_refused_at_once_and_the_start_goes_ahead() {
    let rig = Rig::new(64, vec![model("a", 10), model("b", 10)]);
    rig.node.set_load("a", 10 * SECOND);
    rig.node.set_load("b", 10 * SECOND);
    rig.touch("a").await;
    let mut hasty = admit("b");
    hasty.wait_max = 2 * SECOND;
    let before = Instant::now();
    let refusal = rig.admit_as(hasty.clone()).await.err().unwrap();
    assert_eq!(before.elapsed(), Duration::ZERO);
    let Refusal::NotInTime { terms, eta, .. } = refusal else { panic!("{refusal}") };
    assert!(terms.starts_with("SSD 10 MB at 1 MB/s"), "{terms}");
    assert!((9 * SECOND..12 * SECOND).contains(&eta), "{eta:?}");
    sleep(eta + SECOND).await;
    assert!(rig.admit_as(hasty).await.is_ok(), "who comes back after Retry-After finds it ready");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_slower_than_the_deadline_costs_the_request_and_not_the_start() {
    let rig = Rig::new(10, vec![model("a", 10), model("b", 10)]);
    // As the disk was when it was measured; `b` takes the room.
    rig.node.set_load("a", SECOND);
    rig.touch("a").await;
    rig.touch("b").await;
    rig.node.set_load("a", 60 * SECOND);
    let mut hasty = admit("a");
    hasty.wait_max = 5 * SECOND;
    let before = Instant::now();
    let refusal = rig.admit_as(hasty.clone()).await.err().unwrap();
    assert_eq!(before.elapsed(), 5 * SECOND, "it was worth waiting for, by what was known");
    let Refusal::NotInTime { .. } = refusal else { panic!("{refusal}") };
    assert_eq!((rig.handle.status().in_flight, rig.handle.status().waiting), (0, 0), "its seat is nobody's");
    sleep(60 * SECOND).await;
    assert_eq!(rig.states(), [("a".to_owned(), "ready")], "the load went on");
    assert!(rig.admit_as(hasty).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_wait_in_vain_says_why() {
    let rig = Rig::new(10, vec![model("a", 10), model("b", 10)]);
    let _busy = rig.admit("a").await.unwrap();
    let mut patient = admit("b");
    patient.wait_max = 5 * SECOND;
    let before = Instant::now();
    let refusal = rig.admit_as(patient).await.err().unwrap();
    assert_eq!(before.elapsed(), 5 * SECOND);
    let Refusal::NotInTime { terms, .. } = refusal else { panic!("{refusal}") };
    assert!(terms.contains("room is held by `a` (1 running)"), "{terms}");
    assert_eq!(rig.handle.status().waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn clients_that_go_leave_no_trace() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    for wait_ms in [0, 1, 50, 99, 100, 101] {
        let _ = timeout(Duration::from_millis(wait_ms), rig.admit("a")).await;
    }
    rig.turn().await;
    assert_eq!((rig.handle.status().in_flight, rig.handle.status().waiting), (0, 0));
    assert_eq!(rig.node.starts(), ["a"], "the load goes on although its client has gone");
}

#[tokio::test(start_paused = true)]
async fn queues_are_bounded_per_model_per_client_and_in_all() {
    let rig = Arc::new(Rig::with(64, vec![model("a", 10), model("b", 10)], |config, _| {
        config.queue.per_model_max = 8;
        config.queue.total_max = 10;
    }));
    rig.node.set_load("a", 60 * SECOND);
    rig.node.set_load("b", 60 * SECOND);
    let mut waiting = JoinSet::new();
    let mut enter = |model: &'static str, client: &str| {
        let rig = Arc::clone(&rig);
        let mut admit = admit(model);
        admit.client = ClientId(client.into());
        waiting.spawn(async move { rig.admit_as(admit).await.err() });
    };
    let scope = |rig: Arc<Rig>, model: &'static str, client: &'static str| async move {
        let mut admit = admit(model);
        admit.client = ClientId(client.into());
        match timeout(Duration::from_millis(1), rig.admit_as(admit)).await {
            Ok(Err(Refusal::QueueFull { scope, retry_after, .. })) => {
                assert!(retry_after >= SECOND);
                Some(scope)
            }
            _ => None,
        }
    };
    for _ in 0..4 {
        enter("a", "x");
    }
    rig.turn().await;
    assert_eq!(scope(Arc::clone(&rig), "a", "x").await.as_deref(), Some("from this client"));
    for _ in 0..4 {
        enter("a", "y");
    }
    rig.turn().await;
    assert_eq!(scope(Arc::clone(&rig), "a", "z").await.as_deref(), Some("for this model"));
    for _ in 0..2 {
        enter("b", "z");
    }
    rig.turn().await;
    assert_eq!(scope(Arc::clone(&rig), "b", "w").await.as_deref(), Some("in all"));
    waiting.abort_all();
    while waiting.join_next().await.is_some() {}
    assert_eq!(rig.handle.status().waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_may_pass_is_tried_once_more() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    rig.node.fail_next("a", worker_failure("a"));
    rig.touch("a").await;
    assert_eq!(rig.node.starts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_broken_model_fails_its_waiters_does_not_spin_and_recovers() {
    let rig = Arc::new(Rig::new(64, vec![model("a", 10)]));
    let corrupt = StartFailure::Corrupt { model: name("a"), detail: "chunk 3".into() };
    rig.node.fail_next("a", corrupt.clone());
    rig.node.fail_next("a", corrupt.clone());
    let mut clients = JoinSet::new();
    for _ in 0..5 {
        let rig = Arc::clone(&rig);
        clients.spawn(async move { rig.admit("a").await.err() });
    }
    for refusal in clients.join_all().await {
        assert_eq!(refusal, Some(Refusal::Start(corrupt.clone())));
    }
    for _ in 0..50 {
        assert_eq!(rig.admit("a").await.err(), Some(Refusal::Start(corrupt.clone())));
    }
    assert_eq!(rig.node.starts().len(), 1, "backs off");
    sleep(SECOND).await;
    assert!(rig.admit("a").await.is_err());
    assert_eq!(rig.node.starts().len(), 2);
    sleep(SECOND).await;
    assert!(rig.admit("a").await.is_err(), "the second back-off is longer");
    assert_eq!(rig.node.starts().len(), 2);
    sleep(SECOND).await;
    rig.touch("a").await;
    assert_eq!(rig.handle.explain(&name("a")).unwrap().failure, None);
}

#[tokio::test(start_paused = true)]
async fn changed_files_refuse_who_waits_and_serve_who_asks_again() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    let changed =
        StartFailure::Changed { model: name("a"), file: "a.gguf".into(), change: FileChange::Written };
    rig.node.fail_next("a", changed.clone());
    // Not started once more behind the back of who waits: its tokens are the old model's.
    assert_eq!(rig.admit("a").await.err(), Some(Refusal::Start(changed)));
    assert_eq!(rig.node.starts().len(), 1);
    rig.touch("a").await;
    assert_eq!(rig.node.starts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stale_order_catches_up() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    rig.node.fail_next("a", StartFailure::StaleOrder { given: Generation(1), seen: Generation(41) });
    let used = rig.admit("a").await.unwrap();
    assert_eq!(used.seat.as_ref().unwrap().info.generation, Generation(42));
}

#[tokio::test(start_paused = true)]
async fn a_dead_worker_takes_its_seats_along_and_demand_restarts_it() {
    let mut one = model("a", 10);
    one.settings.concurrency = 1;
    let rig = Arc::new(Rig::new(64, vec![one]));
    let first = rig.admit("a").await.unwrap();
    let waiter = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { rig.admit("a").await.unwrap().instance() }
    });
    rig.turn().await;
    rig.node.kill(first.instance(), true);
    let second = waiter.await.unwrap();
    assert_ne!(second, first.instance());
    drop(first);
    assert_eq!(rig.handle.status().in_flight, 0);
    assert_eq!(rig.node.starts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_dies_while_it_starts_is_never_handed_out() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    let (used, ()) = tokio::join!(rig.admit("a"), async {
        sleep(Duration::from_millis(99)).await;
        let instance = rig.handle.instances()[0].instance;
        rig.node.say(NodeEvent::WorkerLost {
            worker: WorkerId(1),
            instance: Some(instance),
            reason: "signal 9".into(),
            last_lines: vec![],
        });
        sleep(Duration::from_millis(1)).await;
        rig.node.kill(instance, false);
    });
    assert_eq!(rig.node.starts().len(), 2);
    drop(used.unwrap());
}

#[tokio::test(start_paused = true)]
async fn missed_events_are_made_up_for() {
    let rig = Rig::new(64, vec![model("a", 10), model("b", 10)]);
    rig.touch("a").await;
    rig.touch("b").await;
    rig.node.kill(rig.node.ready()[0], false);
    for _ in 0..200 {
        rig.node.say(NodeEvent::ResidencyChanged);
    }
    rig.turn().await;
    assert_eq!(rig.states(), [("b".to_owned(), "ready")]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_says_busy_stays_and_is_asked_again() {
    let rig = Rig::new(10, vec![model("a", 10), model("b", 10)]);
    rig.touch("a").await;
    sleep(3 * SECOND).await;
    rig.node.answer_busy(3);
    let before = Instant::now();
    rig.touch("b").await;
    let waited = before.elapsed();
    assert!((Duration::from_millis(400)..Duration::from_millis(450)).contains(&waited), "{waited:?}");
    let events = rig.handle.explain(&name("a")).unwrap().decisions;
    assert_eq!(events.iter().filter(|d| d.event == Event::Busy).count(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_meets_a_stop_waits_for_it_and_starts_anew() {
    let mut at_once = model("a", 10);
    at_once.settings.keep_alive = keep(0);
    let rig = Rig::new(64, vec![at_once]);
    rig.touch("a").await;
    rig.turn().await;
    assert_eq!(rig.states(), [("a".to_owned(), "stopping")]);
    rig.touch("a").await;
    assert_eq!(rig.node.starts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn preloads_take_free_room_and_pins_hold() {
    let mut models = vec![model("a", 10), model("b", 10), model("c", 10)];
    for model in &mut models[..2] {
        model.settings.preload = true;
    }
    models[0].settings.pin = true;
    let rig = Rig::new(20, models);
    sleep(SECOND).await;
    assert_eq!(rig.states(), [("a".to_owned(), "ready"), ("b".to_owned(), "ready")]);
    rig.touch("c").await;
    assert_eq!(rig.node.stops(), [("b".to_owned(), StopMode::IfIdle)]);
    rig.handle.pin(&name("c")).unwrap();
    let refusal = rig.admit("b").await.err().unwrap();
    assert!(refusal.to_string().contains("pinned models hold the rest: `a`, `c`"), "{refusal}");
    rig.handle.unpin(&name("a")).unwrap();
    rig.touch("b").await;
    assert_eq!(rig.states(), [("c".to_owned(), "ready"), ("b".to_owned(), "ready")]);
    rig.handle.preload(&name("a"), 60 * SECOND).await.unwrap();
    assert!(rig.states().contains(&("a".to_owned(), "ready")));
    let unknown = rig.handle.pin(&name("nobody"));
    assert_eq!(unknown, Err(StartFailure::UnknownModel { model: name("nobody") }));
}

#[tokio::test(start_paused = true)]
async fn a_preload_that_fails_says_so() {
    let rig = Rig::new(20, vec![model("a", 10)]);
    rig.node.fail_next("a", worker_failure("a"));
    rig.node.fail_next("a", worker_failure("a"));
    let refusal = rig.handle.preload(&name("a"), 60 * SECOND).await.unwrap_err();
    assert_eq!(refusal, Refusal::Start(worker_failure("a")));
}

#[tokio::test(start_paused = true)]
async fn unload_refuses_busy_ones_unless_forced() {
    let rig = Rig::new(20, vec![model("a", 10)]);
    let a = name("a");
    assert_eq!(rig.handle.unload(&a, false).await, Err(UnloadError::NotLoaded { model: a.clone() }));
    let used = rig.handle.admit(admit("a")).await.unwrap();
    let busy = rig.handle.unload(&a, false).await;
    assert_eq!(busy, Err(UnloadError::Busy { model: a.clone(), sequences: 1 }));
    assert_eq!(rig.handle.unload(&a, true).await, Ok(1));
    assert_eq!(rig.node.stops(), [("a".to_owned(), StopMode::Now)]);
    drop(used);
    rig.touch("a").await;
    assert_eq!(rig.handle.unload(&a, false).await, Ok(1));
    assert_eq!((rig.node.live(), rig.handle.status().in_flight), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_can_never_fit_is_refused_with_its_terms() {
    let rig = Rig::new(20, vec![model("a", 30)]);
    let Err(Refusal::TooLarge { needed, budget, .. }) = rig.admit("a").await.map(|_| ()) else { panic!() };
    assert_eq!((needed, budget), (ByteSize::mib(30), ByteSize::mib(20)));
    assert!(matches!(
        rig.admit("nobody").await.err().unwrap(),
        Refusal::Start(StartFailure::UnknownModel { .. })
    ));
    // Once its file is smaller, it runs: nothing is remembered against it.
    rig.facts.change("a", |facts| facts.pool_bytes = ByteSize::mib(10));
    rig.touch("a").await;
}

#[tokio::test(start_paused = true)]
async fn many_sequences_take_many_seats_and_too_many_take_the_instance() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    let mut three = admit("a");
    three.sequences = 3;
    let first = rig.admit_as(three.clone()).await.unwrap();
    assert_eq!(rig.handle.status().in_flight, 3);
    assert!(timeout(SECOND, rig.admit_as(three)).await.is_err());
    let mut sixteen = admit("a");
    sixteen.sequences = 16;
    assert!(timeout(SECOND, rig.admit_as(sixteen.clone())).await.is_err());
    drop(first);
    let _all = rig.admit_as(sixteen).await.unwrap();
    assert_eq!(rig.handle.status().in_flight, 4);
}

#[tokio::test(start_paused = true)]
async fn a_second_instance_is_started_when_the_first_is_full() {
    let mut two = model("a", 10);
    two.settings.instances_max = 2;
    let rig = Arc::new(Rig::new(10, vec![two]));
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(rig.admit("a").await.unwrap());
    }
    assert_eq!(rig.node.starts().len(), 2);
    assert!(timeout(SECOND, rig.admit("a")).await.is_err());
    assert_eq!(rig.node.starts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn shutdown_refuses_waits_and_reports_what_is_left() {
    let rig = Arc::new(Rig::new(10, vec![model("a", 10), model("b", 10)]));
    let used = rig.admit("a").await.unwrap();
    let waiter = tokio::spawn({
        let rig = Arc::clone(&rig);
        async move { rig.admit("b").await.err() }
    });
    rig.turn().await;
    assert_eq!(rig.handle.shutdown(5 * SECOND).await, 1);
    assert_eq!(waiter.await.unwrap(), Some(Refusal::ShuttingDown));
    assert_eq!(rig.admit("a").await.err(), Some(Refusal::ShuttingDown));
    let (left, ()) = tokio::join!(rig.handle.shutdown(30 * SECOND), async {
        sleep(SECOND).await;
        drop(used);
    });
    assert_eq!(left, 0);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_lands_after_it_is_served_costs_what_landing_took() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    rig.touch("a").await;
    let instance = rig.handle.instances()[0].instance;
    let mut timeline = Timeline::default();
    timeline.record(Phase::DeviceCopy, None, Duration::from_secs(3));
    rig.node.say(NodeEvent::InstanceLanded { instance, took: Duration::from_secs(3), timeline });
    rig.turn().await;
    let status = &rig.handle.instances()[0];
    assert_eq!(status.load_time, Duration::from_secs(3));
    assert_eq!(status.timeline.actual(Phase::DeviceCopy), Some(Duration::from_secs(3)));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_does_not_arrive_loses_its_seats_and_is_not_asked_for_at_once() {
    let rig = Rig::new(64, vec![model("a", 10)]);
    let held = rig.admit("a").await.unwrap();
    let failure = StartFailure::Corrupt { model: name("a"), detail: "a bad chunk".into() };
    rig.node.say(NodeEvent::InstanceLost { instance: held.instance(), failure: failure.clone() });
    rig.node.kill(held.instance(), false);
    rig.turn().await;
    assert_eq!((rig.handle.status().in_flight, rig.handle.instances().len()), (0, 0));
    let refusal = rig.admit("a").await.err().expect("it has just failed");
    assert_eq!(refusal, Refusal::Start(failure));
    assert_eq!(rig.node.starts().len(), 1);
    drop(held);
    sleep(Duration::from_secs(60)).await;
    rig.touch("a").await;
}

#[tokio::test(start_paused = true)]
async fn models_are_spread_over_devices_and_make_room_there() {
    let device = |n: u32| DeviceConfig {
        name: format!("cuda:{n}"),
        memory: ByteSize::mib(20),
        work: ByteSize::mib(1),
        slots: 4,
    };
    // Ten of weights, two of KV cache and one of work memory: each device holds one.
    let models = ["a", "b", "c"].map(|text| model(text, 10)).to_vec();
    let rig = Rig::with(64, models, |_, server| server.devices = vec![device(0), device(1)]);
    let on = |rig: &Rig| {
        let instances = rig.handle.instances().into_iter();
        instances.map(|i| (i.model.to_string(), i.device, i.work_bytes)).collect::<Vec<_>>()
    };
    let (first, second) = (rig.admit("a").await.unwrap(), rig.admit("b").await.unwrap());
    let row = |model: &str, device: &str| (model.to_owned(), device.to_owned(), ByteSize::mib(1));
    assert_eq!(on(&rig), [row("a", "cuda:0"), row("b", "cuda:1")]);
    sleep(5 * SECOND).await;
    drop(second);
    rig.touch("c").await;
    assert_eq!(on(&rig), [row("a", "cuda:0"), row("c", "cuda:1")], "the idle one went");
    assert_eq!(rig.handle.status().slots, 8);
    let explained = rig.handle.explain(&name("c")).unwrap();
    assert!(explained.decisions[0].terms.starts_with("on cuda:1: "), "{:?}", explained.decisions);
    assert!(
        explained.sizing.ends_with("weights 10.0 MiB + KV 2.0 MiB + work 1.0 MiB"),
        "{}",
        explained.sizing
    );
    drop(first);

    rig.facts.change("b", |facts| facts.device_bytes = ByteSize::mib(30));
    let refusal = rig.admit("b").await.err().expect("no device is large enough");
    assert!(matches!(refusal, Refusal::TooLarge { .. }), "{refusal}");
    assert!(refusal.to_string().contains("needs 31.0 MiB, the budget is 20.0 MiB"), "{refusal}");
}
