//! Sockets: the listener, the connections, the memory that their frames take.
//!
//! Owns who is let in at all (by the uid that the kernel names, for the connection and again for the sender of every
//! message), the reading and the writing, deadlines, and what a slow or silent peer can hold. It decodes nothing but
//! the frame head, and no key passes through it outside a frame. Implements `docs/protocol.md`, sections 1, 2 and 8.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    time::Duration,
};

use kms_protocol::{FRAME_HEAD_LEN, Frame, FrameHead};
use kms_secret_memory::{LockedBuffer, Policy, RegionError};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, getsockopt, recvmsg, send, setsockopt, sockopt},
    time::{ClockId, clock_gettime},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{UnixListener, UnixStream},
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout_at},
};

use crate::{
    audit::Audit,
    authorize::Peer,
    core::{Core, Now, Outcome, Session, Surroundings, Ticket},
    crypto::{Derivation, Random},
    reply::{FLUSH_LEN, Replies},
    sys,
};

/// Bytes that are read at once while nothing else of the uid waits.
const READ_LEN: usize = 64 * 1024;

/// Bytes that are read at once while frames of the uid wait for memory, and the smallest frame buffer.
const SHORT_READ_LEN: usize = 4096;

/// What all frame buffers take together, and what those of one uid take, in bytes.
const POOL_LEN: usize = 4 * 1024 * 1024;
const POOL_LEN_PER_UID: usize = POOL_LEN / 4;

/// A frame must be whole, and `hello` must have come, within this time.
const FRAME_DEADLINE: Duration = Duration::from_secs(5);

/// After this time without a request, what is only at hand for speed is wiped.
const COOL_AFTER: Duration = Duration::from_millis(250);

/// Before the next `accept` when the machine has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The connection is over; nothing more is to be said.
struct Closed;

/// Memory for frames that arrive or leave in pieces, counted by uid.
#[derive(Default)]
struct FramePool {
    used: Cell<usize>,
    by_uid: RefCell<HashMap<u32, usize>>,
    freed: Notify,
}

/// The right to hold so many bytes of frames.
struct Grant {
    pool: Rc<FramePool>,
    uid: u32,
    len: usize,
}

impl FramePool {
    fn used_by(&self, uid: u32) -> usize {
        self.by_uid.borrow().get(&uid).copied().unwrap_or(0)
    }

    fn grant(self: &Rc<Self>, uid: u32, len: usize) -> Option<Grant> {
        let used = self.used.get().saturating_add(len);
        let used_by_uid = self.used_by(uid).saturating_add(len);
        if used > POOL_LEN || used_by_uid > POOL_LEN_PER_UID {
            return None;
        }
        self.used.set(used);
        self.by_uid.borrow_mut().insert(uid, used_by_uid);
        Some(Grant { pool: Rc::clone(self), uid, len })
    }

    async fn wait(self: &Rc<Self>, uid: u32, len: usize) -> Grant {
        loop {
            let freed = self.freed.notified();
            if let Some(grant) = self.grant(uid, len) {
                return grant;
            }
            freed.await;
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let pool = &self.pool;
        pool.used.set(pool.used.get().saturating_sub(self.len));
        let mut by_uid = pool.by_uid.borrow_mut();
        let left = by_uid.get(&self.uid).map_or(0, |used| used.saturating_sub(self.len));
        if left == 0 {
            by_uid.remove(&self.uid);
        } else {
            by_uid.insert(self.uid, left);
        }
        pool.freed.notify_waiters();
    }
}

/// Bytes in a locked buffer, wiped with it.
struct Held {
    buffer: LockedBuffer,
    start: usize,
    end: usize,
}

impl Held {
    fn new(bytes: &[u8], capacity: usize, memory: Policy) -> Result<Self, RegionError> {
        let mut buffer = LockedBuffer::new(capacity.max(bytes.len()), memory)?;
        if let Some(front) = buffer.expose_secret_mut().get_mut(..bytes.len()) {
            front.copy_from_slice(bytes);
        }
        Ok(Self { buffer, start: 0, end: bytes.len() })
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.expose_secret().get(self.start..self.end).unwrap_or_default()
    }

    /// Drops `count` bytes from the front and moves the rest there.
    fn consume(&mut self, count: usize) {
        let from = self.start.saturating_add(count).min(self.end);
        let rest = self.end.saturating_sub(from);
        self.buffer.expose_secret_mut().copy_within(from..self.end, 0);
        self.buffer.wipe_range(rest..self.end);
        (self.start, self.end) = (0, rest);
    }
}

struct Connection {
    /// Registered for reading alone: with both, each read of the peer wakes this end too, which costs 1 us a request.
    socket: AsyncFd<OwnedFd>,
    peer: Peer,
    session: Session,
    /// What has arrived and was not taken up: a part of a frame, or frames that wait until their answers can leave.
    input: Option<Held>,
    /// Replies that the peer has not read yet.
    output: Option<Held>,
    grant: Option<Grant>,
    deadline: Option<Instant>,
}

/// How far a connection got without waiting.
enum Advance {
    /// Nothing to read, nothing to do.
    Idle,
    /// Something was done; there may be more.
    Again,
    /// A frame of this length needs memory before more of it is read.
    Memory(usize),
    /// Work to be done elsewhere.
    Derive(Box<Derivation>, Ticket),
}

/// Why the taking up of frames stopped.
enum Stop {
    Partial,
    Blocked,
    Derive(Box<Derivation>, Ticket),
}

/// Buffers that every connection uses between two waits, never across one.
struct Shared {
    input: LockedBuffer,
    replies: Replies,
}

/// The agent with its sockets.
pub(crate) struct Server<R, A> {
    core: RefCell<Core<R, A>>,
    shared: RefCell<Shared>,
    memory: Policy,
    pool: Rc<FramePool>,
    connections: RefCell<HashMap<u32, usize>>,
    panics: Cell<u64>,
    last_request: Cell<Duration>,
    warm: Cell<bool>,
    warmed: Notify,
}

/// The time, as the core wants it.
pub(crate) fn now() -> Now {
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let unix = clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from);
    Now { boot, unix: unix.as_secs() }
}

impl<R: Random + 'static, A: Audit + 'static> Server<R, A> {
    pub(crate) fn new(core: Core<R, A>, memory: Policy) -> Result<Self, RegionError> {
        let shared = Shared { input: LockedBuffer::new(READ_LEN, memory)?, replies: Replies::new(memory)? };
        Ok(Self {
            core: RefCell::new(core),
            shared: RefCell::new(shared),
            memory,
            pool: Rc::default(),
            connections: RefCell::default(),
            panics: Cell::new(0),
            last_request: Cell::new(Duration::ZERO),
            warm: Cell::new(false),
            warmed: Notify::new(),
        })
    }

    pub(crate) fn core(&self) -> &RefCell<Core<R, A>> {
        &self.core
    }

    /// Accepts for ever.
    pub(crate) async fn accept(self: Rc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.admit(stream),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Wipes what is only at hand for speed whenever the agent was idle for a while.
    pub(crate) async fn cool(self: Rc<Self>) {
        loop {
            self.warmed.notified().await;
            loop {
                let idle = now().boot.saturating_sub(self.last_request.get());
                if idle >= COOL_AFTER {
                    break;
                }
                sleep_until(Instant::now() + COOL_AFTER.saturating_sub(idle)).await;
            }
            self.warm.set(false);
            self.core.borrow_mut().cool();
            self.shared.borrow_mut().replies.shrink(self.memory);
        }
    }

    /// Lets a connection in, or closes it without a byte. Whatever cannot be found out about the peer is a no.
    fn admit(self: &Rc<Self>, stream: UnixStream) {
        let Ok(credentials) = getsockopt(&stream, sockopt::PeerCredentials) else {
            tracing::warn!("refused a connection: its peer credentials cannot be had");
            return;
        };
        let peer = Peer { uid: credentials.uid() };
        if !self.core.borrow().serves(peer.uid) {
            tracing::warn!(uid = peer.uid, pid = credentials.pid(), "refused a connection of another uid");
            return;
        }
        // On the listener alone the option misses what was in the backlog before it was set.
        if setsockopt(&stream, sockopt::PassCred, &true).is_err() {
            tracing::warn!("refused a connection: SO_PASSCRED cannot be set");
            return;
        }
        sys::refuse_descriptors(stream.as_fd());
        let socket = stream.into_std().and_then(|stream| sys::watch(stream.into(), Interest::READABLE));
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "refused a connection: it cannot be watched");
                return;
            }
        };
        {
            let core = self.core.borrow();
            let mut connections = self.connections.borrow_mut();
            let total: usize = connections.values().sum();
            let of_uid = connections.entry(peer.uid).or_insert(0);
            if *of_uid >= core.limits().connections_per_uid || total >= core.limits().connections {
                tracing::warn!(uid = peer.uid, "refused a connection: too many are open");
                return;
            }
            *of_uid = of_uid.saturating_add(1);
        }
        let server = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let mut connection = Connection {
                socket,
                peer,
                session: server.core.borrow_mut().begin(peer),
                input: None,
                output: None,
                grant: None,
                deadline: Some(Instant::now() + FRAME_DEADLINE),
            };
            let Closed = server.converse(&mut connection).await;
            server.core.borrow_mut().end(&connection.session);
            if let Some(of_uid) = server.connections.borrow_mut().get_mut(&peer.uid) {
                *of_uid = of_uid.saturating_sub(1);
            }
        });
    }

    async fn converse(&self, connection: &mut Connection) -> Closed {
        loop {
            match flush(connection).await {
                Err(closed) => return closed,
                // While its answers wait the peer is not read, so the time does not count.
                Ok(waited) if waited && connection.deadline.is_some() => {
                    connection.deadline = Some(Instant::now() + FRAME_DEADLINE);
                }
                Ok(_) => {}
            }
            match self.advance(connection) {
                Err(closed) => {
                    // A last word, such as why the frame was refused, may still be on its way.
                    return match timeout_at(Instant::now() + FRAME_DEADLINE, flush(connection)).await {
                        Ok(Ok(_)) | Ok(Err(Closed)) | Err(_) => closed,
                    };
                }
                Ok(Advance::Again) => {}
                Ok(Advance::Idle) => {
                    let readable = connection.socket.readable();
                    let ready = match connection.deadline {
                        Some(deadline) => timeout_at(deadline, readable).await.ok(),
                        None => Some(readable.await),
                    };
                    if !matches!(ready, Some(Ok(_))) {
                        return Closed;
                    }
                }
                Ok(Advance::Memory(len)) => {
                    let grant = self.pool.wait(connection.peer.uid, len).await;
                    connection.grant = Some(grant);
                    connection.deadline = Some(Instant::now() + FRAME_DEADLINE);
                }
                Ok(Advance::Derive(derivation, ticket)) => {
                    if let Err(closed) = self.derive(connection, derivation, ticket).await {
                        return closed;
                    }
                }
            }
        }
    }

    /// Does the work, whether the peer is still there or not, and then answers.
    async fn derive(
        &self,
        connection: &mut Connection,
        derivation: Box<Derivation>,
        ticket: Ticket,
    ) -> Result<(), Closed> {
        let flushed = flush(connection).await;
        let key = tokio::task::spawn_blocking(move || derivation.run()).await.ok().flatten();
        let mut shared = self.shared.borrow_mut();
        self.core.borrow_mut().derived(ticket, key, now(), &mut shared.replies);
        flushed?;
        self.send(connection, &mut shared.replies)
    }

    /// Takes up frames that wait, or reads and takes up what comes.
    fn advance(&self, connection: &mut Connection) -> Result<Advance, Closed> {
        let mut shared = self.shared.borrow_mut();
        let Shared { input, replies } = &mut *shared;
        let arrived = match self.receive(connection, input)? {
            None => {
                if connection.input.as_ref().is_some_and(|held| held.bytes().is_empty()) {
                    connection.input = None;
                    connection.grant = None;
                }
                return Ok(Advance::Idle);
            }
            Some(arrived) => arrived,
        };
        let now = now();
        self.last_request.set(now.boot);
        if !self.warm.replace(true) {
            self.warmed.notify_one();
        }
        match connection.input.take() {
            Some(mut held) => {
                let taken_up = self.take_up(connection, held.bytes(), now, replies);
                self.core.borrow_mut().end_batch();
                let (taken, stop) = taken_up?;
                held.consume(taken);
                connection.input = Some(held);
                self.after(connection, taken, stop)
            }
            None => {
                let bytes = input.expose_secret().get(..arrived).unwrap_or_default();
                let taken_up = self.take_up(connection, bytes, now, replies);
                self.core.borrow_mut().end_batch();
                let stopped = taken_up.and_then(|(taken, stop)| {
                    let rest = bytes.get(taken..).unwrap_or_default();
                    if !rest.is_empty() {
                        connection.input =
                            Some(Held::new(rest, rest.len(), self.memory).map_err(|_| Closed)?);
                    }
                    Ok((taken, stop))
                });
                input.wipe_range(0..arrived);
                let (taken, stop) = stopped?;
                self.after(connection, taken, stop)
            }
        }
    }

    /// Makes sure that what is left of a frame has memory and a deadline.
    fn after(&self, connection: &mut Connection, taken: usize, stop: Stop) -> Result<Advance, Closed> {
        if taken > 0 {
            // What is left began after a frame that was whole.
            connection.deadline = None;
        }
        let left = connection.input.as_ref().map_or(&[][..], Held::bytes);
        if left.is_empty() {
            if connection.output.is_none() {
                connection.grant = None;
            }
            connection.deadline = (!connection.session.greeted()).then(|| Instant::now() + FRAME_DEADLINE);
        }
        match stop {
            Stop::Derive(derivation, ticket) => Ok(Advance::Derive(derivation, ticket)),
            Stop::Blocked => Ok(Advance::Again),
            Stop::Partial if left.is_empty() => Ok(Advance::Again),
            Stop::Partial => {
                if connection.deadline.is_none() {
                    connection.deadline = Some(Instant::now() + FRAME_DEADLINE);
                }
                let frame_max = self.core.borrow().limits().frame;
                let head = FrameHead::parse(left, frame_max).map_err(|_| Closed)?;
                let frame_len =
                    head.map_or(0, |head| usize::try_from(head.frame_len()).unwrap_or(usize::MAX));
                let wanted = frame_len.max(SHORT_READ_LEN);
                if connection.grant.as_ref().is_some_and(|grant| grant.len >= wanted) {
                    return Ok(Advance::Again);
                }
                connection.grant = None;
                match self.pool.grant(connection.peer.uid, wanted) {
                    Some(grant) => {
                        connection.grant = Some(grant);
                        Ok(Advance::Again)
                    }
                    None => Ok(Advance::Memory(wanted)),
                }
            }
        }
    }

    /// Reads once, after what is held or into the shared buffer, and checks who sent it. `None`: nothing there now.
    /// Otherwise the number of bytes that can be taken up.
    fn receive(
        &self,
        connection: &mut Connection,
        shared: &mut LockedBuffer,
    ) -> Result<Option<usize>, Closed> {
        let frame_max = self.core.borrow().limits().frame;
        let room = match &mut connection.input {
            Some(held) => {
                match Frame::parse(held.bytes(), frame_max) {
                    // Left over because the answers before it could not leave.
                    Ok(Some(_)) | Err(_) if !held.bytes().is_empty() => return Ok(Some(held.end)),
                    _ => {}
                }
                let granted = connection.grant.as_ref().map_or(SHORT_READ_LEN, |grant| grant.len);
                if held.end >= held.buffer.len() || held.buffer.len() < SHORT_READ_LEN {
                    // Doubled, never beyond what was granted: memory follows what has arrived.
                    let wanted =
                        held.end.saturating_mul(2).clamp(SHORT_READ_LEN, granted.max(SHORT_READ_LEN));
                    held.buffer.grow(wanted).map_err(|_| Closed)?;
                }
                held.buffer.expose_secret_mut().get_mut(held.end..).unwrap_or_default()
            }
            None => {
                let contended = self.pool.used_by(connection.peer.uid) > 0;
                let limit = if contended { SHORT_READ_LEN } else { READ_LEN };
                shared.expose_secret_mut().get_mut(..limit).unwrap_or_default()
            }
        };
        let count = match receive_from(&connection.socket, connection.peer, room)? {
            None => return Ok(None),
            Some(count) => count,
        };
        Ok(Some(match &mut connection.input {
            Some(held) => {
                held.end = held.end.saturating_add(count);
                held.end
            }
            None => count,
        }))
    }

    /// Answers every whole frame in `bytes`, sends the answers, and says how many bytes were taken.
    fn take_up(
        &self,
        connection: &mut Connection,
        bytes: &[u8],
        now: Now,
        replies: &mut Replies,
    ) -> Result<(usize, Stop), Closed> {
        let mut core = self.core.borrow_mut();
        let frame_max = core.limits().frame;
        let around = self.surroundings();
        let mut taken = 0;
        loop {
            let frame = match Frame::parse(bytes.get(taken..).unwrap_or_default(), frame_max) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.send(connection, replies)?;
                    return Ok((taken, Stop::Partial));
                }
                Err(error) => {
                    core.refuse_frame(error, replies);
                    self.send(connection, replies)?;
                    return Err(Closed);
                }
            };
            // The one place where a panic is caught: it costs this connection, not everybody's keys.
            let handled = catch_unwind(AssertUnwindSafe(|| {
                core.handle(&mut connection.session, &frame, now, around, replies)
            }));
            taken = taken.saturating_add(frame.frame_len());
            match handled {
                Ok(Outcome::Continue) => {}
                Ok(Outcome::Close) => {
                    self.send(connection, replies)?;
                    return Err(Closed);
                }
                Ok(Outcome::Derive(derivation, ticket)) => {
                    self.send(connection, replies)?;
                    return Ok((taken, Stop::Derive(derivation, ticket)));
                }
                Err(_) => {
                    self.panics.set(self.panics.get().saturating_add(1));
                    replies.clear();
                    return Err(Closed);
                }
            }
            if replies.waiting().len() >= FLUSH_LEN {
                self.send(connection, replies)?;
                if connection.output.is_some() {
                    return Ok((taken, Stop::Blocked));
                }
            }
        }
    }

    /// Sends what it can now and keeps the rest for [`flush`]. A peer for whose unread answers there is no memory is
    /// closed.
    fn send(&self, connection: &mut Connection, replies: &mut Replies) -> Result<(), Closed> {
        let sent = send_to(connection.socket.get_ref(), replies.waiting());
        let kept = sent.and_then(|sent| {
            let rest = replies.waiting().get(sent..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(None);
            }
            if connection.grant.as_ref().is_none_or(|grant| grant.len < rest.len()) {
                connection.grant = None;
                connection.grant = Some(self.pool.grant(connection.peer.uid, rest.len()).ok_or(Closed)?);
            }
            Held::new(rest, rest.len(), self.memory).map(Some).map_err(|_| Closed)
        });
        replies.clear();
        connection.output = kept?;
        Ok(())
    }

    fn surroundings(&self) -> Surroundings {
        Surroundings {
            connections: self.connections.borrow().values().sum(),
            frame_pool: self.pool.used.get(),
            panics: self.panics.get(),
        }
    }
}

/// Sends the replies that wait, as the peer reads them; says whether it had to wait for that.
async fn flush(connection: &mut Connection) -> Result<bool, Closed> {
    let mut writable = None;
    while let Some(held) = &mut connection.output {
        let sent = send_to(connection.socket.get_ref(), held.bytes())?;
        held.start = held.start.saturating_add(sent);
        if held.bytes().is_empty() {
            connection.output = None;
        } else if sent == 0 {
            // Registered apart, and only while it is waited for.
            let watched = match writable.take() {
                Some(watched) => watched,
                None => {
                    let again = connection.socket.get_ref().try_clone();
                    again.and_then(|again| sys::watch(again, Interest::WRITABLE)).map_err(|_| Closed)?
                }
            };
            watched.writable().await.map_err(|_| Closed)?.clear_ready();
            writable = Some(watched);
        }
    }
    Ok(writable.is_some())
}

/// One `send`, without a signal. 0 when the peer's buffer is full.
fn send_to(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Closed> {
    if bytes.is_empty() {
        return Ok(0);
    }
    loop {
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            sent => return sent.map_err(|_| Closed),
        }
    }
}

/// One `recvmsg` with room for the sender's credentials and nothing else. A sender of another uid, a message without
/// credentials, or one that carried more than fits, ends the connection.
fn receive_from(socket: &AsyncFd<OwnedFd>, peer: Peer, room: &mut [u8]) -> Result<Option<usize>, Closed> {
    // One ucred in its control message: 16 bytes of head, 12 of credentials, aligned.
    let mut control = [0; 32];
    let received = socket.try_io(Interest::READABLE, |socket| {
        let mut buffers = [IoSliceMut::new(room)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut buffers,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .map_err(io::Error::from)?;
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let sender = message.cmsgs().ok().and_then(|mut messages| match messages.next() {
            Some(ControlMessageOwned::ScmCredentials(sender)) => Some(sender.uid()),
            _ => None,
        });
        let truncated = message.flags.contains(MsgFlags::MSG_CTRUNC);
        Ok((message.bytes, sender.filter(|_| !truncated)))
    });
    match received {
        Ok((count, Some(uid))) if uid == peer.uid => Ok(Some(count)),
        Ok((_, sender)) => {
            tracing::warn!(uid = peer.uid, sender, "closed a connection: a message was not its peer's own");
            Err(Closed)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(_) => Err(Closed),
    }
}

const _: () = assert!(FRAME_HEAD_LEN <= SHORT_READ_LEN);
