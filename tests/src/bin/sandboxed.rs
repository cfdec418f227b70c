//! Tries what a sandbox is there to refuse, from inside.
//!
//! `sandboxed ATTEMPT…` makes each attempt in a process of its own and prints `ATTEMPT: done`, or the error or signal that it met.
//! `sandboxed seize PID` does what a debugger begins with. `sandboxed listen NAME PATH` serves an abstract socket and one at PATH,
//! for attempts to reach them. As `kms-test-setuid` it prints
//! its effective uid. It changes nothing that outlives it but files with `kms-probe` in their name.

use std::{
    env,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, PermissionsExt, chown},
            net::{SocketAddr, UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    process::{Command, ExitCode},
};

use kms_tests::sys::{Attempt, attempt};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

/// What is in a `/dev` that has only what every program needs.
const PLAIN_DEVICES: &[&str] = &[
    "block",
    "char",
    "console",
    "core",
    "fd",
    "full",
    "hugepages",
    "initctl",
    "log",
    "mqueue",
    "null",
    "ptmx",
    "pts",
    "random",
    "shm",
    "stderr",
    "stdin",
    "stdout",
    "tty",
    "urandom",
    "zero",
];

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [name] if name.ends_with("kms-test-setuid") => println!("{}", geteuid()),
        [_, "one", name] => say(tried(name)),
        // Let go at the end.
        [_, "seize", pid] => say(attempt(Attempt::Seize(pid.parse().unwrap()))),
        [_, "listen", name, path] => listen(name, path).unwrap(),
        [_, names @ ..] => {
            for name in names {
                let output = Command::new("/proc/self/exe").args(["one", name]).output().unwrap();
                let said = String::from_utf8_lossy(&output.stdout).into_owned()
                    + &String::from_utf8_lossy(&output.stderr);
                match output.status.signal() {
                    Some(signal) => println!("{name}: signal {signal}"),
                    None => print!("{name}: {said}"),
                }
            }
        }
        [] => return ExitCode::FAILURE,
    }
    ExitCode::SUCCESS
}

fn say(outcome: io::Result<()>) {
    match outcome {
        Ok(()) => println!("done"),
        Err(error) => match error.raw_os_error() {
            Some(code) => println!("{}", nix::errno::Errno::from_raw(code)),
            None => println!("{error}"),
        },
    }
}

fn listen(name: &str, path: &str) -> io::Result<()> {
    let unseen = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    let _ = fs::remove_file(path);
    let seen = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    // Of the lane's own namespace or not, it is gone with it: see the caller.
    if env::var_os("KMS_PROBE_SHARES").is_some() {
        kms_tests::sys::share_memory()?;
    }
    println!("listening");
    io::stdout().flush()?;
    // Ends with whoever holds the other end of stdin; connections need not be accepted to be made.
    let _ = io::stdin().read(&mut [0]);
    drop((unseen, seen));
    Ok(())
}

fn refused<T>(reason: &str) -> io::Result<T> {
    Err(io::Error::other(reason.to_owned()))
}

fn writes(folder: &str) -> io::Result<()> {
    let path = format!("{folder}/kms-probe-{}", std::process::id());
    File::create(&path)?;
    fs::remove_file(path)
}

/// A namespace in which a user may do what else only root may.
fn in_namespaces(more: CloneFlags) -> io::Result<()> {
    let flags = if geteuid().is_root() { more } else { more | CloneFlags::CLONE_NEWUSER };
    Ok(unshare(flags)?)
}

fn tried(name: &str) -> io::Result<()> {
    match name {
        "write-home" => writes("/home/alice"),
        "write-etc" => writes("/etc/kms-probe"),
        "write-usr" => writes("/usr/kms-probe"),
        "write-state" => writes("/home/alice/.local/state/kms-agent"),
        "read-configuration" => fs::read("/home/alice/.config/kms-agent/config.toml").map(drop),
        "write-system-state" => writes("/var/lib/kms-agent"),
        "read-system-configuration" => fs::read("/etc/kms-agent/config.toml").map(drop),
        "read-home-of-another" => fs::read("/home/bob/readable").map(drop),
        "read-tmp" => fs::read("/tmp/kms-probe-shared").map(drop),
        "system-bus" => UnixStream::connect("/run/dbus/system_bus_socket").map(drop),
        "abstract-socket" => {
            let name = env::var("KMS_PROBE_ABSTRACT").unwrap();
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?).map(drop)
        }
        "inet-socket" => attempt(Attempt::InetSocket),
        "devices" => {
            let names = fs::read_dir("/dev")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let more: Vec<_> = names.filter(|name| !PLAIN_DEVICES.contains(&name.as_str())).collect();
            if more.is_empty() { refused("only plain devices") } else { Ok(()) }
        }
        "setuid-program" => {
            let output = Command::new("/usr/bin/kms-test-setuid").output()?;
            if output.stdout == b"0\n" { Ok(()) } else { refused("no privilege gained") }
        }
        "set-setuid-bit" => {
            let path = format!("/tmp/kms-probe-{}", std::process::id());
            File::create(&path)?;
            let set = fs::set_permissions(&path, Permissions::from_mode(0o4755));
            fs::remove_file(path)?;
            set
        }
        "chown" => {
            let path = format!("/tmp/kms-probe-{}", std::process::id());
            File::create(&path)?;
            // To whom it belongs already, which anybody may.
            let given = chown(&path, Some(geteuid().as_raw()), None);
            fs::remove_file(path)?;
            given
        }
        "open-to-others" => {
            let path = format!("/tmp/kms-probe-{}", std::process::id());
            let mode = File::create(&path)?.metadata()?.mode();
            fs::remove_file(path)?;
            if mode & 0o077 != 0 { Ok(()) } else { refused("for the owner alone") }
        }
        "namespace" => Ok(unshare(CloneFlags::CLONE_NEWUSER)?),
        "mount" => {
            in_namespaces(CloneFlags::CLONE_NEWNS)?;
            attempt(Attempt::Mount)
        }
        "hostname" => {
            in_namespaces(CloneFlags::CLONE_NEWUTS)?;
            attempt(Attempt::HostName)
        }
        "capabilities" => {
            let status = fs::read_to_string("/proc/self/status")?;
            let none = status.lines().any(|line| line == "CapBnd:\t0000000000000000");
            if none { refused("none can be had") } else { Ok(()) }
        }
        "process-1" => fs::metadata("/proc/1").map(drop),
        "machine-in-proc" => fs::read("/proc/cpuinfo").map(drop),
        "modules" => fs::read_dir("/usr/lib/modules").and_then(|_| {
            // Root may read what nobody may.
            if fs::metadata("/usr/lib/modules")?.mode() & 0o777 == 0 { refused("hidden") } else { Ok(()) }
        }),
        "kernel-log" => {
            if fs::metadata("/proc/kmsg")?.mode() & 0o777 == 0 {
                refused("hidden")
            } else {
                Ok(())
            }
        }
        "kernel-symbols" => {
            if fs::read("/proc/kallsyms")?.is_empty() {
                refused("hidden")
            } else {
                Ok(())
            }
        }
        "control-group" => {
            let own = fs::read_to_string("/proc/self/cgroup")?;
            let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
            let path = format!("/sys/fs/cgroup{own}/kms-probe-{}", std::process::id());
            DirBuilder::new().create(&path)?;
            fs::remove_dir(path)
        }
        "write-and-run" => attempt(Attempt::WriteAndRun),
        "personality" => attempt(Attempt::Personality),
        "other-architecture" => attempt(Attempt::OtherArchitecture),
        "trace" => attempt(Attempt::Trace),
        "clock" => attempt(Attempt::Clock),
        "realtime" => attempt(Attempt::Realtime),
        "priority" => attempt(Attempt::Priority),
        "shared-memory" => attempt(Attempt::SharedMemory),
        "secret-memory" => attempt(Attempt::SecretMemory),
        "landlock" => attempt(Attempt::Landlock),
        "seccomp" => attempt(Attempt::Seccomp),
        _ => panic!("no such attempt: {name}"),
    }
}
