//! Instances, and what each holds: an instance is known for exactly as long as somebody holds its [`Tenancy`].

use std::{collections::HashMap, sync::Arc};

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
            return Err(StartFailure::StaleOrder { given: order.generation, seen: state.seen });
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
        };
        state.instances.insert(order.instance, instance);
        Ok(Arc::new(Tenancy {
            instance: order.instance,
            model: order.model.clone(),
            cancel,
            instances: self.clone(),
        }))
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

// === impl Tenancy ===

impl Drop for Tenancy {
    fn drop(&mut self) {
        if let Some(instance) = self.instances.0.lock().instances.remove(&self.instance) {
            instance.gone.cancel();
        }
    }
}
