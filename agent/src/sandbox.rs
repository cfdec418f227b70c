//! What the process can still do once it serves.
//!
//! Owns the two lists: files for Landlock, system calls for seccomp (`docs/syscalls.txt`). Neither can be lifted again, and both
//! hold for every thread. It decides nothing: what the kernel lacks is told by name, and whether that stops the start is up to
//! the configuration.

use std::{collections::BTreeMap, path::PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

/// Why a part of the sandbox is not to be had.
#[derive(Debug, Error)]
pub(crate) enum SandboxError {
    #[error("Landlock is not to be had: this kernel lacks it, or a filter of system calls hides it")]
    NoLandlock,
    #[error("Landlock is switched off; the boot option lsm= has to name it")]
    LandlockOff,
    #[error("Landlock: {0}")]
    Landlock(#[from] RulesetError),
    #[error("Landlock: {0}")]
    Path(#[from] PathFdError),
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    #[cfg(not(target_arch = "x86_64"))]
    #[error("seccomp: there is no list of system calls for this architecture")]
    Architecture,
}

impl From<BackendError> for SandboxError {
    fn from(error: BackendError) -> Self {
        Self::Seccomp(error.into())
    }
}

/// What may be done below a folder.
pub(crate) struct Allowed {
    pub(crate) folder: PathBuf,
    pub(crate) access: BitFlags<AccessFs>,
}

impl Allowed {
    /// Files there are read.
    pub(crate) fn to_read(folder: PathBuf) -> Self {
        Self { folder, access: AccessFs::ReadFile.into() }
    }

    /// Files there are taken away.
    pub(crate) fn to_remove_files(folder: PathBuf) -> Self {
        Self { folder, access: AccessFs::RemoveFile.into() }
    }

    /// Folders there are taken away.
    pub(crate) fn to_remove_folders(folder: PathBuf) -> Self {
        Self { folder, access: AccessFs::RemoveDir.into() }
    }
}

/// The newest level of Landlock whose rights are all denied here; a later one is to be looked at first.
const LANDLOCK: ABI = ABI::V7;

/// Has the kernel deny this thread, and all that it starts, every access to files but what is allowed, and TCP, abstract sockets
/// and signals to others. Gives the kernel's level of Landlock.
pub(crate) fn restrict_files(allowed: &[Allowed]) -> Result<i32, SandboxError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for Allowed { folder, access } in allowed {
        // What is not there needs no right; a folder that comes later is not ours to read.
        if folder.is_dir() {
            rules = rules.add_rule(PathBeneath::new(PathFd::new(folder)?, *access))?;
        }
    }
    let status = rules.restrict_self()?;
    match status.landlock {
        LandlockStatus::NotImplemented => Err(SandboxError::NoLandlock),
        LandlockStatus::NotEnabled => Err(SandboxError::LandlockOff),
        LandlockStatus::Available { .. } if status.ruleset == RulesetStatus::NotEnforced => {
            Err(SandboxError::NoLandlock)
        }
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            Ok(kernel_abi.unwrap_or(effective_abi as i32))
        }
    }
}

/// What Landlock of this level cannot deny, though it should.
pub(crate) fn lacks(level: i32) -> Vec<&'static str> {
    let since =
        [(3, "truncation"), (4, "TCP"), (5, "ioctl of devices"), (6, "abstract sockets"), (6, "signals")];
    since.into_iter().filter(|(since, _)| level < *since).map(|(_, what)| what).collect()
}

/// Has the kernel end the process, all threads at once, at any system call that is not in the list.
pub(crate) fn restrict_calls(relays: bool) -> Result<(), SandboxError> {
    let filter = filter(relays)?;
    Ok(seccompiler::apply_filter_all_threads(&filter)?)
}

#[cfg(not(target_arch = "x86_64"))]
fn filter(_relays: bool) -> Result<BpfProgram, SandboxError> {
    Err(SandboxError::Architecture)
}

#[cfg(target_arch = "x86_64")]
fn filter(relays: bool) -> Result<BpfProgram, SandboxError> {
    // Each with any arguments.
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = [
        // The loop.
        libc::SYS_epoll_wait,
        libc::SYS_epoll_ctl,
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_timerfd_settime,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        // Where the vDSO cannot tell the time.
        libc::SYS_clock_gettime,
        // Keys and salts.
        libc::SYS_getrandom,
        // Memory.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_mlock,
        libc::SYS_munlock,
        libc::SYS_memfd_secret,
        libc::SYS_ftruncate,
        // Whether the configuration that is read again is a file.
        libc::SYS_statx,
        // The thread beside the loop.
        libc::SYS_futex,
        // The end.
        libc::SYS_unlink,
        libc::SYS_rmdir,
        libc::SYS_exit_group,
        // Not a call: what the kernel sees when a tracer has taken one away.
        i64::from(u32::MAX),
    ]
    .into_iter()
    .map(|call| (call, Vec::new()))
    .collect();
    if relays {
        calls.extend([libc::SYS_ppoll, libc::SYS_shutdown].map(|call| (call, Vec::new())));
    }
    let flags = |index, mask: libc::c_int, value: libc::c_int| {
        let masked = SeccompCmpOp::MaskedEq(u64::from(mask.cast_unsigned()));
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, masked, u64::from(value.cast_unsigned()))
    };
    let word = |index, value: libc::c_int| {
        let value = u64::from(value.cast_unsigned());
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let mut only = |call, rules: Vec<Vec<SeccompCondition>>| -> Result<(), BackendError> {
        calls.insert(call, rules.into_iter().map(SeccompRule::new).collect::<Result<_, _>>()?);
        Ok(())
    };
    // No memory that can be executed.
    only(libc::SYS_mmap, vec![vec![flags(2, libc::PROT_EXEC, 0)?]])?;
    only(libc::SYS_mprotect, vec![vec![flags(2, libc::PROT_EXEC, 0)?]])?;
    // Files are read, as the configuration is again, and never written.
    let reading = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    only(libc::SYS_openat, vec![vec![flags(2, reading, libc::O_RDONLY)?]])?;
    let socket_option =
        |name| -> Result<_, BackendError> { Ok(vec![word(1, libc::SOL_SOCKET)?, word(2, name)?]) };
    only(libc::SYS_getsockopt, vec![socket_option(libc::SO_PEERCRED)?])?;
    let (credentials, descriptors) = (libc::SO_PASSCRED, crate::sys::SO_PASSRIGHTS);
    only(libc::SYS_setsockopt, vec![socket_option(credentials)?, socket_option(descriptors)?])?;
    // What a refused lock of memory says of the limit; none is set, and no other process is asked about.
    let unset = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    only(libc::SYS_prlimit64, vec![vec![word(0, 0)?, unset]])?;
    if cfg!(debug_assertions) {
        // The standard library checks there what it closes.
        only(libc::SYS_fcntl, vec![vec![word(1, libc::F_GETFD)?]])?;
    }
    let filter =
        SeccompFilter::new(calls, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}
