//! Sealed records of the agent itself: keys in its memory, and in its keystore once there is one.
//!
//! Owns how such a record is sealed (AES-256-GCM, a 64-bit counter as nonce, the record's place as additional data). No
//! opcode of the protocol takes a record, and no record is sealed under a KEK (`docs/formats.md`, section 13).

use sha2::{Digest, Sha512};
use zeroize::Zeroizing;

use crate::{KEY_LEN, OpenError, SealError, TAG_LEN, aead::Cipher, stream::NONCE_LEN};

/// Bytes of the tag of a record.
pub const RECORD_TAG_LEN: usize = TAG_LEN;

/// Keeps a key that was derived from a pre-key apart from every other hash of it.
const PRE_KEY_LABEL: &[u8] = b"kms-agent/v1/shield\0";

/// The key over records, expanded; wiped when dropped.
pub struct RecordKey(Cipher);

impl RecordKey {
    /// Expands 32 random bytes.
    #[must_use]
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        Self(Cipher::new(key))
    }

    /// The key that a long pre-key stands for: the first 32 bytes of SHA-512 over a label and all of it. Whoever reads
    /// the pre-key with one bit wrong has nothing.
    #[must_use]
    pub fn from_pre_key(pre_key: &[u8]) -> Self {
        let mut hash = Zeroizing::new([0; 64]);
        Sha512::new().chain_update(PRE_KEY_LABEL).chain_update(pre_key).finalize_into((&mut *hash).into());
        let mut key = Zeroizing::new([0; KEY_LEN]);
        for (to, from) in key.iter_mut().zip(hash.iter()) {
            *to = *from;
        }
        Self::new(&key)
    }

    /// Seals a record in place and gives its tag. `counter` must never be given twice for one key.
    ///
    /// # Errors
    /// [`SealError::Length`] beyond 64 GiB.
    pub fn seal(
        &self,
        counter: u64,
        place: &[u8],
        record: &mut [u8],
    ) -> Result<[u8; RECORD_TAG_LEN], SealError> {
        self.0.seal(&nonce(counter), place, record).map_err(|_| SealError::Length)
    }

    /// Opens a record in place.
    ///
    /// # Errors
    /// [`OpenError::Invalid`] when key, counter, place, record or tag are not those of the sealing; the record is then
    /// as it was.
    pub fn open(
        &self,
        counter: u64,
        place: &[u8],
        record: &mut [u8],
        tag: &[u8; RECORD_TAG_LEN],
    ) -> Result<(), OpenError> {
        self.0.open(&nonce(counter), place, record, tag).map_err(|_| OpenError::Invalid)
    }
}

fn nonce(counter: u64) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    let [c0, c1, c2, c3, c4, c5, c6, c7] = counter.to_be_bytes();
    if let Some(last) = nonce.last_chunk_mut() {
        *last = [c0, c1, c2, c3, c4, c5, c6, c7];
    }
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_opens_only_with_its_key_counter_place_and_tag() {
        let key = RecordKey::from_pre_key(&[1; 16384]);
        let mut record = *b"secret";
        let tag = key.seal(5, b"here", &mut record).unwrap();
        assert_ne!(&record, b"secret");
        let opens = |key: &RecordKey, counter, place: &[u8], tag| {
            let mut copy = record;
            let opened = key.open(counter, place, &mut copy, tag).is_ok();
            assert_eq!(copy == *b"secret", opened);
            opened
        };
        assert!(opens(&key, 5, b"here", &tag));
        assert!(!opens(&key, 6, b"here", &tag));
        assert!(!opens(&key, 5, b"there", &tag));
        assert!(!opens(&key, 5, b"here", &[0; 16]));
        let mut other = [1; 16384];
        other[16383] ^= 1;
        assert!(!opens(&RecordKey::from_pre_key(&other), 5, b"here", &tag));
    }
}
