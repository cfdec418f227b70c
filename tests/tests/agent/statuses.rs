//! Every status that `docs/protocol.md` lists for an opcode, in the order of its checks, alone and in a batch.

use std::collections::{BTreeSet, HashMap};

use kms_protocol::{
    Add, Bind, Constraint, Describe, Export, Hello, KeyRef, List, Material, NewDataKey, NoFields, Opcode,
    RemoteChunks, RemoteStream, Remove, RemoveAll, Rename, Rewrap, Rotate, Status, constraint,
};
use kms_tests::{
    Agent, Wire,
    process::wait_until,
    wire::{NO_CONTEXT, Operations, frame, random, random_bytes, use_frame},
};

use crate::{
    made::{Made, USING, may_stand_in_a_batch, opens},
    operations::many_pairs,
};

const NOBODY: [u8; 16] = [0x55; 16];

/// An agent with keys of every kind, and what each key made.
struct World {
    agent: Agent,
    wire: Wire,
    made: HashMap<&'static str, (Made, [u8; 16])>,
    seen: HashMap<u16, BTreeSet<u16>>,
}

impl World {
    fn start() -> Self {
        let agent = Agent::start();
        let mut wire = agent.connect();
        let mut made = HashMap::new();
        for (name, constraints) in [
            ("k", &[][..]),
            ("other", &[]),
            ("asks", &[(constraint::CONFIRM, 0)]),
            ("spent", &[(constraint::MAX_USES, 1)]),
        ] {
            let secret = random();
            let id = wire.add(name, Some(&secret), constraints).unwrap().id;
            made.insert(name, (Made::under(&secret, id, NO_CONTEXT), id));
        }
        wire.bind(7, KeyRef::Name("k")).unwrap();
        wire.encrypt("spent", NO_CONTEXT, b"the only use").unwrap();
        Self { agent, wire, made, seen: HashMap::new() }
    }

    fn id(&self, name: &str) -> [u8; 16] {
        self.made[name].1
    }

    /// Sends this request, and the same in a batch where it may stand there: both have this status, and both count as so many
    /// uses of `k`.
    #[track_caller]
    fn expect(&mut self, what: &str, request: &[u8], expected: Status, uses: u64) {
        let opcode = Opcode::from_code(u16::from_le_bytes([request[6], request[7]])).unwrap();
        let before = self.wire.uses("k");
        let reply = self.wire.ask(request);
        assert_eq!(reply.status, expected, "{}: {what}", opcode.name());
        let _ = reply.ok();
        assert_eq!(self.wire.uses("k") - before, uses, "{}: uses of {what}", opcode.name());
        self.seen.entry(opcode.code()).or_default().insert(expected.code());
        if may_stand_in_a_batch(opcode) {
            let replies = self.wire.batch(&[request.to_vec()]).unwrap();
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].status, expected, "{} in a batch: {what}", opcode.name());
            assert_eq!(replies[0].request_id.to_le_bytes(), request[8..12]);
            assert_eq!(self.wire.uses("k") - before, 2 * uses, "{} in a batch: {what}", opcode.name());
        }
        if opcode == Opcode::RemoteStreamNew || opcode == Opcode::RemoteStreamOpen {
            // Makes room for the next one.
            self.wire = self.agent.connect();
            self.wire.bind(7, KeyRef::Name("k")).unwrap();
        }
    }
}

fn changed(bytes: &[u8], at: usize, to: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = to;
    bytes
}

#[test]
fn every_use_of_a_key_is_refused_for_the_reasons_that_are_listed_and_counted_as_the_text_says() {
    let mut world = World::start();
    let too_long = "k".repeat(256);
    for opcode in USING {
        let opcode = *opcode;
        let made = world.made["k"].0.payloads(opcode);
        let times = if opcode == Opcode::Rewrap { 2 } else { 1 };
        for payload in &made {
            let name = KeyRef::Name("k");
            let with = |key, context: &[u8], payload: &[u8]| use_frame(opcode, 9, key, context, payload);
            let is_stream_rewrap = opcode == Opcode::Rewrap && payload[5] == 3;
            let expect_with = |world: &mut World, what: &str, payload: &[u8], status, uses| {
                world.expect(what, &with(name, NO_CONTEXT, payload), status, uses);
            };
            for key in [name, KeyRef::Id(world.id("k")), KeyRef::Bound(7)] {
                world.expect("as it should be", &with(key, NO_CONTEXT, payload), Status::Ok, times);
            }
            for bad in ["", "-k", "/k", "k\n", &too_long] {
                let request = with(KeyRef::Name(bad), NO_CONTEXT, payload);
                world.expect("a bad name", &request, Status::Malformed, 0);
            }
            for nobody in [KeyRef::Name("nobody"), KeyRef::Id(NOBODY), KeyRef::Bound(8)] {
                world.expect("no such key", &with(nobody, NO_CONTEXT, payload), Status::NotFound, 0);
            }
            for (what, context, status) in [
                ("no context at all", vec![], Status::Malformed),
                ("a cut context", many_pairs(2, 3)[..20].to_vec(), Status::Malformed),
                ("bytes behind the context", [NO_CONTEXT, b"x"].concat(), Status::Malformed),
                ("65 pairs", many_pairs(65, 1), Status::TooLarge),
                ("8,193 bytes of context", many_pairs(1, 8193 - 16), Status::TooLarge),
            ] {
                world.expect(what, &with(name, &context, payload), status, 0);
                // The context is checked before the key is looked up.
                world.expect(what, &with(KeyRef::Name("nobody"), &context, payload), status, 0);
            }
            for (key, status) in [("asks", Status::Declined), ("spent", Status::Limit)] {
                let own = world.made[key].0.payloads(opcode);
                let place = made.iter().position(|made| made == payload).unwrap();
                let request = use_frame(opcode, 9, KeyRef::Name(key), NO_CONTEXT, &own[place]);
                let before = world.wire.uses(key);
                world.expect(key, &request, status, 0);
                assert_eq!(world.wire.uses(key), before, "{}: a refusal is no use", opcode.name());
            }
            if opens(opcode).is_empty() {
                continue;
            }

            // Another context. A stream is rewrapped without one, and another is a fault of the request.
            let status = if is_stream_rewrap { Status::Malformed } else { Status::InvalidCiphertext };
            let uses = if is_stream_rewrap { 0 } else { times };
            world.expect("another context", &with(name, &many_pairs(1, 2), payload), status, uses);

            // The header, and the purpose; each is told before any key is looked up.
            for key in [name, KeyRef::Name("nobody")] {
                let mut refused = |what: &str, payload: &[u8], status| {
                    world.expect(what, &with(key, NO_CONTEXT, payload), status, 0);
                };
                for len in [0, 1, 27] {
                    refused("shorter than a header", &payload[..len], Status::Malformed);
                }
                for at in 0..3 {
                    refused("no magic", &changed(payload, at, 0), Status::Malformed);
                }
                let version_0 = [&payload[..24], &[0; 4], &payload[28..]].concat();
                refused("key version 0", &version_0, Status::Malformed);
                for (at, what) in [(3, "format"), (4, "suite"), (6, "flags"), (7, "flags")] {
                    refused(what, &changed(payload, at, 0x80), Status::Unsupported);
                }
                for purpose in 0..=255 {
                    let status = match purpose {
                        purpose if opens(opcode).contains(&purpose) => continue,
                        1..=5 => Status::Malformed,
                        _ => Status::Unsupported,
                    };
                    if purpose < 8 || purpose == 255 {
                        refused("another purpose", &changed(payload, 5, purpose), status);
                    }
                }
            }
            // Format comes before suite, suite before purpose, purpose before flags, flags before version.
            let all_wrong = [&payload[..3], &[9, 9, 4, 9, 9], &payload[8..24], &[0; 4]].concat();
            expect_with(&mut world, "a format before all else", &all_wrong, Status::Unsupported, 0);

            // The length comes before the key.
            if [1, 2].contains(&payload[5]) {
                let longest = [&payload[..28], &random_bytes(65_701 - 28)].concat();
                let longer = use_frame(opcode, 9, KeyRef::Name("nobody"), NO_CONTEXT, &longest);
                world.expect("longer than a message", &longer, Status::TooLarge, 0);
            } else if opcode != Opcode::MacVerify {
                let longer = [&payload[..], &random_bytes(65_700)].concat();
                expect_with(&mut world, "a stream is not too large", &longer, Status::InvalidCiphertext, 0);
            }
            let impossible =
                if opcode == Opcode::MacVerify { Status::Malformed } else { Status::InvalidCiphertext };
            for len in [28, 29, 59, 60, 99] {
                let cut = use_frame(
                    opcode,
                    9,
                    KeyRef::Name("nobody"),
                    NO_CONTEXT,
                    &payload[..len.min(payload.len() - 1)],
                );
                world.expect("an impossible length, and no key", &cut, impossible, 0);
            }

            // The key.
            let other = with(KeyRef::Name("other"), NO_CONTEXT, payload);
            world.expect("another key", &other, Status::WrongKey, 0);
            expect_with(&mut world, "another id", &changed(payload, 8, payload[8] ^ 1), Status::WrongKey, 0);
            let version_2 = changed(payload, 27, 2);
            expect_with(&mut world, "a version that it does not have", &version_2, Status::NotFound, 0);
            let of_other = with(KeyRef::Name("other"), NO_CONTEXT, &version_2);
            world.expect("another key before its version", &of_other, Status::WrongKey, 0);

            // What the key says.
            for at in [28, 60, payload.len() - 1] {
                let flipped = changed(payload, at, payload[at] ^ 1);
                expect_with(&mut world, "a flipped bit", &flipped, Status::InvalidCiphertext, times);
            }
            let cut = &payload[..payload.len() - 1];
            let uses = if opcode == Opcode::MacVerify || payload[5] == 3 { 0 } else { times };
            expect_with(&mut world, "cut by a byte", cut, impossible, uses);
        }
    }

    // What only some have.
    let key = KeyRef::Name("k");
    let context = NO_CONTEXT;
    for opcode in [Opcode::Encrypt, Opcode::Wrap] {
        let mut with = |what: &str, len, status, uses| {
            world.expect(what, &use_frame(opcode, 9, key, context, &vec![1; len]), status, uses);
        };
        with("the longest", 65_536, Status::Ok, 1);
        with("one byte more", 65_537, Status::TooLarge, 0);
        let empty = if opcode == Opcode::Wrap { Status::Malformed } else { Status::Ok };
        with("nothing", 0, empty, u64::from(opcode == Opcode::Encrypt));
    }
    for opcode in [Opcode::DataKey, Opcode::DataKeyWrapped] {
        for (length, status) in [
            (0, Status::Malformed),
            (1, Status::Ok),
            (1_024, Status::Ok),
            (1_025, Status::TooLarge),
            (u32::MAX, Status::TooLarge),
        ] {
            let request = frame(opcode, 9, &NewDataKey { key, context, length }, &[]);
            world.expect("a length", &request, status, u64::from(status == Status::Ok));
        }
    }
    for len in [0, 1, 63, 65, 128] {
        world.expect(
            "no digest",
            &use_frame(Opcode::Mac, 9, key, context, &vec![1; len]),
            Status::Malformed,
            0,
        );
    }
    let tag_and_digest = &world.made["k"].0.payloads(Opcode::MacVerify)[0].clone();
    for len in [28, 60, 123] {
        let request = use_frame(Opcode::MacVerify, 9, key, context, &tag_and_digest[..len]);
        world.expect("no digest", &request, Status::Malformed, 0);
    }
    let long = [&tag_and_digest[..], b"x"].concat();
    world.expect("a byte more", &use_frame(Opcode::MacVerify, 9, key, context, &long), Status::Malformed, 0);
    for payload in world.made["k"].0.payloads(Opcode::Rewrap) {
        for (to, status) in [
            (KeyRef::Name("nobody"), Status::NotFound),
            (KeyRef::Id(NOBODY), Status::NotFound),
            (KeyRef::Bound(99), Status::NotFound),
            (KeyRef::Name("-"), Status::Malformed),
            (KeyRef::Name("asks"), Status::Declined),
            (KeyRef::Name("spent"), Status::Limit),
        ] {
            let request = frame(Opcode::Rewrap, 9, &Rewrap { key, context, to: Some(to) }, &payload);
            world.expect("to such a key", &request, status, 0);
        }
        // One use of the key that opens, one of the key that seals.
        for (to, uses) in [(KeyRef::Name("other"), 1), (KeyRef::Bound(7), 2)] {
            let before = world.wire.uses("other");
            let request = frame(Opcode::Rewrap, 9, &Rewrap { key, context, to: Some(to) }, &payload);
            world.expect("to another key", &request, Status::Ok, uses);
            assert_eq!(world.wire.uses("other") - before, 2 * (2 - uses), "alone and in a batch");
        }
    }
    for opcode in [Opcode::RemoteStreamNew, Opcode::RemoteStreamOpen] {
        let payload = &world.made["k"].0.payloads(opcode)[0].clone();
        let mut wire = world.agent.connect();
        for _ in 0..16 {
            wire.ask(&use_frame(opcode, 9, key, context, payload)).ok().unwrap();
        }
        assert_eq!(wire.ask(&use_frame(opcode, 9, key, context, payload)).status, Status::Limit);
    }

    // Each status that section 4 lists for one of these was seen, and no other.
    for opcode in USING {
        let mut listed = vec![
            Status::Ok,
            Status::Malformed,
            Status::TooLarge,
            Status::NotFound,
            Status::Declined,
            Status::Limit,
        ];
        if !opens(*opcode).is_empty() {
            listed.extend([Status::Unsupported, Status::WrongKey, Status::InvalidCiphertext]);
        }
        let listed: BTreeSet<u16> = listed.into_iter().map(Status::code).collect();
        assert_eq!(world.seen[&opcode.code()], listed, "{}", opcode.name());
    }
}

#[test]
fn what_changes_lists_and_tells_is_refused_for_the_reasons_that_are_listed() {
    let agent = Agent::builder().config("[limits]\nkeys = 6\n").start();
    let mut wire = agent.connect();
    for name in ["k", "other", "spare"] {
        wire.add(name, None, &[]).unwrap();
    }
    wire.add("asks", None, &[(constraint::CONFIRM, 0), (constraint::EXPORTABLE, 0)]).unwrap();
    wire.add("out", None, &[(constraint::MAX_USES, 1), (constraint::EXPORTABLE, 0)]).unwrap();
    let ciphertext = wire.encrypt("k", NO_CONTEXT, b"x").unwrap();
    let (nobody, bad) = (KeyRef::Name("nobody"), KeyRef::Name("-bad"));
    let refs = |name| {
        [
            (KeyRef::Name(name), Status::Ok),
            (nobody, Status::NotFound),
            (KeyRef::Id(NOBODY), Status::NotFound),
            (KeyRef::Bound(1), Status::NotFound),
            (bad, Status::Malformed),
        ]
    };
    let mut expect = |what: &str, request: Vec<u8>, expected: Status| {
        assert_eq!(wire.ask(&request).status, expected, "{what}");
    };
    for (key, status) in refs("k") {
        expect("describe", frame(Opcode::Describe, 1, &Describe { key, versions_after: 0 }, &[]), status);
        expect("bind", frame(Opcode::Bind, 1, &Bind { number: 5, key }, &[]), status);
        let rename = |name| frame(Opcode::Rename, 1, &Rename { token: random(), key, name }, &[]);
        expect("rename to the same", rename("k"), status);
        if status == Status::Ok {
            expect("rename to another", rename("other"), Status::Exists);
            expect("rename to no name", rename("a\0"), Status::Malformed);
            expect("rename to no name", rename(""), Status::Malformed);
        }
    }
    for (key, status) in refs("k") {
        expect("rotate", frame(Opcode::Rotate, 1, &Rotate { token: random(), key }, &[]), status);
    }
    let rotate = frame(Opcode::Rotate, 1, &Rotate { token: random(), key: KeyRef::Name("k") }, &[]);
    expect("six versions", rotate, Status::Limit);
    for (key, status) in refs("spare") {
        expect("remove", frame(Opcode::Remove, 1, &Remove { token: random(), key }, &[]), status);
    }
    for cursor in [0, 1, 256, u64::MAX] {
        expect("list", frame(Opcode::List, 1, &List { cursor }, &[]), Status::Ok);
    }
    for versions_after in [1, 2, 3, u32::MAX] {
        let fields = Describe { key: KeyRef::Name("k"), versions_after };
        expect("describe beyond", frame(Opcode::Describe, 1, &fields, &[]), Status::Ok);
    }
    for (length, status) in [
        (0, Status::Malformed),
        (1, Status::Ok),
        (65_536, Status::Ok),
        (65_537, Status::TooLarge),
        (u32::MAX, Status::TooLarge),
    ] {
        expect("random", frame(Opcode::Random, 1, &kms_protocol::Random { length }, &[]), status);
    }
    let export =
        |key, version, passphrase: &[u8]| frame(Opcode::Export, 1, &Export { key, version }, passphrase);
    for (key, status) in refs("out") {
        if status != Status::Ok {
            expect("export", export(key, 0, &[]), status);
        }
    }
    expect("not exportable", export(KeyRef::Name("k"), 0, &[]), Status::Denied);
    expect("not locked since the start", export(KeyRef::Name("out"), 0, b"x"), Status::Malformed);
    expect("no such version", export(KeyRef::Name("out"), 2, &[]), Status::NotFound);
    expect("export", export(KeyRef::Name("out"), 1, &[]), Status::Ok);
    expect("a second export", export(KeyRef::Name("out"), 1, &[]), Status::Limit);
    expect("confirm", export(KeyRef::Name("asks"), 0, &[]), Status::Declined);

    let add = |name, material, if_missing, constraints: &[(u32, u64)], key: &[u8]| {
        let constraints = constraints.iter().map(|(kind, value)| Constraint { kind: *kind, value: *value });
        let constraints = constraints.collect();
        frame(Opcode::Add, 1, &Add { token: random(), name, material, if_missing, constraints }, key)
    };
    for (what, request, status) in [
        ("a bad name", add("-", Material::Generate, false, &[], &[]), Status::Malformed),
        ("a key that is generated", add("new", Material::Generate, false, &[], &[1; 32]), Status::Malformed),
        ("a short key", add("new", Material::Import, false, &[], &[1; 31]), Status::Malformed),
        ("an unknown kind", add("new", Material::Generate, false, &[(6, 0)], &[]), Status::Unsupported),
        (
            "an unknown kind of a key that is there",
            add("k", Material::Generate, true, &[(6, 0)], &[]),
            Status::Unsupported,
        ),
        ("a value", add("new", Material::Generate, false, &[(1, 1)], &[]), Status::Malformed),
        ("a name that is taken", add("k", Material::Generate, false, &[], &[]), Status::Exists),
        ("a name that is taken, if missing", add("k", Material::Generate, true, &[], &[]), Status::Ok),
        ("the fifth", add("new", Material::Generate, false, &[], &[]), Status::Ok),
        ("the sixth", add("sixth", Material::Import, false, &[], &[1; 32]), Status::Ok),
        ("the seventh", add("seventh", Material::Generate, false, &[], &[]), Status::Limit),
    ] {
        expect(what, request, status);
    }
    expect(
        "a number that was never given",
        frame(Opcode::RemoteStreamClose, 1, &RemoteStream { stream: 9 }, &[]),
        Status::NotFound,
    );
    expect("a batch of nothing", frame(Opcode::Batch, 1, &NoFields {}, &[]), Status::Malformed);
    expect("a batch that is cut", frame(Opcode::Batch, 1, &NoFields {}, &ciphertext), Status::Malformed);
    expect("stats", frame(Opcode::Stats, 1, &NoFields {}, &[]), Status::Ok);
    expect("remove all", frame(Opcode::RemoveAll, 1, &RemoveAll { token: random() }, &[]), Status::Ok);
    expect(
        "remove all of nothing",
        frame(Opcode::RemoveAll, 1, &RemoveAll { token: random() }, &[]),
        Status::Ok,
    );
    assert_eq!(wire.list().unwrap().len(), 0);
}

/// A whole request of each opcode, that an agent that is not locked would carry out or refuse for the key alone.
fn any_request(opcode: Opcode) -> Vec<u8> {
    let (key, token) = (KeyRef::Name("k"), random());
    match opcode {
        Opcode::Hello => frame(opcode, 1, &Hello { version: 1 }, &[]),
        Opcode::Ping | Opcode::Status | Opcode::Stats => frame(opcode, 1, &NoFields {}, &[]),
        Opcode::Lock | Opcode::Unlock => frame(opcode, 1, &NoFields {}, b"passphrase"),
        Opcode::Batch => frame(opcode, 1, &NoFields {}, &any_request(Opcode::Random)),
        Opcode::Add => {
            let (material, constraints) = (Material::Generate, Vec::new());
            frame(opcode, 1, &Add { token, name: "new", material, if_missing: false, constraints }, &[])
        }
        Opcode::List => frame(opcode, 1, &List { cursor: 0 }, &[]),
        Opcode::Describe => frame(opcode, 1, &Describe { key, versions_after: 0 }, &[]),
        Opcode::Remove => frame(opcode, 1, &Remove { token, key }, &[]),
        Opcode::Rotate => frame(opcode, 1, &Rotate { token, key }, &[]),
        Opcode::Rename => frame(opcode, 1, &Rename { token, key, name: "new" }, &[]),
        Opcode::RemoveAll => frame(opcode, 1, &RemoveAll { token }, &[]),
        Opcode::Export => frame(opcode, 1, &Export { key, version: 0 }, &[]),
        Opcode::Bind => frame(opcode, 1, &Bind { number: 1, key }, &[]),
        Opcode::Random => frame(opcode, 1, &kms_protocol::Random { length: 8 }, &[]),
        Opcode::RemoteStreamEncrypt | Opcode::RemoteStreamClose => {
            frame(opcode, 1, &RemoteStream { stream: 1 }, &[])
        }
        Opcode::RemoteStreamDecrypt => frame(opcode, 1, &RemoteChunks { stream: 1, first: 0 }, &[1; 99]),
        _ => use_frame(opcode, 1, key, NO_CONTEXT, &[]),
    }
}

#[test]
fn a_locked_agent_says_so_and_nothing_else_to_whatever_needs_a_key() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("k").unwrap();
    wire.bind(3, KeyRef::Name("k")).unwrap();
    let before = wire.list().unwrap();
    assert_eq!(wire.lock(b"passphrase"), Ok(true));
    for opcode in Opcode::ALL {
        let answered = [Opcode::Ping, Opcode::Status, Opcode::Lock, Opcode::Hello, Opcode::Unlock];
        if answered.contains(opcode) {
            continue;
        }
        let request = any_request(*opcode);
        assert_eq!(wire.ask(&request).status, Status::Locked, "{}", opcode.name());
        // The fields come before the lock.
        let mut other = agent.connect();
        let mut cut = request.clone();
        if request.len() > 16 && request[12..16] != [0; 4] {
            cut.truncate(16 + u32::from_le_bytes(request[12..16].try_into().unwrap()) as usize - 1);
            let len = u32::try_from(cut.len() - 16).unwrap().to_le_bytes();
            cut[..4].copy_from_slice(&len);
            cut[12..16].copy_from_slice(&len);
            assert_eq!(other.ask(&cut).status, Status::Malformed, "{}", opcode.name());
            assert!(other.is_closed(), "{}", opcode.name());
        }
    }
    // Whatever a locked agent knows, it does not tell: the same for a key that is there, and for one that is not; for a name that
    // cannot be, a context that breaks every rule, and a bound number.
    for key in
        [KeyRef::Name("k"), KeyRef::Name("nobody"), KeyRef::Name("-"), KeyRef::Bound(3), KeyRef::Bound(4)]
    {
        for opcode in USING {
            let reply = wire.ask(&use_frame(
                *opcode,
                1,
                key,
                &[],
                if *opcode == Opcode::StreamNew
                    || *opcode == Opcode::RemoteStreamNew
                    || *opcode == Opcode::DataKey
                    || *opcode == Opcode::DataKeyWrapped
                {
                    &[]
                } else {
                    b"x"
                },
            ));
            assert_eq!(reply.status, Status::Locked, "{}", opcode.name());
        }
    }
    // A batch is refused as one.
    let items: Vec<_> = USING.iter().map(|opcode| any_request(*opcode)).collect();
    assert_eq!(wire.batch(&items).map(|_| ()), Err(Status::Locked));
    assert_eq!(wire.ask(&frame(Opcode::Batch, 1, &NoFields {}, b"no frames")).status, Status::Locked);
    // A token that is repeated is judged like any other request.
    assert_eq!(wire.unlock(b"wrong"), Err(Status::Denied));
    wait_until("the back-off passes", || wire.unlock(b"passphrase") == Ok(true));
    assert_eq!(wire.list().unwrap(), before, "nothing was done meanwhile");
    // The binding is there again.
    wire.put_to_work(Opcode::Encrypt, KeyRef::Bound(3), NO_CONTEXT, b"x").unwrap();
}
