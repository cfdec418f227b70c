//! What 1 GiB costs: bytes through the socket, memory, processor time.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    process::{Command, Stdio},
};

use kms_tests::{
    kmsctl::{WAYS, prepare},
    process::run,
    programs::{program, tool},
};

use super::Scene;

const GIB: u64 = 1 << 30;

/// More than any request and its answer, and nothing beside the data.
const NO_DATA: u64 = 64 << 10;

/// `kmsctl` stays below this, in KiB.
const PEAK_MAX: u64 = 32 << 10;

/// A file of 1 GiB that takes no room on the disk.
fn sparse(scene: &Scene) -> std::path::PathBuf {
    let path = scene.path("gib");
    File::create(&path).unwrap().set_len(GIB).unwrap();
    path
}

/// Every call by which bytes can go through a socket. Files are read and written by others, but for the standard streams.
const TRACED: &str = "trace=%network,read,readv,write,writev,sendfile,splice,vmsplice,io_uring_setup";

/// Bytes sent and received through sockets by the threads of one run.
fn socket_bytes(folder: &Path) -> (u64, u64) {
    let (mut sent, mut received) = (0, 0);
    for trace in fs::read_dir(folder).unwrap() {
        for line in fs::read_to_string(trace.unwrap().path()).unwrap().lines() {
            let Some((call, arguments)) = line.split_once('(') else { continue };
            // With these, bytes could pass that are not counted here.
            let uncounted = ["sendfile", "splice", "vmsplice", "io_uring_setup", "sendmmsg", "recvmmsg"];
            assert!(!uncounted.contains(&call) && !line.contains("SCM_RIGHTS"), "{line}");
            let descriptor = arguments.trim_start_matches(|digit: char| digit.is_ascii_digit());
            if !descriptor.starts_with("<UNIX") && !descriptor.starts_with("<socket:") {
                continue;
            }
            // Failed calls name an error behind their number.
            let result = line.rsplit_once(" = ").and_then(|(_, result)| result.parse().ok()).unwrap_or(0);
            match call {
                "sendto" | "sendmsg" | "write" | "writev" => sent += result,
                "recvfrom" | "recvmsg" | "read" | "readv" => received += result,
                _ => {}
            }
        }
    }
    (sent, received)
}

#[test]
fn of_a_local_stream_only_the_key_goes_through_the_socket() {
    let scene = Scene::new();
    let input = sparse(&scene);
    for way in WAYS {
        let traces = scene.path(way.trim_start_matches('-'));
        fs::create_dir(&traces).unwrap();
        let mut command = tool("strace");
        // One file a thread, so that no line is cut in two by another thread's.
        command
            .args(["-ff", "-yy", "-qq", "--seccomp-bpf", "-s", "0", "-e", TRACED, "-o"])
            .arg(traces.join("t"));
        command.arg(program("kmsctl"));
        prepare(&mut command, &scene.agent.socket, ["encrypt", "-k", "k", way, "-o", "/dev/null"]);
        let _ = run(command.arg(&input)).done();
        let (sent, received) = socket_bytes(&traces);
        tell(&format!("encrypt {way} of 1 GiB: {sent} bytes sent through the socket, {received} received"));
        match way {
            "--local" => {
                assert!(sent > 0 && received > 0, "nothing was seen");
                assert!(sent + received < NO_DATA, "{sent} sent, {received} received");
            }
            _ => assert!(sent > GIB && received > GIB, "{sent} sent, {received} received"),
        }
    }
}

struct Usage {
    peak: u64,
    processor: f64,
    wall: f64,
}

/// Runs `kmsctl` with one file as input and another as output, and nothing of either in memory at once.
fn used(scene: &Scene, words: [&str; 4], input: &Path, output: File) -> Usage {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kms-test-usage"));
    command.arg(program("kmsctl"));
    prepare(&mut command, &scene.agent.socket, words);
    let ran = run(command.arg(input).stdout(Stdio::from(output)));
    let said = ran.stderr.strip_prefix("used ");
    let numbers = said.unwrap_or_else(|| panic!("{}", ran.stderr)).split_whitespace();
    let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
    assert_eq!(ran.status.code(), Some(0));
    let seconds = |micros: u64| micros as f64 / 1e6;
    Usage { peak: numbers[0], processor: seconds(numbers[1]), wall: seconds(numbers[2]) }
}

#[test]
fn one_gib_takes_little_memory() {
    let scene = Scene::new();
    let input = sparse(&scene);
    let ciphertext = scene.path("ciphertext");
    let null = || File::options().write(true).open("/dev/null").unwrap();
    let _ = used(&scene, ["encrypt", "-k", "k", "--local"], &input, File::create(&ciphertext).unwrap());
    assert_eq!(fs::metadata(&ciphertext).unwrap().len(), 188 + GIB + 16 * (GIB / 16_384 + 1));
    for way in WAYS {
        for (name, input) in [("encrypt", &input), ("decrypt", &ciphertext)] {
            let Usage { peak, processor, wall } = used(&scene, [name, "-k", "k", way], input, null());
            let ratio = processor / wall;
            tell(&format!(
                "{name} {way} of 1 GiB: {peak} KiB at most, {wall:.2} s, processor/wall {ratio:.2}"
            ));
            assert!(peak < PEAK_MAX, "{name} {way}: {peak} KiB");
        }
    }
}

/// Figures are for people: shown even if nothing fails.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
