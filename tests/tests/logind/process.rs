//! The process that watches: what it has, what it does not have, and that neither outlives the other.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::{fd::AsFd, unix::fs::MetadataExt},
    process::{Command, Stdio},
    time::Duration,
};

use kms_tests::{
    ALICE, Agent,
    agent::fresh_folder,
    process::{
        PATIENCE, children, ends_within, processor_time, send_signal, status_number, wait_for, wait_until,
    },
    programs::{needs_root, program, tool},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::{
    bus::{Bus, Logind},
    keys, on,
};

/// The monitor of an agent.
fn monitor(agent: i32) -> i32 {
    let mut found = Vec::new();
    wait_until("there is a monitor", || {
        found = children(agent, "kms-monitor");
        !found.is_empty()
    });
    assert_eq!(found.len(), 1);
    found[0]
}

/// Where the descriptors of a process lead to.
fn descriptors(pid: i32) -> Vec<String> {
    let mut targets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    targets.sort();
    targets
}

/// Waits until it has given up what it has of its parent, which it does after its name has changed.
fn wait_until_apart(monitor: i32) {
    wait_until("the monitor has nothing of the agent", || {
        fs::read_link(format!("/proc/{monitor}/cwd")).is_ok_and(|folder| folder.as_os_str() == "/")
            && descriptors(monitor).len() == 4
    });
}

#[test]
fn the_monitor_has_nothing_of_the_agent_and_can_be_looked_into_by_nobody() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).start();
    let monitor = monitor(agent.pid);
    wait_until_apart(monitor);
    let targets = descriptors(monitor);
    assert_eq!(targets[..3], ["/dev/null"; 3]);
    assert!(targets[3].starts_with("socket:"), "{targets:?}");
    assert_eq!(status_number(monitor, "NoNewPrivs"), 1);
    assert_eq!(status_number(monitor, "Threads"), 1);
    assert_eq!(status_number(monitor, "VmLck"), 0, "it was there before any secret");
    // A process that is dumpable is its user's in /proc, as the control is; any other is root's.
    let owner = |pid: i32| fs::metadata(format!("/proc/{pid}/fd")).unwrap().uid();
    let mut control = tool("setpriv");
    control.args([&format!("--reuid={ALICE}"), "--clear-groups", "sh", "-c", "read line"]);
    let mut control = control.stdin(Stdio::piped()).spawn().unwrap();
    wait_until("the control is its user's", || owner(control.id().cast_signed()) == ALICE);
    drop(control.stdin.take());
    wait_for(&mut control);
    assert_eq!(owner(monitor), 0);
    let limits = fs::read_to_string(format!("/proc/{monitor}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[test]
fn signals_to_the_whole_group_leave_the_monitor_to_the_agent() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    for lock_on in ["[]", "['sleep']"] {
        let agent = on(&bus, lock_on).start();
        let monitor = monitor(agent.pid);
        wait_until_apart_or_watching(monitor, lock_on);
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1] {
            send_signal(monitor, signal);
        }
        agent.connect().ping().unwrap();
        let ended = agent.stop();
        assert!(!ended.log.contains("monitor"), "{}", ended.log);
        assert!(ends_within(monitor, PATIENCE));
    }
    logind.wait_until_let_go(0);
}

fn wait_until_apart_or_watching(monitor: i32, lock_on: &str) {
    // What watches has more descriptors, and had to be apart before.
    if lock_on == "[]" {
        wait_until_apart(monitor);
    }
}

#[test]
fn with_nothing_to_watch_the_monitor_takes_no_time() {
    let agent = Agent::start();
    let monitor = monitor(agent.pid);
    wait_until_apart(monitor);
    let switches = |pid| status_number(pid, "voluntary_ctxt_switches");
    let (before, time) = (switches(monitor), processor_time(monitor));
    let mut wire = agent.connect();
    wait_until("the agent has worked for a while", || {
        wire.generate("a").unwrap();
        wire.remove("a").unwrap();
        processor_time(agent.pid) > Duration::from_millis(200)
    });
    assert_eq!((switches(monitor), processor_time(monitor)), (before, time));
}

#[test]
fn the_end_of_the_agent_is_the_end_of_the_monitor() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    for lock_on in ["[]", "['session', 'sleep']"] {
        let mut agent = on(&bus, lock_on).start();
        let monitor = monitor(agent.pid);
        agent.kill();
        assert!(ends_within(monitor, PATIENCE), "lock_on = {lock_on}");
    }
    logind.wait_until_let_go(0);
}

#[test]
fn an_agent_without_its_monitor_ends_where_it_relies_on_it() {
    let bus = Bus::start();
    let _logind = Logind::on(&bus);
    let agent = on(&bus, "['session']").start();
    let socket = agent.socket.clone();
    agent.connect().generate("a").unwrap();
    send_signal(monitor(agent.pid), Signal::SIGKILL);
    let ended = agent.wait();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    assert!(ended.log.contains("the monitor has ended: nothing would lock on session"), "{}", ended.log);
    assert!(!socket.exists());
}

#[test]
fn an_agent_without_its_monitor_goes_on_where_it_does_not() {
    let bus = Bus::start();
    let _logind = Logind::on(&bus);
    let agent = on(&bus, "[]").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    send_signal(monitor(agent.pid), Signal::SIGKILL);
    wait_until("the agent says so", || agent.log().contains("the monitor has ended"));
    wait_until("nothing is left of it, not even a zombie", || children(agent.pid, "kms-monitor").is_empty());
    // Its end is told once, and wakes nobody again.
    let time = processor_time(agent.pid);
    assert_eq!(keys(&mut wire), 1);
    fs::write(agent.config(), "log = \"info\"\nlock_on = ['session']\n").unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("what cannot be had is told", || agent.log().contains("the process that watches is gone"));
    assert_eq!(keys(&mut wire), 1);
    assert!(processor_time(agent.pid) - time < Duration::from_millis(100));
}

#[test]
fn an_agent_that_would_not_hear_of_a_lock_any_more_ends() {
    let mut bus = Bus::start();
    let _logind = Logind::on(&bus);
    let agent = on(&bus, "['sleep']").start();
    let socket = agent.socket.clone();
    agent.connect().generate("a").unwrap();
    bus.kill();
    let ended = agent.wait();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    assert!(ended.log.contains("the monitor has ended: nothing would lock on sleep"), "{}", ended.log);
    assert!(!socket.exists());
}

#[test]
fn an_agent_whose_logind_stays_away_ends() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "['session']").start();
    drop(logind);
    let ended = agent.wait();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    assert!(ended.log.contains("the monitor has ended: nothing would lock on session"), "{}", ended.log);
}

/// Whoever waits for the end of what the agent was given, as `$(…)` and ssh do, does not wait for the monitor.
#[test]
fn what_the_caller_has_open_does_not_stay_open_with_the_monitor() {
    let folder = fresh_folder(0o700);
    let socket = folder.path().join("s");
    let mut child = Command::new(program("kms-agent"))
        .args(["--memory", "-a", socket.to_str().unwrap()])
        .env_clear()
        .env("HOME", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    while !line.contains("KMS_AGENT_PID=") {
        assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "{line}");
    }
    let pid = line.split_once("KMS_AGENT_PID=").unwrap().1.split_once(';').unwrap().0.parse().unwrap();
    let monitor = monitor(pid);
    // Both come to their end, though agent and monitor live.
    let mut stderr = child.stderr.take().unwrap();
    for pipe in [stdout.get_ref().as_fd(), stderr.as_fd()] {
        let ended =
            poll(&mut [PollFd::new(pipe, PollFlags::empty())], PollTimeout::try_from(PATIENCE).unwrap());
        assert_eq!(ended, Ok(1), "somebody holds it open");
    }
    let mut errors = String::new();
    stderr.read_to_string(&mut errors).unwrap();
    assert_eq!(errors, "");
    assert!(wait_for(&mut child).success());
    assert!(!ends_within(monitor, Duration::ZERO));
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, PATIENCE) && ends_within(monitor, PATIENCE));
}
