//! A keeper that is a process of its own. It is this executable.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    ffi::OsString,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use stoker_io::{ChunkPool, PoolMemory};
use stoker_node::{
    Keeper, KeeperConfig, KeeperError, RuntimeDir,
    keeper::{Limits, Listener, serve},
};
use stoker_types::ByteSize;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
#[ignore = "a keeper's process"]
fn keeper_process() {
    let listener = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let limits = Limits { patience: Duration::from_secs(2), ..Limits::default() };
    serve(&Listener::inherited(listener).unwrap(), limits).unwrap();
}

#[test]
#[ignore = "a keeper's process that ends at once"]
fn stillborn() {}

fn config(dir: &Path, mode: &str) -> KeeperConfig {
    let exe = std::env::current_exe().unwrap();
    let args = [exe.as_os_str(), mode.as_ref(), "--exact".as_ref(), "--ignored".as_ref()];
    let command = args.map(OsString::from).into();
    KeeperConfig { socket: dir.join("keeper.sock"), command, workers: Vec::new() }
}

fn pool() -> PoolMemory {
    ChunkPool::new(ByteSize::mib(1), ByteSize::kib(64)).unwrap().memory().unwrap().unwrap()
}

fn inode(memory: &PoolMemory) -> u64 {
    rustix::fs::fstat(&memory.pool).unwrap().st_ino
}

async fn blocking<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(what).await.unwrap()
}

fn open(config: KeeperConfig) -> impl Future<Output = Result<Keeper, KeeperError>> {
    blocking(move || Keeper::open(config))
}

fn recover(keeper: &Keeper) -> impl Future<Output = Option<PoolMemory>> + use<> {
    let keeper = keeper.clone();
    // Without workers that are to be taken over.
    blocking(move || {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::claim(&dir.path().join("run")).unwrap();
        keeper.recover(&runtime, Duration::ZERO).unwrap()
    })
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

/// Waits for what happens in another process.
async fn until(what: &str, is: impl Fn() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_node_gets_what_the_last_one_had() {
    let dir = tempfile::tempdir().unwrap();
    let keeper = open(config(dir.path(), "keeper_process")).await.unwrap();
    let pid = keeper.pid().unwrap();
    assert!(recover(&keeper).await.is_none(), "it is new");
    let first = pool();
    let kept = inode(&first);
    keeper.keep(first);
    drop(keeper);

    let keeper = open(config(dir.path(), "keeper_process")).await.unwrap();
    assert_eq!(keeper.pid(), Some(pid), "the same");
    assert_eq!(recover(&keeper).await.map(|memory| inode(&memory)), Some(kept));
    // It can't be used: another one takes its place, and the first is gone.
    let second = pool();
    let now = inode(&second);
    keeper.keep(second);
    assert_eq!(recover(&keeper).await.map(|memory| inode(&memory)), Some(now));
    let open_files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    // Input, output, error, the listening socket, the node's two connections, pool and ledger; what the test harness has.
    assert!(open_files <= 14, "{open_files}");
    for _ in 0..50 {
        keeper.keep(pool());
    }
    // One more or less: at the first count a connection may still have been on its way in or out. Fifty would be a leak.
    let files = move || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    until("what was replaced is closed", move || files() <= open_files + 2).await;

    // A proper stop.
    let dismissed = keeper.clone();
    blocking(move || dismissed.dismiss()).await;
    until("it ends", || !runs(pid)).await;
    assert!(!dir.path().join("keeper.sock").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_keeper_is_replaced_and_the_memory_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let keeper = open(config(dir.path(), "keeper_process")).await.unwrap();
    let memory = pool();
    let kept = inode(&memory);
    keeper.keep(memory);
    let mut pid = keeper.pid().unwrap();
    for round in 0..3 {
        kill(pid);
        let killed = pid;
        let handle = keeper.clone();
        until("another keeper", move || handle.pid().is_some_and(|pid| pid != killed)).await;
        pid = keeper.pid().unwrap();
        assert!(!runs(killed), "round {round}: waited for");
        assert_eq!(recover(&keeper).await.map(|memory| inode(&memory)), Some(kept), "round {round}");
    }
    // The node is gone, and none comes.
    drop(keeper);
    until("its patience ends", || !runs(pid)).await;
    // A socket that nobody listens to is left, and is no hindrance.
    assert!(dir.path().join("keeper.sock").exists());
    let keeper = open(config(dir.path(), "keeper_process")).await.unwrap();
    assert!(recover(&keeper).await.is_none());
    blocking(move || keeper.dismiss()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_can_not_be() {
    let dir = tempfile::tempdir().unwrap();
    let missing =
        KeeperConfig { command: ["/nowhere/stoker".into()].into(), ..config(dir.path(), "keeper_process") };
    assert!(matches!(open(missing).await, Err(KeeperError::Start { .. })));
    assert!(matches!(open(config(dir.path(), "stillborn")).await, Err(KeeperError::Gone(_))));
    let nowhere = KeeperConfig { socket: PathBuf::from("/nowhere/k"), ..config(dir.path(), "stillborn") };
    assert!(matches!(open(nowhere).await, Err(KeeperError::Socket { .. })));
    // None of them is in the way of one that can.
    let keeper = open(config(dir.path(), "keeper_process")).await.unwrap();
    blocking(move || keeper.dismiss()).await;
}
