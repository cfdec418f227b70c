//! HKDF-Expand over SHA-512 under one key version's 32 bytes (`docs/formats.md`, sections 6.2 and 9).
//!
//! Owns the labels and the only import of HMAC. The HMAC state after the key block is kept, and cloned for each derivation: that
//! halves the cost of a small message. A clone is wiped when it is consumed, the kept state when it is dropped.

use hmac::{
    Hmac, KeyInit,
    digest::{FixedOutput, Update},
};
use sha2::Sha512;
use zeroize::Zeroizing;

/// Bytes of a key version's secret and of a DEK.
pub const KEY_LEN: usize = 32;

/// Bytes of a check value.
pub const CHECK_VALUE_LEN: usize = 8;

//= docs/formats.md#9-labels
//# No label is the beginning of another up to and with its zero byte, and a new use MUST take a new label.
pub(crate) const LABEL_MESSAGE: &[u8] = b"kms-agent/v1\0";
pub(crate) const LABEL_DEK: &[u8] = b"kms-agent/v1/dek\0";
pub(crate) const LABEL_BODY: &[u8] = b"kms-agent/v1/body\0";
pub(crate) const LABEL_MAC: &[u8] = b"kms-agent/v1/mac\0";
const LABEL_CHECK: &[u8] = b"kms-agent/v1/check\0";

const HASH_LEN: usize = 64;

/// The most that HKDF-Expand gives: its block counter is one byte.
pub(crate) const OUTPUT_MAX: usize = 255 * HASH_LEN;

/// One key version, ready to derive: an HMAC-SHA-512 state keyed with its 32 bytes. Wiped on drop.
//= docs/formats.md#2-keys-key-ids-key-versions
//# The 32 bytes of a key version MUST NOT be used for anything but as the key of HKDF-Expand (section 6.2), and each use has a label of
//# its own (section 9).
pub struct ExpandKey(Hmac<Sha512>);

impl ExpandKey {
    /// Takes the secret of a key version. The caller wipes its copy.
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        // HMAC pads a key with zeros to its block of 128 bytes. Padded here, since the constructor for slices is fallible in its
        // type, though no length fails.
        let mut block = Zeroizing::new([0; 128]);
        for (to, from) in block.iter_mut().zip(key) {
            *to = *from;
        }
        Self(Hmac::new((&*block).into()))
    }

    /// The check value of the key version: not secret, for comparing by eye (`docs/formats.md`, section 9).
    pub fn check_value(&self) -> [u8; CHECK_VALUE_LEN] {
        *self.expand::<CHECK_VALUE_LEN>(&[LABEL_CHECK])
    }

    /// HKDF-Expand with the concatenation of `info`.
    pub(crate) fn expand<const N: usize>(&self, info: &[&[u8]]) -> Zeroizing<[u8; N]> {
        const { assert!(N <= OUTPUT_MAX) };
        let mut output = Zeroizing::new([0; N]);
        self.fill(info, &mut *output);
        output
    }

    /// `output` is at most [`OUTPUT_MAX`] bytes.
    fn fill(&self, info: &[&[u8]], output: &mut [u8]) {
        //= docs/formats.md#62-key-derivation
        //# T(1) = HMAC-SHA-512(input key, info ‖ 01)
        //# T(2) = HMAC-SHA-512(input key, T(1) ‖ info ‖ 02)
        let mut block = Zeroizing::new([0; HASH_LEN]);
        for (counter, piece) in (1u8..=255).zip(output.chunks_mut(HASH_LEN)) {
            let mut hmac = self.0.clone();
            if counter > 1 {
                hmac.update(&*block);
            }
            for part in info {
                hmac.update(part);
            }
            hmac.update(&[counter]);
            hmac.finalize_into((&mut *block).into());
            for (to, from) in piece.iter_mut().zip(block.iter()) {
                *to = *from;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn hmac(key: &[u8], message: &[u8]) -> [u8; HASH_LEN] {
        let mut output = [0; HASH_LEN];
        let mut hmac = Hmac::<Sha512>::new_from_slice(key).unwrap();
        hmac.update(message);
        hmac.finalize_into((&mut output).into());
        output
    }

    pub(crate) fn expand(prk: &[u8], info: &[u8], len: usize) -> Option<Vec<u8>> {
        let mut output = vec![0; len];
        (len <= OUTPUT_MAX)
            .then(|| ExpandKey(Hmac::new_from_slice(prk).unwrap()).fill(&[info], &mut output))?;
        Some(output)
    }
}
