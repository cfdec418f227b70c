//! What changes keys and what they are for: rotation, names, tokens, export, tags, data keys, bindings and counters.

use std::collections::HashMap;

use kms_envelope::{EncryptionContext, ExpandKey, Header, KeyId, KeyVersion, Purpose, make_tag};
use kms_protocol::{
    Add, Constraint, KeyRef, Material, NoFields, Opcode, Remove, RemoveAll, Rename, Rotate, Status,
    constraint,
};
use kms_tests::{
    Agent, Wire,
    process::wait_until,
    wire::{NO_CONTEXT, Operations, frame, random, use_frame},
};
use sha2::{Digest, Sha512};

use crate::desk::Desk;

const K: KeyRef<'_> = KeyRef::Name("k");
const EXPORTABLE: (u32, u64) = (constraint::EXPORTABLE, 0);

fn version_of(ciphertext: &[u8]) -> u32 {
    u32::from_be_bytes(ciphertext[24..28].try_into().unwrap())
}

#[test]
fn a_rotated_key_opens_what_is_old_and_seals_under_what_is_new() {
    const VERSIONS: u32 = 600;
    let agent = Agent::start();
    let mut wire = agent.connect();
    let added = wire.add("k", None, &[EXPORTABLE]).unwrap();
    let mut made = Vec::new();
    let mut check_values = vec![added.check_value];
    for version in 1..=VERSIONS {
        made.push(wire.encrypt("k", NO_CONTEXT, &version.to_le_bytes()).unwrap());
        assert_eq!(version_of(&made[version as usize - 1]), version);
        if version < VERSIONS {
            let rotated = wire.rotate("k").unwrap();
            assert_eq!((rotated.id, rotated.version), (added.id, version + 1));
            check_values.push(rotated.check_value);
        }
    }
    let tag = wire.put_to_work(Opcode::Mac, K, NO_CONTEXT, &[1; 64]).unwrap();
    assert_eq!(version_of(&tag), VERSIONS);
    assert_eq!(version_of(&wire.remote_new("k").unwrap().1), VERSIONS);
    for (version, ciphertext) in (1..).zip(&made) {
        assert_eq!(wire.decrypt("k", NO_CONTEXT, ciphertext).unwrap(), u32::to_le_bytes(version));
    }
    let mut unique = check_values.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), VERSIONS as usize, "each version has bytes of its own");

    let (mut after, mut rows) = (0, Vec::new());
    loop {
        let page = wire.described("k", after).unwrap();
        assert_eq!((page.key.primary, page.key.versions, page.key.minimum), (VERSIONS, VERSIONS, 1));
        assert_eq!(page.key.check_value, *check_values.last().unwrap());
        assert!(page.versions.len() == 256 || !page.more);
        after = page.versions.last().unwrap().version;
        rows.extend(page.versions);
        if !page.more {
            break;
        }
    }
    assert_eq!(rows.iter().map(|row| row.version).collect::<Vec<_>>(), (1..=VERSIONS).collect::<Vec<_>>());
    assert_eq!(rows.iter().map(|row| row.check_value).collect::<Vec<_>>(), check_values);
    // Sealed and opened once each; the last made a tag and began a stream besides.
    assert!(rows[..rows.len() - 1].iter().all(|row| row.uses == 2));
    assert_eq!(rows.last().unwrap().uses, 4);
    assert!(rows.iter().all(|row| row.created >= rows[0].created));
    for (after, count, more) in
        [(255, 256, true), (344, 256, false), (599, 1, false), (600, 0, false), (u32::MAX, 0, false)]
    {
        let page = wire.described("k", after).unwrap();
        assert_eq!((page.versions.len(), page.more), (count, more), "after {after}");
    }
    // The bytes of each are those that its check value tells.
    for version in [1, 2, 300, VERSIONS] {
        let (exported, bytes) = wire.export("k", version, &[]).unwrap();
        assert_eq!((exported.id, exported.version), (added.id, version));
        let key = ExpandKey::new(bytes.as_slice().try_into().unwrap());
        assert_eq!(key.check_value(), check_values[version as usize - 1]);
    }
    assert_eq!(wire.export("k", 0, &[]).unwrap().0.version, VERSIONS);
    assert_eq!(wire.value("versions"), u64::from(VERSIONS));
    // All of it through a lock.
    let before = wire.described("k", 0).unwrap();
    wire.lock(b"p").unwrap();
    wire.unlock(b"p").unwrap();
    assert_eq!(wire.described("k", 0).unwrap(), before);
    for version in [1, 2, 299, VERSIONS] {
        let plaintext = wire.decrypt("k", NO_CONTEXT, &made[version as usize - 1]).unwrap();
        assert_eq!(plaintext, version.to_le_bytes());
    }
    assert_eq!(wire.rotate("k").unwrap().version, VERSIONS + 1, "numbers go on");
    wire.remove("k").unwrap();
    assert_eq!(wire.value("versions"), 0);
}

#[test]
fn a_renamed_key_keeps_its_id_and_what_was_made_under_it() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let id = wire.generate("k").unwrap().id;
    let ciphertext = wire.encrypt("k", NO_CONTEXT, b"x").unwrap();
    let mut other = agent.connect();
    for wire in [&mut wire, &mut other] {
        wire.bind(1, K).unwrap();
    }
    assert_eq!(wire.rename("k", "l").unwrap().id, id);
    assert_eq!(wire.decrypt("k", NO_CONTEXT, &ciphertext), Err(Status::NotFound));
    assert_eq!(wire.decrypt("l", NO_CONTEXT, &ciphertext).unwrap(), b"x");
    // The old name is free, and what takes it is another key.
    assert_ne!(wire.generate("k").unwrap().id, id);
    assert_eq!(wire.rename("l", "k").map(|_| ()), Err(Status::Exists));
    for wire in [&mut wire, &mut other] {
        let opened = wire.put_to_work(Opcode::Decrypt, KeyRef::Bound(1), NO_CONTEXT, &ciphertext);
        assert_eq!(opened.unwrap(), b"x");
    }
    let verified = wire.verify("l", NO_CONTEXT, &ciphertext).unwrap();
    assert_eq!((verified.id, verified.name.as_str()), (id, "l"));
    let longest = "x".repeat(255);
    wire.rename("l", &longest).unwrap();
    assert_eq!(wire.rename(&longest, &"x".repeat(256)).map(|_| ()), Err(Status::Malformed));
    assert_eq!(wire.decrypt(&longest, NO_CONTEXT, &ciphertext).unwrap(), b"x");
    let mut names: Vec<_> = wire.list().unwrap().into_iter().map(|row| row.name).collect();
    names.sort();
    assert_eq!(names, ["k".to_owned(), longest]);
    assert_eq!(wire.remove_all(), Ok(2));
    assert_eq!(wire.remove_all(), Ok(0));
    assert_eq!(wire.list().unwrap().len(), 0);
    assert_eq!(wire.put_to_work(Opcode::Encrypt, KeyRef::Bound(1), NO_CONTEXT, b"x"), Err(Status::NotFound));
}

fn add_k(token: [u8; 16]) -> Vec<u8> {
    let (material, constraints) = (Material::Generate, Vec::new());
    frame(Opcode::Add, 1, &Add { token, name: "k", material, if_missing: false, constraints }, &[])
}

/// One request of each opcode that carries a token, for the key `k`.
fn requests_with(token: [u8; 16]) -> [(Opcode, Vec<u8>); 5] {
    [
        (Opcode::Add, add_k(token)),
        (Opcode::Rotate, frame(Opcode::Rotate, 1, &Rotate { token, key: K }, &[])),
        (Opcode::Rename, frame(Opcode::Rename, 1, &Rename { token, key: K, name: "l" }, &[])),
        (Opcode::Remove, frame(Opcode::Remove, 1, &Remove { token, key: K }, &[])),
        (Opcode::RemoveAll, frame(Opcode::RemoveAll, 1, &RemoveAll { token }, &[])),
    ]
}

#[test]
fn a_repeat_gets_the_first_result_of_each_opcode_and_nothing_is_done_twice() {
    let state = |wire: &mut Wire| {
        let mut rows = wire.list().unwrap();
        rows.sort_by_key(|row| row.id);
        rows
    };
    for place in 0..5 {
        let agent = Agent::start();
        let mut wire = agent.connect();
        let token = random();
        let (opcode, request) = &requests_with(token)[place];
        if *opcode != Opcode::Add {
            wire.ask(&add_k(random())).ok().unwrap();
        }
        let first = wire.ask(request).ok().unwrap();
        let after = state(&mut wire);
        // Over other connections, with another request id, and whatever the rest of the request says.
        for (other, again) in requests_with(token) {
            let mut wire = agent.connect();
            let reply = wire.ask(&again);
            if other == *opcode {
                assert_eq!((reply.status, &reply.fields), (Status::Ok, &first.fields), "{}", opcode.name());
            } else {
                assert_eq!(reply.status, Status::Malformed, "{} of {}", other.name(), opcode.name());
            }
        }
        let elsewhere = match opcode {
            Opcode::Rotate => frame(*opcode, 9, &Rotate { token, key: KeyRef::Name("-nobody") }, &[]),
            Opcode::Rename => frame(*opcode, 9, &Rename { token, key: KeyRef::Bound(4), name: "" }, &[]),
            Opcode::Remove => frame(*opcode, 9, &Remove { token, key: KeyRef::Bound(4) }, &[]),
            Opcode::RemoveAll => request.clone(),
            _ => {
                let constraints = vec![Constraint { kind: 99, value: 0 }];
                let fields =
                    Add { token, name: "", material: Material::Import, if_missing: true, constraints };
                frame(*opcode, 9, &fields, b"no key")
            }
        };
        assert_eq!(
            wire.ask(&elsewhere).fields,
            first.fields,
            "{}: no other field is looked at",
            opcode.name()
        );
        assert_eq!(state(&mut wire), after, "{}: it was done once", opcode.name());
        // Judged like any other while locked, and the token is still there afterwards.
        wire.lock(b"p").unwrap();
        assert_eq!(wire.ask(request).status, Status::Locked);
        wire.unlock(b"p").unwrap();
        assert_eq!(wire.ask(request).fields, first.fields);
        assert_eq!(state(&mut wire), after);
    }
}

#[test]
fn a_refusal_leaves_no_token_and_the_latest_4096_are_kept() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    for (opcode, request) in requests_with(random()) {
        if opcode != Opcode::Add && opcode != Opcode::RemoveAll {
            assert_eq!(wire.ask(&request).status, Status::NotFound, "{}", opcode.name());
        }
    }
    let token = random();
    for (opcode, request) in requests_with(token) {
        if opcode != Opcode::Add && opcode != Opcode::RemoveAll {
            assert_eq!(wire.ask(&request).status, Status::NotFound, "{}", opcode.name());
        }
    }
    wire.ask(&add_k(token)).ok().unwrap();
    assert_eq!(wire.ask(&requests_with(token)[1].1).status, Status::Malformed, "now it is taken");
    // 4,095 others later it is known, and another one later it is not.
    let rename = |token| frame(Opcode::Rename, 1, &Rename { token, key: K, name: "k" }, &[]);
    for _ in 0..4095 {
        wire.ask(&rename(random())).ok().unwrap();
    }
    wire.ask(&add_k(token)).ok().unwrap();
    wire.ask(&rename(random())).ok().unwrap();
    assert_eq!(wire.ask(&add_k(token)).status, Status::Exists);
}

#[test]
fn an_export_gives_the_bytes_that_were_imported_and_asks_for_the_passphrase_of_the_last_lock() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let canary = random::<32>();
    let id = wire.add("k", Some(&canary), &[EXPORTABLE]).unwrap().id;
    wire.add("kept", Some(&canary), &[]).unwrap();
    assert_eq!(wire.fact("lock-passphrase"), "none");
    for version in [0, 1] {
        let (exported, bytes) = wire.export("k", version, &[]).unwrap();
        assert_eq!((exported.id, exported.version, bytes.as_slice()), (id, 1, &canary[..]));
    }
    assert_eq!(wire.export("kept", 0, &[]).map(|_| ()), Err(Status::Denied));
    assert_eq!(wire.export("kept", 9, &[]).map(|_| ()), Err(Status::Denied), "before the version");
    assert_eq!(wire.export("k", 0, b"p").map(|_| ()), Err(Status::Malformed));
    assert_eq!(wire.uses("k"), 2);

    for passphrase in [&b"first"[..], b"second"] {
        wire.lock(passphrase).unwrap();
        assert_eq!(wire.lock(b"third, which changes nothing"), Ok(false));
        assert_eq!(wire.export("k", 0, passphrase).map(|_| ()), Err(Status::Locked));
        assert_eq!(wire.fact("lock-passphrase"), "set");
        wire.unlock(passphrase).unwrap();
        assert_eq!(wire.fact("lock-passphrase"), "set");
    }
    assert_eq!(wire.export("k", 0, b"second").unwrap().1, canary);
    assert_eq!(wire.export("k", 1, b"second").unwrap().1, canary);
    // None is no attempt, and leads to no back-off; nor does a key that may not go out, or is not there.
    assert_eq!(wire.export("k", 0, &[]).map(|_| ()), Err(Status::Denied));
    assert_eq!(wire.export("nobody", 0, &[]).map(|_| ()), Err(Status::Denied));
    assert_eq!(wire.export("nobody", 0, b"second").map(|_| ()), Err(Status::NotFound));
    assert_eq!(wire.export("kept", 0, b"wrong").map(|_| ()), Err(Status::Denied));
    assert_eq!(wire.export("k", 0, b"second").unwrap().1, canary);
    assert_eq!(wire.uses("k"), 5);
    // A wrong one does, for unlock and export together.
    for wrong in [&b"first"[..], b"third, which changes nothing"] {
        assert_eq!(wire.export("k", 0, wrong).map(|_| ()), Err(Status::Denied));
        let export = frame(Opcode::Export, 1, &kms_protocol::Export { key: K, version: 0 }, b"second");
        let busy = wire.ask(&export);
        assert_eq!(busy.status, Status::Busy);
        assert!((1..=200).contains(&busy.retry_after_ms()), "{}", busy.retry_after_ms());
        assert_eq!(wire.export("k", 0, &[]).map(|_| ()), Err(Status::Denied), "that is told at once");
        wait_until("the back-off passes", || wire.export("k", 0, b"second").is_ok());
    }
    // Everything goes on meanwhile, and the key is judged anew when the passphrase has been worked on.
    let mut other = agent.connect();
    let export = frame(Opcode::Export, 9, &kms_protocol::Export { key: K, version: 0 }, b"second");
    let requests = |wire: &mut Wire| wire.fact("requests").parse::<u64>().unwrap();
    let mut last = requests(&mut other);
    wire.send(&export).unwrap();
    wait_until("the export is worked on", || {
        let before = std::mem::replace(&mut last, requests(&mut other));
        last > before + 1
    });
    other.remove("k").unwrap();
    assert_eq!(wire.receive().unwrap().status, Status::NotFound);
}

#[test]
fn a_tag_is_that_of_the_formats_and_of_one_input_in_one_context() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let secret = random::<32>();
    let id = wire.import("k", &secret).unwrap().id;
    wire.generate("other").unwrap();
    let context = EncryptionContext::from_pairs([("table", "t")]).unwrap();
    let bytes = context.as_ref().as_bytes();
    let digest = Sha512::digest(b"an input of any length").to_vec();
    let tag = wire.put_to_work(Opcode::Mac, K, bytes, &digest).unwrap();
    let header =
        Header { purpose: Purpose::Tag, key_id: KeyId::from_bytes(id), key_version: KeyVersion::FIRST };
    let digest_bytes = digest.as_slice().try_into().unwrap();
    let own = make_tag(&ExpandKey::new(&secret), &header, context.as_ref(), digest_bytes).unwrap();
    assert_eq!(tag, own);
    assert_eq!(wire.put_to_work(Opcode::Mac, K, bytes, &digest).unwrap(), tag, "always the same");
    wire.rotate("k").unwrap();
    let newer = wire.put_to_work(Opcode::Mac, K, bytes, &digest).unwrap();
    assert_eq!(version_of(&newer), 2);
    for tag in [&tag, &newer] {
        let mut check = |key: &str, context: &[u8], payload: &[u8]| {
            wire.put_to_work(Opcode::MacVerify, KeyRef::Name(key), context, payload)
                .map(|payload| payload.len())
        };
        let payload = [&tag[..], &digest].concat();
        assert_eq!(check("k", bytes, &payload), Ok(0));
        assert_eq!(check("other", bytes, &payload), Err(Status::WrongKey));
        assert_eq!(check("k", NO_CONTEXT, &payload), Err(Status::InvalidCiphertext));
        for at in 28..payload.len() {
            let mut changed = payload.clone();
            changed[at] ^= 0x10;
            assert_eq!(check("k", bytes, &changed), Err(Status::InvalidCiphertext), "byte {at}");
        }
    }
    // The tag of one version under the number of the other.
    let crossed = [&newer[..28], &tag[28..], &digest].concat();
    assert_eq!(wire.put_to_work(Opcode::MacVerify, K, bytes, &crossed), Err(Status::InvalidCiphertext));
}

#[test]
fn what_is_rewrapped_opens_under_its_new_key_and_version_and_verify_tells_which() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let id = wire.generate("k").unwrap().id;
    let to_id = wire.generate("to").unwrap().id;
    wire.rotate("to").unwrap();
    let context = crate::operations::many_pairs(2, 5);
    let plaintext = random::<48>();
    let message = wire.encrypt("k", &context, &plaintext).unwrap();
    let wrapped = wire.put_to_work(Opcode::Wrap, K, &context, &plaintext).unwrap();
    let stream = wire.put_to_work(Opcode::StreamNew, K, &context, &[]).unwrap();
    let (head, key) = stream.split_at(188);
    let empty = wire.encrypt("k", &context, &[]).unwrap();
    let longest = wire.encrypt("k", &context, &[9; 65_536]).unwrap();

    for (what, opens, ciphertext, rewrap_context, plaintext) in [
        ("a message", Opcode::Decrypt, &message[..], &context[..], &plaintext[..]),
        ("an empty message", Opcode::Decrypt, &empty, &context, &[]),
        ("the longest message", Opcode::Decrypt, &longest, &context, &[9; 65_536]),
        ("a wrapped key", Opcode::Unwrap, &wrapped, &context, &plaintext),
        ("a stream", Opcode::StreamOpen, head, NO_CONTEXT, key),
    ] {
        let part = if opens == Opcode::StreamOpen { &ciphertext[..132] } else { ciphertext };
        let rest = &ciphertext[part.len()..];
        let verified = wire.verify("k", &context, ciphertext).unwrap();
        let primary = wire.described("k", 0).unwrap().key.primary;
        assert_eq!(
            (verified.id, verified.name.as_str(), verified.version, verified.primary),
            (id, "k", 1, primary)
        );
        if primary == 1 {
            let (same, payload) = wire.rewrap("k", rewrap_context, None, part).unwrap();
            assert_eq!((same.changed, same.id, same.version, payload.len()), (false, id, 1, 0), "{what}");
            // It is opened all the same.
            let mut broken = part.to_vec();
            *broken.last_mut().unwrap() ^= 1;
            let refused = wire.rewrap("k", rewrap_context, None, &broken).map(|_| ());
            assert_eq!(refused, Err(Status::InvalidCiphertext), "{what}");
            wire.rotate("k").unwrap();
        }
        let (newer, payload) = wire.rewrap("k", rewrap_context, None, part).unwrap();
        assert_eq!((newer.changed, newer.id, newer.version), (true, id, 2), "{what}");
        assert_eq!((payload.len(), version_of(&payload)), (part.len(), 2));
        let newer = [&payload, rest].concat();
        let (moved, payload) = wire.rewrap("k", rewrap_context, Some(KeyRef::Id(to_id)), part).unwrap();
        assert_eq!((moved.changed, moved.id, moved.version), (true, to_id, 2), "{what}");
        let moved = [&payload, rest].concat();
        for (name, ciphertext) in [("k", ciphertext), ("k", &newer), ("to", &moved)] {
            let opened = wire.put_to_work(opens, KeyRef::Name(name), &context, ciphertext).unwrap();
            assert_eq!(opened, plaintext, "{what} under {name}");
            let other = if name == "k" { "to" } else { "k" };
            let refused = wire.put_to_work(opens, KeyRef::Name(other), &context, ciphertext);
            assert_eq!(refused, Err(Status::WrongKey));
        }
        let verified = wire.verify("to", &context, &moved).unwrap();
        assert_eq!(
            (verified.id, verified.name.as_str(), verified.version, verified.primary),
            (to_id, "to", 2, 2)
        );
        assert_eq!(wire.verify("k", &context, &newer).unwrap().version, 2);
        assert_eq!(wire.verify("k", NO_CONTEXT, &newer).map(|_| ()), Err(Status::InvalidCiphertext));
        // Another context: a stream has none to check, and another than none is a fault.
        let other = if opens == Opcode::StreamOpen { &context[..] } else { NO_CONTEXT };
        let status = if opens == Opcode::StreamOpen { Status::Malformed } else { Status::InvalidCiphertext };
        for to in [None, Some(KeyRef::Name("to"))] {
            assert_eq!(wire.rewrap("k", other, to, part).map(|_| ()), Err(status), "{what}");
        }
    }
    for len in [28, 131, 133, 188, 5000] {
        let stream = [head, &[0; 5000]].concat();
        let refused = wire.rewrap("k", NO_CONTEXT, None, &stream[..len]).map(|_| ());
        assert_eq!(refused, Err(Status::InvalidCiphertext), "{len}");
    }
    // Made anew with a salt of its own each time.
    let twice = [(); 2].map(|()| wire.rewrap("k", &context, None, &message).unwrap().1);
    assert_ne!(twice[0], twice[1]);
}

#[test]
fn a_data_key_is_what_unwrap_gives_back_and_random_bytes_are_as_many_as_asked_for() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("k").unwrap();
    let context = crate::operations::many_pairs(1, 5);
    let mut seen = std::collections::HashSet::new();
    for length in [1, 16, 32, 64, 1_023, 1_024] {
        let (plain, wrapped) = wire.data_key("k", &context, length).unwrap();
        assert_eq!(plain.len(), length as usize);
        assert_eq!(wrapped.len(), kms_envelope::message_len(plain.len()));
        assert_eq!(wire.put_to_work(Opcode::Unwrap, K, &context, &wrapped).unwrap(), plain);
        assert_eq!(wire.put_to_work(Opcode::Unwrap, K, NO_CONTEXT, &wrapped), Err(Status::InvalidCiphertext));
        let fields = kms_protocol::NewDataKey { key: K, context: &context, length };
        let unseen = wire.call(Opcode::DataKeyWrapped, &fields, &[]).unwrap().payload;
        assert_eq!(unseen.len(), wrapped.len(), "the wrapped key alone");
        let unseen = wire.put_to_work(Opcode::Unwrap, K, &context, &unseen).unwrap();
        assert_eq!(unseen.len(), plain.len());
        if length >= 16 {
            assert!(seen.insert(plain) && seen.insert(unseen));
        }
    }
    for length in [1, 2, 31, 32, 33, 4_096, 65_535, 65_536] {
        let bytes = wire.random_bytes(length).unwrap();
        assert_eq!(bytes.len(), length as usize);
        if length >= 16 {
            assert!(seen.insert(bytes));
        }
    }
}

#[test]
fn a_connection_binds_1024_numbers_and_each_means_its_key() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let ids = ["a", "b"].map(|name| wire.generate(name).unwrap().id);
    let numbers: Vec<u32> = (0..1023).map(|n| n * 4_194_301).chain([u32::MAX]).collect();
    for (n, number) in numbers.iter().enumerate() {
        assert_eq!(wire.bind(*number, KeyRef::Name(["a", "b"][n % 2])).unwrap(), ids[n % 2]);
    }
    assert_eq!(wire.bind(5, KeyRef::Name("a")), Err(Status::Limit));
    assert_eq!(wire.bind(5, KeyRef::Name("none")), Err(Status::NotFound), "the better reason");
    let means = |wire: &mut Wire, number| {
        let payload = wire.put_to_work(Opcode::Encrypt, KeyRef::Bound(number), NO_CONTEXT, b"x")?;
        Ok(<[u8; 16]>::try_from(&payload[8..24]).unwrap())
    };
    for (n, number) in numbers.iter().enumerate() {
        assert_eq!(means(&mut wire, *number), Ok(ids[n % 2]));
    }
    assert_eq!(means(&mut wire, 5), Err(Status::NotFound));
    // A number that is bound stands for another key from now on, also through itself or another number.
    assert_eq!(wire.bind(u32::MAX, KeyRef::Bound(0)).unwrap(), ids[0]);
    assert_eq!(means(&mut wire, u32::MAX), Ok(ids[0]));
    assert_eq!(wire.bind(0, KeyRef::Bound(numbers[1])).unwrap(), ids[1]);
    assert_eq!(means(&mut wire, u32::MAX), Ok(ids[0]), "the key, not the number");
    assert_eq!(wire.bind(0, KeyRef::Bound(0)).unwrap(), ids[1]);
    // A bind that is refused leaves the number as it was.
    assert_eq!(wire.bind(0, KeyRef::Name("none")), Err(Status::NotFound));
    assert_eq!(wire.bind(0, KeyRef::Name("-")), Err(Status::Malformed));
    assert_eq!(means(&mut wire, 0), Ok(ids[1]));
    // It belongs to its connection.
    assert_eq!(means(&mut agent.connect(), 0), Err(Status::NotFound));
    // It survives a rotation, another name and a lock; and ends in not-found when the key is gone, whoever has its name.
    wire.rotate("b").unwrap();
    wire.rename("b", "c").unwrap();
    wire.lock(b"p").unwrap();
    assert_eq!(means(&mut wire, 0), Err(Status::Locked));
    wire.unlock(b"p").unwrap();
    let payload = wire.put_to_work(Opcode::Encrypt, KeyRef::Bound(0), NO_CONTEXT, b"x").unwrap();
    assert_eq!((&payload[8..24], version_of(&payload)), (&ids[1][..], 2));
    agent.connect().remove("c").unwrap();
    for name in ["b", "c"] {
        wire.generate(name).unwrap();
    }
    assert_eq!(means(&mut wire, 0), Err(Status::NotFound));
    assert_eq!(means(&mut wire, u32::MAX), Ok(ids[0]));
    assert_eq!(wire.bind(0, KeyRef::Name("b")).map(|_| ()), Ok(()), "and can be bound again");
    // By whatever names a key, in whatever asks for one.
    let fields = kms_protocol::Describe { key: KeyRef::Bound(0), versions_after: 0 };
    wire.call(Opcode::Describe, &fields, &[]).unwrap();
    wire.call(Opcode::Rotate, &Rotate { token: random(), key: KeyRef::Bound(0) }, &[]).unwrap();
    wire.call(Opcode::Rename, &Rename { token: random(), key: KeyRef::Bound(0), name: "z" }, &[]).unwrap();
    wire.call(Opcode::Remove, &Remove { token: random(), key: KeyRef::Bound(0) }, &[]).unwrap();
    assert_eq!(wire.described("z", 0).map(|_| ()), Err(Status::NotFound));
}

#[test]
fn stats_count_what_was_asked_and_how_it_ended() {
    let mut desk = Desk::new(std::time::Duration::from_secs(50), kms_agent::config::Limits::default());
    let look = |desk: &mut Desk| {
        let reply = desk.ask(&frame(Opcode::Stats, 1, &NoFields {}, &[]));
        let stats: kms_protocol::StatsReply = reply.decode();
        let told = stats.operations.iter().map(|count| ((count.opcode, count.status), count.count));
        let values = stats.values.iter().map(|value| (value.name.clone(), value.value));
        (
            told.collect::<HashMap<_, _>>(),
            values.collect::<HashMap<_, _>>(),
            stats.uptime_ms,
            reply.bytes.len(),
        )
    };
    let (mut expected, values, _, len) = look(&mut desk);
    assert_eq!(expected[&(Opcode::Hello.code(), 0)], 2);
    // A look counts what was answered before it.
    expected.insert((Opcode::Stats.code(), 0), 1);
    let (mut bytes_in, mut bytes_out) = (values["bytes-in"] + 16, values["bytes-out"] + len as u64);
    let mut count = |desk: &mut Desk, request: &[u8]| {
        let reply = desk.ask(request);
        bytes_in += request.len() as u64;
        let opcode = u16::from_le_bytes([request[6], request[7]]);
        let known = if Opcode::from_code(opcode).is_some() { opcode } else { 0 };
        *expected.entry((known, reply.status.code())).or_default() += 1;
        bytes_out += reply.bytes.len() as u64;
        reply
    };
    count(&mut desk, &add_k(random()));
    count(&mut desk, &add_k(random()));
    let sealed = count(&mut desk, &use_frame(Opcode::Encrypt, 1, K, NO_CONTEXT, b"x")).payload;
    let decrypt = use_frame(Opcode::Decrypt, 1, K, NO_CONTEXT, &sealed);
    count(&mut desk, &decrypt);
    count(&mut desk, &use_frame(Opcode::Rewrap, 1, K, NO_CONTEXT, &sealed));
    let mut broken = decrypt.clone();
    *broken.last_mut().unwrap() ^= 1;
    count(&mut desk, &broken);
    let mut unknown = frame(Opcode::Ping, 1, &NoFields {}, &[]);
    unknown[6] = 0x51;
    count(&mut desk, &unknown);
    let batch = frame(Opcode::Batch, 1, &NoFields {}, &[&decrypt[..], &broken, &unknown, &decrypt].concat());
    count(&mut desk, &batch);
    for passphrase in [&b"p"[..], b""] {
        count(&mut desk, &frame(Opcode::Lock, 1, &NoFields {}, passphrase));
    }
    count(&mut desk, &decrypt);
    count(&mut desk, &frame(Opcode::Unlock, 1, &NoFields {}, b"wrong"));
    count(&mut desk, &frame(Opcode::Unlock, 1, &NoFields {}, b"p"));
    desk.clock += std::time::Duration::from_secs(1);
    count(&mut desk, &frame(Opcode::Unlock, 1, &NoFields {}, b"p"));
    // The items of the batch.
    *expected.entry((Opcode::Decrypt.code(), 0)).or_default() += 2;
    *expected.entry((Opcode::Decrypt.code(), Status::InvalidCiphertext.code())).or_default() += 1;
    *expected.entry((0, Status::Unsupported.code())).or_default() += 1;

    let (told, values, uptime_ms, _) = look(&mut desk);
    assert_eq!(told, expected);
    assert_eq!(uptime_ms, 1_000);
    // One of encrypt, two of rewrap, and each decrypt that got as far as the key.
    assert_eq!((values["keys"], values["versions"], values["key-uses"]), (1, 1, 1 + 2 + 2 + 3));
    assert_eq!(values["bytes-in"], bytes_in, "every frame that was taken up");
    assert_eq!(values["bytes-out"], bytes_out, "every frame that was answered");
    assert_eq!(values["panics"], 0);
    // What `status` says of requests: each frame, this one included, whatever stood in it.
    let requests = |desk: &mut Desk| {
        let status: kms_protocol::StatusReply =
            desk.call(Opcode::Status, &NoFields {}, &[]).unwrap().decode();
        status.facts.into_iter().find(|fact| fact.name == "requests").unwrap().value.parse::<u64>().unwrap()
    };
    let before = requests(&mut desk);
    desk.ask(&batch);
    assert_eq!(requests(&mut desk), before + 2, "a batch is one request");
}
