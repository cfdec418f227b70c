//! An agent with one key, one thread a connection, and a hook through which every reply goes.

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use kms_envelope::{
    Body, CHUNK_LEN, ContextRef, ExpandKey, HEADER_LEN, Header, KeyId, KeyVersion, MessageKey, Purpose,
    SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN, new_stream, open_stream,
};
use kms_protocol::{
    Added, Bound, Description, Exported, FRAME_MAX, Fact, Frame, KeyRow, KeyState, Listed, LockState,
    Locking, NoFields, Opcode, OperationCount, Refusal, RemoteStream, Removed, RemovedAll, Renamed, Request,
    Rewrapped, Rotated, StatsReply, Status, StatusReply, Value, Verified, VersionRow, Welcome, push_frame,
};
use tempfile::TempDir;

pub(super) const ID: [u8; 16] = [7; 16];
const KEY: [u8; 32] = [1; 32];

/// What becomes of a reply.
pub(super) enum Fate {
    Send(Vec<u8>),
    SendAndClose(Vec<u8>),
}

type Hook = dyn Fn(Opcode, Vec<u8>) -> Fate + Send + Sync;

pub(super) struct Fake {
    pub(super) socket: PathBuf,
    /// Requests that arrived.
    pub(super) requests: Arc<AtomicUsize>,
    /// The frames of all of them, hellos apart.
    pub(super) frames: Arc<Mutex<Vec<Vec<u8>>>>,
    _dir: TempDir,
}

impl Fake {
    pub(super) fn honest() -> Self {
        Self::new(|_, reply| Fate::Send(reply))
    }

    pub(super) fn new(hook: impl Fn(Opcode, Vec<u8>) -> Fate + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let hook: Arc<Hook> = Arc::new(hook);
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        let frames = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&frames);
        // Ends with the test process; a connection ends with its client.
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (hook, counter, log) = (Arc::clone(&hook), Arc::clone(&counter), Arc::clone(&log));
                thread::spawn(move || serve(connection.unwrap(), &*hook, &counter, &log));
            }
        });
        Self { socket, requests, frames, _dir: dir }
    }
}

/// The head and key of a stream, as the agent gives them.
pub(super) fn stream(context: ContextRef<'_>) -> ([u8; STREAM_HEAD_LEN], MessageKey) {
    let header =
        Header { purpose: Purpose::Stream, key_id: KeyId::from_bytes(ID), key_version: KeyVersion::FIRST };
    new_stream(&ExpandKey::new(&KEY), &header, context, &[2; 32], &[3; 24], &[4; 24]).unwrap()
}

fn serve(mut socket: UnixStream, hook: &Hook, requests: &AtomicUsize, log: &Mutex<Vec<Vec<u8>>>) {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 1 << 16];
    let mut streams = HashMap::new();
    loop {
        while let Some(frame) = Frame::parse(&bytes, FRAME_MAX).unwrap() {
            requests.fetch_add(1, Ordering::SeqCst);
            let opcode = Opcode::from_code(frame.head.code).unwrap();
            let reply =
                answer(&Request::decode(opcode, &frame).unwrap(), frame.head.request_id, &mut streams);
            let len = frame.frame_len();
            let frame: Vec<u8> = bytes.drain(..len).collect();
            if opcode != Opcode::Hello {
                log.lock().unwrap().push(frame);
            }
            let (reply, close) = match hook(opcode, reply) {
                Fate::Send(reply) => (reply, false),
                Fate::SendAndClose(reply) => (reply, true),
            };
            if socket.write_all(&reply).is_err() || close {
                return;
            }
        }
        match socket.read(&mut piece) {
            Ok(0) | Err(_) => return,
            Ok(len) => bytes.extend_from_slice(&piece[..len]),
        }
    }
}

pub(super) fn row(name: &str) -> KeyRow {
    KeyRow {
        name: name.to_owned(),
        id: ID,
        memory_only: true,
        state: KeyState::Enabled,
        primary: 1,
        minimum: 1,
        versions: 1,
        check_value: [5; 8],
        created: 1_700_000_000,
        expires_in: None,
        uses: 3,
    }
}

fn version(version: u32) -> VersionRow {
    VersionRow { version, state: KeyState::Enabled, check_value: [5; 8], created: 1, uses: 0 }
}

fn answer(request: &Request<'_>, id: u32, streams: &mut HashMap<u32, (Body, u64)>) -> Vec<u8> {
    let mut out = Vec::new();
    macro_rules! ok {
        ($fields:expr, $payload:expr) => {
            push_frame(&mut out, Status::Ok.code(), id, $fields, $payload).unwrap()
        };
    }
    macro_rules! refuse {
        ($status:expr) => {
            push_frame(&mut out, $status.code(), id, &Refusal { retry_after_ms: 0 }, &[]).unwrap()
        };
    }
    match request {
        Request::Hello(_) => ok!(
            &Welcome {
                version: 1,
                frame_max: 1 << 20,
                message_max: 65536,
                context_max: 8192,
                context_pairs_max: 64,
                in_flight_max: 256,
                page_rows_max: 256,
                remote_streams_max: 16,
                opcodes: Opcode::ALL.iter().map(|opcode| opcode.code()).collect(),
                constraints: vec![1],
                features: 0,
            },
            &[]
        ),
        Request::Ping => ok!(&NoFields {}, &[]),
        Request::Status => ok!(
            &StatusReply {
                state: LockState::Unlocked,
                facts: vec![Fact { name: "keys".into(), value: "1".into() }],
            },
            &[]
        ),
        Request::Lock { .. } | Request::Unlock { .. } => ok!(&Locking { changed: true }, &[]),
        Request::Add { fields, .. } if fields.name == "taken" => refuse!(Status::Exists),
        Request::Add { .. } => ok!(&Added { id: ID, version: 1, check_value: [5; 8], created: true }, &[]),
        Request::List(list) if list.cursor < 2 => {
            ok!(&Listed { keys: vec![row(&format!("key{}", list.cursor))], next: list.cursor + 1 }, &[]);
        }
        Request::List(_) => ok!(&Listed { keys: vec![row("last")], next: 0 }, &[]),
        Request::Describe(describe) => {
            let next = describe.versions_after + 1;
            ok!(
                &Description {
                    key: row("key"),
                    versions: vec![version(next)],
                    more: next < 3,
                    constraints: vec![]
                },
                &[]
            );
        }
        Request::Remove(_) => ok!(&Removed { id: ID }, &[]),
        Request::Encrypt { plaintext, .. } => {
            ok!(&NoFields {}, &sealed(Purpose::Message, plaintext));
        }
        Request::Decrypt { ciphertext, .. } => {
            let len = kms_envelope::message_plaintext_len(ciphertext.len()).unwrap();
            ok!(&NoFields {}, &ciphertext[HEADER_LEN..][..len]);
        }
        Request::StreamNew(fields) => {
            let (head, key) = stream(ContextRef::parse(fields.context).unwrap());
            let (key, nonce) = key.expose_secret();
            ok!(&NoFields {}, &[&head[..], key, nonce].concat());
        }
        Request::StreamOpen { fields, head } => match open(fields.context, head) {
            Some(key) => {
                let (key, nonce) = key.expose_secret();
                ok!(&NoFields {}, &[&key[..], nonce].concat());
            }
            None => refuse!(Status::InvalidCiphertext),
        },
        Request::RemoteStreamNew(fields) => {
            let (head, key) = stream(ContextRef::parse(fields.context).unwrap());
            streams.insert(1, (Body::new(key), 0));
            ok!(&RemoteStream { stream: 1 }, &head);
        }
        Request::RemoteStreamOpen { fields, head } => match open(fields.context, head) {
            Some(key) => {
                streams.insert(2, (Body::new(key), 0));
                ok!(&RemoteStream { stream: 2 }, &[]);
            }
            None => refuse!(Status::InvalidCiphertext),
        },
        Request::RemoteStreamEncrypt { stream, plaintext } => {
            let Some((body, next)) = streams.get_mut(stream) else {
                refuse!(Status::NotFound);
                return out;
            };
            let mut sealed = Vec::new();
            for chunk in plaintext.chunks(CHUNK_LEN) {
                sealed.extend_from_slice(chunk);
                sealed.extend_from_slice(&[0; TAG_LEN]);
            }
            let full = plaintext.len() / CHUNK_LEN;
            let last = plaintext.is_empty() || !plaintext.len().is_multiple_of(CHUNK_LEN);
            if plaintext.is_empty() {
                sealed.extend_from_slice(&[0; TAG_LEN]);
            }
            body.seal_chunks(*next, &mut sealed).unwrap();
            *next += full as u64;
            if last {
                streams.remove(stream);
            }
            ok!(&NoFields {}, &sealed);
        }
        Request::RemoteStreamDecrypt { fields, chunks } => {
            let mut opened = chunks.to_vec();
            match streams.get(&fields.stream).map(|(body, _)| body.open_chunks(fields.first, &mut opened)) {
                Some(Ok(())) => {
                    let plain: Vec<u8> = opened
                        .chunks(SEALED_CHUNK_LEN)
                        .flat_map(|stride| &stride[..stride.len() - TAG_LEN])
                        .copied()
                        .collect();
                    ok!(&NoFields {}, &plain);
                }
                Some(Err(_)) => refuse!(Status::InvalidCiphertext),
                None => refuse!(Status::NotFound),
            }
        }
        Request::RemoteStreamClose(_) => ok!(&NoFields {}, &[]),
        Request::Rotate(_) => ok!(&Rotated { id: ID, version: 2, check_value: [6; 8] }, &[]),
        Request::Rename(rename) if rename.name == "taken" => refuse!(Status::Exists),
        Request::Rename(_) => ok!(&Renamed { id: ID }, &[]),
        Request::RemoveAll(_) => ok!(&RemovedAll { keys: 5 }, &[]),
        Request::Export { fields, .. } => ok!(&Exported { id: ID, version: fields.version.max(1) }, &KEY),
        Request::Wrap { plaintext, .. } => ok!(&NoFields {}, &sealed(Purpose::WrappedKey, plaintext)),
        Request::Unwrap { ciphertext, .. } => {
            let len = kms_envelope::message_plaintext_len(ciphertext.len()).unwrap();
            ok!(&NoFields {}, &ciphertext[HEADER_LEN..][..len]);
        }
        Request::DataKey(fields) => {
            let plain = vec![9; fields.length as usize];
            ok!(&NoFields {}, &[&plain[..], &sealed(Purpose::WrappedKey, &plain)].concat());
        }
        Request::DataKeyWrapped(fields) => {
            ok!(&NoFields {}, &sealed(Purpose::WrappedKey, &vec![9; fields.length as usize]));
        }
        Request::Rewrap { ciphertext, .. } => {
            // Everything goes to version 2.
            let mut header = Header::parse(ciphertext).unwrap();
            let changed = header.key_version.value() != 2;
            header.key_version = KeyVersion::new(2).unwrap();
            let moved = [&header.to_bytes()[..], &ciphertext[HEADER_LEN..]].concat();
            ok!(&Rewrapped { changed, id: ID, version: 2 }, if changed { &moved } else { &[] });
        }
        Request::Verify { ciphertext, .. } => {
            let version = Header::parse(ciphertext).unwrap().key_version.value();
            ok!(&Verified { id: ID, name: "key".into(), version, primary: 2 }, &[]);
        }
        Request::Mac { .. } => ok!(&NoFields {}, &tag()),
        Request::MacVerify { tag_and_digest, .. } if tag_and_digest[..60] == tag() => ok!(&NoFields {}, &[]),
        Request::MacVerify { .. } => refuse!(Status::InvalidCiphertext),
        Request::Random(random) => ok!(&NoFields {}, &vec![3; random.length as usize]),
        Request::Bind(_) => ok!(&Bound { id: ID }, &[]),
        Request::Batch { frames } => {
            let mut replies = Vec::new();
            let mut rest = *frames;
            while let Some(item) = Frame::parse(rest, FRAME_MAX).unwrap() {
                let opcode = Opcode::from_code(item.head.code).unwrap();
                let request = Request::decode(opcode, &item).unwrap();
                replies.extend(answer(&request, item.head.request_id, streams));
                rest = &rest[item.frame_len()..];
            }
            ok!(&NoFields {}, &replies);
        }
        Request::Stats => ok!(
            &StatsReply {
                uptime_ms: 7,
                operations: vec![OperationCount { opcode: 2, status: 0, count: 1 }],
                values: vec![Value { name: "keys".into(), value: 1 }],
            },
            &[]
        ),
    }
    out
}

/// Of the right form, which is all that the client can know: what it holds stands in the clear.
fn sealed(purpose: Purpose, plaintext: &[u8]) -> Vec<u8> {
    let header = Header { purpose, key_id: KeyId::from_bytes(ID), key_version: KeyVersion::FIRST };
    let mut sealed = [&header.to_bytes()[..], plaintext].concat();
    sealed.resize(kms_envelope::message_len(plaintext.len()), 0);
    sealed
}

fn tag() -> Vec<u8> {
    sealed(Purpose::Tag, &[])[..60].to_vec()
}

fn open(context: &[u8], head: &[u8]) -> Option<MessageKey> {
    let head = head.try_into().ok()?;
    open_stream(&ExpandKey::new(&KEY), head, ContextRef::parse(context).unwrap()).ok()
}
