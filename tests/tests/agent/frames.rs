//! Bytes that are no request: each is answered as `docs/protocol.md` says, costs its own connection at most, and never
//! the agent.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use kms_protocol::{Hello, KeyAndContext, KeyRef, Opcode, PROTOCOL_VERSION, Status};
use kms_tests::{
    Agent, Wire,
    process::{ranges, status_number, wait_until},
    wire::{NO_CONTEXT, add_frame, frame, random},
};

/// A head by hand.
pub(crate) fn head(
    length: u32,
    version: u8,
    flags: u8,
    code: u16,
    request_id: u32,
    fields_length: u32,
) -> Vec<u8> {
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

pub(crate) fn hello_frame(request_id: u32) -> Vec<u8> {
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
        [(0x0006, "passwd"), (0x0015, "promote"), (0x001C, "set"), (0x0040, "grant"), (0x0051, "audit")]
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
