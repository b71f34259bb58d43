//! Length-prefixed protobuf frames over any byte stream.

use bytes::{Buf, BufMut, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest frame, in bytes: a load order of a model with a hundred thousand tensors fits many times over.
pub const FRAME_BYTES_MAX: usize = 64 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("connection failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer closed the connection in the middle of a frame.
    #[error("connection closed within a frame, {missing} bytes short")]
    Truncated {
        /// Bytes that did not come.
        missing: usize,
    },
    /// A length above [`FRAME_BYTES_MAX`]: the peer is broken or not a Stoker process.
    #[error("a frame of {len} bytes, above the limit of {FRAME_BYTES_MAX}")]
    TooLong {
        /// The length that was announced.
        len: usize,
    },
    /// The bytes are no such message.
    #[error("frame does not decode: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Reads frames. Not cancel-safe in the middle of [`FrameReader::next`] unless the reader is kept: bytes that have
/// arrived stay in its buffer, so calling `next` again goes on where it was.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: BytesMut,
}

/// Writes frames; one system call per [`FrameWriter::flush`].
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    buffer: BytesMut,
}

/// Appends one frame to `buffer`.
///
/// # Errors
/// [`FrameError::TooLong`] when the message is above [`FRAME_BYTES_MAX`].
pub fn encode_frame<M: Message>(message: &M, buffer: &mut BytesMut) -> Result<(), FrameError> {
    let len = message.encoded_len();
    if len > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { len });
    }
    buffer.reserve(4 + len);
    #[expect(clippy::cast_possible_truncation, reason = "bounded by FRAME_BYTES_MAX")]
    buffer.put_u32_le(len as u32);
    message.encode_raw(buffer);
    Ok(())
}

// === impl FrameReader ===

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, buffer: BytesMut::with_capacity(16 << 10) }
    }

    /// What it reads from.
    pub fn inner_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The next message; `None` when the peer closed the connection between frames. Cancel-safe: what has arrived is
    /// kept for the next call.
    ///
    /// # Errors
    /// [`FrameError`]; the connection is of no use afterwards.
    pub async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        loop {
            let mut missing = 4;
            if let Some(header) = self.buffer.first_chunk::<4>() {
                let len = u32::from_le_bytes(*header) as usize;
                if len > FRAME_BYTES_MAX {
                    return Err(FrameError::TooLong { len });
                }
                if self.buffer.len() >= 4 + len {
                    self.buffer.advance(4);
                    return Ok(Some(M::decode(self.buffer.split_to(len))?));
                }
                missing = 4 + len;
                // No more than a page beyond what has arrived is reserved on the word of a length alone.
                self.buffer.reserve((missing - self.buffer.len()).min(1 << 20));
            }
            if self.inner.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(FrameError::Truncated { missing: missing - self.buffer.len() })
                };
            }
        }
    }
}

// === impl FrameWriter ===

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes frames to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: BytesMut::with_capacity(16 << 10) }
    }

    /// What it writes to.
    pub fn inner(&self) -> &W {
        &self.inner
    }

    /// What it writes to. What was pushed and not flushed is lost.
    pub fn into_inner(self) -> W {
        self.inner
    }

    /// Adds a message to what the next [`flush`](Self::flush) sends.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn push<M: Message>(&mut self, message: &M) -> Result<(), FrameError> {
        encode_frame(message, &mut self.buffer)
    }

    /// Sends what was pushed. Not cancel-safe: a cancelled flush leaves the peer within a frame.
    ///
    /// # Errors
    /// [`FrameError::Io`].
    pub async fn flush(&mut self) -> Result<(), FrameError> {
        self.inner.write_all_buf(&mut self.buffer).await?;
        self.inner.flush().await?;
        Ok(())
    }

    /// [`push`](Self::push) and [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`FrameError`].
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), FrameError> {
        self.push(message)?;
        self.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{Abort, ToWorker, to_worker};

    fn message(stream: u64) -> ToWorker {
        ToWorker { kind: Some(to_worker::Kind::Abort(Abort { stream })) }
    }

    #[tokio::test]
    async fn frames_cross_a_connection_in_order() {
        let (a, b) = tokio::io::duplex(7);
        let writing = tokio::spawn(async move {
            let mut writer = FrameWriter::new(a);
            for stream in 0..100 {
                writer.push(&message(stream)).unwrap();
            }
            writer.flush().await.unwrap();
        });
        let mut reader = FrameReader::new(b);
        for stream in 0..100 {
            assert_eq!(reader.next::<ToWorker>().await.unwrap(), Some(message(stream)));
        }
        assert_eq!(reader.next::<ToWorker>().await.unwrap(), None);
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_is_buffered() {
        let mut reader = FrameReader::new(&[0xff, 0xff, 0xff, 0xff, 1][..]);
        assert!(matches!(reader.next::<ToWorker>().await, Err(FrameError::TooLong { .. })));
    }

    #[tokio::test]
    async fn a_cut_frame_is_an_error() {
        let mut buffer = BytesMut::new();
        encode_frame(&message(300), &mut buffer).unwrap();
        buffer.truncate(buffer.len() - 1);
        let mut reader = FrameReader::new(&buffer[..]);
        assert!(matches!(reader.next::<ToWorker>().await, Err(FrameError::Truncated { missing: 1 })));
    }

    #[tokio::test]
    async fn bytes_that_are_no_message_are_an_error() {
        let mut reader = FrameReader::new(&[2, 0, 0, 0, 0xff, 0xff][..]);
        assert!(matches!(reader.next::<ToWorker>().await, Err(FrameError::Decode(_))));
    }
}
