//! What restricts a key, held to the nanosecond and to the single use (`docs/protocol.md`, section 4.2, Constraint).

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use kms_agent::{audit::Event, config::Limits};
use kms_protocol::{
    Add, Constraint, KeyRef, List, Listed, Material, Opcode, RemoteStream, Status, constraint,
};
use kms_tests::{
    Agent,
    process::wait_until,
    wire::{NO_CONTEXT, Operations, frame, random, use_frame},
};

use crate::{
    desk::Desk,
    made::{Made, USING, may_stand_in_a_batch},
};

const LIFETIME: u32 = constraint::LIFETIME;
const START: Duration = Duration::new(1_000, 250_000_000);
const LAST: Duration = Duration::from_nanos(1);
const K: KeyRef<'_> = KeyRef::Name("k");

fn names(desk: &mut Desk) -> Vec<String> {
    let listed: Listed = desk.call(Opcode::List, &List { cursor: 0 }, &[]).unwrap().decode();
    let mut names: Vec<_> = listed.keys.into_iter().map(|row| row.name).collect();
    names.sort();
    names
}

fn expired(desk: &mut Desk) -> usize {
    desk.events().iter().filter(|event| matches!(event, Event::Expired { .. })).count()
}

#[test]
fn a_lifetime_ends_at_its_nanosecond_for_every_operation() {
    let end = START + Duration::from_secs(10);
    let secret = random::<32>();
    let constraints = &[(LIFETIME, 10), (constraint::EXPORTABLE, 0)];
    for opcode in USING {
        for key in 0..3 {
            let mut desk = Desk::new(START, Limits::default());
            let id = desk.add("k", Some(&secret), constraints).unwrap().id;
            desk.bind(1, K).unwrap();
            let key = [K, KeyRef::Id(id), KeyRef::Bound(1)][key];
            let made = Made::under(&secret, id, NO_CONTEXT);
            let request = use_frame(*opcode, 1, key, NO_CONTEXT, &made.payloads(*opcode)[0]);
            assert_eq!(desk.core.next_deadline(), Some(end));
            desk.clock = end - LAST;
            desk.ring();
            assert_eq!(desk.ask(&request).status, Status::Ok, "{} before the end", opcode.name());
            desk.clock = end;
            // Without a timer that rang: the request itself is what finds out.
            if may_stand_in_a_batch(*opcode) && key == K {
                assert_eq!(desk.batch(std::slice::from_ref(&request)).unwrap()[0].status, Status::NotFound);
            }
            assert_eq!(desk.ask(&request).status, Status::NotFound, "{} at the end", opcode.name());
            assert_eq!(expired(&mut desk), 1);
            assert_eq!((desk.core.next_deadline(), desk.value("keys")), (None, 0));
        }
    }
    for at_end in [false, true] {
        let mut desk = Desk::new(START, Limits::default());
        desk.add("k", Some(&secret), constraints).unwrap();
        desk.add("stays", None, &[]).unwrap();
        desk.rotate("k").unwrap();
        desk.clock = if at_end { end } else { end - LAST };
        let expected = if at_end { Err(Status::NotFound) } else { Ok(()) };
        assert_eq!(desk.described("k", 0).map(|_| ()), expected);
        assert_eq!(desk.export("k", 1, &[]).map(|exported| assert_eq!(exported.1, secret)), expected);
        assert_eq!(desk.bind(1, K).map(|_| ()), expected);
        assert_eq!(desk.rotate("k").map(|_| ()), expected);
        assert_eq!(desk.rename("k", "k").map(|_| ()), expected);
        assert_eq!(names(&mut desk), if at_end { vec!["stays"] } else { vec!["k", "stays"] });
        assert_eq!(desk.value("versions"), if at_end { 1 } else { 4 });
        assert_eq!(desk.remove_all(), Ok(if at_end { 1 } else { 2 }));
        desk.clock = end * 2;
        desk.ring();
        assert_eq!(expired(&mut desk), usize::from(at_end), "what was removed does not expire");
    }
}

#[test]
fn what_is_left_of_a_lifetime_is_told_in_whole_seconds_that_are_never_0() {
    let mut desk = Desk::new(START, Limits::default());
    desk.add("k", None, &[(LIFETIME, 10)]).unwrap();
    for (passed, left) in [
        (Duration::ZERO, 10),
        (LAST, 10),
        (Duration::from_secs(1) - LAST, 10),
        (Duration::from_secs(1), 9),
        (Duration::from_millis(9_001), 1),
        (Duration::from_secs(10) - LAST, 1),
    ] {
        desk.clock = START + passed;
        assert_eq!(desk.described("k", 0).unwrap().key.expires_in, Some(left), "after {passed:?}");
    }
    desk.add("other", None, &[]).unwrap();
    assert_eq!(desk.described("other", 0).unwrap().key.expires_in, None);
}

#[test]
fn a_lifetime_goes_on_while_the_agent_is_locked_and_nothing_begins_it_anew() {
    let end = START + Duration::from_secs(10);
    let passphrase = b"passphrase";
    let start = || {
        let mut desk = Desk::new(START, Limits::default());
        desk.add("k", None, &[(LIFETIME, 10)]).unwrap();
        desk.add("longer", None, &[(LIFETIME, 60)]).unwrap();
        desk.add("stays", None, &[]).unwrap();
        desk
    };
    // The timer rings while it is locked.
    let mut desk = start();
    desk.clock += Duration::from_secs(5);
    assert_eq!(desk.locks(passphrase), Ok(true));
    assert_eq!(desk.core.next_deadline(), Some(end));
    desk.clock = end - LAST;
    desk.ring();
    let keys = |desk: &mut Desk| {
        let status: kms_protocol::StatusReply =
            desk.call(Opcode::Status, &kms_protocol::NoFields {}, &[]).unwrap().decode();
        status.facts.into_iter().find(|fact| fact.name == "keys").unwrap().value
    };
    assert_eq!(keys(&mut desk), "3");
    desk.clock = end;
    desk.ring();
    assert_eq!(keys(&mut desk), "2");
    assert_eq!(desk.core.next_deadline(), Some(START + Duration::from_secs(60)));
    assert_eq!(desk.unlocks(passphrase), Ok(true));
    assert_eq!(names(&mut desk), ["longer", "stays"]);
    assert_eq!(desk.described("longer", 0).unwrap().key.expires_in, Some(50));
    // Rotated, renamed and locked once more it ends when it would have.
    desk.rotate("longer").unwrap();
    desk.rename("longer", "k").unwrap();
    desk.clock = START + Duration::from_secs(60) - LAST;
    assert_eq!(names(&mut desk), ["k", "stays"]);
    desk.clock += LAST;
    assert_eq!(names(&mut desk), ["stays"]);

    // It ends unseen: between lock and unlock, while the passphrase of either is worked on, or in a long suspend.
    for (before_lock, in_lock, locked, in_unlock) in [(9, 1, 0, 0), (9, 0, 0, 1), (0, 0, 604_800, 0)] {
        let mut desk = start();
        desk.clock += Duration::from_secs(before_lock);
        desk.derivation = Duration::from_secs(in_lock);
        assert_eq!(desk.locks(passphrase), Ok(true));
        desk.clock += Duration::from_secs(locked);
        desk.derivation = Duration::from_secs(in_unlock);
        assert_eq!(desk.unlocks(passphrase), Ok(true));
        assert_eq!(
            desk.call(Opcode::Encrypt, &kms_protocol::KeyAndContext { key: K, context: NO_CONTEXT }, b"x")
                .map(|_| ()),
            Err(Status::NotFound)
        );
        let rest = if desk.clock < START + Duration::from_secs(60) {
            vec!["longer", "stays"]
        } else {
            vec!["stays"]
        };
        assert_eq!(names(&mut desk), rest);
    }
}

#[test]
fn an_end_takes_bindings_and_streams_of_every_connection_along_and_frees_the_name() {
    let mut desk = Desk::new(START, Limits::default());
    let old = desk.add("k", None, &[(LIFETIME, 10)]).unwrap();
    desk.add("stays", None, &[]).unwrap();
    let mut streams = Vec::new();
    for at in 0..2 {
        desk.at = at;
        desk.bind(1, K).unwrap();
        for name in ["k", "stays"] {
            let new = desk.ask(&use_frame(Opcode::RemoteStreamNew, 1, KeyRef::Name(name), NO_CONTEXT, &[]));
            streams.push((at, name, new.decode::<RemoteStream>().stream));
            let opened = desk.ask(&use_frame(
                Opcode::RemoteStreamOpen,
                1,
                KeyRef::Name(name),
                NO_CONTEXT,
                &new.payload,
            ));
            streams.push((at, name, opened.decode::<RemoteStream>().stream));
        }
    }
    desk.clock += Duration::from_secs(10);
    for (at, name, stream) in streams {
        desk.at = at;
        let closed = desk.call(Opcode::RemoteStreamClose, &RemoteStream { stream }, &[]).map(|_| ());
        assert_eq!(closed, if name == "k" { Err(Status::NotFound) } else { Ok(()) }, "{name}");
    }
    // A new key of the name is another key, and the number stands for the one that is gone.
    let new = desk.add("k", None, &[(LIFETIME, 10)]).unwrap();
    assert_ne!(new.id, old.id);
    for at in 0..2 {
        desk.at = at;
        let bound = desk.put_to_work(Opcode::Encrypt, KeyRef::Bound(1), NO_CONTEXT, b"x");
        assert_eq!(bound, Err(Status::NotFound));
        desk.put_to_work(Opcode::Encrypt, K, NO_CONTEXT, b"x").unwrap();
    }
    // The lifetime of the new one is its own.
    desk.clock += Duration::from_secs(10) - LAST;
    desk.put_to_work(Opcode::Encrypt, K, NO_CONTEXT, b"x").unwrap();
}

#[test]
fn many_ends_come_in_their_order_and_many_at_once() {
    let mut desk = Desk::new(START, Limits::default());
    for n in 0..1000u64 {
        // In no order; ten to each second.
        desk.add(&format!("k{n}"), None, &[(LIFETIME, 1 + n * 7 % 100)]).unwrap();
    }
    for second in 1..=100 {
        assert_eq!(desk.core.next_deadline(), Some(START + Duration::from_secs(second)));
        desk.clock = START + Duration::from_secs(second) - LAST;
        desk.ring();
        assert_eq!(desk.value("keys"), 1000 - (second - 1) * 10);
        desk.clock += LAST;
        desk.ring();
        assert_eq!(expired(&mut desk), 10);
        assert_eq!(desk.value("keys"), 1000 - second * 10);
    }
    assert_eq!(desk.core.next_deadline(), None);
}

#[test]
fn a_default_lifetime_is_shown_and_one_that_no_clock_reaches_is_harmless() {
    let lifetime = Some(Duration::from_secs(60));
    let mut desk = Desk::new(START, Limits { lifetime, ..Limits::default() });
    desk.add("default", None, &[]).unwrap();
    desk.add("shorter", None, &[(LIFETIME, 5)]).unwrap();
    desk.add("for-ever", None, &[(LIFETIME, u64::MAX)]).unwrap();
    let shown = |desk: &mut Desk, name: &str| {
        let description = desk.described(name, 0).unwrap();
        let shown = description.constraints.iter().find(|constraint| constraint.kind == LIFETIME);
        (shown.map(|constraint| constraint.value), description.key.expires_in)
    };
    assert_eq!(shown(&mut desk, "default"), (Some(60), Some(60)));
    assert_eq!(shown(&mut desk, "shorter"), (Some(5), Some(5)));
    assert_eq!(shown(&mut desk, "for-ever"), (Some(u64::MAX), None));
    desk.clock += Duration::from_secs(60);
    assert_eq!(names(&mut desk), ["for-ever"]);
    // At the edge of what a clock can show, and through a lock.
    let edge = u64::MAX - 2_000;
    desk.add("edge", None, &[(LIFETIME, edge)]).unwrap();
    assert_eq!(desk.locks(b"p"), Ok(true));
    desk.ring();
    assert_eq!(desk.unlocks(b"p"), Ok(true));
    assert_eq!(names(&mut desk), ["edge", "for-ever"]);
    assert_eq!(shown(&mut desk, "for-ever"), (Some(u64::MAX), None));
    assert_eq!(shown(&mut desk, "edge"), (Some(edge), Some(edge)));
    desk.clock = Duration::new(u64::MAX, 999_999_999);
    assert_eq!(names(&mut desk), ["for-ever"]);
    assert_eq!(shown(&mut desk, "for-ever"), (Some(u64::MAX), None));
}

#[test]
fn the_shipped_agent_wipes_a_key_by_itself_and_not_early() {
    let agent = Agent::builder().arguments(&["-t", "8h"]).start();
    let mut wire = agent.connect();
    wire.add("k", None, &[(LIFETIME, 1)]).unwrap();
    wire.add("day", None, &[]).unwrap();
    let day = wire.described("day", 0).unwrap();
    assert!(day.constraints.contains(&Constraint { kind: LIFETIME, value: 8 * 3600 }));
    assert!(day.key.expires_in.unwrap() > 8 * 3600 - 60);
    wire.remove("k").unwrap();
    for _ in 0..2 {
        let before = Instant::now();
        let fields = Add {
            token: random(),
            name: "k",
            material: Material::Generate,
            if_missing: false,
            constraints: vec![Constraint { kind: LIFETIME, value: 1 }],
        };
        wire.ask(&frame(Opcode::Add, 1, &fields, &[])).ok().unwrap();
        let added = Instant::now();
        let told = agent.log().matches("a key has expired").count();
        // No request is sent meanwhile: the agent alone does it.
        wait_until("the key has expired", || agent.log().matches("a key has expired").count() > told);
        assert!(before.elapsed() >= Duration::from_secs(1), "never early");
        // The promise is a second; the machine may be busy.
        assert!(added.elapsed() < Duration::from_secs(5), "{:?}", added.elapsed());
        assert_eq!(wire.value("keys"), 1);
        assert_eq!(wire.described("k", 0).map(|_| ()), Err(Status::NotFound));
    }
}

#[test]
fn eight_connections_use_a_key_exactly_as_often_as_it_may_be_used() {
    const USES: u64 = 2_000;
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.add("k", None, &[(constraint::MAX_USES, USES)]).unwrap();
    let ciphertext = wire.encrypt("k", NO_CONTEXT, b"x").unwrap();
    let mut broken = ciphertext.clone();
    *broken.last_mut().unwrap() ^= 1;
    let (done, over) = (AtomicU64::new(1), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (agent, done, over, ciphertext, broken) = (&agent, &done, &over, &ciphertext, &broken);
            scope.spawn(move || {
                let mut wire = agent.connect();
                let encrypt = use_frame(Opcode::Encrypt, 1, K, NO_CONTEXT, b"x");
                let decrypt = use_frame(Opcode::Decrypt, 1, K, NO_CONTEXT, ciphertext);
                let fails = use_frame(Opcode::Decrypt, 1, K, NO_CONTEXT, broken);
                let rewrap = use_frame(Opcode::Rewrap, 1, K, NO_CONTEXT, ciphertext);
                let items = [encrypt, decrypt, fails, rewrap.clone()];
                let mut refused = 0;
                for round in 0.. {
                    let replies = if round % 2 == n % 2 {
                        wire.batch(&[items.to_vec(), items.to_vec()].concat()).unwrap()
                    } else {
                        items.iter().map(|item| wire.ask(item)).collect()
                    };
                    for (reply, item) in replies.iter().zip(items.iter().cycle()) {
                        let times = if *item == rewrap { 2 } else { 1 };
                        match reply.status {
                            Status::Ok | Status::InvalidCiphertext => {
                                done.fetch_add(times, Ordering::Relaxed);
                            }
                            Status::Limit => refused += 1,
                            status => panic!("{status:?}"),
                        }
                    }
                    if round % 50 == 7 && n == 0 {
                        wire.rotate("k").unwrap();
                    }
                    if refused > 40 {
                        over.store(true, Ordering::Relaxed);
                        break;
                    }
                }
            });
        }
    });
    assert!(over.load(Ordering::Relaxed));
    assert_eq!(done.load(Ordering::Relaxed), USES, "not one more and not one less");
    let described = wire.described("k", 0).unwrap();
    assert_eq!(described.key.uses, USES);
    assert!(described.key.versions > 1);
    assert_eq!(described.versions.iter().map(|version| version.uses).sum::<u64>(), USES);
    assert_eq!(wire.value("key-uses"), USES);
    // A rotation does not begin the count anew, nor does another name, nor a lock.
    wire.rotate("k").unwrap();
    wire.rename("k", "l").unwrap();
    assert_eq!(wire.encrypt("l", NO_CONTEXT, b"x"), Err(Status::Limit));
    wire.lock(b"p").unwrap();
    wire.unlock(b"p").unwrap();
    assert_eq!(wire.encrypt("l", NO_CONTEXT, b"x"), Err(Status::Limit));
    assert_eq!(wire.decrypt("l", NO_CONTEXT, &ciphertext), Err(Status::Limit));
    assert_eq!(wire.uses("l"), USES);
}

#[test]
fn a_use_that_is_refused_for_another_reason_leaves_the_last_one() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.add("k", None, &[(constraint::MAX_USES, 3), (constraint::EXPORTABLE, 0)]).unwrap();
    wire.generate("other").unwrap();
    let foreign = wire.encrypt("other", NO_CONTEXT, b"x").unwrap();
    let own = wire.encrypt("k", NO_CONTEXT, b"x").unwrap();
    for _ in 0..10 {
        assert_eq!(wire.decrypt("k", NO_CONTEXT, &foreign), Err(Status::WrongKey));
        assert_eq!(wire.decrypt("k", NO_CONTEXT, &own[..20]), Err(Status::Malformed));
        assert_eq!(wire.encrypt("k", &[], b"x"), Err(Status::Malformed));
        assert_eq!(wire.export("k", 9, &[]).map(|_| ()), Err(Status::NotFound));
        assert_eq!(
            wire.rewrap("k", NO_CONTEXT, Some(KeyRef::Name("none")), &own).map(|_| ()),
            Err(Status::NotFound)
        );
    }
    assert_eq!(wire.uses("k"), 1);
    assert_eq!(wire.decrypt("k", NO_CONTEXT, &own[..own.len() - 1]), Err(Status::InvalidCiphertext));
    assert_eq!(wire.export("k", 0, &[]).unwrap().0.version, 1);
    assert_eq!(wire.uses("k"), 3);
    assert_eq!(wire.export("k", 0, &[]).map(|_| ()), Err(Status::Limit));
    assert_eq!(wire.decrypt("k", NO_CONTEXT, &own), Err(Status::Limit));
}
