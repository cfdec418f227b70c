//! When keys are forgotten, and before what.

use std::{collections::HashMap, fs, path::PathBuf};

use kms_protocol::Status;
use kms_tests::{
    Agent, BOB,
    process::{send_signal, wait_until},
    wire::NO_CONTEXT,
};
use nix::{sys::signal::Signal, unistd::getuid};
use zbus::Variant;

use crate::{
    bus::{Bus, LOGIND, Logind, MANAGER, MANAGER_PATH, PROPERTIES, SESSION, Somebody},
    keys, on,
};

/// A uid that every Debian has a name for: a message bus lets in nobody else.
const DAEMON: u32 = 1;

const BOTH: &str = "['session', 'sleep']";

#[test]
fn the_lock_of_a_session_of_this_user_forgets_every_key() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "['session']").start();
    assert_eq!(logind.inhibitors(), 0, "sleep is not delayed unasked");
    let mut wire = agent.connect();
    // A session that came after the start counts as well.
    let session = logind.session("_31", getuid().as_raw());
    for round in 0..2 {
        wire.generate("a").unwrap();
        wire.generate("b").unwrap();
        let (stream, _) = wire.remote_new("a").unwrap();
        let message = wire.encrypt("b", NO_CONTEXT, b"text").unwrap();
        logind.lock(&session);
        wait_until("the keys are gone", || wire.list().unwrap().is_empty());
        assert_eq!(wire.decrypt("b", NO_CONTEXT, &message), Err(Status::NotFound));
        assert_eq!(
            wire.remote_encrypt(stream, b"chunk"),
            Err(Status::NotFound),
            "round {round}: a stream goes on"
        );
    }
    assert!(agent.log().contains("forgot all keys"), "{}", agent.log());
}

#[test]
fn the_agent_of_another_user_goes_by_the_sessions_of_that_user() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, BOTH).uid(DAEMON).start();
    let (ours, roots) = (logind.session("own", DAEMON), logind.session("root", 0));
    agent.as_owner(|| {
        let mut wire = agent.connect();
        wire.generate("a").unwrap();
        logind.lock(&roots);
        logind.settle();
        assert_eq!(keys(&mut wire), 1);
        logind.lock(&ours);
        wait_until("the keys are gone", || wire.list().unwrap().is_empty());
    });
}

#[test]
fn what_is_no_lock_of_a_session_of_this_user_forgets_nothing() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "['session']").start();
    let (own, others) = (logind.session("own", getuid().as_raw()), logind.session("others", BOB));
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    logind.lock(&others);
    logind.locked_hint(&others, true);
    logind.locked_hint_unnamed(&others, true);
    logind.lock(&format!("{MANAGER_PATH}/session/ended"));
    logind.signal(&own, SESSION, "Unlock", &());
    logind.locked_hint(&own, false);
    logind.locked_hint_unnamed(&own, false);
    let changed = || HashMap::from([("LockedHint", Variant::from(true))]);
    logind.signal(&own, PROPERTIES, "PropertiesChanged", &(MANAGER, changed(), Vec::<&str>::new()));
    logind.signal(&own, PROPERTIES, "PropertiesChanged", &"another shape");
    // It is not asked for here.
    logind.prepare_for_sleep(true);
    logind.settle();
    assert_eq!(keys(&mut wire), 1, "{}", agent.log());
    // The control: all of that was heard.
    logind.lock(&own);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());
}

#[test]
fn a_session_that_says_that_it_is_locked_forgets_every_key() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "['session']").start();
    let session = logind.session("own", getuid().as_raw());
    let mut wire = agent.connect();
    for tell in [Logind::locked_hint, Logind::locked_hint_unnamed] {
        wire.generate("a").unwrap();
        tell(&logind, &session, true);
        wait_until("the keys are gone", || wire.list().unwrap().is_empty());
    }
}

/// All that would make the agent forget if logind said it, said by somebody else to everybody and to the agent alone.
#[test]
fn nobody_but_logind_is_believed() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, BOTH).start();
    let session = logind.session("own", getuid().as_raw());
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    logind.settle();
    let stranger = Somebody::on(&bus);
    let caller = logind.caller();
    let questions = logind.questions(&session);
    for to in [None, Some(&caller)] {
        stranger.signal(to, &session, SESSION, "Lock", &());
        let changed = HashMap::from([("LockedHint", Variant::from(true))]);
        stranger.signal(
            to,
            &session,
            PROPERTIES,
            "PropertiesChanged",
            &(SESSION, changed, Vec::<&str>::new()),
        );
        for start in [false, true] {
            stranger.signal(to, MANAGER_PATH, MANAGER, "PrepareForSleep", &start);
        }
        // As the bus itself would: logind is somebody else now, or nobody.
        for new in [":1.999", ""] {
            let owners = (LOGIND, ":1.0", new);
            let bus = "org.freedesktop.DBus";
            stranger.signal(to, "/org/freedesktop/DBus", bus, "NameOwnerChanged", &owners);
        }
    }
    logind.settle();
    assert_eq!(keys(&mut wire), 1, "{}", agent.log());
    assert_eq!(logind.questions(&session), questions, "not even looked at");
    assert_eq!(logind.inhibitors(), 1, "nor taken for a resume, or for another logind");
    assert!(logind.holds(0));
    // The control: it is the sender that made the difference.
    logind.lock(&session);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());
}

#[test]
fn sleep_waits_until_the_keys_are_gone() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, BOTH).start();
    assert_eq!(logind.inhibitors(), 1);
    assert_eq!(logind.inhibitor_words(0), ["sleep", "kms-agent", "wipes keys from memory", "delay"]);
    let mut wire = agent.connect();
    for round in 0..3 {
        wire.generate("a").unwrap();
        assert!(logind.holds(round));
        // An agent that cannot answer holds up the sleep, for as long as logind lets it.
        send_signal(agent.pid, Signal::SIGSTOP);
        logind.prepare_for_sleep(true);
        logind.settle();
        assert!(logind.holds(round), "let go before the agent knew");
        send_signal(agent.pid, Signal::SIGCONT);
        logind.wait_until_let_go(round);
        assert_eq!(wire.list().unwrap(), [], "sleep begins now");
        logind.prepare_for_sleep(false);
        wait_until("there is an inhibitor for the next sleep", || logind.inhibitors() == round + 2);
    }
}

#[test]
fn an_answer_that_comes_after_the_sleep_costs_the_next_one_nothing() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, BOTH).start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    send_signal(agent.pid, Signal::SIGSTOP);
    // logind waits for five seconds, and goes on.
    logind.prepare_for_sleep(true);
    logind.prepare_for_sleep(false);
    logind.settle();
    assert!(logind.holds(0));
    send_signal(agent.pid, Signal::SIGCONT);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());
    logind.settle();
    assert!(logind.holds(0), "it is for the next sleep");
    wire.generate("a").unwrap();
    // Two at a time: the first answer is not the second.
    send_signal(agent.pid, Signal::SIGSTOP);
    for start in [true, false, true] {
        logind.prepare_for_sleep(start);
    }
    logind.settle();
    assert!(logind.holds(0));
    send_signal(agent.pid, Signal::SIGCONT);
    logind.wait_until_let_go(0);
    assert_eq!(wire.list().unwrap(), []);
    assert_eq!(logind.inhibitors(), 1);
}

#[test]
fn only_what_is_asked_for_is_watched() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "['sleep']").start();
    let session = logind.session("own", getuid().as_raw());
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    logind.lock(&session);
    logind.locked_hint(&session, true);
    // In order: the sleep comes after these.
    send_signal(agent.pid, Signal::SIGSTOP);
    logind.prepare_for_sleep(true);
    send_signal(agent.pid, Signal::SIGCONT);
    logind.wait_until_let_go(0);
    assert_eq!(agent.log().matches("forgot all keys").count(), 1, "{}", agent.log());
    assert_eq!(logind.questions(&session), 0);
}

/// Puts another `lock_on` into the configuration, and waits until the agent has said so about it.
fn set(agent: &Agent, lock_on: &str, says: &str) {
    let before = agent.log().matches(says).count();
    fs::write(agent.config(), format!("log = \"info\"\nlock_on = {lock_on}\n")).unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until(says, || agent.log().matches(says).count() > before);
}

#[test]
fn what_is_locked_on_changes_with_the_configuration() {
    let bus = Bus::start();
    let logind = Logind::on(&bus);
    let agent = on(&bus, "[]").start();
    let session = logind.session("own", getuid().as_raw());
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    logind.lock(&session);
    set(&agent, "['session']", "on=session");
    assert_eq!(keys(&mut wire), 1, "what was locked before is not locked now");
    assert_eq!(logind.inhibitors(), 0);

    set(&agent, BOTH, "on=session and sleep");
    assert_eq!(logind.inhibitors(), 1);
    assert_eq!(wire.fact("lock-on"), "session and sleep");
    logind.lock(&session);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());

    set(&agent, "['session']", "on=session");
    logind.wait_until_let_go(0);
    wire.generate("a").unwrap();
    logind.prepare_for_sleep(true);
    logind.settle();
    assert_eq!(keys(&mut wire), 1);
    logind.prepare_for_sleep(false);

    // What cannot be had leaves what was: the session.
    logind.grant(false);
    set(&agent, BOTH, "what is locked on stays as it was");
    logind.lock(&session);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());
    logind.grant(true);

    wire.generate("a").unwrap();
    set(&agent, "[]", "on=nothing");
    let questions = logind.questions(&session);
    logind.lock(&session);
    // There is nobody left to ask; a bad file changes nothing either.
    set(&agent, "['lid']", "the old configuration stays in force");
    assert_eq!((keys(&mut wire), logind.questions(&session)), (1, questions));
    set(&agent, "['sleep']", "on=sleep");
    assert_eq!(logind.inhibitors(), 2);
    assert!(logind.holds(1));
}

#[test]
fn a_set_that_cannot_be_had_later_leaves_the_agent_as_it_is() {
    let mut bus = Bus::start();
    let agent = on(&bus, "[]").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    for _ in 0..2 {
        set(&agent, "['session']", "logind does not answer on the system bus");
    }
    bus.kill();
    set(&agent, "['session']", "the system bus cannot be reached");
    assert_eq!(keys(&mut wire), 1);
}

#[test]
fn a_logind_that_is_restarted_is_believed_again() {
    let bus = Bus::start();
    let agent;
    let mut wire;
    {
        let first = Logind::on(&bus);
        agent = on(&bus, BOTH).start();
        wire = agent.connect();
        assert!(first.holds(0));
    }
    wire.generate("a").unwrap();
    let second = Logind::on(&bus);
    wait_until("the new one has been asked for an inhibitor", || second.inhibitors() == 1);
    assert_eq!(keys(&mut wire), 1);
    let session = second.session("own", getuid().as_raw());
    second.lock(&session);
    wait_until("the keys are gone", || wire.list().unwrap().is_empty());
    wire.generate("a").unwrap();
    second.prepare_for_sleep(true);
    second.wait_until_let_go(0);
    assert_eq!(wire.list().unwrap(), []);
}

/// A start that must fail because nothing would lock the keys: its log.
fn refused(bus_address: &str, lock_on: &str) -> String {
    let builder = Agent::builder().environment("DBUS_SYSTEM_BUS_ADDRESS", bus_address);
    let ended = builder.config(&format!("lock_on = {lock_on}\n")).try_start().err().expect("no agent");
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(ended.stdout, "");
    let needs = if ended.log.contains("no inhibitor") { "polkit" } else { "D-Bus and systemd-logind" };
    let hint = ended.log.lines().find(|line| line.starts_with("kms-agent: hint: "));
    assert!(hint.is_some_and(|hint| hint.contains(needs) && hint.contains("lock_on")), "{}", ended.log);
    ended.log
}

#[test]
fn where_nothing_would_lock_the_keys_there_is_no_agent() {
    let nowhere = PathBuf::from("/nonexistent/bus");
    let log = refused(&format!("unix:path={}", nowhere.display()), "['session']");
    assert!(log.contains("cannot lock on session: the system bus cannot be reached"), "{log}");
    assert!(
        refused("nonsense", "['sleep']").contains("cannot lock on sleep: the system bus cannot be reached")
    );
    let bus = Bus::start();
    let log = refused(&bus.address(), BOTH);
    assert!(
        log.contains("cannot lock on session and sleep: logind does not answer on the system bus"),
        "{log}"
    );
    let logind = Logind::on(&bus);
    logind.grant(false);
    let log = refused(&bus.address(), "['sleep']");
    assert!(log.contains("cannot lock on sleep: logind grants no inhibitor that delays sleep"), "{log}");
    // The controls: without what cannot be had there is one, and with it too.
    drop(on(&bus, "['session']").start());
    logind.grant(true);
    drop(on(&bus, BOTH).start());
}
