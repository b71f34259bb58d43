//! Which chunks of a copy are there, on disk: an append-only file beside its parts.
//!
//! A record is appended after the chunk's bytes are durable, so that whatever a crash leaves, a record that reads back
//! speaks of bytes that are there. Records that were lost cost a second fetch.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
};

use stoker_checkpoint::ChunkSum;

/// File, chunk, sum, and the sum of these three.
const RECORD_BYTES: usize = 24;

/// In a record's chunk: it is there no more.
const GONE: u32 = 1 << 31;

/// The sum of every chunk that is there, by file and chunk.
pub(crate) type Present = Vec<Vec<Option<ChunkSum>>>;

/// An open journal. Locked: one process at a time writes a copy.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
}

// === impl Journal ===

impl Journal {
    /// Opens or begins a journal of files with so many chunks. What a crash left half-written is cut off. `None`: another
    /// process has it.
    pub(crate) fn open(path: &Path, chunks: &[usize]) -> io::Result<Option<(Self, Present)>> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let (present, good) = replay(&mut file, chunks)?;
        file.set_len(good)?;
        file.seek(SeekFrom::Start(good))?;
        Ok(Some((Self { file }, present)))
    }

    /// Looks at a journal that another process may be writing.
    pub(crate) fn look(path: &Path, chunks: &[usize]) -> io::Result<Present> {
        Ok(replay(&mut File::open(path)?, chunks)?.0)
    }

    /// Says that chunks are there. Their bytes must be durable.
    pub(crate) fn add(&mut self, chunks: &[(u32, u32, ChunkSum)]) -> io::Result<()> {
        let records: Vec<u8> =
            chunks.iter().flat_map(|(file, chunk, sum)| record(*file, *chunk, *sum)).collect();
        self.file.write_all(&records)
    }

    /// Says that a chunk is there no more.
    pub(crate) fn remove(&mut self, file: u32, chunk: u32) -> io::Result<()> {
        self.file.write_all(&record(file, chunk | GONE, ChunkSum(0)))
    }
}

fn record(file: u32, chunk: u32, sum: ChunkSum) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..4].copy_from_slice(&file.to_le_bytes());
    record[4..8].copy_from_slice(&chunk.to_le_bytes());
    record[8..16].copy_from_slice(&sum.0.to_le_bytes());
    let check = ChunkSum::of(&record[..16]).0;
    record[16..].copy_from_slice(&check.to_le_bytes());
    record
}

/// What the records say, and how many bytes of them are good.
fn replay(file: &mut File, chunks: &[usize]) -> io::Result<(Present, u64)> {
    let mut present: Present = chunks.iter().map(|count| vec![None; *count]).collect();
    // Twice each chunk, should all have been lost once; more is no journal of this copy.
    let most = chunks.iter().sum::<usize>().saturating_mul(4 * RECORD_BYTES).max(RECORD_BYTES) as u64;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    let mut good = 0;
    for record in bytes.chunks_exact(RECORD_BYTES) {
        let word =
            |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (file, chunk) = (word(0), word(4));
        let there = present.get_mut(file as usize).and_then(|file| file.get_mut((chunk & !GONE) as usize));
        let Some(there) = there.filter(|_| ChunkSum::of(&record[..16]).0 == long(16)) else { break };
        *there = (chunk & GONE == 0).then(|| ChunkSum(long(8)));
        good += RECORD_BYTES as u64;
    }
    Ok((present, good))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_added_is_there_again_and_half_a_record_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, present) = Journal::open(&path, &[2, 1]).unwrap().unwrap();
        assert_eq!(present, [vec![None, None], vec![None]]);
        journal.add(&[(0, 1, ChunkSum(7)), (1, 0, ChunkSum(8))]).unwrap();
        assert!(Journal::open(&path, &[2, 1]).unwrap().is_none(), "one at a time");
        journal.remove(1, 0).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (_, present) = Journal::open(&path, &[2, 1]).unwrap().unwrap();
            let records = cut / RECORD_BYTES;
            assert_eq!(present[0][1], (records >= 1).then_some(ChunkSum(7)));
            assert_eq!(present[1][0], (records == 2).then_some(ChunkSum(8)));
            assert_eq!(fs::metadata(&path).unwrap().len(), (records * RECORD_BYTES) as u64);
        }
    }

    #[test]
    fn damage_ends_the_journal_and_foreign_bytes_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, _) = Journal::open(&path, &[3]).unwrap().unwrap();
        journal.add(&[(0, 0, ChunkSum(1)), (0, 1, ChunkSum(2)), (0, 2, ChunkSum(3))]).unwrap();
        drop(journal);
        let mut bytes = fs::read(&path).unwrap();
        bytes[RECORD_BYTES + 9] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(Journal::look(&path, &[3]).unwrap(), [vec![Some(ChunkSum(1)), None, None]]);
        fs::write(&path, vec![0xa5; 1 << 20]).unwrap();
        assert_eq!(Journal::look(&path, &[3]).unwrap(), [vec![None; 3]]);
    }
}
