//! How long it takes to get a seat on an instance that is ready, and to give it back.
//!
//! `cargo run --release -p stoker-controller --example admit_time`

#![expect(clippy::print_stdout, reason = "prints its measurement")]

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use stoker_controller::{Budgets, Config, Facts, NodeApi, ServerConfig, spawn};
use stoker_types::{
    Admit, ByteSize, ClientId, InstanceId, ModelFacts, ModelName, ModelSettings, NodeEvent, NodeMemory,
    NodeSnapshot, RequestId, StartFailure, StartOrder, Started, StopFailure, StopMode, Timeline, WorkerId,
    clock,
};
use tokio::sync::broadcast;

struct Instant {
    events: broadcast::Sender<NodeEvent>,
}

struct Models(Vec<ModelFacts>);

#[async_trait]
impl NodeApi for Instant {
    async fn start(&self, _: StartOrder) -> Result<Started, StartFailure> {
        let socket = "/run/user/1000/stoker/worker-1.sock".into();
        Ok(Started { worker: WorkerId(1), socket, timeline: Timeline::default() })
    }

    async fn stop(&self, _: InstanceId, _: StopMode) -> Result<(), StopFailure> {
        Ok(())
    }

    async fn snapshot(&self) -> NodeSnapshot {
        NodeSnapshot {
            memory: NodeMemory::whole(ByteSize::gib(1), ByteSize::gib(4)),
            dram_used: ByteSize::ZERO,
            dram_mapped: ByteSize::ZERO,
            residency: Vec::new(),
            rates: Vec::new(),
            devices: Vec::new(),
            workers: Vec::new(),
        }
    }

    fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.events.subscribe()
    }
}

impl Facts for Models {
    fn facts(&self, model: &ModelName) -> Option<ModelFacts> {
        self.0.iter().find(|facts| facts.model == *model).cloned()
    }

    fn preloaded(&self) -> Vec<ModelName> {
        Vec::new()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ModelName::new("smollm2:135m")?;
    let facts = ModelFacts {
        model: model.clone(),
        settings: ModelSettings::default(),
        weight_bytes: ByteSize::mib(94),
        pool_bytes: ByteSize::mib(96),
        device_bytes: ByteSize::mib(96),
        kv_bytes_per_token: ByteSize::kib(45),
        context_trained: 8192,
        weights_on: stoker_types::Tier::Ssd,
    };
    let budgets = Budgets { dram: ByteSize::gib(1), kv: ByteSize::gib(4), slots: 4 };
    let node = Arc::new(Instant { events: broadcast::Sender::new(16) });
    let (handle, _owner) = spawn(Config::default(), Arc::new(Models(vec![facts])));
    let _server = handle.join(ServerConfig { name: String::new(), budgets, devices: Vec::new() }, node);
    let admit = || Admit {
        model: model.clone(),
        request: RequestId("r".into()),
        client: ClientId("c".into()),
        sequences: 1,
        prompt_tokens: 20,
        wait_max: Duration::from_secs(120),
        keep_alive: None,
    };
    let began = clock::now();
    drop(handle.admit(admit()).await?);
    println!("first seat, with a start that takes no time: {:.1?}", began.elapsed());
    const ROUNDS: usize = 200_000;
    let (mut seats, mut returns) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        let admit = admit();
        let began = clock::now();
        let seat = handle.admit(admit).await?;
        let seated = clock::now();
        drop(seat);
        seats.push(seated - began);
        returns.push(seated.elapsed());
    }
    for (what, mut times) in [("seat on a ready instance", seats), ("seat given back", returns)] {
        times.sort_unstable();
        println!("{what}: median {:.2?}, p99 {:.2?}", times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
    }
    Ok(())
}
