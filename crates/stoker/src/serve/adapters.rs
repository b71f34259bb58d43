//! The roles' traits, each on its neighbour in this process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use metrics_exporter_prometheus::PrometheusHandle;
use stoker_controller::{ControllerHandle, NodeApi};
use stoker_gateway::{Placement, Seat, Status};
use stoker_node::Node;
use stoker_types::{
    Admit, InstanceId, ModelName, NodeEvent, NodeSnapshot, Refusal, StartFailure, StartOrder, Started,
    StopFailure, StopMode,
};
use tokio::sync::broadcast;

/// The controller's node.
pub(crate) struct NodeOfThisProcess(pub(crate) Node);

/// The gateway's source of seats.
pub(crate) struct LocalPlacement(pub(crate) ControllerHandle);

/// What the gateway says of this process.
pub(crate) struct ProcessStatus {
    metrics: PrometheusHandle,
    node: Node,
    warm: Arc<AtomicBool>,
}

#[async_trait]
impl NodeApi for NodeOfThisProcess {
    async fn start(&self, order: StartOrder) -> Result<Started, StartFailure> {
        self.0.start(order).await
    }

    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<(), StopFailure> {
        self.0.stop(instance, mode).await
    }

    async fn snapshot(&self) -> NodeSnapshot {
        self.0.look().await
    }

    fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.0.events()
    }
}

#[async_trait]
impl Placement for LocalPlacement {
    async fn admit(&self, admit: Admit) -> Result<Seat, Refusal> {
        let seat = self.0.admit(admit).await?;
        Ok(Seat { info: seat.info, permit: Box::new(seat.permit) })
    }

    fn expect(&self, model: &ModelName) {
        self.0.expect(model);
    }

    fn observe_prefill(&self, model: &ModelName, tokens: u32, time: Duration) {
        self.0.observe_prefill(model, tokens, time);
    }
}

// === impl ProcessStatus ===

impl ProcessStatus {
    /// Ready once the first worker is warm.
    pub(crate) fn watch(metrics: PrometheusHandle, node: Node) -> Self {
        let warm = Arc::new(AtomicBool::new(false));
        let (seen, waiting) = (Arc::clone(&warm), node.clone());
        tokio::spawn(async move {
            match waiting.ready().await {
                Ok(()) => seen.store(true, Ordering::Release),
                Err(why) => tracing::error!(why, "no worker can be started"),
            }
        });
        Self { metrics, node, warm }
    }
}

impl Status for ProcessStatus {
    fn metrics(&self) -> String {
        // Taking the snapshot sets the node's gauges.
        drop(self.node.snapshot());
        self.metrics.render()
    }

    fn ready(&self) -> Result<(), String> {
        if self.warm.load(Ordering::Acquire) { Ok(()) } else { Err("no worker is warm yet".into()) }
    }
}
