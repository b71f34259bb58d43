//! Models on a real disk for tests.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};
use stoker_checkpoint::{ChunkSum, FileIdentity, Trust};
use stoker_io::{FaultyFiles, LocalFiles, MappedFile};
use stoker_store::{CheckpointFiles, Priority, Resident, SourceFile, Store, StoreConfig};
use stoker_types::{ByteSize, ModelName, hex};
use tokio_util::sync::CancellationToken;

pub(crate) const CHUNK: usize = 64 << 10;

/// A store of `chunks` chunks whose reads can be given faults.
pub(crate) struct Fixture {
    pub(crate) store: Store,
    pub(crate) faults: FaultyFiles<LocalFiles>,
    pub(crate) dir: tempfile::TempDir,
}

/// A model on disk, and what its files hold.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) files: CheckpointFiles,
    pub(crate) content: Arc<Vec<Vec<u8>>>,
    pub(crate) paths: Vec<PathBuf>,
}

impl Fixture {
    pub(crate) fn new(chunks: u64) -> Self {
        Self::with_threads(chunks, 3)
    }

    pub(crate) fn with_threads(chunks: u64, read_threads: usize) -> Self {
        // On the build directory's file system, which has direct reads; `/tmp` may be in memory.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // Four parts to a chunk.
        let part = 16 << 10;
        let files = LocalFiles { block_bytes: part, buffered_part_bytes: part, ..LocalFiles::default() };
        let faults = FaultyFiles::new(files);
        let store = Store::open(StoreConfig {
            chunk: ByteSize(CHUNK as u64),
            read_threads,
            opener: Arc::new(faults.clone()),
            ..StoreConfig::new(ByteSize(chunks * CHUNK as u64))
        })
        .unwrap();
        Self { store, faults, dir }
    }

    /// Writes a model with files of these lengths.
    pub(crate) fn model(&self, name: &str, lens: &[usize], trust: Trust) -> Model {
        let content: Vec<Vec<u8>> = lens.iter().zip(1..).map(|(len, seed)| bytes(name, seed, *len)).collect();
        let paths: Vec<_> = (0..lens.len()).map(|i| self.dir.path().join(format!("{name}-{i}"))).collect();
        for (path, content) in paths.iter().zip(&content) {
            fs::write(path, content).unwrap();
        }
        Model { files: describe(name, &paths, &content, trust), content: Arc::new(content), paths }
    }

    pub(crate) async fn load(&self, model: &Model) -> Result<Resident, stoker_store::LoadError> {
        self.store.load(&model.files, Priority::Demand, &CancellationToken::new()).await
    }

    /// Maps a resident model as a worker does, and compares every byte.
    pub(crate) fn check(&self, model: &Model, resident: &Resident) {
        let fd = self.store.pool_fd().unwrap();
        assert_eq!(resident.files().len(), model.content.len());
        for (slots, content) in resident.files().iter().zip(&*model.content) {
            let map = MappedFile::map(&fd, slots.len, self.store.chunk_bytes(), &slots.slots).unwrap();
            assert!(*map == **content, "{}: wrong bytes", model.files.key().name);
        }
    }
}

/// Describes files as a manifest would.
pub(crate) fn describe(name: &str, paths: &[PathBuf], content: &[Vec<u8>], trust: Trust) -> CheckpointFiles {
    let files = paths
        .iter()
        .zip(content)
        .map(|(path, content)| SourceFile {
            path: path.clone(),
            identity: identity(path),
            chunk_sums: match trust {
                Trust::Chunk => content.chunks(CHUNK).map(ChunkSum::of).collect(),
                _ => Vec::new(),
            },
            sha256: (trust == Trust::File).then(|| sha256(content)),
            origin: None,
        })
        .collect();
    CheckpointFiles::new(ModelName::new(name).unwrap(), files, trust, CHUNK as u64, []).unwrap()
}

/// In lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn identity(path: &Path) -> FileIdentity {
    let meta = fs::metadata(path).unwrap();
    FileIdentity {
        len: meta.len(),
        mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        inode: meta.ino(),
    }
}

/// Flips bits of a byte on disk as a bad disk does: the file's times stay.
pub(crate) fn rot(path: &Path, at: u64, bits: u8) {
    let mut file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    let byte = fs::read(path).unwrap()[usize::try_from(at).unwrap()];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte ^ bits]).unwrap();
    file.set_modified(times).unwrap();
    file.sync_all().unwrap();
}

/// Bytes that no other file has.
pub(crate) fn bytes(name: &str, seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(ChunkSum::of(name.as_bytes()).0 ^ seed);
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| random.next().to_le_bytes()).take(len / 8 + 1).flatten().collect();
    bytes.truncate(len);
    bytes
}

/// SplitMix64: the same numbers for the same seed, everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }
}
