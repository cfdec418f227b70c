//! An agent that runs already: whether one of ours answers on a socket, and its end (`-k`).
//!
//! Owns whom a signal may go to: the process that a pidfd was opened for before it answered on the socket, so never one
//! that has got a number anew. How a server is found, judged and greeted is the client crate's.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use kms_client::{Client, Options};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Pid, getuid},
};

use crate::{error::EndProblem, sys};

/// How long the agent may take to wipe and end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The agent of our own uid that answers on this socket.
pub(crate) fn at(socket: &Path) -> Option<u32> {
    let agent = connect(Some(socket.to_owned())).ok()?;
    agent.server_pid().filter(|_| agent.server_uid() == getuid().as_raw())
}

/// Ends the agent that `KMS_AGENT_PID` names, if it is the one that answers on the socket; gives its pid.
pub(crate) fn end(socket: Option<&Path>) -> Result<u32, EndProblem> {
    let named = std::env::var("KMS_AGENT_PID").map_err(|_| EndProblem::NoPid)?;
    let pid = named.parse().ok().filter(|pid| *pid > 0).ok_or(EndProblem::NotAPid)?;
    // First, so that it is the process that answers, or none any more.
    let process =
        sys::pidfd_open(Pid::from_raw(pid)).map_err(|source| EndProblem::NoProcess { pid, source })?;
    let agent = connect(socket.map(Path::to_owned)).map_err(EndProblem::Socket)?;
    let path = agent.socket().to_owned();
    let serves = agent.server_pid().ok_or_else(|| EndProblem::Hidden { socket: path.clone() })?;
    if u32::try_from(pid) != Ok(serves) {
        return Err(EndProblem::Another { socket: path, pid, serves });
    }
    drop(agent);
    sys::terminate(&process).map_err(|source| EndProblem::Signal { pid, source })?;
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], patience) {
        Ok(0) => Err(EndProblem::StillThere { pid }),
        Ok(_) => Ok(serves),
        Err(errno) => Err(EndProblem::Signal { pid, source: io::Error::from(errno) }),
    }
}

fn connect(socket: Option<PathBuf>) -> Result<Client, kms_client::Error> {
    Client::connect(&Options { socket, retry: Duration::ZERO, ..Options::default() })
}
