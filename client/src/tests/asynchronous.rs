//! The async client: shared, cancelled, cut off.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kms_envelope::ContextRef;
use kms_protocol::{KeyRef, LockState, Opcode, Status};
use tokio::task::JoinSet;

use super::{
    fake::{Fake, Fate, ID},
    options,
};
use crate::{AsyncClient, Error, NewKey, Options, SecretVec};

const KEY: KeyRef<'_> = KeyRef::Name("key");
const NO: ContextRef<'_> = ContextRef::EMPTY;

async fn patient(fake: &Fake) -> AsyncClient {
    let retry = Duration::from_secs(30);
    let options = Options { socket: Some(fake.socket.clone()), retry, ..Options::default() };
    AsyncClient::connect(&options).await.unwrap()
}

fn passphrase() -> SecretVec {
    let mut passphrase = SecretVec::with_capacity(1);
    passphrase.push_slice(b"x").unwrap();
    passphrase
}

#[tokio::test]
async fn every_operation_brings_its_reply() {
    let fake = Fake::honest();
    let client = AsyncClient::connect(&options(&fake)).await.unwrap();
    assert_eq!(client.socket(), fake.socket);
    assert_eq!(client.welcome().opcodes.len(), Opcode::ALL.len());
    client.ping().await.unwrap();
    assert_eq!(client.status().await.unwrap().state, LockState::Unlocked);
    assert!(!client.is_locked().await.unwrap());
    assert_eq!(client.add(&NewKey::new("new")).await.unwrap().id, ID);
    let refused = client.add(&NewKey::new("taken")).await.unwrap_err();
    assert_eq!(refused.status(), Some(Status::Exists));
    let names: Vec<_> = client.list().await.unwrap().into_iter().map(|row| row.name).collect();
    assert_eq!(names, ["key0", "key1", "last"]);
    assert_eq!(client.describe(KEY).await.unwrap().versions.len(), 3);
    assert_eq!(client.rotate(KEY).await.unwrap().version, 2);
    assert_eq!(client.rename(KEY, "other").await.unwrap().id, ID);
    assert_eq!(client.remove(KEY).await.unwrap().id, ID);
    assert_eq!(client.remove_all().await.unwrap().keys, 5);
    assert_eq!(client.export(KEY, None, None).await.unwrap().1.expose_secret(), &[1; 32]);
    let sealed = client.encrypt(KEY, NO, b"text").await.unwrap();
    assert_eq!(client.decrypt(KEY, NO, &sealed).await.unwrap().expose_secret(), b"text");
    let wrapped = client.wrap(KEY, NO, b"key").await.unwrap();
    assert_eq!(client.unwrap(KEY, NO, &wrapped).await.unwrap().expose_secret(), b"key");
    assert_eq!(client.data_key(KEY, NO, 32).await.unwrap().plaintext.len(), 32);
    client.data_key_wrapped(KEY, NO, 32).await.unwrap();
    assert!(client.rewrap(KEY, NO, &sealed, None).await.unwrap().replacement.is_some());
    assert_eq!(client.verify(KEY, NO, &sealed).await.unwrap().id, ID);
    let tag = client.mac(KEY, NO, &[0; 64]).await.unwrap();
    client.mac_verify(KEY, NO, &tag, &[0; 64]).await.unwrap();
    assert_eq!(client.random(9).await.unwrap().len(), 9);
    assert_eq!(client.bind(1, KEY).await.unwrap().id, ID);
    assert_eq!(client.stats().await.unwrap().uptime_ms, 7);
    let sealing = client.stream_new(KEY, NO).await.unwrap();
    drop(sealing);
    client.stream_open(KEY, NO, &super::fake::stream(NO).0).await.unwrap();
    assert!(client.lock(&passphrase()).await.unwrap());
    assert!(client.unlock(&passphrase()).await.unwrap());
    assert!(matches!(client.random(65537).await, Err(Error::TooLong { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_share_one_connection() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let fake = Fake::new(move |opcode, reply| {
        counter.fetch_add(usize::from(opcode == Opcode::Hello), Ordering::SeqCst);
        Fate::Send(reply)
    });
    let client = AsyncClient::connect(&options(&fake)).await.unwrap();
    let mut tasks = JoinSet::new();
    for number in 0..1000_u32 {
        let client = client.clone();
        tasks.spawn(async move {
            let text = number.to_le_bytes().repeat(4000);
            let sealed = client.encrypt(KEY, NO, &text).await.unwrap();
            assert_eq!(client.decrypt(KEY, NO, &sealed).await.unwrap().expose_secret(), text);
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_dropped_future_leaves_a_connection_that_can_be_used() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let fake = Fake::new(move |opcode, reply| {
        counter.fetch_add(usize::from(opcode == Opcode::Hello), Ordering::SeqCst);
        Fate::Send(reply)
    });
    let client = AsyncClient::connect(&options(&fake)).await.unwrap();
    for round in 0..300 {
        // Dropped after as many turns of the runtime: before it is sent, under way, and after it was answered.
        let mut asked = Box::pin(client.encrypt(KEY, NO, &[1; 50_000]));
        tokio::select! {
            biased;
            () = async { for _ in 0..round % 30 { tokio::task::yield_now().await; } } => {}
            _ = &mut asked => {}
        }
        drop(asked);
        if round % 10 == 0 {
            assert_eq!(client.random(round + 1).await.unwrap().len(), round as usize + 1);
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn operations_go_on_over_connections_that_break() {
    let answers = AtomicUsize::new(0);
    let fake = Fake::new(move |opcode, mut reply| {
        if opcode == Opcode::Hello || !answers.fetch_add(1, Ordering::SeqCst).is_multiple_of(10) {
            return Fate::Send(reply);
        }
        reply.truncate(5);
        Fate::SendAndClose(reply)
    });
    let client = patient(&fake).await;
    client.bind(3, KEY).await.unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..100 {
        let client = client.clone();
        tasks.spawn(async move {
            client.rotate(KEY).await.unwrap();
            client.encrypt(KeyRef::Bound(3), NO, b"text").await.unwrap();
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    // A hundred rotations were wanted, however often each was asked for.
    let frames = fake.frames.lock().unwrap();
    let mut tokens: Vec<_> =
        frames.iter().filter(|frame| frame[6] == 0x14).map(|frame| frame[16..32].to_vec()).collect();
    let asked = tokens.len();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 100);
    assert!(asked > 100, "{asked}");
}

#[tokio::test]
async fn a_lock_that_may_have_been_carried_out_is_not_repeated() {
    let fake = Fake::new(|opcode, reply| match opcode {
        Opcode::Lock => Fate::SendAndClose(Vec::new()),
        _ => Fate::Send(reply),
    });
    let client = patient(&fake).await;
    assert!(matches!(client.lock(&passphrase()).await, Err(Error::Closed)));
    client.ping().await.unwrap();
}

#[tokio::test]
async fn nonsense_is_an_error_and_without_retry_the_end() {
    let fake = Fake::new(|opcode, mut reply| {
        if opcode == Opcode::Ping {
            reply[0] += 1;
            reply.push(0);
        }
        Fate::Send(reply)
    });
    let client = patient(&fake).await;
    assert!(matches!(client.ping().await, Err(Error::Reply(_))));
    client.status().await.unwrap();
    let client = AsyncClient::connect(&options(&fake)).await.unwrap();
    assert!(matches!(client.ping().await, Err(Error::Reply(_))));
    assert!(matches!(client.status().await, Err(Error::Broken)));
}

#[tokio::test]
async fn an_agent_that_does_not_answer_is_given_up() {
    let fake = Fake::new(|opcode, reply| match opcode {
        Opcode::Ping => Fate::Send(Vec::new()),
        _ => Fate::Send(reply),
    });
    let timeout = Duration::from_millis(200);
    let options = Options { socket: Some(fake.socket.clone()), timeout, ..Options::default() };
    let client = AsyncClient::connect(&options).await.unwrap();
    let (ping, status) = tokio::join!(client.ping(), client.status());
    assert!(matches!(ping, Err(Error::Timeout { .. })));
    status.unwrap();
    client.status().await.unwrap();
}
