//! The thread beside the loop, for the one kind of work that takes long: the derivation of a passphrase's key.
//!
//! Owns the hand-over, a job to the thread and its result back. There is one job at a time, since the core hands out one, and
//! the thread is there from the start, since none can be started in the sandbox.

use std::{
    convert::Infallible,
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use kms_envelope::KEY_LEN;
use kms_secret_memory::{Policy, Secret, spawn_locked};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Key;
use crate::{crypto::Derivation, error::StartError};

/// Argon2id works in memory of its own; on the stack it has a few blocks of 1 KiB.
const STACK_LEN: usize = 128 * 1024;

/// The result of a [`Derivation`], and whom it is for.
pub(super) struct Done {
    pub(super) connection: Key,
    pub(super) key: Option<Secret<KEY_LEN>>,
}

#[derive(Default)]
struct Desk {
    job: Option<(Key, Box<Derivation>)>,
    done: Option<Done>,
}

struct Shared {
    desk: Mutex<Desk>,
    job_there: Condvar,
    /// Readable when there is a result.
    done: EventFd,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing panics while it holds the desk.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_job(&self) -> (Key, Box<Derivation>) {
        let mut desk = self.desk();
        loop {
            match desk.job.take() {
                Some(job) => return job,
                None => desk = self.job_there.wait(desk).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The loop's end of the hand-over.
pub(super) struct Worker(Arc<Shared>);

impl Worker {
    /// Starts the thread.
    pub(super) fn start(memory: Policy) -> Result<Self, StartError> {
        let done = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let done = done.map_err(|errno| StartError::Runtime(errno.into()))?;
        let shared = Arc::new(Shared { desk: Mutex::default(), job_there: Condvar::new(), done });
        let at_work = Arc::clone(&shared);
        spawn_locked("derivation", STACK_LEN, memory, move |_| -> Infallible {
            loop {
                let (connection, job) = at_work.next_job();
                let key = catch_unwind(AssertUnwindSafe(|| job.run())).ok().flatten();
                at_work.desk().done = Some(Done { connection, key });
                // The counter of an event is never full.
                let _ = at_work.done.write(1);
            }
        })?;
        Ok(Self(shared))
    }

    /// Gives the thread work for a connection.
    pub(super) fn begin(&self, connection: Key, derivation: Box<Derivation>) {
        self.0.desk().job = Some((connection, derivation));
        self.0.job_there.notify_one();
    }

    /// Takes a result, if there is one.
    pub(super) fn take_result(&self) -> Option<Done> {
        // Only to make it silent.
        let _ = self.0.done.read();
        self.0.desk().done.take()
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.done.as_fd()
    }
}
