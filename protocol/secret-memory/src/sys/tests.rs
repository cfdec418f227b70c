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

    assert_eq!(left_after_drop(SecretRegion::new(LEN, Policy::Mlock).unwrap(), |r| r.expose_secret_mut()), 0);
    assert_eq!(left_after_drop(LockedBuffer::new(LEN, Policy::Auto).unwrap(), |b| b.expose_secret_mut()), 0);
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
    let double = unsafe { libc::mremap(mapping.pages.as_ptr().cast(), 0, pages_len, libc::MREMAP_MAYMOVE) };
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
