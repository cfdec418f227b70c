//! The blocking client: one connection, one request at a time (`docs/protocol.md`, sections 4 and 5).
//!
//! Owns what each operation sends and what its reply must look like. Keys and plaintext arrive in memory that is wiped.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::Duration,
};

use kms_envelope::{Body, ContextRef, KEY_LEN, MESSAGE_MAX, MessageKey, NONCE_LEN, STREAM_HEAD_LEN};
use kms_protocol::{
    Add, Added, Constraint, Describe, Description, KeyAndContext, KeyRef, KeyRow, List, Listed, LockState,
    Locking, Material, PASSPHRASE_MAX, Remove, Removed, Request, StatusReply, TOKEN_LEN, Welcome, constraint,
    decode_fields,
};
use kms_secret_memory::{Secret, SecretVec, zeroize_stack};

use crate::{
    connection::{Call, Connection},
    error::{Error, ReplyError},
    locate::{Surroundings, Trust, find},
    remote::{RemoteOpening, RemoteSealing},
    stream::{LocalOpening, LocalSealing},
};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long `lock` and `unlock` may take: the passphrase goes through a function that is slow on purpose.
const PASSPHRASE_ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Rows that one listing or description may have: an agent's ceiling is a million keys, and pages that never end must end.
const ROWS_MAX: u64 = 1 << 24;

/// Stack that an operation on a message key may have used, in bytes.
const STACK_USED: usize = 8192;

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
        let call = self.call(&Request::Ping)?;
        let kms_protocol::NoFields {} = call.accept()?.fields(decode_fields)?;
        Ok(())
    }

    /// The state of the agent.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn status(&mut self) -> Result<StatusReply, Error> {
        Ok(self.call(&Request::Status)?.accept()?.fields(decode_fields)?)
    }

    /// Makes or imports a key.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::Random`].
    pub fn add(&mut self, key: &NewKey<'_>) -> Result<Added, Error> {
        let constraints = match key.memory_only {
            true => vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }],
            false => Vec::new(),
        };
        let (material, bytes) = match key.import {
            Some(secret) => (Material::Import, secret.expose_secret().as_slice()),
            None => (Material::Generate, [].as_slice()),
        };
        let fields =
            Add { token: token()?, name: key.name, material, if_missing: key.if_missing, constraints };
        Ok(self.call(&Request::Add { fields, material: bytes })?.accept()?.fields(decode_fields)?)
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
        let mut whole = self.describe_after(key, 0)?;
        while whole.more {
            let last = whole.versions.last().map_or(0, |row| row.version);
            let page = self.describe_after(key, last)?;
            let ascending = page.versions.first().is_some_and(|row| row.version > last);
            if !ascending || whole.versions.len() as u64 > ROWS_MAX {
                return Err(ReplyError::Pages.into());
            }
            whole.versions.extend(page.versions);
            whole.more = page.more;
        }
        Ok(whole)
    }

    fn describe_after(&mut self, key: KeyRef<'_>, versions_after: u32) -> Result<Description, Error> {
        let call = self.call(&Request::Describe(Describe { key, versions_after }))?;
        Ok(call.accept()?.fields(decode_fields)?)
    }

    /// Takes a key away.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::Random`].
    pub fn remove(&mut self, key: KeyRef<'_>) -> Result<Removed, Error> {
        let call = self.call(&Request::Remove(Remove { token: token()?, key }))?;
        Ok(call.accept()?.fields(decode_fields)?)
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
        if plaintext.len() > MESSAGE_MAX {
            return Err(Error::TooLong { what: "message", max: MESSAGE_MAX });
        }
        let fields = KeyAndContext { key, context: context.as_bytes() };
        let call = self.call(&Request::Encrypt { fields, plaintext })?;
        let sealed = call.accept()?.payload()?;
        if sealed.len() != kms_envelope::message_len(plaintext.len()) {
            return Err(ReplyError::Shape.into());
        }
        Ok(sealed.to_owned())
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
        let len = kms_envelope::message_plaintext_len(ciphertext.len()).ok_or(Error::InvalidCiphertext)?;
        let fields = KeyAndContext { key, context: context.as_bytes() };
        let call = self.call(&Request::Decrypt { fields, ciphertext })?;
        let opened = call.accept()?.payload()?;
        if opened.len() != len {
            return Err(ReplyError::Shape.into());
        }
        let mut plaintext = SecretVec::with_capacity(len);
        plaintext.push_slice(opened).map_err(|_| ReplyError::Shape)?;
        Ok(plaintext)
    }

    /// A new stream, whose data stays in this process.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn stream_new(&mut self, key: KeyRef<'_>, context: ContextRef<'_>) -> Result<LocalSealing, Error> {
        let call = self.call(&Request::StreamNew(KeyAndContext { key, context: context.as_bytes() }))?;
        let payload = call.accept()?.payload()?;
        let (head, secrets) = payload.split_first_chunk::<STREAM_HEAD_LEN>().ok_or(ReplyError::Shape)?;
        let sealing = LocalSealing::new(*head, body(secrets)?);
        zeroize_stack::<STACK_USED>();
        Ok(sealing)
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
        let fields = KeyAndContext { key, context: context.as_bytes() };
        let call = self.call(&Request::StreamOpen { fields, head })?;
        let opening = LocalOpening::new(body(call.accept()?.payload()?)?);
        zeroize_stack::<STACK_USED>();
        Ok(opening)
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
        let call =
            self.call(&Request::RemoteStreamNew(KeyAndContext { key, context: context.as_bytes() }))?;
        let (kms_protocol::RemoteStream { stream }, head) = call.accept()?.parts(decode_fields)?;
        let head: [u8; STREAM_HEAD_LEN] = head.try_into().map_err(|_| ReplyError::Shape)?;
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
        let fields = KeyAndContext { key, context: context.as_bytes() };
        let call = self.call(&Request::RemoteStreamOpen { fields, head })?;
        let kms_protocol::RemoteStream { stream } = call.accept()?.fields(decode_fields)?;
        Ok(RemoteOpening::new(self, stream))
    }

    /// Locks the agent under a passphrase of 1 to 1,024 bytes. False: it was locked already.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); [`Error::TooLong`].
    pub fn lock(&mut self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.change_lock(&Request::Lock { passphrase: checked(passphrase)? })
    }

    /// Ends the lock. False: it was not locked.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `denied` for a wrong passphrase; [`Error::TooLong`].
    pub fn unlock(&mut self, passphrase: &SecretVec) -> Result<bool, Error> {
        self.change_lock(&Request::Unlock { passphrase: checked(passphrase)? })
    }

    fn change_lock(&mut self, request: &Request<'_>) -> Result<bool, Error> {
        let limit = self.timeout.max(PASSPHRASE_ANSWER_LIMIT);
        let call = self.connection.call(request, limit)?;
        let Locking { changed } = call.accept()?.fields(decode_fields)?;
        Ok(changed)
    }

    /// Waits until the agent's time to ask again has come. Fails when the agent goes away meanwhile.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn wait(&mut self, time: Duration) -> Result<(), Error> {
        self.connection.wait(time)
    }

    pub(crate) fn call(&mut self, request: &Request<'_>) -> Result<Call, Error> {
        self.connection.call(request, self.timeout)
    }

    /// Whether the agent is locked.
    ///
    /// # Errors
    /// As [`ping`](Self::ping).
    pub fn is_locked(&mut self) -> Result<bool, Error> {
        Ok(self.status()?.state == LockState::Locked)
    }
}

/// A key to be made.
pub struct NewKey<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its 32 bytes; else the agent draws them.
    pub import: Option<&'a Secret<KEY_LEN>>,
    /// Never on disk.
    pub memory_only: bool,
    /// A key of that name is the answer, not an error.
    pub if_missing: bool,
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
                return Some(Err(ReplyError::Pages.into()));
            }
            self.cursor = Some(listed.next).filter(|next| *next != 0);
            self.page = listed.keys.into();
        }
    }
}

impl Keys<'_> {
    fn fetch(&mut self, cursor: u64) -> Result<Listed, Error> {
        Ok(self.client.call(&Request::List(List { cursor }))?.accept()?.fields(decode_fields)?)
    }
}

/// Key and base nonce of a stream, moved to where they are used.
fn body(secrets: &[u8]) -> Result<Body, ReplyError> {
    let (key, nonce) = secrets.split_first_chunk::<KEY_LEN>().ok_or(ReplyError::Shape)?;
    let nonce: &[u8; NONCE_LEN] = nonce.try_into().map_err(|_| ReplyError::Shape)?;
    Ok(Body::new(MessageKey::from_parts(key, nonce)))
}

fn checked(passphrase: &SecretVec) -> Result<&[u8], Error> {
    match passphrase.expose_secret() {
        bytes if bytes.len() > PASSPHRASE_MAX => {
            Err(Error::TooLong { what: "passphrase", max: PASSPHRASE_MAX })
        }
        bytes => Ok(bytes),
    }
}

/// Random, so that a repeat of the request is known as one.
fn token() -> Result<[u8; TOKEN_LEN], Error> {
    let mut token = [0; TOKEN_LEN];
    getrandom::fill(&mut token).map_err(|_| Error::Random)?;
    Ok(token)
}
