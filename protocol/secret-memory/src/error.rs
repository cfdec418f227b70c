//! Why a region could not be had: the call that failed, its errno, and the remedy where the memory-lock limit is the
//! cause. Never holds an address or contents.

use std::{fmt, io};

use crate::{MAX_LEN, sys};

/// The system call that failed, with its advice where one call serves several purposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// `memfd_secret(O_CLOEXEC)`.
    MemfdSecret,
    /// `ftruncate` of the secretmem file.
    Ftruncate,
    /// `mmap` of the secretmem file: here the kernel checks `RLIMIT_MEMLOCK`.
    MmapSecretMem,
    /// `mmap` of anonymous pages.
    Mmap,
    /// `mprotect` of guard or data pages.
    Mprotect,
    /// `mlock`.
    Mlock,
    /// `madvise(MADV_DONTDUMP)`.
    DontDump,
    /// `madvise(MADV_DONTFORK)`.
    DontFork,
    /// `pthread_getattr_np`: where the stack of a thread is.
    Stack,
    /// `clone`: a thread.
    Thread,
    /// `getrandom` into a secretmem page: the one way to fault such a page in that answers with an error.
    Populate,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MemfdSecret => "memfd_secret",
            Self::Ftruncate => "ftruncate",
            Self::MmapSecretMem => "mmap of secretmem",
            Self::Mmap => "mmap",
            Self::Mprotect => "mprotect",
            Self::Mlock => "mlock",
            Self::DontDump => "madvise(MADV_DONTDUMP)",
            Self::DontFork => "madvise(MADV_DONTFORK)",
            Self::Stack => "pthread_getattr_np",
            Self::Thread => "the start of a thread",
            Self::Populate => "getrandom into secretmem",
        })
    }
}

/// Why a region, buffer or box could not be made or grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// More than [`MAX_LEN`] bytes were asked for.
    #[error("{len} bytes of secret memory were asked for, at most {MAX_LEN} are given")]
    TooLarge {
        /// Bytes asked for.
        len: usize,
    },
    /// The allocator returned nothing.
    #[error("no memory for a guarded region of {len} bytes")]
    Allocate {
        /// Bytes asked for.
        len: usize,
    },
    /// The kernel has no `memfd_secret`, or has it switched off.
    #[error(
        "this kernel offers no memfd_secret; where it is built in, the boot option secretmem.enable=1 switches it on"
    )]
    SecretMemUnavailable,
    /// The memory-lock limit of the process is used up.
    #[error(
        "cannot lock {len} bytes: {call} failed: {}; RLIMIT_MEMLOCK is {} (hard limit {}): raise it with \
         LimitMEMLOCK= in the unit or ulimit -l",
        io::Error::from_raw_os_error(*errno), Bytes(*soft), Bytes(*hard)
    )]
    MemlockLimit {
        /// The call that met the limit.
        call: Call,
        /// Its errno: `EAGAIN` from secretmem, `ENOMEM` or `EPERM` from `mlock`.
        errno: i32,
        /// Bytes asked for.
        len: usize,
        /// Soft limit in bytes.
        soft: u64,
        /// Hard limit in bytes.
        hard: u64,
    },
    /// Another call failed.
    #[error("no secret memory of {len} bytes: {call} failed: {}", io::Error::from_raw_os_error(*errno))]
    System {
        /// The call.
        call: Call,
        /// Its errno.
        errno: i32,
        /// Bytes asked for.
        len: usize,
    },
}

impl RegionError {
    /// True where raising `RLIMIT_MEMLOCK` is the remedy.
    #[must_use]
    pub fn is_memlock_limit(&self) -> bool {
        matches!(self, Self::MemlockLimit { .. })
    }

    pub(crate) fn from_call(call: Call, errno: i32, len: usize) -> Self {
        match (call, errno, sys::memlock_limit()) {
            (Call::MemfdSecret, libc::ENOSYS, _) => Self::SecretMemUnavailable,
            (Call::MmapSecretMem, libc::EAGAIN, Some((soft, hard)))
            | (Call::Mlock, libc::ENOMEM | libc::EPERM, Some((soft, hard)))
                if soft != u64::MAX =>
            {
                Self::MemlockLimit { call, errno, len, soft, hard }
            }
            _ => Self::System { call, errno, len },
        }
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            u64::MAX => f.write_str("unlimited"),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}
