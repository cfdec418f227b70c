//! Every operation of the client, and what each is worth to the next.

use std::{num::NonZeroU64, time::Duration};

use kms_client::{
    AsyncClient, Client, ContextRef, EncryptionContext, Error, Input, KeyRef, LockState, NewKey, Options,
    Output, Secret, SecretVec, Status,
};
use kms_tests::Agent;
use sha2::{Digest, Sha512};

use super::{client, key};

const NO: ContextRef<'_> = ContextRef::EMPTY;

fn passphrase(text: &str) -> SecretVec {
    let mut passphrase = SecretVec::with_capacity(text.len());
    passphrase.push_slice(text.as_bytes()).unwrap();
    passphrase
}

fn refused<T>(result: Result<T, Error>) -> Option<Status> {
    result.err().unwrap().status()
}

#[test]
fn keys_are_made_described_rotated_renamed_exported_and_removed() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.ping().unwrap();
    assert_eq!(client.status().unwrap().state, LockState::Unlocked);
    let bytes = Secret::from_slice(&[5; 32]).unwrap();
    let wanted = NewKey {
        import: Some(&bytes),
        exportable: true,
        lifetime: Some(Duration::from_secs(3600)),
        max_uses: NonZeroU64::new(5),
        ..key("one")
    };
    let added = client.add(&wanted).unwrap();
    assert!(added.created && added.version == 1);
    assert_eq!(refused(client.add(&wanted)), Some(Status::Exists));
    assert!(!client.add(&NewKey { if_missing: true, ..wanted }).unwrap().created);
    let one = KeyRef::Id(added.id);
    let description = client.describe(one).unwrap();
    let mut kinds: Vec<_> = description.constraints.iter().map(|one| (one.kind, one.value)).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, [(1, 0), (2, 3600), (4, 5), (5, 0)]);
    assert!(matches!(description.key.expires_in, Some(3590..=3600)));
    let (exported, secret) = client.export(KeyRef::Name("one"), None, None).unwrap();
    assert_eq!((exported.id, exported.version, secret.expose_secret()), (added.id, 1, &[5; 32]));
    assert_eq!(client.rotate(one).unwrap().version, 2);
    assert_ne!(client.export(one, Some(2), None).unwrap().1.expose_secret(), &[5; 32]);
    assert_eq!(client.rename(one, "two").unwrap().id, added.id);
    assert_eq!(refused(client.describe(KeyRef::Name("one"))), Some(Status::NotFound));
    // Two exports and three more make five uses.
    for _ in 0..3 {
        client.encrypt(one, NO, b"").unwrap();
    }
    assert_eq!(refused(client.encrypt(one, NO, b"")), Some(Status::Limit));
    client.add(&NewKey { confirm: true, ..key("asks") }).unwrap();
    assert_eq!(refused(client.encrypt(KeyRef::Name("asks"), NO, b"")), Some(Status::Declined));
    assert_eq!(refused(client.export(KeyRef::Name("asks"), None, None)), Some(Status::Denied));
    let mut names: Vec<_> = client.list().map(|row| row.unwrap().name).collect();
    names.sort_unstable();
    assert_eq!(names, ["asks", "two"]);
    assert_eq!(client.remove(KeyRef::Name("two")).unwrap().id, added.id);
    assert_eq!(refused(client.remove(one)), Some(Status::NotFound));
    client.add(&key("three")).unwrap();
    assert_eq!(client.remove_all().unwrap().keys, 2);
    assert_eq!(client.list().count(), 0);
    assert!(client.stats().unwrap().operations.iter().any(|row| row.opcode == 0x14 && row.count == 1));
}

#[test]
fn more_versions_than_a_page_has_are_all_described() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("many")).unwrap();
    for version in 2..=600 {
        assert_eq!(client.rotate(KeyRef::Name("many")).unwrap().version, version);
    }
    let versions = client.describe(KeyRef::Name("many")).unwrap().versions;
    assert!(versions.iter().map(|row| row.version).eq(1..=600));
}

#[test]
fn data_goes_in_and_comes_out() {
    let agent = Agent::start();
    let mut client = client(&agent);
    let id = client.add(&key("data")).unwrap().id;
    client.add(&key("other")).unwrap();
    let (data, other) = (KeyRef::Name("data"), KeyRef::Name("other"));
    let context = EncryptionContext::from_pairs([("row", "7")]).unwrap();
    let context = context.as_ref();

    let sealed = client.encrypt(data, context, b"text").unwrap();
    assert_eq!(client.decrypt(data, context, &sealed).unwrap().expose_secret(), b"text");
    assert_eq!(refused(client.decrypt(data, NO, &sealed)), Some(Status::InvalidCiphertext));
    assert_eq!(refused(client.decrypt(other, context, &sealed)), Some(Status::WrongKey));
    let wrapped = client.wrap(data, context, b"my key").unwrap();
    assert_eq!(client.unwrap(data, context, &wrapped).unwrap().expose_secret(), b"my key");
    assert_eq!(refused(client.decrypt(data, context, &wrapped)), Some(Status::Malformed));
    let both = client.data_key(data, context, 32).unwrap();
    let opened = client.unwrap(data, context, &both.wrapped).unwrap();
    assert_eq!((opened.len(), opened.expose_secret()), (32, both.plaintext.expose_secret()));
    let unseen = client.data_key_wrapped(data, context, 1024).unwrap();
    assert_eq!(client.unwrap(data, context, &unseen).unwrap().len(), 1024);

    assert!(client.rewrap(data, context, &sealed, None).unwrap().replacement.is_none());
    client.rotate(data).unwrap();
    let moved = client.rewrap(data, context, &sealed, None).unwrap();
    assert_eq!((moved.id, moved.version), (id, 2));
    let sealed = moved.replacement.unwrap();
    assert_eq!(client.decrypt(data, context, &sealed).unwrap().expose_secret(), b"text");
    let verified = client.verify(data, context, &sealed).unwrap();
    assert_eq!((verified.id, &*verified.name, verified.version, verified.primary), (id, "data", 2, 2));
    let moved = client.rewrap(data, context, &sealed, Some(other)).unwrap().replacement.unwrap();
    assert_eq!(client.decrypt(other, context, &moved).unwrap().expose_secret(), b"text");

    let digest = Sha512::digest(b"an input").into();
    let tag = client.mac(data, context, &digest).unwrap();
    client.mac_verify(data, context, &tag, &digest).unwrap();
    assert_eq!(refused(client.mac_verify(data, NO, &tag, &digest)), Some(Status::InvalidCiphertext));
    assert_eq!(client.random(65536).unwrap().len(), 65536);

    // A number stands for the key, whatever its name becomes.
    assert_eq!(client.bind(9, data).unwrap().id, id);
    client.rename(data, "renamed").unwrap();
    client.encrypt(KeyRef::Bound(9), NO, b"").unwrap();
    client.remove(KeyRef::Bound(9)).unwrap();
    assert_eq!(refused(client.encrypt(KeyRef::Bound(9), NO, b"")), Some(Status::NotFound));
}

#[test]
fn streams_are_moved_by_their_head() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    client.add(&key("other")).unwrap();
    let (data, other) = (KeyRef::Name("data"), KeyRef::Name("other"));
    let context = EncryptionContext::from_pairs([("row", "7")]).unwrap();
    let text = vec![7; 100_000];
    let mut sealed = Vec::new();
    let sealing = client.stream_new(data, context.as_ref()).unwrap();
    sealing.run(Input::from_reader(&text[..]), Output::to_writer(&mut sealed), &()).unwrap();
    let moved = client.rewrap(data, NO, &sealed[..132], Some(other)).unwrap();
    sealed[..132].copy_from_slice(&moved.replacement.unwrap());
    client.verify(other, context.as_ref(), &sealed[..188]).unwrap();
    let head = *sealed.first_chunk().unwrap();
    let mut opened = Vec::new();
    let opening = client.stream_open(other, context.as_ref(), &head).unwrap();
    opening.run(Input::from_reader(&sealed[188..]), Output::to_writer(&mut opened), &()).unwrap();
    assert_eq!(opened, text);
    let mut opened = Vec::new();
    let opening = client.remote_stream_open(other, context.as_ref(), &head).unwrap();
    opening.run(Input::from_reader(&sealed[188..]), Output::to_writer(&mut opened), &()).unwrap();
    assert_eq!(opened, text);
}

#[test]
fn an_agent_that_was_locked_wants_its_passphrase_for_an_export() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&NewKey { exportable: true, ..key("data") }).unwrap();
    let data = KeyRef::Name("data");
    client.bind(1, data).unwrap();
    assert!(client.lock(&passphrase("right")).unwrap());
    assert!(!client.lock(&passphrase("other")).unwrap());
    assert_eq!(refused(client.encrypt(KeyRef::Bound(1), NO, b"")), Some(Status::Locked));
    assert!(client.unlock(&passphrase("right")).unwrap());
    assert!(!client.unlock(&passphrase("right")).unwrap());
    client.encrypt(KeyRef::Bound(1), NO, b"").unwrap();
    assert_eq!(refused(client.export(data, None, None)), Some(Status::Denied));
    client.export(data, None, Some(&passphrase("right"))).unwrap();
    // After a wrong one the agent wants time, which the client gives it.
    assert_eq!(refused(client.export(data, None, Some(&passphrase("wrong")))), Some(Status::Denied));
    client.export(data, None, Some(&passphrase("right"))).unwrap();
    // Without patience it says so.
    let once = Options { socket: Some(agent.socket.clone()), retry: Duration::ZERO, ..Options::default() };
    let mut hurried = Client::connect(&once).unwrap();
    assert_eq!(refused(hurried.export(data, None, Some(&passphrase("wrong")))), Some(Status::Denied));
    assert_eq!(refused(hurried.export(data, None, Some(&passphrase("right")))), Some(Status::Busy));
}

#[tokio::test]
async fn the_async_client_does_the_same() {
    let agent = Agent::start();
    let options = Options { socket: Some(agent.socket.clone()), ..Options::default() };
    let client = AsyncClient::connect(&options).await.unwrap();
    let id = client.add(&NewKey { exportable: true, ..key("data") }).await.unwrap().id;
    let data = KeyRef::Id(id);
    client.bind(4, data).await.unwrap();
    let sealed = client.encrypt(KeyRef::Bound(4), NO, b"text").await.unwrap();
    assert_eq!(client.rotate(data).await.unwrap().version, 2);
    let moved = client.rewrap(data, NO, &sealed, None).await.unwrap().replacement.unwrap();
    assert_eq!(client.verify(data, NO, &moved).await.unwrap().version, 2);
    assert_eq!(client.decrypt(data, NO, &moved).await.unwrap().expose_secret(), b"text");
    let wrapped = client.wrap(data, NO, b"key").await.unwrap();
    assert_eq!(client.unwrap(data, NO, &wrapped).await.unwrap().expose_secret(), b"key");
    let both = client.data_key(data, NO, 16).await.unwrap();
    assert_eq!(
        client.unwrap(data, NO, &both.wrapped).await.unwrap().expose_secret(),
        both.plaintext.expose_secret()
    );
    let tag = client.mac(data, NO, &[1; 64]).await.unwrap();
    client.mac_verify(data, NO, &tag, &[1; 64]).await.unwrap();
    assert_eq!(client.random(10).await.unwrap().len(), 10);
    assert_eq!(client.describe(data).await.unwrap().versions.len(), 2);
    assert_eq!(client.list().await.unwrap().len(), 1);
    client.rename(data, "other").await.unwrap();
    client.export(data, Some(1), None).await.unwrap();
    assert!(client.lock(&passphrase("x")).await.unwrap());
    assert!(client.is_locked().await.unwrap());
    assert!(client.unlock(&passphrase("x")).await.unwrap());
    client.stats().await.unwrap();
    client.remove(data).await.unwrap();
    assert_eq!(client.remove_all().await.unwrap().keys, 0);
}
