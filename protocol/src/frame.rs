//! The frame: a head of 16 bytes, the fields, the payload (`docs/protocol.md`, section 2).
//!
//! Lengths from the peer are checked against the ceiling before anything is read by them. A payload is borrowed, never
//! copied and never decoded.

use std::ops::Range;

use bincode::Encode;
use thiserror::Error;

use crate::{
    FRAME_MAX,
    codec::{Malformed, encode_fields, encoded_fields_len},
};

//= docs/protocol.md#2-frame
//# A frame is a head of 16 bytes, the fields, and the payload
/// Length of the head, in bytes.
pub const FRAME_HEAD_LEN: usize = 16;

/// The version of the frame layout, the fifth byte of every frame.
const FRAME_VERSION: u8 = 1;

/// The head of a frame, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Opcode of a request, status of a reply.
    pub code: u16,
    /// Chosen by the client, given back in the reply.
    pub request_id: u32,
    length: u32,
    fields_length: u32,
}

impl FrameHead {
    /// Reads the head at the front of `bytes`; `Ok(None)` while it has not all arrived. `frame_max` is the length of the
    /// longest frame that is taken, head included.
    ///
    /// # Errors
    /// [`FrameError`], which carries the request id when the head shows one.
    pub fn parse(bytes: &[u8], frame_max: usize) -> Result<Option<Self>, FrameError> {
        let Some((head, _)) = bytes.split_first_chunk::<FRAME_HEAD_LEN>() else { return Ok(None) };
        let [l0, l1, l2, l3, version, flags, c0, c1, r0, r1, r2, r3, f0, f1, f2, f3] = *head;
        let head = Self {
            code: u16::from_le_bytes([c0, c1]),
            request_id: u32::from_le_bytes([r0, r1, r2, r3]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            fields_length: u32::from_le_bytes([f0, f1, f2, f3]),
        };
        //= docs/protocol.md#21-head
        //# A receiver MUST check the head in this order and act on the first failure: version, flags, length,
        //# fields length.
        let request_id = head.request_id;
        if version != FRAME_VERSION {
            return Err(FrameError::Version { request_id });
        }
        //= docs/protocol.md#21-head
        //# A flag that is not zero MUST be refused, because a later version will set one only where ignoring
        //# it would be wrong.
        if flags != 0 {
            return Err(FrameError::Flags { request_id });
        }
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# The length MUST be checked against the frame maximum before anything is read or reserved by it.
        if head.frame_len() > frame_max.min(FRAME_MAX) as u64 {
            return Err(FrameError::TooLarge { request_id });
        }
        //= docs/protocol.md#21-head
        //# Fields that are longer than the length MUST be refused.
        if head.fields_length > head.length {
            return Err(FrameError::Fields { request_id });
        }
        Ok(Some(head))
    }

    /// Length of the whole frame, head included, in bytes.
    #[must_use]
    pub fn frame_len(&self) -> u64 {
        FRAME_HEAD_LEN as u64 + u64::from(self.length)
    }
}

/// A whole frame, borrowed from the buffer that it arrived in.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Its head.
    pub head: FrameHead,
    /// The encoded fields.
    pub fields: &'a [u8],
    /// The bytes behind the fields.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    //= docs/protocol.md#1-transport
    //# a receiver MUST take any number of frames from one read, and one frame from any number of reads.
    /// Takes the frame at the front of `bytes`; `Ok(None)` while it has not all arrived.
    ///
    /// # Errors
    /// As [`FrameHead::parse`].
    pub fn parse(bytes: &'a [u8], frame_max: usize) -> Result<Option<Self>, FrameError> {
        let Some(head) = FrameHead::parse(bytes, frame_max)? else { return Ok(None) };
        let body = FRAME_HEAD_LEN..FRAME_HEAD_LEN.saturating_add(head.length as usize);
        let Some((fields, payload)) =
            bytes.get(body).and_then(|body| body.split_at_checked(head.fields_length as usize))
        else {
            return Ok(None);
        };
        Ok(Some(Self { head, fields, payload }))
    }

    /// Length of the whole frame, head included, in bytes.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        FRAME_HEAD_LEN.saturating_add(self.fields.len()).saturating_add(self.payload.len())
    }
}

//= docs/protocol.md#21-head
//# Whatever a later version does, bytes 0 to 11 of a head keep their meaning, so that a refusal finds its
//# request.
/// A head that no frame of this protocol has. The connection ends after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Another frame layout.
    #[error("the frame has a version that is not 1")]
    Version {
        /// From the head.
        request_id: u32,
    },
    /// A flag that is not zero.
    #[error("the frame has a flag that is not zero")]
    Flags {
        /// From the head.
        request_id: u32,
    },
    /// Longer than the ceiling.
    #[error("the frame is longer than the limit")]
    TooLarge {
        /// From the head.
        request_id: u32,
    },
    /// Fields longer than the frame.
    #[error("the fields are longer than the frame")]
    Fields {
        /// From the head.
        request_id: u32,
    },
}

/// Length of a frame with these fields and a payload of `payload_len` bytes, head included.
///
/// # Errors
/// [`Malformed`] when it would be longer than [`FRAME_MAX`].
pub fn frame_len<T: Encode>(fields: &T, payload_len: usize) -> Result<usize, Malformed> {
    let len = FRAME_HEAD_LEN.saturating_add(encoded_fields_len(fields)?).saturating_add(payload_len);
    if len > FRAME_MAX { Err(Malformed) } else { Ok(len) }
}

/// Where in its buffer a frame ends, and where its payload is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadSlot {
    /// Length of the frame, head included, in bytes.
    pub frame_len: usize,
    /// The place of the payload in the buffer.
    pub payload: Range<usize>,
}

/// Writes head and fields to the front of `out` and leaves room for the payload, which the caller fills in.
///
/// # Errors
/// [`Malformed`] when the frame fits neither `out` nor [`FRAME_MAX`].
pub fn begin_frame<T: Encode>(
    out: &mut [u8],
    code: u16,
    request_id: u32,
    fields: &T,
    payload_len: usize,
) -> Result<PayloadSlot, Malformed> {
    let (head, body) = out.split_first_chunk_mut::<FRAME_HEAD_LEN>().ok_or(Malformed)?;
    let fields_len = encode_fields(fields, body)?;
    let length = fields_len.checked_add(payload_len).filter(|length| *length <= FRAME_MAX - FRAME_HEAD_LEN);
    let length = length.filter(|length| *length <= body.len()).ok_or(Malformed)?;
    let length_field = u32::try_from(length).map_err(|_| Malformed)?;
    let fields_field = u32::try_from(fields_len).map_err(|_| Malformed)?;
    let [l0, l1, l2, l3] = length_field.to_le_bytes();
    let [c0, c1] = code.to_le_bytes();
    let [r0, r1, r2, r3] = request_id.to_le_bytes();
    let [f0, f1, f2, f3] = fields_field.to_le_bytes();
    *head = [l0, l1, l2, l3, FRAME_VERSION, 0, c0, c1, r0, r1, r2, r3, f0, f1, f2, f3];
    let payload_start = FRAME_HEAD_LEN.saturating_add(fields_len);
    let frame_len = FRAME_HEAD_LEN.saturating_add(length);
    Ok(PayloadSlot { frame_len, payload: payload_start..frame_len })
}

/// Appends a whole frame to `out`. For secrets, `out` has the capacity beforehand: a vector that grows leaves copies.
///
/// # Errors
/// [`Malformed`] when the frame would be longer than [`FRAME_MAX`]; `out` is then as before.
pub fn push_frame<T: Encode>(
    out: &mut Vec<u8>,
    code: u16,
    request_id: u32,
    fields: &T,
    payload: &[u8],
) -> Result<(), Malformed> {
    let len = frame_len(fields, payload.len())?;
    let start = out.len();
    out.resize(start.saturating_add(len), 0);
    let written = out.get_mut(start..).ok_or(Malformed).and_then(|slot| {
        let place = begin_frame(slot, code, request_id, fields, payload.len())?;
        slot.get_mut(place.payload).ok_or(Malformed)?.copy_from_slice(payload);
        Ok(())
    });
    if written.is_err() {
        out.truncate(start);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NoFields;

    #[test]
    fn a_frame_comes_back_as_it_was_written() {
        let mut out = vec![9];
        push_frame(&mut out, 0x20, 7, &5u64, b"payload").unwrap();
        let frame = Frame::parse(&out[1..], FRAME_MAX).unwrap().unwrap();
        assert_eq!((frame.head.code, frame.head.request_id), (0x20, 7));
        assert_eq!((frame.fields, frame.payload), (&5u64.to_le_bytes()[..], &b"payload"[..]));
        assert_eq!(frame.frame_len(), out.len() - 1);
        for cut in 1..out.len() {
            assert!(Frame::parse(&out[1..cut], FRAME_MAX).unwrap().is_none());
        }
    }

    #[test]
    fn heads_are_refused_before_anything_is_read_by_their_lengths() {
        let mut good = Vec::new();
        push_frame(&mut good, 1, 3, &NoFields {}, b"x").unwrap();
        let change = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Frame::parse(&bytes, FRAME_MAX).map(|frame| frame.is_some())
        };
        assert_eq!(change(4, 2), Err(FrameError::Version { request_id: 3 }));
        assert_eq!(change(5, 1), Err(FrameError::Flags { request_id: 3 }));
        assert_eq!(change(3, 0x80), Err(FrameError::TooLarge { request_id: 3 }));
        assert_eq!(change(2, 0x10), Err(FrameError::TooLarge { request_id: 3 }));
        assert_eq!(change(12, 2), Err(FrameError::Fields { request_id: 3 }));
        assert_eq!(change(0, 2), Ok(false));
    }

    #[test]
    fn the_longest_frame_fits_and_one_byte_more_does_not() {
        let payload = vec![0; FRAME_MAX - FRAME_HEAD_LEN + 1];
        let mut out = Vec::new();
        assert_eq!(push_frame(&mut out, 1, 1, &NoFields {}, &payload), Err(Malformed));
        assert!(out.is_empty());
        push_frame(&mut out, 1, 1, &NoFields {}, &payload[1..]).unwrap();
        assert!(Frame::parse(&out, FRAME_MAX).unwrap().is_some());
        assert_eq!(Frame::parse(&out, FRAME_MAX - 1).err(), Some(FrameError::TooLarge { request_id: 1 }));
    }
}
