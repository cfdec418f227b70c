//! A32: cores of the process, by its own user with a signal, and by root with gcore.

use std::{fs, os::unix::process::ExitStatusExt, path::Path};

use kms_tests::{
    ALICE, Agent,
    agent::fresh_folder,
    as_uid,
    process::{Range, ends_within, output, ranges, send_signal, wait_for, wait_until},
    programs::{needs_root, tool},
    shield::{Image, Part, Records},
    sys::default_signal,
};
use nix::sys::signal::Signal;

use super::{KEYS, Keyed, Victim, locked_memory, machine::Machine, probe};

/// Sends the signal until it has ended the process: the runtime of Rust takes the first SIGSEGV for an overflow of the stack, finds that
/// it is none, and wants to go on without its handler. In the agent that system call is one that the sandbox kills for.
fn end_by(pid: i32, signal: Signal) {
    as_uid(ALICE, || {
        wait_until("the signal ends it", || {
            // As it is not waited for yet, its number is still its own.
            send_signal(pid, signal);
            ends_within(pid, std::time::Duration::from_millis(50))
        });
    });
}

/// The file of this folder whose name has the pid in it.
fn core_of(folder: &Path, pid: i32) -> Option<std::path::PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.to_str().unwrap().ends_with(&format!(".{pid}")))
        .find(|path| !path.ends_with(format!("want.{pid}")))
}

#[test]
fn no_signal_and_no_setting_makes_a_core_of_the_agent() {
    needs_root();
    // A shell without job control has what it starts in the background ignore it.
    default_signal(Signal::SIGQUIT);
    let pipe = probe();
    let machine = Machine::for_cores();
    for setting in ["file", "pipe"] {
        for suid_dumpable in ["0", "1", "2"] {
            for signal in [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGQUIT] {
                let what = format!("{signal}, {setting}, suid_dumpable {suid_dumpable}");
                let folder = fresh_folder(0o777);
                let cores = folder.path();
                let keyed = Keyed::start(Agent::builder().uid(ALICE).with_cores());
                let mut victim = Victim::start(ALICE, 1);
                let pid = keyed.agent.pid;
                for pid in [pid, victim.pid] {
                    fs::write(cores.join(format!("want.{pid}")), "").unwrap();
                }
                let pattern = match setting {
                    "file" => format!("{}/core.%P", cores.display()),
                    _ => format!("|{} core {} %P", pipe.path().display(), cores.display()),
                };
                machine.set_cores(&pattern, suid_dumpable);
                keyed.use_keys();
                end_by(pid, signal);
                let status = keyed.agent.wait().status;
                // The control: the same signal makes a core of a process without protection, and its secret is there.
                end_by(victim.pid, signal);
                let control = wait_for(&mut victim.child);
                let ends =
                    [Some(signal as i32), (signal == Signal::SIGSEGV).then_some(Signal::SIGSYS as i32)];
                assert!(status.signal().is_some() && ends.contains(&status.signal()), "{what}: {status}");
                assert_eq!(control.signal(), Some(signal as i32), "{what}");
                wait_until("the core of the victim is whole", || {
                    cores.join(format!("core.{}", victim.pid)).exists()
                });
                let core = fs::read(core_of(cores, victim.pid).unwrap()).unwrap();
                assert!(control.core_dumped() && !victim.secret.find(&core).is_empty(), "{what}");
                // The agent's would have come before it.
                assert!(
                    !status.core_dumped() && core_of(cores, pid).is_none(),
                    "a core of the agent: {what}"
                );
            }
        }
    }
}

/// A core that root takes of a running process.
fn gcore(pid: i32, settings: &[&str]) -> Vec<u8> {
    let folder = fresh_folder(0o700);
    let file = folder.path().join("core");
    let mut gdb = tool("gdb");
    gdb.args(["-q", "-nx", "-batch", "-p", &pid.to_string()]);
    for setting in settings {
        gdb.args(["-ex", setting]);
    }
    let (_, stdout, stderr) = output(gdb.args(["-ex", &format!("generate-core-file {}", file.display())]));
    fs::read(&file).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"))
}

/// What an attacker has who has only this core: its segments, each as the range of the process that it was.
fn image_of(core: &[u8], ranges: &[Range]) -> Image {
    const LOAD: u64 = 1;
    let number = |at: usize, len: usize| {
        core[at..at + len].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let place = |at: usize| usize::try_from(number(at, 8)).unwrap();
    let mut image = Image { parts: Vec::new(), unreadable: Vec::new() };
    // The fields of a 64-bit ELF file: where its program headers are, how long each is, and how many.
    for n in 0..number(56, 2) {
        let head = place(32) + usize::try_from(n * number(54, 2)).unwrap();
        let (offset, address, len) = (place(head + 8), number(head + 16, 8), place(head + 32));
        if number(head, 4) == LOAD && len > 0 {
            let range = ranges.iter().find(|range| (range.start..range.end).contains(&address)).unwrap();
            image.parts.push(Part { range: range.clone(), bytes: core[offset..offset + len].to_vec() });
        }
    }
    image
}

#[test]
fn a_core_that_root_takes_has_no_key() {
    needs_root();
    for backing in ["mlock", "secretmem"] {
        let keyed = Keyed::start(Agent::builder().config(&format!("secret_memory = \"{backing}\"\n")));
        let pid = keyed.agent.pid;
        let (secrets, locked) = (keyed.secrets(), locked_memory(pid));
        keyed.use_keys();
        let ranges = ranges(pid);
        let core = gcore(pid, &[]);
        secrets.assert_absent("the core", &core);
        locked.assert_absent("the core", &core);
        let image = image_of(&core, &ranges);
        // The control: the ordinary memory is there, sealed records and all. They stay sealed.
        let records = Records::find(&image, &keyed.ids);
        assert_eq!(records.len(), KEYS, "{backing}");
        assert_eq!(records.recover(&image).keys.len(), 0, "{backing}");

        // Told to dump what asks not to be dumped, gdb reads as root reads: what is locked, but not secretmem.
        let core = gcore(pid, &["set dump-excluded-mappings on"]);
        let raw: Vec<_> =
            secrets.find(&core).into_iter().filter(|(name, _)| name.starts_with("a key")).collect();
        assert!(raw.is_empty(), "{raw:?}");
        let recovered = records.recover(&image_of(&core, &ranges)).keys.len();
        assert_eq!(recovered, if backing == "mlock" { KEYS } else { 0 }, "{backing}");
    }
    // The control: a secret of ordinary memory is in such a core.
    let victim = Victim::start(ALICE, 1);
    assert!(!victim.secret.find(&gcore(victim.pid, &[])).is_empty());
}
