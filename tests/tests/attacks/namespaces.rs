//! A43, A45: agents in namespaces of their own, where the kernel shows who asks in another way.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Stdio,
};

use kms_protocol::{Hello, NoFields, Opcode, PROTOCOL_VERSION};
use kms_tests::{
    ALICE, Agent, BOB, Wire,
    agent::fresh_folder,
    as_uid,
    process::{PATIENCE, ends_within, send_signal, wait_for},
    programs::{SharedCopy, needs_root, program, tool},
    sys,
    wire::frame,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::Signal,
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::getuid,
};

use super::EndsWithTest;

/// Another user, whom nobody has met yet.
const CAROL: u32 = 1003;

/// What the kernel shows of a uid that the namespace does not know.
const OVERFLOW_UID: u32 = 65534;

fn hello_and_ping() -> Vec<u8> {
    let hello = frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[]);
    [hello, frame(Opcode::Ping, 2, &NoFields {}, &[])].concat()
}

fn is_refused(socket: &Path) {
    let mut wire = Wire::mute(socket);
    // The agent may have closed it before these bytes were written.
    let _ = wire.send(&hello_and_ping());
    assert!(wire.is_closed());
}

#[test]
fn in_a_user_namespace_its_own_user_is_served_and_no_stranger_is() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).reachable_by_others().through("unshare", &["-Ur"]).start();
    for stranger in [BOB, CAROL, 0, OVERFLOW_UID] {
        as_uid(stranger, || is_refused(&agent.socket));
    }
    let refused = format!("refused a connection of another uid uid={OVERFLOW_UID}");
    assert_eq!(agent.log().matches(&refused).count(), 4, "strangers look alike, and none is served");
    // The control: Alice, who is root inside.
    let mut wire = as_uid(ALICE, || {
        let mut wire = agent.connect();
        assert_eq!(wire.fact("uid"), "0");
        wire
    });
    // Nor is a stranger's message on her connection.
    as_uid(BOB, || {
        let _ = wire.send(&frame(Opcode::Ping, 9, &NoFields {}, &[]));
        assert!(wire.is_closed());
    });
}

#[test]
fn whoever_is_the_overflow_uid_itself_serves_nobody() {
    needs_root();
    for builder in
        [Agent::builder().uid(ALICE).through("unshare", &["-U"]), Agent::builder().uid(OVERFLOW_UID)]
    {
        let ended = builder.try_start().err().expect("it would serve every stranger as itself");
        assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
        assert!(ended.log.contains("kms-agent: error: uid 65534 stands for"), "{}", ended.log);
        assert!(ended.log.contains("kms-agent: hint: "), "{}", ended.log);
        assert_eq!(ended.stdout, "");
    }
    // The control: a server of Alice's in such a namespace takes Bob for itself.
    let folder = fresh_folder(0o711);
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let bob = as_uid(BOB, || UnixStream::connect(&path).unwrap());
    assert!(sys::in_child(|| {
        sys::become_user(ALICE, ALICE, ALICE);
        unshare(CloneFlags::CLONE_NEWUSER).unwrap();
        let (peer, _) = listener.accept().unwrap();
        assert_eq!(getsockopt(&peer, PeerCredentials).unwrap().uid(), getuid().as_raw());
    }));
    drop(bob);
}

/// No decision leans on a pid: in a pid namespace the agent sees none.
#[test]
fn in_a_pid_namespace_peers_without_a_pid_are_served_by_their_uid() {
    needs_root();
    let (folder, program) = (fresh_folder(0o711), SharedCopy::of(&program("kms-agent"), 0o755));
    std::os::unix::fs::chown(folder.path(), Some(ALICE), Some(ALICE)).unwrap();
    let socket = folder.path().join("s");
    let mut unshare = tool("unshare");
    unshare.args(["-p", "-f", "--mount-proc", "--kill-child=SIGTERM"]).arg(tool("setpriv").get_program());
    unshare.args([&format!("--reuid={ALICE}"), &format!("--regid={ALICE}"), "--clear-groups"]);
    unshare.arg(program.path()).args(["--memory", "-D", "-a"]).arg(&socket);
    let log = folder.path().join("log");
    let mut child = unshare
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", folder.path())
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let lines: Vec<String> =
        BufReader::new(child.stdout.take().unwrap()).lines().take(2).map(Result::unwrap).collect();
    assert!(lines[1].starts_with("KMS_AGENT_PID=1;"), "{lines:?}");
    // The program that waits for it is its parent here; inside, it is the first process and has its end in its own hands.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let pid: i32 = children.trim().parse().unwrap();
    let _first = EndsWithTest(pid);
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    for stranger in [BOB, 0] {
        as_uid(stranger, || is_refused(&socket));
        let refused = format!("refused a connection of another uid uid={stranger} pid=0");
        assert!(fs::read_to_string(&log).unwrap().contains(&refused), "it sees no pid");
    }
    as_uid(ALICE, || Wire::connect(&socket).ping().unwrap());
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, PATIENCE));
    assert!(wait_for(&mut child).success());
}
