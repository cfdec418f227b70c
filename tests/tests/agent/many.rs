//! As many keys as issue and product promise, in the least locked memory.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use kms_protocol::{KeyRef, Opcode};
use kms_tests::{
    ALICE, Agent, Wire,
    process::status_number,
    programs::needs_root,
    wire::{NO_CONTEXT, Operations, add_frame, pipeline, random, use_frame},
};

fn median(wire: &mut Wire, requests: &[Vec<u8>]) -> Duration {
    let mut times: Vec<Duration> = requests
        .iter()
        .map(|request| {
            let begin = Instant::now();
            wire.ask(request).ok().unwrap();
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn a_hundred_thousand_keys_fit_under_the_usual_lock_limit_and_in_64_mib() {
    needs_root();
    const KEYS: u32 = 100_000;
    let agent = Agent::builder().uid(ALICE).memory_lock(8 << 20).start();
    agent.as_owner(|| {
        let mut wire = agent.connect();
        let names: Vec<String> = (0..KEYS).map(|n| format!("key/{n}")).collect();
        let encrypt = |n: usize| use_frame(Opcode::Encrypt, 1, KeyRef::Name(&names[n]), NO_CONTEXT, b"x");
        let adds: Vec<_> = (0..).zip(&names).map(|(id, name)| add_frame(id, random(), name, None)).collect();
        for reply in pipeline(&mut wire, &adds[..10]) {
            reply.ok().unwrap();
        }
        let few: Vec<_> = (0..2_000).map(|n| encrypt(n % 10)).collect();
        let with_ten = median(&mut wire, &few);
        for reply in pipeline(&mut wire, &adds[10..]) {
            reply.ok().unwrap();
        }
        // Far apart, so that none is at hand.
        let many: Vec<_> = (0..2_000).map(|n| encrypt(n * 47 % KEYS as usize)).collect();
        let with_all = median(&mut wire, &many);
        println!("median of an encrypt: {with_ten:?} with ten keys, {with_all:?} with {KEYS}");

        // Each is usable: one sealed and opened message of each, in batches.
        for part in names.chunks(2_000) {
            let sealed: Vec<_> = part
                .iter()
                .map(|name| use_frame(Opcode::Encrypt, 1, KeyRef::Name(name), NO_CONTEXT, name.as_bytes()))
                .collect();
            let opened: Vec<_> = wire
                .batch(&sealed)
                .unwrap()
                .into_iter()
                .zip(part)
                .map(|(reply, name)| {
                    use_frame(
                        Opcode::Decrypt,
                        1,
                        KeyRef::Name(name),
                        NO_CONTEXT,
                        &reply.ok().unwrap().payload,
                    )
                })
                .collect();
            for (reply, name) in wire.batch(&opened).unwrap().into_iter().zip(part) {
                assert_eq!(reply.ok().unwrap().payload, name.as_bytes());
            }
        }
        let rows = wire.list().unwrap();
        let listed: HashSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!((rows.len(), listed.len()), (names.len(), names.len()));
        assert!(rows.iter().all(|row| row.uses >= 2));
        assert_eq!((wire.value("keys"), wire.value("versions")), (KEYS.into(), KEYS.into()));
    });
    let (resident, locked) = (status_number(agent.pid, "VmHWM"), status_number(agent.pid, "VmLck"));
    println!("{resident} KiB resident at most, {locked} KiB locked");
    assert!(resident < 64 * 1024, "{resident} KiB");
    assert!(locked < 2 * 1024, "keys do not lie in locked memory, only their shield: {locked} KiB");
    agent.as_owner(|| assert_eq!(agent.connect().remove_all(), Ok(KEYS.into())));
}
