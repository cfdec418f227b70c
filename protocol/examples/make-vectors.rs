//! Writes the vectors of `docs/protocol.md`, section 12, that are not there yet.
//!
//!     cargo run -p kms-protocol --example make-vectors -- tests/vectors/protocol
//!
//! A file that is there is never touched: a message that was shipped never changes, so neither does its vector.

#[path = "../tests/support/show.rs"]
mod show;

use std::{env, error::Error, fs, path::PathBuf};

use kms_protocol::{
    Add, Added, Bind, Bound, Constraint, Describe, Description, Export, Exported, FRAME_HEAD_LEN, Fact,
    Hello, KeyAndContext, KeyRef, KeyRow, KeyState, List, Listed, LockState, Locking, Malformed, Material,
    NewDataKey, NoFields, Opcode, OperationCount, Random, Refusal, RemoteChunks, RemoteStream, Remove,
    RemoveAll, Removed, RemovedAll, Rename, Renamed, Request, Rewrap, Rewrapped, Rotate, Rotated, StatsReply,
    Status, StatusReply, Value, Verified, VersionRow, Welcome, constraint,
};
use show::{Fields, hex, parts};

/// The id of the key in every vector.
const KEY_ID: [u8; 16] = sequence(0xa0);
const TOKEN: [u8; 16] = sequence(0xe0);
const IMPORTED: [u8; 32] = sequence(0);
/// The check value of [`IMPORTED`].
const CHECK_VALUE: [u8; 8] = [0x06, 0x57, 0xb0, 0x56, 0x71, 0xf9, 0xc3, 0x2e];
const NO_CONTEXT: &[u8] = &[0; 4];
/// `table` = `accounts`.
const CONTEXT: &[u8] = b"\0\0\0\x01\0\0\0\x05table\0\0\0\x08accounts";
/// The ciphertext of [`PLAINTEXT`] under [`IMPORTED`] and [`CONTEXT`] with the salt `c0`, `c1`, … `d7`.
const CIPHERTEXT: &[u8] = &[
    0x92, 0x6b, 0x1c, 0x01, 0x01, 0x01, 0x00, 0x00, 0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8,
    0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x00, 0x00, 0x00, 0x01, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5,
    0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf, 0xd0, 0xd1, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6,
    0xd7, 0xaf, 0xdd, 0x03, 0xb3, 0xca, 0x53, 0xb5, 0x76, 0x99, 0x64, 0x6b, 0xf6, 0x13, 0x86, 0x1e, 0xa2,
    0xa5, 0xd8, 0xd3, 0x16, 0xc8, 0x5c, 0x52, 0xc2, 0xfe, 0x5e, 0xfb, 0x27, 0xb8, 0xb7, 0xb5, 0x8b, 0x26,
    0xa5, 0x65, 0xe9, 0x46, 0x78, 0xa0, 0xf0, 0x12, 0xe6, 0xa1, 0x65, 0xb3, 0xae, 0xe0, 0x54, 0x90, 0x92,
    0x36, 0x20, 0xd4, 0x25, 0xf0, 0x52, 0xaf, 0xa8, 0xf4, 0x17, 0x7b, 0xfc,
];
const PLAINTEXT: &[u8] = b"attack at dawn";
/// Stands for a short sealed chunk.
const CHUNK: [u8; 30] = sequence(0x40);
/// Stands for a message key and a base nonce.
const STREAM_KEY: [u8; 44] = sequence(0x10);
/// Stands for a key of the caller's, or a data key.
const CALLERS_KEY: [u8; 32] = sequence(0x60);
/// Stands for the SHA-512 of an input.
const DIGEST: [u8; 64] = sequence(0x80);
/// A number of this connection.
const BOUND: u32 = 0x0102_0304;
const PASSPHRASE: &[u8] = b"correct horse battery staple";
const CREATED: u64 = 1_700_000_000;

const fn sequence<const N: usize>(start: u8) -> [u8; N] {
    let mut bytes = [start; N];
    let mut rest: &mut [u8] = &mut bytes;
    let mut next = start;
    while let [first, behind @ ..] = rest {
        *first = next;
        next = next.wrapping_add(1);
        rest = behind;
    }
    bytes
}

/// Name, what it is about, what is answered, fields, payload.
type Reply<'a> = (&'a str, &'a str, Opcode, &'a dyn Fields, &'a [u8]);
/// Name, what it is about, what is answered, status, failure, encoded fields.
type BadReply = (&'static str, &'static str, Opcode, Status, &'static str, Vec<u8>);
type Outcome = Result<(), Box<dyn Error>>;

/// The folder, and how many files were written.
struct Folder {
    path: PathBuf,
    written: usize,
}

impl Folder {
    fn write(&mut self, name: &str, about: &str, lines: &[String]) -> Outcome {
        let path = self.path.join(name).with_extension("txt");
        if !path.exists() {
            fs::write(&path, format!("# {about}\n{}\n", lines.join("\n")))?;
            self.written = self.written.saturating_add(1);
        }
        Ok(())
    }

    fn request(&mut self, name: &str, about: &str, id: u32, request: &Request<'_>) -> Outcome {
        let (opcode, fields, payload) = parts(request);
        let what = format!("request {}", opcode.name());
        self.good(name, about, &what, (opcode.code(), id), fields.as_ref(), payload)
    }

    fn reply(
        &mut self,
        name: &str,
        about: &str,
        id: u32,
        opcode: Opcode,
        fields: &dyn Fields,
        payload: &[u8],
    ) -> Outcome {
        let what = format!("reply to {}", opcode.name());
        self.good(name, about, &what, (Status::Ok.code(), id), fields, payload)
    }

    fn refusal(
        &mut self,
        name: &str,
        about: &str,
        id: u32,
        opcode: Opcode,
        status: Status,
        retry_after_ms: u32,
    ) -> Outcome {
        let what = format!("reply to {}", opcode.name());
        self.good(name, about, &what, (status.code(), id), &Refusal { retry_after_ms }, &[])
    }

    fn good(
        &mut self,
        name: &str,
        about: &str,
        what: &str,
        (code, id): (u16, u32),
        fields: &dyn Fields,
        payload: &[u8],
    ) -> Outcome {
        let mut lines = vec![
            "expect: success".to_owned(),
            format!("message: {what}"),
            format!("code: {code:#06x}"),
            format!("request-id: {id}"),
        ];
        lines.extend(fields.lines().iter().map(|line| format!("field: {line}")));
        if !payload.is_empty() {
            lines.push(format!("payload: {}", hex(payload)));
        }
        lines.push(format!("frame: {}", hex(&fields.frame(code, id, payload)?)));
        self.write(name, about, &lines)
    }

    fn batch(
        &mut self,
        name: &str,
        about: &str,
        what: &str,
        (code, id): (u16, u32),
        items: &[Vec<u8>],
    ) -> Outcome {
        let payload = items.concat();
        let mut lines = vec![
            "expect: success".to_owned(),
            format!("message: {what}"),
            format!("code: {code:#06x}"),
            format!("request-id: {id}"),
            format!("payload: {}", hex(&payload)),
        ];
        lines.extend(items.iter().map(|item| format!("item: {}", hex(item))));
        lines.push(format!("frame: {}", hex(&NoFields {}.frame(code, id, &payload)?)));
        self.write(name, about, &lines)
    }

    /// `then` says whether the connection ends.
    fn bad_fields(
        &mut self,
        name: &str,
        about: &str,
        opcode: Opcode,
        reason: &str,
        fields: &[u8],
    ) -> Outcome {
        let message = format!("request {}", opcode.name());
        let expect = format!("malformed: fields: {reason}");
        let bytes = frame(opcode.code(), 9, fields, &[])?;
        self.bad(&format!("bad-fields-{name}"), about, &message, &expect, &bytes)
    }

    fn bad(&mut self, name: &str, about: &str, message: &str, expect: &str, frame: &[u8]) -> Outcome {
        let stays =
            ["unsupported: opcode", "malformed: key name", "unsupported: constraint", "malformed: batch"];
        let then = match expect {
            "incomplete" => "waits",
            _ if stays.contains(&expect) => "stays",
            _ => "closes",
        };
        let lines = [
            format!("expect: {expect}"),
            format!("message: {message}"),
            format!("then: {then}"),
            format!("frame: {}", hex(frame)),
        ];
        self.write(name, about, &lines)
    }
}

/// A frame with a sound head around these fields and this payload.
fn frame(code: u16, id: u32, fields: &[u8], payload: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let fields_length = u32::try_from(fields.len())?;
    let length = u32::try_from(fields.len().saturating_add(payload.len()))?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend([1, 0]);
    frame.extend(code.to_le_bytes());
    frame.extend(id.to_le_bytes());
    frame.extend(fields_length.to_le_bytes());
    frame.extend_from_slice(fields);
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// The fields of a message, encoded.
fn encoded(fields: &dyn Fields) -> Result<Vec<u8>, Malformed> {
    Ok(fields.frame(0, 0, &[])?.split_off(FRAME_HEAD_LEN))
}

/// `bytes` with those from `at` on replaced.
fn with(bytes: &[u8], at: usize, replacement: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut bytes = bytes.to_vec();
    let end = at.saturating_add(replacement.len());
    bytes.get_mut(at..end).ok_or(Malformed)?.copy_from_slice(replacement);
    Ok(bytes)
}

/// `bytes` without the last `count`.
fn without(bytes: &[u8], count: usize) -> Result<&[u8], Malformed> {
    bytes.get(..bytes.len().checked_sub(count).ok_or(Malformed)?).ok_or(Malformed)
}

fn by_name(context: &[u8]) -> KeyAndContext<'_> {
    KeyAndContext { key: KeyRef::Name("backup"), context }
}

fn add(name: &str, material: Material) -> Add<'_> {
    let constraints = vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }];
    Add { token: TOKEN, name, material, if_missing: false, constraints }
}

fn new_data_key(key: KeyRef<'_>) -> NewDataKey<'_> {
    NewDataKey { key, context: CONTEXT, length: 32 }
}

/// A ciphertext, as far as the protocol cares.
fn ciphertext(purpose: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x92, 0x6b, 0x1c, 1, 1, purpose, 0, 0];
    bytes.extend(KEY_ID);
    bytes.extend([0, 0, 0, 1]);
    bytes.resize(len, 0x5a);
    bytes
}

/// The items of the batch, and what comes back.
fn batch() -> Result<[Vec<Vec<u8>>; 2], Malformed> {
    let item = |code: u16, id: u32, fields: &dyn Fields, payload: &[u8]| fields.frame(code, id, payload);
    let requests = [
        Request::Encrypt { fields: by_name(CONTEXT), plaintext: PLAINTEXT },
        Request::Random(Random { length: 32 }),
        Request::Decrypt { fields: by_name(NO_CONTEXT), ciphertext: CIPHERTEXT },
        Request::Ping,
    ];
    let mut items = Vec::new();
    for (request, id) in requests.iter().zip([1, u32::MAX, 1, 0]) {
        let (opcode, fields, payload) = parts(request);
        items.push(item(opcode.code(), id, fields.as_ref(), payload)?);
    }
    let refused = |status: Status, id| item(status.code(), id, &Refusal { retry_after_ms: 0 }, &[]);
    let replies = vec![
        item(Status::Ok.code(), 1, &NoFields {}, CIPHERTEXT)?,
        item(Status::Ok.code(), u32::MAX, &NoFields {}, &CALLERS_KEY)?,
        refused(Status::InvalidCiphertext, 1)?,
        refused(Status::Unsupported, 0)?,
    ];
    Ok([items, replies])
}

fn key_row(name: &str, expires_in: Option<u64>) -> KeyRow {
    KeyRow {
        name: name.to_owned(),
        id: KEY_ID,
        memory_only: true,
        state: KeyState::Enabled,
        primary: 1,
        minimum: 1,
        versions: 1,
        check_value: CHECK_VALUE,
        created: CREATED,
        expires_in,
        uses: 3,
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        frame_max: 1_048_576,
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

/// The head of a stream, as far as the protocol cares.
fn stream_head() -> Vec<u8> {
    ciphertext(3, 188)
}

fn worked_example(folder: &mut Folder) -> Outcome {
    let about = "Worked example, docs/protocol.md, section 11.";
    folder.request("example-1-hello", about, 1, &Request::Hello(Hello { version: 1 }))?;
    folder.reply("example-2-hello-reply", about, 1, Opcode::Hello, &welcome(), &[])?;
    let fields = add("backup", Material::Import);
    folder.request("example-3-add", about, 2, &Request::Add { fields, material: &IMPORTED })?;
    let added = Added { id: KEY_ID, version: 1, check_value: CHECK_VALUE, created: true };
    folder.reply("example-4-add-reply", about, 2, Opcode::Add, &added, &[])?;
    let encrypt = Request::Encrypt { fields: by_name(CONTEXT), plaintext: PLAINTEXT };
    folder.request("example-5-encrypt", about, 3, &encrypt)?;
    folder.reply("example-6-encrypt-reply", about, 3, Opcode::Encrypt, &NoFields {}, CIPHERTEXT)?;
    let decrypt = Request::Decrypt { fields: by_name(NO_CONTEXT), ciphertext: CIPHERTEXT };
    folder.request("example-7-decrypt", about, 4, &decrypt)?;
    folder.refusal("example-8-decrypt-refused", about, 4, Opcode::Decrypt, Status::InvalidCiphertext, 0)
}

fn requests(folder: &mut Folder) -> Outcome {
    let by_id = KeyAndContext { key: KeyRef::Id(KEY_ID), context: CONTEXT };
    let head = stream_head();
    let head = head.as_slice();
    let first = head.get(..132).ok_or(Malformed)?;
    let wrapped = ciphertext(2, 132);
    let wrapped = wrapped.as_slice();
    let tag_and_digest = [&ciphertext(5, 60)[..], &DIGEST].concat();
    let tag_and_digest = tag_and_digest.as_slice();
    let all: Vec<(&str, &str, Request<'_>)> = vec![
        ("request-hello", "Version 1.", Request::Hello(Hello { version: 1 })),
        ("request-ping", "No fields, no payload.", Request::Ping),
        ("request-status", "No fields, no payload.", Request::Status),
        ("request-lock", "The passphrase is the payload.", Request::Lock { passphrase: PASSPHRASE }),
        ("request-unlock", "The passphrase is the payload.", Request::Unlock { passphrase: PASSPHRASE }),
        (
            "request-add-generate",
            "A key from the agent's generator, or the one that is there; no payload.",
            Request::Add {
                fields: Add { if_missing: true, ..add("db/main.2024_x-1", Material::Generate) },
                material: &[],
            },
        ),
        (
            "request-add-import",
            "The key is the payload.",
            Request::Add { fields: add("backup", Material::Import), material: &IMPORTED },
        ),
        (
            "request-add-no-constraint",
            "An empty vector.",
            Request::Add {
                fields: Add { constraints: Vec::new(), ..add("backup", Material::Generate) },
                material: &[],
            },
        ),
        ("request-list", "The first page.", Request::List(List { cursor: 0 })),
        ("request-list-next", "A later page.", Request::List(List { cursor: 0x0102_0304_0506_0708 })),
        (
            "request-describe-name",
            "By name, all versions.",
            Request::Describe(Describe { key: KeyRef::Name("backup"), versions_after: 0 }),
        ),
        (
            "request-describe-id",
            "By id, versions above 256.",
            Request::Describe(Describe { key: KeyRef::Id(KEY_ID), versions_after: 256 }),
        ),
        ("request-remove", "By name.", Request::Remove(Remove { token: TOKEN, key: KeyRef::Name("backup") })),
        (
            "request-encrypt",
            "By name, one pair of context.",
            Request::Encrypt { fields: by_name(CONTEXT), plaintext: PLAINTEXT },
        ),
        (
            "request-encrypt-empty",
            "By id, an empty plaintext.",
            Request::Encrypt { fields: by_id, plaintext: &[] },
        ),
        (
            "request-decrypt",
            "By id, one pair of context.",
            Request::Decrypt { fields: by_id, ciphertext: CIPHERTEXT },
        ),
        ("request-stream-new", "No payload.", Request::StreamNew(by_name(CONTEXT))),
        (
            "request-stream-open",
            "The head of the stream is the payload; to the protocol it is any 188 bytes.",
            Request::StreamOpen { fields: by_name(NO_CONTEXT), head },
        ),
        ("request-remote-stream-new", "No payload.", Request::RemoteStreamNew(by_id)),
        (
            "request-remote-stream-open",
            "The head of the stream is the payload; to the protocol it is any 188 bytes.",
            Request::RemoteStreamOpen { fields: by_id, head },
        ),
        (
            "request-remote-stream-encrypt",
            "The last, short chunk.",
            Request::RemoteStreamEncrypt { stream: 7, plaintext: PLAINTEXT },
        ),
        (
            "request-remote-stream-encrypt-end",
            "An empty payload ends a stream of whole chunks.",
            Request::RemoteStreamEncrypt { stream: u32::MAX, plaintext: &[] },
        ),
        (
            "request-remote-stream-decrypt",
            "A short chunk; to the protocol it is any bytes.",
            Request::RemoteStreamDecrypt {
                fields: RemoteChunks { stream: 7, first: 0x12_3456_789a },
                chunks: &CHUNK,
            },
        ),
        (
            "request-remote-stream-close",
            "The number of the stream.",
            Request::RemoteStreamClose(RemoteStream { stream: 7 }),
        ),
        (
            "request-add-constraints",
            "Every kind of constraint.",
            Request::Add {
                fields: Add {
                    constraints: [0, 3600, 0, u64::MAX, 0]
                        .into_iter()
                        .zip(constraint::ALL)
                        .map(|(value, kind)| Constraint { kind: *kind, value })
                        .collect(),
                    ..add("backup", Material::Generate)
                },
                material: &[],
            },
        ),
        (
            "request-describe-bound",
            "By a number of the connection.",
            Request::Describe(Describe { key: KeyRef::Bound(BOUND), versions_after: 0 }),
        ),
        ("request-rotate", "By name.", Request::Rotate(Rotate { token: TOKEN, key: KeyRef::Name("backup") })),
        (
            "request-rename",
            "By id.",
            Request::Rename(Rename { token: TOKEN, key: KeyRef::Id(KEY_ID), name: "db/main.2024_x-1" }),
        ),
        (
            "request-export",
            "The primary version, with a passphrase.",
            Request::Export {
                fields: Export { key: KeyRef::Name("backup"), version: 0 },
                passphrase: PASSPHRASE,
            },
        ),
        (
            "request-export-version",
            "Version 7, without a passphrase.",
            Request::Export { fields: Export { key: KeyRef::Id(KEY_ID), version: 7 }, passphrase: &[] },
        ),
        ("request-remove-all", "A token.", Request::RemoveAll(RemoveAll { token: TOKEN })),
        (
            "request-wrap",
            "The key of the caller's is the payload.",
            Request::Wrap { fields: by_name(CONTEXT), plaintext: &CALLERS_KEY },
        ),
        (
            "request-unwrap",
            "The wrapped key is the payload; to the protocol it is any bytes.",
            Request::Unwrap { fields: by_id, ciphertext: wrapped },
        ),
        ("request-datakey", "32 bytes.", Request::DataKey(new_data_key(KeyRef::Name("backup")))),
        (
            "request-datakey-wrapped",
            "1,024 bytes, by a number of the connection.",
            Request::DataKeyWrapped(NewDataKey { length: 1024, ..new_data_key(KeyRef::Bound(0)) }),
        ),
        (
            "request-rewrap",
            "To the primary version of the same key.",
            Request::Rewrap {
                fields: Rewrap { key: KeyRef::Name("backup"), context: CONTEXT, to: None },
                ciphertext: CIPHERTEXT,
            },
        ),
        (
            "request-rewrap-to",
            "The first 132 bytes of a stream, to another key.",
            Request::Rewrap {
                fields: Rewrap {
                    key: KeyRef::Id(KEY_ID),
                    context: NO_CONTEXT,
                    to: Some(KeyRef::Name("db/main")),
                },
                ciphertext: first,
            },
        ),
        (
            "request-verify",
            "The head of a stream; to the protocol it is any bytes.",
            Request::Verify { fields: by_id, ciphertext: head },
        ),
        (
            "request-mac",
            "The digest is the payload.",
            Request::Mac { fields: by_name(CONTEXT), digest: &DIGEST },
        ),
        ("request-random", "65,536 bytes.", Request::Random(Random { length: 65_536 })),
        ("request-bind", "By name.", Request::Bind(Bind { number: BOUND, key: KeyRef::Name("backup") })),
        (
            "request-mac-verify",
            "Tag and digest are the payload.",
            Request::MacVerify { fields: by_id, tag_and_digest },
        ),
        ("request-stats", "No fields, no payload.", Request::Stats),
    ];
    let mut id = 0x1000;
    for (name, about, request) in &all {
        folder.request(name, about, id, request)?;
        id += 1;
    }
    let [items, _] = batch()?;
    let about = "Four items; what the third asks for does not come about, and the fourth may not be one.";
    folder.batch("request-batch", about, "request batch", (Opcode::Batch.code(), id), &items)
}

fn replies(folder: &mut Folder) -> Outcome {
    let welcome = welcome();
    let mut new = stream_head();
    new.extend(STREAM_KEY);
    let fact = |name: &str, value: &str| Fact { name: name.to_owned(), value: value.to_owned() };
    let status = StatusReply {
        state: LockState::Unlocked,
        facts: vec![fact("version", "0.1.0"), fact("keys", "1"), fact("a-later-fact", "Grüße")],
    };
    let locked = StatusReply { state: LockState::Locked, facts: Vec::new() };
    let listed = Listed {
        keys: vec![key_row("backup", None), key_row("db/main", Some(3600))],
        next: 0x0102_0304_0506_0708,
    };
    let empty = Listed { keys: Vec::new(), next: 0 };
    let version = |version, uses| VersionRow {
        version,
        state: KeyState::Enabled,
        check_value: CHECK_VALUE,
        created: CREATED,
        uses,
    };
    let description = Description {
        key: key_row("backup", None),
        versions: vec![version(1, 2), version(2, u64::MAX)],
        more: true,
        constraints: vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }],
    };
    let found = Added { id: KEY_ID, version: 7, check_value: CHECK_VALUE, created: false };
    let removed = Removed { id: KEY_ID };
    let changed = Locking { changed: true };
    let unchanged = Locking { changed: false };
    let stream = RemoteStream { stream: 7 };
    let head = stream_head();
    let constrained = Description {
        key: key_row("backup", Some(1)),
        versions: vec![version(1, 0)],
        more: false,
        constraints: constraint::ALL.iter().map(|kind| Constraint { kind: *kind, value: 0 }).collect(),
    };
    let states = Description {
        key: KeyRow { state: KeyState::Removed, ..key_row("backup", None) },
        versions: [
            KeyState::Enabled,
            KeyState::Staged,
            KeyState::Disabled,
            KeyState::Removed,
            KeyState::Destroyed,
        ]
        .into_iter()
        .zip(1..)
        .map(|(state, number)| VersionRow { state, ..version(number, 0) })
        .collect(),
        more: false,
        constraints: Vec::new(),
    };
    let rotated = Rotated { id: KEY_ID, version: 2, check_value: CHECK_VALUE };
    let exported = Exported { id: KEY_ID, version: 1 };
    let wrapped = ciphertext(2, 132);
    let both = [&CALLERS_KEY[..], &wrapped].concat();
    let moved = Rewrapped { changed: true, id: KEY_ID, version: 2 };
    let kept = Rewrapped { changed: false, id: KEY_ID, version: 1 };
    let verified = Verified { id: KEY_ID, name: "backup".to_owned(), version: 1, primary: 2 };
    let tag = ciphertext(5, 60);
    let count = |opcode, status: Status, count| OperationCount { opcode, status: status.code(), count };
    let value = |name: &str, value| Value { name: name.to_owned(), value };
    let stats = StatsReply {
        uptime_ms: 86_400_000,
        operations: vec![
            count(0, Status::Malformed, 1),
            count(Opcode::Encrypt.code(), Status::Ok, 1000),
            count(Opcode::Encrypt.code(), Status::NotFound, u64::MAX),
        ],
        values: vec![value("keys", 1), value("a-later-value", 0)],
    };
    let no_stats = StatsReply { uptime_ms: 0, operations: Vec::new(), values: Vec::new() };
    let all: Vec<Reply<'_>> = vec![
        ("reply-hello", "What this release sends.", Opcode::Hello, &welcome, &[]),
        ("reply-ping", "Nothing.", Opcode::Ping, &NoFields {}, &[]),
        ("reply-status", "With a fact that is not known yet.", Opcode::Status, &status, &[]),
        ("reply-status-locked", "Locked, no facts.", Opcode::Status, &locked, &[]),
        ("reply-lock", "It was not locked before.", Opcode::Lock, &changed, &[]),
        ("reply-unlock", "It was not locked.", Opcode::Unlock, &unchanged, &[]),
        ("reply-add", "The key was there already.", Opcode::Add, &found, &[]),
        ("reply-list", "Two keys, and a page behind them.", Opcode::List, &listed, &[]),
        ("reply-list-empty", "No keys.", Opcode::List, &empty, &[]),
        ("reply-describe", "Two versions, and more behind them.", Opcode::Describe, &description, &[]),
        ("reply-remove", "The id of the key.", Opcode::Remove, &removed, &[]),
        ("reply-encrypt", "The ciphertext is the payload.", Opcode::Encrypt, &NoFields {}, CIPHERTEXT),
        ("reply-decrypt", "The plaintext is the payload.", Opcode::Decrypt, &NoFields {}, PLAINTEXT),
        ("reply-decrypt-empty", "An empty plaintext.", Opcode::Decrypt, &NoFields {}, &[]),
        ("reply-stream-new", "Head, message key, base nonce.", Opcode::StreamNew, &NoFields {}, &new),
        ("reply-stream-open", "Message key, base nonce.", Opcode::StreamOpen, &NoFields {}, &STREAM_KEY),
        ("reply-remote-stream-new", "A number and the head.", Opcode::RemoteStreamNew, &stream, &head),
        ("reply-remote-stream-open", "A number.", Opcode::RemoteStreamOpen, &stream, &[]),
        (
            "reply-remote-stream-encrypt",
            "A short chunk; to the protocol it is any bytes.",
            Opcode::RemoteStreamEncrypt,
            &NoFields {},
            &CHUNK,
        ),
        ("reply-remote-stream-decrypt", "Plaintext.", Opcode::RemoteStreamDecrypt, &NoFields {}, PLAINTEXT),
        ("reply-remote-stream-close", "Nothing.", Opcode::RemoteStreamClose, &NoFields {}, &[]),
        ("reply-describe-constraints", "Of a key with every kind.", Opcode::Describe, &constrained, &[]),
        ("reply-describe-states", "Every state of a version.", Opcode::Describe, &states, &[]),
        ("reply-rotate", "Version 2 is primary.", Opcode::Rotate, &rotated, &[]),
        ("reply-rename", "The id of the key.", Opcode::Rename, &Renamed { id: KEY_ID }, &[]),
        ("reply-export", "The key is the payload.", Opcode::Export, &exported, &IMPORTED),
        ("reply-remove-all", "Two keys are gone.", Opcode::RemoveAll, &RemovedAll { keys: 2 }, &[]),
        ("reply-wrap", "The wrapped key is the payload.", Opcode::Wrap, &NoFields {}, &wrapped),
        (
            "reply-unwrap",
            "The key of the caller's is the payload.",
            Opcode::Unwrap,
            &NoFields {},
            &CALLERS_KEY,
        ),
        ("reply-datakey", "The data key, and the same wrapped.", Opcode::DataKey, &NoFields {}, &both),
        ("reply-datakey-wrapped", "The wrapped key.", Opcode::DataKeyWrapped, &NoFields {}, &wrapped),
        ("reply-rewrap", "What takes the place of a message.", Opcode::Rewrap, &moved, CIPHERTEXT),
        ("reply-rewrap-unchanged", "Nothing was to be done.", Opcode::Rewrap, &kept, &[]),
        ("reply-verify", "Under version 1 of 2.", Opcode::Verify, &verified, &[]),
        ("reply-mac", "The tag is the payload.", Opcode::Mac, &NoFields {}, &tag),
        ("reply-random", "As many bytes as were asked for.", Opcode::Random, &NoFields {}, &CALLERS_KEY),
        ("reply-bind", "The id of the key.", Opcode::Bind, &Bound { id: KEY_ID }, &[]),
        ("reply-mac-verify", "It is the tag.", Opcode::MacVerify, &NoFields {}, &[]),
        ("reply-stats", "With a value that is not known yet.", Opcode::Stats, &stats, &[]),
        ("reply-stats-empty", "Nothing came about.", Opcode::Stats, &no_stats, &[]),
    ];
    let mut id = 0x2000;
    for (name, about, opcode, fields, payload) in all {
        folder.reply(name, about, id, opcode, fields, payload)?;
        id += 1;
    }
    let [_, items] = batch()?;
    let about = "The replies to four items, two of them refusals.";
    folder.batch("reply-batch", about, "reply to batch", (Status::Ok.code(), id), &items)?;
    for (status, id) in Status::ALL.iter().filter(|status| **status != Status::Ok).zip(0x3000..) {
        let retry_after_ms = if *status == Status::Busy { 1500 } else { 0 };
        let name = format!("refusal-{}", status.name());
        folder.refusal(&name, "A refusal.", id, Opcode::Unlock, *status, retry_after_ms)?;
    }
    Ok(())
}

fn bad_heads(folder: &mut Folder) -> Outcome {
    let request = "request list";
    let good = frame(Opcode::List.code(), 9, &[0; 8], &[])?;
    let cases: [(&str, &str, &str, Vec<u8>); 12] = [
        ("version-0", "Version 0.", "unsupported: frame version", with(&good, 4, &[0])?),
        ("version-2", "Version 2.", "unsupported: frame version", with(&good, 4, &[2])?),
        ("flags-lowest", "The lowest flag.", "malformed: frame flags", with(&good, 5, &[1])?),
        ("flags-highest", "The highest flag.", "malformed: frame flags", with(&good, 5, &[0x80])?),
        (
            "length-one-over",
            "One byte longer than the frame maximum; only the head is here.",
            "too-large: frame length",
            with(&good, 0, &(1_048_576_u32 - 16 + 1).to_le_bytes())?,
        ),
        ("length-2-31", "Length 2^31.", "too-large: frame length", with(&good, 0, &[0, 0, 0, 0x80])?),
        ("length-max", "Length 2^32 - 1.", "too-large: frame length", with(&good, 0, &[0xff; 4])?),
        (
            "fields-one-over",
            "Fields one byte longer than the length.",
            "malformed: frame fields length",
            with(&good, 12, &[9])?,
        ),
        (
            "fields-max",
            "Fields of 2^32 - 1 bytes.",
            "malformed: frame fields length",
            with(&good, 12, &[0xff; 4])?,
        ),
        ("head-short", "15 bytes of a head.", "incomplete", good.get(..15).ok_or(Malformed)?.to_vec()),
        ("body-short", "The last byte is missing.", "incomplete", without(&good, 1)?.to_vec()),
        (
            "length-longest",
            "The longest frame that there is; only 8 bytes behind the head are here.",
            "incomplete",
            with(&good, 0, &(1_048_576_u32 - 16).to_le_bytes())?,
        ),
    ];
    for (name, about, expect, bytes) in cases {
        folder.bad(&format!("bad-frame-{name}"), about, request, expect, &bytes)?;
    }
    for (name, about, code) in [
        ("0000", "Opcode 0 is never given out.", 0),
        ("reserved", "The opcode of destroy, reserved.", 0x19),
        ("ffff", "The highest opcode.", 0xffff),
    ] {
        let bytes = frame(code, 9, &[], &[])?;
        folder.bad(&format!("bad-opcode-{name}"), about, "request", "unsupported: opcode", &bytes)?;
    }
    Ok(())
}

fn bad_requests(folder: &mut Folder) -> Outcome {
    let hello = encoded(&Hello { version: 1 })?;
    let list = encoded(&List { cursor: 0 })?;
    let by_name = encoded(&by_name(NO_CONTEXT))?;
    let by_id = encoded(&KeyAndContext { key: KeyRef::Id(KEY_ID), context: NO_CONTEXT })?;
    let generate = encoded(&add("backup", Material::Generate))?;
    let chunks = encoded(&RemoteChunks { stream: 7, first: 0 })?;
    // Offsets in the fields of `add`: token 16, length 8, name 6, material 4, if-missing 1, length 8, kind 4, value 8.
    let (name, material, if_missing, constraints, kind) = (16, 30, 34, 35, 43);
    let longer = |bytes: &[u8]| [bytes, &[0]].concat();
    let cases: Vec<(&str, &str, Opcode, &str, Vec<u8>)> = vec![
        ("u16-truncated", "Half a u16.", Opcode::Hello, "truncated", without(&hello, 1)?.to_vec()),
        ("u32-truncated", "Three bytes of a u32.", Opcode::RemoteStreamClose, "truncated", vec![7, 0, 0]),
        ("u64-truncated", "Seven bytes of a u64.", Opcode::List, "truncated", without(&list, 1)?.to_vec()),
        ("no-fields", "Fields that are missing altogether.", Opcode::List, "truncated", Vec::new()),
        (
            "array-truncated",
            "15 bytes of a token.",
            Opcode::Remove,
            "truncated",
            TOKEN.get(..15).ok_or(Malformed)?.to_vec(),
        ),
        (
            "id-truncated",
            "15 bytes of a key id.",
            Opcode::StreamNew,
            "truncated",
            by_id.get(..19).ok_or(Malformed)?.to_vec(),
        ),
        (
            "tag-truncated",
            "Three bytes of an enumeration's tag.",
            Opcode::StreamNew,
            "truncated",
            by_name.get(..3).ok_or(Malformed)?.to_vec(),
        ),
        (
            "length-truncated",
            "Seven bytes of a string's length.",
            Opcode::StreamNew,
            "truncated",
            by_name.get(..11).ok_or(Malformed)?.to_vec(),
        ),
        (
            "bool-missing",
            "The fields end before a bool.",
            Opcode::Add,
            "truncated",
            generate.get(..if_missing).ok_or(Malformed)?.to_vec(),
        ),
        (
            "element-truncated",
            "A vector's only element lacks its last byte.",
            Opcode::Add,
            "truncated",
            without(&generate, 1)?.to_vec(),
        ),
        (
            "second-field-missing",
            "The second of two fields is missing.",
            Opcode::RemoteStreamDecrypt,
            "truncated",
            chunks.get(..4).ok_or(Malformed)?.to_vec(),
        ),
        (
            "string-one-over",
            "A string one byte longer than what is left.",
            Opcode::Describe,
            "length",
            [&[0; 4][..], &7_u64.to_le_bytes(), b"backup"].concat(),
        ),
        (
            "string-2-63",
            "A string of 2^63 bytes.",
            Opcode::Add,
            "length",
            with(&generate, name, &(1_u64 << 63).to_le_bytes())?,
        ),
        (
            "string-2-64-1",
            "A string of 2^64 - 1 bytes.",
            Opcode::Add,
            "length",
            with(&generate, name, &[0xff; 8])?,
        ),
        (
            "bytes-one-over",
            "A byte string one byte longer than what is left.",
            Opcode::Encrypt,
            "length",
            with(&by_name, 18, &[5])?,
        ),
        (
            "bytes-2-64-1",
            "A byte string of 2^64 - 1 bytes.",
            Opcode::Encrypt,
            "length",
            with(&by_name, 18, &[0xff; 8])?,
        ),
        (
            "vector-2-32",
            "A vector of 2^32 elements.",
            Opcode::Add,
            "length",
            with(&generate, constraints, &(1_u64 << 32).to_le_bytes())?,
        ),
        (
            "vector-2-64-1",
            "A vector of 2^64 - 1 elements.",
            Opcode::Add,
            "length",
            with(&generate, constraints, &[0xff; 8])?,
        ),
        (
            "utf-8-lone-byte",
            "A string with the byte ff.",
            Opcode::Add,
            "utf-8",
            with(&generate, 24, &[0xff])?,
        ),
        (
            "utf-8-overlong",
            "A string with an overlong encoding of a slash.",
            Opcode::Add,
            "utf-8",
            with(&generate, 24, &[0xc0, 0xaf])?,
        ),
        (
            "utf-8-surrogate",
            "A string with a surrogate.",
            Opcode::StreamNew,
            "utf-8",
            with(&by_name, 12, &[0xed, 0xa0, 0x80])?,
        ),
        ("bool-2", "A bool of 02.", Opcode::Add, "bool", with(&generate, if_missing, &[2])?),
        ("bool-255", "A bool of ff.", Opcode::Add, "bool", with(&generate, if_missing, &[0xff])?),
        ("tag-key-ref-3", "Tag 3 of KeyRef.", Opcode::Decrypt, "enumeration tag", with(&by_name, 0, &[3])?),
        (
            "tag-key-ref-high",
            "A tag with its highest byte set.",
            Opcode::Decrypt,
            "enumeration tag",
            with(&by_name, 3, &[0x80])?,
        ),
        (
            "tag-material-2",
            "Tag 2 of Material.",
            Opcode::Add,
            "enumeration tag",
            with(&generate, material, &[2])?,
        ),
        ("trailing-byte", "A byte behind the fields.", Opcode::List, "trailing", longer(&list)),
        ("trailing-empty", "A byte where no fields belong.", Opcode::Ping, "trailing", vec![0]),
        ("trailing-vector", "A byte behind a vector.", Opcode::Add, "trailing", longer(&generate)),
        (
            "varint",
            "The version as one byte, as an encoding with variable-length integers has it.",
            Opcode::Hello,
            "truncated",
            vec![1],
        ),
    ];
    for (name, about, opcode, reason, fields) in cases {
        folder.bad_fields(name, about, opcode, reason, &fields)?;
    }
    let rotate = encoded(&Rotate { token: TOKEN, key: KeyRef::Name("backup") })?;
    let rename = encoded(&Rename { token: TOKEN, key: KeyRef::Name("backup"), name: "other" })?;
    let data_key = encoded(&new_data_key(KeyRef::Name("backup")))?;
    let bind = encoded(&Bind { number: BOUND, key: KeyRef::Name("backup") })?;
    for (name, about, opcode, reason, fields) in new_shapes(&rotate, &rename, &data_key, &bind)? {
        folder.bad_fields(name, about, opcode, reason, &fields)?;
    }
    for (opcode, fields) in [
        (Opcode::Hello, hello),
        (Opcode::Ping, Vec::new()),
        (Opcode::Status, Vec::new()),
        (Opcode::List, list),
        (Opcode::Describe, encoded(&Describe { key: KeyRef::Name("backup"), versions_after: 0 })?),
        (Opcode::Remove, encoded(&Remove { token: TOKEN, key: KeyRef::Name("backup") })?),
        (Opcode::StreamNew, by_name.clone()),
        (Opcode::RemoteStreamNew, by_name),
        (Opcode::RemoteStreamClose, encoded(&RemoteStream { stream: 7 })?),
        (Opcode::Rotate, rotate.clone()),
        (Opcode::Rename, rename.clone()),
        (Opcode::RemoveAll, TOKEN.to_vec()),
        (Opcode::DataKey, data_key.clone()),
        (Opcode::DataKeyWrapped, data_key.clone()),
        (Opcode::Random, encoded(&Random { length: 32 })?),
        (Opcode::Bind, bind.clone()),
        (Opcode::Stats, Vec::new()),
    ] {
        let message = format!("request {}", opcode.name());
        let bytes = frame(opcode.code(), 9, &fields, b"x")?;
        let name = format!("bad-payload-{}", opcode.name());
        folder.bad(&name, "A payload where none belongs.", &message, "malformed: payload", &bytes)?;
    }
    let long = "x".repeat(256);
    for (name, about, text) in [
        ("empty", "An empty name.", ""),
        ("long", "A name of 256 bytes.", long.as_str()),
        ("hyphen", "A name that starts with a hyphen.", "-a"),
        ("slash", "A name that starts with a slash.", "/a"),
        ("space", "A name with a space.", "a b"),
        ("zero", "A name with a zero byte.", "a\0"),
        ("umlaut", "A name with a character outside ASCII.", "schlüssel"),
    ] {
        let bytes = frame(Opcode::Add.code(), 9, &encoded(&add(text, Material::Generate))?, &[])?;
        folder.bad(&format!("bad-name-{name}"), about, "request add", "malformed: key name", &bytes)?;
    }
    let bytes = Rename { token: TOKEN, key: KeyRef::Name("backup"), name: "-a" };
    let bytes = frame(Opcode::Rename.code(), 9, &encoded(&bytes)?, &[])?;
    let about = "A new name that starts with a hyphen.";
    folder.bad("bad-name-rename", about, "request rename", "malformed: key name", &bytes)?;
    let bytes = frame(
        Opcode::Wrap.code(),
        9,
        &encoded(&KeyAndContext { key: KeyRef::Name("a*"), context: NO_CONTEXT })?,
        b"x",
    )?;
    let about = "A name that only looks for a key.";
    folder.bad("bad-name-wrap", about, "request wrap", "malformed: key name", &bytes)?;
    for (name, about, number) in
        [("0", "Kind 0.", 0_u32), ("6", "Kind 6.", 6), ("max", "Kind 2^32 - 1.", u32::MAX)]
    {
        let bytes = frame(Opcode::Add.code(), 9, &with(&generate, kind, &number.to_le_bytes())?, &[])?;
        let name = format!("bad-constraint-{name}");
        folder.bad(&name, about, "request add", "unsupported: constraint", &bytes)?;
    }
    Ok(())
}

/// Name, what it is about, opcode, failure, encoded fields.
type BadRequest = (&'static str, &'static str, Opcode, &'static str, Vec<u8>);

/// Of the requests that came with rotation, wrapping, tags and batches.
fn new_shapes(
    rotate: &[u8],
    rename: &[u8],
    data_key: &[u8],
    bind: &[u8],
) -> Result<Vec<BadRequest>, Malformed> {
    let export = encoded(&Export { key: KeyRef::Bound(BOUND), version: 0 })?;
    let rewrap =
        encoded(&Rewrap { key: KeyRef::Bound(BOUND), context: NO_CONTEXT, to: Some(KeyRef::Name("other")) })?;
    // Offset in the fields of `rewrap`: tag 4, number 4, length 8, context 4; then the option.
    let to = 20;
    let longer = |bytes: &[u8]| [bytes, &[0]].concat();
    Ok(vec![
        ("rotate-no-key", "A token and no key.", Opcode::Rotate, "truncated", TOKEN.to_vec()),
        ("rotate-trailing", "A byte behind the fields.", Opcode::Rotate, "trailing", longer(rotate)),
        (
            "rename-no-name",
            "The new name is missing.",
            Opcode::Rename,
            "truncated",
            without(rename, 13)?.to_vec(),
        ),
        (
            "rename-length",
            "A name one byte longer than what is left.",
            Opcode::Rename,
            "length",
            without(rename, 1)?.to_vec(),
        ),
        ("rename-utf-8", "A name with the byte ff.", Opcode::Rename, "utf-8", with(rename, 42, &[0xff])?),
        ("rename-trailing", "A byte behind the fields.", Opcode::Rename, "trailing", longer(rename)),
        (
            "export-truncated",
            "Three bytes of the version.",
            Opcode::Export,
            "truncated",
            without(&export, 1)?.to_vec(),
        ),
        ("export-tag", "Tag 3 of KeyRef.", Opcode::Export, "enumeration tag", with(&export, 0, &[3])?),
        ("export-trailing", "A byte behind the fields.", Opcode::Export, "trailing", longer(&export)),
        (
            "bound-truncated",
            "Three bytes of a bound number.",
            Opcode::Wrap,
            "truncated",
            vec![2, 0, 0, 0, 7, 0, 0],
        ),
        (
            "remove-all-truncated",
            "15 bytes of a token.",
            Opcode::RemoveAll,
            "truncated",
            without(&TOKEN, 1)?.to_vec(),
        ),
        ("remove-all-trailing", "A byte behind the token.", Opcode::RemoveAll, "trailing", longer(&TOKEN)),
        (
            "unwrap-context-length",
            "A context of 2^64 - 1 bytes.",
            Opcode::Unwrap,
            "length",
            with(&rewrap, 8, &[0xff; 8])?,
        ),
        (
            "datakey-no-length",
            "The length is missing.",
            Opcode::DataKey,
            "truncated",
            without(data_key, 4)?.to_vec(),
        ),
        (
            "datakey-wrapped-trailing",
            "A byte behind the fields.",
            Opcode::DataKeyWrapped,
            "trailing",
            longer(data_key),
        ),
        (
            "rewrap-no-option",
            "The fields end before the option.",
            Opcode::Rewrap,
            "truncated",
            rewrap.get(..to).ok_or(Malformed)?.to_vec(),
        ),
        ("rewrap-option-2", "An option tag of 02.", Opcode::Rewrap, "option tag", with(&rewrap, to, &[2])?),
        (
            "rewrap-to-tag",
            "Tag 3 of KeyRef in the option.",
            Opcode::Rewrap,
            "enumeration tag",
            with(&rewrap, to + 1, &[3])?,
        ),
        (
            "rewrap-to-nothing",
            "An option of which only the tag is there.",
            Opcode::Rewrap,
            "truncated",
            rewrap.get(..=to).ok_or(Malformed)?.to_vec(),
        ),
        (
            "rewrap-none-trailing",
            "A key behind the option tag 00.",
            Opcode::Rewrap,
            "trailing",
            with(&rewrap, to, &[0])?,
        ),
        (
            "verify-trailing",
            "A byte behind the fields.",
            Opcode::Verify,
            "trailing",
            longer(&encoded(&by_name(CONTEXT))?),
        ),
        ("mac-no-context", "The context is missing.", Opcode::Mac, "truncated", vec![2, 0, 0, 0, 7, 0, 0, 0]),
        (
            "mac-verify-tag",
            "Tag 3 of KeyRef.",
            Opcode::MacVerify,
            "enumeration tag",
            with(&encoded(&by_name(CONTEXT))?, 0, &[3])?,
        ),
        ("random-truncated", "Three bytes of the length.", Opcode::Random, "truncated", vec![32, 0, 0]),
        (
            "random-trailing",
            "A u64 where a u32 belongs.",
            Opcode::Random,
            "trailing",
            vec![32, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            "bind-truncated",
            "Three bytes of the tag.",
            Opcode::Bind,
            "truncated",
            bind.get(..7).ok_or(Malformed)?.to_vec(),
        ),
        ("bind-trailing", "A byte behind the fields.", Opcode::Bind, "trailing", longer(bind)),
        ("batch-fields", "A byte where no fields belong.", Opcode::Batch, "trailing", vec![0]),
        ("stats-fields", "A byte where no fields belong.", Opcode::Stats, "trailing", vec![0]),
    ])
}

fn bad_batches(folder: &mut Folder) -> Outcome {
    let [items, _] = batch()?;
    let whole = items.concat();
    let first = items.first().ok_or(Malformed)?.len();
    let cases: [(&str, &str, Vec<u8>); 6] = [
        ("empty", "No item.", Vec::new()),
        ("cut-short", "The last item lacks its last byte.", without(&whole, 1)?.to_vec()),
        ("half-a-head", "15 bytes of a head behind the items.", [&whole[..], &[0; 15]].concat()),
        ("version", "The second item has version 2.", with(&whole, first + 4, &[2])?),
        ("flags", "The second item has a flag.", with(&whole, first + 5, &[1])?),
        (
            "fields-length",
            "The fields of the second item are longer than it is.",
            with(&whole, first + 12, &[0xff])?,
        ),
    ];
    for (name, about, payload) in cases {
        let bytes = frame(Opcode::Batch.code(), 9, &[], &payload)?;
        folder.bad(&format!("bad-batch-{name}"), about, "request batch", "malformed: batch", &bytes)?;
    }
    Ok(())
}

fn bad_replies(folder: &mut Folder) -> Outcome {
    let hello = encoded(&welcome())?;
    let opcodes_at = 30;
    let added = encoded(&Added { id: KEY_ID, version: 1, check_value: CHECK_VALUE, created: true })?;
    let listed = encoded(&Listed { keys: vec![key_row("backup", None)], next: 0 })?;
    // Offsets in the one row: length 8, length 8, name 6, id 16, memory-only 1, state 4, then 12, 8, 8, then the option.
    let (memory_only, state, expires_in) = (38, 39, 71);
    let fact = Fact { name: "keys".to_owned(), value: "1".to_owned() };
    let status = encoded(&StatusReply { state: LockState::Unlocked, facts: vec![fact] })?;
    let verified = encoded(&Verified { id: KEY_ID, name: "backup".to_owned(), version: 1, primary: 2 })?;
    let stats = encoded(&StatsReply {
        uptime_ms: 1,
        operations: vec![OperationCount { opcode: 1, status: 0, count: 1 }],
        values: vec![Value { name: "keys".to_owned(), value: 1 }],
    })?;
    let cases: Vec<BadReply> = vec![
        (
            "opcodes-2-64-1",
            "2^64 - 1 opcodes.",
            Opcode::Hello,
            Status::Ok,
            "length",
            with(&hello, opcodes_at, &[0xff; 8])?,
        ),
        (
            "welcome-truncated",
            "The last byte is missing.",
            Opcode::Hello,
            Status::Ok,
            "truncated",
            without(&hello, 1)?.to_vec(),
        ),
        ("created-2", "A bool of 02.", Opcode::Add, Status::Ok, "bool", with(&added, 28, &[2])?),
        (
            "trailing",
            "A byte behind the fields.",
            Opcode::Add,
            Status::Ok,
            "trailing",
            [&added[..], &[0]].concat(),
        ),
        (
            "memory-only-2",
            "A bool of 02.",
            Opcode::List,
            Status::Ok,
            "bool",
            with(&listed, memory_only, &[2])?,
        ),
        (
            "state-5",
            "Tag 5 of KeyState.",
            Opcode::List,
            Status::Ok,
            "enumeration tag",
            with(&listed, state, &[5])?,
        ),
        (
            "option-2",
            "An option tag of 02.",
            Opcode::List,
            Status::Ok,
            "option tag",
            with(&listed, expires_in, &[2])?,
        ),
        (
            "keys-2-16",
            "65,536 keys, of which one is there.",
            Opcode::List,
            Status::Ok,
            "length",
            with(&listed, 0, &65_536_u64.to_le_bytes())?,
        ),
        (
            "lock-state-2",
            "Tag 2 of LockState.",
            Opcode::Status,
            Status::Ok,
            "enumeration tag",
            with(&status, 0, &[2])?,
        ),
        (
            "fact-utf-8",
            "A name that is not UTF-8.",
            Opcode::Status,
            Status::Ok,
            "utf-8",
            with(&status, 20, &[0x80])?,
        ),
        (
            "refusal-empty",
            "A refusal without fields.",
            Opcode::Encrypt,
            Status::NotFound,
            "truncated",
            Vec::new(),
        ),
        ("ping-fields", "Fields where none belong.", Opcode::Ping, Status::Ok, "trailing", vec![0; 4]),
        (
            "rotated-truncated",
            "The last byte is missing.",
            Opcode::Rotate,
            Status::Ok,
            "truncated",
            vec![0; 27],
        ),
        (
            "exported-trailing",
            "A byte behind the fields.",
            Opcode::Export,
            Status::Ok,
            "trailing",
            vec![0; 21],
        ),
        (
            "removed-all-u32",
            "A u32 where a u64 belongs.",
            Opcode::RemoveAll,
            Status::Ok,
            "truncated",
            vec![0; 4],
        ),
        ("rewrapped-2", "A bool of 02.", Opcode::Rewrap, Status::Ok, "bool", with(&[0; 21], 0, &[2])?),
        (
            "verified-utf-8",
            "A name that is not UTF-8.",
            Opcode::Verify,
            Status::Ok,
            "utf-8",
            with(&verified, 24, &[0xff])?,
        ),
        (
            "verified-length",
            "A name of 2^64 - 1 bytes.",
            Opcode::Verify,
            Status::Ok,
            "length",
            with(&verified, 16, &[0xff; 8])?,
        ),
        (
            "stats-2-64-1",
            "2^64 - 1 operations.",
            Opcode::Stats,
            Status::Ok,
            "length",
            with(&stats, 8, &[0xff; 8])?,
        ),
        (
            "stats-element",
            "The last value lacks its last byte.",
            Opcode::Stats,
            Status::Ok,
            "truncated",
            without(&stats, 1)?.to_vec(),
        ),
        ("datakey-fields", "Fields where none belong.", Opcode::DataKey, Status::Ok, "trailing", vec![0]),
    ];
    for (name, about, opcode, status, reason, fields) in cases {
        let message = format!("reply to {}", opcode.name());
        let expect = format!("malformed: fields: {reason}");
        let bytes = frame(status.code(), 9, &fields, &[])?;
        folder.bad(&format!("bad-reply-{name}"), about, &message, &expect, &bytes)?;
    }
    let refusal = encoded(&Refusal { retry_after_ms: 0 })?;
    let bytes = frame(Status::NotFound.code(), 9, &refusal, b"x")?;
    let about = "A payload behind a refusal.";
    folder.bad("bad-reply-refusal-payload", about, "reply to encrypt", "malformed: payload", &bytes)?;
    let bytes = frame(Status::Ok.code(), 9, &added, b"x")?;
    let about = "A payload where none belongs.";
    folder.bad("bad-reply-add-payload", about, "reply to add", "malformed: payload", &bytes)?;
    let bytes = frame(17, 9, &refusal, &[])?;
    let about = "A status that there is not.";
    folder.bad("bad-reply-status-17", about, "reply to encrypt", "malformed: status", &bytes)
}

fn main() -> Outcome {
    let path = env::args_os().nth(1).ok_or("usage: make-vectors FOLDER")?.into();
    let mut folder = Folder { path, written: 0 };
    worked_example(&mut folder)?;
    requests(&mut folder)?;
    replies(&mut folder)?;
    bad_heads(&mut folder)?;
    bad_requests(&mut folder)?;
    bad_batches(&mut folder)?;
    bad_replies(&mut folder)?;
    println!("{} files written", folder.written);
    Ok(())
}
