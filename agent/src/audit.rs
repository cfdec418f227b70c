//! What has to be told about keys and the lock.
//!
//! Owns the events and the sink that they go to. Keys are named by their ids alone: a log is no place for names, and never
//! for secrets. This release tells them to the log of the agent; a durable sink takes the same events.

use std::fmt;

use kms_envelope::KeyId;

/// Why keys were forgotten without anybody's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// `SIGUSR1`.
    Signal,
    /// Nobody used a key for the configured time.
    Idle,
    /// The session of the agent's uid was locked.
    SessionLocked,
    /// The machine is about to suspend.
    Suspend,
    /// Nobody watches sessions and suspends any more.
    MonitorEnded,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signal => "signal",
            Self::Idle => "idle",
            Self::SessionLocked => "session-locked",
            Self::Suspend => "suspend",
            Self::MonitorEnded => "monitor-ended",
        })
    }
}

/// Something that changed keys or the lock, handed a key out, or tried to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key was made or imported.
    Added {
        /// Who asked.
        uid: u32,
        /// The key.
        key: KeyId,
    },
    /// A key got a new primary version.
    Rotated {
        /// Who asked.
        uid: u32,
        /// The key.
        key: KeyId,
        /// The version.
        version: u32,
    },
    /// A key got another name.
    Renamed {
        /// Who asked.
        uid: u32,
        /// The key.
        key: KeyId,
    },
    /// A key is gone.
    Removed {
        /// Who asked.
        uid: u32,
        /// The key.
        key: KeyId,
    },
    /// All keys that lived in memory only are gone.
    RemovedAll {
        /// Who asked.
        uid: u32,
        /// Their number.
        keys: u64,
    },
    /// A key is gone because its lifetime is over.
    Expired {
        /// The key.
        key: KeyId,
    },
    /// The bytes of a key were handed out.
    Exported {
        /// Who asked.
        uid: u32,
        /// The key.
        key: KeyId,
        /// The version.
        version: u32,
    },
    /// The agent was locked.
    Locked {
        /// Who asked.
        uid: u32,
    },
    /// Keys were forgotten.
    Forgotten {
        /// Their number.
        keys: u64,
        /// Why.
        reason: Reason,
    },
    /// The agent was unlocked.
    Unlocked {
        /// Who asked.
        uid: u32,
    },
    /// A passphrase was wrong.
    WrongPassphrase {
        /// Who gave it.
        uid: u32,
        /// How many in a row.
        failures: u32,
    },
}

/// Where events go.
pub trait Audit {
    /// Takes one, before the reply to the request that brought it about is sent.
    fn record(&mut self, event: &Event);
}

/// The log of the agent.
pub struct LogAudit;

impl Audit for LogAudit {
    fn record(&mut self, event: &Event) {
        match *event {
            Event::Added { uid, key } => tracing::info!(uid, %key, "added a key"),
            Event::Rotated { uid, key, version } => tracing::info!(uid, %key, version, "rotated a key"),
            Event::Renamed { uid, key } => tracing::info!(uid, %key, "renamed a key"),
            Event::Removed { uid, key } => tracing::info!(uid, %key, "removed a key"),
            Event::RemovedAll { uid, keys } => tracing::info!(uid, keys, "removed all keys of memory"),
            Event::Expired { key } => tracing::info!(%key, "a key has expired"),
            Event::Exported { uid, key, version } => tracing::warn!(uid, %key, version, "handed out a key"),
            Event::Locked { uid } => tracing::info!(uid, "locked"),
            Event::Forgotten { keys, reason } => tracing::info!(keys, %reason, "forgot all keys"),
            Event::Unlocked { uid } => tracing::info!(uid, "unlocked"),
            Event::WrongPassphrase { uid, failures } => tracing::warn!(uid, failures, "wrong passphrase"),
        }
    }
}
