//! The client of kms-agent: blocking, behind the feature `async` for tokio, and behind the feature `cli` the whole of `kmsctl`.
//!
//! Owns the way to the agent: where its socket is, whether who serves it is to be trusted, requests and replies
//! (`docs/protocol.md`), what is done when the connection breaks, and the pumps that move streams on all cores
//! (`docs/formats.md`, section 8). Nothing is sent before the server's uid is known and trusted, on every connection anew. It
//! never holds a key-encryption key, never decides who may do what, never releases a decrypted byte that was not authentic, and
//! never uses a connection that it inherited over a fork.

#[cfg(feature = "async")]
mod asynchronous;
mod batch;
#[cfg(feature = "cli")]
pub mod cli;
mod client;
mod connection;
mod error;
mod exchange;
mod items;
mod locate;
mod operations;
mod pipeline;
mod pump;
mod remote;
mod retry;
mod stream;
mod sys;
mod wire;

#[cfg(test)]
mod tests;

pub use kms_envelope::{ContextRef, DIGEST_LEN, EncryptionContext, Header, INPUT_TAG_LEN, KeyId, Purpose};
pub use kms_protocol::{
    Added, Bound, Constraint, Description, Exported, Fact, KeyName, KeyRef, KeyRow, KeyState, LockState,
    Opcode, OperationCount, Removed, RemovedAll, Renamed, Rotated, StatsReply, Status, StatusReply, Value,
    Verified, VersionRow, Welcome, constraint,
};
pub use kms_secret_memory::{Secret, SecretVec};

#[cfg(feature = "async")]
pub use crate::asynchronous::AsyncClient;
pub use crate::{
    batch::Batch,
    client::{Client, Keys, NewKey, Options},
    error::{Error, ReplyError},
    items::Item,
    operations::{DataKey, Moved},
    pipeline::Pipeline,
    remote::{RemoteOpening, RemoteSealing},
    stream::{Head, Input, LocalOpening, LocalSealing, Output, Progress},
};
