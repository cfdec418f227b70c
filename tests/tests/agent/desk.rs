//! The core of the agent without its sockets, so that a test can stop the clock.

use std::{cell::RefCell, rc::Rc, time::Duration};

use kms_agent::{
    audit::{Audit, Event},
    authorize::Peer,
    config::Limits,
    core::{Core, Now, Outcome, Session, Surroundings},
    crypto::KernelRandom,
    keyring::Keyring,
    reply::Replies,
};
use kms_protocol::{FRAME_MAX, Frame, Hello, Opcode};
use kms_secret_memory::Policy;
use kms_tests::{
    Reply,
    wire::{Operations, split_replies},
};

/// Keeps every event.
#[derive(Default)]
pub(crate) struct Events(Rc<RefCell<Vec<Event>>>);

impl Audit for Events {
    fn record(&mut self, event: &Event) {
        self.0.borrow_mut().push(*event);
    }
}

/// A core and the connections to it.
pub(crate) struct Desk {
    pub(crate) core: Core<KernelRandom, Events>,
    events: Rc<RefCell<Vec<Event>>>,
    sessions: Vec<Session>,
    /// The connection that the next request comes over.
    pub(crate) at: usize,
    replies: Replies,
    /// What the clock shows, since boot.
    pub(crate) clock: Duration,
    /// What is added to the clock while a passphrase is worked on.
    pub(crate) derivation: Duration,
}

pub(crate) const UID: u32 = 1001;

impl Desk {
    /// Without a keystore, at this time, with two connections that have said hello; the second is another user's.
    pub(crate) fn new(clock: Duration, limits: Limits) -> Self {
        let keyring = Keyring::new(Policy::Auto, &mut KernelRandom).unwrap();
        let events = Events::default();
        let kept = events.0.clone();
        let limits = Limits { memory_only: true, ..limits };
        let now = Now { boot: clock, unix: 5 };
        let mut core = Core::new(UID, keyring, limits, KernelRandom, events, now);
        let sessions = vec![core.begin(Peer { uid: UID }), core.begin(Peer { uid: UID })];
        let replies = Replies::new(Policy::Auto).unwrap();
        let mut desk =
            Self { core, events: kept, sessions, at: 0, replies, clock, derivation: Duration::ZERO };
        for at in 0..2 {
            desk.at = at;
            desk.call(Opcode::Hello, &Hello { version: 1 }, &[]).unwrap();
        }
        desk.at = 0;
        desk
    }

    pub(crate) fn now(&self) -> Now {
        Now { boot: self.clock, unix: 5 }
    }

    /// What the server does when its timer rings.
    pub(crate) fn ring(&mut self) {
        self.core.expire(self.now());
    }

    /// The events since the last look.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut *self.events.borrow_mut())
    }
}

impl Operations for Desk {
    fn ask(&mut self, bytes: &[u8]) -> Reply {
        let frame = Frame::parse(bytes, FRAME_MAX).unwrap().unwrap();
        let (now, around) = (self.now(), Surroundings::default());
        match self.core.handle(&mut self.sessions[self.at], &frame, now, around, &mut self.replies) {
            Outcome::Derive(derivation, ticket) => {
                let key = derivation.run();
                self.clock += self.derivation;
                let now = self.now();
                self.core.derived(ticket, key, now, &mut self.replies);
            }
            Outcome::Continue => {}
            Outcome::Close => panic!("the connection ends"),
        }
        let mut replies = split_replies(self.replies.waiting());
        self.replies.clear();
        assert_eq!(replies.len(), 1);
        replies.remove(0)
    }
}
