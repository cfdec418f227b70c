//! Tags of inputs: a keyed hash under a key version (`docs/formats.md`, section 9.1).
//!
//! Takes the digest of an input and never the input. Nothing is encrypted here, and nothing random goes in.

use subtle::ConstantTimeEq;

use crate::{
    OpenError, SealError,
    context::ContextRef,
    expand::{ExpandKey, LABEL_MAC},
    header::{HEADER_LEN, Header, Purpose},
};

//= docs/formats.md#91-tag-of-an-input
//# A *digest* is the SHA-512 of the input, 64 bytes
/// Bytes of the digest that stands for an input.
pub const DIGEST_LEN: usize = 64;

//= docs/formats.md#91-tag-of-an-input
//# A tag is 60 bytes long.
/// Bytes of the tag of an input, header included. Not the tag of a chunk, [`crate::TAG_LEN`].
pub const INPUT_TAG_LEN: usize = HEADER_LEN + MAC_LEN;

const MAC_LEN: usize = 32;

/// The tag of the input with this SHA-512. The same arguments always give the same tag.
///
/// # Errors
///
/// [`SealError::Purpose`] unless the header says tag.
pub fn make_tag(
    kek: &ExpandKey,
    header: &Header,
    context: ContextRef<'_>,
    digest: &[u8; DIGEST_LEN],
) -> Result<[u8; INPUT_TAG_LEN], SealError> {
    if header.purpose != Purpose::Tag {
        return Err(SealError::Purpose);
    }
    let header = header.to_bytes();
    //= docs/formats.md#91-tag-of-an-input
    //# HKDF-Expand(SHA-512, key version, "kms-agent/v1/mac" ‖ 00 ‖ header (28 bytes) ‖ EC ‖ digest (64 bytes), 32 bytes)
    let mac = kek.expand::<MAC_LEN>(&[LABEL_MAC, &header, context.as_bytes(), digest]);
    let mut tag = [0; INPUT_TAG_LEN];
    tag[..HEADER_LEN].copy_from_slice(&header);
    tag[HEADER_LEN..].copy_from_slice(&*mac);
    Ok(tag)
}

/// Whether `tag` is the tag of the input with this SHA-512.
///
/// # Errors
///
/// In the order of `docs/formats.md`, section 12: [`OpenError::Header`]; [`OpenError::Purpose`] unless the header says tag;
/// [`OpenError::Length`] unless it is [`INPUT_TAG_LEN`] bytes; [`OpenError::Invalid`] when it is not the tag of this input, in this
/// context, under this key.
pub fn check_tag(
    kek: &ExpandKey,
    tag: &[u8],
    context: ContextRef<'_>,
    digest: &[u8; DIGEST_LEN],
) -> Result<(), OpenError> {
    let header = Header::parse(tag)?;
    if header.purpose != Purpose::Tag {
        return Err(OpenError::Purpose);
    }
    let tag: &[u8; INPUT_TAG_LEN] = tag.try_into().map_err(|_| OpenError::Length)?;
    let made = make_tag(kek, &header, context, digest).map_err(|_| OpenError::Purpose)?;
    //= docs/formats.md#91-tag-of-an-input
    //# It is made anew under the key version that its header names and compared, all 32 bytes of it, in constant time.
    if made.ct_eq(tag).into() { Ok(()) } else { Err(OpenError::Invalid) }
}
