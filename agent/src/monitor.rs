//! The process beside the agent that does what the agent itself may not: today it watches logind, over D-Bus.
//!
//! Owns its fork, which comes before sockets, secrets and the sandbox, and the few messages between the two. It has no
//! descriptor but their socket, holds no secret, and ends when the agent does. Whatever it says can make the agent forget
//! keys and nothing else; when it ends, or says what cannot be understood, while the agent relies on it, the agent ends too
//! (`docs/decisions/0005`). While there is nothing to watch it waits in one call.

#[cfg(feature = "logind")]
mod logind;

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::Signal,
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout, read, write},
};
use thiserror::Error;

use crate::{audit::Reason, config::LockOn, error::StartError, sys};

/// The bytes of every message: a kind and an argument.
const MESSAGE_LEN: usize = 2;

/// The start waits so long for bus and logind. Longer than the monitor itself waits for each of them.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// What the agent tells the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Watch(LockOn),
    /// The keys are gone; the machine may sleep.
    Done,
}

/// What the monitor tells the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    /// This is watched from now on.
    Watching(LockOn),
    /// What was asked for is not; what was watched before still is.
    Refused(WatchError),
    Lock(Cause),
}

/// Why the keys are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    SessionLocked,
    Sleep,
}

impl From<Cause> for Reason {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::SessionLocked => Self::SessionLocked,
            Cause::Sleep => Self::Suspend,
        }
    }
}

/// Why something is not watched.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum WatchError {
    #[error("the system bus cannot be reached")]
    NoBus,
    #[error("logind does not answer on the system bus")]
    NoLogind,
    #[error("logind grants no inhibitor that delays sleep")]
    NoInhibitor,
    #[error("the process that watches is gone")]
    Gone,
}

/// What the agent has to do, or to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MonitorEvent {
    /// The keys are to go, and [`Monitor::done`] to be told.
    Lock(Reason),
    /// This is watched from now on.
    Watching(LockOn),
    /// What was asked for last is not watched; what was watched before still is.
    Refused(WatchError),
    /// The monitor is gone. It tells so once.
    Ended,
}

fn lock_on_bits(on: LockOn) -> u8 {
    u8::from(on.session) | u8::from(on.sleep) << 1
}

fn lock_on(bits: u8) -> Option<LockOn> {
    (bits < 4).then_some(LockOn { session: bits & 1 != 0, sleep: bits & 2 != 0 })
}

impl Order {
    fn to_bytes(self) -> [u8; MESSAGE_LEN] {
        match self {
            Self::Watch(on) => [1, lock_on_bits(on)],
            Self::Done => [2, 0],
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [1, bits] => lock_on(bits).map(Self::Watch),
            [2, 0] => Some(Self::Done),
            _ => None,
        }
    }
}

impl Report {
    fn to_bytes(self) -> [u8; MESSAGE_LEN] {
        match self {
            Self::Watching(on) => [1, lock_on_bits(on)],
            Self::Refused(WatchError::NoBus) => [2, 1],
            Self::Refused(WatchError::NoLogind) => [2, 2],
            Self::Refused(WatchError::NoInhibitor) => [2, 3],
            Self::Refused(WatchError::Gone) => [2, 4],
            Self::Lock(Cause::SessionLocked) => [3, 1],
            Self::Lock(Cause::Sleep) => [3, 2],
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [1, bits] => lock_on(bits).map(Self::Watching),
            [2, 1] => Some(Self::Refused(WatchError::NoBus)),
            [2, 2] => Some(Self::Refused(WatchError::NoLogind)),
            [2, 3] => Some(Self::Refused(WatchError::NoInhibitor)),
            [2, 4] => Some(Self::Refused(WatchError::Gone)),
            [3, 1] => Some(Self::Lock(Cause::SessionLocked)),
            [3, 2] => Some(Self::Lock(Cause::Sleep)),
            _ => None,
        }
    }
}

/// A message as it came, if it has the length of one. `Ok(None)`: there will be none any more.
fn receive<T>(socket: impl AsFd, decode: impl Fn(&[u8]) -> Option<T>) -> Result<Option<T>, Errno> {
    // One byte more, so that a message that is too long is seen to be.
    let mut bytes = [0; MESSAGE_LEN + 1];
    match read(socket, &mut bytes) {
        Ok(0) | Err(Errno::ECONNRESET) => Ok(None),
        Ok(count) => bytes.get(..count).and_then(decode).map(Some).ok_or(Errno::EBADMSG),
        Err(errno) => Err(errno),
    }
}

fn wait_readable(socket: impl AsFd, timeout: PollTimeout) -> Result<bool, Errno> {
    loop {
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            ready => return ready.map(|count| count > 0),
        }
    }
}

/// The monitor, as the agent sees it.
pub(crate) struct Monitor {
    /// Nothing once it is gone.
    socket: Option<OwnedFd>,
    /// What it was asked for last, and what it says that it does.
    asked: LockOn,
    watched: LockOn,
}

impl Monitor {
    /// Forks the monitor. To be called while there is one thread and nothing secret.
    pub(crate) fn start() -> Result<Self, StartError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|errno| StartError::Monitor(errno.into()))?;
        match sys::fork().map_err(StartError::Monitor)? {
            ForkResult::Parent { .. } => {
                Ok(Self { socket: Some(ours), asked: LockOn::default(), watched: LockOn::default() })
            }
            ForkResult::Child => {
                drop(ours);
                // What the parent has on its stack is the parent's: no panic may unwind into it.
                let attended = catch_unwind(AssertUnwindSafe(|| attend(&theirs)));
                std::process::exit(i32::from(!matches!(attended, Ok(Ok(())))))
            }
        }
    }

    /// Asks for the first thing to be watched, and waits until it is.
    pub(crate) fn watch_at_start(&mut self, on: LockOn) -> Result<(), StartError> {
        let failed = |source| StartError::Watch { on, source };
        if on.is_empty() {
            return Ok(());
        }
        self.watch(on).map_err(failed)?;
        let socket = self.socket.as_ref().ok_or(failed(WatchError::Gone))?;
        let patience = PollTimeout::try_from(START_PATIENCE).unwrap_or(PollTimeout::MAX);
        match wait_readable(socket, patience) {
            Ok(true) => match self.event() {
                Some(MonitorEvent::Watching(watched)) if watched == on => Ok(()),
                Some(MonitorEvent::Refused(error)) => Err(failed(error)),
                _ => Err(failed(WatchError::Gone)),
            },
            Ok(false) | Err(_) => Err(failed(WatchError::NoLogind)),
        }
    }

    /// Asks for this to be watched, unless it is; the answer is an event.
    pub(crate) fn watch(&mut self, on: LockOn) -> Result<(), WatchError> {
        if self.asked == on && self.watched == on {
            return Ok(());
        }
        self.asked = on;
        self.send(Order::Watch(on))
    }

    /// Tells that the keys are gone. Sleep waits for it, and nothing else does.
    pub(crate) fn done(&mut self, reason: Reason) -> Result<(), WatchError> {
        if reason == Reason::Suspend { self.send(Order::Done) } else { Ok(()) }
    }

    fn send(&mut self, order: Order) -> Result<(), WatchError> {
        let socket = self.socket.as_ref().ok_or(WatchError::Gone)?;
        // No room means that the monitor has read nothing for hundreds of messages.
        write(socket, &order.to_bytes()).map(|_| ()).map_err(|_| WatchError::Gone)
    }

    /// What is watched, as far as the events so far have told.
    pub(crate) fn watched(&self) -> LockOn {
        self.watched
    }

    /// The next event, if there is one.
    pub(crate) fn event(&mut self) -> Option<MonitorEvent> {
        match receive(self.socket.as_ref()?, Report::from_bytes) {
            Ok(Some(Report::Watching(on))) => {
                self.watched = on;
                Some(MonitorEvent::Watching(on))
            }
            Ok(Some(Report::Refused(error))) => Some(MonitorEvent::Refused(error)),
            Ok(Some(Report::Lock(cause))) => Some(MonitorEvent::Lock(cause.into())),
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            // What cannot be understood may have been the word to lock.
            Ok(None) | Err(_) => {
                // Closed, the monitor ends as well, and no loop is woken by it any more.
                self.socket = None;
                Some(MonitorEvent::Ended)
            }
        }
    }

    /// What becomes readable with an event; nothing once the monitor is gone.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }
}

/// The monitor itself, until the agent is gone.
fn attend(socket: &OwnedFd) -> io::Result<()> {
    leave_agent(socket)?;
    loop {
        wait_readable(socket, PollTimeout::NONE)?;
        match receive(socket, Order::from_bytes) {
            Ok(None) => return Ok(()),
            Ok(Some(Order::Watch(on))) if on.is_empty() => report(socket, Report::Watching(on))?,
            #[cfg(feature = "logind")]
            Ok(Some(Order::Watch(on))) => logind::watch(socket, on)?,
            #[cfg(not(feature = "logind"))]
            Ok(Some(Order::Watch(_))) => report(socket, Report::Refused(WatchError::NoLogind))?,
            // Too late: what it is about is not watched any more.
            Ok(Some(Order::Done)) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives up what it has of the agent and of whoever started that.
fn leave_agent(socket: &OwnedFd) -> io::Result<()> {
    prctl::set_name(c"kms-monitor")?;
    // The end of the socket tells too, but not while a call is under way.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // A Ctrl-C or a stop of the unit goes to the whole group. The agent's end is what ends this process.
    sys::ignore_signals(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1])?;
    sys::close_inherited(Some(socket.as_fd()))?;
    // A pipe on stderr would not end with the agent's.
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    chdir("/")?;
    Ok(())
}

fn report(socket: impl AsFd, report: Report) -> io::Result<()> {
    write(socket, &report.to_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Monitor, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let on = LockOn { session: true, sleep: true };
        (Monitor { socket: Some(ours), asked: on, watched: on }, theirs)
    }

    #[test]
    fn the_latest_wish_is_told_whatever_was_answered_so_far() {
        let (mut monitor, theirs) = pair();
        let order = |theirs: &OwnedFd| receive(theirs, Order::from_bytes);
        let [both, session] = [LockOn { session: true, sleep: true }, LockOn { session: true, sleep: false }];
        monitor.watch(both).unwrap();
        assert_eq!(order(&theirs), Err(Errno::EAGAIN), "it is so");
        // The first is not answered yet.
        monitor.watch(session).unwrap();
        monitor.watch(both).unwrap();
        assert_eq!(order(&theirs), Ok(Some(Order::Watch(session))));
        assert_eq!(order(&theirs), Ok(Some(Order::Watch(both))));
        // What was refused is tried again.
        monitor.watch(session).unwrap();
        report(&theirs, Report::Refused(WatchError::NoLogind)).unwrap();
        assert_eq!(monitor.event(), Some(MonitorEvent::Refused(WatchError::NoLogind)));
        assert_eq!(order(&theirs), Ok(Some(Order::Watch(session))));
        monitor.watch(session).unwrap();
        assert_eq!(order(&theirs), Ok(Some(Order::Watch(session))));
    }

    #[test]
    fn every_message_is_one_thing_or_nothing() {
        let (mut orders, mut reports) = (0, 0);
        for bytes in (0..=u16::MAX).map(u16::to_be_bytes) {
            if let Some(order) = Order::from_bytes(&bytes) {
                assert_eq!(order.to_bytes(), bytes);
                orders += 1;
            }
            if let Some(report) = Report::from_bytes(&bytes) {
                assert_eq!(report.to_bytes(), bytes);
                reports += 1;
            }
        }
        assert_eq!((orders, reports), (5, 10));
    }

    #[test]
    fn what_cannot_be_understood_is_the_end_of_the_monitor() {
        for bytes in [&[0u8][..], &[3], &[3, 0], &[3, 3], &[1, 4], &[255, 255], &[3, 1, 0], &[3; 1000]] {
            let (mut monitor, theirs) = pair();
            write(&theirs, bytes).unwrap();
            assert_eq!(monitor.event(), Some(MonitorEvent::Ended), "{bytes:?}");
            assert!(monitor.descriptor().is_none());
            assert_eq!(monitor.event(), None, "it is told once");
            assert_eq!(monitor.watch(LockOn::default()), Err(WatchError::Gone));
            assert_eq!(monitor.watched(), LockOn { session: true, sleep: true }, "what was relied on");
            assert_eq!(receive(&theirs, Order::from_bytes), Ok(None), "and the monitor sees the end");
        }
    }

    #[test]
    fn what_was_said_before_the_end_is_still_heard() {
        let (mut monitor, theirs) = pair();
        report(&theirs, Report::Lock(Cause::Sleep)).unwrap();
        report(&theirs, Report::Watching(LockOn { session: false, sleep: true })).unwrap();
        drop(theirs);
        assert_eq!(monitor.event(), Some(MonitorEvent::Lock(Reason::Suspend)));
        assert_eq!(monitor.event(), Some(MonitorEvent::Watching(LockOn { session: false, sleep: true })));
        assert_eq!(monitor.event(), Some(MonitorEvent::Ended));
    }

    #[test]
    fn a_monitor_that_reads_nothing_does_not_stop_the_agent() {
        let (mut monitor, _theirs) = pair();
        let full = (0..1_000_000).find_map(|_| monitor.done(Reason::Suspend).err());
        assert_eq!(full, Some(WatchError::Gone));
        assert_eq!(monitor.event(), None);
    }
}
