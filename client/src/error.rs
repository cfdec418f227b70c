//! What can go wrong between a caller and the agent. No error carries a secret, nor bytes that the peer chose.

use std::{io, path::PathBuf, time::Duration};

use kms_envelope::{ContextError, HeaderError};
use kms_protocol::{FrameError, Opcode, Status};
use thiserror::Error;

/// Why an operation was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// No socket is named, and there is none where an agent puts it.
    #[error("no agent was found")]
    NoAgent,
    /// The socket is named or there, but nobody answers on it.
    #[error("cannot reach the agent at {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else lies where the socket should be.
    #[error("{} is not a socket", socket.display())]
    NotASocket {
        /// The path.
        socket: PathBuf,
    },
    /// The socket or its directory belongs to somebody who is not trusted. Nothing was sent.
    #[error("{} belongs to uid {owner}, who is not trusted to serve", path.display())]
    UntrustedPlace {
        /// Socket or directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Everybody could put another socket in the place of this one. Nothing was sent.
    #[error("the directory {} can be changed by everybody", path.display())]
    WritableDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// Who serves the socket is not trusted. No request was sent.
    #[error("the server at {} runs as uid {uid}, who is not trusted to serve", socket.display())]
    UntrustedServer {
        /// The socket.
        socket: PathBuf,
        /// Who serves.
        uid: u32,
    },
    /// The kernel did not say who answered.
    #[error("the server at {} cannot be identified", socket.display())]
    UnidentifiedServer {
        /// The socket.
        socket: PathBuf,
    },
    /// The server closed the connection without an answer: to it we are nobody, or it has ended.
    #[error("the agent at {} closed the connection before its hello", socket.display())]
    ClosedBeforeHello {
        /// The socket.
        socket: PathBuf,
    },
    /// Something serves the socket, but does not answer as an agent does.
    #[error("what serves {} does not answer as an agent of this version does", socket.display())]
    NotAnAgent {
        /// The socket.
        socket: PathBuf,
        /// In which way.
        source: Box<Self>,
    },
    /// The agent said no.
    #[error("{}: {}", operation.name(), status.name())]
    Refused {
        /// What was asked.
        operation: Opcode,
        /// The answer.
        status: Status,
        /// With `busy`: when to ask again.
        retry_after: Duration,
    },
    /// The agent's answer is not one to this request. The connection cannot be used any more.
    #[error("the answer of the agent makes no sense")]
    Reply(#[from] ReplyError),
    /// No answer in time. The connection cannot be used any more.
    #[error("no answer within {} s", limit.as_secs())]
    Timeout {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The agent closed the connection.
    #[error("the agent closed the connection")]
    Closed,
    /// An earlier failure left the connection in the middle of an answer.
    #[error("the connection failed before")]
    Broken,
    /// The connection failed.
    #[error("the connection to the agent failed")]
    Connection(#[source] io::Error),
    /// The machine gives no random bytes.
    #[error("no random bytes")]
    Random,
    /// The pairs are not an encryption context.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// A request that no agent would take.
    #[error("the {what} is longer than {max} bytes")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Most bytes.
        max: usize,
    },
    /// The input does not begin as a ciphertext does.
    #[error(transparent)]
    NotACiphertext(#[from] HeaderError),
    /// Made by us, but not a ciphertext of data.
    #[error("this is a wrapped key or the tag of an input, not encrypted data")]
    NotData,
    /// Truncated, changed, or sealed with another context: one and the same failure.
    #[error("wrong encryption context, or truncated or changed ciphertext")]
    InvalidCiphertext,
    /// The input cannot be read.
    #[error("cannot read the input")]
    Input(#[source] io::Error),
    /// A file that was being read became shorter.
    #[error("the input became shorter while it was read")]
    InputChanged,
    /// The output cannot be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    /// Decryption failed after its first bytes were given out.
    #[error("{source}; the output that was already written is incomplete and must not be trusted")]
    Released {
        /// The failure.
        source: Box<Self>,
    },
    /// The machine refuses a thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl Error {
    /// The exit status of a command-line tool: 1 refused or failed, 2 no agent to reach or to trust, 3 locked, 75 try again.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoAgent
            | Self::Connect { .. }
            | Self::NotASocket { .. }
            | Self::UntrustedPlace { .. }
            | Self::WritableDirectory { .. }
            | Self::UntrustedServer { .. }
            | Self::UnidentifiedServer { .. }
            | Self::ClosedBeforeHello { .. }
            | Self::NotAnAgent { .. } => 2,
            Self::Refused { status, .. } => status.exit_code(),
            Self::Released { source } => source.exit_code(),
            Self::Reply(_)
            | Self::Timeout { .. }
            | Self::Closed
            | Self::Broken
            | Self::Connection(_)
            | Self::Random
            | Self::Context(_)
            | Self::TooLong { .. }
            | Self::NotACiphertext(_)
            | Self::NotData
            | Self::InvalidCiphertext
            | Self::Input(_)
            | Self::InputChanged
            | Self::Output(_)
            | Self::Thread(_) => 1,
        }
    }

    /// The same failure, for another request that it befell.
    pub(crate) fn again(&self) -> Self {
        let io = |error: &io::Error| {
            error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
        };
        match self {
            Self::NoAgent => Self::NoAgent,
            Self::Connect { socket, source } => Self::Connect { socket: socket.clone(), source: io(source) },
            Self::NotASocket { socket } => Self::NotASocket { socket: socket.clone() },
            Self::UntrustedPlace { path, owner } => {
                Self::UntrustedPlace { path: path.clone(), owner: *owner }
            }
            Self::WritableDirectory { path } => Self::WritableDirectory { path: path.clone() },
            Self::UntrustedServer { socket, uid } => {
                Self::UntrustedServer { socket: socket.clone(), uid: *uid }
            }
            Self::UnidentifiedServer { socket } => Self::UnidentifiedServer { socket: socket.clone() },
            Self::ClosedBeforeHello { socket } => Self::ClosedBeforeHello { socket: socket.clone() },
            Self::NotAnAgent { socket, source } => {
                Self::NotAnAgent { socket: socket.clone(), source: Box::new(source.again()) }
            }
            Self::Refused { operation, status, retry_after } => {
                Self::Refused { operation: *operation, status: *status, retry_after: *retry_after }
            }
            Self::Reply(error) => Self::Reply(*error),
            Self::Timeout { limit } => Self::Timeout { limit: *limit },
            Self::Connection(source) => Self::Connection(io(source)),
            Self::TooLong { what, max } => Self::TooLong { what, max: *max },
            Self::InvalidCiphertext => Self::InvalidCiphertext,
            Self::Closed => Self::Closed,
            // Nothing else befalls more than the one who is told.
            _ => Self::Broken,
        }
    }

    /// The answer of the agent, where it is what failed.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::Released { source } => source.status(),
            _ => None,
        }
    }
}

/// In which way an answer makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReplyError {
    /// The frame itself.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The answer to something that was not asked.
    #[error("the request id is not the one that was sent")]
    RequestId,
    /// A status outside the closed set.
    #[error("the status {0} is not known")]
    Status(u16),
    /// Fields of another shape, or a payload where none belongs.
    #[error("the fields or the payload do not have the form of this reply")]
    Shape,
    /// A version of the protocol that was not asked for.
    #[error("the protocol version {0} is not known")]
    Version(u16),
    /// Limits below what the protocol needs.
    #[error("the limits are too small to work with")]
    Limits,
    /// Pages that lead in a circle, or more rows than the counters can hold.
    #[error("the pages do not end")]
    Pages,
}
