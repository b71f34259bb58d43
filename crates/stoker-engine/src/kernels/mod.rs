//! The arithmetic of the CPU engine, with row-invariant numerics.
//!
//! The bits of an output element depend on that row's input and the weights alone: not on how many rows are computed
//! together or which, on how a prompt was cut, on threads, tiles or the instruction set. Every kernel therefore has
//! one stated arithmetic (see the modules `dot`, `float` and `attention`), and its versions differ only in how many of those
//! operations they do at once. Rust never fuses or reorders float operations by itself, which is what lets the
//! compiler vectorise the plain parts.
#![expect(unsafe_code, reason = "SIMD intrinsics, unaligned weights and disjoint writes by several threads")]

mod activations;
mod attention;
mod dot;
mod elementwise;
mod float;
mod gather;
mod isa;
mod linear;
mod math;
mod quant;
mod rope;
mod share;
mod simd;

pub(crate) use self::linear::dequantize_rows;
pub use self::{
    activations::{Activations, Scratch},
    attention::{AttentionRow, AttentionShape, attention},
    elementwise::{add, embed, rms_norm, silu_mul},
    isa::Isa,
    linear::linear,
    rope::{RopeAngles, inverse_frequencies, rope},
};
