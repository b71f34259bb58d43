//! A node with real worker processes. The workers are this executable (see [`support::worker_command`]).

#![expect(clippy::unwrap_used, reason = "a test")]

mod devices;
mod support;
mod survival;

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::Signal;
use stoker_checkpoint::Source;
use stoker_node::{CatalogEntry, NodeError, RuntimeDir, Watchdog, WorkerConfig};
use stoker_proto::stream::{FailureCode, Finish, Sampling};
use stoker_types::{
    ByteSize, FileChange, NodeEvent, Phase, StartFailure, StopFailure, StopMode, Tier, WorkerState,
};
use stoker_worker::{StandIn, WorkerArgs, WorkerLimits};
use support::{
    Bed,
    client::{Client, PATIENCE, generate},
    idle, is_running, name, one_worker, signal, watchdog, worker_lost, workers,
};
use tokio::time::timeout;

// === what the child processes run ===

fn worker(standin: Option<Duration>, limits: WorkerLimits) -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).log_internal_errors(false).init();
    let standin = standin.map(|step_time| StandIn { step_time });
    stoker_worker::run(WorkerArgs { threads: 1, standin, limits, ..WorkerArgs::default() })
}

#[test]
#[ignore = "a worker's process"]
fn quick_worker() -> ExitCode {
    worker(Some(Duration::ZERO), WorkerLimits::default())
}

#[test]
#[ignore = "a worker's process: a step takes 10 ms"]
fn slow_worker() -> ExitCode {
    worker(Some(Duration::from_millis(10)), WorkerLimits::default())
}

#[test]
#[ignore = "a worker's process: gateways may be 64 KiB behind"]
fn narrow_worker() -> ExitCode {
    worker(
        Some(Duration::from_micros(20)),
        WorkerLimits { queue_bytes_max: 64 << 10, ..WorkerLimits::default() },
    )
}

#[test]
#[ignore = "a worker's process: a step takes for ever"]
fn stuck_worker() -> ExitCode {
    worker(Some(Duration::from_secs(3600)), WorkerLimits::default())
}

#[test]
#[ignore = "a worker's process: dies before it is ready"]
fn dying_worker() {
    panic!("no libstoker.so.1");
}

#[test]
#[ignore = "a worker's process: never says hello"]
fn silent_worker() {
    std::thread::sleep(Duration::from_secs(3600));
}

#[test]
#[ignore = "a worker's process, with a real engine"]
fn real_worker() -> ExitCode {
    worker(None, WorkerLimits::default())
}

// === tests ===

#[tokio::test]
async fn a_model_is_started_served_and_stopped_and_its_worker_serves_the_next() {
    let bed = Bed::new(one_worker("quick_worker"));
    let order = bed.order("b");
    let started = bed.node.start(order.clone()).await.unwrap();
    let actual = |phase| started.timeline.actual(phase);
    assert!(
        actual(Phase::SsdRead).is_some()
            && actual(Phase::DeviceCopy).is_some()
            && actual(Phase::Init).is_some()
    );
    assert!(started.timeline.bytes.iter().any(|b| b.tier == Tier::Ssd && b.bytes > ByteSize::mib(31)));

    let mut client = Client::connect(&started.socket).await;
    client.generate(7, order.generation.0, &[1, 2, 40], 5).await;
    let outcomes = client.collect(1).await;
    assert_eq!(outcomes[&7].ids, [40, 41, 42, 43, 44]);
    assert_eq!((outcomes[&7].begun, outcomes[&7].ends.as_slice()), (1, &[Finish::Length][..]));

    let snapshot = bed.node.snapshot();
    assert_eq!(snapshot.dram_mapped, ByteSize::mib(32));
    assert_eq!(snapshot.workers.len(), 1);
    let worker = &snapshot.workers[0];
    assert_eq!(worker.state, WorkerState::Serving);
    assert_eq!(worker.instance.as_ref().unwrap().0, order.instance);
    assert!(worker.private_bytes > ByteSize::ZERO && worker.private_bytes < ByteSize::mib(16), "{worker:?}");

    bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
    let snapshot = bed.node.snapshot();
    assert_eq!(
        (snapshot.dram_mapped, snapshot.dram_used),
        (ByteSize::ZERO, ByteSize::mib(32)),
        "it stays as cache"
    );
    assert_eq!(
        bed.node.stop(order.instance, StopMode::Now).await,
        Err(StopFailure::Unknown { instance: order.instance })
    );

    // From memory, and on the same process.
    let again = bed.node.start(bed.order("b")).await.unwrap();
    assert_eq!(again.worker, started.worker);
    assert_eq!(again.timeline.actual(Phase::SsdRead), None);

    // The old generation's streams are not for the new instance.
    client.generate(8, order.generation.0, &[1], 5).await;
    let outcomes = client.collect(1).await;
    assert_eq!(outcomes[&8].failure(), FailureCode::WrongGeneration);
    bed.node.shutdown(Duration::ZERO).await;
    assert!(!client.next().await);
}

#[tokio::test]
async fn a_changed_file_is_not_called_corrupt() {
    let bed = Bed::new(one_worker("quick_worker"));
    let path = bed.dir.path().join("a");
    let failure = async |change| {
        let expected = StartFailure::Changed { model: name("a"), file: "a".into(), change };
        assert_eq!(bed.node.start(bed.order("a")).await, Err(expected.clone()));
        assert_eq!(bed.node.preload(&name("a")).await, Err(expected));
    };
    let content = std::fs::read(&path).unwrap();
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(before + Duration::from_secs(1)).unwrap();
    failure(FileChange::Written).await;
    let beside = bed.dir.path().join("beside");
    std::fs::write(&beside, &content).unwrap();
    std::fs::rename(&beside, &path).unwrap();
    failure(FileChange::Replaced).await;
    std::fs::write(&path, &content[1..]).unwrap();
    failure(FileChange::Length { was: content.len() as u64, is: content.len() as u64 - 1 }).await;
    std::fs::remove_file(&path).unwrap();
    failure(FileChange::Gone).await;
}

#[tokio::test]
async fn orders_that_cannot_be_obeyed() {
    let bed = Bed::new(one_worker("quick_worker"));
    let unknown = bed.order("nothing-like-it");
    assert!(matches!(bed.node.start(unknown).await, Err(StartFailure::UnknownModel { .. })));

    let first = bed.order("a");
    let late = bed.order("a");
    bed.node.start(late.clone()).await.unwrap();
    let seen = late.generation;
    assert_eq!(
        bed.node.start(first.clone()).await,
        Err(StartFailure::StaleOrder { given: first.generation, seen })
    );
    // The only worker serves, and there may be no second.
    let failure = bed.node.start(bed.order("b")).await.unwrap_err();
    assert!(matches!(failure, StartFailure::Worker { .. }) && failure.is_transient(), "{failure}");
    bed.node.stop(late.instance, StopMode::Now).await.unwrap();

    let second = RuntimeDir::claim(&bed.dir.path().join("run"));
    assert!(matches!(second, Err(NodeError::InUse { .. })));
    let long = bed.dir.path().join("x".repeat(90));
    assert!(matches!(RuntimeDir::claim(&long), Err(NodeError::PathTooLong { .. })));
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_busy_instance_is_not_unloaded_unless_by_force() {
    let bed = Bed::new(one_worker("slow_worker"));
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 1000).await;
    assert!(client.next().await);

    let refused = bed.node.stop(order.instance, StopMode::IfIdle).await;
    assert_eq!(refused, Err(StopFailure::Busy { instance: order.instance, sequences: 1 }));
    let so_far = client.outcomes[&1].ids.len();
    assert!(client.next().await && client.outcomes[&1].ids.len() > so_far, "the stream goes on");

    bed.node.stop(order.instance, StopMode::Now).await.unwrap();
    assert_eq!(client.collect(1).await[&1].failure(), FailureCode::Unloaded);
    assert_eq!(bed.node.snapshot().dram_mapped, ByteSize::ZERO);
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn every_stream_ends_exactly_once_whatever_happens_to_it() {
    let bed = Bed::new(workers("quick_worker"));
    let order = bed.order("a");
    let generation = order.generation.0;
    let started = bed.node.start(order).await.unwrap();
    let mut rng = StdRng::seed_from_u64(11);
    let mut clients = [Client::connect(&started.socket).await, Client::connect(&started.socket).await];
    let streams = 200_u32;
    for stream in 0..streams {
        for client in &mut clients {
            let mut message = generate(stream.into(), generation, &[stream], rng.random_range(1..50));
            match rng.random_range(0..8) {
                0 => message.generation += 1,
                1 => message.prompt.clear(),
                2 => message.prompt = vec![1; 5000],
                3 => message.prompt = vec![5_000_000],
                4 => message.sampling = None,
                5 => message.stop_ids = vec![stream + 3],
                _ => message.sampling = Some(Sampling { top_p: 2.0, ..message.sampling.unwrap() }),
            }
            client.say(stoker_proto::stream::to_worker::Kind::Generate(message)).await;
            if rng.random_bool(0.3) {
                client.abort(rng.random_range(0..=stream).into()).await;
            }
        }
    }
    for client in &mut clients {
        let outcomes = client.collect(streams as usize).await;
        assert_eq!(outcomes.len(), streams as usize);
        for outcome in outcomes.values() {
            outcome.assert_ended_once();
        }
    }
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_gateway_that_hangs_up_stops_its_streams_and_no_others() {
    let bed = Bed::new(one_worker("slow_worker"));
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut stays = Client::connect(&started.socket).await;
    let mut leaves = Client::connect(&started.socket).await;
    stays.generate(1, order.generation.0, &[1], 60).await;
    for stream in 0..5 {
        leaves.generate(stream, order.generation.0, &[1], 100_000).await;
    }
    assert!(leaves.next().await);
    drop(leaves);
    assert_eq!(stays.collect(1).await[&1].ids.len(), 60);
    let stopping = async {
        while bed.node.stop(order.instance, StopMode::IfIdle).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, stopping).await.expect("streams of a closed connection go on");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_gateway_that_does_not_read_loses_its_connection_and_no_other_does() {
    let bed = Bed::new(one_worker("narrow_worker"));
    let mut order = bed.order("a");
    order.context = 1 << 20;
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut deaf = Client::connect(&started.socket).await;
    for stream in 0..4 {
        deaf.generate(stream, order.generation.0, &[1], 1 << 19).await;
    }
    let mut reads = Client::connect(&started.socket).await;
    let mut number = 0;
    // Until the worker has given the deaf one up, others are served beside it.
    let stopping = async {
        loop {
            number += 1;
            reads.generate(number, order.generation.0, &[3], 20).await;
            assert_eq!(reads.collect(1).await[&number].ids.len(), 20);
            if bed.node.stop(order.instance, StopMode::IfIdle).await.is_ok() {
                break;
            }
        }
    };
    timeout(PATIENCE, stopping).await.expect("the deaf gateway's streams go on");
    let outcomes = deaf.collect(4).await;
    assert!(outcomes.values().all(|o| o.ends.is_empty() && o.failures.is_empty()), "it was cut off");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_number_that_is_used_twice_costs_the_connection() {
    let bed = Bed::new(one_worker("slow_worker"));
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 1000).await;
    assert!(client.next().await);
    client.generate(1, order.generation.0, &[1], 1000).await;
    let outcomes = client.collect(1).await;
    assert!(outcomes.get(&1).is_none_or(|o| o.ends.is_empty() && o.failures.is_empty()));
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_killed_worker_fails_its_streams_and_is_replaced() {
    let bed = Bed::new(one_worker("slow_worker"));
    let mut events = bed.node.events();
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 1000).await;
    assert!(client.next().await);

    signal(bed.pid(started.worker), Signal::KILL);
    assert!(client.collect(1).await.values().all(|o| o.ends.is_empty()), "the stream breaks off");
    let NodeEvent::WorkerLost { worker, instance, reason, last_lines } = worker_lost(&mut events).await
    else {
        unreachable!()
    };
    assert_eq!((worker, instance), (started.worker, Some(order.instance)));
    assert!(reason.contains("signal 9"), "{reason}");
    assert!(last_lines.iter().any(|l| l.contains("model loaded")), "{last_lines:?}");
    assert!(!last_lines.iter().any(|l| l.contains("token")), "{last_lines:?}");
    assert_eq!(
        bed.node.stop(order.instance, StopMode::Now).await,
        Err(StopFailure::Unknown { instance: order.instance })
    );
    assert_eq!(bed.node.snapshot().dram_mapped, ByteSize::ZERO);

    let again = bed.node.start(bed.order("a")).await.unwrap();
    assert_ne!(again.worker, started.worker);
    assert_eq!(bed.socket_files(), [again.socket.with_extension("next"), again.socket]);
    bed.node.shutdown(Duration::ZERO).await;
    assert!(bed.socket_files().is_empty());
}

#[tokio::test]
async fn a_worker_that_dies_while_it_loads_fails_the_start() {
    let bed = Bed::new(one_worker("quick_worker"));
    let worker = bed.until("a worker is ready", |s| idle(s) == 1).await.workers[0].clone();
    // Stopped, it can't take what it is given.
    signal(worker.pid, Signal::STOP);
    let (outcome, ()) = tokio::join!(bed.node.start(bed.order("b")), async {
        bed.until("it is loading", |s| s.workers.iter().any(|w| w.state == WorkerState::Loading)).await;
        signal(worker.pid, Signal::KILL);
    });
    let Err(StartFailure::Worker { detail, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(detail.contains("signal 9"), "{detail}");
    assert_eq!(bed.node.snapshot().dram_mapped, ByteSize::ZERO);
    bed.node.start(bed.order("b")).await.unwrap();
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_start_that_nobody_wants_any_more_leaves_nothing() {
    let bed = Bed::new(one_worker("quick_worker"));
    let worker = bed.until("a worker is ready", |s| idle(s) == 1).await.workers[0].clone();
    signal(worker.pid, Signal::STOP);
    let order = bed.order("b");
    {
        let starting = bed.node.start(order.clone());
        tokio::pin!(starting);
        let loading =
            bed.until("it is loading", |s| s.workers.iter().any(|w| w.state == WorkerState::Loading));
        tokio::select! {
            outcome = &mut starting => panic!("{outcome:?}"),
            _ = loading => {}
        }
        assert_eq!(
            bed.node.stop(order.instance, StopMode::IfIdle).await,
            Err(StopFailure::Busy { instance: order.instance, sequences: 0 }),
            "a loading instance is not reaped"
        );
    }
    assert_eq!(bed.node.snapshot().dram_mapped, ByteSize::mib(32), "not before the worker has let go");
    signal(worker.pid, Signal::CONT);
    let snapshot = bed.until("nothing is mapped", |s| s.dram_mapped == ByteSize::ZERO && idle(s) == 1).await;
    assert_eq!(snapshot.workers[0].worker, worker.worker, "the worker is as before");
    assert_eq!(
        bed.node.stop(order.instance, StopMode::Now).await,
        Err(StopFailure::Unknown { instance: order.instance })
    );

    // The same by order instead of by a drop.
    signal(worker.pid, Signal::STOP);
    let order = bed.order("b");
    let (outcome, stopped) = tokio::join!(bed.node.start(order.clone()), async {
        bed.until("it is loading", |s| s.workers.iter().any(|w| w.state == WorkerState::Loading)).await;
        let stopping = bed.node.stop(order.instance, StopMode::Now);
        let (stopped, ()) = tokio::join!(stopping, async { signal(worker.pid, Signal::CONT) });
        stopped
    });
    assert!(matches!(outcome, Err(StartFailure::Cancelled { .. })), "{outcome:?}");
    assert_eq!(stopped, Ok(()));
    assert_eq!(bed.node.snapshot().dram_mapped, ByteSize::ZERO);
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_worker_that_hangs_is_killed() {
    let quick = Watchdog {
        ping_every: Duration::from_millis(20),
        pings_unanswered_max: 50,
        pings_without_step_max: 25,
        idle_intervals_max: 600,
    };
    // Its process answers, its engine doesn't come back from a step.
    let bed = Bed::new(WorkerConfig { watchdog: quick, ..one_worker("stuck_worker") });
    let mut events = bed.node.events();
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 10).await;
    let NodeEvent::WorkerLost { instance, reason, .. } = worker_lost(&mut events).await else {
        unreachable!()
    };
    assert_eq!(instance, Some(order.instance));
    assert!(reason.contains("no new step"), "{reason}");

    // Its process doesn't answer.
    let snapshot = bed.until("a worker is ready", |s| idle(s) == 1).await;
    signal(snapshot.workers[0].pid, Signal::STOP);
    let NodeEvent::WorkerLost { instance, reason, .. } = worker_lost(&mut events).await else {
        unreachable!()
    };
    assert_eq!(instance, None);
    assert!(reason.contains("without an answer"), "{reason}");
    bed.node.shutdown(Duration::ZERO).await;

    // It never says that it is ready.
    let quick = Watchdog { pings_unanswered_max: 5, ..quick };
    let bed = Bed::new(WorkerConfig { watchdog: quick, ..one_worker("silent_worker") });
    let NodeEvent::WorkerLost { reason, .. } = worker_lost(&mut bed.node.events()).await else {
        unreachable!()
    };
    assert!(reason.contains("hello"), "{reason}");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn workers_that_die_at_their_start_are_not_started_for_ever() {
    let bed = Bed::new(WorkerConfig { retry_after: Duration::from_secs(3600), ..workers("dying_worker") });
    let mut events = bed.node.events();
    let Err(StartFailure::Worker { detail, .. }) = bed.node.start(bed.order("a")).await else { panic!() };
    assert!(detail.contains("5 workers in a row"), "{detail}");
    let Err(StartFailure::Worker { .. }) = bed.node.start(bed.order("a")).await else { panic!() };
    let mut lost = 0;
    let mut words = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let NodeEvent::WorkerLost { last_lines, .. } = event {
            lost += 1;
            words = last_lines;
        }
    }
    // Two were begun together, before any had died.
    assert!((5..=6).contains(&lost), "{lost}");
    assert!(words.iter().any(|l| l.contains("no libstoker.so.1")), "{words:?}");
    bed.node.shutdown(Duration::ZERO).await;

    let missing = WorkerConfig { command: vec!["/nonexistent/stoker".into()], ..workers("") };
    let bed = Bed::new(missing);
    let Err(StartFailure::Worker { detail, .. }) = bed.node.start(bed.order("a")).await else { panic!() };
    assert!(detail.contains("/nonexistent/stoker") && detail.contains("No such file"), "{detail}");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn idle_workers_beyond_need_are_ended() {
    let watchdog = Watchdog { ping_every: Duration::from_millis(20), idle_intervals_max: 5, ..watchdog() };
    let bed = Bed::new(WorkerConfig { watchdog, ..workers("quick_worker") });
    let orders = [bed.order("a"), bed.order("b"), bed.order("a")];
    for order in &orders {
        bed.node.start(order.clone()).await.unwrap();
    }
    bed.until("three serve and one is ready", |s| s.workers.len() == 4 && idle(s) == 1).await;
    for order in &orders {
        bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
    }
    let mut events = bed.node.events();
    bed.until("two are left", |s| s.workers.len() == 2).await;
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, NodeEvent::WorkerLost { .. }), "they were told to go: {event:?}");
    }
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_shutdown_lets_streams_finish_within_its_grace() {
    let bed = Bed::new(one_worker("slow_worker"));
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let pid = bed.pid(started.worker);
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 100).await;
    assert!(client.next().await);
    let generation = order.generation.0;
    let (outcomes, ()) = tokio::join!(
        async {
            // Whether it comes before the order to end or after it: no stream is lost without a word.
            client.generate(2, generation, &[1], 30).await;
            client.collect(2).await
        },
        bed.node.shutdown(PATIENCE),
    );
    outcomes[&1].assert_ended_once();
    outcomes[&2].assert_ended_once();
    assert_eq!(outcomes[&1].ends, [Finish::Length]);
    assert!(!is_running(pid));
    assert!(matches!(bed.node.start(bed.order("a")).await, Err(StartFailure::Cancelled { .. })));

    let bed = Bed::new(one_worker("slow_worker"));
    let order = bed.order("a");
    let started = bed.node.start(order.clone()).await.unwrap();
    let mut client = Client::connect(&started.socket).await;
    client.generate(1, order.generation.0, &[1], 1000).await;
    assert!(client.next().await);
    let (outcomes, ()) = tokio::join!(client.collect(1), bed.node.shutdown(Duration::from_millis(50)));
    assert_eq!(outcomes[&1].failure(), FailureCode::Unloaded);
}

#[tokio::test]
async fn random_orders_and_deaths_leak_nothing() {
    let bed = Bed::new(workers("quick_worker"));
    bed.until("workers are ready", |s| idle(s) == 2).await;
    // Each of the store's reading threads makes a ring when it first needs one, and keeps it.
    let open = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = links.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.filter(|link| !link.to_string_lossy().contains("io_uring")).collect::<Vec<_>>()
    };
    let fds = || open().len();
    let mut rng = StdRng::seed_from_u64(3);
    let mut running: Vec<stoker_types::InstanceId> = Vec::new();
    let mut pids = std::collections::BTreeSet::new();
    let mut kills = 0;
    let before = fds();
    for _ in 0..200 {
        pids.extend(bed.node.snapshot().workers.iter().map(|w| w.pid).filter(|p| *p > 0));
        match rng.random_range(0..10) {
            0..4 => {
                let order = bed.order(["a", "b", "c"][rng.random_range(0..3)]);
                let starting = bed.node.start(order.clone());
                if rng.random_bool(0.3) {
                    // Given up somewhere on its way.
                    let _ = timeout(Duration::from_micros(rng.random_range(0..5000)), starting).await.map(
                        |outcome| {
                            running.extend(outcome.ok().map(|_| order.instance));
                        },
                    );
                } else {
                    match starting.await {
                        Ok(started) => {
                            running.push(order.instance);
                            if let Ok(stream) = tokio::net::UnixStream::connect(&started.socket).await {
                                drop(stream);
                            }
                        }
                        Err(StartFailure::OutOfMemory { .. } | StartFailure::Worker { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            4..8 if !running.is_empty() => {
                let instance = running.swap_remove(rng.random_range(0..running.len()));
                let mode = if rng.random_bool(0.5) { StopMode::Now } else { StopMode::IfIdle };
                match bed.node.stop(instance, mode).await {
                    Ok(()) | Err(StopFailure::Unknown { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            8 if kills < 20 => {
                let workers = bed.node.snapshot().workers;
                if let Some(worker) =
                    workers.get(rng.random_range(0..workers.len().max(1))).filter(|w| w.pid > 0)
                {
                    kills += 1;
                    // It may have gone by itself.
                    let pid = rustix::process::Pid::from_raw(i32::try_from(worker.pid).unwrap()).unwrap();
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            _ => {
                bed.node.evict(&support::name(["a", "b", "c"][rng.random_range(0..3)])).await;
            }
        }
    }
    assert!(kills > 5);
    for instance in running {
        let _ = bed.node.stop(instance, StopMode::Now).await;
    }
    let snapshot = bed
        .until("all is let go", |s| {
            s.dram_mapped == ByteSize::ZERO && s.workers.len() == idle(s) && idle(s) > 0
        })
        .await;
    pids.extend(snapshot.workers.iter().map(|w| w.pid));
    assert_eq!(bed.socket_files().len(), 2 * snapshot.workers.len(), "for gateways, and for the next node");
    // Two descriptors for each worker beyond those that there were at the beginning.
    let surplus = snapshot.workers.len().saturating_sub(2) * 4;
    // What belonged to a worker that died is closed when its end is noticed.
    let closed = async {
        while fds() > before + surplus + 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let closed = tokio::time::timeout(Duration::from_secs(10), closed).await;
    assert!(
        closed.is_ok(),
        "{before} descriptors at first, {} workers, now {:#?}",
        snapshot.workers.len(),
        open()
    );
    for model in ["a", "b", "c"] {
        bed.node.evict(&support::name(model)).await;
    }
    assert_eq!(bed.node.snapshot().dram_used, ByteSize::ZERO, "no slot is lost");
    bed.node.shutdown(Duration::ZERO).await;
    assert!(pids.iter().all(|pid| !is_running(*pid)), "no process is left");
    assert!(bed.socket_files().is_empty());
}

#[tokio::test]
async fn models_are_brought_into_memory_and_dropped_without_an_instance() {
    let bed = Bed::new(one_worker("quick_worker"));
    let mut events = bed.node.events();
    bed.node.preload(&support::name("b")).await.unwrap();
    let snapshot = bed.node.snapshot();
    assert_eq!((snapshot.dram_used, snapshot.dram_mapped), (ByteSize::mib(32), ByteSize::ZERO));
    assert_eq!(snapshot.residency, [(support::name("b"), ByteSize(2 * (16 << 20) - 1000))]);
    assert_eq!(bed.store.stats().used, snapshot.dram_used);
    let measured = async {
        loop {
            if let NodeEvent::Measured { model, bytes, .. } = events.recv().await.unwrap() {
                break (model, bytes);
            }
        }
    };
    let (model, bytes) = timeout(PATIENCE, measured).await.unwrap();
    assert_eq!((model, bytes), (support::name("b"), ByteSize(2 * (16 << 20) - 1000)));
    assert_eq!(bed.node.evict(&support::name("b")).await.freed, ByteSize::mib(32));
    assert_eq!(bed.node.snapshot().dram_used, ByteSize::ZERO);

    // More than there is room for while another is in use.
    bed.node.start(bed.order("b")).await.unwrap();
    let failure = bed.node.preload(&support::name("c")).await.unwrap_err();
    assert!(matches!(failure, StartFailure::OutOfMemory { .. }), "{failure}");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_real_model_answers_as_its_reference() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let mut models = std::collections::HashMap::new();
    let kinds = ["tiny-llama", "tiny-llama-bf16-sharded", "tiny-llama3", "tiny-mistral"];
    for kind in kinds {
        let source = Source { uri: kind.into(), revision: None };
        let manifest = stoker_checkpoint::index(&data.join(kind), source).unwrap();
        models
            .insert(support::name(kind), CatalogEntry { dir: data.join(kind), manifest: Arc::new(manifest) });
    }
    let dir = tempfile::tempdir().unwrap();
    let bed =
        Bed::with_models(one_worker("real_worker"), dir, support::Models(models), ByteSize::mib(4 * 16));
    let mut private_bytes = Vec::new();
    // One worker, one model after the other, all of them in the same pool.
    for kind in kinds.iter().chain(&kinds) {
        let reference: serde_json::Value =
            serde_json::from_slice(&std::fs::read(data.join(kind).join("reference.json")).unwrap()).unwrap();
        let mut order = bed.order(kind);
        order.context = 64;
        let started = bed.node.start(order.clone()).await.unwrap();
        let mut client = Client::connect(&started.socket).await;
        let ids = |value: &serde_json::Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
        let cases = reference["cases"].as_array().unwrap();
        let fitting =
            cases.iter().filter(|c| ids(&c["prompt_ids"]).len() + ids(&c["greedy_ids"]).len() <= 64);
        let mut compared = 0;
        for (stream, case) in (0..).zip(fitting) {
            let (prompt, greedy) = (ids(&case["prompt_ids"]), ids(&case["greedy_ids"]));
            client.generate(stream, order.generation.0, &prompt, u32::try_from(greedy.len()).unwrap()).await;
            assert_eq!(client.collect(1).await[&stream].ids, greedy, "{kind}");
            compared += 1;
        }
        assert!(compared > 0);
        bed.node.stop(order.instance, StopMode::IfIdle).await.unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", bed.pid(started.worker))).unwrap();
        assert!(!maps.contains("stoker-pool"), "nothing of the pool stays mapped");
        private_bytes.push(bed.node.snapshot().workers[0].private_bytes);
    }
    // Every model has been served once before: the second round adds nothing that stays.
    assert!(private_bytes[7] <= private_bytes[3] + ByteSize::mib(1), "{private_bytes:?}");
    bed.node.shutdown(Duration::ZERO).await;
}
