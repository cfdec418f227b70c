//! What protects the process, as it really is.
//!
//! Owns the facts of `status` about it (`docs/protocol.md`, section 5.3). Each was read back from the kernel once it was settled; none
//! can be undone by the process itself afterwards.

use std::os::unix::fs::MetadataExt;

use kms_protocol::Fact;
use kms_secret_memory::Backing;
use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, getrlimit},
    },
    unistd::{AccessFlags, access, getpid, getuid},
};

use crate::{config::LockOn, error::StartError, sandbox, sys};

/// What was settled at the start.
pub(crate) struct Protection {
    facts: Vec<Fact>,
}

impl Protection {
    /// What the kernel says of this process, before its threads are started.
    pub(crate) fn read() -> Result<Self, StartError> {
        let failed = |what| move |source: Errno| StartError::Protect { what, source };
        let soft = |resource, what| getrlimit(resource).map(|(soft, _)| number(soft)).map_err(failed(what));
        let traceable = Traceable::read()?;
        if let Traceable::ByOwnUid = traceable {
            tracing::warn!("the agent can be traced {traceable}");
        }
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let mut protection = Self { facts: Vec::new() };
        protection.fact("pid", getpid().to_string());
        protection.fact("dumpable", yes(prctl::get_dumpable().map_err(failed("PR_GET_DUMPABLE"))?));
        protection.fact("traceable", traceable.to_string());
        let privileges = prctl::get_no_new_privs().map_err(failed("PR_GET_NO_NEW_PRIVS"))?;
        protection.fact("no-new-privileges", yes(privileges));
        protection.fact("core-limit", soft(Resource::RLIMIT_CORE, "RLIMIT_CORE")?);
        protection.fact("descriptor-limit", soft(Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE")?);
        protection.fact("memory-lock-limit", soft(Resource::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK")?);
        Ok(protection)
    }

    /// The level of Landlock, where it is in force.
    pub(crate) fn landlock(&mut self, level: Option<i32>) {
        let told = match level.map(|level| (level, sandbox::lacks(level))) {
            None => "none".to_owned(),
            Some((level, lacking)) if lacking.is_empty() => level.to_string(),
            Some((level, lacking)) => format!("{level}, without {}", lacking.join(", ")),
        };
        self.fact("landlock", told);
    }

    /// Whether system calls are filtered.
    pub(crate) fn seccomp(&mut self, filtered: bool) {
        self.fact("seccomp", if filtered { "filter" } else { "none" }.to_owned());
    }

    /// What the stacks of the threads for requests and passphrases lie in.
    pub(crate) fn stacks(&mut self, backing: Backing) {
        self.fact("stacks", backing.to_string());
    }

    /// What `status` shows of it, and of what keys are forgotten on.
    pub(crate) fn facts(&self, watched: LockOn) -> Vec<Fact> {
        let mut shown = Self { facts: self.facts.clone() };
        shown.fact("lock-on", watched.to_string());
        shown.facts
    }

    fn fact(&mut self, name: &str, value: String) {
        self.facts.push(Fact { name: name.to_owned(), value });
    }
}

fn number(value: u64) -> String {
    if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() }
}

/// Whether another process of the agent's uid can trace it although it is not dumpable.
enum Traceable {
    No,
    ByOwnUid,
}

impl Traceable {
    /// Whoever made a user namespace may trace what was started in it, unless its program cannot be read there and belongs to a user
    /// or a group from outside: then the kernel counts the process among those outside (`would_dump` in its `fs/exec.c`).
    fn read() -> Result<Self, StartError> {
        let owner = sys::owner_of_user_namespace().map_err(StartError::Namespace)?;
        if owner != Some(getuid().as_raw()) {
            return Ok(Self::No);
        }
        let program = std::fs::metadata("/proc/self/exe").map_err(StartError::Namespace)?;
        let outside =
            program.uid() == overflow_id("overflowuid")? || program.gid() == overflow_id("overflowgid")?;
        let unreadable = access("/proc/self/exe", AccessFlags::R_OK).is_err();
        Ok(if outside && unreadable { Self::No } else { Self::ByOwnUid })
    }
}

/// The uid that is served. Never the one that stands for every user whom this namespace does not know: the kernel would show them
/// all as ourselves.
pub(crate) fn own_uid() -> Result<u32, StartError> {
    let uid = getuid().as_raw();
    if uid == overflow_id("overflowuid")? { Err(StartError::OverflowUid(uid)) } else { Ok(uid) }
}

/// What a uid or gid looks like that a user namespace does not know.
fn overflow_id(name: &str) -> Result<u32, StartError> {
    let text = match std::fs::read_to_string(format!("/proc/sys/kernel/{name}")) {
        // Hidden by `ProcSubset=pid`; this is what it is unless somebody changed it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(65534),
        text => text.map_err(StartError::Namespace)?,
    };
    text.trim().parse().map_err(|_| StartError::Namespace(std::io::ErrorKind::InvalidData.into()))
}

impl std::fmt::Display for Traceable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::No => "no",
            Self::ByOwnUid => "by its own uid, which made the user namespace that it is in",
        })
    }
}
