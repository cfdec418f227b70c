//! The core: one request in, one reply out, no I/O.
//!
//! Owns the order of things: frame, request, authorize, keyring, crypto, response. Time comes in with each call and
//! randomness through a type parameter, so that a test can stop the one and break the other. It never sees a socket,
//! and never blocks: what takes long (the passphrase's key derivation) is handed out as work and comes back.

mod back_off;
mod refusal;
mod repeats;
mod streams;

use std::time::Duration;

use kms_envelope::{
    Body, ContextRef, Header, KEY_LEN, KeyId, MESSAGE_MAX, MessageKey, Purpose, SALT_LEN, STREAM_HEAD_LEN,
    message_len, message_plaintext_len, new_stream, open_message, open_stream, seal_message,
};
use kms_protocol::{
    Added, Constraint, Description, Fact, Frame, Hello, KeyAndContext, KeyName, KeyRef, KeyRow, KeyState,
    Listed, LockState, Locking, Material, NoFields, Opcode, PAGE_ROWS_MAX, PASSPHRASE_MAX, PROTOCOL_VERSION,
    REMOTE_STREAMS_MAX, RemoteStream, Removed, Request, Status, StatusReply, VersionRow, Welcome, constraint,
};
use kms_secret_memory::{Secret, SecretVec};
use zeroize::Zeroize;

use self::{
    back_off::BackOff,
    refusal::{Refused, refuse},
    repeats::{Repeat, Repeats},
    streams::{OpenStream, Streams},
};
use crate::{
    authorize::{Peer, Permit, Policy, authorize},
    config::Limits,
    crypto::{Derivation, LOCK_SALT_LEN, Random, Salts, random_bytes, random_secret},
    keyring::{KeySummary, Keyring, KeyringError, Selector},
    reply::Replies,
};

/// Bytes behind the head of a stream that the client encrypts or opens: message key and base nonce.
const STREAM_KEY_LEN: usize = KEY_LEN + 12;

/// Requests that a client may have without an answer. Beyond it nothing breaks: the agent stops reading.
pub(crate) const IN_FLIGHT_MAX: u32 = 256;

/// When a request came.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since boot, suspend included.
    pub boot: Duration,
    /// Seconds since 1970.
    pub unix: u64,
}

/// What the transport knows and `status` shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Surroundings {
    /// Connections that are open.
    pub connections: usize,
    /// Bytes of frames that wait for the rest.
    pub frame_pool: usize,
    /// Panics that were caught.
    pub panics: u64,
}

/// What is to happen after a request.
pub enum Outcome {
    /// The reply is written; the connection goes on.
    Continue,
    /// The reply, if any, is written; the connection ends.
    Close,
    /// Work to be done elsewhere; its result goes to [`Core::derived`], which writes the reply.
    Derive(Box<Derivation>, Ticket),
}

/// Where the result of a [`Derivation`] belongs.
pub struct Ticket {
    request_id: u32,
    permit: Permit,
    uid: u32,
    purpose: TicketPurpose,
}

enum TicketPurpose {
    Lock { salt: [u8; LOCK_SALT_LEN] },
    Unlock,
}

/// One connection, as far as the core knows it.
pub struct Session {
    number: u64,
    peer: Peer,
    greeted: bool,
    next_stream: u32,
}

impl Session {
    /// True once `hello` was answered.
    #[must_use]
    pub fn greeted(&self) -> bool {
        self.greeted
    }
}

/// The agent without its sockets.
pub struct Core<R> {
    own_uid: u32,
    keyring: Keyring,
    limits: Limits,
    random: R,
    salts: Salts,
    streams: Streams,
    sessions: u64,
    repeats: Repeats,
    back_off: BackOff,
    deriving: bool,
    started: Duration,
    requests: u64,
}

impl<R: Random> Core<R> {
    /// A core that serves `own_uid` from `keyring`.
    #[must_use]
    pub fn new(own_uid: u32, keyring: Keyring, limits: Limits, random: R, now: Now) -> Self {
        Self {
            own_uid,
            keyring,
            limits,
            random,
            salts: Salts::default(),
            streams: Streams::default(),
            sessions: 0,
            repeats: Repeats::default(),
            back_off: BackOff::default(),
            deriving: false,
            started: now.boot,
            requests: 0,
        }
    }

    /// The uid whose connections are answered at all.
    #[must_use]
    pub fn serves(&self, uid: u32) -> bool {
        uid == self.own_uid
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Puts other limits in force.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Wipes what is only kept at hand for speed.
    pub fn cool(&mut self) {
        self.keyring.cool();
    }

    /// A new connection of this peer.
    pub fn begin(&mut self, peer: Peer) -> Session {
        self.sessions = self.sessions.wrapping_add(1);
        Session { number: self.sessions, peer, greeted: false, next_stream: 1 }
    }

    /// The connection is over, and with it its streams.
    pub fn end(&mut self, session: &Session) {
        self.streams.end_session(session);
    }

    /// Forgets what was drawn for requests that arrived together.
    pub fn end_batch(&mut self) {
        self.salts.end_batch();
    }

    /// Answers one request: writes the reply to `replies`, or hands out work first.
    pub fn handle(
        &mut self,
        session: &mut Session,
        frame: &Frame<'_>,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Outcome {
        self.requests = self.requests.wrapping_add(1);
        replies.set_frame_max(self.limits.frame);
        let request_id = frame.head.request_id;
        match self.answer(session, frame, now, around, replies) {
            Ok(outcome) => outcome,
            Err(refused) => refuse(request_id, &refused, replies),
        }
    }

    /// Answers a head that no frame has; the connection ends.
    pub fn refuse_frame(&mut self, error: kms_protocol::FrameError, replies: &mut Replies) {
        use kms_protocol::FrameError;
        let (status, request_id) = match error {
            FrameError::Version { request_id } => (Status::Unsupported, request_id),
            FrameError::TooLarge { request_id } => (Status::TooLarge, request_id),
            FrameError::Flags { request_id } | FrameError::Fields { request_id } => {
                (Status::Malformed, request_id)
            }
        };
        refuse(request_id, &status.into(), replies);
    }

    fn answer(
        &mut self,
        session: &mut Session,
        frame: &Frame<'_>,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let request_id = frame.head.request_id;
        let fatal = |status| Refused { close: true, ..Refused::from(status) };
        let Some(opcode) = Opcode::from_code(frame.head.code) else {
            return Err(if session.greeted { Status::Unsupported.into() } else { fatal(Status::Malformed) });
        };
        if session.greeted == (opcode == Opcode::Hello) {
            return Err(fatal(Status::Malformed));
        }
        let request = Request::decode(opcode, frame).map_err(|_| fatal(Status::Malformed))?;
        let policy = Policy { own_uid: self.own_uid, locked: self.keyring.is_locked() };
        let permit = authorize(&session.peer, &request, &policy)?;
        match request {
            Request::Hello(hello) => self.hello(session, hello, request_id, replies)?,
            Request::Ping => replies.push_done(request_id)?,
            Request::Status => {
                let reply = self.status(now, around);
                push(replies, request_id, &reply)?;
            }
            Request::Lock { passphrase } => {
                return self.lock(permit, session.peer, passphrase, request_id, replies);
            }
            Request::Unlock { passphrase } => {
                return self.unlock(permit, session.peer, passphrase, request_id, now, replies);
            }
            Request::Add { fields, material } => {
                let added = match self.repeats.find(session.peer.uid, fields.token) {
                    Some(Repeat::Added(added)) => added,
                    Some(Repeat::Removed(_)) => return Err(Status::Malformed.into()),
                    None => {
                        let added = self.add(&permit, &fields, material, now)?;
                        self.repeats.remember(session.peer.uid, fields.token, Repeat::Added(added));
                        added
                    }
                };
                push(replies, request_id, &added)?;
            }
            Request::List(list) => {
                let (rows, next) = self.keyring.page(&permit, list.cursor)?;
                let mut listed = Listed { keys: rows.iter().map(row).collect(), next };
                let pushed = push(replies, request_id, &listed);
                listed.keys.iter_mut().for_each(|row| row.name.zeroize());
                pushed?;
            }
            Request::Describe(describe) => {
                let summary = self.keyring.describe(&permit, selector(describe.key)?)?;
                let mut description = description(&summary, describe.versions_after);
                let pushed = push(replies, request_id, &description);
                description.key.name.zeroize();
                pushed?;
            }
            Request::Remove(remove) => {
                let removed = match self.repeats.find(session.peer.uid, remove.token) {
                    Some(Repeat::Removed(removed)) => removed,
                    Some(Repeat::Added(_)) => return Err(Status::Malformed.into()),
                    None => {
                        let id = self.keyring.remove(&permit, selector(remove.key)?)?;
                        self.streams.end_key(id);
                        let removed = Removed { id: *id.as_bytes() };
                        self.repeats.remember(session.peer.uid, remove.token, Repeat::Removed(removed));
                        removed
                    }
                };
                push(replies, request_id, &removed)?;
            }
            Request::Encrypt { fields, plaintext } => {
                self.encrypt(&permit, fields, plaintext, request_id, replies)?
            }
            Request::Decrypt { fields, ciphertext } => {
                self.decrypt(&permit, fields, ciphertext, request_id, replies)?
            }
            Request::StreamNew(fields) => {
                let (head, key) = self.new_stream(&permit, fields)?;
                let payload_len = STREAM_HEAD_LEN.saturating_add(STREAM_KEY_LEN);
                replies.push(request_id, &NoFields {}, payload_len, |payload| {
                    let (head_part, key_part) =
                        payload.split_at_mut_checked(STREAM_HEAD_LEN).ok_or(Status::Internal)?;
                    head_part.copy_from_slice(&head);
                    write_stream_key(key_part, &key)
                })??;
            }
            Request::StreamOpen { fields, head } => {
                let key = self.open_stream(&permit, fields, head)?;
                replies.push(request_id, &NoFields {}, STREAM_KEY_LEN, |payload| {
                    write_stream_key(payload, &key)
                })??;
            }
            Request::RemoteStreamNew(fields) => {
                let (head, key) = self.new_stream(&permit, fields)?;
                let body = Box::new(Body::new(key));
                let key = Header::parse(&head)?.key_id;
                let stream = self.streams.hold(session, key, OpenStream::Encrypt { body, next: 0 })?;
                let pushed = replies.push(request_id, &RemoteStream { stream }, head.len(), |payload| {
                    payload.copy_from_slice(&head);
                    Ok::<(), Status>(())
                });
                self.streams.keep_if(session, stream, pushed)??;
            }
            Request::RemoteStreamOpen { fields, head } => {
                let body = Box::new(Body::new(self.open_stream(&permit, fields, head)?));
                let key = Header::parse(head)?.key_id;
                let stream = self.streams.hold(session, key, OpenStream::Decrypt { body })?;
                let pushed = replies.push(request_id, &RemoteStream { stream }, 0, |_| Ok::<(), Status>(()));
                self.streams.keep_if(session, stream, pushed)??;
            }
            Request::RemoteStreamEncrypt { stream, plaintext } => {
                self.streams.encrypt(&permit, session, stream, plaintext, request_id, replies)?;
            }
            Request::RemoteStreamDecrypt { fields, chunks } => {
                self.streams.decrypt(&permit, session, fields, chunks, request_id, replies)?;
            }
            Request::RemoteStreamClose(RemoteStream { stream }) => {
                self.streams.close(&permit, session, stream)?;
                replies.push_done(request_id)?;
            }
        }
        Ok(Outcome::Continue)
    }

    fn hello(
        &mut self,
        session: &mut Session,
        hello: Hello,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        if hello.version != PROTOCOL_VERSION {
            return Err(Refused { close: true, ..Status::Unsupported.into() });
        }
        let size = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            frame_max: size(self.limits.frame),
            message_max: size(MESSAGE_MAX),
            context_max: size(kms_envelope::CONTEXT_LEN_MAX),
            context_pairs_max: size(kms_envelope::CONTEXT_PAIRS_MAX),
            in_flight_max: IN_FLIGHT_MAX,
            page_rows_max: size(PAGE_ROWS_MAX),
            remote_streams_max: size(REMOTE_STREAMS_MAX),
            opcodes: Opcode::ALL.iter().map(|opcode| opcode.code()).collect(),
            constraints: constraint::ALL.to_vec(),
            features: 0,
        };
        push(replies, request_id, &welcome)?;
        session.greeted = true;
        Ok(())
    }

    fn status(&self, now: Now, around: Surroundings) -> StatusReply {
        let fact = |name: &str, value: String| Fact { name: name.to_owned(), value };
        let secret_memory =
            self.keyring.backing().map_or_else(|| "wiped".to_owned(), |backing| backing.to_string());
        StatusReply {
            state: if self.keyring.is_locked() { LockState::Locked } else { LockState::Unlocked },
            facts: vec![
                fact("version", env!("CARGO_PKG_VERSION").to_owned()),
                fact("pid", std::process::id().to_string()),
                fact("uid", self.own_uid.to_string()),
                fact("secret-memory", secret_memory),
                fact("keystore", "none".to_owned()),
                fact("keys", self.keyring.len().to_string()),
                fact("connections", around.connections.to_string()),
                fact("panics", around.panics.to_string()),
                fact("uptime-ms", now.boot.saturating_sub(self.started).as_millis().to_string()),
                fact("requests", self.requests.to_string()),
                fact("frame-pool", around.frame_pool.to_string()),
            ],
        }
    }

    fn add(
        &mut self,
        permit: &Permit,
        fields: &kms_protocol::Add<'_>,
        material: &[u8],
        now: Now,
    ) -> Result<Added, Refused> {
        let name = KeyName::parse(fields.name).map_err(|_| Status::Malformed)?;
        let (mut memory_only, mut seen) = (self.limits.memory_only, false);
        for Constraint { kind, value } in &fields.constraints {
            match (*kind, *value) {
                (constraint::MEMORY_ONLY, 0) if !seen => (memory_only, seen) = (true, true),
                (constraint::MEMORY_ONLY, _) => return Err(Status::Malformed.into()),
                _ => return Err(Status::Unsupported.into()),
            }
        }
        let import = match fields.material {
            Material::Generate if material.is_empty() => None,
            Material::Import => Some(material.try_into().map_err(|_| Status::Malformed)?),
            Material::Generate => return Err(Status::Malformed.into()),
        };
        if fields.if_missing
            && let Ok(summary) = self.keyring.describe(permit, Selector::Name(name))
        {
            return Ok(added(&summary, false));
        }
        if !memory_only {
            return Err(Status::StoreUnavailable.into());
        }
        let summary = self.keyring.add(permit, name, import, self.limits.keys, now.unix, &mut self.random)?;
        Ok(added(&summary, true))
    }

    fn encrypt(
        &mut self,
        permit: &Permit,
        fields: KeyAndContext<'_>,
        plaintext: &[u8],
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(fields.context)?;
        if plaintext.len() > MESSAGE_MAX {
            return Err(Status::TooLarge.into());
        }
        let (key_id, key_version) = self.keyring.primary(permit, selector(fields.key)?)?;
        let header = Header { purpose: Purpose::Message, key_id, key_version };
        let salt = self.salts.next(&mut self.random)?;
        let keyring = &mut self.keyring;
        replies.push(request_id, &NoFields {}, message_len(plaintext.len()), |out| {
            keyring
                .with_key(permit, &key_id, key_version, |key| {
                    seal_message(key, &header, context, &salt, plaintext, out)
                })?
                .map_err(Refused::from)
        })?
    }

    fn decrypt(
        &mut self,
        permit: &Permit,
        fields: KeyAndContext<'_>,
        ciphertext: &[u8],
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(fields.context)?;
        let header = Header::parse(ciphertext)?;
        if header.purpose != Purpose::Message {
            return Err(Status::Malformed.into());
        }
        if ciphertext.len() > message_len(MESSAGE_MAX) {
            return Err(Status::TooLarge.into());
        }
        self.check_key(permit, fields.key, &header)?;
        let plaintext_len = message_plaintext_len(ciphertext.len()).ok_or(Status::InvalidCiphertext)?;
        let keyring = &mut self.keyring;
        replies.push(request_id, &NoFields {}, plaintext_len, |out| {
            keyring
                .with_key(permit, &header.key_id, header.key_version, |key| {
                    open_message(key, ciphertext, Purpose::Message, context, out)
                })?
                .map_err(Refused::from)
                .map(|_| ())
        })?
    }

    /// The key of the request must exist and be the one that the ciphertext names.
    fn check_key(&mut self, permit: &Permit, key: KeyRef<'_>, header: &Header) -> Result<(), Refused> {
        let (id, _) = self.keyring.primary(permit, selector(key)?)?;
        if id == header.key_id { Ok(()) } else { Err(Status::WrongKey.into()) }
    }

    fn new_stream(
        &mut self,
        permit: &Permit,
        fields: KeyAndContext<'_>,
    ) -> Result<([u8; STREAM_HEAD_LEN], MessageKey), Refused> {
        let context = ContextRef::parse(fields.context)?;
        let (key_id, key_version) = self.keyring.primary(permit, selector(fields.key)?)?;
        let header = Header { purpose: Purpose::Stream, key_id, key_version };
        let dek = random_secret::<KEY_LEN>(&mut self.random)?;
        let dek_salt = random_bytes::<SALT_LEN>(&mut self.random)?;
        let body_salt = random_bytes::<SALT_LEN>(&mut self.random)?;
        self.keyring
            .with_key(permit, &key_id, key_version, |key| {
                new_stream(key, &header, context, dek.expose_secret(), &dek_salt, &body_salt)
            })?
            .map_err(Refused::from)
    }

    fn open_stream(
        &mut self,
        permit: &Permit,
        fields: KeyAndContext<'_>,
        head: &[u8],
    ) -> Result<MessageKey, Refused> {
        let context = ContextRef::parse(fields.context)?;
        let header = Header::parse(head)?;
        if header.purpose != Purpose::Stream {
            return Err(Status::Malformed.into());
        }
        self.check_key(permit, fields.key, &header)?;
        let head: &[u8; STREAM_HEAD_LEN] = head.try_into().map_err(|_| Status::InvalidCiphertext)?;
        self.keyring
            .with_key(permit, &header.key_id, header.key_version, |key| open_stream(key, head, context))?
            .map_err(Refused::from)
    }

    fn lock(
        &mut self,
        permit: Permit,
        peer: Peer,
        passphrase: &[u8],
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let passphrase = secret_passphrase(passphrase)?;
        if self.keyring.is_locked() {
            push(replies, request_id, &Locking { changed: false })?;
            return Ok(Outcome::Continue);
        }
        let salt = random_bytes(&mut self.random)?;
        self.derive(
            passphrase,
            salt,
            Ticket { request_id, permit, uid: peer.uid, purpose: TicketPurpose::Lock { salt } },
        )
    }

    fn unlock(
        &mut self,
        permit: Permit,
        peer: Peer,
        passphrase: &[u8],
        request_id: u32,
        now: Now,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let passphrase = secret_passphrase(passphrase)?;
        let Some(salt) = self.keyring.lock_salt() else {
            push(replies, request_id, &Locking { changed: false })?;
            return Ok(Outcome::Continue);
        };
        let wait = self.back_off.wait(peer.uid, now.boot);
        if !wait.is_zero() {
            return Err(Refused::busy(wait));
        }
        self.derive(
            passphrase,
            salt,
            Ticket { request_id, permit, uid: peer.uid, purpose: TicketPurpose::Unlock },
        )
    }

    /// One derivation at a time: each takes a core and 256 MiB.
    fn derive(
        &mut self,
        passphrase: SecretVec,
        salt: [u8; LOCK_SALT_LEN],
        ticket: Ticket,
    ) -> Result<Outcome, Refused> {
        if self.deriving {
            return Err(Refused::busy(Duration::from_secs(1)));
        }
        self.deriving = true;
        Ok(Outcome::Derive(Box::new(Derivation::new(passphrase, salt)), ticket))
    }

    /// Takes the result of a [`Derivation`] and writes the reply that waited for it.
    pub fn derived(&mut self, ticket: Ticket, key: Option<Secret<KEY_LEN>>, now: Now, replies: &mut Replies) {
        self.deriving = false;
        let Ticket { request_id, permit, uid, purpose } = ticket;
        let done = key.ok_or(Refused::busy(Duration::from_secs(1))).and_then(|key| match purpose {
            TicketPurpose::Lock { salt } => {
                let locked = self.keyring.lock(&permit, &key, salt, &mut self.random);
                if locked.is_ok() {
                    self.streams.end_all();
                }
                locked.map_err(Refused::from)
            }
            TicketPurpose::Unlock => self.try_unlock(&permit, uid, &key, now),
        });
        let pushed = match done {
            Ok(()) => push(replies, request_id, &Locking { changed: true }),
            Err(refused) => Err(refused),
        };
        if let Err(refused) = pushed {
            refuse(request_id, &refused, replies);
        }
    }

    fn try_unlock(
        &mut self,
        permit: &Permit,
        uid: u32,
        key: &Secret<KEY_LEN>,
        now: Now,
    ) -> Result<(), Refused> {
        let unlocked = self.keyring.unlock(permit, key, &mut self.random);
        match unlocked {
            Ok(()) => {
                self.back_off.right(uid);
                tracing::info!(uid, "unlocked");
            }
            Err(KeyringError::WrongPassphrase) => {
                let failures = self.back_off.wrong(uid, now.boot);
                tracing::warn!(uid, failures, "wrong passphrase");
            }
            Err(_) => {}
        }
        Ok(unlocked?)
    }
}

fn push<T: bincode::Encode>(replies: &mut Replies, request_id: u32, fields: &T) -> Result<(), Refused> {
    replies.push(request_id, fields, 0, |_| Ok::<(), Refused>(()))?
}

fn selector(key: KeyRef<'_>) -> Result<Selector<'_>, Refused> {
    match key {
        KeyRef::Name(name) => Ok(Selector::Name(KeyName::parse(name).map_err(|_| Status::Malformed)?)),
        KeyRef::Id(id) => Ok(Selector::Id(KeyId::from_bytes(id))),
    }
}

fn secret_passphrase(bytes: &[u8]) -> Result<SecretVec, Refused> {
    if bytes.is_empty() || bytes.len() > PASSPHRASE_MAX {
        return Err(Status::Malformed.into());
    }
    let mut passphrase = SecretVec::with_capacity(bytes.len());
    passphrase.push_slice(bytes).map_err(|_| Status::Malformed)?;
    Ok(passphrase)
}

fn write_stream_key(out: &mut [u8], key: &MessageKey) -> Result<(), Status> {
    let (message_key, base_nonce) = key.expose_secret();
    let (key_part, nonce_part) = out.split_at_mut_checked(KEY_LEN).ok_or(Status::Internal)?;
    key_part.copy_from_slice(message_key);
    nonce_part.get_mut(..base_nonce.len()).ok_or(Status::Internal)?.copy_from_slice(base_nonce);
    Ok(())
}

fn added(summary: &KeySummary, created: bool) -> Added {
    Added {
        id: *summary.id.as_bytes(),
        version: summary.primary.value(),
        check_value: summary.check_value,
        created,
    }
}

fn row(summary: &KeySummary) -> KeyRow {
    KeyRow {
        name: summary.name.as_str().to_owned(),
        id: *summary.id.as_bytes(),
        memory_only: true,
        state: KeyState::Enabled,
        primary: summary.primary.value(),
        minimum: 1,
        versions: 1,
        check_value: summary.check_value,
        created: summary.created,
        expires_in: None,
        uses: summary.uses,
    }
}

fn description(summary: &KeySummary, versions_after: u32) -> Description {
    let version = VersionRow {
        version: summary.primary.value(),
        state: KeyState::Enabled,
        check_value: summary.check_value,
        created: summary.created,
        uses: summary.uses,
    };
    Description {
        key: row(summary),
        versions: if version.version > versions_after { vec![version] } else { Vec::new() },
        more: false,
        constraints: vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }],
    }
}
