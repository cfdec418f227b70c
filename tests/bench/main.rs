//! Measures the shipped agent and `kmsctl` beside the floor and beside `age`, in one run and in interleaved rounds.
//! It asserts nothing: a person reads it. `docs/benchmarks.md` has the commands, the results and what they mean.

mod files;
mod memory;
mod plot;
mod rates;
mod small;
mod start;

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
    Add, Constraint, FRAME_MAX, Frame, Hello, KeyAndContext, KeyRef, Material, Opcode, PROTOCOL_VERSION,
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
/// Size of an echoed message.
const ECHO_LEN: usize = 64;
const EMPTY_CONTEXT: [u8; 4] = [0; 4];

fn main() -> Outcome<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["echo", path] => echo(Path::new(path)),
        ["small"] => small::run(),
        ["rates"] => rates::run(None),
        ["rates", folder] => rates::run(Some(Path::new(folder))),
        ["memory"] => memory::run(),
        ["files"] => files::run(1 << 30),
        ["start"] => start::run(),
        [] => {
            small::run()?;
            rates::run(None)?;
            memory::run()?;
            start::run()?;
            files::run(1 << 30)
        }
        _ => Err("usage: kms-bench [small | rates [FOLDER] | memory | start | files]".into()),
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
    if pid.as_raw() == 0 {
        return Ok(sched_setaffinity(pid, &set)?);
    }
    // The agent serves on another thread than its first.
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = task?.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(thread), &set)?;
    }
    Ok(())
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

/// Starts the floor, which serves one connection.
fn start_echo(folder: &Path, name: &str) -> Outcome<(Rc<Server>, UnixStream)> {
    let path = folder.join(name);
    let echo = Server(Command::new(env::current_exe()?).arg("echo").arg(&path).spawn()?);
    Ok((Rc::new(echo), connect(&path)?))
}

/// Starts an agent with a key of the name `bench`; gives it, a connection and the path of its socket.
fn start_agent(folder: &Path, config: &str) -> Outcome<(Rc<Server>, UnixStream, PathBuf)> {
    let (path, config_path) = (folder.join("agent.sock"), folder.join("config.toml"));
    fs::write(&config_path, config)?;
    let mut command = Command::new(programs()?.join("kms-agent"));
    command.args(["--memory", "-D", "-a"]).arg(&path).arg("--config").arg(&config_path);
    let agent = Rc::new(Server(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?));
    let mut stream = greet(&path)?;
    ask(&mut stream, &add_request(1, "bench")?)?;
    Ok((agent, stream, path))
}

fn add_request(token: u128, name: &str) -> Outcome<Vec<u8>> {
    let mut request = Vec::new();
    let constraints = vec![Constraint { kind: constraint::MEMORY_ONLY, value: 0 }];
    let token = token.to_le_bytes();
    let add = Add { token, name, material: Material::Generate, if_missing: false, constraints };
    push_frame(&mut request, Opcode::Add.code(), 2, &add, &[])?;
    Ok(request)
}

fn encrypt_request(plaintext_len: usize) -> Outcome<Vec<u8>> {
    let mut request = Vec::new();
    let fields = KeyAndContext { key: KeyRef::Name("bench"), context: &EMPTY_CONTEXT };
    push_frame(&mut request, Opcode::Encrypt.code(), 7, &fields, &vec![0x55; plaintext_len])?;
    Ok(request)
}

/// Operations a second with `depth` under way, an even number: the next half leaves when half of the answers are there.
fn pipelined(
    stream: &mut UnixStream,
    request: &[u8],
    answer_len: usize,
    depth: usize,
    count: usize,
) -> Outcome<f64> {
    let half = request.repeat(depth / 2);
    let mut answers = vec![0; answer_len * depth / 2];
    let rounds = count / (depth / 2);
    let start = Instant::now();
    stream.write_all(&half)?;
    for _ in 0..rounds {
        stream.write_all(&half)?;
        stream.read_exact(&mut answers)?;
    }
    stream.read_exact(&mut answers)?;
    Ok(((rounds + 1) * depth / 2) as f64 / start.elapsed().as_secs_f64())
}

/// Waits in `poll` until an answer is there, as kms-client does.
fn wait_readable(stream: &UnixStream) -> Outcome<()> {
    poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    Ok(())
}

/// Median, minimum and maximum.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}
