//! Secret memory: that it is locked, wherever the agent runs; what happens where it cannot be; and that no secret is told.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use kms_protocol::{KeyAndContext, KeyRef, NoFields, Opcode, Status};
use kms_tests::{
    ALICE, Agent, Wire,
    agent::fresh_folder,
    canary::Canaries,
    process::{
        Range, Strace, ends_within, output, ranges, send_signal, stack_pointers, status_number, wait_until,
    },
    programs::{needs_root, program, tool},
    wire::{NO_CONTEXT, add_frame, frame, pipeline, random},
};
use nix::sys::signal::Signal;

/// Bytes of the pre-key, and of both buffers of the server.
const LEAST_LOCKED_KIB: u64 = 16 + 64 + 64;

/// Every locked range is out of dumps and of forked children, and they are what the kernel counts. The stacks of the threads that work
/// are among them.
fn assert_locked(pid: i32) {
    let stacks = stack_pointers(pid);
    let mut names: Vec<&str> = stacks.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["agent", "derivation"], "every thread but the first, which only waits");
    for (name, pointer) in &stacks {
        let ranges = ranges(pid);
        let range = ranges.iter().find(|range| (range.start..range.end).contains(pointer)).unwrap();
        assert!(range.has("lo"), "the stack of {name}: {range:?}");
    }
    let locked = status_number(pid, "VmLck");
    assert!(locked >= LEAST_LOCKED_KIB, "VmLck is {locked} KiB");
    let mut sum = 0;
    let mut pre_key = 0;
    // Secretmem is never swapped out, whether the kernel marks it as locked or not, as 6.1 does.
    let is_secretmem = |range: &Range| range.name.contains("secretmem");
    for range in ranges(pid).iter().filter(|range| range.has("lo") || is_secretmem(range)) {
        assert!(range.has("dd") && range.has("dc"), "{range:?}");
        sum += (range.end - range.start) / 1024;
        if is_secretmem(range) && range.permissions.starts_with("rw") {
            pre_key += range.end - range.start;
        }
    }
    assert!(sum >= LEAST_LOCKED_KIB, "{sum} KiB are marked as locked");
    assert_eq!(pre_key, 16 * 1024, "the pre-key lies in secretmem, where this kernel has it");
}

/// One key.
const CONFIG: &str = "limits.keys = 1\n";

/// Has an agent that was started with [`CONFIG`] read another configuration, and waits until that is in force.
fn reload(pid: i32, config: &Path, wire: &mut Wire) {
    wire.generate("a").unwrap();
    assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Limit));
    fs::write(config, "limits.keys = 2\n").unwrap();
    send_signal(pid, Signal::SIGHUP);
    wait_until("the configuration is in force", || wire.generate("b").is_ok());
}

#[test]
fn memory_is_locked_in_the_foreground() {
    needs_root();
    for builder in [Agent::builder(), Agent::builder().uid(ALICE)] {
        let agent = builder.config(CONFIG).start();
        assert_locked(agent.pid);
        std::os::unix::fs::chown(agent.config(), Some(agent.uid()), None).unwrap();
        agent.as_owner(|| {
            let mut wire = agent.connect();
            assert_eq!(wire.fact("secret-memory"), "secretmem");
            reload(agent.pid, &agent.config(), &mut wire);
        });
        assert_locked(agent.pid);
    }
}

/// The environment of an agent that a shell starts.
fn clean(command: &mut Command, folder: &Path) {
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", folder)
        .env("TMPDIR", folder);
}

#[test]
fn memory_is_locked_in_the_background_too() {
    let folder = fresh_folder(0o700);
    let config = folder.path().join("config");
    fs::write(&config, CONFIG).unwrap();
    let mut command = Command::new(program("kms-agent"));
    clean(command.args(["--memory", "--config"]).arg(&config), folder.path());
    let (status, stdout, stderr) = output(&mut command);
    assert!(status.success(), "{stderr}");
    let pid = stdout.split_once("KMS_AGENT_PID=").unwrap().1.split_once(';').unwrap().0.parse().unwrap();
    assert_locked(pid);
    let socket = stdout.split_once("KMS_AUTH_SOCK=").unwrap().1.split_once(';').unwrap().0;
    reload(pid, &config, &mut Wire::connect(Path::new(socket)));
    assert_locked(pid);
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, kms_tests::process::PATIENCE));
    fs::remove_file(&config).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "its folder is gone");
}

#[test]
fn memory_is_locked_behind_a_command() {
    let folder = fresh_folder(0o700);
    let config = folder.path().join("config");
    fs::write(&config, CONFIG).unwrap();
    let mut command = Command::new(program("kms-agent"));
    // The command waits for its stdin to end.
    let script = "echo $KMS_AGENT_PID $KMS_AUTH_SOCK; read line";
    clean(command.args(["--memory", "--config"]).arg(&config).args(["sh", "-c", script]), folder.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
        .unwrap();
    let (pid, socket) = line.trim().split_once(' ').unwrap();
    let pid = pid.parse().unwrap();
    assert_locked(pid);
    reload(pid, &config, &mut Wire::connect(Path::new(socket)));
    assert_locked(pid);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(ends_within(pid, kms_tests::process::PATIENCE));
}

#[test]
fn without_a_lock_limit_nothing_is_served() {
    needs_root();
    for bytes in [0, 16 * 1024, 64 * 1024] {
        for config in ["", "secret_memory = \"mlock\"\n", "secret_memory = \"secretmem\"\n"] {
            let ended = Agent::builder()
                .uid(ALICE)
                .memory_lock(bytes)
                .config(config)
                .try_start()
                .err()
                .unwrap_or_else(|| panic!("started with {bytes} bytes of lock limit and {config:?}"));
            assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
            assert!(ended.log.contains("RLIMIT_MEMLOCK"), "{}", ended.log);
            assert!(ended.log.contains("kms-agent: error: ") && ended.log.contains("kms-agent: hint: "));
            assert_eq!(ended.stdout, "", "nothing that a shell would evaluate");
        }
    }
    // The control: who accepts swap says so, is served, and reads it in the status.
    let agent = Agent::builder().uid(ALICE).memory_lock(0).config("secret_memory = \"preferred\"\n").start();
    assert_eq!(status_number(agent.pid, "VmLck"), 0);
    agent.as_owner(|| {
        let mut wire = agent.connect();
        assert_eq!(wire.fact("secret-memory"), "unlocked");
        wire.generate("a").unwrap();
        wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    });
}

const NO_SECRETMEM: [&str; 4] = ["-e", "trace=memfd_secret", "-e", "inject=memfd_secret:error=ENOSYS"];

#[test]
fn a_kernel_without_secretmem_gets_mlock_and_the_status_says_so() {
    needs_root();
    for uid in [0, ALICE] {
        let mut builder = Agent::builder().strace(&NO_SECRETMEM);
        if uid != 0 {
            builder = builder.uid(uid);
        }
        let agent = builder.start();
        assert!(status_number(agent.pid, "VmLck") >= LEAST_LOCKED_KIB);
        assert!(ranges(agent.pid).iter().all(|range| !range.name.contains("secretmem")));
        agent.as_owner(|| {
            let mut wire = agent.connect();
            assert_eq!(wire.fact("secret-memory"), "mlock");
            wire.generate("a").unwrap();
            // An unlock takes a new region, within the sandbox.
            assert_eq!(wire.lock(b"passphrase"), Ok(true));
            assert_eq!(wire.unlock(b"passphrase"), Ok(true));
            assert_eq!(wire.fact("secret-memory"), "mlock");
            wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
        });
    }
    let ended = Agent::builder()
        .strace(&NO_SECRETMEM)
        .config("secret_memory = \"secretmem\"\n")
        .try_start()
        .err()
        .expect("secretmem was asked for and is not to be had");
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.log.contains("memfd_secret") && ended.log.contains("secretmem.enable=1"), "{}", ended.log);
}

#[test]
fn a_lock_that_fails_at_any_call_stops_the_start() {
    needs_root();
    // From the first lock of the start on, from the second, and so on: no buffer is quietly left in ordinary memory.
    for when in 1..=4 {
        let inject = format!("inject=mlock:error=ENOMEM:when={when}+");
        let started = Agent::builder()
            .strace(&["-e", "trace=mlock", "-e", &inject])
            .config("secret_memory = \"mlock\"\n")
            .try_start();
        let ended = started.err().unwrap_or_else(|| panic!("started without lock {when}"));
        assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
        assert!(ended.log.contains("mlock failed"), "{}", ended.log);
    }
}

/// A key at hand lies in a locked page; who finds none is asked to come again.
#[test]
fn a_use_that_finds_no_locked_memory_is_busy() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).memory_lock(8 << 20).start();
    // The soft one alone: it can be raised again.
    let limit = |bytes: u64| {
        let limit = format!("--memlock={bytes}:");
        let status = tool("prlimit").args(["--pid", &agent.pid.to_string(), &limit]).status().unwrap();
        assert!(status.success());
    };
    agent.as_owner(|| {
        let mut wire = agent.connect();
        let cool = status_number(agent.pid, "VmLck");
        wire.generate("a").unwrap();
        wait_until("nothing is at hand", || status_number(agent.pid, "VmLck") == cool);
        limit(1);
        let fields = KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
        let busy = wire.request(Opcode::Encrypt, &fields, b"x");
        assert_eq!(busy.status, Status::Busy);
        assert!(busy.retry_after_ms() > 0);
        limit(8 << 20);
        wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    });
}

#[test]
fn ten_thousand_keys_fit_under_the_usual_lock_limit() {
    needs_root();
    const KEYS: u32 = 10_000;
    let agent = Agent::builder().uid(ALICE).memory_lock(8 << 20).start();
    agent.as_owner(|| {
        let mut wire = agent.connect();
        let names: Vec<String> = (0..KEYS).map(|n| format!("key/{n}")).collect();
        let adds: Vec<_> = (0..).zip(&names).map(|(id, name)| add_frame(id, random(), name, None)).collect();
        for reply in pipeline(&mut wire, &adds) {
            reply.ok().unwrap();
        }
        let fields = |name| KeyAndContext { key: KeyRef::Name(name), context: NO_CONTEXT };
        let encrypts: Vec<_> = (0..)
            .zip(&names)
            .map(|(id, name)| frame(Opcode::Encrypt, id, &fields(name), name.as_bytes()))
            .collect();
        let decrypts: Vec<_> = pipeline(&mut wire, &encrypts)
            .into_iter()
            .zip(&names)
            .map(|(reply, name)| {
                frame(Opcode::Decrypt, reply.request_id, &fields(name), &reply.ok().unwrap().payload)
            })
            .collect();
        for (reply, name) in pipeline(&mut wire, &decrypts).into_iter().zip(&names) {
            assert_eq!(reply.ok().unwrap().payload, name.as_bytes());
        }
        let rows = wire.list().unwrap();
        let listed: std::collections::HashSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!((rows.len(), listed.len()), (names.len(), names.len()));
        assert!(names.iter().all(|name| listed.contains(name.as_str())));
        assert!(rows.iter().all(|row| row.uses == 2));
        assert_eq!(wire.fact("keys"), KEYS.to_string());
    });
    assert!(status_number(agent.pid, "VmLck") < 1024, "keys do not lie in locked memory, only their shield");
}

#[test]
fn without_randomness_no_key_no_salt_and_no_lock_is_made() {
    needs_root();
    let agent = Agent::start();
    let mut wire = agent.connect();
    let before = wire.import("a", &random::<32>()).unwrap();
    let ciphertext = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    for failure in ["error=ENOSYS", "error=EAGAIN", "error=EIO"] {
        let inject = format!("inject=getrandom:{failure}");
        let strace = Strace::attach(agent.pid, &["-e", "trace=getrandom", "-e", &inject]);
        assert_eq!(wire.generate("b").map(|_| ()), Err(Status::Internal), "{failure}");
        assert_eq!(wire.import("b", &[1; 32]).map(|_| ()), Err(Status::Internal), "an id is random too");
        assert_eq!(wire.encrypt("a", NO_CONTEXT, b"x"), Err(Status::Internal));
        for opcode in [Opcode::StreamNew, Opcode::RemoteStreamNew] {
            let refused = wire.with_key(opcode, KeyRef::Name("a"), NO_CONTEXT, &[]).map(|_| ());
            assert_eq!(refused, Err(Status::Internal));
        }
        assert_eq!(wire.request(Opcode::Lock, &NoFields {}, b"passphrase").status, Status::Internal);
        // What needs none goes on.
        assert_eq!(wire.decrypt("a", NO_CONTEXT, &ciphertext).unwrap(), b"x");
        drop(strace);
    }
    let rows = wire.list().unwrap();
    assert_eq!((rows.len(), rows[0].id), (1, before.id), "nothing was half made");
    // The control: detached, all of it works.
    wire.generate("b").unwrap();
    let again = wire.encrypt("a", NO_CONTEXT, b"x").unwrap();
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &again).unwrap(), b"x");
    wire.with_key(Opcode::StreamNew, KeyRef::Name("a"), NO_CONTEXT, &[]).unwrap();
}

/// A66: keys, plaintexts, passphrases and message keys that are made here are looked for in all that the agent says.
#[test]
fn no_secret_is_told_even_at_trace_level() {
    let agent = Agent::builder().config("log = \"trace\"\n").environment("RUST_LOG", "trace").start();
    let mut canaries = Canaries::new();
    let mut wire = agent.connect();
    let keys: Vec<[u8; 32]> = (0..20).map(|_| random()).collect();
    let mut replies = Vec::new();
    for (n, key) in keys.iter().enumerate() {
        canaries.add("a key", key);
        wire.import(&format!("k{n}"), key).unwrap();
        // Refused with the key in the frame: taken name, wrong length, bad name, unknown constraint, bad fields.
        for refused in [
            add_frame(1, random(), "k0", Some(key)),
            add_frame(2, random(), "long", Some(&[&key[..], b"x"].concat())),
            add_frame(3, random(), "-", Some(key)),
            add_frame(4, random(), &format!("{}\n", canary_text(key)), Some(key)),
            [&add_frame(5, random(), "x", Some(key))[..21], key].concat(),
        ] {
            let mut other = agent.connect();
            other.send(&refused).unwrap();
            other.stream.shutdown(std::net::Shutdown::Write).unwrap();
            replies.extend(other.receive().map(|reply| reply.bytes));
        }
    }
    let plaintext: [u8; 64] = random();
    canaries.add("a plaintext", &plaintext);
    let passphrase = canary_text(&random());
    canaries.add("a passphrase", passphrase.as_bytes());
    let wrong = canary_text(&random());
    canaries.add("a wrong passphrase", wrong.as_bytes());
    let ciphertext = wire.encrypt("k1", NO_CONTEXT, &plaintext).unwrap();
    assert_eq!(wire.decrypt("k1", NO_CONTEXT, &ciphertext).unwrap(), plaintext);
    let mut damaged = ciphertext.clone();
    *damaged.last_mut().unwrap() ^= 1;
    wire.decrypt("k1", NO_CONTEXT, &damaged).unwrap_err();
    wire.encrypt("none", NO_CONTEXT, &plaintext).unwrap_err();
    wire.encrypt("k1", &plaintext, &plaintext).unwrap_err();
    let stream = wire.with_key(Opcode::StreamNew, KeyRef::Name("k2"), NO_CONTEXT, &[]).unwrap().payload;
    canaries.add("a message key", &stream[188..220]);
    wire.with_key(Opcode::StreamOpen, KeyRef::Name("k2"), NO_CONTEXT, &stream[..188]).unwrap();
    let (remote, head) = wire.remote_new("k3").unwrap();
    wire.remote_encrypt(remote, &plaintext).unwrap();
    let remote = wire.remote_open("k3", &head).unwrap();
    wire.remote_decrypt(remote, 0, &plaintext).unwrap_err();
    wire.lock(passphrase.as_bytes()).unwrap();
    wire.unlock(wrong.as_bytes()).unwrap_err();
    wait_until("the back-off passes", || wire.unlock(passphrase.as_bytes()) == Ok(true));
    fs::write(agent.config(), format!("log = \"trace\"\nx = \"{passphrase}\"\n")).unwrap();
    for bytes in replies {
        canaries.assert_absent("a refusal", &bytes);
    }
    drop(wire);
    canaries.assert_absent("the log", &agent.log_bytes());
    let ended = agent.stop();
    canaries.assert_absent("stdout", ended.stdout.as_bytes());
    canaries.assert_absent("the log", ended.log.as_bytes());
    // The control: the log is there and is talkative, and what is looked for would be found in it.
    assert!(ended.log.contains("wrong passphrase") && ended.log.contains("ending"));
    let planted = format!("{}\n{:?}\n", ended.log, keys[7]);
    assert!(!canaries.find(planted.as_bytes()).is_empty());
}

fn canary_text(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| char::from(b'A' + byte % 26)).collect()
}
