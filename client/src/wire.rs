//! Requests and replies as bytes: no I/O, no socket, no clock, so that whatever moves the bytes can share it.
//!
//! Buffers are made with the size of the whole frame and never grow: a vector that grows leaves copies of secrets.

use std::time::Duration;

use kms_protocol::{
    FRAME_MAX, Frame, FrameHead, KeyRef, Malformed, NoFields, Opcode, Refusal, Request, Status, Welcome,
    begin_frame, decode_fields, frame_len,
};
use kms_secret_memory::SecretVec;
use zeroize::Zeroize;

use crate::error::{Error, ReplyError};

/// Holds a hello's reply and every other reply without data, so that such a reply takes one call.
const INBOX_LEN: usize = 8 * 1024;

/// The frame of a request.
///
/// # Errors
/// [`Error::TooLong`] when it would be longer than `frame_max`.
pub(crate) fn encode(request: &Request<'_>, id: u32, frame_max: usize) -> Result<SecretVec, Error> {
    let code = request.opcode().code();
    macro_rules! frame {
        ($fields:expr, $payload:expr) => {{
            let payload: &[u8] = $payload;
            let len = frame_len($fields, payload.len()).ok().filter(|len| *len <= frame_max);
            let len = len.ok_or(Error::TooLong { what: "request", max: frame_max })?;
            let mut bytes = SecretVec::with_capacity(len);
            let out = bytes.as_mut_slice();
            begin_frame(out, code, id, $fields, payload.len())
                .and_then(|slot| out.get_mut(slot.payload).ok_or(Malformed))
                .map_err(|_| Error::TooLong { what: "request", max: frame_max })?
                .copy_from_slice(payload);
            Ok(bytes)
        }};
    }
    match request {
        Request::Hello(fields) => frame!(fields, &[]),
        Request::Ping | Request::Status | Request::Stats => frame!(&NoFields {}, &[]),
        Request::Lock { passphrase } | Request::Unlock { passphrase } => frame!(&NoFields {}, passphrase),
        Request::Add { fields, material } => frame!(fields, material),
        Request::List(fields) => frame!(fields, &[]),
        Request::Describe(fields) => frame!(fields, &[]),
        Request::Remove(fields) => frame!(fields, &[]),
        Request::Encrypt { fields, plaintext } => frame!(fields, plaintext),
        Request::Decrypt { fields, ciphertext } => frame!(fields, ciphertext),
        Request::StreamNew(fields) | Request::RemoteStreamNew(fields) => frame!(fields, &[]),
        Request::StreamOpen { fields, head } | Request::RemoteStreamOpen { fields, head } => {
            frame!(fields, head)
        }
        Request::RemoteStreamEncrypt { stream, plaintext } => {
            frame!(&kms_protocol::RemoteStream { stream: *stream }, plaintext)
        }
        Request::RemoteStreamDecrypt { fields, chunks } => frame!(fields, chunks),
        Request::RemoteStreamClose(fields) => frame!(fields, &[]),
        Request::Rotate(fields) => frame!(fields, &[]),
        Request::Rename(fields) => frame!(fields, &[]),
        Request::RemoveAll(fields) => frame!(fields, &[]),
        Request::Export { fields, passphrase } => frame!(fields, passphrase),
        Request::Wrap { fields, plaintext } => frame!(fields, plaintext),
        Request::Unwrap { fields, ciphertext } => frame!(fields, ciphertext),
        Request::DataKey(fields) | Request::DataKeyWrapped(fields) => frame!(fields, &[]),
        Request::Rewrap { fields, ciphertext } => frame!(fields, ciphertext),
        Request::Verify { fields, ciphertext } => frame!(fields, ciphertext),
        Request::Mac { fields, digest } => frame!(fields, digest),
        Request::MacVerify { fields, tag_and_digest } => frame!(fields, tag_and_digest),
        Request::Random(fields) => frame!(fields, &[]),
        Request::Bind(fields) => frame!(fields, &[]),
        Request::Batch { frames } => frame!(&NoFields {}, frames),
    }
}

/// A whole reply, wiped on drop: it may carry keys or plaintext.
pub(crate) struct Reply {
    bytes: SecretVec,
}

impl Reply {
    /// `bytes` is exactly one frame.
    pub(crate) fn new(bytes: SecretVec) -> Self {
        Self { bytes }
    }

    /// The buffer, to be used again.
    pub(crate) fn into_buffer(self) -> SecretVec {
        self.bytes
    }

    /// The id of the request that it answers.
    pub(crate) fn id(&self) -> Result<u32, ReplyError> {
        Ok(self.frame()?.head.request_id)
    }

    /// Fields and payload of the reply to request `id`.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Reply`] when the frame is no answer to that request.
    pub(crate) fn accept(&self, operation: Opcode, id: u32) -> Result<Accepted<'_>, Error> {
        accept(&self.frame()?, operation, id)
    }

    fn frame(&self) -> Result<Frame<'_>, ReplyError> {
        let bytes = self.bytes.expose_secret();
        Frame::parse(bytes, bytes.len())?.ok_or(ReplyError::Shape)
    }
}

/// As [`Reply::accept`], of a frame wherever it lies.
pub(crate) fn accept<'a>(frame: &Frame<'a>, operation: Opcode, id: u32) -> Result<Accepted<'a>, Error> {
    if frame.head.request_id != id {
        return Err(ReplyError::RequestId.into());
    }
    match Status::from_code(frame.head.code) {
        None => Err(ReplyError::Status(frame.head.code).into()),
        Some(Status::Ok) => Ok(Accepted { fields: frame.fields, payload: frame.payload }),
        Some(status) => {
            let Ok(Refusal { retry_after_ms }) = decode_fields(frame.fields) else {
                return Err(ReplyError::Shape.into());
            };
            if !frame.payload.is_empty() {
                return Err(ReplyError::Shape.into());
            }
            let retry_after = Duration::from_millis(retry_after_ms.into());
            Err(Error::Refused { operation, status, retry_after })
        }
    }
}

/// A reply whose status is `ok`.
#[derive(Clone, Copy)]
pub(crate) struct Accepted<'a> {
    fields: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Accepted<'a> {
    /// The fields of a reply without payload.
    pub(crate) fn fields<T>(self, decode: fn(&'a [u8]) -> Result<T, Malformed>) -> Result<T, ReplyError> {
        if !self.payload.is_empty() {
            return Err(ReplyError::Shape);
        }
        decode(self.fields).map_err(|_| ReplyError::Shape)
    }

    /// The payload of a reply without fields.
    pub(crate) fn payload(self) -> Result<&'a [u8], ReplyError> {
        let NoFields {} = decode_fields(self.fields).map_err(|_| ReplyError::Shape)?;
        Ok(self.payload)
    }

    /// Both.
    pub(crate) fn parts<T>(
        self,
        decode: fn(&'a [u8]) -> Result<T, Malformed>,
    ) -> Result<(T, &'a [u8]), ReplyError> {
        Ok((decode(self.fields).map_err(|_| ReplyError::Shape)?, self.payload))
    }
}

/// A frame that is ready to go, under whatever id it is given at last.
pub(crate) struct Outgoing {
    pub(crate) operation: Opcode,
    frame: SecretVec,
    /// The numbers by which it names keys.
    pub(crate) bound: [Option<u32>; 2],
    /// The number that it binds.
    pub(crate) binds: Option<u32>,
}

impl Outgoing {
    /// # Errors
    /// [`Error::TooLong`] when no agent would take the frame.
    pub(crate) fn new(request: &Request<'_>) -> Result<Self, Error> {
        let binds = match request {
            Request::Bind(bind) => Some(bind.number),
            _ => None,
        };
        let frame = encode(request, 0, FRAME_MAX)?;
        Ok(Self { operation: request.opcode(), frame, bound: bound_numbers(request), binds })
    }

    //= docs/protocol.md#21-head
    //# in a request any number, in a reply that of the request
    /// Gives it an id.
    pub(crate) fn set_id(&mut self, id: u32) {
        let len = self.frame.len();
        if let Some(place) = self.frame.as_mut_slice().get_mut(8..12) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        self.frame.truncate(len);
    }

    /// The whole frame.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.frame.expose_secret()
    }
}

/// The numbers by which a request names bound keys.
pub(crate) fn bound_numbers(request: &Request<'_>) -> [Option<u32>; 2] {
    let number = |key: &KeyRef<'_>| match key {
        KeyRef::Bound(number) => Some(*number),
        KeyRef::Name(_) | KeyRef::Id(_) => None,
    };
    let key = match request {
        Request::Hello(_)
        | Request::Ping
        | Request::Status
        | Request::Stats
        | Request::Lock { .. }
        | Request::Unlock { .. }
        | Request::Add { .. }
        | Request::List(_)
        | Request::RemoveAll(_)
        | Request::RemoteStreamEncrypt { .. }
        | Request::RemoteStreamDecrypt { .. }
        | Request::RemoteStreamClose(_)
        | Request::Random(_)
        // Of its items, whoever puts them together knows.
        | Request::Batch { .. } => return [None; 2],
        Request::Rewrap { fields, .. } => return [number(&fields.key), fields.to.as_ref().and_then(number)],
        Request::Describe(fields) => &fields.key,
        Request::Remove(fields) => &fields.key,
        Request::Rotate(fields) => &fields.key,
        Request::Rename(fields) => &fields.key,
        Request::Export { fields, .. } => &fields.key,
        Request::DataKey(fields) | Request::DataKeyWrapped(fields) => &fields.key,
        Request::Bind(fields) => &fields.key,
        Request::StreamNew(fields)
        | Request::RemoteStreamNew(fields)
        | Request::Encrypt { fields, .. }
        | Request::Decrypt { fields, .. }
        | Request::StreamOpen { fields, .. }
        | Request::RemoteStreamOpen { fields, .. }
        | Request::Wrap { fields, .. }
        | Request::Unwrap { fields, .. }
        | Request::Verify { fields, .. }
        | Request::Mac { fields, .. }
        | Request::MacVerify { fields, .. } => &fields.key,
    };
    [number(key), None]
}

/// The longest frame that both sides take.
pub(crate) fn frame_max(welcome: &Welcome) -> usize {
    usize::try_from(welcome.frame_max).unwrap_or(FRAME_MAX).min(FRAME_MAX)
}

/// Whether a request may be sent again when nobody knows whether it was carried out: it changes nothing, or carries a token.
/// A second `lock` would say that the agent was locked before, and a second `unlock` would be another attempt; the requests of a
/// stream through the agent have an order, and their stream ends with the connection.
pub(crate) fn is_repeatable(operation: Opcode) -> bool {
    !matches!(
        operation,
        Opcode::Lock
            | Opcode::Unlock
            | Opcode::RemoteStreamEncrypt
            | Opcode::RemoteStreamDecrypt
            | Opcode::RemoteStreamClose
    )
}

/// Makes frames of what arrives, in whatever pieces. A frame is collected in a buffer of its own length; what arrived behind it
/// waits in the inbox.
pub(crate) struct Assembler {
    inbox: Inbox,
    frame_max: usize,
    partial: Option<Partial>,
}

/// A frame that has not all arrived.
struct Partial {
    bytes: SecretVec,
    len: usize,
    have: usize,
}

impl Assembler {
    pub(crate) fn new(frame_max: usize) -> Self {
        Self { inbox: Inbox::new(), frame_max, partial: None }
    }

    pub(crate) fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
    }

    /// Nothing has arrived that was not taken.
    pub(crate) fn is_between_frames(&self) -> bool {
        self.partial.is_none() && self.inbox.filled().is_empty()
    }

    /// The next whole frame, as soon as it is there; `spare` is used for it when it is large enough. To be asked before
    /// [`room`](Self::room).
    ///
    /// # Errors
    /// A head that no reply has. No memory was taken for it.
    pub(crate) fn next(&mut self, spare: &mut Option<SecretVec>) -> Result<Option<SecretVec>, ReplyError> {
        if self.partial.is_none() {
            let Some(head) = FrameHead::parse(self.inbox.filled(), self.frame_max)? else { return Ok(None) };
            // At most the ceiling: `parse` has compared it.
            let len = usize::try_from(head.frame_len()).map_err(|_| ReplyError::Shape)?;
            let bytes = spare.take().filter(|spare| spare.capacity() >= len);
            let bytes = bytes.unwrap_or_else(|| SecretVec::with_capacity(len));
            self.partial = Some(Partial { bytes, len, have: 0 });
        }
        if let Some(partial) = &mut self.partial {
            let rest = partial.bytes.as_mut_slice().get_mut(partial.have..partial.len).unwrap_or_default();
            partial.have = partial.have.saturating_add(self.inbox.take(rest));
        }
        Ok(self.partial.take_if(|partial| partial.have == partial.len).map(|mut whole| {
            whole.bytes.truncate(whole.len);
            whole.bytes
        }))
    }

    /// Where what arrives next belongs; never empty.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        match &mut self.partial {
            Some(partial) => {
                partial.bytes.as_mut_slice().get_mut(partial.have..partial.len).unwrap_or_default()
            }
            None => self.inbox.room(),
        }
    }

    /// `len` bytes more have arrived in [`room`](Self::room).
    pub(crate) fn filled(&mut self, len: usize) {
        let have = match &mut self.partial {
            Some(partial) => &mut partial.have,
            None => &mut self.inbox.end,
        };
        *have = have.saturating_add(len);
    }
}

/// What arrived beyond the frame in hand.
struct Inbox {
    bytes: Box<[u8; INBOX_LEN]>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn new() -> Self {
        Self { bytes: Box::new([0; INBOX_LEN]), start: 0, end: 0 }
    }

    fn filled(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Where more can be read to; never empty while less than the head of a frame is there.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            let len = self.end.saturating_sub(self.start);
            if let Some(left) = self.bytes.get_mut(len..self.end) {
                left.zeroize();
            }
            (self.start, self.end) = (0, len);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Moves bytes to `out` and says how many.
    fn take(&mut self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.end.saturating_sub(self.start));
        let end = self.start.saturating_add(len);
        if let (Some(from), Some(to)) = (self.bytes.get_mut(self.start..end), out.get_mut(..len)) {
            to.copy_from_slice(from);
            from.zeroize();
        }
        self.start = end;
        len
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}
