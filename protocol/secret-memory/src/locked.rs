//! Locked memory that lives shorter or holds more than bytes: frame buffers and values of one type.
//! Never secretmem: these come and go, and each such mapping would cost a file and two guard pages of the limit.

use std::ops::Range;

use zeroize::Zeroize;

use crate::error::RegionError;
use crate::region::{Backing, Policy, backing_of};
use crate::sys::{Mapping, Placed};

/// A frame buffer: whole anonymous pages, locked, guarded, out of dumps and of forked children, wiped on drop.
///
/// A forked child has no such pages: there any access, a drop among them, ends the child.
pub struct LockedBuffer {
    mapping: Mapping,
    policy: Policy,
    backing: Backing,
}

impl LockedBuffer {
    /// A buffer of `len` bytes, all zero; it takes `len` rounded up to pages from `RLIMIT_MEMLOCK`.
    ///
    /// [`Policy::Auto`] and [`Policy::SecretMem`] mean mlock here.
    ///
    /// # Errors
    /// Pages cannot be had, or cannot be locked and the policy is not [`Policy::Preferred`].
    pub fn new(len: usize, policy: Policy) -> Result<Self, RegionError> {
        let mapping = Mapping::anonymous(len)?;
        let backing = backing_of(mapping.lock(), policy == Policy::Preferred)?;
        Ok(Self { mapping, policy, backing })
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

    /// True for a buffer of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the pages hold: up to here [`grow`](Self::grow) neither copies nor fails.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.mapping.capacity()
    }

    /// The bytes.
    #[must_use]
    pub fn expose_secret(&self) -> &[u8] {
        self.mapping.bytes()
    }

    /// The bytes, to be written.
    #[must_use]
    pub fn expose_secret_mut(&mut self) -> &mut [u8] {
        self.mapping.bytes_mut()
    }

    /// Lengthens the buffer to `new_len` bytes: contents stay, what is new is zero, the old pages are wiped.
    /// A `new_len` that is not longer changes nothing. While it copies, old and new pages both count as locked.
    ///
    /// # Errors
    /// As [`new`](Self::new), and then the buffer is what it was.
    pub fn grow(&mut self, new_len: usize) -> Result<(), RegionError> {
        if new_len <= self.len() || self.mapping.extend_within(new_len) {
            return Ok(());
        }
        let mut grown = Self::new(new_len, self.policy)?;
        for (to, from) in grown.expose_secret_mut().iter_mut().zip(self.expose_secret()) {
            *to = *from;
        }
        *self = grown;
        Ok(())
    }

    /// Overwrites `range` with zero; the part of it past the end is ignored.
    pub fn wipe_range(&mut self, range: Range<usize>) {
        let end = range.end.min(self.len());
        if let Some(bytes) = self.expose_secret_mut().get_mut(range.start..end) {
            bytes.zeroize();
        }
    }

    /// Overwrites every byte with zero.
    pub fn wipe(&mut self) {
        self.mapping.bytes_mut().zeroize();
    }
}

/// One `T` in locked, guarded pages of its own; dropped there, then wiped.
///
/// `T`'s alignment may be at most 4096. Only the bytes of the `T` itself are protected, not what it points to. A forked
/// child has no such pages: there any access, a drop among them, ends the child.
pub struct LockedBox<T> {
    value: Placed<T>,
    backing: Backing,
}

impl<T> LockedBox<T> {
    /// Moves `value` into locked memory.
    ///
    /// The move leaves a copy on the caller's stack: call [`zeroize_stack`](crate::zeroize_stack) afterwards, or box an
    /// empty value and fill it in place.
    ///
    /// # Errors
    /// Pages cannot be had or cannot be locked; `value` is dropped then.
    pub fn new(value: T) -> Result<Self, RegionError> {
        Self::with_policy(value, Policy::Mlock)
    }

    /// As [`new`](Self::new); [`Policy::Preferred`] may give unlocked memory, every other policy means mlock.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_policy(value: T, policy: Policy) -> Result<Self, RegionError> {
        let space = Placed::<T>::reserve()?;
        let backing = backing_of(space.lock(), policy == Policy::Preferred)?;
        Ok(Self { value: space.fill(value), backing })
    }

    /// What memory this is.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The value.
    #[must_use]
    pub fn expose_secret(&self) -> &T {
        self.value.get()
    }

    /// The value, to be written.
    #[must_use]
    pub fn expose_secret_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}
