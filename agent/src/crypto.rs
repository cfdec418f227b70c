//! Key material in the agent's memory.
//!
//! Owns shielding (keys lie as sealed records under a key derived from a 16 KiB pre-key in secret memory), the cache of
//! expanded keys in a locked page, and the key derivation of the lock passphrase. Implements "Secrets in memory" of
//! `docs/architecture.md`. It never sees a request, a name or a peer, and no key leaves it but as an argument of a
//! closure.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use kms_envelope::{ExpandKey, KEY_LEN, KeyId, KeyVersion, RECORD_TAG_LEN, RecordKey, SALT_LEN};
use kms_secret_memory::{
    Backing, LockedBox, Policy, RegionError, Secret, SecretRegion, SecretVec, zeroize_stack,
};
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of the pre-key, in bytes: what a side channel has to read without an error before it has one key.
const PRE_KEY_LEN: usize = 16 * 1024;

/// Bytes of stack that are wiped after an operation with a key.
const STACK_WIPE_LEN: usize = 8192;

/// Expanded keys that are kept at hand while the agent is busy.
const HOT_KEYS: usize = 8;

/// Length of the salt of the lock passphrase, in bytes.
pub(crate) const LOCK_SALT_LEN: usize = 16;

/// Argon2id, RFC 9106: 256 MiB, 3 passes, 4 lanes.
const LOCK_MEMORY_KIB: u32 = 256 * 1024;
const LOCK_PASSES: u32 = 3;
const LOCK_LANES: u32 = 4;

/// The source of randomness, which `main` chooses: the kernel's generator in the agent.
pub trait Random {
    /// Fills `bytes` with random bytes.
    ///
    /// # Errors
    /// [`RandomUnavailable`]; there is no other source to fall back to.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), RandomUnavailable>;
}

/// The kernel gave no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the kernel's random generator is not available")]
pub struct RandomUnavailable;

/// `getrandom(2)`, called for every salt and key: a buffer of random bytes would repeat after a snapshot is restored.
pub struct KernelRandom;

impl Random for KernelRandom {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), RandomUnavailable> {
        getrandom::fill(bytes).map_err(|_| RandomUnavailable)
    }
}

/// Random bytes on the heap, wiped when dropped.
pub(crate) fn random_secret<const N: usize>(
    random: &mut impl Random,
) -> Result<Secret<N>, RandomUnavailable> {
    let mut secret = Secret::<N>::zeroed();
    random.fill(secret.expose_secret_mut())?;
    Ok(secret)
}

/// A random value that is no secret.
pub(crate) fn random_bytes<const N: usize>(random: &mut impl Random) -> Result<[u8; N], RandomUnavailable> {
    let mut bytes = [0; N];
    random.fill(&mut bytes)?;
    Ok(bytes)
}

/// Salts for the requests that arrived together. They are drawn after the requests have arrived and thrown away with the
/// last of them: what is restored from a snapshot in between seals the same messages with them, and no others.
#[derive(Default)]
pub(crate) struct Salts {
    drawn: bool,
    ready: Vec<[u8; SALT_LEN]>,
}

impl Salts {
    /// Drawn at once when more than one is wanted.
    const TOGETHER: usize = 16;

    pub(crate) fn next(&mut self, random: &mut impl Random) -> Result<[u8; SALT_LEN], RandomUnavailable> {
        if let Some(salt) = self.ready.pop() {
            return Ok(salt);
        }
        if !self.drawn {
            self.drawn = true;
            return random_bytes(random);
        }
        let mut salts = [[0; SALT_LEN]; Self::TOGETHER];
        random.fill(salts.as_flattened_mut())?;
        self.ready.extend_from_slice(&salts);
        self.ready.pop().ok_or(RandomUnavailable)
    }

    /// Forgets what was drawn for requests that arrived together.
    pub(crate) fn end_batch(&mut self) {
        self.ready.clear();
        self.drawn = false;
    }
}

/// Why a key cannot be used.
#[derive(Debug, Error)]
pub enum CryptoError {
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomUnavailable),
    /// No locked memory.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// A sealed record does not open: memory was changed from outside.
    #[error("a sealed key in memory does not open")]
    Record,
}

/// The nonces of sealed records: one counter for the whole process that is never reset.
#[derive(Default)]
pub(crate) struct RecordNonces(u64);

impl RecordNonces {
    pub(crate) fn next(&mut self) -> Result<u64, CryptoError> {
        self.0 = self.0.checked_add(1).ok_or(CryptoError::Record)?;
        Ok(self.0)
    }
}

/// A key version as it lies in ordinary memory: 56 bytes, and no secret without the shield. Wiped where it lay, since the shield
/// outlives a key that is removed.
#[derive(Clone, ZeroizeOnDrop)]
pub(crate) struct SealedKey {
    nonce: u64,
    tag: [u8; RECORD_TAG_LEN],
    bytes: [u8; KEY_LEN],
}

/// Binds a sealed key to its place, so that records cannot be swapped.
fn record_place(id: &KeyId, version: KeyVersion) -> [u8; 21] {
    const CLASS_KEY_VERSION: u8 = 1;
    let mut place = [CLASS_KEY_VERSION; 21];
    let (id_part, version_part) = place.split_at_mut(16);
    id_part.copy_from_slice(id.as_bytes());
    if let Some(version_part) = version_part.first_chunk_mut() {
        *version_part = version.value().to_be_bytes();
    }
    place
}

struct HotKey {
    id: KeyId,
    version: KeyVersion,
    key: ExpandKey,
}

/// What is kept at hand while the agent is busy, and wiped when it is not.
struct Hot {
    shield: RecordKey,
    keys: [Option<HotKey>; HOT_KEYS],
    next: usize,
}

impl Hot {
    /// Makes sure that a key version is at hand, and says where.
    fn expand(&mut self, id: &KeyId, version: KeyVersion, sealed: &SealedKey) -> Result<usize, CryptoError> {
        let at_hand =
            |entry: &Option<HotKey>| entry.as_ref().is_some_and(|e| e.id == *id && e.version == version);
        if let Some(place) = self.keys.iter().position(at_hand) {
            return Ok(place);
        }
        let mut bytes = sealed.bytes;
        let opened = self.shield.open(sealed.nonce, &record_place(id, version), &mut bytes, &sealed.tag);
        let place = self.next;
        if opened.is_ok()
            && let Some(entry) = self.keys.get_mut(place)
        {
            *entry = Some(HotKey { id: *id, version, key: ExpandKey::new(&bytes) });
            self.next = place.wrapping_add(1) % HOT_KEYS;
        }
        bytes.zeroize();
        opened.map(|()| place).map_err(|_| CryptoError::Record)
    }

    fn at(&self, place: usize) -> Result<&ExpandKey, CryptoError> {
        self.keys.get(place).and_then(Option::as_ref).map(|entry| &entry.key).ok_or(CryptoError::Record)
    }
}

/// Does `work` in a frame of its own, so that all that it leaves on the stack lies in the part that is wiped then. What
/// stands in the caller's own frame would not.
pub(crate) fn apart<T>(work: impl FnOnce() -> T) -> T {
    #[inline(never)]
    fn below<T>(work: impl FnOnce() -> T) -> T {
        work()
    }
    let result = below(work);
    zeroize_stack::<STACK_WIPE_LEN>();
    result
}

/// The shield over all keys: the pre-key in secret memory and what is derived from it.
pub(crate) struct Shield {
    pre_key: SecretRegion,
    hot: Option<LockedBox<Hot>>,
    memory: Policy,
}

impl Shield {
    /// A new pre-key.
    ///
    /// # Errors
    /// [`CryptoError::Memory`] where no memory of the wanted kind is to be had, [`CryptoError::Random`].
    pub(crate) fn new(memory: Policy, random: &mut impl Random) -> Result<Self, CryptoError> {
        let mut pre_key = SecretRegion::new(PRE_KEY_LEN, memory)?;
        random.fill(pre_key.expose_secret_mut())?;
        Ok(Self { pre_key, hot: None, memory })
    }

    /// What memory the pre-key lies in.
    pub(crate) fn backing(&self) -> Backing {
        self.pre_key.backing()
    }

    /// Wipes all that can be derived again from the pre-key.
    pub(crate) fn cool(&mut self) {
        self.hot = None;
    }

    fn hot(&mut self) -> Result<&mut Hot, CryptoError> {
        if self.hot.is_none() {
            let hot = apart(|| {
                let shield = RecordKey::from_pre_key(self.pre_key.expose_secret());
                let hot = Hot { shield, keys: [const { None }; HOT_KEYS], next: 0 };
                LockedBox::with_policy(hot, self.memory)
            });
            self.hot = Some(hot?);
        }
        self.hot.as_mut().map(LockedBox::expose_secret_mut).ok_or(CryptoError::Record)
    }

    /// Seals the bytes of a key version for ordinary memory.
    pub(crate) fn seal(
        &mut self,
        id: &KeyId,
        version: KeyVersion,
        key: &[u8; KEY_LEN],
        nonces: &mut RecordNonces,
    ) -> Result<SealedKey, CryptoError> {
        let nonce = nonces.next()?;
        let hot = self.hot()?;
        apart(|| {
            let mut bytes = *key;
            match hot.shield.seal(nonce, &record_place(id, version), &mut bytes) {
                Ok(tag) => Ok(SealedKey { nonce, tag, bytes }),
                Err(_) => {
                    bytes.zeroize();
                    Err(CryptoError::Record)
                }
            }
        })
    }

    /// Draws the bytes of a new key version and seals them.
    pub(crate) fn seal_new(
        &mut self,
        id: &KeyId,
        version: KeyVersion,
        nonces: &mut RecordNonces,
        random: &mut impl Random,
    ) -> Result<SealedKey, CryptoError> {
        let key = random_secret::<KEY_LEN>(random)?;
        self.seal(id, version, key.expose_secret(), nonces)
    }

    /// Lends the bytes of a key version to `work`, and wipes them and the stack behind it.
    pub(crate) fn with_key_bytes<T>(
        &mut self,
        id: &KeyId,
        version: KeyVersion,
        sealed: &SealedKey,
        work: impl FnOnce(&[u8; KEY_LEN]) -> T,
    ) -> Result<T, CryptoError> {
        let hot = self.hot()?;
        apart(|| {
            let mut bytes = sealed.bytes;
            let opened = hot.shield.open(sealed.nonce, &record_place(id, version), &mut bytes, &sealed.tag);
            let result = opened.map(|()| work(&bytes));
            bytes.zeroize();
            result.map_err(|_| CryptoError::Record)
        })
    }

    /// Lends a key version, expanded, to `work`, and wipes the stack behind it.
    pub(crate) fn with_key<T>(
        &mut self,
        id: &KeyId,
        version: KeyVersion,
        sealed: &SealedKey,
        work: impl FnOnce(&ExpandKey) -> T,
    ) -> Result<T, CryptoError> {
        let hot = self.hot()?;
        apart(|| {
            let place = hot.expand(id, version, sealed)?;
            hot.at(place).map(work)
        })
    }

    /// Lends two key versions, expanded, to `work`, and wipes the stack behind it.
    pub(crate) fn with_keys<T>(
        &mut self,
        first: (&KeyId, KeyVersion, &SealedKey),
        second: (&KeyId, KeyVersion, &SealedKey),
        work: impl FnOnce(&ExpandKey, &ExpandKey) -> T,
    ) -> Result<T, CryptoError> {
        let hot = self.hot()?;
        apart(|| {
            hot.expand(first.0, first.1, first.2)?;
            let second = hot.expand(second.0, second.1, second.2)?;
            // The second may have taken the place of the first; the place after it is another one.
            let first = hot.expand(first.0, first.1, first.2)?;
            Ok(work(hot.at(first)?, hot.at(second)?))
        })
    }

    /// Forgets a key that is at hand.
    pub(crate) fn evict(&mut self, id: &KeyId) {
        let Some(hot) = self.hot.as_mut() else { return };
        for entry in &mut hot.expose_secret_mut().keys {
            if entry.as_ref().is_some_and(|entry| entry.id == *id) {
                *entry = None;
            }
        }
    }
}

/// The work of turning a lock passphrase into a key, to be done off the request path: about a second of CPU and 256 MiB.
pub struct Derivation {
    passphrase: SecretVec,
    salt: [u8; LOCK_SALT_LEN],
}

impl Derivation {
    pub(crate) fn new(passphrase: SecretVec, salt: [u8; LOCK_SALT_LEN]) -> Self {
        Self { passphrase, salt }
    }

    /// Runs Argon2id. `None` when the memory for it is not to be had.
    #[must_use]
    pub fn run(self) -> Option<Secret<KEY_LEN>> {
        let params = Params::new(LOCK_MEMORY_KIB, LOCK_PASSES, LOCK_LANES, Some(KEY_LEN)).ok()?;
        let mut memory = Vec::<Block>::new();
        memory.try_reserve_exact(params.block_count()).ok()?;
        memory.resize(params.block_count(), Block::default());
        let mut key = Secret::<KEY_LEN>::zeroed();
        let derived = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into_with_memory(
                self.passphrase.expose_secret(),
                &self.salt,
                key.expose_secret_mut(),
                &mut memory,
            );
        memory.iter_mut().for_each(Zeroize::zeroize);
        zeroize_stack::<STACK_WIPE_LEN>();
        derived.ok().map(|()| key)
    }
}
