//! The blocking client: one connection, one request at a time (`docs/protocol.md`, sections 4 and 5).
//!
//! Owns the way of a request to its answer; what is sent and what is taken for an answer is in `operations`. Keys and plaintext
//! arrive in memory that is wiped.

use std::{
    collections::{HashMap, VecDeque},
    num::NonZeroU64,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kms_envelope::{ContextRef, DIGEST_LEN, INPUT_TAG_LEN, KEY_LEN, STREAM_HEAD_LEN};
use kms_protocol::{
    Added, Bound, Description, Exported, KeyRef, KeyRow, Listed, LockState, Opcode, Removed, RemovedAll,
    Renamed, Request, Rotated, StatsReply, Status, StatusReply, Verified, Welcome,
};
use kms_secret_memory::{Secret, SecretVec};

use crate::{
    connection::{Call, Connection, Route, Unanswered, pause_for},
    error::{Error, ReplyError},
    operations::{self, DataKey, Moved, Operation},
    remote::{RemoteOpening, RemoteSealing},
    retry::{Pauses, Trouble, is_passing},
    stream::{LocalOpening, LocalSealing},
    wire,
};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long an operation goes on over broken connections: an agent that is started anew is there again by then.
const RETRY: Duration = Duration::from_secs(5);

/// How long an answer may take for which the agent has to put a passphrase through a function that is slow on purpose.
const PASSPHRASE_ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Rows that one listing or description may have: an agent's ceiling is a million keys, and pages that never end must end.
pub(crate) const ROWS_MAX: u64 = 1 << 24;

/// How the agent is found and how long it is waited for.
///
/// ```no_run
/// use kms_client::{Client, Options};
/// use std::time::Duration;
/// # fn main() -> Result<(), kms_client::Error> {
/// // Over a restart of the agent that takes half a minute.
/// let mut client = Client::connect(&Options { retry: Duration::from_secs(30), ..Options::default() })?;
/// println!("agent of uid {} at {}", client.server_uid(), client.socket().display());
/// for value in client.stats()?.values {
///     println!("{} {}", value.name, value.value);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket. Else `KMS_AUTH_SOCK`, the user's socket, the system's.
    pub socket: Option<PathBuf>,
    /// A uid that may serve, besides our own, root, and whoever root gave the socket's directory to.
    pub server_uid: Option<u32>,
    /// How long an answer may take; `lock`, `unlock` and `export` are given at least two minutes.
    pub timeout: Duration,
    /// How long an operation goes on after its connection broke or the agent was busy: it connects anew, checks anew who serves,
    /// binds anew the numbers that it uses, and sends the same bytes again. What makes or changes a key is known to the agent by its
    /// token and is not done twice. What does not change a key is simply asked for again, and may count as one more use of a key with
    /// `max_uses`. Not repeated, once sent: [`Client::lock`], [`Client::unlock`], and streams through the agent. A refusal other than
    /// `busy` is never repeated. Zero: one connection, one attempt.
    pub retry: Duration,
}

impl Default for Options {
    /// Nothing named, 10 seconds for an answer, 5 seconds of retry.
    fn default() -> Self {
        Self { socket: None, server_uid: None, timeout: ANSWER_LIMIT, retry: RETRY }
    }
}

/// A connection to the agent.
///
/// ```no_run
/// use kms_client::{Client, EncryptionContext, Input, KeyRef, Options, Output};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = Client::connect(&Options::default())?;
/// let context = EncryptionContext::from_pairs([("table", "people")])?;
///
/// // Small values go to the agent and come back sealed.
/// let sealed = client.encrypt(KeyRef::Name("backup"), context.as_ref(), b"a small secret")?;
/// let opened = client.decrypt(KeyRef::Name("backup"), context.as_ref(), &sealed)?;
/// assert_eq!(opened.expose_secret(), b"a small secret");
///
/// // Files stay here: the agent hands out the key of one stream, and all cores seal it.
/// let stream = client.stream_new(KeyRef::Name("backup"), context.as_ref())?;
/// let output = std::fs::File::create("dump.kms")?;
/// stream.run(Input::from_file(std::fs::File::open("dump")?)?, Output::to_new_file(output), &())?;
/// # Ok(())
/// # }
/// ```
pub struct Client {
    pub(crate) connection: Connection,
    pub(crate) route: Route,
    pub(crate) retry: Duration,
    pub(crate) bindings: HashMap<u32, Binding>,
}

/// A number that stands for a key.
#[derive(Clone, Copy)]
pub(crate) struct Binding {
    pub(crate) id: [u8; 16],
    /// The agent knows it on the connection that there is now.
    pub(crate) here: bool,
}

impl Client {
    /// Finds the agent, checks who serves, and says hello. Nothing is sent to a server that is not trusted.
    ///
    /// A process that inherits a client over a fork never uses its connection: the first operation connects anew.
    ///
    /// # Errors
    /// No agent, an agent that is not trusted or does not answer ([`Error::exit_code`] 2), or one that refuses the hello.
    pub fn connect(options: &Options) -> Result<Self, Error> {
        let route = Route::find(options)?;
        let connection = route.connect()?;
        Ok(Self { connection, route, retry: options.retry, bindings: HashMap::new() })
    }

    /// The socket of the agent.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.route.path
    }

    /// The uid of the agent.
    #[must_use]
    pub fn server_uid(&self) -> u32 {
        self.connection.server.uid
    }

    /// The process that answered the hello, unless it is outside our pid namespace. The number is worth something to whoever
    /// opened a pidfd of it before: by now the process may have ended.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        u32::try_from(self.connection.server.pid).ok().filter(|pid| *pid != 0)
    }

    /// What the agent said it speaks and takes.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.connection.welcome
    }

    /// Asks whether the agent is there; it answers while locked, too.
    ///
    /// # Errors
    /// As every operation: [`Error::Refused`], or a failure of the connection.
    pub fn ping(&mut self) -> Result<(), Error> {
        self.run(&operations::ping())
    }

    /// The state of the agent.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn status(&mut self) -> Result<StatusReply, Error> {
        self.run(&operations::status())
    }

    /// Counters since the start of the agent.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn stats(&mut self) -> Result<StatsReply, Error> {
        self.run(&operations::stats())
    }

    /// Makes or imports a key.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `exists` for a name that is taken; [`Error::Random`].
    pub fn add(&mut self, key: &NewKey<'_>) -> Result<Added, Error> {
        self.run(&operations::add(key)?)
    }

    /// Every key, page by page.
    #[must_use]
    pub fn list(&mut self) -> Keys<'_> {
        Keys { client: self, page: VecDeque::new(), cursor: Some(0), rows: 0 }
    }

    /// One key with all of its versions.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn describe(&mut self, key: KeyRef<'_>) -> Result<Description, Error> {
        let mut whole = self.run(&operations::describe(key, 0))?;
        while whole.more {
            let last = whole.versions.last().map_or(0, |row| row.version);
            // By its id: the name may have gone to another key meanwhile.
            let page = self.run(&operations::describe(KeyRef::Id(whole.key.id), last))?;
            if whole.versions.len() as u64 > ROWS_MAX {
                return Err(self.disbelieve(ReplyError::Pages));
            }
            whole.versions.extend(page.versions);
            whole.more = page.more;
        }
        Ok(whole)
    }

    /// Takes a key away.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::Random`].
    pub fn remove(&mut self, key: KeyRef<'_>) -> Result<Removed, Error> {
        self.run(&operations::remove(key)?)
    }

    /// Takes every key away that lives in memory only.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::Random`].
    pub fn remove_all(&mut self) -> Result<RemovedAll, Error> {
        self.run(&operations::remove_all()?)
    }

    /// Adds a version to a key, under which everything new is done. The older ones open what was made under them.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{KeyRef, NewKey};
    ///
    /// let added = client.add(&NewKey { memory_only: true, ..NewKey::new("backup") })?;
    /// assert_eq!(client.rotate(KeyRef::Name("backup"))?.version, 2);
    /// // By its id a key is found under any name.
    /// client.rename(KeyRef::Id(added.id), "backup-2026")?;
    /// for version in client.describe(KeyRef::Id(added.id))?.versions {
    ///     println!("version {} was used {} times", version.version, version.uses);
    /// }
    /// for key in client.list() {
    ///     println!("{}", key?.name);
    /// }
    /// client.remove(KeyRef::Id(added.id))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `limit` when the agent holds no more versions; [`Error::Random`].
    pub fn rotate(&mut self, key: KeyRef<'_>) -> Result<Rotated, Error> {
        self.run(&operations::rotate(key)?)
    }

    /// Gives a key another name. What was made under it stays.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `exists` for a name that is taken; [`Error::Random`].
    pub fn rename(&mut self, key: KeyRef<'_>, name: &str) -> Result<Renamed, Error> {
        self.run(&operations::rename(key, name)?)
    }

    /// The bytes of a key that was added to be exportable; without a version, of its primary one. An agent that was locked before
    /// wants the passphrase of that lock.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{KeyRef, NewKey};
    ///
    /// client.add(&NewKey { exportable: true, ..NewKey::new("escrow") })?;
    /// let (exported, key) = client.export(KeyRef::Name("escrow"), None, None)?;
    /// println!("version {}: {} bytes", exported.version, key.expose_secret().len());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `denied` for a key that is not exportable and for a wrong passphrase; [`Error::TooLong`].
    pub fn export(
        &mut self,
        key: KeyRef<'_>,
        version: Option<u32>,
        passphrase: Option<&SecretVec>,
    ) -> Result<(Exported, Secret<KEY_LEN>), Error> {
        self.run(&operations::export(key, version, passphrase)?)
    }

    /// Seals up to 64 KiB in the agent, as a message.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn encrypt(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.run(&operations::encrypt(key, context, plaintext)?)
    }

    /// Opens a message in the agent.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::InvalidCiphertext`] for a length that no message has.
    pub fn decrypt(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<SecretVec, Error> {
        self.run(&operations::decrypt(key, context, ciphertext)?)
    }

    /// Seals a key of the caller's, 1 byte to 64 KiB of any form.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn wrap(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.run(&operations::wrap(key, context, plaintext)?)
    }

    /// Opens a wrapped key, or the wrapped form of a data key.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::InvalidCiphertext`] for a length that no wrapped key has.
    pub fn unwrap(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<SecretVec, Error> {
        self.run(&operations::unwrap(key, context, ciphertext)?)
    }

    /// A new data key of 1 to 1,024 bytes, plain and wrapped.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{ContextRef, KeyRef};
    ///
    /// // Encrypt with the plain one, keep the wrapped one beside what was encrypted.
    /// let fresh = client.data_key(KeyRef::Name("backup"), ContextRef::EMPTY, 32)?;
    /// let again = client.unwrap(KeyRef::Name("backup"), ContextRef::EMPTY, &fresh.wrapped)?;
    /// assert_eq!(again.expose_secret(), fresh.plaintext.expose_secret());
    /// // A key that is there already is wrapped as it is.
    /// let wrapped = client.wrap(KeyRef::Name("backup"), ContextRef::EMPTY, b"a key of another program")?;
    /// # let _ = wrapped;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn data_key(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        length: u32,
    ) -> Result<DataKey, Error> {
        self.run(&operations::data_key(key, context, length)?)
    }

    /// A new data key of 1 to 1,024 bytes, wrapped only: nobody sees it before it is unwrapped.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn data_key_wrapped(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        length: u32,
    ) -> Result<Vec<u8>, Error> {
        self.run(&operations::data_key_wrapped(key, context, length)?)
    }

    /// Moves a message, a wrapped key, or a stream by its first 132 bytes, to the primary version of its key or of the key `to`.
    /// The content stays in the agent. A stream is moved with an empty context.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{ContextRef, KeyRef};
    /// use std::os::unix::fs::FileExt;
    ///
    /// let key = KeyRef::Name("backup");
    /// let mut sealed = client.encrypt(key, ContextRef::EMPTY, b"a small secret")?;
    /// client.rotate(key)?;
    /// if let Some(moved) = client.rewrap(key, ContextRef::EMPTY, &sealed, None)?.replacement {
    ///     sealed = moved;
    /// }
    /// assert_eq!(client.verify(key, ContextRef::EMPTY, &sealed)?.version, 2);
    ///
    /// // Of a file, however long, 132 bytes.
    /// let file = std::fs::File::options().read(true).write(true).open("dump.kms")?;
    /// let mut head = [0; 132];
    /// file.read_exact_at(&mut head, 0)?;
    /// if let Some(moved) = client.rewrap(key, ContextRef::EMPTY, &head, Some(KeyRef::Name("new")))?.replacement {
    ///     file.write_all_at(&moved, 0)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn rewrap(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
        to: Option<KeyRef<'_>>,
    ) -> Result<Moved, Error> {
        self.run(&operations::rewrap(key, context, ciphertext, to))
    }

    /// Whether a message, a wrapped key, or a stream by its head of 188 bytes, opens; its content does not come back.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `invalid-ciphertext` when it does not.
    pub fn verify(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        ciphertext: &[u8],
    ) -> Result<Verified, Error> {
        self.run(&operations::verify(key, context, ciphertext))
    }

    /// The tag of an input, by its SHA-512.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// # fn sha_512(_: &[u8]) -> [u8; 64] { [0; 64] }
    /// use kms_client::{ContextRef, KeyRef};
    ///
    /// let digest = sha_512(b"an input of any length");
    /// let tag = client.mac(KeyRef::Name("audit"), ContextRef::EMPTY, &digest)?;
    /// client.mac_verify(KeyRef::Name("audit"), ContextRef::EMPTY, &tag, &digest)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn mac(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        digest: &[u8; DIGEST_LEN],
    ) -> Result<[u8; INPUT_TAG_LEN], Error> {
        self.run(&operations::mac(key, context, digest))
    }

    /// Whether a tag is that of the input with this SHA-512.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `invalid-ciphertext` when it is not.
    pub fn mac_verify(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        tag: &[u8; INPUT_TAG_LEN],
        digest: &[u8; DIGEST_LEN],
    ) -> Result<(), Error> {
        self.run(&operations::mac_verify(key, context, &operations::tagged(tag, digest)))
    }

    /// Up to 64 KiB of the machine's random bytes.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn random(&mut self, length: u32) -> Result<SecretVec, Error> {
        self.run(&operations::random(length)?)
    }

    /// Gives a key a number, [`KeyRef::Bound`], which is shorter than a name and spares the agent the search. It stands for that very
    /// key, whatever its name becomes, also after the client had to connect anew.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{ContextRef, KeyRef};
    ///
    /// client.bind(1, KeyRef::Name("backup"))?;
    /// for row in ["first", "second"] {
    ///     client.encrypt(KeyRef::Bound(1), ContextRef::EMPTY, row.as_bytes())?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `limit` for the 1,025th number.
    pub fn bind(&mut self, number: u32, key: KeyRef<'_>) -> Result<Bound, Error> {
        let bound = self.run(&operations::bind(number, key))?;
        self.bindings.insert(number, Binding { id: bound.id, here: true });
        Ok(bound)
    }

    /// A new stream, whose data stays in this process.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn stream_new(&mut self, key: KeyRef<'_>, context: ContextRef<'_>) -> Result<LocalSealing, Error> {
        self.run(&operations::stream_new(key, context))
    }

    /// Opens a stream, whose data stays in this process. Both commitments were checked when this returns.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn stream_open(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        head: &[u8; STREAM_HEAD_LEN],
    ) -> Result<LocalOpening, Error> {
        self.run(&operations::stream_open(key, context, head))
    }

    /// A new stream, whose data goes through the agent.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::{ContextRef, Input, KeyRef, Output};
    /// use std::fs::File;
    ///
    /// let stream = client.remote_stream_new(KeyRef::Name("backup"), ContextRef::EMPTY)?;
    /// let output = Output::to_new_file(File::create("dump.kms")?);
    /// stream.run(Input::from_file(File::open("dump")?)?, output, &())?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn remote_stream_new(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
    ) -> Result<RemoteSealing<'_>, Error> {
        let (stream, head) = self.run(&operations::remote_stream_new(key, context))?;
        Ok(RemoteSealing::new(self, stream, head))
    }

    /// Opens a stream, whose data goes through the agent. Both commitments were checked when this returns.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn remote_stream_open(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        head: &[u8; STREAM_HEAD_LEN],
    ) -> Result<RemoteOpening<'_>, Error> {
        let stream = self.run(&operations::remote_stream_open(key, context, head))?;
        Ok(RemoteOpening::new(self, stream))
    }

    /// Locks the agent under a passphrase of 1 to 1,024 bytes. False: it was locked already.
    ///
    /// ```no_run
    /// # fn example(client: &mut kms_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use kms_client::SecretVec;
    ///
    /// let mut passphrase = SecretVec::with_capacity(64);
    /// passphrase.push_slice(b"correct horse battery staple")?;
    /// client.lock(&passphrase)?;
    /// assert!(client.is_locked()?);
    /// client.unlock(&passphrase)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn lock(&mut self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.run(&operations::lock(passphrase)?)
    }

    /// Ends the lock. False: it was not locked.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `denied` for a wrong passphrase; [`Error::TooLong`].
    pub fn unlock(&mut self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.run(&operations::unlock(passphrase)?)
    }

    /// Whether the agent is locked.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn is_locked(&mut self) -> Result<bool, Error> {
        Ok(self.status()?.state == LockState::Locked)
    }

    /// Waits until the agent's time to ask again has come. Fails when the agent goes away meanwhile.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn wait(&mut self, time: Duration) -> Result<(), Error> {
        self.connection.wait(time)
    }

    /// Sends a request and takes what was asked for out of its reply.
    pub(crate) fn run<T>(&mut self, operation: &Operation<'_, T>) -> Result<T, Error> {
        let call = self.answer(&operation.request, &wire::bound_numbers(&operation.request))?;
        let done = call.accept().and_then(|reply| Ok((operation.read)(reply, &operation.expect)?));
        done.map_err(|error| match error {
            Error::Reply(error) => self.disbelieve(error),
            error => error,
        })
    }

    //= docs/protocol.md#tokens
    //# So a client whose connection broke connects anew and sends the same bytes again.
    /// The reply to a request that names these bound numbers, over as many connections as it takes.
    pub(crate) fn answer(&mut self, request: &Request<'_>, bound: &[Option<u32>]) -> Result<Call, Error> {
        let (mut trouble, mut pauses) = (Trouble::new(self.retry), Pauses::default());
        let mut frame = None;
        loop {
            let (pause, answer) = match self.attempt(request, bound, &mut frame) {
                Ok(call) => (
                    busy(call.accept().err().as_ref()).and_then(|after| trouble.busy(Instant::now(), after)),
                    Ok(call),
                ),
                Err(Unanswered { error, sent }) => {
                    let again = is_passing(&error) && (!sent || wire::is_repeatable(request.opcode()));
                    let pause = match busy(Some(&error)) {
                        Some(after) => trouble.busy(Instant::now(), after),
                        None if again => trouble.lost(Instant::now(), pauses.next()),
                        None => None,
                    };
                    (pause, Err(error))
                }
            };
            match pause {
                Some(time) => pause_for(time),
                None => return answer,
            }
        }
    }

    /// The frame is made once, with the first id that it gets.
    fn attempt(
        &mut self,
        request: &Request<'_>,
        bound: &[Option<u32>],
        frame: &mut Option<(u32, SecretVec)>,
    ) -> Result<Call, Unanswered> {
        let unsent = |error| Unanswered { error, sent: false };
        self.reconnect().map_err(unsent)?;
        let operation = request.opcode();
        //= docs/protocol.md#51-welcome
        //# A client MUST go by these numbers, not by those of this text, and MUST NOT send an opcode that is not listed.
        if !self.connection.welcome.opcodes.contains(&operation.code()) {
            let retry_after = Duration::ZERO;
            return Err(unsent(Error::Refused { operation, status: Status::Unsupported, retry_after }));
        }
        self.bind_anew(operation, bound).map_err(unsent)?;
        let max = self.connection.sender.frame_max;
        if frame.is_none() {
            let id = self.connection.sender.next_id();
            *frame = Some((id, wire::encode(request, id, max).map_err(unsent)?));
        }
        let frame = frame.as_ref().filter(|(_, frame)| frame.len() <= max);
        let (id, frame) = frame.ok_or_else(|| unsent(Error::TooLong { what: "request", max }))?;
        self.connection.ask(operation, *id, frame.expose_secret(), self.patience(operation))
    }

    fn patience(&self, operation: Opcode) -> Duration {
        answer_limit(operation, self.route.timeout)
    }

    /// Sees to a connection that can be used, and is ours. True: it is a new one.
    pub(crate) fn reconnect(&mut self) -> Result<bool, Error> {
        let inherited = self.connection.is_inherited();
        match self.connection.usable() {
            Err(_) if inherited || !self.retry.is_zero() => {
                // The old one is closed, and not shut down: it may be our parent's.
                self.connection = self.route.connect()?;
                self.bindings.values_mut().for_each(|binding| binding.here = false);
                Ok(true)
            }
            usable => usable.map(|()| false),
        }
    }

    /// Binds again the numbers that `operation` is about to use, by the ids of their keys.
    fn bind_anew(&mut self, operation: Opcode, bound: &[Option<u32>]) -> Result<(), Error> {
        for number in bound.iter().flatten() {
            let Some(binding) = self.bindings.get_mut(number).filter(|binding| !binding.here) else {
                continue;
            };
            let again = operations::bind(*number, KeyRef::Id(binding.id));
            let call = self.connection.call(&again.request, self.route.timeout)?;
            match call.accept().and_then(|reply| Ok((again.read)(reply, &again.expect)?)) {
                Ok(_) => binding.here = true,
                Err(Error::Refused { status, retry_after, .. }) => {
                    return Err(Error::Refused { operation, status, retry_after });
                }
                Err(error) => {
                    self.connection.break_off();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Ends the connection over answers that make no sense together.
    pub(crate) fn disbelieve(&mut self, error: ReplyError) -> Error {
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# A client that receives a frame that it cannot decode, a request id that it is not waiting for, a payload
        //# where none belongs, or one of another length
        //# than section 4 gives it MUST end the connection, and MUST NOT use any part of that reply.
        self.connection.break_off();
        error.into()
    }
}

/// How long the answer to `operation` may take.
pub(crate) fn answer_limit(operation: Opcode, timeout: Duration) -> Duration {
    match operation {
        Opcode::Lock | Opcode::Unlock | Opcode::Export => timeout.max(PASSPHRASE_ANSWER_LIMIT),
        _ => timeout,
    }
}

/// When a busy agent wants to be asked again.
fn busy(error: Option<&Error>) -> Option<Duration> {
    match error {
        Some(Error::Refused { status: Status::Busy, retry_after, .. }) => Some(*retry_after),
        _ => None,
    }
}

/// A key to be made. [`NewKey::new`] is one that the agent draws, with no restriction.
///
/// ```
/// use kms_client::NewKey;
/// use std::time::Duration;
///
/// let key = NewKey { memory_only: true, lifetime: Some(Duration::from_secs(3600)), ..NewKey::new("backup") };
/// # assert!(!key.exportable);
/// ```
#[derive(Clone, Copy)]
pub struct NewKey<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its 32 bytes; else the agent draws them.
    pub import: Option<&'a Secret<KEY_LEN>>,
    /// Never on disk.
    pub memory_only: bool,
    /// A key of that name is the answer, not an error.
    pub if_missing: bool,
    /// After which it is gone, in whole seconds, rounded down to no less than one.
    pub lifetime: Option<Duration>,
    /// A person is asked before each use.
    pub confirm: bool,
    /// How often it can be used.
    pub max_uses: Option<NonZeroU64>,
    /// Its bytes can be had with [`Client::export`].
    pub exportable: bool,
}

impl<'a> NewKey<'a> {
    /// A key of this name.
    #[must_use]
    pub const fn new(name: &'a str) -> Self {
        Self {
            name,
            import: None,
            memory_only: false,
            if_missing: false,
            lifetime: None,
            confirm: false,
            max_uses: None,
            exportable: false,
        }
    }
}

/// Every key of the agent, a page at a time; ends after the first error.
pub struct Keys<'a> {
    client: &'a mut Client,
    page: VecDeque<KeyRow>,
    cursor: Option<u64>,
    rows: u64,
}

impl Iterator for Keys<'_> {
    type Item = Result<KeyRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.page.pop_front() {
                return Some(Ok(row));
            }
            let cursor = self.cursor.take()?;
            let listed = match self.fetch(cursor) {
                Ok(listed) => listed,
                Err(error) => return Some(Err(error)),
            };
            // An empty page counts as a row: pages must not go on for ever either.
            self.rows = self.rows.saturating_add(1).saturating_add(listed.keys.len() as u64);
            if self.rows > ROWS_MAX || (listed.next != 0 && listed.next == cursor) {
                return Some(Err(self.client.disbelieve(ReplyError::Pages)));
            }
            self.cursor = Some(listed.next).filter(|next| *next != 0);
            self.page = listed.keys.into();
        }
    }
}

impl Keys<'_> {
    fn fetch(&mut self, cursor: u64) -> Result<Listed, Error> {
        self.client.run(&operations::list(cursor))
    }
}
