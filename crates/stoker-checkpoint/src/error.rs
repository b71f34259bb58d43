//! What can be wrong with a checkpoint.

use std::{
    io,
    path::{Path, PathBuf},
};

use stoker_types::DType;

/// Why a checkpoint can't be read. Everything that came from the files is bounded before it gets here, so that a
/// message is never longer than a person would read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// Which file.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// There is no model at this path.
    #[error("{}: no model here: {problem}", path.display())]
    NotAModel {
        /// Which path.
        path: PathBuf,
        /// What was looked for.
        problem: String,
    },
    /// The file ends inside of something.
    #[error("{}: truncated: {what} at offset {offset} needs {needed} bytes, the file has {available} more", file.display())]
    Truncated {
        /// Which file.
        file: PathBuf,
        /// Inside of what.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// How many bytes it takes.
        needed: u64,
        /// How many there are.
        available: u64,
    },
    /// The file doesn't begin as its kind does.
    #[error("{}: not a GGUF file: begins with {found:02x?}, not `GGUF`", file.display())]
    BadMagic {
        /// Which file.
        file: PathBuf,
        /// Its first bytes.
        found: [u8; 4],
    },
    /// A GGUF file for big-endian machines.
    #[error("{}: a big-endian GGUF file; only little-endian ones are supported", file.display())]
    BigEndian {
        /// Which file.
        file: PathBuf,
    },
    /// A version of the format that this build doesn't read.
    #[error("{}: {what} version {found} is not supported, only {supported}", file.display())]
    UnsupportedVersion {
        /// Which file.
        file: PathBuf,
        /// Of what.
        what: &'static str,
        /// The file's version.
        found: u32,
        /// The versions that can be read.
        supported: &'static str,
    },
    /// A header larger than any real one, or than its file.
    #[error("{}: absurd header: {len} bytes, at most {max} are read", file.display())]
    HeaderTooLarge {
        /// Which file.
        file: PathBuf,
        /// Claimed length, bytes.
        len: u64,
        /// The limit, bytes.
        max: u64,
    },
    /// A number of things that the rest of the file can't hold, or that no real model has.
    #[error("{}: absurd number of {what} at offset {offset}: {count}, at most {max} are possible here", file.display())]
    CountTooLarge {
        /// Which file.
        file: PathBuf,
        /// Of what.
        what: &'static str,
        /// Where the number is.
        offset: u64,
        /// The number.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// Text that isn't UTF-8.
    #[error("{}: {what} at offset {offset} is not UTF-8", file.display())]
    BadUtf8 {
        /// Which file.
        file: PathBuf,
        /// What the text is.
        what: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// A JSON file or header that isn't what it should be.
    #[error("{}: {source}", file.display())]
    Json {
        /// Which file.
        file: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The same key twice.
    #[error("{}: key `{key}` is there twice", file.display())]
    DuplicateKey {
        /// Which file.
        file: PathBuf,
        /// Which key.
        key: String,
    },
    /// The same tensor twice, in one file or in two shards.
    #[error("{}: tensor `{tensor}` is there twice", file.display())]
    DuplicateTensor {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// A metadata value of a kind that the format doesn't know.
    #[error("{}: value of `{key}` at offset {offset} has unknown type {number}", file.display())]
    UnknownValueType {
        /// Which file.
        file: PathBuf,
        /// Whose value.
        key: String,
        /// Where it is.
        offset: u64,
        /// Its type's number.
        number: u32,
    },
    /// A configuration or metadata value that is missing, of the wrong type or out of range.
    #[error("{}: `{key}` {problem}", file.display())]
    BadValue {
        /// Which file.
        file: PathBuf,
        /// Which key.
        key: String,
        /// "is missing", "must be ...".
        problem: String,
    },
    /// An alignment that isn't a power of two, or is absurd.
    #[error("{}: `general.alignment` is {alignment}; it must be a power of two, 8 to {max}", file.display())]
    BadAlignment {
        /// Which file.
        file: PathBuf,
        /// The value.
        alignment: u64,
        /// The largest that is read.
        max: u64,
    },
    /// An element type that isn't known, so that nothing else can be said of the tensor.
    #[error("{}: tensor `{tensor}` has the unknown element type {dtype}", file.display())]
    UnknownTensorType {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The format's name or number of it.
        dtype: String,
    },
    /// More dimensions than the format has.
    #[error("{}: tensor `{tensor}` at offset {offset} has {dims} dimensions, at most {max} are possible", file.display())]
    TooManyDimensions {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Where its entry is.
        offset: u64,
        /// How many.
        dims: u64,
        /// The limit.
        max: u64,
    },
    /// A shape whose size can't be computed: it overflows, or its rows are no whole number of blocks.
    #[error("{}: tensor `{tensor}`: no size follows from shape {shape:?} of {dtype}", file.display())]
    BadShape {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its type.
        dtype: DType,
        /// Its shape, row-major.
        shape: Vec<u64>,
    },
    /// Shape x element size isn't the length that the header gives.
    #[error(
        "{}: tensor `{tensor}` at offset {offset}: shape {shape:?} of {dtype} takes {expected} bytes, the header gives {found}",
        file.display()
    )]
    LengthMismatch {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Where it begins in the file.
        offset: u64,
        /// Its type.
        dtype: DType,
        /// Its shape, row-major.
        shape: Vec<u64>,
        /// What they come to, bytes.
        expected: u64,
        /// What the header says, bytes.
        found: u64,
    },
    /// A tensor that ends before it begins, or beyond the file.
    #[error(
        "{}: tensor `{tensor}`: {len} bytes at offset {offset} are outside of the file of {file_len} bytes",
        file.display()
    )]
    OutOfRange {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Where it begins in the file.
        offset: u64,
        /// Its length, bytes.
        len: u64,
        /// The file's length, bytes.
        file_len: u64,
    },
    /// A tensor whose end is before its beginning.
    #[error("{}: tensor `{tensor}` begins at {begin} and ends before, at {end}", file.display())]
    EndsBeforeBegin {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// `data_offsets[0]`.
        begin: u64,
        /// `data_offsets[1]`.
        end: u64,
    },
    /// A tensor that isn't where the format's alignment demands.
    #[error("{}: tensor `{tensor}`: offset {offset} is not a multiple of the alignment {alignment}", file.display())]
    Misaligned {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// From the beginning of the data.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// Two tensors share bytes.
    #[error("{}: tensors `{first}` and `{second}` overlap at offset {offset}", file.display())]
    Overlap {
        /// Which file.
        file: PathBuf,
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
        /// Where the other begins.
        offset: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{}: {len} bytes at offset {offset}, before {before}, belong to no tensor", file.display())]
    Gap {
        /// Which file.
        file: PathBuf,
        /// What comes after them: a tensor, or the end of the file.
        before: String,
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// A shard index names a file outside of its folder.
    #[error("{}: shard `{shard}` (of tensor `{tensor}`) is not a plain file name in the same folder", file.display())]
    ShardOutside {
        /// The index.
        file: PathBuf,
        /// Whose shard.
        tensor: String,
        /// The name.
        shard: String,
    },
    /// A shard that the index names isn't there.
    #[error("{}: shard `{shard}` is missing", file.display())]
    MissingShard {
        /// The index, or the first part of a split GGUF.
        file: PathBuf,
        /// The file that is missing.
        shard: String,
    },
    /// Index and shard disagree about where a tensor is.
    #[error("{}: tensor `{tensor}` should be in `{shard}`, and is not", file.display())]
    ShardDisagrees {
        /// The index.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Where the index says that it is, or where it was found unannounced.
        shard: String,
    },
    /// A tensor that isn't what the configuration demands.
    #[error("{}: tensor `{tensor}` should have shape {expected:?} by the configuration, found {found:?}", file.display())]
    WrongShape {
        /// Which file.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// What the configuration comes to.
        expected: Vec<u64>,
        /// What the file has.
        found: Vec<u64>,
    },
    /// A tensor that the configuration demands isn't there.
    #[error("{}: tensor `{tensor}` is missing", file.display())]
    MissingTensor {
        /// The model.
        file: PathBuf,
        /// Which tensor, in the file's own way of naming.
        tensor: String,
    },
    /// A manifest that contradicts itself or its files.
    #[error("{}: bad manifest: {problem}", file.display())]
    BadManifest {
        /// Which file.
        file: PathBuf,
        /// The contradiction.
        problem: String,
    },
    /// What was asked for can't be done with this model.
    #[error("{}: {problem}", file.display())]
    Unsupported {
        /// Which file.
        file: PathBuf,
        /// Why not.
        problem: String,
    },
}

impl CheckpointError {
    /// The file that is wrong, or the path that isn't a model.
    #[must_use]
    pub fn file(&self) -> &Path {
        match self {
            Self::Io { file, .. }
            | Self::Truncated { file, .. }
            | Self::BadMagic { file, .. }
            | Self::BigEndian { file, .. }
            | Self::UnsupportedVersion { file, .. }
            | Self::HeaderTooLarge { file, .. }
            | Self::CountTooLarge { file, .. }
            | Self::BadUtf8 { file, .. }
            | Self::Json { file, .. }
            | Self::DuplicateKey { file, .. }
            | Self::DuplicateTensor { file, .. }
            | Self::UnknownValueType { file, .. }
            | Self::BadValue { file, .. }
            | Self::BadAlignment { file, .. }
            | Self::UnknownTensorType { file, .. }
            | Self::TooManyDimensions { file, .. }
            | Self::BadShape { file, .. }
            | Self::LengthMismatch { file, .. }
            | Self::OutOfRange { file, .. }
            | Self::EndsBeforeBegin { file, .. }
            | Self::Misaligned { file, .. }
            | Self::Overlap { file, .. }
            | Self::Gap { file, .. }
            | Self::ShardOutside { file, .. }
            | Self::MissingShard { file, .. }
            | Self::ShardDisagrees { file, .. }
            | Self::WrongShape { file, .. }
            | Self::MissingTensor { file, .. }
            | Self::BadManifest { file, .. }
            | Self::Unsupported { file, .. } => file,
            Self::NotAModel { path, .. } => path,
        }
    }

    /// The tensor that is wrong, if it is one.
    #[must_use]
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::DuplicateTensor { tensor, .. }
            | Self::UnknownTensorType { tensor, .. }
            | Self::TooManyDimensions { tensor, .. }
            | Self::BadShape { tensor, .. }
            | Self::LengthMismatch { tensor, .. }
            | Self::OutOfRange { tensor, .. }
            | Self::EndsBeforeBegin { tensor, .. }
            | Self::Misaligned { tensor, .. }
            | Self::ShardOutside { tensor, .. }
            | Self::ShardDisagrees { tensor, .. }
            | Self::WrongShape { tensor, .. }
            | Self::MissingTensor { tensor, .. } => Some(tensor),
            Self::Overlap { second, .. } => Some(second),
            _ => None,
        }
    }

    /// For `map_err` on I/O.
    pub(crate) fn io(file: &Path) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| Self::Io { file, source }
    }
}

/// At most 200 bytes of a name from a file, control characters escaped, for messages.
pub(crate) fn shown(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if out.len() > 200 {
            out.push('…');
            break;
        }
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}
