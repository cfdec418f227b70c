//! Requests against honest and hostile agents: every answer is a result or a typed error, in time.

use std::{
    io::Read,
    os::unix::net::UnixListener,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kms_envelope::ContextRef;
use kms_protocol::{FrameError, KeyRef, LockState, NameError, Opcode, Status};

use super::{
    Numbers,
    fake::{Fake, Fate, ID},
    options,
};
use crate::{Client, Error, KeyName, NewKey, Options, ReplyError, SecretVec};

const KEY: KeyRef<'_> = KeyRef::Name("key");

fn new_key(name: &str) -> NewKey<'_> {
    NewKey { memory_only: true, ..NewKey::new(name) }
}

fn passphrase(bytes: &[u8]) -> SecretVec {
    let mut passphrase = SecretVec::with_capacity(bytes.len());
    passphrase.push_slice(bytes).unwrap();
    passphrase
}

#[test]
fn every_operation_brings_its_reply() {
    let fake = Fake::honest();
    let mut client = Client::connect(&options(&fake)).unwrap();
    assert_eq!(client.socket(), fake.socket);
    assert_eq!(client.welcome().opcodes.len(), Opcode::ALL.len());
    client.ping().unwrap();
    assert_eq!(client.status().unwrap().state, LockState::Unlocked);
    assert_eq!(client.add(&new_key("new")).unwrap().id, ID);
    let refused = client.add(&new_key("taken")).unwrap_err();
    assert_eq!((refused.status(), refused.exit_code()), (Some(Status::Exists), 1));
    let names: Vec<_> = client.list().map(|row| row.unwrap().name).collect();
    assert_eq!(names, ["key0", "key1", "last"]);
    let versions: Vec<_> = client.describe(KEY).unwrap().versions.iter().map(|row| row.version).collect();
    assert_eq!(versions, [1, 2, 3]);
    assert_eq!(client.remove(KeyRef::Id(ID)).unwrap().id, ID);
    let sealed = client.encrypt(KEY, ContextRef::EMPTY, b"text").unwrap();
    assert_eq!(client.decrypt(KEY, ContextRef::EMPTY, &sealed).unwrap().expose_secret(), b"text");
    assert_eq!(client.rotate(KEY).unwrap().version, 2);
    assert_eq!(client.rename(KEY, "other").unwrap().id, ID);
    assert_eq!(client.rename(KEY, "taken").unwrap_err().status(), Some(Status::Exists));
    assert_eq!(client.remove_all().unwrap().keys, 5);
    let (exported, bytes) = client.export(KEY, Some(3), None).unwrap();
    assert_eq!((exported.version, bytes.expose_secret()), (3, &[1; 32]));
    let wrapped = client.wrap(KEY, ContextRef::EMPTY, b"a key").unwrap();
    assert_eq!(client.unwrap(KEY, ContextRef::EMPTY, &wrapped).unwrap().expose_secret(), b"a key");
    for length in [1, 32, 1024] {
        let both = client.data_key(KEY, ContextRef::EMPTY, length).unwrap();
        assert_eq!(both.plaintext.len(), length as usize);
        let opened = client.unwrap(KEY, ContextRef::EMPTY, &both.wrapped).unwrap();
        assert_eq!(opened.expose_secret(), both.plaintext.expose_secret());
        assert_eq!(client.data_key_wrapped(KEY, ContextRef::EMPTY, length).unwrap(), both.wrapped);
    }
    let moved = client.rewrap(KEY, ContextRef::EMPTY, &sealed, None).unwrap();
    let replacement = moved.replacement.unwrap();
    assert_eq!((moved.version, replacement.len()), (2, sealed.len()));
    assert!(client.rewrap(KEY, ContextRef::EMPTY, &replacement, None).unwrap().replacement.is_none());
    assert_eq!(client.verify(KEY, ContextRef::EMPTY, &replacement).unwrap().version, 2);
    let mut tag = client.mac(KEY, ContextRef::EMPTY, &[0; 64]).unwrap();
    client.mac_verify(KEY, ContextRef::EMPTY, &tag, &[0; 64]).unwrap();
    tag[0] ^= 1;
    let refused = client.mac_verify(KEY, ContextRef::EMPTY, &tag, &[0; 64]).unwrap_err();
    assert_eq!(refused.status(), Some(Status::InvalidCiphertext));
    assert_eq!(client.random(65536).unwrap().len(), 65536);
    assert_eq!(client.bind(7, KEY).unwrap().id, ID);
    assert_eq!(client.stats().unwrap().uptime_ms, 7);
    assert!(client.lock(&passphrase(b"x")).unwrap());
    assert!(client.unlock(&passphrase(b"x")).unwrap());
}

#[test]
fn what_no_agent_would_take_is_not_sent() {
    let fake = Fake::honest();
    let mut client = Client::connect(&options(&fake)).unwrap();
    let before = fake.requests.load(Ordering::SeqCst);
    let long = vec![0; 65537];
    assert!(matches!(client.encrypt(KEY, ContextRef::EMPTY, &long), Err(Error::TooLong { .. })));
    assert!(matches!(client.lock(&passphrase(&[0; 1025])), Err(Error::TooLong { .. })));
    let name = "x".repeat(2 << 20);
    assert!(matches!(client.describe(KeyRef::Name(&name)), Err(Error::TooLong { .. })));
    assert_eq!(KeyName::parse("-x"), Err(NameError::Start));
    // And the connection is as good as before.
    client.ping().unwrap();
    assert_eq!(fake.requests.load(Ordering::SeqCst), before + 1);
}

#[test]
fn nobody_there_is_told_with_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let connect = |path: &Path| {
        Client::connect(&Options { socket: Some(path.to_owned()), ..Options::default() })
            .map(drop)
            .unwrap_err()
    };
    let error = connect(&dir.path().join("none"));
    assert!(matches!(error, Error::Connect { .. }));
    assert_eq!(error.exit_code(), 2);
    let path = dir.path().join("stale");
    drop(UnixListener::bind(&path).unwrap());
    let error = connect(&path);
    assert!(matches!(error, Error::Connect { .. }));
    assert_eq!(error.exit_code(), 2);
    let error = connect(Path::new(&format!("/tmp/{}", "x".repeat(200))));
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_server_that_closes_before_its_hello_got_nothing_but_a_hello() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let error =
        Client::connect(&Options { socket: Some(socket), ..Options::default() }).map(drop).unwrap_err();
    server.join().unwrap();
    assert!(matches!(error, Error::ClosedBeforeHello { .. }));
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_connection_that_ends_at_any_byte_of_an_answer_is_an_error() {
    let cut_hello = AtomicUsize::new(0);
    let fake = Fake::new(move |_, mut reply| {
        let len = cut_hello.fetch_add(1, Ordering::SeqCst);
        assert!(len < reply.len(), "the test asks once for each byte");
        reply.truncate(len);
        Fate::SendAndClose(reply)
    });
    for _ in 0..16 + 30 {
        let error = Client::connect(&options(&fake)).map(drop).unwrap_err();
        assert!(matches!(error, Error::ClosedBeforeHello { .. }), "{error:?}");
    }

    let cut = Mutex::new(0);
    let fake = Fake::new(move |opcode, mut reply| {
        if opcode == Opcode::Hello {
            return Fate::Send(reply);
        }
        let mut len = cut.lock().unwrap();
        reply.truncate(*len);
        *len += 1;
        Fate::SendAndClose(reply)
    });
    for _ in 0..100 {
        let mut client = Client::connect(&options(&fake)).unwrap();
        assert!(matches!(client.describe(KEY), Err(Error::Closed)));
        assert!(matches!(client.ping(), Err(Error::Broken)));
    }
}

#[test]
fn a_thousand_changed_replies_end_in_a_result_or_an_error() {
    let numbers = Mutex::new(Numbers(1));
    let fake = Fake::new(move |opcode, mut reply| {
        let mut numbers = numbers.lock().unwrap();
        // Half of the hellos stay whole, so that the others get their turn.
        if opcode == Opcode::Hello && numbers.below(8) > 0 {
            return Fate::Send(reply);
        }
        match numbers.below(4) {
            0 => reply.truncate(numbers.below(reply.len())),
            1 => {
                let more = numbers.below(64) + 1;
                reply.extend(numbers.bytes(more));
            }
            _ => {}
        }
        for _ in 0..=numbers.below(4) {
            if !reply.is_empty() {
                // Mostly in the head and the first fields, where the structure is.
                let reach = reply.len().min(if numbers.below(2) == 0 { 24 } else { usize::MAX });
                let at = numbers.below(reach);
                reply[at] ^= 1 << numbers.below(8);
            }
        }
        Fate::SendAndClose(reply)
    });
    let start = Instant::now();
    let mut refused = 0;
    for round in 0..1000 {
        let Ok(mut client) = Client::connect(&options(&fake)) else {
            refused += 1;
            continue;
        };
        let failed = match round % 11 {
            0 => client.ping().is_err(),
            1 => client.status().is_err(),
            2 => client.add(&new_key("new")).is_err(),
            3 => client.list().any(|row| row.is_err()),
            4 => client.describe(KEY).is_err(),
            5 => client.remove(KEY).is_err(),
            6 => client.encrypt(KEY, ContextRef::EMPTY, &[1; 40_000]).is_err(),
            7 => client.decrypt(KEY, ContextRef::EMPTY, &[1; 1000]).is_err(),
            8 => client.stream_new(KEY, ContextRef::EMPTY).is_err(),
            9 => client.remote_stream_new(KEY, ContextRef::EMPTY).is_err(),
            _ => client.lock(&passphrase(b"x")).is_err(),
        };
        refused += usize::from(failed);
    }
    // What a change leaves possible, as another check value, no client can tell.
    assert!(refused > 500, "{refused}");
    assert!(start.elapsed() < Duration::from_secs(60));
}

/// The error of a ping whose reply was changed.
fn ping_with(change: impl Fn(&mut Vec<u8>) + Send + Sync + 'static) -> Error {
    let fake = Fake::new(move |opcode, mut reply| {
        if opcode != Opcode::Hello {
            change(&mut reply);
        }
        Fate::Send(reply)
    });
    let mut client = Client::connect(&options(&fake)).unwrap();
    client.ping().unwrap_err()
}

#[test]
fn each_wrong_answer_is_told_apart() {
    let reply = |error: Error| match error {
        Error::Reply(error) => error,
        other => panic!("{other:?}"),
    };
    // Without memory being taken for it: the frame never arrives.
    let huge = reply(ping_with(|reply| reply[3] = 0x7f));
    assert_eq!(huge, ReplyError::Frame(FrameError::TooLarge { request_id: 2 }));
    assert_eq!(reply(ping_with(|reply| reply[8] = 99)), ReplyError::RequestId);
    assert_eq!(reply(ping_with(|reply| reply[6] = 99)), ReplyError::Status(99));
    // A refusal without its fields, and a success with some.
    assert_eq!(reply(ping_with(|reply| reply[6] = 1)), ReplyError::Shape);
    let longer = |reply: &mut Vec<u8>| {
        reply[0] = 1;
        reply[12] = 1;
        reply.push(0);
    };
    assert_eq!(reply(ping_with(longer)), ReplyError::Shape);
    let payload = |reply: &mut Vec<u8>| {
        reply[0] = 1;
        reply.push(0);
    };
    assert_eq!(reply(ping_with(payload)), ReplyError::Shape);
}

#[test]
fn hellos_of_another_kind_are_not_an_agent() {
    // Version and longest frame are the first fields of the reply.
    for (at, byte) in [(16, 2), (20, 0), (4, 9), (3, 0x7f)] {
        let fake = Fake::new(move |_, mut reply| {
            reply[at] = byte;
            Fate::SendAndClose(reply)
        });
        let error = Client::connect(&options(&fake)).map(drop).unwrap_err();
        assert!(matches!(error, Error::NotAnAgent { .. }), "{error:?}");
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn pages_that_never_end_end() {
    let fake = Fake::new(|opcode, mut reply| {
        // The last eight bytes of a page are the cursor of the next.
        if opcode == Opcode::List {
            let at = reply.len() - 8;
            reply[at..].copy_from_slice(&1u64.to_le_bytes());
        }
        Fate::Send(reply)
    });
    let mut client = Client::connect(&options(&fake)).unwrap();
    let rows: Vec<_> = client.list().take(100).collect();
    assert!(matches!(rows.last(), Some(Err(Error::Reply(ReplyError::Pages)))));
    assert_eq!(rows.len(), 2);
}

#[test]
fn an_agent_that_does_not_answer_is_given_up_even_if_it_dribbles() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let timeout = Duration::from_millis(200);
    let connect = || {
        Client::connect(&Options { socket: Some(socket.clone()), timeout, ..Options::default() })
            .map(drop)
            .unwrap_err()
    };
    // Nobody accepts, so nobody answers.
    let start = Instant::now();
    let error = connect();
    assert!(matches!(&error, Error::NotAnAgent { source, .. } if matches!(**source, Error::Timeout { .. })));
    assert_eq!(error.exit_code(), 2);
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(listener.accept().unwrap());

    // A byte now and then must not renew the limit.
    let server = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut hello = [0; 18];
        peer.read_exact(&mut hello).unwrap();
        let (idle, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        idle.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut sent = 0;
        // A head that announces a long frame, then one byte at a time until the client is gone.
        let head = [0, 0, 8, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        std::io::Write::write_all(&mut peer, &head).unwrap();
        while std::io::Write::write_all(&mut peer, &[0]).is_ok() {
            let _ = (&idle).read(&mut [0]);
            sent += 1;
        }
        sent
    });
    let start = Instant::now();
    let error = connect();
    assert!(
        matches!(&error, Error::NotAnAgent { source, .. } if matches!(**source, Error::Timeout { .. })),
        "{error:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(server.join().unwrap() > 2);
}
