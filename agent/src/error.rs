//! Why the agent does not start, and how a person is told.

use std::{error::Error as _, io, path::PathBuf};

use kms_secret_memory::RegionError;
use nix::errno::Errno;
use thiserror::Error;

use crate::{
    config::{ConfigError, LockOn},
    crypto::CryptoError,
    monitor::WatchError,
    sandbox::SandboxError,
};

/// What stops the start.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    #[error("cannot protect the process: {what}: {source}")]
    Protect { what: &'static str, source: Errno },
    #[error(
        "uid {0} stands for every user whom this user namespace does not know; nobody can be served as it"
    )]
    OverflowUid(u32),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {problem}", path.display())]
    Socket { path: PathBuf, problem: SocketProblem },
    #[error("the socket from systemd: {0}")]
    Activation(#[from] ActivationProblem),
    #[error("no agent was ended: {0}")]
    End(#[from] EndProblem),
    #[error("cannot take secret memory: {0}")]
    Memory(#[from] RegionError),
    #[error("cannot shield keys: {0}")]
    Crypto(#[from] CryptoError),
    #[error("the sandbox is required: {0}")]
    Sandbox(#[from] SandboxError),
    #[error("cannot find out about the user namespace: {0}")]
    Namespace(io::Error),
    #[error("cannot reach the service manager at NOTIFY_SOCKET: {0}")]
    Service(io::Error),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("the agent ended by a fault of its own")]
    Panicked,
    #[error("cannot go to the background: {0}")]
    Background(io::Error),
    #[error("cannot watch the command: {0}")]
    Command(io::Error),
    #[error("cannot serve standard input and output: {0}")]
    Stdio(io::Error),
    #[error("cannot start the monitor: {0}")]
    Monitor(io::Error),
    #[error("cannot lock on {on}: {source}")]
    Watch { on: LockOn, source: WatchError },
    #[error("the monitor has ended: nothing would lock on {on}")]
    Unwatched { on: LockOn },
}

/// What is wrong with the place of the socket.
#[derive(Debug, Error)]
pub(crate) enum SocketProblem {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the path of a socket has at most 107 bytes")]
    TooLong,
    #[error("an agent serves this socket already")]
    Served,
    #[error("there is something that is not a stale socket of ours")]
    Foreign,
    #[error("a relative path, and the working directory cannot be had: {0}")]
    WorkingFolder(io::Error),
    #[error("the path names no socket")]
    NoName,
    #[error("the path of a socket has no control characters")]
    ControlCharacter,
    #[error("cannot look at {}: {source}", path.display())]
    Look { path: PathBuf, source: io::Error },
    #[error("{} is not a folder", .0.display())]
    NotAFolder(PathBuf),
    #[error("{} belongs to another user, uid {owner}", path.display())]
    Owner { path: PathBuf, owner: u32 },
    #[error("others can write to the folder {}", .0.display())]
    Open(PathBuf),
    #[error("the path leads through more than 40 symlinks")]
    TooManyLinks,
}

/// What is wrong with what systemd handed over, or seems to have.
#[derive(Debug, Error)]
pub(crate) enum ActivationProblem {
    #[error("LISTEN_PID and LISTEN_FDS promise what is not there: {0}")]
    Variables(io::Error),
    #[error("there are {0} descriptors, and an agent has one socket")]
    Many(usize),
    #[error("the descriptor is not a socket")]
    NotASocket,
    #[error("it is not a Unix socket")]
    NotUnix,
    #[error("it is not a stream socket")]
    NotAStream,
    #[error("it does not listen")]
    NotListening,
    #[error("it is not bound to an absolute path")]
    NoPath,
    #[error("its path is its own: there is no -a beside it")]
    Named,
    #[error("it cannot be prepared: {0}")]
    Prepare(Errno),
}

/// Why `-k` has ended nothing.
#[derive(Debug, Error)]
pub(crate) enum EndProblem {
    #[error("KMS_AGENT_PID is not set")]
    NoPid,
    #[error("KMS_AGENT_PID is not the number of a process")]
    NotAPid,
    #[error("there is no process {pid}: {source}")]
    NoProcess { pid: i32, source: io::Error },
    #[error("{}", with_causes(.0))]
    Socket(kms_client::Error),
    #[error("{} is served from another pid namespace", socket.display())]
    Hidden { socket: PathBuf },
    #[error("{} is served by process {serves}, and KMS_AGENT_PID is {pid}", socket.display())]
    Another { socket: PathBuf, pid: i32, serves: u32 },
    #[error("process {pid} cannot be told to end: {source}")]
    Signal { pid: i32, source: io::Error },
    #[error("process {pid} was told to end 10 s ago, and has not")]
    StillThere { pid: i32 },
}

/// The client's errors leave the cause to their source.
fn with_causes(error: &kms_client::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl StartError {
    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Socket { problem, .. } => match problem {
                SocketProblem::Served => Some("kmsctl ping asks it; another socket is named with -a PATH"),
                SocketProblem::Foreign => Some("move it away, or name another socket with -a PATH"),
                SocketProblem::TooLong => Some("name a shorter one with -a PATH"),
                SocketProblem::Owner { .. } | SocketProblem::Open(_) | SocketProblem::NotAFolder(_) => Some(
                    "name a socket with -a PATH in a folder that only you and root can write to or exchange for another",
                ),
                _ => None,
            },
            Self::End(EndProblem::NoPid) => Some("eval what the agent printed, or end it by its unit"),
            Self::Memory(_) | Self::Crypto(CryptoError::Memory(_)) => {
                Some("raise RLIMIT_MEMLOCK (ulimit -l), or set secret_memory = \"preferred\" and accept swap")
            }
            Self::Sandbox(_) => Some("sandbox = \"preferred\" in the configuration starts without"),
            Self::OverflowUid(_) => Some("run it under a uid of its own; in a user namespace that maps one"),
            Self::Watch { source: WatchError::NoInhibitor, .. } => Some(
                "a user may delay sleep where polkit lets him (Debian package polkitd); without it take \"sleep\" out of lock_on",
            ),
            Self::Watch { .. } => Some(
                "lock_on needs D-Bus and systemd-logind (or elogind); without them take it out of the configuration",
            ),
            _ => None,
        }
    }

    pub(crate) fn report(&self) {
        report(&self.to_string(), self.hint());
    }
}

/// Says what was done where that is not what one expects.
pub(crate) fn tell(text: &str) {
    use std::io::Write;
    let _ = writeln!(io::stderr().lock(), "kms-agent: {text}");
}

/// The one place that speaks of an error to a person.
pub(crate) fn report(error: &str, hint: Option<&str>) {
    // Nothing can be done for a person whose terminal is gone.
    let _ = write_report(error, hint);
}

fn write_report(error: &str, hint: Option<&str>) -> io::Result<()> {
    use std::io::Write;
    let mut stderr = io::stderr().lock();
    writeln!(stderr, "kms-agent: error: {error}")?;
    if let Some(hint) = hint {
        writeln!(stderr, "kms-agent: hint: {hint}")?;
    }
    Ok(())
}
