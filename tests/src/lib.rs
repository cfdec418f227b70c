//! The harness: starts the shipped programs, looks at them from outside, and speaks the wire without the client crate.
//!
//! Owns temporary folders, processes that it starts, and what is asserted when they end. It never skips: what a test needs
//! (root, strace, gdb, setpriv) is asserted, with the name of the Debian package. It waits for conditions, never for the
//! clock.

pub mod agent;
pub mod canary;
pub mod process;
pub mod programs;
pub mod shield;
pub mod sys;
pub mod wire;

pub use agent::{Agent, AgentBuilder, Ended};
pub use wire::{Reply, Wire};

/// A uid that is neither root nor, in general, anybody's.
pub const ALICE: u32 = 1001;

/// Another one.
pub const BOB: u32 = 1002;

/// Runs `work` in a thread of its own under `uid` (real, effective and saved, and the gid of the same number): what it
/// connects, sends and starts is that user's. The rest of the process stays root.
pub fn as_uid<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    programs::needs_root();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            sys::become_user(uid, uid, uid);
            work()
        });
        match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
