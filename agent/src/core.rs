//! The core: one request in, one reply out, no I/O.
//!
//! Owns the order of things: frame, request, authorize, keyring, crypto, response. Time comes in with each call and
//! randomness through a type parameter, so that a test can stop the one and break the other. It never sees a socket,
//! and never blocks: what takes long (the passphrase's key derivation) is handed out as work and comes back.

mod back_off;
mod batch;
mod counts;
mod forget;
mod keys;
mod refusal;
mod repeats;
mod streams;
mod uses;

use std::{collections::HashMap, rc::Rc, time::Duration};

use kms_envelope::{Body, Header, KEY_LEN, KeyId, MESSAGE_MAX, Purpose, STREAM_HEAD_LEN};
use kms_protocol::{
    BINDINGS_MAX, Bind, Bound, Fact, Frame, Hello, KeyName, KeyRef, LockState, Locking, NoFields, Opcode,
    PAGE_ROWS_MAX, PASSPHRASE_MAX, PROTOCOL_VERSION, REMOTE_STREAMS_MAX, RemoteStream, Request, Status,
    StatusReply, Welcome, constraint,
};
use kms_secret_memory::{Secret, SecretVec};

use self::{
    back_off::BackOff,
    counts::Counts,
    forget::Unasked,
    refusal::{Refused, refuse},
    repeats::Repeats,
    streams::{OpenStream, Streams},
    uses::{STREAM_KEY_LEN, Use, write_stream_key},
};
use crate::{
    audit::{Audit, Event, Reason},
    authorize::{Peer, Permit, Policy, authorize},
    config::Limits,
    crypto::{Derivation, LOCK_SALT_LEN, Random, Salts, apart, random_bytes},
    keyring::{Found, Keyring, KeyringError, Selector},
    reply::Replies,
};

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
    /// How often keys had been forgotten when it was made.
    forgotten: u64,
    /// Others wait as long as this is there: a ticket that is lost, with its connection or in a panic, holds up nobody.
    _turn: Rc<()>,
}

enum TicketPurpose {
    Lock { salt: [u8; LOCK_SALT_LEN] },
    Unlock,
    Export { key: KeyId, version: u32 },
}

impl TicketPurpose {
    fn opcode(&self) -> Opcode {
        match self {
            Self::Lock { .. } => Opcode::Lock,
            Self::Unlock => Opcode::Unlock,
            Self::Export { .. } => Opcode::Export,
        }
    }
}

/// One connection, as far as the core knows it.
pub struct Session {
    number: u64,
    peer: Peer,
    greeted: bool,
    /// What `hello` names. It outlives a change of the limits, since the client goes by it.
    frame_max: usize,
    next_stream: u32,
    /// What the numbers of `bind` stand for: keys, never permits or versions.
    bindings: HashMap<u32, KeyId>,
}

impl Session {
    /// True once `hello` was answered.
    #[must_use]
    pub fn greeted(&self) -> bool {
        self.greeted
    }

    /// The frame maximum of this connection.
    #[must_use]
    pub fn frame_max(&self) -> usize {
        self.frame_max
    }
}

/// The agent without its sockets. Randomness and audit are what `main` chooses; time comes in with each call.
pub struct Core<R, A> {
    own_uid: u32,
    keyring: Keyring,
    unasked: Unasked,
    process_facts: Vec<Fact>,
    limits: Limits,
    random: R,
    audit: A,
    salts: Salts,
    streams: Streams,
    sessions: u64,
    repeats: Repeats,
    back_off: BackOff,
    /// Shared with the ticket of the derivation that is under way.
    turn: Rc<()>,
    started: Duration,
    counts: Counts,
}

impl<R: Random, A: Audit> Core<R, A> {
    /// A core that serves `own_uid` from `keyring`.
    #[must_use]
    pub fn new(own_uid: u32, keyring: Keyring, limits: Limits, random: R, audit: A, now: Now) -> Self {
        Self {
            own_uid,
            keyring,
            unasked: Unasked::new(now.boot),
            process_facts: Vec::new(),
            limits,
            random,
            audit,
            salts: Salts::default(),
            streams: Streams::default(),
            sessions: 0,
            repeats: Repeats::default(),
            back_off: BackOff::default(),
            turn: Rc::default(),
            started: now.boot,
            counts: Counts::default(),
        }
    }

    /// The state in a few words, for a person.
    #[must_use]
    pub fn summary(&self) -> String {
        let state = if self.keyring.is_locked() { "locked" } else { "unlocked" };
        let keys = self.keyring.len();
        format!("{state}, {keys} {}", if keys == 1 { "key" } else { "keys" })
    }

    /// Has `status` show what only the process knows of itself.
    pub fn show(&mut self, facts: Vec<Fact>) {
        self.process_facts = facts;
    }

    /// The uid that the agent runs under.
    #[must_use]
    pub fn own_uid(&self) -> u32 {
        self.own_uid
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

    /// When [`expire`](Self::expire) has something to do, since boot.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        [self.keyring.next_deadline(), self.idle_deadline()].into_iter().flatten().min()
    }

    /// Wipes every key whose lifetime is over, and ends its streams; and all of them when the agent was idle for too long.
    pub fn expire(&mut self, now: Now) {
        if self.keyring.next_deadline().is_some_and(|deadline| deadline <= now.boot) {
            for id in self.keyring.expire(now.boot) {
                self.streams.end_key(id);
                self.audit.record(&Event::Expired { key: id });
            }
        }
        if self.idle_deadline().is_some_and(|deadline| deadline <= now.boot) {
            self.forget(Reason::Idle, now);
        }
    }

    /// A new connection of this peer.
    pub fn begin(&mut self, peer: Peer) -> Session {
        self.sessions = self.sessions.wrapping_add(1);
        let number = self.sessions;
        Session {
            number,
            peer,
            greeted: false,
            frame_max: self.limits.frame,
            next_stream: 1,
            bindings: HashMap::new(),
        }
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
        replies.set_frame_max(session.frame_max);
        self.counts.taken_up();
        self.expire(now);
        let (request_id, opcode) = (frame.head.request_id, Opcode::from_code(frame.head.code));
        let before = replies.waiting().len();
        let answered = self.answer(session, frame, now, around, replies);
        let outcome = match answered {
            Ok(outcome) => {
                if !matches!(outcome, Outcome::Derive(..)) {
                    self.counts.ended(opcode, Status::Ok);
                }
                outcome
            }
            Err(refused) => {
                self.counts.ended(opcode, refused.status);
                refuse(request_id, &refused, replies)
            }
        };
        self.counts.moved(frame.frame_len(), replies.waiting().len().saturating_sub(before));
        outcome
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
        self.counts.ended(None, status);
        let before = replies.waiting().len();
        refuse(request_id, &status.into(), replies);
        self.counts.moved(0, replies.waiting().len().saturating_sub(before));
    }

    fn answer(
        &mut self,
        session: &mut Session,
        frame: &Frame<'_>,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let fatal = |status| Refused { close: true, ..Refused::from(status) };
        let Some(opcode) = Opcode::from_code(frame.head.code) else {
            return Err(if session.greeted { Status::Unsupported.into() } else { fatal(Status::Malformed) });
        };
        if session.greeted == (opcode == Opcode::Hello) {
            return Err(fatal(Status::Malformed));
        }
        let request = Request::decode(opcode, frame).map_err(|_| fatal(Status::Malformed))?;
        self.carry_out(session, request, frame.head.request_id, now, around, replies)
    }

    /// Does what a request asks for, if its peer may. The one way to anything behind [`authorize`].
    fn carry_out(
        &mut self,
        session: &mut Session,
        request: Request<'_>,
        request_id: u32,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let policy = Policy { own_uid: self.own_uid, locked: self.keyring.is_locked() };
        let permit = authorize(&session.peer, &request, &policy)?;
        self.unasked.note(&request, now);
        let uid = session.peer.uid;
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
                let added =
                    self.once(uid, fields.token, |core| core.add(&permit, uid, &fields, material, now))?;
                push(replies, request_id, &added)?;
            }
            Request::List(list) => self.list(&permit, list.cursor, now, request_id, replies)?,
            Request::Describe(describe) => {
                let key = session.selector(describe.key)?;
                self.describe(&permit, key, describe.versions_after, now, request_id, replies)?;
            }
            Request::Remove(remove) => {
                let removed = self.once(uid, remove.token, |core| {
                    core.remove(&permit, uid, session.selector(remove.key)?)
                })?;
                push(replies, request_id, &removed)?;
            }
            Request::Rotate(rotate) => {
                let rotated = self.once(uid, rotate.token, |core| {
                    core.rotate(&permit, uid, session.selector(rotate.key)?, now)
                })?;
                push(replies, request_id, &rotated)?;
            }
            Request::Rename(rename) => {
                let renamed = self.once(uid, rename.token, |core| {
                    core.rename(&permit, uid, session.selector(rename.key)?, rename.name)
                })?;
                push(replies, request_id, &renamed)?;
            }
            Request::RemoveAll(remove) => {
                let removed = self.once(uid, remove.token, |core| core.remove_all(&permit, uid))?;
                push(replies, request_id, &removed)?;
            }
            Request::Export { fields, passphrase } => {
                let key = session.selector(fields.key);
                return self.export(permit, uid, key, fields.version, passphrase, request_id, now, replies);
            }
            Request::Encrypt { fields, plaintext } => {
                let key = session.selector(fields.key)?;
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.seal(using, key, Purpose::Message, plaintext)?;
            }
            Request::Decrypt { fields, ciphertext } => {
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.open(using, session.selector(fields.key), Purpose::Message, ciphertext)?;
            }
            Request::StreamNew(fields) => {
                let payload_len = STREAM_HEAD_LEN.saturating_add(STREAM_KEY_LEN);
                replies.check_room(&NoFields {}, payload_len)?;
                let (head, key) = self.new_stream(&permit, session.selector(fields.key)?, fields.context)?;
                replies.push(request_id, &NoFields {}, payload_len, |payload| {
                    let (head_part, key_part) =
                        payload.split_at_mut_checked(STREAM_HEAD_LEN).ok_or(Status::Internal)?;
                    head_part.copy_from_slice(&head);
                    write_stream_key(key_part, &key)
                })??;
            }
            Request::StreamOpen { fields, head } => {
                replies.check_room(&NoFields {}, STREAM_KEY_LEN)?;
                let (key, _) =
                    self.open_stream(&permit, session.selector(fields.key), fields.context, head)?;
                replies.push(request_id, &NoFields {}, STREAM_KEY_LEN, |payload| {
                    write_stream_key(payload, &key)
                })??;
            }
            Request::RemoteStreamNew(fields) => {
                self.streams.check_room(session)?;
                let (head, key) = self.new_stream(&permit, session.selector(fields.key)?, fields.context)?;
                let body = Box::new(apart(|| Body::new(key)));
                let key = Header::parse(&head)?.key_id;
                let stream = self.streams.hold(session, key, OpenStream::Encrypt { body, next: 0 })?;
                let pushed = replies.push(request_id, &RemoteStream { stream }, head.len(), |payload| {
                    payload.copy_from_slice(&head);
                    Ok::<(), Status>(())
                });
                self.streams.keep_if(session, stream, pushed)??;
            }
            Request::RemoteStreamOpen { fields, head } => {
                // What the ciphertext must not be is told first, and what finds no room is no use of the key.
                let key = session.selector(fields.key).and_then(|key| {
                    self.streams.check_room(session)?;
                    Ok(key)
                });
                let (message_key, id) = self.open_stream(&permit, key, fields.context, head)?;
                let body = Box::new(apart(|| Body::new(message_key)));
                let stream = self.streams.hold(session, id, OpenStream::Decrypt { body })?;
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
            Request::Wrap { fields, plaintext } => {
                let key = session.selector(fields.key)?;
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.seal(using, key, Purpose::WrappedKey, plaintext)?;
            }
            Request::Unwrap { fields, ciphertext } => {
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.open(using, session.selector(fields.key), Purpose::WrappedKey, ciphertext)?;
            }
            Request::DataKey(fields) => {
                let key = session.selector(fields.key)?;
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.data_key(using, key, fields.length, true)?;
            }
            Request::DataKeyWrapped(fields) => {
                let key = session.selector(fields.key)?;
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.data_key(using, key, fields.length, false)?;
            }
            Request::Rewrap { fields, ciphertext } => {
                let to = fields.to.map(|to| session.selector(to));
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.rewrap(using, session.selector(fields.key), to, ciphertext)?;
            }
            Request::Verify { fields, ciphertext } => {
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.verify(using, session.selector(fields.key), ciphertext)?;
            }
            Request::Mac { fields, digest } => {
                let key = session.selector(fields.key)?;
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.mac(using, key, digest)?;
            }
            Request::MacVerify { fields, tag_and_digest } => {
                let using = Use::new(&permit, fields.context, request_id, replies);
                self.verify_mac(using, session.selector(fields.key), tag_and_digest)?;
            }
            Request::Random(kms_protocol::Random { length }) => {
                self.random(&permit, length, request_id, replies)?;
            }
            Request::Bind(Bind { number, key }) => {
                let Found { id, .. } = self.keyring.find(&permit, session.selector(key)?)?;
                if session.bindings.len() >= BINDINGS_MAX && !session.bindings.contains_key(&number) {
                    return Err(Status::Limit.into());
                }
                session.bindings.insert(number, id);
                push(replies, request_id, &Bound { id: *id.as_bytes() })?;
            }
            Request::Batch { frames } => {
                self.batch(session, &permit, frames, request_id, now, around, replies)?;
            }
            Request::Stats => self.stats(&permit, now, around, request_id, replies)?,
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
            frame_max: size(session.frame_max),
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
        let passphrase = self.keyring.lock_salt().is_some();
        let idle_lock =
            self.limits.idle_lock.map_or_else(|| "none".to_owned(), |time| time.as_secs().to_string());
        let mut status = StatusReply {
            state: if self.keyring.is_locked() { LockState::Locked } else { LockState::Unlocked },
            facts: vec![
                fact("version", env!("CARGO_PKG_VERSION").to_owned()),
                fact("uid", self.own_uid.to_string()),
                fact("secret-memory", secret_memory),
                fact("keystore", "none".to_owned()),
                fact("keys", self.keyring.len().to_string()),
                fact("connections", around.connections.to_string()),
                fact("panics", around.panics.to_string()),
                fact("uptime-ms", now.boot.saturating_sub(self.started).as_millis().to_string()),
                fact("requests", self.counts.requests().to_string()),
                fact("frame-pool", around.frame_pool.to_string()),
                fact("lock-passphrase", if passphrase { "set" } else { "none" }.to_owned()),
                fact("idle-lock", idle_lock),
            ],
        };
        status.facts.extend(self.process_facts.iter().cloned());
        status.facts.extend(self.forgotten_facts());
        status
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
        // An unlock that is under way would make the answer untrue.
        self.check_turn()?;
        if self.keyring.is_locked() {
            push(replies, request_id, &Locking { changed: false })?;
            return Ok(Outcome::Continue);
        }
        let salt = random_bytes(&mut self.random)?;
        self.derive(passphrase, salt, request_id, permit, peer.uid, TicketPurpose::Lock { salt })
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
        self.check_turn()?;
        let Some(salt) = self.keyring.lock_salt().filter(|_| self.keyring.is_locked()) else {
            push(replies, request_id, &Locking { changed: false })?;
            return Ok(Outcome::Continue);
        };
        self.back_off(peer.uid, now)?;
        self.derive(passphrase, salt, request_id, permit, peer.uid, TicketPurpose::Unlock)
    }

    /// A uid that gave a wrong passphrase waits before the next one is tried.
    fn back_off(&self, uid: u32, now: Now) -> Result<(), Refused> {
        let wait = self.back_off.wait(uid, now.boot);
        if wait.is_zero() { Ok(()) } else { Err(Refused::busy(wait)) }
    }

    /// One derivation at a time: each takes a core and 256 MiB.
    fn check_turn(&self) -> Result<(), Refused> {
        if Rc::strong_count(&self.turn) > 1 { Err(Refused::busy(Duration::from_secs(1))) } else { Ok(()) }
    }

    fn derive(
        &self,
        passphrase: SecretVec,
        salt: [u8; LOCK_SALT_LEN],
        request_id: u32,
        permit: Permit,
        uid: u32,
        purpose: TicketPurpose,
    ) -> Result<Outcome, Refused> {
        self.check_turn()?;
        let (forgotten, turn) = (self.unasked.times(), Rc::clone(&self.turn));
        let ticket = Ticket { request_id, permit, uid, purpose, forgotten, _turn: turn };
        Ok(Outcome::Derive(Box::new(Derivation::new(passphrase, salt)), ticket))
    }

    /// Takes the result of a [`Derivation`] and writes the reply that waited for it.
    pub fn derived(&mut self, ticket: Ticket, key: Option<Secret<KEY_LEN>>, now: Now, replies: &mut Replies) {
        self.expire(now);
        let before = replies.waiting().len();
        let opcode = ticket.purpose.opcode();
        let request_id = ticket.request_id;
        let key = key.ok_or(Refused::busy(Duration::from_secs(1)));
        let done = key.and_then(|key| self.finish(ticket, &key, now, replies));
        match done {
            Ok(()) => self.counts.ended(Some(opcode), Status::Ok),
            Err(refused) => {
                self.counts.ended(Some(opcode), refused.status);
                refuse(request_id, &refused, replies);
            }
        }
        self.counts.moved(0, replies.waiting().len().saturating_sub(before));
    }

    fn finish(
        &mut self,
        ticket: Ticket,
        key: &Secret<KEY_LEN>,
        now: Now,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let Ticket { request_id, permit, uid, purpose, forgotten, _turn } = ticket;
        match purpose {
            TicketPurpose::Lock { salt } => {
                self.keyring.lock(&permit, key, salt, &mut self.random)?;
                self.streams.end_all();
                self.audit.record(&Event::Locked { uid });
                push(replies, request_id, &Locking { changed: true })
            }
            //= docs/protocol.md#47-unlock
            //# `locked` when the agent was told to lock while it worked on the passphrase.
            TicketPurpose::Unlock if forgotten != self.unasked.times() => Err(Status::Locked.into()),
            TicketPurpose::Unlock => {
                let unlocked = self.keyring.unlock(&permit, key, &mut self.random);
                self.judge_passphrase(uid, unlocked, now)?;
                self.expire(now);
                self.audit.record(&Event::Unlocked { uid });
                push(replies, request_id, &Locking { changed: true })
            }
            TicketPurpose::Export { key: id, version } => {
                // It may have been locked meanwhile.
                let found = self.keyring.find(&permit, Selector::Id(id))?;
                let right = self.keyring.check_passphrase(&permit, key);
                self.judge_passphrase(uid, right, now)?;
                self.give_out(&permit, uid, &found, version, request_id, replies)
            }
        }
    }

    /// Remembers a wrong passphrase against its uid, and a right one for it.
    fn judge_passphrase(
        &mut self,
        uid: u32,
        outcome: Result<(), KeyringError>,
        now: Now,
    ) -> Result<(), Refused> {
        match outcome {
            Ok(()) => self.back_off.right(uid),
            Err(KeyringError::WrongPassphrase) => {
                let failures = self.back_off.wrong(uid, now.boot);
                self.audit.record(&Event::WrongPassphrase { uid, failures });
            }
            Err(_) => {}
        }
        Ok(outcome?)
    }
}

impl Session {
    /// The key that a request means.
    fn selector<'a>(&self, key: KeyRef<'a>) -> Result<Selector<'a>, Refused> {
        match key {
            KeyRef::Name(name) => Ok(Selector::Name(KeyName::parse(name).map_err(|_| Status::Malformed)?)),
            KeyRef::Id(id) => Ok(Selector::Id(KeyId::from_bytes(id))),
            KeyRef::Bound(number) => {
                self.bindings.get(&number).map(|id| Selector::Id(*id)).ok_or(Status::NotFound.into())
            }
        }
    }
}

fn push<T: bincode::Encode>(replies: &mut Replies, request_id: u32, fields: &T) -> Result<(), Refused> {
    replies.push(request_id, fields, 0, |_| Ok::<(), Refused>(()))?
}

fn secret_passphrase(bytes: &[u8]) -> Result<SecretVec, Refused> {
    if bytes.is_empty() || bytes.len() > PASSPHRASE_MAX {
        return Err(Status::Malformed.into());
    }
    let mut passphrase = SecretVec::with_capacity(bytes.len());
    passphrase.push_slice(bytes).map_err(|_| Status::Malformed)?;
    Ok(passphrase)
}
