//! Readers against real files on the real disk: a memory file system proves nothing about alignment.

#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::{io, path::Path, sync::mpsc};

use proptest::prelude::*;
use stoker_io::{
    ChunkBuf, ChunkPool, DirectIo, Fault, FaultKind, FaultyFiles, LocalFiles, Open, RawOptions, ReadDone,
    ReadError, ReadMode, ReadOp, Reader, ReaderKind, Reason, drop_page_cache, raw_limit,
};
use stoker_types::{ByteSize, ChunkSum};

const CHUNK: usize = 64 << 10;

fn pool() -> ChunkPool {
    ChunkPool::new(ByteSize(4 * CHUNK as u64), ByteSize(CHUNK as u64)).unwrap()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap()).collect()
}

fn read(reader: &dyn Reader, pool: &ChunkPool, offset: u64, len: usize) -> ReadDone {
    let (sender, done) = mpsc::channel();
    let op = ReadOp { buf: pool.try_take().unwrap().into(), offset, len, sum: true };
    reader.read(op, Box::new(move |done| sender.send(done).unwrap()));
    done.recv().unwrap()
}

fn check(path: &Path, mode: ReadMode, files: LocalFiles, content: &[u8]) -> ReaderKind {
    let pool = pool();
    let reader = files.open(path, mode).unwrap();
    assert_eq!(reader.stamp().unwrap().len, content.len() as u64);
    for (i, piece) in content.chunks(CHUNK).enumerate() {
        let done = read(&*reader, &pool, (i * CHUNK) as u64, piece.len());
        let filled = done.result.unwrap();
        assert!(done.buf[..piece.len()] == *piece, "chunk {i}");
        assert_eq!(filled.sum, Some(ChunkSum::of(piece)), "chunk {i}");
    }
    reader.choice().kind
}

#[test]
fn lengths_around_blocks_and_chunks() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("weights");
    let around = [0, 512, 4096, CHUNK, 2 * CHUNK, 3 * CHUNK];
    for len in around.iter().flat_map(|n| [n.saturating_sub(1), *n, n + 1, n + 511, n + 513, n + 4095]) {
        let content = bytes(len);
        std::fs::write(&path, &content).unwrap();
        for block_bytes in [4096, 16 << 10, 1 << 20] {
            let files = LocalFiles { block_bytes, direct: DirectIo::Pread, ..LocalFiles::default() };
            let kind = check(&path, ReadMode::Direct, files, &content);
            assert_eq!(kind, ReaderKind::Direct, "these tests need a file system with direct reads");
            check(&path, ReadMode::Buffered, files, &content);
            check(&path, ReadMode::Uncached, files, &content);
            // Where a sandbox refuses rings, this is the same once more, and says so.
            let files = LocalFiles { block_bytes, ..LocalFiles::default() };
            let kind = check(&path, ReadMode::Direct, files, &content);
            let expected = if rings() { ReaderKind::IoUring } else { ReaderKind::Direct };
            assert_eq!(kind, expected);
        }
    }
}

/// Whether this machine lets us have `io_uring`, by asking it ourselves.
fn rings() -> bool {
    io_uring::IoUring::new(1).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked for, aligned or not, is what the file holds.
    #[test]
    fn any_range(len in 1_usize..200_000, at in 0.0_f64..1.0, wanted in 1_usize..=CHUNK, block in 1_usize..100_000) {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("weights");
        let content = bytes(len);
        std::fs::write(&path, &content).unwrap();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a part")]
        let at = (len as f64 * at) as usize;
        let ways = [
            (ReadMode::Direct, DirectIo::Auto),
            (ReadMode::Direct, DirectIo::Pread),
            (ReadMode::Buffered, DirectIo::Auto),
        ];
        for (mode, direct) in ways {
            let reader = LocalFiles { block_bytes: block, direct, ..LocalFiles::default() }.open(&path, mode).unwrap();
            let pool = pool();
            let done = read(&*reader, &pool, at as u64, wanted);
            if at + wanted <= len {
                let expected = &content[at..at + wanted];
                prop_assert_eq!(done.result.unwrap().sum, Some(ChunkSum::of(expected)));
                prop_assert!(&done.buf[..wanted] == expected);
            } else {
                let truncated = matches!(done.result, Err(ReadError::Truncated { at }) if at == len as u64);
                prop_assert!(truncated, "{:?}", done.result);
            }
            drop(done.buf);
            prop_assert_eq!(pool.usage().in_use, 0);
        }
    }
}

#[test]
fn the_page_cache_decides() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("weights");
    std::fs::write(&path, bytes(300_000)).unwrap();
    drop_page_cache(&path).unwrap();
    let open = |mode| LocalFiles::default().open(&path, mode).unwrap();
    assert!(matches!(open(ReadMode::Auto).choice().reason, Reason::Probed { .. }));
    std::fs::read(&path).unwrap();
    let choice = open(ReadMode::Auto).choice().clone();
    assert_eq!(choice.kind, ReaderKind::Buffered);
    assert!(matches!(choice.reason, Reason::PageCache { percent: 100 }), "{choice}");
    assert!(!choice.is_from_medium());
    assert_eq!(open(ReadMode::Direct).choice().kind == ReaderKind::IoUring, rings());
    assert!(matches!(open(ReadMode::Uncached).choice().reason, Reason::Probed { .. }));
    assert!(
        matches!(open(ReadMode::Auto).choice().reason, Reason::Probed { .. }),
        "dropped by the one before"
    );
}

#[test]
fn a_file_system_in_memory_is_read_buffered() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = dir.path().join("weights");
    let content = bytes(CHUNK + 5);
    std::fs::write(&path, &content).unwrap();
    assert_eq!(check(&path, ReadMode::Direct, LocalFiles::default(), &content), ReaderKind::Buffered);
    let reader = LocalFiles::default().open(&path, ReadMode::Auto).unwrap();
    assert_eq!(reader.choice().reason, Reason::MemoryFileSystem);
}

#[test]
fn what_is_no_file() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let open = |path: &Path| LocalFiles::default().open(path, ReadMode::Auto).err().unwrap().kind();
    assert_eq!(open(&dir.path().join("absent")), io::ErrorKind::NotFound);
    assert_eq!(open(dir.path()), io::ErrorKind::InvalidInput);
}

#[test]
fn faults_hit_what_they_are_meant_for() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("weights");
    let content = bytes(2 * CHUNK);
    std::fs::write(&path, &content).unwrap();
    let files = FaultyFiles::new(LocalFiles::default());
    let pool = pool();
    let reader = files.open(&path, ReadMode::Auto).unwrap();
    let fault = |kind| Fault { path: "weights".into(), bytes: 100..101, times: 1, kind };

    files.add(fault(FaultKind::Corrupt { bits: 0x10 }));
    let untouched = read(&*reader, &pool, CHUNK as u64, CHUNK);
    assert_eq!(untouched.result.unwrap().sum, Some(ChunkSum::of(&content[CHUNK..])));
    let hit = read(&*reader, &pool, 0, CHUNK);
    assert_eq!(hit.buf[100], content[100] ^ 0x10);
    assert_eq!(hit.result.unwrap().sum, Some(ChunkSum::of(&hit.buf)));
    assert_eq!(
        read(&*reader, &pool, 0, CHUNK).result.unwrap().sum,
        Some(ChunkSum::of(&content[..CHUNK])),
        "once"
    );

    files.add(fault(FaultKind::Error(io::ErrorKind::PermissionDenied)));
    assert!(matches!(read(&*reader, &pool, 0, CHUNK).result, Err(ReadError::Io { at: 100, .. })));
    files.add(fault(FaultKind::Truncate));
    assert!(matches!(read(&*reader, &pool, 0, CHUNK).result, Err(ReadError::Truncated { at: 100 })));
    files.add(Fault { path: "other".into(), ..fault(FaultKind::Truncate) });
    assert!(read(&*reader, &pool, 0, CHUNK).result.is_ok());
}

#[test]
fn the_raw_limit_reads_the_whole_file_in_less_memory_than_it_has() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("weights");
    std::fs::write(&path, bytes(20 * CHUNK + 1)).unwrap();
    let pool = pool();
    let mut slots: Vec<ChunkBuf> = std::iter::from_fn(|| pool.try_take()).collect();
    // More threads than slots: as many as there are slots read.
    for threads in [1, 3, 9] {
        let raw = raw_limit(&path, &mut slots, RawOptions { threads, block_bytes: 4096 }).unwrap();
        assert_eq!(raw.bytes, ByteSize(20 * CHUNK as u64 + 1));
        assert_eq!(raw.choice.kind, ReaderKind::Direct);
        assert!(raw.rate().0 > 0.0);
        assert_eq!(slots.len(), 4, "every slot comes back");
    }
    let fastest = RawOptions::fastest(&path, &mut slots).unwrap();
    assert!(RawOptions::CANDIDATES.contains(&fastest));
    assert_eq!(slots.len(), 4);
    let nowhere = raw_limit(&path, &mut Vec::new(), fastest).unwrap_err();
    assert_eq!(nowhere.kind(), io::ErrorKind::OutOfMemory);
    assert!(raw_limit(&dir.path().join("absent"), &mut slots, fastest).is_err());
    drop(slots);
    assert_eq!(pool.usage().in_use, 0);
}
