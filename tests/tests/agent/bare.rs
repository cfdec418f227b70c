//! Starts with less than a program usually has: streams, HOME, runtime folder, working folder, locale.

use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kms_tests::{
    ALICE, BOB, Wire,
    agent::fresh_folder,
    as_uid,
    process::{PATIENCE, ends_within, output, send_signal, wait_for, wait_until},
    programs::{SharedCopy, needs_root, program, tool},
    start::{Foreground, agent_command, clean, fails, is_empty, variables},
};
use nix::sys::signal::Signal;

/// Every combination of stdin, stdout and stderr, closed.
#[test]
fn a_closed_stream_never_becomes_a_socket() {
    let folder = fresh_folder(0o700);
    for closed in 0..8 {
        for foreground in [true, false] {
            let close: String = ["<&-", ">&-", "2>&-"]
                .iter()
                .enumerate()
                .filter(|(stream, _)| closed & (1 << stream) != 0)
                .map(|(_, close)| format!(" {close}"))
                .collect();
            let flag = if foreground { "-D" } else { "" };
            let script = format!("exec{close}; exec \"$AGENT\" --memory {flag} -a s");
            let mut command = clean(tool("sh"), folder.path());
            command.args(["-c", &script]).env("AGENT", program("kms-agent"));
            let (out, err) = (folder.path().join("out"), folder.path().join("err"));
            command.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
            let mut child = command.spawn().unwrap();
            let socket = folder.path().join("s");
            wait_until("it listens", || UnixStream::connect(&socket).is_ok());
            let mut wires = [Wire::connect(&socket), Wire::connect(&socket)];
            let pid: i32 = wires[0].fact("pid").parse().unwrap();
            for fd in 0..3 {
                let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
                let open = foreground && closed & (1 << fd) == 0 && fd > 0;
                let expected = match fd {
                    1 if open => out.as_path(),
                    2 if open => err.as_path(),
                    _ => Path::new("/dev/null"),
                };
                assert_eq!(target, expected, "descriptor {fd} of {script}");
            }
            // What is logged, as this is, goes nowhere where a peer could read it.
            assert!(
                UnixStream::connect(&socket).is_ok_and(|stream| Wire::over(stream).send(&[0xff; 64]).is_ok())
            );
            for wire in &mut wires {
                wire.ping().unwrap();
            }
            send_signal(pid, Signal::SIGTERM);
            assert!(ends_within(pid, PATIENCE));
            assert_eq!(wait_for(&mut child).code(), Some(0), "{script}");
            let words = fs::read_to_string(&out).unwrap();
            assert_eq!(variables(&words).is_some(), closed & 2 == 0, "{script}: {words}");
            for file in [&out, &err] {
                fs::remove_file(file).unwrap();
            }
            assert!(is_empty(folder.path()));
        }
    }
}

/// A user without anything: no HOME, no runtime folder, no locale that is there, a working folder that is gone.
struct Bare {
    agent: SharedCopy,
    folder: tempfile::TempDir,
}

impl Bare {
    fn new() -> Self {
        needs_root();
        let bare = Self { agent: SharedCopy::of(&program("kms-agent"), 0o755), folder: fresh_folder(0o755) };
        bare.folder("tmp", 0, 0o1777);
        bare
    }

    fn folder(&self, name: &str, owner: u32, mode: u32) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    }

    fn command(&self) -> Command {
        let mut command = self.agent.as_user(ALICE);
        command.env_clear().env("TMPDIR", self.folder.path().join("tmp"));
        command.args(["--memory", "-D"]).current_dir("/").stdin(Stdio::null());
        command
    }

    /// It starts, with a socket that is Alice's alone; where that is.
    fn starts(&self, command: &mut Command) -> PathBuf {
        let agent = Foreground::start(command).unwrap_or_else(|stderr| panic!("{stderr}"));
        as_uid(ALICE, || Wire::connect(&agent.socket).ping().unwrap());
        let (socket, folder) = (
            fs::symlink_metadata(&agent.socket).unwrap(),
            fs::metadata(agent.socket.parent().unwrap()).unwrap(),
        );
        assert_eq!((socket.uid(), socket.mode() & 0o777), (ALICE, 0o600));
        assert_eq!((folder.uid(), folder.mode() & 0o777), (ALICE, 0o700));
        let socket = agent.socket.clone();
        agent.stop();
        socket
    }
}

#[test]
fn it_starts_without_a_home_a_runtime_folder_and_a_locale() {
    let bare = Bare::new();
    let temporary = bare.folder.path().join("tmp");
    // No session of Alice's is on this machine.
    assert!(!Path::new("/run/user/1001").exists(), "this test needs a uid without a session");
    let runtime = bare.folder("runtime", ALICE, 0o700);
    let others_home = bare.folder("home", BOB, 0o700);
    let fresh = |socket: PathBuf| {
        assert!(socket.starts_with(&temporary), "{}", socket.display());
        assert!(is_empty(&temporary));
    };
    fresh(bare.starts(&mut bare.command()));
    fresh(bare.starts(bare.command().env("LC_ALL", "C").env("LANG", "xx_YY.none")));
    fresh(bare.starts(bare.command().env("HOME", "")));
    fresh(bare.starts(bare.command().env("HOME", "/nonexistent")));
    fresh(bare.starts(bare.command().env("XDG_RUNTIME_DIR", "")));
    fresh(bare.starts(bare.command().env("XDG_RUNTIME_DIR", "relative")));
    assert_eq!(
        bare.starts(bare.command().env("XDG_RUNTIME_DIR", &runtime)),
        runtime.join("kms-agent/agent.sock")
    );
    // A working folder that is gone, and the most open umask, through a shell of Alice's.
    let script = r#"umask 0; d=$(mktemp -d) && cd "$d" && rmdir "$d" && exec "$AGENT" --memory -D"#;
    let mut shell = tool("setpriv");
    shell.args([format!("--reuid={ALICE}"), format!("--regid={ALICE}"), "--clear-groups".to_owned()]);
    shell.args(["/bin/sh", "-c", script]).env_clear().env("AGENT", bare.agent.path());
    shell.env("TMPDIR", &temporary).env("PATH", "/usr/bin:/bin").current_dir("/").stdin(Stdio::null());
    fresh(bare.starts(&mut shell));
    // Whose home somebody else's is has no configuration there, and is told so.
    let stderr = fails(bare.command().env("HOME", &others_home), 1);
    assert!(
        stderr.contains(others_home.to_str().unwrap()) && stderr.contains("Permission denied"),
        "{stderr}"
    );
}

#[test]
fn a_runtime_folder_that_is_not_fit_is_named() {
    let bare = Bare::new();
    let good = bare.folder("good", ALICE, 0o700);
    let (bobs, open) = (bare.folder("bobs", BOB, 0o700), bare.folder("open", ALICE, 0o777));
    let file = bare.folder.path().join("file");
    fs::write(&file, "").unwrap();
    let link = bare.folder.path().join("link");
    symlink(&good, &link).unwrap();
    for (folder, said) in [
        (bobs.clone(), "belongs to another user, uid 1002"),
        (open, "others can write to the folder"),
        (file, "is not a folder"),
        (bare.folder.path().join("none"), "No such file or directory"),
    ] {
        let stderr = fails(bare.command().env("XDG_RUNTIME_DIR", &folder), 1);
        assert!(stderr.contains(said) && stderr.contains(folder.to_str().unwrap()), "{stderr}");
    }
    assert_eq!(bare.starts(bare.command().env("XDG_RUNTIME_DIR", &link)), good.join("kms-agent/agent.sock"));
    // What is in the way of the agent's own folder there.
    let own = good.join("kms-agent");
    fs::remove_dir(&own).unwrap();
    for (target, said) in [(&bobs, "belongs to another user, uid 1002"), (&own, "more than 40 symlinks")] {
        symlink(target, &own).unwrap();
        std::os::unix::fs::lchown(&own, Some(ALICE), None).unwrap();
        let stderr = fails(bare.command().env("XDG_RUNTIME_DIR", &good), 1);
        assert!(stderr.contains(said), "{stderr}");
        fs::remove_file(&own).unwrap();
    }
    // A command does not need it.
    let mut command = bare.agent.as_user(ALICE);
    command.args(["--memory", "/bin/sh", "-c", "echo $KMS_AUTH_SOCK"]).env_clear();
    command.env("TMPDIR", bare.folder.path().join("tmp")).env("XDG_RUNTIME_DIR", &bobs);
    let (status, stdout, stderr) = output(&mut command);
    assert!(status.success() && stdout.contains("/tmp/kms-agent-"), "{stderr}");
}

#[test]
fn a_start_that_fails_before_the_socket_leaves_no_folder() {
    let folder = fresh_folder(0o700);
    let temporary = folder.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let config = folder.path().join("config.toml");
    fs::write(&config, "lock_on = ['sleep']\n").unwrap();
    let none = folder.path().join("none");
    let command = |arguments: &[&str]| {
        let mut command = agent_command(folder.path(), &["--memory"]);
        command.args(arguments).env("TMPDIR", &temporary).env_remove("XDG_RUNTIME_DIR");
        command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", none.display()));
        command
    };
    let config = config.to_str().unwrap();
    for arguments in [&["-D", "--config", config][..], &["--config", config, "true"]] {
        let stderr = fails(&mut command(arguments), 1);
        assert!(stderr.contains("the system bus cannot be reached"), "{stderr}");
        assert!(is_empty(&temporary), "{arguments:?}");
    }
    let stderr = fails(command(&["-D"]).env("NOTIFY_SOCKET", &none), 1);
    assert!(stderr.contains("NOTIFY_SOCKET") && is_empty(&temporary), "{stderr}");
    // No descriptor is left for the pipe between the processes.
    let mut limited = clean(tool("prlimit"), folder.path());
    limited.arg("--nofile=4").arg(program("kms-agent")).args(["--memory", "true"]).env("TMPDIR", &temporary);
    let stderr = fails(&mut limited, 1);
    assert!(stderr.contains("cannot go to the background") && is_empty(&temporary), "{stderr}");
}

#[test]
fn who_reads_no_log_holds_nobody_up() {
    let folder = fresh_folder(0o700);
    let socket = folder.path().join("s");
    let agent = Foreground::start(&mut agent_command(
        folder.path(),
        &["--memory", "-D", "-a", socket.to_str().unwrap()],
    ));
    let agent = agent.unwrap();
    let mut wire = Wire::connect(&socket);
    // Each is told in a line, and a pipe has room for some six hundred: what does not fill a page of it takes one.
    for _ in 0..1000 {
        wire.generate("a").unwrap();
        wire.remove("a").unwrap();
    }
    wire.ping().unwrap();
    let log = agent.stop();
    assert!((56 * 1024..=64 * 1024).contains(&log.len()), "{}", log.len());
    assert!(log.lines().all(|line| line.contains("kms_agent")), "whole lines only");
}
