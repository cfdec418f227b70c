//! Connections that are cut before and after the agent has acted: no operation fails for good, and nothing is done twice.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use kms_client::{AsyncClient, Client, ContextRef, KeyRef, Options};
use kms_tests::{Agent, wire::random};

use super::{client, key};

const NO: ContextRef<'_> = ContextRef::EMPTY;

/// What stands between client and agent, and how often it has cut.
struct Cutter {
    socket: PathBuf,
    before: Arc<AtomicUsize>,
    after: Arc<AtomicUsize>,
}

impl Cutter {
    /// Cuts every fourth request, on average.
    fn start(agent: &Agent) -> Self {
        let socket = agent.folder().join("run/cut.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (before, after) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let cutter = Self { socket, before, after };
        let (before, after) = (Arc::clone(&cutter.before), Arc::clone(&cutter.after));
        let agent = agent.socket.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                // One after the other: the client has one connection at a time.
                relay(connection.unwrap(), &agent, &before, &after);
            }
        });
        cutter
    }

    fn cuts(&self) -> usize {
        self.before.load(Ordering::SeqCst) + self.after.load(Ordering::SeqCst)
    }

    fn options(&self) -> Options {
        Options { socket: Some(self.socket.clone()), retry: Duration::from_secs(60), ..Options::default() }
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        // The agent's folder is looked at when it ends.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// One whole frame; nothing at the end of the connection.
fn frame(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 16];
    from.read_exact(&mut bytes).ok()?;
    let len = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
    bytes.resize(16 + len, 0);
    from.read_exact(&mut bytes[16..]).ok()?;
    Some(bytes)
}

fn relay(mut client: UnixStream, agent: &Path, before: &AtomicUsize, after: &AtomicUsize) {
    let mut agent = UnixStream::connect(agent).unwrap();
    let mut first = true;
    while let Some(request) = frame(&mut client) {
        let chance = if first { 0 } else { random::<1>()[0] % 8 };
        first = false;
        if chance == 1 {
            // The agent sees nothing of it, or a part that it throws away.
            let some = usize::from(random::<1>()[0]) % request.len();
            agent.write_all(&request[..some]).unwrap();
            before.fetch_add(1, Ordering::SeqCst);
            return;
        }
        agent.write_all(&request).unwrap();
        let Some(reply) = frame(&mut agent) else { return };
        if chance == 2 {
            // The agent has acted; of its answer a part arrives.
            let some = usize::from(random::<1>()[0]) % reply.len();
            let _ = client.write_all(&reply[..some]);
            after.fetch_add(1, Ordering::SeqCst);
            return;
        }
        if client.write_all(&reply).is_err() {
            return;
        }
    }
}

/// Names and numbers of versions of the keys that the agent holds.
fn held(agent: &Agent) -> BTreeMap<String, u32> {
    client(agent).list().map(|row| row.unwrap()).map(|row| (row.name, row.versions)).collect()
}

fn expected(rounds: usize) -> BTreeMap<String, u32> {
    (0..rounds).filter(|round| round % 2 == 0).map(|round| (format!("new{round}"), 2)).collect()
}

#[test]
fn a_thousand_cuts_lose_nothing_and_do_nothing_twice() {
    let agent = Agent::start();
    let cutter = Cutter::start(&agent);
    let mut client = Client::connect(&cutter.options()).unwrap();
    client.add(&key("bound")).unwrap();
    client.bind(1, KeyRef::Name("bound")).unwrap();
    let mut rounds = 0;
    while cutter.cuts() < 1000 {
        let (old, new) = (format!("old{rounds}"), format!("new{rounds}"));
        let added = client.add(&key(&old)).unwrap();
        assert!(added.created && added.version == 1);
        let id = KeyRef::Id(added.id);
        assert_eq!(client.rotate(KeyRef::Name(&old)).unwrap().version, 2);
        let sealed = client.encrypt(KeyRef::Name(&old), NO, old.as_bytes()).unwrap();
        assert_eq!(client.rename(KeyRef::Name(&old), &new).unwrap().id, added.id);
        assert_eq!(client.decrypt(id, NO, &sealed).unwrap().expose_secret(), old.as_bytes());
        client.encrypt(KeyRef::Bound(1), NO, b"").unwrap();
        if rounds % 2 == 1 {
            assert_eq!(client.remove(KeyRef::Name(&new)).unwrap().id, added.id);
        }
        rounds += 1;
    }
    let (before, after) = (cutter.before.load(Ordering::SeqCst), cutter.after.load(Ordering::SeqCst));
    assert!(before > 200 && after > 200, "{before} {after}");
    let mut expected = expected(rounds);
    expected.insert("bound".to_owned(), 1);
    assert_eq!(held(&agent), expected);
}

#[test]
fn nor_do_cuts_of_the_async_client() {
    let agent = Agent::start();
    let cutter = Cutter::start(&agent);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rounds = runtime.block_on(async {
        let client = AsyncClient::connect(&cutter.options()).await.unwrap();
        let mut rounds = 0;
        while cutter.cuts() < 300 {
            let (old, new) = (format!("old{rounds}"), format!("new{rounds}"));
            let added = client.add(&key(&old)).await.unwrap();
            assert!(added.created && added.version == 1);
            let name = KeyRef::Name(&old);
            // Two at a time.
            let (rotated, sealed) = tokio::join!(client.rotate(name), client.encrypt(name, NO, b"text"));
            assert_eq!(rotated.unwrap().version, 2);
            assert_eq!(client.rename(name, &new).await.unwrap().id, added.id);
            let opened = client.decrypt(KeyRef::Id(added.id), NO, &sealed.unwrap()).await.unwrap();
            assert_eq!(opened.expose_secret(), b"text");
            if rounds % 2 == 1 {
                client.remove(KeyRef::Name(&new)).await.unwrap();
            }
            rounds += 1;
        }
        rounds
    });
    assert_eq!(held(&agent), expected(rounds));
}
