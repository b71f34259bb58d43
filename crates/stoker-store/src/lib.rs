//! The tiers of the checkpoint store: disk, memory and devices, the load pipeline between them, the cache of chunks.
//!
//! [`Store::load`] makes a model resident in the pool's slots and returns a guard; a worker maps the slots
//! (`stoker_io::MappedFile`) without copying. [`Store::stream`] passes a model through a few slots.
//!
//! One load is a list of chunk reads in execution order. Reading threads pull chunks to read, so nothing queues up that
//! a more urgent load would have to wait for or that a cancelled one would leave behind. Each thread reads a chunk and
//! checks it, while the others read. Room is promised when a load is accepted: loads never wait for each other's slots.
//!
//! A chunk is read from the fastest tier that has it: a file on this machine, what is there of a copy of a remote model
//! ([`SsdTier`]), the remote store. Reads from remote hold no thread and are bounded in number; what they bring passes on to
//! the copy, which never makes a load wait. What is wrong on SSD is fetched again from remote.
//!
//! [`pack`] writes a model anew so that its bytes lie as they are loaded.
//!
//! [`Store::deliver`] passes a model on to a device, chunk by chunk as they become ready, and may keep it in memory.
//!
//! Invariants:
//! - a chunk enters the cache only after its sum was found right (or learned, when none was known), and a load ends well
//!   only after the hash of every file that has no sums was found right;
//! - a held model's chunks are not evicted; holds are values, given back by drop;
//! - a load that fails or is cancelled leaves no chunk that it brought, but for those of known sums when it was a device
//!   that failed: they stay for the next attempt;
//! - what the pool's ledger says of a slot is true: it is written when a chunk is in the cache and its model vouched for,
//!   and emptied before the slot is anybody else's. A store that takes the pool over ([`Store::adopt`]) checks every sum.
//!
//! Into memory, then on to a device:
//!
//! ```
//! use std::{path::Path, sync::Arc};
//!
//! use stoker_checkpoint::{Source, index};
//! use stoker_device::{Device, SimulatedDevice, SimulatedOptions};
//! use stoker_store::{CheckpointFiles, DeviceTarget, Keep, Layout, Priority, Store, StoreConfig};
//! use stoker_types::{ByteSize, ModelName};
//! use tokio_util::sync::CancellationToken;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny-llama");
//! // Headers only.
//! let manifest = index(&path, Source { uri: "a folder".into(), revision: None })?;
//! let files = CheckpointFiles::from_manifest(ModelName::new("tiny")?, &path, &manifest)?;
//!
//! let store = Store::open(StoreConfig::new(ByteSize::mib(64)))?;
//! let cancel = CancellationToken::new();
//! let resident = store.load(&files, Priority::Demand, &cancel).await?;
//! assert_eq!(resident.files().len(), manifest.files.len());
//! // Its chunks may be evicted from here on.
//! drop(resident);
//!
//! // A GPU would be `CudaDevice::open(0, &CudaOptions::default())?`.
//! let device: Arc<dyn Device> = Arc::new(SimulatedDevice::new(&SimulatedOptions::default())?);
//! store.attach(&*device, ByteSize::ZERO);
//! let layout = Arc::new(Layout::of_manifest(&manifest));
//! let slab = device.allocate(layout.bytes(), ByteSize::mib(64))?;
//! let target = DeviceTarget { device: Arc::clone(&device), slab: slab.clone(), layout: Arc::clone(&layout) };
//! let delivering = store.deliver(&files, target, Keep::All, Priority::Demand)?;
//! let mut arrived = delivering.arrived();
//! arrived.wait_for(|bytes| *bytes > 0).await?;
//! let delivered = delivering.wait(&cancel).await?;
//! assert_eq!(delivered.copied, layout.bytes());
//!
//! // Each tensor by itself; device memory goes back with the last one in each granule.
//! let (tensor, at) = (&manifest.tensors[0], layout.tensors()[0]);
//! let part = slab.part(at, tensor.len)?;
//! drop(slab);
//! assert_eq!(part.bytes(), ByteSize(tensor.len));
//! # Ok(())
//! # }
//! ```
//!
//! Metrics: `stoker_store_{budget,used,mapped}_bytes`, `stoker_store_rate_bytes_per_second{tier}`,
//! `stoker_store_read_bytes_total{tier,reader}`, `stoker_store_loads_total{kind,outcome}`, `stoker_store_load_seconds`,
//! `stoker_store_evictions_total{reason}`, `stoker_store_rereads_total`, `stoker_store_adopted_bytes_total`,
//! `stoker_store_refetches_total`, `stoker_store_tee_{bytes,dropped,failed}_total`,
//! `stoker_store_tee_skipped_total{reason}`, `stoker_store_copies_landed_total`, `stoker_store_ssd_evictions_total`.

mod adopt;
mod borrowed;
mod cache;
mod check;
mod deliver;
mod error;
mod files;
mod hash;
mod job;
mod layout;
mod load;
mod meter;
pub mod pack;
mod report;
mod shared;
mod slice;
mod source;
mod ssd;
mod store;
mod stream;
mod transfer;

pub use adopt::{Adoption, KeptModel, MappedModel};
pub use check::Checked;
pub use deliver::{Delivered, Delivering, DeviceTarget, Keep};
pub use error::{LoadError, OpenError, Retry};
pub use files::{CheckpointFiles, ChunkRef, FilesError, ModelKey, SourceFile};
pub use job::Priority;
pub use layout::{ALIGN, FileRange, Layout};
pub use load::{FileSlots, Loading, Resident, Watermark};
pub use report::{EvictReason, Evictions, LoadReport, Residency, StoreStats};
pub use slice::{Shard, SliceError, TensorPart};
pub use ssd::{
    CopyEnd, CopyProgress, DiskState, FinishedCopy, GiveUp, Leftover, Shelf, Shelved, SsdDisk, SsdTier,
    host_of,
};
pub use store::{Clock, Evicted, Store, StoreConfig};
pub use stream::{ChunkStream, LentSlots, StreamOptions, StreamedChunk};
