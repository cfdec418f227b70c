//! Requests and replies as bytes: no I/O, no socket, no clock, so that whatever moves the bytes can share it.
//!
//! Buffers are made with the size of the whole frame and never grow: a vector that grows leaves copies of secrets.

use std::time::Duration;

use kms_protocol::{
    Frame, Malformed, NoFields, Opcode, Refusal, Request, Status, begin_frame, decode_fields, frame_len,
};
use kms_secret_memory::SecretVec;

use crate::error::{Error, ReplyError};

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

    /// Fields and payload of the reply to request `id`.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Reply`] when the frame is no answer to that request.
    pub(crate) fn accept(&self, operation: Opcode, id: u32) -> Result<Accepted<'_>, Error> {
        let bytes = self.bytes.expose_secret();
        let frame = Frame::parse(bytes, bytes.len()).map_err(ReplyError::Frame)?.ok_or(ReplyError::Shape)?;
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
