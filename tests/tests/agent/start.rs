//! How the agent comes to be, where its socket may lie, and what it leaves when it ends.

use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader, Read},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
        net::UnixListener,
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use kms_protocol::{KeyAndContext, KeyRef, NoFields, Opcode, Status};
use kms_tests::{
    ALICE, Agent, Wire,
    agent::fresh_folder,
    process::{PATIENCE, ends_within, output, send_signal, wait_for, wait_until},
    programs::{needs_root, program, tool},
    start::{agent_command, clean, fails, is_empty},
    wire::{NO_CONTEXT, Operations, frame},
};
use nix::sys::signal::Signal;

#[test]
fn a_second_agent_does_not_take_a_socket_that_is_served() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let socket = agent.socket.to_str().unwrap();
    let stderr = fails(&mut agent_command(agent.folder(), &["--memory", "-D", "-a", socket]), 1);
    assert!(stderr.contains("an agent serves this socket already"), "{stderr}");
    assert!(stderr.contains("kms-agent: hint: "), "{stderr}");
    assert!(stderr.contains(socket), "{stderr}");
    wire.ping().unwrap();
    agent.connect().ping().unwrap();
}

#[test]
fn a_live_socket_without_a_lock_file_is_not_taken_either() {
    let folder = fresh_folder(0o700);
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s"]), 1);
    assert!(stderr.contains("an agent serves this socket already"), "{stderr}");
    assert!(path.exists());
    drop(listener);
}

#[test]
fn of_many_agents_that_start_at_once_one_lives() {
    let folder = fresh_folder(0o700);
    let children: Vec<_> = (0..100)
        .map(|_| {
            let mut command = agent_command(folder.path(), &["--memory", "-D", "-a", "s"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut alive = Vec::new();
    for mut child in children {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            assert_eq!(wait_for(&mut child).code(), Some(1));
            assert!(stderr.contains("an agent serves this socket already"), "{stderr}");
        } else {
            alive.push(child);
        }
    }
    assert_eq!(alive.len(), 1);
    Wire::connect(&folder.path().join("s")).ping().unwrap();
    send_signal(alive[0].id().cast_signed(), Signal::SIGTERM);
    assert!(wait_for(&mut alive[0]).success());
    assert!(is_empty(folder.path()));
}

#[test]
fn a_stale_socket_of_ours_is_taken_over() {
    let mut dead = Agent::start();
    dead.kill();
    assert!(fs::symlink_metadata(&dead.socket).unwrap().file_type().is_socket());
    let socket = dead.socket.to_str().unwrap();
    let mut command = agent_command(dead.folder(), &["--memory", "-D", "-a", socket]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Wire::connect(&dead.socket).ping().unwrap();
    send_signal(child.id().cast_signed(), Signal::SIGINT);
    assert!(wait_for(&mut child).success(), "SIGINT ends it as SIGTERM does");
    assert!(is_empty(dead.socket.parent().unwrap()));
}

#[test]
fn what_is_not_our_dead_socket_is_left_alone() {
    needs_root();
    let folder = fresh_folder(0o700);
    let path = folder.path().join("s");
    let place = |what: &str| match what {
        "a file" => fs::write(&path, "precious").unwrap(),
        "a folder" => fs::create_dir(&path).unwrap(),
        "a FIFO" => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
        "a link to a file" => {
            fs::write(folder.path().join("target"), "precious").unwrap();
            symlink("target", &path).unwrap();
        }
        "a dangling link" => symlink("nowhere", &path).unwrap(),
        "a dead socket of another user" => {
            drop(UnixListener::bind(&path).unwrap());
            chown(&path, Some(ALICE), Some(ALICE)).unwrap();
        }
        other => panic!("{other}"),
    };
    for what in [
        "a file",
        "a folder",
        "a FIFO",
        "a link to a file",
        "a dangling link",
        "a dead socket of another user",
    ] {
        place(what);
        let before = fs::symlink_metadata(&path).unwrap();
        let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s"]), 1);
        assert!(stderr.contains("there is something that is not a stale socket of ours"), "{what}: {stderr}");
        let after = fs::symlink_metadata(&path).unwrap();
        assert_eq!((before.ino(), before.mode(), before.len()), (after.ino(), after.mode(), after.len()));
        if what == "a link to a file" {
            assert_eq!(fs::read_to_string(folder.path().join("target")).unwrap(), "precious");
        }
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.retain(|name| name != "s" && name != "target");
        assert!(names.is_empty(), "{what}: the refused agent leaves {names:?}");
        if after.is_dir() { fs::remove_dir(&path).unwrap() } else { fs::remove_file(&path).unwrap() }
    }
    // The lock file is not followed where it is a link.
    symlink("elsewhere", folder.path().join("s.lock")).unwrap();
    fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s"]), 1);
    assert!(!folder.path().join("elsewhere").exists());
    assert!(!path.exists());
}

#[test]
fn a_folder_that_others_can_write_to_is_refused() {
    needs_root();
    for (mode, refused) in
        [(0o777, true), (0o1777, true), (0o720, true), (0o702, true), (0o700, false), (0o755, false)]
    {
        let folder = fresh_folder(mode);
        let mut command = agent_command(folder.path(), &["--memory", "-D", "-a", "s"]);
        if refused {
            let stderr = fails(&mut command, 1);
            assert!(stderr.contains("others can write to the folder /"), "{mode:o}: {stderr}");
            assert!(is_empty(folder.path()));
        } else {
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
            send_signal(child.id().cast_signed(), Signal::SIGTERM);
            assert!(wait_for(&mut child).success());
        }
    }
    let folder = fresh_folder(0o700);
    chown(folder.path(), Some(ALICE), Some(ALICE)).unwrap();
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s"]), 1);
    assert!(stderr.contains("belongs to another user, uid 1001"), "{stderr}");
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "/etc/passwd/s"]), 1);
    assert!(stderr.contains("/etc/passwd/s: /etc/passwd is not a folder"), "{stderr}");
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "/nonexistent/s"]), 1);
    assert!(
        stderr.contains("/nonexistent/s: cannot look at /nonexistent: No such file or directory"),
        "{stderr}"
    );
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "/"]), 1);
    assert!(stderr.contains("the path names no socket"), "{stderr}");
}

#[test]
fn the_path_of_a_socket_may_be_relative_and_has_at_most_107_bytes() {
    let folder = fresh_folder(0o700);
    let fill = |len: usize| "x".repeat(len - folder.path().as_os_str().len() - 1);
    for (name, fits) in
        [(fill(106), true), (fill(107), true), (fill(108), false), (fill(109), false), (fill(200), false)]
    {
        let mut command = agent_command(folder.path(), &["--memory", "-D", "-a", &name]);
        if !fits {
            let stderr = fails(&mut command, 1);
            assert!(stderr.contains("the path of a socket has at most 107 bytes"), "{stderr}");
            assert!(stderr.contains("kms-agent: hint: "), "{stderr}");
            assert!(is_empty(folder.path()));
            continue;
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let absolute = folder.path().join(&name);
        assert!(line.contains(absolute.to_str().unwrap()), "{line}");
        Wire::connect(&absolute).ping().unwrap();
        send_signal(child.id().cast_signed(), Signal::SIGTERM);
        assert!(wait_for(&mut child).success());
        assert!(is_empty(folder.path()));
    }
}

#[test]
fn a_bad_configuration_stops_the_start_and_names_its_place() {
    let folder = fresh_folder(0o700);
    let file = folder.path().join("c.toml");
    for (text, said) in [
        ("secret_memry = \"auto\"\n", "unknown key secret_memry; did you mean secret_memory?"),
        ("[limits]\nkey = 1\n", "unknown key limits.key; did you mean limits.keys?"),
        ("log = \"loud\"\n", "sets log to what it cannot be; allowed: \"off\", \"error\""),
        ("[limits]\nframe = 5\n", "sets limits.frame to what it cannot be; allowed: 131072 to 1048576"),
        ("[limits]\nkeys = \"many\"\n", "line 2"),
        ("\u{1b}[31m = 1\n", "c.toml"),
    ] {
        fs::write(&file, text).unwrap();
        let stderr =
            fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s", "--config", "c.toml"]), 1);
        assert!(stderr.contains(said) && stderr.contains("c.toml"), "{stderr}");
        assert!(!stderr.contains('\u{1b}'), "{stderr:?}");
    }
    let stderr =
        fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s", "--config", "none"]), 1);
    assert!(stderr.contains("cannot read the configuration /") && stderr.contains("/none: "), "{stderr}");
    // The user's own file, where none is named.
    let own = folder.path().join(".config/kms-agent");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("config.toml"), "lg = \"info\"\n").unwrap();
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "s"]), 1);
    assert!(stderr.contains("did you mean log?"), "{stderr}");
    assert!(!folder.path().join("s").exists());
}

#[test]
fn bad_usage_is_64_and_help_is_0() {
    let folder = fresh_folder(0o700);
    for arguments in [&["--mem"][..], &["-Z"], &["-a"], &["--config"], &["-D", "true"]] {
        let stderr = fails(&mut agent_command(folder.path(), arguments), 64);
        assert!(stderr.contains("kms-agent: hint: "), "{stderr}");
    }
    for argument in ["--help", "--version"] {
        let (status, stdout, _) = output(&mut agent_command(folder.path(), &[argument]));
        assert!(status.success() && stdout.contains("kms-agent"));
    }
    assert!(is_empty(folder.path()));
}

#[test]
fn a_hangup_reads_the_configuration_again_and_a_bad_one_changes_nothing() {
    let agent = Agent::builder().config("[limits]\nkeys = 1\n").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Limit));
    let reload = |text: &str, said: &str| {
        let before = agent.log().matches(said).count();
        fs::write(agent.config(), text).unwrap();
        send_signal(agent.pid, Signal::SIGHUP);
        wait_until(said, || agent.log().matches(said).count() > before);
    };
    let kept = "the old configuration stays in force";
    for bad in
        ["[limits]\nkeys = 0\n", "[limits]\nkeys = 9\nkyes = 9\n", "[limits\n", "[limits]\nkeys = 9\n[x]\n"]
    {
        reload(bad, kept);
        assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Limit), "{bad:?}");
    }
    fs::remove_file(agent.config()).unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("a file that is gone is a bad one", || agent.log().matches(kept).count() == 5);
    assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Limit));
    reload("[limits]\nkeys = 2\n", "read the configuration again");
    wire.generate("b").unwrap();
    assert_eq!(wire.generate("c").map(|_| ()), Err(Status::Limit));
    // It is still an agent without a keystore.
    reload("", "read the configuration again");
    wire.generate("c").unwrap();
}

/// A client goes by the numbers that the reply to its hello named.
#[test]
fn a_connection_keeps_its_frame_maximum_when_the_configuration_is_read_again() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    fs::write(agent.config(), "[limits]\nframe = 131072\n").unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("it is read", || agent.log().contains("read the configuration again"));
    let random = frame(Opcode::Random, 1, &kms_protocol::Random { length: 65_536 }, &[]);
    let mut later = Wire::connect(&agent.socket);
    for (wire, fit) in [(&mut wire, 10), (&mut later, 1)] {
        let replies = wire.batch(&vec![random.clone(); 10]).unwrap();
        assert_eq!(replies.iter().filter(|reply| reply.status == Status::Ok).count(), fit);
    }
    let items = frame(
        Opcode::Encrypt,
        1,
        &KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT },
        &[7; 60_000],
    );
    assert_eq!(wire.batch(&vec![items.clone(); 10]).unwrap().len(), 10);
    later.send(&frame(Opcode::Batch, 2, &NoFields {}, &items.repeat(10))[..16]).unwrap();
    assert_eq!(later.receive().unwrap().status, Status::TooLarge);
    assert!(later.is_closed());
}

#[test]
fn a_command_runs_under_an_agent_of_its_own_that_ends_with_it() {
    let folder = fresh_folder(0o700);
    let script = |text: &str| agent_command(folder.path(), &["--memory", "sh", "-c", text]);
    let (status, stdout, stderr) =
        output(&mut script("echo $KMS_AUTH_SOCK $KMS_AGENT_PID; test -S \"$KMS_AUTH_SOCK\" && exit 7"));
    assert_eq!(status.code(), Some(7), "{stderr}");
    let (socket, pid) = stdout.trim().split_once(' ').unwrap();
    assert!(socket.starts_with(folder.path().to_str().unwrap()), "{socket}");
    assert!(ends_within(pid.parse().unwrap(), PATIENCE), "the agent ends");
    wait_until("its folder is gone", || is_empty(folder.path()));

    for code in [0, 1, 64, 255] {
        assert_eq!(output(&mut script(&format!("exit {code}"))).0.code(), Some(code));
    }
    let by_signal = |status: ExitStatus| status.signal();
    assert_eq!(by_signal(output(&mut script("kill -TERM $$")).0), Some(15), "as a shell: 128 and 15");
    let shell = format!("{} --memory sh -c 'kill -KILL $$'; echo $?", program("kms-agent").display());
    let mut outer = clean(tool("sh"), folder.path());
    assert_eq!(output(outer.args(["-c", &shell])).1.trim(), "137");

    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "no-such-command"]), 127);
    assert!(stderr.contains("cannot run the command"), "{stderr}");
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "/etc/passwd"]), 126);
    assert!(stderr.contains("Permission denied"), "{stderr}");
    // Arguments of the command are its own, and a command that fails to start leaves no agent.
    let (_, stdout, _) =
        output(&mut agent_command(folder.path(), &["--memory", "echo", "-D", "--memory", "--", "x"]));
    assert_eq!(stdout, "-D --memory -- x\n");
    wait_until("every folder is gone", || is_empty(folder.path()));
}

#[test]
fn the_command_can_use_its_agent() {
    let folder = fresh_folder(0o700);
    let mut command = agent_command(
        folder.path(),
        &["--memory", "sh", "-c", "echo $KMS_AUTH_SOCK $KMS_AGENT_PID; read line; exit 3"],
    );
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (socket, pid) = line.trim().split_once(' ').unwrap();
    let (socket, pid): (PathBuf, i32) = (socket.into(), pid.parse().unwrap());
    assert_eq!(socket.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
    let mut wire = Wire::connect(&socket);
    wire.generate("a").unwrap();
    assert_eq!(wire.fact("pid"), pid.to_string());
    drop(child.stdin.take());
    assert_eq!(wait_for(&mut child).code(), Some(3));
    assert!(ends_within(pid, PATIENCE));
    wait_until("its folder is gone", || is_empty(folder.path()));
}

#[test]
fn a_command_does_not_wait_for_the_agent_nor_inherit_from_it() {
    let folder = fresh_folder(0o700);
    // `wait` would wait for a child that is the agent; stdout would stay open where the agent had it.
    let script = "wait; ls /proc/self/fd | wc -l";
    let (status, stdout, _) = output(&mut agent_command(folder.path(), &["--memory", "sh", "-c", script]));
    assert!(status.success());
    let mut plain = clean(tool("sh"), folder.path());
    let (_, expected, _) = output(plain.args(["-c", script]));
    assert_eq!(stdout, expected, "no descriptor more than without the agent");
}

#[test]
fn what_is_printed_evaluates_in_a_shell() {
    let folder = fresh_folder(0o700);
    let agent = program("kms-agent");
    // The folder of the socket has a name that a shell would take apart.
    let odd = folder.path().join("a b'c$(x)");
    fs::create_dir(&odd).unwrap();
    fs::set_permissions(&odd, Permissions::from_mode(0o700)).unwrap();
    for (setting, expected) in [
        (String::new(), "kms-agent-"),
        (
            format!("XDG_RUNTIME_DIR={}; export XDG_RUNTIME_DIR;", folder.path().display()),
            "/kms-agent/agent.sock",
        ),
        (
            format!(
                "XDG_RUNTIME_DIR=\"{}\"; export XDG_RUNTIME_DIR;",
                odd.display().to_string().replace('$', "\\$")
            ),
            "/a b'c$(x)/kms-agent/agent.sock",
        ),
    ] {
        let script = format!(
            "set -e; {setting} eval \"$({} --memory)\"; test -S \"$KMS_AUTH_SOCK\"; \
             sh -c 'printf \"%s\\n%s\\n\" \"$KMS_AUTH_SOCK\" \"$KMS_AGENT_PID\"'",
            agent.display()
        );
        let mut shell = clean(tool("sh"), folder.path());
        // No XDG_RUNTIME_DIR and no folder of a session: a fresh folder in TMPDIR.
        let (status, stdout, stderr) = output(shell.args(["-c", &script]));
        assert!(status.success(), "{stderr}");
        let (socket, pid) = stdout.trim().split_once('\n').unwrap();
        assert!(socket.contains(expected) || Path::new("/run/user").is_dir(), "{socket}");
        let pid: i32 = pid.parse().unwrap();
        let mut wire = Wire::connect(Path::new(socket));
        assert_eq!(wire.fact("pid"), pid.to_string());
        // Nothing of where it was started stays with it.
        assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
        for fd in 0..3 {
            assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap(), Path::new("/dev/null"));
        }
        let environment = fs::symlink_metadata(socket).unwrap();
        assert_eq!(environment.mode() & 0o777, 0o600);
        send_signal(pid, Signal::SIGTERM);
        assert!(ends_within(pid, PATIENCE));
        assert!(!Path::new(socket).exists());
        assert!(!Path::new(&format!("{socket}.lock")).exists());
    }
    fs::remove_dir_all(&odd).unwrap();
    fs::remove_dir(folder.path().join("kms-agent")).unwrap();
    assert!(is_empty(folder.path()), "a fresh folder goes with its agent");
}

#[test]
fn whatever_the_umask_the_socket_is_its_owners_alone() {
    let folder = fresh_folder(0o755);
    for umask in ["0", "0777", "022"] {
        let script = format!(
            "umask {umask}; exec {} --memory -D -a {}/s",
            program("kms-agent").display(),
            folder.path().display()
        );
        let mut shell = clean(tool("sh"), folder.path());
        let mut child =
            shell.args(["-c", &script]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        for name in ["s", "s.lock"] {
            let mode = fs::symlink_metadata(folder.path().join(name)).unwrap().mode() & 0o777;
            assert_eq!(mode, 0o600, "{name} under umask {umask}");
        }
        Wire::connect(&folder.path().join("s")).ping().unwrap();
        send_signal(child.id().cast_signed(), Signal::SIGTERM);
        assert!(wait_for(&mut child).success());
        assert!(is_empty(folder.path()));
    }
}

#[test]
fn the_agent_keeps_nothing_that_it_was_started_with() {
    let agent = Agent::start();
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid)).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid)).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
    // Not dumpable: the files of the process belong to root, whoever runs it.
    if nix::unistd::getuid().is_root() {
        let agent = Agent::builder().uid(ALICE).start();
        assert_eq!(fs::metadata(format!("/proc/{}/mem", agent.pid)).unwrap().uid(), 0);
    }
}

#[test]
fn a_descriptor_of_who_started_it_stays_with_the_command_and_not_with_the_agent() {
    let folder = fresh_folder(0o700);
    let marker = folder.path().join("marker");
    fs::write(&marker, "inherited").unwrap();
    let script = r#"exec 7<marker; exec "$AGENT" --memory "$@""#;
    let agent = |arguments: &[&str]| {
        let mut command = clean(Command::new("/bin/sh"), folder.path());
        command.args(["-c", script, "sh"]).args(arguments).env("AGENT", program("kms-agent"));
        output(&mut command)
    };
    let holds_marker = |pid: i32| {
        fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .any(|entry| fs::read_link(entry.unwrap().path()).is_ok_and(|target| target == marker))
    };
    let (status, stdout, stderr) = agent(&["-a", "a.sock"]);
    assert!(status.success(), "{stderr}");
    let pid = stdout.split_once("KMS_AGENT_PID=").unwrap().1.split_once(';').unwrap().0.parse().unwrap();
    let kept = holds_marker(pid);
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, PATIENCE));
    assert!(!kept, "the agent holds a descriptor that is not its own");
    let (status, stdout, stderr) =
        agent(&["sh", "-c", "ls -l /proc/$KMS_AGENT_PID/fd | grep -c marker; cat <&7"]);
    assert!(status.success(), "{stderr}");
    assert_eq!(stdout, "0\ninherited");
}

#[test]
fn a_pipe_in_place_of_the_configuration_holds_nobody_up_and_changes_nothing() {
    let agent = Agent::builder().config("limits.keys = 1\n").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    fs::remove_file(agent.config()).unwrap();
    nix::unistd::mkfifo(&agent.config(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("it says so", || agent.log().contains("it is not a file"));
    assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Limit), "what was in force still is");
    // What is not understood is told, and not all of it.
    fs::remove_file(agent.config()).unwrap();
    fs::write(agent.config(), "x".repeat(60_000)).unwrap();
    let before = agent.log().len();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("it says so", || agent.log().contains("cannot be understood"));
    assert!(agent.log().len() - before < 2_000, "{}", agent.log());
}
