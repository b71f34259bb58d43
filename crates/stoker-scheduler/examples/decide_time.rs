//! How long one residency decision takes: 1,000 models that all want room, 20 instances that hold it.
//!
//! `cargo run --release -p stoker-scheduler --example decide_time`

#![expect(clippy::print_stdout, reason = "prints its measurement")]

use std::{hint::black_box, time::Duration};

use stoker_scheduler::residency::{
    Budgets, DemandView, InstanceState, InstanceView, ModelKey, Need, Place, Rules, View, decide,
};
use stoker_types::{ByteSize, DeviceId, InstanceId, KeepAlive, clock};

fn main() {
    let instances: Vec<InstanceView> = (0..20u32)
        .map(|n| InstanceView {
            id: InstanceId(u64::from(n)),
            model: ModelKey(n),
            device: DeviceId(0),
            state: InstanceState::Ready,
            pool_bytes: ByteSize::mib(u64::from(100 + n * 37 % 11 * 10)),
            kv_bytes: ByteSize::mib(50),
            sequences: 8,
            in_flight: n % 3,
            last_used: Duration::from_millis(u64::from(n) * 321),
            ready_at: Duration::ZERO,
            load_time: Duration::from_millis(u64::from(50 + n * 13 % 7 * 30)),
            uses: f64::from(n % 5),
            keep_alive: KeepAlive::For(Duration::from_mins(10)),
            pinned: n == 0,
            priority: 0,
            settled_at: Duration::ZERO,
            leaving: false,
        })
        .collect();
    let demands: Vec<DemandView> = (0..1000u32)
        .map(|n| DemandView {
            model: ModelKey(n),
            waiting: 1 + n % 3,
            oldest_since: Duration::from_millis(u64::from(n * 7919 % 1000) * 30),
            priority: i32::from(n % 10 == 0),
            need: Need { pool_bytes: ByteSize::mib(u64::from(80 + n % 200)), kv_bytes: ByteSize::mib(50) },
            there: None,
            instances_max: 1,
            evicts: true,
        })
        .collect();
    for (what, now, dram) in [
        ("nobody may go yet", 1, 3000),
        ("idle ones make room", 8, 3000),
        ("everybody is overdue", 60, 3000),
        ("everybody is overdue, more is taken than there is", 60, 2500),
    ] {
        let budgets = Budgets { dram: ByteSize::mib(dram), kv: ByteSize::gib(2), slots: 20 };
        let places = [Place::Pool(budgets)];
        let view = View { places: &places, instances: &instances, demands: &demands };
        let mut times: Vec<Duration> = (0..2000)
            .map(|_| {
                let began = clock::now();
                black_box(decide(black_box(&view), &Rules::default(), Duration::from_secs(now)));
                began.elapsed()
            })
            .collect();
        times.sort_unstable();
        let actions = decide(&view, &Rules::default(), Duration::from_secs(now)).actions.len();
        println!("{what}: {actions} actions, median {:.1?}, p99 {:.1?}", times[1000], times[1980]);
    }
}
