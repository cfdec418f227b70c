//! The things of this crate that need `unsafe`: a mark that a fork wipes, and for `kmsctl` a descriptor that its caller named by its
//! number, and what its caller wants of a signal.
#![expect(
    unsafe_code,
    reason = "shared memory with a meaning of its own, a descriptor without an owner, a call that has no safe form"
)]

use std::{
    num::NonZeroUsize,
    ptr::NonNull,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

/// Bytes of the mapping: the least that there is.
const PAGE_LEN: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Forks between this process and the first ancestor that asked, as far as each was noticed.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// A number that a process shares with none of its ancestors since the first one that asked. Process ids would not do: they come
/// again, and in a namespace of its own a child can have that of its parent.
pub(crate) fn lineage() -> u64 {
    static MARK: OnceLock<Option<Mark>> = OnceLock::new();
    match MARK.get_or_init(Mark::new) {
        Some(mark) => mark.read(),
        // A kernel before 4.14, or something that pretends to be one.
        None => u64::from(std::process::id()),
    }
}

/// A number that the kernel makes zero in the child of a fork, whichever call made it.
struct Mark(NonNull<AtomicU64>);

// SAFETY: what it points to is atomic, and is never unmapped.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    fn new() -> Option<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping, at a place that the kernel chooses, touches nothing of ours.
        let page = unsafe { mmap_anonymous(None, PAGE_LEN, access, MapFlags::MAP_PRIVATE) }.ok()?;
        // SAFETY: `page` is that mapping, of that length; the advice changes what a fork makes of it and nothing here.
        unsafe { madvise(page, PAGE_LEN.get(), MmapAdvise::MADV_WIPEONFORK) }.ok()?;
        Some(Self(page.cast()))
    }

    fn read(&self) -> u64 {
        // SAFETY: the mapping is never unmapped, begins at a page and so is aligned, and any bytes are a number, zero among them.
        let mark = unsafe { self.0.as_ref() };
        match mark.load(Ordering::Relaxed) {
            0 => {
                let new = FORKS.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                // Another thread may have been as quick.
                mark.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed)
                    .map_or_else(|found| found, |_| new)
            }
            mark => mark,
        }
    }
}

/// A duplicate of descriptor `number`, which stays open.
///
/// # Errors
/// The number is not that of an open descriptor.
#[cfg(feature = "cli")]
pub(crate) fn duplicate(number: std::os::fd::RawFd) -> std::io::Result<std::fs::File> {
    if number < 0 {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is not -1, the borrow ends with the call to `dup`, and a number that is not open makes that call fail
    // with EBADF; nothing in this program closes descriptors that it was started with.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned().map(std::fs::File::from)
}

/// Whether whoever started this program wants it to take no notice of a signal, as `nohup` does.
#[cfg(feature = "cli")]
pub(crate) fn is_ignored(signal: nix::sys::signal::Signal) -> bool {
    use nix::libc;
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call changes nothing; it writes to `action`, which is of the size that it expects.
    let asked = unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call has filled `action`, having succeeded.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
