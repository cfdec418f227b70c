//! The connection to the agent: a Unix stream socket, with a limit on every wait.
//!
//! Owns the check of who serves: the uid that called `listen` before anything is sent, and the sender of the hello's reply
//! before anything else is sent, since behind socket activation only that one is the agent. Lengths from the peer are checked
//! before memory is taken for them. A process that inherited a connection leaves it alone: it closes its descriptor and no more.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use kms_protocol::{FRAME_MAX, Hello, Opcode, PROTOCOL_VERSION, Request, Welcome, decode_fields};
use kms_secret_memory::SecretVec;
use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
            UnixCredentials, connect, getsockopt, recv, recvmsg, send, sendmsg, setsockopt, shutdown, socket,
            sockopt::{PassCred, PeerCredentials, SendTimeout},
        },
        time::TimeVal,
    },
};

use crate::{
    client::Options,
    error::{Error, ReplyError},
    locate::{Surroundings, Trust, find},
    sys,
    wire::{self, Assembler, Reply},
};

/// An agent that takes shorter frames than this could not even take a message of 64 KiB.
const FRAME_MAX_LEAST: usize = 128 * 1024;

/// Which agent to connect to, again and again.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) path: PathBuf,
    server_uid: Option<u32>,
    pub(crate) timeout: Duration,
}

impl Route {
    /// Finds the socket. It stays the one, since another could mean other keys.
    pub(crate) fn find(options: &Options) -> Result<Self, Error> {
        let path = find(options.socket.as_deref(), &Surroundings::of_process())?;
        Ok(Self { path, server_uid: options.server_uid, timeout: options.timeout })
    }

    /// Looks at who may serve the socket, and connects to it. Nothing is kept from an earlier look.
    pub(crate) fn connect(&self) -> Result<Connection, Error> {
        let trust = Trust::examine(&self.path, Surroundings::of_process().uid, self.server_uid)?;
        Connection::open(&self.path, &trust, self.timeout)
    }
}

/// Lets time pass.
pub(crate) fn pause_for(time: Duration) {
    if !time.is_zero() {
        // Ended early by a signal it is an attempt that comes early.
        let _ = poll(&mut [], PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
    }
}

/// Both directions of a connection that has had its hello.
pub(crate) struct Connection {
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
    pub(crate) welcome: Welcome,
    /// Who sent the hello's reply.
    pub(crate) server: Process,
    /// Who opened it: [`sys::lineage`].
    opened_by: u64,
    broken: bool,
}

impl Connection {
    /// Connects, checks who serves, says hello.
    pub(crate) fn open(path: &Path, trust: &Trust, limit: Duration) -> Result<Self, Error> {
        let refused = |errno: Errno| Error::Connect { socket: path.to_owned(), source: errno.into() };
        let address = UnixAddr::new(path).map_err(refused)?;
        let socket =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(refused)?;
        // Before `connect`: the first bytes of the server could otherwise arrive without their sender.
        setsockopt(&socket, PassCred, &true).map_err(refused)?;
        // A full backlog would otherwise hold `connect` for ever.
        setsockopt(&socket, SendTimeout, &time_val(limit)).map_err(refused)?;
        connect(socket.as_raw_fd(), &address).map_err(refused)?;
        let listener = getsockopt(&socket, PeerCredentials)
            .map_err(|_| Error::UnidentifiedServer { socket: path.to_owned() })?;
        if !trust.allows(listener.uid()) {
            return Err(Error::UntrustedServer { socket: path.to_owned(), uid: listener.uid() });
        }
        Self::greet(socket, path, trust, limit)
    }

    fn greet(socket: OwnedFd, path: &Path, trust: &Trust, limit: Duration) -> Result<Self, Error> {
        let socket = Arc::new(socket);
        let mut sender = Sender { socket: Arc::clone(&socket), next_id: 1, frame_max: FRAME_MAX, limit };
        let mut receiver = Receiver {
            socket,
            assembler: Assembler::new(FRAME_MAX),
            credentials: Some(Credentials { sender: None }),
        };
        let wrong = |source: Error| match source {
            Error::Reply(_) | Error::Timeout { .. } | Error::Connection(_) => {
                Error::NotAnAgent { socket: path.to_owned(), source: Box::new(source) }
            }
            Error::Closed => Error::ClosedBeforeHello { socket: path.to_owned() },
            other => other,
        };
        let (operation, id) =
            sender.send(&Request::Hello(Hello { version: PROTOCOL_VERSION })).map_err(wrong)?;
        let reply = receiver.receive(SecretVec::with_capacity(0), limit);
        // Who answered is judged before what was answered.
        let answered_by = receiver.credentials.take().and_then(|credentials| credentials.sender);
        if let Some(Process { uid, .. }) = answered_by
            && !trust.allows(uid)
        {
            return Err(Error::UntrustedServer { socket: path.to_owned(), uid });
        }
        let reply = reply.map_err(wrong)?;
        let server = answered_by.ok_or_else(|| Error::UnidentifiedServer { socket: path.to_owned() })?;
        let accepted = reply.accept(operation, id).map_err(wrong)?;
        let welcome: Welcome = accepted.fields(decode_fields).map_err(|error| wrong(error.into()))?;
        if welcome.version != PROTOCOL_VERSION {
            return Err(wrong(ReplyError::Version(welcome.version).into()));
        }
        let frame_max = wire::frame_max(&welcome);
        if frame_max < FRAME_MAX_LEAST {
            return Err(wrong(ReplyError::Limits.into()));
        }
        sender.frame_max = frame_max;
        receiver.assembler.set_frame_max(frame_max);
        // From here on the kernel need not name the sender of every piece any more; it is only time that this saves.
        let _ = setsockopt(&receiver.socket.as_fd(), PassCred, &false);
        Ok(Self { sender, receiver, welcome, server, opened_by: sys::lineage(), broken: false })
    }

    /// Sends a request and waits for its reply, `limit` at most.
    pub(crate) fn call(&mut self, request: &Request<'_>, limit: Duration) -> Result<Call, Error> {
        self.usable()?;
        let id = self.sender.next_id();
        let frame = wire::encode(request, id, self.sender.frame_max)?;
        self.ask(request.opcode(), id, frame.expose_secret(), limit).map_err(|unanswered| unanswered.error)
    }

    /// Sends a whole frame and waits for the reply, `limit` at most.
    pub(crate) fn ask(
        &mut self,
        operation: Opcode,
        id: u32,
        frame: &[u8],
        limit: Duration,
    ) -> Result<Call, Unanswered> {
        self.usable().map_err(|error| Unanswered { error, sent: false })?;
        let sent = self.sender.send_bytes(frame);
        sent.map_err(|error| self.failed(Unanswered { error, sent: false }))?;
        let reply = self.receiver.receive(SecretVec::with_capacity(0), limit);
        let reply = reply.map_err(|error| self.failed(Unanswered { error, sent: true }))?;
        Ok(Call { operation, id, reply })
    }

    fn failed(&mut self, unanswered: Unanswered) -> Unanswered {
        self.break_off();
        unanswered
    }

    /// Fails after an earlier failure, and in a process that inherited the connection.
    pub(crate) fn usable(&self) -> Result<(), Error> {
        if self.broken || self.is_inherited() { Err(Error::Broken) } else { Ok(()) }
    }

    /// Whether it belongs to the process that this one was forked from.
    pub(crate) fn is_inherited(&self) -> bool {
        self.opened_by != sys::lineage()
    }

    /// Ends the connection after a failure that left it in the middle of an answer.
    pub(crate) fn break_off(&mut self) {
        self.broken = true;
        // Our parent's connection is not ours to end.
        if !self.is_inherited() {
            self.sender.ending().shut();
        }
    }

    /// Whoever moves the bytes without us.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.sender.socket
    }

    /// Gives the socket away. A connection that is in the middle of something has no use for whoever gets it.
    #[cfg(feature = "async")]
    pub(crate) fn into_socket(self) -> Result<OwnedFd, Error> {
        self.usable()?;
        let Self { sender, receiver, .. } = self;
        if !receiver.assembler.is_between_frames() {
            return Err(ReplyError::RequestId.into());
        }
        drop(receiver);
        Arc::into_inner(sender.socket).ok_or(Error::Broken)
    }

    /// Waits for `time`, or until the agent closes the connection.
    pub(crate) fn wait(&self, time: Duration) -> Result<(), Error> {
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.receiver.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, time) {
            Ok(0) | Err(Errno::EINTR) => Ok(()),
            Ok(_) => Err(Error::Closed),
            Err(errno) => Err(Error::Connection(errno.into())),
        }
    }
}

/// Why there was no answer.
pub(crate) struct Unanswered {
    pub(crate) error: Error,
    /// The whole request left, and may have been carried out.
    pub(crate) sent: bool,
}

/// A reply, with what it answers.
pub(crate) struct Call {
    pub(crate) operation: Opcode,
    pub(crate) id: u32,
    pub(crate) reply: Reply,
}

impl Call {
    /// As [`Reply::accept`].
    pub(crate) fn accept(&self) -> Result<wire::Accepted<'_>, Error> {
        self.reply.accept(self.operation, self.id)
    }
}

/// The sending half.
pub(crate) struct Sender {
    socket: Arc<OwnedFd>,
    next_id: u32,
    pub(crate) frame_max: usize,
    limit: Duration,
}

impl Sender {
    /// The id of the next request.
    pub(crate) fn next_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        id
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, request: &Request<'_>) -> Result<(Opcode, u32), Error> {
        let id = self.next_id();
        let bytes = wire::encode(request, id, self.frame_max)?;
        self.send_bytes(bytes.expose_secret())?;
        Ok((request.opcode(), id))
    }

    /// Sends a whole frame. A peer that does not take it within the limit is given up.
    pub(crate) fn send_bytes(&self, mut bytes: &[u8]) -> Result<(), Error> {
        let start = Instant::now();
        while !bytes.is_empty() {
            match send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::Connection(errno.into())),
            }
            // The kernel's limit is for each wait; a peer that takes a byte at a time must not renew it for ever.
            if !bytes.is_empty() && start.elapsed() >= self.limit {
                return Err(Error::Timeout { limit: self.limit });
            }
        }
        Ok(())
    }

    /// A way to end the connection from another thread.
    pub(crate) fn ending(&self) -> Ending {
        Ending(Arc::clone(&self.socket))
    }
}

/// Ends a connection while it is in use.
pub(crate) struct Ending(Arc<OwnedFd>);

impl Ending {
    /// Ends both directions, so that whoever waits on the socket wakes up.
    pub(crate) fn shut(&self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// The receiving half.
pub(crate) struct Receiver {
    socket: Arc<OwnedFd>,
    assembler: Assembler,
    /// While the hello's reply is awaited.
    credentials: Option<Credentials>,
}

/// Who sent what arrived.
struct Credentials {
    sender: Option<Process>,
}

/// A process, as the kernel named it when it sent something.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) uid: u32,
    /// 0 where our pid namespace has no number for it.
    pub(crate) pid: i32,
}

impl Receiver {
    /// The next reply, whole, within `limit`. `buffer` is used when it is large enough.
    pub(crate) fn receive(&mut self, buffer: SecretVec, limit: Duration) -> Result<Reply, Error> {
        let until = Until { start: Instant::now(), limit };
        let mut spare = Some(buffer);
        while self.assembler.is_between_frames() {
            // Nothing of the reply is there yet, as a rule.
            until.readable(&self.socket)?;
            let got = receive_some(&self.socket, self.assembler.room(), &mut self.credentials, &until)?;
            self.assembler.filled(got);
        }
        loop {
            if let Some(frame) = self.assembler.next(&mut spare)? {
                return Ok(Reply::new(frame));
            }
            let got = receive_some(&self.socket, self.assembler.room(), &mut self.credentials, &until)?;
            self.assembler.filled(got);
        }
    }
}

/// How long a reply may take.
struct Until {
    start: Instant,
    limit: Duration,
}

impl Until {
    /// Waits until there is something to receive. In `poll`, since whoever sleeps in a receive is woken for nothing when the
    /// agent takes the request out of the socket: there is room to send again.
    fn readable(&self, socket: &OwnedFd) -> Result<(), Error> {
        loop {
            let left = self.limit.saturating_sub(self.start.elapsed());
            // Rounded up: a part of a millisecond that is left must not become a wait of none, again and again.
            let left = PollTimeout::try_from(left.saturating_add(Duration::from_micros(999)));
            match poll(
                &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                left.unwrap_or(PollTimeout::MAX),
            ) {
                Ok(0) if self.start.elapsed() >= self.limit => {
                    return Err(Error::Timeout { limit: self.limit });
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Error::Connection(errno.into())),
            }
        }
    }
}

/// Receives what is there, and waits only when that is nothing.
fn receive_some(
    socket: &OwnedFd,
    buf: &mut [u8],
    credentials: &mut Option<Credentials>,
    until: &Until,
) -> Result<usize, Error> {
    loop {
        let got = match credentials {
            None => recv(socket.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT),
            Some(credentials) => receive_with_sender(socket, buf, credentials),
        };
        match got {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE) => return Err(Error::Closed),
            Ok(got) => return Ok(got),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => until.readable(socket)?,
            Err(errno) => return Err(Error::Connection(errno.into())),
        }
    }
}

/// As [`receive_some`], and notes who sent it: the first untrusted uid would do, so a second sender replaces nothing but is an
/// error.
fn receive_with_sender(
    socket: &OwnedFd,
    buf: &mut [u8],
    credentials: &mut Credentials,
) -> Result<usize, Errno> {
    // Room for one sender and nothing else: descriptors that come along are closed by the kernel.
    let mut control = cmsg_space!(UnixCredentials);
    let mut slices = [IoSliceMut::new(buf)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    if message.bytes == 0 {
        return Ok(0);
    }
    let mut sender = None;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmCredentials(found) => {
                sender = Some(Process { uid: found.uid(), pid: found.pid() });
            }
            _ => return Err(Errno::EPROTO),
        }
    }
    match (credentials.sender, sender) {
        (_, None) => Err(Errno::EPROTO),
        (Some(before), Some(now)) if before != now => Err(Errno::EPROTO),
        (_, now) => {
            credentials.sender = now;
            Ok(message.bytes)
        }
    }
}

/// Receives what is there; nothing when that is nothing.
pub(crate) fn receive_now(socket: &impl AsRawFd, room: &mut [u8]) -> Result<Option<usize>, Error> {
    match recv(socket.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
        Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE) => Err(Error::Closed),
        Ok(got) => Ok(Some(got)),
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(Error::Connection(errno.into())),
    }
}

/// Sends what the socket has room for; nothing when it has none.
pub(crate) fn send_now(socket: &impl AsRawFd, slices: &[IoSlice<'_>]) -> Result<Option<usize>, Error> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match sendmsg::<()>(socket.as_raw_fd(), slices, &[], flags, None) {
        Ok(sent) => Ok(Some(sent)),
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
        Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Error::Closed),
        Err(errno) => Err(Error::Connection(errno.into())),
    }
}

/// Waits for something to receive, or for room to send; `limit` at most.
pub(crate) fn wait_for(socket: &OwnedFd, to_send: bool, limit: Duration) -> Result<PollFlags, Error> {
    let mut flags = PollFlags::POLLIN;
    flags.set(PollFlags::POLLOUT, to_send);
    let limit = PollTimeout::try_from(limit.saturating_add(Duration::from_micros(999)));
    let mut polled = [PollFd::new(socket.as_fd(), flags)];
    match poll(&mut polled, limit.unwrap_or(PollTimeout::MAX)) {
        Ok(_) => Ok(polled.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty())),
        Err(Errno::EINTR) => Ok(PollFlags::empty()),
        Err(errno) => Err(Error::Connection(errno.into())),
    }
}

fn time_val(time: Duration) -> TimeVal {
    // Zero would mean "for ever".
    let micros = time.as_micros().clamp(1, 1_000_000_000_000_000);
    let micros = i64::try_from(micros).unwrap_or(1);
    TimeVal::new(micros / 1_000_000, micros % 1_000_000)
}
