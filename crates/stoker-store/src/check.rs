//! The last check of a delivery: what is on the device against the sums of the files' chunks.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc, time::Duration};

use stoker_checkpoint::ChunkSum;
use stoker_device::Cut;
use stoker_io::ReadError;
use stoker_types::{ByteSize, clock};

use crate::{
    deliver::DeviceTarget,
    error::LoadError,
    files::{CheckpointFiles, ChunkRef},
    shared::Shared,
};

/// Chunks whose sums the device is asked for at a time.
const BATCH: usize = 256;

/// What was checked on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Bytes on the device.
    pub bytes: ByteSize,
    /// Bytes of the same chunks that it doesn't have, such as headers, which were read from the files.
    pub read: ByteSize,
    /// How long it took.
    pub time: Duration,
}

/// A chunk and what the device has of it.
struct Landed {
    at: ChunkRef,
    expected: ChunkSum,
    cuts: Vec<Cut>,
}

/// Computes the sum of every chunk from what the device has of it and what it hasn't. Blocks.
pub(crate) fn check(
    shared: &Arc<Shared>,
    files: &CheckpointFiles,
    target: &DeviceTarget,
) -> Result<Checked, LoadError> {
    let begun = clock::now();
    let mut checked = Checked { bytes: ByteSize::ZERO, read: ByteSize::ZERO, time: Duration::ZERO };
    let chunks = landed(shared, files, target)?;
    for batch in chunks.chunks(BATCH) {
        let ranges: Vec<_> =
            batch.iter().flat_map(|chunk| &chunk.cuts).map(|cut| (cut.to, cut.bytes())).collect();
        let on_device = target
            .device
            .sums(&target.slab, &ranges)
            .map_err(|source| LoadError::Device { model: files.key().name.clone(), source })?;
        let mut on_device = on_device.into_iter();
        for chunk in batch {
            let sums: Vec<_> = on_device.by_ref().take(chunk.cuts.len()).collect();
            let (found, read) = sum(files, chunk, &sums)?;
            checked.read += ByteSize(read);
            if found != chunk.expected {
                return Err(LoadError::CorruptOnDevice {
                    path: files.file_of(chunk.at).path.clone(),
                    chunk: chunk.at.index,
                    offset: files.offset(chunk.at),
                    device: target.device.info().ordinal,
                    expected: chunk.expected,
                    found,
                });
            }
        }
        checked.bytes += ByteSize(ranges.iter().map(|(_, len)| len).sum());
    }
    checked.time = begun.elapsed();
    Ok(checked)
}

/// Every chunk of which the device has something.
fn landed(
    shared: &Arc<Shared>,
    files: &CheckpointFiles,
    target: &DeviceTarget,
) -> Result<Vec<Landed>, LoadError> {
    let mut chunks = Vec::new();
    for (position, at) in files.order().iter().copied().enumerate() {
        let mut cuts = target.layout.cuts(files, at);
        if cuts.is_empty() {
            continue;
        }
        if cuts.iter().any(|cut| cut.rows > 1) {
            return Err(LoadError::Sliced { model: files.key().name.clone() });
        }
        cuts.sort_unstable_by_key(|cut| cut.from);
        // What was learned on the way counts, too.
        let known = shared.lock().cache.model(files.key()).map_or(files.sum(at), |model| model.sum(position));
        let Some(expected) = known.or(files.sum(at)) else {
            return Err(LoadError::NoSums { path: files.file_of(at).path.clone() });
        };
        chunks.push(Landed { at, expected, cuts });
    }
    Ok(chunks)
}

/// A chunk's sum, of ranges on the device and of the bytes between them, and how many those are.
fn sum(
    files: &CheckpointFiles,
    chunk: &Landed,
    on_device: &[ChunkSum],
) -> Result<(ChunkSum, u64), LoadError> {
    let (path, offset) = (&files.file_of(chunk.at).path, files.offset(chunk.at));
    let mut file = None;
    let mut between = |from: u64, to: u64| -> Result<ChunkSum, LoadError> {
        if from == to {
            return Ok(ChunkSum::of(&[]));
        }
        let opened = match file.take() {
            Some(opened) => opened,
            None => File::open(path)
                .map_err(|source| LoadError::Open { path: path.clone(), source: Arc::new(source) })?,
        };
        let mut bytes = vec![0; usize::try_from(to - from).unwrap_or(usize::MAX)];
        let at = offset + from;
        opened.read_exact_at(&mut bytes, at).map_err(|source| LoadError::Read {
            path: path.clone(),
            offset: at,
            source: ReadError::Io { at, source: Arc::new(source) },
        })?;
        file = Some(opened);
        Ok(ChunkSum::of(&bytes))
    };
    let (mut sum, mut reached, mut read) = (ChunkSum::of(&[]), 0, 0);
    for (cut, found) in chunk.cuts.iter().zip(on_device) {
        let from = cut.from as u64;
        sum = sum.then(between(reached, from)?, from - reached).then(*found, cut.bytes());
        read += from - reached;
        reached = from + cut.bytes();
    }
    let len = files.chunk_len(chunk.at);
    sum = sum.then(between(reached, len)?, len - reached);
    Ok((sum, read + len - reached))
}
