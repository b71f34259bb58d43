//! A model as the store sees it: files, sums, and the order in which their chunks are wanted.

use std::{
    collections::HashSet,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use stoker_checkpoint::{ChunkSum, FileIdentity, Manifest, Origin, Trust, manifest::CHUNK_BYTES};
use stoker_types::{ByteSize, ModelName, RemoteObject};

use crate::layout::FileRange;

/// One version of a model's bytes: its name and a hash of its files' paths and identities, or of the objects that they are
/// copies of, so that a model stays the same when it lands on this machine. Of use within one process only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelKey {
    /// The model.
    pub name: ModelName,
    /// Which version.
    pub identity: u64,
}

/// A weight file.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceFile {
    /// Where it is, absolute.
    pub path: PathBuf,
    /// Its length, time and inode when it was indexed.
    pub identity: FileIdentity,
    /// Sums of its chunks; empty when none is known.
    pub chunk_sums: Vec<ChunkSum>,
    /// SHA-256 of the whole file in lower-case hexadecimal, if known. Checked when no sums are known.
    pub sha256: Option<String>,
    /// Where it can be had again; for a file of which only the header is here, where it is.
    pub origin: Option<Origin>,
}

/// A chunk of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// Index of the file.
    pub file: u32,
    /// Index of the chunk in the file.
    pub index: u32,
}

/// A model's files, as the store loads them. Cheap to clone.
#[derive(Clone)]
pub struct CheckpointFiles {
    inner: Arc<Inner>,
}

struct Inner {
    key: ModelKey,
    files: Vec<SourceFile>,
    trust: Trust,
    chunk_bytes: u64,
    /// Every chunk once, in the order in which they are wanted.
    order: Vec<ChunkRef>,
    /// Of those chunks.
    bytes: ByteSize,
}

/// Why files can't be loaded as they are described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The number of sums doesn't fit the file.
    #[error("{path}: {given} chunk sums for {expected} chunks")]
    SumCount {
        /// The file.
        path: PathBuf,
        /// Chunks that it has.
        expected: u64,
        /// Sums that were given.
        given: usize,
    },
    /// More chunks or files than can be numbered.
    #[error("the files have too many chunks: {chunks}")]
    TooLarge {
        /// How many.
        chunks: u64,
    },
}

// === impl CheckpointFiles ===

impl CheckpointFiles {
    /// The weight files of the model whose directory is `dir`. Chunks are wanted in the order in which the manifest's
    /// tensors first touch them.
    ///
    /// # Errors
    /// [`FilesError`] when the manifest contradicts itself.
    pub fn from_manifest(name: ModelName, dir: &Path, manifest: &Manifest) -> Result<Self, FilesError> {
        Self::in_chunks(name, dir, manifest, CHUNK_BYTES)
    }

    /// As [`Self::from_manifest`], in chunks of another size. The manifest's sums are of [`CHUNK_BYTES`] each, so none is
    /// known then.
    ///
    /// # Errors
    /// [`FilesError`].
    ///
    /// # Panics
    /// When `chunk_bytes` is zero.
    pub fn in_chunks(
        name: ModelName,
        dir: &Path,
        manifest: &Manifest,
        chunk_bytes: u64,
    ) -> Result<Self, FilesError> {
        let known = chunk_bytes == CHUNK_BYTES;
        let files = manifest
            .files
            .iter()
            .map(|file| SourceFile {
                path: dir.join(&file.path),
                identity: file.identity,
                chunk_sums: if known { file.chunk_sums.clone() } else { Vec::new() },
                sha256: file.sha256.clone().filter(|_| known),
                origin: file.origin.clone(),
            })
            .collect();
        let touched = manifest.tensors.iter().flat_map(|tensor| {
            // Bounded by the file, not by what the tensor says.
            let file = manifest.files.get(tensor.file as usize);
            let chunks = file.map_or(0, |file| file.identity.len.div_ceil(chunk_bytes));
            let first = tensor.offset / chunk_bytes;
            let last = tensor.offset.saturating_add(tensor.len.saturating_sub(1)) / chunk_bytes;
            (first..chunks.min(last.saturating_add(1)))
                .map_while(|index| Some(ChunkRef { file: tensor.file, index: u32::try_from(index).ok()? }))
        });
        let trust = if known { manifest.trust } else { Trust::None };
        Self::new(name, files, trust, chunk_bytes, touched)
    }

    /// Files with chunks of `chunk_bytes` (the store's own size). Chunks are wanted in the order of `first`, then those
    /// that it doesn't name, file after file.
    ///
    /// # Errors
    /// [`FilesError`].
    ///
    /// # Panics
    /// When `chunk_bytes` is zero.
    pub fn new(
        name: ModelName,
        files: Vec<SourceFile>,
        trust: Trust,
        chunk_bytes: u64,
        first: impl IntoIterator<Item = ChunkRef>,
    ) -> Result<Self, FilesError> {
        let mut counts = Vec::with_capacity(files.len());
        let mut chunks = 0_u64;
        for file in &files {
            let expected = file.identity.len.div_ceil(chunk_bytes);
            chunks = chunks.saturating_add(expected);
            let count = u32::try_from(expected).map_err(|_| FilesError::TooLarge { chunks })?;
            if !file.chunk_sums.is_empty() && file.chunk_sums.len() as u64 != expected {
                let given = file.chunk_sums.len();
                return Err(FilesError::SumCount { path: file.path.clone(), expected, given });
            }
            counts.push(count);
        }
        // The order takes memory for each chunk, so a length that no disk has must not get that far: 2^24 chunks of
        // 16 MiB are 256 TiB.
        if chunks > 1 << 24 || u32::try_from(files.len()).is_err() {
            return Err(FilesError::TooLarge { chunks });
        }
        let exists =
            |chunk: &ChunkRef| counts.get(chunk.file as usize).is_some_and(|count| chunk.index < *count);
        let rest = (0_u32..)
            .zip(&counts)
            .flat_map(|(file, count)| (0..*count).map(move |index| ChunkRef { file, index }));
        let mut seen = HashSet::new();
        let order: Vec<_> =
            first.into_iter().filter(exists).chain(rest).filter(|chunk| seen.insert(*chunk)).collect();

        let mut hasher = DefaultHasher::new();
        for file in &files {
            match &file.origin {
                Some(origin) => origin.object.hash(&mut hasher),
                None => {
                    file.path.hash(&mut hasher);
                    (file.identity.len, file.identity.mtime_ns, file.identity.inode).hash(&mut hasher);
                }
            }
        }
        (chunk_bytes, &order).hash(&mut hasher);
        let key = ModelKey { name, identity: hasher.finish() };
        Ok(Self::of(key, files, trust, chunk_bytes, order))
    }

    /// Only the chunks that hold a byte of these ranges, in the same order. A hash of a whole file says nothing about a part
    /// of it, so none is known of the result.
    #[must_use]
    pub fn part(&self, ranges: impl IntoIterator<Item = FileRange>) -> Self {
        let mut wanted = HashSet::new();
        for FileRange { file, offset, len } in ranges {
            // Bounded by the file, not by what the range says.
            let end = self.inner.files.get(file as usize).map_or(0, |file| file.identity.len);
            let last = offset.saturating_add(len).min(end).div_ceil(self.inner.chunk_bytes);
            let first = offset / self.inner.chunk_bytes;
            let chunks = if len == 0 { 0..0 } else { first..last };
            wanted.extend(
                chunks.filter_map(|index| Some(ChunkRef { file, index: u32::try_from(index).ok()? })),
            );
        }
        let Inner { key, files, trust, chunk_bytes, order, bytes: _ } = &*self.inner;
        let order: Vec<_> = order.iter().copied().filter(|chunk| wanted.contains(chunk)).collect();
        let mut files = files.clone();
        files.iter_mut().for_each(|file| file.sha256 = None);
        let trust = if *trust == Trust::File { Trust::None } else { *trust };
        let mut hasher = DefaultHasher::new();
        (key.identity, &order).hash(&mut hasher);
        let key = ModelKey { name: key.name.clone(), identity: hasher.finish() };
        Self::of(key, files, trust, *chunk_bytes, order)
    }

    fn of(
        key: ModelKey,
        files: Vec<SourceFile>,
        trust: Trust,
        chunk_bytes: u64,
        order: Vec<ChunkRef>,
    ) -> Self {
        let len = |chunk: &ChunkRef| {
            let begin = u64::from(chunk.index) * chunk_bytes;
            (files[chunk.file as usize].identity.len - begin).min(chunk_bytes)
        };
        let bytes = ByteSize(order.iter().map(len).sum());
        Self { inner: Arc::new(Inner { key, files, trust, chunk_bytes, order, bytes }) }
    }

    /// Whether every chunk of the files is among its own.
    pub(crate) fn is_whole(&self) -> bool {
        let chunks = |file: &SourceFile| file.identity.len.div_ceil(self.inner.chunk_bytes);
        self.inner.files.iter().map(chunks).sum::<u64>() == self.inner.order.len() as u64
    }

    /// Which version of which model.
    #[must_use]
    pub fn key(&self) -> &ModelKey {
        &self.inner.key
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> &[SourceFile] {
        &self.inner.files
    }

    /// Files of which nothing but a hash of the whole is known, with that hash.
    pub(crate) fn to_hash(&self) -> impl Iterator<Item = (usize, &str)> {
        let only_hash = |file: &SourceFile| file.chunk_sums.is_empty() && file.identity.len > 0;
        let files = self.inner.files.iter().enumerate().filter(move |(_, file)| only_hash(file));
        files.filter_map(|(index, file)| Some((index, file.sha256.as_deref()?)))
    }

    /// An object that its bytes are in, if they are in a remote store.
    pub(crate) fn object(&self) -> Option<&RemoteObject> {
        self.inner.files.iter().find_map(|file| Some(&file.origin.as_ref()?.object))
    }

    /// What is known about the bytes before they are read.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.inner.trust
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.inner.chunk_bytes
    }

    /// Every chunk, in the order in which they are wanted.
    #[must_use]
    pub fn order(&self) -> &[ChunkRef] {
        &self.inner.order
    }

    /// Bytes of all its chunks.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        self.inner.bytes
    }

    /// Bytes that its chunks take in the pool.
    #[must_use]
    pub fn pool_bytes(&self) -> ByteSize {
        ByteSize(self.inner.order.len() as u64 * self.inner.chunk_bytes)
    }

    /// The file of a chunk.
    pub(crate) fn file_of(&self, chunk: ChunkRef) -> &SourceFile {
        &self.inner.files[chunk.file as usize]
    }

    /// Where a chunk begins in its file.
    pub(crate) fn offset(&self, chunk: ChunkRef) -> u64 {
        u64::from(chunk.index) * self.inner.chunk_bytes
    }

    /// Bytes of a chunk: fewer at the end of a file.
    pub(crate) fn chunk_len(&self, chunk: ChunkRef) -> u64 {
        (self.file_of(chunk).identity.len - self.offset(chunk)).min(self.inner.chunk_bytes)
    }

    /// A chunk's number, counting through the files one after the other: chunk `index` of file `file` comes behind all
    /// chunks of the files before.
    #[must_use]
    pub fn number(&self, chunk: ChunkRef) -> u64 {
        let before = self.inner.files.iter().take(chunk.file as usize);
        before.map(|file| self.chunks_of(file)).sum::<u64>() + u64::from(chunk.index)
    }

    /// How many chunks its files have, those that nobody wants included.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.inner.files.iter().map(|file| self.chunks_of(file)).sum()
    }

    fn chunks_of(&self, file: &SourceFile) -> u64 {
        file.identity.len.div_ceil(self.inner.chunk_bytes)
    }

    /// The known sum of a chunk.
    pub(crate) fn sum(&self, chunk: ChunkRef) -> Option<ChunkSum> {
        self.file_of(chunk).chunk_sums.get(chunk.index as usize).copied()
    }

    /// One value for each chunk, given by place in the order, sorted by file and chunk.
    pub(crate) fn by_file<T: Clone>(&self, empty: T, values: impl IntoIterator<Item = T>) -> Vec<Vec<T>> {
        let count = |file: &SourceFile| usize::try_from(file.identity.len.div_ceil(self.inner.chunk_bytes));
        let mut sorted: Vec<Vec<T>> =
            self.inner.files.iter().map(|file| vec![empty.clone(); count(file).unwrap_or(0)]).collect();
        for (chunk, value) in self.inner.order.iter().zip(values) {
            sorted[chunk.file as usize][chunk.index as usize] = value;
        }
        sorted
    }
}

impl fmt::Debug for CheckpointFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointFiles")
            .field("key", &self.inner.key)
            .field("files", &self.inner.files.len())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use stoker_checkpoint::{
        Format, GenerationDefaults, Source, Tensor, TokenizerFiles, WeightFile, manifest::MANIFEST_VERSION,
    };
    use stoker_types::DType;

    use super::*;

    fn file(len: u64, sums: usize) -> SourceFile {
        SourceFile {
            path: "/m/weights".into(),
            identity: FileIdentity { len, mtime_ns: 1, inode: 1 },
            chunk_sums: vec![ChunkSum(1); sums],
            sha256: None,
            origin: None,
        }
    }

    fn files(files: Vec<SourceFile>, first: Vec<(u32, u32)>) -> Result<CheckpointFiles, FilesError> {
        let first = first.into_iter().map(|(file, index)| ChunkRef { file, index });
        CheckpointFiles::new(ModelName::new("m").unwrap(), files, Trust::Chunk, 10, first)
    }

    #[test]
    fn wanted_chunks_come_first_and_every_chunk_once() {
        let model =
            files(vec![file(25, 3), file(10, 0), file(0, 0)], vec![(1, 0), (0, 2), (1, 0), (0, 3), (7, 0)]);
        let model = model.unwrap();
        let order: Vec<_> = model.order().iter().map(|c| (c.file, c.index)).collect();
        assert_eq!(order, [(1, 0), (0, 2), (0, 0), (0, 1)]);
        assert_eq!(model.chunk_len(ChunkRef { file: 0, index: 2 }), 5);
        assert_eq!(model.by_file(0, [1, 2, 3, 4]), [vec![3, 4, 2], vec![1], vec![]]);
        assert_eq!((model.bytes(), model.pool_bytes()), (ByteSize(35), ByteSize(40)));
    }

    #[test]
    fn a_manifests_tensors_decide_the_order() {
        let tensor = |file, offset, len| Tensor {
            name: "t".into(),
            role: None,
            dtype: DType::U8,
            shape: vec![len],
            file,
            offset,
            len,
        };
        let weights = |path: &str, chunks| WeightFile {
            path: path.into(),
            identity: FileIdentity { len: chunks * CHUNK_BYTES, mtime_ns: 1, inode: 1 },
            sha256: None,
            chunk_sums: Vec::new(),
            origin: None,
        };
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            source: Source { uri: "test".into(), revision: None },
            trust: Trust::None,
            format: Format::Safetensors,
            config: None,
            refusal: None,
            files: vec![weights("a", 3), weights("b", 2)],
            tokenizer: TokenizerFiles::None,
            generation: GenerationDefaults::default(),
            packed: None,
            tensors: vec![
                tensor(1, CHUNK_BYTES - 1, 2),
                tensor(0, 2 * CHUNK_BYTES, 0),
                // From beyond its file, or of no file at all: no chunk, no endless loop.
                tensor(0, u64::MAX - 5, u64::MAX),
                tensor(9, 0, u64::MAX),
            ],
        };
        let name = ModelName::new("m").unwrap();
        let model = CheckpointFiles::from_manifest(name, Path::new("/models/m"), &manifest).unwrap();
        let order: Vec<_> = model.order().iter().map(|c| (c.file, c.index)).collect();
        assert_eq!(order, [(1, 0), (1, 1), (0, 2), (0, 0), (0, 1)]);
        assert_eq!(model.files()[1].path, Path::new("/models/m/b"));
    }

    #[test]
    fn a_part_has_its_own_chunks_and_key() {
        let whole = files(vec![file(25, 3), file(40, 0)], vec![(1, 3)]).unwrap();
        let range = |file, offset, len| FileRange { file, offset, len };
        let part = whole.part([
            range(0, 19, 2),
            range(1, 30, 1),
            range(0, 3, 0),
            range(7, 0, 1),
            range(1, 39, u64::MAX),
        ]);
        let order: Vec<_> = part.order().iter().map(|c| (c.file, c.index)).collect();
        assert_eq!(order, [(1, 3), (0, 1), (0, 2)]);
        assert_eq!((part.bytes(), whole.bytes()), (ByteSize(25), ByteSize(65)));
        assert!(!part.is_whole() && whole.is_whole());
        assert_ne!(part.key(), whole.key());
        assert_eq!(part.sum(ChunkRef { file: 0, index: 2 }), Some(ChunkSum(1)));
    }

    #[test]
    fn contradictions() {
        assert!(matches!(
            files(vec![file(25, 2)], vec![]),
            Err(FilesError::SumCount { expected: 3, given: 2, .. })
        ));
        assert!(matches!(files(vec![file(u64::MAX, 0)], vec![]), Err(FilesError::TooLarge { .. })));
        assert!(matches!(files(vec![file(10 << 30, 0)], vec![]), Err(FilesError::TooLarge { .. })));
    }

    #[test]
    fn another_version_has_another_key() {
        let one = files(vec![file(25, 0)], vec![]).unwrap();
        let same = files(vec![file(25, 3)], vec![]).unwrap();
        assert_eq!(one.key(), same.key(), "what is known of the bytes doesn't change them");
        let mut touched = file(25, 0);
        touched.identity.mtime_ns = 2;
        assert_ne!(one.key(), files(vec![touched], vec![]).unwrap().key());
    }
}
