//! A socket in front of the agent that changes what passes, so that `kmsctl` meets what neither it nor the agent would send.
//!
//! Each change has a name, which is that of its socket. The hello passes unchanged in both directions.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
};

use kms_protocol::{Add, Describe, FRAME_HEAD_LEN, KeyRef, Material, NoFields, Opcode};
use kms_tests::wire::frame;

/// What becomes of a frame: nothing is passed on of an empty one, and without any the connection ends.
type Change = fn(Vec<u8>) -> Option<Vec<u8>>;

/// By name: what becomes of requests, and of replies.
const CHANGES: [(&str, Change, Change); 15] = [
    ("unknown-opcode", |frame| set(frame, 6, &0x7fff_u16.to_le_bytes()), Some),
    ("other-frame-version", |frame| set(frame, 4, &[2]), Some),
    ("flagged-frame", |frame| set(frame, 5, &[1]), Some),
    ("long-frame", |frame| set(frame, 0, &u32::MAX.to_le_bytes()), Some),
    ("fields-beyond-frame", |frame| set(frame, 12, &u32::MAX.to_le_bytes()), Some),
    ("trailing-byte", trailing_byte, Some),
    ("other-stream", other_stream, Some),
    ("becomes-unlock", |old| replaced(&old, Opcode::Unlock, &NoFields {}, b"wrong"), Some),
    ("becomes-add", |old| replaced(&old, Opcode::Add, &ADD, &[]), Some),
    ("becomes-describe", |old| replaced(&old, Opcode::Describe, &DESCRIBE, &[]), Some),
    ("reply-of-another", Some, |frame| set(frame, 8, &u32::MAX.to_le_bytes())),
    ("reply-with-flag", Some, |frame| set(frame, 5, &[1])),
    ("reply-with-unknown-status", Some, |frame| set(frame, 6, &99_u16.to_le_bytes())),
    ("reply-never-comes", Some, |_| Some(Vec::new())),
    ("connection-ends", Some, |_| None),
];

const ADD: Add<'_> = Add {
    token: [7; 16],
    name: "backup",
    material: Material::Generate,
    if_missing: false,
    constraints: Vec::new(),
};

const DESCRIBE: Describe<'_> = Describe { key: KeyRef::Name("nobody"), versions_after: 0 };

fn set(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Option<Vec<u8>> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    Some(frame)
}

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(frame[at..at + 4].try_into().unwrap())
}

fn opcode(frame: &[u8]) -> u16 {
    u16::from_le_bytes([frame[6], frame[7]])
}

/// Another request with the same request id.
fn replaced<T: bincode::Encode>(old: &[u8], opcode: Opcode, fields: &T, payload: &[u8]) -> Option<Vec<u8>> {
    Some(frame(opcode, number(old, 8), fields, payload))
}

/// One more byte of fields than the request has.
fn trailing_byte(mut frame: Vec<u8>) -> Option<Vec<u8>> {
    let (length, fields) = (number(&frame, 0) + 1, number(&frame, 12) + 1);
    frame.insert(FRAME_HEAD_LEN + fields as usize - 1, 0);
    set(set(frame, 0, &length.to_le_bytes())?, 12, &fields.to_le_bytes())
}

/// The number of another stream than the one that was opened.
fn other_stream(frame: Vec<u8>) -> Option<Vec<u8>> {
    match [Opcode::RemoteStreamEncrypt, Opcode::RemoteStreamDecrypt]
        .map(Opcode::code)
        .contains(&opcode(&frame))
    {
        true => set(frame, FRAME_HEAD_LEN, &77_u32.to_le_bytes()),
        false => Some(frame),
    }
}

/// Opens a socket for every change; each ends with the test program.
pub(crate) fn listen(folder: &Path, agent: &Path) {
    for (name, request, reply) in CHANGES {
        let listener = UnixListener::bind(folder.join(name)).unwrap();
        let agent = agent.to_owned();
        thread::spawn(move || {
            for client in listener.incoming() {
                serve(client.unwrap(), &agent, request, reply);
            }
        });
    }
}

fn serve(client: UnixStream, agent: &PathBuf, request: Change, reply: Change) {
    let agent = UnixStream::connect(agent).unwrap();
    let ways = [
        (client.try_clone().unwrap(), agent.try_clone().unwrap(), request),
        (agent.try_clone().unwrap(), client.try_clone().unwrap(), reply),
    ];
    for (from, to, change) in ways {
        thread::spawn(move || pass(from, to, change));
    }
}

/// Passes frames on until one side has had enough; then the other learns it.
fn pass(mut from: UnixStream, mut to: UnixStream, change: Change) {
    let mut is_hello = true;
    while let Some(frame) = next(&mut from) {
        let changed = if is_hello { Some(frame) } else { change(frame) };
        is_hello = false;
        let Some(bytes) = changed else { break };
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    for side in [from, to] {
        let _ = side.shutdown(std::net::Shutdown::Both);
    }
}

fn next(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; FRAME_HEAD_LEN];
    from.read_exact(&mut frame).ok()?;
    let length = number(&frame, 0) as usize;
    frame.resize(FRAME_HEAD_LEN + length, 0);
    from.read_exact(&mut frame[FRAME_HEAD_LEN..]).ok()?;
    Some(frame)
}
