//! One way for bytes from the host to a device: its own link, or another device's and from there on.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use cudarc::driver::sys::{self, CUdeviceptr};
use parking_lot::{Condvar, Mutex};
use stoker_types::ByteSize;

use super::{
    context::{Context, Event, Stream},
    memory::Mapping,
};
use crate::{
    device::{Cut, Done, HostBytes, Transfer},
    error::DeviceError,
    queue::Queue,
    slab::Slab,
};

/// A link, with a thread that queues copies on the device and one that waits for their ends.
pub(crate) struct Link {
    threads: Vec<JoinHandle<()>>,
}

/// How a link's copies are made.
pub(crate) enum Way {
    /// To the device itself, on streams in turn.
    Direct { streams: Vec<Stream>, next: usize },
    /// To a helper's memory and from there to the device.
    Helper(Box<Helper>),
}

/// Another device that lends its link.
pub(crate) struct Helper {
    up: Stream,
    down: Stream,
    staging: Mapping,
    slots: Vec<StagingSlot>,
    next: usize,
}

struct StagingSlot {
    /// The bytes are in the slot.
    full: Event,
    /// The bytes have left it.
    empty: Event,
}

/// A copy that the device has.
struct Flight {
    /// Recorded behind the copy.
    end: Arc<Event>,
    from: Box<dyn HostBytes>,
    to: Slab,
    done: Done,
}

/// Places for copies under way.
struct Places {
    free: Mutex<usize>,
    left: Condvar,
}

// === impl Link ===

impl Link {
    /// Starts a link that takes from `queue` until that is closed.
    pub(crate) fn start(
        name: &str,
        context: &Arc<Context>,
        way: Way,
        depth: usize,
        queue: Arc<Queue>,
    ) -> Result<Self, DeviceError> {
        let depth = depth.max(1);
        let places = Arc::new(Places { free: Mutex::new(depth), left: Condvar::new() });
        let (sender, flights) = mpsc::channel();
        let events =
            (0..depth).map(|_| Event::new(context).map(Arc::new)).collect::<Result<VecDeque<_>, _>>()?;
        let mut link = Self { threads: Vec::new() };
        let spawn = |name: String, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name)
                .spawn(run)
                .map_err(|error| DeviceError::Os { call: "starting a thread", words: error.to_string() })
        };
        {
            let (places, queue) = (Arc::clone(&places), Arc::clone(&queue));
            let reap = move || reap(&flights, &places, &queue);
            link.threads.push(spawn(format!("{name}-end"), Box::new(reap))?);
        }
        let mut submitter = Submitter { context: Arc::clone(context), way, events, queue, places, sender };
        link.threads.push(spawn(name.to_owned(), Box::new(move || submitter.run()))?);
        Ok(link)
    }
}

impl Drop for Link {
    /// The queue is closed by now: waits for what is under way.
    fn drop(&mut self) {
        let current = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != current) {
            // Panics are caught and reported where they happen.
            let _ = thread.join();
        }
    }
}

struct Submitter {
    context: Arc<Context>,
    way: Way,
    /// In turn: by the time an event's turn comes again, its copy has ended, for there are as many as places.
    events: VecDeque<Arc<Event>>,
    queue: Arc<Queue>,
    places: Arc<Places>,
    sender: mpsc::Sender<Flight>,
}

impl Submitter {
    fn run(&mut self) {
        let bound = self.context.bind();
        loop {
            self.places.take();
            let Some(transfer) = self.queue.pop(self.way.limit()) else { return };
            let queued = bound.clone().and_then(|()| self.way.queue(&transfer, &mut self.events));
            let Transfer { from, to, done, .. } = transfer;
            match queued {
                Ok(end) => {
                    let flight = Flight { end, from, to, done };
                    if let Err(mpsc::SendError(flight)) = self.sender.send(flight) {
                        // The other thread is gone: wait here, so that nothing is freed under a copy.
                        let ended = flight.end.synchronize();
                        finish(flight, ended, &self.queue);
                        self.places.give_back();
                    }
                }
                Err(error) => {
                    // What was queued before the failure may still read the host's bytes.
                    let settled = self.way.settle();
                    if settled.is_err() {
                        self.queue.close(&error);
                    }
                    drop((from, to));
                    end(done, Err(error));
                    self.places.give_back();
                }
            }
        }
    }
}

fn reap(flights: &mpsc::Receiver<Flight>, places: &Places, queue: &Queue) {
    while let Ok(flight) = flights.recv() {
        let ended = flight.end.synchronize();
        finish(flight, ended, queue);
        places.give_back();
    }
}

fn finish(flight: Flight, ended: Result<(), DeviceError>, queue: &Queue) {
    if let Err(lost @ DeviceError::Lost { .. }) = &ended {
        queue.close(lost);
    }
    let Flight { from, to, done, .. } = flight;
    // Before the call: whoever learns of the end finds the buffer free.
    drop((from, to));
    end(done, ended);
}

fn end(done: Done, ended: Result<(), DeviceError>) {
    if catch_unwind(AssertUnwindSafe(|| done(ended))).is_err() {
        tracing::error!("what was to be called at the end of a copy panicked");
    }
}

// === impl Way ===

impl Way {
    /// A device's own link.
    pub(crate) fn direct(context: &Arc<Context>, streams: usize) -> Result<Self, DeviceError> {
        let streams = (0..streams.max(1)).map(|_| Stream::new(context)).collect::<Result<_, _>>()?;
        Ok(Self::Direct { streams, next: 0 })
    }

    /// `helper`'s link, and from there to a device whose slabs it may write to. It takes copies of at most `slot` bytes.
    pub(crate) fn helper(helper: &Arc<Context>, slot: ByteSize, slots: u32) -> Result<Self, DeviceError> {
        let bytes = slot.bytes() * u64::from(slots);
        let staging = Mapping::create(helper, bytes, bytes, &[])?;
        let slots = (0..slots)
            .map(|_| Ok(StagingSlot { full: Event::new(helper)?, empty: Event::new(helper)? }))
            .collect::<Result<_, DeviceError>>()?;
        Ok(Self::Helper(Box::new(Helper {
            up: Stream::new(helper)?,
            down: Stream::new(helper)?,
            staging,
            slots,
            next: 0,
        })))
    }

    /// Most bytes of one copy.
    fn limit(&self) -> u64 {
        match self {
            Self::Direct { .. } => u64::MAX,
            Self::Helper(helper) => helper.staging.bytes() / helper.slots.len() as u64,
        }
    }

    /// Queues a copy on the device; the event stands for its end.
    fn queue(
        &mut self,
        transfer: &Transfer,
        events: &mut VecDeque<Arc<Event>>,
    ) -> Result<Arc<Event>, DeviceError> {
        match self {
            Self::Direct { streams, next } => {
                *next = (*next + 1) % streams.len();
                let stream = &streams[*next];
                let host = (*transfer.from).as_ref();
                for cut in &transfer.cuts {
                    to_device(stream, transfer.to.address() + cut.to, host, cut)?;
                }
                announce(stream, transfer)?;
                events.rotate_left(1);
                let end = Arc::clone(&events[0]);
                end.record(stream)?;
                Ok(end)
            }
            Self::Helper(helper) => helper.queue(transfer, events),
        }
    }

    /// Waits for everything that was queued.
    fn settle(&self) -> Result<(), DeviceError> {
        let streams: &[Stream] = match self {
            Self::Direct { streams, .. } => streams,
            Self::Helper(helper) => std::slice::from_ref(&helper.down),
        };
        streams.iter().try_for_each(|stream| {
            let end = Event::new(&stream.context)?;
            end.record(stream)?;
            end.synchronize()
        })
    }
}

// === impl Helper ===

impl Helper {
    fn queue(
        &mut self,
        transfer: &Transfer,
        events: &mut VecDeque<Arc<Event>>,
    ) -> Result<Arc<Event>, DeviceError> {
        self.next = (self.next + 1) % self.slots.len();
        let slot = &self.slots[self.next];
        let slot_bytes = self.staging.bytes() / self.slots.len() as u64;
        let base: CUdeviceptr = self.staging.address() + slot_bytes * self.next as u64;
        let host = (*transfer.from).as_ref();
        self.up.wait(&slot.empty)?;
        let mut at = base;
        for cut in &transfer.cuts {
            to_device(&self.up, at, host, cut)?;
            at += cut.bytes();
        }
        slot.full.record(&self.up)?;
        self.down.wait(&slot.full)?;
        at = base;
        for cut in &transfer.cuts {
            let to = transfer.to.address() + cut.to;
            // The rows lie side by side by now.
            let bytes = cut.len * cut.rows;
            // Within the helper's context, which may write to the slab. (The call for two contexts goes through host
            // memory here: memory of this kind has its access rights by range, and none between contexts.)
            // SAFETY: the slot holds the bytes once `full` is reached; the target's range was checked, and its slab is
            // held until the end.
            let queued = unsafe { sys::cuMemcpyDtoDAsync_v2(to, at, bytes, self.down.raw) };
            self.up.context.check("cuMemcpyDtoDAsync", queued)?;
            at += cut.bytes();
        }
        slot.empty.record(&self.down)?;
        announce(&self.down, transfer)?;
        events.rotate_left(1);
        let end = Arc::clone(&events[0]);
        end.record(&self.down)?;
        Ok(end)
    }
}

/// Queues the copy of a part of `host`, whose range was checked.
fn to_device(stream: &Stream, to: CUdeviceptr, host: &[u8], cut: &Cut) -> Result<(), DeviceError> {
    let from = host[cut.from..].as_ptr();
    if cut.rows == 1 {
        // SAFETY: both ranges were checked; the target's slab and the host's bytes are held until the copy has ended.
        let queued = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), cut.len, stream.raw) };
        return stream.context.check("cuMemcpyHtoDAsync", queued);
    }
    let rows = sys::CUDA_MEMCPY2D_v2 {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: from.cast(),
        srcDevice: 0,
        srcArray: std::ptr::null_mut(),
        srcPitch: cut.pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: to,
        dstArray: std::ptr::null_mut(),
        dstPitch: cut.len,
        WidthInBytes: cut.len,
        Height: cut.rows,
    };
    // SAFETY: as above; the description is read before the call returns.
    let queued = unsafe { sys::cuMemcpy2DAsync_v2(&raw const rows, stream.raw) };
    stream.context.check("cuMemcpy2DAsync", queued)
}

/// Queues that the word which stands for a copy's end is written.
fn announce(stream: &Stream, transfer: &Transfer) -> Result<(), DeviceError> {
    let Some(word) = transfer.arrival else { return Ok(()) };
    // SAFETY: the word was checked to be in the slab, which is held until the end. What was queued before is visible to
    // whoever sees it.
    let queued = unsafe { sys::cuStreamWriteValue32_v2(stream.raw, transfer.to.address() + word, 1, 0) };
    stream.context.check("cuStreamWriteValue32", queued)
}

// === impl Places ===

impl Places {
    fn take(&self) {
        let mut free = self.free.lock();
        while *free == 0 {
            self.left.wait(&mut free);
        }
        *free -= 1;
    }

    fn give_back(&self) {
        *self.free.lock() += 1;
        self.left.notify_one();
    }
}
