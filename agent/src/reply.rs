//! Where replies are written: a locked buffer that grows as they need it and is wiped once they are sent.
//!
//! The one place through which an answer leaves the core.

use kms_protocol::{FRAME_MAX, Malformed, NoFields, Refusal, Status, begin_frame, frame_len};
use kms_secret_memory::{LockedBuffer, Policy, RegionError};
use thiserror::Error;

/// Bytes that the buffer keeps when it is idle; larger ones are given back.
const IDLE_LEN: usize = 64 * 1024;

/// Once so many bytes of replies wait, they are sent before the next request is read.
pub(crate) const FLUSH_LEN: usize = 64 * 1024;

/// Why a reply cannot be written.
#[derive(Debug, Error)]
pub(crate) enum ReplyError {
    /// No more locked memory.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// Longer than a frame.
    #[error("the reply is longer than a frame")]
    Frame(#[from] Malformed),
}

/// Replies that wait to be sent.
pub struct Replies {
    buffer: LockedBuffer,
    filled: usize,
    frame_max: usize,
}

impl Replies {
    /// An empty buffer of 64 KiB.
    ///
    /// # Errors
    /// No locked memory.
    pub fn new(memory: Policy) -> Result<Self, RegionError> {
        Ok(Self { buffer: LockedBuffer::new(IDLE_LEN, memory)?, filled: 0, frame_max: FRAME_MAX })
    }

    /// The bytes to be sent.
    #[must_use]
    pub fn waiting(&self) -> &[u8] {
        self.buffer.expose_secret().get(..self.filled).unwrap_or_default()
    }

    /// Wipes what was there and makes room again.
    pub fn clear(&mut self) {
        self.buffer.wipe_range(0..self.filled);
        self.filled = 0;
    }

    /// Gives memory back that only long replies needed. A failure keeps the larger buffer, which is no harm.
    pub(crate) fn shrink(&mut self, memory: Policy) {
        if self.filled == 0
            && self.buffer.len() > IDLE_LEN
            && let Ok(smaller) = LockedBuffer::new(IDLE_LEN, memory)
        {
            self.buffer = smaller;
        }
    }

    /// No reply becomes longer than this, as no request may be.
    pub(crate) fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
    }

    /// Appends a reply with status `ok`. `write` fills in the payload; when it fails, nothing was appended.
    pub(crate) fn push<T: bincode::Encode, E>(
        &mut self,
        request_id: u32,
        fields: &T,
        payload_len: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ReplyError> {
        let start = self.filled;
        let len = frame_len(fields, payload_len)?;
        if len > self.frame_max {
            return Err(Malformed.into());
        }
        let end = start.saturating_add(len);
        if end > self.buffer.len() {
            let ceiling = FLUSH_LEN.saturating_add(FRAME_MAX);
            self.buffer.grow(end.next_power_of_two().min(ceiling).max(end))?;
        }
        let frame = self.buffer.expose_secret_mut().get_mut(start..end).ok_or(Malformed)?;
        let slot = begin_frame(frame, Status::Ok.code(), request_id, fields, payload_len)?;
        let written = write(frame.get_mut(slot.payload).ok_or(Malformed)?);
        if written.is_ok() {
            self.filled = end;
        } else {
            self.buffer.wipe_range(start..end);
        }
        Ok(written)
    }

    /// Appends a reply without fields or payload.
    pub(crate) fn push_done(&mut self, request_id: u32) -> Result<(), ReplyError> {
        self.push(request_id, &NoFields {}, 0, |_| Ok::<(), Malformed>(()))?.map_err(ReplyError::from)
    }

    /// Appends a refusal.
    pub(crate) fn push_refusal(
        &mut self,
        request_id: u32,
        status: Status,
        retry_after_ms: u32,
    ) -> Result<(), ReplyError> {
        let fields = Refusal { retry_after_ms };
        let start = self.filled;
        let end = start.saturating_add(frame_len(&fields, 0)?);
        if end > self.buffer.len() {
            self.buffer.grow(end)?;
        }
        let frame = self.buffer.expose_secret_mut().get_mut(start..end).ok_or(Malformed)?;
        begin_frame(frame, status.code(), request_id, &fields, 0)?;
        self.filled = end;
        Ok(())
    }
}
