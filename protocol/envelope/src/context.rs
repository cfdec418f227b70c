//! The encryption context: pairs that are not secret, bound into every ciphertext (`docs/formats.md`, section 5).
//!
//! Owns the canonical bytes. A value of either type here *is* canonical: nothing behind this module sorts, checks or repairs.
//! `Debug` shows sizes only, since contexts name rows and people.

use std::fmt;

/// Most pairs in one context.
pub const CONTEXT_PAIRS_MAX: usize = 64;

/// Most canonical bytes of one context, the count included.
pub const CONTEXT_LEN_MAX: usize = 8192;

const EMPTY: [u8; 4] = [0; 4];

/// Why bytes or pairs are not an encryption context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// The bytes end before the last pair does.
    #[error("encryption context is truncated")]
    Truncated,
    /// There are bytes after the last pair.
    #[error("encryption context has trailing bytes")]
    TrailingBytes,
    /// A key is smaller than the one before it.
    #[error("encryption context is not sorted by key")]
    NotSorted,
    /// Two pairs have the same key.
    #[error("encryption context has the same key twice")]
    DuplicateKey,
    /// A key has no byte.
    #[error("encryption context has an empty key")]
    EmptyKey,
    /// More than [`CONTEXT_PAIRS_MAX`] pairs.
    #[error("encryption context has more than {CONTEXT_PAIRS_MAX} pairs")]
    TooManyPairs,
    /// More than [`CONTEXT_LEN_MAX`] canonical bytes.
    #[error("encryption context is longer than {CONTEXT_LEN_MAX} bytes")]
    TooLong,
}

/// Canonical bytes of an encryption context, borrowed and checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ContextRef<'a>(&'a [u8]);

impl ContextRef<'static> {
    /// No pairs: the four bytes of count 0.
    pub const EMPTY: Self = Self(&EMPTY);
}

impl<'a> ContextRef<'a> {
    /// Checks canonical bytes that someone else made. Allocates nothing.
    ///
    /// # Errors
    ///
    /// The first failure, reading from the front; length and number of pairs are checked before any pair.
    //= docs/formats.md#5-encryption-context
    //# A decoder that is given canonical bytes MUST check all of this and MUST NOT sort or repair them.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ContextError> {
        //= docs/formats.md#5-encryption-context
        //# There MUST NOT be more than 64 pairs, and the canonical bytes, count included, MUST NOT be longer than 8,192.
        if bytes.len() > CONTEXT_LEN_MAX {
            return Err(ContextError::TooLong);
        }
        let (count, mut rest) = read_u32(bytes).ok_or(ContextError::Truncated)?;
        if count > CONTEXT_PAIRS_MAX {
            return Err(ContextError::TooManyPairs);
        }
        let mut previous: &[u8] = &[];
        for _ in 0..count {
            let (key, after) = read_bytes(rest).ok_or(ContextError::Truncated)?;
            check_order(previous, key)?;
            let (_value, after) = read_bytes(after).ok_or(ContextError::Truncated)?;
            previous = key;
            rest = after;
        }
        //= docs/formats.md#5-encryption-context
        //# Bytes after the last pair MUST be
        //# refused.
        if rest.is_empty() { Ok(Self(bytes)) } else { Err(ContextError::TrailingBytes) }
    }

    /// The canonical bytes, at most [`CONTEXT_LEN_MAX`].
    pub const fn as_bytes(self) -> &'a [u8] {
        self.0
    }

    /// The pairs, in ascending order of their keys.
    pub fn pairs(self) -> Pairs<'a> {
        Pairs(self.0.get(EMPTY.len()..).unwrap_or_default())
    }
}

impl fmt::Debug for ContextRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextRef").field("len", &self.0.len()).finish_non_exhaustive()
    }
}

/// Iterates over the pairs of a [`ContextRef`] as `(key, value)`.
#[derive(Clone)]
pub struct Pairs<'a>(&'a [u8]);

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (key, rest) = read_bytes(self.0)?;
        let (value, rest) = read_bytes(rest)?;
        self.0 = rest;
        Some((key, value))
    }
}

/// An encryption context that owns its canonical bytes. The default is the one without pairs.
#[derive(Clone, PartialEq, Eq)]
pub struct EncryptionContext(Vec<u8>);

impl EncryptionContext {
    /// The context of these pairs, in whatever order they come.
    ///
    /// # Errors
    ///
    /// [`ContextError`]: an empty or repeated key, or more than the limits.
    pub fn from_pairs<K, V>(pairs: impl IntoIterator<Item = (K, V)>) -> Result<Self, ContextError>
    where
        K: AsRef<[u8]>,
        V: AsRef<[u8]>,
    {
        // One more than allowed is enough to know, and an endless iterator ends here.
        let mut pairs: Vec<(K, V)> = pairs.into_iter().take(CONTEXT_PAIRS_MAX + 1).collect();
        if pairs.len() > CONTEXT_PAIRS_MAX {
            return Err(ContextError::TooManyPairs);
        }
        pairs.sort_by(|(a, _), (b, _)| a.as_ref().cmp(b.as_ref()));
        let mut bytes = Vec::new();
        push_u32(&mut bytes, pairs.len())?;
        for (key, value) in &pairs {
            for part in [key.as_ref(), value.as_ref()] {
                push_u32(&mut bytes, part.len())?;
                if part.len() > CONTEXT_LEN_MAX {
                    return Err(ContextError::TooLong);
                }
                bytes.extend_from_slice(part);
            }
        }
        ContextRef::parse(&bytes)?;
        Ok(Self(bytes))
    }

    /// The context, borrowed.
    pub fn as_ref(&self) -> ContextRef<'_> {
        ContextRef(&self.0)
    }
}

impl Default for EncryptionContext {
    fn default() -> Self {
        Self(EMPTY.to_vec())
    }
}

impl From<ContextRef<'_>> for EncryptionContext {
    fn from(context: ContextRef<'_>) -> Self {
        Self(context.0.to_vec())
    }
}

impl fmt::Debug for EncryptionContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EncryptionContext").field("len", &self.0.len()).finish_non_exhaustive()
    }
}

//= docs/formats.md#5-encryption-context
//# Pairs MUST stand in ascending order of their keys, compared as strings of unsigned bytes, where a proper prefix is the smaller. No two
//# pairs may have the same key. A key MUST have at least one byte; a value may be empty.
fn check_order(previous: &[u8], key: &[u8]) -> Result<(), ContextError> {
    if key.is_empty() {
        return Err(ContextError::EmptyKey);
    }
    // Before the first key `previous` is empty, which is smaller than any key and equal to none.
    match previous.cmp(key) {
        std::cmp::Ordering::Less => Ok(()),
        std::cmp::Ordering::Equal => Err(ContextError::DuplicateKey),
        std::cmp::Ordering::Greater => Err(ContextError::NotSorted),
    }
}

fn read_u32(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((usize::try_from(u32::from_be_bytes(*number)).ok()?, rest))
}

fn read_bytes(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = read_u32(bytes)?;
    rest.split_at_checked(len)
}

fn push_u32(bytes: &mut Vec<u8>, number: usize) -> Result<(), ContextError> {
    let number = u32::try_from(number).map_err(|_| ContextError::TooLong)?;
    bytes.extend_from_slice(&number.to_be_bytes());
    Ok(())
}
