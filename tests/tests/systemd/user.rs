//! The life of the agent under the manager of a user, and its sandbox there.

use std::{
    io::{IoSliceMut, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
};

use kms_protocol::{Hello, Opcode, PROTOCOL_VERSION};
use kms_tests::{
    ALICE, as_uid,
    process::{self, halt, send_signal, wait_until},
    systemd::{Lane, Manager, PROGRAMS},
    wire::frame,
};
use nix::{
    cmsg_space,
    sys::{
        signal::Signal,
        socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt},
    },
};

use crate::{SERVICE, SOCKET, done, install, is_protected, next_main_pid, properties, sandbox};

const MANAGER: Manager = Manager::User;

/// Says hello as the user does and gives the number of the process whose reply that is.
fn sender_of_hello(socket: &Path) -> i32 {
    as_uid(ALICE, || {
        let mut stream = UnixStream::connect(socket).unwrap();
        setsockopt(&stream, sockopt::PassCred, &true).unwrap();
        stream.write_all(&frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[])).unwrap();
        let mut bytes = [0; 64];
        let mut room = cmsg_space!(UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::empty()).unwrap();
        assert!(got.bytes > 0, "the connection was closed");
        let credentials = got.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials),
            _ => None,
        });
        let credentials = credentials.unwrap();
        assert_eq!(credentials.uid(), ALICE);
        credentials.pid()
    })
}

/// Whether a client is answered that does not ask for credentials itself, as few do, and speaks before there is an agent.
fn is_answered(socket: &Path) -> bool {
    as_uid(ALICE, || {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(&frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[])).unwrap();
        stream.read(&mut [0; 64]).is_ok_and(|count| count > 0)
    })
}

/// Whether another process of the user can look into this one, as a debugger would.
fn can_be_traced(lane: &Lane, pid: i32) -> bool {
    let (maps, ..) =
        process::output(lane.user_command("head").args(["-c", "1", &format!("/proc/{pid}/maps")]));
    let seized =
        done(lane.user_command(format!("{PROGRAMS}/kms-test-sandboxed")).args(["seize", &pid.to_string()]));
    assert_eq!(maps.success(), seized == "done\n", "{seized}");
    maps.success()
}

#[test]
fn a_user_enables_the_agent_once_and_it_is_there() {
    let lane = Lane::user();
    let control = |words: &[&str]| lane.control(MANAGER, words);
    let show = |property: &str| lane.show(MANAGER, SERVICE, property);
    let kmsctl = |words: &[&str]| done(lane.user_command("kmsctl").args(words));

    // Installed, and twice is once.
    let said = install(lane.user_command("sh"), &[]);
    assert!(said.contains("installed /home/alice/.local/bin/kms-agent\n"), "{said}");
    assert!(said.contains("Next: systemctl --user enable --now kms-agent.socket\n"), "{said}");
    let again = install(lane.user_command("sh"), &[]);
    assert!(again.starts_with("everything was installed already\n"), "{again}");
    assert_eq!(show("LoadState"), "loaded", "the manager was told");

    // Sessions find the agent by KMS_AUTH_SOCK.
    control(&["daemon-reload"]);
    let environment = control(&["show-environment"]);
    let line = format!("KMS_AUTH_SOCK=/run/user/{ALICE}/kms-agent/agent.sock");
    assert!(environment.lines().any(|own| own == line), "{environment}");

    // Enabled, it listens and does not run.
    control(&["enable", "--now", SOCKET]);
    // On newer kernels, what a client has sent before there is an agent says who sent it anyway; on older ones only with this.
    assert_eq!(lane.show(MANAGER, SOCKET, "PassCredentials"), "yes");
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "MainPID", "NRestarts"]),
        ["inactive", "dead", "0", "0"]
    );
    let mode = done(
        lane.root("stat")
            .args(["-c", "%a %u %F"])
            .arg(format!("/run/user/{ALICE}/kms-agent"))
            .arg(format!("/run/user/{ALICE}/kms-agent/agent.sock")),
    );
    assert_eq!(mode, format!("700 {ALICE} directory\n600 {ALICE} socket\n"));

    // The first connection starts it, and a key is made and used.
    done(lane.user_command("sh").args([
        "-euc",
        "kmsctl add first --memory && echo words | kmsctl encrypt -k first | kmsctl decrypt -k first | grep -qx words",
    ]));
    let first = lane.main_pid(MANAGER, SERVICE);
    assert_ne!(first, 0);
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "Result", "NRestarts"]),
        ["active", "running", "success", "0"]
    );
    assert_ne!(show("StatusText"), "");
    is_protected(&kmsctl(&["status"]));
    // Not the manager, although that called listen.
    // By way of the manager's files, which the user may look into; from outside the lane those of the agent are not to be had.
    let socket =
        lane.path(lane.outside(manager_pid(&lane)), &format!("/run/user/{ALICE}/kms-agent/agent.sock"));
    assert_eq!(sender_of_hello(&socket), lane.outside(first), "the reply is of the agent itself");

    // It is in no namespace of its own, whose owner its user would be.
    let space = |pid: i32| done(lane.root("readlink").arg(format!("/proc/{pid}/ns/user")));
    assert_eq!(space(first), space(manager_pid(&lane)));
    assert!(!can_be_traced(&lane, first));
    assert!(can_be_traced(&lane, manager_pid(&lane)), "the control: what does not protect itself");

    // A changed configuration is taken, a bad one leaves the old.
    let write = |text: &str| {
        let script = "printf '%s' \"$1\" >/home/alice/.config/kms-agent/config.toml";
        done(lane.user_command("sh").args(["-euc", script, "_", text]));
    };
    write("[limits]\nkeys = 1\n");
    control(&["reload", SERVICE]);
    wait_until("the journal says that it was read", || {
        lane.journal(MANAGER).contains("read the configuration again")
    });
    let (status, _, error) = process::output(lane.user_command("kmsctl").args(["add", "second", "--memory"]));
    assert!(!status.success() && error.contains("limit"), "one key at most: {error}");
    write("[limits]\nkeys = 'many'\n");
    control(&["reload", SERVICE]);
    wait_until("the journal says that it was not taken", || lane.journal(MANAGER).contains("stays in force"));
    let (status, _, error) = process::output(lane.user_command("kmsctl").args(["add", "second", "--memory"]));
    assert!(!status.success() && error.contains("limit"), "still one key at most: {error}");
    write("");
    assert_eq!(lane.main_pid(MANAGER, SERVICE), first, "a reload does not restart");
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "Result", "NRestarts"]),
        ["active", "running", "success", "0"]
    );

    // Killed, it is started again, and the same socket serves.
    let inode =
        || done(lane.root("stat").args(["-c", "%i"]).arg(format!("/run/user/{ALICE}/kms-agent/agent.sock")));
    let listening = inode();
    send_signal(lane.outside(first), Signal::SIGKILL);
    let second = next_main_pid(&lane, MANAGER, first);
    assert_eq!(show("NRestarts"), "1");
    assert!(!kmsctl(&["list"]).contains("first"), "keys in memory died with it");

    // What hangs is ended by the watchdog and started again. (30 s would be long for a test.)
    assert_eq!(show("WatchdogUSec"), "30s");
    let drop_in = "folder=~/.config/systemd/user/kms-agent.service.d && mkdir -p $folder && \
                   printf '[Service]\\nWatchdogSec=2\\n' >$folder/test.conf";
    done(lane.user_command("sh").args(["-euc", drop_in]));
    control(&["daemon-reload"]);
    control(&["restart", SERVICE]);
    let third = lane.main_pid(MANAGER, SERVICE);
    assert_ne!(third, second);
    assert_eq!(show("NRestarts"), "0", "asked for, so not counted");
    halt(lane.outside(third));
    // A client of that time is not lost: it waits in the backlog and is served by the next.
    kmsctl(&["--timeout", "60s", "ping"]);
    let fourth = next_main_pid(&lane, MANAGER, third);
    assert_eq!(show("NRestarts"), "1");
    assert!(lane.journal(MANAGER).contains("Watchdog timeout"), "{}", lane.journal(MANAGER));
    assert!(lane.journal(MANAGER).contains("Failed with result 'watchdog'"), "{}", lane.journal(MANAGER));
    kmsctl(&["ping"]);
    assert_eq!(inode(), listening, "the listening socket is the one from before");
    assert_eq!(lane.main_pid(MANAGER, SERVICE), fourth);

    // A start that fails is tried until what was wrong is repaired, and the socket stays: more often than five times in ten seconds,
    // which would be the end otherwise. (2 s would be long for a test.)
    assert_eq!(show("RestartUSec"), "2s");
    done(
        lane.user_command("sh")
            .args(["-euc", "echo RestartSec=100ms >>~/.config/systemd/user/kms-agent.service.d/test.conf"]),
    );
    control(&["daemon-reload"]);
    write("[limits]\nkeys = 'many'\n");
    control(&["--no-block", "restart", SERVICE]);
    wait_until("six starts have failed", || show("NRestarts").parse::<u32>().unwrap() >= 6);
    assert_eq!(lane.show(MANAGER, SOCKET, "ActiveState"), "active");
    write("");
    kmsctl(&["--timeout", "60s", "ping"]);
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "Result", "StatusText"]),
        ["active", "running", "success", "unlocked, 0 keys"]
    );

    // Stopped, it ends well, and the next connection starts it again.
    control(&["stop", SERVICE]);
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "Result", "ExecMainStatus", "MainPID"]),
        ["inactive", "success", "0", "0"]
    );
    assert!(is_answered(&socket));
    assert_ne!(lane.main_pid(MANAGER, SERVICE), 0);

    // The journal has the words of the agent, and nothing has failed.
    assert!(lane.journal(MANAGER).contains("kms-agent["), "{}", lane.journal(MANAGER));
    assert_eq!(control(&["--failed", "--no-legend", "--plain"]), "");

    // Removed, nothing of it is left but the drop-in, which is not of `systemd/install`.
    let said = install(lane.user_command("sh"), &["--remove"]);
    assert!(said.ends_with("done\n"), "{said}");
    assert_eq!(
        properties(&lane, MANAGER, ["LoadState", "ActiveState", "MainPID", "NRestarts"]),
        ["not-found", "inactive", "0", "0"]
    );
    let left = done(lane.root("find").args([
        "/home/alice",
        &format!("/run/user/{ALICE}/kms-agent"),
        "-not",
        "-type",
        "d",
    ]));
    let mut left: Vec<_> = left.lines().collect();
    left.sort_unstable();
    assert_eq!(
        left,
        [
            "/home/alice/.config/kms-agent/config.toml",
            "/home/alice/.config/systemd/user/kms-agent.service.d/test.conf"
        ]
    );
    assert_eq!(control(&["--failed", "--no-legend", "--plain"]), "");

    of_root(&lane);
    lane.exit();
}

/// The program is root's, and with it the whole sandbox.
fn of_root(lane: &Lane) {
    let control = |words: &[&str]| lane.control(MANAGER, words);
    let said = install(lane.root("sh"), &["--system"]);
    assert!(said.contains("\nmade the user kms-agent\n"), "{said}");
    control(&["daemon-reload"]);
    control(&["enable", "--now", SOCKET]);
    is_protected(&done(lane.user_command("kmsctl").arg("status")));
    let pid = lane.main_pid(MANAGER, SERVICE);
    assert!(!can_be_traced(lane, pid));
    // The mode of the program is all that makes the difference.
    done(lane.root("chmod").args(["755", "/usr/local/bin/kms-agent"]));
    control(&["restart", SERVICE]);
    assert!(
        can_be_traced(lane, lane.main_pid(MANAGER, SERVICE)),
        "the control: a program that its user can read"
    );
    assert!(lane.journal(MANAGER).contains("can be traced by its own uid"));
    done(lane.root("chmod").args(["711", "/usr/local/bin/kms-agent"]));
    control(&["restart", SERVICE]);

    sandbox::of_the_user(lane);

    control(&["disable", "--now", SOCKET]);
    assert_eq!(
        properties(lane, MANAGER, ["ActiveState", "Result", "ExecMainStatus", "MainPID"]),
        ["inactive", "success", "0", "0"]
    );
    assert_eq!(control(&["--failed", "--no-legend", "--plain"]), "");
    let said = install(lane.root("sh"), &["--system", "--remove"]);
    assert!(said.ends_with("done\n"), "{said}");
    let left = done(lane.root("find").args([
        "/usr/local",
        "/etc",
        "/run/systemd",
        "/var/lib",
        "/var/log",
        "-name",
        "kms-agent*",
    ]));
    assert_eq!(left, "");
    let (known, ..) = process::output(lane.root("getent").args(["passwd", "kms-agent"]));
    assert!(!known.success(), "its user is still there");
}

/// The number of the user's manager in the lane.
fn manager_pid(lane: &Lane) -> i32 {
    let out = done(lane.root("pgrep").args(["-u", &ALICE.to_string(), "-f", "systemd --user"]));
    out.lines().next().unwrap().parse().unwrap()
}
