//! A model's bytes on their way to a disk.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use stoker_checkpoint::ChunkSum;
use stoker_types::{ByteSize, ModelName, RemoteObject};
use tokio::sync::watch;

use super::journal::{Journal, Present};
use crate::{
    error::LoadError,
    files::{CheckpointFiles, ChunkRef},
};

/// In a copy's directory.
const JOURNAL: &str = "journal";
const ABOUT: &str = "about.json";
/// Where a finished copy is put together.
const LANDING: &str = "landing";

/// A direct write's address, offset and length are multiples of it.
const ALIGN: usize = 4096;

/// A copy that isn't whole yet: one file for each weight file, and a journal of the chunks that are there. Its directory
/// is nobody's model; see [`super::Shelf::land`].
pub(crate) struct SsdCopy {
    pub(crate) files: CheckpointFiles,
    pub(crate) key: u64,
    /// Index of the disk.
    pub(crate) disk: usize,
    dir: PathBuf,
    parts: Vec<PartFile>,
    state: Mutex<State>,
    progress: watch::Sender<CopyProgress>,
}

struct PartFile {
    path: PathBuf,
    file: File,
    /// Past the page cache, where the file system can.
    direct: Option<File>,
}

struct State {
    journal: Journal,
    present: Present,
    /// Written, not yet durable.
    unsaved: Vec<(u32, u32, ChunkSum)>,
}

/// How far a copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyProgress {
    /// Bytes that are there and durable.
    pub present: ByteSize,
    /// Bytes that there will be.
    pub total: ByteSize,
    /// How it ended.
    pub end: Option<CopyEnd>,
}

/// How a copy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyEnd {
    /// It is whole, checked, and a model of this machine.
    Landed,
    /// It is given up, and removed.
    GivenUp(GiveUp),
    /// What is there stays for the next time; why it isn't whole.
    Interrupted(String),
}

/// Why a copy is given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GiveUp {
    /// The store has another version by now: what is there is of no use.
    #[error("{detail}")]
    Changed {
        /// What is not as it was.
        detail: String,
    },
    /// A file's bytes aren't those that its source names.
    #[error("{file}: wrong content: SHA-256 should be {expected}, is {found}")]
    WrongHash {
        /// The file.
        file: String,
        /// What the source says.
        expected: String,
        /// What arrived.
        found: String,
    },
    /// The disk is full.
    #[error("the disk is full: {detail}")]
    DiskFull {
        /// What the operating system said.
        detail: String,
    },
    /// The disk failed, or the model can't be put in its place.
    #[error("{detail}")]
    Io {
        /// What the operating system said, or why there is no place.
        detail: String,
    },
}

/// What a copy's directory is for, for people and for [`super::SsdTier::look`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct About {
    pub(crate) model: ModelName,
    pub(crate) objects: Vec<RemoteObject>,
    pub(crate) chunk_bytes: u64,
}

// === impl SsdCopy ===

impl SsdCopy {
    /// Goes on with the copy in `dir`, or begins it. `None`: another process writes it.
    pub(crate) fn open(
        files: &CheckpointFiles,
        key: u64,
        disk: usize,
        dir: PathBuf,
    ) -> io::Result<Option<Arc<Self>>> {
        fs::create_dir_all(&dir)?;
        // Of a landing that a crash ended.
        match fs::remove_dir_all(dir.join(LANDING)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let about = About::of(files);
        let Some((journal, mut present)) = Journal::open(&dir.join(JOURNAL), &about.chunks())? else {
            return Ok(None);
        };
        fs::write(dir.join(ABOUT), serde_json::to_vec(&about)?)?;
        let parts = files
            .files()
            .iter()
            .enumerate()
            .zip(&mut present)
            .map(|((index, file), present)| {
                let path = dir.join(format!("{index}.part"));
                let is_there = fs::metadata(&path).is_ok_and(|meta| meta.len() == file.identity.len);
                if !is_there {
                    // What the journal says of a file that somebody took away means nothing.
                    present.fill(None);
                }
                PartFile::open(path, file.identity.len)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let state = State { journal, present, unsaved: Vec::new() };
        let progress =
            CopyProgress { present: bytes_of(files, &state.present), total: files.bytes(), end: None };
        let (files, state) = (files.clone(), Mutex::new(state));
        Ok(Some(Arc::new(Self {
            files,
            key,
            disk,
            dir,
            parts,
            state,
            progress: watch::Sender::new(progress),
        })))
    }

    pub(crate) fn part(&self, file: usize) -> &Path {
        &self.parts[file].path
    }

    /// The sum of a chunk that is there and durable.
    pub(crate) fn sum(&self, chunk: ChunkRef) -> Option<ChunkSum> {
        let state = self.state.lock();
        *state.present.get(chunk.file as usize)?.get(chunk.index as usize)?
    }

    /// Places, in the model's order, of chunks that are neither there nor written.
    pub(crate) fn missing(&self) -> Vec<usize> {
        let state = self.state.lock();
        let written =
            |chunk: &ChunkRef| state.unsaved.iter().any(|(f, i, _)| (*f, *i) == (chunk.file, chunk.index));
        let there = |chunk: &ChunkRef| state.present[chunk.file as usize][chunk.index as usize].is_some();
        let order = self.files.order().iter().enumerate();
        order.filter(|(_, chunk)| !there(chunk) && !written(chunk)).map(|(position, _)| position).collect()
    }

    /// Writes a chunk. It counts once [`SsdCopy::save`] was called.
    pub(crate) fn write(&self, chunk: ChunkRef, sum: ChunkSum, bytes: &[u8]) -> io::Result<()> {
        let part = &self.parts[chunk.file as usize];
        part.write(bytes, self.files.offset(chunk))?;
        self.state.lock().unsaved.push((chunk.file, chunk.index, sum));
        Ok(())
    }

    /// How many bytes wait for [`SsdCopy::save`].
    pub(crate) fn unsaved(&self) -> usize {
        self.state.lock().unsaved.len()
    }

    /// Makes what was written durable, and says so in the journal: in this order.
    pub(crate) fn save(&self) -> io::Result<()> {
        let unsaved = std::mem::take(&mut self.state.lock().unsaved);
        if unsaved.is_empty() {
            return Ok(());
        }
        let mut touched: Vec<u32> = unsaved.iter().map(|(file, ..)| *file).collect();
        touched.sort_unstable();
        touched.dedup();
        for file in touched {
            self.parts[file as usize].file.sync_data()?;
        }
        let present = {
            let state = &mut *self.state.lock();
            state.journal.add(&unsaved)?;
            for (file, chunk, sum) in unsaved {
                state.present[file as usize][chunk as usize] = Some(sum);
            }
            bytes_of(&self.files, &state.present)
        };
        self.progress.send_modify(|progress| progress.present = present);
        Ok(())
    }

    /// A chunk turned out to be wrong: it is fetched again.
    pub(crate) fn forget(&self, chunk: ChunkRef) {
        let state = &mut *self.state.lock();
        state.present[chunk.file as usize][chunk.index as usize] = None;
        if let Err(error) = state.journal.remove(chunk.file, chunk.index) {
            // Found wrong again after a restart, then.
            tracing::warn!(dir = %self.dir.display(), %error, "a wrong chunk of a copy is not struck out");
        }
    }

    /// The sums of all chunks, when all are there.
    pub(crate) fn whole(&self) -> Option<Vec<Vec<ChunkSum>>> {
        let state = self.state.lock();
        state.present.iter().map(|file| file.iter().copied().collect()).collect()
    }

    /// Strikes everything out: the parts are about to be moved, and a crash from here on begins anew. From here on the
    /// model that lands counts for the budget, and not the copy too.
    pub(crate) fn strike_out(&self) -> io::Result<()> {
        fs::remove_file(self.dir.join(JOURNAL))?;
        fs::remove_file(self.dir.join(ABOUT))?;
        File::open(&self.dir)?.sync_all()
    }

    pub(crate) fn progress(&self) -> watch::Receiver<CopyProgress> {
        self.progress.subscribe()
    }

    pub(crate) fn ended(&self) -> bool {
        self.progress.borrow().end.is_some()
    }

    pub(crate) fn end(&self, end: CopyEnd) {
        self.progress.send_modify(|progress| {
            progress.end.get_or_insert(end);
        });
    }

    /// Removes everything.
    pub(crate) fn discard(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), %error, "a copy that was given up stays");
        }
    }
}

// === impl GiveUp ===

impl GiveUp {
    /// Of a load's error, if it means that what is there of the copy is of no use.
    pub(crate) fn of(error: &LoadError) -> Option<Self> {
        match error {
            LoadError::ObjectChanged { .. } => Some(Self::Changed { detail: error.to_string() }),
            LoadError::WrongHash { path, expected, found } => Some(Self::WrongHash {
                file: path.display().to_string(),
                expected: expected.clone(),
                found: found.clone(),
            }),
            _ => None,
        }
    }
}

impl From<&io::Error> for GiveUp {
    fn from(error: &io::Error) -> Self {
        use io::ErrorKind::{QuotaExceeded, StorageFull};

        let detail = error.to_string();
        match error.kind() {
            StorageFull | QuotaExceeded => Self::DiskFull { detail },
            _ => Self::Io { detail },
        }
    }
}

impl fmt::Debug for SsdCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SsdCopy").field("dir", &self.dir).finish_non_exhaustive()
    }
}

fn bytes_of(files: &CheckpointFiles, present: &Present) -> ByteSize {
    let there = |chunk: &&ChunkRef| present[chunk.file as usize][chunk.index as usize].is_some();
    ByteSize(files.order().iter().filter(there).map(|chunk| files.chunk_len(*chunk)).sum())
}

// === impl PartFile ===

impl PartFile {
    fn open(path: PathBuf, len: u64) -> io::Result<Self> {
        let options = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options
        };
        let file = options().open(&path)?;
        if file.metadata()?.len() != len {
            // Without blocks behind it: what is there is what was written.
            file.set_len(len)?;
        }
        let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
        let direct = options().custom_flags(flags).open(&path).ok();
        Ok(Self { path, file, direct })
    }

    /// Past the page cache as far as alignment allows: what is written here was just in memory, and would push out
    /// what isn't.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let aligned = bytes.as_ptr().addr().is_multiple_of(ALIGN) && offset.is_multiple_of(ALIGN as u64);
        let head = match &self.direct {
            Some(direct) if aligned => {
                let len = bytes.len() / ALIGN * ALIGN;
                match direct.write_all_at(&bytes[..len], offset) {
                    Ok(()) => len,
                    // The file system takes the flag and not the write.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => 0,
                    Err(error) => return Err(error),
                }
            }
            _ => 0,
        };
        self.file.write_all_at(&bytes[head..], offset + head as u64)
    }
}

// === impl About ===

impl About {
    fn of(files: &CheckpointFiles) -> Self {
        let objects = files.files().iter().filter_map(|file| Some(file.origin.as_ref()?.object.clone()));
        Self { model: files.key().name.clone(), objects: objects.collect(), chunk_bytes: files.chunk_bytes() }
    }

    /// What the directory of a copy says.
    pub(crate) fn read(dir: &Path) -> Option<Self> {
        let bytes = fs::read(dir.join(ABOUT)).ok()?;
        // Memory is taken for each chunk: as many as a model may have.
        let fits =
            |about: &Self| about.chunk_bytes > 0 && about.total().bytes() / about.chunk_bytes < 1 << 24;
        serde_json::from_slice(&bytes).ok().filter(fits)
    }

    fn chunks(&self) -> Vec<usize> {
        let chunks = |object: &RemoteObject| object.len.div_ceil(self.chunk_bytes);
        self.objects.iter().map(|object| usize::try_from(chunks(object)).unwrap_or(0)).collect()
    }

    pub(crate) fn total(&self) -> ByteSize {
        ByteSize(self.objects.iter().fold(0, |sum, object| sum.saturating_add(object.len)))
    }

    /// Bytes that the journal in `dir` says are there.
    pub(crate) fn present(&self, dir: &Path) -> ByteSize {
        let Ok(present) = Journal::look(&dir.join(JOURNAL), &self.chunks()) else { return ByteSize::ZERO };
        let len = |object: &RemoteObject, chunk: usize| {
            (object.len - chunk as u64 * self.chunk_bytes).min(self.chunk_bytes)
        };
        let files = self.objects.iter().zip(&present);
        let bytes = files.flat_map(|(object, chunks)| {
            let there = chunks.iter().enumerate().filter(|(_, sum)| sum.is_some());
            there.map(move |(chunk, _)| len(object, chunk))
        });
        ByteSize(bytes.sum())
    }
}
