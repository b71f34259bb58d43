//! Workers that outlived the node before this one.
//!
//! Each has a socket in the runtime directory that listens for the node that comes next. [`crate::RuntimeDir::claim`] connects
//! to all of them, [`crate::RuntimeDir::meet`] hears what they serve and has them let go of their claim to the pool's memory:
//! so the kernel can say whether anybody else has it, and what they have mapped is known slot by slot. Then the store
//! takes the memory over around those slots ([`crate::open_store`]), and [`crate::Node::open`] goes on with the workers, or
//! ends those that it has no use for: of another version, of a pool that was lost, of a model that isn't what it was.

use std::time::Duration;

use stoker_io::ForeignProcess;
use stoker_proto::{
    FrameReader, FrameWriter, PROTOCOL_VERSION,
    control::{FromWorker, Hello, Load, ToWorker, Yield, from_worker, to_worker},
};
use stoker_store::{FileSlots, KeptModel, MappedModel};
use stoker_types::{ModelName, WorkerId};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
    time::timeout,
};

use crate::{devices::LeftSlab, spawn::SocketFile};

/// What the node before left, as far as it has been found.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// Workers that were connected to.
    found: Vec<Found>,
    /// Those that have said what they are.
    pub(crate) workers: Vec<Survivor>,
    /// Weights on devices.
    pub(crate) slabs: Vec<LeftSlab>,
}

/// A worker whose socket took a connection.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) worker: WorkerId,
    pub(crate) control: std::os::unix::net::UnixStream,
    pub(crate) sockets: Sockets,
}

/// A worker's files.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// For gateways.
    pub(crate) streams: SocketFile,
    /// For the node that comes next.
    pub(crate) successor: SocketFile,
}

/// A worker that has said what it is.
#[derive(Debug)]
pub(crate) struct Survivor {
    pub(crate) worker: WorkerId,
    pub(crate) sockets: Sockets,
    pub(crate) reader: FrameReader<OwnedReadHalf>,
    pub(crate) writer: OwnedWriteHalf,
    pub(crate) process: ForeignProcess,
    pub(crate) hello: Hello,
    /// What it serves, if anything.
    pub(crate) serving: Option<Serving>,
}

/// What a survivor serves.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) model: ModelName,
    /// Its order, without the manifest.
    pub(crate) load: Load,
    /// What keeps its chunks in the pool; `None` when the pool that it maps isn't this node's, or it maps none.
    pub(crate) kept: Option<KeptModel>,
}

// === impl Left ===

impl Left {
    pub(crate) fn found(found: Vec<Found>) -> Self {
        Self { found, ..Self::default() }
    }

    /// Hears what those are that were found. Cancel-safe: who has not been heard then ends by itself in time.
    pub(crate) async fn meet(found: Vec<Found>, grace: Duration) -> Vec<Survivor> {
        let mut meetings = JoinSet::new();
        for one in found {
            meetings.spawn(async move {
                let worker = one.worker;
                match timeout(grace, one.greet()).await {
                    Ok(Ok(survivor)) => Some(survivor),
                    Ok(Err(error)) => {
                        tracing::info!(%worker, %error, "a worker of the node before can't be taken over");
                        None
                    }
                    Err(_) => {
                        tracing::warn!(%worker, ?grace, "a worker of the node before says nothing; it is not taken over");
                        None
                    }
                }
            });
        }
        let mut met: Vec<Survivor> = meetings.join_all().await.into_iter().flatten().collect();
        met.sort_by_key(|survivor| survivor.worker);
        met
    }

    pub(crate) fn take_found(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.workers.iter().map(|survivor| survivor.hello.pid).collect()
    }

    /// What they have mapped of a pool (its file's device and inode), in the order in which [`Self::keep`] wants to know what keeps it.
    pub(crate) fn mapped(&self, pool: (u64, u64)) -> Vec<MappedModel> {
        let with_pool = self.workers.iter().filter(|survivor| survivor.has_pool(pool));
        with_pool.filter_map(|survivor| survivor.serving.as_ref()?.mapped()).collect()
    }

    /// The pool was taken over, and so is what is mapped of it.
    pub(crate) fn keep(&mut self, pool: (u64, u64), kept: Vec<KeptModel>) {
        let with_pool = self.workers.iter_mut().filter(|survivor| survivor.has_pool(pool));
        let mapping = with_pool.filter_map(|s| s.serving.as_mut().filter(|serving| serving.maps_pool()));
        for (serving, kept) in mapping.zip(kept) {
            serving.kept = Some(kept);
        }
    }
}

// === impl Found ===

impl Found {
    async fn greet(self) -> Result<Survivor, String> {
        let Self { worker, control, sockets } = self;
        let words = |error: &dyn std::fmt::Display| error.to_string();
        control.set_nonblocking(true).map_err(|error| words(&error))?;
        let (read, write) = UnixStream::from_std(control).map_err(|error| words(&error))?.into_split();
        let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
        let hello = loop {
            match hear(&mut reader).await? {
                from_worker::Kind::Hello(hello) => break hello,
                other => tracing::debug!(%worker, ?other, "said before it said hello"),
            }
        };
        if hello.protocol != PROTOCOL_VERSION {
            return Err(format!(
                "it speaks version {} of the protocol, this node {PROTOCOL_VERSION}",
                hello.protocol
            ));
        }
        let process = ForeignProcess::open(hello.pid).map_err(|error| words(&error))?;
        let serving = hello.serving.clone().map(|load| Serving::of(*load)).transpose()?;
        let yielding = ToWorker { kind: Some(to_worker::Kind::Yield(Yield {})) };
        writer.send(&yielding).await.map_err(|error| words(&error))?;
        // It answers: the process that was opened above is the one that is spoken to.
        while !matches!(hear(&mut reader).await?, from_worker::Kind::Yielded(_)) {}
        let writer = writer.into_inner();
        Ok(Survivor { worker, sockets, reader, writer, process, hello, serving })
    }
}

async fn hear(reader: &mut FrameReader<OwnedReadHalf>) -> Result<from_worker::Kind, String> {
    loop {
        match reader.next::<FromWorker>().await {
            Ok(Some(FromWorker { kind: Some(kind) })) => return Ok(kind),
            Ok(Some(FromWorker { kind: None })) => {}
            Ok(None) => return Err("it has ended".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
}

// === impl Survivor ===

impl Survivor {
    /// Whether the pool with this device and inode is the one that it maps.
    pub(crate) fn has_pool(&self, pool: (u64, u64)) -> bool {
        (self.hello.pool_device, self.hello.pool_inode) == pool
    }
}

// === impl Serving ===

impl Serving {
    fn of(load: Load) -> Result<Self, String> {
        let model = ModelName::new(&load.model).map_err(|error| error.to_string())?;
        Ok(Self { model, load, kept: None })
    }

    fn maps_pool(&self) -> bool {
        self.load.slab.is_none()
    }

    fn mapped(&self) -> Option<MappedModel> {
        let file =
            |file: &stoker_proto::control::FileSlots| FileSlots { len: file.len, slots: file.slots.clone() };
        self.maps_pool().then(|| MappedModel {
            model: self.model.clone(),
            files: self.load.files.iter().map(file).collect(),
        })
    }
}
