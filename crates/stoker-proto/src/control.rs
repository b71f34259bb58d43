//! Node and worker.
//!
//! The worker says [`Hello`] when it can take a model. The node says [`Load`]; the worker answers [`Loaded`] or
//! [`LoadFailed`]. [`Unload`] is answered by [`Unloaded`], or by [`UnloadRefused`] when sequences are running and
//! `force` is not set: the worker is the only judge of "idle", so no race can cut a stream. [`Ping`] is answered at
//! once by [`Pong`], by a task that does not wait for the engine.
//!
//! When the control connection closes, the node is gone, and the worker serves on. It has a second socket that listens, for
//! the node that comes next: on that connection it says [`Hello`] again, with what it serves ([`Hello::serving`]). While the
//! node looks at what the one before left, workers let go of their claim to the pool's memory ([`Yield`], [`Yielded`]), so that
//! the kernel's word on who else has it means something; [`Resume`] ends that, and from then on everything is as before. An
//! instance that the new node goes on with gets its new names by [`Rename`]. When no node comes in time, the worker takes no
//! new stream, lets those that run finish, and exits.
//!
//! A model on a device ([`Load::slab`]) is given before its weights are there; [`Landed`] says when they are, or that
//! they will not be. A worker that can't compute before that answers [`Load`] after it. The descriptors of the device's
//! memory come with the frame that has the order ([`crate::DescriptorReader`]).
//!
//! The first connection is the worker's standard input. Before any frame the node sends one byte, [`HANDOVER_BYTE`], with
//! three file descriptors behind it (`SCM_RIGHTS`): the chunk pool, opened for reading, and two bound, listening sockets: for
//! streams, and for the node that comes next. The first frame is [`Home`].

#![expect(missing_docs, reason = "the derives generate undocumented helpers; fields are documented here")]

use prost::{Message, Oneof};

/// The node's first byte, which carries the descriptors.
pub const HANDOVER_BYTE: u8 = b'S';

/// From the node.
#[derive(Clone, PartialEq, Message)]
pub struct ToWorker {
    #[prost(oneof = "to_worker::Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub kind: Option<to_worker::Kind>,
}

/// Kinds of [`ToWorker`].
pub mod to_worker {
    use super::{Home, Landed, Load, Oneof, Ping, Rename, Resume, Shutdown, Unload, Yield};

    /// One of.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        #[prost(message, tag = "1")]
        Load(Load),
        #[prost(message, tag = "2")]
        Unload(Unload),
        #[prost(message, tag = "3")]
        Ping(Ping),
        #[prost(message, tag = "4")]
        Shutdown(Shutdown),
        #[prost(message, tag = "5")]
        Landed(Landed),
        #[prost(message, tag = "6")]
        Home(Home),
        #[prost(message, tag = "7")]
        Yield(Yield),
        #[prost(message, tag = "8")]
        Resume(Resume),
        #[prost(message, tag = "9")]
        Rename(Rename),
    }
}

/// Take this model. Its bytes are in the pool, verified, or on their way to a device, and stay there until [`Unloaded`].
#[derive(Clone, PartialEq, Message)]
pub struct Load {
    /// `InstanceId`.
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    /// `Generation`: streams must name it.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The manifest, as `stoker.json` has it (configuration and tensor index).
    #[prost(bytes = "bytes", tag = "3")]
    pub manifest_json: bytes::Bytes,
    /// Bytes of a chunk of a file, in the pool and for a gate.
    #[prost(uint64, tag = "4")]
    pub chunk_bytes: u64,
    /// The weight files in the manifest's order; none with [`Self::slab`].
    #[prost(message, repeated, tag = "5")]
    pub files: Vec<FileSlots>,
    /// Context of one sequence, tokens.
    #[prost(uint32, tag = "6")]
    pub context: u32,
    /// Most sequences at the same time.
    #[prost(uint32, tag = "7")]
    pub sequences_max: u32,
    /// Most bytes of KV cache.
    #[prost(uint64, tag = "8")]
    pub kv_bytes: u64,
    /// Threads to compute with; 0: the worker's choice.
    #[prost(uint32, tag = "9")]
    pub threads: u32,
    /// Device memory with the weights, instead of [`Self::files`].
    #[prost(message, optional, tag = "10")]
    pub slab: Option<DeviceSlab>,
    /// The model's name, for whoever asks the worker what it serves.
    #[prost(string, tag = "11")]
    pub model: String,
    /// A hash of [`Self::manifest_json`].
    #[prost(bytes = "bytes", tag = "12")]
    pub index: bytes::Bytes,
}

/// Memory of the worker's device that belongs to the node.
#[derive(Clone, PartialEq, Message)]
pub struct DeviceSlab {
    /// Its length.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// Bytes of a granule; the last may be shorter.
    #[prost(uint64, tag = "2")]
    pub granule: u64,
    /// How many descriptors come with the frame: one for each granule.
    #[prost(uint32, tag = "3")]
    pub granules: u32,
    /// First byte of each of the manifest's tensors, in its order.
    #[prost(uint64, repeated, tag = "4")]
    pub tensors: Vec<u64>,
    /// First of the words behind the weights, of 32 bits, by which a device's work waits for them: one for each chunk of the
    /// files, one file after the other, zero until what the slab gets of it is there.
    #[prost(uint64, tag = "5")]
    pub gate: u64,
    /// What the node knows it by, also the node that comes next.
    #[prost(uint64, tag = "6")]
    pub number: u64,
}

/// Which of the node's sets of workers this one belongs to, in the node's own words: device and command line. It is said
/// again in [`Hello`].
#[derive(Clone, PartialEq, Message)]
pub struct Home {
    #[prost(string, tag = "1")]
    pub fleet: String,
}

/// Give up the claim to the pool's memory that lies in its descriptor, and say [`Yielded`]. What is mapped stays mapped.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Yield {}

/// Claim the pool's memory again. This node is the worker's from here on. With the frame comes a descriptor, where the
/// worker's log goes.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Resume {}

/// The instance has other numbers from here on; answered by [`Renamed`]. Its streams go on.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Rename {
    /// `InstanceId` so far.
    #[prost(uint64, tag = "1")]
    pub from: u64,
    /// `InstanceId` from here on.
    #[prost(uint64, tag = "2")]
    pub to: u64,
    /// `Generation` that new streams must name.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
}

/// The delivery to the device has ended.
#[derive(Clone, PartialEq, Message)]
pub struct Landed {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    /// Why the weights are not there and never will be. The worker drops the model.
    #[prost(string, optional, tag = "2")]
    pub error: Option<String>,
}

/// Where a file's chunks are: chunk `i` holds bytes `i * chunk_bytes ..` of the file and lies in the pool at
/// `slots[i] * chunk_bytes`.
#[derive(Clone, PartialEq, Message)]
pub struct FileSlots {
    /// Length of the file, bytes.
    #[prost(uint64, tag = "1")]
    pub len: u64,
    /// Slot of each chunk.
    #[prost(uint32, repeated, tag = "2")]
    pub slots: Vec<u32>,
}

/// Let the model go.
#[derive(Clone, PartialEq, Message)]
pub struct Unload {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    /// End running sequences with an error instead of refusing.
    #[prost(bool, tag = "2")]
    pub force: bool,
}

/// Are you there?
#[derive(Clone, PartialEq, Message)]
pub struct Ping {
    #[prost(uint64, tag = "1")]
    pub number: u64,
}

/// Take no new sequence, finish the running ones within the grace period, exit.
#[derive(Clone, PartialEq, Message)]
pub struct Shutdown {
    #[prost(uint64, tag = "1")]
    pub grace_ms: u64,
}

/// From the worker.
#[derive(Clone, PartialEq, Message)]
pub struct FromWorker {
    #[prost(oneof = "from_worker::Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub kind: Option<from_worker::Kind>,
}

/// Kinds of [`FromWorker`].
pub mod from_worker {
    use super::{Hello, LoadFailed, Loaded, Oneof, Pong, Renamed, UnloadRefused, Unloaded, Yielded};

    /// One of.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        #[prost(message, tag = "1")]
        Hello(Hello),
        #[prost(message, tag = "2")]
        Loaded(Loaded),
        #[prost(message, tag = "3")]
        LoadFailed(LoadFailed),
        #[prost(message, tag = "4")]
        Unloaded(Unloaded),
        #[prost(message, tag = "5")]
        UnloadRefused(UnloadRefused),
        #[prost(message, tag = "6")]
        Pong(Pong),
        #[prost(message, tag = "7")]
        Yielded(Yielded),
        #[prost(message, tag = "8")]
        Renamed(Renamed),
    }
}

/// Ready for a model.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// What computes, such as `cpu avx512-vnni, 2 threads`.
    #[prost(string, tag = "3")]
    pub device: String,
    /// Version of the program.
    #[prost(string, tag = "4")]
    pub version: String,
    /// [`Home::fleet`], as the node that started it said; empty before it has.
    #[prost(string, tag = "5")]
    pub fleet: String,
    /// What it serves: its order with the numbers that hold now, without the manifest.
    #[prost(message, optional, boxed, tag = "6")]
    pub serving: Option<Box<Load>>,
    /// The pool that it has a descriptor of: the file's device and inode.
    #[prost(uint64, tag = "7")]
    pub pool_device: u64,
    #[prost(uint64, tag = "8")]
    pub pool_inode: u64,
    /// It takes no new stream, and ends when the last one has.
    #[prost(bool, tag = "9")]
    pub ending: bool,
}

/// The worker has no claim to the pool's memory but its mappings.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Yielded {}

/// The instance has its new numbers, or is not there.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Renamed {
    /// `InstanceId` that it has now.
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    #[prost(bool, tag = "2")]
    pub there: bool,
}

/// The model is mapped and streams may come.
#[derive(Clone, PartialEq, Message)]
pub struct Loaded {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    /// Mapping the pool's chunks, microseconds.
    #[prost(uint64, tag = "2")]
    pub map_us: u64,
    /// Building the model's view over them, microseconds.
    #[prost(uint64, tag = "3")]
    pub init_us: u64,
    /// Device memory that the worker has taken for it, beside the slab.
    #[prost(uint64, tag = "4")]
    pub device_bytes: u64,
}

/// It can't be taken; the worker is as before.
#[derive(Clone, PartialEq, Message)]
pub struct LoadFailed {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    /// Whether the model can't be computed at all (else: this time).
    #[prost(bool, tag = "2")]
    pub not_runnable: bool,
    #[prost(string, tag = "3")]
    pub message: String,
}

/// No mapping of the model's chunks is left in the worker.
#[derive(Clone, PartialEq, Message)]
pub struct Unloaded {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
}

/// Sequences are running.
#[derive(Clone, PartialEq, Message)]
pub struct UnloadRefused {
    #[prost(uint64, tag = "1")]
    pub instance: u64,
    #[prost(uint32, tag = "2")]
    pub sequences: u32,
}

/// Here.
#[derive(Clone, PartialEq, Message)]
pub struct Pong {
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// Sequences running or waiting in the worker.
    #[prost(uint32, tag = "2")]
    pub sequences: u32,
    /// Engine steps so far: a busy worker whose count stands still hangs.
    #[prost(uint64, tag = "3")]
    pub steps: u64,
    /// KV cache in use, bytes.
    #[prost(uint64, tag = "4")]
    pub kv_bytes_used: u64,
    /// Tokens decoded so far.
    #[prost(uint64, tag = "5")]
    pub tokens: u64,
    /// Device memory that the worker has for its model now, beside the slab.
    #[prost(uint64, tag = "6")]
    pub device_bytes: u64,
}
