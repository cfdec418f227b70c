//! The calls that the safe crates do not have. The only module of this package with `unsafe`.
#![expect(unsafe_code, reason = "raw system calls without a safe wrapper in nix")]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// Changes the credentials of the calling thread alone: no supplementary groups, the gid `effective`, and these uids.
/// The functions of libc would change every thread.
///
/// # Panics
/// Where the kernel refuses, that is without root.
pub fn become_user(real: u32, effective: u32, saved: u32) {
    let check = |status: libc::c_long, call: &str| {
        assert_eq!(status, 0, "{call}: {} (this test needs root)", io::Error::last_os_error());
    };
    // SAFETY: an empty list, so no pointer is read.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, 0) }, "setgroups");
    // SAFETY: three integers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, effective, effective, effective) }, "setresgid");
    // SAFETY: three integers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, real, effective, saved) }, "setresuid");
}

/// A descriptor that becomes readable when the process ends; nothing when there is no such process.
#[must_use]
pub fn pidfd_open(pid: i32) -> Option<OwnedFd> {
    // SAFETY: two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel made this descriptor just now, and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
