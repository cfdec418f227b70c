//! The life of the system's agent under a booted systemd, its sandbox there, and an agent of a user who only lingers.

use kms_tests::{
    ALICE,
    process::{self, halt, send_signal, wait_until},
    systemd::{Lane, Manager},
};
use nix::sys::signal::Signal;

use crate::{SERVICE, SOCKET, done, install, is_protected, next_main_pid, properties, sandbox};

const MANAGER: Manager = Manager::System;

#[test]
fn a_system_serves_its_own_user_and_each_user_has_an_agent_of_his_own() {
    let lane = Lane::system();
    let control = |words: &[&str]| lane.control(MANAGER, words);
    let show = |property: &str| lane.show(MANAGER, SERVICE, property);

    let said = install(lane.root("sh"), &["--system"]);
    assert!(said.contains("\nmade the user kms-agent\n"), "{said}");
    assert!(said.contains("Next: systemctl enable --now kms-agent.socket\n"), "{said}");
    let again = install(lane.root("sh"), &["--system"]);
    assert!(again.starts_with("everything was installed already\n"), "{again}");
    let uid: u32 = done(lane.root("id").args(["-u", "kms-agent"])).trim().parse().unwrap();
    assert_ne!(uid, 0);
    let kmsctl = |words: &[&str]| done(lane.as_uid(uid, "kmsctl").args(words));

    control(&["enable", "--now", SOCKET]);
    // On newer kernels, what a client has sent before there is an agent says who sent it anyway; on older ones only with this.
    assert_eq!(lane.show(MANAGER, SOCKET, "PassCredentials"), "yes");
    assert_eq!(control(&["is-enabled", SOCKET]), "enabled\n");
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "MainPID", "NRestarts"]),
        ["inactive", "dead", "0", "0"]
    );
    let stat = |paths: &[&str]| done(lane.root("stat").args(["-c", "%a %U %G %F"]).args(paths));
    assert_eq!(
        stat(&["/run/kms-agent", "/run/kms-agent/agent.sock"]),
        "700 kms-agent kms-agent directory\n600 kms-agent kms-agent socket\n"
    );

    // Its own user reaches it, by the place of the socket; nobody else does, root included.
    kmsctl(&["add", "first", "--memory"]);
    let first = lane.main_pid(MANAGER, SERVICE);
    assert_ne!(first, 0);
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "SubState", "Result", "NRestarts"]),
        ["active", "running", "success", "0"]
    );
    assert_ne!(show("StatusText"), "");
    let status = kmsctl(&["status"]);
    is_protected(&status);
    assert_eq!(done(lane.root("ps").args(["-o", "user=", "-p", &first.to_string()])).trim(), "kms-agent");
    for who in [0, ALICE] {
        let (status, out, error) = process::output(lane.as_uid(who, "kmsctl").args([
            "--socket",
            "/run/kms-agent/agent.sock",
            "list",
        ]));
        assert_eq!((status.code(), out.as_str()), (Some(2), ""), "uid {who}: {error}");
    }
    assert_eq!(
        stat(&["/var/lib/kms-agent", "/var/log/kms-agent", "/etc/kms-agent"]),
        "700 kms-agent kms-agent directory\n700 kms-agent kms-agent directory\n755 root root directory\n"
    );

    // The configuration of the system.
    done(lane.root("sh").args(["-euc", "printf '[limits]\\nkeys = 1\\n' >/etc/kms-agent/config.toml"]));
    control(&["reload", SERVICE]);
    let read = || {
        let journal = done(lane.root("journalctl").args(["--no-pager", "-q", "-u", SERVICE]));
        journal.contains("read the configuration again")
    };
    wait_until("the journal says that it was read", read);
    let (status, _, error) = process::output(lane.as_uid(uid, "kmsctl").args(["add", "second", "--memory"]));
    assert!(!status.success() && error.contains("limit"), "one key at most: {error}");
    assert_eq!(lane.main_pid(MANAGER, SERVICE), first, "a reload does not restart");

    // Killed, and hanging.
    send_signal(lane.outside(first), Signal::SIGKILL);
    let second = next_main_pid(&lane, MANAGER, first);
    assert_eq!(show("NRestarts"), "1");
    let drop_in = "folder=/etc/systemd/system/kms-agent.service.d && mkdir -p $folder && \
                   printf '[Service]\\nWatchdogSec=2\\n' >$folder/test.conf";
    done(lane.root("sh").args(["-euc", drop_in]));
    control(&["daemon-reload"]);
    control(&["restart", SERVICE]);
    let third = lane.main_pid(MANAGER, SERVICE);
    assert_ne!(third, second);
    halt(lane.outside(third));
    kmsctl(&["--timeout", "60s", "ping"]);
    next_main_pid(&lane, MANAGER, third);
    assert_eq!(show("NRestarts"), "1");
    let journal = done(lane.root("journalctl").args(["--no-pager", "-q", "-u", SERVICE]));
    assert!(journal.contains("Failed with result 'watchdog'"), "{journal}");

    control(&["stop", SERVICE]);
    assert_eq!(
        properties(&lane, MANAGER, ["ActiveState", "Result", "ExecMainStatus", "MainPID"]),
        ["inactive", "success", "0", "0"]
    );
    kmsctl(&["ping"]);

    sandbox::of_the_system(&lane);

    // A user who is not logged in, but lingers.
    lane.control(Manager::User, &["enable", "--now", SOCKET]);
    let status = done(lane.user_command("kmsctl").arg("status"));
    is_protected(&status);
    assert_ne!(lane.main_pid(Manager::User, SERVICE), 0);
    its_session_is_locked(&lane);
    lane.control(Manager::User, &["disable", "--now", SOCKET]);
    assert_eq!(
        properties(&lane, Manager::User, ["ActiveState", "Result", "ExecMainStatus", "MainPID"]),
        ["inactive", "success", "0", "0"]
    );

    assert_eq!(control(&["--failed", "--no-legend", "--plain"]), "");
    assert_eq!(lane.control(Manager::User, &["--failed", "--no-legend", "--plain"]), "");

    let said = install(lane.root("sh"), &["--system", "--remove"]);
    assert!(said.ends_with("done\n"), "{said}");
    assert_eq!(
        properties(&lane, MANAGER, ["LoadState", "ActiveState", "MainPID", "NRestarts"]),
        ["not-found", "inactive", "0", "0"]
    );
    let left = done(lane.root("find").args([
        "/usr/local",
        "/etc",
        "/run/systemd",
        "/var/lib",
        "/var/log",
        "-xdev",
        "-name",
        "kms-agent*",
    ]));
    let mut left: Vec<_> = left.lines().collect();
    left.sort_unstable();
    assert_eq!(
        left,
        ["/etc/kms-agent", "/etc/systemd/system/kms-agent.service.d"],
        "more than an administrator wrote"
    );
    lane.power_off();
}

/// From inside the sandbox of the user's unit the agent hears the real logind.
fn its_session_is_locked(lane: &Lane) {
    let kmsctl = |words: &[&str]| done(lane.user_command("kmsctl").args(words));
    let write = "mkdir -p -m 700 ~/.config/kms-agent && echo \"lock_on = ['session']\" >~/.config/kms-agent/config.toml";
    done(lane.user_command("sh").args(["-euc", write]));
    lane.control(Manager::User, &["restart", SERVICE]);
    kmsctl(&["add", "own", "--memory"]);
    done(lane.root("systemd-run").args([
        "--quiet",
        "--unit=kms-test-session",
        "--uid=alice",
        "--property=PAMName=login",
        "sleep",
        "infinity",
    ]));
    wait_until("she has a session", || {
        done(lane.root("loginctl").args(["list-sessions", "--no-legend"])).contains(" alice")
    });
    assert!(kmsctl(&["list"]).contains("own"), "the control: it is there before");
    done(lane.root("loginctl").arg("lock-sessions"));
    wait_until("the keys are gone", || kmsctl(&["status"]).contains("session-locked"));
    assert!(!kmsctl(&["list"]).contains("own"));
}
