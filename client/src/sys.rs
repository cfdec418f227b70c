//! The one call of this crate that needs `unsafe`: a descriptor that the caller of `kmsctl` named by its number.
#![expect(unsafe_code, reason = "a descriptor given by number has no safe owner")]

use std::{
    fs::File,
    io,
    os::fd::{BorrowedFd, RawFd},
};

/// A duplicate of descriptor `number`, which stays open.
///
/// # Errors
/// The number is not that of an open descriptor.
pub(crate) fn duplicate(number: RawFd) -> io::Result<File> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is not -1, the borrow ends with the call to `dup`, and a number that is not open makes that call fail
    // with EBADF; nothing in this program closes descriptors that it was started with.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned().map(File::from)
}
