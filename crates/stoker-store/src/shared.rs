//! What the facade, the reading threads and every guard share. One lock; nothing is read or waited for under it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use stoker_io::{Chunk, ChunkBuf, ChunkPool, Open, OpenRemote, ReadMode, Wake};
use stoker_types::{ByteSize, BytesPerSec, ModelName, Tier, TierRate};
use tokio::sync::watch;

use crate::{
    cache::{Cache, WayBack},
    error::LoadError,
    files::{CheckpointFiles, ModelKey},
    job::{Assignment, Job, JobId, Jobs, Priority, Progress, Ring, Target},
    meter::{Meter, Meters},
    report::{EvictReason, StoreStats},
    ssd::{GiveUp, SsdCopy, SsdTier, Tee, Wanted, host_of},
    store::Clock,
    transfer::{ChunkFilled, Opened, PartRead},
};

pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) pool: ChunkPool,
    pub(crate) opener: Arc<dyn Open>,
    pub(crate) remote: Option<Arc<dyn OpenRemote>>,
    pub(crate) ssd: Option<SsdTier>,
    pub(crate) tee: Tee,
    pub(crate) wake: Wake,
    pub(crate) mode: ReadMode,
    /// Grows with each change of what is in memory.
    pub(crate) changes: watch::Sender<u64>,
    clock: Clock,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) cache: Cache,
    pub(crate) jobs: Jobs,
    meters: Meters,
    /// Of each device, by its number.
    copies: BTreeMap<u32, Meter>,
    bytes_read: u64,
    closed: bool,
}

/// What is below memory.
pub(crate) struct Tiers {
    pub(crate) opener: Arc<dyn Open>,
    pub(crate) remote: Option<Arc<dyn OpenRemote>>,
    pub(crate) ssd: Option<SsdTier>,
}

/// How a wish for a model begins.
pub(crate) enum Begun {
    /// Everything is in memory.
    Resident,
    /// A load is under way, perhaps since before.
    Loading {
        /// How far it is.
        progress: watch::Receiver<Progress>,
        /// It was under way before.
        joined: bool,
    },
}

// === impl Shared ===

impl Shared {
    pub(crate) fn new(pool: ChunkPool, tiers: Tiers, mode: ReadMode, clock: Clock, tee: Tee) -> Self {
        let Tiers { opener, remote, ssd } = tiers;
        let mut state = State::default();
        state.jobs.remote.most = remote.as_ref().map_or(0, |remote| remote.reads_max());
        Self {
            state: Mutex::new(state),
            pool,
            opener,
            remote,
            ssd,
            tee,
            wake: Wake::default(),
            mode,
            changes: watch::Sender::new(0),
            clock,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) fn now(&self) -> Duration {
        (self.clock)()
    }

    pub(crate) fn bytes_of(&self, slots: usize) -> ByteSize {
        ByteSize(slots as u64 * self.pool.chunk_bytes() as u64)
    }

    fn budget(&self) -> usize {
        self.pool.usage().budget as usize
    }

    fn way_back<'a>(&'a self, meters: &'a Meters) -> WayBack<'a> {
        WayBack { meters, ssd: self.ssd.as_ref() }
    }

    // --- wishes ---

    /// Holds a model, and loads it if need be. On success the caller owns one hold.
    pub(crate) fn begin(&self, files: &CheckpointFiles, priority: Priority) -> Result<Begun, LoadError> {
        let state = &mut *self.lock();
        self.check(state, files)?;
        let now = self.now();
        let key = files.key();
        let model = state.cache.enter(files);
        // Not before the load that completed it has ended: that may still find something wrong.
        if model.is_complete() && model.load.is_none() {
            model.touch(now);
            model.hold();
            self.publish(state);
            return Ok(Begun::Resident);
        }
        if let Some(job) = model.load.and_then(|id| state.jobs.get_mut(id)) {
            job.priority = job.priority.max(priority);
            model.touch(now);
            model.hold();
            return Ok(Begun::Loading { progress: job.progress.subscribe(), joined: true });
        }
        let needed = files.order().len();
        let room = state.cache.room(self.budget(), Some(key));
        if needed > room.free {
            return Err(self.out_of_budget(&key.name, needed, room.free, room.held));
        }
        let model = state.cache.enter(files);
        model.touch(now);
        model.hold();
        let missing: Vec<_> = model.missing().collect();
        let resident = model.resident_bytes().bytes();
        let prefix = model.prefix_from(0);
        let target = Target::Cache { brought: Vec::new(), prefix };
        let (id, job) = state.jobs.add(files.clone(), priority, self.mode, missing, target, now);
        model.load = Some(id);
        job.tally.bytes_resident = resident;
        let ready = files.order()[..prefix].iter().map(|chunk| files.chunk_len(*chunk)).sum();
        let progress = job.progress.subscribe();
        job.progress.send_modify(|progress| progress.ready = ready);
        self.publish(state);
        self.wake.wake();
        Ok(Begun::Loading { progress, joined: false })
    }

    /// Gives a hold back. The last one cancels the load.
    pub(crate) fn release(&self, key: &ModelKey) {
        let state = &mut *self.lock();
        let Some(model) = state.cache.model_mut(key) else { return };
        if !model.release() {
            return;
        }
        if let Some(id) = model.load {
            self.end(state, id, Err(LoadError::Cancelled));
        }
        let (now, back) = (self.now(), self.way_back(&state.meters));
        state.cache.shrink(&self.pool, now, back);
        self.changed(state);
    }

    /// What a load of a model has brought by now no longer goes when it fails, as far as it is right by a sum that was known
    /// before. (What was only learned is vouched for by the end of a load.)
    pub(crate) fn keep_brought(&self, key: &ModelKey) {
        let state = &mut *self.lock();
        let load = state.cache.model(key).and_then(|model| model.load);
        let Some(job) = load.and_then(|id| state.jobs.get_mut(id)) else { return };
        let Job { files, target, .. } = job;
        if let Target::Cache { brought, .. } = target {
            brought.retain(|position| files.sum(files.order()[*position]).is_none());
        }
    }

    /// Begins a stream of at most `window` chunks at a time, fewer if there is less room.
    pub(crate) fn begin_stream(
        &self,
        files: &CheckpointFiles,
        priority: Priority,
        window: usize,
        fresh: bool,
    ) -> Result<(JobId, usize, watch::Receiver<Progress>), LoadError> {
        let state = &mut *self.lock();
        self.check(state, files)?;
        let vouched = state.cache.model(files.key()).is_some_and(|model| model.is_vouched());
        if let Some((file, _)) = files.to_hash().next().filter(|_| !vouched) {
            return Err(LoadError::OnlyHash { path: files.files()[file].path.clone() });
        }
        let all = 0..files.order().len();
        let ring = Ring { fresh, ..Ring::of(window) };
        self.add_stream(state, files, priority, ring, all)
    }

    /// Begins a stream of some chunks that completes a copy.
    pub(crate) fn begin_fill(
        &self,
        files: &CheckpointFiles,
        priority: Priority,
        window: usize,
        places: &[usize],
    ) -> Result<(JobId, usize, watch::Receiver<Progress>), LoadError> {
        let state = &mut *self.lock();
        self.check(state, files)?;
        let ring = Ring { fills: true, ..Ring::of(window) };
        self.add_stream(state, files, priority, ring, places.iter().copied())
    }

    fn add_stream(
        &self,
        state: &mut State,
        files: &CheckpointFiles,
        priority: Priority,
        mut ring: Ring,
        places: impl ExactSizeIterator<Item = usize>,
    ) -> Result<(JobId, usize, watch::Receiver<Progress>), LoadError> {
        let room = state.cache.room(self.budget(), None);
        let window = ring.window.min(places.len()).max(1).min(room.free);
        if window == 0 {
            return Err(self.out_of_budget(&files.key().name, 1, 0, room.held));
        }
        state.cache.set_aside(window);
        ring.window = window;
        let mode = if ring.fresh { ReadMode::Uncached } else { self.mode };
        let (id, job) = state.jobs.add(files.clone(), priority, mode, places, Target::Ring(ring), self.now());
        let progress = job.progress.subscribe();
        self.wake.wake();
        Ok((id, window, progress))
    }

    /// Takes out every slot that no load is promised and nobody holds. Cached chunks go; their memory stays.
    pub(crate) fn lend(&self) -> Vec<ChunkBuf> {
        let state = &mut *self.lock();
        state.cache.evict(|_| true, EvictReason::Asked);
        let free = state.cache.room(self.budget(), None).free;
        let slots: Vec<_> = std::iter::from_fn(|| self.pool.try_take()).take(free).collect();
        state.cache.set_aside(slots.len());
        self.changed(state);
        slots
    }

    /// A stream is gone, or its consumer has let go of the last chunk.
    pub(crate) fn give_back(&self, slots: usize) {
        self.lock().cache.give_back(slots);
        self.wake.wake();
    }

    fn check(&self, state: &State, files: &CheckpointFiles) -> Result<(), LoadError> {
        if state.closed {
            return Err(LoadError::Closed);
        }
        self.check_chunks(files)
    }

    pub(crate) fn check_chunks(&self, files: &CheckpointFiles) -> Result<(), LoadError> {
        let store = self.pool.chunk_bytes() as u64;
        if files.chunk_bytes() != store {
            return Err(LoadError::ChunkSize {
                given: ByteSize(files.chunk_bytes()),
                store: ByteSize(store),
            });
        }
        Ok(())
    }

    fn out_of_budget(&self, model: &ModelName, needed: usize, free: usize, held: usize) -> LoadError {
        LoadError::OutOfBudget {
            model: model.clone(),
            needed: self.bytes_of(needed),
            free: self.bytes_of(free),
            mapped: self.bytes_of(held),
            budget: self.bytes_of(self.budget()),
        }
    }

    // --- reading threads ---

    pub(crate) fn assign(&self) -> Option<Assignment> {
        let state = &mut *self.lock();
        let (now, back) = (self.now(), self.way_back(&state.meters));
        state.jobs.assign(&mut state.cache, &self.pool, now, back)
    }

    pub(crate) fn opened(&self, id: JobId, opened: Result<Opened, LoadError>) {
        {
            let state = &mut *self.lock();
            match opened {
                Err(error) => self.end(state, id, Err(error)),
                Ok(Opened { sources, copy }) => {
                    let Some(job) = state.jobs.get_mut(id) else { return };
                    for (file, source) in job.files.files().iter().zip(&sources) {
                        let model = &job.files.key().name;
                        let choice = source.choice().map(ToString::to_string).unwrap_or_default();
                        tracing::info!(%model, path = %file.path.display(), choice, "reading");
                    }
                    if let (Some(copy), Some(model)) = (&copy, state.cache.model_mut(job.files.key())) {
                        model.copied_to(copy);
                    }
                    job.opened(sources, copy, self.now());
                }
            }
        }
        self.wake.wake();
    }

    /// Has other threads help with a chunk.
    pub(crate) fn offer(&self, id: JobId, parts: Vec<PartRead>) {
        if parts.is_empty() {
            return;
        }
        if let Some(job) = self.lock().jobs.get_mut(id) {
            job.offer(parts);
        }
        self.wake.wake();
    }

    /// Whether a job is still wanted.
    pub(crate) fn goes_on(&self, id: JobId) -> bool {
        self.lock().jobs.get_mut(id).is_some()
    }

    /// A read begins; from remote, `host` says from where.
    pub(crate) fn read_begins(&self, tier: Tier, host: Option<&str>) {
        let now = self.now();
        self.lock().meters.begin(tier, host, now);
    }

    pub(crate) fn read_ended(&self, tier: Tier, host: Option<&str>, bytes: u64) {
        let now = self.now();
        self.lock().meters.end(tier, host, now, bytes);
    }

    pub(crate) fn copy_begins(&self, device: u32) {
        let now = self.now();
        self.lock().copies.entry(device).or_default().begin(now);
    }

    pub(crate) fn copy_ended(&self, device: u32, bytes: u64) {
        let now = self.now();
        self.lock().copies.entry(device).or_default().end(now, bytes);
    }

    /// Takes a load's copies into the average.
    pub(crate) fn copies_measured(&self, device: u32) {
        let now = self.now();
        let state = &mut *self.lock();
        let Some(meter) = state.copies.get_mut(&device) else { return };
        meter.sample(now);
        if let Some(rate) = meter.rate() {
            metrics::gauge!("stoker_store_device_rate_bytes_per_second", "device" => device.to_string())
                .set(rate.0);
        }
    }

    /// The measured rate of copies to a device.
    pub(crate) fn device_rate(&self, device: u32) -> Option<BytesPerSec> {
        self.lock().copies.get(&device)?.rate()
    }

    /// A chunk is there and right. If its job is gone, so is the chunk.
    pub(crate) fn arrived(&self, id: JobId, position: usize, chunk: Chunk, read: &ChunkFilled, again: bool) {
        {
            let state = &mut *self.lock();
            if let Some(job) = state.jobs.get_mut(id) {
                job.tally.reread += u32::from(again);
                state.bytes_read += job.files.chunk_len(job.files.order()[position]);
                job.arrived(&mut state.cache, position, chunk, read);
            } else {
                drop(chunk);
            }
        }
        // Also for a job that is gone: its slot is free now.
        self.wake.wake();
    }

    pub(crate) fn finished(&self, id: JobId, checked: Result<(), LoadError>) {
        let state = &mut *self.lock();
        self.end(state, id, checked);
        self.changed(state);
    }

    pub(crate) fn fail(&self, id: JobId, error: LoadError) {
        self.finished(id, Err(error));
        self.wake.wake();
    }

    /// Ends a job. When it failed, everything that it brought goes.
    fn end(&self, state: &mut State, id: JobId, end: Result<(), LoadError>) {
        let Some(job) = state.jobs.remove(id) else { return };
        let now = self.now();
        state.meters.sample(now);
        let Job { files, target, progress, copy, .. } = &job;
        let name = &files.key().name;
        let mut dropped = 0;
        if let Target::Cache { brought, .. } = target
            && let Some(model) = state.cache.model_mut(files.key())
        {
            model.load = None;
            if end.is_ok() {
                model.vouch();
            } else {
                brought.iter().for_each(|position| model.drop_chunk(*position));
                dropped = brought.len();
                model.unlearn();
            }
        }
        let end = end.map(|()| Arc::new(job.report(&state.cache, now)));
        state.cache.count(EvictReason::Failed, dropped);
        let outcome = match &end {
            Ok(report) => {
                let (disk, remote) = (report.bytes_from(Tier::Ssd), report.bytes_from(Tier::Remote));
                tracing::info!(model = %name, from_disk = %disk, from_remote = %remote, time = ?report.total, "loaded");
                metrics::histogram!("stoker_store_load_seconds").record(report.total.as_secs_f64());
                "ok"
            }
            Err(error) => {
                tracing::info!(model = %name, %error, "load ended");
                error.name()
            }
        };
        let kind = match target {
            Target::Cache { .. } => "load",
            Target::Ring(ring) if ring.fills => "fill",
            Target::Ring(_) => "stream",
        };
        if let Some(copy) = copy.as_ref().filter(|_| kind != "fill") {
            self.copy_passed(copy, &end);
        }
        if let (Some(ssd), Some(object)) = (&self.ssd, files.object())
            && let Some(rate) = state.meters.host(host_of(&object.url))
        {
            ssd.measured(host_of(&object.url), rate);
        }
        metrics::counter!("stoker_store_loads_total", "kind" => kind, "outcome" => outcome).increment(1);
        progress.send_modify(|progress| progress.end = Some(end));
    }

    /// What passed of a copy has passed: the rest of it is brought in the background, unless it is of no more use.
    fn copy_passed(&self, copy: &Arc<SsdCopy>, end: &Result<Arc<crate::LoadReport>, LoadError>) {
        match end {
            Ok(_) => self.tee.complete(Wanted { copy: Arc::clone(copy), priority: Priority::Prefetch }),
            // Else what is there stays for the next load.
            Err(error) => {
                if let Some(why) = GiveUp::of(error) {
                    self.tee.give_up(copy, why);
                }
            }
        }
    }

    // --- budget, eviction, statistics ---

    /// Lowers or raises the budget. Loads that no longer fit fail, the least urgent first. Returns how many chunks went.
    pub(crate) fn set_budget(&self, budget: ByteSize) -> usize {
        let evicted = {
            let state = &mut *self.lock();
            self.pool.set_budget(budget);
            let mut ended = 0;
            for id in state.jobs.expendable_first() {
                let room = state.cache.room(self.budget(), None);
                if room.held <= self.budget() {
                    break;
                }
                let Some(job) = state.jobs.get_mut(id) else { continue };
                if matches!(job.target, Target::Ring(_)) && self.budget() > 0 {
                    // A stream goes on with fewer slots; those that it set aside come back when it ends.
                    continue;
                }
                let needed = job.files.order().len();
                let error = self.out_of_budget(&job.files.key().name.clone(), needed, room.free, room.held);
                self.end(state, id, Err(error));
                ended += 1;
            }
            let (now, back) = (self.now(), self.way_back(&state.meters));
            let evicted = state.cache.shrink(&self.pool, now, back);
            if ended + evicted > 0 {
                self.changed(state);
            } else {
                self.publish(state);
            }
            evicted
        };
        self.wake.wake();
        evicted
    }

    /// Evicts at most so many chunks for the machine's sake. Returns how many went.
    pub(crate) fn shed(&self, chunks: usize) -> usize {
        let state = &mut *self.lock();
        let (now, back) = (self.now(), self.way_back(&state.meters));
        let evicted = state.cache.shed(chunks, now, back);
        if evicted > 0 {
            self.changed(state);
        }
        evicted
    }

    /// Ends every job; nothing begins any more.
    pub(crate) fn close(&self) {
        let state = &mut *self.lock();
        state.closed = true;
        for id in state.jobs.expendable_first() {
            self.end(state, id, Err(LoadError::Closed));
        }
    }

    pub(crate) fn rates(&self) -> Vec<TierRate> {
        let state = self.lock();
        let tiers = [Some(Tier::Ssd), self.remote.is_some().then_some(Tier::Remote)];
        tiers.into_iter().flatten().map(|tier| TierRate { tier, rate: state.meters.rate(tier) }).collect()
    }

    pub(crate) fn stats(&self) -> StoreStats {
        let rates = self.rates();
        let state = &*self.lock();
        StoreStats {
            budget: self.bytes_of(self.budget()),
            used: self.bytes_of(self.pool.usage().in_use as usize),
            mapped: self.bytes_of(state.cache.room(0, None).held),
            residency: state.cache.residency(),
            rates,
            evictions: state.cache.evictions(),
            loading: state.jobs.len(),
            bytes_read: ByteSize(state.bytes_read),
        }
    }

    /// What is in memory has changed.
    pub(crate) fn changed(&self, state: &State) {
        self.publish(state);
        self.changes.send_modify(|version| *version += 1);
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are floating-point numbers")]
    fn publish(&self, state: &State) {
        metrics::gauge!("stoker_store_budget_bytes").set(self.bytes_of(self.budget()).bytes() as f64);
        metrics::gauge!("stoker_store_used_bytes")
            .set(self.bytes_of(self.pool.usage().in_use as usize).bytes() as f64);
        metrics::gauge!("stoker_store_mapped_bytes")
            .set(self.bytes_of(state.cache.room(0, None).held).bytes() as f64);
        for (tier, name) in [(Tier::Ssd, "ssd"), (Tier::Remote, "remote")] {
            if let Some(rate) = state.meters.rate(tier) {
                metrics::gauge!("stoker_store_rate_bytes_per_second", "tier" => name).set(rate.0);
            }
        }
    }
}
