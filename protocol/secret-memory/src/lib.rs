//! Memory for secrets: regions that are locked, guarded, kept out of dumps and of forked children, and wiped before
//! they are given back; heap types that wipe; threads with locked stacks; the wipe of the stack.
//!
//! Owns every `mmap`, `mlock` and `memfd_secret` of the project. It never aborts on a refused lock and never hands
//! out unlocked memory unless [`Policy::Preferred`] asks for it; it does no cryptography and knows no configuration.
//!
//! secretmem mappings are made here and not by `memsec`, whose `memfd_secret` leaves its descriptor open, inheritable
//! and unreachable (it is stored behind a guard page that only its `free` knows), ignores `ftruncate`, and aborts in
//! `free` if the descriptor was closed. Its mlocked, guarded allocations with canary are used, each step checked again.
//! Frame buffers are whole pages of their own, because they come and go and must not split the heap.
//!
//! See "Secrets in memory" in `docs/architecture.md`.

mod error;
mod locked;
mod region;
mod secret;
mod sys;
#[cfg(test)]
mod tests;
mod thread;

pub use zeroize::zeroize_stack;

pub use crate::error::{Call, RegionError};
pub use crate::locked::{LockedBox, LockedBuffer};
pub use crate::region::{Backing, Policy, SecretRegion};
pub use crate::secret::{CapacityExceeded, Secret, SecretVec};
pub use crate::sys::memlock_limit;
pub use crate::thread::spawn_locked;

/// Largest region, buffer or box, in bytes (1 GiB): far above any use, far below where sizes could overflow.
pub const MAX_LEN: usize = 1 << 30;
