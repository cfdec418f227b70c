//! Suite 1: the sealed body (`docs/formats.md`, section 6).
//!
//! Owns derivation, commitment, nonces and the sealing of chunks in place. Knows no headers and no purposes; what the context
//! string is made of is the caller's. Never gives out or leaves behind plaintext of a failed opening.

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::{
    COMMITMENT_LEN, OpenError, SALT_LEN, SealError,
    aead::{self, Cipher, NONCE_LEN},
    chunk::{CHUNK_LEN, COUNT_MAX, SEALED_CHUNK_LEN, TAG_LEN},
    expand::ExpandKey,
};

pub(crate) const INFO_PREFIX: &[u8] = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0";

const OKM_LEN: usize = aead::KEY_LEN + NONCE_LEN + COMMITMENT_LEN;

/// What one salt and context string give under one input key. Wiped on drop.
#[derive(ZeroizeOnDrop)]
pub(crate) struct Derived {
    pub(crate) key: [u8; aead::KEY_LEN],
    pub(crate) base_nonce: [u8; NONCE_LEN],
    pub(crate) commitment: [u8; COMMITMENT_LEN],
}

impl Derived {
    /// `context` is the context string in up to three parts.
    pub(crate) fn new(input_key: &ExpandKey, salt: &[u8; SALT_LEN], context: [&[u8]; 3]) -> Self {
        let [first, second, third] = context;
        //= docs/formats.md#62-key-derivation
        //# info = "c2sp.org/chunked-encryption@v1+" ‖ "AEAD_AES_256_GCM" ‖ 00 ‖ salt ‖ context string
        let okm = input_key.expand::<OKM_LEN>(&[INFO_PREFIX, salt, first, second, third]);
        let okm: &[u8; OKM_LEN] = &okm;
        //= docs/formats.md#62-key-derivation
        //# The 76 bytes are, in this order: message key 32, base nonce 12, commitment 32.
        let mut derived =
            Self { key: [0; aead::KEY_LEN], base_nonce: [0; NONCE_LEN], commitment: [0; COMMITMENT_LEN] };
        derived.key.copy_from_slice(&okm[..32]);
        derived.base_nonce.copy_from_slice(&okm[32..44]);
        derived.commitment.copy_from_slice(&okm[44..]);
        derived
    }

    //= docs/formats.md#66-opening-a-sealed-body
    //# It derives as in section 6.2, and MUST compare the commitment, in constant time, before it decrypts anything.
    pub(crate) fn check(&self, commitment: &[u8; COMMITMENT_LEN]) -> Result<(), OpenError> {
        if self.commitment.ct_eq(commitment).into() { Ok(()) } else { Err(OpenError::Invalid) }
    }

    pub(crate) fn chunks(&self) -> Chunks {
        Chunks::new(&self.key, &self.base_nonce)
    }
}

/// Seals and opens the chunks of one body. Wiped on drop.
pub(crate) struct Chunks {
    cipher: Cipher,
    base_nonce: [u8; NONCE_LEN],
}

impl Drop for Chunks {
    fn drop(&mut self) {
        self.base_nonce.zeroize();
    }
}

impl Chunks {
    pub(crate) fn new(key: &[u8; aead::KEY_LEN], base_nonce: &[u8; NONCE_LEN]) -> Self {
        Self { cipher: Cipher::new(key), base_nonce: *base_nonce }
    }

    //= docs/formats.md#64-nonces
    //# The nonce of chunk k is the base nonce XOR the number k written as a 12-byte big-endian integer.
    pub(crate) fn nonce(&self, number: u64) -> [u8; NONCE_LEN] {
        let mut nonce = self.base_nonce;
        for (byte, k) in nonce.iter_mut().rev().zip(number.to_le_bytes()) {
            *byte ^= k;
        }
        nonce
    }

    /// `buf` in strides of a sealed chunk, whose tags are filled in.
    pub(crate) fn seal(&self, first: u64, buf: &mut [u8]) -> Result<(), SealError> {
        check_strides(first, buf.len()).map_err(|wrong| match wrong {
            Wrong::Length => SealError::Length,
            Wrong::Number => SealError::ChunkNumber,
        })?;
        for (number, stride) in (first..COUNT_MAX).zip(buf.chunks_mut(SEALED_CHUNK_LEN)) {
            let sealed = stride.split_last_chunk_mut::<TAG_LEN>().and_then(|(data, tag)| {
                *tag = self.cipher.seal(&self.nonce(number), &[], data).ok()?;
                Some(())
            });
            if sealed.is_none() {
                buf.zeroize();
                return Err(SealError::Length);
            }
        }
        Ok(())
    }

    /// `buf` in strides of a sealed chunk, whose data is decrypted in place. On failure all of it is wiped.
    //= docs/formats.md#66-opening-a-sealed-body
    //# On failure a decoder MUST wipe what it has decrypted and not given out.
    pub(crate) fn open(&self, first: u64, buf: &mut [u8]) -> Result<(), OpenError> {
        if check_strides(first, buf.len()).is_err() {
            buf.zeroize();
            return Err(OpenError::Length);
        }
        for (number, stride) in (first..COUNT_MAX).zip(buf.chunks_mut(SEALED_CHUNK_LEN)) {
            if self.open_chunk(number, stride).is_err() {
                buf.zeroize();
                return Err(OpenError::Invalid);
            }
        }
        Ok(())
    }

    /// One chunk, final or not. On failure nothing in it was decrypted.
    //= docs/formats.md#66-opening-a-sealed-body
    //# It MUST NOT give out a byte of a chunk whose tag did not match.
    fn open_chunk(&self, number: u64, stride: &mut [u8]) -> Result<(), OpenError> {
        let (data, tag) = stride.split_last_chunk_mut::<TAG_LEN>().ok_or(OpenError::Invalid)?;
        self.cipher.open(&self.nonce(number), &[], data, tag).map_err(|_| OpenError::Invalid)
    }

    /// Seals a whole plaintext into `out`, which has exactly its sealed length.
    pub(crate) fn seal_into(&self, plaintext: &[u8], out: &mut [u8]) -> Result<(), SealError> {
        let mut rest = plaintext;
        for stride in out.chunks_mut(SEALED_CHUNK_LEN) {
            let (data, _tag) = stride.split_last_chunk_mut::<TAG_LEN>().ok_or(SealError::Length)?;
            let (piece, after) = rest.split_at_checked(data.len()).ok_or(SealError::Length)?;
            data.copy_from_slice(piece);
            rest = after;
        }
        self.seal(0, out)
    }

    /// Opens all chunks of a body, final one included, into `out`, which has exactly its plaintext length. On failure `out` may hold
    /// plaintext of chunks before: the caller wipes.
    pub(crate) fn open_into(&self, chunks: &[u8], out: &mut [u8]) -> Result<(), OpenError> {
        // The final, short chunk may have no data, so `out` is cut along the sealed strides and not by itself.
        let mut rest = out;
        for (number, stride) in (0..COUNT_MAX).zip(chunks.chunks(SEALED_CHUNK_LEN)) {
            let (sealed, tag) = stride.split_last_chunk::<TAG_LEN>().ok_or(OpenError::Invalid)?;
            let (data, after) = rest.split_at_mut_checked(sealed.len()).ok_or(OpenError::Length)?;
            data.copy_from_slice(sealed);
            self.cipher.open(&self.nonce(number), &[], data, tag).map_err(|_| OpenError::Invalid)?;
            rest = after;
        }
        Ok(())
    }
}

enum Wrong {
    Length,
    Number,
}

/// Whether strides of this total length can be chunks from `first` on.
fn check_strides(first: u64, len: usize) -> Result<(), Wrong> {
    let full = len / SEALED_CHUNK_LEN;
    let rest = len % SEALED_CHUNK_LEN;
    // No stride at all is refused too: a caller that had no chunk to seal would have forgotten the final one.
    if len == 0 || (1..TAG_LEN).contains(&rest) {
        return Err(Wrong::Length);
    }
    // A full chunk needs a number left for the final chunk after it, a final one only its own.
    let after = u64::try_from(full).ok().and_then(|full| first.checked_add(full)).ok_or(Wrong::Number)?;
    if after < COUNT_MAX { Ok(()) } else { Err(Wrong::Number) }
}

const _: () = assert!(aead::TAG_LEN == TAG_LEN && CHUNK_LEN + TAG_LEN == SEALED_CHUNK_LEN);
