//! The keeper's side: one thread, one loop.

use std::{
    collections::BTreeMap,
    io,
    ops::Bound,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SendFlags, SocketFlags},
    process::{Resource, Rlimit},
};
use stoker_types::clock;

use super::wire::{self, Listener, NAME_BYTES_MAX, Operation, Packet, Refusal, VERSION};

/// Descriptors that the process needs for itself.
const OWN_DESCRIPTORS: u64 = 64;

/// Bounds of a keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long it waits for a node to come, or to come back.
    pub patience: Duration,
    /// Most descriptors that it keeps; fewer if the operating system allows it fewer.
    pub descriptors_max: usize,
    /// Most connections; more are closed at once.
    pub connections_max: usize,
}

/// What is kept.
struct Kept {
    descriptors: BTreeMap<String, OwnedFd>,
    descriptors_max: usize,
}

/// What comes of a request.
struct Answer {
    outcome: Result<(), Refusal>,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
    exit: bool,
}

impl Default for Limits {
    fn default() -> Self {
        // Device memory of 256 GiB in granules of 64 MiB, exported one by one.
        Self { patience: Duration::from_secs(60), descriptors_max: 4096, connections_max: 16 }
    }
}

/// Keeps descriptors until no node has been connected for `patience`, or one says that it is enough.
///
/// # Errors
/// The operating system's, of the listening socket.
pub fn serve(listener: &Listener, limits: Limits) -> io::Result<()> {
    let Limits { patience, descriptors_max, connections_max } = limits;
    let mut kept = Kept { descriptors: BTreeMap::new(), descriptors_max: descriptors_max.min(raise_limit()) };
    let ours = rustix::process::getuid().as_raw();
    let mut connections: Vec<OwnedFd> = Vec::new();
    let mut alone_since = clock::now();
    loop {
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(listener, PollFlags::IN)];
        polled.extend(connections.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = connections.is_empty().then(|| patience.saturating_sub(alone_since.elapsed()));
        if timeout == Some(Duration::ZERO) {
            return Ok(());
        }
        let timespec = timeout.map(timespec);
        match poll(&mut polled, timespec.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);

        let mut at = 0;
        let mut exit = false;
        connections.retain(|connection| {
            at += 1;
            !ready[at] || hear(connection, &mut kept, &mut exit)
        });
        if exit {
            return Ok(());
        }
        if ready[0] {
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(connection) => {
                    let known = wire::peer_uid(&connection).is_ok_and(|uid| uid == ours);
                    if known && connections.len() < connections_max {
                        connections.push(connection);
                    }
                }
                // It has gone already.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !connections.is_empty() {
            alone_since = clock::now();
        }
    }
}

/// Answers one request. Returns whether the connection goes on.
fn hear(connection: &OwnedFd, kept: &mut Kept, exit: &mut bool) -> bool {
    let packet = match wire::receive(connection, RecvFlags::DONTWAIT) {
        Ok(Some(packet)) => packet,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Ok(None) | Err(_) => return false,
    };
    let answer = kept.answer(packet).unwrap_or_else(|refusal| Answer {
        outcome: Err(refusal),
        payload: Vec::new(),
        fd: None,
        exit: false,
    });
    *exit |= answer.exit;
    let first = answer.outcome.map_or_else(|refusal| refusal as u8, |()| 0);
    let fd = answer.fd.as_ref().map(AsFd::as_fd);
    // Who doesn't read its answers is not waited for.
    wire::send(connection, first, &answer.payload, fd, SendFlags::DONTWAIT).is_ok()
}

// === impl Kept ===

impl Kept {
    fn answer(&mut self, packet: Packet) -> Result<Answer, Refusal> {
        let Packet { bytes, fds, whole } = packet;
        let (Some((first, name)), true) = (bytes.split_first(), whole) else { return Err(Refusal::Request) };
        let operation = Operation::of(*first).ok_or(Refusal::Request)?;
        let fd = match (operation, <[OwnedFd; 1]>::try_from(fds)) {
            (Operation::Put, Ok([fd])) => Some(fd),
            (Operation::Put, Err(_)) | (_, Ok(_)) => return Err(Refusal::Descriptors),
            (_, Err(fds)) if !fds.is_empty() => return Err(Refusal::Descriptors),
            (_, Err(_)) => None,
        };
        let mut answer = Answer { outcome: Ok(()), payload: Vec::new(), fd: None, exit: false };
        match (operation, fd) {
            (Operation::Hello, _) => {
                answer.payload.push(VERSION);
                answer.payload.extend(std::process::id().to_le_bytes());
            }
            (Operation::Put, fd) => {
                let name = valid(name)?;
                let fd = fd.ok_or(Refusal::Descriptors)?;
                let full = self.descriptors.len() >= self.descriptors_max;
                if full && !self.descriptors.contains_key(name) {
                    return Err(Refusal::Full);
                }
                self.descriptors.insert(name.to_owned(), fd);
            }
            (Operation::Get, _) => {
                let fd = self.descriptors.get(valid(name)?).ok_or(Refusal::Unknown)?;
                answer.fd = Some(fd.try_clone().map_err(|_| Refusal::Full)?);
            }
            (Operation::Remove, _) => {
                self.descriptors.remove(valid(name)?).ok_or(Refusal::Unknown)?;
            }
            (Operation::Exit, _) => answer.exit = true,
            (Operation::Next, _) => {
                let behind = if name.is_empty() { "" } else { valid(name)? };
                let behind = (Bound::Excluded(behind), Bound::Unbounded);
                let (next, _) = self.descriptors.range::<str, _>(behind).next().ok_or(Refusal::Unknown)?;
                answer.payload.extend(next.as_bytes());
            }
        }
        Ok(answer)
    }
}

fn valid(name: &[u8]) -> Result<&str, Refusal> {
    let text = std::str::from_utf8(name).map_err(|_| Refusal::Name)?;
    let good = (1..=NAME_BYTES_MAX).contains(&name.len()) && !text.chars().any(char::is_control);
    if good { Ok(text) } else { Err(Refusal::Name) }
}

/// Raises the limit of open files as far as it goes. Returns how many are left to be kept.
fn raise_limit() -> usize {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    // Refused: then what there is counts.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let now = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(now.saturating_sub(OWN_DESCRIPTORS)).unwrap_or(usize::MAX)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, thread};

    use super::*;

    struct Bed {
        dir: tempfile::TempDir,
        keeper: Option<thread::JoinHandle<io::Result<()>>>,
    }

    fn limits() -> Limits {
        Limits { patience: Duration::from_secs(60), descriptors_max: 3, connections_max: 2 }
    }

    impl Bed {
        fn new(limits: Limits) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let listener = Listener::bind(&dir.path().join("k.sock")).unwrap();
            let keeper = Some(thread::spawn(move || serve(&listener, limits)));
            Self { dir, keeper }
        }

        fn connect(&self) -> OwnedFd {
            wire::connect(&self.dir.path().join("k.sock")).unwrap()
        }

        fn end(mut self) {
            self.keeper.take().unwrap().join().unwrap().unwrap();
        }
    }

    fn ask(socket: &OwnedFd, first: u8, name: &[u8], fd: Option<&OwnedFd>) -> Result<Packet, Refusal> {
        wire::send(socket, first, name, fd.map(AsFd::as_fd), SendFlags::empty()).unwrap();
        let packet = wire::receive(socket, RecvFlags::empty()).unwrap().expect("an answer");
        if packet.bytes[0] == 0 { Ok(packet) } else { Err(Refusal::of(packet.bytes[0])) }
    }

    fn file(content: &str) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, content.as_bytes(), 0).unwrap();
        file.into()
    }

    fn content(mut packet: Packet) -> String {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 100];
        let n = File::from(packet.fds.pop().expect("a descriptor")).read_at(&mut bytes, 0).unwrap();
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    }

    #[test]
    fn what_is_put_can_be_had_until_it_is_removed() {
        let bed = Bed::new(limits());
        let socket = bed.connect();
        let hello = ask(&socket, Operation::Hello as u8, b"", None).unwrap();
        assert_eq!(hello.bytes[1..], [&[VERSION][..], &std::process::id().to_le_bytes()].concat());
        let (put, get, remove) = (2, 3, 4);
        ask(&socket, put, b"a", Some(&file("one"))).unwrap();
        ask(&socket, put, b"b", Some(&file("two"))).unwrap();
        // Another connection, as of the next node.
        drop(socket);
        let socket = bed.connect();
        assert_eq!(content(ask(&socket, get, b"a", None).unwrap()), "one");
        assert_eq!(content(ask(&socket, get, b"a", None).unwrap()), "one", "a copy");
        ask(&socket, put, b"a", Some(&file("three"))).unwrap();
        assert_eq!(content(ask(&socket, get, b"a", None).unwrap()), "three");
        ask(&socket, remove, b"a", None).unwrap();
        assert_eq!(ask(&socket, get, b"a", None).unwrap_err(), Refusal::Unknown);
        assert_eq!(ask(&socket, remove, b"a", None).unwrap_err(), Refusal::Unknown);
        ask(&socket, Operation::Exit as u8, b"", None).unwrap();
        bed.end();
    }

    #[test]
    fn what_is_refused_costs_nothing() {
        let bed = Bed::new(limits());
        let socket = bed.connect();
        let some = file("x");
        let (put, get) = (2, 3);
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        ask(&socket, put, b"0", Some(&some)).unwrap();
        let before = open();
        for _ in 0..100 {
            assert_eq!(ask(&socket, put, b"", Some(&some)).unwrap_err(), Refusal::Name);
            assert_eq!(ask(&socket, put, &[b'n'; 65], Some(&some)).unwrap_err(), Refusal::Name);
            assert_eq!(ask(&socket, put, b"two\nlines", Some(&some)).unwrap_err(), Refusal::Name);
            assert_eq!(ask(&socket, put, &[0xff], Some(&some)).unwrap_err(), Refusal::Name);
            assert_eq!(ask(&socket, put, b"none", None).unwrap_err(), Refusal::Descriptors);
            assert_eq!(ask(&socket, get, b"0", Some(&some)).unwrap_err(), Refusal::Descriptors);
            assert_eq!(ask(&socket, 99, b"?", None).unwrap_err(), Refusal::Request);
            let long = vec![b'x'; wire::PACKET_BYTES_MAX + 1];
            assert_eq!(ask(&socket, put, &long, Some(&some)).unwrap_err(), Refusal::Request);
            ask(&socket, put, b"0", Some(&some)).unwrap();
        }
        assert_eq!(open(), before, "descriptors that were refused or replaced are closed");
        ask(&socket, put, b"1", Some(&some)).unwrap();
        ask(&socket, put, b"2", Some(&some)).unwrap();
        assert_eq!(ask(&socket, put, b"3", Some(&some)).unwrap_err(), Refusal::Full);
        ask(&socket, put, b"2", Some(&some)).expect("in its place");

        // What there is.
        let next = |behind: &[u8]| ask(&socket, 6, behind, None).map(|packet| packet.bytes[1..].to_vec());
        let names: Vec<_> = std::iter::successors(next(b"").ok(), |name| next(name).ok()).collect();
        assert_eq!(names, [b"0", b"1", b"2"]);
        assert_eq!(next(b"2"), Err(Refusal::Unknown));
        assert_eq!(next(&[0xff]), Err(Refusal::Name));

        // A third connection is one too many; a closed one makes room.
        let second = bed.connect();
        ask(&second, Operation::Hello as u8, b"", None).unwrap();
        let third = bed.connect();
        assert!(wire::receive(&third, RecvFlags::empty()).map_or(true, |packet| packet.is_none()));
        ask(&second, Operation::Exit as u8, b"", None).unwrap();
        bed.end();
    }

    #[test]
    fn it_ends_when_nobody_comes_back() {
        let patience = Duration::from_millis(200);
        let bed = Bed::new(Limits { patience, ..limits() });
        let socket = bed.connect();
        ask(&socket, 2, b"a", Some(&file("x"))).unwrap();
        // Longer than its patience, which doesn't count while somebody is there.
        thread::sleep(2 * patience);
        ask(&socket, 3, b"a", None).expect("still there");
        drop(socket);
        bed.end();
        let unused = Bed::new(Limits { patience, ..limits() });
        unused.end();
    }

    #[test]
    fn a_socket_that_a_dead_keeper_left_is_no_hindrance() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.sock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&path), Err(super::super::KeeperError::Taken { .. })));
        drop(listener);
        let again = Listener::bind(&path).unwrap();
        assert!(Listener::inherited(again.into()).is_ok());
        assert!(Listener::inherited(file("x")).is_err());
    }
}
