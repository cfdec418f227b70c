//! Standard input and output as a peer of the server (`--stdio`).
//!
//! Owns the bytes between them and one end of a socket pair, in small locked buffers that are wiped when they are empty. It
//! understands nothing of them, and changes no flag of a descriptor that it shares with whoever started the agent.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use kms_secret_memory::{LockedBuffer, Policy};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::socket::{MsgFlags, send},
    unistd::{read, write},
};

use crate::error::StartError;

/// Bytes under way, in each direction.
const BUFFER_LEN: usize = 16 * 1024;

/// A pipe that has room takes so much without making us wait: `PIPE_BUF` of Linux.
const PIECE_LEN: usize = 4096;

/// Moves requests in and replies out until the server has closed its end or nobody is there to read; the end of stdin is
/// passed on, and what was asked before is still answered.
pub(crate) fn pump(
    stdin: BorrowedFd<'_>,
    stdout: BorrowedFd<'_>,
    socket: &UnixStream,
    memory: Policy,
) -> Result<(), StartError> {
    let mut requests = Lane::new(memory)?;
    let mut replies = Lane::new(memory)?;
    while replies.is_open || !replies.is_empty() {
        let wanted = Moves {
            requests_in: requests.has_room(),
            requests_out: !requests.is_empty(),
            replies_in: replies.has_room(),
            replies_out: !replies.is_empty(),
        };
        let (ready, peer_gone) = wanted.wait(stdin, stdout, socket).map_err(failed)?;
        if peer_gone && !ready.replies_out {
            return Ok(());
        }
        if ready.requests_in {
            requests.fill(|room| read(stdin, room)).map_err(failed)?;
        }
        if ready.requests_out {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            if requests.drain(|bytes| send(socket.as_raw_fd(), bytes, flags)).is_err() {
                // The server takes no more; what it has answered so far still comes.
                requests.give_up();
            }
        }
        if requests.is_over() {
            requests.passed_on = true;
            // It may have closed its end.
            let _ = socket.shutdown(Shutdown::Write);
        }
        if ready.replies_in {
            let end = |errno| if errno == Errno::ECONNRESET { Ok(0) } else { Err(errno) };
            replies.fill(|room| read(socket, room).or_else(end)).map_err(failed)?;
        }
        if ready.replies_out {
            let piece = |bytes: &[u8]| write(stdout, bytes.get(..PIECE_LEN).unwrap_or(bytes));
            match replies.drain(piece) {
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
                done => done.map_err(failed)?,
            }
        }
    }
    Ok(())
}

fn failed(errno: Errno) -> StartError {
    StartError::Stdio(io::Error::from(errno))
}

/// What can be moved, or is to be.
struct Moves {
    requests_in: bool,
    requests_out: bool,
    replies_in: bool,
    replies_out: bool,
}

impl Moves {
    /// Waits for any of them, or for the end of whoever reads stdout, which the second value tells.
    fn wait(
        &self,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        socket: &UnixStream,
    ) -> Result<(Self, bool), Errno> {
        let wanted = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
        let of_socket =
            wanted(self.replies_in, PollFlags::POLLIN) | wanted(self.requests_out, PollFlags::POLLOUT);
        // The end of a peer is told unasked: a descriptor of which nothing is wanted now would wake us for nothing.
        let mut polled = vec![PollFd::new(stdout, wanted(self.replies_out, PollFlags::POLLOUT))];
        if !of_socket.is_empty() {
            polled.push(PollFd::new(socket.as_fd(), of_socket));
        }
        if self.requests_in {
            polled.push(PollFd::new(stdin, PollFlags::POLLIN));
        }
        match ppoll(&mut polled, None, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut told = polled.iter().map(|polled| polled.revents().unwrap_or(PollFlags::empty()));
        let mut next = |asked| if asked { told.next() } else { None }.unwrap_or(PollFlags::empty());
        let (out, socket, input) = (next(true), next(!of_socket.is_empty()), next(self.requests_in));
        let ends = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        let ready = Self {
            requests_in: !input.is_empty(),
            requests_out: self.requests_out && socket.intersects(PollFlags::POLLOUT | ends),
            replies_in: self.replies_in && socket.intersects(PollFlags::POLLIN | ends),
            replies_out: self.replies_out && !out.is_empty(),
        };
        Ok((ready, out.intersects(ends)))
    }
}

/// One direction.
struct Lane {
    buffer: LockedBuffer,
    start: usize,
    end: usize,
    /// More may come.
    is_open: bool,
    /// Its end was told to the other side.
    passed_on: bool,
}

impl Lane {
    fn new(memory: Policy) -> Result<Self, StartError> {
        let buffer = LockedBuffer::new(BUFFER_LEN, memory)?;
        Ok(Self { buffer, start: 0, end: 0, is_open: true, passed_on: false })
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn has_room(&self) -> bool {
        self.is_open && self.is_empty()
    }

    fn is_over(&self) -> bool {
        !self.is_open && self.is_empty() && !self.passed_on
    }

    /// Takes what has come; nothing is the end.
    fn fill(&mut self, take: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<(), Errno> {
        match take(self.buffer.expose_secret_mut()) {
            Ok(0) => self.is_open = false,
            Ok(got) => (self.start, self.end) = (0, got),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Gives away what fits there, and wipes when all is given.
    fn drain(&mut self, give: impl FnOnce(&[u8]) -> Result<usize, Errno>) -> Result<(), Errno> {
        match give(self.buffer.expose_secret().get(self.start..self.end).unwrap_or_default()) {
            Ok(given) => self.start = self.start.saturating_add(given).min(self.end),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        if self.is_empty() {
            self.buffer.wipe_range(0..self.end);
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.is_open = false;
        self.start = self.end;
        self.buffer.wipe();
    }
}
