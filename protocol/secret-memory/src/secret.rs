//! Secrets on the ordinary heap: they have one place, cannot be printed, cloned or compared, and are wiped on drop.
//! For what lives shortly or is sealed anyway; what stays belongs into a region.

use zeroize::Zeroize;

/// `N` secret bytes in a box of their own: a move moves the pointer, so no copy stays behind.
pub struct Secret<const N: usize> {
    bytes: Box<[u8; N]>,
}

impl<const N: usize> Secret<N> {
    /// `N` zero bytes, to be filled through [`expose_secret_mut`](Self::expose_secret_mut).
    #[must_use]
    pub fn zeroed() -> Self {
        Self { bytes: Box::new([0; N]) }
    }

    /// A copy of `source`, or nothing if it has not exactly `N` bytes. Wiping `source` is the caller's part.
    #[must_use]
    pub fn from_slice(source: &[u8]) -> Option<Self> {
        let source: &[u8; N] = source.try_into().ok()?;
        let mut secret = Self::zeroed();
        secret.bytes.copy_from_slice(source);
        Some(secret)
    }

    /// The bytes.
    #[must_use]
    pub fn expose_secret(&self) -> &[u8; N] {
        &self.bytes
    }

    /// The bytes, to be written.
    #[must_use]
    pub fn expose_secret_mut(&mut self) -> &mut [u8; N] {
        &mut self.bytes
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

/// The bytes do not fit: a secret never moves to a larger allocation, which would leave a copy behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the secret is longer than {capacity} bytes")]
pub struct CapacityExceeded {
    /// Capacity in bytes.
    pub capacity: usize,
}

/// A secret of unknown length up to a fixed capacity, as a passphrase; never reallocated, wiped on drop.
pub struct SecretVec {
    /// All of the capacity; zero from `len` on.
    bytes: Box<[u8]>,
    len: usize,
}

impl SecretVec {
    /// An empty secret for at most `capacity` bytes.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity].into_boxed_slice(), len: 0 }
    }

    /// Capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy of `source`.
    ///
    /// # Errors
    /// It does not fit; then nothing was appended.
    pub fn push_slice(&mut self, source: &[u8]) -> Result<(), CapacityExceeded> {
        let full = CapacityExceeded { capacity: self.capacity() };
        let end = self.len.checked_add(source.len()).ok_or(full)?;
        self.bytes.get_mut(self.len..end).ok_or(full)?.copy_from_slice(source);
        self.len = end;
        Ok(())
    }

    /// The bytes.
    #[must_use]
    pub fn expose_secret(&self) -> &[u8] {
        // `len` never exceeds the capacity; were it otherwise, nothing is the safe answer.
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// All of the capacity, to be read into: the length becomes the capacity, and [`truncate`](Self::truncate) sets it
    /// to what was read. The bytes that were there stay; those after them are zero.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.len = self.bytes.len();
        &mut self.bytes
    }

    /// Shortens the secret to `len` bytes and wipes the rest; a longer `len` changes nothing.
    pub fn truncate(&mut self, len: usize) {
        if let Some(rest) = self.bytes.get_mut(len..self.len) {
            rest.zeroize();
            self.len = len;
        }
    }
}

impl Drop for SecretVec {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}
