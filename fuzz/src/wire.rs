//! Frames, requests, replies and constraints: what is taken is the one encoding of what comes out.

use kms_agent::constraints::Constraints;
use kms_protocol::{
    BATCH_ITEMS_MAX, BatchError, Constraint, FRAME_HEAD_LEN, FRAME_MAX, Frame, FrameError, FrameHead, Items,
    Opcode, Request, Status, constraint,
};

use crate::{replies, script::Script, show::parts};

/// A frame around these fields and this payload.
pub(crate) fn make_frame(code: u16, id: u32, fields: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(fields.len() + payload.len()).unwrap();
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend([1, 0]);
    frame.extend(code.to_le_bytes());
    frame.extend(id.to_le_bytes());
    frame.extend(u32::try_from(fields.len()).unwrap().to_le_bytes());
    frame.extend_from_slice(fields);
    frame.extend_from_slice(payload);
    frame
}

/// A row of frames, after the maximum.
pub(crate) fn frame(input: &[u8]) {
    let mut script = Script(input);
    let frame_max = script.u32() as usize;
    let row = script.rest();
    let whole = one_frame(row, frame_max);
    // A frame is taken only when all of it is there, whatever else has arrived.
    if let Some(len) = whole {
        for cut in [0, 1, FRAME_HEAD_LEN - 1, FRAME_HEAD_LEN, len / 2, len - 1] {
            if cut < len {
                assert!(Frame::parse(&row[..cut], frame_max).unwrap().is_none());
            }
        }
        assert!(Frame::parse(&row[..len], frame_max).unwrap().is_some());
    }
    items(row);
}

/// The frame at the front against a reading of `docs/protocol.md`, section 2.1, that shares nothing with the crate's.
fn one_frame(row: &[u8], frame_max: usize) -> Option<usize> {
    let number = |at: usize| row[at..at + 4].iter().rev().fold(0, |n: u64, byte| n << 8 | u64::from(*byte));
    let parsed = Frame::parse(row, frame_max);
    if row.len() < FRAME_HEAD_LEN {
        assert!(matches!(parsed, Ok(None)));
        return None;
    }
    let (length, fields, id) = (number(0), number(12), u32::try_from(number(8)).unwrap());
    let len = FRAME_HEAD_LEN as u64 + length;
    let wrong = if row[4] != 1 {
        Some(FrameError::Version { request_id: id })
    } else if row[5] != 0 {
        Some(FrameError::Flags { request_id: id })
    } else if len > frame_max as u64 || len > FRAME_MAX as u64 {
        Some(FrameError::TooLarge { request_id: id })
    } else if fields > length {
        Some(FrameError::Fields { request_id: id })
    } else {
        None
    };
    let frame = match (parsed, wrong) {
        (Err(error), Some(wrong)) => {
            assert_eq!(error, wrong);
            return None;
        }
        (Ok(None), None) => {
            assert!(len > row.len() as u64, "a whole frame is not taken");
            return None;
        }
        (Ok(Some(frame)), None) => frame,
        (_, wrong) => panic!("the text says {wrong:?}"),
    };
    let len = usize::try_from(len).unwrap();
    assert!(len <= row.len() && frame.frame_len() == len);
    assert_eq!(make_frame(frame.head.code, frame.head.request_id, frame.fields, frame.payload), row[..len]);
    Some(len)
}

fn items(row: &[u8]) {
    let (mut rest, mut count) = (row, 0);
    let mut whole = true;
    while whole && !rest.is_empty() {
        match one_frame(rest, FRAME_MAX) {
            Some(len) => (rest, count) = (&rest[len..], count + 1),
            None => whole = false,
        }
    }
    match Items::parse(row) {
        Ok(items) => {
            assert!(whole && (1..=BATCH_ITEMS_MAX).contains(&count) && items.len() == count);
            let frames = items.map(|f| make_frame(f.head.code, f.head.request_id, f.fields, f.payload));
            assert_eq!(frames.collect::<Vec<_>>().concat(), row);
        }
        Err(BatchError::Malformed) => assert!(!whole || count == 0),
        Err(BatchError::TooMany) => assert!(whole && count > BATCH_ITEMS_MAX),
    }
}

/// The code that a byte stands for, mostly one that there is.
pub(crate) fn opcode(byte: u8) -> Opcode {
    Opcode::ALL[usize::from(byte) % Opcode::ALL.len()]
}

/// An opcode, the length of the payload, fields and payload.
pub(crate) fn request(input: &[u8]) {
    let mut script = Script(input);
    let (opcode, payload_len) = (opcode(script.byte()), usize::from(script.byte()));
    let rest = script.rest();
    let (fields, payload) = rest.split_at(rest.len().saturating_sub(payload_len));
    let bytes = make_frame(opcode.code(), 7, fields, payload);
    let Ok(Some(frame)) = Frame::parse(&bytes, FRAME_MAX) else { return };
    let Ok(request) = Request::decode(opcode, &frame) else { return };
    assert_eq!(request.opcode(), opcode);
    let (again, encoded, rest) = parts(&request);
    assert_eq!((again, rest), (opcode, payload));
    assert_eq!(encoded.frame(opcode.code(), 7, rest).unwrap(), bytes, "another encoding was taken");
    // A payload where the table of section 4 has none is refused.
    if !takes_payload(opcode) {
        assert!(payload.is_empty(), "{} takes a payload", opcode.name());
    }
}

fn takes_payload(opcode: Opcode) -> bool {
    match opcode {
        Opcode::Lock
        | Opcode::Unlock
        | Opcode::Add
        | Opcode::Export
        | Opcode::Encrypt
        | Opcode::Decrypt
        | Opcode::StreamOpen
        | Opcode::RemoteStreamOpen
        | Opcode::RemoteStreamEncrypt
        | Opcode::RemoteStreamDecrypt
        | Opcode::Wrap
        | Opcode::Unwrap
        | Opcode::Rewrap
        | Opcode::Verify
        | Opcode::Mac
        | Opcode::MacVerify
        | Opcode::Batch => true,
        Opcode::Hello
        | Opcode::Ping
        | Opcode::Status
        | Opcode::List
        | Opcode::Describe
        | Opcode::Remove
        | Opcode::Rotate
        | Opcode::Rename
        | Opcode::RemoveAll
        | Opcode::StreamNew
        | Opcode::RemoteStreamNew
        | Opcode::RemoteStreamClose
        | Opcode::DataKey
        | Opcode::DataKeyWrapped
        | Opcode::Random
        | Opcode::Bind
        | Opcode::Stats => false,
    }
}

/// An opcode, a status, fields.
pub(crate) fn reply(input: &[u8]) {
    let mut script = Script(input);
    let opcode = opcode(script.byte());
    let status = Status::ALL[usize::from(script.byte()) % Status::ALL.len()];
    let bytes = script.rest();
    let Ok(fields) = replies::decode(opcode, status, bytes) else { return };
    let frame = fields.frame(status.code(), 7, &[]).unwrap();
    assert_eq!(&frame[FRAME_HEAD_LEN..], bytes, "another encoding was taken");
    let head = FrameHead::parse(&frame, FRAME_MAX).unwrap().unwrap();
    assert_eq!((head.code, head.request_id), (status.code(), 7));
}

/// Kinds and values, one byte and eight.
pub(crate) fn constraints(input: &[u8]) {
    let mut script = Script(input);
    let mut told = Vec::new();
    while !script.is_over() && told.len() < 32 {
        let kind = u32::from(script.byte());
        let value = u64::from(script.u32()) | u64::from(script.u32()) << 32;
        told.push(Constraint { kind, value });
    }
    let known = |told: &Constraint| constraint::ALL.contains(&told.kind);
    let twice = (0..told.len()).any(|at| told[..at].iter().any(|other| other.kind == told[at].kind));
    let wants_nothing = [constraint::MEMORY_ONLY, constraint::CONFIRM, constraint::EXPORTABLE];
    let right = |told: &Constraint| wants_nothing.contains(&told.kind) == (told.value == 0);
    match Constraints::parse(&told) {
        Ok(constraints) => {
            assert!(told.iter().all(known) && !twice && told.iter().all(right));
            told.sort_by_key(|told| told.kind);
            assert_eq!(constraints.to_list(), told, "a constraint was left out");
            assert_eq!(Constraints::parse(&told), Ok(constraints));
        }
        Err(Status::Unsupported) => assert!(!told.iter().all(known)),
        Err(Status::Malformed) => assert!(told.iter().all(known) && (twice || !told.iter().all(right))),
        Err(other) => panic!("{other:?}"),
    }
}
