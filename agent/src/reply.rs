//! Where replies are written: a locked buffer that grows as they need it and is wiped once they are sent.
//!
//! The one place through which an answer leaves the core.

use kms_protocol::{FRAME_HEAD_LEN, FRAME_MAX, Malformed, NoFields, Refusal, Status, begin_frame, frame_len};
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
    /// Where a reply has to end that stands in a batch.
    ceiling: Option<usize>,
}

/// A reply to a batch that is being written: where it begins.
pub(crate) struct Batch {
    start: usize,
}

impl Replies {
    /// An empty buffer of 64 KiB.
    ///
    /// # Errors
    /// No locked memory.
    pub fn new(memory: Policy) -> Result<Self, RegionError> {
        Ok(Self {
            buffer: LockedBuffer::new(IDLE_LEN, memory)?,
            filled: 0,
            frame_max: FRAME_MAX,
            ceiling: None,
        })
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
        self.ceiling = None;
    }

    /// The same, and wipes what was being written when a panic came.
    pub(crate) fn clear_all(&mut self) {
        self.buffer.wipe();
        self.clear();
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

    /// Whether a reply would have room, without writing it.
    ///
    /// # Errors
    /// [`ReplyError::Frame`] when it would be longer than a frame, or than what is left in a batch.
    pub(crate) fn check_room<T: bincode::Encode>(
        &self,
        fields: &T,
        payload_len: usize,
    ) -> Result<usize, ReplyError> {
        let len = frame_len(fields, payload_len)?;
        let end = self.filled.saturating_add(len);
        if len > self.frame_max || self.ceiling.is_some_and(|ceiling| end > ceiling) {
            return Err(Malformed.into());
        }
        Ok(end)
    }

    /// Appends a reply with status `ok`. `write` fills in the payload; when it fails, nothing was appended.
    pub(crate) fn push<T: bincode::Encode, E>(
        &mut self,
        request_id: u32,
        fields: &T,
        payload_len: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ReplyError> {
        self.push_beside(request_id, fields, payload_len, 0, |payload, _| write(payload))
    }

    /// The same, with `beside_len` more bytes of locked memory for what `write` works on, wiped when it is done.
    pub(crate) fn push_beside<T: bincode::Encode, E>(
        &mut self,
        request_id: u32,
        fields: &T,
        payload_len: usize,
        beside_len: usize,
        write: impl FnOnce(&mut [u8], &mut [u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ReplyError> {
        let start = self.filled;
        let end = self.check_room(fields, payload_len)?;
        let beside = end.saturating_add(beside_len);
        self.reach(beside)?;
        let frames = self.buffer.expose_secret_mut();
        let (frame, beside_part) = frames
            .get_mut(start..beside)
            .and_then(|room| room.split_at_mut_checked(end.saturating_sub(start)))
            .ok_or(Malformed)?;
        let slot = begin_frame(frame, Status::Ok.code(), request_id, fields, payload_len)?;
        let written = write(frame.get_mut(slot.payload).ok_or(Malformed)?, beside_part);
        if written.is_ok() {
            self.filled = end;
        }
        self.buffer.wipe_range(self.filled..beside);
        Ok(written)
    }

    /// Makes the buffer reach to `end`.
    fn reach(&mut self, end: usize) -> Result<(), RegionError> {
        if end > self.buffer.len() {
            let ceiling = FLUSH_LEN.saturating_add(FRAME_MAX);
            self.buffer.grow(end.next_power_of_two().min(ceiling).max(end))?;
        }
        Ok(())
    }

    /// Begins the reply to a batch; what is pushed until [`end_batch`](Self::end_batch) is its payload. `free` bytes are kept
    /// for refusals.
    pub(crate) fn begin_batch(&mut self, free: usize) -> Result<Batch, ReplyError> {
        let start = self.check_room(&NoFields {}, free)?.saturating_sub(free).saturating_sub(FRAME_HEAD_LEN);
        let end = start.saturating_add(FRAME_HEAD_LEN);
        self.reach(end.saturating_add(free))?;
        self.filled = end;
        let batch = Batch { start };
        self.keep_free(&batch, free);
        Ok(batch)
    }

    /// So many bytes of the batch are kept for refusals from now on.
    pub(crate) fn keep_free(&mut self, batch: &Batch, free: usize) {
        self.ceiling = Some(batch.start.saturating_add(self.frame_max).saturating_sub(free));
    }

    /// Takes back all of the reply to a batch.
    pub(crate) fn cancel_batch(&mut self, batch: Batch) {
        self.ceiling = None;
        self.buffer.wipe_range(batch.start..self.filled);
        self.filled = batch.start;
    }

    /// Ends the reply to a batch.
    pub(crate) fn end_batch(&mut self, batch: Batch, request_id: u32) -> Result<(), ReplyError> {
        self.ceiling = None;
        let payload_len = self.filled.saturating_sub(batch.start).saturating_sub(FRAME_HEAD_LEN);
        let frame = self.buffer.expose_secret_mut().get_mut(batch.start..self.filled).ok_or(Malformed)?;
        begin_frame(frame, Status::Ok.code(), request_id, &NoFields {}, payload_len)?;
        Ok(())
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
        self.reach(end)?;
        let frame = self.buffer.expose_secret_mut().get_mut(start..end).ok_or(Malformed)?;
        begin_frame(frame, status.code(), request_id, &fields, 0)?;
        self.filled = end;
        Ok(())
    }
}
