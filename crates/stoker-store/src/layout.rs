//! Where a model's tensors lie in device memory.
//!
//! The device's copy keeps the files' order, so that tensors which lie side by side in a file are copied as one piece. A
//! tensor that would come to lie at an address that is no multiple of [`ALIGN`] begins a new piece: a copy may begin at
//! any byte on both sides at the same speed (measured), so nothing needs to be moved on the host or on the device.

use stoker_checkpoint::{Manifest, manifest::CHUNK_BYTES};
use stoker_device::Cut;
use stoker_types::ByteSize;

use crate::{
    files::{CheckpointFiles, ChunkRef},
    slice::{Rows, Shard, SliceError, TensorPart},
};

/// Every tensor's address on the device is a multiple of it, bytes: what vector loads and matrix units want at most.
pub const ALIGN: u64 = 256;

/// What devices allocate at once at most.
const DEVICE_PAGE: u64 = 2 << 20;

/// Bytes between two tensors of a file that are rather copied than cut out: a copy of few bytes takes as long.
const GAP: u64 = 64 << 10;

/// A range of a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileRange {
    /// Index of the file.
    pub file: u32,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// Where tensors lie in one slab of device memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    bytes: u64,
    /// Ordered by file and offset.
    spans: Vec<Span>,
    /// Of each span, the farthest end of it and those before it in its file. (Tensors that overlap may not agree on a
    /// piece.)
    reach: Vec<u64>,
    /// First byte of each tensor, in the order in which they were given.
    tensors: Vec<u64>,
    /// First byte of the words that say which chunks are there.
    arrivals: Option<u64>,
}

/// Bytes that lie side by side on the device, and in a file too or at regular distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    from: Rows,
    to: u64,
}

// === impl Layout ===

impl Layout {
    /// All of a manifest's tensors, in its order.
    #[must_use]
    pub fn of_manifest(manifest: &Manifest) -> Self {
        Self::new(manifest.tensors.iter().map(|tensor| FileRange {
            file: tensor.file,
            offset: tensor.offset,
            len: tensor.len,
        }))
    }

    /// One device's part of a model that is split over several.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn of_shard(manifest: &Manifest, shard: Shard) -> Result<Self, SliceError> {
        Ok(Self::of_parts(&shard.of_manifest(manifest)?))
    }

    /// Tensors with these bytes. Those with the same bytes (tied weights) lie at the same place.
    #[must_use]
    pub fn new(tensors: impl IntoIterator<Item = FileRange>) -> Self {
        Self::place(tensors.into_iter().map(|range| {
            let FileRange { file, offset, len } = range;
            Rows { file, offset, len, rows: 1, pitch: len }
        }))
    }

    /// Tensors, or parts of them.
    #[must_use]
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a TensorPart>) -> Self {
        Self::place(parts.into_iter().map(|part| part.rows))
    }

    fn place(tensors: impl Iterator<Item = Rows>) -> Self {
        let ranges: Vec<_> = tensors.collect();
        let mut sorted: Vec<usize> = (0..ranges.len()).collect();
        sorted.sort_by_key(|tensor| ranges[*tensor]);
        let mut spans: Vec<Span> = Vec::new();
        let mut end = 0_u64;
        let mut placed = vec![0; ranges.len()];
        for tensor in sorted {
            let range = ranges[tensor];
            if let Some(span) = spans.last_mut()
                && let Some(at) = span.place(range)
            {
                if range.rows == 1 {
                    let len = span.from.len.max(range.end() - span.from.offset);
                    (span.from.len, span.from.pitch) = (len, len);
                }
                end = span.to + span.from.bytes();
                placed[tensor] = at;
                continue;
            }
            let to = end.next_multiple_of(ALIGN);
            placed[tensor] = to;
            end = to + range.bytes();
            spans.push(Span { from: range, to });
        }
        let mut reach: Vec<u64> = Vec::with_capacity(spans.len());
        for (i, span) in spans.iter().enumerate() {
            let before = i.checked_sub(1).filter(|before| spans[*before].from.file == span.from.file);
            reach.push(span.from.end().max(before.map_or(0, |before| reach[before])));
        }
        Self { bytes: end, spans, reach, tensors: placed, arrivals: None }
    }

    /// As it is, with a word of 32 bits behind the tensors for each chunk of the files, in the order of
    /// [`CheckpointFiles::number`], which becomes 1 when what the device gets of the chunk is there. Whoever has the memory
    /// sees to it that they are zero before the delivery begins. So kernels that are queued ahead can wait for weights.
    #[must_use]
    pub fn announcing(self, files: &CheckpointFiles) -> Self {
        let words = self.bytes.next_multiple_of(ALIGN);
        Self { bytes: words + 4 * files.chunks(), arrivals: Some(words), ..self }
    }

    /// Runs of bytes, in the files or at regular distances in them, that are copied for themselves.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.spans.len()
    }

    /// Bytes of a slab for it: whole pages of every device.
    #[must_use]
    pub fn slab_bytes(&self) -> ByteSize {
        ByteSize(self.bytes.checked_next_multiple_of(DEVICE_PAGE).unwrap_or(u64::MAX))
    }

    /// First byte of the words that say which chunks are there, if it has any.
    #[must_use]
    pub fn arrivals(&self) -> Option<u64> {
        self.arrivals
    }

    /// The word of a chunk.
    pub(crate) fn arrival(&self, files: &CheckpointFiles, chunk: ChunkRef) -> Option<u64> {
        self.arrivals.map(|words| words + 4 * files.number(chunk))
    }

    /// Bytes of device memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> ByteSize {
        ByteSize(self.bytes)
    }

    /// What [`Self::slab_bytes`] comes to at most for so many tensors in files of `weights` bytes, words included.
    #[must_use]
    pub fn at_most(weights: ByteSize, tensors: u64) -> ByteSize {
        /// Chunks that aren't full are the last of their files: so many files have room.
        const FILES: u64 = 4096;
        let aligned = weights.bytes().saturating_add(tensors.saturating_mul(ALIGN));
        let words = (weights.bytes() / CHUNK_BYTES + FILES) * 4;
        let up = |bytes: u64, to: u64| bytes.checked_next_multiple_of(to).unwrap_or(u64::MAX);
        ByteSize(up(up(aligned, ALIGN).saturating_add(words), DEVICE_PAGE))
    }

    /// First byte of each tensor, in the order in which they were given.
    #[must_use]
    pub fn tensors(&self) -> &[u64] {
        &self.tensors
    }

    /// What of a chunk goes where.
    pub(crate) fn cuts(&self, files: &CheckpointFiles, chunk: ChunkRef) -> Vec<Cut> {
        let (file, begin) = (chunk.file, files.offset(chunk));
        let end = begin + files.chunk_len(chunk);
        let before = self.spans.partition_point(|span| span.from.file < file);
        let of_file = self.spans[before..].partition_point(|span| span.from.file == file);
        let first = before + self.reach[before..before + of_file].partition_point(|reach| *reach <= begin);
        self.spans[first..]
            .iter()
            .take_while(|span| (span.from.file, span.from.offset) < (file, end))
            .flat_map(|span| {
                let cut = move |(from, len, to, rows): (u64, u64, u64, u64)| {
                    Some(Cut {
                        from: usize::try_from(from - begin).ok()?,
                        len: usize::try_from(len).ok()?,
                        to: span.to + to,
                        rows: usize::try_from(rows).ok()?,
                        pitch: usize::try_from(span.from.pitch).ok()?,
                    })
                };
                span.from.within(begin, end).filter_map(cut)
            })
            .collect()
    }
}

// === impl Span ===

impl Span {
    /// Where bytes that begin no earlier come to lie, if they can be part of the span.
    fn place(&self, range: Rows) -> Option<u64> {
        if range.rows > 1 || self.from.rows > 1 {
            return (range == self.from).then_some(self.to);
        }
        let near = range.file == self.from.file && range.offset <= self.from.end().saturating_add(GAP);
        let at = self.to + range.offset.checked_sub(self.from.offset)?;
        (near && at.is_multiple_of(ALIGN)).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stoker_checkpoint::{FileIdentity, Trust};
    use stoker_types::ModelName;

    use super::*;
    use crate::files::SourceFile;

    fn range(file: u32, offset: u64, len: u64) -> FileRange {
        FileRange { file, offset, len }
    }

    #[test]
    fn neighbours_are_one_piece_and_a_crooked_one_begins_another() {
        // Tensors begin at 8 in the file; the third is 8 bytes beyond a multiple of 256 from there.
        let layout = Layout::new([range(0, 8, 512), range(0, 520, 264), range(0, 784, 100), range(1, 0, 1)]);
        assert_eq!(layout.tensors(), [0, 512, 1024, 1280]);
        assert_eq!(layout.bytes(), ByteSize(1281));
        assert_eq!(layout.spans.len(), 3);
    }

    #[test]
    fn what_a_model_takes_at_most_is_known_before_its_tensors_are() {
        assert_eq!(Layout::at_most(ByteSize(1 << 20), 10), ByteSize::mib(2));
        // Crooked neighbours begin a piece each.
        let crooked = Layout::new((0..8191).map(|i| range(0, i * 513, 513)));
        let most = Layout::at_most(ByteSize(8191 * 513), 8191);
        assert!(crooked.bytes() > ByteSize(8191 * 513) && crooked.slab_bytes() <= most);
        assert_eq!(Layout::at_most(ByteSize(u64::MAX), 10), ByteSize(u64::MAX));
    }

    #[test]
    fn order_of_naming_does_not_matter_and_tied_tensors_share() {
        let layout = Layout::new([range(0, 512, 256), range(0, 0, 512), range(0, 512, 256)]);
        assert_eq!(layout.tensors(), [512, 0, 512]);
        assert_eq!((layout.bytes(), layout.spans.len()), (ByteSize(768), 1));
    }

    #[test]
    fn a_far_neighbour_is_not_copied_with_what_lies_between() {
        let layout = Layout::new([range(0, 0, 256), range(0, 10 << 20, 256)]);
        assert_eq!((layout.bytes(), layout.spans.len()), (ByteSize(512), 2));
    }

    proptest! {
        /// Whatever the tensors, and however chunks cut them: each arrives whole, aligned, and where it is said to be.
        #[test]
        fn every_byte_arrives(
            tensors in proptest::collection::vec((0_u32..3, 0_u64..200_000, 1_u64..5_000), 1..20),
            chunk in 1_000_u64..60_000,
        ) {
            const LEN: u64 = 210_000;
            let ranges: Vec<_> = tensors.iter().map(|(f, o, l)| range(*f, *o, *l)).collect();
            let layout = Layout::new(ranges.iter().copied());
            let file = || SourceFile {
                path: "/m".into(),
                identity: FileIdentity { len: LEN, mtime_ns: 0, inode: 0 },
                chunk_sums: Vec::new(),
                sha256: None,
                origin: None,
            };
            let three = vec![file(), file(), file()];
            let name = ModelName::new("m").unwrap();
            let files = CheckpointFiles::new(name, three, Trust::None, chunk, []).unwrap();
            let byte = |file: u32, at: u64| (at + u64::from(file)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[5];
            let mut device = vec![0_u8; usize::try_from(layout.bytes().bytes()).unwrap()];
            for at in files.order() {
                for Cut { from, len, to, rows, .. } in layout.cuts(&files, *at) {
                    prop_assert_eq!(rows, 1);
                    for i in 0..len {
                        device[usize::try_from(to).unwrap() + i] = byte(at.file, files.offset(*at) + (from + i) as u64);
                    }
                }
            }
            for (range, to) in ranges.iter().zip(layout.tensors()) {
                prop_assert!(to.is_multiple_of(ALIGN));
                for i in 0..range.len {
                    prop_assert_eq!(device[usize::try_from(to + i).unwrap()], byte(range.file, range.offset + i));
                }
            }
        }
    }
}
