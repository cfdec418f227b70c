//! The calls that the safe crates do not have, and looks at memory behind a program's back. The only module of this package with `unsafe`.
#![expect(
    unsafe_code,
    reason = "system calls without a safe wrapper in nix, an allocator, the memory of a value after its drop"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use nix::{
    sys::{
        ptrace,
        signal::{SigHandler, Signal, signal},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use crate::seccomp::Instruction;

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

/// Runs `work` in a child that is forked from the calling thread, and waits for it. True: it came to its end without a panic.
///
/// # Panics
/// When there is no child.
pub fn in_child(work: impl FnOnce()) -> bool {
    // SAFETY: the child is left with the calling thread alone. It does what `work` says and ends without the destructors of what it
    // shares with its parent; a lock of another thread's is not waited for, since the allocator of glibc is made whole by `fork`.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        0 => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_ok();
            // SAFETY: an integer.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        child => {
            let mut status = 0;
            // SAFETY: a child of ours, and a place for its status.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            assert_eq!(waited, child, "waitpid: {}", io::Error::last_os_error());
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// Has a signal do here, and in whatever is started from here, what it does by default.
///
/// # Panics
/// When it cannot be.
pub fn default_signal(wanted: Signal) {
    // SAFETY: the default is taken, so no code of ours ever runs in a handler.
    unsafe { signal(wanted, SigHandler::SigDfl) }.unwrap();
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

/// The answer of a system call that gives a number.
fn answer(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(answer(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel made this descriptor just now, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes a copy of a descriptor of another process.
///
/// # Errors
/// What the kernel says.
pub fn pidfd_getfd(process: BorrowedFd<'_>, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: three integers.
    new_descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// Asks whether another process has the same descriptors as this one; says how the two compare.
///
/// # Errors
/// What the kernel says.
pub fn kcmp_files(pid: i32) -> io::Result<i64> {
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: five integers.
    answer(unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), pid, KCMP_FILES, 0, 0) })
}

/// Counts the processor time of another process, in its own code.
///
/// # Errors
/// What the kernel says.
pub fn perf_event_open(pid: i32) -> io::Result<OwnedFd> {
    const LEN: usize = 64; // the first version of the structure, PERF_ATTR_SIZE_VER0
    let mut attributes = [0u64; LEN / 8];
    attributes[0] = 1 | (LEN as u64) << 32; // PERF_TYPE_SOFTWARE
    attributes[1] = 1; // PERF_COUNT_SW_TASK_CLOCK
    attributes[5] = 1 | 1 << 5 | 1 << 6; // disabled, without kernel and hypervisor
    // SAFETY: a pointer to a live structure that tells its own length, and four integers.
    new_descriptor(unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), pid, -1, -1, 0) })
}

/// Asks on which node of memory the page at `address` of another process lies.
///
/// # Errors
/// What the kernel says.
pub fn page_node(pid: i32, address: u64) -> io::Result<i32> {
    let (pages, mut node) = ([address], 0i32);
    let nowhere = std::ptr::null::<i32>();
    // SAFETY: one address to look at, which is not dereferenced here, no target, and a place for one answer.
    let result =
        unsafe { libc::syscall(libc::SYS_move_pages, pid, 1, pages.as_ptr(), nowhere, &raw mut node, 0) };
    answer(result).map(|_| node)
}

/// Asks for the address of the list of locks of another process.
///
/// # Errors
/// What the kernel says.
pub fn robust_list(pid: i32) -> io::Result<usize> {
    let (mut head, mut len) = (0usize, 0usize);
    // SAFETY: an integer, and two places for an address and a length.
    answer(unsafe { libc::syscall(libc::SYS_get_robust_list, pid, &raw mut head, &raw mut len) })?;
    Ok(head)
}

/// The only filter of system calls that a thread is under.
///
/// # Panics
/// Without root, and when there is none, or more than one.
#[must_use]
pub fn seccomp_filter(thread: i32) -> Vec<Instruction> {
    /// Not in libc.
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    let thread = Pid::from_raw(thread);
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    let ask = |number: usize, to: *mut libc::sock_filter| {
        // SAFETY: the thread is stopped and traced by this one; where `to` is not null, it has room for all of the filter, whose length
        // the call has told before.
        unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, thread.as_raw(), number, to) }
    };
    let length = ask(0, std::ptr::null_mut());
    let mut filter =
        vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; usize::try_from(length).unwrap_or_default()];
    let (got, more) = (ask(0, filter.as_mut_ptr()), ask(1, std::ptr::null_mut()));
    ptrace::detach(thread, None).unwrap();
    assert!(length > 0 && got == length && more < 0, "one filter: {length}, {got}, {more}");
    let instruction =
        |f: &libc::sock_filter| Instruction { code: f.code, jump_true: f.jt, jump_false: f.jf, operand: f.k };
    filter.iter().map(instruction).collect()
}

/// Who runs first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Before every ordinary process.
    First,
    /// Only where nobody else wants to.
    Last,
}

/// Has the main thread of this process, 0 for the calling thread, run as urgently; says whether the kernel allowed it.
pub fn schedule(pid: i32, urgency: Urgency) -> bool {
    let (policy, sched_priority) = match urgency {
        Urgency::First => (libc::SCHED_FIFO, 1),
        Urgency::Last => (libc::SCHED_IDLE, 0),
    };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: two integers, and a pointer to a live structure.
    unsafe { libc::sched_setscheduler(pid, policy, &raw const parameters) == 0 }
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, and what it was asked for; to be made the global one of a test that calls [`allocated_during`].
pub struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; only numbers are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed).wrapping_add(layout.size());
        PEAK.fetch_max(live, Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The largest single allocation, and the most that was held at a time, while `work` ran.
pub fn allocated_during(work: impl FnOnce()) -> (usize, usize) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    LARGEST.store(0, Relaxed);
    work();
    (LARGEST.load(Relaxed), PEAK.load(Relaxed).saturating_sub(before))
}

/// The bytes of a value where it lay, before it was dropped there and afterwards.
pub fn before_and_after_drop<T>(value: T) -> (Vec<u8>, Vec<u8>) {
    fn bytes_of<T>(slot: &MaybeUninit<T>) -> Vec<u8> {
        let start = slot.as_ptr().cast::<u8>();
        // SAFETY: the slot is alive and `size_of::<T>()` bytes long; it was zeroed before it was written, and the reads are volatile,
        // so each is of a byte that exists in memory, whatever the compiler knows of the value that was there.
        (0..size_of::<T>()).map(|i| unsafe { start.add(i).read_volatile() }).collect()
    }
    let mut slot = Box::new(MaybeUninit::<T>::zeroed());
    slot.write(value);
    let before = bytes_of(&slot);
    // SAFETY: the value was written above and is not used again.
    unsafe { slot.assume_init_drop() };
    let after = bytes_of(&slot);
    (before, after)
}

/// What a sandbox may refuse, as single calls that change nothing that outlives the process.
#[derive(Clone, Copy, Debug)]
pub enum Attempt {
    /// Reads the state of the clock through the call that sets it.
    Clock,
    /// A new host name, to be tried in a namespace of its own.
    HostName,
    /// A socket to the network.
    InetSocket,
    /// Asks which Landlock there is.
    Landlock,
    /// A change of the mounts, to be tried in a namespace of its own.
    Mount,
    /// A system call of a 32-bit program.
    OtherArchitecture,
    /// Programs at known addresses.
    Personality,
    /// The lowest priority, which anybody may take.
    Priority,
    /// A real-time policy, with a priority that the kernel refuses; whoever gets that far may ask.
    Realtime,
    /// Asks whether filters can kill.
    Seccomp,
    /// A region of secret memory.
    SecretMemory,
    /// Traces another process, without stopping it.
    Seize(i32),
    /// The segment of shared memory with the number of [`share_memory`].
    SharedMemory,
    /// Being traced by the parent.
    Trace,
    /// Memory that can be written and run.
    WriteAndRun,
}

const SHARED_KEY: libc::key_t = 0x6b6d73;

/// Makes a segment of System V memory that goes with its namespace.
///
/// # Errors
/// As the kernel says.
pub fn share_memory() -> io::Result<()> {
    // SAFETY: three integers.
    check(libc::c_long::from(unsafe { libc::shmget(SHARED_KEY, 4096, libc::IPC_CREAT | 0o666) }))
}

fn check(status: libc::c_long) -> io::Result<()> {
    if status == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the attempt.
///
/// # Errors
/// As the kernel, or what is before it, says.
pub fn attempt(attempt: Attempt) -> io::Result<()> {
    const ADDR_NO_RANDOMIZE: libc::c_ulong = 0x0004_0000;
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_ulong = 1;
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: integers, null pointers where the call allows them, and pointers to values that live until after the call. Whatever is
    // made is not touched: descriptors and mappings stay until the process, which does nothing else, ends.
    unsafe {
        match attempt {
            Attempt::Clock => {
                let mut state: libc::timex = std::mem::zeroed();
                check(libc::adjtimex(&raw mut state).into())
            }
            Attempt::HostName => check(libc::sethostname(c"kms-probe".as_ptr(), 9).into()),
            Attempt::InetSocket => check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).into()),
            Attempt::Landlock => check(libc::syscall(
                libc::SYS_landlock_create_ruleset,
                null,
                0,
                LANDLOCK_CREATE_RULESET_VERSION,
            )),
            Attempt::Mount => {
                let flags = libc::MS_REC | libc::MS_PRIVATE;
                check(libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), flags, null).into())
            }
            Attempt::OtherArchitecture => other_architecture(),
            Attempt::Personality => check(libc::personality(ADDR_NO_RANDOMIZE).into()),
            Attempt::Priority => check(libc::setpriority(libc::PRIO_PROCESS, 0, 19).into()),
            Attempt::Realtime => {
                let parameters = libc::sched_param { sched_priority: 0 };
                match check(libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters).into()) {
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                    other => other,
                }
            }
            Attempt::Seccomp => {
                let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
                check(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action))
            }
            Attempt::SecretMemory => check(libc::syscall(libc::SYS_memfd_secret, 0)),
            Attempt::Seize(pid) => check(libc::ptrace(libc::PTRACE_SEIZE, pid, null, null)),
            Attempt::SharedMemory => check(libc::shmget(SHARED_KEY, 0, 0).into()),
            Attempt::Trace => check(libc::ptrace(libc::PTRACE_TRACEME, 0, null, null)),
            Attempt::WriteAndRun => {
                let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let mapped = libc::mmap(null, 4096, protection, flags, -1, 0);
                check(if mapped == libc::MAP_FAILED { -1 } else { 0 })
            }
        }
    }
}

/// `getpid` of the 32-bit table, which this one answers too where the kernel was built for it.
#[cfg(target_arch = "x86_64")]
fn other_architecture() -> io::Result<()> {
    let result: i32;
    // SAFETY: the call takes no arguments and returns in eax; the kernel preserves the other registers or they are declared.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") 20 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    if result.cast_unsigned() == std::process::id() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(-result))
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn other_architecture() -> io::Result<()> {
    Err(io::Error::other("this test knows the other calls of x86-64 alone"))
}
