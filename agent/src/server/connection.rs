//! One connection: its socket, what of it is held between two turns, and what it waits for.
//!
//! Owns the receive that names the sender, and the send. It judges nothing else.

use std::{
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        epoll::EpollFlags,
        socket::{ControlMessageOwned, MsgFlags, recvmsg, send},
    },
};

use super::pool::Held;
use crate::{authorize::Peer, core::Session};

/// The connection is over; nothing more is to be said.
pub(super) struct Closed;

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Its next request, or the rest of one that it has memory for.
    Request,
    /// The rest of a request that still lies in the socket; told once for each piece that comes.
    Rest,
    /// Memory for a frame of this length; the rest of it may come first, and then it needs none.
    Memory(usize),
    /// The peer, to read its replies; then it ends if this is true.
    Reader(bool),
    /// Work that is done elsewhere.
    Work,
}

impl Wait {
    /// What the kernel is to tell. The end of the peer it always tells.
    pub(super) fn events(self, holds_input: bool) -> EpollFlags {
        match self {
            Self::Request => EpollFlags::EPOLLIN,
            // What it holds can only go on with memory.
            Self::Memory(_) if holds_input => EpollFlags::empty(),
            Self::Rest | Self::Memory(_) => {
                EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET
            }
            Self::Reader(_) => EpollFlags::EPOLLOUT,
            Self::Work => EpollFlags::empty(),
        }
    }
}

/// Whether the last turn of a connection was too short for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    Light,
    /// It was; the next comes after those of others.
    Heavy,
    /// It waits for the next.
    Queued,
}

pub(super) struct Connection {
    socket: UnixStream,
    pub(super) peer: Peer,
    pub(super) session: Session,
    pub(super) wait: Wait,
    /// What the kernel was asked to tell.
    pub(super) events: EpollFlags,
    /// What has arrived and was not taken up: a part of a frame, or frames whose turn comes.
    pub(super) input: Option<Held>,
    /// Replies that the peer has not read yet.
    pub(super) output: Option<Held>,
    /// When it ends, unless what it waits for comes; since boot, like every time here.
    pub(super) deadline: Option<Duration>,
    /// Since when its replies have waited too long: it ends when somebody needs the memory.
    pub(super) overdue: Option<Duration>,
    pub(super) load: Load,
}

impl Connection {
    pub(super) fn new(socket: UnixStream, peer: Peer, session: Session) -> Self {
        Self {
            socket,
            peer,
            session,
            wait: Wait::Request,
            events: Wait::Request.events(false),
            input: None,
            output: None,
            deadline: None,
            overdue: None,
            load: Load::Light,
        }
    }

    /// One `send`, without a signal. 0 when the peer's buffer is full.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<usize, Closed> {
        loop {
            match send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(0),
                sent => return sent.map_err(|_| Closed),
            }
        }
    }

    /// Takes what has arrived, as far as there is room; see [`look`](Self::look).
    pub(super) fn receive(&self, room: &mut [u8]) -> Result<Option<usize>, Closed> {
        self.receive_as(room, MsgFlags::empty())
    }

    /// One `recvmsg` with room for the sender's credentials and nothing else, which leaves the bytes in the socket. `None`:
    /// nothing there. A sender of another uid, a message without credentials, or one that carried more than fits, ends the
    /// connection.
    pub(super) fn look(&self, room: &mut [u8]) -> Result<Option<usize>, Closed> {
        self.receive_as(room, MsgFlags::MSG_PEEK)
    }

    fn receive_as(&self, room: &mut [u8], flags: MsgFlags) -> Result<Option<usize>, Closed> {
        // One ucred in its control message: 16 bytes of head, 12 of credentials, aligned.
        let mut control = [0; 32];
        let mut buffers = [IoSliceMut::new(room)];
        let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut control), flags) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(_) => return Err(Closed),
                Ok(message) if message.bytes == 0 => return Err(Closed),
                Ok(message) => break message,
            }
        };
        let sender = message.cmsgs().ok().and_then(|mut messages| match messages.next() {
            Some(ControlMessageOwned::ScmCredentials(sender)) => Some(sender.uid()),
            _ => None,
        });
        let sender = sender.filter(|_| !message.flags.contains(MsgFlags::MSG_CTRUNC));
        //= docs/protocol.md#8-peers
        //# When a sender's uid is not the one that connected, or there are no credentials, the agent MUST end the
        //# connection without an answer.
        if sender != Some(self.peer.uid) {
            let uid = self.peer.uid;
            tracing::warn!(uid, sender, "closed a connection: a message was not its peer's own");
            return Err(Closed);
        }
        Ok(Some(message.bytes))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
