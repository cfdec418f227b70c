//! Whatever arrives, the decoder answers: it never panics, and what it takes is the one encoding of what it gives.

use kms_protocol::{
    FRAME_HEAD_LEN, FRAME_MAX, Frame, FrameHead, Malformed, Opcode, Request, Status, encoded_fields_len,
};
use proptest::prelude::*;

use crate::{replies, schema::Document, show::parts, vectors::Vector};

/// Decodes `bytes` as everything that it could be.
fn decode_all(bytes: &[u8], payload: &[u8]) {
    for opcode in Opcode::ALL {
        let head = head(opcode.code(), bytes.len(), payload.len());
        let frame = Frame { head, fields: bytes, payload };
        if let Ok(request) = Request::decode(*opcode, &frame) {
            let (again, fields, rest) = parts(&request);
            assert_eq!((again, rest), (*opcode, payload));
            let encoded = fields.frame(opcode.code(), 0, rest).unwrap();
            assert_eq!(&encoded[FRAME_HEAD_LEN..FRAME_HEAD_LEN + bytes.len()], bytes, "{opcode:?}");
        }
        for status in [Status::Ok, Status::Busy] {
            if let Ok(fields) = replies::decode(*opcode, status, bytes) {
                let encoded = fields.frame(status.code(), 0, &[]).unwrap();
                assert_eq!(&encoded[FRAME_HEAD_LEN..], bytes, "{opcode:?} {status:?}");
            }
        }
    }
}

fn head(code: u16, fields: usize, payload: usize) -> FrameHead {
    let mut bytes = vec![0; FRAME_HEAD_LEN];
    bytes[..4].copy_from_slice(&u32::try_from(fields + payload).unwrap().to_le_bytes());
    bytes[4] = 1;
    bytes[6..8].copy_from_slice(&code.to_le_bytes());
    bytes[12..].copy_from_slice(&u32::try_from(fields).unwrap().to_le_bytes());
    FrameHead::parse(&bytes, FRAME_MAX).unwrap().unwrap()
}

/// Random bytes hardly ever decode; bytes that are nearly a message often do.
fn nearly_a_message() -> impl Strategy<Value = Vec<u8>> {
    let frames: Vec<Vec<u8>> = Vector::all().into_iter().map(|vector| vector.frame).collect();
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 0..4);
    (prop::sample::select(frames), edits).prop_map(|(frame, edits)| {
        let mut bytes = frame.get(FRAME_HEAD_LEN..).unwrap_or_default().to_vec();
        for (at, byte, edit) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match edit {
                0 => bytes[at] = byte,
                1 => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.truncate(at),
                _ => bytes.insert(at, byte),
            }
        }
        bytes
    })
}

#[test]
fn fields_longer_than_a_frame_have_no_length() {
    let room = FRAME_MAX - FRAME_HEAD_LEN;
    assert_eq!(encoded_fields_len(&vec![0_u8; room - 8]), Ok(room));
    assert_eq!(encoded_fields_len(&vec![0_u8; room - 7]), Err(Malformed));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    #[test]
    fn random_fields_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), payload in prop::collection::vec(any::<u8>(), 0..3)) {
        decode_all(&bytes, &payload);
    }

    #[test]
    fn fields_that_are_nearly_right_never_panic(bytes in nearly_a_message()) {
        decode_all(&bytes, &[]);
    }

    #[test]
    fn random_frames_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), frame_max in any::<u32>()) {
        if let Ok(Some(frame)) = Frame::parse(&bytes, frame_max as usize) {
            prop_assert!(frame.frame_len() <= bytes.len());
            prop_assert!(frame.frame_len() <= frame_max as usize);
            prop_assert_eq!(frame.frame_len() as u64, frame.head.frame_len());
        }
    }

    /// The crate and the text take and refuse the same bytes, and read the same in them.
    #[test]
    fn the_text_decides_as_the_crate_does(bytes in nearly_a_message()) {
        thread_local! {
            static DOCUMENT: Document = Document::read();
        }
        DOCUMENT.with(|document| {
            for opcode in Opcode::ALL {
                let by_text = document.decode(&document.request(opcode.name()).fields, &bytes).ok();
                let frame = Frame { head: head(opcode.code(), bytes.len(), 0), fields: &bytes, payload: &[] };
                let by_crate = Request::decode(*opcode, &frame).ok().map(|request| parts(&request).1.lines());
                assert_eq!(by_text, by_crate, "request {}", opcode.name());
                let by_text = document.decode(&document.reply(opcode.name()).fields, &bytes).ok();
                let by_crate = replies::decode(*opcode, Status::Ok, &bytes).ok().map(|reply| reply.lines());
                assert_eq!(by_text, by_crate, "reply to {}", opcode.name());
            }
        });
    }
}
