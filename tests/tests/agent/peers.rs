//! Who is at the other end: other users, root, inherited and passed sockets, setuid programs, descriptors.

use std::{
    fs,
    io::IoSlice,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
};

use kms_protocol::{FRAME_MAX, Frame, Hello, NoFields, Opcode, PROTOCOL_VERSION, Status};
use kms_tests::{
    ALICE, Agent, BOB, Wire, as_uid,
    process::{self, Strace, descriptors, wait_until},
    programs::{SharedCopy, needs_root, tool},
    wire::frame,
};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
    unistd::geteuid,
};

const ROOT: u32 = 0;

fn hello_and_ping() -> Vec<u8> {
    let hello = frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[]);
    [hello, frame(Opcode::Ping, 2, &NoFields {}, &[])].concat()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The peer program, where every user can run it.
fn peer_program(mode: u32) -> SharedCopy {
    SharedCopy::of(Path::new(env!("CARGO_BIN_EXE_kms-test-peer")), mode)
}

/// What the peer program said: real and effective uid, and the reply.
fn said(command: &mut Command) -> (String, String) {
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let (uids, reply) = text.split_once('\n').unwrap();
    (uids.to_owned(), reply.trim_end().to_owned())
}

/// Connects as the calling thread's user and says hello: nothing may come back.
fn is_refused(socket: &Path) {
    let mut wire = Wire::mute(socket);
    // The agent may have closed it before these bytes were written.
    let _ = wire.send(&hello_and_ping());
    assert!(wire.is_closed());
}

#[test]
fn another_user_and_root_are_refused_without_a_byte() {
    needs_root();
    for (owner, strangers) in [(ALICE, [ROOT, BOB]), (ROOT, [ALICE, BOB])] {
        let builder = Agent::builder().reachable_by_others();
        let agent = if owner == ROOT { builder.start() } else { builder.uid(owner).start() };
        assert_eq!(fs::metadata(&agent.socket).unwrap().permissions().mode() & 0o777, 0o666);
        for stranger in strangers {
            as_uid(stranger, || {
                assert_eq!(geteuid().as_raw(), stranger);
                for _ in 0..10 {
                    is_refused(&agent.socket);
                }
            });
            assert!(agent.log().contains(&format!("refused a connection of another uid uid={stranger}")));
        }
        // The control: the same bytes from its own user, through the same modes.
        agent.as_owner(|| {
            let mut wire = agent.connect();
            wire.ping().unwrap();
            assert_eq!(wire.fact("connections"), "1", "the refused ones are gone");
        });
    }
}

#[test]
fn a_connection_made_by_one_user_and_used_by_another_is_closed() {
    needs_root();
    let agent = Agent::builder().reachable_by_others().start();
    let program = peer_program(0o755);
    for (user, greeted) in [(BOB, false), (BOB, true), (ROOT, false), (ROOT, true)] {
        // Connected, and perhaps welcomed, as root; then inherited by a process of this user.
        let wire = if greeted { agent.connect() } else { agent.mute() };
        let bytes = if greeted { frame(Opcode::Ping, 2, &NoFields {}, &[]) } else { hello_and_ping() };
        let mut command = program.as_user(user);
        command.args(["inherited", &hex(&bytes)]).stdin(Stdio::from(OwnedFd::from(wire.stream)));
        let (uids, reply) = said(&mut command);
        assert_eq!(uids, format!("{user} {user}"));
        // The control: another process of the same uid is served.
        assert_eq!(reply.is_empty(), user != ROOT, "{reply}");
    }
    assert!(agent.log().contains("closed a connection: a message was not its peer's own"));
    // The other way round: Bob's connection, refused at accept, is not healed by bytes of the owner.
    let stream = as_uid(BOB, || UnixStream::connect(&agent.socket).unwrap());
    let mut wire = Wire::over(stream);
    let _ = wire.send(&hello_and_ping());
    assert!(wire.is_closed());
}

#[test]
fn a_sender_that_changes_in_the_middle_of_a_frame_is_noticed() {
    needs_root();
    let agent = Agent::builder().reachable_by_others().start();
    let mut wire = agent.connect();
    let ping = frame(Opcode::Ping, 2, &NoFields {}, &[]);
    wire.send(&ping[..7]).unwrap();
    as_uid(BOB, || {
        let _ = wire.send(&ping[7..]);
        assert!(wire.is_closed());
    });
}

#[test]
fn a_setuid_program_is_no_deputy() {
    needs_root();
    let agent = Agent::builder().reachable_by_others().start();
    let setuid = peer_program(0o4755);
    let bytes = hex(&hello_and_ping());
    let socket = agent.socket.to_str().unwrap();
    let (uids, reply) = said(setuid.as_user(ALICE).args(["connect", socket, &bytes]));
    assert_eq!(uids, format!("{ALICE} {ROOT}"), "the setuid bit works here (is the folder mounted nosuid?)");
    assert_eq!(reply, "", "effective root, but really Alice");
    // The controls: root itself is served through the same program; Alice as herself is refused at accept.
    let (uids, reply) = said(setuid.as_user(ROOT).args(["connect", socket, &bytes]));
    assert_eq!(uids, "0 0");
    let reply: Vec<u8> =
        (0..reply.len()).step_by(2).map(|at| u8::from_str_radix(&reply[at..at + 2], 16).unwrap()).collect();
    let welcome = Frame::parse(&reply, FRAME_MAX).unwrap().unwrap();
    assert_eq!(welcome.head.code, Status::Ok.code());
    let plain = peer_program(0o755);
    let (uids, reply) = said(plain.as_user(ALICE).args(["connect", socket, &bytes]));
    assert_eq!((uids, reply), (format!("{ALICE} {ALICE}"), String::new()));
}

#[test]
fn a_message_of_a_setuid_tool_on_the_attackers_own_socket_is_no_request() {
    needs_root();
    // Alice's connection to Alice's agent; a setuid-root program writes to it: not Alice, so closed.
    let agent = Agent::builder().uid(ALICE).reachable_by_others().start();
    let wire = as_uid(ALICE, || agent.connect());
    let program = peer_program(0o755);
    let ping = hex(&frame(Opcode::Ping, 2, &NoFields {}, &[]));
    let mut command = program.as_user(ROOT);
    command.args(["inherited", &ping]).stdin(Stdio::from(OwnedFd::from(wire.stream)));
    assert_eq!(said(&mut command).1, "");
}

/// Sends bytes with descriptors.
fn send_with(wire: &Wire, bytes: &[u8], descriptors: &[RawFd]) -> nix::Result<usize> {
    let parts = [IoSlice::new(bytes)];
    let passed = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(wire.stream.as_raw_fd(), &parts, &passed, MsgFlags::MSG_NOSIGNAL, None)
}

#[test]
fn descriptors_are_not_taken() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.ping().unwrap();
    let before = descriptors(agent.pid);
    let file = fs::File::open("/dev/null").unwrap();
    let ping = frame(Opcode::Ping, 2, &NoFields {}, &[]);
    for count in [1, 2, 253] {
        let passed = vec![file.as_raw_fd(); count];
        // Before the agent can have said that it wants none: it meets them in the first message.
        let mut early = agent.mute();
        match send_with(&early, &hello_and_ping(), &passed) {
            Ok(_) => assert!(early.is_closed()),
            Err(error) => assert_eq!(error, Errno::EPERM),
        }
        // Afterwards the kernel refuses them for it, where it can.
        let mut late = agent.connect();
        match send_with(&late, &ping, &passed) {
            Ok(_) => assert!(late.is_closed()),
            Err(error) => {
                assert_eq!(error, Errno::EPERM);
                late.ping().unwrap();
            }
        }
    }
    drop(file);
    wait_until("no descriptor stays", || descriptors(agent.pid) == before);
    assert_eq!(other.fact("connections"), "1");
}

#[test]
fn descriptors_are_not_taken_where_the_kernel_cannot_refuse_them() {
    needs_root();
    let agent = Agent::start();
    let mut other = agent.connect();
    other.ping().unwrap();
    let before = descriptors(agent.pid);
    // Each connection makes two such calls, of which the second asks the kernel to refuse descriptors: it seems to succeed.
    let strace =
        Strace::attach(agent.pid, &["-e", "trace=setsockopt", "-e", "inject=setsockopt:retval=0:when=2+2"]);
    let file = fs::File::open("/dev/null").unwrap();
    let ping = frame(Opcode::Ping, 2, &NoFields {}, &[]);
    for count in [1, 253, 1, 253, 253, 253] {
        let mut wire = agent.connect();
        send_with(&wire, &ping, &vec![file.as_raw_fd(); count]).expect("the kernel takes them here");
        assert!(wire.is_closed());
    }
    drop(strace);
    wait_until("no descriptor stays", || descriptors(agent.pid) == before);
    assert!(agent.log().contains("closed a connection: a message was not its peer's own"));
}

#[test]
fn a_flood_of_descriptors_leaves_none_behind() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.ping().unwrap();
    let before = descriptors(agent.pid);
    let file = fs::File::open("/dev/null").unwrap();
    let passed = vec![file.as_raw_fd(); 253];
    let mut tried = 0;
    while tried < 1_000_000 {
        let wire = agent.mute();
        wire.stream.set_nonblocking(true).unwrap();
        for _ in 0..20 {
            tried += passed.len();
            if send_with(&wire, b"x", &passed).is_err() {
                break;
            }
        }
        other.ping().unwrap();
    }
    wait_until("no descriptor stays", || descriptors(agent.pid) == before);
}

#[test]
fn whatever_the_kernel_does_not_tell_about_a_peer_is_a_no() {
    needs_root();
    let agent = Agent::start();
    let mut before = agent.connect();
    for inject in [
        "inject=getsockopt:error=ENOTCONN",
        "inject=getsockopt:error=EINVAL",
        "inject=setsockopt:error=EINVAL",
        "inject=setsockopt:error=ENOMEM",
    ] {
        let call = inject.split_once('=').unwrap().1.split_once(':').unwrap().0;
        let strace = Strace::attach(agent.pid, &["-e", &format!("trace={call}"), "-e", inject]);
        for _ in 0..5 {
            is_refused(&agent.socket);
        }
        before.ping().unwrap();
        drop(strace);
        // The control: the same peer without the fault.
        agent.connect().ping().unwrap();
    }
    // Every other call fails: half of the connections, and the right half.
    let strace = Strace::attach(
        agent.pid,
        &["-e", "trace=getsockopt", "-e", "inject=getsockopt:error=ENOTCONN:when=1+2"],
    );
    for _ in 0..5 {
        is_refused(&agent.socket);
        agent.connect().ping().unwrap();
    }
    drop(strace);
}

#[test]
fn a_message_without_credentials_is_a_no() {
    needs_root();
    let agent = Agent::start();
    // SO_PASSCRED seems to be set, on the listener (the first such call of all) and on what it accepts.
    let stripped =
        Agent::builder().strace(&["-e", "trace=setsockopt", "-e", "inject=setsockopt:retval=0"]).start();
    let mut wire = stripped.mute();
    let _ = wire.send(&hello_and_ping());
    assert!(wire.is_closed());
    // It would not answer at its end either.
    let mut stripped = stripped;
    stripped.kill();
    agent.connect().ping().unwrap();
}

#[test]
fn a_peer_in_a_user_namespace_is_who_it_is_outside() {
    needs_root();
    let agent = Agent::builder().reachable_by_others().start();
    let program = peer_program(0o755);
    let socket = agent.socket.to_str().unwrap();
    // Root inside, Alice outside.
    let mut command = tool("setpriv");
    command
        .args([&format!("--reuid={ALICE}"), &format!("--regid={ALICE}"), "--clear-groups"])
        .args(["unshare", "-Ur"])
        .arg(program.path())
        .args(["connect", socket, &hex(&hello_and_ping())])
        .current_dir("/");
    let (uids, reply) = said(&mut command);
    assert_eq!((uids.as_str(), reply.as_str()), ("0 0", ""));
    assert!(agent.log().contains(&format!("refused a connection of another uid uid={ALICE}")));
}

#[test]
fn connections_that_come_and_go_at_once_do_no_harm() {
    let agent = Agent::start();
    let mut other = agent.connect();
    let before = descriptors(agent.pid);
    for _ in 0..20_000 {
        drop(UnixStream::connect(&agent.socket).unwrap());
    }
    wait_until("they are gone", || other.fact("connections") == "1" && descriptors(agent.pid) == before);
}

/// F14: no descriptor is left. Who is there is served, nobody spins, and all is well again when there are some.
#[test]
fn without_descriptors_existing_peers_are_served_and_nothing_spins() {
    let agent = Agent::start();
    let mut peers: Vec<Wire> = (0..2).map(|_| agent.connect()).collect();
    let set_limit = |soft: u64| {
        let limit = format!("--nofile={soft}:1024");
        let status = tool("prlimit").args(["--pid", &agent.pid.to_string(), &limit]).status().unwrap();
        assert!(status.success());
    };
    set_limit(16);
    let mut waiting: Vec<UnixStream> = Vec::new();
    wait_until("there is no descriptor left", || {
        waiting.push(UnixStream::connect(&agent.socket).unwrap());
        agent.log().contains("cannot accept a connection")
    });
    // A second of what would be a busy loop, with a client waiting in the backlog all the time.
    let start = process::processor_time(agent.pid);
    assert!(!process::ends_within(agent.pid, std::time::Duration::from_secs(1)));
    let used = process::processor_time(agent.pid).saturating_sub(start);
    assert!(used.as_millis() <= 50, "{used:?} of processor time in a second");
    let lines = agent.log().lines().count();
    assert!(lines < 100, "{lines} lines of log");
    for wire in &mut peers {
        wire.ping().unwrap();
    }
    set_limit(1024);
    let mut late = Wire::over(waiting.pop().unwrap());
    late.hello();
    late.ping().unwrap();
}
