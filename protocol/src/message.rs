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

//= docs/protocol.md#keyref
//# Tag 2 is reserved for a number that is bound on the connection.
/// Which key is meant. Tag 2 is reserved for a number bound on the connection.
#[derive(Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum KeyRef<'a> {
    /// By its name.
    Name(&'a str),
    /// By its id.
    Id([u8; 16]),
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
    /// Every kind that this release takes. 2 (lifetime), 3 (confirm), 4 (max-uses) and 5 (exportable) are reserved.
    pub const ALL: &[u32] = &[MEMORY_ONLY];
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
//# What a key or a version can be used for. Tags from 1 on are reserved.
/// What a key or a version can be used for. Tags from 1 on are reserved for the states that the keystore brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KeyState {
    /// Everything.
    Enabled,
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
}

impl<'a> Request<'a> {
    /// Decodes the request in `frame`, whose opcode is known. Nothing may be left over: a request that has no payload is
    /// refused with one.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(opcode: Opcode, frame: &Frame<'a>) -> Result<Self, Malformed> {
        let Frame { fields, payload, .. } = *frame;
        //= docs/protocol.md#22-limits-and-what-ends-a-connection
        //# fields that do not decode (section 2.3), or a payload with an opcode that has none
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
        }
    }
}
