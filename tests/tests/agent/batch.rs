//! Many requests in one frame (`docs/protocol.md`, section 4.34).

use kms_envelope::message_len;
use kms_protocol::{
    FRAME_MAX, Hello, KeyRef, NewDataKey, NoFields, Opcode, Random, Rotate, Status, constraint,
};
use kms_tests::{
    Agent,
    wire::{NO_CONTEXT, Operations, frame, random, split_replies, use_frame},
};

const K: KeyRef<'_> = KeyRef::Name("k");

fn encrypt(request_id: u32, key: KeyRef<'_>, plaintext: &[u8]) -> Vec<u8> {
    use_frame(Opcode::Encrypt, request_id, key, NO_CONTEXT, plaintext)
}

#[test]
fn a_thousand_items_with_a_bad_one_give_999_results_in_order_and_one_error() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("k").unwrap();
    for (bad, item, status) in [
        (0, encrypt(5, KeyRef::Name("nobody"), b"x"), Status::NotFound),
        (500, use_frame(Opcode::Decrypt, 5, K, NO_CONTEXT, &[0; 99]), Status::Malformed),
        (999, frame(Opcode::Encrypt, 5, &NoFields {}, b"no fields"), Status::Malformed),
    ] {
        let mut items: Vec<_> = (0..1000u32).map(|n| encrypt(n, K, &n.to_le_bytes())).collect();
        items[bad] = item;
        let before = wire.uses("k");
        let replies = wire.batch(&items).unwrap();
        assert_eq!(wire.uses("k") - before, 999);
        assert_eq!(replies.len(), 1000);
        let mut opens = Vec::new();
        for (n, reply) in replies.into_iter().enumerate() {
            if n == bad {
                assert_eq!((reply.status, reply.request_id), (status, 5));
                assert!(reply.payload.is_empty());
                assert_eq!(reply.retry_after_ms(), 0);
            } else {
                assert_eq!(reply.request_id as usize, n);
                opens.push((n, use_frame(Opcode::Decrypt, 0, K, NO_CONTEXT, &reply.ok().unwrap().payload)));
            }
        }
        // All of them with the same request id, which means nothing to the agent.
        let frames: Vec<_> = opens.iter().map(|(_, frame)| frame.clone()).collect();
        for ((n, _), reply) in opens.iter().zip(wire.batch(&frames).unwrap()) {
            assert_eq!(reply.ok().unwrap().payload, u32::try_from(*n).unwrap().to_le_bytes());
        }
    }
    wire.ping().unwrap();
}

#[test]
fn a_batch_has_1_to_4096_items_and_each_is_a_whole_frame() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.add("k", None, &[(constraint::MAX_USES, 10)]).unwrap();
    let random = frame(Opcode::Random, 1, &Random { length: 1 }, &[]);
    let replies = wire.batch(&vec![random.clone(); 4096]).unwrap();
    assert!(replies.len() == 4096 && replies.iter().all(|reply| reply.payload.len() == 1));
    // The least that an item can be, as many as fit: far more than 4,096.
    for count in [4097, 5000, FRAME_MAX / 16 - 1] {
        let ping = frame(Opcode::Ping, 1, &NoFields {}, &[]);
        assert_eq!(wire.batch(&vec![ping; count]).map(|_| ()), Err(Status::TooLarge), "{count}");
    }
    // What is wrong with one frame refuses all of them, and none is carried out.
    let good = encrypt(1, K, b"x");
    let head = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    for (what, last) in [
        ("cut by a byte", good[..good.len() - 1].to_vec()),
        ("a head alone", good[..16].to_vec()),
        ("half a head", good[..7].to_vec()),
        ("one byte", vec![0]),
        ("another version", head(4, 2)),
        ("a flag", head(5, 1)),
        ("4 GiB", head(3, 255)),
        ("fields beyond the length", head(14, 1)),
    ] {
        for items in
            [vec![last.clone()], vec![good.clone(), last.clone()], vec![good.clone(), last, good.clone()]]
        {
            assert_eq!(wire.batch(&items).map(|_| ()), Err(Status::Malformed), "{what}");
        }
    }
    assert_eq!(wire.batch(&[]).map(|_| ()), Err(Status::Malformed));
    assert_eq!(wire.uses("k"), 0, "none of them was carried out");
}

#[test]
fn what_may_not_stand_in_a_batch_is_refused_alone_and_does_nothing() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("k").unwrap();
    let inner = frame(Opcode::Batch, 1, &NoFields {}, &frame(Opcode::Random, 1, &Random { length: 1 }, &[]));
    let mut items = vec![
        frame(Opcode::Hello, 1, &Hello { version: 1 }, &[]),
        frame(Opcode::Hello, 1, &Hello { version: 9 }, &[]),
        frame(Opcode::Lock, 1, &NoFields {}, b"passphrase"),
        frame(Opcode::Rotate, 1, &Rotate { token: random(), key: K }, &[]),
        frame(Opcode::RemoveAll, 1, &kms_protocol::RemoveAll { token: random() }, &[]),
        frame(Opcode::Bind, 1, &kms_protocol::Bind { number: 1, key: K }, &[]),
        frame(Opcode::Export, 1, &kms_protocol::Export { key: K, version: 0 }, &[]),
        kms_tests::wire::add_frame(1, random(), "new", None),
        inner,
    ];
    for opcode in [Opcode::RemoteStreamNew, Opcode::RemoteStreamOpen, Opcode::Ping, Opcode::Stats] {
        items.push(use_frame(opcode, 1, K, NO_CONTEXT, &[]));
    }
    // Every number that is no opcode of this release, or one that may not stand here, good fields or not.
    for code in (0..=0x60).chain([0x100, u16::MAX]) {
        let opcode = Opcode::from_code(code);
        let stands = matches!(code, 0x20..=0x23 | 0x29..=0x30 | 0x33);
        if !stands {
            let mut item = frame(Opcode::Ping, 1, &NoFields {}, &[]);
            item[6..8].copy_from_slice(&code.to_le_bytes());
            items.push(item);
        }
        // The control: what stands is what the text lists.
        assert!(!stands || opcode.is_some());
    }
    let refused = items.len();
    items.push(encrypt(1, K, b"x"));
    let replies = wire.batch(&items).unwrap();
    for (reply, item) in replies.iter().zip(&items).take(refused) {
        assert_eq!(reply.status, Status::Unsupported, "{:?}", &item[..16]);
    }
    assert_eq!(replies[refused].status, Status::Ok);
    assert_eq!(wire.fact("keys"), "1");
    assert_eq!(wire.described("k", 0).unwrap().key.versions, 1);
    // A payload where none belongs, and fields that do not decode, cost only their own item.
    let replies = wire
        .batch(&[
            use_frame(Opcode::StreamNew, 1, K, NO_CONTEXT, b"x"),
            use_frame(Opcode::DataKey, 2, K, NO_CONTEXT, b"x"),
            frame(Opcode::Random, 3, &Random { length: 1 }, b"x"),
            frame(Opcode::Random, 4, &NoFields {}, &[]),
            encrypt(5, K, b"x"),
        ])
        .unwrap();
    let statuses: Vec<_> = replies.iter().map(|reply| reply.status).collect();
    assert_eq!(statuses, [[Status::Malformed; 4].as_slice(), &[Status::Ok]].concat());
}

#[test]
fn what_has_no_room_is_not_carried_out_and_the_refusals_behind_it_are_there() {
    for (config, frame_max) in [("", 1 << 20), ("[limits]\nframe = 131072\n", 131_072)] {
        let agent = Agent::builder().config(config).start();
        let mut wire = agent.connect();
        wire.generate("k").unwrap();
        // Replies that are larger than their requests, each as wide as it can be: data keys of 1,024 bytes.
        let data_key =
            frame(Opcode::DataKey, 1, &NewDataKey { key: K, context: NO_CONTEXT, length: 1024 }, &[]);
        let reply_len = 16 + 1024 + 1024 + 100;
        let small = frame(Opcode::Random, 2, &Random { length: 1 }, &[]);
        let count = 1000.min(frame_max * 4 / 5 / data_key.len());
        let mut items = vec![data_key; count];
        items.push(small);
        let bytes = items.concat();
        let reply = wire.call(Opcode::Batch, &NoFields {}, &bytes).unwrap();
        assert!(reply.bytes.len() <= frame_max);
        let replies = split_replies(&reply.payload);
        assert_eq!(replies.len(), count + 1);
        let done = replies.iter().filter(|reply| reply.status == Status::Ok && reply.request_id == 1).count();
        let refused = replies.iter().filter(|reply| reply.status == Status::TooLarge).count();
        // As many as fit beside one refusal for each item behind: to the byte.
        let fits =
            (0..=count).rev().find(|n| 16 + n * reply_len + (count + 1 - n) * 20 <= frame_max).unwrap();
        assert!(refused > 0 && done == fits, "{done} done, {refused} refused, {fits} fit");
        assert!(replies[..done].iter().all(|reply| reply.payload.len() == 1024 + 1024 + 100));
        assert_eq!(wire.uses("k"), done as u64, "what had no room was not carried out");
        // What is small has room behind what is large: a byte more than a refusal needs comes out of what is left.
        assert!(replies[done..count].iter().all(|reply| reply.status == Status::TooLarge));
        wire.ping().unwrap();
    }
    // Every operation whose reply may be the one that does not fit, to the last byte of the frame.
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("k").unwrap();
    let message = wire.encrypt("k", NO_CONTEXT, &[7; 60_000]).unwrap();
    let wrapped = wire.put_to_work(Opcode::Wrap, K, NO_CONTEXT, &[7; 60_000]).unwrap();
    let head = wire.remote_new("k").unwrap().1;
    let fillers = vec![frame(Opcode::Random, 1, &Random { length: 65_536 }, &[]); 15];
    let filled = 16 + 15 * (16 + 65_536);
    for (opcode, payload, reply_len) in [
        (Opcode::Encrypt, vec![1; 60_000], 16 + message_len(60_000)),
        (Opcode::Decrypt, message.clone(), 16 + 60_000),
        (Opcode::Wrap, vec![1; 60_000], 16 + message_len(60_000)),
        (Opcode::Unwrap, wrapped, 16 + 60_000),
        (Opcode::StreamNew, vec![], 16 + 232),
        (Opcode::StreamOpen, head, 16 + 44),
        (Opcode::DataKey, vec![], 16 + 32 + 132),
        (Opcode::DataKeyWrapped, vec![], 16 + 132),
        (Opcode::Verify, message.clone(), 16 + 16 + 8 + 1 + 4 + 4),
        (Opcode::Mac, vec![1; 64], 16 + 60),
    ] {
        let item = use_frame(opcode, 2, K, NO_CONTEXT, &payload);
        for spare in [0, 1] {
            // A last filler that leaves room for this reply and a refusal behind it, or a byte less.
            let left = FRAME_MAX - filled - reply_len - 20 - 16 + spare;
            let filler = frame(Opcode::Random, 1, &Random { length: u32::try_from(left).unwrap() }, &[]);
            let mut items = fillers.clone();
            items.extend([filler, item.clone(), encrypt(3, KeyRef::Name("nobody"), b"x")]);
            let before = wire.uses("k");
            let replies = wire.batch(&items).unwrap();
            let expected = if spare == 0 { Status::Ok } else { Status::TooLarge };
            assert_eq!(replies[16].status, expected, "{}, {spare}", opcode.name());
            assert_eq!(replies[17].status, Status::NotFound);
            assert_eq!(wire.uses("k") - before, 1 - spare as u64, "{}", opcode.name());
        }
    }
}

#[test]
fn items_name_bound_keys_and_are_refused_each_for_itself() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.add("k", None, &[(constraint::MAX_USES, 5)]).unwrap();
    wire.generate("other").unwrap();
    wire.add("asks", None, &[(constraint::CONFIRM, 0)]).unwrap();
    for (number, name) in [(1, "k"), (2, "other"), (3, "asks")] {
        wire.bind(number, KeyRef::Name(name)).unwrap();
    }
    let items: Vec<_> = (0..12).map(|n| encrypt(n, KeyRef::Bound(n % 4 + 1), b"x")).collect();
    let statuses: Vec<_> = wire.batch(&items).unwrap().iter().map(|reply| reply.status).collect();
    let round = [Status::Ok, Status::Ok, Status::Declined, Status::NotFound];
    assert_eq!(statuses, [round, round, round].concat());
    // Exact: the fifth use is the last, wherever in a batch it falls. A rewrap takes two, or none.
    let ciphertext = wire.encrypt("other", NO_CONTEXT, b"x").unwrap();
    let own = wire.put_to_work(Opcode::Encrypt, KeyRef::Bound(1), NO_CONTEXT, b"x").unwrap();
    assert_eq!(wire.uses("k"), 4);
    let rewrap = use_frame(Opcode::Rewrap, 1, KeyRef::Bound(1), NO_CONTEXT, &own);
    let last = encrypt(2, KeyRef::Bound(1), b"x");
    let rest = use_frame(Opcode::Decrypt, 3, KeyRef::Bound(2), NO_CONTEXT, &ciphertext);
    let replies = wire.batch(&[rewrap.clone(), last.clone(), rewrap, last, rest]).unwrap();
    let statuses: Vec<_> = replies.iter().map(|reply| reply.status).collect();
    assert_eq!(statuses, [Status::Limit, Status::Ok, Status::Limit, Status::Limit, Status::Ok]);
    assert_eq!(wire.uses("k"), 5);
}
