//! A process that was forked leaves its parent's connection alone.

use std::{process, time::Duration};

use kms_client::{AsyncClient, Client, ContextRef, KeyRef, Options};
use kms_tests::{Agent, programs, sys::in_child};
use nix::sched::{CloneFlags, unshare};

use super::{client, key};

const NO: ContextRef<'_> = ContextRef::EMPTY;
const KEY: KeyRef<'_> = KeyRef::Name("data");

/// A client whose connection is never made anew by itself, so that whatever befalls it shows.
fn once(agent: &Agent) -> Options {
    Options { socket: Some(agent.socket.clone()), retry: Duration::ZERO, ..Options::default() }
}

fn connections(client: &mut Client) -> String {
    let facts = client.status().unwrap().facts;
    facts.into_iter().find(|fact| fact.name == "connections").unwrap().value
}

#[test]
fn a_child_connects_anew_and_its_parent_notices_nothing() {
    let agent = Agent::start();
    client(&agent).add(&key("data")).unwrap();
    let mut client = Client::connect(&once(&agent)).unwrap();
    client.bind(1, KEY).unwrap();
    let good = in_child(|| {
        assert_eq!(connections(&mut client), "2");
        // What was bound is bound again.
        let sealed = client.encrypt(KeyRef::Bound(1), NO, b"more").unwrap();
        assert_eq!(client.decrypt(KEY, NO, &sealed).unwrap().expose_secret(), b"more");
        // A child of the child has the same to do.
        assert!(in_child(|| assert_eq!(connections(&mut client), "3")));
        client.ping().unwrap();
    });
    assert!(good);
    client.ping().unwrap();
    client.encrypt(KeyRef::Bound(1), NO, b"text").unwrap();
}

#[test]
fn a_child_of_a_pipeline_asks_for_its_own_answers() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    client.bind(1, KEY).unwrap();
    let sealed = client.encrypt(KEY, NO, b"text").unwrap();
    for _ in 0..3 {
        let mut pipeline = Some(client.pipeline());
        for _ in 0..100 {
            pipeline.as_mut().unwrap().decrypt(KeyRef::Bound(1), NO, &sealed);
        }
        // A child that has no use for it ends nothing but its own.
        assert!(in_child(|| drop(pipeline.take())));
        let mut pipeline = pipeline.unwrap();
        // Some answers have come, and others are under way to the parent.
        drop(pipeline.next().unwrap().1.unwrap());
        let good = in_child(|| assert_eq!(pipeline.by_ref().filter(|(_, item)| item.is_ok()).count(), 99));
        assert!(good);
        assert_eq!(pipeline.filter(|(_, item)| item.is_ok()).count(), 99);
    }
    // The parent has had one connection, and each child one.
    let hellos = client.stats().unwrap().operations.into_iter().find(|row| row.opcode == 1).unwrap();
    assert_eq!(hellos.count, 1 + 3);
}

#[test]
fn a_child_with_the_pid_of_its_parent_is_a_child() {
    programs::needs_root();
    let agent = Agent::start();
    let apart = || unshare(CloneFlags::CLONE_NEWPID).unwrap();
    // Two namespaces of process ids, one in the other: the first process of each has the same number.
    let good = in_child(|| {
        apart();
        let good = in_child(|| {
            let mut client = Client::connect(&once(&agent)).unwrap();
            let pid = process::id();
            apart();
            assert!(in_child(|| {
                assert_eq!(process::id(), pid);
                assert_eq!(connections(&mut client), "2");
            }));
            client.ping().unwrap();
        });
        assert!(good);
    });
    assert!(good);
}

#[test]
fn a_stream_of_the_parents_is_not_gone_on_with() {
    use kms_client::{Error, Input, Output};
    let agent = Agent::start();
    client(&agent).add(&key("data")).unwrap();
    let mut client = Client::connect(&once(&agent)).unwrap();
    let stream = client.remote_stream_new(KEY, NO).unwrap();
    let mut stream = Some(stream);
    let mut run = move || {
        let mut sealed = Vec::new();
        stream.take().unwrap().run(Input::from_reader(&b"text"[..]), Output::to_writer(&mut sealed), &())
    };
    assert!(in_child(|| assert!(matches!(run(), Err(Error::Broken)))));
    assert_eq!(run().unwrap(), 4);
    client.ping().unwrap();
}

#[test]
fn the_async_client_of_a_child_connects_anew_too() {
    let agent = Agent::start();
    client(&agent).add(&key("data")).unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let parents = runtime();
    let client = parents.block_on(AsyncClient::connect(&once(&agent))).unwrap();
    let good = in_child(|| {
        runtime().block_on(async {
            let facts = client.status().await.unwrap().facts;
            assert_eq!(facts.iter().find(|fact| fact.name == "connections").unwrap().value, "2");
            client.encrypt(KEY, NO, b"text").await.unwrap();
        });
    });
    assert!(good);
    parents.block_on(client.encrypt(KEY, NO, b"text")).unwrap();
}
