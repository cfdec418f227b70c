//! The crate `kms-client` against the shipped agent.

mod cut;
mod fork;
mod many;
mod operations;
mod tree;

use std::time::Duration;

use kms_client::{Client, NewKey, Options};
use kms_tests::Agent;

/// A client that gives up nothing within a test.
fn client(agent: &Agent) -> Client {
    let retry = Duration::from_secs(60);
    Client::connect(&Options { socket: Some(agent.socket.clone()), retry, ..Options::default() }).unwrap()
}

/// A key in memory.
fn key(name: &str) -> NewKey<'_> {
    NewKey { memory_only: true, ..NewKey::new(name) }
}
