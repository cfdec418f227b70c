//! The async client: one connection that any number of tasks share, on tokio.
//!
//! Owns the task that moves the bytes; requests, replies and what happens when the connection breaks are those of the blocking client
//! (`operations`, `exchange`). Connecting, with every check of who serves, is the blocking code too, on a thread of the runtime.

use std::{
    collections::HashMap,
    io::IoSlice,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kms_envelope::{ContextRef, DIGEST_LEN, INPUT_TAG_LEN, KEY_LEN, STREAM_HEAD_LEN};
use kms_protocol::{
    Added, Bound, Description, Exported, KeyRef, KeyRow, LockState, Removed, RemovedAll, Renamed, Rotated,
    StatsReply, StatusReply, Verified, Welcome,
};
use kms_secret_memory::{Secret, SecretVec};
use tokio::{
    io::{Interest, Ready},
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::spawn_blocking,
    time::{sleep, sleep_until},
};

use crate::{
    client::{NewKey, Options, ROWS_MAX},
    connection::{Call, Connection, Route, receive_now, send_now},
    error::{Error, ReplyError},
    exchange::{Done, Exchange},
    operations::{self, DataKey, Expect, Moved, Operation, Read},
    stream::{LocalOpening, LocalSealing},
    sys,
    wire::Outgoing,
};

/// Requests that wait for the task to take them up; more wait in their own tasks.
const QUEUED_MAX: usize = 64;

/// A client for any number of tasks at a time; clones share the connection.
///
/// It does what [`Client`](crate::Client) does, with the same options, and its methods are those of the same name there. Requests are
/// under way together, as many as the agent takes, and answered in any order: what has to happen after something else is asked for when
/// the other has returned.
///
/// **Cancel-safe.** A future that is dropped leaves the connection as it is: the answer is thrown away when it comes. Whether the
/// operation was carried out is then unknown.
///
/// **One late answer ends the connection.** An operation whose answer takes longer than [`Options::timeout`] fails, and those that were
/// under way beside it go on over a new connection, as far as [`Options::retry`] allows.
///
/// Made within a tokio runtime with its I/O and time enabled, on which it keeps one task until the last clone is dropped. After a fork,
/// a runtime of the child's own is needed; the parent's connection is not used.
///
/// Batches and streams through the agent are left to the blocking client. The streams that this client hands out are moved by
/// blocking calls, [`LocalSealing::run`] and [`LocalOpening::run`], which belong into `spawn_blocking`.
///
/// ```no_run
/// use kms_client::{AsyncClient, ContextRef, KeyRef, Options};
/// # async fn example() -> Result<(), kms_client::Error> {
/// let client = AsyncClient::connect(&Options::default()).await?;
/// let key = KeyRef::Name("backup");
/// // Both are under way at a time.
/// let (one, two) =
///     tokio::try_join!(client.encrypt(key, ContextRef::EMPTY, b"one"), client.encrypt(key, ContextRef::EMPTY, b"two"))?;
/// # let _ = (one, two);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct AsyncClient {
    shared: Arc<Shared>,
}

struct Shared {
    route: Route,
    retry: Duration,
    link: Mutex<Link>,
    seen: Arc<Mutex<Seen>>,
}

/// The task, and whose it is.
struct Link {
    process: u64,
    requests: mpsc::Sender<(Outgoing, Box<dyn Asker>)>,
}

/// What the agent said of itself when it was last connected to.
#[derive(Clone)]
struct Seen {
    welcome: Arc<Welcome>,
    server_uid: u32,
}

/// A lock is held for as long as a value takes to be copied, so what a panic left behind is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncClient {
    /// As [`Client::connect`](crate::Client::connect).
    ///
    /// # Errors
    /// As there; [`Error::Thread`] when the runtime has no thread for it.
    pub async fn connect(options: &Options) -> Result<Self, Error> {
        let route = Route::find(options)?;
        let connection = connect(route.clone()).await?;
        let seen = Seen { welcome: Arc::new(connection.welcome.clone()), server_uid: connection.server.uid };
        let seen = Arc::new(Mutex::new(seen));
        let socket = adopt(connection)?;
        let link = start(&route, options.retry, &seen, Some(socket));
        Ok(Self { shared: Arc::new(Shared { route, retry: options.retry, link: Mutex::new(link), seen }) })
    }

    /// The socket of the agent.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.shared.route.path
    }

    /// The uid of the agent.
    #[must_use]
    pub fn server_uid(&self) -> u32 {
        locked(&self.shared.seen).server_uid
    }

    /// What the agent said it speaks and takes.
    #[must_use]
    pub fn welcome(&self) -> Arc<Welcome> {
        Arc::clone(&locked(&self.shared.seen).welcome)
    }

    /// As [`Client::ping`](crate::Client::ping).
    ///
    /// # Errors
    /// As every operation: [`Error::Refused`], or a failure of the connection.
    pub async fn ping(&self) -> Result<(), Error> {
        self.run(operations::ping()).await
    }

    /// As [`Client::status`](crate::Client::status).
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub async fn status(&self) -> Result<StatusReply, Error> {
        self.run(operations::status()).await
    }

    /// As [`Client::is_locked`](crate::Client::is_locked).
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub async fn is_locked(&self) -> Result<bool, Error> {
        Ok(self.status().await?.state == LockState::Locked)
    }

    /// As [`Client::stats`](crate::Client::stats).
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub async fn stats(&self) -> Result<StatsReply, Error> {
        self.run(operations::stats()).await
    }

    /// As [`Client::add`](crate::Client::add).
    ///
    /// # Errors
    /// As there.
    pub async fn add(&self, key: &NewKey<'_>) -> Result<Added, Error> {
        self.run(operations::add(key)?).await
    }

    /// Every key, from as many pages as it takes.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub async fn list(&self) -> Result<Vec<KeyRow>, Error> {
        let mut keys = Vec::new();
        let (mut cursor, mut pages) = (0, 0_u64);
        loop {
            let page = self.run(operations::list(cursor)).await?;
            pages = pages.saturating_add(1);
            keys.extend(page.keys);
            if page.next == 0 {
                return Ok(keys);
            }
            if page.next == cursor || pages.saturating_add(keys.len() as u64) > ROWS_MAX {
                return Err(ReplyError::Pages.into());
            }
            cursor = page.next;
        }
    }

    /// As [`Client::describe`](crate::Client::describe).
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub async fn describe(&self, key: KeyRef<'_>) -> Result<Description, Error> {
        let mut whole = self.run(operations::describe(key, 0)).await?;
        while whole.more {
            let last = whole.versions.last().map_or(0, |row| row.version);
            let page = self.run(operations::describe(KeyRef::Id(whole.key.id), last)).await?;
            if whole.versions.len() as u64 > ROWS_MAX {
                return Err(ReplyError::Pages.into());
            }
            whole.versions.extend(page.versions);
            whole.more = page.more;
        }
        Ok(whole)
    }

    /// As [`Client::remove`](crate::Client::remove).
    ///
    /// # Errors
    /// As there.
    pub async fn remove(&self, key: KeyRef<'_>) -> Result<Removed, Error> {
        self.run(operations::remove(key)?).await
    }

    /// As [`Client::remove_all`](crate::Client::remove_all).
    ///
    /// # Errors
    /// As there.
    pub async fn remove_all(&self) -> Result<RemovedAll, Error> {
        self.run(operations::remove_all()?).await
    }

    /// As [`Client::rotate`](crate::Client::rotate).
    ///
    /// # Errors
    /// As there.
    pub async fn rotate(&self, key: KeyRef<'_>) -> Result<Rotated, Error> {
        self.run(operations::rotate(key)?).await
    }

    /// As [`Client::rename`](crate::Client::rename).
    ///
    /// # Errors
    /// As there.
    pub async fn rename(&self, key: KeyRef<'_>, name: &str) -> Result<Renamed, Error> {
        self.run(operations::rename(key, name)?).await
    }

    /// As [`Client::export`](crate::Client::export).
    ///
    /// # Errors
    /// As there.
    pub async fn export(
        &self,
        key: KeyRef<'_>,
        version: Option<u32>,
        passphrase: Option<&SecretVec>,
    ) -> Result<(Exported, Secret<KEY_LEN>), Error> {
        self.run(operations::export(key, version, passphrase)?).await
    }

    /// As [`Client::encrypt`](crate::Client::encrypt).
    ///
    /// # Errors
    /// As there.
    pub async fn encrypt(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.run(operations::encrypt(key, context, plaintext)?).await
    }

    /// As [`Client::decrypt`](crate::Client::decrypt).
    ///
    /// # Errors
    /// As there.
    pub async fn decrypt(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<SecretVec, Error> {
        self.run(operations::decrypt(key, context, ciphertext)?).await
    }

    /// As [`Client::wrap`](crate::Client::wrap).
    ///
    /// # Errors
    /// As there.
    pub async fn wrap(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.run(operations::wrap(key, context, plaintext)?).await
    }

    /// As [`Client::unwrap`](crate::Client::unwrap).
    ///
    /// # Errors
    /// As there.
    pub async fn unwrap(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<SecretVec, Error> {
        self.run(operations::unwrap(key, context, ciphertext)?).await
    }

    /// As [`Client::data_key`](crate::Client::data_key).
    ///
    /// # Errors
    /// As there.
    pub async fn data_key(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        length: u32,
    ) -> Result<DataKey, Error> {
        self.run(operations::data_key(key, context, length)?).await
    }

    /// As [`Client::data_key_wrapped`](crate::Client::data_key_wrapped).
    ///
    /// # Errors
    /// As there.
    pub async fn data_key_wrapped(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        length: u32,
    ) -> Result<Vec<u8>, Error> {
        self.run(operations::data_key_wrapped(key, context, length)?).await
    }

    /// As [`Client::rewrap`](crate::Client::rewrap).
    ///
    /// # Errors
    /// As there.
    pub async fn rewrap(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
        to: Option<KeyRef<'_>>,
    ) -> Result<Moved, Error> {
        self.run(operations::rewrap(key, context, ciphertext, to)).await
    }

    /// As [`Client::verify`](crate::Client::verify).
    ///
    /// # Errors
    /// As there.
    pub async fn verify(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<Verified, Error> {
        self.run(operations::verify(key, context, ciphertext)).await
    }

    /// As [`Client::mac`](crate::Client::mac).
    ///
    /// # Errors
    /// As there.
    pub async fn mac(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        digest: &[u8; DIGEST_LEN],
    ) -> Result<[u8; INPUT_TAG_LEN], Error> {
        self.run(operations::mac(key, context, digest)).await
    }

    /// As [`Client::mac_verify`](crate::Client::mac_verify).
    ///
    /// # Errors
    /// As there.
    pub async fn mac_verify(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        tag: &[u8; INPUT_TAG_LEN],
        digest: &[u8; DIGEST_LEN],
    ) -> Result<(), Error> {
        self.run(operations::mac_verify(key, context, &operations::tagged(tag, digest))).await
    }

    /// As [`Client::random`](crate::Client::random).
    ///
    /// # Errors
    /// As there.
    pub async fn random(&self, length: u32) -> Result<SecretVec, Error> {
        self.run(operations::random(length)?).await
    }

    /// As [`Client::bind`](crate::Client::bind). The number is that of every clone.
    ///
    /// # Errors
    /// As there.
    pub async fn bind(&self, number: u32, key: KeyRef<'_>) -> Result<Bound, Error> {
        self.run(operations::bind(number, key)).await
    }

    /// As [`Client::stream_new`](crate::Client::stream_new).
    ///
    /// # Errors
    /// As there.
    pub async fn stream_new(&self, key: KeyRef<'_>, context: ContextRef<'_>) -> Result<LocalSealing, Error> {
        self.run(operations::stream_new(key, context)).await
    }

    /// As [`Client::stream_open`](crate::Client::stream_open).
    ///
    /// # Errors
    /// As there.
    pub async fn stream_open(
        &self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        head: &[u8; STREAM_HEAD_LEN],
    ) -> Result<LocalOpening, Error> {
        self.run(operations::stream_open(key, context, head)).await
    }

    /// As [`Client::lock`](crate::Client::lock).
    ///
    /// # Errors
    /// As there.
    pub async fn lock(&self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.run(operations::lock(passphrase)?).await
    }

    /// As [`Client::unlock`](crate::Client::unlock).
    ///
    /// # Errors
    /// As there.
    pub async fn unlock(&self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.run(operations::unlock(passphrase)?).await
    }

    /// Hands a request to the task and waits for what was asked for.
    fn run<T: Send + 'static>(
        &self,
        operation: Operation<'_, T>,
    ) -> impl Future<Output = Result<T, Error>> + Send + use<'_, T> {
        // Nothing that the caller lent is held while it waits.
        let Operation { request, expect, read } = operation;
        let request = Outgoing::new(&request);
        async move {
            let (answer, answered) = oneshot::channel();
            let asker = Box::new(Waiter { answer, expect, read });
            let requests = self.requests();
            requests.send((request?, asker)).await.map_err(|_| Error::Broken)?;
            drop(requests);
            // The task ends before its clients only with its runtime.
            answered.await.unwrap_or(Err(Error::Broken))
        }
    }

    /// The way to the task of this process.
    fn requests(&self) -> mpsc::Sender<(Outgoing, Box<dyn Asker>)> {
        let mut link = locked(&self.shared.link);
        if link.process != sys::lineage() {
            let ours = start(&self.shared.route, self.shared.retry, &self.shared.seen, None);
            // To drop our parent's end would wake its runtime, which the two of us share.
            std::mem::forget(std::mem::replace(&mut *link, ours));
        }
        link.requests.clone()
    }
}

/// Whoever waits for an answer, or did.
trait Asker: Send {
    /// Nobody waits any more.
    fn is_gone(&self) -> bool;
    /// Takes the answer. An error means that it makes no sense, and whoever waited knows.
    fn answer(self: Box<Self>, answer: Result<Call, Error>) -> Result<(), ReplyError>;
}

struct Waiter<T> {
    answer: oneshot::Sender<Result<T, Error>>,
    expect: Expect,
    read: Read<T>,
}

impl<T: Send> Asker for Waiter<T> {
    fn is_gone(&self) -> bool {
        self.answer.is_closed()
    }

    fn answer(self: Box<Self>, answer: Result<Call, Error>) -> Result<(), ReplyError> {
        let Self { answer: to, expect, read } = *self;
        let brought = answer.and_then(|call| Ok(read(call.accept()?, &expect)?));
        let sense = match &brought {
            Err(Error::Reply(error)) => Err(*error),
            _ => Ok(()),
        };
        // Whoever has gone wants no answer.
        let _ = to.send(brought);
        sense
    }
}

/// Connects where blocking is allowed.
async fn connect(route: Route) -> Result<Connection, Error> {
    let connected = spawn_blocking(move || route.connect()).await;
    connected.unwrap_or_else(|error| Err(Error::Thread(std::io::Error::other(error))))
}

/// Gives a connection that has had its hello to the runtime.
fn adopt(connection: Connection) -> Result<UnixStream, Error> {
    let adopt = |socket: OwnedFd| {
        let socket = StdStream::from(socket);
        socket.set_nonblocking(true)?;
        UnixStream::from_std(socket)
    };
    connection.into_socket().and_then(|socket| adopt(socket).map_err(Error::Connection))
}

/// Starts the task.
fn start(route: &Route, retry: Duration, seen: &Arc<Mutex<Seen>>, socket: Option<UnixStream>) -> Link {
    let (requests, taken) = mpsc::channel(QUEUED_MAX);
    let welcome = Arc::clone(&locked(seen).welcome);
    let exchange = Exchange::new(&welcome, route.timeout, retry, HashMap::new());
    let attendant = Attendant {
        route: route.clone(),
        seen: Arc::clone(seen),
        exchange,
        socket,
        pause: Duration::ZERO,
        once: retry.is_zero(),
        over: false,
    };
    tokio::spawn(attendant.run(taken));
    Link { process: sys::lineage(), requests }
}

/// What moves the bytes.
struct Attendant {
    route: Route,
    seen: Arc<Mutex<Seen>>,
    exchange: Exchange<Box<dyn Asker>>,
    socket: Option<UnixStream>,
    /// Before the next attempt to connect.
    pause: Duration,
    /// A connection that broke is not made anew.
    once: bool,
    over: bool,
}

impl Attendant {
    async fn run(mut self, mut requests: mpsc::Receiver<(Outgoing, Box<dyn Asker>)>) {
        loop {
            if self.exchange.due(Instant::now()) {
                self.lose(&Error::Closed);
            }
            self.hand_out();
            if self.socket.is_none() && self.exchange.len() > 0 {
                self.reconnect().await;
                continue;
            }
            let wake = self.exchange.wake().map(Into::into);
            tokio::select! {
                request = requests.recv(), if !self.exchange.is_full() => match request {
                    Some((request, asker)) => self.exchange.start(request, asker),
                    // Whoever could ask is gone, and with them whoever waited.
                    None => return,
                },
                ready = ready(self.socket.as_ref(), self.exchange.to_send() > 0) => {
                    if let Err(error) = ready.and_then(|ready| self.move_bytes(ready)) {
                        self.lose(&error);
                    }
                }
                () = until(wake) => {}
            }
        }
    }

    /// Answers those whose requests are over.
    fn hand_out(&mut self) {
        while let Some(Done { keep, answer }) = self.exchange.take() {
            if let Err(error) = keep.answer(answer) {
                self.lose(&error.into());
            }
        }
    }

    fn lose(&mut self, error: &Error) {
        self.socket = None;
        self.over = self.once;
        self.pause = self.exchange.broke(Instant::now(), error, |asker| !asker.is_gone());
    }

    async fn reconnect(&mut self) {
        if self.over {
            return self.lose(&Error::Broken);
        }
        sleep(self.pause).await;
        match connect(self.route.clone()).await {
            Ok(connection) => {
                let welcome = Arc::new(connection.welcome.clone());
                let server_uid = connection.server.uid;
                match adopt(connection) {
                    Ok(socket) => {
                        self.socket = Some(socket);
                        self.exchange.reconnected(&welcome);
                        *locked(&self.seen) = Seen { welcome, server_uid };
                    }
                    Err(error) => self.lose(&error),
                }
            }
            Err(error) => self.lose(&error),
        }
    }

    fn move_bytes(&mut self, ready: Ready) -> Result<(), Error> {
        let Some(socket) = &self.socket else { return Ok(()) };
        // What has come is taken first: an agent that cannot get rid of its answers takes no requests.
        if ready.is_readable() || ready.is_read_closed() {
            let room = self.exchange.room();
            if let Some(got) = attempt(socket, Interest::READABLE, || receive_now(socket, room))? {
                self.exchange.arrived(got, Instant::now())?;
            }
        }
        if ready.is_writable() || ready.is_write_closed() {
            let output = self.exchange.output();
            let slices: Vec<_> = output.iter().map(|frame| IoSlice::new(frame)).collect();
            if !slices.is_empty()
                && let Some(sent) = attempt(socket, Interest::WRITABLE, || send_now(socket, &slices))?
            {
                self.exchange.sent(sent, Instant::now());
            }
        }
        Ok(())
    }
}

/// Waits until bytes can go out or come in; for ever without a socket.
async fn ready(socket: Option<&UnixStream>, to_send: bool) -> Result<Ready, Error> {
    let Some(socket) = socket else { return std::future::pending().await };
    let interest = if to_send { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
    socket.ready(interest).await.map_err(Error::Connection)
}

async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Moves bytes in a way that the runtime learns from when there was nothing to move.
fn attempt(
    socket: &UnixStream,
    interest: Interest,
    mut moved: impl FnMut() -> Result<Option<usize>, Error>,
) -> Result<Option<usize>, Error> {
    let mut failed = None;
    let done = socket.try_io(interest, || match moved() {
        Ok(Some(len)) => Ok(len),
        Ok(None) => Err(std::io::ErrorKind::WouldBlock.into()),
        Err(error) => {
            failed = Some(error);
            Err(std::io::ErrorKind::Other.into())
        }
    });
    match (done, failed) {
        (_, Some(error)) => Err(error),
        (Ok(len), None) => Ok(Some(len)),
        (Err(error), None) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        (Err(error), None) => Err(Error::Connection(error)),
    }
}
