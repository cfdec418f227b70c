//! The turn of one connection: what it sent is read, taken up and answered, and what it waits for next is settled.
//!
//! Owns how much one connection can have done before others come, and who gets memory for frames. Whoever waits for memory
//! holds none that another could wait for, so nobody waits for ever: a connection reads more than is whole only while its uid
//! holds nothing, or into memory that was granted for all of the frame. Implements `docs/protocol.md`, sections 2.2 and 6.

use std::{collections::VecDeque, time::Duration};

use kms_protocol::{Frame, FrameHead};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{
    DEADLINE, Key, READ_LEN, SHARED_LEN, Server,
    connection::{Closed, Connection, Load, Wait},
    now,
    pool::{Grant, Held},
    since_boot,
};
use crate::{
    audit::Audit,
    core::{Core, Now, Outcome, Session, Surroundings, Ticket},
    crypto::{Derivation, Random},
    reply::{FLUSH_LEN, Replies},
};

/// Requests that are taken up of one connection before every other has had its turn.
const TURN_REQUESTS: usize = 64;

/// A turn ends earlier when it has lasted so long and another connection waits: a lone request then waits about as long as it
/// takes to be carried there and back. The clock is looked at after so many requests.
const TURN_TIME: Duration = Duration::from_micros(20);
const CLOCK_REQUESTS: usize = 8;

/// Why the taking up of frames stopped.
enum Stop {
    /// What is left is no whole frame.
    Partial,
    /// Others come first.
    Turn,
    /// The connection ends once its replies are sent.
    Last,
    /// Work to be done elsewhere.
    Work(Box<Derivation>, Ticket),
}

impl<R: Random, A: Audit> Server<R, A> {
    /// Gives a connection its turn, or has it wait until the others had theirs.
    pub(super) fn attend(&mut self, key: Key, events: EpollFlags) {
        let Some(mut connection) = self.take(key) else { return };
        if connection.load == Load::Light {
            self.go_on(key, connection, |server, connection| server.advance(key, connection, events));
        } else {
            self.line_up(key, &mut connection);
            self.put(key, connection);
        }
    }

    fn line_up(&mut self, key: Key, connection: &mut Connection) {
        if connection.load != Load::Queued {
            connection.load = Load::Queued;
            self.heavy.push_back(key);
        }
    }

    pub(super) fn advance(
        &mut self,
        key: Key,
        connection: &mut Connection,
        events: EpollFlags,
    ) -> Result<(), Closed> {
        let gone = events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        match connection.wait {
            Wait::Work | Wait::Memory(_) if gone => {
                if connection.wait == Wait::Work || connection.input.is_some() {
                    return Err(Closed);
                }
            }
            Wait::Work => return Ok(()),
            Wait::Reader(last) => {
                flush(connection)?;
                return match (&connection.output, last) {
                    (Some(_), _) => Ok(()),
                    (None, true) => Err(Closed),
                    (None, false) => self.settle(key, connection, true),
                };
            }
            Wait::Memory(_) if connection.input.is_some() => return Ok(()),
            Wait::Request | Wait::Rest | Wait::Memory(_) => {}
        }
        if connection.input.is_some() {
            self.advance_held(key, connection)
        } else if self.pool.is_free_for(connection.peer.uid) {
            self.advance_at_once(key, connection)
        } else {
            let ended = events.contains(EpollFlags::EPOLLRDHUP);
            self.advance_whole(key, connection, |frame_len| gone || (ended && frame_len <= SHARED_LEN))
        }
    }

    /// Takes up what is held, or reads behind it and takes it up then.
    fn advance_held(&mut self, key: Key, connection: &mut Connection) -> Result<(), Closed> {
        let frame_max = connection.session.frame_max();
        let Some(mut held) = connection.input.take() else { return Ok(()) };
        if let Ok(None) = Frame::parse(held.bytes(), frame_max) {
            let room = held.room(frame_len(held.bytes(), frame_max).max(READ_LEN)).map_err(|_| Closed)?;
            match connection.receive(room)? {
                None => {
                    connection.input = Some(held);
                    return Ok(());
                }
                Some(count) => held.filled(count),
            }
        }
        let (now, around) = (self.warm_up(), self.surroundings());
        let others_wait = || self.ahead.has_others(&self.epoll, key);
        let (taken, stop) =
            self.desk.take_up(&mut connection.session, held.bytes(), now, around, others_wait);
        held.consume(taken);
        let grant = if held.bytes().is_empty() {
            Some(held.release())
        } else {
            connection.input = Some(held);
            None
        };
        self.after(key, connection, grant, taken, stop)
    }

    /// Reads, and holds what is left over. Nobody else of the uid holds anything, so there is memory for that, and for the
    /// rest of the frame: this is how nobody comes to wait for memory while he holds some that another waits for.
    fn advance_at_once(&mut self, key: Key, connection: &mut Connection) -> Result<(), Closed> {
        let Some(len) = self.read_shared(connection, Connection::receive, false)? else { return Ok(()) };
        let (now, around) = (self.warm_up(), self.surroundings());
        let bytes = self.input.expose_secret().get(..len).unwrap_or_default();
        let others_wait = || self.ahead.has_others(&self.epoll, key);
        let (taken, stop) = self.desk.take_up(&mut connection.session, bytes, now, around, others_wait);
        let rest = bytes.get(taken..).unwrap_or_default();
        let held = if rest.is_empty() || matches!(stop, Stop::Last) {
            Ok(None)
        } else {
            let wanted = frame_len(rest, connection.session.frame_max()).max(rest.len()).max(READ_LEN);
            let grant = self.pool.grant(connection.peer.uid, wanted).ok_or(Closed);
            grant.and_then(|grant| Held::new(&[rest], grant).map(Some).map_err(|_| Closed))
        };
        self.input.wipe_range(0..len);
        connection.input = held.inspect_err(|_| self.desk.replies.clear())?;
        self.after(key, connection, None, taken, stop)
    }

    /// Looks at what is there and takes only what is whole: where others of the uid hold memory, the rest stays in the socket
    /// until it is whole, or there is memory for it. `is_all` says whether nothing more can come of a frame of this length.
    fn advance_whole(
        &mut self,
        key: Key,
        connection: &mut Connection,
        is_all: impl FnOnce(usize) -> bool,
    ) -> Result<(), Closed> {
        let Some(len) = self.read_shared(connection, Connection::look, true)? else { return Ok(()) };
        let frame_max = connection.session.frame_max();
        let (now, around) = (self.warm_up(), self.surroundings());
        let bytes = self.input.expose_secret().get(..len).unwrap_or_default();
        if let Ok(None) = Frame::parse(bytes, frame_max) {
            let frame_len = frame_len(bytes, frame_max);
            self.input.wipe_range(0..len);
            if is_all(frame_len) {
                return Err(Closed);
            }
            if frame_len == 0 {
                //= docs/protocol.md#22-limits-and-what-ends-a-connection
                //# a frame that is not whole 5 seconds after its first byte
                let deadline = connection.deadline.or_else(|| Some(since_boot().saturating_add(DEADLINE)));
                self.set_deadline(key, connection, deadline);
                self.wait_for(key, connection, Wait::Rest);
            } else {
                self.wait_for_memory(key, connection, frame_len);
            }
            return Ok(());
        }
        let others_wait = || self.ahead.has_others(&self.epoll, key);
        let (taken, stop) = self.desk.take_up(&mut connection.session, bytes, now, around, others_wait);
        let consumed = self.consume(connection, taken);
        self.input.wipe_range(0..len);
        consumed.inspect_err(|_| self.desk.replies.clear())?;
        self.after(key, connection, None, taken, stop)
    }

    /// Takes bytes that were looked at out of the socket.
    fn consume(&mut self, connection: &Connection, mut count: usize) -> Result<(), Closed> {
        while count > 0 {
            let room = self.input.expose_secret_mut().get_mut(..count).unwrap_or_default();
            count = count.saturating_sub(connection.receive(room)?.ok_or(Closed)?);
        }
        Ok(())
    }

    /// Reads to the shared buffer: a little, and more when that begins a frame that fits there.
    fn read_shared(
        &mut self,
        connection: &Connection,
        read: impl Fn(&Connection, &mut [u8]) -> Result<Option<usize>, Closed>,
        looks: bool,
    ) -> Result<Option<usize>, Closed> {
        let frame_max = connection.session.frame_max();
        let buffer = self.input.expose_secret_mut();
        let len = match read(connection, buffer.get_mut(..READ_LEN).unwrap_or_default()) {
            Ok(Some(len)) => len,
            Ok(None) => return Ok(None),
            Err(closed) => {
                self.input.wipe_range(0..READ_LEN);
                return Err(closed);
            }
        };
        let frame_len = frame_len(buffer.get(..len).unwrap_or_default(), frame_max);
        if len < READ_LEN || frame_len <= READ_LEN || frame_len > SHARED_LEN {
            return Ok(Some(len));
        }
        let from = if looks { 0 } else { len };
        match read(connection, buffer.get_mut(from..frame_len).unwrap_or_default()) {
            Ok(more) => Ok(Some(more.map_or(len, |more| from.saturating_add(more)))),
            Err(closed) => {
                self.input.wipe_range(0..frame_len);
                Err(closed)
            }
        }
    }

    /// Notes that there is something to do, and when.
    pub(super) fn warm_up(&mut self) -> Now {
        let now = now();
        self.last_request = now.boot;
        self.warm = true;
        now
    }

    fn surroundings(&self) -> Surroundings {
        Surroundings { connections: self.open, frame_pool: self.pool.used(), panics: self.panics }
    }

    /// What comes after requests were taken up. The grant is that of the frame that is gone.
    fn after(
        &mut self,
        key: Key,
        connection: &mut Connection,
        grant: Option<Grant>,
        taken: usize,
        stop: Stop,
    ) -> Result<(), Closed> {
        let sent = self.send(key, connection, grant);
        connection.load = if matches!(stop, Stop::Turn) { Load::Heavy } else { Load::Light };
        match stop {
            Stop::Partial | Stop::Turn => {
                sent?;
                self.settle(key, connection, taken > 0)
            }
            Stop::Work(derivation, ticket) => {
                // What was taken up is carried out, also for a peer that is gone.
                self.derive(key, derivation, ticket);
                sent?;
                self.set_deadline(key, connection, None);
                self.wait_for(key, connection, Wait::Work);
                Ok(())
            }
            Stop::Last if connection.output.is_none() => Err(Closed),
            Stop::Last => {
                sent?;
                connection.input = None;
                self.set_deadline(key, connection, Some(since_boot().saturating_add(DEADLINE)));
                self.wait_for(key, connection, Wait::Reader(true));
                Ok(())
            }
        }
    }

    /// Sends what it can now and keeps the rest. A peer for whose unread replies there is no memory is closed.
    pub(super) fn send(
        &mut self,
        key: Key,
        connection: &mut Connection,
        grant: Option<Grant>,
    ) -> Result<(), Closed> {
        let kept = self.send_or_keep(key, connection, grant);
        self.desk.replies.clear();
        kept
    }

    fn send_or_keep(
        &mut self,
        key: Key,
        connection: &mut Connection,
        grant: Option<Grant>,
    ) -> Result<(), Closed> {
        if self.desk.replies.waiting().is_empty() {
            return Ok(());
        }
        // What was not sent before comes first.
        let before = connection.output.take();
        let sent = if before.is_none() { connection.send(self.desk.replies.waiting())? } else { 0 };
        let rest = self.desk.replies.waiting().get(sent..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        let len = rest.len().saturating_add(before.as_ref().map_or(0, |before| before.bytes().len()));
        let granted = match grant {
            Some(mut grant) => grant.resize(len).then_some(grant),
            None => None,
        };
        let grant = match granted {
            Some(grant) => grant,
            None => loop {
                match self.pool.grant(connection.peer.uid, len) {
                    Some(grant) => break grant,
                    //= docs/protocol.md#6-hello-and-the-order-of-messages
                    //# it MAY end a connection whose replies are not read when it has no memory left to keep them.
                    None if self.end_overdue(connection.peer.uid, key) => {}
                    None => return Err(Closed),
                }
            },
        };
        let rest = self.desk.replies.waiting().get(sent..).unwrap_or_default();
        let front = before.as_ref().map_or(&[][..], Held::bytes);
        connection.output = Some(Held::new(&[front, rest], grant).map_err(|_| Closed)?);
        Ok(())
    }

    /// Has a connection wait for what it needs next.
    pub(super) fn settle(
        &mut self,
        key: Key,
        connection: &mut Connection,
        progress: bool,
    ) -> Result<(), Closed> {
        if connection.output.is_some() {
            if connection.wait != Wait::Reader(false) {
                self.set_deadline(key, connection, Some(since_boot().saturating_add(DEADLINE)));
                self.wait_for(key, connection, Wait::Reader(false));
            }
            return Ok(());
        }
        self.set_overdue(key, connection, None);
        let frame_max = connection.session.frame_max();
        let mut partial = false;
        if let Some(held) = &mut connection.input {
            partial = matches!(Frame::parse(held.bytes(), frame_max), Ok(None));
            if partial {
                let wanted = frame_len(held.bytes(), frame_max).max(READ_LEN);
                let queued = self.waiting.contains_key(&connection.peer.uid);
                let grant = held.grant();
                if grant.len() < wanted && (queued || !grant.resize(wanted)) {
                    self.wait_for_memory(key, connection, wanted);
                    return Ok(());
                }
            }
        }
        if connection.input.is_some() && !partial {
            // The kernel has nothing new of it.
            self.line_up(key, connection);
        }
        let deadline = match connection.deadline {
            _ if !partial && connection.session.greeted() => None,
            Some(deadline) if !progress => Some(deadline),
            _ => Some(since_boot().saturating_add(DEADLINE)),
        };
        self.set_deadline(key, connection, deadline);
        self.wait_for(key, connection, Wait::Request);
        Ok(())
    }

    pub(super) fn wait_for(&mut self, key: Key, connection: &mut Connection, wait: Wait) {
        if matches!(connection.wait, Wait::Memory(_)) && !matches!(wait, Wait::Memory(_)) {
            self.leave_queue(key, connection);
        }
        connection.wait = wait;
        let events = wait.events(connection.input.is_some());
        if events != connection.events {
            connection.events = events;
            if let Err(errno) = self.epoll.modify(&*connection, &mut EpollEvent::new(events, key.0)) {
                tracing::error!(%errno, "a connection cannot be watched");
            }
        }
    }

    //= docs/protocol.md#22-limits-and-what-ends-a-connection
    //# Time in which the agent does not read, for want of memory or because its replies are not read, does not
    //# count towards the 5 seconds.
    fn wait_for_memory(&mut self, key: Key, connection: &mut Connection, len: usize) {
        if !matches!(connection.wait, Wait::Memory(_)) {
            self.waiting.entry(connection.peer.uid).or_default().push_back(key);
            self.set_deadline(key, connection, None);
        }
        self.wait_for(key, connection, Wait::Memory(len));
        // It may be there already.
        self.hand_out = true;
    }

    pub(super) fn leave_queue(&mut self, key: Key, connection: &Connection) {
        if matches!(connection.wait, Wait::Memory(_))
            && let Some(queue) = self.waiting.get_mut(&connection.peer.uid)
        {
            queue.retain(|waiting| *waiting != key);
            if queue.is_empty() {
                self.waiting.remove(&connection.peer.uid);
            }
            self.hand_out = true;
        }
    }

    /// Gives memory that came back to who waits for it, in the order of coming; first it takes what others of the uid have had
    /// too long.
    pub(super) fn hand_out_memory(&mut self) {
        if !(self.pool.take_freed() | std::mem::take(&mut self.hand_out)) {
            return;
        }
        let uids: Vec<u32> = self.waiting.keys().copied().collect();
        for uid in uids {
            while let Some(key) = self.waiting.get(&uid).and_then(VecDeque::front).copied() {
                // Whoever ends or waits for something else leaves the queue first.
                let Some(mut connection) = self.take(key) else { break };
                let granted = self.give_memory(&mut connection);
                if let Ok(true) = granted {
                    self.set_deadline(key, &mut connection, Some(since_boot().saturating_add(DEADLINE)));
                    self.wait_for(key, &mut connection, Wait::Request);
                }
                match granted {
                    Ok(true) => self.put(key, connection),
                    Err(Closed) => self.end(key, connection),
                    Ok(false) => {
                        self.put(key, connection);
                        if !self.end_overdue(uid, key) {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Gives a connection the memory that it waits for; says whether it could.
    fn give_memory(&self, connection: &mut Connection) -> Result<bool, Closed> {
        let Wait::Memory(len) = connection.wait else { return Ok(true) };
        match &mut connection.input {
            Some(held) => Ok(held.grant().resize(len)),
            None => match self.pool.grant(connection.peer.uid, len) {
                Some(grant) => {
                    connection.input = Some(Held::new(&[], grant).map_err(|_| Closed)?);
                    Ok(true)
                }
                None => Ok(false),
            },
        }
    }

    /// Ends the connection of this uid whose replies were not read for the longest time, if there is one beyond its time.
    fn end_overdue(&mut self, uid: u32, except: Key) -> bool {
        let of_uid = (uid, Duration::ZERO, Key(0))..=(uid, Duration::MAX, Key(u64::MAX));
        let found = self.overdue.range(of_uid).map(|(_, _, key)| *key).find(|key| *key != except);
        let Some((key, connection)) = found.and_then(|key| Some((key, self.take(key)?))) else {
            return false;
        };
        tracing::warn!(uid, "closed a connection: its replies are not read, and others need the memory");
        self.end(key, connection);
        true
    }
}

/// Answers requests; between two turns it has nothing to say.
pub(super) struct Desk<R, A> {
    pub(super) core: Core<R, A>,
    pub(super) replies: Replies,
}

impl<R: Random, A: Audit> Desk<R, A> {
    /// Answers every whole frame in `bytes` until the turn is over, and says how many bytes were taken.
    fn take_up(
        &mut self,
        session: &mut Session,
        bytes: &[u8],
        now: Now,
        around: Surroundings,
        mut others_wait: impl FnMut() -> bool,
    ) -> (usize, Stop) {
        let frame_max = session.frame_max();
        let mut taken = 0;
        let mut requests = 0;
        let mut looked = now.boot;
        let stop = loop {
            let frame = match Frame::parse(bytes.get(taken..).unwrap_or_default(), frame_max) {
                Ok(Some(frame)) => frame,
                Ok(None) => break Stop::Partial,
                Err(error) => {
                    self.core.refuse_frame(error, &mut self.replies);
                    break Stop::Last;
                }
            };
            if requests == TURN_REQUESTS || self.replies.waiting().len() >= FLUSH_LEN {
                break Stop::Turn;
            }
            if requests > 0 && requests % CLOCK_REQUESTS == 0 {
                let time = since_boot();
                if time.saturating_sub(looked) >= TURN_TIME {
                    if others_wait() {
                        break Stop::Turn;
                    }
                    looked = time;
                }
            }
            requests = requests.saturating_add(1);
            taken = taken.saturating_add(frame.frame_len());
            match self.core.handle(session, &frame, now, around, &mut self.replies) {
                Outcome::Continue => {}
                Outcome::Close => break Stop::Last,
                Outcome::Derive(derivation, ticket) => break Stop::Work(derivation, ticket),
            }
        };
        self.core.end_batch();
        (taken, stop)
    }
}

/// Sends the replies that wait, as the peer reads them.
fn flush(connection: &mut Connection) -> Result<(), Closed> {
    if let Some(mut held) = connection.output.take() {
        let sent = connection.send(held.bytes())?;
        held.consume(sent);
        if held.bytes().is_empty() {
            held.release();
        } else {
            connection.output = Some(held);
        }
    }
    Ok(())
}

/// Length of the frame that begins here, 0 while its head has not all arrived or is none.
fn frame_len(bytes: &[u8], frame_max: usize) -> usize {
    let head = FrameHead::parse(bytes, frame_max).ok().flatten();
    head.map_or(0, |head| usize::try_from(head.frame_len()).unwrap_or(usize::MAX))
}
