//! Loads: contents, integrity, single flight, cancellation, priority.

use std::{fs, io, time::Duration};

use crate::common::{CHUNK, Fixture, describe, rot, sha256};
use stoker_checkpoint::{ChunkSum, Trust};
use stoker_io::{Fault, FaultKind, Gate};
use stoker_store::{LoadError, Priority, Retry, StreamOptions};
use stoker_types::{ByteSize, Tier};
use tokio_util::sync::CancellationToken;

/// A test that would wait for ever fails instead. Never waited for when all is well.
const FOREVER: Duration = Duration::from_secs(60);

fn fault(path: &str, at: u64, times: u32, kind: FaultKind) -> Fault {
    Fault { path: path.into(), bytes: at..at + 1, times, kind }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_around_blocks_and_chunks_arrive_whole() {
    let fixture = Fixture::new(16);
    let around = [0, 512, 4096, CHUNK, 2 * CHUNK, 4 * CHUNK];
    for len in around.iter().flat_map(|n| [n.saturating_sub(1), *n, n + 1, n + 513]) {
        let model = fixture.model(&format!("m{len}"), &[len, 1000, 0, CHUNK + 1], Trust::Chunk);
        let cold = fixture.load(&model).await.unwrap();
        fixture.check(&model, &cold);
        assert_eq!(cold.report().bytes_from(Tier::Ssd), model.files.bytes());
        assert_eq!(cold.report().learned, None);
        assert_eq!(cold.report().readers.len(), 4);
        drop(cold);
        let warm = fixture.load(&model).await.unwrap();
        fixture.check(&model, &warm);
        assert_eq!(warm.report().bytes_from(Tier::Dram), model.files.bytes());
        assert_eq!(warm.report().bytes_from(Tier::Ssd), ByteSize::ZERO);
        drop(warm);
        fixture.store.drop_all().await;
    }
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_sums_are_learned_and_hold_from_then_on() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[3 * CHUNK + 7, 100], Trust::None);
    let resident = fixture.load(&model).await.unwrap();
    let sums: Vec<Vec<ChunkSum>> =
        model.content.iter().map(|file| file.chunks(CHUNK).map(ChunkSum::of).collect()).collect();
    assert_eq!(resident.report().learned.as_ref(), Some(&sums));
    drop(resident);

    fixture.store.drop_all().await;
    rot(&model.paths[0], CHUNK as u64 + 5, 1);
    let error = fixture.load(&model).await.unwrap_err();
    assert!(
        matches!(&error, LoadError::Corrupt { chunk: 1, expected, .. } if *expected == sums[0][1]),
        "{error}"
    );
    // Forgotten, it is a file like any other.
    fixture.store.forget(&model.files.key().name).await;
    assert!(fixture.load(&model).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hash_of_the_whole_file_decides_at_the_end() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[3 * CHUNK + 7, 0, 100], Trust::File);
    let good = sha256(&model.content[0]);
    rot(&model.paths[0], CHUNK as u64 + 5, 1);
    // Twice: what the first one read must not be what the second one believes.
    for _ in 0..2 {
        let (first, joined) = tokio::join!(fixture.load(&model), fixture.load(&model));
        for error in [first.unwrap_err(), joined.unwrap_err()] {
            let LoadError::WrongHash { path, expected, found } = &error else { panic!("{error}") };
            assert_eq!((path, expected), (&model.paths[0], &good));
            assert_eq!(*found, sha256(&fs::read(path).unwrap()));
            assert_eq!(error.retry(), Retry::AfterFetching);
        }
        assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
    }
    rot(&model.paths[0], CHUNK as u64 + 5, 1);
    // Nothing can be said of a part of it.
    let error = fixture.store.stream(&model.files, StreamOptions::default()).unwrap_err();
    assert!(matches!(&error, LoadError::OnlyHash { path } if *path == model.paths[0]), "{error}");

    let resident = fixture.load(&model).await.unwrap();
    fixture.check(&model, &resident);
    let sums: Vec<Vec<ChunkSum>> =
        model.content.iter().map(|file| file.chunks(CHUNK).map(ChunkSum::of).collect()).collect();
    assert_eq!(resident.report().learned.as_ref(), Some(&sums));
    drop(resident);
    // From here on every chunk is known.
    fixture.store.drop_all().await;
    assert!(fixture.store.stream(&model.files, StreamOptions::default()).is_ok());
    rot(&model.paths[0], CHUNK as u64 + 5, 1);
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(&error, LoadError::Corrupt { chunk: 1, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_a_hash_that_was_written_to_is_not_called_wrong() {
    let fixture = Fixture::with_threads(8, 1);
    let model = fixture.model("m", &[4 * CHUNK], Trust::File);
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 3 * CHUNK as u64, 1, FaultKind::Wait(gate.clone())));
    let load = tokio::spawn({
        let (store, files) = (fixture.store.clone(), model.files.clone());
        async move { store.load(&files, Priority::Demand, &CancellationToken::new()).await.map(drop) }
    });
    tokio::task::spawn_blocking({
        let gate = gate.clone();
        move || gate.wait_for_arrivals(1)
    })
    .await
    .unwrap();
    fs::write(&model.paths[0], vec![0; 4 * CHUNK]).unwrap();
    gate.open();
    let error = load.await.unwrap().unwrap_err();
    assert!(matches!(&error, LoadError::Changed { is: Some(_), .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_on_disk_is_named() {
    let fixture = Fixture::with_threads(8, 1);
    let model = fixture.model("m", &[100, 5 * CHUNK + 7], Trust::Chunk);
    rot(&model.paths[1], 5 * CHUNK as u64 + 3, 0x80);
    let error = fixture.load(&model).await.unwrap_err();
    let LoadError::Corrupt { path, chunk, offset, expected, found, again } = &error else {
        panic!("{error}")
    };
    assert_eq!((path, *chunk, *offset), (&model.paths[1], 5, 5 * CHUNK as u64));
    assert_eq!(*expected, ChunkSum::of(&model.content[1][5 * CHUNK..]));
    assert_ne!(found, expected);
    assert_eq!(found, again);
    assert!(error.to_string().contains("the file is corrupt"), "{error}");
    assert_eq!(error.retry(), Retry::AfterFetching);
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO, "nothing stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_was_wrong_once_is_repeated() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[4 * CHUNK], Trust::Chunk);
    fixture.faults.add(fault("m-0", 70_000, 1, FaultKind::Corrupt { bits: 4 }));
    let resident = fixture.load(&model).await.unwrap();
    assert_eq!(resident.report().reread, 1);
    fixture.check(&model, &resident);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_differ_are_told_from_a_bad_file() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[4 * CHUNK], Trust::Chunk);
    // The first read is hit by both faults, the second only by the one that is left.
    fixture.faults.add(fault("m-0", 70_000, 1, FaultKind::Corrupt { bits: 4 }));
    fixture.faults.add(fault("m-0", 70_001, 2, FaultKind::Corrupt { bits: 8 }));
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(&error, LoadError::Corrupt { found, again, .. } if found != again), "{error}");
    assert!(error.to_string().contains("suspect disk or memory"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_file_is_not_corrupt() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[2 * CHUNK], Trust::Chunk);
    rot(&model.paths[0], 1, 1);
    fs::OpenOptions::new()
        .write(true)
        .open(&model.paths[0])
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH)
        .unwrap();
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(&error, LoadError::Changed { is: Some(_), .. }), "{error}");
    assert_eq!(error.retry(), Retry::AfterIndexing);

    fs::remove_file(&model.paths[0]).unwrap();
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(&error, LoadError::Changed { is: None, .. }), "{error}");

    // Indexed anew, it loads; what was in memory of the old version goes.
    let old = fixture.model("n", &[2 * CHUNK], Trust::Chunk);
    drop(fixture.load(&old).await.unwrap());
    let content = vec![crate::common::bytes("new", 1, CHUNK)];
    fs::write(&old.paths[0], &content[0]).unwrap();
    let new = crate::common::Model {
        files: describe("n", &old.paths, &content, Trust::Chunk),
        content: content.into(),
        paths: old.paths.clone(),
    };
    let resident = fixture.load(&new).await.unwrap();
    fixture.check(&new, &resident);
    assert_eq!(fixture.store.stats().used, ByteSize(CHUNK as u64));
    assert_eq!(fixture.store.stats().evictions.replaced, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changes_while_it_is_read() {
    let fixture = Fixture::with_threads(8, 1);
    for trust in [Trust::None, Trust::Chunk] {
        let model = fixture.model("m", &[4 * CHUNK], trust);
        let gate = Gate::default();
        fixture.faults.add(fault("m-0", 3 * CHUNK as u64, 1, FaultKind::Wait(gate.clone())));
        let loading = fixture.store.begin(&model.files, Priority::Demand).unwrap();
        tokio::task::spawn_blocking({
            let gate = gate.clone();
            move || gate.wait_for_arrivals(1)
        })
        .await
        .unwrap();
        // Cut in the middle of the read.
        fs::OpenOptions::new().write(true).open(&model.paths[0]).unwrap().set_len(3 * CHUNK as u64).unwrap();
        gate.open();
        let error = loading.wait(&CancellationToken::new()).await.unwrap_err();
        assert!(matches!(&error, LoadError::Changed { is: Some(_), .. }), "{error}");
        assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_errors_say_where_and_free_everything() {
    let fixture = Fixture::with_threads(8, 1);
    let model = fixture.model("m", &[100, 4 * CHUNK], Trust::Chunk);
    for kind in [FaultKind::Error(io::ErrorKind::PermissionDenied), FaultKind::Truncate] {
        fixture.faults.add(fault("m-1", 200_000, 1, kind));
        let error = fixture.load(&model).await.unwrap_err();
        let LoadError::Read { path, offset, .. } = &error else { panic!("{error}") };
        assert_eq!((path, *offset), (&model.paths[1], 3 * CHUNK as u64));
        assert!(error.to_string().contains("200000"), "{error}");
        assert_eq!(error.retry(), Retry::Later);
        let stats = fixture.store.stats();
        assert_eq!((stats.used, stats.mapped, stats.loading), (ByteSize::ZERO, ByteSize::ZERO, 0));
    }
    fixture.check(&model, &fixture.load(&model).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_demands_are_one_load() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[6 * CHUNK], Trust::Chunk);
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 4 * CHUNK as u64, 1, FaultKind::Wait(gate.clone())));
    let first = fixture.store.begin(&model.files, Priority::Prefetch).unwrap();
    let mut watermark = first.watermark();
    assert_eq!(watermark.total(), ByteSize(6 * CHUNK as u64));
    watermark.wait_for(ByteSize(4 * CHUNK as u64)).await.unwrap();

    let cancel = CancellationToken::new();
    let joiners: Vec<_> = (0..20)
        .map(|i| {
            let (fixture, model) = (fixture.store.clone(), model.files.clone());
            let cancel = if i % 2 == 0 { cancel.clone() } else { CancellationToken::new() };
            let loading = fixture.begin(&model, Priority::Demand).unwrap();
            tokio::spawn(async move { loading.wait(&cancel).await })
        })
        .collect();
    // Those who no longer want it, the first included, don't stop it for the others.
    drop(first);
    cancel.cancel();
    gate.open();
    let mut residents = Vec::new();
    for (i, joiner) in joiners.into_iter().enumerate() {
        match joiner.await.unwrap() {
            Ok(resident) => residents.push(resident),
            Err(error) => assert!(i % 2 == 0 && matches!(error, LoadError::Cancelled), "{error}"),
        }
    }
    assert!(residents.len() >= 10);
    for resident in &residents {
        assert!(resident.joined());
        fixture.check(&model, resident);
    }
    let stats = fixture.store.stats();
    assert_eq!(stats.bytes_read, model.files.bytes(), "read once");
    assert_eq!(stats.residency[0].holds, residents.len());
    watermark.wait_for(watermark.total()).await.unwrap();
    drop(residents);
    assert_eq!(fixture.store.stats().mapped, ByteSize::ZERO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_nobody_wants_ends_within_a_chunk() {
    let fixture = Fixture::with_threads(8, 1);
    let model = fixture.model("m", &[6 * CHUNK], Trust::Chunk);
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 2 * CHUNK as u64, 1, FaultKind::Wait(gate.clone())));
    let cancel = CancellationToken::new();
    let loading = fixture.store.begin(&model.files, Priority::Demand).unwrap();
    let mut watermark = loading.watermark();
    watermark.wait_for(ByteSize(2 * CHUNK as u64)).await.unwrap();
    cancel.cancel();
    assert!(matches!(loading.wait(&cancel).await, Err(LoadError::Cancelled)));
    assert!(matches!(watermark.wait_for(watermark.total()).await, Err(LoadError::Cancelled)));
    let stats = fixture.store.stats();
    assert_eq!((stats.loading, stats.mapped), (0, ByteSize::ZERO));
    assert!(stats.used <= ByteSize(CHUNK as u64), "the chunk that is being read, no other");
    assert_eq!(stats.evictions.failed, 2);
    gate.open();
    // Wanted again while the old read is on its way back: a new load, from the beginning.
    let resident = fixture.load(&model).await.unwrap();
    fixture.check(&model, &resident);
    assert_eq!(fixture.store.stats().used, model.files.pool_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_slower_than_the_deadline_leaves_nothing() {
    let fixture = Fixture::with_threads(8, 2);
    let model = fixture.model("m", &[6 * CHUNK], Trust::Chunk);
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 3 * CHUNK as u64, 1, FaultKind::Wait(gate.clone())));
    // The disk doesn't answer before the gate is opened, so the deadline passes however fast this machine is.
    let deadline = std::time::Duration::from_millis(100);
    let in_time = tokio::time::timeout(deadline, fixture.load(&model)).await;
    assert!(in_time.is_err(), "the third chunk can't be there");
    let stats = fixture.store.stats();
    assert_eq!((stats.loading, stats.mapped), (0, ByteSize::ZERO));
    assert!(stats.used <= ByteSize(CHUNK as u64), "what the disk still has, no more");
    gate.open();
    let resident = fixture.load(&model).await.unwrap();
    fixture.check(&model, &resident);
    // The read that came too late gives its slot back, too, whenever it ends.
    let settled = async {
        while fixture.store.stats().used > model.files.pool_bytes() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, settled).await.expect("a slot was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demand_goes_before_prefetch_and_equals_take_turns() {
    let fixture = Fixture::with_threads(16, 1);
    let prefetched = fixture.model("a", &[4 * CHUNK], Trust::Chunk);
    let wanted =
        [fixture.model("b", &[4 * CHUNK], Trust::Chunk), fixture.model("c", &[4 * CHUNK], Trust::Chunk)];
    let (first, second) = (Gate::default(), Gate::default());
    fixture.faults.add(fault("a-0", 0, 1, FaultKind::Wait(first.clone())));
    fixture.faults.add(fault("a-0", CHUNK as u64, 1, FaultKind::Wait(second.clone())));
    let slow = fixture.store.begin(&prefetched.files, Priority::Prefetch).unwrap();
    tokio::task::spawn_blocking({
        let first = first.clone();
        move || first.wait_for_arrivals(1)
    })
    .await
    .unwrap();
    // The only thread is in the prefetch's first chunk; were its second served before the demands, nothing would end.
    let demands: Vec<_> =
        wanted.iter().map(|model| fixture.store.begin(&model.files, Priority::Demand).unwrap()).collect();
    // Neither of two equals gets more than a chunk ahead.
    let apart = Gate::default();
    fixture.faults.add(fault("b-0", 2 * CHUNK as u64, 1, FaultKind::Wait(apart.clone())));
    first.open();
    tokio::task::spawn_blocking({
        let apart = apart.clone();
        move || apart.wait_for_arrivals(1)
    })
    .await
    .unwrap();
    let ready = demands[1].watermark().ready().bytes();
    assert!((CHUNK as u64..=3 * CHUNK as u64).contains(&ready), "{ready}");
    apart.open();
    for demand in demands {
        tokio::time::timeout(FOREVER, demand.wait(&CancellationToken::new())).await.unwrap().unwrap();
    }
    assert!(slow.watermark().ready() < slow.watermark().total());
    second.open();
    fixture.check(&prefetched, &slow.wait(&CancellationToken::new()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_store_leaves_nobody_waiting() {
    let fixture = Fixture::new(8);
    let model = fixture.model("m", &[2 * CHUNK], Trust::Chunk);
    let other = fixture.model("o", &[2 * CHUNK], Trust::Chunk);
    let kept = fixture.load(&other).await.unwrap();
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 0, 1, FaultKind::Wait(gate.clone())));
    let loading = fixture.store.begin(&model.files, Priority::Demand).unwrap();
    let fd = fixture.store.pool_fd().unwrap();
    let waiting = tokio::spawn(async move { loading.wait(&CancellationToken::new()).await.map(|_| ()) });
    gate.open();
    let closing = tokio::task::spawn_blocking(move || drop(fixture.store));
    let result = tokio::time::timeout(FOREVER, waiting).await.unwrap().unwrap();
    assert!(matches!(result, Ok(()) | Err(LoadError::Closed)), "{result:?}");
    closing.await.unwrap();
    let slots = &kept.files()[0];
    let map = stoker_io::MappedFile::map(&fd, slots.len, CHUNK as u64, &slots.slots).unwrap();
    assert!(*map == *other.content[0], "a guard keeps its chunks");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_is_read_by_several_threads() {
    let fixture = Fixture::with_threads(2, 4);
    let model = fixture.model("m", &[CHUNK], Trust::Chunk);
    let gate = Gate::default();
    // One fault for each quarter: as many reads of the one chunk wait at the gate together.
    for part in 0..4 {
        fixture.faults.add(fault("m-0", part * 16 * 1024 + 5, 1, FaultKind::Wait(gate.clone())));
    }
    let loading = fixture.store.begin(&model.files, Priority::Demand).unwrap();
    let arrived = gate.clone();
    let waited = tokio::task::spawn_blocking(move || arrived.wait_for_arrivals(4));
    tokio::time::timeout(FOREVER, waited).await.unwrap().unwrap();
    gate.open();
    fixture.check(&model, &loading.wait(&CancellationToken::new()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_fails_ends_the_load_and_frees_the_slot_once_the_others_are_done() {
    let fixture = Fixture::with_threads(2, 2);
    let model = fixture.model("m", &[CHUNK + 10], Trust::Chunk);
    let gate = Gate::default();
    fixture.faults.add(fault("m-0", 0, 1, FaultKind::Wait(gate.clone())));
    fixture.faults.add(fault("m-0", 20 * 1024, 1, FaultKind::Error(io::ErrorKind::PermissionDenied)));
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(&error, LoadError::Read { offset: 0, .. }), "{error}");
    assert!(error.to_string().contains("20480"), "{error}");
    assert_eq!(
        fixture.store.stats().used,
        ByteSize(CHUNK as u64),
        "a part is still being read into the slot"
    );
    gate.open();
    // The next load takes both slots, so it waits for that one.
    let loaded = tokio::time::timeout(FOREVER, fixture.load(&model)).await.unwrap().unwrap();
    fixture.check(&model, &loaded);
    drop(loaded);
    fixture.store.drop_all().await;
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
}
