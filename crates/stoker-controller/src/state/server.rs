//! One server, as the controller knows it.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use stoker_scheduler::{
    estimate::Estimator,
    placement::NodeKey,
    residency::{Budgets, ModelKey, Place},
};
use stoker_types::{
    ByteSize, DeviceId, DeviceMemoryState, Generation, MemoryBudget, ModelName, NodeMemory, NodeSnapshot,
};

use crate::config::{Config, DeviceConfig, ServerConfig};

/// A server. See the module's documentation.
pub(crate) struct Server {
    /// What people call it; empty when there is only this one.
    pub(crate) name: String,
    devices_configured: Vec<DeviceConfig>,
    /// Its memory, as of the last snapshot.
    pub(crate) memory: NodeMemory,
    /// Its devices, as of the last snapshot that had as many as were configured.
    pub(crate) devices: Vec<DeviceMemoryState>,
    /// Where instances may be, with what is in force now.
    pub(crate) places: Vec<Place>,
    /// Bytes of each model that are in its DRAM, as of the last snapshot.
    pub(crate) residency: HashMap<ModelName, ByteSize>,
    pub(crate) estimator: Estimator,
    generation_next: u64,
    /// New instances may go there.
    pub(crate) open: bool,
    /// Models that wait for a start there.
    pub(crate) assigned: BTreeSet<ModelKey>,
}

// === impl Server ===

impl Server {
    pub(crate) fn new(config: ServerConfig, of: &Config) -> Self {
        let ServerConfig { name, budgets, devices } = config;
        let places = match &devices[..] {
            [] => vec![Place::Pool(budgets)],
            devices => devices
                .iter()
                .map(|d| Place::Device { memory: d.memory, work: d.work, slots: d.slots })
                .collect(),
        };
        Self {
            name,
            memory: NodeMemory::whole(budgets.dram, budgets.kv),
            devices_configured: devices,
            devices: Vec::new(),
            places,
            residency: HashMap::new(),
            estimator: Estimator::new(of.priors),
            generation_next: 1,
            open: true,
            assigned: BTreeSet::new(),
        }
    }

    /// Takes over what the node says. True when there is room that wasn't there; `None` when there is as much as before.
    pub(crate) fn observe(&mut self, snapshot: &NodeSnapshot) -> Option<bool> {
        self.residency = snapshot.residency.iter().cloned().collect();
        self.memory = snapshot.memory.clone();
        if snapshot.devices.len() == self.devices_configured.len() {
            self.devices.clone_from(&snapshot.devices);
        }
        let after = self.places_with(|budget| budget.effective);
        let before = std::mem::replace(&mut self.places, after);
        (self.places != before)
            .then(|| before.iter().zip(&self.places).any(|(before, after)| has_grown(before, after)))
    }

    /// Where instances may be, with the configured budgets or those in force.
    pub(crate) fn places_with(&self, of: fn(&MemoryBudget) -> ByteSize) -> Vec<Place> {
        let place = |(place, at): (&Place, usize)| match *place {
            Place::Pool(Budgets { slots, .. }) => {
                let NodeMemory { dram, kv, .. } = &self.memory;
                Place::Pool(Budgets { dram: of(dram), kv: of(kv), slots })
            }
            Place::Device { memory, work, slots } => {
                let memory = self.devices.get(at).map_or(memory, |device| of(&device.budget));
                Place::Device { memory, work, slots }
            }
        };
        self.places.iter().zip(0..).map(place).collect()
    }

    /// Whether instances are on devices, and not in its memory.
    pub(crate) fn has_devices(&self) -> bool {
        !self.devices_configured.is_empty()
    }

    /// What one of its devices is called: `cuda:0`, `gpu-7/cuda:0`, `cpu`.
    pub(crate) fn device_name(&self, device: DeviceId) -> String {
        let configured = self.devices_configured.get(device.0 as usize);
        let device = configured.map_or("cpu", |device| &device.name);
        if self.name.is_empty() { device.to_owned() } else { format!("{}/{device}", self.name) }
    }

    /// The device that has a model's weights, for nobody.
    pub(crate) fn there(&self, model: &ModelName, is_used: impl Fn(DeviceId) -> bool) -> Option<DeviceId> {
        let devices = (0..).map(DeviceId).zip(&self.devices);
        let mut here = devices.filter(|(_, device)| device.resident.contains(model));
        here.find(|(id, _)| !is_used(*id)).map(|(id, _)| id)
    }

    /// A generation later than all before.
    pub(crate) fn next_generation(&mut self) -> Generation {
        let generation = Generation(self.generation_next);
        self.generation_next += 1;
        generation
    }

    /// The node has obeyed orders that this controller doesn't know of.
    pub(crate) fn has_seen(&mut self, seen: Generation) {
        self.generation_next = self.generation_next.max(seen.0.saturating_add(1));
    }

    pub(crate) fn shortage(&self, detail: &str) -> Option<String> {
        match &self.devices[..] {
            [] => self.memory.shortage(),
            devices => {
                let each: Vec<String> = devices.iter().filter_map(DeviceMemoryState::shortage).collect();
                (!each.is_empty()).then(|| format!("{detail}; {}", each.join("; ")))
            }
        }
    }
}

fn has_grown(before: &Place, after: &Place) -> bool {
    match (before, after) {
        (Place::Pool(before), Place::Pool(after)) => after.dram > before.dram || after.kv > before.kv,
        (Place::Device { memory: before, .. }, Place::Device { memory: after, .. }) => after > before,
        (Place::Pool(_), Place::Device { .. }) | (Place::Device { .. }, Place::Pool(_)) => true,
    }
}

/// A server's key, as long as nothing needs a place in a list of them.
pub(crate) const FIRST: NodeKey = NodeKey(0);

/// When the controller looks at a server again by itself.
pub(crate) fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    [one, other].into_iter().flatten().min()
}
