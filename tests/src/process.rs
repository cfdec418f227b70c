//! What the kernel tells about a process, and waiting for it.

use std::{
    fs,
    io::Write,
    os::fd::AsFd,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{programs, sys};

/// What does not happen within this time does not happen: generous, since the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Returns as soon as `done` does; `what` is for the failure.
///
/// # Panics
/// When it is not so within [`PATIENCE`].
pub fn wait_until(what: &str, done: impl FnMut() -> bool) {
    wait_until_within(PATIENCE, what, done);
}

/// As [`wait_until`], with another patience.
///
/// # Panics
/// When it is not so within `patience`.
pub fn wait_until_within(patience: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        // Leaves the processor to who makes it so, between two looks.
        let _ = poll(&mut [], PollTimeout::from(2u8));
    }
}

/// Waits for the end of a process at most so long; says whether it ended. It need not be a child.
#[must_use]
pub fn ends_within(pid: i32, patience: Duration) -> bool {
    let Some(process) = sys::pidfd_open(pid) else { return true };
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout) == Ok(1)
}

/// Waits for a child.
///
/// # Panics
/// When it does not end.
pub fn wait_for(child: &mut Child) -> ExitStatus {
    let pid = child.id().cast_signed();
    assert!(ends_within(pid, PATIENCE), "process {pid} does not end");
    child.wait().unwrap()
}

/// Sends a signal.
///
/// # Panics
/// When there is no such process.
pub fn send_signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("kill {pid}: {error}"));
}

/// Stops a process, and returns when each of its threads stands still: the signal reaches one after the other.
///
/// # Panics
/// When there is no such process.
pub fn halt(pid: i32) {
    send_signal(pid, Signal::SIGSTOP);
    wait_until("every thread stands still", || {
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    });
}

/// A number of `/proc/PID/status`, such as `VmLck` in KiB.
///
/// # Panics
/// When process or line is not there.
#[must_use]
pub fn status_number(pid: i32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The children of a process, by the name that the kernel shows of each.
///
/// # Panics
/// Without `/proc`.
#[must_use]
pub fn children(pid: i32, name: &str) -> Vec<i32> {
    let parent = format!("PPid:\t{pid}");
    let name = format!("Name:\t{name}");
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        // It may have ended meanwhile.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == name) && status.lines().any(|line| line == parent)
    })
    .collect()
}

/// Number of open descriptors.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Processor time used so far, of all threads.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn processor_time(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = [fields[11], fields[12]].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

/// A range of addresses as `/proc/PID/smaps` shows it.
#[derive(Clone, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Such as `rw-p`.
    pub permissions: String,
    /// A file, or a name in brackets, or nothing.
    pub name: String,
    /// Two-letter flags of `VmFlags`.
    pub flags: Vec<String>,
}

impl Range {
    /// Whether it has the flag, such as `lo` for locked.
    #[must_use]
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|own| own == flag)
    }
}

/// Every range of addresses of a process.
///
/// # Panics
/// When there is no such process, or it may not be looked at.
#[must_use]
pub fn ranges(pid: i32) -> Vec<Range> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .unwrap_or_else(|error| panic!("/proc/{pid}/smaps: {error} (this test needs root)"));
    let mut ranges: Vec<Range> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            let permissions = words.next().unwrap().to_owned();
            let name = words.skip(3).collect::<Vec<_>>().join(" ");
            ranges.push(Range { start, end, permissions, name, flags: Vec::new() });
        } else if first == "VmFlags:" {
            ranges.last_mut().unwrap().flags = words.map(str::to_owned).collect();
        }
    }
    ranges
}

/// Where the stack of each thread but the first is, with the name of the thread. They must come to wait for something.
///
/// # Panics
/// When there is no such process, or it may not be looked at.
#[must_use]
pub fn stack_pointers(pid: i32) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap());
    let others = tasks.filter(|task| task.file_name().to_str() != Some(&pid.to_string()));
    let pointer = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap().trim_end().to_owned();
        let mut pointer = None;
        wait_until("the thread waits", || {
            // Number and arguments of the system call, stack pointer, program counter; else the word `running`.
            let call = fs::read_to_string(task.path().join("syscall")).unwrap();
            let word = call.split_whitespace().rev().nth(1).and_then(|word| word.strip_prefix("0x"));
            pointer = word.map(|word| u64::from_str_radix(word, 16).unwrap());
            pointer.is_some()
        });
        (name, pointer.unwrap())
    };
    others.map(pointer).collect()
}

/// strace, attached to a running process; detached when dropped.
pub struct Strace(Child);

impl Strace {
    /// Attaches to all threads of `pid` and does as `arguments` say, such as `-einject=getsockopt:error=EINVAL`.
    ///
    /// # Panics
    /// When strace is missing or may not attach.
    #[must_use]
    pub fn attach(pid: i32, arguments: &[&str]) -> Self {
        programs::needs_root();
        let mut command = programs::tool("strace");
        command.args(["-f", "-o", "/dev/null", "-p", &pid.to_string()]).args(arguments);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // Its own words come before it has hold of every thread.
        wait_until("strace holds every thread", || {
            fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
                let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
                status.lines().any(|line| line == format!("TracerPid:\t{}", child.id()))
            })
        });
        Self(child)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Asked to end it detaches first; killed it would leave the process as it stands.
        send_signal(self.0.id().cast_signed(), Signal::SIGTERM);
        wait_for(&mut self.0);
    }
}

/// What a program did until its end.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub status: ExitStatus,
    /// All that it wrote to stdout, if that was a pipe.
    pub stdout: Vec<u8>,
    /// All that it wrote to stderr, if that was a pipe.
    pub stderr: String,
}

/// Runs to its end, with standard streams as the command has them.
///
/// # Panics
/// When it cannot be run, or does not end.
pub fn run(command: &mut Command) -> Ran {
    finish(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")), &[])
}

/// As [`run`], with these bytes through a pipe as stdin.
///
/// # Panics
/// When it cannot be run, or does not end.
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Ran {
    let child = command.stdin(Stdio::piped()).spawn();
    finish(child.unwrap_or_else(|error| panic!("{command:?}: {error}")), input)
}

fn finish(mut child: Child, input: &[u8]) -> Ran {
    let pid = child.id().cast_signed();
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(mut stdin) = stdin {
                // It need not read to the end.
                let _ = stdin.write_all(input);
            }
        });
        let reader = scope.spawn(|| child.wait_with_output().unwrap());
        let ended = ends_within(pid, PATIENCE);
        if !ended {
            // Not waited for by anybody yet, so the number is still its own.
            send_signal(pid, Signal::SIGKILL);
        }
        let output = reader.join().unwrap();
        assert!(ended, "process {pid} does not end: {}", String::from_utf8_lossy(&output.stderr));
        output
    });
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { status: output.status, stdout: output.stdout, stderr }
}

/// Runs to its end with nothing as stdin and gives status, stdout, stderr as text.
///
/// # Panics
/// When it cannot be run, or does not end.
pub fn output(command: &mut Command) -> (ExitStatus, String, String) {
    let ran = run(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    (ran.status, String::from_utf8_lossy(&ran.stdout).into_owned(), ran.stderr)
}
