//! Connections that break, agents that are busy: what is sent again, what is not, and with which bytes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use kms_envelope::ContextRef;
use kms_protocol::{KeyRef, Opcode, Refusal, Status, push_frame};

use super::fake::{Fake, Fate, ID};
use crate::{Client, Error, NewKey, Options, SecretVec};

const KEY: KeyRef<'_> = KeyRef::Name("key");
const NO: ContextRef<'_> = ContextRef::EMPTY;

fn patient(fake: &Fake) -> Client {
    let retry = Duration::from_secs(30);
    Client::connect(&Options { socket: Some(fake.socket.clone()), retry, ..Options::default() }).unwrap()
}

/// An agent whose first answers to other requests than hello get lost after `len` bytes.
fn losing(answers: usize, len: usize) -> Fake {
    let lost = AtomicUsize::new(0);
    Fake::new(move |opcode, mut reply| {
        if opcode == Opcode::Hello || lost.fetch_add(1, Ordering::SeqCst) >= answers {
            return Fate::Send(reply);
        }
        reply.truncate(len);
        Fate::SendAndClose(reply)
    })
}

fn passphrase() -> SecretVec {
    let mut passphrase = SecretVec::with_capacity(1);
    passphrase.push_slice(b"x").unwrap();
    passphrase
}

type Ask = fn(&mut Client) -> Result<(), Error>;

#[test]
fn what_got_no_answer_is_sent_again_with_the_same_bytes() {
    let asks: &[Ask] = &[
        |client| client.add(&NewKey::new("new")).map(drop),
        |client| client.rotate(KEY).map(drop),
        |client| client.rename(KEY, "other").map(drop),
        |client| client.remove(KEY).map(drop),
        |client| client.remove_all().map(drop),
        |client| client.encrypt(KEY, NO, b"text").map(drop),
        |client| client.status().map(drop),
        |client| client.export(KEY, None, None).map(drop),
        |client| client.stream_new(KEY, NO).map(drop),
    ];
    for ask in asks {
        for len in [0, 1, 16, 19] {
            let fake = losing(3, len);
            ask(&mut patient(&fake)).unwrap();
            let frames = fake.frames.lock().unwrap();
            assert_eq!(frames.len(), 4);
            assert!(frames.iter().all(|frame| *frame == frames[0]));
        }
    }
}

#[test]
fn two_things_that_are_wanted_have_two_tokens() {
    let fake = Fake::honest();
    let mut client = patient(&fake);
    client.rotate(KEY).unwrap();
    client.rotate(KEY).unwrap();
    let frames = fake.frames.lock().unwrap();
    // Behind the head.
    assert_ne!(frames[0][16..32], frames[1][16..32]);
}

#[test]
fn a_lock_or_unlock_that_may_have_been_carried_out_is_not_repeated() {
    for ask in [Client::lock, Client::unlock] {
        let fake = losing(1, 0);
        let mut client = patient(&fake);
        assert!(matches!(ask(&mut client, &passphrase()), Err(Error::Closed)));
        assert_eq!(fake.frames.lock().unwrap().len(), 1);
        // And the next one goes on a new connection.
        client.ping().unwrap();
    }
    // One that never left is.
    let fake = Fake::new(|opcode, reply| match opcode {
        Opcode::Ping => Fate::SendAndClose(reply),
        _ => Fate::Send(reply),
    });
    let mut client = patient(&fake);
    client.ping().unwrap();
    // The fake closes after its answer; whoever waits sees it.
    assert!(matches!(client.wait(Duration::from_secs(60)), Err(Error::Closed)));
    assert!(client.lock(&passphrase()).unwrap());
}

#[test]
fn a_refusal_and_an_answer_that_makes_no_sense_are_not_repeated() {
    let fake = Fake::honest();
    let mut client = patient(&fake);
    let refused = client.add(&NewKey::new("taken")).unwrap_err();
    assert_eq!(refused.status(), Some(Status::Exists));
    assert_eq!(fake.frames.lock().unwrap().len(), 1);

    let fake = Fake::new(|opcode, mut reply| {
        if opcode == Opcode::Ping {
            reply[8] ^= 1;
        }
        Fate::Send(reply)
    });
    let mut client = patient(&fake);
    assert!(matches!(client.ping(), Err(Error::Reply(_))));
    assert_eq!(fake.frames.lock().unwrap().len(), 1);
    client.status().unwrap();
}

#[test]
fn patience_ends_and_without_any_there_is_one_attempt() {
    let fake = losing(usize::MAX, 0);
    let options = |retry| Options { socket: Some(fake.socket.clone()), retry, ..Options::default() };
    let mut client = Client::connect(&options(Duration::ZERO)).unwrap();
    assert!(matches!(client.ping(), Err(Error::Closed)));
    assert!(matches!(client.ping(), Err(Error::Broken)));
    assert_eq!(fake.frames.lock().unwrap().len(), 1);
    let mut client = Client::connect(&options(Duration::from_millis(300))).unwrap();
    let start = Instant::now();
    assert!(matches!(client.ping(), Err(Error::Closed)));
    assert!(start.elapsed() < Duration::from_secs(10));
    let tried = fake.frames.lock().unwrap().len() - 1;
    assert!((3..10).contains(&tried), "{tried}");
}

#[test]
fn a_busy_agent_gets_the_time_that_it_asks_for() {
    let busy = |times: usize, retry_after_ms: u32| {
        let asked = AtomicUsize::new(0);
        Fake::new(move |opcode, reply| {
            if opcode == Opcode::Hello || asked.fetch_add(1, Ordering::SeqCst) >= times {
                return Fate::Send(reply);
            }
            let id = u32::from_le_bytes(reply[8..12].try_into().unwrap());
            let mut refusal = Vec::new();
            push_frame(&mut refusal, Status::Busy.code(), id, &Refusal { retry_after_ms }, &[]).unwrap();
            Fate::Send(refusal)
        })
    };
    let fake = busy(2, 50);
    let start = Instant::now();
    patient(&fake).rotate(KEY).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(100));
    {
        let frames = fake.frames.lock().unwrap();
        assert_eq!(frames.len(), 3);
        assert!(frames.iter().all(|frame| *frame == frames[0]));
    }
    // Longer than our patience: told at once.
    let fake = busy(1, 3_600_000);
    let refused = patient(&fake).rotate(KEY).unwrap_err();
    assert!(
        matches!(refused, Error::Refused { status: Status::Busy, retry_after, .. } if retry_after.as_secs() == 3600)
    );
}

#[test]
fn numbers_are_bound_again_by_the_id_of_their_key_before_they_are_used() {
    let fake = Fake::new(|opcode, reply| match opcode {
        Opcode::Ping => Fate::SendAndClose(Vec::new()),
        _ => Fate::Send(reply),
    });
    let mut client = patient(&fake);
    client.bind(7, KEY).unwrap();
    client.bind(8, KEY).unwrap();
    client.retry = Duration::from_millis(1);
    client.ping().unwrap_err();
    client.retry = Duration::from_secs(30);
    let before = fake.frames.lock().unwrap().len();
    client.encrypt(KeyRef::Bound(7), NO, b"text").unwrap();
    client.encrypt(KeyRef::Bound(7), NO, b"text").unwrap();
    let frames = fake.frames.lock().unwrap();
    let codes: Vec<_> =
        frames[before..].iter().map(|frame| u16::from_le_bytes([frame[6], frame[7]])).collect();
    assert_eq!(codes, [Opcode::Bind.code(), Opcode::Encrypt.code(), Opcode::Encrypt.code()]);
    // Number, tag of an id, id.
    let bind = &frames[before][16..];
    assert_eq!(bind, [&7_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &ID].concat());
}

#[test]
fn who_serves_is_checked_anew_at_each_connect() {
    let fake = losing(1, 0);
    let mut client = patient(&fake);
    let directory = fake.socket.parent().unwrap().to_owned();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(client.ping(), Err(Error::WritableDirectory { .. })));
    assert_eq!(fake.frames.lock().unwrap().len(), 1);
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    client.ping().unwrap();
}

#[test]
fn an_opcode_that_the_agent_does_not_list_is_not_sent() {
    let fake = Fake::new(|opcode, mut reply| {
        if opcode == Opcode::Hello {
            // Every opcode of the list becomes ping.
            let at = 16 + 2 + 7 * 4 + 8;
            for code in reply[at..][..2 * Opcode::ALL.len()].chunks_mut(2) {
                code.copy_from_slice(&Opcode::Ping.code().to_le_bytes());
            }
        }
        Fate::Send(reply)
    });
    let mut client = patient(&fake);
    client.ping().unwrap();
    assert_eq!(client.rotate(KEY).unwrap_err().status(), Some(Status::Unsupported));
    assert_eq!(fake.frames.lock().unwrap().len(), 1);
}
