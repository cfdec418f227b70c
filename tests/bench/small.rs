//! A lone request, and 128 under way, beside the floor.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    rc::Rc,
    time::Instant,
};

use kms_protocol::{NoFields, Opcode, push_frame};
use nix::unistd::Pid;

use super::{
    ECHO_LEN, Outcome, ROUNDS, Server, ask, encrypt_request, greet, pin, pipelined, spread, start_agent,
    start_echo, wait_readable,
};

/// Single operations and pipelined operations of one round, and how many are under way at once.
const SINGLES: usize = 20_000;
const PIPELINED: usize = 200_000;
const DEPTH: usize = 128;

/// Per-operation time of one request after the other: the median and the 99th of a hundred, in microseconds.
fn singles(stream: &mut UnixStream, request: &[u8], answer_len: usize, polls: bool) -> Outcome<(f64, f64)> {
    let mut times = Vec::with_capacity(SINGLES);
    let mut answer = vec![0; answer_len];
    for _ in 0..SINGLES {
        let start = Instant::now();
        stream.write_all(request)?;
        if polls {
            wait_readable(stream)?;
        }
        stream.read_exact(&mut answer)?;
        times.push(start.elapsed());
    }
    times.sort();
    let at = |index: usize| times[index].as_secs_f64() * 1e6;
    Ok((at(SINGLES / 2), at(SINGLES * 99 / 100)))
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

pub(crate) fn run() -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let (echo, echo_stream) = start_echo(folder.path(), "echo.sock")?;
    let (polled_echo, polled_echo_stream) = start_echo(folder.path(), "polled-echo.sock")?;
    let (agent, mut agent_stream, agent_path) = start_agent(folder.path(), "")?;
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
            let rate =
                pipelined(&mut candidate.stream, &candidate.many.0, candidate.many.1, DEPTH, PIPELINED)?;
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
