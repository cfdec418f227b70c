//! The agent's core with keys loaded: any requests, from peers with any credentials, at any time.
//!
//! The script says who connects, what each sends, how time passes and how passphrases come out. After each step: who is not
//! served gets nothing, a locked agent uses no key, every reply has the shape of its opcode, what was sealed opens again, no
//! salt comes twice, a key is used no more often and no longer than it may be, and a key that may not leave never does.

use std::{collections::HashSet, sync::OnceLock, time::Duration};

use kms_agent::{
    audit::{Audit, Event},
    authorize::Peer,
    config::Limits,
    core::{Core, Now, Outcome, Session, Surroundings, Ticket},
    crypto::{Random, RandomUnavailable},
    keyring::Keyring,
    reply::Replies,
};
use kms_envelope::{HEADER_LEN, Header, KeyId, Purpose};
use kms_protocol::{
    Add, Constraint, FRAME_HEAD_LEN, FRAME_MAX, Frame, Hello, Items, KeyAndContext, KeyRef, Material, Opcode,
    Refusal, Request, Status, constraint, decode_fields,
};
use kms_secret_memory::{LockedBuffer, Policy, Secret};
use sha2::{Digest, Sha512};

use crate::{
    replies,
    script::Script,
    show::parts,
    wire::{make_frame, opcode},
};

const OWN_UID: u32 = 1000;

/// The id that the vectors give their key.
const BACKUP_ID: [u8; 16] = *b"\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7\xa8\xa9\xaa\xab\xac\xad\xae\xaf";

/// A key that nobody can export, and that no input has by chance.
const CANARY: [u8; 32] = *b"\xf3\x9aK\xd1this key must not leave.\x07\xee\x81\x9c";

/// Never the same bytes twice, and the same ones in every run.
struct Counted {
    counter: u64,
    /// The next value of this length.
    next: Option<[u8; 16]>,
}

impl Random for Counted {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), RandomUnavailable> {
        if bytes.len() == 16
            && let Some(next) = self.next.take()
        {
            bytes.copy_from_slice(&next);
            return Ok(());
        }
        for piece in bytes.chunks_mut(8) {
            self.counter += 1;
            // SplitMix64, which takes each value once.
            let mut mixed = self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            piece.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..piece.len()]);
        }
        Ok(())
    }
}

struct NoAudit;

impl Audit for NoAudit {
    fn record(&mut self, _: &Event) {}
}

/// Shielding is not what is tested, so the cheapest memory that there is.
fn memory() -> Policy {
    static MEMORY: OnceLock<Policy> = OnceLock::new();
    *MEMORY.get_or_init(|| match LockedBuffer::new(1 << 20, Policy::Mlock) {
        Ok(_) => Policy::Mlock,
        Err(_) => Policy::Preferred,
    })
}

/// One connection.
struct Connection {
    session: Session,
    peer: Peer,
    ended: bool,
}

struct Agent {
    core: Core<Counted, NoAudit>,
    replies: Replies,
    now: Now,
    frame_max: usize,
    locked: bool,
    waiting: Option<Waiting>,
    salts: HashSet<[u8; 24]>,
    ids: Ids,
    once_used: u32,
}

/// A derivation that is to be finished.
struct Waiting {
    ticket: Ticket,
    passphrase: Vec<u8>,
    opcode: Opcode,
    id: u32,
}

/// Keys that are loaded and restricted.
#[derive(Clone, Copy, Default)]
struct Ids {
    once: [u8; 16],
    asked: [u8; 16],
    soon: [u8; 16],
}

const SOON: u64 = 60;

impl Agent {
    fn start(frame_max: usize) -> Self {
        let mut random = Counted { counter: 0, next: None };
        let now = Now { boot: Duration::from_secs(1000), unix: 1_700_000_000 };
        let memory = memory();
        let keyring = Keyring::new(memory, &mut random).unwrap();
        random.next = Some(BACKUP_ID);
        let limits = Limits { frame: frame_max, keys: 12, ..Limits::default() };
        let core = Core::new(OWN_UID, keyring, limits, random, NoAudit, now);
        let replies = Replies::new(memory).unwrap();
        Self {
            core,
            replies,
            now,
            frame_max,
            locked: false,
            waiting: None,
            salts: HashSet::new(),
            ids: Ids::default(),
            once_used: 0,
        }
    }

    fn connect(&mut self, uid: u32) -> Connection {
        assert_eq!(self.core.serves(uid), uid == OWN_UID);
        // The transport would not let another uid this far; the core does not count on that.
        let peer = Peer { uid };
        Connection { session: self.core.begin(peer), peer, ended: false }
    }

    fn add(
        &mut self,
        to: &mut Connection,
        name: &str,
        import: Option<&[u8]>,
        kinds: &[(u32, u64)],
    ) -> [u8; 16] {
        let constraints = kinds.iter().map(|(kind, value)| Constraint { kind: *kind, value: *value });
        let mut token = [0; 16];
        token[..name.len()].copy_from_slice(name.as_bytes());
        let material = if import.is_some() { Material::Import } else { Material::Generate };
        let constraints =
            constraints.chain([Constraint { kind: constraint::MEMORY_ONLY, value: 0 }]).collect();
        let fields = Add { token, name, material, if_missing: false, constraints };
        let payload = self.ask(to, &Request::Add { fields, material: import.unwrap_or_default() }).unwrap();
        payload[..16].try_into().unwrap()
    }

    /// Fields and payload of the reply, or its status.
    fn ask(&mut self, connection: &mut Connection, request: &Request<'_>) -> Result<Vec<u8>, Status> {
        let (opcode, fields, payload) = parts(request);
        let frame = fields.frame(opcode.code(), 77, payload).unwrap();
        let answer = self.send(connection, &frame).expect("each request has an answer");
        let reply = Frame::parse(&answer, FRAME_MAX).unwrap().unwrap();
        match Status::from_code(reply.head.code).unwrap() {
            Status::Ok => Ok(answer[FRAME_HEAD_LEN..].to_vec()),
            status => Err(status),
        }
    }

    /// Gives a frame to the core, looks at the answer and gives it back.
    fn send(&mut self, connection: &mut Connection, bytes: &[u8]) -> Option<Vec<u8>> {
        let frame = match Frame::parse(bytes, self.frame_max) {
            Ok(Some(frame)) => frame,
            Ok(None) => return None,
            Err(error) => {
                self.core.refuse_frame(error, &mut self.replies);
                connection.ended = true;
                let answer = self.take_replies();
                let reply = Frame::parse(&answer, self.frame_max).unwrap().unwrap();
                let status = Status::from_code(reply.head.code).unwrap();
                assert!([Status::Unsupported, Status::Malformed, Status::TooLarge].contains(&status));
                assert_eq!(reply.head.request_id.to_le_bytes(), bytes[8..12]);
                return Some(answer);
            }
        };
        let greeted = connection.session.greeted();
        let around = Surroundings { connections: 4, frame_pool: 0, panics: 0 };
        let outcome = self.core.handle(&mut connection.session, &frame, self.now, around, &mut self.replies);
        let answer = self.take_replies();
        let opcode = Opcode::from_code(frame.head.code);
        match outcome {
            Outcome::Derive(work, ticket) => {
                assert!(answer.is_empty() && self.waiting.is_none() && connection.peer.uid == OWN_UID);
                drop(work);
                let opcode = opcode.unwrap();
                assert!([Opcode::Lock, Opcode::Unlock, Opcode::Export].contains(&opcode));
                let (passphrase, id) = (frame.payload.to_vec(), frame.head.request_id);
                self.waiting = Some(Waiting { ticket, passphrase, opcode, id });
                None
            }
            Outcome::Continue | Outcome::Close => {
                let closes = matches!(outcome, Outcome::Close);
                connection.ended |= closes;
                self.check(connection.peer, greeted, closes, &frame, &answer);
                Some(answer)
            }
        }
    }

    fn take_replies(&mut self) -> Vec<u8> {
        let answer = self.replies.waiting().to_vec();
        self.replies.clear();
        assert!(self.replies.waiting().is_empty());
        assert!(!answer.windows(CANARY.len()).any(|window| window == CANARY), "the canary is out");
        answer
    }

    /// What holds for every reply.
    fn check(&mut self, peer: Peer, greeted: bool, closes: bool, frame: &Frame<'_>, answer: &[u8]) {
        let opcode = Opcode::from_code(frame.head.code);
        let status = self.check_shape(opcode, frame.payload, frame.head.request_id, answer);
        if peer.uid != OWN_UID {
            assert_ne!(status, Status::Ok, "uid {} is served", peer.uid);
        }
        if !greeted {
            let hello = opcode == Some(Opcode::Hello);
            assert!(hello || (closes && status == Status::Malformed), "{opcode:?} before hello");
        }
        if closes {
            assert!(
                [Status::Malformed, Status::Unsupported].contains(&status),
                "{opcode:?} ends with {status:?}"
            );
        }
        if status == Status::Ok {
            let opcode = opcode.unwrap();
            assert!(!self.locked || while_locked(opcode), "{opcode:?} while locked");
        }
    }

    /// One whole reply to this request and nothing else; its status.
    fn check_shape(&mut self, opcode: Option<Opcode>, asked: &[u8], id: u32, answer: &[u8]) -> Status {
        let reply = Frame::parse(answer, self.frame_max).unwrap().expect("a whole reply");
        assert_eq!(reply.frame_len(), answer.len(), "one reply, and nothing behind it");
        assert_eq!(reply.head.request_id, id);
        let status = Status::from_code(reply.head.code).expect("a status that there is");
        assert!(![Status::Disabled, Status::AuditUnavailable].contains(&status), "a reserved status");
        if status != Status::Ok {
            let Refusal { retry_after_ms } = decode_fields(reply.fields).unwrap();
            assert_eq!(retry_after_ms > 0, status == Status::Busy);
            assert!(reply.payload.is_empty());
            return status;
        }
        let opcode = opcode.expect("an opcode that there is not is not answered");
        assert!(replies::decode(opcode, status, reply.fields).is_ok(), "{opcode:?} has other fields");
        self.check_payload(opcode, asked, &reply);
        status
    }

    fn check_payload(&mut self, opcode: Opcode, asked: &[u8], reply: &Frame<'_>) {
        let payload = reply.payload;
        let sealed = |purpose: Purpose| {
            let header = Header::parse(payload).unwrap();
            assert_eq!(header.purpose, purpose, "{opcode:?}");
        };
        match opcode {
            Opcode::Encrypt => sealed(Purpose::Message),
            Opcode::Wrap | Opcode::DataKeyWrapped => sealed(Purpose::WrappedKey),
            Opcode::StreamNew => {
                assert_eq!(payload.len(), 232);
                sealed(Purpose::Stream);
            }
            Opcode::RemoteStreamNew => {
                assert_eq!(payload.len(), 188);
                sealed(Purpose::Stream);
            }
            Opcode::StreamOpen => assert_eq!(payload.len(), 44),
            Opcode::Mac => {
                assert_eq!(payload.len(), 60);
                sealed(Purpose::Tag);
            }
            Opcode::Export => assert_eq!(payload.len(), 32),
            Opcode::Rewrap => assert!(payload.is_empty() || payload.len() == asked.len()),
            Opcode::DataKey => {
                let length = (payload.len() - 100) / 2;
                assert!((1..=1024).contains(&length) && payload.len() == 2 * length + 100);
            }
            Opcode::Batch => return self.check_batch(asked, payload),
            Opcode::Decrypt
            | Opcode::Unwrap
            | Opcode::Random
            | Opcode::RemoteStreamEncrypt
            | Opcode::RemoteStreamDecrypt => {}
            Opcode::Hello
            | Opcode::Ping
            | Opcode::Status
            | Opcode::Lock
            | Opcode::Unlock
            | Opcode::Add
            | Opcode::List
            | Opcode::Describe
            | Opcode::Remove
            | Opcode::Rotate
            | Opcode::Rename
            | Opcode::RemoveAll
            | Opcode::RemoteStreamOpen
            | Opcode::RemoteStreamClose
            | Opcode::Verify
            | Opcode::MacVerify
            | Opcode::Bind
            | Opcode::Stats => assert!(payload.is_empty(), "{opcode:?} has no payload"),
        }
        if opcode == Opcode::Export {
            let Ids { once, asked, soon } = self.ids;
            let may_not = [BACKUP_ID, once, asked, soon];
            assert!(!may_not.iter().any(|id| reply.fields[..16] == *id), "a key that may not leave is out");
        }
        self.count_use(opcode, payload);
    }

    fn count_use(&mut self, opcode: Opcode, payload: &[u8]) {
        let made = match opcode {
            Opcode::Encrypt
            | Opcode::Wrap
            | Opcode::DataKeyWrapped
            | Opcode::StreamNew
            | Opcode::RemoteStreamNew => payload,
            Opcode::DataKey => &payload[(payload.len() - 100) / 2..],
            Opcode::Rewrap if !payload.is_empty() => payload,
            Opcode::Mac => &payload[..HEADER_LEN],
            _ => return,
        };
        let id = *Header::parse(made).unwrap().key_id.as_bytes();
        if let Some(salt) = made[HEADER_LEN..].first_chunk::<24>() {
            assert!(self.salts.insert(*salt), "a salt comes twice");
        }
        if id == self.ids.once {
            self.once_used += 1;
            assert!(self.once_used <= 2, "a key is used beyond its count");
        }
        assert!(id != self.ids.asked || id == [0; 16], "nobody said yes");
        let over = self.now.boot >= Duration::from_secs(1000 + SOON);
        assert!(id != self.ids.soon || !over || id == [0; 16], "a key is used beyond its time");
    }

    fn check_batch(&mut self, asked: &[u8], payload: &[u8]) {
        let (items, answers) = (Items::parse(asked).unwrap(), Items::parse(payload).unwrap());
        assert_eq!(items.len(), answers.len());
        for (item, answer) in items.zip(answers) {
            let opcode = Opcode::from_code(item.head.code);
            let answer = make_frame(answer.head.code, answer.head.request_id, answer.fields, answer.payload);
            let status = self.check_shape(opcode, item.payload, item.head.request_id, &answer);
            let nested =
                matches!(opcode, Some(Opcode::Batch | Opcode::Lock | Opcode::Add | Opcode::Bind) | None);
            assert!(!nested || status == Status::Unsupported, "{opcode:?} in a batch");
        }
    }

    /// Argon2 is left out: the key is made of the passphrase in a cheaper way, or is another, or there was no memory for it.
    fn finish(&mut self, how: u8) {
        let Some(Waiting { ticket, passphrase, opcode, id }) = self.waiting.take() else { return };
        let mut key = Secret::<32>::zeroed();
        let hash = Sha512::digest(&passphrase);
        key.expose_secret_mut().copy_from_slice(&hash[..32]);
        let key = match how % 4 {
            0 => None,
            1 => {
                key.expose_secret_mut()[0] ^= 1;
                Some(key)
            }
            _ => Some(key),
        };
        self.core.derived(ticket, key, self.now, &mut self.replies);
        let answer = self.take_replies();
        if self.check_shape(Some(opcode), &[], id, &answer) == Status::Ok {
            match opcode {
                Opcode::Lock => self.locked = true,
                Opcode::Unlock => self.locked = false,
                _ => assert!(!self.locked),
            }
        }
    }

    /// What came out of `request` goes back in: it has to give what went in, unless the key may not be used any more.
    fn and_back(&mut self, connection: &mut Connection, frame: &[u8], answer: &[u8]) {
        let frame = Frame::parse(frame, FRAME_MAX).unwrap().unwrap();
        let reply = Frame::parse(answer, FRAME_MAX).unwrap().unwrap();
        let (Some(opcode), 0) = (Opcode::from_code(frame.head.code), reply.head.code) else { return };
        let Ok(request) = Request::decode(opcode, &frame) else { return };
        let made = reply.payload;
        let (back, wanted): (Request<'_>, &[u8]) = match request {
            Request::Encrypt { fields, plaintext } => {
                (Request::Decrypt { fields, ciphertext: made }, plaintext)
            }
            Request::Wrap { fields, plaintext } => (Request::Unwrap { fields, ciphertext: made }, plaintext),
            Request::DataKey(fields) => {
                let (key, wrapped) = made.split_at(fields.length as usize);
                let fields = KeyAndContext { key: fields.key, context: fields.context };
                (Request::Unwrap { fields, ciphertext: wrapped }, key)
            }
            Request::StreamNew(fields) => {
                let (head, key) = made.split_at(188);
                (Request::StreamOpen { fields, head }, key)
            }
            Request::Mac { fields, digest } => {
                let tag_and_digest = [made, digest].concat();
                return self
                    .is_tag(connection, &Request::MacVerify { fields, tag_and_digest: &tag_and_digest });
            }
            _ => return,
        };
        match self.ask(connection, &back) {
            Ok(opened) => assert_eq!(opened, wanted, "{} does not give back what went in", opcode.name()),
            Err(status) => assert_eq!(status, Status::Limit, "{} does not go back", opcode.name()),
        }
    }

    fn is_tag(&mut self, connection: &mut Connection, request: &Request<'_>) {
        let checked = self.ask(connection, request);
        assert!(matches!(checked.as_deref(), Ok([]) | Err(Status::Limit)), "{checked:?}");
    }
}

fn while_locked(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Hello | Opcode::Ping | Opcode::Status | Opcode::Lock | Opcode::Unlock)
}

/// What a step does; the two low bits of its byte say on which connection.
pub(crate) mod step {
    pub(crate) const SHAPED: u8 = 0;
    pub(crate) const FRAME: u8 = 3;
    pub(crate) const TIME: u8 = 5;
    pub(crate) const FINISH: u8 = 6;
    pub(crate) const CONNECT: u8 = 7;
}

/// Steps, after one byte for the limits and one for the fourth connection.
pub(crate) fn run(input: &[u8]) {
    let mut script = Script(input);
    let frame_max = if script.byte() & 1 == 0 { FRAME_MAX } else { 128 * 1024 };
    let mut agent = Agent::start(frame_max);
    let stranger = script.u32();
    let mut connections = [OWN_UID, OWN_UID, stranger, 0].map(|uid| agent.connect(uid));
    for connection in &mut connections {
        let greeted = agent.ask(connection, &Request::Hello(Hello { version: 1 }));
        assert_eq!(greeted.is_ok(), connection.peer.uid == OWN_UID);
    }
    load(&mut agent, &mut connections[0]);
    for _ in 0..24 {
        if script.is_over() {
            break;
        }
        let byte = script.byte();
        let at = usize::from(byte & 3);
        match (byte >> 2) % 8 {
            step::TIME => {
                // Until then, all requests arrived together.
                agent.core.end_batch();
                let seconds = u64::from(script.u16());
                agent.now.boot += Duration::from_secs(seconds);
                agent.now.unix += seconds;
                if seconds % 2 == 1 {
                    agent.core.cool();
                }
            }
            step::FINISH => agent.finish(script.byte()),
            step::CONNECT => {
                let uid = if script.byte() & 1 == 0 { OWN_UID } else { script.u32() };
                agent.core.end(&connections[at].session);
                connections[at] = agent.connect(uid);
            }
            kind => {
                let frame = if kind >= step::FRAME {
                    let len = usize::from(script.u16());
                    script.bytes(len).to_vec()
                } else {
                    let (opcode, id) = (opcode(script.byte()), script.byte());
                    let (fields, payload) = (usize::from(script.u16()), usize::from(script.u16()));
                    let fields = script.bytes(fields);
                    make_frame(opcode.code(), id.into(), fields, script.bytes(payload))
                };
                let connection = &mut connections[at];
                if !connection.ended
                    && let Some(answer) = agent.send(connection, &frame)
                    && !connection.ended
                {
                    agent.and_back(connection, &frame, &answer);
                }
            }
        }
    }
    agent.finish(2);
}

/// One key of each kind, and numbers for two of them.
fn load(agent: &mut Agent, own: &mut Connection) {
    let key: Vec<u8> = (0..32).collect();
    let backup = agent.add(own, "backup", Some(&key), &[]);
    assert_eq!(backup, BACKUP_ID);
    let once = agent.add(own, "once", Some(&CANARY), &[(constraint::MAX_USES, 2)]);
    let asked = agent.add(own, "asked", None, &[(constraint::CONFIRM, 0)]);
    let soon = agent.add(own, "soon", None, &[(constraint::LIFETIME, SOON)]);
    agent.add(own, "out", None, &[(constraint::EXPORTABLE, 0)]);
    agent.ids = Ids { once, asked, soon };
    for (number, key) in [(0, "backup"), (1, "once")] {
        agent.ask(own, &Request::Bind(kms_protocol::Bind { number, key: KeyRef::Name(key) })).unwrap();
    }
    assert_eq!(KeyId::from_bytes(backup).to_string(), "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf");
}
