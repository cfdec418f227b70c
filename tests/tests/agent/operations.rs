//! Every operation over the wire, its limits, and what the output of one is worth to another.

use std::{net::Shutdown, os::unix::net::UnixStream};

use kms_envelope::{
    Body, CHUNK_LEN, EncryptionContext, ExpandKey, Header, KeyId, KeyVersion, MESSAGE_MAX, MessageKey,
    Purpose, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN, message_len, open_message, open_stream,
    seal_message,
};
use kms_protocol::{
    Add, Constraint, Description, KeyRef, LockState, Material, Opcode, Remove, Status, constraint,
};
use kms_tests::{
    Agent, Wire,
    canary::Canaries,
    wire::{NO_CONTEXT, Operations, add_frame, frame, pipeline, random},
};

fn context(pairs: &[(&str, &str)]) -> Vec<u8> {
    EncryptionContext::from_pairs(pairs.iter().copied()).unwrap().as_ref().as_bytes().to_vec()
}

/// Canonical bytes of any number of pairs, also of too many: key `kNN…`, value of `value_len` bytes.
pub(crate) fn many_pairs(count: u32, value_len: usize) -> Vec<u8> {
    let mut bytes = count.to_be_bytes().to_vec();
    for n in 0..count {
        for part in [format!("k{n:03}").into_bytes(), vec![b'v'; value_len]] {
            bytes.extend_from_slice(&u32::try_from(part.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(&part);
        }
    }
    bytes
}

/// The body of a stream whose key the agent gave out: 32 bytes of key, 12 of nonce.
fn body(key: &[u8]) -> Body {
    let (key, nonce) = key.split_at(32);
    Body::new(MessageKey::from_parts(key.try_into().unwrap(), nonce.try_into().unwrap()))
}

/// Seals all of `plaintext` as chunks from 0 on, final one included.
fn seal_all(body: &Body, plaintext: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::new();
    let mut pieces: Vec<&[u8]> = plaintext.chunks(CHUNK_LEN).collect();
    if plaintext.len().is_multiple_of(CHUNK_LEN) {
        pieces.push(&[]);
    }
    for (number, piece) in (0..).zip(pieces) {
        let mut stride = [piece, &[0; TAG_LEN]].concat();
        body.seal_chunks(number, &mut stride).unwrap();
        sealed.extend_from_slice(&stride);
    }
    sealed
}

/// Opens all chunks from 0 on.
fn open_all(body: &Body, chunks: &[u8]) -> Vec<u8> {
    let mut plaintext = Vec::new();
    for (number, stride) in (0..).zip(chunks.chunks(SEALED_CHUNK_LEN)) {
        let mut stride = stride.to_vec();
        body.open_chunks(number, &mut stride).unwrap();
        plaintext.extend_from_slice(&stride[..stride.len() - TAG_LEN]);
    }
    plaintext
}

#[test]
fn hello_tells_what_the_agent_takes() {
    let agent = Agent::start();
    let mut wire = agent.mute();
    let welcome = wire.hello();
    assert_eq!(welcome.version, 1);
    assert_eq!((welcome.frame_max, welcome.message_max), (1 << 20, 65_536));
    assert_eq!((welcome.context_max, welcome.context_pairs_max), (8192, 64));
    assert_eq!((welcome.in_flight_max, welcome.page_rows_max, welcome.remote_streams_max), (256, 256, 16));
    assert_eq!(welcome.opcodes, Opcode::ALL.iter().map(|opcode| opcode.code()).collect::<Vec<_>>());
    assert_eq!((welcome.constraints, welcome.features), (constraint::ALL.to_vec(), 0));
}

#[test]
fn status_and_ping_tell_the_state() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.ping().unwrap();
    let status = wire.status();
    assert_eq!(status.state, LockState::Unlocked);
    let mut names: Vec<_> = status.facts.iter().map(|fact| fact.name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "connections",
        "frame-pool",
        "keys",
        "keystore",
        "panics",
        "pid",
        "requests",
        "secret-memory",
        "uid",
        "uptime-ms",
        "version",
    ];
    for name in expected {
        assert!(names.contains(&name), "no fact {name} in {names:?}");
    }
    assert_eq!(wire.fact("pid"), agent.pid.to_string());
    assert_eq!(wire.fact("uid"), agent.uid().to_string());
    assert_eq!(wire.fact("connections"), "1");
    assert_eq!(wire.fact("keys"), "0");
    assert_eq!(wire.fact("keystore"), "none");
    wire.generate("a").unwrap();
    assert_eq!(wire.fact("keys"), "1");
    let second = agent.connect();
    assert_eq!(wire.fact("connections"), "2");
    drop(second);
}

#[test]
fn an_imported_key_is_the_key_that_was_imported() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let secret = random();
    let added = wire.import("imported", &secret).unwrap();
    let key = ExpandKey::new(&secret);
    assert_eq!((added.version, added.created), (1, true));
    assert_eq!(added.check_value, key.check_value());
    // Both directions against the envelope crate, which this test gives the key itself.
    let header = Header {
        purpose: Purpose::Message,
        key_id: KeyId::from_bytes(added.id),
        key_version: KeyVersion::FIRST,
    };
    let context = EncryptionContext::from_pairs([("table", "t"), ("row", "7")]).unwrap();
    let mut sealed = vec![0; message_len(5)];
    seal_message(&key, &header, context.as_ref(), &random(), b"hello", &mut sealed).unwrap();
    assert_eq!(wire.decrypt("imported", context.as_ref().as_bytes(), &sealed).unwrap(), b"hello");
    let ciphertext = wire.encrypt("imported", context.as_ref().as_bytes(), b"other").unwrap();
    let mut opened = [0; 5];
    open_message(&key, &ciphertext, Purpose::Message, context.as_ref(), &mut opened).unwrap();
    assert_eq!(&opened, b"other");
}

#[test]
fn messages_open_with_their_key_and_context_only() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let id = wire.generate("a").unwrap().id;
    wire.generate("b").unwrap();
    let ours = context(&[("user", "7"), ("field", "name")]);
    for plaintext in [&b""[..], b"x", &[7; CHUNK_LEN - 1], &[8; CHUNK_LEN], &[9; CHUNK_LEN + 1]] {
        for context in [NO_CONTEXT, &ours] {
            let ciphertext = wire.encrypt("a", context, plaintext).unwrap();
            assert_eq!(ciphertext.len(), message_len(plaintext.len()));
            assert_eq!(wire.decrypt("a", context, &ciphertext).as_deref(), Ok(plaintext));
            let by_id = wire.with_key(Opcode::Decrypt, KeyRef::Id(id), context, &ciphertext).unwrap();
            assert_eq!(by_id.payload, plaintext);
            assert_eq!(wire.decrypt("b", context, &ciphertext), Err(Status::WrongKey));
            assert_eq!(wire.decrypt("c", context, &ciphertext), Err(Status::NotFound));
        }
    }
    let ciphertext = wire.encrypt("a", &ours, b"plain").unwrap();
    assert_ne!(wire.encrypt("a", &ours, b"plain").unwrap(), ciphertext, "a salt of its own");
    for wrong in
        [NO_CONTEXT.to_vec(), context(&[("user", "8"), ("field", "name")]), context(&[("user", "7")])]
    {
        assert_eq!(wire.decrypt("a", &wrong, &ciphertext), Err(Status::InvalidCiphertext));
    }
    for at in 0..ciphertext.len() {
        let mut changed = ciphertext.clone();
        changed[at] ^= 1;
        let refused = wire.decrypt("a", &ours, &changed).unwrap_err();
        let expected = match at {
            0..3 => Status::Malformed,   // magic
            3..5 => Status::Unsupported, // format, suite
            5 => Status::Malformed,      // purpose 0 is unknown, see below; 1 ^ 1 = 0
            6..8 => Status::Unsupported, // flags
            8..24 => Status::WrongKey,
            24..27 => Status::NotFound, // a version that the key does not have
            27 => Status::Malformed,    // version 0
            _ => Status::InvalidCiphertext,
        };
        let expected = if at == 5 { Status::Unsupported } else { expected };
        assert_eq!(refused, expected, "byte {at}");
    }
    for len in 0..ciphertext.len() {
        let expected = if len < 28 { Status::Malformed } else { Status::InvalidCiphertext };
        assert_eq!(wire.decrypt("a", &ours, &ciphertext[..len]), Err(expected), "cut at {len}");
    }
    assert_eq!(wire.decrypt("a", &ours, &[&ciphertext[..], b"x"].concat()), Err(Status::InvalidCiphertext));
}

#[test]
fn keys_are_listed_described_and_removed() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let names: Vec<String> = (0..600).map(|n| format!("list/{n}")).collect();
    let adds: Vec<_> = (1..).zip(&names).map(|(id, name)| add_frame(id, random(), name, None)).collect();
    for reply in pipeline(&mut wire, &adds) {
        reply.ok().unwrap();
    }
    let rows = wire.list().unwrap();
    let mut listed: Vec<_> = rows.iter().map(|row| row.name.clone()).collect();
    listed.sort();
    let mut expected = names.clone();
    expected.sort();
    assert_eq!(listed, expected);

    wire.encrypt("list/7", NO_CONTEXT, b"x").unwrap();
    let row = rows.iter().find(|row| row.name == "list/7").unwrap();
    let by_name = wire.describe(KeyRef::Name("list/7")).unwrap();
    assert_eq!(by_name, wire.describe(KeyRef::Id(row.id)).unwrap());
    let Description { key, versions, more, constraints } = by_name;
    assert_eq!((key.uses, row.uses), (1, 0));
    assert_eq!((key.id, key.check_value, key.created), (row.id, row.check_value, row.created));
    assert_eq!((key.primary, key.minimum, key.versions, key.memory_only), (1, 1, 1, true));
    assert_eq!((versions.len(), versions[0].version, versions[0].check_value), (1, 1, row.check_value));
    assert_eq!((more, constraints), (false, vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }]));

    let ciphertext = wire.encrypt("list/7", NO_CONTEXT, b"x").unwrap();
    assert_eq!(wire.remove("list/7").unwrap().id, row.id);
    assert_eq!(wire.remove("list/7").map(|_| ()), Err(Status::NotFound));
    assert_eq!(wire.describe(KeyRef::Name("list/7")).map(|_| ()), Err(Status::NotFound));
    assert_eq!(wire.describe(KeyRef::Id(row.id)).map(|_| ()), Err(Status::NotFound));
    assert_eq!(wire.list().unwrap().len(), 599);
    // A new key of the same name is another key.
    wire.generate("list/7").unwrap();
    assert_eq!(wire.decrypt("list/7", NO_CONTEXT, &ciphertext), Err(Status::WrongKey));
}

#[test]
fn a_repeated_token_gets_the_first_result_and_does_nothing() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let token = random();
    let fields =
        Add { token, name: "once", material: Material::Generate, if_missing: false, constraints: Vec::new() };
    let first = wire.add_as(&fields, &[]).unwrap();
    // Over another connection, as after a broken one.
    assert_eq!(agent.connect().add_as(&fields, &[]).unwrap(), first);
    assert_eq!(wire.list().unwrap().len(), 1);
    // Another token is another request.
    assert_eq!(wire.generate("once").map(|_| ()), Err(Status::Exists));
    let if_missing = Add { token: random(), if_missing: true, ..fields.clone() };
    let found = wire.add_as(&if_missing, &[]).unwrap();
    assert_eq!((found.id, found.check_value, found.created), (first.id, first.check_value, false));

    let remove = Remove { token: random(), key: KeyRef::Name("once") };
    let first = wire.request(Opcode::Remove, &remove, &[]).ok().unwrap();
    let again = agent.connect().request(Opcode::Remove, &remove, &[]).ok().unwrap();
    assert_eq!(first.fields, again.fields);
    wire.generate("once").unwrap();
    wire.request(Opcode::Remove, &remove, &[]).ok().unwrap();
    assert_eq!(wire.list().unwrap().len(), 1, "the repeat does not remove the key that came after");
    // A refused request leaves its token free.
    let token = random();
    let taken = Add { token, ..fields.clone() };
    assert_eq!(wire.add_as(&taken, &[]).map(|_| ()), Err(Status::Exists));
    wire.add_as(&Add { name: "twice", ..taken }, &[]).unwrap();
}

#[test]
fn local_and_remote_streams_open_each_other() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    for len in [0, 1, CHUNK_LEN - 1, CHUNK_LEN, CHUNK_LEN + 1, 3 * CHUNK_LEN, 5 * CHUNK_LEN + 77] {
        let plaintext: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();

        let opened = wire.with_key(Opcode::StreamNew, KeyRef::Name("a"), NO_CONTEXT, &[]).unwrap().payload;
        let (local_head, key) = opened.split_at(STREAM_HEAD_LEN);
        let local = seal_all(&body(key), &plaintext);

        let (stream, remote_head) = wire.remote_new("a").unwrap();
        let mut remote = Vec::new();
        // Whole chunks first, two at a time; then whatever is left, which ends the stream.
        let whole = len / CHUNK_LEN * CHUNK_LEN;
        for piece in plaintext[..whole].chunks(2 * CHUNK_LEN) {
            remote.extend(wire.remote_encrypt(stream, piece).unwrap());
        }
        remote.extend(wire.remote_encrypt(stream, &plaintext[whole..]).unwrap());
        assert_eq!(wire.remote_encrypt(stream, b"more"), Err(Status::NotFound), "it has ended");
        assert_eq!(remote.len(), local.len());

        for (head, chunks) in [(local_head, &local), (&remote_head[..], &remote)] {
            let key = wire.with_key(Opcode::StreamOpen, KeyRef::Name("a"), NO_CONTEXT, head).unwrap().payload;
            assert_eq!(open_all(&body(&key), chunks), plaintext);
            let stream = wire.remote_open("a", head).unwrap();
            assert_eq!(wire.remote_decrypt(stream, 0, chunks).unwrap(), plaintext);
            // From the end, without what is before it.
            let (last, at) = (len / CHUNK_LEN, len / CHUNK_LEN * SEALED_CHUNK_LEN);
            let tail = wire.remote_decrypt(stream, last as u64, &chunks[at..]).unwrap();
            assert_eq!(tail, plaintext[last * CHUNK_LEN..]);
            wire.remote_close(stream).unwrap();
            assert_eq!(wire.remote_close(stream), Err(Status::NotFound));
            assert_eq!(wire.remote_decrypt(stream, 0, chunks), Err(Status::NotFound));
        }
    }
}

#[test]
fn streams_are_what_the_envelope_says() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let secret = random();
    wire.import("a", &secret).unwrap();
    let ours = EncryptionContext::from_pairs([("file", "x")]).unwrap();
    let bytes = ours.as_ref().as_bytes();
    let opened = wire.with_key(Opcode::StreamNew, KeyRef::Name("a"), bytes, &[]).unwrap().payload;
    let head: &[u8; STREAM_HEAD_LEN] = opened.first_chunk().unwrap();
    let key = open_stream(&ExpandKey::new(&secret), head, ours.as_ref()).unwrap();
    let (message_key, nonce) = key.expose_secret();
    assert_eq!(opened[STREAM_HEAD_LEN..], [&message_key[..], &nonce[..]].concat());
    assert_eq!(
        wire.with_key(Opcode::StreamOpen, KeyRef::Name("a"), NO_CONTEXT, head).map(|_| ()),
        Err(Status::InvalidCiphertext)
    );
    wire.generate("b").unwrap();
    assert_eq!(
        wire.with_key(Opcode::StreamOpen, KeyRef::Name("b"), bytes, head).map(|_| ()),
        Err(Status::WrongKey)
    );
    for at in 28..STREAM_HEAD_LEN {
        let mut changed = *head;
        changed[at] ^= 0x80;
        for opcode in [Opcode::StreamOpen, Opcode::RemoteStreamOpen] {
            let refused = wire.with_key(opcode, KeyRef::Name("a"), bytes, &changed).map(|_| ());
            assert_eq!(refused, Err(Status::InvalidCiphertext), "byte {at}");
        }
    }
    for len in [28, 132, STREAM_HEAD_LEN - 1] {
        let cut = wire.with_key(Opcode::StreamOpen, KeyRef::Name("a"), bytes, &head[..len]).map(|_| ());
        assert_eq!(cut, Err(Status::InvalidCiphertext), "{len}");
    }
    let long = [&head[..], b"x"].concat();
    let long = wire.with_key(Opcode::StreamOpen, KeyRef::Name("a"), bytes, &long).map(|_| ());
    assert_eq!(long, Err(Status::InvalidCiphertext));
}

#[test]
fn an_error_ends_a_remote_stream() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let (stream, head) = wire.remote_new("a").unwrap();
    let chunks = wire.remote_encrypt(stream, b"short").unwrap();
    for (chunks, first, expected) in [
        (&b""[..], 0, Status::Malformed),
        (&chunks[..15], 0, Status::InvalidCiphertext),
        (&chunks, 1, Status::InvalidCiphertext),
        (&chunks, u64::MAX, Status::InvalidCiphertext),
        (&chunks, 1 << 38, Status::InvalidCiphertext),
        (&[0; 40], 0, Status::InvalidCiphertext),
    ] {
        let stream = wire.remote_open("a", &head).unwrap();
        assert_eq!(wire.remote_decrypt(stream, first, chunks), Err(expected), "from {first}");
        assert_eq!(wire.remote_close(stream), Err(Status::NotFound), "it has ended");
    }
    // A stream that is encrypted does not decrypt, nor the other way.
    let (encrypting, _) = wire.remote_new("a").unwrap();
    let decrypting = wire.remote_open("a", &head).unwrap();
    assert_eq!(wire.remote_decrypt(encrypting, 0, &chunks), Err(Status::NotFound));
    assert_eq!(wire.remote_encrypt(decrypting, b"x"), Err(Status::NotFound));
    // Nor does one of another connection.
    let stream = wire.remote_open("a", &head).unwrap();
    assert_eq!(agent.connect().remote_decrypt(stream, 0, &chunks), Err(Status::NotFound));
    assert_eq!(wire.remote_decrypt(stream, 0, &chunks).unwrap(), b"short");
}

#[test]
fn a_removed_key_ends_its_remote_streams() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    wire.generate("b").unwrap();
    let (stream, _) = wire.remote_new("a").unwrap();
    let (other, _) = wire.remote_new("b").unwrap();
    agent.connect().remove("a").unwrap();
    assert_eq!(wire.remote_encrypt(stream, b"x"), Err(Status::NotFound));
    wire.remote_encrypt(other, b"x").unwrap();
}

#[test]
fn sizes_are_limited_to_the_byte() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let longest = wire.encrypt("a", NO_CONTEXT, &[1; MESSAGE_MAX]).unwrap();
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &longest).unwrap(), [1; MESSAGE_MAX]);
    assert_eq!(wire.encrypt("a", NO_CONTEXT, &[1; MESSAGE_MAX + 1]), Err(Status::TooLarge));
    let too_long = [&longest[..], &[0]].concat();
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &too_long), Err(Status::TooLarge));

    assert_eq!(wire.encrypt("a", &many_pairs(64, 1), b"").map(|_| ()), Ok(()));
    assert_eq!(wire.encrypt("a", &many_pairs(65, 1), b""), Err(Status::TooLarge));
    // One pair: 4 of count, 4 + 4 of key, 4 of the value's length.
    assert_eq!(many_pairs(1, 8192 - 16).len(), 8192);
    assert_eq!(wire.encrypt("a", &many_pairs(1, 8192 - 16), b"").map(|_| ()), Ok(()));
    assert_eq!(wire.encrypt("a", &many_pairs(1, 8193 - 16), b""), Err(Status::TooLarge));
    let sorted = many_pairs(2, 1);
    let (count, pairs) = sorted.split_at(4);
    let (first, second) = pairs.split_at(pairs.len() / 2);
    for (context, what) in [
        (Vec::new(), "no count"),
        (vec![0, 0, 0, 1], "no pair"),
        ([NO_CONTEXT, b"x"].concat(), "a byte behind"),
        ([count, second, first].concat(), "unsorted"),
        ([count, first, first].concat(), "a key twice"),
        (vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], "an empty key"),
        (vec![0, 0, 0, 1, 255, 255, 255, 255, b'k'], "a long key"),
    ] {
        for opcode in [Opcode::Encrypt, Opcode::StreamNew, Opcode::RemoteStreamNew] {
            let refused = wire.with_key(opcode, KeyRef::Name("a"), &context, &[]).map(|_| ());
            assert_eq!(refused, Err(Status::Malformed), "{what}");
        }
    }

    // 63 whole chunks are what fits a frame of 1 MiB in both directions.
    let (stream, _) = wire.remote_new("a").unwrap();
    let sealed = wire.remote_encrypt(stream, &[3; 63 * CHUNK_LEN]).unwrap();
    assert_eq!(sealed.len(), 63 * SEALED_CHUNK_LEN);
    let room = (1 << 20) - 16 - 4;
    assert_eq!(wire.remote_encrypt(stream, &vec![3; room]), Err(Status::TooLarge), "its tags do not fit");

    for len in [0, 31, 33, 64] {
        assert_eq!(wire.import("other", &vec![1; len]).map(|_| ()), Err(Status::Malformed), "{len}");
    }
    for (passphrase, what) in [(vec![], "empty"), (vec![b'p'; 1025], "1,025 bytes")] {
        assert_eq!(wire.lock(&passphrase), Err(Status::Malformed), "{what}");
        assert_eq!(wire.unlock(&passphrase), Err(Status::Malformed), "{what}");
    }
}

#[test]
fn a_connection_holds_sixteen_remote_streams() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let streams: Vec<_> = (0..16).map(|_| wire.remote_new("a").unwrap()).collect();
    assert_eq!(wire.remote_new("a"), Err(Status::Limit));
    assert_eq!(wire.remote_open("a", &streams[0].1), Err(Status::Limit));
    assert_eq!(wire.describe(KeyRef::Name("a")).unwrap().key.uses, 16, "what is refused is no use");
    // Another connection has its own; and one that ends makes room.
    agent.connect().remote_new("a").unwrap();
    wire.remote_close(streams[3].0).unwrap();
    let (again, _) = wire.remote_new("a").unwrap();
    assert!(streams.iter().all(|(number, _)| *number != again), "no number twice");
    for (stream, _) in streams.iter().filter(|(stream, _)| *stream != streams[3].0) {
        wire.remote_encrypt(*stream, b"the end").unwrap();
    }
}

#[test]
fn the_number_of_keys_is_limited() {
    let agent = Agent::builder().config("[limits]\nkeys = 3\n").start();
    let mut wire = agent.connect();
    for name in ["a", "b", "c"] {
        wire.generate(name).unwrap();
    }
    assert_eq!(wire.generate("d").map(|_| ()), Err(Status::Limit));
    assert_eq!(wire.import("d", &[1; 32]).map(|_| ()), Err(Status::Limit));
    assert_eq!(wire.generate("a").map(|_| ()), Err(Status::Exists), "the better reason");
    wire.remove("b").unwrap();
    wire.generate("d").unwrap();
}

#[test]
fn a_constraint_that_cannot_be_kept_refuses_the_key() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let kept = Constraint { kind: constraint::MEMORY_ONLY, value: 0 };
    for kind in [0, 6, 7, 1 << 31, u32::MAX] {
        for constraints in [
            vec![Constraint { kind, value: 0 }],
            vec![kept, Constraint { kind, value: 60 }],
            vec![Constraint { kind, value: 60 }, kept],
        ] {
            assert_eq!(wire.generate_with("a", constraints).map(|_| ()), Err(Status::Unsupported), "{kind}");
        }
    }
    let with_value = Constraint { value: 1, ..kept };
    assert_eq!(wire.generate_with("a", vec![with_value]).map(|_| ()), Err(Status::Malformed));
    assert_eq!(wire.generate_with("a", vec![kept, kept]).map(|_| ()), Err(Status::Malformed), "twice");
    assert_eq!(wire.list().unwrap().len(), 0);
    wire.generate_with("a", vec![kept]).unwrap();
}

#[test]
fn without_a_keystore_only_memory_only_keys_are_taken() {
    let agent = Agent::builder().without_memory_flag().start();
    let mut wire = agent.connect();
    assert_eq!(wire.generate("a").map(|_| ()), Err(Status::StoreUnavailable));
    assert_eq!(wire.import("a", &[1; 32]).map(|_| ()), Err(Status::StoreUnavailable));
    assert_eq!(wire.list().unwrap().len(), 0);
    let memory_only = Constraint { kind: constraint::MEMORY_ONLY, value: 0 };
    wire.generate_with("a", vec![memory_only]).unwrap();
}

#[test]
fn names_are_taken_as_the_grammar_says_and_never_logged_raw() {
    let agent = Agent::builder().config("log = \"trace\"\n").start();
    let mut wire = agent.connect();
    let tricks = [
        "",
        "-",
        "/",
        "-a",
        "/a",
        "a",
        "..",
        "../a",
        "a/../b",
        "a\0",
        "\0",
        "a\n",
        "a\nb",
        "\x1b[31ma",
        "a\x07",
        "a b",
        " a",
        "a ",
        "a.",
        "A",
        "*",
        "a*",
        "a+b",
        "a\u{202e}b",
        "é",
        "e\u{301}",
        "a\u{ff0e}b",
        "a;uid=0;",
        "a'b",
        "a\"b",
        "a\\b",
        "$(a)",
        "`a`",
        "a\u{7f}",
        "a:b",
        "@a",
        "a@1",
        "%s",
        "\u{2028}",
    ];
    let mut names: Vec<String> = tricks.iter().map(ToString::to_string).collect();
    for len in [1, 254, 255, 256, 10_000] {
        names.push("x".repeat(len));
    }
    // Names of up to six characters, of which most are good.
    let alphabet: Vec<char> = "aZ09._/-- *\n\0\u{1b}é\u{202e}".chars().collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    while names.len() < 10_000 {
        let len = next(7);
        names.push((0..len).map(|_| alphabet[next(alphabet.len())]).collect());
    }
    let requests: Vec<_> = (1..).zip(&names).map(|(id, name)| add_frame(id, random(), name, None)).collect();
    let mut seen = std::collections::HashSet::new();
    for (name, reply) in names.iter().zip(pipeline(&mut wire, &requests)) {
        let good = (1..=255).contains(&name.len())
            && !name.starts_with(['-', '/'])
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "._/-".contains(c));
        let expected = match good {
            true if seen.insert(name) => Status::Ok,
            true => Status::Exists,
            false => Status::Malformed,
        };
        assert_eq!(reply.status, expected, "{name:?}");
    }
    assert!(seen.len() > 300, "{} good ones", seen.len());
    let rows = wire.list().unwrap();
    assert_eq!(rows.len(), seen.len());
    assert!(rows.iter().all(|row| seen.contains(&row.name)));
    // Every other request that names a key holds to the same grammar.
    for bad in ["", "-a", "a\nb", "../\0"] {
        for opcode in [Opcode::Encrypt, Opcode::StreamNew, Opcode::RemoteStreamNew] {
            let refused = wire.with_key(opcode, KeyRef::Name(bad), NO_CONTEXT, &[]).map(|_| ());
            assert_eq!(refused, Err(Status::Malformed));
        }
        assert_eq!(wire.remove(bad).map(|_| ()), Err(Status::Malformed));
        assert_eq!(wire.describe(KeyRef::Name(bad)).map(|_| ()), Err(Status::Malformed));
    }
    drop(wire);
    let log = agent.stop().log;
    assert!(log.contains("ready"));
    assert!(log.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{log:?}");
}

/// A05: what one operation gives out is tried in every other, as payload, as passphrase, as key and as context.
#[test]
fn the_output_of_one_operation_is_no_way_around_another() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let secret: [u8; 32] = random();
    let plaintext: [u8; 32] = random();
    let id = wire.import("k", &secret).unwrap().id;
    let other = wire.import("w", &random::<32>()).unwrap().id;
    let mut canaries = Canaries::new();
    canaries.add("the key", &secret);

    let message = wire.encrypt("k", NO_CONTEXT, &plaintext).unwrap();
    let new = wire.with_key(Opcode::StreamNew, KeyRef::Name("k"), NO_CONTEXT, &[]).unwrap().payload;
    let (local_head, local_key) = new.split_at(STREAM_HEAD_LEN);
    let local_chunks = seal_all(&body(local_key), &plaintext);
    let (stream, remote_head) = wire.remote_new("k").unwrap();
    let remote_chunks = wire.remote_encrypt(stream, &plaintext).unwrap();
    let purpose = |bytes: &[u8], purpose: u8| {
        let mut bytes = bytes.to_vec();
        bytes[5] = purpose;
        bytes
    };
    let of_key = |bytes: &[u8], id: &[u8; 16]| {
        let mut bytes = bytes.to_vec();
        bytes[8..24].copy_from_slice(id);
        bytes
    };
    /// What the blob truthfully is: the only operations that may open it.
    #[derive(PartialEq)]
    enum Is {
        Message,
        Head,
        Nothing,
    }
    let blobs: Vec<(&str, Is, Vec<u8>)> = vec![
        ("a message", Is::Message, message.clone()),
        ("a message said to be a wrapped key", Is::Nothing, purpose(&message, 2)),
        ("a message said to be a stream", Is::Nothing, purpose(&message, 3)),
        ("a message said to be a shared message", Is::Nothing, purpose(&message, 4)),
        ("a message said to be another key's", Is::Nothing, of_key(&message, &other)),
        ("a body without its header", Is::Nothing, message[28..].to_vec()),
        ("the head of a local stream", Is::Head, local_head.to_vec()),
        ("the head of a remote stream", Is::Head, remote_head.clone()),
        ("a whole stream", Is::Nothing, [local_head, &local_chunks].concat()),
        ("a stream said to be a message", Is::Nothing, purpose(&[local_head, &local_chunks].concat(), 1)),
        ("a stream said to be a wrapped key", Is::Nothing, purpose(&[local_head, &local_chunks].concat(), 2)),
        // The attack of its kind: the wrapped DEK as a message, whose plaintext would be the DEK.
        ("a wrapped DEK as a message", Is::Nothing, purpose(&local_head[..132], 1)),
        ("a wrapped DEK as a wrapped key", Is::Nothing, purpose(&local_head[..132], 2)),
        ("a wrapped DEK alone", Is::Nothing, local_head[..132].to_vec()),
        (
            "a body behind a message's header",
            Is::Nothing,
            [&message[..28], &local_head[132..], &local_chunks].concat(),
        ),
        (
            "a message's body as a wrapped DEK",
            Is::Nothing,
            [&local_head[..28], &message[28..], &local_head[132..]].concat(),
        ),
        ("two heads of one key crossed", Is::Nothing, [&local_head[..132], &remote_head[132..]].concat()),
        ("a head said to be another key's", Is::Nothing, of_key(local_head, &other)),
        ("a message key and nonce", Is::Nothing, local_key.to_vec()),
        ("chunks", Is::Nothing, remote_chunks.clone()),
        ("a plaintext", Is::Nothing, plaintext.to_vec()),
        ("a listing", Is::Nothing, wire.request(Opcode::List, &kms_protocol::List { cursor: 0 }, &[]).bytes),
        ("a reply", Is::Nothing, wire.request(Opcode::Status, &kms_protocol::NoFields {}, &[]).bytes),
        ("the key's id", Is::Nothing, id.to_vec()),
    ];
    let mut opened = 0;
    for (what, is, blob) in &blobs {
        for key in [KeyRef::Name("k"), KeyRef::Name("w"), KeyRef::Id(id), KeyRef::Id(other)] {
            let ours = key == KeyRef::Name("k") || key == KeyRef::Id(id);
            for (opcode, opens) in [
                (Opcode::Decrypt, Is::Message),
                (Opcode::StreamOpen, Is::Head),
                (Opcode::RemoteStreamOpen, Is::Head),
            ] {
                let reply =
                    wire.request(opcode, &kms_protocol::KeyAndContext { key, context: NO_CONTEXT }, blob);
                canaries.assert_absent(what, &reply.bytes);
                let may_open = ours && *is == opens;
                assert_eq!(reply.status == Status::Ok, may_open, "{what} in {}", opcode.name());
                if !may_open {
                    assert!(
                        [
                            Status::Malformed,
                            Status::Unsupported,
                            Status::WrongKey,
                            Status::NotFound,
                            Status::InvalidCiphertext
                        ]
                        .contains(&reply.status),
                        "{what} in {}: {:?}",
                        opcode.name(),
                        reply.status
                    );
                    continue;
                }
                opened += 1;
                match opcode {
                    Opcode::Decrypt => assert_eq!(reply.payload, plaintext),
                    Opcode::StreamOpen => assert_eq!(reply.payload.len(), 44, "never the DEK"),
                    _ => wire.remote_close(reply.decode::<kms_protocol::RemoteStream>().stream).unwrap(),
                }
            }
            // As a context it binds, and opens nothing that was made without it.
            if let Ok(reply) = wire.with_key(Opcode::Decrypt, key, blob, &message) {
                panic!("{what} as a context opens {reply:?}");
            }
        }
        for head in [local_head, &remote_head[..]] {
            let stream = wire.remote_open("k", head).unwrap();
            let reply = wire.remote_decrypt(stream, 0, blob);
            let its_own = *what == "chunks" && head == remote_head;
            assert_eq!(reply.is_ok(), its_own, "{what} as chunks");
            if its_own {
                assert_eq!(reply.unwrap(), plaintext);
                wire.remote_close(stream).unwrap();
            }
        }
        // What is encrypted again comes back as it was, and as nothing else.
        let twice = wire.encrypt("w", NO_CONTEXT, blob).unwrap();
        assert_eq!(&wire.decrypt("w", NO_CONTEXT, &twice).unwrap(), blob);
        assert_eq!(wire.decrypt("k", NO_CONTEXT, &twice), Err(Status::WrongKey));
        let imported = wire.import("blob", blob);
        assert_eq!(imported.is_ok(), blob.len() == 32, "{what} as a key");
        if imported.is_ok() {
            assert_eq!(wire.decrypt("blob", NO_CONTEXT, &message), Err(Status::WrongKey));
            wire.remove("blob").unwrap();
        }
        assert_eq!(wire.unlock(&blob[..blob.len().min(1024)]), Ok(false), "not locked, so not looked at");
    }
    // The control: the truthful pairs did open. A message and two heads, under a name and an id.
    assert_eq!(opened, 2 + 2 * 2 * 2);
}

#[test]
fn what_is_locked_answers_only_what_needs_no_key() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let ciphertext = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    let (stream, head) = wire.remote_new("a").unwrap();
    let opened = wire.remote_open("a", &head).unwrap();
    assert_eq!(wire.unlock(b"anything"), Ok(false));
    assert_eq!(wire.lock(b"passphrase"), Ok(true));

    assert_eq!(wire.lock(b"another"), Ok(false), "it is locked already");
    assert_eq!(wire.status().state, LockState::Locked);
    assert_eq!((wire.fact("keys"), wire.fact("panics")), ("1".to_owned(), "0".to_owned()));
    wire.ping().unwrap();
    let mut second = agent.connect();
    for wire in [&mut wire, &mut second] {
        assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Locked));
        assert_eq!(wire.list().map(|_| ()), Err(Status::Locked));
        assert_eq!(wire.describe(KeyRef::Name("a")).map(|_| ()), Err(Status::Locked));
        assert_eq!(wire.remove("a").map(|_| ()), Err(Status::Locked));
        assert_eq!(wire.encrypt("a", NO_CONTEXT, b"x"), Err(Status::Locked));
        assert_eq!(wire.decrypt("a", NO_CONTEXT, &ciphertext), Err(Status::Locked));
        assert_eq!(wire.remote_new("a"), Err(Status::Locked));
        assert_eq!(wire.remote_open("a", &head), Err(Status::Locked));
        assert_eq!(wire.remote_encrypt(stream, b"x"), Err(Status::Locked));
        assert_eq!(wire.remote_decrypt(opened, 0, b"x"), Err(Status::Locked));
        assert_eq!(wire.remote_close(stream), Err(Status::Locked));
        for opcode in [Opcode::StreamNew, Opcode::StreamOpen] {
            let payload = if opcode == Opcode::StreamNew { &[][..] } else { &head };
            let refused = wire.with_key(opcode, KeyRef::Name("a"), NO_CONTEXT, payload).map(|_| ());
            assert_eq!(refused, Err(Status::Locked));
        }
        // A name that is there and one that is not look alike.
        assert_eq!(wire.encrypt("nobody", NO_CONTEXT, b"x"), Err(Status::Locked));
    }

    // A wrong passphrase delays who gave it, with the time to wait, and nobody's pings.
    assert_eq!(wire.unlock(b"wrong"), Err(Status::Denied));
    let busy = wire.request(Opcode::Unlock, &kms_protocol::NoFields {}, b"passphrase");
    assert_eq!(busy.status, Status::Busy);
    assert!((1..=100).contains(&busy.retry_after_ms()), "{}", busy.retry_after_ms());
    second.ping().unwrap();
    kms_tests::process::wait_until("the back-off passes", || wire.unlock(b"passphrase") == Ok(true));
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &ciphertext).unwrap(), b"x");
    // The lock ended the streams.
    assert_eq!(wire.remote_encrypt(stream, b"x"), Err(Status::NotFound));
    assert_eq!(wire.remote_close(opened), Err(Status::NotFound));
}

#[test]
fn a_client_that_leaves_during_a_lock_leaves_a_locked_agent() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let mut leaving = agent.connect();
    leaving.send(&frame(Opcode::Lock, 9, &kms_protocol::NoFields {}, b"passphrase")).unwrap();
    drop(leaving);
    kms_tests::process::wait_until("it is locked", || wire.status().state == LockState::Locked);
    assert_eq!(Wire::connect(&agent.socket).unlock(b"passphrase"), Ok(true));
}

#[test]
fn a_lock_behind_a_reply_that_cannot_be_sent_is_carried_out() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let stream = UnixStream::connect(&agent.socket).unwrap();
    let mut deaf = Wire::over(stream.try_clone().unwrap());
    deaf.hello();
    stream.shutdown(Shutdown::Read).unwrap();
    let ping = frame(Opcode::Ping, 1, &kms_protocol::NoFields {}, &[]);
    let lock = frame(Opcode::Lock, 2, &kms_protocol::NoFields {}, b"passphrase");
    deaf.send(&[ping, lock].concat()).unwrap();
    kms_tests::process::wait_until("it is locked", || wire.status().state == LockState::Locked);
    assert_eq!(wire.unlock(b"passphrase"), Ok(true));
    assert_eq!(wire.lock(b"another"), Ok(true));
}

#[test]
fn a_lock_during_an_unlock_does_not_say_that_the_agent_is_locked() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let mut other = agent.connect();
    wire.lock(b"passphrase").unwrap();
    let ping = frame(Opcode::Ping, 1, &kms_protocol::NoFields {}, &[]);
    let unlock = frame(Opcode::Unlock, 2, &kms_protocol::NoFields {}, b"passphrase");
    wire.send(&[ping, unlock].concat()).unwrap();
    // The reply to the one before it tells that the unlock was taken up.
    assert_eq!(wire.receive().unwrap().request_id, 1);
    assert_eq!(other.lock(b"another"), Err(Status::Busy));
    assert_eq!(wire.receive().unwrap().status, Status::Ok);
    assert_eq!(other.lock(b"another"), Ok(true));
}

#[test]
fn a_key_that_a_rewrap_moves_to_is_looked_up_after_the_ciphertext_was_looked_at() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let message = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    let mut of_another_format = message.clone();
    of_another_format[3] = 2;
    for (ciphertext, status) in [
        (b"no ciphertext".to_vec(), Status::Malformed),
        (of_another_format, Status::Unsupported),
        (message, Status::NotFound),
    ] {
        for to in [KeyRef::Bound(9), KeyRef::Name("nobody")] {
            assert_eq!(wire.rewrap("a", NO_CONTEXT, Some(to), &ciphertext).map(|_| ()), Err(status));
        }
    }
}

#[test]
fn a_key_that_is_not_exportable_is_denied_before_anything_else() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let denied = |wire: &mut Wire, passphrase: &[u8], nobody| {
        assert_eq!(wire.export("a", 0, passphrase).map(|_| ()), Err(Status::Denied));
        assert_eq!(wire.export("nobody", 0, passphrase).map(|_| ()), Err(nobody));
    };
    for passphrase in [&b""[..], b"passphrase"] {
        denied(&mut wire, passphrase, Status::NotFound);
    }
    wire.lock(b"passphrase").unwrap();
    wire.unlock(b"passphrase").unwrap();
    // Without the passphrase nothing is told, not even that there is no such key.
    denied(&mut wire, b"", Status::Denied);
    for passphrase in [&b"wrong"[..], b"passphrase", &[b'p'; 1025]] {
        denied(&mut wire, passphrase, Status::NotFound);
    }
    // None of them was an attempt, so none is followed by a back-off.
    wire.add("b", None, &[(constraint::EXPORTABLE, 0)]).unwrap();
    wire.export("b", 0, b"passphrase").unwrap();
}

#[test]
fn what_is_worked_on_elsewhere_counts_as_what_is_not() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let requests = |wire: &mut Wire| wire.fact("requests").parse::<u64>().unwrap();
    let before = requests(&mut wire);
    let random = frame(Opcode::Random, 1, &kms_protocol::Random { length: 1 }, &[]);
    wire.batch(&[random.clone(), random]).unwrap();
    assert_eq!(requests(&mut wire), before + 2, "a batch is one request");
    let out = |stats: &kms_tests::wire::Reply| {
        let values = stats.decode::<kms_protocol::StatsReply>().values;
        values.iter().find(|value| value.name == "bytes-out").unwrap().value
    };
    let stats = wire.request(Opcode::Stats, &kms_protocol::NoFields {}, &[]);
    let mut sent = stats.bytes.len();
    for opcode in [Opcode::Lock, Opcode::Unlock] {
        sent += wire.request(opcode, &kms_protocol::NoFields {}, b"passphrase").bytes.len();
    }
    let after = wire.request(Opcode::Stats, &kms_protocol::NoFields {}, &[]);
    assert_eq!(out(&after) - out(&stats), sent as u64);
}
