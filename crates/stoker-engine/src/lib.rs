//! Inference on the CPU and on GPUs ([`gpu`]): model families, row-invariant kernels, paged KV cache, continuous batching, sampling.
//!
//! [`load_model`] builds a model over weights in memory, in place; [`Engine`] computes sequences with it, one
//! batch a [`step`](StepEngine::step). Everything here is synchronous: the worker runs an engine on a thread of its own.
//!
//! *Row invariance*: the logits of a row depend on its token, its position and its sequence's earlier tokens alone, bit
//! for bit, not on the batch, the chunking of the prompt or what came from the prefix cache. Preemption, resuming from
//! a ledger and sharing of KV blocks are exact because of it.

mod engine;
mod error;
mod families;
pub mod gpu;
pub mod kernels;
pub mod kv;
mod model;
pub mod sampling;
mod standin;
mod step;
mod storage;
pub mod threads;
pub mod weight;

pub use engine::Engine;
pub use error::EngineError;
pub use families::{Places, load_model};
pub use kernels::Isa;
pub use model::{Batch, Model, Span};
pub use standin::StandIn;
pub use step::{
    Begun, End, EngineLimits, EngineStats, Failure, NewToken, SequenceRequest, StepEngine, StepOutput,
    SubmitError,
};
pub use storage::{KvLayer, KvShape, KvStorage};
pub use threads::{Threads, physical_cores};
pub use weight::{Region, Weight, WeightBytes, WeightError};
