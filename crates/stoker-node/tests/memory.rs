//! A node on a machine whose memory somebody else takes. The workers are this executable (see
//! [`support::worker_command`]).

#![expect(clippy::unwrap_used, reason = "a test")]

#[expect(dead_code, reason = "shared with the other tests of a node")]
mod support;

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use rustix::net::SendFlags;
use stoker_node::{MemoryConfig, MemoryProbe, MemoryReading};
use stoker_store::Store;
use stoker_types::{ByteSize, MemoryHolder, StartFailure, StopMode};
use stoker_worker::{StandIn, WorkerArgs};
use support::{Bed, name, workers};

/// Memory for the weights and for KV caches, each.
const BUDGET: ByteSize = ByteSize::mib(64);

/// A machine of 1 GiB, of which a quarter is left to others. The pool's memory is real, the rest is said.
#[derive(Default)]
struct Machine {
    hog: Mutex<ByteSize>,
    store: OnceLock<Store>,
}

impl Machine {
    fn bed() -> (Arc<Self>, Bed) {
        Self::bed_under_pressure(None)
    }

    fn bed_under_pressure(pressure: Option<OwnedFd>) -> (Arc<Self>, Bed) {
        let machine = Arc::new(Self::default());
        let memory = MemoryConfig {
            kv: BUDGET,
            probe: Arc::clone(&machine) as Arc<dyn MemoryProbe>,
            pressure: pressure.map(Into::into),
        };
        let bed = Bed::on_machine(workers("quick_worker"), tempfile::tempdir().unwrap(), memory);
        assert!(machine.store.set(bed.store.clone()).is_ok());
        (machine, bed)
    }

    /// Leaves so much for Stoker.
    fn leave(&self, room: ByteSize) {
        *self.hog.lock() = ByteSize::mib(768).saturating_sub(room);
    }
}

impl MemoryProbe for Machine {
    fn read(&self) -> io::Result<MemoryReading> {
        let pool = self.store.get().map_or(Ok(ByteSize::ZERO), Store::resident)?;
        let available = ByteSize::gib(1).saturating_sub(*self.hog.lock() + pool);
        Ok(MemoryReading { total: ByteSize::gib(1), available, group: None })
    }

    fn holder(&self, ours: &[u32], _: Option<&str>) -> Option<MemoryHolder> {
        assert!(ours.contains(&std::process::id()));
        Some(MemoryHolder { pid: 4312, name: "python".into(), bytes: *self.hog.lock() })
    }
}

#[test]
#[ignore = "a worker's process"]
fn quick_worker() -> ExitCode {
    let standin = Some(StandIn { step_time: Duration::ZERO });
    stoker_worker::run(WorkerArgs { threads: 1, standin, ..WorkerArgs::default() })
}

#[tokio::test]
async fn the_cache_gives_way_and_what_is_mapped_stays() {
    let (machine, bed) = Machine::bed();
    let a = bed.order("a");
    bed.node.start(a.clone()).await.unwrap();
    bed.node.preload(&name("c")).await.unwrap();
    let snapshot = bed.node.look().await;
    assert_eq!((snapshot.memory.dram.effective, snapshot.dram_used), (BUDGET, BUDGET));
    assert_eq!(snapshot.memory.holder, None, "nothing is missing");

    machine.leave(BUDGET);
    let snapshot = bed.node.look().await;
    let memory = &snapshot.memory;
    assert_eq!((memory.dram.configured, memory.dram.effective), (BUDGET, ByteSize::mib(32)));
    // What the worker took counts as held, and so as KV cache: at most as much as it may fill.
    assert!((ByteSize::mib(32)..ByteSize::mib(36)).contains(&memory.kv.effective), "{memory:?}");
    assert_eq!((snapshot.dram_used, snapshot.dram_mapped), (ByteSize::mib(32), ByteSize::mib(16)));
    assert_eq!(bed.store.resident().unwrap(), ByteSize::mib(32), "the system has the rest back");
    assert_eq!(bed.store.stats().evictions.budget, 2);
    assert_eq!(memory.holder.as_ref().unwrap().name, "python");

    machine.leave(ByteSize::ZERO);
    let snapshot = bed.node.look().await;
    assert_eq!((snapshot.dram_used, snapshot.dram_mapped), (ByteSize::mib(16), ByteSize::mib(16)));
    assert_eq!(bed.store.resident().unwrap(), ByteSize::mib(16));

    // What is let go while it is over the budget goes back to the system with the next look.
    bed.node.stop(a.instance, StopMode::IfIdle).await.unwrap();
    assert_eq!(bed.node.look().await.dram_used, ByteSize::ZERO);
    assert_eq!(bed.store.resident().unwrap(), ByteSize::ZERO);

    machine.leave(ByteSize::mib(768));
    assert_eq!(bed.node.look().await.memory.dram.effective, BUDGET, "and grows again");
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_start_looks_first_and_says_who_has_the_memory() {
    let (machine, bed) = Machine::bed();
    bed.node.start(bed.order("a")).await.unwrap();
    machine.leave(BUDGET);
    let failure = bed.node.start(bed.order("c")).await.unwrap_err();
    let StartFailure::OutOfMemory { needed, free, .. } = &failure else { panic!("{failure}") };
    assert_eq!((*needed, *free), (ByteSize::mib(48), ByteSize::mib(16)));
    let words = failure.to_string();
    for part in [
        "model `c` needs 48.0 MiB, free 16.0 MiB: for its weights; 16.0 MiB of 32.0 MiB are in use; the machine has \
         304.0 MiB available, of which 256.0 MiB stay free: weights may take 32.0 MiB (64.0 MiB configured), ",
        "; 704.0 MiB held by pid 4312 python (not Stoker)",
    ] {
        assert!(words.contains(part), "{words}");
    }
    // Its weights are there; what it would write into memory isn't.
    machine.leave(ByteSize::mib(20));
    let failure = bed.node.start(bed.order("a")).await.unwrap_err();
    let StartFailure::OutOfMemory { needed, free, detail, .. } = &failure else { panic!("{failure}") };
    assert!(*needed == ByteSize::mib(8) && *free < ByteSize::mib(4), "{failure}");
    assert!(detail.starts_with("for its KV cache; the machine has"), "{detail}");

    machine.leave(ByteSize::mib(768));
    bed.node.start(bed.order("c")).await.unwrap();
    assert_eq!(bed.node.snapshot().dram_mapped, BUDGET);
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn what_a_start_needs_itself_is_the_last_to_go() {
    let (machine, bed) = Machine::bed();
    bed.node.preload(&name("b")).await.unwrap();
    bed.node.preload(&name("a")).await.unwrap();
    // Room for two chunks of the three, and it was `b` that was used first.
    machine.leave(BUDGET);
    bed.node.start(bed.order("b")).await.unwrap();
    assert_eq!(bed.store.stats().bytes_read, ByteSize(3 * (16 << 20) - 2000), "nothing was read twice");
    assert_eq!(bed.node.snapshot().dram_used, ByteSize::mib(32));
    bed.node.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn under_pressure_the_cache_goes_and_the_controller_hears_of_it() {
    // Urgent data makes a socket ready as pressure makes a pressure file ready.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let kernel = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let trigger = listener.accept().unwrap().0;
    trigger.set_nonblocking(true).unwrap();
    let (machine, bed) = Machine::bed_under_pressure(Some(trigger.into()));
    bed.node.start(bed.order("a")).await.unwrap();
    bed.node.preload(&name("c")).await.unwrap();
    assert_eq!(bed.node.snapshot().dram_used, BUDGET);
    let mut changes = bed.store.changes();
    changes.mark_unchanged();

    // Enough for the budgets, yet less than half of the machine.
    machine.leave(ByteSize::mib(200));
    rustix::net::send(&kernel, b"!", SendFlags::OOB).unwrap();
    changes.changed().await.unwrap();
    let snapshot = bed.until("the cache is gone", |s| s.dram_used == ByteSize::mib(16)).await;
    assert_eq!(snapshot.dram_mapped, ByteSize::mib(16), "what is mapped stays");
    assert_eq!(bed.store.stats().evictions.pressure, 3);
    assert_eq!(bed.store.stats().budget, BUDGET, "it may grow again");
    bed.until("the system has it back", |_| bed.store.resident().unwrap() == ByteSize::mib(16)).await;
    bed.node.start(bed.order("c")).await.unwrap();
    bed.node.shutdown(Duration::ZERO).await;
}
