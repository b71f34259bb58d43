//! Slices of tensors, for models that are split over several devices.
//!
//! A slice is cut from the files as they are: along the first dimension it is one range of bytes, along another one it is a
//! row of bytes for every step of the dimensions before. No copy of the files for a degree is needed.

use stoker_checkpoint::{Manifest, Part, Role, Tensor};

/// Which part of a model a device gets when it is split evenly over several (tensor parallelism).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    rank: u32,
    world: u32,
}

/// Bytes of a tensor that a device gets: all of them, or a slice. On the device they lie side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPart {
    /// Shape of what the device gets, row-major.
    pub shape: Vec<u64>,
    pub(crate) rows: Rows,
}

/// Rows of bytes at regular distances in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rows {
    pub(crate) file: u32,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes of a row.
    pub(crate) len: u64,
    pub(crate) rows: u64,
    /// Bytes from the beginning of one row to that of the next.
    pub(crate) pitch: u64,
}

/// Why a tensor can't be cut like that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// There is no such rank.
    #[error("rank {rank} of {world}: ranks go from 0 to one less than how many there are, at least one")]
    Rank {
        /// Asked for.
        rank: u32,
        /// Of how many.
        world: u32,
    },
    /// The tensor has fewer dimensions.
    #[error(
        "tensor `{tensor}` has {dims} dimensions: it can't be cut along dimension {dim} (counted from 0)"
    )]
    Dimension {
        /// Its name.
        tensor: String,
        /// Asked for.
        dim: usize,
        /// How many it has.
        dims: usize,
    },
    /// Too few elements, or blocks of elements that are stored together, for everybody to get as many.
    #[error(
        "dimension {dim} of tensor `{tensor}` has {units} {what}, which {world} devices can't share evenly"
    )]
    Uneven {
        /// Its name.
        tensor: String,
        /// Which one.
        dim: usize,
        /// Its length.
        units: u64,
        /// Elements, or blocks.
        what: &'static str,
        /// How many were to share.
        world: u32,
    },
    /// Nobody said how to cut it.
    #[error(
        "tensor `{tensor}` has a role that isn't known: say along which dimension it is cut, or that every device has all of it"
    )]
    UnknownRole {
        /// Its name.
        tensor: String,
    },
}

// === impl Shard ===

impl Shard {
    /// Rank `rank` of `world`.
    ///
    /// # Errors
    /// [`SliceError::Rank`].
    pub const fn new(rank: u32, world: u32) -> Result<Self, SliceError> {
        if rank < world { Ok(Self { rank, world }) } else { Err(SliceError::Rank { rank, world }) }
    }

    /// This shard's part of each tensor of a manifest, in its order, cut as in Megatron-LM (Shoeybi et al. 2019, section
    /// 3): what makes heads and the feed-forward layer's inside along its first dimension, what brings them together
    /// along its last, embedding and output head by words, and everything else whole.
    ///
    /// # Errors
    /// [`SliceError::Uneven`]; [`SliceError::UnknownRole`] for tensors of more than one dimension.
    pub fn of_manifest(self, manifest: &Manifest) -> Result<Vec<TensorPart>, SliceError> {
        manifest.tensors.iter().map(|tensor| self.by_role(tensor)).collect()
    }

    fn by_role(self, tensor: &Tensor) -> Result<TensorPart, SliceError> {
        let dim = match tensor.role {
            Some(Role::Embedding | Role::OutputHead) => Some(0),
            Some(Role::RopeFreqs | Role::OutputNorm) => None,
            Some(Role::Layer(_, part)) => match part {
                Part::Query | Part::QueryBias | Part::Key | Part::KeyBias | Part::Value | Part::ValueBias => {
                    Some(0)
                }
                Part::Gate | Part::GateBias | Part::Up | Part::UpBias => Some(0),
                Part::AttentionOutput | Part::Down => Some(1),
                // Added once, after the ranks' sums have been brought together.
                Part::AttentionOutputBias | Part::DownBias => None,
                Part::AttentionNorm | Part::FeedForwardNorm => None,
            },
            None if tensor.shape.len() < 2 || self.world == 1 => None,
            None => return Err(SliceError::UnknownRole { tensor: tensor.name.clone() }),
        };
        match dim {
            Some(dim) if self.world > 1 => self.of(tensor, dim),
            _ => Ok(TensorPart::whole(tensor)),
        }
    }

    /// This shard's part of a tensor that is cut evenly along dimension `dim`, counted from 0.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn of(self, tensor: &Tensor, dim: usize) -> Result<TensorPart, SliceError> {
        let name = || tensor.name.clone();
        let Some(&len) = tensor.shape.get(dim) else {
            return Err(SliceError::Dimension { tensor: name(), dim, dims: tensor.shape.len() });
        };
        // Quantised elements are stored in blocks along the last dimension.
        let last = dim + 1 == tensor.shape.len();
        let block = if last { tensor.dtype.block_elements() } else { 1 };
        let (units, what) = if block == 1 { (len, "elements") } else { (len / block, "blocks of elements") };
        let world = u64::from(self.world);
        if !units.is_multiple_of(world) || !len.is_multiple_of(block) {
            return Err(SliceError::Uneven { tensor: name(), dim, units, what, world: self.world });
        }
        // The manifest's lengths follow from its shapes, so these products don't overflow, and the division is even.
        let outer: u64 = tensor.shape[..dim].iter().product();
        let pitch = tensor.len / outer.max(1);
        let row = pitch / world;
        let mut shape = tensor.shape.clone();
        shape[dim] = len / world;
        let rows = Rows {
            file: tensor.file,
            offset: tensor.offset + row * u64::from(self.rank),
            len: row,
            rows: outer,
            pitch,
        };
        Ok(TensorPart { shape, rows: rows.simplified() })
    }
}

// === impl TensorPart ===

impl TensorPart {
    /// All of a tensor.
    #[must_use]
    pub fn whole(tensor: &Tensor) -> Self {
        let &Tensor { file, offset, len, .. } = tensor;
        Self { shape: tensor.shape.clone(), rows: Rows { file, offset, len, rows: 1, pitch: len } }
    }

    /// Bytes that the device gets.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.rows.bytes()
    }

    /// Where those bytes are in the weight file: first byte and length of each run, in the order in which they come to lie.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let Rows { offset, len, rows, pitch, .. } = self.rows;
        (0..rows).map(move |row| (offset + row * pitch, len))
    }
}

// === impl Rows ===

impl Rows {
    pub(crate) const fn bytes(&self) -> u64 {
        self.len.saturating_mul(self.rows)
    }

    /// One past its last byte in the file.
    pub(crate) const fn end(&self) -> u64 {
        let before_last = self.pitch.saturating_mul(self.rows.saturating_sub(1));
        self.offset.saturating_add(before_last).saturating_add(self.len)
    }

    /// Rows without gaps are one row.
    fn simplified(self) -> Self {
        if self.rows > 1 && self.len == self.pitch || self.rows == 0 {
            let len = self.bytes();
            return Self { len, rows: 1, pitch: len, ..self };
        }
        self
    }

    /// Its parts within bytes `begin..end` of the file: first byte in the file, bytes of a row, first byte among the rows'
    /// bytes, rows. At most three: the end of a row, whole rows, the beginning of a row.
    pub(crate) fn within(&self, begin: u64, end: u64) -> impl Iterator<Item = (u64, u64, u64, u64)> {
        let Self { offset, len, rows, pitch, .. } = *self;
        let row_begin = move |row: u64| offset + row * pitch;
        // Some of row `row`, if there is any.
        let cut = move |row: u64| {
            let (from, to) = (row_begin(row).max(begin), (row_begin(row) + len).min(end));
            (row < rows && from < to).then(|| (from, to - from, row * len + (from - row_begin(row)), 1))
        };
        // Rows that begin at `begin` or later, and rows that end by `end`.
        let step = pitch.max(1);
        let first_whole = begin.saturating_sub(offset).div_ceil(step).min(rows);
        let whole_end = match end.checked_sub(offset + len) {
            Some(beyond) => (beyond / step + 1).min(rows),
            None => 0,
        };
        let whole = (first_whole < whole_end)
            .then(|| (row_begin(first_whole), len, first_whole * len, whole_end - first_whole));
        let head = first_whole.checked_sub(1).and_then(cut);
        // The row behind the whole ones; unless it is the one before them.
        let behind = whole_end.max(first_whole);
        let tail = cut(behind);
        [head, whole, tail].into_iter().flatten().filter(|(_, len, ..)| *len > 0)
    }
}

#[cfg(test)]
mod tests {
    use stoker_types::DType;

    use super::*;

    fn tensor(shape: &[u64], dtype: DType) -> Tensor {
        let len = dtype.bytes_of(shape.iter().product()).unwrap();
        Tensor { name: "t".into(), role: None, dtype, shape: shape.into(), file: 0, offset: 100, len }
    }

    fn slices(tensor: &Tensor, dim: usize, world: u32) -> Vec<TensorPart> {
        (0..world).map(|rank| Shard::new(rank, world).unwrap().of(tensor, dim).unwrap()).collect()
    }

    #[test]
    fn along_the_first_dimension_it_is_one_run_and_along_others_one_for_each_row() {
        let rows = slices(&tensor(&[6, 4], DType::F16), 0, 3);
        assert_eq!(rows[1].shape, [2, 4]);
        assert_eq!(rows[1].runs().collect::<Vec<_>>(), [(116, 16)]);
        let columns = slices(&tensor(&[3, 4], DType::F16), 1, 2);
        assert_eq!(columns[1].shape, [3, 2]);
        assert_eq!(columns[1].runs().collect::<Vec<_>>(), [(104, 4), (112, 4), (120, 4)]);
        let middle = slices(&tensor(&[2, 4, 3], DType::F32), 1, 2);
        assert_eq!(middle[0].runs().collect::<Vec<_>>(), [(100, 24), (148, 24)]);
        assert_eq!(middle[0].bytes(), 48);
    }

    #[test]
    fn blocks_are_not_cut() {
        let quantised = tensor(&[4, 64], DType::Q8_0);
        assert_eq!(slices(&quantised, 1, 2)[1].runs().next(), Some((134, 34)));
        let error = Shard::new(0, 4).unwrap().of(&quantised, 1).unwrap_err();
        assert!(matches!(error, SliceError::Uneven { units: 2, what: "blocks of elements", .. }), "{error}");
    }

    #[test]
    fn what_cannot_be_cut_is_said() {
        let two = tensor(&[5, 4], DType::F32);
        assert!(matches!(Shard::new(2, 2), Err(SliceError::Rank { rank: 2, world: 2 })));
        assert!(matches!(Shard::new(0, 0), Err(SliceError::Rank { .. })));
        let shard = Shard::new(0, 2).unwrap();
        assert!(matches!(shard.of(&two, 0), Err(SliceError::Uneven { units: 5, .. })));
        assert!(matches!(shard.of(&two, 2), Err(SliceError::Dimension { dims: 2, .. })));
        assert!(matches!(shard.by_role(&two), Err(SliceError::UnknownRole { .. })));
        assert_eq!(shard.by_role(&tensor(&[5], DType::F32)).unwrap().shape, [5]);
        assert_eq!(Shard::new(0, 1).unwrap().by_role(&two).unwrap().shape, [5, 4]);
    }

    #[test]
    fn any_window_of_the_file_sees_exactly_its_bytes() {
        let rows = Rows { file: 0, offset: 10, len: 3, rows: 4, pitch: 7 };
        for begin in 0..45 {
            for end in begin..45 {
                let mut seen = vec![None; 12];
                for (from, len, to, count) in rows.within(begin, end) {
                    for row in 0..count {
                        for i in 0..len {
                            let at = from + row * rows.pitch + i;
                            assert!((begin..end).contains(&at));
                            let was = seen[usize::try_from(to + row * len + i).unwrap()].replace(at);
                            assert_eq!(was, None, "twice");
                        }
                    }
                }
                for (i, seen) in (0_u64..).zip(seen) {
                    let at = 10 + i / 3 * 7 + i % 3;
                    assert_eq!(seen, (begin..end).contains(&at).then_some(at), "{begin}..{end}, byte {i}");
                }
            }
        }
    }
}
