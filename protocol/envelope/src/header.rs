//! The 28 bytes that begin every ciphertext, and the types in them (`docs/formats.md`, sections 2 to 4).
//!
//! Owns magic, format, suite and purpose numbers. Whether a key exists, or may be used, is decided elsewhere.

use std::{fmt, num::NonZeroU32, str::FromStr};

/// Bytes of a header.
pub const HEADER_LEN: usize = 28;

const MAGIC: [u8; 3] = [0x92, 0x6b, 0x1c];
const FORMAT: u8 = 1;
const SUITE: u8 = 1;

/// The id of a key: 16 random bytes, shown as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 16]);

impl KeyId {
    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// The text is not a key id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key id is 32 lower-case hexadecimal digits")]
pub struct KeyIdError;

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, KeyIdError> {
        // `from_str_radix` alone would take a sign and capitals, and an id has one spelling.
        if text.len() != 32 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(KeyIdError);
        }
        u128::from_str_radix(text, 16).map(|value| Self(value.to_be_bytes())).map_err(|_| KeyIdError)
    }
}

/// The number of a key version, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyVersion(NonZeroU32);

impl KeyVersion {
    /// The first version of a key.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The version with this number, `None` for 0.
    pub const fn new(value: u32) -> Option<Self> {
        match NonZeroU32::new(value) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// Its number.
    pub const fn value(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for KeyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a ciphertext is for (`docs/formats.md`, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Data, sealed directly under a key version.
    Message = 1,
    /// A key of the caller's, sealed directly under a key version.
    WrappedKey = 2,
    /// Data of any length under a data key of its own.
    Stream = 3,
    /// Reserved; nothing in this crate seals or opens it.
    SharedMessage = 4,
    /// The tag of an input. Never opened, only checked.
    Tag = 5,
}

impl Purpose {
    /// The purpose with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Message),
            2 => Some(Self::WrappedKey),
            3 => Some(Self::Stream),
            4 => Some(Self::SharedMessage),
            5 => Some(Self::Tag),
            _ => None,
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// What stands in the clear at the head of a ciphertext: what it is for, and which key version opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header {
    /// What the ciphertext is for.
    pub purpose: Purpose,
    /// The key.
    pub key_id: KeyId,
    /// The version of the key.
    pub key_version: KeyVersion,
}

/// Why the bytes do not begin with a header that this release reads, in the order in which it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than 28 bytes.
    #[error("shorter than the header of a ciphertext")]
    Truncated,
    /// The magic is another.
    #[error("not a ciphertext of kms-agent")]
    NotOurs,
    /// An unknown format number.
    #[error("ciphertext format {0} is not known")]
    Format(u8),
    /// An unknown suite number.
    #[error("cipher suite {0} is not known")]
    Suite(u8),
    /// An unknown purpose number.
    #[error("ciphertext purpose {0} is not known")]
    Purpose(u8),
    /// A flag is set.
    #[error("ciphertext flags {0:#06x} are not known")]
    Flags(u16),
    /// Key version 0.
    #[error("key version 0 does not exist")]
    Version,
}

impl Header {
    /// Reads the header at the start of `bytes`, which may be longer: what follows is not looked at.
    ///
    /// # Errors
    ///
    /// The first check that fails, in the order of [`HeaderError`] (`docs/formats.md`, section 4).
    //= docs/formats.md#4-header
    //# A decoder MUST check the header in this order and report the first failure: at least 28 bytes, magic, format, suite, purpose, flags,
    //# key version.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let [m0, m1, m2, format, suite, purpose, f0, f1, rest @ ..] =
            bytes.first_chunk::<HEADER_LEN>().ok_or(HeaderError::Truncated)?;
        let [key_id @ .., v0, v1, v2, v3] = rest;
        if [*m0, *m1, *m2] != MAGIC {
            return Err(HeaderError::NotOurs);
        }
        if *format != FORMAT {
            return Err(HeaderError::Format(*format));
        }
        if *suite != SUITE {
            return Err(HeaderError::Suite(*suite));
        }
        //= docs/formats.md#3-purposes
        //# A decoder MUST refuse every other number with `unsupported: purpose`.
        let purpose = Purpose::from_number(*purpose).ok_or(HeaderError::Purpose(*purpose))?;
        //= docs/formats.md#4-header
        //# A decoder MUST refuse flags other than zero, because a later writer will set one only where ignoring it would be wrong.
        let flags = u16::from_be_bytes([*f0, *f1]);
        if flags != 0 {
            return Err(HeaderError::Flags(flags));
        }
        //= docs/formats.md#4-header
        //# A decoder MUST refuse key version 0.
        let key_version =
            KeyVersion::new(u32::from_be_bytes([*v0, *v1, *v2, *v3])).ok_or(HeaderError::Version)?;
        Ok(Self { purpose, key_id: KeyId::from_bytes(*key_id), key_version })
    }

    /// The 28 bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..3].copy_from_slice(&MAGIC);
        bytes[3] = FORMAT;
        bytes[4] = SUITE;
        bytes[5] = self.purpose.number();
        bytes[8..24].copy_from_slice(self.key_id.as_bytes());
        bytes[24..].copy_from_slice(&self.key_version.value().to_be_bytes());
        bytes
    }
}
