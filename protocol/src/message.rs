//! Every request and every reply (`docs/protocol.md`, sections 4 and 5).
//!
//! `Request` is closed: a new operation does not compile until the agent has decided who may use it. A message that was
//! shipped never changes; a new shape is a new opcode. Messages that can carry a secret have no `Debug`.

use bincode::{BorrowDecode, Decode, Encode};

use crate::{
    TOKEN_LEN,
    codec::{Malformed, decode_fields},
    frame::Frame,
};

macro_rules! opcodes {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal;)*) => {
        /// What a request asks for (`docs/protocol.md`, section 4).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Opcode { $($(#[$doc])* $variant = $code,)* }

        impl Opcode {
            /// Every opcode of this release.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            #[must_use]
            pub fn code(self) -> u16 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The opcode with this number.
            #[must_use]
            pub fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// The name in `docs/protocol.md`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

opcodes! {
    /// The first request of a connection.
    Hello = 0x0001, "hello";
    /// Is somebody there?
    Ping = 0x0002, "ping";
    /// The state of the agent.
    Status = 0x0003, "status";
    /// Takes every key out of reach until `unlock`.
    Lock = 0x0004, "lock";
    /// Ends the lock.
    Unlock = 0x0005, "unlock";
    /// Makes or imports a key.
    Add = 0x0010, "add";
    /// A page of keys.
    List = 0x0011, "list";
    /// One key and a page of its versions.
    Describe = 0x0012, "describe";
    /// Takes a key away.
    Remove = 0x0013, "remove";
    /// Adds a version to a key and makes it primary.
    Rotate = 0x0014, "rotate";
    /// Gives a key another name.
    Rename = 0x001B, "rename";
    /// The bytes of a key that was added to be exportable.
    Export = 0x001D, "export";
    /// Takes every key away that lives in memory only.
    RemoveAll = 0x001E, "remove-all";
    /// Seals a message.
    Encrypt = 0x0020, "encrypt";
    /// Opens a message.
    Decrypt = 0x0021, "decrypt";
    /// A new stream that the client encrypts.
    StreamNew = 0x0022, "stream-new";
    /// The key of a stream that the client decrypts.
    StreamOpen = 0x0023, "stream-open";
    /// A new stream that the agent encrypts.
    RemoteStreamNew = 0x0024, "remote-stream-new";
    /// A stream that the agent decrypts.
    RemoteStreamOpen = 0x0025, "remote-stream-open";
    /// The next chunks of a stream that the agent encrypts.
    RemoteStreamEncrypt = 0x0026, "remote-stream-encrypt";
    /// Chunks of a stream that the agent decrypts.
    RemoteStreamDecrypt = 0x0027, "remote-stream-decrypt";
    /// Ends a stream.
    RemoteStreamClose = 0x0028, "remote-stream-close";
    /// Seals a key of the caller's.
    Wrap = 0x0029, "wrap";
    /// Opens a wrapped key.
    Unwrap = 0x002A, "unwrap";
    /// A new data key, plain and wrapped.
    DataKey = 0x002B, "datakey";
    /// A new data key, wrapped only.
    DataKeyWrapped = 0x002C, "datakey-wrapped";
    /// Moves a ciphertext to the primary version, or to another key.
    Rewrap = 0x002D, "rewrap";
    /// Whether a ciphertext opens, without its content.
    Verify = 0x002E, "verify";
    /// A keyed hash.
    Mac = 0x002F, "mac";
    /// Random bytes.
    Random = 0x0030, "random";
    /// Gives a key a number on this connection.
    Bind = 0x0031, "bind";
    /// Many requests in one.
    Batch = 0x0032, "batch";
    /// Whether a keyed hash is that of an input.
    MacVerify = 0x0033, "mac-verify";
    /// Counters.
    Stats = 0x0050, "stats";
}

//= docs/protocol.md#23-encoding-of-fields
//# A message without fields has a fields length of 0.
/// A message without fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct NoFields {}

/// `hello`: the version that the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u16,
}

/// The reply to `hello`: what this agent speaks and takes. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version that the connection now speaks.
    pub version: u16,
    /// Longest frame, head included.
    pub frame_max: u32,
    /// Longest message or wrapped key, in plaintext.
    pub message_max: u32,
    /// Longest encryption context, in its canonical form.
    pub context_max: u32,
    /// Most pairs of an encryption context.
    pub context_pairs_max: u32,
    /// Most requests without an answer on one connection.
    pub in_flight_max: u32,
    /// Most rows of a page.
    pub page_rows_max: u32,
    /// Most remote streams open on one connection.
    pub remote_streams_max: u32,
    /// The opcodes that are answered.
    pub opcodes: Vec<u16>,
    /// The kinds of constraint that `add` takes.
    pub constraints: Vec<u32>,
    /// Bits for what opcodes cannot tell; none is given out yet.
    pub features: u64,
}

//= docs/protocol.md#52-refusal
//# The fields of every reply whose status is not `ok`, whatever was asked. There is no payload.
/// The fields of every reply whose status is not `ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Refusal {
    /// With `busy`: when to ask again, in milliseconds. Else 0.
    pub retry_after_ms: u32,
}

/// Which key is meant.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum KeyRef<'a> {
    /// By its name.
    Name(&'a str),
    /// By its id.
    Id([u8; 16]),
    /// By the number that it was bound to on this connection.
    Bound(u32),
}

/// The fields of every request that uses a key on data.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct KeyAndContext<'a> {
    /// The key.
    pub key: KeyRef<'a>,
    /// The canonical bytes of the encryption context (`docs/formats.md`).
    pub context: &'a [u8],
}

/// Where the bytes of a new key come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Material {
    /// The agent's random generator; the payload is empty.
    Generate,
    /// The payload, 32 bytes.
    Import,
}

//= docs/protocol.md#constraint
//# A kind that the agent does not take (the reply to `hello` lists those that it takes) refuses the whole
//# request with `unsupported`.
/// A restriction that a key is added with. An unknown kind refuses the whole request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Constraint {
    /// One of [`constraint`].
    pub kind: u32,
    /// What it means is the kind's.
    pub value: u64,
}

/// The kinds of [`Constraint`].
pub mod constraint {
    /// The key is never written to disk; the value is 0.
    pub const MEMORY_ONLY: u32 = 1;
    /// The key goes after so many seconds, suspend included.
    pub const LIFETIME: u32 = 2;
    /// A person is asked before each use; the value is 0.
    pub const CONFIRM: u32 = 3;
    /// The key can be used so many times.
    pub const MAX_USES: u32 = 4;
    /// The bytes of the key can be had with `export`; the value is 0.
    pub const EXPORTABLE: u32 = 5;
    /// Every kind that this release takes.
    pub const ALL: &[u32] = &[MEMORY_ONLY, LIFETIME, CONFIRM, MAX_USES, EXPORTABLE];
}

/// `add`; the payload is the key when it is imported.
#[derive(Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Add<'a> {
    /// Random; a repeat of it is answered with the first result.
    pub token: [u8; TOKEN_LEN],
    /// The name of the new key.
    pub name: &'a str,
    /// Generated or imported.
    pub material: Material,
    /// A key of that name is the answer, not an error.
    pub if_missing: bool,
    /// How the key is restricted.
    pub constraints: Vec<Constraint>,
}

/// The reply to `add`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Added {
    /// The id of the key.
    pub id: [u8; 16],
    /// Its primary version.
    pub version: u32,
    /// The check value of that version.
    pub check_value: [u8; 8],
    /// False when the key was there already.
    pub created: bool,
}

/// `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct List {
    /// 0, or `next` of the page before.
    pub cursor: u64,
}

/// The reply to `list`. A key that is there from the first page to the last is listed once.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Listed {
    /// In no promised order.
    pub keys: Vec<KeyRow>,
    /// The cursor of the next page, 0 after the last.
    pub next: u64,
}

//= docs/protocol.md#keystate
//# This release sends `enabled` alone; a client MUST know the others now.
/// What a key or a version can be used for; closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KeyState {
    /// Everything.
    Enabled,
    /// A version that opens, but nothing new is done under it.
    Staged,
    /// Nothing, until it is enabled.
    Disabled,
    /// A key that waits to be restored or to go.
    Removed,
    /// A version of which the number is left.
    Destroyed,
}

/// A key in a listing.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KeyRow {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: [u8; 16],
    /// Never on disk.
    pub memory_only: bool,
    /// What it can be used for.
    pub state: KeyState,
    /// The version that new work is done under.
    pub primary: u32,
    /// The lowest version that opens anything.
    pub minimum: u32,
    /// Number of versions.
    pub versions: u32,
    /// The check value of the primary version.
    pub check_value: [u8; 8],
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Seconds until it expires.
    pub expires_in: Option<u64>,
    /// How often it was used.
    pub uses: u64,
}

/// `describe`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Describe<'a> {
    /// The key.
    pub key: KeyRef<'a>,
    /// Versions above this one are described; 0 for all.
    pub versions_after: u32,
}

/// The reply to `describe`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Description {
    /// As in a listing.
    pub key: KeyRow,
    /// Its versions, in ascending order.
    pub versions: Vec<VersionRow>,
    /// There are versions above the last one here.
    pub more: bool,
    /// What it was added with.
    pub constraints: Vec<Constraint>,
}

/// A version of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct VersionRow {
    /// Its number.
    pub version: u32,
    /// What it can be used for.
    pub state: KeyState,
    /// Its check value.
    pub check_value: [u8; 8],
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// How often it was used.
    pub uses: u64,
}

/// `remove`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Remove<'a> {
    /// Random; a repeat of it is answered with the first result.
    pub token: [u8; TOKEN_LEN],
    /// The key.
    pub key: KeyRef<'a>,
}

/// The reply to `remove`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Removed {
    /// The id of the key that is gone.
    pub id: [u8; 16],
}

/// `rotate`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Rotate<'a> {
    /// Random; a repeat of it is answered with the first result.
    pub token: [u8; TOKEN_LEN],
    /// The key.
    pub key: KeyRef<'a>,
}

/// The reply to `rotate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Rotated {
    /// The id of the key.
    pub id: [u8; 16],
    /// The version that is primary now.
    pub version: u32,
    /// Its check value.
    pub check_value: [u8; 8],
}

/// `rename`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Rename<'a> {
    /// Random; a repeat of it is answered with the first result.
    pub token: [u8; TOKEN_LEN],
    /// The key.
    pub key: KeyRef<'a>,
    /// The name that it gets.
    pub name: &'a str,
}

/// The reply to `rename`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Renamed {
    /// The id of the key, which stays.
    pub id: [u8; 16],
}

/// `remove-all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RemoveAll {
    /// Random; a repeat of it is answered with the first result.
    pub token: [u8; TOKEN_LEN],
}

/// The reply to `remove-all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RemovedAll {
    /// Number of keys that are gone.
    pub keys: u64,
}

/// `export`; the payload is the passphrase of the last lock, where there was one.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Export<'a> {
    /// The key.
    pub key: KeyRef<'a>,
    /// The version, 0 for the primary one.
    pub version: u32,
}

/// The reply to `export`; the payload is the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Exported {
    /// The id of the key.
    pub id: [u8; 16],
    /// The version that the payload is.
    pub version: u32,
}

/// `datakey` and `datakey-wrapped`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct NewDataKey<'a> {
    /// The key that wraps it.
    pub key: KeyRef<'a>,
    /// The canonical bytes of the encryption context (`docs/formats.md`).
    pub context: &'a [u8],
    /// Length of the data key, in bytes.
    pub length: u32,
}

/// `rewrap`; the payload is a ciphertext, or the first 132 bytes of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Rewrap<'a> {
    /// The key that the ciphertext is under.
    pub key: KeyRef<'a>,
    /// The canonical bytes of the encryption context (`docs/formats.md`); of a stream none.
    pub context: &'a [u8],
    /// The key that it is to be under; nothing for the same one.
    pub to: Option<KeyRef<'a>>,
}

/// The reply to `rewrap`; the payload is what takes the place of the request's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Rewrapped {
    /// False when the ciphertext was under that version already; there is no payload then.
    pub changed: bool,
    /// The id of the key that it is under.
    pub id: [u8; 16],
    /// The version of the key that it is under.
    pub version: u32,
}

/// The reply to `verify`: what the ciphertext is under.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Verified {
    /// The id of the key.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// The version that opens the ciphertext.
    pub version: u32,
    /// The version that is primary now.
    pub primary: u32,
}

/// `random`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Random {
    /// Number of bytes.
    pub length: u32,
}

/// `bind`.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Bind<'a> {
    /// The number that stands for the key on this connection.
    pub number: u32,
    /// The key.
    pub key: KeyRef<'a>,
}

/// The reply to `bind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Bound {
    /// The id of the key.
    pub id: [u8; 16],
}

/// The reply to `stats`. Counts are since the start.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct StatsReply {
    /// Milliseconds since the start, suspend included.
    pub uptime_ms: u64,
    /// One row for each pair of operation and status that came about.
    pub operations: Vec<OperationCount>,
    /// Named counters and gauges.
    pub values: Vec<Value>,
}

/// How often an operation ended with a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct OperationCount {
    /// The opcode; 0 for frames without one that the agent has.
    pub opcode: u16,
    /// The status.
    pub status: u16,
    /// How often.
    pub count: u64,
}

/// A named number.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// The number.
    pub value: u64,
}

/// The replies to `lock` and `unlock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Locking {
    /// False when the agent was in that state already, and nothing was done.
    pub changed: bool,
}

/// The reply to `remote-stream-new` and `remote-stream-open`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RemoteStream {
    /// The number of the stream on this connection.
    pub stream: u32,
}

/// `remote-stream-decrypt`; the payload is sealed chunks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RemoteChunks {
    /// The number of the stream on this connection.
    pub stream: u32,
    /// The number of the first chunk.
    pub first: u64,
}

/// Locked or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum LockState {
    /// Keys can be used.
    Unlocked,
    /// Only `unlock` helps.
    Locked,
}

/// The reply to `status`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct StatusReply {
    /// Locked or not.
    pub state: LockState,
    /// Named facts; a client shows those that it does not know.
    pub facts: Vec<Fact>,
}

//= docs/protocol.md#53-facts-of-status
//# A client MUST show facts that it does not know, and MUST NOT fail for one that is missing.
/// One fact of a [`StatusReply`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Fact {
    /// Its name (`docs/protocol.md`, section 5.3).
    pub name: String,
    /// Its value, as text.
    pub value: String,
}

/// A request, borrowed from its frame.
pub enum Request<'a> {
    /// See [`Opcode::Hello`].
    Hello(Hello),
    /// See [`Opcode::Ping`].
    Ping,
    /// See [`Opcode::Status`].
    Status,
    /// See [`Opcode::Lock`].
    Lock {
        /// 1 to 1,024 bytes.
        passphrase: &'a [u8],
    },
    /// See [`Opcode::Unlock`].
    Unlock {
        /// The one that `lock` was given.
        passphrase: &'a [u8],
    },
    /// See [`Opcode::Add`].
    Add {
        /// The fields.
        fields: Add<'a>,
        /// The imported key, or nothing.
        material: &'a [u8],
    },
    /// See [`Opcode::List`].
    List(List),
    /// See [`Opcode::Describe`].
    Describe(Describe<'a>),
    /// See [`Opcode::Remove`].
    Remove(Remove<'a>),
    /// See [`Opcode::Encrypt`].
    Encrypt {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// What to seal.
        plaintext: &'a [u8],
    },
    /// See [`Opcode::Decrypt`].
    Decrypt {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// What to open.
        ciphertext: &'a [u8],
    },
    /// See [`Opcode::StreamNew`].
    StreamNew(KeyAndContext<'a>),
    /// See [`Opcode::StreamOpen`].
    StreamOpen {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// The first 188 bytes of the stream.
        head: &'a [u8],
    },
    /// See [`Opcode::RemoteStreamNew`].
    RemoteStreamNew(KeyAndContext<'a>),
    /// See [`Opcode::RemoteStreamOpen`].
    RemoteStreamOpen {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// The first 188 bytes of the stream.
        head: &'a [u8],
    },
    /// See [`Opcode::RemoteStreamEncrypt`].
    RemoteStreamEncrypt {
        /// The number of the stream.
        stream: u32,
        /// Whole chunks; a short or empty last one ends the stream.
        plaintext: &'a [u8],
    },
    /// See [`Opcode::RemoteStreamDecrypt`].
    RemoteStreamDecrypt {
        /// Stream and first chunk.
        fields: RemoteChunks,
        /// Sealed chunks in a row.
        chunks: &'a [u8],
    },
    /// See [`Opcode::RemoteStreamClose`].
    RemoteStreamClose(RemoteStream),
    /// See [`Opcode::Rotate`].
    Rotate(Rotate<'a>),
    /// See [`Opcode::Rename`].
    Rename(Rename<'a>),
    /// See [`Opcode::RemoveAll`].
    RemoveAll(RemoveAll),
    /// See [`Opcode::Export`].
    Export {
        /// Key and version.
        fields: Export<'a>,
        /// The passphrase of the last lock, or nothing.
        passphrase: &'a [u8],
    },
    /// See [`Opcode::Wrap`].
    Wrap {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// The key to seal.
        plaintext: &'a [u8],
    },
    /// See [`Opcode::Unwrap`].
    Unwrap {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// The wrapped key.
        ciphertext: &'a [u8],
    },
    /// See [`Opcode::DataKey`].
    DataKey(NewDataKey<'a>),
    /// See [`Opcode::DataKeyWrapped`].
    DataKeyWrapped(NewDataKey<'a>),
    /// See [`Opcode::Rewrap`].
    Rewrap {
        /// From what key to which, and the context.
        fields: Rewrap<'a>,
        /// A ciphertext, or the first 132 bytes of a stream.
        ciphertext: &'a [u8],
    },
    /// See [`Opcode::Verify`].
    Verify {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// A ciphertext, or the head of a stream.
        ciphertext: &'a [u8],
    },
    /// See [`Opcode::Mac`].
    Mac {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// SHA-512 of the input.
        digest: &'a [u8],
    },
    /// See [`Opcode::MacVerify`].
    MacVerify {
        /// Key and context.
        fields: KeyAndContext<'a>,
        /// The tag, and behind it SHA-512 of the input.
        tag_and_digest: &'a [u8],
    },
    /// See [`Opcode::Random`].
    Random(Random),
    /// See [`Opcode::Bind`].
    Bind(Bind<'a>),
    /// See [`Opcode::Batch`].
    Batch {
        /// Whole frames, one after the other.
        frames: &'a [u8],
    },
    /// See [`Opcode::Stats`].
    Stats,
}

impl<'a> Request<'a> {
    /// What it asks for.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        match self {
            Self::Hello(_) => Opcode::Hello,
            Self::Ping => Opcode::Ping,
            Self::Status => Opcode::Status,
            Self::Lock { .. } => Opcode::Lock,
            Self::Unlock { .. } => Opcode::Unlock,
            Self::Add { .. } => Opcode::Add,
            Self::List(_) => Opcode::List,
            Self::Describe(_) => Opcode::Describe,
            Self::Remove(_) => Opcode::Remove,
            Self::Rotate(_) => Opcode::Rotate,
            Self::Rename(_) => Opcode::Rename,
            Self::Export { .. } => Opcode::Export,
            Self::RemoveAll(_) => Opcode::RemoveAll,
            Self::Encrypt { .. } => Opcode::Encrypt,
            Self::Decrypt { .. } => Opcode::Decrypt,
            Self::StreamNew(_) => Opcode::StreamNew,
            Self::StreamOpen { .. } => Opcode::StreamOpen,
            Self::RemoteStreamNew(_) => Opcode::RemoteStreamNew,
            Self::RemoteStreamOpen { .. } => Opcode::RemoteStreamOpen,
            Self::RemoteStreamEncrypt { .. } => Opcode::RemoteStreamEncrypt,
            Self::RemoteStreamDecrypt { .. } => Opcode::RemoteStreamDecrypt,
            Self::RemoteStreamClose(_) => Opcode::RemoteStreamClose,
            Self::Wrap { .. } => Opcode::Wrap,
            Self::Unwrap { .. } => Opcode::Unwrap,
            Self::DataKey(_) => Opcode::DataKey,
            Self::DataKeyWrapped(_) => Opcode::DataKeyWrapped,
            Self::Rewrap { .. } => Opcode::Rewrap,
            Self::Verify { .. } => Opcode::Verify,
            Self::Mac { .. } => Opcode::Mac,
            Self::MacVerify { .. } => Opcode::MacVerify,
            Self::Random(_) => Opcode::Random,
            Self::Bind(_) => Opcode::Bind,
            Self::Batch { .. } => Opcode::Batch,
            Self::Stats => Opcode::Stats,
        }
    }

    /// Decodes the request in `frame`, whose opcode is known. Nothing may be left over: a request that has no payload is
    /// refused with one.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(opcode: Opcode, frame: &Frame<'a>) -> Result<Self, Malformed> {
        let Frame { fields, payload, .. } = *frame;
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# fields that do not decode (section 2.3), or a payload with an opcode whose row in
        //# section 4 has none
        let bare = |payload: &[u8]| if payload.is_empty() { Ok(()) } else { Err(Malformed) };
        let no_fields = || decode_fields::<NoFields>(fields).map(|NoFields {}| ());
        match opcode {
            Opcode::Hello => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Hello),
            Opcode::Ping => bare(payload).and_then(|()| no_fields()).map(|()| Self::Ping),
            Opcode::Status => bare(payload).and_then(|()| no_fields()).map(|()| Self::Status),
            Opcode::Lock => no_fields().map(|()| Self::Lock { passphrase: payload }),
            Opcode::Unlock => no_fields().map(|()| Self::Unlock { passphrase: payload }),
            Opcode::Add => decode_fields(fields).map(|fields| Self::Add { fields, material: payload }),
            Opcode::List => bare(payload).and_then(|()| decode_fields(fields)).map(Self::List),
            Opcode::Describe => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Describe),
            Opcode::Remove => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Remove),
            Opcode::Encrypt => {
                decode_fields(fields).map(|fields| Self::Encrypt { fields, plaintext: payload })
            }
            Opcode::Decrypt => {
                decode_fields(fields).map(|fields| Self::Decrypt { fields, ciphertext: payload })
            }
            Opcode::StreamNew => bare(payload).and_then(|()| decode_fields(fields)).map(Self::StreamNew),
            Opcode::StreamOpen => {
                decode_fields(fields).map(|fields| Self::StreamOpen { fields, head: payload })
            }
            Opcode::RemoteStreamNew => {
                bare(payload).and_then(|()| decode_fields(fields)).map(Self::RemoteStreamNew)
            }
            Opcode::RemoteStreamOpen => {
                decode_fields(fields).map(|fields| Self::RemoteStreamOpen { fields, head: payload })
            }
            Opcode::RemoteStreamEncrypt => decode_fields(fields)
                .map(|RemoteStream { stream }| Self::RemoteStreamEncrypt { stream, plaintext: payload }),
            Opcode::RemoteStreamDecrypt => {
                decode_fields(fields).map(|fields| Self::RemoteStreamDecrypt { fields, chunks: payload })
            }
            Opcode::RemoteStreamClose => {
                bare(payload).and_then(|()| decode_fields(fields)).map(Self::RemoteStreamClose)
            }
            Opcode::Rotate => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Rotate),
            Opcode::Rename => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Rename),
            Opcode::RemoveAll => bare(payload).and_then(|()| decode_fields(fields)).map(Self::RemoveAll),
            Opcode::Export => {
                decode_fields(fields).map(|fields| Self::Export { fields, passphrase: payload })
            }
            Opcode::Wrap => decode_fields(fields).map(|fields| Self::Wrap { fields, plaintext: payload }),
            Opcode::Unwrap => {
                decode_fields(fields).map(|fields| Self::Unwrap { fields, ciphertext: payload })
            }
            Opcode::DataKey => bare(payload).and_then(|()| decode_fields(fields)).map(Self::DataKey),
            Opcode::DataKeyWrapped => {
                bare(payload).and_then(|()| decode_fields(fields)).map(Self::DataKeyWrapped)
            }
            Opcode::Rewrap => {
                decode_fields(fields).map(|fields| Self::Rewrap { fields, ciphertext: payload })
            }
            Opcode::Verify => {
                decode_fields(fields).map(|fields| Self::Verify { fields, ciphertext: payload })
            }
            Opcode::Mac => decode_fields(fields).map(|fields| Self::Mac { fields, digest: payload }),
            Opcode::MacVerify => {
                decode_fields(fields).map(|fields| Self::MacVerify { fields, tag_and_digest: payload })
            }
            Opcode::Random => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Random),
            Opcode::Bind => bare(payload).and_then(|()| decode_fields(fields)).map(Self::Bind),
            Opcode::Batch => no_fields().map(|()| Self::Batch { frames: payload }),
            Opcode::Stats => bare(payload).and_then(|()| no_fields()).map(|()| Self::Stats),
        }
    }
}
