//! What the controller needs of others.

use async_trait::async_trait;
use stoker_types::{
    InstanceId, ModelFacts, ModelName, NodeEvent, NodeSnapshot, StartFailure, StartOrder, Started,
    StopFailure, StopMode,
};
use tokio::sync::broadcast;

/// A server's agent, which carries orders out.
#[async_trait]
pub trait NodeApi: Send + Sync + 'static {
    /// Starts an instance; returns when it is ready to take streams. Always ends, also when the worker dies.
    async fn start(&self, order: StartOrder) -> Result<Started, StartFailure>;

    /// Stops an instance; returns when its memory is free again, or at once when it stays.
    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<(), StopFailure>;

    /// The node's state now, its budgets reconciled with what its machine has.
    async fn snapshot(&self) -> NodeSnapshot;

    /// What it says by itself from now on. A receiver that fell behind asks for a [`NodeApi::snapshot`].
    fn events(&self) -> broadcast::Receiver<NodeEvent>;
}

/// The models that can run here. Called on request paths: must not block.
pub trait Facts: Send + Sync + 'static {
    /// One of them; `None` when there is no such model.
    fn facts(&self, model: &ModelName) -> Option<ModelFacts>;

    /// Models to bring to the device at start, the most wanted first.
    fn preloaded(&self) -> Vec<ModelName>;
}
