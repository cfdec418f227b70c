//! The client, from what an agent sends it: each operation against a socket on which any bytes come back.
//!
//! The real client connects to a real socket, so that how its reads are cut and when it ends the connection is part of it.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::Duration,
};

use kms_client::{Batch, Client, ContextRef, Error, Input, KeyRef, NewKey, Options, Output, SecretVec};
use kms_protocol::{FRAME_HEAD_LEN, FRAME_MAX, Frame, Opcode, Status, Welcome, constraint, push_frame};

use crate::script::Script;

/// What the agent of an input does.
struct Part<'a> {
    /// The reply to `hello` comes from the input too.
    own_hello: bool,
    /// Replies get the request id that the client waits for.
    right_ids: bool,
    /// How many bytes are sent at a time; 0 for all.
    piece: usize,
    bytes: &'a [u8],
}

fn serve(mut stream: UnixStream, part: &Part<'_>, right_ids: &mut bool) -> std::io::Result<()> {
    let mut rest = part.bytes;
    let mut greeted = part.own_hello;
    while let Some(id) = read_request(&mut stream)? {
        if !greeted {
            greeted = true;
            let mut hello = Vec::new();
            push_frame(&mut hello, Status::Ok.code(), id, &welcome(), &[]).unwrap();
            stream.write_all(&hello)?;
            continue;
        }
        let len = match Frame::parse(rest, FRAME_MAX) {
            Ok(Some(frame)) => frame.frame_len(),
            _ => rest.len(),
        };
        let mut answer = rest[..len].to_vec();
        rest = &rest[len..];
        if part.right_ids && answer.len() >= FRAME_HEAD_LEN {
            answer[8..12].copy_from_slice(&id.to_le_bytes());
        }
        *right_ids &= answer.get(8..12) == Some(&id.to_le_bytes()[..]);
        let piece = if part.piece == 0 { answer.len().max(1) } else { part.piece };
        for piece in answer.chunks(piece) {
            stream.write_all(piece)?;
        }
        if rest.is_empty() {
            break;
        }
    }
    stream.shutdown(Shutdown::Write)?;
    // What is unread when a socket closes makes the other side lose what it has not read either.
    std::io::copy(&mut stream, &mut std::io::sink()).map(|_| ())
}

/// The id of the next request.
fn read_request(stream: &mut UnixStream) -> std::io::Result<Option<u32>> {
    let mut head = [0; FRAME_HEAD_LEN];
    if let Err(error) = stream.read_exact(&mut head) {
        return if error.kind() == std::io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let length = u32::from_le_bytes(*head.first_chunk().unwrap());
    stream.read_exact(&mut vec![0; length as usize])?;
    Ok(head[8..].first_chunk().map(|id| u32::from_le_bytes(*id)))
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        frame_max: u32::try_from(FRAME_MAX).unwrap(),
        message_max: 65_536,
        context_max: 8192,
        context_pairs_max: 64,
        in_flight_max: 256,
        page_rows_max: 256,
        remote_streams_max: 16,
        opcodes: Opcode::ALL.iter().map(|opcode| opcode.code()).collect(),
        constraints: constraint::ALL.to_vec(),
        features: 0,
    }
}

/// An operation, how the agent behaves, and the bytes that it sends.
pub(crate) fn run(input: &[u8]) {
    let mut script = Script(input);
    let (operation, how) = (script.byte(), script.byte());
    let pieces = [0, 1, 7, 8192];
    let honest = how & 3 == 0 && is_honest(operation, script.0);
    let part = Part {
        own_hello: how & 1 == 1,
        right_ids: how & 2 == 0,
        piece: if script.0.len() > 4096 { 0 } else { pieces[usize::from(how >> 2) % pieces.len()] },
        bytes: script.rest(),
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let options = Options {
        socket: Some(socket),
        timeout: Duration::from_secs(10),
        retry: Duration::ZERO,
        ..Options::default()
    };
    thread::scope(|scope| {
        let agent = scope.spawn(|| {
            let mut right_ids = true;
            // The client may be gone at any moment, and whatever then fails is no fault.
            let _ = serve(listener.accept().unwrap().0, &part, &mut right_ids);
            right_ids
        });
        let done = Client::connect(&options).and_then(|mut client| operate(&mut client, operation));
        // The agent always ends its side, so a client that waits in vain has lost count of the bytes.
        assert!(!matches!(done, Err(Error::Timeout { .. })), "{done:?}");
        assert!(!honest || done.is_ok(), "an honest answer is not taken: {done:?}");
        // Of several requests that are under way, any may be answered first.
        let in_turn = ![26, 27, 31].contains(&(operation % 32));
        if !agent.join().unwrap() && in_turn {
            assert!(done.is_err(), "the answer to another request was taken");
        }
    });
}

/// Whether the bytes are a right answer to a ping, or to who wants 32 random bytes, whatever its id.
fn is_honest(operation: u8, bytes: &[u8]) -> bool {
    let Ok(Some(frame)) = Frame::parse(bytes, FRAME_MAX) else { return false };
    let payload_len = match operation % 32 {
        0 => 0,
        22 => 32,
        _ => return false,
    };
    let right = frame.head.code == Status::Ok.code() && frame.fields.is_empty();
    right && frame.payload.len() == payload_len && frame.frame_len() == bytes.len()
}

fn operate(client: &mut Client, operation: u8) -> Result<(), Error> {
    let (key, context) = (KeyRef::Name("backup"), ContextRef::EMPTY);
    let mut passphrase = SecretVec::with_capacity(8);
    passphrase.push_slice(b"password").unwrap();
    let mut message = vec![0x5a; 132];
    message[..28].copy_from_slice(b"\x92\x6b\x1c\x01\x01\x01\0\0\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7\xa8\xa9\xaa\xab\xac\xad\xae\xaf\0\0\0\x01");
    let mut head = [0x5a; 188];
    head[..28].copy_from_slice(&message[..28]);
    head[5] = 3;
    match operation % 32 {
        0 => client.ping(),
        1 => client.status().map(|_| ()),
        2 => client.stats().map(|_| ()),
        3 => client.add(&NewKey { memory_only: true, ..NewKey::new("backup") }).map(|_| ()),
        4 => client.list().try_for_each(|row| row.map(|_| ())),
        5 => client.describe(key).map(|_| ()),
        6 => client.remove(key).map(|_| ()),
        7 => client.remove_all().map(|_| ()),
        8 => client.rotate(key).map(|_| ()),
        9 => client.rename(key, "other").map(|_| ()),
        10 => client.export(key, None, Some(&passphrase)).map(|_| ()),
        11 => client.encrypt(key, context, b"attack at dawn").map(|sealed| assert_eq!(sealed.len(), 114)),
        12 => client.decrypt(key, context, &message).map(|opened| assert_eq!(opened.len(), 32)),
        13 => client.wrap(key, context, b"attack at dawn").map(|sealed| assert_eq!(sealed.len(), 114)),
        14 => {
            message[5] = 2;
            client.unwrap(key, context, &message).map(|opened| assert_eq!(opened.len(), 32))
        }
        15 => client.data_key(key, context, 32).map(|made| {
            assert_eq!((made.plaintext.len(), made.wrapped.len()), (32, 132));
        }),
        16 => client.data_key_wrapped(key, context, 32).map(|wrapped| assert_eq!(wrapped.len(), 132)),
        17 => client.rewrap(key, context, &message, None).map(|moved| {
            assert!(moved.replacement.is_none_or(|replacement| replacement.len() == message.len()));
        }),
        18 => client.rewrap(key, context, &head[..132], Some(KeyRef::Name("other"))).map(|_| ()),
        19 => client.verify(key, context, &message).map(|_| ()),
        20 => client.mac(key, context, &[7; 64]).map(|_| ()),
        21 => client.mac_verify(key, context, &[7; 60], &[7; 64]),
        22 => client.random(32).map(|random| assert_eq!(random.len(), 32)),
        23 => client.bind(7, key).map(|_| ()),
        24 => client.stream_new(key, context).map(|_| ()),
        25 => client.stream_open(key, context, &head).map(|_| ()),
        26 => {
            let mut sealed = Vec::new();
            let stream = client.remote_stream_new(key, context)?;
            stream.run(Input::from_reader(&[7; 100][..]), Output::to_writer(&mut sealed), &()).map(|_| ())
        }
        27 => {
            let mut opened = Vec::new();
            let stream = client.remote_stream_open(key, context, &head)?;
            stream.run(Input::from_reader(&[7; 100][..]), Output::to_writer(&mut opened), &()).map(|_| ())
        }
        28 => client.lock(&passphrase).map(|_| ()),
        29 => client.unlock(&passphrase).map(|_| ()),
        _ => {
            let mut batch = Batch::new();
            batch.encrypt(key, context, b"attack at dawn");
            batch.random(32);
            batch.decrypt(key, context, &message);
            if operation % 32 == 30 {
                assert_eq!(client.batch(&batch)?.len(), 3);
                return Ok(());
            }
            let mut pipeline = client.pipeline();
            pipeline.encrypt(key, context, b"attack at dawn");
            pipeline.random(32);
            assert_eq!(pipeline.count(), 2);
            Ok(())
        }
    }
}
