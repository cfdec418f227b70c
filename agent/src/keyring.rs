//! The keys that the agent holds, and their lock.
//!
//! Owns the records and their versions, the indexes by name and by id, constraints, use counts, deadlines, and what a lock
//! makes of all that. It does nothing without a [`Permit`]. It never sees a socket, a frame or an opcode, and key bytes only
//! pass through it sealed or as an argument of a closure.

mod locked;

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use compact_str::CompactString;
use hashbrown::HashTable;
use kms_envelope::{ExpandKey, KEY_LEN, KeyId, KeyVersion, RecordKey};
use kms_protocol::{KeyName, PAGE_ROWS_MAX};
use kms_secret_memory::{Backing, Policy, Secret};
use thiserror::Error;
use zeroize::Zeroize;

use self::locked::{LOCK_KEY_PLACE, LockCheck, LockedKey, lock_key};
use crate::{
    authorize::Permit,
    constraints::Constraints,
    crypto::{
        CryptoError, LOCK_SALT_LEN, Random, RecordNonces, SealedKey, Shield, apart, random_bytes,
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
    /// The configured number of keys or versions is reached.
    #[error("the keyring is full")]
    Full,
    /// The key was used as often as it may be.
    #[error("the key has no use left")]
    UsedUp,
    /// A person would have to say yes.
    #[error("the key asks for a confirmation")]
    Unconfirmed,
    /// The key was not added to be exported.
    #[error("the key is not exportable")]
    NotExportable,
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

/// A key that was looked up for this request, and its primary version then.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    slot: u32,
    pub(crate) id: KeyId,
    pub(crate) primary: KeyVersion,
}

/// What is known of a key, without its secret.
pub(crate) struct KeySummary {
    pub(crate) name: CompactString,
    pub(crate) id: KeyId,
    pub(crate) primary: KeyVersion,
    pub(crate) versions: u32,
    pub(crate) check_value: [u8; 8],
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) uses: u64,
    /// Since boot.
    pub(crate) expires: Option<Duration>,
    pub(crate) constraints: Constraints,
}

impl Drop for KeySummary {
    fn drop(&mut self) {
        self.name.zeroize();
    }
}

/// What is known of a version.
pub(crate) struct VersionSummary {
    pub(crate) version: KeyVersion,
    pub(crate) check_value: [u8; 8],
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) uses: u64,
}

/// A version of a key as it lies in ordinary memory.
#[derive(Clone)]
struct VersionRecord {
    version: KeyVersion,
    created: u64,
    uses: u64,
    sealed: SealedKey,
}

/// The constraints of a key without [`Rare`]: in this release every key lives in memory only.
const PLAIN: Constraints =
    Constraints { memory_only: true, lifetime: None, confirm: false, max_uses: None, exportable: false };

/// What most keys do not have.
struct Rare {
    constraints: Constraints,
    /// Since boot.
    expires: Option<Duration>,
    /// In ascending order, all below the primary one.
    older: Vec<VersionRecord>,
    /// Uses of them.
    older_uses: u64,
}

/// A key as it lies in ordinary memory.
struct KeyRecord {
    name: CompactString,
    id: KeyId,
    primary: VersionRecord,
    rare: Option<Box<Rare>>,
}

impl Default for Rare {
    fn default() -> Self {
        Self { constraints: PLAIN, expires: None, older: Vec::new(), older_uses: 0 }
    }
}

impl Rare {
    fn place(&self, version: KeyVersion) -> Option<usize> {
        self.older.binary_search_by_key(&version, |old| old.version).ok()
    }

    /// Keeps a version that is primary no more. A vector that grows by itself leaves sealed keys behind, where no removal finds
    /// them.
    fn keep(&mut self, version: VersionRecord) {
        if self.older.len() == self.older.capacity() {
            let mut larger = Vec::with_capacity(self.older.len().saturating_mul(2).max(1));
            larger.extend_from_slice(&self.older);
            self.older = larger;
        }
        self.older_uses = self.older_uses.saturating_add(version.uses);
        self.older.push(version);
    }
}

impl Drop for KeyRecord {
    fn drop(&mut self) {
        self.name.zeroize();
    }
}

/// What is left of the keyring while the agent is locked.
struct LockedKeys {
    keys: Vec<LockedKey>,
    /// The earliest deadline.
    next: Option<Duration>,
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
    /// When which slot is to be emptied.
    deadlines: BTreeSet<(Duration, u32)>,
    /// Versions that are not primary, of all keys.
    older_versions: usize,
}

/// Records in blocks that never move: a vector that grows leaves names behind, where no lock finds them.
#[derive(Default)]
struct Slots(Vec<Vec<Option<KeyRecord>>>);

impl Slots {
    const BLOCK: usize = 256;

    /// Counts a use that is allowed, and gives the sealed bytes of the version.
    fn count_use(&mut self, key: &Found, version: KeyVersion) -> Result<&SealedKey, KeyringError> {
        let record = self.get_mut(key.slot as usize).and_then(Option::as_mut);
        record.and_then(|record| record.count_use(version)).ok_or(KeyringError::NotFound)
    }

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
    Open(Box<OpenKeys>),
    Locked(LockedKeys),
}

/// All keys.
pub struct Keyring {
    state: State,
    /// Of the latest lock; what it checks outlives the unlock.
    check: Option<LockCheck>,
    nonces: RecordNonces,
    memory: Policy,
    /// Uses of keys, also of keys that are gone.
    uses: u64,
}

impl Keyring {
    /// An empty keyring with a fresh pre-key in memory of the wanted kind.
    ///
    /// # Errors
    /// [`CryptoError`] where such memory or randomness is not to be had.
    pub fn new(memory: Policy, random: &mut impl Random) -> Result<Self, CryptoError> {
        let state = State::Open(Box::new(OpenKeys::new(Shield::new(memory, random)?)));
        Ok(Self { state, check: None, nonces: RecordNonces::default(), memory, uses: 0 })
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

    /// Number of versions of all keys.
    pub(crate) fn versions(&self) -> usize {
        match &self.state {
            State::Open(open) => open.len().saturating_add(open.older_versions),
            State::Locked(locked) => locked.keys.len(),
        }
    }

    /// Uses of keys since the start.
    pub(crate) fn uses(&self) -> u64 {
        self.uses
    }

    /// Wipes everything that can be derived again, because nobody is using it.
    pub fn cool(&mut self) {
        if let State::Open(open) = &mut self.state {
            open.shield.cool();
        }
    }

    /// When the next key is to be wiped, since boot.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Open(open) => open.deadlines.first().map(|(deadline, _)| *deadline),
            State::Locked(locked) => locked.next,
        }
    }

    /// Wipes every key whose time has come, locked or not, and tells the ids of those that were in reach.
    pub(crate) fn expire(&mut self, now: Duration) -> Vec<KeyId> {
        let mut gone = Vec::new();
        match &mut self.state {
            State::Open(open) => {
                while let Some((deadline, slot)) = open.deadlines.first().copied()
                    && deadline <= now
                {
                    open.deadlines.pop_first();
                    gone.extend(open.take(slot));
                }
            }
            State::Locked(locked) => {
                if locked.next.is_some_and(|next| next <= now) {
                    locked.keys.retain(|key| key.expires.is_none_or(|expires| expires > now));
                    locked.next = locked.keys.iter().filter_map(|key| key.expires).min();
                }
            }
        }
        gone
    }

    fn open(&mut self) -> Result<(&mut OpenKeys, &mut RecordNonces), KeyringError> {
        match &mut self.state {
            State::Open(open) => Ok((open, &mut self.nonces)),
            State::Locked(_) => Err(KeyringError::Locked),
        }
    }

    /// Adds a key: these bytes, or random ones. Its lifetime begins at `boot`, `unix` is when it was made.
    #[expect(clippy::too_many_arguments, reason = "each is a part of what a key is made of")]
    pub(crate) fn add(
        &mut self,
        _permit: &Permit,
        name: KeyName<'_>,
        import: Option<&[u8; KEY_LEN]>,
        constraints: Constraints,
        keys_max: usize,
        boot: Duration,
        unix: u64,
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
            None => open.shield.seal_new(&id, version, nonces, random)?,
        };
        let rare = (constraints != PLAIN).then(|| {
            // A moment that no clock reaches is none.
            let expires = constraints.lifetime.and_then(|lifetime| boot.checked_add(lifetime));
            Box::new(Rare { constraints, expires, ..Rare::default() })
        });
        let primary = VersionRecord { version, created: unix, uses: 0, sealed };
        let slot = open.insert(KeyRecord { name: name.as_str().into(), id, primary, rare })?;
        open.summary(slot)
    }

    /// Takes a key away and gives its id.
    pub(crate) fn remove(&mut self, _permit: &Permit, key: Selector<'_>) -> Result<KeyId, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        open.take(slot).ok_or(KeyringError::NotFound)
    }

    /// Takes every key away and gives their number.
    pub(crate) fn remove_all(&mut self, _permit: &Permit) -> Result<usize, KeyringError> {
        let (open, _) = self.open()?;
        let slots = u32::try_from(open.records.len()).unwrap_or(u32::MAX);
        Ok((0..slots).filter_map(|slot| open.take(slot)).count())
    }

    /// Wipes every key that no lock has sealed, with its name, takes a new pre-key, and gives the number of the keys. It needs no
    /// permit: nobody is given anything.
    pub(crate) fn forget(&mut self, random: &mut impl Random) -> usize {
        let State::Open(open) = &mut self.state else { return 0 };
        let keys = open.len();
        match Shield::new(self.memory, random) {
            Ok(shield) => **open = OpenKeys::new(shield),
            // Under the old pre-key there is nothing left.
            Err(_) => {
                let slots = u32::try_from(open.records.len()).unwrap_or(u32::MAX);
                for slot in 0..slots {
                    open.take(slot);
                }
                open.shield.cool();
            }
        }
        keys
    }

    /// Adds a random version to a key and makes it primary.
    pub(crate) fn rotate(
        &mut self,
        _permit: &Permit,
        key: Selector<'_>,
        versions_max: usize,
        unix: u64,
        random: &mut impl Random,
    ) -> Result<KeySummary, KeyringError> {
        let (open, nonces) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        if open.len().saturating_add(open.older_versions) >= versions_max {
            return Err(KeyringError::Full);
        }
        let OpenKeys { shield, records, older_versions, .. } = open;
        let record = records.get_mut(slot as usize).and_then(Option::as_mut).ok_or(KeyringError::NotFound)?;
        // A number is never given out twice, so the last one is the end.
        let next = record.primary.version.value().checked_add(1).and_then(KeyVersion::new);
        let version = next.ok_or(KeyringError::Full)?;
        let sealed = shield.seal_new(&record.id, version, nonces, random)?;
        let primary = VersionRecord { version, created: unix, uses: 0, sealed };
        record.rare.get_or_insert_default().keep(record.primary.clone());
        record.primary = primary;
        *older_versions = older_versions.saturating_add(1);
        open.summary(slot)
    }

    /// Gives a key another name, and gives its id.
    pub(crate) fn rename(
        &mut self,
        _permit: &Permit,
        key: Selector<'_>,
        name: KeyName<'_>,
    ) -> Result<KeyId, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        match open.slot(Selector::Name(name)) {
            Some(taken) if taken != slot => return Err(KeyringError::Exists),
            Some(_) => {}
            None => {
                open.forget_name(slot);
                if let Some(record) = open.records.get_mut(slot as usize).and_then(Option::as_mut) {
                    record.name.zeroize();
                    record.name = name.as_str().into();
                }
                open.index_name(slot);
            }
        }
        open.record(slot).map(|record| record.id).ok_or(KeyringError::NotFound)
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

    /// At most 256 versions of a key above `after`, in ascending order, and whether there are more.
    pub(crate) fn versions_after(
        &mut self,
        _permit: &Permit,
        key: Selector<'_>,
        after: u32,
    ) -> Result<(Vec<VersionSummary>, bool), KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        let OpenKeys { shield, records, .. } = open;
        let record = records.get(slot as usize).and_then(Option::as_ref).ok_or(KeyringError::NotFound)?;
        let mut above = record.versions().skip_while(|version| version.version.value() <= after);
        let rows = above.by_ref().take(PAGE_ROWS_MAX).map(|version| {
            let check_value = check_value(shield, &record.id, version)?;
            let VersionRecord { version, created, uses, .. } = version;
            Ok(VersionSummary { version: *version, check_value, created: *created, uses: *uses })
        });
        let rows = rows.collect::<Result<_, KeyringError>>()?;
        Ok((rows, above.next().is_some()))
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

    /// Looks a key up.
    pub(crate) fn find(&mut self, _permit: &Permit, key: Selector<'_>) -> Result<Found, KeyringError> {
        let (open, _) = self.open()?;
        let slot = open.slot(key).ok_or(KeyringError::NotFound)?;
        let record = open.record(slot).ok_or(KeyringError::NotFound)?;
        Ok(Found { slot, id: record.id, primary: record.primary.version })
    }

    /// The name of a key.
    pub(crate) fn name(&mut self, _permit: &Permit, key: &Found) -> Result<CompactString, KeyringError> {
        let (open, _) = self.open()?;
        open.record(key.slot).map(|record| record.name.clone()).ok_or(KeyringError::NotFound)
    }

    /// Lends a version of a key to `work` and counts the use, whatever becomes of it.
    pub(crate) fn with_key<T>(
        &mut self,
        _permit: &Permit,
        key: &Found,
        version: KeyVersion,
        work: impl FnOnce(&ExpandKey) -> T,
    ) -> Result<T, KeyringError> {
        let (open, _) = self.open()?;
        open.may_use(key, version, 1)?;
        let OpenKeys { shield, records, .. } = open;
        let sealed = records.count_use(key, version)?;
        let result = shield.with_key(&key.id, version, sealed, work)?;
        self.uses = self.uses.saturating_add(1);
        Ok(result)
    }

    /// Lends two key versions to `work` and counts a use of each, whatever becomes of them.
    pub(crate) fn with_keys<T>(
        &mut self,
        _permit: &Permit,
        (key, version): (&Found, KeyVersion),
        (to, to_version): (&Found, KeyVersion),
        work: impl FnOnce(&ExpandKey, &ExpandKey) -> T,
    ) -> Result<T, KeyringError> {
        let (open, _) = self.open()?;
        open.may_use(key, version, if key.slot == to.slot { 2 } else { 1 })?;
        open.may_use(to, to_version, 1)?;
        let sealed = open.records.count_use(key, version)?.clone();
        let to_sealed = open.records.count_use(to, to_version)?.clone();
        let first = (&key.id, version, &sealed);
        let result = open.shield.with_keys(first, (&to.id, to_version, &to_sealed), work)?;
        self.uses = self.uses.saturating_add(2);
        Ok(result)
    }

    /// Whether the bytes of a key may be had at all.
    pub(crate) fn check_exportable(&mut self, _permit: &Permit, key: &Found) -> Result<(), KeyringError> {
        let (open, _) = self.open()?;
        let record = open.record(key.slot).ok_or(KeyringError::NotFound)?;
        let exportable = record.rare.as_ref().is_some_and(|rare| rare.constraints.exportable);
        if exportable { Ok(()) } else { Err(KeyringError::NotExportable) }
    }

    /// Lends the bytes of a version of an exportable key to `work` and counts the use.
    pub(crate) fn export<T>(
        &mut self,
        permit: &Permit,
        key: &Found,
        version: KeyVersion,
        work: impl FnOnce(&[u8; KEY_LEN]) -> T,
    ) -> Result<T, KeyringError> {
        self.check_exportable(permit, key)?;
        let (open, _) = self.open()?;
        open.may_use(key, version, 1)?;
        let OpenKeys { shield, records, .. } = open;
        let sealed = records.count_use(key, version)?;
        let result = shield.with_key_bytes(&key.id, version, sealed, work)?;
        self.uses = self.uses.saturating_add(1);
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
        let (check, keys) = apart(|| {
            let lock_key = random_secret::<KEY_LEN>(random).map_err(CryptoError::from)?;
            let record_key = RecordKey::new(lock_key.expose_secret());
            let mut keys = Vec::with_capacity(open.len());
            let OpenKeys { shield, records, .. } = &mut *open;
            for record in records.iter() {
                keys.push(LockedKey::seal(&record_key, record, shield, nonces)?);
            }
            let mut check =
                LockCheck { salt, nonce: nonces.next()?, tag: Default::default(), lock_key: [0; KEY_LEN] };
            check.lock_key = *lock_key.expose_secret();
            let passphrase_key = RecordKey::new(passphrase_key.expose_secret());
            match passphrase_key.seal(check.nonce, LOCK_KEY_PLACE, &mut check.lock_key) {
                Ok(tag) => check.tag = tag,
                Err(_) => {
                    check.lock_key.zeroize();
                    return Err(CryptoError::Record);
                }
            }
            Ok((check, keys))
        })?;
        let next = open.deadlines.first().map(|(deadline, _)| *deadline);
        self.check = Some(check);
        // The open state, and with it every record, index and the pre-key, is wiped as it is dropped here.
        self.state = State::Locked(LockedKeys { keys, next });
        Ok(())
    }

    /// The salt that the passphrase of the latest lock goes with; none where there was no lock.
    pub(crate) fn lock_salt(&self) -> Option<[u8; LOCK_SALT_LEN]> {
        self.check.as_ref().map(|check| check.salt)
    }

    /// Whether this is what the passphrase of the latest lock gave.
    pub(crate) fn check_passphrase(
        &self,
        _permit: &Permit,
        passphrase_key: &Secret<KEY_LEN>,
    ) -> Result<(), KeyringError> {
        apart(|| lock_key(self.check.as_ref(), passphrase_key).map(|_| ()))
    }

    /// Opens the lock: a new pre-key, and every key sealed under it. On an error the keyring stays locked.
    pub(crate) fn unlock(
        &mut self,
        _permit: &Permit,
        passphrase_key: &Secret<KEY_LEN>,
        random: &mut impl Random,
    ) -> Result<(), KeyringError> {
        let State::Locked(locked) = &self.state else { return Ok(()) };
        let (memory, nonces) = (self.memory, &mut self.nonces);
        let check = self.check.as_ref();
        let open = apart(|| {
            let record_key = RecordKey::new(&*lock_key(check, passphrase_key)?);
            let mut open = Box::new(OpenKeys::new(Shield::new(memory, random)?));
            for key in &locked.keys {
                let plain = key.open(&record_key)?;
                let record = KeyRecord::from_bytes(&plain, &mut open.shield, nonces)?;
                open.insert(record)?;
            }
            Ok::<_, KeyringError>(open)
        })?;
        self.state = State::Open(open);
        Ok(())
    }
}

impl KeyRecord {
    /// Every version, in ascending order.
    fn versions(&self) -> impl Iterator<Item = &VersionRecord> {
        let older = self.rare.as_ref().map_or(&[][..], |rare| &rare.older);
        older.iter().chain(std::iter::once(&self.primary))
    }

    fn has(&self, version: KeyVersion) -> bool {
        let older = || self.rare.as_ref()?.place(version);
        self.primary.version == version || older().is_some()
    }

    /// Counts a use of a version, and gives its sealed bytes.
    fn count_use(&mut self, version: KeyVersion) -> Option<&SealedKey> {
        let used = if self.primary.version == version {
            &mut self.primary
        } else {
            let rare = self.rare.as_mut()?;
            let place = rare.place(version)?;
            rare.older_uses = rare.older_uses.saturating_add(1);
            rare.older.get_mut(place)?
        };
        used.uses = used.uses.saturating_add(1);
        Some(&used.sealed)
    }

    fn uses(&self) -> u64 {
        let older = self.rare.as_ref().map_or(0, |rare| rare.older_uses);
        self.primary.uses.saturating_add(older)
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
            deadlines: BTreeSet::new(),
            older_versions: 0,
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
        let id_hash = self.hasher.hash_one(record.id.as_bytes());
        if let Some(rare) = &record.rare {
            self.older_versions = self.older_versions.saturating_add(rare.older.len());
            self.deadlines.extend(rare.expires.map(|expires| (expires, slot)));
        }
        match self.records.get_mut(slot as usize) {
            Some(place) => {
                *place = Some(record);
                self.free.pop();
            }
            None => self.records.push(record),
        }
        self.index_name(slot);
        let Self { records, by_id, hasher, .. } = self;
        let record = |slot: &u32| records.get(*slot as usize).and_then(Option::as_ref);
        by_id.insert_unique(id_hash, slot, |slot| {
            record(slot).map_or(0, |record| hasher.hash_one(record.id.as_bytes()))
        });
        Ok(slot)
    }

    fn index_name(&mut self, slot: u32) {
        let Self { records, by_name, hasher, .. } = self;
        let hash = |slot: &u32| {
            let record = records.get(*slot as usize).and_then(Option::as_ref);
            record.map_or(0, |record| hasher.hash_one(record.name.as_str()))
        };
        by_name.insert_unique(hash(&slot), slot, hash);
    }

    fn forget_name(&mut self, slot: u32) {
        let Some(record) = self.record(slot) else { return };
        let hash = self.hasher.hash_one(record.name.as_str());
        if let Ok(entry) = self.by_name.find_entry(hash, |at| *at == slot) {
            entry.remove();
        }
    }

    /// Wipes a record where it lies and gives its id.
    fn take(&mut self, slot: u32) -> Option<KeyId> {
        self.forget_name(slot);
        let record = self.record(slot)?;
        let id = record.id;
        if let Some(rare) = &record.rare {
            let (older, expires) = (rare.older.len(), rare.expires);
            self.older_versions = self.older_versions.saturating_sub(older);
            if let Some(expires) = expires {
                self.deadlines.remove(&(expires, slot));
            }
        }
        self.shield.evict(&id);
        if let Ok(entry) = self.by_id.find_entry(self.hasher.hash_one(id.as_bytes()), |at| *at == slot) {
            entry.remove();
        }
        *self.records.get_mut(slot as usize)? = None;
        self.free.push(slot);
        Some(id)
    }

    /// Whether a version of the key can be used so many times now.
    fn may_use(&self, key: &Found, version: KeyVersion, times: u64) -> Result<(), KeyringError> {
        let record = self.record(key.slot).filter(|record| record.id == key.id);
        let record = record.ok_or(KeyringError::NotFound)?;
        if !record.has(version) {
            return Err(KeyringError::NotFound);
        }
        let Some(Rare { constraints, .. }) = record.rare.as_deref() else { return Ok(()) };
        if constraints.confirm {
            return Err(KeyringError::Unconfirmed);
        }
        match constraints.max_uses {
            Some(max) if max.get().saturating_sub(record.uses()) < times => Err(KeyringError::UsedUp),
            _ => Ok(()),
        }
    }

    fn summary(&mut self, slot: u32) -> Result<KeySummary, KeyringError> {
        let Self { shield, records, .. } = self;
        let record = records.get(slot as usize).and_then(Option::as_ref).ok_or(KeyringError::NotFound)?;
        let rare = record.rare.as_deref();
        Ok(KeySummary {
            name: record.name.clone(),
            id: record.id,
            primary: record.primary.version,
            versions: u32::try_from(record.versions().count()).unwrap_or(u32::MAX),
            check_value: check_value(shield, &record.id, &record.primary)?,
            created: record.versions().next().map_or(0, |first| first.created),
            uses: record.uses(),
            expires: rare.and_then(|rare| rare.expires),
            constraints: rare.map_or(PLAIN, |rare| rare.constraints),
        })
    }
}

fn check_value(shield: &mut Shield, id: &KeyId, version: &VersionRecord) -> Result<[u8; 8], CryptoError> {
    shield.with_key_bytes(id, version.version, &version.sealed, |key| ExpandKey::new(key).check_value())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

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

    const BOOT: Duration = Duration::from_secs(100);

    fn add(
        ring: &mut Keyring,
        text: &str,
        import: Option<&[u8; KEY_LEN]>,
        keys_max: usize,
        random: &mut impl Random,
    ) -> Result<KeySummary, KeyringError> {
        ring.add(&permit(), name(text), import, PLAIN, keys_max, BOOT, 5, random)
    }

    fn add_with(ring: &mut Keyring, text: &str, constraints: Constraints) -> KeySummary {
        ring.add(&permit(), name(text), None, constraints, 1000, BOOT, 5, &mut KernelRandom).unwrap()
    }

    fn use_key(ring: &mut Keyring, id: KeyId, version: KeyVersion) -> Result<(), KeyringError> {
        let key = ring.find(&permit(), Selector::Id(id))?;
        ring.with_key(&permit(), &key, version, |_| ())
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
            let row = add(&mut ring, &format!("key/{n}"), Some(&key), 1000, &mut random).unwrap();
            use_key(&mut ring, row.id, row.primary).unwrap();
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
            add(&mut ring, &format!("k{n}"), None, 1000, &mut random).unwrap();
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
        add(&mut ring, "again", None, 1000, &mut random).unwrap();
        assert_eq!(slots(&ring), before);
    }

    #[test]
    fn a_full_keyring_a_taken_name_and_an_unknown_version_are_told_apart() {
        let mut ring = keyring();
        let mut random = KernelRandom;
        let row = add(&mut ring, "a", None, 1, &mut random).unwrap();
        assert!(matches!(add(&mut ring, "a", None, 2, &mut random), Err(KeyringError::Exists)));
        assert!(matches!(add(&mut ring, "b", None, 1, &mut random), Err(KeyringError::Full)));
        let version = KeyVersion::new(2).unwrap();
        assert!(matches!(use_key(&mut ring, row.id, version), Err(KeyringError::NotFound)));
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
        assert!(matches!(add(&mut ring, "a", None, 9, &mut Broken), Err(KeyringError::Crypto(_))));
        let key = Secret::zeroed();
        assert!(ring.lock(&permit(), &key, [0; LOCK_SALT_LEN], &mut Broken).is_err());
        assert!(!ring.is_locked() && ring.is_empty());
    }

    #[test]
    fn older_versions_constraints_and_deadlines_come_back_from_a_lock() {
        let mut ring = keyring();
        let constraints = Constraints {
            lifetime: Some(Duration::from_secs(50)),
            max_uses: NonZeroU64::new(7),
            exportable: true,
            ..PLAIN
        };
        let id = add_with(&mut ring, "a", constraints).id;
        let key = Selector::Id(id);
        for version in 2..=300 {
            let row = ring.rotate(&permit(), key, 1000, u64::from(version), &mut KernelRandom).unwrap();
            assert_eq!(row.primary.value(), version);
        }
        use_key(&mut ring, id, KeyVersion::new(17).unwrap()).unwrap();
        let seen = |ring: &mut Keyring| {
            let row = ring.describe(&permit(), key).unwrap();
            let (first, more) = ring.versions_after(&permit(), key, 0).unwrap();
            let (rest, end) = ring.versions_after(&permit(), key, 256).unwrap();
            assert!(more && !end && first.len() == 256 && rest.len() == 44);
            let versions: Vec<_> = first
                .iter()
                .chain(&rest)
                .map(|v| (v.version.value(), v.check_value, v.created, v.uses))
                .collect();
            (row.constraints, row.expires, row.versions, row.uses, row.created, versions)
        };
        let before = seen(&mut ring);
        assert_eq!((before.1, before.2, before.3, before.4), (Some(Duration::from_secs(150)), 300, 1, 5));
        let passphrase = Secret::from_slice(&[7; KEY_LEN]).unwrap();
        ring.lock(&permit(), &passphrase, [1; LOCK_SALT_LEN], &mut KernelRandom).unwrap();
        assert_eq!(ring.next_deadline(), Some(Duration::from_secs(150)));
        ring.unlock(&permit(), &passphrase, &mut KernelRandom).unwrap();
        assert!(seen(&mut ring) == before);
        assert_eq!(ring.versions(), 300);
    }

    #[test]
    fn a_key_goes_at_its_deadline_and_not_before_locked_or_not() {
        for locked in [false, true] {
            let mut ring = keyring();
            for (text, lifetime) in [("a", 10), ("b", 10), ("c", 20)] {
                let lifetime = Some(Duration::from_secs(lifetime));
                add_with(&mut ring, text, Constraints { lifetime, ..PLAIN });
            }
            add_with(&mut ring, "stays", Constraints { lifetime: Some(Duration::MAX), ..PLAIN });
            ring.remove(&permit(), Selector::Name(name("b"))).unwrap();
            let passphrase = Secret::from_slice(&[7; KEY_LEN]).unwrap();
            if locked {
                ring.lock(&permit(), &passphrase, [1; LOCK_SALT_LEN], &mut KernelRandom).unwrap();
            }
            let nearly = BOOT + Duration::from_secs(10) - Duration::from_nanos(1);
            assert!(ring.expire(nearly).is_empty() && ring.len() == 3);
            assert_eq!(ring.expire(BOOT + Duration::from_secs(10)).len(), usize::from(!locked));
            assert_eq!((ring.len(), ring.next_deadline()), (2, Some(BOOT + Duration::from_secs(20))));
            ring.expire(BOOT + Duration::from_secs(20));
            assert_eq!((ring.len(), ring.next_deadline()), (1, None));
            if locked {
                ring.unlock(&permit(), &passphrase, &mut KernelRandom).unwrap();
            }
            assert!(ring.describe(&permit(), Selector::Name(name("stays"))).is_ok());
            assert!(ring.describe(&permit(), Selector::Name(name("a"))).is_err());
        }
    }

    #[test]
    fn uses_are_exact_and_a_refused_one_does_not_count() {
        let mut ring = keyring();
        let max_uses = NonZeroU64::new(3);
        let row = add_with(&mut ring, "a", Constraints { max_uses, ..PLAIN });
        let key = ring.find(&permit(), Selector::Id(row.id)).unwrap();
        let both = |ring: &mut Keyring| {
            ring.with_keys(&permit(), (&key, row.primary), (&key, row.primary), |_, _| ())
        };
        both(&mut ring).unwrap();
        assert!(matches!(both(&mut ring), Err(KeyringError::UsedUp)));
        ring.rotate(&permit(), Selector::Id(row.id), 9, 0, &mut KernelRandom).unwrap();
        use_key(&mut ring, row.id, row.primary).unwrap();
        assert!(matches!(use_key(&mut ring, row.id, row.primary), Err(KeyringError::UsedUp)));
        assert!(matches!(
            use_key(&mut ring, row.id, KeyVersion::new(9).unwrap()),
            Err(KeyringError::NotFound)
        ));
        assert_eq!(ring.describe(&permit(), Selector::Id(row.id)).unwrap().uses, 3);
        let asked = add_with(&mut ring, "b", Constraints { confirm: true, exportable: true, ..PLAIN });
        assert!(matches!(use_key(&mut ring, asked.id, asked.primary), Err(KeyringError::Unconfirmed)));
        let found = ring.find(&permit(), Selector::Id(asked.id)).unwrap();
        assert!(ring.export(&permit(), &found, asked.primary, |_| ()).is_err());
    }

    #[test]
    fn a_rename_keeps_the_key_and_frees_its_name() {
        let mut ring = keyring();
        let row = add(&mut ring, "a", None, 9, &mut KernelRandom).unwrap();
        add(&mut ring, "b", None, 9, &mut KernelRandom).unwrap();
        let mut rename = |from: &str, to: &str| {
            ring.rename(&permit(), Selector::Name(name(from)), name(to)).map(|id| id == row.id)
        };
        assert!(matches!(rename("a", "b"), Err(KeyringError::Exists)));
        assert!(rename("a", "a").unwrap());
        assert!(rename("a", "c").unwrap());
        assert!(matches!(rename("a", "d"), Err(KeyringError::NotFound)));
        assert!(ring.describe(&permit(), Selector::Name(name("c"))).unwrap().id == row.id);
        assert_eq!(ring.remove_all(&permit()).unwrap(), 2);
        assert!(ring.is_empty() && ring.describe(&permit(), Selector::Name(name("c"))).is_err());
    }

    #[test]
    fn a_passphrase_is_checked_after_the_unlock_too() {
        let mut ring = keyring();
        let right = Secret::from_slice(&[7; KEY_LEN]).unwrap();
        let wrong = Secret::from_slice(&[8; KEY_LEN]).unwrap();
        assert!(ring.lock_salt().is_none());
        ring.lock(&permit(), &right, [1; LOCK_SALT_LEN], &mut KernelRandom).unwrap();
        ring.unlock(&permit(), &right, &mut KernelRandom).unwrap();
        assert_eq!(ring.lock_salt(), Some([1; LOCK_SALT_LEN]));
        assert!(ring.check_passphrase(&permit(), &right).is_ok());
        assert!(matches!(ring.check_passphrase(&permit(), &wrong), Err(KeyringError::WrongPassphrase)));
    }
}
