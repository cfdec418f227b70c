//! The harness: starts the shipped programs, looks at them from outside, and speaks the wire without the client crate.
//!
//! Owns temporary folders, processes that it starts, and what is asserted when they end. It never skips: what a test needs
//! (root, strace, gdb, setpriv) is asserted, with the name of the Debian package. It waits for conditions, never for the
//! clock.

use std::{ffi::OsStr, path::Path};

use nix::sched::{CloneFlags, unshare};

pub mod agent;
pub mod canary;
pub mod kmsctl;
pub mod process;
pub mod programs;
pub mod seccomp;
pub mod shield;
pub mod start;
pub mod sys;
pub mod systemd;
pub mod wire;

pub use agent::{Agent, AgentBuilder, Ended, fresh_folder};
pub use kmsctl::kmsctl;
pub use wire::{Reply, Wire};

/// A uid that is neither root nor, in general, anybody's.
pub const ALICE: u32 = 1001;

/// Another one.
pub const BOB: u32 = 1002;

/// Runs `work` in a thread of its own under `uid` (real, effective and saved, and the gid of the same number): what it
/// connects, sends and starts is that user's. The rest of the process stays root.
pub fn as_uid<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    programs::needs_root();
    in_thread(|| {
        sys::become_user(uid, uid, uid);
        work()
    })
}

/// Runs `work` in a thread with mounts of its own, where `folder` is an empty file system of `size` bytes in memory. What it
/// starts sees the same; nobody else does, and it is gone when `work` ends.
pub fn on_small_disk<T: Send>(folder: &Path, size: usize, work: impl FnOnce() -> T + Send) -> T {
    programs::needs_root();
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("this test needs the right to mount");
        let mount = |words: &[&OsStr]| {
            let status = programs::tool("mount").args(words).status().unwrap();
            assert!(status.success(), "mount {words:?}: {status}");
        };
        mount(&["--make-rprivate".as_ref(), "/".as_ref()]);
        let options = format!("size={size},mode=0700");
        mount(&[
            "-t".as_ref(),
            "tmpfs".as_ref(),
            "-o".as_ref(),
            options.as_ref(),
            "none".as_ref(),
            folder.as_ref(),
        ]);
        work()
    })
}

fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
