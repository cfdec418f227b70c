//! The agent as a service of real service managers: installed as a user would, started by the first connection, watched, restarted,
//! stopped; and what the sandbox of its units refuses, each thing tried from inside.
//!
//! As few boots as possible: one user manager and one booted system, with many assertions each.

mod files;
mod install;
mod sandbox;
mod system;
mod user;

use std::process::Command;

use kms_tests::{
    process::{output, wait_until},
    systemd::{Lane, Manager, PROGRAMS, SOURCE},
};

const SERVICE: &str = "kms-agent.service";
const SOCKET: &str = "kms-agent.socket";

/// Runs it; it must succeed. Gives what it printed.
fn done(command: &mut Command) -> String {
    let (status, out, error) = output(command);
    assert!(status.success(), "{command:?}: {status}\n{out}{error}");
    out
}

/// `systemd/install` as it is called in a lane.
fn install(mut command: Command, words: &[&str]) -> String {
    done(command.arg(format!("{SOURCE}/install")).args(["--bin", PROGRAMS]).args(words))
}

/// What the manager says of the service.
fn properties(lane: &Lane, manager: Manager, names: [&str; 4]) -> [String; 4] {
    names.map(|name| lane.show(manager, SERVICE, name))
}

/// Waits until another process than `old` serves; gives its number.
fn next_main_pid(lane: &Lane, manager: Manager, old: i32) -> i32 {
    let mut pid = 0;
    wait_until("the service was started again", || {
        pid = lane.main_pid(manager, SERVICE);
        pid != 0 && pid != old && lane.show(manager, SERVICE, "SubState") == "running"
    });
    pid
}

/// What `kmsctl status` must show: the sandbox of the unit has left the agent all that it protects itself with.
fn is_protected(status: &str) {
    let facts: Vec<_> =
        status.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for wanted in
        ["secret-memory secretmem", "traceable no", "no-new-privileges yes", "core-limit 0", "seccomp filter"]
    {
        assert!(facts.iter().any(|fact| fact == wanted), "not {wanted}: {status}");
    }
    assert!(
        facts
            .iter()
            .any(|fact| fact.starts_with("landlock ") && fact.ends_with(|c: char| c.is_ascii_digit())),
        "{status}"
    );
}
