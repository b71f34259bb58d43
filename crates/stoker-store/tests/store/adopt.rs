//! Memory that outlives its process: what the next store takes over, and what it must not.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use crate::common::{CHUNK, Fixture, Model, Random, bytes, describe, rot};
use stoker_checkpoint::Trust;
use stoker_io::{Fault, FaultKind, Gate, MappedFile, PoolMemory};
use stoker_store::{
    Adoption, CheckpointFiles, KeptModel, LoadError, MappedModel, OpenError, Priority, Store, StoreConfig,
    StreamOptions,
};
use stoker_types::{ByteSize, ModelName, Tier};

fn config(fixture: &Fixture, chunks: usize) -> StoreConfig {
    StoreConfig {
        chunk: ByteSize(CHUNK as u64),
        read_threads: 2,
        opener: Arc::new(fixture.faults.clone()),
        ..StoreConfig::new(ByteSize((chunks * CHUNK) as u64))
    }
}

fn known<'a>(models: &'a [&'a Model]) -> impl Fn(&ModelName) -> Option<CheckpointFiles> + 'a {
    let of = move |name: &ModelName| models.iter().find(|model| model.files.key().name == *name);
    move |name| of(name).map(|model| model.files.clone())
}

/// Has another store take the fixture's memory over, as after a kill: the old one gives nothing back.
fn restart(fixture: &mut Fixture, chunks: usize, models: &[&Model]) -> Adoption {
    let memory = fixture.store.memory().unwrap().unwrap();
    let (store, adoption, _) = Store::adopt(config(fixture, chunks), memory, known(models), &[]).unwrap();
    std::mem::forget(std::mem::replace(&mut fixture.store, store));
    adoption
}

/// Loads a model and compares it; returns the bytes that came from disk.
async fn read_for(fixture: &Fixture, model: &Model) -> u64 {
    let resident = fixture.load(model).await.unwrap();
    fixture.check(model, &resident);
    resident.report().bytes_from(Tier::Ssd).bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_again_and_nothing_is_read() {
    let mut fixture = Fixture::new(20);
    let models = [
        fixture.model("sums", &[3 * CHUNK + 5, 100], Trust::Chunk),
        fixture.model("nothing-known", &[2 * CHUNK], Trust::None),
        fixture.model("a-hash", &[4 * CHUNK + 1], Trust::File),
    ];
    let all: Vec<&Model> = models.iter().collect();
    for model in &models {
        assert!(read_for(&fixture, model).await > 0);
    }
    let adoption = restart(&mut fixture, 20, &all);
    let slots: usize = models.iter().map(|model| model.files.order().len()).sum();
    assert_eq!((adoption.models, adoption.chunks), (3, slots));
    assert_eq!(adoption.bytes, models.iter().map(|model| model.files.bytes()).sum());
    let lost = [adoption.unknown, adoption.changed, adoption.wrong, adoption.damaged, adoption.evicted];
    assert_eq!(lost, [0; 5]);
    for model in &models {
        assert_eq!(read_for(&fixture, model).await, 0);
    }
    assert_eq!(fixture.store.stats().bytes_read, ByteSize::ZERO);
    // And the next one, and then the slots serve other models.
    assert_eq!(restart(&mut fixture, 20, &all).chunks, slots);
    let other = fixture.model("other", &[20 * CHUNK], Trust::Chunk);
    assert_eq!(read_for(&fixture, &other).await, other.files.bytes().bytes());
    assert_eq!(restart(&mut fixture, 20, &all).unknown, 20);
    assert_eq!(fixture.store.stats().used, ByteSize::ZERO);
}

/// Two processes have models mapped and outlive the store; one of the models has changed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_computes_with_stays_where_it_is() {
    let mut fixture = Fixture::new(8);
    let same = fixture.model("same", &[2 * CHUNK + 5], Trust::Chunk);
    let rotten = fixture.model("rotten", &[3 * CHUNK], Trust::Chunk);
    let (on_same, on_rotten) = (fixture.load(&same).await.unwrap(), fixture.load(&rotten).await.unwrap());
    let mapped = |model: &Model, files: &[stoker_store::FileSlots]| MappedModel {
        model: model.files.key().name.clone(),
        files: files.to_vec(),
    };
    let mut elsewhere = on_same.files().to_vec();
    elsewhere[0].slots.reverse();
    let mapped =
        [mapped(&same, on_same.files()), mapped(&rotten, on_rotten.files()), mapped(&same, &elsewhere)];
    let memory = fixture.store.memory().unwrap().unwrap();
    let at = u64::from(on_rotten.files()[0].slots[1]) * CHUNK as u64;
    rustix::io::pwrite(&memory.pool, b"rot", at + 9).unwrap();
    let content = |memory: &OwnedFd, slot: u32| {
        let mut bytes = vec![0; CHUNK];
        rustix::io::pread(memory, &mut bytes, u64::from(slot) * CHUNK as u64).unwrap();
        bytes
    };
    let reader = memory.pool.try_clone().unwrap();
    let before: Vec<_> = on_rotten.files()[0].slots.iter().map(|slot| content(&reader, *slot)).collect();
    // Room for one of them only.
    let (store, adoption, kept) =
        Store::adopt(config(&fixture, 3), memory, known(&[&same, &rotten]), &mapped).unwrap();
    // What is right of the other stays as cache: as long as it is mapped, evicting it frees nothing.
    assert_eq!((adoption.models, adoption.chunks, adoption.wrong), (2, 5, 1), "{adoption:?}");
    let [KeptModel::Resident(resident), KeptModel::Remains(remains), KeptModel::Remains(moved)] = &kept[..]
    else {
        panic!("{kept:?}")
    };
    assert_eq!(resident.files(), on_same.files());
    assert_eq!((remains.len(), moved.len()), (3, 3));
    assert_eq!(store.stats().mapped, ByteSize(3 * CHUNK as u64));
    let after: Vec<_> = on_rotten.files()[0].slots.iter().map(|slot| content(&reader, *slot)).collect();
    assert!(before == after, "not given back while somebody has it");
    assert!(matches!(store.begin(&rotten.files, Priority::Demand), Err(LoadError::OutOfBudget { .. })));
    drop(kept);
    assert_eq!(store.stats().mapped, ByteSize::ZERO);
    std::mem::forget((on_same, on_rotten, std::mem::replace(&mut fixture.store, store)));
    assert!(read_for(&fixture, &rotten).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_evicted_or_not_yet_there_is_read() {
    let mut fixture = Fixture::new(8);
    let part = fixture.model("part", &[6 * CHUNK], Trust::Chunk);
    read_for(&fixture, &part).await;
    // Two of its chunks make room.
    let other = fixture.model("other", &[4 * CHUNK], Trust::Chunk);
    read_for(&fixture, &other).await;
    let adoption = restart(&mut fixture, 8, &[&part, &other]);
    assert_eq!((adoption.chunks, adoption.unknown, adoption.changed), (8, 0, 0));
    assert_eq!(read_for(&fixture, &part).await, 2 * CHUNK as u64);
}

/// A program has models mapped whose node was killed; one of them is known no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_programs_have_mapped_stays_until_they_let_go() {
    let mut fixture = Fixture::new(12);
    let known = fixture.model("known", &[4 * CHUNK], Trust::Chunk);
    let gone = fixture.model("gone", &[3 * CHUNK], Trust::Chunk);
    let other = fixture.model("other", &[3 * CHUNK], Trust::Chunk);
    let mut maps = Vec::new();
    for model in [&known, &gone] {
        let resident = fixture.load(model).await.unwrap();
        let slots = resident.files()[0].slots.clone();
        let lent = fixture.store.lend_pool().unwrap();
        lent.hold(slots.iter().copied()).unwrap();
        let len = slots.len() * CHUNK;
        maps.push(MappedFile::map(lent.fd(), len as u64, CHUNK as u64, &slots).unwrap());
    }
    fixture.load(&other).await.unwrap();
    let before: Vec<Vec<u8>> = maps.iter().map(|map| map.to_vec()).collect();

    let adoption = restart(&mut fixture, 12, &[&known, &other]);
    assert_eq!((adoption.chunks, adoption.unknown, adoption.lent), (7, 3, 7));
    let held = |fixture: &Fixture| fixture.store.stats().mapped.bytes() / CHUNK as u64;
    assert_eq!(held(&fixture), 7, "as if they were its own clients");
    assert_eq!(fixture.store.evict(&known.files.key().name).await.freed, ByteSize::ZERO);
    // Whatever else is loaded finds its place beside: five slots.
    for (i, chunks) in [5, 4, 5, 3].into_iter().enumerate() {
        let another = fixture.model(&format!("another-{i}"), &[chunks * CHUNK], Trust::Chunk);
        assert!(read_for(&fixture, &another).await > 0);
    }
    let large = fixture.model("large", &[6 * CHUNK], Trust::Chunk);
    let error = fixture.load(&large).await.unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}");
    assert_eq!(read_for(&fixture, &known).await, 0);
    assert!(maps.iter().zip(&before).all(|(map, before)| map[..] == before[..]), "every byte as it was");

    // A second restart changes nothing for them; then one program after the other lets go.
    let adoption = restart(&mut fixture, 12, &[&known, &other]);
    assert_eq!(adoption.lent, 7);
    assert!(maps.iter().zip(&before).all(|(map, before)| map[..] == before[..]));
    let room = |fixture: &Fixture| fixture.store.begin(&large.files, Priority::Demand).is_ok();
    assert!(!room(&fixture));
    maps.pop();
    let came_back = async {
        while !room(&fixture) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), came_back).await.expect("the slots of no model come back");
    assert_eq!(held(&fixture), 4);
    assert!(maps[0][..] == before[0][..]);
    maps.clear();
    let came_back = async {
        while held(&fixture) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), came_back).await.expect("the model is held no more");
    let all = fixture.model("all", &[12 * CHUNK], Trust::Chunk);
    assert!(read_for(&fixture, &all).await > 0);
}

/// Only the hash of a whole file is known, and the load was killed before that was checked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_vouched_for_is_not_taken_over() {
    let mut fixture = Fixture::new(8);
    let model = fixture.model("m", &[3 * CHUNK], Trust::File);
    let gate = Gate::default();
    let last = (3 * CHUNK - 1) as u64;
    let kind = FaultKind::Wait(gate.clone());
    fixture.faults.add(Fault { path: "m-0".into(), bytes: last..last + 1, times: 1, kind });
    let loading = fixture.store.begin(&model.files, Priority::Demand).unwrap();
    loading.watermark().wait_for(ByteSize(2 * CHUNK as u64)).await.unwrap();
    let old = fixture.store.clone();
    let adoption = restart(&mut fixture, 8, &[&model]);
    assert_eq!((adoption.chunks, adoption.changed), (0, 0));
    gate.open();
    std::mem::forget((loading, old));

    // Vouched for, but not whole any more.
    let mut fixture = Fixture::new(4);
    let model = fixture.model("m", &[3 * CHUNK], Trust::File);
    read_for(&fixture, &model).await;
    let other = fixture.model("other", &[2 * CHUNK], Trust::Chunk);
    read_for(&fixture, &other).await;
    let adoption = restart(&mut fixture, 4, &[&model, &other]);
    assert_eq!((adoption.chunks, adoption.changed), (2, 2));
    assert_eq!(read_for(&fixture, &model).await, 3 * CHUNK as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_and_damaged_records_are_read_again() {
    let mut fixture = Fixture::new(8);
    for trust in [Trust::Chunk, Trust::None, Trust::File] {
        let model = fixture.model("m", &[5 * CHUNK], trust);
        read_for(&fixture, &model).await;
        let memory = fixture.store.memory().unwrap().unwrap();
        let slots = fixture.load(&model).await.unwrap().files()[0].slots.clone();
        // A byte of the third chunk, and the state of the first one's record.
        let at = u64::from(slots[2]) * CHUNK as u64 + 77;
        let mut byte = [0];
        rustix::io::pread(&memory.pool, &mut byte, at).unwrap();
        rustix::io::pwrite(&memory.pool, &[byte[0] ^ 4], at).unwrap();
        rustix::io::pwrite(&memory.ledger, b"damage", 4096 + u64::from(slots[0]) * 256).unwrap();
        let adoption = restart(&mut fixture, 8, &[&model]);
        if trust == Trust::File {
            // Not whole already for the damaged record.
            assert_eq!((adoption.chunks, adoption.damaged, adoption.changed), (0, 1, 4));
            assert_eq!(read_for(&fixture, &model).await, 5 * CHUNK as u64);
        } else {
            assert_eq!((adoption.chunks, adoption.damaged, adoption.wrong), (3, 1, 1), "{trust:?}");
            assert_eq!(read_for(&fixture, &model).await, 2 * CHUNK as u64);
        }
        fixture.store.drop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_changed_meanwhile() {
    let mut fixture = Fixture::new(12);
    let model = fixture.model("m", &[2 * CHUNK, 2 * CHUNK], Trust::None);
    let gone = fixture.model("gone", &[CHUNK], Trust::None);
    let rotten = fixture.model("rotten", &[CHUNK], Trust::Chunk);
    for model in [&model, &gone, &rotten] {
        read_for(&fixture, model).await;
    }
    // The same path and length, other bytes; indexed anew, as a catalog does.
    let replaced = bytes("m", 99, 2 * CHUNK);
    fs::remove_file(&model.paths[1]).unwrap();
    fs::write(&model.paths[1], &replaced).unwrap();
    let content = vec![model.content[0].clone(), replaced];
    let now = Model {
        files: describe("m", &model.paths, &content, Trust::None),
        content: Arc::new(content),
        paths: model.paths.clone(),
    };
    fs::remove_file(&gone.paths[0]).unwrap();
    // The file is bad now, but not what was read of it when it was good.
    rot(&rotten.paths[0], 5, 1);
    let adoption = restart(&mut fixture, 12, &[&now, &gone, &rotten]);
    assert_eq!((adoption.chunks, adoption.changed), (3, 3), "{adoption:?}");
    assert_eq!(read_for(&fixture, &now).await, 2 * CHUNK as u64, "the other file's");
    assert_eq!(read_for(&fixture, &rotten).await, 0);

    // Indexed before it was replaced: the catalog doesn't know yet.
    let adoption = restart(&mut fixture, 12, &[&model]);
    assert_eq!((adoption.chunks, adoption.changed, adoption.unknown), (2, 2, 1));
    let error = fixture.load(&model).await.unwrap_err();
    assert!(matches!(error, LoadError::Changed { .. }), "{error}");

    // Given sums contradict what was learned.
    let mut known_now = fixture.model("sums", &[CHUNK], Trust::None);
    read_for(&fixture, &known_now).await;
    let wrong = vec![bytes("sums", 5, CHUNK)];
    known_now.files = describe("sums", &known_now.paths, &wrong, Trust::Chunk);
    let adoption = restart(&mut fixture, 12, &[&now, &known_now]);
    assert_eq!((adoption.chunks, adoption.changed), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_budget_another_chunk_size() {
    let mut fixture = Fixture::new(10);
    let (a, b) =
        (fixture.model("a", &[4 * CHUNK], Trust::Chunk), fixture.model("b", &[5 * CHUNK], Trust::Chunk));
    let both = [&a, &b];
    for model in both {
        read_for(&fixture, model).await;
    }
    // More room than there was: the pool grows.
    let adoption = restart(&mut fixture, 30, &both);
    assert_eq!((adoption.chunks, adoption.evicted), (9, 0));
    let large = fixture.model("large", &[21 * CHUNK], Trust::Chunk);
    read_for(&fixture, &large).await;
    assert_eq!(fixture.store.stats().evictions.room, 0);
    // Less: what is worth least goes, and that is the ends.
    let adoption = restart(&mut fixture, 6, &both);
    assert_eq!((adoption.unknown, adoption.chunks, adoption.evicted), (21, 6, 3));
    let stats = fixture.store.stats();
    assert_eq!((stats.used, stats.budget), (ByteSize(6 * CHUNK as u64), ByteSize(6 * CHUNK as u64)));
    assert!(stats.residency.iter().all(|r| r.prefix == r.resident), "{stats:?}");
    assert_eq!(fixture.store.resident().unwrap(), stats.used, "the rest went back to the system");

    let memory = fixture.store.memory().unwrap().unwrap();
    let larger = StoreConfig { chunk: ByteSize(2 * CHUNK as u64), ..config(&fixture, 6) };
    assert!(matches!(Store::adopt(larger, memory, known(&both), &[]), Err(OpenError::Pool(_))));
    let private = Store::open(StoreConfig { shared: false, ..config(&fixture, 1) }).unwrap();
    assert!(private.memory().unwrap().is_none());
}

// --- a real kill ---

const KILLS: usize = 25;
const VICTIMS: [(&str, usize, Trust); 5] = [
    ("v0", 5 * CHUNK + 3, Trust::Chunk),
    ("v1", 7 * CHUNK, Trust::None),
    ("v2", 3 * CHUNK + 4096, Trust::File),
    ("v3", 9 * CHUNK - 1, Trust::Chunk),
    ("v4", 1, Trust::None),
];
const VICTIM_CHUNKS: usize = 14;

fn victims(dir: &Path) -> Vec<Model> {
    let of = |(name, len, trust): (&str, usize, Trust)| {
        let (path, content) = (dir.join(name), vec![bytes(name, 1, len)]);
        let paths = vec![path];
        if !paths[0].exists() {
            fs::write(&paths[0], &content[0]).unwrap();
        }
        Model { files: describe(name, &paths, &content, trust), content: Arc::new(content), paths }
    };
    VICTIMS.into_iter().map(of).collect()
}

/// A process that loads, evicts, streams and gives up without end, killed at a random moment, many times. Whatever
/// instruction that hits, its successor finds only bytes that are right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_it_leaves_only_what_is_right() {
    let mut fixture = Fixture::new(VICTIM_CHUNKS as u64);
    // As the other process sees it: the version has the path in it.
    let dir = fs::canonicalize(fixture.dir.path()).unwrap();
    let models = victims(&dir);
    let all: Vec<&Model> = models.iter().collect();
    let mut random = Random(3);
    let mut adopted = 0;
    for kill in 0..KILLS {
        let PoolMemory { pool, ledger } = fixture.store.memory().unwrap().unwrap();
        let exe = std::env::current_exe().unwrap();
        let mut child = Command::new(exe)
            .args(["adopt::victim", "--exact", "--ignored", "--nocapture"])
            .current_dir(&dir)
            .stdin(Stdio::from(pool))
            .stderr(Stdio::from(ledger))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("begun")), "kill {kill}: the victim did not begin");
        std::thread::sleep(Duration::from_micros(random.next() % 30_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let adoption = restart(&mut fixture, VICTIM_CHUNKS, &all);
        let Adoption { unknown, changed, wrong, damaged, chunks, .. } = adoption;
        assert_eq!((unknown, wrong, damaged), (0, 0, 0), "kill {kill}: {adoption:?}");
        // Of a model of which only the hash is known, a part is of no use.
        assert!(changed < models[2].files.order().len(), "kill {kill}: {adoption:?}");
        adopted += chunks;
        for model in &models {
            let resident = fixture.store.stats().residency;
            let there = resident.iter().find(|r| r.model == model.files.key().name).map(|r| r.resident);
            let read = read_for(&fixture, model).await;
            // Room may have been made for the models before.
            assert!(read + there.unwrap_or_default().bytes() >= model.files.bytes().bytes());
        }
    }
    assert!(adopted > KILLS, "hardly anything was taken over: {adopted}");
}

/// Not a test: what is killed.
#[ignore = "run by another test"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim() {
    let take = |fd: std::os::fd::BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().unwrap() };
    let memory = PoolMemory { pool: take(std::io::stdin().as_fd()), ledger: take(std::io::stderr().as_fd()) };
    let dir = std::env::current_dir().unwrap();
    let models = victims(&dir);
    let all: Vec<&Model> = models.iter().collect();
    let config = StoreConfig {
        chunk: ByteSize(CHUNK as u64),
        read_threads: 3,
        ..StoreConfig::new(ByteSize((VICTIM_CHUNKS * CHUNK) as u64))
    };
    let (store, _, _) = Store::adopt(config, memory, known(&all), &[]).unwrap();
    let mut random = Random(u64::from(std::process::id()));
    println!("begun");
    loop {
        let model = all[random.below(all.len())];
        match random.below(8) {
            0 => drop(store.evict(&model.files.key().name).await),
            1 => {
                let options = StreamOptions { fresh: random.below(2) == 0, ..StreamOptions::default() };
                if let Ok(mut stream) = store.stream(&model.files, options) {
                    drop(stream.next().await);
                }
            }
            2 => {
                // Given up at once.
                drop(store.begin(&model.files, Priority::Prefetch));
            }
            _ => drop(store.load(&model.files, Priority::Demand, &Default::default()).await),
        }
    }
}
