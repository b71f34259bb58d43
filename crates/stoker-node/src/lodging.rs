//! Instances, and what each holds: an instance is known for exactly as long as somebody holds its [`Tenancy`].

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use stoker_types::{ByteSize, DeviceId, Generation, InstanceId, ModelName, StartFailure, StartOrder};
use tokio_util::sync::CancellationToken;

use crate::worker::WorkerHandle;

/// All instances of the node. A cheap handle.
#[derive(Clone, Default)]
pub(crate) struct Instances(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// The newest generation that was obeyed.
    seen: Generation,
    instances: HashMap<InstanceId, Instance>,
    closed: bool,
}

/// One instance, as those see it who don't hold it.
#[derive(Clone)]
pub(crate) struct Instance {
    /// Cancelled: it is to go, whatever it is doing.
    pub(crate) cancel: CancellationToken,
    /// Cancelled: nothing of it is left.
    pub(crate) gone: CancellationToken,
    /// Who serves it; `None` while it starts.
    pub(crate) worker: Option<WorkerHandle>,
    device: DeviceId,
    /// KV cache that it may fill.
    kv_bytes: ByteSize,
    /// Where that is: in the worker's own memory, or on its device.
    kv_in_memory: bool,
    /// It was started by order of a node before this one, and nobody has asked for it since.
    left: Option<LeftInstance>,
}

/// What an order must be like that goes on with an instance which was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeftInstance {
    pub(crate) generation: Generation,
    pub(crate) model: ModelName,
    /// A hash of its manifest.
    pub(crate) index: Bytes,
    pub(crate) context: u32,
    pub(crate) sequences_max: u32,
}

/// The right to exist as an instance. The start holds it, then the worker's task. When the last clone drops, the
/// instance is gone.
pub(crate) struct Tenancy {
    pub(crate) instance: InstanceId,
    pub(crate) model: ModelName,
    pub(crate) cancel: CancellationToken,
    instances: Instances,
}

// === impl Instances ===

impl Instances {
    /// Takes an order in. `kv_in_memory`: its KV cache will be in its worker's own memory.
    pub(crate) fn begin(&self, order: &StartOrder, kv_in_memory: bool) -> Result<Arc<Tenancy>, StartFailure> {
        let mut state = self.0.lock();
        if state.closed {
            return Err(StartFailure::Cancelled { model: order.model.clone() });
        }
        if order.generation <= state.seen || state.instances.contains_key(&order.instance) {
            // No number behind this one is an instance's that was left.
            let last = state.instances.keys().max().map_or(0, |id| id.0);
            let seen = match state.instances.contains_key(&order.instance) {
                true => state.seen.max(Generation(last)),
                false => state.seen,
            };
            return Err(StartFailure::StaleOrder { given: order.generation, seen });
        }
        state.seen = order.generation;
        let cancel = CancellationToken::new();
        let instance = Instance {
            cancel: cancel.clone(),
            gone: CancellationToken::new(),
            worker: None,
            device: order.device,
            kv_bytes: order.kv_bytes,
            kv_in_memory,
            left: None,
        };
        state.instances.insert(order.instance, instance);
        Ok(Arc::new(Tenancy {
            instance: order.instance,
            model: order.model.clone(),
            cancel,
            instances: self.clone(),
        }))
    }

    /// Takes in what a worker serves that a node before this one has ordered; `usable`: to be gone on with. When there is such
    /// an instance already, it gets a number that nobody orders.
    pub(crate) fn take_over(
        &self,
        instance: InstanceId,
        device: DeviceId,
        (kv_bytes, kv_in_memory): (ByteSize, bool),
        left: LeftInstance,
        usable: bool,
    ) -> Arc<Tenancy> {
        let mut state = self.0.lock();
        state.seen = state.seen.max(left.generation);
        let taken = |id: &InstanceId| state.instances.contains_key(id);
        let otherwise = || (0..u64::MAX).rev().map(InstanceId).find(|id| !taken(id));
        let id = if taken(&instance) { otherwise().unwrap_or(instance) } else { instance };
        let (cancel, model) = (CancellationToken::new(), left.model.clone());
        let gone = CancellationToken::new();
        let left = (usable && id == instance).then_some(left);
        let of =
            Instance { cancel: cancel.clone(), gone, worker: None, device, kv_bytes, kv_in_memory, left };
        state.instances.insert(id, of);
        Arc::new(Tenancy { instance: id, model, cancel, instances: self.clone() })
    }

    /// The instance that an order repeats: it was left, and the order gave it. From here on it isn't left any more.
    pub(crate) fn repeated(&self, order: &StartOrder) -> Option<Instance> {
        let mut state = self.0.lock();
        let instance = state.instances.get_mut(&order.instance)?;
        instance.left.as_ref().filter(|left| {
            left.generation == order.generation && left.is_as(order) && instance.is_on(order)
        })?;
        instance.left = None;
        Some(instance.clone())
    }

    /// An instance that was left and is as the order wants one. It is nobody else's from here on.
    pub(crate) fn claim(&self, order: &StartOrder, index: &Bytes) -> Option<(InstanceId, WorkerHandle)> {
        let mut state = self.0.lock();
        let is_it = |instance: &Instance| {
            let left = instance.left.as_ref();
            left.is_some_and(|left| left.index == *index && left.is_as(order)) && instance.is_on(order)
        };
        let (id, instance) = state.instances.iter_mut().find(|(_, instance)| is_it(instance))?;
        instance.left = None;
        Some((*id, instance.worker.clone()?))
    }

    /// Instances that were left, and nobody has asked for: by device.
    pub(crate) fn left(&self, device: Option<DeviceId>) -> Vec<InstanceId> {
        let state = self.0.lock();
        let is_there = |instance: &Instance| device.is_none_or(|device| instance.device == device);
        let left = state.instances.iter().filter(|(_, i)| i.left.is_some() && is_there(i));
        let mut left: Vec<_> = left.map(|(id, _)| *id).collect();
        left.sort();
        left
    }

    fn is_left(&self, instance: InstanceId) -> bool {
        self.0.lock().instances.get(&instance).is_some_and(|instance| instance.left.is_some())
    }

    /// Who serves it from now on.
    pub(crate) fn serving(&self, instance: InstanceId, worker: WorkerHandle) {
        if let Some(instance) = self.0.lock().instances.get_mut(&instance) {
            instance.worker = Some(worker);
        }
    }

    pub(crate) fn get(&self, instance: InstanceId) -> Option<Instance> {
        self.0.lock().instances.get(&instance).cloned()
    }

    /// Each instance's KV cache in memory, and the process that fills it, if there is one yet.
    pub(crate) fn kv_caches(&self) -> Vec<(Option<u32>, ByteSize)> {
        let of = |instance: &Instance| (instance.worker.as_ref().map(|w| w.pid), instance.kv_bytes);
        self.0.lock().instances.values().filter(|i| i.kv_in_memory).map(of).collect()
    }

    /// KV cache and work memory that a device's instances take, `work` each.
    pub(crate) fn beside_weights(&self, device: DeviceId, work: ByteSize) -> ByteSize {
        let state = self.0.lock();
        state.instances.values().filter(|i| i.device == device).map(|i| i.kv_bytes + work).sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().instances.len()
    }

    /// Takes no new ones and tells those that are starting to stop.
    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        for instance in state.instances.values().filter(|i| i.worker.is_none()) {
            instance.cancel.cancel();
        }
    }
}

// === impl Instance, LeftInstance ===

impl Instance {
    fn is_on(&self, order: &StartOrder) -> bool {
        (self.device, self.kv_bytes) == (order.device, order.kv_bytes)
    }
}

impl LeftInstance {
    fn is_as(&self, order: &StartOrder) -> bool {
        let StartOrder { model, context, sequences_max, .. } = order;
        (&self.model, self.context, self.sequences_max) == (model, *context, *sequences_max)
    }
}

// === impl Tenancy ===

impl Tenancy {
    /// Whether nobody of this node has asked for it.
    pub(crate) fn is_left(&self) -> bool {
        self.instances.is_left(self.instance)
    }
}

impl Drop for Tenancy {
    fn drop(&mut self) {
        if let Some(instance) = self.instances.0.lock().instances.remove(&self.instance) {
            instance.gone.cancel();
        }
    }
}
