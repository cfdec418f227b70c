//! Messages as readable lines, `path = value`, and as frames (`docs/protocol.md`, section 12). Shared by the tests and by the
//! generator of vectors.
//!
//! Every structure is taken apart without `..`, so that a new field does not compile until it is shown.

use bincode::Encode;
use kms_protocol::{
    Add, Added, Bind, Bound, Constraint, Describe, Description, Export, Exported, Fact, Hello, KeyAndContext,
    KeyRef, KeyRow, KeyState, List, Listed, LockState, Locking, Malformed, Material, NewDataKey, NoFields,
    Opcode, OperationCount, Random, Refusal, RemoteChunks, RemoteStream, Remove, RemoveAll, Removed,
    RemovedAll, Rename, Renamed, Request, Rewrap, Rewrapped, Rotate, Rotated, StatsReply, StatusReply, Value,
    Verified, VersionRow, Welcome, push_frame,
};

/// Something that fields are made of.
pub(crate) trait Show {
    /// Appends the lines of this value, which stands at `path`.
    fn show(&self, path: &str, lines: &mut Vec<String>);
}

/// All the fields of a message.
pub(crate) trait Fields {
    /// The fields, readable.
    fn lines(&self) -> Vec<String>;
    /// The frame with these fields.
    fn frame(&self, code: u16, request_id: u32, payload: &[u8]) -> Result<Vec<u8>, Malformed>;
}

impl<T: Show + Encode> Fields for T {
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.show("", &mut lines);
        lines
    }

    fn frame(&self, code: u16, request_id: u32, payload: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut frame = Vec::new();
        push_frame(&mut frame, code, request_id, self, payload)?;
        Ok(frame)
    }
}

/// Digits, two for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The line of a byte string.
fn bytes_line(path: &str, bytes: &[u8]) -> String {
    format!("{path} = {}", if bytes.is_empty() { "empty".to_owned() } else { hex(bytes) })
}

macro_rules! show_plainly {
    ($($type:ty),*) => {
        $(impl Show for $type {
            fn show(&self, path: &str, lines: &mut Vec<String>) {
                lines.push(format!("{path} = {self}"));
            }
        })*
    };
}

show_plainly!(u16, u32, u64, bool);

impl Show for &str {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        lines.push(format!("{path} = {self:?}"));
    }
}

impl Show for String {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        self.as_str().show(path, lines);
    }
}

impl Show for &[u8] {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        lines.push(bytes_line(path, self));
    }
}

impl<const N: usize> Show for [u8; N] {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        lines.push(bytes_line(path, self));
    }
}

impl<T: Show> Show for Vec<T> {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        lines.push(format!("{path} = {} elements", self.len()));
        for (number, element) in self.iter().enumerate() {
            element.show(&format!("{path}[{number}]"), lines);
        }
    }
}

impl<T: Show> Show for Option<T> {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        match self {
            None => lines.push(format!("{path} = none")),
            Some(value) => {
                lines.push(format!("{path} = some"));
                value.show(&format!("{path}.some"), lines);
            }
        }
    }
}

macro_rules! show_structures {
    ($($type:ty { $($field:ident),* })*) => {
        $(impl Show for $type {
            fn show(&self, path: &str, lines: &mut Vec<String>) {
                let Self { $($field),* } = self;
                let dot = if path.is_empty() { "" } else { "." };
                $($field.show(&format!("{path}{dot}{}", stringify!($field)), lines);)*
            }
        })*
    };
}

show_structures! {
    Hello { version }
    Welcome {
        version, frame_max, message_max, context_max, context_pairs_max, in_flight_max, page_rows_max,
        remote_streams_max, opcodes, constraints, features
    }
    Refusal { retry_after_ms }
    KeyAndContext<'_> { key, context }
    Constraint { kind, value }
    Add<'_> { token, name, material, if_missing, constraints }
    Added { id, version, check_value, created }
    List { cursor }
    Listed { keys, next }
    KeyRow {
        name, id, memory_only, state, primary, minimum, versions, check_value, created, expires_in, uses
    }
    Describe<'_> { key, versions_after }
    Description { key, versions, more, constraints }
    VersionRow { version, state, check_value, created, uses }
    Remove<'_> { token, key }
    Removed { id }
    Rotate<'_> { token, key }
    Rotated { id, version, check_value }
    Rename<'_> { token, key, name }
    Renamed { id }
    Export<'_> { key, version }
    Exported { id, version }
    RemoveAll { token }
    RemovedAll { keys }
    NewDataKey<'_> { key, context, length }
    Rewrap<'_> { key, context, to }
    Rewrapped { changed, id, version }
    Verified { id, name, version, primary }
    Random { length }
    Bind<'_> { number, key }
    Bound { id }
    StatsReply { uptime_ms, operations, values }
    OperationCount { opcode, status, count }
    Value { name, value }
    Locking { changed }
    RemoteStream { stream }
    RemoteChunks { stream, first }
    StatusReply { state, facts }
    Fact { name, value }
}

impl Show for NoFields {
    fn show(&self, _: &str, _: &mut Vec<String>) {
        let Self {} = self;
    }
}

impl Show for KeyRef<'_> {
    fn show(&self, path: &str, lines: &mut Vec<String>) {
        match self {
            Self::Name(name) => {
                lines.push(format!("{path} = name"));
                name.show(&format!("{path}.name"), lines);
            }
            Self::Id(id) => {
                lines.push(format!("{path} = id"));
                id.show(&format!("{path}.id"), lines);
            }
            Self::Bound(number) => {
                lines.push(format!("{path} = bound"));
                number.show(&format!("{path}.bound"), lines);
            }
        }
    }
}

macro_rules! show_tags {
    ($($type:ty { $($variant:ident = $name:literal),* })*) => {
        $(impl Show for $type {
            fn show(&self, path: &str, lines: &mut Vec<String>) {
                let name = match self { $(Self::$variant => $name,)* };
                lines.push(format!("{path} = {name}"));
            }
        })*
    };
}

show_tags! {
    Material { Generate = "generate", Import = "import" }
    KeyState {
        Enabled = "enabled",
        Staged = "staged",
        Disabled = "disabled",
        Removed = "removed",
        Destroyed = "destroyed"
    }
    LockState { Unlocked = "unlocked", Locked = "locked" }
}

/// Opcode, fields and payload of a request.
pub(crate) fn parts<'r>(request: &'r Request<'_>) -> (Opcode, Box<dyn Fields + 'r>, &'r [u8]) {
    match request {
        Request::Hello(fields) => (Opcode::Hello, Box::new(*fields), &[]),
        Request::Ping => (Opcode::Ping, Box::new(NoFields {}), &[]),
        Request::Status => (Opcode::Status, Box::new(NoFields {}), &[]),
        Request::Lock { passphrase } => (Opcode::Lock, Box::new(NoFields {}), passphrase),
        Request::Unlock { passphrase } => (Opcode::Unlock, Box::new(NoFields {}), passphrase),
        Request::Add { fields, material } => (Opcode::Add, Box::new(fields.clone()), material),
        Request::List(fields) => (Opcode::List, Box::new(*fields), &[]),
        Request::Describe(fields) => (Opcode::Describe, Box::new(*fields), &[]),
        Request::Remove(fields) => (Opcode::Remove, Box::new(*fields), &[]),
        Request::Encrypt { fields, plaintext } => (Opcode::Encrypt, Box::new(*fields), plaintext),
        Request::Decrypt { fields, ciphertext } => (Opcode::Decrypt, Box::new(*fields), ciphertext),
        Request::StreamNew(fields) => (Opcode::StreamNew, Box::new(*fields), &[]),
        Request::StreamOpen { fields, head } => (Opcode::StreamOpen, Box::new(*fields), head),
        Request::RemoteStreamNew(fields) => (Opcode::RemoteStreamNew, Box::new(*fields), &[]),
        Request::RemoteStreamOpen { fields, head } => (Opcode::RemoteStreamOpen, Box::new(*fields), head),
        Request::RemoteStreamEncrypt { stream, plaintext } => {
            (Opcode::RemoteStreamEncrypt, Box::new(RemoteStream { stream: *stream }), plaintext)
        }
        Request::RemoteStreamDecrypt { fields, chunks } => {
            (Opcode::RemoteStreamDecrypt, Box::new(*fields), chunks)
        }
        Request::RemoteStreamClose(fields) => (Opcode::RemoteStreamClose, Box::new(*fields), &[]),
        Request::Rotate(fields) => (Opcode::Rotate, Box::new(*fields), &[]),
        Request::Rename(fields) => (Opcode::Rename, Box::new(*fields), &[]),
        Request::RemoveAll(fields) => (Opcode::RemoveAll, Box::new(*fields), &[]),
        Request::Export { fields, passphrase } => (Opcode::Export, Box::new(*fields), passphrase),
        Request::Wrap { fields, plaintext } => (Opcode::Wrap, Box::new(*fields), plaintext),
        Request::Unwrap { fields, ciphertext } => (Opcode::Unwrap, Box::new(*fields), ciphertext),
        Request::DataKey(fields) => (Opcode::DataKey, Box::new(*fields), &[]),
        Request::DataKeyWrapped(fields) => (Opcode::DataKeyWrapped, Box::new(*fields), &[]),
        Request::Rewrap { fields, ciphertext } => (Opcode::Rewrap, Box::new(*fields), ciphertext),
        Request::Verify { fields, ciphertext } => (Opcode::Verify, Box::new(*fields), ciphertext),
        Request::Mac { fields, digest } => (Opcode::Mac, Box::new(*fields), digest),
        Request::MacVerify { fields, tag_and_digest } => {
            (Opcode::MacVerify, Box::new(*fields), tag_and_digest)
        }
        Request::Random(fields) => (Opcode::Random, Box::new(*fields), &[]),
        Request::Bind(fields) => (Opcode::Bind, Box::new(*fields), &[]),
        Request::Batch { frames } => (Opcode::Batch, Box::new(NoFields {}), frames),
        Request::Stats => (Opcode::Stats, Box::new(NoFields {}), &[]),
    }
}
