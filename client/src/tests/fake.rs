//! An agent with one key, one thread a connection, and a hook through which every reply goes.

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use kms_envelope::{
    Body, CHUNK_LEN, ContextRef, ExpandKey, Header, KeyId, KeyVersion, MessageKey, Purpose, SEALED_CHUNK_LEN,
    STREAM_HEAD_LEN, TAG_LEN, new_stream, open_stream,
};
use kms_protocol::{
    Added, Description, FRAME_MAX, Fact, Frame, KeyRow, KeyState, Listed, LockState, Locking, NoFields,
    Opcode, Refusal, RemoteStream, Removed, Request, Status, StatusReply, VersionRow, Welcome, push_frame,
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
        // Ends with the test process; a connection ends with its client.
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (hook, counter) = (Arc::clone(&hook), Arc::clone(&counter));
                thread::spawn(move || serve(connection.unwrap(), &*hook, &counter));
            }
        });
        Self { socket, requests, _dir: dir }
    }
}

/// The head and key of a stream, as the agent gives them.
pub(super) fn stream(context: ContextRef<'_>) -> ([u8; STREAM_HEAD_LEN], MessageKey) {
    let header =
        Header { purpose: Purpose::Stream, key_id: KeyId::from_bytes(ID), key_version: KeyVersion::FIRST };
    new_stream(&ExpandKey::new(&KEY), &header, context, &[2; 32], &[3; 24], &[4; 24]).unwrap()
}

fn serve(mut socket: UnixStream, hook: &Hook, requests: &AtomicUsize) {
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
            bytes.drain(..len);
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
            // Of the right length, which is all that the client can know.
            let mut sealed = plaintext.to_vec();
            sealed.resize(kms_envelope::message_len(plaintext.len()), 0);
            ok!(&NoFields {}, &sealed);
        }
        Request::Decrypt { ciphertext, .. } => {
            let len = kms_envelope::message_plaintext_len(ciphertext.len()).unwrap();
            ok!(&NoFields {}, &ciphertext[..len]);
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
    }
    out
}

fn open(context: &[u8], head: &[u8]) -> Option<MessageKey> {
    let head = head.try_into().ok()?;
    open_stream(&ExpandKey::new(&KEY), head, ContextRef::parse(context).unwrap()).ok()
}
