//! Measures the shipped agent and `kmsctl` beside the floor and beside `age`, in one run and in interleaved rounds.
//! It asserts nothing: a person reads it. `docs/benchmarks.md` has the command, the results and what they mean.

use std::{
    env,
    error::Error,
    fs,
    io::{Read, Write},
    os::fd::AsFd,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use kms_protocol::{
    Add, FRAME_MAX, Frame, Hello, KeyAndContext, KeyRef, Material, NoFields, Opcode, PROTOCOL_VERSION,
    constraint, push_frame,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Rounds of each measurement; the candidates take turns in each.
const ROUNDS: usize = 9;
/// Single operations and pipelined operations of one round, and how many are under way at once.
const SINGLES: usize = 20_000;
const PIPELINED: usize = 200_000;
const DEPTH: usize = 128;
/// Size of an echoed message.
const ECHO_LEN: usize = 64;
const EMPTY_CONTEXT: [u8; 4] = [0; 4];

fn main() -> Outcome<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["echo", path] => echo(Path::new(path)),
        ["small"] => small(),
        ["files"] => files(1 << 30),
        [] => small().and_then(|()| files(1 << 30)),
        _ => Err("usage: bench [small|files]".into()),
    }
}

/// The floor: reads what is there and writes it back, blocking.
fn echo(path: &Path) -> Outcome<()> {
    let listener = UnixListener::bind(path)?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                count => stream.write_all(&buffer[..count])?,
            }
        }
    }
}

/// A server process, ended with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap_or_default())
    }

    /// Time on a processor, of all threads.
    fn cpu(&self) -> Outcome<Duration> {
        let mut total = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            total += text.split_whitespace().next().ok_or("schedstat is empty")?.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(total))
    }
}

fn pin(pid: Pid, core: usize) -> Outcome<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(pid, &set)?)
}

fn programs() -> Outcome<PathBuf> {
    match env::var_os("KMS_TEST_BIN") {
        Some(folder) => Ok(folder.into()),
        None => Ok(env::current_exe()?.parent().ok_or("no folder")?.to_owned()),
    }
}

fn connect(path: &Path) -> Outcome<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > Duration::from_secs(10) => return Err(error.into()),
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// Sends one frame and waits for the answer to it.
fn ask(stream: &mut UnixStream, request: &[u8]) -> Outcome<Vec<u8>> {
    stream.write_all(request)?;
    let mut answer = Vec::new();
    let mut buffer = vec![0; FRAME_MAX];
    loop {
        if let Some(frame) = Frame::parse(&answer, FRAME_MAX)? {
            return if frame.head.code == 0 {
                Ok(answer)
            } else {
                Err(format!("status {}", frame.head.code).into())
            };
        }
        let count = stream.read(&mut buffer)?;
        answer.extend_from_slice(&buffer[..count]);
    }
}

/// A connection to an agent that has answered its hello.
fn greet(path: &Path) -> Outcome<UnixStream> {
    let mut stream = connect(path)?;
    let mut request = Vec::new();
    push_frame(&mut request, Opcode::Hello.code(), 1, &Hello { version: PROTOCOL_VERSION }, &[])?;
    ask(&mut stream, &request)?;
    Ok(stream)
}

fn encrypt_request(plaintext_len: usize) -> Outcome<Vec<u8>> {
    let mut request = Vec::new();
    let fields = KeyAndContext { key: KeyRef::Name("bench"), context: &EMPTY_CONTEXT };
    push_frame(&mut request, Opcode::Encrypt.code(), 7, &fields, &vec![0x55; plaintext_len])?;
    Ok(request)
}

/// Per-operation time of one request after the other: the median and the 99th of a hundred, in microseconds.
fn singles(stream: &mut UnixStream, request: &[u8], answer_len: usize, polls: bool) -> Outcome<(f64, f64)> {
    let mut times = Vec::with_capacity(SINGLES);
    let mut answer = vec![0; answer_len];
    for _ in 0..SINGLES {
        let start = Instant::now();
        stream.write_all(request)?;
        if polls {
            poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
        }
        stream.read_exact(&mut answer)?;
        times.push(start.elapsed());
    }
    times.sort();
    let at = |index: usize| times[index].as_secs_f64() * 1e6;
    Ok((at(SINGLES / 2), at(SINGLES * 99 / 100)))
}

/// Operations a second with [`DEPTH`] under way: the next half leaves when half of the answers are there.
fn pipelined(stream: &mut UnixStream, request: &[u8], answer_len: usize) -> Outcome<f64> {
    let half = request.repeat(DEPTH / 2);
    let mut answers = vec![0; answer_len * DEPTH / 2];
    let start = Instant::now();
    stream.write_all(&half)?;
    for _ in 0..PIPELINED / (DEPTH / 2) {
        stream.write_all(&half)?;
        stream.read_exact(&mut answers)?;
    }
    stream.read_exact(&mut answers)?;
    Ok((PIPELINED + DEPTH / 2) as f64 / start.elapsed().as_secs_f64())
}

/// Median, minimum and maximum.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

struct Candidate {
    name: &'static str,
    /// The client waits in `poll`, as kms-client does, not in `read`.
    polls: bool,
    server: Rc<Server>,
    stream: UnixStream,
    single: (Vec<u8>, usize),
    many: (Vec<u8>, usize),
    p50: Vec<f64>,
    p99: Vec<f64>,
    cpu: Vec<f64>,
    rate: Vec<f64>,
    rate_cpu: Vec<f64>,
}

impl Candidate {
    fn new(
        name: &'static str,
        polls: bool,
        server: &Rc<Server>,
        stream: UnixStream,
        single: (Vec<u8>, usize),
        many: (Vec<u8>, usize),
    ) -> Self {
        let empty = Vec::new;
        Self {
            name,
            polls,
            server: Rc::clone(server),
            stream,
            single,
            many,
            p50: empty(),
            p99: empty(),
            cpu: empty(),
            rate: empty(),
            rate_cpu: empty(),
        }
    }
}

fn small() -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let echo_path = folder.path().join("echo.sock");
    let echo = Rc::new(Server(Command::new(env::current_exe()?).arg("echo").arg(&echo_path).spawn()?));
    let echo_stream = connect(&echo_path)?;
    // It serves one connection.
    let polled_echo_path = folder.path().join("polled-echo.sock");
    let polled_echo =
        Rc::new(Server(Command::new(env::current_exe()?).arg("echo").arg(&polled_echo_path).spawn()?));
    let polled_echo_stream = connect(&polled_echo_path)?;

    let agent_path = folder.path().join("agent.sock");
    let mut command = Command::new(programs()?.join("kms-agent"));
    command.args(["--memory", "-D", "-a"]).arg(&agent_path).stdout(Stdio::null()).stderr(Stdio::null());
    let agent = Rc::new(Server(command.spawn()?));
    let mut agent_stream = greet(&agent_path)?;
    let mut request = Vec::new();
    let constraints = vec![kms_protocol::Constraint { kind: constraint::MEMORY_ONLY, value: 0 }];
    let add =
        Add { token: [1; 16], name: "bench", material: Material::Generate, if_missing: false, constraints };
    push_frame(&mut request, Opcode::Add.code(), 2, &add, &[])?;
    ask(&mut agent_stream, &request)?;
    let mut ping_stream = greet(&agent_path)?;
    let mut ping = Vec::new();
    push_frame(&mut ping, Opcode::Ping.code(), 3, &NoFields {}, &[])?;
    let ping_len = ask(&mut ping_stream, &ping)?.len();
    let single = encrypt_request(32)?;
    let single_len = ask(&mut agent_stream, &single)?.len();
    let many = encrypt_request(64)?;
    let many_len = ask(&mut agent_stream, &many)?.len();

    let echoed = (vec![0x55; ECHO_LEN], ECHO_LEN);
    let pinged = (ping, ping_len);
    let encrypted = ((single, single_len), (many, many_len));
    let mut candidates = [
        Candidate::new("echo", false, &echo, echo_stream, echoed.clone(), echoed.clone()),
        Candidate::new("encrypt", true, &agent, agent_stream, encrypted.0.clone(), encrypted.1.clone()),
        Candidate::new("ping", true, &agent, ping_stream, pinged.clone(), pinged),
        Candidate::new(
            "encrypt, client in read",
            false,
            &agent,
            greet(&agent_path)?,
            encrypted.0,
            encrypted.1,
        ),
        Candidate::new(
            "echo, client in poll",
            true,
            &polled_echo,
            polled_echo_stream,
            echoed.clone(),
            echoed,
        ),
    ];
    for round in 0..=ROUNDS {
        for candidate in &mut candidates {
            pin(Pid::from_raw(0), 0)?;
            pin(candidate.server.pid(), 0)?;
            let before = candidate.server.cpu()?;
            let (p50, p99) =
                singles(&mut candidate.stream, &candidate.single.0, candidate.single.1, candidate.polls)?;
            let cpu = (candidate.server.cpu()? - before).as_secs_f64() * 1e6 / SINGLES as f64;
            pin(candidate.server.pid(), 1)?;
            let before = candidate.server.cpu()?;
            let rate = pipelined(&mut candidate.stream, &candidate.many.0, candidate.many.1)?;
            let rate_cpu = (candidate.server.cpu()? - before).as_secs_f64() * 1e6 / PIPELINED as f64;
            // The first round warms up.
            if round > 0 {
                candidate.p50.push(p50);
                candidate.p99.push(p99);
                candidate.cpu.push(cpu);
                candidate.rate.push(rate);
                candidate.rate_cpu.push(rate_cpu);
            }
        }
    }
    println!("one request after the other, client and server on one core; encrypt of 32 bytes");
    let mut floor = None;
    for candidate in &mut candidates {
        let (p50, low, high) = spread(&mut candidate.p50);
        let (p99, ..) = spread(&mut candidate.p99);
        let (cpu, ..) = spread(&mut candidate.cpu);
        let ratio = p50 / *floor.get_or_insert(p50);
        let name = candidate.name;
        println!(
            "  {name:<24} p50 {p50:6.2} us ({low:.2} to {high:.2})  p99 {p99:6.2} us  server CPU {cpu:5.2} us  {ratio:5.2} x the floor"
        );
    }
    println!("{DEPTH} under way on one connection, client and server on a core each; encrypt of 64 bytes");
    let mut floor = None;
    for candidate in &mut candidates {
        let (rate, low, high) = spread(&mut candidate.rate);
        let (cpu, ..) = spread(&mut candidate.rate_cpu);
        let ratio = rate / *floor.get_or_insert(rate);
        let name = candidate.name;
        println!(
            "  {name:<24} {:8.0} k/s ({:.0} to {:.0})  server CPU {cpu:5.2} us  {ratio:5.2} x the floor",
            rate / 1e3,
            low / 1e3,
            high / 1e3
        );
    }
    Ok(())
}

/// A whole file, by each tool that is there, to a fresh file and to nowhere.
fn files(size: usize) -> Outcome<()> {
    let folder = tempfile::Builder::new()
        .prefix("kms-bench-")
        .tempdir_in(env::var_os("KMS_BENCH_DIR").map_or_else(env::temp_dir, PathBuf::from))?;
    let plain = folder.path().join("plain");
    let mut random = fs::File::open("/dev/urandom")?.take(1 << 20);
    let mut block = Vec::new();
    random.read_to_end(&mut block)?;
    let mut file = fs::File::create(&plain)?;
    for number in 0..size >> 20 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    file.sync_all()?;
    drop(file);
    let bin = programs()?;
    let agent_path = folder.path().join("agent.sock");
    let mut command = Command::new(bin.join("kms-agent"));
    command.args(["--memory", "-D", "-a"]).arg(&agent_path).stdout(Stdio::null()).stderr(Stdio::null());
    let _agent = Server(command.spawn()?);
    connect(&agent_path)?;
    let sh = |script: &str| -> Outcome<Duration> {
        let start = Instant::now();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(script)
            .current_dir(folder.path())
            .env("KMS_AUTH_SOCK", &agent_path)
            .env("BIN", &bin);
        if !command.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
            return Err(format!("failed: {script}").into());
        }
        Ok(start.elapsed())
    };
    sh("$BIN/kmsctl add --memory bench")?;
    let mut scripts = vec![
        ("cat", "cat plain > OUT", "cat copy > OUT"),
        (
            "kmsctl (local)",
            "$BIN/kmsctl encrypt -k bench < plain > OUT",
            "$BIN/kmsctl decrypt -k bench < sealed.kms > OUT",
        ),
        (
            "kmsctl -o, synced",
            "$BIN/kmsctl encrypt -k bench -o OUT plain",
            "$BIN/kmsctl decrypt -k bench -o OUT sealed.kms",
        ),
        (
            "kmsctl --remote",
            "$BIN/kmsctl encrypt --remote -k bench < plain > OUT",
            "$BIN/kmsctl decrypt --remote -k bench < sealed.kms > OUT",
        ),
    ];
    sh("cp plain copy && $BIN/kmsctl encrypt -k bench < plain > sealed.kms")?;
    let age = sh("age-keygen -o age.key && age -e -i age.key -o sealed.age plain").is_ok();
    if age {
        scripts.push(("age", "age -e -i age.key < plain > OUT", "age -d -i age.key < sealed.age > OUT"));
    }
    let openssl =
        sh("openssl enc -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) -in plain -out sealed.ctr")
            .is_ok();
    if openssl {
        let (encrypt, decrypt) = (
            "openssl enc -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) < plain > OUT",
            "openssl enc -d -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) < sealed.ctr > OUT",
        );
        scripts.push(("openssl aes-256-ctr", encrypt, decrypt));
    }
    for (target, out) in [("a fresh file", "out"), ("/dev/null", "/dev/null")] {
        println!("{} MiB from the page cache to {target}, GB/s: median (least to most) of 5", size >> 20);
        let mut rates = vec![(Vec::new(), Vec::new()); scripts.len()];
        for _ in 0..5 {
            for ((_, encrypt, decrypt), (encrypts, decrypts)) in scripts.iter().zip(&mut rates) {
                for (script, rates) in [(encrypt, encrypts), (decrypt, decrypts)] {
                    if script.contains("-o OUT") && out == "/dev/null" {
                        continue;
                    }
                    sh("rm -f out")?;
                    rates.push(size as f64 / sh(&script.replace("OUT", out))?.as_secs_f64() / 1e9);
                }
            }
        }
        sh("rm -f out")?;
        for ((name, ..), (encrypts, decrypts)) in scripts.iter().zip(&mut rates) {
            if encrypts.is_empty() {
                continue;
            }
            let ((e, e_low, e_high), (d, d_low, d_high)) = (spread(encrypts), spread(decrypts));
            println!(
                "  {name:<20} encrypt {e:5.2} ({e_low:.2} to {e_high:.2})  decrypt {d:5.2} ({d_low:.2} to {d_high:.2})"
            );
        }
    }
    if !age {
        println!("age: not measured, it is not installed (Debian package age)");
    }
    if !openssl {
        println!("openssl: not measured, it is not installed (Debian package openssl)");
    }
    Ok(())
}
