//! The files of a packed model: tensors one behind the other in a given order, each at an address that suits a device,
//! in whole blocks of a disk. They are safetensors and GGUF files as others read them.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};
use stoker_types::DType;

use crate::{
    CheckpointError,
    gguf::{self, Array, Strings, Value},
    safetensors::{self, FILLER},
};

/// Every tensor begins at a multiple of it in its file, bytes: what devices want of addresses at most.
pub const TENSOR_ALIGN: u64 = 256;

/// Files are a multiple of it long, bytes: what disks read at once.
pub const FILE_ALIGN: u64 = 4096;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Row-major.
    pub shape: &'a [u64],
    /// Bytes.
    pub len: u64,
}

/// What kind of file, and what it says besides its tensors.
#[derive(Debug, Clone, Copy)]
pub enum Container<'a> {
    /// With this `__metadata__`.
    Safetensors(&'a BTreeMap<String, String>),
    /// With this metadata, but for alignment and parts, which are the new file's.
    Gguf(&'a BTreeMap<String, Value>),
}

/// A file that is about to be written. What is neither header nor tensor is zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFile {
    /// Its first bytes.
    pub header: Vec<u8>,
    /// First byte of each tensor, from the beginning of the file; in the order in which they were given, ascending.
    pub offsets: Vec<u64>,
    /// Its length, bytes.
    pub len: u64,
}

// === impl NewFile ===

impl NewFile {
    /// Lays out a file of these tensors, in this order.
    ///
    /// A safetensors file has no holes: where a tensor's length is no multiple of [`TENSOR_ALIGN`], a tensor of bytes follows
    /// whose name begins with [`FILLER`]. (Most models need none.)
    ///
    /// # Errors
    /// [`CheckpointError::HeaderTooLarge`] when readers would refuse the header; [`CheckpointError::UnknownTensorType`] for a
    /// type that such files don't have. `path` is for messages.
    pub fn lay_out(
        path: &std::path::Path,
        container: Container<'_>,
        tensors: &[NewTensor<'_>],
    ) -> Result<Self, CheckpointError> {
        let mut end = 0;
        let begins: Vec<u64> = tensors
            .iter()
            .map(|tensor| {
                let begin = end;
                end = (begin + tensor.len).next_multiple_of(TENSOR_ALIGN);
                begin
            })
            .collect();
        let unknown = |tensor: &NewTensor<'_>| CheckpointError::UnknownTensorType {
            file: path.to_owned(),
            tensor: crate::error::shown(tensor.name),
            dtype: tensor.dtype.to_string(),
        };
        let (header, max) = match container {
            Container::Safetensors(metadata) => {
                let text = safetensors_header(metadata, tensors, &begins).map_err(unknown)?;
                (framed(text, end), safetensors::HEADER_BYTES_MAX)
            }
            Container::Gguf(metadata) => {
                let mut header = gguf_header(metadata, tensors, &begins).map_err(unknown)?;
                header.resize(header.len().next_multiple_of(usize_of(TENSOR_ALIGN)), 0);
                (header, gguf::HEADER_BYTES_MAX)
            }
        };
        let data = header.len() as u64;
        if data > max {
            return Err(CheckpointError::HeaderTooLarge { file: path.to_owned(), len: data, max });
        }
        let offsets = begins.into_iter().map(|begin| data + begin).collect();
        Ok(Self { header, offsets, len: (data + end).next_multiple_of(FILE_ALIGN) })
    }
}

/// The constants here are small.
fn usize_of(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

// === safetensors ===

/// The header's JSON. Errs with a tensor of which the format doesn't know the type.
pub(crate) fn safetensors_header<'t, 'n>(
    metadata: &BTreeMap<String, String>,
    tensors: &'t [NewTensor<'n>],
    begins: &[u64],
) -> Result<String, &'t NewTensor<'n>> {
    let mut entries = Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".to_owned(), json!(metadata));
    }
    for (i, (tensor, begin)) in tensors.iter().zip(begins).enumerate() {
        let Some(dtype) = tensor.dtype.safetensors() else { return Err(tensor) };
        let end = begin + tensor.len;
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
        entries.insert(tensor.name.to_owned(), entry);
        let next = begins.get(i + 1).copied().unwrap_or_else(|| end.next_multiple_of(TENSOR_ALIGN));
        if next > end {
            let entry = json!({ "dtype": "U8", "shape": [next - end], "data_offsets": [end, next] });
            entries.insert(format!("{FILLER}{i}"), entry);
        }
    }
    Ok(Json::Object(entries).to_string())
}

/// The header's length and text, with blanks behind it (which the format allows) so that the file ends at a multiple of
/// [`FILE_ALIGN`] when `data` bytes follow. Those are a multiple of [`TENSOR_ALIGN`], and so is what is before them.
fn framed(mut text: String, data: u64) -> Vec<u8> {
    let len = 8 + text.len() as u64;
    let blanks = (len + data).next_multiple_of(FILE_ALIGN) - data - len;
    text.extend(std::iter::repeat_n(' ', usize_of(blanks)));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

// === GGUF ===

/// Version 3, little-endian. Errs with a tensor of which the format doesn't know the type.
fn gguf_header<'t, 'n>(
    metadata: &BTreeMap<String, Value>,
    tensors: &'t [NewTensor<'n>],
    begins: &[u64],
) -> Result<Vec<u8>, &'t NewTensor<'n>> {
    const ALIGNMENT: &str = "general.alignment";
    let kept = |key: &&String| *key != ALIGNMENT && !key.starts_with("split.");
    let entries = metadata.keys().filter(kept).count() as u64 + 1;
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(entries.to_le_bytes());
    put_text(&mut out, ALIGNMENT);
    #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
    put_value(&mut out, &Value::U32(TENSOR_ALIGN as u32));
    for (key, value) in metadata.iter().filter(|(key, _)| kept(key)) {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    for (tensor, begin) in tensors.iter().zip(begins) {
        let Some(number) = tensor.dtype.ggml() else { return Err(tensor) };
        put_text(&mut out, tensor.name);
        // A reader of GGUF refuses more than four, so there are no more.
        out.extend(u32::try_from(tensor.shape.len()).unwrap_or(u32::MAX).to_le_bytes());
        tensor.shape.iter().rev().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(number.to_le_bytes());
        out.extend(begin.to_le_bytes());
    }
    Ok(out)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_array<const N: usize>(
    out: &mut Vec<u8>,
    number: u32,
    elements: impl ExactSizeIterator<Item = [u8; N]>,
) {
    out.extend(9_u32.to_le_bytes());
    out.extend(number.to_le_bytes());
    out.extend((elements.len() as u64).to_le_bytes());
    elements.for_each(|bytes| out.extend(bytes));
}

/// Number of the type, then the value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! scalar {
        ($number:literal, $x:expr) => {{
            out.extend(u32::to_le_bytes($number));
            out.extend($x.to_le_bytes());
        }};
    }
    macro_rules! array {
        ($number:literal, $xs:expr) => {
            put_array(out, $number, $xs.iter().map(|x| x.to_le_bytes()))
        };
    }
    match value {
        Value::U8(x) => scalar!(0, x),
        Value::I8(x) => scalar!(1, x),
        Value::U16(x) => scalar!(2, x),
        Value::I16(x) => scalar!(3, x),
        Value::U32(x) => scalar!(4, x),
        Value::I32(x) => scalar!(5, x),
        Value::F32(x) => scalar!(6, x),
        Value::Bool(x) => scalar!(7, u8::from(*x)),
        Value::String(text) => {
            out.extend(8_u32.to_le_bytes());
            put_text(out, text);
        }
        Value::U64(x) => scalar!(10, x),
        Value::I64(x) => scalar!(11, x),
        Value::F64(x) => scalar!(12, x),
        Value::Array(array) => match array {
            Array::U8(xs) => array!(0, xs),
            Array::I8(xs) => array!(1, xs),
            Array::U16(xs) => array!(2, xs),
            Array::I16(xs) => array!(3, xs),
            Array::U32(xs) => array!(4, xs),
            Array::I32(xs) => array!(5, xs),
            Array::F32(xs) => array!(6, xs),
            Array::Bool(xs) => put_array(out, 7, xs.iter().map(|x| [u8::from(*x)])),
            Array::String(texts) => put_texts(out, texts),
            Array::U64(xs) => array!(10, xs),
            Array::I64(xs) => array!(11, xs),
            Array::F64(xs) => array!(12, xs),
        },
    }
}

fn put_texts(out: &mut Vec<u8>, texts: &Strings) {
    out.extend(9_u32.to_le_bytes());
    out.extend(8_u32.to_le_bytes());
    out.extend((texts.len() as u64).to_le_bytes());
    texts.iter().for_each(|text| put_text(out, text));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// As many as there are in files.
    fn values() -> BTreeMap<String, Value> {
        let text = Strings::from_iter(["", "a", "ä\n"]);
        let values = [
            Value::U8(1),
            Value::I8(-1),
            Value::U16(2),
            Value::I16(-2),
            Value::U32(3),
            Value::I32(-3),
            Value::F32(0.1),
            Value::Bool(true),
            Value::String("text".into()),
            Value::U64(u64::MAX),
            Value::I64(i64::MIN),
            Value::F64(0.3),
            Value::Array(Array::U8(vec![1, 2])),
            Value::Array(Array::I8(vec![-1])),
            Value::Array(Array::U16(vec![500])),
            Value::Array(Array::I16(vec![-500])),
            Value::Array(Array::U32(vec![70_000])),
            Value::Array(Array::I32(vec![-70_000])),
            Value::Array(Array::F32(vec![1.5])),
            Value::Array(Array::Bool(vec![true, false])),
            Value::Array(Array::String(text)),
            Value::Array(Array::U64(vec![u64::MAX])),
            Value::Array(Array::I64(vec![])),
            Value::Array(Array::F64(vec![2.5])),
        ];
        (0..).map(|i: u32| format!("key.{i}")).zip(values).collect()
    }

    fn name() -> impl Strategy<Value = String> {
        proptest::collection::vec(any::<char>(), 0..12).prop_map(|c| c.into_iter().collect())
    }

    /// Tensors of types that files of a kind have.
    fn tensors(of: impl Fn(DType) -> bool) -> impl Strategy<Value = Vec<(String, DType, Vec<u64>)>> {
        let types: Vec<DType> = DType::ALL.iter().copied().filter(|dtype| of(*dtype)).collect();
        let one = (name(), proptest::sample::select(types), proptest::collection::vec(0..9_u64, 0..4));
        proptest::collection::btree_map(name(), one, 0..12).prop_map(|tensors| {
            let whole = |(name, (_, dtype, mut shape)): (_, (String, DType, Vec<u64>))| {
                match shape.last_mut() {
                    Some(last) => *last *= dtype.block_elements(),
                    None if dtype.block_elements() > 1 => shape.push(dtype.block_elements()),
                    None => {}
                }
                (name, dtype, shape)
            };
            tensors.into_iter().map(whole).collect()
        })
    }

    fn laid_out(container: Container<'_>, tensors: &[(String, DType, Vec<u64>)]) -> NewFile {
        let new: Vec<NewTensor<'_>> = tensors
            .iter()
            .map(|(name, dtype, shape)| {
                let len = gguf::bytes_of(*dtype, shape).unwrap();
                NewTensor { name, dtype: *dtype, shape, len }
            })
            .collect();
        NewFile::lay_out(Path::new("new"), container, &new).unwrap()
    }

    fn check(new: &NewFile, found: &[gguf::TensorInfo], tensors: &[(String, DType, Vec<u64>)]) {
        assert!(new.len.is_multiple_of(FILE_ALIGN));
        assert!(new.offsets.iter().all(|offset| offset.is_multiple_of(TENSOR_ALIGN)));
        assert_eq!(found.len(), tensors.len());
        for ((name, dtype, shape), offset) in tensors.iter().zip(&new.offsets) {
            let found = found.iter().find(|found| found.name == *name).unwrap();
            assert_eq!((found.dtype, &found.shape, found.offset), (*dtype, shape, *offset));
        }
    }

    proptest! {
        #[test]
        fn safetensors_are_read_as_they_were_laid_out(tensors in tensors(|t| t.safetensors().is_some())) {
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let new = laid_out(Container::Safetensors(&metadata), &tensors);
            let read = safetensors::Header::read(Path::new("new"), &new.header[..], new.len).unwrap();
            prop_assert_eq!(&read.metadata, &metadata);
            check(&new, &read.tensors, &tensors);
        }

        #[test]
        fn ggufs_are_read_as_they_were_laid_out(tensors in tensors(|t| t.ggml().is_some())) {
            let mut metadata = values();
            let (split, aligned) = (("split.count".into(), Value::U16(2)), ("general.alignment".into(), Value::U32(64)));
            let new = {
                let mut old = metadata.clone();
                old.extend([split, aligned]);
                laid_out(Container::Gguf(&old), &tensors)
            };
            let read = gguf::Header::read(Path::new("new"), &new.header[..], new.len).unwrap();
            metadata.insert("general.alignment".into(), Value::U32(256));
            prop_assert_eq!(&read.metadata, &metadata);
            prop_assert_eq!(read.alignment, TENSOR_ALIGN);
            check(&new, &read.tensors, &tensors);
        }
    }

    #[test]
    fn a_type_that_the_format_lacks_is_said() {
        let tensor = [NewTensor { name: "q", dtype: DType::Q4_0, shape: &[32], len: 18 }];
        let none = BTreeMap::new();
        let error = NewFile::lay_out(Path::new("new"), Container::Safetensors(&none), &tensor).unwrap_err();
        assert!(matches!(error, CheckpointError::UnknownTensorType { .. }), "{error}");
    }

    #[test]
    fn whole_tensors_need_no_filler() {
        let tensors = [
            NewTensor { name: "b", dtype: DType::F16, shape: &[2, 64], len: 256 },
            NewTensor { name: "a", dtype: DType::F16, shape: &[128, 64], len: 16384 },
        ];
        let none = BTreeMap::new();
        let new = NewFile::lay_out(Path::new("new"), Container::Safetensors(&none), &tensors).unwrap();
        assert!(!String::from_utf8_lossy(&new.header).contains(FILLER));
        assert_eq!(new.len, new.offsets[1] + 16384, "no byte behind the last tensor");
    }
}
