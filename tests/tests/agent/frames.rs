//! Bytes that are no request: each is answered as `docs/protocol.md` says, costs its own connection at most, and never
//! the agent.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

use kms_protocol::{Hello, KeyAndContext, KeyRef, List, NoFields, Opcode, PROTOCOL_VERSION, Status};
use kms_tests::{
    Agent, Wire,
    process::{ranges, status_number, wait_until},
    programs::tool,
    wire::{NO_CONTEXT, add_frame, frame, random},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A head by hand.
fn head(length: u32, version: u8, flags: u8, code: u16, request_id: u32, fields_length: u32) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend([version, flags]);
    bytes.extend(code.to_le_bytes());
    bytes.extend(request_id.to_le_bytes());
    bytes.extend(fields_length.to_le_bytes());
    bytes
}

/// A frame of fields by hand.
fn raw(opcode: Opcode, fields: &[u8], payload: &[u8]) -> Vec<u8> {
    let fields_length = u32::try_from(fields.len()).unwrap();
    let length = fields_length + u32::try_from(payload.len()).unwrap();
    [&head(length, 1, 0, opcode.code(), 77, fields_length), fields, payload].concat()
}

fn hello_frame(request_id: u32) -> Vec<u8> {
    frame(Opcode::Hello, request_id, &Hello { version: PROTOCOL_VERSION }, &[])
}

fn text(bytes: &str) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes.as_bytes()].concat()
}

/// What is sent, what must come back, and whether the connection goes on.
struct Vector {
    what: &'static str,
    greeted: bool,
    bytes: Vec<u8>,
    answer: Status,
    goes_on: bool,
}

fn vectors() -> Vec<Vector> {
    use Opcode::{
        Add, Describe, Encrypt, Hello, List, Lock, Ping, RemoteStreamClose, Remove, Status as Facts,
    };
    let ends = |what, bytes, answer| Vector { what, greeted: true, bytes, answer, goes_on: false };
    let goes_on = |what, bytes, answer| Vector { what, greeted: true, bytes, answer, goes_on: true };
    let first = |what, bytes, answer| Vector { what, greeted: false, bytes, answer, goes_on: false };
    let ping = Ping.code();
    let by_name = |name: &str| [&0u32.to_le_bytes()[..], &text(name)].concat();
    let with_context =
        |context: &[u8]| [&by_name("a"), &(context.len() as u64).to_le_bytes()[..], context].concat();
    // Token, name, material, if-missing, constraints.
    let add = |name: &[u8], material: u32, if_missing: u8, constraints: &[u8]| {
        [&[5; 16], name, &material.to_le_bytes(), &[if_missing], constraints].concat()
    };
    let none = 0u64.to_le_bytes();
    let good_add = add(&text("new"), 0, 0, &none);
    let mut vectors = vec![
        ends("version 0", head(0, 0, 0, ping, 77, 0), Status::Unsupported),
        ends("version 2", head(0, 2, 0, ping, 77, 0), Status::Unsupported),
        ends("a flag", head(0, 1, 1, ping, 77, 0), Status::Malformed),
        ends("another flag", head(0, 1, 0x80, ping, 77, 0), Status::Malformed),
        ends("version before flags", head(u32::MAX, 2, 1, ping, 77, u32::MAX), Status::Unsupported),
        ends("flags before length", head(u32::MAX, 1, 1, ping, 77, u32::MAX), Status::Malformed),
        ends("a length of 2^32 - 1", head(u32::MAX, 1, 0, ping, 77, 0), Status::TooLarge),
        ends(
            "a length of one byte over the maximum",
            head((1 << 20) - 15, 1, 0, ping, 77, 0),
            Status::TooLarge,
        ),
        ends("fields longer than the length", head(3, 1, 0, ping, 77, 4), Status::Malformed),
        ends("fields of 2^32 - 1", head(0, 1, 0, ping, 77, u32::MAX), Status::Malformed),
        ends("a ping with fields", raw(Ping, b"x", b""), Status::Malformed),
        ends("a ping with a payload", raw(Ping, b"", b"x"), Status::Malformed),
        ends("a status with a payload", raw(Facts, b"", b"x"), Status::Malformed),
        ends("a lock with fields", raw(Lock, b"x", b"passphrase"), Status::Malformed),
        ends("a listing with a payload", raw(List, &none, b"x"), Status::Malformed),
        ends("a listing whose fields end early", raw(List, &[0; 7], b""), Status::Malformed),
        ends("a listing with a byte left over", raw(List, &[0; 9], b""), Status::Malformed),
        ends(
            "a key reference of tag 2",
            raw(Describe, &[&2u32.to_le_bytes()[..], &[0; 20]].concat(), b""),
            Status::Malformed,
        ),
        ends(
            "a key reference of tag 2^32 - 1",
            raw(Describe, &[&[255; 4][..], &[0; 20]].concat(), b""),
            Status::Malformed,
        ),
        ends(
            "a name that is not UTF-8",
            raw(Describe, &[&[0; 4], &1u64.to_le_bytes()[..], &[0xff], &[0; 4]].concat(), b""),
            Status::Malformed,
        ),
        ends(
            "a name that goes beyond its fields",
            raw(Encrypt, &[&[0; 4], &9u64.to_le_bytes()[..], b"abc"].concat(), b""),
            Status::Malformed,
        ),
        ends(
            "a name of 2^64 - 1 bytes",
            raw(Encrypt, &[&[0; 4], &[255; 8][..], b"abc"].concat(), b""),
            Status::Malformed,
        ),
        ends(
            "a context of 2^63 bytes",
            raw(Encrypt, &[&by_name("a"), &(1u64 << 63).to_le_bytes()[..]].concat(), b""),
            Status::Malformed,
        ),
        ends("material of tag 2", raw(Add, &add(&text("new"), 2, 0, &none), b""), Status::Malformed),
        ends("a bool of 2", raw(Add, &add(&text("new"), 0, 2, &none), b""), Status::Malformed),
        ends(
            "2^61 constraints",
            raw(Add, &add(&text("new"), 0, 0, &(1u64 << 61).to_le_bytes()), b""),
            Status::Malformed,
        ),
        ends("2^64 - 1 constraints", raw(Add, &add(&text("new"), 0, 0, &[255; 8]), b""), Status::Malformed),
        ends(
            "one constraint less than said",
            raw(Add, &add(&text("new"), 0, 0, &[&2u64.to_le_bytes()[..], &[0; 12]].concat()), b""),
            Status::Malformed,
        ),
        ends("no fields where there are some", raw(Remove, b"", b""), Status::Malformed),
        ends("a stream number of three bytes", raw(RemoteStreamClose, &[0; 3], b""), Status::Malformed),
        ends("a closing with a payload", raw(RemoteStreamClose, &[0; 4], b"x"), Status::Malformed),
        ends("a second hello", hello_frame(77), Status::Malformed),
        first("a ping before the hello", raw(Ping, b"", b""), Status::Malformed),
        first("a reserved opcode before the hello", head(0, 1, 0, 0x0031, 77, 0), Status::Malformed),
        first("an add before the hello", raw(Add, &good_add, b""), Status::Malformed),
        first("a hello of version 0", raw(Hello, &[0, 0], b""), Status::Unsupported),
        first("a hello of version 2", raw(Hello, &[2, 0], b""), Status::Unsupported),
        first("a hello of one byte", raw(Hello, &[1], b""), Status::Malformed),
        first("a hello of three bytes", raw(Hello, &[1, 0, 0], b""), Status::Malformed),
        first("a hello with a payload", raw(Hello, &[1, 0], b"x"), Status::Malformed),
        goes_on("opcode 0", head(0, 1, 0, 0, 77, 0), Status::Unsupported),
        goes_on("opcode 2^16 - 1", head(0, 1, 0, u16::MAX, 77, 0), Status::Unsupported),
        goes_on(
            "an unknown opcode with anything behind it",
            [head(9, 1, 0, 0x7777, 77, 4), vec![7; 9]].concat(),
            Status::Unsupported,
        ),
        goes_on("a bad name", raw(Describe, &[&by_name("-a")[..], &[0; 4]].concat(), b""), Status::Malformed),
        goes_on("a key generated with a payload", raw(Add, &good_add, b"x"), Status::Malformed),
        goes_on(
            "a key imported without one",
            raw(Add, &add(&text("new"), 1, 0, &none), b""),
            Status::Malformed,
        ),
        goes_on("a context that is none", raw(Encrypt, &with_context(b""), b""), Status::Malformed),
        goes_on("an empty passphrase", raw(Lock, b"", b""), Status::Malformed),
        goes_on(
            "a ciphertext of no bytes",
            raw(Opcode::Decrypt, &with_context(NO_CONTEXT), b""),
            Status::Malformed,
        ),
        goes_on("no such stream", raw(RemoteStreamClose, &[9; 4], b""), Status::NotFound),
    ];
    for (reserved, what) in
        [(0x0006, "passwd"), (0x0014, "rotate"), (0x001D, "export"), (0x002A, "unwrap"), (0x0051, "audit")]
    {
        vectors.push(goes_on(what, head(0, 1, 0, reserved, 77, 0), Status::Unsupported));
    }
    vectors
}

#[test]
fn a_bad_frame_is_answered_and_costs_only_its_own_connection() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.generate("a").unwrap();
    for Vector { what, greeted, bytes, answer, goes_on } in vectors() {
        let mut wire = if greeted { agent.connect() } else { agent.mute() };
        wire.send(&bytes).unwrap();
        let reply = wire.receive().unwrap_or_else(|| panic!("{what}: no answer"));
        assert_eq!((reply.status, reply.request_id), (answer, 77), "{what}");
        assert_eq!(reply.retry_after_ms(), 0, "{what}");
        assert_eq!(reply.bytes.len(), 20, "{what}");
        if goes_on {
            wire.ping().unwrap_or_else(|status| panic!("{what}: {status:?}"));
        } else {
            assert!(wire.is_closed(), "{what}");
        }
        other.ping().unwrap();
    }
    assert_eq!(other.list().unwrap().len(), 1, "nothing was carried out");
    // The control: what the bad ones were made of is good.
    let mut wire = agent.connect();
    wire.send(&raw(Opcode::Ping, b"", b"")).unwrap();
    assert_eq!(wire.receive().unwrap().status, Status::Ok);
}

#[test]
fn what_stands_behind_a_bad_frame_is_not_read() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let good = add_frame(1, random(), "before", None);
    let behind = add_frame(3, random(), "behind", None);
    wire.send(&[good, head(0, 9, 0, 2, 2, 0), behind].concat()).unwrap();
    assert_eq!(wire.receive().unwrap().status, Status::Ok, "what came before it is answered");
    assert_eq!(wire.receive().unwrap().status, Status::Unsupported);
    assert!(wire.is_closed());
    let names: Vec<_> = agent.connect().list().unwrap().into_iter().map(|row| row.name).collect();
    assert_eq!(names, ["before"]);
}

/// The one test in which seconds pass: the deadline of half a frame is five of them.
#[test]
fn half_a_frame_is_closed_after_five_seconds_and_an_idle_connection_is_not() {
    let agent = Agent::start();
    let mut idle = agent.connect();
    idle.generate("a").unwrap();
    let request =
        frame(Opcode::Encrypt, 5, &KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT }, &[1; 9000]);
    let large = head(1 << 19, 1, 0, Opcode::Encrypt.code(), 6, 0);
    let cases: Vec<(&str, bool, Vec<u8>)> = vec![
        ("nothing at all", false, Vec::new()),
        ("one byte of the hello", false, hello_frame(1)[..1].to_vec()),
        ("a hello without its last byte", false, hello_frame(1)[..17].to_vec()),
        ("one byte", true, request[..1].to_vec()),
        ("half a head", true, request[..8].to_vec()),
        ("a head", true, request[..16].to_vec()),
        ("half a frame", true, request[..4000].to_vec()),
        ("a frame without its last byte", true, request[..request.len() - 1].to_vec()),
        ("the head of a frame of 512 KiB", true, large),
        ("a frame and half of the next", true, [&request[..], &request[..100]].concat()),
    ];
    std::thread::scope(|scope| {
        for (what, greeted, bytes) in &cases {
            let agent = &agent;
            scope.spawn(move || {
                let start = Instant::now();
                let mut wire = if *greeted { agent.connect() } else { agent.mute() };
                wire.send(bytes).unwrap();
                if *what == "a frame and half of the next" {
                    assert_eq!(wire.receive().unwrap().status, Status::Ok);
                }
                assert!(wire.is_closed(), "{what}");
                let lasted = start.elapsed();
                // A frame of 1 MiB takes the whole share of a uid, and first waits until the others are gone.
                let limit = if *what == "the head of a frame of 512 KiB" { 15.0 } else { 9.0 };
                assert!((5.0..limit).contains(&lasted.as_secs_f64()), "{what} lasted {lasted:?}");
            });
        }
        // More bytes do not win more time: a byte each time that the agent answers somebody else.
        scope.spawn(|| {
            let start = Instant::now();
            let (mut slow, mut other) = (agent.connect(), agent.connect());
            slow.stream.set_nonblocking(true).unwrap();
            for byte in request.iter().cycle() {
                if slow.stream.write_all(&[*byte]).is_err() {
                    break;
                }
                let pause = Instant::now();
                wait_until("a moment passes, served", || {
                    other.ping().unwrap();
                    pause.elapsed() > Duration::from_millis(20)
                });
                assert!(start.elapsed() < Duration::from_secs(9), "a slow frame is not closed");
            }
            assert!(start.elapsed() > Duration::from_secs(4));
        });
    });
    idle.ping().unwrap();
    assert_eq!(idle.fact("frame-pool"), "0", "what half frames held is free again");
    assert_eq!(idle.fact("connections"), "1");
}

#[test]
fn a_frame_may_come_one_byte_at_a_time_or_many_at_once() {
    let agent = Agent::start();
    let mut wire = agent.mute();
    for byte in hello_frame(1) {
        wire.send(&[byte]).unwrap();
    }
    assert_eq!(wire.receive().unwrap().status, Status::Ok);
    let add = add_frame(2, random(), "a", None);
    let fields = KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
    for byte in [add, frame(Opcode::Encrypt, 3, &fields, b"plain")].concat() {
        wire.send(&[byte]).unwrap();
    }
    for request_id in [2, 3] {
        let reply = wire.receive().unwrap();
        assert_eq!((reply.status, reply.request_id), (Status::Ok, request_id));
    }
    // Frames of growing length in one write, cut by the socket wherever it likes.
    let lengths: Vec<usize> = (0..120).map(|n| n * 541).collect();
    let requests: Vec<_> =
        (10..).zip(&lengths).map(|(id, len)| frame(Opcode::Encrypt, id, &fields, &vec![7; *len])).collect();
    let mut writer = wire.stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&requests.concat()).unwrap());
        let mut ciphertexts = Vec::new();
        for (id, _) in (10..).zip(&lengths) {
            let reply = wire.receive().unwrap();
            assert_eq!((reply.status, reply.request_id), (Status::Ok, id));
            ciphertexts.push(reply.payload);
        }
        let mut other = agent.connect();
        for (ciphertext, len) in ciphertexts.iter().zip(&lengths) {
            assert_eq!(other.decrypt("a", NO_CONTEXT, ciphertext).unwrap(), vec![7; *len]);
        }
    });
}

/// Memory that the agent has, in KiB: resident, and locked.
fn memory(pid: i32) -> (u64, u64) {
    (status_number(pid, "VmRSS"), status_number(pid, "VmLck"))
}

#[test]
fn clients_that_never_read_do_not_fill_the_agent_and_others_are_served() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.generate("a").unwrap();
    let fields = KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
    let before = memory(agent.pid);
    let mut pumped = 0;
    let mut silent = Vec::new();
    for _ in 0..24 {
        let wire = agent.connect();
        wire.stream.set_nonblocking(true).unwrap();
        silent.push(wire);
    }
    let request = frame(Opcode::Encrypt, 1, &fields, &[1; 60_000]);
    // Until nobody can write another byte, and then once more round.
    for _ in 0..2 {
        for wire in &mut silent {
            let mut at = 0;
            let mut idle = Instant::now();
            while idle.elapsed() < Duration::from_millis(30) {
                match wire.stream.write(&request[at..]) {
                    Ok(count) => {
                        pumped += count;
                        at = (at + count) % request.len();
                        idle = Instant::now();
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                    // There is no memory for its answers, and it was closed.
                    Err(_) => break,
                }
            }
        }
        let ciphertext = other.encrypt("a", NO_CONTEXT, b"still served").unwrap();
        assert_eq!(other.decrypt("a", NO_CONTEXT, &ciphertext).unwrap(), b"still served");
    }
    let after = memory(agent.pid);
    assert!(pumped > 3_000_000, "{pumped} bytes are no flood");
    let grown = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    assert!(grown.0 < 6 * 1024 && grown.1 < 4 * 1024, "grown by {grown:?} KiB after {pumped} bytes");
    assert!(other.fact("frame-pool").parse::<usize>().unwrap() <= 4 << 20);
    drop(silent);
    wait_until("everything is given back", || other.fact("frame-pool") == "0");
    wait_until("the locked memory is given back", || memory(agent.pid).1 <= before.1 + 256);
}

#[test]
fn a_client_may_leave_at_every_byte() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.generate("a").unwrap();
    let fields = KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
    let request = frame(Opcode::Encrypt, 7, &fields, &[1; 70]);
    let reply_len = 16 + 170;
    for count in 0..=reply_len {
        let mut wire = agent.connect();
        wire.send(&request).unwrap();
        let mut read = vec![0; count];
        wire.stream.read_exact(&mut read).unwrap();
    }
    for count in 0..request.len() {
        let mut wire = agent.connect();
        wire.send(&request[..count]).unwrap();
    }
    for count in 0..hello_frame(1).len() {
        let mut wire = agent.mute();
        wire.send(&hello_frame(1)[..count]).unwrap();
    }
    // A client that says that it will send no more still gets its answers.
    let mut wire = agent.connect();
    wire.send(&[&request[..], &request].concat()).unwrap();
    wire.stream.shutdown(Shutdown::Write).unwrap();
    for _ in 0..2 {
        assert_eq!(wire.receive().unwrap().payload.len(), 170);
    }
    assert!(wire.is_closed());
    wait_until("the agent sees that they left", || other.fact("connections") == "1");
    assert_eq!(other.fact("frame-pool"), "0");
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        const LENGTHS: [u32; 12] =
            [0, 1, 15, 16, 17, 255, 65_535, 65_536, (1 << 20) - 16, (1 << 20) - 15, 1 << 31, u32::MAX];
        for _ in 0..=self.below(3) {
            let at = self.below(frame.len().max(1));
            match self.below(7) {
                0 | 1 if !frame.is_empty() => frame[at] ^= 1 << self.below(8),
                2 if !frame.is_empty() => frame[at] = u8::try_from(self.below(256)).unwrap(),
                3 => frame.truncate(at),
                4 => frame.insert(at, u8::try_from(self.below(256)).unwrap()),
                5 if frame.len() >= 16 => {
                    let place = if self.below(2) == 0 { 0 } else { 12 };
                    let value = LENGTHS[self.below(LENGTHS.len())];
                    frame[place..place + 4].copy_from_slice(&value.to_le_bytes());
                }
                6 if frame.len() >= 24 => {
                    // Eight bytes somewhere in the fields are a length or a count.
                    let place = 16 + self.below(frame.len() - 23);
                    let value = u64::from(LENGTHS[self.below(LENGTHS.len())]) << (8 * self.below(5));
                    frame[place..place + 8].copy_from_slice(&value.to_le_bytes());
                }
                _ => {}
            }
        }
    }
}

/// G13: many mutated frames to one live agent, which is the same process afterwards and has caught no panic.
#[test]
fn mutated_frames_do_not_end_the_agent() {
    const FRAMES: u64 = 100_000;
    let agent = Agent::builder().config("log = \"error\"\n").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let context = NO_CONTEXT;
    let key = KeyAndContext { key: KeyRef::Name("a"), context };
    let id = wire.describe(KeyRef::Name("a")).unwrap().key.id;
    let message = wire.encrypt("a", context, b"plain").unwrap();
    let (_, head) = wire.remote_new("a").unwrap();
    let seeds: Vec<Vec<u8>> = vec![
        frame(Opcode::Ping, 1, &NoFields {}, &[]),
        frame(Opcode::Status, 2, &NoFields {}, &[]),
        frame(Opcode::List, 3, &List { cursor: 0 }, &[]),
        frame(Opcode::Describe, 4, &kms_protocol::Describe { key: key.key, versions_after: 0 }, &[]),
        frame(Opcode::Describe, 5, &kms_protocol::Describe { key: KeyRef::Id(id), versions_after: 0 }, &[]),
        frame(Opcode::Remove, 6, &kms_protocol::Remove { token: [6; 16], key: KeyRef::Name("none") }, &[]),
        frame(Opcode::Encrypt, 7, &key, b"plain"),
        frame(Opcode::Decrypt, 8, &key, &message),
        frame(Opcode::StreamNew, 9, &key, &[]),
        frame(Opcode::StreamOpen, 10, &key, &head),
        frame(Opcode::RemoteStreamNew, 11, &key, &[]),
        frame(Opcode::RemoteStreamOpen, 12, &key, &head),
        frame(Opcode::RemoteStreamEncrypt, 13, &kms_protocol::RemoteStream { stream: 1 }, b"x"),
        frame(Opcode::RemoteStreamDecrypt, 14, &kms_protocol::RemoteChunks { stream: 2, first: 0 }, &[0; 20]),
        frame(Opcode::RemoteStreamClose, 15, &kms_protocol::RemoteStream { stream: 1 }, &[]),
        add_frame(16, [7; 16], "b", None),
        add_frame(17, [8; 16], "c", Some(&[9; 32])),
    ];
    let refused = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|worker| {
                let (agent, seeds, message, head) = (&agent, &seeds, &message, &head);
                scope.spawn(move || {
                    let mut dice = Dice(0x9e37_79b9_7f4a_7c15 + worker);
                    let mut refused = 0u64;
                    let mut sent = 0;
                    while sent < FRAMES / 2 {
                        // Several on one connection, since most cost it; streams, so that their numbers mean something.
                        let mut wire = agent.connect();
                        wire.remote_new("a").unwrap();
                        wire.remote_open("a", head).unwrap();
                        let before = refused;
                        while refused == before && sent < FRAMES / 2 {
                            let mut bytes = seeds[dice.below(seeds.len())].clone();
                            dice.mutate(&mut bytes);
                            // The derivation of a passphrase is another test's, and takes most of a second.
                            let opcode =
                                bytes.get(6..8).map_or(0, |code| u16::from_le_bytes([code[0], code[1]]));
                            if [Opcode::Lock.code(), Opcode::Unlock.code()].contains(&opcode)
                                || bytes.is_empty()
                            {
                                continue;
                            }
                            sent += 1;
                            let whole = bytes.len() >= 16
                                && u64::from(u32::from_le_bytes(bytes[..4].try_into().unwrap())) + 16
                                    <= bytes.len() as u64;
                            let _ = wire.send(&bytes);
                            if !whole {
                                // Nothing can come before the rest does: the end of the stream is the rest.
                                let _ = wire.stream.shutdown(Shutdown::Write);
                            }
                            match wire.receive() {
                                Some(reply) if whole && reply.status == Status::Ok => {}
                                // Refused: the connection may be gone, or what is left may be half a frame.
                                _ => refused += 1,
                            }
                            if bytes.len() > 16 && whole {
                                let length = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                                if u64::from(length) + 16 != bytes.len() as u64 {
                                    refused += u64::from(refused == before);
                                }
                            }
                        }
                    }
                    let mut wire = agent.connect();
                    assert_eq!(wire.decrypt("a", context, message).unwrap(), b"plain");
                    refused
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum::<u64>()
    });
    assert!(refused > FRAMES / 4, "only {refused} were bad");
    assert_eq!(wire.fact("pid"), agent.pid.to_string());
    assert_eq!(wire.fact("panics"), "0");
    wait_until("what half frames held is free again", || wire.fact("frame-pool") == "0");
}

/// A54: every length field with every length that a program gets wrong, while hardly any memory is left to take.
#[test]
fn lengths_are_refused_before_memory_is_taken_by_them() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.generate("a").unwrap();
    let limit = (status_number(agent.pid, "VmSize") + 16 * 1024) * 1024;
    let limited = tool("prlimit").args(["--pid", &agent.pid.to_string(), &format!("--as={limit}")]).status();
    assert!(limited.unwrap().success());
    let mut lengths: Vec<u64> = vec![0, u64::MAX];
    for power in [1u32, 4, 8, 12, 15, 16, 20, 24, 30, 31, 32, 40, 47, 48, 60, 61, 62, 63] {
        lengths.extend([(1u64 << power) - 1, 1 << power, (1 << power) + 1]);
    }
    lengths.extend([
        (1 << 20) - 17,
        (1 << 20) - 16,
        (1 << 20) - 15,
        u64::MAX - 1,
        u64::MAX / 12,
        u64::MAX / 12 + 1,
    ]);
    assert!(lengths.len() >= 60);
    let encrypt = frame(
        Opcode::Encrypt,
        7,
        &KeyAndContext { key: KeyRef::Name("a"), context: &[0, 0, 0, 1, 0, 0, 0, 1, b'k', 0, 0, 0, 1, b'v'] },
        b"plain",
    );
    let add = add_frame(8, [8; 16], "c", Some(&[9; 32]));
    // Of the frame: length, length of the fields. In the fields: name, context, constraints; in the context: count,
    // length of a key, length of a value.
    let name = 16 + 4;
    let context = name + 8 + 1;
    let places: [(&Vec<u8>, usize, usize, bool); 9] = [
        (&encrypt, 0, 4, false),
        (&encrypt, 12, 4, false),
        (&encrypt, name, 8, false),
        (&encrypt, context, 8, false),
        (&encrypt, context + 8, 4, true),
        (&encrypt, context + 12, 4, true),
        (&encrypt, context + 17, 4, true),
        (&add, 16 + 16, 8, false),
        (&add, 16 + 16 + 8 + 1 + 4 + 1, 8, false),
    ];
    for (good, at, size, big_endian) in places {
        for length in &lengths {
            let mut bytes = good.clone();
            if big_endian {
                bytes[at..at + size].copy_from_slice(&length.to_be_bytes()[8 - size..]);
            } else {
                bytes[at..at + size].copy_from_slice(&length.to_le_bytes()[..size]);
            }
            let mut wire = agent.connect();
            wire.send(&bytes).unwrap();
            wire.stream.shutdown(Shutdown::Write).unwrap();
            if let Some(reply) = wire.receive() {
                let unchanged = bytes == *good;
                let shorter_frame = at == 0; // it may end before what makes it bad
                assert!(
                    reply.status != Status::Ok || unchanged || shorter_frame,
                    "{length} at {at} of {} bytes",
                    good.len()
                );
            }
        }
        other.ping().unwrap();
    }
    assert_eq!(other.fact("pid"), agent.pid.to_string());
    // The control: the limit bites. What needs memory is refused, and the agent goes on.
    let reply = other.request(Opcode::Lock, &NoFields {}, b"the derivation takes 256 MiB");
    assert_eq!(reply.status, Status::Busy);
    assert!(reply.retry_after_ms() > 0);
    assert_eq!(other.encrypt("a", NO_CONTEXT, b"x").map(|_| ()), Ok(()));
}

/// The soft limit of descriptors is 1,024 in most places.
fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= 4096, "this test needs 4,096 descriptors: ulimit -Hn 4096");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

#[test]
fn a_thousand_idle_connections_do_not_keep_another_from_being_served() {
    raise_descriptor_limit();
    let agent = Agent::start();
    let mut other = agent.connect();
    other.generate("a").unwrap();
    let before = memory(agent.pid);
    let idle: Vec<Wire> = (0..1000).map(|_| agent.connect()).collect();
    assert_eq!(other.fact("connections"), "1001");
    let after = memory(agent.pid);
    let per_connection = (after.0.saturating_sub(before.0)) as f64 / 1000.0;
    assert!(per_connection <= 4.0, "{per_connection} KiB for an idle connection");
    assert_eq!(after.1, before.1, "none of it is locked");
    let ciphertext = other.encrypt("a", NO_CONTEXT, b"x").unwrap();
    assert_eq!(agent.connect().decrypt("a", NO_CONTEXT, &ciphertext).unwrap(), b"x");
    drop(idle);
    wait_until("they are gone", || other.fact("connections") == "1");
}

#[test]
fn the_connections_of_a_uid_are_limited() {
    let agent = Agent::builder().config("[limits]\nconnections_per_uid = 5\n").start();
    let mut held: Vec<Wire> = (0..5).map(|_| agent.connect()).collect();
    for _ in 0..3 {
        let mut sixth = agent.mute();
        let _ = sixth.send(&hello_frame(1));
        assert!(sixth.is_closed(), "without a byte");
    }
    held.iter_mut().for_each(|wire| wire.ping().unwrap());
    held.pop();
    wait_until("there is room again", || {
        let mut wire = agent.mute();
        wire.send(&hello_frame(1)).is_ok() && wire.receive().is_some()
    });
}

#[test]
fn the_longest_frame_is_what_the_configuration_says() {
    let agent = Agent::builder().config("[limits]\nframe = 131072\n").start();
    let mut wire = agent.mute();
    assert_eq!(wire.hello().frame_max, 131_072);
    wire.generate("a").unwrap();
    wire.encrypt("a", NO_CONTEXT, &[1; 65_536]).unwrap();
    let (stream, _) = wire.remote_new("a").unwrap();
    wire.remote_encrypt(stream, &[1; 7 * 16_384]).unwrap();
    wire.send(&head(131_072 - 15, 1, 0, Opcode::Ping.code(), 9, 0)).unwrap();
    assert_eq!(wire.receive().unwrap().status, Status::TooLarge);
    assert!(wire.is_closed());
}

#[test]
fn no_reply_is_longer_than_the_longest_frame() {
    let agent = Agent::builder().config("[limits]\nframe = 131072\n").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    // The request fits; its answer is longer by 16 bytes a chunk. The longest that both fit goes through.
    let longest = 131_072 - 16 - 8 * 16;
    let (stream, _) = wire.remote_new("a").unwrap();
    wire.remote_encrypt(stream, &vec![1; longest]).unwrap();
    let (stream, _) = wire.remote_new("a").unwrap();
    let refused = wire.remote_encrypt(stream, &vec![1; longest + 1]).map(|_| ());
    assert_eq!(refused, Err(Status::TooLarge));
    assert_eq!(wire.remote_close(stream), Err(Status::NotFound), "an error ends the stream");
    wire.ping().unwrap();
}

#[test]
fn buffers_with_frames_are_locked_and_hidden() {
    let agent = Agent::start();
    let mut half = agent.connect();
    let fields = KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
    let request = frame(Opcode::Encrypt, 5, &fields, &random::<60_000>());
    half.send(&request[..50_000]).unwrap();
    let mut other = agent.connect();
    wait_until("half a frame is held", || {
        other.fact("frame-pool").parse::<usize>().unwrap() >= request.len()
    });
    wait_until("all that came is read", || status_number(agent.pid, "VmLck") >= 3 * 64);
    for range in ranges(agent.pid).iter().filter(|range| range.has("lo")) {
        assert!(range.has("dd") && range.has("dc"), "{range:?}");
    }
}
