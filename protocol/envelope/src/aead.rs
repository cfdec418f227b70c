//! AES-256-GCM with 96-bit nonces and 128-bit tags, in place: the seam behind which another implementation can stand.
//!
//! Owns the only import of an AEAD. Knows nothing of chunks or keys' origins; choosing a nonce is the caller's.

use aes::Aes256Enc;
use aes_gcm::{
    AesGcm, KeyInit,
    aead::{AeadInOut, consts::U12},
};

pub(crate) const KEY_LEN: usize = 32;
pub(crate) const NONCE_LEN: usize = 12;
pub(crate) const TAG_LEN: usize = 16;

/// The tag does not match, or the input is longer than the AEAD takes (64 GiB).
#[derive(Debug)]
pub(crate) struct Refused;

/// An expanded key, wiped on drop. GCM only ever runs AES forwards, so the schedule for decryption is not made.
pub(crate) struct Cipher(AesGcm<Aes256Enc, U12>);

impl Cipher {
    pub(crate) fn new(key: &[u8; KEY_LEN]) -> Self {
        Self(AesGcm::new(key.into()))
    }

    /// Encrypts `data` in place and gives its tag.
    pub(crate) fn seal(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        data: &mut [u8],
    ) -> Result<[u8; TAG_LEN], Refused> {
        let tag = self.0.encrypt_inout_detached(nonce.into(), aad, data.into()).map_err(|_| Refused)?;
        Ok(tag.into())
    }

    /// Decrypts `data` in place after its tag was found right; otherwise leaves it as it was.
    pub(crate) fn open(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        data: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), Refused> {
        self.0.decrypt_inout_detached(nonce.into(), aad, data.into(), tag.into()).map_err(|_| Refused)
    }
}

#[cfg(test)]
pub(crate) fn is_wiped_on_drop() {
    fn check<T: zeroize::ZeroizeOnDrop>() {}
    check::<AesGcm<Aes256Enc, U12>>();
}
