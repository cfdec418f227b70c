//! `rewrap`: what it reads, what it changes, what goes through the socket, and what is left when it is killed.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use kms_envelope::{
    Body, ContextRef, EncryptionContext, ExpandKey, HEADER_LEN, Header, KeyId, KeyVersion, Purpose,
    REWRAP_LEN, new_stream,
};
use kms_protocol::{KeyRef, NoFields, Opcode, Rotate, Rotated, StatsReply};
use kms_tests::{
    Wire,
    kmsctl::{kmsctl, prepare},
    process::{ends_within, output, run, send_signal, wait_for, wait_until},
    programs::{program, tool},
    wire::{random, random_bytes},
};
use nix::sys::{signal::Signal, stat::Mode};

use super::{Scene, names};

const FILES: usize = 10_000;
const KILLS: usize = 20;

/// The key of a scene, with which the test makes streams of its own.
struct Maker {
    kek: ExpandKey,
    id: KeyId,
}

impl Maker {
    fn new(scene: &Scene) -> Self {
        let id = scene.agent.connect().describe(KeyRef::Name("k")).unwrap().key.id;
        Self { kek: ExpandKey::new(&scene.kek), id: KeyId::from_bytes(id) }
    }

    fn stream(&self, dek: &[u8; 32], context: ContextRef<'_>, plaintext: &[u8]) -> Vec<u8> {
        let header =
            Header { purpose: Purpose::Stream, key_id: self.id, key_version: KeyVersion::new(1).unwrap() };
        let (head, key) = new_stream(&self.kek, &header, context, dek, &random(), &random()).unwrap();
        let mut sealed = Vec::new();
        let mut chunks: Vec<&[u8]> = plaintext.chunks(16_384).collect();
        if plaintext.len().is_multiple_of(16_384) {
            chunks.push(&[]);
        }
        for chunk in chunks {
            sealed.extend_from_slice(chunk);
            sealed.extend([0; 16]);
        }
        Body::new(key).seal_chunks(0, &mut sealed).unwrap();
        [&head[..], &sealed].concat()
    }
}

fn rotate(wire: &mut Wire) -> u32 {
    let fields = Rotate { token: random(), key: KeyRef::Name("k") };
    wire.request(Opcode::Rotate, &fields, &[]).ok().unwrap().decode::<Rotated>().version
}

/// How often the agent has moved something.
fn moved(wire: &mut Wire) -> u64 {
    let stats: StatsReply = wire.request(Opcode::Stats, &NoFields {}, &[]).ok().unwrap().decode();
    let rows = stats.operations.iter().filter(|row| row.opcode == Opcode::Rewrap.code() && row.status == 0);
    rows.map(|row| row.count).sum()
}

/// The version that a ciphertext names.
fn version(path: &Path) -> u32 {
    Header::parse(&fs::read(path).unwrap()).unwrap().key_version.value()
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn rewrap(scene: &Scene, words: &[&str], paths: &[&Path]) -> Command {
    let mut command = kmsctl(&scene.agent.socket, ["rewrap", "-k", "k", "--json"]);
    command.args(words).args(paths);
    command
}

/// What a run in which nothing failed says it has done.
fn tally(mut command: Command) -> String {
    String::from_utf8(run(&mut command).done()).unwrap()
}

fn tally_of(rewrapped: usize, current: usize, skipped: usize) -> String {
    format!("{{\"rewrapped\":{rewrapped},\"current\":{current},\"skipped\":{skipped},\"failed\":0}}\n")
}

/// Figures are for people: shown even if nothing fails.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// What file `number` of a tree holds: no two the same, of many lengths.
fn content(number: usize) -> Vec<u8> {
    let line = format!("this is file {number}\n");
    line.bytes().cycle().take(number % 16_000).collect()
}

/// Waits for the end of a child, and says how many bytes it has read from files.
fn bytes_read(child: &mut Child) -> u64 {
    assert!(ends_within(child.id().cast_signed(), kms_tests::process::PATIENCE));
    // Its parent has not asked yet, so the kernel still knows.
    let io = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    line.parse().unwrap()
}

#[test]
fn ten_thousand_files_survive_twenty_kills() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    let mut wire = scene.agent.connect();
    let no_context = EncryptionContext::default();
    let (mut stream_bytes, mut message_bytes) = (0, 0);
    for number in 0..FILES {
        let folder = tree.join(format!("{}/{}", number % 10, number % 100));
        fs::create_dir_all(&folder).unwrap();
        let ciphertext = match number % 10 {
            7 => wire.encrypt("k", no_context.as_ref().as_bytes(), &content(number)).unwrap(),
            _ => maker.stream(&random(), no_context.as_ref(), &content(number)),
        };
        *(if number % 10 == 7 { &mut message_bytes } else { &mut stream_bytes }) += ciphertext.len() as u64;
        fs::write(folder.join(number.to_string()), ciphertext).unwrap();
    }
    let before = files(&tree);
    assert_eq!(before.len(), FILES);

    let start = Instant::now();
    let (mut killed, mut left) = (0, 0);
    while killed < KILLS {
        rotate(&mut wire);
        let enough = moved(&mut wire) + u64::from_le_bytes(random()) % (FILES as u64 - 500);
        let mut child = rewrap(&scene, &["-r"], &[&tree]).spawn().unwrap();
        let pid = child.id().cast_signed();
        wait_until("it is in the middle of its work", || moved(&mut wire) >= enough);
        // With 500 files to go it has not ended.
        send_signal(pid, Signal::SIGKILL);
        assert_eq!(wait_for(&mut child).code(), None, "it was not killed");
        killed += 1;
        left += files(&tree).len() - FILES;
    }
    let last = rotate(&mut wire);
    let mut child = rewrap(&scene, &["-r"], &[&tree]).spawn().unwrap();
    let read = bytes_read(&mut child);
    let ran = child.wait_with_output().unwrap();
    let said = String::from_utf8(ran.stdout).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    tell(&format!(
        "{KILLS} kills in {FILES} files left {left} side files; {seconds:.1} s; the last run read {read} bytes"
    ));
    assert_eq!(said, tally_of(FILES, 0, 0), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(left > 0, "no kill came while something was half done");
    // All of the messages, the front of each stream twice, and what every program reads when it starts.
    let most = message_bytes + 2 * (REWRAP_LEN * FILES) as u64 + (1 << 20);
    assert!(read < most && most < stream_bytes / 4, "{read} bytes read of {stream_bytes}, at most {most}");

    assert!(files(&tree) == before, "a file is lost, or something is left");
    let times: Vec<_> = before.iter().map(|path| fs::metadata(path).unwrap().mtime_nsec()).collect();
    assert_eq!(tally(rewrap(&scene, &["-r"], &[&tree])), tally_of(0, FILES, 0));
    for (path, time) in before.iter().zip(times) {
        assert_eq!(fs::metadata(path).unwrap().mtime_nsec(), time, "{} was touched", path.display());
        assert_eq!(version(path), last, "{}", path.display());
        let number: usize = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let ciphertext = fs::read(path).unwrap();
        let plaintext = match number % 10 {
            7 => wire.decrypt("k", no_context.as_ref().as_bytes(), &ciphertext).unwrap(),
            _ => {
                let (head, chunks) = ciphertext.split_at(188);
                let stream = wire.remote_open("k", head).unwrap();
                let plaintext = wire.remote_decrypt(stream, 0, chunks).unwrap();
                wire.remote_close(stream).unwrap();
                plaintext
            }
        };
        assert!(plaintext == content(number), "{}", path.display());
    }
}

#[test]
fn of_a_stream_only_its_first_132_bytes_are_read() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    for number in 0..20 {
        let stream = maker.stream(&random(), ContextRef::EMPTY, &random_bytes(1 << 20));
        fs::write(tree.join(format!("stream-{number}")), stream).unwrap();
    }
    rotate(&mut scene.agent.connect());
    let traces = scene.path("traces");
    fs::create_dir(&traces).unwrap();
    let mut command = tool("strace");
    let calls = "trace=read,readv,pread64,preadv,preadv2,mmap,sendfile,splice,copy_file_range,io_uring_setup";
    command.args(["-ff", "-y", "-qq", "-s", "0", "-e", calls, "-o"]).arg(traces.join("t"));
    command.arg(program("kmsctl"));
    prepare(&mut command, &scene.agent.socket, ["rewrap", "-k", "k", "-r", "--json"]);
    command.arg(&tree);
    assert_eq!(tally(command), tally_of(20, 0, 0));
    let mut read: BTreeMap<String, u64> = BTreeMap::new();
    for trace in files(&traces) {
        for line in fs::read_to_string(trace).unwrap().lines() {
            assert!(!line.starts_with("io_uring_setup"), "{line}");
            let Some((_, name)) = line.split_once("/tree/stream-") else { continue };
            let name = name.split('>').next().unwrap().to_owned();
            let result: u64 = line.rsplit_once(" = ").unwrap().1.parse().unwrap();
            match line.split_once('(').unwrap().0 {
                "read" => assert_eq!(result, REWRAP_LEN as u64, "{line}"),
                "pread64" => assert!(line.contains(", 132, 0)"), "{line}"),
                _ => panic!("{line}"),
            }
            *read.entry(name).or_default() += result;
        }
    }
    // Once before the agent is asked, and once more before it is replaced.
    assert_eq!(read.len(), 20);
    assert!(read.values().all(|bytes| *bytes == 2 * REWRAP_LEN as u64), "{read:?}");
}

/// A socket that passes everything on and keeps a copy of both directions.
fn record(path: &Path, agent: &Path) -> Arc<Mutex<Vec<u8>>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let listener = UnixListener::bind(path).unwrap();
    let (agent, kept) = (agent.to_owned(), Arc::clone(&all));
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, agent) = (client.unwrap(), UnixStream::connect(&agent).unwrap());
            for (from, to) in [(&client, &agent), (&agent, &client)] {
                let (mut from, mut to, kept) =
                    (from.try_clone().unwrap(), to.try_clone().unwrap(), kept.clone());
                thread::spawn(move || {
                    // One direction after the other, not byte by byte: what is looked for is found as it was sent.
                    let mut whole = Vec::new();
                    let mut piece = [0; 65_536];
                    while let Ok(got @ 1..) = io::Read::read(&mut from, &mut piece) {
                        whole.extend_from_slice(&piece[..got]);
                        if to.write_all(&piece[..got]).is_err() {
                            break;
                        }
                    }
                    kept.lock().unwrap().extend(whole);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
    all
}

/// The first piece of 12 bytes of `secret` that is in `traffic`.
fn found(traffic: &[u8], secret: &[u8]) -> Option<usize> {
    let pieces: std::collections::HashSet<&[u8]> = traffic.windows(12).collect();
    secret.windows(12).position(|piece| pieces.contains(piece))
}

#[test]
fn a_rewrap_only_run_says_nothing_of_what_is_sealed() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    let (plaintext, dek) = (random_bytes(5000), random());
    let value = "a value that nobody else has to know";
    let context = EncryptionContext::from_pairs([("table of the customer", value)]).unwrap();
    for number in 0..10 {
        let stream = maker.stream(&dek, context.as_ref(), &plaintext);
        fs::write(tree.join(number.to_string()), stream).unwrap();
    }
    let before = fs::read(tree.join("0")).unwrap();
    rotate(&mut scene.agent.connect());
    let socket = scene.path("recorded");
    let recorded = record(&socket, &scene.agent.socket);
    let mut command = kmsctl(&socket, ["rewrap", "-k", "k", "-r", "--json", "-C"]);
    // Even where it is given it is not sent.
    command.arg(format!("table of the customer={value}")).arg(&tree);
    assert_eq!(tally(command), tally_of(10, 0, 0));
    let after = fs::read(tree.join("0")).unwrap();
    assert!(before[REWRAP_LEN..] == after[REWRAP_LEN..] && before[..REWRAP_LEN] != after[..REWRAP_LEN]);
    let traffic = || recorded.lock().unwrap().clone();
    // The controls: both fronts have gone through, and 12 bytes behind them have not.
    wait_until("all of it was kept", || found(&traffic(), &after[HEADER_LEN..HEADER_LEN + 12]).is_some());
    wait_until("all of it was kept", || found(&traffic(), &before[..REWRAP_LEN]) == Some(0));
    let said = traffic();
    for (what, secret) in [
        ("plaintext", &plaintext[..]),
        ("data key", &dek),
        ("context", context.as_ref().as_bytes()),
        ("the body", &before[REWRAP_LEN..]),
    ] {
        assert_eq!(found(&said, secret), None, "{what} goes through the socket");
    }
    // And the same search finds them where they do go through.
    let input = scene.put("plain", &plaintext);
    let mut command = kmsctl(&socket, ["encrypt", "-k", "k", "--remote", "-C"]);
    let _ = run(command.arg(format!("table of the customer={value}")).arg(input)).done();
    for secret in [&plaintext[..], context.as_ref().as_bytes()] {
        wait_until("plaintext and context are found", || found(&traffic(), secret) == Some(0));
    }
}

#[test]
fn what_cannot_be_moved_is_reported_and_untouched() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(tree.join(name), bytes).unwrap();
    let stream = || maker.stream(&random(), ContextRef::EMPTY, b"plaintext");
    let mut wire = scene.agent.connect();
    wire.generate("other").unwrap();
    put("good", &stream());
    let mut flipped = stream();
    flipped[60] ^= 1;
    put("flipped", &flipped);
    put("short", &stream()[..131]);
    put("foreign", &scene.encrypt("--local", b"x", &[]));
    let _ = run(scene
        .kmsctl(["encrypt", "-k", "other", "-o"])
        .arg(tree.join("foreign"))
        .arg(scene.put("in", b"x")));
    let mut future = stream();
    future[3] = 2;
    put("of a later format", &future);
    put("note.txt", b"not a ciphertext");
    put("empty", b"");
    nix::unistd::mkfifo(&tree.join("pipe"), Mode::S_IRWXU).unwrap();
    let outside = scene.put("outside", &stream());
    let elsewhere = scene.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("file"), stream()).unwrap();
    symlink(&outside, tree.join("link")).unwrap();
    symlink(&elsewhere, tree.join("folder")).unwrap();
    rotate(&mut wire);
    let state = |path: &Path| {
        let meta = fs::symlink_metadata(path).unwrap();
        (meta.ino(), meta.mtime(), meta.mtime_nsec())
    };
    let untouched =
        ["flipped", "short", "foreign", "of a later format", "note.txt", "empty"].map(|name| tree.join(name));
    let untouched: Vec<_> = untouched.into_iter().chain([outside, elsewhere.join("file")]).collect();
    let before: Vec<_> = untouched.iter().map(|path| (state(path), fs::read(path).unwrap())).collect();
    let all = names(&tree);

    let ran = run(&mut rewrap(&scene, &["-r"], &[&tree]));
    assert_eq!(ran.status.code(), Some(1));
    // Skipped: foreign, note, empty, pipe, two symlinks.
    assert_eq!(
        String::from_utf8_lossy(&ran.stdout),
        "{\"rewrapped\":1,\"current\":0,\"skipped\":6,\"failed\":3}\n"
    );
    for (name, message) in [
        ("flipped", "wrong encryption context, or truncated or changed ciphertext"),
        ("short", "wrong encryption context, or truncated or changed ciphertext"),
        ("of a later format", "ciphertext format 2 is not known"),
    ] {
        let line = format!("kmsctl: error: {}: {message}", tree.join(name).display());
        assert!(ran.stderr.lines().any(|said| said == line), "{line}\n{}", ran.stderr);
    }
    assert_eq!(version(&tree.join("good")), 2);
    for (path, (state_before, content)) in untouched.iter().zip(before) {
        assert!(state(path) == state_before && fs::read(path).unwrap() == content, "{}", path.display());
    }
    assert_eq!(names(&tree), all);

    // By name a foreign file is a mistake, and a folder is one without -r.
    let foreign = tree.join("foreign");
    assert!(
        run(&mut rewrap(&scene, &[], &[&foreign]))
            .message(1)
            .contains("the ciphertext was made under another key")
    );
    assert!(run(&mut rewrap(&scene, &[], &[&tree])).message(64).ends_with("tree is a folder"));
    // A symlink that is named is followed, and what it names is changed.
    assert_eq!(tally(rewrap(&scene, &[], &[&tree.join("link")])), tally_of(1, 0, 0));
    assert!(fs::symlink_metadata(tree.join("link")).unwrap().is_symlink());
    assert_eq!(version(&untouched[6]), 2);
}

/// Calls of `kmsctl` between which the disk and the names on it change, in their order.
const STEPS: [(&str, u32); 6] =
    [("pwrite64", 1), ("fsync", 1), ("fsync", 2), ("pwrite64", 2), ("fdatasync", 1), ("unlinkat", 1)];

#[test]
fn a_run_that_is_killed_at_any_step_is_finished_by_the_next() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let mut wire = scene.agent.connect();
    let folder = scene.path("tree");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("stream");
    fs::write(&file, maker.stream(&random(), ContextRef::EMPTY, b"plaintext")).unwrap();
    for (call, when) in STEPS {
        let wanted = rotate(&mut wire);
        let mut command = tool("strace");
        command.args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e"]);
        command.arg(format!("inject={call}:signal=KILL:when={when}"));
        command.arg(program("kmsctl"));
        prepare(&mut command, &scene.agent.socket, ["rewrap", "-k", "k"]);
        let (status, _, _) = output(command.arg(&file));
        assert!(!status.success(), "{call} {when}: it was not killed");
        assert_eq!(names(&folder).len(), 2, "{call} {when}: the side file");
        let words: &[&str] = if when == 1 { &["-r"] } else { &[] };
        let path = if when == 1 { &folder } else { &file };
        let _ = tally(rewrap(&scene, words, &[path]));
        assert_eq!(names(&folder), ["stream"], "{call} {when}");
        assert_eq!(version(&file), wanted, "{call} {when}");
        let opened = run(scene.kmsctl(["decrypt", "-k", "k"]).arg(&file)).done();
        assert_eq!(opened, b"plaintext", "{call} {when}");
    }
}

#[test]
fn a_front_that_is_half_written_is_made_whole() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let folder = scene.path("tree");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("stream");
    fs::write(&file, maker.stream(&random(), ContextRef::EMPTY, b"plaintext")).unwrap();
    let old = fs::read(&file).unwrap();
    rotate(&mut scene.agent.connect());
    let mut command = tool("strace");
    command.args(["-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:signal=KILL"]);
    command.arg(program("kmsctl"));
    prepare(&mut command, &scene.agent.socket, ["rewrap", "-k", "k"]);
    let (status, _, _) = output(command.arg(&file));
    assert!(!status.success());
    // As if the power had failed in the middle of it.
    let new = fs::read(&file).unwrap();
    fs::write(&file, [&new[..70], &old[70..]].concat()).unwrap();
    assert_ne!(new[..REWRAP_LEN], old[..REWRAP_LEN]);
    let refused = run(scene.kmsctl(["decrypt", "-k", "k"]).arg(&file));
    assert_eq!(refused.refusal(1), "wrong encryption context, or truncated or changed ciphertext");
    assert_eq!(tally(rewrap(&scene, &["-r"], &[&folder])), tally_of(0, 1, 0));
    assert!(fs::read(&file).unwrap() == new);
    assert_eq!(names(&folder), ["stream"]);
}

#[test]
fn a_run_that_is_asked_to_end_leaves_nothing_half_done() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    let mut wire = scene.agent.connect();
    for number in 0..2000 {
        let bytes = match number % 2 {
            0 => maker.stream(&random(), ContextRef::EMPTY, &content(number)),
            _ => wire.encrypt("k", ContextRef::EMPTY.as_bytes(), &content(number)).unwrap(),
        };
        fs::write(tree.join(number.to_string()), bytes).unwrap();
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let wanted = rotate(&mut wire);
        let enough = moved(&mut wire) + 300;
        let mut child = rewrap(&scene, &["-r"], &[&tree]).spawn().unwrap();
        wait_until("it is in the middle of its work", || moved(&mut wire) >= enough);
        send_signal(child.id().cast_signed(), signal);
        assert_eq!(wait_for(&mut child).signal(), Some(signal as i32));
        assert_eq!(names(&tree).len(), 2000, "a side file is left");
        assert!(files(&tree).iter().any(|path| version(path) < wanted), "it had ended by itself");
    }
}

#[test]
fn two_runs_at_the_same_time_share_the_work() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    let mut wire = scene.agent.connect();
    for number in 0..400 {
        let bytes = match number % 2 {
            0 => maker.stream(&random(), ContextRef::EMPTY, &content(number)),
            _ => wire.encrypt("k", ContextRef::EMPTY.as_bytes(), &content(number)).unwrap(),
        };
        fs::write(tree.join(number.to_string()), bytes).unwrap();
    }
    for _ in 0..5 {
        let wanted = rotate(&mut wire);
        let runs = [(); 2].map(|()| rewrap(&scene, &["-r"], &[&tree]).spawn().unwrap());
        let mut rewrapped = 0;
        for child in runs {
            let ran = child.wait_with_output().unwrap();
            assert_eq!(ran.status.code(), Some(0), "{}", String::from_utf8_lossy(&ran.stderr));
            let text = String::from_utf8(ran.stdout).unwrap();
            let count = text.strip_prefix("{\"rewrapped\":").unwrap().split(',').next().unwrap();
            rewrapped += count.parse::<usize>().unwrap();
            assert!(text.contains("\"skipped\":0,\"failed\":0"), "{text}");
        }
        assert_eq!(rewrapped, 400, "none was moved twice");
        assert_eq!(names(&tree).len(), 400);
        for path in files(&tree) {
            assert_eq!(version(&path), wanted);
            let number: usize = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            if number % 40 < 2 {
                let _ = run(scene.kmsctl(["verify", "-k", "k"]).arg(&path)).done();
            }
        }
    }
}

#[test]
fn encrypting_anew_needs_the_context_and_leaves_nothing_of_the_old_body() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let context = EncryptionContext::from_pairs([("a", "b")]).unwrap();
    let plaintext = random_bytes(3 << 20);
    let file = scene.out().join("stream");
    fs::write(&file, maker.stream(&random(), context.as_ref(), &plaintext)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let before = fs::read(&file).unwrap();
    let failed = run(&mut rewrap(&scene, &["--reencrypt", "-C", "a=c"], &[&file]));
    assert!(failed.message(1).contains("wrong encryption context"), "{}", failed.stderr);
    assert!(fs::read(&file).unwrap() == before);
    // A chunk in the middle that was changed is met when half of the new file is written.
    let mut changed = before.clone();
    changed[1 << 20] ^= 1;
    fs::write(&file, &changed).unwrap();
    let failed = run(&mut rewrap(&scene, &["--reencrypt", "-C", "a=b"], &[&file]));
    assert!(failed.message(1).contains("truncated or changed"), "{}", failed.stderr);
    assert!(fs::read(&file).unwrap() == changed);
    assert_eq!(names(&scene.out()), ["stream"]);
    fs::write(&file, &before).unwrap();

    assert_eq!(tally(rewrap(&scene, &["--reencrypt", "-C", "a=b"], &[&file])), tally_of(1, 0, 0));
    let after = fs::read(&file).unwrap();
    assert_eq!(after.len(), before.len());
    assert_eq!(found(&after[HEADER_LEN..1 << 20], &before[HEADER_LEN..1 << 16]), None);
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
    assert_eq!(names(&scene.out()), ["stream"]);
    let mut decrypt = scene.kmsctl(["decrypt", "-k", "k", "-C", "a=b"]);
    assert!(run(decrypt.arg(&file)).done() == plaintext);
}

#[test]
fn a_lock_on_a_file_is_waited_for_and_then_given_up() {
    let scene = Scene::new();
    let maker = Maker::new(&scene);
    let file = scene.put("stream", &maker.stream(&random(), ContextRef::EMPTY, b"x"));
    rotate(&mut scene.agent.connect());
    let held = File::open(&file).unwrap();
    held.lock().unwrap();
    let failed = run(&mut rewrap(&scene, &["--timeout", "1s"], &[&file]));
    assert!(failed.message(1).starts_with("somebody else holds a lock on"), "{}", failed.stderr);
    assert_eq!(version(&file), 1);
    // What is no ciphertext is none of our business, and neither is its lock.
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("other"), "a file of another program").unwrap();
    let other = File::open(tree.join("other")).unwrap();
    other.lock().unwrap();
    assert_eq!(tally(rewrap(&scene, &["-r", "--timeout", "1s"], &[&tree])), tally_of(0, 0, 1));
    let mut child = rewrap(&scene, &[], &[&file]).spawn().unwrap();
    let is_open = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target == file);
    wait_until("it has the file open", || {
        let links = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        links.map(|link| link.unwrap().path()).any(is_open)
    });
    held.unlock().unwrap();
    assert!(wait_for(&mut child).success());
    assert_eq!(version(&file), 2);
}
