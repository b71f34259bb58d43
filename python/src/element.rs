//! Element types: the files' on one side, DLPack's on the other.

use stoker_types::DType;

/// `DLDataTypeCode` of `dlpack.h` 1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    Int = 0,
    UInt = 1,
    Float = 2,
    Bfloat = 4,
    Complex = 5,
    Bool = 6,
    Float8E4m3fn = 10,
    Float8E5m2 = 12,
    Float8E8m0fnu = 14,
}

/// What a tensor's elements are, and how its bytes are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Element {
    /// As PyTorch calls it; of a type that it doesn't have, the file's own name.
    pub(crate) name: &'static str,
    pub(crate) code: Code,
    pub(crate) bits: u8,
}

/// Every type that views can be asked for in, and all but the packed ones that files have.
const PLAIN: [(DType, Element); 18] = [
    (DType::F64, element("float64", Code::Float, 64)),
    (DType::F32, element("float32", Code::Float, 32)),
    (DType::F16, element("float16", Code::Float, 16)),
    (DType::BF16, element("bfloat16", Code::Bfloat, 16)),
    (DType::F8_E4M3, element("float8_e4m3fn", Code::Float8E4m3fn, 8)),
    (DType::F8_E5M2, element("float8_e5m2", Code::Float8E5m2, 8)),
    (DType::F8_E8M0, element("float8_e8m0fnu", Code::Float8E8m0fnu, 8)),
    (DType::C64, element("complex64", Code::Complex, 64)),
    (DType::I64, element("int64", Code::Int, 64)),
    (DType::I32, element("int32", Code::Int, 32)),
    (DType::I16, element("int16", Code::Int, 16)),
    (DType::I8, element("int8", Code::Int, 8)),
    (DType::U64, element("uint64", Code::UInt, 64)),
    (DType::U32, element("uint32", Code::UInt, 32)),
    (DType::U16, element("uint16", Code::UInt, 16)),
    (DType::U8, element("uint8", Code::UInt, 8)),
    (DType::Bool, element("bool", Code::Bool, 8)),
    // Two elements in a byte; DLPack's consumers want bytes.
    (DType::F4, element("float4_e2m1fn_x2", Code::UInt, 8)),
];

const fn element(name: &'static str, code: Code, bits: u8) -> Element {
    Element { name, code, bits }
}

// === impl Element ===

impl Element {
    /// Of a type in a file, with the shape in which its bytes are handed over. Packed and quantised types are bytes: of
    /// `[rows, columns]` elements, `[rows, bytes of a row]`.
    pub(crate) fn of(dtype: DType, shape: &[u64]) -> (Self, Vec<i64>) {
        let plain = PLAIN.iter().find(|(known, _)| *known == dtype).map(|(_, element)| *element);
        let element = plain.unwrap_or(element(dtype.name(), Code::UInt, 8));
        // Checked when the file was indexed: no element count of a file overflows.
        let mut shape: Vec<i64> = shape.iter().map(|n| i64::try_from(*n).unwrap_or(i64::MAX)).collect();
        if (dtype.block_elements(), dtype.block_bytes()) != (1, u64::from(element.bits) / 8) {
            let whole = shape.last().and_then(|n| dtype.bytes_of(u64::try_from(*n).ok()?));
            match (shape.last_mut(), whole) {
                (Some(last), Some(bytes)) => *last = i64::try_from(bytes).unwrap_or(i64::MAX),
                // Blocks that run over rows: no shape but the bytes themselves.
                _ => {
                    let elements = shape.iter().fold(1_u64, |n, dim| n.saturating_mul(dim.unsigned_abs()));
                    let bytes = dtype.bytes_of(elements).unwrap_or(0);
                    shape = vec![i64::try_from(bytes).unwrap_or(i64::MAX)];
                }
            }
        }
        (element, shape)
    }

    /// By PyTorch's name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        PLAIN.iter().map(|(_, element)| *element).find(|element| element.name == name)
    }

    pub(crate) fn bytes(self) -> u64 {
        u64::from(self.bits) / 8
    }
}
