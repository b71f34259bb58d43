//! File descriptors that come with frames (`SCM_RIGHTS`).
//!
//! A plain read of a socket drops descriptors that came with the bytes, so whoever may get some reads through a
//! [`DescriptorReader`]. Descriptors are sent with a frame's first bytes and received no later than its last.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::{
    io::{AsyncRead, Interest, ReadBuf},
    net::UnixStream,
};

use crate::frame::{FrameError, encode_frame};

/// Most descriptors of one frame. The kernel takes at most 253 at once.
pub const DESCRIPTORS_MAX: usize = 128;

/// Reads a socket's bytes and keeps the descriptors that come with them.
#[derive(Debug)]
pub struct DescriptorReader<S> {
    socket: S,
    received: VecDeque<OwnedFd>,
}

/// Sends one frame with descriptors. Not cancel-safe: a cancelled call leaves the peer within a frame.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::Io`]; `InvalidInput` in it for more than [`DESCRIPTORS_MAX`] descriptors.
pub async fn send_with_descriptors<M: Message>(
    socket: &UnixStream,
    message: &M,
    descriptors: &[OwnedFd],
) -> Result<(), FrameError> {
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    }
    let mut frame = BytesMut::new();
    encode_frame(message, &mut frame)?;
    let mut sent = 0;
    while sent < frame.len() {
        // With the first bytes; the rest of the frame has none.
        let with = if sent == 0 { descriptors } else { &[] };
        socket.writable().await?;
        match socket.try_io(Interest::WRITABLE, || send_some(socket, &frame[sent..], with)) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn send_some(socket: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no space for the descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags))?)
}

// === impl DescriptorReader ===

impl<S> DescriptorReader<S> {
    /// Reads from `socket`.
    pub fn new(socket: S) -> Self {
        Self { socket, received: VecDeque::new() }
    }

    /// The first `count` descriptors that have not been taken; `None`, and they stay, when there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        (count <= self.received.len()).then(|| self.received.drain(..count).collect())
    }
}

impl<S: AsRef<UnixStream> + Unpin> AsyncRead for DescriptorReader<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { socket, received } = self.get_mut();
        let socket = (*socket).as_ref();
        loop {
            ready!(socket.poll_read_ready(context))?;
            let space = into.initialize_unfilled();
            match socket.try_io(Interest::READABLE, || receive_some(socket, space, received)) {
                Ok(bytes) => {
                    into.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

fn receive_some(socket: &UnixStream, into: &mut [u8], received: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got =
        rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(into)], &mut ancillary, flags))?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            received.extend(rights);
        }
    }
    // A frame's descriptors are taken with the frame, so no more than those of two frames can wait.
    if got.flags.contains(ReturnFlags::CTRUNC) || received.len() > 2 * DESCRIPTORS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors than a frame has"));
    }
    Ok(got.bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
    };

    use super::*;
    use crate::{
        FrameReader, FrameWriter,
        control::{Load, Ping, ToWorker, to_worker},
    };

    fn file(text: &str) -> OwnedFd {
        let mut file: File = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    }

    fn text(fd: OwnedFd) -> String {
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn descriptors_come_with_their_frames() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (read, _write) = theirs.into_split();
        let mut reader = FrameReader::new(DescriptorReader::new(read));
        // Longer than a socket's buffer: it comes in many pieces.
        let load = Load { manifest_json: vec![7; 3 << 20].into(), ..Load::default() };
        let load = ToWorker { kind: Some(to_worker::Kind::Load(load)) };
        let ping = ToWorker { kind: Some(to_worker::Kind::Ping(Ping { number: 1 })) };
        let (sent, expected) = (load.clone(), ping.clone());
        let sending = tokio::spawn(async move {
            send_with_descriptors(&ours, &sent, &[file("a"), file("b")]).await.unwrap();
            FrameWriter::new(&mut ours).send(&ping).await.unwrap();
            send_with_descriptors(&ours, &sent, &[file("c")]).await.unwrap();
        });
        assert_eq!(reader.next::<ToWorker>().await.unwrap().as_ref(), Some(&load));
        let mut taken = reader.inner_mut().take(2).unwrap();
        assert_eq!((text(taken.remove(0)), text(taken.remove(0))), ("a".to_owned(), "b".to_owned()));
        assert_eq!(reader.next::<ToWorker>().await.unwrap(), Some(expected));
        assert_eq!(reader.next::<ToWorker>().await.unwrap(), Some(load));
        assert!(reader.inner_mut().take(2).is_none(), "there is one");
        assert_eq!(text(reader.inner_mut().take(1).unwrap().remove(0)), "c");
        sending.await.unwrap();
        assert!(reader.next::<ToWorker>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn whoever_sends_descriptors_without_end_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut reader = FrameReader::new(DescriptorReader::new(theirs.into_split().0));
        let ping = ToWorker { kind: Some(to_worker::Kind::Ping(Ping { number: 1 })) };
        let many: Vec<_> = (0..DESCRIPTORS_MAX).map(|_| file("")).collect();
        for _ in 0..3 {
            send_with_descriptors(&ours, &ping, &many).await.unwrap();
        }
        let mut outcomes = Vec::new();
        for _ in 0..3 {
            outcomes.push(reader.next::<ToWorker>().await.is_ok());
        }
        assert!(outcomes.contains(&false), "{outcomes:?}");
        let more: Vec<_> = (0..=DESCRIPTORS_MAX).map(|_| file("")).collect();
        assert!(send_with_descriptors(&ours, &ping, &more).await.is_err());
    }
}
