//! The one module with `unsafe`: pages from the kernel and from `memsec`, and values placed in them.
//!
//! Each type here owns its pages alone, wipes them before it gives them back, and checks what every call returned. What
//! cannot be given back safely is leaked, wiped and still locked. Nothing here decides whether unlocked memory will do.

#![expect(
    unsafe_code,
    reason = "mmap, mlock, madvise, memfd_secret and values in such memory have no safe form"
)]

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::{io, slice};

use zeroize::Zeroize;

use crate::MAX_LEN;
use crate::error::{Call, RegionError};

/// Bytes of canary that `memsec` puts before an allocation.
const CANARY_LEN: usize = 16;

/// Soft and hard `RLIMIT_MEMLOCK` in bytes; `u64::MAX` is no limit. Nothing if the kernel does not tell.
#[must_use]
pub fn memlock_limit() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit, which the call fills.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (status == 0).then_some((limit.rlim_cur, limit.rlim_max))
}

fn page_size() -> usize {
    // SAFETY: sysconf reads no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

fn check_len(len: usize) -> Result<(), RegionError> {
    if len > MAX_LEN { Err(RegionError::TooLarge { len }) } else { Ok(()) }
}

fn check(status: libc::c_int, call: Call, len: usize) -> Result<(), RegionError> {
    if status == 0 { Ok(()) } else { Err(failed(call, len)) }
}

fn failed(call: Call, len: usize) -> RegionError {
    RegionError::from_call(call, io::Error::last_os_error().raw_os_error().unwrap_or(0), len)
}

/// Locks the stack of the calling thread, whole, and keeps it out of dumps and of children that it may fork. Pages are locked as they are touched, so that what
/// is never used takes no memory; all of it counts against `RLIMIT_MEMLOCK`. For a thread that glibc made: the stack of the
/// first one grows.
pub(crate) fn lock_own_stack() -> Result<(), RegionError> {
    let (base, len) = own_stack()?;
    for (advice, call) in [(libc::MADV_DONTDUMP, Call::DontDump), (libc::MADV_DONTFORK, Call::DontFork)] {
        // SAFETY: the range is mapped and this thread's own; neither advice changes contents.
        check(unsafe { libc::madvise(base.cast(), len, advice) }, call, len)?;
    }
    // SAFETY: as above.
    check(unsafe { libc::mlock2(base.cast(), len, libc::MLOCK_ONFAULT) }, Call::Mlock, len)
}

/// The lowest address of the calling thread's stack above its guard, and its length.
fn own_stack() -> Result<(*mut u8, usize), RegionError> {
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    let failed = |status: libc::c_int| RegionError::from_call(Call::Stack, status, 0);
    // SAFETY: the calling thread is alive, and the place is written by the call, if it succeeds.
    let status = unsafe { libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) };
    if status != 0 {
        return Err(failed(status));
    }
    let (mut base, mut len): (*mut libc::c_void, usize) = (ptr::null_mut(), 0);
    // SAFETY: the attributes were written above, and both places are alive.
    let status = unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut base, &raw mut len) };
    // SAFETY: they were written above and are not used again.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    if status == 0 { Ok((base.cast(), len)) } else { Err(failed(status)) }
}

/// Memory of either origin.
pub(crate) enum Region {
    Mapping(Mapping),
    Heap(GuardedHeap),
}

impl Region {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapping(mapping) => mapping.bytes(),
            Self::Heap(heap) => heap.bytes(),
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Mapping(mapping) => mapping.bytes_mut(),
            Self::Heap(heap) => heap.bytes_mut(),
        }
    }
}

/// A range of addresses that is unmapped on drop.
struct Reservation {
    base: NonNull<u8>,
    len: usize,
}

impl Reservation {
    /// `len` bytes of `fd`, or of anonymous pages, at an address that the kernel chooses.
    fn map(len: usize, prot: libc::c_int, fd: Option<RawFd>, call: Call) -> Result<Self, RegionError> {
        let (flags, fd) = match fd {
            Some(fd) => (libc::MAP_SHARED, fd),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new mapping at a free address touches no memory in use.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(failed(call, len));
        }
        // The kernel maps nothing at address zero unless it is asked to.
        let base = NonNull::new(base.cast()).ok_or(RegionError::Allocate { len })?;
        Ok(Self { base, len })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping. Where it fails, the range stays mapped: a leak, no danger.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Whole pages between two guard pages, of which `len` bytes from `start` on are shown.
pub(crate) struct Mapping {
    pages: NonNull<u8>,
    pages_len: usize,
    start: NonNull<u8>,
    len: usize,
    /// Last, so that it is unmapped after the wipe.
    reservation: Reservation,
}

// SAFETY: the pages belong to this value alone and are bound to no thread.
unsafe impl Send for Mapping {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes at the start of anonymous zero pages, not locked yet.
    pub(crate) fn anonymous(len: usize) -> Result<Self, RegionError> {
        let (page, pages_len) = Self::layout(len)?;
        let reservation = Reservation::map(pages_len + 2 * page, libc::PROT_NONE, None, Call::Mmap)?;
        // SAFETY: one page into a mapping of three or more.
        let pages = unsafe { reservation.base.add(page) };
        // SAFETY: the range lies inside the reservation and nobody refers to it yet.
        let status =
            unsafe { libc::mprotect(pages.as_ptr().cast(), pages_len, libc::PROT_READ | libc::PROT_WRITE) };
        check(status, Call::Mprotect, len)?;
        Self { pages, pages_len, start: pages, len, reservation }.hidden()
    }

    /// `len` bytes at the end of secretmem zero pages, which are locked by nature.
    pub(crate) fn secretmem(len: usize) -> Result<Self, RegionError> {
        let (page, pages_len) = Self::layout(len)?;
        let total = pages_len + 2 * page;
        // Guards are part of the mapping: to map over a reservation with MAP_FIXED leaves a hole for another thread
        // when it fails.
        let (reservation, file) = Self::map_secret_file(total)?;
        drop(file); // the mapping keeps the memory; a descriptor could be inherited, passed or mapped by others
        // SAFETY: one page into a mapping of three or more.
        let pages = unsafe { reservation.base.add(page) };
        // SAFETY: `pages_len` bytes follow, and one guard page after them.
        let after = unsafe { pages.add(pages_len) };
        for guard in [reservation.base, after] {
            // SAFETY: a whole page inside the mapping that nobody refers to.
            let status = unsafe { libc::mprotect(guard.as_ptr().cast(), page, libc::PROT_NONE) };
            check(status, Call::Mprotect, len)?;
        }
        // SAFETY: `len` is at most `pages_len`.
        let start = unsafe { pages.add(pages_len - len) };
        // Populated before there is a value whose drop would touch the pages.
        Self::populate(pages, pages_len, page, len)?;
        Self { pages, pages_len, start, len, reservation }.hidden()
    }

    /// Size of a page, and `len` rounded up to at least one.
    fn layout(len: usize) -> Result<(usize, usize), RegionError> {
        check_len(len)?;
        let page = page_size();
        Ok((page, len.max(1).next_multiple_of(page)))
    }

    fn map_secret_file(total: usize) -> Result<(Reservation, OwnedFd), RegionError> {
        // SAFETY: the call takes flags and returns a descriptor or -1; the flag is O_CLOEXEC, not FD_CLOEXEC.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        let fd =
            RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(|| failed(Call::MemfdSecret, total))?;
        // SAFETY: the descriptor was made just now and has no other owner.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(total).map_err(|_| RegionError::TooLarge { len: total })?;
        // SAFETY: the descriptor is open.
        check(unsafe { libc::ftruncate(file.as_raw_fd(), size) }, Call::Ftruncate, total)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Ok((Reservation::map(total, prot, Some(file.as_raw_fd()), Call::MmapSecretMem)?, file))
    }

    /// Faults every page in through the kernel, which answers with an error where a store of ours would be a SIGBUS.
    fn populate(pages: NonNull<u8>, pages_len: usize, page: usize, len: usize) -> Result<(), RegionError> {
        for offset in (0..pages_len).step_by(page) {
            // SAFETY: the byte lies in readable and writable pages that nobody refers to yet.
            let got = unsafe { libc::getrandom(pages.add(offset).as_ptr().cast(), 1, 0) };
            if got != 1 {
                return Err(failed(Call::Populate, len));
            }
            // SAFETY: as above, and the page is present.
            unsafe { pages.add(offset).write(0) };
        }
        Ok(())
    }

    /// Keeps all of the mapping, guards too, out of dumps and forked children: a child could move or unprotect a guard
    /// page of a shared file.
    fn hidden(self) -> Result<Self, RegionError> {
        let Reservation { base, len } = self.reservation;
        for (advice, call) in [(libc::MADV_DONTDUMP, Call::DontDump), (libc::MADV_DONTFORK, Call::DontFork)] {
            // SAFETY: the range is our own mapping, and neither advice changes contents.
            check(unsafe { libc::madvise(base.as_ptr().cast(), len, advice) }, call, self.len)?;
        }
        Ok(self)
    }

    pub(crate) fn lock(&self) -> Result<(), RegionError> {
        // SAFETY: the range is our own; locking changes no contents.
        check(unsafe { libc::mlock(self.pages.as_ptr().cast(), self.pages_len) }, Call::Mlock, self.len)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes from `start` lie in our pages; the borrow of self keeps writers away.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the borrow is exclusive.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Bytes from `start` to the end of the pages.
    pub(crate) fn capacity(&self) -> usize {
        self.pages_len - (self.start.addr().get() - self.pages.addr().get())
    }

    /// Shows `len` bytes if the pages have them.
    pub(crate) fn extend_within(&mut self, len: usize) -> bool {
        let fits = len <= self.capacity();
        if fits {
            self.len = self.len.max(len);
        }
        fits
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: all data pages are ours, readable and writable, and no borrow of them is alive.
        unsafe { slice::from_raw_parts_mut(self.pages.as_ptr(), self.pages_len) }.zeroize();
    }
}

/// An allocation of `memsec`: guard pages at both sides, a canary in front, its end at the rear guard.
pub(crate) struct GuardedHeap {
    user: NonNull<[u8]>,
}

// SAFETY: the allocation belongs to this value alone and is bound to no thread.
unsafe impl Send for GuardedHeap {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for GuardedHeap {}

impl GuardedHeap {
    /// `len` zero bytes whose guards and advices hold; whether they are locked only [`lock`](Self::lock) tells, since
    /// `memsec` ignores what its calls return.
    pub(crate) fn new(len: usize) -> Result<Self, RegionError> {
        check_len(len)?;
        // SAFETY: with the length checked, the sizes that memsec computes from it cannot overflow.
        let user = unsafe { memsec::malloc_sized(len) }.ok_or(RegionError::Allocate { len })?;
        let mut heap = Self { user };
        heap.bytes_mut().fill(0); // memsec fills it with 0xd0
        let (pages, pages_len) = heap.pages();
        let page = page_size();
        // SAFETY: in memsec's layout a guard page precedes the data pages and one follows them.
        let guards = unsafe { [pages.sub(page), pages.add(pages_len)] };
        for guard in guards {
            // SAFETY: the guard is a whole page of this allocation that holds nothing.
            let status = unsafe { libc::mprotect(guard.as_ptr().cast(), page, libc::PROT_NONE) };
            check(status, Call::Mprotect, len)?;
        }
        for (advice, call) in [(libc::MADV_DONTDUMP, Call::DontDump), (libc::MADV_DONTFORK, Call::DontFork)] {
            // SAFETY: whole pages of this allocation; neither advice changes contents.
            check(unsafe { libc::madvise(pages.as_ptr().cast(), pages_len, advice) }, call, len)?;
        }
        Ok(heap)
    }

    /// The data pages in memsec's layout: canary and user bytes, filled up at the front.
    fn pages(&self) -> (NonNull<u8>, usize) {
        let pages_len = (CANARY_LEN + self.user.len()).next_multiple_of(page_size());
        // SAFETY: the user bytes end where the data pages end, so these begin `pages_len` before.
        let pages = unsafe { self.user.cast::<u8>().add(self.user.len()).sub(pages_len) };
        (pages, pages_len)
    }

    pub(crate) fn lock(&self) -> Result<(), RegionError> {
        let (pages, pages_len) = self.pages();
        // SAFETY: the range is our own; locking changes no contents.
        check(unsafe { libc::mlock(pages.as_ptr().cast(), pages_len) }, Call::Mlock, self.user.len())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the bytes are initialised and ours; the borrow of self keeps writers away.
        unsafe { self.user.as_ref() }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the borrow is exclusive.
        unsafe { self.user.as_mut() }
    }
}

impl Drop for GuardedHeap {
    fn drop(&mut self) {
        self.bytes_mut().zeroize(); // memsec wipes too, but not what has to be leaked below
        let (pages, pages_len) = self.pages();
        let page = page_size();
        // The pages go back to the allocator, so a forked child must see them again, and the allocator must be able to
        // write to all of them; memsec would go on without either.
        // SAFETY: whole pages of this allocation that no borrow refers to.
        let shown = unsafe { libc::madvise(pages.as_ptr().cast(), pages_len, libc::MADV_DOFORK) } == 0;
        // SAFETY: memsec's allocation begins two pages before the data pages and ends one after them.
        let writable = unsafe {
            let base = pages.sub(2 * page);
            libc::mprotect(base.as_ptr().cast(), pages_len + 3 * page, libc::PROT_READ | libc::PROT_WRITE)
        } == 0;
        if shown && writable {
            // SAFETY: `user` came from malloc_sized and is freed once. memsec wipes again and unlocks; it aborts only
            // if the canary was overwritten, that is if memory is corrupt already.
            unsafe { memsec::free(self.user) };
        }
    }
}

/// A `T` in guarded pages of its own.
pub(crate) struct Placed<T> {
    space: Space<T>,
}

/// Room for a `T`, with no `T` in it.
pub(crate) struct Space<T> {
    heap: GuardedHeap,
    value: PhantomData<T>,
}

impl<T> Placed<T> {
    pub(crate) fn reserve() -> Result<Space<T>, RegionError> {
        // The room ends at a page boundary, and a size is a multiple of its alignment: so it is aligned up to a page.
        const { assert!(align_of::<T>() <= 4096, "the alignment is larger than a page") };
        Ok(Space { heap: GuardedHeap::new(size_of::<T>())?, value: PhantomData })
    }

    pub(crate) fn get(&self) -> &T {
        // SAFETY: `fill` put a T there; the borrow of self keeps writers away.
        unsafe { self.space.as_ptr().as_ref() }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        // SAFETY: as for `get`, and the borrow is exclusive.
        unsafe { self.space.as_ptr().as_mut() }
    }
}

impl<T> Space<T> {
    pub(crate) fn lock(&self) -> Result<(), RegionError> {
        self.heap.lock()
    }

    pub(crate) fn fill(self, value: T) -> Placed<T> {
        // SAFETY: the room is ours, large enough and aligned (see `reserve`), and holds no T yet.
        unsafe { self.as_ptr().write(value) };
        Placed { space: self }
    }

    fn as_ptr(&self) -> NonNull<T> {
        self.heap.user.cast()
    }
}

impl<T> Drop for Placed<T> {
    fn drop(&mut self) {
        // SAFETY: a T is there and is dropped once; the pages are wiped and freed after it, also when its drop panics.
        unsafe { self.space.as_ptr().drop_in_place() };
    }
}

#[cfg(test)]
mod tests {
    //! What only another view of the same pages shows: that they are zero when they are given back, that guards fault, and
    //! that a forked child has nothing.

    use std::io::{PipeReader, PipeWriter, Read, pipe};

    use super::*;
    use crate::{LockedBox, LockedBuffer, Policy, Secret, SecretRegion, SecretVec};

    const LEN: usize = 1024;
    /// What counts as left of a secret. Not a single byte: the allocator's own words in freed memory may hold any.
    const PIECE: [u8; 8] = [0xa7; 8];

    /// Holds pages alive after their owner unmapped them, with what was in them last.
    struct Witness {
        reader: PipeReader,
        _writer: PipeWriter,
    }

    impl Witness {
        /// Takes a reference to the pages under `bytes` into a pipe; nothing is copied.
        fn of(bytes: &[u8]) -> Self {
            let (reader, writer) = pipe().unwrap();
            let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            // SAFETY: the part is readable memory; the kernel only reads it, then or later.
            let taken = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const part, 1, 0) };
            assert_eq!(usize::try_from(taken), Ok(bytes.len()));
            Self { reader, _writer: writer }
        }

        /// Pieces of the secret among the last contents of the `len` bytes.
        fn secrets_left(mut self, len: usize) -> usize {
            let mut last = vec![0; len];
            self.reader.read_exact(&mut last).unwrap();
            last.chunks(PIECE.len()).filter(|piece| **piece == PIECE).count()
        }
    }

    fn left_after_drop<T>(owner: T, bytes: impl Fn(&mut T) -> &mut [u8]) -> usize {
        let mut owner = owner;
        bytes(&mut owner).fill(0xa7);
        let witness = Witness::of(bytes(&mut owner));
        let len = bytes(&mut owner).len();
        drop(owner);
        witness.secrets_left(len)
    }

    #[test]
    fn bytes_are_wiped_before_they_are_given_back() {
        // The control: without a wipe the witness sees what was there.
        let kept = left_after_drop(ManuallyKept(vec![0; LEN].leak()), |k| k.0);
        assert_eq!(kept, LEN / PIECE.len());

        assert_eq!(
            left_after_drop(SecretRegion::new(LEN, Policy::Mlock).unwrap(), |r| r.expose_secret_mut()),
            0
        );
        assert_eq!(
            left_after_drop(LockedBuffer::new(LEN, Policy::Auto).unwrap(), |b| b.expose_secret_mut()),
            0
        );
        assert_eq!(left_after_drop(LockedBox::new([0; LEN]).unwrap(), |b| b.expose_secret_mut()), 0);
        assert_eq!(left_after_drop(Secret::<LEN>::zeroed(), |s| s.expose_secret_mut()), 0);
        assert_eq!(left_after_drop(SecretVec::with_capacity(LEN), SecretVec::as_mut_slice), 0);
    }

    struct ManuallyKept(&'static mut [u8]);

    #[test]
    fn a_grown_buffer_leaves_its_old_pages_wiped() {
        let mut buffer = LockedBuffer::new(LEN, Policy::Auto).unwrap();
        buffer.expose_secret_mut().fill(0xa7);
        let witness = Witness::of(buffer.expose_secret());
        buffer.grow(1 << 20).unwrap();
        assert_eq!(buffer.expose_secret().iter().filter(|b| **b == 0xa7).count(), LEN);
        assert_eq!(witness.secrets_left(LEN), 0);
    }

    #[test]
    fn secretmem_is_wiped_before_it_is_unmapped() {
        // The kernel lends such pages to nobody, but a shared mapping can be doubled.
        let Ok(mut mapping) = Mapping::secretmem(LEN) else { return };
        mapping.bytes_mut().fill(0xa7);
        let pages_len = mapping.pages_len;
        // SAFETY: an old size of zero doubles the mapping elsewhere and leaves the first as it is.
        let double =
            unsafe { libc::mremap(mapping.pages.as_ptr().cast(), 0, pages_len, libc::MREMAP_MAYMOVE) };
        assert_ne!(double, libc::MAP_FAILED);
        let count = || {
            // SAFETY: `pages_len` bytes are mapped there; nobody writes while this runs.
            unsafe { slice::from_raw_parts(double.cast::<u8>(), pages_len) }
                .iter()
                .filter(|b| **b == 0xa7)
                .count()
        };
        assert_eq!(count(), LEN);
        drop(mapping);
        assert_eq!(count(), 0);
        // SAFETY: the double is ours and is not used again.
        assert_eq!(unsafe { libc::munmap(double, pages_len) }, 0);
    }

    #[test]
    fn the_descriptor_of_secretmem_is_closed_on_exec_while_it_lives() {
        let Ok((_mapping, file)) = Mapping::map_secret_file(page_size()) else { return };
        // SAFETY: the descriptor is open.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    /// Whether the kernel, asked to read one byte for us, can.
    fn readable(address: *const u8) -> bool {
        let (_reader, writer) = pipe().unwrap();
        // SAFETY: the kernel checks the address and answers EFAULT; nothing here reads it.
        let written = unsafe { libc::write(writer.as_raw_fd(), address.cast(), 1) };
        let errno = io::Error::last_os_error().raw_os_error();
        assert!(written == 1 || (written == -1 && errno == Some(libc::EFAULT)));
        written == 1
    }

    #[test]
    fn a_byte_past_either_end_faults() {
        let mut all: Vec<Region> = vec![
            Region::Heap(GuardedHeap::new(5000).unwrap()),
            Region::Mapping(Mapping::anonymous(5000).unwrap()),
        ];
        all.extend(Mapping::secretmem(5000).map(Region::Mapping));
        for region in &all {
            let bytes = region.bytes().as_ptr_range();
            let last = bytes.end.wrapping_sub(1);
            assert!(readable(bytes.start) && readable(last));
            let pages_start = bytes.start.map_addr(|a| a & !(page_size() - 1));
            let pages_end = bytes.end.map_addr(|a| a.next_multiple_of(page_size()));
            assert!(readable(pages_start));
            for past in [pages_start.wrapping_sub(1), pages_end, pages_end.wrapping_add(page_size() - 1)] {
                assert!(!readable(past));
            }
        }
    }

    /// The signal that ends a forked child which reads `address`, or nothing.
    fn signal_of_child_reading(address: *const u8) -> Option<libc::c_int> {
        // SAFETY: the child calls only what is async-signal-safe, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the read is the experiment, in a process that holds nothing else.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                ptr::read_volatile(address);
                libc::_exit(0);
            }
        }
        assert!(child > 0);
        let mut status = 0;
        // SAFETY: the child is ours; the status is live.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
    }

    #[test]
    fn a_forked_child_has_none_of_the_pages() {
        let control = Secret::<LEN>::zeroed();
        assert_eq!(signal_of_child_reading(control.expose_secret().as_ptr()), None);

        let mut regions = vec![SecretRegion::new(LEN, Policy::Mlock).unwrap()];
        regions.extend(SecretRegion::new(LEN, Policy::SecretMem));
        for region in &regions {
            assert_eq!(signal_of_child_reading(region.expose_secret().as_ptr()), Some(libc::SIGSEGV));
        }
        let buffer = LockedBuffer::new(LEN, Policy::Auto).unwrap();
        assert_eq!(signal_of_child_reading(buffer.expose_secret().as_ptr()), Some(libc::SIGSEGV));
        let boxed = LockedBox::new([0_u8; LEN]).unwrap();
        assert_eq!(signal_of_child_reading(boxed.expose_secret().as_ptr()), Some(libc::SIGSEGV));
    }
}
