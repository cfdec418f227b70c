//! Locks that cannot ask for a passphrase: SIGUSR1 and idleness make an agent without a keystore forget its keys.

use std::{fs, time::Duration};

use kms_protocol::{LockState, Opcode, Status};
use kms_tests::{
    Agent,
    process::{send_signal, wait_until},
    wire::NO_CONTEXT,
};
use nix::sys::signal::Signal;

#[test]
fn sigusr1_forgets_every_key_and_the_status_says_so() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    assert!(!wire.status().facts.iter().any(|fact| fact.name.starts_with("forgotten")));
    wire.generate("a").unwrap();
    wire.generate("b").unwrap();
    let sealed = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    let (stream, _) = wire.remote_new("b").unwrap();
    send_signal(agent.pid, Signal::SIGUSR1);
    wait_until("the keys are forgotten", || wire.fact("keys") == "0");
    assert_eq!(wire.status().state, LockState::Unlocked);
    assert_eq!(
        (wire.fact("forgotten-keys").as_str(), wire.fact("forgotten-because").as_str()),
        ("2", "signal")
    );
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &sealed), Err(Status::NotFound));
    assert_eq!(wire.remote_encrypt(stream, b"x").err(), Some(Status::NotFound), "its streams are gone too");
    assert_eq!(wire.list().unwrap(), []);
    // It goes on, under a new pre-key.
    wire.generate("a").unwrap();
    wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    assert_eq!(wire.fact("keys"), "1");
    assert!(agent.log().contains("forgot all keys keys=2 reason=signal"), "{}", agent.log());
}

#[test]
fn a_locked_agent_keeps_what_it_has_sealed() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    assert_eq!(wire.lock(b"passphrase"), Ok(true));
    send_signal(agent.pid, Signal::SIGUSR1);
    let told = |fact: &kms_protocol::Fact| fact.name == "forgotten-keys" && fact.value == "0";
    wait_until("it was told", || wire.status().facts.iter().any(told));
    assert_eq!(wire.status().state, LockState::Locked);
    assert_eq!(wire.unlock(b"passphrase"), Ok(true));
    wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
}

#[test]
fn an_unlock_that_a_lock_has_overtaken_opens_nothing() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let mut other = agent.connect();
    wire.generate("a").unwrap();
    assert_eq!(wire.lock(b"passphrase"), Ok(true));
    let request = kms_tests::wire::frame(Opcode::Unlock, 77, &kms_protocol::NoFields {}, b"passphrase");
    wire.send(&request).unwrap();
    // While one is worked on no other is taken up.
    wait_until("it works on the passphrase", || other.lock(b"another") == Err(Status::Busy));
    send_signal(agent.pid, Signal::SIGUSR1);
    let reply = wire.receive().unwrap();
    assert_eq!(reply.status, Status::Locked);
    assert_eq!(wire.status().state, LockState::Locked);
    // Nothing is lost: the next one opens.
    assert_eq!(wire.unlock(b"passphrase"), Ok(true));
    wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
}

#[test]
fn an_idle_agent_forgets_and_one_that_is_used_does_not() {
    let agent = Agent::builder().config("idle_lock = \"2s\"").start();
    let mut wire = agent.connect();
    assert_eq!((wire.fact("idle-lock").as_str(), wire.fact("lock-on").as_str()), ("2", "nothing"));
    wire.generate("a").unwrap();
    // Used again and again, for longer than the time.
    let began = std::time::Instant::now();
    wait_until("longer than the idle time has passed", || {
        wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
        began.elapsed() > Duration::from_secs(3)
    });
    // Looked at again and again, which is no use.
    wait_until("the key is forgotten", || wire.list().unwrap().is_empty());
    assert_eq!(wire.fact("forgotten-because"), "idle");
    assert_eq!(wire.fact("forgotten-keys"), "1");
    // An empty agent has nothing more to forget.
    let told = wire.fact("forgotten-unix");
    let began = std::time::Instant::now();
    wait_until("once more that time", || began.elapsed() > Duration::from_secs(3));
    assert_eq!(wire.fact("forgotten-unix"), told);

    // The configuration is read again without it.
    fs::write(agent.config(), "").unwrap();
    send_signal(agent.pid, Signal::SIGHUP);
    wait_until("the configuration was read again", || agent.log().contains("configuration again"));
    wire.generate("a").unwrap();
    let began = std::time::Instant::now();
    wait_until("once more that time", || began.elapsed() > Duration::from_secs(3));
    assert_eq!(wire.fact("keys"), "1");
}
