//! What a fuzzer begins with, made from the vectors of both documents.

use std::{fs, path::Path};

use kms_protocol::{FRAME_HEAD_LEN, FRAME_MAX, Frame, KeyRef, Opcode, Status};

use crate::handler::step;

/// The values of one field in one file.
struct Vector(Vec<(String, String)>);

impl Vector {
    fn all(folder: &str) -> Vec<Self> {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors")).join(folder);
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let read = |path| {
            let text = fs::read_to_string(path).unwrap();
            let fields = text.lines().filter_map(|line| line.split_once(": "));
            Self(fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
        };
        paths.iter().map(read).collect()
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let digits = self.get(name)?;
        let pairs = (0..digits.len() / 2).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16));
        pairs.collect::<Result<_, _>>().ok()
    }

    /// The message, when it is one of these, and its frame.
    fn frame(&self, of: &str) -> Option<(Opcode, Vec<u8>)> {
        let name = self.get("message")?.strip_prefix(of)?;
        let opcode = *Opcode::ALL.iter().find(|opcode| opcode.name() == name)?;
        Some((opcode, self.bytes("frame")?))
    }
}

fn wire() -> Vec<Vector> {
    Vector::all("protocol")
}

/// The byte that stands for an opcode.
fn number(opcode: Opcode) -> u8 {
    u8::try_from(Opcode::ALL.iter().position(|other| *other == opcode).unwrap()).unwrap()
}

pub(crate) fn frames() -> Vec<Vec<u8>> {
    let max = u32::try_from(FRAME_MAX).unwrap().to_le_bytes();
    let frames: Vec<_> = wire().iter().filter_map(|vector| vector.bytes("frame")).collect();
    let row = frames.iter().rev().take(5).flatten().copied().collect();
    frames.into_iter().chain([row]).map(|frame| [&max[..], &frame].concat()).collect()
}

/// Fields and payload of the frame, when it is one.
fn cut(frame: &[u8]) -> Option<(&[u8], &[u8])> {
    Frame::parse(frame, FRAME_MAX).ok().flatten().map(|frame| (frame.fields, frame.payload))
}

pub(crate) fn requests() -> Vec<Vec<u8>> {
    let seed = |vector: &Vector| {
        let (opcode, frame) = vector.frame("request ")?;
        let (fields, payload) = cut(&frame)?;
        let payload = &payload[..payload.len().min(255)];
        Some([&[number(opcode), u8::try_from(payload.len()).unwrap()], fields, payload].concat())
    };
    wire().iter().filter_map(seed).collect()
}

pub(crate) fn replies() -> Vec<Vec<u8>> {
    let seed = |vector: &Vector| {
        let (opcode, frame) = vector.frame("reply to ")?;
        let status = Status::from_code(u16::from_le_bytes([frame[6], frame[7]]))?;
        let (fields, _) = cut(&frame)?;
        Some([&[number(opcode), u8::try_from(status.code()).unwrap()], fields].concat())
    };
    wire().iter().filter_map(seed).collect()
}

pub(crate) fn codecs() -> Vec<Vec<u8>> {
    let seed = |(is_reply, of): (u8, &'static str)| {
        move |vector: &Vector| {
            let (opcode, frame) = vector.frame(of)?;
            let (fields, _) = cut(&frame)?;
            Some([&[number(opcode), is_reply], fields].concat())
        }
    };
    let all = wire();
    let requests = all.iter().filter_map(seed((0, "request ")));
    requests.chain(all.iter().filter_map(seed((1, "reply to ")))).collect()
}

pub(crate) fn constraints() -> Vec<Vec<u8>> {
    let one = |kind: u8, value: u64| [&[kind][..], &value.to_le_bytes()].concat();
    let mut seeds: Vec<_> = (0..=6).flat_map(|kind| [0, 1, u64::MAX].map(|value| one(kind, value))).collect();
    seeds.push([one(1, 0), one(2, 60), one(3, 0), one(4, 5), one(5, 0)].concat());
    seeds.extend([0, 60].iter().flat_map(|value| (1..=5).map(|kind| one(kind, *value).repeat(2))));
    seeds.push([one(5, 0), one(1, 0), one(5, 0)].concat());
    seeds
}

pub(crate) fn contexts() -> Vec<Vec<u8>> {
    let seed = |vector: &Vector| {
        let mut bytes = vector.bytes("context_bytes")?;
        if let Some((piece, count)) = vector.get("context_repeat").and_then(|repeat| repeat.split_once(' ')) {
            let piece = u8::from_str_radix(piece, 16).ok()?;
            bytes.extend(vec![piece; count.parse().ok()?]);
        }
        Some(bytes)
    };
    Vector::all("formats").iter().filter_map(seed).collect()
}

pub(crate) fn ciphertexts() -> Vec<Vec<u8>> {
    let all = Vector::all("formats");
    let raw = all.iter().filter_map(|vector| vector.bytes("ciphertext"));
    let raw = raw.map(|bytes| [&[0x80 | 0x20], &bytes[..]].concat());
    // As made, one bit changed at the front and far behind, cut, and longer; of every purpose and near every length.
    let edits: [&[u8]; 8] = [
        &[0],
        &[1, 0, 5, 0, 1],
        &[1, 0, 28, 0, 1],
        &[1, 0, 59, 0, 1],
        &[1, 0, 187, 0, 1],
        &[1, 0, 0xff, 0x40, 0x80],
        &[1, 2, 99, 0],
        &[1, 3, 2, 0, 0],
    ];
    let made = (0..0x80_u8).step_by(3).flat_map(|kind| edits.map(|edit| [&[kind, 14], edit].concat()));
    raw.chain(made).collect()
}

/// Steps of a script.
#[derive(Default)]
struct Steps(Vec<u8>);

impl Steps {
    fn new() -> Self {
        Self(vec![0, 7, 0, 0, 0])
    }

    /// A frame as it is.
    fn frame(mut self, connection: u8, frame: &[u8]) -> Self {
        self.0.push(connection | step::FRAME << 2);
        self.0.extend(u16::try_from(frame.len()).unwrap().to_le_bytes());
        self.0.extend_from_slice(frame);
        self
    }

    /// A frame that is put together when the script is read.
    fn shaped(mut self, connection: u8, opcode: Opcode, fields: &[u8], payload: &[u8]) -> Self {
        self.0.extend([connection | step::SHAPED << 2, number(opcode), 9]);
        for part in [fields, payload] {
            self.0.extend(u16::try_from(part.len()).unwrap().to_le_bytes());
        }
        self.0.extend_from_slice(fields);
        self.0.extend_from_slice(payload);
        self
    }

    fn time(mut self, seconds: u16) -> Self {
        self.0.push(step::TIME << 2);
        self.0.extend(seconds.to_le_bytes());
        self
    }

    fn finish(mut self, how: u8) -> Self {
        self.0.extend([step::FINISH << 2, how]);
        self
    }

    fn connect(mut self, connection: u8, uid: Option<u32>) -> Self {
        self.0.extend([connection | step::CONNECT << 2, u8::from(uid.is_some())]);
        self.0.extend(uid.into_iter().flat_map(u32::to_le_bytes));
        self
    }
}

fn fields_of(all: &[Vector], name: &str) -> (Opcode, Vec<u8>, Vec<u8>) {
    let found = all.iter().filter_map(|vector| vector.frame("request ")).find(|(opcode, frame)| {
        opcode.name() == name && cut(frame).is_some_and(|(fields, _)| !fields.is_empty() || name == "stats")
    });
    let (opcode, frame) = found.unwrap();
    let (fields, payload) = cut(&frame).unwrap();
    (opcode, fields.to_vec(), payload.to_vec())
}

fn encoded(fields: &dyn crate::show::Fields) -> Vec<u8> {
    fields.frame(0, 0, &[]).unwrap().split_off(FRAME_HEAD_LEN)
}

pub(crate) fn handler() -> Vec<Vec<u8>> {
    let all = wire();
    let requests: Vec<_> = all.iter().filter_map(|vector| vector.frame("request ")).collect();
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for (_, frame) in requests.iter().filter(|(_, frame)| frame.len() < 60_000) {
        // From who may and from who may not.
        seeds.push(Steps::new().frame(0, frame).frame(2, frame).frame(3, frame).frame(1, frame).0);
    }
    for (opcode, frame) in &requests {
        if let Some((fields, payload)) = cut(frame).filter(|(_, payload)| payload.len() < 60_000) {
            seeds
                .push(Steps::new().shaped(1, *opcode, fields, payload).shaped(0, *opcode, fields, payload).0);
        }
    }
    let hello = requests.iter().find(|(opcode, _)| *opcode == Opcode::Hello).unwrap().1.clone();
    let (encrypt, with, plaintext) = fields_of(&all, "encrypt");
    let pass = |steps: Steps, opcode, passphrase: &[u8]| steps.shaped(0, opcode, &[], passphrase);
    // Locked, asked for a key, a wrong passphrase, the back-off, the right one.
    let locked = pass(Steps::new(), Opcode::Lock, b"pass").finish(2);
    let locked = locked.shaped(0, encrypt, &with, &plaintext).shaped(0, Opcode::List, &[0; 8], &[]);
    let locked = pass(locked, Opcode::Unlock, b"word").finish(2).time(1);
    let locked = pass(pass(locked, Opcode::Unlock, b"pass").time(4000), Opcode::Unlock, b"pass").finish(2);
    seeds.push(locked.shaped(0, encrypt, &with, &plaintext).0);
    let export = encoded(&kms_protocol::Export { key: KeyRef::Name("out"), version: 0 });
    let again = pass(pass(Steps::new(), Opcode::Lock, b"pass").finish(2), Opcode::Unlock, b"pass").finish(2);
    seeds.push(again.shaped(0, Opcode::Export, &export, b"pass").finish(2).0);
    seeds.push(Steps::new().shaped(0, Opcode::Export, &export, b"").finish(0).0);
    let context: &[u8] = &[0; 4];
    for name in ["backup", "once", "asked", "soon", "out"] {
        let with = encoded(&kms_protocol::KeyAndContext { key: KeyRef::Name(name), context });
        let steps = Steps::new().shaped(0, encrypt, &with, b"x").shaped(0, encrypt, &with, b"x").time(60);
        let steps = steps.shaped(1, Opcode::Wrap, &with, b"x").shaped(0, Opcode::Mac, &with, &[7; 64]);
        seeds.push(steps.shaped(0, Opcode::StreamNew, &with, &[]).0);
        let steps = Steps::new().shaped(0, Opcode::RemoteStreamNew, &with, &[]);
        let steps = steps.shaped(0, Opcode::RemoteStreamEncrypt, &[1, 0, 0, 0], b"x");
        seeds.push(steps.shaped(0, Opcode::RemoteStreamClose, &[1, 0, 0, 0], &[]).0);
        let key = encoded(&kms_protocol::Rotate { token: [9; 16], key: KeyRef::Name(name) });
        let steps = Steps::new().shaped(0, Opcode::Rotate, &key, &[]).shaped(1, Opcode::Rotate, &key, &[]);
        let steps = steps.shaped(0, encrypt, &with, b"x").shaped(0, Opcode::Remove, &key, &[]);
        seeds.push(steps.shaped(0, Opcode::RemoveAll, &[8; 16], &[]).shaped(0, Opcode::Stats, &[], &[]).0);
        let to = Some(KeyRef::Name(name));
        let (_, _, sealed) = fields_of(&all, "rewrap");
        let rewrap = kms_protocol::Rewrap { key: KeyRef::Name("backup"), context: &[], to };
        let known =
            kms_protocol::Rewrap { context: b"\0\0\0\x01\0\0\0\x05table\0\0\0\x08accounts", ..rewrap };
        seeds.push(Steps::new().shaped(0, Opcode::Rewrap, &encoded(&known), &sealed).0);
        let export = encoded(&kms_protocol::Export { key: KeyRef::Name(name), version: 1 });
        let steps = Steps::new().shaped(0, Opcode::Export, &export, &[]).shaped(1, encrypt, &with, b"x");
        let sealed = (0..6).fold(steps, |steps, _| steps.shaped(0, encrypt, &with, b"x"));
        seeds.push(sealed.shaped(3, Opcode::Export, &export, &[]).0);
    }
    // Another peer in place of a connection, before and after hello, with and without its own.
    for uid in [None, Some(0), Some(1001), Some(u32::MAX)] {
        let steps = Steps::new().connect(1, uid).shaped(1, encrypt, &with, &plaintext).connect(1, uid);
        seeds.push(steps.frame(1, &hello).shaped(1, encrypt, &with, &plaintext).frame(1, &hello).0);
    }
    seeds
}

pub(crate) fn answers() -> Vec<Vec<u8>> {
    let operations: [&[&str]; 32] = [
        &["ping"],
        &["status"],
        &["stats"],
        &["add"],
        &["list"],
        &["describe"],
        &["remove"],
        &["remove-all"],
        &["rotate"],
        &["rename"],
        &["export"],
        &["encrypt"],
        &["decrypt"],
        &["wrap"],
        &["unwrap"],
        &["datakey"],
        &["datakey-wrapped"],
        &["rewrap"],
        &["rewrap"],
        &["verify"],
        &["mac"],
        &["mac-verify"],
        &["random"],
        &["bind"],
        &["stream-new"],
        &["stream-open"],
        &["remote-stream-new", "remote-stream-encrypt"],
        &["remote-stream-open", "remote-stream-decrypt"],
        &["lock"],
        &["unlock"],
        &["batch"],
        &["encrypt", "random"],
    ];
    let replies: Vec<_> = wire().iter().filter_map(|vector| vector.frame("reply to ")).collect();
    let of = |name: &str| -> Vec<&Vec<u8>> {
        replies.iter().filter(|(opcode, _)| opcode.name() == name).map(|(_, frame)| frame).collect()
    };
    let hellos = of("hello");
    let mut seeds = Vec::new();
    for (number, names) in operations.iter().enumerate() {
        let number = u8::try_from(number).unwrap();
        for first in of(names[0]) {
            let second =
                names.get(1).and_then(|name| of(name).into_iter().next()).cloned().unwrap_or_default();
            seeds.push([&[number, 0][..], first, &second].concat());
        }
        let first = of(names[0])[0];
        seeds.push([&[number, 4][..], first].concat());
        seeds.push([&[number, 2][..], first].concat());
    }
    // Each refusal, in answer to something else; and each hello.
    for (at, (_, frame)) in replies.iter().filter(|(opcode, _)| *opcode == Opcode::Unlock).enumerate() {
        seeds.push([&[u8::try_from(at * 3 % 32).unwrap(), 0][..], frame].concat());
    }
    for hello in hellos {
        for how in [1, 3, 5] {
            seeds.push([&[0, how][..], hello].concat());
        }
    }
    seeds
}
