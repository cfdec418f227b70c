//! Every vector of `docs/protocol.md`, section 12: the crate and the text alone come to the same.

use std::{collections::BTreeSet, fs};

use kms_protocol::{
    FRAME_MAX, Frame, FrameError, Items, KeyName, KeyRef, Opcode, Request, Status, constraint,
};

use crate::{
    replies, repository,
    schema::{Document, Shape},
    show::{hex, parts},
};

/// One file.
pub(crate) struct Vector {
    pub(crate) name: String,
    expect: String,
    message: Message,
    then: Option<String>,
    code: Option<u16>,
    request_id: Option<u32>,
    fields: Vec<String>,
    payload: String,
    items: Vec<Vec<u8>>,
    pub(crate) frame: Vec<u8>,
}

/// Which message a frame is, or should have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    /// Of an opcode, if it has one that is known.
    Request(Option<Opcode>),
    ReplyTo(Opcode),
}

fn opcode(name: &str) -> Opcode {
    let found = Opcode::ALL.iter().find(|opcode| opcode.name() == name);
    *found.unwrap_or_else(|| panic!("what is {name}?"))
}

fn bytes(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2), "half a byte");
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

impl Vector {
    pub(crate) fn all() -> Vec<Self> {
        let mut all: Vec<_> = fs::read_dir(repository("tests/vectors/protocol"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
            .map(|path| {
                let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
                Self::parse(name, &fs::read_to_string(path).unwrap())
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn parse(name: String, text: &str) -> Self {
        let mut vector = Self {
            name,
            expect: String::new(),
            message: Message::Request(None),
            then: None,
            code: None,
            request_id: None,
            fields: Vec::new(),
            payload: String::new(),
            items: Vec::new(),
            frame: Vec::new(),
        };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (key, value) = line.split_once(": ").unwrap_or_else(|| panic!("{}: {line}", vector.name));
            match key {
                "expect" => vector.expect = value.to_owned(),
                "message" => {
                    vector.message = match value.split_once(' ') {
                        None if value == "request" => Message::Request(None),
                        Some(("request", name)) => Message::Request(Some(opcode(name))),
                        Some(("reply", rest)) => Message::ReplyTo(opcode(rest.strip_prefix("to ").unwrap())),
                        _ => panic!("{}: {line}", vector.name),
                    }
                }
                "then" => vector.then = Some(value.to_owned()),
                "code" => {
                    let digits = value.strip_prefix("0x").unwrap();
                    vector.code = Some(u16::from_str_radix(digits, 16).unwrap());
                }
                "request-id" => vector.request_id = Some(value.parse().unwrap()),
                "field" => vector.fields.push(value.to_owned()),
                "item" => vector.items.push(bytes(value)),
                "payload" => vector.payload = value.to_owned(),
                "frame" => vector.frame = bytes(value),
                _ => panic!("{}: what is {key}?", vector.name),
            }
        }
        vector
    }

    /// What the text says of this message.
    fn shape(&self, document: &Document, frame: &Frame<'_>) -> Shape {
        match self.message {
            Message::Request(opcode) => document.request(opcode.unwrap().name()),
            Message::ReplyTo(opcode) if frame.head.code == 0 => document.reply(opcode.name()),
            Message::ReplyTo(_) => document.refusal(),
        }
    }

    /// What the crate makes of the frame; the reason why fields do not decode is what the text's decoder says.
    fn outcome(&self, document: &Document) -> String {
        let frame = match Frame::parse(&self.frame, FRAME_MAX) {
            Err(FrameError::Version { .. }) => return "unsupported: frame version".to_owned(),
            Err(FrameError::Flags { .. }) => return "malformed: frame flags".to_owned(),
            Err(FrameError::TooLarge { .. }) => return "too-large: frame length".to_owned(),
            Err(FrameError::Fields { .. }) => return "malformed: frame fields length".to_owned(),
            Ok(None) => return "incomplete".to_owned(),
            Ok(Some(frame)) => frame,
        };
        assert_eq!(frame.frame_len(), self.frame.len(), "{}: more than a frame", self.name);
        let decoded = match self.message {
            Message::Request(expected) => {
                let Some(opcode) = Opcode::from_code(frame.head.code) else {
                    return "unsupported: opcode".to_owned();
                };
                assert_eq!(Some(opcode), expected, "{}", self.name);
                let request = Request::decode(opcode, &frame);
                if let Ok(failure) = request.as_ref().map(broken_rule)
                    && let Some(failure) = failure
                {
                    return failure.to_owned();
                }
                request.is_ok()
            }
            Message::ReplyTo(opcode) => {
                let Some(status) = Status::from_code(frame.head.code) else {
                    return "malformed: status".to_owned();
                };
                replies::decode(opcode, status, frame.fields).is_ok()
            }
        };
        let shape = self.shape(document, &frame);
        let by_text = document.decode(&shape.fields, frame.fields);
        let payload_is_wrong = !frame.payload.is_empty() && !shape.has_payload;
        let is_request = matches!(self.message, Message::Request(_));
        match by_text {
            Ok(_) if payload_is_wrong => {
                // The crate leaves the payloads of replies to who knows the opcode.
                assert_eq!(decoded, !is_request, "{}", self.name);
                "malformed: payload".to_owned()
            }
            Ok(_) => {
                assert!(decoded, "{}: the text takes what the crate refuses", self.name);
                "success".to_owned()
            }
            Err(flaw) => {
                assert!(!decoded, "{}: the crate takes what the text refuses: {flaw:?}", self.name);
                assert!(!payload_is_wrong, "{}: two failures", self.name);
                format!("malformed: fields: {}", flaw.name())
            }
        }
    }
}

/// The rules of section 4 that a receiver can check without a key.
fn broken_rule(request: &Request<'_>) -> Option<&'static str> {
    let (name, constraints) = match request {
        Request::Add { fields, .. } => (Some(fields.name), fields.constraints.as_slice()),
        Request::Rename(fields) => (Some(fields.name), &[][..]),
        Request::Wrap { fields, .. } => match fields.key {
            KeyRef::Name(name) => (Some(name), &[][..]),
            KeyRef::Id(_) | KeyRef::Bound(_) => (None, &[][..]),
        },
        Request::Batch { frames } if Items::parse(frames).is_err() => return Some("malformed: batch"),
        _ => (None, &[][..]),
    };
    if name.is_some_and(|name| KeyName::parse(name).is_err()) {
        return Some("malformed: key name");
    }
    let unknown = constraints.iter().any(|constraint| !constraint::ALL.contains(&constraint.kind));
    unknown.then_some("unsupported: constraint")
}

#[test]
fn every_vector_comes_out_as_it_says() {
    let document = Document::read();
    for vector in Vector::all() {
        assert_eq!(vector.outcome(&document), vector.expect, "{}", vector.name);
    }
}

#[test]
fn good_vectors_decode_to_their_fields_and_encode_to_their_bytes() {
    let document = Document::read();
    let mut seen = 0;
    for vector in Vector::all().iter().filter(|vector| vector.expect == "success") {
        let name = &vector.name;
        let frame = Frame::parse(&vector.frame, FRAME_MAX).unwrap().unwrap();
        let head = (frame.head.code, frame.head.request_id);
        assert_eq!(head, (vector.code.unwrap(), vector.request_id.unwrap()), "{name}");
        assert_eq!(hex(frame.payload), vector.payload, "{name}");
        let shape = vector.shape(&document, &frame);
        assert_eq!(document.decode(&shape.fields, frame.fields).unwrap(), vector.fields, "{name}");
        let encoded = match vector.message {
            Message::Request(opcode) => {
                let request = Request::decode(opcode.unwrap(), &frame).unwrap();
                let (opcode, fields, payload) = parts(&request);
                assert_eq!(fields.lines(), vector.fields, "{name}");
                assert_eq!(payload, frame.payload, "{name}");
                fields.frame(opcode.code(), frame.head.request_id, payload)
            }
            Message::ReplyTo(opcode) => {
                let status = Status::from_code(frame.head.code).unwrap();
                let fields = replies::decode(opcode, status, frame.fields).unwrap();
                assert_eq!(fields.lines(), vector.fields, "{name}");
                fields.frame(status.code(), frame.head.request_id, frame.payload)
            }
        };
        assert_eq!(encoded.unwrap(), vector.frame, "{name}");
        assert_eq!(vector.then, None, "{name}");
        seen += 1;
    }
    assert!(seen >= 2 * Opcode::ALL.len(), "only {seen} vectors");
}

#[test]
fn a_batch_is_its_items() {
    let all = Vector::all();
    let batches: Vec<_> = all.iter().filter(|vector| !vector.items.is_empty()).collect();
    assert_eq!(batches.len(), 2);
    let mut ids = Vec::new();
    for vector in batches {
        let frame = Frame::parse(&vector.frame, FRAME_MAX).unwrap().unwrap();
        assert_eq!(vector.items.concat(), frame.payload, "{}", vector.name);
        let items = Items::parse(frame.payload).unwrap();
        assert_eq!(items.len(), vector.items.len());
        for (item, bytes) in items.clone().zip(&vector.items) {
            let parsed = Frame::parse(bytes, FRAME_MAX).unwrap().unwrap();
            assert_eq!((item.head, item.fields, item.payload), (parsed.head, parsed.fields, parsed.payload));
        }
        ids.push(items.map(|item| item.head.request_id).collect::<Vec<_>>());
    }
    assert_eq!(ids[0], ids[1], "each reply has the request id of its item");
}

#[test]
fn every_message_and_every_failure_has_a_vector() {
    let all = Vector::all();
    for opcode in Opcode::ALL {
        for message in [Message::Request(Some(*opcode)), Message::ReplyTo(*opcode)] {
            let code = if message == Message::ReplyTo(*opcode) { 0 } else { opcode.code() };
            let found = |vector: &Vector| {
                vector.expect == "success" && vector.message == message && vector.code == Some(code)
            };
            assert!(all.iter().any(found), "{message:?} has no vector");
        }
    }
    for status in Status::ALL {
        let found = |vector: &Vector| {
            matches!(vector.message, Message::ReplyTo(_)) && vector.code == Some(status.code())
        };
        assert!(all.iter().any(found), "{status:?} has no vector");
    }
    let document = Document::read();
    let told: BTreeSet<_> =
        document.section("12").rows("expect").unwrap().iter().map(|row| row[0].clone()).collect();
    let bad = all.iter().filter(|vector| vector.expect != "success");
    let met: BTreeSet<_> = bad.clone().map(|vector| vector.expect.clone()).collect();
    assert_eq!(told, met);
    assert!(bad.count() >= 30);
}

/// Whether the connection survives is part of the contract, and follows from the failure alone.
#[test]
fn a_bad_frame_ends_the_connection_unless_it_only_breaks_a_rule() {
    for vector in Vector::all().iter().filter(|vector| vector.expect != "success") {
        let then = match vector.expect.as_str() {
            "incomplete" => "waits",
            "unsupported: opcode"
            | "malformed: key name"
            | "unsupported: constraint"
            | "malformed: batch" => "stays",
            _ => "closes",
        };
        assert_eq!(vector.then.as_deref(), Some(then), "{}", vector.name);
    }
}

#[test]
fn a_request_has_a_payload_only_where_the_text_gives_it_one() {
    let document = Document::read();
    let mut seen = BTreeSet::new();
    for vector in Vector::all().iter().filter(|vector| vector.expect == "success") {
        let Message::Request(Some(opcode)) = vector.message else { continue };
        let frame = Frame::parse(&vector.frame, FRAME_MAX).unwrap().unwrap();
        let longer = Frame { payload: b"payload", ..frame };
        let taken = Request::decode(opcode, &longer).is_ok();
        assert_eq!(taken, document.request(opcode.name()).has_payload, "{}", opcode.name());
        seen.insert(opcode.code());
    }
    assert_eq!(seen.len(), Opcode::ALL.len());
}
