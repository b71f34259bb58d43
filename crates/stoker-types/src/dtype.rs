//! Tensor element types of safetensors and GGUF files.

use serde::{Deserialize, Serialize};

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $elements:literal elements in $bytes:literal bytes, ggml $ggml:expr, safetensors $st:expr;)*) => {
        /// The element type of a tensor as stored. Quantised types are stored in blocks of several elements; the
        /// sub-byte float types of safetensors in pairs.
        ///
        /// Block layouts: ggml's `ggml-common.h`; safetensors' format page.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[allow(non_camel_case_types, reason = "the formats' own names")]
        pub enum DType {
            $($(#[$doc])* #[doc = concat!("`", $name, "`: ", stringify!($elements), " elements in ", stringify!($bytes), " bytes.")] #[serde(rename = $name)] $variant,)*
        }

        impl DType {
            /// Every type that Stoker can index.
            pub const ALL: &'static [DType] = &[$(DType::$variant,)*];

            /// The format's own name of the type.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }

            /// Elements in a block; 1 for plain types.
            #[must_use]
            pub const fn block_elements(self) -> u64 {
                match self { $(DType::$variant => $elements,)* }
            }

            /// Bytes in a block.
            #[must_use]
            pub const fn block_bytes(self) -> u64 {
                match self { $(DType::$variant => $bytes,)* }
            }

            /// The type with this `ggml_type` number in a GGUF file.
            #[must_use]
            pub fn from_ggml(number: u32) -> Option<Self> {
                $(if $ggml == Some(number) { return Some(DType::$variant); })*
                None
            }

            /// Its `ggml_type` number in a GGUF file; `None` when those don't know it.
            #[must_use]
            pub const fn ggml(self) -> Option<u32> {
                match self { $(DType::$variant => $ggml,)* }
            }

            /// Its `dtype` string in a safetensors header; `None` when those don't know it.
            #[must_use]
            pub const fn safetensors(self) -> Option<&'static str> {
                match self { $(DType::$variant => $st,)* }
            }

            /// The type with this `dtype` string in a safetensors header.
            #[must_use]
            pub fn from_safetensors(name: &str) -> Option<Self> {
                $(if $st == Some(name) { return Some(DType::$variant); })*
                None
            }
        }
    };
}

const fn none() -> Option<&'static str> {
    None
}

dtypes! {
    F64 = "F64", 1 elements in 8 bytes, ggml Some(28), safetensors Some("F64");
    F32 = "F32", 1 elements in 4 bytes, ggml Some(0), safetensors Some("F32");
    F16 = "F16", 1 elements in 2 bytes, ggml Some(1), safetensors Some("F16");
    BF16 = "BF16", 1 elements in 2 bytes, ggml Some(30), safetensors Some("BF16");
    F8_E4M3 = "F8_E4M3", 1 elements in 1 bytes, ggml None, safetensors Some("F8_E4M3");
    F8_E5M2 = "F8_E5M2", 1 elements in 1 bytes, ggml None, safetensors Some("F8_E5M2");
    F8_E8M0 = "F8_E8M0", 1 elements in 1 bytes, ggml None, safetensors Some("F8_E8M0");
    F6_E2M3 = "F6_E2M3", 4 elements in 3 bytes, ggml None, safetensors Some("F6_E2M3");
    F6_E3M2 = "F6_E3M2", 4 elements in 3 bytes, ggml None, safetensors Some("F6_E3M2");
    F4 = "F4", 2 elements in 1 bytes, ggml None, safetensors Some("F4");
    C64 = "C64", 1 elements in 8 bytes, ggml None, safetensors Some("C64");
    I64 = "I64", 1 elements in 8 bytes, ggml Some(27), safetensors Some("I64");
    I32 = "I32", 1 elements in 4 bytes, ggml Some(26), safetensors Some("I32");
    I16 = "I16", 1 elements in 2 bytes, ggml Some(25), safetensors Some("I16");
    I8 = "I8", 1 elements in 1 bytes, ggml Some(24), safetensors Some("I8");
    U64 = "U64", 1 elements in 8 bytes, ggml None, safetensors Some("U64");
    U32 = "U32", 1 elements in 4 bytes, ggml None, safetensors Some("U32");
    U16 = "U16", 1 elements in 2 bytes, ggml None, safetensors Some("U16");
    U8 = "U8", 1 elements in 1 bytes, ggml None, safetensors Some("U8");
    Bool = "BOOL", 1 elements in 1 bytes, ggml None, safetensors Some("BOOL");
    Q4_0 = "Q4_0", 32 elements in 18 bytes, ggml Some(2), safetensors none();
    Q4_1 = "Q4_1", 32 elements in 20 bytes, ggml Some(3), safetensors none();
    Q5_0 = "Q5_0", 32 elements in 22 bytes, ggml Some(6), safetensors none();
    Q5_1 = "Q5_1", 32 elements in 24 bytes, ggml Some(7), safetensors none();
    Q8_0 = "Q8_0", 32 elements in 34 bytes, ggml Some(8), safetensors none();
    Q8_1 = "Q8_1", 32 elements in 36 bytes, ggml Some(9), safetensors none();
    Q2_K = "Q2_K", 256 elements in 84 bytes, ggml Some(10), safetensors none();
    Q3_K = "Q3_K", 256 elements in 110 bytes, ggml Some(11), safetensors none();
    Q4_K = "Q4_K", 256 elements in 144 bytes, ggml Some(12), safetensors none();
    Q5_K = "Q5_K", 256 elements in 176 bytes, ggml Some(13), safetensors none();
    Q6_K = "Q6_K", 256 elements in 210 bytes, ggml Some(14), safetensors none();
    Q8_K = "Q8_K", 256 elements in 292 bytes, ggml Some(15), safetensors none();
    IQ2_XXS = "IQ2_XXS", 256 elements in 66 bytes, ggml Some(16), safetensors none();
    IQ2_XS = "IQ2_XS", 256 elements in 74 bytes, ggml Some(17), safetensors none();
    IQ3_XXS = "IQ3_XXS", 256 elements in 98 bytes, ggml Some(18), safetensors none();
    IQ1_S = "IQ1_S", 256 elements in 50 bytes, ggml Some(19), safetensors none();
    IQ4_NL = "IQ4_NL", 32 elements in 18 bytes, ggml Some(20), safetensors none();
    IQ3_S = "IQ3_S", 256 elements in 110 bytes, ggml Some(21), safetensors none();
    IQ2_S = "IQ2_S", 256 elements in 82 bytes, ggml Some(22), safetensors none();
    IQ4_XS = "IQ4_XS", 256 elements in 136 bytes, ggml Some(23), safetensors none();
    IQ1_M = "IQ1_M", 256 elements in 56 bytes, ggml Some(29), safetensors none();
    TQ1_0 = "TQ1_0", 256 elements in 54 bytes, ggml Some(34), safetensors none();
    TQ2_0 = "TQ2_0", 256 elements in 66 bytes, ggml Some(35), safetensors none();
    MXFP4 = "MXFP4", 32 elements in 17 bytes, ggml Some(39), safetensors none();
}

impl DType {
    /// Bytes of `elements` elements, `None` when they are no whole number of blocks or the product overflows.
    #[must_use]
    pub const fn bytes_of(self, elements: u64) -> Option<u64> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(DType::F16.bytes_of(3), Some(6));
        assert_eq!(DType::Q4_1.bytes_of(64), Some(40));
        assert_eq!(DType::Q4_1.bytes_of(33), None);
        assert_eq!(DType::F4.bytes_of(3), None);
        assert_eq!(DType::F64.bytes_of(u64::MAX), None);
    }

    #[test]
    fn numbers_and_names_are_unambiguous() {
        let mut numbers: Vec<u32> = (0..64).filter(|n| DType::from_ggml(*n).is_some()).collect();
        numbers.dedup_by_key(|n| DType::from_ggml(*n));
        assert_eq!(numbers.len(), (0..64).filter(|n| DType::from_ggml(*n).is_some()).count());
        for dtype in DType::ALL {
            if let Some(found) = DType::from_safetensors(dtype.name()) {
                assert_eq!(found, *dtype);
            }
            assert!(dtype.ggml().is_none_or(|number| DType::from_ggml(number) == Some(*dtype)));
            assert!(dtype.safetensors().is_none_or(|name| DType::from_safetensors(name) == Some(*dtype)));
            assert!(dtype.ggml().is_some() || dtype.safetensors().is_some());
        }
        assert_eq!(DType::from_ggml(4), None, "Q4_2 was removed from the format");
    }
}
