//! Models that are elsewhere: loads from remote, copies on SSD as they pass, and what goes wrong on the way.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stoker_checkpoint::{ChunkSum, FileIdentity, Origin, Trust};
use stoker_io::{
    Choice, Completion, Fault, FaultKind, FaultyFiles, FileStamp, Gate, LocalFiles, Open, OpenRemote,
    ReadDone, ReadError, ReadMode, ReadOp, Reader, ReaderKind, Reason,
};
use stoker_store::{
    CheckpointFiles, CopyEnd, FinishedCopy, GiveUp, LoadError, Priority, Shelf, Shelved, SourceFile, SsdDisk,
    SsdTier, Store, StoreConfig, StreamOptions,
};
use stoker_types::{ByteSize, ModelName, RemoteObject, Tier};
use tokio_util::sync::CancellationToken;

use crate::common::{CHUNK, bytes, identity, rot, sha256};

/// A test that would wait for ever fails instead.
const FOREVER: Duration = Duration::from_secs(60);

/// Files of a directory as objects of a store: reads return at once and end on another thread.
#[derive(Clone)]
struct Elsewhere {
    files: FaultyFiles<LocalFiles>,
    reads: Arc<AtomicUsize>,
    under_way: Arc<AtomicUsize>,
    most_under_way: Arc<AtomicUsize>,
    reads_max: usize,
    /// Microseconds of a clock that only goes on when it is looked at, and by what a remote read takes.
    clock: Arc<AtomicU64>,
}

/// What a remote read takes on that clock: more than all looks at it.
const REMOTE_READ_US: u64 = 100_000;

struct ElsewhereReader {
    inner: Arc<dyn Reader>,
    object: RemoteObject,
    choice: Choice,
    of: Elsewhere,
}

/// A model that landed: where, and the sums of its files' chunks.
type Landed = (ModelName, PathBuf, Vec<Vec<ChunkSum>>);

/// Models' directories, without a registry.
#[derive(Default)]
struct Plain {
    /// Where models landed, with their bytes.
    landed: Mutex<Vec<Landed>>,
    kept: Mutex<Vec<ModelName>>,
    removed: Mutex<Vec<ModelName>>,
    /// What a landing waits for.
    gate: Mutex<Option<Gate>>,
}

struct Bed {
    dir: tempfile::TempDir,
    remote: Elsewhere,
    shelf: Arc<Plain>,
    disk: SsdDisk,
    local: FaultyFiles<LocalFiles>,
}

/// A model that is elsewhere.
#[derive(Clone)]
struct Away {
    files: CheckpointFiles,
    content: Vec<Vec<u8>>,
    path: PathBuf,
}

// === impl Elsewhere ===

impl OpenRemote for Elsewhere {
    fn open(&self, object: &RemoteObject) -> Result<Arc<dyn Reader>, ReadError> {
        let inner = self.files.open(Path::new(&object.url), ReadMode::Buffered);
        let gone = |_| ReadError::Changed { url: object.url.clone(), detail: "it is gone".into() };
        let choice = Choice { kind: ReaderKind::Remote, reason: Reason::NotHere("a directory") };
        Ok(Arc::new(ElsewhereReader {
            inner: inner.map_err(gone)?,
            object: object.clone(),
            choice,
            of: self.clone(),
        }))
    }

    fn reads_max(&self) -> usize {
        self.reads_max
    }
}

impl Reader for ElsewhereReader {
    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn stamp(&self) -> io::Result<FileStamp> {
        self.inner.stamp()
    }

    fn read(&self, op: ReadOp, done: Completion) {
        let of = self.of.clone();
        of.reads.fetch_add(1, Ordering::SeqCst);
        let now = of.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        of.most_under_way.fetch_max(now, Ordering::SeqCst);
        let (inner, object) = (Arc::clone(&self.inner), self.object.clone());
        std::thread::spawn(move || {
            of.clock.fetch_add(REMOTE_READ_US, Ordering::SeqCst);
            let is = inner.stamp().unwrap();
            if Some(is.mtime_ns.to_string()) != object.etag {
                of.under_way.fetch_sub(1, Ordering::SeqCst);
                let result = Err(ReadError::Changed { url: object.url, detail: "another ETag".into() });
                return done(ReadDone { buf: op.buf, result });
            }
            inner.read(
                op,
                Box::new(move |read| {
                    of.under_way.fetch_sub(1, Ordering::SeqCst);
                    done(read);
                }),
            );
        });
    }
}

// === impl Plain ===

impl Shelf for Plain {
    fn land(&self, copy: FinishedCopy<'_>) -> io::Result<()> {
        let gate = self.gate.lock().clone();
        if let Some(gate) = gate {
            gate.pass();
        }
        let target = copy.disk.join(copy.model.as_str());
        fs::create_dir_all(&target)?;
        for (i, file) in copy.files.iter().enumerate() {
            fs::rename(file, target.join(i.to_string()))?;
        }
        self.landed.lock().push((copy.model.clone(), target, copy.sums));
        Ok(())
    }

    fn shelved(&self, _: &Path) -> Vec<Shelved> {
        let kept = self.kept.lock();
        let size =
            |dir: &Path| fs::read_dir(dir).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        let shelved = |(model, dir, _): &Landed| Shelved {
            model: model.clone(),
            bytes: ByteSize(size(dir)),
            kept: kept.contains(model),
            host: String::new(),
        };
        self.landed.lock().iter().map(shelved).collect()
    }

    fn remove(&self, _: &Path, model: &ModelName) -> io::Result<ByteSize> {
        let mut landed = self.landed.lock();
        let at = landed.iter().position(|(name, ..)| name == model).unwrap();
        let (name, dir, _) = landed.remove(at);
        self.removed.lock().push(name);
        let bytes = fs::read_dir(&dir)?.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        fs::remove_dir_all(dir)?;
        Ok(ByteSize(bytes))
    }
}

// === impl Bed ===

impl Bed {
    fn new(budget_chunks: usize) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let remote = Elsewhere {
            files: FaultyFiles::new(LocalFiles::default()),
            reads: Arc::default(),
            under_way: Arc::default(),
            most_under_way: Arc::default(),
            reads_max: 3,
            clock: Arc::default(),
        };
        let budget = ByteSize((budget_chunks * CHUNK) as u64);
        let disk = SsdDisk { dir: dir.path().join("ssd"), budget, reserve: ByteSize::ZERO };
        let local = FaultyFiles::new(LocalFiles::default());
        Self { dir, remote, shelf: Arc::default(), disk, local }
    }

    fn tier(&self) -> SsdTier {
        SsdTier::open(vec![self.disk.clone()], Arc::clone(&self.shelf) as Arc<dyn Shelf>).unwrap()
    }

    fn store(&self) -> Store {
        Store::open(StoreConfig {
            chunk: ByteSize(CHUNK as u64),
            read_threads: 2,
            opener: Arc::new(self.local.clone()),
            remote: Some(Arc::new(self.remote.clone())),
            ssd: Some(self.tier()),
            ..StoreConfig::new(ByteSize(64 * CHUNK as u64))
        })
        .unwrap()
    }

    fn away(&self, name: &str, lens: &[usize], trust: Trust) -> Away {
        let content: Vec<Vec<u8>> = lens.iter().zip(1..).map(|(len, seed)| bytes(name, seed, *len)).collect();
        let mut files = Vec::new();
        let mut first = PathBuf::new();
        for (i, content) in content.iter().enumerate() {
            let path = self.dir.path().join(format!("{name}-{i}"));
            fs::write(&path, content).unwrap();
            files.push(self.file(&path, content, trust));
            first = if i == 0 { path } else { first };
        }
        let files =
            CheckpointFiles::new(ModelName::new(name).unwrap(), files, trust, CHUNK as u64, []).unwrap();
        Away { files, content, path: first }
    }

    fn file(&self, path: &Path, content: &[u8], trust: Trust) -> SourceFile {
        let is = identity(path);
        let object = RemoteObject {
            url: path.to_str().unwrap().to_owned(),
            len: is.len,
            etag: Some(is.mtime_ns.to_string()),
            modified_ms: None,
        };
        SourceFile {
            path: "/nowhere".into(),
            identity: FileIdentity { len: is.len, mtime_ns: 0, inode: 0 },
            chunk_sums: match trust {
                Trust::Chunk => content.chunks(CHUNK).map(ChunkSum::of).collect(),
                _ => Vec::new(),
            },
            sha256: (trust == Trust::File).then(|| sha256(content)),
            origin: Some(Origin { object, header_only: true }),
        }
    }

    /// The files of a model that landed, as its new manifest would describe them.
    fn landed(&self, away: &Away) -> CheckpointFiles {
        let landed = self.shelf.landed.lock();
        let (.., dir, sums) = landed.iter().find(|(name, ..)| *name == away.files.key().name).unwrap();
        let files = away.files.files().iter().zip(sums).enumerate().map(|(i, (file, sums))| {
            let path = dir.join(i.to_string());
            let origin = file.origin.clone().map(|origin| Origin { header_only: false, ..origin });
            SourceFile { identity: identity(&path), path, chunk_sums: sums.clone(), sha256: None, origin }
        });
        CheckpointFiles::new(away.files.key().name.clone(), files.collect(), Trust::Chunk, CHUNK as u64, [])
            .unwrap()
    }

    fn reads(&self) -> usize {
        self.remote.reads.swap(0, Ordering::SeqCst)
    }
}

/// Waits until the last read of a store that was dropped has let go of its copy.
async fn let_go(bed: &Bed) -> stoker_store::Leftover {
    let left = bed.tier().look()[0].copies[0].clone();
    until("let go", || fs::File::open(left.dir.join("journal")).unwrap().try_lock().is_ok()).await;
    left
}

async fn load(store: &Store, files: &CheckpointFiles) -> Result<stoker_store::Resident, LoadError> {
    let cancel = CancellationToken::new();
    tokio::time::timeout(FOREVER, store.load(files, Priority::Demand, &cancel))
        .await
        .expect("no end of the load")
}

/// Waits until the copy of a model has ended.
async fn copied(store: &Store, files: &CheckpointFiles) -> CopyEnd {
    let mut progress = tokio::task::block_in_place(|| store.copy(files, Priority::Demand)).unwrap().unwrap();
    let ended = tokio::time::timeout(FOREVER, progress.wait_for(|p| p.end.is_some())).await;
    ended.expect("no end of the copy").unwrap().end.clone().unwrap()
}

/// Waits until something is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let waited = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(FOREVER, waited).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn check_landed(bed: &Bed, away: &Away) {
    let landed = bed.shelf.landed.lock().clone();
    let (.., dir, sums) = landed.iter().find(|(name, ..)| *name == away.files.key().name).expect("it landed");
    for (i, content) in away.content.iter().enumerate() {
        assert!(fs::read(dir.join(i.to_string())).unwrap() == *content, "other bytes on SSD");
        assert_eq!(sums[i], content.chunks(CHUNK).map(ChunkSum::of).collect::<Vec<_>>());
    }
    until("cleared up", || bed.tier().look()[0].copies.is_empty()).await;
}

// === loads and copies ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_start_reads_remote_once_and_leaves_a_copy_on_ssd() {
    for trust in [Trust::None, Trust::File, Trust::Chunk] {
        let bed = Bed::new(64);
        let store = bed.store();
        let away = bed.away("m", &[9 * CHUNK + 77, 5, CHUNK, 0], trust);
        let resident = load(&store, &away.files).await.unwrap();
        assert_eq!(resident.report().bytes_from(Tier::Remote), away.files.bytes());
        until("landed", || bed.shelf.landed.lock().len() == 1).await;
        check_landed(&bed, &away).await;
        assert_eq!(bed.reads(), 12, "every chunk once");
        assert!(bed.remote.most_under_way.load(Ordering::SeqCst) <= 3, "no more reads than may be");
        // The same model, whether here or there: nothing is read again.
        drop(resident);
        let again = load(&store, &bed.landed(&away)).await.unwrap();
        assert_eq!(again.report().bytes_from(Tier::Dram), away.files.bytes());
        drop(again);
        store.drop_all().await;
        let from_disk = load(&store, &bed.landed(&away)).await.unwrap();
        assert_eq!(from_disk.report().bytes_from(Tier::Ssd), away.files.bytes());
        assert_eq!(bed.reads(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_hold_no_thread_and_are_bounded() {
    let bed = Bed::new(64);
    let gate = Gate::default();
    let away = bed.away("m", &[20 * CHUNK], Trust::None);
    let wait = Fault {
        path: "m-0".into(),
        bytes: 0..away.content[0].len() as u64,
        times: 3,
        kind: FaultKind::Wait(gate.clone()),
    };
    bed.remote.files.add(wait);
    let store = bed.store();
    let loading = store.begin(&away.files, Priority::Demand).unwrap();
    tokio::task::block_in_place(|| gate.wait_for_arrivals(3));
    // Two threads, three reads under way; the threads are free for what is here.
    let other = bed.away("other", &[CHUNK], Trust::None);
    let path = bed.dir.path().join("other-0");
    let here = SourceFile {
        path: path.clone(),
        identity: identity(&path),
        origin: None,
        ..other.files.files()[0].clone()
    };
    let here =
        CheckpointFiles::new(ModelName::new("here").unwrap(), vec![here], Trust::None, CHUNK as u64, [])
            .unwrap();
    load(&store, &here).await.unwrap();
    assert_eq!(bed.remote.reads.load(Ordering::SeqCst), 3);
    gate.open();
    let cancel = CancellationToken::new();
    loading.wait(&cancel).await.unwrap();
    assert_eq!(bed.remote.most_under_way.load(Ordering::SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_delays_no_load_and_what_it_missed_comes_later() {
    let bed = Bed::new(64);
    let store = bed.store();
    let gate = Gate::default();
    *bed.shelf.gate.lock() = Some(gate.clone());
    let first = bed.away("first", &[CHUNK], Trust::None);
    load(&store, &first.files).await.unwrap();
    // The writer is busy from here on.
    tokio::task::block_in_place(|| gate.wait_for_arrivals(1));
    let away = bed.away("m", &[30 * CHUNK], Trust::None);
    load(&store, &away.files).await.unwrap();
    // Of what could not be written nothing is in memory any more either.
    store.evict(&away.files.key().name).await;
    *bed.shelf.gate.lock() = None;
    gate.open();
    until("landed", || bed.shelf.landed.lock().len() == 2).await;
    check_landed(&bed, &away).await;
    let reads = bed.reads();
    assert!(reads > 31, "{reads} reads: what was missed is fetched again");
    // Which is no use of the model: it doesn't make it worth more than one that was used as often.
    let uses = fs::read(bed.disk.dir.join(".copies/uses.json")).unwrap();
    let uses: HashMap<String, (f64, u64)> = serde_json::from_slice(&uses).unwrap();
    assert!(uses["m"].0 < 1.5 && uses["first"].0 < 1.5, "{uses:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_passes_on_to_ssd_too() {
    let bed = Bed::new(64);
    let store = bed.store();
    let away = bed.away("m", &[25 * CHUNK + 1], Trust::None);
    let mut stream =
        store.stream(&away.files, StreamOptions { ring_chunks: 2, ..StreamOptions::default() }).unwrap();
    let mut passed = Vec::new();
    while let Some(chunk) = stream.next().await.unwrap() {
        passed.extend_from_slice(&chunk);
    }
    assert!(passed == away.content[0]);
    drop(stream);
    until("landed", || bed.shelf.landed.lock().len() == 1).await;
    check_landed(&bed, &away).await;
}

// === restarts ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_gone_on_with_after_a_restart() {
    let bed = Bed::new(64);
    let away = bed.away("m", &[16 * CHUNK + 9], Trust::None);
    // The store breaks after ten chunks.
    let broken = 10 * CHUNK as u64..17 * CHUNK as u64;
    bed.remote.files.add(Fault {
        path: "m-0".into(),
        bytes: broken,
        times: 99,
        kind: FaultKind::Error(io::ErrorKind::ConnectionReset),
    });
    let store = bed.store();
    let error = load(&store, &away.files).await.unwrap_err();
    assert!(matches!(error, LoadError::Read { .. }), "{error}");
    drop(store);
    let there = let_go(&bed).await;
    assert_eq!(there.model, Some(away.files.key().name.clone()));
    assert!(there.present > ByteSize::ZERO && there.present < there.total, "{there:?}");
    let chunks_there = usize::try_from(there.present.bytes()).unwrap() / CHUNK;
    bed.remote.files.clear();
    bed.reads();

    let store = bed.store();
    let resident = load(&store, &away.files).await.unwrap();
    assert_eq!(resident.report().bytes_from(Tier::Ssd), there.present, "what is there is read from there");
    assert_eq!(bed.reads(), 17 - chunks_there);
    until("landed", || bed.shelf.landed.lock().len() == 1).await;
    check_landed(&bed, &away).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_process_goes_on_with_is_reclaimed() {
    let bed = Bed::new(64);
    let away = bed.away("m", &[8 * CHUNK], Trust::None);
    bed.remote.files.add(Fault {
        path: "m-0".into(),
        bytes: 6 * CHUNK as u64..8 * CHUNK as u64,
        times: 99,
        kind: FaultKind::Truncate,
    });
    let store = bed.store();
    load(&store, &away.files).await.unwrap_err();
    let tier = bed.tier();
    tier.collect(None, |_| false);
    assert_eq!(tier.look()[0].copies.len(), 1, "a copy that a process writes stays");
    drop(store);
    let_go(&bed).await;
    tier.collect(None, |left| left.key == SsdTier::key_of(&away.files));
    assert_eq!(tier.look()[0].copies.len(), 1);
    tier.collect(None, |_| false);
    assert_eq!(tier.look()[0].copies, []);
    assert!(away.path.exists(), "nothing that Stoker did not write goes");
}

// === wrong bytes ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_on_ssd_are_fetched_again() {
    let bed = Bed::new(64);
    let store = bed.store();
    let away = bed.away("m", &[6 * CHUNK], Trust::None);
    load(&store, &away.files).await.unwrap();
    until("landed", || bed.shelf.landed.lock().len() == 1).await;
    store.drop_all().await;
    bed.reads();
    let landed = bed.landed(&away);
    rot(&landed.files()[0].path, CHUNK as u64 * 2 + 5, 1);
    let resident = load(&store, &landed).await.unwrap();
    assert_eq!(resident.report().bytes_from(Tier::Remote), ByteSize(CHUNK as u64));
    assert_eq!(bed.reads(), 1);
    until("removed", || bed.shelf.removed.lock().len() == 1).await;
    drop(resident);

    // A copy that isn't whole yet, damaged while nobody looked.
    let part = bed.away("p", &[6 * CHUNK], Trust::None);
    bed.remote.files.add(Fault {
        path: "p-0".into(),
        bytes: 5 * CHUNK as u64..6 * CHUNK as u64,
        times: 1,
        kind: FaultKind::Truncate,
    });
    load(&store, &part.files).await.unwrap_err();
    drop(store);
    let dir = let_go(&bed).await.dir;
    rot(&dir.join("0.part"), 7, 0x80);
    let store = bed.store();
    load(&store, &part.files).await.unwrap();
    until("landed", || bed.shelf.landed.lock().iter().any(|(name, ..)| name.as_str() == "p")).await;
    check_landed(&bed, &part).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_from_remote_are_read_again_and_never_used() {
    let bed = Bed::new(64);
    let store = bed.store();
    let flip = |times| Fault {
        path: "m-0".into(),
        bytes: 70_000..70_001,
        times,
        kind: FaultKind::Corrupt { bits: 1 },
    };
    let away = bed.away("m", &[3 * CHUNK], Trust::Chunk);
    bed.remote.files.add(flip(1));
    let resident = load(&store, &away.files).await.unwrap();
    assert_eq!(resident.report().reread, 1);
    until("landed", || bed.shelf.landed.lock().len() == 1).await;
    check_landed(&bed, &away).await;
    drop(resident);

    store.drop_all().await;
    bed.remote.files.add(flip(9));
    let error = load(&store, &away.files).await.unwrap_err();
    assert!(matches!(&error, LoadError::Corrupt { chunk: 1, .. }), "{error}");
    assert!(error.to_string().contains("m-0"), "{error}");
    bed.remote.files.clear();

    // Only a hash is known: found out at the end, and the copy doesn't land.
    let hashed = bed.away("h", &[3 * CHUNK], Trust::File);
    bed.remote.files.add(Fault { path: "h-0".into(), ..flip(1) });
    let error = load(&store, &hashed.files).await.unwrap_err();
    assert!(matches!(&error, LoadError::WrongHash { .. }), "{error}");
    let is_hashed = |left: &stoker_store::Leftover| left.model == Some(hashed.files.key().name.clone());
    until("given up", || !bed.tier().look()[0].copies.iter().any(is_hashed)).await;
    assert_eq!(bed.shelf.landed.lock().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_ends_the_load_and_its_copy() {
    let bed = Bed::new(64);
    let store = bed.store();
    let away = bed.away("m", &[12 * CHUNK], Trust::None);
    let gate = Gate::default();
    let late = 6 * CHUNK as u64..12 * CHUNK as u64;
    bed.remote.files.add(Fault {
        path: "m-0".into(),
        bytes: late,
        times: 99,
        kind: FaultKind::Wait(gate.clone()),
    });
    let loading = store.begin(&away.files, Priority::Demand).unwrap();
    tokio::task::block_in_place(|| gate.wait_for_arrivals(1));
    let file = fs::File::options().write(true).open(&away.path).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    gate.open();
    let cancel = CancellationToken::new();
    let error = tokio::time::timeout(FOREVER, loading.wait(&cancel)).await.unwrap().unwrap_err();
    assert!(matches!(&error, LoadError::ObjectChanged { .. }), "{error}");
    until("given up", || bed.tier().look()[0].copies.is_empty()).await;
    // Reads that were under way end within a chunk's time.
    until("free", || store.stats().used == ByteSize::ZERO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_an_old_version_makes_room_for_the_new() {
    let bed = Bed::new(64);
    // More than is on its way at a time: what came first is written when the last fails.
    let old = bed.away("m", &[40 * CHUNK], Trust::None);
    bed.remote.files.add(Fault {
        path: "m-0".into(),
        bytes: 39 * CHUNK as u64..40 * CHUNK as u64,
        times: 99,
        kind: FaultKind::Error(io::ErrorKind::ConnectionReset),
    });
    let store = bed.store();
    let end = copied(&store, &old.files).await;
    assert!(matches!(&end, CopyEnd::Interrupted(_)), "{end:?}");
    drop(store);
    let left = let_go(&bed).await;
    assert!(left.present > ByteSize::ZERO);
    bed.remote.files.clear();
    let new = bed.away("m", &[40 * CHUNK + 1], Trust::None);
    let store = bed.store();
    assert_eq!(copied(&store, &new.files).await, CopyEnd::Landed);
    check_landed(&bed, &new).await;
    assert!(!left.dir.exists());
}

// === what stays in memory ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_only_remote_stays_in_memory_longer() {
    const CHUNKS: usize = 70;
    // Without room for a copy, then with one that lands.
    for (ssd_chunks, lands) in [(1, false), (100, true)] {
        let bed = Bed::new(ssd_chunks);
        let clock = Arc::clone(&bed.remote.clock);
        let store = Store::open(StoreConfig {
            chunk: ByteSize(CHUNK as u64),
            // From the medium: reads from the page cache say nothing about the disk.
            read_mode: ReadMode::Direct,
            opener: Arc::new(bed.local.clone()),
            remote: Some(Arc::new(bed.remote.clone())),
            ssd: Some(bed.tier()),
            clock: Arc::new(move || Duration::from_micros(clock.fetch_add(1, Ordering::SeqCst))),
            ..StoreConfig::new(ByteSize(2 * CHUNKS as u64 * CHUNK as u64))
        })
        .unwrap();
        // Used first, so a little colder.
        let far = bed.away("far", &[CHUNKS * CHUNK], Trust::Chunk);
        drop(load(&store, &far.files).await.unwrap());
        if lands {
            until("landed", || bed.shelf.landed.lock().len() == 1).await;
            until("cleared up", || bed.tier().look()[0].copies.is_empty()).await;
        }
        let path = bed.dir.path().join("near");
        fs::write(&path, bytes("near", 1, CHUNKS * CHUNK)).unwrap();
        let near = SourceFile {
            path: path.clone(),
            identity: identity(&path),
            chunk_sums: Vec::new(),
            sha256: None,
            origin: None,
        };
        let near =
            CheckpointFiles::new(ModelName::new("near").unwrap(), vec![near], Trust::None, CHUNK as u64, [])
                .unwrap();
        drop(load(&store, &near).await.unwrap());
        let rates: Vec<_> = store.stats().rates.iter().map(|rate| rate.rate.unwrap().0).collect();
        assert!(rates[0] > 4.0 * rates[1], "SSD and remote: {rates:?}");
        let resident = || -> Vec<_> {
            store
                .stats()
                .residency
                .iter()
                .map(|r| (r.model.to_string(), r.resident.0 / CHUNK as u64))
                .collect()
        };
        assert_eq!(resident(), [("far".into(), 70), ("near".into(), 70)]);
        store.set_budget(ByteSize(120 * CHUNK as u64)).await;
        match &resident()[..] {
            [(_, far), (_, near)] if lands => {
                assert_eq!(far + near, 120);
                assert!(*far <= 60, "both are on SSD, and it is the colder: {far} of it stay");
            }
            stay => assert_eq!(stay, [("far".into(), 70), ("near".into(), 50)]),
        }
    }
}

// === budget ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_budget_holds_and_what_is_kept_stays() {
    let bed = Bed::new(20);
    let store = bed.store();
    let model = |name: &str, chunks: usize| bed.away(name, &[chunks * CHUNK], Trust::None);
    let names = |bed: &Bed| {
        let mut names: Vec<_> = bed.shelf.landed.lock().iter().map(|(name, ..)| name.to_string()).collect();
        names.sort();
        names
    };
    let (a, b, c) = (model("a", 8), model("b", 8), model("c", 8));
    for away in [&a, &b] {
        load(&store, &away.files).await.unwrap();
        until("landed", || names(&bed).contains(&away.files.key().name.to_string())).await;
    }
    // `a` is used once more: `b` makes room.
    store.drop_all().await;
    load(&store, &bed.landed(&a)).await.unwrap();
    load(&store, &c.files).await.unwrap();
    until("c landed", || names(&bed).contains(&"c".to_owned())).await;
    assert_eq!(names(&bed), ["a", "c"]);
    assert_eq!(bed.shelf.removed.lock().len(), 1);

    // What somebody asked for stays, so that there is no room: the load is none the worse for it.
    *bed.shelf.kept.lock() = vec![a.files.key().name.clone(), c.files.key().name.clone()];
    let d = model("d", 8);
    load(&store, &d.files).await.unwrap();
    let larger = model("larger", 21);
    load(&store, &larger.files).await.unwrap();
    assert!(tokio::task::block_in_place(|| store.copy(&larger.files, Priority::Demand)).unwrap().is_none());
    assert_eq!(names(&bed), ["a", "c"]);
    assert_eq!(bed.tier().look()[0].copies, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_larger_than_memory_and_disk_passes_through_both() {
    let bed = Bed::new(5);
    let store = Store::open(StoreConfig {
        chunk: ByteSize(CHUNK as u64),
        opener: Arc::new(bed.local.clone()),
        remote: Some(Arc::new(bed.remote.clone())),
        ssd: Some(bed.tier()),
        ..StoreConfig::new(ByteSize(3 * CHUNK as u64))
    })
    .unwrap();
    let away = bed.away("m", &[20 * CHUNK + 5], Trust::Chunk);
    let error = load(&store, &away.files).await.map(drop).unwrap_err();
    assert!(matches!(error, LoadError::OutOfBudget { .. }), "{error}");
    let mut stream = store.stream(&away.files, StreamOptions::default()).unwrap();
    let mut seen = 0;
    while let Some(chunk) = stream.next().await.unwrap() {
        assert!(away.content[0][seen..].starts_with(&chunk));
        seen += chunk.len();
    }
    assert_eq!(seen, away.content[0].len());
    drop(stream);
    assert_eq!(store.stats().used, ByteSize::ZERO);
    assert_eq!(bed.tier().look()[0].copies, [], "no room for a copy, none begun");
    assert_eq!(bed.reads(), 21, "every chunk once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_copies_without_a_load() {
    let bed = Bed::new(64);
    let store = bed.store();
    let away = bed.away("m", &[40 * CHUNK + 3, 77], Trust::File);
    assert_eq!(copied(&store, &away.files).await, CopyEnd::Landed);
    check_landed(&bed, &away).await;
    assert_eq!(bed.reads(), 42);
    assert_eq!(store.stats().used, ByteSize::ZERO);
    // Its hash is wrong: nothing lands.
    let wrong = bed.away("w", &[CHUNK], Trust::File);
    bed.remote.files.add(Fault {
        path: "w-0".into(),
        bytes: 0..1,
        times: 1,
        kind: FaultKind::Corrupt { bits: 1 },
    });
    let end = copied(&store, &wrong.files).await;
    assert!(matches!(&end, CopyEnd::GivenUp(GiveUp::WrongHash { .. })), "{end:?}");
}
