//! Streams: a data key of their own, wrapped under a key version, and a body of any length (`docs/formats.md`, section 8).
//!
//! Owns the 188-byte head and the body's chunks. A DEK lives inside one call here and is wiped; what leaves is one message key, and
//! only after both commitments and the DEK's tag were found right.

use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::{
    COMMITMENT_LEN, OpenError, SALT_LEN, SealError,
    chunk::TAG_LEN,
    cobblestone::{Chunks, Derived},
    context::ContextRef,
    expand::{ExpandKey, KEY_LEN, LABEL_BODY, LABEL_DEK},
    header::{HEADER_LEN, Header, Purpose},
};

/// Bytes of a base nonce.
pub const NONCE_LEN: usize = crate::aead::NONCE_LEN;

/// Bytes of a wrapped DEK: salt, commitment, 32 bytes, tag.
//= docs/formats.md#81-wrapped-dek
//# The wrapped DEK MUST be exactly 104 bytes long, one final chunk of 32 bytes.
pub const WRAPPED_DEK_LEN: usize = SALT_LEN + COMMITMENT_LEN + KEY_LEN + TAG_LEN;

/// Bytes at the start of a stream that a rewrap replaces: header and wrapped DEK.
pub const REWRAP_LEN: usize = HEADER_LEN + WRAPPED_DEK_LEN;

/// Bytes of a stream before its first chunk.
pub const STREAM_HEAD_LEN: usize = REWRAP_LEN + SALT_LEN + COMMITMENT_LEN;

const _: () = assert!(WRAPPED_DEK_LEN == 104 && REWRAP_LEN == 132 && STREAM_HEAD_LEN == 188);

/// The key and base nonce of one stream's body, on the heap and wiped on drop. Moved into one [`Body`].
pub struct MessageKey(Box<MessageKeyParts>);

#[derive(ZeroizeOnDrop)]
struct MessageKeyParts {
    key: [u8; KEY_LEN],
    base_nonce: [u8; NONCE_LEN],
}

impl MessageKey {
    /// A message key that came over the wire. The caller wipes its copies.
    pub fn from_parts(key: &[u8; KEY_LEN], base_nonce: &[u8; NONCE_LEN]) -> Self {
        // Filled in where it will stay, so that no copy is left where a value was moved from.
        let mut parts = Box::new(MessageKeyParts { key: [0; KEY_LEN], base_nonce: [0; NONCE_LEN] });
        parts.key = *key;
        parts.base_nonce = *base_nonce;
        Self(parts)
    }

    /// Key and base nonce, to be handed to who may hold them.
    pub fn expose_secret(&self) -> (&[u8; KEY_LEN], &[u8; NONCE_LEN]) {
        (&self.0.key, &self.0.base_nonce)
    }
}

/// Makes the head of a new stream. `dek`, `dek_salt` and `body_salt` are fresh random bytes; the caller wipes `dek`.
///
/// # Errors
///
/// [`SealError::Purpose`] unless the header says stream.
pub fn new_stream(
    kek: &ExpandKey,
    header: &Header,
    context: ContextRef<'_>,
    dek: &[u8; KEY_LEN],
    dek_salt: &[u8; SALT_LEN],
    body_salt: &[u8; SALT_LEN],
) -> Result<([u8; STREAM_HEAD_LEN], MessageKey), SealError> {
    let prefix = wrap(kek, header, dek, dek_salt)?;
    let body = derive_body(dek, header.purpose, context, body_salt);
    let mut head = [0; STREAM_HEAD_LEN];
    head[..REWRAP_LEN].copy_from_slice(&prefix);
    head[REWRAP_LEN..156].copy_from_slice(body_salt);
    head[156..].copy_from_slice(&body.commitment);
    Ok((head, MessageKey::from_parts(&body.key, &body.base_nonce)))
}

/// Opens the head of a stream.
///
/// # Errors
///
/// [`OpenError::Header`]; [`OpenError::Purpose`] unless the header says stream; [`OpenError::Invalid`] when the DEK's commitment or tag
/// or the body's commitment is wrong.
//= docs/formats.md#83-opening-a-stream
//# A decoder MUST check both commitments and the tag of the wrapped DEK before it decrypts a chunk or hands out a message key.
pub fn open_stream(
    kek: &ExpandKey,
    head: &[u8; STREAM_HEAD_LEN],
    context: ContextRef<'_>,
) -> Result<MessageKey, OpenError> {
    let (prefix, rest) = head.split_first_chunk::<REWRAP_LEN>().ok_or(OpenError::Length)?;
    let (body_salt, rest) = rest.split_first_chunk::<SALT_LEN>().ok_or(OpenError::Length)?;
    let commitment = rest.first_chunk::<COMMITMENT_LEN>().ok_or(OpenError::Length)?;
    let (header, dek) = unwrap(kek, prefix)?;
    let body = derive_body(&dek, header.purpose, context, body_salt);
    body.check(commitment)?;
    Ok(MessageKey::from_parts(&body.key, &body.base_nonce))
}

/// Moves a stream to `new_header`'s key version: the 132 bytes that replace the first 132 of the stream. `dek_salt` is 24 fresh random bytes.
///
/// # Errors
///
/// [`OpenError::Header`] and [`OpenError::Invalid`] as [`open_stream`], the body excepted; [`OpenError::Purpose`] unless old and new header
/// say stream.
//= docs/formats.md#84-rewrap
//# Rewrap MUST NOT change any other byte. It needs neither the encryption context nor the body, and it does not change the DEK: who
//# had an old KEK and an old head can still open the body.
pub fn rewrap_stream(
    old_kek: &ExpandKey,
    prefix: &[u8; REWRAP_LEN],
    new_kek: &ExpandKey,
    new_header: &Header,
    dek_salt: &[u8; SALT_LEN],
) -> Result<[u8; REWRAP_LEN], OpenError> {
    let (_old_header, dek) = unwrap(old_kek, prefix)?;
    wrap(new_kek, new_header, &dek, dek_salt).map_err(|_| OpenError::Purpose)
}

/// Header and wrapped DEK.
fn wrap(
    kek: &ExpandKey,
    header: &Header,
    dek: &[u8; KEY_LEN],
    salt: &[u8; SALT_LEN],
) -> Result<[u8; REWRAP_LEN], SealError> {
    if header.purpose != Purpose::Stream {
        return Err(SealError::Purpose);
    }
    let header = header.to_bytes();
    let derived = derive_dek(kek, &header, salt);
    let mut prefix = [0; REWRAP_LEN];
    prefix[..28].copy_from_slice(&header);
    prefix[28..52].copy_from_slice(salt);
    prefix[52..84].copy_from_slice(&derived.commitment);
    derived.chunks().seal_into(dek, &mut prefix[84..])?;
    Ok(prefix)
}

fn unwrap(
    kek: &ExpandKey,
    prefix: &[u8; REWRAP_LEN],
) -> Result<(Header, Zeroizing<[u8; KEY_LEN]>), OpenError> {
    let header = Header::parse(prefix)?;
    if header.purpose != Purpose::Stream {
        return Err(OpenError::Purpose);
    }
    let (_header, rest) = prefix.split_first_chunk::<HEADER_LEN>().ok_or(OpenError::Length)?;
    let (salt, rest) = rest.split_first_chunk::<SALT_LEN>().ok_or(OpenError::Length)?;
    let (commitment, chunk) = rest.split_first_chunk::<COMMITMENT_LEN>().ok_or(OpenError::Length)?;
    let derived = derive_dek(kek, &header.to_bytes(), salt);
    derived.check(commitment)?;
    let mut dek = Zeroizing::new([0; KEY_LEN]);
    derived.chunks().open_into(chunk, &mut *dek)?;
    Ok((header, dek))
}

fn derive_dek(kek: &ExpandKey, header: &[u8; HEADER_LEN], salt: &[u8; SALT_LEN]) -> Derived {
    //= docs/formats.md#81-wrapped-dek
    //# context string = "kms-agent/v1/dek" ‖ 00 ‖ header (28 bytes)
    Derived::new(kek, salt, [LABEL_DEK, header, &[]])
}

fn derive_body(
    dek: &[u8; KEY_LEN],
    purpose: Purpose,
    context: ContextRef<'_>,
    salt: &[u8; SALT_LEN],
) -> Derived {
    //= docs/formats.md#82-body
    //# context string = "kms-agent/v1/body" ‖ 00 ‖ 03 ‖ EC
    Derived::new(&ExpandKey::new(dek), salt, [LABEL_BODY, &[purpose.number()], context.as_bytes()])
}

/// The body of one stream: an expanded message key, on the heap and wiped on drop. Threads may share it, each with chunks of its own.
///
/// Which chunk numbers were sealed already is the caller's to know: each number is sealed at most once, and after an error the stream
/// is started anew (`docs/formats.md`, section 6.4).
pub struct Body(Box<Chunks>);

impl Body {
    /// Expands a message key and wipes it.
    pub fn new(key: MessageKey) -> Self {
        let (secret, base_nonce) = key.expose_secret();
        Self(Box::new(Chunks::new(secret, base_nonce)))
    }

    /// Seals chunks in place. `buf` is in strides of 16,400 bytes, each 16,384 of plaintext and room for the tag; a shorter last stride is
    /// the final chunk, and a `buf` that ends with a full one has no final chunk. `first` numbers the first stride.
    ///
    /// # Errors
    ///
    /// [`SealError::Length`] for no bytes, or 1 to 15 after the last full stride; [`SealError::ChunkNumber`] past the last chunk number.
    /// `buf` is then as it was.
    pub fn seal_chunks(&self, first: u64, buf: &mut [u8]) -> Result<(), SealError> {
        self.0.seal(first, buf)
    }

    /// Opens chunks in place; strides as in [`Body::seal_chunks`], plaintext at the front of each. That the body ended with a
    /// short stride, and that nothing follows it, is the caller's to check.
    ///
    /// # Errors
    ///
    /// [`OpenError::Length`] for lengths and numbers that [`Body::seal_chunks`] refuses; [`OpenError::Invalid`] when a tag is wrong. All of
    /// `buf` is then zero.
    pub fn open_chunks(&self, first: u64, buf: &mut [u8]) -> Result<(), OpenError> {
        self.0.open(first, buf)
    }
}

#[cfg(test)]
pub(crate) fn is_wiped_on_drop() {
    fn check<T: ZeroizeOnDrop>() {}
    check::<MessageKeyParts>();
}
