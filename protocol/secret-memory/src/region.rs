//! The policy for locked memory, and the region of fixed length that follows it.

use std::fmt;

use zeroize::Zeroize;

use crate::error::RegionError;
use crate::sys::{GuardedHeap, Mapping, Region};

/// What memory is wanted; the configuration's `secret_memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// secretmem, else mlock, else an error.
    Auto,
    /// secretmem or an error.
    SecretMem,
    /// mlock or an error.
    Mlock,
    /// As [`Policy::Auto`], and unlocked memory where nothing can be locked.
    Preferred,
}

/// What memory was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Pages of `memfd_secret`: locked, and outside the kernel's own map of memory.
    SecretMem,
    /// Locked anonymous pages.
    Mlock,
    /// Ordinary pages, which may be swapped out.
    Unlocked,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SecretMem => "secretmem",
            Self::Mlock => "mlock",
            Self::Unlocked => "unlocked",
        })
    }
}

/// Bytes of fixed length between two guard pages, out of dumps and of forked children, wiped on drop.
///
/// The region ends at a guard page, so that a read past it faults. A forked child has no such pages: there any
/// access, a drop among them, ends the child.
pub struct SecretRegion {
    region: Region,
    backing: Backing,
}

impl SecretRegion {
    /// A region of `len` bytes, all zero.
    ///
    /// secretmem takes `len` rounded up to pages and two guard pages from `RLIMIT_MEMLOCK`; mlock takes `len` and 16
    /// bytes, rounded up to pages.
    ///
    /// # Errors
    /// What the policy asks for cannot be had; under [`Policy::Auto`] the failure of `mlock`, which was the last resort.
    pub fn new(len: usize, policy: Policy) -> Result<Self, RegionError> {
        match policy {
            Policy::SecretMem => Self::secretmem(len),
            Policy::Mlock => Self::heap(len, false),
            Policy::Auto => Self::secretmem(len).or_else(|_| Self::heap(len, false)),
            Policy::Preferred => Self::secretmem(len).or_else(|_| Self::heap(len, true)),
        }
    }

    fn secretmem(len: usize) -> Result<Self, RegionError> {
        Ok(Self { region: Region::Mapping(Mapping::secretmem(len)?), backing: Backing::SecretMem })
    }

    fn heap(len: usize, may_be_unlocked: bool) -> Result<Self, RegionError> {
        let heap = GuardedHeap::new(len)?;
        let backing = backing_of(heap.lock(), may_be_unlocked)?;
        Ok(Self { region: Region::Heap(heap), backing })
    }

    /// What memory this is.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.expose_secret().len()
    }

    /// True for a region of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes.
    #[must_use]
    pub fn expose_secret(&self) -> &[u8] {
        self.region.bytes()
    }

    /// The bytes, to be written.
    #[must_use]
    pub fn expose_secret_mut(&mut self) -> &mut [u8] {
        self.region.bytes_mut()
    }

    /// Overwrites every byte with zero.
    pub fn wipe(&mut self) {
        self.region.bytes_mut().zeroize();
    }
}

/// Judges a lock that was tried: only a caller that said so may go on without.
pub(crate) fn backing_of(
    locked: Result<(), RegionError>,
    may_be_unlocked: bool,
) -> Result<Backing, RegionError> {
    match locked {
        Ok(()) => Ok(Backing::Mlock),
        Err(_) if may_be_unlocked => Ok(Backing::Unlocked),
        Err(error) => Err(error),
    }
}
