//! On a real GPU. Ignored by default: `scripts/gpu/load` runs them on a machine that has one.

#![expect(unsafe_code, reason = "pins memory of its own")]
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
};

use rustix::mm::{MapFlags, ProtFlags};
use stoker_device::{
    CudaDevice, CudaOptions, Cut, Device, DeviceError, HostBytes, Slab, Transfer, cuda_devices,
};
use stoker_types::ByteSize;

const GPU: &str = "needs a GPU";

fn device() -> CudaDevice {
    CudaDevice::open(0, &CudaOptions::default()).expect(GPU)
}

/// Pinned pages, filled with numbers that never repeat within the buffer.
struct Pinned {
    device: Arc<CudaDevice>,
    base: *mut u8,
    len: usize,
}

// SAFETY: the memory is this value's, and is only read once made.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(device: &Arc<CudaDevice>, len: usize, seed: u64) -> Arc<Self> {
        // SAFETY: a new mapping.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        }
        .unwrap()
        .cast::<u8>();
        // SAFETY: the mapping is `len` bytes of zeros.
        let bytes = unsafe { std::slice::from_raw_parts_mut(base, len) };
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&number(i as u64 + seed).to_le_bytes());
        }
        // SAFETY: mapped until `drop` unpins it.
        unsafe { device.pinner().unwrap().pin(base, len) }.unwrap();
        Arc::new(Self { device: Arc::clone(device), base, len })
    }
}

fn number(i: u64) -> u64 {
    (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: mapped, and only read.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: pinned by `new`; copies from it hold it.
        unsafe {
            self.device.pinner().unwrap().unpin(self.base, self.len).unwrap();
            rustix::mm::munmap(self.base.cast(), self.len).unwrap();
        }
    }
}

struct Shared(Arc<Pinned>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

fn copy(
    device: &CudaDevice,
    from: impl HostBytes + 'static,
    to: &Slab,
    cuts: Vec<Cut>,
) -> Result<(), DeviceError> {
    let (sender, done) = mpsc::channel();
    let done_sender = Box::new(move |result| sender.send(result).unwrap());
    device.copy(Transfer { from: Box::new(from), to: to.clone(), cuts, arrival: None, done: done_sender });
    done.recv().unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn devices_are_described() {
    let devices = cuda_devices().expect(GPU);
    for device in devices {
        println!("{device:?}");
        assert!(
            device.compute >= (7, 0) && device.memory > ByteSize::gib(4) && device.uuid.starts_with("GPU-")
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_alignment_arrives() {
    let device = Arc::new(device());
    let host = Pinned::new(&device, 1 << 20, 0);
    let slab = device.allocate(ByteSize::mib(8), ByteSize::mib(2)).unwrap();
    for (i, from) in [0, 1, 2, 3, 8, 24, 255, 256, 4096, 4097].into_iter().enumerate() {
        let len = 70_000 + i * 3;
        let to = (i as u64) * (1 << 19) + [0, 256, 8, 1, 2][i % 5];
        copy(&device, Shared(Arc::clone(&host)), &slab, vec![Cut::range(from, len, to)]).unwrap();
        let mut got = vec![0; len];
        device.read(&slab, to, &mut got).unwrap();
        assert!(got == (*host).as_ref()[from..from + len], "from {from} to {to}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rows_come_to_lie_side_by_side() {
    let device = Arc::new(device());
    let host = Pinned::new(&device, 4 << 20, 0);
    let slab = device.allocate(ByteSize::mib(8), ByteSize::mib(2)).unwrap();
    // Wide, narrow, odd, and rows that overlap in nothing but their ends.
    for (from, len, pitch, rows, to) in
        [(0, 5504, 22_016, 190, 256), (7, 333, 1001, 2000, 1), (3, 1, 2, 9000, 77), (64, 4096, 4096, 100, 8)]
    {
        let cut = Cut { from, len, to, rows, pitch };
        copy(&device, Shared(Arc::clone(&host)), &slab, vec![cut]).unwrap();
        let mut got = vec![0; len * rows];
        device.read(&slab, to, &mut got).unwrap();
        for (row, got) in got.chunks(len).enumerate() {
            let at = from + row * pitch;
            assert!(got == &(*host).as_ref()[at..at + len], "row {row} of {cut:?}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn sums_are_those_of_the_bytes() {
    let device = Arc::new(device());
    let host = Pinned::new(&device, 64 << 20, 0);
    let slab = device.allocate(ByteSize::mib(512), ByteSize::mib(64)).unwrap();
    copy(&device, Shared(Arc::clone(&host)), &slab, vec![Cut::range(0, 64 << 20, 0)]).unwrap();
    let lens = [0, 1, 7, 8, 100, 2047, 2048, 2049, 131_072, 131_073, (16 << 20) - 5, 48 << 20];
    let ranges: Vec<(u64, u64)> =
        lens.iter().flat_map(|len| [0, 1, 8, 2043, 4096, 999_999].map(|at| (at, *len))).collect();
    for (range, sum) in ranges.iter().zip(device.sums(&slab, &ranges).unwrap()) {
        let (at, len) = (usize::try_from(range.0).unwrap(), usize::try_from(range.1).unwrap());
        assert_eq!(sum, stoker_types::ChunkSum::of(&(*host).as_ref()[at..at + len]), "{range:?}");
    }
    // All of the slab, in chunks, as a model is checked.
    let chunks: Vec<_> = (0..32).map(|chunk| (chunk << 24, 16 << 20)).collect();
    let begun = stoker_types::clock::now();
    device.sums(&slab, &chunks).unwrap();
    println!("512 MiB summed on the device in {:?}", begun.elapsed());
    assert!(device.sums(&slab, &[(512 << 20, 1)]).is_err());
}

#[test]
#[ignore = "needs a GPU"]
fn many_copies_end_once_each_and_memory_comes_back() {
    let device = Arc::new(device());
    let before = device.memory().unwrap();
    {
        let host = Pinned::new(&device, 64 << 20, 5);
        let slab = device.allocate(ByteSize::mib(512), ByteSize::mib(64)).unwrap();
        let (sender, done) = mpsc::channel();
        for i in 0..128_u64 {
            let sender = sender.clone();
            let from = usize::try_from(i % 16).unwrap() << 22;
            device.copy(Transfer {
                from: Box::new(Shared(Arc::clone(&host))),
                to: slab.clone(),
                cuts: vec![Cut::range(from, 4 << 20, i << 22)],
                arrival: None,
                done: Box::new(move |result| sender.send((i, result)).unwrap()),
            });
        }
        drop(sender);
        let mut ended: Vec<_> = done.into_iter().map(|(i, result)| (result.unwrap(), i).1).collect();
        ended.sort_unstable();
        assert!(ended.into_iter().eq(0..128));
        let mut got = vec![0; 512 << 20];
        device.read(&slab, 0, &mut got).unwrap();
        let want: Vec<u8> = (*host).as_ref().repeat(8);
        assert!(got == want);
        assert_eq!(device.memory().unwrap().slabs, before.slabs + ByteSize::mib(512));
    }
    let after = device.memory().unwrap();
    assert_eq!((after.slabs, after.free), (before.slabs, before.free));
}

#[test]
#[ignore = "needs a GPU"]
fn memory_goes_back_granule_by_granule() {
    let device = Arc::new(device());
    let granule = ByteSize::mib(4);
    let before = device.memory().unwrap();
    let slab = device.allocate(ByteSize::mib(16), granule).unwrap();
    let pinned = Pinned::new(&device, 6 << 20, 3);
    // Over a border between granules.
    let cut = Cut::range(0, pinned.len, 3 << 20);
    copy(&device, Shared(Arc::clone(&pinned)), &slab, vec![cut]).unwrap();
    let mut back = vec![0; pinned.len];
    device.read(&slab, 3 << 20, &mut back).unwrap();
    assert!(back == (*pinned).as_ref());
    let part = slab.part(3 << 20, 2 << 20).unwrap();
    let last = slab.part(15 << 20, 1 << 20).unwrap();
    drop(slab);
    let in_slabs = || device.memory().unwrap().slabs.saturating_sub(before.slabs);
    assert_eq!(in_slabs(), ByteSize::mib(12));
    drop(part);
    assert_eq!(in_slabs(), ByteSize::mib(4));
    drop(last);
    assert_eq!(in_slabs(), ByteSize::ZERO);
    assert!(device.memory().unwrap().free >= before.free);
}

#[test]
#[ignore = "needs a GPU"]
fn too_much_is_refused_with_numbers_and_leaves_nothing() {
    let device = device();
    let before = device.memory().unwrap();
    let error = device.allocate(before.total + ByteSize::gib(1), ByteSize::gib(1)).unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
    println!("{error}");
    assert_eq!(device.memory().unwrap().free, before.free);
}

/// The other process of `another_process_maps_a_slab`: the descriptors are 3 and up.
#[test]
#[ignore = "run by another test"]
fn in_the_child() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [bytes, granule, fds @ ..] = &numbers[..] else { panic!("{line}") };
    let fds: Vec<_> = fds
        .iter()
        // SAFETY: the parent passed them on.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(i32::try_from(*fd).unwrap()) })
        .collect();
    let device = device();
    let slab = device.import(&fds, ByteSize(*bytes), ByteSize(*granule)).unwrap();
    let mut got = vec![0; usize::try_from(*bytes).unwrap()];
    device.read(&slab, 0, &mut got).unwrap();
    let right = got.chunks_exact(8).enumerate().all(|(i, w)| w == number(i as u64 + 9).to_le_bytes());
    println!("the other process sees {}", if right { "the same" } else { "something else" });
}

#[test]
#[ignore = "needs a GPU"]
fn another_process_maps_a_slab() {
    let device = Arc::new(device());
    let host = Pinned::new(&device, 8 << 20, 9);
    let slab = device.allocate(ByteSize::mib(8), ByteSize::mib(2)).unwrap();
    copy(&device, Shared(host), &slab, vec![Cut::range(0, 8 << 20, 0)]).unwrap();
    let fds = slab.export().unwrap();
    assert_eq!(fds.len(), 4);
    for fd in &fds {
        rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty()).unwrap();
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "in_the_child", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    let line = format!("{} {} {}\n", slab.bytes().bytes(), slab.granule().bytes(), numbers.join(" "));
    child.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(said.contains("sees the same"), "{said}");
    let wrong = device.import(&fds[..3], slab.bytes(), slab.granule());
    assert!(matches!(wrong, Err(DeviceError::Os { .. })));
}

#[test]
#[ignore = "needs two GPUs"]
fn a_helper_lends_its_link() {
    let options = CudaOptions { helpers: vec![1], ..CudaOptions::default() };
    let device = Arc::new(CudaDevice::open(0, &options).expect("needs two GPUs"));
    let host = Pinned::new(&device, 256 << 20, 3);
    let slab = device.allocate(ByteSize::mib(256), ByteSize::mib(256)).unwrap();
    let (sender, done) = mpsc::channel();
    for i in 0..16 {
        let sender = sender.clone();
        let cut = |from: usize, len| Cut::range(from, len, from as u64);
        let at = i << 24;
        device.copy(Transfer {
            from: Box::new(Shared(Arc::clone(&host))),
            to: slab.clone(),
            cuts: vec![cut(at, 1 << 20), cut(at + (1 << 20), 15 << 20)],
            arrival: None,
            done: Box::new(move |result| sender.send(result).unwrap()),
        });
    }
    drop(sender);
    done.into_iter().for_each(Result::unwrap);
    let mut got = vec![0; 256 << 20];
    device.read(&slab, 0, &mut got).unwrap();
    assert!(got == (*host).as_ref());
}
