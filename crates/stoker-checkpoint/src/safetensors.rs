//! safetensors headers: the tensor index of one file, and the index of a sharded checkpoint. Weights are never read.
//!
//! Format: the README of huggingface/safetensors. As there, tensors must fill the file without hole or overlap.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use stoker_types::DType;

use crate::{
    CheckpointError,
    error::shown,
    gguf::{TensorInfo, bytes_of},
    json,
};

/// Headers beyond this are absurd (the format's own limit).
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Indexes of shards beyond this are absurd: a hundred thousand tensors take 10 MB.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;

/// What the names of fillers begin with: tensors of bytes that `stoker pack` puts where the format allows no hole.
pub const FILLER: &str = "__stoker_filler__.";

const DIMENSIONS_MAX: usize = 8;

/// What a safetensors file says before its weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of their bytes, row-major. Fillers (see [`FILLER`]) are left out.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' data begins, from the beginning of the file.
    pub data_offset: u64,
}

/// `model.safetensors.index.json`: which shard has which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardIndex {
    /// Shards by name, each a plain file name, with their tensors.
    pub shards: BTreeMap<String, Vec<String>>,
}

/// The header as JSON: entries in order, doubles not yet looked for.
struct RawHeader<'a> {
    metadata: Vec<(String, String)>,
    tensors: Vec<(Cow<'a, str>, RawTensor<'a>)>,
}

#[derive(Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Dimensions,
    data_offsets: (u64, u64),
}

/// A shape of which no more is kept than can be right, however long it is.
struct Dimensions {
    kept: Vec<u64>,
    count: u64,
}

/// Key and value pairs in order, doubles included.
struct Pairs<V>(Vec<(String, V)>);

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Pairs<String>,
}

// === impl Header ===

impl Header {
    /// Opens `path` and reads its header.
    ///
    /// # Errors
    /// As [`Header::read`], and when the file can't be opened.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        let len = file.metadata().map_err(CheckpointError::io(path))?.len();
        Self::read(path, file, len)
    }

    /// Reads the header from the beginning of a file of `file_len` bytes; `path` is for messages. Reads no byte of the
    /// tensors, and allocates no more than the file's length justifies.
    ///
    /// # Errors
    /// A variant for each way in which the bytes are no safetensors file.
    pub fn read(path: &Path, mut reader: impl Read, file_len: u64) -> Result<Self, CheckpointError> {
        let truncated = |what, offset: u64, needed| CheckpointError::Truncated {
            file: path.to_owned(),
            what,
            offset,
            needed,
            available: file_len.saturating_sub(offset),
        };
        let mut read = |what, offset: u64, buffer: &mut [u8]| match reader.read_exact(buffer) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(truncated(what, offset, buffer.len() as u64))
            }
            Err(e) => Err(CheckpointError::io(path)(e)),
        };
        if file_len < 8 {
            return Err(truncated("length of the header", 0, 8));
        }
        let mut len = [0; 8];
        read("length of the header", 0, &mut len)?;
        let len = u64::from_le_bytes(len);
        if len > HEADER_BYTES_MAX {
            return Err(CheckpointError::HeaderTooLarge {
                file: path.to_owned(),
                len,
                max: HEADER_BYTES_MAX,
            });
        }
        let size = match usize::try_from(len) {
            Ok(size) if len <= file_len - 8 => size,
            _ => return Err(truncated("header", 8, len)),
        };
        let mut bytes = vec![0; size];
        read("header", 8, &mut bytes)?;
        let text = str::from_utf8(&bytes).map_err(|e| CheckpointError::BadUtf8 {
            file: path.to_owned(),
            what: "header",
            offset: 8 + e.valid_up_to() as u64,
        })?;
        let raw: RawHeader<'_> = serde_json::from_str(text)
            .map_err(|source| CheckpointError::Json { file: path.to_owned(), source })?;
        Self::check(path, raw, 8 + len, file_len)
    }

    fn check(
        path: &Path,
        raw: RawHeader<'_>,
        data_offset: u64,
        file_len: u64,
    ) -> Result<Self, CheckpointError> {
        let mut metadata = BTreeMap::new();
        for (key, value) in raw.metadata {
            if metadata.contains_key(&key) {
                return Err(CheckpointError::DuplicateKey { file: path.to_owned(), key: shown(&key) });
            }
            metadata.insert(key, value);
        }
        let mut names = HashSet::with_capacity(raw.tensors.len());
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, entry) in &raw.tensors {
            if !names.insert(name) {
                let tensor = shown(name);
                return Err(CheckpointError::DuplicateTensor { file: path.to_owned(), tensor });
            }
            tensors.push(tensor(path, name, entry, data_offset, file_len)?);
        }
        tensors.sort_by_key(|t: &TensorInfo| (t.offset, t.len));
        contiguous(path, &tensors, data_offset, file_len)?;
        tensors.retain(|tensor| !is_filler(tensor));
        Ok(Self { metadata, tensors, data_offset })
    }
}

fn is_filler(tensor: &TensorInfo) -> bool {
    tensor.dtype == DType::U8 && tensor.name.starts_with(FILLER)
}

/// Checks one entry and makes its offsets absolute.
fn tensor(
    path: &Path,
    name: &str,
    entry: &RawTensor<'_>,
    data_offset: u64,
    file_len: u64,
) -> Result<TensorInfo, CheckpointError> {
    let file = || path.to_owned();
    let (begin, end) = entry.data_offsets;
    let Some(dtype) = DType::from_safetensors(&entry.dtype) else {
        let dtype = format!("`{}`", shown(&entry.dtype));
        return Err(CheckpointError::UnknownTensorType { file: file(), tensor: shown(name), dtype });
    };
    if entry.shape.count > DIMENSIONS_MAX as u64 {
        return Err(CheckpointError::TooManyDimensions {
            file: file(),
            tensor: shown(name),
            offset: data_offset.saturating_add(begin),
            dims: entry.shape.count,
            max: DIMENSIONS_MAX as u64,
        });
    }
    let shape = entry.shape.kept.clone();
    let Some(expected) = bytes_of(dtype, &shape) else {
        return Err(CheckpointError::BadShape { file: file(), tensor: shown(name), dtype, shape });
    };
    let Some(len) = end.checked_sub(begin) else {
        return Err(CheckpointError::EndsBeforeBegin { file: file(), tensor: shown(name), begin, end });
    };
    let offset = data_offset.saturating_add(begin);
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(CheckpointError::OutOfRange { file: file(), tensor: shown(name), offset, len, file_len });
    }
    if len != expected {
        return Err(CheckpointError::LengthMismatch {
            file: file(),
            tensor: shown(name),
            offset,
            dtype,
            shape,
            expected,
            found: len,
        });
    }
    Ok(TensorInfo { name: name.to_owned(), dtype, shape, offset, len })
}

/// Checks that tensors, sorted by offset, fill the file.
fn contiguous(
    path: &Path,
    tensors: &[TensorInfo],
    data_offset: u64,
    file_len: u64,
) -> Result<(), CheckpointError> {
    let gap = |before, offset, len| CheckpointError::Gap { file: path.to_owned(), before, offset, len };
    let mut end = data_offset;
    let mut last = "";
    for tensor in tensors {
        if tensor.offset < end {
            return Err(CheckpointError::Overlap {
                file: path.to_owned(),
                first: shown(last),
                second: shown(&tensor.name),
                offset: tensor.offset,
            });
        }
        if tensor.offset > end {
            return Err(gap(format!("tensor `{}`", shown(&tensor.name)), end, tensor.offset - end));
        }
        end += tensor.len;
        last = &tensor.name;
    }
    if end < file_len {
        return Err(gap("the end of the file".to_owned(), end, file_len - end));
    }
    Ok(())
}

// === impl ShardIndex ===

impl ShardIndex {
    /// Reads an index.
    ///
    /// # Errors
    /// When the file can't be read, is too large, is no index, names a tensor twice, or names a shard that isn't a
    /// plain file name.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::parse(path, &json::read(path, INDEX_BYTES_MAX)?)
    }

    /// Reads an index from its bytes; `path` is for messages.
    ///
    /// # Errors
    /// As [`ShardIndex::open`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let raw: RawIndex = json::parse(path, bytes)?;
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut seen = HashMap::with_capacity(raw.weight_map.0.len());
        for (tensor, shard) in raw.weight_map.0 {
            if seen.insert(tensor.clone(), ()).is_some() {
                let tensor = shown(&tensor);
                return Err(CheckpointError::DuplicateTensor { file: path.to_owned(), tensor });
            }
            if !plain_name(&shard) {
                let (tensor, shard) = (shown(&tensor), shown(&shard));
                return Err(CheckpointError::ShardOutside { file: path.to_owned(), tensor, shard });
            }
            shards.entry(shard).or_default().push(tensor);
        }
        Ok(Self { shards })
    }
}

/// Whether `name` can only mean a file in the folder that it is looked up in.
fn plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', '\0', ':'])
}

// === reading ===

impl<'de: 'a, 'a> Deserialize<'de> for RawHeader<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawHeader<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader<'de>, A::Error> {
                let mut header = RawHeader { metadata: Vec::new(), tensors: Vec::new() };
                while let Some(Text(name)) = map.next_key()? {
                    if name == "__metadata__" {
                        header.metadata.extend(map.next_value::<Pairs<String>>()?.0);
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(V)
    }
}

/// A string that is borrowed where it can be.
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(V)
    }
}

impl<'de> Deserialize<'de> for Dimensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Dimensions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dimensions, A::Error> {
                let mut kept = Vec::new();
                while kept.len() < DIMENSIONS_MAX {
                    match seq.next_element()? {
                        Some(n) => kept.push(n),
                        None => return Ok(Dimensions { count: kept.len() as u64, kept }),
                    }
                }
                let mut count = kept.len() as u64;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Dimensions { kept, count })
            }
        }
        deserializer.deserialize_seq(V)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(V(std::marker::PhantomData))
    }
}
