//! Messages and wrapped keys: short, sealed directly under a key version (`docs/formats.md`, section 7).
//!
//! Both directions work without heap allocation, in the caller's buffers.

use zeroize::Zeroize;

use crate::{
    COMMITMENT_LEN, OpenError, SALT_LEN, SealError,
    chunk::{CHUNK_LEN, SEALED_CHUNK_LEN, TAG_LEN},
    cobblestone::Derived,
    context::ContextRef,
    expand::{ExpandKey, LABEL_MESSAGE},
    header::{HEADER_LEN, Header, Purpose},
};

/// Most plaintext bytes of a message or wrapped key.
//= docs/formats.md#7-message-purposes-1-and-2
//# The plaintext of a message MUST NOT be longer than 65,536 bytes.
pub const MESSAGE_MAX: usize = 65536;

const PREFIX_LEN: usize = HEADER_LEN + SALT_LEN + COMMITMENT_LEN;

/// Bytes of a whole message, header included, for a plaintext of this length. Saturates far above [`MESSAGE_MAX`].
pub const fn message_len(plaintext_len: usize) -> usize {
    plaintext_len.saturating_add(PREFIX_LEN + TAG_LEN).saturating_add(TAG_LEN * (plaintext_len / CHUNK_LEN))
}

/// The plaintext length of a message of this length, `None` when no message has it. Says nothing about [`MESSAGE_MAX`].
pub const fn message_plaintext_len(message_len: usize) -> Option<usize> {
    let Some(chunks) = message_len.checked_sub(PREFIX_LEN) else { return None };
    let rest = chunks % SEALED_CHUNK_LEN;
    if rest < TAG_LEN {
        return None;
    }
    Some(chunks / SEALED_CHUNK_LEN * CHUNK_LEN + rest - TAG_LEN)
}

const fn is_direct(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Message | Purpose::WrappedKey)
}

/// Seals `plaintext` into `out`, which is exactly [`message_len`] bytes. `salt` is 24 fresh random bytes.
///
/// # Errors
///
/// [`SealError::Purpose`] unless the header says message or wrapped key; [`SealError::Length`] for a plaintext over
/// [`MESSAGE_MAX`] or an `out` of another length. `out` is then not written.
pub fn seal_message(
    kek: &ExpandKey,
    header: &Header,
    context: ContextRef<'_>,
    salt: &[u8; SALT_LEN],
    plaintext: &[u8],
    out: &mut [u8],
) -> Result<(), SealError> {
    if !is_direct(header.purpose) {
        return Err(SealError::Purpose);
    }
    if plaintext.len() > MESSAGE_MAX || out.len() != message_len(plaintext.len()) {
        return Err(SealError::Length);
    }
    let header = header.to_bytes();
    let (out_header, out) = out.split_first_chunk_mut::<HEADER_LEN>().ok_or(SealError::Length)?;
    let (out_salt, out) = out.split_first_chunk_mut::<SALT_LEN>().ok_or(SealError::Length)?;
    let (out_commitment, chunks) = out.split_first_chunk_mut::<COMMITMENT_LEN>().ok_or(SealError::Length)?;
    let derived = derive(kek, &header, context, salt);
    *out_header = header;
    *out_salt = *salt;
    *out_commitment = derived.commitment;
    derived.chunks().seal_into(plaintext, chunks)
}

/// Opens a whole message into the front of `out` and gives the number of plaintext bytes; the rest of `out` is left alone.
///
/// # Errors
///
/// In the order of `docs/formats.md`, section 12: [`OpenError::Header`]; [`OpenError::Purpose`] unless the header says `expected`,
/// which is message or wrapped key; [`OpenError::Length`] for an impossible length, one over the maximum, or an `out` shorter than the
/// plaintext; [`OpenError::Invalid`] for everything that only the key can tell. All of `out` is then zero.
pub fn open_message(
    kek: &ExpandKey,
    message: &[u8],
    expected: Purpose,
    context: ContextRef<'_>,
    out: &mut [u8],
) -> Result<usize, OpenError> {
    let opened = open(kek, message, expected, context, out);
    if opened.is_err() {
        out.zeroize();
    }
    opened
}

fn open(
    kek: &ExpandKey,
    message: &[u8],
    expected: Purpose,
    context: ContextRef<'_>,
    out: &mut [u8],
) -> Result<usize, OpenError> {
    let parts = Parts::split(message, expected)?;
    let out = out.get_mut(..parts.plaintext_len).ok_or(OpenError::Length)?;
    parts.derive(kek, context)?.chunks().open_into(parts.chunks, out)?;
    Ok(parts.plaintext_len)
}

/// A message, cut into its parts. What can be told without a key was found right.
struct Parts<'a> {
    header: Header,
    salt: &'a [u8; SALT_LEN],
    commitment: &'a [u8; COMMITMENT_LEN],
    chunks: &'a [u8],
    plaintext_len: usize,
}

impl<'a> Parts<'a> {
    fn split(message: &'a [u8], expected: Purpose) -> Result<Self, OpenError> {
        let header = Header::parse(message)?;
        //= docs/formats.md#3-purposes
        //# It MUST refuse a ciphertext of any other purpose, and MUST do so before it looks
        //# up the key.
        if header.purpose != expected || !is_direct(expected) {
            return Err(OpenError::Purpose);
        }
        //= docs/formats.md#66-opening-a-sealed-body
        //# A decoder MUST refuse a body of an impossible length (less than 72 bytes, or section 6.5).
        let plaintext_len = message_plaintext_len(message.len()).ok_or(OpenError::Length)?;
        if plaintext_len > MESSAGE_MAX {
            return Err(OpenError::Length);
        }
        let (_header, rest) = message.split_first_chunk::<HEADER_LEN>().ok_or(OpenError::Length)?;
        let (salt, rest) = rest.split_first_chunk::<SALT_LEN>().ok_or(OpenError::Length)?;
        let (commitment, chunks) = rest.split_first_chunk::<COMMITMENT_LEN>().ok_or(OpenError::Length)?;
        Ok(Self { header, salt, commitment, chunks, plaintext_len })
    }

    /// The keys of the chunks, when the commitment is right.
    fn derive(&self, kek: &ExpandKey, context: ContextRef<'_>) -> Result<Derived, OpenError> {
        let derived = derive(kek, &self.header.to_bytes(), context, self.salt);
        derived.check(self.commitment)?;
        Ok(derived)
    }
}

fn derive(
    kek: &ExpandKey,
    header: &[u8; HEADER_LEN],
    context: ContextRef<'_>,
    salt: &[u8; SALT_LEN],
) -> Derived {
    //= docs/formats.md#7-message-purposes-1-and-2
    //# context string = "kms-agent/v1" ‖ 00 ‖ header (28 bytes) ‖ EC
    Derived::new(kek, salt, [LABEL_MESSAGE, header, context.as_bytes()])
}
