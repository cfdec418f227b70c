//! Sockets: the listener, the connections, the memory that their frames take.
//!
//! Owns who is let in at all (by the uid that the kernel names, for the connection and again for the sender of every
//! message), the reading and the writing, whose turn it is, deadlines, and what a slow or silent peer can hold. One loop over
//! level-triggered epoll on one thread: a request costs a wait, a receive and a send, and only Argon2id is on another thread
//! (`docs/decisions/0004`). It decodes nothing but the frame head, and no key passes through it outside a frame. Implements
//! `docs/protocol.md`, sections 1, 2 and 8.

mod connection;
mod pool;
mod turn;
mod worker;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    time::Duration,
};

use kms_protocol::FRAME_HEAD_LEN;
use kms_secret_memory::{LockedBuffer, Policy};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{getsockopt, setsockopt, sockopt},
        time::TimeSpec,
        timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
};

use self::{
    connection::{Closed, Connection, Load, Wait},
    pool::FramePool,
    turn::Desk,
    worker::{Done, Worker},
};
use crate::{
    audit::Audit,
    authorize::Peer,
    core::{Core, IN_FLIGHT_MAX, Now, Ticket},
    crypto::{Derivation, Random},
    error::StartError,
    reply::Replies,
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

/// What the kernel tells at once.
const EVENTS: usize = 128;

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

/// What tells that the loop goes round.
struct Beat {
    interval: Duration,
    next: Duration,
}

/// Who a turn is for: a connection, by its place and how often the place was given away, or one of the constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    const LISTENER: Self = Self(u64::MAX);
    const TIMER: Self = Self(u64::MAX - 1);
    const WORK: Self = Self(u64::MAX - 2);
    const SIGNALS: Self = Self(u64::MAX - 3);
    const COMMAND: Self = Self(u64::MAX - 4);
    const MONITOR: Self = Self(u64::MAX - 5);

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

/// What is not the server's, but waited for by its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Signals.
    Signals,
    /// The command that the agent was started for; readable when it has ended.
    Command,
    /// The monitor, which has something to tell.
    Monitor,
}

impl Source {
    fn key(self) -> Key {
        match self {
            Self::Signals => Key::SIGNALS,
            Self::Command => Key::COMMAND,
            Self::Monitor => Key::MONITOR,
        }
    }
}

/// Why [`Server::serve`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// There is something to be read there.
    Readable(Source),
    /// Time to tell that the loop goes round.
    Beat,
}

/// The agent with its sockets.
pub(crate) struct Server<R, A> {
    desk: Desk<R, A>,
    /// Where requests are read to; wiped before the next connection has its turn.
    input: LockedBuffer,
    memory: Policy,
    pool: Rc<FramePool>,
    epoll: Epoll,
    /// None where one peer is all that is served.
    listener: Option<UnixListener>,
    /// While nobody is let in.
    accept_after: Option<Duration>,
    timer: TimerFd,
    /// When the timer rings.
    alarm: Option<Duration>,
    /// When it rang last.
    rang: Duration,
    beat: Option<Beat>,
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
    ahead: Ahead,
    /// Who sends more than fits a turn. One of them has a turn after all others had theirs.
    heavy: VecDeque<Key>,
    worker: Worker,
    /// Where the result that the worker is at belongs.
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
    /// A server of what connects to `listener`, which does not block, and of whom [`admit`](Self::admit) is called for.
    pub(crate) fn new(
        core: Core<R, A>,
        listener: Option<UnixListener>,
        memory: Policy,
    ) -> Result<Self, StartError> {
        let runtime = |errno: Errno| StartError::Runtime(errno.into());
        let worker = Worker::start(memory)?;
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
            rang: Duration::ZERO,
            beat: None,
            slots: Vec::new(),
            free: Vec::new(),
            open: 0,
            open_by_uid: HashMap::new(),
            deadlines: BTreeSet::new(),
            waiting: HashMap::new(),
            hand_out: false,
            overdue: BTreeSet::new(),
            ahead: Ahead { events: [EpollEvent::empty(); EVENTS], count: 0 },
            heavy: VecDeque::new(),
            worker,
            ticket: None,
            panics: 0,
            last_request: Duration::ZERO,
            warm: false,
        };
        if let Some(listener) = &server.listener {
            server.watch(listener, Key::LISTENER).map_err(runtime)?;
        }
        server.watch(&server.timer, Key::TIMER).map_err(runtime)?;
        server.watch(&server.worker, Key::WORK).map_err(runtime)?;
        Ok(server)
    }

    fn watch(&self, fd: impl AsFd, key: Key) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, key.0))
    }

    /// Has [`serve`](Self::serve) come back when there is something to read here.
    pub(crate) fn wake_by(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        self.watch(fd, source.key()).map_err(io::Error::from)
    }

    /// Has [`serve`](Self::serve) come back at least so often.
    pub(crate) fn beat_every(&mut self, interval: Duration) {
        self.beat = Some(Beat { interval, next: since_boot().saturating_add(interval) });
    }

    pub(crate) fn core(&mut self) -> &mut Core<R, A> {
        &mut self.desk.core
    }

    /// Serves until there is something that is not the server's.
    pub(crate) fn serve(&mut self) -> io::Result<Wake> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = match std::mem::take(&mut self.ahead.count) {
                0 => {
                    let timeout = if self.heavy.is_empty() { EpollTimeout::NONE } else { EpollTimeout::ZERO };
                    match self.epoll.wait(&mut events, timeout) {
                        Err(Errno::EINTR) => 0,
                        count => count?,
                    }
                }
                count => {
                    std::mem::swap(&mut events, &mut self.ahead.events);
                    count
                }
            };
            let mut wake = None;
            for event in events.iter().take(count) {
                match Key(event.data()) {
                    Key::LISTENER => self.accept(),
                    Key::TIMER => self.ring(),
                    Key::WORK => self.take_results(),
                    Key::SIGNALS => wake = Some(Wake::Readable(Source::Signals)),
                    Key::COMMAND => wake = Some(Wake::Readable(Source::Command)),
                    Key::MONITOR => wake = Some(Wake::Readable(Source::Monitor)),
                    connection => self.attend(connection, event.events()),
                }
            }
            if let Some(key) = self.heavy.pop_front()
                && let Some(mut connection) = self.take(key)
            {
                connection.load = Load::Light;
                self.go_on(key, connection, |server, connection| {
                    server.advance(key, connection, EpollFlags::empty())
                });
            }
            self.hand_out_memory();
            if wake.is_none() && self.has_beat() {
                wake = Some(Wake::Beat);
            }
            self.set_alarm();
            if let Some(wake) = wake {
                return Ok(wake);
            }
        }
    }

    /// Whether a beat is due.
    fn has_beat(&mut self) -> bool {
        let Some(beat) = &mut self.beat else { return false };
        // The clock is looked at by who rang.
        let due = beat.next <= self.rang;
        if due {
            beat.next = self.rang.saturating_add(beat.interval);
        }
        due
    }

    /// Lets in who is there.
    fn accept(&mut self) {
        for _ in 0..TURN_ACCEPTS {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
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
        if let Some(listener) = &self.listener
            && let Err(errno) = self.epoll.modify(listener, &mut EpollEvent::new(events, Key::LISTENER.0))
        {
            tracing::error!(%errno, "the listener cannot be watched");
        }
    }

    /// Lets a connection in, or closes it without a byte. Whatever cannot be found out about the peer is a no.
    pub(crate) fn admit(&mut self, stream: UnixStream) {
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
        let kept = if peer.uid == self.desk.core.own_uid() { 0 } else { KEPT_CONNECTIONS };
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
                self.desk.replies.clear_all();
                self.desk.core.end_batch();
                self.end(key, connection);
            }
        }
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
            self.beat.as_ref().map(|beat| beat.next),
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
        self.rang = now;
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

    /// Has the work done on the other thread, whether the peer stays or not.
    fn derive(&mut self, connection: Key, derivation: Box<Derivation>, ticket: Ticket) {
        self.ticket = Some(ticket);
        self.worker.begin(connection, derivation);
    }

    fn take_results(&mut self) {
        let Some(Done { connection: key, key: derived }) = self.worker.take_result() else { return };
        let Some(ticket) = self.ticket.take() else { return };
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

/// What the kernel told while a connection had its turn; the loop takes it before it asks again.
struct Ahead {
    events: [EpollEvent; EVENTS],
    count: usize,
}

impl Ahead {
    /// Whether anybody but `key` has something to do.
    fn has_others(&mut self, epoll: &Epoll, key: Key) -> bool {
        if self.count == 0 {
            let count = epoll.wait(&mut self.events, EpollTimeout::ZERO).unwrap_or_default();
            if self.events.iter().take(count).any(|event| event.data() != key.0) {
                self.count = count;
            }
        }
        self.count > 0
    }
}

const _: () = assert!(READ_LEN <= SHARED_LEN);
