//! What a lock makes of the keys: each sealed, name and all, under a random key that is sealed under the passphrase.
//!
//! Owns the bytes of a key that is sealed for a lock, and what a passphrase is checked by. They never leave this process.

use std::{num::NonZeroU64, time::Duration};

use kms_envelope::{KEY_LEN, KeyId, KeyVersion, RECORD_TAG_LEN, RecordKey};
use kms_protocol::KeyName;
use kms_secret_memory::Secret;
use zeroize::{Zeroize, Zeroizing};

use super::{KeyRecord, KeyringError, PLAIN, Rare, VersionRecord};
use crate::{
    constraints::Constraints,
    crypto::{CryptoError, LOCK_SALT_LEN, RecordNonces, Shield},
};

/// A key while the agent is locked: everything but its deadline is sealed, its name too.
pub(super) struct LockedKey {
    nonce: u64,
    tag: [u8; RECORD_TAG_LEN],
    bytes: Box<[u8]>,
    pub(super) expires: Option<Duration>,
}

impl Drop for LockedKey {
    // The key that it is sealed under can be had again with the passphrase, for as long as there is no other lock.
    fn drop(&mut self) {
        self.tag.zeroize();
        self.bytes.zeroize();
    }
}

/// What the passphrase of a lock is checked by: a random key that is sealed under it.
#[derive(Clone, Copy)]
pub(super) struct LockCheck {
    pub(super) salt: [u8; LOCK_SALT_LEN],
    pub(super) nonce: u64,
    pub(super) tag: [u8; RECORD_TAG_LEN],
    pub(super) lock_key: [u8; KEY_LEN],
}

impl LockedKey {
    pub(super) fn seal(
        key: &RecordKey,
        record: &KeyRecord,
        shield: &mut Shield,
        nonces: &mut RecordNonces,
    ) -> Result<Self, CryptoError> {
        let nonce = nonces.next()?;
        let mut plain = record.to_bytes(shield)?;
        let tag = key.seal(nonce, LOCKED_KEY_PLACE, &mut plain).map_err(|_| CryptoError::Record)?;
        let expires = record.rare.as_ref().and_then(|rare| rare.expires);
        Ok(Self { nonce, tag, bytes: plain.as_slice().into(), expires })
    }

    pub(super) fn open(&self, key: &RecordKey) -> Result<Zeroizing<Box<[u8]>>, CryptoError> {
        let mut plain = Zeroizing::new(self.bytes.clone());
        key.open(self.nonce, LOCKED_KEY_PLACE, &mut plain, &self.tag).map_err(|_| CryptoError::Record)?;
        Ok(plain)
    }
}

impl KeyRecord {
    /// All of the key, for a lock. Fixed places, since they never leave this process.
    fn to_bytes(&self, shield: &mut Shield) -> Result<Zeroizing<Vec<u8>>, CryptoError> {
        let none = Rare::default();
        let rare = self.rare.as_deref().unwrap_or(&none);
        let versions = rare.older.len().saturating_add(1);
        // All of it reserved: a vector that grows leaves a copy of the key behind.
        let len = LOCKED_VERSION_LEN.saturating_mul(versions).saturating_add(LOCKED_KEY_LEN);
        let mut bytes = Zeroizing::new(Vec::with_capacity(len.saturating_add(KeyName::LEN_MAX)));
        let Constraints { lifetime, confirm, max_uses, exportable, memory_only } = rare.constraints;
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        bytes.extend_from_slice(self.id.as_bytes());
        bytes.push(
            flag(confirm, 1) | flag(exportable, 2) | flag(rare.expires.is_some(), 4) | flag(memory_only, 8),
        );
        bytes.push(u8::try_from(self.name.len()).map_err(|_| CryptoError::Record)?);
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.extend_from_slice(&lifetime.map_or(0, |lifetime| lifetime.as_secs()).to_be_bytes());
        let expires = rare.expires.unwrap_or_default();
        bytes.extend_from_slice(&expires.as_secs().to_be_bytes());
        bytes.extend_from_slice(&expires.subsec_nanos().to_be_bytes());
        bytes.extend_from_slice(&max_uses.map_or(0, NonZeroU64::get).to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(versions).map_err(|_| CryptoError::Record)?.to_be_bytes());
        for VersionRecord { version, created, uses, sealed } in self.versions() {
            bytes.extend_from_slice(&version.value().to_be_bytes());
            bytes.extend_from_slice(&created.to_be_bytes());
            bytes.extend_from_slice(&uses.to_be_bytes());
            shield.with_key_bytes(&self.id, *version, sealed, |key| bytes.extend_from_slice(key))?;
        }
        Ok(bytes)
    }

    pub(super) fn from_bytes(
        bytes: &[u8],
        shield: &mut Shield,
        nonces: &mut RecordNonces,
    ) -> Result<Self, CryptoError> {
        fn part<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], CryptoError> {
            let (part, rest) = bytes.split_first_chunk().ok_or(CryptoError::Record)?;
            *bytes = rest;
            Ok(*part)
        }
        let mut rest = bytes;
        let id = KeyId::from_bytes(part(&mut rest)?);
        let [flags, name_len] = part(&mut rest)?;
        let (name, mut rest) = rest.split_at_checked(name_len.into()).ok_or(CryptoError::Record)?;
        let name = std::str::from_utf8(name).map_err(|_| CryptoError::Record)?;
        let lifetime = Some(u64::from_be_bytes(part(&mut rest)?)).filter(|lifetime| *lifetime > 0);
        let expires_secs = u64::from_be_bytes(part(&mut rest)?);
        let expires_nanos = u32::from_be_bytes(part(&mut rest)?);
        let max_uses = NonZeroU64::new(u64::from_be_bytes(part(&mut rest)?));
        let versions = u32::from_be_bytes(part(&mut rest)?);
        let constraints = Constraints {
            memory_only: flags & 8 != 0,
            lifetime: lifetime.map(Duration::from_secs),
            confirm: flags & 1 != 0,
            max_uses,
            exportable: flags & 2 != 0,
        };
        let expires = (flags & 4 != 0).then(|| Duration::new(expires_secs, expires_nanos));
        let mut older = Vec::new();
        older.try_reserve_exact(versions as usize).map_err(|_| CryptoError::Record)?;
        for _ in 0..versions {
            let version = KeyVersion::new(u32::from_be_bytes(part(&mut rest)?)).ok_or(CryptoError::Record)?;
            let created = u64::from_be_bytes(part(&mut rest)?);
            let uses = u64::from_be_bytes(part(&mut rest)?);
            let (key, behind) = rest.split_first_chunk::<KEY_LEN>().ok_or(CryptoError::Record)?;
            rest = behind;
            let sealed = shield.seal(&id, version, key, nonces)?;
            older.push(VersionRecord { version, created, uses, sealed });
        }
        let primary = older.pop().ok_or(CryptoError::Record)?;
        let plain = constraints == PLAIN && older.is_empty();
        let older_uses = older.iter().fold(0u64, |uses, version| uses.saturating_add(version.uses));
        let rare = (!plain).then(|| Box::new(Rare { constraints, expires, older, older_uses }));
        Ok(Self { name: name.into(), id, primary, rare })
    }
}

/// The key that the keys of a lock are sealed under, for whoever has the passphrase.
pub(super) fn lock_key(
    check: Option<&LockCheck>,
    passphrase_key: &Secret<KEY_LEN>,
) -> Result<Zeroizing<[u8; KEY_LEN]>, KeyringError> {
    let check = check.ok_or(KeyringError::WrongPassphrase)?;
    let mut lock_key = Zeroizing::new(check.lock_key);
    RecordKey::new(passphrase_key.expose_secret())
        .open(check.nonce, LOCK_KEY_PLACE, lock_key.as_mut_slice(), &check.tag)
        .map_err(|_| KeyringError::WrongPassphrase)?;
    Ok(lock_key)
}

/// The place of the lock key, and of a key under it, in the additional data of their records.
pub(super) const LOCK_KEY_PLACE: &[u8] = &[2];
const LOCKED_KEY_PLACE: &[u8] = &[3];

/// Bytes of a key that is sealed for a lock, apart from its name and its versions, and of each version.
const LOCKED_KEY_LEN: usize = 16 + 1 + 1 + 8 + 8 + 8 + 4 + 4;
const LOCKED_VERSION_LEN: usize = 4 + 8 + 8 + KEY_LEN;
