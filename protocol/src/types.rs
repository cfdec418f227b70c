//! Types that cannot hold a bad value: names of keys, statuses of replies.

use std::{fmt, time::Duration};

use thiserror::Error;

//= docs/protocol.md#41-names-of-keys
//# A name of a key MUST be 1 to 255 bytes of `A-Z a-z 0-9 . _ / -` and MUST NOT start with `-` or `/`.
/// The name of a key: 1 to 255 bytes of `A-Z a-z 0-9 . _ / -`, not starting with `-` or `/`
/// (`docs/protocol.md`, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyName<'a>(&'a str);

impl<'a> KeyName<'a> {
    /// Length of the longest name, in bytes.
    pub const LEN_MAX: usize = 255;

    /// Reads a name.
    ///
    /// # Errors
    /// [`NameError`] says which rule the text breaks; it does not carry the text.
    pub fn parse(text: &'a str) -> Result<Self, NameError> {
        match text.as_bytes() {
            [] => Err(NameError::Empty),
            bytes if bytes.len() > Self::LEN_MAX => Err(NameError::TooLong),
            [b'-' | b'/', ..] => Err(NameError::Start),
            bytes
                if bytes.iter().all(
                    |b| matches!(b, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'/' | b'-'),
                ) =>
            {
                Ok(Self(text))
            }
            _ => Err(NameError::Character),
        }
    }

    /// The text of the name.
    #[must_use]
    pub fn as_str(&self) -> &'a str {
        self.0
    }
}

impl fmt::Display for KeyName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Why a text is not the name of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// No byte at all.
    #[error("a key name has at least one character")]
    Empty,
    /// More than 255 bytes.
    #[error("a key name has at most 255 characters")]
    TooLong,
    /// `-` or `/` in front.
    #[error("a key name does not start with '-' or '/'")]
    Start,
    /// A byte outside the alphabet.
    #[error("a key name is made of the characters A-Z a-z 0-9 . _ / -")]
    Character,
}

/// Reads a lifetime as people write it: a number of seconds, or one with `s`, `m`, `h`, `d` or `w` behind it.
///
/// # Errors
/// [`LifetimeError`] for anything else, for 0, and for more seconds than a number holds.
pub fn parse_lifetime(text: &str) -> Result<Duration, LifetimeError> {
    let (digits, unit) = match text.as_bytes() {
        [.., b's'] => (text.strip_suffix('s'), 1),
        [.., b'm'] => (text.strip_suffix('m'), 60),
        [.., b'h'] => (text.strip_suffix('h'), 3600),
        [.., b'd'] => (text.strip_suffix('d'), 86_400),
        [.., b'w'] => (text.strip_suffix('w'), 604_800),
        _ => (Some(text), 1),
    };
    digits
        // `parse` alone would take a sign.
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(unit))
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs)
        .ok_or(LifetimeError)
}

/// A text is not a lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a duration is a number of seconds, or a number with s, m, h, d or w behind it, and not 0")]
pub struct LifetimeError;

macro_rules! statuses {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal, $exit:literal;)*) => {
        //= docs/protocol.md#3-statuses
        //# The list is closed: the agent MUST NOT send a number that does not stand here.
        /// What a reply says; closed (`docs/protocol.md`, section 3). `Ok` is 0, the others are refusals.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u16)]
        pub enum Status { $($(#[$doc])* $variant = $code,)* }

        impl Status {
            /// Every status, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The number on the wire.
            #[must_use]
            pub fn code(self) -> u16 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The status with this number.
            #[must_use]
            pub fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// The name in `docs/protocol.md`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The exit status of a command-line tool that gets this answer.
            #[must_use]
            pub fn exit_code(self) -> u8 {
                match self { $(Self::$variant => $exit,)* }
            }
        }
    };
}

statuses! {
    /// The request was carried out.
    Ok = 0, "ok", 0;
    /// The request or ciphertext does not have the form that the specification gives it.
    Malformed = 1, "malformed", 1;
    /// A version, opcode, format or constraint that this agent does not have.
    Unsupported = 2, "unsupported", 1;
    /// Beyond a size limit of the agent.
    TooLarge = 3, "too-large", 1;
    /// The peer may not do this, or the passphrase is wrong.
    Denied = 4, "denied", 1;
    /// The agent is locked.
    Locked = 5, "locked", 3;
    /// No such key or stream, as far as this peer may know.
    NotFound = 6, "not-found", 1;
    /// The name is taken.
    Exists = 7, "exists", 1;
    /// The ciphertext names another key than the request.
    WrongKey = 8, "wrong-key", 1;
    //= docs/protocol.md#3-statuses
    //# A reserved status will be sent by a later release only; a client MUST know it now.
    /// The key version is disabled, below the minimum or pending removal.
    Disabled = 9, "disabled", 1;
    /// Wrong context, truncated or changed: one and the same failure.
    InvalidCiphertext = 10, "invalid-ciphertext", 1;
    /// A count that the configuration limits is reached.
    Limit = 11, "limit", 1;
    /// A person's yes is needed, and there was none.
    Declined = 12, "declined", 1;
    /// Try again after the time that the reply names.
    Busy = 13, "busy", 75;
    /// The audit log cannot be written.
    AuditUnavailable = 14, "audit-unavailable", 75;
    /// There is no keystore, or it cannot be read or written.
    StoreUnavailable = 15, "store-unavailable", 75;
    /// A fault of the agent or of the machine.
    Internal = 16, "internal", 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_grammar_says() {
        for good in ["a", "A.b_c/d-9", "0", ".", "..", "a//b", &"x".repeat(255)] {
            assert_eq!(KeyName::parse(good).map(|n| n.as_str()), Ok(good));
        }
        for (bad, why) in [
            ("", NameError::Empty),
            (&*"x".repeat(256), NameError::TooLong),
            ("-a", NameError::Start),
            ("/a", NameError::Start),
            ("a b", NameError::Character),
            ("a\0", NameError::Character),
            ("a\n", NameError::Character),
            ("é", NameError::Character),
            ("a\u{202e}", NameError::Character),
            ("a*", NameError::Character),
        ] {
            assert_eq!(KeyName::parse(bad), Err(why));
        }
    }

    #[test]
    fn lifetimes_are_numbers_with_a_unit() {
        for (text, seconds) in
            [("90", 90), ("30s", 30), ("15m", 900), ("8h", 28_800), ("7d", 604_800), ("2w", 1_209_600)]
        {
            assert_eq!(parse_lifetime(text), Ok(Duration::from_secs(seconds)));
        }
        for bad in [
            "",
            "s",
            "0",
            "0h",
            "-1",
            "+1",
            "1.5h",
            "1h30m",
            " 1",
            "1 h",
            "1y",
            "30500568904944w",
            "18446744073709551616",
        ] {
            assert_eq!(parse_lifetime(bad), Err(LifetimeError), "{bad}");
        }
    }

    #[test]
    fn status_numbers_and_names_are_unique_and_reversible() {
        for (number, status) in Status::ALL.iter().enumerate() {
            assert_eq!(usize::from(status.code()), number);
            assert_eq!(Status::from_code(status.code()), Some(*status));
        }
        assert_eq!(Status::from_code(17), None);
    }
}
