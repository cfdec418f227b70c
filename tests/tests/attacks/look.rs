//! A30, A31: looks into the process by its own uid and by another one, at every moment of its life.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
};

use kms_tests::{
    ALICE, Agent, BOB,
    agent::fresh_folder,
    as_uid,
    process::{PATIENCE, ends_within, output, ranges, send_signal, wait_until},
    programs::{SharedCopy, needs_root, program, tool},
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{EndsWithTest, Victim, probe};

/// The ways in that no test may do without.
const LEAST: usize = 35;

/// Tries every way into a process as this user; says for each what came of it.
fn attack(probe: &SharedCopy, uid: u32, pid: i32, address: u64, descriptor: i32) -> BTreeMap<String, String> {
    let mut command = probe.as_user(uid);
    command.args(["attack", &pid.to_string(), &address.to_string(), &descriptor.to_string()]);
    let (status, stdout, stderr) = output(&mut command);
    assert!(status.success(), "{stderr}");
    let mut outcomes: BTreeMap<String, String> = stdout
        .lines()
        .map(|line| line.split_once('\t').unwrap())
        .map(|(name, outcome)| (name.to_owned(), outcome.to_owned()))
        .collect();
    assert!(outcomes.len() >= LEAST, "{outcomes:?}");
    for (name, refused) in debuggers(uid, pid) {
        outcomes.insert(name.to_owned(), refused);
    }
    outcomes
}

/// As this user.
fn tool_as(uid: u32, name: &str) -> Command {
    let mut command = tool("setpriv");
    command.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"]);
    command.arg(tool(name).get_program()).current_dir("/").env("HOME", "/nonexistent");
    command
}

/// The programs that people have for it.
fn debuggers(uid: u32, pid: i32) -> [(&'static str, String); 3] {
    let number = pid.to_string();
    let refused = |said: &str| {
        let refused = said.contains("Operation not permitted") || said.contains("Permission denied");
        if refused { "EPERM".to_owned() } else { format!("neither done nor refused: {said}") }
    };
    let mut gdb = tool_as(uid, "gdb");
    let (_, stdout, stderr) =
        output(gdb.args(["-q", "-nx", "-batch", "-p", &number, "-ex", "info registers rip"]));
    let attached = stdout.lines().any(|line| line.starts_with("rip "));
    let gdb = if attached { "ok".to_owned() } else { refused(&(stdout + &stderr)) };

    let folder = fresh_folder(0o777);
    let mut gcore = tool_as(uid, "gcore");
    let (status, stdout, stderr) = output(gcore.arg("-o").arg(folder.path().join("core")).arg(&number));
    let written = folder.path().join(format!("core.{pid}")).exists();
    assert_eq!(status.success(), written, "{stdout}{stderr}");
    let gcore = if written { "ok".to_owned() } else { refused(&(stdout + &stderr)) };

    let said = folder.path().join("said");
    let mut strace = tool_as(uid, "strace");
    strace.args(["-o", "/dev/null", "-p", &number]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = strace.stderr(fs::File::create(&said).unwrap()).spawn().unwrap();
    let tracer = child.id().cast_signed();
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().any(|line| line == format!("TracerPid:\t{tracer}"))
    };
    wait_until("strace has attached or has ended", || {
        traced() || ends_within(tracer, std::time::Duration::ZERO)
    });
    let strace = if traced() {
        send_signal(tracer, Signal::SIGTERM);
        "ok".to_owned()
    } else {
        refused(&fs::read_to_string(&said).unwrap())
    };
    assert!(ends_within(tracer, PATIENCE));
    child.wait().unwrap();
    [("gdb -p", gdb), ("gcore", gcore), ("strace -p", strace)]
}

/// The agent and every process that it has started.
fn family(pid: i32) -> Vec<i32> {
    let mut family = vec![pid];
    for entry in fs::read_dir("/proc").unwrap() {
        let Ok(child) = entry.unwrap().file_name().to_string_lossy().parse() else { continue };
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent == Some(&pid.to_string()) {
            family.push(child);
        }
    }
    family
}

/// An address that can be read and written.
fn some_address(pid: i32) -> u64 {
    ranges(pid).into_iter().find(|range| range.name == "[heap]" || range.name == "[stack]").unwrap().start
}

/// Nothing of the agent, nor of a process that it has started, is open to this user or to another.
fn assert_closed(moment: &str, probe: &SharedCopy, pid: i32) {
    let family = family(pid);
    assert!(family.len() > 1, "{moment}: the monitor of agent {pid} is not there");
    for process in family {
        for uid in [ALICE, BOB] {
            let outcomes = attack(probe, uid, process, some_address(process), 0);
            let open: Vec<_> = outcomes
                .iter()
                .filter(|(_, outcome)| !["EPERM", "EACCES"].contains(&outcome.as_str()))
                .collect();
            assert!(open.is_empty(), "{moment}: uid {uid}, process {process} of agent {pid}: {open:?}");
        }
    }
}

#[test]
fn an_unprotected_process_is_open_to_its_user_in_every_one_of_these_ways() {
    needs_root();
    let probe = probe();
    for uid in [ALICE, BOB] {
        let victim = Victim::start(uid, 1);
        let outcomes = attack(&probe, uid, victim.pid, victim.address, victim.descriptor);
        let failed: Vec<_> = outcomes.iter().filter(|(_, outcome)| *outcome != "ok").collect();
        assert!(failed.is_empty(), "{failed:?}");
        // The first page of its memory, as the attacker reads it.
        let memory = as_uid(uid, || {
            let mut page = vec![0; 4096];
            let file = fs::File::open(format!("/proc/{}/mem", victim.pid)).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut page, victim.address).unwrap();
            page
        });
        assert!(!victim.secret.find(&memory).is_empty());
    }
}

#[test]
fn the_agent_is_closed_to_its_own_user_and_to_others_at_every_moment() {
    needs_root();
    let probe = probe();
    let agent = Agent::builder().uid(ALICE).start();
    assert_closed("ready", &probe, agent.pid);
    let as_alice =
        |work: &(dyn Fn(&mut kms_tests::Wire) + Sync)| as_uid(ALICE, || work(&mut agent.connect()));
    as_alice(&|wire| {
        wire.generate("a").unwrap();
        wire.encrypt("a", kms_tests::wire::NO_CONTEXT, b"x").unwrap();
    });
    assert_closed("keys in use", &probe, agent.pid);
    as_alice(&|wire| assert_eq!(wire.lock(b"passphrase"), Ok(true)));
    assert_closed("locked", &probe, agent.pid);
    as_alice(&|wire| assert_eq!(wire.unlock(b"passphrase"), Ok(true)));
    assert_closed("unlocked again", &probe, agent.pid);
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("the configuration is read again", || agent.log().contains("read the configuration again"));
    assert_closed("reloaded", &probe, agent.pid);
}

#[test]
fn the_agent_is_closed_in_the_background_and_behind_a_command() {
    needs_root();
    let (probe, agent) = (probe(), SharedCopy::of(&program("kms-agent"), 0o755));
    let folder = fresh_folder(0o700);
    std::os::unix::fs::chown(folder.path(), Some(ALICE), Some(ALICE)).unwrap();
    let as_alice = |arguments: &[&str]| {
        let mut command = agent.as_user(ALICE);
        command.arg("--memory").args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", folder.path()).env("TMPDIR", folder.path());
        command
    };
    let (status, stdout, stderr) = output(&mut as_alice(&[]));
    assert!(status.success(), "{stderr}");
    let pid = stdout.split_once("KMS_AGENT_PID=").unwrap().1.split_once(';').unwrap().0.parse().unwrap();
    let _background = EndsWithTest(pid);
    assert_closed("in the background", &probe, pid);
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, PATIENCE));

    let mut command = as_alice(&["sh", "-c", "echo $KMS_AGENT_PID; read line"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let pid = line.trim().parse().unwrap();
    assert_closed("behind a command", &probe, pid);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(ends_within(pid, PATIENCE));
}

/// What the kernel leaves to the same uid whatever a process does: to end it, to stop it, to lower its limits. None of that gives a key.
#[test]
fn the_same_user_may_lower_limits_and_send_signals_but_not_raise_the_limit_of_cores() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).start();
    let prlimit = |uid, limit: &str| {
        output(tool_as(uid, "prlimit").args(["--pid", &agent.pid.to_string(), limit])).0.success()
    };
    assert!(prlimit(ALICE, "--nofile=512:512"), "the same uid: no protection of a process forbids it");
    assert!(!prlimit(ALICE, "--core=unlimited") && !prlimit(ALICE, "--core=1"), "a core stays forbidden");
    assert!(!prlimit(BOB, "--nofile=512:512"));
    as_uid(BOB, || assert_eq!(kill(Pid::from_raw(agent.pid), Signal::SIGTERM), Err(Errno::EPERM)));
    as_uid(ALICE, || assert_eq!(kill(Pid::from_raw(agent.pid), None), Ok(())));
}

/// The owner of a user namespace may do everything to what runs in it, and the kernel goes by the namespace in which a program was
/// started. So in one that the user made (`unshare -U`, `PrivateUsers=yes` of a user's unit) the agent is open to that user. That is
/// said in `docs/threat-model.md`, and the cure too: a program that its user cannot read is held to the namespace of its owner.
#[test]
fn in_a_namespace_of_the_user_s_own_making_the_agent_is_open_to_that_user_alone() {
    needs_root();
    let probe = probe();
    let in_namespace = || Agent::builder().uid(ALICE).through("unshare", &["-Ur"]);
    let agent = in_namespace().start();
    let outcomes = attack(&probe, ALICE, agent.pid, some_address(agent.pid), 0);
    let refused: Vec<_> = outcomes.iter().filter(|(_, outcome)| *outcome != "ok").collect();
    assert!(
        refused.is_empty(),
        "the kernel protects more than it did: say so in docs/threat-model.md: {refused:?}"
    );
    let outcomes = attack(&probe, BOB, agent.pid, some_address(agent.pid), 0);
    assert!(outcomes.values().all(|outcome| outcome == "EPERM" || outcome == "EACCES"), "{outcomes:?}");
    let agent = in_namespace().program_mode(0o711).start();
    assert_closed("a program that its user cannot read", &probe, agent.pid);
}
