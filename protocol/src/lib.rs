//! Frames and messages of kms-agent.
//!
//! Owns the wire: the frame head, the codec of the fields, every request and reply, the statuses and the names of keys.
//! Implements `docs/protocol.md`. It never does I/O, never holds a key, and never decides who may do what.

#![forbid(unsafe_code)]

mod batch;
mod codec;
mod frame;
mod message;
mod types;

pub use batch::{BatchError, Items};
pub use codec::{Malformed, decode_fields, encoded_fields_len};
pub use frame::{
    FRAME_HEAD_LEN, Frame, FrameError, FrameHead, PayloadSlot, begin_frame, frame_len, push_frame,
};
pub use message::{
    Add, Added, Bind, Bound, Constraint, Describe, Description, Export, Exported, Fact, Hello, KeyAndContext,
    KeyRef, KeyRow, KeyState, List, Listed, LockState, Locking, Material, NewDataKey, NoFields, Opcode,
    OperationCount, Random, Refusal, RemoteChunks, RemoteStream, Remove, RemoveAll, Removed, RemovedAll,
    Rename, Renamed, Request, Rewrap, Rewrapped, Rotate, Rotated, StatsReply, StatusReply, Value, Verified,
    VersionRow, Welcome, constraint,
};
pub use types::{KeyName, LifetimeError, NameError, Status, parse_lifetime};

/// The version of the protocol that this crate speaks, raised by hand (`docs/protocol.md`, section 2).
pub const PROTOCOL_VERSION: u16 = 1;

//= docs/protocol.md#22-limits-and-what-ends-a-connection
//# a client MUST refuse one that is longer than 1,048,576 bytes.
/// Length of the largest frame, head included, in bytes; the default and the ceiling of `limits.frame`.
pub const FRAME_MAX: usize = 1024 * 1024;

/// Rows in one page of a listing, at most.
pub const PAGE_ROWS_MAX: usize = 256;

/// Length of the longest passphrase, in bytes.
pub const PASSPHRASE_MAX: usize = 1024;

/// Remote streams that one connection can hold open.
pub const REMOTE_STREAMS_MAX: usize = 16;

/// Items of one `batch`.
pub const BATCH_ITEMS_MAX: usize = 4096;

/// Numbers that one connection can bind.
pub const BINDINGS_MAX: usize = 1024;

/// Length of the longest data key, in bytes.
pub const DATA_KEY_MAX: usize = 1024;

/// Bytes of one `random`, at most.
pub const RANDOM_MAX: usize = 65_536;

/// Bytes of a request token.
pub const TOKEN_LEN: usize = 16;
