//! The listening socket that systemd hands over (`LISTEN_FDS`, sd_listen_fds(3)).
//!
//! Owns the look at what was given: it must be one listening Unix stream socket at a path in a folder that nobody else can
//! write to, as one of our own would be. Its file is systemd's: nothing is made, locked or taken away here.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        AddressFamily, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname, getsockopt,
        setsockopt, sockopt,
    },
};

use crate::{error::ActivationProblem, sys};

/// What systemd gave us; nothing when it started us without, or started somebody else with these variables.
pub(crate) fn take() -> Result<Option<(PathBuf, OwnedFd)>, ActivationProblem> {
    let mut given = sd_notify::listen_fds().map_err(ActivationProblem::Variables)?;
    let Some(first) = given.next() else { return Ok(None) };
    if given.len() > 0 {
        return Err(ActivationProblem::Many(given.len().saturating_add(1)));
    }
    let socket = sys::adopt(first);
    let path = bound_to(&socket)?;
    // As on our own listener: the sender of what waits in the backlog is to be known too.
    setsockopt(&socket, sockopt::PassCred, &true).map_err(ActivationProblem::Prepare)?;
    let flags = fcntl(&socket, FcntlArg::F_GETFL).map_err(ActivationProblem::Prepare)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(&socket, FcntlArg::F_SETFL(flags)).map_err(ActivationProblem::Prepare)?;
    Ok(Some((path, socket)))
}

/// The path of a listening Unix stream socket.
fn bound_to(socket: &OwnedFd) -> Result<PathBuf, ActivationProblem> {
    let listens = getsockopt(socket, sockopt::AcceptConn).map_err(|errno| match errno {
        Errno::ENOTSOCK => ActivationProblem::NotASocket,
        other => ActivationProblem::Prepare(other),
    })?;
    let address = getsockname::<SockaddrStorage>(socket.as_raw_fd()).map_err(ActivationProblem::Prepare)?;
    if address.family() != Some(AddressFamily::Unix) {
        return Err(ActivationProblem::NotUnix);
    }
    let kind = getsockopt(socket, sockopt::SockType).map_err(ActivationProblem::Prepare)?;
    if kind != SockType::Stream {
        return Err(ActivationProblem::NotAStream);
    }
    if !listens {
        return Err(ActivationProblem::NotListening);
    }
    // An abstract or unnamed one has no path; a relative one was bound in a folder that we do not know.
    let path = address.as_unix_addr().and_then(UnixAddr::path).map(Path::to_owned);
    path.filter(|path| path.is_absolute()).ok_or(ActivationProblem::NoPath)
}
