//! The attacker who knows the shielding: takes an image of the agent's memory and makes keys of it.
//!
//! Knows how the agent seals keys in its memory (a shield key from a 16 KiB pre-key; records of counter, tag and 32 sealed
//! bytes; the place of a record as additional data; what a lock makes of them) and nothing about where anything lies: it
//! tries every place. What it recovers is what somebody with that image would have.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::unix::fs::FileExt,
};

use kms_envelope::{KEY_LEN, RECORD_TAG_LEN, RecordKey};

use crate::process::{Range, ranges};

/// Length of the pre-key, in bytes.
pub const PRE_KEY_LEN: usize = 16 * 1024;

const PAGE: usize = 4096;

/// How far from a key's id its sealed bytes are looked for, in bytes.
const NEAR: usize = 256;

/// A counter that is larger was never reached by a test.
const COUNTER_MAX: u64 = 1 << 32;

/// A range of memory with what was in it.
pub struct Part {
    /// Where, and what it is.
    pub range: Range,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// All memory of a process that can be read and is not just a program file.
pub struct Image {
    /// In ascending order of addresses.
    pub parts: Vec<Part>,
    /// What could not be read: pages of secretmem.
    pub unreadable: Vec<Range>,
}

impl Image {
    /// Reads `/proc/PID/mem` as root.
    ///
    /// # Panics
    /// Without root.
    #[must_use]
    pub fn take(pid: i32) -> Self {
        let memory = File::open(format!("/proc/{pid}/mem"))
            .unwrap_or_else(|error| panic!("/proc/{pid}/mem: {error} (this test needs root)"));
        let (mut parts, mut unreadable) = (Vec::new(), Vec::new());
        for range in ranges(pid) {
            let program = range.name.starts_with('/') && !range.permissions.contains('w');
            let kernel = ["[vvar]", "[vvar_vclock]", "[vsyscall]", "[vdso]"].contains(&range.name.as_str());
            if !range.permissions.starts_with('r') || program || kernel {
                continue;
            }
            let len = usize::try_from(range.end - range.start).unwrap();
            let mut bytes = vec![0; len];
            let mut read = memory.read_exact_at(&mut bytes, range.start).is_ok();
            if !read {
                // Page by page: one that is missing hides none that is there.
                for (page, start) in bytes.chunks_mut(PAGE).zip((range.start..).step_by(PAGE)) {
                    read |= memory.read_exact_at(page, start).is_ok();
                }
            }
            if read {
                parts.push(Part { range, bytes });
            } else {
                unreadable.push(range);
            }
        }
        assert!(!parts.is_empty());
        Self { parts, unreadable }
    }

    /// Adds bytes that were got in another way, as a locked range at this address.
    pub fn add(&mut self, start: u64, bytes: Vec<u8>) {
        let end = start + bytes.len() as u64;
        let flags = vec!["lo".to_owned()];
        let range = Range { start, end, permissions: "rw-s".to_owned(), name: "added".to_owned(), flags };
        self.parts.push(Part { range, bytes });
    }

    /// Bytes at an address, if they are in the image.
    #[must_use]
    pub fn at(&self, address: u64, len: usize) -> Option<&[u8]> {
        let part = self.parts.iter().find(|part| (part.range.start..part.range.end).contains(&address))?;
        let offset = usize::try_from(address - part.range.start).ok()?;
        part.bytes.get(offset..offset.checked_add(len)?)
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }

    /// True when nothing was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every 32 bytes at a multiple of eight that could be a random key.
    fn possible_keys(&self) -> impl Iterator<Item = &[u8; KEY_LEN]> {
        self.parts.iter().flat_map(|part| {
            let windows = part.bytes.windows(KEY_LEN).step_by(8);
            windows.filter(|window| is_random(window)).map(|window| window.try_into().unwrap())
        })
    }

    /// Every 16 KiB that could be a pre-key: at each multiple of eight of what is locked, at each page of the rest.
    fn possible_pre_keys(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().flat_map(|part| {
            let step = if part.range.has("lo") { 8 } else { PAGE };
            part.bytes.windows(PRE_KEY_LEN).step_by(step).filter(|window| {
                // Random bytes all along: one page of zeros is enough to say no.
                window.chunks(512).all(|piece| piece[..8] != [0; 8] || piece[8..16] != [0; 8])
            })
        })
    }
}

/// Where the sealed bytes of a key may be.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Spot {
    counter: u64,
    tag: [u8; RECORD_TAG_LEN],
    bytes: [u8; KEY_LEN],
}

/// The records of keys whose ids are known, as far as an image shows them.
pub struct Records {
    spots: HashMap<[u8; 16], HashSet<Spot>>,
}

/// What was recovered.
pub struct Recovered {
    /// Keys by id.
    pub keys: HashMap<[u8; 16], [u8; KEY_LEN]>,
    /// The shield key was found as such.
    pub by_shield_key: bool,
    /// The shield key was derived from a pre-key that was found.
    pub by_pre_key: bool,
}

/// Class, id and version 1: what a record of a key is bound to.
fn place(id: &[u8; 16]) -> [u8; 21] {
    let mut place = [1; 21];
    place[..16].copy_from_slice(id);
    place[16..20].copy_from_slice(&1u32.to_be_bytes());
    place
}

impl Records {
    /// Takes every place near every copy of every id for a record.
    #[must_use]
    pub fn find(image: &Image, ids: &[[u8; 16]]) -> Self {
        let known: HashSet<[u8; 16]> = ids.iter().copied().collect();
        let mut spots: HashMap<[u8; 16], HashSet<Spot>> =
            ids.iter().map(|id| (*id, HashSet::new())).collect();
        for part in &image.parts {
            for (at, window) in part.bytes.windows(16).enumerate() {
                if window[..8] == [0; 8] || !known.contains(window) {
                    continue;
                }
                let id: [u8; 16] = window.try_into().unwrap();
                let from = at.saturating_sub(NEAR).next_multiple_of(8);
                for place in (from..at + NEAR).step_by(8) {
                    spots.entry(id).or_default().extend(spots_at(&part.bytes, place));
                }
            }
        }
        Self { spots }
    }

    /// Number of ids of which something was found that could be a record.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spots.values().filter(|spots| !spots.is_empty()).count()
    }

    /// True when nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn open(&self, id: &[u8; 16], key: &RecordKey) -> Option<[u8; KEY_LEN]> {
        self.spots.get(id)?.iter().find_map(|spot| {
            let mut bytes = spot.bytes;
            key.open(spot.counter, &place(id), &mut bytes, &spot.tag).ok()?;
            Some(bytes)
        })
    }

    fn open_any(&self, probes: &[[u8; 16]], key: &RecordKey) -> bool {
        probes.iter().any(|id| self.open(id, key).is_some())
    }

    /// Opens the records with whatever `image` holds: every possible pre-key and every possible key.
    #[must_use]
    pub fn recover(&self, image: &Image) -> Recovered {
        let mut recovered = Recovered { keys: HashMap::new(), by_shield_key: false, by_pre_key: false };
        // A key that opens none of three opens none: all records are sealed under one.
        let probes: Vec<[u8; 16]> =
            self.spots.iter().filter(|(_, spots)| !spots.is_empty()).map(|(id, _)| *id).take(3).collect();
        let mut take = |key: &RecordKey| {
            let opened = self.spots.keys().filter_map(|id| Some((*id, self.open(id, key)?)));
            recovered.keys.extend(opened);
        };
        let mut seen = HashSet::new();
        for candidate in image.possible_keys() {
            let key = RecordKey::new(candidate);
            if self.open_any(&probes, &key) && seen.insert(*candidate) {
                recovered.by_shield_key = true;
                take(&key);
            }
        }
        for candidate in image.possible_pre_keys() {
            let key = RecordKey::from_pre_key(candidate);
            if self.open_any(&probes, &key) {
                recovered.by_pre_key = true;
                take(&key);
            }
        }
        recovered
    }
}

/// Counter, tag and sealed bytes in any order, from this place on.
fn spots_at(bytes: &[u8], at: usize) -> impl Iterator<Item = Spot> {
    const ORDERS: [[usize; 3]; 6] = [
        [0, 8, 24],  // counter, tag, bytes
        [0, 40, 8],  // counter, bytes, tag
        [16, 0, 24], // tag, counter, bytes
        [48, 0, 16], // tag, bytes, counter
        [32, 40, 0], // bytes, counter, tag
        [48, 32, 0], // bytes, tag, counter
    ];
    ORDERS.into_iter().filter_map(move |[counter, tag, sealed]| {
        spot(word(bytes, at + counter)?, bytes.get(at + tag..)?, bytes.get(at + sealed..)?)
    })
}

/// What begins with a tag, and what begins with sealed bytes, if that can be.
fn spot(counter: u64, tag: &[u8], sealed: &[u8]) -> Option<Spot> {
    let (tag, sealed) = (tag.first_chunk()?, sealed.first_chunk()?);
    let plausible = counter != 0 && counter < COUNTER_MAX && is_random(tag) && is_random(sealed);
    plausible.then_some(Spot { counter, tag: *tag, bytes: *sealed })
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Of random words one in 2^16 is below 2^48, where counts, lengths and pointers are: more than one of them is not random.
fn is_random(bytes: &[u8]) -> bool {
    let low = |chunk: &&[u8]| u64::from_le_bytes((*chunk).try_into().unwrap()) >> 48 == 0;
    bytes.chunks_exact(8).filter(low).count() <= 1
}

/// What a locked agent keeps: keys sealed under a lock key, and that sealed under the passphrase's key.
pub struct LockedRecords {
    /// A sealed key: counter, tag, sealed bytes.
    sealed: Vec<(u64, [u8; RECORD_TAG_LEN], Vec<u8>)>,
    /// What may be the sealed lock key.
    lock_key: HashSet<Spot>,
}

/// Bytes of an element of the list of sealed keys.
const LOCKED_KEY_LEN: usize = 56;

/// Bytes that are sealed of a key with a name of no length and one version, and the most that a test has.
const SEALED_LEN_MIN: usize = 102;
const SEALED_LEN_MAX: usize = SEALED_LEN_MIN + 1024;

/// What sealed keys and the sealed lock key are bound to.
const LOCKED_KEY_PLACE: &[u8] = &[3];
const LOCK_KEY_PLACE: &[u8] = &[2];

impl LockedRecords {
    /// Looks for `count` elements in a row whose counters follow each other, and for what must stand beside them.
    #[must_use]
    pub fn find(image: &Image, count: usize) -> Self {
        let (mut sealed, mut last_counters) = (Vec::new(), HashSet::new());
        for part in &image.parts {
            let word = |at| word(&part.bytes, at).unwrap_or(0);
            for at in (0..part.bytes.len()).step_by(8) {
                let first = word(at);
                if first == 0
                    || first >= COUNTER_MAX
                    || !(1..count).all(|n| word(at + n * LOCKED_KEY_LEN) == first + n as u64)
                {
                    continue;
                }
                last_counters.insert(first + count as u64);
                // The counter may stand anywhere in its element, and so may pointer, length and tag.
                for start in (at.saturating_sub(LOCKED_KEY_LEN - 8)..=at).step_by(8) {
                    for pointer in (start..start + LOCKED_KEY_LEN - 8).step_by(8) {
                        let len = usize::try_from(word(pointer + 8)).unwrap();
                        if !(SEALED_LEN_MIN..SEALED_LEN_MAX).contains(&len) {
                            continue;
                        }
                        let Some(bytes) = image.at(word(pointer), len) else { continue };
                        for tag in (start..start + LOCKED_KEY_LEN - 8).step_by(8) {
                            if let Some(tag) = part.bytes.get(tag..tag + RECORD_TAG_LEN) {
                                sealed.push((first, tag.try_into().unwrap(), bytes.to_vec()));
                            }
                        }
                    }
                }
            }
        }
        let mut lock_key = HashSet::new();
        for part in &image.parts {
            for (at, word) in part.bytes.chunks_exact(8).enumerate() {
                let counter = u64::from_le_bytes(word.try_into().unwrap());
                if !last_counters.contains(&counter) {
                    continue;
                }
                let around = (at * 8).saturating_sub(128)..at * 8 + 128;
                for tag in around.step_by(8) {
                    // In front of it or behind it, with the salt between them or not.
                    for key in [tag + 16, tag + 32, tag.saturating_sub(32), tag.saturating_sub(48)] {
                        let (tag, key) = (part.bytes.get(tag..), part.bytes.get(key..));
                        lock_key.extend(tag.zip(key).and_then(|(tag, key)| spot(counter, tag, key)));
                    }
                }
            }
        }
        Self { sealed, lock_key }
    }

    /// Whether sealed keys, and what may be the sealed lock key, were found.
    #[must_use]
    pub fn found(&self) -> bool {
        !self.sealed.is_empty() && !self.lock_key.is_empty()
    }

    /// Whether this is the key of the passphrase; then the lock key comes back.
    #[must_use]
    pub fn open_lock_key(&self, passphrase_key: &[u8; KEY_LEN]) -> Option<[u8; KEY_LEN]> {
        let key = RecordKey::new(passphrase_key);
        self.lock_key.iter().find_map(|spot| {
            let mut bytes = spot.bytes;
            key.open(spot.counter, LOCK_KEY_PLACE, &mut bytes, &spot.tag).ok().map(|()| bytes)
        })
    }

    /// Whether this is the lock key.
    #[must_use]
    pub fn opens(&self, lock_key: &[u8; KEY_LEN]) -> bool {
        let key = RecordKey::new(lock_key);
        self.sealed.iter().any(|(counter, tag, bytes)| {
            let mut bytes = bytes.clone();
            key.open(*counter, LOCKED_KEY_PLACE, &mut bytes, tag).is_ok()
        })
    }

    /// Every possible key in `image` that opens a sealed key or the sealed lock key.
    #[must_use]
    pub fn keys_in(&self, image: &Image) -> Vec<&'static str> {
        let mut found = Vec::new();
        for candidate in image.possible_keys() {
            if self.opens(candidate) {
                found.push("the lock key");
            }
            if self.open_lock_key(candidate).is_some() {
                found.push("the key of the passphrase");
            }
        }
        found
    }
}

/// What HMAC-SHA-512 keeps of a key: who has these two states can do all that the key can. As they lie in memory.
#[must_use]
pub fn hmac_states(key: &[u8; KEY_LEN]) -> [[u8; 64]; 2] {
    const INITIAL: [u64; 8] = [
        0x6a09_e667_f3bc_c908,
        0xbb67_ae85_84ca_a73b,
        0x3c6e_f372_fe94_f82b,
        0xa54f_f53a_5f1d_36f1,
        0x510e_527f_ade6_82d1,
        0x9b05_688c_2b3e_6c1f,
        0x1f83_d9ab_fb41_bd6b,
        0x5be0_cd19_137e_2179,
    ];
    [0x36, 0x5c].map(|pad| {
        let mut block = [pad; 128];
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        let mut state = INITIAL;
        sha2::block_api::compress512(&mut state, &[block]);
        let mut bytes = [0; 64];
        for (to, word) in bytes.chunks_exact_mut(8).zip(state) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::random;

    fn image(parts: Vec<Vec<u8>>) -> Image {
        let mut image = Image { parts: Vec::new(), unreadable: Vec::new() };
        for (number, bytes) in (1..).zip(parts) {
            image.add(number << 32, bytes);
        }
        image
    }

    #[test]
    fn a_planted_pre_key_or_shield_key_opens_planted_records_and_noise_does_not() {
        let pre_key = random::<PRE_KEY_LEN>();
        let shield_bytes = random::<KEY_LEN>();
        for (shield, held) in [
            (RecordKey::from_pre_key(&pre_key), [vec![0; 24], pre_key.to_vec()].concat()),
            (RecordKey::new(&shield_bytes), [vec![7; 104], shield_bytes.to_vec()].concat()),
        ] {
            let ids: Vec<[u8; 16]> = (0..5).map(|_| random()).collect();
            let keys: Vec<[u8; KEY_LEN]> = ids.iter().map(|_| random()).collect();
            let mut heap = vec![0; 48];
            for ((counter, id), key) in (1..).zip(&ids).zip(&keys) {
                let mut bytes = *key;
                let tag = shield.seal(counter, &place(id), &mut bytes).unwrap();
                heap.extend_from_slice(id);
                heap.extend_from_slice(&[0; 24]);
                heap.extend_from_slice(&counter.to_le_bytes());
                heap.extend_from_slice(&tag);
                heap.extend_from_slice(&bytes);
            }
            let records = Records::find(&image(vec![heap.clone()]), &ids);
            assert_eq!(records.len(), ids.len());
            let recovered = records.recover(&image(vec![held, heap.clone()]));
            assert!(recovered.by_pre_key != recovered.by_shield_key);
            for (id, key) in ids.iter().zip(&keys) {
                assert_eq!(recovered.keys.get(id), Some(key));
            }
            let noise = random::<{ 2 * PRE_KEY_LEN }>().to_vec();
            assert!(records.recover(&image(vec![noise, heap])).keys.is_empty());
        }
    }

    #[test]
    fn a_planted_lock_key_is_found() {
        let (lock_key, passphrase_key) = (random::<KEY_LEN>(), random::<KEY_LEN>());
        let (mut elements, mut heap) = (Vec::new(), Vec::new());
        for counter in 20..24u64 {
            let mut bytes = random::<120>().to_vec();
            let tag = RecordKey::new(&lock_key).seal(counter, LOCKED_KEY_PLACE, &mut bytes).unwrap();
            elements.extend_from_slice(&((2u64 << 32) + heap.len() as u64).to_le_bytes());
            elements.extend_from_slice(&120u64.to_le_bytes());
            elements.extend_from_slice(&counter.to_le_bytes());
            elements.extend_from_slice(&tag);
            elements.extend_from_slice(&[0; 16]);
            heap.extend_from_slice(&bytes);
        }
        let mut sealed = lock_key;
        let tag = RecordKey::new(&passphrase_key).seal(24, LOCK_KEY_PLACE, &mut sealed).unwrap();
        let state = [&24u64.to_le_bytes()[..], &[1; 16], &tag, &sealed].concat();
        let locked = image(vec![elements, heap, state]);
        let records = LockedRecords::find(&locked, 4);
        assert!(records.found() && records.opens(&lock_key));
        assert_eq!(records.open_lock_key(&passphrase_key), Some(lock_key));
        assert!(records.keys_in(&locked).is_empty());
        let planted = image(vec![[vec![0; 8], lock_key.to_vec(), passphrase_key.to_vec()].concat()]);
        assert_eq!(records.keys_in(&planted), ["the lock key", "the key of the passphrase"]);
    }
}
