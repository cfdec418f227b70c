//! The core: one request in, one reply out, no I/O.
//!
//! Owns the order of things: frame, request, authorize, keyring, crypto, response. Time comes in with each call and
//! randomness through a type parameter, so that a test can stop the one and break the other. It never sees a socket,
//! and never blocks: what takes long (the passphrase's key derivation) is handed out as work and comes back.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use kms_envelope::{
    Body, CHUNK_LEN, ContextError, ContextRef, Header, HeaderError, KEY_LEN, KeyId, MESSAGE_MAX, MessageKey,
    OpenError, Purpose, SALT_LEN, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, SealError, TAG_LEN, message_len,
    message_plaintext_len, new_stream, open_message, open_stream, seal_message,
};
use kms_protocol::{
    Added, Constraint, Description, Fact, Frame, Hello, KeyAndContext, KeyName, KeyRef, KeyRow, KeyState,
    Listed, LockState, Locking, Material, NoFields, Opcode, PAGE_ROWS_MAX, PASSPHRASE_MAX, PROTOCOL_VERSION,
    REMOTE_STREAMS_MAX, RemoteStream, Removed, Request, Status, StatusReply, TOKEN_LEN, VersionRow, Welcome,
    constraint,
};
use kms_secret_memory::{Secret, SecretVec};
use zeroize::Zeroize;

use crate::{
    authorize::{Peer, Permit, Policy, authorize},
    config::Limits,
    crypto::{
        CryptoError, Derivation, LOCK_SALT_LEN, Random, RandomUnavailable, random_bytes, random_secret,
    },
    keyring::{KeySummary, Keyring, KeyringError, Selector},
    reply::{Replies, ReplyError},
};

/// Bytes behind the head of a stream that the client encrypts or opens: message key and base nonce.
const STREAM_KEY_LEN: usize = KEY_LEN + 12;

/// Requests that a client may have without an answer. Beyond it nothing breaks: the agent stops reading.
const IN_FLIGHT_MAX: u32 = 256;

/// Results that are kept for requests that are repeated.
const REPEATS_MAX: usize = 4096;

/// The first wait after a wrong passphrase; it doubles with each, up to the last.
const BACK_OFF_FIRST: Duration = Duration::from_millis(100);
const BACK_OFF_LAST: Duration = Duration::from_secs(10);

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

/// The streams of all connections, held here so that a lock and the removal of a key end them.
#[derive(Default)]
struct Streams(HashMap<(u64, u32), (KeyId, OpenStream)>);

/// A stream that the agent encrypts or decrypts.
enum OpenStream {
    Encrypt { body: Box<Body>, next: u64 },
    Decrypt { body: Box<Body> },
}

/// Why a request is refused.
struct Refused {
    status: Status,
    retry_after: Duration,
    close: bool,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { status, retry_after: Duration::ZERO, close: false }
    }
}

impl Refused {
    fn busy(retry_after: Duration) -> Self {
        Self { status: Status::Busy, retry_after, close: false }
    }
}

impl From<KeyringError> for Refused {
    fn from(error: KeyringError) -> Self {
        match error {
            KeyringError::Locked => Status::Locked.into(),
            KeyringError::NotFound => Status::NotFound.into(),
            KeyringError::Exists => Status::Exists.into(),
            KeyringError::Full => Status::Limit.into(),
            KeyringError::WrongPassphrase => Status::Denied.into(),
            KeyringError::Crypto(error) => error.into(),
        }
    }
}

impl From<CryptoError> for Refused {
    fn from(error: CryptoError) -> Self {
        tracing::error!(%error, "a request failed inside the agent");
        Status::Internal.into()
    }
}

impl From<RandomUnavailable> for Refused {
    fn from(error: RandomUnavailable) -> Self {
        CryptoError::from(error).into()
    }
}

impl From<ReplyError> for Refused {
    fn from(error: ReplyError) -> Self {
        match error {
            // Other replies give their memory back as soon as they are sent.
            ReplyError::Memory(error) => {
                tracing::warn!(%error, "no locked memory for a reply");
                Self::busy(Duration::from_millis(100))
            }
            ReplyError::Frame(_) => Status::TooLarge.into(),
        }
    }
}

impl From<SealError> for Refused {
    fn from(_: SealError) -> Self {
        Status::TooLarge.into()
    }
}

impl From<HeaderError> for Refused {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Truncated | HeaderError::NotOurs | HeaderError::Version => Status::Malformed.into(),
            HeaderError::Format(_)
            | HeaderError::Suite(_)
            | HeaderError::Purpose(_)
            | HeaderError::Flags(_) => Status::Unsupported.into(),
        }
    }
}

impl From<OpenError> for Refused {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Header(error) => error.into(),
            OpenError::Purpose => Status::Malformed.into(),
            OpenError::Length | OpenError::Invalid => Status::InvalidCiphertext.into(),
        }
    }
}

impl From<ContextError> for Refused {
    fn from(error: ContextError) -> Self {
        match error {
            ContextError::TooManyPairs | ContextError::TooLong => Status::TooLarge.into(),
            _ => Status::Malformed.into(),
        }
    }
}

/// The wrong unlocks of one uid.
#[derive(Default)]
struct BackOff {
    failures: u32,
    until: Duration,
}

/// What a request that changes something answered, kept for a repeat of it.
#[derive(Clone, Copy)]
enum Repeat {
    Added(Added),
    Removed(Removed),
}

#[derive(Default)]
struct Repeats {
    results: HashMap<(u32, [u8; TOKEN_LEN]), Repeat>,
    order: VecDeque<(u32, [u8; TOKEN_LEN])>,
}

impl Repeats {
    fn remember(&mut self, uid: u32, token: [u8; TOKEN_LEN], result: Repeat) {
        if self.order.len() >= REPEATS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.results.remove(&oldest);
        }
        if self.results.insert((uid, token), result).is_none() {
            self.order.push_back((uid, token));
        }
    }

    fn find(&self, uid: u32, token: [u8; TOKEN_LEN]) -> Option<Repeat> {
        self.results.get(&(uid, token)).copied()
    }
}

/// Salts for the requests that arrived together. They are drawn after the requests have arrived and thrown away with the
/// last of them: what is restored from a snapshot in between seals the same messages with them, and no others.
#[derive(Default)]
struct Salts {
    drawn: bool,
    ready: Vec<[u8; SALT_LEN]>,
}

impl Salts {
    /// Drawn at once when more than one is wanted.
    const TOGETHER: usize = 16;

    fn next(&mut self, random: &mut impl Random) -> Result<[u8; SALT_LEN], RandomUnavailable> {
        if let Some(salt) = self.ready.pop() {
            return Ok(salt);
        }
        if !self.drawn {
            self.drawn = true;
            return random_bytes(random);
        }
        let mut salts = [[0; SALT_LEN]; Self::TOGETHER];
        random.fill(salts.as_flattened_mut())?;
        self.ready.extend_from_slice(&salts);
        self.ready.pop().ok_or(RandomUnavailable)
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
    back_off: HashMap<u32, BackOff>,
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
            back_off: HashMap::new(),
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
        self.streams.0.retain(|(number, _), _| *number != session.number);
    }

    /// Forgets what was drawn for requests that arrived together.
    pub fn end_batch(&mut self) {
        self.salts.ready.clear();
        self.salts.drawn = false;
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
                        self.streams.0.retain(|_, (key, _)| *key != id);
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
                encrypt_chunks(&permit, &mut self.streams, session, stream, plaintext, request_id, replies)?;
            }
            Request::RemoteStreamDecrypt { fields, chunks } => {
                decrypt_chunks(&permit, &mut self.streams, session, fields, chunks, request_id, replies)?;
            }
            Request::RemoteStreamClose(RemoteStream { stream }) => {
                self.streams.0.remove(&(session.number, stream)).ok_or(Status::NotFound)?;
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
        let wait =
            self.back_off.get(&peer.uid).map_or(Duration::ZERO, |back| back.until.saturating_sub(now.boot));
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
                    self.streams.0.clear();
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
                self.back_off.remove(&uid);
                tracing::info!(uid, "unlocked");
            }
            Err(KeyringError::WrongPassphrase) => {
                let back = self.back_off.entry(uid).or_default();
                let doubled = 1u32.checked_shl(back.failures).unwrap_or(u32::MAX);
                back.until =
                    now.boot.saturating_add(BACK_OFF_FIRST.saturating_mul(doubled).min(BACK_OFF_LAST));
                back.failures = back.failures.saturating_add(1);
                tracing::warn!(uid, failures = back.failures, "wrong passphrase");
            }
            Err(_) => {}
        }
        Ok(unlocked?)
    }
}

impl Streams {
    fn hold(&mut self, session: &mut Session, key: KeyId, stream: OpenStream) -> Result<u32, Refused> {
        if self.0.keys().filter(|(session_number, _)| *session_number == session.number).count()
            >= REMOTE_STREAMS_MAX
        {
            return Err(Status::Limit.into());
        }
        let number = session.next_stream;
        session.next_stream = number.checked_add(1).ok_or(Status::Limit)?;
        self.0.insert((session.number, number), (key, stream));
        Ok(number)
    }

    /// A stream whose number the client never learns is not kept.
    fn keep_if<T>(
        &mut self,
        session: &Session,
        stream: u32,
        pushed: Result<T, ReplyError>,
    ) -> Result<T, ReplyError> {
        if pushed.is_err() {
            self.0.remove(&(session.number, stream));
        }
        pushed
    }
}

/// Seals the next chunks of a stream. A chunk is numbered here and sealed once; an error ends the stream.
fn encrypt_chunks(
    _permit: &Permit,
    streams: &mut Streams,
    session: &Session,
    stream: u32,
    plaintext: &[u8],
    request_id: u32,
    replies: &mut Replies,
) -> Result<(), Refused> {
    // Taken out, and put back only when all went well: an error ends the stream.
    let place = (session.number, stream);
    let Some((key, OpenStream::Encrypt { body, next })) = streams.0.remove(&place) else {
        return Err(Status::NotFound.into());
    };
    let whole = plaintext.len() / CHUNK_LEN;
    let rest = plaintext.len() % CHUNK_LEN;
    let ends = plaintext.is_empty() || rest != 0;
    let chunks = whole.saturating_add(usize::from(ends));
    let sealed_len = plaintext.len().saturating_add(chunks.saturating_mul(TAG_LEN));
    replies.push(request_id, &NoFields {}, sealed_len, |out| {
        for (to, from) in out.chunks_mut(SEALED_CHUNK_LEN).zip(plaintext.chunks(CHUNK_LEN)) {
            to.get_mut(..from.len()).ok_or(Status::Internal)?.copy_from_slice(from);
        }
        body.seal_chunks(next, out).map_err(Refused::from)
    })??;
    if !ends {
        let next = next.saturating_add(chunks as u64);
        streams.0.insert(place, (key, OpenStream::Encrypt { body, next }));
    }
    Ok(())
}

/// Opens chunks of a stream, wherever they stand. An error ends the stream.
fn decrypt_chunks(
    _permit: &Permit,
    streams: &mut Streams,
    session: &Session,
    fields: kms_protocol::RemoteChunks,
    chunks: &[u8],
    request_id: u32,
    replies: &mut Replies,
) -> Result<(), Refused> {
    let place = (session.number, fields.stream);
    let Some((key, OpenStream::Decrypt { body })) = streams.0.remove(&place) else {
        return Err(Status::NotFound.into());
    };
    let whole = chunks.len() / SEALED_CHUNK_LEN;
    let rest = chunks.len() % SEALED_CHUNK_LEN;
    if chunks.is_empty() {
        return Err(Status::Malformed.into());
    }
    if rest != 0 && rest < TAG_LEN {
        return Err(Status::InvalidCiphertext.into());
    }
    let count = whole.saturating_add(usize::from(rest != 0));
    let plaintext_len = chunks.len().saturating_sub(count.saturating_mul(TAG_LEN));
    replies.push(request_id, &NoFields {}, plaintext_len, |out| {
        let mut first = fields.first;
        let mut chunk = zeroize::Zeroizing::new([0; SEALED_CHUNK_LEN]);
        // By the sealed chunks: an empty last one has no plaintext, and its tag is checked all the same.
        let mut rest = out;
        for from in chunks.chunks(SEALED_CHUNK_LEN) {
            let chunk = chunk.get_mut(..from.len()).ok_or(Status::Internal)?;
            chunk.copy_from_slice(from);
            body.open_chunks(first, chunk)?;
            let opened = chunk.get(..from.len().saturating_sub(TAG_LEN)).ok_or(Status::Internal)?;
            let (to, behind) = rest.split_at_mut_checked(opened.len()).ok_or(Status::Internal)?;
            to.copy_from_slice(opened);
            rest = behind;
            first = first.saturating_add(1);
        }
        Ok::<(), Refused>(())
    })??;
    streams.0.insert(place, (key, OpenStream::Decrypt { body }));
    Ok(())
}

fn refuse(request_id: u32, refused: &Refused, replies: &mut Replies) -> Outcome {
    // Rounded up: who is told to wait for nothing asks again at once.
    let retry_after_ms = u32::try_from(refused.retry_after.as_micros().div_ceil(1000)).unwrap_or(u32::MAX);
    match replies.push_refusal(request_id, refused.status, retry_after_ms) {
        Ok(()) if !refused.close => Outcome::Continue,
        Ok(()) | Err(_) => Outcome::Close,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_never_names_a_wait_of_nothing() {
        for (wait, named) in
            [(Duration::from_micros(1), 1), (Duration::from_micros(1_001), 2), (BACK_OFF_LAST, 10_000)]
        {
            let mut replies = Replies::new(kms_secret_memory::Policy::Auto).unwrap();
            refuse(1, &Refused::busy(wait), &mut replies);
            let frame = Frame::parse(replies.waiting(), kms_protocol::FRAME_MAX).unwrap().unwrap();
            let refusal: kms_protocol::Refusal = kms_protocol::decode_fields(frame.fields).unwrap();
            assert_eq!(refusal.retry_after_ms, named);
        }
    }
}
