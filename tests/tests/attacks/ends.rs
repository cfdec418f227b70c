//! A35, A47: who stops the agent, and who leaves while the agent judges who it is.

use std::{
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use kms_protocol::{Hello, KeyRef, Opcode, PROTOCOL_VERSION, Status, constraint};
use kms_tests::{
    ALICE, Agent, BOB, Wire, as_uid,
    process::{descriptors, send_signal, wait_until},
    programs::needs_root,
    wire::{NO_CONTEXT, Operations, frame, use_frame},
};
use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap().into()
}

fn state(pid: i32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1[..1].to_owned()
}

#[test]
fn a_key_that_expires_while_the_agent_is_stopped_is_refused_at_the_first_request() {
    const LIFE: u64 = 2;
    let agent = Agent::start();
    let mut wire = agent.connect();
    let start = since_boot();
    for (name, life) in [("short", LIFE), ("long", 3600)] {
        wire.add(name, None, &[(constraint::LIFETIME, life)]).unwrap();
    }
    let end = since_boot() + Duration::from_secs(LIFE);
    let messages = ["short", "long"].map(|name| wire.encrypt(name, NO_CONTEXT, b"x").unwrap());
    let key = KeyRef::Name;
    assert_eq!(wire.decrypt("short", NO_CONTEXT, &messages[0]).unwrap(), b"x", "the control: in its time");
    send_signal(agent.pid, Signal::SIGSTOP);
    wait_until("it has stopped", || state(agent.pid) == "T");
    assert!(since_boot() < start + Duration::from_secs(LIFE), "the machine was too slow to ask in time");
    // Waits in the socket, so that it is the first thing that the agent reads.
    wire.send(&use_frame(Opcode::Decrypt, 71, key("short"), NO_CONTEXT, &messages[0])).unwrap();
    wire.send(&use_frame(Opcode::Decrypt, 72, key("long"), NO_CONTEXT, &messages[1])).unwrap();
    wait_until("its life is over", || since_boot() > end);
    send_signal(agent.pid, Signal::SIGCONT);
    let refused = wire.receive().unwrap();
    assert_eq!((refused.request_id, refused.status), (71, Status::NotFound));
    let served = wire.receive().unwrap();
    assert_eq!((served.request_id, served.status), (72, Status::Ok), "the control: the other key");
    assert_eq!(wire.list().unwrap().len(), 1);
}

fn hello() -> Vec<u8> {
    frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[])
}

/// They are gone before the agent has even seen that they came.
#[test]
fn a_peer_that_is_gone_when_it_is_judged_is_judged_all_the_same() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).reachable_by_others().start();
    let mut wire = as_uid(ALICE, || agent.connect());
    let before = descriptors(agent.pid);
    for _ in 0..10 {
        send_signal(agent.pid, Signal::SIGSTOP);
        wait_until("it has stopped", || state(agent.pid) == "T");
        // Fewer than the backlog holds.
        for uid in [ALICE, BOB] {
            as_uid(uid, || {
                for _ in 0..30 {
                    let mut left = Wire::mute(&agent.socket);
                    left.send(&hello()).unwrap();
                }
            });
        }
        send_signal(agent.pid, Signal::SIGCONT);
        as_uid(ALICE, || wire.ping().unwrap());
    }
    wait_until("they are gone", || {
        as_uid(ALICE, || wire.fact("connections") == "1") && descriptors(agent.pid) == before
    });
    let refused = agent.log().matches("refused a connection of another uid uid=1002").count();
    assert_eq!(
        (refused, agent.log().matches("refused").count()),
        (300, 300),
        "each of Bob's, and none of Alice's"
    );
}

#[test]
fn five_seconds_of_peers_that_leave_in_the_middle_of_everything_do_no_harm() {
    let agent = Agent::start();
    let mut other = agent.connect();
    other.ping().unwrap();
    let before = descriptors(agent.pid);
    let end = Instant::now() + Duration::from_secs(5);
    let left: usize = std::thread::scope(|scope| {
        let leave = || {
            let mut left = 0;
            while Instant::now() < end {
                let mut wire = Wire::over(UnixStream::connect(&agent.socket).unwrap());
                let _ = match left % 4 {
                    0 => Ok(()),
                    1 => wire.send(&hello()[..7]),
                    2 => wire.send(&hello()),
                    _ => wire.send(&hello()).and_then(|()| wire.stream.shutdown(std::net::Shutdown::Read)),
                };
                left += 1;
            }
            left
        };
        let two = [scope.spawn(leave), scope.spawn(leave)];
        two.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(left > 1_000, "{left}");
    wait_until("they are gone", || other.fact("connections") == "1" && descriptors(agent.pid) == before);
    agent.connect().ping().unwrap();
}
