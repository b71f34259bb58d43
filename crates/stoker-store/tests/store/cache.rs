//! The memory tier: budget, eviction, pins, guards, streams.

use crate::common::{CHUNK, Fixture, Model, rot};
use stoker_checkpoint::{ChunkSum, Trust};
use stoker_io::{Fault, FaultKind, Gate, PoolError};
use stoker_store::{ChunkStream, LoadError, OpenError, Priority, Retry, Store, StoreConfig, StreamOptions};
use stoker_types::{ByteSize, ModelName};
use tokio_util::sync::CancellationToken;

const fn chunks(n: u64) -> ByteSize {
    ByteSize(n * CHUNK as u64)
}

fn name(name: &str) -> ModelName {
    ModelName::new(name).unwrap()
}

/// Bytes in memory of a model.
fn resident(fixture: &Fixture, model: &Model) -> ByteSize {
    let name = &model.files.key().name;
    fixture.store.stats().residency.iter().filter(|r| r.model == *name).map(|r| r.resident).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_larger_than_memory_is_refused_at_once() {
    let fixture = Fixture::new(4);
    let model = fixture.model("m", &[5 * CHUNK], Trust::Chunk);
    let error = fixture.load(&model).await.unwrap_err();
    let LoadError::OutOfBudget { needed, free, mapped, budget, .. } = error else { panic!("{error}") };
    assert_eq!((needed, free, mapped, budget), (chunks(5), chunks(4), chunks(0), chunks(4)));
    let fits = fixture.model("f", &[4 * CHUNK], Trust::Chunk);
    fixture.check(&fits, &fixture.load(&fits).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_smaller_than_one_chunk_refuses_everything_and_keeps_nothing() {
    let less = ByteSize(CHUNK as u64 - 1);
    let config = StoreConfig { chunk: ByteSize(CHUNK as u64), ..StoreConfig::new(less) };
    let error = Store::open(config).unwrap_err();
    assert!(matches!(error, OpenError::Pool(PoolError::Capacity { .. })), "{error}");

    let fixture = Fixture::new(4);
    let model = fixture.model("m", &[100], Trust::Chunk);
    drop(fixture.load(&model).await.unwrap());
    fixture.store.set_budget(less).await;
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}");
    let error = fixture.store.stream(&model.files, StreamOptions::default()).unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}");
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
    fixture.store.set_budget(chunks(1)).await;
    fixture.check(&model, &fixture.load(&model).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_models_that_do_not_fit_together() {
    let fixture = Fixture::new(5);
    let (a, b) =
        (fixture.model("a", &[3 * CHUNK], Trust::Chunk), fixture.model("b", &[3 * CHUNK], Trust::Chunk));
    let held = fixture.load(&a).await.unwrap();
    let error = fixture.load(&b).await.unwrap_err();
    assert!(
        matches!(error, LoadError::OutOfBudget { free, mapped, .. } if (free, mapped) == (chunks(2), chunks(3)))
    );
    assert_eq!(error.retry(), Retry::WhenRoom);
    fixture.check(&a, &held);
    drop(held);
    for _ in 0..20 {
        for model in [&a, &b] {
            let guard = fixture.load(model).await.unwrap();
            fixture.check(model, &guard);
            assert_eq!(fixture.store.stats().mapped, chunks(3));
        }
    }
    let stats = fixture.store.stats();
    assert!(stats.evictions.room > 0 && stats.used <= stats.budget);
    // Only what was evicted is read again.
    assert_eq!(stats.bytes_read.bytes(), (6 + stats.evictions.room - 1) * CHUNK as u64);

    // A load under way holds its room too.
    let gate = Gate::default();
    fixture.store.drop_all().await;
    fixture.faults.add(Fault {
        path: "a-0".into(),
        bytes: 0..1,
        times: 1,
        kind: FaultKind::Wait(gate.clone()),
    });
    let loading = fixture.store.begin(&a.files, Priority::Demand).unwrap();
    assert!(matches!(fixture.load(&b).await, Err(LoadError::OutOfBudget { .. })));
    gate.open();
    loading.wait(&CancellationToken::new()).await.unwrap();
    fixture.load(&b).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coldest_goes_first_from_its_end() {
    let fixture = Fixture::new(12);
    let cold = fixture.model("cold", &[4 * CHUNK], Trust::Chunk);
    let warm = fixture.model("warm", &[4 * CHUNK], Trust::Chunk);
    let new = fixture.model("new", &[6 * CHUNK], Trust::Chunk);
    drop(fixture.load(&cold).await.unwrap());
    for _ in 0..3 {
        drop(fixture.load(&warm).await.unwrap());
    }
    drop(fixture.load(&new).await.unwrap());
    let stats = fixture.store.stats();
    let of = |model: &str| stats.residency.iter().find(|r| r.model == name(model)).unwrap().clone();
    assert_eq!((of("cold").resident, of("cold").prefix), (chunks(2), chunks(2)), "its head stays");
    assert_eq!(of("warm").resident, chunks(4));
    assert_eq!(stats.evictions.room, 2);
    // Only the rest is read.
    let before = stats.bytes_read;
    let again = fixture.load(&cold).await.unwrap();
    fixture.check(&cold, &again);
    assert_eq!(fixture.store.stats().bytes_read.saturating_sub(before), chunks(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pins_and_guards_protect() {
    let fixture = Fixture::new(6);
    let pinned = fixture.model("pinned", &[2 * CHUNK], Trust::Chunk);
    let other = fixture.model("other", &[4 * CHUNK], Trust::Chunk);
    let big = fixture.model("big", &[5 * CHUNK], Trust::Chunk);
    fixture.store.pin(&name("pinned"));
    drop(fixture.load(&pinned).await.unwrap());
    drop(fixture.load(&other).await.unwrap());
    assert!(
        matches!(fixture.load(&big).await, Err(LoadError::OutOfBudget { free, .. }) if free == chunks(4))
    );
    assert_eq!(resident(&fixture, &pinned), chunks(2));
    fixture.store.unpin(&name("pinned"));
    let held = fixture.load(&big).await.unwrap();
    fixture.check(&big, &held);

    // What is asked for explicitly spares only what is held.
    let evicted = fixture.store.evict(&name("big")).await;
    assert_eq!((evicted.freed, evicted.held), (ByteSize::ZERO, chunks(5)));
    fixture.check(&big, &held);
    drop(held);
    let evicted = fixture.store.evict(&name("big")).await;
    assert_eq!((evicted.freed, evicted.held), (chunks(5), ByteSize::ZERO));
    fixture.store.drop_all().await;
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lowered_budget_spares_what_is_held() {
    let fixture = Fixture::new(8);
    let (a, b) =
        (fixture.model("a", &[3 * CHUNK], Trust::Chunk), fixture.model("b", &[3 * CHUNK], Trust::Chunk));
    let held = fixture.load(&a).await.unwrap();
    drop(fixture.load(&b).await.unwrap());
    fixture.store.set_budget(chunks(2)).await;
    let stats = fixture.store.stats();
    assert_eq!((stats.budget, stats.used, stats.evictions.budget), (chunks(2), chunks(3), 3));
    fixture.check(&a, &held);
    drop(held);
    assert_eq!(fixture.store.stats().used, chunks(2));
    fixture.store.set_budget(chunks(100)).await;
    assert_eq!(fixture.store.stats().budget, chunks(8), "at most the capacity");

    // A load that no longer fits fails and gives everything back.
    let gate = Gate::default();
    fixture.faults.add(Fault {
        path: "b-0".into(),
        bytes: 0..1,
        times: 1,
        kind: FaultKind::Wait(gate.clone()),
    });
    let loading = fixture.store.begin(&b.files, Priority::Demand).unwrap();
    fixture.store.set_budget(chunks(2)).await;
    let error = loading.wait(&CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}");
    gate.open();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_goes_back_to_the_system() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[8 * CHUNK], Trust::Chunk);
    drop(fixture.load(&model).await.unwrap());
    let pool = fixture.store.pool_fd().unwrap();
    let blocks = || {
        std::os::unix::fs::MetadataExt::blocks(
            &std::fs::File::from(pool.try_clone().unwrap()).metadata().unwrap(),
        )
    };
    assert!(blocks() * 512 >= 8 * CHUNK as u64);
    let changes = fixture.store.changes();
    fixture.store.drop_all().await;
    assert_eq!(blocks(), 0);
    assert!(changes.has_changed().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_pressure_what_nobody_holds_goes_in_steps() {
    let fixture = Fixture::new(12);
    let [held, pinned, cold, warm] =
        ["held", "pinned", "cold", "warm"].map(|name| fixture.model(name, &[3 * CHUNK], Trust::Chunk));
    let guard = fixture.load(&held).await.unwrap();
    for model in [&pinned, &cold, &warm] {
        drop(fixture.load(model).await.unwrap());
    }
    fixture.store.pin(&name("pinned"));
    fixture.store.expect(&name("warm"));
    assert_eq!(fixture.store.shed(chunks(2)).await, chunks(2));
    assert_eq!((resident(&fixture, &cold), resident(&fixture, &warm)), (chunks(1), chunks(3)));
    assert_eq!(fixture.store.resident().unwrap(), chunks(10), "the system has it back");
    // More than there is: everything goes but what is held or pinned.
    assert_eq!(fixture.store.shed(chunks(100)).await, chunks(4));
    assert_eq!(fixture.store.shed(chunks(100)).await, ByteSize::ZERO);
    assert_eq!((resident(&fixture, &pinned), resident(&fixture, &held)), (chunks(3), chunks(3)));
    assert_eq!((fixture.store.stats().evictions.pressure, fixture.store.stats().budget), (6, chunks(12)));
    fixture.check(&held, &guard);
    // It may grow again at once.
    drop(fixture.load(&cold).await.unwrap());
    assert_eq!(resident(&fixture, &cold), chunks(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_loads_that_no_longer_fit_the_most_urgent_go_on() {
    let fixture = Fixture::with_threads(9, 2);
    let [a, b, c] = ["a", "b", "c"].map(|name| fixture.model(name, &[3 * CHUNK], Trust::Chunk));
    let gate = Gate::default();
    for path in ["a-0", "b-0"] {
        fixture.faults.add(Fault {
            path: path.into(),
            bytes: 0..1,
            times: 1,
            kind: FaultKind::Wait(gate.clone()),
        });
    }
    let begin = |model: &Model, priority| fixture.store.begin(&model.files, priority).unwrap();
    let (a_load, b_load) = (begin(&a, Priority::Demand), begin(&b, Priority::Prefetch));
    let c_load = begin(&c, Priority::Demand);
    fixture.store.set_budget(chunks(7)).await;
    assert!(matches!(b_load.wait(&CancellationToken::new()).await, Err(LoadError::OutOfBudget { .. })));
    gate.open();
    fixture.check(&a, &a_load.wait(&CancellationToken::new()).await.unwrap());
    fixture.check(&c, &c_load.wait(&CancellationToken::new()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_does_not_starve_a_load_that_was_accepted_before() {
    let fixture = Fixture::with_threads(6, 1);
    let (old, new) =
        (fixture.model("old", &[4 * CHUNK], Trust::Chunk), fixture.model("new", &[5 * CHUNK], Trust::Chunk));
    drop(fixture.load(&old).await.unwrap());
    let gate = Gate::default();
    fixture.faults.add(Fault {
        path: "new-0".into(),
        bytes: 0..1,
        times: 1,
        kind: FaultKind::Wait(gate.clone()),
    });
    let loading = fixture.store.begin(&new.files, Priority::Demand).unwrap();
    fixture.store.pin(&name("old"));
    gate.open();
    fixture.check(&new, &loading.wait(&CancellationToken::new()).await.unwrap());
    assert_eq!(resident(&fixture, &old), chunks(1), "no more than needed");
}

async fn read_all(stream: &mut ChunkStream, model: &Model) -> Result<usize, LoadError> {
    let mut seen = 0;
    while let Some(chunk) = stream.next().await? {
        let at = chunk.at();
        let content = model.content[at.file as usize].chunks(CHUNK).nth(at.index as usize).unwrap();
        assert!(*chunk == *content, "{at:?}");
        assert_eq!(chunk.sum(), ChunkSum::of(content));
        seen += 1;
    }
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_smaller_than_the_model() {
    let fixture = Fixture::new(4);
    let model = fixture.model("m", &[9 * CHUNK + 100, 300, 2 * CHUNK], Trust::None);
    for ring_chunks in [1, 2, 3, 100] {
        let mut stream =
            fixture.store.stream(&model.files, StreamOptions { ring_chunks, ..Default::default() }).unwrap();
        assert_eq!(stream.ring_chunks(), ring_chunks.min(4));
        assert!(fixture.store.stats().used <= chunks(4));
        assert_eq!(read_all(&mut stream, &model).await.unwrap(), 13);
        let report = stream.report().unwrap();
        assert_eq!(report.bytes_from(stoker_types::Tier::Ssd), model.files.bytes());
        assert_eq!(
            stream.next().await.map(|chunk| chunk.is_none()).ok(),
            Some(true),
            "the end stays the end"
        );
    }
    let stats = fixture.store.stats();
    assert_eq!((stats.used, stats.mapped), (ByteSize::ZERO, ByteSize::ZERO));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_uses_what_is_in_memory_unless_it_checks() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[4 * CHUNK], Trust::Chunk);
    let held = fixture.load(&model).await.unwrap();
    let before = fixture.store.stats().bytes_read;
    let mut stream = fixture.store.stream(&model.files, StreamOptions::default()).unwrap();
    assert_eq!(read_all(&mut stream, &model).await.unwrap(), 4);
    assert_eq!(fixture.store.stats().bytes_read, before);

    rot(&model.paths[0], 3 * CHUNK as u64, 1);
    let fresh = StreamOptions { fresh: true, ring_chunks: 2, ..Default::default() };
    let mut stream = fixture.store.stream(&model.files, fresh).unwrap();
    let error = read_all(&mut stream, &model).await.unwrap_err();
    assert!(matches!(error, LoadError::Corrupt { chunk: 3, .. }), "{error}");
    fixture.check(&model, &held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_streams_chunks_outlive_it_and_keep_their_room() {
    let fixture = Fixture::new(4);
    let model = fixture.model("m", &[6 * CHUNK], Trust::Chunk);
    let small = fixture.model("s", &[3 * CHUNK], Trust::Chunk);
    let mut stream =
        fixture.store.stream(&model.files, StreamOptions { ring_chunks: 2, ..Default::default() }).unwrap();
    let first = stream.next().await.unwrap().unwrap();
    let second = stream.next().await.unwrap().unwrap();
    // Both places are taken: the third comes when one is free.
    assert!(futures_poll_once(stream.next()).is_none());
    drop(first);
    let third = stream.next().await.unwrap().unwrap();
    drop(stream);
    assert!(*third == model.content[0][2 * CHUNK..3 * CHUNK]);
    assert!(matches!(fixture.load(&small).await, Err(LoadError::OutOfBudget { .. })));
    drop((second, third));
    fixture.check(&small, &fixture.load(&small).await.unwrap());
}

/// Polls a future once.
fn futures_poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lent_slots_are_the_loads_own_and_leave_what_is_held() {
    let fixture = Fixture::new(6);
    let held = fixture.model("held", &[2 * CHUNK], Trust::Chunk);
    let cached = fixture.model("cached", &[3 * CHUNK], Trust::Chunk);
    let guard = fixture.load(&held).await.unwrap();
    drop(fixture.load(&cached).await.unwrap());

    let mut lent = fixture.store.lend();
    assert_eq!(lent.slots.len(), 4);
    assert_eq!(resident(&fixture, &cached), ByteSize::ZERO);
    fixture.check(&held, &guard);
    lent.slots.iter_mut().for_each(|slot| slot.fill(0xee));
    let error = fixture.load(&cached).await.unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { free, .. } if free == chunks(0)), "{error}");
    drop(guard);
    // What was free meanwhile can be had; and everything, once they are back.
    let error = fixture.load(&cached).await.unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { free, .. } if free == chunks(2)), "{error}");
    drop(lent);
    fixture.check(&cached, &fixture.load(&cached).await.unwrap());
    assert_eq!(fixture.store.lend().slots.len(), 6);
}
