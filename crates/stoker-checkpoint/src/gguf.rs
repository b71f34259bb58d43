//! GGUF headers, versions 2 and 3, little-endian: metadata and tensor index. Weights are never read.
//!
//! Format: `docs/gguf.md` in the ggml repository. Where ggml's own reader is stricter than the text (four dimensions,
//! contiguous tensors, no arrays of arrays), so is this one.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use stoker_types::DType;

use crate::{CheckpointError, error::shown};

/// Headers beyond this are absurd: the largest vocabularies with their merges take 30 MiB.
pub const HEADER_BYTES_MAX: u64 = 256 << 20;
/// No model has so many metadata entries (real ones have under a hundred).
pub const METADATA_MAX: u64 = 1 << 14;
/// No model has so many tensors (mixtures of experts, unmerged, reach some ten thousands).
pub const TENSORS_MAX: u64 = 1 << 20;

const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// What a GGUF file says before its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the file's order.
    pub tensors: Vec<TensorInfo>,
    /// Multiple at which tensors begin, bytes.
    pub alignment: u64,
    /// Where the tensors' data begins, from the beginning of the file.
    pub data_offset: u64,
}

/// A tensor's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Row-major: the last dimension is contiguous (the reverse of the file's order).
    pub shape: Vec<u64>,
    /// First byte, from the beginning of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the format's own type names")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Array(Array),
}

/// A metadata array: one allocation, or two for strings, however long.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the format's own type names")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Strings),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Many strings in one allocation: a vocabulary has a quarter of a million.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Strings {
    text: String,
    /// Where each string ends in `text`. The header is shorter than 4 GiB.
    ends: Vec<u32>,
}

/// A reader that knows where it is and how much the file can still hold.
struct Input<'a, R> {
    file: &'a Path,
    reader: R,
    at: u64,
    /// The file's length.
    file_len: u64,
    scratch: Vec<u8>,
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
        Self::read(path, BufReader::with_capacity(1 << 16, file), len)
    }

    /// Reads the header from the beginning of a file of `file_len` bytes; `path` is for messages. Reads no byte of the
    /// tensors, and allocates no more than the file's length justifies.
    ///
    /// # Errors
    /// A variant for each way in which the bytes are no GGUF file.
    pub fn read(path: &Path, reader: impl Read, file_len: u64) -> Result<Self, CheckpointError> {
        let mut input = Input { file: path, reader, at: 0, file_len, scratch: Vec::new() };
        let file = || path.to_owned();

        let magic = input.bytes::<4>("magic")?;
        if magic != *b"GGUF" {
            return Err(CheckpointError::BadMagic { file: file(), found: magic });
        }
        let version = u32::from_le_bytes(input.bytes("version")?);
        if version & 0xffff == 0 && version != 0 {
            return Err(CheckpointError::BigEndian { file: file() });
        }
        if !(2..=3).contains(&version) {
            let (what, supported) = ("GGUF", "2 and 3");
            return Err(CheckpointError::UnsupportedVersion {
                file: file(),
                what,
                found: version,
                supported,
            });
        }
        // A tensor takes at least 24 bytes (length of the name, dimensions, type, offset), an entry 13.
        let tensor_count = input.count("tensors", 24, TENSORS_MAX)?;
        let metadata_count = input.count("metadata entries", 13, METADATA_MAX)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = input.string("metadata key")?;
            let value = input.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(CheckpointError::DuplicateKey { file: file(), key: shown(&key) });
            }
            metadata.insert(key, value);
        }

        let mut tensors = Vec::with_capacity(tensor_count);
        let mut names = HashSet::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            let tensor = input.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return Err(CheckpointError::DuplicateTensor { file: file(), tensor: shown(&tensor.name) });
            }
            tensors.push(tensor);
        }

        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT_DEFAULT,
            Some(value) => value.as_u64().ok_or_else(|| CheckpointError::BadValue {
                file: file(),
                key: "general.alignment".to_owned(),
                problem: "must be a positive whole number".to_owned(),
            })?,
        };
        if !alignment.is_power_of_two() || !(8..=ALIGNMENT_MAX).contains(&alignment) {
            return Err(CheckpointError::BadAlignment { file: file(), alignment, max: ALIGNMENT_MAX });
        }
        let data_offset = input.at.next_multiple_of(alignment);
        place(path, &mut tensors, alignment, data_offset, file_len)?;
        Ok(Self { version, metadata, tensors, alignment, data_offset })
    }

    /// A value by key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A text by key; `None` when it is absent or no text.
    #[must_use]
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A non-negative whole number of 32 bits by key; `None` when it is absent or no such number.
    #[must_use]
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u64().and_then(|n| n.try_into().ok())
    }
}

/// Checks where the tensors lie, and makes their offsets absolute.
fn place(
    path: &Path,
    tensors: &mut [TensorInfo],
    alignment: u64,
    data_offset: u64,
    file_len: u64,
) -> Result<(), CheckpointError> {
    let file = || path.to_owned();
    for tensor in &mut *tensors {
        let name = || shown(&tensor.name);
        if !tensor.offset.is_multiple_of(alignment) {
            let (tensor, offset) = (name(), tensor.offset);
            return Err(CheckpointError::Misaligned { file: file(), tensor, offset, alignment });
        }
        let begin = data_offset.checked_add(tensor.offset);
        let end = begin.and_then(|b| b.checked_add(tensor.len));
        match (begin, end) {
            (Some(begin), Some(end)) if end <= file_len => tensor.offset = begin,
            _ => {
                return Err(CheckpointError::OutOfRange {
                    file: file(),
                    tensor: name(),
                    offset: begin.unwrap_or(u64::MAX),
                    len: tensor.len,
                    file_len,
                });
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.len));
    let mut end = data_offset;
    let mut last = "";
    for tensor in order {
        if tensor.offset < end {
            let (first, second) = (shown(last), shown(&tensor.name));
            return Err(CheckpointError::Overlap { file: file(), first, second, offset: tensor.offset });
        }
        let gap = tensor.offset - end;
        if gap >= alignment {
            let before = format!("tensor `{}`", shown(&tensor.name));
            return Err(CheckpointError::Gap { file: file(), before, offset: end, len: gap });
        }
        end = tensor.offset + tensor.len;
        last = &tensor.name;
    }
    Ok(())
}

// === impl Input ===

/// One metadata type: how it is read as a value and as an array.
macro_rules! read_value {
    ($input:expr, $key:expr, $number:expr, $offset:expr, { $($n:literal => $variant:ident($type:ty)),* $(,)? }) => {
        match $number {
            $($n => Value::$variant(<$type>::from_le_bytes($input.bytes("metadata value")?)),)*
            7 => Value::Bool($input.boolean($key)?),
            8 => Value::String($input.string("metadata value")?),
            9 => {
                let element = u32::from_le_bytes($input.bytes("type of array elements")?);
                Value::Array(match element {
                    $($n => {
                        const SIZE: usize = size_of::<$type>();
                        let count = $input.count("array elements", SIZE as u64, u64::MAX)?;
                        $input.fill(count * SIZE, "array")?;
                        let read = |b: &[u8; SIZE]| <$type>::from_le_bytes(*b);
                        Array::$variant($input.scratch.as_chunks().0.iter().map(read).collect())
                    })*
                    7 => {
                        let count = $input.count("array elements", 1, u64::MAX)?;
                        Array::Bool((0..count).map(|_| $input.boolean($key)).collect::<Result<_, _>>()?)
                    }
                    8 => Array::String($input.strings()?),
                    number => return Err($input.unknown_type($key, number, $offset)),
                })
            }
            number => return Err($input.unknown_type($key, number, $offset)),
        }
    };
}

impl<R: Read> Input<'_, R> {
    fn truncated(&self, what: &'static str, needed: u64) -> CheckpointError {
        let available = self.file_len.saturating_sub(self.at);
        CheckpointError::Truncated { file: self.file.to_owned(), what, offset: self.at, needed, available }
    }

    /// Errs unless `needed` bytes more can be there.
    fn expect(&self, what: &'static str, needed: u64) -> Result<(), CheckpointError> {
        let end = self.at.saturating_add(needed);
        if end > self.file_len {
            return Err(self.truncated(what, needed));
        }
        if end > HEADER_BYTES_MAX {
            let (len, max) = (end, HEADER_BYTES_MAX);
            return Err(CheckpointError::HeaderTooLarge { file: self.file.to_owned(), len, max });
        }
        Ok(())
    }

    fn read_into(&mut self, what: &'static str, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        match self.reader.read_exact(buffer) {
            Ok(()) => self.at += buffer.len() as u64,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(self.truncated(what, buffer.len() as u64));
            }
            Err(e) => return Err(CheckpointError::io(self.file)(e)),
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], CheckpointError> {
        self.expect(what, N as u64)?;
        let mut buffer = [0; N];
        self.read_into(what, &mut buffer)?;
        Ok(buffer)
    }

    /// Reads `len` bytes, which have been checked against the file's length, into `self.scratch`.
    fn fill(&mut self, len: usize, what: &'static str) -> Result<(), CheckpointError> {
        self.expect(what, len as u64)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.resize(len, 0);
        let result = self.read_into(what, &mut scratch);
        self.scratch = scratch;
        result
    }

    /// Reads a number of things of which each takes at least `bytes_min`.
    fn count(&mut self, what: &'static str, bytes_min: u64, max: u64) -> Result<usize, CheckpointError> {
        let offset = self.at;
        let count = u64::from_le_bytes(self.bytes(what)?);
        let room = self.file_len.min(HEADER_BYTES_MAX).saturating_sub(self.at) / bytes_min;
        let max = room.min(max);
        match usize::try_from(count) {
            Ok(n) if count <= max => Ok(n),
            _ => Err(CheckpointError::CountTooLarge { file: self.file.to_owned(), what, offset, count, max }),
        }
    }

    /// Reads a string into `self.scratch` and lends it.
    fn text(&mut self, what: &'static str) -> Result<&str, CheckpointError> {
        let offset = self.at;
        let len = u64::from_le_bytes(self.bytes(what)?);
        self.expect(what, len)?;
        let Ok(len) = usize::try_from(len) else { return Err(self.truncated(what, len)) };
        self.fill(len, what)?;
        str::from_utf8(&self.scratch).map_err(|_| CheckpointError::BadUtf8 {
            file: self.file.to_owned(),
            what,
            offset,
        })
    }

    fn string(&mut self, what: &'static str) -> Result<String, CheckpointError> {
        self.text(what).map(ToOwned::to_owned)
    }

    fn strings(&mut self) -> Result<Strings, CheckpointError> {
        let count = self.count("array elements", 8, u64::MAX)?;
        let mut strings = Strings { text: String::new(), ends: Vec::with_capacity(count) };
        for _ in 0..count {
            let text = self.text("text in an array")?;
            strings.push(text);
        }
        Ok(strings)
    }

    fn boolean(&mut self, key: &str) -> Result<bool, CheckpointError> {
        match self.bytes::<1>("metadata value")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(CheckpointError::BadValue {
                file: self.file.to_owned(),
                key: shown(key),
                problem: format!("must be a boolean, 0 or 1, not {other}"),
            }),
        }
    }

    fn unknown_type(&self, key: &str, number: u32, offset: u64) -> CheckpointError {
        CheckpointError::UnknownValueType { file: self.file.to_owned(), key: shown(key), offset, number }
    }

    fn value(&mut self, key: &str) -> Result<Value, CheckpointError> {
        let offset = self.at;
        let number = u32::from_le_bytes(self.bytes("type of a metadata value")?);
        Ok(read_value!(self, key, number, offset, {
            0 => U8(u8), 1 => I8(i8), 2 => U16(u16), 3 => I16(i16), 4 => U32(u32), 5 => I32(i32),
            6 => F32(f32), 10 => U64(u64), 11 => I64(i64), 12 => F64(f64),
        }))
    }

    fn tensor(&mut self) -> Result<TensorInfo, CheckpointError> {
        let begin = self.at;
        let name = self.string("tensor name")?;
        let file = || self.file.to_owned();
        let dims = u32::from_le_bytes(self.bytes("tensor dimensions")?);
        if dims > DIMENSIONS_MAX {
            return Err(CheckpointError::TooManyDimensions {
                file: file(),
                tensor: shown(&name),
                offset: begin,
                dims: dims.into(),
                max: DIMENSIONS_MAX.into(),
            });
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(u64::from_le_bytes(self.bytes("tensor dimensions")?));
        }
        shape.reverse();
        let number = u32::from_le_bytes(self.bytes("tensor type")?);
        let offset = u64::from_le_bytes(self.bytes("tensor offset")?);
        let Some(dtype) = DType::from_ggml(number) else {
            let (tensor, dtype) = (shown(&name), format!("ggml type {number}"));
            return Err(CheckpointError::UnknownTensorType { file: file(), tensor, dtype });
        };
        let Some(len) = bytes_of(dtype, &shape) else {
            return Err(CheckpointError::BadShape { file: file(), tensor: shown(&name), dtype, shape });
        };
        Ok(TensorInfo { name, dtype, shape, offset, len })
    }
}

/// Bytes of a tensor; `None` when its rows are no whole number of blocks, or on overflow.
pub(crate) fn bytes_of(dtype: DType, shape: &[u64]) -> Option<u64> {
    let row = shape.last().copied().unwrap_or(1);
    // ggml's blocks never cross rows; the pairs of safetensors' sub-byte types may.
    if dtype.block_elements() >= 32 && !row.is_multiple_of(dtype.block_elements()) {
        return None;
    }
    let elements = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n))?;
    dtype.bytes_of(elements)
}

// === impl Value ===

impl Value {
    /// A whole number that isn't negative, of whatever width.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::U64(n) => Some(n),
            Self::I8(n) => n.try_into().ok(),
            Self::I16(n) => n.try_into().ok(),
            Self::I32(n) => n.try_into().ok(),
            Self::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// A number with a fraction, of either width.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is in f32")]
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(x) => Some(x),
            Self::F64(x) => Some(x as f32),
            _ => None,
        }
    }

    /// A boolean.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// A text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(s) => Some(s),
            _ => None,
        }
    }

    /// An array of texts.
    #[must_use]
    pub fn as_strings(&self) -> Option<&Strings> {
        match self {
            Self::Array(Array::String(s)) => Some(s),
            _ => None,
        }
    }

    /// An array of numbers with fractions.
    #[must_use]
    pub fn as_f32s(&self) -> Option<&[f32]> {
        match self {
            Self::Array(Array::F32(x)) => Some(x),
            _ => None,
        }
    }

    /// An array of whole numbers that fit into 32 bits, signed. Borrowed when it is stored so.
    #[must_use]
    pub fn as_i32s(&self) -> Option<Cow<'_, [i32]>> {
        let Self::Array(array) = self else { return None };
        match array {
            Array::I32(n) => Some(Cow::Borrowed(n)),
            Array::U32(n) => n.iter().map(|n| i32::try_from(*n).ok()).collect::<Option<_>>().map(Cow::Owned),
            Array::I16(n) => Some(n.iter().map(|n| (*n).into()).collect()),
            Array::U16(n) => Some(n.iter().map(|n| (*n).into()).collect()),
            Array::I8(n) => Some(n.iter().map(|n| (*n).into()).collect()),
            Array::U8(n) => Some(n.iter().map(|n| (*n).into()).collect()),
            _ => None,
        }
    }
}

// === impl Strings ===

impl Strings {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.text[begin as usize..end as usize])
    }

    /// All, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|i| self.get(i).unwrap_or_default())
    }

    /// All of them, without anything between.
    pub(crate) fn joined(&self) -> &str {
        &self.text
    }

    #[expect(clippy::cast_possible_truncation, reason = "HEADER_BYTES_MAX is far below 4 GiB")]
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len() as u32);
    }
}

impl<'a> FromIterator<&'a str> for Strings {
    /// # Panics
    /// When the texts together are longer than 4 GiB.
    fn from_iter<I: IntoIterator<Item = &'a str>>(iter: I) -> Self {
        let mut strings = Self::default();
        for text in iter {
            assert!(strings.text.len() + text.len() <= u32::MAX as usize, "too much text for one array");
            strings.push(text);
        }
        strings
    }
}
