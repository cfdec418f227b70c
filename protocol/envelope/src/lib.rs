//! Ciphertexts of kms-agent: header, encryption context, messages, streams and tags of inputs (`docs/formats.md`).
//!
//! Owns every byte of a ciphertext, and is the only crate that imports an AEAD or HMAC. Keys, salts and data keys come in as
//! arguments: the crate draws no randomness, does no I/O, knows no key names, rights or states, and never hands out a DEK.
//! Sealing is deterministic, so **a salt must be fresh random bytes for every call** (section 6.1); it must never come from who
//! asks for the encryption.
//!
//! What is wiped: expanded keys, derived bytes, DEKs and HMAC states when they are dropped, and output buffers after a failure.
//! What the compiler spills to the stack is the caller's to wipe.

#![forbid(unsafe_code)]

mod aead;
pub mod chunk;
mod cobblestone;
mod context;
mod expand;
mod header;
mod message;
mod record;
mod stream;
mod tag;

#[cfg(test)]
mod tests;

pub use chunk::{CHUNK_LEN, SEALED_CHUNK_LEN, TAG_LEN, body_len, body_plaintext_len};
pub use context::{CONTEXT_LEN_MAX, CONTEXT_PAIRS_MAX, ContextError, ContextRef, EncryptionContext, Pairs};
pub use expand::{CHECK_VALUE_LEN, ExpandKey, KEY_LEN};
pub use header::{HEADER_LEN, Header, HeaderError, KeyId, KeyIdError, KeyVersion, Purpose};
pub use message::{MESSAGE_MAX, message_len, message_plaintext_len, open_message, seal_message};
pub use record::{RECORD_TAG_LEN, RecordKey};
pub use stream::{
    Body, MessageKey, NONCE_LEN, REWRAP_LEN, STREAM_HEAD_LEN, WRAPPED_DEK_LEN, new_stream, open_stream,
    rewrap_stream,
};
pub use tag::{DIGEST_LEN, INPUT_TAG_LEN, check_tag, make_tag};

/// Bytes of the salt of a sealed body (`docs/formats.md`, section 6.1).
pub const SALT_LEN: usize = 24;

/// Bytes of the commitment of a sealed body (`docs/formats.md`, section 6.1).
pub const COMMITMENT_LEN: usize = 32;

/// Why nothing was sealed. All of these are mistakes of the calling code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The header's purpose is not one that this function seals.
    #[error("the purpose does not fit the operation")]
    Purpose,
    /// The plaintext is over the maximum, or a buffer does not have the length that belongs to it.
    #[error("impossible length")]
    Length,
    /// A chunk number of 2^38 or more, or a full chunk with the last number.
    #[error("chunk number out of range")]
    ChunkNumber,
}

/// Why nothing was opened (`docs/formats.md`, section 11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Not a ciphertext of ours, or of a kind that this release does not know.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A known purpose that this operation does not take.
    #[error("the ciphertext's purpose does not fit the operation")]
    Purpose,
    /// No ciphertext has this length, or it is over the maximum, or the output buffer is too short.
    #[error("impossible length")]
    Length,
    //= docs/formats.md#11-failures
    //# A wrong key, a wrong encryption context, a header that was exchanged, a truncation, an impossible length, a commitment or a tag that does
    //# not match MUST be one and the same failure, `invalid-ciphertext`.
    /// Wrong key, wrong context, foreign header, truncation or tampering: one and the same.
    #[error("invalid ciphertext")]
    Invalid,
}
