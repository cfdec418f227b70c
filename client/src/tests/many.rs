//! Many requests at a time: pipelines, batches, and the core that they share with the async client.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kms_envelope::ContextRef;
use kms_protocol::{
    FRAME_HEAD_LEN, FRAME_MAX, Frame, KeyRef, NoFields, Opcode, Refusal, Request, Status, push_frame,
};

use super::{
    fake::{Fake, Fate, ID},
    options,
};
use crate::{
    Batch, Client, Error, Item, Options, ReplyError, client::Binding, exchange::Exchange, wire::Outgoing,
};

const KEY: KeyRef<'_> = KeyRef::Name("key");
const NO: ContextRef<'_> = ContextRef::EMPTY;

fn patient(fake: &Fake) -> Client {
    let retry = Duration::from_secs(30);
    Client::connect(&Options { socket: Some(fake.socket.clone()), retry, ..Options::default() }).unwrap()
}

/// What the fake has sealed stands in the clear behind the header.
fn content(item: &Item, len: usize) -> &[u8] {
    match item {
        Item::Sealed(sealed) => &sealed[28..][..len],
        _ => panic!("not sealed"),
    }
}

/// Answers other requests than hello in groups, the last one first.
fn backwards(group: usize) -> Fake {
    let held = Mutex::new(Vec::new());
    Fake::new(move |opcode, reply| {
        if opcode == Opcode::Hello {
            return Fate::Send(reply);
        }
        let mut held = held.lock().unwrap();
        held.push(reply);
        if held.len() < group {
            return Fate::Send(Vec::new());
        }
        held.reverse();
        Fate::Send(std::mem::take(&mut *held).concat())
    })
}

#[test]
fn answers_in_any_order_find_their_requests() {
    let fake = backwards(8);
    let mut client = Client::connect(&options(&fake)).unwrap();
    let mut pipeline = client.pipeline();
    for number in 0..1000_u32 {
        assert_eq!(pipeline.encrypt(KEY, NO, &number.to_le_bytes()), number as usize);
    }
    let mut seen = vec![false; 1000];
    for (number, item) in &mut pipeline {
        assert_eq!(content(&item.unwrap(), 4), u32::try_from(number).unwrap().to_le_bytes());
        assert!(!std::mem::replace(&mut seen[number], true));
    }
    assert!(seen.into_iter().all(|seen| seen));
    assert_eq!(pipeline.under_way(), 0);
}

#[test]
fn full_buffers_on_both_sides_stop_nobody() {
    // The fake reads nothing while it writes, so an answer that nobody takes stops it.
    let fake = Fake::honest();
    let mut client = Client::connect(&options(&fake)).unwrap();
    let mut pipeline = client.pipeline();
    for number in 0..300_u32 {
        pipeline.encrypt(KEY, NO, &number.to_le_bytes().repeat(16_000));
    }
    let mut count = 0;
    for (number, item) in pipeline {
        assert_eq!(
            content(&item.unwrap(), 64_000),
            u32::try_from(number).unwrap().to_le_bytes().repeat(16_000)
        );
        count += 1;
    }
    assert_eq!(count, 300);
    client.ping().unwrap();
}

#[test]
fn every_operation_on_data_goes_through_a_pipeline_and_a_batch() {
    let fake = Fake::honest();
    let mut client = Client::connect(&options(&fake)).unwrap();
    let sealed = client.encrypt(KEY, NO, b"text").unwrap();
    let wrapped = client.wrap(KEY, NO, b"text").unwrap();
    let tag = client.mac(KEY, NO, &[0; 64]).unwrap();
    let (head, _) = super::fake::stream(NO);
    macro_rules! all {
        ($to:ident) => {
            $to.encrypt(KEY, NO, b"text");
            $to.decrypt(KEY, NO, &sealed);
            $to.wrap(KEY, NO, b"text");
            $to.unwrap(KEY, NO, &wrapped);
            $to.data_key(KEY, NO, 32);
            $to.data_key_wrapped(KEY, NO, 32);
            $to.rewrap(KEY, NO, &sealed, None);
            $to.verify(KEY, NO, &sealed);
            $to.mac(KEY, NO, &[0; 64]);
            $to.mac_verify(KEY, NO, &tag, &[0; 64]);
            $to.random(5);
            $to.stream_new(KEY, NO);
            $to.stream_open(KEY, NO, &head);
            // Two that are over before they begin.
            $to.random(65537);
            $to.decrypt(KEY, NO, b"short");
        };
    }
    let kind = |item: &Result<Item, Error>| match item {
        Ok(Item::Sealed(_)) => 's',
        Ok(Item::Secret(_)) => 'o',
        Ok(Item::DataKey(_)) => 'd',
        Ok(Item::Moved(_)) => 'm',
        Ok(Item::Verified(_)) => 'v',
        Ok(Item::Tag(_)) => 't',
        Ok(Item::TagVerified) => 'y',
        Ok(Item::Sealing(_)) => 'S',
        Ok(Item::Opening(_)) => 'O',
        Err(Error::TooLong { .. }) => 'l',
        Err(Error::InvalidCiphertext) => 'i',
        Err(_) => '?',
    };
    let expected = "sosodsmvtyoSOli";
    let mut pipeline = client.pipeline();
    all!(pipeline);
    let mut results: Vec<_> = pipeline.collect();
    results.sort_by_key(|(number, _)| *number);
    assert_eq!(results.iter().map(|(_, item)| kind(item)).collect::<String>(), expected);
    let mut batch = Batch::new();
    all!(batch);
    let results = client.batch(&batch).unwrap();
    assert_eq!(results.iter().map(kind).collect::<String>(), expected);
}

#[test]
fn a_pipeline_goes_on_over_connections_that_break() {
    let answers = AtomicUsize::new(0);
    let fake = Fake::new(move |opcode, mut reply| {
        let number = answers.fetch_add(1, Ordering::SeqCst);
        if opcode == Opcode::Hello || !number.is_multiple_of(50) {
            return Fate::Send(reply);
        }
        reply.truncate(number / 50 % reply.len());
        Fate::SendAndClose(reply)
    });
    let mut client = patient(&fake);
    client.bind(3, KEY).unwrap();
    let mut pipeline = client.pipeline();
    for number in 0..500_u32 {
        pipeline.encrypt(KeyRef::Bound(3), NO, &number.to_le_bytes());
    }
    let mut seen = vec![0; 500];
    for (number, item) in pipeline {
        assert_eq!(content(&item.unwrap(), 4), u32::try_from(number).unwrap().to_le_bytes());
        seen[number] += 1;
    }
    assert!(seen.into_iter().all(|seen| seen == 1));
    // On every connection the number was bound before it was used.
    let frames = fake.frames.lock().unwrap();
    let binds = frames.iter().filter(|frame| frame[6] == 0x31).count();
    assert!(binds > 5, "{binds}");
    drop(frames);
    client.encrypt(KeyRef::Bound(3), NO, b"text").unwrap();
}

#[test]
fn a_pipeline_that_is_dropped_leaves_a_client_that_can_be_used() {
    let fake = backwards(10);
    let mut client = patient(&fake);
    let mut pipeline = client.pipeline();
    for _ in 0..9 {
        pipeline.encrypt(KEY, NO, b"text");
    }
    for _ in 0..40 {
        pipeline.random(9);
    }
    drop(pipeline);
    let fake = Fake::honest();
    let mut client = patient(&fake);
    let mut pipeline = client.pipeline();
    for _ in 0..33 {
        pipeline.encrypt(KEY, NO, b"text");
    }
    pipeline.next().unwrap().1.unwrap();
    drop(pipeline);
    client.ping().unwrap();
    assert_eq!(client.random(7).unwrap().len(), 7);
}

#[test]
fn an_answer_to_nothing_ends_a_pipeline_with_an_error_for_each() {
    // Another id; the same answer twice; an answer with a payload too many.
    let changes: [fn(&mut Vec<u8>); 3] = [
        |reply| reply[8] ^= 0x80,
        |reply| reply.extend_from_within(..),
        |reply| {
            reply[0] += 1;
            reply.push(0);
        },
    ];
    for change in changes {
        let answers = AtomicUsize::new(0);
        let fake = Fake::new(move |opcode, mut reply| {
            if opcode == Opcode::Random && answers.fetch_add(1, Ordering::SeqCst) == 20 {
                change(&mut reply);
            }
            Fate::Send(reply)
        });
        let mut client = patient(&fake);
        let mut pipeline = client.pipeline();
        for _ in 0..100 {
            pipeline.random(5);
        }
        let (mut good, mut bad) = (0, 0);
        for (_, item) in pipeline {
            match item {
                Ok(Item::Secret(secret)) => good += usize::from(secret.len() == 5),
                Err(Error::Reply(_)) => bad += 1,
                _ => panic!(),
            }
        }
        assert_eq!(good + bad, 100);
        assert!(bad > 0 && good >= 20, "{good} {bad}");
        client.ping().unwrap();
    }
}

#[test]
fn a_batch_is_cut_into_frames_that_both_ways_have_room_for() {
    let fake = Fake::honest();
    let mut client = Client::connect(&options(&fake)).unwrap();
    let mut batch = Batch::new();
    assert!(client.batch(&batch).unwrap().is_empty());
    for number in 0..5000_u32 {
        batch.encrypt(KEY, NO, &number.to_le_bytes());
    }
    for _ in 0..40 {
        batch.encrypt(KEY, NO, &[7; 65536]);
    }
    for _ in 0..40 {
        // Little to send and much to come back.
        batch.random(65536);
    }
    let results = client.batch(&batch).unwrap();
    assert_eq!(results.len(), 5080);
    for (number, item) in results.iter().enumerate().take(5000) {
        assert_eq!(content(item.as_ref().unwrap(), 4), u32::try_from(number).unwrap().to_le_bytes());
    }
    assert!(results.iter().all(Result::is_ok));
    let frames = fake.frames.lock().unwrap();
    assert!(frames.len() >= 2 + 3 + 3 && frames.len() < 14, "{}", frames.len());
    for frame in frames.iter() {
        let mut rest = &frame[FRAME_HEAD_LEN..];
        let (mut items, mut answers) = (0, 0);
        while let Some(item) = Frame::parse(rest, FRAME_MAX).unwrap() {
            rest = &rest[item.frame_len()..];
            items += 1;
            answers += match Request::decode(Opcode::from_code(item.head.code).unwrap(), &item).unwrap() {
                Request::Random(random) => FRAME_HEAD_LEN + random.length as usize,
                Request::Encrypt { plaintext, .. } => {
                    FRAME_HEAD_LEN + kms_envelope::message_len(plaintext.len())
                }
                _ => panic!(),
            };
        }
        assert!(items <= 4096 && frame.len() <= FRAME_MAX && answers <= FRAME_MAX - FRAME_HEAD_LEN);
    }
}

/// The result of a batch of three whose answers were changed.
fn batch_with(
    change: impl Fn(&mut Vec<Vec<u8>>) + Send + Sync + 'static,
) -> Result<Vec<Result<Item, Error>>, Error> {
    let fake = Fake::new(move |opcode, reply| {
        if opcode != Opcode::Batch {
            return Fate::Send(reply);
        }
        let mut answers = Vec::new();
        let mut rest = &reply[FRAME_HEAD_LEN..];
        while let Some(frame) = Frame::parse(rest, FRAME_MAX).unwrap() {
            let (one, others) = rest.split_at(frame.frame_len());
            answers.push(one.to_vec());
            rest = others;
        }
        change(&mut answers);
        let mut changed = Vec::new();
        let id = u32::from_le_bytes(reply[8..12].try_into().unwrap());
        push_frame(&mut changed, 0, id, &NoFields {}, &answers.concat()).unwrap();
        Fate::Send(changed)
    });
    let mut client = Client::connect(&options(&fake)).unwrap();
    let mut batch = Batch::new();
    for length in 1..=3 {
        batch.random(length);
    }
    let results = client.batch(&batch);
    assert_eq!(
        client.ping().is_err(),
        results.is_err(),
        "nonsense ends the connection and nothing else does"
    );
    results
}

#[test]
fn the_answers_of_a_batch_are_as_many_and_in_the_order_of_its_items() {
    assert!(batch_with(|_| ()).unwrap().iter().all(Result::is_ok));
    let refuse = |answers: &mut Vec<Vec<u8>>| {
        answers[1].clear();
        push_frame(&mut answers[1], Status::Limit.code(), 1, &Refusal { retry_after_ms: 0 }, &[]).unwrap();
    };
    let results = batch_with(refuse).unwrap();
    assert!(results[0].is_ok() && results[2].is_ok());
    assert_eq!(results[1].as_ref().err().unwrap().status(), Some(Status::Limit));
    let nonsense: [fn(&mut Vec<Vec<u8>>); 7] = [
        |answers| answers.swap(0, 1),
        |answers| drop(answers.pop()),
        |answers| answers.push(answers[2].clone()),
        |answers| answers.push(vec![0]),
        |answers| answers.clear(),
        |answers| answers[2].truncate(18),
        // A byte less, in head and payload.
        |answers| {
            answers[2][0] -= 1;
            answers[2].pop();
        },
    ];
    for change in nonsense {
        assert!(matches!(batch_with(change), Err(Error::Reply(_))));
    }
}

fn welcome(client: &Client, in_flight_max: u32) -> kms_protocol::Welcome {
    kms_protocol::Welcome { in_flight_max, ..client.welcome().clone() }
}

#[test]
fn no_more_is_under_way_than_the_agent_takes() {
    let fake = Fake::honest();
    let client = Client::connect(&options(&fake)).unwrap();
    let (answer, retry) = (Duration::from_secs(10), Duration::from_secs(5));
    let mut exchange = Exchange::new(&welcome(&client, 4), answer, retry, HashMap::new());
    let now = Instant::now();
    for number in 0..10 {
        exchange.start(Outgoing::new(&Request::Ping).unwrap(), number);
    }
    assert_eq!(exchange.output().len(), 4);
    // Half a frame, then the rest and one more.
    exchange.sent(8, now);
    assert_eq!((exchange.output()[0].len(), exchange.output().len()), (8, 4));
    exchange.sent(24, now);
    assert_eq!(exchange.output().len(), 2);
    exchange.sent(32, now);
    assert!(exchange.output().is_empty() && exchange.is_full());
    // An answer makes room for one.
    let mut reply = Vec::new();
    push_frame(&mut reply, 0, 3, &NoFields {}, &[]).unwrap();
    exchange.room()[..reply.len()].copy_from_slice(&reply);
    exchange.arrived(reply.len(), now).unwrap();
    assert_eq!(exchange.take().unwrap().keep, 2);
    assert_eq!(exchange.output().len(), 1);
    // One that was not sent yet cannot be answered.
    reply[8] = 9;
    exchange.room()[..reply.len()].copy_from_slice(&reply);
    assert_eq!(exchange.arrived(reply.len(), now).err(), Some(ReplyError::RequestId));
}

#[test]
fn a_request_that_the_agent_does_not_take_is_given_up() {
    let fake = Fake::honest();
    let client = Client::connect(&options(&fake)).unwrap();
    let limit = Duration::from_secs(10);
    let mut exchange = Exchange::new(&welcome(&client, 4), limit, Duration::from_secs(5), HashMap::new());
    for number in 0..2 {
        exchange.start(Outgoing::new(&Request::Ping).unwrap(), number);
    }
    // Of half a frame another byte goes out now and then.
    let now = Instant::now();
    exchange.sent(7, now);
    exchange.sent(1, now + limit / 2);
    assert_eq!(exchange.wake(), Some(now + limit));
    assert!(!exchange.due(now + limit / 2));
    assert!(exchange.due(now + limit));
    let over = exchange.take().unwrap();
    assert!(over.keep == 0 && matches!(over.answer, Err(Error::Timeout { .. })));
    // The other one goes out on the next connection.
    assert_eq!(exchange.broke(now + limit, &Error::Closed, |_| true), Duration::ZERO);
    exchange.reconnected(client.welcome());
    assert_eq!((exchange.output().len(), exchange.wake()), (1, None));
}

#[test]
fn what_uses_a_number_waits_until_it_is_bound_again() {
    let fake = Fake::honest();
    let client = Client::connect(&options(&fake)).unwrap();
    let (answer, retry) = (Duration::from_secs(10), Duration::from_secs(5));
    let bindings = HashMap::from([(7, Binding { id: ID, here: true })]);
    let mut exchange = Exchange::new(&welcome(&client, 256), answer, retry, bindings);
    let now = Instant::now();
    let uses =
        || Outgoing::new(&crate::operations::encrypt(KeyRef::Bound(7), NO, b"").unwrap().request).unwrap();
    let codes = |exchange: &Exchange<u32>| exchange.output().iter().map(|frame| frame[6]).collect::<Vec<_>>();
    exchange.start(uses(), 0);
    assert_eq!(codes(&exchange), [0x20]);
    assert_eq!(exchange.broke(now, &Error::Closed, |_| true), Duration::ZERO);
    exchange.start(uses(), 1);
    exchange.start(Outgoing::new(&Request::Ping).unwrap(), 2);
    exchange.reconnected(&welcome(&client, 256));
    // One bind for both, and what does not need it goes out meanwhile.
    let mut sent = codes(&exchange);
    sent.sort_unstable();
    assert_eq!(sent, [0x02, 0x31]);
    let bind = exchange.output().iter().find(|frame| frame[6] == 0x31).map(|frame| frame.to_vec()).unwrap();
    let len = exchange.output().iter().map(|frame| frame.len()).sum();
    exchange.sent(len, now);
    // While the agent is locked, the uses are refused with what the bind was refused with.
    let mut refusal = Vec::new();
    let id = u32::from_le_bytes(bind[8..12].try_into().unwrap());
    push_frame(&mut refusal, Status::Locked.code(), id, &Refusal { retry_after_ms: 0 }, &[]).unwrap();
    exchange.room()[..refusal.len()].copy_from_slice(&refusal);
    exchange.arrived(refusal.len(), now).unwrap();
    for number in [0, 1] {
        let done = exchange.take().unwrap();
        assert_eq!(done.keep, number);
        let refused = done.answer.err().unwrap();
        assert!(matches!(refused, Error::Refused { operation: Opcode::Encrypt, status: Status::Locked, .. }));
    }
    // And the next use asks anew.
    exchange.start(uses(), 3);
    assert_eq!(codes(&exchange), [0x31]);
}
