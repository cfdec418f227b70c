//! The calls that the safe crates do not have: `fork`, `signal`, pidfds, inherited descriptors, `SO_PASSRIGHTS`, `mallopt`, the
//! owner of a namespace.
//!
//! The only module of this crate with `unsafe`.
#![expect(unsafe_code, reason = "raw system calls without a safe wrapper in nix")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
};

use nix::{
    sys::signal::{SigHandler, Signal, signal},
    unistd::{ForkResult, Pid},
};

/// `SO_PASSRIGHTS` of Linux 6.16, which libc does not name yet.
pub(crate) const SO_PASSRIGHTS: libc::c_int = 83;

/// Forks. To be called while there is one thread, so that the child is a whole process.
pub(crate) fn fork() -> io::Result<ForkResult> {
    // SAFETY: the caller runs before any thread is started; the child may do whatever the parent may.
    unsafe { nix::unistd::fork() }.map_err(io::Error::from)
}

/// Ignores these signals.
pub(crate) fn ignore_signals(signals: &[Signal]) -> io::Result<()> {
    dispose(signals, SigHandler::SigIgn)
}

/// Has a fault of memory end the process by its signal, as without a handler: that of the standard library, which names an
/// overflow of the stack, takes calls that are not in the list.
pub(crate) fn default_faults() -> io::Result<()> {
    dispose(&[Signal::SIGSEGV, Signal::SIGBUS], SigHandler::SigDfl)
}

fn dispose(signals: &[Signal], to: SigHandler) -> io::Result<()> {
    for disposed in signals {
        // SAFETY: the callers ignore or take the default, so no code of ours ever runs in a handler.
        unsafe { signal(*disposed, to) }?;
    }
    Ok(())
}

/// Closes every descriptor above stderr but `kept`. To be called while this process has opened nothing else, or in a child that
/// never returns to what it was forked from.
pub(crate) fn close_inherited(kept: Option<BorrowedFd<'_>>) -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    let close = |from: libc::c_uint, to: libc::c_uint| {
        // SAFETY: three integers; nothing that still runs owns a descriptor in the range: `kept` alone was opened so
        // far, or whatever owns the others is never used again, nor dropped.
        if from > to || unsafe { libc::close_range(from, to, 0) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    match kept.and_then(|kept| libc::c_uint::try_from(kept.as_raw_fd()).ok()) {
        None => close(FIRST, libc::c_uint::MAX),
        Some(kept) => {
            close(FIRST, kept.saturating_sub(1))?;
            close(kept.saturating_add(1).max(FIRST), libc::c_uint::MAX)
        }
    }
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), libc::PIDFD_NONBLOCK) };
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us, with close-on-exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends the process, and with it every thread, by the one system call that this takes: what the standard library does at the end
/// takes others.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: an integer; nothing of this process is used afterwards.
    unsafe { libc::_exit(status) }
}

/// Sends SIGTERM to the process of a pidfd.
pub(crate) fn terminate(process: &OwnedFd) -> io::Result<()> {
    let no_more = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: three integers and a null pointer, which the kernel takes for "as kill(2)".
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGTERM, no_more, 0) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes a descriptor that was inherited under this number. To be called once for each, before this process has opened
/// anything that stays.
pub(crate) fn adopt(inherited: RawFd) -> OwnedFd {
    // SAFETY: nothing here has opened it, so nothing else owns it; that it is open at all the caller has seen.
    unsafe { OwnedFd::from_raw_fd(inherited) }
}

/// Has the kernel refuse descriptors that a peer wants to pass, where it can (Linux 6.16). Elsewhere there is no room
/// for them in a receive, and a truncated control message ends the connection.
pub(crate) fn refuse_descriptors(socket: BorrowedFd<'_>) {
    const LEN: libc::socklen_t = 4;
    let off: libc::c_int = 0;
    // SAFETY: the pointer is to a live c_int of 4 bytes, which is the length given.
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), LEN);
    }
}

/// Has every thread allocate from the one heap: a heap of its own would take memory for each, and system calls that are not in
/// the list.
pub(crate) fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: two integers; called while there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The uid that owns the user namespace of this process, where that is not the first one of the machine.
pub(crate) fn owner_of_user_namespace() -> io::Result<Option<libc::uid_t>> {
    /// The inode of the first user namespace, `PROC_USER_INIT_INO`.
    const FIRST: u64 = 0xEFFF_FFFD;
    let namespace = File::open("/proc/self/ns/user")?;
    if namespace.metadata()?.ino() == FIRST {
        return Ok(None);
    }
    let mut owner: libc::uid_t = 0;
    // SAFETY: the descriptor is open, and the pointer is to a live uid, which the call writes.
    let status = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_OWNER_UID, &raw mut owner) };
    if status == 0 { Ok(Some(owner)) } else { Err(io::Error::last_os_error()) }
}
