//! The blocking client: one connection, one request at a time (`docs/protocol.md`, sections 4 and 5).
//!
//! Owns the way of a request to its answer; what is sent and what is taken for an answer is in `operations`. Keys and plaintext
//! arrive in memory that is wiped.

use std::{
    collections::VecDeque,
    num::NonZeroU64,
    path::{Path, PathBuf},
    time::Duration,
};

use kms_envelope::{ContextRef, KEY_LEN, STREAM_HEAD_LEN};
use kms_protocol::{
    Added, Bound, Description, Exported, KeyRef, KeyRow, Listed, LockState, Opcode, Removed, RemovedAll,
    Renamed, Rotated, StatsReply, StatusReply, Verified, Welcome,
};
use kms_secret_memory::{Secret, SecretVec};

use crate::{
    connection::Connection,
    error::{Error, ReplyError},
    locate::{Surroundings, Trust, find},
    operations::{self, DIGEST_LEN, DataKey, MAC_LEN, Moved, Operation},
    remote::{RemoteOpening, RemoteSealing},
    stream::{LocalOpening, LocalSealing},
};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long an answer may take for which the agent has to put a passphrase through a function that is slow on purpose.
const PASSPHRASE_ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Rows that one listing or description may have: an agent's ceiling is a million keys, and pages that never end must end.
const ROWS_MAX: u64 = 1 << 24;

/// How the agent is found and how long it is waited for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket. Else `KMS_AUTH_SOCK`, the user's socket, the system's.
    pub socket: Option<PathBuf>,
    /// A uid that may serve, besides our own, root, and whoever root gave the socket's directory to.
    pub server_uid: Option<u32>,
    /// How long an answer may take; `lock` and `unlock` are given at least two minutes.
    pub timeout: Duration,
}

impl Default for Options {
    /// Nothing named, 10 seconds.
    fn default() -> Self {
        Self { socket: None, server_uid: None, timeout: ANSWER_LIMIT }
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
    pub(crate) timeout: Duration,
}

impl Client {
    /// Finds the agent, checks who serves, and says hello. Nothing is sent to a server that is not trusted.
    ///
    /// # Errors
    /// No agent, an agent that is not trusted or does not answer ([`Error::exit_code`] 2), or one that refuses the hello.
    pub fn connect(options: &Options) -> Result<Self, Error> {
        let surroundings = Surroundings::of_process();
        let path = find(options.socket.as_deref(), &surroundings)?;
        let trust = Trust::examine(&path, surroundings.uid, options.server_uid)?;
        let connection = Connection::open(&path, &trust, options.timeout)?;
        Ok(Self { connection, timeout: options.timeout })
    }

    /// The socket of the agent.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.connection.path
    }

    /// The uid of the agent.
    #[must_use]
    pub fn server_uid(&self) -> u32 {
        self.connection.server_uid
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
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn mac(
        &mut self,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        digest: &[u8; DIGEST_LEN],
    ) -> Result<[u8; MAC_LEN], Error> {
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
        tag: &[u8; MAC_LEN],
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

    /// Gives a key a number on this connection, [`KeyRef::Bound`], which is shorter than a name and spares the agent the search.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `limit` for the 1,025th number.
    pub fn bind(&mut self, number: u32, key: KeyRef<'_>) -> Result<Bound, Error> {
        self.run(&operations::bind(number, key))
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
        let limit = match operation.request.opcode() {
            Opcode::Lock | Opcode::Unlock | Opcode::Export => self.timeout.max(PASSPHRASE_ANSWER_LIMIT),
            _ => self.timeout,
        };
        let call = self.connection.call(&operation.request, limit)?;
        let done = call.accept().and_then(|reply| Ok((operation.read)(reply, &operation.expect)?));
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# A client that receives a frame that it cannot decode, a request id that it is not waiting for, or a payload where none belongs MUST end the
        //# connection, and MUST NOT use any part of that reply.
        done.inspect_err(|error| {
            if matches!(error, Error::Reply(_)) {
                self.connection.break_off();
            }
        })
    }

    /// Ends the connection over answers that make no sense together.
    fn disbelieve(&mut self, error: ReplyError) -> Error {
        self.connection.break_off();
        error.into()
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
