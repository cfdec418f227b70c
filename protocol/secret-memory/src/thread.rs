//! Threads for work with secrets: a small stack that is locked before the work begins.
//!
//! Owns the order: lock, then work. What such a thread leaves on its stack is neither swapped out nor dumped; wiping it is the
//! part of who works there.

use std::{
    io,
    sync::{Arc, Barrier, OnceLock},
    thread::{Builder, JoinHandle},
};

use crate::{
    error::{Call, RegionError},
    region::{Backing, Policy, backing_of},
    sys,
};

/// Starts a thread with a stack of `stack_len` bytes that is locked and kept out of dumps and of forked children (one that it
/// forks itself would have no stack), and has it do `work`, which is told
/// what the stack became: [`Policy::Preferred`] may leave it unlocked, every other policy means mlock.
///
/// # Errors
/// The thread cannot be had, or its stack cannot be locked; then `work` was not begun, and is dropped already.
pub fn spawn_locked<T: Send + 'static>(
    name: &str,
    stack_len: usize,
    policy: Policy,
    work: impl FnOnce(Backing) -> T + Send + 'static,
) -> Result<JoinHandle<Option<T>>, RegionError> {
    let no_thread = |error: io::Error| {
        RegionError::from_call(Call::Thread, error.raw_os_error().unwrap_or(libc::EAGAIN), stack_len)
    };
    let met = Arc::new((Barrier::new(2), OnceLock::new()));
    let there = Arc::clone(&met);
    let thread = Builder::new()
        .name(name.to_owned())
        .stack_size(stack_len)
        .spawn(move || {
            let backing = backing_of(sys::lock_own_stack(), policy == Policy::Preferred);
            let (barrier, locked) = &*there;
            // It is set here alone.
            let _ = locked.set(backing.map(|_| ()));
            // What the work would have had is gone before the other end hears of it, which may end the process at once.
            let work = backing.ok().map(|backing| move || work(backing));
            // Nor does the work begin before the start of the thread is over at the other end: it may close a sandbox.
            barrier.wait();
            work.map(|work| work())
        })
        .map_err(no_thread)?;
    let (barrier, locked) = &*met;
    barrier.wait();
    locked.get().copied().unwrap_or(Ok(())).map(|()| thread)
}
