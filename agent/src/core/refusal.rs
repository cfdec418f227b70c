//! Why a request is refused: every error below the core, as one of the statuses of `docs/protocol.md`, section 3.

use std::time::Duration;

use kms_envelope::{ContextError, HeaderError, OpenError, SealError};
use kms_protocol::Status;
use kms_secret_memory::RegionError;

use super::Outcome;
use crate::{
    crypto::{CryptoError, RandomUnavailable},
    keyring::KeyringError,
    reply::{Replies, ReplyError},
};

/// When to ask again where locked memory was short: other replies give theirs back as soon as they are sent.
pub(super) const AGAIN: Duration = Duration::from_millis(100);

/// Why a request is refused.
pub(super) struct Refused {
    pub(super) status: Status,
    pub(super) retry_after: Duration,
    pub(super) close: bool,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { status, retry_after: Duration::ZERO, close: false }
    }
}

impl Refused {
    pub(super) fn busy(retry_after: Duration) -> Self {
        Self { status: Status::Busy, retry_after, close: false }
    }
}

impl From<KeyringError> for Refused {
    fn from(error: KeyringError) -> Self {
        match error {
            KeyringError::Locked => Status::Locked.into(),
            KeyringError::NotFound => Status::NotFound.into(),
            KeyringError::Exists => Status::Exists.into(),
            KeyringError::Full | KeyringError::UsedUp => Status::Limit.into(),
            KeyringError::Unconfirmed => Status::Declined.into(),
            KeyringError::NotExportable | KeyringError::WrongPassphrase => Status::Denied.into(),
            KeyringError::Crypto(error) => error.into(),
        }
    }
}

impl From<CryptoError> for Refused {
    fn from(error: CryptoError) -> Self {
        if let CryptoError::Memory(error) = error {
            return error.into();
        }
        tracing::error!(%error, "a request failed inside the agent");
        Status::Internal.into()
    }
}

impl From<RegionError> for Refused {
    fn from(error: RegionError) -> Self {
        tracing::warn!(%error, "no locked memory for a request");
        Self::busy(AGAIN)
    }
}

impl From<RandomUnavailable> for Refused {
    fn from(error: RandomUnavailable) -> Self {
        CryptoError::from(error).into()
    }
}

impl From<ReplyError> for Refused {
    fn from(error: ReplyError) -> Self {
        match error {
            ReplyError::Memory(error) => error.into(),
            ReplyError::Frame(_) => Status::TooLarge.into(),
        }
    }
}

impl From<SealError> for Refused {
    fn from(_: SealError) -> Self {
        Status::TooLarge.into()
    }
}

impl From<HeaderError> for Refused {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Truncated | HeaderError::NotOurs | HeaderError::Version => Status::Malformed.into(),
            HeaderError::Format(_)
            | HeaderError::Suite(_)
            | HeaderError::Purpose(_)
            | HeaderError::Flags(_) => Status::Unsupported.into(),
        }
    }
}

impl From<OpenError> for Refused {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Header(error) => error.into(),
            OpenError::Purpose => Status::Malformed.into(),
            OpenError::Length | OpenError::Invalid => Status::InvalidCiphertext.into(),
        }
    }
}

impl From<ContextError> for Refused {
    fn from(error: ContextError) -> Self {
        match error {
            ContextError::TooManyPairs | ContextError::TooLong => Status::TooLarge.into(),
            _ => Status::Malformed.into(),
        }
    }
}

/// Writes a refusal.
pub(super) fn refuse(request_id: u32, refused: &Refused, replies: &mut Replies) -> Outcome {
    // Rounded up: who is told to wait for nothing asks again at once.
    let retry_after_ms = u32::try_from(refused.retry_after.as_micros().div_ceil(1000)).unwrap_or(u32::MAX);
    match replies.push_refusal(request_id, refused.status, retry_after_ms) {
        Ok(()) if !refused.close => Outcome::Continue,
        Ok(()) | Err(_) => Outcome::Close,
    }
}

#[cfg(test)]
mod tests {
    use kms_protocol::Frame;

    use super::*;

    #[test]
    fn busy_never_names_a_wait_of_nothing() {
        for (wait, named) in [
            (Duration::from_micros(1), 1),
            (Duration::from_micros(1_001), 2),
            (Duration::from_secs(10), 10_000),
        ] {
            let mut replies = Replies::new(kms_secret_memory::Policy::Auto).unwrap();
            refuse(1, &Refused::busy(wait), &mut replies);
            let frame = Frame::parse(replies.waiting(), kms_protocol::FRAME_MAX).unwrap().unwrap();
            let refusal: kms_protocol::Refusal = kms_protocol::decode_fields(frame.fields).unwrap();
            assert_eq!(refusal.retry_after_ms, named);
        }
    }
}
