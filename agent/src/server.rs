//! Sockets: the listener, the connections, the memory that their frames take.
//!
//! Owns who is let in at all (by the uid that the kernel names, for the connection and again for the sender of every
//! message), the reading and the writing, whose turn it is, deadlines, and what a slow or silent peer can hold. One loop over
//! level-triggered epoll on one thread: a request costs a wait, a receive and a send, and no secret is on another thread
//! (`docs/decisions/0004`). It decodes nothing but the frame head, and no key passes through it outside a frame. Implements
//! `docs/protocol.md`, sections 1, 2 and 8.

mod connection;
mod pool;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use kms_envelope::KEY_LEN;
use kms_protocol::{FRAME_HEAD_LEN, Frame, FrameHead};
use kms_secret_memory::{LockedBuffer, Policy, Secret};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        socket::{getsockopt, setsockopt, sockopt},
        time::TimeSpec,
        timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
    unistd::getuid,
};

use self::{
    connection::{Closed, Connection, Wait},
    pool::{FramePool, Grant, Held},
};
use crate::{
    audit::Audit,
    authorize::Peer,
    core::{Core, IN_FLIGHT_MAX, Now, Outcome, Session, Surroundings, Ticket},
    crypto::{Derivation, Random},
    error::StartError,
    reply::{FLUSH_LEN, Replies},
    sys,
};

//= docs/protocol.md#22-limits-and-what-ends-a-connection
//# a frame that is not whole 5 seconds after its first byte
/// A frame must be whole, `hello` must have come, and replies for which others lack memory must be read within this time.
const DEADLINE: Duration = Duration::from_secs(5);

/// Bytes that are read at once: so many as the most requests under way can have at least, so that no more of them are ever
/// read and not answered.
const READ_LEN: usize = IN_FLIGHT_MAX as usize * FRAME_HEAD_LEN;

/// Frames that have arrived and are not longer than this need no memory of their own: every message with its context is
/// shorter.
const SHARED_LEN: usize = 80 * 1024;

/// Requests that are taken up of one connection before every other has had its turn.
const TURN_REQUESTS: usize = 64;

/// Connections that are let in before every other has had its turn.
const TURN_ACCEPTS: usize = 16;

/// Of all connections so many are kept for the agent's own uid.
const KEPT_CONNECTIONS: usize = 16;

/// After this time without a request, what is only at hand for speed is wiped.
const COOL_AFTER: Duration = Duration::from_millis(250);

/// No timer is set for later than this after boot: it rings, and is set again.
const FAR: Duration = Duration::from_secs(1 << 32);

/// Before the next `accept` when the machine has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who a turn is for: a connection, by its place and how often the place was given away, or one of the constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    const LISTENER: Self = Self(u64::MAX);
    const TIMER: Self = Self(u64::MAX - 1);
    const WORK: Self = Self(u64::MAX - 2);
    const SIGNAL: Self = Self(u64::MAX - 3);
    const COMMAND: Self = Self(u64::MAX - 4);

    fn new(place: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(place))
    }

    fn place(self) -> usize {
        usize::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(usize::MAX)
    }

    fn generation(self) -> u64 {
        self.0 >> 32
    }
}

#[derive(Default)]
struct Slot {
    generation: u32,
    connection: Option<Box<Connection>>,
}

/// Why [`Server::serve`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// There is a signal to be read.
    Signal,
    /// The command that the agent was started for has ended.
    CommandEnded,
}

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

/// The result of a [`Derivation`], and whom it is for.
struct Done {
    connection: Key,
    key: Option<Secret<KEY_LEN>>,
}

/// The agent with its sockets.
pub(crate) struct Server<R, A> {
    desk: Desk<R, A>,
    /// Where requests are read to; wiped before the next connection has its turn.
    input: LockedBuffer,
    memory: Policy,
    pool: Rc<FramePool>,
    epoll: Epoll,
    listener: UnixListener,
    /// While nobody is let in.
    accept_after: Option<Duration>,
    timer: TimerFd,
    /// When the timer rings.
    alarm: Option<Duration>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    open: usize,
    open_by_uid: HashMap<u32, usize>,
    deadlines: BTreeSet<(Duration, Key)>,
    /// Who waits for memory, in the order of coming, by uid.
    waiting: HashMap<u32, VecDeque<Key>>,
    /// Memory came back, or somebody new waits for some.
    hand_out: bool,
    /// Whose replies have waited too long, by uid and since when.
    overdue: BTreeSet<(u32, Duration, Key)>,
    /// Whose turn comes though the kernel has nothing new of them.
    again: Vec<Key>,
    turn: u64,
    work: Arc<EventFd>,
    done: (Sender<Done>, Receiver<Done>),
    ticket: Option<Ticket>,
    panics: u64,
    last_request: Duration,
    warm: bool,
}

/// The time, as the core wants it.
pub(crate) fn now() -> Now {
    let unix = clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from);
    Now { boot: since_boot(), unix: unix.as_secs() }
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

impl<R: Random, A: Audit> Server<R, A> {
    /// A server of what connects to `listener`, which does not block.
    pub(crate) fn new(core: Core<R, A>, listener: UnixListener, memory: Policy) -> Result<Self, StartError> {
        let runtime = |errno: Errno| StartError::Runtime(errno.into());
        let server = Self {
            desk: Desk { core, replies: Replies::new(memory)? },
            input: LockedBuffer::new(SHARED_LEN, memory)?,
            memory,
            pool: FramePool::new(memory),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(runtime)?,
            listener,
            accept_after: None,
            timer: TimerFd::new(
                timerfd::ClockId::CLOCK_BOOTTIME,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )
            .map_err(runtime)?,
            alarm: None,
            slots: Vec::new(),
            free: Vec::new(),
            open: 0,
            open_by_uid: HashMap::new(),
            deadlines: BTreeSet::new(),
            waiting: HashMap::new(),
            hand_out: false,
            overdue: BTreeSet::new(),
            again: Vec::new(),
            turn: 0,
            work: Arc::new(
                EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(runtime)?,
            ),
            done: channel(),
            ticket: None,
            panics: 0,
            last_request: Duration::ZERO,
            warm: false,
        };
        server.watch(&server.listener, Key::LISTENER).map_err(runtime)?;
        server.watch(&server.timer, Key::TIMER).map_err(runtime)?;
        server.watch(&*server.work, Key::WORK).map_err(runtime)?;
        Ok(server)
    }

    fn watch(&self, fd: impl AsFd, key: Key) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, key.0))
    }

    /// Has [`serve`](Self::serve) come back when there is something to read here.
    pub(crate) fn wake_by(&self, fd: impl AsFd, wake: Wake) -> io::Result<()> {
        let key = match wake {
            Wake::Signal => Key::SIGNAL,
            Wake::CommandEnded => Key::COMMAND,
        };
        self.watch(fd, key).map_err(io::Error::from)
    }

    pub(crate) fn core(&mut self) -> &mut Core<R, A> {
        &mut self.desk.core
    }

    /// Serves until there is something that is not the server's.
    pub(crate) fn serve(&mut self) -> io::Result<Wake> {
        let mut events = [EpollEvent::empty(); 128];
        let mut again = Vec::new();
        loop {
            let timeout = if self.again.is_empty() { EpollTimeout::NONE } else { EpollTimeout::ZERO };
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                count => count?,
            };
            self.turn = self.turn.wrapping_add(1);
            let mut wake = None;
            std::mem::swap(&mut self.again, &mut again);
            for event in events.iter().take(count) {
                match Key(event.data()) {
                    Key::LISTENER => self.accept(),
                    Key::TIMER => self.ring(),
                    Key::WORK => self.take_results(),
                    Key::SIGNAL => wake = Some(Wake::Signal),
                    Key::COMMAND => wake = Some(Wake::CommandEnded),
                    connection => self.attend(connection, event.events()),
                }
            }
            for connection in again.drain(..) {
                self.attend(connection, EpollFlags::empty());
            }
            self.hand_out_memory();
            self.set_alarm();
            if let Some(wake) = wake {
                return Ok(wake);
            }
        }
    }

    /// Lets in who is there.
    fn accept(&mut self) {
        for _ in 0..TURN_ACCEPTS {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    self.listen(false);
                    self.accept_after = Some(since_boot().saturating_add(ACCEPT_PAUSE));
                    return;
                }
            }
        }
    }

    fn listen(&self, on: bool) {
        let events = if on { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        if let Err(errno) = self.epoll.modify(&self.listener, &mut EpollEvent::new(events, Key::LISTENER.0)) {
            tracing::error!(%errno, "the listener cannot be watched");
        }
    }

    /// Lets a connection in, or closes it without a byte. Whatever cannot be found out about the peer is a no.
    fn admit(&mut self, stream: UnixStream) {
        let Ok(credentials) = getsockopt(&stream, sockopt::PeerCredentials) else {
            tracing::warn!("refused a connection: its peer credentials cannot be had");
            return;
        };
        let peer = Peer { uid: credentials.uid() };
        if !self.desk.core.serves(peer.uid) {
            tracing::warn!(uid = peer.uid, pid = credentials.pid(), "refused a connection of another uid");
            return;
        }
        // On the listener alone the option misses what was in the backlog before it was set.
        if setsockopt(&stream, sockopt::PassCred, &true).is_err() {
            tracing::warn!("refused a connection: SO_PASSCRED cannot be set");
            return;
        }
        sys::refuse_descriptors(stream.as_fd());
        let limits = self.desk.core.limits();
        let kept = if peer.uid == getuid().as_raw() { 0 } else { KEPT_CONNECTIONS };
        let of_uid = self.open_by_uid.entry(peer.uid).or_insert(0);
        if *of_uid >= limits.connections_per_uid || self.open.saturating_add(kept) >= limits.connections {
            tracing::warn!(uid = peer.uid, "refused a connection: too many are open");
            return;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len()).unwrap_or(u32::MAX).saturating_sub(1)
        });
        let Some(slot) = usize::try_from(place).ok().and_then(|place| self.slots.get_mut(place)) else {
            return;
        };
        let key = Key::new(place, slot.generation);
        let mut connection = Box::new(Connection::new(stream, peer, self.desk.core.begin(peer)));
        if let Err(error) = self.epoll.add(&*connection, EpollEvent::new(connection.events, key.0)) {
            tracing::warn!(%error, "refused a connection: it cannot be watched");
            self.desk.core.end(&connection.session);
            self.free.push(place);
            return;
        }
        *of_uid = of_uid.saturating_add(1);
        self.open = self.open.saturating_add(1);
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# no whole `hello` within 5 seconds of the connect
        self.set_deadline(key, &mut connection, Some(since_boot().saturating_add(DEADLINE)));
        self.put(key, connection);
    }

    /// Takes a connection out of its place, if it is still there.
    fn take(&mut self, key: Key) -> Option<Box<Connection>> {
        let slot = self.slots.get_mut(key.place())?;
        if u64::from(slot.generation) == key.generation() { slot.connection.take() } else { None }
    }

    fn put(&mut self, key: Key, connection: Box<Connection>) {
        if let Some(slot) = self.slots.get_mut(key.place()) {
            slot.connection = Some(connection);
        }
    }

    /// Ends a connection that was taken out of its place. Closing the socket takes it from the epoll.
    fn end(&mut self, key: Key, mut connection: Box<Connection>) {
        self.set_deadline(key, &mut connection, None);
        self.set_overdue(key, &mut connection, None);
        self.leave_queue(key, &connection);
        self.desk.core.end(&connection.session);
        if let Some(of_uid) = self.open_by_uid.get_mut(&connection.peer.uid) {
            *of_uid = of_uid.saturating_sub(1);
            if *of_uid == 0 {
                self.open_by_uid.remove(&connection.peer.uid);
            }
        }
        self.open = self.open.saturating_sub(1);
        if let (Some(slot), Ok(place)) = (self.slots.get_mut(key.place()), u32::try_from(key.place())) {
            // Below the constants of `Key`.
            slot.generation = slot.generation.wrapping_add(1) % (u32::MAX - 1);
            self.free.push(place);
        }
    }

    /// Gives a connection its turn: at most one in each turn of the loop.
    fn attend(&mut self, key: Key, events: EpollFlags) {
        let Some(mut connection) = self.take(key) else { return };
        if connection.turn == self.turn {
            self.put(key, connection);
            return;
        }
        connection.turn = self.turn;
        self.go_on(key, connection, |server, connection| server.advance(key, connection, events));
    }

    /// Does something for a connection that was taken out of its place, and puts it back or ends it. The one place where a
    /// panic is caught: it costs this connection, not everybody's keys.
    fn go_on(
        &mut self,
        key: Key,
        mut connection: Box<Connection>,
        work: impl FnOnce(&mut Self, &mut Connection) -> Result<(), Closed>,
    ) {
        match catch_unwind(AssertUnwindSafe(|| work(self, &mut connection))) {
            Ok(Ok(())) => self.put(key, connection),
            Ok(Err(Closed)) => self.end(key, connection),
            Err(_) => {
                self.panics = self.panics.saturating_add(1);
                self.input.wipe();
                self.desk.replies.clear();
                self.desk.core.end_batch();
                self.end(key, connection);
            }
        }
    }

    fn advance(&mut self, key: Key, connection: &mut Connection, events: EpollFlags) -> Result<(), Closed> {
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
            self.advance_whole(key, connection, events.contains(EpollFlags::EPOLLRDHUP))
        }
    }

    /// Takes up what is held, or reads behind it and takes it up then.
    fn advance_held(&mut self, key: Key, connection: &mut Connection) -> Result<(), Closed> {
        let frame_max = self.desk.core.limits().frame;
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
        let (taken, stop) = self.desk.take_up(&mut connection.session, held.bytes(), now, around);
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
        let Some(len) = self.read_shared(|room| connection.receive(room), false)? else { return Ok(()) };
        let (now, around) = (self.warm_up(), self.surroundings());
        let bytes = self.input.expose_secret().get(..len).unwrap_or_default();
        let (taken, stop) = self.desk.take_up(&mut connection.session, bytes, now, around);
        let rest = bytes.get(taken..).unwrap_or_default();
        let held = if rest.is_empty() || matches!(stop, Stop::Last) {
            Ok(None)
        } else {
            let wanted = frame_len(rest, self.desk.core.limits().frame).max(rest.len()).max(READ_LEN);
            let grant = self.pool.grant(connection.peer.uid, wanted).ok_or(Closed);
            grant.and_then(|grant| Held::new(&[rest], grant).map(Some).map_err(|_| Closed))
        };
        self.input.wipe_range(0..len);
        connection.input = held.inspect_err(|_| self.desk.replies.clear())?;
        self.after(key, connection, None, taken, stop)
    }

    /// Looks at what is there and takes only what is whole: where others of the uid hold memory, the rest stays in the socket
    /// until it is whole, or there is memory for it.
    fn advance_whole(&mut self, key: Key, connection: &mut Connection, ended: bool) -> Result<(), Closed> {
        let Some(len) = self.read_shared(|room| connection.look(room), true)? else { return Ok(()) };
        let frame_max = self.desk.core.limits().frame;
        let (now, around) = (self.warm_up(), self.surroundings());
        let bytes = self.input.expose_secret().get(..len).unwrap_or_default();
        if let Ok(None) = Frame::parse(bytes, frame_max) {
            let frame_len = frame_len(bytes, frame_max);
            self.input.wipe_range(0..len);
            if frame_len == 0 {
                //= docs/protocol.md#22-limits-and-what-ends-a-connection
                //# a frame that is not whole 5 seconds after its first byte
                let deadline = connection.deadline.or_else(|| Some(since_boot().saturating_add(DEADLINE)));
                self.set_deadline(key, connection, deadline);
                self.wait_for(key, connection, Wait::Rest);
            } else {
                self.wait_for_memory(key, connection, frame_len);
            }
            // Its end was told, and behind it nothing comes.
            return if ended && frame_len <= SHARED_LEN { Err(Closed) } else { Ok(()) };
        }
        let (taken, stop) = self.desk.take_up(&mut connection.session, bytes, now, around);
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
        read: impl Fn(&mut [u8]) -> Result<Option<usize>, Closed>,
        looks: bool,
    ) -> Result<Option<usize>, Closed> {
        let frame_max = self.desk.core.limits().frame;
        let buffer = self.input.expose_secret_mut();
        let Some(len) = read(buffer.get_mut(..READ_LEN).unwrap_or_default())? else { return Ok(None) };
        let frame_len = frame_len(buffer.get(..len).unwrap_or_default(), frame_max);
        if len < READ_LEN || frame_len <= READ_LEN || frame_len > SHARED_LEN {
            return Ok(Some(len));
        }
        let from = if looks { 0 } else { len };
        match read(buffer.get_mut(from..frame_len).unwrap_or_default()) {
            Ok(more) => Ok(Some(more.map_or(len, |more| from.saturating_add(more)))),
            Err(closed) => {
                self.input.wipe_range(0..frame_len);
                Err(closed)
            }
        }
    }

    /// Notes that there is something to do, and when.
    fn warm_up(&mut self) -> Now {
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
        self.send(key, connection, grant)?;
        match stop {
            Stop::Partial | Stop::Turn => self.settle(key, connection, taken > 0),
            Stop::Last if connection.output.is_none() => Err(Closed),
            Stop::Last => {
                connection.input = None;
                self.set_deadline(key, connection, Some(since_boot().saturating_add(DEADLINE)));
                self.wait_for(key, connection, Wait::Reader(true));
                Ok(())
            }
            Stop::Work(derivation, ticket) => {
                self.set_deadline(key, connection, None);
                self.wait_for(key, connection, Wait::Work);
                self.derive(key, derivation, ticket);
                Ok(())
            }
        }
    }

    /// Sends what it can now and keeps the rest. A peer for whose unread replies there is no memory is closed.
    fn send(&mut self, key: Key, connection: &mut Connection, grant: Option<Grant>) -> Result<(), Closed> {
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
    fn settle(&mut self, key: Key, connection: &mut Connection, progress: bool) -> Result<(), Closed> {
        if connection.output.is_some() {
            if connection.wait != Wait::Reader(false) {
                self.set_deadline(key, connection, Some(since_boot().saturating_add(DEADLINE)));
                self.wait_for(key, connection, Wait::Reader(false));
            }
            return Ok(());
        }
        self.set_overdue(key, connection, None);
        let frame_max = self.desk.core.limits().frame;
        let mut partial = false;
        if let Some(held) = &mut connection.input {
            if !matches!(Frame::parse(held.bytes(), frame_max), Ok(None)) {
                self.again.push(key);
            } else {
                partial = true;
                let wanted = frame_len(held.bytes(), frame_max).max(READ_LEN);
                let queued = self.waiting.contains_key(&connection.peer.uid);
                let grant = held.grant();
                if grant.len() < wanted && (queued || !grant.resize(wanted)) {
                    self.wait_for_memory(key, connection, wanted);
                    return Ok(());
                }
            }
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

    fn wait_for(&mut self, key: Key, connection: &mut Connection, wait: Wait) {
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

    fn leave_queue(&mut self, key: Key, connection: &Connection) {
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
    fn hand_out_memory(&mut self) {
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

    fn set_deadline(&mut self, key: Key, connection: &mut Connection, deadline: Option<Duration>) {
        if connection.deadline != deadline {
            connection.deadline.map(|old| self.deadlines.remove(&(old, key)));
            deadline.map(|new| self.deadlines.insert((new, key)));
            connection.deadline = deadline;
        }
    }

    fn set_overdue(&mut self, key: Key, connection: &mut Connection, since: Option<Duration>) {
        if connection.overdue != since {
            let uid = connection.peer.uid;
            connection.overdue.map(|old| self.overdue.remove(&(uid, old, key)));
            since.map(|new| self.overdue.insert((uid, new, key)));
            connection.overdue = since;
        }
    }

    /// Has the timer ring when something is to be done next. It may ring too early, never too late.
    fn set_alarm(&mut self) {
        let next = [
            self.deadlines.first().map(|(deadline, _)| *deadline),
            self.warm.then(|| self.last_request.saturating_add(COOL_AFTER)),
            self.accept_after,
            self.desk.core.next_deadline(),
        ];
        let Some(next) = next.into_iter().flatten().min() else { return };
        if self.alarm.is_none_or(|alarm| next < alarm) {
            // Zero would mean never, and what no kernel counts to is far enough away.
            let next = next.clamp(Duration::from_nanos(1), FAR);
            let at = Expiration::OneShot(TimeSpec::from_duration(next));
            match self.timer.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
                Ok(()) => self.alarm = Some(next),
                Err(errno) => tracing::error!(%errno, "the timer cannot be set"),
            }
        }
    }

    /// Does what is due.
    fn ring(&mut self) {
        self.alarm = None;
        // Only to make it silent.
        let _ = self.timer.wait();
        let now = since_boot();
        while let Some((deadline, key)) =
            self.deadlines.first().copied().filter(|(deadline, _)| *deadline <= now)
        {
            let Some(mut connection) = self.take(key) else {
                self.deadlines.remove(&(deadline, key));
                continue;
            };
            if connection.wait == Wait::Reader(false) {
                // A reader that is only slow costs nobody anything; one that others wait for does.
                self.set_deadline(key, &mut connection, None);
                self.set_overdue(key, &mut connection, Some(deadline));
                self.put(key, connection);
                self.hand_out = true;
            } else {
                self.end(key, connection);
            }
        }
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept_after = None;
            self.listen(true);
        }
        self.desk.core.expire(self::now());
        if self.warm && self.last_request.saturating_add(COOL_AFTER) <= now {
            self.warm = false;
            self.desk.core.cool();
            self.desk.replies.shrink(self.memory);
            self.pool.cool();
        }
    }

    /// Has the work done on a thread of its own, whether the peer stays or not.
    fn derive(&mut self, connection: Key, derivation: Box<Derivation>, ticket: Ticket) {
        self.ticket = Some(ticket);
        let (done, work) = (self.done.0.clone(), Arc::clone(&self.work));
        let started = thread::Builder::new().name("derivation".to_owned()).spawn(move || {
            let key = catch_unwind(AssertUnwindSafe(|| derivation.run())).ok().flatten();
            // The receiver lives as long as the agent.
            let _ = done.send(Done { connection, key });
            let _ = work.write(1);
        });
        if started.is_err() {
            let _ = self.done.0.send(Done { connection, key: None });
            let _ = self.work.write(1);
        }
    }

    fn take_results(&mut self) {
        // Only to make it silent.
        let _ = self.work.read();
        while let Ok(Done { connection: key, key: derived }) = self.done.1.try_recv() {
            let Some(ticket) = self.ticket.take() else { continue };
            let connection = self.take(key);
            let now = self.warm_up();
            match connection {
                Some(connection) => self.go_on(key, connection, |server, connection| {
                    server.desk.core.derived(ticket, derived, now, &mut server.desk.replies);
                    server.send(key, connection, None)?;
                    server.settle(key, connection, true)
                }),
                None => {
                    self.desk.core.derived(ticket, derived, now, &mut self.desk.replies);
                    self.desk.replies.clear();
                }
            }
        }
    }
}

/// Answers requests; between two turns it has nothing to say.
struct Desk<R, A> {
    core: Core<R, A>,
    replies: Replies,
}

impl<R: Random, A: Audit> Desk<R, A> {
    /// Answers every whole frame in `bytes` until the turn is over, and says how many bytes were taken.
    fn take_up(
        &mut self,
        session: &mut Session,
        bytes: &[u8],
        now: Now,
        around: Surroundings,
    ) -> (usize, Stop) {
        let frame_max = self.core.limits().frame;
        let mut taken = 0;
        let mut requests = 0;
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

const _: () = assert!(READ_LEN <= SHARED_LEN);
