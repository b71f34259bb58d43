//! What every other crate of Stoker speaks in: ids, units, model and deployment specs, orders to a server and
//! their outcomes. Plain data; nothing here does I/O, and only [`clock`] reads a clock.

pub mod clock;
pub mod crc64;
mod deployment;
mod dtype;
mod ids;
mod limits;
mod memory;
mod order;
mod remote;
mod sampling;
mod seat;
mod sum;
mod timeline;
mod units;

pub use deployment::{KeepAlive, ModelFacts, ModelSettings, ParseKeepAliveError};
pub use dtype::DType;
pub use ids::{
    ClientId, DeviceId, Epoch, Generation, InstanceId, InvalidName, InvalidNodeId, ModelName, NodeId,
    RequestId, WorkerId,
};
pub use limits::QueueLimits;
pub use memory::{DeviceMemoryState, MemoryBudget, MemoryHolder, NodeMemory};
pub use order::{
    FileChange, NodeEvent, NodeSnapshot, StartFailure, StartOrder, Started, StopFailure, StopMode, TierRate,
    WorkerState, WorkerStatus,
};
pub use remote::RemoteObject;
pub use sampling::{FinishReason, Sampling, TokenLogprob};
pub use seat::{Admit, Refusal, SeatInfo};
pub use sum::{ChunkSum, Summing, hex};
pub use timeline::{Period, Phase, PhaseTime, Tier, TierBytes, Timeline};
pub use units::{ByteSize, BytesPerSec, ParseByteSizeError};
