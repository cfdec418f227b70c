//! Who may do what.
//!
//! Owns the one decision that stands in front of every operation: [`authorize`] is the only maker of a [`Permit`], and
//! the keyring does nothing without one. It looks at the peer that the kernel named and at the request, never at keys,
//! and never at anything that the peer says about itself.

use kms_protocol::{Request, Status};

/// The peer of a connection, as the kernel named it at `connect` (`docs/protocol.md`, section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Effective user id.
    pub uid: u32,
}

/// What the decision rests on, apart from peer and request.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The uid that the agent runs under, the only one that it serves.
    pub own_uid: u32,
    /// Whether the agent is locked.
    pub locked: bool,
}

/// Proof that one request was authorised. It is made by [`authorize`] alone, lives for that request, and cannot be
/// copied.
#[must_use]
pub struct Permit {
    _made_here: (),
}

/// Decides about one request.
///
/// # Errors
/// [`Status::Denied`] for a peer that is not served, [`Status::Locked`] for what a locked agent does not answer.
pub fn authorize(peer: &Peer, request: &Request<'_>, policy: &Policy) -> Result<Permit, Status> {
    if peer.uid != policy.own_uid {
        return Err(Status::Denied);
    }
    let answered_while_locked = match request {
        Request::Hello(_)
        | Request::Ping
        | Request::Status
        | Request::Lock { .. }
        | Request::Unlock { .. } => true,
        Request::Add { .. }
        | Request::List(_)
        | Request::Describe(_)
        | Request::Remove(_)
        | Request::Encrypt { .. }
        | Request::Decrypt { .. }
        | Request::StreamNew(_)
        | Request::StreamOpen { .. }
        | Request::RemoteStreamNew(_)
        | Request::RemoteStreamOpen { .. }
        | Request::RemoteStreamEncrypt { .. }
        | Request::RemoteStreamDecrypt { .. }
        | Request::RemoteStreamClose(_)
        | Request::Rotate(_)
        | Request::Rename(_)
        | Request::Export { .. }
        | Request::RemoveAll(_)
        | Request::Wrap { .. }
        | Request::Unwrap { .. }
        | Request::DataKey(_)
        | Request::DataKeyWrapped(_)
        | Request::Rewrap { .. }
        | Request::Verify { .. }
        | Request::Mac { .. }
        | Request::MacVerify { .. }
        | Request::Random(_)
        | Request::Bind(_)
        | Request::Batch { .. }
        | Request::Stats => false,
    };
    if policy.locked && !answered_while_locked {
        return Err(Status::Locked);
    }
    Ok(Permit { _made_here: () })
}

#[cfg(test)]
mod tests {
    use kms_protocol::List;

    use super::*;

    #[test]
    fn only_the_own_uid_gets_a_permit_and_not_for_keys_while_locked() {
        for (uid, locked, request, expected) in [
            (7, false, Request::List(List { cursor: 0 }), Ok(())),
            (7, true, Request::List(List { cursor: 0 }), Err(Status::Locked)),
            (7, true, Request::Ping, Ok(())),
            (0, false, Request::Ping, Err(Status::Denied)),
            (8, true, Request::Ping, Err(Status::Denied)),
        ] {
            let decision = authorize(&Peer { uid }, &request, &Policy { own_uid: 7, locked });
            assert_eq!(decision.map(|_| ()), expected);
        }
    }
}
