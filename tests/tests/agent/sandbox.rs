//! What the agent can still do once it serves: the filter of system calls as the kernel has it, against `docs/syscalls.txt`; each
//! of its calls made; Landlock's denials; and what happens where the kernel lacks either.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::{net::UnixStream, process::ExitStatusExt},
    path::Path,
    process::{Command, Stdio},
};

use kms_protocol::{Hello, Opcode, PROTOCOL_VERSION, Status};
use kms_tests::{
    ALICE, Agent,
    process::{output, send_signal, status_number, wait_for, wait_until},
    programs::{needs_root, program, tool},
    seccomp::{Filter, I386, X32, X86_64, numbers},
    start::clean,
    wire::{NO_CONTEXT, frame},
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};

/// Numbers that a kernel has, and some behind them.
const NUMBERS: std::ops::Range<u32> = 0..1024;

/// The committed list: those of every agent, and those of `--stdio` alone.
fn list() -> (BTreeSet<String>, BTreeSet<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/syscalls.txt");
    let text = fs::read_to_string(path).unwrap();
    let (every, relays) = text.split_once("# with --stdio\n").unwrap();
    let names = |part: &str| {
        let lines = part.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        lines.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
    };
    (names(every), names(relays))
}

fn allowed(filter: &Filter) -> BTreeSet<String> {
    let numbers = numbers();
    let allowed = NUMBERS.filter(|number| filter.may_allow(X86_64, *number));
    allowed.map(|number| numbers.iter().find(|(_, own)| **own == number).unwrap().0.clone()).collect()
}

#[test]
fn the_kernel_enforces_the_list_that_is_committed() {
    let (every, relays) = list();
    assert!(every.len() <= 30, "{} system calls", every.len());
    let agent = Agent::start();
    let filter = Filter::of(agent.pid);
    assert_eq!(allowed(&filter), every);
    for number in NUMBERS {
        assert!(!filter.may_allow(I386, number), "i386: {number}");
        assert!(!filter.may_allow(X86_64, X32 | number), "x32: {number}");
    }

    let mut child = clean(Command::new(program("kms-agent")), agent.folder())
        .args(["--memory", "--stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id().cast_signed();
    wait_until("the filter is there", || status_number(pid, "Seccomp") == 2);
    assert_eq!(allowed(&Filter::of(pid)), every.union(&relays).cloned().collect());
    drop(child.stdin.take());
    assert_eq!(wait_for(&mut child).code(), Some(0));
}

#[test]
fn arguments_are_looked_at_where_they_matter() {
    let agent = Agent::start();
    let filter = Filter::of(agent.pid);
    let numbers = numbers();
    let n = |value: i32| u64::from(value.cast_unsigned());
    let (rw, rx) = (n(libc::PROT_READ | libc::PROT_WRITE), n(libc::PROT_READ | libc::PROT_EXEC));
    let socket = n(libc::SOL_SOCKET);
    for (name, arguments, expected) in [
        ("mmap", [0, 4096, rw, 0, 0, 0], true),
        ("mmap", [0, 4096, rx, 0, 0, 0], false),
        ("mmap", [0, 4096, n(7), 0, 0, 0], false),
        ("mprotect", [0, 4096, rw, 0, 0, 0], true),
        ("mprotect", [0, 4096, rx, 0, 0, 0], false),
        ("openat", [0, 0, n(libc::O_RDONLY | libc::O_CLOEXEC), 0, 0, 0], true),
        ("openat", [0, 0, n(libc::O_WRONLY), 0, 0, 0], false),
        ("openat", [0, 0, n(libc::O_RDWR), 0, 0, 0], false),
        ("openat", [0, 0, n(libc::O_RDONLY | libc::O_CREAT), 0, 0, 0], false),
        ("openat", [0, 0, n(libc::O_RDONLY | libc::O_TRUNC), 0, 0, 0], false),
        ("getsockopt", [3, socket, n(libc::SO_PEERCRED), 0, 0, 0], true),
        ("getsockopt", [3, socket, n(libc::SO_SNDBUF), 0, 0, 0], false),
        ("setsockopt", [3, socket, n(libc::SO_PASSCRED), 0, 0, 0], true),
        ("setsockopt", [3, socket, n(libc::SO_SNDBUF), 0, 0, 0], false),
        ("setsockopt", [3, n(libc::IPPROTO_TCP), n(libc::SO_PASSCRED), 0, 0, 0], false),
        ("prlimit64", [0, n(libc::RLIMIT_MEMLOCK.cast_signed()), 0, 1, 0, 0], true),
        ("prlimit64", [0, n(libc::RLIMIT_CORE.cast_signed()), 1, 0, 0, 0], false),
        // A pointer whose lower half is zero is one all the same.
        ("prlimit64", [0, n(libc::RLIMIT_CORE.cast_signed()), 1 << 32, 0, 0, 0], false),
        ("prlimit64", [1, n(libc::RLIMIT_MEMLOCK.cast_signed()), 0, 1, 0, 0], false),
    ] {
        assert_eq!(filter.allows(X86_64, numbers[name], arguments), expected, "{name} {arguments:?}");
    }
}

/// The calls that an agent made, threads and all, after the filter was set.
fn made(trace: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(trace).unwrap();
    let lines = || {
        text.lines().filter_map(|line| line.split_once(' ')).map(|(thread, call)| (thread, call.trim_start()))
    };
    let filter = |call: &str| call.starts_with("seccomp(SECCOMP_SET_MODE_FILTER");
    // Threads of one process, by who started whom.
    let mut threads: Vec<BTreeSet<&str>> = Vec::new();
    for (thread, call) in lines() {
        let started = call.split_once("parent_tid=[").filter(|_| call.contains("clone3"));
        let both = [Some(thread), started.map(|(_, rest)| rest.split(']').next().unwrap())];
        match threads.iter_mut().find(|threads| threads.contains(thread)) {
            Some(threads) => threads.extend(both.into_iter().flatten()),
            None => threads.push(both.into_iter().flatten().collect()),
        }
    }
    let server = lines().find(|(_, call)| filter(call)).unwrap().0;
    let threads = threads.into_iter().find(|threads| threads.contains(server)).unwrap();
    let after =
        lines().skip_while(|(_, call)| !filter(call)).skip(1).filter(|(thread, _)| threads.contains(thread));
    let names = after.filter_map(|(_, call)| {
        let call = call.strip_prefix("<... ").unwrap_or(call);
        let name = call.split(['(', ' ']).next()?;
        name.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            .then(|| name.to_owned())
    });
    names.filter(|name| name != "seccomp").collect()
}

#[test]
fn each_call_of_the_list_is_one_that_the_agent_makes() {
    needs_root();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= 12_000, "this test needs 12,000 descriptors: ulimit -Hn 12000");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let traces = kms_tests::fresh_folder(0o777);
    fs::set_permissions(traces.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let trace = |name: &str| traces.path().join(name);
    let path = |name: &str| trace(name).to_str().unwrap().to_owned();

    // In the foreground.
    let builder =
        Agent::builder().uid(ALICE).memory_lock(8 << 20).config("limits.connections_per_uid = 10000");
    let agent = builder.strace(&["-o", &path("foreground")]).start();
    agent.as_owner(|| {
        // So many that the table of connections is moved; whoever says nothing is gone after five seconds, which is soon on a busy
        // machine.
        let hello = frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[]);
        let greet = |_| {
            let mut stream = UnixStream::connect(&agent.socket).unwrap();
            stream.write_all(&hello).unwrap();
            stream
        };
        let crowd: Vec<UnixStream> = (0..8_300).map(greet).collect();
        let mut wire = agent.connect();
        drop(crowd);
        wire.generate("a").unwrap();
        let sealed = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
        assert_eq!(wire.lock(b"passphrase"), Ok(true));
        assert_eq!(wire.unlock(b"passphrase"), Ok(true));
        assert_eq!(wire.decrypt("a", NO_CONTEXT, &sealed), Ok(b"x".to_vec()));
        send_signal(agent.pid, Signal::SIGHUP);
        wait_until("the configuration was read again", || agent.log().contains("configuration again"));
        send_signal(agent.pid, Signal::SIGUSR1);
        wait_until("the key is forgotten", || wire.fact("keys") == "0");
        // What is at hand is given back, and cannot be had again.
        wire.generate("b").unwrap();
        let cool = || status_number(agent.pid, "VmLck");
        let busy = cool();
        wait_until("nothing is at hand", || cool() < busy);
        let limit = |bytes: u64| {
            let limit = format!("--memlock={bytes}:");
            let status = tool("prlimit").args(["--pid", &agent.pid.to_string(), &limit]).status().unwrap();
            assert!(status.success());
        };
        limit(1);
        assert_eq!(wire.encrypt("b", NO_CONTEXT, b"x"), Err(Status::Busy));
        limit(8 << 20);
    });
    let _ = agent.stop();
    let foreground = made(&trace("foreground"));

    // For a command, in the background and in a folder of its own.
    let folder = kms_tests::fresh_folder(0o700);
    let traced = |name: &str| {
        let mut command = clean(tool("strace"), folder.path());
        command.args(["-f", "-o", &path(name)]).arg(program("kms-agent")).arg("--memory");
        command
    };
    // strace ends with the last of them.
    let status = traced("command").arg("true").stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
    let command = made(&trace("command"));

    // On standard input and output.
    let mut stdio = traced("stdio");
    let mut child = stdio
        .arg("--stdio")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the sandbox is closed", || {
        fs::read_to_string(trace("stdio")).is_ok_and(|t| t.contains("SET_MODE_FILTER"))
    });
    drop(child.stdin.take());
    assert_eq!(wait_for(&mut child).code(), Some(0));
    let stdio = made(&trace("stdio"));

    let (every, relays) = list();
    let all: BTreeSet<String> = [foreground, command, stdio].into_iter().flatten().collect();
    let mut expected: BTreeSet<String> = every.union(&relays).cloned().collect();
    // Here the vDSO tells the time; `tests/deep vm` has a kernel without one.
    expected.remove("clock_gettime");
    assert_eq!(all, expected);
}

/// What a call answers that gdb, which root may use, puts into an agent; or the signal that the agent ended by.
fn put_in(call: &str) -> Result<i64, Option<i32>> {
    needs_root();
    let agent = Agent::start();
    let pid = agent.pid.to_string();
    let call = format!("print (long)syscall({call})");
    let mut gdb = tool("gdb");
    // It does not bear well that a process is gone in the middle of a call, and would leave a core of its own.
    gdb.args(["-iex", "maint set internal-error corefile no", "-iex", "maint set internal-error quit yes"]);
    let (_, said, _) =
        output(gdb.args(["-batch", "-nx", "-p", &pid, "-ex", &call]).current_dir(agent.folder()));
    match said.lines().find_map(|line| line.strip_prefix("$1 = ")) {
        Some(answer) => Ok(answer.parse().unwrap()),
        None => Err(agent.wait().status.signal()),
    }
}

#[test]
fn a_call_that_is_not_in_the_list_ends_the_agent() {
    let numbers = numbers();
    for name in ["execve", "socket", "clone", "ptrace", "kill"] {
        let answer = put_in(&format!("{}L, 0L, 0L, 0L, 0L, 0L", numbers[name]));
        assert_eq!(answer, Err(Some(Signal::SIGSYS as i32)), "{name}");
    }
    // The control: one that is in the list is answered, and the agent lives.
    assert_eq!(put_in(&format!("{}L, -1L", numbers["close"])), Ok(-1));
}

#[test]
fn files_are_out_of_reach_but_for_the_folder_of_the_configuration() {
    let open = |path: &str| put_in(&format!("{}L, -100L, \"{path}\", 0L", numbers()["openat"]));
    for path in ["/etc/passwd", "/proc/self/maps", "/"] {
        assert!(fs::File::open(path).is_ok(), "the control: it can be opened outside");
        assert_eq!(open(path), Ok(-1), "{path}");
    }
}

#[test]
fn a_kernel_without_a_part_of_the_sandbox_stops_the_start_unless_it_is_only_preferred() {
    needs_root();
    for (injected, named) in [
        (
            "-einject=landlock_create_ruleset:error=ENOSYS",
            "the sandbox is required: Landlock is not to be had",
        ),
        (
            "-einject=landlock_create_ruleset:error=EOPNOTSUPP",
            "the sandbox is required: Landlock is switched off",
        ),
        ("-einject=landlock_restrict_self:error=EPERM", "the sandbox is required: Landlock: "),
        ("-einject=seccomp:error=EINVAL", "the sandbox is required: seccomp: "),
    ] {
        let ended = Agent::builder().strace(&[injected]).try_start().err().unwrap();
        assert_eq!((ended.status.code(), ended.stdout.as_str()), (Some(1), ""), "{}", ended.log);
        assert!(ended.log.contains(named), "{}", ended.log);
        assert!(ended.log.contains("hint: sandbox = \"preferred\""), "{}", ended.log);

        let agent = Agent::builder().config("sandbox = \"preferred\"").strace(&[injected]).start();
        let mut wire = agent.connect();
        let (landlock, seccomp) = (wire.fact("landlock"), wire.fact("seccomp"));
        if named.contains("Landlock") {
            assert_eq!((landlock.as_str(), seccomp.as_str()), ("none", "filter"));
        } else {
            assert_eq!(seccomp, "none");
            assert!(landlock.starts_with(|c: char| c.is_ascii_digit()));
        }
        assert_eq!(status_number(agent.pid, "Seccomp"), if seccomp == "none" { 0 } else { 2 });
        assert!(agent.log().contains("a part of the sandbox is missing"), "{}", agent.log());
        wire.generate("a").unwrap();
        wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    }
}

#[test]
fn the_status_says_what_protects_the_process() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).start();
    agent.as_owner(|| {
        let mut wire = agent.connect();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let limit = status_of_limit(agent.pid, "Max open files");
        assert_eq!(limit.0, limit.1, "the soft limit of descriptors is raised to the hard one");
        assert_eq!(limit.1, hard.to_string());
        for (name, value) in [
            ("pid", agent.pid.to_string()),
            ("dumpable", "no".to_owned()),
            ("traceable", "no".to_owned()),
            ("no-new-privileges", "yes".to_owned()),
            ("seccomp", "filter".to_owned()),
            ("stacks", "mlock".to_owned()),
            ("core-limit", "0".to_owned()),
            ("descriptor-limit", limit.0),
            ("memory-lock-limit", status_of_limit(agent.pid, "Max locked memory").0),
        ] {
            assert_eq!(wire.fact(name), value, "{name}");
        }
        assert!(wire.fact("landlock").starts_with(|c: char| c.is_ascii_digit()));
    });
    assert_eq!((status_number(agent.pid, "Seccomp"), status_number(agent.pid, "NoNewPrivs")), (2, 1));
}

/// Soft and hard limit, as `/proc/PID/limits` has them.
fn status_of_limit(pid: i32, name: &str) -> (String, String) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}
