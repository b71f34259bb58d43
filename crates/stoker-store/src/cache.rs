//! The memory tier: which chunks of which models are in it, who holds them, and which go when room is needed.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use stoker_checkpoint::ChunkSum;
use stoker_io::{Chunk, ChunkBuf, ChunkPool, Record};
use stoker_scheduler::eviction::{ChunkFacts, Heat};
use stoker_types::{ByteSize, ModelName, Tier};

use crate::{
    adopt::version_of,
    files::{CheckpointFiles, ModelKey},
    job::JobId,
    meter::Meters,
    report::{EvictReason, Evictions, Residency},
    ssd::{SsdCopy, SsdTier, host_of},
};

/// Chunks in memory, by model.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    models: HashMap<ModelKey, Model>,
    /// With the last job that was accepted before the pin.
    pinned: HashMap<ModelName, JobId>,
    /// Slots set aside for streams.
    ring_slots: usize,
    evictions: Evictions,
}

/// What is known and in memory of one version of a model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) files: CheckpointFiles,
    /// By place in the order.
    chunks: Vec<Option<Chunk>>,
    /// By place in the order: given with the files, or learned from the first read.
    sums: Vec<Option<ChunkSum>>,
    /// No hash of a whole file is left to be checked: what was learned is what it should be.
    vouched: bool,
    /// Chunks in memory.
    resident: usize,
    /// Nothing is in memory from here on.
    end: usize,
    /// Guards and loads.
    holds: usize,
    heat: Heat,
    /// The load that is under way.
    pub(crate) load: Option<JobId>,
    /// The copy on SSD that was under way when it was last loaded.
    copy: Weak<SsdCopy>,
}

/// What is known of chunks' way back into memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WayBack<'a> {
    pub(crate) meters: &'a Meters,
    pub(crate) ssd: Option<&'a SsdTier>,
}

/// Room for a load, or why there is none. In slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Free, or to be had by eviction.
    pub(crate) free: usize,
    /// Held by others.
    pub(crate) held: usize,
}

// === impl Cache ===

impl Cache {
    pub(crate) fn model(&self, key: &ModelKey) -> Option<&Model> {
        self.models.get(key)
    }

    pub(crate) fn model_mut(&mut self, key: &ModelKey) -> Option<&mut Model> {
        self.models.get_mut(key)
    }

    /// The model of which a chunk lies in a slot.
    pub(crate) fn whose(&self, slot: u32) -> Option<ModelKey> {
        let has = |model: &Model| model.slots().any(|its| its == slot);
        self.models.iter().find(|(_, model)| has(model)).map(|(key, _)| key.clone())
    }

    pub(crate) fn evictions(&self) -> Evictions {
        self.evictions
    }

    /// The model's entry, made if there is none. What is in memory of other versions of it, and isn't held, goes.
    pub(crate) fn enter(&mut self, files: &CheckpointFiles) -> &mut Model {
        let key = files.key();
        let mut replaced = 0;
        self.models.retain(|other, model| {
            let stale = other.name == key.name && other != key && model.holds == 0;
            if stale {
                replaced += model.resident;
            }
            !stale
        });
        self.count(EvictReason::Replaced, replaced);
        let model = self.models.entry(key.clone()).or_insert_with(|| Model::new(files.clone()));
        let contradicted = model.learn_from(files);
        if contradicted > 0 {
            tracing::warn!(model = %key.name, contradicted, "chunks in memory contradict sums given later; dropped");
        }
        self.count(EvictReason::Replaced, contradicted);
        self.models.entry(key.clone()).or_insert_with(|| Model::new(files.clone()))
    }

    /// Room for one more load, apart from what `but` holds.
    pub(crate) fn room(&self, budget: usize, but: Option<&ModelKey>) -> Room {
        let held: usize = self
            .models
            .iter()
            .filter(|(key, _)| but != Some(key))
            .map(|(key, model)| match model.holds {
                0 if self.pinned.contains_key(&key.name) => model.resident,
                0 => 0,
                // Held in whole, also while it is being loaded: so two loads never wait for each other's slots.
                _ if model.load.is_some() => model.chunks.len(),
                // Whole, or of a failed load whose waiters haven't all heard of it.
                _ => model.resident,
            })
            .sum::<usize>()
            + self.ring_slots;
        Room { free: budget.saturating_sub(held), held }
    }

    /// A free slot for a job, by eviction if need be, and how many chunks went for it.
    pub(crate) fn take_slot(
        &mut self,
        pool: &ChunkPool,
        asker: JobId,
        now: Duration,
        back: WayBack<'_>,
    ) -> Option<(ChunkBuf, u32)> {
        let mut evicted = 0;
        loop {
            if let Some(buf) = pool.try_take() {
                return Some((buf, evicted));
            }
            if !self.evict_one(EvictReason::Room, Some(asker), now, back) {
                return None;
            }
            evicted += 1;
        }
    }

    /// Evicts until no more slots than the budget are in use, as far as nothing held stands in the way. Returns how
    /// many went.
    pub(crate) fn shrink(&mut self, pool: &ChunkPool, now: Duration, back: WayBack<'_>) -> usize {
        let over = || {
            let usage = pool.usage();
            usage.in_use > usage.budget
        };
        let mut evicted = 0;
        while over() && self.evict_one(EvictReason::Budget, None, now, back) {
            evicted += 1;
        }
        evicted
    }

    /// Evicts at most so many chunks, those that are worth least first. Returns how many went.
    pub(crate) fn shed(&mut self, chunks: usize, now: Duration, back: WayBack<'_>) -> usize {
        (0..chunks).take_while(|_| self.evict_one(EvictReason::Pressure, None, now, back)).count()
    }

    /// Counts a use of a model, whatever its version.
    pub(crate) fn touch(&mut self, name: &ModelName, now: Duration) {
        self.models.iter_mut().filter(|(key, _)| key.name == *name).for_each(|(_, model)| model.touch(now));
    }

    /// Evicts the chunk that is worth least. A pin doesn't protect from a job that was promised its room before: that
    /// job would wait for ever.
    fn evict_one(
        &mut self,
        reason: EvictReason,
        asker: Option<JobId>,
        now: Duration,
        back: WayBack<'_>,
    ) -> bool {
        let pinned = |name: &ModelName| self.pinned.get(name);
        let may_go =
            |name: &ModelName| pinned(name).is_none_or(|since| asker.is_some_and(|asker| asker <= *since));
        let worst = self
            .models
            .iter_mut()
            .filter(|(key, model)| model.holds == 0 && model.resident > 0 && may_go(&key.name))
            .filter_map(|(key, model)| {
                let position = model.last_evictable()?;
                let facts = ChunkFacts {
                    heat: model.heat.at(now),
                    reload: model.reload(position, back),
                    position: u32::try_from(position).unwrap_or(u32::MAX),
                    of: u32::try_from(model.chunks.len()).unwrap_or(u32::MAX),
                };
                Some((pinned(&key.name).is_some(), facts.keep_score(), position, model))
            })
            .min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let Some((_, _, position, model)) = worst else { return false };
        model.drop_chunk(position);
        self.count(reason, 1);
        true
    }

    /// Evicts all chunks of a model that aren't held, whatever version, pinned or not. Returns how many, and how many
    /// are held.
    pub(crate) fn evict(
        &mut self,
        which: impl Fn(&ModelName) -> bool,
        reason: EvictReason,
    ) -> (usize, usize) {
        let (mut evicted, mut held) = (0, 0);
        for (_, model) in self.models.iter_mut().filter(|(key, _)| which(&key.name)) {
            if model.holds > 0 {
                held += model.resident;
            } else {
                evicted += model.clear();
            }
        }
        self.count(reason, evicted);
        (evicted, held)
    }

    /// Forgets what was learned about a model of which nothing is in memory.
    pub(crate) fn forget(&mut self, name: &ModelName) {
        self.models.retain(|key, model| key.name != *name || model.holds > 0 || model.resident > 0);
        self.pinned.remove(name);
    }

    /// Pins a model; `last` is the job accepted last.
    pub(crate) fn pin(&mut self, name: &ModelName, last: JobId) {
        self.pinned.entry(name.clone()).or_insert(last);
    }

    pub(crate) fn unpin(&mut self, name: &ModelName) {
        self.pinned.remove(name);
    }

    pub(crate) fn set_aside(&mut self, slots: usize) {
        self.ring_slots += slots;
    }

    pub(crate) fn give_back(&mut self, slots: usize) {
        self.ring_slots -= slots;
    }

    pub(crate) fn count(&mut self, reason: EvictReason, chunks: usize) {
        if chunks > 0 {
            self.evictions.count(reason, chunks as u64);
            metrics::counter!("stoker_store_evictions_total", "reason" => reason.name())
                .increment(chunks as u64);
        }
    }

    pub(crate) fn residency(&self) -> Vec<Residency> {
        let mut all: Vec<_> = self
            .models
            .iter()
            .filter(|(_, model)| model.resident > 0 || model.holds > 0)
            .map(|(key, model)| model.residency(key, self.pinned.contains_key(&key.name)))
            .collect();
        all.sort_by(|a, b| a.model.cmp(&b.model));
        all
    }
}

// === impl Model ===

impl Model {
    fn new(files: CheckpointFiles) -> Self {
        let chunks = files.order().len();
        let vouched = files.to_hash().next().is_none();
        Self {
            sums: files.order().iter().map(|chunk| files.sum(*chunk)).collect(),
            vouched,
            chunks: vec![None; chunks],
            resident: 0,
            end: 0,
            holds: 0,
            heat: Heat::default(),
            load: None,
            copy: Weak::new(),
            files,
        }
    }

    /// Takes over sums that are known by now. A chunk in memory that contradicts them goes, unless it is held. Returns
    /// how many went.
    fn learn_from(&mut self, files: &CheckpointFiles) -> usize {
        let mut contradicted = 0;
        for (position, chunk) in files.order().iter().enumerate() {
            let Some(given) = files.sum(*chunk) else { continue };
            let known = self.sums[position].replace(given);
            if known.is_some_and(|known| known != given) && self.holds == 0 && self.chunks[position].is_some()
            {
                self.drop_chunk(position);
                contradicted += 1;
            }
        }
        self.files = files.clone();
        if files.to_hash().next().is_none() {
            self.vouch();
        }
        contradicted
    }

    /// The copy on SSD that grows while it is loaded.
    pub(crate) fn copied_to(&mut self, copy: &Arc<SsdCopy>) {
        self.copy = Arc::downgrade(copy);
    }

    /// Time to bring a chunk back, from the fastest tier that has it.
    fn reload(&self, position: usize, back: WayBack<'_>) -> Duration {
        let chunk = self.files.order()[position];
        let origin = self.files.file_of(chunk).origin.as_ref();
        let here = match origin {
            None => true,
            Some(origin) => {
                // What it was when it was indexed, unless it has landed or left since.
                let whole = back.ssd.and_then(|ssd| ssd.has(&self.files.key().name));
                whole.unwrap_or(!origin.header_only)
                    || self.copy.upgrade().is_some_and(|copy| !copy.ended() && copy.sum(chunk).is_some())
            }
        };
        let host = origin.map(|origin| host_of(&origin.object.url));
        let from = if here { Tier::Ssd } else { Tier::Remote };
        back.meters.rates(host).reload(from, ByteSize(self.files.chunk_bytes()))
    }

    pub(crate) fn touch(&mut self, now: Duration) {
        self.heat.touch(now);
    }

    pub(crate) fn hold(&mut self) {
        self.holds += 1;
    }

    /// Returns whether it was the last.
    pub(crate) fn release(&mut self) -> bool {
        self.holds -= 1;
        self.holds == 0
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.resident == self.chunks.len()
    }

    pub(crate) fn chunk(&self, position: usize) -> Option<&Chunk> {
        self.chunks[position].as_ref()
    }

    pub(crate) fn sum(&self, position: usize) -> Option<ChunkSum> {
        self.sums[position]
    }

    /// Places of the chunks that aren't in memory.
    pub(crate) fn missing(&self) -> impl Iterator<Item = usize> {
        self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.is_none()).map(|(position, _)| position)
    }

    /// Takes a chunk in that has been read and checked.
    pub(crate) fn insert(&mut self, position: usize, chunk: Chunk, sum: ChunkSum) {
        self.place(position, chunk, sum);
        if self.vouched {
            self.record(position);
        }
    }

    /// Takes a chunk in as it is: what it holds has been written down already, or is not to be yet.
    pub(crate) fn place(&mut self, position: usize, chunk: Chunk, sum: ChunkSum) {
        self.sums[position] = Some(sum);
        if self.chunks[position].replace(chunk).is_none() {
            self.resident += 1;
        }
        self.end = self.end.max(position + 1);
    }

    /// Writes down what a chunk in memory holds, for whoever takes the pool over.
    fn record(&self, position: usize) {
        let (Some(chunk), Some(sum)) = (&self.chunks[position], self.sums[position]) else { return };
        let at = self.files.order()[position];
        chunk.record(&Record {
            model: self.files.key().name.clone(),
            version: version_of(self.files.file_of(at), self.files.chunk_bytes()),
            chunk: at.index,
            len: chunk.len(),
            sum,
        });
    }

    pub(crate) fn learn(&mut self, position: usize, sum: ChunkSum) {
        self.sums[position].get_or_insert(sum);
    }

    pub(crate) fn drop_chunk(&mut self, position: usize) {
        if self.chunks[position].take().is_some() {
            self.resident -= 1;
        }
        while self.end > 0 && self.chunks[self.end - 1].is_none() {
            self.end -= 1;
        }
    }

    /// Whether no hash of a whole file is left to be checked.
    pub(crate) fn is_vouched(&self) -> bool {
        self.vouched
    }

    /// Every hash was right.
    pub(crate) fn vouch(&mut self) {
        if !std::mem::replace(&mut self.vouched, true) {
            (0..self.end).for_each(|position| self.record(position));
        }
    }

    /// Forgets what was learned and never vouched for.
    pub(crate) fn unlearn(&mut self) {
        if !self.vouched {
            self.sums = self.files.order().iter().map(|chunk| self.files.sum(*chunk)).collect();
        }
    }

    /// What is in memory, by place.
    pub(crate) fn chunks(&self) -> Vec<Option<Chunk>> {
        self.chunks.clone()
    }

    /// Every sum, by place, if all are known.
    pub(crate) fn all_sums(&self) -> Option<Vec<ChunkSum>> {
        self.sums.iter().copied().collect()
    }

    /// Slots by place. Those of chunks that aren't in memory are left out.
    pub(crate) fn slots(&self) -> impl Iterator<Item = u32> {
        self.chunks.iter().flatten().map(Chunk::slot)
    }

    /// Bytes in memory.
    pub(crate) fn resident_bytes(&self) -> ByteSize {
        self.bytes_of(|(_, chunk)| chunk.is_some())
    }

    /// Chunks in memory without a gap, from place `from` on.
    pub(crate) fn prefix_from(&self, from: usize) -> usize {
        from + self.chunks[from..].iter().take_while(|chunk| chunk.is_some()).count()
    }

    fn bytes_of(&self, wanted: impl Fn((usize, &Option<Chunk>)) -> bool) -> ByteSize {
        let order = self.files.order();
        let lens = self.chunks.iter().enumerate().filter(|(i, chunk)| wanted((*i, chunk)));
        ByteSize(lens.map(|(i, _)| self.files.chunk_len(order[i])).sum())
    }

    fn last_evictable(&self) -> Option<usize> {
        // A chunk that a stream's consumer shares would free nothing.
        self.chunks[..self.end]
            .iter()
            .rposition(|chunk| chunk.as_ref().is_some_and(|chunk| !chunk.is_shared()))
    }

    fn clear(&mut self) -> usize {
        let cleared = self.resident;
        self.chunks.fill(None);
        (self.resident, self.end) = (0, 0);
        cleared
    }

    fn residency(&self, key: &ModelKey, pinned: bool) -> Residency {
        let prefix = self.prefix_from(0);
        Residency {
            model: key.name.clone(),
            prefix: self.bytes_of(|(i, _)| i < prefix),
            resident: self.resident_bytes(),
            total: self.files.bytes(),
            slots: ByteSize(self.resident as u64 * self.files.chunk_bytes()),
            holds: self.holds,
            pinned,
            loading: self.load.is_some(),
        }
    }
}
