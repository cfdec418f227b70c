//! The keys that the agent holds, and their lock.
//!
//! Owns the records, the indexes by name and by id, the use counts, and what a lock makes of them. It does nothing
//! without a [`Permit`]. It never sees a socket, a frame or an opcode, and key bytes only pass through it sealed or as
//! an argument of a closure.

use std::hash::{BuildHasher, RandomState};

use compact_str::CompactString;
use hashbrown::HashTable;
use kms_envelope::{ExpandKey, KEY_LEN, KeyId, KeyVersion, RECORD_TAG_LEN, RecordKey};
use kms_protocol::{KeyName, PAGE_ROWS_MAX};
use kms_secret_memory::{Backing, Policy, Secret, zeroize_stack};
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    authorize::Permit,
    crypto::{
        CryptoError, LOCK_SALT_LEN, Random, RecordNonces, STACK_WIPE_LEN, SealedKey, Shield, random_bytes,
        random_secret,
    },
};

/// What stops an operation on the keyring.
#[derive(Debug, Error)]
pub enum KeyringError {
    /// Keys are out of reach.
    #[error("the keyring is locked")]
    Locked,
    /// No key of that name or id, or no such version of it.
    #[error("there is no such key")]
    NotFound,
    /// The name is taken.
    #[error("a key of that name exists")]
    Exists,
    /// The configured number of keys is reached.
    #[error("the keyring is full")]
    Full,
    /// The passphrase does not open the lock.
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    /// Memory, randomness or a damaged record.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// Which key is meant.
#[derive(Clone, Copy)]
pub(crate) enum Selector<'a> {
    Name(KeyName<'a>),
    Id(KeyId),
}

/// What is known of a key, without its secret.
pub(crate) struct KeySummary {
    pub(crate) name: CompactString,
    pub(crate) id: KeyId,
    pub(crate) primary: KeyVersion,
    pub(crate) check_value: [u8; 8],
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) uses: u64,
}

impl Drop for KeySummary {
    fn drop(&mut self) {
        self.name.zeroize();
    }
}

/// A key as it lies in ordinary memory.
struct KeyRecord {
    name: CompactString,
    id: KeyId,
    version: KeyVersion,
    created: u64,
    uses: u64,
    sealed: SealedKey,
}

impl Drop for KeyRecord {
    fn drop(&mut self) {
        self.name.zeroize();
    }
}

/// Most bytes of a key that is sealed for a lock: name and what stands in front of it.
const LOCKED_KEY_LEN_MAX: usize = KEY_LEN + 16 + 4 + 8 + 8 + KeyName::LEN_MAX;

/// A key while the agent is locked: everything, its name too, is sealed.
struct LockedKey {
    nonce: u64,
    tag: [u8; RECORD_TAG_LEN],
    bytes: Box<[u8]>,
}

/// What is left of the keyring while the agent is locked.
struct LockedKeys {
    salt: [u8; LOCK_SALT_LEN],
    lock_key_nonce: u64,
    lock_key_tag: [u8; RECORD_TAG_LEN],
    /// The key over all records, sealed under the passphrase.
    lock_key: [u8; KEY_LEN],
    keys: Vec<LockedKey>,
}

/// The keys while they can be used.
struct OpenKeys {
    shield: Shield,
    /// Slots; a freed one is used again.
    records: Slots,
    free: Vec<u32>,
    by_name: HashTable<u32>,
    by_id: HashTable<u32>,
    hasher: RandomState,
}

/// Records in blocks that never move: a vector that grows leaves names behind, where no lock finds them.
#[derive(Default)]
struct Slots(Vec<Vec<Option<KeyRecord>>>);

impl Slots {
    const BLOCK: usize = 256;

    fn len(&self) -> usize {
        let full = self.0.len().saturating_sub(1).saturating_mul(Self::BLOCK);
        full.saturating_add(self.0.last().map_or(0, Vec::len))
    }

    fn get(&self, slot: usize) -> Option<&Option<KeyRecord>> {
        self.0.get(slot / Self::BLOCK)?.get(slot % Self::BLOCK)
    }

    fn get_mut(&mut self, slot: usize) -> Option<&mut Option<KeyRecord>> {
        self.0.get_mut(slot / Self::BLOCK)?.get_mut(slot % Self::BLOCK)
    }

    fn push(&mut self, record: KeyRecord) {
        if self.0.last().is_none_or(|block| block.len() == Self::BLOCK) {
            self.0.push(Vec::with_capacity(Self::BLOCK));
        }
        if let Some(block) = self.0.last_mut() {
            block.push(Some(record));
        }
    }

    fn iter(&self) -> impl Iterator<Item = &KeyRecord> {
        self.0.iter().flatten().flatten()
    }
}

enum State {
    Open(OpenKeys),
    Locked(LockedKeys),
}

/// All keys.
pub struct Keyring {
    state: State,
    nonces: RecordNonces,
    memory: Policy,
}

impl Keyring {
    /// An empty keyring with a fresh pre-key in memory of the wanted kind.
    ///
    /// # Errors
    /// [`CryptoError`] where such memory or randomness is not to be had.
    pub fn new(memory: Policy, random: &mut impl Random) -> Result<Self, CryptoError> {
        let state = State::Open(OpenKeys::new(Shield::new(memory, random)?));
        Ok(Self { state, nonces: RecordNonces::default(), memory })
    }

    /// True while keys are out of reach.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self.state, State::Locked(_))
    }

    /// What memory the pre-key lies in; none while locked.
    #[must_use]
    pub fn backing(&self) -> Option<Backing> {
        match &self.state {
            State::Open(open) => Some(open.shield.backing()),
            State::Locked(_) => None,
        }
    }

    /// Number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.state {
            State::Open(open) => open.len(),
            State::Locked(locked) => locked.keys.len(),
        }
    }

    /// True when there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Wipes everything that can be derived again, because nobody is using it.
    pub fn cool(&mut self) {
        if let State::Open(open) = &mut self.state {
            open.shield.cool();
        }
    }

    fn open(&mut self) -> Result<(&mut OpenKeys, &mut RecordNonces), KeyringError> {
        match &mut self.state {
            State::Open(open) => Ok((open, &mut self.nonces)),
            State::Locked(_) => Err(KeyringError::Locked),
        }
    }

    /// Adds a key: these bytes, or random ones.
    pub(crate) fn add(
        &mut self,
        _permit: &Permit,
        name: KeyName<'_>,
        import: Option<&[u8; KEY_LEN]>,
        keys_max: usize,
        now: u64,
        random: &mut impl Random,
    ) -> Result<KeySummary, KeyringError> {
        let (open, nonces) = self.open()?;
        if open.slot(Selector::Name(name)).is_some() {
            return Err(KeyringError::Exists);
        }
        if open.len() >= keys_max {
            return Err(KeyringError::Full);
        }
        let id = KeyId::from_bytes(random_bytes(random).map_err(CryptoError::from)?);
        let version = KeyVersion::FIRST;
        let sealed = match import {
            Some(key) => open.shield.seal(&id, version, key, nonces)?,
            None => {
                let key = random_secret::<KEY_LEN>(random).map_err(CryptoError::from)?;
                open.shield.seal(&id, version, key.expose_secret(), nonces)?
            }
        };
        let record = KeyRecord { name: name.as_str().into(), id, version, created: now, uses: 0, sealed };
        let slot = open.insert(record)?;
        open.summary(slot)
    }

    /// Takes a key away and gives its id.
    pub(crate) fn remove(&mut self, _permit: &Permit, key: Selector<'_>) -> Result<KeyId, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        open.take(slot).ok_or(KeyringError::NotFound)
    }

    /// What is known of a key.
    pub(crate) fn describe(
        &mut self,
        _permit: &Permit,
        key: Selector<'_>,
    ) -> Result<KeySummary, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        open.summary(slot)
    }

    /// At most 256 keys from `cursor` on, and the cursor of the next page or 0.
    pub(crate) fn page(
        &mut self,
        _permit: &Permit,
        cursor: u64,
    ) -> Result<(Vec<KeySummary>, u64), KeyringError> {
        let (open, _) = self.open()?;
        let mut rows = Vec::with_capacity(PAGE_ROWS_MAX);
        let mut slot = usize::try_from(cursor).unwrap_or(usize::MAX);
        while slot < open.records.len() {
            if open.records.get(slot).is_some_and(Option::is_some) {
                if rows.len() == PAGE_ROWS_MAX {
                    return Ok((rows, slot as u64));
                }
                rows.push(open.summary(u32::try_from(slot).map_err(|_| KeyringError::NotFound)?)?);
            }
            slot = slot.saturating_add(1);
        }
        Ok((rows, 0))
    }

    /// The id and primary version of a key.
    pub(crate) fn primary(
        &mut self,
        _permit: &Permit,
        key: Selector<'_>,
    ) -> Result<(KeyId, KeyVersion), KeyringError> {
        let (open, _) = self.open()?;
        let record = open.slot(key).and_then(|slot| open.record(slot)).ok_or(KeyringError::NotFound)?;
        Ok((record.id, record.version))
    }

    /// Lends a version of a key to `work` and counts the use.
    pub(crate) fn with_key<T>(
        &mut self,
        _permit: &Permit,
        id: &KeyId,
        version: KeyVersion,
        work: impl FnOnce(&ExpandKey) -> T,
    ) -> Result<T, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(Selector::Id(*id)).ok_or(KeyringError::NotFound)?;
        let OpenKeys { shield, records, .. } = open;
        let record = records.get_mut(slot as usize).and_then(Option::as_mut).ok_or(KeyringError::NotFound)?;
        if record.version != version {
            return Err(KeyringError::NotFound);
        }
        let result = shield.with_key(&record.id, version, &record.sealed, work)?;
        record.uses = record.uses.saturating_add(1);
        Ok(result)
    }

    /// Seals every key, name and all, under a random key that is itself sealed under `passphrase_key`; then wipes the
    /// records, the indexes and the pre-key. On an error nothing was changed.
    pub(crate) fn lock(
        &mut self,
        _permit: &Permit,
        passphrase_key: &Secret<KEY_LEN>,
        salt: [u8; LOCK_SALT_LEN],
        random: &mut impl Random,
    ) -> Result<(), KeyringError> {
        let (open, nonces) = self.open()?;
        let lock_key = random_secret::<KEY_LEN>(random).map_err(CryptoError::from)?;
        let record_key = RecordKey::new(lock_key.expose_secret());
        let mut keys = Vec::with_capacity(open.len());
        let OpenKeys { shield, records, .. } = open;
        for record in records.iter() {
            let plain = shield
                .with_key_bytes(&record.id, record.version, &record.sealed, |key| record.to_bytes(key))?;
            keys.push(LockedKey::seal(&record_key, plain, nonces)?);
        }
        let mut sealed_lock_key = *lock_key.expose_secret();
        let lock_key_nonce = nonces.next()?;
        let lock_key_tag = RecordKey::new(passphrase_key.expose_secret())
            .seal(lock_key_nonce, LOCK_KEY_PLACE, &mut sealed_lock_key)
            .map_err(|_| CryptoError::Record)?;
        zeroize_stack::<STACK_WIPE_LEN>();
        // The open state, and with it every record, index and the pre-key, is wiped as it is dropped here.
        self.state =
            State::Locked(LockedKeys { salt, lock_key_nonce, lock_key_tag, lock_key: sealed_lock_key, keys });
        Ok(())
    }

    /// The salt that the passphrase of the lock goes with; none while unlocked.
    pub(crate) fn lock_salt(&self) -> Option<[u8; LOCK_SALT_LEN]> {
        match &self.state {
            State::Locked(locked) => Some(locked.salt),
            State::Open(_) => None,
        }
    }

    /// Opens the lock: a new pre-key, and every key sealed under it. On an error the keyring stays locked.
    pub(crate) fn unlock(
        &mut self,
        _permit: &Permit,
        passphrase_key: &Secret<KEY_LEN>,
        random: &mut impl Random,
    ) -> Result<(), KeyringError> {
        let State::Locked(locked) = &self.state else { return Ok(()) };
        let mut lock_key = Zeroizing::new(locked.lock_key);
        RecordKey::new(passphrase_key.expose_secret())
            .open(locked.lock_key_nonce, LOCK_KEY_PLACE, lock_key.as_mut_slice(), &locked.lock_key_tag)
            .map_err(|_| KeyringError::WrongPassphrase)?;
        let record_key = RecordKey::new(&lock_key);
        let mut open = OpenKeys::new(Shield::new(self.memory, random)?);
        for key in &locked.keys {
            let plain = key.open(&record_key)?;
            let record = KeyRecord::from_bytes(&plain, &mut open.shield, &mut self.nonces)?;
            open.insert(record)?;
        }
        zeroize_stack::<STACK_WIPE_LEN>();
        self.state = State::Open(open);
        Ok(())
    }
}

/// The place of the lock key, and of a key under it, in the additional data of their records.
const LOCK_KEY_PLACE: &[u8] = &[2];
const LOCKED_KEY_PLACE: &[u8] = &[3];

impl KeyRecord {
    /// Secret, id, version, time, uses, name: for a lock. Fixed places, since they never leave this process.
    fn to_bytes(&self, key: &[u8; KEY_LEN]) -> Zeroizing<Vec<u8>> {
        // All of it reserved: a vector that grows leaves a copy of the key behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(LOCKED_KEY_LEN_MAX));
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(self.id.as_bytes());
        bytes.extend_from_slice(&self.version.value().to_be_bytes());
        bytes.extend_from_slice(&self.created.to_be_bytes());
        bytes.extend_from_slice(&self.uses.to_be_bytes());
        bytes.extend_from_slice(self.name.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8], shield: &mut Shield, nonces: &mut RecordNonces) -> Result<Self, CryptoError> {
        fn part<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], CryptoError> {
            let (part, rest) = bytes.split_first_chunk().ok_or(CryptoError::Record)?;
            *bytes = rest;
            Ok(*part)
        }
        let mut rest = bytes;
        let key = Zeroizing::new(part::<KEY_LEN>(&mut rest)?);
        let id = KeyId::from_bytes(part(&mut rest)?);
        let version = KeyVersion::new(u32::from_be_bytes(part(&mut rest)?)).ok_or(CryptoError::Record)?;
        let created = u64::from_be_bytes(part(&mut rest)?);
        let uses = u64::from_be_bytes(part(&mut rest)?);
        let name = std::str::from_utf8(rest).map_err(|_| CryptoError::Record)?;
        let sealed = shield.seal(&id, version, &key, nonces)?;
        Ok(Self { name: name.into(), id, version, created, uses, sealed })
    }
}

impl LockedKey {
    fn seal(
        key: &RecordKey,
        plain: Zeroizing<Vec<u8>>,
        nonces: &mut RecordNonces,
    ) -> Result<Self, CryptoError> {
        let nonce = nonces.next()?;
        let mut plain = plain;
        let tag = key.seal(nonce, LOCKED_KEY_PLACE, &mut plain).map_err(|_| CryptoError::Record)?;
        Ok(Self { nonce, tag, bytes: plain.as_slice().into() })
    }

    fn open(&self, key: &RecordKey) -> Result<Zeroizing<Box<[u8]>>, CryptoError> {
        let mut plain = Zeroizing::new(self.bytes.clone());
        key.open(self.nonce, LOCKED_KEY_PLACE, &mut plain, &self.tag).map_err(|_| CryptoError::Record)?;
        Ok(plain)
    }
}

impl OpenKeys {
    fn new(shield: Shield) -> Self {
        Self {
            shield,
            records: Slots::default(),
            free: Vec::new(),
            by_name: HashTable::new(),
            by_id: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    fn len(&self) -> usize {
        self.records.len().saturating_sub(self.free.len())
    }

    fn record(&self, slot: u32) -> Option<&KeyRecord> {
        self.records.get(slot as usize).and_then(Option::as_ref)
    }

    fn slot(&self, key: Selector<'_>) -> Option<u32> {
        let found = match key {
            Selector::Name(name) => self.by_name.find(self.hasher.hash_one(name.as_str()), |slot| {
                self.record(*slot).is_some_and(|record| record.name == name.as_str())
            }),
            Selector::Id(id) => self.by_id.find(self.hasher.hash_one(id.as_bytes()), |slot| {
                self.record(*slot).is_some_and(|record| record.id == id)
            }),
        };
        found.copied()
    }

    fn insert(&mut self, record: KeyRecord) -> Result<u32, KeyringError> {
        let slot = match self.free.last() {
            Some(slot) => *slot,
            None => u32::try_from(self.records.len()).map_err(|_| KeyringError::Full)?,
        };
        let name_hash = self.hasher.hash_one(record.name.as_str());
        let id_hash = self.hasher.hash_one(record.id.as_bytes());
        match self.records.get_mut(slot as usize) {
            Some(place) => {
                *place = Some(record);
                self.free.pop();
            }
            None => self.records.push(record),
        }
        let Self { records, by_name, by_id, hasher, .. } = self;
        let record = |slot: &u32| records.get(*slot as usize).and_then(Option::as_ref);
        by_name.insert_unique(name_hash, slot, |slot| {
            record(slot).map_or(0, |record| hasher.hash_one(record.name.as_str()))
        });
        by_id.insert_unique(id_hash, slot, |slot| {
            record(slot).map_or(0, |record| hasher.hash_one(record.id.as_bytes()))
        });
        Ok(slot)
    }

    /// Wipes a record where it lies and gives its id.
    fn take(&mut self, slot: u32) -> Option<KeyId> {
        let record = self.record(slot)?;
        let (id, name_hash) = (record.id, self.hasher.hash_one(record.name.as_str()));
        self.shield.evict(&id);
        if let Ok(entry) = self.by_name.find_entry(name_hash, |at| *at == slot) {
            entry.remove();
        }
        if let Ok(entry) = self.by_id.find_entry(self.hasher.hash_one(id.as_bytes()), |at| *at == slot) {
            entry.remove();
        }
        *self.records.get_mut(slot as usize)? = None;
        self.free.push(slot);
        Some(id)
    }

    fn summary(&mut self, slot: u32) -> Result<KeySummary, KeyringError> {
        let Self { shield, records, .. } = self;
        let record = records.get(slot as usize).and_then(Option::as_ref).ok_or(KeyringError::NotFound)?;
        let check_value = shield.with_key_bytes(&record.id, record.version, &record.sealed, |key| {
            ExpandKey::new(key).check_value()
        })?;
        Ok(KeySummary {
            name: record.name.clone(),
            id: record.id,
            primary: record.version,
            check_value,
            created: record.created,
            uses: record.uses,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorize::{self, Peer};
    use crate::crypto::KernelRandom;

    fn permit() -> Permit {
        let policy = authorize::Policy { own_uid: 1, locked: false };
        authorize::authorize(&Peer { uid: 1 }, &kms_protocol::Request::Ping, &policy).unwrap()
    }

    fn keyring() -> Keyring {
        Keyring::new(Policy::Auto, &mut KernelRandom).unwrap()
    }

    fn name(text: &str) -> KeyName<'_> {
        KeyName::parse(text).unwrap()
    }

    #[test]
    fn a_record_with_a_name_of_16_bytes_takes_at_most_160_bytes_with_both_indexes() {
        // A hash table is at least 7/16 full: 4 bytes of slot and 1 of control for each place.
        let indexes = 2 * (5 * 16_usize).div_ceil(7);
        assert!(!CompactString::from("x".repeat(16)).is_heap_allocated());
        assert!(size_of::<Option<KeyRecord>>() + indexes <= 160, "{}", size_of::<Option<KeyRecord>>());
    }

    #[test]
    fn keys_come_back_from_a_lock_as_they_were_and_only_with_the_passphrase() {
        let mut ring = keyring();
        let mut random = KernelRandom;
        let mut before = Vec::new();
        for n in 0..300u64 {
            let mut key = [1; KEY_LEN];
            key[..8].copy_from_slice(&n.to_le_bytes());
            let row =
                ring.add(&permit(), name(&format!("key/{n}")), Some(&key), 1000, 5, &mut random).unwrap();
            ring.with_key(&permit(), &row.id, row.primary, |_| ()).unwrap();
            before.push((row.name.clone(), row.id, row.check_value));
        }
        let right = Secret::from_slice(&[7; KEY_LEN]).unwrap();
        let wrong = Secret::from_slice(&[8; KEY_LEN]).unwrap();
        ring.lock(&permit(), &right, [1; LOCK_SALT_LEN], &mut random).unwrap();
        assert!(ring.is_locked() && ring.len() == 300 && ring.backing().is_none());
        assert!(matches!(ring.page(&permit(), 0), Err(KeyringError::Locked)));
        assert!(matches!(ring.unlock(&permit(), &wrong, &mut random), Err(KeyringError::WrongPassphrase)));
        assert!(ring.is_locked());
        ring.unlock(&permit(), &right, &mut random).unwrap();
        for (key_name, id, check_value) in before {
            let row = ring.describe(&permit(), Selector::Name(name(&key_name))).unwrap();
            assert_eq!((row.id, row.check_value, row.created, row.uses), (id, check_value, 5, 1));
        }
    }

    #[test]
    fn pages_list_every_key_once_and_freed_slots_are_used_again() {
        let mut ring = keyring();
        let mut random = KernelRandom;
        for n in 0..600 {
            ring.add(&permit(), name(&format!("k{n}")), None, 1000, 0, &mut random).unwrap();
        }
        for n in (0..600).step_by(3) {
            ring.remove(&permit(), Selector::Name(name(&format!("k{n}")))).unwrap();
        }
        assert!(matches!(ring.remove(&permit(), Selector::Name(name("k0"))), Err(KeyringError::NotFound)));
        let (mut names, mut cursor) = (Vec::new(), 0);
        loop {
            let (rows, next) = ring.page(&permit(), cursor).unwrap();
            names.extend(rows.iter().map(|row| row.name.clone()));
            if next == 0 {
                break;
            }
            cursor = next;
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 400);
        let slots = |ring: &Keyring| match &ring.state {
            State::Open(open) => open.records.len(),
            State::Locked(_) => 0,
        };
        let before = slots(&ring);
        ring.add(&permit(), name("again"), None, 1000, 0, &mut random).unwrap();
        assert_eq!(slots(&ring), before);
    }

    #[test]
    fn a_full_keyring_a_taken_name_and_an_unknown_version_are_told_apart() {
        let mut ring = keyring();
        let mut random = KernelRandom;
        let row = ring.add(&permit(), name("a"), None, 1, 0, &mut random).unwrap();
        assert!(matches!(ring.add(&permit(), name("a"), None, 2, 0, &mut random), Err(KeyringError::Exists)));
        assert!(matches!(ring.add(&permit(), name("b"), None, 1, 0, &mut random), Err(KeyringError::Full)));
        let version = KeyVersion::new(2).unwrap();
        assert!(matches!(ring.with_key(&permit(), &row.id, version, |_| ()), Err(KeyringError::NotFound)));
    }

    #[test]
    fn no_randomness_makes_no_key_and_changes_nothing() {
        struct Broken;
        impl Random for Broken {
            fn fill(&mut self, _bytes: &mut [u8]) -> Result<(), crate::crypto::RandomUnavailable> {
                Err(crate::crypto::RandomUnavailable)
            }
        }
        let mut ring = keyring();
        assert!(matches!(
            ring.add(&permit(), name("a"), None, 9, 0, &mut Broken),
            Err(KeyringError::Crypto(_))
        ));
        let key = Secret::zeroed();
        assert!(ring.lock(&permit(), &key, [0; LOCK_SALT_LEN], &mut Broken).is_err());
        assert!(!ring.is_locked() && ring.is_empty());
    }
}
