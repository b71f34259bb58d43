//! What the scheduler knows of a cluster: nodes, devices, which weights are where, instances. Kept up to date by deltas;
//! a decision reads it and copies nothing.

use std::{collections::BTreeMap, time::Duration};

use ahash::AHashMap;
use stoker_types::{ByteSize, BytesPerSec, DeviceId, InstanceId};

use super::terms::{Micros, micros, transfer};
use crate::residency::{ModelKey, Rules};

/// A server, as a small number that the caller chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct NodeKey(pub u32);

/// Some devices of one node, as a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct DeviceSet(u16);

/// A device, as it is when nothing is on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceSpec {
    /// Bytes for instances: their weights, KV caches and work memory together.
    pub memory: ByteSize,
    /// Instances that it may have at the same time.
    pub slots: u32,
    /// Rate of its link from host memory.
    pub link: BytesPerSec,
}

/// A server.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSpec {
    /// Its devices, at most [`DeviceSet::MAX`].
    pub devices: Vec<DeviceSpec>,
    /// Measured rates of its other tiers.
    pub rates: NodeRates,
    /// How long its devices take to compute, relative to what a [`ModelSpec`] says: 2.0 is half as fast.
    pub slowness: f64,
}

/// Measured rates of the tiers that are a server's own and not a device's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeRates {
    /// From a remote store, or another server.
    pub remote: BytesPerSec,
    /// From its SSD.
    pub ssd: BytesPerSec,
}

/// A model, as far as placing it goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelSpec {
    /// All of its weights.
    pub weight_bytes: ByteSize,
    /// Devices that one instance is split over; each gets an equal share.
    pub devices: u32,
    /// What one instance takes of each of its devices: its share of the weights, KV cache and work memory.
    pub device_bytes: ByteSize,
    /// A worker's work for a new model, beyond its weights.
    pub init: Duration,
    /// Work that is left when the last byte has arrived.
    pub last_layer: Duration,
    /// Time to compute one token of a prompt: `a` of the resume estimate.
    pub per_token: Duration,
    /// Time to resume whatever the length: `b` of the resume estimate.
    pub resume_fixed: Duration,
    /// Prefill runs under the copy; else after it.
    pub overlaps: bool,
}

/// What of a model's weights one node has, beside what instances have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residency {
    /// Bytes in its DRAM, from the front.
    pub dram: ByteSize,
    /// Bytes on its SSD, from the front; those in DRAM included.
    pub ssd: ByteSize,
    /// Devices that have all of their shares, used by no instance. They give way to anybody, so they count as free.
    pub devices: DeviceSet,
}

/// An instance, from the decision to start it until its memory is free.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InstanceSpec {
    /// Of which model.
    pub model: ModelKey,
    /// On which server.
    pub node: NodeKey,
    /// On which of its devices.
    pub devices: DeviceSet,
    /// What it takes of each.
    pub device_bytes: ByteSize,
    /// What it is doing.
    pub activity: Activity,
    /// It makes room for nobody before this.
    pub resident_until: Duration,
    /// How long its start took.
    pub load_time: Duration,
    /// Uses of its model, decayed, as of `used_at`.
    pub uses: f64,
    /// When it was last used.
    pub used_at: Duration,
    /// Makes room for nobody.
    pub pinned: bool,
    /// Its streams can be taken elsewhere.
    pub movable: bool,
    /// Its model's priority, -100 to 100.
    pub priority: i32,
}

/// What an instance is doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activity {
    /// Its weights are on their way. Makes room for nobody.
    Starting,
    /// Ready and unused.
    Idle,
    /// Streams are running.
    Busy {
        /// How many.
        sequences: u32,
        /// Their prompts and what they have generated so far, in tokens.
        tokens: u64,
        /// When they are expected to end if nobody new comes; `None`: nobody knows.
        ends: Option<Duration>,
    },
    /// On its way out; its memory is not free yet, and can't be freed once more.
    Leaving,
}

/// A delta that can't be right. The cluster is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// No such node: it must be added first.
    #[error("node {0:?} is not known: add it before what is on it")]
    NoNode(NodeKey),
    /// No such model.
    #[error("model {0:?} is not known: add it before its instances and residency")]
    NoModel(ModelKey),
    /// No such instance.
    #[error("instance {0} is not known")]
    NoInstance(InstanceId),
    /// An instance of this number is there already.
    #[error("instance {0} is there already: numbers are never used again")]
    Twice(InstanceId),
    /// A device that the node doesn't have, no device at all, or more than a set can hold.
    #[error("node {node:?} has {has} devices, and {asked:?} are not among them")]
    NoDevice {
        /// Which node.
        node: NodeKey,
        /// How many devices it has.
        has: usize,
        /// What was asked for.
        asked: DeviceSet,
    },
    /// More than [`DeviceSet::MAX`] devices.
    #[error("{0} devices are more than the {max} that one node may have", max = DeviceSet::MAX)]
    TooManyDevices(usize),
    /// The instances of a device would take more than it has.
    #[error(
        "device {device} of node {node:?} has {free} bytes and {slots} slots free, which instance {instance} exceeds"
    )]
    Overcommitted {
        /// Which node.
        node: NodeKey,
        /// Which of its devices.
        device: DeviceId,
        /// Bytes free there.
        free: ByteSize,
        /// Slots free there.
        slots: u32,
        /// Who asked for more.
        instance: InstanceId,
    },
}

/// The cluster. See the module's documentation.
#[derive(Debug, Clone)]
pub struct Cluster {
    pub(super) nodes: BTreeMap<NodeKey, usize>,
    /// Dense, so that a decision's pass over all servers stays in cache. A removed node's place is used again.
    pub(super) states: Vec<NodeState>,
    vacant: Vec<usize>,
    /// Of the servers that are open, microseconds for a byte: no server without a model's weights has them sooner.
    fastest_remote: f64,
    pub(super) models: AHashMap<ModelKey, ModelState>,
    /// Positions in `specs`.
    instances: AHashMap<InstanceId, u32>,
    /// Side by side, because a decision looks at many. A removed instance's place is used again.
    specs: Vec<InstanceSpec>,
    vacant_specs: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(super) struct NodeState {
    pub(super) key: NodeKey,
    /// New instances may go there.
    pub(super) open: bool,
    pub(super) devices: Vec<DeviceState>,
    pub(super) remote: Link,
    pub(super) ssd: Link,
    pub(super) slowness: f64,
}

#[derive(Debug, Clone)]
pub(super) struct DeviceState {
    pub(super) spec: DeviceSpec,
    /// What its instances take.
    used: u64,
    /// What they leave; nothing when it has less than they take.
    pub(super) free: u64,
    pub(super) slots: u32,
    pub(super) link: Link,
    /// In ascending order, with their positions in the cluster's list.
    pub(super) instances: Vec<(InstanceId, u32)>,
}

/// A way that bytes take, and until when loads that were ordered before have it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Link {
    /// Microseconds for a byte.
    per_byte: f64,
    pub(super) busy_until: Micros,
}

#[derive(Debug, Clone)]
pub(super) struct ModelState {
    pub(super) spec: ModelSpec,
    /// Who has any of it: positions in [`Cluster::states`], ascending.
    pub(super) holders: Vec<(usize, Residency)>,
}

// === impl DeviceSet ===

impl DeviceSet {
    /// Most devices of a node.
    pub const MAX: usize = 16;

    /// None.
    pub const EMPTY: Self = Self(0);

    /// One device.
    ///
    /// # Panics
    /// When its number is [`Self::MAX`] or more.
    #[must_use]
    pub fn one(device: DeviceId) -> Self {
        assert!((device.0 as usize) < Self::MAX, "device {device} in a set of {}", Self::MAX);
        Self(1 << device.0)
    }

    /// These, and one more.
    #[must_use]
    pub fn with(self, device: DeviceId) -> Self {
        Self(self.0 | Self::one(device).0)
    }

    /// In both.
    #[must_use]
    pub const fn shared(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// How many.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Is it none?
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Is it one of them?
    #[must_use]
    pub const fn contains(self, device: DeviceId) -> bool {
        device.0 < 16 && self.0 & (1 << device.0) != 0
    }

    /// In ascending order.
    pub fn iter(self) -> impl Iterator<Item = DeviceId> {
        (0..16).map(DeviceId).filter(move |device| self.contains(*device))
    }

    /// All sets of `size` among the first `of` devices, in ascending order of their bits.
    pub(super) fn all(of: usize, size: u32) -> impl Iterator<Item = Self> {
        let end = 1u32 << of.min(Self::MAX);
        let mut next = (size > 0 && size as usize <= of).then(|| (1u32 << size) - 1);
        std::iter::from_fn(move || {
            let bits = next.filter(|bits| *bits < end)?;
            // Gosper's hack: the next larger number with as many bits.
            let lowest = bits & bits.wrapping_neg();
            let ripple = bits + lowest;
            next = Some(ripple | (((bits ^ ripple) >> 2) / lowest));
            u16::try_from(bits).ok().map(Self)
        })
    }
}

impl FromIterator<DeviceId> for DeviceSet {
    fn from_iter<I: IntoIterator<Item = DeviceId>>(devices: I) -> Self {
        devices.into_iter().fold(Self::EMPTY, Self::with)
    }
}

// === impl ModelSpec ===

impl ModelSpec {
    /// Bytes that cross the link of each of its devices.
    pub(super) fn share(&self) -> u64 {
        self.weight_bytes.bytes().div_ceil(u64::from(self.devices.max(1)))
    }
}

// === impl InstanceSpec ===

impl InstanceSpec {
    /// What is lost when it goes: the start that whoever wants it next has to wait for, times how likely it is that
    /// somebody soon does.
    pub(super) fn regret(&self, rules: &Rules, now: Duration) -> Micros {
        let uses = rules.decayed(self.uses.max(0.0), now.saturating_sub(self.used_at));
        let wanted = (0.05 + uses).min(1.0);
        let weight = f64::exp2(f64::from(self.priority.clamp(-100, 100)) / 10.0);
        transfer(micros(self.load_time).max(1), wanted * weight)
    }
}

// === impl Link ===

impl Link {
    fn new(rate: BytesPerSec) -> Self {
        Self { per_byte: per_byte(rate), busy_until: 0 }
    }

    /// How long `bytes` take.
    pub(super) fn time(&self, bytes: u64) -> Micros {
        if bytes == 0 { 0 } else { transfer(bytes, self.per_byte) }
    }

    /// From `now` until loads ahead are through.
    pub(super) const fn queue(&self, now: Micros) -> Micros {
        self.busy_until.saturating_sub(now)
    }
}

fn per_byte(rate: BytesPerSec) -> f64 {
    if rate.0 > 0.0 { 1e6 / rate.0 } else { f64::INFINITY }
}

// === impl DeviceState ===

impl DeviceState {
    fn count_free(&mut self) {
        let instances = u32::try_from(self.instances.len()).unwrap_or(u32::MAX);
        self.free = self.spec.memory.bytes().saturating_sub(self.used);
        self.slots = self.spec.slots.saturating_sub(instances);
    }
}

// === impl ModelState ===

impl ModelState {
    /// What a server has of it, by position.
    pub(super) fn held(&self, at: usize) -> Residency {
        self.holders
            .binary_search_by_key(&at, |(at, _)| *at)
            .map(|found| self.holders[found].1)
            .unwrap_or_default()
    }
}

// === impl Cluster ===

impl Default for Cluster {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            states: Vec::new(),
            vacant: Vec::new(),
            fastest_remote: f64::INFINITY,
            models: AHashMap::new(),
            instances: AHashMap::new(),
            specs: Vec::new(),
            vacant_specs: Vec::new(),
        }
    }
}

impl Cluster {
    /// Adds a server; one that was there under this key is forgotten with everything on it.
    ///
    /// # Errors
    /// [`DeltaError::TooManyDevices`].
    pub fn add_node(&mut self, key: NodeKey, spec: &NodeSpec) -> Result<(), DeltaError> {
        if spec.devices.len() > DeviceSet::MAX {
            return Err(DeltaError::TooManyDevices(spec.devices.len()));
        }
        self.remove_node(key);
        let device = |spec: &DeviceSpec| DeviceState {
            spec: *spec,
            used: 0,
            free: spec.memory.bytes(),
            slots: spec.slots,
            link: Link::new(spec.link),
            instances: Vec::new(),
        };
        let state = NodeState {
            key,
            open: true,
            devices: spec.devices.iter().map(device).collect(),
            remote: Link::new(spec.rates.remote),
            ssd: Link::new(spec.rates.ssd),
            slowness: spec.slowness,
        };
        let at = if let Some(at) = self.vacant.pop() {
            self.states[at] = state;
            at
        } else {
            self.states.push(state);
            self.states.len() - 1
        };
        self.nodes.insert(key, at);
        self.find_fastest();
        Ok(())
    }

    /// Forgets a server with its instances and what it holds. Returns the instances.
    pub fn remove_node(&mut self, key: NodeKey) -> Vec<InstanceId> {
        let Some(at) = self.nodes.remove(&key) else { return Vec::new() };
        let state = &mut self.states[at];
        state.open = false;
        let mut gone: Vec<InstanceId> =
            state.devices.drain(..).flat_map(|device| device.instances).map(|(id, _)| id).collect();
        gone.sort_unstable();
        gone.dedup();
        self.vacant.push(at);
        for id in &gone {
            self.vacant_specs.extend(self.instances.remove(id));
        }
        for model in self.models.values_mut() {
            model.holders.retain(|(holder, _)| *holder != at);
        }
        self.find_fastest();
        gone
    }

    /// Whether new instances may go to a server. What is there stays.
    ///
    /// # Errors
    /// [`DeltaError::NoNode`].
    pub fn set_open(&mut self, key: NodeKey, open: bool) -> Result<(), DeltaError> {
        self.node_mut(key)?.open = open;
        self.find_fastest();
        Ok(())
    }

    /// Newly measured rates of a server.
    ///
    /// # Errors
    /// [`DeltaError::NoNode`].
    pub fn set_rates(&mut self, key: NodeKey, rates: NodeRates) -> Result<(), DeltaError> {
        let node = self.node_mut(key)?;
        node.remote.per_byte = per_byte(rates.remote);
        node.ssd.per_byte = per_byte(rates.ssd);
        self.find_fastest();
        Ok(())
    }

    /// What a device has now. Instances that it has stay, also when they take more than that.
    ///
    /// # Errors
    /// [`DeltaError::NoNode`], [`DeltaError::NoDevice`].
    pub fn set_device(&mut self, key: NodeKey, device: DeviceId, spec: DeviceSpec) -> Result<(), DeltaError> {
        let node = self.node_mut(key)?;
        let has = node.devices.len();
        let Some(state) = node.devices.get_mut(device.0 as usize) else {
            return Err(DeltaError::NoDevice { node: key, has, asked: [device].into_iter().collect() });
        };
        state.link.per_byte = per_byte(spec.link);
        state.spec = spec;
        state.count_free();
        Ok(())
    }

    /// Until when loads that were ordered have a server's ways: from a remote store, from SSD, and to each device.
    ///
    /// # Errors
    /// [`DeltaError::NoNode`].
    pub fn set_queues(
        &mut self,
        key: NodeKey,
        remote: Duration,
        ssd: Duration,
        links: impl IntoIterator<Item = Duration>,
    ) -> Result<(), DeltaError> {
        let node = self.node_mut(key)?;
        node.remote.busy_until = micros(remote);
        node.ssd.busy_until = micros(ssd);
        for (device, until) in node.devices.iter_mut().zip(links) {
            device.link.busy_until = micros(until);
        }
        Ok(())
    }

    /// Adds a model, or says anew what it is like. Its instances and what nodes hold of it stay.
    pub fn set_model(&mut self, key: ModelKey, spec: ModelSpec) {
        let entry = self.models.entry(key);
        entry.and_modify(|m| m.spec = spec).or_insert_with(|| ModelState { spec, holders: Vec::new() });
    }

    /// What a server has of a model now.
    ///
    /// # Errors
    /// [`DeltaError::NoNode`], [`DeltaError::NoModel`].
    pub fn set_residency(
        &mut self,
        node: NodeKey,
        model: ModelKey,
        residency: Residency,
    ) -> Result<(), DeltaError> {
        let at = *self.nodes.get(&node).ok_or(DeltaError::NoNode(node))?;
        let state = self.models.get_mut(&model).ok_or(DeltaError::NoModel(model))?;
        let found = state.holders.binary_search_by_key(&at, |(at, _)| *at);
        match (found, residency == Residency::default()) {
            (Ok(found), true) => drop(state.holders.remove(found)),
            (Ok(found), false) => state.holders[found].1 = residency,
            (Err(_), true) => {}
            (Err(place), false) => state.holders.insert(place, (at, residency)),
        }
        Ok(())
    }

    /// Whether a model was added.
    #[must_use]
    pub fn knows(&self, model: ModelKey) -> bool {
        self.models.contains_key(&model)
    }

    /// What a server has of a model.
    #[must_use]
    pub fn residency(&self, node: NodeKey, model: ModelKey) -> Residency {
        let (Some(at), Some(state)) = (self.nodes.get(&node), self.models.get(&model)) else {
            return Residency::default();
        };
        state.held(*at)
    }

    /// Adds an instance and takes its memory.
    ///
    /// # Errors
    /// [`DeltaError`]: it is there already, or one of its devices has no room for it.
    pub fn add_instance(&mut self, id: InstanceId, spec: InstanceSpec) -> Result<(), DeltaError> {
        if self.instances.contains_key(&id) {
            return Err(DeltaError::Twice(id));
        }
        if !self.models.contains_key(&spec.model) {
            return Err(DeltaError::NoModel(spec.model));
        }
        let bytes = spec.device_bytes.bytes();
        let node = self.node_mut(spec.node)?;
        let has = node.devices.len();
        if spec.devices.is_empty() || spec.devices.iter().any(|device| device.0 as usize >= has) {
            return Err(DeltaError::NoDevice { node: spec.node, has, asked: spec.devices });
        }
        for device in spec.devices.iter() {
            let state = &node.devices[device.0 as usize];
            if state.free < bytes || state.slots == 0 {
                return Err(DeltaError::Overcommitted {
                    node: spec.node,
                    device,
                    free: ByteSize(state.free),
                    slots: state.slots,
                    instance: id,
                });
            }
        }
        let place = self.vacant_specs.pop().unwrap_or_else(|| {
            self.specs.push(spec);
            u32::try_from(self.specs.len() - 1).unwrap_or(u32::MAX)
        });
        self.specs[place as usize] = spec;
        self.instances.insert(id, place);
        let node = self.node_mut(spec.node)?;
        for device in spec.devices.iter() {
            let state = &mut node.devices[device.0 as usize];
            state.used += bytes;
            let at = state.instances.partition_point(|(other, _)| *other < id);
            state.instances.insert(at, (id, place));
            state.count_free();
        }
        Ok(())
    }

    /// Changes what an instance does; where it is and what it takes stay.
    ///
    /// # Errors
    /// [`DeltaError::NoInstance`].
    pub fn update_instance(
        &mut self,
        id: InstanceId,
        change: impl FnOnce(&mut InstanceSpec),
    ) -> Result<(), DeltaError> {
        let place = *self.instances.get(&id).ok_or(DeltaError::NoInstance(id))?;
        let spec = &mut self.specs[place as usize];
        let InstanceSpec { model, node, devices, device_bytes, .. } = *spec;
        change(spec);
        (spec.model, spec.node, spec.devices, spec.device_bytes) = (model, node, devices, device_bytes);
        Ok(())
    }

    /// Forgets an instance: its memory is free.
    ///
    /// # Errors
    /// [`DeltaError::NoInstance`].
    pub fn remove_instance(&mut self, id: InstanceId) -> Result<InstanceSpec, DeltaError> {
        let place = self.instances.remove(&id).ok_or(DeltaError::NoInstance(id))?;
        self.vacant_specs.push(place);
        let spec = self.specs[place as usize];
        if let Ok(node) = self.node_mut(spec.node) {
            for device in spec.devices.iter() {
                let state = &mut node.devices[device.0 as usize];
                state.used -= spec.device_bytes.bytes();
                state.instances.retain(|(other, _)| *other != id);
                state.count_free();
            }
        }
        Ok(spec)
    }

    /// One instance.
    #[must_use]
    pub fn instance(&self, id: InstanceId) -> Option<&InstanceSpec> {
        self.instances.get(&id).map(|place| self.spec(*place))
    }

    /// The instance at a position that a device names.
    pub(super) fn spec(&self, place: u32) -> &InstanceSpec {
        &self.specs[place as usize]
    }

    /// Instances, in no order.
    pub fn instances(&self) -> impl Iterator<Item = (InstanceId, &InstanceSpec)> {
        self.instances.iter().map(|(id, place)| (*id, self.spec(*place)))
    }

    /// Bytes and slots that are free on a device.
    #[must_use]
    pub fn free(&self, node: NodeKey, device: DeviceId) -> Option<(ByteSize, u32)> {
        let state = &self.states[*self.nodes.get(&node)?];
        state.devices.get(device.0 as usize).map(|device| (ByteSize(device.free), device.slots))
    }

    /// Servers, in order.
    pub fn nodes(&self) -> impl Iterator<Item = NodeKey> {
        self.nodes.keys().copied()
    }

    pub(super) fn node(&self, key: NodeKey) -> Option<&NodeState> {
        self.nodes.get(&key).map(|at| &self.states[*at])
    }

    /// The least time in which any server can have `bytes` that it doesn't hold.
    pub(super) fn fetched_at_least(&self, bytes: u64) -> Micros {
        if bytes == 0 { 0 } else { transfer(bytes, self.fastest_remote) }
    }

    fn find_fastest(&mut self) {
        let open = self.states.iter().filter(|node| node.open);
        self.fastest_remote = open.map(|node| node.remote.per_byte).fold(f64::INFINITY, f64::min);
    }

    fn node_mut(&mut self, key: NodeKey) -> Result<&mut NodeState, DeltaError> {
        let at = self.nodes.get(&key).ok_or(DeltaError::NoNode(key))?;
        Ok(&mut self.states[*at])
    }
}
