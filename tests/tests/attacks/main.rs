//! Attacks on the process of the shipped agent by who has an account on the machine. Each is performed on something without
//! protection too, where it must work: else it would prove nothing. `docs/threat-model.md` lists them.
//!
//! Tests that change settings of the machine take [`Machine`](machine::Machine).

mod cores;
mod ends;
mod look;
mod machine;
mod model;
mod namespaces;
mod swap;

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use kms_tests::{
    Agent, AgentBuilder,
    canary::Canaries,
    process::{ends_within, send_signal, wait_for},
    programs::SharedCopy,
    shield::{Image, hmac_states},
    wire::{NO_CONTEXT, random},
};
use nix::sys::signal::Signal;

/// The probe, where every user can run it.
fn probe() -> SharedCopy {
    SharedCopy::of(Path::new(env!("CARGO_BIN_EXE_kms-test-probe")), 0o755)
}

/// A process of somebody's that has a secret in its memory and does nothing for it. Ended when dropped.
struct Victim {
    child: Child,
    pid: i32,
    /// Where the secret is.
    address: u64,
    /// A descriptor that it has open.
    descriptor: i32,
    /// What is in its memory, and nowhere else but here.
    secret: Canaries,
    _probe: SharedCopy,
}

impl Victim {
    fn start(uid: u32, pages: usize) -> Self {
        let probe = probe();
        let mut command = probe.as_user(uid);
        // The limit of a core is that of who starts it: none here.
        let mut limited = kms_tests::programs::tool("prlimit");
        limited.arg("--core=unlimited").arg(command.get_program()).args(command.get_args());
        command = limited;
        let mut child = command
            .args(["victim", &pages.to_string()])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let secret = random::<32>().map(|byte| b'a' + byte % 26);
        let mut canaries = Canaries::new();
        canaries.add_bytes("the secret of the victim", &secret);
        child.stdin.as_mut().unwrap().write_all(&[&secret[..], b"\n"].concat()).unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let words: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        Self {
            pid: words[0].try_into().unwrap(),
            address: words[1],
            descriptor: words[2].try_into().unwrap(),
            child,
            secret: canaries,
            _probe: probe,
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if !std::thread::panicking() {
            wait_for(&mut self.child);
        }
    }
}

/// An agent that is nobody's child, or whose parent would not end it: killed when its test fails.
struct EndsWithTest(i32);

impl Drop for EndsWithTest {
    fn drop(&mut self) {
        if std::thread::panicking() && !ends_within(self.0, Duration::ZERO) {
            send_signal(self.0, Signal::SIGKILL);
        }
    }
}

/// An agent with keys that the test knows and that were just used.
struct Keyed {
    agent: Agent,
    keys: Vec<[u8; 32]>,
    ids: Vec<[u8; 16]>,
}

/// More than are kept at hand.
const KEYS: usize = 40;

impl Keyed {
    fn start(builder: AgentBuilder) -> Self {
        let agent = builder.start();
        let (mut keys, mut ids) = (Vec::new(), Vec::new());
        agent.as_owner(|| {
            let mut wire = agent.connect();
            for n in 0..KEYS {
                let key = random();
                ids.push(wire.import(&format!("k{n}"), &key).unwrap().id);
                keys.push(key);
            }
        });
        let keyed = Self { agent, keys, ids };
        keyed.use_keys();
        keyed
    }

    /// Every key on a message: what is at hand afterwards is what can be at hand.
    fn use_keys(&self) {
        self.agent.as_owner(|| {
            let mut wire = self.agent.connect();
            for n in 0..KEYS {
                let message = wire.encrypt(&format!("k{n}"), NO_CONTEXT, b"attack").unwrap();
                assert_eq!(wire.decrypt(&format!("k{n}"), NO_CONTEXT, &message).unwrap(), b"attack");
            }
        });
    }

    /// The keys, and what is as good as they: the states of their HMAC.
    fn secrets(&self) -> Canaries {
        let mut secrets = Canaries::new();
        for key in &self.keys {
            secrets.add("a key", key);
            for state in hmac_states(key) {
                secrets.add_raw("an expanded key", &state);
            }
        }
        secrets
    }
}

/// All that a process has in locked memory and root can read, in pieces.
fn locked_memory(pid: i32) -> Canaries {
    let mut pieces = Canaries::new();
    for part in Image::take(pid).parts.iter().filter(|part| part.range.has("lo")) {
        let random = |piece: &&[u8]| piece.iter().filter(|byte| **byte == 0).count() < 4;
        part.bytes.chunks_exact(32).filter(random).for_each(|piece| pieces.add_bytes("locked memory", piece));
    }
    pieces
}
