//! Why the agent does not start, and how a person is told.

use std::{io, path::PathBuf};

use kms_secret_memory::RegionError;
use nix::errno::Errno;
use thiserror::Error;

use crate::{config::ConfigError, crypto::CryptoError, sandbox::SandboxError};

/// What stops the start.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    #[error("cannot protect the process: {what}: {source}")]
    Protect { what: &'static str, source: Errno },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{path}: {problem}")]
    Socket { path: PathBuf, problem: SocketProblem },
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
    #[error("the folder of the socket is not a folder")]
    NotAFolder,
    #[error("the folder of the socket belongs to another user")]
    FolderOwner,
    #[error("others can write to the folder of the socket")]
    FolderOpen,
    #[error("there is no folder for the socket")]
    NoFolder,
}

impl StartError {
    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Socket { problem, .. } => match problem {
                SocketProblem::Served => Some("kmsctl ping asks it; another socket is named with -a PATH"),
                SocketProblem::Foreign => Some("move it away, or name another socket with -a PATH"),
                SocketProblem::TooLong => Some("name a shorter one with -a PATH"),
                SocketProblem::FolderOwner | SocketProblem::FolderOpen | SocketProblem::NotAFolder => {
                    Some("name a socket in a folder that only you can write to with -a PATH")
                }
                SocketProblem::NoFolder | SocketProblem::Io(_) => None,
            },
            Self::Memory(_) | Self::Crypto(CryptoError::Memory(_)) => {
                Some("raise RLIMIT_MEMLOCK (ulimit -l), or set secret_memory = \"preferred\" and accept swap")
            }
            Self::Sandbox(_) => Some("sandbox = \"preferred\" in the configuration starts without"),
            _ => None,
        }
    }

    pub(crate) fn report(&self) {
        report(&self.to_string(), self.hint());
    }
}

/// The one place that speaks to a person.
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
