//! Locks that cannot ask for a passphrase: keys that live in memory alone are forgotten.
//!
//! Owns when an agent counts as idle, and what `status` says of keys that were forgotten (`docs/protocol.md`, section 5.3).

use std::time::Duration;

use kms_protocol::{Fact, Request};

use super::{Core, Now};
use crate::{
    audit::{Audit, Event, Reason},
    crypto::Random,
};

/// What there is to know of the time without use, and of what was forgotten.
pub(super) struct Unasked {
    /// When a key was used or changed last, since boot.
    last_use: Duration,
    last: Option<Forgotten>,
    /// How often keys were forgotten: whoever began before is not to open anything afterwards.
    times: u64,
}

struct Forgotten {
    keys: usize,
    reason: Reason,
    /// Seconds since 1970.
    unix: u64,
}

impl Unasked {
    pub(super) fn new(boot: Duration) -> Self {
        Self { last_use: boot, last: None, times: 0 }
    }

    pub(super) fn times(&self) -> u64 {
        self.times
    }

    /// Notes a request that was permitted.
    pub(super) fn note(&mut self, request: &Request<'_>, now: Now) {
        if keeps_awake(request) {
            self.last_use = now.boot;
        }
    }
}

/// Whether an agent that gets this request is in use. Who only watches does not keep keys open.
fn keeps_awake(request: &Request<'_>) -> bool {
    match request {
        Request::Hello(_)
        | Request::Ping
        | Request::Status
        | Request::List(_)
        | Request::Describe(_)
        | Request::Stats
        | Request::Random(_) => false,
        Request::Lock { .. }
        | Request::Unlock { .. }
        | Request::Add { .. }
        | Request::Remove(_)
        | Request::Rotate(_)
        | Request::Rename(_)
        | Request::RemoveAll(_)
        | Request::Export { .. }
        | Request::Encrypt { .. }
        | Request::Decrypt { .. }
        | Request::StreamNew(_)
        | Request::StreamOpen { .. }
        | Request::RemoteStreamNew(_)
        | Request::RemoteStreamOpen { .. }
        | Request::RemoteStreamEncrypt { .. }
        | Request::RemoteStreamDecrypt { .. }
        | Request::RemoteStreamClose(_)
        | Request::Wrap { .. }
        | Request::Unwrap { .. }
        | Request::DataKey(_)
        | Request::DataKeyWrapped(_)
        | Request::Rewrap { .. }
        | Request::Verify { .. }
        | Request::Mac { .. }
        | Request::MacVerify { .. }
        | Request::Bind(_)
        | Request::Batch { .. } => true,
    }
}

impl<R: Random, A: Audit> Core<R, A> {
    /// Wipes every key that is not sealed by a lock, with its name and its streams, and gives their number. An unlock that is
    /// under way opens nothing any more.
    pub fn forget(&mut self, reason: Reason, now: Now) -> usize {
        let keys = self.keyring.forget(&mut self.random);
        self.streams.end_all();
        self.unasked.times = self.unasked.times.saturating_add(1);
        // Where there was nothing, the time before is what somebody may want to know of.
        if keys > 0 || self.unasked.last.is_none() {
            self.unasked.last = Some(Forgotten { keys, reason, unix: now.unix });
        }
        self.audit.record(&Event::Forgotten { keys: keys as u64, reason });
        keys
    }

    /// When keys are forgotten because nobody uses them, since boot.
    pub(super) fn idle_deadline(&self) -> Option<Duration> {
        let idle_lock = self.limits.idle_lock?;
        let open = !self.keyring.is_locked() && !self.keyring.is_empty();
        open.then(|| self.unasked.last_use.saturating_add(idle_lock))
    }

    pub(super) fn forgotten_facts(&self) -> Vec<Fact> {
        let fact = |name: &str, value: String| Fact { name: name.to_owned(), value };
        let Some(Forgotten { keys, reason, unix }) = &self.unasked.last else { return Vec::new() };
        vec![
            fact("forgotten-keys", keys.to_string()),
            fact("forgotten-because", reason.to_string()),
            fact("forgotten-unix", unix.to_string()),
        ]
    }
}
