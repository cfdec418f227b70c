//! The socket that systemd hands over, and what only looks like one.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::Path,
    process::Command,
};

use kms_tests::{
    BOB, Wire,
    agent::fresh_folder,
    process::wait_until,
    programs::{needs_root, program, tool},
    start::{Foreground, clean, fails, is_empty, output_of},
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        AddressFamily, SockFlag, SockType, UnixAddr, bind, getsockopt, setsockopt, socket, sockopt,
    },
};

/// The agent as systemd starts it, with this as descriptor 3; `variables` are set by a shell that knows its own pid as `$$`.
fn activated(folder: &Path, given: &impl AsFd, variables: &str, arguments: &[&str]) -> Command {
    let mut command = clean(tool("sh"), folder);
    let script = format!("exec 3<&0 </dev/null; {variables} exec \"$AGENT\" --memory \"$@\"");
    command.args(["-c", &script, "sh"]).args(arguments).env("AGENT", program("kms-agent"));
    command.stdin(given.as_fd().try_clone_to_owned().unwrap());
    command
}

const RIGHT: &str = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=agent;";

#[test]
fn the_socket_of_systemd_is_served_and_stays_systemds() {
    let folder = fresh_folder(0o700);
    let path = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let file = fs::symlink_metadata(&path).unwrap();
    assert!(!getsockopt(&listener, sockopt::PassCred).unwrap());
    for round in 0..2 {
        // Whoever comes first waits in the backlog.
        let mut early = Wire::mute(&path);
        let agent = Foreground::start(&mut activated(folder.path(), &listener, RIGHT, &["-D"])).unwrap();
        assert_eq!(agent.socket, path);
        early.hello();
        assert_eq!(early.fact("pid"), agent.pid.to_string());
        let mut wire = Wire::connect(&path);
        wire.generate("a").unwrap();
        // What was set on the socket shows on our end of it, and what on the descriptor in /proc.
        assert!(getsockopt(&listener, sockopt::PassCred).unwrap(), "SO_PASSCRED");
        assert!(
            OFlag::from_bits_retain(fcntl(&listener, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
        );
        for entry in fs::read_dir(format!("/proc/{}/fd", agent.pid)).unwrap() {
            let number: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
            if number > 2 {
                let info =
                    fs::read_to_string(format!("/proc/{}/fdinfo/{number}", agent.pid)).unwrap_or_default();
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("02000000");
                let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
                assert_ne!(flags & libc::O_CLOEXEC, 0, "descriptor {number} in round {round}: {info}");
            }
        }
        agent.stop();
        let names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["agent.sock"], "no lock file, and the socket is still there");
        assert_eq!(fs::symlink_metadata(&path).unwrap().ino(), file.ino());
        setsockopt(&listener, sockopt::PassCred, &false).unwrap();
    }
}

#[test]
fn the_one_who_answers_is_ended_and_not_the_one_who_called_listen() {
    let folder = fresh_folder(0o700);
    let path = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut agent = Foreground::start(&mut activated(folder.path(), &listener, RIGHT, &["-D"])).unwrap();
    // For the kernel the peer of a client is who called listen: this process.
    let peer = getsockopt(&UnixStream::connect(&path).unwrap(), sockopt::PeerCredentials).unwrap();
    assert_eq!(peer.pid(), std::process::id().cast_signed());
    let end = |pid: i32| {
        let mut command = clean(Command::new(program("kms-agent")), folder.path());
        command.arg("-k").env("KMS_AUTH_SOCK", &path).env("KMS_AGENT_PID", pid.to_string());
        command
    };
    let stderr = fails(&mut end(peer.pid()), 1);
    assert!(stderr.contains(&format!("is served by process {}", agent.pid)), "{stderr}");
    let (status, _, stderr) = output_of(&mut end(agent.pid));
    assert!(status.success(), "{stderr}");
    agent.ends();
    assert!(path.exists());
}

#[test]
fn what_is_not_one_listening_socket_at_a_path_is_refused() {
    let folder = fresh_folder(0o700);
    let at = |name: &str| folder.path().join(name);
    let listener: OwnedFd = UnixListener::bind(at("s")).unwrap().into();
    let unix = |kind, name: &str| {
        let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(&at(name)).unwrap()).unwrap();
        fd
    };
    let (connected, _other) = UnixStream::pair().unwrap();
    let named = UnixStream::connect(at("s")).unwrap();
    let name = format!("kms-test-activated-{}", std::process::id());
    let without_file = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    let file = File::create(at("file")).unwrap();
    let given: Vec<(OwnedFd, &str, &str)> = vec![
        (
            listener.try_clone().unwrap(),
            "export LISTEN_PID=$$ LISTEN_FDS=one;",
            "LISTEN_FDS promise what is not there",
        ),
        (
            listener.try_clone().unwrap(),
            "export LISTEN_PID=$$ LISTEN_FDS=-1;",
            "LISTEN_FDS promise what is not there",
        ),
        (
            listener.try_clone().unwrap(),
            "export LISTEN_PID=$$ LISTEN_FDS=2;",
            "LISTEN_FDS promise what is not there",
        ),
        (
            listener.try_clone().unwrap(),
            "export LISTEN_PID=$$ LISTEN_FDS=4294967295;",
            "promise what is not there",
        ),
        (listener.try_clone().unwrap(), "export LISTEN_PID=agent LISTEN_FDS=1;", "promise what is not there"),
        (
            listener.try_clone().unwrap(),
            "exec 3<&-; export LISTEN_PID=$$ LISTEN_FDS=1;",
            "LISTEN_FDS promise what is not there",
        ),
        (
            listener.try_clone().unwrap(),
            "exec 4<&3; export LISTEN_PID=$$ LISTEN_FDS=2;",
            "there are 2 descriptors, and an agent has one socket",
        ),
        (file.into(), RIGHT, "the descriptor is not a socket"),
        (TcpListener::bind("127.0.0.1:0").unwrap().into(), RIGHT, "it is not a Unix socket"),
        (UnixDatagram::bind(at("datagram")).unwrap().into(), RIGHT, "it is not a stream socket"),
        (unix(SockType::SeqPacket, "packets"), RIGHT, "it is not a stream socket"),
        (unix(SockType::Stream, "bound"), RIGHT, "it does not listen"),
        (connected.into(), RIGHT, "it does not listen"),
        (named.into(), RIGHT, "it does not listen"),
        (without_file.into(), RIGHT, "it is not bound to an absolute path"),
    ];
    for (given, variables, said) in given {
        let stderr = fails(&mut activated(folder.path(), &given, variables, &["-D"]), 1);
        let said_of = "kms-agent: error: the socket from systemd: ";
        assert!(stderr.starts_with(said_of) && stderr.contains(said), "{said}: {stderr}");
    }
    let stderr = fails(&mut activated(folder.path(), &listener, RIGHT, &["-D", "-a", "t"]), 1);
    assert!(stderr.contains("there is no -a beside it"), "{stderr}");
    assert!(!at("t").exists() && at("s").exists());
    // The control: the same socket with the right words.
    Foreground::start(&mut activated(folder.path(), &listener, RIGHT, &["-D"])).unwrap().stop();
}

#[test]
fn a_socket_of_systemd_in_a_folder_of_others_is_refused() {
    needs_root();
    let folder = fresh_folder(0o755);
    for (mode, owner, said) in [
        (0o777, 0, "others can write to the folder"),
        (0o1777, 0, "others can write to the folder"),
        (0o700, BOB, "belongs to another user, uid 1002"),
    ] {
        let own = folder.path().join(format!("{mode:o}"));
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, PermissionsExt::from_mode(mode)).unwrap();
        chown(&own, Some(owner), Some(owner)).unwrap();
        let path = own.join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let stderr = fails(&mut activated(folder.path(), &listener, RIGHT, &["-D"]), 1);
        assert!(stderr.contains(said), "{stderr}");
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket(), "it is left alone");
    }
    // A way of ours through a symlink is said as it really is.
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();
    fs::set_permissions(&real, PermissionsExt::from_mode(0o700)).unwrap();
    symlink("real", folder.path().join("link")).unwrap();
    let listener = UnixListener::bind(folder.path().join("link/s")).unwrap();
    let agent = Foreground::start(&mut activated(folder.path(), &listener, RIGHT, &["-D"])).unwrap();
    assert_eq!(agent.socket, real.join("s"));
    agent.stop();
}

#[test]
fn variables_for_somebody_else_are_not_looked_at() {
    let folder = fresh_folder(0o700);
    let other = fresh_folder(0o700);
    let listener = UnixListener::bind(other.path().join("s")).unwrap();
    let holds = |pid: i32| {
        let inode = format!("socket:[{}]", nix::sys::stat::fstat(&listener).unwrap().st_ino);
        fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .any(|entry| fs::read_link(entry.unwrap().path()).is_ok_and(|target| target == Path::new(&inode)))
    };
    for forged in [
        "export LISTEN_PID=1 LISTEN_FDS=1;",
        "export LISTEN_PID=$PPID LISTEN_FDS=1;",
        "export LISTEN_FDS=1;",
        "",
    ] {
        let mut command = activated(folder.path(), &listener, forged, &["-D", "-a", "own"]);
        let agent = Foreground::start(&mut command).unwrap();
        assert_eq!(agent.socket, folder.path().join("own"), "{forged}");
        Wire::connect(&agent.socket).ping().unwrap();
        assert!(!holds(agent.pid), "{forged}");
        agent.stop();
        assert!(is_empty(folder.path()));
    }
    assert!(holds(std::process::id().cast_signed()), "the look finds it where it is");
}

#[test]
fn a_command_gets_what_systemd_gave_for_it() {
    let folder = fresh_folder(0o700);
    let path = folder.path().join("for-the-command");
    let listener = UnixListener::bind(&path).unwrap();
    let script = r#"test $LISTEN_PID = $$ && echo $LISTEN_FDS $LISTEN_FDNAMES; readlink /proc/self/fd/3 | cut -c 1-8; echo "$KMS_AUTH_SOCK""#;
    let (status, stdout, stderr) =
        output_of(&mut activated(folder.path(), &listener, RIGHT, &["sh", "-c", script]));
    assert!(status.success(), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[..2], ["1 agent", "socket:["], "{stdout}{stderr}");
    assert_ne!(lines[2], path.to_str().unwrap());
    // In the background nobody is there to be activated.
    let (status, stdout, stderr) = output_of(&mut activated(folder.path(), &listener, RIGHT, &["-a", "b"]));
    assert!(status.success(), "{stderr}");
    let (socket, pid) = kms_tests::start::variables(&stdout).unwrap();
    assert_eq!(socket, folder.path().join("b"));
    kms_tests::process::send_signal(pid, nix::sys::signal::Signal::SIGTERM);
    wait_until("both agents are gone", || {
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).eq(["for-the-command"])
    });
}

#[test]
fn the_launcher_of_systemd_starts_it_at_the_first_connection() {
    let folder = fresh_folder(0o700);
    let path = folder.path().join("agent.sock");
    let mut command = clean(tool("systemd-socket-activate"), folder.path());
    command.arg("-l").arg(&path).arg("--fdname=agent").arg(program("kms-agent")).args(["--memory", "-D"]);
    let mut child =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    wait_until("somebody listens", || UnixStream::connect(&path).is_ok());
    let mut wire = Wire::connect(&path);
    wire.generate("a").unwrap();
    assert_eq!(wire.fact("pid"), child.id().to_string());
    kms_tests::process::send_signal(child.id().cast_signed(), nix::sys::signal::Signal::SIGTERM);
    assert!(kms_tests::process::wait_for(&mut child).success());
    assert!(path.exists(), "whoever made it takes it away");
}
