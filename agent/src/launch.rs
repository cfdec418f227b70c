//! Which process becomes the agent: this one, one in the background, or one behind a command.
//!
//! Owns the last fork, which happens before any secret exists and before any thread, and the words on stdout that a
//! shell evaluates.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, getpid, pipe, setsid},
};

use crate::{
    args::Args,
    error::{StartError, report, tell},
    running,
    socket::Place,
    sys,
};

/// The command could not be run, or was not found, as a shell says it.
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// What this process is now.
pub(crate) enum Launched {
    /// The one that was called; it is done.
    Parent(ExitCode),
    /// The agent.
    Agent {
        /// To be told once clients can connect.
        ready: Ready,
        /// The process that it ends with.
        until: Option<Pid>,
    },
}

/// Who waits for the agent to be ready.
pub(crate) enum Ready {
    /// Nobody: a peer on stdin simply begins.
    Nobody,
    /// Nobody but the reader of stdout.
    Print(Vec<u8>),
    /// The process that was called.
    Tell {
        /// The pipe that it reads.
        waiting: File,
        /// What it is told: the pid of the agent.
        pid: u32,
        /// What takes the place of the terminal; later the agent could not open it.
        null: File,
    },
}

impl Ready {
    /// Leaves the terminal that the agent was started on, where it goes to the background; nothing can be said there afterwards.
    /// Gives what was stderr, as long as something may still have to be.
    pub(crate) fn leave_terminal(&self) -> Result<Option<OwnedFd>, StartError> {
        match self {
            Self::Nobody | Self::Print(_) => Ok(None),
            Self::Tell { null, .. } => leave_terminal(null).map(Some).map_err(StartError::Background),
        }
    }

    /// Tells that clients can connect.
    pub(crate) fn tell(self) -> Result<(), StartError> {
        match self {
            Self::Nobody => Ok(()),
            Self::Print(words) => print(&words).map_err(StartError::Background),
            Self::Tell { mut waiting, pid, .. } => {
                waiting.write_all(&pid.to_le_bytes()).map_err(StartError::Background)
            }
        }
    }
}

/// Forks where that is asked for.
pub(crate) fn launch(args: &Args, place: Option<&Place>) -> Result<Launched, StartError> {
    let Some(place) = place else {
        // A peer on stdin and stdout: all that was inherited and is meant for us.
        sys::close_inherited(None).map_err(StartError::Background)?;
        return Ok(Launched::Agent { ready: Ready::Nobody, until: None });
    };
    if args.foreground {
        sys::close_inherited(place.given()).map_err(StartError::Background)?;
        let words = args.shell().set(place.path(), std::process::id());
        return Ok(Launched::Agent { ready: Ready::Print(words), until: None });
    }
    if args.command.is_empty()
        && let Some(pid) = running::at(place.path())
    {
        tell(&format!("an agent serves {} already: process {pid}", place.path().display()));
        return Ok(Launched::Parent(print_or_fail(&args.shell().set(place.path(), pid))));
    }
    let caller = getpid();
    let (waits, tells) = pipe().map_err(|error| StartError::Background(error.into()))?;
    match sys::fork().map_err(StartError::Background)? {
        ForkResult::Child => {
            drop(waits);
            // The agent is nobody's child: a command that waits for all its children must not wait for it.
            setsid().map_err(|error| StartError::Background(error.into()))?;
            match sys::fork().map_err(StartError::Background)? {
                ForkResult::Parent { .. } => Ok(Launched::Parent(ExitCode::SUCCESS)),
                ForkResult::Child => {
                    // What the caller had open stays with it and with the command.
                    sys::close_inherited(Some(tells.as_fd())).map_err(StartError::Background)?;
                    chdir("/").map_err(|error| StartError::Background(error.into()))?;
                    let until = (!args.command.is_empty()).then_some(caller);
                    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
                    let null = null.map_err(StartError::Background)?;
                    let ready = Ready::Tell { waiting: File::from(tells), pid: std::process::id(), null };
                    Ok(Launched::Agent { ready, until })
                }
            }
        }
        ForkResult::Parent { child } => {
            drop(tells);
            // Its end is all that is waited for; why the agent did not come to be stands on stderr.
            let _ = waitpid(child, None);
            let mut pid = [0; 4];
            if File::from(waits).read_exact(&mut pid).is_err() {
                place.abandon();
                return Ok(Launched::Parent(ExitCode::FAILURE));
            }
            let agent = u32::from_le_bytes(pid);
            Ok(Launched::Parent(match args.command.split_first() {
                None => print_or_fail(&args.shell().set(place.path(), agent)),
                Some((command, rest)) => run(command, rest, place.path(), agent),
            }))
        }
    }
}

/// Becomes the command; comes back only when that failed.
fn run(command: &OsStr, arguments: &[std::ffi::OsString], socket: &Path, agent: u32) -> ExitCode {
    let error = Command::new(command)
        .args(arguments)
        .env("KMS_AUTH_SOCK", socket)
        .env("KMS_AGENT_PID", agent.to_string())
        .exec();
    report(&format!("cannot run the command: {error}"), None);
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN })
}

/// Ends the agent that runs (`-k`).
pub(crate) fn end(args: &Args) -> Result<ExitCode, StartError> {
    let pid = running::end(args.socket.as_deref())?;
    tell(&format!("process {pid} has ended"));
    Ok(print_or_fail(&args.shell().unset()))
}

fn print_or_fail(words: &[u8]) -> ExitCode {
    if print(words).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(words: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(words)?;
    stdout.flush()
}

/// Nothing of the terminal that the agent was started on stays with it, but the old stderr, which is given.
fn leave_terminal(null: &File) -> io::Result<OwnedFd> {
    let stderr = io::stderr().as_fd().try_clone_to_owned()?;
    dup2_stdin(null)?;
    dup2_stdout(null)?;
    dup2_stderr(null)?;
    Ok(stderr)
}
