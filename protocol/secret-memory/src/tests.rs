//! What can be seen of the regions through `/proc` and through the public interface. The limits are tested in a child
//! of another uid, since root ignores them.

use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::*;

const PAGE: usize = 4096;
/// Uid and gid of the child under limits: those that own nothing on any Linux.
const NOBODY: u32 = 65534;
/// Set for a test that was started as the only one of its process.
const ALONE: &str = "KMS_SECRET_MEMORY_ALONE";

/// One mapping of this process.
struct Vma {
    start: usize,
    end: usize,
    perms: String,
    inode: u64,
    flags: Vec<String>,
}

impl Vma {
    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }
}

fn vmas() -> Vec<Vma> {
    let mut all: Vec<Vma> = Vec::new();
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            all.last_mut().unwrap().flags = flags.split_whitespace().map(str::to_owned).collect();
        } else if let Some((start, end)) = fields[0].split_once('-') {
            all.push(Vma {
                start: usize::from_str_radix(start, 16).unwrap(),
                end: usize::from_str_radix(end, 16).unwrap(),
                perms: fields[1].to_owned(),
                inode: fields[4].parse().unwrap(),
                flags: Vec::new(),
            });
        }
    }
    all
}

/// The mapping that holds all of `len` bytes at `start`, after its guards were checked.
fn guarded_vma(start: usize, len: usize) -> Vma {
    let mut all = vmas();
    let end = start + len;
    let at = all.iter().position(|v| v.start <= start && start < v.end.max(1) && end <= v.end).unwrap();
    assert!(all[at].perms.starts_with("rw-"), "{}", all[at].perms);
    let before = all.iter().find(|v| v.end == all[at].start).expect("a page before");
    assert!(before.perms.starts_with("---"), "before: {}", before.perms);
    let after = all.iter().find(|v| v.start == all[at].end).expect("a page after");
    assert!(after.perms.starts_with("---"), "after: {}", after.perms);
    all.swap_remove(at)
}

/// Locked as told, out of dumps, out of children, between guards.
fn assert_protected(start: *const u8, len: usize, backing: Backing) {
    let vma = guarded_vma(start.addr(), len);
    assert_eq!(vma.has("lo"), backing != Backing::Unlocked, "{:?}", vma.flags);
    assert!(vma.has("dd") && vma.has("dc"), "{:?}", vma.flags);
}

/// A secretmem region, or nothing on a kernel that has none, where `Auto` then has to give mlock.
fn secretmem(len: usize) -> Option<SecretRegion> {
    match SecretRegion::new(len, Policy::SecretMem) {
        Ok(region) => Some(region),
        Err(error) => {
            assert_eq!(error, RegionError::SecretMemUnavailable);
            assert_eq!(SecretRegion::new(len, Policy::Auto).unwrap().backing(), Backing::Mlock);
            None
        }
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// This test binary where any uid can run it: the build folder may lie in a home that only its owner reads.
struct PublicCopy {
    folder: PathBuf,
}

impl PublicCopy {
    fn new(name: &str) -> Self {
        let open = |path: &Path| {
            path.ancestors().all(|p| fs::metadata(p).is_ok_and(|m| m.permissions().mode() & 0o1 != 0))
        };
        let temporary = Some(std::env::temp_dir()).filter(|p| open(p)).unwrap_or_else(|| "/tmp".into());
        let folder = temporary.join(format!("kms-secret-memory-{name}-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o755).create(&folder).unwrap();
        let copy = Self { folder };
        fs::set_permissions(&copy.folder, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(std::env::current_exe().unwrap(), copy.program()).unwrap();
        fs::set_permissions(copy.program(), fs::Permissions::from_mode(0o755)).unwrap();
        copy
    }

    fn program(&self) -> PathBuf {
        self.folder.join("test")
    }

    /// Runs one test alone, without privileges, with `kib` KiB of lockable memory.
    fn run_limited(&self, test: &str, kib: u32) -> Output {
        let mut command = Command::new("/bin/sh");
        let script = format!("ulimit -l {kib} && exec \"$0\" \"$@\"");
        command.args(["-c", &script]).arg(self.program()).args(["--exact", test, "--nocapture"]);
        command.env(ALONE, "1").current_dir("/");
        if is_root() {
            command.uid(NOBODY).gid(NOBODY); // std clears the groups; the kernel the capabilities
        }
        command.output().unwrap()
    }
}

impl Drop for PublicCopy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// True in a process that runs nothing but this test; elsewhere starts one, and false is the answer when it passed.
pub(crate) fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "{stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

#[test]
fn regions_are_locked_guarded_and_hidden() {
    for len in [0, 1, 32, PAGE - 16, PAGE, 16 << 10, 100_000] {
        let mut regions = vec![SecretRegion::new(len, Policy::Mlock).unwrap()];
        regions.extend(secretmem(len));
        for (region, backing) in regions.iter_mut().zip([Backing::Mlock, Backing::SecretMem]) {
            assert_eq!(region.backing(), backing);
            assert_eq!(region.len(), len);
            assert_eq!(region.is_empty(), len == 0);
            assert!(region.expose_secret().iter().all(|b| *b == 0), "zero at start");
            let start = region.expose_secret().as_ptr();
            assert_eq!((start.addr() + len) % PAGE, 0, "ends at the guard");
            if len > 0 {
                assert_protected(start, len, backing);
            }
            region.expose_secret_mut().fill(0x5a);
            assert!(region.expose_secret().iter().all(|b| *b == 0x5a));
            region.wipe();
            assert!(region.expose_secret().iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn auto_and_preferred_take_the_best_there_is() {
    let best = if secretmem(1).is_some() { Backing::SecretMem } else { Backing::Mlock };
    assert_eq!(SecretRegion::new(32, Policy::Auto).unwrap().backing(), best);
    assert_eq!(SecretRegion::new(32, Policy::Preferred).unwrap().backing(), best);
    for policy in [Policy::Auto, Policy::SecretMem, Policy::Mlock, Policy::Preferred] {
        assert_eq!(LockedBuffer::new(32, policy).unwrap().backing(), Backing::Mlock);
        assert_eq!(LockedBox::with_policy(7_u8, policy).unwrap().backing(), Backing::Mlock);
    }
}

#[test]
fn no_descriptor_of_a_region_stays() {
    let Some(region) = secretmem(16 << 10) else { return };
    let inode = guarded_vma(region.expose_secret().as_ptr().addr(), region.len()).inode;
    assert_ne!(inode, 0);
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        // Another test may have closed it meanwhile.
        let Ok(entry) = entry else { continue };
        let named_so = fs::read_link(entry.path()).is_ok_and(|name| name.starts_with("/secretmem"));
        let is_ours = named_so && fs::metadata(entry.path()).is_ok_and(|m| m.ino() == inode);
        assert!(!is_ours, "{:?} refers to the region", entry.path());
    }
}

#[test]
fn many_regions_leave_the_descriptor_table_as_it_was() {
    if alone("tests::many_regions_leave_the_descriptor_table_as_it_was") {
        let count = || fs::read_dir("/proc/self/fd").unwrap().count();
        let before = count();
        let regions: Vec<_> = (0..50).map(|_| SecretRegion::new(32, Policy::Auto).unwrap()).collect();
        assert_eq!(count(), before);
        drop(regions);
        assert_eq!(count(), before);
    }
}

#[test]
fn freed_pages_are_unlocked_and_ordinary_again() {
    if alone("tests::freed_pages_are_unlocked_and_ordinary_again") {
        let locked = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap().trim().to_owned()
        };
        let hidden = || vmas().iter().filter(|v| v.has("dc") || v.perms == "---s").count();
        let (locked_before, hidden_before) = (locked(), hidden());
        let regions: Vec<_> =
            [Policy::Mlock, Policy::Auto].map(|p| SecretRegion::new(9000, p).unwrap()).into();
        let mut buffer = LockedBuffer::new(9000, Policy::Auto).unwrap();
        buffer.grow(1 << 20).unwrap();
        let boxed = LockedBox::new([1_u64; 700]).unwrap();
        assert_ne!(locked(), locked_before);
        assert_ne!(hidden(), hidden_before);
        drop((regions, buffer, boxed));
        assert_eq!(locked(), locked_before);
        assert_eq!(hidden(), hidden_before);
    }
}

#[test]
fn lengths_beyond_the_ceiling_are_refused() {
    for len in [MAX_LEN + 1, isize::MAX as usize, usize::MAX] {
        let too_large = Some(RegionError::TooLarge { len });
        for policy in [Policy::Auto, Policy::SecretMem, Policy::Mlock, Policy::Preferred] {
            assert_eq!(SecretRegion::new(len, policy).err(), too_large);
            assert_eq!(LockedBuffer::new(len, policy).err(), too_large);
        }
    }
    let mut buffer = LockedBuffer::new(1, Policy::Auto).unwrap();
    assert!(buffer.grow(usize::MAX).is_err());
    assert_eq!(buffer.len(), 1);
}

#[test]
fn a_buffer_keeps_its_contents_when_it_grows() {
    let mut buffer = LockedBuffer::new(100, Policy::Auto).unwrap();
    assert_eq!((buffer.len(), buffer.capacity()), (100, PAGE));
    assert_protected(buffer.expose_secret().as_ptr(), 100, Backing::Mlock);
    buffer.expose_secret_mut().iter_mut().zip(1..).for_each(|(b, i)| *b = i);
    let first: Vec<u8> = (1..=100).collect();
    let mut moved = 0;
    for len in [101, PAGE, PAGE + 1, 300_000, 1 << 20] {
        let old = (buffer.expose_secret().as_ptr(), buffer.capacity());
        buffer.grow(len).unwrap();
        assert_eq!(buffer.len(), len);
        assert_eq!(buffer.expose_secret()[..100], first);
        assert!(buffer.expose_secret()[100..].iter().all(|b| *b == 0), "what is new is zero");
        assert_protected(buffer.expose_secret().as_ptr(), len, Backing::Mlock);
        if len <= old.1 {
            assert_eq!(buffer.expose_secret().as_ptr(), old.0, "fits, so it stays");
        } else {
            moved += 1;
        }
    }
    assert_eq!(moved, 3);
    buffer.grow(5).unwrap();
    assert_eq!(buffer.len(), 1 << 20, "never shorter");
}

#[test]
fn a_buffer_wipes_what_it_is_told() {
    let mut buffer = LockedBuffer::new(64, Policy::Auto).unwrap();
    buffer.expose_secret_mut().fill(1);
    buffer.wipe_range(8..16);
    let zeros: Vec<usize> = (0..64).filter(|i| buffer.expose_secret()[*i] == 0).collect();
    assert_eq!(zeros, (8..16).collect::<Vec<_>>());
    buffer.wipe_range(60..1000);
    assert!(buffer.expose_secret()[60..].iter().all(|b| *b == 0));
    buffer.wipe_range(64..64);
    buffer.wipe_range(1000..2000);
    buffer.wipe();
    assert!(buffer.expose_secret().iter().all(|b| *b == 0));
}

#[repr(align(64))]
struct Aligned64([u8; 64]);
#[repr(align(4096))]
struct AlignedPage(u8);

#[test]
fn a_box_is_aligned_and_protected() {
    fn check<T>(value: T) -> LockedBox<T> {
        let boxed = LockedBox::new(value).unwrap();
        let address = std::ptr::from_ref(boxed.expose_secret());
        assert!(address.is_aligned());
        if size_of::<T>() > 0 {
            assert_protected(address.cast(), size_of::<T>(), Backing::Mlock);
        }
        boxed
    }
    assert_eq!(check(0x5a_u8).expose_secret(), &0x5a);
    assert_eq!(check([1_u16, 2, 3]).expose_secret(), &[1, 2, 3]);
    assert_eq!(check(u128::MAX).expose_secret(), &u128::MAX);
    assert_eq!(check(Aligned64([9; 64])).expose_secret().0, [9; 64]);
    assert_eq!(check(AlignedPage(3)).expose_secret().0, 3);
    assert_eq!(check([7_u64; 2000]).expose_secret(), &[7; 2000]);
    check(());
    let mut boxed = check([0_u8; 32]);
    boxed.expose_secret_mut().fill(4);
    assert_eq!(boxed.expose_secret(), &[4; 32]);
}

#[test]
fn a_box_drops_its_value_once_and_in_place() {
    struct Watched<'a> {
        bytes: [u8; 16],
        drops: &'a Cell<(u32, [u8; 16])>,
    }
    impl Drop for Watched<'_> {
        fn drop(&mut self) {
            self.drops.set((self.drops.get().0 + 1, self.bytes));
        }
    }
    let drops = Cell::new((0, [0; 16]));
    let mut boxed = LockedBox::new(Watched { bytes: [1; 16], drops: &drops }).unwrap();
    boxed.expose_secret_mut().bytes = [2; 16];
    assert_eq!(drops.get().0, 0);
    drop(boxed);
    assert_eq!(drops.get(), (1, [2; 16]), "dropped before the wipe");
}

/// What each policy gives in this process. Driven under limits by the tests below; on its own it holds everywhere.
#[test]
fn every_policy_keeps_its_promise_here() {
    let tell = |what: &str, policy: Policy, got: Result<Backing, RegionError>| {
        let allowed: &[Backing] = match (what, policy) {
            ("region", Policy::SecretMem) => &[Backing::SecretMem],
            ("region", Policy::Auto) => &[Backing::SecretMem, Backing::Mlock],
            (_, Policy::Preferred) => &[Backing::SecretMem, Backing::Mlock, Backing::Unlocked],
            _ => &[Backing::Mlock],
        };
        assert!(got.is_err() || got.is_ok_and(|backing| allowed.contains(&backing)), "{what} {policy:?}");
        match got {
            Ok(backing) => println!("{what} {policy:?}: {backing}"),
            Err(error) => println!("{what} {policy:?}: {error}"),
        }
    };
    for policy in [Policy::Auto, Policy::SecretMem, Policy::Mlock, Policy::Preferred] {
        let region = SecretRegion::new(16 << 10, policy);
        if let Ok(region) = &region {
            assert_protected(region.expose_secret().as_ptr(), 16 << 10, region.backing());
        }
        tell("region", policy, region.map(|r| r.backing()));

        let mut buffer = LockedBuffer::new(8 << 10, policy);
        if let Ok(buffer) = &mut buffer {
            assert_protected(buffer.expose_secret().as_ptr(), 8 << 10, buffer.backing());
            buffer.expose_secret_mut().fill(6);
            let grown = buffer.grow(64 << 10).map(|()| buffer.backing());
            assert_eq!(buffer.len(), if grown.is_ok() { 64 << 10 } else { 8 << 10 });
            assert!(buffer.expose_secret()[..8 << 10].iter().all(|b| *b == 6), "kept, grown or not");
            tell("growth", policy, grown);
        }
        tell("buffer", policy, buffer.map(|b| b.backing()));
        tell("box", policy, LockedBox::with_policy([0_u8; 32], policy).map(|b| b.backing()));
        let held = SlowlyDropped::default();
        let dropped = std::sync::Arc::clone(&held.0);
        let thread = spawn_locked("secrets", 128 << 10, policy, move |backing| (backing, held).0);
        assert!(
            thread.is_ok() || dropped.load(std::sync::atomic::Ordering::SeqCst),
            "what was not begun is gone"
        );
        tell("thread", policy, thread.map(|thread| thread.join().unwrap().unwrap()));
    }
    assert!(memlock_limit().is_some_and(|(soft, hard)| soft <= hard));
}

/// Lines that the test above prints without privileges under a limit of `kib` KiB.
fn told_under_limit(name: &str, kib: u32) -> impl Fn(&str) -> String {
    let output = PublicCopy::new(name).run_limited("tests::every_policy_keeps_its_promise_here", kib);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stdout.contains("1 passed"), "{}\n{stdout}{stderr}", output.status);
    move |what| {
        let told = stdout.lines().find_map(|line| line.split_once(what)?.1.strip_prefix(": "));
        told.unwrap_or_else(|| panic!("{what} in {stdout}")).to_owned()
    }
}

fn assert_names_limit(message: &str, bytes: u32) {
    let limit = format!("RLIMIT_MEMLOCK is {bytes} bytes (hard limit {bytes} bytes)");
    for part in ["cannot lock", &limit, "raise it with LimitMEMLOCK= in the unit or ulimit -l"] {
        assert!(message.contains(part), "{part:?} in {message:?}");
    }
}

#[test]
fn a_limit_of_nothing_is_an_error_that_names_the_remedy() {
    let told = told_under_limit("nothing", 0);
    for what in [
        "region Auto",
        "region Mlock",
        "buffer Auto",
        "buffer SecretMem",
        "buffer Mlock",
        "box Auto",
        "thread Auto",
    ] {
        assert_names_limit(&told(what), 0);
        assert!(told(what).contains("mlock failed: Operation not permitted"), "{}", told(what));
    }
    if secretmem(1).is_some() {
        assert_names_limit(&told("region SecretMem"), 0);
        assert!(
            told("region SecretMem").contains("mmap of secretmem failed: Resource temporarily unavailable")
        );
    }
    for what in
        ["region Preferred", "buffer Preferred", "growth Preferred", "box Preferred", "thread Preferred"]
    {
        assert_eq!(told(what), "unlocked");
    }
}

#[test]
fn a_limit_that_is_too_small_refuses_what_exceeds_it() {
    let told = told_under_limit("small", 16);
    for what in ["region Auto", "region Mlock", "growth Auto", "thread Auto"] {
        assert_names_limit(&told(what), 16 << 10);
        assert!(told(what).contains("mlock failed: Cannot allocate memory"), "{}", told(what));
    }
    for what in ["buffer Auto", "buffer Preferred", "box Mlock"] {
        assert_eq!(told(what), if what == "buffer Preferred" { "unlocked" } else { "mlock" });
    }
    assert_eq!(told("region Preferred"), "unlocked");
}

#[test]
fn messages_start_small_and_end_without_a_period() {
    let errors = [
        RegionError::TooLarge { len: 5 },
        RegionError::Allocate { len: 5 },
        RegionError::SecretMemUnavailable,
        RegionError::MemlockLimit { call: Call::Mlock, errno: libc::ENOMEM, len: 5, soft: 0, hard: u64::MAX },
        RegionError::System { call: Call::DontFork, errno: libc::EINVAL, len: 5 },
    ];
    for error in errors {
        let message = error.to_string();
        assert!(message.starts_with(|c: char| c.is_lowercase() || c.is_ascii_digit()), "{message}");
        assert!(!message.ends_with('.'), "{message}");
        assert_eq!(error.is_memlock_limit(), message.contains("RLIMIT_MEMLOCK"));
    }
    assert!(errors[3].to_string().contains("(hard limit unlimited)"));
    assert!(errors[4].to_string().contains("madvise(MADV_DONTFORK) failed: Invalid argument"));
    let names = [Backing::SecretMem, Backing::Mlock, Backing::Unlocked].map(|b| b.to_string());
    assert_eq!(names, ["secretmem", "mlock", "unlocked"]);
}

#[test]
fn only_the_limit_is_blamed_on_the_limit() {
    for (call, errno, limit) in [
        (Call::MmapSecretMem, libc::EAGAIN, true),
        (Call::Mlock, libc::ENOMEM, true),
        (Call::Mlock, libc::EPERM, true),
        (Call::Mlock, libc::EAGAIN, false),
        (Call::Mmap, libc::ENOMEM, false),
        (Call::Mprotect, libc::ENOMEM, false),
        (Call::MemfdSecret, libc::EMFILE, false),
    ] {
        let limited = memlock_limit().is_some_and(|(soft, _)| soft != u64::MAX);
        let error = RegionError::from_call(call, errno, 1);
        assert_eq!(error.is_memlock_limit(), limit && limited, "{error}");
    }
    assert_eq!(RegionError::from_call(Call::MemfdSecret, libc::ENOSYS, 1), RegionError::SecretMemUnavailable);
}

#[test]
fn a_secret_takes_exactly_its_length() {
    assert_eq!(Secret::<4>::zeroed().expose_secret(), &[0; 4]);
    assert_eq!(Secret::<4>::from_slice(&[1, 2, 3, 4]).unwrap().expose_secret(), &[1, 2, 3, 4]);
    assert!(Secret::<4>::from_slice(&[1, 2, 3]).is_none());
    assert!(Secret::<4>::from_slice(&[1, 2, 3, 4, 5]).is_none());
    let mut secret = Secret::<4>::zeroed();
    secret.expose_secret_mut().copy_from_slice(&[9; 4]);
    let place = secret.expose_secret().as_ptr();
    let moved = secret;
    assert_eq!(moved.expose_secret(), &[9; 4]);
    assert_eq!(moved.expose_secret().as_ptr(), place, "a move copies no secret");
}

#[test]
fn a_secret_vec_never_moves_and_wipes_what_it_drops() {
    let mut secret = SecretVec::with_capacity(8);
    assert!(secret.is_empty());
    let place = secret.expose_secret().as_ptr();
    secret.push_slice(b"abc").unwrap();
    secret.push_slice(b"de").unwrap();
    assert_eq!(secret.push_slice(b"fghi"), Err(CapacityExceeded { capacity: 8 }));
    assert_eq!(secret.expose_secret(), b"abcde", "all or nothing");
    assert_eq!(secret.as_mut_slice(), b"abcde\0\0\0");
    assert_eq!((secret.len(), secret.capacity()), (8, 8));
    secret.truncate(9);
    assert_eq!(secret.len(), 8);
    secret.truncate(2);
    assert_eq!(secret.expose_secret(), b"ab");
    assert_eq!(secret.as_mut_slice(), b"ab\0\0\0\0\0\0", "truncated bytes are wiped");
    assert_eq!(secret.expose_secret().as_ptr(), place);
    assert_eq!(CapacityExceeded { capacity: 8 }.to_string(), "the secret is longer than 8 bytes");
}

/// Tells that it was dropped, after a while.
#[derive(Default)]
struct SlowlyDropped(std::sync::Arc<std::sync::atomic::AtomicBool>);

impl Drop for SlowlyDropped {
    fn drop(&mut self) {
        (0..10_000).for_each(|_| std::thread::yield_now());
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

#[test]
fn the_stack_of_a_thread_for_secrets_is_locked_whole_and_not_dumped() {
    const LEN: usize = 256 * 1024;
    let own_stack = || {
        let here = std::hint::black_box(0_u8);
        let address = (&raw const here).addr();
        vmas().into_iter().find(|vma| (vma.start..vma.end).contains(&address)).unwrap()
    };
    let thread = spawn_locked("secrets", LEN, Policy::Auto, move |backing| (backing, own_stack())).unwrap();
    let (backing, stack) = thread.join().unwrap().unwrap();
    assert_eq!(backing, Backing::Mlock);
    assert!(
        stack.end - stack.start >= LEN && stack.has("lo") && stack.has("dd") && stack.has("dc"),
        "{:?}",
        stack.flags
    );
    // The control: an ordinary thread has neither.
    let stack = std::thread::spawn(own_stack).join().unwrap();
    assert!(!stack.has("lo") && !stack.has("dd"), "{:?}", stack.flags);
}

/// Compiles only while the type lacks the trait: with it, the marker cannot be inferred.
macro_rules! assert_lacks {
    ($type:ty: $($bound:path),+) => {$({
        trait Lacks<Marker> { fn compiles() {} }
        struct WithBound;
        impl<T: ?Sized> Lacks<()> for T {}
        impl<T: ?Sized + $bound> Lacks<WithBound> for T {}
        <$type as Lacks<_>>::compiles();
    })+};
}

#[test]
fn secrets_cannot_be_printed_cloned_or_compared() {
    assert_lacks!(Secret<32>: Debug, Clone, PartialEq, std::fmt::Display);
    assert_lacks!(SecretVec: Debug, Clone, PartialEq, std::fmt::Display);
    assert_lacks!(SecretRegion: Debug, Clone, PartialEq, std::fmt::Display);
    assert_lacks!(LockedBuffer: Debug, Clone, PartialEq, std::fmt::Display);
    assert_lacks!(LockedBox<[u8; 32]>: Debug, Clone, PartialEq, std::fmt::Display);
    assert_lacks!(LockedBox<std::rc::Rc<u8>>: Send, Sync);
    assert_lacks!(LockedBox<Cell<u8>>: Sync);
    fn send<T: Send + Sync>() {}
    send::<SecretRegion>();
    send::<LockedBuffer>();
    send::<LockedBox<[u8; 32]>>();
    send::<Secret<32>>();
}
