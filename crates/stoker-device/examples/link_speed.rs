//! What a machine's links and its driver do: how long pinning, allocating and copying take.
//!
//! `cargo run --release -p stoker-device --example link_speed [GIB]`

#![expect(unsafe_code, reason = "pins memory of its own")]
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a measuring program"
)]

use std::sync::{Arc, mpsc};

use rustix::mm::{MapFlags, ProtFlags};
use stoker_device::{CudaDevice, CudaOptions, Cut, Device, Link, Transfer, cuda_devices, driver_version};
use stoker_types::{ByteSize, clock};

struct Part(usize, usize);

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping below is never unmapped, and only read by now.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.0), self.1) }
    }
}

fn main() {
    let gib: usize = std::env::args().nth(1).map_or(8, |gib| gib.parse().unwrap());
    let chunk = 16 << 20;
    let total = gib << 30;
    println!("driver {}", driver_version().unwrap());
    let devices = cuda_devices().unwrap();
    for device in &devices {
        println!("{device:?}");
    }
    let started = clock::now();
    let device = CudaDevice::open(0, &CudaOptions::default()).unwrap();
    println!("open: {:?}; memory {:?}", started.elapsed(), device.memory().unwrap());

    let fd = rustix::fs::memfd_create("link-speed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, total as u64).unwrap();
    // SAFETY: a new mapping.
    let base = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            total,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &fd,
            0,
        )
    }
    .unwrap()
    .cast::<u8>();
    let address = base.expose_provenance();
    let pinner = device.pinner().unwrap();
    let chunks = total / chunk;
    for (name, range, touch) in [("untouched", 0..chunks / 4, false), ("touched", chunks / 4..chunks, true)] {
        // SAFETY: the mapping, in whole chunks.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(base.add(range.start * chunk), range.len() * chunk) };
        if touch {
            let started = clock::now();
            std::thread::scope(|scope| {
                for part in bytes.chunks_mut(bytes.len() / 8) {
                    scope.spawn(|| part.iter_mut().step_by(64).for_each(|byte| *byte = 1));
                }
            });
            println!("touching {} chunks on 8 threads: {:?}", range.len(), started.elapsed());
        }
        let started = clock::now();
        for i in range.clone() {
            // SAFETY: mapped for ever.
            unsafe { pinner.pin(base.add(i * chunk), chunk) }.unwrap();
        }
        let took = started.elapsed();
        println!(
            "pinning {} {name} chunks of 16 MiB: {took:?}, {:?} each",
            range.len(),
            took / u32::try_from(range.len()).unwrap()
        );
    }
    // SAFETY: as above.
    let words = unsafe { std::slice::from_raw_parts_mut(base.cast::<u64>(), total / 8) };
    std::thread::scope(|scope| {
        for (t, part) in words.chunks_mut(total / 8 / 16).enumerate() {
            scope.spawn(move || {
                for (i, word) in part.iter_mut().enumerate() {
                    *word = ((i + t) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                }
            });
        }
    });

    for granule in [64 << 20, 1 << 30, total as u64] {
        let started = clock::now();
        let slab = device.allocate(ByteSize(total as u64), ByteSize(granule)).unwrap();
        let made = started.elapsed();
        let fds = slab.export().unwrap().len();
        let exported = started.elapsed() - made;
        let started = clock::now();
        drop(slab);
        println!(
            "slab in granules of {}: made {made:?}, {fds} exported {exported:?}, freed {:?}",
            ByteSize(granule),
            started.elapsed()
        );
    }
    copies(&device, address, total, chunk, "one link", &SHAPES);
    let linked: Vec<_> =
        device.info().peers.iter().filter(|peer| peer.link == Link::NvLink).map(|p| p.ordinal).collect();
    drop(device);
    for n in 1..=linked.len() {
        for (slots, depth) in [(2, 6), (4, 6), (4, 16)] {
            let options =
                CudaOptions { helpers: linked[..n].to_vec(), slots, depth, ..CudaOptions::default() };
            let device = CudaDevice::open(0, &options).unwrap();
            let name = format!("{} links, {slots} staging slots, {depth} under way", n + 1);
            copies(&device, address, total, chunk, &name, &[("aligned", 0, 0, chunk)]);
        }
    }
}

const SHAPES: [Shape; 9] = [
    ("aligned", 0, 0, 16 << 20),
    ("target at 256", 0, 256, 16 << 20),
    ("target at 8", 0, 8, 16 << 20),
    ("source at 8", 8, 0, 16 << 20),
    ("source at 8, target at 256", 8, 256, 16 << 20),
    ("source and target at 8", 8, 8, 16 << 20),
    ("source at 2", 2, 0, 16 << 20),
    ("cuts of 1 MiB", 0, 0, 1 << 20),
    ("cuts of 64 KiB", 0, 0, 64 << 10),
];

/// Name, first byte in the source's chunk, first byte in the target, bytes of a cut.
type Shape = (&'static str, usize, usize, usize);

fn copies(device: &CudaDevice, address: usize, total: usize, chunk: usize, name: &str, shapes: &[Shape]) {
    let slab = device.allocate(ByteSize(total as u64 + 4096), ByteSize(total as u64 + 4096)).unwrap();
    for &(what, from, to, cut) in shapes {
        let mut best = f64::MAX;
        for _ in 0..4 {
            let (sender, done) = mpsc::channel();
            let sender = Arc::new(sender);
            let started = clock::now();
            for i in 0..total / chunk {
                let sender = Arc::clone(&sender);
                let base = i * chunk;
                let cuts = (from..chunk)
                    .step_by(cut)
                    .map(|at| Cut::range(at, cut.min(chunk - at), (base + to + at - from) as u64))
                    .collect();
                device.copy(Transfer {
                    from: Box::new(Part(address + base, chunk)),
                    to: slab.clone(),
                    cuts,
                    arrival: None,
                    done: Box::new(move |result| sender.send(result).unwrap()),
                });
            }
            drop(sender);
            done.into_iter().for_each(Result::unwrap);
            best = best.min(started.elapsed().as_secs_f64());
        }
        println!("{name}, {what}: {:.1} GB/s", total as f64 / best / 1e9);
    }
}
