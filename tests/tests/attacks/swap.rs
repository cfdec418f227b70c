//! Swap, once: what of the agent reaches the disk when the machine is short of memory.

use std::{fs, io::Read, process::Stdio};

use kms_tests::{
    ALICE, Agent,
    agent::fresh_folder,
    as_uid,
    canary::Canaries,
    process::{output, ranges, status_number, wait_until},
    programs::tool,
    shield::{Image, Part, Records},
};
use nix::unistd::Pid;

use super::{KEYS, Keyed, Victim, locked_memory, machine::Machine};

const GROUPS: &str = "/sys/fs/cgroup/memory";

const PAGE: usize = 4096;

/// Bytes of the swap file.
const SWAP_LEN: usize = 48 << 20;

/// Pages of the victim, and how many of them must be found.
const PAGES: usize = 1_500;
const FOUND: usize = 1_000;

/// What is on the disk, which is not always what the kernel would give who reads the file: that may be an older page at hand.
fn on_disk(file: &str) -> Vec<u8> {
    let mut dd = tool("dd");
    dd.args([&format!("if={file}"), "iflag=direct", "bs=1M", "status=none"]).stdout(Stdio::piped());
    let mut child = dd.spawn().unwrap();
    let mut bytes = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
    assert!(child.wait().unwrap().success() && bytes.len() == SWAP_LEN);
    bytes
}

#[test]
fn no_key_of_an_agent_that_is_swapped_out_is_in_the_swap_file() {
    // The temporary folder must be on a file system that can hold swap: ext4 or xfs, not tmpfs.
    let folder = fresh_folder(0o700);
    let file = folder.path().join("swap").to_str().unwrap().to_owned();
    let group = format!("{GROUPS}/{}", folder.path().file_name().unwrap().to_str().unwrap());
    let _machine = Machine::for_swap(&file, &group);
    fs::create_dir(&group).unwrap_or_else(|error| {
        panic!("{group}: {error} (this test needs the memory controller of control groups, version 1)")
    });
    // Written, so that the pages of the file are on the disk and nobody's.
    fs::write(&file, vec![0; SWAP_LEN]).unwrap();
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    for words in [&["mkswap", "-q"][..], &["swapon"]] {
        let (status, _, stderr) = output(tool(words[0]).args(&words[1..]).arg(&file));
        assert!(status.success(), "{words:?}: {stderr} (this test needs the right to swap)");
    }

    // Children of a thread of the group are in the group.
    let (agents, victim) = as_uid(0, || {
        fs::write(format!("{group}/tasks"), "0").unwrap();
        let agents = ["mlock", "secretmem"].map(|backing| {
            let config = format!("secret_memory = \"{backing}\"\n");
            Keyed::start(Agent::builder().uid(ALICE).config(&config))
        });
        (agents, Victim::start(ALICE, PAGES))
    });
    for keyed in &agents {
        let own = fs::read_to_string(format!("/proc/{}/cgroup", keyed.agent.pid)).unwrap();
        assert!(own.contains(group.strip_prefix(GROUPS).unwrap()), "{own}");
    }
    let mut locked: Vec<Canaries> = agents.iter().map(|keyed| locked_memory(keyed.agent.pid)).collect();
    // Again and again, with the keys just used: what is at hand changes, and so does what is on a page that goes.
    for _ in 0..3 {
        for keyed in &agents {
            keyed.use_keys();
            locked.push(locked_memory(keyed.agent.pid));
        }
        wait_until("the group is swapped out", || {
            fs::write(format!("{group}/memory.force_empty"), "0").unwrap();
            [agents[0].agent.pid, agents[1].agent.pid, victim.pid].iter().all(|pid| {
                let ordinary = status_number(*pid, "RssAnon").saturating_sub(status_number(*pid, "VmLck"));
                ordinary * 4 < status_number(*pid, "VmSwap")
            })
        });
    }
    let disk = on_disk(&file);
    let pages: std::collections::HashSet<usize> =
        victim.secret.find(&disk).iter().map(|(_, place)| place / PAGE).collect();
    assert!(pages.len() >= FOUND, "the control: {} pages of a process without protection", pages.len());
    // As an attacker takes it who finds the disk: one long image, without what is empty or the victim's.
    let rest =
        disk.chunks_exact(PAGE).enumerate().filter(|(n, page)| !pages.contains(n) && **page != [0; PAGE]);
    let bytes: Vec<u8> = rest.flat_map(|(_, page)| page).copied().collect();
    let range = ranges(Pid::this().as_raw()).remove(0);
    let image = Image { parts: vec![Part { range, bytes }], unreadable: Vec::new() };
    for keyed in &agents {
        keyed.secrets().assert_absent("the swap file", &disk);
        let records = Records::find(&image, &keyed.ids);
        assert_eq!(records.len(), KEYS, "the control: the sealed records were swapped out");
        assert_eq!(records.recover(&image).keys.len(), 0, "and can be opened with what else was");
    }
    for locked in &locked {
        locked.assert_absent("the swap file", &disk);
    }
    // They were at work all the time.
    agents.iter().for_each(Keyed::use_keys);
}
